import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import implicitnets as inn
from implicitnets._internal.history import empty_history, history_set
from implicitnets._internal.loop import Unfrozen, while_loop


def count_up(start, end):
    """Counts to the end; keeps a history that goes on being written."""

    def cond(carry):
        value, _, _ = carry
        return value < end

    def body(carry):
        value, index, history = carry
        history = history_set(history.value, index.value, value)
        return value + 1, Unfrozen(index.value + 1), Unfrozen(history)

    start = jnp.asarray(start)
    history = Unfrozen(empty_history(8, start))
    value, _, history = while_loop(
        cond, body, (start, Unfrozen(jnp.array(0)), history), max_steps=6
    )
    return value, history.value[:, 0]


def test_as_a_python_loop():
    value, history = jax.jit(count_up)(2, 5)
    assert value == 5
    assert history.tolist() == [2, 3, 4, 0, 0, 0, 0, 0]


def test_max_steps():
    value, _ = jax.jit(count_up)(0, 100)
    assert value == 6


def test_finished_examples_are_frozen_but_for_what_is_not():
    starts, ends = jnp.array([0, 3, 7]), jnp.array([5, 5, 5])
    value, history = jax.jit(jax.vmap(count_up))(starts, ends)
    assert value.tolist() == [5, 5, 7]
    # The second example wrote two entries and the third none before they finished.
    assert history[0, :5].tolist() == [0, 1, 2, 3, 4]
    assert history[1, :2].tolist() == [3, 4]


def test_writes_at_the_shared_counter_are_slices():
    lowered = jax.jit(jax.vmap(count_up)).lower(jnp.zeros(3, int), jnp.full(3, 5))
    text = lowered.compile().as_text() or ""
    assert " scatter(" not in text and " dynamic-update-slice(" in text


def test_nested_vmap():
    starts = jnp.arange(4).reshape(2, 2)
    value, _ = jax.jit(jax.vmap(jax.vmap(lambda s: count_up(s, 3))))(starts)
    assert np.array_equal(value, np.full((2, 2), 3))


def count_branches(text):
    """Of a lowered program, without those that ask for the platform."""
    count = 0
    for function in text.split("func.func"):
        branches = re.findall(r'(%\w+) = "stablehlo.case"\((%\w+)\)', function)
        of_platform = {name for name, index in branches if index.startswith("%c")}
        count += sum(
            not index.startswith("%c") and index not in of_platform
            for _, index in branches
        )
    return count


@pytest.mark.one_precision
@pytest.mark.parametrize(("platform", "count"), [("cpu", 3), ("cuda", 1)])
def test_a_step_does_not_branch_on_an_accelerator(platform, count):
    def solve(xs):
        layer = inn.DeepEquilibriumNetwork(lambda z, x: jnp.tanh(0.5 * z + x))
        return jax.vmap(layer)(xs)

    traced = jax.jit(jax.grad(lambda xs: jnp.sum(solve(xs)))).trace(jnp.ones((2, 3)))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    # The one left is the product that verifies a cycle of GMRES. A CPU branches in
    # every step of Anderson acceleration twice.
    assert count_branches(text) == count
