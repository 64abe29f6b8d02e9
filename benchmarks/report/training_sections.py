"""What the page on training shows: `report.py --page training` runs and writes it."""

from collections.abc import Callable

from matplotlib.figure import Figure

from ..kit.measure import curve_figure, Row
from .sections import digits, distinct, dots, Exhibit, Section, select, Tables, times


ACCURACY = "accuracy (%)"
BITS = "bits per character"
MEMORY = "training memory (MB)"
STEP = "training step (ms)"


def curves(
    values: dict[str, str], x: str = "training step", rows: str = "curves"
) -> Callable[[Tables], Figure]:
    """A panel for every column, in which every model has a curve."""
    return lambda tables: curve_figure(tables[rows], x=x, values=values)


# All of Fashion-MNIST.


def last_epochs(tables: Tables) -> list[Row]:
    """The last row of every model."""
    return list({row["model"]: row for row in tables["rows"]}.values())


def fashion_sentences(tables: Tables) -> str:
    return " ".join(
        f"{row['model']}: {row[ACCURACY]:.1f} % after {row['epoch']:.0f} epochs of "
        f"{row['an epoch (min)']:.1f} minutes, with {row['evaluations, test']:.1f} "
        "evaluations for a mean test image."
        for row in last_epochs(tables)
    )


# SciML's tutorial.


def trained(tables: Tables) -> list[Row]:
    """The rows of the solvers, without the pretraining."""
    return [row for row in tables["rows"] if row["phase"] != "pretraining"]


def tutorial_table(tables: Tables) -> list[Row]:
    return [
        {
            "model": row["model"],
            "solver": row["phase"],
            "epoch (s)": row["epoch (s)"],
            "total (s)": row["total (s)"],
            "with compilation (s)": row["total with compilation (s)"],
            ACCURACY: row[ACCURACY]
            if row["deviation (%)"] is None
            else f"{row[ACCURACY]:.1f} ± {row['deviation (%)']:.1f}",
            "evaluations": row["evaluations"],
            "converged (%)": row["converged (%)"],
            **{k: v for k, v in row.items() if k.startswith("theirs: ")},
        }
        for row in tables["rows"]
    ]


def tutorial_sentences(tables: Tables) -> str:
    told = []
    for name in distinct(trained(tables), "model"):
        rows = [row for row in trained(tables) if row["model"] == name]
        quickest = min(rows, key=lambda row: row["epoch (s)"])
        accuracies = [row[ACCURACY] for row in rows]
        told.append(
            f"{name}: the quickest epochs are those of {quickest['phase']} "
            f"({digits(quickest['epoch (s)'])} s); accuracies are "
            f"{min(accuracies):.1f} to {max(accuracies):.1f} %."
        )
    for solver in distinct(trained(tables), "phase"):
        rows = [row for row in trained(tables) if row["phase"] == solver]
        most = max(row["converged (%)"] for row in rows)
        if most < 50:
            told.append(
                f"Of the solves by {solver} at most {digits(most)} % converge in their "
                "ten steps."
            )
    return " ".join(told)


# Language models.


def language_sentences(tables: Tables) -> str:
    equilibrium, layers = tables["rows"]
    return (
        f"The equilibrium takes {equilibrium[BITS]:.2f} bits per character, "
        f"{layers['model']} {layers[BITS]:.2f}. Its training step takes "
        f"{equilibrium[MEMORY] / layers[MEMORY]:.2g} times their memory and "
        f"{equilibrium[STEP] / layers[STEP]:.2g} times their time."
    )


# Several scales.


def multiscale_sentences(tables: Tables) -> str:
    two, one = tables["summary"]
    gain = two[ACCURACY] - one[ACCURACY]
    does = "beat" if gain > 0 else "do not beat"
    ratio = two[STEP] / one[STEP]
    return (
        f"Two scales {does} one of as many weights: {gain:+.1f} points of accuracy, in "
        f"{times([ratio])} the time."
    )


TRAINING_SECTIONS = (
    Section(
        "fashion",
        "All of Fashion-MNIST",
        "How accurate are a residual network and the network of SciML's tutorial after "
        "at most half an hour? Both take at most eight steps of Anderson acceleration "
        "and the penalty on the Jacobian; the residual network has the Jacobian-free "
        "gradient, the other one, which that makes diverge, the implicit one.",
        (
            Exhibit(
                "fashion",
                "Test accuracy in the course of the training",
                last_epochs,
                curves({ACCURACY: "test accuracy (%)"}, "training (min)", "rows"),
                fashion_sentences,
            ),
        ),
        minutes=75,
        quick=("--train-size", "100", "--test-size", "50"),
        takes="data_dir",
    ),
    Section(
        "sciml_tutorial",
        "SciML's tutorial, with every solver",
        "How long does the protocol of the MNIST tutorial of "
        "DeepEquilibriumNetworks.jl take, with every kind of model and every solver? "
        "Ours is on Fashion-MNIST and on one CPU core; the columns *theirs* are from "
        "the log on their page: MNIST, on an NVIDIA GPU, one seed. A solve has ten "
        "steps, as there. A row `pretraining` is what its model's others begin from, "
        "and part of their totals.",
        (
            Exhibit(
                "sciml_tutorial",
                "Seconds that an epoch takes",
                tutorial_table,
                lambda t: dots(trained(t), ("phase",), "model", "epoch (s)", "s"),
                tutorial_sentences,
            ),
        ),
        minutes=900,
        quick=("--seeds", "1", "--model-types", "deq", "--solvers", "anderson"),
        takes="data_dir",
    ),
    Section(
        "language_model",
        "A language model",
        "Is an equilibrium worth more than as many layers with the same weights? A "
        "transformer on the characters of the King James Bible (4.4 MB, as the Debian "
        "package `bible-kjv-text` has it), trained to its equilibrium, and as a stack "
        "of weight-tied layers, as many as the equilibrium took evaluations.",
        (
            Exhibit(
                "language_model",
                "Bits that a character of the test text takes",
                lambda tables: tables["rows"],
                curves({BITS: BITS}),
                language_sentences,
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
        "multiscale",
        "Two scales against one",
        "Are several scales worth more than one of the same number of weights? The "
        "smallest network of Bai et al. (2020), on images of Fashion-MNIST.",
        (
            Exhibit(
                "multiscale",
                "Test accuracy, and what it costs",
                lambda t: select(
                    t["summary"],
                    *("model", "parameters", ACCURACY, "evaluations", "residual"),
                    *("spectral radius", STEP, MEMORY),
                ),
                curves({"loss": "training loss", "evaluations": "cell evaluations"}),
                multiscale_sentences,
            ),
        ),
        minutes=60,
        quick=("--train-size", "64", "--test-size", "32", "--epochs", "1"),
        takes="data_dir",
    ),
)
