"""What the benchmarks share: the checks of a row, and other libraries' processes."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import implicitnets as inn
from benchmarks.kit import problems, rows
from benchmarks.kit.methods import gradient_program, Method
from benchmarks.kit.reference import reference
from benchmarks.peers.__main__ import fastest, WORKER
from benchmarks.peers.client import Client
from benchmarks.warm_start import compare


pytestmark = pytest.mark.one_precision


def test_one_false_claim_of_success_is_found():
    problem = problems.linear(0.5, batch=3)
    residual = np.array([1e-9, 1e-3, np.nan])
    claims = rows.false_claims(problem, residual, np.array([True, True, False]))
    assert claims.tolist() == [False, True, False]
    says = rows.verdict(problem, residual, None, np.array([True, False, True]))
    assert says.startswith("WRONG: 1 successful")
    assert rows.verdict(problem, residual, None, False).startswith("failed")


def test_reference_is_the_linear_solution():
    problem = problems.linear(0.9, batch=2)
    ref = reference(problem)
    matrix = problem.weights["matrix"].astype(float)
    inverse = np.linalg.inv(np.eye(len(matrix)) - matrix)
    exact = problem.inputs @ inverse.T
    assert ref.error(exact) < 1e-8
    adjoint = problem.cotangent @ inverse
    assert ref.gradient_error({"matrix": adjoint.T @ exact}) < 1e-8
    assert ref.cosine({"matrix": -adjoint.T @ exact}) == pytest.approx(-1)


def test_row_of_a_solver_that_stops_early_has_no_time():
    problem = problems.linear(0.9, batch=2)
    solver = optx.FixedPointIteration(0.0, 1.0, norm=optx.two_norm)
    prepared = rows.prepare(problem, None, Method("loose", solver))
    assert prepared.row["result"].startswith("WRONG: 2 successful")
    assert prepared.row["false claims"] == 2 and not prepared.passed


def test_memory_of_a_gradient_does_not_grow_with_the_steps():
    problem = problems.dense_tanh(0.9, size=16, batch=2)
    arguments = jax.tree.map(
        jnp.asarray, (problem.weights, problem.inputs, problem.cotangent)
    )

    def taken(solver, adjoint, max_steps):
        method = Method("", solver, adjoint=adjoint, max_steps=max_steps)
        program = jax.jit(gradient_program(problem, method))
        memory = program.lower(*arguments).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    anderson = inn.AndersonAcceleration(0.0, 0.0)
    implicit = [taken(anderson, inn.ImplicitAdjoint(), n) for n in (5, 100)]
    assert implicit[0] == implicit[1]
    picard = optx.FixedPointIteration(0.0, 0.0)
    unrolled = [taken(picard, optx.RecursiveCheckpointAdjoint(), n) for n in (5, 100)]
    assert unrolled[1] > 1.2 * unrolled[0]


def test_warm_start_saves_evaluations():
    for row in compare():
        cold = row["evaluations from zero"]
        assert row["evaluations from the last equilibrium"] < cold


def test_fastest_method_of_each_library():
    def row(library, method, ms):
        return {
            "problem": "p",
            "library": library,
            "method": method,
            **({} if ms is None else {"solve + gradient (ms)": ms}),
        }

    timed = [
        row("implicitnets", "Anderson, GMRES", 4.0),
        row("implicitnets", "Picard", 2.0),
        row("banax", "Anderson", 6.0),
        row("banax", "Anderson, small ridge", 5.0),
        row("banax", "Picard", None),
    ]
    found = {
        (row["algorithm"], row["library"]): (row["method"], row["time / implicitnets"])
        for row in fastest(timed)
    }
    assert found == {
        ("Anderson", "implicitnets"): ("Anderson, GMRES", 1.0),
        ("Anderson", "banax"): ("Anderson, small ridge", 1.25),
        ("any", "implicitnets"): ("Picard", 1.0),
        ("any", "banax"): ("Anderson, small ridge", 2.5),
    }


WORKER_TEXT = """
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


def test_worker_that_ended_is_started_again(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER_TEXT)
    worker = Client("made", [sys.executable, str(script)], tmp_path, limit=60)
    assert worker.hello == {"methods": ["works"]}
    assert "ended with code 3" in worker.ask(method="dies")["missing"]
    assert worker.ask(method="works") == {"seconds": 1.0}
    worker.limit = 0.1
    assert worker.ask(method="hangs") == {"missing": "not done in 0 s"}
    worker.limit = 60
    assert worker.ask(method="works") == {"seconds": 1.0}
    worker.ask(method="dies")
    worker.close()


def test_worker_that_cannot_start(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text("import time; time.sleep(600)")
    worker = Client("made", [sys.executable, str(script)], tmp_path, limit=0.1)
    assert worker.hello == worker.ask(method="works") == {"missing": "not done in 0 s"}
    worker.close()


def test_worker_of_this_library_passes_its_checks(tmp_path):
    problem = problems.linear(0.5, size=10, batch=2)
    ref = reference(problem)
    problem.save(tmp_path / "problem.npz")
    np.save(tmp_path / "norms.npy", ref.norms)
    command = [sys.executable, *WORKER]
    worker = Client("implicitnets", command, tmp_path, limit=120)
    row = worker.prepare(ref, "Anderson, GMRES")
    worker.close()
    assert row["result"] == "ok" and row["gradient error"] < 1e-2


def test_worker_needs_only_numpy(tmp_path):
    """Where a library is missing it says so, and the others of ours are not loaded."""
    problem = problems.linear(0.5, size=10, batch=2)
    problem.save(tmp_path / "problem.npz")
    np.save(tmp_path / "norms.npy", np.ones(2))
    blocked = "jax", "implicitnets", "optimistix", "torchdeq", "tabulate", "tyro"
    code = (
        "import runpy, sys\n"
        f"sys.modules.update(dict.fromkeys({blocked}))\n"
        "runpy.run_module('benchmarks.peers.worker', run_name='__main__')\n"
    )
    command = [sys.executable, "-c", code]
    worker = Client("torchdeq", command, tmp_path, limit=60)
    assert "torch" in worker.hello["missing"]
    worker.close()
