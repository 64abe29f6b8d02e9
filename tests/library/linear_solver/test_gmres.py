import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest

import implicitnets as inn


def _random(key, n, scale=0.5):
    """A well-conditioned nonsymmetric matrix, with its spectrum in a disk around -1."""
    noise = jr.normal(key, (n, n)) * (scale / n**0.5)
    return noise - jnp.eye(n)


def _operator(matrix):
    # Not a `MatrixLinearOperator`, to have nothing but its products.
    structure = jax.eval_shape(lambda: jnp.zeros(matrix.shape[1], matrix.dtype))
    return lx.FunctionLinearOperator(lambda x: matrix @ x, structure)


@eqx.filter_jit
def _compiled_solve(matrix, b, solver, options):
    return lx.linear_solve(_operator(matrix), b, solver, options=options, throw=False)


def _solve(matrix, b, solver, options=None):
    # Arrays, so that the tests share their compilations.
    tolerances = jnp.asarray(solver.rtol), jnp.asarray(solver.atol)
    solver = eqx.tree_at(lambda s: (s.rtol, s.atol), solver, tolerances)
    return _compiled_solve(matrix, b, solver, options)


def _relative_residual(matrix, x, b):
    matrix, x, b = (np.asarray(a, np.float64) for a in (matrix, x, b))
    return np.linalg.norm(b - matrix @ x) / np.linalg.norm(b)


def _reference_history(matrix, b, num_products):
    """Least relative residuals over the Krylov spaces, by dense least squares."""
    matrix, b = np.asarray(matrix, np.float64), np.asarray(b, np.float64)
    basis = [b / np.linalg.norm(b)]
    history = []
    for _ in range(num_products):
        span = np.stack(basis, axis=1)
        y, *_ = np.linalg.lstsq(matrix @ span, b, rcond=None)
        history.append(np.linalg.norm(b - matrix @ span @ y) / np.linalg.norm(b))
        new = matrix @ basis[-1]
        for _ in range(2):
            new = new - span @ (span.T @ new)
        basis.append(new / np.linalg.norm(new))
    return history


@pytest.mark.parametrize("n", (1, 2, 30))
def test_solution(getkey, n):
    matrix, b = _random(getkey(), n), jr.normal(getkey(), (n,))
    tol = 30 * jnp.finfo(b.dtype).eps
    solution = _solve(matrix, b, inn.GivensGMRES(rtol=float(tol), atol=0.0))
    assert solution.result == lx.RESULTS.successful
    truth = jnp.linalg.solve(matrix, b)
    assert jnp.linalg.norm(solution.value - truth) < 10 * tol * jnp.linalg.norm(truth)


@pytest.mark.parametrize("rtol", (0.5, 1e-1, 1e-2, 1e-4))
def test_stops_within_cycle(getkey, rtol):
    matrix, b = _random(getkey(), 30, scale=0.8), jr.normal(getkey(), (30,))
    history = _reference_history(matrix, b, 30)
    fewest = 1 + next(i for i, residual in enumerate(history) if residual <= rtol)
    solution = _solve(matrix, b, inn.GivensGMRES(rtol, 0.0, restart=30))
    assert solution.result == lx.RESULTS.successful
    assert solution.stats["num_steps"] == fewest
    residual = _relative_residual(matrix, solution.value, b)
    assert residual <= rtol
    assert residual == pytest.approx(history[fewest - 1], rel=1e-2)
    told = solution.stats["residual_norm"] / jnp.linalg.norm(b)
    assert told == pytest.approx(residual, rel=1e-2)


@pytest.mark.parametrize("restart", (1, 5))
def test_restart(getkey, restart):
    matrix, b = _random(getkey(), 30), jr.normal(getkey(), (30,))
    solution = _solve(matrix, b, inn.GivensGMRES(1e-4, 0.0, restart=restart))
    assert solution.result == lx.RESULTS.successful
    assert _relative_residual(matrix, solution.value, b) <= 1.01e-4
    # One cycle alone is that of the reference.
    solver = inn.GivensGMRES(0.0, 0.0, max_steps=restart, restart=restart)
    solution = _solve(matrix, b, solver)
    best = _reference_history(matrix, b, restart)[-1]
    residual = _relative_residual(matrix, solution.value, b)
    assert residual == pytest.approx(best, rel=1e-3)


