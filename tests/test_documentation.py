import inspect
import pathlib
import re

import implicitnets as inn


ROOT = pathlib.Path(__file__).parent.parent


def test_readme_example_runs():
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert len(blocks) == 1
    names = {}
    exec(blocks[0], names)
    assert names["zs"].shape == (32, 8)


def test_every_public_name_has_its_place_in_the_reference():
    public = {
        name
        for name, value in vars(inn).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    pages = [path.read_text() for path in (ROOT / "docs" / "api").glob("*.md")]
    documented = re.findall(
        r"^::: implicitnets\.(\w+)$", "\n".join(pages), re.MULTILINE
    )
    assert sorted(documented) == sorted(public)
