from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar, ScalarLike

from .._internal.checks import check_integer, check_tolerances
from .._internal.history import (
    empty_history,
    history_combine,
    history_dot,
    history_get,
    history_set,
)
from .._internal.loop import Unfrozen, while_loop
from .._internal.pytree import tree_dot, working_dtype
from .matrix_free import AbstractMatrixFreeSolver


# Orthogonalise a second time if less than this share of a product was left: what is
# left has then lost accuracy to cancellation, and the losses of the steps multiply
# (Giraud et al., *The loss of orthogonality in the Gram-Schmidt orthogonalization
# process*, 2005).
_CANCELLATION = 0.5

# A column of the triangular factor this many roundings long is none.
_SINGULAR = 10

# By how many roundings of its largest term a combination of columns may be off.
_ROUNDINGS = 4

# A cycle that ends with more than this share of its residual has stagnated.
_STAGNATION = 0.999


class GivensGMRES(AbstractMatrixFreeSolver):
    r"""GMRES that knows its residual after every product, and stops there.

    The Hessenberg matrix is kept in triangular form by Givens rotations (Saad and
    Schultz, *GMRES*, 1986, section 3.2), which gives the two-norm of the residual
    for nothing, so that a solve pays for the products that it needs and no more, where
    [`lineax.GMRES`][] looks at the end of a restart cycle.

    Stops when `two_norm(b - A x) <= atol + rtol * two_norm(b)`. Only for real square
    operators. Under `vmap` every example stops on its own.

    This solver supports the following `options` of [`lineax.linear_solve`][]:

    - `preconditioner`: a [`lineax.AbstractLinearOperator`][] close to the inverse, used
        on the right, so that the residual of the stopping rule is that of the system.
    - `y0`: where to start; zero by default. A start costs one product.

    The statistics are `num_steps` (the products with the operator) and `residual_norm`
    (`two_norm(b - A x)`). The rotations tell the residual of exact arithmetic; where
    rounding may have made another of it (after a restart, or when the solution is huge)
    it is verified by a product, so that success is never claimed wrongly, and a cycle
    that has not helped is taken back. The result tells running out of steps, breakdown
    (a cycle without progress, since the operator is singular on the Krylov space, to
    rounding) and stagnation (any other cycle without progress: more `restart`, a
    preconditioner, or a tolerance above what rounding allows, are the remedies) apart.
    Where the vector or a product is not finite, the result is breakdown and the
    solution NaN.

    **Arguments:**

    - `rtol`: relative tolerance.
    - `atol`: absolute tolerance.
    - `max_steps`: the largest number of products with the operator; `None` for no
        bound.
    - `restart`: the dimension of the Krylov space, in memory `restart + 1` vectors.
    """

    _options: ClassVar[tuple[str, ...]] = ("preconditioner", "y0")

    rtol: ScalarLike
    atol: ScalarLike
    max_steps: int | None = 500
    restart: int = 20

    def __check_init__(self):
        check_tolerances(self)
        if self.max_steps is not None:
            check_integer(self, "max_steps", 1)
        check_integer(self, "restart", 1)

    def _solve(self, operator, vector, options):
        dtype = working_dtype(vector)
        structure = jax.eval_shape(lambda: vector)

        def widen(x):
            return jtu.tree_map(lambda a: a.astype(dtype), x)

        def narrow(x):
            return jtu.tree_map(lambda a, s: a.astype(s.dtype), x, structure)

        def product(x):
            return widen(operator.mv(narrow(x)))

        preconditioner = options.get("preconditioner")

        def precondition(x):
            return x if preconditioner is None else widen(preconditioner.mv(narrow(x)))

        def residual_at(x):
            return jtu.tree_map(jnp.subtract, b, product(x))

        b = widen(vector)
        size = sum(x.size for x in jtu.tree_leaves(b))
        restart = max(1, min(self.restart, size))
        rtol = jnp.asarray(self.rtol, dtype)
        target = jnp.asarray(self.atol, dtype) + rtol * _norm(b)

        if "y0" in options:
            solution = widen(options["y0"])
            residual = residual_at(solution)
            num_steps = jnp.array(1)
        else:
            solution = jtu.tree_map(jnp.zeros_like, b)
            residual = b
            num_steps = jnp.array(0)

        def within_budget(num_steps):
            return True if self.max_steps is None else num_steps < self.max_steps

        def solve_goes_on(solve):
            unfinished = ~solve.verified | (solve.residual_norm > target)
            return unfinished & ~solve.stagnation & within_budget(solve.num_steps)

        def run_cycle(solve):
            start_norm = solve.residual_norm

            def cycle_goes_on(cycle):
                unfinished = (cycle.residual_norm > target) & ~cycle.exhausted
                room = cycle.column.value < restart
                num_steps = solve.num_steps + cycle.num_columns
                return unfinished & room & within_budget(num_steps)

            def step(cycle):
                return _arnoldi_step(
                    lambda x: product(precondition(x)),
                    b,
                    start_norm,
                    cycle,
                    cycle_goes_on(cycle),
                )

            cycle = while_loop(
                cycle_goes_on,
                step,
                _start_cycle(solve.residual, start_norm, solve.basis.value, restart),
            )
            combination, rounding_error = _combine(cycle, b, start_norm)
            new_solution = jtu.tree_map(
                jnp.add, solve.solution, precondition(combination)
            )
            num_steps = solve.num_steps + cycle.num_columns

            # The rotations tell the residual of exact arithmetic. That is as good as
            # the true one, which costs a product, unless there was much to round.
            trusted = ("y0" not in options) & (solve.num_cycles.value == 0)
            accurate = rounding_error <= target
            verified = trusted & accurate & (cycle.residual_norm <= target)
            check = ~verified & within_budget(num_steps)
            new_residual = lax.cond(
                eqxi.unvmap_any(check),
                lambda: residual_at(new_solution),
                lambda: solve.residual,
            )
            new_norm = jnp.where(check, _norm(new_residual), cycle.residual_norm)
            stagnation = check & ~(new_norm <= _STAGNATION * start_norm)
            # What has overflowed is taken back, what the operator spoils is not.
            spoilt = ~jnp.isfinite(cycle.residual_norm)
            new_norm = jnp.where(spoilt, jnp.nan, new_norm)
            take_back = stagnation & ~spoilt
            new = new_solution, new_residual, new_norm
            old = solve.solution, solve.residual, start_norm
            new_solution, new_residual, new_norm = jtu.tree_map(
                lambda x, y: jnp.where(take_back, y, x), new, old
            )
            return _Solve(
                solution=new_solution,
                residual=new_residual,
                residual_norm=new_norm,
                num_steps=num_steps + jnp.where(check, 1, 0),
                verified=verified | check,
                stagnation=stagnation,
                singular=cycle.exhausted | ~accurate,
                num_cycles=Unfrozen(solve.num_cycles.value + 1),
                basis=cycle.basis,
            )

        solve = while_loop(
            solve_goes_on,
            run_cycle,
            _Solve(
                solution=solution,
                residual=residual,
                residual_norm=_norm(residual),
                num_steps=num_steps,
                verified=jnp.array(True),
                stagnation=jnp.array(False),
                singular=jnp.array(False),
                num_cycles=Unfrozen(jnp.array(0)),
                basis=Unfrozen(empty_history(restart + 1, b)),
            ),
        )
        # Of NaN, and of infinity, no comparison with the target tells. They come from
        # the right-hand side or from a product, and are not to be taken for a zero.
        finite = jnp.isfinite(solve.residual_norm)
        solution = jtu.tree_map(lambda x: jnp.where(finite, x, jnp.nan), solve.solution)
        converged = finite & solve.verified & (solve.residual_norm <= target)
        broken = (solve.stagnation & solve.singular) | ~finite
        result = lx.RESULTS.where(
            solve.stagnation, lx.RESULTS.stagnation, lx.RESULTS.max_steps_reached
        )
        result = lx.RESULTS.where(broken, lx.RESULTS.breakdown, result)
        result = lx.RESULTS.where(converged, lx.RESULTS.successful, result)
        stats = {"num_steps": solve.num_steps, "residual_norm": solve.residual_norm}
        return narrow(solution), result, stats


