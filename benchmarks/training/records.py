"""What a run tells: metrics as JSON lines and for TensorBoard, and figures.

JSON has no number for NaN and infinity: they are written as `null`.
"""

import json
import math
import operator
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from tensorboardX import SummaryWriter


matplotlib.use("agg")

import matplotlib.pyplot as plt

from implicitnets import plot

from .errors import first_line, OutputError


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
            new.write_text("".join(map(to_json, self.all)))
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
            file.write(to_json(record))
        for name, value in record.items():
            if isinstance(value, float) and math.isfinite(value):
                self._board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Finish the files, and draw the figures."""
        if self._board is None:
            return
        self._board.close()
        if not self.all:
            return
        figure = draw(self.all)
        figure.savefig(self._folder / "training.png", dpi=150)
        plt.close(figure)


def read_records(path: Path) -> list[Record]:
    """All that was written completely: a killed process may leave half a last line.

    Another line that is no record is an `OutputError`, so that none after it is lost.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise OutputError(f"{path} cannot be read ({first_line(error)}).") from error
    records = []
    for number, line in enumerate(lines, start=1):
        is_last = number == len(lines)
        if is_last and not line:
            break
        try:
            record = json.loads(line)
            record["step"] = operator.index(record["step"])
        except (ValueError, TypeError, KeyError) as error:
            if is_last and line.startswith(b"{"):
                break
            raise OutputError(
                f"Line {number} of {path} is no record of a step: repair or remove it, "
                "or give another --output-dir."
            ) from error
        records.append(record)
    return records


def score(record: Record) -> float:
    """How good a test was, of the accuracy, of masks or of text; without one, -inf."""
    if "test_perplexity" in record:
        value = -record["test_loss"]
    else:
        value = record.get("test_mean_iou", record.get("test_accuracy"))
    return -math.inf if value is None or math.isnan(value) else value


def to_json(record: Mapping[str, Any]) -> str:
    """A record in a line."""

    def finite(value):
        is_number = not isinstance(value, float) or math.isfinite(value)
        return value if is_number else None

    values = {name: finite(value) for name, value in record.items()}
    return json.dumps(values, allow_nan=False) + "\n"


def draw(records: Sequence[Record]):
    """Loss, accuracy, work and stability in the course of the training."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(14, 3.2), layout="constrained")
    known = {name for record in records for name in record}
    for axis, (title, names) in zip(axes, PANELS.items(), strict=True):
        # A run measures some of them only if its options ask for it.
        plot.training(records, [name for name in names if name in known], axes=axis)
        axis.set_title(title)
    return figure