def test_absolute_tolerance(getkey):
    matrix, b = _random(getkey(), 30), 1e-3 * jr.normal(getkey(), (30,))
    solution = _solve(matrix, b, inn.GivensGMRES(0.0, 1e-5))
    assert solution.result == lx.RESULTS.successful
    assert 0 < jnp.linalg.norm(matrix @ solution.value - b) <= 1e-5
    # Within the tolerance from the start.
    solution = _solve(matrix, b, inn.GivensGMRES(0.0, 1.0))
    assert solution.result == lx.RESULTS.successful
    assert solution.stats["num_steps"] == 0
    assert jnp.all(solution.value == 0)


@pytest.mark.parametrize("max_steps", (1, 4, 5, 6, 11))
def test_max_steps_counts_products(getkey, max_steps):
    matrix, b = _random(getkey(), 30, scale=0.9), jr.normal(getkey(), (30,))
    count = []
    structure = jax.eval_shape(lambda: b)

    def product(x):
        jax.debug.callback(lambda: count.append(None))
        return matrix @ x

    operator = lx.FunctionLinearOperator(product, structure)
    solver = inn.GivensGMRES(1e-5, 0.0, max_steps=max_steps, restart=5)
    solution = lx.linear_solve(operator, b, solver, throw=False)
    jax.block_until_ready(solution.value)
    jax.effects_barrier()
    assert solution.result == lx.RESULTS.max_steps_reached
    assert solution.stats["num_steps"] == max_steps
    assert len(count) == max_steps
    assert _relative_residual(matrix, solution.value, b) < 1


def test_warm_start(getkey):
    matrix, b = _random(getkey(), 30), jr.normal(getkey(), (30,))
    solver = inn.GivensGMRES(1e-3, 0.0, restart=30)
    cold = _solve(matrix, b, solver)
    again = _solve(matrix, b, solver, {"y0": cold.value})
    assert again.result == lx.RESULTS.successful
    assert again.stats["num_steps"] == 1
    assert jnp.all(again.value == cold.value)
    near = jnp.linalg.solve(matrix, b) + 1e-2 * jr.normal(getkey(), (30,))
    warm = _solve(matrix, b, solver, {"y0": near})
    assert warm.stats["num_steps"] < cold.stats["num_steps"]
    assert _relative_residual(matrix, warm.value, b) <= 1e-3


def test_right_preconditioner(getkey):
    matrix, b = _random(getkey(), 30, scale=0.9), jr.normal(getkey(), (30,))
    solver = inn.GivensGMRES(1e-3, 0.0)
    inverse = lx.MatrixLinearOperator(jnp.linalg.inv(matrix))
    solution = _solve(matrix, b, solver, {"preconditioner": inverse})
    assert solution.stats["num_steps"] == 1
    assert _relative_residual(matrix, solution.value, b) <= 1e-3
    # A tiny preconditioner does not fool the stopping rule.
    tiny = lx.MatrixLinearOperator(1e-4 * jnp.eye(30))
    solution = _solve(matrix, b, solver, {"preconditioner": tiny})
    plain = _solve(matrix, b, solver)
    assert solution.stats["num_steps"] == plain.stats["num_steps"]
    assert _relative_residual(matrix, solution.value, b) <= 1.01e-3


