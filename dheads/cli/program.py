"""How a program on the command line begins and ends: its streams, its errors and its signals."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from dheads.cli.printing import message
from dheads.errors import DheadsError
from dheads.system.signals import ended_cleanly
from dheads.system.startup import check_folder, lacking, open_streams


@contextmanager
def running() -> Iterator[None]:
    """Within the block, an error that the user can fix becomes one line on stderr and exit code 1."""
    open_streams()
    try:
        check_folder()
        with ended_cleanly():
            yield
            return
    except DheadsError as error:
        reason = str(error)
    except (ImportError, OSError, MemoryError, RuntimeError) as error:
        missing = lacking(error)
        if missing is None:
            raise
        reason = missing
    message(f"error: {reason}")
    sys.exit(1)
