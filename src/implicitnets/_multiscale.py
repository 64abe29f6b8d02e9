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
from jaxtyping import Array, PRNGKeyArray, PyTree, ScalarLike

from ._adjoint.implicit import ImplicitAdjoint
from ._cell import takes_key
from ._deq import DeepEquilibriumNetwork, SkipDeepEquilibriumNetwork
from ._internal.checks import as_integer, check_part, check_value, FUNCTION
from ._internal.types import Solver
from ._neural_ode import NeuralODE
from ._solver.anderson import AndersonAcceleration


_Layers: TypeAlias = tuple[Callable, ...]
_State: TypeAlias = tuple[Array, ...]
_Start: TypeAlias = Callable[[Any], _State]


def _as_rows(rows: Iterable[Iterable[Callable]]) -> tuple[_Layers, ...]:
    return tuple(tuple(row) for row in rows)


def _as_layers(layers: Iterable[Callable] | None) -> _Layers | None:
    return None if layers is None else tuple(layers)


class MultiScaleCell(eqx.Module):
    """A cell whose state is a tuple of arrays, one for each scale.

    The main layers come first: each scale has its own, and the first of them also sees
    the input. The mapping layers then take every scale to the shape of every other, and
    each scale becomes the sum of what arrives there. The post-fuse layers come last,
    one for each scale.

    If the cell is called with a key, each layer with an argument `key` gets its own.

    Bai et al., *Multiscale Deep Equilibrium Models*, 2020, section 3.1.

    **Arguments:**

    - `main_layers`: one layer for each scale. The first is called with its scale and
        the input, the others with their scale.
    - `mapping_layers`: a square matrix of layers. The layer in row `i` and column `j`
        maps scale `i` to the shape of scale `j`. `equinox.nn.Identity()` suits the
        diagonal.
    - `post_fuse_layers`: one layer for each scale, or `None`.

    **Raises:**

    `ValueError` if the numbers of layers do not match or there are none; `TypeError`
    for what is not a layer.
    """

    main_layers: _Layers = eqx.field(converter=tuple)
    mapping_layers: tuple[_Layers, ...] = eqx.field(converter=_as_rows)
    post_fuse_layers: _Layers | None = eqx.field(default=None, converter=_as_layers)

    def __check_init__(self):
        num_scales = len(self.main_layers)
        layers = {
            "main_layers": self.main_layers,
            "mapping_layers": itertools.chain(*self.mapping_layers),
            "post_fuse_layers": self.post_fuse_layers or (),
        }
        for name, some_layers in layers.items():
            for layer in some_layers:
                check_part(self, name, layer, FUNCTION)
        some = num_scales > 0
        check_value(self, "main_layers", self.main_layers, some, "at least one layer")
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
        self, z: _State, x: PyTree, *, key: PRNGKeyArray | None = None
    ) -> _State:
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
    layers: _Layers

    def __call__(self, x: PyTree) -> _State:
        return tuple(layer(x) for layer in self.layers)


class _ZeroState(eqx.Module):
    shapes: tuple[tuple[int, ...], ...] = eqx.field(static=True)

    def __call__(self, x: PyTree) -> _State:
        # In the precision of the input, which may also have integers and Booleans.
        dtypes = [jnp.result_type(leaf) for leaf in jtu.tree_leaves(x)]
        dtypes = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.inexact)]
        with jax.numpy_dtype_promotion("standard"):
            dtype = jnp.result_type(float, *dtypes)
        return tuple(jnp.zeros(shape, dtype) for shape in self.shapes)


def _cell_and_starts(
    main_layers: Iterable[Callable],
    mapping_layers: Iterable[Iterable[Callable]],
    post_fuse_layers: Iterable[Callable] | None,
    state_shapes: Iterable[Iterable[int]],
    init: _Start | Iterable[Callable] | None,
) -> dict[str, Any]:
    """What the multiscale layers have in common, as arguments of any layer."""
    cell = MultiScaleCell(main_layers, mapping_layers, post_fuse_layers)
    shapes = tuple(tuple(map(as_integer, shape)) for shape in state_shapes)
    num_scales = len(cell.main_layers)
    check_value(
        cell,
        "state_shapes",
        shapes,
        len(shapes) == num_scales
        and all(type(size) is int and size >= 1 for shape in shapes for size in shape),
        f"one shape for each of the {num_scales} `main_layers`",
    )
    if not (init is None or callable(init)):
        init = _EachScale(tuple(init))
    return {"cell": cell, "init": init, "zero_state": _ZeroState(shapes)}


