import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Int, PyTree, Scalar, ScalarLike

from .._internal.checks import check_number, check_options, check_tolerances
from .._internal.convolution import fast_convolutions
from .._internal.krylov import leading_eigenvector, starting_vector
from .._internal.loop import materialise, Unfrozen
from .._internal.parametrise import resolve
from .._internal.pytree import tree_astype, tree_cast_like, tree_dot, working_dtype
from .progress import Progress, start_progress


# Enough for the norms to 10 % or so, where the step sizes leave a factor of two.
_NUM_LANCZOS_STEPS = 10


class AbstractMonotoneCell(eqx.Module):
    r"""A cell $\sigma(W z + u(x))$ with one equilibrium for every input.

    There is one because $I - W \succeq m I$ with $m > 0$, and because $\sigma$ is the
    proximal operator $\operatorname{prox}_\varphi$ of a convex function, as ReLU is
    that of the indicator of the positive numbers. The methods are what
    [`implicitnets.ForwardBackward`][] and [`implicitnets.PeacemanRachford`][] need to
    know of a cell; write your own by giving it these.

    Winston and Kolter, *Monotone Operator Equilibrium Networks*, 2020, section 3.

    **Attributes:**

    - `margin`: $m$.
    """

    margin: eqx.AbstractVar[ScalarLike]

    @abc.abstractmethod
    def linear(self, z: PyTree[Array]) -> PyTree[Array]:
        """The product $W z$.

        **Arguments:**

        - `z`: the state.

        **Returns:**

        The product.
        """

    @abc.abstractmethod
    def inject(self, x: Any) -> PyTree[Array]:
        """What the input adds.

        **Arguments:**

        - `x`: the input.

        **Returns:**

        $u(x)$, of the structure of the state.
        """

    @abc.abstractmethod
    def proximal(self, z: PyTree[Array], step_size: ScalarLike) -> PyTree[Array]:
        r"""The proximal operator $\operatorname{prox}_{\alpha\varphi}$.

        **Arguments:**

        - `z`: its argument.
        - `step_size`: $\alpha$; for 1 it is the activation.

        **Returns:**

        Its value.
        """

    @abc.abstractmethod
    def resolvent(
        self, z: PyTree[Array], step_size: Scalar
    ) -> Callable[[PyTree[Array]], PyTree[Array]]:
        r"""The inverse of $I + \alpha (I - W)$, prepared for many products with it.

        **Arguments:**

        - `z`: a state, for its structure, shapes and dtypes.
        - `step_size`: $\alpha$.

        **Returns:**

        A function that is a pytree.
        """

    def __call__(self, z: PyTree[Array], x: Any) -> PyTree[Array]:
        """The next state.

        **Arguments:**

        - `z`: the state.
        - `x`: the input.

        **Returns:**

        The next state.
        """
        return self.proximal(_add(self.linear(z), self.inject(x)), 1)


class _ForwardBackwardState(eqx.Module):
    progress: Progress
    num_steps: Unfrozen[Int[Array, ""]]
    step_size: Unfrozen[Scalar]
    injected: Unfrozen[PyTree[Array]]


