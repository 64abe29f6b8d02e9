"""How good is every adjoint's gradient, and what does it cost in time and memory?

The relative error and the cosine to the exact gradient, the time of the backward pass
alone, and temporary memory, on dense and convolutional cells from easy to hard; what
the adjoints promise; and memory against the number of solver steps.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optimistix as optx
import tyro
from matplotlib.figure import Figure
from measure import (
    compile_and_run,
    print_table,
    progress,
    promise,
    promise_figure,
    Row,
    save,
    Settings,
    time_calls,
)
from methods import gradient_program, Method
from problems import (
    conv_tanh,
    dense_tanh,
    layer_cell,
    Problem,
    Reference,
    reference,
    resnet,
)

import implicitnets as inn


RADII = (0.5, 0.9, 0.99)
# Tight, so that a gradient's error is the adjoint's.
TOLERANCE = 1e-6
DEPTHS = (5, 20, 50, 200)


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Compare the adjoints of the library."""

    batch: int = 16
    """How many examples to solve."""


def methods() -> list[Method]:
    """Every adjoint.

    All solve with Broyden's method, whose inverse SHINE needs, but for the reversible
    one, which has a solver of its own.
    """
    exact = inn.ImplicitAdjoint(inn.GivensGMRES(rtol=1e-4, atol=0.0))
    adjoints = {
        "implicit": exact,
        "implicit, Anderson": inn.ImplicitAdjoint(
            inn.FixedPointLinearSolver(inn.AndersonAcceleration(1e-4, 0.0))
        ),
        "Jacobian-free": inn.JacobianFreeAdjoint(),
    }
    for number in (2, 5, 20):
        adjoints[f"phantom, {number} steps"] = inn.PhantomAdjoint(number)
    for number in (2, 6):
        adjoints[f"Neumann, {number} terms"] = inn.NeumannAdjoint(number)
    for number in (0, 1, 5):
        adjoints[f"SHINE, {number} refinements"] = inn.ShineAdjoint(number)
    solver = inn.Broyden(TOLERANCE, 0.0)
    rows = [Method(name, solver, adjoint=adjoint) for name, adjoint in adjoints.items()]
    reversible = inn.ReversibleFixedPoint(TOLERANCE, 0.0, damping=0.5)
    adjoint = inn.ReversibleAdjoint()
    rows.append(Method("reversible", reversible, adjoint=adjoint, max_steps=12))
    unrolled = optx.RecursiveCheckpointAdjoint()
    rows.append(Method("unrolled", solver, adjoint=unrolled, max_steps=300))
    return rows


def pull_back_program(problem: Problem, method: Method) -> Callable:
    """`(weights, x) -> (z_star, pull_back)`: the forward part of a gradient."""

    def forward(weights, x):
        def solve(weights):
            return jax.vmap(method.layer(layer_cell(problem.kind, weights)))(x)

        return jax.vjp(solve, weights)

    return forward


def compare(config: Config, problem: Problem) -> list[Row]:
    """Every adjoint on one problem."""
    problem = dataclasses.replace(
        problem,
        inputs=problem.inputs[: config.batch],
        cotangent=problem.cotangent[: config.batch],
    )
    ref = reference(problem)
    rows, calls = [], {}
    for method in progress(methods(), problem.name):
        row, call = prepare(ref, method)
        calls[method.name] = call
        rows.append(row)
    seconds = time_calls(calls, config.repeats, f"{problem.name}, timing")
    return [{**row, "backward (ms)": 1e3 * seconds[row["adjoint"]]} for row in rows]


def prepare(ref: Reference, method: Method) -> tuple[Row, Callable[[], Any]]:
    """A table row without its time, and the backward pass to be timed."""
    problem = ref.problem
    weights, x, cotangent = jax.tree.map(
        jnp.asarray, (problem.weights, problem.inputs, problem.cotangent)
    )
    _, pull_back = jax.jit(pull_back_program(problem, method))(weights, x)
    backward, (gradient,) = compile_and_run(
        lambda pull_back, ct: pull_back(ct), pull_back, cotangent
    )
    gradient = jax.tree.map(np.asarray, gradient)
    arguments = weights, x, cotangent
    row: Row = {
        "problem": problem.name,
        "adjoint": method.name,
        "gradient error": ref.gradient_error(gradient),
        "cosine": ref.cosine(gradient),
        "temp (MB)": megabytes(gradient_program(problem, method), *arguments),
    }
    return row, backward.call


def megabytes(program: Callable, *arguments: Any) -> float:
    """The temporary memory of a program. It is compiled, and not run."""
    memory = jax.jit(program).lower(*arguments).compile().memory_analysis()
    return float("nan") if memory is None else memory.temp_size_in_bytes / 1e6


