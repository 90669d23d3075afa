"""A run from start to end: search, choice, and the test split read once."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from fmtune.board import Board
from fmtune.choice import Choice, Chooser
from fmtune.config import ResourcesConfig
from fmtune.context import RunContext
from fmtune.data import TrainingData, load_training_data
from fmtune.errors import DataError, FmtuneError, InputError, RunFailed, RunFolderError, SpaceError, first_line
from fmtune.explore import Exploration, rank
from fmtune.memory import Source, place_sources
from fmtune.probe import check_channels, read_all_weights
from fmtune.report import write_report
from fmtune.result import RunResult
from fmtune.room import check_room, count_slots, refit_resources, whole_machine
from fmtune.run import RunFolder
from fmtune.session import interruptible, quiet, ray_session
from fmtune.space import Space
from fmtune.storage import Storage, check_storage
from fmtune.study import STUDY_ERRORS, check_study
from fmtune.summary import conclude
from fmtune.timing import Timing, is_finished, read_clock, write_clock
from fmtune.trackers import connect_trackers, track
from fmtune.trial import SharedData, count_threads
from fmtune.view import create_view, format_seconds, print_plain

SpaceSource = Space | str | Path | Mapping[str, Any]
_KEPT_PARTS = {"data": "data", "baseline": "baseline", "fixed": "trial", "ranges": "trial", "storage": "storage"}
"""What of a space a resumed run must leave as it was, and the section of the YAML that says it."""
_KEPT_KEYS = {"metric": "metric", "objectives": "objectives", "storage": "storage", "tries": "try"}
"""What of its `search` too, and the key of the YAML."""


class Interrupted(FmtuneError):
    """Ctrl-C; the run folder can be gone on with."""

    exit_code = 130


def search(
    space: SpaceSource,
    *,
    data: Source | None = None,
    test: Source | None = None,
    name: str | None = None,
    runs: str | Path = "runs",
    overrides: Sequence[str] = (),
    resume: bool = False,
    address: str | None = None,
    started: float | None = None,
) -> RunResult:
    """Find the best configuration of a space within its budget, and train it.

    Args:
        space: a `Space`, or what `Space.load` takes.
        data: stands in for `data.train`: a name, path, glob or URL; a DataFrame with a label column and a column a
            pixel, as the CSV format has them; or a pair of numpy arrays, images of uint8 (N, H, W), (N, H, W, C) or
            (N, C, H, W) and labels (N,), integers or strings (`table_of_memory` has the details). What is in memory
            is kept in the cache of parsed tables by its content, and goes by `memory:KEY`.
        test: stands in for `data.test`, in the same forms; with neither, files and memory have no test split.
        name: of the run folder; the space file's by default.
        runs: folder of run folders, also of those that starting weights are taken from by name.
        overrides: `KEY=VALUE` of dotted keys of the space.
        resume: go on with the run folder if it exists.
        address: of a Ray cluster; a Ray of this machine's own by default.
        started: `time.monotonic()` from which `search.time` counts; now by default.

    Raises:
        InputError: the space, the data, the storage or the run folder is not as it must be, and nothing has been
            started; or the test split can't be read at the end, and all else is written.
        RunFailed: no trial got as far as a result; or the disk is full, or the study's database gone.
        Interrupted: Ctrl-C.
    """
    resolved = resolve_search(space, data, overrides, Path(runs), test)
    return run_space(resolved, Path(runs) / (name or _name_of(space)), resume=resume, address=address, started=started)


def train(
    space: SpaceSource,
    *,
    data: Source | None = None,
    test: Source | None = None,
    name: str | None = None,
    runs: str | Path = "runs",
    overrides: Sequence[str] = (),
    resume: bool = False,
    address: str | None = None,
    started: float | None = None,
) -> RunResult:
    """Train one configuration, a space whose every value is fixed, the way that a search trains its trials.

    Arguments and errors are those of `search`.
    """
    resolved = resolve_single(space, data, overrides, Path(runs), test)
    return run_space(resolved, Path(runs) / (name or _name_of(space)), resume=resume, address=address, started=started)


def resolve_search(
    space: SpaceSource, data: Source | None, overrides: Sequence[str], runs: Path, test: Source | None = None
) -> Space:
    """A space to search, with `data`, `test` and overrides in place, and the names of runs under `runs` found.

    Raises:
        SpaceError: the space is wrong, or validates on the test split.
    """
    resolved = _resolve(space, data, overrides, runs, test)
    if resolved.data.validation == "test":
        raise SpaceError(
            "data.validation: a search that validates on the test split chooses by it, and then has none left to "
            "measure the choice; give a fraction such as 0.1 (`fmtune train` takes test)"
        )
    return resolved


def resolve_single(
    space: SpaceSource, data: Source | None, overrides: Sequence[str], runs: Path, test: Source | None = None
) -> Space:
    """A space as one training, with `data`, `test` and overrides in place, and the names of runs under `runs` found.

    Raises:
        SpaceError: the space is wrong, or has ranges.
    """
    resolved = _resolve(space, data, overrides, runs, test)
    if resolved.ranges:
        keys = ", ".join(f"trial.{key}" for key in resolved.ranges)
        raise SpaceError(f"{keys}: ranges; `fmtune train` takes fixed values, `fmtune search` searches ranges")
    return resolved.as_single_training()


def _resolve(
    space: SpaceSource, data: Source | None, overrides: Sequence[str], runs: Path, test: Source | None
) -> Space:
    if not isinstance(space, Space):
        space = Space.load(space, overrides, runs)
    elif overrides:
        raise SpaceError("overrides go with a file or a mapping, not with a Space that is resolved")
    return replace(space, data=place_sources(space.data, data, test))


def _name_of(space: SpaceSource) -> str:
    return Path(space).stem if isinstance(space, str | Path) else "search"


def run_space(
    space: Space, path: Path, *, resume: bool = False, address: str | None = None, started: float | None = None
) -> RunResult:
    """Run a resolved space into the folder `path`; arguments and errors are those of `search`."""
    started = time.monotonic() if started is None else started
    _check_folder(path, space, resume)
    if (result := _read_finished(path, space)) is not None:
        return result
    if space.storage is not None:
        _check_storage(space.storage, path)
    data = load_training_data(space.data)
    _check_same_data(path, data)
    check_channels(space, data)
    weights, notes = read_all_weights(space, data)
    if not space.ranges and not space.is_single:
        notes.append("the space has no ranges: all trials train the same values; `fmtune train` trains them once")
    trackers = connect_trackers(space.logging)
    # A Ray that somebody else uses too has no room to take whole.
    is_own = address is None and not ray.is_initialized()
    check_study(space)
    folder = RunFolder(path)
    board = _create_board(space, data, folder, started - read_clock(folder))
    finished: Space | None = None
    try:
        with (
            interruptible() as check,
            quiet() as screen,
            create_view(board, screen.console) as view,
            ExitStack() as stack,
        ):
            for line in notes:
                view.note(line)
            with ray_session(space.resources, address, view.note):
                # Nodes that come and go need a folder that they share with those that are there.
                can_grow = address is not None and space.storage is not None
                check_room(space.resources, space.storage is not None, can_grow, view.note)
                # What is refused before this leaves no folder behind, and a folder that is there as it was.
                stack.enter_context(folder.held())
                RunFolder.create(path, space.to_yaml(), data.fingerprint)
                stack.callback(lambda: write_clock(folder, board.elapsed, finished))
                screen.log_to(folder.log)
                tracking = stack.enter_context(track(trackers, folder, view.note))
                if space.is_single and space.resources.cpus is None and is_own:
                    space = replace(space, resources=whole_machine(space.resources))
                shared = SharedData.of(data, weights)
                context = RunContext(space, data, shared, folder, board, view, tracking, check, can_grow)
                for_refit = refit_resources(space.resources, is_own)
                timing = Timing(
                    space,
                    folder,
                    board,
                    rows_ratio=_rows_ratio(data),
                    slots=lambda: count_slots(space.resources),
                    refit_threads=_threads_ratio(for_refit, space.resources),
                )
                choice = _choose(context, timing, for_refit)
            board.phase = "measuring on the test split"
            try:
                summary = conclude(context, choice)
            except DataError:
                _finish(context, folder.read_summary(), None)
                raise
            _finish(context, summary, space)
            finished = space
            return RunResult(folder, summary)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {_describe_kept(path)}") from None
    except (OSError, *STUDY_ERRORS) as error:
        advice = f"{_describe_kept(path)}; mend the cause, and go on with --resume"
        raise RunFailed(first_line(error), advice) from error


def _describe_kept(path: Path) -> str:
    """What is left of a run that breaks off."""
    return f"{path} keeps what is done" if path.exists() else "nothing was begun"


def _finish(context: RunContext, summary: dict[str, Any], finished: Space | None) -> None:
    """Tell the trackers, write the report, and copy the run folder to the storage if there is one.

    Args:
        context: of the run.
        summary: what was found.
        finished: what the run has come to the end of; None where the test split could not be read.

    Raises:
        RunFailed: the storage can't be written to any more.
    """
    context.tracking.end_run(summary)
    write_report(context.folder)
    if context.kept is not None:
        # The copy is to say that the run has finished.
        write_clock(context.folder, context.board.elapsed, finished)
        try:
            context.kept.keep(context.folder.path)
        except OSError as error:
            raise RunFailed(
                f"storage: {context.kept.place}: {first_line(error)}",
                f"the run is whole in {context.folder.path}; mend the access, and copy it there",
            ) from None


def _check_storage(storage: str, path: Path) -> None:
    """Refuse a storage that can't be written to, or where another run of this name has left its trials.

    A new run must not take the checkpoints of another for its own.
    """
    check_storage(storage)
    if not _has_begun(path) and not Storage(storage).below(path.name).is_empty():
        raise InputError(f"storage: {storage}: holds a run {path.name} already; choose another --name")


def _has_begun(path: Path) -> bool:
    """Whether a folder has a file that was written to its end: a run that is cut off before leaves none."""
    return any(found.is_file() and found.suffix != ".part" for found in path.rglob("*"))


def _check_folder(path: Path, space: Space, resume: bool) -> None:
    """Refuse a folder that another run has taken, and going on with a run that asks for something else."""
    if not _has_begun(path):
        return
    folder = RunFolder(path)
    if not folder.space.exists():
        raise RunFolderError(f"{path}: holds something other than a run; choose another --name")
    if not resume:
        raise RunFolderError(f"{path}: the run folder exists; go on with --resume, or choose another --name")
    earlier = Space.load(folder.space)
    for name, key in _KEPT_KEYS.items():
        if (kept := getattr(earlier.search, name)) != getattr(space.search, name):
            raise RunFolderError(f"{path}: --resume with another search.{key}; its space.yaml has {_in_words(kept)}")
    samplers = earlier.search.sampler, space.search.sampler
    if "grid" in samplers and samplers[0] != samplers[1]:
        # Points of a grid go by the number of the trial, and some have had others.
        raise RunFolderError(f"{path}: --resume with another search.sampler, to or from a grid; it had {samplers[0]}")
    for part, name in _KEPT_PARTS.items():
        if getattr(earlier, part) != getattr(space, part):
            raise RunFolderError(
                f"{path}: --resume with another `{name}` than in its space.yaml; only resources, logging, and search "
                f"but for {', '.join(_KEPT_KEYS.values())} may change"
            )


def _check_same_data(path: Path, data: TrainingData) -> None:
    """Refuse to go on with other rows than those that a run has begun with: a stand-in, or a file that has changed."""
    before = RunFolder(path).fingerprint
    if before is not None and before != data.fingerprint:
        raise RunFolderError(
            f"{path}: --resume with other data than it has trained on: {data.loaded.source} ({data.loaded.origin}), "
            f"{len(data.images):,} rows; give what it had, or choose another --name"
        )


def _read_finished(path: Path, space: Space) -> RunResult | None:
    """The result of a run that has done all that it is asked for, to be gone on with; None of any other."""
    folder = RunFolder(path)
    if not is_finished(folder, space):
        return None
    summary = folder.read_summary()
    if summary["broken_off"]:
        return None
    more = "search.trials and search.time" if space.time_limit else "search.trials"
    print_plain(Console(), f"{path} has finished; for more of it raise {more}")
    return RunResult(folder, summary)


def _in_words(value: str | Sequence[object] | None) -> str:
    """A value of `search` as its YAML has it."""
    if value is None:
        return "null"
    return value if isinstance(value, str) else f"[{', '.join(map(str, value))}]"


def _choose(context: RunContext, timing: Timing, for_refit: ResourcesConfig) -> Choice:
    Exploration(context, timing).run()
    records = list(context.board.records.values())
    if not rank(records, context.board.metric, context.board.larger):
        causes = dict.fromkeys(record.cause for record in records if record.cause)
        if not causes and context.space.time_limit is not None:
            raise RunFailed(
                f"the time, {format_seconds(context.space.time_limit)}, was up before the first epoch of a trial; "
                "go on with --resume and a larger search.time"
            )
        raise RunFailed(
            f"none of {len(records)} trials came to a result",
            *(f"cause: {cause}" for cause in causes),
            f"what Ray said is in {context.folder.log}, and what the trials' processes said in Ray's session folder; "
            "mend the cause, and go on with --resume or another --name",
        )
    return Chooser(context, timing, for_refit).choose()


def _create_board(space: Space, data: TrainingData, folder: RunFolder, started: float) -> Board:
    limit = space.time_limit
    return Board(
        title=f"{folder.path.name}: {data.loaded.source} ({data.loaded.origin}), {len(data.train_rows):,} training and "
        f"{len(data.validation_rows):,} validation images",
        trials=space.trials,
        metric=space.search.metric,
        larger=space.search.mode == "max",
        started=started,
        deadline=None if limit is None else started + limit,
        has_baseline=not space.is_single,
    )


def _rows_ratio(data: TrainingData) -> float:
    return (len(data.train_rows) + len(data.validation_rows)) / len(data.train_rows)


def _threads_ratio(for_refit: ResourcesConfig, for_trial: ResourcesConfig) -> float:
    """Threads of the refit to each of a trial's; a GPU is not made faster by them."""
    return 1.0 if for_trial.gpus else count_threads(for_refit) / count_threads(for_trial)
