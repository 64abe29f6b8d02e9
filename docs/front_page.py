"""`python docs/front_page.py`: draw the figure of the front page."""

import pathlib
import runpy

import matplotlib.pyplot as plt

from implicitnets import plot


DOCS = pathlib.Path(__file__).parent
STYLES = {"light": "default", "dark": "dark_background"}
# In the colours of text on the site, on its own background.
TEXT = {"light": "#404040", "dark": "#d0d0d0"}


def main() -> None:
    traces = runpy.run_path(str(DOCS / "tutorials" / "solvers.py"))["traces"]
    for scheme, style in STYLES.items():
        with plt.style.context(
            [style, {"text.color": TEXT[scheme], "svg.hashsalt": scheme}]
        ):
            figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
            plot.convergence(traces, axes=axes)
            axes.set(xlim=(0, 100), ylim=(1e-6, 2))
            path = DOCS / "images" / f"convergence-{scheme}.svg"
            figure.savefig(path, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
