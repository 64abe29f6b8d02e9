"""Ctrl-C and SIGTERM, which end a run between two steps."""

import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType

import jax
import numpy as np
from jax.experimental import multihost_utils

from .errors import RunError


class Stopped(RunError):
    """A run was asked to stop, and can go on; the status is a shell's for a signal."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.status = 128 + number


class Interrupts:
    """Inside `with`, the first signal is noted. The second one ends the process."""

    def __init__(self):
        self.number: int | None = None
        self._before = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.number = number
        self.__exit__()

    def until(self, steps: Iterable[int]) -> Iterator[int]:
        """The steps until a signal comes."""
        for step in steps:
            # Several processes need the same steps: they agree in the end of these.
            if self.number is not None and jax.process_count() == 1:
                return
            yield step

    def agree(self) -> int | None:
        """The signal that came to any of the processes."""
        if jax.process_count() == 1:
            return self.number
        numbers = multihost_utils.process_allgather(np.array(self.number or 0))
        return int(np.max(numbers)) or None
