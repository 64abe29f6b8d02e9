"""Where arrays live: one device, or the batch split over all of them."""

from typing import TypeVar

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np
from jax.sharding import (
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)
from jaxtyping import PyTree

from .errors import OptionError


_Tree = TypeVar("_Tree", bound=PyTree)


class Placement:
    """Weights on every device, and a part of every batch on each.

    The program that runs is that of a single device: the compiler splits it, so that
    means over a batch, and batch normalisation, are over the whole of it.
    """

    def __init__(self, data_parallel: bool):
        if jax.process_count() > 1 and not data_parallel:
            raise OptionError("Several processes need --data-parallel.")
        devices = np.asarray(jax.devices() if data_parallel else jax.devices()[:1])
        self.num_devices = devices.size
        if self.num_devices == 1:
            # No mesh of one device: for a mesh, XLA on CPU (of jaxlib 0.10.2) rewrites
            # convolutions in loops into forms that are several times slower.
            self.whole = self.split = SingleDeviceSharding(devices[0])
        else:
            mesh = Mesh(devices, ("batch",), axis_types=(AxisType.Auto,))
            self.whole = NamedSharding(mesh, PartitionSpec())
            self.split = NamedSharding(mesh, PartitionSpec("batch"))

    def check(self, batch_size: int) -> None:
        """Raise an `OptionError` unless the devices can share a batch fairly."""
        if batch_size % self.num_devices:
            raise OptionError(
                f"A batch size must be a multiple of the {self.num_devices} devices; "
                f"got {batch_size}."
            )

    def put(self, tree: _Tree, sharding: Sharding) -> _Tree:
        """Put what every process has in full onto the devices."""

        def put_array(leaf):
            host = np.asarray(leaf)
            return jax.make_array_from_callback(
                host.shape, sharding, lambda index: host[index]
            )

        arrays, others = eqx.partition(tree, eqx.is_array)
        return eqx.combine(jtu.tree_map(put_array, arrays), others)
