import functools as ft
import re

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import jaxlib.version
import numpy as np
import pytest
from jaxtyping import Array

from implicitnets._internal.convolution import fast_convolutions


class _LaxConv(eqx.Module):
    """The convolutions that no layer of Equinox is made of."""

    weight: Array
    kwargs: dict = eqx.field(static=True)

    def __init__(self, weight_shape, key, **kwargs):
        self.weight = jr.normal(key, weight_shape)
        self.kwargs = dict(window_strides=(1, 1), padding="SAME") | kwargs

    def __call__(self, x):
        return lax.conv_general_dilated(x, self.weight, **self.kwargs)


_Conv1d = ft.partial(ft.partial, eqx.nn.Conv1d)
_Conv2d = ft.partial(ft.partial, eqx.nn.Conv2d)
_Conv3d = ft.partial(ft.partial, eqx.nn.Conv3d)
_Transpose1d = ft.partial(ft.partial, eqx.nn.ConvTranspose1d)
_Transpose2d = ft.partial(ft.partial, eqx.nn.ConvTranspose2d)
_Lax = ft.partial(ft.partial, _LaxConv)

# A layer that lacks but its key, and the shape of its input.
_LAYERS = {
    "1d": (_Conv1d(3, 2, 3, stride=2, padding=1), (3, 9)),
    "1d_circular": (
        _Conv1d(2, 3, 3, padding="SAME", dilation=2, padding_mode="CIRCULAR"),
        (2, 9),
    ),
    "2d_same": (_Conv2d(4, 6, (3, 2), padding="SAME"), (4, 6, 5)),
    "2d_pairs": (
        _Conv2d(3, 4, 3, padding=((1, 2), (0, 1)), stride=(2, 3)),
        (3, 7, 6),
    ),
    "2d_uneven": (
        _Conv2d(3, 2, (3, 2), padding=((4, 0), (0, 1)), dilation=(2, 1)),
        (3, 9, 5),
    ),
    "2d_pointwise": (_Conv2d(2, 3, 1), (2, 5, 4)),
    "2d_valid": (_Conv2d(2, 3, 3, padding="VALID", dilation=2, stride=2), (2, 8, 7)),
    "2d_reflect": (_Conv2d(2, 2, 3, padding=2, padding_mode="REFLECT"), (2, 6, 5)),
    "2d_replicate": (_Conv2d(2, 2, 3, padding=1, padding_mode="REPLICATE"), (2, 6, 5)),
    "2d_groups": (_Conv2d(12, 12, 3, padding=1, groups=2), (12, 4, 5)),
    "2d_depthwise": (_Conv2d(4, 8, 3, padding=1, stride=2, groups=4), (4, 6, 5)),
    "3d": (_Conv3d(2, 3, 3, padding=1, stride=(1, 2, 1)), (2, 4, 5, 4)),
    "transpose1d": (
        _Transpose1d(3, 2, 3, stride=2, padding=1, output_padding=1),
        (3, 6),
    ),
    "transpose2d_circular": (
        _Transpose2d(2, 3, 3, padding="SAME", padding_mode="CIRCULAR"),
        (2, 5, 4),
    ),
    "transpose2d_groups": (
        _Transpose2d(4, 6, 3, stride=(2, 3), padding="SAME", dilation=2, groups=2),
        (4, 4, 5),
    ),
    "lax_channels_last": (
        _Lax((3, 3, 3, 4), dimension_numbers=("NHWC", "HWIO", "NHWC")),
        (2, 5, 6, 3),
    ),
    "lax_scrambled": (
        _Lax((4, 2, 3, 3), dimension_numbers=("HNCW", "OHWI", "WCNH")),
        (6, 2, 3, 5),
    ),
    "lax_cropped": (
        _Lax(
            (2, 3, 2, 3),
            padding=((-1, 2), (3, -2)),
            lhs_dilation=(1, 2),
            rhs_dilation=(2, 1),
        ),
        (2, 3, 6, 5),
    ),
    "lax_batch_groups": (_Lax((4, 3, 3, 3), batch_group_count=2), (4, 3, 5, 5)),
}


