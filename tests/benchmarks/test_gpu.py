"""What is measured on a GPU, rehearsed on a CPU."""

import json
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.gpu import __main__ as gpu, cases, flags, programs, solves, training
from benchmarks.gpu.networks import Rounded
from benchmarks.gpu.record import earlier_tables, OutOfTime, Record
from benchmarks.gpu.timing import compile_all, Job, Program
from benchmarks.report.__main__ import PAGES
from benchmarks.report.page import render


pytestmark = pytest.mark.one_precision


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the command line, and returns what it wrote."""

    def call(*options):
        path = tmp_path / "gpu.json"
        command = ["gpu", "--small", "--out", str(path), *options]
        monkeypatch.setattr(sys, "argv", command)
        with jax.numpy_dtype_promotion("standard"):  # for Optax
            gpu.main()
        return json.loads(path.read_text())

    return call


def only(mapping, *names):
    return {name: mapping[name] for name in names}


@pytest.fixture
def one_case(monkeypatch):
    """Leaves out the other cells."""
    some = only(cases.cases(small=True), "dense-middle")
    monkeypatch.setattr(cases, "cases", lambda small: some)


@pytest.mark.usefixtures("one_case")
def test_rows_of_solvers_and_adjoints(run, monkeypatch):
    solvers = only(programs.SOLVERS, "FixedPointIteration", programs.ANDERSON)
    adjoints = only(programs.ADJOINTS, programs.IMPLICIT, "PhantomAdjoint(5)")
    monkeypatch.setattr(gpu, "SOLVERS", solvers)
    monkeypatch.setattr(gpu, "ADJOINTS", adjoints)
    record = run("--only", "solvers")
    assert record["quick"] and record["status"] == "ok"
    assert record["machine"]["device"] == "cpu"
    rows = {
        (row["precision"], row["method"]): row for row in record["tables"]["solvers"]
    }
    for precision in ("default", "float32"):
        row = rows[precision, programs.ANDERSON]
        assert row["converged"] == "4/4" and row["residual"] < 1.1e-3
        assert (
            1
            < row["evaluations"]
            < rows["default", "FixedPointIteration"]["evaluations"]
        )
        row = rows[precision, programs.IMPLICIT]
        assert row["gradient error"] < 1e-2 and row["converged"] == "4/4"
        assert (
            row["evaluations"] == rows[precision, programs.ANDERSON]["evaluations"] + 1
        )
        bare = rows[precision, "bare loop"]
        expected = (
            bare["to start (ms)"]
            + row["evaluations"] * bare["an evaluation (ms)"]
            + row["products"] * bare["a product (ms)"]
        )
        assert row[solves.BARE] == pytest.approx(expected)
        assert row[solves.RATIO] == pytest.approx(row[solves.GRADIENT] / expected)
    phantom = rows["default", "PhantomAdjoint(5)"]
    assert phantom["products"] == 5 and 1e-2 < phantom["gradient error"] < 1


@pytest.mark.usefixtures("one_case")
def test_other_parts_run(run, monkeypatch, tmp_path):
    record = run("--only", "images", "depth", "batch", "libraries")
    tables = record["tables"]
    assert not [row for row in tables["images"] if "result" in row]
    fixed, solved = tables["images"]
    assert fixed["evaluations"] == 5 and solved["phase"] == "equilibrium"
    assert solved["evaluations in training"] > 1 and solved["images / s"] > 0
    memory = {
        kind: [
            row["temporary (MB)"] for row in tables["depth"] if row["gradient"] == kind
        ]
        for kind in ("implicit", "unrolled")
    }
    assert len(set(memory["implicit"])) == 1
    assert memory["unrolled"][1] > memory["unrolled"][0]
    for row in tables["batch"]:
        expected = 1e3 * row["examples"] / row["time (ms)"]
        assert row["examples / s"] == pytest.approx(expected)
    ours = [row for row in tables["libraries"] if row["library"] == "implicitnets"]
    assert ours and all(row["residual"] < 1.1e-3 for row in ours)
    page = render(PAGES["gpu_report"], {"gpu": record}, tmp_path)
    assert "This section" not in page and "no measurements" in page
    assert page.count("![") == 6 and "unrolled, checkpointed" in page
    # Some parts again: the file keeps the others, which are of the same device.
    monkeypatch.setattr(gpu, "PARTS", {"depth": (lambda *_: None, 1.0)})
    again = run("--only", "depth")
    assert again["tables"]["depth"] == []
    assert again["tables"]["images"] == tables["images"]


def test_device_needs_no_packages_for_command_lines():
    """Machines with a GPU have what trains networks, and not all that is ours."""
    blocked = ("mlxtend", "tabulate", "tqdm", "tyro")
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({blocked}))\n"
        "import numpy as np\n"
        "import benchmarks.gpu.__main__, benchmarks.training.data\n"
        "from benchmarks.gpu.cases import dense\n"
        "from benchmarks.peers.libraries import implicitnets\n"
        "implicitnets(dense(2, 4).problem, np.ones(2))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_part_that_takes_too_long_says_so(run, monkeypatch):
    def slow(record, options):
        record.add("batch", {"problem": "first"})
        record.check_time()

    def broken(record, options):
        raise RuntimeError("no memory\nat all")

    monkeypatch.setattr(gpu, "PARTS", {"batch": (slow, -1.0), "depth": (broken, 1.0)})
    tables = run()["tables"]
    assert tables["batch"][0] == {"problem": "first"}
    assert tables["batch"][1]["result"].startswith("stopped after")
    assert tables["depth"] == [{"result": "RuntimeError: no memory"}]


def test_options_reach_the_compiler():
    job = Job(lambda x: 2 * x, (jnp.ones(3),), options={"no_option_of_xla": 1})
    (found,) = compile_all({"wrong": job}).values()
    assert isinstance(found, Exception) and "no_option_of_xla" in str(found)
    for options in flags.OPTIONS.values():
        job = Job(lambda x: 2 * x, (jnp.ones(3),), options=options)
        (found,) = compile_all({"right": job}).values()
        assert isinstance(found, Program) and found().tolist() == [2, 2, 2]


def test_file_is_written_after_every_row(tmp_path):
    path = tmp_path / "gpu.json"
    record = Record(path, "python", False, {})
    record.begin("batch", -1.0)
    record.add("batch", {"size": 1})
    assert json.loads(path.read_text())["tables"] == {"batch": [{"size": 1}]}
    with pytest.raises(OutOfTime):
        record.check_time()
    assert earlier_tables(path, False) == {"batch": [{"size": 1}]}
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "machine": {"device": "another"}}))
    assert earlier_tables(path, False) == {}


def test_command_does_not_show_paths():
    options = gpu.parse(["--data-dir", "/some/where", "--out", "/else"])
    assert gpu.command(options) == "python -m benchmarks.gpu --data-dir FOLDER"


def test_last_batch_is_filled_up_with_what_does_not_count():
    rows = training.batches(5, 3, np.random.default_rng(0))
    assert sorted(rows.ravel()) == [-1, 0, 1, 2, 3, 4] and rows[1, 2] == -1
    data = jnp.full((5, 2), 255, jnp.uint8), jnp.arange(5)
    inputs, targets = training.take(data, jnp.asarray(rows[1]))
    assert float(inputs.max()) == 1.0
    assert targets.tolist() == [*rows[1, :2], training.IGNORED]


def test_targets_of_a_text_are_its_next_characters(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcabcabcabcabcabcabcab")
    samples = training.text(path, length=4, size=None)
    inputs, targets = samples.train
    assert samples.num_classes == 3 and samples.targets_each == 4
    np.testing.assert_array_equal(targets, (inputs + 1) % 3)
    assert len(samples.test[1]) == 1 and len(inputs) == 4


def test_cell_that_is_rounded_keeps_its_state():
    weight = jnp.full((2, 2), 1 + 2.0**-10, jnp.float32)

    def multiply(cell, z, x):
        assert cell.dtype == z.dtype == x.dtype == jnp.bfloat16
        return cell @ z + x

    cell = Rounded(jax.tree_util.Partial(multiply, weight), jnp.bfloat16)
    z = jnp.ones(2, jnp.float32)
    out = cell(z, z)
    assert out.dtype == jnp.float32 and out.tolist() == [3.0, 3.0]
    assert eqx.filter(cell, eqx.is_array).cell.args[0].dtype == jnp.float32
