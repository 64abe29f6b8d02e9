import functools as ft

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import optimistix as optx
import pytest

import implicitnets as inn

from .helpers import (
    dense_cell,
    dense_gradient,
    DenseCell,
    is_double,
    JointCell,
    loss_weights,
    make_matrix,
    make_vector,
    pair_cell,
    problem,
    relative_error,
    tolerance,
    two_norm,
    weighted_sum,
)


TOL = tolerance(1e-6, 1e-11)

SOLVERS = {
    "anderson": inn.AndersonAcceleration(TOL, TOL),
    "fixed_point": optx.FixedPointIteration(TOL, TOL),
    "newton": optx.Newton(TOL, TOL),
    "chord": optx.Chord(TOL, TOL),
    "dogleg": optx.Dogleg(TOL, TOL),
    "levenberg_marquardt": optx.LevenbergMarquardt(TOL, TOL),
    "best_so_far": optx.BestSoFarRootFinder(optx.Newton(TOL, TOL)),
    "steady_state": inn.SteadyState(dfx.Tsit5(), TOL, TOL),
    # Float32 line searches stall above tighter tolerances.
    "bfgs": optx.BFGS(tolerance(1e-3, 1e-8), tolerance(1e-3, 1e-8)),
}

TIGHT = inn.GivensGMRES(rtol=tolerance(1e-6, 1e-12), atol=0.0)

ADJOINTS = {
    "implicit": inn.ImplicitAdjoint(TIGHT),
    "optimistix_implicit": optx.ImplicitAdjoint(),
    "unrolled": optx.RecursiveCheckpointAdjoint(),
}


def make_deq(kind: str, cell, solver, **kwargs):
    if kind == "plain":
        return inn.DeepEquilibriumNetwork(cell, solver, **kwargs)
    if kind == "skip":

        def init(x):
            return jtu.tree_map(lambda leaf: 0.5 * leaf, x)

        return inn.SkipDeepEquilibriumNetwork(cell, solver, init=init, **kwargs)
    return inn.SkipDeepEquilibriumNetwork(cell, solver, **kwargs)


@eqx.filter_jit
def solve_and_grad(deq, x, weights):
    def loss(params):
        cell, x = params
        layer = eqx.tree_at(lambda layer: layer.cell, deq, cell)
        sol = layer.solve(x)
        return weighted_sum(sol.z_star, weights), sol

    (_, sol), grads = eqx.filter_value_and_grad(loss, has_aux=True)((deq.cell, x))
    return sol, grads


def check(deq, x, tol_z, tol_grad):
    weights = loss_weights(x)
    sol, grads = solve_and_grad(deq, x, weights)
    assert sol.result == optx.RESULTS.successful
    assert two_norm(sol.residual) <= tol_z
    reference = dense_gradient(deq.cell, sol.z_star, x, weights)
    assert relative_error(grads, reference) < tol_grad
    return sol


CELLS = ("dense", "conv", "pair")


@pytest.mark.parametrize(
    "solver_name, cell_names",
    (
        *((name, CELLS) for name in SOLVERS if name != "bfgs"),
        # It stalls on all three together.
        *(("bfgs", (name,)) for name in CELLS),
    ),
)
def test_every_solver(solver_name, cell_names):
    problems = {name: problem(name) for name in cell_names}
    x = {name: x for name, (_, x) in problems.items()}
    deq = inn.DeepEquilibriumNetwork(
        JointCell({name: cell for name, (cell, _) in problems.items()}),
        SOLVERS[solver_name],
        # At zero the group norm's Jacobian, which a chord method keeps, is singular.
        init=lambda x: x,
        adjoint=ADJOINTS["implicit"],
        max_steps=2000,
    )
    loose = solver_name == "bfgs"
    tol_z = tolerance(1e-2, 1e-6) if loose else tolerance(2e-5, 1e-9)
    sol = check(deq, x, tol_z, tolerance(1e-4, 1e-8))
    assert jtu.tree_structure(sol.z_star) == jtu.tree_structure(x)


