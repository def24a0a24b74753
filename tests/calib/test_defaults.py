"""What a public function or class does when an argument is left out: the contract, written down once more.

A default that changes changes what every user's program does.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from calibcast import calib, passes
from calibcast.passes.settings import Settings
from calibcast.passes.tensor_rules import DataMax, Headroom, InitMax, Storage

CALIBRATION = {
    "transform": None, "max_batches": None, "histogram": True, "device": None, "on_nonfinite": "warn",
    "progress": True, "checkpoint": None, "checkpoint_batches": 100, "checkpoint_seconds": 60.0, "carry_state": False,
    "rounding_batches": 4,
}  # fmt: skip
CLASSIFICATION = {
    "low_precision_type": torch.float16, "min_sqnr_db": None, "data_max": None, "init_max": None,
    "max_depth_of_reduction": None, "nodes_to_exclude": (), "targets_to_exclude": (), "nodes_to_include": (),
    "targets_to_include": (), "range_quantile": 1.0, "rules": (), "weights": "warn", "wide_accumulation": (),
}  # fmt: skip
FUNCTIONS: dict[Callable[..., Any], dict[str, Any]] = {
    calib.calibrate: CALIBRATION,
    calib.recorded: {"max_bytes": 1 << 30, "when_full": "thin"},
    calib.RangeTable.check: {"weights": "warn"},
    passes.classify: CLASSIFICATION,
    passes.compare: {"transform": None, "max_batches": None, "device": None, "progress": True},
    passes.insert_casts: {"keep_io_types": True},
    passes.Comparison.table: {"rows": 12},
    passes.PrecisionPlan.from_autocast: {"low_precision_type": torch.float16, "device_type": "cuda"},
    passes.TensorFacts.magnitude: {"quantile": 1.0},
    passes.rescale: {
        "low_precision_type": torch.float16, "weights": "warn", "dataloader": None, "transform": None, "device": None,
        "carry_state": False,
    },
    passes.tune: {
        "min_sqnr_db": None, "transform": None, "max_batches": 8, "start": None, "low_precision_type": None,
        "device": None, "weights": "warn", "carry_state": False,
    },
    passes.what_if: {
        "data_max": None, "low_precision_type": (torch.float16,), "range_quantile": (1.0,), "min_sqnr_db": None,
        "base": None, "keep_io_types": True, "weights": "warn",
    },
}  # fmt: skip
FIELDS: dict[type, dict[str, Any]] = {
    passes.Decision: {"evidence": None, "limit": None, "verdicts": (), "work": 0},
    passes.NodeFacts: {
        "op": "", "base": "", "module": "", "inputs": (), "outputs": (), "literals": (), "epsilon": None,
        "depth": None, "hidden": (), "least_spread": None, "lost": None, "refused": None, "moves": False,
        "custom": False, "has_ranges": True, "rounding_known": False, "rows_masked": True,
    },
    passes.PrecisionPlan: {"notes": (), "masks": None, "rounding": None, "proof": None},
    passes.Proof: {
        "outputs": (), "integers_changed": 0.0, "nonfinite": 0, "batches": 0, "runs": 1, "carry_state": False,
    },
    passes.Rescaling: {"before": None, "after": None, "refused": ()},
    passes.RoundingSummary: {"spread": False, "edges": ()},
    passes.TensorFacts: {
        "kind": "activation", "measured": True, "min": None, "max": None, "absmax": None, "smallest": None,
        "mean": None, "rms": None, "nonfinite": 0, "masked": 0, "mask_min": None, "magnified": False,
        "offset_counts": True, "absmax_batch": None, "nonfinite_batch": None, "histogram": None, "precision": None,
        "exponent": 0,
    },
    passes.Verdict: {"evidence": None, "limit": None},
    Settings: {"range_quantile": 1.0, "data_max": None, "init_max": None, "min_sqnr_db": None},
    DataMax: {"quantile": 1.0, "given": True},
    Headroom: {"factor": 4.0},
    InitMax: {},
    Storage: {"limit": 20.0, "faint": 40.0},
}  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__qualname__)
def test_functions_do_what_was_agreed_without_being_told(function: Callable[..., Any]) -> None:
    parameters = inspect.signature(function).parameters.values()
    found = {p.name: p.default for p in parameters}
    assert {name: found[name] for name in FUNCTIONS[function]} == FUNCTIONS[function]


@pytest.mark.parametrize("kind", FIELDS, ids=lambda kind: kind.__name__)
def test_data_begin_as_was_agreed(kind: type) -> None:
    found = {f.name: f.default for f in dataclasses.fields(kind)}
    assert {name: found[name] for name in FIELDS[kind]} == FIELDS[kind]
