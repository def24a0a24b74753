"""What real models have that rewriting tools trip over: the zoo has each of these at least once."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.zoo.architecture import Architecture

ITEMS = (
    "residual net",
    "mobile net",
    "dense net",
    "ConvNeXt net",
    "windowed vision transformer",
    "plain vision transformer",
    "encoder transformer",
    "decoder transformer",
    "encoder-decoder transformer",
    "token ids",
    "rotary positions",
    "learned positions",
    "state-space model",
    "speech",
    "LSTM",
    "GRU",
    "U-Net with skips",
    "embedding bag",
    "multi-output op",
    "boolean mask",
    "-inf mask",
    "large finite mask",
    "mask through scaled_dot_product_attention",
    "autocast region enabled",
    "autocast region disabled",
    "autocast region nested",
    "in-place op",
    "in-place op on a view",
    "in-place op on a buffer",
    "dynamic batch",
    "two sequence lengths",
    "keyword inputs",
    "nested inputs",
    "dict inputs",
    "dict outputs",
    "dataclass outputs",
    "nested outputs",
    "complex part",
    "float64 part",
    "scalar output",
    "user .to(dtype)",
    "factory function",
    "shared parameters",
    "partly in half",
    "custom op",
)


def coverage(zoo: Iterable[Architecture]) -> dict[str, list[str]]:
    """The names of the models that have each item, in the order of `ITEMS`."""
    models = list(zoo)
    return {item: [model.name for model in models if item in model.covers] for item in ITEMS}


def coverage_table(zoo: Iterable[Architecture]) -> str:
    """Markdown: which models have what."""
    rows = [f"| {item} | {', '.join(names)} |" for item, names in coverage(zoo).items()]
    return "\n".join(["| what | models |", "|---|---|", *rows])
