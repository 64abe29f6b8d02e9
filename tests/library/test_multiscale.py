from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
import pytest

import implicitnets as inn
from implicitnets import (
    MultiScaleCell,
    MultiScaleDeepEquilibriumNetwork,
    SkipMultiScaleDeepEquilibriumNetwork,
)

from .helpers import (
    dense_gradient,
    loss_weights,
    make_vector,
    multiscale_layers,
    relative_error,
    tolerance,
    two_norm,
    weighted_sum,
)


def scaled(tree: tuple) -> Any:
    return jtu.tree_map(lambda w: 0.4 * w if eqx.is_array(w) else w, tree)


TOL = tolerance(1e-6, 1e-11)
SHAPES = [(2,), (1,)]


def fine_to_coarse(z):
    return z[:1] * 100


def coarse_to_fine(z):
    return jnp.stack([z[0], z[0] * 10])


MAIN = [lambda z, x: z + x, lambda z: -z]
MAPPING = [[lambda z: z, fine_to_coarse], [coarse_to_fine, lambda z: z]]


@pytest.mark.parametrize("post_fuse_layers", (None, [lambda z: 2 * z] * 2))
def test_cell(post_fuse_layers):
    cell = MultiScaleCell(MAIN, MAPPING, post_fuse_layers)
    z = (jnp.array([1.0, 2.0]), jnp.array([3.0]))
    fine, coarse = cell(z, jnp.array([10.0, 20.0]))
    factor = 1 if post_fuse_layers is None else 2
    assert np.allclose(fine, factor * np.array([11.0 - 3.0, 22.0 - 30.0]))
    assert np.allclose(coarse, factor * np.array([1100.0 - 3.0]))


class Noise(eqx.Module):
    def __call__(self, z, x=0.0, *, key):
        return jr.normal(key, z.shape)


def test_every_layer_has_a_key_of_its_own():
    silent = [[lambda z: z] * 2] * 2
    cell = MultiScaleCell([Noise(), Noise()], silent)
    z = (jnp.zeros(2), jnp.zeros(2))
    fine, coarse = cell(z, 0.0, key=jr.key(0))
    assert np.array_equal(fine, coarse)
    rows = [[Noise(), lambda z: jnp.zeros(2)], [lambda z: jnp.zeros(2), Noise()]]
    noises = [MultiScaleCell([Noise(), Noise()], rows)(z, 0.0, key=jr.key(0))]
    noises += [MultiScaleCell(MAIN, silent, [Noise(), Noise()])(z, 0.0, key=jr.key(0))]
    values = np.concatenate([np.concatenate(noise) for noise in noises])
    assert len(np.unique(values)) == 8
    assert eqx.tree_equal(
        noises[0], MultiScaleCell([Noise(), Noise()], rows)(z, 0.0, key=jr.key(0))
    )


def test_state_has_the_precision_of_the_input():
    deq = MultiScaleDeepEquilibriumNetwork(MAIN, MAPPING, state_shapes=SHAPES)
    for dtype in (jnp.bfloat16, jnp.float32):
        z = deq.start({"image": jnp.zeros(3, dtype), "mask": jnp.zeros(3, bool)})
        assert [(leaf.shape, leaf.dtype) for leaf in z] == [
            ((2,), dtype),
            ((1,), dtype),
        ]
    (fine, _) = deq.start(jnp.zeros(3, jnp.int8))
    assert fine.dtype == jnp.result_type(float)


def test_start_as_one_layer_a_scale():
    init = [lambda x: x, lambda x: x[:1]]
    x = make_vector(2)
    for kind in (
        MultiScaleDeepEquilibriumNetwork,
        SkipMultiScaleDeepEquilibriumNetwork,
    ):
        layers = kind(MAIN, MAPPING, state_shapes=SHAPES, init=init)
        function = kind(MAIN, MAPPING, state_shapes=SHAPES, init=lambda x: (x, x[:1]))
        assert eqx.tree_equal(layers.start(x), (x, x[:1]))
        assert eqx.tree_equal(function.start(x), (x, x[:1]))


def test_skip_reg_starts_at_the_cell_of_zeros():
    skip = SkipMultiScaleDeepEquilibriumNetwork(MAIN, MAPPING, state_shapes=SHAPES)
    fine, coarse = skip.start(jnp.array([10.0, 20.0]))
    assert np.allclose(fine, [10.0, 20.0])
    assert np.allclose(coarse, [1000.0])


