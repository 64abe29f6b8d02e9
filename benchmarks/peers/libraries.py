"""The methods of every library on a problem.

Every library solves the batch as its documentation does: torchdeq the whole of it, the
JAX libraries one example under `vmap`. Tolerances are relative, and each example's own
where the library allows it. A library that has only absolute ones gets the relative one
times the norm of the solution: every library is given `(problem, norms)`.
"""

# Each peer is installed for an interpreter of its own.
# pyright: reportMissingImports=false

import dataclasses
import os
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from ..kit.problems import jax_cell, NORM_EPS, NUM_GROUPS, Problem


MAX_STEPS = 1000
HISTORY = 5
# Where a default ridge keeps Anderson acceleration from converging, one that does not.
SMALL_RIDGE = 1e-10


@dataclasses.dataclass(frozen=True)
class Program:
    """What one method does: solve, and solve with the gradient.

    The calls return `(z_star, counts)` and `(z_star, gradient)`, of arrays. The counts
    are the evaluations, and the Jacobian products of libraries that tell; those of a
    backward pass, and the temporary memory, are known for some libraries only.
    `forget` drops what was compiled so far.
    """

    solve: Callable[[], tuple[Any, dict[str, Any]]]
    gradient: Callable[[], tuple[Any, dict[str, Any]]]
    temp_bytes: Callable[[], int | None] = lambda: None
    backward_products: Callable[[Any], int | None] = lambda _: None
    forget: Callable[[], None] = lambda: None


Methods = dict[str, Callable[[], Program]]


def jax_program(
    problem: Problem,
    norms: np.ndarray,
    solve_one: Callable,
    backward_products: Callable[[Any], int | None] = lambda _: None,
) -> Program:
    """A method of a JAX library.

    `solve_one(weights, x, norm) -> (z_star, counts)` is for one example.
    """
    import jax
    import jax.numpy as jnp

    weights, x, cotangent = jax.tree.map(
        jnp.asarray, (problem.weights, problem.inputs, problem.cotangent)
    )
    scales = jnp.asarray(norms)

    def solve(weights, x, scales):
        return jax.vmap(solve_one, in_axes=(None, 0, 0))(weights, x, scales)

    def loss(weights, x, scales, cotangent):
        z, _ = solve(weights, x, scales)
        return jnp.sum(z * cotangent), z

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    compiled: dict[str, Any] = {}

    def call_solve():
        if "solve" not in compiled:
            compiled["solve"] = jax.jit(solve).lower(weights, x, scales).compile()
        return jax.block_until_ready(compiled["solve"](weights, x, scales))

    def call_gradient():
        arguments = weights, x, scales, cotangent
        if "gradient" not in compiled:
            compiled["gradient"] = gradient.lower(*arguments).compile()
        value, z = jax.block_until_ready(compiled["gradient"](*arguments))
        return z, value

    def temp_bytes():
        memory = compiled["gradient"].memory_analysis()
        return None if memory is None else memory.temp_size_in_bytes

    return Program(
        call_solve, call_gradient, temp_bytes, backward_products, jax.clear_caches
    )


