import difflib

import pytest

from .public_api import describe, PATH


pytestmark = pytest.mark.one_precision


def test_public_api_is_as_reviewed():
    # After a change that is meant, `python -m tests.library.public_api` writes it.
    reviewed, found = PATH.read_text().splitlines(), describe().splitlines()
    difference = "\n".join(difflib.unified_diff(reviewed, found, lineterm="", n=0))
    assert not difference, f"\n{difference}"
