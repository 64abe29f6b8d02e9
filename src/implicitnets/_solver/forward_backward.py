import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Scalar, ScalarLike

from .._internal.checks import check_number, check_stopping_rule, POSITIVE
from .._internal.convolution import fast_convolutions
from .._internal.loop import materialise, SolverState
from .._internal.pytree import working_dtype
from .._internal.types import Answer, Aux, Norm, Verdict, Y
from .abstract import AbstractSolver, Problem
from .monotone import cell_and_input, combine, part_norms
from .progress import Progress, start_progress


class _Prepared(eqx.Module):
    step_size: Scalar
    injected: Y


class ForwardBackward(
    AbstractSolver[Progress, _Prepared], optx.AbstractFixedPointSolver
):
    r"""Forward-backward splitting, for monotone cells: damping that always converges.

    $$z_{k+1} = \operatorname{prox}_{\alpha\varphi}
    (z_k + \alpha (W z_k + u(x) - z_k)).$$

    One evaluation a step. Converges for every input if the step size is below twice
    $\beta$, the cocoercivity of $I - W$. The more anisotropic $I - W$ is, the slower.
    [`implicitnets.PeacemanRachford`][] then takes fewer steps.

    Stops when `norm(f(z) - z) <= atol + rtol * norm(f(z))`, and returns the iterate
    with the least residual of all that were evaluated. Ends as `stagnation` where
    rounding has stopped it, as [`implicitnets.AndersonAcceleration`][] does. The
    statistics have `nfe`, the number of evaluations.

    For [`implicitnets.nn.AbstractMonotoneCell`][]s only. An equilibrium layer tells it
    the cell. In a solve without a layer, `args` must be `(cell, x)`:

    ```python
    optx.fixed_point(lambda z, args: args[0](z, args[1]), solver, z0, (cell, x))
    ```

    Winston and Kolter, *Monotone Operator Equilibrium Networks*, 2020, algorithm 1.

    **Arguments:**

    - `rtol`: relative tolerance.
    - `atol`: absolute tolerance.
    - `norm`: the norm of the stopping rule.
    - `step_size`: $\alpha$; `None` for a lower bound of $\beta$, estimated once a
        solve: $1 / (\lVert S \rVert + \lVert K \rVert^2 / m)$ with the symmetric part
        $S$ and the skew part $K$ of $I - W$. It costs 64 products with $W$ or its
        transpose, once for a whole batch.
    """

    rtol: ScalarLike
    atol: ScalarLike
    norm: Norm = optx.two_norm
    step_size: ScalarLike | None = None

    def __check_init__(self):
        check_stopping_rule(self)
        check_number(self, "step_size", self.step_size, POSITIVE, optional=True)

    def _start(self, problem: Problem, y: Y) -> tuple[Progress, _Prepared]:
        cell, x = cell_and_input(self, problem.args)
        if self.step_size is None:
            symmetric, skew = part_norms(cell, y)
            step_size = 1 / (symmetric + skew**2 / cell.margin)
        else:
            step_size = self.step_size
        prepared = _Prepared(
            step_size=jnp.asarray(step_size, working_dtype(y)),
            injected=fast_convolutions(cell.inject)(x),
        )
        return start_progress(y), prepared

    def _advance(
        self, problem: Problem, y: Y, state: SolverState[Progress, _Prepared]
    ) -> tuple[Y, Progress, _Prepared, Aux]:
        kept, free = state.kept, state.free.value
        num_steps = state.num_steps.value
        cell, _ = cell_and_input(self, problem.args)
        # Both the evaluation and the step are proximal operators of what comes from
        # `W z + u(x)`, which is computed once. The function itself is called for its
        # auxiliary output only; XLA removes the computation of its value.
        linear = fast_convolutions(cell.linear)(y)
        inner = materialise(jtu.tree_map(jnp.add, linear, free.injected), num_steps)
        f, (_, aux) = cell.proximal(inner, 1), problem(y)
        residual = jtu.tree_map(jnp.subtract, f, y)
        progress = self._judge(kept, y, f, residual)
        step_size = free.step_size
        new_y = cell.proximal(
            combine(lambda z, v: z + step_size * (v - z), y, inner), step_size
        )
        return new_y, progress, free, aux

    def _verdict(self, kept: Progress) -> Verdict:
        return kept.verdict()

    def _answer(self, problem: Problem, y: Y, aux: Aux, kept: Progress) -> Answer:
        del problem
        return kept.answer(y), aux, {"nfe": kept.num_evaluations}