def implicitnets(problem: Problem, norms: np.ndarray) -> Methods:
    """This library."""
    import jax.numpy as jnp
    import lineax as lx
    import optimistix as optx

    import implicitnets as inn

    from ..kit.backward import backward_products
    from ..kit.methods import Method
    from ..kit.problems import layer_cell

    rtol = problem.rtol

    def method(make_solver: Callable, linear_solver: lx.AbstractLinearSolver):
        def configured(norm):
            return Method("", make_solver(norm), linear_solver, max_steps=MAX_STEPS)

        def solve_one(weights, x, norm):
            sol = configured(norm).layer(layer_cell(problem.kind, weights)).solve(x)
            return sol.z_star, {
                "evaluations": sol.stats.get("nfe", sol.stats["num_steps"]),
                "products": sol.stats.get("num_matvecs", jnp.array(0)),
            }

        def count_products(z):
            found = backward_products(
                problem.weights,
                problem.inputs,
                z,
                problem.cotangent,
                kind=problem.kind,
                linear_solver=linear_solver,
            )
            return int(found.max())

        return lambda: jax_program(problem, norms, solve_one, count_products)

    def picard(norm):
        return optx.FixedPointIteration(0.0, rtol * norm, norm=optx.two_norm)

    def by_iteration(solver: Any):
        return inn.FixedPointLinearSolver(solver, max_steps=MAX_STEPS)

    def anderson(_):
        return inn.AndersonAcceleration(rtol, 0.0, history_size=HISTORY)

    gmres = inn.GivensGMRES(rtol, 0.0)
    return {
        "Picard, Picard": method(picard, by_iteration(picard(1.0))),
        "Picard, GMRES": method(picard, gmres),
        "Anderson, Anderson": method(anderson, by_iteration(anderson(1.0))),
        "Anderson, GMRES": method(anderson, gmres),
        "Broyden, GMRES": method(lambda _: inn.Broyden(rtol, 0.0), gmres),
        "Broyden, history 5, Anderson": method(
            lambda _: inn.Broyden(rtol, 0.0, history_size=HISTORY),
            by_iteration(anderson(1.0)),
        ),
        "Newton-Krylov, GMRES": method(lambda _: inn.NewtonKrylov(rtol, 0.0), gmres),
    }


def optimistix(problem: Problem, norms: np.ndarray) -> Methods:
    """Optimistix and Lineax alone."""
    import jax.numpy as jnp
    import lineax as lx
    import optimistix as optx

    cell = jax_cell(problem.kind)
    gmres = lx.GMRES(problem.rtol, problem.rtol)

    def method(make_solver: Callable):
        def solve_one(weights, x, norm):
            solution = optx.fixed_point(
                cell,
                make_solver(problem.rtol * norm),
                jnp.zeros_like(x),
                (weights, x),
                adjoint=optx.ImplicitAdjoint(gmres),
                max_steps=MAX_STEPS,
                throw=False,
            )
            return solution.value, {"evaluations": solution.stats["num_steps"]}

        return lambda: jax_program(problem, norms, solve_one)

    return {
        "Picard, GMRES": method(
            lambda atol: optx.FixedPointIteration(0.0, atol, norm=optx.two_norm)
        ),
        "Newton-GMRES, GMRES": method(
            lambda atol: optx.Newton(
                problem.rtol, atol, norm=optx.two_norm, linear_solver=gmres
            )
        ),
    }


def banax(problem: Problem, norms: np.ndarray) -> Methods:
    """The banax library."""
    import jax.numpy as jnp
    from banax.adjoint import Implicit
    from banax.solver import Anderson, Broyden, Picard

    cell = jax_cell(problem.kind)

    def method(kind: Callable, **options: Any):
        solver = kind(rtol=problem.rtol, max_steps=MAX_STEPS, **options)

        def solve_one(weights, x, norm):
            del norm
            solution = Implicit(solver, solver)(
                (lambda z, weights, x: cell(z, (weights, x)), (weights, x)),
                jnp.zeros_like(x),
            )
            return solution.value, {"evaluations": solution.stats.steps + 1}

        return lambda: jax_program(problem, norms, solve_one)

    return {
        "Picard": method(Picard),
        "Anderson": method(Anderson, depth=HISTORY),
        "Anderson, small ridge": method(Anderson, depth=HISTORY, ridge=SMALL_RIDGE),
        "Broyden": method(Broyden),
    }


