"""A solve that rounding has stopped says so soon; one that is only slow goes on."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

import implicitnets as inn

from ..helpers import is_double, make_matrix, solve, tolerance


SIZE = 64
MAX_STEPS = 1000
SOLVERS = {
    "anderson": inn.AndersonAcceleration,
    "broyden": inn.Broyden,
    "newton-krylov": inn.NewtonKrylov,
    "reversible": inn.ReversibleFixedPoint,
    "runge-kutta": lambda rtol, atol: inn.SteadyState(dfx.Tsit5(), rtol, atol),
    "adams": lambda rtol, atol: inn.SteadyState(inn.VCABM3(), rtol, atol),
}
MONOTONE = {
    "forward-backward": inn.ForwardBackward,
    "peaceman-rachford": inn.PeacemanRachford,
}
# The mantissas of TensorFloat32 and of bfloat16.
BITS = 10, 7


def rounded_product(matrix, vector, coarse):
    """With operands of 10 or, if `coarse`, of 7 bits."""

    def product(bits):
        a, b = (
            lax.reduce_precision(x, 11 if is_double() else 8, bits)
            for x in (matrix, vector)
        )
        return a @ b

    return jnp.where(coarse, product(BITS[1]), product(BITS[0]))


def rounded_map(z, args):
    matrix, vector, coarse = args
    return rounded_product(matrix, z, coarse) + vector


def exact_map(z, args):
    matrix, vector, is_linear = args
    image = matrix @ z + vector
    return jnp.where(is_linear, image, jnp.tanh(image))


def relative_residuals(fn, zs, args):
    fs = jax.vmap(fn)(zs, args)
    norm = jax.vmap(jnp.linalg.norm)
    return norm(fs - zs) / norm(fs)


def batch_solver(fn, make, max_steps=MAX_STEPS):
    """Of a batch with a relative tolerance each: one program for all of them."""

    @eqx.filter_jit
    def run(args, rtol):
        def of_example(args, rtol):
            solver = make(rtol=rtol, atol=0.0)
            z0 = jnp.zeros(SIZE, rtol.dtype)
            return solve(fn, solver, z0, args, max_steps=max_steps)

        sol = jax.vmap(of_example)(args, rtol)
        residuals = relative_residuals(fn, sol.value, args)
        return sol.value, residuals, sol.stats["num_steps"], sol.result

    return run


def floor_args():
    """Radius and precision vary: what a solve can reach is between 1e-5 and 1e-2."""
    radii = (0.5, 0.9, 0.99)
    matrices = [make_matrix(SIZE, radius, seed) for radius in radii for seed in (0, 1)]
    vectors = np.random.default_rng(2).normal(size=(12, SIZE))
    coarse = jnp.arange(12) >= 6
    return jnp.stack(matrices * 2), jnp.asarray(vectors, matrices[0].dtype), coarse


def fill(args, value):
    return jnp.full(len(args[-1]), value, args[0].dtype)


@pytest.mark.parametrize("name", SOLVERS)
def test_ends_at_its_floor(name):
    args = floor_args()
    run = batch_solver(rounded_map, SOLVERS[name])
    _, residuals, num_steps, result = run(args, fill(args, 1e-7))
    ended = result == optx.RESULTS.stagnation
    # By luck a rounded map may be constant around its equilibrium, where the residual
    # is none, or has an iterate that is many times better than those after it.
    assert jnp.sum(ended) >= len(ended) - 1
    assert jnp.all(residuals < jnp.where(args[2], 1e-2, 2e-3))

    # It has been near for a few steps, or for a part of a long solve.
    _, _, num_until_near, _ = run(args, 1.5 * residuals)
    num_near = jnp.where(ended, num_steps - num_until_near, 0)
    assert np.median(num_near) <= 30
    assert jnp.all(num_near <= jnp.maximum(25, num_until_near)), num_near

    if name == "newton-krylov":
        # Its steps depend on the tolerance.
        return
    # The best iterate: a solve reaches its residual, and none reaches less.
    _, _, _, result = run(args, 1.001 * residuals)
    assert jnp.all((result == optx.RESULTS.successful) | ~ended)
    _, _, _, result = run(args, 0.999 * residuals)
    assert jnp.all((result == optx.RESULTS.stagnation) | ~ended)


def test_partners_change_nothing():
    matrices, vectors, coarse = floor_args()
    run = batch_solver(rounded_map, SOLVERS["anderson"])
    args = matrices, vectors, coarse
    together = run(args, fill(args, 1e-7))
    # Other partners in the same program; rounding is the same.
    others = matrices.at[1:].multiply(0.3), vectors.at[1:].multiply(2.0), coarse
    for one, other in zip(
        jtu.tree_leaves(together),
        jtu.tree_leaves(run(others, fill(args, 1e-7))),
        strict=True,
    ):
        assert jnp.all(one[0] == other[0])


def test_value_under_grad():
    args = tuple(x[0] for x in floor_args())
    deq = inn.DeepEquilibriumNetwork(
        lambda z, x: rounded_map(z, (*args[:1], x, False)),
        inn.AndersonAcceleration(1e-7, 0.0),
    )

    @eqx.filter_jit
    def loss(x):
        sol = deq.solve(x)
        return jnp.sum(sol.z_star**2), (sol.z_star, sol.result, sol.stats["nfe"])

    _, alone = loss(args[1])
    (_, under_grad), grad = eqx.filter_value_and_grad(loss, has_aux=True)(args[1])
    assert jnp.all(alone[0] == under_grad[0])
    assert alone[1] == under_grad[1] == optx.RESULTS.stagnation
    assert alone[2] == under_grad[2] < 100
    assert jnp.all(jnp.isfinite(grad))


@pytest.mark.parametrize("name", ("anderson", "broyden", "reversible", "adams"))
def test_a_solve_without_tolerance_takes_all_steps(name):
    args = floor_args()
    run = batch_solver(rounded_map, SOLVERS[name], max_steps=100)
    _, _, num_steps, result = run(args, fill(args, 0.0))
    assert jnp.all(num_steps == 100)
    assert jnp.all(result == optx.RESULTS.nonlinear_max_steps_reached)


def hard_args():
    """Slow, far from normal, turning, or expansive; and whether the map is linear."""
    generator = np.random.default_rng(3)
    dtype = jnp.result_type(float)
    orthogonal, _ = np.linalg.qr(generator.normal(size=(SIZE, SIZE)))
    slow = [1 - np.geomspace(1 - radius, 1, SIZE) for radius in (0.99, 0.999)]
    triangle = np.triu(generator.normal(size=(SIZE, SIZE)), 1) / np.sqrt(SIZE)
    cosine, sine = 0.98 * np.cos(0.1), 0.98 * np.sin(0.1)
    turn = np.kron(np.eye(SIZE // 2), [[cosine, -2 * sine], [sine / 2, cosine]])
    linear = [
        *(orthogonal @ np.diag(values) @ orthogonal.T for values in slow),
        triangle + 0.9 * np.diag(generator.uniform(-1, 1, SIZE)),
        turn,
        make_matrix(SIZE, 0.99),
        make_matrix(SIZE, 0.99, symmetric=True),
    ]
    others = [make_matrix(SIZE, 1.2, seed) for seed in (0, 1)]
    matrices = jnp.asarray(np.stack([*linear, *others]), dtype)
    vectors = jnp.asarray(generator.normal(size=(8, SIZE)), dtype)
    return matrices, vectors, jnp.arange(8) < 6


@pytest.mark.parametrize("name", SOLVERS)
def test_does_not_end_what_converges(name):
    args = hard_args()
    run = batch_solver(exact_map, SOLVERS[name], max_steps=5000)
    _, residuals, _, result = run(args, fill(args, tolerance(1e-5, 1e-10)))
    assert jnp.all(result != optx.RESULTS.stagnation), (result, residuals)


class RoundedCell(inn.nn.AbstractMonotoneCell):
    """A monotone cell with a rounded product."""

    cell: inn.nn.MonotoneCell
    margin: float

    def linear(self, z):
        image = rounded_product(self.cell.weight, z, coarse=False)
        return (1 - self.margin) * z - image

    def inject(self, x):
        return self.cell.inject(x)

    def proximal(self, z, step_size):
        return self.cell.proximal(z, step_size)

    def resolvent(self, z, step_size):
        return self.cell.resolvent(z, step_size)


@pytest.mark.parametrize("name", MONOTONE)
def test_monotone_solvers(name):
    key = jr.key(0)
    cell = inn.nn.resolve(inn.nn.MonotoneCell(2, SIZE, margin=0.5, key=key))

    @eqx.filter_jit
    def run(x, rtol):
        deq = inn.DeepEquilibriumNetwork(
            RoundedCell(cell=cell, margin=0.5),
            MONOTONE[name](rtol=rtol, atol=0.0),
            zero_state=lambda x: jnp.zeros(SIZE, x.dtype),
            max_steps=MAX_STEPS,
        )
        sol = deq.solve(x)
        relative = optx.two_norm(sol.residual) / optx.two_norm(sol.z_star)
        return relative, sol.stats["num_steps"], sol.result

    x = jnp.array([1.0, -2.0])
    relative, num_steps, result = run(x, jnp.array(1e-7))
    assert result == optx.RESULTS.stagnation
    assert 0 < relative < 2e-3
    _, num_until_near, result = run(x, 1.5 * relative)
    assert result == optx.RESULTS.successful
    assert num_steps - num_until_near <= jnp.maximum(25, num_until_near)


@pytest.mark.parametrize("name", ("anderson", "broyden"))
def test_adjoint_systems(name):
    matrices, vectors, coarse = floor_args()

    @jax.jit
    @jax.vmap
    def run(matrix, vector, coarse):
        def product(u):
            return rounded_product(matrix, u, coarse) - u

        operator = lx.FunctionLinearOperator(product, jax.eval_shape(lambda: vector))
        linear_solver = inn.FixedPointLinearSolver(SOLVERS[name](1e-7, 0.0), MAX_STEPS)
        solution = lx.linear_solve(operator, vector, linear_solver, throw=False)
        residual = product(solution.value) - vector
        relative = jnp.linalg.norm(residual) / jnp.linalg.norm(solution.value)
        return relative, solution.stats["nfe"], solution.result._value

    relative, num_products, result = run(matrices, vectors, coarse)
    assert jnp.all(result == lx.RESULTS.stagnation._value)
    assert jnp.all(relative < jnp.where(coarse, 1e-2, 2e-3))
    assert np.median(num_products) < 100
