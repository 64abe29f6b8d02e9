"""The adjoints beside the implicit one, and what they report."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
import pytest

import implicitnets as inn

from .helpers import make_matrix, make_vector, relative_error, tolerance


SIZE = 3
WEIGHT = make_matrix(SIZE, 0.8)
XS = jnp.stack([0.5 * make_vector(SIZE), jnp.zeros(SIZE), make_vector(SIZE, seed=4)])
LOSS_WEIGHTS = make_vector(SIZE, seed=3)
TOL = tolerance(1e-6, 1e-12)
TIGHT = inn.GivensGMRES(rtol=tolerance(1e-6, 1e-12), atol=0.0)

SOLVERS = {
    "anderson": inn.AndersonAcceleration(TOL, TOL),
    "fixed_point_iteration": optx.FixedPointIteration(TOL, TOL),
    "newton": optx.Newton(TOL, TOL),
    "chord": optx.Chord(TOL, TOL),
    "newton_krylov": inn.NewtonKrylov(TOL, TOL),
    "broyden": inn.Broyden(TOL, TOL, history_size=5),
    "steady_state": inn.SteadyState(dfx.Euler(), TOL, TOL),
}

# With how many terms of the series each agrees; the exact ones with very many.
MANY = 200
ADJOINTS = {
    "implicit": (inn.ImplicitAdjoint(TIGHT), MANY, 0.0),
    "jacobian_free": (inn.JacobianFreeAdjoint(), 1, 0.0),
    "phantom": (inn.PhantomAdjoint(5, 0.3), 5, 0.3),
    "neumann": (inn.NeumannAdjoint(5, 0.3), 5, 0.3),
    "shine": (inn.ShineAdjoint(SIZE), MANY, 0.0),
}


def cell(z, args):
    weight, x = args
    return jnp.tanh(weight @ z + x)


def equilibrium(weight, x):
    """In NumPy, in float64."""
    weight, x = np.asarray(weight, float), np.asarray(x, float)
    z = np.zeros(x.shape)
    for _ in range(1000):
        z = np.tanh(weight @ z + x)
    return z


def series_gradient(weight, x, num_terms, damping):
    """The gradient of `sum(LOSS_WEIGHTS * z)` by the first terms of the series."""
    z = equilibrium(weight, x)
    slope = np.diag(1 - z**2)
    jacobian = slope @ np.asarray(weight, float)
    factor = damping * np.eye(SIZE) + (1 - damping) * jacobian
    term, u = (1 - damping) * np.asarray(LOSS_WEIGHTS, float), np.zeros(SIZE)
    for _ in range(num_terms):
        u, term = u + term, factor.T @ term
    return np.outer(slope @ u, z), slope @ u


def loss(weight, x, adjoint, solver):
    def fn(z, x):
        return cell(z, (weight, x))

    sol = optx.fixed_point(
        fn, solver, jnp.zeros_like(x), x, adjoint=adjoint, throw=False, max_steps=400
    )
    return jnp.sum(LOSS_WEIGHTS.astype(x.dtype) * sol.value)


@eqx.filter_jit
def per_example(weight, xs, adjoint, solver):
    """`vmap` of `grad`."""
    gradient = jax.value_and_grad(loss, argnums=(0, 1))
    return jax.vmap(lambda x: gradient(weight, x, adjoint, solver))(xs)


@pytest.mark.parametrize("solver_name", SOLVERS)
@pytest.mark.parametrize("name", ADJOINTS)
def test_every_solver(name, solver_name):
    """A closure over a differentiated value, an argument, and `vmap` of `grad`."""
    adjoint, num_terms, damping = ADJOINTS[name]
    solver = SOLVERS[solver_name]
    if name == "shine" and solver_name != "broyden":
        with pytest.raises(TypeError, match=f"Broyden.*{type(solver).__name__}"):
            loss(WEIGHT, XS[0], adjoint, solver)
        return
    values, grads = per_example(WEIGHT, XS, adjoint, solver)
    for i, x in enumerate(XS):
        exact = np.sum(np.asarray(LOSS_WEIGHTS, float) * equilibrium(WEIGHT, x))
        assert np.allclose(values[i], exact, atol=tolerance(1e-4, 1e-10))
        expected = series_gradient(WEIGHT, x, num_terms, damping)
        got = jtu.tree_map(lambda g, i=i: g[i], grads)
        assert relative_error(got, expected) < tolerance(1e-4, 1e-9)


SOLVER_OF = {name: "broyden" if name == "shine" else "newton" for name in ADJOINTS}


@pytest.mark.parametrize("name", ADJOINTS)
def test_every_transformation(name):
    """`grad` of `vmap`, and forward mode."""
    adjoint, num_terms, damping = ADJOINTS[name]
    solver = SOLVERS[SOLVER_OF[name]]

    @jax.jit
    def transformed(weight, xs):
        def total(weight, xs):
            losses = jax.vmap(lambda x: loss(weight, x, adjoint, solver))
            return jnp.sum(losses(xs))

        grads = jax.grad(total, argnums=(0, 1))(weight, xs)
        tangents = jnp.ones_like(weight), jnp.ones_like(xs)
        return grads, jax.jvp(total, (weight, xs), tangents)[1]

    (g_weight, g_xs), tangent = transformed(WEIGHT, XS)
    expected = [series_gradient(WEIGHT, x, num_terms, damping) for x in XS]
    expected = sum(g for g, _ in expected), np.stack([g for _, g in expected])
    assert relative_error((g_weight, g_xs), expected) < tolerance(1e-4, 1e-9)
    along = float(jnp.sum(g_weight) + jnp.sum(g_xs))
    assert np.allclose(float(tangent), along, rtol=tolerance(1e-4, 1e-9))


@pytest.mark.parametrize(
    "adjoint, solver_name",
    (
        (inn.PhantomAdjoint(MANY), "newton"),
        (inn.NeumannAdjoint(MANY), "newton"),
        (inn.ShineAdjoint(SIZE), "broyden"),
    ),
)
def test_second_order(adjoint, solver_name):
    """With so many terms or steps that each derivative is exact."""
    x, direction = XS[0], make_vector(SIZE, seed=9)

    @jax.jit
    def hessian_product(x):
        def gradient(x):
            return jax.grad(loss, argnums=1)(WEIGHT, x, adjoint, SOLVERS[solver_name])

        return jax.jvp(gradient, (x,), (direction,))[1]

    shifted = [
        series_gradient(WEIGHT, np.asarray(x + sign * 1e-3 * direction, float), MANY, 0)
        for sign in (1, -1)
    ]
    difference = (shifted[0][1] - shifted[1][1]) / 2e-3
    assert relative_error(hessian_product(x), difference) < tolerance(2e-3, 1e-5)


@pytest.mark.parametrize("name", ("phantom", "neumann", "shine"))
def test_half_precision(name):
    adjoint, num_terms, damping = ADJOINTS[name]
    weight, x = WEIGHT.astype(jnp.bfloat16), XS[0].astype(jnp.bfloat16)
    solver = inn.Broyden(0.02, 0.02, history_size=3)
    gradient = eqx.filter_jit(jax.grad(loss, argnums=(0, 1)))
    grads = gradient(weight, x, adjoint, solver)
    assert all(g.dtype == jnp.bfloat16 for g in grads)
    expected = series_gradient(weight, x, num_terms, damping)
    assert relative_error(grads, expected) < 0.1


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
    exact = series_gradient(WEIGHT, XS[0], MANY, 0)
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
            return scale * loss(WEIGHT, x, adjoint, SOLVERS["anderson"])

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
    solver = SOLVERS["anderson"]

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
    assert np.allclose(value, evaluate(params), rtol=1e-6)
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
