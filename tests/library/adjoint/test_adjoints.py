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

from ..helpers import is_double, make_matrix, make_vector, relative_error, tolerance


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

SOLVER_OF_ITS_OWN = {"shine": "broyden", "reversible": "reversible"}
REVERSE_MODE_ONLY = {"reversible", "unrolled"}
# The LU factorisation of JAX is for float32 and float64, and `FixedPointIteration`
# changes the dtype of its state.
NOT_IN_HALF_PRECISION = {"newton", "chord", "fixed_point_iteration", "optx_implicit"}

PAIRS = [
    (name, solver_name)
    for name in ADJOINTS
    for solver_name in SOLVERS
    if SOLVER_OF_ITS_OWN.get(name, solver_name) == solver_name
]
PAIRS_IN_HALF_PRECISION = [
    pair
    for pair in PAIRS
    if not set(pair) & NOT_IN_HALF_PRECISION
    # With that few digits a least-squares problem has no derivative.
    and pair != ("unrolled", "anderson")
]


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
        for step in (1e-5, -1e-5)
    ]
    return [(a - b) / 2e-5 for a, b in zip(*ends, strict=True)]


def loss(weight, x, adjoint, solver):
    """A closure over a differentiated value, and an argument."""

    def fn(z, x):
        return cell(z, (weight, x))

    sol = optx.fixed_point(
        fn, solver, jnp.zeros_like(x), x, adjoint=adjoint, throw=False, max_steps=200
    )
    return jnp.sum(LOSS_WEIGHTS.astype(x.dtype) * sol.value)


class Transformations(NamedTuple):
    """What a program has besides the gradient of a batch's total loss."""

    forward_mode: bool  # over the gradient, so the second order, too
    vmap_of_grad: bool


def transformations(name, solver_name, dtype):
    """All that exists of an adjoint, with some solvers; the gradient with every one.

    Most adjoints do not differentiate the solver, and do the same whatever it is: to
    compile that again for every solver would take most of the time of these tests.
    """
    representative = solver_name in ("anderson", "newton", SOLVER_OF_ITS_OWN.get(name))
    full = dtype is None
    return Transformations(
        forward_mode=name not in REVERSE_MODE_ONLY and (full or representative),
        vmap_of_grad=full and (representative or not is_double()),
    )


def derivatives(adjoint, solver, which, weight, xs):
    """Values; the gradient of their sum; its derivative along ones; each by itself."""

    def value_and_grad(weight, xs):
        def total(weight, xs):
            values = jax.vmap(lambda x: loss(weight, x, adjoint, solver))(xs)
            return jnp.sum(values), values

        (_, values), grads = jax.value_and_grad(total, (0, 1), has_aux=True)(weight, xs)
        return values, grads

    tangents = apart = None
    if which.forward_mode:
        ones = jnp.ones_like(weight), jnp.ones_like(xs)
        out, tangents = jax.jvp(value_and_grad, (weight, xs), ones)
    else:
        out = value_and_grad(weight, xs)
    if which.vmap_of_grad:
        grad = jax.grad(loss, argnums=(0, 1))
        apart = jax.vmap(lambda x: grad(weight, x, adjoint, solver))(xs)
    return out, tangents, apart


@pytest.mark.parametrize(
    "name, solver_name, dtype",
    # The precision of the suite, and half of one.
    [
        *(pytest.param(*pair, None, id="-".join(pair)) for pair in PAIRS),
        *(
            pytest.param(
                *(*pair, jnp.bfloat16),
                id="-".join((*pair, "half")),
                marks=pytest.mark.one_precision,
            )
            for pair in PAIRS_IN_HALF_PRECISION
        ),
    ],
)
def test_every_adjoint_with_every_solver(name, solver_name, dtype):
    """One program for each, as compiling is what takes the time."""
    adjoint = ADJOINTS[name]
    solver = SOLVERS[solver_name](TOL if dtype is None else 0.02)
    which = transformations(name, solver_name, dtype)
    program = jax.jit(ft.partial(derivatives, adjoint, solver, which))
    inputs = jtu.tree_map(lambda a: a.astype(dtype or a.dtype), (WEIGHT, XS))
    out = program(*inputs)
    assert all(leaf.dtype == inputs[0].dtype for leaf in jtu.tree_leaves(out))
    (values, (grad_weight, grad_xs)), tangents, apart = out
    num_terms = 1 if name == "jacobian_free" else MANY
    tols = Tolerances.of(name, dtype)
    roots = [equilibrium(WEIGHT, x) for x in XS]
    exact = [np.sum(np.asarray(LOSS_WEIGHTS, float) * root) for root in roots]
    assert np.allclose(values, exact, rtol=0, atol=tols.value)
    expected = [series_gradient(WEIGHT, x, num_terms) for x in XS]
    for i, grad in enumerate(expected):
        assert relative_error(grad_xs[i], grad[1]) < tols.gradient
        if apart is not None:
            got = jtu.tree_map(lambda g, i=i: g[i], apart)
            assert relative_error(got, grad) < tols.gradient
    assert relative_error(grad_weight, sum(g for g, _ in expected)) < tols.gradient
    if tangents is not None:
        t_values, (second_weight, second_xs) = tangents
        along = [np.sum(g_weight) + np.sum(g_x) for g_weight, g_x in expected]
        assert np.allclose(t_values, along, rtol=tols.gradient, atol=tols.gradient)
        seconds = [
            series_second_derivative(
                np.asarray(WEIGHT, float),
                np.asarray(x, float),
                num_terms,
                root if name == "jacobian_free" else None,
            )
            for x, root in zip(XS, roots, strict=True)
        ]
        for i, second in enumerate(seconds):
            assert relative_error(second_xs[i], second[1]) < tols.second
        wanted = sum(second for second, _ in seconds)
        assert relative_error(second_weight, wanted) < tols.second


