"""What a run found, as scripts and notebooks see it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from fmtune.classifier import TrainedModel
from fmtune.predict import load
from fmtune.report import write_report
from fmtune.report.markup import element
from fmtune.run import RunFolder
from fmtune.summary import describe_summary

_LEFT = "text-align: left"
"""Notebooks set cells flush right."""


@dataclass(frozen=True, repr=False)
class RunResult:
    """What a run found.

    Attributes:
        folder: the run folder, which `load`, `evaluate` and the like take; `folder.path` is where it is.
        summary: content of its summary.json.
    """

    folder: RunFolder
    summary: dict[str, Any]

    @property
    def trials(self) -> pd.DataFrame:
        """A row a trial, as trials.csv has it.

        Columns are `number`, `state`, `epoch`, `val_accuracy` (0 to 1), `val_loss`, `seconds`, and `params.KEY` of each
        searched key: NaN where it is null, or the trial has no such value. With `search.objectives` those that are no
        column yet come before the keys, and `pareto`, whether the trial is on the front.
        """
        return pd.read_csv(self.folder.trials)

    @cached_property
    def best(self) -> TrainedModel:
        """The model that was kept, as `load` gives it."""
        return load(self.folder)

    def report(self) -> Path:
        """Write report.html, report.md, its plots and the model card again; returns the page's path."""
        return write_report(self.folder)[0]

    def __repr__(self) -> str:
        return "\n".join(f"{name:<11}{text}" for name, text in describe_summary(self.folder, self.summary))

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        lines = [*describe_summary(self.folder, self.summary), ("report", str(self.folder.report))]
        rows = (
            element("tr", element("th", name, style=_LEFT), element("td", text, style=_LEFT)) for name, text in lines
        )
        return element("table", element("tbody", *rows))
