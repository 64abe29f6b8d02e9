from typing import Any, Generic, TypeVar

import equinox as eqx
import optimistix as optx
from jaxtyping import Array, PyTree


_State = TypeVar("_State", bound=PyTree[Array])


class EquilibriumSolution(eqx.Module, Generic[_State]):
    """An equilibrium, and how it was found.

    A pytree, so that `jax.vmap` and `equinox.filter_jit` can return it.

    **Attributes:**

    - `z_star`: the equilibrium. The layer's adjoint differentiates it.
    - `z0`: where the solve started. It is differentiable, though the equilibrium has no
        gradient with respect to it: [`implicitnets.skip_penalty`][] trains what
        computed it.
    - `residual`: `cell(z_star, x) - z_star`, of the structure of the state. It has no
        gradient: at an equilibrium it is zero by the implicit function theorem.
    - `result`: an `optimistix.RESULTS`: `successful`, `nonlinear_max_steps_reached`,
        `nonlinear_divergence`, `nonfinite`, `stagnation` (the steps make no progress
        any more, most often because what is left of the residual is rounding) or
        `breakdown` (the linear solve within a Newton method failed).
        `optimistix.RESULTS[sol.result]` is a sentence. The sentences of `stagnation`
        and `breakdown` speak of linear solves, because Lineax defines these two.
    - `stats`: a dictionary of arrays: `num_steps` of the solver, `nfe` (the cell
        evaluations that it made) if the solver counts them, and whatever else the
        solver reports.
    """

    z_star: _State
    z0: _State
    residual: _State
    result: optx.RESULTS
    stats: dict[str, Any]
