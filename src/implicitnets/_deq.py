import abc
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import diffrax as dfx
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import optimistix as optx
from jaxtyping import Array, ArrayLike, PRNGKeyArray, PyTree

from ._adjoint.detach import detach
from ._adjoint.implicit import ImplicitAdjoint
from ._adjoint.report import AdjointReport, PROBE, with_probe
from ._cell import (
    call_cell,
    cell_residual,
    check_starts,
    checked_state,
    make_zeros,
)
from ._internal.arguments import CellArguments
from ._internal.checks import (
    ADJOINT,
    check_flag,
    check_integer,
    check_needs_no_bounds,
    check_part,
    check_value,
    FUNCTION,
    integer,
    keyword,
    Part,
)
from ._internal.manual import vary_like
from ._internal.observe import observed
from ._internal.optimistix import solve_inputs
from ._internal.parametrise import resolve
from ._internal.pytree import tree_all_finite, tree_astype, working_dtype
from ._internal.types import Solver, Stats, Tags
from ._internal.unvmap import unvmap_any
from ._solution import EquilibriumSolution
from ._solver.abstract import AbstractSolver
from ._solver.anderson import AndersonAcceleration
from ._solver.chain import AbstractChain
from ._solver.progress import divergence_bound
from ._solver.steady_state import SteadyState


_Model = TypeVar("_Model", bound=PyTree)

_Minimising: TypeAlias = optx.AbstractLeastSquaresSolver | optx.AbstractMinimiser


def as_solver(solver: Any) -> Solver:
    """A layer's solver: [`implicitnets.SteadyState`][] of an ODE solver, or itself."""
    if isinstance(solver, dfx.AbstractSolver):
        return SteadyState(solver)
    check_needs_no_bounds(solver)
    return solver


_SOLVER = Part(
    "an Optimistix solver, such as `implicitnets.AndersonAcceleration(1e-4, 1e-6)`, or "
    "a Diffrax solver of ordinary differential equations, such as `diffrax.Tsit5()`",
    Solver | dfx.AbstractSolver,
    {
        lx.AbstractLinearSolver: (
            "It solves linear systems: `implicitnets.ImplicitAdjoint({name}(...))`."
        ),
        optx.AbstractAdjoint: "It is an adjoint: `adjoint={name}(...)`.",
    },
)


