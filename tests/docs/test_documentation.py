import inspect
import pathlib
import re

import jax
import jax.numpy as jnp
import optimistix as optx
import pytest

import implicitnets as inn
from benchmarks.report.readme import headline
from implicitnets import plot


pytestmark = pytest.mark.one_precision


ROOT = pathlib.Path(__file__).parents[2]


def code_blocks(page):
    text = (ROOT / page).read_text()
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/getting_started.md"])
def test_code_runs_and_prints_what_the_page_says(page, capsys):
    code = "\n".join(code_blocks(page))
    # As users have it: Optax promotes integers to floating point.
    with jax.numpy_dtype_promotion("standard"):
        exec(code, {})
    promised = re.findall(r"^print\(.*\)  # (.*)$", code, flags=re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == promised


def test_code_for_users_of_other_libraries_finds_equilibria():
    blocks = code_blocks("docs/coming_from.md")
    ours = [code for code in blocks if code.startswith("# implicitnets")]
    results = "z", "solution.z_star", "solution.value"
    names = {
        "cell": lambda z, x: jnp.tanh(0.5 * z + jax.tree.leaves(x)[-1]),
        "init": jnp.sin,
        "inn": inn,
        "jax": jax,
        "optx": optx,
        "params": jnp.zeros(3),
        "x": jnp.ones((2, 3)),
        "z0": jnp.zeros((2, 3)),
    }
    for code, result in zip(ours, results, strict=True):
        exec(code, names)
        z = eval(result, names)
        assert jnp.allclose(names["cell"](z, names["x"]), z, atol=1e-2)


def test_the_readme_has_the_headline_of_the_report():
    report, readme = (ROOT / page for page in ("docs/report.md", "README.md"))
    # The report's command writes both.
    assert headline(report.read_text()) in readme.read_text()


def test_every_public_name_has_its_place_in_the_reference():
    public = {
        f"{module.__name__}.{name}"
        for module in (inn, inn.nn, inn.models, plot)
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not inspect.ismodule(value)
        # `plot` is no package: what it imports is for itself.
        and (module is not plot or value.__module__ == plot.__name__)
    }
    pages = [path.read_text() for path in (ROOT / "docs" / "api").glob("*.md")]
    documented = re.findall(
        r"^::: (implicitnets\.[\w.]+)$", "\n".join(pages), re.MULTILINE
    )
    assert sorted(documented) == sorted(public)
