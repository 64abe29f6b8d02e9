import equinox as eqx
from jaxtyping import Array, Float, Int


class Memory(eqx.Module):
    """What a segment sees of those before it.

    As long from the start as it ever gets, so that a step is compiled once; what is not
    there yet is masked.

    **Attributes:**

    - `z`: equilibria at earlier positions.
    - `injection`: what was injected there.
    - `num_positions`: how many of the last positions are there.
    """

    z: Float[Array, "memory width"]
    injection: Float[Array, "memory projections"]
    num_positions: Int[Array, ""]


class Segment(eqx.Module):
    """What the cell sees besides its state.

    **Attributes:**

    - `memory`: of the segments before.
    - `injection`: at the positions of this one, into queries, keys and values.
    - `distance`: the embedding of how far back a key is, from the farthest to zero.
    """

    memory: Memory
    injection: Float[Array, "query projections"]
    distance: Float[Array, "key width"]
