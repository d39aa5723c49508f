"""The kinds of torch's operations for the graph: a table from an aten operation to its kind.

An operation that is in no set here is "unknown": walks over the graph end there, and no scale is folded across it.
"""

from __future__ import annotations

from typing import Literal

Kind = Literal[
    "product", "convolution", "attention", "embedding", "lookup", "norm", "softmax", "view", "join", "multiply", "add",
    "homogeneous", "activation", "reduction", "statistic", "constant", "routing", "unknown",
]  # fmt: skip


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


PRODUCTS = _names(
    "mm bmm addmm baddbmm addbmm linear matmul mv addmv dot _addmm_activation _grouped_mm grouped_mm_fallback "
    "linear_relu _scaled_mm _scaled_grouped_mm"
)
# Which operand of a product is added to it.
ADDED = {"addmm": 0, "baddbmm": 0, "addbmm": 0, "addmv": 0, "_addmm_activation": 0, "linear": 2, "linear_relu": 2}
GROUPED = _names("_grouped_mm grouped_mm_fallback")
CONVOLUTIONS = _names("convolution _convolution mkldnn_convolution convolution_overrideable")
FUSED_ATTENTION = _names(
    "_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
    "_scaled_dot_product_fused_attention_overrideable scaled_dot_product_attention _flash_attention_forward "
    "_efficient_attention_forward _scaled_dot_product_attention_math _scaled_dot_product_attention_math_for_mps"
)
EMBEDDINGS = _names("embedding _embedding_bag _embedding_bag_forward_only")
LOOKUPS = _names("index index_select gather take take_along_dim _unsafe_index _unsafe_masked_index repeat_interleave")
LAYER_NORMS = _names("native_layer_norm layer_norm")
RMS_NORMS = _names("_fused_rms_norm rms_norm")
GROUP_NORMS = _names("native_group_norm group_norm")
BATCH_NORMS = _names(
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm batch_norm "
    "_batch_norm_with_update miopen_batch_norm _native_batch_norm_legit_functional instance_norm"
)
NORMS = LAYER_NORMS | RMS_NORMS | GROUP_NORMS | BATCH_NORMS
SOFTMAXES = _names("_softmax softmax _safe_softmax _log_softmax log_softmax _masked_softmax")
VIEWS = _names(
    "view _unsafe_view reshape _reshape_alias permute transpose t expand unsqueeze squeeze select slice split "
    "split_with_sizes unbind chunk alias detach lift_fresh lift clone _to_copy contiguous unfold as_strided diagonal "
    "narrow movedim flatten unflatten repeat copy _conj view_as flip roll constant_pad_nd pad pixel_shuffle "
    "pixel_unshuffle im2col col2im native_dropout dropout bernoulli broadcast_to expand_copy view_copy slice_scatter "
    "split_with_sizes_copy unsafe_split tensor_split reflection_pad1d reflection_pad2d replication_pad1d "
    "replication_pad2d channel_shuffle _nested_view_from_buffer resolve_conj view_as_real view_as_complex real imag "
    "rot90 tril triu native_channel_shuffle mkldnn_reorder_conv2d_weight to_dense squeeze_copy _pin_memory "
    "_sparse_semi_structured_tile unfold_copy as_strided_ resize"
)
JOINS = _names("cat stack concat concatenate hstack vstack index_put index_copy index_add scatter scatter_add "
               "scatter_reduce masked_scatter masked_fill select_scatter index_fill _unsafe_index_put "
               "_index_put_impl put")  # fmt: skip
