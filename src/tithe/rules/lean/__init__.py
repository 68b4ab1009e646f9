"""Lean rules: operations that keep for backward what backward needs, and no more. One file a family of operations.

model     `tithe.lean`                             dispatch  how an operation without a carried weight is reached
activation, dropout, glu, pooling, attention, norm, custom_norm, batch_norm, conv, linear, cross_entropy
          the families
bitpack   bits and bytes instead of tensors        derivative_codes  derivatives in 8 bits
"""
