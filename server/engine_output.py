"""What the engine's processes print: kept back while they start, passed on afterwards.

A start-up that fails should end in one line, and one that works in one block; the engine's own output, hundreds of
lines and a traceback, is neither. Processes started inside ``captured`` write to a pipe instead of our terminal.
"""

import os
import re
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

_KEPT_LINES = 400
_EXCEPTION_LINE = re.compile(r"(?:^|\s)(?:[\w.]*\.)?(\w*(?:Error|Exception))\b: (.+)$")


class EngineOutput:
    """The pipe's reading end.

    Args:
        show: pass lines on at once, from the start.
    """

    def __init__(self, show: bool):
        self._read, self._write = os.pipe()
        self._show = show
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._lock = threading.Lock()
        threading.Thread(target=self._pump, name="engine-output", daemon=True).start()

    @contextmanager
    def captured(self) -> Iterator[None]:
        """Processes started inside write to the pipe; so does this process's own standard output meanwhile."""
        saved = [os.dup(1), os.dup(2)]
        sys.stdout.flush()
        sys.stderr.flush()
        self._terminal = saved[1]
        os.dup2(self._write, 1)
        os.dup2(self._write, 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, duplicate in zip((1, 2), saved, strict=True):
                os.dup2(duplicate, number)
            os.close(self._write)
            self._terminal = 2
            os.close(saved[0])
            os.close(saved[1])

    def pass_on(self) -> None:
        """From now on show what comes; what was kept back is dropped."""
        with self._lock:
            self._lines.clear()
            self._show = True

    def cause(self) -> str | None:
        """The first exception that the kept lines report below the engine, which is where the failure began."""
        with self._lock:
            lines = list(self._lines)
        for line in lines:
            if found := _EXCEPTION_LINE.search(line.rstrip()):
                return found.group(2)
        return None

    def text(self) -> str:
        """What was kept back."""
        with self._lock:
            return "".join(self._lines)

    def _pump(self) -> None:
        with os.fdopen(self._read, "r", encoding="utf-8", errors="replace") as pipe:
            for line in pipe:
                with self._lock:
                    if self._show:
                        os.write(self._terminal, line.encode())
                    else:
                        self._lines.append(line)

    _terminal = 2
