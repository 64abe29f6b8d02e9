from .._internal.parametrise import (
    AbstractParametrisation as AbstractParametrisation,
    resolve as resolve,
)
from .._solver.monotone import AbstractMonotoneCell as AbstractMonotoneCell
from ._dropout import VariationalDropout as VariationalDropout
from ._infinity_norm import (
    infinity_norm as infinity_norm,
    InfinityNorm as InfinityNorm,
    project as project,
)
from ._initialise import initialise as initialise
from ._monotone import (
    MonotoneCell as MonotoneCell,
    MonotoneConvCell as MonotoneConvCell,
)
from ._spectral_norm import (
    spectral_norm as spectral_norm,
    SpectralNorm as SpectralNorm,
)
from ._weight_norm import weight_norm as weight_norm, WeightNorm as WeightNorm
from ._well_posed import WellPosedCell as WellPosedCell
