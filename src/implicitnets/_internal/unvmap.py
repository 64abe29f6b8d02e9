import functools as ft

import jax.extend.core as jec
import jax.interpreters.batching as batching
import jax.interpreters.mlir as mlir
import jax.numpy as jnp
from jaxtyping import Array, Bool

from .manual import out_type


def unvmap_any(x: Bool[Array, " *shape"]) -> Bool[Array, ""]:
    """Whether any element is true, of any example of the batches of all `jax.vmap`s.

    The answer is the same for all of them, so that a loop or a branch that depends on
    it stays one under `vmap`. As `equinox.internal.unvmap_any`, whose type forgets over
    which axes of a mesh `x` varies in `jax.shard_map` (Equinox 0.13.8).
    """
    return _unvmap_any_p.bind(x)


_unvmap_any_p = jec.Primitive("unvmap_any")


def _batch(args, axes):
    del axes
    return unvmap_any(*args), None


_unvmap_any_p.def_impl(jnp.any)
_unvmap_any_p.def_abstract_eval(ft.partial(out_type, jnp.any))
batching.primitive_batchers[_unvmap_any_p] = _batch
mlir.register_lowering(_unvmap_any_p, mlir.lower_fun(jnp.any, multiple_results=False))
