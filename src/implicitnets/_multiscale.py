import functools as ft
import itertools
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, PRNGKeyArray, PyTree

from ._adjoint.implicit import ImplicitAdjoint
from ._cell import takes_key
from ._deq import (
    AbstractDeepEquilibriumNetwork,
    as_solver,
    Solver,
)
from ._solver.anderson import AndersonAcceleration


_Layers: TypeAlias = tuple[Callable, ...]
State: TypeAlias = tuple[Array, ...]
Shapes: TypeAlias = tuple[tuple[int, ...], ...]
Start: TypeAlias = Callable[[Any], State]


def _as_rows(rows: Iterable[Iterable[Callable]]) -> tuple[_Layers, ...]:
    return tuple(tuple(row) for row in rows)


def _as_layers(layers: Iterable[Callable] | None) -> _Layers | None:
    return None if layers is None else tuple(layers)


class MultiScaleCell(eqx.Module):
    """A cell whose state is a tuple of arrays, one a scale.

    Every scale goes through a layer of its own, the first of them together with the
    input. Then every scale becomes the sum of what all of them are mapped to there.
    Then every scale goes through one more layer of its own.

    A layer with an argument `key` gets one of its own by that name, if the cell is
    called with a key.

    Bai et al., *Multiscale Deep Equilibrium Models*, 2020, section 3.1.

    **Arguments:**

    - `main_layers`: one layer a scale. The first is called with its scale and the
        input, the others with their scale.
    - `mapping_layers`: a square matrix of layers: that in row `i` and column `j` maps
        scale `i` to the shape of scale `j`. `equinox.nn.Identity()` suits the diagonal.
    - `post_fuse_layers`: one layer a scale; `None` for none.

    **Raises:**

    `ValueError` if the numbers of layers do not match.
    """

    main_layers: _Layers = eqx.field(converter=tuple)
    mapping_layers: tuple[_Layers, ...] = eqx.field(converter=_as_rows)
    post_fuse_layers: _Layers | None = eqx.field(default=None, converter=_as_layers)

    def __check_init__(self):
        num_scales = len(self.main_layers)
        widths = [len(row) for row in self.mapping_layers]
        if widths != [num_scales] * num_scales:
            raise ValueError(
                "`mapping_layers` must have a row and a column for each of the "
                f"{num_scales} `main_layers`; got rows of lengths {widths}."
            )
        if self.post_fuse_layers is not None:
            num_layers = len(self.post_fuse_layers)
            if num_layers != num_scales:
                raise ValueError(
                    "`post_fuse_layers` must have a layer for each of the "
                    f"{num_scales} `main_layers`; got {num_layers}."
                )

    def __call__(
        self, z: State, x: PyTree, *, key: PRNGKeyArray | None = None
    ) -> State:
        """The next state.

        **Arguments:**

        - `z`: the state.
        - `x`: the input, which the first of the main layers sees.
        - `key`: split among the layers.

        **Returns:**

        The next state.
        """
        num_scales = len(self.main_layers)
        if key is None:
            keys = itertools.repeat(None)
        else:
            keys = iter(jr.split(key, num_scales * (num_scales + 2)))

        def call(layer, *args):
            key = next(keys)
            if key is None or not takes_key(layer):
                return layer(*args)
            return layer(*args, key=key)

        z_first, *z_others = z
        first, *others = self.main_layers
        z = (call(first, z_first, x), *map(call, others, z_others))
        mapped = [
            [call(layer, leaf) for layer in row]
            for row, leaf in zip(self.mapping_layers, z, strict=True)
        ]
        z = tuple(ft.reduce(jnp.add, column) for column in zip(*mapped, strict=True))
        if self.post_fuse_layers is None:
            return z
        return tuple(map(call, self.post_fuse_layers, z))


class _EachScale(eqx.Module):
    """What several layers make of one input."""

    layers: _Layers

    def __call__(self, x):
        return tuple(layer(x) for layer in self.layers)


def as_start(init: Start | Iterable[Callable] | None) -> Start | None:
    """A start of a multiscale state, also where it is given by one layer a scale."""
    return init if init is None or callable(init) else _EachScale(tuple(init))


def zero_state(shapes: Shapes, x: PyTree) -> State:
    """A multiscale state of zeros, in the precision of the input."""
    dtypes = [jnp.result_type(leaf) for leaf in jtu.tree_leaves(x)]
    dtypes = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.inexact)]
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(float, *dtypes)
    return tuple(jnp.zeros(shape, dtype) for shape in shapes)


def as_shapes(state_shapes: Iterable[Iterable[int]], cell: MultiScaleCell) -> Shapes:
    """The shapes of the states of a cell, checked to be as many as it has scales."""
    shapes = tuple(tuple(shape) for shape in state_shapes)
    if len(shapes) != len(cell.main_layers):
        raise ValueError(
            "`state_shapes` must have a shape for each of the "
            f"{len(cell.main_layers)} `main_layers`; got {shapes}."
        )
    return shapes


