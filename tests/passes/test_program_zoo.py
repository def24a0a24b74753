"""The laws of cast insertion, held on one small program of each kind that has its own way of going wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

X = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([0, 1, 2])
PLACES = torch.zeros(3, 4, 8, dtype=torch.int64)
DYNAMIC = (({0: Dim("batch", min=2, max=9)},),)


class With(nn.Module):
    """A module with layers, and a function of it and the inputs."""

    def __init__(self, function: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        for name, layer in layers.items():
            if isinstance(layer, torch.Tensor) and not isinstance(layer, nn.Parameter):
                self.register_buffer(name, layer)
            else:
                setattr(self, name, layer)
        self._function = function

    def forward(self, *inputs: Any) -> Any:
        return self._function(self, *inputs)


def constant_written(x: torch.Tensor) -> torch.Tensor:
    return torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]).mul_(2) + x


def canvas(x: torch.Tensor) -> torch.Tensor:
    blank = x.new_zeros(3, 4, 8)
    blank[:1] = x[:1]
    return blank.mul_(2) + x


def chained_assignments(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[:, 0] = 1.0
    y[:, 1] = y[:, 0]
    return y * 2


def mutual_writes(x: torch.Tensor) -> torch.Tensor:
    a, b = x + 1, x * 0.5
    a.add_(b)
    b.mul_(a)
    return a - 3 * b


def zeroed(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y.zero_()
    return y + x


def write_below_expand(x: torch.Tensor) -> torch.Tensor:
    row = x[:1, :1] * 1
    wide = row.expand(3, 4, 8)
    row.view(8).add_(5)
    return wide * 2


def input_written(x: torch.Tensor) -> torch.Tensor:
    x[0].mul_(2)
    return x + 1


def masks(x: torch.Tensor) -> torch.Tensor:
    positive = x > 0
    return positive.float() * x + positive.to(x.dtype) + positive * x + torch.where(positive, x, 0.0)


def rope(x: torch.Tensor) -> torch.Tensor:
    angles = torch.outer(torch.arange(4).float(), 1.0 / (100 ** (torch.arange(0, 8).float() / 8)))
    return x * angles.cos() + x * angles.sin()


def twice_given(x: torch.Tensor) -> Any:
    y = x + 1
    return y, y, {"a": y, "none": None, "three": 3}, y[:, 0], x


def batch_norm_by_hand(x: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(x, torch.zeros(4), torch.ones(4)) + F.instance_norm(x)


def region_of_bf16(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = x @ x.transpose(1, 2)
        z = y * 2
    return y, z.float()


def region_switched_off(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        y = x @ x.transpose(1, 2)
    return y, y + 1


def region_that_writes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = x * 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y.add_(1)
        z = y @ x.transpose(1, 2)
    return y * 1, z.float()


def no_grad_that_writes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        y = x * 2
        y.add_(1)
    return y + x, y


def no_grad_with_many_outputs(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        values, _ = x.topk(2)
        a, b = x.chunk(2, -1)
    return values * 2, a + b


def buffer_assigned(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    m.mean = m.mean * 0.5 + x.mean((0, 1))
    return x + m.mean


def counter(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    m.count.add_(1)
    return x + m.count


def cache(m: nn.Module, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    m.keys.index_copy_(1, places, x * 2)
    m.keys[:, 4:].copy_(x[:, :2])
    return torch.matmul(x, m.keys.transpose(1, 2))


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x - 1, (x,)) + 1


@torch.library.custom_op("zoo_tests::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@double.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


# id -> (function or module, inputs beside X). Of `JUMPING`, rounding may turn into another integer or branch.
SMOOTH: dict[str, tuple[Any, ...]] = {
    "constant": (lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]),),
    "constant written": (constant_written,),
    "empty filled": (lambda x: torch.empty_like(x).copy_(x) * 2 + torch.empty(4, 8).fill_(0.5),),
    "canvas": (canvas,),
    "index_put_": (lambda x: x.clone().index_put_((torch.tensor([0, 1]),), x[2]),),
    "scatter": (lambda x: torch.zeros(3, 4, 8).scatter_(2, PLACES[..., :1], x[..., :1]),),
    "scatter_add": (lambda x: torch.zeros(3, 4, 8).scatter_add(2, PLACES, x) * 0.1,),
    "index_add_": (lambda x: torch.zeros(3, 4, 8).index_add_(0, torch.tensor([0, 1, 0]), x),),
    "gather": (lambda x: x.gather(2, PLACES[..., :2]) * 2,),
    "masks": (masks,),
    "masked_fill by a tensor": (lambda x: x.masked_fill(x > 0, torch.tensor(0.5)),),
    "linspace and eye": (lambda x: x * torch.linspace(0, 1, 8) + torch.eye(4, 8),),
    "triangle": (lambda x: torch.tril(torch.ones(4, 4)) @ x + torch.full((4, 4), -9.0).triu(1) @ x,),
    "einsum": (lambda x: torch.einsum("bij,bkj->bik", x, x),),
    "interpolate": (lambda x: F.interpolate(x[:, None], scale_factor=2, mode="bilinear"),),
    "grid_sample": (lambda x: F.grid_sample(x[:, None], torch.zeros(3, 2, 2, 2), align_corners=False),),
    "norms": (lambda x: x / x.norm(dim=-1, keepdim=True) + torch.linalg.vector_norm(x, dim=-1, keepdim=True),),
    "fft": (lambda x: torch.fft.rfft(x * 2).abs() + 1,),
    "complex": (lambda x: torch.view_as_real(torch.view_as_complex(x.reshape(3, 4, 4, 2)) * (1 + 2j)) * 2,),
    "cdist": (lambda x: torch.cdist(x, x * 2) + 1,),
    "inverse": (lambda x: torch.linalg.inv(x[:, :4, :4] + 5 * torch.eye(4)) * 2,),
    "cumsum": (lambda x: x.cumsum(-1) + x.cumsum(0, dtype=torch.float32),),
    "one_hot": (lambda x, i: F.one_hot(i, 4).float()[:, :, None] * x, IDS),
    "pad": (lambda x: F.pad(x, (1, 1), value=0.5) + F.pad(x, (1, 1), mode="reflect"),),
    "clamp by tensors": (lambda x: x.clamp(min=torch.tensor(0.1), max=x.mean() + 1),),
    "var_mean": (lambda x: torch.var_mean(x, -1),),
    "log_softmax": (lambda x: x.logsumexp(-1) + x.log_softmax(-1).sum(-1),),
    "powers": (lambda x: x**2 + x.abs() ** 0.5 + 2**x,),
    "lerp": (lambda x: torch.addcmul(x, x, x, value=0.5) + torch.lerp(x, x * 2, 0.3) + torch.lerp(x, x * 2, x),),
    "dropout in eval": (lambda x: F.dropout(x * 1, 0.5, False).add_(1) + x,),
    "outputs given twice": (twice_given,),
    "half input": (lambda x, h: (x + h * 2, h + 1), X.half()),
    "double input": (lambda x, d: (x * 2 + d.float(), d + x), X.double()),
    "input written": (input_written,),
    "float_power": (lambda x: torch.float_power(x, 2) + x,),
    "copy to float32": (lambda x: x.to(torch.float32, copy=True) + x.half().float(),),
    "to another's type": (lambda x: (x * 2).to(x[0]) * 2,),
    "batch norm by hand": (batch_norm_by_hand,),
    "group norm": (lambda x: F.group_norm(x, 2),),
    "pools": (lambda x: F.adaptive_avg_pool1d(x, 2) + F.avg_pool1d(x, 4),),
    "losses": (lambda x, t: F.cross_entropy(x[:, 0], t) + F.mse_loss(x, x * 0.5), IDS),
    "attention with a mask": (lambda x, m: F.scaled_dot_product_attention(x, x, x, attn_mask=m), X[..., :4] < 1),
    "attention with a bias": (lambda x, m: F.scaled_dot_product_attention(x, x, x, attn_mask=m), X[..., :4]),
    "causal attention": (lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),),
    "rope": (rope,),
    "division of integers": (lambda x, i: x / (i + 1)[:, None, None] + i[:, None, None] / 2, IDS),
    "cat with integers": (lambda x, i: torch.cat([x, i[:, None, None].expand(3, 4, 1), x.half()], -1), IDS),
    "stack of scalars": (lambda x: torch.stack([x.sum(), x.mean(), x.max()]),),
    "addmm": (lambda x: torch.addmm(x[0, 0], x[0], x[1].t() @ x[2]) + torch.outer(x[0, 0, :4], x[0, 1]),),
    "chained assignments": (chained_assignments,),
    "mutual writes": (mutual_writes,),
    "zeroed": (zeroed,),
    "write below expand": (write_below_expand,),
    "writes of other shapes": (lambda x: (x * 1).add_(x[:, :1]).mul_(x > 0).div_(x.abs() + 1),),
    "squeeze_": (lambda x: (x * 1)[None].squeeze_(0).transpose_(1, 2) * 2,),
    "activations in place": (lambda x: F.hardtanh_(F.relu_(x * 2), 0, 1),),
    "bits": (lambda x: ((x * 0 + 2).view(torch.int32) >> 23) * 2,),
    "integers only": (lambda x, i: (i * 2 + 1, x), IDS),
    "region of bf16": (region_of_bf16,),
    "region switched off": (region_switched_off,),
    "region that writes": (region_that_writes,),
    "no_grad that writes": (no_grad_that_writes,),
    "no_grad with many outputs": (no_grad_with_many_outputs,),
    "cond": (Branch(),),
    "custom op": (lambda x: torch.ops.zoo_tests.double(x + 1) * 2,),
    "buffer assigned": (With(buffer_assigned, mean=torch.zeros(8)),),
    "integer buffer": (With(counter, count=torch.zeros((), dtype=torch.int64)),),
    "key cache": (With(cache, keys=torch.zeros(3, 6, 8)), torch.arange(4)),
    "parameter given out": (With(lambda m, x: (x * m.p, m.p, m.p[:2]), p=nn.Parameter(torch.ones(8))),),
    "half layer": (With(lambda m, x: m.a(x.half()).float() + x, a=seeded(lambda: nn.Linear(8, 8).half())),),
    "double layer": (With(lambda m, x: m.a(x.double()).float() + x, a=seeded(lambda: nn.Linear(8, 8).double())),),
    # A batch of one: of larger ones torch 2.11 itself records hidden states of another shape than the kernel's.
    "lstm": (With(lambda m, x: m.a(x[:1]), a=seeded(lambda: nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True))),),
    "gru": (seeded(lambda: nn.GRU(8, 6)),),
    "lstm cell": (With(lambda m, x: m.cell(x[0]), cell=seeded(lambda: nn.LSTMCell(8, 6))),),
    "encoder layer": (seeded(lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)),),
    "transposed convolution": (seeded(lambda: nn.ConvTranspose1d(4, 3, 3)),),
    "embedding bag": (
        With(lambda m, x, i: m.bag(i[:, None]) + x[:, 0], bag=seeded(lambda: nn.EmbeddingBag(4, 8))),
        IDS,
    ),
    "norm and relu in place": (With(lambda m, x: F.relu_(m.norm(x)), norm=nn.BatchNorm1d(4)),),
    "tied layers": (With(lambda m, x: F.linear(m.a(x), m.b.weight), a=(a := seeded(lambda: nn.Linear(8, 8))), b=a),),
}
JUMPING: dict[str, tuple[Any, ...]] = {
    "nonzero": (lambda x: x[x > 0].sum() + x.nonzero().sum(),),
    "masked_select": (lambda x: torch.masked_select(x, x > 0) * 2,),
    "sort": (lambda x: tuple((x * 3).sort(-1)),),
    "argmax": (lambda x: ((x * 3).argmax(-1), x.argmax(-1).float() * 2),),
    "median": (lambda x: tuple((x * 3).median(-1)),),
    "max_pool with indices": (lambda x: F.max_pool1d(x * 3, 2, return_indices=True),),
    "bucketize": (lambda x: torch.bucketize(x * 3, torch.tensor([0.0, 1.0])) + x,),
    "comparisons": (lambda x: (((x * 3) > 0) & (x < 1)).any(-1),),
}
ZOO = SMOOTH | JUMPING
SYMBOLIC: dict[str, Callable[..., Any]] = {
    "sizes as numbers": lambda x: x / x.shape[0] + torch.full((x.shape[0], 1, 1), 0.5),
    "sizes as factors": lambda x: x * x.shape[0] ** 0.5 + x.sum() / x.numel(),
    "reshape by sizes": lambda x: x.reshape(x.shape[0], -1).relu().view(-1, 4, 8) * 2,
}


def check(
    fixtures: tuple[Any, ...], program: Any, low: Callable[[int], bool], low_type: torch.dtype, name: str
) -> None:
    """Hold every law on a program of the zoo; what no target runs in half stays as `classify` has it."""
    plan_of, case_of, laws, inputs = fixtures
    plan = plan_of(program, low, low_type, legal=True)
    case = case_of(program, plan, inputs, name not in JUMPING)
    for law in laws:
        law(case)


@pytest.mark.parametrize("name", ZOO)
def test_all_low_in_fp16(export: Any, plan_of: Any, case_of: Any, laws: Any, name: str) -> None:
    """Every law holds with all that is legal low."""
    model, *more = ZOO[name]
    inputs = (X, *more)
    check((plan_of, case_of, laws, inputs), export(model, *inputs), lambda i: True, torch.float16, name)


@pytest.mark.parametrize("name", SYMBOLIC)
def test_symbolic_sizes(export: Any, plan_of: Any, case_of: Any, laws: Any, name: str) -> None:
    """Every law holds with a dynamic batch, under two plans."""
    program = export(SYMBOLIC[name], X, dynamic_shapes=DYNAMIC)
    for coins in (-1, 0b10101):
        check((plan_of, case_of, laws, (X,)), program, lambda i, c=coins: bool(c >> i & 1), torch.float16, name)


@pytest.mark.slow
@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("name", ZOO)
def test_mixed_plans(export: Any, plan_of: Any, case_of: Any, laws: Any, name: str, decomposed: bool) -> None:
    """Every law holds under alternating and random plans in both types, before and after decomposition."""
    model, *more = ZOO[name]
    inputs = (X, *more)
    program = export(model, *inputs)
    program = program.run_decompositions() if decomposed else program
    for low_type in (torch.float16, torch.bfloat16):
        for coins in (-1, 0x55555555, 0xAAAAAAAA, 0x3C96A5C3):
            check((plan_of, case_of, laws, inputs), program, lambda i, c=coins: bool(c >> i & 1), low_type, name)
