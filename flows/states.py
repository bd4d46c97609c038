"""How stages and runs end, under names that say more than Prefect's types."""

import logging
from enum import StrEnum
from typing import Any

from prefect.client.schemas.objects import State
from prefect.exceptions import FailedRun
from prefect.states import Cancelled, Completed, Failed


class Outcome(StrEnum):
    """The name of the state in which a stage or a run ends."""

    COMPLETED = "Completed"
    UP_TO_DATE = "UpToDate"
    """A stage that had nothing to do."""
    RESTORED = "Restored"
    """A stage whose outputs came from DVC's run-cache."""
    FAILED = "Failed"
    SKIPPED = "Skipped"
    """A stage that did not run because one that it needs failed."""
    CANCELLED = "Cancelled"

    PUBLISHED = "Published"
    UNCHANGED = "Unchanged"
    """A run after which everything is as it was."""
    HELD = "Held"
    """A run whose result the gate refused."""

    REMEMBERED = "Remembered"
    """A first look at a source."""
    CHANGED = "Changed"
    """A look that started a retraining."""
    WAITING = "Waiting"
    """A look that found the retraining of an earlier one still running."""

    @property
    def bad(self) -> bool:
        """Whether what needs this stage cannot run."""
        return self in (Outcome.FAILED, Outcome.SKIPPED, Outcome.CANCELLED)

    def state(self, message: str) -> State[Any]:
        """The Prefect state of this name; a skipped stage is of the type of failures."""
        if self is Outcome.CANCELLED:
            return Cancelled(message=message)
        return Failed(name=self, message=message) if self.bad else Completed(name=self, message=message)


def _says_more_than_its_state(record: logging.LogRecord) -> bool:
    """False for the traceback through Prefect itself, which it logs for every run that returns a failed state."""
    return not record.exc_info or record.exc_info[0] is not FailedRun


logging.getLogger("prefect.flow_runs").addFilter(_says_more_than_its_state)
