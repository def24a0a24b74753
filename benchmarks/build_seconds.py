"""What a build costs above `torch_tensorrt.dynamo.compile` of the same cast graph in process, and where it goes.

    python benchmarks/build_seconds.py --output benchmarks/results/build_seconds.md            ahead of time, on a CPU
    python benchmarks/build_seconds.py --gpu --networks resnet50 bert_base --output ...         on a GPU

Each way in a process of its own, cache off. "in process" is the compile call alone, after torch_tensorrt was imported:
its first and its second call. "calibcast" is `build` from the call to the engine: the first, of a command that knew
early that it would build, as `calibcast build` does, and the second. CPU seconds are those of
the second call, of the process and its builder together; on a shared machine they say more than the clock. Peak memory
is that of the process and of what it started, above what it held before the build.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

NETWORKS = ("resnet18", "resnet50", "bert_small", "swin_t")
_STAGES = ("starting", "loading the program", "lowering the graph", "converting the graph", "building the engine",
           "writing the engine")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--gpu", action="store_true", help="build for the GPU that is here, and run the engine")
    parser.add_argument("--output")
    parser.add_argument("--child", nargs=2, metavar=("WAY", "NETWORK"))
    options = parser.parse_args()
    if options.child:
        way, network = options.child
        print(json.dumps({"in process": in_process, "calibcast": by_calibcast}[way](network, options.gpu)))
        return
    from benchmarks import machine

    rows = []
    for network in options.networks:
        rows.append(_row(network, *(_child(way, network, options.gpu) for way in ("in process", "calibcast"))))
        text = "# Seconds of a build\n\n" + machine.header() + "\n" + "\n".join([*_HEADER, *rows])
        machine.write(options.output, text)


_HEADER = (
    "| network | in process s, 1st / 2nd | calibcast s, 1st (prepared) / 2nd | ratio 1st / 2nd | CPU s of the 2nd, in "
    "process / calibcast | stages of the 2nd | peak MB above, in process / calibcast |",
    "|---|---|---|---|---|---|---|",
)


def _child(way: str, network: str, gpu: bool) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", way, network, *(["--gpu"] if gpu else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {"error": (done.stderr.strip().splitlines() or ["nothing"])[-1][:200]}


def _row(network: str, plain: dict[str, Any], ours: dict[str, Any]) -> str:
    for way, found in (("in process", plain), ("calibcast", ours)):
        if "error" in found:
            return f"| {network} | {way}: {found['error']} | | | | | |"
    stages = ", ".join(f"{name} {ours['stages'][name]:.1f}" for name in _STAGES if name in ours["stages"])
    ratios = [mine / theirs for mine, theirs in zip(ours["seconds"], plain["seconds"], strict=True)]
    cpu = f"{plain['cpu']:.2f} / {ours['cpu']:.2f} ({ours['cpu'] / plain['cpu']:.2f}x)"
    return (
        f"| {network} | {plain['seconds'][0]:.1f} / {plain['seconds'][1]:.1f} | {ours['seconds'][0]:.1f} / "
        f"{ours['seconds'][1]:.1f} | {ratios[0]:.2f} / {ratios[1]:.2f} | {cpu} | {stages} | {plain['peak']:.0f} / "
        f"{ours['peak']:.0f} |"
    )


def cast(network: str, gpu: bool) -> tuple[Any, Any, Any]:
    """(cast program, plan, ranges) of a network with random weights: what is timed does not depend on them."""
    import torch
    from calibcast import calibrate, classify, insert_casts

    torch.manual_seed(0)
    device = "cuda" if gpu else "cpu"
    model, args = _model(network)
    args = tuple(value.to(device) for value in args)
    program = torch.export.export(model.eval().to(device), args)
    ranges = calibrate(program, [args], progress=False, rounding_batches=0)
    plan = classify(program, ranges)
    return insert_casts(program, plan), plan, ranges


def _model(network: str) -> tuple[Any, tuple[Any, ...]]:
    import torch
    import torchvision

    if network.startswith("bert"):
        from transformers import BertConfig, BertModel

        layers, width = (12, 768) if network == "bert_base" else (4, 256)
        config = BertConfig(hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64,
                            intermediate_size=4 * width)  # fmt: skip
        return BertModel(config), (torch.randint(0, 30000, (4, 64)),)
    return getattr(torchvision.models, network)(), (torch.randn(4, 3, 224, 224),)


def in_process(network: str, gpu: bool) -> dict[str, Any]:
    from calibcast.engines.tensorrt.ahead_of_time import pretend_gpu
    from calibcast.engines.tensorrt.builder import torch_tensorrt_adapter as adapter
    from calibcast.engines.tensorrt.builder.torch_tensorrt_internals import watched_conversion

    # Without a GPU it needs the stand-ins, which cost nothing. On a GPU it sets its engine up, as ours is.
    stand_ins = nullcontext if gpu else partial(watched_conversion, lambda event: None, True)
    mixed, _, _ = cast(network, gpu)
    if not gpu:
        pretend_gpu()
    adapter.load_package()
    inputs = [node.meta["val"] for node in mixed.graph.nodes if node.name in mixed.graph_signature.user_inputs]
    specs = [adapter.input_spec((tuple(v.shape),) * 3, v.dtype) for v in inputs]
    settings = {"min_block_size": 1, **({} if gpu else {"lazy_engine_init": True})}
    before, seconds, cpu = _held(), [], 0.0
    for _ in range(2):
        start, cpu = time.perf_counter(), time.process_time()
        with stand_ins():
            adapter.compile_program(mixed, specs, {}, settings)
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "cpu": time.process_time() - cpu, "peak": _held() - before}


def by_calibcast(network: str, gpu: bool) -> dict[str, Any]:
    from calibcast.engines.early_builder import fork_builder
    from calibcast.engines.tensorrt.builder.worker import clear

    fork_builder("tensorrt", not gpu)  # as a command does, before it imports torch
    from calibcast import build

    mixed, plan, ranges = cast(network, gpu)
    before, seconds, cpu = _held(), [], 0.0
    for _ in range(2):
        start, cpu = time.perf_counter(), time.process_time() + _builder_cpu()
        engine = build(mixed, plan, ranges, backend="tensorrt", ahead_of_time=not gpu, cache=False, progress=False)
        seconds.append(time.perf_counter() - start)
    cpu = time.process_time() + _builder_cpu() - cpu
    clear()
    stages = dict(engine.record["stage_seconds"])
    return {"seconds": seconds, "cpu": cpu, "peak": _held() - before, "stages": stages}


def _builder_cpu() -> float:
    """CPU seconds of the builder that this process keeps."""
    from calibcast.engines.tensorrt.builder import worker

    builder = worker.kept()
    if builder is None:
        return 0.0
    fields = Path(f"/proc/{builder.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _held() -> float:
    """Peak memory of this process and of those that it has started and that have ended, MB."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(resource.getrusage(kind).ru_maxrss for kind in kinds) / 1024


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
