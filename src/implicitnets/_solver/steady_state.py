from collections.abc import Callable
from typing import Any, get_origin, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Bool, Int, PyTree, Scalar, ScalarLike

from .._internal.checks import (
    check_number,
    check_part,
    check_stopping_rule,
    NON_NEGATIVE,
    Part,
    POSITIVE,
    STEP_SIZE_CONTROLLER,
)
from .._internal.loop import SolverState
from .._internal.pytree import (
    tree_all_finite,
    tree_astype,
    tree_cast_like,
    working_dtype,
)
from .._internal.types import Answer, Aux, Norm, RealScalarLike, Verdict, Y
from .abstract import AbstractSolver, Problem
from .progress import Progress, start_progress
from .pseudo_transient import PseudoTransient
from .stages import (
    evaluations_per_step,
    first_same_as_last,
    recall_field,
    remember_field,
    trapezoidal_error,
)


# A step over which the residual grows by more than this has left the region of
# stability, whatever its error estimate says. An explicit solver gains from stepping
# over that limit now and then, as the modes that it excites are the first to decay. If
# the residual of an implicit solver grows, its inner solve has gone astray.
_EXPLICIT_GROWTH = 10.0
_IMPLICIT_GROWTH = 2.0


class _Kept(eqx.Module):
    progress: Progress
    time: Scalar
    stuck: Bool[Array, ""]
    num_accepted_steps: Int[Array, ""]
    num_rejected_steps: Int[Array, ""]


class _Free(eqx.Module):
    step_end: Scalar
    field: Y
    solver_state: PyTree
    controller_state: PyTree


class _Attempt(NamedTuple):
    t0: Scalar
    t1: Scalar
    y0: Y
    y1: Y
    error: Y
    order: ScalarLike | None
    growth: Scalar  # of the residual norm


_ODE_SOLVER = Part(
    "a Diffrax solver of ordinary differential equations, such as `diffrax.Tsit5()`",
    dfx.AbstractSolver,
)
_ADAPTIVE_SOLVER = Part(
    "a Diffrax solver that estimates its error, such as `diffrax.Tsit5()`",
    dfx.AbstractAdaptiveSolver,
)


