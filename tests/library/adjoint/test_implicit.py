import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

import implicitnets as inn

from ..helpers import (
    dense_cell,
    dense_gradient,
    is_double,
    loss_weights,
    make_vector,
    problem,
    relative_error,
    tolerance,
    weighted_sum,
)


SOLVER = inn.AndersonAcceleration(tolerance(1e-7, 1e-13), 0.0, history_size=10)
# For what does not depend on the solver: the one that compiles fastest.
PLAIN = optx.FixedPointIteration(tolerance(1e-6, 1e-12), tolerance(1e-6, 1e-12))

LINEAR_SOLVERS = {
    "givens_gmres": inn.GivensGMRES(rtol=tolerance(1e-6, 1e-12), atol=0.0),
    "gmres": lx.GMRES(rtol=tolerance(1e-5, 1e-12), atol=tolerance(1e-5, 1e-12)),
    "lu": lx.LU(),
    "normal_cg": lx.Normal(lx.CG(rtol=tolerance(1e-6, 1e-12), atol=0.0)),
    "auto": lx.AutoLinearSolver(well_posed=None),
}


def loss_and_grad(cell, x, weights, scale, linear_solver):
    # Arrays, so that the tests share their compilations.
    linear_solver = jtu.tree_map(
        lambda x: jnp.array(x) if isinstance(x, float) else x, linear_solver
    )
    return _loss_and_grad(cell, x, weights, jnp.array(scale), linear_solver)


@eqx.filter_jit
def _loss_and_grad(cell, x, weights, scale, linear_solver):
    adjoint = inn.ImplicitAdjoint(linear_solver)

    def loss(params):
        cell, x = params
        z0 = jtu.tree_map(jnp.zeros_like, x)
        sol = optx.fixed_point(
            cell, SOLVER, z0, x, adjoint=adjoint, throw=False, max_steps=400
        )
        return scale * weighted_sum(sol.value, weights), sol.value

    (_, z_star), grads = eqx.filter_value_and_grad(loss, has_aux=True)((cell, x))
    return z_star, grads


@pytest.mark.parametrize("spectral_radius", (0.5, 0.9, 0.99))
def test_against_a_dense_solve_at_every_scale(spectral_radius):
    x = 0.1 * make_vector(30)
    cell, weights = dense_cell(30, spectral_radius), make_vector(30, seed=3)
    for scale in (1.0, 1e-4, 1e-8):
        z_star, grads = loss_and_grad(
            cell, x, weights, scale, LINEAR_SOLVERS["givens_gmres"]
        )
        grads = jtu.tree_map(lambda g: g / scale, grads)
        reference = dense_gradient(cell, z_star, x, weights)
        assert relative_error(grads, reference) < tolerance(2e-5, 1e-8)


@pytest.mark.parametrize("scale", (1e-35, 1e-30, 1e30))
def test_extreme_scales_neither_underflow_nor_overflow(scale):
    cell, x = problem("dense")
    weights = loss_weights(x)
    _, reference = loss_and_grad(cell, x, weights, 1.0, lx.LU())
    solver = inn.GivensGMRES(rtol=1e-5, atol=1e-5)
    _, grads = loss_and_grad(cell, x, weights, scale, solver)
    assert relative_error(jtu.tree_map(lambda g: g / scale, grads), reference) < 1e-4


def test_zero_cotangent():
    cell, x = problem("dense")
    solver = LINEAR_SOLVERS["givens_gmres"]
    _, grads = loss_and_grad(cell, x, loss_weights(x), 0.0, solver)
    assert all(jnp.all(g == 0) for g in jtu.tree_leaves(grads))


@pytest.mark.parametrize("name", LINEAR_SOLVERS)
@pytest.mark.parametrize("cell_name", ("dense", "pair"))
def test_every_linear_solver(name, cell_name):
    cell, x = problem(cell_name)
    weights = loss_weights(x)
    z_star, grads = loss_and_grad(cell, x, weights, 1.0, LINEAR_SOLVERS[name])
    reference = dense_gradient(cell, z_star, x, weights)
    assert relative_error(grads, reference) < tolerance(1e-4, 1e-8)


def equilibrium(scale, x):
    """A closure over a differentiated value, and one by argument."""
    cell = dense_cell(4, 0.7)

    def fn(z, x):
        return scale * cell(z, x)

    adjoint = inn.ImplicitAdjoint(LINEAR_SOLVERS["givens_gmres"])
    sol = optx.fixed_point(fn, PLAIN, jnp.zeros(4), x, adjoint=adjoint, throw=False)
    return sol.value