class ForwardBackward(optx.AbstractFixedPointSolver):
    r"""Forward-backward splitting, for monotone cells: damping that always converges.

    $$z_{k+1} = \operatorname{prox}_{\alpha\varphi}
    (z_k + \alpha (W z_k + u(x) - z_k)).$$

    One evaluation a step. Converges for every input if the step size is below twice
    $\beta$, the cocoercivity of $I - W$. The more anisotropic that is, the slower: see
    [`implicitnets.PeacemanRachford`][].

    Stops when `norm(f(z) - z) <= atol + rtol * norm(f(z))`, and returns the iterate
    with the least residual of all that were evaluated. The statistics have `nfe`, the
    number of evaluations.

    For [`implicitnets.nn.AbstractMonotoneCell`][]s only. In an equilibrium layer it
    finds the cell; in a solve without one, `args` must be `(cell, x)`:

    ```python
    optx.fixed_point(lambda z, args: args[0](z, args[1]), solver, z0, (cell, x))
    ```

    Winston and Kolter, *Monotone Operator Equilibrium Networks*, 2020, algorithm 1.

    **Arguments:**

    - `rtol`: relative tolerance.
    - `atol`: absolute tolerance.
    - `norm`: the norm of the stopping rule.
    - `step_size`: $\alpha$; `None` for a lower bound of $\beta$, estimated once a
        solve: $1 / (\lVert S \rVert + \lVert K \rVert^2 / m)$ with the symmetric part
        $S$ and the skew part $K$ of $I - W$. It costs 64 products with $W$ or its
        transpose, once for a whole batch.
    """

    rtol: ScalarLike
    atol: ScalarLike
    norm: Callable[[PyTree[Array]], Scalar] = optx.two_norm
    step_size: ScalarLike | None = None

    def __check_init__(self):
        _check(self)

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        del fn, f_struct, aux_struct, tags
        check_options(self, options)
        cell, x = _cell_and_input(self, args)
        if self.step_size is None:
            symmetric, skew = _part_norms(cell, y)
            step_size = 1 / (symmetric + skew**2 / cell.margin)
        else:
            step_size = self.step_size
        return _ForwardBackwardState(
            progress=start_progress(y),
            num_steps=Unfrozen(jnp.array(0)),
            step_size=Unfrozen(jnp.asarray(step_size, working_dtype(y))),
            injected=Unfrozen(fast_convolutions(cell.inject)(x)),
        )

    def step(self, fn, y, args, options, state, tags):
        del options, tags
        cell, _ = _cell_and_input(self, args)
        k, step_size = state.num_steps.value, state.step_size.value
        linear = fast_convolutions(cell.linear)(y)
        # The value of `fn`, which is dropped, is this one's activation.
        inner = materialise(_add(linear, state.injected.value), k)
        f, (_, aux) = cell.proximal(inner, 1), fn(y, args)
        residual = jtu.tree_map(jnp.subtract, f, y)
        progress = state.progress.update(
            y, f, residual, rtol=self.rtol, atol=self.atol, norm=self.norm
        )
        new_y = cell.proximal(
            _combine(lambda z, v: z + step_size * (v - z), y, inner), step_size
        )
        new_state = _ForwardBackwardState(
            progress=progress,
            num_steps=Unfrozen(k + 1),
            step_size=state.step_size,
            injected=state.injected,
        )
        return new_y, new_state, aux

    def terminate(self, fn, y, args, options, state, tags):
        del fn, y, args, options, tags
        return state.progress.verdict()

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        del fn, y, args, options, tags, result
        return state.progress.best_y, aux, {"nfe": state.progress.num_evaluations}


class _PeacemanRachfordState(eqx.Module):
    progress: Progress
    num_steps: Unfrozen[Int[Array, ""]]
    step_size: Unfrozen[Scalar]
    injected: Unfrozen[PyTree[Array]]
    resolvent: Unfrozen[Callable]
    u: Unfrozen[PyTree[Array]]


