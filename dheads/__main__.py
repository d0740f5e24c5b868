"""`python -m dheads`, which torchrun starts as `torchrun -m dheads`."""

from dheads.cli import app

app(prog_name="dheads")
