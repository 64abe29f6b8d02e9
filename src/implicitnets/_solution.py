from typing import Any, Generic, TypeVar

import equinox as eqx
import optimistix as optx
from jaxtyping import Array, PyTree


_State = TypeVar("_State", bound=PyTree[Array])


class EquilibriumSolution(eqx.Module, Generic[_State]):
    """The whole story of one equilibrium solve.

    A pytree, so that it may be returned from `jax.vmap` and `equinox.filter_jit`.

    **Attributes:**

    - `z_star`: the equilibrium; differentiable through the layer's adjoint.
    - `z0`: where the solve started. Differentiable, though the equilibrium has no
        gradient with respect to it, so that [`implicitnets.skip_penalty`][] trains what
        it came from.
    - `residual`: `cell(z_star, x) - z_star`, of the structure of the state. Has no
        gradient: at an equilibrium it is zero by the implicit function theorem.
    - `result`: an `optimistix.RESULTS`: `successful`, `nonlinear_max_steps_reached`,
        `nonlinear_divergence`, `nonfinite`, `stagnation` (no progress any more) or
        `breakdown` (of the linear solve within a Newton method).
        `optimistix.RESULTS[sol.result]` is a sentence; that of the last two is Lineax',
        whence they come, and speaks of linear solves.
    - `stats`: a dictionary of arrays: `num_steps` of the solver, `nfe` (the cell
        evaluations that it made) where the solver tells, and what else it tells.
    """

    z_star: _State
    z0: _State
    residual: _State
    result: optx.RESULTS
    stats: dict[str, Any]
