import diffrax as dfx
import equinox as eqx
import jax.random as jr
import optimistix as optx
from jaxtyping import Array, Float, PRNGKeyArray

from ..._adjoint.implicit import ImplicitAdjoint
from ..._deq import AbstractDeepEquilibriumNetwork, DeepEquilibriumNetwork
from ..._internal.types import Solver
from ..._solver.broyden import Broyden
from .._config import check_config
from .._model import AbstractModel
from .cell import MDEQCell
from .config import MDEQConfig
from .heads import ClassifierHead, SegmenterHead
from .stem import Stem


# Eighteen steps are what the models are trained with on CIFAR-10.
_SOLVER = Broyden(rtol=1e-3, atol=1e-6)
_MAX_STEPS = 18


def _make_deq(
    config: MDEQConfig,
    solver: Solver | dfx.AbstractSolver,
    adjoint: optx.AbstractAdjoint,
    max_steps: int,
    *,
    key: PRNGKeyArray,
) -> DeepEquilibriumNetwork:
    cell = MDEQCell(config, key=key)
    return DeepEquilibriumNetwork(cell, solver, adjoint=adjoint, max_steps=max_steps)


class MDEQ(AbstractModel):
    """A multiscale equilibrium network that classifies images.

    Bai et al., *Multiscale Deep Equilibrium Models*, 2020.

    **Arguments:**

    - `config`: the sizes.
    - `solver`, `adjoint`, `max_steps`: as [`implicitnets.DeepEquilibriumNetwork`][].
    - `key`: for the weights. Keyword only argument.
    """

    stem: Stem
    deq: AbstractDeepEquilibriumNetwork
    head: ClassifierHead

    def __init__(
        self,
        config: MDEQConfig,
        solver: Solver | dfx.AbstractSolver = _SOLVER,
        *,
        adjoint: optx.AbstractAdjoint = ImplicitAdjoint(),
        max_steps: int = _MAX_STEPS,
        key: PRNGKeyArray,
    ):
        check_config(self, config, MDEQConfig)
        stem_key, cell_key, head_key = jr.split(key, 3)
        self.stem = Stem(config, key=stem_key)
        self.deq = _make_deq(config, solver, adjoint, max_steps, key=cell_key)
        self.head = ClassifierHead(config, key=head_key)

    def inject(
        self, x: Float[Array, "channel height width"], state: eqx.nn.State
    ) -> tuple[tuple[Array, ...], eqx.nn.State]:
        return self.stem(x, state)

    def read_out(
        self, z: tuple[Array, ...], state: eqx.nn.State
    ) -> tuple[Float[Array, " classes"], eqx.nn.State]:
        return self.head(z, state)


class MDEQSegmenter(AbstractModel):
    """A multiscale equilibrium network that classifies every pixel of an image.

    Its logits have the size of the finest scale. Bai et al., *Multiscale Deep
    Equilibrium Models*, 2020.

    **Arguments:**

    - `config`: the sizes; those of the classifier's head are not used.
    - `solver`, `adjoint`, `max_steps`: as [`implicitnets.DeepEquilibriumNetwork`][].
    - `key`: for the weights. Keyword only argument.
    """

    stem: Stem
    deq: AbstractDeepEquilibriumNetwork
    head: SegmenterHead

    def __init__(
        self,
        config: MDEQConfig,
        solver: Solver | dfx.AbstractSolver = _SOLVER,
        *,
        adjoint: optx.AbstractAdjoint = ImplicitAdjoint(),
        max_steps: int = _MAX_STEPS,
        key: PRNGKeyArray,
    ):
        check_config(self, config, MDEQConfig)
        stem_key, cell_key, head_key = jr.split(key, 3)
        self.stem = Stem(config, key=stem_key)
        self.deq = _make_deq(config, solver, adjoint, max_steps, key=cell_key)
        self.head = SegmenterHead(config, key=head_key)

    def inject(
        self, x: Float[Array, "channel height width"], state: eqx.nn.State
    ) -> tuple[tuple[Array, ...], eqx.nn.State]:
        return self.stem(x, state)

    def read_out(
        self, z: tuple[Array, ...], state: eqx.nn.State
    ) -> tuple[Float[Array, "classes height width"], eqx.nn.State]:
        return self.head(z, state)