class PeacemanRachford(optx.AbstractFixedPointSolver):
    r"""Peaceman-Rachford splitting, for monotone cells: few steps, for any step size.

    $$u_{k+1/2} = 2 z_k - u_k, \quad
    z_{k+1/2} = (I + \alpha (I - W))^{-1} (u_{k+1/2} + \alpha u(x)), \quad
    u_{k+1} = 2 z_{k+1/2} - u_{k+1/2}, \quad
    z_{k+1} = \operatorname{prox}_{\alpha\varphi}(u_{k+1}).$$

    One evaluation and one product with the inverse a step. That is prepared once a
    solve, for a whole batch: by inversion of a matrix for
    [`implicitnets.nn.MonotoneCell`][], of one matrix a frequency for a periodic
    [`implicitnets.nn.MonotoneConvCell`][]; without periodicity it is a linear solve.
    Converges for every input and every step size.

    Stops when `norm(f(z) - z) <= atol + rtol * norm(f(z))`, and returns the iterate
    with the least residual of all that were evaluated. The statistics have `nfe`, the
    number of evaluations.

    For [`implicitnets.nn.AbstractMonotoneCell`][]s only, found as by
    [`implicitnets.ForwardBackward`][].

    Winston and Kolter, *Monotone Operator Equilibrium Networks*, 2020, algorithm 2.

    **Arguments:**

    - `rtol`: relative tolerance.
    - `atol`: absolute tolerance.
    - `norm`: the norm of the stopping rule.
    - `step_size`: $\alpha$; `None` for the one with the best guaranteed rate, estimated
        once a solve: $1 / \sqrt{m \lVert S \rVert + \lVert K \rVert^2}$, with
        $S$ and $K$ and at the cost of [`implicitnets.ForwardBackward`][].
    """

    rtol: ScalarLike
    atol: ScalarLike
    norm: Callable[[PyTree[Array]], Scalar] = optx.two_norm
    step_size: ScalarLike | None = None

    def __check_init__(self):
        _check(self)

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        del fn, f_struct, aux_struct, tags
        check_options(self, options)
        cell, x = _cell_and_input(self, args)
        if self.step_size is None:
            symmetric, skew = _part_norms(cell, y)
            # With the cocoercivity `b` of `I - W` a step contracts at least by the
            # square root of `1 - 4 / (1 / (a m) + a / b + 2)`.
            step_size = 1 / jnp.sqrt(cell.margin * symmetric + skew**2)
        else:
            step_size = self.step_size
        step_size = jnp.asarray(step_size, working_dtype(y))
        return _PeacemanRachfordState(
            progress=start_progress(y),
            num_steps=Unfrozen(jnp.array(0)),
            step_size=Unfrozen(step_size),
            injected=Unfrozen(fast_convolutions(cell.inject)(x)),
            resolvent=Unfrozen(cell.resolvent(y, step_size)),
            u=Unfrozen(y),
        )

    def step(self, fn, y, args, options, state, tags):
        del options, tags
        cell, _ = _cell_and_input(self, args)
        k, step_size = state.num_steps.value, state.step_size.value
        f, aux = materialise(fn(y, args), k)
        residual = jtu.tree_map(jnp.subtract, f, y)
        progress = state.progress.update(
            y, f, residual, rtol=self.rtol, atol=self.atol, norm=self.norm
        )
        half_u = _combine(lambda z, u: 2 * z - u, y, state.u.value)
        half_z = state.resolvent.value(
            _combine(lambda u, b: u + step_size * b, half_u, state.injected.value)
        )
        u = _combine(lambda z, u: 2 * z - u, half_z, half_u)
        new_state = _PeacemanRachfordState(
            progress=progress,
            num_steps=Unfrozen(k + 1),
            step_size=state.step_size,
            injected=state.injected,
            resolvent=state.resolvent,
            u=Unfrozen(u),
        )
        return cell.proximal(u, step_size), new_state, aux

    def terminate(self, fn, y, args, options, state, tags):
        del fn, y, args, options, tags
        return state.progress.verdict()

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        del fn, y, args, options, tags, result
        return state.progress.best_y, aux, {"nfe": state.progress.num_evaluations}


def _check(solver):
    check_tolerances(solver)
    check_number(solver, "step_size", lambda x: x > 0, "positive")


def _cell_and_input(solver, args):
    if isinstance(args, tuple) and isinstance(args[0], AbstractMonotoneCell):
        return resolve(args[0]), args[1]
    raise TypeError(
        f"`{type(solver).__name__}` is for cells that are a "
        "`implicitnets.nn.AbstractMonotoneCell`, in an equilibrium layer, or in a "
        f"solve with `args=(cell, x)`; got {eqx.tree_pformat(args)} for `args`."
    )


def _part_norms(cell, y):
    """The two-norms of the symmetric and the skew part of `I - W`, from below."""
    dtype = working_dtype(y)
    y, unravel = ravel_pytree(y)
    linear = fast_convolutions(cell.linear)

    def product(v):
        image, _ = ravel_pytree(linear(unravel(v.astype(y.dtype))))
        return v - image.astype(dtype)

    start = starting_vector(y)
    transpose = jax.linear_transpose(product, start)

    def symmetric(v):
        return (product(v) + transpose(v)[0]) / 2

    def skew(v):
        return (product(v) - transpose(v)[0]) / 2

    def norm(product, normal_product):
        vector = leading_eigenvector(normal_product, start, _NUM_LANCZOS_STEPS)
        image = product(vector)
        return lax.stop_gradient(jnp.sqrt(tree_dot(image, image)))

    return norm(symmetric, symmetric), norm(skew, lambda v: -skew(skew(v)))


def _add(x, y):
    return jtu.tree_map(jnp.add, x, y)


def _combine(fn, *trees):
    """A linear combination in the working dtype, in the dtypes of the first pytree."""
    dtype = working_dtype(trees[0])
    out = jtu.tree_map(fn, *(tree_astype(tree, dtype) for tree in trees))
    return tree_cast_like(out, trees[0])