class SteadyState(AbstractSolver[_Kept, _Free], optx.AbstractRootFinder):
    """Follows `dz/dt = F(z)` to its steady state: any Diffrax solver as a root finder.

    For a fixed point of `f` that is `dz/dt = f(z) - z`. Each step is one attempted step
    of the ODE solver under the step-size controller.

    Stops when `norm(F(z)) <= atol + rtol * norm(f(z))`, where `f(z) = F(z) + z`. The
    rule is checked on an iterate that was evaluated, and the best one is returned. The
    residual at the end of a step is the stage that the solver has there
    (first-same-as-last explicit Runge-Kutta methods and [`implicitnets.VCABM3`][]) or
    one more evaluation.

    The flow converges if every eigenvalue of the Jacobian of `F` has a negative real
    part. For a fixed point that is a real part below one for every eigenvalue of the
    Jacobian of `f`, which is less than what fixed-point iteration asks for.

    A step is rejected where it gives values that are not finite or a residual many
    times that at its start. If the step size falls to the rounding error of `dt0`, the
    tolerance seems out of reach and the result is `stagnation`. So it is where rounding
    has stopped the solve, as in [`implicitnets.AndersonAcceleration`][].

    The statistics are `num_accepted_steps`, `num_rejected_steps`, `final_time` and, for
    the explicit Runge-Kutta methods, `diffrax.Euler` and [`implicitnets.VCABM3`][],
    `nfe`, the evaluations of the function. The evaluations in the inner solves of an
    implicit solver are not counted.

    In every step, an implicit solver factorises the Jacobian, a dense matrix of the
    size of the state. (Diffrax's default root finder does this. Its tolerances follow
    the current residual unless you have set them.) It takes very few steps, which are
    expensive unless the state is small.

    **Arguments:**

    - `ode_solver`: any Diffrax solver of ordinary differential equations.
    - `rtol`, `atol`: the tolerances of the stopping rule.
    - `norm`: the norm of the stopping rule.
    - `stepsize_controller`: any Diffrax step-size controller. With one that has
        tolerances of its own, as `diffrax.PIDController` does, the residual of an
        explicit solver falls to about these and hovers there: choose them a good deal
        smaller than `rtol` and `atol`, or have `with_pid_controller` derive them. With
        an implicit solver, a method `adapt_to_growth` of the controller, as of
        [`implicitnets.PseudoTransient`][], is called instead of `adapt_step_size`.
    - `dt0`: the size of the first step. The time scale of `f(z) - z` is 1.
    """

    ode_solver: dfx.AbstractSolver
    rtol: ScalarLike
    atol: ScalarLike
    norm: Norm
    stepsize_controller: dfx.AbstractStepSizeController
    dt0: ScalarLike

    # Written out: type checkers take the abstract attributes of Optimistix for fields,
    # which would come first.
    def __init__(
        self,
        ode_solver: dfx.AbstractSolver,
        rtol: ScalarLike = 1e-4,
        atol: ScalarLike = 1e-6,
        norm: Norm = optx.two_norm,
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
        check_stopping_rule(self)
        check_number(self, "dt0", self.dt0, POSITIVE)
        check_part(self, "ode_solver", self.ode_solver, _ODE_SOLVER)
        structure = getattr(self.ode_solver, "term_structure", None)
        structure = get_origin(structure) or structure
        if not (isinstance(structure, type) and issubclass(dfx.ODETerm, structure)):
            raise TypeError(
                "`SteadyState(ode_solver=...)` must be a Diffrax solver for a single "
                f"`ODETerm`; got {self.ode_solver!r}."
            )
        controller = self.stepsize_controller
        check_part(self, "stepsize_controller", controller, STEP_SIZE_CONTROLLER)

    @classmethod
    def with_pid_controller(
        cls,
        ode_solver: dfx.AbstractAdaptiveSolver,
        rtol: RealScalarLike = 1e-4,
        atol: RealScalarLike = 1e-6,
        norm: Norm = optx.two_norm,
        dt0: ScalarLike = 1.0,
    ) -> "SteadyState":
        """A solver whose controller has tolerances that follow from its own.

        The controller is a `diffrax.PIDController` with a tenth of `rtol`, and a tenth
        of `atol` or of `rtol / 100`, whichever is larger. Use it where the path itself
        matters: the path is then followed to that accuracy. It takes more evaluations
        than the default, [`implicitnets.PseudoTransient`][], above all at tight
        tolerances.

        **Arguments:**

        - `ode_solver`, `rtol`, `atol`, `norm`, `dt0`: as for the class.

        **Returns:**

        The solver.
        """
        name = "SteadyState.with_pid_controller"
        check_part(name, "ode_solver", ode_solver, _ADAPTIVE_SOLVER)
        check_number(name, "rtol", rtol, NON_NEGATIVE)
        check_number(name, "atol", atol, NON_NEGATIVE)
        maximum: Any = jnp.maximum if eqx.is_array(rtol) or eqx.is_array(atol) else max
        controller = dfx.PIDController(
            rtol=0.1 * rtol, atol=0.1 * maximum(atol, 0.01 * rtol)
        )
        return cls(ode_solver, rtol, atol, norm, controller, dt0)

    def _start(self, problem: Problem, y: Y) -> tuple[_Kept, _Free]:
        dtype = working_dtype(y)
        z = tree_astype(y, dtype)
        field = _vector_field(problem, y)(None, z, problem.args)
        terms = dfx.ODETerm(_vector_field(problem, y, known=(z, field)))
        time = jnp.zeros((), dtype)
        step_end, controller_state = self.stepsize_controller.wrap(1).init(
            terms,
            time,
            jnp.array(jnp.inf, dtype),
            z,
            jnp.asarray(self.dt0, dtype),
            problem.args,
            self.ode_solver.func,
            self.ode_solver.error_order(terms),
        )
        solver_state = self.ode_solver.init(terms, time, step_end, z, problem.args)
        kept = _Kept(
            progress=self._judge_field(start_progress(y), y, field),
            time=time,
            stuck=jnp.array(False),
            num_accepted_steps=jnp.array(0),
            num_rejected_steps=jnp.array(0),
        )
        free = _Free(
            step_end=jnp.asarray(step_end, dtype),
            field=field,
            solver_state=_as_arrays(
                remember_field(self.ode_solver, solver_state, field)
            ),
            controller_state=_as_arrays(controller_state),
        )
        return kept, free

    def _advance(
        self, problem: Problem, y: Y, state: SolverState[_Kept, _Free]
    ) -> tuple[Y, _Kept, _Free, Aux]:
        kept, free = state.kept, state.free.value
        args, t0, t1 = problem.args, kept.time, free.step_end
        z0, f0 = tree_astype(y, t0.dtype), free.field
        terms = dfx.ODETerm(_vector_field(problem, y, known=(z0, f0)))

        # The problem is autonomous: it has no jumps.
        z1, error, _, solver_state, solver_result = self._inner_solver(
            f0, t1 - t0
        ).step(terms, t0, t1, z0, args, free.solver_state, False)
        new_y = tree_cast_like(z1, y)
        # The stopping rule needs the residual at the end of the step, which takes one
        # more evaluation where the solver has no stage there.
        f1 = recall_field(self.ode_solver, solver_state)
        if f1 is None:
            f1 = _vector_field(problem, y)(None, z1, args)
        order = self.ode_solver.error_order(terms)
        if error is None:
            error, order = trapezoidal_error(z0, z1, f0, f1, t1 - t0), 2
        growth = self.norm(f1) / self.norm(f0)
        usable = (
            (solver_result == dfx.RESULTS.successful)
            & tree_all_finite((f1, error))
            & (growth <= (_IMPLICIT_GROWTH if self._is_implicit else _EXPLICIT_GROWTH))
        )
        # An infinite error has any adaptive controller reject the step and make the
        # next one as much shorter as it may.
        error = jtu.tree_map(lambda x: jnp.where(usable, x, jnp.inf), error)
        keep, time, step_end, controller_state, stuck = self._adapt(
            _Attempt(t0, t1, z0, z1, error, order, growth), args, free.controller_state
        )
        progress = self._judge_field(kept.progress, new_y, f1)
        # A rejected step may still be the one that gets there. If not, whatever is
        # wrong with it is not the verdict on the solve.
        count = keep | (progress.error < kept.progress.best_error)
        new_kept = _Kept(
            progress=_where(count, progress, kept.progress),
            time=time,
            stuck=stuck,
            num_accepted_steps=kept.num_accepted_steps + jnp.where(keep, 1, 0),
            num_rejected_steps=kept.num_rejected_steps + jnp.where(keep, 0, 1),
        )
        solver_state = _as_arrays(remember_field(self.ode_solver, solver_state, f1))
        new_free = _Free(
            step_end=step_end,
            field=_where(keep, f1, f0),
            solver_state=_where(keep, solver_state, free.solver_state),
            controller_state=_as_arrays(controller_state),
        )
        return _where(keep, new_y, y), new_kept, new_free, _no_aux(problem, y)

    def _verdict(self, kept: _Kept) -> Verdict:
        return kept.progress.verdict(kept.stuck)

    def _answer(self, problem: Problem, y: Y, aux: Aux, kept: _Kept) -> Answer:
        del y
        num_steps = kept.num_accepted_steps + kept.num_rejected_steps
        stats = {
            "num_accepted_steps": kept.num_accepted_steps,
            "num_rejected_steps": kept.num_rejected_steps,
            "final_time": kept.time,
        }
        num_others = 1
        if len(jtu.tree_leaves(aux)) > 0:
            # No solver hands out what the function returns besides its value.
            _, aux = problem(kept.progress.best_y)
            num_others += 1
        num_per_step = evaluations_per_step(self.ode_solver)
        if num_per_step is not None:
            stats["nfe"] = num_per_step * num_steps + num_others
        return kept.progress.best_y, aux, stats

    def _judge_field(self, progress: Progress, y: Y, field: Y) -> Progress:
        f = jtu.tree_map(lambda a, b: a.astype(b.dtype) + b, y, field)
        return self._judge(progress, y, f, field)

    @property
    def _is_implicit(self) -> bool:
        return isinstance(self.ode_solver, dfx.AbstractImplicitSolver)

    def _adapt(
        self, attempt: _Attempt, args: Any, controller_state: PyTree
    ) -> tuple[Bool[Array, ""], Scalar, Scalar, PyTree, Bool[Array, ""]]:
        """Whether to keep a step, the next one, and whether there is no going on."""
        t0, t1, y0, y1, error, order, growth = attempt
        controller: Any = self.stepsize_controller.wrap(1)
        if self._is_implicit and hasattr(controller, "adapt_to_growth"):
            result = dfx.RESULTS.successful
            keep, start, end = controller.adapt_to_growth(
                t0, t1, y0, y1, error, order, growth
            )
        else:
            keep, start, end, _, controller_state, result = controller.adapt_step_size(
                t0, t1, y0, y1, args, error, order, controller_state
            )
        start, end = jnp.asarray(start, t0.dtype), jnp.asarray(end, t0.dtype)
        dt_min = jnp.finfo(t0.dtype).eps * jnp.asarray(self.dt0, t0.dtype)
        # Also where a time has overflowed.
        stuck = ~(end - start > dt_min) | (result != dfx.RESULTS.successful)
        return jnp.asarray(keep), start, end, controller_state, stuck

    def _inner_solver(self, field: Y, dt: Scalar) -> dfx.AbstractSolver:
        """The ODE solver, with tolerances for its root finder if it has one."""
        if not self._is_implicit:
            return self.ode_solver
        # Relative to the residual at the start of the step. Diffrax's root finder goes
        # for a hundredth of that. Asked for less error it runs into its limit of steps,
        # as it keeps its Jacobian; asked for more it takes more ODE steps.
        scale = self.norm(field)
        if first_same_as_last(self.ode_solver) is None:
            # These solve for the increment, the others for the vector field.
            scale = scale * dt
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
    problem: Problem,
    y: Y,
    known: tuple[Y, Y] | None = None,
) -> Callable[[Any, Y, Any], Y]:
    """The problem on states of the dtypes of `y`, as Diffrax calls it."""
    dtype = working_dtype(y)

    def vector_field(t, z, args):
        del t
        if known is not None:
            # At the start of a step the value is known. Euler's method, for one, then
            # evaluates nothing. One and the same object is one and the same value when
            # traced.
            known_z, known_field = known
            pairs = zip(jtu.tree_leaves(z), jtu.tree_leaves(known_z), strict=True)
            if all(a is b for a, b in pairs):
                return known_field
        field, _ = problem.fn(tree_cast_like(z, y), args)
        return tree_astype(field, dtype)

    return vector_field


def _no_aux(problem: Problem, y: Y) -> Any:
    _, struct = eqx.filter_eval_shape(problem, y)
    return jtu.tree_map(
        lambda x: jnp.zeros(x.shape, x.dtype) if hasattr(x, "dtype") else x, struct
    )


def _as_arrays(tree: PyTree) -> PyTree:
    # A loop carries only arrays, while Diffrax keeps Python Booleans in its states.
    return jtu.tree_map(lambda x: jnp.asarray(x) if eqx.is_array_like(x) else x, tree)


def _where(pred: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
    return jtu.tree_map(
        lambda n, o: jnp.where(pred, n, o) if eqx.is_array(n) else n, new, old
    )
