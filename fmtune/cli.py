"""The command line: parse, call, print."""

from __future__ import annotations

import time

_STARTED = time.monotonic()
# The clock of `search.time` runs from here: importing torch and Ray takes seconds.

import json  # noqa: E402
import shlex  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import click  # noqa: E402
from rich.console import Console  # noqa: E402

from fmtune.errors import FmtuneError, InputError, RunFailed, first_line  # noqa: E402

_SPACE = click.argument("space", metavar="SPACE.yaml", type=click.Path(path_type=Path))
_RUN = click.argument("run", metavar="RUN")
_RUNS = click.option(
    "--runs", metavar="DIR", type=click.Path(path_type=Path), default="runs", show_default=True, help="Run folders."
)


def _run_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that `search` and `train` share."""
    for option in (
        click.option("--address", metavar="ADDR", help="Ray cluster, such as auto; a local Ray otherwise."),
        click.option("--dry-run", is_flag=True, help="Say what would be done, and stop."),
        click.option("--resume", is_flag=True, help="Go on with the run folder if it exists."),
        click.option(
            "--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Override a key, dotted; repeatable."
        ),
        _RUNS,
        click.option("--name", metavar="NAME", help="Of the run folder; the space file's by default."),
        click.option("--data", metavar="D", help="Stands in for data.train."),
        _SPACE,
    ):
        command = option(command)
    return command


@click.group()
@click.version_option(package_name="fmtune", message="%(version)s")
def app() -> None:
    """Find the best ResNet that a budget can buy, for a table of labelled images."""


@app.command()
@_run_options
def search(**options: Any) -> None:
    """Search the space for the best configuration, and train it."""
    _run("search", **options)


@app.command()
@_run_options
def train(**options: Any) -> None:
    """Train the one configuration of a space whose values are all fixed."""
    _run("train", **options)


@app.command()
@_RUN
@click.option("--data", metavar="D", required=True, help="Labelled images; a name stands for its test split.")
@click.option("--tta", is_flag=True, help="Predict from each image and its mirror image together.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_RUNS
def evaluate(run: str, data: str, tta: bool, as_json: bool, runs: Path) -> None:
    """Measure a run's best model on labelled images."""
    from fmtune.predict import evaluate as evaluate_run
    from fmtune.tables import print_evaluation

    measured = evaluate_run(run, data, tta=tta, runs=runs).as_dict()
    if as_json:
        click.echo(json.dumps(measured))
    else:
        print_evaluation(Console(), measured)


@app.command()
@_RUN
@click.argument("source", metavar="INPUT")
@click.option(
    "-o", "output", metavar="OUT", required=True, type=click.Path(path_type=Path), help="OUT.csv or OUT.parquet."
)
@click.option("--address", metavar="ADDR", help="Ray cluster, such as auto; this machine otherwise.")
@_RUNS
def predict(run: str, source: str, output: Path, runs: Path, address: str | None) -> None:
    """Write the class of each image, and the probability of every class.

    INPUT is a table as for training, with labels or without, or a folder or a glob of PNG and JPEG files.
    """
    from fmtune.predict import predict as predict_run

    rows = predict_run(run, source, output, runs=runs, address=address)
    click.echo(f"{rows:,} rows written to {output}")


@app.command()
@_RUN
@click.option("--open", "show", is_flag=True, help="Show it in a browser.")
@_RUNS
def report(run: str, show: bool, runs: Path) -> None:
    """Write a run's report, as a page and as Markdown with plots, and its model card."""
    from fmtune.report import write_report
    from fmtune.run import find_run

    paths = write_report(find_run(run, runs))
    for path in paths:
        click.echo(str(path))
    if show:
        click.launch(str(paths[0]))


@app.command()
@_RUN
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes a free one.")
@_RUNS
def dashboard(run: str, port: int, runs: Path) -> None:
    """Show a run's study in the browser, while it is searched too."""
    from fmtune.dashboard import serve_dashboard
    from fmtune.run import find_run

    serve_dashboard(find_run(run, runs), port, click.echo)


