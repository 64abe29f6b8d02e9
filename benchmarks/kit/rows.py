"""Solvers as compiled, checked, timed table rows."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx

from .backward import backward_products
from .methods import gradient_program, LARGEST_DENSE_STATE, Method, solve_program
from .problems import Problem
from .reference import Reference, residuals, ROUNDING
from .tables import NOT_RUN, Row
from .timing import compile_and_run, Compiled, time_calls


# How wrong a gradient may be, by kind. An equilibrium within the tolerance still flips
# some of a ResNet's rectifiers, each of which changes the gradient at a stroke.
LARGEST_GRADIENT_ERROR = {
    "tanh": 1e-2,
    "conv": 1e-2,
    "linear": 1e-2,
    "resnet": 5e-2,
    "tutorial": 1e-2,
}


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A method that was compiled, run and checked on a problem, or left out."""

    row: Row
    solve: Compiled | None
    gradient: Compiled | None

    @property
    def programs(self) -> list[tuple[str, Compiled]]:
        """The compiled functions that there are, and what they do."""
        both = (("solve", self.solve), ("solve + gradient", self.gradient))
        return [(name, compiled) for name, compiled in both if compiled is not None]

    @property
    def passed(self) -> bool:
        """Whether its times may be shown."""
        return self.row["result"] == "ok"


def prepare(problem: Problem, reference: Reference | None, method: Method) -> Prepared:
    """Compile and run a method, and check its residual and its gradient.

    **Arguments:**

    - `problem`: what to solve.
    - `reference`: its exact solution; `None` to solve without a gradient.
    - `method`: the solver and the adjoint.

    **Returns:**

    The compiled functions, and a table row that has everything but the times.
    """
    row: Row = {"problem": problem.name, "method": method.name}
    if method.dense and problem.inputs[0].size > LARGEST_DENSE_STATE:
        return Prepared({**row, "result": f"{NOT_RUN}: dense Jacobian"}, None, None)
    arguments = jax.tree.map(jnp.asarray, (problem.weights, problem.inputs))
    solve, (z, success, stats) = compile_and_run(
        solve_program(problem, method), *arguments
    )
    # Optimistix' iteration makes one a step, which it does not tell.
    is_picard = isinstance(method.solver, optx.FixedPointIteration)
    evaluations = stats["num_steps"] if is_picard else None
    success = np.asarray(success)
    residual = residuals(problem, z)
    row = {
        **row,
        "result": verdict(problem, residual, None, success),
        "evaluations": _largest(stats.get("nfe", evaluations)),
        "products": _largest(stats.get("num_matvecs")),
        "residual": float(residual.max()),
        "converged": f"{success.sum()}/{success.size}",
        "false claims": int(false_claims(problem, residual, success).sum()),
    }
    if reference is not None:
        row["error"] = reference.error(np.asarray(z))
    gradient = None
    if reference is not None and row["result"] == "ok":
        cotangent = jnp.asarray(problem.cotangent)
        gradient, (value, z) = compile_and_run(
            gradient_program(problem, method), *arguments, cotangent
        )
        error = reference.gradient_error(jax.tree.map(np.asarray, value))
        row["result"] = verdict(problem, residuals(problem, z), error, success)
        row["gradient error"] = error
        if method.adjoint is None:
            products = backward_products(
                *arguments,
                z,
                cotangent,
                kind=problem.kind,
                linear_solver=method.linear_solver,
            )
            row["backward products"] = _largest(products)
    return Prepared(row, solve, gradient)


def verdict(
    problem: Problem,
    residual: np.ndarray,
    gradient_error: float | None,
    success: np.ndarray | bool,
) -> str:
    """`ok`, or why a row shows no time.

    **Arguments:**

    - `problem`: what was solved.
    - `residual`: each example's.
    - `gradient_error`: that of the gradient, if there is one.
    - `success`: for which examples the solver says so.
    """
    claims = false_claims(problem, residual, success)
    if claims.any():
        worst = residual[claims].max()
        return f"WRONG: {claims.sum()} successful at residuals to {worst:.1e}"
    if not (residual <= problem.rtol + ROUNDING).all():
        return f"failed: residual {residual.max():.1e}"
    most = LARGEST_GRADIENT_ERROR[problem.kind]
    if gradient_error is not None and not gradient_error <= most:
        return f"failed: gradient error {gradient_error:.1e}"
    return "ok"


def false_claims(
    problem: Problem, residual: np.ndarray, success: np.ndarray | bool
) -> np.ndarray:
    """For which examples a solver claims a success that it has not."""
    return success & ~(residual <= problem.rtol + ROUNDING)


def time_rows(prepared: list[Prepared], repeats: int, description: str) -> list[Row]:
    """The rows, with median times of those that passed their checks."""
    calls = {}
    for i, item in enumerate(prepared):
        if item.passed:
            for what, compiled in item.programs:
                calls[i, what] = compiled.call
    seconds = time_calls(calls, repeats, description)
    rows = []
    for i, item in enumerate(prepared):
        row = dict(item.row)
        for what, compiled in item.programs:
            if (i, what) in seconds:
                row[f"{what} (ms)"] = 1e3 * seconds[i, what]
                row["first result (s)"] = compiled.first_seconds
                row["temp (MB)"] = compiled.temp_bytes / 1e6
        rows.append(row)
    return rows


def _largest(counts: Any) -> int | None:
    return None if counts is None else int(np.max(counts))
