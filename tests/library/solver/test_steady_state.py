import functools as ft
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
import pytest
from jax.flatten_util import ravel_pytree

import implicitnets as inn
from implicitnets import PseudoTransient, VCABM3

from ..helpers import (
    dense_cell,
    dense_gradient,
    linear_map,
    loss_weights,
    make_matrix,
    make_vector,
    pair_cell,
    problem,
    relative_error,
    solve as solve_within,
    tolerance,
    two_norm,
    weighted_sum,
)


solve = ft.partial(solve_within, max_steps=256)

EXPLICIT = (
    dfx.Euler(),
    dfx.Heun(),
    dfx.Bosh3(),
    dfx.Tsit5(),
    dfx.Dopri5(),
    dfx.Dopri8(),
    VCABM3(),
)
IMPLICIT = (dfx.ImplicitEuler(), dfx.Kvaerno3(), dfx.Kvaerno4(), dfx.Kvaerno5())


def name_of(value):
    return type(value).__name__


def dense_problem():
    cell, x = problem("dense")
    return cell, x, jnp.zeros_like(x)


@pytest.mark.parametrize("ode_solver", EXPLICIT + IMPLICIT, ids=name_of)
def test_every_solver_reaches_the_steady_state(ode_solver):
    cell, x, z0 = dense_problem()
    xs = jnp.stack([x, 0.1 * x])
    solver = inn.SteadyState(ode_solver, rtol=1e-4, atol=0.0)

    def outcome(x):
        sol = solve(cell, solver, z0, x)
        return sol.value, cell(sol.value, x), sol.result, sol.stats

    z, f, result, stats = eqx.filter_jit(eqx.filter_vmap(outcome))(xs)
    assert np.all(result == optx.RESULTS.successful)
    residual = np.linalg.norm(f - z, axis=-1) / np.linalg.norm(f, axis=-1)
    assert np.all(residual <= 1e-4 * (1 + 1e-3))
    assert np.all(
        stats["num_steps"] == stats["num_accepted_steps"] + stats["num_rejected_steps"]
    )
    assert ("nfe" in stats) == (ode_solver in EXPLICIT)
    assert np.all(stats["num_steps"] <= (20 if ode_solver in IMPLICIT else 130))


def test_few_evaluations():
    weight = make_matrix(64, 0.9)
    xs = 0.1 * jnp.stack([make_vector(64, seed) for seed in range(8)])
    solver = inn.SteadyState(dfx.Tsit5(), rtol=1e-4, atol=0.0)

    def outcome(x):
        sol = solve(lambda z, x: jnp.tanh(weight @ z + x), solver, jnp.zeros(64), x)
        return sol.result, sol.stats["nfe"]

    result, nfe = eqx.filter_jit(eqx.filter_vmap(outcome))(xs)
    assert np.all(result == optx.RESULTS.successful)
    assert np.max(nfe) <= 150


@pytest.mark.parametrize(
    "ode_solver", (dfx.Euler(), dfx.Heun(), dfx.Tsit5(), VCABM3()), ids=name_of
)
def test_evaluations_are_counted_right(ode_solver):
    cell, x, z0 = dense_problem()
    count = 0

    def increment():
        nonlocal count
        count += 1

    def fn(z, x):
        jax.debug.callback(increment)
        return 20 * (cell(z, x) - z)

    # The first steps are too long, and rejected.
    sol = solve(fn, inn.SteadyState(ode_solver), z0, x, find=optx.root_find)
    jax.effects_barrier()
    assert sol.result == optx.RESULTS.successful
    assert sol.stats["num_rejected_steps"] >= 1
    assert sol.stats["nfe"] == count


@pytest.mark.parametrize(
    "ode_solver",
    (
        dfx.Tsit5(),
        dfx.Heun(),
        dfx.Kvaerno3(root_finder=dfx.VeryChord(1e-4, 1e-6, optx.rms_norm)),
    ),
    ids=name_of,
)
def test_same_as_diffeqsolve(ode_solver):
    cell, x, z0 = dense_problem()
    solver = inn.SteadyState.with_pid_controller(ode_solver, 1e-3, 1e-3)
    expected: Any = dfx.diffeqsolve(
        dfx.ODETerm(lambda t, z, x: cell(z, x) - z),
        ode_solver,
        0.0,
        jnp.inf,
        1.0,
        z0,
        x,
        stepsize_controller=solver.stepsize_controller,
        event=dfx.Event(dfx.steady_state_event(1e-3, 1e-3, optx.two_norm)),
        max_steps=None,
    )
    sol = solve(cell, solver, z0, x)
    assert sol.result == optx.RESULTS.successful
    assert sol.stats["num_steps"] == expected.stats["num_steps"]
    assert np.isclose(sol.stats["final_time"], expected.ts[0], rtol=1e-3)
    assert relative_error(sol.value, expected.ys[0]) < 1e-4


