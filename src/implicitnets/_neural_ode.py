import abc
from collections.abc import Callable, Iterable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, PRNGKeyArray, PyTree, ScalarLike

from ._cell import cell_residual, check_state
from ._internal.checks import check_number, keyword
from ._internal.parametrise import resolve
from ._internal.pytree import (
    tree_all_finite,
    tree_astype,
    tree_cast_like,
    working_dtype,
)
from ._multiscale import (
    as_shapes,
    as_start,
    MultiScaleCell,
    Shapes,
    Start,
    State,
    zero_state,
)
from ._solution import EquilibriumSolution
from ._solver.adams import VCABM3


_CONTROLLER = dfx.PIDController(rtol=1e-3, atol=1e-6)


class AbstractNeuralODE(eqx.Module):
    """A layer that follows `dz/dt = cell(z, x) - z` for a finite time.

    **Attributes:**

    - `cell`, `solver`, `t1`, `dt0`, `stepsize_controller`, `adjoint`, `max_steps`,
        `throw`: as in [`implicitnets.NeuralODE`][].
    """

    cell: eqx.AbstractVar[Callable]
    solver: eqx.AbstractVar[dfx.AbstractSolver]
    t1: eqx.AbstractVar[ScalarLike]
    dt0: eqx.AbstractVar[ScalarLike]
    stepsize_controller: eqx.AbstractVar[dfx.AbstractStepSizeController]
    adjoint: eqx.AbstractVar[dfx.AbstractAdjoint]
    max_steps: eqx.AbstractVar[int]
    throw: eqx.AbstractVar[bool]

    @abc.abstractmethod
    def start(self, x: PyTree, *, key: PRNGKeyArray | None = None) -> PyTree[Array]:
        """The state at time 0, unless the call says otherwise.

        **Arguments:**

        - `x`: the layer's input.
        - `key`: the call's key.

        **Returns:**

        A state.
        """

    def __check_init__(self):
        check_number(self, "t1", lambda x: x > 0, "positive")
        check_number(self, "dt0", lambda x: x > 0, "positive")
        check_number(self, "max_steps", lambda x: x >= 1, "at least 1")

    def __call__(
        self,
        x: PyTree,
        *,
        z0: PyTree[Array] | None = None,
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
        z0: PyTree[Array] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> EquilibriumSolution:
        """The state at time `t1` for one input, and how it was found.

        **Arguments:**

        - `x`, `z0`, `key`: as `__call__`.

        **Returns:**

        An [`implicitnets.EquilibriumSolution`][] whose `z_star` is the state at time
        `t1`, which is no equilibrium: its `residual` says how far it is from one.

        **Raises:**

        `ValueError` when tracing, as the equilibrium layers; `RuntimeError` when
        running, with `throw=True`, if the solve was not successful.
        """
        # Normalised weights are computed here, and not in every evaluation.
        self = resolve(self)
        z0 = self.start(x, key=key) if z0 is None else z0
        z0 = jtu.tree_map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), z0)
        arguments = (self.cell, x, key)
        check_state(z0, arguments)
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

    def _stats(self, stats):
        names = ("num_steps", "num_accepted_steps", "num_rejected_steps")
        stats = {name: stats[name] for name in names}
        evaluations = _evaluations(self.solver)
        if evaluations is not None:
            first, per_step = evaluations
            stats["nfe"] = first + per_step * stats["num_steps"]
        return stats


