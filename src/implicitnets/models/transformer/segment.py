import equinox as eqx
from jaxtyping import Array, Float, Int


class Memory(eqx.Module):
    """What a segment sees of the segments before it.

    It has its full length from the start, so that a step is compiled once; positions
    that do not exist yet are masked.

    **Attributes:**

    - `z`: the equilibria at earlier positions.
    - `injection`: what was injected at these positions.
    - `num_positions`: how many of the last positions exist.
    """

    z: Float[Array, "memory width"]
    injection: Float[Array, "memory projections"]
    num_positions: Int[Array, ""]


class Segment(eqx.Module):
    """What the cell sees besides its state.

    **Attributes:**

    - `memory`: the memory of the segments before.
    - `injection`: what is injected into queries, keys and values at the positions of
        this segment.
    - `distance`: the embedding of how far back a key is, from the farthest to zero.
    """

    memory: Memory
    injection: Float[Array, "query projections"]
    distance: Float[Array, "key width"]
