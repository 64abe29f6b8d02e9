"""Our solvers in Optimistix' own solves, without a layer: values, derivatives, errors.

Optimistix holds its own solvers to the same: against references, and its derivatives
against each other, by the implicit function theorem and through the steps.
"""

import functools as ft

import diffrax as dfx
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import optimistix as optx
import pytest
from jax.flatten_util import ravel_pytree

import implicitnets as inn

from ..helpers import is_double, make_matrix, make_vector, relative_error


# Derivatives that agree to many digits, in the precision of Optimistix' own tests.
pytestmark = pytest.mark.skipif(not is_double(), reason="compares many digits")

TOL = 1e-10
SOLVERS = {
    "anderson": inn.AndersonAcceleration(TOL, TOL),
    "broyden": inn.Broyden(TOL, TOL),
    "newton_krylov": inn.NewtonKrylov(TOL, TOL),
    "reversible": inn.ReversibleFixedPoint(TOL, TOL),
    "adams": inn.SteadyState(inn.VCABM3(), TOL, TOL),
    "tsit5": inn.SteadyState(dfx.Tsit5(), TOL, TOL),
    "implicit_euler": inn.SteadyState(dfx.ImplicitEuler(), TOL, TOL),
}
IMPLICIT = inn.ImplicitAdjoint(inn.GivensGMRES(1e-12, 0.0))


class ForwardThroughTheSteps(optx.AbstractAdjoint):
    """Differentiates the loop, in forward mode, which is all that it has."""

    def apply(self, primal_fn, rewrite_fn, inputs, tags):
        del rewrite_fn, tags
        return primal_fn(inputs + (ft.partial(eqxi.while_loop, kind="lax"),))


def step(state, args):
    """Coupled leaves of several shapes; the arguments have one that is no array."""
    weight, shift, activation = args
    flat, unravel = ravel_pytree(state)
    outputs = unravel(getattr(jnp, activation)(weight @ flat))
    return jtu.tree_map(jnp.add, outputs, shift)


def structured(flat):
    return {"a": flat[0], "b": flat[1:4], "c": flat[4:].reshape(2, 2)}


WEIGHT = make_matrix(8, 0.6)
SHIFTS = jnp.stack([make_vector(8, seed) for seed in (1, 2)])
TANGENT = make_matrix(8, 1.0, seed=3), structured(make_vector(8, 4))
COTANGENT = structured(make_vector(8, 5))


def find(entry, solver, weight, shift, *, adjoint=IMPLICIT, **kwargs):
    def fn(state, args):
        new = step(state, args)
        aux = {"shift": shift, "sum": jnp.sum(new["b"])}
        if entry is optx.root_find:
            new = jtu.tree_map(jnp.subtract, new, state)
        return new, aux

    start = jtu.tree_map(jnp.zeros_like, shift)
    args = weight, shift, "tanh"
    kwargs = {"max_steps": 1000, "throw": False, **kwargs}
    return entry(fn, solver, start, args, has_aux=True, adjoint=adjoint, **kwargs)


def reference(shift):
    """The equilibrium, and its derivatives along the tangent and the cotangent."""
    weight, x = np.asarray(WEIGHT), np.asarray(shift)
    z = np.zeros(8)
    for _ in range(500):
        z = np.tanh(weight @ z) + x
    slope = 1 - np.tanh(weight @ z) ** 2
    system = np.eye(8) - slope[:, None] * weight
    t_weight, t_shift = (np.asarray(ravel_pytree(t)[0]) for t in TANGENT)
    tangent = np.linalg.solve(system, slope * (t_weight.reshape(8, 8) @ z) + t_shift)
    u = np.linalg.solve(system.T, np.asarray(ravel_pytree(COTANGENT)[0]))
    return z, tangent, (np.outer(slope * u, z), u)


def flat(tree):
    return ravel_pytree(tree)[0]


def solved(entry, solver, weight, shift):
    """The value, and what has no derivative."""
    sol = find(entry, solver, weight, shift)
    return sol.value, (sol.aux, sol.result)


