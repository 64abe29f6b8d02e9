"""How do time, memory and compilation grow with state, batch, history and devices?

A solve and its gradient on the dense cell, where one size varies at a time. The devices
are simulated: they are parts of this machine's cores, and show what sharding costs, not
what it gains.
"""

import dataclasses

import jax
import numpy as np
import tyro
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import implicitnets as inn

from .kit.methods import gradient_program, Method
from .kit.problems import dense_tanh, Problem
from .kit.reference import reference, residuals
from .kit.results import save, TimingSettings
from .kit.rows import prepare, time_rows, verdict
from .kit.tables import print_table, Row
from .kit.timing import compile_and_run, progress, time_calls


RADIUS = 0.9
# Long histories are for maps on which the others are slow.
HISTORY_RADIUS = 0.99


@dataclasses.dataclass(frozen=True)
class Config(TimingSettings):
    """Vary one size at a time."""

    states: tuple[int, ...] = (64, 256, 1024)
    """Which sizes of the state to time."""
    batches: tuple[int, ...] = (1, 8, 64, 512)
    """Which sizes of the batch to time."""
    histories: tuple[int, ...] = (2, 5, 10, 20)
    """Which sizes of a solver's history to time."""
    devices: tuple[int, ...] = (1, 2, 4)
    """How many simulated devices share a batch, in each row."""


def methods(problem: Problem, **options: int) -> list[Method]:
    """The solvers with a history, the default one first."""
    kinds = {"Anderson": inn.AndersonAcceleration, "Broyden": inn.Broyden}
    return [Method(n, kind(problem.rtol, 0.0, **options)) for n, kind in kinds.items()]


def compare(
    config: Config, what: str, size: int, problem: Problem, **options: int
) -> list[Row]:
    """Table rows of the solvers on a problem, of which `what` is `size`."""
    ref = reference(problem)
    prepared = [prepare(problem, ref, m) for m in methods(problem, **options)]
    rows = time_rows(prepared, config.repeats, f"{what} {size}, timing")
    return [{"varied": what, "size": size, **row} for row in rows]


def states(config: Config) -> list[Row]:
    """Rows for every size of the state."""
    rows = []
    for size in progress(config.states, "state"):
        rows += compare(config, "state", size, dense_tanh(RADIUS, size, batch=32))
    return rows


def batches(config: Config) -> list[Row]:
    """Rows for every size of the batch."""
    rows = []
    for size in progress(config.batches, "batch"):
        rows += compare(config, "batch", size, dense_tanh(RADIUS, batch=size))
    return rows


def histories(config: Config) -> list[Row]:
    """Rows for every size of the history."""
    problem = dense_tanh(HISTORY_RADIUS, batch=32)
    rows = []
    for size in progress(config.histories, "history"):
        rows += compare(config, "history", size, problem, history_size=size)
    return rows


def devices(config: Config) -> list[Row]:
    """Rows for every number of devices, of a batch that they share."""
    problem = dense_tanh(RADIUS, size=512)
    ref = reference(problem)
    method = methods(problem)[0]
    program = gradient_program(problem, method)
    rows, calls = [], {}
    for number in progress(config.devices, "devices"):
        mesh = Mesh(np.array(jax.devices()[:number]), ("batch",))
        everywhere = NamedSharding(mesh, PartitionSpec())
        shared = NamedSharding(mesh, PartitionSpec("batch"))
        compiled, (gradient, z_star) = compile_and_run(
            program,
            jax.device_put(problem.weights, everywhere),
            jax.device_put(problem.inputs, shared),
            jax.device_put(problem.cotangent, shared),
        )
        error = ref.gradient_error(jax.tree.map(np.asarray, gradient))
        residual = residuals(problem, np.asarray(z_star))
        rows.append(
            {
                "varied": "devices",
                "size": number,
                "problem": problem.name,
                "method": method.name,
                "result": verdict(problem, residual, error, True),
                "first result (s)": compiled.first_seconds,
                "temp (MB)": compiled.temp_bytes / 1e6,
            }
        )
        calls[number] = compiled.call
    seconds = time_calls(calls, config.repeats, "devices, timing")
    for row in rows:
        if row["result"] == "ok":
            row["solve + gradient (ms)"] = 1e3 * seconds[row["size"]]
    return rows


def main() -> None:
    config = tyro.cli(Config)
    # Before anything is computed.
    jax.config.update("jax_num_cpu_devices", max(config.devices))
    rows = []
    for sweep in (states, batches, histories, devices):
        new_rows = sweep(config)
        print_table(new_rows[0]["varied"], new_rows)
        rows += new_rows
    save(config, "scaling", {"rows": rows})


if __name__ == "__main__":
    main()
