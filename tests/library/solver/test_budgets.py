"""With few evaluations no solver is further from the root than the plain iteration."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import implicitnets as inn

from ..helpers import make_matrix, solve, tolerance


SIZE = 64
SOLVERS = {
    "anderson": inn.AndersonAcceleration(0.0, 0.0),
    "broyden": inn.Broyden(0.0, 0.0),
    "newton-krylov": inn.NewtonKrylov(0.0, 0.0),
}
BUDGETS = (2, 4, 6, 8, 12)


def tanh_map(z, args):
    matrix, vector = args
    return jnp.tanh(matrix @ z + vector)


@eqx.filter_jit
def errors(solver, matrix, vectors):
    """Of the solver and of the plain iteration, at every budget."""

    def of_example(vector):
        args = matrix, vector
        z0 = jnp.zeros_like(vector)
        root = solve(tanh_map, optx.Newton(1e-7, 1e-7), z0, args).value

        def after(budget):
            found = solve(tanh_map, solver, z0, args, max_steps=budget)
            plain = jax.lax.fori_loop(0, budget, lambda _, z: tanh_map(z, args), z0)
            return [jnp.linalg.norm(z - root) for z in (found.value, plain)]

        return jax.lax.map(after, jnp.array(BUDGETS))

    return [jnp.mean(error, axis=0) for error in jax.vmap(of_example)(vectors)]


@pytest.mark.parametrize("name", SOLVERS)
def test_never_further_than_plain_iteration(name):
    vectors = jnp.asarray(0.1 * np.random.default_rng(0).normal(size=(8, SIZE)))
    for radius in (0.5, 0.9, 0.99):
        found, plain = errors(SOLVERS[name], make_matrix(SIZE, radius), vectors)
        assert jnp.all(found < 1.02 * plain), (radius, found / plain)


@pytest.mark.parametrize("name", SOLVERS)
def test_symmetric_maps_are_accelerated_before_long(name):
    vectors = jnp.asarray(0.1 * np.random.default_rng(0).normal(size=(8, SIZE)))
    matrix = make_matrix(SIZE, 0.95, symmetric=True)
    found, plain = errors(SOLVERS[name], matrix, vectors)
    assert jnp.all(found < 1.02 * plain), found / plain
    assert found[-1] < 0.7 * plain[-1]


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_the_answer_is_judged_where_it_is(solver):
    """The last step may find what no step has evaluated."""
    layer = inn.DeepEquilibriumNetwork(
        lambda z, x: 0.5 * x + 0 * z,
        eqx.tree_at(lambda s: s.rtol, solver, tolerance(1e-5, 1e-9)),
        max_steps=1,
    )
    solution = layer.solve(jnp.ones(3))
    assert solution.z_star == pytest.approx(0.5)
    assert solution.result == optx.RESULTS.successful
