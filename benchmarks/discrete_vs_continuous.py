"""Do ODE solvers reach the equilibrium of a cell at the price of discrete solvers?

Every discrete solver and every ODE solver to the same tolerance, on random and trained
weights, on a map that expands and on a linear one: what the solver says next to the
residual that was measured, the errors of equilibrium and gradient, evaluations of the
cell, times, and the residual after every evaluation.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import implicitnets as inn

from .kit.methods import continuous_methods, discrete_methods
from .kit.problems import jax_cell, Problem
from .kit.reference import reference
from .kit.results import save, TimingSettings
from .kit.rows import prepare, time_rows
from .kit.tables import print_table, Row
from .kit.timing import progress
from .training.problems import PROBLEMS


# A random network that expands has many equilibria, so no reference.
EXPANSIVE = ("dense-1.2",)
# The solvers whose residuals are kept after every evaluation.
TRACED = (
    "Picard (Optimistix)",
    "Anderson",
    "Anderson, history 10",
    "Broyden",
    "Newton-Krylov",
    "Tsit5",
    "VCABM3",
)
TRACED_COST = 120
TRACED_EXAMPLES = 16


@dataclasses.dataclass(frozen=True)
class Config(TimingSettings):
    """Compare discrete solvers with ODE solvers followed to the steady state."""

    problems: tuple[str, ...] = (
        *("dense-0.5", "dense-0.9", "dense-0.99", "dense-1.2"),
        *("resnet", "trained", "lin"),
    )
    """Which problems to solve."""
    batch: int = 32
    """How many examples of a nonlinear problem to solve."""


def compare(config: Config, problem: Problem, *, expansive: bool) -> list[Row]:
    """Every solver on one problem."""
    ref = None if expansive else reference(problem)
    norm = 1.0 if ref is None else float(ref.norms.min())
    kinds = {
        "discrete": discrete_methods(problem, norm),
        "continuous": continuous_methods(problem),
    }
    prepared, kind_of = [], []
    for kind, methods in kinds.items():
        for method in progress(methods, f"{problem.name}, {kind}"):
            prepared.append(prepare(problem, ref, method))
            kind_of.append(kind)
    rows = time_rows(prepared, config.repeats, f"{problem.name}, timing")
    return [{"kind": kind, **row} for kind, row in zip(kind_of, rows, strict=True)]


def traces(problem: Problem) -> list[Row]:
    """The mean relative residual of some examples after every step of some solvers."""
    methods = discrete_methods(problem, 1e-6) + continuous_methods(problem)
    rows = []
    for method in (method for method in methods if method.name in TRACED):
        for cost, residual in zip(*trace(problem, method.solver), strict=True):
            # Once every example has stopped, nothing changes.
            if cost > TRACED_COST or rows and rows[-1].get("residual") == residual:
                break
            rows.append(
                {
                    "problem": problem.name,
                    "method": method.name,
                    "evaluations and products": float(cost),
                    "residual": float(residual),
                }
            )
    return rows


def trace(problem: Problem, solver: Any) -> tuple[np.ndarray, np.ndarray]:
    """The mean cost and residual of the examples after every step."""
    cell = jax_cell(problem.kind)

    def one(x):
        found = inn.residual_trace(
            cell, solver, jnp.zeros_like(x), (problem.weights, x), max_steps=TRACED_COST
        )
        assert found.nfe is not None
        products = 0 if found.num_matvecs is None else found.num_matvecs
        return found.nfe + products, found.relative

    cost, relative = jax.jit(jax.vmap(one))(problem.inputs[:TRACED_EXAMPLES])
    return np.asarray(cost).mean(axis=0), np.asarray(relative).mean(axis=0)


def main() -> None:
    config = tyro.cli(Config)
    rows, curves = [], []
    for name in config.problems:
        problem = PROBLEMS[name](config.output_dir)
        # The linear one is too cheap to be timed on a few.
        if problem.kind != "linear":
            problem = problem.first(config.batch)
        new_rows = compare(config, problem, expansive=name in EXPANSIVE)
        print_table(problem.name, new_rows)
        rows += new_rows
        curves += traces(problem)
    save(config, "discrete_vs_continuous", {"rows": rows, "traces": curves})


if __name__ == "__main__":
    main()
