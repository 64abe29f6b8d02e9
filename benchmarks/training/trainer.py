"""The steps of a training, and its tests, of every model.

A run is a function of its configuration: the weights, the order of the data, and every
random number come from the seed and the step.
"""

import dataclasses
import functools as ft
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array, Int, PRNGKeyArray, PyTree, Scalar, ScalarLike

import implicitnets as inn

from .config import Config, JacobianOptions, Plan
from .data import Batch, Data, Text
from .equilibrium import EquilibriumOptions
from .fit import Clock, descend
from .metrics import mean_of, means, measure, Metrics, which_count
from .networks import AbstractNetwork, build, Verdict
from .optimiser import make_optimiser, make_schedule
from .placement import Placement


class TrainState(eqx.Module):
    """All that changes in training."""

    network: AbstractNetwork
    statistics: eqx.nn.State
    memory: PyTree[Array]
    optimiser: optax.OptState
    step: Int[Array, ""]


def judge_batch(
    network: AbstractNetwork,
    statistics: eqx.nn.State,
    memory: PyTree[Array],
    batch: tuple[Array, Array],
    key: PRNGKeyArray,
) -> tuple[Verdict, eqx.nn.State]:
    """The verdicts on the examples of a batch."""

    def one_example(inputs, targets, memory, key, statistics):
        return network(inputs, targets, memory, statistics, key=key)

    inputs, targets = batch
    if jnp.issubdtype(inputs.dtype, jnp.floating):
        inputs = inputs.astype(float)  # of the precision that JAX is set to
    return jax.vmap(
        one_example, in_axes=(0, 0, 0, 0, None), out_axes=(0, None), axis_name="batch"
    )(inputs, targets, memory, jr.split(key, len(inputs)), statistics)


def with_budget(network: AbstractNetwork, max_steps: int | Array) -> AbstractNetwork:
    """A network with another number of solver steps."""
    return eqx.tree_at(lambda network: network.layer.max_steps, network, max_steps)


def as_in_tests(
    network: AbstractNetwork, options: EquilibriumOptions
) -> AbstractNetwork:
    """A network with the solves of evaluations."""
    if options.test_max_steps is not None:
        network = with_budget(network, options.test_max_steps)
    if options.test_rtol is not None:
        network = eqx.tree_at(
            lambda network: network.layer.solver.rtol, network, options.test_rtol
        )
    return network


def with_random_budget(
    network: AbstractNetwork, options: EquilibriumOptions, *, key: PRNGKeyArray
) -> AbstractNetwork:
    """A network with the number of solver steps of one training step."""
    if options.max_steps_delta == 0:
        return network
    # An array, so that every number of steps is served by one compilation.
    fewer = jr.randint(key, (), 0, options.max_steps_delta + 1)
    return with_budget(network, options.max_steps - fewer)


def jacobian_penalty(
    network: AbstractNetwork,
    verdict: Verdict,
    options: JacobianOptions,
    weight: Scalar,
    *,
    key: PRNGKeyArray,
) -> Scalar:
    """The penalty on the cell's Jacobian, the mean of a batch, times its weight. It is
    computed in some of the steps, and in none of weight zero."""

    def one_example(z, x, cell_key, key):
        cell = ft.partial(network.layer.evaluate, key=cell_key)
        return inn.jacobian_penalty(
            cell, z, x, key=key, num_samples=options.jacobian_samples
        )

    def penalty(key):
        keys = jr.split(key, len(verdict.loss))
        z, x = verdict.solution.z_star, verdict.injection
        return jnp.mean(jax.vmap(one_example)(z, x, verdict.key, keys))

    probability = jnp.where(weight > 0, options.jacobian_probability, 0.0)
    return weight * inn.sometimes(probability, penalty, key=key)


def jacobian_schedule(
    options: JacobianOptions, plan: Plan
) -> Callable[[ScalarLike], Scalar]:
    """The weight of the penalty on the Jacobian at every step."""
    begin, never = plan.pretraining_steps, plan.total_steps + 1
    growing = inn.growing_weight(
        options.jacobian_weight,
        options.jacobian_increment,
        options.jacobian_every or never,
        begin=begin,
    )
    last_epoch = options.jacobian_last_epoch
    end = never if last_epoch is None else last_epoch * plan.steps_per_epoch

    def schedule(step: ScalarLike) -> Scalar:
        step = jnp.asarray(step)
        before = options.jacobian_pretraining_weight
        weight = jnp.where(step < begin, before, growing(step))
        return jnp.where(step < end, weight, 0.0)

    return schedule


