"""The loop of every solver here, and what of its carry may change after the end.

Under `vmap` the examples of a batch run in lockstep until all have finished. What is
read of an example after its end must stay as it was then: it is *kept*, which costs a
pass over it in every step. In a solver with a history that would be most of the time.
What only the next step reads is *free* to go on changing, which costs nothing.

A solver's state is a [`SolverState`][], which has a part of each kind. The base class
of our solvers hands the verdict and the answer the kept part alone, so that neither can
read what has changed since. A loop that is no Optimistix solver marks the free parts of
its carry by [`Unfrozen`][].
"""

import functools as ft
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Int

from .manual import vary_as_next
from .unvmap import unvmap_any


_Value = TypeVar("_Value")
_Carry = TypeVar("_Carry")
_Kept = TypeVar("_Kept")
_Free = TypeVar("_Free")


class Unfrozen(eqx.Module, Generic[_Value]):
    """Marks a part of a loop's carry as free to change after the end.

    A counter that is marked is the same for every example of a batch, so that a write
    at it is an in-place slice and not a scatter, and a branch on it stays a branch.
    """

    value: _Value


class SolverState(eqx.Module, Generic[_Kept, _Free]):
    """The state of every Optimistix solver of this library.

    **Attributes:**

    - `kept`: what is read after the end. It stays as it is once an example has
        finished.
    - `free`: what only the next step reads. It goes on changing.
    - `num_steps`: the steps of the whole batch, the same for every example. It goes on
        counting; an example counts its own steps in `kept`.
    """

    kept: _Kept
    free: Unfrozen[_Free]
    num_steps: Unfrozen[Int[Array, ""]]


def _is_unfrozen(node: Any) -> bool:
    return isinstance(node, Unfrozen)


def while_loop(
    cond_fun: Callable[[_Carry], Bool[Array, ""]],
    body_fun: Callable[[_Carry], _Carry],
    init_val: _Carry,
    *,
    max_steps: int | Int[Array, ""] | None = None,
) -> _Carry:
    """As `jax.lax.while_loop`, at full speed under `vmap`."""
    init_val = jtu.tree_map(jnp.asarray, init_val)

    def any_active(carry):
        _, active, _ = carry
        # Unbatched, so that JAX's own batching rule adds no `select` of its own.
        return unvmap_any(active)

    def within_limit(step, active):
        return active if max_steps is None else active & (step < max_steps)

    def advance(carry):
        step, active, value = carry

        def freeze(new, old):
            if _is_unfrozen(new):
                return new
            # `optimistix.FixedPointIteration` does not keep its float32 state in
            # float32 if float64 is on, nor a narrower one
            # (`optimistix/_solver/fixed_point.py`, version 0.1.0).
            new = jnp.asarray(new, old.dtype)
            return lax.select(jnp.broadcast_to(active, new.shape), new, old)

        new_value = jtu.tree_map(freeze, body_fun(value), value, is_leaf=_is_unfrozen)
        active = within_limit(step + 1, active & cond_fun(new_value))
        return step + 1, active, new_value

    active = within_limit(jnp.array(0), jnp.asarray(cond_fun(init_val)))
    init = (jnp.array(0), active, init_val)
    _, _, final_val = lax.while_loop(any_active, advance, vary_as_next(advance, init))
    return final_val


def materialise(value: _Value, counter: Int[Array, ""]) -> _Value:
    """Have a value in memory before anything reads it; `counter` is the loop's."""
    # XLA on CPU fuses the end of a computation into every one of its readers, and so
    # computes it again in each: a group norm or a `tanh` at the end of a cell four
    # times a step. A branch is a border to fusion, where `optimization_barrier` is
    # removed before it. XLA does not know that the counter is never negative. On an
    # accelerator the branch would wait for the device, and fusion is what pays there.
    return lax.platform_dependent(
        value,
        counter,
        cpu=lambda value, counter: lax.cond(
            counter >= 0,
            lambda x: x,
            lambda x: jtu.tree_map(jnp.zeros_like, x),
            value,
        ),
        default=lambda value, counter: value,
    )


def cheap_cond(
    pred: Bool[Array, ""],
    true_fun: Callable[[], _Value],
    false_fun: Callable[[], _Value],
) -> _Value:
    """As `jax.lax.cond`; an accelerator computes both branches and selects.

    There a branch waits until the device has told its predicate, which takes longer
    than some passes over the state.
    """

    def select():
        return jtu.tree_map(ft.partial(jnp.where, pred), true_fun(), false_fun())

    return lax.platform_dependent(
        cpu=lambda: lax.cond(pred, true_fun, false_fun), default=select
    )
