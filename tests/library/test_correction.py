import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import implicitnets as inn
from implicitnets import (
    constant_weights,
    exponential_weights,
    fixed_point_correction,
    linear_weights,
    sample_states,
)

from .helpers import dense_cell, make_vector, problem, relative_error, tolerance


class Counting(eqx.Module):
    """Its iterates say after how many steps they come; ends at `x`."""

    def __call__(self, z, x):
        return jnp.minimum(z + 1, x)


def plain(cell=None, **kwargs):
    solver = optx.FixedPointIteration(1e-6, 1e-6)
    return inn.DeepEquilibriumNetwork(
        Counting() if cell is None else cell, solver, **kwargs
    )


@pytest.mark.parametrize("number", (1, 3, 4))
def test_evenly_spaced_whatever_the_length(number):
    @jax.jit
    @jax.vmap
    def run(x):
        states, sol = sample_states(plain(), x, number)
        return jnp.stack(states), sol.stats["num_steps"]

    lengths = jnp.array([0.0, 1.0, 2.0, 7.0, 23.0, 64.0, 100.0])[:, None]
    states, num_steps = run(lengths)
    assert states.shape == (len(lengths), number, 1)
    assert np.array_equal(states[:, -1], lengths)
    for row, steps in zip(states[:, :, 0], num_steps, strict=True):
        wanted = np.arange(1, number + 1) * steps / number
        # The grid is a power of two that divides the length at least `number` times.
        assert np.all(np.abs(row - wanted) <= steps / (2 * number) + 1)
        assert np.all(np.diff(row) >= 0)


def test_given_steps_also_past_the_end():
    states, sol = sample_states(plain(), jnp.array([5.0]), (2, 3, 40))
    assert [float(z[0]) for z in states] == [2, 3, 5, 5]
    assert "notes" not in sol.stats and sol.stats["num_steps"] == 6


@pytest.mark.parametrize(
    "solver",
    (
        inn.AndersonAcceleration(1e-4, 0.0),
        inn.Broyden(1e-4, 0.0),
        optx.Newton(1e-4, 1e-4),
        optx.LevenbergMarquardt(1e-4, 1e-4),
        inn.ReversibleFixedPoint(1e-4, 0.0),
    ),
    ids=lambda solver: type(solver).__name__,
)
def test_every_kind_of_solver(solver):
    cell, x = problem("pair")
    deq = inn.DeepEquilibriumNetwork(cell, solver)
    states, sol = sample_states(deq, x, 3)
    assert len(states) == 3
    alone = deq.solve(x)
    assert eqx.tree_equal(sol.stats, alone.stats)
    assert relative_error(states[-1], alone.z_star) < 1e-5
    distances = [relative_error(z, alone.z_star) for z in states]
    assert distances[0] >= distances[1] >= distances[2]


def test_gradients():
    """Implicit for the last state, phantom for those before."""
    cell, x = dense_cell(4, 0.7), make_vector(4)
    tol = tolerance(1e-6, 1e-12)
    solver = inn.AndersonAcceleration(tol, 0.0)
    deq = inn.DeepEquilibriumNetwork(
        cell, solver, adjoint=inn.ImplicitAdjoint(inn.GivensGMRES(tol, 0.0))
    )

    def with_hidden(hidden):
        return eqx.tree_at(lambda c: c.hidden, cell, hidden)

    @jax.jit
    def jacobians(hidden):
        def states(hidden):
            layer = eqx.tree_at(lambda d: d.cell, deq, with_hidden(hidden))
            states = jnp.stack(sample_states(layer, x, 3)[0])
            return (states, layer(x)), states

        return jax.jacrev(states, has_aux=True)(hidden)

    (jacobian, implicit), states = jacobians(cell.hidden)
    assert relative_error(jacobian[-1], implicit) < 1e-4
    one_step = jax.jit(jax.jacobian(lambda hidden, z: with_hidden(hidden)(z, x)))
    for z, actual in zip(states[:-1], jacobian[:-1], strict=True):
        assert relative_error(actual, one_step(cell.hidden, z)) < 1e-4


def test_of_an_unrolled_layer():
    deq = inn.set_fixed_depth(plain(), 4)
    x = jnp.array([10.0])
    states, sol = sample_states(deq, x, 2)
    assert [float(z[0]) for z in states] == [2, 4]
    assert sol.stats == {"num_steps": 4, "nfe": 4} and sol.z0 == 0
    assert [float(z[0]) for z in sample_states(deq, x, (1, 3, 9))[0]] == [1, 3, 4, 4]
    assert [float(z[0]) for z in sample_states(deq, x, 6)[0]] == [1, 1, 2, 3, 3, 4]


def test_correction_and_weights():
    states = [jnp.array(2.0), jnp.array(3.0), jnp.array(5.0)]
    for weights, expected in (
        (exponential_weights(0.5), 0.25 * 1 + 0.5 * 2 + 4),
        (linear_weights(), 1 / 3 + 2 * 2 / 3 + 4),
        (constant_weights(), 7),
        (constant_weights(0.1), 4.3),
    ):
        loss = fixed_point_correction(
            lambda z, target: z - target, states, jnp.array(1.0), weights=weights
        )
        assert np.allclose(loss, expected)
