"""Averages over the softmax: closures for exchangeable tokens, mixings for full Gram matrices."""

from fathometer.attention.along_cosine import AlongCosine, along_cosine
from fathometer.attention.closure import (
    Annealed,
    AttentionStatistics,
    Closure,
    Uniform,
    UniformLargeN,
    ValuePath,
    exact_value_path,
)
from fathometer.attention.corrections import cosine_heterogeneity, few_head_average, tilted
from fathometer.attention.cross_rows import CrossRows
from fathometer.attention.exact import Exact
from fathometer.attention.exchangeable_rows import ExchangeableMixing, ExchangeablePath, ExchangeableRows
from fathometer.attention.joint_rows import (
    JointAverages,
    JointRows,
    JointScorePath,
    PairContraction,
    ScoreResponse,
)
from fathometer.attention.matched import Matched, matched, matched_to_memory
from fathometer.attention.mixing import (
    AnnealedMixing,
    FixedMixing,
    Mixing,
    UniformMixing,
    Visibility,
    WholeMemory,
    diagonal_part,
)
from fathometer.attention.named import CLOSURES, DEFAULT_CLOSURE, as_closure
from fathometer.attention.random_energy import (
    RandomEnergy,
    condensation,
    critical_beta,
    poisson_dirichlet_moment,
)
from fathometer.attention.row_quadrature import QuadratureRows
from fathometer.attention.sampled_rows import SampledRows
from fathometer.attention.score_path import ScorePath
from fathometer.attention.softmax_rows import PairAverages, RowAverages, pair_averages, row_averages

__all__ = [
    "CLOSURES",
    "DEFAULT_CLOSURE",
    "AlongCosine",
    "Annealed",
    "AnnealedMixing",
    "AttentionStatistics",
    "Closure",
    "CrossRows",
    "Exact",
    "ExchangeableMixing",
    "ExchangeablePath",
    "ExchangeableRows",
    "FixedMixing",
    "JointAverages",
    "JointRows",
    "JointScorePath",
    "Matched",
    "Mixing",
    "PairAverages",
    "PairContraction",
    "QuadratureRows",
    "RandomEnergy",
    "RowAverages",
    "SampledRows",
    "ScorePath",
    "ScoreResponse",
    "Uniform",
    "UniformLargeN",
    "UniformMixing",
    "ValuePath",
    "Visibility",
    "WholeMemory",
    "along_cosine",
    "as_closure",
    "condensation",
    "cosine_heterogeneity",
    "critical_beta",
    "diagonal_part",
    "exact_value_path",
    "few_head_average",
    "matched",
    "matched_to_memory",
    "pair_averages",
    "poisson_dirichlet_moment",
    "row_averages",
    "tilted",
]
