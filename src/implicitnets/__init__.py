import importlib.metadata

from . import models as models, nn as nn
from ._adjoint.implicit import ImplicitAdjoint as ImplicitAdjoint
from ._adjoint.neumann import NeumannAdjoint as NeumannAdjoint
from ._adjoint.phantom import (
    JacobianFreeAdjoint as JacobianFreeAdjoint,
    PhantomAdjoint as PhantomAdjoint,
)
from ._adjoint.report import (
    AbstractReportingAdjoint as AbstractReportingAdjoint,
    AdjointReport as AdjointReport,
)
from ._adjoint.reversible import ReversibleAdjoint as ReversibleAdjoint
from ._adjoint.shine import ShineAdjoint as ShineAdjoint
from ._correction import (
    constant_weights as constant_weights,
    exponential_weights as exponential_weights,
    fixed_point_correction as fixed_point_correction,
    linear_weights as linear_weights,
    sample_states as sample_states,
)
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
from ._linear_solver.neumann import NeumannSeries as NeumannSeries
from ._multiscale import (
    MultiScaleCell as MultiScaleCell,
    MultiScaleDeepEquilibriumNetwork as MultiScaleDeepEquilibriumNetwork,
    MultiScaleNeuralODE as MultiScaleNeuralODE,
    SkipMultiScaleDeepEquilibriumNetwork as SkipMultiScaleDeepEquilibriumNetwork,
)
from ._neural_ode import NeuralODE as NeuralODE
from ._regularise import (
    growing_weight as growing_weight,
    jacobian_penalty as jacobian_penalty,
    skip_penalty as skip_penalty,
    sometimes as sometimes,
)
from ._solution import EquilibriumSolution as EquilibriumSolution
from ._solver.adams import VCABM3 as VCABM3
from ._solver.anderson import AndersonAcceleration as AndersonAcceleration
from ._solver.auto import AutoSolver as AutoSolver
from ._solver.broyden import Broyden as Broyden
from ._solver.chain import SolverChain as SolverChain
from ._solver.forward_backward import ForwardBackward as ForwardBackward
from ._solver.newton_krylov import NewtonKrylov as NewtonKrylov
from ._solver.peaceman_rachford import PeacemanRachford as PeacemanRachford
from ._solver.pseudo_transient import PseudoTransient as PseudoTransient
from ._solver.reversible import ReversibleFixedPoint as ReversibleFixedPoint
from ._solver.steady_state import SteadyState as SteadyState
from ._spectrum import (
    operator_norm as operator_norm,
    spectral_radius as spectral_radius,
)
from ._starts import (
    ManySolutions as ManySolutions,
    solve_from_starts as solve_from_starts,
)


__version__ = importlib.metadata.version("implicitnets")
