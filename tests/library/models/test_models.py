import dataclasses
import functools as ft

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
from benchmarks.training import classifier
from implicitnets.models import (
    MDEQ,
    MDEQConfig,
    MDEQSegmenter,
    ResNetConfig,
    ResNetDEQ,
    TanhConfig,
    TanhDEQ,
)
from implicitnets.models.mdeq.heads import resize

from ..helpers import tolerance
from ..training import cross_entropy, fit, num_parameters, over_batch


ONCE = pytest.mark.one_precision
TINY_TANH = TanhConfig(image_shape=(1, 2, 3), width=4, num_classes=3)
TINY_RESNET = ResNetConfig(
    image_shape=(1, 8, 8), channels=4, inner_channels=4, groups=2, num_classes=3
)
TINY_MDEQ = MDEQConfig(
    channels=(4, 4),
    head_channels=(1, 2),
    final_channels=4,
    num_classes=3,
    expansion=1,
    groups=2,
    in_channels=1,
)


@ft.cache
def structs(make, config):
    """A model that takes no memory."""
    return eqx.filter_eval_shape(eqx.nn.make_with_state(make), config, key=jr.key(0))


@pytest.mark.one_precision
@pytest.mark.parametrize(
    "make, config, count",
    (
        (TanhDEQ, TanhConfig(), 89_510),
        (ResNetDEQ, ResNetConfig(), 64_842),
        # Stem, cell, normalisations, and a head that sees 24 x 28 x 28 features.
        (ResNetDEQ, ResNetConfig.jaxopt(), 240 + 13_984 + 96 + 188_170),
        (MDEQ, MDEQConfig.cifar_tiny(), 158_890),
        (MDEQ, MDEQConfig.cifar_large(), 11_097_438),
        (MDEQ, MDEQConfig.imagenet_small(), 16_808_936),
        (MDEQ, MDEQConfig.imagenet_large(), 67_063_624),
        # Without the weights of the cell's last normalisations.
        (MDEQ, MDEQConfig.imagenet_large_regularised(), 67_063_624 - 2 * 1200),
        (MDEQ, MDEQConfig.imagenet_xl(), 90_463_280),
        # The networks that `benchmarks/multiscale.py` compares.
        (MDEQ, MDEQConfig(in_channels=1), 158_458),
        (MDEQ, MDEQConfig((36,), (20,), 215, groups=4, in_channels=1), 158_457),
    ),
)
def test_number_of_parameters(make, config, count):
    model, _ = structs(make, config)
    assert num_parameters(model) == count


def test_number_of_parameters_of_the_benchmarks_classifier():
    weights = eqx.filter_eval_shape(classifier.Weights, 28 * 28, key=jr.key(0))
    assert num_parameters(weights) == 151_050
    # A plain DEQ has no learned start.
    assert num_parameters((weights.stem, weights.cell, weights.head)) == 134_538


@pytest.mark.one_precision
def test_number_of_parameters_of_cells():
    for config, count in (
        (MDEQConfig.cifar_tiny(), 111_696),
        (MDEQConfig.cifar_large(), 8_715_232),
    ):
        model, _ = structs(MDEQ, config)
        assert num_parameters(model.deq.cell) == count
    for name in ("small", "large", "xl"):
        config = getattr(MDEQConfig, f"cityscapes_{name}")()
        segmenter, _ = structs(MDEQSegmenter, config)
        classifier, _ = structs(MDEQ, getattr(MDEQConfig, f"imagenet_{name}")())
        cells = segmenter.deq.cell, classifier.deq.cell
        assert num_parameters(cells[0]) == num_parameters(cells[1])


@pytest.mark.one_precision
@pytest.mark.parametrize(
    "make, config, scales",
    (
        (ResNetDEQ, ResNetConfig(), [(48, 32, 32)]),
        (
            MDEQ,
            MDEQConfig.imagenet_xl(),
            [(88 << i, 56 >> i, 56 >> i) for i in range(4)],
        ),
    ),
)
def test_shapes_at_published_sizes(make, config, scales):
    model, state = structs(make, config)
    size = 224 if config == MDEQConfig.imagenet_xl() else 32
    images, keys = jnp.zeros((2, 3, size, size)), jr.split(jr.key(0), 2)
    (logits, sol), new_state = eqx.filter_eval_shape(
        over_batch, model, images, state, keys
    )
    num_classes = config.num_classes
    assert logits.shape == (2, num_classes)
    assert [leaf.shape for leaf in jtu.tree_leaves(sol.z_star)] == [
        (2, *shape) for shape in scales
    ]
    assert eqx.tree_equal(state, new_state)


def test_strides_of_the_residual_network():
    """The stem keeps every second pixel, and the head sees the means of windows."""
    config = dataclasses.replace(
        TINY_RESNET, image_shape=(1, 7, 8), stride=2, pool_size=2, pool_stride=2
    )
    model, state = eqx.nn.make_with_state(ResNetDEQ)(config, key=jr.key(0))
    model = eqx.nn.inference_mode(model)
    x, _ = model.inject(jr.normal(jr.key(1), config.image_shape), state)
    assert x.shape == (4, 4, 4)
    logits, _ = model.read_out(x, state)
    means = jnp.mean(x.reshape(4, 2, 2, 2, 2), axis=(2, 4))
    # By the head's normalisation, whose statistics are those of nothing yet.
    normalised = means / jnp.sqrt(1 + model.head_norm.eps)
    expected = model.head(jnp.ravel(normalised))
    np.testing.assert_allclose(logits, expected, rtol=tolerance(1e-5, 1e-12))


