"""Nested dictionaries of tensors, saved in several files of a limited size.

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

_OTHERS = "other_files"  # the key of the numbered files' names, in the first file
KeyPath = tuple[str | int, ...]  # the keys that lead to a tensor


def save_parts(path: Path, values: dict[Any, Any], version: int, most: int) -> None:
    """Save nested dictionaries that hold tensors in files of about `most` bytes or less (or of one tensor).

    version: a number in the names of the numbered files, different from that of the files to be replaced. Raises
    OSError, or RuntimeError (PyTorch's, for a full disk), where a file cannot be written.
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
    """Load the dictionaries that `save_parts` saved, on the CPU; only tensors and plain values are unpickled.

    Raises the errors of torch.load, and ValueError where a numbered file is missing.
    """
    values: dict[Any, Any] = torch.load(path, map_location="cpu", weights_only=True)
    for name in values.pop(_OTHERS, []):
        if name not in _others(path):
            raise ValueError(f"its file {name!r} is missing")
        for keys, tensor in torch.load(path.with_name(name), map_location="cpu", weights_only=True).items():
            holder = values
            for key in keys[:-1]:
                holder = holder[key]
            holder[keys[-1]] = tensor
    return values


def _others(path: Path) -> set[str]:
    """The names of the numbered files that `save_parts` wrote for `path`, now or earlier."""
    name = re.compile(rf"{re.escape(path.stem)}-\d{{7,}}-\d+{re.escape(path.suffix)}")
    return {other.name for other in path.parent.iterdir() if name.fullmatch(other.name)}


def _tensors(values: dict[Any, Any], parents: KeyPath = ()) -> Iterator[tuple[KeyPath, Tensor]]:
    for key, value in values.items():
        if isinstance(value, Tensor):
            yield (*parents, key), value
        elif isinstance(value, dict):
            yield from _tensors(value, (*parents, key))


def _groups(values: dict[Any, Any], most: int) -> list[dict[KeyPath, Tensor]]:
    """The tensors of each file."""
    groups: list[dict[KeyPath, Tensor]] = [{}]
    room = most
    for keys, tensor in _tensors(values):
        if tensor.nbytes > room and groups[-1]:
            groups.append({})
            room = most
        groups[-1][keys] = tensor
        room -= tensor.nbytes
    return groups


def _kept(values: dict[Any, Any], wanted: set[KeyPath], parents: KeyPath = ()) -> dict[Any, Any]:
    """The same dictionaries without the tensors that are not wanted."""
    kept = {}
    for key, value in values.items():
        if isinstance(value, dict):
            kept[key] = _kept(value, wanted, (*parents, key))
        elif not isinstance(value, Tensor) or (*parents, key) in wanted:
            kept[key] = value
    return kept


def _save(path: Path, values: dict[Any, Any]) -> None:
    with complete_or_absent(path) as part:
        torch.save(values, part)
