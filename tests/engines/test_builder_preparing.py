"""What is done to a program for Torch-TensorRT 2.11: writes along the first dimension, and the states of an LSTM."""

from __future__ import annotations

import importlib

import pytest
import torch
from calibcast.engines.locations import load_model
from calibcast.engines.lstm_states import right_lstm_states
from calibcast.engines.tensorrt.builder.preparing import puts_first
from calibcast.engines.tensorrt.program_device import copied
from torch import nn

from tests.functions import Apply, exported

DECOMPOSITIONS = importlib.import_module("torch._decomp.decompositions")
PLACES = torch.tensor([2, 0])


def written(y, where, new):
    y = y.clone()
    y[where] = new
    return y * 2


def copied_along(dim):
    return lambda x, i, new: (x * 2).index_copy(dim, i, new)


def copied_in_place(x, i, new):
    y = x * 2
    z = y.index_copy_(-2, i, new)
    return y + 1, z


WRITES = {
    "the first": (lambda x, i, v: written(x, (i,), v), (2, 3, 6, 5)),
    "behind one": (lambda x, i, v: written(x, (slice(None), i), v), (5, 2, 6, 5)),
    "behind two": (lambda x, i, v: written(x, (slice(None), slice(None), i), v), (5, 3, 2, 5)),
    "values without leading sizes": (lambda x, i, v: written(x, (slice(None), slice(None), i), v), (2, 5)),
    "one value": (lambda x, i, v: written(x, (slice(None), i), v), ()),
    "pairs behind one": (lambda x, i, v: written(x, (slice(None), i // 2, i), v), (5, 2, 5)),
    "functional": (lambda x, i, v: torch.ops.aten.index_put(x, [None, None, i], v) + x, (5, 3, 2, 5)),
    "index_copy": (copied_along(2), (5, 3, 2, 5)),
    "index_copy, first": (copied_along(0), (2, 3, 6, 5)),
    "index_copy in place": (copied_in_place, (5, 3, 2, 5)),
}


def puts(graph):
    return [n for n in graph.nodes if str(n.target).startswith(("aten.index_put", "aten.index_copy"))]


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_write_along_the_first_dimension_is_the_same_write(name, dynamic):
    function, shape = WRITES[name]
    args = (torch.randn(5, 3, 6, 5), PLACES, torch.randn(shape))
    sizes = ({3: torch.export.Dim.AUTO}, None, {len(shape) - 1: torch.export.Dim.AUTO} if shape else None)
    program = torch.export.export(Apply(function), args, dynamic_shapes=(sizes,) if dynamic else None)
    moved = copied(program)
    puts_first(moved.graph)
    moved.graph.lint()
    moved.graph_module.recompile()
    torch.testing.assert_close(moved.module()(*args), program.module()(*args), rtol=0, atol=0)
    torch.testing.assert_close(moved.run_decompositions().module()(*args), program.module()(*args), rtol=0, atol=0)
    if dynamic and len(shape) < 3:  # values are not made larger where sizes are open
        assert len(moved.graph.nodes) == len(program.graph.nodes)
        return
    for put in puts(moved.graph):
        held, places, new = put.args
        assert None not in places
        assert list(new.meta["val"].shape) == [2, *held.meta["val"].shape[len(places) :]]
        assert put.meta["val"].shape == held.meta["val"].shape


class Cache(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("keys", torch.zeros(1, 2, 8, 4))

    def forward(self, key, place):
        self.keys.index_copy_(2, place, key)
        return self.keys * 2


def test_a_buffer_is_still_written():
    args = (torch.randn(1, 2, 1, 4), torch.tensor([3]))
    program = torch.export.export(Cache(), args)
    moved = copied(program)
    puts_first(moved.graph)
    moved.graph_module.recompile()
    functional = moved.run_decompositions()
    assert list(functional.graph_signature.buffers_to_mutate.values()) == ["keys"]
    module, expected = functional.module(), program.module()
    for place in (3, 5):
        args = (torch.randn(1, 2, 1, 4), torch.tensor([place]))
        assert torch.equal(module(*args), expected(*args))


def test_writes_with_other_indices_stay_as_they_are():
    mask = torch.tensor([True, False, True])
    cases = [
        lambda x: written(x, mask, 0.0),
        lambda x: written(x, (torch.tensor([[0, 1], [1, 0]]),), 1.0),
        lambda x: torch.ops.aten.index_put(x, [torch.tensor([0, 0])], torch.ones(2, 4), True),
    ]
    for case in cases:
        moved = copied(exported(case, torch.randn(3, 4)))
        before = [(n.name, n.args) for n in moved.graph.nodes]
        puts_first(moved.graph)
        assert [(n.name, n.args) for n in moved.graph.nodes] == before


@pytest.fixture
def faulty_lstm(monkeypatch):
    """The decomposition of torch up to 2.12, which removes the wrong dimension of the last states."""
    original = DECOMPOSITIONS.one_layer_lstm

    def faulty(inp, hidden, params, has_biases, reverse=False):
        out, states = original(inp, hidden, params, has_biases, reverse)
        behind = [s if s.dim() > h.dim() else s[None] for s, h in zip(states, hidden, strict=True)]
        return out, tuple(s.squeeze(1) for s in behind)

    monkeypatch.setattr(DECOMPOSITIONS, "one_layer_lstm", faulty)
    return faulty


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("projected", [0, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_decomposed_lstm_has_the_states_of_the_operator(faulty_lstm, bidirectional, projected, batch):
    torch.manual_seed(0)
    lstm = nn.LSTM(4, 5, num_layers=2, bidirectional=bidirectional, proj_size=projected).eval()
    x, count = torch.randn(3, batch, 4), 4 if bidirectional else 2
    start = (torch.randn(count, batch, projected or 5), torch.randn(count, batch, 5))
    with torch.no_grad():
        with right_lstm_states():
            arguments = (x, start, lstm._flat_weights, True, 2, 0.0, False, bidirectional, False)
            found = DECOMPOSITIONS.lstm_impl(*arguments)
        assert DECOMPOSITIONS.one_layer_lstm is faulty_lstm
        out, (h, c) = lstm(x, start)
    torch.testing.assert_close(found, (out, h, c))


def test_a_model_that_is_exported_here_has_the_right_shapes(faulty_lstm, tmp_path):
    """torch asks the decomposition for them while it exports."""
    path = tmp_path / "net.py"
    path.write_text("import torch\ndef model():\n    return torch.nn.LSTM(4, 5).eval(), (torch.ones(3, 2, 4),)\n")
    found = load_model(f"{path}:model").graph.output_node().args[0]
    assert [tuple(value.meta["val"].shape) for value in found] == [(3, 2, 5), (1, 2, 5), (1, 2, 5)]


def test_a_right_decomposition_is_left_alone(monkeypatch):
    def right(inp, hidden, params, has_biases, reverse=False):
        return inp, hidden

    monkeypatch.setattr(DECOMPOSITIONS, "one_layer_lstm", right)
    with right_lstm_states():
        assert DECOMPOSITIONS.one_layer_lstm is right
