"""The tutorial's code, which is a script and in no package."""

import pathlib
import sys


sys.path.append(str(pathlib.Path(__file__).parent.parent / "docs" / "tutorials"))

import mnist as mnist  # noqa: E402