# Options of which the steps so far do not depend.
_MAY_CHANGE = {
    "data": ("data_dir", "test_size", "test_sequence_length"),
    "equilibrium": ("test_rtol", "test_max_steps"),
    "training": (
        *("epochs", "spectral_examples"),
        *("test_every", "test_every_steps", "test_batch_size"),
    ),
}


class Trainer:
    """The steps of a run."""

    def __init__(self, config: Config, data: Data):
        self.config, self.data = config, data
        self.plan = Plan.of(config.training, data)
        self.placement = Placement(config.run.data_parallel)
        options = config.training
        self.test_batch_size = options.test_batch_size or options.batch_size
        for size in (options.batch_size, self.test_batch_size):
            self.placement.check(size)
        self.schedule = make_schedule(
            config.optimiser, self.plan.total_steps, self.plan.steps_per_epoch
        )
        self.optimiser = make_optimiser(config.optimiser, self.schedule)
        self.jacobian_weight = jacobian_schedule(config.jacobian, self.plan)
        model_key, self.training_key = jr.split(jr.key(config.training.seed))
        self.network, self.statistics = build(
            config.model, config.equilibrium, data, key=model_key
        )
        # Only the segments of a text have anything to do with each other.
        self.is_text = isinstance(data.train, Text)
        self._empty_memory = self._make_memory(options.batch_size)
        self._empty_test_memory = self._make_memory(self.test_batch_size)
        self.clock = Clock()
        self._compiled: dict[Any, Any] = {}

    def facts(self) -> dict[str, Any]:
        """All that decides a step of the training, for checkpoints to compare. How many
        of them there are, and the tests, may change."""
        facts = dataclasses.asdict(self.config)
        del facts["run"]
        for group, names in _MAY_CHANGE.items():
            for name in names:
                del facts[group][name]
        facts["data"] |= self.data.facts()
        facts["model"] |= {"name": type(self.config.model).__name__}
        facts["precision"] = str(jnp.result_type(float))
        return facts

    def start(self) -> TrainState:
        """The state before the first step."""
        put = ft.partial(self.placement.put, sharding=self.placement.whole)
        weights = eqx.filter(self.network, eqx.is_inexact_array)
        return TrainState(
            network=put(self.network),
            statistics=put(self.statistics),
            memory=self._empty_memory,
            optimiser=put(self.optimiser.init(weights)),
            step=put(jnp.array(0)),
        )

    def unrolled_for(self, state: TrainState, step: int) -> TrainState:
        """The state with the layer as a step trains it: in pretraining, unrolled."""
        pretraining = step < self.plan.pretraining_steps
        depth = self.config.training.pretraining_depth if pretraining else 0
        network = inn.set_fixed_depth(state.network, depth)
        return dataclasses.replace(state, network=network)

    def train_step(self, state: TrainState, step: int) -> tuple[TrainState, Metrics]:
        """One step of the optimiser.

        The state knows the step's number too, but on a device.
        """
        options = self.config.training
        state = self.unrolled_for(state, step)
        depth = state.network.layer.fixed_depth
        if step % self.plan.steps_per_epoch == 0 or not self.is_text:
            state = dataclasses.replace(state, memory=self._empty_memory)
        batch = self.data.train.training_batch(step, options.batch_size, options.seed)
        return self._call(
            ("update", depth), self._update, state, self._put_batch(batch)
        )

    def test(self, state: TrainState) -> dict[str, float]:
        """The means over the whole test set, and the spectral radius of a part."""
        options = self.config.training
        network = eqx.nn.inference_mode(state.network)
        network = as_in_tests(network, self.config.equilibrium)
        depth = network.layer.fixed_depth
        memory = self._empty_test_memory
        metrics, radii = [], []
        for batch in self.data.test.test_batches(self.test_batch_size):
            found, solved, memory = self._call(
                ("test", depth),
                self._judge,
                network,
                state.statistics,
                memory,
                self._put_batch(batch),
            )
            memory = memory if self.is_text else self._empty_test_memory
            metrics.append(found)
            if len(radii) < options.spectral_examples:
                found = self._call(("radii", depth), self._radii, network, solved)
                counted = which_count(batch[1])[: len(found)]
                radii.extend(np.asarray(found)[counted])
        result = means(metrics)
        if radii:
            radii = radii[: options.spectral_examples]
            result["spectral_radius_mean"] = float(np.mean(radii))
            result["spectral_radius_max"] = float(np.max(radii))
        if self.is_text:
            result["bits_per_token"] = result["loss"] / math.log(2)
            result["perplexity"] = float(np.exp(result["loss"]))
        return result

    def training_memory(self, fixed_depth: int) -> int:
        """The bytes that a training step takes besides what it is given and returns."""
        compiled = self._compiled["update", fixed_depth].compiled
        return compiled.memory_analysis().temp_size_in_bytes

    def _update(self, state, batch):
        keys = jr.split(jr.fold_in(self.training_key, state.step), 3)
        jacobian, options = self.config.jacobian, self.config.training
        skip_weight, l2_weight = options.skip_weight, options.l2_weight

        def loss_fn(network):
            network = with_random_budget(network, self.config.equilibrium, key=keys[2])
            verdict, statistics = judge_batch(
                network, state.statistics, state.memory, batch, keys[0]
            )
            metrics = measure(verdict, batch[1], self.data.num_classes)
            loss = metrics["loss"].value
            if skip_weight > 0:
                penalties = jax.vmap(inn.skip_penalty)(verdict.solution)
                penalty = mean_of(penalties, which_count(batch[1])).value
                loss = loss + skip_weight * penalty
            if l2_weight > 0:
                weights = jtu.tree_leaves(eqx.filter(network, eqx.is_inexact_array))
                squares = sum(jnp.sum(jnp.square(leaf)) for leaf in weights)
                loss = loss + 0.5 * l2_weight * squares
            if jacobian.active:
                weight = self.jacobian_weight(state.step)
                loss = loss + jacobian_penalty(
                    network, verdict, jacobian, weight, key=keys[1]
                )
            memory = jtu.tree_map(jax.lax.stop_gradient, verdict.memory)
            return loss, (metrics, statistics, memory)

        gradient_fn = eqx.filter_grad(loss_fn, has_aux=True)
        network, optimiser, aux = descend(
            gradient_fn, self.optimiser, state.network, state.optimiser
        )
        metrics, statistics, memory = aux
        state = TrainState(
            network=network,
            statistics=statistics,
            memory=None,
            optimiser=optimiser,
            step=state.step + 1,
        )
        state, metrics = eqx.filter_shard((state, metrics), self.placement.whole)
        memory = eqx.filter_shard(memory, self.placement.split)
        return dataclasses.replace(state, memory=memory), metrics

    def _judge(self, network, statistics, memory, batch):
        # The key is for dropout, which there is none of in a test.
        verdict, _ = judge_batch(network, statistics, memory, batch, jr.key(0))
        metrics = measure(verdict, batch[1], self.data.num_classes)
        solved = verdict.solution.z_star, verdict.injection
        num_examples = self.config.training.spectral_examples
        solved = jtu.tree_map(lambda leaf: leaf[:num_examples], solved)
        metrics, solved = eqx.filter_shard((metrics, solved), self.placement.whole)
        return metrics, solved, eqx.filter_shard(verdict.memory, self.placement.split)

    def _radii(self, network, solved):
        key = jr.key(0)
        cell = ft.partial(network.layer.evaluate, key=key)
        radii = jax.vmap(lambda z, x: inn.spectral_radius(cell, z, x, key=key))(*solved)
        return eqx.filter_shard(radii, self.placement.whole)

    def _call(self, name, function, *args):
        if name not in self._compiled:
            self._compiled[name] = self.clock.compile(function, *args)
        return self._compiled[name](*args)

    def _make_memory(self, batch_size):
        memory = jtu.tree_map(
            lambda leaf: np.broadcast_to(leaf, (batch_size, *leaf.shape)),
            self.network.memory,
        )
        return self.placement.put(memory, self.placement.split)

    def _put_batch(self, batch: Batch) -> Any:
        return self.placement.put(batch, self.placement.split)
