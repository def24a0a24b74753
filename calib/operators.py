"""What ATen operators do, as far as measuring needs to know it. Data.

Operators are named without overload and in-place mark: `add` stands for `aten.add.Tensor` and `aten.add_.Scalar`.
"""

from __future__ import annotations

# Operators whose outputs are elements of their inputs, moved. They have no range rule: they follow their inputs.
MOVES = frozenset(
    """
    alias as_strided atleast_1d atleast_2d atleast_3d broadcast_tensors broadcast_to cat channel_shuffle chunk clone
    column_stack concat concatenate contiguous copy detach diagonal diagonal_copy dropout dsplit dstack expand
    expand_as feature_dropout alpha_dropout feature_alpha_dropout fill_diagonal flatten flip fliplr flipud gather
    hsplit hstack index index_select lift_fresh lift_fresh_copy masked_select matrix_H mH mT meshgrid moveaxis movedim
    narrow narrow_copy numpy_T permute pixel_shuffle pixel_unshuffle ravel repeat repeat_interleave reshape
    reshape_as resolve_conj resolve_neg roll rot90 select slice split split_with_sizes squeeze stack swapaxes
    swapdims t take take_along_dim tensor_split tile transpose tril triu unbind unflatten unfold unsafe_chunk
    unsafe_split unsafe_split_with_sizes unsqueeze view view_as _unsafe_view vsplit vstack
    """.split()  # noqa: SIM905 - a list of words reads as one
)

# Operators that do not round anew what was rounded before: of rounded elements they give some, moved, negated or set to
# zero. An edge of rounding passes them; see `calib.rounding_edges`.
KEEPS_ROUNDED = MOVES | frozenset(
    {"abs", "detach", "max_pool1d", "max_pool2d", "max_pool3d", "neg", "negative", "relu"}
)

# Operators that hide values, by what they hide. Calibration measures how large these get.
SUMS = frozenset(
    """
    sum mean cumsum nansum nanmean avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d
    """.split()  # noqa: SIM905
)
SQUARES = frozenset(
    """
    layer_norm native_layer_norm group_norm native_group_norm rms_norm _fused_rms_norm instance_norm var std var_mean
    std_mean norm linalg_vector_norm
    """.split()  # noqa: SIM905
)
SOFTMAX = frozenset({"softmax", "_softmax", "_safe_softmax"})
EXPONENTIALS = SOFTMAX | {"log_softmax", "_log_softmax", "logsumexp"}
ATTENTION = frozenset({"scaled_dot_product_attention"})

# What an attention mask may pass through on its way to the softmax that it is for.
MASKING = frozenset(
    {"where", "masked_fill", "add", "sub", "rsub", "mul", "div", "maximum", "minimum", "clamp", "clamp_min"}
)

# What gives some of its input's elements, chosen by their order, and what asks for that order. Both see through a cast
# that keeps it. `eq` and `ne` do not: two values may become one.
SELECTS = frozenset({"topk", "sort", "msort", "kthvalue", "max", "amax", "min", "amin"})
COMPARES = frozenset({"lt", "le", "gt", "ge", "less", "less_equal", "greater", "greater_equal"})