def test_tolerances_of_the_controller_may_be_traced():
    def tolerances(rtol, atol):
        solver = inn.SteadyState.with_pid_controller(dfx.Tsit5(), rtol, atol)
        return solver.stepsize_controller.rtol, solver.stepsize_controller.atol

    for given in ((1e-3, 0.0), (1e-3, 1e-2)):
        assert np.allclose(jax.jit(tolerances)(*given), tolerances(*given), rtol=1e-6)


def test_pseudo_transient_in_diffeqsolve():
    """Where a controller with tolerances hovers for ever."""
    weight, x = make_matrix(16, 0.9), make_vector(16)
    z0 = jnp.zeros(16)

    def residual(t, z, args):
        del t, args
        return jnp.tanh(weight @ z + 0.1 * x) - z

    sol: Any = dfx.diffeqsolve(
        dfx.ODETerm(residual),
        dfx.Tsit5(),
        0.0,
        jnp.inf,
        None,
        z0,
        stepsize_controller=PseudoTransient(),
        event=dfx.Event(dfx.steady_state_event(1e-4, 0.0, optx.two_norm)),
        max_steps=64,
    )
    assert sol.result == dfx.RESULTS.event_occurred
    z = sol.ys[0]
    assert two_norm(residual(0, z, None)) < 1.01e-4 * two_norm(z)


@pytest.mark.parametrize(
    "ode_solver, controller",
    (
        (VCABM3(), dfx.ConstantStepSize()),
        (dfx.Kvaerno3(), dfx.ConstantStepSize()),
        (dfx.Kvaerno3(), dfx.PIDController(1e-5, 1e-5)),
    ),
    ids=name_of,
)
def test_other_controllers(ode_solver, controller):
    """Diffrax' inner solves need tolerances, which Diffrax gives them only at times."""
    cell, x, z0 = dense_problem()
    solver = inn.SteadyState(ode_solver, stepsize_controller=controller)
    sol = solve(cell, solver, z0, x)
    assert sol.result == optx.RESULTS.successful
    if isinstance(controller, dfx.ConstantStepSize):
        assert sol.stats["num_rejected_steps"] == 0
        assert float(sol.stats["final_time"]) == int(sol.stats["num_steps"])


def test_a_root_finder_of_ones_own_keeps_its_tolerances():
    root_finder = dfx.VeryChord(rtol=1e-3, atol=1e-5, norm=optx.rms_norm)
    solver: Any = inn.SteadyState(dfx.Kvaerno3(root_finder=root_finder))
    cell, x, z0 = dense_problem()
    field, dt = cell(z0, x) - z0, jnp.ones(())
    assert solver._inner_solver(field, dt).root_finder == root_finder
    solver = inn.SteadyState(dfx.Kvaerno3())
    left_open = solver._inner_solver(field, dt).root_finder
    assert left_open.norm is optx.two_norm
    assert left_open.atol == two_norm(cell(z0, x))


@pytest.mark.parametrize("ode_solver", (dfx.Tsit5(), dfx.Kvaerno3()), ids=name_of)
def test_finds_the_time_scale(ode_solver):
    """From a first step that is much too long, or much too short."""
    cell, x, z0 = dense_problem()
    solver = inn.SteadyState(ode_solver, rtol=0.0, atol=1e-4)

    @jax.jit
    def outcome(scale):
        root = solve(
            lambda z, x: scale * (cell(z, x) - z),
            eqx.tree_at(lambda s: s.atol, solver, 1e-3 * scale),
            z0,
            x,
            find=optx.root_find,
        )
        return root.value, root.result == optx.RESULTS.successful

    for scale in (1e-3, 1e3):
        z, successful = outcome(scale)
        assert successful
        assert two_norm(cell(z, x) - z) <= 1.01e-3


def test_expansive_map():
    """Fixed-point iteration diverges; the flow converges."""
    matrix = -jnp.eye(3) * 3
    solver = inn.SteadyState(dfx.Tsit5())
    sol = solve(linear_map, solver, jnp.zeros(3), (matrix, make_vector(3)))
    assert sol.result == optx.RESULTS.successful
    assert relative_error(sol.value, make_vector(3) / 4) < 1e-3


