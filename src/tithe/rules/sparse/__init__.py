"""Sparse rules: operations with a weight of which a part is selected. One file a family of operations.

linear, conv, embedding, norm  the families       channels      whole input channels
sparse_gradient  ways to selected entries         conv_kernels  settings of convolutions, and their gradients
reductions       gradients of vectors             probes, channel_probes  scores and prices instead of gradients
"""
