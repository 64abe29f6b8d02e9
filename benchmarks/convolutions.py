"""Do convolutions run in the solver and in the adjoint as fast as outside of them?

The ResNet cell: a solve and a backward pass, relative to as many evaluations and
Jacobian products of the cell on its own.
"""

import dataclasses

import jax
import jax.numpy as jnp
import tyro

import implicitnets as inn

from .kit.methods import Method
from .kit.problems import jax_cell, resnet
from .kit.reference import reference
from .kit.results import save, TimingSettings
from .kit.rows import prepare
from .kit.tables import print_table, Row
from .kit.timing import compile_and_run, time_calls


@dataclasses.dataclass(frozen=True)
class Config(TimingSettings):
    """Time the ResNet cell in the layer and on its own."""


def compare(config: Config) -> list[Row]:
    """A row for the solve, and one for the backward pass."""
    problem = resnet()
    cell = jax_cell(problem.kind)
    method = Method("Anderson", inn.AndersonAcceleration(problem.rtol, 0.0))
    prepared = prepare(problem, reference(problem), method)
    if prepared.solve is None or prepared.gradient is None or not prepared.passed:
        raise RuntimeError(f"{problem.name}: {prepared.row['result']}.")

    def evaluate(weights, x):
        return jax.vmap(lambda x: cell(x, (weights, x)))(x)

    def pull_back(weights, x, cotangent):
        # Of a linear map, as the adjoint's products: the evaluation is not counted.
        return jax.vmap(lambda v, x: jax.vjp(lambda z: cell(z, (weights, x)), x)[1](v))(
            cotangent, x
        )

    arguments = jax.tree.map(jnp.asarray, (problem.weights, problem.inputs))
    evaluation, _ = compile_and_run(evaluate, *arguments)
    product, _ = compile_and_run(pull_back, *arguments, jnp.asarray(problem.cotangent))
    seconds = time_calls(
        {
            "solve": prepared.solve.call,
            "gradient": prepared.gradient.call,
            "evaluation": evaluation.call,
            "product": product.call,
        },
        config.repeats,
        problem.name,
    )
    passes = {
        # The layer evaluates the cell once more, for the residual of what it returns.
        "solve": (
            "evaluation",
            prepared.row["evaluations"] + 1,
            seconds["solve"],
        ),
        # The last product is that with the weights.
        "backward": (
            "product",
            prepared.row["backward products"] + 1,
            seconds["gradient"] - seconds["solve"],
        ),
    }
    return [
        {
            "pass": name,
            "consists of": f"{count} {part}s",
            "time (ms)": 1e3 * total,
            "alone (ms)": 1e3 * count * seconds[part],
            "ratio": total / (count * seconds[part]),
        }
        for name, (part, count, total) in passes.items()
    ]


def main() -> None:
    config = tyro.cli(Config)
    rows = compare(config)
    print_table("ResNet cell", rows)
    save(config, "convolutions", {"rows": rows})


if __name__ == "__main__":
    main()
