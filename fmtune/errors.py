"""The exceptions that fmtune raises on purpose.

FmtuneError
├── InputError            the user's mistake                        exit code 2
│   ├── SpaceError        a search-space file or a --set override
│   ├── DataError         a table of images
│   └── RunFolderError    a run folder that is missing, taken or incomplete
└── RunFailed             the run started and could not finish      exit code 1
    └── NonFiniteLoss     a loss that is NaN or infinite
"""

from __future__ import annotations

from collections.abc import Sequence


def first_line(error: object) -> str:
    """What an error of a library says first; its kind where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class FmtuneError(Exception):
    """Base of every error that fmtune raises on purpose; `lines` are what the user reads."""

    exit_code = 1

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines: Sequence[str] = lines


class InputError(FmtuneError):
    """Something that the user gave is wrong; each line reads `PLACE: what, and what would be right`."""

    exit_code = 2


class SpaceError(InputError):
    """A search-space file or an override of one of its keys is wrong."""


class DataError(InputError):
    """A source of images is missing, malformed, or unfit for training."""


class RunFolderError(InputError):
    """A run folder is missing, already taken, or lacks what was asked of it."""


class RunFailed(FmtuneError):
    """A run started and could not finish; the lines say why and what to do next."""


class NonFiniteLoss(RunFailed):
    """The training loss of a step, or the validation loss of an epoch, became NaN or infinite."""

    def __init__(self, part: str, epoch: int, step: int | None, loss: float) -> None:
        place = "" if step is None else f" at step {step}"
        super().__init__(f"{part} loss became {loss} in epoch {epoch}{place}")
        self.part, self.epoch, self.step, self.loss = part, epoch, step, loss

    def __reduce__(self) -> tuple[type[NonFiniteLoss], tuple[str, int, int | None, float]]:
        # Exceptions cross process borders pickled; the default would replay the message alone.
        return type(self), (self.part, self.epoch, self.step, self.loss)
