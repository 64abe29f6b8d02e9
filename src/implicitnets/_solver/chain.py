import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Int, PyTree, ScalarLike

from .._internal.checks import (
    check_integer,
    check_needs_no_bounds,
    check_part,
    check_value,
    SOLVER,
)
from .._internal.loop import SolverState
from .._internal.optimistix import run_solve
from .._internal.pytree import tree_all_finite
from .._internal.types import Answer, Aux, Fn, Norm, Solver, Tags, Verdict, Y
from .._internal.unvmap import unvmap_any
from .abstract import AbstractSolver, Problem


# Statistics of a stage that add up.
_COUNTS = "num_steps", "nfe", "num_matvecs"


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


class ChainState(eqx.Module):
    """What the stages of a chain have come to, which is all that is kept.

    **Attributes:**

    - `y`, `aux`, `result`: those of the last stage that an example took.
    - `stage`: which one that was.
    - `counts`: of steps, evaluations and products, of all its stages.
    """

    y: Y
    aux: Aux
    result: optx.RESULTS
    stage: Int[Array, ""]
    counts: dict[str, Int[Array, ""]]


class AbstractChain(AbstractSolver[ChainState, None], optx.AbstractRootFinder):
    """Solvers one after the other, each for the examples that those before it left.

    A chain solves before Optimistix' loop begins, and has no step of its own: in that
    loop all stages would be carried through every step.
    """

    max_steps: eqx.AbstractVar[int]

    def __check_init__(self):
        check_integer(self, "max_steps", self.max_steps, 1, traced=True)

    @property
    @abc.abstractmethod
    def stages(self) -> tuple[tuple[Solver, int | None], ...]:
        """The solvers, each with the most steps that it may take."""

    def within(self, max_steps: int | Int[Array, ""]) -> "AbstractChain":
        """The same with another limit of all stages together."""
        return dataclasses.replace(self, max_steps=max_steps)

    def _start(self, problem: Problem, y: Y) -> tuple[ChainState, None]:
        told: list[set[str]] = []

        def run(solver, y, max_steps, number):
            solution = _solve(problem, solver, y, max_steps)
            told.append(set(solution.stats))
            counts = {
                name: jnp.asarray(solution.stats.get(name, 0)) for name in _COUNTS
            }
            return ChainState(
                y=solution.value,
                aux=solution.aux,
                result=solution.result,
                stage=jnp.array(number),
                counts=counts,
            )

        (first, limit), *others = self.stages
        state = run(first, y, _least(limit, self.max_steps), 0)
        for number, (solver, limit) in enumerate(others, start=1):
            state = self._go_on(state, y, run, solver, limit, number)
        # Products are not asked of a solver that makes none.
        known = {"num_steps", "num_matvecs"} & set.union(*told)
        known |= {"nfe"} & set.intersection(*told)
        counts = {name: state.counts[name] for name in _COUNTS if name in known}
        return dataclasses.replace(state, counts=counts), None

    def _go_on(
        self,
        state: ChainState,
        y0: Y,
        run: Callable,
        solver: Solver,
        limit: int | None,
        number: int,
    ) -> ChainState:
        left = self.max_steps - state.counts["num_steps"]
        unsolved = (state.result != optx.RESULTS.successful) & (left > 0)

        def next_stage():
            # From where the last one got to, if that is anywhere.
            usable = tree_all_finite(state.y)
            y = jtu.tree_map(lambda a, b: jnp.where(usable, a, b), state.y, y0)
            # An example that is done takes no steps, so that none waits for it.
            max_steps = jnp.where(unsolved, _least(limit, left), 0)
            new = run(solver, y, max_steps, number)
            counts = jtu.tree_map(jnp.add, state.counts, new.counts)
            new = dataclasses.replace(new, counts=counts)
            return jtu.tree_map(lambda a, b: jnp.where(unsolved, a, b), new, state)

        # Of the whole batch: with a batched predicate JAX would run both branches.
        return lax.cond(unvmap_any(unsolved), next_stage, lambda: state)

    def _advance(
        self, problem: Problem, y: Y, state: SolverState[ChainState, None]
    ) -> tuple[Y, ChainState, None, Aux]:
        del problem
        return y, state.kept, None, state.kept.aux

    def _verdict(self, kept: ChainState) -> Verdict:
        return jnp.array(True), kept.result

    def _answer(self, problem: Problem, y: Y, aux: Aux, kept: ChainState) -> Answer:
        del problem, y, aux
        return kept.y, kept.aux, {**kept.counts, "stage": kept.stage}


