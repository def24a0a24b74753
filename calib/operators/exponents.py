"""Which exponents each operator requires of its tensors: one table, to be checked against the mathematics.

A tensor of exponent k is stored as 2^-k times its true value. The table says which exponents keep an operator's result
correct: `out = input + weight = bias` means k_out = k_input + k_weight = k_bias. Names are those of the schema. `out`
is every floating-point result, `out0` the first. `j` is any integer, so `2 j` is any even one. `sum tensors` is the sum
over a list, and `moved` are all tensors that an operator takes. `weight = 0` requires the true value. A number in the
call counts as a tensor of one element: it is replaced by 2^-k times itself, for any k that the equations allow. The
number 0 has every exponent. An argument that is not given sets no condition, except a weight: it is then a 1, whose
exponent is 0. The exponent of an integer is 0, too.

The exponents of operators that are not in the table are 0, but movers pass on those of their input. Source: the algebra
of each operator, which is linear, homogeneous, a power, or picks among its inputs. A product with a power of two is
exact in binary floating point (IEEE 754), except for overflow and subnormal numbers, which `passes.rescaling.exactness`
rules out.
"""

from __future__ import annotations

_ROWS = """
relu neg abs positive leaky_relu                     : out = self
dropout feature_dropout alpha_dropout                : out = input
mean sum cumsum amax amin max min median             : out = self = other
maximum minimum fmax fmin                            : out = self = other
topk sort kthvalue                                   : out0 = self
argmax argmin argsort                                :
add sub rsub                                         : out = self = other
_add_relu                                            : out = self = other
eq ne lt le gt ge                                    : self = other
clamp clamp_min clamp_max                            : out = self = min = max
hardtanh                                             : out = self = min_val = max_val
threshold                                            : out = self = threshold = value
where                                                : out = self = other
masked_fill                                          : out = self = value
masked_scatter                                       : out = self = source
index_fill                                           : out = self = value
index_put                                            : out = self = values
index                                                : out = self
slice_scatter select_scatter                         : out = self = src
scatter scatter_add scatter_reduce                   : out = self = src = value
index_add index_copy                                 : out = self = source
constant_pad_nd pad                                  : out = self = value
reflection_pad1d reflection_pad2d reflection_pad3d   : out = self
replication_pad1d replication_pad2d replication_pad3d : out = self
max_pool1d max_pool2d max_pool3d                     : out = self
max_pool2d_with_indices                              : out0 = self
adaptive_max_pool1d adaptive_max_pool2d              : out0 = self
avg_pool1d avg_pool2d avg_pool3d                     : out = self
adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d : out = self
upsample_nearest1d upsample_nearest2d upsample_nearest3d : out = self = input
upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d : out = self = input
pixel_shuffle pixel_unshuffle im2col col2im          : out = self
norm linalg_vector_norm std                          : out = self
var                                                  : out = 2 self
mul                                                  : out = self + other
div                                                  : out = self - other
matmul bmm mm                                        : out = self + other = self + mat2
dot                                                  : out = self + tensor
mv                                                   : out = self + vec
einsum                                               : out = sum tensors
addmm                                                : out = mat1 + mat2 = self
addmv                                                : out = mat + vec = self
baddbmm                                              : out = batch1 + batch2 = self
addcmul                                              : out = tensor1 + tensor2 = self
addcdiv                                              : out = tensor1 - tensor2 = self
lerp                                                 : out = self = end ; weight = 0
linear                                               : out = input + weight = bias
conv1d conv2d conv3d convolution                     : out = input + weight = bias
conv_transpose1d conv_transpose2d conv_transpose3d   : out = input + weight = bias
embedding                                            : out = weight
prelu                                                : out = self ; weight = 0
layer_norm group_norm rms_norm                       : out = weight = bias ; eps = 2 input
native_layer_norm : out0 = weight = bias ; eps = 2 input ; out1 = input ; out2 = 0 - input
instance_norm : out = weight = bias ; eps = 2 input ; running_mean = 0 ; running_var = 0
batch_norm : running_mean = input ; running_var = eps = 2 j ; out = input - j + weight = bias
square                                               : out = 2 self
sqrt                                                 : self = 2 out
rsqrt                                                : self = 0 - 2 out
reciprocal                                           : out = 0 - self
scaled_dot_product_attention : out = value ; query + key = 2 j ; scale = 0 - 2 j ; attn_mask = 0
full full_like new_full                              : out = fill_value
scalar_tensor                                        : out = s
fill                                                 : out = value
zeros zeros_like new_zeros zero                      :
empty empty_like new_empty empty_strided new_empty_strided empty_permuted :
""".strip()

# These read one tensor's values, and only the shape or type of another.
OF_THE_FIRST = frozenset({"type_as", "expand_as", "view_as", "reshape_as", "to", "_to_copy"})
# x^n for a number n: products, or a root, for which `torch.pow` has kernels that are exact for powers of two.
POWER = "pow"
POWERS = {
    2.0: "out = 2 self",
    3.0: "out = 3 self",
    1.0: "out = self",
    0.5: "self = 2 out",
    -1.0: "out = 0 - self",
    -2.0: "out = 0 - 2 self",
    -0.5: "self = 0 - 2 out",
}
# With these arguments, an operator computes or updates statistics, or rounds: the table does not cover that.
NOT_WHEN = {"batch_norm": "training", "instance_norm": "running_mean", "div": "rounding_mode"}


def _table() -> dict[str, str]:
    rows: dict[str, str] = {}
    for line in _ROWS.splitlines():
        names, _, text = line.partition(":")
        rows |= dict.fromkeys(names.split(), text.strip())
    return rows


EQUATIONS = _table()
