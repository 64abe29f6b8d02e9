"""What is known of the states and stages of Diffrax's solvers."""

import diffrax as dfx
import jax.tree_util as jtu
from jaxtyping import Array, PyTree, Scalar

from .adams import VCABM3


def first_same_as_last(solver: dfx.AbstractSolver) -> dfx.ButcherTableau | None:
    tableau = _tableau(solver)
    return tableau if tableau is not None and tableau.fsal else None


def _tableau(solver: dfx.AbstractSolver) -> dfx.ButcherTableau | None:
    # Not `isinstance`, which also holds for what wraps a Runge-Kutta method.
    if issubclass(type(solver), dfx.AbstractRungeKutta):
        return solver.tableau  # pyright: ignore[reportAttributeAccessIssue]
    return None


def recall_field(
    solver: dfx.AbstractSolver, solver_state: PyTree
) -> PyTree[Array] | None:
    """The vector field at the end of a step, if the solver has evaluated it there."""
    tableau = first_same_as_last(solver)
    # An implicit solver has it only to the tolerance of its inner solve.
    if tableau is not None and not tableau.implicit:
        _, field = solver_state
        return field
    if isinstance(solver, VCABM3):
        return solver_state.field
    return None


def remember_field(
    solver: dfx.AbstractSolver, solver_state: PyTree, field: PyTree[Array]
) -> PyTree:
    """The state of a solver that is to start its next step from this vector field."""
    if first_same_as_last(solver) is not None:
        return False, field
    return solver_state


def evaluations_per_step(solver: dfx.AbstractSolver) -> int | None:
    tableau = _tableau(solver)
    if tableau is not None and not tableau.implicit:
        # The first stage is known, or the residual at the end is one more.
        return tableau.num_stages + (-1 if tableau.fsal else 1)
    if type(solver) is dfx.Euler:
        return 1
    if isinstance(solver, VCABM3):
        return 2
    return None


def trapezoidal_error(
    z0: PyTree[Array],
    z1: PyTree[Array],
    f0: PyTree[Array],
    f1: PyTree[Array],
    dt: Scalar,
) -> PyTree[Array]:
    """For solvers that estimate none: the distance to the trapezoidal rule."""
    return jtu.tree_map(
        lambda a, b, fa, fb: a + 0.5 * dt * (fa + fb) - b, z0, z1, f0, f1
    )
