"""The published training recipes, from which the command line starts.

Sizes, schedules and budgets are those of the papers' code. Its solvers count steps in
another way than this library's, so a budget is similar, not equal. Tests of texts have
a larger one.
"""

import dataclasses
import sys
from typing import Any

from implicitnets import models

from .config import Config, JacobianOptions, TrainingOptions
from .data import DataOptions
from .equilibrium import EquilibriumOptions
from .optimiser import OptimiserOptions
from .sciml import SciMLConfig


# Any vocabulary fits: its size comes with the text.
SMALL_TRANSFORMER = models.TransformerConfig(vocab_size=sys.maxsize)

_CIFAR = DataOptions("cifar10", standardise=True)
_BROYDEN = EquilibriumOptions(
    "broyden", rtol=1e-3, max_steps=18, adjoint_rtol=1e-3, adjoint_max_steps=20
)
_COSINE = OptimiserOptions(schedule="cosine", last_learning_rate=1e-6)

# What fits into half an hour on two cores.
_FASHION = DataOptions("fashion_mnist", standardise=True)
FEW_STEPS = EquilibriumOptions(
    "anderson", rtol=1e-2, max_steps=8, adjoint="jacobian-free"
)
# Without it the spectral radius grows beyond one, and the tests are of other states
# than those that the head was trained on.
CONTRACT = JacobianOptions(jacobian_weight=2.0, jacobian_probability=0.5)
_QUICK = OptimiserOptions(learning_rate=2e-3, schedule="cosine", warmup_steps=100)

# A position of a text sees later ones by less than the last digit that is shown.
_TIGHT_TESTS: dict[str, Any] = {"test_rtol": 1e-4, "test_max_steps": 100}

_WIKITEXT = DataOptions("wikitext103", sequence_length=150)
_WARMUP = OptimiserOptions(
    learning_rate=2.5e-4, schedule="cosine", warmup_steps=16_000, clip=0.25
)
# 32,000 of the 300,000 steps, of 150 words in each of 56 streams.
_WIKITEXT_TRAINING = TrainingOptions(
    pretraining_epochs=2.6,
    pretraining_depth=2,
    epochs=21.8,
    batch_size=56,
    test_every=0.4,
)

