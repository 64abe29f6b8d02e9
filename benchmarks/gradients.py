"""How good is every adjoint's gradient, and what does it cost in time and memory?

The relative error and the cosine to the exact gradient, the Jacobian products and the
time of the backward pass alone, and temporary memory, on dense and convolutional cells
from easy to hard; and memory against the number of solver steps.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import tyro
from jaxtyping import Array

import implicitnets as inn

from .kit.methods import backward_products, gradient_program, Method, ROUNDING
from .kit.problems import conv_tanh, dense_tanh, layer_cell, Problem, resnet
from .kit.reference import Reference, reference, residuals
from .kit.results import save, TimingSettings
from .kit.tables import print_table, Row
from .kit.timing import compile_and_run, progress, time_calls


# Tight, so that a gradient's error is the adjoint's.
TOLERANCE = 1e-6
# A loss may be as small as this.
SCALE = 1e-8
DEPTHS = (5, 50, 200)
MEMORY = "temporary memory (MB)"
UNROLLED = "plain iteration, unrolled"


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
    problem = problem.first(config.batch)
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
        programs = {
            name: gradient_program(
                problem, Method(name, solver, adjoint=adjoint, max_steps=depth)
            )
            for name, (solver, adjoint) in pairs.items()
        }
        programs[UNROLLED] = unrolled(depth)
        for name, program in programs.items():
            taken = megabytes(program, *arguments)
            rows.append({"adjoint": name, "steps": depth, MEMORY: taken})
    return rows


def main() -> None:
    config = tyro.cli(Config)
    rows = []
    for make in (dense_tanh, conv_tanh):
        for radius in config.radii:
            new_rows = compare(config, make(radius))
            print_table(new_rows[0]["problem"], new_rows)
            rows += new_rows
    memory_rows = memory()
    print_table("Temporary memory (MB)", memory_rows)
    save(config, "gradients", {"rows": rows, "memory": memory_rows})


if __name__ == "__main__":
    main()
