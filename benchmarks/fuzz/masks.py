"""Steps with masks into softmax and attention, and steps with integers and booleans."""

from __future__ import annotations

import torch
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

from benchmarks.fuzz.steps import ROWS, WORDS, Layers, Step, Values


def _scores(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[batch, 4, 4]"""
    return torch.tanh(a @ b.transpose(1, 2) * 0.1)


def _seen(values: Values) -> torch.Tensor:
    """Which of [batch, 4, 4] may be attended to: every row has its diagonal."""
    return ~values.mask.transpose(1, 2) | torch.eye(ROWS, dtype=torch.bool)


def _fill(value: float) -> Step:
    def step(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
        weights = torch.softmax(_scores(a, b).masked_fill(~_seen(values), value), -1)
        values.floats.append(weights @ b)

    return step


def _where(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    lowest = torch.finfo(torch.float32).min
    values.floats.append(torch.softmax(torch.where(_seen(values), _scores(a, b), lowest), -1) @ b)


def _product(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    additive = (1.0 - _seen(values).to(a.dtype)) * -10000.0
    values.floats.append(torch.softmax(_scores(a, b) + additive, -1) @ b)


def _expanded(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    """As transformers makes it once for all layers: zeros, a sentinel where masked, expanded and added."""
    additive = torch.zeros(ROWS, ROWS).masked_fill(torch.ones(ROWS, ROWS, dtype=torch.bool).triu(1), -1e9)
    additive = additive[None].expand(a.shape[0], -1, -1)
    values.floats.append(torch.softmax(_scores(a, b) + additive, -1) @ b)


def _causal_buffer(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    values.floats.append(torch.softmax(_scores(a, b) + layers.causal, -1) @ b)


def _attention_boolean(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    values.floats.append(F.scaled_dot_product_attention(a, b, b, attn_mask=_seen(values)))


def _attention_infinite(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    additive = torch.zeros(a.shape[0], ROWS, ROWS).masked_fill(~_seen(values), -torch.inf)
    values.floats.append(F.scaled_dot_product_attention(a, b, b, attn_mask=additive))


def _attention_finite(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    additive = torch.where(_seen(values), 0.0, torch.finfo(torch.float32).min)
    values.floats.append(F.scaled_dot_product_attention(a, b, b, attn_mask=additive))


def _attention_causal(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    values.floats.append(F.scaled_dot_product_attention(a, b, b, is_causal=True))


def _select(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    values.floats.append(torch.where(values.mask, a, b))


def _masked_fill(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    values.floats.append(torch.softmax(a.masked_fill(values.mask, -100.0), 1))


def _mask_times(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    values.floats.append(a * values.mask + b * (~values.mask).float())


MASKS: dict[str, Step] = {
    "mask_infinite": _fill(-torch.inf),
    "mask_1e9": _fill(-1e9),
    "mask_1e4": _fill(-1e4),
    "mask_where": _where,
    "mask_product": _product,
    "mask_expanded": _expanded,
    "mask_buffer": _causal_buffer,
    "attention_boolean": _attention_boolean,
    "attention_infinite": _attention_infinite,
    "attention_finite": _attention_finite,
    "attention_causal": _attention_causal,
    "where": _select,
    "masked_fill": _masked_fill,
    "mask_times": _mask_times,
}


def _embedding(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    values.floats.append(layers.embedding(values.ids) + a * 0.1)


def _bag(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    values.floats.append(layers.bag(values.ids).unsqueeze(1) * 0.25 + b)


def _table(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    values.floats.append(layers.table[values.ids] + a * 0.1)


def _one_hot(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    values.floats.append(F.one_hot(values.ids % 8, 8).float() + b)


def _gather(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    places = (values.ids % ROWS).unsqueeze(-1).expand(-1, -1, a.shape[-1])
    values.floats.append(a.gather(1, places) + b)


def _scatter(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    places = (values.ids % ROWS).unsqueeze(-1).expand(-1, -1, a.shape[-1])
    values.floats.append(torch.zeros_like(a).scatter_add(1, places, b) * 0.5)


def _integers(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    values.ids = (values.ids + 3) % WORDS
    values.extras.append(values.ids)


def _division(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    values.floats.append(a + (values.ids / WORDS).unsqueeze(-1))


def _ids_as_floats(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    values.floats.append(torch.tanh(a + values.ids.unsqueeze(-1).float() * 0.1))


def _both_masks(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    values.mask = values.mask & (values.ids < WORDS // 2).unsqueeze(-1)
    values.extras.append(values.mask)


def _counted(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    values.extras.append(values.mask.sum())
    values.extras.append(a.shape[0] * 2)


def _scalar(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    values.extras.append(a.mean())


INTEGERS: dict[str, Step] = {
    "embedding": _embedding,
    "bag": _bag,
    "table": _table,
    "one_hot": _one_hot,
    "gather": _gather,
    "scatter": _scatter,
    "integers": _integers,
    "division": _division,
    "ids_as_floats": _ids_as_floats,
    "both_masks": _both_masks,
    "counted": _counted,
    "scalar_output": _scalar,
}


def _topk(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    found, positions = a.topk(8, -1)
    values.floats.append(found * 0.5)
    values.extras.append(positions)


def _max(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    most, _ = a.max(-1, keepdim=True)
    values.floats.append(most + b)


def _sort(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    found, positions = torch.sort(a, -1)
    values.floats.append(found + b.gather(-1, positions))


def _argmax(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    values.ids = a.argmax(-1)


def _bucketize(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    values.ids = torch.bucketize(a[..., 0], torch.linspace(-1, 1, WORDS - 1))


def _compare(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    values.mask = (a > b).any(-1, keepdim=True)


def _to_ids(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    values.ids = (a.sum(-1) * 4).to(torch.int64) % WORDS


def _round(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    values.floats.append(torch.round(a) + torch.floor(b))


# Steps that turn a rounding into another integer or branch: numbers after them are not close, types still are.
def _largest(value: float) -> Step:
    def step(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
        masked = _scores(a, b).masked_fill(~_seen(values), value)
        lost = masked < masked.topk(2, -1).values[..., -1:]
        values.floats.append(torch.where(lost, -torch.inf, masked).softmax(-1) @ b)

    return step


JUMPING: dict[str, Step] = {
    "largest_infinite": _largest(-torch.inf),
    "largest_1e9": _largest(-1e9),
    "topk": _topk,
    "max": _max,
    "sort": _sort,
    "argmax": _argmax,
    "bucketize": _bucketize,
    "compare": _compare,
    "to_ids": _to_ids,
    "round": _round,
}
