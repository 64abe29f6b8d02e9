"""Solvers and adjoints of this library as compiled, checked, timed table rows."""

import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any

import diffrax as dfx
import jax
import jax.lax as lax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx

import implicitnets as inn

from .problems import layer_cell, Problem
from .reference import Reference, residuals
from .tables import NOT_RUN, Row
from .timing import compile_and_run, Compiled, time_calls


# By how much rounding to float32 may lift a residual over its tolerance.
ROUNDING = 2 * float(np.finfo(np.float32).eps)
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
class Method:
    """A solver, an adjoint and a name for the two.

    `adjoint` is `None` for the adjoint with the given linear solver. A solver that is
    `dense` makes a matrix of the state's size squared, and is not run on large ones.
    """

    name: str
    solver: Any
    linear_solver: lx.AbstractLinearSolver = inn.GivensGMRES(rtol=1e-4, atol=0.0)
    adjoint: optx.AbstractAdjoint | None = None
    max_steps: int = 1000
    dense: bool = False

    def layer(self, cell: Any) -> inn.DeepEquilibriumNetwork:
        """The equilibrium layer of a cell."""
        adjoint = self.adjoint
        if adjoint is None:
            adjoint = inn.ImplicitAdjoint(self.linear_solver)
        return inn.DeepEquilibriumNetwork(
            cell, self.solver, adjoint=adjoint, max_steps=self.max_steps
        )


# A dense Jacobian of a larger state is not worth its cost.
LARGEST_DENSE_STATE = 256
NEWTON_GMRES = "Newton, GMRES (Optimistix)"


def discrete_methods(problem: Problem, norm: float) -> list[Method]:
    """Every root finder and fixed-point solver, at the problem's tolerance.

    **Arguments:**

    - `problem`: what to solve.
    - `norm`: that of its solutions, for Optimistix' solvers: they have no relative
        tolerance that looks at a state as a whole.
    """
    rtol = problem.rtol
    atol = rtol * norm
    stock = {"rtol": 0.0, "atol": atol, "norm": optx.two_norm}
    gmres = lx.GMRES(1e-3, 1e-3)
    matrix_free = {
        "Picard (Optimistix)": optx.FixedPointIteration(**stock),
        "Anderson": inn.AndersonAcceleration(rtol, 0.0),
        "Anderson, history 10": inn.AndersonAcceleration(rtol, 0.0, history_size=10),
        "Broyden": inn.Broyden(rtol, 0.0),
        "Broyden, good updates": inn.Broyden(rtol, 0.0, good_update=True),
        "Broyden, bad updates": inn.Broyden(rtol, 0.0, good_update=False),
        "Newton-Krylov": inn.NewtonKrylov(rtol, 0.0),
        "reversible": inn.ReversibleFixedPoint(rtol, 0.0),
        NEWTON_GMRES: optx.Newton(rtol, atol, linear_solver=gmres),
    }
    dense = {
        "Newton (Optimistix)": optx.Newton(rtol, atol),
        "Chord (Optimistix)": optx.Chord(rtol, atol),
        "Dogleg (Optimistix)": optx.Dogleg(rtol, atol),
        "Levenberg-Marquardt (Optimistix)": optx.LevenbergMarquardt(rtol, atol),
        "BFGS (Optimistix)": optx.BFGS(rtol, atol),
    }
    return [
        Method(name, solver, dense=name in dense)
        for name, solver in {**matrix_free, **dense}.items()
    ]


def continuous_methods(problem: Problem) -> list[Method]:
    """Every ODE solver, followed to the steady state at the problem's tolerance."""
    ode_solvers = [
        dfx.Euler(),
        dfx.Heun(),
        dfx.Bosh3(),
        dfx.Tsit5(),
        dfx.Dopri5(),
        dfx.Dopri8(),
        inn.VCABM3(),
        dfx.ImplicitEuler(),
        dfx.Kvaerno3(),
        dfx.Kvaerno4(),
        dfx.Kvaerno5(),
    ]
    return [
        Method(
            type(solver).__name__,
            inn.SteadyState(solver, problem.rtol, 0.0),
            dense=isinstance(solver, dfx.AbstractImplicitSolver),
        )
        for solver in ode_solvers
    ]


def solve_program(problem: Problem, method: Method) -> Callable:
    """`solve(weights, x) -> (z_star, whether successful, stats)`, over the batch."""

    def solve(weights, x):
        layer = method.layer(layer_cell(problem.kind, weights))

        def one(x):
            sol = layer.solve(x)
            return sol.z_star, sol.result == optx.RESULTS.successful, sol.stats

        return jax.vmap(one)(x)

    return solve


def gradient_program(problem: Problem, method: Method) -> Callable:
    """`gradient(weights, x, cotangent) -> (gradient, z_star)`, over the batch."""

    def loss(weights, x, cotangent):
        z = jax.vmap(method.layer(layer_cell(problem.kind, weights)))(x)
        return jnp.sum(z * cotangent), z

    return jax.grad(loss, has_aux=True)


@ft.partial(jax.jit, static_argnames=("kind", "linear_solver"))
def backward_products(weights, x, z, cotangent, *, kind, linear_solver):
    """The products of each example's backward solve, at equilibria `z` of a batch."""

    def one(x, z, cotangent):
        cell = layer_cell(kind, weights)
        _, vjp = jax.vjp(lambda z: cell(z, x) - z, z)
        operator = lx.FunctionLinearOperator(
            lambda u: vjp(u)[0], jax.eval_shape(lambda: z)
        )
        b = cotangent / jnp.linalg.norm(cotangent)
        solution = lx.linear_solve(operator, b, linear_solver, throw=False)
        # A direct solver asks for the whole matrix, a product a column.
        return solution.stats.get("num_steps", jnp.array(z.size))

    return jax.vmap(one)(x, z, cotangent)


def bare_loop_program(problem: Problem, evaluations: int, products: int) -> Callable:
    """As many evaluations and products as given, in loops with nothing else in them."""

    # The layer's own convolutions, which are fast in a loop.
    def apply(weights, x, z):
        layer = inn.DeepEquilibriumNetwork(
            layer_cell(problem.kind, weights), fixed_depth=1
        )
        return layer(x, z0=z)

    def one(weights, x, cotangent):
        z = lax.fori_loop(
            0, evaluations, lambda _, z: apply(weights, x, z), jnp.zeros_like(x)
        )
        _, vjp = jax.vjp(lambda z: apply(weights, x, z), z)
        return lax.fori_loop(0, products, lambda _, u: cotangent + vjp(u)[0], cotangent)

    return jax.vmap(one, in_axes=(None, 0, 0))


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
    """The rows with the median times, in turns, of those that passed their checks."""
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