def test_unrolling_agrees():
    def unrolled(scale, x):
        cell = dense_cell(4, 0.7)
        z, _ = jax.lax.scan(
            lambda z, _: (scale * cell(z, x), None), jnp.zeros(4), None, length=150
        )
        return z

    args = jnp.array(0.8), make_vector(4)
    explicit = jax.jit(jax.jacrev(unrolled, argnums=(0, 1)))(*args)
    for jacobian in (jax.jacrev, jax.jacfwd):
        implicit = jax.jit(jacobian(equilibrium, argnums=(0, 1)))(*args)
        assert relative_error(implicit, explicit) < tolerance(1e-4, 1e-9)


def test_a_part_of_the_state_that_the_input_does_not_enter():
    def cell(z, x):
        return {"a": 0.5 * jnp.tanh(z["a"]) + x, "b": jnp.sin(z["a"]) - 0.5 * z["b"]}

    x = 0.5 * make_vector(3)
    z0 = {"a": x, "b": x}
    deq = inn.DeepEquilibriumNetwork(cell, PLAIN)

    @jax.jit
    @ft.partial(jax.grad, has_aux=True)
    def gradient_and_state(x):
        z = deq(x, z0=z0)
        return jnp.sum(z["b"]), z

    gradient, state = gradient_and_state(x)
    a = state["a"]
    expected = jnp.cos(a) / 1.5 / (1 - 0.5 * (1 - jnp.tanh(a) ** 2))
    assert relative_error(gradient, expected) < 1e-4


def test_second_order_in_every_nesting():
    def loss(params):
        scale, x = params
        return jnp.sum(jnp.sin(equilibrium(scale, x)))

    params, t_params = (jnp.array(0.8), make_vector(4)), (jnp.array(0.3), jnp.ones(4))
    grad = jax.jit(jax.grad(loss))
    step = tolerance(3e-3, 1e-5)
    shifted = [
        grad(jtu.tree_map(lambda p, t: p + sign * step * t, params, t_params))
        for sign in (1, -1)
    ]
    difference = jtu.tree_map(lambda a, b: (a - b) / (2 * step), *shifted)

    def dot(tree):
        pairs = zip(jtu.tree_leaves(tree), jtu.tree_leaves(t_params), strict=True)
        return sum(jnp.sum(a * b) for a, b in pairs)

    products = {
        "forward over reverse": lambda p: jax.jvp(jax.grad(loss), (p,), (t_params,))[1],
        "reverse over reverse": jax.grad(lambda p: dot(jax.grad(loss)(p))),
        "reverse over forward": jax.grad(lambda p: jax.jvp(loss, (p,), (t_params,))[1]),
    }
    for product in products.values():
        value = jax.jit(product)(params)
        assert relative_error(value, difference) < tolerance(5e-3, 1e-7)


def test_grad_of_vmap_is_vmap_of_grad():
    xs = jnp.stack([make_vector(4), 0.1 * make_vector(4, seed=2), jnp.zeros(4)])
    scale = jnp.array(0.8)

    def loss(scale, x):
        return jnp.sum(equilibrium(scale, x) ** 2)

    batch = jax.vmap(loss, in_axes=(None, 0))
    together = jax.jit(jax.grad(lambda s, xs: jnp.sum(batch(s, xs)), argnums=(0, 1)))
    apart = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1)), in_axes=(None, 0)))
    g_scale, g_xs = together(scale, xs)
    g_scales, g_xs2 = apart(scale, xs)
    assert relative_error(g_scale, jnp.sum(g_scales)) < 1e-4
    assert relative_error(g_xs, g_xs2) < 1e-4


def test_no_host_callback_and_no_error():
    """A linear solve that stops early gives what it has."""
    adjoint = inn.ImplicitAdjoint(lx.GMRES(1e-6, 1e-6, max_steps=1))
    cell, x = problem("dense")
    deq = inn.DeepEquilibriumNetwork(cell, PLAIN, adjoint=adjoint)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(deq(x)))).lower(x)
    assert "callback" not in gradient.as_text()
    assert jnp.all(jnp.isfinite(gradient.compile()(x)))


