"""The end by a signal: nothing half-written stays, and what is ignored stays ignored."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dheads.system.ending import SIGNALS, ended_cleanly, undo_all, undoing

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="it has no such signals")

# A program that is at work on a file when it gets a signal, within the given block.
AT_WORK = """
import signal, sys, time
from pathlib import Path
from dheads.system.ending import SIGNALS, ended_cleanly
from dheads.system.files import complete_or_absent
for number in SIGNALS:  # some are ignored where tests run in the background, and programs inherit that
    signal.signal(number, signal.SIG_DFL)
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
with ended_cleanly(), complete_or_absent(Path(sys.argv[1])) as part:
    part.write_bytes(b"half")
    print(flush=True)
    sys.stdin.read()
"""


def signalled(folder: Path, number: int) -> subprocess.Popen[bytes]:
    """The program, which has got the signal."""
    command = [sys.executable, "-c", AT_WORK, str(folder / "o.txt")]
    running = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert running.stdout.read(1) == b"\n"
    assert len(list(folder.iterdir())) == 1, "the work in progress"
    running.send_signal(number)
    return running


def test_signals_that_end_programs_are_caught() -> None:
    wanted = {"SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGXCPU"}
    assert wanted <= {number.name for number in SIGNALS}


@pytest.mark.parametrize("number", [number for number in SIGNALS if number != signal.SIGUSR1], ids=lambda n: n.name)
def test_nothing_half_written_stays(tmp_path: Path, number: signal.Signals) -> None:
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
