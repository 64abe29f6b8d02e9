"""Pages of the documentation in Markdown, from what the scripts have found."""

import dataclasses
import pathlib
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib.pyplot as plt

from ..kit.tables import markdown_table, Row
from .exhibits import Exhibit, Section


# The themes of the site, and Matplotlib's styles for them.
STYLES = {"light": "default", "dark": "dark_background"}

# A section's result: its status, seconds, command, machine, versions and tables.
Record = dict[str, Any]
Records = Mapping[str, Record]


@dataclasses.dataclass(frozen=True)
class Page:
    """A page: what it says first, its headline of the records, and its sections."""

    introduction: str
    sections: tuple[Section, ...]
    headline: Callable[[Records], list[Row]] = lambda _: []


def render(page: Page, records: Records, folder: pathlib.Path) -> str:
    """A page, whose figures are drawn on the way.

    **Arguments:**

    - `page`: which.
    - `records`: the sections' results, by their names.
    - `folder`: where the figures go, next to the page.

    **Returns:**

    Markdown.
    """
    parts = [page.introduction, *render_headline(page.headline(records))]
    made_of = []
    for section in page.sections:
        if section.name in records:
            record = records[section.name]
            parts.append(render_section(section, record, folder))
            made_of.append(provenance(section, record))
    if made_of:
        parts.append("## Machine and versions\n\n" + markdown_table(made_of) + "\n")
    return "\n".join(parts)


def render_headline(rows: list[Row]) -> list[str]:
    """The table that other pages take from this one."""
    if not rows:
        return []
    start, end = (f"<!-- --8<-- [{what}:headline] -->" for what in ("start", "end"))
    return [f"{start}\n{markdown_table(rows)}\n{end}\n"]


def render_section(section: Section, record: Record, folder: pathlib.Path) -> str:
    """One section in Markdown, whether it has results or not."""
    parts = [f"## {section.title}", section.question]
    if record["quick"]:
        parts.append("*At a tiny size, to test the report: these are no measurements.*")
    if record["status"] != "ok":
        parts.append(f"**This section {record['status']}.**")
    else:
        try:
            tables = record["tables"]
            shown = [
                show(exhibit, tables, folder)
                for exhibit in section.exhibits
                # A part of a script may have been left out.
                if tables.get(exhibit.table_of) != []
            ]
        # Whatever is wrong with one section's tables, the others are shown.
        except Exception as error:
            shown = [f"**This section failed: {type(error).__name__}: {error}.**"]
        parts += shown
    parts.append(f"```bash\n{record['command']}\n```")
    return "\n\n".join(parts) + "\n"


def show(exhibit: Exhibit, tables: Any, folder: pathlib.Path) -> str:
    """A figure and a table in Markdown."""
    parts = []
    if exhibit.figure is not None:
        images = []
        for theme, style in STYLES.items():
            name = f"{exhibit.name}.{theme}.png"
            with plt.style.context(style):
                figure = exhibit.figure(tables[exhibit.figure_of])
                figure.savefig(folder / name, dpi=110, transparent=True)
                plt.close(figure)
            images.append(f"![{exhibit.caption}]({folder.name}/{name}#only-{theme})")
        parts.append("\n".join(images))
    if exhibit.table is not None:
        parts.append(markdown_table(exhibit.table(tables[exhibit.table_of])))
    shown = "\n\n".join(parts)
    if exhibit.folded:
        return f'??? info "{exhibit.caption}"\n\n{textwrap.indent(shown, "    ")}'
    return f"**{exhibit.caption}**\n\n{shown}"


def provenance(section: Section, record: Record) -> Row:
    """The line of a section in the table of machines and versions."""
    machine = record.get("machine", {})
    return {
        "section": section.title,
        "date": record["date"],
        "seconds": record["seconds"],
        **{key: machine.get(key) for key in ("device", "cpu", "cores", "python")},
        **record.get("versions", {}),
    }