def test_transpose_and_conj(getkey):
    matrix, b = _random(getkey(), 20), jr.normal(getkey(), (20,))
    near = matrix + 0.05 * jr.normal(getkey(), (20, 20))
    preconditioner = lx.MatrixLinearOperator(jnp.linalg.inv(near))
    options = {"preconditioner": preconditioner, "y0": b}
    solver = inn.GivensGMRES(1e-4, 0.0)
    state = solver.init(_operator(matrix), options)
    state, options = solver.transpose(*solver.conj(state, options))
    assert set(options) == {"preconditioner"}
    x, result, stats = eqx.filter_jit(solver.compute)(state, b, options)
    assert result == lx.RESULTS.successful
    assert _relative_residual(matrix.T, x, b) <= 1.01e-4
    assert stats["num_steps"] < _solve(matrix.T, b, solver).stats["num_steps"]


def test_derivatives(getkey):
    matrix, b = _random(getkey(), 6), jr.normal(getkey(), (6,))
    rtol = 10 * float(jnp.finfo(b.dtype).eps)

    def solve(matrix, b):
        return _solve(matrix, b, inn.GivensGMRES(rtol, 0.0)).value

    primals, tangents = (matrix, b), (_random(getkey(), 6), jr.normal(getkey(), (6,)))

    @ft.partial(jax.jit, static_argnums=0)
    def derivatives(solve, primals, tangents):
        _, jvp = jax.jvp(solve, primals, tangents)
        grad = jax.grad(lambda primals: jnp.sum(solve(*primals) ** 2))
        return jvp, grad(primals)

    values = derivatives(solve, primals, tangents)
    truths = derivatives(jnp.linalg.solve, primals, tangents)
    assert eqx.tree_equal(values, truths, rtol=1e3 * rtol, atol=1e3 * rtol)


def test_stagnation():
    # The Krylov spaces of a cyclic shift do not come nearer until the last one.
    n = 12
    matrix, b = jnp.roll(jnp.eye(n), 1, axis=0), jnp.zeros(n).at[0].set(1)
    solution = _solve(matrix, b, inn.GivensGMRES(1e-3, 0.0, restart=n - 1))
    assert solution.result == lx.RESULTS.stagnation
    assert jnp.all(jnp.isfinite(solution.value))
    solution = _solve(matrix, b, inn.GivensGMRES(1e-3, 0.0, restart=n))
    assert solution.result == lx.RESULTS.successful
    assert solution.stats["num_steps"] == n


@pytest.mark.parametrize("rank", (0, 1, 5, 9, 29))
@pytest.mark.parametrize("normal", (True, False))
def test_breakdown(getkey, rank, normal):
    n = 30
    basis = jr.normal(getkey(), (n, n))
    basis = jnp.linalg.qr(basis)[0] if normal else basis
    values = jnp.where(jnp.arange(n) < rank, jnp.linspace(1, 3, n), 0)
    matrix = basis @ jnp.diag(values) @ jnp.linalg.inv(basis)
    b = jr.normal(getkey(), (n,))
    solver = inn.GivensGMRES(1e-4, 0.0, restart=n)
    # Rounding must not make a solution of no solution.
    solution = _solve(matrix, b, solver)
    assert solution.result == lx.RESULTS.breakdown
    residual = _relative_residual(matrix, solution.value, b)
    told = solution.stats["residual_norm"] / jnp.linalg.norm(b)
    # To a factor: on a singular system rounding decides how far a cycle gets.
    assert residual == pytest.approx(float(told), rel=1.0)
    assert 0 < residual < 1.3
    # Singular, but the right-hand side is in the range.
    if rank == 1 or (rank > 0 and normal):
        b = matrix @ b
        solution = _solve(matrix, b, solver)
        assert solution.result == lx.RESULTS.successful
        assert solution.stats["num_steps"] <= rank
        assert _relative_residual(matrix, solution.value, b) <= 1.01e-4


