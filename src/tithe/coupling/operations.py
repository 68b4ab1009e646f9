"""Map each operation to its effect on the labels of its arguments; torch itself says which ones are entrywise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

from tithe.coupling import extents, moves, products
from tithe.coupling.call import Call
from tithe.coupling.labels import Labels

Handler = Callable[[Call], list[Labels]]


def _table(*rows: tuple[Handler, str | Iterable[str]]) -> Mapping[str, Handler]:
    return {name: handler for handler, names in rows for name in (names.split() if isinstance(names, str) else names)}


OPERATIONS: Mapping[str, Handler] = _table(
    (products.matrices, products.MATRICES),
    (products.linear, "linear"),
    (products.convolution, "convolution _convolution convolution_overrideable"),
    (
        products.attention,
        """
        _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention
        _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
        _scaled_dot_product_fused_attention_overrideable
        """,
    ),
    (moves.view, "view _unsafe_view reshape _reshape_copy view_copy"),
    (
        moves.rearranged,
        """
        permute transpose t expand repeat squeeze unsqueeze diagonal pixel_shuffle pixel_unshuffle
        native_channel_shuffle channel_shuffle
        """,
    ),
    (moves.parted, "select slice split split_with_sizes unbind"),
    (moves.shifted, "flip roll unfold"),
    (moves.padded, "constant_pad_nd"),
    (moves.indexed, "index _unsafe_index"),
    (moves.gathered, "gather index_select"),
    (moves.joined, "cat stack"),
    (
        extents.entrywise,
        """
        copy masked_fill threshold gelu hardswish _prelu_kernel log_sigmoid_forward complex polar
        hardtanh rrelu_with_noise where
        """,
    ),
    (
        extents.same,
        """
        clone _to_copy detach alias lift_fresh contiguous zeros_like ones_like empty_like full_like rand_like
        randn_like randint_like bernoulli normal uniform exponential random fill zero native_dropout new_empty
        new_zeros new_ones new_full new_empty_strided tril triu _conj
        """,
    ),
    (
        extents.created,
        "empty empty_strided zeros ones full arange linspace rand randn randint randperm scalar_tensor eye",
    ),
    (
        extents.whole,
        """
        scatter scatter_add scatter_reduce index_put _index_put_impl index_add index_copy index_fill slice_scatter
        select_scatter masked_scatter mkldnn_rnn_layer _thnn_fused_lstm_cell _thnn_fused_gru_cell _cudnn_rnn
        miopen_rnn nll_loss_forward nll_loss2d_forward mse_loss smooth_l1_loss huber_loss binary_cross_entropy
        multi_margin_loss multilabel_margin_loss_forward soft_margin_loss _ctc_loss
        """,
    ),
    (
        extents.along,
        """
        _softmax _log_softmax _safe_softmax cumsum cumprod logcumsumexp cummax cummin sort argsort topk
        """,
    ),
    (
        extents.reduction,
        """
        sum mean prod var std var_mean std_mean amax amin max min any all argmax argmin logsumexp norm
        linalg_vector_norm median nanmedian nansum count_nonzero kthvalue mode
        """,
    ),
    (
        partial(extents.windows, 1),
        """
        avg_pool1d adaptive_avg_pool1d max_pool1d upsample_nearest1d _upsample_nearest_exact1d upsample_linear1d
        reflection_pad1d replication_pad1d
        """,
    ),
    (
        partial(extents.windows, 2),
        """
        max_pool2d max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d
        fractional_max_pool2d mkldnn_max_pool2d mkldnn_adaptive_avg_pool2d upsample_nearest2d
        _upsample_nearest_exact2d upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa
        _upsample_bicubic2d_aa reflection_pad2d replication_pad2d grid_sampler_2d
        """,
    ),
    (
        partial(extents.windows, 3),
        """
        max_pool3d_with_indices avg_pool3d _adaptive_avg_pool3d adaptive_max_pool3d upsample_nearest3d
        upsample_trilinear3d reflection_pad3d replication_pad3d
        """,
    ),
    (
        extents.batch_norm,
        """
        native_batch_norm cudnn_batch_norm miopen_batch_norm _native_batch_norm_legit _batch_norm_with_update
        _native_batch_norm_legit_functional _native_batch_norm_legit_no_training
        _batch_norm_no_update
        """,
    ),
    (extents.group_norm, "native_group_norm"),
    (extents.layer_norm, "native_layer_norm _fused_rms_norm"),
    (extents.table, "embedding"),
    (extents.halves, "glu"),
)