RECIPES: dict[str, tuple[str, Config]] = {
    "tutorial": (
        "The convolutional classifier of SciML's MNIST tutorial.",
        Config(
            SciMLConfig(),
            optimiser=OptimiserOptions(learning_rate=5e-4),
            training=TrainingOptions(
                pretraining_epochs=2, pretraining_depth=5, epochs=3, skip_weight=0.01
            ),
        ),
    ),
    "tutorial-fashion": (
        "The network of SciML's tutorial, for 30 minutes on Fashion-MNIST.",
        Config(
            SciMLConfig(),
            _FASHION,
            # The Jacobian-free gradient makes this one diverge.
            EquilibriumOptions(
                "anderson",
                rtol=1e-2,
                max_steps=8,
                adjoint_rtol=1e-2,
                adjoint_max_steps=8,
            ),
            _QUICK,
            JacobianOptions(jacobian_weight=1.0, jacobian_probability=0.4),
            TrainingOptions(epochs=3, batch_size=50),
        ),
    ),
    "tanh": (
        "The perceptron of the Deep Implicit Layers tutorial, chapter 1.",
        Config(
            models.TanhConfig(),
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
            models.ResNetConfig(),
            _CIFAR,
            EquilibriumOptions("anderson", rtol=1e-2, max_steps=25, adjoint_rtol=1e-2),
            _COSINE,
            training=TrainingOptions(epochs=50, batch_size=100),
        ),
    ),
    "resnet-fashion": (
        "A residual network, for half an hour on Fashion-MNIST.",
        Config(
            # A quarter of the pixels, and a head that sees where things are.
            models.ResNetConfig(
                channels=32,
                inner_channels=48,
                gain=4.0,
                stride=2,
                pool_size=2,
                pool_stride=2,
            ),
            _FASHION,
            dataclasses.replace(FEW_STEPS, max_steps=12),
            dataclasses.replace(_QUICK, learning_rate=3e-3),
            # Ten times as much has the cell contract until it adds little to the stem.
            JacobianOptions(jacobian_weight=0.1, jacobian_probability=0.1),
            TrainingOptions(epochs=8, batch_size=50),
        ),
    ),
    "mdeq-tiny": (
        "The smallest multiscale network of Bai et al. (2020), for CIFAR-10.",
        Config(
            models.MDEQConfig.cifar_tiny(),
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
    "mdeq-fashion": (
        "The smallest multiscale network, for 30 minutes on Fashion-MNIST.",
        Config(
            models.MDEQConfig(),
            dataclasses.replace(_FASHION, train_size=15_000),
            FEW_STEPS,
            _QUICK,
            CONTRACT,
            TrainingOptions(epochs=1, batch_size=50),
        ),
    ),
    "mdeq-large": (
        "The large multiscale network of Bai et al. (2020), for CIFAR-10.",
        Config(
            models.MDEQConfig.cifar_large(),
            DataOptions("cifar10", standardise=True, augment=4),
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
            models.MDEQConfig.cifar_large_regularised(),
            DataOptions("cifar10", standardise=True, augment=4),
            EquilibriumOptions(
                "broyden", max_steps=8, max_steps_delta=2, adjoint_max_steps=7
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
    "causal-transformer": (
        "The small transformer without a memory, of deq-jax.",
        Config(
            models.CausalTransformerConfig(),
            DataOptions("text", sequence_length=128),
            EquilibriumOptions("broyden", rtol=1e-4, test_max_steps=100),
            OptimiserOptions(learning_rate=2e-4, betas=(0.9, 0.99), clip=0.25),
            training=TrainingOptions(epochs=10, batch_size=16),
        ),
    ),
    "transformer": (
        "A small transformer with a memory, for characters.",
        Config(
            SMALL_TRANSFORMER,
            DataOptions("text", level="character"),
            EquilibriumOptions(**_TIGHT_TESTS),
            optimiser=OptimiserOptions(schedule="cosine", warmup_steps=200, clip=0.25),
            training=TrainingOptions(
                pretraining_epochs=1, pretraining_depth=3, epochs=4
            ),
        ),
    ),
    "transformer-wikitext103": (
        "The transformer of Bai et al. (2019), for WikiText-103.",
        Config(
            models.TransformerConfig.wikitext103(),
            _WIKITEXT,
            EquilibriumOptions(
                "anderson", max_steps=30, adjoint_max_steps=35, **_TIGHT_TESTS
            ),
            _WARMUP,
            training=_WIKITEXT_TRAINING,
        ),
    ),
    "transformer-wikitext103-regularised": (
        "The same with the Jacobian regularisation of Bai et al. (2021).",
        Config(
            models.TransformerConfig.wikitext103_regularised(),
            _WIKITEXT,
            EquilibriumOptions(
                "anderson",
                max_steps=12,
                max_steps_delta=2,
                adjoint_max_steps=13,
                **_TIGHT_TESTS,
            ),
            _WARMUP,
            JacobianOptions(
                jacobian_weight=1.9, jacobian_every=35_000, jacobian_probability=0.35
            ),
            _WIKITEXT_TRAINING,
        ),
    ),
    "transformer-wikitext103-pre-norm": (
        "The same with layer normalisation in front of the layers.",
        Config(
            models.TransformerConfig.wikitext103_pre_norm(),
            _WIKITEXT,
            EquilibriumOptions(
                "anderson",
                max_steps=14,
                max_steps_delta=2,
                adjoint_max_steps=14,
                **_TIGHT_TESTS,
            ),
            _WARMUP,
            JacobianOptions(
                jacobian_weight=2.0, jacobian_every=30_000, jacobian_probability=0.4
            ),
            _WIKITEXT_TRAINING,
        ),
    ),
}