class NeuralODE(AbstractNeuralODE):
    """A layer that follows `dz/dt = cell(z, x) - z` from time 0 to `t1`.

    The finite-time sibling of [`implicitnets.DeepEquilibriumNetwork`][] with an ODE
    solver, which goes on to the steady state: the baseline to compare it with. Called
    in the same way. With `diffrax.Euler`, steps of constant size 1 and `t1=n` it is the
    cell applied `n` times.

    The statistics have `nfe`, the evaluations of the cell, for explicit Runge-Kutta
    methods, `diffrax.Euler` and [`implicitnets.VCABM3`][]; some that evaluate the first
    stage anew if the very first step is rejected do so uncounted.

    Chen et al., *Neural Ordinary Differential Equations*, 2018.

    **Arguments:**

    - `cell`: as [`implicitnets.DeepEquilibriumNetwork`][].
    - `solver`: any Diffrax solver of ordinary differential equations.
    - `t1`: the final time.
    - `init`: `init(x) -> z0`, the state at time 0; `None` for zeros like `x`.
    - `dt0`: the size of the first step.
    - `stepsize_controller`: any Diffrax step-size controller.
    - `adjoint`: any Diffrax adjoint.
    - `max_steps`: the largest number of solver steps.
    - `throw`: whether a solve that was not successful raises.
    """

    cell: Callable
    solver: dfx.AbstractSolver = dfx.Tsit5()
    t1: ScalarLike = keyword(1.0)
    init: Callable[[Any], PyTree[Array]] | None = keyword(None)
    dt0: ScalarLike = keyword(0.1)
    stepsize_controller: dfx.AbstractStepSizeController = keyword(_CONTROLLER)
    adjoint: dfx.AbstractAdjoint = keyword(dfx.RecursiveCheckpointAdjoint())
    max_steps: int = keyword(256)
    throw: bool = keyword(False)

    def start(self, x: PyTree, *, key: PRNGKeyArray | None = None) -> PyTree[Array]:
        """`init(x)`, or zeros like `x`."""
        del key
        if self.init is None:
            return jtu.tree_map(jnp.zeros_like, x)
        return self.init(x)


class MultiScaleNeuralODE(AbstractNeuralODE):
    """A [`implicitnets.NeuralODE`][] whose state is a tuple of arrays, one a scale.

    **Arguments:**

    - `main_layers`, `mapping_layers`, `post_fuse_layers`, `state_shapes`, `init`: as
        [`implicitnets.MultiScaleDeepEquilibriumNetwork`][].
    - `solver`, `t1`, `dt0`, `stepsize_controller`, `adjoint`, `max_steps`, `throw`: as
        [`implicitnets.NeuralODE`][].
    """

    cell: Callable
    solver: dfx.AbstractSolver
    state_shapes: Shapes = eqx.field(static=True)
    t1: ScalarLike
    init: Start | None
    dt0: ScalarLike
    stepsize_controller: dfx.AbstractStepSizeController
    adjoint: dfx.AbstractAdjoint
    max_steps: int
    throw: bool

    def __init__(
        self,
        main_layers: Iterable[Callable],
        mapping_layers: Iterable[Iterable[Callable]],
        post_fuse_layers: Iterable[Callable] | None = None,
        solver: dfx.AbstractSolver = dfx.Tsit5(),
        *,
        state_shapes: Iterable[Iterable[int]],
        t1: ScalarLike = 1.0,
        init: Start | Iterable[Callable] | None = None,
        dt0: ScalarLike = 0.1,
        stepsize_controller: dfx.AbstractStepSizeController = _CONTROLLER,
        adjoint: dfx.AbstractAdjoint = dfx.RecursiveCheckpointAdjoint(),
        max_steps: int = 256,
        throw: bool = False,
    ):
        cell = MultiScaleCell(main_layers, mapping_layers, post_fuse_layers)
        self.cell = cell
        self.solver = solver
        self.state_shapes = as_shapes(state_shapes, cell)
        self.t1 = t1
        self.init = as_start(init)
        self.dt0 = dt0
        self.stepsize_controller = stepsize_controller
        self.adjoint = adjoint
        self.max_steps = max_steps
        self.throw = throw

    def start(self, x: PyTree, *, key: PRNGKeyArray | None = None) -> State:
        """`init(x)`, or zeros."""
        del key
        if self.init is None:
            return zero_state(self.state_shapes, x)
        return self.init(x)


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
