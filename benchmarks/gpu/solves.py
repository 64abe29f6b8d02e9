"""Every solver and every adjoint, next to a bare loop of the cell."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
import optimistix as optx

import implicitnets as inn

from .cases import Case, RTOL
from .record import Record, Row
from .timing import compile_all, Job, milliseconds, Program, said


MAX_STEPS = 200
# The lengths of the two loops whose difference is the time of an evaluation or product.
SHORT, LONG = 10, 60
# By float32 products and a tolerance that are better than those that are judged.
PRECISE, PRECISE_RTOL = "highest", 1e-5

SOLVE = "solve (ms)"
GRADIENT = "solve + gradient (ms)"
BARE = "bare loop (ms)"
RATIO = "time / bare loop"

ANDERSON = "AndersonAcceleration"
REVERSIBLE = "ReversibleFixedPoint"
IMPLICIT = "ImplicitAdjoint, GMRES"

Maker = Callable[[Any], Any]


def picard(norm: Any) -> optx.FixedPointIteration:
    """Plain iteration that stops by our solvers' rule, given the solution's norm."""
    return optx.FixedPointIteration(0.0, RTOL * norm, norm=optx.two_norm)


SOLVERS: dict[str, Maker] = {
    "FixedPointIteration": picard,
    ANDERSON: lambda _: inn.AndersonAcceleration(RTOL, 0.0),
    "Broyden": lambda _: inn.Broyden(RTOL, 0.0),
    "NewtonKrylov": lambda _: inn.NewtonKrylov(RTOL, 0.0),
    REVERSIBLE: lambda _: inn.ReversibleFixedPoint(RTOL, 0.0),
    "SteadyState(Tsit5)": lambda _: inn.SteadyState(dfx.Tsit5(), RTOL, 0.0),
    "SteadyState(VCABM3)": lambda _: inn.SteadyState(inn.VCABM3(), RTOL, 0.0),
}


@dataclasses.dataclass(frozen=True)
class Adjoint:
    """An adjoint with the solver in front of it.

    `cost` is how many evaluations and products the whole gradient makes, from the
    evaluations of the solve and, where the adjoint `reports`, from its steps.
    """

    adjoint: optx.AbstractAdjoint
    cost: Callable[[int, int], tuple[int, int]]
    solver: str = ANDERSON
    reports: bool = False

    @property
    def as_one(self) -> bool:
        """Whether a batch is one state: else it has a gradient an example."""
        return isinstance(self.adjoint, inn.ReversibleAdjoint)


def _linearised(evaluations: int, steps: int) -> tuple[int, int]:
    return evaluations + 1, steps + 1


ADJOINTS: dict[str, Adjoint] = {
    IMPLICIT: Adjoint(inn.ImplicitAdjoint(), _linearised, reports=True),
    "ImplicitAdjoint, Anderson": Adjoint(
        inn.ImplicitAdjoint(
            inn.FixedPointLinearSolver(inn.AndersonAcceleration(1e-4, 0.0))
        ),
        _linearised,
        reports=True,
    ),
    "PhantomAdjoint(5)": Adjoint(inn.PhantomAdjoint(5), lambda n, _: (n + 5, 5)),
    "JacobianFreeAdjoint": Adjoint(inn.JacobianFreeAdjoint(), _linearised),
    "ReversibleAdjoint": Adjoint(
        inn.ReversibleAdjoint(),
        # Its steps are the evaluations that it undoes, those of the solve.
        lambda _, steps: (2 * steps, steps),
        solver=REVERSIBLE,
        reports=True,
    ),
}


def layer_of(
    case: Case, weights: Any, solver: Any, adjoint: optx.AbstractAdjoint | None = None
) -> inn.DeepEquilibriumNetwork:
    """The equilibrium layer of a case."""
    return inn.DeepEquilibriumNetwork(
        case.cell_of(weights),
        solver,
        adjoint=inn.ImplicitAdjoint() if adjoint is None else adjoint,
        max_steps=MAX_STEPS,
    )


def solve_program(case: Case, make: Maker) -> Callable:
    """`(weights, x, norms) -> (z_star, whether successful, evaluations, products)`."""

    def solve(weights, x, norms):
        def one(x, norm):
            solution = layer_of(case, weights, make(norm)).solve(x)
            stats = solution.stats
            return (
                solution.z_star,
                solution.result == optx.RESULTS.successful,
                stats.get("nfe", stats["num_steps"]),
                stats.get("num_matvecs", jnp.array(0)),
            )

        return jax.vmap(one)(x, norms)

    return solve


def gradient_program(case: Case, method: Adjoint, *, report: bool = False) -> Callable:
    """`(weights, x, cotangent) -> gradient`, of the weights, or of probes."""
    solver = SOLVERS[method.solver](1.0)

    def loss(weights, probe, x, cotangent):
        layer = layer_of(case, weights, solver, method.adjoint)

        def solve(x, probe):
            return layer(x, probe=probe)

        if method.as_one:
            layer = dataclasses.replace(layer, cell=_Batched(layer.cell))
            z = solve(x, probe)
        else:
            z = jax.vmap(solve)(x, probe)
        return jnp.sum(z * cotangent)

    def gradient(weights, x, cotangent):
        shape = () if method.as_one else (len(x),)
        probe = inn.AdjointReport.probe(shape) if report else None
        return jax.grad(loss, argnums=1 if report else 0)(weights, probe, x, cotangent)

    return gradient


class _Batched(eqx.Module):
    """A cell of a whole batch."""

    cell: Any

    def __call__(self, z, x):
        return jax.vmap(self.cell)(z, x)


def reference_program(case: Case) -> Callable:
    """`(weights, x, cotangent) -> (gradient, z_star)`, precisely."""
    solver = inn.AndersonAcceleration(PRECISE_RTOL, 0.0)
    adjoint = inn.ImplicitAdjoint(inn.GivensGMRES(PRECISE_RTOL, 0.0))

    def loss(weights, x, cotangent):
        z = jax.vmap(layer_of(case, weights, solver, adjoint))(x)
        return jnp.sum(z * cotangent), z

    return jax.grad(loss, has_aux=True)


def residual_program(case: Case) -> Callable:
    """`(weights, x, z) -> relative residuals`, one an example."""

    def residuals(weights, x, z):
        f = case.apply(weights, z, x)
        return _norms(f - z) / _norms(f)

    return residuals


def _norms(z):
    return jnp.sqrt(jnp.sum(z**2, axis=tuple(range(1, z.ndim))))


def evaluations_program(case: Case, number: int) -> Callable:
    """As many evaluations in a loop of nothing else; the count is static."""

    def loop(weights, x, cotangent):
        del cotangent
        return lax.fori_loop(
            0, number, lambda _, z: case.apply(weights, z, x), jnp.zeros_like(x)
        )

    return loop


def products_program(case: Case, number: int) -> Callable:
    """As many products with the cell's transposed Jacobian, and nothing else."""

    def loop(weights, x, cotangent):
        _, vjp = jax.vjp(lambda z: case.apply(weights, z, x), jnp.zeros_like(x))
        return lax.fori_loop(0, number, lambda _, u: cotangent + vjp(u)[0], cotangent)

    return loop


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
        if isinstance(program, Exception):
            raise program
        program()
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
        norms=_norms(z),
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


