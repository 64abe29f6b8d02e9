import functools as ft
from typing import ClassVar

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar, ScalarLike

from .._internal.checks import check_integer, check_tolerances, integer
from .._internal.elimination import back_substitute
from .._internal.history import (
    empty_history,
    history_combine,
    history_dot,
    history_get,
    history_set,
)
from .._internal.loop import Unfrozen, while_loop
from .._internal.pytree import tree_dot, working_dtype
from .._internal.types import LinearSolution, Options, Product
from .._internal.unvmap import unvmap_any
from .matrix_free import AbstractMatrixFreeSolver


# What orthogonalisation leaves of a product has lost accuracy to cancellation, and so
# the basis its orthogonality (Giraud et al., *The loss of orthogonality in the
# Gram-Schmidt orthogonalization process*, 2005). If it leaves less than this share, the
# rotations are not trusted. If half of the digits are lost, the cycle ends.
_CANCELLATION = 0.1

# A column of the triangular factor that is this many roundings long counts as zero.
_SINGULAR = 10

# By how many roundings of its largest term a combination of columns may be off.
_ROUNDINGS = 4

# A cycle that ends with more than this share of its residual has stagnated.
_STAGNATION = 0.999

# If this share of a residual is rounding, and was there before the cycle, then products
# are no more accurate than that.
_ROUNDING = 0.5


class GivensGMRES(AbstractMatrixFreeSolver):
    r"""GMRES that knows its residual after every product, and stops there.

    The Hessenberg matrix is kept in triangular form by Givens rotations (Saad and
    Schultz, *GMRES*, 1986, section 3.2). They give the two-norm of the residual after
    every product at no further cost, so that a solve makes only the products that it
    needs. [`lineax.GMRES`][] looks at its residual at the end of a restart cycle.

    Stops when `two_norm(b - A x) <= atol + rtol * two_norm(b)`. Only for real square
    operators. Under `vmap` every example stops on its own.

    This solver supports the following `options` of [`lineax.linear_solve`][]:

    - `preconditioner`: a [`lineax.AbstractLinearOperator`][] close to the inverse, used
        on the right: the stopping rule sees the residual of the system itself.
    - `y0`: where to start; zero by default. A start costs one product.

    The statistics are `num_steps` (the products with the operator) and `residual_norm`
    (`two_norm(b - A x)`). The rotations give the residual of exact arithmetic. After a
    restart, if the solution is huge, or if the basis has lost its orthogonality (every
    product is orthogonalised once), rounding may have changed it: one product then
    verifies it, and a cycle that has not helped is undone. A solve that is not
    successful ends in one of three results:

    - `max_steps_reached`;
    - `breakdown`: a cycle made no progress, because the operator is singular on the
        Krylov space, to rounding. Also where the vector or a product is not finite; the
        solution is then NaN.
    - `stagnation`: a cycle made no progress for another reason, or what is left of the
        residual is rounding, as it soon is where products have TF32 or bfloat16
        operands. Raise `restart`, give a preconditioner, or choose a tolerance that
        rounding allows.

    **Arguments:**

    - `rtol`: relative tolerance.
    - `atol`: absolute tolerance.
    - `max_steps`: the largest number of products with the operator; `None` for no
        bound.
    - `restart`: the dimension of the Krylov space, which takes `restart + 1` vectors
        of memory.
    """

    _options: ClassVar[tuple[str, ...]] = ("preconditioner", "y0")
    # Its `num_steps` is the number of products with the operator.
    counts_products: ClassVar[bool] = True

    rtol: ScalarLike
    atol: ScalarLike
    max_steps: int | None = integer(500)
    restart: int = integer(20)

    def __check_init__(self):
        check_tolerances(self)
        check_integer(self, "max_steps", self.max_steps, 1, optional=True)
        check_integer(self, "restart", self.restart, 1)

    def _solve(
        self, product: Product, vector: PyTree[Array], options: Options
    ) -> LinearSolution:
        dtype = working_dtype(vector)
        size = sum(x.size for x in jtu.tree_leaves(vector))
        rtol, atol = jnp.asarray(self.rtol, dtype), jnp.asarray(self.atol, dtype)
        system = _System(
            product=product,
            precondition=options.get("preconditioner", lambda x: x),
            vector=vector,
            target=atol + rtol * _norm(vector),
            restart=max(1, min(self.restart, size)),
            max_steps=self.max_steps,
            from_zero="y0" not in options,
        )

        def goes_on(solve):
            unfinished = ~solve.verified | (solve.residual_norm > system.target)
            return unfinished & ~solve.stagnation & system.affords(solve.num_steps)

        start = _start_solve(system, options.get("y0"))
        solve = while_loop(goes_on, ft.partial(_run_cycle, system), start)
        # NaN and infinity fail every comparison with the target. They come from the
        # right-hand side or from a product, and must not pass for a solution of zero.
        finite = jnp.isfinite(solve.residual_norm)
        solution = jtu.tree_map(lambda x: jnp.where(finite, x, jnp.nan), solve.solution)
        converged = finite & solve.verified & (solve.residual_norm <= system.target)
        broken = (solve.stagnation & solve.singular) | ~finite
        result = lx.RESULTS.where(
            solve.stagnation, lx.RESULTS.stagnation, lx.RESULTS.max_steps_reached
        )
        result = lx.RESULTS.where(broken, lx.RESULTS.breakdown, result)
        result = lx.RESULTS.where(converged, lx.RESULTS.successful, result)
        stats = {"num_steps": solve.num_steps, "residual_norm": solve.residual_norm}
        return solution, result, stats


