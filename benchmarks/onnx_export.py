"""Every architecture of the zoo as ONNX: does it export, does onnx's checker take it, does ONNX Runtime agree?

    python benchmarks/onnx_export.py -o benchmarks/results/onnx_export.md
    python benchmarks/onnx_export.py --only bert --only resnet --types fp16

The plan of each model is exported with `export_onnx` and run by ONNX Runtime on the CPU beside the cast graph, on
batches that calibration saw and one that it did not. ONNX Runtime computes much of fp16 in fp32 there, so this judges
the graph, not an engine's arithmetic: it agrees at 40 dB, or where it is no further from fp32 than the cast graph is
(within 1 dB). Where ONNX Runtime's CPU has no half kernel for an operator, onnx's reference evaluator runs the model in
its place, and the row says so. "TensorRT": whether its parser and its builder take the model; TensorRT-RTX does so
without a GPU, and runs nothing here. Each model runs in a child process, as ONNX Runtime may crash. Needs no GPU and no
network.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import math
import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import machine
from benchmarks.isolation import Worker, serve
from benchmarks.onnx_engine import OnnxError, built
from benchmarks.zoo import ZOO

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
LEAST_DB, SLACK_DB = 40.0, 1.0
# What ONNX Runtime says where its CPU has no kernel for an operator in half precision.
_NO_KERNEL = "NOT_IMPLEMENTED|is not supported"
Row = dict[str, Any]
HEADINGS = ("model", "type", "agrees", "dB to the cast graph", "dB of ONNX to fp32", "dB of the cast graph to fp32",
            "planned nodes found", "TensorRT", "note")  # fmt: skip


def answer(job: dict[str, str]) -> Row:
    """Export one model in one type and run it."""
    from calibcast.calib.errors import CalibcastError

    try:
        with tempfile.TemporaryDirectory() as folder:
            return _measured(job["model"], TYPES[job["type"]], Path(folder) / "model.onnx")
    except CalibcastError as error:
        return {"note": f"{type(error).__name__}: {str(error)[:300]}"}


def _measured(model: str, low_type: torch.dtype, path: Path) -> Row:
    from calibcast.calib.errors import first_line
    from calibcast.engines import export_onnx
    from calibcast.passes import insert_casts

    from benchmarks.zoo.judgement import Trial, outputs_of

    tried = Trial.of(ZOO[model])
    plan = tried.plan(low_type)
    mixed = insert_casts(tried.program, plan)
    export_onnx(mixed, plan, path)
    row: Row = {"found": _found(path), "tensorrt": _by_tensorrt(path, tried.inputs[0])}
    ours = outputs_of(mixed, tried.inputs)
    try:
        theirs = [_run(path, mixed, flat) for flat in tried.inputs]
    except Exception as error:  # of ONNX Runtime, whose errors have no base but Exception
        if not re.search(_NO_KERNEL, str(error)):
            return {**row, "note": f"ONNX Runtime: {str(error).strip()[:300]}"}
        row["note"] = f"by onnx's reference evaluator: {re.sub(r'^.*?: ', '', first_line(error))[:160]}"
        theirs = [_run(path, mixed, flat, reference=True) for flat in tried.inputs]
    return {
        **row,
        "agrees": sqnr(theirs, ours), "onnx": sqnr(theirs, tried.reference), "cast": sqnr(ours, tried.reference),
    }  # fmt: skip


def _by_tensorrt(path: Path, flat: list[Any]) -> str:
    """Whether TensorRT's own parser and builder take the model, or what they say against it."""
    try:
        built(path, [value for value in flat if isinstance(value, torch.Tensor)])
    except ImportError:
        return "not here"
    except OnnxError as error:
        return str(error)[:120]
    return "builds"


