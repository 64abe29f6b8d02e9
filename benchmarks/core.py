"""Does the core do what it promises: speed of convolutions, accuracy, export?

The promises: a convolutional cell runs in the solver and in the adjoint at the speed of
its standalone application; a gradient's relative error does not depend on the scale of
the loss; Anderson acceleration needs a third of plain iteration's evaluations; the last
equilibrium is a better start than zero; and the tutorial's training step exports to
other platforms. The accuracy on digits is the subject of `digits.py`.
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.export
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optimistix as optx
import tyro

import implicitnets as inn

from .kit.measure import (
    compile_and_run,
    print_table,
    promise,
    promise_figure,
    Row,
    save,
    time_calls,
    TimingSettings,
)
from .kit.methods import Method, prepare
from .kit.problems import (
    dense_tanh,
    jax_cell,
    layer_cell,
    linear,
    Reference,
    reference,
    resnet,
)
from .tutorial import mnist


SCALES = (1.0, 1e-4, 1e-8)


@dataclasses.dataclass(frozen=True)
class Config(TimingSettings):
    """Check what the core promises."""


def convolution_speed(config: Config) -> list[Row]:
    """The ResNet cell in the solver and in the adjoint, against its standalone cost."""
    problem = resnet()
    cell = jax_cell(problem.kind)
    method = Method("Anderson", inn.AndersonAcceleration(problem.rtol, 0.0))
    prepared = prepare(problem, reference(problem), method)
    if prepared.solve is None or prepared.gradient is None or not prepared.passed:
        raise RuntimeError(f"{problem.name}: {prepared.row['result']}.")

    def evaluate(weights, x):
        return jax.vmap(lambda x: cell(x, (weights, x)))(x)

    def pull_back(weights, x, cotangent):
        # Of a linear map, as the adjoint's products: the evaluation is not counted.
        return jax.vmap(lambda v, x: jax.vjp(lambda z: cell(z, (weights, x)), x)[1](v))(
            cotangent, x
        )

    arguments = jax.tree.map(jnp.asarray, (problem.weights, problem.inputs))
    evaluation, _ = compile_and_run(evaluate, *arguments)
    product, _ = compile_and_run(pull_back, *arguments, jnp.asarray(problem.cotangent))
    seconds = time_calls(
        {
            "solve": prepared.solve.call,
            "gradient": prepared.gradient.call,
            "evaluation": evaluation.call,
            "product": product.call,
        },
        config.repeats,
        problem.name,
    )
    # The solver's, and the layer's own for the residual of what it returns.
    evaluations = prepared.row["evaluations"] + 1
    # The last product is that with the weights.
    products = prepared.row["backward products"] + 1
    backward = seconds["gradient"] - seconds["solve"]
    return [
        promise(
            f"ResNet cell: solve / ({evaluations} evaluations)",
            seconds["solve"] / (evaluations * seconds["evaluation"]),
            1.3,
        ),
        promise(
            f"ResNet cell: backward / ({products} products)",
            backward / (products * seconds["product"]),
            1.5,
        ),
    ]


def gradient_errors() -> list[Row]:
    """The error of a gradient in both precisions, for losses of several scales."""
    ref = reference(dense_tanh(0.9, batch=8))
    rows = []
    for dtype, tolerance, most in ((np.float32, 2e-6, 1e-4), (np.float64, 1e-11, 1e-8)):
        for scale in SCALES:
            error = gradient_error(ref, dtype, tolerance, scale)
            name = np.dtype(dtype).name
            rows.append(promise(f"gradient error, {name}, loss x {scale}", error, most))
    return rows


def gradient_error(ref: Reference, dtype: Any, tolerance: float, scale: float) -> float:
    """The relative error of one gradient."""
    problem = ref.problem

    def loss(weights, x, cotangent):
        layer = inn.DeepEquilibriumNetwork(
            layer_cell(problem.kind, weights),
            inn.AndersonAcceleration(tolerance, 0.0),
            adjoint=inn.ImplicitAdjoint(inn.GivensGMRES(tolerance, 0.0)),
        )
        return jnp.sum(jax.vmap(layer)(x) * (scale * cotangent))

    with jax.enable_x64(dtype is np.float64):
        arguments = jax.tree.map(
            lambda leaf: jnp.asarray(leaf, dtype),
            (problem.weights, problem.inputs, problem.cotangent),
        )
        gradient = jax.jit(jax.grad(loss))(*arguments)
        unscaled = {
            name: np.asarray(g, np.float64) / scale for name, g in gradient.items()
        }
    return ref.gradient_error(unscaled)


def anderson_evaluations() -> list[Row]:
    """How many evaluations Anderson acceleration needs on LIN(0.95)."""
    problem = linear(0.95)
    rows = []
    for history_size, most in ((5, 65), (10, 40)):
        solver = inn.AndersonAcceleration(problem.rtol, 0.0, history_size=history_size)
        row = prepare(problem, None, Method("", solver)).row
        if row["result"] != "ok":
            raise RuntimeError(f"{problem.name}: {row['result']}.")
        what = f"LIN(0.95): evaluations with history {history_size}"
        rows.append(promise(what, row["evaluations"], most))
    return rows


def warm_starts() -> list[Row]:
    """What it takes from the last equilibrium, after the input has moved a little."""
    problem = dense_tanh(0.9)
    layer = inn.DeepEquilibriumNetwork(
        layer_cell(problem.kind, problem.weights),
        inn.AndersonAcceleration(problem.rtol, 0.0),
    )
    solve = jax.jit(jax.vmap(lambda x, z0: layer.solve(x, z0=z0)))
    xs = jnp.asarray(problem.inputs)
    direction = jr.normal(jr.key(0), xs.shape)
    direction *= jnp.linalg.norm(xs) / jnp.linalg.norm(direction)
    last = solve(xs, jnp.zeros_like(xs))
    rows = []
    for share in (0.01, 0.1):
        moved = xs + share * direction
        cold, warm = solve(moved, jnp.zeros_like(xs)), solve(moved, last.z_star)
        for solution in (cold, warm):
            if not np.all(solution.result == optx.RESULTS.successful):
                raise RuntimeError(f"{problem.name}: not solved.")
        most = int(cold.stats["nfe"].max())
        what = f"{problem.name}: evaluations with the input moved by {share:.0%}"
        rows.append(promise(what, int(warm.stats["nfe"].max()), most))
    return rows


def exports() -> list[Row]:
    """Whether the gradient of the tutorial's model exports from this machine."""
    config = mnist.Config()
    model = mnist.Classifier(config, image_size=8, classes=10, key=jr.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    images = jnp.zeros((config.batch_size, 1, 8, 8))
    labels = jnp.zeros(config.batch_size, jnp.int32)

    def gradient(params, images, labels):
        def loss(params):
            model = eqx.combine(params, static)
            return mnist.loss_and_metrics(model, images, labels)[0]

        return jax.tree.leaves(jax.grad(loss)(params))

    rows = []
    for platform in ("cuda", "tpu"):
        export = jax.export.export(jax.jit(gradient), platforms=[platform])
        size = len(export(params, images, labels).mlir_module_serialized)
        print(f"The tutorial's gradient exports to {platform}: {size / 1e3:.0f} kB.")
        rows.append(promise(f"failed exports to {platform}", 0, 0))
    return rows


def main() -> None:
    config = tyro.cli(Config)
    rows = [
        *convolution_speed(config),
        *gradient_errors(),
        *anderson_evaluations(),
        *warm_starts(),
        *exports(),
    ]
    print_table("What the core promises", rows)
    save(config, "core", {"promises": rows}, promise_figure(rows))


if __name__ == "__main__":
    main()
