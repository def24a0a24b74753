"""Programs through the real TensorRT-RTX builder, and what its wiring gives, each engine replaced by the graph that it
was made of. Run as a process of its own, as building pretends to have a GPU:

    python tests/engines/wiring_oracle.py by_hand|by_builder NAME ..

Prints one JSON object a line: {"name", "error", "worst", "profiles", "state"}. worst: the largest difference between
the wired module and the program, over its calls. NAME is one of CASES, or the seed of a random one.
"""

import copy
import json
import random
import sys
import tempfile
import traceback
from pathlib import Path
from unittest import mock

import torch
from calibcast.calib import calibrate
from calibcast.calib.batches import signature_of
from calibcast.engines.tensorrt import engine_files
from calibcast.engines.tensorrt.ahead_of_time import pretend_gpu
from calibcast.engines.tensorrt.builder import compiling
from calibcast.engines.tensorrt.builder import torch_tensorrt_adapter as adapter
from calibcast.engines.tensorrt.builder import torch_tensorrt_internals as internals
from calibcast.engines.tensorrt.builder.job import BuilderJob
from calibcast.engines.tensorrt.profiles import profiles
from torch import nn
from torch.export import Dim


class Engine(nn.Module):
    """An engine's graph in PyTorch: outputs by the names that the builder gave, updates in place as TensorRT does."""

    def __init__(self, graph, names, part):
        super().__init__()
        self.graph, self.names, self.part = graph, names, part

    def forward(self, *inputs):
        results = self.graph(*map(_own, inputs))
        results = results if isinstance(results, (tuple, list)) else (results,)
        given, aliased = [], self.part.get("aliased_io", {})
        for name in self.part["outputs"]:
            known = self.names and name in self.names  # 2.11 ignores the names
            index = self.names.index(name) if known else int(name.removeprefix("output"))
            if name in aliased:
                bound = inputs[self.part["inputs"].index(aliased[name][0])]
                bound.copy_(self.written(inputs, aliased[name][0]) if index >= len(results) else results[index])
                given.append(bound)
            else:
                given.append(_own(results[index]))
        given = given[: len(engine_files.given_outputs(self.part))]
        return given[0] if len(given) == 1 else tuple(given)

    def written(self, inputs, name):
        """The new value of a cache that the engine updates and does not return."""
        env = torch.fx.Interpreter(self.graph)
        env.garbage_collect_values = False
        env.run(*map(_own, inputs))
        holder = next(n for n in self.graph.graph.nodes if n.op == "placeholder" and n.target == name)
        writer = next(n for n in holder.users if "index_copy" in str(n.target) or "slice_scatter" in str(n.target))
        return env.env[writer]


def _difference(ours, theirs):
    if not isinstance(theirs, torch.Tensor):
        return 0.0 if ours == theirs else 1e9
    return float((ours - theirs).abs().max()) if ours.shape == theirs.shape else 1e9


def _own(value):
    """A copy of a tensor; sizes pass between parts as numbers."""
    return value.clone() if isinstance(value, torch.Tensor) else value


class Cache(nn.Module):
    """A decoder's step with a static cache, a counter and a running mean."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(8, 24)
        self.register_buffer("keys", torch.zeros(1, 2, 16, 4))
        self.register_buffer("values", torch.zeros(1, 2, 16, 4))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.inner = nn.Module()
        self.inner.register_buffer("mean", torch.zeros(8))

    def forward(self, x, position):
        q, k, v = self.project(x - self.inner.mean).view(1, -1, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        self.keys.index_copy_(2, position, k)
        self.values.index_copy_(2, position, v)
        self.inner.mean.mul_(0.9).add_(x.mean((0, 1)), alpha=0.1)
        self.steps.add_(1)
        mask = torch.where(torch.arange(16, device=x.device) <= position[-1], 0.0, -1e4)
        scores = q @ self.keys.transpose(-1, -2) * 0.5 + mask
        return (scores.softmax(-1) @ self.values).transpose(1, 2).reshape(1, -1, 8), self.steps + 0


class Old(nn.Module):
    """Returns what its buffer was, what it is, and a constant."""

    def __init__(self):
        super().__init__()
        self.register_buffer("last", torch.zeros(4, 8))
        self.register_buffer("fixed", torch.arange(3.0))

    def forward(self, x):
        old = self.last.clone()
        self.last.copy_(x * 2)
        return old, self.last + x, self.fixed, x


class Returned(nn.Module):
    """Returns the buffers that it writes, two of which get one new content, and constants between them."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("one", torch.zeros(4, 8))
        self.register_buffer("other", torch.zeros(4, 8))

    def forward(self, x):
        self.steps.add_(1)
        self.one.copy_(self.linear(x + self.one).tanh())
        self.other.copy_(self.one)
        return {"steps": self.steps, "none": None, "one": self.one, "three": 3, "sum": self.other + x}


class Put(nn.Module):
    """A cache that is written by an index behind slices."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(8, 8)
        self.register_buffer("cache", torch.zeros(1, 2, 16, 4))

    def forward(self, x, position):
        self.cache[:, :, position] = self.project(x).view(1, -1, 2, 4).transpose(1, 2)
        return self.cache.sum(-1) + x.mean()


class Crossing(nn.Module):
    """A cast of an input of many sizes that two engines read."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8).half()

    def forward(self, input):
        low = input.half()
        first = torch.special.i1e(self.linear(low))
        return self.linear(torch.cat([first, low])) * 2, input.shape[0]


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, input):
        return self.linear(input).relu()


class Listed(Named):
    def forward(self, xs: list[torch.Tensor], more: dict[str, torch.Tensor]):
        return self.linear(xs[0]) + xs[1] * more["scale"]


