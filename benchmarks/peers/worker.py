"""One library on one problem, in an interpreter that has that library.

`client.py` starts one such process a library, sends it requests as lines of JSON, and
gets a line of JSON back for each.
"""

import importlib.metadata
import json
import os
import pathlib
import sys
import time
from typing import Any

import numpy as np

from ..kit.problems import load
from .libraries import LIBRARIES, Program


def main() -> None:
    """Serve requests until the input ends."""
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    library, problem = sys.argv[1], load(pathlib.Path(sys.argv[2]))
    make_methods, packages = LIBRARIES[library]
    norms = np.load(sys.argv[3]).astype(np.float32)
    try:
        methods = make_methods(problem, norms)
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), file=answers, flush=True)
        return
    versions = {name: importlib.metadata.version(name) for name in packages}
    hello = {"methods": list(methods), "versions": versions}
    print(json.dumps(hello), file=answers, flush=True)

    programs, warm = {}, set()
    for line in sys.stdin:
        request = json.loads(line)
        name = request["method"]
        # Also for a timed call: the process may be a new one since it was prepared.
        if name not in programs:
            programs[name] = methods[name]()
        if request["do"] == "prepare":
            answer = prepare(programs[name], pathlib.Path(request["folder"]))
            warm |= {(name, "solve"), (name, "gradient")}
        else:
            call = getattr(programs[name], request["do"])
            if (name, request["do"]) not in warm:
                call()
                warm.add((name, request["do"]))
            start = time.perf_counter()
            for _ in range(request["number"]):
                call()
            seconds = (time.perf_counter() - start) / request["number"]
            answer = {"seconds": seconds}
        print(json.dumps(answer), file=answers, flush=True)


def prepare(program: Program, folder: pathlib.Path) -> dict[str, Any]:
    """Run a method for the first time, and write its results for the other side."""
    try:
        start = time.perf_counter()
        z, counts = program.solve()
        solve_seconds = time.perf_counter() - start
        # The gradient is not to profit from what the solve has compiled.
        program.forget()
        start = time.perf_counter()
        z_trained, gradient = program.gradient()
        gradient_seconds = time.perf_counter() - start
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    arrays: dict[str, Any] = {
        f"gradient_{name}": np.asarray(g) for name, g in gradient.items()
    }
    np.savez(folder / "result.npz", z=z, z_trained=z_trained, **arrays)
    products = program.backward_products(z)
    if products is not None:
        products += int(np.max(counts["products"]))
    return {
        "evaluations": int(np.max(counts["evaluations"])),
        "products": products,
        "solve_seconds": solve_seconds,
        "gradient_seconds": gradient_seconds,
        "temp_bytes": program.temp_bytes(),
    }


if __name__ == "__main__":
    main()
