"""Signals that end the program: no half-written file remains, and ignored signals stay ignored."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import FrameType

import pytest

from dheads.system.signals import SIGNALS, Ending, ended_cleanly, undo_all, undoing

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")

# A program that is writing a file when it receives a signal.
WRITER = """
import signal, sys, time
from pathlib import Path
from dheads.system.signals import SIGNALS, ended_cleanly
from dheads.system.files import complete_or_absent
for number in SIGNALS:  # tests that run in the background ignore some, and programs inherit that
    signal.signal(number, signal.SIG_DFL)
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
with ended_cleanly(), complete_or_absent(Path(sys.argv[1])) as part:
    part.write_bytes(b"half")
    print(flush=True)
    sys.stdin.read()
"""


def signalled(folder: Path, number: int) -> subprocess.Popen[bytes]:
    """The program, after the signal is sent."""
    command = [sys.executable, "-c", WRITER, str(folder / "o.txt")]
    running = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert running.stdout.read(1) == b"\n"
    assert len(list(folder.iterdir())) == 1, "the work in progress"
    running.send_signal(number)
    return running


def test_signals_that_end_programs_are_caught() -> None:
    wanted = {"SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGXCPU"}
    assert wanted <= {number.name for number in SIGNALS}


@pytest.mark.parametrize("number", [number for number in SIGNALS if number != signal.SIGUSR1], ids=lambda n: n.name)
def test_no_half_written_file_remains(tmp_path: Path, number: signal.Signals) -> None:
    with signalled(tmp_path, number) as running:
        assert running.wait(timeout=20) == 128 + number
        assert running.stderr.read() == b""
    assert list(tmp_path.iterdir()) == []


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    with signalled(tmp_path, signal.SIGUSR1) as running:
        running.communicate(b"", timeout=20)
        assert running.returncode == 0
    assert (tmp_path / "o.txt").read_bytes() == b"half"


def test_the_last_is_undone_first_and_nothing_that_is_over() -> None:
    undone: list[str] = []

    def failing() -> None:
        undone.append("failing")
        raise OSError

    with undoing(lambda: undone.append("outer")), undoing(failing):
        with undoing(lambda: undone.append("over")):
            pass
        undo_all()
    undo_all()
    assert undone == ["failing", "outer"]


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with ended_cleanly():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in SIGNALS] == before


# --- A signal delayed to the end of a block


def test_a_signal_waits_for_the_end_of_the_block() -> None:
    with pytest.raises(KeyboardInterrupt), Ending() as ending:  # noqa: PT012
        assert not ending.asked
        signal.raise_signal(signal.SIGINT)
        assert ending.asked
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_ignored_signal_is_not_noted() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Ending() as ending:
            signal.raise_signal(signal.SIGINT)
            assert not ending.asked
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_signal_does_not_wait() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), Ending():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        reached.append(1)
        signal.raise_signal(signal.SIGINT)
        reached.append(2)
    assert reached == [1]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_goes_to_its_earlier_handler(name: str) -> None:
    number = getattr(signal, name, None)
    if number is None:
        pytest.skip("the system has no such signal")
    seen = []

    def handler(number: int, frame: FrameType | None) -> None:
        seen.append(number)

    before = signal.signal(number, handler)
    try:
        with Ending() as ending:
            signal.raise_signal(number)
            assert ending.asked
            assert seen == []
        assert seen == [number]
        with Ending():
            pass
        assert seen == [number]
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)


def test_a_thread_leaves_signals_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    during = []

    def work() -> None:
        with Ending() as ending:
            during.append((signal.getsignal(signal.SIGINT), ending.asked))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert during == [(before, False)]