class Twice(Named):
    """A second engine, fed by twice as many rows, behind an operator that no converter takes."""

    def forward(self, x):
        rows = self.linear(torch.cat([x, x + 1]))
        return self.linear(torch.special.i0e(rows)) * 2


class Doubled(Named):
    def forward(self, x):
        y = self.linear(x)
        return y, y.clone()


class Random(nn.Module):
    """A few values made of others; outputs drawn from them with repeats, copies, and inputs handed through."""

    def __init__(self, seed):
        super().__init__()
        draw = random.Random(seed)
        self.steps = [(draw.choice(list(STEPS)), draw.randrange(i + 2), draw.randrange(i + 2)) for i in range(5)]
        self.outputs = [draw.randrange(7) for _ in range(draw.randrange(1, 5))]
        self.copied = [draw.choice([None, None, "clone", "same", "view", "expand", "dropout"]) for _ in self.outputs]
        self.linear = nn.Linear(8, 8)
        self.register_buffer("state", torch.zeros(4, 8))
        self.writes = draw.random() < 0.5

    def forward(self, x, y):
        values = [x, y]
        for step, a, b in self.steps:
            values.append(STEPS[step](self, values[a], values[b]))
        if self.writes:
            self.state.add_(values[3])
            values[2] = values[2] + self.state
        return tuple(COPIES[how](values[i]) for how, i in zip(self.copied, self.outputs, strict=True))


STEPS = {
    "add": lambda m, a, b: a + b,
    "linear": lambda m, a, b: m.linear(a),
    "relu": lambda m, a, b: torch.relu(a),
    "scale": lambda m, a, b: a * 0.5,
    "outside": lambda m, a, b: torch.special.i0e(a),
    "clone": lambda m, a, b: a.clone(),
}
COPIES = {
    None: lambda v: v,
    "clone": lambda v: v.clone(),
    "same": lambda v: v.to(torch.float32),
    "view": lambda v: v.view(4, 8),
    "expand": lambda v: v.expand(4, 8),
    "dropout": lambda v: nn.functional.dropout(v, training=False),
}


def case(name):
    """(model, inputs of the export, dynamic shapes, calls that it is calibrated on and called with)."""
    rows, x = Dim("rows", min=2, max=512), lambda n: torch.randn(n, 8)
    if name.isdigit():
        torch.manual_seed(int(name))
        calls = [(x(4), x(4)) for _ in range(3)]
        return Random(int(name)), calls[0], None, calls
    if name in {"cache", "put"}:
        calls = [(torch.randn(1, 1, 8), torch.tensor([i])) for i in range(4)]
        return Cache() if name == "cache" else Put(), calls[0], None, calls
    if name in {"old", "returned"}:
        return Old() if name == "old" else Returned(), (x(4),), None, [(x(4),) for _ in range(3)]
    if name == "listed":
        calls = [([x(n), x(n)], {"scale": torch.ones(8)}) for n in (4, 7, 7)]
        return Listed(), ([x(9), x(9)], {"scale": torch.ones(8)}), ([{0: rows}, {0: rows}], {"scale": None}), calls
    model = {"named": Named, "twice": Twice, "doubled": Doubled, "crossing": Crossing}[name]()
    return model, (x(9),), ({0: rows},), [(x(4),), (x(7),), (x(7),)]


def checked(name, by_hand):
    torch.manual_seed(0)
    model, example, shapes, calls = case(name)
    program = torch.export.export(model.eval(), example, dynamic_shapes=shapes)
    signature = signature_of(program)
    names = signature.positional
    ranges = calibrate(program, [dict(zip(names, call, strict=True)) for call in calls], progress=False)
    job = BuilderJob(tuple(profiles(signature, ranges)), {"min_block_size": 1}, ahead_of_time=True)
    graphs, named, seen = [], [], []
    compiler = sys.modules["torch_tensorrt.dynamo._compiler"]
    convert, check, names_of = compiler.convert_module, compiling._check_profiles, internals._output_names

    def naming(*args):
        named.append(names_of(*args))
        return named[-1]

    def converting(module, *args, **kwargs):
        graphs.append(copy.deepcopy(module))  # its weights are freed when it has been built
        return convert(module, *args, **kwargs)

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(compiler, "convert_module", converting), \
            mock.patch.object(internals, "_output_names", naming), \
            mock.patch.object(adapter, "lifts_buffers", return_value=not by_hand), \
            mock.patch.object(compiling, "_check_profiles", lambda a, b: (seen.append(b), check(a, b))):  # fmt: skip
        compiling.compile_job(job, program, Path(folder), lambda event: None)
        engines = zip(graphs, named, strict=True)
        loaded = engine_files._loaded
        with mock.patch.object(
            engine_files,
            "_loaded",
            lambda n, part, *more: Engine(*next(engines), part) if part["kind"] == "engine" else loaded(n, part, *more),
        ):
            module = engine_files.read_parts(Path(folder), torch.device("cpu"))
    reference = program.module()
    worst = 0.0
    for call in calls:
        flat = torch.utils._pytree.tree_leaves(call)
        theirs = torch.utils._pytree.tree_leaves(reference(*call))
        with torch.no_grad():
            ours = module(*flat)
        assert len(ours) == len(theirs), (len(ours), len(theirs))
        worst = max([worst, *(_difference(a, b) for a, b in zip(ours, theirs, strict=True))])
    return {"worst": worst, "profiles": seen, "state": sorted(engine_files.state_of(module))}


if __name__ == "__main__":
    pretend_gpu()
    adapter.load_package()
    for name in sys.argv[2:]:
        try:
            row = checked(name, sys.argv[1] == "by_hand")
        except Exception as error:
            row = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-1500:]}
        print(json.dumps({"name": name, **row}), flush=True)
