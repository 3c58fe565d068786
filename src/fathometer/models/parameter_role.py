"""The vocabulary of roles a parameter can have, and a model's parameters with theirs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fathometer.models.weights import ROLES, WeightSlice

#: Tables indexed by a number, and vectors of the stem: every row acts alone, so their effective fan-in is one.
TABLE_ROLES = ("token_embedding", "position_embedding", "segment_embedding", "class_token", "relative_position")
#: Matrices outside the blocks. Maps that are neither the first of the stem nor the last of the model are hidden ones.
END_ROLES = ("patch_embedding", "stem_hidden", "head_hidden", "head")
#: Parameters of norms and elementwise factors: ``norm_shape`` are the scalars of DyT and Derf.
NORM_ROLES = ("norm_gain", "norm_bias", "qk_norm_gain", "qk_norm_bias", "norm_shape", "layer_scale")
MATRIX_ROLES = (*ROLES, *END_ROLES)
BIAS_ROLES = tuple(f"{role}_bias" for role in MATRIX_ROLES)
#: Every role a parameter can have.
PARAMETER_ROLES = (*TABLE_ROLES, *MATRIX_ROLES, *BIAS_ROLES, *NORM_ROLES)


@dataclass(frozen=True, kw_only=True)
class ParameterRole:
    """What one parameter, or a slice of a fused one, is in its model.

    Attributes:
        parameter: Its name in ``model.named_parameters()``.
        role: One of :data:`PARAMETER_ROLES`.
        layer: Index of the block it lives in, counting all stacks in order of execution; ``None`` outside.
        part: The rows or columns of a fused parameter; ``None`` for all of it.
        fan_in: Terms in the sum that makes one output; one for biases, norms and tables that are looked up.
        fan_out: Number of outputs.
        tied: Whether a token embedding is the head's matrix too.
    """

    parameter: str
    role: str
    layer: int | None
    part: WeightSlice | None
    fan_in: int
    fan_out: int
    tied: bool = False

    @property
    def key(self) -> str:
        """The parameter and the slice, as in ``"h.0.attn.c_attn.weight[:, 0:768]"``."""
        if self.part is None:
            return self.parameter
        return f"{self.parameter}[{':, ' * self.part.axis}{self.part.start}:{self.part.stop}]"

    def of(self, tensor: Tensor) -> Tensor:
        """Return the view of a parameter, or of its gradient, that has this role."""
        return tensor if self.part is None else self.part.of(tensor)


@dataclass(frozen=True, kw_only=True)
class ModelRoles:
    """The roles in a model and the sizes that a change of width changes.

    Attributes:
        roles: One or more for every parameter, in the order of ``model.named_parameters()``.
        d_model: Width of the stream.
        n_heads, n_kv_heads: Heads of queries, and of keys and values; ``None`` where no block could be read.
        blocks: Full names of the blocks.
        exits: Full names of the modules whose outputs the branches add to the stream; empty where one is not known.
    """

    roles: tuple[ParameterRole, ...]
    d_model: int
    n_heads: int | None
    n_kv_heads: int | None
    blocks: tuple[str, ...]
    exits: tuple[str, ...]

    def of(self, role: str) -> tuple[ParameterRole, ...]:
        """Return the parameters with one role."""
        return tuple(row for row in self.roles if row.role == role)
