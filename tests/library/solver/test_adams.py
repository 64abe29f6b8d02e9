from typing import Any

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np

from implicitnets import VCABM3

from ..helpers import is_double


def field(t, y, args):
    del args
    return jnp.stack([jnp.cos(t) * y[0], -2 * t * y[1] ** 2])


def exact(t):
    return np.stack([np.exp(np.sin(t)), 1 / (1 + np.asarray(t) ** 2)], axis=-1)


def integrate(vector_field, y0, t1, controller, *, t0=0.0, dt0=None, **kwargs) -> Any:
    return dfx.diffeqsolve(
        dfx.ODETerm(vector_field),
        VCABM3(),
        t0,
        t1,
        dt0,
        y0,
        stepsize_controller=controller,
        **kwargs,
    )


def grid(num_steps, t1, alternate):
    steps = np.ones(num_steps)
    if alternate:
        steps[::2] = 0.4
        steps[1::2] = 1.6
    times = np.concatenate([[0.0], np.cumsum(steps)]) * t1 / np.sum(steps)
    return jnp.asarray(times, jnp.result_type(float)).at[-1].set(t1)


def test_order():
    def error(num_steps):
        """With constant and with alternating step sizes."""
        times = jnp.stack([grid(num_steps, 2.0, False), grid(num_steps, 2.0, True)])
        last = jax.vmap(
            lambda ts: integrate(field, jnp.ones(2), ts[-1], dfx.StepTo(ts)).ys[0]
        )(times)
        return np.linalg.norm(np.asarray(last) - exact(2.0), axis=-1)

    coarse, fine = (80, 160) if is_double() else (20, 40)
    order = np.log2(error(coarse) / error(fine))
    assert np.all(order > (2.9 if is_double() else 2.6))


def test_is_exact_for_quadratic_fields_after_the_first_step():
    """Whatever the lengths of the steps: their coefficients are the right ones."""
    times = jnp.array([0.0, 0.1, 0.5, 0.6, 0.65, 1.4, 2.0])
    sol = integrate(
        lambda t, y, args: 3 * t**2 - 2 * t + 0 * y,
        jnp.zeros(1),
        2.0,
        dfx.StepTo(times),
        saveat=dfx.SaveAt(steps=True),
        max_steps=len(times) - 1,
    )
    t, y = np.asarray(sol.ts), np.asarray(sol.ys)[:, 0]
    error = y - (t**3 - t**2)
    assert np.allclose(error, error[0], rtol=0, atol=50 * jnp.finfo(y.dtype).eps)


def test_rejected_steps_leave_no_trace():
    controller = dfx.PIDController(rtol=1e-3, atol=1e-3, factormax=5.0)
    adaptive = integrate(
        field,
        jnp.ones(2),
        2.0,
        controller,
        dt0=1.5,
        saveat=dfx.SaveAt(t0=True, steps=True),
        max_steps=64,
    )
    assert adaptive.stats["num_rejected_steps"] >= 1
    times = adaptive.ts[jnp.isfinite(adaptive.ts)]
    replayed = integrate(field, jnp.ones(2), times[-1], dfx.StepTo(times))
    y1 = adaptive.ys[len(times) - 1]
    assert np.allclose(y1, replayed.ys[0], rtol=10 * jnp.finfo(y1.dtype).eps, atol=0)
    assert np.linalg.norm(y1 - exact(2.0)) < 1e-2


def test_estimates_its_error_and_interpolates():
    times = jnp.linspace(0.0, 2.0, 7)
    sol = integrate(
        field,
        jnp.ones(2),
        2.0,
        dfx.PIDController(rtol=1e-4, atol=1e-4),
        saveat=dfx.SaveAt(ts=times),
    )
    assert np.allclose(sol.ys, exact(times), rtol=0, atol=2e-3)
    assert sol.stats["num_accepted_steps"] < 60


def test_backwards_in_time_and_gradient():
    def start_from(end):
        controller = dfx.StepTo(jnp.linspace(1.0, 0.0, 33))
        start = integrate(field, end, 0.0, controller, t0=1.0).ys[0]
        return start, start

    end = jnp.asarray(exact(1.0), jnp.result_type(float))
    jacobian, start = jax.jacrev(start_from, has_aux=True)(end)
    assert np.allclose(start, np.ones(2), rtol=0, atol=1e-4)
    # y0(0) = y0(1) exp(-sin(1)), 1 / y1(0) = 1 / y1(1) - 1
    expected = np.diag([np.exp(-np.sin(1.0)), 4.0])
    assert np.allclose(jacobian, expected, rtol=0, atol=2e-3)


def test_restarts_at_a_jump():
    controller = dfx.ClipStepSizeController(
        dfx.PIDController(rtol=1e-3, atol=1e-3), jump_ts=jnp.array([1.0])
    )
    sol = integrate(
        lambda t, y, args: jnp.where(t < 1, 2.0, -3.0) + 0 * y,
        jnp.zeros(1),
        2.0,
        controller,
        dt0=0.5,
    )
    assert np.allclose(sol.ys, -1.0, rtol=0, atol=1e-5)


def test_stability_bound():
    """As in the docstring: stable on the real axis down to -2.4."""

    def last(rate):
        return integrate(
            lambda t, y, args: -rate * y,
            jnp.ones(1),
            200.0,
            dfx.ConstantStepSize(),
            dt0=1.0,
        ).ys[0, 0]

    stable, unstable = jax.vmap(last)(jnp.array([2.35, 2.45]))
    assert abs(stable) < 1e-1
    assert abs(unstable) > 1e1
