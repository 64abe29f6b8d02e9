"""Two stacked equilibria are one equilibrium of both states (Bai et al., *Deep
Equilibrium Models*, 2019, theorem 2)."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import pytest
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

import implicitnets as inn

from .helpers import (
    loss_weights,
    make_matrix,
    problem,
    relative_error,
    tolerance,
    weighted_sum,
)


TOL = tolerance(1e-6, 1e-12)
ADJOINT = inn.ImplicitAdjoint(inn.GivensGMRES(rtol=TOL, atol=0.0))

SOLVERS = {
    "anderson": inn.AndersonAcceleration(TOL, 0.0),
    "broyden": inn.Broyden(TOL, 0.0),
    "newton_krylov": inn.NewtonKrylov(TOL, 0.0),
}


class UpperCell(eqx.Module):
    """Its input is a state of any structure."""

    hidden: Float[Array, "d d"]
    inject: Float[Array, "d below"]

    def __call__(self, z, x):
        return jnp.tanh(self.hidden @ z + self.inject @ ravel_pytree(x)[0])


class JointCell(eqx.Module):
    """Of two states, of which the upper one sees the lower one."""

    lower: Callable
    upper: Callable

    def __call__(self, z, x):
        lower, upper = z
        return self.lower(lower, x), self.upper(upper, lower)


@pytest.mark.parametrize(
    "solver_name, cell_name",
    (("anderson", "dense"), ("broyden", "pair"), ("newton_krylov", "dense")),
)
def test_stacked_is_joint(solver_name, cell_name):
    lower, x = problem(cell_name)
    size = ravel_pytree(x)[0].size
    upper = UpperCell(make_matrix(6, 0.8), make_matrix(max(6, size), 1.0)[:6, :size])

    def layer(cell, init):
        return inn.DeepEquilibriumNetwork(
            cell, SOLVERS[solver_name], init=init, adjoint=ADJOINT, max_steps=1000
        )

    def stacked(lower, upper, x):
        # At zero the group norm's Jacobian is singular.
        z = layer(lower, lambda x: x)(x)
        return z, layer(upper, lambda _: jnp.zeros(6))(z)

    def joint(lower, upper, x):
        return layer(JointCell(lower, upper), lambda x: (x, jnp.zeros(6)))(x)

    @eqx.filter_jit
    def value_and_gradient(network):
        def loss(arguments):
            z = network(*arguments)
            return weighted_sum(z, loss_weights(z)), z

        arguments = lower, upper, x
        (_, z), gradient = eqx.filter_value_and_grad(loss, has_aux=True)(arguments)
        return z, gradient

    z_stacked, gradient_stacked = value_and_gradient(stacked)
    z_joint, gradient_joint = value_and_gradient(joint)
    # An error is some times the residual, which is what the tolerance is of.
    assert relative_error(z_joint, z_stacked) < 50 * TOL
    assert relative_error(gradient_joint, gradient_stacked) < 500 * TOL