def test_tight_tolerance():
    cell, x, z0 = dense_problem()
    rtol = tolerance(2e-6, 1e-10)
    solver = inn.SteadyState(VCABM3(), rtol=rtol, atol=0.0)
    sol = solve(cell, solver, z0, x)
    assert sol.result == optx.RESULTS.successful
    f = cell(sol.value, x)
    assert two_norm(f - sol.value) <= 1.01 * rtol * two_norm(f)


@pytest.mark.parametrize(
    "fn, z0, max_steps, result",
    (
        (lambda z, _: 0.5 * z + 1, 0.0, 256, "nonlinear_divergence"),
        (lambda z, _: jnp.nan * z, 0.0, 256, "nonfinite"),
        (lambda z, _: jnp.where(z == 0, 1.0, jnp.nan), 0.0, 256, "stagnation"),
        (lambda z, _: -10 * jnp.log(z), 5.0, 256, "successful"),
        (lambda z, _: -z, 1.0, 2, "nonlinear_max_steps_reached"),
        (lambda z, _: 0 * z, 1.0, 256, "successful"),
        (lambda z, _: jnp.tanh(2 * z) + 1e-6 - z, 0.0, 256, "successful"),
    ),
    ids=(
        "diverges",
        "nan",
        "nan-around",
        "nan-beyond",
        "max-steps",
        "steady",
        "unstable-start",
    ),
)
def test_results(fn, z0, max_steps, result):
    z0 = jnp.full(2, z0)
    solver = inn.SteadyState(VCABM3())
    sol = solve(fn, solver, z0, max_steps=max_steps, find=optx.root_find)
    assert sol.result == getattr(optx.RESULTS, result)
    assert jnp.all(jnp.isfinite(sol.value))
    if sol.stats["num_steps"] == 0:
        assert sol.stats["nfe"] == 1
        assert jnp.all(sol.value == z0)


def test_nonfinite_in_the_last_step():
    """Steps of a constant size cannot be rejected."""
    solver = inn.SteadyState(
        dfx.Euler(), stepsize_controller=dfx.ConstantStepSize(), dt0=5.0
    )
    sol = solve(
        lambda z, _: -10 * jnp.log(z),
        solver,
        jnp.full(2, 5.0),
        max_steps=1,
        find=optx.root_find,
    )
    assert sol.result == optx.RESULTS.nonfinite
    assert jnp.all(sol.value == 5.0)


def test_returns_the_best_iterate():
    """The residual of steps that are too long grows, that of the result does not."""
    args = make_matrix(8, 0.9), make_vector(8)
    solver = inn.SteadyState(
        dfx.Euler(), 0.0, 1e-9, stepsize_controller=dfx.ConstantStepSize(), dt0=1.3
    )

    def residual(max_steps):
        sol = solve(linear_map, solver, jnp.zeros(8), args, max_steps=max_steps)
        return optx.two_norm(linear_map(sol.value, args) - sol.value)

    residuals = [float(residual(n)) for n in (3, 20)]
    assert residuals[1] <= residuals[0] * (1 + 1e-5)


@pytest.mark.parametrize(
    "ode_solver, adjoint",
    (
        (dfx.Tsit5(), inn.ImplicitAdjoint()),
        (dfx.Kvaerno3(), optx.ImplicitAdjoint()),
        (VCABM3(), optx.RecursiveCheckpointAdjoint()),
    ),
    ids=name_of,
)
def test_gradient(ode_solver, adjoint):
    cell, x, z0 = dense_problem()
    solver = inn.SteadyState(ode_solver, rtol=tolerance(1e-5, 1e-7), atol=0.0)
    weights = loss_weights(z0)

    @eqx.filter_jit
    @eqx.filter_grad(has_aux=True)
    def gradient(cell_and_x):
        cell, x = cell_and_x
        sol = optx.fixed_point(
            cell, solver, z0, x, max_steps=128, adjoint=adjoint, throw=False
        )
        return weighted_sum(sol.value, weights), sol.value

    value, z = gradient((cell, x))
    expected = dense_gradient(cell, z, x, weights)
    assert relative_error(value, expected) < tolerance(2e-3, 1e-4)


