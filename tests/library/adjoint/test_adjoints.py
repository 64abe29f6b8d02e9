"""Every adjoint with every solver, in every transformation, and what is special."""

import functools as ft
from typing import NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
import pytest

import implicitnets as inn

from ..helpers import make_matrix, make_vector, relative_error, tolerance


SIZE = 3
WEIGHT = make_matrix(SIZE, 0.8)
XS = jnp.stack([0.5 * make_vector(SIZE), 0.1 * jnp.ones(SIZE), make_vector(SIZE, 4)])
LOSS_WEIGHTS = make_vector(SIZE, seed=3)
TOL = tolerance(1e-6, 1e-12)
TIGHT = inn.GivensGMRES(rtol=tolerance(1e-6, 1e-12), atol=0.0)

SOLVERS = {
    "anderson": lambda tol: inn.AndersonAcceleration(tol, tol),
    "broyden": lambda tol: inn.Broyden(tol, tol, history_size=5),
    "newton_krylov": lambda tol: inn.NewtonKrylov(tol, tol),
    "steady_state": lambda tol: inn.SteadyState(dfx.Euler(), tol, tol),
    "reversible": lambda tol: inn.ReversibleFixedPoint(tol, tol),
    "fixed_point_iteration": lambda tol: optx.FixedPointIteration(tol, tol),
    "newton": lambda tol: optx.Newton(tol, tol),
    "chord": lambda tol: optx.Chord(tol, tol),
}

# An adjoint is exact, but for `JacobianFreeAdjoint`. So many terms of a series are.
MANY = 200
ADJOINTS = {
    "implicit": inn.ImplicitAdjoint(TIGHT),
    "jacobian_free": inn.JacobianFreeAdjoint(),
    "phantom": inn.PhantomAdjoint(MANY),
    "neumann": inn.NeumannAdjoint(MANY),
    "shine": inn.ShineAdjoint(SIZE),
    "reversible": inn.ReversibleAdjoint(inn.ImplicitAdjoint(TIGHT)),
    "optx_implicit": optx.ImplicitAdjoint(),
    "unrolled": optx.RecursiveCheckpointAdjoint(),
}

# What does not exist.
SOLVER_OF_ITS_OWN = {"shine": "broyden", "reversible": "reversible"}
REVERSE_MODE_ONLY = {"reversible", "unrolled"}
# The LU factorisation of JAX is for float32 and float64, and `FixedPointIteration`
# changes the dtype of its state.
NOT_IN_HALF_PRECISION = {"newton", "chord", "fixed_point_iteration", "optx_implicit"}


class Tolerances(NamedTuple):
    """Of the value, absolute, and of the two derivatives, relative."""

    value: float
    gradient: float
    second: float

    @classmethod
    def of(cls, name, dtype):
        if dtype is not None:
            return cls(0.05, 0.3 if name in REVERSE_MODE_ONLY else 0.1, 0.3)
        value, second = tolerance(1e-4, 1e-10), tolerance(2e-3, 1e-6)
        # The derivative of an iterate comes later to rest than the iterate.
        if name == "unrolled":
            return cls(value, tolerance(1e-2, 1e-5), second)
        return cls(value, tolerance(1e-4, 1e-9), second)


def cell(z, args):
    weight, x = args
    return jnp.tanh(weight @ z + x)


def equilibrium(weight, x):
    """In NumPy, in float64."""
    weight, x = np.asarray(weight, float), np.asarray(x, float)
    z = np.zeros(x.shape)
    for _ in range(300):
        z = np.tanh(weight @ z + x)
    return z


def series_gradient(weight, x, num_terms, damping=0.0, root=None):
    """The gradient of `sum(LOSS_WEIGHTS * z)` by the first terms of the series."""
    weight, x = np.asarray(weight, float), np.asarray(x, float)
    root = equilibrium(weight, x) if root is None else root
    slope = np.diag(1 - np.tanh(weight @ root + x) ** 2)
    factor = damping * np.eye(SIZE) + (1 - damping) * slope @ weight
    term, u = (1 - damping) * np.asarray(LOSS_WEIGHTS, float), np.zeros(SIZE)
    for _ in range(num_terms):
        u, term = u + term, factor.T @ term
    return np.outer(slope @ u, root), slope @ u


