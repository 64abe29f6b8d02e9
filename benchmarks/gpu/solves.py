"""What every solver and every adjoint take, next to a bare loop of the cell."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .cases import Case
from .programs import (
    ADJOINTS,
    evaluations_program,
    gradient_program,
    norms_of,
    products_program,
    reference_program,
    residual_program,
    solve_program,
    SOLVERS,
)
from .record import Record, Row
from .timing import checked, compile_all, Job, milliseconds, Program, said


# The lengths of the two loops whose difference is the time of an evaluation or product.
SHORT, LONG = 10, 60
# JAX' name of float32 products where the default is less.
PRECISE = "highest"

SOLVE = "solve (ms)"
GRADIENT = "solve + gradient (ms)"
BARE = "bare loop (ms)"
RATIO = "time / bare loop"


@dataclasses.dataclass(frozen=True)
class Bench:
    """A case whose bare loops are timed, and whose solution is known.

    **Attributes:**

    - `case`: which.
    - `precision`: that of the products, as JAX calls it.
    - `norms`, `gradient`: of the solution, one an example, and of the weights.
    - `launch`, `evaluation`, `product`: what a bare loop takes in milliseconds: to
        start, and for each.
    """

    case: Case
    precision: str | None
    norms: Any
    gradient: Any
    residuals: Callable[[Any], np.ndarray]
    launch: float
    evaluation: float
    product: float

    @property
    def head(self) -> Row:
        """What every row begins with."""
        return {
            "problem": self.case.name,
            "precision": precision_name(self.precision),
            "examples": len(self.case.inputs),
        }

    def bare(self, evaluations: int, products: int) -> float:
        """Milliseconds of a bare loop of so many evaluations and products."""
        return self.launch + evaluations * self.evaluation + products * self.product


def precision_name(precision: str | None) -> str:
    """What the products are made of."""
    if precision == PRECISE:
        return "float32"
    return "TF32" if jax.default_backend() == "gpu" else "default"


def make_bench(case: Case, precision: str | None) -> Bench:
    """Compile and time the bare loops, and solve precisely."""
    weights, x, cotangent = case.weights, case.inputs, case.cotangent
    arguments = (weights, x, cotangent)
    jobs = {
        ("evaluations", n): Job(evaluations_program(case, n), arguments, precision)
        for n in (SHORT, LONG)
    }
    jobs |= {
        ("products", n): Job(products_program(case, n), arguments, precision)
        for n in (SHORT, LONG)
    }
    jobs["reference", 0] = Job(reference_program(case), arguments, PRECISE)
    jobs["residual", 0] = Job(residual_program(case), (weights, x, x), PRECISE)
    programs: dict[Any, Any] = compile_all(jobs)
    for program in programs.values():
        checked(program)()
    times = {
        key: milliseconds(program)
        for key, program in programs.items()
        if key[0] in ("evaluations", "products")
    }

    def slope(what):
        return max(times[what, LONG] - times[what, SHORT], 0.0) / (LONG - SHORT)

    gradient, z = programs["reference", 0]()
    compiled = programs["residual", 0].compiled

    def residuals(z):
        return np.asarray(compiled(weights, x, jnp.asarray(np.asarray(z))))

    return Bench(
        case=case,
        precision=precision,
        norms=norms_of(z),
        gradient=gradient,
        residuals=residuals,
        launch=max(times["evaluations", SHORT] - SHORT * slope("evaluations"), 0.0),
        evaluation=slope("evaluations"),
        product=slope("products"),
    )


def gradient_error(bench: Bench, gradient: Any) -> float:
    """The relative error of a gradient, over all weights together."""
    leaves = zip(jax.tree.leaves(gradient), jax.tree.leaves(bench.gradient))
    wrong = sum(float(jnp.sum((g - exact) ** 2)) for g, exact in leaves)
    size = sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(bench.gradient))
    return float(np.sqrt(wrong / size))


def costs(
    bench: Bench, program: Program, what: str, evaluations: int, products: int
) -> Row:
    """What a program took, and a bare loop of as many evaluations and products."""
    time, bare = milliseconds(program), bench.bare(evaluations, products)
    return {
        what: time,
        "evaluations": evaluations,
        "products": products,
        BARE: bare,
        RATIO: time / bare,
        "compile (s)": program.compile_seconds,
        "temporary (MB)": program.temporary_mb,
    }


def solver_row(bench: Bench, program: Program) -> Row:
    """A solve: what it did, and what it took."""
    z, success, evaluations, products = program()
    evaluations, products = (int(np.max(n)) for n in (evaluations, products))
    success = np.asarray(success)
    return {
        **costs(bench, program, SOLVE, evaluations, products),
        "residual": float(bench.residuals(z).max()),
        "converged": f"{success.sum()}/{success.size}",
    }


def adjoint_row(
    bench: Bench, programs: dict[Any, Any], name: str, evaluations: int
) -> Row:
    """A solve and its gradient: what it took, and how wrong it is.

    **Arguments:**

    - `bench`: the case.
    - `programs`: those of `measure`.
    - `name`: of the adjoint.
    - `evaluations`: of its solver alone.

    **Returns:**

    The row.
    """
    method, steps, reported = ADJOINTS[name], 0, {}
    if method.reports:
        report = checked(programs["report", name])()
        steps = int(np.max(report.num_steps))
        success = np.asarray(report.successful)
        reported["converged"] = f"{success.sum()}/{success.size}"
    program = checked(programs["gradient", name])
    error = gradient_error(bench, program())
    evaluations, products = method.cost(evaluations, steps)
    return {
        **costs(bench, program, GRADIENT, evaluations, products),
        "gradient error": error,
        **reported,
    }


def measure(
    record: Record,
    bench: Bench,
    *,
    solvers: Iterable[str] = SOLVERS,
    adjoints: Iterable[str] = ADJOINTS,
    table: str,
) -> None:
    """Add a row for every solver and every adjoint."""
    case, solvers, adjoints = bench.case, list(solvers), list(adjoints)
    # An adjoint's costs include the evaluations of its solver.
    every = dict.fromkeys([*solvers, *(ADJOINTS[name].solver for name in adjoints)])
    solve_arguments = (case.weights, case.inputs, bench.norms)
    arguments = (case.weights, case.inputs, case.cotangent)
    jobs: dict[Any, Job] = {}
    for name in every:
        program = solve_program(case, SOLVERS[name])
        jobs["solve", name] = Job(program, solve_arguments, bench.precision)
    for name in adjoints:
        method = ADJOINTS[name]
        program = gradient_program(case, method)
        jobs["gradient", name] = Job(program, arguments, bench.precision)
        if method.reports:
            program = gradient_program(case, method, report=True)
            jobs["report", name] = Job(program, arguments, bench.precision)
    programs = compile_all(jobs)
    evaluations: dict[str, int] = {}
    for name in every:
        record.check_time()
        try:
            row = solver_row(bench, checked(programs["solve", name]))
            evaluations[name] = row["evaluations"]
        except Exception as error:
            row = {"result": said(error)}
        if name in solvers:
            record.add(table, {**bench.head, "method": name, **row})
    for name in adjoints:
        record.check_time()
        try:
            found = evaluations[ADJOINTS[name].solver]
            row = adjoint_row(bench, programs, name, found)
        except Exception as error:
            row = {"result": said(error)}
        record.add(table, {**bench.head, "method": name, **row})


def bare_row(bench: Bench) -> Row:
    """What an evaluation and a product take in a bare loop."""
    return {
        **bench.head,
        "method": "bare loop",
        "an evaluation (ms)": bench.evaluation,
        "a product (ms)": bench.product,
        "to start (ms)": bench.launch,
    }
