import importlib.metadata

from ._adjoint.implicit import ImplicitAdjoint as ImplicitAdjoint
from ._deq import (
    AbstractDeepEquilibriumNetwork as AbstractDeepEquilibriumNetwork,
    DeepEquilibriumNetwork as DeepEquilibriumNetwork,
    set_fixed_depth as set_fixed_depth,
    SkipDeepEquilibriumNetwork as SkipDeepEquilibriumNetwork,
)
from ._diagnose import (
    residual_trace as residual_trace,
    ResidualTrace as ResidualTrace,
)
from ._linear_solver.fixed_point import (
    FixedPointLinearSolver as FixedPointLinearSolver,
)
from ._linear_solver.gmres import GivensGMRES as GivensGMRES
from ._regularise import skip_penalty as skip_penalty
from ._solution import EquilibriumSolution as EquilibriumSolution
from ._solver.adams import VCABM3 as VCABM3
from ._solver.anderson import AndersonAcceleration as AndersonAcceleration
from ._solver.broyden import Broyden as Broyden
from ._solver.newton_krylov import NewtonKrylov as NewtonKrylov
from ._solver.pseudo_transient import PseudoTransient as PseudoTransient
from ._solver.steady_state import SteadyState as SteadyState


__version__ = importlib.metadata.version("implicitnets")
