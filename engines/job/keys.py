"""The table of a job file's keys for the README, made from the pydantic models that check them."""

from __future__ import annotations

import json
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from calibcast.engines.job.settings import Data, Job, Source
from pydantic import BaseModel
from pydantic_core import PydanticUndefined


def keys_table() -> str:
    """Markdown: every key of every table, with its type, its default and what it means."""
    lines = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for table, field in Job.model_fields.items():
        model = model_of(table)
        if model is Source and table == "held_out":
            names = ", ".join(f"`{n}`" for n in Data.model_fields if n not in Source.model_fields)
            lines.append(f"| `[{table}]` | table | | {field.description}; it has the keys of [data] but {names} |")
            continue
        for name, item in model.model_fields.items():
            default = "" if item.default is None else "required" if item.is_required() else f"`{_toml(item.default)}`"
            lines.append(
                f"| `[{table}] {item.alias or name}` | {type_words(item.annotation)} | {default} | {item.description} |"
            )
    return "\n".join(lines)


def model_of(table: str) -> type[BaseModel]:
    """The settings of a table of the job file."""
    annotation = Job.model_fields[table].annotation
    candidates = [annotation, *get_args(annotation)]
    return next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))


def _toml(value: Any) -> str:
    if value is PydanticUndefined:
        return ""
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def type_words(annotation: Any) -> str:
    """A type as a person would say it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_words(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(type_words(a) for a in arguments if a is not type(None))
    if origin is Literal:
        return " or ".join(f'"{a}"' for a in arguments)
    if origin is tuple:
        return "list of strings"
    if origin is dict:
        return "table" if arguments[1] is Any else f"table of {type_words(arguments[1])}"
    return {str: "string", int: "integer", float: "number", bool: "boolean"}[annotation]
