"""The last states of an LSTM, where torch decomposes it wrongly: up to 2.12 they have one dimension too many.

torch removes the wrong dimension of them, `squeeze(1)` for `squeeze(0)`, which only a batch of one does not show.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any
from unittest import mock

_NAME = "one_layer_lstm"


@contextmanager
def right_lstm_states() -> Iterator[None]:
    """In this block a decomposed LSTM has last states as the operator itself gives them."""
    decompositions = importlib.import_module("torch._decomp.decompositions")
    original = getattr(decompositions, _NAME)
    with mock.patch.object(decompositions, _NAME, _mended(original)) if _wrong(original) else nullcontext():
        yield


@cache
def _wrong(original: Callable[..., Any]) -> bool:
    """Whether the states of a layer have another rank after it than before. Asked of a batch of two."""
    torch: Any = importlib.import_module("torch")  # it takes seconds, and not every command needs it
    before = torch.zeros(2, 1), torch.zeros(2, 1)
    _, after = original(torch.zeros(3, 2, 1), before, (torch.zeros(4, 1), torch.zeros(4, 1)), False)
    return bool(after[0].dim() != before[0].dim())


def _mended(original: Callable[..., Any]) -> Callable[..., Any]:
    def one_layer_lstm(inp: Any, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        out, after = original(inp, hidden, *args, **kwargs)
        states = zip(after, hidden, strict=True)
        return out, tuple(new.squeeze(0) if new.dim() > old.dim() else new for new, old in states)

    return one_layer_lstm
