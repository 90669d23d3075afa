"""Tables on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fmtune.describe import Description
from fmtune.run import RunFolder
from fmtune.view import format_seconds, print_plain

_MATRIX_CLASSES = 20
"""Classes of a confusion matrix that a terminal has room for."""


def print_evaluation(console: Console, measured: dict[str, Any]) -> None:
    """Accuracy with its interval, a line a class, and the confusion matrix of up to `_MATRIX_CLASSES` of them."""
    low, high = measured["interval"]
    print_plain(console, f"accuracy  {measured['accuracy']:.4f}  (95% interval {low:.4f} to {high:.4f})")
    print_plain(console, f"loss      {measured['loss']:.4f}")
    table = _create_table("label", "name", "images", "precision", "recall", "f1")
    for row in measured["per_class"]:
        ratios = ("-" if row[key] is None else f"{row[key]:.4f}" for key in ("precision", "recall", "f1"))
        table.add_row(str(row["label"]), Text(row["name"]), f"{row['images']:,}", *ratios)
    console.print(table)
    if len(measured["per_class"]) > _MATRIX_CLASSES:
        print_plain(console, "\nconfusion matrix: by --json")
        return
    print_plain(console, "\nimages of each class (a line), by the class that they were taken for (a column)")
    labels = [str(row["label"]) for row in measured["per_class"]]
    matrix = _create_table("label", *labels)
    for label, counts in zip(labels, measured["confusion"], strict=True):
        matrix.add_row(label, *(f"{count:,}" for count in counts))
    console.print(matrix)


def print_description(console: Console, description: Description) -> None:
    """Rows, shape, classes, pixels and problems of a source."""
    loaded, pixels = description.loaded, description.pixels
    channels, height, width = loaded.table.images.shape[1:]
    print_plain(console, f"source    {loaded.source} ({loaded.origin})")
    print_plain(console, f"rows      {len(loaded.table):,}")
    print_plain(console, f"images    {height} x {width}, {channels} channel{'s' if channels > 1 else ''}")
    print_plain(console, f"pixels    {description.lowest} to {description.highest} of 0 to 255")
    print_plain(console, f"mean      {_join(pixels.mean)}  (of pixels scaled to 0..1)")
    print_plain(console, f"std       {_join(pixels.std)}")
    table = _create_table("label", "name", "rows")
    for label, name, count in zip(
        description.classes.labels, description.classes.names, description.counts, strict=True
    ):
        table.add_row(str(label), Text(name), f"{count:,}")
    console.print(table)
    for problem in description.problems or ("none found",):
        print_plain(console, f"problems  {problem}")


def print_runs(console: Console, folders: Sequence[RunFolder], runs: Path) -> None:
    """A line a run; the baseline by the split that its result was measured on."""
    if not folders:
        print_plain(console, f"no runs in {runs}")
        return
    table = _create_table("run", "trials", "val_accuracy", "test_accuracy", "baseline", "time")
    for folder in folders:
        if not folder.summary.exists():
            table.add_row(Text(folder.path.name), "not finished", "", "", "", "")
            continue
        summary = folder.read_summary()
        baseline = summary["baseline"] or {}
        split = "val_accuracy" if summary["test_accuracy"] is None else "test_accuracy"
        table.add_row(
            Text(folder.path.name),
            str(sum(summary["trials"].values())),
            _share(summary["val_accuracy"]),
            _share(summary["test_accuracy"]),
            _share(baseline.get(split)),
            format_seconds(summary["seconds"]),
        )
    console.print(table)


def _create_table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        table.add_column(column, justify="left" if column in ("run", "name") else "right")
    return table


def _join(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
