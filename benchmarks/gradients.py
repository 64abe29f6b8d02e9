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
import optimistix as optx
import tyro

import implicitnets as inn

from .kit.backward import prepare_backward, TOLERANCE
from .kit.methods import gradient_program, Method
from .kit.problems import conv_tanh, dense_tanh, layer_cell, Problem, resnet
from .kit.reference import reference
from .kit.results import save, TimingSettings
from .kit.tables import print_table, Row
from .kit.timing import progress, time_calls


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
    implicit, solver = inn.ImplicitAdjoint, inn.Broyden(TOLERANCE, 0.0)
    anderson = inn.FixedPointLinearSolver(inn.AndersonAcceleration(1e-4, 0.0))
    # With the Jacobian products that each takes, where that is always as many.
    adjoints: dict[str, tuple[optx.AbstractAdjoint, int | None]] = {
        "implicit": (implicit(inn.GivensGMRES(rtol=1e-4, atol=0.0)), None),
        "implicit, Anderson": (implicit(anderson), None),
        "Jacobian-free": (inn.JacobianFreeAdjoint(), 0),
    }
    for steps in (2, 5, 20):
        adjoints[f"phantom, {steps} steps"] = inn.PhantomAdjoint(steps), steps - 1
    for terms in (3, 7):
        adjoints[f"Neumann, {terms} terms"] = inn.NeumannAdjoint(terms), terms - 1
    for products in (2, 6):
        stopped = inn.GivensGMRES(rtol=0.0, atol=0.0, max_steps=products)
        adjoints[f"GMRES, {products} products"] = implicit(stopped), products
    adjoints["SHINE, 0 refinements"] = inn.ShineAdjoint(0), 0
    adjoints["SHINE, 1 refinement"] = inn.ShineAdjoint(1), 2
    adjoints["SHINE, 5 refinements"] = inn.ShineAdjoint(5), 6
    return [
        *(
            Method(name, solver, adjoint=adjoint, backward_products=products)
            for name, (adjoint, products) in adjoints.items()
        ),
        Method(
            "reversible",
            inn.ReversibleFixedPoint(TOLERANCE, 0.0, damping=0.5),
            adjoint=inn.ReversibleAdjoint(),
            # No more steps than can be undone in float32.
            max_steps=12,
        ),
        Method(
            "unrolled",
            solver,
            adjoint=optx.RecursiveCheckpointAdjoint(),
            max_steps=300,
        ),
    ]


def compare(config: Config, problem: Problem) -> list[Row]:
    """Every adjoint on one problem."""
    problem = problem.first(config.batch)
    ref = reference(problem)
    rows, calls = [], {}
    for method in progress(methods(), problem.name):
        row, call = prepare_backward(ref, method)
        calls[method.name] = call
        rows.append(row)
    seconds = time_calls(calls, config.repeats, f"{problem.name}, timing")
    return [{**row, "backward (ms)": 1e3 * seconds[row["adjoint"]]} for row in rows]


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
