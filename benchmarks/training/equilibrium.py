"""Solvers and adjoints by name, for command lines."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import diffrax as dfx
import lineax as lx
import optimistix as optx
from jaxtyping import PyTree

import implicitnets as inn

from .errors import check_fields, check_non_negative, check_positive, OptionError


SolverName = Literal[
    "anderson", "broyden", "newton", "newton-krylov", "fixed-point", "tsit5", "adams"
]
StartName = Literal["model", "injection", "cell"]
AdjointName = Literal[
    "implicit", "neumann", "phantom", "jacobian-free", "shine", "unrolled"
]
LinearSolverName = Literal["gmres", "normal-cg", "anderson", "broyden", "lu"]

# Fields of the library's solvers. It knows their defaults and what is allowed.
_OF_SOLVER = ("history_size", "ridge", "damping")


@dataclasses.dataclass(frozen=True)
class EquilibriumOptions:
    """How an equilibrium is found and differentiated."""

    solver: SolverName = "anderson"
    """Find the equilibrium by this solver; `newton` solves with the dense Jacobian."""
    history_size: int | None = None
    """`anderson` and `broyden`: keep so many differences or updates; by default as many
    as the solver does."""
    ridge: float | None = None
    """`anderson`: regularise the small least-squares problems by this, by default as
    the solver does."""
    damping: float | None = None
    """`anderson`: weigh the old state in a step by this, by default 0."""
    rtol: float = 1e-3
    """Solve to this relative tolerance."""
    atol: float = 1e-6
    """Solve to this absolute tolerance."""
    max_steps: int = 30
    """Stop a solve after so many steps in training."""
    max_steps_delta: int = 0
    """Stop up to so many steps earlier, at random in every training step."""
    test_max_steps: int | None = None
    """Stop a solve after so many steps in evaluations, by default as in training."""
    test_rtol: float | None = None
    """Solve to this relative tolerance in evaluations, by default as in training. A
    position of a text sees a little of the later ones, about as much as this."""
    start: StartName = "model"
    """Start a solve where the model says, at the cell's input, or at the cell's value
    for zeros (Skip Reg. DEQ)."""
    adjoint: AdjointName = "implicit"
    """Differentiate the equilibrium by this adjoint; `shine` needs `broyden`."""
    adjoint_solver: LinearSolverName = "gmres"
    """Solve the implicit adjoint's linear system by this; `lu` makes it dense."""
    adjoint_rtol: float = 1e-3
    """Solve the implicit adjoint's system to this relative tolerance."""
    adjoint_max_steps: int = 30
    """Stop the adjoint after so many Jacobian products, or refinements of `shine`."""
    adjoint_damping: float = 0.0
    """Damp the Neumann and phantom adjoints by this; 0 is undamped."""

    def __post_init__(self):
        check_positive(self, "max_steps", "test_max_steps")
        check_non_negative(self, "rtol", "atol", "adjoint_rtol", "test_rtol")
        least = 0 if self.adjoint == "shine" else 1
        for allowed, is_valid, name in (
            (f"at least {least}", lambda n: n >= least, "adjoint_max_steps"),
            (
                f"at least 0 and less than `max_steps`, {self.max_steps}",
                lambda n: 0 <= n < self.max_steps,
                "max_steps_delta",
            ),
            ("in the interval [0, 1)", lambda value: 0 <= value < 1, "adjoint_damping"),
        ):
            check_fields(self, allowed, is_valid, name)
        if self.adjoint_solver != "gmres" and self.adjoint != "implicit":
            raise ValueError(
                f"`adjoint_solver` goes with the implicit adjoint, and not with "
                f"`adjoint` {self.adjoint}."
            )
        make_solver(self)


SOLVERS: dict[SolverName, Callable[[float, float], Any]] = {
    "anderson": inn.AndersonAcceleration,
    "broyden": inn.Broyden,
    "newton": lambda rtol, atol: optx.Newton(rtol, atol, linear_solver=lx.LU()),
    "newton-krylov": inn.NewtonKrylov,
    "fixed-point": optx.FixedPointIteration,
    "tsit5": lambda rtol, atol: inn.SteadyState(dfx.Tsit5(), rtol, atol),
    "adams": lambda rtol, atol: inn.SteadyState(inn.VCABM3(), rtol, atol),
}

LINEAR_SOLVERS: dict[
    LinearSolverName, Callable[[float, int], lx.AbstractLinearSolver]
] = {
    "gmres": lambda rtol, steps: inn.GivensGMRES(rtol, 0.0, max_steps=steps),
    "normal-cg": lambda rtol, steps: lx.Normal(lx.CG(rtol, 0.0, max_steps=steps)),
    "anderson": lambda rtol, steps: inn.FixedPointLinearSolver(
        inn.AndersonAcceleration(rtol, 0.0), steps
    ),
    "broyden": lambda rtol, steps: inn.FixedPointLinearSolver(
        inn.Broyden(rtol, 0.0), steps
    ),
    "lu": lambda rtol, steps: lx.LU(),
}

ADJOINTS: dict[AdjointName, Callable[[EquilibriumOptions], optx.AbstractAdjoint]] = {
    "implicit": lambda options: inn.ImplicitAdjoint(
        LINEAR_SOLVERS[options.adjoint_solver](
            options.adjoint_rtol, options.adjoint_max_steps
        )
    ),
    "neumann": lambda options: inn.NeumannAdjoint(
        options.adjoint_max_steps, options.adjoint_damping
    ),
    "phantom": lambda options: inn.PhantomAdjoint(
        options.adjoint_max_steps, options.adjoint_damping
    ),
    "jacobian-free": lambda options: inn.JacobianFreeAdjoint(),
    "shine": lambda options: inn.ShineAdjoint(options.adjoint_max_steps),
    "unrolled": lambda options: optx.RecursiveCheckpointAdjoint(),
}


def make_solver(options: EquilibriumOptions) -> Any:
    """The library's solver, with what the options say of it."""
    solver = SOLVERS[options.solver](options.rtol, options.atol)
    given = {name: getattr(options, name) for name in _OF_SOLVER}
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if not hasattr(solver, name):
            raise ValueError(f"`{name}` does not go with `solver` {options.solver}.")
    return dataclasses.replace(solver, **given) if given else solver


def make_layer(
    layer: inn.AbstractDeepEquilibriumNetwork, options: EquilibriumOptions
) -> inn.AbstractDeepEquilibriumNetwork:
    """A model's layer, with the start, the solver and the adjoint of the options."""
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
        solver=make_solver(options),
        adjoint=ADJOINTS[options.adjoint](options),
        max_steps=options.max_steps,
    )


def _identity(x: PyTree) -> PyTree:
    return x
