"""The benchmark report: how it is written, and what becomes of what fails in it."""

import json
import re
import sys

import numpy as np
import pytest

from benchmarks.kit import measure, methods, problems
from benchmarks.peers import __main__ as peers
from benchmarks.report import __main__ as report, sections


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


def record(**changes):
    return {
        "status": "ok",
        "seconds": 12.3,
        "date": "2026-11-23",
        "command": "python benchmarks/skip.py",
        "quick": False,
        "machine": {"cpu": "a CPU", "cores": 2, "python": "3.11"},
        "versions": {"jax": "0.10.2"},
        "tables": TABLES,
        **changes,
    }


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Makes a section of a script's text."""
    monkeypatch.setattr(report, "HERE", tmp_path)

    def make(text, **fields):
        (tmp_path / "made.py").write_text(text)
        fields = {"exhibits": (), "minutes": 1, **fields}
        return sections.Section("made", "Made", "Why?", **fields)

    return make


@pytest.fixture
def config(tmp_path):
    return report.Config(output_dir=tmp_path / "docs", results_dir=tmp_path / "results")


def test_page_is_computed_from_the_tables(tmp_path):
    page = report.render(REPORT, {"skip": record()}, tmp_path)
    assert "need 4 times the evaluations of Skip ones" in page
    assert "is -1.0 to -1.0 points from theirs" in page
    assert "need 3 times the evaluations of Skip-regularised ones" in page
    assert re.search(r"\| digits +\| Broyden +\| plain +\| 96.0 ± 0.5", page)
    assert "a CPU" in page and "0.10.2" in page
    for theme in ("light", "dark"):
        link = f"({tmp_path.name}/skip.{theme}.png#only-{theme})"
        assert link in page
        assert (tmp_path / f"skip.{theme}.png").stat().st_size > 0


def test_page_on_training_is_computed_from_the_tables(tmp_path):
    def model(name, accuracy, **columns):
        costs = {"training memory (MB)": 50.0, "training step (ms)": 100.0}
        return {"model": name, "accuracy (%)": accuracy, **costs, **columns}

    def epoch(number, accuracy):
        return model("a network", accuracy) | {
            "epoch": number,
            "training (min)": 5.0 * number,
            "an epoch (min)": 5.0,
            "evaluations, test": 7.5,
        }

    def phase(name, seconds):
        return model("deq", 60.0) | {
            "phase": name,
            "epoch (s)": seconds,
            "total (s)": 10.0,
            "total with compilation (s)": 12.0,
            "deviation (%)": 1.0,
            "evaluations": 5.0,
            "converged (%)": 100.0,
        }

    curves = [
        {"model": name, "training step": 20, "loss": 1.0, "evaluations": 6.0}
        | {"bits per character": 3.0}
        for name in ("one", "two")
    ]
    layers = {"training memory (MB)": 200.0, "bits per character": 2.5}
    found = {
        "fashion": {"rows": [epoch(1.0, 85.0), epoch(2.0, 91.0)]},
        "sciml_tutorial": {
            "rows": [
                phase("pretraining", 1.0),
                phase("adams", 9.0),
                phase("tsit5", 4.0),
            ]
        },
        "language_model": {
            "rows": [
                model("equilibrium", None, **{"bits per character": 2.25}),
                model("6 layers", None, **layers),
            ],
            "curves": curves,
        },
        "multiscale": {
            "summary": [model("two", 72.0), model("one", 70.5)],
            "curves": curves,
        },
    }
    records = {name: record(tables=tables) for name, tables in found.items()}
    page = report.render(report.PAGES["training"], records, tmp_path)
    assert "a network: 91.0 % after 2 epochs of 5.0 minutes, with 7.5 eval" in page
    assert "the quickest epochs are those of tsit5 (4 s)" in page
    assert "2.25 bits per character, 6 layers 2.50." in page
    assert "takes 0.25 times their memory and 1 times their time." in page
    assert "Two scales beat one of as many weights: +1.5 points" in page
    assert "failed" not in page


def test_failed_section_does_not_stop_the_others(tmp_path):
    failed = record(status="timed out after 9 minutes")
    for name in ("machine", "versions", "tables"):
        del failed[name]
    page = report.render(REPORT, {"solvers": failed, "skip": record()}, tmp_path)
    assert "**This section timed out after 9 minutes.**" in page
    assert "need 4 times" in page


def test_tables_that_lack_something_are_a_failed_section(tmp_path):
    broken = record(tables={"rows": [{"problem": "tanh"}]})
    page = report.render(REPORT, {"solvers": broken, "skip": record()}, tmp_path)
    assert "**This section failed: KeyError: 'method'.**" in page
    assert "need 4 times" in page


