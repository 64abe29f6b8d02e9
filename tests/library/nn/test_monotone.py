import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
import pytest

import implicitnets as inn
from implicitnets import ForwardBackward, nn, PeacemanRachford

from ..helpers import (
    dense_cell,
    dense_gradient,
    loss_weights,
    make_vector,
    relative_error,
    tolerance,
    weighted_sum,
)


SOLVERS = {"forward_backward": ForwardBackward, "peaceman_rachford": PeacemanRachford}
# Without the estimate of the step size, which takes time to compile.
SET_STEPS = {
    "forward_backward": ft.partial(ForwardBackward, step_size=0.1),
    "peaceman_rachford": ft.partial(PeacemanRachford, step_size=0.5),
}
SHAPES = {"dense": (6,), "periodic": (3, 5, 4), "zeros": (3, 5, 4)}


def make_cell(
    name: str, *, margin=0.5, scale=1.0, dtype=None
) -> nn.AbstractMonotoneCell:
    options = {"margin": margin, "dtype": dtype, "key": jr.key(0)}
    if name == "dense":
        cell = nn.MonotoneCell(2, 6, **options)
    else:
        periodic = name == "periodic"
        cell = nn.MonotoneConvCell(2, 2, 3, 3, periodic=periodic, **options)
    return eqx.tree_at(
        lambda c: (c.weight.a, c.weight.b), cell, replace_fn=lambda w: scale * w
    )


def make_input(name: str, seed: int = 1):
    shape = (2, *SHAPES[name][1:])
    return 10 * make_vector(int(np.prod(shape)), seed).reshape(shape)


def make_layer(name, solver, **kwargs) -> inn.DeepEquilibriumNetwork:
    return inn.DeepEquilibriumNetwork(
        make_cell(name, **kwargs),
        solver,
        zero_state=lambda x: jnp.zeros(SHAPES[name], x.dtype),
        max_steps=5000,
    )


def matrix_of(linear, shape) -> np.ndarray:
    zeros = jnp.zeros(shape)
    jacobian = jax.jit(jax.jacfwd(linear))(zeros)
    return np.asarray(jacobian, float).reshape(zeros.size, zeros.size)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("scale", (1.0, 30.0))
def test_margin_whatever_the_parameters(name, scale):
    cell = make_cell(name, margin=0.5, scale=scale)
    w = matrix_of(cell.linear, SHAPES[name])
    symmetric = np.eye(len(w)) - (w + w.T) / 2
    slack = tolerance(1e-6, 1e-13) * np.linalg.norm(w, 2)
    assert np.linalg.eigvalsh(symmetric).min() >= 0.5 - slack
    assert np.linalg.norm(w - w.T) > 0.1


@pytest.mark.parametrize("shape", ((3, 5, 4), (3, 2, 1)))
def test_composed_kernel_is_the_composition(shape):
    """Also where the kernel is larger than the domain."""
    cell = make_cell("periodic", margin=0.5)

    def convolve(kernel, z):
        z = jnp.pad(z, [(0, 0), (1, 1), (1, 1)], mode="wrap")
        return jax.lax.conv_general_dilated(z[None], kernel, (1, 1), "VALID")[0]

    a = matrix_of(lambda z: convolve(cell.weight.a, z), shape)
    b = matrix_of(lambda z: convolve(cell.weight.b, z), shape)
    expected = (1 - 0.5) * np.eye(len(a)) - a.T @ a + b - b.T
    assert relative_error(matrix_of(cell.linear, shape), expected) < 1e-5


def test_dense_weight():
    cell = make_cell("dense", margin=0.5)
    a, b = (np.asarray(w, float) for w in (cell.weight.a, cell.weight.b))
    expected = (1 - 0.5) * np.eye(6) - a.T @ a + b - b.T
    assert relative_error(matrix_of(cell.linear, (6,)), expected) < 1e-5


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("step_size", (0.1, 3.0))
def test_resolvent(name, step_size):
    cell = nn.resolve(make_cell(name, scale=3.0))
    v = make_vector(int(np.prod(SHAPES[name]))).reshape(SHAPES[name])

    @jax.jit
    def there_and_back(v):
        resolvent = cell.resolvent(v, jnp.asarray(step_size, v.dtype))
        return resolvent(v + step_size * (v - cell.linear(v)))

    assert relative_error(there_and_back(v), v) < tolerance(1e-3, 1e-10)


