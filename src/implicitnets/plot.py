"""Pictures of solves: imported only when used, since they need Matplotlib.

```python
from implicitnets import plot
```
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optimistix as optx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from ._diagnose import ResidualTrace
from ._internal.parametrise import resolve as _resolve
from ._solution import EquilibriumSolution


try:
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes
except ImportError as error:
    raise ImportError(
        "`implicitnets.plot` needs Matplotlib: `pip install implicitnets[plot]`."
    ) from error


def convergence(
    traces: Mapping[str, ResidualTrace], *, axes: Axes | None = None
) -> Axes:
    """How the relative residual falls with the work, in one line for each solve.

    The work is the number of evaluations, plus that of Jacobian products, which cost
    about as much. A solver that does not count its evaluations is drawn against its
    steps. For a batch the line is the median, and the band has the middle half of the
    examples.

    **Arguments:**

    - `traces`: traces from [`implicitnets.residual_trace`][], by name.
    - `axes`: what to draw on; `None` for a new figure. Keyword only argument.

    **Returns:**

    The axes.
    """
    axes = _new_axes(axes)
    products = any(trace.num_matvecs is not None for trace in traces.values())
    for name, trace in traces.items():
        residual = np.atleast_2d(np.asarray(trace.relative, float))
        if trace.nfe is None:
            name = f"{name} (steps)"
            cost = np.arange(residual.shape[1])
        else:
            work = np.atleast_2d(np.asarray(trace.nfe))
            if trace.num_matvecs is not None:
                work = work + np.atleast_2d(np.asarray(trace.num_matvecs))
            cost = np.median(work, axis=0)
        end = int(np.max(np.asarray(trace.num_steps))) + 1
        low, middle, high = np.quantile(residual[:, :end], (0.25, 0.5, 0.75), axis=0)
        (line,) = axes.semilogy(cost[:end], middle, label=name)
        if len(residual) > 1:
            axes.fill_between(
                cost[:end], low, high, color=line.get_color(), alpha=0.2, linewidth=0
            )
    unit = "evaluations and Jacobian products" if products else "evaluations"
    axes.set(xlabel=f"{unit} of the cell", ylabel="relative residual")
    axes.legend()
    return axes


def spectrum(
    cell: Callable[[PyTree[Array], Any], PyTree[Array]],
    z: PyTree[Array],
    x: Any,
    *,
    axes: Axes | None = None,
) -> Axes:
    """The eigenvalues of a cell's Jacobian with respect to the state.

    Plain iteration converges near an equilibrium if they all lie inside the unit
    circle, and slowly if one is close to it. The gradient exists unless one is at 1.
    The function builds the full Jacobian, so a state may have some thousand elements.

    **Arguments:**

    - `cell`: `cell(z, x) -> z`.
    - `z`: one example's state.
    - `x`: the cell's second argument.
    - `axes`: what to draw on; `None` for a new figure. Keyword only argument.

    **Returns:**

    The axes.
    """
    cell = _resolve(cell)
    flat, unravel = ravel_pytree(z)
    jacobian = jax.jacobian(lambda v: ravel_pytree(cell(unravel(v), x))[0])(flat)
    eigenvalues = np.linalg.eigvals(np.asarray(jacobian, float))
    axes = _new_axes(axes)
    angle = np.linspace(0, 2 * np.pi, 200)
    axes.plot(np.cos(angle), np.sin(angle), color="grey", linewidth=1)
    axes.plot(eigenvalues.real, eigenvalues.imag, ".", markersize=4)
    axes.plot(1, 0, "x", color="C3")
    radius = np.max(np.abs(eigenvalues))
    axes.set(title=f"spectral radius {radius:.3f}", xlabel="real", ylabel="imaginary")
    axes.set_aspect("equal")
    return axes


def solves(solution: EquilibriumSolution, *, axes: Axes | None = None) -> Axes:
    """How many steps the solves of a batch took, and how they ended.

    **Arguments:**

    - `solution`: the solution of a batch, from `jax.vmap` of a layer's `solve`.
    - `axes`: what to draw on; `None` for a new figure. Keyword only argument.

    **Returns:**

    The axes.
    """
    axes = _new_axes(axes)
    steps = np.ravel(solution.stats["num_steps"])
    success = np.ravel(np.asarray(solution.result == optx.RESULTS.successful))
    edges = np.linspace(steps.min() - 0.5, steps.max() + 0.5, _num_bins(steps) + 1)
    axes.hist(
        [steps[success], steps[~success]],
        edges,
        stacked=True,
        color=["C0", "C3"],
        label=[f"successful ({success.sum()})", f"failed ({(~success).sum()})"],
    )
    axes.set(xlabel="solver steps", ylabel="examples")
    axes.legend()
    return axes


def training(
    records: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    *,
    against: str = "step",
    axes: Axes | None = None,
) -> Axes:
    """Training curves.

    **Arguments:**

    - `records`: mappings from names to numbers, such as the lines of a JSON Lines file.
        A curve leaves out the records without its name.
    - `names`: the entries to draw, each in its own line.
    - `against`: the entry on the horizontal axis. Keyword only argument.
    - `axes`: what to draw on; `None` for a new figure. Keyword only argument.

    **Returns:**

    The axes.

    **Raises:**

    `ValueError` for a name that no record has.
    """
    known = sorted({name for record in records for name in record})
    for name in (*names, against):
        if name not in known:
            raise ValueError(f"No record has {name!r}; they have {', '.join(known)}.")
    axes = _new_axes(axes)
    for name in names:
        points = [(r[against], r[name]) for r in records if name in r and against in r]
        axes.plot(*np.asarray(points, float).reshape(-1, 2).T, label=name)
    axes.set(xlabel=against)
    if names:
        axes.legend()
    return axes


def _num_bins(steps: np.ndarray) -> int:
    return int(min(steps.max() - steps.min() + 1, 40))


def _new_axes(axes: Axes | None) -> Axes:
    return plt.subplots(layout="constrained")[1] if axes is None else axes