class AbstractDeepEquilibriumNetwork(eqx.Module):
    """A layer whose output solves `z = cell(z, x)`.

    Its kinds differ in where the solve starts. To write your own, give it these fields
    and a `start`.

    **Attributes:**

    - `cell`, `solver`, `adjoint`, `max_steps`, `throw`: as in
        [`implicitnets.DeepEquilibriumNetwork`][].
    - `fixed_depth`, `checkpoint`: see [`implicitnets.set_fixed_depth`][].
    """

    cell: eqx.AbstractVar[Callable]
    solver: eqx.AbstractVar[Solver]
    adjoint: eqx.AbstractVar[optx.AbstractAdjoint]
    max_steps: eqx.AbstractVar[int]
    throw: eqx.AbstractVar[bool]
    fixed_depth: eqx.AbstractVar[int]
    checkpoint: eqx.AbstractVar[bool]

    @abc.abstractmethod
    def start(self, x: PyTree, *, key: PRNGKeyArray | None = None) -> PyTree[ArrayLike]:
        """Where the solve starts, unless the call says otherwise.

        **Arguments:**

        - `x`: the layer's input.
        - `key`: the call's key.

        **Returns:**

        An initial guess, of the structure, shapes and dtypes of the state.
        """

    def __check_init__(self):
        check_part(self, "cell", self.cell, FUNCTION)
        check_part(self, "solver", self.solver, _SOLVER)
        check_part(self, "adjoint", self.adjoint, ADJOINT)
        check_integer(self, "max_steps", self.max_steps, 1, traced=True)
        check_flag(self, "throw", self.throw)
        check_integer(self, "fixed_depth", self.fixed_depth, 0)
        check_flag(self, "checkpoint", self.checkpoint)

    def __call__(
        self,
        x: PyTree,
        *,
        z0: PyTree[ArrayLike] | None = None,
        key: PRNGKeyArray | None = None,
        probe: AdjointReport | None = None,
    ) -> PyTree[Array]:
        """The equilibrium for one input.

        **Arguments:**

        - `x`: the input, any pytree; the cell's second argument.
        - `z0`: where to start, instead of the layer's own start: for example at the
            last equilibrium of a slowly changing input.
        - `key`: passed on to a cell with an argument `key`. It is the same for every
            evaluation in this solve and its gradient.
        - `probe`: its gradient says how the backward pass went: see
            [`implicitnets.AdjointReport`][]. Unrolling has nothing to report.

        **Returns:**

        The equilibrium, of the structure of the state.

        **Raises:**

        As `solve`.
        """
        return self.solve(x, z0=z0, key=key, probe=probe).z_star

    def evaluate(
        self, z: PyTree[Array], x: PyTree, *, key: PRNGKeyArray | None = None
    ) -> PyTree[Array]:
        """One evaluation of the cell, as the solve makes it.

        **Arguments:**

        - `z`: the state.
        - `x`, `key`: as `__call__`.

        **Returns:**

        The cell's value, of the structure of the state.
        """
        return call_cell(z, CellArguments(resolve(self.cell), x, key))

    def solve(
        self,
        x: PyTree,
        *,
        z0: PyTree[ArrayLike] | None = None,
        key: PRNGKeyArray | None = None,
        probe: AdjointReport | None = None,
    ) -> EquilibriumSolution:
        """The equilibrium for one input, and how it was found.

        **Arguments:**

        - `x`, `z0`, `key`, `probe`: as `__call__`.

        **Returns:**

        An [`implicitnets.EquilibriumSolution`][].

        **Raises:**

        `ValueError` when tracing, if the cell does not map the state's structure,
        shapes and dtypes to themselves or if the state is not real floating point;
        `TypeError` when tracing, for a `probe` that is no report or goes to an adjoint
        that does not report;
        `RuntimeError` when running, with `throw=True`, if the solve was not successful.
        """
        if not isinstance(self.fixed_depth, int):
            raise TypeError(
                "`fixed_depth` decides what is compiled, so it must be a Python "
                f"integer; got {self.fixed_depth!r}. Use `equinox.filter_jit` and the "
                "other filtered transformations on a model with an equilibrium layer."
            )
        check_part(self, "probe", probe, PROBE, optional=True)
        # Normalised weights are computed here, and not in every evaluation.
        self = resolve(self)
        arguments = CellArguments(self.cell, x, key)
        z0 = self.start(x, key=key) if z0 is None else z0
        unroll = "Or unroll the cell, with `implicitnets.set_fixed_depth`."
        alternative = unroll if self.fixed_depth == 0 else None
        z0 = checked_state(z0, arguments, alternative=alternative)
        # Here, so that `jax.shard_map` sums a gradient over devices once, and not in
        # loops whose lengths differ from device to device.
        z0, arguments = vary_like((z0, arguments), (z0, arguments))
        if self.fixed_depth == 0:
            z_star, result, stats = self._find(z0, arguments, probe)
        else:
            z_star, result, stats = self._unroll(z0, arguments)
        residual = lax.stop_gradient(cell_residual(z_star, arguments))
        result = self._judge(result, z0, z_star, residual, arguments)
        if self.throw:
            z_star = result.error_if(z_star, result != optx.RESULTS.successful)
        return EquilibriumSolution(
            z_star=z_star, z0=z0, residual=residual, result=result, stats=stats
        )

    def _find(
        self,
        z0: PyTree[Array],
        arguments: CellArguments,
        probe: AdjointReport | None,
    ) -> tuple[PyTree[Array], optx.RESULTS, Stats]:
        adjoint = self.adjoint if probe is None else with_probe(self.adjoint, probe)
        if isinstance(self.solver, _Minimising):
            adjoint = _ResidualAdjoint(adjoint)
        solver = self.solver
        if isinstance(solver, AbstractChain):
            # Optimistix tells no solver what it is limited to.
            solver = solver.within(self.max_steps)
        solution = optx.fixed_point(
            call_cell,
            solver,
            z0,
            arguments,
            max_steps=self.max_steps,
            adjoint=adjoint,
            throw=False,
        )
        stats = {k: v for k, v in solution.stats.items() if k != "max_steps"}
        return solution.value, solution.result, stats

    def _unroll(
        self, z0: PyTree[Array], arguments: CellArguments
    ) -> tuple[PyTree[Array], optx.RESULTS, Stats]:
        def evaluate(z):
            return call_cell(z, arguments)

        if self.checkpoint:
            # What it prevents by default cannot happen across the steps of a scan.
            evaluate = jax.checkpoint(evaluate, prevent_cse=False)
        z_star, _ = lax.scan(
            lambda z, _: (evaluate(z), None), z0, None, length=self.fixed_depth
        )
        depth = jnp.array(self.fixed_depth)
        return z_star, optx.RESULTS.successful, {"num_steps": depth, "nfe": depth}

    def _judge(
        self,
        result: optx.RESULTS,
        z0: PyTree[Array],
        z_star: PyTree[Array],
        residual: PyTree[Array],
        arguments: CellArguments,
    ) -> optx.RESULTS:
        """A solver's own result, corrected for what it has not seen."""
        # Optimistix checks the iterate before the last step, and for divergence only
        # some of its solvers do (`optimistix/_iterate.py`, version 0.1.0).
        z0, z_star, arguments = detach((z0, z_star, arguments))
        failed = result != optx.RESULTS.successful

        def norm(tree):
            return optx.two_norm(tree_astype(tree, working_dtype(tree)))

        def start_bound():
            f0 = call_cell(z0, arguments)
            residual0 = jtu.tree_map(jnp.subtract, f0, z0)
            return divergence_bound(f0, norm(residual0), norm(f0))

        # Evaluated only if an example of the batch needs it.
        residual_norm = norm(residual)
        bound = lax.cond(
            unvmap_any(failed), start_bound, lambda: jnp.zeros_like(residual_norm)
        )
        diverged = (result == optx.RESULTS.nonlinear_max_steps_reached) & (
            residual_norm > bound
        )
        result = optx.RESULTS.where(diverged, optx.RESULTS.nonlinear_divergence, result)
        solver = observed(self.solver)
        if isinstance(solver, AbstractSolver):
            # What was returned after the last step may be the equilibrium.
            holds = solver.accepts(*detach((z_star, residual)))
            result = optx.RESULTS.where(holds, optx.RESULTS.successful, result)
        finite = tree_all_finite((z_star, residual))
        return optx.RESULTS.where(finite, result, optx.RESULTS.nonfinite)