class _System(eqx.Module):
    """What does not change while one system is solved."""

    product: Product
    precondition: Product
    vector: PyTree[Array]
    target: Scalar
    restart: int
    max_steps: int | None
    from_zero: bool

    def residual(self, x: PyTree[Array]) -> PyTree[Array]:
        return jtu.tree_map(jnp.subtract, self.vector, self.product(x))

    def affords(self, num_steps: Int[Array, ""]) -> Bool[Array, ""] | bool:
        return True if self.max_steps is None else num_steps < self.max_steps


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
    """The carry of the loop within a cycle: the Arnoldi basis, and the QR factors."""

    # A new rotation changes the last row of the orthogonal factor only, so that a step
    # costs two rows of the small matrices and not the whole of them. Nothing is read
    # past an example's `num_columns`, so that a finished example's basis and factors
    # may go on changing.
    basis: Unfrozen[PyTree[Array]]
    # Of the Hessenberg matrix a column, and of the orthogonal factor a row.
    factors: Unfrozen[Float[Array, " columns 2*rows"]]
    last_row: Unfrozen[Float[Array, " rows"]]
    column: Unfrozen[Int[Array, ""]]
    num_columns: Int[Array, ""]
    residual_norm: Scalar
    exhausted: Bool[Array, ""]
    least_share: Scalar


def _norm(vector: PyTree[Array]) -> Scalar:
    return jnp.sqrt(tree_dot(vector, vector))


def _divide(vector: PyTree[Array], norm: Scalar) -> PyTree[Array]:
    inverse = jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1), 0)
    return jtu.tree_map(lambda x: x * inverse, vector)


def _start_solve(system: _System, y0: PyTree[Array] | None) -> _Solve:
    if y0 is None:
        solution = jtu.tree_map(jnp.zeros_like, system.vector)
        residual = system.vector
    else:
        solution = y0
        residual = system.residual(y0)
    return _Solve(
        solution=solution,
        residual=residual,
        residual_norm=_norm(residual),
        num_steps=jnp.array(0 if y0 is None else 1),
        verified=jnp.array(True),
        stagnation=jnp.array(False),
        singular=jnp.array(False),
        num_cycles=Unfrozen(jnp.array(0)),
        basis=Unfrozen(empty_history(system.restart + 1, system.vector)),
    )


def _run_cycle(system: _System, solve: _Solve) -> _Solve:
    start_norm = solve.residual_norm

    def goes_on(cycle):
        unfinished = (cycle.residual_norm > system.target) & ~cycle.exhausted
        unfinished = unfinished & ~_is_spent(cycle)
        room = cycle.column.value < system.restart
        return unfinished & room & system.affords(solve.num_steps + cycle.num_columns)

    cycle = while_loop(
        goes_on,
        lambda cycle: _arnoldi_step(system, start_norm, cycle),
        _start_cycle(system, solve),
    )
    combination, rounding_error = _combine(cycle, system.vector, start_norm)
    solution = jtu.tree_map(jnp.add, solve.solution, system.precondition(combination))
    return _verify(system, solve, cycle, solution, rounding_error)


