"""fmtune: the best ResNet that a budget can buy, for a table of labelled images."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fmtune.config import TrialConfig
    from fmtune.errors import FmtuneError
    from fmtune.export import export
    from fmtune.predict import evaluate, load, predict
    from fmtune.search import search, train
    from fmtune.space import Space

__all__ = ["FmtuneError", "Space", "TrialConfig", "evaluate", "export", "load", "predict", "search", "train"]

_HOMES = {
    "FmtuneError": "errors",
    "Space": "space",
    "TrialConfig": "config",
    "evaluate": "predict",
    "export": "export",
    "load": "predict",
    "predict": "predict",
    "search": "search",
    "train": "search",
}


class _Package(ModuleType):
    """Keeps the import of the module `fmtune.search` from hiding the function `fmtune.search`."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    # Torch and Ray take seconds to import, which `fmtune list` need not wait for.
    if name not in _HOMES:
        raise AttributeError(f"module 'fmtune' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fmtune.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
