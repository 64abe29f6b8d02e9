"""The problems of the benchmarks: arrays for every library, and the cells in JAX.

Only NumPy is imported with the module, so that a peer without JAX can load a problem.
"""

import dataclasses
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

    def first(self, num_examples: int) -> "Problem":
        """The first examples."""
        return dataclasses.replace(
            self,
            inputs=self.inputs[:num_examples],
            cotangent=self.cotangent[:num_examples],
        )

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


def make_problem(
    name: str,
    kind: Kind,
    weights: dict[str, Any],
    inputs: np.ndarray,
    rtol: float,
    rng: np.random.Generator,
) -> Problem:
    """A problem in float32, whose cotangent is random."""
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


def dense_tanh(rho: float, size: int = 256, batch: int = 128, seed: int = 0) -> Problem:
    """`tanh(W z + x)`: a random `W` of a given spectral radius, and small inputs."""
    rng = np.random.default_rng(seed)
    matrix = _with_spectral_radius(rng.standard_normal((size, size)), rho)
    inputs = 0.1 * rng.standard_normal((batch, size))
    name = f"tanh {size}, radius {rho}"
    return make_problem(name, "tanh", {"matrix": matrix}, inputs, 1e-4, rng)


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
    return make_problem(name, "conv", {"kernel": kernel}, inputs, 1e-4, rng)


def linear(rho: float, size: int = 50, batch: int = 1) -> Problem:
    """LIN(rho): `A z + b` with a random symmetric `A`, to `1e-6`."""
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((size, size))
    matrix = _with_spectral_radius(matrix + matrix.T, rho)
    inputs = rng.standard_normal((batch, size))
    return make_problem(f"LIN({rho})", "linear", {"matrix": matrix}, inputs, 1e-6, rng)


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
    return make_problem("ResNet cell", "resnet", weights, inputs, 1e-4, rng)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "dense-0.5": lambda: dense_tanh(0.5),
    "dense-0.9": lambda: dense_tanh(0.9),
    "dense-0.99": lambda: dense_tanh(0.99),
    "dense-1024": lambda: dense_tanh(0.9, size=1024),
    # Few examples, since an implicit ODE solver may go on for all of its steps.
    "dense-1.2": lambda: dense_tanh(1.2, batch=8),
    "resnet": resnet,
    "lin": lambda: linear(0.95, batch=128),
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
