"""What the steps of a run share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fmtune.batches import count_trained
from fmtune.board import Board
from fmtune.checkpoint import load_metrics
from fmtune.config import TrialConfig
from fmtune.data import TrainingData
from fmtune.run import RunFolder, TrialRecord
from fmtune.space import Space
from fmtune.trackers import Tracking
from fmtune.training import EpochMetrics
from fmtune.trial import SharedData, Task, create_task, task_name
from fmtune.view import View


@dataclass(frozen=True)
class RunContext:
    """A run under way: what is asked, on what data, where it is kept and what is shown of it.

    `check_interrupt` raises KeyboardInterrupt if Ctrl-C was pressed and got lost; `can_grow` says that nodes may
    come to the cluster, or leave it, as trials run.
    """

    space: Space
    data: TrainingData
    shared: SharedData
    folder: RunFolder
    board: Board
    view: View
    tracking: Tracking
    check_interrupt: Callable[[], None]
    can_grow: bool

    @property
    def storage(self) -> Path:
        """Tune's own folder."""
        if self.space.storage is None:
            return self.folder.ray.resolve()
        return Path(self.space.storage).resolve() / self.folder.path.name

    def task_of(self, record: TrialRecord) -> Task:
        """The task of a trial of the search, from its last checkpoint on if it has one."""
        return create_task(self.space.search.seed, record.number, record.config, record.checkpoint)

    def images_trained(self, config: TrialConfig, epochs: int, rows: int | None = None) -> int:
        """Images that so many epochs train on; of the training part unless another number of rows is given."""
        rows = len(self.data.train_rows) if rows is None else rows
        return epochs * count_trained(rows, config.batch_size, config.drop_last)

    def experiment_name(self, phase: str) -> str:
        """A folder of Tune's that no earlier attempt at this phase has used."""
        attempts = len(list(self.storage.glob(f"{phase}*")))
        return phase if attempts == 0 else f"{phase}-{attempts + 1}"


def find_checkpoint(storage: Path, number: int) -> tuple[str, EpochMetrics] | None:
    """The newest whole checkpoint of a trial and its epoch's metrics, over all attempts of the search."""
    found = storage.glob(f"search*/{task_name(number)}/**/checkpoint_*")
    for folder in sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        if (metrics := load_metrics(folder)) is not None:
            return str(folder), metrics
    return None
