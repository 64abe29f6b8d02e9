"""Convolutions at full speed inside a loop on CPU.

XLA on CPU brings a convolution into the channels-last form of its fast kernel in the
entry computation only. In the body of a `while_loop` or a `scan` any other form falls
to a naive loop nest, 20 to 45 times slower (https://github.com/jax-ml/jax/issues/12868).
That is where an implicit layer spends its time: in its solve, and with the transposed
convolution in its adjoint.

This file adds a second convolution primitive. It is `jax.lax.conv_general_dilated` in
everything but its lowering for CPU, which transposes operands and output to and from
the fast form. It must be a primitive for two reasons: the platform is not known before
lowering, and the transpose of a channels-last convolution has another form, which has
to be brought into this one again.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.extend.core as jec
import jax.extend.core.primitives as primitives
import jax.interpreters.ad as ad
import jax.interpreters.batching as batching
import jax.interpreters.mlir as mlir
import jax.lax as lax
import jax.tree_util as jtu
import jaxlib.version
import numpy as np


_Out = TypeVar("_Out")


def fast_convolutions(fn: Callable[..., _Out]) -> Callable[..., _Out]:
    """The same function, with convolutions that run at full speed in a loop on CPU."""

    # `fn` is traced, and its jaxpr evaluated with other convolutions, also within
    # `jax.jit`, `jax.checkpoint`, `lax.scan` and the like. The derivative rules of a
    # `jax.custom_jvp` or `jax.custom_vjp` in it keep theirs.
    def fast_fn(*args, **kwargs):
        dynamic, static = eqx.partition((args, kwargs), eqx.is_array)

        def dynamic_fn(dynamic):
            args, kwargs = eqx.combine(dynamic, static)
            return fn(*args, **kwargs)

        jaxpr, out_struct, out_static = eqx.filter_make_jaxpr(dynamic_fn)(dynamic)
        out = jec.jaxpr_as_fun(_replace(jaxpr))(*jtu.tree_leaves(dynamic))
        out = jtu.tree_unflatten(jtu.tree_structure(out_struct), out)
        return eqx.combine(out, out_static)

    return fast_fn


# The primitives that treat a jaxpr of theirs as JAX treats any. Others may look into
# it: a Pallas kernel has lowerings of its own.
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
    # A jaxpr without convolutions comes back as the very same object, so that what JAX
    # has cached for it is found.
    if isinstance(param, jec.Jaxpr):
        eqns = [_replace_in_equation(eqn) for eqn in param.eqns]
        return param if _same(eqns, param.eqns) else param.replace(eqns=eqns)
    if isinstance(param, jec.ClosedJaxpr):
        jaxpr = _replace(param.jaxpr)
        return param if jaxpr is param.jaxpr else param.replace(jaxpr=jaxpr)
    if isinstance(param, tuple):
        items = [_replace(item) for item in param]
        if _same(items, param):
            return param
        return type(param)(*items) if hasattr(param, "_fields") else tuple(items)
    return param


def _replace_in_equation(eqn: jec.JaxprEqn) -> jec.JaxprEqn:
    if eqn.primitive is primitives.conv_general_dilated_p:
        return eqn.replace(primitive=convolution_p)
    if eqn.primitive in _CALLS:
        params = {name: _replace(param) for name, param in eqn.params.items()}
        if not _same(params.values(), eqn.params.values()):
            return eqn.replace(params=params)
    return eqn


def _same(new: Iterable, old: Iterable) -> bool:
    return all(x is y for x, y in zip(new, old, strict=True))


# The rules of `lax`, with the convolutions in their results replaced as well.
convolution_p = jec.Primitive("convolution")
_lax_convolution = primitives.conv_general_dilated_p.bind


def _abstract_eval(lhs, rhs, **params):
    aval, _ = primitives.conv_general_dilated_p.abstract_eval(lhs, rhs, **params)
    return aval


def _transpose_lhs(ct, lhs, rhs, **params):
    return _transpose(lambda x: _lax_convolution(x, rhs, **params), lhs.aval, ct)


def _transpose_rhs(ct, lhs, rhs, **params):
    return _transpose(lambda x: _lax_convolution(lhs, x, **params), rhs.aval, ct)


def _transpose(linear_fn, aval, ct):
    (ct_in,) = fast_convolutions(jax.linear_transpose(linear_fn, aval))(ct)
    return ct_in


def _batch(axis_data, args, axes, **params):
    rule = batching.fancy_primitive_batchers[primitives.conv_general_dilated_p]
    return fast_convolutions(rule)(axis_data, args, axes, **params)


def _lower_for_cpu(lhs, rhs, *, dimension_numbers, **params):
    n, c, *lhs_space = dimension_numbers.lhs_spec
    o, i, *rhs_space = dimension_numbers.rhs_spec
    groups = params["feature_group_count"]
    group_size = rhs.shape[i] * rhs.shape[o] // groups
    # The fast kernel takes one group after the other, so the naive loop nest is faster
    # if they are small: 4 to 10 times in a depthwise convolution, 1 to 2 times with 4
    # features in and out, and a third as fast with 8. The fast kernel has no groups of
    # the batch.
    unsuited = params["batch_group_count"] > 1 or (groups > 1 and group_size < 32)
    # A sharding refers to the axes in their given order.
    if unsuited or params["out_sharding"] is not None:
        return _lax_convolution(lhs, rhs, dimension_numbers=dimension_numbers, **params)
    last = lhs.ndim - 1
    data_spec = (0, last, *range(1, last))
    kernel_spec = (last, last - 1, *range(last - 1))
    out = _convolve_on_all_cores(
        lax.transpose(lhs, (n, *lhs_space, c)),
        lax.transpose(rhs, (*rhs_space, i, o)),
        dimension_numbers=lax.ConvDimensionNumbers(data_spec, kernel_spec, data_spec),
        **params,
    )
    n, c, *out_space = dimension_numbers.out_spec
    return lax.transpose(out, np.argsort((n, *out_space, c)))


def _convolve_on_all_cores(lhs, rhs, *, padding, **params):
    # From jaxlib 0.10 on XLA has YNNPACK convolve images, which in 0.10 runs on one
    # core, but not where the output is higher than the input
    # (`IsConvolutionOpSupportedByYnn` in `xla/backends/cpu/ynn_support.cc`). If a few
    # more rows make it higher, they are computed and cut off: Eigen's kernel, which
    # runs on all cores, then takes the convolution.
    height = lhs.shape[1]
    window = 1 + (rhs.shape[0] - 1) * params["rhs_dilation"][0]
    (low, high), *other_padding = padding
    out_height = height + low + high - window + 1
    more_rows = height + 1 - out_height
    if (
        jaxlib.version.__version_info__[:2] != (0, 10)
        or lhs.ndim != 4
        or {*params["window_strides"], *params["lhs_dilation"]} != {1}
        or not 0 < more_rows <= out_height / 4
    ):
        return _lax_convolution(lhs, rhs, padding=padding, **params)
    padding = ((low, high + more_rows), *other_padding)
    out = _lax_convolution(lhs, rhs, padding=padding, **params)
    return lax.slice_in_dim(out, 0, out_height, axis=1)


convolution_p.def_impl(_lax_convolution)
convolution_p.def_abstract_eval(_abstract_eval)
ad.defbilinear(convolution_p, _transpose_lhs, _transpose_rhs)
batching.fancy_primitive_batchers[convolution_p] = _batch
mlir.register_lowering(
    convolution_p, mlir.lower_fun(_lax_convolution, multiple_results=False)
)
mlir.register_lowering(
    convolution_p,
    mlir.lower_fun(_lower_for_cpu, multiple_results=False),
    platform="cpu",
)
