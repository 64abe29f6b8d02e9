"""What does every solver need, on maps from easy to expansive, and does it ever lie?

A table of every solver on every problem, with the solver's own verdict next to the
residual that was measured; the promises that the solvers make; and the residual against
the number of cell evaluations and Jacobian products.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import matplotlib.pyplot as plt
import numpy as np
import optimistix as optx
import tyro
from matplotlib.figure import Figure

import implicitnets as inn

from .kit.measure import (
    bar_figure,
    print_table,
    progress,
    promise,
    promise_figure,
    Row,
    save,
    TimingSettings,
)
from .kit.methods import (
    continuous_methods,
    discrete_methods,
    Method,
    NEWTON_GMRES,
    prepare,
    time_rows,
)
from .kit.problems import dense_tanh, jax_cell, linear, Problem, PROBLEMS, reference


# A random network that expands has many equilibria, so no reference.
EXPANSIVE = ("dense-1.2",)
# The solvers whose residuals are drawn: those that tell what they cost.
TRACED = (
    "Picard (Optimistix)",
    "Anderson",
    "Anderson, history 10",
    "Broyden",
    "Newton-Krylov",
    "Tsit5",
    "VCABM3",
)
# Kinds of cell on which the products of a stock solver are counted by a callback.
CHEAP = ("tanh", "linear")


@dataclasses.dataclass(frozen=True)
class Config(TimingSettings):
    """Compare the solvers of the library."""

    problems: tuple[str, ...] = (
        *("dense-0.5", "dense-0.9", "dense-0.99", "dense-1.2"),
        *("resnet", "trained", "lin"),
    )
    """Which problems to solve."""


def compare(config: Config, name: str) -> list[Row]:
    """Every solver on one problem."""
    problem = PROBLEMS[name](config.output_dir)
    ref = None if name in EXPANSIVE else reference(problem)
    norm = 1.0 if ref is None else float(ref.norms.min())
    methods = discrete_methods(problem, norm) + continuous_methods(problem)
    prepared = []
    for method in progress(methods, problem.name):
        item = prepare(problem, ref, method)
        if method.name == NEWTON_GMRES and problem.kind in CHEAP:
            item.row["products"] = count_products(problem, method.solver)
        prepared.append(item)
    return time_rows(prepared, config.repeats, f"{problem.name}, timing")


class CountingSolver(lx.AbstractLinearSolver):
    """A Lineax solver that counts its products."""

    solver: lx.AbstractLinearSolver
    count: Callable[[], None]

    def init(self, operator, options):
        return self.solver.init(operator, options)

    def compute(self, state, vector, options):
        def product(x):
            jax.debug.callback(self.count)
            return state.mv(x)

        operator = lx.FunctionLinearOperator(product, state.in_structure())
        return self.solver.compute(operator, vector, options)

    def transpose(self, state, options):
        return self.solver.transpose(state, options)

    def conj(self, state, options):
        return self.solver.conj(state, options)

    def assume_full_rank(self):
        return self.solver.assume_full_rank()


def newton_promises(config: Config) -> list[Row]:
    """`NewtonKrylov` against Optimistix' Newton with Lineax' GMRES."""
    rows = []
    for problem in (dense_tanh(0.9), dense_tanh(0.99), linear(0.95, batch=128)):
        ref = reference(problem)
        atol = problem.rtol * float(ref.norms.min())
        stock = optx.Newton(
            problem.rtol, atol, norm=optx.two_norm, linear_solver=lx.GMRES(1e-3, 1e-3)
        )
        # Optimistix' iteration ends far below the tolerance; ours is told to as well.
        theirs = prepare(problem, None, Method("Newton", stock))
        rtol = min(problem.rtol, theirs.row["residual"])
        ours = prepare(problem, None, Method("", inn.NewtonKrylov(rtol, 0.0)))
        for item in (ours, theirs):
            if item.row["residual"] > max(problem.rtol, rtol):
                raise RuntimeError(f"{problem.name}: {item.row['result']}.")
        timed = time_rows([ours, theirs], config.repeats, problem.name)
        our_seconds, their_seconds = (row["solve (ms)"] for row in timed)
        rows.append(
            promise(
                f"{problem.name}: Newton-Krylov / Newton with lx.GMRES, time",
                our_seconds / their_seconds,
                1 / 3,
            )
        )
        rows.append(
            promise(
                f"{problem.name}: the same, products of the slowest example",
                ours.row["products"] / count_products(problem, stock),
                1 / 2,
            )
        )
    return rows


def count_products(problem: Problem, newton: optx.Newton) -> int:
    """The products of a Newton method with a Krylov solver, the most of an example.

    One example after the other, so that none counts those that it waits for.
    """
    total = 0

    def count():
        nonlocal total
        total += 1

    counting = optx.Newton(
        newton.rtol,
        newton.atol,
        norm=newton.norm,
        linear_solver=CountingSolver(newton.linear_solver, count),
    )
    cell = jax_cell(problem.kind)

    @jax.jit
    def solve(x):
        return optx.fixed_point(
            cell,
            counting,
            jnp.zeros_like(x),
            (problem.weights, x),
            max_steps=Method.max_steps,
            throw=False,
        ).value

    counts = []
    for x in problem.inputs:
        total = 0
        jax.block_until_ready(solve(x))
        jax.effects_barrier()
        counts.append(total)
    return max(counts)


def evaluation_promises() -> list[Row]:
    """How many evaluations Broyden's method and the ODE solvers may need."""
    symmetric, nonsymmetric = linear(0.95), linear(0.99, symmetric=False)
    expansive, dense = linear(1.2), dense_tanh(0.9)

    def broyden(problem, history_size):
        return inn.Broyden(problem.rtol, 0.0, history_size=history_size)

    cases: list[tuple[str, Problem, Any, int]] = []
    for history_size, most in ((3, 60), (5, 45), (10, 40)):
        name = f"Broyden, history {history_size}"
        cases.append((name, symmetric, broyden(symmetric, history_size), most))
        cases.append((name, nonsymmetric, broyden(nonsymmetric, history_size), 1000))
    cases.append(("Broyden, full memory", expansive, broyden(expansive, 200), 200))
    for method in continuous_methods(dense):
        most = 250 if method.name == "Tsit5" else 1000
        cases.append((method.name, dense, method.solver, most))

    rows = []
    for name, problem, solver, most in progress(cases, "evaluations"):
        row = prepare(problem, None, Method(name, solver)).row
        failed = row["result"] != "ok"
        if row["evaluations"] is None:
            # An implicit ODE solver does not tell; then only success is asked for.
            rows.append(promise(f"{problem.name}: {name}, failed", float(failed), 0))
        else:
            measured = np.inf if failed else row["evaluations"]
            what = f"{problem.name}: {name}, evaluations"
            rows.append(promise(what, measured, most))
    return rows