def _normal(structs):
    # By NumPy, as JAX compiles for each shape.
    rng = np.random.default_rng(0)
    return jtu.tree_map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), structs
    )


def _problem(name):
    """A convolution as a function of weight and input, and two arguments."""
    make_layer, shape = _LAYERS[name]
    x = jax.ShapeDtypeStruct(shape, jnp.result_type(float))
    layer = eqx.filter_eval_shape(make_layer, key=jr.key(0))
    layer, point, direction = _normal((layer, (layer.weight, x), (layer.weight, x)))

    def conv(weight, x):
        return eqx.tree_at(lambda layer: layer.weight, layer, weight)(x)

    return conv, point, direction


def _stack(*trees):
    return jtu.tree_map(lambda *leaves: jnp.stack(leaves), *trees)


def _assert_close(out, expected):
    assert jtu.tree_structure(out) == jtu.tree_structure(expected)
    for x, y in zip(jtu.tree_leaves(out), jtu.tree_leaves(expected)):
        assert x.dtype == y.dtype
        x, y = np.asarray(x), np.asarray(y)
        tol = 64 * np.finfo(y.dtype).eps * (1 + np.max(np.abs(y)))
        np.testing.assert_allclose(x, y, rtol=0, atol=tol)


def _assert_same_in_loop(fn, conv, *args):
    """In the body of a loop XLA leaves a convolution as it finds it."""
    fast_fn = ft.partial(fn, fast_convolutions(conv))
    out = jax.jit(ft.partial(lax.map, lambda args: fast_fn(*args)))(_stack(args, args))
    expected = jax.jit(ft.partial(fn, conv))(*args)
    _assert_close(out, _stack(expected, expected))


def _loss(conv, weight, x):
    return jnp.sum(jnp.tanh(conv(weight, x)))


@pytest.mark.parametrize("name", _LAYERS)
def test_same_derivatives(name):
    def derivatives(conv, point, direction):
        grad = jax.grad(ft.partial(_loss, conv), argnums=(0, 1))
        return jax.jvp(conv, point, direction), jax.jvp(grad, point, direction)

    _assert_same_in_loop(derivatives, *_problem(name))


@pytest.mark.skipif(
    jaxlib.version.__version_info__[:2] != (0, 10),
    reason="Only jaxlib 0.10 convolves images on one core.",
)
@pytest.mark.one_precision
@pytest.mark.parametrize(
    "name, height", [("2d_same", 7), ("2d_uneven", 10), ("2d_valid", 2)]
)
def test_more_rows_for_all_cores(name, height):
    conv, point, _ = _problem(name)
    text = jax.jit(fast_convolutions(conv)).lower(*point).as_text()
    (found,) = re.findall(r"stablehlo.convolution.*-> tensor<1x(\d+)x", text)
    assert int(found) == height


@pytest.mark.parametrize("name", ["2d_same", "2d_groups", "lax_scrambled"])
def test_same_batches(name):
    def batches(conv, weights, xs):
        grad = jax.grad(ft.partial(_loss, conv), argnums=(0, 1))
        last = jax.vmap(conv, in_axes=(None, -1), out_axes=-1)
        losses = jax.vmap(ft.partial(_loss, conv), in_axes=(None, 0))
        return (
            jax.vmap(grad)(weights, xs),
            jax.vmap(grad, in_axes=(None, 0))(weights[0], xs),
            jax.vmap(grad, in_axes=(0, None))(weights, xs[0]),
            last(weights[0], jnp.moveaxis(xs, 0, -1)),
            jax.grad(lambda weight: jnp.sum(losses(weight, xs)))(weights[0]),
        )

    conv, point, direction = _problem(name)
    _assert_same_in_loop(batches, conv, *_stack(point, direction))


def _conv(x):
    kernel = jnp.linspace(-1.0, 1.0, 8 * 8 * 9, dtype=x.dtype).reshape(8, 8, 3, 3)
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME")


@jax.custom_jvp
def _custom_jvp(x):
    return _conv(x)