def _is_spent(cycle: _Cycle) -> Bool[Array, ""]:
    return cycle.least_share < jnp.sqrt(jnp.finfo(cycle.least_share.dtype).eps)


def _verify(
    system: _System,
    solve: _Solve,
    cycle: _Cycle,
    solution: PyTree[Array],
    rounding_error: Scalar,
) -> _Solve:
    """What a cycle has achieved; taken back if it is nothing."""
    num_steps = solve.num_steps + cycle.num_columns
    # The rotations tell the residual of exact arithmetic. That is as good as the true
    # one, which costs a product, unless there was much to round.
    trusted = system.from_zero & (solve.num_cycles.value == 0)
    trusted = trusted & (cycle.least_share >= _CANCELLATION)
    accurate = rounding_error <= system.target
    verified = trusted & accurate & (cycle.residual_norm <= system.target)
    check = ~verified & system.affords(num_steps)
    # Under `vmap` a product is one for the whole batch: made if any example needs it.
    residual = lax.cond(
        unvmap_any(check),
        lambda: system.residual(solution),
        lambda: solve.residual,
    )
    norm = jnp.where(check, _norm(residual), cycle.residual_norm)
    # Negated, so that it is true of NaN.
    stagnation = check & ~(norm <= _STAGNATION * solve.residual_norm)
    # What the rotations do not know of is rounding.
    rounded = norm - cycle.residual_norm > _ROUNDING * norm
    stagnation = stagnation | (
        check
        & rounded
        & (norm > jnp.maximum(_ROUNDING * solve.residual_norm, system.target))
    )
    # A cycle that overflowed by itself is taken back. One whose products are not finite
    # is not: the operator is to blame, and the solution NaN.
    spoilt = ~jnp.isfinite(cycle.residual_norm)
    norm = jnp.where(spoilt, jnp.nan, norm)
    take_back = stagnation & ~spoilt & ~(norm < solve.residual_norm)
    new = solution, residual, norm
    old = solve.solution, solve.residual, solve.residual_norm
    solution, residual, norm = jtu.tree_map(
        lambda x, y: jnp.where(take_back, y, x), new, old
    )
    return _Solve(
        solution=solution,
        residual=residual,
        residual_norm=norm,
        num_steps=num_steps + jnp.where(check, 1, 0),
        verified=verified | check,
        stagnation=stagnation,
        singular=cycle.exhausted | _is_spent(cycle) | ~accurate,
        num_cycles=Unfrozen(solve.num_cycles.value + 1),
        basis=cycle.basis,
    )


def _start_cycle(system: _System, solve: _Solve) -> _Cycle:
    norm, num_rows = solve.residual_norm, system.restart + 1
    first = _divide(solve.residual, norm)
    return _Cycle(
        basis=Unfrozen(history_set(solve.basis.value, 0, first)),
        factors=Unfrozen(jnp.zeros((system.restart, 2 * num_rows), norm.dtype)),
        last_row=Unfrozen(jnp.zeros(num_rows, norm.dtype).at[0].set(1)),
        column=Unfrozen(jnp.array(0)),
        num_columns=jnp.array(0),
        residual_norm=norm,
        exhausted=jnp.array(False),
        least_share=jnp.ones_like(norm),
    )


def _arnoldi_step(system: _System, start_norm: Scalar, cycle: _Cycle) -> _Cycle:
    j = cycle.column.value
    basis = cycle.basis.value
    rows = jnp.arange(system.restart + 1)
    newest = history_get(basis, j, system.vector)
    image = system.product(system.precondition(newest))
    image_norm = _norm(image)
    image, projections, norm, share = _project_out(basis, newest, image, rows, j)
    last = rows == j + 1
    radius, rotation, last_row = _rotate(cycle.last_row.value, projections, norm, last)
    # The Krylov space maps into a smaller one, and the column adds nothing.
    exhausted = radius <= _SINGULAR * jnp.finfo(norm.dtype).eps * image_norm
    residual_norm = start_norm * jnp.abs(last_row[0])
    factors = jnp.concatenate([jnp.where(last, norm, projections), rotation])
    return _Cycle(
        basis=Unfrozen(history_set(basis, j + 1, _divide(image, norm))),
        factors=Unfrozen(history_set(cycle.factors.value, j, factors)),
        last_row=Unfrozen(last_row),
        column=Unfrozen(j + 1),
        num_columns=cycle.num_columns + 1,
        residual_norm=jnp.where(exhausted, cycle.residual_norm, residual_norm),
        exhausted=exhausted,
        # The vector that follows the last column is not used.
        least_share=jnp.where(
            residual_norm <= system.target,
            cycle.least_share,
            jnp.minimum(cycle.least_share, share),
        ),
    )