class MultiScaleDeepEquilibriumNetwork(AbstractDeepEquilibriumNetwork):
    """An equilibrium layer whose state is a tuple of arrays, one a scale.

    The equilibrium layer of a [`implicitnets.MultiScaleCell`][], which has a state of
    other shapes than its input. All scales are solved for at once.

    ```python
    deq = inn.MultiScaleDeepEquilibriumNetwork(
        main_layers=[inject, eqx.nn.Linear(2, 2, key=key)],
        mapping_layers=[
            [eqx.nn.Identity(), eqx.nn.Linear(4, 2, key=key)],
            [eqx.nn.Linear(2, 4, key=key), eqx.nn.Identity()],
        ],
        state_shapes=[(4,), (2,)],
    )
    fine, coarse = deq(x)
    ```

    Bai et al., *Multiscale Deep Equilibrium Models*, 2020.

    **Arguments:**

    - `main_layers`, `mapping_layers`, `post_fuse_layers`: as
        [`implicitnets.MultiScaleCell`][].
    - `state_shapes`: the shape of every scale.
    - `init`: `init(x) -> z0`, where the solve starts, or one layer a scale, each of
        which sees `x`; `None` for zeros.
    - `solver`, `adjoint`, `max_steps`, `throw`, `fixed_depth`: as
        [`implicitnets.DeepEquilibriumNetwork`][].

    **Raises:**

    `ValueError` if the numbers of layers do not match; `TypeError` for what is no
    solver.
    """

    cell: Callable
    solver: Solver
    state_shapes: Shapes = eqx.field(static=True)
    init: Start | None
    adjoint: optx.AbstractAdjoint
    max_steps: int
    throw: bool
    fixed_depth: int

    def __init__(
        self,
        main_layers: Iterable[Callable],
        mapping_layers: Iterable[Iterable[Callable]],
        post_fuse_layers: Iterable[Callable] | None = None,
        solver: Solver | dfx.AbstractSolver = AndersonAcceleration(1e-4, 1e-6),
        *,
        state_shapes: Iterable[Iterable[int]],
        init: Start | Iterable[Callable] | None = None,
        adjoint: optx.AbstractAdjoint = ImplicitAdjoint(),
        max_steps: int = 256,
        throw: bool = False,
        fixed_depth: int = 0,
    ):
        cell = MultiScaleCell(main_layers, mapping_layers, post_fuse_layers)
        self.cell = cell
        self.solver = as_solver(solver)
        self.state_shapes = as_shapes(state_shapes, cell)
        self.init = as_start(init)
        self.adjoint = adjoint
        self.max_steps = max_steps
        self.throw = throw
        self.fixed_depth = fixed_depth

    def start(self, x: PyTree, *, key: PRNGKeyArray | None = None) -> State:
        """`init(x)`, or zeros."""
        del key
        if self.init is None:
            return zero_state(self.state_shapes, x)
        return self.init(x)


class SkipMultiScaleDeepEquilibriumNetwork(AbstractDeepEquilibriumNetwork):
    """A multiscale equilibrium layer that starts where an explicit network predicts.

    As [`implicitnets.SkipDeepEquilibriumNetwork`][], for a state that is a tuple of
    arrays, one a scale.

    **Arguments:**

    - `init`: `init(x) -> z0`, trained with the rest of the model, or one layer a scale,
        each of which sees `x`; `None` for one application of the cell to zeros.
    - `main_layers`, `mapping_layers`, `post_fuse_layers`, `solver`, `state_shapes`,
        `adjoint`, `max_steps`, `throw`, `fixed_depth`: as
        [`implicitnets.MultiScaleDeepEquilibriumNetwork`][].

    **Raises:**

    As [`implicitnets.MultiScaleDeepEquilibriumNetwork`][].
    """

    cell: Callable
    solver: Solver
    state_shapes: Shapes = eqx.field(static=True)
    init: Start | None
    adjoint: optx.AbstractAdjoint
    max_steps: int
    throw: bool
    fixed_depth: int

    def __init__(
        self,
        main_layers: Iterable[Callable],
        mapping_layers: Iterable[Iterable[Callable]],
        post_fuse_layers: Iterable[Callable] | None = None,
        solver: Solver | dfx.AbstractSolver = AndersonAcceleration(1e-4, 1e-6),
        *,
        state_shapes: Iterable[Iterable[int]],
        init: Start | Iterable[Callable] | None = None,
        adjoint: optx.AbstractAdjoint = ImplicitAdjoint(),
        max_steps: int = 256,
        throw: bool = False,
        fixed_depth: int = 0,
    ):
        cell = MultiScaleCell(main_layers, mapping_layers, post_fuse_layers)
        self.cell = cell
        self.solver = as_solver(solver)
        self.state_shapes = as_shapes(state_shapes, cell)
        self.init = as_start(init)
        self.adjoint = adjoint
        self.max_steps = max_steps
        self.throw = throw
        self.fixed_depth = fixed_depth

    def start(self, x: PyTree, *, key: PRNGKeyArray | None = None) -> State:
        """`init(x)`, or one application of the cell to zeros."""
        if self.init is None:
            return self.evaluate(zero_state(self.state_shapes, x), x, key=key)
        return self.init(x)