_custom_jvp.defjvp(lambda x, t_x: (_conv(*x), 2 * _conv(*t_x)))


@jax.custom_vjp
def _custom_vjp(x):
    return _conv(x)


_custom_vjp.defvjp(lambda x: (_conv(x), None), lambda _, ct: (3 * _conv(ct),))


def _linear_solve(x):
    def solve(_, x):
        return _conv(x)

    return lax.custom_linear_solve(_conv, x, solve, transpose_solve=solve)


_NESTED = {
    "jit": jax.jit(_conv),
    "checkpoint": jax.checkpoint(lambda x: _conv(jnp.sin(x))),
    "scan": lambda x: lax.scan(lambda x, _: (_conv(x), None), x, length=2)[0],
    "while": lambda x: lax.while_loop(lambda x: _conv(x).max() < 1e3, _conv, x),
    "cond": lambda x: lax.cond(x.sum() < 1e9, _conv, jnp.sin, x),
    "custom_jvp": _custom_jvp,
    "custom_vjp": _custom_vjp,
    "linear_solve": _linear_solve,
    "twice": jax.jit(jax.checkpoint(jax.jit(_conv))),
}


@pytest.mark.parametrize("name", _NESTED)
def test_nested(name):
    fn = _NESTED[name]
    fast_fn = fast_convolutions(fn)
    x, ct = _normal((jax.ShapeDtypeStruct((1, 8, 4, 3), jnp.result_type(float)),) * 2)
    assert "conv_general_dilated" in str(jax.make_jaxpr(fn)(x))
    assert "conv_general_dilated" not in str(jax.make_jaxpr(fast_fn)(x))
    derivative = jax.jvp if name == "while" else _vjp
    out = jax.jit(ft.partial(derivative, fast_fn))((x,), (ct,))
    expected = jax.jit(ft.partial(derivative, fn))((x,), (ct,))
    _assert_close(out, expected)


def _vjp(fn, primals, cts):
    out, vjp_fn = jax.vjp(fn, *primals)
    return out, *vjp_fn(*cts)


def _iterate(conv, weight, x):
    """A loop with a convolution and its transpose in either operand, of a batch."""

    def loss(weight, x):
        return jnp.sum(jax.vmap(ft.partial(_loss, conv, weight))(x))

    def step(_, carry):
        return jax.grad(loss, argnums=(0, 1))(*carry)

    return lax.fori_loop(0, 2, step, (weight, x))


def _batched_problem(name):
    conv, (weight, x), (_, other_x) = _problem(name)
    return conv, weight, jnp.stack([x, other_x])


def test_channels_last_on_cpu():
    conv, *args = _batched_problem("2d_same")

    def convolutions(conv):
        export = jax.export.export(
            jax.jit(ft.partial(_iterate, conv)), platforms=["cpu"]
        )
        pattern = r"stablehlo\.convolution.*?dim_numbers = (.*?), window"
        return re.findall(pattern, export(*args).mlir_module())

    assert len(convolutions(conv)) == 3
    assert convolutions(fast_convolutions(conv)) == 3 * [
        "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"
    ]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="is about XLA on CPU")
def test_channels_last_after_compilation():
    conv, *args = _batched_problem("2d_same")
    step = jax.jit(ft.partial(_iterate, fast_convolutions(conv)))
    compiled = step.lower(*args).compile()
    # XLA could fold the transposes into the convolution.
    text = str(compiled.as_text())
    labels = re.findall(r" convolution\(.*dim_labels=([^,\s]+)", text)
    assert set(labels) == {"b01f_01io->b01f"}


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_same_on_other_platforms(platform):
    conv, *args = _batched_problem("2d_groups")

    def operations(conv, platforms):
        export = jax.export.export(
            jax.jit(ft.partial(_iterate, conv)), platforms=platforms
        )
        module = export(*args).mlir_module()
        return re.findall(r"= (stablehlo\..*?)(?: loc\(|$)", module, re.MULTILINE)

    fast_conv = fast_convolutions(conv)
    assert operations(fast_conv, [platform]) == operations(conv, [platform])
    assert operations(fast_conv, [platform, "cpu"]) != operations(conv, [platform])


