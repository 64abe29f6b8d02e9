"""What a run tells: metrics as JSON lines and for TensorBoard, and figures."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from tensorboardX import SummaryWriter


matplotlib.use("agg")

import matplotlib.pyplot as plt

from implicitnets import plot


Record = dict[str, Any]

PANELS = {
    "loss": ["train_loss", "test_loss"],
    "accuracy": ["train_accuracy", "test_accuracy"],
    "cell evaluations": ["train_evaluations", "test_evaluations"],
    "spectral radius": ["test_spectral_radius_mean", "test_spectral_radius_max"],
}


class Records:
    """The metrics of a run, in the order in which they were measured.

    What an earlier process wrote of steps after `step` is dropped, since it is done
    again. Only an `active` one writes; of several processes, the first one is.
    """

    def __init__(self, folder: Path, step: int, active: bool):
        self._folder = folder
        self._path = folder / "metrics.jsonl"
        self.all = [r for r in read_records(self._path) if r["step"] <= step]
        self._board = None
        if active:
            folder.mkdir(parents=True, exist_ok=True)
            new = self._path.with_suffix(".new")
            new.write_text("".join(map(_line, self.all)))
            os.replace(new, self._path)
            self._board = SummaryWriter(
                str(folder / "tensorboard"), purge_step=step + 1
            )

    def add(self, record: Record) -> None:
        """Write what was measured at a step; numbers also go to TensorBoard."""
        self.all.append(record)
        if self._board is None:
            return
        with self._path.open("a") as file:
            file.write(_line(record))
        for name, value in record.items():
            if name != "step" and isinstance(value, float):
                self._board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Finish the files, and draw the figures."""
        if self._board is None:
            return
        self._board.close()
        figure = draw(self.all)
        figure.savefig(self._folder / "training.png", dpi=150)
        plt.close(figure)


def read_records(path: Path) -> list[Record]:
    """All that was written completely: a killed process may leave half a line."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def draw(records: Sequence[Record]):
    """Loss, accuracy, work and stability in the course of the training."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(14, 3.2), layout="constrained")
    known = {name for record in records for name in record}
    for axis, (title, names) in zip(axes, PANELS.items(), strict=True):
        # A run measures some of them only if its options ask for it.
        plot.training(records, [name for name in names if name in known], axes=axis)
        axis.set_title(title)
    return figure


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"
