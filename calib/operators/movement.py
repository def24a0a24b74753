"""Operators that move elements, choose among them, or only change their type."""

from __future__ import annotations

from calibcast.calib.operators.operator import ORDER, SAME, Operator, Training, alike, operator

_DROPS = Training(flag=2, share=1)

MOVEMENT: tuple[Operator, ...] = (
    *alike(
        """
        alias as_strided broadcast_to channel_shuffle chunk clone contiguous diagonal diagonal_copy expand
        expand_as flatten flip fliplr flipud index index_select lift_fresh lift_fresh_copy masked_select matrix_H mH mT
        narrow narrow_copy numpy_T permute pixel_shuffle pixel_unshuffle ravel repeat repeat_interleave reshape
        reshape_as resolve_conj resolve_neg roll rot90 select slice squeeze t take take_along_dim tile tril triu
        unbind unflatten unfold unsqueeze view_as gather
        """,
        moves=True,
    ),
    *alike("split split_with_sizes tensor_split hsplit vsplit dsplit", moves=True),
    *alike("stack hstack vstack dstack column_stack", moves=True),
    operator("cat concat concatenate", moves=True),
    operator("transpose swapaxes swapdims", moves=True),
    operator("movedim moveaxis", moves=True),
    operator("detach", moves=True, writes_nothing=True),
    operator("copy", moves=True, overwrites=True),
    operator("fill_diagonal", moves=True, checks_numbers=True),
    operator("view", moves=True, bitcasts=("dtype",)),
    # Their composite kernels give views, although their schemas do not say so.
    *alike(
        """
        atleast_1d atleast_2d atleast_3d broadcast_tensors meshgrid unsafe_chunk unsafe_split unsafe_split_with_sizes
        _unsafe_view
        """,
        moves=True,
        shares=0,
    ),
    # In evaluation they return their input itself.
    *alike(
        "dropout feature_dropout alpha_dropout feature_alpha_dropout",
        moves=True,
        shares=0,
        training=_DROPS,
    ),
    operator("native_dropout", training=_DROPS),
    operator("sum_to_size", shares=0),
    operator("conj_physical", shares=0),
    operator("cartesian_prod", shares=0, fresh_of_several=True),
    *alike("max_pool1d max_pool2d max_pool3d", error=SAME, hands_on=True, keeps_rounded=True),
    # Conversions that the user wrote: `.to(dtype)`, and the operators that it becomes.
    *alike("to _to_copy convert_element_type", converts=True),
    operator("type_as", converts=True, shares=0),
    operator("_assert_tensor_metadata", asserts=True),
    # `eq` and `ne` notice when a cast makes two values equal, so they are not among those that only read the order.
    *alike("kthvalue msort amax amin", error=SAME, selects=True),
    *alike("max min", error=SAME, selects=True),
    *alike("topk sort", error=ORDER, selects=True, takes_offset=True),
    *alike("argmax argmin argsort searchsorted bucketize", error=ORDER, takes_offset=True),
    *alike("_unique _unique2 unique_dim unique_consecutive", error=ORDER, takes_offset=True),
    operator("lt less", error=ORDER, compares=True, literals=("other",), takes_offset=True),
    operator("le less_equal", error=ORDER, compares=True, literals=("other",), takes_offset=True),
    operator("gt greater", error=ORDER, compares=True, literals=("other",), takes_offset=True),
    operator("ge greater_equal", error=ORDER, compares=True, literals=("other",), takes_offset=True),
    operator("eq", error=ORDER, equates=True, literals=("other",), takes_offset=True),
    operator("ne not_equal", error=ORDER, equates=True, literals=("other",), takes_offset=True),
)