def traces(config: Config) -> Figure:
    """The relative residual against evaluations and products, on three problems."""
    names = [n for n in ("dense-0.9", "trained", "lin") if n in config.problems]
    figure, axes = plt.subplots(
        1, len(names), figsize=(5 * len(names), 4), layout="constrained", squeeze=False
    )
    for axis, name in zip(axes.flat, names, strict=True):
        problem = PROBLEMS[name](config.output_dir)
        methods = discrete_methods(problem, 1e-6) + continuous_methods(problem)
        for method in (method for method in methods if method.name in TRACED):
            axis.semilogy(*trace(problem, method.solver), label=method.name)
        axis.set(title=problem.name, xlabel="evaluations and products")
        axis.set_ylim(bottom=problem.rtol / 10)
        axis.set_xlim(0, 150)
    axes[0, 0].set_ylabel("relative residual, mean of the batch")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=7
    )
    return figure


def trace(problem: Problem, solver: Any) -> tuple[np.ndarray, np.ndarray]:
    """The mean cost and residual of the batch after every step."""
    cell = jax_cell(problem.kind)

    def one(x):
        found = inn.residual_trace(
            cell, solver, jnp.zeros_like(x), (problem.weights, x), max_steps=150
        )
        assert found.nfe is not None
        products = 0 if found.num_matvecs is None else found.num_matvecs
        return found.nfe + products, found.relative

    cost, relative = jax.jit(jax.vmap(one))(problem.inputs[:16])
    return np.asarray(cost).mean(axis=0), np.asarray(relative).mean(axis=0)


def main() -> None:
    config = tyro.cli(Config)
    rows = []
    for name in config.problems:
        new_rows = compare(config, name)
        print_table(new_rows[0]["problem"], new_rows)
        rows += new_rows
    # Optimistix' solvers have rules of their own; what they claim is in the table.
    claims = sum(
        row.get("false claims", 0)
        for row in rows
        if not row["method"].endswith("(Optimistix)")
    )
    promises = [
        promise("examples said to be solved that are not", claims, 0),
        *newton_promises(config),
        *evaluation_promises(),
    ]
    print_table("What the solvers promise", promises)
    bars = bar_figure(
        rows,
        panel="problem",
        label="method",
        values=["solve (ms)", "solve + gradient (ms)"],
        unit="ms",
    )
    save(
        config,
        "solvers",
        {"rows": rows, "promises": promises},
        bars,
        promise_figure(promises),
        traces(config),
    )


if __name__ == "__main__":
    main()
