"""What of a solver's state is kept after the end, and what is free: every solver."""

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
import pytest

import implicitnets as inn
from implicitnets._internal.loop import SolverState, while_loop
from implicitnets._solver.abstract import AbstractSolver
from implicitnets._solver.chain import AbstractChain

from ..helpers import make_matrix, tolerance


SOLVERS = {
    "anderson": inn.AndersonAcceleration(1e-4, 1e-4),
    "broyden": inn.Broyden(1e-4, 1e-4, history_size=3),
    "newton_krylov": inn.NewtonKrylov(1e-4, 1e-4),
    "reversible": inn.ReversibleFixedPoint(1e-4, 1e-4),
    "explicit": inn.SteadyState(inn.VCABM3(), 1e-4, 1e-4),
    "implicit": inn.SteadyState(dfx.Kvaerno3(), 1e-4, 1e-4),
    "forward_backward": inn.ForwardBackward(1e-4, 1e-4, step_size=0.2),
    "peaceman_rachford": inn.PeacemanRachford(1e-4, 1e-4, step_size=0.5),
}
SIZE = 6


def map_states(fn, tree):
    def is_state(node):
        return isinstance(node, SolverState)

    return jtu.tree_map(
        lambda node: fn(node) if is_state(node) else node, tree, is_leaf=is_state
    )


class PoisoningAdjoint(optx.AbstractAdjoint):
    """Solves, and gives an example that has finished NaN for all that is free."""

    def apply(self, primal_fn, rewrite_fn, inputs, tags):
        del rewrite_fn, tags

        def poisoning_loop(cond_fun, body_fun, init_val, *, max_steps):
            def body(carry):
                new = body_fun(carry)
                finished = ~cond_fun(new)

                def poison(x):
                    return jnp.where(finished, jnp.full_like(x, jnp.nan), x)

                def poison_free(state):
                    inexact, others = eqx.partition(state.free, eqx.is_inexact_array)
                    free = eqx.combine(jtu.tree_map(poison, inexact), others)
                    return SolverState(state.kept, free, state.num_steps)

                return map_states(poison_free, new)

            end = while_loop(cond_fun, body, init_val, max_steps=max_steps)
            # The steps of the batch are not those of an example.
            lost = jnp.array(-(10**6))
            return map_states(
                lambda state: eqx.tree_at(lambda s: s.num_steps.value, state, lost), end
            )

        return primal_fn(inputs + (poisoning_loop,))


def make_problem(name):
    """A function, its parameters, and an easy and a hard input."""
    if name in ("forward_backward", "peaceman_rachford"):
        cell = inn.nn.MonotoneCell(2, SIZE, margin=0.5, key=jr.key(0))
        # Without a bias a small input has a small equilibrium.
        cell = eqx.tree_at(lambda c: c.injection.bias, cell, replace_fn=jnp.zeros_like)
        return (
            lambda z, args: args[0](z, args[1]),
            inn.nn.resolve(cell),
            jnp.array([[1e-4], [10.0]]) * jnp.ones((1, 2)),
        )
    # Almost constant, and almost expansive.
    return (
        lambda z, args: jnp.tanh(args[1][0] * args[0] @ z + args[1]),
        make_matrix(SIZE, 0.95),
        jnp.array([[1e-3], [1.0]]) * jnp.ones((1, SIZE)),
    )


@pytest.mark.parametrize("name", SOLVERS)
def test_nothing_free_is_read_after_the_end(name):
    fn, params, xs = make_problem(name)

    @eqx.filter_jit
    @eqx.filter_vmap(in_axes=(0, None))
    def run(x, adjoint):
        sol = optx.fixed_point(
            fn,
            SOLVERS[name],
            jnp.zeros(SIZE),
            (params, x),
            adjoint=adjoint,
            max_steps=1000,
            throw=False,
        )
        stats = {k: v for k, v in sol.stats.items() if k != "max_steps"}
        return sol.value, sol.result, stats, sol.state.kept

    together = run(xs, PoisoningAdjoint())
    _, result, stats, _ = together
    assert np.all(result == optx.RESULTS.successful)
    # Time enough for a history of three to be overwritten.
    assert stats["num_steps"][0] + 3 <= stats["num_steps"][1]
    for i in range(2):
        alone = run(xs[i : i + 1], inn.ImplicitAdjoint())
        of_batch = jtu.tree_map(lambda leaf: leaf[i : i + 1], together)
        for got, expected in zip(
            jtu.tree_leaves(of_batch), jtu.tree_leaves(alone), strict=True
        ):
            if jnp.issubdtype(expected.dtype, jnp.inexact):
                rtol, atol = tolerance(1e-3, 1e-9), tolerance(1e-6, 1e-12)
                assert np.allclose(got, expected, rtol=rtol, atol=atol)
            else:
                assert np.array_equal(got, expected)


def test_every_solver_is_tested():
    tested = {type(s) for s in SOLVERS.values()}
    # A chain has no step of its own, and nothing that is free.
    assert tested | {AbstractChain} == set(AbstractSolver.__subclasses__())
