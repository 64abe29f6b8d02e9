import jax
import jax.extend.core as jec
import jax.interpreters.batching as batching
import jax.interpreters.mlir as mlir
import jax.numpy as jnp
from jaxtyping import Array, Bool


def unvmap_any(x: Bool[Array, " *shape"]) -> Bool[Array, ""]:
    """Whether any element is true, of any example of the batches of all `jax.vmap`s.

    The answer is the same for all of them, so that a loop or a branch that depends on
    it stays one under `vmap`. As `equinox.internal.unvmap_any`, whose type forgets over
    which axes of a mesh `x` varies in `jax.shard_map` (Equinox 0.13.8).
    """
    return _unvmap_any_p.bind(x)


_unvmap_any_p = jec.Primitive("unvmap_any")


def _abstract_eval(x):
    struct = jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=x.sharding, manual_axis_type=x.manual_axis_type
    )
    (aval,) = jax.make_jaxpr(jnp.any)(struct).out_avals
    return aval


def _batch(args, axes):
    del axes
    return unvmap_any(*args), None


_unvmap_any_p.def_impl(jnp.any)
_unvmap_any_p.def_abstract_eval(_abstract_eval)
batching.primitive_batchers[_unvmap_any_p] = _batch
mlir.register_lowering(_unvmap_any_p, mlir.lower_fun(jnp.any, multiple_results=False))
