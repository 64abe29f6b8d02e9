"""How close to the root is a solve of few evaluations, next to the plain iteration?

Models are trained with 4 to 16 evaluations a solve, which is before most of them have
converged. Every solver is given so many steps, of one evaluation each, and told to
converge to nothing. The error is the mean distance from the roots, over that after as
many applications of the cell: above one is worse than a loop.
"""

import dataclasses
import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import tyro

import implicitnets as inn

from .kit.problems import jax_cell, Problem
from .kit.reference import reference
from .kit.results import save, Settings
from .kit.tables import print_table, Row
from .kit.timing import progress
from .training.problems import PROBLEMS


BUDGETS = (2, 4, 6, 8, 12, 16, 20)
SOLVERS: dict[str, Any] = {
    "AndersonAcceleration": inn.AndersonAcceleration(0.0, 0.0),
    "AndersonAcceleration(warmup=0)": inn.AndersonAcceleration(0.0, 0.0, warmup=0),
    "Broyden": inn.Broyden(0.0, 0.0),
    "Broyden(warmup=0)": inn.Broyden(0.0, 0.0, warmup=0),
    "NewtonKrylov": inn.NewtonKrylov(0.0, 0.0),
}


@dataclasses.dataclass(frozen=True)
class BudgetSettings(Settings):
    """Solve with few evaluations."""

    problems: tuple[str, ...] = (
        *("dense-0.5", "dense-0.9", "dense-0.99", "dense-1.2"),
        *("lin", "resnet", "trained"),
    )
    """Solve these problems."""
    examples: int = 16
    """Solve so many examples of each."""


def compare(problem: Problem) -> list[Row]:
    """The errors of every solver over those of the plain iteration."""
    roots = jnp.asarray(reference(problem).z_star, jnp.float32)
    cell = jax_cell(problem.kind)
    weights, xs = jax.tree.map(jnp.asarray, (problem.weights, problem.inputs))

    def error(states):
        norms = jnp.linalg.norm((states - roots).reshape(len(roots), -1), axis=1)
        return jnp.mean(norms)

    def plain(x, budget):
        return jax.lax.fori_loop(
            0, budget, lambda _, z: cell(z, (weights, x)), jnp.zeros_like(x)
        )

    def solve(solver, x, budget):
        return optx.fixed_point(
            cell,
            solver,
            jnp.zeros_like(x),
            (weights, x),
            max_steps=budget,
            adjoint=inn.ImplicitAdjoint(),
            throw=False,
        ).value

    def errors(find):
        of_batch = jax.jit(jax.vmap(find, in_axes=(0, None)))
        return np.array([error(of_batch(xs, jnp.array(n))) for n in BUDGETS])

    of_plain = errors(plain)
    return [
        {"problem": problem.name, "solver": name}
        | {
            f"{budget} evaluations": float(ratio)
            for budget, ratio in zip(
                BUDGETS, errors(ft.partial(solve, solver)) / of_plain, strict=True
            )
        }
        for name, solver in SOLVERS.items()
    ]


def main() -> None:
    settings = tyro.cli(BudgetSettings)
    rows = []
    for name in progress(settings.problems, "problems"):
        problem = PROBLEMS[name](settings.output_dir).first(settings.examples)
        rows += compare(problem)
    print_table("Errors over those of the plain iteration", rows)
    save(settings, "budgets", {"rows": rows})


if __name__ == "__main__":
    main()
