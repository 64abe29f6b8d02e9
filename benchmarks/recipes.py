"""The published training recipes, from which the command line starts.

Sizes, schedules and budgets are those of the papers' code. Their solvers and ours do
not count steps in the same way, so a budget is a like one, not the same.
"""

import dataclasses

from data import DataOptions
from equilibrium import EquilibriumOptions
from networks import MDEQOptions, ResNetOptions, TanhOptions, TutorialOptions
from optimiser import OptimiserOptions
from trainer import Config, JacobianOptions, TrainingOptions

from implicitnets import models


_CIFAR = DataOptions("cifar10", standardise=True)
_BROYDEN = EquilibriumOptions(
    "broyden", rtol=1e-3, max_steps=18, adjoint_rtol=1e-3, adjoint_max_steps=20
)
_COSINE = OptimiserOptions(schedule="cosine", last_learning_rate=1e-6)

RECIPES: dict[str, tuple[str, Config]] = {
    "tutorial": (
        "The convolutional classifier of SciML's MNIST tutorial.",
        Config(
            TutorialOptions(),
            optimiser=OptimiserOptions(learning_rate=5e-4),
            training=TrainingOptions(
                pretraining_epochs=2, pretraining_depth=5, epochs=3, skip_weight=0.01
            ),
        ),
    ),
    "tanh": (
        "The perceptron of the Deep Implicit Layers tutorial, chapter 1.",
        Config(
            TanhOptions(),
            equilibrium=EquilibriumOptions("fixed-point", rtol=1e-4, max_steps=200),
            optimiser=OptimiserOptions(
                "sgd", learning_rate=0.1, momentum=0.0, schedule="step", step_epochs=5
            ),
            training=TrainingOptions(epochs=10, batch_size=100),
        ),
    ),
    "resnet": (
        "The residual network of the Deep Implicit Layers tutorial, chapter 4.",
        Config(
            ResNetOptions(),
            _CIFAR,
            EquilibriumOptions("anderson", rtol=1e-2, max_steps=25, adjoint_rtol=1e-2),
            _COSINE,
            training=TrainingOptions(epochs=50, batch_size=100),
        ),
    ),
    "mdeq-tiny": (
        "The smallest multiscale network of Bai et al. (2020), for CIFAR-10.",
        Config(
            MDEQOptions.of(models.MDEQConfig.cifar_tiny()),
            _CIFAR,
            _BROYDEN,
            OptimiserOptions(
                schedule="cosine", last_learning_rate=1e-6, weight_decay=2.5e-6
            ),
            # 3,000 steps of the 19,550.
            training=TrainingOptions(
                pretraining_epochs=7.7,
                pretraining_depth=10,
                epochs=42.3,
                batch_size=128,
            ),
        ),
    ),
    "mdeq-large": (
        "The large multiscale network of Bai et al. (2020), for CIFAR-10.",
        Config(
            MDEQOptions.of(models.MDEQConfig.cifar_large()),
            DataOptions("cifar10", standardise=True, augment=True),
            _BROYDEN,
            _COSINE,
            # 20,000 steps of the 85,800.
            training=TrainingOptions(
                pretraining_epochs=51.2,
                pretraining_depth=10,
                epochs=168.8,
                batch_size=128,
            ),
        ),
    ),
    "mdeq-large-regularised": (
        "The same with the Jacobian regularisation of Bai et al. (2021).",
        Config(
            dataclasses.replace(
                MDEQOptions.of(models.MDEQConfig.cifar_large()), dropout=0.22
            ),
            DataOptions("cifar10", standardise=True, augment=True),
            EquilibriumOptions(
                "broyden", max_steps=8, adjoint_rtol=1e-3, adjoint_max_steps=7
            ),
            _COSINE,
            JacobianOptions(
                jacobian_weight=0.4,
                jacobian_probability=0.02,
                jacobian_samples=2,
                jacobian_last_epoch=90,
            ),
            # 16,000 steps of the 114,400.
            TrainingOptions(
                pretraining_epochs=30.8,
                pretraining_depth=8,
                epochs=189.2,
                batch_size=96,
            ),
        ),
    ),
}