@pytest.mark.parametrize(
    "solver_name, kind",
    (
        ("anderson", "plain"),
        ("anderson", "skip"),
        ("anderson", "skipreg"),
        ("newton", "plain"),
    ),
)
@pytest.mark.parametrize("adjoint_name", ADJOINTS)
def test_every_adjoint_and_start(solver_name, adjoint_name, kind):
    cell, x = problem("dense")
    deq = make_deq(
        kind,
        cell,
        SOLVERS[solver_name],
        adjoint=ADJOINTS[adjoint_name],
        max_steps=64,
    )
    # Differentiating through an accelerated iteration converges behind the iteration.
    check(deq, x, tolerance(2e-5, 1e-9), tolerance(1e-3, 1e-5))


def test_bare_diffrax_solver_and_default_solver():
    cell, x = problem("dense")
    deq = inn.DeepEquilibriumNetwork(cell, dfx.Tsit5())
    assert isinstance(deq.solver, inn.SteadyState)
    z_ode = eqx.filter_jit(deq)(x)
    z_default = eqx.filter_jit(inn.DeepEquilibriumNetwork(cell))(x)
    assert relative_error(z_ode, z_default) < 1e-3


def test_batch_partners_change_nothing():
    cell, x = problem("dense")
    # The last step of a state of four numbers goes from 1e-4 to the rounding of its
    # least squares, so that a tolerance of 1e-6 would be a matter of that.
    rtol = tolerance(1e-5, 1e-9)
    deq = inn.DeepEquilibriumNetwork(cell, inn.AndersonAcceleration(rtol, rtol))
    xs = jnp.stack([x, 0.01 * x, jnp.zeros_like(x), 3 * x])
    grad = jax.grad(lambda x: jnp.sum(deq(x) ** 2))
    batch = eqx.filter_jit(jax.vmap(lambda x: (deq.solve(x), grad(x))))(xs)
    alone = eqx.filter_jit(lambda x: (deq.solve(x), grad(x)))
    for i, x in enumerate(xs):
        sol, gradient = alone(x)
        batch_sol, batch_gradient = jtu.tree_map(lambda leaf: leaf[i], batch)
        assert sol.stats["num_steps"] == batch_sol.stats["num_steps"]
        assert sol.stats["nfe"] == batch_sol.stats["nfe"]
        assert np.allclose(sol.z_star, batch_sol.z_star, rtol=1e-5, atol=1e-6)
        assert np.allclose(gradient, batch_gradient, rtol=1e-4, atol=1e-5)
    num_steps = batch[0].stats["num_steps"]
    assert len(set(num_steps.tolist())) > 2


def test_whole_batch_without_vmap():
    """A cell that couples its examples is solved on the whole batch."""
    weight = make_matrix(3, 0.5)

    def cell(z, x):
        return jnp.tanh((z - jnp.mean(z, axis=0, keepdims=True)) @ weight + x)

    x = make_vector(12).reshape(4, 3)
    deq = inn.DeepEquilibriumNetwork(
        cell, SOLVERS["anderson"], adjoint=ADJOINTS["implicit"]
    )
    check(deq, x, tolerance(2e-5, 1e-9), tolerance(1e-4, 1e-8))


class NoisyCell(eqx.Module):
    cell: DenseCell
    dropout: eqx.nn.Dropout

    def __call__(self, z, x, *, key):
        return self.dropout(self.cell(z, x), key=key)


def test_key_is_fixed_within_a_solve():
    cell = NoisyCell(dense_cell(8, 0.5), eqx.nn.Dropout(0.5))
    deq = inn.DeepEquilibriumNetwork(cell, SOLVERS["anderson"])
    solve = eqx.filter_jit(lambda key: deq.solve(make_vector(8), key=key))
    sol = solve(jr.key(0))
    assert sol.result == optx.RESULTS.successful
    masked = cell(sol.z_star, make_vector(8), key=jr.key(0))
    assert np.allclose(masked, sol.z_star, atol=1e-4)
    assert not np.allclose(sol.z_star, solve(jr.key(1)).z_star, atol=1e-2)