class _Solve(eqx.Module):
    """The carry of the loop over restart cycles."""

    solution: PyTree[Array]
    residual: PyTree[Array]
    residual_norm: Scalar
    num_steps: Int[Array, ""]
    verified: Bool[Array, ""]
    stagnation: Bool[Array, ""]
    singular: Bool[Array, ""]
    num_cycles: Unfrozen[Int[Array, ""]]
    basis: Unfrozen[PyTree[Array]]


class _Cycle(eqx.Module):
    """The carry of the loop within a cycle: the Arnoldi basis, and the QR factors.

    Of the orthogonal factor a new rotation changes the last row only, so that a step
    costs two rows of the small matrices and not the whole of them. Nothing is read past
    an example's `num_columns`, so that a finished example's basis and factors may go on
    changing.
    """

    basis: Unfrozen[PyTree[Array]]
    hessenberg: Unfrozen[Float[Array, " columns rows"]]  # transposed
    rotation: Unfrozen[Float[Array, " columns rows"]]
    last_row: Unfrozen[Float[Array, " rows"]]
    column: Unfrozen[Int[Array, ""]]
    num_columns: Int[Array, ""]
    residual_norm: Scalar
    exhausted: Bool[Array, ""]


def _norm(vector: PyTree[Array]) -> Scalar:
    return jnp.sqrt(tree_dot(vector, vector))


