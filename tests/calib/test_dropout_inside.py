"""Which calls of operators with dropout inside drop anything."""

from __future__ import annotations

from typing import Any

import pytest
from calibcast.calib.training_mode import _drops_inside


@pytest.mark.parametrize(
    ("given", "drops"),
    [
        ({"dropout_p": 0.1}, True),
        ({"dropout_p": 0.0}, False),
        ({"train": True, "dropout": 0.5, "num_layers": 2}, True),
        ({"train": True, "dropout": 0.5, "num_layers": 3}, True),
        ({"train": True, "dropout": 0.5, "num_layers": 1}, False),  # there is none behind the last layer
        ({"train": True, "dropout": 0.5}, True),
        ({"train": True, "dropout": 0.0, "num_layers": 2}, False),
        ({"train": False, "dropout": 0.5, "num_layers": 2}, False),
        ({"dropout": 0.5, "num_layers": 2}, False),
    ],
)
def test_dropout_of_attention_and_between_layers(given: dict[str, Any], drops: bool) -> None:
    assert _drops_inside(given) is drops
