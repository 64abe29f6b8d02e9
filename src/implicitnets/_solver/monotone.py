"""Monotone cells, and what the solvers for them share."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree, Scalar, ScalarLike

from .._internal.arguments import CellArguments
from .._internal.convolution import fast_convolutions
from .._internal.krylov import leading_eigenvector, starting_vector
from .._internal.parametrise import resolve
from .._internal.pytree import tree_astype, tree_cast_like, tree_dot, working_dtype


# Enough for the norms to 10 % or so, where the step sizes leave a factor of two.
_NUM_LANCZOS_STEPS = 10


class AbstractMonotoneCell(eqx.Module):
    r"""A cell $\sigma(W z + u(x))$ with one equilibrium for every input.

    There is one because $I - W \succeq m I$ with $m > 0$, and because $\sigma$ is the
    proximal operator $\operatorname{prox}_\varphi$ of a convex function. ReLU is the
    proximal operator of the indicator of the positive numbers. The methods are what
    [`implicitnets.ForwardBackward`][] and [`implicitnets.PeacemanRachford`][] need to
    know of a cell: a class with these methods is a monotone cell.

    Winston and Kolter, *Monotone Operator Equilibrium Networks*, 2020, section 3.

    **Attributes:**

    - `margin`: $m$.
    """

    margin: eqx.AbstractVar[ScalarLike]

    @abc.abstractmethod
    def linear(self, z: PyTree[Array]) -> PyTree[Array]:
        """The product $W z$.

        **Arguments:**

        - `z`: the state.

        **Returns:**

        The product.
        """

    @abc.abstractmethod
    def inject(self, x: Any) -> PyTree[Array]:
        """What the input adds.

        **Arguments:**

        - `x`: the input.

        **Returns:**

        $u(x)$, of the structure of the state.
        """

    @abc.abstractmethod
    def proximal(self, z: PyTree[Array], step_size: ScalarLike) -> PyTree[Array]:
        r"""The proximal operator $\operatorname{prox}_{\alpha\varphi}$.

        **Arguments:**

        - `z`: its argument.
        - `step_size`: $\alpha$; for 1 it is the activation.

        **Returns:**

        Its value.
        """

    @abc.abstractmethod
    def resolvent(
        self, z: PyTree[Array], step_size: Scalar
    ) -> Callable[[PyTree[Array]], PyTree[Array]]:
        r"""The inverse of $I + \alpha (I - W)$, prepared for many products with it.

        **Arguments:**

        - `z`: a state, for its structure, shapes and dtypes.
        - `step_size`: $\alpha$.

        **Returns:**

        A function that is a pytree.
        """

    def __call__(self, z: PyTree[Array], x: Any) -> PyTree[Array]:
        """The next state.

        **Arguments:**

        - `z`: the state.
        - `x`: the input.

        **Returns:**

        The next state.
        """
        z = jtu.tree_map(jnp.add, self.linear(z), self.inject(x))
        return self.proximal(z, 1)


def cell_and_input(solver: Any, args: Any) -> tuple[AbstractMonotoneCell, Any]:
    """From the arguments of a solve; the cell's weights are computed."""
    if isinstance(args, tuple) and isinstance(args[0], AbstractMonotoneCell):
        arguments = CellArguments(*args)
        return resolve(args[0]), arguments.x
    raise TypeError(
        f"`{type(solver).__name__}` is for cells that are a "
        "`implicitnets.nn.AbstractMonotoneCell`, in an equilibrium layer, or in a "
        f"solve with `args=(cell, x)`; got {eqx.tree_pformat(args)} for `args`."
    )


def part_norms(cell: AbstractMonotoneCell, y: PyTree[Array]) -> tuple[Scalar, Scalar]:
    """The two-norms of the symmetric and the skew part of `I - W`, from below."""
    dtype = working_dtype(y)
    y, unravel = ravel_pytree(y)
    linear = fast_convolutions(cell.linear)

    def product(v):
        image, _ = ravel_pytree(linear(unravel(v.astype(y.dtype))))
        return v - image.astype(dtype)

    # From a fixed start, so that the estimate does not depend on the state.
    start = starting_vector(y)
    transpose = jax.linear_transpose(product, start)

    def symmetric(v):
        return (product(v) + transpose(v)[0]) / 2

    def skew(v):
        return (product(v) - transpose(v)[0]) / 2

    def norm(product, normal_product):
        vector = leading_eigenvector(normal_product, start, _NUM_LANCZOS_STEPS)
        image = product(vector)
        return lax.stop_gradient(jnp.sqrt(tree_dot(image, image)))

    return norm(symmetric, symmetric), norm(skew, lambda v: -skew(skew(v)))


def combine(fn: Callable[..., Array], *trees: PyTree[Array]) -> PyTree[Array]:
    """A linear combination in the working dtype, in the dtypes of the first pytree."""
    dtype = working_dtype(trees[0])
    out = jtu.tree_map(fn, *(tree_astype(tree, dtype) for tree in trees))
    return tree_cast_like(out, trees[0])
