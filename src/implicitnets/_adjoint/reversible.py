from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Int, PyTree, Scalar, ScalarLike

from .._internal.checks import ADJOINT, check_number, check_part, LIMIT
from .._internal.loop import while_loop
from .._internal.observe import observed
from .._internal.optimistix import (
    replace_inputs,
    run_solve,
    solve_inputs,
    SolveOutputs,
)
from .._internal.pytree import tree_cast_like, working_dtype
from .._internal.types import Tags
from .._internal.unvmap import unvmap_any
from .._solver.reversible import ReversibleFixedPoint, ReversibleState, start_pair
from .detach import close_aux, detach, substitute
from .implicit import ImplicitAdjoint
from .report import (
    AbstractReportingAdjoint,
    ADJOINT_RESULTS,
    AdjointReport,
    result_number,
)


class ReversibleAdjoint(AbstractReportingAdjoint):
    """Differentiate a reversible iteration by running it backwards.

    For the solver [`implicitnets.ReversibleFixedPoint`][]. Gives the exact gradient of
    the iteration up to the returned iterate, converged or not, as unrolling does. The
    states on the way are not stored but reconstructed from the final ones (*Reversible
    Deep Equilibrium Models*, arXiv:2509.12917, section 3.2). The gradient with respect
    to the initial guess is exact, too, and so not zero.

    Reconstruction multiplies rounding errors by up to `1 / damping**2` in every step.
    Its end is compared with the initial guess, which is known. If they are further
    apart than `bound`, relative to the larger of the initial guess and the solution,
    the `fallback` makes the gradient of that example. The states that matter most are
    reconstructed first, so the gradient is far more accurate than the reconstructed
    initial guess where the map contracts.

    Reverse mode only, and only once: to differentiate again, or forwards, use
    [`implicitnets.ImplicitAdjoint`][].

    The auxiliary output of the function, `sol.aux`, has no gradient: differentiating it
    in reverse mode is an error.

    **Bias:** with respect to the iteration none but rounding; with respect to the
    equilibrium that of an iteration that has not converged.

    **Memory:** one evaluation and a few states, whatever the number of steps. Under
    `vmap` every example accumulates a gradient of every parameter, as in any custom
    rule for reverse mode; a batch solved as one state has one such gradient.

    **Cost:** two evaluations and two products a step, with the Jacobians of both the
    state and the parameters.

    **Arguments:**

    - `fallback`: any Optimistix adjoint, for what could not be reconstructed. It runs
        only if some example of a batch needs it;
        `optimistix.RecursiveCheckpointAdjoint()` gives the gradient of the iteration
        there, too.
    - `bound`: the largest relative error of the reconstructed initial guess; infinity
        for none.
    - `probe`: keyword only; see [`implicitnets.AdjointReport`][]. The `residual` is the
        relative error of the reconstructed initial guess, `num_steps` the number of
        evaluations that were undone, and the result is successful or `not_reversible`.

    **Raises:**

    `TypeError` when solving, for any solver but
    [`implicitnets.ReversibleFixedPoint`][].
    """

    fallback: optx.AbstractAdjoint = ImplicitAdjoint()
    bound: ScalarLike = 0.1
    probe: AdjointReport | None = eqx.field(default=None, kw_only=True)

    def __check_init__(self):
        check_part(self, "fallback", self.fallback, ADJOINT)
        check_number(self, "bound", self.bound, LIMIT)

    def apply(
        self,
        primal_fn: Callable,
        rewrite_fn: Callable,
        inputs: PyTree,
        tags: Tags,
    ) -> tuple[PyTree[Array], Any]:
        solve = solve_inputs(inputs)
        if not isinstance(observed(solve.solver), ReversibleFixedPoint):
            raise TypeError(
                "`ReversibleAdjoint` is for the solver "
                "`implicitnets.ReversibleFixedPoint`; got "
                f"`{type(solve.solver).__name__}`."
            )
        inputs = replace_inputs(
            detach(inputs), fn=solve.fn, y0=solve.y0, args=solve.args
        )
        root, aux = _iterate(
            (inputs, self.probe),
            primal_fn,
            rewrite_fn,
            tags,
            detach(self.fallback),
            detach(self.bound),
        )
        return root, close_aux(detach(aux), inputs)


@eqx.filter_custom_vjp
def _iterate(vjp_arg, primal_fn, rewrite_fn, tags, fallback, bound):
    del rewrite_fn, tags, fallback, bound
    inputs, _ = vjp_arg
    return run_solve(primal_fn, inputs)


@_iterate.def_fwd
def _iterate_fwd(perturbed, vjp_arg, *args):
    del perturbed
    out = _iterate(vjp_arg, *args)
    return out, out


