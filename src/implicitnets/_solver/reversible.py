from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Int, PyTree, Scalar, ScalarLike

from .._internal.checks import check_number, check_options, check_tolerances
from .._internal.pytree import tree_astype, tree_cast_like, working_dtype
from .progress import Progress, start_progress


class Pair(eqx.Module):
    """The two states that a reversible step takes to two new ones."""

    y: PyTree[Array]
    z: PyTree[Array]


class ReversibleState(eqx.Module):
    """The state of a [`ReversibleFixedPoint`][] solve.

    **Attributes:**

    - `pair`: where the solve is.
    - `progress`: its best iterate is the pair whose `y` has the least residual.
    - `num_best_steps`: after how many steps that was.
    """

    pair: Pair
    progress: Progress
    num_best_steps: Int[Array, ""]


class ReversibleFixedPoint(optx.AbstractFixedPointSolver):
    r"""A damped fixed-point iteration that can be run backwards.

    Two sequences that take turns, with $d$ the damping:

    $$y_{n+1} = d \, y_n + (1 - d) \, f(z_n), \qquad
    z_{n+1} = d \, z_n + (1 - d) \, f(y_{n+1}).$$

    Each line can be solved for its old state, so that
    [`implicitnets.ReversibleAdjoint`][] differentiates the iteration without having
    stored any of it (*Reversible Deep Equilibrium Models*, arXiv:2509.12917, section 3,
    where $\beta = 1 - d$). Two evaluations a step. Works with the other adjoints, too.

    Stops when `norm(f(y) - y) <= atol + rtol * norm(f(y))`, and returns the iterate
    with the least residual of all the `y` that were evaluated. The statistics have
    `nfe`, the number of evaluations. Half-precision states are iterated in float32.

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
    norm: Callable[[PyTree[Array]], Scalar] = optx.two_norm
    damping: ScalarLike = 0.5

    def __check_init__(self):
        check_tolerances(self)
        check_number(self, "damping", lambda x: 0 < x < 1, "in the interval (0, 1)")

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        del fn, args, f_struct, aux_struct, tags
        check_options(self, options)
        pair = start_pair(y)
        return ReversibleState(
            pair=pair, progress=start_progress(pair), num_best_steps=jnp.array(0)
        )

    def step(self, fn, y, args, options, state, tags):
        del options, tags
        old = state.pair

        def evaluate(x):
            # Rounded to the dtypes of the state where that is a narrower one.
            f, aux = fn(tree_cast_like(x, y), args)
            return tree_cast_like(f, x), aux

        new_y = self.mix(old.y, evaluate(old.z)[0])
        f, aux = evaluate(new_y)
        pair = Pair(y=new_y, z=self.mix(old.z, f))
        progress = state.progress.update(
            pair,
            f,
            jtu.tree_map(jnp.subtract, f, new_y),
            rtol=self.rtol,
            atol=self.atol,
            norm=self.norm,
        )
        improved = progress.best_error < state.progress.best_error
        new_state = ReversibleState(
            pair=pair,
            progress=progress,
            num_best_steps=jnp.where(
                improved, progress.num_evaluations, state.num_best_steps
            ),
        )
        return tree_cast_like(new_y, y), new_state, aux

    def mix(self, old: PyTree[Array], f: PyTree[Array]) -> PyTree[Array]:
        """Half a step: the new state from an old one and the value at the other.

        **Arguments:**

        - `old`: the old state.
        - `f`: the value.

        **Returns:**

        The new state.
        """

        def leaf(x, f):
            damping = jnp.asarray(self.damping, x.dtype)
            return damping * x + (1 - damping) * f

        return jtu.tree_map(leaf, old, f)

    def unmix(self, new: PyTree[Array], f: PyTree[Array]) -> PyTree[Array]:
        """Half a step backwards.

        **Arguments:**

        - `new`: the new state.
        - `f`: the value that was mixed into it.

        **Returns:**

        The old state, but for rounding.
        """

        def leaf(x, f):
            damping = jnp.asarray(self.damping, x.dtype)
            return (x - (1 - damping) * f) / damping

        return jtu.tree_map(leaf, new, f)

    def terminate(self, fn, y, args, options, state, tags):
        del fn, y, args, options, tags
        return state.progress.verdict()

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        del fn, args, options, tags, result
        best_y = tree_cast_like(state.progress.best_y.y, y)
        return best_y, aux, {"nfe": 2 * state.progress.num_evaluations}


def start_pair(y: PyTree[Array]) -> Pair:
    """Both sequences start at the initial guess.

    **Arguments:**

    - `y`: the initial guess.

    **Returns:**

    The pair.
    """
    y = tree_astype(y, working_dtype(y))
    return Pair(y=y, z=y)
