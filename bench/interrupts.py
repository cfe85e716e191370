"""One way to be interrupted: Ctrl-C, SIGTERM and SIGHUP all become ``KeyboardInterrupt``, at moments that suit."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

__all__ = ["Interrupts"]


class Interrupts:
    """Context manager that takes over the interrupting signals of the main thread (in other threads it does nothing).

    SIGINT keeps Python's own handler, because ``asyncio.run`` recognises it and turns it into an orderly cancellation
    of the running task; the other signals are forwarded to it.
    """

    def __init__(self) -> None:
        self._before: dict[signal.Signals, Any] = {}
        self._deferring = False
        self.received = signal.SIGINT
        """The signal to blame; a shell expects 128 plus its number as the exit code."""
        self.pending = False
        """A signal came while signals were deferred."""

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                self._before[signum] = signal.getsignal(signum)
            self._install()
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            # None stands for a handler that was not installed from Python and cannot be put back.
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Hold signals back while processes are started or stopped: half of either would leave some behind.

        Raises:
            KeyboardInterrupt: at the end, when a signal came meanwhile.
        """
        if not self._before or self._deferring:
            yield
            return
        self._deferring, self.pending = True, False
        for signum in self._before:
            signal.signal(signum, self._remember)
        try:
            yield
        finally:
            self._deferring = False
            self._install()
            if self.pending:
                raise KeyboardInterrupt

    def _install(self) -> None:
        for signum in self._before:
            signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else self._forward)

    def _forward(self, signum: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(signum)
        signal.raise_signal(signal.SIGINT)

    def _remember(self, signum: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(signum)
        self.pending = True
