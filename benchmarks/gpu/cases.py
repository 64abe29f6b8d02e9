"""The cells that are solved on the device, with their inputs."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, PyTree

import implicitnets as inn
from implicitnets import models

from ..kit.problems import layer_cell, make_problem, Problem, resnet


RTOL = 1e-3


@dataclasses.dataclass(frozen=True)
class Case:
    """A cell of one example, a batch of inputs, and a cotangent of the equilibria.

    `problem` has the same as arrays, for other libraries.
    """

    name: str
    cell: Any
    inputs: Array
    cotangent: Array
    problem: Problem | None = None

    @property
    def weights(self) -> PyTree[Array]:
        """The arrays of the cell."""
        return eqx.filter(self.cell, eqx.is_array)

    def cell_of(self, weights: PyTree[Array]) -> Any:
        """The cell with other weights."""
        return eqx.combine(weights, eqx.filter(self.cell, eqx.is_array, inverse=True))

    def apply(self, weights: PyTree[Array], z: Array, x: Array) -> Array:
        """The cell's values for a batch, each evaluated as a solve does it."""
        layer = inn.DeepEquilibriumNetwork(self.cell_of(weights))
        return jax.vmap(layer.evaluate)(z, x)


def of_problem(problem: Problem) -> Case:
    """The case of a problem that other libraries are to solve too."""
    weights = jax.tree.map(jnp.asarray, problem.weights)
    return Case(
        problem.name,
        layer_cell(problem.kind, weights),
        jnp.asarray(problem.inputs),
        jnp.asarray(problem.cotangent),
        problem,
    )


def dense(batch: int, size: int, radius: float = 0.9) -> Case:
    """`tanh(W z + x)`, and small inputs."""
    rng = np.random.default_rng(0)
    # The spectral radius of such a matrix is one, to some per cent: the circular law.
    matrix = radius * rng.standard_normal((size, size)) / np.sqrt(size)
    inputs = 0.1 * rng.standard_normal((batch, size))
    name = f"dense {batch} x {size}"
    return of_problem(make_problem(name, "tanh", {"matrix": matrix}, inputs, RTOL, rng))


def convolutional(batch: int, channels: int, size: int) -> Case:
    """The residual cell with group norms."""
    name = f"ResNet {batch} x {channels} x {size} x {size}"
    problem = resnet(channels, channels, size, batch)
    return of_problem(dataclasses.replace(problem, name=name, rtol=RTOL))


def transformer(batch: int, length: int, width: int) -> Case:
    """A pre-norm transformer layer, with attention to all positions before."""
    config = models.CausalTransformerConfig(
        vocab_size=2, length=length, width=width, num_heads=max(1, width // 64)
    )
    keys = jr.split(jr.key(0), 3)
    cell = models.CausalTransformerDEQ(config, key=keys[0]).deq.cell
    return Case(
        f"transformer {batch} x {length} x {width}",
        eqx.nn.inference_mode(cell),
        jr.normal(keys[1], (batch, length, width)),
        jr.normal(keys[2], (batch, length, width)),
    )


def cases(small: bool) -> dict[str, Callable[[], Case]]:
    """The cells of the tables, to be made when they are needed."""
    if small:
        return {
            "dense-middle": lambda: dense(4, 64),
            "resnet": lambda: convolutional(2, 8, 6),
            "transformer": lambda: transformer(2, 4, 16),
        }
    return {
        "dense-small": lambda: dense(128, 256),
        "dense-middle": lambda: dense(1024, 1024),
        "resnet": lambda: convolutional(128, 64, 28),
        "transformer": lambda: transformer(16, 256, 512),
        "dense-large": lambda: dense(4096, 2048),
    }
