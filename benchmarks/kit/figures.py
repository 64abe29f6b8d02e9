"""Figures of tables, for the report."""

from typing import Literal

import matplotlib
import numpy as np
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from .tables import distinct, joined, Row


matplotlib.use("agg")

import matplotlib.pyplot as plt


MARKERS = "osD^vP*X<>pdh"


def dots(
    rows: list[Row],
    *,
    label: tuple[str, ...],
    values: tuple[str, ...],
    series: tuple[str, ...] = (),
    unit: str,
) -> Figure:
    """A mark for every row on a line for every label, over a logarithmic axis.

    **Arguments:**

    - `rows`: the table.
    - `label`: the columns that name a line.
    - `values`: the columns to draw.
    - `series`: the columns that name a marker; without any, those are the `values`.
    - `unit`: of the axis.
    """
    names = distinct(rows, *label)
    figure, axis = plt.subplots(
        figsize=(8, 1.2 + 0.27 * len(names)), layout="constrained"
    )
    if series:
        (value,) = values
        marks = [
            (key, [row for row in rows if joined(row, *series) == key], value)
            for key in distinct(rows, *series)
        ]
    else:
        marks = [(value, rows, value) for value in values]
    for marker, (key, chosen, value) in zip(MARKERS, marks, strict=False):
        points = [
            (row[value], names.index(joined(row, *label)))
            for row in chosen
            if row.get(value) is not None
        ]
        if points:
            axis.plot(*zip(*points, strict=True), marker, label=key, alpha=0.8)
    axis.set(xscale="log", xlabel=unit, ylim=(len(names) - 0.5, -0.5))
    plain_ticks(axis.xaxis)
    axis.set_yticks(range(len(names)), names)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def curves(
    rows: list[Row],
    *,
    x: str,
    values: tuple[str, ...],
    series: tuple[str, ...],
    panel: str | None = None,
    log: Literal["", "y", "xy"] = "",
) -> Figure:
    """A curve for every series, in a panel for every column or for every value of one.

    **Arguments:**

    - `rows`: the table.
    - `x`: the column to draw over.
    - `values`: the columns to draw.
    - `series`: the columns that name a curve.
    - `panel`: the column that says which panel a row is in.
    - `log`: which axes are logarithmic.
    """
    if panel is None:
        panels = [("", value, rows) for value in values]
    else:
        panels = [
            (name, value, [row for row in rows if row[panel] == name])
            for value in values
            for name in distinct(rows, panel)
        ]
    num_columns = min(2, len(panels))
    num_rows = -(-len(panels) // num_columns)
    figure, axes = plt.subplots(
        num_rows,
        num_columns,
        figsize=(8, 3.5 * num_rows),
        layout="constrained",
        squeeze=False,
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    styles = dict(zip(distinct(rows, *series), MARKERS * 9, strict=False))
    for axis, (name, value, chosen) in zip(axes.flat, panels, strict=False):
        for key, marker in styles.items():
            points = [
                (row[x], row[value])
                for row in chosen
                if joined(row, *series) == key and row.get(value) is not None
            ]
            style = {"marker": marker} if log == "xy" else {}
            axis.plot(*np.reshape(points, (-1, 2)).T, label=key, **style)
        axis.set(title=name, xlabel=x, ylabel=value)
        axis.grid(alpha=0.3)
        if log == "xy":
            axis.set(xscale="log", yscale="log")
            plain_ticks(axis.xaxis)
            plain_ticks(axis.yaxis)
        else:
            axis.set(yscale="log" if log else "linear")
            axis.set_xlim(left=0)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def plain_ticks(axis: Axis) -> None:
    """Numbers and not powers of ten on a logarithmic axis, and enough of them."""
    low, high = axis.get_view_interval()
    subs = (1, 2, 5) if high < 300 * low else (1,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
