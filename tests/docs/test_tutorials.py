"""What holds for every tutorial without running it; the documentation runs them."""

import pathlib
import re

import pytest

import implicitnets as inn
from implicitnets import plot


pytestmark = pytest.mark.one_precision


FOLDER = pathlib.Path(__file__).parents[2] / "docs" / "tutorials"
SCRIPTS = sorted(FOLDER.glob("*.py"))


@pytest.fixture(params=SCRIPTS, ids=lambda path: path.stem)
def script(request):
    return request.param.read_text()


def cells(script, kind):
    """The text of its Markdown cells, or of its code cells."""
    for part in re.split(r"^# %%", script, flags=re.MULTILINE)[1:]:
        marker, _, text = part.partition("\n")
        if kind == ("Markdown" if "[markdown]" in marker else "code"):
            yield text


def test_begins_with_its_only_title(script):
    prose = list(cells(script, "Markdown"))
    assert re.match(r"# # \S", prose[0])
    assert len(re.findall(r"^# # ", "\n".join(prose), re.MULTILINE)) == 1


def test_links_are_of_a_kind_that_the_site_resolves(script):
    prose = "\n".join(cells(script, "Markdown"))
    # mkdocs-jupyter leaves references to the API as they are.
    assert not re.search(r"\]\[.*?\]", prose)
    for page in re.findall(r"\]\(\.\./\.\./([^)#]*?)/?(?:#[^)]*)?\)", prose):
        assert (FOLDER.parent / f"{page}.md").exists(), page
    for page in re.findall(r"\]\(\.\./(?!\.)([^)#]*?)/?(?:#[^)]*)?\)", prose):
        assert (FOLDER / f"{page}.py").exists(), page


def test_shows_every_figure_that_it_draws(script):
    num_figures = 0
    is_open = False
    for code in cells(script, "code"):
        for line in code.splitlines():
            is_open |= "plt.subplots(" in line or "plt.figure(" in line
            # A program with options also shows in a notebook what it saves.
            if line.strip() == "plt.show()" or ".savefig(" in line:
                num_figures, is_open = num_figures + 1, False
        assert not is_open, code
    assert num_figures > 0


def test_uses_public_names_only(script):
    modules = {"inn": inn, "plot": plot}
    used = re.findall(r"(?<!\.)\b(inn|plot)\.(\w+(?:\.\w+)*)", script)
    assert used
    for module, dotted in used:
        value = modules[module]
        for name in dotted.split("."):
            assert not name.startswith("_"), dotted
            value = getattr(value, name)
    imports = re.findall(r"^(?:from|import) implicitnets.*", script, re.MULTILINE)
    assert {*imports} <= {
        "import implicitnets as inn",
        "from implicitnets import plot",
    }