def test_key_within_sequential():
    deq = inn.DeepEquilibriumNetwork(dense_cell(), SOLVERS["anderson"])
    linear = eqx.nn.Linear(4, 4, key=jr.key(0))

    @eqx.filter_jit
    def run(x):
        model = eqx.nn.Sequential([linear, deq])
        return model(x, key=jr.key(1)), deq(linear(x))

    with_key, without = run(make_vector(4))
    assert np.array_equal(with_key, without)


def test_warm_start():
    cell, x = problem("dense")
    deq = inn.DeepEquilibriumNetwork(cell, SOLVERS["anderson"])
    solve = eqx.filter_jit(lambda x, z0: deq.solve(x, z0=z0))
    cold = solve(x, jnp.zeros_like(x))
    warm = solve(x, cold.z_star)
    assert warm.stats["num_steps"] == 1
    assert eqx.tree_equal(warm.z_star, cold.z_star)
    near = solve(1.001 * x, cold.z_star)
    assert near.stats["num_steps"] < cold.stats["num_steps"]


@pytest.mark.parametrize("adjoint_name", ("implicit", "optimistix_implicit"))
def test_gradient_of_start(adjoint_name):
    """None through the equilibrium, and all of it through `sol.z0`."""
    cell, x = problem("dense")
    deq = inn.DeepEquilibriumNetwork(
        cell, SOLVERS["anderson"], adjoint=ADJOINTS[adjoint_name]
    )

    @jax.jit
    def grads(scale):
        def start(scale):
            return scale * jnp.ones_like(x)

        through_z_star = jax.grad(lambda s: jnp.sum(deq(x, z0=start(s))))(scale)
        through_z0 = jax.grad(lambda s: jnp.sum(deq.solve(x, z0=start(s)).z0))(scale)
        return through_z_star, through_z0

    through_z_star, through_z0 = grads(jnp.array(0.3))
    assert through_z_star == 0
    assert through_z0 == x.size


def test_skip_penalty_trains_init():
    x = make_vector(4)
    init = eqx.nn.Linear(4, 4, key=jr.key(0))
    deq = inn.SkipDeepEquilibriumNetwork(dense_cell(), SOLVERS["anderson"], init=init)

    @eqx.filter_jit
    @ft.partial(eqx.filter_value_and_grad, has_aux=True)
    def loss(deq):
        sol = deq.solve(x)
        return inn.skip_penalty(sol), sol

    (value, sol), grads = loss(deq)
    assert np.allclose(value, np.mean((sol.z_star - sol.z0) ** 2), rtol=1e-5)
    expected = jnp.outer(-2 * (sol.z_star - sol.z0) / x.size, x)
    assert np.allclose(grads.init.weight, expected, rtol=1e-4, atol=1e-6)
    assert jnp.any(grads.cell.hidden != 0)


def test_optimiser_state_survives_the_switch_of_depth():
    x = make_vector(4)
    model = eqx.nn.Sequential(
        [
            eqx.nn.Linear(4, 4, key=jr.key(0)),
            inn.DeepEquilibriumNetwork(dense_cell(), SOLVERS["anderson"]),
        ]
    )
    optimiser = optax.adam(1e-3)

    @eqx.filter_jit
    def step(model, state):
        def loss(model):
            return jnp.sum(model(x) ** 2)

        value, grads = eqx.filter_value_and_grad(loss)(model)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimiser.update(grads, state)
        return eqx.apply_updates(model, updates), state, value

    state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))
    structure = jtu.tree_structure(model)
    values = []
    for depth, checkpoint in ((3, False), (0, False), (3, True)):
        model = inn.set_fixed_depth(model, depth, checkpoint=checkpoint)
        assert jtu.tree_structure(model) == structure
        for _ in range(2):
            model, state, value = step(model, state)
            values.append(float(value))
    assert values[1] < values[0] and values[3] < values[2] and values[5] < values[4]
    assert optax.tree.get(state, "count") == 6


