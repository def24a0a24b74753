"""Every name of the table of operators, and every word of its entries: none goes or changes unseen."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import fields

from calibcast.calib.operators import OPERATORS, Operator

from tests.calib.operator_table import TABLE


def described(entry: Operator) -> str:
    """What an entry says that is not the default, as `operator_table.py` has it."""
    words = []
    for field in fields(entry):
        value = getattr(entry, field.name)
        if field.name in {"name", "aliases"} or value == field.default:
            continue
        if value is True:
            words.append(field.name)
        elif field.name == "training":
            words.append(f"training={value.flag}/{value.share}/{value.statistics}")
        elif field.name == "poles":
            words.append("poles=" + " ".join(f"{pole.argument}@{pole.at:g}/{pole.exponent}" for pole in value))
        else:
            words.append(f"{field.name}={' '.join(value) if isinstance(value, tuple) else value}")
    return ", ".join(words)


def expected() -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    said = ""
    for line in TABLE.strip().splitlines():
        if line.startswith(" "):
            found[said].update(line.split())
        else:
            said = line
    return dict(found)


def test_the_table_says_what_is_written_down() -> None:
    found: dict[str, set[str]] = defaultdict(set)
    for entry in OPERATORS:
        found[described(entry) or "nothing"].add("=".join((entry.name, *entry.aliases)))
    for said in sorted(found.keys() | expected().keys()):
        assert found.get(said, set()) == expected().get(said, set()), f"{said}\n    {' '.join(sorted(found[said]))}"


def test_each_operator_is_written_down_once() -> None:
    names = [name for operators in expected().values() for one in operators for name in one.split("=")]
    assert len(names) == len(set(names))
    assert len(names) > 380
