"""What `calib/operators/` says of each operator, to be compared: a name that goes, or a word that changes, is seen.

A line of what is said, then the operators of which it is: `div=divide` is an operator and its alias. Only what differs
from the defaults is said; poles are argument@place/exponent, training is flag/share/statistics. After a change that is
meant, put what `test_operator_table.py` prints here.
"""

TABLE = """
nothing
    cummax cummin hardshrink
asserts
    _assert_tensor_metadata
checks_numbers
    scatter
checks_numbers, error=share, poles=0@0/1, hands_on, powers
    pow
compares, literals=other, error=order, takes_offset
    ge=greater_equal gt=greater le=less_equal lt=less
converts
    _to_copy convert_element_type to
empties
    empty empty_like empty_permuted empty_strided new_empty new_empty_strided
epsilon=eps, variance_at=4, takes_offset
    _native_batch_norm_legit_no_training
epsilon=eps, variance_at=4, takes_offset, training=5/None/3
    batch_norm
equates, literals=other, error=order, takes_offset
    eq ne=not_equal
error=exponent
    cosh exp exp2=special_exp2 expm1=special_expm1 sinh
error=exponent, poles=0@1.5708/None 0@-1.5708/None, takes_offset
    tan
error=logarithm, angle
    atan2=arctan2
error=logarithm, poles=0@0/None
    log log10 log2
error=order, takes_offset
    _unique _unique2 argmax argmin argsort bucketize searchsorted unique_consecutive unique_dim
error=same
    _embedding_bag _upsample_bicubic2d_aa _upsample_bilinear2d_aa adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d asinh=arcsinh atan=arctan celu col2im elu embedding embedding_bag erf erfc gelu glu
    hardsigmoid hardswish im2col index_add index_copy index_put leaky_relu log_sigmoid log_sigmoid_forward
    max_pool2d_with_indices max_pool3d_with_indices mish prelu scatter_add scatter_reduce selu sigmoid=special_expit
    silu softplus softshrink tanh upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_trilinear3d
error=same, takes_offset
    cos diff huber_loss l1_loss mse_loss sin smooth_l1_loss
error=same, training=3/None/None
    rrelu
error=share, hands_on, power=2.0
    square
error=share, keeps_poles, hands_on, power=0.5
    sqrt
error=share, multiplies, hands_on
    cumprod prod
error=share, poles=0@0/None, power=-0.5
    rsqrt
error=share, poles=0@0/None, power=-1.0
    reciprocal
hides=attention logits, product=attention, mask_at=3
    scaled_dot_product_attention
hides=sum
    cumsum nansum
hides=sum of exponentials, error=same, takes_offset
    logsumexp
hides=sum of exponentials, error=same, takes_offset, wrong_on_host
    _log_softmax log_softmax=special_log_softmax
hides=sum of exponentials, mask_at=0, error=exponent, takes_offset
    _safe_softmax _softmax softmax=special_softmax
hides=sum of squares, along=groups, groups_at=1, centred, epsilon=eps, takes_offset
    group_norm
hides=sum of squares, along=groups, groups_at=6, centred, epsilon=eps, takes_offset
    native_group_norm
hides=sum of squares, along=last, centred, epsilon=eps, takes_offset
    layer_norm native_layer_norm
hides=sum of squares, along=last, epsilon=eps
    _fused_rms_norm rms_norm
hides=sum of squares, along=spatial, centred, epsilon=eps, takes_offset, training=5/None/3
    instance_norm
hides=sum of squares, centred, takes_offset
    std std_mean var var_mean
hides=sum of squares, error=same, hands_on
    linalg_vector_norm norm
hides=sum, along=window, window=1
    avg_pool1d
hides=sum, along=window, window=1, adaptive
    adaptive_avg_pool1d
hides=sum, along=window, window=2
    avg_pool2d
hides=sum, along=window, window=2, adaptive
    adaptive_avg_pool2d
hides=sum, along=window, window=3
    avg_pool3d
hides=sum, along=window, window=3, adaptive
    adaptive_avg_pool3d
hides=sum, averages
    nanmean
hides=sum, hands_on
    sum
hides=sum, hands_on, averages
    mean
keeps_rounded, error=same
    reflection_pad1d reflection_pad2d reflection_pad3d relu6 replication_pad1d replication_pad2d replication_pad3d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d
keeps_rounded, error=same, hands_on
    max_pool1d max_pool2d max_pool3d relu
keeps_rounded, error=share, hands_on
    abs=absolute neg=negative
literals=fill_value, fills, checks_numbers
    full full_like new_full
literals=max, checks_numbers, keeps_rounded, error=same
    clamp_max
literals=min_val max_val, checks_numbers, keeps_rounded, error=same
    hardtanh
literals=nan posinf neginf, error=same
    nan_to_num
literals=other, steps, error=step, poles=1@0/None
    floor_divide
literals=other, steps, error=step, slopes, poles=1@0/None, takes_offset
    fmod remainder
literals=s, fills, checks_numbers
    scalar_tensor
literals=start end step
    arange
literals=start end, checks_numbers
    linspace
literals=threshold value, checks_numbers, error=same
    threshold
literals=value, checks_numbers
    index_fill
literals=value, checks_numbers, keeps_rounded, error=same
    constant_pad_nd pad
literals=value, fills, checks_numbers, overwrites
    fill
literals=value, takes_offset
    addcdiv addcmul
masks=chooses, literals=self other, keeps_rounded, error=same
    where
masks=chooses, literals=value, checks_numbers, keeps_rounded, error=same
    masked_fill
masks=computes, error=same, hands_on
    maximum minimum
masks=computes, literals=min max, checks_numbers, keeps_rounded, error=same, hands_on
    clamp=clip
masks=computes, literals=min, checks_numbers, keeps_rounded, error=same, hands_on
    clamp_min
masks=computes, literals=other alpha, adds, subtracts, takes_offset
    rsub
masks=computes, literals=other alpha, hands_on, adds, subtracts, takes_offset
    sub=subtract
masks=computes, literals=other alpha, hands_on, adds, takes_offset
    add
masks=computes, literals=other, error=share, hands_on
    mul=multiply
masks=computes, literals=other, error=share, poles=1@0/None, hands_on
    div=divide=true_divide
moves
    alias as_strided broadcast_to cat=concat=concatenate channel_shuffle chunk clone column_stack contiguous diagonal
    diagonal_copy dsplit dstack expand expand_as flatten flip fliplr flipud gather hsplit hstack index index_select
    lift_fresh lift_fresh_copy mH mT masked_select matrix_H movedim=moveaxis narrow narrow_copy numpy_T permute
    pixel_shuffle pixel_unshuffle ravel repeat repeat_interleave reshape reshape_as resolve_conj resolve_neg roll
    rot90 select slice split split_with_sizes squeeze stack t take take_along_dim tensor_split tile
    transpose=swapaxes=swapdims tril triu unbind unflatten unfold unsqueeze view_as vsplit vstack
moves, bitcasts=dtype
    view
moves, checks_numbers
    fill_diagonal
moves, overwrites
    copy
moves, shares=0
    _unsafe_view atleast_1d atleast_2d atleast_3d broadcast_tensors meshgrid unsafe_chunk unsafe_split
    unsafe_split_with_sizes
moves, shares=0, training=2/1/None
    alpha_dropout dropout feature_alpha_dropout feature_dropout
moves, writes_nothing
    detach
never_low
    _cdist_forward _ctc_loss bincount cdist cholesky cholesky_inverse cholesky_solve ctc_loss dequantize det geqrf
    histc histogram int_repr inverse istft logdet lu_solve lu_unpack matrix_exp nanquantile orgqr ormqr pdist qr
    quantile quantize_per_channel quantize_per_tensor quantize_per_tensor_dynamic slogdet stft svd trapezoid
    triangular_solve
overwrites
    zero
places=1, wrong_on_host
    grid_sampler grid_sampler_2d grid_sampler_3d
poles=0@-1/None
    log1p=special_log1p
poles=0@-1/None 0@1/None
    acos=arccos asin=arcsin atanh=arctanh erfinv=special_erfinv
poles=0@0/None 0@-1/None
    digamma=special_psi=special_digamma lgamma=special_gammaln
poles=0@0/None 0@1/None, wrong_on_host
    logit=special_logit
poles=0@1/None
    acosh=arccosh
poles=1@0/None
    xlogy=special_xlogy
product=contraction, hands_on, takes_offset
    bilinear tensordot
product=convolution, bias_along=-2, hands_on, takes_offset
    conv1d
product=convolution, bias_along=-3, hands_on, takes_offset
    conv2d
product=convolution, bias_along=-4, hands_on, takes_offset
    conv3d
product=convolution, transposed_at=6, hands_on, takes_offset
    _convolution convolution
product=matrix product, bias_along=-1, hands_on, takes_offset
    linear
product=matrix product, hands_on, takes_offset
    bmm dot matmul mm mv
product=matrix product, left=1, hands_on, takes_offset
    addbmm addmv
product=matrix product, left=1, literals=beta alpha, hands_on, takes_offset
    addmm baddbmm
product=recurrent, takes_offset
    gru lstm rnn_relu rnn_tanh
product=transposed convolution, bias_along=-2, hands_on, takes_offset
    conv_transpose1d
product=transposed convolution, bias_along=-3, hands_on, takes_offset
    conv_transpose2d
product=transposed convolution, bias_along=-4, hands_on, takes_offset
    conv_transpose3d
selects, error=order, takes_offset
    sort topk
selects, error=same
    amax amin kthvalue max min msort
shares=0
    conj_physical sum_to_size
shares=0, converts
    type_as
shares=0, fresh_of_several
    cartesian_prod
shares=1, fresh_of_several, product=contraction, hands_on, takes_offset
    einsum
steps
    heaviside sgn sign
steps, error=step, slopes, takes_offset
    frac
steps, error=step, takes_offset
    ceil floor round trunc=fix
takes_offset
    cross lerp linalg_cross
training=2/1/None
    native_dropout
training=5/None/3
    _native_batch_norm_legit native_batch_norm
"""
