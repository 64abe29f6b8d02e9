"""What a backward pass reports, and what happens where it fails."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

import implicitnets as inn

from ..helpers import dense_cell, make_matrix, make_vector, relative_error, tolerance


SIZE = 6
WEIGHT = make_matrix(SIZE, 1.0)
LOSS_WEIGHTS = make_vector(SIZE, seed=3)
# One example for which two products suffice, and two for which they do not.
SCALES = jnp.array([0.0, 0.5, 0.9])
SHORT = inn.GivensGMRES(rtol=1e-3, atol=0.0, max_steps=2)
SERIES = inn.NeumannSeries(3, 0.2)


def loss(x, scale, adjoint):
    """Of the root of a linear map, known beforehand."""
    matrix = scale * WEIGHT

    def primal_fn(inputs):
        x, *_ = inputs
        return jnp.linalg.solve(jnp.eye(SIZE) - matrix, x), None

    def rewrite_fn(z, aux, inputs):
        del aux
        x, *_ = inputs
        return matrix @ z + x - z

    root, _ = adjoint.apply(primal_fn, rewrite_fn, (x,), frozenset())
    return jnp.sum(LOSS_WEIGHTS * root)


def linear_solution(scale, linear_solver):
    """The gradient by `linear_solver`, and its relative residual, by the textbook."""
    operator = lx.MatrixLinearOperator((scale * WEIGHT - jnp.eye(SIZE)).T)
    u = -lx.linear_solve(operator, LOSS_WEIGHTS, linear_solver, throw=False).value
    residual = jnp.linalg.norm(LOSS_WEIGHTS + operator.mv(u))
    return u, residual / jnp.linalg.norm(LOSS_WEIGHTS)


def report_on(linear_solver, fallback=None):
    """Gradient and report for each scale: `vmap` of `grad`, and `grad` of `vmap`."""

    def probed(x, scale, probe):
        adjoint = inn.ImplicitAdjoint(linear_solver, fallback, probe=probe)
        return loss(x, scale, adjoint)

    @jax.jit
    def both(xs, probes):
        apart = jax.vmap(jax.grad(probed, argnums=(0, 2)))(xs, SCALES, probes)

        def total(xs, probes):
            return jnp.sum(jax.vmap(probed)(xs, SCALES, probes))

        return apart, jax.grad(total, argnums=(0, 1))(xs, probes)

    xs = jnp.ones((len(SCALES), SIZE))
    apart, together = both(xs, inn.AdjointReport.probe((len(SCALES),)))
    assert eqx.tree_equal(apart, together, rtol=1e-5, atol=1e-5)
    return apart


def test_report_of_each_example():
    grads, report = report_on(SHORT)
    for i, scale in enumerate(SCALES):
        expected, residual = linear_solution(scale, SHORT)
        assert relative_error(grads[i], expected) < tolerance(1e-4, 1e-10)
        assert np.allclose(report.residual[i], residual, rtol=1e-3, atol=1e-6)
    assert report.num_steps.tolist() == [1, 2, 2]
    assert report.successful.tolist() == [True, False, False]
    assert repr(report.status).count("maximum number of solver steps") == 2


def test_fallback_exactly_where_it_failed():
    grads, report = report_on(SHORT, SERIES)
    for i, scale in enumerate(SCALES):
        used = SERIES if i > 0 else SHORT
        expected, residual = linear_solution(scale, used)
        assert relative_error(grads[i], expected) < tolerance(1e-4, 1e-10)
        # The residual is that of what was used, the result that of what was tried.
        assert np.allclose(report.residual[i], residual, rtol=1e-3, atol=1e-6)
    assert report.successful.tolist() == [True, False, False]


def test_fallback_where_the_solution_is_not_finite():
    """An operator with a zero column, of which LU makes infinities."""

    def probed(x, scale, probe):
        adjoint = inn.ImplicitAdjoint(lx.LU(), SERIES, probe=probe)
        root, _ = adjoint.apply(
            lambda inputs: (inputs[0], None),
            lambda z, aux, inputs: scale * z + inputs[0] - z,
            (x,),
            frozenset(),
        )
        return jnp.sum(root)

    gradient = jax.jit(jax.vmap(jax.grad(probed, argnums=(0, 2))))
    grads, report = gradient(
        jnp.ones((2, 2)), jnp.array([0.5, 1.0]), inn.AdjointReport.probe((2,))
    )
    assert np.allclose(grads, [[2, 2], [2.4, 2.4]], rtol=1e-5)
    assert report.successful.tolist() == [True, False]
    assert "well-posed" in repr(report.status)


@pytest.mark.parametrize(
    "linear_solver, num_steps",
    (
        (lx.LU(), 0),
        (lx.Normal(lx.CG(1e-5, 1e-5)), None),
        (inn.FixedPointLinearSolver(inn.AndersonAcceleration(1e-3, 0.0)), None),
        (inn.NeumannSeries(4), 3),
    ),
    ids=lambda value: type(value).__name__,
)
def test_any_linear_solver_and_a_shared_probe(linear_solver, num_steps):
    """A probe that all examples share gets the sum of their reports."""

    def total(probe):
        adjoint = inn.ImplicitAdjoint(linear_solver, probe=probe)
        losses = jax.vmap(lambda scale: loss(jnp.ones(SIZE), scale, adjoint))
        return jnp.sum(losses(SCALES[1:]))

    # With respect to nothing but the probe.
    report = jax.jit(jax.grad(total))(inn.AdjointReport.probe())
    residuals = [linear_solution(scale, linear_solver)[1] for scale in SCALES[1:]]
    assert np.allclose(report.residual, sum(residuals), rtol=1e-2, atol=2e-6)
    assert report.successful
    if num_steps is None:
        assert report.num_steps > 0
    else:
        assert report.num_steps == 2 * num_steps


def test_report_in_higher_derivatives():
    """Of the linear solve for the gradient, and of the one for its derivative."""

    def probed(x, probe):
        adjoint = inn.ImplicitAdjoint(SHORT, probe=probe)
        deq = inn.DeepEquilibriumNetwork(
            dense_cell(), optx.Newton(1e-5, 1e-5), adjoint=adjoint
        )
        return jnp.sum(jnp.sin(deq(x)))

    x, probe = make_vector(4), inn.AdjointReport.probe()
    gradient = jax.grad(probed, argnums=(0, 1))

    @jax.jit
    def forward_over_reverse(x):
        return jax.jvp(lambda x: gradient(x, probe), (x,), (jnp.ones(4),))

    (grads, report), (_, t_report) = forward_over_reverse(x)
    assert report.num_steps == 2 and t_report.num_steps == 2
    assert 1e-3 < report.residual < 1 and 1e-3 < t_report.residual < 1
    assert np.allclose(grads, jax.jit(gradient)(x, probe)[0], rtol=1e-5)


def test_probe_of_a_layer():
    deq = inn.DeepEquilibriumNetwork(dense_cell())

    @eqx.filter_jit
    def report_of(deq, x):
        @jax.grad
        def report(probe):
            sol = deq.solve(x, probe=probe)
            return jnp.sum(sol.z_star) + jnp.sum(deq(x, probe=probe))

        return report(inn.AdjointReport.probe())

    report = report_of(deq, make_vector(4))
    assert report.successful and report.num_steps > 1
    assert report.residual < 2e-4  # zero where rounding happens to be kind
    stopped = inn.DeepEquilibriumNetwork(deq.cell, adjoint=inn.ImplicitAdjoint(SHORT))
    report = report_of(stopped, make_vector(4))
    assert not report.successful and report.num_steps == 4  # two of each solve
    assert 1e-3 < report.residual < 2
    unrolled = report_of(inn.set_fixed_depth(deq, 2), make_vector(4))
    assert all(leaf == 0 for leaf in jtu.tree_leaves(unrolled))


@pytest.mark.parametrize(
    "adjoint",
    (
        inn.JacobianFreeAdjoint(),
        inn.PhantomAdjoint(),
        optx.ImplicitAdjoint(),
        optx.RecursiveCheckpointAdjoint(),
    ),
    ids=lambda adjoint: type(adjoint).__name__,
)
def test_adjoints_without_a_report(adjoint):
    deq = inn.DeepEquilibriumNetwork(dense_cell(), adjoint=adjoint)
    with pytest.raises(TypeError, match=f"probe.*`{type(adjoint).__name__}`"):
        deq(make_vector(4), probe=inn.AdjointReport.probe())


def test_neumann_series():
    """By itself, forwards and transposed, against the sum of the terms."""
    matrix = np.asarray(0.7 * WEIGHT, float)
    factor = 0.8 * matrix + 0.2 * np.eye(SIZE)
    total = sum(np.linalg.matrix_power(factor, i) for i in range(3))
    operator = lx.MatrixLinearOperator(0.7 * WEIGHT - jnp.eye(SIZE))
    b = make_vector(SIZE)
    solve = jax.jit(lambda op: lx.linear_solve(op, b, SERIES))
    for op, expected in ((operator, total), (operator.T, total.T)):
        solution = solve(op)
        assert np.allclose(solution.value, -0.8 * expected @ b, rtol=1e-4, atol=1e-5)
        assert solution.stats["num_steps"] == 2
    with pytest.raises(ValueError, match="square"):
        lx.linear_solve(
            lx.MatrixLinearOperator(jnp.ones((2, SIZE))), jnp.ones(2), SERIES
        )
