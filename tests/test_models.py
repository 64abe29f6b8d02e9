import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

import implicitnets as inn
from implicitnets.models import (
    MDEQ,
    MDEQConfig,
    MDEQSegmenter,
    ResNetConfig,
    ResNetDEQ,
    TanhConfig,
    TanhDEQ,
)

from .helpers import tolerance


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


def structs(make, config):
    """A model that takes no memory."""
    return eqx.filter_eval_shape(eqx.nn.make_with_state(make), config, key=jr.key(0))


def num_parameters(tree) -> int:
    leaves = [x for x in jtu.tree_leaves(tree) if isinstance(x, jax.ShapeDtypeStruct)]
    return sum(x.size for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact))


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
        (MDEQ, MDEQConfig.imagenet_xl(), 90_463_280),
    ),
)
def test_number_of_parameters(make, config, count):
    model, _ = structs(make, config)
    assert num_parameters(model) == count


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


def over_batch(model, images, state, keys):
    call = jax.vmap(model, in_axes=(0, None), out_axes=(0, None), axis_name="batch")
    return call(images, state, key=keys)


@pytest.mark.parametrize(
    "make, config, scales",
    (
        (ResNetDEQ, ResNetConfig(), [(48, 32, 32)]),
        (
            MDEQ,
            MDEQConfig.cifar_large(),
            [(32 << i, 32 >> i, 32 >> i) for i in range(4)],
        ),
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


@pytest.mark.parametrize(
    "make, config, image_shape",
    (
        (TanhDEQ, TINY_TANH, (1, 2, 3)),
        (ResNetDEQ, TINY_RESNET, (1, 8, 8)),
        (MDEQ, TINY_MDEQ, (1, 4, 4)),
        (MDEQSegmenter, TINY_MDEQ, (1, 4, 4)),
    ),
)
def test_training(make, config, image_shape):
    """Fits a few random examples, and gives finite logits in inference."""
    init_key, image_key, label_key, key = jr.split(jr.key(0), 4)
    solver = inn.AndersonAcceleration(1e-2, 1e-4)
    make = ft.partial(make, config, solver, max_steps=8)
    model, state = eqx.filter_jit(eqx.nn.make_with_state(make))(key=init_key)
    images = jr.normal(image_key, (4, *image_shape))
    label_shape = (4, 4, 4) if isinstance(model, MDEQSegmenter) else (4,)
    labels = jr.randint(label_key, label_shape, 0, config.num_classes)
    optimiser = optax.adam(3e-2)

    @eqx.filter_jit
    def train(model, state):
        params, static = eqx.partition(model, eqx.is_inexact_array)

        def loss(params, state, key):
            keys = jr.split(key, 4)
            model = eqx.combine(params, static)
            (logits, _), state = over_batch(model, images, state, keys)
            logits = jnp.moveaxis(logits, 1, -1)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return jnp.mean(losses), state

        def step(carry, key):
            params, state, opt_state = carry
            gradient = jax.value_and_grad(loss, has_aux=True)
            (value, state), grads = gradient(params, state, key)
            with jax.numpy_dtype_promotion("standard"):  # for Optax
                updates, opt_state = optimiser.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), state, opt_state), value

        carry = (params, state, optimiser.init(params))
        (params, state, _), losses = jax.lax.scan(step, carry, jr.split(key, 30))
        return eqx.combine(params, static), state, losses

    model, state, losses = train(model, state)
    assert losses[-1] < 0.5 * losses[0]
    evaluate = eqx.filter_jit(over_batch)
    model = eqx.nn.inference_mode(model)
    (logits, sol), new_state = evaluate(model, images, state, None)
    assert np.all(np.isfinite(logits))
    assert eqx.tree_equal(state, new_state)
    (alone, _), _ = evaluate(model, images[:1], state, None)
    assert np.allclose(logits[:1], alone, atol=tolerance(1e-3, 1e-6))
