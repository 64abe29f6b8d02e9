import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from implicitnets import operator_norm, spectral_radius

from .helpers import make_matrix, problem, tolerance


def linear(z, matrix):
    return matrix @ z


ANGLE = 0.7
MATRICES = {
    "rotation": 0.9
    * np.array([[np.cos(ANGLE), -np.sin(ANGLE)], [np.sin(ANGLE), np.cos(ANGLE)]]),
    "identity": 0.5 * np.eye(4),
    "zero": np.zeros((3, 3)),
    "nilpotent": np.diag(np.ones(4), 1),
    "negative": np.diag([-2.0, 1.0, 0.5]),
    "scalar": np.array([[0.3]]),
    "nonsymmetric": np.asarray(make_matrix(12, 0.9)),
    "far from normal": np.array([[0.5, 10.0], [0.0, 0.4]]),
    "tiny": 1e-6 * np.asarray(make_matrix(6, 1.0)),
}


@pytest.mark.parametrize("name", MATRICES)
def test_against_the_eigenvalues(name):
    matrix = MATRICES[name]
    size = len(matrix)
    arguments = linear, jnp.zeros(size), jnp.asarray(matrix, jnp.result_type(float))
    radius = spectral_radius(*arguments, key=jr.key(0))
    norm = operator_norm(*arguments, key=jr.key(0))
    exact = np.max(np.abs(np.linalg.eigvals(matrix)))
    # Of a nilpotent matrix, rounding of eps gives eigenvalues of its size-th root.
    atol = 0.2 if name == "nilpotent" else 1e-20
    assert np.allclose(radius, exact, rtol=tolerance(2e-3, 1e-5), atol=atol)
    assert np.allclose(norm, np.linalg.norm(matrix, 2), rtol=tolerance(1e-4, 1e-6))
    assert radius <= norm * (1 + 1e-4)


def test_of_a_large_matrix():
    """More dimensions than steps."""
    matrix = make_matrix(100, 0.9, symmetric=True)
    radius = spectral_radius(linear, jnp.zeros(100), matrix, key=jr.key(1))
    assert 0.88 < radius < 0.9001
    # A rotation by 0.9 among smaller eigenvalues, in a basis of no meaning.
    matrix = np.zeros((100, 100))
    matrix[:2, :2] = MATRICES["rotation"]
    matrix[2:, 2:] = make_matrix(98, 0.7, seed=2)
    matrix[:2, 2:] = 0.1 * np.asarray(make_matrix(98, 1.0, seed=3))[:2]
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(100, 100)))[0]
    matrix = jnp.asarray(basis @ matrix @ basis.T, jnp.result_type(float))
    radius = spectral_radius(linear, jnp.zeros(100), matrix, key=jr.key(1))
    assert np.allclose(radius, 0.9, rtol=0.01)


@pytest.mark.parametrize("dtype", (None, jnp.bfloat16))
def test_states_of_several_leaves_and_narrow_dtypes(dtype):
    cell, x = problem("pair")
    z = jax.tree.map(jnp.zeros_like, x)
    flat, unravel = ravel_pytree(z)
    dense = jax.jacobian(lambda v: ravel_pytree(cell(unravel(v), x))[0])(flat)
    exact = np.max(np.abs(np.linalg.eigvals(np.asarray(dense))))
    if dtype is not None:
        cell, z, x = jax.tree.map(lambda leaf: leaf.astype(dtype), (cell, z, x))
    radius = spectral_radius(cell, z, x, key=jr.key(0))
    assert radius.dtype == (jnp.result_type(float) if dtype is None else jnp.float32)
    assert np.allclose(radius, exact, rtol=1e-3 if dtype is None else 0.1)


def test_jit_vmap_and_no_gradient():
    cell, x = problem("dense")

    @jax.jit
    @jax.vmap
    def radii(x, key):
        return spectral_radius(cell, x, x, key=key, num_steps=3)

    xs = jnp.stack([x, 0 * x])
    together = radii(xs, jr.split(jr.key(0)))
    alone = spectral_radius(cell, x, x, key=jr.split(jr.key(0))[0], num_steps=3)
    assert np.allclose(together[0], alone, rtol=1e-4)
    gradient = jax.grad(lambda z: spectral_radius(cell, z, x, key=jr.key(0)))(x)
    assert np.all(np.asarray(gradient) == 0)


@pytest.mark.parametrize("function", (spectral_radius, operator_norm))
@pytest.mark.parametrize("value", (jnp.nan, jnp.inf))
def test_what_is_not_finite_is_not_stable(function, value):
    matrix = jnp.eye(3).at[1, 2].set(value)
    assert jnp.isnan(function(linear, jnp.ones(3), matrix, key=jr.key(0)))
