"""Processes that may die while they work: nothing is lost, nothing is done twice, and nobody waits for ever."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from dheads.errors import DheadsError
from dheads.workers import Died, run


def start(number: int) -> Callable[[int], tuple[int, int]]:
    return partial(square, number)


def square(number: int, item: int) -> tuple[int, int]:
    if item < 0:
        os._exit(9)  # as a crash of a library, or the system's hunger for memory, would end the process
    if item == 99:
        raise DheadsError("the disk is full")
    return number, item**2


def start_hungry(seen: Path, number: int) -> Callable[[int], int]:
    return partial(die_once, seen)


def die_once(seen: Path, item: int) -> int:
    mark = seen / str(item)
    if item == 2 and not mark.exists():
        mark.touch()
        os._exit(9)
    return item


def start_dead(number: int) -> Callable[[int], int]:
    os._exit(1)


def start_refused(number: int) -> Callable[[int], int]:
    raise DheadsError("there are no weights")


def start_one(seen: Path, number: int) -> Callable[[int], int]:
    if number:
        os._exit(1)
    return partial(die_once, seen)


def test_every_item_has_its_result() -> None:
    done = list(run(start, range(20), 2))
    assert sorted((item, result[1]) for item, result in done) == [(item, item**2) for item in range(20)]
    assert {result[0] for _, result in done} <= {0, 1}


def test_nothing_to_do_starts_nothing() -> None:
    assert list(run(start_dead, [], 2)) == []


def test_what_kills_its_process_is_tried_twice_and_named_last() -> None:
    done = list(run(start, [1, -1, 2, -2, 3], 1))
    assert done == [(1, (0, 1)), (2, (0, 4)), (3, (0, 9)), (-1, Died), (-2, Died)]


def test_what_died_of_others_is_done_in_the_end(tmp_path: Path) -> None:
    assert list(run(partial(start_hungry, tmp_path), [1, 2, 3], 1)) == [(1, 1), (3, 3), (2, 2)]


def test_an_error_ends_the_run() -> None:
    results = run(start, [1, 99, 2], 1)
    assert next(results) == (1, (0, 1))
    with pytest.raises(DheadsError, match="the disk is full"):
        next(results)


def test_workers_that_cannot_start() -> None:
    with pytest.raises(DheadsError, match="there are no weights"):
        list(run(start_refused, [1, 2], 2))
    with pytest.raises(DheadsError, match="die as they start; try fewer --workers"):
        list(run(start_dead, [1, 2], 2))


def test_fewer_than_asked_for_do_all_the_work(tmp_path: Path) -> None:
    assert list(run(partial(start_one, tmp_path), [1, 3, 4, 5], 3)) == [(item, item) for item in (1, 3, 4, 5)]


def test_closing_ends_the_processes() -> None:
    results = run(start, range(1000), 2)
    next(results)
    assert multiprocessing.active_children()
    results.close()
    assert not multiprocessing.active_children()
