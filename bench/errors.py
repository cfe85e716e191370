"""What can go wrong in a benchmark.

BenchError (ValueError)     the command, the prompt file or a report is wrong: one line for the user, exit code 2
EngineError (Exception)     one method's engine failed: it is reported, and the other methods go on
"""

from typing import Literal

__all__ = ["BenchError", "EngineError", "Stage"]

Stage = Literal["start", "warm-up", "measure", "request"]


class BenchError(ValueError):
    """Bad input; the message is one clear line that is shown to the user as it is."""


class EngineError(Exception):
    """A method cannot be measured (any further).

    Attributes:
        stage: what the engine was doing.
        log_tail: the last lines that the engine wrote, oldest first.
    """

    def __init__(self, stage: Stage, message: str, log_tail: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.stage: Stage = stage
        self.log_tail = log_tail
