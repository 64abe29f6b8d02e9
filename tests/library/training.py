"""Training a model for a moment, for the tests of the models."""

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optax


def num_parameters(tree) -> int:
    leaves = [x for x in jtu.tree_leaves(tree) if isinstance(x, jax.ShapeDtypeStruct)]
    return sum(x.size for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact))


def over_batch(model, images, state, keys):
    call = jax.vmap(model, in_axes=(0, None), out_axes=(0, None), axis_name="batch")
    return call(images, state, key=keys)


def fit(loss, model, state, optimiser, num_steps):
    """Train for some steps; returns model, state and the losses."""
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def step(carry, key):
        params, state, opt_state = carry
        gradient = jax.value_and_grad(
            lambda params: loss(eqx.combine(params, static), state, key), has_aux=True
        )
        (value, state), grads = gradient(params)
        with jax.numpy_dtype_promotion("standard"):  # for Optax
            updates, opt_state = optimiser.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), state, opt_state), value

    carry = (params, state, optimiser.init(params))
    run = jax.jit(lambda carry: lax.scan(step, carry, jr.split(jr.key(0), num_steps)))
    (params, state, _), losses = run(carry)
    return eqx.combine(params, static), state, losses


def cross_entropy(logits, labels):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses)
