"""Compile functions, and time them side by side."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax


# A call shorter than this is timed several at a time.
SHORTEST_SECONDS = 0.02
# A row that has taken longer altogether is not timed again, and one whose first call
# has taken this long is not timed again at all.
LONGEST_SECONDS = 10.0
LONGEST_CALL = 2.0


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled function, and what its first result took.

    `call` runs it at the arguments that it was compiled for, `at` at others of the same
    shapes.
    """

    call: Callable[[], Any]
    at: Callable[..., Any]
    first_seconds: float
    temp_bytes: int


def compile_and_run(function: Callable, *args: Any) -> tuple[Compiled, Any]:
    """Compile a JAX function of arrays, and run it once."""
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    out = jax.block_until_ready(compiled(*args))
    first_seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    temp_bytes = 0 if memory is None else memory.temp_size_in_bytes

    def call():
        return jax.block_until_ready(compiled(*args))

    return Compiled(call, compiled, first_seconds, temp_bytes), out


def seconds_a_call(call: Callable[[], Any], estimate: float) -> float:
    """The wall time of one call, the mean over several if they are short."""
    number = max(1, round(SHORTEST_SECONDS / max(estimate, 1e-6)))
    start = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - start) / number


def interleave(
    timers: Mapping[Any, Callable[[float], float]], repeats: int, description: str
) -> dict[Any, float]:
    """The median wall times of several functions, each called once a round.

    **Arguments:**

    - `timers`: each takes an estimate of its seconds, and returns its seconds.
    - `repeats`: the number of rounds, after one that warms up. A function that takes
        seconds needs no warming up: its first round is its only one.
    - `description`: of the progress bar.

    **Returns:**

    The median seconds of each.
    """
    times = {key: [timer(1.0)] for key, timer in timers.items()}
    for _ in progress(range(repeats), description):
        for key, timer in timers.items():
            if times[key][0] < LONGEST_CALL and sum(times[key]) < LONGEST_SECONDS:
                times[key].append(timer(times[key][-1]))
    return {key: statistics.median(v[1:] or v) for key, v in times.items()}


def time_calls(
    calls: Mapping[Any, Callable[[], Any]], repeats: int, description: str
) -> dict[Any, float]:
    """As `interleave`, of functions without arguments in this process."""
    timers = {
        key: lambda estimate, call=call: seconds_a_call(call, estimate)
        for key, call in calls.items()
    }
    return interleave(timers, repeats, description)


def progress(items: Iterable[Any], description: str) -> Iterable[Any]:
    """The items, with a progress bar on a terminal."""
    # As in `tables.py`.
    from tqdm import tqdm

    return tqdm(items, desc=description, leave=False, disable=None)
