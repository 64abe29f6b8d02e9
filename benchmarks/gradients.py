"""How good is every adjoint's gradient, and what does it cost in time and memory?

The relative error and the cosine to the exact gradient, the Jacobian products and the
time of the backward pass alone, and temporary memory, on dense and convolutional cells
from easy to hard; the errors at equal numbers of products; what the adjoints promise;
and memory against the number of solver steps.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import matplotlib.pyplot as plt
import numpy as np
import optimistix as optx
import tyro
from jaxtyping import Array
from matplotlib.figure import Figure

import implicitnets as inn

from .kit.measure import (
    compile_and_run,
    print_table,
    progress,
    promise,
    promise_figure,
    Row,
    save,
    time_calls,
    TimingSettings,
)
from .kit.methods import backward_products, gradient_program, Method, ROUNDING
from .kit.problems import (
    conv_tanh,
    dense_tanh,
    layer_cell,
    Problem,
    Reference,
    reference,
    residuals,
    resnet,
)


# Tight, so that a gradient's error is the adjoint's.
TOLERANCE = 1e-6
# A loss may be as small as this.
SCALE = 1e-8
DEPTHS = (5, 50, 200)
UNROLLED = "plain iteration, unrolled"
# Adjoints that cost so many products, with and without Broyden's inverse.
EQUAL_COST = {
    0: ("Jacobian-free", "SHINE, 0 refinements"),
    2: ("Neumann, 3 terms", "GMRES, 2 products", "SHINE, 1 refinement"),
    6: ("Neumann, 7 terms", "GMRES, 6 products", "SHINE, 5 refinements"),
}


@dataclasses.dataclass(frozen=True)
class Config(TimingSettings):
    """Compare the adjoints of the library."""

    batch: int = 16
    """How many examples to solve."""
    radii: tuple[float, ...] = (0.5, 0.9, 0.99)
    """The spectral radii of the cells."""


def methods() -> list[Method]:
    """Every adjoint.

    All solve with Broyden's method, whose inverse SHINE needs, but for the reversible
    one, which has a solver of its own.
    """
    adjoints = {
        "implicit": inn.ImplicitAdjoint(inn.GivensGMRES(rtol=1e-4, atol=0.0)),
        "implicit, Anderson": inn.ImplicitAdjoint(
            inn.FixedPointLinearSolver(inn.AndersonAcceleration(1e-4, 0.0))
        ),
        "Jacobian-free": inn.JacobianFreeAdjoint(),
        **{f"phantom, {n} steps": inn.PhantomAdjoint(n) for n in (2, 5, 20)},
        **{f"Neumann, {n} terms": inn.NeumannAdjoint(n) for n in (3, 7)},
        **{
            f"GMRES, {n} products": inn.ImplicitAdjoint(
                inn.GivensGMRES(rtol=0.0, atol=0.0, max_steps=n)
            )
            for n in (2, 6)
        },
        "SHINE, 0 refinements": inn.ShineAdjoint(0),
        "SHINE, 1 refinement": inn.ShineAdjoint(1),
        "SHINE, 5 refinements": inn.ShineAdjoint(5),
    }
    solver = inn.Broyden(TOLERANCE, 0.0)
    rows = [Method(name, solver, adjoint=adjoint) for name, adjoint in adjoints.items()]
    reversible = inn.ReversibleFixedPoint(TOLERANCE, 0.0, damping=0.5)
    adjoint = inn.ReversibleAdjoint()
    # No more steps than can be undone in float32.
    rows.append(Method("reversible", reversible, adjoint=adjoint, max_steps=12))
    unrolled = optx.RecursiveCheckpointAdjoint()
    rows.append(Method("unrolled", solver, adjoint=unrolled, max_steps=300))
    return rows


def count_products(problem: Problem, method: Method, z: Array) -> int | None:
    """The products of a backward pass, the most of an example; `None` if unknown.

    Those of the iterative adjoints are counted, the others' are what they are made of.
    """
    adjoint = method.adjoint
    if isinstance(adjoint, inn.JacobianFreeAdjoint):
        return 0
    if isinstance(adjoint, inn.NeumannAdjoint):
        return adjoint.num_terms - 1
    if isinstance(adjoint, inn.PhantomAdjoint):
        return adjoint.num_steps - 1
    if isinstance(adjoint, inn.ShineAdjoint):
        return adjoint.refinement_steps and adjoint.refinement_steps + 1
    if not isinstance(adjoint, inn.ImplicitAdjoint):
        return None
    linear_solver = adjoint.linear_solver
    if isinstance(linear_solver, lx.GMRES):
        return None
    if isinstance(linear_solver, inn.GivensGMRES) and linear_solver.rtol == 0.0:
        return linear_solver.max_steps
    arguments = problem.weights, problem.inputs, z, problem.cotangent
    products = backward_products(
        *arguments, kind=problem.kind, linear_solver=linear_solver
    )
    return int(products.max())


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
    z, pull_back = jax.jit(pull_back_program(problem, method))(weights, x)
    residual = float(residuals(problem, np.asarray(z)).max())
    backward, (gradient,) = compile_and_run(
        lambda pull_back, ct: pull_back(ct), pull_back, cotangent
    )
    gradient = jax.tree.map(np.asarray, gradient)
    (scaled,) = backward.at(pull_back, SCALE * cotangent)
    scaled = {name: np.asarray(g, float) / SCALE for name, g in scaled.items()}
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(pull_back))
    row: Row = {
        "problem": problem.name,
        "adjoint": method.name,
        "forward": "ok" if residual <= TOLERANCE + ROUNDING else "NOT CONVERGED",
        "forward residual": residual,
        "products": count_products(problem, method, z),
        "gradient error": ref.gradient_error(gradient),
        f"error at scale {SCALE:g}": ref.gradient_error(scaled),
        "cosine": ref.cosine(gradient),
        # What the backward pass is handed, and what it takes besides.
        "memory (MB)": (kept + backward.temp_bytes) / 1e6,
    }
    return row, backward.call


def megabytes(program: Callable, *arguments: Any) -> float:
    """The temporary memory of a program. It is compiled, and not run."""
    memory = jax.jit(program).lower(*arguments).compile().memory_analysis()
    return float("nan") if memory is None else memory.temp_size_in_bytes / 1e6


def promises(rows: list[Row]) -> list[Row]:
    """What the adjoints promise, from the table."""
    lines = []
    for name in dict.fromkeys(row["problem"] for row in rows):
        of = {row["adjoint"]: row for row in rows if row["problem"] == name}

        def ratio(column, adjoint, other, of=of):
            return of[adjoint][column] / of[other][column]

        exact = of["implicit"]
        ours = exact[f"error at scale {SCALE:g}"] / exact["gradient error"]
        what = f"{name}: implicit, error of a loss x {SCALE:g} / x 1"
        lines.append(promise(what, ours, 1.1))
        steps = ["Jacobian-free"] + [f"phantom, {n} steps" for n in (2, 5, 20)]
        for fewer, more in itertools.pairwise(steps):
            what = f"{name}: error, {more} / {fewer}"
            shrinks = ratio("gradient error", more, fewer)
            lines.append(promise(what, shrinks, 1.0, below=True))
        if "0.99" in name:
            for cheap in ("Jacobian-free", "SHINE, 0 refinements"):
                what = f"{name}: time, {cheap} / implicit"
                lines.append(
                    promise(what, ratio("backward (ms)", cheap, "implicit"), 0.1)
                )
    return lines


def shine(rows: list[Row]) -> list[Row]:
    """Whether what Broyden's method has learned helps, at equal cost.

    The columns say how many products each costs.
    """
    table = []
    for name in dict.fromkeys(row["problem"] for row in rows):
        of = {row["adjoint"]: row for row in rows if row["problem"] == name}
        line: Row = {"problem": name}
        for cost, adjoints in EQUAL_COST.items():
            for adjoint in adjoints:
                row = of[adjoint]
                if row["products"] != cost:
                    raise RuntimeError(f"{adjoint} took {row['products']} products.")
                column = f"{adjoint.split(',')[0]}, {cost} products"
                line[column] = row["gradient error"]
        table.append(line)
    return table


def memory() -> list[Row]:
    """Temporary memory of a gradient against the solver's steps, on the ResNet cell."""
    problem = resnet(batch=4)
    arguments = jax.tree.map(
        jnp.asarray, (problem.weights, problem.inputs, problem.cotangent)
    )
    anderson = inn.AndersonAcceleration(rtol=0.0, atol=0.0)
    reversible = inn.ReversibleFixedPoint(rtol=0.0, atol=0.0)
    broyden = inn.Broyden(rtol=0.0, atol=0.0)
    pairs = {
        "implicit": (anderson, inn.ImplicitAdjoint()),
        "Jacobian-free": (anderson, inn.JacobianFreeAdjoint()),
        "phantom, 5 steps": (anderson, inn.PhantomAdjoint(5)),
        "Neumann, 7 terms": (anderson, inn.NeumannAdjoint(7)),
        "SHINE, 5 refinements": (broyden, inn.ShineAdjoint(5)),
        "reversible": (reversible, inn.ReversibleAdjoint()),
        "Anderson, checkpointed": (anderson, optx.RecursiveCheckpointAdjoint()),
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
        for name, (solver, adjoint) in pairs.items():
            method = Method(name, solver, adjoint=adjoint, max_steps=depth)
            row[name] = megabytes(gradient_program(problem, method), *arguments)
        row[UNROLLED] = megabytes(unrolled(depth), *arguments)
        rows.append(row)
    return rows


def memory_promises(rows: list[Row]) -> list[Row]:
    """That memory does not grow with the steps, and that it does when unrolled."""
    lines = []
    first, last = rows[0], rows[-1]
    for name in first:
        if name not in ("steps", "Anderson, checkpointed", UNROLLED):
            sizes = [row[name] for row in rows]
            what = f"memory, {last['steps']} / {first['steps']} steps: {name}"
            lines.append(promise(what, max(sizes) / min(sizes), 1.1))

    def growth(row, other):
        return (other[UNROLLED] - row[UNROLLED]) / (other["steps"] - row["steps"])

    late, early = growth(*rows[-2:]), growth(*rows[:2])
    what = f"memory a step, late / early (1 is linear growth): {UNROLLED}"
    lines.append(promise(what, late / early, 1.1, least=0.9))
    return lines


def draw_errors(rows: list[Row]) -> Figure:
    """Error against backward time, a panel a problem."""
    names = list(dict.fromkeys(row["problem"] for row in rows))
    columns = -(-len(names) // 2)
    figure, axes = plt.subplots(
        2,
        columns,
        figsize=(5 * columns, 9),
        layout="constrained",
        sharey=True,
        squeeze=False,
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
        for radius in config.radii:
            new_rows = compare(config, make(radius))
            print_table(new_rows[0]["problem"], new_rows)
            rows += new_rows
    shine_rows = shine(rows)
    print_table("Errors of the gradient at equal numbers of products", shine_rows)
    memory_rows = memory()
    print_table("Temporary memory (MB)", memory_rows)
    lines = [*promises(rows), *memory_promises(memory_rows)]
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