def test_fixed_depth_is_unrolling():
    cell, x = problem("dense")
    deq = inn.DeepEquilibriumNetwork(cell, init=lambda x: 0.1 * x)
    deep = inn.set_fixed_depth(deq, 4)
    sol, grads = solve_and_grad(deep, x, loss_weights(x))

    def unrolled(params):
        cell, x = params
        z = 0.1 * x
        for _ in range(4):
            z = cell(z, x)
        return weighted_sum(z, loss_weights(x))

    run = eqx.filter_jit(eqx.filter_value_and_grad(unrolled))
    value, expected = run((cell, x))
    assert sol.stats["nfe"] == 4
    assert np.allclose(weighted_sum(sol.z_star, loss_weights(x)), value, rtol=1e-5)
    assert relative_error(grads, expected) < 1e-5
    through_start = jax.jit(jax.grad(lambda z0: jnp.sum(deep(x, z0=z0))))(0 * x)
    assert jnp.any(through_start != 0)


class WideCell(eqx.Module):
    """Whose inner activations are much larger than its state."""

    down: eqx.nn.Linear
    up: eqx.nn.Linear

    def __call__(self, z, x):
        return jnp.tanh(self.down(jnp.tanh(self.up(z))) + x)


@pytest.mark.parametrize(
    "layer", (inn.DeepEquilibriumNetwork, inn.SkipDeepEquilibriumNetwork)
)
def test_checkpointed_depth_takes_less_memory(layer):
    size, width, depth = 8, 4096, 12
    keys = jr.split(jr.key(0))
    cell = WideCell(
        eqx.nn.Linear(width, size, key=keys[0]), eqx.nn.Linear(size, width, key=keys[1])
    )
    model, x = layer(cell), make_vector(size)

    def measure(checkpoint):
        deep = inn.set_fixed_depth(model, depth, checkpoint=checkpoint)
        assert jtu.tree_structure(deep) == jtu.tree_structure(model)
        params, static = eqx.partition(deep, eqx.is_inexact_array)

        def loss(params, x):
            return jnp.sum(eqx.combine(params, static)(x) ** 2)

        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(params, x).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes, compiled(params, x)

    memory, (value, grads) = measure(False)
    less_memory, (same_value, same_grads) = measure(True)
    assert np.allclose(same_value, value, rtol=1e-6)
    assert relative_error(same_grads, grads) < 1e-5
    # Of the inner activations, one of each application is not kept.
    assert memory - less_memory > (depth - 2) * width * x.dtype.itemsize
    assert less_memory < 0.7 * memory


def test_set_fixed_depth_reaches_nested_layers():
    inner = inn.DeepEquilibriumNetwork(dense_cell())

    class Outer(eqx.Module):
        inner: inn.DeepEquilibriumNetwork

        def __call__(self, z, x):
            return 0.5 * self.inner(z) + x

    model = {"layers": [inn.DeepEquilibriumNetwork(Outer(inner)), inner]}
    model = inn.set_fixed_depth(model, 3, checkpoint=True)
    outer, other = model["layers"]
    assert isinstance(outer.cell, Outer)
    layers = outer, outer.cell.inner, other
    assert all(layer.fixed_depth == 3 and layer.checkpoint for layer in layers)
    assert not inn.set_fixed_depth(inner, 3).checkpoint


def test_traced_depth_is_a_clear_error():
    deq = inn.DeepEquilibriumNetwork(lambda z, x: 0.5 * z + x)
    with pytest.raises(TypeError, match="filter_jit"):
        eqx.tree_at(lambda d: d.fixed_depth, deq, jnp.array(1))(make_vector(4))


LAYERS = (inn.DeepEquilibriumNetwork, inn.SkipDeepEquilibriumNetwork, inn.NeuralODE)


