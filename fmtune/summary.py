"""The end of a run: the model saved, the test split read, and what was found written down and said."""

from __future__ import annotations

import math
import shlex
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from fmtune.board import Board
from fmtune.calibration import find_mistakes, measure_calibration
from fmtune.checkpoint import save_model, write_json
from fmtune.choice import Choice, load_trial_model, mean_of
from fmtune.config import SearchConfig
from fmtune.context import RunContext
from fmtune.data import has_test_split, load_test_split
from fmtune.errors import DataError
from fmtune.outlook import describe_outlook, look_ahead, project_error
from fmtune.paired import compare_paired, describe_chance
from fmtune.predict import Measured, evaluate_model, wilson_interval
from fmtune.run import RunFolder, TrialRecord
from fmtune.stored import Images
from fmtune.training import EpochMetrics, Evaluation
from fmtune.view import describe_values, format_seconds, print_plain


def conclude(context: RunContext, choice: Choice) -> dict[str, Any]:
    """Save the model, measure it and the baseline on the test split, and write summary.json; returns its content.

    Raises:
        DataError: the test split can't be read. All else is written before.
    """
    choice.model.to(_device(context))
    summary, own = _summarise(context, choice), _measure_own(context, choice)
    # Late, so that the model and the figures of an earlier attempt stay together as long as they can.
    save_model(context.folder.best, choice.model)
    _write(context, choice, summary, own, None)
    test = None
    if has_test_split(context.space.data, context.data.loaded):
        try:
            test = _measure_test(context, choice, summary)
        except DataError as error:
            raise DataError(
                *error.lines, f"the run is kept: measure it with fmtune evaluate {context.folder.path} --data FILE"
            ) from None
    summary["seconds"] = round(context.board.elapsed, 1)
    _write(context, choice, summary, own, test)
    return summary


def _device(context: RunContext) -> str:
    """Where models are measured: on the GPU that the trials have left, if this machine has one."""
    return "cuda" if context.space.resources.gpus and torch.cuda.is_available() else "cpu"


def _write(
    context: RunContext,
    choice: Choice,
    summary: dict[str, Any],
    own: dict[str, float | None],
    test: dict[str, Any] | None,
) -> None:
    of_the_test = {key: summary[key] for key in ("test_accuracy", "test_interval", "test_loss")}
    metrics = {**own, **of_the_test, "refit": choice.is_refit, "test": test}
    write_json(context.folder.best / "metrics.json", metrics)
    # The summary says that the run has finished, and so comes last.
    context.folder.write_summary(summary)


def _summarise(context: RunContext, choice: Choice) -> dict[str, Any]:
    """All of summary.json that can be said without the test split."""
    board, data = context.board, context.data
    records = board.records.values()
    reached = choice.finalists.get(choice.winner.number) or choice.winner.history[-1:]
    return {
        "dataset": {
            "source": data.loaded.source,
            "origin": data.loaded.origin,
            "train": len(data.train_rows),
            "validation": len(data.validation_rows),
            "test": None,
            "shape": list(data.image_shape),
            "classes": len(data.classes),
        },
        "trials": {state: board.count(state) for state in ("complete", "pruned", "failed")},
        "best_trial": choice.winner.number,
        "params": choice.winner.params,
        "val_accuracy": mean_of(reached, "val_accuracy"),
        "val_loss": mean_of(reached, "val_loss"),
        "test_accuracy": None,
        "test_interval": None,
        "test_loss": None,
        "baseline": _describe_baseline(board.baseline) if board.baseline else None,
        "seconds": round(board.elapsed, 1),
        "images_trained": choice.images_trained
        + sum(context.images_trained(record.config, len(record.history)) for record in records),
        "finalists": [_describe_finalist(number, results) for number, results in choice.finalists.items()],
        "refit": choice.is_refit,
        "front": _describe_front(context),
        "outlook": _look_ahead(board, context.space.search),
        "broken_off": board.broken_off,
        "failures": [
            {"trial": record.number, "cause": record.cause, "config": record.config.model_dump(mode="json")}
            for record in records
            if record.state == "failed"
        ],
    }