def _divide(vector: PyTree[Array], norm: Scalar) -> PyTree[Array]:
    inverse = jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1), 0)
    return jtu.tree_map(lambda x: x * inverse, vector)


def _start_cycle(
    residual: PyTree[Array], norm: Scalar, basis: PyTree[Array], restart: int
) -> _Cycle:
    rows = jnp.zeros((restart, restart + 1), norm.dtype)
    return _Cycle(
        basis=Unfrozen(history_set(basis, 0, _divide(residual, norm))),
        hessenberg=Unfrozen(rows),
        rotation=Unfrozen(rows),
        last_row=Unfrozen(jnp.zeros(restart + 1, norm.dtype).at[0].set(1)),
        column=Unfrozen(jnp.array(0)),
        num_columns=jnp.array(0),
        residual_norm=norm,
        exhausted=jnp.array(False),
    )


def _arnoldi_step(
    product: Callable[[PyTree[Array]], PyTree[Array]],
    like: PyTree[Array],
    start_norm: Scalar,
    cycle: _Cycle,
    active: Bool[Array, ""],
) -> _Cycle:
    j = cycle.column.value
    basis = cycle.basis.value
    last_row = cycle.last_row.value
    rows = jnp.arange(last_row.shape[0])
    newest = history_get(basis, j, like)
    image = product(newest)
    image_norm = _norm(image)
    # The operator of an implicit adjoint has most of the product along the vector
    # itself. Without that first there is little to cancel.
    along = tree_dot(newest, image)
    image = jtu.tree_map(lambda x, v: x - along * v, image, newest)
    once = _orthogonalise(basis, image, rows <= j)
    cancelled = active & (once[2] < _CANCELLATION * _norm(image))

    def again():
        vector, projections, norm = _orthogonalise(basis, once[0], rows <= j)
        twice = vector, once[1] + projections, norm
        # By the example, so that none depends on its neighbours.
        return jtu.tree_map(lambda x, y: jnp.where(cancelled, x, y), twice, once)

    image, projections, norm = lax.cond(eqxi.unvmap_any(cancelled), again, lambda: once)
    projections = projections + jnp.where(rows == j, along, 0)

    # The rotation that zeroes the last element of the new column of the Hessenberg
    # matrix, as the rotations before have left it.
    upper = jnp.sum(last_row * projections)
    radius = jnp.sqrt(upper**2 + norm**2)
    # Of NaN the rotation is NaN, and so is the residual.
    safe_radius = jnp.where(radius == 0, 1, radius)
    cos = jnp.where(radius == 0, 1, upper / safe_radius)
    sin = jnp.where(radius == 0, 0, norm / safe_radius)
    new_rotation = jnp.where(rows == j + 1, sin, cos * last_row)
    new_last_row = jnp.where(rows == j + 1, cos, -sin * last_row)
    column = jnp.where(rows == j + 1, norm, projections)
    # The Krylov space maps into a smaller one, and the column adds nothing.
    exhausted = radius <= _SINGULAR * jnp.finfo(norm.dtype).eps * image_norm
    residual_norm = start_norm * jnp.abs(new_last_row[0])
    return _Cycle(
        basis=Unfrozen(history_set(basis, j + 1, _divide(image, norm))),
        hessenberg=Unfrozen(history_set(cycle.hessenberg.value, j, column)),
        rotation=Unfrozen(history_set(cycle.rotation.value, j, new_rotation)),
        last_row=Unfrozen(new_last_row),
        column=Unfrozen(j + 1),
        num_columns=cycle.num_columns + 1,
        residual_norm=jnp.where(exhausted, cycle.residual_norm, residual_norm),
        exhausted=exhausted,
    )


