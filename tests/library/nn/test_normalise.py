import copy
import io
from typing import Any

import equinox as eqx
import jax
import jax.extend.core as jec
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from jaxtyping import Array

import implicitnets as inn
from implicitnets import nn

from ..helpers import make_matrix, make_vector, relative_error, SumCell, tolerance


def sum_cell(size: int = 4) -> SumCell:
    hidden_key, inject_key = jr.split(jr.key(0))
    return SumCell(
        eqx.nn.Linear(size, size, key=hidden_key),
        eqx.nn.Linear(size, size, key=inject_key),
    )


def conv(num_dims: int = 2, transpose: bool = False, **kwargs) -> eqx.Module:
    kind = eqx.nn.ConvTranspose if transpose else eqx.nn.Conv
    kwargs = {"in_channels": 2, "out_channels": 4, "kernel_size": 3, **kwargs}
    return kind(num_dims, key=jr.key(1), **kwargs)


def operator_matrix(layer, in_shape) -> np.ndarray:
    """The matrix of a layer without its bias."""
    zeros = jnp.zeros(in_shape)
    jacobian = eqx.filter_jit(lambda fn: jax.jacfwd(fn)(zeros))(layer)
    jacobian = np.asarray(jacobian, float)
    return jacobian.reshape(-1, zeros.size)


NORMALISATIONS = {
    "weight": nn.weight_norm,
    "spectral": lambda cell: nn.spectral_norm(cell, bound=0.3),
    "infinity": lambda cell: nn.infinity_norm(cell, bound=0.3),
    "both": lambda cell: nn.spectral_norm(nn.weight_norm(cell), bound=0.3),
}


@pytest.fixture(params=("infinity", "both"))
def normalised(request):
    return NORMALISATIONS[request.param](sum_cell())


@pytest.mark.parametrize("layer, zeros", ((sum_cell().hidden, 0), (conv(), 2)))
@pytest.mark.parametrize("dtype", (float, jnp.float32, jnp.bfloat16))
def test_weight_norm(layer, zeros, dtype):
    layer = jtu.tree_map(lambda x: x.astype(dtype), layer)
    layer = eqx.tree_at(lambda c: c.weight, layer, layer.weight.at[zeros].set(0))
    normed = nn.weight_norm(layer)
    weight = nn.resolve(normed).weight
    assert weight.dtype == layer.weight.dtype
    eps = float(jnp.finfo(weight.dtype).eps)
    assert relative_error(weight, layer.weight) <= 2 * eps
    longer = eqx.tree_at(lambda c: c.weight.length, normed, replace_fn=lambda g: 2 * g)
    assert relative_error(nn.resolve(longer).weight, 2 * weight) <= 2 * eps
    # The length of a row of zeros has a gradient, so that it can grow.
    grads = eqx.filter_grad(lambda c: jnp.sum(nn.resolve(c).weight))(normed)
    assert jnp.all(jnp.isfinite(grads.weight.direction))
    assert jnp.all(grads.weight.length[zeros] != 0)


def test_direction_of_a_weight_has_no_gradient_along_itself():
    normed = nn.WeightNorm(make_matrix(4, 1.0))
    grads = eqx.filter_grad(lambda w: jnp.sum(jnp.sin(w.value())))(normed)
    along = jnp.sum(grads.direction * normed.direction, axis=1)
    assert np.allclose(along, 0, atol=tolerance(1e-5, 1e-12))


@pytest.mark.parametrize(
    "options, spatial_shape",
    (
        ({}, (6, 5)),
        ({"padding": 1, "padding_mode": "CIRCULAR"}, (6, 5)),
        ({"padding": 1, "padding_mode": "REFLECT"}, (6, 5)),
        ({"padding": "SAME", "stride": 2, "use_bias": False}, (6, 5)),
        ({"padding": ((2, 0), (0, 1)), "dilation": 2}, (6, 5)),
        ({"padding": 1, "groups": 2, "kernel_size": (3, 1)}, (6, 5)),
        ({"transpose": True, "padding": 1, "stride": 2}, (4, 3)),
        ({"num_dims": 1, "padding": 1}, (9,)),
    ),
)
def test_spectral_norm_of_a_convolution_is_that_of_its_matrix(options, spatial_shape):
    layer = conv(**options)
    in_shape = (2, *spatial_shape)
    norm = np.linalg.norm(operator_matrix(layer, in_shape), 2)
    bound = float(norm) / 2
    bounded = nn.spectral_norm(layer, bound=bound, spatial_shape=spatial_shape)
    new_matrix = operator_matrix(eqx.filter_jit(nn.resolve)(bounded), in_shape)
    assert np.isclose(np.linalg.norm(new_matrix, 2), bound, rtol=1e-3)
    # Which is not that of the reshaped kernel.
    kernel = np.asarray(layer.weight).reshape(layer.weight.shape[0], -1)
    assert not np.isclose(np.linalg.norm(kernel, 2), norm, rtol=1e-2)


