from collections.abc import Callable
from typing import Any, get_origin

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Bool, Int, PyTree, Scalar, ScalarLike

from .._internal.checks import (
    check_hyperparameter,
    check_number,
    check_options,
    check_tolerances,
)
from .._internal.loop import Unfrozen
from .._internal.pytree import tree_all_finite, working_dtype
from .adams import VCABM3
from .progress import Progress, start_progress
from .pseudo_transient import PseudoTransient


# A step over which the residual grows by more than this has left the region of
# stability, whatever its error estimate says. An explicit solver gains from stepping
# over that limit now and then, as the modes that it excites are the first to decay. If
# the residual of an implicit solver grows, its inner solve has gone astray.
_EXPLICIT_GROWTH = 10.0
_IMPLICIT_GROWTH = 2.0


class _Integration(eqx.Module):
    field: PyTree[Array]
    solver_state: PyTree
    controller_state: PyTree


class _SteadyStateState(eqx.Module):
    progress: Progress
    start: Scalar
    end: Scalar
    stuck: Bool[Array, ""]
    num_accepted_steps: Int[Array, ""]
    num_rejected_steps: Int[Array, ""]
    integration: Unfrozen[_Integration]


class SteadyState(optx.AbstractRootFinder):
    """Follows `dz/dt = F(z)` to its steady state: any Diffrax solver as a root finder.

    For a fixed point of `f` that is `dz/dt = f(z) - z`. Each step is one attempted step
    of the ODE solver under the step-size controller.

    Stops once `norm(F(z)) <= atol + rtol * norm(f(z))`, where `f(z) = F(z) + z`, at an
    iterate that was evaluated, and returns the best such iterate. The residual at the
    end of a step is the stage that the solver has there (first-same-as-last explicit
    Runge-Kutta methods and [`implicitnets.VCABM3`][]) or one more evaluation.

    The flow converges if every eigenvalue of the Jacobian of `F` has a negative real
    part; for a fixed point, every eigenvalue of the Jacobian of `f` a real part below
    one, which is less than what fixed-point iteration asks for.

    A step is rejected where it gives values that are not finite or a residual many
    times that at its start. If the step size comes down to nothing, so that the
    tolerance seems out of reach, the result is `stagnation`.

    The statistics are `num_accepted_steps`, `num_rejected_steps`, `final_time` and, for
    the explicit Runge-Kutta methods, `diffrax.Euler` and [`implicitnets.VCABM3`][],
    `nfe`, the evaluations of the function. How many an implicit solver's inner solves
    take is not known.

    An implicit solver factorises the Jacobian, a dense matrix of the size of the state,
    in every step (with Diffrax' default root finder, whose tolerances are set here to
    the current residual unless you have set them). That takes very few steps, each at a
    cost that only a small state is worth.

    **Arguments:**

    - `ode_solver`: any Diffrax solver of ordinary differential equations.
    - `rtol`, `atol`: the tolerances of the stopping rule.
    - `norm`: the norm of the stopping rule.
    - `stepsize_controller`: any Diffrax step-size controller. With one that has
        tolerances of its own, as `diffrax.PIDController` does, the residual of an
        explicit solver gets down to about these and hovers there: choose them a good
        deal smaller than `rtol` and `atol`, or have `with_pid_controller` derive them.
    - `dt0`: the size of the first step. The time scale of `f(z) - z` is 1.
    """

    ode_solver: dfx.AbstractSolver
    rtol: ScalarLike
    atol: ScalarLike
    norm: Callable[[PyTree[Array]], Scalar]
    stepsize_controller: dfx.AbstractStepSizeController
    dt0: ScalarLike

    # Written out, as type checkers take the abstract attributes of Optimistix for
    # fields, which then come first.
    def __init__(
        self,
        ode_solver: dfx.AbstractSolver,
        rtol: ScalarLike = 1e-4,
        atol: ScalarLike = 1e-6,
        norm: Callable[[PyTree[Array]], Scalar] = optx.two_norm,
        stepsize_controller: dfx.AbstractStepSizeController = PseudoTransient(),
        dt0: ScalarLike = 1.0,
    ):
        self.ode_solver = ode_solver
        self.rtol = rtol
        self.atol = atol
        self.norm = norm
        self.stepsize_controller = stepsize_controller
        self.dt0 = dt0

    def __check_init__(self):
        check_tolerances(self)
        check_number(self, "dt0", lambda x: x > 0, "positive")
        structure = getattr(self.ode_solver, "term_structure", None)
        structure = get_origin(structure) or structure
        check_hyperparameter(
            self,
            "ode_solver",
            isinstance(structure, type) and issubclass(dfx.ODETerm, structure),
            "a Diffrax solver for a single `ODETerm`",
        )
        check_hyperparameter(
            self,
            "stepsize_controller",
            isinstance(self.stepsize_controller, dfx.AbstractStepSizeController),
            "a Diffrax step-size controller",
        )

    @classmethod
    def with_pid_controller(
        cls,
        ode_solver: dfx.AbstractAdaptiveSolver,
        rtol: float = 1e-4,
        atol: float = 1e-6,
        norm: Callable[[PyTree[Array]], Scalar] = optx.two_norm,
        dt0: ScalarLike = 1.0,
    ) -> "SteadyState":
        """A solver whose controller has tolerances that follow from its own.

        The controller is a `diffrax.PIDController` with a tenth of `rtol`, and a tenth
        of `atol` or of `rtol / 100`, whichever is larger. Where the path itself
        matters, as it is then followed to that accuracy; it takes more evaluations than
        [`implicitnets.PseudoTransient`][], the default.

        ??? info "How it compares"

            Evaluations, means over 16 examples, `dfx.Tsit5()` on the cell
            `tanh(W z + x)`, 128 dimensions, spectral radius 0.9, with ODE tolerances of
            some share of `rtol` and `atol`.

            | `rtol`, `atol` | a tenth | a hundredth | `PseudoTransient()` |
            |---|---|---|---|
            | 1e-3, 1e-3 | 113 | 118 | 84 |
            | 1e-4, 1e-6 | 204 | 306 | 116 |
            | 1e-5, 0 | 341 | 1301 | 146 |

        **Arguments:**

        - `ode_solver`, `rtol`, `atol`, `norm`, `dt0`: as for the class.

        **Returns:**

        The solver.
        """
        controller = dfx.PIDController(
            rtol=0.1 * rtol, atol=0.1 * max(atol, 0.01 * rtol)
        )
        return cls(ode_solver, rtol, atol, norm, controller, dt0)

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        del f_struct, aux_struct, tags
        check_options(self, options)
        dtype = working_dtype(y)
        z = _cast(y, dtype)
        field = _vector_field(fn, y)(None, z, args)
        terms = dfx.ODETerm(_vector_field(fn, y, known=(z, field)))
        start = jnp.zeros((), dtype)
        end, controller_state = self.stepsize_controller.wrap(1).init(
            terms,
            start,
            jnp.array(jnp.inf, dtype),
            z,
            jnp.asarray(self.dt0, dtype),
            args,
            self.ode_solver.func,
            self.ode_solver.error_order(terms),
        )
        solver_state = self.ode_solver.init(terms, start, end, z, args)
        return _SteadyStateState(
            progress=self._judge(start_progress(y), y, field),
            start=start,
            end=jnp.asarray(end, dtype),
            stuck=jnp.array(False),
            num_accepted_steps=jnp.array(0),
            num_rejected_steps=jnp.array(0),
            integration=Unfrozen(
                _Integration(
                    field=field,
                    solver_state=_as_arrays(
                        _remember(self.ode_solver, solver_state, field)
                    ),
                    controller_state=_as_arrays(controller_state),
                )
            ),
        )

    def step(self, fn, y, args, options, state, tags):
        del options, tags
        integration = state.integration.value
        z0 = _cast(y, state.start.dtype)
        f0 = integration.field
        terms = dfx.ODETerm(_vector_field(fn, y, known=(z0, f0)))

        # The problem is autonomous: it has no jumps.
        z1, error, _, solver_state, solver_result = self._inner_solver(state).step(
            terms, state.start, state.end, z0, args, integration.solver_state, False
        )
        new_y = _cast_like(z1, y)
        f1 = _recall(self.ode_solver, solver_state)
        if f1 is None:
            f1 = _vector_field(fn, y)(None, z1, args)
        order = self.ode_solver.error_order(terms)
        if error is None:
            error = _trapezoidal_error(z0, z1, f0, f1, state.end - state.start)
            order = 2
        growth = self.norm(f1) / self.norm(f0)
        usable = (
            (solver_result == dfx.RESULTS.successful)
            & tree_all_finite((f1, error))
            & (growth <= (_IMPLICIT_GROWTH if self._is_implicit else _EXPLICIT_GROWTH))
        )
        error = jtu.tree_map(lambda x: jnp.where(usable, x, jnp.inf), error)
        keep, start, end, controller_state, stuck = self._adapt(
            state, z0, z1, args, error, order, growth
        )
        progress = self._judge(state.progress, new_y, f1)
        # A rejected step may still be the one that gets there; if not, whatever is
        # wrong with it is not the verdict on the solve.
        count = keep | (progress.error < state.progress.best_error)
        new_state = _SteadyStateState(
            progress=_where(count, progress, state.progress),
            start=start,
            end=end,
            stuck=stuck,
            num_accepted_steps=state.num_accepted_steps + jnp.where(keep, 1, 0),
            num_rejected_steps=state.num_rejected_steps + jnp.where(keep, 0, 1),
            integration=Unfrozen(
                _Integration(
                    field=_where(keep, f1, f0),
                    solver_state=_where(
                        keep,
                        _as_arrays(_remember(self.ode_solver, solver_state, f1)),
                        integration.solver_state,
                    ),
                    controller_state=_as_arrays(controller_state),
                )
            ),
        )
        return _where(keep, new_y, y), new_state, _no_aux(fn, y, args)

    def terminate(self, fn, y, args, options, state, tags):
        del fn, y, args, options, tags
        converged, result = state.progress.verdict()
        stagnated = state.stuck & ~converged & (result == optx.RESULTS.successful)
        result = optx.RESULTS.where(
            stagnated,
            optx.RESULTS.stagnation,  # pyright: ignore[reportArgumentType]
            result,
        )
        return converged, result

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        del y, options, tags, result
        num_steps = state.num_accepted_steps + state.num_rejected_steps
        stats = {
            "num_accepted_steps": state.num_accepted_steps,
            "num_rejected_steps": state.num_rejected_steps,
            "final_time": state.start,
        }
        num_others = 1
        if len(jtu.tree_leaves(aux)) > 0:
            # No solver hands out what the function returns besides its value.
            _, aux = fn(state.progress.best_y, args)
            num_others += 1
        evaluations_per_step = _evaluations_per_step(self.ode_solver)
        if evaluations_per_step is not None:
            stats["nfe"] = evaluations_per_step * num_steps + num_others
        return state.progress.best_y, aux, stats

    def _judge(self, progress, y, field):
        f = jtu.tree_map(lambda a, b: a.astype(b.dtype) + b, y, field)
        return progress.update(
            y, f, field, rtol=self.rtol, atol=self.atol, norm=self.norm
        )

    @property
    def _is_implicit(self):
        return isinstance(self.ode_solver, dfx.AbstractImplicitSolver)

    def _adapt(self, state, z0, z1, args, error, order, growth):
        """Whether to keep a step, the next one, and whether there is no going on."""
        controller = self.stepsize_controller.wrap(1)
        controller_state = state.integration.value.controller_state
        step = (state.start, state.end, z0, z1)
        if isinstance(controller, PseudoTransient) and self._is_implicit:
            result = dfx.RESULTS.successful
            keep, start, end = controller.adapt_to_growth(*step, error, order, growth)
        else:
            keep, start, end, _, controller_state, result = controller.adapt_step_size(
                *step, args, error, order, controller_state
            )
        start = jnp.asarray(start, state.start.dtype)
        end = jnp.asarray(end, state.end.dtype)
        dt_min = jnp.finfo(start.dtype).eps * jnp.asarray(self.dt0, start.dtype)
        # Also where a time has overflowed.
        stuck = ~(end - start > dt_min) | (result != dfx.RESULTS.successful)
        return jnp.asarray(keep), start, end, controller_state, stuck

    def _inner_solver(self, state):
        """The ODE solver, with tolerances for its root finder if it has one."""
        if not self._is_implicit:
            return self.ode_solver
        # Relative to the residual at the start of the step. Diffrax' root finder goes
        # for a hundredth of that. Asked for less error it runs into its limit of steps,
        # as it keeps its Jacobian; asked for more it takes more ODE steps.
        scale = self.norm(state.integration.value.field)
        if _first_same_as_last(self.ode_solver) is None:
            # These solve for the increment, the others for the vector field.
            scale = scale * (state.end - state.start)
        tolerances = {"rtol": 0.0, "atol": scale, "norm": self.norm}

        solver: Any = self.ode_solver
        for name, tolerance in tolerances.items():
            given = getattr(solver.root_finder, name)
            # What is to come from the step-size controller is marked by an object that
            # is neither a number nor a function.
            if not eqx.is_array_like(given) and not callable(given):
                solver = eqx.tree_at(
                    lambda s: getattr(s.root_finder, name), solver, tolerance
                )
        return solver


