"""Worker processes that may die: no item is lost or done twice, and no wait is endless."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from dheads.errors import DheadsError
from dheads.system.files import complete_or_absent
from dheads.system.workers import Died, run


def start(number: int) -> Callable[[int], tuple[int, int]]:
    return partial(square, number)


def square(number: int, item: int) -> tuple[int, int]:
    if item < 0:
        os._exit(9)  # as a crash of a library or a lack of memory ends a process
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


def test_an_item_that_kills_its_process_is_tried_twice_and_comes_last() -> None:
    done = list(run(start, [1, -1, 2, -2, 3], 1))
    assert done == [(1, (0, 1)), (2, (0, 4)), (3, (0, 9)), (-1, Died), (-2, Died)]


def test_an_item_that_kills_its_process_only_once_gets_its_result(tmp_path: Path) -> None:
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


def test_fewer_processes_than_requested_do_all_items(tmp_path: Path) -> None:
    assert list(run(partial(start_one, tmp_path), [1, 3, 4, 5], 3)) == [(item, item) for item in (1, 3, 4, 5)]


def test_closing_ends_the_processes() -> None:
    results = run(start, range(1000), 2)
    next(results)
    assert multiprocessing.active_children()
    results.close()
    assert not multiprocessing.active_children()


# --- How they end


def start_writing(folder: Path, number: int) -> Callable[[int], int]:
    return partial(write, folder)


def write(folder: Path, item: int) -> int:
    """Item 0 never finishes: it writes to a pipe, whose reader sees when the process ends."""
    if item:
        return item
    with complete_or_absent(folder / "o") as part, (folder / "pipe").open("w") as pipe:
        part.touch()
        pipe.write("x")
        pipe.flush()
        threading.Event().wait()
    return item


@pytest.fixture
def with_pipe(tmp_path: Path) -> Path:
    """A folder with a pipe that one worker writes to."""
    if os.name != "posix":
        pytest.skip("the system has no named pipes")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


def test_a_worker_deletes_its_half_written_file_at_its_end(with_pipe: Path) -> None:
    results = run(partial(start_writing, with_pipe), [1, 0], 1)
    assert next(results) == (1, 1)
    with (with_pipe / "pipe").open() as pipe:
        assert pipe.read(1) == "x"
        assert len(list(with_pipe.iterdir())) == 2
        results.close()
        assert pipe.read() == ""
    assert [path.name for path in with_pipe.iterdir()] == ["pipe"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM] if os.name == "posix" else [])
def test_workers_end_with_the_first_process_however_it_ends(with_pipe: Path, number: signal.Signals) -> None:
    program = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from test_workers import *\n"
        "if __name__ == '__main__':\n list(run(partial(start_writing, Path(sys.argv[1])), [0], 1))\n"
    )
    script = with_pipe / "first.py"
    script.write_text(program)
    tests = Path(__file__).parent
    command = [sys.executable, script, with_pipe, tests, tests.parent]
    with subprocess.Popen(command) as running, (with_pipe / "pipe").open() as pipe:
        assert pipe.read(1) == "x"
        assert len(list(with_pipe.iterdir())) == 3
        running.send_signal(number)
        assert pipe.read() == "", "the worker's end closes it"
    assert sorted(path.name for path in with_pipe.iterdir()) == ["first.py", "pipe"]
