"""The answers of the problems to float64's accuracy, to check others against."""

import dataclasses
import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import implicitnets as inn

from .problems import jax_cell, Kind, layer_cell, Problem


# By how much rounding to float32 may lift a residual over its tolerance.
ROUNDING = 2 * float(np.finfo(np.float32).eps)


@dataclasses.dataclass(frozen=True)
class Reference:
    """The equilibria and the gradient of a problem, to float64's accuracy."""

    problem: Problem
    z_star: np.ndarray
    gradient: dict[str, np.ndarray]

    def error(self, z: np.ndarray) -> float:
        """The relative error of the equilibria, the largest of an example."""
        wrong = np.linalg.norm((z - self.z_star).reshape(len(z), -1), axis=1)
        return float((wrong / self.norms).max())

    @property
    def norms(self) -> np.ndarray:
        """The norm of every example's equilibrium."""
        return np.linalg.norm(self.z_star.reshape(len(self.z_star), -1), axis=1)

    def cosine(self, gradient: dict[str, np.ndarray]) -> float:
        """The cosine of the angle between a gradient and the exact one."""
        a, b = (
            np.concatenate([np.ravel(g[n]).astype(float) for n in sorted(gradient)])
            for g in (gradient, self.gradient)
        )
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))

    def gradient_error(self, gradient: dict[str, np.ndarray]) -> float:
        """The relative error of a gradient, over all weights together."""
        names = list(self.gradient)
        wrong = sum(np.sum((gradient[n] - self.gradient[n]) ** 2.0) for n in names)
        return float(np.sqrt(wrong / sum(np.sum(self.gradient[n] ** 2) for n in names)))


def residuals(problem: Problem, z: np.ndarray) -> np.ndarray:
    """Each example's relative residual, `norm(f(z) - z) / norm(f(z))`, in float64."""
    with jax.enable_x64(True):
        weights, x, z = jax.tree.map(
            lambda leaf: jnp.asarray(leaf, jnp.float64),
            (problem.weights, problem.inputs, z),
        )
        f = np.asarray(_jitted_cell(problem.kind)(z, (weights, x))).reshape(len(z), -1)
        z = np.asarray(z).reshape(len(z), -1)
    return np.linalg.norm(f - z, axis=1) / np.linalg.norm(f, axis=1)


@ft.cache
def _jitted_cell(kind: Kind) -> Any:
    """A cell of a batch, compiled once for all that is checked with it."""
    return jax.jit(jax.vmap(jax_cell(kind), in_axes=(0, (None, 0))))


def reference(problem: Problem) -> Reference:
    """Solve a problem and its adjoint to a relative residual of `1e-10`; checked."""
    solver = inn.AndersonAcceleration(rtol=1e-10, atol=0.0, history_size=10)
    adjoint = inn.ImplicitAdjoint(
        inn.GivensGMRES(rtol=1e-10, atol=0.0, restart=40, max_steps=5000)
    )

    def loss(weights, probe, x, cotangent):
        cell = layer_cell(problem.kind, weights)
        deq = inn.DeepEquilibriumNetwork(cell, solver, adjoint=adjoint, max_steps=5000)
        z = jax.vmap(lambda x, probe: deq(x, probe=probe))(x, probe)
        return jnp.sum(z * cotangent), z

    with jax.enable_x64(True):
        arguments = jax.tree.map(
            lambda leaf: jnp.asarray(leaf, jnp.float64),
            (problem.weights, problem.inputs, problem.cotangent),
        )
        weights, *others = arguments
        probe = inn.AdjointReport.probe((len(problem.inputs),))
        differentiate = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
        (gradient, report), z = differentiate(weights, probe, *others)
        backward = np.where(report.successful, report.residual, np.inf)
        gradient = {name: np.asarray(value) for name, value in gradient.items()}
        z = np.asarray(z)
    for what, worst in (("", residuals(problem, z)), (" of the adjoint", backward)):
        if not worst.max() < 1e-9:
            raise RuntimeError(
                f"No reference for {problem.name}: residual{what} {worst.max():.1e}."
            )
    return Reference(problem, z, gradient)