@pytest.mark.parametrize("layer", LAYERS)
def test_state_that_is_not_shaped_like_the_input(layer):
    cell, x = inn.nn.MonotoneCell(6, 4, key=jr.key(0)), make_vector(6)

    @eqx.filter_jit
    def solve(x):
        sol = layer(cell, zero_state=lambda x: jnp.zeros(4, x.dtype)).solve(x)
        return sol, cell(jnp.zeros(4), x)

    sol, f0 = solve(x)
    assert sol.result == optx.RESULTS.successful
    is_skip = layer is inn.SkipDeepEquilibriumNetwork
    assert np.allclose(sol.z0, f0 if is_skip else 0, atol=1e-6)
    if layer is not inn.NeuralODE:
        assert relative_error(cell(sol.z_star, x), sol.z_star) < 1e-3


def test_state_of_several_dtypes():
    """Under strict promotion, to which the suite is set."""

    def cell(z, x):
        return jtu.tree_map(lambda z, x: jnp.tanh(0.5 * z) + x, z, x)

    x = {"a": jnp.ones(2), "b": jnp.ones(2, jnp.bfloat16)}
    sol = eqx.filter_eval_shape(inn.DeepEquilibriumNetwork(cell).solve, x)
    assert sol.z_star["b"].dtype == jnp.bfloat16


@pytest.mark.parametrize("solver_name", ("anderson", "fixed_point", "newton"))
def test_result_of_nan(solver_name):
    """At once, in the last step allowed, and before it."""

    @eqx.filter_jit
    def solve(last, z0, max_steps):
        def cell(z, last):
            # NaN once the plain iteration is past `last`.
            return jnp.where(z > last, jnp.nan, z + 1)

        deq = inn.DeepEquilibriumNetwork(cell, SOLVERS[solver_name])
        deq = eqx.tree_at(lambda d: d.max_steps, deq, max_steps)
        return deq.solve(last, z0=z0)

    for last, z0, max_steps in {
        "fixed_point": ((-0.5, 0.0, 1), (5.5, 0.0, 6), (5.5, 0.0, 50)),
        # The Jacobian of `z + 1 - z` is singular.
        "newton": ((-0.5, 0.0, 1),),
        # No acceleration, which would find that `z + 1` has no fixed point at once.
        "anderson": ((-0.5, 0.0, 1), (5.5, 6.0, 6), (5.5, 6.0, 50)),
    }[solver_name]:
        sol = solve(jnp.array([last]), jnp.array([z0]), jnp.array(max_steps))
        assert sol.result == optx.RESULTS.nonfinite
        if solver_name == "anderson":
            assert jnp.all(jnp.isfinite(sol.z_star))


def test_result_of_divergence_and_of_too_few_steps():
    @eqx.filter_jit
    def solve(slopes, max_steps):
        deq = inn.DeepEquilibriumNetwork(
            lambda z, slope: slope * z + 1, SOLVERS["fixed_point"]
        )
        deq = eqx.tree_at(lambda d: d.max_steps, deq, max_steps)
        result = jax.vmap(lambda slope: deq.solve(slope).result)(slopes)
        diverged = result == optx.RESULTS.nonlinear_divergence
        return diverged, result == optx.RESULTS.nonlinear_max_steps_reached

    for max_steps in (12, 40):
        slopes = jnp.array([[-3.0], [0.99], [-3.0]])
        diverged, too_few = solve(slopes, jnp.array(max_steps))
        assert diverged.tolist() == [True, False, True]
        assert too_few.tolist() == [False, True, False]


def test_throw():
    deq = inn.DeepEquilibriumNetwork(
        lambda z, x: 0.99 * z + x, SOLVERS["fixed_point"], max_steps=3, throw=True
    )
    with pytest.raises(eqx.EquinoxRuntimeError, match="maximum number of steps"):
        eqx.filter_jit(deq)(jnp.ones(1))


def test_value_under_grad_is_the_value():
    cell, x = problem("dense")
    deq = inn.DeepEquilibriumNetwork(cell, SOLVERS["anderson"])
    sol = eqx.filter_jit(deq.solve)(x)
    grad_sol, _ = solve_and_grad(deq, x, loss_weights(x))
    assert eqx.tree_equal(sol.stats, grad_sol.stats)
    assert np.allclose(sol.z_star, grad_sol.z_star, rtol=1e-6)


