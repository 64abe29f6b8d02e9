from collections.abc import Callable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, ArrayLike, PRNGKeyArray, PyTree, ScalarLike

from ._cell import cell_residual, check_starts, checked_state, make_zeros
from ._internal.arguments import CellArguments
from ._internal.checks import (
    check_flag,
    check_integer,
    check_number,
    check_part,
    FUNCTION,
    integer,
    keyword,
    Part,
    POSITIVE,
    STEP_SIZE_CONTROLLER,
)
from ._internal.parametrise import resolve
from ._internal.pytree import (
    tree_all_finite,
    tree_astype,
    tree_cast_like,
    working_dtype,
)
from ._internal.types import Solver, Stats
from ._solution import EquilibriumSolution
from ._solver.adams import VCABM3


_EQUILIBRIUM_LAYER = "`implicitnets.DeepEquilibriumNetwork` takes it."
_SOLVER = Part(
    "a Diffrax solver of ordinary differential equations, such as `diffrax.Tsit5()`",
    dfx.AbstractSolver,
    {Solver: _EQUILIBRIUM_LAYER},
)
_ADJOINT = Part(
    "a Diffrax adjoint, such as `diffrax.BacksolveAdjoint()`",
    dfx.AbstractAdjoint,
    {optx.AbstractAdjoint: _EQUILIBRIUM_LAYER},
)