def test_resolvent_differentiates():
    """Also where it is a linear solve: unrolling goes through it, in both modes."""
    cell = nn.resolve(make_cell("zeros", scale=3.0))
    v = make_vector(60).reshape(SHAPES["zeros"])
    inverse = np.linalg.inv(2 * np.eye(60) - matrix_of(cell.linear, v.shape))

    def apply(v):
        return cell.resolvent(v, jnp.ones((), v.dtype))(v)

    @jax.jit
    def derivatives(v):
        _, pull_back = jax.vjp(apply, v)
        return jax.jvp(apply, (v,), (jnp.cos(v),))[1], pull_back(jnp.cos(v))[0]

    forward, reverse = derivatives(v)
    u = np.cos(np.asarray(v, float)).ravel()
    assert relative_error(forward, (inverse @ u).reshape(v.shape)) < 1e-4
    assert relative_error(reverse, (inverse.T @ u).reshape(v.shape)) < 1e-4


def test_resolvent_of_a_sequence():
    cell = nn.resolve(nn.MonotoneConvCell(1, 2, 3, 5, key=jr.key(0)))
    v = make_vector(21).reshape(3, 7)

    @jax.jit
    def there_and_back(v):
        return cell.resolvent(v, jnp.ones((), v.dtype))(2 * v - cell.linear(v))

    assert relative_error(there_and_back(v), v) < 1e-5


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_converges_for_every_input(name, solver):
    """To the same equilibrium from anywhere."""
    deq = make_layer(name, SOLVERS[solver](1e-4, 0.0), scale=5.0)
    xs = jnp.stack([s * make_input(name, s) for s in range(1, 4)])
    z0s = 100 * jr.normal(jr.key(3), (3, *SHAPES[name]))
    run = eqx.filter_jit(
        lambda d, z0s: jax.vmap(lambda x, z: d.solve(x, z0=z))(xs, z0s)
    )
    sol = run(deq, z0s)
    assert jnp.all(sol.result == optx.RESULTS.successful)
    cell = nn.resolve(deq.cell)
    f = jax.jit(lambda zs, xs: jax.vmap(cell)(zs, xs))(sol.z_star, xs)
    for i in range(3):
        assert relative_error(sol.z_star[i], f[i]) <= 1.01e-4
        assert relative_error(f[i] - sol.residual[i], sol.z_star[i]) < 1e-5
    from_zero = run(deq, 0 * z0s)
    assert relative_error(sol.z_star, from_zero.z_star) < 2e-2


def test_plain_iteration_does_not_converge_there():
    deq = make_layer("dense", optx.FixedPointIteration(1e-4, 0.0), scale=5.0)
    sol = eqx.filter_jit(deq.solve)(make_input("dense"))
    assert sol.result != optx.RESULTS.successful


def test_peaceman_rachford_needs_few_steps():
    x = make_input("dense")
    steps = {}
    for name, solver in SOLVERS.items():
        deq = make_layer("dense", solver(1e-3, 0.0), margin=0.1, scale=4.0)
        sol = eqx.filter_jit(deq.solve)(x)
        assert sol.stats["nfe"] == sol.stats["num_steps"]
        steps[name] = int(sol.stats["nfe"])
    assert steps["peaceman_rachford"] <= 30 < steps["forward_backward"]


@pytest.mark.parametrize(
    "solver, adjoint",
    (
        ("forward_backward", inn.ImplicitAdjoint()),
        ("peaceman_rachford", inn.ImplicitAdjoint()),
        ("peaceman_rachford", optx.ImplicitAdjoint()),
    ),
)
def test_batch_is_as_alone_under_every_loop(solver, adjoint):
    cell = nn.resolve(make_cell("dense", scale=2.0))
    xs = jnp.stack([make_input("dense", s) * 10.0 ** (s - 2) for s in range(4)])

    def run(x):
        sol = optx.fixed_point(
            lambda z, args: args[0](z, args[1]),
            SET_STEPS[solver](1e-4, 1e-2),
            jnp.zeros(6),
            (cell, x),
            adjoint=adjoint,
            max_steps=2000,
            throw=False,
        )
        return sol.value, sol.stats["nfe"]

    values, nfe = jax.jit(jax.vmap(run))(xs)
    assert len(set(nfe.tolist())) > 1
    alone = jax.jit(run)
    for x, value, steps in zip(xs, values, nfe, strict=True):
        value_alone, steps_alone = alone(x)
        assert steps == steps_alone
        assert relative_error(value, value_alone) < 1e-4