def promises(rows: list[Row]) -> list[Row]:
    """What the adjoints promise, from the table."""
    lines = []
    names = list(dict.fromkeys(row["problem"] for row in rows))
    for name in names:
        of = {row["adjoint"]: row for row in rows if row["problem"] == name}

        def error(adjoint, of=of):
            return of[adjoint]["gradient error"]

        steps = ["Jacobian-free"] + [f"phantom, {n} steps" for n in (2, 5, 20)]
        for fewer, more in zip(steps, steps[1:], strict=False):
            what = f"{name}: error, {more} / {fewer}"
            lines.append(promise(what, error(more) / error(fewer), 1.0))
        if "0.99" in name:
            for cheap in ("Jacobian-free", "SHINE, 0 refinements"):
                ratio = of[cheap]["backward (ms)"] / of["implicit"]["backward (ms)"]
                lines.append(promise(f"{name}: time, {cheap} / implicit", ratio, 0.1))
    return lines


def shine(rows: list[Row]) -> list[Row]:
    """Whether what Broyden's method has learned helps, at equal cost.

    A refinement of SHINE costs a product, as does a term of the series after the first.
    """
    table = []
    for name in dict.fromkeys(row["problem"] for row in rows):
        of = {r["adjoint"]: r["gradient error"] for r in rows if r["problem"] == name}
        table.append(
            {
                "problem": name,
                "Jacobian-free": of["Jacobian-free"],
                "SHINE": of["SHINE, 0 refinements"],
                "Neumann, 2 terms": of["Neumann, 2 terms"],
                "SHINE, 1 product": of["SHINE, 1 refinements"],
                "Neumann, 6 terms": of["Neumann, 6 terms"],
                "SHINE, 5 products": of["SHINE, 5 refinements"],
            }
        )
    return table


def memory() -> list[Row]:
    """Temporary memory of a gradient against the solver's steps, on the ResNet cell."""
    problem = resnet(batch=4)
    arguments = jax.tree.map(
        jnp.asarray, (problem.weights, problem.inputs, problem.cotangent)
    )
    solver = inn.AndersonAcceleration(rtol=0.0, atol=0.0)
    adjoints = {
        "implicit": inn.ImplicitAdjoint(),
        "Jacobian-free": inn.JacobianFreeAdjoint(),
        "phantom, 5 steps": inn.PhantomAdjoint(5),
        "Anderson, checkpointed": optx.RecursiveCheckpointAdjoint(),
    }

    def unrolled(depth):
        def loss(weights, x, cotangent):
            cell = layer_cell(problem.kind, weights)
            layer = inn.DeepEquilibriumNetwork(cell, fixed_depth=depth)
            return jnp.sum(jax.vmap(layer)(x) * cotangent)

        return jax.grad(loss)

    rows = []
    for depth in progress(DEPTHS, "memory"):
        row: Row = {"steps": depth}
        for name, adjoint in adjoints.items():
            method = Method(name, solver, adjoint=adjoint, max_steps=depth)
            row[name] = megabytes(gradient_program(problem, method), *arguments)
        row["plain iteration, unrolled"] = megabytes(unrolled(depth), *arguments)
        rows.append(row)
    return rows


def draw_errors(rows: list[Row]) -> Figure:
    """Error against backward time, a panel a problem."""
    names = list(dict.fromkeys(row["problem"] for row in rows))
    figure, axes = plt.subplots(
        2, 3, figsize=(15, 9), layout="constrained", sharey=True
    )
    for axis, name in zip(axes.flat, names, strict=True):
        for i, row in enumerate(r for r in rows if r["problem"] == name):
            axis.loglog(
                row["backward (ms)"],
                row["gradient error"],
                marker="ov^<>spDX*Pd"[i % 12],
                linestyle="none",
                label=row["adjoint"],
            )
        axis.set(title=name, xlabel="backward (ms)")
    for axis in axes[:, 0]:
        axis.set_ylabel("relative error of the gradient")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6)
    return figure


def draw_memory(rows: list[Row]) -> Figure:
    """Memory against steps, a line an adjoint."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name in (key for key in rows[0] if key != "steps"):
        axis.loglog(
            [row["steps"] for row in rows],
            [row[name] for row in rows],
            marker="o",
            label=name,
        )
    axis.set(xlabel="solver steps", ylabel="temporary memory (MB)")
    axis.legend()
    return figure


def main() -> None:
    config = tyro.cli(Config)
    rows = []
    for make in (dense_tanh, conv_tanh):
        for radius in RADII:
            new_rows = compare(config, make(radius))
            print_table(new_rows[0]["problem"], new_rows)
            rows += new_rows
    shine_rows = shine(rows)
    print_table("Errors at equal cost", shine_rows)
    memory_rows = memory()
    print_table("Temporary memory (MB)", memory_rows)
    lines = promises(rows)
    for name in ("implicit", "Jacobian-free", "phantom, 5 steps"):
        sizes = [row[name] for row in memory_rows]
        what = f"memory, {DEPTHS[-1]} / {DEPTHS[0]} steps: {name}"
        lines.append(promise(what, max(sizes) / min(sizes), 1.1))
    print_table("What the adjoints promise", lines)
    save(
        config,
        "gradients",
        {"rows": rows, "shine": shine_rows, "memory": memory_rows, "promises": lines},
        draw_errors(rows),
        draw_memory(memory_rows),
        promise_figure(lines),
    )


if __name__ == "__main__":
    main()