def test_two_layers_and_a_closure_in_one_loss():
    cell, x = problem("dense")
    tight = ADJOINTS["implicit"]

    def loss(scale):
        def scaled(z, x):
            return scale * cell(z, x)

        first = inn.DeepEquilibriumNetwork(scaled, SOLVERS["anderson"], adjoint=tight)
        second = inn.DeepEquilibriumNetwork(cell, SOLVERS["newton"], adjoint=tight)
        return jnp.sum(first(x)) + jnp.sum(second(scale * x) ** 2)

    run = jax.jit(jax.value_and_grad(loss))
    scale, step = jnp.array(0.7), tolerance(1e-2, 1e-5)
    _, gradient = run(scale)
    difference = (run(scale + step)[0] - run(scale - step)[0]) / (2 * step)
    assert np.allclose(gradient, difference, rtol=tolerance(1e-2, 1e-6))


def test_partial_leaf_loss_and_static_inputs():
    cell = pair_cell()
    _, leaves = problem("pair")

    def with_extras(z, x):
        assert x["mode"] == "train"
        return cell(z, {"a": x["a"] + x["index"].astype(x["a"].dtype), "b": x["b"]})

    deq = inn.DeepEquilibriumNetwork(
        with_extras, SOLVERS["anderson"], adjoint=ADJOINTS["implicit"]
    )
    z0 = jtu.tree_map(jnp.zeros_like, leaves)
    inputs = {**leaves, "index": jnp.array(1), "mode": "train"}

    @eqx.filter_jit
    @ft.partial(eqx.filter_grad, has_aux=True)
    def gradient(inputs):
        z_star = deq(inputs, z0=z0)
        return jnp.sum(z_star["a"]), z_star

    grads, z_star = gradient(inputs)
    shifted = {"a": leaves["a"] + 1, "b": leaves["b"]}
    weights = {"a": jnp.ones(2), "b": jnp.zeros((2, 2))}
    _, expected = dense_gradient(cell, z_star, shifted, weights)
    got = {"a": grads["a"], "b": grads["b"]}
    assert relative_error(got, expected) < tolerance(1e-4, 1e-8)
    assert grads["index"] is None


def test_serialise_and_reload(tmp_path):
    x = make_vector(4)
    deq = inn.DeepEquilibriumNetwork(dense_cell(), SOLVERS["anderson"])
    eqx.tree_serialise_leaves(tmp_path / "deq.eqx", deq)
    template = inn.DeepEquilibriumNetwork(dense_cell(4, 0.1), SOLVERS["anderson"])
    loaded = eqx.tree_deserialise_leaves(tmp_path / "deq.eqx", template)
    run = eqx.filter_jit(lambda deq: deq(x))
    assert eqx.tree_equal(run(deq), run(loaded))


def test_traced_tolerance_and_budget_do_not_recompile():
    traces = []

    @eqx.filter_jit
    def solve(rtol, max_steps, x):
        traces.append(None)
        solver = inn.AndersonAcceleration(rtol, jnp.zeros_like(rtol))
        deq = inn.DeepEquilibriumNetwork(dense_cell(), solver)
        return eqx.tree_at(lambda d: d.max_steps, deq, max_steps).solve(x)

    loose, tight, short = (
        solve(jnp.array(tol), jnp.array(max_steps), make_vector(4))
        for tol, max_steps in ((1e-1, 100), (1e-4, 100), (1e-4, 3))
    )
    assert len(traces) == 1
    assert loose.stats["nfe"] < tight.stats["nfe"]
    assert short.stats["num_steps"] == 3
    assert short.result == optx.RESULTS.nonlinear_max_steps_reached


