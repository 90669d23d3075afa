"""What trials die of: an error of their training ends them, the end of a process or a node does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray import cloudpickle
from ray.exceptions import RayActorError, RayTaskError
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

DEATHS = 3
"""Deaths of its process or its node after which a trial is given up; a drained spot node does not count."""


def find_cause(trial: Trial) -> str:
    """First cause of a trial's death: the last line of its traceback."""
    error_file = trial.error_file
    if not error_file or not Path(error_file).exists():
        return "the trial's process ended without a message"
    lines = Path(error_file).read_text(encoding="utf-8").splitlines()
    return next((line for line in reversed(lines) if line.strip() and not line.startswith(" ")), "no message")


def is_error_of_training(trial: Trial) -> bool:
    """Whether the last thing that went wrong is an error that the training raised."""
    # Before its first failure it may not even have a folder.
    error_file = trial.pickled_error_file if trial.num_failures else None
    if not error_file or not Path(error_file).exists():
        return False
    error = cloudpickle.loads(Path(error_file).read_bytes())
    return isinstance(error, RayTaskError) and not isinstance(error.cause, RayActorError)


class EndsErrors(TrialScheduler):
    """Ends a trial whose training raised an error, and runs the others in the order of their names.

    Tune does not tell it from one whose node died, and puts both back into the queue.
    """

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        super().on_trial_add(tune_controller, trial)
        if is_error_of_training(trial):
            tune_controller.stop_trial(trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """The first of those that wait. Tune's own way looks at all trials that there have been."""
        waiting = [t for t in tune_controller.get_live_trials() if t.status in (Trial.PENDING, Trial.PAUSED)]
        return min(waiting, key=lambda trial: str(trial.config["name"]), default=None)


class InOrder(EndsErrors, FIFOScheduler):
    """Runs every trial to its end, in the order in which they were proposed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
