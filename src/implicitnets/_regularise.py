import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Scalar

from ._misc import working_dtype
from ._solution import EquilibriumSolution


def skip_penalty(solution: EquilibriumSolution) -> Scalar:
    """How far the equilibrium is from where its solve started.

    The mean squared error between `z_star` and `z0`, with a gradient through both: it
    teaches a learned start to predict the equilibrium, and the cell to have one near
    its start (Pal et al., *Mixing Implicit and Explicit Deep Learning with Skip DEQs
    and Infinite Time Neural ODEs*, 2022, section 3; there with weight 0.01).

    **Arguments:**

    - `solution`: from a layer's `solve`; that of a batch gives the mean over it.

    **Returns:**

    A scalar, in the units of the state squared.
    """
    dtype = working_dtype(solution.z_star)

    def sum_squares(z_star, z0):
        return jnp.sum(jnp.square(z_star.astype(dtype) - z0.astype(dtype)))

    errors = jtu.tree_map(sum_squares, solution.z_star, solution.z0)
    size = sum(x.size for x in jtu.tree_leaves(solution.z_star))
    return sum(jtu.tree_leaves(errors), start=jnp.zeros((), dtype)) / size
