"""What importing the package does."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("before", "after", "rounds"),
    [(None, "PASSIVE", "2000"), ("ACTIVE", "ACTIVE", "None"), ("PASSIVE", "PASSIVE", "None")],
)
def test_waiting_threads_leave_the_cores_to_others_unless_told_otherwise(
    before: str | None, after: str, rounds: str
) -> None:
    """PyTorch is not loaded yet: it reads the variable once."""
    ours = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment |= {} if before is None else {"OMP_WAIT_POLICY": before}
    shown = "os.environ['OMP_WAIT_POLICY'], os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules"
    source = f"import dheads, os, sys; print({shown})"
    done = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [after, rounds, "False"]
