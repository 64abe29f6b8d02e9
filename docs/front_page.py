"""`python docs/front_page.py`: the figure of the front page, the README's headline."""

import pathlib
import re
import runpy

import matplotlib.pyplot as plt

from implicitnets import plot


DOCS = pathlib.Path(__file__).parent
README = DOCS.parent / "README.md"
HEADLINE = re.compile(r"(?<=\[start:headline\] -->\n).*?(?=\n<!-- --8<-- \[end)", re.S)
STYLES = {"light": "default", "dark": "dark_background"}
# Those whose cost is all in the evaluations: no Jacobian, no products with it.
SOLVERS = ("Anderson", "Broyden", "plain iteration", "VCABM3", "Tsit5")


def headline() -> str:
    """The report's headline, with links that work in the README."""
    table = HEADLINE.findall((DOCS / "report.md").read_text())[0]
    table = re.sub(" {2,}", " ", re.sub("-{3,}", "---", table))
    return table.replace("](report.md", "](docs/report.md")


def draw() -> None:
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
    README.write_text(HEADLINE.sub(lambda _: headline(), README.read_text()))
    draw()
