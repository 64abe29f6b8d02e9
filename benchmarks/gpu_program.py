"""How many kernels does a step launch on a GPU, and how often does it wait for it?

Counted in the programs that XLA compiles for an H100, loop by loop, and so on any
machine: it takes JAX' CUDA plugin and no GPU. A kernel takes 2 to 5 microseconds to
launch, whatever its size, and a wait 10 to 20: the predicate of a loop is read back
once a step unless its trip count is known when compiling, and that of a `lax.cond`
once each time. Of the branches of a `cond`, the one with the most kernels counts.
"""

import collections
import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import tyro
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import implicitnets as inn

from .gpu.cases import Case, convolutional, dense, transformer
from .gpu.programs import (
    ADJOINTS,
    evaluations_program,
    gradient_program,
    solve_program,
    SOLVERS,
)
from .kit.results import save, Settings
from .kit.tables import print_table, Row
from .kit.timing import progress


DEVICE = pathlib.Path(__file__).parent / "h100.txtpb"
DEPTH = 5
BARE, FIXED = "bare loop", f"fixed depth {DEPTH}"

# What is no work of the device, or counts as another instruction's.
FREE = (
    *("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all"),
    "opt-barrier",
)


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a computation launches and waits for, its loops apart.

    **Attributes:**

    - `kernels`: how often each kind of instruction launches one.
    - `waits`: how often the host waits for a predicate.
    - `loops`: the counts of one step of every loop in it, with its own predicate.
    """

    kernels: collections.Counter[str]
    waits: int = 0
    loops: tuple["Counts", ...] = ()

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.kernels + other.kernels,
            self.waits + other.waits,
            self.loops + other.loops,
        )

    @property
    def number(self) -> int:
        """The kernels of any kind."""
        return self.kernels.total()

    def walk(self, prefix: str = "") -> Iterator[tuple[str, "Counts"]]:
        """All loops with their numbers: `2.1` is the first one inside of the second."""
        for number, loop in enumerate(self.loops, start=1):
            name = f"{prefix}{number}"
            yield name, loop
            yield from loop.walk(f"{name}.")

    def __str__(self) -> str:
        inner = [f" ({loop})" for loop in self.loops]
        return f"{self.number} + {self.waits}{''.join(inner)}"


NOTHING = Counts(collections.Counter())


def compile_for_gpu(function: Callable, *arguments: Any) -> Any:
    """A function compiled for the device that is described, on any machine."""
    topology = topologies.get_topology_desc(
        "h100", "cuda", target_config=DEVICE.read_text(), topology="1x1x1"
    )
    sharding = NamedSharding(Mesh(topology.devices, ("device",)), PartitionSpec())
    jitted = jax.jit(function, in_shardings=sharding, out_shardings=sharding)
    return jitted.lower(*arguments).compile()


def has_plugin() -> bool:
    """Whether JAX can compile for a GPU here."""
    try:
        compile_for_gpu(lambda x: x, jax.ShapeDtypeStruct((), "float32"))
    except Exception:  # Which one it is changes from version to version.
        return False
    return True


def read(text: str) -> Counts:
    """The counts of a program, given XLA's text of it after its optimisations."""
    computations: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    entry = ""
    for line in text.splitlines():
        head = re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$", line)
        if head:
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif found := re.match(
            r"^\s+(?:ROOT )?%?[\w.\-]+ = (?:\(.*?\)|\S+) ([\w\-]+)\(", line
        ):
            current.append((found[1], line))
    return _count(computations, entry)


def _count(computations: dict[str, list[tuple[str, str]]], name: str) -> Counts:
    counts = NOTHING
    for kind, line in computations[name]:

        def called(attribute: str, line: str = line) -> list[Counts]:
            found = re.search(rf"{attribute}=(?:\{{([^}}]*)\}}|([%\w.\-]+))", line)
            names = re.findall(r"[\w.\-]+", (found[1] or found[2]) if found else "")
            return [_count(computations, name) for name in names]

        if kind in FREE or kind.endswith("-done"):
            continue
        elif kind == "call":
            counts = sum(called("to_apply"), counts)
        elif kind == "while":
            step = sum(called("body") + called("condition"), NOTHING)
            is_static = "known_trip_count" in line
            step += dataclasses.replace(NOTHING, waits=0 if is_static else 1)
            counts += dataclasses.replace(NOTHING, loops=(step,))
        elif kind == "conditional":
            branches = called("branch_computations")
            branches += called("true_computation") + called("false_computation")
            counts += max(branches, key=lambda branch: branch.number)
            counts += dataclasses.replace(NOTHING, waits=1)
        else:
            if kind == "custom-call":
                target = re.search(r'custom_call_target="([^"]*)"', line)
                kind = target[1] if target else kind
            counts += Counts(collections.Counter([kind]))
    return counts


def programs(case: Case) -> Iterator[tuple[str, str, Callable, bool]]:
    """Every program: what it does, by which method, and whether it takes norms."""

    def unrolled(weights, x):
        layer = inn.DeepEquilibriumNetwork(case.cell_of(weights), fixed_depth=DEPTH)
        return jax.vmap(layer)(x)

    def gradient(weights, x, cotangent):
        return jax.vjp(lambda weights: unrolled(weights, x), weights)[1](cotangent)

    yield "solve", BARE, evaluations_program(case, DEPTH), False
    yield "solve", FIXED, lambda weights, x, cotangent: unrolled(weights, x), False
    for name, make in SOLVERS.items():
        yield "solve", name, solve_program(case, make), True
    yield "gradient", FIXED, gradient, False
    for name, adjoint in ADJOINTS.items():
        yield "gradient", name, gradient_program(case, adjoint), False


def count_rows(case: Case, methods: tuple[str, ...] | None) -> Iterator[Row]:
    """A row for every loop of every program of a case, and its memory."""
    weights, x, cotangent = jax.eval_shape(
        lambda: (case.weights, case.inputs, case.cotangent)
    )
    norms = jax.ShapeDtypeStruct((len(case.inputs),), x.dtype)
    for what, name, function, takes_norms in programs(case):
        if methods is not None and name not in methods:
            continue
        last = norms if takes_norms else cotangent
        compiled = compile_for_gpu(function, weights, x, last)
        counts = read(compiled.as_text())
        for number, loop in counts.walk():
            yield {
                "cell": case.name,
                "program": what,
                "method": name,
                "loop": number,
                "kernels a step": loop.number,
                "waits a step": loop.waits,
                "step": str(loop),
                "kernels": ", ".join(f"{n} {k}" for k, n in loop.kernels.items()),
                "kernels outside of loops": counts.number,
                "temporary (MB)": compiled.memory_analysis().temp_size_in_bytes / 1e6,
            }


CASES: dict[str, Callable[[], Case]] = {
    "dense": lambda: dense(128, 256),
    "resnet": lambda: convolutional(128, 64, 28),
    "transformer": lambda: transformer(16, 256, 512),
}


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Count kernels and waits in the programs that XLA compiles for an H100."""

    cells: tuple[str, ...] = tuple(CASES)
    """Compile for these cells."""
    methods: tuple[str, ...] | None = None
    """Compile these solvers and adjoints, by default all."""


def main() -> None:
    config = tyro.cli(Config)
    rows: list[Row] = []
    for name in config.cells:
        found = count_rows(CASES[name](), config.methods)
        new = [*progress(found, name)]
        print_table(name, new)
        rows += new
    save(config, "gpu_program", {"rows": rows})


if __name__ == "__main__":
    main()
