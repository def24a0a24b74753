"""What calibcast changes inside Torch-TensorRT and TensorRT, beyond their public calls, and why.

Checked against the sources of 2.11.0 and 2.14.0. Everything is restored when the `with` block ends:

- `TRTInterpreter.run_node`, wrapped: each layer that a node makes gets that node's name as its `metadata`, which
  TensorRT carries through fusion into the engine.
- `TRTInterpreter._populate_trt_builder_config`, wrapped: a progress monitor, and detailed profiling verbosity, without
  which an engine does not tell the types of its layers.
- `partitioning.common.extract_var_range_info`, replaced for sizes that we know: 2.14 takes the most frequent size from
  the export's example, and 2.11 takes the other two from the export. The profile that TensorRT was given is read back.
- `is_node_supported` of both partitioners' support tests, wrapped: chosen nodes stay in PyTorch.
- `TRTInterpreter.output`, wrapped: outputs that are the same tensor become one output of the engine, and neither
  library says which ones did.
- `DYNAMO_ATEN_CONVERTERS`: those of casts and copies that are an engine's output themselves say that they take no
  dynamic sizes. They do: the layer that they add knows none. A cast of an input that two engines read is such an
  output.
- `TorchTensorRTModule.setup_engine`, which makes a finished engine ready to run. TensorRT-RTX compiles kernels for it
  then, which takes as long as the rest of the build. Engines are set up where they run, once.
- ahead of time only: `tensorrt.Runtime`, with which `TRTInterpreter.run` deserialises the finished engine. It needs a
  GPU, and building does not. Also `_compiler.to_torch_device`, which moves the weights of what stays in PyTorch to a
  GPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from calibcast.calib.errors import BuildError
from calibcast.engines.tensorrt.builder.job import Profile
from calibcast.engines.tensorrt.builder.network_layers import Conversion, described, layer_metadata, stamped_name
from calibcast.engines.tensorrt.builder.preparing import COPY
from calibcast.engines.tensorrt.builder.size_bounds import Bounds, bounds_of
from calibcast.engines.tensorrt.builder.torch_tensorrt_adapter import read_profile
from calibcast.passes.cast_insertion import CAST
from torch.utils import _pytree as pytree

_SUPPORT_TESTS = (
    ("_adjacency_partitioner", "OpSupportTester"),
    ("_global_partitioner", "TorchTensorRTOperatorSupport"),
)
Event = Callable[[dict[str, Any]], None]


@contextmanager
def watched_conversion(
    event: Event,
    ahead_of_time: bool,
    sizes: Mapping[str, Bounds] | None = None,
    in_pytorch: Collection[str] = (),
    names: Mapping[str, str] | None = None,
) -> Iterator[Conversion]:
    """Watch the conversions in this block; `event` is called with each event, as plain data.

    sizes: the bounds of each symbol in the sizes of the program's inputs, for the engines' profiles. in_pytorch: nodes
    to keep out of engines, by the names that `stamp` gave. names: node -> the caller's name of the output that it is;
    the engine's output gets this name.
    """
    interpreter = importlib.import_module("torch_tensorrt.dynamo.conversion._TRTInterpreter")
    conversion = Conversion()
    with ExitStack() as stack:
        patch = mock.patch.object
        kind = interpreter.TRTInterpreter
        stack.enter_context(patch(kind, "run_node", _with_metadata(kind.run_node, conversion, event)))
        stack.enter_context(patch(kind, "_construct_trt_network_def", _counted(kind, conversion)))
        stack.enter_context(
            patch(kind, "output", _placed(kind.output, interpreter.trt.ITensor, conversion, names or {}))
        )
        common = importlib.import_module("torch_tensorrt.dynamo.partitioning.common")
        ranged = _with_sizes(common.extract_var_range_info, sizes or {})
        stack.enter_context(patch(common, "extract_var_range_info", ranged))
        registry = importlib.import_module("torch_tensorrt.dynamo.conversion._ConverterRegistry")
        stack.enter_context(mock.patch.dict(registry.DYNAMO_ATEN_CONVERTERS, _of_any_size(registry)))
        configure = _with_progress(kind._populate_trt_builder_config, interpreter.trt, conversion, event)
        stack.enter_context(patch(kind, "_populate_trt_builder_config", configure))
        for place, name in _SUPPORT_TESTS if in_pytorch else ():
            test = getattr(importlib.import_module(f"torch_tensorrt.dynamo.partitioning.{place}"), name)
            refusing = _refusing(test.is_node_supported, frozenset(in_pytorch))
            stack.enter_context(patch(test, "is_node_supported", refusing))
        if ahead_of_time:
            stack.enter_context(patch(interpreter.trt, "Runtime", _Undeserialised))
            compiler = importlib.import_module("torch_tensorrt.dynamo._compiler")
            stack.enter_context(patch(compiler, "to_torch_device", lambda _: torch.device("cpu")))
        module = importlib.import_module("torch_tensorrt.dynamo.runtime").TorchTensorRTModule
        stack.enter_context(patch(module, "setup_engine", _set_up_nothing))
        yield conversion


def _of_any_size(registry: Any) -> dict[Any, list[Any]]:
    """The converters of casts and copies, all of which take dynamic sizes."""
    converters = registry.DYNAMO_ATEN_CONVERTERS
    return {
        target: [replace(support, supports_dynamic_shapes=True) for support in converters[target]]
        for target in (CAST, COPY)
        if target in converters
    }


def _with_sizes(original: Callable[..., Any], sizes: Mapping[str, Bounds]) -> Callable[..., Any]:
    def extract(symbolic_integer: Any, *args: Any, **kwargs: Any) -> Any:
        found = bounds_of(symbolic_integer.node.expr, sizes)
        if found is None:  # a symbol of no input, such as the number of nonzero values
            return original(symbolic_integer, *args, **kwargs)
        return {"min": found[0], "opt": found[1], "max": found[2]}

    return extract


def _refusing(original: Callable[..., bool], names: frozenset[str]) -> Callable[..., bool]:
    def is_node_supported(self: Any, submodules: Any, node: torch.fx.Node) -> bool:
        return stamped_name(node) not in names and original(self, submodules, node)

    return is_node_supported


def _profiles_given(interpreter: Any) -> dict[str, Profile]:
    """The profile of each dynamic input of a network that is about to be built, read back from TensorRT."""
    network, given = interpreter.ctx.net, interpreter.optimization_profiles or ()
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    dynamic = [i for i in inputs if not i.is_shape_tensor and -1 in tuple(i.shape)]
    return {i.name: read_profile(profile.get_shape(i.name)) for profile in given for i in dynamic}


def _placed(
    original: Callable[..., Any], network_tensor: type, conversion: Conversion, callers: Mapping[str, str]
) -> Callable[..., Any]:
    def output(self: Any, target: Any, args: Any, kwargs: Any) -> Any:
        given = args[0] if isinstance(args[0], (tuple, list)) else (args[0],)
        self._user_output_binding_names = _output_names(self, callers)
        made = original(self, target, args, kwargs)
        conversion.outputs.append(_places(given, network_tensor))
        network = self.ctx.net
        names = [network.get_output(i).name for i in range(network.num_outputs)]
        if names != list(self._output_names):
            raise BuildError(
                f"the program's outputs became {names} in TensorRT and {list(self._output_names)} around it: some are "
                "one tensor under two names. Give such an output a value of its own, or leave it out."
            )
        return made

    return output


def _output_names(interpreter: Any, callers: Mapping[str, str]) -> list[str] | None:
    """Names for the outputs of a network: the caller's where they are the program's, else TensorRT's usual ones.

    2.14 reads these names, and puts outputs that are updated in place last. 2.11 has no such names, and ignores them.
    """
    last = next(node for node in interpreter.module.graph.nodes if node.op == "output")
    given = [callers.get(stamped_name(node), "") for node in pytree.tree_leaves(last.args[0])]
    behind = len(getattr(interpreter.ctx, "aliased_outputs", ()))
    names = [name or f"output{index}" for index, name in enumerate([*given, *[""] * behind])]
    inputs = {interpreter.ctx.net.get_input(i).name for i in range(interpreter.ctx.net.num_inputs)}
    return names if len({*names} - inputs) == len(names) else None


def _places(given: Sequence[Any], network_tensor: type) -> list[int]:
    """The index of each value among the engine's outputs, as the interpreter numbers them: it marks the same tensor
    object only once, and makes a new tensor each time of a value that is not a tensor of the network yet."""
    places: dict[Any, int] = {}
    found = []
    for index, value in enumerate(given):
        key = id(value) if isinstance(value, network_tensor) else f"made {index}"
        found.append(places.setdefault(key, len(places)))
    return found


def _counted(kind: Any, conversion: Conversion) -> Callable[..., Any]:
    original = kind._construct_trt_network_def

    def construct(self: Any, *args: Any, **kwargs: Any) -> Any:
        conversion.networks += 1
        return original(self, *args, **kwargs)

    return construct


def _with_metadata(original: Callable[..., Any], conversion: Conversion, event: Event) -> Callable[..., Any]:
    def run_node(self: Any, node: torch.fx.Node) -> Any:
        network, name = self.ctx.net, stamped_name(node)
        engine, before = conversion.networks - 1, network.num_layers
        event({"stage": "convert", "engine": engine, "node": name or node.name, "op": str(node.target)})
        result = original(self, node)
        for index in range(before, network.num_layers):
            layer = network.get_layer(index)
            if name and not layer.metadata:
                layer.metadata = layer_metadata(name)
            conversion.layers.append(described(layer, engine, name))
        return result

    return run_node


def _with_progress(original: Callable[..., Any], trt: Any, conversion: Conversion, event: Event) -> Callable[..., Any]:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            stage = {"stage": "phase", "engine": conversion.networks - 1}
            event({**stage, "phase": phase_name, "parent": parent_phase, "steps": num_steps})

        def step_complete(self, phase_name: str, step: int) -> bool:
            event({"stage": "step", "phase": phase_name, "step": step + 1})
            return True  # False would cancel the build

        def phase_finish(self, phase_name: str) -> None:
            event({"stage": "done", "phase": phase_name})

    def configure(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = original(self, *args, **kwargs)
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        # The configuration does not keep its monitor alive.
        self.calibcast_monitor = monitor = Monitor()
        config.progress_monitor = monitor
        engine = conversion.networks - 1
        conversion.profiles.append(_profiles_given(self))
        made = [{"name": x.name, "node": x.node} for x in conversion.layers if x.engine == engine and x.node]
        event({"stage": "build", "engine": engine, "layers": made})
        return config

    return configure


class _Undeserialised:
    """Stands in for `tensorrt.Runtime` where there is no GPU: returns the serialised bytes in place of an engine."""

    def __init__(self, *_: Any) -> None:
        pass

    def deserialize_cuda_engine(self, data: Any) -> _Bytes:
        return _Bytes(data)


class _Bytes:
    """Stands in for an engine that was built and is not deserialised."""

    def __init__(self, data: Any) -> None:
        self._data = data

    def serialize(self) -> Any:
        return self._data

    def get_aliased_input_tensor(self, _: str) -> None:
        return None


class _Idle:
    """Stands in for an engine that is not set up."""

    requires_native_multidevice = False
    _unowned = False

    def set_output_tensors_as_unowned(self, unowned: bool) -> None:
        self._unowned = unowned

    def are_output_tensors_unowned(self) -> bool:
        return self._unowned


def _set_up_nothing(module: Any) -> None:
    module.engine = _Idle()


def set_up(module: Any) -> None:
    """Make an engine ready to run that was built in `watched_conversion`."""
    if isinstance(module.engine, _Idle):
        module.engine = None  # else it counts as set up
        module.setup_engine()
