"""Fields of a configuration with a range of allowed values."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Any

from dheads.errors import DheadsError


def bounded(default: Any, least: float, most: float) -> Any:
    """A field whose value, or each of whose values, lies between these, both included; it may be None by default."""
    return field(default=default, metadata={"bounds": (least, most)})


def check_bounds(path: str, values: Any) -> None:
    """Raises DheadsError for the first number of a section, or of a table in it, that is out of its bounds."""
    for one in dataclasses.fields(values):
        name, value = f"{path}.{one.name}", getattr(values, one.name)
        if dataclasses.is_dataclass(value):
            check_bounds(name, value)
        elif isinstance(value, dict):
            for key, table in value.items():
                check_bounds(f"{name}.{key}", table)
        elif "bounds" in one.metadata and value is not None:
            least, most = one.metadata["bounds"]
            for number in value if isinstance(value, tuple) else (value,):
                if not least <= number <= most:  # also where it is not a number
                    raise DheadsError(f"configuration: {name} is {number:g}, but must be {least:g} to {most:g}")
