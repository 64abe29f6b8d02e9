"""`python docs/front_page.py`: draw the figure of the front page."""

import pathlib
import runpy

import matplotlib.pyplot as plt

from implicitnets import plot


DOCS = pathlib.Path(__file__).parent
STYLES = {"light": "default", "dark": "dark_background"}
# Those whose cost is all in the evaluations: no Jacobian, no products with it.
SOLVERS = ("Anderson", "Broyden", "plain iteration", "VCABM3", "Tsit5")


def main() -> None:
    traces = runpy.run_path(str(DOCS / "tutorials" / "solvers.py"))["traces"]
    for scheme, style in STYLES.items():
        options = {"legend.frameon": False, "svg.hashsalt": scheme}
        with plt.style.context([style, options]):
            figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
            plot.convergence({name: traces[name] for name in SOLVERS}, axes=axes)
            axes.set(xlim=(0, 80), ylim=(3e-6, 2))
            path = DOCS / "images" / f"convergence-{scheme}.svg"
            figure.savefig(path, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
