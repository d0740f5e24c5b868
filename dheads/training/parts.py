"""Nested dictionaries of tensors in files of a limited size, so that they pass where large files do not.

The first file holds everything except the tensors that do not fit into it; those are in numbered files in the same
folder. The first file is written last, so that either the old files or the new ones are complete.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dheads.system.files import complete_or_absent

_OTHERS = "other_files"  # the key of their names, in the first file
Place = tuple[str | int, ...]  # the keys on the way to a tensor


def save_parts(path: Path, values: dict[Any, Any], version: int, most: int) -> None:
    """Write nested dictionaries with tensors at their ends into files of about `most` bytes or less (or one tensor).

    version: a number in the names of the other files, which are of this one and not of the last one. Raises OSError or
    RuntimeError (PyTorch's, for a full disk) where they cannot be written.
    """
    first, *others = _groups(values, most)
    names = [f"{path.stem}-{version:07d}-{number}{path.suffix}" for number in range(1, len(others) + 1)]
    try:
        for name, group in zip(names, others, strict=True):
            _save(path.with_name(name), group)
        _save(path, _kept(values, set(first)) | ({_OTHERS: names} if names else {}))
    except BaseException:
        for name in names:
            path.with_name(name).unlink(missing_ok=True)
        raise
    for old in _others(path) - set(names):
        path.with_name(old).unlink(missing_ok=True)


def load_parts(path: Path) -> dict[Any, Any]:
    """What `save_parts` wrote, on the CPU; nothing is unpickled but tensors and plain values.

    Raises what torch.load raises, and ValueError where the files do not belong together.
    """
    values = torch.load(path, map_location="cpu", weights_only=True)
    for name in values.pop(_OTHERS, []):
        if name not in _others(path):
            raise ValueError(f"its file {name!r} is missing")
        for place, tensor in torch.load(path.with_name(name), map_location="cpu", weights_only=True).items():
            holder = values
            for key in place[:-1]:
                holder = holder[key]
            holder[place[-1]] = tensor
    return values


def _others(path: Path) -> set[str]:
    """The names of the numbered files that `save_parts` wrote for `path`, now or earlier."""
    name = re.compile(rf"{re.escape(path.stem)}-\d{{7,}}-\d+{re.escape(path.suffix)}")
    return {other.name for other in path.parent.iterdir() if name.fullmatch(other.name)}


def _tensors(values: dict[Any, Any], place: Place = ()) -> Iterator[tuple[Place, Tensor]]:
    for key, value in values.items():
        if isinstance(value, Tensor):
            yield (*place, key), value
        elif isinstance(value, dict):
            yield from _tensors(value, (*place, key))


def _groups(values: dict[Any, Any], most: int) -> list[dict[Place, Tensor]]:
    groups: list[dict[Place, Tensor]] = [{}]
    room = most
    for place, tensor in _tensors(values):
        if tensor.nbytes > room and groups[-1]:
            groups.append({})
            room = most
        groups[-1][place] = tensor
        room -= tensor.nbytes
    return groups


def _kept(values: dict[Any, Any], wanted: set[Place], place: Place = ()) -> dict[Any, Any]:
    """The same without the tensors that are not wanted."""
    kept = {}
    for key, value in values.items():
        if isinstance(value, dict):
            kept[key] = _kept(value, wanted, (*place, key))
        elif not isinstance(value, Tensor) or (*place, key) in wanted:
            kept[key] = value
    return kept


def _save(path: Path, values: dict[Any, Any]) -> None:
    with complete_or_absent(path) as part:
        torch.save(values, part)
