"""`python -m tests [pytest arguments]`: the suite in float32, then in float64."""

import os
import subprocess
import sys


def main() -> int:
    for x64, name in (("0", "float32"), ("1", "float64")):
        print(f"Tests in {name}:", flush=True)
        # A process each, since the precision of a JAX process is fixed at its start.
        outcome = subprocess.run(
            [sys.executable, "-m", "pytest", "-n", "2", "--dist", "worksteal"]
            + sys.argv[1:],
            env={**os.environ, "JAX_ENABLE_X64": x64, "JAX_PLATFORMS": "cpu"},
        )
        if outcome.returncode != 0:
            return outcome.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
