"""The benchmark report: how it is written, and what becomes of what fails in it."""

import argparse
import importlib
import json
import re
import sys

import pytest
import tyro
from matplotlib.figure import Figure

from benchmarks.kit.tables import markdown_table, pivot
from benchmarks.report import __main__ as report
from benchmarks.report.exhibits import Section
from benchmarks.report.page import render


pytestmark = pytest.mark.one_precision

REPORT = report.PAGES["report"]
EVERY_SECTION = [section for page in report.PAGES.values() for section in page.sections]


def skip_row(model, evaluations, accuracy):
    return {
        "data": "digits",
        "solver": "Broyden",
        "model": model,
        "accuracy (%)": accuracy,
        "deviation of accuracy": 0.5,
        "evaluations": evaluations,
        "deviation of evaluations": 0.1,
        "converged (%)": 100.0,
        "training step (ms)": 3.0,
        "prediction (ms)": 2.0,
    }


TABLES = {
    "rows": [
        skip_row("plain", 18.0, 96.0),
        skip_row("Skip", 4.5, 95.0),
        skip_row("Skip-regularised", 6.0, 96.5),
    ]
}


ROW = r"\| digits +\| Broyden +\| Skip-regularised +\| +96.5 \| +0.5 \| +6 \|"


def record(**changes):
    return {
        "status": "ok",
        "seconds": 12.3,
        "date": "2026-11-23",
        "command": "python -m benchmarks.skip",
        "quick": False,
        "machine": {"cpu": "a CPU", "cores": 2, "python": "3.11"},
        "versions": {"jax": "0.10.2"},
        "tables": TABLES,
        **changes,
    }


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Makes a section of a script's text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()

    def make(text, **fields):
        (tmp_path / "benchmarks" / "made.py").write_text(text)
        fields = {"exhibits": (), "minutes": 1, **fields}
        return Section("made", "Made", "Why?", **fields)

    return make


@pytest.fixture
def config(tmp_path):
    return report.Config(output_dir=tmp_path / "docs", results_dir=tmp_path / "results")


def test_page_is_computed_from_the_tables(tmp_path):
    page = render(REPORT, {"skip": record()}, tmp_path)
    assert re.search(ROW, page)
    assert "a CPU" in page and "0.10.2" in page
    for theme in ("light", "dark"):
        link = f"({tmp_path.name}/skip.{theme}.png#only-{theme})"
        assert link in page
        assert (tmp_path / f"skip.{theme}.png").stat().st_size > 0


def test_headline_is_what_was_measured(tmp_path):
    failed = record(status="timed out after 9 minutes")
    fastest = [
        {"problem": problem, "algorithm": algorithm, "library": library}
        | {"time / implicitnets": ratio}
        for problem, algorithm, library, ratio in (
            ("easy", "any", "implicitnets", 1.0),
            ("easy", "any", "banax", 0.92),
            ("easy", "Anderson", "banax", 0.5),
            ("hard", "any", "banax", 3.0),
            ("harder", "any", "banax", 20.0),
        )
    ]
    records = {
        "skip": record(),
        "gradients": failed,
        "peers": record(tables={"rows": [], "fastest": fastest}),
    }
    page = render(REPORT, records, tmp_path)
    start, end = ("<!-- --8<-- [start:headline] -->", "<!-- --8<-- [end:headline] -->")
    lines = page[page.index(start) : page.index(end)].splitlines()[3:]
    assert len(lines) == 2
    assert "digits, Broyden: 18.0 and 6.0 (96.0 and 96.5 %)" in lines[0]
    assert "#skip-and-skip-regularised-against-plain)" in lines[0]
    assert "banax 3 (least of 3: 0.92, easy)" in lines[1]


def test_failed_section_does_not_stop_the_others(tmp_path):
    failed = record(status="timed out after 9 minutes")
    for name in ("machine", "versions", "tables"):
        del failed[name]
    records = {"scaling": failed, "skip": record()}
    page = render(REPORT, records, tmp_path)
    assert "**This section timed out after 9 minutes.**" in page
    assert re.search(ROW, page)


def test_tables_that_lack_something_are_a_failed_section(tmp_path):
    broken = record(tables={"rows": [{"problem": "tanh"}]})
    page = render(REPORT, {"linear_solvers": broken, "skip": record()}, tmp_path)
    assert "**This section failed: KeyError: 'linear solver'.**" in page
    assert re.search(ROW, page)


def test_quick_results_are_no_measurements(tmp_path):
    assert "no measurements" in render(REPORT, {"skip": record(quick=True)}, tmp_path)
    assert "no measurements" not in render(REPORT, {"skip": record()}, tmp_path)


def test_published_pages_are_those_of_the_published_results(tmp_path, monkeypatch):
    def touch(figure, path, **_):
        del figure
        path.touch()

    monkeypatch.setattr(Figure, "savefig", touch)
    for name, page in report.PAGES.items():
        folder = report.DOCS / name
        records = json.loads((folder / f"{name}.json").read_text())
        (tmp_path / name).mkdir()
        rendered = render(page, records, tmp_path / name)
        assert "This section" not in rendered
        assert rendered == (report.DOCS / f"{name}.md").read_text()
        figures = {path.name for path in (tmp_path / name).glob("*.png")}
        assert figures == {path.name for path in folder.glob("*.png")}


