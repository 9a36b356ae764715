"""Two families of errors: the user's, which say what to do, and ours, which say which pass failed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PockcError(Exception):
    """Base of every error that pockc raises on purpose."""


class UserError(PockcError):
    """Something in the model, the scheme, the options or a file cannot be used as given.

    The message says where (module path, source line), what was found, what is supported and what to do instead.
    """

    def __init__(self, found: str, *, where: object = "", supported: str = "", instead: str = "") -> None:
        self.found, self.where, self.supported, self.instead = found, str(where), supported, instead
        parts = [f"{where}: {found}" if str(where) else found]
        if supported:
            parts.append(f"Supported: {supported}.")
        if instead:
            parts.append(instead)
        super().__init__(" ".join(part if part.endswith((".", "?")) else part + "." for part in parts))


class BudgetError(UserError):
    """No program fits the memory budget. ``smallest`` is the least budget that one does, in bytes."""

    def __init__(self, found: str, *, smallest: int, instead: str = "") -> None:
        super().__init__(found, instead=instead)
        self.smallest = smallest


class InternalError(PockcError):
    """A broken invariant inside pockc: names the pass and the dump. Please report it."""


def near_names(name: str, candidates: Iterable[str], count: int = 3) -> str:
    """A short 'did you mean' clause, or an empty string when nothing is near."""
    near = difflib.get_close_matches(name, list(candidates), n=count, cutoff=0.4)
    return f"Did you mean {', '.join(near)}?" if near else ""