class DeepEquilibriumNetwork(AbstractDeepEquilibriumNetwork):
    """A layer whose output is the equilibrium `z = cell(z, x)`.

    ```python
    deq = inn.DeepEquilibriumNetwork(cell, inn.AndersonAcceleration(1e-4, 1e-6))
    z = jax.vmap(deq)(xs)
    ```

    It takes one example and returns one equilibrium. `jax.vmap` makes it take a batch,
    and solves every example on its own. If the cell couples examples (batch statistics,
    graphs), call the layer on the whole batch instead.

    Bai et al., *Deep Equilibrium Models*, 2019.

    **Arguments:**

    - `cell`: `cell(z, x) -> z`, any callable pytree that maps a state to one of the
        same structure, shapes and dtypes. `x` is any pytree. A cell with an argument
        `key` gets the call's key by that name.
    - `solver`: any Optimistix root finder, fixed-point solver, least-squares solver or
        minimiser, those of this library included; or any Diffrax ODE solver, which
        stands for [`implicitnets.SteadyState`][] of it. The default is
        [`implicitnets.AndersonAcceleration`][] to a relative tolerance of `1e-4`.
    - `init`: `init(x) -> z0`, where the solve starts; `None` for the zero state.
    - `zero_state`: `zero_state(x) -> z`, a state of zeros, for a cell whose state is
        not shaped like its input; `None` for zeros like `x`.
    - `adjoint`: any Optimistix adjoint, those of this library included. The default is
        [`implicitnets.ImplicitAdjoint`][].
    - `max_steps`: the largest number of solver steps.
    - `throw`: whether a solve that was not successful raises. By default it does not,
        because solves that stop early are normal in training: see `result` of `solve`.
    - `fixed_depth`, `checkpoint`: 0 to solve; see [`implicitnets.set_fixed_depth`][].

    **Raises:**

    `ValueError` for a number that is not allowed; `TypeError` for a part of the wrong
    kind.
    """

    cell: Callable
    solver: Solver = eqx.field(
        default=AndersonAcceleration(rtol=1e-4, atol=1e-6), converter=as_solver
    )
    init: Callable[[Any], PyTree[ArrayLike]] | None = keyword(None)
    zero_state: Callable[[Any], PyTree[ArrayLike]] | None = keyword(None)
    adjoint: optx.AbstractAdjoint = keyword(ImplicitAdjoint())
    max_steps: int = keyword(256)
    throw: bool = keyword(False)
    fixed_depth: int = integer(0, kw_only=True)
    checkpoint: bool = keyword(False)

    def __check_init__(self):
        check_starts(self)

    def start(self, x: PyTree, *, key: PRNGKeyArray | None = None) -> PyTree[ArrayLike]:
        """`init(x)`, or the zero state."""
        del key
        return make_zeros(self.zero_state, x) if self.init is None else self.init(x)


