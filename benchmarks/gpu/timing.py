"""Compile programs side by side, and time them one by one."""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax


# A program is timed for so long, and at least so often.
SECONDS, REPEATS = 0.25, 5
# One that takes longer than this is timed once.
LONGEST_CALL = 1.0


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled function with its arguments."""

    compiled: Callable[..., Any]
    arguments: tuple[Any, ...]
    compile_seconds: float
    temporary_mb: float

    def __call__(self) -> Any:
        """Run it to its end."""
        return jax.block_until_ready(self.compiled(*self.arguments))


@dataclasses.dataclass(frozen=True)
class Job:
    """A function to be compiled for its arguments.

    `precision` is JAX' name of that of the products, `None` for the device's default;
    `options` are XLA's.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    precision: str | None = None
    options: Mapping[str, str | int] = dataclasses.field(default_factory=dict)

    def lower(self) -> Any:
        """Trace it."""
        with precision(self.precision):
            return jax.jit(self.function).lower(*self.arguments)


def precision(name: str | None) -> contextlib.AbstractContextManager[Any]:
    """The precision of the products of what is traced."""
    if name is None:
        return contextlib.nullcontext()
    return jax.default_matmul_precision(name)


def compile_all(jobs: Mapping[Any, Job]) -> dict[Any, Program | Exception]:
    """Compile functions side by side.

    Each is traced while others are compiled, so that its seconds are those of a busy
    machine.
    """

    def finish(job, lowered, tracing_seconds):
        start = time.perf_counter()
        compiled = lowered.compile(compiler_options=dict(job.options) or None)
        seconds = tracing_seconds + time.perf_counter() - start
        memory = compiled.memory_analysis()
        temporary = 0 if memory is None else memory.temp_size_in_bytes
        return Program(compiled, job.arguments, seconds, temporary / 1e6)

    found: dict[Any, Any] = {}
    with ThreadPoolExecutor(8) as pool:
        for name, job in jobs.items():
            start = time.perf_counter()
            try:
                lowered = job.lower()
            except Exception as error:
                found[name] = error
                continue
            seconds = time.perf_counter() - start
            found[name] = pool.submit(finish, job, lowered, seconds)
    return {name: _outcome(value) for name, value in found.items()}


def _outcome(value: Any) -> Program | Exception:
    if isinstance(value, Exception):
        return value
    error = value.exception()
    return value.result() if error is None else error


def checked(program: Program | Exception) -> Program:
    """A program, or the error that it did not compile with."""
    if isinstance(program, Exception):
        raise program
    return program


def milliseconds(call: Callable[[], Any], seconds: float = SECONDS) -> float:
    """The median time of a call that has run before."""
    times: list[float] = []
    start = time.perf_counter()
    while (
        len(times) < REPEATS or time.perf_counter() - start < seconds
    ) and time.perf_counter() - start < REPEATS * LONGEST_CALL:
        before = time.perf_counter()
        call()
        times.append(time.perf_counter() - before)
        if times[-1] > LONGEST_CALL:
            break
    return 1e3 * statistics.median(times)


def said(error: BaseException) -> str:
    """What an error says, in a line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
