"""The problems of the benchmarks: arrays for every library, and the cells in JAX.

Only NumPy is imported with the module, so that a peer without JAX can load a problem.
"""

import dataclasses
import functools as ft
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import numpy as np


Kind = Literal["tanh", "conv", "linear", "resnet", "tutorial"]
NORM_EPS = 1e-5
NUM_GROUPS = 8


@dataclasses.dataclass(frozen=True)
class Problem:
    """A cell with its weights, a batch of inputs, and a cotangent of the equilibria.

    The gradient that the benchmarks compute is that of `sum(cotangent * z_star)` with
    respect to the weights.
    """

    name: str
    kind: Kind
    weights: dict[str, np.ndarray]
    inputs: np.ndarray
    cotangent: np.ndarray
    rtol: float

    def save(self, path: pathlib.Path) -> None:
        """Write the problem to an `.npz` file."""
        arrays: dict[str, Any] = {
            f"weight_{name}": value for name, value in self.weights.items()
        }
        np.savez(
            path,
            name=self.name,
            kind=self.kind,
            inputs=self.inputs,
            cotangent=self.cotangent,
            rtol=self.rtol,
            **arrays,
        )


def load(path: pathlib.Path) -> Problem:
    """Read a problem that `Problem.save` wrote."""
    with np.load(path) as file:
        arrays = dict(file)
    weights = {
        name.removeprefix("weight_"): arrays[name]
        for name in arrays
        if name.startswith("weight_")
    }
    kind: Any = str(arrays["kind"])
    return Problem(
        name=str(arrays["name"]),
        kind=kind,
        weights=weights,
        inputs=arrays["inputs"],
        cotangent=arrays["cotangent"],
        rtol=float(arrays["rtol"]),
    )


def _problem(name, kind, weights, inputs, rtol, rng) -> Problem:
    cotangent = rng.standard_normal(inputs.shape)
    single = {key: np.asarray(value, np.float32) for key, value in weights.items()}
    return Problem(
        name,
        kind,
        single,
        inputs.astype(np.float32),
        cotangent.astype(np.float32),
        rtol,
    )


def _with_spectral_radius(matrix: np.ndarray, rho: float) -> np.ndarray:
    return matrix * (rho / np.max(np.abs(np.linalg.eigvals(matrix))))


def dense_tanh(rho: float, size: int = 256, batch: int = 128) -> Problem:
    """`tanh(W z + x)`: a random `W` of a given spectral radius, and small inputs."""
    rng = np.random.default_rng(0)
    matrix = _with_spectral_radius(rng.standard_normal((size, size)), rho)
    inputs = 0.1 * rng.standard_normal((batch, size))
    name = f"tanh {size}, radius {rho}"
    return _problem(name, "tanh", {"matrix": matrix}, inputs, 1e-4, rng)


def conv_tanh(
    rho: float, channels: int = 8, size: int = 14, batch: int = 16
) -> Problem:
    """`tanh(conv(z) + x)`, periodic: a random kernel of a given spectral radius."""
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((channels, channels, 3, 3))
    # Periodic convolutions are diagonal in Fourier space but for the channels.
    symbol = np.fft.fft2(kernel, (size, size)).transpose(2, 3, 0, 1)
    kernel = kernel * (rho / np.max(np.abs(np.linalg.eigvals(symbol))))
    inputs = 0.1 * rng.standard_normal((batch, channels, size, size))
    name = f"conv tanh, radius {rho}"
    return _problem(name, "conv", {"kernel": kernel}, inputs, 1e-4, rng)


def linear(
    rho: float, *, symmetric: bool = True, size: int = 50, batch: int = 1
) -> Problem:
    """LIN(rho): `A z + b` with a random `A` of a given spectral radius, to `1e-6`."""
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((size, size))
    if symmetric:
        matrix = matrix + matrix.T
    matrix = _with_spectral_radius(matrix, rho)
    inputs = rng.standard_normal((batch, size))
    name = f"LIN({rho})" if symmetric else f"LIN({rho}), nonsymmetric"
    return _problem(name, "linear", {"matrix": matrix}, inputs, 1e-6, rng)


def resnet(
    channels: int = 24, inner: int = 32, size: int = 28, batch: int = 32
) -> Problem:
    """The cell of jaxopt's and of the Deep Implicit Layers tutorial's image classifier.

    `norm(relu(z + norm(x + conv(norm(relu(conv(z)))))))`, with group norms.
    """
    rng = np.random.default_rng(0)
    weights = {
        "conv1": 0.01 * rng.standard_normal((inner, channels, 3, 3)),
        "conv2": 0.01 * rng.standard_normal((channels, inner, 3, 3)),
    }
    for name, features in (("norm1", inner), ("norm2", channels), ("norm3", channels)):
        weights[f"{name}_scale"] = np.ones(features)
        weights[f"{name}_shift"] = np.zeros(features)
    inputs = rng.standard_normal((batch, channels, size, size))
    return _problem("ResNet cell", "resnet", weights, inputs, 1e-4, rng)