def test_gradient():
    sizes = (4, 3)
    main, mapping, post_fuse = scaled(multiscale_layers(sizes, key=jr.key(0)))
    deq = MultiScaleDeepEquilibriumNetwork(
        main,
        mapping,
        post_fuse,
        optx.Newton(TOL, TOL),
        state_shapes=[(size,) for size in sizes],
        adjoint=inn.ImplicitAdjoint(inn.GivensGMRES(rtol=TOL, atol=0.0)),
    )
    x = make_vector(4)
    weights = loss_weights(deq.start(x))

    @eqx.filter_jit
    def solve_and_grad(params):
        def loss(params):
            deq, x = params
            sol = deq.solve(x)
            return weighted_sum(sol.z_star, weights), sol

        return eqx.filter_grad(loss, has_aux=True)(params)

    (deq_gradient, x_gradient), sol = solve_and_grad((deq, x))
    assert sol.result == optx.RESULTS.successful
    assert two_norm(sol.residual) < tolerance(1e-5, 1e-9)
    reference = dense_gradient(deq.cell, sol.z_star, x, weights)
    gradient = (deq_gradient.cell, x_gradient)
    assert relative_error(gradient, reference) < tolerance(1e-4, 1e-8)


class ReducedCell(eqx.Module):
    """The cell of SciML's tutorial on a state smaller than the input, at its size."""

    state: eqx.nn.Linear
    inject: eqx.nn.Linear
    mix: eqx.nn.Linear
    expand: eqx.nn.Linear

    def __init__(self, key):
        sizes = ((128, 64), (512, 64), (64, 64), (64, 128))
        self.state, self.inject, self.mix, self.expand = (
            eqx.nn.Linear(*size, use_bias=False, key=key)
            for size, key in zip(sizes, jr.split(key, 4), strict=True)
        )

    def __call__(self, z, x):
        y = jnp.tanh(self.state(z)) + jnp.tanh(self.inject(x))
        return self.expand(jnp.tanh(self.mix(y)))


def test_state_smaller_than_the_input():
    """As in SciML's tutorial; a Skip-regularised start too."""
    stem_key, cell_key, init_key = jr.split(jr.key(0), 3)
    stem = eqx.nn.Linear(784, 512, key=stem_key)
    cell = ReducedCell(cell_key)
    x = jax.nn.gelu(stem(make_vector(784)))
    solver = inn.AndersonAcceleration(TOL, TOL)
    one_scale = dict(solver=solver, state_shapes=[(128,)])
    layers = [
        inn.DeepEquilibriumNetwork(cell, solver, zero_state=lambda x: jnp.zeros(128)),
        inn.SkipDeepEquilibriumNetwork(
            cell, solver, init=eqx.nn.Linear(512, 128, key=init_key)
        ),
        MultiScaleDeepEquilibriumNetwork([cell], [[eqx.nn.Identity()]], **one_scale),
        SkipMultiScaleDeepEquilibriumNetwork(
            [cell], [[eqx.nn.Identity()]], **one_scale
        ),
    ]
    sols = eqx.filter_jit(lambda x: [layer.solve(x) for layer in layers])(x)
    values = [jtu.tree_leaves(sol.z_star)[0] for sol in sols]
    for sol, value in zip(sols, values, strict=True):
        assert sol.result == optx.RESULTS.successful
        assert np.allclose(value, values[0], atol=tolerance(1e-5, 1e-9))
    starts = [jtu.tree_leaves(sol.z0)[0] for sol in sols]
    assert np.allclose(starts[3], cell(jnp.zeros(128), x), atol=1e-6)
    assert not np.any(starts[0]) and not np.any(starts[2])


def test_batch():
    layers = scaled(multiscale_layers((2, 1), key=jr.key(0)))
    deq = MultiScaleDeepEquilibriumNetwork(*layers, state_shapes=SHAPES)
    xs = make_vector(10).reshape(5, 2)
    together, alone = jax.jit(lambda xs: (jax.vmap(deq)(xs), deq(xs[3])))(xs)
    for leaf, leaf_alone in zip(together, alone, strict=True):
        assert np.allclose(leaf[3], leaf_alone, rtol=1e-5, atol=1e-6)
