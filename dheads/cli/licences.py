"""Consent to the licences of weights."""

from __future__ import annotations

import sys

import typer


def ask_consent(name: str, accepted: bool) -> None:
    """Record that the user accepts the licence of the named weights, where it must be accepted first.

    Consent is given by `accepted`, or at the terminal; without it, loading the weights fails.
    """
    from dheads.weights.licences import accept, consent

    text = consent(name)
    if text is None:
        return
    if not accepted and sys.stdin.isatty() and sys.stderr.isatty():
        typer.echo(text, err=True)
        accepted = typer.confirm("Do you accept it?", err=True)
    if accepted:
        accept(name)