def check_examples(out, entry):
    """Of a batch: what was solved, and the derivatives that are there."""
    values, (aux, result), derivatives = out
    assert np.all(result == optx.RESULTS.successful)
    for i, shift in enumerate(SHIFTS):
        value, of_shift, derivative = jtu.tree_map(
            lambda leaf, i=i: leaf[i], (values, aux["shift"], derivatives)
        )
        z, tangent, cotangents = reference(shift)
        assert relative_error(flat(value), z) < 1e-8
        assert np.array_equal(flat(of_shift), shift)
        assert np.isclose(aux["sum"][i], np.sum(value["b"]), rtol=1e-8)
        expected = tangent if entry is optx.fixed_point else cotangents
        assert relative_error(flat(derivative), flat(expected)) < 1e-7


@pytest.mark.parametrize("name", SOLVERS)
def test_fixed_points_and_their_tangents(name):
    @eqx.filter_jit
    @eqx.filter_vmap
    def run(shift):
        value = ft.partial(solved, optx.fixed_point, SOLVERS[name])
        primals = WEIGHT, structured(shift)
        found, tangent, rest = jax.jvp(value, primals, TANGENT, has_aux=True)
        return found, rest, tangent

    check_examples(run(SHIFTS), optx.fixed_point)


@pytest.mark.parametrize("name", ("broyden", "newton_krylov", "adams"))
def test_roots_and_their_cotangents(name):
    @eqx.filter_jit
    @eqx.filter_vmap
    def run(shift):
        value = ft.partial(solved, optx.root_find, SOLVERS[name])
        primals = WEIGHT, structured(shift)
        found, pull_back, rest = jax.vjp(value, *primals, has_aux=True)
        return found, rest, pull_back(COTANGENT)

    check_examples(run(SHIFTS), optx.root_find)


STEPS = {
    **SOLVERS,
    # The loop over the stages of a Runge-Kutta method has no forward mode unless its
    # `scan_kind` says so (Diffrax 0.7.2).
    "tsit5": pytest.param(SOLVERS["tsit5"], marks=pytest.mark.xfail(raises=TypeError)),
    "tsit5_lax": inn.SteadyState(dfx.Tsit5(scan_kind="lax"), TOL, TOL),
}


@pytest.mark.parametrize("solver", STEPS.values(), ids=STEPS)
def test_forward_mode_through_the_steps(solver):
    def value(weight, shift):
        adjoint = ForwardThroughTheSteps()
        return find(optx.fixed_point, solver, weight, shift, adjoint=adjoint).value

    shift = structured(SHIFTS[0])
    found, tangent = jax.jit(lambda: jax.jvp(value, (WEIGHT, shift), TANGENT))()
    z, expected, _ = reference(SHIFTS[0])
    assert relative_error(flat(found), z) < 1e-8
    # The derivative of an iterate comes later to rest than the iterate.
    assert relative_error(flat(tangent), expected) < 1e-4


@pytest.mark.parametrize("name", ("anderson", "newton_krylov"))
def test_throw(name):
    run = eqx.filter_jit(ft.partial(find, optx.fixed_point, SOLVERS[name], WEIGHT))
    shift = structured(SHIFTS[0])
    sol = run(shift, max_steps=2)
    assert sol.result == optx.RESULTS.nonlinear_max_steps_reached
    with pytest.raises(RuntimeError, match="maximum number of steps"):
        run(shift, max_steps=2, throw=True)


@pytest.mark.parametrize(
    "entry, name",
    ((optx.fixed_point, "anderson"), (optx.root_find, "newton_krylov")),
)
def test_tags_reach_the_linear_solver(entry, name):
    """One that is for diagonal systems only goes by them."""

    def fn(z, x):
        return 0.5 * jnp.sin(z) + x - (z if entry is optx.root_find else 0)

    def gradient(tags):
        def total(x):
            adjoint = inn.ImplicitAdjoint(lx.Diagonal())
            start = jnp.zeros(3)
            z = entry(fn, SOLVERS[name], start, x, adjoint=adjoint, tags=tags).value
            return jnp.sum(z), z

        return jax.jit(jax.grad(total, has_aux=True))(jnp.arange(3.0))

    found, z = gradient(frozenset({lx.diagonal_tag}))
    assert np.allclose(found, 1 / (1 - 0.5 * np.cos(z)), rtol=1e-8)
    with pytest.raises(ValueError, match="diagonal"):
        gradient(frozenset())
