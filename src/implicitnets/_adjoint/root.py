"""The derivative of a root, for every adjoint that solves for it."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, PyTree, Scalar

from .._internal.optimistix import run_solve
from .._internal.pytree import tree_cast_like, tree_dot, working_dtype
from .._internal.types import LinearSolution, Tags
from .._linear_solver.solve import linear_operator
from .detach import close_aux
from .report import AdjointReport, result_number


class AbstractInversion(eqx.Module):
    """How to solve with the Jacobian of the root's function, or to estimate that."""

    @abc.abstractmethod
    def solve(
        self,
        operator: lx.AbstractLinearOperator,
        vector: PyTree[Array],
        aux: PyTree,
        transposed: bool,
    ) -> LinearSolution:
        """Solve one system.

        **Arguments:**

        - `operator`: the Jacobian at the root, or its transpose.
        - `vector`: the right-hand side, of unit norm or zero.
        - `aux`: what the forward solve returned beside the root.
        - `transposed`: whether `operator` is the transpose.

        **Returns:**

        The solution; a result; and statistics, of which the report takes `num_steps`,
        if it is there.
        """


def differentiate_root(
    primal_fn: Callable,
    rewrite_fn: Callable,
    inputs: PyTree,
    tags: Tags,
    inversion: AbstractInversion,
    probe: AdjointReport | None,
) -> tuple[PyTree[Array], Any]:
    """An adjoint's `apply`, by the implicit function theorem, in all modes."""
    root, aux = _root(primal_fn, rewrite_fn, inputs, tags, inversion, probe)
    return root, close_aux(aux, inputs)


@eqx.filter_custom_jvp
def _root(primal_fn, rewrite_fn, inputs, tags, inversion, probe):
    del rewrite_fn, tags, inversion, probe
    return run_solve(primal_fn, inputs)


@_root.def_jvp
def _root_jvp(primals, tangents):
    primal_fn, rewrite_fn, inputs, tags, inversion, probe = primals
    _, _, t_inputs, _, _, t_probe = tangents
    root, aux = _root(primal_fn, rewrite_fn, inputs, tags, inversion, probe)

    def is_none(x):
        return x is None

    undifferentiated = jtu.tree_map(is_none, t_inputs, is_leaf=is_none)
    fixed, differentiated = eqx.partition(inputs, undifferentiated, is_leaf=is_none)

    def at_inputs(differentiated):
        return rewrite_fn(root, aux, eqx.combine(differentiated, fixed))

    _, t_residual = jax.jvp(at_inputs, (differentiated,), (t_inputs,))
    # Linearised once: its products then cost no evaluation of the cell.
    _, jacobian = jax.linearize(lambda z: rewrite_fn(z, aux, inputs), root)
    if jtu.tree_leaves(t_probe):
        t_probe = jtu.tree_map(
            lambda p, t: jnp.zeros_like(p) if t is None else t, probe, t_probe
        )
    else:
        t_probe = None
    vector = jtu.tree_map(jnp.negative, t_residual)
    vector, t_probe = _depend_on((t_inputs, t_probe), (vector, t_probe))
    t_root = _solve(jacobian, vector, tags, inversion, aux, t_probe)
    t_aux = jax.custom_derivatives.zero_from_primal(aux, symbolic_zeros=True)
    return (root, aux), (t_root, t_aux)


def _depend_on(tangents: PyTree, vector: PyTree[Array]) -> PyTree[Array]:
    """Make every leaf of a right-hand side a linear function of the tangents."""

    # The transpose of `custom_linear_solve` asserts that each leaf is one (JAX 0.10).
    # A part of the state on which the inputs have no direct influence is not.
    def zero(t, dtype):
        return jnp.where(False, jnp.sum(t), 0).astype(dtype)

    leaves = jtu.tree_leaves(tangents)
    return jtu.tree_map(lambda x: x + sum(zero(t, x.dtype) for t in leaves), vector)


def _solve(
    jacobian: Callable[[PyTree[Array]], PyTree[Array]],
    vector: PyTree[Array],
    tags: Tags,
    inversion: AbstractInversion,
    aux: PyTree,
    t_probe: AdjointReport | None,
) -> PyTree[Array]:
    """Solve with a linear function so that the solution differentiates in all modes."""

    # `lx.linear_solve` alone would do for one derivative, but its rules solve the
    # tangent systems with `throw=True`, a host callback (Lineax 0.1.1, `_solve.py`).
    # Within `custom_linear_solve` it is never differentiated.
    #
    # The probe is a second block of the system, whose operator is the identity:
    #
    #     [ J  0 ] [ t_root  ]   [ vector  ]
    #     [ 0  I ] [ t_probe ] = [ t_probe ]
    #
    # Forwards the second row does nothing. In reverse mode what the transposed solve
    # returns for it becomes the probe's cotangent, and nothing checks that it solves
    # the row: so it returns the report there.
    def solve_with(transposed):
        operator_tags = lx.transpose_tags(tags) if transposed else tags

        def solve(matvec, b):
            b, block = b
            b, scale = _normalise(b)
            operator = linear_operator(
                lambda u: matvec((u, block))[0], b, operator_tags
            )
            value, result, stats = inversion.solve(operator, b, aux, transposed)
            if transposed and block is not None:
                report = _make_report(operator, b, value, result, stats)
                block = tree_cast_like(report, block)
            return _scale_by(value, scale), block

        return solve

    t_root, _ = jax.lax.custom_linear_solve(
        lambda pair: (jacobian(pair[0]), pair[1]),
        (vector, t_probe),
        solve=solve_with(False),
        transpose_solve=solve_with(True),
    )
    return t_root


def _make_report(operator, vector, value, result, stats) -> AdjointReport:
    # Relative, since the right-hand side has unit norm. By a product of its own, since
    # linear solvers tell the residual of exact arithmetic, or none.
    difference = jtu.tree_map(jnp.subtract, vector, operator.mv(value))
    residual = jnp.sqrt(tree_dot(difference, difference))
    num_steps = jnp.asarray(stats.get("num_steps", 0.0)).astype(residual.dtype)

    # Of every example: a constant of the solver's has no batch, and a probe that the
    # batch shares would count it once.
    def of_example(x):
        return jnp.where(False, residual, x)

    return AdjointReport(
        num_steps=of_example(num_steps),
        residual=residual,
        result=of_example(result_number(result).astype(residual.dtype)),
    )


def _normalise(vector: PyTree[Array]) -> tuple[PyTree[Array], Scalar]:
    dtype = working_dtype(vector)
    # By the largest element first: the squares of a tiny vector would underflow.
    largest = jnp.stack(
        [jnp.max(jnp.abs(x), initial=0).astype(dtype) for x in jtu.tree_leaves(vector)]
    ).max()
    # NaN passes on purpose: with a scale of NaN the solution is NaN, whoever solves.
    largest = jnp.where(largest == 0, 1, largest)
    vector = _scale_by(vector, 1 / largest)
    length = jnp.sqrt(tree_dot(vector, vector))
    length = jnp.where(length == 0, 1, length)
    return _scale_by(vector, 1 / length), length * largest


def _scale_by(vector: PyTree[Array], factor: Scalar) -> PyTree[Array]:
    return jtu.tree_map(
        lambda x: (x.astype(factor.dtype) * factor).astype(x.dtype), vector
    )
