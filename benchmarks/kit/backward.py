"""Backward passes as checked table rows, and the products that they take."""

import functools as ft
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array

import implicitnets as inn

from .methods import Method
from .problems import layer_cell, Problem
from .reference import Reference, residuals, ROUNDING
from .tables import Row
from .timing import compile_and_run


# Tight, so that a gradient's error is the adjoint's.
TOLERANCE = 1e-6
# A loss may be as small as this.
SCALE = 1e-8


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


def count_products(problem: Problem, method: Method, z: Array) -> int | None:
    """The products of a backward pass, the most of an example; `None` if unknown."""
    adjoint = method.adjoint
    if method.backward_products is not None:
        return method.backward_products
    # Lineax' GMRES counts its restarts.
    if not isinstance(adjoint, inn.ImplicitAdjoint) or isinstance(
        adjoint.linear_solver, lx.GMRES
    ):
        return None
    arguments = problem.weights, problem.inputs, z, problem.cotangent
    products = backward_products(
        *arguments, kind=problem.kind, linear_solver=adjoint.linear_solver
    )
    return int(products.max())


def pull_back_program(problem: Problem, method: Method) -> Callable:
    """`(weights, x) -> (z_star, pull_back)`: the forward part of a gradient."""

    def forward(weights, x):
        def solve(weights):
            return jax.vmap(method.layer(layer_cell(problem.kind, weights)))(x)

        return jax.vjp(solve, weights)

    return forward


def prepare_backward(ref: Reference, method: Method) -> tuple[Row, Callable[[], Any]]:
    """A table row without its time, and the backward pass to be timed."""
    problem = ref.problem
    weights, x, cotangent = jax.tree.map(
        jnp.asarray, (problem.weights, problem.inputs, problem.cotangent)
    )
    z, pull_back = jax.jit(pull_back_program(problem, method))(weights, x)
    residual = float(residuals(problem, np.asarray(z)).max())
    backward, (gradient,) = compile_and_run(
        lambda pull_back, ct: pull_back(ct), pull_back, cotangent
    )
    gradient = jax.tree.map(np.asarray, gradient)
    (scaled,) = backward.at(pull_back, SCALE * cotangent)
    scaled = {name: np.asarray(g, float) / SCALE for name, g in scaled.items()}
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(pull_back))
    row: Row = {
        "problem": problem.name,
        "adjoint": method.name,
        "forward": "ok" if residual <= TOLERANCE + ROUNDING else "NOT CONVERGED",
        "forward residual": residual,
        "products": count_products(problem, method, z),
        "gradient error": ref.gradient_error(gradient),
        f"error at scale {SCALE:g}": ref.gradient_error(scaled),
        "cosine": ref.cosine(gradient),
        # What the backward pass is handed, and what it takes besides.
        "memory (MB)": (kept + backward.temp_bytes) / 1e6,
    }
    return row, backward.call