def _vector_field(
    fn: Callable, y: PyTree[Array], known: tuple[PyTree, PyTree] | None = None
) -> Callable:
    """`fn`, on states of the dtypes of `y`, as Diffrax calls it.

    `known` is a point and the value there. Euler's method, for one, then evaluates
    nothing.
    """
    dtype = working_dtype(y)

    def vector_field(t, z, args):
        del t
        if known is not None:
            # One and the same object, and so one and the same value when traced.
            known_z, known_field = known
            pairs = zip(jtu.tree_leaves(z), jtu.tree_leaves(known_z), strict=True)
            if all(a is b for a, b in pairs):
                return known_field
        field, _ = fn(_cast_like(z, y), args)
        return _cast(field, dtype)

    return vector_field


def _first_same_as_last(solver: dfx.AbstractSolver) -> dfx.ButcherTableau | None:
    tableau = _tableau(solver)
    return tableau if tableau is not None and tableau.fsal else None


def _tableau(solver: dfx.AbstractSolver) -> dfx.ButcherTableau | None:
    # Not `isinstance`, which also holds for what wraps a Runge-Kutta method.
    if issubclass(type(solver), dfx.AbstractRungeKutta):
        return solver.tableau  # pyright: ignore[reportAttributeAccessIssue]
    return None


