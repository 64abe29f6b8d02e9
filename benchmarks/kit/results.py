"""Result files: tables with the machine and the versions that they were measured on."""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
from typing import Any

import jax

from .tables import Tables


LIBRARIES = (
    "implicitnets",
    "jax",
    "equinox",
    "optimistix",
    "lineax",
    "diffrax",
    "numpy",
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options that every script has."""

    output_dir: pathlib.Path = pathlib.Path(__file__).parents[1] / "results"
    """The folder that the JSON file is written to."""


@dataclasses.dataclass(frozen=True)
class TimingSettings(Settings):
    """The options of the scripts that time calls."""

    repeats: int = 9
    """How often every row is timed. The table has the median."""


def save(settings: Settings, name: str, tables: Tables) -> None:
    """Write tables with the machine and the versions as JSON."""
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine(), "versions": versions(), "tables": tables}
    path = settings.output_dir / f"{name}.json"
    path.write_text(json.dumps(content, indent=1, default=float))
    print(f"Written: {path}")


def machine() -> dict[str, Any]:
    """What the benchmarks ran on."""
    cpu = platform.processor()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        lines = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        cpu = lines[0].split(":")[1].strip() if lines else cpu
    return {
        "cpu": cpu,
        "cores": num_cores(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "backend": jax.default_backend(),
        "date": datetime.date.today().isoformat(),
    }


def num_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def versions() -> dict[str, str]:
    """The versions of the libraries that are measured here."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}