def test_without_convolutions():
    def fn(key, x):
        noise = jr.normal(key, x.shape, x.dtype)
        return lax.fori_loop(0, 3, lambda i, x: jax.nn.gelu(x + noise), x)

    args = (jr.key(0), jnp.arange(3.0))
    expected = jax.make_jaxpr(fn)(*args)
    assert str(jax.make_jaxpr(fast_convolutions(fn))(*args)) == str(expected)


def test_any_pytrees(getkey):
    layer = eqx.nn.Conv2d(2, 2, 3, padding=1, key=getkey())

    def fn(layer, x, *, options):
        y = layer(x) if options["apply"] else x
        return dict(y=y, options=options), jax.nn.relu

    options = dict(apply=True, scale=2.0, names=("a", None), array=np.arange(3))
    x = jnp.ones((2, 3, 3))
    out, static = fast_convolutions(fn)(layer, x, options=options)
    assert static is jax.nn.relu
    assert eqx.tree_equal(out["options"], options)
    assert eqx.tree_equal(out["y"], layer(x), rtol=1e-5, atol=1e-5)


def test_gradient_of_closure(getkey):
    layer = eqx.nn.Conv2d(2, 2, 3, padding=1, key=getkey())
    x = jnp.linspace(0.0, 1.0, 32).reshape(2, 4, 4)

    def loss(layer, transform):
        step = transform(lambda z: jnp.tanh(layer(z)))
        return jnp.sum(lax.scan(lambda z, _: (step(z), None), x, length=3)[0])

    grad = eqx.filter_jit(eqx.filter_grad(loss))
    expected = grad(layer, lambda fn: fn)
    assert eqx.tree_equal(grad(layer, fast_convolutions), expected, rtol=1e-5)


def test_batch_norm(getkey):
    layer = eqx.nn.Conv2d(2, 2, 3, padding=1, key=getkey())
    norm = eqx.nn.BatchNorm(2, axis_name="batch", mode="batch")
    x = _normal(jax.ShapeDtypeStruct((3, 2, 4, 4), jnp.result_type(float)))

    def run(transform):
        cell = transform(lambda x, state: norm(layer(x), state))
        axes = (0, None)
        batched = jax.vmap(cell, in_axes=axes, out_axes=axes, axis_name="batch")
        return eqx.filter_jit(batched)(x, eqx.nn.State(norm))

    out, expected = run(fast_convolutions), run(lambda fn: fn)
    assert eqx.tree_equal(out, expected, rtol=1e-5, atol=1e-5)


def test_debug_callback():
    seen = []

    def fn(x):
        jax.debug.callback(lambda x: seen.append(x.shape), x)
        return _conv(x)

    fast_fn = fast_convolutions(fn)
    x = jnp.ones((1, 8, 4, 4))
    jax.jit(lambda x: lax.fori_loop(0, 3, lambda _, x: fast_fn(x), x))(x)
    jax.effects_barrier()
    assert seen == 3 * [x.shape]


def test_half_precision():
    def fn(weight, x):
        return lax.conv_general_dilated(
            *(x, weight, (1, 1), "SAME"),
            precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )

    struct = jax.ShapeDtypeStruct((8, 8, 3, 3), jnp.bfloat16)
    primals = _normal((struct, struct))
    ct = _normal(jax.ShapeDtypeStruct(struct.shape, jnp.float32))
    out = jax.jit(ft.partial(_vjp, fast_convolutions(fn)))(primals, (ct,))
    expected = jax.jit(ft.partial(_vjp, fn))(primals, (ct,))
    assert [x.dtype for x in out] == [jnp.float32, jnp.bfloat16, jnp.bfloat16]
    for x, y in zip(out, expected):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        np.testing.assert_allclose(x, y, rtol=1e-2, atol=1e-2)
    jaxpr = str(jax.make_jaxpr(fast_convolutions(fn))(*primals))
    assert "HIGHEST" in jaxpr and "preferred_element_type=float32" in jaxpr
