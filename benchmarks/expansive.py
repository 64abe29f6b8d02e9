"""How many equilibria of maps that expand does each solver find, and at what cost?

`tanh(W z + x)` with 256 random units always has an equilibrium. At a spectral radius
above one the plain iteration leaves it, and the residual has minima that are none.
Every solver gets a thousand steps. A solve that is successful is checked: it counts as
claimed falsely if the stopping rule does not hold for its residual.
"""

import dataclasses
import time
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import tyro
from jaxtyping import Array

import implicitnets as inn

from .kit.problems import dense_tanh, jax_cell
from .kit.results import save, Settings
from .kit.tables import print_table, Row
from .kit.timing import progress


RTOL, ATOL = 1e-4, 1e-6
SOLVERS: dict[str, Any] = {
    "AndersonAcceleration": inn.AndersonAcceleration(RTOL, ATOL),
    "AndersonAcceleration(history_size=10)": inn.AndersonAcceleration(
        RTOL, ATOL, history_size=10
    ),
    "Broyden": inn.Broyden(RTOL, ATOL),
    "Broyden(history_size=30)": inn.Broyden(RTOL, ATOL, history_size=30),
    "NewtonKrylov": inn.NewtonKrylov(RTOL, ATOL),
    "NewtonKrylov(memory=10), restart 60": inn.NewtonKrylov(
        RTOL, ATOL, linear_solver=inn.GivensGMRES(0.5, 0.0, restart=60), memory=10
    ),
    "SteadyState(Tsit5)": inn.SteadyState(dfx.Tsit5(), RTOL, ATOL),
    "AutoSolver": inn.AutoSolver(RTOL, ATOL),
}


@dataclasses.dataclass(frozen=True)
class ExpansiveSettings(Settings):
    """Solve on maps that expand."""

    radii: tuple[float, ...] = (1.2, 1.5, 2.0)
    """Draw matrices of these spectral radii."""
    seeds: int = 20
    """Draw so many matrices of each."""
    examples: int = 8
    """Solve for so many inputs with each."""
    size: int = 256
    """The number of units."""
    max_steps: int = 1000
    """Stop a solve after so many steps."""


# Of the module, so that a solver is compiled once for all radii.
CELL = jax_cell("tanh")


def zero_state(args: Any) -> Array:
    """Zeros like the input."""
    _, x = args
    return jnp.zeros_like(x)


@eqx.filter_jit
def solve(
    layer: inn.DeepEquilibriumNetwork, weights: dict[str, Array], xs: Array
) -> inn.EquilibriumSolution:
    """The solutions of a batch with the same weights."""
    return jax.vmap(lambda x: layer.solve((weights, x)))(xs)


def measure(name: str, radius: float, settings: ExpansiveSettings) -> Row:
    """One solver's solves with every matrix of one radius."""
    layer = inn.DeepEquilibriumNetwork(
        CELL, SOLVERS[name], max_steps=settings.max_steps, zero_state=zero_state
    )
    problems = [
        dense_tanh(radius, settings.size, settings.examples, seed)
        for seed in range(settings.seeds)
    ]
    solve(layer, *_arrays(problems[0]))
    start = time.perf_counter()
    sols = [jax.block_until_ready(solve(layer, *_arrays(p))) for p in problems]
    seconds = time.perf_counter() - start
    sol = jax.tree.map(lambda *leaves: np.concatenate(leaves), *sols)
    successful = np.asarray(sol.result == optx.RESULTS.successful)
    residual, value = (
        np.linalg.norm(x, axis=1) for x in (sol.residual, sol.z_star + sol.residual)
    )
    # A rounding above the tolerance is no lie.
    holds = residual <= 1.01 * (ATOL + RTOL * value)
    solved = successful & holds
    stats, per_solution = sol.stats, max(np.sum(solved), 1)
    return {
        "problem": f"tanh {settings.size}, radius {radius}",
        "solver": name,
        "solved (%)": 100 * np.mean(solved),
        "claimed falsely": int(np.sum(successful & ~holds)),
        "evaluations a solution": np.sum(stats["nfe"]) / per_solution,
        "products a solution": np.sum(stats["num_matvecs"]) / per_solution
        if "num_matvecs" in stats
        else None,
        "time a solution (ms)": 1e3 * seconds / per_solution,
        "by stage (%)": "  ".join(
            f"{100 * np.mean(solved & (stats['stage'] == stage)):.0f}"
            for stage in range(3)
        )
        if "stage" in stats
        else None,
    }


def _arrays(problem):
    return jax.tree.map(jnp.asarray, (problem.weights, problem.inputs))


def main() -> None:
    settings = tyro.cli(ExpansiveSettings)
    rows = [
        measure(name, radius, settings)
        for radius in settings.radii
        for name in progress(SOLVERS, f"radius {radius}")
    ]
    print_table("Maps that expand", rows)
    save(settings, "expansive", {"rows": rows})


if __name__ == "__main__":
    main()