def series_second_derivative(weight, x, num_terms, root):
    """Along ones, by finite differences; around a fixed root unless that is `None`."""
    ends = [
        series_gradient(weight + step, x + step, num_terms, root=root)
        for step in (1e-4, -1e-4)
    ]
    return [(a - b) / 2e-4 for a, b in zip(*ends, strict=True)]


def loss(weight, x, adjoint, solver):
    """A closure over a differentiated value, and an argument."""

    def fn(z, x):
        return cell(z, (weight, x))

    sol = optx.fixed_point(
        fn, solver, jnp.zeros_like(x), x, adjoint=adjoint, throw=False, max_steps=200
    )
    return jnp.sum(LOSS_WEIGHTS.astype(x.dtype) * sol.value)


def derivatives(adjoint, solver, forward_mode, weight, xs):
    """`vmap` of `grad`; forward mode of that, so the second order; `grad` of `vmap`."""

    def value_and_grad(weight, x):
        return jax.value_and_grad(loss, argnums=(0, 1))(weight, x, adjoint, solver)

    def of_example(x):
        if not forward_mode:
            return value_and_grad(weight, x), None
        tangents = jnp.ones_like(weight), jnp.ones_like(x)
        return jax.jvp(value_and_grad, (weight, x), tangents)

    def total(weight, xs):
        return jnp.sum(jax.vmap(lambda x: loss(weight, x, adjoint, solver))(xs))

    return jax.vmap(of_example)(xs), jax.grad(total, argnums=(0, 1))(weight, xs)


@pytest.mark.parametrize(
    "dtype",
    # The precision of the suite, and half of one.
    (None, pytest.param(jnp.bfloat16, marks=pytest.mark.one_precision)),
    ids=("full", "half"),
)
@pytest.mark.parametrize("solver_name", SOLVERS)
@pytest.mark.parametrize("name", ADJOINTS)
def test_every_adjoint_with_every_solver(name, solver_name, dtype):
    """All that exists of it in one program, as it is compiling that takes the time."""
    adjoint, solver = (
        ADJOINTS[name],
        SOLVERS[solver_name](TOL if dtype is None else 0.02),
    )
    if SOLVER_OF_ITS_OWN.get(name, solver_name) != solver_name:
        with pytest.raises(TypeError, match=f"{type(solver).__name__}"):
            jax.eval_shape(lambda x: loss(WEIGHT, x, adjoint, solver), XS[0])
        return
    if dtype is not None:
        if {name, solver_name} & NOT_IN_HALF_PRECISION:
            pytest.skip("It does not exist.")
        if (name, solver_name) == ("unrolled", "anderson"):
            pytest.skip(
                "With that few digits a least-squares problem has no derivative."
            )
    forward_mode = name not in REVERSE_MODE_ONLY
    program = jax.jit(ft.partial(derivatives, adjoint, solver, forward_mode))
    inputs = jtu.tree_map(lambda a: a.astype(dtype or a.dtype), (WEIGHT, XS))
    ((values, grads), tangents), (total_weight, grad_xs) = program(*inputs)
    for out in jtu.tree_leaves((values, grads, tangents, total_weight, grad_xs)):
        assert out.dtype == inputs[0].dtype
    num_terms = 1 if name == "jacobian_free" else MANY
    tols = Tolerances.of(name, dtype)
    expected = [series_gradient(WEIGHT, x, num_terms) for x in XS]
    for i, x in enumerate(XS):
        root = equilibrium(WEIGHT, x)
        exact = np.sum(np.asarray(LOSS_WEIGHTS, float) * root)
        assert np.allclose(values[i], exact, rtol=0, atol=tols.value)
        got = jtu.tree_map(lambda g, i=i: g[i], grads)
        assert relative_error(got, expected[i]) < tols.gradient
        if forward_mode:
            tangent, second = jtu.tree_map(lambda g, i=i: g[i], tangents)
            along = np.sum(expected[i][0]) + np.sum(expected[i][1])
            assert np.allclose(tangent, along, rtol=tols.gradient, atol=tols.gradient)
            root = root if name == "jacobian_free" else None
            wanted = series_second_derivative(
                np.asarray(WEIGHT, float), np.asarray(x, float), num_terms, root
            )
            assert relative_error(second, wanted) < tols.second
    assert relative_error(total_weight, sum(g for g, _ in expected)) < tols.gradient
    grad_xs_error = relative_error(grad_xs, np.stack([g for _, g in expected]))
    assert grad_xs_error < tols.gradient


