"""Solvers and adjoints by name, for command lines."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import diffrax as dfx
import lineax as lx
import optimistix as optx
from jaxtyping import PyTree

import implicitnets as inn

from .errors import OptionError


SolverName = Literal[
    "anderson", "broyden", "newton-krylov", "fixed-point", "tsit5", "adams"
]
StartName = Literal["model", "injection", "cell"]
AdjointName = Literal[
    "implicit", "neumann", "phantom", "jacobian-free", "shine", "unrolled"
]


@dataclasses.dataclass(frozen=True)
class EquilibriumOptions:
    """How an equilibrium is found and differentiated."""

    solver: SolverName = "anderson"
    """What finds it."""
    rtol: float = 1e-3
    """Relative tolerance of the solver."""
    atol: float = 1e-6
    """Absolute tolerance of the solver."""
    max_steps: int = 30
    """Solver steps in training ..."""
    max_steps_delta: int = 0
    """... or up to so many fewer, at random in every training step."""
    test_max_steps: int | None = None
    """Solver steps in evaluations; as many as in training by default."""
    start: StartName = "model"
    """Where a solve starts: as the model has it, at the cell's input, or at the cell's
    own answer to zeros (Skip Reg. DEQ)."""
    adjoint: AdjointName = "implicit"
    """What differentiates it; `shine` goes with `broyden`."""
    adjoint_rtol: float = 1e-3
    """Relative tolerance of the implicit adjoint's GMRES."""
    adjoint_max_steps: int = 30
    """Jacobian products of the adjoint; of `shine`, its refinements."""
    damping: float = 0.0
    """Of the Neumann and phantom adjoints: 0 is none."""

    def __post_init__(self):
        for name, least in (
            ("max_steps", 1),
            ("test_max_steps", 1),
            ("adjoint_max_steps", 0 if self.adjoint == "shine" else 1),
        ):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"`{name}` must be at least {least}; got {value}.")
        for name in ("rtol", "atol", "adjoint_rtol"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"`{name}` must be non-negative; got {value}.")
        if not 0 <= self.max_steps_delta < self.max_steps:
            raise ValueError(
                f"`max_steps_delta` must be at least 0 and less than `max_steps`, "
                f"{self.max_steps}; got {self.max_steps_delta}."
            )
        if not 0 <= self.damping < 1:
            raise ValueError(
                f"`damping` must be in the interval [0, 1); got {self.damping}."
            )


SOLVERS: dict[SolverName, Callable[[float, float], Any]] = {
    "anderson": inn.AndersonAcceleration,
    "broyden": inn.Broyden,
    "newton-krylov": inn.NewtonKrylov,
    "fixed-point": optx.FixedPointIteration,
    "tsit5": lambda rtol, atol: inn.SteadyState(dfx.Tsit5(), rtol, atol),
    "adams": lambda rtol, atol: inn.SteadyState(inn.VCABM3(), rtol, atol),
}

ADJOINTS: dict[AdjointName, Callable[[EquilibriumOptions], optx.AbstractAdjoint]] = {
    "implicit": lambda options: inn.ImplicitAdjoint(_gmres(options)),
    "neumann": lambda options: inn.NeumannAdjoint(
        options.adjoint_max_steps, options.damping
    ),
    "phantom": lambda options: inn.PhantomAdjoint(
        options.adjoint_max_steps, options.damping
    ),
    "jacobian-free": lambda options: inn.JacobianFreeAdjoint(),
    "shine": lambda options: inn.ShineAdjoint(options.adjoint_max_steps),
    "unrolled": lambda options: optx.RecursiveCheckpointAdjoint(),
}


def make_layer(
    layer: inn.AbstractDeepEquilibriumNetwork, options: EquilibriumOptions
) -> inn.AbstractDeepEquilibriumNetwork:
    """A model's layer, with the start, the solver and the adjoint of the options.

    **Arguments:**

    - `layer`: the model's.
    - `options`: how to solve instead.

    **Returns:**

    A layer with the same cell.

    **Raises:**

    `OptionError` if the model knows no other start, or if the adjoint does not go with
    the solver.
    """
    if options.adjoint == "shine" and options.solver != "broyden":
        raise OptionError("--adjoint shine goes with --solver broyden.")
    if options.adjoint == "unrolled" and options.max_steps_delta > 0:
        raise OptionError("--adjoint unrolled needs one number of steps.")
    starts = (getattr(layer, name, None) for name in ("init", "zero_state"))
    if options.start != "model" and any(start is not None for start in starts):
        raise OptionError("The model has a start of its own: take --start model.")
    if options.start == "injection":
        layer = inn.DeepEquilibriumNetwork(layer.cell, init=_identity)
    elif options.start == "cell":
        layer = inn.SkipDeepEquilibriumNetwork(layer.cell)
    return dataclasses.replace(
        layer,
        solver=SOLVERS[options.solver](options.rtol, options.atol),
        adjoint=ADJOINTS[options.adjoint](options),
        max_steps=options.max_steps,
    )


def _identity(x: PyTree) -> PyTree:
    return x


def _gmres(options: EquilibriumOptions) -> lx.AbstractLinearSolver:
    return inn.GivensGMRES(
        options.adjoint_rtol, atol=0.0, max_steps=options.adjoint_max_steps
    )
