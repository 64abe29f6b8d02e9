"""Runs the benchmarks, and writes the pages of the documentation on them.

Each section is a script in a process of its own; one that fails or takes too long says
so on the page, and the others go on. What was found is in one JSON file, from which the
page is written: with `--sections` some are run again and the others' last results stay,
and with `--sections` and no name after it, the page is only written again.
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
from typing import Literal

import tyro

from ..kit.results import Settings
from . import readme
from .exhibits import Section
from .gpu_sections import gpu_headline, GPU_SECTIONS
from .headline import headline
from .page import Page, Record, render
from .sections import SECTIONS
from .training_sections import TRAINING_SECTIONS


DOCS = pathlib.Path(__file__).parents[2] / "docs"

REPORT = """\
# Report

What this library's benchmarks found, on the machine named at the end. One command
measures all of it and writes this page:

```bash
python -m benchmarks.report --data-dir FOLDER \\
    --python torchdeq=PYTHON jaxopt=PYTHON banax=PYTHON
```

`FOLDER` has the files of Fashion-MNIST, and every `PYTHON` is an interpreter that has
the library. Times are medians of repeats, in which the methods alternate. Where weights
are given, a residual and a gradient are checked against a float64 reference before a
time is shown; where weights are trained, the accuracy stands beside it. The tables are
also in [one JSON file](report/report.json).
"""
TRAINING = """\
# Training

What the reference models reach on real data, on as many CPU cores as the table at the
end says. One command measures all of it and writes this page. It takes some hours. The
first two sections may be interrupted: they continue from where they were.

```bash
python -m benchmarks.report --page training --data-dir FOLDER --text FILE
```

The tables are also in [one JSON file](training/training.json). The
[report](report.md) has what takes minutes.
"""
GPU_REPORT = """\
# Report on a GPU

What the library launches on a GPU, and what it takes there. Each section says whether
it was counted in compiled programs or measured on a device, and on which. What is not
here has not been measured. [On a GPU](gpu.md) says what follows from it. The second one
of these commands needs the device, and the third one writes this page:

```bash
python -m benchmarks.report --page gpu_report --sections gpu_program
python -m benchmarks.gpu --out gpu.json --data-dir FOLDER --text FILE --mnist FILE
python -m benchmarks.report --page gpu_report --sections --found gpu=gpu.json
```

The tables are also in [one JSON file](gpu_report/gpu_report.json).
"""
PAGES = {
    "report": Page(REPORT, SECTIONS, headline),
    "training": Page(TRAINING, TRAINING_SECTIONS),
    "gpu_report": Page(GPU_REPORT, GPU_SECTIONS, gpu_headline),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Run the benchmarks and write a page on what they found."""

    page: Literal["report", "training", "gpu_report"] = "report"
    """Write this page: `report` takes minutes, `training` takes hours, and `gpu_report`
    takes minutes on a device."""
    sections: tuple[str, ...] | None = None
    """Run these of its sections, by default all. The others keep their last results."""
    quick: bool = False
    """Run at a tiny size, to test the report."""
    data_dir: pathlib.Path | None = None
    """Read the files of Fashion-MNIST from this folder, or learn only digits."""
    text: pathlib.Path | None = None
    """Let the language model learn the text of this file."""
    python: tuple[str, ...] = ()
    """Run other libraries with these interpreters, as `banax=/path/to/python`."""
    found: tuple[str, ...] = ()
    """Take what sections found elsewhere from these files, as `gpu=FILE`."""
    output_dir: pathlib.Path = DOCS
    """Write the page to this folder."""
    results_dir: pathlib.Path = Settings.output_dir
    """Let the scripts write to this folder."""

    def __post_init__(self):
        names = [section.name for section in PAGES[self.page].sections]
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
        return [section for section in sections if section.name in self.sections]


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
    found = folder / f"{section.name}.json"
    passed, shown = passed_on(section, config)
    options = [*(section.quick if config.quick else section.options)]
    module = f"benchmarks.{section.script}"
    log = folder / f"{section.name}.log"
    minutes = section.minutes + spare_minutes
    start = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", module, *options, *passed),
                *("--output-dir", str(folder)),
            ],
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
        "command": " ".join(["python", "-m", module, *options, *shown]),
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


def main() -> None:
    config = tyro.cli(Config)
    if config.quick:
        results = config.results_dir / "quick"
        config = dataclasses.replace(config, results_dir=results)
    folder = config.output_dir / config.page
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{config.page}.json"
    records = json.loads(path.read_text()) if path.exists() else {}
    for argument in config.found:
        name, file = argument.split("=", 1)
        records[name] = json.loads(pathlib.Path(file).read_text())
        path.write_text(json.dumps(records, indent=1))
    chosen = config.chosen
    start = time.perf_counter()
    # What sections leave of their time is for those that come after them, so that the
    # whole takes no longer than all may together.
    minutes = 0.0
    for number, section in enumerate(chosen, start=1):
        what = f"[{number}/{len(chosen)}] {section.title} ({section.name})"
        print(f"{what} ...", end=" ", flush=True)
        record = run(section, config, minutes - (time.perf_counter() - start) / 60)
        minutes += section.minutes
        records[section.name] = record
        path.write_text(json.dumps(records, indent=1))
        print(f"{record['status']}, {record['seconds']:.0f} s", flush=True)
    page = config.output_dir / f"{config.page}.md"
    page.write_text(render(PAGES[config.page], records, folder))
    published = config.output_dir == DOCS and not config.quick
    if config.page == "report" and published:
        readme.update(DOCS.parent / "README.md", page.read_text())
    print(f"Written in {time.perf_counter() - start:.0f} s: {page}")


if __name__ == "__main__":
    main()
