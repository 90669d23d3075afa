"""The model card: what a model is, what it was measured to do, and what nobody has tried it on.

After Mitchell et al., 2019, https://arxiv.org/abs/1810.03993, under a header that the Hugging Face Hub reads
(https://huggingface.co/docs/hub/model-cards).
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from fmtune.config import flatten
from fmtune.datasets import LICENCES, NAMES
from fmtune.predict import wilson_interval
from fmtune.report.findings import describe_caveats, describe_weakest, judge, weigh, weigh_confidence
from fmtune.report.markdown import escape, fence, paragraph, table
from fmtune.report.read import Run
from fmtune.report.words import NOTHING, decimal, interval, listing, percent, plural

_HEADER = """---
pipeline_tag: image-classification
tags:
- image-classification
- resnet
- fmtune
metrics:
- accuracy
---"""
_FEW_IMAGES = 50
"""Images of a class below which its figures say little: at 50, the interval of a recall of 90% is 17 points wide."""


def create_card(run: Run) -> str:
    """The card as best/README.md, in Markdown."""
    blocks = [
        _HEADER,
        f"# {escape(run.name)}",
        *map(paragraph, _describe_model(run)),
        "## Data",
        table(["what", "value"], _data(run)),
        "## Measured",
        table(["what", "value", "95% interval"], _metrics(run)),
        *map(paragraph, _judgements(run)),
        *_classes(run),
        "## Limits",
        "\n".join(f"- {paragraph(text)}" for text in _limits(run)),
        "## Use",
        paragraph("Where runs/ holds the run, or with the run's folder in place of its name:"),
        fence(_commands(run), "sh"),
        fence(_code(run), "python"),
        "## Configuration",
        table(["key", "value"], _configuration(run)),
        "Written by fmtune from the run folder alone; `fmtune report` writes it anew, so edit a copy.",
    ]
    return "\n\n".join(blocks) + "\n"


def _describe_model(run: Run) -> list[str]:
    model, (channels, height, width) = run.config.model, run.summary["dataset"]["shape"]
    what = (
        f"A ResNet-{model.depth} of width {model.width} ({run.parameters:,} parameters, stem {model.stem}) that tells "
        f"{len(run.classes):,} classes of images apart, of {height} x {width} pixels and "
        f"{plural(channels, 'channel')}: {listing(run.classes)}."
    )
    counts = sum(run.summary["trials"].values())
    how = "Trained" if run.is_single else f"Trial {run.summary['best_trial']} of {plural(counts, 'trial')}, trained"
    planned, done = run.config.epochs, run.best.epoch if run.best else 0
    if run.summary["refit"] or done == planned:
        how += f" for {plural(planned, 'epoch')}"
    else:
        how += f" for {done} of its {plural(planned, 'epoch')}"
    how += ", then once more on training and validation rows together." if run.summary["refit"] else "."
    start = "random weights" if model.pretrained is None else f"the weights {model.pretrained}"
    return [what, f"{how} It started from {start}. Made with fmtune {run.environment['packages']['fmtune']}."]


def _data(run: Run) -> list[list[str]]:
    data = run.summary["dataset"]
    return [
        ["source", data["source"]],
        ["origin", data["origin"]],
        ["training images", f"{data['train']:,}"],
        ["validation images", f"{data['validation']:,}"],
        ["test images", NOTHING if data["test"] is None else f"{data['test']:,}"],
        ["classes", f"{data['classes']:,}"],
        ["licence of the data", _describe_licence(data["source"])],
    ]


def _describe_licence(source: str) -> str:
    if source in LICENCES:
        return LICENCES[source]
    if source in NAMES:
        return "not known to fmtune; ask the data set's publisher"
    return "not known to fmtune; whoever gave the data knows it"


def _metrics(run: Run) -> list[list[str]]:
    summary, gain = run.summary, weigh(run)
    rows = []
    if gain.interval:
        rows.append(["test accuracy", percent(gain.result), interval(gain.interval)])
        rows.append(["test loss (cross entropy)", decimal(summary["test_loss"]), NOTHING])
    rows.append(["validation accuracy of the configuration", percent(summary["val_accuracy"]), NOTHING])
    if summary["baseline"]:
        around = interval(gain.baseline_interval) if gain.baseline_interval else NOTHING
        rows.append([f"{gain.split} accuracy of the untuned baseline", percent(gain.baseline), around])
    if run.calibration:
        points = f"{100 * run.calibration.ece:.2f} percentage points"
        rows.append(["expected calibration error on the test split", points, NOTHING])
    return rows


def _judgements(run: Run) -> list[str]:
    gain = weigh(run)
    verdict = judge(gain)
    return [*([verdict] if verdict else []), *describe_caveats(run, gain)]


def _classes(run: Run) -> list[str]:
    if run.test is None:
        return []
    rows = [_class_row(row, run.test["confusion"][i][i]) for i, row in enumerate(run.test["per_class"])]
    header = ["class", "images", "recall", "95% interval", "precision", "F1"]
    weakest = describe_weakest(run.test)
    blocks = ["### Classes, on the test split", table(header, rows)]
    return [*blocks, paragraph(weakest)] if weakest else blocks


def _class_row(row: Mapping[str, Any], hits: int) -> list[str]:
    around = interval(wilson_interval(hits, row["images"])) if row["images"] else NOTHING
    ratios = percent(row["recall"]), around, percent(row["precision"]), percent(row["f1"])
    return [row["name"], f"{row['images']:,}", *ratios]


def _limits(run: Run) -> list[str]:
    source = run.summary["dataset"]["source"]
    texts = [
        f"It has seen images of one source alone ({source}). Images from elsewhere, of other devices, sizes, crops or "
        "times, were not tried: expect less of it there, and measure before you rely on it.",
        "It names one of its classes for every image, for one that shows none of them too.",
        "Not tested: noise, blur and other damage, images made to deceive it, change of the images over time, and "
        "whether it serves some people worse than others.",
    ]
    if run.test is None:
        texts.append("It was not measured on a test split.")
    else:
        texts.append("Its accuracy is for the mix of classes of the test split; with another mix it is another.")
        texts += _describe_few(run.test)
    texts.append(_describe_trust(run))
    texts += _describe_seeds(run)
    if run.config.model.pretrained is not None:
        texts.append("What its starting weights were trained on, and their licence, bear on it too.")
    texts.append("The licence of these weights is for their owner to say, within what that of the data allows.")
    return texts


def _describe_few(test: Mapping[str, Any]) -> list[str]:
    few = [row["name"] for row in test["per_class"] if row["images"] < _FEW_IMAGES]
    if not few:
        return []
    return [f"The figures say little of classes with fewer than {_FEW_IMAGES} test images: {listing(few)}."]


def _describe_trust(run: Run) -> str:
    if run.calibration is None:
        return "How far its probabilities can be believed was not measured."
    return weigh_confidence(run.calibration, run.config.optim.label_smoothing).text


def _describe_seeds(run: Run) -> list[str]:
    """How far trainings of the same configuration differ, where there were several."""
    finalists = [f for f in run.summary["finalists"] if f["trial"] == run.summary["best_trial"]]
    values = [seed["val_accuracy"] for finalist in finalists for seed in finalist["seeds"]]
    if len(values) < 2:
        return ["It is one training; another one of the same configuration comes to other figures."]
    return [
        f"It is one training; {len(values)} others of the same configuration, each with a seed of its own, came to "
        f"validation accuracies of {percent(min(values))} to {percent(max(values))}."
    ]


def _commands(run: Run) -> str:
    commands = (
        ["evaluate", run.name, "--data", "FILE"],
        ["predict", run.name, "FILE", "-o", "out.csv"],
        ["export", run.name, "-o", "model.onnx", "--format", "onnx"],
    )
    return "\n".join(shlex.join(["fmtune", *command]) for command in commands)


def _code(run: Run) -> str:
    return (
        "import fmtune\n\n"
        f"model = fmtune.load({run.name!r})\n"
        "predictions = model.predict(images)  # uint8 (N, C, H, W), or a list of PIL images\n"
        "predictions.labels, predictions.names, predictions.probabilities"
    )


def _configuration(run: Run) -> list[list[str]]:
    return [[f"trial.{key}", NOTHING if value is None else str(value)] for key, value in flatten(run.config).items()]