class NeuralODE(eqx.Module):
    """A layer that follows `dz/dt = cell(z, x) - z` from time 0 to `t1`.

    The baseline for [`implicitnets.DeepEquilibriumNetwork`][] with an ODE solver, which
    goes on to the steady state. It is called in the same way. With `diffrax.Euler`,
    steps of constant size 1 and `t1=n` it applies the cell `n` times.

    The statistics have `nfe`, the evaluations of the cell, for explicit Runge-Kutta
    methods, `diffrax.Euler` and [`implicitnets.VCABM3`][]. Some methods evaluate the
    first stage again if the very first step is rejected, which `nfe` does not count.

    Chen et al., *Neural Ordinary Differential Equations*, 2018.

    **Arguments:**

    - `cell`: as [`implicitnets.DeepEquilibriumNetwork`][].
    - `solver`: any Diffrax solver of ordinary differential equations.
    - `t1`: the final time.
    - `init`: `init(x) -> z0`, the state at time 0; `None` for the zero state.
    - `zero_state`: as [`implicitnets.DeepEquilibriumNetwork`][].
    - `dt0`: the size of the first step.
    - `stepsize_controller`: any Diffrax step-size controller.
    - `adjoint`: any Diffrax adjoint.
    - `max_steps`: the largest number of solver steps.
    - `throw`: whether a solve that was not successful raises.

    **Raises:**

    `ValueError` for a number that is not allowed; `TypeError` for a part of the wrong
    kind.
    """

    cell: Callable
    solver: dfx.AbstractSolver = dfx.Tsit5()
    t1: ScalarLike = keyword(1.0)
    init: Callable[[Any], PyTree[ArrayLike]] | None = keyword(None)
    zero_state: Callable[[Any], PyTree[ArrayLike]] | None = keyword(None)
    dt0: ScalarLike = keyword(0.1)
    stepsize_controller: dfx.AbstractStepSizeController = keyword(
        dfx.PIDController(rtol=1e-3, atol=1e-6)
    )
    adjoint: dfx.AbstractAdjoint = keyword(dfx.RecursiveCheckpointAdjoint())
    max_steps: int = integer(256, kw_only=True)
    throw: bool = keyword(False)

    def __check_init__(self):
        check_part(self, "cell", self.cell, FUNCTION)
        check_starts(self)
        check_part(self, "solver", self.solver, _SOLVER)
        check_number(self, "t1", self.t1, POSITIVE)
        check_number(self, "dt0", self.dt0, POSITIVE)
        controller = self.stepsize_controller
        check_part(self, "stepsize_controller", controller, STEP_SIZE_CONTROLLER)
        check_part(self, "adjoint", self.adjoint, _ADJOINT)
        check_integer(self, "max_steps", self.max_steps, 1)
        check_flag(self, "throw", self.throw)

    def start(self, x: PyTree, *, key: PRNGKeyArray | None = None) -> PyTree[ArrayLike]:
        """`init(x)`, or the zero state."""
        del key
        return make_zeros(self.zero_state, x) if self.init is None else self.init(x)

    def __call__(
        self,
        x: PyTree,
        *,
        z0: PyTree[ArrayLike] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> PyTree[Array]:
        """The state at time `t1` for one input.

        **Arguments:**

        - `x`: the input, any pytree; the cell's second argument.
        - `z0`: the state at time 0, instead of the layer's own start.
        - `key`: passed on to a cell with an argument `key`, the same for every
            evaluation.

        **Returns:**

        The state at time `t1`.

        **Raises:**

        As `solve`.
        """
        return self.solve(x, z0=z0, key=key).z_star

    def solve(
        self,
        x: PyTree,
        *,
        z0: PyTree[ArrayLike] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> EquilibriumSolution:
        """The state at time `t1` for one input, and how it was found.

        **Arguments:**

        - `x`, `z0`, `key`: as `__call__`.

        **Returns:**

        An [`implicitnets.EquilibriumSolution`][] whose `z_star` is the state at time
        `t1`. It is not an equilibrium: its `residual` says how far it is from one.

        **Raises:**

        `ValueError` when tracing, as the equilibrium layers; `RuntimeError` when
        running, with `throw=True`, if the solve was not successful.
        """
        # Normalised weights are computed here, and not in every evaluation.
        self = resolve(self)
        arguments = CellArguments(self.cell, x, key)
        z0 = self.start(x, key=key) if z0 is None else z0
        # Steps of other sizes take the examples to other times.
        same_steps = dfx.ConstantStepSize | dfx.StepTo
        constant = "Or take steps of one size, with `diffrax.ConstantStepSize()`."
        is_same = isinstance(self.stepsize_controller, same_steps)
        alternative = None if is_same else constant
        z0 = checked_state(z0, arguments, alternative=alternative)
        dtype = working_dtype(z0)
        like = eqx.filter_eval_shape(lambda: z0)

        def vector_field(t, z, arguments):
            del t
            return tree_astype(cell_residual(tree_cast_like(z, like), arguments), dtype)

        solution = dfx.diffeqsolve(
            dfx.ODETerm(vector_field),
            self.solver,
            jnp.zeros((), dtype),
            jnp.asarray(self.t1, dtype),
            jnp.asarray(self.dt0, dtype),
            tree_astype(z0, dtype),
            arguments,
            stepsize_controller=self.stepsize_controller,
            adjoint=self.adjoint,
            max_steps=self.max_steps,
            throw=False,
        )
        z1 = jtu.tree_map(lambda leaf: leaf[-1], solution.ys)
        z1 = tree_cast_like(z1, like)
        residual = lax.stop_gradient(cell_residual(z1, arguments))
        result = _as_result(solution.result, z1)
        if self.throw:
            z1 = result.error_if(z1, result != optx.RESULTS.successful)
        return EquilibriumSolution(
            z_star=z1,
            z0=z0,
            residual=residual,
            result=result,
            stats=self._stats(solution.stats),
        )

    def _stats(self, stats: Stats) -> Stats:
        names = ("num_steps", "num_accepted_steps", "num_rejected_steps")
        stats = {name: stats[name] for name in names}
        evaluations = _evaluations(self.solver)
        if evaluations is not None:
            first, per_step = evaluations
            stats["nfe"] = first + per_step * stats["num_steps"]
        return stats


def _evaluations(solver: dfx.AbstractSolver) -> tuple[int, int] | None:
    """The evaluations before the first step and in each step, where they are known."""
    # Not `isinstance`, which also holds for what wraps a Runge-Kutta method.
    if issubclass(type(solver), dfx.AbstractRungeKutta):
        tableau = solver.tableau  # pyright: ignore[reportAttributeAccessIssue]
        if not tableau.implicit:
            same = tableau.fsal
            return (1, tableau.num_stages - 1) if same else (0, tableau.num_stages)
    if type(solver) is dfx.Euler:
        return 0, 1
    if isinstance(solver, VCABM3):
        return 1, 2
    return None


def _as_result(result: dfx.RESULTS, z1: PyTree[Array]) -> optx.RESULTS:
    failure = optx.RESULTS.where(
        result == dfx.RESULTS.max_steps_reached,
        optx.RESULTS.nonlinear_max_steps_reached,
        optx.RESULTS.nonlinear_divergence,
    )
    success = optx.RESULTS.where(
        result == dfx.RESULTS.successful, optx.RESULTS.successful, failure
    )
    return optx.RESULTS.where(tree_all_finite(z1), success, optx.RESULTS.nonfinite)