MULTIPLIES = _names("mul div addcmul addcdiv true_divide _foreach_mul")
ADDS = _names("add sub rsub lerp _foreach_add hypot logaddexp")
# f(s x) = s f(x) for s > 0, channel by channel.
HOMOGENEOUS = _names(
    "neg abs relu leaky_relu _prelu_kernel prelu maximum minimum where positive avg_pool1d avg_pool2d avg_pool3d "
    "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d max_pool2d_with_indices max_pool1d max_pool2d "
    "max_pool3d_with_indices _adaptive_max_pool2d adaptive_max_pool2d upsample_nearest1d upsample_nearest2d "
    "upsample_bilinear2d upsample_bicubic2d upsample_linear1d _upsample_bicubic2d_aa _upsample_bilinear2d_aa "
    "_upsample_nearest_exact2d grid_sampler_2d grid_sampler grid_sampler_2d_cpu_fallback _upsample_nearest_exact1d "
    "threshold fmax fmin upsample_trilinear3d upsample_nearest3d grid_sampler_3d rrelu rrelu_with_noise"
)
ACTIVATIONS = _names(
    "gelu silu sigmoid tanh hardswish hardsigmoid hardtanh elu celu selu mish softplus log_sigmoid_forward log_sigmoid "
    "relu6 exp log pow square sqrt rsqrt reciprocal erf sin cos clamp clamp_min clamp_max log1p exp2 expm1 glu "
    "softsign round floor ceil sign remainder fmod tan atan atan2 log2 log10 nan_to_num trunc frac polar erfinv "
    "hardshrink softshrink sinh cosh asinh acosh isnan isinf logit sgn complex"
)
REDUCTIONS = _names("mean sum amax amin max min logsumexp prod median nanmean any all argmax argmin count_nonzero "
                    "logcumsumexp cumsum cumprod nansum aminmax cummax cummin unique_consecutive")  # fmt: skip
STATISTICS = _names("var var_mean std std_mean linalg_vector_norm norm _weight_norm_interface _weight_norm "
                    "_linalg_svd linalg_norm cov _cdist_forward _euclidean_dist cdist linalg_qr")  # fmt: skip
CONSTANTS = _names(
    "arange zeros ones full empty empty_like zeros_like ones_like full_like scalar_tensor eye linspace rand randn "
    "randint rand_like randn_like new_zeros new_ones new_full new_empty randperm new_empty_strided empty_strided "
    "range logspace randint_like tril_indices triu_indices _efficientzerotensor hann_window hamming_window normal"
)
ROUTING = _names(
    "topk sort argsort nonzero eq ne lt le gt ge logical_and logical_or logical_not logical_xor bitwise_and bitwise_or "
    "bitwise_not bitwise_xor isin bucketize searchsorted one_hot multinomial histc bincount floor_divide fill zero "
    "masked_select unique _unique2 unique_dim _local_scalar_dense item __and__ __or__ equal is_nonzero "
    "_assert_async allclose isclose isfinite bitwise_left_shift bitwise_right_shift _assert_scalar is_same_size "
    "sym_size nonzero_numpy nonzero_static set_ resize_ _is_all_true _is_any_true random uniform exponential "
    "_assert_tensor_metadata record_stream size trilu_indices _fft_r2c _fft_c2r _fft_c2c fft_rfft fft_irfft"
)
# Where a channel of the result is not a channel of what was read: walks that follow channels end there.
_ENDS = _names("_fft_r2c _fft_c2r _fft_c2c fft_rfft fft_irfft")

_TABLE: dict[str, Kind] = {}
for _set, _kind in (
    (PRODUCTS, "product"), (CONVOLUTIONS, "convolution"), (FUSED_ATTENTION, "attention"), (EMBEDDINGS, "embedding"),
    (LOOKUPS, "lookup"), (NORMS, "norm"), (SOFTMAXES, "softmax"), (VIEWS, "view"), (JOINS, "join"),
    (MULTIPLIES, "multiply"), (ADDS, "add"), (HOMOGENEOUS, "homogeneous"), (ACTIVATIONS, "activation"),
    (REDUCTIONS, "reduction"), (STATISTICS, "statistic"), (CONSTANTS, "constant"), (ROUTING - _ENDS, "routing"),
):  # fmt: skip
    for _name in _set:
        _TABLE[_name] = _kind  # type: ignore[assignment]


def kind_of(name: str) -> Kind:
    """The kind of an operation.

    Args:
        name: Its name without namespace and overload, e.g. ``"addmm"``; an in-place one may end with ``_``.
    """
    found = _TABLE.get(name)
    return found if found is not None else _TABLE.get(name.removesuffix("_"), "unknown")
