"""The training loop and its step, of everything that is trained here."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import equinox as eqx
import jax
import optax
from jaxtyping import PyTree


_Model = TypeVar("_Model", bound=PyTree)
_State = TypeVar("_State", bound=PyTree)


def descend(
    gradient_fn: Callable[..., tuple[Any, Any]],
    optimiser: optax.GradientTransformation,
    model: _Model,
    state: optax.OptState,
    *args: Any,
) -> tuple[_Model, optax.OptState, Any]:
    """One step of an optimiser.

    `gradient_fn(model, *args)` returns a gradient and what else it found.
    """
    gradient, aux = gradient_fn(model, *args)
    weights = eqx.filter(model, eqx.is_inexact_array)
    updates, state = optimiser.update(gradient, state, weights)
    return eqx.apply_updates(model, updates), state, aux


class Clock:
    """Counts the seconds of compiling, and those of the rest, each on their own."""

    def __init__(self, seconds: float = 0.0, compile_seconds: float = 0.0):
        self.seconds, self.compile_seconds = seconds, compile_seconds

    def compile(self, function: Callable, *args: Any) -> Callable:
        """The program of a function for arguments like these."""
        start = time.perf_counter()
        # Typed as the function that it wraps, it hides that it can be lowered.
        jitted: Any = eqx.filter_jit(function)
        compiled = jitted.lower(*args).compile()
        self.compile_seconds += time.perf_counter() - start
        return compiled

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Counts what happens inside `with`."""
        start = time.perf_counter() - self.compile_seconds
        yield
        self.seconds += time.perf_counter() - self.compile_seconds - start


def fit(
    step: Callable[[_State, Any], tuple[_State, Any]],
    state: _State,
    batches: Iterable[Any],
    clock: Clock,
) -> tuple[_State, list[Any]]:
    """Train: take a step for every batch.

    `step(state, batch)` returns the next state and metrics. Returned are the last state
    and the metrics of every step.
    """
    history = []
    with clock.running():
        for batch in batches:
            state, metrics = step(state, batch)
            history.append(metrics)
        # Steps are only asked for until here: they may still run.
        jax.block_until_ready(eqx.filter(state, eqx.is_array))
    return state, history
