import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
import pytest

from implicitnets._internal.optimistix import (
    replace_inputs,
    run_solve,
    solve_inputs,
    SolveOutputs,
)


# The kind of solve that Optimistix makes of a fixed-point problem for each.
SOLVERS = {
    "fixed_point": optx.FixedPointIteration(1e-3, 1e-3),
    "root_find": optx.Newton(1e-3, 1e-3),
    "least_squares": optx.LevenbergMarquardt(1e-3, 1e-3),
    "minimise": optx.BFGS(1e-3, 1e-3, norm=optx.max_norm),
}


class _Recorder(optx.AbstractAdjoint):
    """Keeps what it was given, and what the solve returned."""

    record: list = eqx.field(static=True)

    def apply(self, primal_fn, rewrite_fn, inputs, tags):
        del rewrite_fn, tags
        root, outputs = run_solve(primal_fn, inputs)
        self.record.append((solve_inputs(inputs), inputs, SolveOutputs(*outputs)))
        return root, outputs


@pytest.mark.parametrize("kind", SOLVERS)
def test_names_of_what_optimistix_passes(kind):
    """Optimistix 0.1.0: another version may fail here, and then nowhere but here."""
    solver, record = SOLVERS[kind], []
    y0, args, options = jnp.zeros(2), (jnp.array(0.5), "args"), {"option": None}

    def fn(z, args):
        scale, _ = args
        return jnp.cos(scale * z), 3 * z

    with jax.disable_jit():
        sol = optx.fixed_point(
            *(fn, solver, y0, args, options),
            has_aux=True,
            max_steps=2,
            adjoint=_Recorder(record),
            throw=False,
        )
    ((inputs, all_inputs, outputs),) = record
    assert jnp.all(inputs.y0 == y0) and inputs.args == args
    assert inputs.options == options and inputs.max_steps == 2
    assert inputs.tags == frozenset()
    # Minimisers and least-squares solvers come in a wrapper, and with them the aux.
    assert solver in (inputs.solver, getattr(inputs.solver, "solver", None))
    z = sol.value
    f, aux = inputs.fn(z, args)
    residual = fn(z, args)[0] - z
    expected, expected_aux = {
        "fixed_point": (z + residual, 3 * z),
        "root_find": (residual, 3 * z),
        "least_squares": (residual, (residual, 3 * z)),
        "minimise": (optx.max_norm(residual), (residual, 3 * z)),
    }[kind]
    assert eqx.tree_equal((f, aux), (expected, expected_aux), rtol=1e-5, atol=1e-5)
    structs = jtu.tree_map(
        lambda x: x.value,
        (inputs.f_struct, inputs.aux_struct),
        is_leaf=lambda x: isinstance(x, eqxi.Static),
    )
    assert structs == jax.eval_shape(lambda: (f, aux))
    assert outputs.num_steps == sol.stats["num_steps"]
    assert outputs.result == sol.result
    assert sol.result == optx.RESULTS.nonlinear_max_steps_reached
    assert outputs.stats.items() <= sol.stats.items()
    assert eqx.tree_equal(outputs.state, eqx.filter(sol.state, eqx.is_array))
    if kind in ("least_squares", "minimise"):
        _, own_aux = outputs.aux
    else:
        own_aux = outputs.aux
    assert eqx.tree_equal(own_aux, sol.aux)
    longer = all_inputs + ("appended",)
    assert solve_inputs(longer) == inputs
    assert replace_inputs(longer, max_steps=3)[5:] == (3, *all_inputs[6:], "appended")
