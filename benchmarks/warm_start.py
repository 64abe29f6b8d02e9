"""How many evaluations does a start at the last equilibrium save?

A dense cell is solved, its input is moved by a share of its norm, and it is solved
again: from zero, and from the equilibrium of before.
"""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optimistix as optx
import tyro

import implicitnets as inn

from .kit.problems import dense_tanh, layer_cell
from .kit.results import save, Settings
from .kit.tables import print_table, Row


SHARES = (0.01, 0.1)


def compare() -> list[Row]:
    """The most evaluations of an example for every share."""
    problem = dense_tanh(0.9)
    layer = inn.DeepEquilibriumNetwork(
        layer_cell(problem.kind, problem.weights),
        inn.AndersonAcceleration(problem.rtol, 0.0),
    )
    solve = jax.jit(jax.vmap(lambda x, z0: layer.solve(x, z0=z0)))
    xs = jnp.asarray(problem.inputs)
    direction = jr.normal(jr.key(0), xs.shape)
    direction *= jnp.linalg.norm(xs) / jnp.linalg.norm(direction)
    last = solve(xs, jnp.zeros_like(xs)).z_star
    rows = []
    for share in SHARES:
        row: Row = {"problem": problem.name, "input moved by (%)": 100 * share}
        starts = {"from zero": jnp.zeros_like(xs), "from the last equilibrium": last}
        for name, start in starts.items():
            solution = solve(xs + share * direction, start)
            if not np.all(solution.result == optx.RESULTS.successful):
                raise RuntimeError(f"{problem.name}, {name}: not solved.")
            row[f"evaluations {name}"] = int(solution.stats["nfe"].max())
        rows.append(row)
    return rows


def main() -> None:
    settings = tyro.cli(Settings)
    rows = compare()
    print_table("Warm starts", rows)
    save(settings, "warm_start", {"rows": rows})


if __name__ == "__main__":
    main()
