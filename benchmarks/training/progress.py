"""How far a run is: a bar on a terminal, and elsewhere a line at every record."""

import sys
from collections.abc import Iterable, Iterator

from tqdm import tqdm

from .records import Record


class Progress:
    """Tells of the steps and the records of an `active` process."""

    def __init__(self, total: int, first: int, active: bool):
        self._total = total
        self._prints = active and not sys.stderr.isatty()
        self._bar = tqdm(
            total=total, initial=first, unit="step", disable=not active or self._prints
        )

    def showing(self, steps: Iterable[int]) -> Iterator[int]:
        """The steps; each is on the bar when it is done."""
        for step in steps:
            yield step
            self._bar.update()

    def tell(self, record: Record) -> None:
        """Say what the last steps came to."""
        text = (
            f"loss {record['train_loss']:.4g}, "
            f"accuracy {record['train_accuracy']:.1%}, "
            f"evaluations {record['train_evaluations']:.1f}"
        )
        if self._prints:
            print(f"step {record['step']} of {self._total}: {text}", flush=True)
        self._bar.set_postfix_str(text)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()