def test_quick_results_are_no_measurements(tmp_path):
    assert "no measurements" in report.render(
        REPORT, {"skip": record(quick=True)}, tmp_path
    )
    assert "no measurements" not in report.render(REPORT, {"skip": record()}, tmp_path)


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
    assert found["command"] == "python benchmarks/made.py --repeats 3"


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
    old = {"skip": record(), "solvers": record(status="failed: of old")}
    (folder / "report.json").write_text(json.dumps(old))
    monkeypatch.setattr(report, "run", lambda *_: record(status="failed: of new"))
    arguments = ["report.py", "--output-dir", str(tmp_path), "--sections", "solvers"]
    monkeypatch.setattr(sys, "argv", arguments)
    report.main()
    page = (tmp_path / "report.md").read_text()
    assert "need 4 times" in page and "of new" in page and "of old" not in page
    assert json.loads((folder / "report.json").read_text())["skip"] == old["skip"]


@pytest.mark.parametrize("page, name", [("report", "nothing"), ("training", "skip")])
def test_unknown_section(page, name):
    with pytest.raises(ValueError, match=f"got {name}"):
        report.Config(page, (name,))


def test_names_of_scripts_and_figures():
    exhibits = [exhibit.name for s in EVERY_SECTION for exhibit in s.exhibits]
    assert len(set(exhibits)) == len(exhibits)
    for section in EVERY_SECTION:
        assert (report.HERE / f"{section.script}.py").exists()


def test_whole_report_takes_forty_minutes():
    assert sum(section.minutes for section in sections.SECTIONS) <= 40


def test_ranges():
    assert sections.times([2.0, 2.001]) == "2 times"
    assert sections.times([3.0, 0.5]) == "0.5 to 3 times"


def test_pivot_names_what_failed():
    rows = [
        {"method": "a", "problem": "p", "ms": 1.0},
        {"method": "a", "problem": "q"},
        {"method": "b", "problem": "p", "result": "not run: dense Jacobian"},
        {"method": "b", "problem": "q", "ms": 2.0},
    ]
    assert sections.pivot(rows, ("method",), "problem", "ms") == [
        {"method": "a", "p": 1.0, "q": "failed"},
        {"method": "b", "p": "not run", "q": 2.0},
    ]


def test_promises():
    kept = [
        measure.promise("at most", 1.0, 1.0),
        measure.promise("at least", 3.0, least=3.0),
        measure.promise("between", 1.0, 1.1, least=0.9),
    ]
    broken = [
        measure.promise("below", 1.0, 1.0, below=True),
        measure.promise("no less", 2.9, least=3.0),
        measure.promise("nothing", float("nan"), 1.0),
    ]
    assert [row["kept"] for row in kept + broken] == ["yes"] * 3 + ["NO"] * 3
    assert sections.promise_sentences({"promises": kept}) == "3 of 3 were kept."
    assert sections.promise_sentences({"promises": kept + broken}) == (
        "3 of 6 were kept. Not kept: below; no less; nothing."
    )


def test_columns_without_values_are_not_shown():
    table = measure.markdown_table([{"a": 1, "b": None}, {"a": None, "b": None}])
    assert "a" in table and "b" not in table


def test_one_false_claim_of_success_is_found():
    problem = problems.linear(0.5, batch=3)
    residual = np.array([1e-9, 1e-3, np.nan])
    claims = methods.false_claims(problem, residual, np.array([True, True, False]))
    assert claims.tolist() == [False, True, False]
    says = methods.verdict(problem, residual, None, np.array([True, False, True]))
    assert says.startswith("WRONG: 1 successful")
    assert methods.verdict(problem, residual, None, False).startswith("failed")


WORKER = """
import json, os, sys, time
print(json.dumps({"methods": ["works"]}), flush=True)
for line in sys.stdin:
    method = json.loads(line)["method"]
    if method == "dies":
        os._exit(3)
    if method == "hangs":
        time.sleep(600)
    print(json.dumps({"seconds": 1.0}), flush=True)
"""


def test_worker_that_ended_is_begun_afresh(tmp_path, monkeypatch):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    monkeypatch.setattr(peers, "WORKER", script)
    worker = peers.Worker("made", sys.executable, tmp_path, limit=60)
    assert worker.hello == {"methods": ["works"]}
    assert "ended with code 3" in worker.ask(method="dies")["missing"]
    assert worker.ask(method="works") == {"seconds": 1.0}
    worker.limit = 0.1
    assert worker.ask(method="hangs") == {"missing": "not done in 0 s"}
    worker.limit = 60
    assert worker.ask(method="works") == {"seconds": 1.0}
    worker.ask(method="dies")
    worker.close()


def test_worker_that_cannot_start(tmp_path, monkeypatch):
    script = tmp_path / "worker.py"
    script.write_text("import time; time.sleep(600)")
    monkeypatch.setattr(peers, "WORKER", script)
    worker = peers.Worker("made", sys.executable, tmp_path, limit=0.1)
    assert worker.hello == worker.ask(method="works") == {"missing": "not done in 0 s"}
    worker.close()
