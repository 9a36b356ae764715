"""Sizes of memory as people write them."""

from __future__ import annotations

from pockc.errors import UserError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of a size such as ``32MiB``, ``1.5GB`` or ``65536``.

    Raises:
        UserError: it is none.
    """
    number = text.strip().rstrip("BKMGIbkmgi ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        found = int(float(number) * UNITS[unit])
    except (ValueError, KeyError):
        found = 0
    if found <= 0:
        raise UserError(
            f"{text!r} is not a size of memory", supported="a number with KB, MB, GB, KiB, MiB, GiB, or of bytes"
        )
    return found
