"""A mesh with explicit axes, where every type says how its array is divided."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from jax.sharding import auto_axes, AxisType, PartitionSpec as P

import implicitnets as inn

from ..helpers import conv_cell, dense_cell, relative_error
from .test_manual import ADJOINTS, ANDERSON, EXACT, SOLVERS, UPSTREAM


pytestmark = pytest.mark.one_precision


class _BatchCell(eqx.Module):
    """A whole batch is one state."""

    cell: eqx.Module

    def __call__(self, z, x):
        return jax.vmap(self.cell)(z, x)


def whole_batch():
    return _BatchCell(dense_cell())


PARTS = {
    "steady_state": (SOLVERS["steady_state"], EXACT),
    "optimistix_solver": (SOLVERS["fixed_point"], EXACT),
    **{name: ADJOINTS[name] for name in ("lu", "shine")},
}


def gradients_agree(layer, shape=(4,), *, wrap=lambda apply: apply):
    """Whether they are as on one device, with the examples divided over two."""
    params, static = eqx.partition(layer, eqx.is_inexact_array)
    # The second device's examples are harder.
    scales = jnp.array([0.1, 1.0, 3.0, 4.0]).reshape(4, *(1 for _ in shape))
    xs = scales * jr.normal(jr.key(0), (4, *shape))

    def apply(params, xs):
        layer = eqx.combine(params, static)
        couples = isinstance(layer.cell, _BatchCell)
        return layer(xs) if couples else jax.vmap(layer)(xs)

    def loss(params, xs):
        return jnp.sum(wrap(apply)(params, xs) ** 2)

    alone = jax.jit(jax.grad(loss))(params, xs)
    mesh = jax.make_mesh((2,), ("devices",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        params, xs = jax.device_put(params, P()), jax.device_put(xs, P("devices"))
        together = jax.jit(jax.grad(loss))(params, xs)
    return relative_error(*jax.device_get((together, alone))) < 1e-4


def layer_of(solver, adjoint, cell=dense_cell):
    return inn.DeepEquilibriumNetwork(cell(), solver, adjoint=adjoint)


@pytest.mark.parametrize("name", PARTS)
def test_solvers_and_adjoints(name):
    assert gradients_agree(layer_of(*PARTS[name]))


def test_convolutions():
    assert gradients_agree(layer_of(ANDERSON, EXACT, conv_cell), (2, 4, 4))


# A loop of Equinox starts from constants, and `jax.vmap` over an explicit axis makes no
# batch of these (Equinox 0.13.8, `internal/_loop/loop.py`; JAX 0.10.2 and 0.12). Lineax
# compares structures with their meshes, which constants have none of
# (https://github.com/patrick-kidger/lineax/issues/185, version 0.1.1).
@pytest.mark.parametrize("name", UPSTREAM)
@pytest.mark.xfail(raises=ValueError, reason="types without the mesh in loops, Lineax")
def test_parts_of_other_libraries(name):
    assert gradients_agree(layer_of(*UPSTREAM[name]))


@pytest.mark.xfail(raises=ValueError, reason="Diffrax solves in a loop of Equinox")
def test_neural_ode():
    assert gradients_agree(inn.NeuralODE(dense_cell()))


@pytest.mark.xfail(
    reason="JAX asks where a sum over a divided axis goes (Lineax 0.1.1, `_norm.py`)"
)
def test_divided_state():
    assert gradients_agree(layer_of(ANDERSON, EXACT, whole_batch))


@pytest.mark.parametrize(
    "make_layer",
    (
        lambda: layer_of(*UPSTREAM["newton"]),
        lambda: layer_of(ANDERSON, EXACT, whole_batch),
        lambda: inn.NeuralODE(dense_cell()),
    ),
    ids=("newton", "divided_state", "neural_ode"),
)
def test_automatic_axes(make_layer):
    """What users can do about the failures above."""

    def automatic(apply):
        if not jax.sharding.get_abstract_mesh().explicit_axes:
            return apply
        return auto_axes(apply, out_sharding=P("devices"))

    assert gradients_agree(make_layer(), wrap=automatic)
