"""The command line: parse, call one function, print, set the exit code. Only this package prints."""

from dheads.cli.app import app

__all__ = ["app"]
