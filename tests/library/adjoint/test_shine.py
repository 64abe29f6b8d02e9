import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx

import implicitnets as inn
from implicitnets._adjoint.shine import _Inversion
from implicitnets._internal.optimistix import SolveOutputs

from ..helpers import linear_map, make_matrix, make_vector, relative_error, tolerance


SIZE = 20
WEIGHT = make_matrix(SIZE, 0.95, symmetric=True)
LOSS_WEIGHTS = make_vector(SIZE, seed=3)


def gradient(scale, x, adjoint, solver, weights=LOSS_WEIGHTS):
    """And how many steps the forward solve took."""

    def loss(x):
        args = scale * WEIGHT, x
        sol = optx.fixed_point(
            linear_map, solver, jnp.zeros(SIZE), args, adjoint=adjoint, throw=False
        )
        return jnp.sum(weights * sol.value), sol.stats["num_steps"]

    return jax.grad(loss, has_aux=True)(x)


def test_exact_in_one_dimension():
    def loss(slope, probe):
        solver = inn.Broyden(tolerance(1e-6, 1e-12), 0.0)
        adjoint = inn.ShineAdjoint(probe=probe)
        args = slope[None, None], jnp.ones(1)
        return optx.fixed_point(
            linear_map, solver, jnp.zeros(1), args, adjoint=adjoint
        ).value[0]

    derivative = jax.jit(jax.grad(loss, argnums=(0, 1)))
    grad, report = derivative(jnp.array(0.9), inn.AdjointReport.probe())
    assert np.allclose(grad, 100, rtol=tolerance(1e-3, 1e-9))
    assert report.residual < tolerance(1e-4, 1e-9)
    assert report.num_steps == 0 and report.successful


def test_refinement_improves_on_the_estimate():
    """Which itself beats the Jacobian-free gradient, at the same cost."""
    solver = inn.Broyden(1e-5, 0.0)
    x = make_vector(SIZE)

    @jax.jit
    def errors(x):
        exact = jnp.linalg.solve(jnp.eye(SIZE) - WEIGHT.T, LOSS_WEIGHTS)
        adjoints = [inn.JacobianFreeAdjoint(), *map(inn.ShineAdjoint, (0, 2, 6))]
        grads = [gradient(1.0, x, adjoint, solver)[0] for adjoint in adjoints]
        return [jnp.linalg.norm(g - exact) / jnp.linalg.norm(exact) for g in grads]

    jacobian_free, *shine = errors(x)
    assert shine[0] < 0.8 * jacobian_free
    assert shine[1] < 0.8 * shine[0] and shine[2] < 0.2 * shine[1]


def test_inverse_of_an_example_that_finished_early():
    """It waits for its batch, but keeps what it has learned: more than three steps."""
    solver = inn.Broyden(1e-4, 0.0, history_size=3)
    scales, x = jnp.array([0.3, 1.0, 0.6]), make_vector(SIZE)

    def of_scale(scale):
        return gradient(scale, x, inn.ShineAdjoint(), solver, weights=x)

    grads, num_steps = jax.jit(jax.vmap(of_scale))(scales)
    assert num_steps[0] + 3 <= num_steps[2] and num_steps[2] + 3 <= num_steps[1]
    alone = jax.jit(of_scale)
    for i, scale in enumerate(scales):
        expected, num_steps_alone = alone(scale)
        assert num_steps[i] == num_steps_alone
        # Rounding is not that of a batch, and grows in a quasi-Newton iteration.
        assert relative_error(grads[i], expected) < tolerance(1e-2, 1e-8)
        # What is left of an inverse that has been forgotten is the identity.
        assert relative_error(grads[i], x) > 0.05


def test_an_inverse_that_is_not_finite_is_no_success():
    solver, z = inn.Broyden(1e-4, 0.0, history_size=2), jnp.ones(3)
    struct = jax.eval_shape(lambda: z)
    state = solver.init(lambda z, _: z, z, None, {}, struct, None, frozenset())
    broken = eqx.tree_at(
        lambda s: s.kept.updates.value.matrix, state, jnp.full((2, 2), jnp.nan)
    )
    operator = lx.IdentityLinearOperator(struct)
    for final_state, successful in ((state, True), (broken, False)):
        outputs = SolveOutputs(None, None, final_state, None, None, {})
        value, result, _ = _Inversion(0).solve(operator, z, outputs, False)
        assert np.array_equal(value, -z)
        assert (result == lx.RESULTS.successful) == successful


def test_a_solver_around_broyden():
    solver = inn.Broyden(1e-4, 0.0)
    x = make_vector(SIZE)
    adjoint = inn.ShineAdjoint()

    @jax.jit
    def both(x):
        wrapped = optx.BestSoFarRootFinder(solver)
        return [gradient(1.0, x, adjoint, s)[0] for s in (solver, wrapped)]

    plain, around = both(x)
    assert relative_error(around, plain) < tolerance(1e-2, 1e-8)
