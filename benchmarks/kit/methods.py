"""Every solver to compare, and its programs: solve, gradient, and a bare loop."""

import dataclasses
from collections.abc import Callable
from typing import Any

import diffrax as dfx
import jax
import jax.lax as lax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx

import implicitnets as inn

from .problems import layer_cell, Problem


@dataclasses.dataclass(frozen=True)
class Method:
    """A solver, an adjoint and a name for the two.

    `adjoint` is `None` for the adjoint with the given linear solver. A solver that is
    `dense` makes a matrix of the state's size squared, and is not run on large ones.
    `backward_products` is how many the adjoint always takes, if that is known.
    """

    name: str
    solver: Any
    linear_solver: lx.AbstractLinearSolver = inn.GivensGMRES(rtol=1e-4, atol=0.0)
    adjoint: optx.AbstractAdjoint | None = None
    max_steps: int = 1000
    backward_products: int | None = None
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
