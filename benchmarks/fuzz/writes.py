"""Steps that write in place: into tensors, views, views of views, buffers, and what they have just made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.fuzz.steps import ROWS, WIDTH, Layers, Step, Values


def _buffer(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    layers.running.mul_(0.5).add_(a.mean((0, 1)))
    values.floats.append(b + layers.running)


def _buffer_slice(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    """As a key-value cache: a slice of a buffer is written, the whole is read."""
    layers.memory[1:3] = a[0, :2]
    values.floats.append(b + layers.memory)


def _buffer_copy(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    before = layers.memory * 0.5
    layers.memory.copy_(torch.tanh(a.mean(0)))
    layers.calls.add_(1)
    values.floats.append(b + layers.memory + before)


def _fresh_relu(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    values.floats.append(torch.relu_(layers.linear(a)))


def _alias(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    values.floats.append(a.view(-1, ROWS, WIDTH))


def _assign(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    a[:, 1] = b[:, 0] * 2


def _assign_where(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    fresh = b * 0.5
    fresh[:, :, 1:3] = a[:, :, 3:5].clone()
    fresh.masked_fill_(values.mask, 0.25)
    values.floats.append(fresh)


def _fresh_zeros(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    canvas = torch.zeros(ROWS, WIDTH)
    canvas[1] = a[0, 0]
    values.floats.append(b + canvas)


def _fresh_like(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    canvas = torch.empty_like(a).fill_(0.5)
    canvas[:, 1:].add_(a[:, :-1])
    values.floats.append(canvas + b)


def _split_write(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    whole = a.detach() * 0.5
    first, second = whole.split(WIDTH // 2, -1)
    first.add_(second)
    values.floats.append(whole + b)


def _unbind_write(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    whole = torch.tanh(a.detach())
    for row in whole.unbind(1)[:2]:
        row.mul_(0.5)
    values.floats.append(whole)


def _view_of_view(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    whole = layers.linear(a)
    whole.transpose(1, 2)[:, 2:4].unsqueeze(0).add_(1.0)
    values.floats.append(whole + b)


def _write_then_read_view(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    whole = a + 1.0
    part = whole[:, 2:]
    doubled = part * 2
    whole.mul_(0.5)
    values.floats.append(torch.cat([part, doubled], 1))


def _read_write_read(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    """A cast from before the write is not one of what is read after it."""
    whole = layers.linear(a)
    before = torch.tanh(whole)
    whole[:, 1:].mul_(-0.5)
    values.floats.append(before + torch.tanh(whole))


def _write_through_transpose(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    whole = a * 0.5
    turned = whole.transpose(1, 2)
    before = layers.linear(turned.transpose(1, 2))
    turned.add_(b.transpose(1, 2))
    values.floats.append(before + layers.linear(whole) + turned.mT)


def _index_put(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    fresh = a.clone()
    fresh.index_put_((torch.arange(2), torch.tensor([1, 2])), b[:2, 0])
    values.floats.append(fresh)


def _scatter(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    places = (values.ids % ROWS).unsqueeze(-1).expand(-1, -1, WIDTH)
    values.floats.append(torch.ones_like(b).scatter_(1, places.flip(1), a[:, :1].expand(-1, ROWS, -1)))


def _index_add(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    values.floats.append(a.clone().index_add_(1, torch.tensor([0, 2]), b[:, :2], alpha=0.5))


def _out_of_mask(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    values.mask = values.mask.clone().logical_not_()


_WRITES: dict[str, Callable[[Layers, Values, torch.Tensor, torch.Tensor], Any]] = {
    "relu_": lambda m, v, a, b: a.relu_(),
    "add_": lambda m, v, a, b: a.add_(b),
    "add_one_": lambda m, v, a, b: a.add_(1.0),
    "masked_fill_": lambda m, v, a, b: a.masked_fill_(v.mask, 0.5),
    "clamp_": lambda m, v, a, b: a.clamp_(-1.5, 1.5),
    "write_slice": lambda m, v, a, b: a[:, :2].add_(1),
    "write_transposed": lambda m, v, a, b: a.transpose(1, 2).mul_(0.5),
    "write_detached": lambda m, v, a, b: a.detach()[:, 0].tanh_(),
    "copy_": lambda m, v, a, b: a.copy_(b),
    "assign": _assign,
    "assign_where": _assign_where,
    "buffer": _buffer,
    "buffer_slice": _buffer_slice,
    "buffer_copy": _buffer_copy,
    "fresh_relu": _fresh_relu,
    "alias": _alias,
    "fresh_zeros": _fresh_zeros,
    "fresh_like": _fresh_like,
    "split_write": _split_write,
    "unbind_write": _unbind_write,
    "view_of_view": _view_of_view,
    "write_then_read_view": _write_then_read_view,
    "read_write_read": _read_write_read,
    "write_through_transpose": _write_through_transpose,
    "index_put": _index_put,
    "scatter_": _scatter,
    "index_add": _index_add,
    "out_of_mask": _out_of_mask,
}


def _without_result(function: Callable[..., Any]) -> Step:
    def step(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
        function(layers, values, a, b)

    return step


WRITES: dict[str, Step] = {name: _without_result(function) for name, function in _WRITES.items()}
