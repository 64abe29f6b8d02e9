"""What is measured of a batch, and its means over several."""

import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
from jaxtyping import Array, Float, Int, Shaped

from .data import IGNORED
from .networks import Verdict


class Mean(eqx.Module):
    """Sums, of which the mean is wanted in the end."""

    total: Float[Array | np.ndarray, "..."]
    weight: Float[Array | np.ndarray, "..."]

    @property
    def value(self) -> Float[Array | np.ndarray, "..."]:
        """The mean of what there is, each of weight one; of nothing, zero."""
        return self.total / jnp.maximum(self.weight, 1)


Metrics = dict[str, Mean]


def which_count(targets: Int[Array | np.ndarray, "batch ..."]) -> Any:
    """Which examples of a batch have a target that counts."""
    return (targets != IGNORED).reshape(len(targets), -1).any(axis=1)


def mean_of(values: Shaped[Array, "..."], counts: Shaped[Array, "..."]) -> Mean:
    """Values of which some count, to take the mean of."""
    weights = counts.astype(jnp.result_type(float))
    values = jnp.where(weights > 0, values.astype(weights.dtype), 0)
    return Mean(jnp.sum(values), jnp.sum(weights))


def measure(
    verdict: Verdict, targets: Int[Array, "batch ..."], num_classes: int
) -> Metrics:
    """The metrics of a batch, over the targets and the examples that count."""
    counts, examples = targets != IGNORED, which_count(targets)
    solution = verdict.solution
    norm = jax.vmap(optx.two_norm)
    image = jtu.tree_map(jnp.add, solution.z_star, solution.residual)
    stats = solution.stats
    metrics = {
        "loss": mean_of(verdict.loss, counts),
        "accuracy": mean_of(verdict.prediction == targets, counts),
        "steps": mean_of(stats["num_steps"], examples),
        # Other libraries' solvers do not tell; most evaluate the cell once a step.
        "evaluations": mean_of(stats.get("nfe", stats["num_steps"]), examples),
        "converged": mean_of(solution.result == optx.RESULTS.successful, examples),
        "residual": mean_of(norm(solution.residual) / norm(image), examples),
    }
    if "num_matvecs" in stats:
        metrics["products"] = mean_of(stats["num_matvecs"], examples)
    if targets.ndim == 3:
        metrics["mean_iou"] = _intersection_over_union(
            verdict.prediction, targets, num_classes, counts
        )
    return metrics


def _intersection_over_union(prediction, targets, num_classes, counts):
    weights = counts.astype(jnp.result_type(float))

    def count(classes, weights):
        return jnp.zeros(num_classes, weights.dtype).at[classes].add(weights)

    # The ignored ones count nothing, wherever they are counted.
    hits = count(prediction, jnp.where(prediction == targets, weights, 0))
    return Mean(hits, count(prediction, weights) + count(targets, weights) - hits)


def means(metrics: Sequence[Metrics]) -> dict[str, float]:
    """The means over some batches; of a vector, of those entries that there are."""

    def mean(name):
        batches = [jax.device_get(batch[name]) for batch in metrics]
        total, weight = (
            np.sum(np.stack(sums), axis=0)
            for sums in zip(*((_vector(m.total), _vector(m.weight)) for m in batches))
        )
        present = weight > 0
        return float(np.mean(total[present] / weight[present]))

    return {name: mean(name) for name in metrics[0]}


def to_lists(metrics: Sequence[Metrics]) -> list[dict[str, list[Any]]]:
    """The sums of some batches, for JSON; what is not finite is `None`."""

    def values(sums):
        return [value if math.isfinite(value) else None for value in _vector(sums)]

    return [
        {name: [values(m.total), values(m.weight)] for name, m in batch.items()}
        for batch in jax.device_get(list(metrics))
    ]


def from_lists(lists: Sequence[dict[str, list[Any]]]) -> list[Metrics]:
    """The sums that `to_lists` was given."""

    def mean(sums):
        total, weight = (np.array(values, np.float64) for values in sums)
        return Mean(total, weight)

    return [{name: mean(sums) for name, sums in batch.items()} for batch in lists]


def _vector(sums: Any) -> Float[np.ndarray, " value"]:
    return np.ravel(np.asarray(sums, np.float64))
