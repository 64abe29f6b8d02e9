"""Every benchmark, and the pages of the documentation that show what they found.

Each section is a script in a process of its own; one that fails or takes too long says
so on the page, and the others go on. What was found is in one JSON file, from which the
page is written: with `--sections` some are run again and the others' last results stay,
and with `--sections` and no name after it, the page is only written anew.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any, Literal

import matplotlib.pyplot as plt
import tyro

from ..kit.measure import markdown_table, Settings
from .sections import Exhibit, Section, SECTIONS
from .training_sections import TRAINING_SECTIONS


HERE = pathlib.Path(__file__).parent
# The theme of the site, and Matplotlib's style for it.
STYLES = {"light": "default", "dark": "dark_background"}


@dataclasses.dataclass(frozen=True)
class Page:
    """A page of the documentation."""

    introduction: str
    sections: tuple[Section, ...]


REPORT = """\
# Report

What this library's benchmarks found. Everything below, sentences and figures too, was
computed by one command on the machine named at the end:

```bash
python benchmarks/report.py
```

Times are medians of repeats in turns. Where weights are given, a residual and a
gradient are checked against a float64 reference before a time is shown; where they are
trained, the accuracy stands beside it. The tables are also in
[one JSON file](report/report.json).
"""
TRAINING = """\
# Training

What the reference models reach on real data, on as many CPU cores as the table at the
end says. One command computes everything below, sentences and figures too. It takes
some hours, and may be stopped in the first two sections, which go on where they were:

```bash
python benchmarks/report.py --page training --data-dir FOLDER --text FILE
```

The tables are also in [one JSON file](training/training.json). The
[report](report.md) has what takes minutes.
"""
PAGES = {
    "report": Page(REPORT, SECTIONS),
    "training": Page(TRAINING, TRAINING_SECTIONS),
}

# A section's result: its status, seconds, command, machine, versions and tables.
Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Config:
    """Run the benchmarks and write a page on what they found."""

    page: Literal["report", "training"] = "report"
    """Which page: what takes minutes, or what takes hours."""
    sections: tuple[str, ...] | None = None
    """Which of its sections to run, by default all; the others keep their last
    results."""
    quick: bool = False
    """Run at a tiny size, to test the report."""
    data_dir: pathlib.Path | None = None
    """The folder with the files of Fashion-MNIST; without it there are only digits."""
    text: pathlib.Path | None = None
    """The text that the language model learns."""
    python: tuple[str, ...] = ()
    """The interpreters of other libraries, as `banax=/path/to/python`."""
    output_dir: pathlib.Path = HERE.parent / "docs"
    """The folder that the page is written to."""
    results_dir: pathlib.Path = Settings.output_dir
    """The folder that the scripts write to."""

    def __post_init__(self):
        names = [section.script for section in PAGES[self.page].sections]
        for name in self.sections or ():
            if name not in names:
                raise ValueError(
                    f"`sections` must be among {', '.join(names)}; got {name}."
                )

    @property
    def chosen(self) -> list[Section]:
        """The sections to run."""
        sections = PAGES[self.page].sections
        if self.sections is None:
            return [*sections]
        return [section for section in sections if section.script in self.sections]


def run(section: Section, config: Config, spare_minutes: float = 0.0) -> Record:
    """Run a section's script.

    **Arguments:**

    - `section`: which.
    - `config`: the report's options.
    - `spare_minutes`: what it may take longer than the section says.

    **Returns:**

    Its record, whose `status` is `ok` or says what went wrong.
    """
    folder = config.results_dir
    folder.mkdir(parents=True, exist_ok=True)
    found = folder / f"{section.script}.json"
    passed, shown = passed_on(section, config)
    options = [*(section.quick if config.quick else section.options)]
    arguments = [str(HERE / f"{section.script}.py"), *options, *passed]
    log = folder / f"{section.script}.log"
    minutes = section.minutes + spare_minutes
    start = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments, "--output-dir", str(folder)],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(60 * minutes)
            status = "ok" if code == 0 else f"failed: {last_line(log)}"
        except subprocess.TimeoutExpired:
            status = f"timed out after {minutes:.3g} minutes"
        finally:
            # With the processes that it has started.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    record = {
        "status": status,
        "seconds": time.perf_counter() - start,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(
            ["python", f"benchmarks/{section.script}.py", *options, *shown]
        ),
        "quick": config.quick,
    }
    return {**record, **json.loads(found.read_text())} if status == "ok" else record


def passed_on(section: Section, config: Config) -> tuple[list[str], list[str]]:
    """The options that a script takes from the report, and how they are shown.

    The page does not show the paths of the machine that it was made on.
    """
    if section.takes == "data_dir" and config.data_dir is not None:
        return ["--data-dir", str(config.data_dir)], ["--data-dir", "FOLDER"]
    if section.takes == "text" and config.text is not None:
        return ["--text", str(config.text)], ["--text", "FILE"]
    if section.takes == "python" and config.python:
        shown = [f"{argument.split('=')[0]}=PYTHON" for argument in config.python]
        return ["--python", *config.python], ["--python", *shown]
    return [], []


def last_line(log: pathlib.Path) -> str:
    """The end of a script's output: its error, if it failed."""
    written = [line for line in log.read_text().splitlines() if line.strip()]
    return written[-1].strip()[:200] if written else "it wrote nothing"


