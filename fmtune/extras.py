"""Packages that fmtune works without, and that its extras bring."""

from __future__ import annotations

import importlib
from typing import Any

from fmtune.errors import InputError


def import_extra(place: str, module: str, package: str, extra: str) -> Any:
    """A module of a package that the extra `fmtune[extra]` brings; `place` is what of the user's asks for it.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(f"{place}: needs the package {package}; pip install 'fmtune[{extra}]'") from None