@_iterate.def_bwd
def _iterate_bwd(
    out, ct_out, perturbed, vjp_arg, primal_fn, rewrite_fn, tags, fallback, bound
):
    root, aux = out
    ct_root, _ = ct_out
    ct_root = jtu.tree_map(
        lambda x, ct: jnp.zeros_like(x) if ct is None else ct, root, ct_root
    )
    inputs, probe = vjp_arg
    differentiated, fixed = eqx.partition(inputs, perturbed[0])
    state = observed(SolveOutputs(*aux).state).kept
    grads, error = _run_backwards(state, ct_root, differentiated, fixed)
    failed = ~(error <= bound)

    def fall_back():
        def solution(differentiated):
            inputs = eqx.combine(differentiated, fixed)
            found = primal_fn, root, aux
            return fallback.apply(_found, rewrite_fn, inputs + (found,), tags)[0]

        (others,) = jax.vjp(solution, differentiated)[1](ct_root)
        # Example by example, so that none depends on its neighbours.
        return jtu.tree_map(lambda x, y: jnp.where(failed, x, y), others, grads)

    grads = lax.cond(unvmap_any(failed), fall_back, lambda: grads)
    if probe is None:
        return grads, None
    result = ADJOINT_RESULTS.where(
        failed,
        ADJOINT_RESULTS.not_reversible,
        ADJOINT_RESULTS.successful,  # pyright: ignore[reportArgumentType]
    )
    num_steps = (2 * state.num_best_steps).astype(error.dtype)
    report = AdjointReport(num_steps, error, result_number(result))
    return grads, tree_cast_like(report, probe)


def _found(inputs):
    """A solve that was made before, for an adjoint that asks for one."""
    # An adjoint that differentiates through the solve gets the solve. For any other it
    # is dead code.
    *inputs, (primal_fn, root, aux), loop = inputs
    surrogate, _ = primal_fn((*inputs, loop))
    return substitute(surrogate, root), aux


class _Backwards(eqx.Module):
    """The carry of the loop over half steps, the newest first."""

    num_left: Int[Array, ""]
    older: PyTree[Array]
    newer: PyTree[Array]
    ct_older: PyTree[Array]
    ct_newer: PyTree[Array]
    grads: PyTree[Array]


def _run_backwards(
    state: ReversibleState, ct_root: PyTree[Array], differentiated: tuple, fixed: tuple
) -> tuple[tuple, Scalar]:
    """The gradient, and the error of the reconstructed initial guess."""
    solve = solve_inputs(eqx.combine(differentiated, fixed))
    solver, y0 = observed(solve.solver), solve.y0

    # Half-precision parameters have their gradients accumulated in float32.
    def widen(tree):
        return jtu.tree_map(lambda x: x.astype(working_dtype(x)), tree)

    def evaluate(z, differentiated_wide):
        differentiated_again = tree_cast_like(differentiated_wide, differentiated)
        solve = solve_inputs(eqx.combine(differentiated_again, fixed))
        f, _ = solve.fn(tree_cast_like(z, y0), solve.args)
        return widen(f)

    wide = widen(differentiated)
    best = state.progress.best_y
    ct_y = tree_cast_like(ct_root, best.y)

    # Half a step took the states `(oldest, older)` to `(older, newer)`, where
    #
    #     newer = mix(oldest, f(older)),
    #
    # whichever of the two sequences got the new state. Undone, the value `f(older)` is
    # needed twice: to solve this line for `oldest`, and to pull the cotangent of
    # `newer` back through it. What goes through `f` joins the cotangent that `older`
    # has from the half step after this one.
    def half_step(carry):
        f, pull_back = jax.vjp(evaluate, carry.older, wide)
        _, mix_transpose = jax.vjp(solver.mix, carry.newer, f)
        ct_oldest, ct_f = mix_transpose(carry.ct_newer)
        ct_z, grads = pull_back(ct_f)
        return _Backwards(
            num_left=carry.num_left - 1,
            older=solver.unmix(carry.newer, f),
            newer=carry.older,
            ct_older=ct_oldest,
            ct_newer=jtu.tree_map(jnp.add, carry.ct_older, ct_z),
            grads=jtu.tree_map(jnp.add, carry.grads, grads),
        )

    end = while_loop(
        lambda carry: carry.num_left > 0,
        half_step,
        _Backwards(
            num_left=2 * state.num_best_steps,
            older=best.y,
            newer=best.z,
            # The loss sees `y` alone.
            ct_older=ct_y,
            ct_newer=jtu.tree_map(jnp.zeros_like, ct_y),
            grads=jtu.tree_map(jnp.zeros_like, wide),
        ),
    )
    # Both sequences start at the initial guess, and so should both now be there.
    start = start_pair(y0)
    difference = jtu.tree_map(jnp.subtract, (end.older, end.newer), (start.y, start.z))
    size = jnp.maximum(optx.two_norm(start), optx.two_norm(best))
    error = optx.two_norm(difference) / jnp.where(size > 0, size, 1)
    ct_start = jtu.tree_map(jnp.add, end.ct_older, end.ct_newer)
    # `None` where nothing asks for the gradient.
    y0_grad = jtu.tree_map(
        lambda g, ct: None if g is None else g + ct,
        solve_inputs(end.grads).y0,
        ct_start,
        is_leaf=lambda x: x is None,
    )
    grads = replace_inputs(end.grads, y0=y0_grad)
    return tree_cast_like(grads, differentiated), error
