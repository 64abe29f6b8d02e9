import importlib.metadata

from ._adjoint.implicit import ImplicitAdjoint as ImplicitAdjoint
from ._deq import (
    AbstractDeepEquilibriumNetwork as AbstractDeepEquilibriumNetwork,
    DeepEquilibriumNetwork as DeepEquilibriumNetwork,
    set_fixed_depth as set_fixed_depth,
    SkipDeepEquilibriumNetwork as SkipDeepEquilibriumNetwork,
)
from ._linear_solver.gmres import GivensGMRES as GivensGMRES
from ._regularise import skip_penalty as skip_penalty
from ._solution import EquilibriumSolution as EquilibriumSolution
from ._solver.anderson import AndersonAcceleration as AndersonAcceleration
from ._solver.steady_state import SteadyState as SteadyState


__version__ = importlib.metadata.version("implicitnets")
