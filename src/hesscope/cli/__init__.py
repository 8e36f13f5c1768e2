"""The command line: parse, call, exit code."""

from hesscope.cli.main import main

__all__ = ["main"]
