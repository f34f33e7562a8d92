"""What a terminal is told while a loss is probed: one line on stderr, gone in the end; and a record of the log."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

#: Seconds between two changes of the line, and before the first.
_EVERY = 0.2


class Progress:
    """The line; nothing where stderr is no terminal, or it is not wanted."""

    def __init__(self, name: str, calls: Callable[[], int], wanted: bool | None) -> None:
        self._name = name
        self._calls = calls
        self._stage = ""
        self._last = time.monotonic()
        self._written = 0
        self._on = _is_terminal() if wanted is None else wanted

    def stage(self, stage: str) -> None:
        """Say what is being looked at."""
        self._stage = stage
        self.tick()

    def tick(self) -> None:
        """Say now and then how often the loss was called."""
        now = time.monotonic()
        if self._on and now - self._last >= _EVERY:
            self._last = now
            line = f"{self._name}: {self._stage}, {self._calls()} calls"[:100]
            with suppress(Exception):
                print(f"\r{line:<{self._written}}", end="", file=sys.stderr, flush=True)
                self._written = max(self._written, len(line))

    def clear(self) -> None:
        """Take the line away."""
        if self._written:
            with suppress(Exception):
                print(f"\r{'':<{self._written}}\r", end="", file=sys.stderr, flush=True)
            self._written = 0


@contextmanager
def progress_line(name: str, calls: Callable[[], int], wanted: bool | None) -> Iterator[Progress]:
    """A context with the line, which is gone after it; ``calls`` says how often the loss was called."""
    line = Progress(name, calls, wanted)
    begin = time.monotonic()
    try:
        yield line
    finally:
        line.clear()
        with suppress(Exception):
            logging.getLogger("grpo_fast").info("%s took %.2f s", name, time.monotonic() - begin)


def _is_terminal() -> bool:
    try:
        return bool(sys.stderr.isatty())
    except Exception:  # there is none, or it is closed
        return False