def solver_row(bench: Bench, program: Program) -> Row:
    """A solve: what it did, and what it took."""
    z, success, evaluations, products = program()
    evaluations, products = (int(np.max(n)) for n in (evaluations, products))
    success = np.asarray(success)
    time, bare = milliseconds(program), bench.bare(evaluations, products)
    return {
        SOLVE: time,
        "evaluations": evaluations,
        "products": products,
        BARE: bare,
        RATIO: time / bare,
        "residual": float(bench.residuals(z).max()),
        "converged": f"{success.sum()}/{success.size}",
        "compile (s)": program.compile_seconds,
        "temporary (MB)": program.temporary_mb,
    }


def adjoint_row(bench: Bench, program: Program, evaluations: int, products: int) -> Row:
    """A solve and its gradient: what it took, and how wrong it is."""
    error = gradient_error(bench, program())
    time, bare = milliseconds(program), bench.bare(evaluations, products)
    return {
        GRADIENT: time,
        "evaluations": evaluations,
        "products": products,
        BARE: bare,
        RATIO: time / bare,
        "gradient error": error,
        "compile (s)": program.compile_seconds,
        "temporary (MB)": program.temporary_mb,
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
    case = bench.case
    solvers, adjoints = list(solvers), list(adjoints)
    solve_arguments = (case.weights, case.inputs, bench.norms)
    arguments = (case.weights, case.inputs, case.cotangent)
    jobs: dict[Any, Job] = {}
    # Adjoints need the evaluations of their solver.
    needed = {ADJOINTS[name].solver for name in adjoints}
    for name in dict.fromkeys([*solvers, *sorted(needed)]):
        program = solve_program(case, SOLVERS[name])
        jobs["solve", name] = Job(program, solve_arguments, bench.precision)
    for name in adjoints:
        method = ADJOINTS[name]
        jobs["gradient", name] = Job(
            gradient_program(case, method), arguments, bench.precision
        )
        if method.reports:
            reported = gradient_program(case, method, report=True)
            jobs["report", name] = Job(reported, arguments, bench.precision)
    programs = compile_all(jobs)
    evaluations: dict[str, int] = {}
    for name in dict.fromkeys([*solvers, *sorted(needed)]):
        record.check_time()
        row: Row = {}
        try:
            row = solver_row(bench, _checked(programs["solve", name]))
            evaluations[name] = row["evaluations"]
        except Exception as error:
            row = {"result": said(error)}
        if name in solvers:
            record.add(table, {**bench.head, "method": name, **row})
    for name in adjoints:
        record.check_time()
        method = ADJOINTS[name]
        try:
            steps, reported = 0, {}
            if method.reports:
                report = _checked(programs["report", name])()
                steps = int(np.max(report.num_steps))
                successful = np.asarray(report.successful)
                reported["converged"] = f"{successful.sum()}/{successful.size}"
            program = _checked(programs["gradient", name])
            cost = method.cost(evaluations[method.solver], steps)
            row = adjoint_row(bench, program, *cost) | reported
        except Exception as error:
            row = {"result": said(error)}
        record.add(table, {**bench.head, "method": name, **row})


def _checked(program: Program | Exception) -> Program:
    if isinstance(program, Exception):
        raise program
    return program


def bare_row(bench: Bench) -> Row:
    """What an evaluation and a product take in a bare loop."""
    return {
        **bench.head,
        "method": "bare loop",
        "an evaluation (ms)": bench.evaluation,
        "a product (ms)": bench.product,
        "to start (ms)": bench.launch,
    }