class SolverChain(AbstractChain):
    """Tries solvers one after the other, until one of them is successful.

    Each solver goes on from where the one before it got to. Under `vmap` that is
    decided for every example on its own: an example that is solved takes no more steps,
    and a solver runs only if some example of the batch needs it. So the first solver
    should be one that is fast where it works, and the last one that is robust.

    ```python
    solver = inn.SolverChain(
        (inn.AndersonAcceleration(1e-4, 1e-6), inn.NewtonKrylov(1e-4, 1e-6)),
        limits=(50, None),
    )
    ```

    A solver is left when it fails (for example with `stagnation`), or after its limit
    of steps. The result is that of the last solver that an example came to.

    The statistics are `stage` (the number of that solver, from 0), `num_steps` and
    `nfe` of all solvers together, if all of them count their evaluations, and
    `num_matvecs`, if one of them counts products.

    A chain cannot be differentiated by unrolling it: use an implicit adjoint.

    **Arguments:**

    - `solvers`: any Optimistix root finders, fixed-point solvers, least-squares solvers
        or minimisers, those of this library included.
    - `limits`: the most steps that each of them may take; `None` for as many as there
        are left.
    - `max_steps`: the most steps of all of them together. In a layer that is the
        layer's. (In a plain Optimistix solve, whose own `max_steps` does not count the
        steps within a chain, it is this one.)
    """

    solvers: tuple[Solver, ...]
    limits: tuple[int | None, ...] | None
    max_steps: int

    # Written out for type checkers, as in `SteadyState`.
    def __init__(
        self,
        solvers: Sequence[Solver],
        *,
        limits: Sequence[int | None] | None = None,
        max_steps: int = 256,
    ):
        self.solvers = _as_tuple(solvers)
        self.limits = _as_tuple(limits)
        self.max_steps = max_steps

    def __check_init__(self):
        some = isinstance(self.solvers, tuple) and len(self.solvers) > 0
        check_value(self, "solvers", self.solvers, some, "at least one solver")
        for solver in self.solvers:
            check_part(self, "solvers", solver, SOLVER)
            check_needs_no_bounds(solver)
        if self.limits is not None:
            same = isinstance(self.limits, tuple)
            same = same and len(self.limits) == len(self.solvers)
            check_value(self, "limits", self.limits, same, "one for every solver")
            for limit in self.limits:
                check_integer(self, "limits", limit, 1, optional=True)

    @property
    def stages(self) -> tuple[tuple[Solver, int | None], ...]:
        limits = self.limits or (None,) * len(self.solvers)
        return tuple(zip(self.solvers, limits, strict=True))

    # Those of the last solver, which has the last word on whether a state is a root.
    @property
    def rtol(self) -> ScalarLike:
        return self.solvers[-1].rtol

    @property
    def atol(self) -> ScalarLike:
        return self.solvers[-1].atol

    @property
    def norm(self) -> Norm:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.solvers[-1].norm


def _least(limit: int | None, left: int | Int[Array, ""]) -> int | Int[Array, ""]:
    return left if limit is None else jnp.minimum(limit, left)


def _solve(
    problem: Problem, solver: Solver, y: Y, max_steps: int | Int[Array, ""]
) -> optx.Solution:
    is_fixed_point = isinstance(solver, optx.AbstractFixedPointSolver)
    solve: Any = optx.fixed_point if is_fixed_point else optx.root_find
    fn = _FixedPointFn(problem.fn) if is_fixed_point else problem.fn
    return solve(
        fn,
        solver,
        y,
        problem.args,
        has_aux=True,
        max_steps=max_steps,
        adjoint=_NoAdjoint(),
        throw=False,
        tags=problem.tags,
    )


class _FixedPointFn(eqx.Module):
    """The map whose fixed points are the roots of a function."""

    root_fn: Fn

    def __call__(self, y: Y, args: Any) -> tuple[Y, Aux]:
        residual, aux = self.root_fn(y, args)
        return jtu.tree_map(lambda a, r: a + r.astype(a.dtype), y, residual), aux


class _NoAdjoint(optx.AbstractAdjoint):
    """For a solve within a solve, which the outer one's adjoint differentiates."""

    def apply(
        self, primal_fn: Callable, rewrite_fn: Callable, inputs: PyTree, tags: Tags
    ) -> tuple[PyTree[Array], Any]:
        del rewrite_fn, tags
        return _run(primal_fn, inputs)


@eqx.filter_custom_jvp
def _run(primal_fn, inputs):
    return run_solve(primal_fn, inputs)


@_run.def_jvp
def _run_jvp(primals, tangents):
    del primals, tangents
    raise TypeError(
        "A chain of solvers cannot be differentiated by unrolling its steps. Use an "
        "implicit adjoint, such as `implicitnets.ImplicitAdjoint()`."
    )