def _describe_front(context: RunContext) -> list[dict[str, Any]] | None:
    """The Pareto front by falling accuracy, None where there is one objective."""
    objectives = context.objectives
    if objectives is None:
        return None
    front = [
        {"trial": record.number} | dict(zip(objectives.names, objectives.measure(record.config, last), strict=True))
        for record in objectives.find_front(list(context.board.records.values()))
        if (last := record.last.as_dict() if record.last else None)
    ]
    return sorted(front, key=lambda point: -point["val_accuracy"])


def _describe_finalist(number: int, results: Sequence[EpochMetrics]) -> dict[str, Any]:
    return {
        "trial": number,
        "val_accuracy": mean_of(results, "val_accuracy"),
        "val_loss": mean_of(results, "val_loss"),
        "seeds": [{"val_accuracy": result.val_accuracy, "val_loss": result.val_loss} for result in results],
    }


def _describe_baseline(record: TrialRecord) -> dict[str, Any]:
    return {
        "val_accuracy": record.last and record.last.val_accuracy,
        "test_accuracy": None,
        "difference": None,
        "epochs": len(record.history),
        "of_epochs": record.config.epochs,
        "cause": record.cause,
    }


def _look_ahead(board: Board, search: SearchConfig) -> dict[str, Any] | None:
    """What as many trials again would bring, by those drawn from the space; None where they are too few, or a grid's.

    The baseline and the values of `search.try` are no draws, and yet what there is to gain on. A trial that was stopped
    early counts by what it would have come to, at most the best.
    """
    if search.sampler == "grid":
        return None
    first_drawn = board.has_baseline + len(search.tries)
    curves = [(record, errors) for record in board.records.values() if (errors := _errors_of(record, board))]
    whole: defaultdict[int, list[list[float]]] = defaultdict(list)
    for record, errors in curves:
        if record.state == "complete" and record is not board.baseline:
            whole[record.config.epochs].append(errors)
    best = min((errors[-1] for _, errors in curves), default=0.0)
    drawn = [(record, errors) for record, errors in curves if record.number >= first_drawn]
    ends = [max(best, project_error(errors, whole[record.config.epochs])) for record, errors in drawn]
    outlook = look_ahead([-end for end in ends], limit=0.0, best=-best)
    return None if outlook is None else {"metric": board.metric} | asdict(outlook)


def _errors_of(record: TrialRecord, board: Board) -> list[float]:
    """What is missing to the best possible value after each epoch; none of a trial that failed or was not measured."""
    values = [metrics.as_dict()[board.metric] for metrics in record.history]
    if record.state == "failed" or not all(value is not None and math.isfinite(value) for value in values):
        return []
    return [1 - value if board.larger else value for value in values if value is not None]


def _measure_test(context: RunContext, choice: Choice, summary: dict[str, Any]) -> dict[str, Any]:
    """Read the test split, and enter what the model and the baseline reach on it into the summary.

    Returns:
        `Measured.as_dict()` of the model, with its `calibration` and its surest `mistakes`.
    """
    loaded = load_test_split(context.space.data, context.data.loaded)
    labels = context.data.classes.indices(loaded.table.labels, loaded.source)
    best = evaluate_model(choice.model, loaded.table.images, labels)
    summary["dataset"]["test"] = len(labels)
    summary["test_accuracy"] = best.accuracy
    summary["test_interval"] = list(wilson_interval(best.correct, best.images))
    summary["test_loss"] = best.loss
    baseline = context.board.records.get(0)
    if summary["baseline"] and baseline and baseline.checkpoint:
        reference = evaluate_model(
            load_trial_model(context, baseline).to(_device(context)), loaded.table.images, labels
        )
        summary["baseline"]["test_accuracy"] = reference.accuracy
        is_right, was_right = (e.predicted.cpu().numpy() == labels for e in (best, reference))
        summary["baseline"]["difference"] = asdict(compare_paired(is_right, was_right))
    return Measured(choice.model, best).as_dict() | _examine(best, loaded.table.images, labels)


