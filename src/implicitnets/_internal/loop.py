from collections.abc import Callable
from typing import Any, Generic, TypeVar

import equinox as eqx
import equinox.internal as eqxi
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Int


_Value = TypeVar("_Value")
_Carry = TypeVar("_Carry")


class Unfrozen(eqx.Module, Generic[_Value]):
    """Marks a part of a [`while_loop`][]'s carry as free to change after the end.

    Under `vmap` the examples that have finished wait for the slowest, and every array
    of their carry must be held still, which costs a pass over it in every step. That is
    most of the time of a solver with a history. What nobody reads after the end can be
    left to change instead: wrap it in `Unfrozen`. A counter wrapped so is also the same
    for every example, so that a write at it is an in-place slice and not a scatter.

    **Arguments:**

    - `value`: any pytree of arrays.
    """

    value: _Value


def _is_unfrozen(node: Any) -> bool:
    return isinstance(node, Unfrozen)


def while_loop(
    cond_fun: Callable[[_Carry], Bool[Array, ""]],
    body_fun: Callable[[_Carry], _Carry],
    init_val: _Carry,
    *,
    max_steps: int | Int[Array, ""] | None = None,
) -> _Carry:
    """As `jax.lax.while_loop`, at full speed under `vmap`.

    The examples of a batch run in lockstep until all have finished; one that has
    finished keeps its carry, but for what is wrapped in [`Unfrozen`][].

    **Arguments:**

    - `cond_fun`, `body_fun`, `init_val`: as `jax.lax.while_loop`.
    - `max_steps`: the largest number of steps, traced or not; `None` for no bound.

    **Returns:**

    The final carry.
    """
    init_val = jtu.tree_map(jnp.asarray, init_val)

    def any_active(carry):
        step, active, _ = carry
        # Unbatched, so that JAX's own batching rule adds no `select` of its own.
        go_on = eqxi.unvmap_any(active)
        return go_on if max_steps is None else go_on & (step < max_steps)

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
        return step + 1, active & cond_fun(new_value), new_value

    init = (jnp.array(0), jnp.asarray(cond_fun(init_val)), init_val)
    _, _, final_val = lax.while_loop(any_active, advance, init)
    return final_val


def materialise(value: _Value, counter: Int[Array, ""]) -> _Value:
    """Have a value in memory before anything reads it.

    XLA on CPU fuses the end of a computation into every one of its readers, and so
    computes it again in each: a group norm or a `tanh` at the end of a cell four times
    a step. A branch is a border to fusion, where `optimization_barrier` is removed
    before it.

    **Arguments:**

    - `value`: any pytree of arrays.
    - `counter`: a number of at least zero that XLA does not know to be so, the same for
        a whole batch.

    **Returns:**

    `value`.
    """
    return lax.cond(
        counter >= 0,
        lambda x: x,
        lambda x: jtu.tree_map(jnp.zeros_like, x),
        value,
    )