class SkipDeepEquilibriumNetwork(AbstractDeepEquilibriumNetwork):
    """An equilibrium layer whose solve starts where an explicit network predicts.

    With an `init` this is the Skip DEQ. Without one it is the Skip Reg. DEQ, which
    predicts by one application of the cell to the zero state and has no further
    parameters. Train with [`implicitnets.skip_penalty`][]: it draws the prediction and
    the equilibrium together, which shortens the solve.

    Pal et al., *Mixing Implicit and Explicit Deep Learning with Skip DEQs and Infinite
    Time Neural ODEs*, 2022, section 3.

    **Arguments:**

    - `init`: `init(x) -> z0`, trained with the rest of the model; `None` for
        `cell(z, x)` at the zero state.
    - `cell`, `solver`, `zero_state`, `adjoint`, `max_steps`, `throw`, `fixed_depth`,
        `checkpoint`: as [`implicitnets.DeepEquilibriumNetwork`][].

    **Raises:**

    `ValueError` for a number that is not allowed; `TypeError` for a part of the wrong
    kind.
    """

    cell: Callable
    solver: Solver = eqx.field(
        default=AndersonAcceleration(rtol=1e-4, atol=1e-6), converter=as_solver
    )
    init: Callable[[Any], PyTree[ArrayLike]] | None = keyword(None)
    zero_state: Callable[[Any], PyTree[ArrayLike]] | None = keyword(None)
    adjoint: optx.AbstractAdjoint = keyword(ImplicitAdjoint())
    max_steps: int = keyword(256)
    throw: bool = keyword(False)
    fixed_depth: int = integer(0, kw_only=True)
    checkpoint: bool = keyword(False)

    def __check_init__(self):
        check_starts(self)

    def start(self, x: PyTree, *, key: PRNGKeyArray | None = None) -> PyTree[ArrayLike]:
        """`init(x)`, or `cell(z, x)` at the zero state."""
        if self.init is not None:
            return self.init(x)
        arguments = CellArguments(resolve(self.cell), x, key)
        zeros = make_zeros(self.zero_state, x)
        zeros = checked_state(zeros, arguments)
        return call_cell(zeros, arguments)


def set_fixed_depth(model: _Model, depth: int, *, checkpoint: bool = False) -> _Model:
    """Switch every equilibrium layer of a model between unrolling and solving.

    It changes a Python integer and a flag in the model and nothing else, so that an
    optimiser state made before a switch works after it. Equilibrium models are
    pretrained by unrolling to a small depth (Bai et al., *Deep Equilibrium Models*,
    2019, appendix D).

    **Arguments:**

    - `model`: any pytree.
    - `depth`: how many times to apply the cell, with ordinary differentiation through
        every application; 0 to solve for the equilibrium.
    - `checkpoint`: whether to keep only the states between the applications for the
        gradient, and to compute again what is within (`jax.checkpoint`). It takes one
        more application each, and the memory of one instead of `depth`.

    **Returns:**

    The model with the depth set in every equilibrium layer, nested ones included.

    **Raises:**

    `ValueError` if the depth is not an integer of at least 0, `checkpoint` is not a
    flag, or the model has no equilibrium layer.
    """
    depth = check_integer("set_fixed_depth", "depth", depth, 0)
    check_flag("set_fixed_depth", "checkpoint", checkpoint)
    num_layers = 0

    def is_layer(node):
        return isinstance(node, AbstractDeepEquilibriumNetwork)

    def set_depth(node):
        nonlocal num_layers
        if not is_layer(node):
            return node
        num_layers += 1
        inner = jtu.tree_map(
            set_depth, node, is_leaf=lambda x: is_layer(x) and x is not node
        )
        return eqx.tree_at(
            lambda layer: (layer.fixed_depth, layer.checkpoint),
            inner,
            (depth, checkpoint),
        )

    new_model = jtu.tree_map(set_depth, model, is_leaf=is_layer)
    some = num_layers > 0
    check_value(
        "set_fixed_depth", "model", model, some, "a model with an equilibrium layer"
    )
    return new_model


# Optimistix differentiates `grad(norm(f(z) - z)) = 0`, which has no derivative at a
# root (https://github.com/patrick-kidger/optimistix/issues/218, in version 0.1.0).
class _ResidualAdjoint(optx.AbstractAdjoint):
    """Differentiates a minimisation of the residual as the root that it finds."""

    adjoint: optx.AbstractAdjoint

    def apply(
        self,
        primal_fn: Callable,
        rewrite_fn: Callable,
        inputs: tuple,
        tags: Tags,
    ) -> tuple[PyTree[Array], Any]:
        del rewrite_fn, tags
        return self.adjoint.apply(primal_fn, _rewrite_residual, inputs, frozenset())


def _rewrite_residual(z_star: PyTree[Array], _: Any, inputs: tuple) -> PyTree[Array]:
    return cell_residual(z_star, solve_inputs(inputs).args)