def tutorial(cache: pathlib.Path, num_images: int = 128) -> Problem:
    """The cell of the tutorial's network, trained on digits, at its test images.

    Trained at its default settings when `cache`, an `.npz` file, does not exist.
    """
    if cache.exists():
        return load(cache)
    import jax
    import jax.numpy as jnp
    from tutorial import mnist

    config = mnist.Config()
    train_set, test_set = mnist.load(config)
    model = mnist.train(config, train_set, test_set).model
    cell: Any = model.deq.cell
    weights = {
        "state": np.asarray(cell.state.weight),
        "inject": np.asarray(cell.inject.weight),
        "mix": np.asarray(cell.mix.weight),
    }
    inputs = np.asarray(jax.vmap(model.stem)(jnp.asarray(test_set.images[:num_images])))
    rng = np.random.default_rng(0)
    problem = _problem("trained cell", "tutorial", weights, inputs, 1e-4, rng)
    cache.parent.mkdir(parents=True, exist_ok=True)
    problem.save(cache)
    return problem


# By name, given the folder in which the trained weights are kept.
PROBLEMS: dict[str, Callable[[pathlib.Path], Problem]] = {
    "dense-0.5": lambda _: dense_tanh(0.5),
    "dense-0.9": lambda _: dense_tanh(0.9),
    "dense-0.99": lambda _: dense_tanh(0.99),
    "dense-1024": lambda _: dense_tanh(0.9, size=1024),
    # Few examples, since an implicit ODE solver may go on for all of its steps.
    "dense-1.2": lambda _: dense_tanh(1.2, batch=8),
    "resnet": lambda _: resnet(),
    "trained": lambda folder: tutorial(folder / "trained_cell.npz"),
    "lin": lambda _: linear(0.95, batch=128),
}


def jax_cell(kind: Kind) -> Any:
    """The cell as a function `cell(z, (weights, x))` of one example, in JAX."""
    import jax
    import jax.lax as lax
    import jax.numpy as jnp

    def convolve(kernel, x):
        numbers = ("NCHW", "OIHW", "NCHW")
        return lax.conv_general_dilated(
            x[None], kernel, (1, 1), "SAME", dimension_numbers=numbers
        )[0]

    def norm(weights, name, x):
        # Only the channels are split: an image flattened to one axis makes XLA on CPU
        # compute every element's place by divisions, at half the cell's speed.
        groups = x.reshape(NUM_GROUPS, -1, *x.shape[1:])
        mean = jnp.mean(groups, axis=(1, 2, 3), keepdims=True)
        variance = jnp.var(groups, axis=(1, 2, 3), keepdims=True)
        x = ((groups - mean) * lax.rsqrt(variance + NORM_EPS)).reshape(x.shape)
        scale, shift = weights[f"{name}_scale"], weights[f"{name}_shift"]
        return x * scale[:, None, None] + shift[:, None, None]

    def tanh(z, args):
        weights, x = args
        return jnp.tanh(weights["matrix"] @ z + x)

    def conv(z, args):
        weights, x = args
        z = jnp.pad(z, ((0, 0), (1, 1), (1, 1)), mode="wrap")
        numbers = ("NCHW", "OIHW", "NCHW")
        z = lax.conv_general_dilated(
            z[None], weights["kernel"], (1, 1), "VALID", dimension_numbers=numbers
        )[0]
        return jnp.tanh(z + x)

    def linear(z, args):
        weights, x = args
        return weights["matrix"] @ z + x

    def resnet(z, args):
        weights, x = args
        y = norm(weights, "norm1", jax.nn.relu(convolve(weights["conv1"], z)))
        y = norm(weights, "norm2", x + convolve(weights["conv2"], y))
        return norm(weights, "norm3", jax.nn.relu(z + y))

    def tutorial(z, args):
        weights, x = args
        y = jnp.tanh(convolve(weights["state"], z))
        y = y + jnp.tanh(convolve(weights["inject"], x))
        return jnp.tanh(convolve(weights["mix"], y))

    return {
        "tanh": tanh,
        "conv": conv,
        "linear": linear,
        "resnet": resnet,
        "tutorial": tutorial,
    }[kind]


def layer_cell(kind: Kind, weights: Any) -> Any:
    """The cell as the layers take it: a pytree to be called as `cell(z, x)`."""
    import jax

    cell = jax_cell(kind)
    return jax.tree_util.Partial(lambda weights, z, x: cell(z, (weights, x)), weights)


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
    import jax
    import jax.numpy as jnp

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
    import jax

    return jax.jit(jax.vmap(jax_cell(kind), in_axes=(0, (None, 0))))


def reference(problem: Problem) -> Reference:
    """Solve a problem and its adjoint to a relative residual of `1e-10`; checked."""
    import jax
    import jax.numpy as jnp

    import implicitnets as inn

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