@pytest.mark.parametrize("name", ("dense", "periodic"))
def test_implicit_gradient(name):
    solver = SET_STEPS["peaceman_rachford"](tolerance(1e-6, 1e-10), 0.0)
    deq = make_layer(name, solver, scale=2.0)
    x = make_input(name)
    z = eqx.filter_jit(deq)(x)
    weights = loss_weights(z)

    @eqx.filter_jit
    @eqx.filter_grad
    def grad(cell_and_x):
        cell, x = cell_and_x
        layer = eqx.tree_at(lambda d: d.cell, deq, cell)
        return weighted_sum(layer(x), weights)

    expected = dense_gradient(deq.cell, z, x, weights)
    assert relative_error(grad((deq.cell, x)), expected) < 1e-3


@pytest.mark.parametrize("solver", SOLVERS)
def test_unrolled_gradient(solver):
    deq = make_layer("dense", SET_STEPS[solver](tolerance(1e-6, 1e-8), 0.0))
    x = make_input("dense")

    @eqx.filter_jit
    def grad(adjoint):
        layer = eqx.tree_at(
            lambda d: (d.adjoint, d.max_steps),
            deq,
            (adjoint, 100),
            is_leaf=lambda x: x is deq.adjoint,
        )
        return jax.grad(lambda x: jnp.sum(jnp.sin(layer(x))))(x)

    unrolled = grad(optx.RecursiveCheckpointAdjoint())
    assert relative_error(unrolled, grad(inn.ImplicitAdjoint())) < 1e-2


@pytest.mark.parametrize("solver", SOLVERS)
def test_start_at_the_equilibrium_ends_there(solver):
    deq = make_layer("dense", SET_STEPS[solver](1e-4, 0.0))
    x = make_input("dense")
    run = eqx.filter_jit(lambda z0: deq.solve(x, z0=z0))
    sol = run(run(jnp.zeros(6)).z_star)
    assert sol.stats["num_steps"] == 1


@pytest.mark.parametrize("solver", SOLVERS)
def test_step_size_can_be_set_and_traced(solver):
    num_traces = 0

    @eqx.filter_jit
    def run(solver, x):
        nonlocal num_traces
        num_traces += 1
        return make_layer("dense", solver).solve(x)

    for step_size in (0.1, 0.05):
        sol = run(
            SOLVERS[solver](
                jnp.array(1e-3), jnp.array(0.0), step_size=jnp.array(step_size)
            ),
            make_input("dense"),
        )
        assert sol.result == optx.RESULTS.successful
    assert num_traces == 1


@pytest.mark.parametrize(
    "name, dtype",
    (("dense", jnp.bfloat16), ("dense", jnp.float32), ("periodic", jnp.bfloat16)),
)
def test_narrow_states(name, dtype):
    """Float32 also where float64 is on."""
    tol = 30 * float(jnp.finfo(dtype).eps)
    deq = make_layer(name, PeacemanRachford(tol, 0.0), dtype=dtype)
    sol = eqx.filter_jit(deq.solve)(make_input(name).astype(dtype))
    assert sol.z_star.dtype == dtype
    assert sol.result == optx.RESULTS.successful


@pytest.mark.parametrize("solver", SOLVERS)
def test_nonfinite_input_is_not_converged(solver):
    deq = make_layer("dense", SET_STEPS[solver](1e-3, 0.0))
    sol = eqx.filter_jit(deq.solve)(jnp.full(2, jnp.nan))
    assert sol.result == optx.RESULTS.nonfinite


def test_traced_and_composed():
    x = make_input("dense")
    cell = nn.weight_norm(make_cell("dense"))
    trace = eqx.filter_jit(inn.residual_trace)(
        nn.resolve(cell),
        PeacemanRachford(1e-3, 0.0, step_size=0.5),
        jnp.zeros(6),
        x,
        max_steps=50,
    )
    assert trace.result == optx.RESULTS.successful
    assert trace.relative[-1] < 1e-2 * trace.relative[0]


@pytest.mark.parametrize("solver", SOLVERS)
def test_other_cells_are_an_error(solver):
    deq = inn.DeepEquilibriumNetwork(dense_cell(), SOLVERS[solver](1e-3, 0.0))
    with pytest.raises(TypeError, match="AbstractMonotoneCell"):
        deq(make_vector(4))
    with pytest.raises(TypeError, match="AbstractMonotoneCell"):
        optx.fixed_point(lambda z, _: z, SOLVERS[solver](1e-3, 0.0), jnp.zeros(2))


def test_parameters_are_the_factors():
    cell = make_cell("dense")
    arrays = eqx.filter(cell, eqx.is_inexact_array)
    assert len(jtu.tree_leaves(arrays)) == 4
