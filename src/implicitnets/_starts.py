from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import (
    Array,
    ArrayLike,
    Bool,
    Float,
    Int,
    PRNGKeyArray,
    PyTree,
    ScalarLike,
)

from ._deq import AbstractDeepEquilibriumNetwork
from ._internal.checks import (
    as_integer,
    check_integer,
    check_number,
    check_part,
    check_value,
    NON_NEGATIVE,
    Part,
)
from ._internal.pytree import tree_dot, tree_normal
from ._solution import EquilibriumSolution


class ManySolutions(eqx.Module):
    """What solves of one input from several starts have found.

    A pytree, so that `jax.vmap` and `equinox.filter_jit` can return it.

    **Attributes:**

    - `best`: the [`implicitnets.EquilibriumSolution`][] with the least residual.
    - `solutions`: those from all starts, along a leading axis.
    - `best_start`: which of them is the best one.
    - `num_distinct`: how many different equilibria they are, of the successful ones.
    - `path_independence`: the mean cosine between the equilibria from two starts, 1 if
        they do not depend on the start (Anil et al., *Path Independent Equilibrium
        Models Can Better Exploit Test-Time Computation*, 2022, section 4). A network
        that scores low does not get better with more steps.
    """

    best: EquilibriumSolution
    solutions: EquilibriumSolution
    best_start: Int[Array, ""]
    num_distinct: Int[Array, ""]
    path_independence: Float[Array, ""]


_LAYER = Part("an equilibrium layer", AbstractDeepEquilibriumNetwork)


def solve_from_starts(
    deq: AbstractDeepEquilibriumNetwork,
    x: Any,
    starts: int | PyTree[ArrayLike],
    *,
    scale: ScalarLike = 1.0,
    distance: ScalarLike = 1e-2,
    key: PRNGKeyArray | None = None,
) -> ManySolutions:
    """The equilibria for one input from several starts, and the best of them.

    More starts are compute that a trained model can use at test time, as more steps
    are: a solve from another start may find another equilibrium, or one at all, and the
    residual tells which to take. How much the starts agree says whether it will help.

    The starts are solved as a batch. The best solution has the gradient of the layer's
    adjoint.

    **Arguments:**

    - `deq`: an equilibrium layer.
    - `x`: its input.
    - `starts`: how many. The first is the layer's own, and the others are at random
        around it. Or states along a leading axis.
    - `scale`: the standard deviation of the random starts. Keyword only argument.
    - `distance`: from which distance on, relative to the larger norm, two equilibria
        are different ones. It has to be larger than the error of the solves. Keyword
        only argument.
    - `key`: for the random starts, and passed on to the layer. Keyword only argument.

    **Returns:**

    An [`implicitnets.ManySolutions`][].

    **Raises:**

    `ValueError` if `starts` is neither a positive integer nor arrays with one leading
    axis, or if there are to be random ones without a `key`; `TypeError` if `deq` is not
    an equilibrium layer; and what the layer raises.
    """
    name = "solve_from_starts"
    check_part(name, "deq", deq, _LAYER)
    check_number(name, "scale", scale, NON_NEGATIVE)
    check_number(name, "distance", distance, NON_NEGATIVE)
    z0s = _make_starts(deq, x, starts, scale, key)
    solutions = eqx.filter_vmap(lambda z0: deq.solve(x, z0=z0, key=key))(z0s)
    norm = jax.vmap(optx.two_norm)
    residuals = norm(solutions.residual)
    residuals = jnp.where(jnp.isfinite(residuals), residuals, jnp.inf)
    best_start = jnp.argmin(residuals)
    solved = solutions.result == optx.RESULTS.successful
    products = _inner_products(lax.stop_gradient(solutions.z_star))
    return ManySolutions(
        best=jtu.tree_map(lambda leaf: leaf[best_start], solutions),
        solutions=solutions,
        best_start=best_start,
        num_distinct=_count_distinct(products, solved, distance),
        path_independence=_mean_cosine(products),
    )


def _make_starts(
    deq: AbstractDeepEquilibriumNetwork,
    x: Any,
    starts: Any,
    scale: ScalarLike,
    key: PRNGKeyArray | None,
) -> PyTree[Array]:
    name = "solve_from_starts"
    allowed = "a positive integer, or arrays with one leading axis for the starts"
    starts = as_integer(starts)
    if isinstance(starts, int):
        num_starts = check_integer(name, "starts", starts, 1)
        own = jtu.tree_map(jnp.asarray, deq.start(x, key=key))
        if num_starts == 1:
            return jtu.tree_map(lambda leaf: leaf[None], own)
        if key is None:
            raise ValueError(f"`{name}(key=...)` must be given for random starts.")
        keys = jr.split(jr.fold_in(key, num_starts), num_starts - 1)
        noise = jax.vmap(lambda key: tree_normal(key, own))(keys)

        def around(own, noise):
            others = own[None] + jnp.asarray(scale, own.dtype) * noise
            return jnp.concatenate([own[None], others])

        return jtu.tree_map(around, own, noise)
    lengths = {jnp.shape(leaf)[:1] for leaf in jtu.tree_leaves(starts)}
    valid = len(lengths) == 1 and lengths != {()} and lengths != {(0,)}
    check_value(name, "starts", starts, valid, allowed)
    return starts


def _inner_products(states: PyTree[Array]) -> Float[Array, "start start"]:
    def with_all(state):
        return jax.vmap(lambda other: tree_dot(state, other))(states)

    return jax.vmap(with_all)(states)


def _count_distinct(
    products: Float[Array, "start start"],
    solved: Bool[Array, " start"],
    distance: ScalarLike,
) -> Int[Array, ""]:
    squares = jnp.diagonal(products)
    apart = squares[:, None] + squares[None, :] - 2 * products
    larger = jnp.maximum(squares[:, None], squares[None, :])
    bound = jnp.asarray(distance, products.dtype) ** 2
    same = apart <= bound * larger
    # One that is the same as an earlier one is not counted.
    earlier = jnp.tril(jnp.ones_like(same), -1)
    repeated = jnp.any(same & earlier & solved[None, :], axis=1)
    return jnp.sum(solved & ~repeated)


def _mean_cosine(products: Float[Array, "start start"]) -> Float[Array, ""]:
    lengths = jnp.sqrt(jnp.diagonal(products))
    lengths = jnp.where(lengths > 0, lengths, 1)
    cosines = products / lengths[:, None] / lengths[None, :]
    num_pairs = products.shape[0] * (products.shape[0] - 1)
    off_diagonal = jnp.sum(cosines) - jnp.sum(jnp.diagonal(cosines))
    return off_diagonal / num_pairs if num_pairs > 0 else jnp.ones(())