@pytest.mark.parametrize("shape", ((7, 4), (3, 8), (1, 5), (40, 40)))
def test_spectral_norm_of_a_matrix(shape):
    weight = jr.normal(jr.key(2), shape)
    run = jax.jit(lambda bound: nn.SpectralNorm(weight, bound).value())
    norm = np.linalg.norm(np.asarray(run(jnp.array(0.7)), float), 2)
    assert np.isclose(norm, 0.7, rtol=1e-4)
    assert relative_error(run(jnp.array(100.0)), weight) == 0


def test_spectral_norm_with_equal_singular_values():
    value = jax.jit(lambda w: nn.SpectralNorm(w, 0.5).value())(2 * jnp.eye(6))
    assert np.allclose(value, 0.5 * np.eye(6), atol=tolerance(1e-6, 1e-12))


@pytest.mark.parametrize("wrap", (nn.WeightNorm, nn.SpectralNorm, nn.InfinityNorm))
def test_extreme_weights_give_no_nan(wrap):
    run = eqx.filter_jit(eqx.filter_value_and_grad(lambda w: jnp.sum(w.value())))
    for weight in (0.0, 1e-30, 1e10):
        value, grads = run(wrap(jnp.full((3, 4), weight)))
        assert jnp.isfinite(value)
        assert all(jnp.all(jnp.isfinite(g)) for g in jtu.tree_leaves(grads))


@pytest.mark.parametrize("wrap", (nn.SpectralNorm, nn.InfinityNorm))
def test_half_precision_weights(wrap):
    weight = make_matrix(8, 3.0)
    run = jax.jit(lambda weight: wrap(weight).value())
    value = run(weight.astype(jnp.bfloat16))
    assert value.dtype == jnp.bfloat16
    assert relative_error(value, run(weight)) < 2e-2


@pytest.mark.parametrize("wrap", (nn.WeightNorm, nn.SpectralNorm, nn.InfinityNorm))
def test_gradients_against_finite_differences(wrap):
    param = wrap(2 * make_matrix(5, 1.0, seed=3))
    flat, unravel = jax.flatten_util.ravel_pytree(eqx.filter(param, eqx.is_array))
    static = eqx.filter(param, eqx.is_array, inverse=True)
    tangent = make_vector(flat.size, seed=4)

    @jax.jit
    def loss(flat):
        return jnp.sum(jnp.sin(eqx.combine(unravel(flat), static).value()))

    step = tolerance(1e-2, 1e-5)
    finite = (loss(flat + step * tangent) - loss(flat - step * tangent)) / (2 * step)
    assert np.isclose(jax.grad(loss)(flat) @ tangent, finite, rtol=2e-2, atol=2e-3)


def test_infinity_norm_is_the_projection():
    rows = jnp.array([[3.0, -1.0, 0.5], [0.2, 0.1, -0.3], [1.0, 1.0, -1.0]])
    value = nn.InfinityNorm(rows, 1.5).value()
    expected = [[1.5, 0, 0], [0.2, 0.1, -0.3], [0.5, 0.5, -0.5]]
    assert np.allclose(value, expected, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    ({"padding": 1}, {"padding": 1, "padding_mode": "REFLECT"}, {"transpose": True}),
)
def test_infinity_norm_bounds_convolutions(options):
    bounded = nn.resolve(nn.infinity_norm(conv(**options), bound=0.4))
    matrix = operator_matrix(bounded, (2, 5, 6))
    assert np.abs(matrix).sum(axis=1).max() <= 0.4 * (1 + 1e-5)


def test_project_changes_the_parameters_and_not_the_model():
    cell: Any = nn.infinity_norm(sum_cell(), bound=0.3)
    projected = nn.project(cell)
    z, x = make_vector(4), make_vector(4, seed=3)
    out, new_out = nn.resolve(cell)(z, x), nn.resolve(projected)(z, x)
    assert relative_error(new_out, out) < tolerance(1e-5, 1e-12)
    norms = jnp.sum(jnp.abs(projected.hidden.weight.weight), axis=1)
    assert jnp.all(norms < 0.3 * (1 + 1e-5))
    assert not np.allclose(projected.hidden.weight.weight, cell.hidden.weight.weight)


def test_filter():
    cell = eqx.nn.Sequential([sum_cell(), eqx.nn.LayerNorm((2, 2)), conv()])

    def chosen(filter):
        return [
            jtu.keystr(path, simple=True, separator=".")
            for path, node in jtu.tree_flatten_with_path(
                nn.weight_norm(cell, filter), is_leaf=lambda x: isinstance(x, kind)
            )[0]
            if isinstance(node, kind)
        ]

    kind = nn.WeightNorm
    hidden, inject, norm, last = (
        "layers.0.hidden.weight",
        "layers.0.inject.weight",
        "layers.1.weight",
        "layers.2.weight",
    )
    assert chosen(eqx.nn.Linear) == [hidden, inject]
    assert chosen((eqx.nn.Linear, eqx.nn.Conv)) == [hidden, inject, last]
    assert chosen(lambda path, layer: path == "layers.0.inject") == [inject]
    assert chosen(lambda path, layer: True) == [hidden, inject, norm, last]


