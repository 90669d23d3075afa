"""A run's own Optuna study: worked on in memory, kept in an SQLite file."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
import sqlalchemy.exc
from optuna.distributions import BaseDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState


class StudyFile(optuna.storages.InMemoryStorage):
    """Optuna's storage in memory of the one study of a run, kept in a file that Optuna's other tools read.

    Optuna's storage in a database is made for several writers: it reads what others have written whenever a trial is
    drawn, and writes each value in a transaction of its own. That took half of the driver's time for a trial, and the
    disk's for each transaction. A run is the only one to write its study.

    A new trial reaches the file whole, by `write_new` once its values are drawn; all that is set of it later goes there
    first, so that what can't be written is not taken for told. A driver may be killed at any moment and the file is as
    it was after some call here; what the machine's own power cut may cost it is the last moments before.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = _open(path)
        self._study_there = -1
        self._there: dict[int, int] = {}
        self._new: list[int] = []
        for study in self._file.get_all_studies():
            study_id = super().create_new_study(study.directions, study.study_name)
            self._study_there = study._study_id
            for trial in self._file.get_all_trials(self._study_there, deepcopy=False):
                self._there[super().create_new_trial(study_id, trial)] = trial._trial_id

    def write_new(self) -> None:
        """Write the trials that have been created since the last call."""
        while self._new:
            trial_id = self._new[0]
            self._there[trial_id] = self._file.create_new_trial(self._study_there, self.get_trial(trial_id))
            del self._new[0]

    def close(self) -> None:
        """Leave one file behind, without the log beside it that writing at speed takes, unless somebody reads it."""
        try:
            # A dashboard that is open keeps the log.
            with suppress(sqlalchemy.exc.OperationalError), self._file.engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA journal_mode = DELETE")
        finally:
            self._file.remove_session()
            self._file.engine.dispose()

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        study_id = super().create_new_study(directions, study_name)
        self._study_there = self._file.create_new_study(directions, study_name)
        return study_id

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        trial_id = super().create_new_trial(study_id, template_trial)
        self._new.append(trial_id)
        return trial_id

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        if (there := self._there.get(trial_id)) is not None:
            self._file.set_trial_param(there, param_name, param_value_internal, distribution)
        super().set_trial_param(trial_id, param_name, param_value_internal, distribution)

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        if (there := self._there.get(trial_id)) is not None:
            self._file.set_trial_intermediate_value(there, step, intermediate_value)
        super().set_trial_intermediate_value(trial_id, step, intermediate_value)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        if (there := self._there.get(trial_id)) is not None:
            self._file.set_trial_user_attr(there, key, value)
        super().set_trial_user_attr(trial_id, key, value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        if (there := self._there.get(trial_id)) is not None:
            self._file.set_trial_system_attr(there, key, value)
        super().set_trial_system_attr(trial_id, key, value)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        self.write_new()
        self._file.set_trial_state_values(self._there[trial_id], state, values)
        return super().set_trial_state_values(trial_id, state, values)


def _open(path: Path) -> optuna.storages.RDBStorage:
    """The file, written by way of a log: a transaction need not wait for the disk, and readers don't stop it."""
    storage = optuna.storages.RDBStorage(f"sqlite:///{path.resolve()}")
    storage.engine.dispose()

    @sqlalchemy.event.listens_for(storage.engine, "connect")
    def _set_up(connection: Any, record: object) -> None:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")

    return storage
