import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Int, ScalarLike

from .._internal.checks import check_number, check_stopping_rule, PROPER_FRACTION
from .._internal.loop import SolverState
from .._internal.pytree import tree_astype, tree_cast_like, working_dtype
from .._internal.types import Answer, Aux, Norm, Verdict, Y
from .abstract import AbstractSolver, Problem
from .progress import Progress, start_progress


class Pair(eqx.Module):
    """The two states that a reversible step takes to two new ones."""

    y: Y
    z: Y


class ReversibleState(eqx.Module):
    """What is kept of a [`ReversibleFixedPoint`][] solve.

    **Attributes:**

    - `progress`: its best iterate is the pair whose `y` has the least residual.
    - `num_best_steps`: after how many steps that was.
    """

    progress: Progress
    num_best_steps: Int[Array, ""]


class ReversibleFixedPoint(
    AbstractSolver[ReversibleState, Pair], optx.AbstractFixedPointSolver
):
    r"""A damped fixed-point iteration that can be run backwards.

    Two sequences, each of which evaluates at the other, with $d$ the damping:

    $$y_{n+1} = d \, y_n + (1 - d) \, f(z_n), \qquad
    z_{n+1} = d \, z_n + (1 - d) \, f(y_{n+1}).$$

    Each line can be solved for its old state, so that
    [`implicitnets.ReversibleAdjoint`][] differentiates the iteration without having
    stored any of it (*Reversible Deep Equilibrium Models*, arXiv:2509.12917, section 3,
    where $\beta = 1 - d$). Two evaluations a step. Works with every other adjoint too.

    Stops when `norm(f(y) - y) <= atol + rtol * norm(f(y))`, and returns the iterate
    with the least residual of all the `y` that were evaluated. Ends as `stagnation`
    where rounding has stopped it, as [`implicitnets.AndersonAcceleration`][] does. The
    statistics have `nfe`, the number of evaluations. Half-precision states are iterated
    in float32.

    **Arguments:**

    - `rtol`: relative tolerance. With it and `atol` zero every solve takes `max_steps`
        steps, as in the paper.
    - `atol`: absolute tolerance.
    - `norm`: the norm of the stopping rule.
    - `damping`: the weight of the old states, above 0 for the iteration to be
        reversible. Running it backwards multiplies rounding errors in every step, by
        `1 / damping` to `1 / damping**2` (for a map whose eigenvalues have modulus 0 to
        1): in float32 about 12 steps can be undone at 0.5, and 5 at 0.2.
    """

    rtol: ScalarLike
    atol: ScalarLike
    norm: Norm = optx.two_norm
    damping: ScalarLike = 0.5

    def __check_init__(self):
        check_stopping_rule(self)
        check_number(self, "damping", self.damping, PROPER_FRACTION)

    def _start(self, problem: Problem, y: Y) -> tuple[ReversibleState, Pair]:
        del problem
        pair = start_pair(y)
        return ReversibleState(start_progress(pair), jnp.array(0)), pair

    def _advance(
        self, problem: Problem, y: Y, state: SolverState[ReversibleState, Pair]
    ) -> tuple[Y, ReversibleState, Pair, Aux]:
        kept, free = state.kept, state.free.value

        def evaluate(x):
            # Rounded to the dtypes of the state where that is a narrower one.
            f, aux = problem(tree_cast_like(x, y))
            return tree_cast_like(f, x), aux

        new_y = self.mix(free.y, evaluate(free.z)[0])
        f, aux = evaluate(new_y)
        pair = Pair(y=new_y, z=self.mix(free.z, f))
        residual = jtu.tree_map(jnp.subtract, f, new_y)
        progress = kept.progress.update(
            pair,
            f,
            residual,
            rtol=self.rtol,
            atol=self.atol,
            norm=lambda x: self.norm(x.y if isinstance(x, Pair) else x),
        )
        improved = progress.best_error < kept.progress.best_error
        num_best_steps = jnp.where(
            improved, progress.num_evaluations, kept.num_best_steps
        )
        new_kept = ReversibleState(progress, num_best_steps)
        return tree_cast_like(new_y, y), new_kept, pair, aux

    def mix(self, old: Y, f: Y) -> Y:
        """Half a step: the new state from an old one and the value at the other."""

        def leaf(x, f):
            damping = jnp.asarray(self.damping, x.dtype)
            return damping * x + (1 - damping) * f

        return jtu.tree_map(leaf, old, f)

    def unmix(self, new: Y, f: Y) -> Y:
        """Half a step backwards: the old state, but for rounding."""

        def leaf(x, f):
            damping = jnp.asarray(self.damping, x.dtype)
            return (x - (1 - damping) * f) / damping

        return jtu.tree_map(leaf, new, f)

    def _verdict(self, kept: ReversibleState) -> Verdict:
        return kept.progress.verdict()

    def _answer(
        self, problem: Problem, y: Y, aux: Aux, kept: ReversibleState
    ) -> Answer:
        del problem
        best_y = tree_cast_like(kept.progress.best_y.y, y)
        return best_y, aux, {"nfe": 2 * kept.progress.num_evaluations}


def start_pair(y: Y) -> Pair:
    """Both sequences start at the initial guess."""
    y = tree_astype(y, working_dtype(y))
    return Pair(y=y, z=y)