def render(page: Page, records: Mapping[str, Record], folder: pathlib.Path) -> str:
    """A page, whose figures are drawn on the way.

    **Arguments:**

    - `page`: which.
    - `records`: the sections' results, by the names of their scripts.
    - `folder`: where the figures go, next to the page.

    **Returns:**

    Markdown.
    """
    parts = [page.introduction]
    made_of = []
    for section in page.sections:
        if section.script in records:
            record = records[section.script]
            parts.append(render_section(section, record, folder))
            made_of.append(provenance(section, record))
    if made_of:
        parts.append("## Machine and versions\n\n" + markdown_table(made_of) + "\n")
    return "\n".join(parts)


def render_section(section: Section, record: Record, folder: pathlib.Path) -> str:
    """One section in Markdown, whether it has results or not."""
    parts = [f"## {section.title}", section.question]
    if record["quick"]:
        parts.append("*At a tiny size, to test the report: these are no measurements.*")
    if record["status"] != "ok":
        parts.append(f"**This section {record['status']}.**")
    else:
        try:
            shown = [
                show(exhibit, record["tables"], folder) for exhibit in section.exhibits
            ]
        # Whatever is wrong with one section's tables, the others are shown.
        except Exception as error:
            shown = [f"**This section failed: {type(error).__name__}: {error}.**"]
        parts += shown
    parts.append(f"```bash\n{record['command']}\n```")
    return "\n\n".join(parts) + "\n"


def show(exhibit: Exhibit, tables: Any, folder: pathlib.Path) -> str:
    """A figure, its sentences and its table in Markdown."""
    images = []
    for theme, style in STYLES.items():
        name = f"{exhibit.name}.{theme}.png"
        with plt.style.context(style):
            figure = exhibit.draw(tables)
            figure.savefig(folder / name, dpi=110, transparent=True)
            plt.close(figure)
        images.append(f"![{exhibit.caption}]({folder.name}/{name}#only-{theme})")
    return "\n\n".join(
        [
            f"**{exhibit.caption}**",
            exhibit.say(tables),
            "\n".join(images),
            markdown_table(exhibit.table(tables)),
        ]
    )


def provenance(section: Section, record: Record) -> dict[str, Any]:
    """The line of a section in the table of machines and versions."""
    machine = record.get("machine", {})
    return {
        "section": section.title,
        "date": record["date"],
        "seconds": record["seconds"],
        **{key: machine.get(key) for key in ("cpu", "cores", "python")},
        **record.get("versions", {}),
    }


def main() -> None:
    config = tyro.cli(Config)
    if config.quick:
        results = config.results_dir / "quick"
        config = dataclasses.replace(config, results_dir=results)
    folder = config.output_dir / config.page
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{config.page}.json"
    records = json.loads(path.read_text()) if path.exists() else {}
    chosen = config.chosen
    start = time.perf_counter()
    # What sections leave of their time is for those that come after them, so that the
    # whole takes no longer than all may together.
    minutes = 0.0
    for number, section in enumerate(chosen, start=1):
        what = f"[{number}/{len(chosen)}] {section.title} ({section.script}.py)"
        print(f"{what} ...", end=" ", flush=True)
        record = run(section, config, minutes - (time.perf_counter() - start) / 60)
        minutes += section.minutes
        records[section.script] = record
        path.write_text(json.dumps(records, indent=1))
        print(f"{record['status']}, {record['seconds']:.0f} s", flush=True)
    page = config.output_dir / f"{config.page}.md"
    page.write_text(render(PAGES[config.page], records, folder))
    print(f"Written in {time.perf_counter() - start:.0f} s: {page}")


if __name__ == "__main__":
    main()