def _recall(solver: dfx.AbstractSolver, solver_state: PyTree) -> PyTree[Array] | None:
    """The vector field at a step's end, if the solver has evaluated it exactly there.

    An implicit solver has it only to the tolerance of its inner solve.
    """
    tableau = _first_same_as_last(solver)
    if tableau is not None and not tableau.implicit:
        _, field = solver_state
        return field
    if isinstance(solver, VCABM3):
        return solver_state.field
    return None


def _remember(
    solver: dfx.AbstractSolver, solver_state: PyTree, field: PyTree[Array]
) -> PyTree:
    """The state of a solver that is to start its next step from this vector field."""
    if _first_same_as_last(solver) is not None:
        return False, field
    return solver_state


def _evaluations_per_step(solver: dfx.AbstractSolver) -> int | None:
    tableau = _tableau(solver)
    if tableau is not None and not tableau.implicit:
        # The first stage is known, or the residual at the end is one more.
        return tableau.num_stages + (-1 if tableau.fsal else 1)
    if type(solver) is dfx.Euler:
        return 1
    if isinstance(solver, VCABM3):
        return 2
    return None


def _trapezoidal_error(z0, z1, f0, f1, dt):
    return jtu.tree_map(
        lambda a, b, fa, fb: a + 0.5 * dt * (fa + fb) - b, z0, z1, f0, f1
    )


def _no_aux(fn, y, args):
    _, struct = eqx.filter_eval_shape(fn, y, args)
    return jtu.tree_map(
        lambda x: jnp.zeros(x.shape, x.dtype) if hasattr(x, "dtype") else x, struct
    )


def _cast(tree: PyTree[Array], dtype: Any) -> PyTree[Array]:
    return jtu.tree_map(lambda x: x.astype(dtype), tree)


def _cast_like(tree: PyTree[Array], like: PyTree[Array]) -> PyTree[Array]:
    return jtu.tree_map(lambda x, y: x.astype(y.dtype), tree, like)


def _as_arrays(tree: PyTree) -> PyTree:
    # A loop carries only arrays, while Diffrax keeps Python Booleans in its states.
    return jtu.tree_map(lambda x: jnp.asarray(x) if eqx.is_array_like(x) else x, tree)


def _where(pred: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
    return jtu.tree_map(
        lambda n, o: jnp.where(pred, n, o) if eqx.is_array(n) else n, new, old
    )
