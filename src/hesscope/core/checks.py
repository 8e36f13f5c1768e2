"""Checks of arguments that several rooms need; each raises InputError naming the argument, the value and the choice."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from numbers import Integral

from hesscope.core.errors import InputError


def nearest(word: str, choices: Iterable[str]) -> str:
    """Hint to be appended to a message, naming the choice nearest to `word`; empty if none is near."""
    matches = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.4)
    return f", did you mean {matches[0]!r}?" if matches else ""


def require_choice(argument: str, value: object, choices: Iterable[str]) -> None:
    """Raise unless `value` is one of `choices`."""
    choices = list(choices)
    if value not in choices:
        hint = nearest(value, choices) if isinstance(value, str) else ""
        accepted = ", ".join(repr(choice) for choice in choices)
        raise InputError(f"{argument} must be one of {accepted}, got {value!r}{hint}")


def require_positive_int(argument: str, value: object) -> None:
    """Raise unless `value` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise InputError(f"{argument} must be a positive integer, got {value!r}")