@pytest.mark.parametrize("ode_solver", (VCABM3(), dfx.Kvaerno3()), ids=name_of)
def test_batch_partners_change_nothing(ode_solver):
    cell, x, z0 = dense_problem()
    solver = inn.SteadyState(ode_solver, rtol=1e-4, atol=0.0)

    @jax.jit
    @jax.vmap
    def outcome(x):
        sol = solve(cell, solver, z0, x)
        return sol.value, sol.stats["num_steps"]

    alone, num_steps_alone = outcome(jnp.stack([x, x, x]))
    together, num_steps = outcome(jnp.stack([1e-3 * x, x, 1e2 * x]))
    assert num_steps[1] == num_steps_alone[1]
    assert len(np.unique(num_steps)) > 1
    assert relative_error(together[1], alone[1]) < 50 * jnp.finfo(x.dtype).eps


def test_multiple_leaves_are_one_vector():
    cell = pair_cell()
    x = {"a": make_vector(2), "b": make_vector(4, 2).reshape(2, 2)}
    flat_x, unravel = ravel_pytree(x)

    def flat_cell(z, x):
        return ravel_pytree(cell(unravel(z), unravel(x)))[0]

    solver = inn.SteadyState(VCABM3())
    tree = solve(cell, solver, jtu.tree_map(jnp.zeros_like, x), x)
    flat = solve(flat_cell, solver, jnp.zeros_like(flat_x), flat_x)
    assert tree.result == flat.result == optx.RESULTS.successful
    assert tree.stats["num_steps"] == flat.stats["num_steps"]
    value = ravel_pytree(tree.value)[0]
    assert relative_error(value, flat.value) < 50 * jnp.finfo(flat_x.dtype).eps


@pytest.mark.parametrize(
    "dtype, ode_solver",
    (
        (jnp.bfloat16, dfx.Kvaerno3()),
        (jnp.float16, VCABM3()),
        (jnp.float32, dfx.Kvaerno3()),
        (jnp.float32, VCABM3()),
    ),
)
def test_dtypes(dtype, ode_solver):
    """Also float32 when float64 is on."""
    cell, x, z0 = dense_problem()
    cell = jtu.tree_map(lambda w: (0.5 * w).astype(dtype), cell)
    rtol = 1e-4 if dtype == jnp.float32 else 3e-2
    solver = inn.SteadyState(ode_solver, rtol=rtol, atol=0.0)
    sol = solve(cell, solver, z0.astype(dtype), x.astype(dtype))
    assert sol.value.dtype == dtype
    assert sol.result == optx.RESULTS.successful
    assert relative_error(cell(sol.value, x.astype(dtype)), sol.value) < 1.1 * rtol


def test_traced_tolerances_do_not_recompile():
    cell, x, z0 = dense_problem()
    num_traces = 0

    def counted(z, x):
        nonlocal num_traces
        num_traces += 1
        return cell(z, x)

    @eqx.filter_jit
    def num_steps(solver):
        return solve(counted, solver, z0, x).stats["num_steps"]

    def solver(rtol):
        arrays = (jnp.array(rtol), jnp.array(1e-7), jnp.array(1.0))
        return inn.SteadyState(dfx.Euler(), arrays[0], arrays[1], dt0=arrays[2])

    few = num_steps(solver(1e-1))
    once = num_traces
    assert num_steps(solver(1e-3)) > few
    assert num_traces == once


def test_auxiliary_output():
    def fn(z, x):
        return jnp.tanh(0.5 * z + x) - z, {"twice": 2 * z}

    sol = optx.root_find(
        fn, inn.SteadyState(dfx.Euler()), jnp.zeros(2), jnp.ones(2), has_aux=True
    )
    assert jnp.all(sol.aux["twice"] == 2 * sol.value)
    assert sol.stats["nfe"] == sol.stats["num_steps"] + 2


def test_pseudo_transient_needs_an_error_estimate():
    with pytest.raises(ValueError, match="estimates its error"):
        dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, args: -y),
            dfx.Euler(),
            0.0,
            1.0,
            0.1,
            jnp.ones(1),
            stepsize_controller=PseudoTransient(),
        )


def test_dense_cell_of_default_tolerances():
    """As the layer makes it of a Diffrax solver."""
    cell = dense_cell()
    x = make_vector(4)
    z = inn.DeepEquilibriumNetwork(cell, dfx.Tsit5())(x)
    assert two_norm(cell(z, x) - z) <= 1.01 * (1e-6 + 1e-4 * two_norm(cell(z, x)))
