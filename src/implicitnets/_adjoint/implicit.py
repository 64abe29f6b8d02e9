from collections.abc import Callable

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import optimistix as optx
from jaxtyping import Array, PyTree, Scalar

from .._linear_solver.gmres import GivensGMRES
from .._loop import while_loop
from .._misc import tree_dot, working_dtype


class ImplicitAdjoint(optx.AbstractAdjoint):
    r"""Differentiate through the implicit function theorem.

    At a root $F(z^*, \theta) = 0$ the tangent of the root solves the linear system

    $$\frac{\partial F}{\partial z} \dot z
    = - \frac{\partial F}{\partial \theta} \dot\theta$$

    and reverse mode solves the transposed system, at a memory cost that does not depend
    on how many steps the forward solve took (Bai et al., *Deep Equilibrium Models*,
    2019, Theorem 1). Works in forward mode, in reverse mode and to any order, under
    `vmap` and `jit`, in every Optimistix solve. The program has no host callback, so
    that it exports to other platforms, and the backward pass never raises: a linear
    solve that did not converge gives the best that it found.

    The right-hand side is scaled to unit norm before the linear solve and the solution
    scaled back, so that the relative error of a gradient does not depend on the scale
    of the loss, whatever the linear solver's absolute tolerance.

    **Arguments:**

    - `linear_solver`: any Lineax solver for the linear systems. The default is
        [`implicitnets.GivensGMRES`][] to a relative residual of `1e-4`.
    """

    linear_solver: lx.AbstractLinearSolver = GivensGMRES(rtol=1e-4, atol=0.0)

    def apply(
        self,
        primal_fn: Callable,
        rewrite_fn: Callable,
        inputs: PyTree,
        tags: frozenset[object],
    ) -> PyTree[Array]:
        """As `optimistix.AbstractAdjoint.apply`."""
        root, aux = _implicit_root(
            primal_fn, rewrite_fn, inputs + (while_loop,), tags, self.linear_solver
        )
        return root, jtu.tree_map(eqxi.nondifferentiable_backward, aux)


@eqx.filter_custom_jvp
def _implicit_root(primal_fn, rewrite_fn, inputs, tags, linear_solver):
    del rewrite_fn, tags, linear_solver
    return jtu.tree_map(jnp.asarray, primal_fn(inputs))


@_implicit_root.def_jvp
def _implicit_root_jvp(primals, tangents):
    primal_fn, rewrite_fn, inputs, tags, linear_solver = primals
    _, _, t_inputs, _, _ = tangents
    root, aux = _implicit_root(primal_fn, rewrite_fn, inputs, tags, linear_solver)

    def is_none(x):
        return x is None

    undifferentiated = jtu.tree_map(is_none, t_inputs, is_leaf=is_none)
    fixed, differentiated = eqx.partition(inputs, undifferentiated, is_leaf=is_none)

    def at_inputs(differentiated):
        return rewrite_fn(root, aux, eqx.combine(differentiated, fixed))

    _, t_residual = jax.jvp(at_inputs, (differentiated,), (t_inputs,))
    # Linearised once: its products then cost no evaluation of the cell.
    _, jacobian = jax.linearize(lambda z: rewrite_fn(z, aux, inputs), root)
    t_root = _solve(
        jacobian, jtu.tree_map(jnp.negative, t_residual), tags, linear_solver
    )
    t_aux = jax.custom_derivatives.zero_from_primal(aux, symbolic_zeros=True)
    return (root, aux), (t_root, t_aux)


def _solve(
    jacobian: Callable[[PyTree[Array]], PyTree[Array]],
    vector: PyTree[Array],
    tags: frozenset[object],
    linear_solver: lx.AbstractLinearSolver,
) -> PyTree[Array]:
    """Solve with a linear function so that the solution differentiates in all modes."""

    # `lx.linear_solve` alone would do for one derivative, but its rules solve the
    # tangent systems with `throw=True`, a host callback (Lineax 0.1.1, `_solve.py`).
    # Within `custom_linear_solve` it is never differentiated.
    def solve_with(tags):
        def solve(matvec, b):
            b, scale = _normalise(b)
            structure = jax.eval_shape(lambda: b)
            operator = lx.FunctionLinearOperator(matvec, structure, tags)
            solution = lx.linear_solve(operator, b, linear_solver, throw=False)
            return _scale_by(solution.value, scale)

        return solve

    return jax.lax.custom_linear_solve(
        jacobian,
        vector,
        solve=solve_with(tags),
        transpose_solve=solve_with(lx.transpose_tags(tags)),
    )


def _normalise(vector: PyTree[Array]) -> tuple[PyTree[Array], Scalar]:
    dtype = working_dtype(vector)
    # The largest element first, so that a tiny vector's squares do not underflow.
    largest = jnp.stack(
        [jnp.max(jnp.abs(x), initial=0).astype(dtype) for x in jtu.tree_leaves(vector)]
    ).max()
    largest = jnp.where(largest > 0, largest, 1)
    vector = _scale_by(vector, 1 / largest)
    length = jnp.sqrt(tree_dot(vector, vector))
    length = jnp.where(length > 0, length, 1)
    return _scale_by(vector, 1 / length), length * largest


def _scale_by(vector: PyTree[Array], factor: Scalar) -> PyTree[Array]:
    return jtu.tree_map(
        lambda x: (x.astype(factor.dtype) * factor).astype(x.dtype), vector
    )
