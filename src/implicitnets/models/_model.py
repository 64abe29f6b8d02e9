import abc

import equinox as eqx
from jaxtyping import Array, PRNGKeyArray, PyTree

from .._deq import AbstractDeepEquilibriumNetwork
from .._solution import EquilibriumSolution


class AbstractModel(eqx.Module):
    """An equilibrium layer between a stem and a head.

    It sees one example; a batch is one `jax.vmap`. Batch normalisation stands in stem
    and head, never in the cell, and keeps its statistics in an `equinox.nn.State`, as
    everywhere in Equinox:

    ```python
    make = eqx.filter_jit(eqx.nn.make_with_state(ResNetDEQ))
    model, state = make(ResNetConfig(), key=key)
    batch_model = jax.vmap(
        model, in_axes=(0, None), out_axes=(0, None), axis_name="batch"
    )
    (logits, solution), state = batch_model(images, state)
    ```

    A model with dropout also takes `key=`, one key for each example. Use
    `equinox.nn.inference_mode` to evaluate, and `equinox.tree_at` to replace `deq` by
    another kind of layer.

    **Attributes:**

    - `deq`: the equilibrium layer.
    """

    deq: eqx.AbstractVar[AbstractDeepEquilibriumNetwork]

    @abc.abstractmethod
    def inject(self, x: Array, state: eqx.nn.State) -> tuple[PyTree, eqx.nn.State]:
        """What the cell sees of an example.

        **Arguments:**

        - `x`: one example.
        - `state`: the statistics of batch normalisation.

        **Returns:**

        The equilibrium layer's input, and the new state.
        """

    @abc.abstractmethod
    def read_out(
        self, z: PyTree[Array], state: eqx.nn.State
    ) -> tuple[Array, eqx.nn.State]:
        """The logits that belong to an equilibrium.

        **Arguments:**

        - `z`: the equilibrium.
        - `state`: the statistics of batch normalisation.

        **Returns:**

        The logits, and the new state.
        """

    def __call__(
        self, x: Array, state: eqx.nn.State, *, key: PRNGKeyArray | None = None
    ) -> tuple[tuple[Array, EquilibriumSolution], eqx.nn.State]:
        """The logits of one example, the solve behind them, and the new state.

        **Arguments:**

        - `x`: one example.
        - `state`: the statistics of batch normalisation.
        - `key`: for dropout in the cell.

        **Returns:**

        `((logits, solution), state)`.
        """
        injection, state = self.inject(x, state)
        solution = self.deq.solve(injection, key=key)
        logits, state = self.read_out(solution.z_star, state)
        return (logits, solution), state
