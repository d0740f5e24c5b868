"""stdin and stdout as sound and video."""

from __future__ import annotations

import os
import signal
import stat
import sys
from pathlib import Path

from dheads.errors import DheadsError
from dheads.system.files import Stream
from dheads.system.signals import undo_all

STANDARD = Path("-")  # stdin or stdout


class VideoStdout(Stream):
    """stdout as a video. When its reader closes the pipe, SIGPIPE ends the program, as it ends others."""

    def __init__(self) -> None:
        # A file object of its own: its errors are reported as those of any other output.
        super().__init__(open(sys.stdout.fileno(), "wb", closefd=False), "<stdout>")  # noqa: SIM115

    def write(self, data: bytes) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            if hasattr(signal, "SIGPIPE"):
                undo_all()
                signal.signal(signal.SIGPIPE, signal.SIG_DFL)
                signal.raise_signal(signal.SIGPIPE)
            raise


def standard(output: Path | None) -> Path | None:
    """STANDARD for a path that is another name of stdout, such as /dev/stdout; any other path unchanged.

    No text may follow the video on stdout, whatever its name.
    """
    return STANDARD if output is not None and _is_stdout(output) else output


def _is_stdout(output: Path) -> bool:
    try:
        found = os.stat(output)
        # Text after the video does no harm in another device, such as /dev/null.
        return os.path.samestat(found, os.fstat(1)) and (os.isatty(1) or not stat.S_ISCHR(found.st_mode))
    except (OSError, ValueError):
        return False


def check_not_terminal(output: Path | None, sounds: list[Path]) -> None:
    """Raises DheadsError where video would go to a terminal, or sound come from one."""
    if output == STANDARD and (sys.stdout is None or sys.stdout.isatty()):
        what = "closed" if sys.stdout is None else "the terminal"
        raise DheadsError(f"the output is -, but stdout is {what}; pipe the video to a player or into a file")
    if STANDARD in sounds and sys.stdin.isatty():
        raise DheadsError("AUDIO is -, but stdin is the terminal; pipe sound into it")