def _orthogonalise(
    basis: PyTree[Array], vector: PyTree[Array], filled: Bool[Array, " rows"]
) -> tuple[PyTree[Array], Float[Array, " rows"], Scalar]:
    """Classical Gram-Schmidt: the vector, its projections, and the norm left over."""
    # All of the basis at once, the part not filled yet included: two products with a
    # matrix, which is faster than a loop over the part that is.
    projections = jnp.where(filled, history_dot(basis, vector), 0)
    span = history_combine(projections, basis, vector)
    vector = jtu.tree_map(jnp.subtract, vector, span)
    return vector, projections, _norm(vector)


def _combine(
    cycle: _Cycle, like: PyTree[Array], start_norm: Scalar
) -> tuple[PyTree[Array], Scalar]:
    """The element of the Krylov space with the least residual: back substitution.

    **Returns:**

    The element, and a bound on how far rounding puts its residual off.
    """
    hessenberg, rotation = cycle.hessenberg.value, cycle.rotation.value
    restart = rotation.shape[0]
    columns = jnp.arange(restart)
    triangle = jnp.dot(rotation, hessenberg.T, precision=lax.Precision.HIGHEST)
    pivots = jnp.diagonal(triangle)
    num_columns = cycle.num_columns - jnp.where(cycle.exhausted, 1, 0)
    usable = (columns < num_columns) & (pivots != 0)
    inverses = jnp.where(usable, 1 / jnp.where(usable, pivots, 1), 0)

    def substitute(i, coefficients):
        j = restart - 1 - i
        value = coefficients[j] * inverses[j]
        rest = coefficients - triangle[:, j] * value
        coefficients = jnp.where(columns < j, rest, coefficients)
        return jnp.where(columns == j, value, coefficients)

    coefficients = jnp.where(usable, start_norm * rotation[:, 0], 0)
    coefficients = lax.fori_loop(0, restart, substitute, coefficients)
    image_norms = jnp.sqrt(jnp.sum(hessenberg**2, axis=1))
    largest = jnp.max(jnp.abs(coefficients) * image_norms)
    rounding_error = _ROUNDINGS * jnp.finfo(pivots.dtype).eps * largest
    # The last vector of the basis is none of the columns'.
    coefficients = jnp.pad(coefficients, (0, 1))
    element = history_combine(coefficients, cycle.basis.value, like)
    return element, rounding_error