def _project_out(
    basis: PyTree[Array],
    newest: PyTree[Array],
    image: PyTree[Array],
    rows: Int[Array, " rows"],
    j: Int[Array, ""],
) -> tuple[PyTree[Array], Float[Array, " rows"], Scalar, Scalar]:
    """A product without its projections on the basis, and the share that is left."""
    # The operator of an implicit adjoint has most of the product along the vector
    # itself. Without that first there is little to cancel.
    along = tree_dot(newest, image)
    image = jtu.tree_map(lambda x, v: x - along * v, image, newest)
    image_norm = _norm(image)
    projections = jnp.where(rows <= j, history_dot(basis, image), 0)
    span = history_combine(projections, basis, image)
    image = jtu.tree_map(jnp.subtract, image, span)
    norm = _norm(image)
    share = norm / jnp.where(image_norm > 0, image_norm, 1)
    return image, projections + jnp.where(rows == j, along, 0), norm, share


def _rotate(
    last_row: Float[Array, " rows"],
    projections: Float[Array, " rows"],
    norm: Scalar,
    last: Bool[Array, " rows"],
) -> tuple[Scalar, Float[Array, " rows"], Float[Array, " rows"]]:
    """The pivot of the new column, and the last two rows of the orthogonal factor."""
    # The rotation zeroes the last element of the new column of the Hessenberg matrix,
    # as the rotations before have left it.
    upper = jnp.sum(last_row * projections)
    radius = jnp.sqrt(upper**2 + norm**2)
    # Of NaN the rotation is NaN, and so is the residual.
    safe_radius = jnp.where(radius == 0, 1, radius)
    cos = jnp.where(radius == 0, 1, upper / safe_radius)
    sin = jnp.where(radius == 0, 0, norm / safe_radius)
    rotation = jnp.where(last, sin, cos * last_row)
    new_last_row = jnp.where(last, cos, -sin * last_row)
    return radius, rotation, new_last_row


def _combine(
    cycle: _Cycle, like: PyTree[Array], start_norm: Scalar
) -> tuple[PyTree[Array], Scalar]:
    """The element of the Krylov space with the least residual: back substitution.

    **Returns:**

    The element, and a bound on how far rounding puts its residual off.
    """
    hessenberg, rotation = jnp.split(cycle.factors.value, 2, axis=1)
    restart = rotation.shape[0]
    columns = jnp.arange(restart)
    triangle = jnp.dot(rotation, hessenberg.T, precision=lax.Precision.HIGHEST)
    pivots = jnp.diagonal(triangle)
    num_columns = cycle.num_columns - jnp.where(cycle.exhausted, 1, 0)
    usable = (columns < num_columns) & (pivots != 0)
    inverses = jnp.where(usable, 1 / jnp.where(usable, pivots, 1), 0)
    # Scaled to a unit diagonal; what is not usable takes no part.
    triangle = jnp.where(usable[:, None], triangle * inverses[:, None], 0)
    coefficients = back_substitute(triangle, inverses * start_norm * rotation[:, 0])
    image_norms = jnp.sqrt(jnp.sum(hessenberg**2, axis=1))
    largest = jnp.max(jnp.abs(coefficients) * image_norms)
    rounding_error = _ROUNDINGS * jnp.finfo(pivots.dtype).eps * largest
    # The last vector of the basis is none of the columns'.
    coefficients = jnp.pad(coefficients, (0, 1))
    element = history_combine(coefficients, cycle.basis.value, like)
    return element, rounding_error