@pytest.mark.parametrize(
    "name, solver_name",
    [
        (name, solver_name)
        for name, own in SOLVER_OF_ITS_OWN.items()
        for solver_name in SOLVERS
        if solver_name != own
    ],
)
def test_an_adjoint_for_one_solver_names_the_other(name, solver_name):
    solver = SOLVERS[solver_name](TOL)
    with pytest.raises(TypeError, match=f"{type(solver).__name__}"):
        jax.eval_shape(lambda x: loss(WEIGHT, x, ADJOINTS[name], solver), XS[0])


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
    solver_name = {
        inn.ShineAdjoint: "broyden",
        inn.ReversibleAdjoint: "reversible",
    }.get(type(adjoint), "fixed_point_iteration")
    solver = SOLVERS[solver_name](1e-2)

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


class Inner(eqx.Module):
    weight: jax.Array

    def __call__(self, z, x):
        return 0.6 * jnp.sin(self.weight @ z + x["scale"] * x["input"])


class Outer(eqx.Module):
    inner: inn.DeepEquilibriumNetwork

    def __call__(self, z, x):
        inner = self.inner({**x, "input": x["input"] + z}, z0=jnp.zeros(SIZE))
        return 0.4 * jnp.cos(inner + z)


def nested_loss(x, weight, adjoint):
    """A layer in a layer and another one, in a `scan`, with an integer in the input."""
    solver = SOLVERS["anderson"](TOL)
    inner = inn.DeepEquilibriumNetwork(Inner(weight), solver, adjoint=adjoint)
    outer = inn.DeepEquilibriumNetwork(Outer(inner), solver, adjoint=adjoint)

    def advance(carry, _):
        inputs = {"input": carry, "scale": jnp.array(2.0), "index": jnp.array(1)}
        z = outer(inputs, z0=jnp.zeros(SIZE))
        other = inner(inputs, z0=jnp.zeros(SIZE))
        return z + 0.1 * other, jnp.sum(z[:2] ** 2)

    end, sums = jax.lax.scan(advance, x, length=2)
    return jnp.sum(sums) + jnp.sum(LOSS_WEIGHTS * end)


@pytest.fixture(scope="module")
def nested_values():
    """Without derivatives, and so the same under every adjoint: here, and shifted."""
    adjoint = inn.JacobianFreeAdjoint()
    step, direction = tolerance(4e-2, 1e-5), make_vector(SIZE, seed=11)
    program = jax.jit(ft.partial(nested_loss, weight=WEIGHT, adjoint=adjoint))

    def central(step):
        above, below = (program(XS[0] + s * direction) for s in (step, -step))
        return (above - below) / (2 * step)

    # Of fourth order, so that the step may be long, and rounding is little beside it.
    along = (4 * central(step) - central(2 * step)) / 3
    return program(XS[0]), along, direction


@pytest.mark.parametrize(
    "adjoint",
    (inn.ImplicitAdjoint(TIGHT), inn.PhantomAdjoint(60), inn.NeumannAdjoint(60)),
    ids=lambda adjoint: type(adjoint).__name__,
)
def test_layers_in_layers_in_losses(adjoint, nested_values):
    expected, along, direction = nested_values
    program = jax.jit(jax.value_and_grad(nested_loss, argnums=(0, 1)), static_argnums=2)
    value, (grad_x, grad_weight) = program(XS[0], WEIGHT, adjoint)
    assert np.allclose(value, expected, rtol=tolerance(2e-5, 1e-9))
    assert np.allclose(
        jnp.sum(grad_x * direction), along, rtol=tolerance(2e-3, 1e-7), atol=1e-6
    )
    assert jnp.all(grad_weight != 0)