def test_verifies_what_rounding_may_have_spoilt(getkey):
    # Of a condition number at which a single cycle is not accurate enough.
    n = 30
    left, _ = jnp.linalg.qr(jr.normal(getkey(), (n, n)))
    right, _ = jnp.linalg.qr(jr.normal(getkey(), (n, n)))
    values = jnp.logspace(0, -4, n)
    matrix = (left @ jnp.diag(values) @ right.T).astype("float32")
    b = jnp.ones(n, "float32")
    solver = inn.GivensGMRES(1e-5, 0.0, restart=n, max_steps=10 * n)
    solution = _solve(matrix, b, solver)
    residual = _relative_residual(matrix, solution.value, b)
    assert solution.stats["num_steps"] > n
    told = solution.stats["residual_norm"] / jnp.linalg.norm(b)
    assert residual == pytest.approx(float(told), abs=3e-5)
    if solution.result == lx.RESULTS.successful:
        assert residual <= 2e-5


def test_zero_vector(getkey):
    matrix = _random(getkey(), 30)
    solution = _solve(matrix, jnp.zeros(30), inn.GivensGMRES(1e-3, 0.0))
    assert solution.result == lx.RESULTS.successful
    assert solution.stats["num_steps"] == 0
    assert jnp.all(solution.value == 0)


@pytest.mark.parametrize("bad", (jnp.nan, jnp.inf))
def test_nonfinite(getkey, bad):
    matrix, b = _random(getkey(), 30), jnp.ones(30)
    solution = _solve(matrix, b.at[2].set(bad), inn.GivensGMRES(1e-3, 0.0))
    assert solution.result != lx.RESULTS.successful
    solution = _solve(matrix.at[1, 2].set(bad), b, inn.GivensGMRES(1e-3, 0.0))
    assert solution.result != lx.RESULTS.successful


def test_multiple_leaves(getkey):
    matrix, b = _random(getkey(), 18), jr.normal(getkey(), (18,))

    def split(x):
        return {"a": x[:12].reshape(2, 3, 2), "b": (x[12:17], x[17])}

    def join(x):
        return jnp.concatenate([x["a"].reshape(-1), x["b"][0], x["b"][1][None]])

    structure = jax.eval_shape(lambda: split(b))
    operator = lx.FunctionLinearOperator(lambda x: split(matrix @ join(x)), structure)
    solver = inn.GivensGMRES(1e-4, 0.0, restart=6)
    solution = lx.linear_solve(operator, split(b), solver, throw=False)
    alone = _solve(matrix, b, solver)
    assert solution.result == lx.RESULTS.successful
    assert solution.stats["num_steps"] == alone.stats["num_steps"]
    assert jnp.allclose(join(solution.value), alone.value, rtol=1e-4, atol=1e-5)


def test_vmap_is_alone(getkey):
    # From easy to hard, over several cycles, and one that breaks down.
    scales = jnp.array([0.1, 0.5, 0.9, 0.98])
    noise = jr.normal(getkey(), (30, 30)) / 30**0.5
    matrices = scales[:, None, None] * noise[None] - jnp.eye(30)[None]
    matrices = jnp.concatenate([matrices, jnp.ones((1, 30, 30))])
    bs = jr.normal(getkey(), (5, 30))
    solver = inn.GivensGMRES(1e-4, 0.0, restart=6)

    @jax.jit
    def solve(matrix, b):
        solution = _solve(matrix, b, solver)
        return solution.value, solution.stats, solution.result

    values, stats, results = jax.vmap(solve)(matrices, bs)
    assert len(set(stats["num_steps"].tolist())) == 5
    for i in range(5):
        value, stat, result = solve(matrices[i], bs[i])
        assert stat["num_steps"] == stats["num_steps"][i]
        assert result._value == results._value[i]
        assert jnp.allclose(value, values[i], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16))
def test_half_precision(getkey, dtype):
    matrix = _random(getkey(), 30, scale=0.8).astype(dtype)
    b = jr.normal(getkey(), (30,)).astype(dtype)
    solution = _solve(matrix, b, inn.GivensGMRES(1e-2, 0.0))
    assert solution.value.dtype == dtype
    assert solution.stats["residual_norm"].dtype == jnp.float32
    assert solution.result == lx.RESULTS.successful
    residual = _relative_residual(
        matrix.astype(jnp.float32), solution.value.astype(jnp.float32), b
    )
    assert residual < 4 * float(jnp.finfo(dtype).eps) + 2e-2


