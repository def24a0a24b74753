"""Packaged networks that come as ONNX, read by onnx2torch: notes, file types, lines of text."""

from __future__ import annotations

import difflib
import json
import math
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.trained import data
from benchmarks.trained.subject import Batch, Run, Subject, folder_of, results_of


def converted(path: Path, example: torch.Tensor) -> tuple[nn.Module, Any]:
    """The network as a module for inputs of just this size, and the ONNX model.

    Sizes are made numbers first, and onnxruntime folds what follows from them. onnx2torch keeps shapes as tensors,
    which `torch.export` cannot look into, so they are made numbers, too.
    """
    import onnx
    import onnxruntime
    from onnx2torch import convert

    model = onnx.load(path)
    for place, size in zip(model.graph.input[0].type.tensor_type.shape.dim, example.shape, strict=True):
        place.dim_value = size
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(Path(folder) / "folded.onnx")
        options.log_severity_level = 3
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        folded = onnx.shape_inference.infer_shapes(_known(onnx.load(options.optimized_model_filepath)))
        network = convert(folded).eval()
        _Shapes(network).run(example)
    return network, model


class _Shaped(nn.Module):
    """A tensor in one shape, whatever else it is called with."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, tensor: torch.Tensor, *_: Any) -> torch.Tensor:
        expanded = tensor.numel() != math.prod(self.shape)
        return tensor.expand(self.shape) if expanded else tensor.reshape(self.shape)


class _Sliced(nn.Module):
    """A part of a tensor, whatever else it is called with. starts, ends, axes, steps: as ONNX has them."""

    def __init__(self, rank: int, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> None:
        super().__init__()
        named = range(len(starts)) if axes is None else axes.tolist()
        strides = [1] * len(starts) if steps is None else steps.tolist()
        parts = zip(named, starts.tolist(), ends.tolist(), strides, strict=True)
        taken = {axis % rank: slice(start, end if end < 2**31 else None, step) for axis, start, end, step in parts}
        self.places = tuple(taken.get(axis, slice(None)) for axis in range(rank))

    def forward(self, tensor: torch.Tensor, *_: Any) -> torch.Tensor:
        return tensor[self.places]


class _Padded(nn.Module):
    """A tensor with a margin, whatever else it is called with. pads: as ONNX has them, all begins and then all ends."""

    def __init__(self, mode: str, pads: torch.Tensor) -> None:
        super().__init__()
        both = pads.reshape(2, -1).T.flip(0).flatten().tolist()  # the last axis first, as torch wants it
        self.mode, self.pads = mode, both if mode == "constant" else both[:-4]

    def forward(self, tensor: torch.Tensor, *_: Any) -> torch.Tensor:
        return nn.functional.pad(tensor, self.pads, self.mode)


class _Shapes(torch.fx.Interpreter):
    """Runs a network, and makes numbers of the shapes and places that are tensors in it."""

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        result = super().call_module(target, args, kwargs)
        kind = type(self.fetch_attr(target)).__name__
        if kind.startswith(("OnnxReshape", "OnnxExpand", "OnnxSqueeze", "OnnxUnsqueeze")):
            self.module.set_submodule(target, _Shaped(result.shape))
        elif kind == "OnnxSlice":
            self.module.set_submodule(target, _Sliced(args[0].ndim, *args[1:]))
        elif kind == "OnnxPadDynamic":
            self.module.set_submodule(target, _Padded(self.fetch_attr(target).mode, args[1]))
        return result


def _known(model: Any) -> Any:
    """A global maximum, and a reflection along the middle one of three axes, as what onnx2torch knows."""
    import onnx

    weights = {w.name: onnx.numpy_helper.to_array(w).tolist() for w in model.graph.initializer if w.dims == [6]}
    found = []
    for node in model.graph.node:
        pads = weights.get(node.input[1]) if node.op_type == "Pad" else None
        if node.op_type == "GlobalMaxPool":
            found.append(onnx.helper.make_node("ReduceMax", node.input, node.output, node.name, axes=[2], keepdims=1))
        elif pads and pads[1] and any(a.name == "mode" and a.s == b"reflect" for a in node.attribute):
            end = onnx.numpy_helper.from_array(np.array([pads[i] for i in (0, 2, 1, 3, 5, 4)]), f"{node.name}/pads")
            model.graph.initializer.append(end)
            source, result = node.input[0], node.output[0]
            node.input[0], node.input[1], node.output[0] = f"{node.name}/in", end.name, f"{node.name}/out"
            turned = {"perm": [0, 2, 1]}
            found += [
                onnx.helper.make_node("Transpose", [source], [node.input[0]], f"{node.name}/before", **turned),
                node,
            ]
            found.append(onnx.helper.make_node("Transpose", [node.output[0]], [result], f"{node.name}/after", **turned))
        else:
            found.append(node)
    del model.graph.node[:]
    model.graph.node.extend(found)
    return model


def notes() -> Subject:
    """Basic Pitch: which notes sound, from 2 seconds of sound through a constant-Q transform and decibels."""
    path = folder_of("basic_pitch") / "saved_models" / "icassp_2022" / "nmp.onnx"
    sound = nn.functional.interpolate(data.speech()[None, None], scale_factor=22050 / data.RATE, mode="linear")[0, 0]
    batches: list[Batch] = [(w[:, :, None],) for w in data.frames(sound, 43844, 22050, 1)]
    model, _ = converted(path, batches[0][0])
    calibration, held_out = batches[:4], batches[5:]
    theirs = torch.cat(results_of(model, held_out))

    def agreement(run: Run) -> float:
        ours = torch.cat([run(*batch)[0] for batch in held_out])
        either = ((ours > 0.3) | (theirs > 0.3)).sum()
        both = ((ours > 0.3) & (theirs > 0.3)).sum()
        return 100 * float(both / either.clamp(min=1))

    return Subject(model, calibration, held_out, agreement, "notes shared with fp32, %")


def _features(path: Path) -> list[int]:
    """The first and last 1024 bytes, without white space at the ends, padded with 256: what Magika reads."""
    content = path.read_bytes()
    begin, end = content[:4096].lstrip()[:1024], content[-4096:].rstrip()[-1024:]
    return [*begin, *[256] * (1024 - len(begin)), *[256] * (1024 - len(end)), *end]


def file_types() -> Subject:
    """Magika: what a file is, from its bytes."""
    folder = folder_of("magika") / "models" / "standard_v3_3"
    labels = json.loads((folder / "config.min.json").read_text())["target_labels_space"]
    files = data.labelled_files(24)
    known = torch.tensor([labels.index(kind) for _, kind in files])
    rows = torch.tensor([_features(path) for path, _ in files], dtype=torch.int32)
    count = len(rows) // 16
    batches: list[Batch] = [(rows[16 * i : 16 * i + 16],) for i in range(count)]
    half, (model, _) = count // 2, converted(folder / "model.onnx", rows[:16])

    def accuracy(run: Run) -> float:
        found = torch.cat([run(*batch)[0].argmax(-1) for batch in batches[half:]])
        return 100 * float((found == known[16 * half : 16 * count]).float().mean())

    return Subject(model, batches[:half], batches[half:], accuracy, "accuracy, %")


def _printed(line: str, width: int, height: int) -> torch.Tensor:
    """A line of print, [3, height, width], within 1 of grey."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).text((6, 6), line, "black", ImageFont.load_default(30))
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1


def text_lines() -> Subject:
    """The recogniser of PP-OCRv4, as RapidOCR ships it: lines of print to characters."""
    path = folder_of("rapidocr_onnxruntime") / "models" / "ch_PP-OCRv4_rec_infer.onnx"
    lines = [" ".join(line.split())[:18].strip() for line in data.text().split("\n") if len(line) > 60][:640:40]
    batches: list[Batch] = [
        (torch.stack([_printed(line, 320, 48) for line in lines[i : i + 2]]),) for i in range(0, len(lines), 2)
    ]
    model, source = converted(path, batches[0][0])
    letters = ["", *source.metadata_props[0].value.split("\n"), " "]

    def read(run: Run) -> float:
        """The share of characters that are read, in order."""
        codes = [row for batch in batches[4:] for row in run(*batch)[0].argmax(-1).tolist()]
        texts = ["".join(letters[c] for c, before in zip(r, [0, *r], strict=False) if c != before) for r in codes]
        same = [difflib.SequenceMatcher(None, ours, line).ratio() for ours, line in zip(texts, lines[8:], strict=True)]
        return 100 * sum(same) / len(same)

    return Subject(model, batches[:4], batches[4:], read, "characters read, %")
