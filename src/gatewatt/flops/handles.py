"""Which operators cost what: the one table behind every fvcore trace of this package.

1 MAC = 1 FLOP, as fvcore and the papers count. Convolutions, linear layers, matrix products and attention are priced;
normalisation, activations, pooling and element-wise arithmetic are free by convention; an operator in neither list is an error, because
fvcore would count it as 0 without a word.
"""

from __future__ import annotations

import math
from typing import Any

from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import (
    addmm_flop_jit,
    bmm_flop_jit,
    conv_flop_jit,
    einsum_flop_jit,
    get_shape,
    linear_flop_jit,
    matmul_flop_jit,
)
from torch import nn


class UnpricedOperator(RuntimeError):
    """An operator without a FLOP formula was met during a trace."""


def attention_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """MACs of fused attention: heads x queries x keys x (query width + value width), for every image."""
    query, key, value = (get_shape(tensor) for tensor in inputs[:3])
    return math.prod(query[:-2]) * query[-2] * key[-2] * (query[-1] + value[-1])


PRICED = {
    "aten::_convolution": conv_flop_jit,
    "aten::linear": linear_flop_jit,
    "aten::addmm": addmm_flop_jit,
    "aten::mm": matmul_flop_jit,
    "aten::bmm": bmm_flop_jit,
    "aten::matmul": matmul_flop_jit,
    "aten::einsum": einsum_flop_jit,
    "aten::scaled_dot_product_attention": attention_flops,
}

FREE = frozenset(
    f"aten::{name}"
    for name in (
        "abs add any argmax all bernoulli ceil clone cumsum cumprod clamp_min clamp_max div dropout elu exp feature_dropout "
        "unsafe_chunk unsafe_split _thnn_fused_lstm_cell gather ge gelu hardtanh index_add index_copy index_select isfinite layer_norm group_norm "
        "batch_norm leaky_relu lerp round floor trunc "
        "le log log_softmax lt maximum max_pool2d max mean min minimum mul ne neg new_ones numel ones_like pad pow prod reciprocal "
        "repeat rsqrt rsub scatter sigmoid silu softmax softplus sort sqrt std sub sum tanh tile topk triu tril upsample_bilinear2d "
        "upsample_nearest2d adaptive_avg_pool2d adaptive_max_pool2d avg_pool2d var where expand_as logical_and logical_not logical_or "
        "bitwise_and bitwise_or unflatten broadcast_to alias lift_fresh scalar_tensor rand rand_like randn_like index_fill masked_select "
        "amax amin one_hot view_as logsumexp index_put hardswish hardsigmoid relu6 mish celu selu log_sigmoid prelu glu instance_norm rms_norm "
        "local_response_norm pixel_shuffle pixel_unshuffle unfold im2col flip scatter_add scatter_reduce var_mean std_mean max_pool1d avg_pool1d "
        "adaptive_avg_pool1d upsample_bicubic2d grid_sampler zero fill isnan nan_to_num addcmul addcdiv logical_xor masked_scatter swapaxes "
        "log2 exp2 sin cos atan2 repeat_interleave movedim concat feature_alpha_dropout log1p expm1 erf sign square norm linalg_vector_norm"
    ).split()
)
"""Operators that cost nothing by convention: normalisation, activation, pooling, element-wise arithmetic, indexing. In-place forms are the same."""


def analyse(module: nn.Module, inputs: tuple[Any, ...]) -> FlopCountAnalysis:
    """Trace ``module`` with this table.

    Raises:
        UnpricedOperator: naming each operator without a formula and the module that called it.
    """
    analysis = FlopCountAnalysis(module, inputs).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    # fvcore documents set_op_handle(name, None) for ignoring an operator, but the released version counts it all the same; start from nothing.
    analysis.clear_op_handles().set_op_handle(**PRICED)
    analysis.total()
    for operator in analysis.unsupported_ops():
        # What fvcore itself passes over is not among these, so a prim:: here is somebody's own autograd function or a scripted call.
        if operator.removesuffix("_") not in FREE:
            callers = [name for name in analysis.by_module() if operator in analysis.unsupported_ops(name)]
            raise UnpricedOperator(f"{operator} in {max(callers, key=len)!r} has no FLOP formula; add one in flops/handles.py")
    return analysis