def test_run_reads_what_the_script_saved(script, config):
    content = {"machine": {}, "versions": {}, "tables": {"rows": [{"a": 1}]}}
    section = script(
        "import pathlib, sys\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('--output-dir') + 1])\n"
        f"(folder / 'made.json').write_text({json.dumps(content)!r})\n",
        options=("--repeats", "3"),
    )
    found = report.run(section, config)
    assert found["status"] == "ok"
    assert found["tables"] == content["tables"]
    assert found["command"] == "python -m benchmarks.made --repeats 3"


def test_run_says_why_a_script_failed(script, config):
    section = script("raise RuntimeError('no reference')")
    # Of an earlier run: not to be taken for this one's.
    config.results_dir.mkdir()
    (config.results_dir / "made.json").write_text('{"tables": {}}')
    found = report.run(section, config)
    assert found["status"] == "failed: RuntimeError: no reference"
    assert "tables" not in found


def test_run_stops_a_script_that_takes_too_long(script, config):
    section = script("import time; time.sleep(600)", minutes=0.001)
    found = report.run(section, config)
    assert found["status"] == "timed out after 0.001 minutes"


def test_page_does_not_show_the_paths_of_the_machine(tmp_path):
    config = report.Config(
        data_dir=tmp_path, text=tmp_path, python=(f"banax={tmp_path}/python",)
    )
    for section in EVERY_SECTION:
        passed, shown = report.passed_on(section, config)
        assert len(passed) == len(shown)
        assert not any(str(tmp_path) in argument for argument in shown)
        assert (section.takes is None) == (passed == [])


def test_other_sections_keep_their_last_results(tmp_path, monkeypatch):
    folder = tmp_path / "report"
    folder.mkdir()
    old = {"skip": record(), "scaling": record(status="failed: of old")}
    (folder / "report.json").write_text(json.dumps(old))
    monkeypatch.setattr(report, "run", lambda *_: record(status="failed: of new"))
    arguments = ["report", "--output-dir", str(tmp_path), "--sections", "scaling"]
    monkeypatch.setattr(sys, "argv", arguments)
    report.main()
    page = (tmp_path / "report.md").read_text()
    assert re.search(ROW, page)
    assert "of new" in page and "of old" not in page
    assert json.loads((folder / "report.json").read_text())["skip"] == old["skip"]


def test_results_from_another_machine_are_taken(tmp_path, monkeypatch):
    (tmp_path / "elsewhere.json").write_text(json.dumps(record()))
    found = f"skip={tmp_path / 'elsewhere.json'}"
    arguments = ["report", "--output-dir", str(tmp_path), "--sections", "--found"]
    monkeypatch.setattr(sys, "argv", [*arguments, found])
    report.main()
    assert re.search(ROW, (tmp_path / "report.md").read_text())
    kept = json.loads((tmp_path / "report" / "report.json").read_text())
    assert kept == {"skip": record()}


@pytest.mark.parametrize("page, name", [("report", "nothing"), ("training", "skip")])
def test_unknown_section(page, name):
    with pytest.raises(ValueError, match=f"got {name}"):
        report.Config(page, (name,))


def test_names_of_exhibits_are_distinct():
    for page in report.PAGES.values():
        exhibits = [exhibit.name for s in page.sections for exhibit in s.exhibits]
        assert len(set(exhibits)) == len(exhibits)


class Parsed(Exception):
    """The command line is right."""


@pytest.mark.parametrize("section", EVERY_SECTION, ids=lambda section: section.name)
def test_scripts_take_the_options_of_their_sections(section, monkeypatch):
    module = importlib.import_module(f"benchmarks.{section.script}")
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{module.__name__}.__main__")

    def only(parse):
        def parse_only(*args, **kwargs):
            parse(*args, **kwargs)
            raise Parsed

        return parse_only

    monkeypatch.setattr(tyro, "cli", only(tyro.cli))
    parser = argparse.ArgumentParser
    monkeypatch.setattr(parser, "parse_args", only(parser.parse_args))
    for options in (section.options, section.quick):
        command = [section.name, *options, "--output-dir", "results"]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(Parsed):
            module.main()


def test_pivot_names_what_failed():
    rows = [
        {"method": "a", "problem": "p", "ms": 1.0},
        {"method": "a", "problem": "q"},
        {"method": "b", "problem": "p", "result": "not run: dense Jacobian"},
        {"method": "b", "problem": "q", "ms": 2.0},
        {"method": "a", "problem": "nothing is measured"},
    ]
    assert pivot(rows, index=("method",), column="problem", value="ms") == [
        {"method": "a", "p": 1.0, "q": "failed"},
        {"method": "b", "p": "not run", "q": 2.0},
    ]


def test_columns_without_values_are_not_shown():
    table = markdown_table([{"a": 1, "b": None}, {"a": None, "b": None}])
    assert "a" in table and "b" not in table


def test_numbers_are_rounded_before_they_choose_a_form():
    table = markdown_table([{"a": value} for value in (0.001234, 0.5, 999.7, 1e7)])
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == [
        *("1.2e-03", "0.5", "1000", "1e+07")
    ]
