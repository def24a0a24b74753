"""The laws of counting: what is said of a plan without carrying it out is what carrying it out gives."""

from __future__ import annotations

import math
from operator import getitem

import polars as pl
import torch
from calibcast.calib import calibrate
from calibcast.calib.aliasing import shared_arguments
from calibcast.calib.execution import input_structure
from calibcast.calib.graph import REGION_CHILD, dtype_name, size_hint, tensor_values
from calibcast.passes import classify, insert_casts, what_if
from calibcast.passes.cast_count import CastCounter
from calibcast.passes.cast_insertion import CAST
from calibcast.passes.flips import low_at

from benchmarks.fuzz.case import Case, fresh


def casts_are_counted_without_a_graph(case: Case) -> None:
    """`CastCounter` says how many casts insertion makes, what they read, and what is in the low type then."""
    own = {node.name for node in case.source.graph.nodes}
    casts = [n for n in case.mixed.graph.nodes if n.target is CAST and n.name not in own]
    low_type = case.plan.low_precision_type
    count = CastCounter(case.program, masks=case.plan.masks).count(case.plan.low_precision_nodes, low_type)
    read = [n.args[0].meta["val"] for n in casts]
    assert count.casts == len(casts)
    assert count.bytes_cast == sum(math.prod(map(size_hint, v.shape)) * v.dtype.itemsize for v in read)
    written = [
        math.prod(map(size_hint, value.shape)) * was.dtype.itemsize
        for source, made in case.pairs()
        if source.target is not getitem and source.target not in REGION_CHILD and not shared_arguments(source)
        for (_, was), (_, value) in zip(tensor_values(source), tensor_values(made), strict=True)
        if value.dtype == low_type and was.dtype == torch.float32
    ]
    assert count.activation_bytes_low == sum(written)


def what_if_is_classify_and_insert(case: Case) -> None:
    """`what_if` gives the numbers of `classify` and `insert_casts` with the same arguments, at every limit."""
    ranges = calibrate(case.program, [input_structure(case.program, fresh(case.inputs))], progress=False)
    seen = ranges.frame.filter(pl.col("kind").is_in(["input", "activation"]))["absmax"].drop_nulls()
    limits = sorted({max(float(seen.quantile(q, "lower")), 1e-6) for q in (0.3, 0.7)} | {math.inf})
    low_type = case.plan.low_precision_type
    settings = {"nodes_to_include": ["^relu"] if any(d.node.startswith("relu") for d in case.plan.decisions) else []}
    frame = what_if(case.program, ranges, limits, low_type, [0.9, 1.0], **settings)
    base = set(classify(case.program, ranges, **settings).low_precision_nodes)
    own = {node.name for node in case.source.graph.nodes}
    for row in frame.iter_rows(named=True):
        limit, quantile = row["data_max"], row["range_quantile"]
        plan = classify(case.program, ranges, low_type, data_max=limit, range_quantile=quantile, **settings)
        low = plan.low_precision_nodes
        assert (row["nodes_low"], row["nodes_high"]) == (len(low), len(plan.high_precision_nodes))
        assert set(row["to_low"]) == set(low) - base
        assert set(row["to_high"]) == base - set(low)
        assert row["work_low"] == sum(plan[node].work for node in low)
        mixed = insert_casts(case.program, plan)
        added = [n for n in mixed.graph.nodes if n.target is CAST and n.name not in own]
        assert row["casts"] == len(added)
        if quantile == 1.0:
            assert low_at(plan.flips[dtype_name(low_type)], limit) == list(low)
