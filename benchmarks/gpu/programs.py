"""Every solver and every adjoint as a program, and bare loops of the cell."""

import dataclasses
from collections.abc import Callable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import optimistix as optx

import implicitnets as inn

from .cases import Case, RTOL


MAX_STEPS = 200
# A tolerance that is better than those that are judged.
PRECISE_RTOL = 1e-5

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
        return norms_of(f - z) / norms_of(f)

    return residuals


def norms_of(z: Any) -> Any:
    """The norm of every example."""
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
