from collections.abc import Callable
from typing import Any

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import Array, PRNGKeyArray, PyTree, Scalar, ScalarLike

from ._internal.checks import (
    check_integer,
    check_number,
    check_part,
    FUNCTION,
    NUMBER,
    PROBABILITY,
)
from ._internal.manual import vary_like
from ._internal.parametrise import resolve
from ._internal.pytree import tree_dot, tree_normal, working_dtype
from ._solution import EquilibriumSolution


def skip_penalty(solution: EquilibriumSolution) -> Scalar:
    """How far the equilibrium is from where its solve started.

    The mean squared error between `z_star` and `z0`. Its gradient goes through both: a
    learned start learns to predict the equilibrium, and the cell to have one near its
    start (Pal et al., *Mixing Implicit and Explicit Deep Learning with Skip DEQs and
    Infinite Time Neural ODEs*, 2022, section 3, which gives it the weight 0.01).

    Most of the saving comes from the cell: a start that learns alone saves little. With
    too large a weight the state shrinks towards zero, where every start is right and
    the accuracy is lost. Lower the weight until the accuracy is that of a plain model.

    **Arguments:**

    - `solution`: from a layer's `solve`. The solution of a batch gives the mean over
        the batch.

    **Returns:**

    A scalar, in the units of the state squared.
    """
    dtype = working_dtype(solution.z_star)

    def sum_squares(z_star, z0):
        return jnp.sum(jnp.square(z_star.astype(dtype) - z0.astype(dtype)))

    errors = jtu.tree_map(sum_squares, solution.z_star, solution.z0)
    size = sum(x.size for x in jtu.tree_leaves(solution.z_star))
    return sum(jtu.tree_leaves(errors), start=jnp.zeros((), dtype)) / size


def jacobian_penalty(
    cell: Callable[[PyTree[Array], Any], PyTree[Array]],
    z: PyTree[Array],
    x: Any,
    *,
    key: PRNGKeyArray,
    num_samples: int = 1,
    detach: bool = True,
) -> Scalar:
    r"""How strongly a cell depends on its state.

    As a penalty it keeps equilibria easy to find.

    An unbiased estimate of $\lVert J \rVert_F^2 / d$ with the cell's Jacobian $J$ with
    respect to the state, of $d$ elements: the mean of $\lVert v^T J \rVert^2 / d$ over
    normal samples $v$ (Bai et al., *Stabilizing Equilibrium Models by Jacobian
    Regularization*, 2021, equation 5). A training step with it costs about as much as
    one more evaluation and its gradient, for every sample.

    **Arguments:**

    - `cell`: `cell(z, x) -> z`. For a cell that takes a key, bind the one that the
        layer had, or give the layer's `evaluate`.
    - `z`: one example's state, usually its equilibrium.
    - `x`: the cell's second argument.
    - `key`: for the samples. Every training step and every example needs its own.
        Keyword only argument.
    - `num_samples`: how many samples to take. Keyword only argument.
    - `detach`: whether `z` counts as a constant, as in the paper's code, so that the
        gradient changes the Jacobian where the equilibrium is. With `False` the
        gradient is exact: it also moves the equilibrium, through the layer's adjoint,
        to where the Jacobian is small. That costs one more backward solve. Keyword only
        argument.

    **Returns:**

    A scalar; take the mean over a batch.

    **Raises:**

    `ValueError` if `num_samples` is not positive.
    """
    num_samples = check_integer("jacobian_penalty", "num_samples", num_samples, 1)
    cell = resolve(cell)
    if detach:
        z = lax.stop_gradient(z)
    value, pull_back = jax.vjp(lambda z: cell(z, x), z)

    def estimate(key):
        (product,) = pull_back(vary_like(tree_normal(key, z), value))
        return tree_dot(product, product)

    estimates = jax.vmap(estimate)(jr.split(key, num_samples))
    return jnp.mean(estimates) / sum(leaf.size for leaf in jtu.tree_leaves(z))


def sometimes(
    probability: ScalarLike,
    penalty: Callable[[PRNGKeyArray], Scalar],
    *,
    key: PRNGKeyArray,
) -> Scalar:
    """A penalty in a random part of the training steps, and zero in the others.

    An expensive penalty still works if only some steps have it (Bai et al.,
    *Stabilizing Equilibrium Models by Jacobian Regularization*, 2021, section 4, use
    probabilities of 0.05 to 0.4). Call this on the batch, and the other steps do not
    compute the penalty. Under `vmap` they would, for every example.

    **Arguments:**

    - `probability`: how likely the penalty counts. The penalty is not divided by it.
    - `penalty`: `penalty(key) -> scalar`.
    - `key`: decides whether the penalty counts, and is then split for the penalty.
        Keyword only argument.

    **Returns:**

    The penalty, or zero.

    **Raises:**

    `ValueError` if the probability is not between 0 and 1.
    """
    check_number("sometimes", "probability", probability, PROBABILITY)
    check_part("sometimes", "penalty", penalty, FUNCTION)
    decide, key = jr.split(key)
    structure = jax.eval_shape(penalty, key)
    return lax.cond(
        jr.bernoulli(decide, probability),
        penalty,
        lambda _: jnp.zeros(structure.shape, structure.dtype),
        key,
    )


def growing_weight(
    initial: float, increment: float, every: int, *, begin: int = 0
) -> Callable[[ScalarLike], Scalar]:
    """A penalty's weight that grows by steps in the course of training.

    The later in training, the more a model tends to equilibria that are hard to find.
    Bai et al., *Stabilizing Equilibrium Models by Jacobian Regularization*, 2021, let
    the weight of the Jacobian penalty grow in this way.

    **Arguments:**

    - `initial`: the first weight.
    - `increment`: by how much it grows.
    - `every`: after how many training steps it grows.
    - `begin`: the first training step with a weight, which is zero before. Keyword only
        argument.

    **Returns:**

    An Optax schedule: a function from the training step to the weight.

    **Raises:**

    `ValueError` if `every` is not positive or `begin` is negative.
    """
    check_number("growing_weight", "initial", initial, NUMBER)
    check_number("growing_weight", "increment", increment, NUMBER)
    every = check_integer("growing_weight", "every", every, 1)
    begin = check_integer("growing_weight", "begin", begin, 0)

    def schedule(step: ScalarLike) -> Scalar:
        steps = jnp.asarray(step) - begin
        # A number of the integer's and Python's making takes the dtype of the penalty.
        with jax.numpy_dtype_promotion("standard"):
            weight = initial + increment * jnp.floor_divide(steps, every)
        return jnp.where(steps >= 0, weight, 0.0)

    return schedule
