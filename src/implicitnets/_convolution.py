"""Convolutions that run at full speed inside a loop on CPU.

XLA on CPU brings a convolution into the channels-last form of its fast kernel only in
the entry computation. In the body of a `while_loop` or a `scan` any other form falls to
a naive loop nest, 20 to 45 times slower: https://github.com/jax-ml/jax/issues/12868.
That is where an implicit layer spends its time, in the solve and, with the transposed
convolution, in the adjoint.

So here is a second convolution primitive. It is `jax.lax.conv_general_dilated` in all
but its lowering on CPU, which brings it into that form with explicit transposes of its
operands and its output. A primitive, and not another way to write the convolution,
because the platform is known only when lowering, and because the transpose of a
channels-last convolution is not channels-last: it must be brought into the form anew.
"""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import equinox as eqx
import jax
import jax.extend.core as jec
import jax.interpreters.ad as ad
import jax.interpreters.batching as batching
import jax.interpreters.mlir as mlir
import jax.lax as lax
import jax.tree_util as jtu
import numpy as np
from jax.extend.core import primitives


_Params = ParamSpec("_Params")
_Out = TypeVar("_Out")


def fast_convolutions(fn: Callable[_Params, _Out]) -> Callable[_Params, _Out]:
    """The same function, whose convolutions run at full speed in a loop on CPU.

    The function is traced, and evaluated with every convolution replaced, also those
    within `jax.jit`, `jax.checkpoint`, `lax.scan` and the like. Nothing else about the
    program changes, nothing at all if there is no convolution, and no lowered program
    for another platform. The convolutions within the derivative rules of
    `jax.custom_jvp` and `jax.custom_vjp` stay as they are.

    **Arguments:**

    - `fn`: a function of any pytrees, which may close over tracers.

    **Returns:**

    A function of the same arguments.
    """

    def fast_fn(*args: _Params.args, **kwargs: _Params.kwargs) -> _Out:
        dynamic, static = eqx.partition((args, kwargs), eqx.is_array)

        def dynamic_fn(dynamic):
            args, kwargs = eqx.combine(dynamic, static)
            return fn(*args, **kwargs)

        jaxpr, out_struct, out_static = eqx.filter_make_jaxpr(dynamic_fn)(dynamic)
        out = jec.jaxpr_as_fun(_replace(jaxpr))(*jtu.tree_leaves(dynamic))
        return eqx.combine(jtu.tree_unflatten(jtu.tree_structure(out_struct), out), out_static)

    return fast_fn


# These do nothing with their jaxprs but call them, differentiate them and so on. Others
# may read them, as a Pallas kernel does.
_CALLS = (
    primitives.cond_p,
    primitives.custom_jvp_call_p,
    primitives.custom_vjp_call_p,
    primitives.jit_p,
    primitives.linear_solve_p,
    primitives.remat_p,
    primitives.scan_p,
    primitives.while_p,
)


def _replace(param: Any) -> Any:
    """Replaces the convolutions in a jaxpr, or in the jaxprs of a tuple of them.

    The very same object comes back if there are none, so that whatever JAX has cached
    for a jaxpr without a convolution is used.
    """
    if isinstance(param, jec.Jaxpr):
        eqns = [_replace_in_equation(eqn) for eqn in param.eqns]
        return param if _same(eqns, param.eqns) else param.replace(eqns=eqns)
    if isinstance(param, jec.ClosedJaxpr):
        jaxpr = _replace(param.jaxpr)
        return param if jaxpr is param.jaxpr else param.replace(jaxpr=jaxpr)
    if isinstance(param, tuple):
        # Not `tuple(...)`, as it may be a named one.
        new = jtu.tree_map(_replace, param, is_leaf=lambda x: x is not param)
        return param if _same(new, param) else new
    return param


def _replace_in_equation(eqn: jec.JaxprEqn) -> jec.JaxprEqn:
    if eqn.primitive is primitives.conv_general_dilated_p:
        return eqn.replace(primitive=convolution_p)
    if eqn.primitive in _CALLS:
        params = {name: _replace(param) for name, param in eqn.params.items()}
        if not _same(params.values(), eqn.params.values()):
            return eqn.replace(params=params)
    return eqn


def _same(new, old) -> bool:
    return all(x is y for x, y in zip(new, old, strict=True))


# Every rule but the lowering on CPU is that of `lax`, its convolutions replaced in turn.
convolution_p = jec.Primitive("convolution")
_lax_convolution = primitives.conv_general_dilated_p.bind


def _abstract_eval(lhs, rhs, **params):
    aval, _ = primitives.conv_general_dilated_p.abstract_eval(lhs, rhs, **params)
    return aval


def _transpose_lhs(ct, lhs, rhs, **params):
    conv = lambda lhs: _lax_convolution(lhs, rhs, **params)
    (ct_lhs,) = fast_convolutions(jax.linear_transpose(conv, lhs.aval))(ct)
    return ct_lhs


def _transpose_rhs(ct, lhs, rhs, **params):
    conv = lambda rhs: _lax_convolution(lhs, rhs, **params)
    (ct_rhs,) = fast_convolutions(jax.linear_transpose(conv, rhs.aval))(ct)
    return ct_rhs


def _batch(args, axes, **params):
    conv = lambda lhs, rhs: _lax_convolution(lhs, rhs, **params)
    return fast_convolutions(jax.vmap(conv, in_axes=axes))(*args), 0


def _channels_last(lhs, rhs, *, dimension_numbers, **params):
    n, c, *lhs_space = dimension_numbers.lhs_spec
    o, i, *rhs_space = dimension_numbers.rhs_spec
    groups = params["feature_group_count"]
    # Against the naive loop nest the fast kernel wins by a factor of 3 at 8 features in
    # and out, of 40 at 32, and loses at 4, in particular if there are many groups. It
    # has no batch groups.
    features = rhs.shape[i] * rhs.shape[o] // groups
    if features < 32 or params["batch_group_count"] > 1:
        return _lax_convolution(
            lhs, rhs, dimension_numbers=dimension_numbers, **params
        )
    lhs = lax.transpose(lhs, (n, *lhs_space, c))
    rhs = lax.transpose(rhs, (*rhs_space, i, o))
    last = lhs.ndim - 1
    space = tuple(range(1, last))
    data_spec = (0, last, *space)
    kernel_spec = (last, last - 1, *range(last - 1))
    out = _lax_convolution(
        lhs,
        rhs,
        dimension_numbers=lax.ConvDimensionNumbers(data_spec, kernel_spec, data_spec),
        **params,
    )
    n, c, *out_space = dimension_numbers.out_spec
    return lax.transpose(out, np.argsort((n, *out_space, c)))


convolution_p.def_impl(_lax_convolution)
convolution_p.def_abstract_eval(_abstract_eval)
ad.defbilinear(convolution_p, _transpose_lhs, _transpose_rhs)
batching.primitive_batchers[convolution_p] = _batch
mlir.register_lowering(
    convolution_p, mlir.lower_fun(_lax_convolution, multiple_results=False)
)
mlir.register_lowering(
    convolution_p,
    mlir.lower_fun(_channels_last, multiple_results=False),
    platform="cpu",
)
