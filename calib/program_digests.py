"""Recognise a graph and its weights: digests that do not depend on process, device or symbol names."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from operator import getitem
from typing import Any

import torch
import xxhash
from calibcast.calib.graph import Step, dtype_name, input_targets, op_name, state_tensor, tensor_values, walk
from calibcast.calib.plain_tensors import plain_parts
from torch import fx
from torch.export import ExportedProgram

# Bytes hashed at a time, so that a weight on a GPU is never copied to the host whole.
_CHUNK = 1 << 24


def node_digests(program: ExportedProgram) -> dict[str, str]:
    """A digest of each node by its qualified name: op, edges, non-tensor arguments, dtypes, shapes.

    Symbols are numbered in order of appearance, as their names differ between exports. Devices are left out:
    a program moved to a GPU is the same program.
    """
    symbols: dict[str, str] = {}
    # Saving and loading renames `get_attr` nodes, so a region's child is known by its attribute instead.
    steps = _in_order_of_files(step for step in walk(program.graph_module) if step.node.op != "get_attr")
    return {step.name: _digest(step, symbols) for step in steps}


def _in_order_of_files(steps: Iterable[Step]) -> Iterator[Step]:
    """Each `getitem` right after the node that it reads, by index, where loading a program puts it."""
    picks: dict[fx.Node, list[Step]] = {}
    others: list[Step] = []
    for step in steps:
        maker = step.node.args[0] if step.node.target is getitem else None
        if isinstance(maker, fx.Node) and isinstance(step.node.args[1], int):
            picks.setdefault(maker, []).append(step)
        else:
            others.append(step)

    def picked(node: fx.Node) -> Iterator[Step]:
        for step in sorted(picks.pop(node, []), key=lambda step: int(str(step.node.args[1]))):
            yield step
            yield from picked(step.node)

    for step in others:
        yield step
        yield from picked(step.node)
    for node in list(picks):  # of an attribute, which has no digest of its own
        yield from picked(node)


def weights_hash(program: ExportedProgram) -> str:
    """A hash of all parameters, buffers and constants: names, dtypes, shapes and bytes, streamed."""
    total = xxhash.xxh3_128()
    for target in sorted(set(input_targets(program).values())):
        tensor = state_tensor(program, target)
        if tensor is not None:
            total.update(f"{target} {tensor.dtype} {tuple(tensor.shape)}".encode())
            for part in plain_parts(tensor):
                for chunk in _bytes_of(part):
                    total.update(chunk)
    return str(total.hexdigest())


def inputs_hash(tensors: Iterable[Any]) -> str:
    """A short hash of one batch of flat model inputs, to notice the same data used twice."""
    total = xxhash.xxh3_64()
    for value in tensors:
        if isinstance(value, torch.Tensor):
            for part in plain_parts(value):
                for chunk in _bytes_of(part):
                    total.update(chunk)
    return str(total.hexdigest())


def begin_inputs_hash(tensors: Iterable[Any]) -> Callable[[], str]:
    """`inputs_hash` in two steps: start now, finish by calling what is returned.

    Tensors on a GPU are copied to the host in a side stream, so the batch can be used at once. Otherwise the GPU would
    be idle while its inputs are copied and hashed (4 of 12 ms for the 19 MB of a ResNet-50).
    """
    copies = [_copied_beside(value) for value in tensors]

    def finish() -> str:
        for _, copied in copies:
            if copied is not None:
                copied.synchronize()
        return inputs_hash(value for value, _ in copies)

    return finish


def _copied_beside(value: Any) -> tuple[Any, torch.cuda.Event | None]:
    if not isinstance(value, torch.Tensor) or value.device.type != "cuda":
        return value, None
    current, beside = torch.cuda.current_stream(value.device), torch.cuda.Stream(value.device)  # type: ignore[no-untyped-call]
    beside.wait_stream(current)  # for the work that makes the inputs
    with torch.cuda.stream(beside):
        copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record(beside)
    value.record_stream(beside)  # its memory is not reused before the copy is done
    return copy, copied


def _bytes_of(tensor: torch.Tensor) -> Iterator[Any]:  # arrays of bytes
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1).contiguous()
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    per_chunk = max(1, _CHUNK // flat.element_size())
    for piece in torch.split(flat, per_chunk):
        if piece.numel():
            yield piece.cpu().view(torch.uint8).numpy()


def _digest(step: Step, symbols: dict[str, str]) -> str:
    node = step.node
    target = op_name(node.target) if node.op == "call_function" else ""
    text = " ".join(
        [
            node.op,
            target,
            _text(node.args, symbols),
            _text(node.kwargs, symbols),
            # Loading gives output nodes a value that export does not.
            *(_value_text(value, symbols) for _, value in tensor_values(node) if node.op != "output"),
        ]
    )
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _value_text(value: torch.Tensor, symbols: dict[str, str]) -> str:
    return f"{dtype_name(value.dtype)}[{','.join(_size_text(size, symbols) for size in value.shape)}]"


def _size_text(size: Any, symbols: dict[str, str]) -> str:
    if isinstance(size, int):
        return str(size)
    expression = size.node.expr
    for symbol in sorted(expression.free_symbols, key=str):
        symbols.setdefault(str(symbol), f"d{len(symbols)}")
    renamed = {symbol: type(symbol)(symbols[str(symbol)]) for symbol in expression.free_symbols}
    return str(expression.xreplace(renamed))


def _attribute_text(node: fx.Node, symbols: dict[str, str]) -> str:
    """An attribute by its name and, where it is a graph (a branch of `torch.cond`), by the digests of its nodes."""
    held = node.graph.owning_module
    for part in str(node.target).split("."):
        held = getattr(held, part)
    if not isinstance(held, fx.GraphModule):
        return f"@{node.target}"
    steps = [Step(inner.name, inner, True) for inner in held.graph.nodes if inner.op != "get_attr"]
    return f"@{node.target}({','.join(_digest(step, symbols) for step in steps)})"


def _text(argument: Any, symbols: dict[str, str]) -> str:
    if isinstance(argument, fx.Node):
        return _attribute_text(argument, symbols) if argument.op == "get_attr" else f"%{argument.name}"
    if isinstance(argument, (list, tuple)):
        return f"[{','.join(_text(item, symbols) for item in argument)}]"
    if isinstance(argument, dict):
        return f"{{{','.join(f'{key}:{_text(item, symbols)}' for key, item in sorted(argument.items()))}}}"
    if isinstance(argument, torch.device):
        return "device"
    if isinstance(argument, torch.SymInt):
        return _size_text(argument, symbols)
    return repr(argument)