def jaxopt(problem: Problem, norms: np.ndarray) -> Methods:
    """The jaxopt library."""
    import functools as ft

    import jax.numpy as jnp
    from jaxopt import AndersonAcceleration, FixedPointIteration, linear_solve

    cell = jax_cell(problem.kind)
    # One for all examples: it may not be traced.
    tolerance = problem.rtol * float(norms.min())

    def method(kind: Callable, **options: Any):
        backward = ft.partial(
            linear_solve.solve_gmres, tol=problem.rtol, maxiter=MAX_STEPS
        )

        def solve_one(weights, x, norm):
            del norm
            solver = kind(
                lambda z, weights, x: cell(z, (weights, x)),
                maxiter=MAX_STEPS,
                tol=tolerance,
                implicit_diff=True,
                implicit_diff_solve=backward,
                **options,
            )
            z, state = solver.run(jnp.zeros_like(x), weights, x)
            return z, {"evaluations": state.iter_num}

        return lambda: jax_program(problem, norms, solve_one)

    return {
        "fixed point": method(FixedPointIteration),
        "Anderson": method(AndersonAcceleration, history_size=HISTORY),
        "Anderson, small ridge": method(
            AndersonAcceleration, history_size=HISTORY, ridge=SMALL_RIDGE
        ),
    }


def torchdeq(
    problem: Problem, norms: np.ndarray, *, device: Literal["cpu", "cuda"] = "cpu"
) -> Methods:
    """The torchdeq library."""
    import torch
    import torch.nn.functional as F
    from torchdeq import get_deq

    del norms
    torch.set_num_threads(num_cores())
    weights = {
        name: torch.tensor(value, requires_grad=True, device=device)
        for name, value in problem.weights.items()
    }
    x = torch.tensor(problem.inputs, device=device)
    cotangent = torch.tensor(problem.cotangent, device=device)

    def wait():
        if device == "cuda":
            torch.cuda.synchronize()

    def norm(name, z):
        return F.group_norm(
            z, NUM_GROUPS, weights[f"{name}_scale"], weights[f"{name}_shift"], NORM_EPS
        )

    def tanh(z):
        return torch.tanh(F.linear(z, weights["matrix"]) + x)

    def linear(z):
        return F.linear(z, weights["matrix"]) + x

    def resnet(z):
        y = norm("norm1", F.relu(F.conv2d(z, weights["conv1"], padding=1)))
        y = norm("norm2", x + F.conv2d(y, weights["conv2"], padding=1))
        return norm("norm3", F.relu(z + y))

    def tutorial(z):
        y = torch.tanh(F.conv2d(z, weights["state"], padding=1))
        y = y + torch.tanh(F.conv2d(x, weights["inject"], padding=1))
        return torch.tanh(F.conv2d(y, weights["mix"], padding=1))

    cells = {"tanh": tanh, "linear": linear, "resnet": resnet, "tutorial": tutorial}
    cell = cells[problem.kind]

    def method(name: str, **options: Any):
        def program() -> Program:
            deq = get_deq(
                f_solver=name,
                b_solver=name,
                f_max_iter=MAX_STEPS,
                b_max_iter=MAX_STEPS,
                f_tol=problem.rtol,
                b_tol=problem.rtol,
                f_stop_mode="rel",
                b_stop_mode="rel",
                ift=True,
            )
            count = 0

            def counted_cell(z):
                nonlocal count
                count += 1
                return cell(z)

            def forward():
                return deq(counted_cell, torch.zeros_like(x), solver_kwargs=options)[0]

            def solve():
                nonlocal count
                count = 0
                deq.eval()
                with torch.no_grad():
                    z = forward()[-1]
                wait()
                return z, {"evaluations": count}

            def gradient():
                deq.train()
                z = forward()[-1]
                values = torch.autograd.grad(
                    (z * cotangent).sum(), list(weights.values())
                )
                wait()
                return z.detach(), dict(zip(weights, values, strict=True))

            return Program(solve, gradient)

        return program

    return {
        "fixed point": method("fixed_point_iter"),
        "Anderson": method("anderson", m=HISTORY),
        "Anderson, small ridge": method("anderson", m=HISTORY, lam=SMALL_RIDGE),
        "Broyden": method("broyden"),
    }


LIBRARIES = {
    "implicitnets": (implicitnets, ("implicitnets", "jax")),
    "Optimistix": (optimistix, ("optimistix", "lineax", "jax")),
    "banax": (banax, ("banax", "jax")),
    "jaxopt": (jaxopt, ("jaxopt", "jax")),
    "torchdeq": (torchdeq, ("torchdeq", "torch")),
}


def num_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
