from collections.abc import Callable
from typing import Any, ClassVar

import diffrax as dfx
import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree, Scalar

from .._internal.types import BoolScalarLike, RealScalarLike
from .._internal.unvmap import unvmap_any


def _scale(a: Scalar, x: PyTree[Array]) -> PyTree[Array]:
    return jtu.tree_map(lambda leaf: a.astype(leaf.dtype) * leaf, x)


def _combine(y: PyTree[Array], *terms: tuple[Scalar, PyTree[Array]]) -> PyTree[Array]:
    for a, x in terms:
        y = jtu.tree_map(jnp.add, y, _scale(a, x))
    return y


def _difference(x: PyTree[Array], y: PyTree[Array], h: Scalar) -> PyTree[Array]:
    return _scale(1 / h, jtu.tree_map(jnp.subtract, x, y))


class _AdamsState(eqx.Module):
    # The vector field at the start of the step, its divided difference over the step
    # before, and the length of that step; the latter two only once there was one.
    field: PyTree[Array]
    difference: PyTree[Array]
    previous_dt: Scalar
    has_previous: Bool[Array, ""]


class VCABM3(dfx.AbstractAdaptiveSolver):
    """The variable-coefficient Adams-Bashforth-Moulton method of order 3.

    A linear multistep predictor-corrector method (PECE) with two evaluations a step.
    The Adams-Bashforth formula of order 2 predicts, the Adams-Moulton formula of order
    3 corrects, and the difference to the Adams-Moulton formula of order 2 estimates the
    error. Its coefficients follow from the divided differences of the vector field over
    the last steps, whatever their lengths. The first step has no step before it, and is
    of order 2. Uses 3rd-order Hermite interpolation for dense/ts output. The method has
    the same name in `OrdinaryDiffEq.jl`.

    As for any explicit method, the region of stability bounds the step size. The step
    size times an eigenvalue of the Jacobian of the vector field must stay above -2.4 on
    the real axis, and closer to zero off it. For `dz/dt = f(z) - z` that is a step size
    of 1.35, 1.03 or 0.98 if the spectral radius of `f` is 0.5, 0.9 or 0.99. With a
    larger constant step size a solve blows up; a step-size controller finds the bound.
    (The explicit method of order 3, `VCAB3` in `OrdinaryDiffEq.jl`, evaluates once a
    step but needs steps of 0.36, 0.28 or 0.27.)

    **Arguments:** None.

    ??? cite "References"

        Section III.5 of

        ```bibtex
        @book{hairer2008solving-i,
          address={Berlin},
          author={Hairer, E. and N{\\o}rsett, S.P. and Wanner, G.},
          edition={Second Revised Edition},
          publisher={Springer},
          title={{S}olving {O}rdinary {D}ifferential {E}quations {I} {N}onstiff
                 {P}roblems},
          year={2008}
        }
        ```
    """

    term_structure: ClassVar = dfx.ODETerm
    interpolation_cls: ClassVar[
        Callable[..., dfx.ThirdOrderHermitePolynomialInterpolation]
    ] = dfx.ThirdOrderHermitePolynomialInterpolation

    def order(self, terms: PyTree) -> int:
        del terms
        return 3

    def func(
        self, terms: dfx.AbstractTerm, t0: RealScalarLike, y0: PyTree[Array], args: Any
    ) -> PyTree[Array]:
        return terms.vf(t0, y0, args)

    def init(
        self,
        terms: dfx.AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: PyTree[Array],
        args: Any,
    ) -> _AdamsState:
        return _AdamsState(
            field=self.func(terms, t0, y0, args),
            difference=jtu.tree_map(jnp.zeros_like, y0),
            previous_dt=jnp.asarray(terms.contr(t0, t1)),
            has_previous=jnp.array(False),
        )

    def step(
        self,
        terms: dfx.AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: PyTree[Array],
        args: Any,
        solver_state: _AdamsState,
        made_jump: BoolScalarLike,
    ) -> tuple[
        PyTree[Array], PyTree[Array], dict[str, PyTree[Array]], _AdamsState, dfx.RESULTS
    ]:
        f0 = solver_state.field
        old = solver_state.has_previous
        if made_jump is not False:
            f0 = lax.cond(
                unvmap_any(jnp.asarray(made_jump)),
                lambda: jtu.tree_map(
                    lambda new, kept: jnp.where(made_jump, new, kept),
                    self.func(terms, t0, y0, args),
                    f0,
                ),
                lambda: f0,
            )
            old = old & ~jnp.asarray(made_jump)
        d0 = jtu.tree_map(lambda d: jnp.where(old, d, 0), solver_state.difference)
        # Signed: negative when integrating backwards in time. Zero once an example has
        # come to its end before others of its batch: what it gives then is discarded,
        # but a division by it would leave NaN in the gradient.
        h = terms.contr(t0, t1)
        h = jnp.where(h == 0, jnp.ones_like(h), h)
        p = solver_state.previous_dt

        # The polynomial through the known values of the vector field is
        # f0 + d0 s + c s (s + p); the predictor leaves out the last term.
        y_predicted = _combine(y0, (h, f0), (h**2 / 2, d0))
        f_predicted = self.func(terms, t1, y_predicted, args)
        d1 = _difference(f_predicted, f0, h)
        c = jtu.tree_map(lambda new, kept: new - kept, d1, d0)
        # The integrals of s (s + p) and s (s - h), over h + p as `c` is not yet
        # divided by it. Without a previous step the polynomial is f0 + d1 s.
        corrector = jnp.where(old, h**2 * (h / 3 + p / 2) / (h + p), h**2 / 2)
        estimate = jnp.where(old, h**3 / 6 / (h + p), h**2 / 2)
        y1 = _combine(y_predicted, (corrector, c))
        y_error = _scale(estimate, c)

        f1 = self.func(terms, t1, y1, args)
        new_state = _AdamsState(
            field=f1,
            difference=_difference(f1, f0, h),
            previous_dt=h,
            has_previous=jnp.array(True),
        )
        dense_info = dict(y0=y0, y1=y1, k0=_scale(h, f0), k1=_scale(h, f1))
        return y1, y_error, dense_info, new_state, dfx.RESULTS.successful