@ONCE
def test_a_gain_makes_the_cell_of_the_residual_network_contract():
    x = jr.normal(jr.key(1), TINY_RESNET.image_shape)

    @eqx.filter_jit
    def of(model, state):
        injection, _ = eqx.nn.inference_mode(model).inject(x, state)
        z_star = model.deq(injection)
        radius = inn.spectral_radius(model.deq.cell, z_star, injection, key=jr.key(2))
        return injection, radius

    found = []
    for gain in (1.0, 4.0):
        config = dataclasses.replace(TINY_RESNET, gain=gain)
        found.append(of(*eqx.nn.make_with_state(ResNetDEQ)(config, key=jr.key(0))))
    (quiet, large), (loud, small) = found
    np.testing.assert_allclose(loud, 4 * quiet, rtol=1e-6)
    assert small < 0.7 * large


@pytest.mark.one_precision
def test_forward_pass_at_a_published_size():
    """The equilibrium is one step, as there is nothing to see in more of them."""
    model, state = structs(MDEQ, MDEQConfig.cifar_large())
    rng = np.random.default_rng(0)

    def fill(leaf):
        # Drawing the weights takes longer to compile than all the rest.
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        values = rng.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(np.float32(0.01) * values, leaf.dtype)

    model, state = jtu.tree_map(fill, (inn.set_fixed_depth(model, 1), state))
    images = jnp.asarray(rng.standard_normal((1, 3, 32, 32)), float)
    arrays, static = eqx.partition((model, state), eqx.is_array)

    def forward(arrays, images, keys):
        model, state = eqx.combine(arrays, static)
        (logits, sol), _ = over_batch(model, images, state, keys)
        return logits, sol.z_star

    # It runs once, so that compiling is what counts.
    options = {"xla_backend_optimization_level": 0}
    logits, z_star = jax.jit(forward, compiler_options=options)(
        arrays, images, jr.split(jr.key(0), 1)
    )
    assert logits.shape == (1, 10)
    for i, leaf in enumerate(z_star):
        assert leaf.shape == (1, 32 << i, 32 >> i, 32 >> i)
        assert np.all(np.isfinite(leaf)) and np.any(leaf != 0)


@pytest.mark.parametrize(
    "make, config, image_shape, fixed_depth",
    (
        (TanhDEQ, TINY_TANH, (1, 2, 3), 0),
        # Without XLA's optimisations, convolutions in float64 take a minute.
        pytest.param(ResNetDEQ, TINY_RESNET, (1, 8, 8), 0, marks=ONCE),
        pytest.param(MDEQ, TINY_MDEQ, (1, 4, 4), 0, marks=ONCE),
        pytest.param(MDEQSegmenter, TINY_MDEQ, (1, 4, 4), 2, marks=ONCE),
    ),
)
def test_image_models(make, config, image_shape, fixed_depth):
    """They fit a few random examples; an example alone decides in inference."""
    init_key, image_key, label_key = jr.split(jr.key(0), 3)
    make = ft.partial(make, config, optx.FixedPointIteration(1e-2, 1e-4), max_steps=8)
    model, state = eqx.filter_jit(eqx.nn.make_with_state(make))(key=init_key)
    model = inn.set_fixed_depth(model, fixed_depth)
    images = jr.normal(image_key, (4, *image_shape))
    label_shape = (4, 4, 4) if isinstance(model, MDEQSegmenter) else (4,)
    labels = jr.randint(label_key, label_shape, 0, config.num_classes)

    def loss(model, state, key):
        (logits, _), state = over_batch(model, images, state, jr.split(key, 4))
        return cross_entropy(jnp.moveaxis(logits, 1, -1), labels), state

    model, state, losses = fit(loss, model, state, optax.adam(1e-2), num_steps=80)
    assert losses[-1] < 0.5 * losses[0]
    evaluate = eqx.filter_jit(over_batch)
    model = eqx.nn.inference_mode(model)
    (logits, _), new_state = evaluate(model, images, state, None)
    (others, _), _ = evaluate(model, images.at[1:].set(0), state, None)
    assert np.all(np.isfinite(logits))
    assert eqx.tree_equal(state, new_state)
    assert np.allclose(logits[0], others[0], atol=tolerance(1e-4, 1e-8))
    assert not np.allclose(logits[1], others[1], atol=tolerance(1e-4, 1e-8))


def test_resize_keeps_the_corners():
    x = jnp.arange(3.0)[:, None] + 10 * jnp.arange(2.0)[None, :]
    y = resize(x[None], 6, 4)
    rows, columns = np.linspace(0, 2, 6), np.linspace(0, 1, 4)
    assert np.allclose(y[0], rows[:, None] + 10 * columns[None, :], atol=1e-5)
    assert np.allclose(resize(x[None, :1, :1], 2, 2), 0)


def test_image_that_does_not_fit_the_scales():
    model, state = structs(MDEQ, TINY_MDEQ)
    with pytest.raises(ValueError, match="multiples of 2; got 5 x 4"):
        eqx.filter_eval_shape(
            over_batch, model, jnp.zeros((1, 1, 5, 4)), state, jr.split(jr.key(0), 1)
        )
