"""Which linear solver should the implicit adjoint have?

Jacobian products, time of the backward pass and error of the gradient for every linear
solver, each to a relative tolerance of 1e-4, on maps of the spectral radii that occur.
Only an accurate gradient has a time.
"""

import dataclasses
from collections.abc import Callable

import lineax as lx
import optimistix as optx
import tyro

import implicitnets as inn

from .kit.backward import prepare_backward, TOLERANCE
from .kit.methods import Method
from .kit.problems import dense_tanh, linear, Problem, resnet
from .kit.reference import reference
from .kit.results import save, TimingSettings
from .kit.rows import LARGEST_GRADIENT_ERROR
from .kit.tables import print_table, Row
from .kit.timing import progress, time_calls


RTOL = 1e-4
# A state of more elements is too large for its Jacobian to be factorised.
LARGEST_FACTORISED = 100

# From easy to hard: random and symmetric matrices, and a network's cell.
PROBLEMS: dict[str, Callable[[], Problem]] = {
    "dense-0.5": lambda: dense_tanh(0.5),
    "dense-0.9": lambda: dense_tanh(0.9),
    "dense-0.99": lambda: dense_tanh(0.99),
    "lin-0.95": lambda: linear(0.95, size=256, batch=32),
    "lin-0.99": lambda: linear(0.99, size=256, batch=32),
    "resnet": resnet,
    "lin-1.2": lambda: linear(1.2, batch=32),
}


@dataclasses.dataclass(frozen=True)
class Config(TimingSettings):
    """Compare linear solvers for the backward pass."""

    batch: int = 32
    """How many examples to solve."""
    problems: tuple[str, ...] = tuple(PROBLEMS)
    """Which problems to solve."""


def linear_solvers(size: int) -> dict[str, lx.AbstractLinearSolver]:
    """Lineax solvers for a state of so many elements, to one tolerance."""

    def by_iteration(solver):
        return inn.FixedPointLinearSolver(solver, max_steps=1000)

    solvers: dict[str, lx.AbstractLinearSolver] = {
        f"GivensGMRES, restart {restart}": inn.GivensGMRES(RTOL, 0.0, restart=restart)
        for restart in (10, 20, 30)
    }
    solvers["Anderson"] = by_iteration(inn.AndersonAcceleration(RTOL, 0.0))
    solvers["plain iteration"] = by_iteration(
        optx.FixedPointIteration(0.0, RTOL, norm=optx.two_norm)
    )
    solvers["lx.GMRES"] = lx.GMRES(RTOL, RTOL)
    if size <= LARGEST_FACTORISED:
        solvers["lx.LU"] = lx.LU()
    return solvers


def compare(config: Config, problem: Problem) -> list[Row]:
    """Every linear solver on one problem."""
    problem = problem.first(config.batch)
    ref = reference(problem)
    solvers = linear_solvers(problem.inputs[0].size)
    rows, calls = [], {}
    for name, solver in progress(solvers.items(), problem.name):
        forward = inn.NewtonKrylov(TOLERANCE, 0.0)
        method = Method(name, forward, adjoint=inn.ImplicitAdjoint(solver))
        row, calls[name] = prepare_backward(ref, method)
        rows.append({"linear solver": row.pop("adjoint"), **row})
    seconds = time_calls(calls, config.repeats, f"{problem.name}, timing")
    for row in rows:
        if row["gradient error"] <= LARGEST_GRADIENT_ERROR[problem.kind]:
            row["backward (ms)"] = 1e3 * seconds[row["linear solver"]]
    return rows


def main() -> None:
    config = tyro.cli(Config)
    rows = []
    for name in config.problems:
        problem = PROBLEMS[name]()
        new_rows = compare(config, problem)
        print_table(problem.name, new_rows)
        rows += new_rows
    save(config, "linear_solvers", {"rows": rows})


if __name__ == "__main__":
    main()