def MultiScaleDeepEquilibriumNetwork(
    main_layers: Iterable[Callable],
    mapping_layers: Iterable[Iterable[Callable]],
    post_fuse_layers: Iterable[Callable] | None = None,
    solver: Solver | dfx.AbstractSolver = AndersonAcceleration(1e-4, 1e-6),
    *,
    state_shapes: Iterable[Iterable[int]],
    init: _Start | Iterable[Callable] | None = None,
    adjoint: optx.AbstractAdjoint = ImplicitAdjoint(),
    max_steps: int = 256,
    throw: bool = False,
    fixed_depth: int = 0,
) -> DeepEquilibriumNetwork:
    """An equilibrium layer whose state is a tuple of arrays, one for each scale.

    A [`implicitnets.DeepEquilibriumNetwork`][] of a [`implicitnets.MultiScaleCell`][],
    which solves for all scales at once.

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
    - `state_shapes`: the shape of every scale. Keyword only argument.
    - `init`: `init(x) -> z0`, where the solve starts; or one layer for each scale, each
        of which sees `x`; or `None` for zeros. Keyword only argument.
    - `solver`, `adjoint`, `max_steps`, `throw`, `fixed_depth`: as
        [`implicitnets.DeepEquilibriumNetwork`][].

    **Returns:**

    The layer.

    **Raises:**

    `ValueError` if the numbers of layers do not match; `TypeError` if `solver` is not a
    solver.
    """
    return DeepEquilibriumNetwork(
        solver=solver,
        adjoint=adjoint,
        max_steps=max_steps,
        throw=throw,
        fixed_depth=fixed_depth,
        **_cell_and_starts(
            main_layers, mapping_layers, post_fuse_layers, state_shapes, init
        ),
    )


def SkipMultiScaleDeepEquilibriumNetwork(
    main_layers: Iterable[Callable],
    mapping_layers: Iterable[Iterable[Callable]],
    post_fuse_layers: Iterable[Callable] | None = None,
    solver: Solver | dfx.AbstractSolver = AndersonAcceleration(1e-4, 1e-6),
    *,
    state_shapes: Iterable[Iterable[int]],
    init: _Start | Iterable[Callable] | None = None,
    adjoint: optx.AbstractAdjoint = ImplicitAdjoint(),
    max_steps: int = 256,
    throw: bool = False,
    fixed_depth: int = 0,
) -> SkipDeepEquilibriumNetwork:
    """A multiscale equilibrium layer that starts where an explicit network predicts.

    A [`implicitnets.SkipDeepEquilibriumNetwork`][] of a
    [`implicitnets.MultiScaleCell`][].

    **Arguments:**

    - `init`: `init(x) -> z0`, trained with the rest of the model; or one layer for each
        scale, each of which sees `x`; or `None` for one application of the cell to
        zeros. Keyword only argument.
    - `main_layers`, `mapping_layers`, `post_fuse_layers`, `solver`, `state_shapes`,
        `adjoint`, `max_steps`, `throw`, `fixed_depth`: as
        [`implicitnets.MultiScaleDeepEquilibriumNetwork`][].

    **Returns:**

    The layer.

    **Raises:**

    As [`implicitnets.MultiScaleDeepEquilibriumNetwork`][].
    """
    return SkipDeepEquilibriumNetwork(
        solver=solver,
        adjoint=adjoint,
        max_steps=max_steps,
        throw=throw,
        fixed_depth=fixed_depth,
        **_cell_and_starts(
            main_layers, mapping_layers, post_fuse_layers, state_shapes, init
        ),
    )


def MultiScaleNeuralODE(
    main_layers: Iterable[Callable],
    mapping_layers: Iterable[Iterable[Callable]],
    post_fuse_layers: Iterable[Callable] | None = None,
    solver: dfx.AbstractSolver = dfx.Tsit5(),
    *,
    state_shapes: Iterable[Iterable[int]],
    t1: ScalarLike = 1.0,
    init: _Start | Iterable[Callable] | None = None,
    dt0: ScalarLike = 0.1,
    stepsize_controller: dfx.AbstractStepSizeController = dfx.PIDController(1e-3, 1e-6),
    adjoint: dfx.AbstractAdjoint = dfx.RecursiveCheckpointAdjoint(),
    max_steps: int = 256,
    throw: bool = False,
) -> NeuralODE:
    """A [`implicitnets.NeuralODE`][] of a [`implicitnets.MultiScaleCell`][].

    **Arguments:**

    - `main_layers`, `mapping_layers`, `post_fuse_layers`, `state_shapes`, `init`: as
        [`implicitnets.MultiScaleDeepEquilibriumNetwork`][].
    - `solver`, `t1`, `dt0`, `stepsize_controller`, `adjoint`, `max_steps`, `throw`: as
        [`implicitnets.NeuralODE`][].

    **Returns:**

    The layer.

    **Raises:**

    `ValueError` if the numbers of layers do not match.
    """
    return NeuralODE(
        solver=solver,
        t1=t1,
        dt0=dt0,
        stepsize_controller=stepsize_controller,
        adjoint=adjoint,
        max_steps=max_steps,
        throw=throw,
        **_cell_and_starts(
            main_layers, mapping_layers, post_fuse_layers, state_shapes, init
        ),
    )