def test_a_solve_outside_jit_compiles_once():
    traces = []

    class Cell(eqx.Module):
        weight: jax.Array

        def __call__(self, z, x):
            traces.append(None)
            return jnp.tanh(self.weight @ z + x)

    deq = inn.DeepEquilibriumNetwork(Cell(make_matrix(4, 0.5)))
    deq.solve(make_vector(4, seed=1))
    first = len(traces)
    deq.solve(make_vector(4, seed=2))
    # Only the structure check, the residual and the verdict, which are not compiled.
    assert len(traces) - first <= 3


def test_in_scan_and_several_devices_are_ordinary_jax():
    cell, x = problem("dense")
    deq = inn.DeepEquilibriumNetwork(cell, SOLVERS["anderson"])

    @jax.jit
    @jax.grad
    def gradient(x):
        def advance(carry, _):
            z = deq(x, z0=carry)
            return z, jnp.sum(z)

        _, sums = jax.lax.scan(advance, jnp.zeros_like(x), length=3)
        return jnp.sum(sums)

    once = jax.jit(jax.grad(lambda x: 3 * jnp.sum(deq(x))))(x)
    assert relative_error(gradient(x), once) < 1e-3


def test_export_to_accelerators():
    cell, x = problem("conv")
    deq = inn.DeepEquilibriumNetwork(cell)

    @jax.jit
    def gradient(xs):
        return jax.grad(lambda xs: jnp.sum(jax.vmap(deq)(xs) ** 2))(xs)

    exported = jax.export.export(gradient, platforms=("cuda", "tpu", "cpu"))
    module = exported(jnp.stack([x, x]))
    assert module.platforms == ("cuda", "tpu", "cpu")
    assert "callback" not in module.mlir_module()
    xs = jnp.stack([x, 2 * x])
    assert np.allclose(module.call(xs), gradient(xs), rtol=1e-5, atol=1e-6)


def coupled_cell(z, x):
    return jnp.tanh(0.3 * (z - jax.lax.pmean(z, "batch")) + x)


def test_a_cell_that_couples_a_batch_is_refused():
    deq = inn.DeepEquilibriumNetwork(coupled_cell)
    xs = jnp.arange(6.0).reshape(3, 2)
    match = "`coupled_cell.*axis 'batch'.*whole batch.*`implicitnets.set_fixed_depth`"
    with pytest.raises(ValueError, match=match):
        jax.vmap(deq, axis_name="batch")(xs)

    # What it says to do instead.
    def batch_cell(zs, xs):
        return jax.vmap(coupled_cell, axis_name="batch")(zs, xs)

    exact = inn.ImplicitAdjoint(inn.GivensGMRES(TOL, 0.0))
    whole = inn.DeepEquilibriumNetwork(batch_cell, SOLVERS["anderson"], adjoint=exact)
    unrolled = inn.set_fixed_depth(deq, 40)
    expected = jax.vmap(unrolled, axis_name="batch")
    for fn in (lambda f: f(xs), lambda f: jax.grad(lambda xs: jnp.sum(f(xs) ** 3))(xs)):
        assert relative_error(fn(whole), fn(expected)) < 10 * TOL


def shifted(z):
    return jax.lax.ppermute(z, "batch", [(0, 1), (1, 2), (2, 0)])


COLLECTIVES = {
    "psum": lambda z: jax.lax.psum(z, "batch"),
    "pmax": lambda z: jax.lax.pmax(z, "batch"),
    "all_gather": lambda z: jnp.max(jax.lax.all_gather(z, "batch"), axis=0),
    "psum_scatter": lambda z: jax.lax.psum_scatter(jnp.stack([z] * 3), "batch"),
    "axis_index": lambda z: z * jax.lax.axis_index("batch").astype(z.dtype),
    # These leave no effect in a jaxpr.
    "ppermute": shifted,
    "in_jit": jax.jit(shifted),
    "in_scan": lambda z: jax.lax.scan(lambda z, _: (shifted(z), None), z, None, 2)[0],
    "in_cond": lambda z: jax.lax.cond(z[0] > 0, shifted, jnp.sin, z),
}


