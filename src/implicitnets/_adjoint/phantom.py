from collections.abc import Callable
from typing import Any

import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, PyTree, ScalarLike

from .._internal.checks import check_integer, check_number, FRACTION, integer
from .._internal.optimistix import run_solve
from .._internal.pytree import working_dtype
from .._internal.types import Tags
from .detach import close_aux, detach, substitute


class PhantomAdjoint(optx.AbstractAdjoint):
    r"""Differentiate a few damped steps from the root, and nothing before them.

    The root is the constant $z_0$ of

    $$z_{i+1} = \text{damping} \cdot z_i + (1 - \text{damping}) \, f(z_i, \theta)$$

    and ordinary differentiation goes through `num_steps` of these steps, whatever the
    tolerance of the forward solve: the "unrolling-based phantom gradient" of Geng et
    al., *On Training Implicit Models*, 2021, section 3.2, who train image classifiers
    with 5 steps at a damping of 0.5. The steps are for the derivative only: the value
    is the root itself. In a root-finding problem $F(z) = 0$ the map is
    $f(z) = F(z) + z$.

    Works in forward mode, in reverse mode and to any order; higher derivatives are
    those of the same steps.

    The auxiliary output of the function, `sol.aux`, has no gradient: differentiating it
    in reverse mode is an error.

    **Bias:** that of [`implicitnets.NeumannAdjoint`][] with as many terms. Nearly
    always a descent direction, also if the forward solve stopped early.

    **Memory:** what ordinary differentiation keeps of `num_steps` evaluations.

    **Cost:** `num_steps` evaluations and `num_steps - 1` Jacobian products, besides
    those with the Jacobian of the parameters.

    **Arguments:**

    - `num_steps`: how many steps.
    - `damping`: the weight of the old state in a step; 0 for none. The paper's `lambda`
        is `1 - damping`.
    """

    num_steps: int = integer(5)
    damping: ScalarLike = 0.0

    def __check_init__(self):
        check_integer(self, "num_steps", self.num_steps, 1)
        check_number(self, "damping", self.damping, FRACTION)

    def apply(
        self,
        primal_fn: Callable,
        rewrite_fn: Callable,
        inputs: PyTree,
        tags: Tags,
    ) -> tuple[PyTree[Array], Any]:
        del tags
        root, aux = run_solve(primal_fn, detach(inputs))
        weight = 1 - jnp.asarray(self.damping, working_dtype(root))

        def step(z, _):
            residual = rewrite_fn(z, aux, inputs)
            new_z = jtu.tree_map(
                lambda z, r: z + weight.astype(z.dtype) * r.astype(z.dtype), z, residual
            )
            return new_z, None

        z, _ = lax.scan(step, root, length=self.num_steps)
        root = substitute(z, root)
        return root, close_aux(aux, inputs)


class JacobianFreeAdjoint(optx.AbstractAdjoint):
    r"""Differentiate one evaluation at the root, as if the Jacobian there were zero.

    Fung et al., *JFB: Jacobian-Free Backpropagation for Implicit Networks*, 2022. The
    same as [`implicitnets.PhantomAdjoint`][] with one undamped step.

    The auxiliary output of the function, `sol.aux`, has no gradient: differentiating it
    in reverse mode is an error.

    **Bias:** every term of the Neumann series but the first, a relative error of up to
    the norm of the Jacobian. A descent direction if the map contracts and is well
    conditioned in its parameters (Fung et al., Theorem 3.1).

    **Memory:** one evaluation of the function.

    **Cost:** one evaluation, and no Jacobian product.
    """

    def apply(
        self,
        primal_fn: Callable,
        rewrite_fn: Callable,
        inputs: PyTree,
        tags: Tags,
    ) -> tuple[PyTree[Array], Any]:
        return PhantomAdjoint(num_steps=1).apply(primal_fn, rewrite_fn, inputs, tags)
