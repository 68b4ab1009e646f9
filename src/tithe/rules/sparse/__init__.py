"""Sparse rules: operations with a weight of which a part is selected. One file a family of operations.

linear, conv, conv_transpose, embedding, norm  the families
sparse_gradient  ways to selected entries         channels      whole input channels
reductions       gradients of vectors             conv_kernels  settings of convolutions, and their gradients
probes, channel_probes  scores and prices instead of gradients
"""
