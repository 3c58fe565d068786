"""Cross attention as a plain torch module, for decoders of the reference network."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from fathometer.errors import SpecError
from fathometer.spec import CrossAttention, memory_width


class ReferenceCrossAttention(nn.Module):
    """Softmax attention of one set of tokens to another, with separate query, key, value and output matrices."""

    def __init__(self, branch: CrossAttention, d_model: int) -> None:
        super().__init__()
        if d_model % branch.n_heads:
            raise SpecError(f"d_model must be a multiple of n_heads; got {d_model} and {branch.n_heads}")
        self.branch = branch
        self.d_head = d_model // branch.n_heads
        n_kv_heads = branch.n_kv_heads or branch.n_heads
        d_memory = memory_width(branch, d_model)
        self.grouped = n_kv_heads != branch.n_heads
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.key = nn.Linear(d_memory, n_kv_heads * self.d_head, bias=False)
        self.value = nn.Linear(d_memory, n_kv_heads * self.d_head, bias=bool(branch.value_bias))
        self.output = nn.Linear(d_model, d_model, bias=bool(branch.output_bias))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """Map ``(batch, n_tokens, d_model)``, given a memory ``(batch, n_memory, d_memory)``, to the same shape."""
        mixed = F.scaled_dot_product_attention(
            self._heads(self.query(x)),
            self._heads(self.key(memory)),
            self._heads(self.value(memory)),
            dropout_p=float(self.branch.attention_dropout) if self.training else 0.0,
            scale=float(self.branch.score_multiplier) / self.d_head**0.5,
            enable_gqa=self.grouped,
        )
        out: Tensor = self.output(mixed.transpose(-3, -2).flatten(-2))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.d_head).transpose(-3, -2)
