"""The problems that the tests share."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

import implicitnets as inn


def is_double() -> bool:
    return jnp.result_type(float) == jnp.float64


def tolerance(single: float, double: float) -> float:
    """A tolerance for the precision that the suite runs in."""
    return double if is_double() else single


def make_matrix(
    size: int, spectral_radius: float, seed: int = 0, symmetric: bool = False
) -> Array:
    matrix = np.random.default_rng(seed).normal(size=(size, size))
    if symmetric:
        matrix = matrix + matrix.T
    matrix *= spectral_radius / np.max(np.abs(np.linalg.eigvals(matrix)))
    return jnp.asarray(matrix, jnp.result_type(float))


def make_vector(size: int, seed: int = 1) -> Array:
    vector = np.random.default_rng(seed).normal(size=size)
    return jnp.asarray(vector, jnp.result_type(float))


def linear_map(z, args):
    matrix, vector = args
    return matrix @ z + vector


def two_norm(tree: PyTree[Array]) -> float:
    return float(optx.two_norm(tree))


def relative_error(value: PyTree, reference: PyTree) -> float:
    """The two-norm of the difference over that of the reference, in float64."""
    a = np.concatenate([np.asarray(x, float).ravel() for x in jtu.tree_leaves(value)])
    b = [np.asarray(x, float).ravel() for x in jtu.tree_leaves(reference)]
    b = np.concatenate(b)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def solve(
    fn,
    solver,
    z0,
    args=None,
    *,
    find=optx.fixed_point,
    adjoint=inn.ImplicitAdjoint(),
    max_steps=600,
):
    """As in a layer: what the solve came to, and how, and no error."""
    return find(fn, solver, z0, args, adjoint=adjoint, max_steps=max_steps, throw=False)


def relative_residual(fn, z, args):
    return relative_error(z, fn(z, args))


class DenseCell(eqx.Module):
    """`tanh(W z + U x)`."""

    hidden: Float[Array, " d d"]
    inject: Float[Array, " d d"]

    def __call__(self, z, x):
        return jnp.tanh(self.hidden @ z + self.inject @ x)


def dense_cell(size: int = 4, spectral_radius: float = 0.9) -> DenseCell:
    return DenseCell(make_matrix(size, spectral_radius), make_matrix(size, 1.0, seed=5))


class ConvCell(eqx.Module):
    hidden: eqx.nn.Conv2d
    norm: eqx.nn.GroupNorm

    def __call__(self, z, x):
        return jnp.tanh(0.2 * self.norm(self.hidden(z)) + x)


def conv_cell() -> ConvCell:
    conv = eqx.nn.Conv2d(2, 2, 3, padding=1, key=jr.key(0))
    return ConvCell(conv, eqx.nn.GroupNorm(1, 2))


class PairCell(eqx.Module):
    """Two coupled leaves of different shapes."""

    weight: Float[Array, "6 6"]

    def __call__(self, z, x):
        flat = jnp.concatenate([z["a"], z["b"].reshape(-1)])
        flat = jnp.tanh(self.weight @ flat)
        return {"a": flat[:2] + x["a"], "b": jnp.sin(flat[2:].reshape(2, 2)) + x["b"]}


def pair_cell() -> PairCell:
    return PairCell(make_matrix(6, 0.7, seed=2))


def problem(name: str) -> tuple[Any, PyTree[Array]]:
    """A cell and an input of the structure of its state."""
    if name == "dense":
        return dense_cell(), make_vector(4)
    if name == "conv":
        return conv_cell(), make_vector(32).reshape(2, 4, 4)
    x = make_vector(6)
    return pair_cell(), {"a": x[:2], "b": x[2:].reshape(2, 2)}


class SumCell(eqx.Module):
    """`tanh(hidden(z) + inject(x))`."""

    hidden: Callable
    inject: Callable

    def __call__(self, z, x):
        return jnp.tanh(self.hidden(z) + self.inject(x))


class JointCell(eqx.Module):
    """Independent cells, with their states in one and their inputs in one."""

    cells: dict[str, Callable]

    def __call__(self, z, x):
        return {name: cell(z[name], x[name]) for name, cell in self.cells.items()}


def multiscale_layers(sizes: tuple[int, ...], key: Array) -> tuple[tuple, tuple, tuple]:
    """Main, mapping and post-fuse layers, linear ones; the input has the first size."""
    keys = iter(jr.split(key, len(sizes) * (len(sizes) + 1) + 1))

    def linear(n, m):
        return eqx.nn.Linear(n, m, use_bias=False, key=next(keys))

    first, *others = sizes
    main = (
        SumCell(linear(first, first), linear(first, first)),
        *(linear(n, n) for n in others),
    )
    mapping = tuple(
        tuple(eqx.nn.Identity() if n == m else linear(n, m) for m in sizes)
        for n in sizes
    )
    return main, mapping, tuple(eqx.nn.Lambda(jnp.tanh) for _ in sizes)


def loss_weights(tree: PyTree[Array]) -> PyTree[Array]:
    leaves, treedef = jtu.tree_flatten(tree)
    weights = [
        make_vector(x.size, seed=7 + i).reshape(x.shape) for i, x in enumerate(leaves)
    ]
    return jtu.tree_unflatten(treedef, weights)


def weighted_sum(tree: PyTree[Array], weights: PyTree[Array]) -> Array:
    products = jtu.tree_map(lambda x, weight: jnp.sum(weight * x), tree, weights)
    return sum(jtu.tree_leaves(products), start=jnp.zeros(()))


@eqx.filter_jit
def _jacobians(cell, x, z):
    """Of a cell for its state, and for itself and its input together, as matrices."""
    flat_z, unravel_z = ravel_pytree(z)
    params, static = eqx.partition((cell, x), eqx.is_inexact_array)
    flat_p, unravel_p = ravel_pytree(params)

    def flat_cell(flat_z, flat_p):
        cell, x = eqx.combine(unravel_p(flat_p), static)
        return ravel_pytree(cell(unravel_z(flat_z), x))[0]

    return jax.jacrev(flat_cell, argnums=(0, 1))(flat_z, flat_p)


def dense_gradient(cell, z_star, x, weights):
    """The gradient of `weighted_sum(z_star)` with respect to cell and input.

    By the implicit function theorem with a dense solve, NumPy in float64; the cell's
    two Jacobians come from JAX at the given equilibrium.
    """
    jac_z, jac_p = _jacobians(cell, x, z_star)
    jac_z, jac_p = np.asarray(jac_z, float), np.asarray(jac_p, float)
    params = eqx.filter((cell, x), eqx.is_inexact_array)
    flat_p, unravel_p = ravel_pytree(params)
    v = np.asarray(ravel_pytree(weights)[0], float)
    u = np.linalg.solve((np.eye(v.size) - jac_z).T, v)
    return unravel_p(jnp.asarray(jac_p.T @ u, flat_p.dtype))