@pytest.mark.one_precision
@pytest.mark.parametrize("name", COLLECTIVES)
def test_every_collective_is_refused(name):
    def cell(z, x):
        return jnp.tanh(0.3 * COLLECTIVES[name](z) + x)

    def trace(z, x):
        solver = SOLVERS["anderson"]
        return inn.residual_trace(cell, solver, z, x, max_steps=2).absolute

    xs = jnp.arange(6.0).reshape(3, 2)
    for function in (
        inn.DeepEquilibriumNetwork(cell),
        inn.NeuralODE(cell),
        lambda x: trace(x, x),
    ):
        with pytest.raises(ValueError, match="axis 'batch' of .* whole batch"):
            jax.eval_shape(jax.vmap(function, axis_name="batch"), xs)
    # Their steps are the same for all examples.
    constant = inn.NeuralODE(cell, stepsize_controller=dfx.ConstantStepSize())
    for layer in (inn.set_fixed_depth(inn.DeepEquilibriumNetwork(cell), 2), constant):
        eqx.filter_eval_shape(jax.vmap(layer, axis_name="batch"), xs)


@pytest.mark.one_precision
def test_batch_normalisation_in_a_cell_is_refused():
    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(2, "batch", mode="batch")

    def cell(z, x):
        return jnp.tanh(norm(z, state)[0] + x)

    with pytest.raises(ValueError, match="as batch normalisation does"):
        jax.eval_shape(
            jax.vmap(inn.DeepEquilibriumNetwork(cell), axis_name="batch"),
            jnp.ones((3, 2)),
        )


@pytest.mark.parametrize("number", (0, 0.0))
def test_a_python_number_has_no_dtype_of_its_own(number):
    x = jnp.float32(0.3)
    start = inn.DeepEquilibriumNetwork(lambda z, x: jnp.tanh(z / 2 + x))
    init = eqx.tree_at(
        lambda deq: deq.init, start, lambda x: number, is_leaf=lambda x: x is None
    )
    assert start(x, z0=number).dtype == init(x).dtype == jnp.float32


def optimistix_fails(*args):
    # In Optimistix 0.1.0, `_solver/levenberg_marquardt.py` starts an inner root find at
    # `lambda_0`, `nelder_mead.py` branches on `jnp.array(jnp.inf)`, and
    # `limited_memory_bfgs.py` has a history of the default dtype: all of float64. See
    # https://github.com/patrick-kidger/optimistix/issues/207.
    mark = pytest.mark.xfail(
        raises=(TypeError, ValueError),
        reason="constants in Optimistix' steps are of the default dtype",
    )
    return pytest.param(*args, marks=mark)


@pytest.mark.skipif(not is_double(), reason="float32 is then the only precision")
@pytest.mark.parametrize(
    "solver",
    (
        optx.Dogleg(1e-4, 1e-4),
        optx.LevenbergMarquardt(1e-4, 1e-4),
        optimistix_fails(optx.IndirectLevenbergMarquardt(1e-4, 1e-4)),
        optimistix_fails(optx.NelderMead(1e-4, 1e-4)),
        optimistix_fails(optx.LBFGS(1e-4, 1e-4)),
    ),
    ids=lambda solver: type(solver).__name__,
)
def test_a_problem_in_single_precision_where_double_is_on(solver):
    cell, x = jtu.tree_map(jnp.float32, (dense_cell(), make_vector(4)))
    deq = inn.DeepEquilibriumNetwork(cell, solver)
    sol = eqx.filter_jit(deq.solve)(x)
    assert sol.result == optx.RESULTS.successful
    assert sol.z_star.dtype == jnp.float32
    assert relative_error(cell(sol.z_star, x), sol.z_star) < 1e-3


@pytest.mark.one_precision
@pytest.mark.skipif(
    jax.__version_info__ >= (0, 11), reason="a plain Optimistix solve leaks there, too"
)
def test_nothing_leaks():
    deq = inn.DeepEquilibriumNetwork(dense_cell(), SOLVERS["anderson"])
    with jax.checking_leaks():
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(deq(x))))(make_vector(4))
    assert jnp.all(jnp.isfinite(gradient))
