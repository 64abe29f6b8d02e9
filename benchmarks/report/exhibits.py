"""What a page consists of: sections, each a script and what is shown of its tables."""

import dataclasses
import functools as ft
import re
from collections.abc import Callable
from typing import Literal

from matplotlib.figure import Figure

from ..kit import figures
from ..kit.tables import pivot, Row


@dataclasses.dataclass(frozen=True)
class Exhibit:
    """A figure and a table under a caption that holds whatever the numbers are.

    `table` and `figure` are made from the tables of the script that are named.
    """

    name: str
    caption: str
    table: Callable[[list[Row]], list[Row]] | None = None
    figure: Callable[[list[Row]], Figure] | None = None
    table_of: str = "rows"
    figure_of: str = "rows"
    folded: bool = False


@dataclasses.dataclass(frozen=True)
class Section:
    """A question, and the module in `benchmarks` that answers it.

    The script is stopped after `minutes`, and those that earlier scripts have left.
    `takes` is the option of the report that is passed on.
    """

    script: str
    title: str
    question: str
    exhibits: tuple[Exhibit, ...]
    minutes: float
    options: tuple[str, ...] = ()
    quick: tuple[str, ...] = ("--repeats", "1")
    takes: Literal["data_dir", "python", "text"] | None = None

    @property
    def name(self) -> str:
        """That of the script's result file, and of the section's record."""
        return self.script.rpartition(".")[2]

    @property
    def anchor(self) -> str:
        """The section's link on its page."""
        return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", self.title).lower())


def by_problem(
    name: str, caption: str, index: tuple[str, ...], value: str, unit: str
) -> Exhibit:
    """One column of a script's rows: a line for every `index`, for every problem."""
    return Exhibit(
        name,
        caption,
        ft.partial(pivot, index=index, column="problem", value=value),
        ft.partial(
            figures.dots, label=index, values=(value,), series=("problem",), unit=unit
        ),
    )


def every(rows: list[Row]) -> list[Row]:
    """All rows and columns."""
    return rows
