"""The limits of the half-precision formats, so that tensors are judged without torch, which takes seconds to import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from calibcast.calib.errors import SettingError


@dataclass(frozen=True)
class NumberFormat:
    """A floating-point format. max: the largest finite value; smallest_normal, eps: as in `torch.finfo`."""

    name: str
    short: str
    max: float
    smallest_normal: float
    eps: float


FLOAT16 = NumberFormat("float16", "fp16", 65504.0, 2.0**-14, 2.0**-10)
BFLOAT16 = NumberFormat("bfloat16", "bf16", (2 - 2.0**-7) * 2.0**127, 2.0**-126, 2.0**-7)
_NAMES = {"float16": FLOAT16, "fp16": FLOAT16, "half": FLOAT16, "bfloat16": BFLOAT16, "bf16": BFLOAT16}


def format_of(low_type: Any) -> NumberFormat:
    """The format of a `torch.dtype` or of its name. Raises SettingError for all but fp16 and bf16."""
    found = low_type if isinstance(low_type, NumberFormat) else _NAMES.get(str(low_type).removeprefix("torch."))
    if found is None:
        raise SettingError(
            f"low_precision_type={low_type}: known are torch.float16 and torch.bfloat16. Integer and 8-bit types need "
            "quantisation with scales, which calibcast does not do."
        )
    return found