@app.command()
@_RUN
@click.option("-o", "output", metavar="FILE", required=True, type=click.Path(path_type=Path), help="Where to write it.")
@click.option("--format", "kind", type=click.Choice(["onnx", "torch", "safetensors"]), required=True)
@_RUNS
def export(run: str, output: Path, kind: Any, runs: Path) -> None:
    """Write a run's best model for use elsewhere."""
    from fmtune.export import export as export_run

    for path in export_run(run, output, kind, runs=runs):
        click.echo(str(path))


@app.command()
@click.argument("source", metavar="SOURCE")
@click.option("--grid", metavar="FILE.png", type=click.Path(path_type=Path), help="Draw a sheet of labelled samples.")
@click.option("--label", default="label", show_default=True, help="Column of the label: its name or position.")
@click.option("--shape", metavar="H,W,C", help="Shape of a row of pixels.")
def data(source: str, grid: Path | None, label: str, shape: str | None) -> None:
    """Say what a source holds, and what is wrong with it."""
    from fmtune.config import DataConfig
    from fmtune.describe import check_sheet, describe_source, draw_grid
    from fmtune.memory import without_credentials
    from fmtune.tables import print_description

    if grid is not None:
        check_sheet(grid)
    column = int(label) if label.lstrip("-").isdigit() else label
    train = without_credentials(source, "SOURCE")
    description = describe_source(DataConfig(train=train, label=column, shape=_parse_shape(shape)))
    print_description(Console(), description)
    if grid is not None:
        draw_grid(description.loaded.table, description.classes, grid)
        click.echo(f"samples drawn to {grid}")


@app.command("list")
@_RUNS
def list_(runs: Path) -> None:
    """List the runs, with what they found."""
    from fmtune.run import list_runs
    from fmtune.tables import print_runs

    print_runs(Console(), list_runs(runs), runs)


@app.command()
def schema() -> None:
    """Print the JSON Schema of the YAML."""
    from fmtune.schema import create_schema

    click.echo(json.dumps(create_schema(), indent=2))


def _parse_shape(text: str | None) -> tuple[int, int, int] | None:
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise InputError(f"--shape {text}: expected HEIGHT,WIDTH,CHANNELS, such as 32,32,3")
    height, width, channels = map(int, parts)
    return height, width, channels


def _run(
    verb: str,
    space: Path,
    data: str | None,
    name: str | None,
    runs: Path,
    overrides: tuple[str, ...],
    resume: bool,
    dry_run: bool,
    address: str | None,
) -> None:
    from fmtune.search import Interrupted, resolve_search, resolve_single, run_space
    from fmtune.summary import print_summary

    resolve = resolve_search if verb == "search" else resolve_single
    resolved = resolve(space, data, overrides, runs)
    name = name or space.stem
    if dry_run:
        from fmtune.plan import print_plan

        print_plan(Console(), resolved, runs / name)
        return
    try:
        result = run_space(resolved, runs / name, resume=resume, address=address, started=_STARTED)
    except Interrupted as interrupted:
        again = sys.argv[1:] if resume else [*sys.argv[1:], "--resume"]
        raise Interrupted(f"{interrupted}; go on with: {shlex.join(['fmtune', *again])}") from None
    print_summary(Console(), result.folder, result.summary)
    if result.summary["broken_off"]:
        raise RunFailed("the search broke off; mend the cause of the failures, and go on with --resume")


def main() -> None:
    """Entry point: exit code 0 done, 1 failed, 2 the user's mistake, 130 interrupted."""
    try:
        app(standalone_mode=False)
    except FmtuneError as error:
        for line in error.lines:
            click.echo(f"error: {line}", err=True)
        raise SystemExit(error.exit_code) from None
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        raise SystemExit(InputError.exit_code) from None
    except click.ClickException as error:
        click.echo(f"error: {error.format_message()}", err=True)
        raise SystemExit(InputError.exit_code) from None
    except OSError as error:
        # A disk that is full, or a folder that this user may not write to.
        click.echo(f"error: {first_line(error)}", err=True)
        raise SystemExit(RunFailed.exit_code) from None
    except (click.Abort, KeyboardInterrupt):
        click.echo("error: interrupted", err=True)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