@pytest.mark.parametrize(
    "adjoint, needs_jacobian",
    (
        (inn.ImplicitAdjoint(), True),
        (
            inn.ImplicitAdjoint(
                inn.FixedPointLinearSolver(inn.AndersonAcceleration(1e-3, 0.0))
            ),
            True,
        ),
        (inn.NeumannAdjoint(2), True),
        (inn.PhantomAdjoint(2), True),
        (inn.JacobianFreeAdjoint(), False),
        (inn.ShineAdjoint(), False),
        (inn.ShineAdjoint(2), True),
        (inn.ReversibleAdjoint(), True),
    ),
)
def test_what_is_not_finite_gives_nan(adjoint, needs_jacobian):
    """A cotangent, or the Jacobian; and never a zero, nor a neighbour's gradient."""
    reversible = isinstance(adjoint, inn.ReversibleAdjoint)
    solver = SOLVERS["reversible" if reversible else "broyden"](1e-2)

    def fn(z, args):
        x, square = args
        # Of the square root of zero, the derivative is infinite; and times zero.
        return cell(z, (WEIGHT, x)) + jnp.sqrt(square + 0 * z) - jnp.sqrt(square)

    @jax.jit
    @jax.vmap
    @jax.grad
    def gradient(x, scale, square):
        args = x, square
        sol = optx.fixed_point(fn, solver, 0 * x, args, adjoint=adjoint, throw=False)
        return scale * jnp.sum(sol.value)

    scales, squares = jnp.array([1.0, jnp.nan, 1.0]), jnp.array([1.0, 1.0, 0.0])
    grads = gradient(jnp.ones((3, SIZE)), scales, squares)
    assert jnp.all(jnp.isfinite(grads[0])) and jnp.all(jnp.isnan(grads[1]))
    assert jnp.all(jnp.isnan(grads[2])) == needs_jacobian


@pytest.mark.parametrize(
    "adjoint",
    (inn.ImplicitAdjoint(), inn.PhantomAdjoint(), inn.ReversibleAdjoint()),
    ids=lambda adjoint: type(adjoint).__name__,
)
def test_auxiliary_output_has_no_gradient(adjoint):
    """An error when traced, unless nothing asks for it."""

    def fn(z, x):
        return 0.5 * jnp.tanh(z) + x, (2 * z, jnp.array(1))

    def both(x):
        solver = inn.ReversibleFixedPoint(1e-3, 0.0)
        sol = optx.fixed_point(
            fn, solver, 0 * x, x, has_aux=True, adjoint=adjoint, throw=False
        )
        return jnp.sum(sol.value), jnp.sum(sol.aux[0])

    def trace(loss):
        return eqx.filter_eval_shape(jax.grad(loss, has_aux=True), jnp.ones(2))

    assert trace(both)[0].shape == (2,)
    with pytest.raises(RuntimeError, match="`sol.aux`, has no gradient"):
        trace(lambda x: (both(x)[1], None))


def known_root(adjoint, weight, x):
    """The derivative alone: no solver, and so hardly anything to compile."""

    def primal_fn(inputs):
        _, _, root, *_ = inputs
        return root, None

    def rewrite_fn(z, aux, inputs):
        del aux
        weight, x, *_ = inputs
        return cell(z, (weight, x)) - z

    root = jnp.asarray(equilibrium(weight, x), x.dtype)

    def total(weight, x):
        inputs = weight, x, root
        value, _ = adjoint.apply(primal_fn, rewrite_fn, inputs, frozenset())
        return jnp.sum(LOSS_WEIGHTS * value)

    return jax.grad(total, argnums=(0, 1))(weight, x)


@pytest.mark.parametrize("kind", (inn.PhantomAdjoint, inn.NeumannAdjoint))
def test_every_step_improves(kind):
    damped = known_root(kind(5, 0.3), WEIGHT, XS[0])
    expected = series_gradient(WEIGHT, XS[0], 5, 0.3)
    assert relative_error(damped, expected) < tolerance(1e-5, 1e-12)
    exact = series_gradient(WEIGHT, XS[0], MANY)
    grads = [known_root(kind(k), WEIGHT, XS[0]) for k in (1, 2, 5, 20)]
    errors = [relative_error(g, exact) for g in grads]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.05 * errors[0]
    jacobian_free = known_root(inn.JacobianFreeAdjoint(), WEIGHT, XS[0])
    assert relative_error(grads[0], jacobian_free) < tolerance(1e-6, 1e-14)
    assert relative_error(grads[1], jacobian_free) > 0.1