def _found(path: Path) -> list[int]:
    """How many of the planned nodes have ONNX nodes that say so, and how many there are."""
    onnx = importlib.import_module("onnx")
    metadata = {entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props}
    nodes = [row for row in json.loads(metadata["calibcast.plan"])["nodes"].values() if row["precision"] != "kept"]
    return [sum(bool(row["onnx"]) for row in nodes), len(nodes)]


def _run(path: Path, mixed: Any, flat: list[Any], reference: bool = False) -> list[Any]:
    """The outputs of ONNX Runtime, or of onnx's reference evaluator, every batch from the state at the start, as the
    cast graph is run."""
    from calibcast.engines.io_names import tensor_outputs

    numpy = importlib.import_module("numpy")
    tensors = [value for value in flat if isinstance(value, torch.Tensor)]
    session = importlib.import_module("onnx.reference").ReferenceEvaluator(str(path)) if reference else _session(path)
    names = session.input_names if reference else [value.name for value in session.get_inputs()]
    given = {name: value.numpy() for name, value in zip(names, tensors, strict=False)}
    state = path.with_name(f"{path.name}.state.npz")
    given |= dict(numpy.load(state)) if state.is_file() else {}
    computed = iter(session.run(None, given))
    return [torch.from_numpy(numpy.asarray(next(computed))) if tensor else None for tensor in tensor_outputs(mixed)]


def _session(path: Path) -> Any:
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    # Its optimiser crashes on an LSTM in fp16, and judges nothing of ours.
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def sqnr(outputs: list[list[Any]], reference: list[list[Any]]) -> float:
    """dB of the worst floating-point output; 999 where all are equal, -999 where one is NaN or Inf that should not."""
    from benchmarks.zoo.judgement import worst_error

    error = worst_error(outputs, reference)
    return 999.0 if error == 0 else -999.0 if not math.isfinite(error) else -20 * math.log10(error)


def agrees(row: Row) -> bool:
    """By the module's own words."""
    return "agrees" in row and (row["agrees"] >= LEAST_DB or row["onnx"] >= row["cast"] - SLACK_DB)


def line(row: Row) -> str:
    """A row of the table."""
    numbers = [f"{row[key]:.1f}" if key in row else "" for key in ("agrees", "onnx", "cast")]
    found = "{} of {}".format(*row["found"]) if "found" in row else ""
    cells = [
        row["model"],
        row["type"],
        "yes" if agrees(row) else "**no**",
        *numbers,
        found,
        row.get("tensorrt", ""),
        row.get("note", ""),
    ]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def report(rows: list[Row], types: list[str]) -> str:
    """Counts, and the table."""
    counts = [
        f"- {kind}: {sum(agrees(row) for row in rows if row['type'] == kind)} of "
        f"{sum(row['type'] == kind for row in rows)} export, run and agree." for kind in types
    ]  # fmt: skip
    for kind in types:
        takes = sum(row.get("tensorrt") == "builds" for row in rows if row["type"] == kind)
        counts.append(f"- {kind}: TensorRT's own parser and builder take {takes}.")
    table = [f"| {' | '.join(HEADINGS)} |", "|" + "---|" * len(HEADINGS), *map(line, rows)]
    return "\n".join(["# ONNX", machine.header(), *counts, "", *table])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=sorted(ZOO), metavar="NAME", help="a model; may be repeated")
    parser.add_argument("--types", default="fp16", help="low types, separated by commas")
    parser.add_argument("-o", "--output", help="Markdown file to write")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        serve(answer)
        return
    rows, types = list[Row](), options.types.split(",")
    with Worker([sys.executable, __file__, "--child"]) as worker:
        for model in options.only or ZOO:
            for kind in types:
                told = worker.ask({"model": model, "type": kind})
                rows.append({"model": model, "type": kind, **told.get("result", {"note": told.get("failure", "")})})
                print(line(rows[-1]), file=sys.stderr, flush=True)
                if options.output:
                    Path(options.output).write_text(report(rows, types) + "\n", encoding="utf-8")
    machine.write(options.output, report(rows, types))


if __name__ == "__main__":
    main()