@pytest.mark.parametrize("name", NORMALISATIONS)
def test_copy_serialise_and_average(name):
    normalised = NORMALISATIONS[name](sum_cell())
    z, x = make_vector(4), make_vector(4, seed=3)
    run = eqx.filter_jit(lambda cell: nn.resolve(cell)(z, x))
    out = run(normalised)
    assert jnp.all(run(copy.deepcopy(normalised)) == out)

    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, normalised)
    file.seek(0)
    arrays, static = eqx.partition(normalised, eqx.is_array)
    template = eqx.combine(jtu.tree_map(jnp.zeros_like, arrays), static)
    loaded = eqx.tree_deserialise_leaves(file, template)
    assert jnp.all(run(loaded) == out)

    average = jtu.tree_map(lambda a, b: 0.9 * a + 0.1 * b, arrays, arrays)
    average = eqx.combine(average, static)
    assert relative_error(run(average), out) < tolerance(1e-5, 1e-12)


def test_trains(normalised):
    deq = inn.DeepEquilibriumNetwork(normalised)
    optimiser = optax.adam(1e-2)
    x = make_vector(4)

    @eqx.filter_jit
    def make_step(deq, state):
        loss, grads = eqx.filter_value_and_grad(lambda d: jnp.sum((d(x) - 0.5) ** 2))(
            deq
        )
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimiser.update(grads, state)
        return loss, eqx.apply_updates(deq, updates), state

    state = optimiser.init(eqx.filter(deq, eqx.is_inexact_array))
    losses = []
    for _ in range(3):
        loss, deq, state = make_step(deq, state)
        losses.append(float(loss))
    assert losses[2] < losses[1] < losses[0]


class CubeRoot(nn.AbstractParametrisation):
    """Marked by an operation that nothing else does."""

    weight: Array

    def value(self):
        return jnp.cbrt(self.weight)


def primitives(jaxpr, in_loop: bool = False):
    """All primitives of a jaxpr, and whether each is inside of a loop."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name, in_loop
        is_loop = in_loop or eqn.primitive.name in ("while", "scan")
        for param in jtu.tree_leaves(list(eqn.params.values())):
            if isinstance(param, jec.ClosedJaxpr):
                yield from primitives(param.jaxpr, is_loop)
            elif isinstance(param, jec.Jaxpr):
                yield from primitives(param, is_loop)


@pytest.mark.parametrize("depth", (0, 3))
@pytest.mark.parametrize(
    "layer", (inn.DeepEquilibriumNetwork, inn.SkipDeepEquilibriumNetwork)
)
def test_evaluated_once_a_solve_and_once_a_batch(layer, depth):
    cell = eqx.tree_at(lambda c: c.hidden.weight, sum_cell(), replace_fn=CubeRoot)
    deq = layer(cell, fixed_depth=depth)
    xs = jr.normal(jr.key(3), (3, 4))

    def loss(deq):
        return jnp.sum(jax.vmap(deq)(xs))

    arrays, static = eqx.partition(deq, eqx.is_inexact_array)
    jaxpr = jax.make_jaxpr(lambda a: loss(eqx.combine(a, static)))(arrays)
    found = [in_loop for name, in_loop in primitives(jaxpr.jaxpr) if name == "cbrt"]
    assert found == [False]
    jaxpr = jax.make_jaxpr(jax.grad(lambda a: loss(eqx.combine(a, static))))(arrays)
    found = [in_loop for name, in_loop in primitives(jaxpr.jaxpr) if name == "cbrt"]
    assert found == [False]


def test_layer_solves_for_the_resolved_cell(normalised):
    x = make_vector(4)
    deq = inn.DeepEquilibriumNetwork(normalised, inn.AndersonAcceleration(1e-6, 1e-6))
    skip = inn.SkipDeepEquilibriumNetwork(normalised)

    @eqx.filter_jit
    def run(deq, skip):
        z = deq(x)
        return z, deq.evaluate(z, x), skip.start(x), nn.resolve(skip.cell)

    z, f, start, cell = run(deq, skip)
    assert relative_error(cell(z, x), z) < 1e-5
    assert relative_error(f, cell(z, x)) < 1e-6
    assert relative_error(start, cell(jnp.zeros(4), x)) < 1e-6


def test_gradient_flows_through_the_solve(normalised):
    x = make_vector(4)
    solver = inn.AndersonAcceleration(1e-6, 1e-6)

    @eqx.filter_grad
    def grad(cell, depth):
        deq = inn.DeepEquilibriumNetwork(cell, solver, fixed_depth=depth)
        return jnp.sum(jnp.sin(deq(x)))

    implicit, unrolled = eqx.filter_jit(lambda c: (grad(c, 0), grad(c, 60)))(normalised)
    assert relative_error(implicit, unrolled) < 1e-3


def test_resolve_leaves_others_alone():
    cell = sum_cell()
    assert eqx.tree_equal(nn.resolve(cell), cell)
