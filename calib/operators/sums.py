"""Operators that add up: reductions, norms, softmax, products, convolutions, attention, recurrent layers."""

from __future__ import annotations

from calibcast.calib.operators.operator import (
    ATTENTION,
    CONTRACTION,
    CONVOLUTION,
    EXPONENT,
    EXPONENTIALS,
    GROUPS,
    LAST,
    LOGITS,
    MATRIX,
    RECURRENT,
    SAME,
    SPATIAL,
    SQUARES,
    SUM,
    TRANSPOSED,
    WINDOW,
    Operator,
    Training,
    alike,
    operator,
)

_TRAINS = Training(flag=5, statistics=3)

REDUCTIONS: tuple[Operator, ...] = (
    operator("sum", hides=SUM, hands_on=True),
    operator("mean", hides=SUM, averages=True, hands_on=True),
    *alike("cumsum nansum", hides=SUM),
    operator("nanmean", hides=SUM, averages=True),
    operator("avg_pool1d", hides=SUM, along=WINDOW, window=1),
    operator("adaptive_avg_pool1d", hides=SUM, along=WINDOW, window=1, adaptive=True),
    operator("avg_pool2d", hides=SUM, along=WINDOW, window=2),
    operator("adaptive_avg_pool2d", hides=SUM, along=WINDOW, window=2, adaptive=True),
    operator("avg_pool3d", hides=SUM, along=WINDOW, window=3),
    operator("adaptive_avg_pool3d", hides=SUM, along=WINDOW, window=3, adaptive=True),
    *alike("var std var_mean std_mean", hides=SQUARES, centred=True, takes_offset=True),
    *alike("norm linalg_vector_norm", hides=SQUARES, error=SAME, hands_on=True),
    *alike("layer_norm native_layer_norm", hides=SQUARES, along=LAST, centred=True, epsilon="eps", takes_offset=True),
    *alike("rms_norm _fused_rms_norm", hides=SQUARES, along=LAST, epsilon="eps"),
    operator("group_norm", hides=SQUARES, along=GROUPS, groups_at=1, centred=True, epsilon="eps", takes_offset=True),
    operator(
        "native_group_norm", hides=SQUARES, along=GROUPS, groups_at=6, centred=True, epsilon="eps", takes_offset=True
    ),
    operator(
        "instance_norm", hides=SQUARES, along=SPATIAL, centred=True, epsilon="eps", takes_offset=True, training=_TRAINS
    ),
    operator("batch_norm", epsilon="eps", variance_at=4, takes_offset=True, training=_TRAINS),
    operator("_native_batch_norm_legit_no_training", epsilon="eps", variance_at=4, takes_offset=True),
    *alike("_native_batch_norm_legit native_batch_norm", training=_TRAINS),
    # exp(x - max x): an offset is subtracted first, and each term of the sum is at most 1.
    operator("softmax special_softmax", error=EXPONENT, hides=EXPONENTIALS, mask_at=0, takes_offset=True),
    *alike("_softmax _safe_softmax", error=EXPONENT, hides=EXPONENTIALS, mask_at=0, takes_offset=True),
    # The host's kernel rounds the logarithm of the sum before it subtracts it. In a confident row, that logarithm is
    # the whole result.
    operator("log_softmax special_log_softmax", error=SAME, hides=EXPONENTIALS, takes_offset=True, wrong_on_host=True),
    operator("_log_softmax", error=SAME, hides=EXPONENTIALS, takes_offset=True, wrong_on_host=True),
    operator("logsumexp", error=SAME, hides=EXPONENTIALS, takes_offset=True),
    # They take the difference of their first two arguments.
    *alike("mse_loss l1_loss huber_loss smooth_l1_loss", error=SAME, takes_offset=True),
)

# Operators that `torch.utils.flop_counter` counts as work, before and after decomposition.
PRODUCTS: tuple[Operator, ...] = (
    operator("conv1d", product=CONVOLUTION, hands_on=True, takes_offset=True, bias_along=-2),
    operator("conv2d", product=CONVOLUTION, hands_on=True, takes_offset=True, bias_along=-3),
    operator("conv3d", product=CONVOLUTION, hands_on=True, takes_offset=True, bias_along=-4),
    *alike("convolution _convolution", product=CONVOLUTION, hands_on=True, transposed_at=6, takes_offset=True),
    operator("conv_transpose1d", product=TRANSPOSED, hands_on=True, takes_offset=True, bias_along=-2),
    operator("conv_transpose2d", product=TRANSPOSED, hands_on=True, takes_offset=True, bias_along=-3),
    operator("conv_transpose3d", product=TRANSPOSED, hands_on=True, takes_offset=True, bias_along=-4),
    operator("linear", product=MATRIX, hands_on=True, takes_offset=True, bias_along=-1),
    *alike("matmul mm bmm mv dot", product=MATRIX, hands_on=True, takes_offset=True),
    # beta input + alpha a b: the operands of the product are arguments 1 and 2.
    operator("addmm", product=MATRIX, hands_on=True, left=1, literals=("beta", "alpha"), takes_offset=True),
    operator("baddbmm", product=MATRIX, hands_on=True, left=1, literals=("beta", "alpha"), takes_offset=True),
    *alike("addbmm addmv", product=MATRIX, hands_on=True, left=1, takes_offset=True),
    *alike("tensordot bilinear", product=CONTRACTION, hands_on=True, takes_offset=True),
    operator("einsum", product=CONTRACTION, hands_on=True, takes_offset=True, shares=1, fresh_of_several=True),
    operator("scaled_dot_product_attention", product=ATTENTION, hides=LOGITS, mask_at=3),
    *alike("lstm gru rnn_tanh rnn_relu", product=RECURRENT, takes_offset=True),
)
