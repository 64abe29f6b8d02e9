"""What the test of a language model sees of later characters."""

import dataclasses
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import pytest

from benchmarks.training.equilibrium import EquilibriumOptions, SOLVERS
from benchmarks.training.recipes import RECIPES, SMALL_TRANSFORMER
from benchmarks.training.studies.language_model import LanguageSettings
from benchmarks.training.trainer import as_in_tests
from implicitnets import DeepEquilibriumNetwork
from implicitnets.models import DEQTransformer, TransformerConfig


# Half of the last digit of the table's bits, which are between one and ten.
SHOWN = 0.005

CONFIG = dataclasses.replace(
    SMALL_TRANSFORMER,
    vocab_size=20,
    width=16,
    num_heads=2,
    head_width=4,
    inner_width=8,
    memory_length=0,
    dropout=0.0,
)


def enlarged(model):
    """With weights as small as at first, nothing depends on anything much."""

    def times(factor, tree):
        return jtu.tree_map(
            lambda x: factor * x if eqx.is_inexact_array(x) else x, tree
        )

    parts = times(20, model.embedding), times(5, model.deq.cell)
    return eqx.tree_at(lambda m: (m.embedding, m.deq.cell), model, parts)


@pytest.mark.parametrize(
    "options",
    (LanguageSettings().equilibrium, RECIPES["transformer"][1].equilibrium),
    ids=("study", "recipe"),
)
def test_later_characters_leak_less_than_is_shown(options):
    texts = jr.randint(jr.key(1), (8, 16), 0, 20)
    texts = texts.at[:, :8].set(texts[:1, :8])

    @jax.jit
    def leak(rtol):
        """By how much the bits of the first characters depend on those behind them."""
        solver = SOLVERS[options.solver](rtol, options.atol)
        model = enlarged(
            DEQTransformer(
                CONFIG, solver, max_steps=options.test_max_steps, key=jr.key(2)
            )
        )
        (log_probs, _), _ = jax.vmap(lambda x: model(x, model.empty_memory()))(texts)
        found = jnp.take_along_axis(log_probs[:, :7], texts[:, 1:8, None], axis=2)
        return jnp.max(jnp.ptp(found, axis=0)) / math.log(2)

    assert 0 < leak(options.test_rtol) < SHOWN < leak(options.rtol)


@pytest.mark.one_precision
def test_every_recipe_of_texts_is_tested_as_tightly():
    found = {
        (options.solver, options.atol, options.test_rtol, options.test_max_steps)
        for _, config in RECIPES.values()
        if isinstance(config.model, TransformerConfig)
        for options in (config.equilibrium,)
    }
    assert len(found) == 1 and None not in found.pop()


class _Network(eqx.Module):
    layer: DeepEquilibriumNetwork


@pytest.mark.one_precision
def test_solves_of_tests_have_their_own_tolerance():
    trained = _Network(DeepEquilibriumNetwork(jnp.add, max_steps=7))
    assert eqx.tree_equal(as_in_tests(trained, EquilibriumOptions()), trained)
    options = EquilibriumOptions(test_rtol=1e-5, test_max_steps=50)
    layer = as_in_tests(trained, options).layer
    assert layer.solver.rtol == 1e-5 and layer.max_steps == 50
