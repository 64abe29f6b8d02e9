import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, Scalar

from ._adjoint.phantom import PhantomAdjoint
from ._deq import AbstractDeepEquilibriumNetwork
from ._internal.checks import (
    ADJOINT,
    as_integer,
    check_number,
    check_part,
    check_value,
    FUNCTION,
    NON_NEGATIVE,
    Part,
)
from ._internal.observe import AbstractObserver, observe
from ._internal.types import Stats
from ._solution import EquilibriumSolution


_Target = TypeVar("_Target")
# The samples, how many steps lie between two of them, and how many steps there were.
_EvenNotes: TypeAlias = tuple[PyTree[Array], Int[Array, ""], Int[Array, ""]]
_GivenNotes: TypeAlias = tuple[list[PyTree[Array]], Int[Array, ""]]


# A solve's length is not known beforehand, so there is room for twice as many iterates
# as are wanted. Whenever it is full every second one is dropped, and from then on half
# as many are kept.
class _EvenSamples(AbstractObserver):
    """Iterates evenly spaced over a solve."""

    number: int

    def init(self, y: PyTree[Array], args: Any, stats: Stats) -> _EvenNotes:
        del args, stats
        rows = jtu.tree_map(
            lambda leaf: jnp.broadcast_to(leaf, (2 * self.number, *leaf.shape)), y
        )
        return rows, jnp.array(1), jnp.array(0)

    def update(
        self,
        notes: _EvenNotes,
        num_steps: Int[Array, ""],
        y: PyTree[Array],
        args: Any,
        stats: Stats,
    ) -> _EvenNotes:
        del args, stats
        rows, stride, _ = notes
        full = num_steps == 2 * self.number * stride + stride

        def thin(leaf):
            half = leaf[1::2]
            return jnp.concatenate([half, half])

        rows = jtu.tree_map(lambda leaf: jnp.where(full, thin(leaf), leaf), rows)
        stride = jnp.where(full, 2 * stride, stride)
        row = num_steps // stride - 1
        due = num_steps % stride == 0

        def keep(leaf, new):
            old = lax.dynamic_index_in_dim(leaf, row, keepdims=False)
            new = jnp.where(due, new, old)
            return lax.dynamic_update_index_in_dim(leaf, new, row, axis=0)

        return jtu.tree_map(keep, rows, y), stride, num_steps

    def read(self, notes: _EvenNotes, z_star: PyTree[Array]) -> list[PyTree[Array]]:
        """All but the last of the samples."""
        del z_star
        rows, stride, num_steps = notes
        wanted = jnp.arange(1, self.number) * num_steps / (self.number * stride)
        last = jnp.maximum(num_steps // stride, 1)
        indices = jnp.clip(jnp.round(wanted).astype(int), 1, last) - 1
        return [
            jtu.tree_map(lambda leaf: leaf[indices[i]], rows)
            for i in range(self.number - 1)
        ]


class _GivenSamples(AbstractObserver):
    """Iterates after given steps."""

    steps: tuple[int, ...]

    def init(self, y: PyTree[Array], args: Any, stats: Stats) -> _GivenNotes:
        del args, stats
        return [y for _ in self.steps], jnp.array(0)

    def update(
        self,
        notes: _GivenNotes,
        num_steps: Int[Array, ""],
        y: PyTree[Array],
        args: Any,
        stats: Stats,
    ) -> _GivenNotes:
        del args, stats
        samples, _ = notes
        samples = [
            jtu.tree_map(lambda new, old: jnp.where(num_steps == step, new, old), y, z)
            for step, z in zip(self.steps, samples, strict=True)
        ]
        return samples, num_steps

    def read(self, notes: _GivenNotes, z_star: PyTree[Array]) -> list[PyTree[Array]]:
        """All but the last of the samples; past the end of the solve, `z_star`."""
        samples, num_steps = notes
        return [
            jtu.tree_map(lambda z, end: jnp.where(step <= num_steps, z, end), z, z_star)
            for step, z in zip(self.steps, samples, strict=True)
        ]


_LAYER = Part("an equilibrium layer", AbstractDeepEquilibriumNetwork)


def _as_steps(at: Any) -> int | tuple[int, ...]:
    is_number = np.ndim(at) == 0
    steps = tuple(map(as_integer, (at,) if is_number else at))
    valid = len(steps) > 0 and all(type(step) is int for step in steps)
    check_value(
        "sample_states",
        "at",
        at,
        valid and all(a < b for a, b in itertools.pairwise((0, *steps))),
        "an integer of at least 1, or increasing ones",
    )
    return steps[0] if is_number and steps else steps


def sample_states(
    deq: AbstractDeepEquilibriumNetwork,
    x: Any,
    at: int | Sequence[int],
    *,
    phantom: PhantomAdjoint = PhantomAdjoint(num_steps=1),
    z0: PyTree[Array] | None = None,
    key: PRNGKeyArray | None = None,
) -> tuple[list[PyTree[Array]], EquilibriumSolution]:
    """The equilibrium for one input, and states on the way to it.

    [`implicitnets.fixed_point_correction`][] makes a loss of them. There are always as
    many states as were asked for, also when the solve ends early. The last one is the
    equilibrium, with the gradient of the layer's adjoint. The others have phantom
    gradients: each is a step of an iteration towards the equilibrium, and none is a
    solution itself.

    A layer that is unrolled to a fixed depth gives states of its unrolling, with
    ordinary gradients.

    Works with every solver, under `jit` and `vmap`. It stores at most twice as many
    states as were asked for.

    **Arguments:**

    - `deq`: an equilibrium layer.
    - `x`: its input.
    - `at`: a number of states, spaced evenly over the steps that the solve takes; or
        the increasing steps after which to take them, and then the equilibrium is one
        more state. A step past the end of the solve gives the equilibrium.
    - `phantom`: how the states before the last are differentiated. Keyword only
        argument.
    - `z0`, `key`: as the layer takes them. Keyword only arguments.

    **Returns:**

    A pair: the list of states, and the [`implicitnets.EquilibriumSolution`][].

    **Raises:**

    `ValueError` if `at` is neither a positive integer nor increasing positive integers;
    `TypeError` if `deq` is not an equilibrium layer; and what the layer raises.
    """
    check_part("sample_states", "deq", deq, _LAYER)
    check_part("sample_states", "phantom", phantom, ADJOINT)
    at = _as_steps(at)
    if deq.fixed_depth > 0:
        return _sample_unrolled(deq, x, at, z0, key)
    observer = _EvenSamples(at) if isinstance(at, int) else _GivenSamples(at)
    observed = eqx.tree_at(lambda d: d.solver, deq, observe(deq.solver, observer))
    solution = observed.solve(x, z0=z0, key=key)
    stats = dict(solution.stats)
    notes = lax.stop_gradient(stats.pop("notes"))
    solution = dataclasses.replace(solution, stats=stats)
    z_star = lax.stop_gradient(solution.z_star)

    def differentiable(z):
        def residual(z, _, deq_input):
            deq, x = deq_input
            return jtu.tree_map(jnp.subtract, deq.evaluate(z, x, key=key), z)

        # The adjoint of a solve that has already found `z`.
        return phantom.apply(lambda _: (z, None), residual, (deq, x), frozenset())[0]

    earlier = [differentiable(z) for z in observer.read(notes, z_star)]
    return [*earlier, solution.z_star], solution


def _sample_unrolled(
    deq: AbstractDeepEquilibriumNetwork,
    x: Any,
    at: int | tuple[int, ...],
    z0: PyTree[Array] | None,
    key: PRNGKeyArray | None,
) -> tuple[list[PyTree[Array]], EquilibriumSolution]:
    depth = deq.fixed_depth
    if isinstance(at, int):
        depths = [max(round(i * depth / at), 1) for i in range(1, at + 1)]
    else:
        depths = [min(step, depth) for step in (*at, depth)]
    z0 = deq.start(x, key=key) if z0 is None else z0

    def unroll(z, length):
        return eqx.tree_at(lambda d: d.fixed_depth, deq, length).solve(x, z0=z, key=key)

    previous, *others = depths
    solution = unroll(z0, previous)
    states = [solution.z_star]
    for new_depth in others:
        if new_depth > previous:
            solution = unroll(solution.z_star, new_depth - previous)
            previous = new_depth
        states.append(solution.z_star)
    counts = {name: jnp.array(depth) for name in ("num_steps", "nfe")}
    return states, dataclasses.replace(solution, z0=z0, stats=counts)


def exponential_weights(
    decay: float = 0.8,
) -> Callable[[int], Float[Array, " states"]]:
    """Weights that grow by a constant factor from state to state, up to one.

    **Arguments:**

    - `decay`: the ratio of each weight to the next one.

    **Returns:**

    A function from the number of states to their weights.

    **Raises:**

    `ValueError` if `decay` is negative.
    """
    check_number("exponential_weights", "decay", decay, NON_NEGATIVE)

    def weights(number):
        ratio = jnp.asarray(decay, float)
        return ratio ** jnp.arange(number - 1, -1, -1, dtype=float)

    return weights


def linear_weights() -> Callable[[int], Float[Array, " states"]]:
    """Weights that grow linearly from state to state, up to one.

    **Returns:**

    A function from the number of states to their weights.
    """
    return lambda number: jnp.arange(1, number + 1, dtype=float) / number


def constant_weights(value: float = 1.0) -> Callable[[int], Float[Array, " states"]]:
    """One weight for all states but the last, whose weight is one.

    **Arguments:**

    - `value`: the weight of the states before the last.

    **Returns:**

    A function from the number of states to their weights.

    **Raises:**

    `ValueError` if `value` is negative.
    """
    check_number("constant_weights", "value", value, NON_NEGATIVE)
    return lambda number: jnp.full(number, value, dtype=float).at[-1].set(1.0)


def fixed_point_correction(
    loss_fn: Callable[[PyTree[Array], _Target], Scalar],
    states: Sequence[PyTree[Array]],
    target: _Target,
    *,
    weights: Callable[[int], Float[Array, " states"]] = exponential_weights(),
) -> Scalar:
    """A loss on the states along a solve, which makes the early ones good too.

    It is the weighted sum of the loss on every state (Bai et al., *Deep Equilibrium
    Optical Flow Estimation*, 2022, section 3.3). Solves then reach their equilibrium in
    fewer steps, and lose less when they stop early.

    **Arguments:**

    - `loss_fn`: `loss_fn(state, target) -> scalar`.
    - `states`: from [`implicitnets.sample_states`][].
    - `target`: the second argument of `loss_fn`.
    - `weights`: a function from the number of states to their weights, as
        [`implicitnets.exponential_weights`][], [`implicitnets.linear_weights`][] and
        [`implicitnets.constant_weights`][] return it. Keyword only argument.

    **Returns:**

    A scalar.
    """
    check_part("fixed_point_correction", "loss_fn", loss_fn, FUNCTION)
    check_part("fixed_point_correction", "weights", weights, FUNCTION)
    some = len(states) > 0
    check_value("fixed_point_correction", "states", states, some, "some states")
    losses = jnp.stack([loss_fn(state, target) for state in states])
    return jnp.dot(weights(len(states)).astype(losses.dtype), losses)
