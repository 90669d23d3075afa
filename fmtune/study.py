"""The Optuna study of a run: one of its own in study.db, or one in a database that several runs share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import optuna
import sqlalchemy.exc
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from fmtune.errors import InputError, first_line
from fmtune.run import RunFolder
from fmtune.seeds import derive_seed
from fmtune.space import Space
from fmtune.studyfile import StudyFile

STUDY = "fmtune"
"""Name of the study; a database holds one."""
CAUSE = "cause"
"""User attribute of a trial: what it died of."""
ADOPTED = "adopted"
"""User attribute of a trial: what it took over from another one last."""
_RUN, _NUMBER = "run", "number"
"""User attributes of a trial in a study that is shared: the run that it is of, and its number there."""
_SPACE = "space"
"""User attribute of a study that is shared: what its trials are drawn from."""


class RunTrials:
    """A run's own trials in its study: the run numbers them from 0 on, whatever others add between them.

    Args:
        run: identifies the run in a study that is shared; None has the study to itself.
    """

    def __init__(self, run: str | None) -> None:
        self._run = run
        self._numbers: dict[int, int] = {}
        self._theirs: dict[int, int] = {}

    def seed_of(self, seed: int) -> int:
        """What the run draws by, given its `search.seed`: runs that share a study draw apart."""
        return seed if self._run is None else derive_seed(seed, int(self._run, 16))

    def restore(self, study: optuna.Study) -> list[FrozenTrial]:
        """The run's trials in the order of their numbers, after an interruption."""
        own = [trial for trial in study.get_trials(deepcopy=False) if self._run in (None, trial.user_attrs.get(_RUN))]
        for trial in own:
            self._enter(trial.number, trial.number if self._run is None else trial.user_attrs[_NUMBER])
        return sorted(own, key=self.number_of)

    def ask(self, study: optuna.Study) -> optuna.Trial:
        """A new trial of the study, entered as the run's."""
        asked = study.ask()
        number = self.number_of(asked)
        self._enter(asked.number, number)
        if self._run is not None:
            asked.set_user_attr(_NUMBER, number)
            # Last: by this one the run finds the trial again.
            asked.set_user_attr(_RUN, self._run)
        return asked

    def number_of(self, trial: FrozenTrial | optuna.Trial) -> int:
        """The run's number of one of its trials, also of one that is only just being made."""
        return self._numbers.get(trial.number, len(self._numbers)) if self._run is not None else trial.number

    def __len__(self) -> int:
        return len(self._numbers)

    def study_number(self, number: int) -> int:
        """The number in the study of the run's trial `number`."""
        return self._theirs[number]

    def has(self, trial: FrozenTrial) -> bool:
        """Whether a trial of the study is the run's."""
        return trial.number in self._numbers

    def _enter(self, there: int, here: int) -> None:
        self._numbers[there], self._theirs[here] = here, there


@contextmanager
def open_storage(space: Space, folder: RunFolder) -> Iterator[optuna.storages.BaseStorage]:
    """What holds the run's study while it is worked on."""
    if space.search.storage is None:
        with closing(StudyFile(folder.study)) as file:
            yield file
        return
    with _connected(space.search.storage) as database:
        yield database


@contextmanager
def _connected(url: str) -> Iterator[optuna.storages.RDBStorage]:
    """A database, left again at the end: connections are few."""
    database = open_database(url)
    try:
        yield database
    finally:
        database.remove_session()
        database.engine.dispose()


def open_database(url: str, *, is_read_only: bool = False) -> optuna.storages.RDBStorage:
    """The database that several runs share, by `search.storage`.

    Args:
        url: of the database.
        is_read_only: whether all that would change it fails.

    Raises:
        ImportError: its driver is not installed.
    """
    # Which driver a URL without one means depends on SQLAlchemy's version.
    url = url.replace("postgresql://", "postgresql+psycopg://")
    options = {"options": "-c default_transaction_read_only=on"} if is_read_only else {}
    return optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True, "connect_args": options})


STUDY_ERRORS = (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError)
"""What becomes of a study whose database has gone, or whose file can't be written."""


@contextmanager
def reaching(url: str) -> Iterator[None]:
    """What goes wrong with a database within, as an error of the user's.

    Raises:
        InputError: it can't be reached, or its driver is not installed.
    """
    place = f"search.storage: {url}"
    try:
        yield
    except ImportError:
        raise InputError(f"{place}: needs the package psycopg; pip install 'fmtune[postgresql]'") from None
    except sqlalchemy.exc.SQLAlchemyError as error:
        # What SQLAlchemy says begins with the name of the driver's exception.
        reason = first_line(getattr(error, "orig", None) or error)
        raise InputError(f"{place}: can't be reached ({reason}); mend the place, or the access") from None


def check_study(space: Space) -> None:
    """Refuse a database that can't be reached, or that holds the study of another space; a new one is told the space.

    Raises:
        InputError: it is one of these.
    """
    if space.search.storage is None:
        return
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with reaching(space.search.storage), _connected(space.search.storage) as database:
        _claim(database, space)


def _claim(database: optuna.storages.RDBStorage, space: Space) -> None:
    """Tell the study in a database its space, and make it if there is none yet."""
    directions = [StudyDirection.MAXIMIZE if m == "max" else StudyDirection.MINIMIZE for m in space.search.modes]
    study = optuna.create_study(storage=database, study_name=STUDY, load_if_exists=True, directions=directions)
    own = _fingerprint(space)
    if study.user_attrs.setdefault(_SPACE, own) != own:
        raise InputError(f"search.storage: {space.search.storage}: holds the study of another space; name another one")
    study.set_user_attr(_SPACE, own)


def _fingerprint(space: Space) -> str:
    """Of all that decides what a trial of the space is worth but the place of its data."""
    ranges = {key: searched.as_yaml() for key, searched in space.ranges.items()}
    data = space.data.model_dump(mode="json", exclude={"train", "test", "fallback", "memory"})
    content = [dict(space.fixed), ranges, data, space.search.metric, space.search.objectives]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def tell(study: optuna.Study, number: int, values: Sequence[float], *, is_done: bool) -> None:
    """End a trial of the study that came to `values`, one for each objective, in its last epoch if `is_done`."""
    if is_done:
        study.tell(number, values)
    else:
        study.tell(number, state=TrialState.PRUNED)


def id_of(study: optuna.Study, number: int) -> int:
    """What a trial of the study goes by in its storage."""
    return study._storage.get_trial_id_from_study_id_trial_number(study._study_id, number)


def keep_attribute(study: optuna.Study, number: int, name: str, value: Any) -> None:
    """Keep something with a trial of the study, as JSON."""
    study._storage.set_trial_user_attr(id_of(study, number), name, value)


def keep_value(trial: optuna.Trial, epoch: int, value: float) -> None:
    """Keep what a trial of a study has come to after an epoch, in place of what it had come to there before."""
    trial.study._storage.set_trial_intermediate_value(trial._trial_id, epoch, value)


def fail(study: optuna.Study, number: int, cause: str) -> None:
    """End a trial of the study that died, and keep what it died of with it."""
    keep_attribute(study, number, CAUSE, cause)
    study.tell(number, state=TrialState.FAIL)