def _examine(evaluation: Evaluation, images: Images, labels: NDArray[np.int64]) -> dict[str, Any]:
    predicted, confidence = evaluation.predicted.cpu().numpy(), evaluation.confidence.cpu().numpy()
    return {
        "calibration": asdict(measure_calibration(confidence, predicted == labels)),
        "mistakes": [asdict(mistake) for mistake in find_mistakes(images, labels, predicted, confidence)],
    }


def _measure_own(context: RunContext, choice: Choice) -> dict[str, float | None]:
    """What the saved weights reach on the validation rows; None after a refit, which has trained on them."""
    if choice.is_refit:
        return {"val_accuracy": None, "val_loss": None}
    data = context.data
    evaluation = evaluate_model(choice.model, data.images, data.labels, data.validation_rows)
    return {"val_accuracy": evaluation.accuracy, "val_loss": evaluation.loss}


def describe_summary(folder: RunFolder, summary: dict[str, Any]) -> list[tuple[str, str]]:
    """What was found, against the baseline, how long it took and where it is, as lines of a name and a text."""
    trials, baseline = summary["trials"], summary["baseline"]
    lines = [("found", f"trial {summary['best_trial']}  {describe_values(summary['params'])}")]
    lines.append(("validation", _percent(summary["val_accuracy"]) + _describe_finalists(summary["finalists"])))
    for point in summary.get("front") or ():
        others = [f"{point[name]:,.0f} {name}" for name in point if name not in ("trial", "val_accuracy")]
        lines.append(("front", f"trial {point['trial']}  {', '.join([_percent(point['val_accuracy']), *others])}"))
    if summary["test_accuracy"] is not None:
        low, high = summary["test_interval"]
        lines.append(
            ("test", f"{_percent(summary['test_accuracy'])}  (95% interval {_percent(low)} to {_percent(high)})")
        )
    if baseline:
        lines.append(("baseline", _describe_against(summary, baseline)))
    counts = f"{trials['complete']} complete, {trials['pruned']} stopped early, {trials['failed']} failed"
    if summary["broken_off"]:
        lines.append(("broken off", f"after failures in a row of one cause: {summary['broken_off']}"))
    lines.append(
        ("trials", f"{counts}, {summary['images_trained']:,} images trained in {format_seconds(summary['seconds'])}")
    )
    if summary["outlook"]:
        lines.append(("more", describe_outlook(summary["outlook"])))
    lines.append(("refit", "on training and validation rows together" if summary["refit"] else "none"))
    lines.append(("run", str(folder.path)))
    return lines


def print_summary(console: Console, folder: RunFolder, summary: dict[str, Any]) -> None:
    """The last screen: `describe_summary`, and what to type next."""
    run = shlex.quote(str(folder.path))
    following = f"fmtune evaluate {run} --data FILE    fmtune predict {run} FILE -o out.csv"
    for name, text in [*describe_summary(folder, summary), ("next", following)]:
        print_plain(console, f"{name:<11}{text}")


def _describe_finalists(finalists: list[dict[str, Any]]) -> str:
    if not finalists:
        return ""
    seeds = len(finalists[0]["seeds"])
    return f"  (best mean of {len(finalists)} finalists over {seeds} fresh seed{'s' if seeds > 1 else ''})"


def _describe_against(summary: dict[str, Any], baseline: dict[str, Any]) -> str:
    key = "test_accuracy" if baseline["test_accuracy"] is not None else "val_accuracy"
    if baseline[key] is None:
        return f"failed: {baseline['cause']}" if baseline.get("cause") else "had no time to finish an epoch"
    text = _percent(baseline[key])
    if summary[key] is not None:
        text += f"  (tuned: {100 * (summary[key] - baseline[key]):+.2f} points{_describe_difference(baseline)})"
    if baseline["epochs"] < baseline["of_epochs"]:
        reason = f"where it failed: {baseline['cause']}" if baseline.get("cause") else "its share of the time"
        text += f"  after {baseline['epochs']} of {baseline['of_epochs']} epochs, {reason}"
    return text


def _describe_difference(baseline: dict[str, Any]) -> str:
    paired = baseline["difference"]
    if paired is None:
        return ""
    low, high = (100 * end for end in paired["interval"])
    return f", 95% interval {low:+.2f} to {high:+.2f}; {describe_chance(paired['p_value'])}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}%"