@pytest.mark.parametrize("adjoint", (inn.PhantomAdjoint(3), inn.NeumannAdjoint(3)))
def test_scale_invariance(adjoint):
    def gradient(scale):
        def scaled_loss(x):
            return scale * loss(WEIGHT, x, adjoint, SOLVERS["anderson"](TOL))

        return jax.grad(scaled_loss)(XS[0]) / scale

    gradient = jax.jit(gradient)
    for scale in (1e-8, 1e-30):
        assert relative_error(gradient(scale), gradient(1.0)) < tolerance(1e-5, 1e-13)


def test_value_where_the_steps_of_the_derivative_overflow():
    """A phantom gradient may be of no use, but the value is the solver's."""

    def fn(z, x):
        return 3 * z**3 + x

    adjoint = inn.PhantomAdjoint(20)
    root = jnp.array([4.0])

    def value(x):
        out, _ = adjoint.apply(
            lambda inputs: (inputs[1], None),
            lambda z, aux, inputs: fn(z, inputs[0]) - z,
            (x, root),
            frozenset(),
        )
        return out[0]

    assert value(jnp.ones(1)) == 4
    assert jax.value_and_grad(value)(jnp.ones(1))[0] == 4


@pytest.mark.parametrize(
    "adjoint",
    (inn.ImplicitAdjoint(TIGHT), inn.PhantomAdjoint(60), inn.NeumannAdjoint(60)),
)
def test_layers_in_layers_in_losses(adjoint):
    """A layer in a layer and another one, in a `scan`, with an integer in the input."""
    solver = SOLVERS["anderson"](TOL)

    class Inner(eqx.Module):
        weight: jax.Array

        def __call__(self, z, x):
            return 0.6 * jnp.sin(self.weight @ z + x["scale"] * x["input"])

    class Outer(eqx.Module):
        inner: inn.DeepEquilibriumNetwork

        def __call__(self, z, x):
            inner = self.inner({**x, "input": x["input"] + z}, z0=jnp.zeros(SIZE))
            return 0.4 * jnp.cos(inner + z)

    inner = inn.DeepEquilibriumNetwork(Inner(WEIGHT), solver, adjoint=adjoint)
    outer = inn.DeepEquilibriumNetwork(Outer(inner), solver, adjoint=adjoint)

    def model_loss(params):
        layer, x = params

        def advance(carry, _):
            inputs = {"input": carry, "scale": jnp.array(2.0), "index": jnp.array(1)}
            z = layer(inputs, z0=jnp.zeros(SIZE))
            other = layer.cell.inner(inputs, z0=jnp.zeros(SIZE))
            return z + 0.1 * other, jnp.sum(z[:2] ** 2)

        end, sums = jax.lax.scan(advance, x, length=2)
        return jnp.sum(sums) + jnp.sum(LOSS_WEIGHTS * end)

    params, direction = (outer, XS[0]), make_vector(SIZE, seed=11)
    value, grads = eqx.filter_jit(eqx.filter_value_and_grad(model_loss))(params)
    step = tolerance(1e-2, 1e-5)
    evaluate = eqx.filter_jit(model_loss)
    shifted = [evaluate((outer, XS[0] + s * step * direction)) for s in (1, -1)]
    along = (shifted[0] - shifted[1]) / (2 * step)
    assert np.allclose(value, evaluate(params), rtol=tolerance(2e-5, 1e-9))
    assert np.allclose(
        jnp.sum(grads[1] * direction), along, rtol=tolerance(2e-3, 1e-7), atol=1e-6
    )
    assert jnp.all(grads[0].cell.inner.cell.weight != 0)


@pytest.mark.parametrize(
    "make, match",
    (
        (lambda: inn.PhantomAdjoint(0), "num_steps.*0"),
        (lambda: inn.PhantomAdjoint(2, 1.0), "damping.*1.0"),
        (lambda: inn.NeumannAdjoint(0), "num_terms.*0"),
        (lambda: inn.NeumannAdjoint(2, -0.5), "damping.*-0.5"),
        (lambda: inn.ShineAdjoint(-1), "refinement_steps.*-1"),
    ),
)
def test_hyperparameters_are_checked(make, match):
    with pytest.raises(ValueError, match=match):
        make()