@pytest.mark.parametrize("adjoint", (inn.ImplicitAdjoint(), optx.ImplicitAdjoint()))
def test_targets_of_deq_jax(adjoint):
    """The exact values of https://github.com/akbir/deq-jax's tests.

    But for the gradient of the start, which is zero.
    """
    newton = optx.Newton(1e-6, 1e-6)

    def affine(z, p):
        return p["w"] * z + p["b"]

    p = {"w": jnp.array(-2.0), "b": jnp.array(1.0)}
    sol = optx.fixed_point(affine, newton, jnp.zeros((1, 2, 3)), p, adjoint=adjoint)
    assert np.allclose(jnp.sum(sol.value), 2.0, atol=1e-5)

    def total(p, z0):
        def linear(z, p):
            return z @ p["weight"] + p["bias"][None, None, :]

        return jnp.sum(
            optx.fixed_point(linear, newton, z0, p, adjoint=adjoint, throw=False).value
        )

    p = {"weight": jnp.ones((3, 3)), "bias": jnp.ones(3)}
    z0 = jnp.zeros((1, 2, 3))
    value, (g_p, g_z0) = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(p, z0)
    assert np.allclose(value, -3.0, atol=1e-4)
    assert np.allclose(g_p["weight"], 0.5, atol=1e-4)
    assert np.all(g_z0 == 0)


class ResNetLayer(eqx.Module):
    """The cell of the Deep Implicit Layers tutorial, chapter 4."""

    conv1: eqx.nn.Conv2d
    conv2: eqx.nn.Conv2d
    norms: list[eqx.nn.GroupNorm]

    def __init__(self, channels, inner, groups, *, key):
        key1, key2 = jax.random.split(key)

        def conv(c_in, c_out, key):
            layer = eqx.nn.Conv2d(c_in, c_out, 3, padding=1, use_bias=False, key=key)
            weight = 0.01 * jax.random.normal(key, layer.weight.shape)
            return eqx.tree_at(lambda layer: layer.weight, layer, weight)

        self.conv1, self.conv2 = (
            conv(channels, inner, key1),
            conv(inner, channels, key2),
        )
        self.norms = [eqx.nn.GroupNorm(groups, c) for c in (inner, channels, channels)]

    def __call__(self, z, x):
        norm1, norm2, norm3 = self.norms
        y = norm1(jax.nn.relu(self.conv1(z)))
        return norm3(jax.nn.relu(z + norm2(x + self.conv2(y))))


@pytest.mark.skipif(not is_double(), reason="finite differences need float64")
@pytest.mark.parametrize("name", ("tanh_newton", "resnet_anderson"))
def test_gradchecks_of_the_deep_implicit_layers_tutorial(name):
    rng = np.random.default_rng(0)
    if name == "tanh_newton":
        weight = jnp.asarray(rng.normal(size=(5, 5)) * 0.3)

        def cell(z, x):
            return jnp.tanh(weight @ z + x)

        solver, init = optx.Newton(1e-10, 1e-10), jnp.tanh
        x = jnp.asarray(rng.normal(size=(3, 5)))
    else:
        cell = ResNetLayer(2, 2, 2, key=jax.random.key(0))
        solver, init = inn.AndersonAcceleration(1e-10, 0.0), None
        x = jnp.asarray(rng.normal(size=(1, 2, 3, 3)))
    adjoint = inn.ImplicitAdjoint(inn.GivensGMRES(1e-10, 0.0))
    deq = inn.DeepEquilibriumNetwork(
        cell, solver, init=init, adjoint=adjoint, max_steps=500
    )
    layer = jax.jit(jax.vmap(deq))
    jacobian = jax.jit(jax.jacrev(jax.vmap(deq)))(x).reshape(x.size, x.size)
    eps = 1e-5
    numerical = np.zeros((x.size, x.size))
    for i in range(x.size):
        shift = eps * jnp.eye(x.size)[i].reshape(x.shape)
        difference = (layer(x + shift) - layer(x - shift)) / (2 * eps)
        numerical[:, i] = np.asarray(difference).ravel()
    assert np.allclose(jacobian, numerical, atol=1e-6)


@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float32))
def test_narrow_states(dtype):
    wide = problem("dense")
    cell, x = jtu.tree_map(lambda a: a.astype(dtype), wide)
    solver = inn.AndersonAcceleration(20 * float(jnp.finfo(dtype).eps), 0.0)
    deq = inn.DeepEquilibriumNetwork(cell, solver)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(deq(x))))(x)
    linear_solver = LINEAR_SOLVERS["givens_gmres"]
    _, (_, reference) = loss_and_grad(*wide, jnp.ones(4), 1.0, linear_solver)
    assert gradient.dtype == dtype
    tol = 0.2 if dtype == jnp.bfloat16 else 1e-3
    assert relative_error(gradient, reference) < tol
