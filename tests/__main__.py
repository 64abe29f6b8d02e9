"""`python -m tests [pytest arguments]`: in float32, in float64, with XLA's defaults."""

import os
import subprocess
import sys

import pytest


# The precision and the flags of a JAX process are fixed at its start, so each has its
# own.
SESSIONS = {
    "float32": ("0", ()),
    "float64": ("1", ()),
    "float32, with XLA's defaults": ("0", ("-m", "xla_defaults")),
}
WORKERS = ("-n", "auto", "--maxprocesses", "4", "--dist", "worksteal")


def main() -> int:
    nothing_ran = True
    for name, (x64, arguments) in SESSIONS.items():
        print(f"Tests in {name}:", flush=True)
        outcome = subprocess.run(
            [sys.executable, "-m", "pytest", *WORKERS, *arguments, *sys.argv[1:]],
            env={**os.environ, "JAX_ENABLE_X64": x64, "JAX_PLATFORMS": "cpu"},
        ).returncode
        # What the arguments choose need not be in every session.
        if outcome == pytest.ExitCode.NO_TESTS_COLLECTED:
            continue
        if outcome != 0:
            return outcome
        nothing_ran = False
    return pytest.ExitCode.NO_TESTS_COLLECTED if nothing_ran else 0


if __name__ == "__main__":
    sys.exit(main())
