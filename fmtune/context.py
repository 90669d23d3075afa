"""What the steps of a run share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from fmtune.batches import count_trained
from fmtune.board import Board
from fmtune.config import TrialConfig
from fmtune.data import TrainingData
from fmtune.objectives import Objectives
from fmtune.run import RunFolder, TrialRecord
from fmtune.space import Space
from fmtune.storage import Storage
from fmtune.trackers import Tracking
from fmtune.trial import SharedData, Task, create_task
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

    @cached_property
    def objectives(self) -> Objectives | None:
        """What the search has for objectives where it has several."""
        search = self.space.search
        return Objectives(search, self.data.image_shape[0], len(self.data.classes)) if search.objectives else None

    @cached_property
    def storage(self) -> Storage:
        """Tune's own folder."""
        kept = self.kept
        return Storage(str(self.folder.ray)) if kept is None else kept.below(self.folder.ray.name)

    @cached_property
    def kept(self) -> Storage | None:
        """Where the run folder lands when all is done, None where it stays what it is."""
        if self.space.storage is None:
            return None
        kept = Storage(self.space.storage).below(self.folder.path.name)
        # A folder that holds all runs may be the storage too.
        return None if kept.place == str(self.folder.path.resolve()) else kept

    def task_of(self, record: TrialRecord) -> Task:
        """The task of a trial of the search, from its last checkpoint on if it has one."""
        task = create_task(self.space.search.seed, record.number, record.config, record.checkpoint)
        return replace(task, earlier=[(last, config.model_dump()) for last, config in record.earlier])

    def images_trained(self, config: TrialConfig, epochs: int, rows: int | None = None) -> int:
        """Images that so many epochs train on; of the training part unless another number of rows is given."""
        rows = len(self.data.train_rows) if rows is None else rows
        return epochs * count_trained(rows, config.batch_size, config.drop_last)

    def experiment_name(self, phase: str) -> str:
        """A folder of Tune's that no earlier attempt at this phase has used."""
        attempts = self.storage.count(phase)
        return phase if attempts == 0 else f"{phase}-{attempts + 1}"
