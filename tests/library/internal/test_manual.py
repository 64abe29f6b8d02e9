"""`jax.shard_map` as it is by default, where every type says over what it varies."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import optimistix as optx
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import implicitnets as inn

from ..helpers import dense_cell, tolerance


TOLERANCES = tolerance(1e-5, 1e-9), 0.0

ANDERSON = inn.AndersonAcceleration(*TOLERANCES)
EXACT = inn.ImplicitAdjoint(inn.GivensGMRES(TOLERANCES[0], 0.0))

# Broyden's method and the reversible iteration come with their adjoints.
SOLVERS = {
    "anderson": ANDERSON,
    "newton_krylov": inn.NewtonKrylov(*TOLERANCES),
    "steady_state": inn.SteadyState(inn.VCABM3(), *TOLERANCES),
    "fixed_point": optx.FixedPointIteration(*TOLERANCES),
}
ADJOINTS = {
    "lu": (ANDERSON, inn.ImplicitAdjoint(lx.LU())),
    "fixed_point": (
        ANDERSON,
        inn.ImplicitAdjoint(inn.FixedPointLinearSolver(ANDERSON)),
    ),
    "fallback": (
        ANDERSON,
        inn.ImplicitAdjoint(inn.NeumannSeries(2), fallback=inn.NeumannSeries(3)),
    ),
    "phantom": (ANDERSON, inn.PhantomAdjoint(3)),
    "jacobian_free": (ANDERSON, inn.JacobianFreeAdjoint()),
    "neumann": (ANDERSON, inn.NeumannAdjoint(3)),
    "shine": (inn.Broyden(*TOLERANCES), inn.ShineAdjoint(1)),
    "reversible": (
        inn.ReversibleFixedPoint(*TOLERANCES, damping=0.7),
        inn.ReversibleAdjoint(),
    ),
}
FORWARD_MODE = {
    "newton_krylov": (SOLVERS["newton_krylov"], EXACT),
    **{name: ADJOINTS[name] for name in ("phantom", "jacobian_free", "shine")},
}
# The loops of Equinox start from constants, and the operators of Lineax are traced at
# structures without the axes (Equinox 0.13.8, `internal/_loop`; Lineax 0.1.1,
# `_operator.py`): with these there is `jax.shard_map(..., check_vma=False)`.
UPSTREAM = {
    "newton": (optx.Newton(*TOLERANCES), EXACT),
    "levenberg_marquardt": (optx.LevenbergMarquardt(*TOLERANCES), EXACT),
    "implicit_ode": (inn.SteadyState(dfx.Kvaerno3(), *TOLERANCES), EXACT),
    "optimistix_adjoint": (ANDERSON, optx.ImplicitAdjoint()),
    "lineax_gmres": (ANDERSON, inn.ImplicitAdjoint(lx.GMRES(*TOLERANCES))),
}


def on_devices(fn, *, replicated=(), **kwargs):
    specs = (*(P() for _ in replicated), P("devices"))
    # Devices whose examples take different numbers of steps must not wait for each
    # other within a loop: `tests/conftest.py` makes two.
    mesh = jax.make_mesh((2,), ("devices",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(fn, mesh=mesh, in_specs=specs, **kwargs)
    return jax.jit(lambda xs: sharded(*replicated, xs))


def gradients_agree(solver, adjoint, **kwargs):
    deq = inn.DeepEquilibriumNetwork(dense_cell(), solver, adjoint=adjoint)
    # The second device's examples are harder.
    xs = jr.normal(jr.key(0), (4, 4)) * jnp.array([0.0, 1.0, 3.0, 4.0])[:, None]
    params, static = eqx.partition(deq, eqx.is_inexact_array)

    def loss(params, xs):
        return jnp.sum(jax.vmap(eqx.combine(params, static))(xs) ** 2)

    def mean_gradient(params, xs):
        return jax.grad(lambda p: jax.lax.psum(loss(p, xs), "devices"))(params)

    found = on_devices(mean_gradient, replicated=(params,), out_specs=P(), **kwargs)(xs)
    expected = jax.jit(jax.grad(loss))(params, xs)
    return eqx.tree_equal(found, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.one_precision
@pytest.mark.parametrize("name", SOLVERS)
def test_solvers(name):
    assert gradients_agree(SOLVERS[name], EXACT)


@pytest.mark.one_precision
@pytest.mark.parametrize("name", ADJOINTS)
def test_adjoints(name):
    assert gradients_agree(*ADJOINTS[name])


@pytest.mark.one_precision
@pytest.mark.parametrize("name", UPSTREAM)
@pytest.mark.xfail(raises=(TypeError, ValueError))
def test_parts_of_other_libraries(name):
    assert gradients_agree(*UPSTREAM[name])


@pytest.mark.one_precision
@pytest.mark.parametrize("linear_solver", (inn.GivensGMRES(1e-5, 0.0), lx.QR()))
def test_state_of_several_leaves(linear_solver):
    def cell(z, x):
        return {"a": jnp.tanh(0.5 * z["b"] + x), "b": jnp.sin(0.4 * z["a"]) + x[::-1]}

    deq = inn.DeepEquilibriumNetwork(
        cell,
        ANDERSON,
        zero_state=lambda x: {"a": 0 * x, "b": 0 * x},
        adjoint=inn.ImplicitAdjoint(linear_solver),
    )

    def gradient(xs):
        return jax.grad(lambda xs: jnp.sum(jax.vmap(deq)(xs)["b"] ** 2))(xs)

    xs = jr.normal(jr.key(0), (2, 3))
    found = on_devices(gradient, out_specs=P("devices"))(xs)
    assert eqx.tree_equal(found, jax.jit(gradient)(xs), rtol=1e-3, atol=1e-6)


@pytest.mark.one_precision
@pytest.mark.parametrize(
    "solver",
    (
        # It solves a linear system in every step.
        inn.PeacemanRachford(*TOLERANCES, step_size=0.5),
        inn.ForwardBackward(*TOLERANCES),
    ),
    ids=lambda solver: type(solver).__name__,
)
def test_monotone_convolution(solver):
    cell = inn.nn.MonotoneConvCell(1, 2, 2, 3, periodic=False, key=jr.key(0))
    deq = inn.DeepEquilibriumNetwork(cell, solver, adjoint=EXACT)

    def gradient(xs):
        return jax.grad(lambda xs: jnp.sum(jax.vmap(deq)(xs) ** 2))(xs)

    xs = jr.normal(jr.key(0), (2, 2, 5))
    found = on_devices(gradient, out_specs=P("devices"))(xs)
    assert eqx.tree_equal(found, jax.jit(gradient)(xs), rtol=1e-3, atol=1e-6)


@pytest.mark.one_precision
@pytest.mark.parametrize("name", FORWARD_MODE)
def test_forward_mode(name):
    solver, adjoint = FORWARD_MODE[name]
    deq = inn.DeepEquilibriumNetwork(dense_cell(), solver, adjoint=adjoint)

    def tangent(xs):
        return jax.jvp(jax.vmap(deq), (xs,), (jnp.cos(xs),))[1]

    xs = jr.normal(jr.key(0), (4, 4))
    found = on_devices(tangent, out_specs=P("devices"))(xs)
    assert eqx.tree_equal(found, jax.jit(tangent)(xs), rtol=1e-4, atol=1e-6)


@pytest.mark.one_precision
@pytest.mark.parametrize("permutes", (False, True))
def test_a_cell_may_communicate_between_devices(permutes):
    """Every device has a part of one state."""

    def cell(z, x):
        if permutes:
            others = jax.lax.ppermute(z, "devices", [(0, 1), (1, 0)])
        else:
            others = jax.lax.psum(z, "devices") - z
        return jnp.tanh(0.2 * z + 0.3 * others + x)

    def whole_cell(z, x):
        return jnp.tanh(0.2 * z + 0.3 * z[::-1] + x)

    # So many steps that the devices, each of which stops on its own, agree.
    solver = optx.FixedPointIteration(0.0, 0.0)
    xs = jr.normal(jr.key(0), (2, 4))

    def solve(cell, xs):
        return inn.DeepEquilibriumNetwork(cell, solver, max_steps=50)(xs)

    found = on_devices(lambda xs: solve(cell, xs), out_specs=P("devices"))(xs)
    expected = jax.jit(lambda xs: solve(whole_cell, xs))(xs)
    assert eqx.tree_equal(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.one_precision
def test_diagnosis_and_penalties():
    cell = dense_cell()

    def measure(xs):
        def one(x):
            norm = inn.operator_norm(cell, x, x, key=jr.key(0))
            radius = inn.spectral_radius(cell, x, x, key=jr.key(0))
            return norm, radius, inn.jacobian_penalty(cell, x, x, key=jr.key(0))

        return jax.vmap(one)(xs)

    xs = jr.normal(jr.key(0), (2, 4))
    found = on_devices(measure, out_specs=P("devices"))(xs)
    assert eqx.tree_equal(found, jax.jit(measure)(xs), rtol=1e-4, atol=1e-6)
