"""A solve and a gradient as users run them: with all of XLA's optimisations.

The other tests compile without most of them. Here is one case of every solver and
every adjoint; `test_causal_transformer` trains a model that way.
"""

import diffrax as dfx
import equinox as eqx
import jax
import jax.random as jr
import optimistix as optx
import pytest

import implicitnets as inn

from .helpers import (
    dense_cell,
    dense_gradient,
    loss_weights,
    make_vector,
    problem,
    relative_error,
    weighted_sum,
)


pytestmark = pytest.mark.xla_defaults

TOL = 1e-6
IMPLICIT = inn.ImplicitAdjoint(inn.GivensGMRES(TOL, 0.0))
MANY = 100

CELLS = {
    "dense": lambda: (dense_cell(spectral_radius=0.6), make_vector(4)),
    "conv": lambda: problem("conv"),
    "monotone": lambda: (
        inn.nn.MonotoneCell(4, 4, margin=0.5, key=jr.key(0)),
        make_vector(4),
    ),
}
SOLVERS = {
    "anderson": inn.AndersonAcceleration(TOL, TOL),
    "broyden": inn.Broyden(TOL, TOL),
    "auto": inn.AutoSolver(TOL, TOL),
    "newton_krylov": inn.NewtonKrylov(TOL, TOL),
    "reversible": inn.ReversibleFixedPoint(TOL, TOL),
    "tsit5": inn.SteadyState(dfx.Tsit5(), TOL, TOL),
    "vcabm3": inn.SteadyState(inn.VCABM3(), TOL, TOL),
    "pseudo_transient": inn.SteadyState(
        dfx.ImplicitEuler(), TOL, TOL, stepsize_controller=inn.PseudoTransient()
    ),
    "forward_backward": inn.ForwardBackward(TOL, TOL),
    "peaceman_rachford": inn.PeacemanRachford(TOL, TOL),
}
ADJOINTS = {
    "fixed_point": inn.ImplicitAdjoint(
        inn.FixedPointLinearSolver(inn.AndersonAcceleration(TOL, TOL))
    ),
    "neumann": inn.NeumannAdjoint(MANY),
    "phantom": inn.PhantomAdjoint(MANY),
    "shine": inn.ShineAdjoint(4),
    "reversible": inn.ReversibleAdjoint(IMPLICIT),
    "unrolled": optx.RecursiveCheckpointAdjoint(),
}
SOLVER_OF = {"shine": "broyden", "reversible": "reversible"}


@eqx.filter_jit
def solve_and_gradient(deq, x):
    def loss(params):
        cell, x = params
        sol = eqx.tree_at(lambda deq: deq.cell, deq, cell).solve(x)
        return weighted_sum(sol.z_star, loss_weights(sol.z_star)), sol

    gradient = eqx.filter_value_and_grad(loss, has_aux=True)
    (_, sol), gradients = gradient((deq.cell, x))
    return sol, gradients


def check_solve(cell, x, solver, adjoint):
    deq = inn.DeepEquilibriumNetwork(cell, solver, adjoint=adjoint, max_steps=256)
    sol, gradients = solve_and_gradient(deq, x)
    assert sol.result == optx.RESULTS.successful
    assert relative_error(cell(sol.z_star, x), sol.z_star) < 1e-4
    return sol.z_star, gradients


@pytest.mark.parametrize(
    "solver_name, adjoint, cell_name",
    [
        *(
            pytest.param(
                name,
                IMPLICIT,
                "monotone"
                if name in ("forward_backward", "peaceman_rachford")
                else "dense",
                id=name,
            )
            for name in SOLVERS
        ),
        pytest.param("anderson", IMPLICIT, "conv", id="convolution"),
        *(
            pytest.param(
                SOLVER_OF.get(name, "anderson"), adjoint, "dense", id=f"{name}_adjoint"
            )
            for name, adjoint in ADJOINTS.items()
        ),
    ],
)
def test_exact_gradient(solver_name, adjoint, cell_name):
    cell, x = CELLS[cell_name]()
    z, gradients = check_solve(cell, x, SOLVERS[solver_name], adjoint)
    exact = dense_gradient(cell, z, x, loss_weights(z))
    assert relative_error(gradients, exact) < 1e-3


def test_jacobian_free_gradient():
    cell, x = CELLS["dense"]()
    adjoint = inn.JacobianFreeAdjoint()
    z, gradients = check_solve(cell, x, SOLVERS["anderson"], adjoint)
    _, pull_back = jax.vjp(lambda cell, x: cell(z, x), cell, x)
    assert relative_error(gradients, pull_back(loss_weights(z))) < 1e-5