def test_float32_under_x64(getkey):
    matrix, b = _random(getkey(), 10).astype("float32"), jnp.ones(10, "float32")
    solution = _solve(matrix, b, inn.GivensGMRES(1e-4, 0.0))
    assert solution.value.dtype == jnp.float32
    assert solution.result == lx.RESULTS.successful


def test_stays_orthogonal(getkey):
    # Of a condition number for which classical Gram-Schmidt alone loses orthogonality,
    # and so takes many more products than the dimension.
    n = 40
    left, _ = jnp.linalg.qr(jr.normal(getkey(), (n, n)))
    values = jnp.logspace(0, -3, n)
    matrix = (left @ jnp.diag(values) @ left.T).astype("float32")
    b = jnp.ones(n, "float32")
    solution = _solve(matrix, b, inn.GivensGMRES(1e-4, 0.0, restart=n))
    assert solution.result == lx.RESULTS.successful
    history = _reference_history(matrix, b, n)
    fewest = 1 + next(i for i, residual in enumerate(history) if residual <= 1e-4)
    assert solution.stats["num_steps"] <= fewest + 1
    assert _relative_residual(matrix, solution.value, b) <= 1.5e-4


def test_ends_where_products_are_rounded(getkey):
    # Products of 10 and of 7 bits, as of TensorFloat32 and of bfloat16.
    n, batch = 64, 16
    matrix = 0.9 * jr.normal(getkey(), (n, n)) / n**0.5
    vectors = jr.normal(getkey(), (batch, n))

    def rounded(x, bits):
        unit = jnp.exp2(jnp.floor(jnp.log2(jnp.abs(x))) - bits)
        return jnp.where(x == 0, 0, jnp.round(x / unit) * unit)

    @jax.jit
    def solve_all(bits):
        def solve(b):
            def product(x):
                return x - rounded(matrix, bits) @ rounded(x, bits)

            solver = inn.GivensGMRES(1e-6, 0.0)
            solution, result, stats = solver._solve(product, b, {})
            residual = jnp.linalg.norm(b - product(solution)) / jnp.linalg.norm(b)
            return result == lx.RESULTS.stagnation, stats["num_steps"], residual

        return jax.vmap(solve)(vectors)

    for bits in (10, 7):
        stagnated, num_steps, residual = solve_all(bits)
        assert jnp.all(stagnated)
        assert jnp.all(num_steps < 150)
        assert jnp.all(residual < 2.0 ** (3 - bits))


def test_traced_tolerances_do_not_recompile(getkey):
    matrix, b = _random(getkey(), 10), jr.normal(getkey(), (10,))
    num_traces = 0

    @eqx.filter_jit
    def solve(solver):
        nonlocal num_traces
        num_traces += 1
        return _solve(matrix, b, solver).stats["num_steps"]

    loose = solve(inn.GivensGMRES(jnp.array(1e-1), jnp.array(0.0)))
    tight = solve(inn.GivensGMRES(jnp.array(1e-5), jnp.array(0.0)))
    assert loose < tight
    assert num_traces == 1


def test_no_callback_nor_custom_call(getkey):
    matrix, b = _random(getkey(), 10), jr.normal(getkey(), (10,))
    solve = jax.jit(lambda b: _solve(matrix, b, inn.GivensGMRES(1e-4, 0.0)).value)
    assert "custom_call" not in solve.lower(b).as_text()


def test_errors(getkey):
    with pytest.raises(ValueError, match="square"):
        lx.linear_solve(
            lx.MatrixLinearOperator(jnp.ones((3, 2))),
            jnp.ones(3),
            inn.GivensGMRES(1e-3, 0.0),
        )
    with pytest.raises(ValueError, match="real"):
        _solve(
            _random(getkey(), 3).astype(complex),
            jnp.ones(3, complex),
            inn.GivensGMRES(1e-3, 0.0),
        )
