"""What was measured, kept in a file that is written again after every row."""

import datetime
import importlib.metadata
import json
import pathlib
import platform
import time
from collections.abc import Iterator
from typing import Any

import jax


Row = dict[str, Any]

LIBRARIES = (
    *("implicitnets", "jax", "jaxlib", "equinox", "optimistix", "lineax", "diffrax"),
    *("torch", "torchdeq", "banax", "jaxopt", "numpy"),
)


class OutOfTime(Exception):
    """A part has taken all of its time."""


class Record:
    """The tables of a run, in the form that the report's pages are made of.

    **Arguments:**

    - `path`: the file.
    - `command`: how the run was started, for the page.
    - `quick`: whether this is a rehearsal, of which no number counts.
    - `kept`: the tables of an earlier run that are to stay.
    """

    def __init__(
        self, path: pathlib.Path, command: str, quick: bool, kept: dict[str, list[Row]]
    ):
        self.path = path
        self._start = time.perf_counter()
        self._tables = dict(kept)
        self._deadline = float("inf")
        self._content: dict[str, Any] = {
            "status": "ok",
            "seconds": 0.0,
            "date": datetime.date.today().isoformat(),
            "command": command,
            "quick": quick,
            "machine": machine(),
            "versions": versions(),
            "tables": self._tables,
        }

    @property
    def about(self) -> str:
        """The device and the versions, in a line."""
        return json.dumps(self._content["machine"] | self._content["versions"])

    @property
    def seconds(self) -> float:
        """How long the run has taken so far."""
        return time.perf_counter() - self._start

    def begin(self, table: str, budget: float) -> None:
        """Start a table, which may take so many seconds."""
        self._deadline = time.perf_counter() + budget
        self._tables[table] = []

    def check_time(self) -> None:
        """Stop the part if its time is over."""
        if time.perf_counter() > self._deadline:
            raise OutOfTime

    def add(self, table: str, row: Row) -> None:
        """Keep a row, and write the file."""
        self._tables[table].append(row)
        print(table, json.dumps(row, default=float), flush=True)
        self.write()

    def write(self) -> None:
        """Write the file as it stands."""
        self._content["seconds"] = self.seconds
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self._content, indent=1, default=float))


def machine() -> dict[str, Any]:
    """The device, and what it is in."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "backend": jax.default_backend(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """The versions of the libraries that are there."""
    return dict(_installed())


def _installed() -> Iterator[tuple[str, str]]:
    for name in LIBRARIES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue


def earlier_tables(path: pathlib.Path, quick: bool) -> dict[str, list[Row]]:
    """The tables of a file, if they are of the same device and versions."""
    if not path.exists():
        return {}
    content = json.loads(path.read_text())
    same = (machine(), versions(), quick) == (
        content["machine"],
        content["versions"],
        content["quick"],
    )
    return content["tables"] if same else {}
