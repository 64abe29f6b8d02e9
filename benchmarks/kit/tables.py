"""Tables: lists of rows, whose keys are the columns."""

from collections.abc import Mapping
from typing import Any


Row = dict[str, Any]
Tables = Mapping[str, list[Row]]

# How the result of a row begins that was left out on purpose.
NOT_RUN = "not run"


def print_table(title: str, rows: list[Row]) -> None:
    """Print rows with a title."""
    print(f"\n{title}\n\n{markdown_table(rows)}\n", flush=True)


def markdown_table(rows: list[Row]) -> str:
    """Rows as a Markdown table without empty columns."""
    # What is run on a machine with a GPU prints no tables, and need not have it.
    from tabulate import tabulate

    keys = dict.fromkeys(key for row in rows for key in row)
    columns = [k for k in keys if any(row.get(k) is not None for row in rows)]
    cells = [[_format(row.get(column)) for column in columns] for row in rows]
    align = ["left" if _is_text(rows, column) else "right" for column in columns]
    return tabulate(cells, columns, "github", colalign=align, disable_numparse=True)


def _is_text(rows: list[Row], column: str) -> bool:
    return any(isinstance(row.get(column), str) for row in rows)


def _format(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        if 0 < abs(value) < 0.01:
            return f"{value:.1e}"
        # Three digits, and an exponent only where there is no number to picture.
        rounded = float(f"{value:.3g}")
        return f"{rounded:.0f}" if 1e3 <= abs(rounded) < 1e6 else f"{rounded:.3g}"
    return str(value)


def joined(row: Row, *columns: str) -> Any:
    """The value of a column, or those of several joined by commas."""
    if len(columns) == 1:
        return row[columns[0]]
    return ", ".join(str(row[column]) for column in columns)


def distinct(rows: list[Row], *columns: str) -> list[Any]:
    """The values of a column, or of several joined by commas, in their order."""
    return list(dict.fromkeys(joined(row, *columns) for row in rows))


def select(rows: list[Row], columns: tuple[str, ...]) -> list[Row]:
    """Some columns of a table."""
    return [{column: row.get(column) for column in columns} for row in rows]


def without(rows: list[Row], columns: tuple[str, ...]) -> list[Row]:
    """The other columns of a table."""
    return [{k: v for k, v in row.items() if k not in columns} for row in rows]


def pivot(
    rows: list[Row], *, index: tuple[str, ...], column: str, value: str
) -> list[Row]:
    """A line for every value of `index`, with `value` for every value of `column`.

    A word or two say why a value is missing. A column without any is left out.
    """
    measured = {row[column] for row in rows if row.get(value) is not None}
    lines: dict[Any, Row] = {
        key: {", ".join(index): key} for key in distinct(rows, *index)
    }
    for row in (row for row in rows if row[column] in measured):
        shown = row.get(value)
        lines[joined(row, *index)][row[column]] = (
            reason(row) if shown is None else shown
        )
    return list(lines.values())


def reason(row: Row) -> str:
    """Why a row has no time, in a word or two."""
    if row.get("result", "").startswith(NOT_RUN):
        return NOT_RUN
    solved, _, total = row.get("converged", "").partition("/")
    return "failed" if solved == total else f"{solved}/{total} solved"
