"""Engines built ahead of time by Torch-TensorRT 2.14 and TensorRT-RTX 1.6, run as plain TensorRT under another torch.

    python benchmarks/plain_engines.py prepare --folder .device/plain     (no GPU: with torch-tensorrt-rtx 2.14)
    python benchmarks/plain_engines.py run --folder .device/plain --output benchmarks/results/plain_engines.md

`prepare` builds each network in fp32, whole-half and calibcast's plan, and exports them; beside each stands a held-out
batch with the outputs of the fp32 model and of the cast graph. `run` needs a GPU, torch, and of TensorRT the package
that built them. It loads nothing of Torch-TensorRT, and compares latency and SQNR to fp32, beside that of the cast
graph. The networks are small, as the folder has to be carried: at most 40 MB in all.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from calibcast.engines.runtime import PlainEngine, read_tensors

from benchmarks import machine

NETWORKS = ("vit", "unet", "convnext", "efficientnet", "swin", "restoration", "mixer", "diffusion_unet")
VARIANTS = ("fp32", "half", "plan fp16", "plan bf16")
MOST_BYTES = 40_000_000
HEADINGS = ("network", "variant", "ms median (min to max)", "dB to fp32", "dB of the cast graph", "MB", "note")


def prepare(folder: Path, networks: list[str]) -> None:
    """Build and export everything; what fails is a row that says so."""
    from benchmarks.zoo import ZOO
    from benchmarks.zoo.judgement import Trial

    folder.mkdir(parents=True, exist_ok=True)
    torch.set_grad_enabled(False)
    for name in networks:
        trial = Trial.of(ZOO[name])
        for variant in VARIANTS:
            place = folder / name / variant.replace(" ", "_")
            try:
                _prepared(trial, variant, place)
            except Exception as error:  # whatever a builder raises is a row
                place.mkdir(parents=True, exist_ok=True)
                text = f"{type(error).__name__}: {str(error)[:300]}"
                (place / "failed.json").write_text(json.dumps({"note": text}))
            total = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            print(f"{name}, {variant}: {total / 1e6:.1f} MB in all", file=sys.stderr, flush=True)
            if total > MOST_BYTES:
                shutil.rmtree(place)
                place.mkdir()
                (place / "failed.json").write_text(json.dumps({"note": "left out: more than can be carried"}))


def _prepared(trial: Any, variant: str, place: Path) -> None:
    import tempfile

    from calibcast.calib.tensor_files import save_tensors
    from calibcast.engines import build
    from calibcast.engines.plain_engine import export_engine
    from calibcast.passes import insert_casts

    from benchmarks.zoo.judgement import everything_low, outputs_of

    program, plan = trial.program, None
    if variant != "fp32":
        low = torch.bfloat16 if "bf16" in variant else torch.float16
        plan = everything_low(trial.program, low) if variant == "half" else trial.plan(low)
        program = insert_casts(trial.program, plan)
    engine = build(
        program, plan, trial.ranges, backend="tensorrt", ahead_of_time=True, progress=False, on_failure="fallback",
        disable_tf32=True,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        engine.save(Path(name) / "engine")
        export_engine(Path(name) / "engine", place)
    flat = trial.inputs[-1]  # which calibration has not seen
    tensors = {f"input_{i}": v for i, v in enumerate(v for v in flat if isinstance(v, torch.Tensor))}
    cast = outputs_of(program, [flat])[0]
    for kind, outputs in (("fp32", trial.reference[-1]), ("cast", cast)):
        tensors |= {f"{kind}_{i}": v for i, v in enumerate(outputs) if isinstance(v, torch.Tensor)}
    save_tensors(place / "batch.safetensors", tensors)


def measure(place: Path, rounds: int) -> dict[str, Any]:
    """Load one engine, hold its outputs against fp32, and time it."""
    if (place / "failed.json").is_file():
        return dict(json.loads((place / "failed.json").read_text()))
    held = read_tensors(place / "batch.safetensors")
    row: dict[str, Any] = {"megabytes": (place / "model.engine").stat().st_size / 1e6}
    try:
        engine = PlainEngine(place)
        inputs = [value.cuda() for name, value in held.items() if name.startswith("input_")]
        outputs = [value.cpu() for value in engine(*inputs).values()]
        row |= {"cast": _sqnr(_of("cast", held), _of("fp32", held)), "sqnr": _sqnr(outputs, _of("fp32", held))}
        engine.reset()
        times = [_timed(engine, inputs) for _ in range(rounds)]
        return {**row, "ms": statistics.median(times), "ms_min": min(times), "ms_max": max(times)}
    except Exception as error:  # TensorRT's refusals are rows
        return {**row, "note": f"{type(error).__name__}: {str(error)[:200]}"}


def _of(kind: str, held: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    names = sorted((n for n in held if n.startswith(f"{kind}_")), key=lambda name: int(name.rpartition("_")[2]))
    return [held[name] for name in names]


def _sqnr(outputs: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
    """dB of the worst floating-point output."""
    found = [999.0]
    for ours, theirs in zip(outputs, reference, strict=True):
        if theirs.is_floating_point():
            noise = (ours.double() - theirs.double()).square().sum()
            found.append(float(10 * torch.log10(theirs.double().square().sum() / noise)) if noise else 999.0)
    return min(found)


def _timed(engine: PlainEngine, inputs: list[torch.Tensor], calls: int = 20) -> float:
    """Milliseconds a call."""
    for _ in range(3):
        engine(*inputs)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        engine(*inputs)
    torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start) / calls


def run(folder: Path, output: str | None, rounds: int) -> None:
    """Measure what is there, and write the table; partial where it is stopped."""
    rows: list[dict[str, Any]] = []
    for network in sorted(path for path in folder.iterdir() if path.is_dir()):
        for variant in VARIANTS:
            place = network / variant.replace(" ", "_")
            if place.is_dir():
                rows.append({"network": network.name, "variant": variant, **measure(place, rounds)})
                print(_line(rows[-1]), flush=True)
    io = next(folder.rglob("io.json"))
    built = json.loads(io.read_text())["versions"]
    head = f"Engines built ahead of time with {', '.join(f'{k} {v}' for k, v in built.items())}."
    table = [f"| {' | '.join(HEADINGS)} |", "|" + "---|" * len(HEADINGS), *map(_line, rows)]
    machine.write(output, "\n".join(["# Plain TensorRT engines", machine.header(), head, "", *table]))


def _line(row: dict[str, Any]) -> str:
    ms = f"{row['ms']:.3f} ({row['ms_min']:.3f} to {row['ms_max']:.3f})" if "ms" in row else ""
    numbers = [f"{row[key]:.1f}" if key in row else "" for key in ("sqnr", "cast", "megabytes")]
    note = str(row.get("note", "")).replace("|", "/").replace("\n", " ")
    return f"| {' | '.join([row['network'], row['variant'], ms, *numbers, note])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "run"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--output")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    if options.what == "prepare":
        prepare(options.folder, options.networks)
    else:
        run(options.folder, options.output, options.rounds)


if __name__ == "__main__":
    main()
