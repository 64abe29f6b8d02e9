"""Solvers one after the other: which stage solves what, and what it may take."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import implicitnets as inn

from ..helpers import make_matrix, make_vector, relative_error, tolerance


TOL = tolerance(1e-5, 1e-8)
SIZE = 8
ANDERSON, NEWTON = inn.AndersonAcceleration(TOL, TOL), inn.NewtonKrylov(TOL, TOL)
AUTO = inn.AutoSolver(TOL, TOL)
# At the first the map contracts; at the last Anderson acceleration does not converge.
GAINS = jnp.array([0.5, 0.9, 4.0])


def scaled_tanh(z, args):
    gain, x = args
    return jnp.tanh(gain * (make_matrix(SIZE, 1.0) @ z) + x)


def make_layer(solver, cell=scaled_tanh, **kwargs):
    return inn.DeepEquilibriumNetwork(
        cell, solver, zero_state=lambda args: jnp.zeros_like(args[1]), **kwargs
    )


def make_inputs():
    return GAINS, jnp.stack([0.1 * make_vector(SIZE, seed) for seed in range(3)])


def an_input(number):
    return jax.tree.map(lambda leaf: leaf[number], make_inputs())


@eqx.filter_jit
def solve(layer, x):
    return layer.solve(x)


@eqx.filter_jit
def solve_all(layer, xs):
    return jax.vmap(layer.solve)(xs)


def succeeded(sol):
    return np.asarray(sol.result == optx.RESULTS.successful)


@pytest.mark.parametrize(
    "chain",
    (inn.SolverChain((ANDERSON, NEWTON), limits=(40, None)), AUTO),
    ids=("chain", "auto"),
)
def test_every_example_gets_as_far_as_it_needs(chain):
    layer = make_layer(chain)
    sols = solve_all(layer, make_inputs())
    first = solve_all(make_layer(ANDERSON, max_steps=40), make_inputs())
    assert succeeded(sols).all()
    assert list(succeeded(first)) == [True, True, False]
    assert list(np.asarray(sols.stats["stage"]) > 0) == [False, False, True]
    for name in ("num_steps", "nfe"):
        assert np.array_equal(sols.stats[name][:2], first.stats[name][:2])
    assert relative_error(sols.z_star[:2], first.z_star[:2]) < TOL
    # Its neighbours change nothing. (Of the last one rounding decides the path.)
    for number in range(len(GAINS)):
        sol = solve(layer, an_input(number))
        assert succeeded(sol)
        assert (sol.stats["stage"] > 0) == (number == 2)
        if number < 2:
            assert relative_error(sol.z_star, sols.z_star[number]) < 10 * TOL


def test_counts_are_those_of_all_stages():
    evaluations = []

    def counting(z, args):
        jax.debug.callback(lambda: evaluations.append(1))
        return scaled_tanh(z, args)

    chain = inn.SolverChain((ANDERSON, inn.Broyden(TOL, TOL)), limits=(5, None))
    for gain in (0.01, 0.9):
        evaluations.clear()
        sol = make_layer(chain, counting).solve((gain, an_input(0)[1]))
        jax.effects_barrier()
        assert sol.stats["stage"] == int(gain > 0.1)
        # The last one is the layer's own, of the residual.
        assert len(evaluations) == sol.stats["nfe"] + 1
        assert "num_matvecs" not in sol.stats
    stats = make_layer(inn.SolverChain((ANDERSON, NEWTON))).solve(an_input(0)).stats
    assert stats["num_matvecs"] == 0
    newton = optx.Newton(TOL, TOL)
    stats = make_layer(inn.SolverChain((ANDERSON, newton))).solve(an_input(0)).stats
    assert "nfe" not in stats


def test_limits():
    never = inn.AndersonAcceleration(0.0, 0.0)
    chain = inn.SolverChain((never, never, never), limits=(3, 4, None))
    for max_steps, stage in ((2, 0), (3, 0), (5, 1), (7, 1), (10, 2)):
        sol = solve(make_layer(chain, max_steps=max_steps), an_input(1))
        assert sol.result == optx.RESULTS.nonlinear_max_steps_reached
        assert (sol.stats["num_steps"], sol.stats["stage"]) == (max_steps, stage)


def test_a_stage_does_not_begin_where_there_is_nothing():
    def cell(z, args):
        # Where the state is large the square overflows, and its cosine is NaN.
        return jnp.cos(jnp.square(z) * jnp.where(jnp.abs(z) > 2, jnp.inf, 1)) + args[1]

    x = jnp.full(2, 1.5)
    chain = inn.SolverChain((optx.FixedPointIteration(TOL, TOL), NEWTON))
    first = make_layer(chain.solvers[0], cell).solve((0.0, x))
    assert not np.isfinite(first.z_star).any()
    sol = make_layer(chain, cell).solve((0.0, x))
    assert sol.result == optx.RESULTS.successful and sol.stats["stage"] == 1


@pytest.mark.parametrize("chain", (inn.SolverChain((ANDERSON, NEWTON)), AUTO))
def test_in_plain_solves(chain):
    x = an_input(1)

    def residual(z, args):
        return scaled_tanh(z, args) - z

    start = jnp.zeros(SIZE)
    root = optx.root_find(residual, chain, start, x, throw=False)
    fixed_point = optx.fixed_point(scaled_tanh, chain, start, x, throw=False)
    for sol in (root, fixed_point):
        assert sol.result == optx.RESULTS.successful
        assert jnp.linalg.norm(residual(sol.value, x)) < 10 * TOL
    short = inn.SolverChain(chain.stages[0][:1], max_steps=2)
    sol = optx.root_find(residual, short, start, x, throw=False)
    assert sol.result == optx.RESULTS.nonlinear_max_steps_reached
    assert sol.stats["num_steps"] == 2


@pytest.mark.parametrize("number", (1, 2))
def test_gradients(number):
    gain, x = an_input(number)

    @eqx.filter_jit
    def value_and_gradient(solver, gain):
        return jax.value_and_grad(lambda g: jnp.sum(make_layer(solver)((g, x))))(gain)

    value, gradient = value_and_gradient(AUTO, gain)
    z = solve(make_layer(AUTO), (gain, x)).z_star
    assert np.isclose(value, jnp.sum(z), rtol=10 * TOL)
    jacobian = jax.jacobian(scaled_tanh)(z, (gain, x))
    along = jax.jacobian(lambda g: scaled_tanh(z, (g, x)))(gain)
    expected = jnp.sum(jnp.linalg.solve(jnp.eye(SIZE) - jacobian, along))
    assert np.isclose(gradient, expected, rtol=1e-3)


def test_cannot_be_unrolled():
    layer = make_layer(AUTO, adjoint=optx.RecursiveCheckpointAdjoint())
    with pytest.raises(TypeError, match="cannot be differentiated by unrolling"):
        jax.grad(lambda gain: jnp.sum(layer((gain, an_input(0)[1]))))(0.5)
