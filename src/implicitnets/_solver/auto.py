from typing import Any

import equinox as eqx
import optimistix as optx
from jaxtyping import ScalarLike

from .._internal.checks import check_stopping_rule
from .._internal.types import Norm, Solver
from .._linear_solver.gmres import GivensGMRES
from .anderson import AndersonAcceleration
from .broyden import Broyden
from .chain import AbstractChain
from .newton_krylov import NewtonKrylov


# By then Anderson acceleration has solved what it solves fast. On maps that expand a
# Krylov space of the default dimension is too small, and Newton's method seldom solves
# later what it has not solved soon. Broyden's method wanders on.
_ANDERSON_STEPS = 128
_NEWTON_STEPS = 100
_KRYLOV_DIMENSION = 60
_BROYDEN_HISTORY = 30


class AutoSolver(AbstractChain):
    """Begins with what is fast on easy problems, and goes on with what is more robust.

    A [`implicitnets.SolverChain`][] of [`implicitnets.AndersonAcceleration`][] (128
    steps), [`implicitnets.NewtonKrylov`][] with a memory of 10 and a Krylov space of
    dimension 60 (100 steps), and [`implicitnets.Broyden`][] with a history of 30 (the
    rest). Where the first is successful, a solve is the first one's, in little more
    time. The statistics are those of the chain: `stage` is 0, 1 or 2.

    What it costs is compiling all three, and the memory of the largest: 61 states for
    the Krylov space, or 60 for Broyden's history, where the default keeps 10. The
    [report](../report.md#maps-that-expand) says how much of what the others leave
    it solves.

    Stops when `norm(f(z) - z) <= atol + rtol * norm(f(z))`.

    **Arguments:**

    - `rtol`: relative tolerance.
    - `atol`: absolute tolerance.
    - `norm`: the norm of the stopping rule.
    - `max_steps`: as in [`implicitnets.SolverChain`][].
    """

    rtol: ScalarLike
    atol: ScalarLike
    norm: Norm = optx.two_norm
    max_steps: int = eqx.field(default=256, kw_only=True)

    def __check_init__(self):
        check_stopping_rule(self)

    @property
    def stages(self) -> tuple[tuple[Solver, int | None], ...]:
        rule: Any = {"rtol": self.rtol, "atol": self.atol, "norm": self.norm}
        gmres = GivensGMRES(rtol=0.5, atol=0.0, restart=_KRYLOV_DIMENSION)
        return (
            (AndersonAcceleration(**rule), _ANDERSON_STEPS),
            (NewtonKrylov(**rule, linear_solver=gmres, memory=10), _NEWTON_STEPS),
            (Broyden(**rule, history_size=_BROYDEN_HISTORY), None),
        )
