"""Steps with regions: autocast, enabled, disabled and nested, and `no_grad`, with writes and several outputs inside."""

from __future__ import annotations

import torch

from benchmarks.fuzz.steps import Layers, Pure, Step, Values, pure


def _cpu(layers: Layers, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = layers.linear(a) + b
    return inside.float()


def _cpu_half(layers: Layers, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.float16):
        first, second = layers.linear(a).chunk(2, -1)
        inside = torch.cat([second, first], -1)
    return inside.float() * 0.5 + b


def _cuda(layers: Layers, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cuda", dtype=torch.float32):
        return layers.tied(a) * 0.5


def _disabled(layers: Layers, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", enabled=False):
        return layers.norm(a.float()) + b


def _nested_disabled(layers: Layers, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = layers.linear(a)
        with torch.autocast("cpu", enabled=False):
            exact = torch.softmax(inside.float(), -1)
        return layers.tied(exact).float() + b


def _two_results(layers: Layers, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, high = layers.linear(a), torch.relu(b)
    return low.float() + high


def _no_grad(layers: Layers, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        inside = layers.linear(a) - b
    return inside


def _no_grad_write(layers: Layers, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        inside = torch.tanh(a)
        inside[:, 0].mul_(0.5)
    return inside + b


def _no_grad_pairs(layers: Layers, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        first, second = (a * 0.5).split(4, -1)
        third = b.relu()
    return torch.cat([second, first], -1) + third


def _nested(layers: Layers, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        inside = torch.tanh(a)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            product = layers.linear(inside)
        return product.float() + b


def _masked(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.where(values.mask, layers.linear(a).float(), b) + layers.embedding(values.ids)
    values.floats.append(inside * 0.5)


def _region_writes(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    inside = a * 0.5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside.add_(layers.linear(b))
    values.floats.append(inside)


def _no_grad_buffer(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    with torch.no_grad():
        layers.running.mul_(0.5).add_(a.mean((0, 1)))
    values.floats.append(b * layers.running)


_PURE: dict[str, Pure] = {
    "cpu_region": _cpu,
    "cpu_half_region": _cpu_half,
    "cuda_region": _cuda,
    "disabled_region": _disabled,
    "nested_disabled_region": _nested_disabled,
    "region_of_two": _two_results,
    "no_grad_region": _no_grad,
    "no_grad_write": _no_grad_write,
    "no_grad_pairs": _no_grad_pairs,
    "nested_region": _nested,
}
REGIONS: dict[str, Step] = {
    **{name: pure(function) for name, function in _PURE.items()},
    "masked_region": _masked,
    "region_writes": _region_writes,
    "no_grad_buffer": _no_grad_buffer,
}
