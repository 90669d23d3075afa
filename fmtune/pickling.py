"""What Ray Tune pickles of a search."""

from __future__ import annotations


class NotStored:
    """Tune pickles all that it is given, for a restore that fmtune has no use for; these go as an empty object."""

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        return object, ()
