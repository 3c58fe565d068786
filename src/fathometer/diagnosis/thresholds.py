"""Where healthy ends. One table; every verdict quotes the row it used."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Limits of the criteria, dimensionless.

    Args:
        sensitivity_high: Largest relative sensitivity ``J^{L,l} q_l / q_L``: how much a relative change of layer l's
            stream changes the output, relatively. Scale-free, so a small embedding does not count as an explosion.
            Pre-norm stays below 1.
        amplification_high: Largest plain ``J^{L,l}`` from the second block on.
        resolved_low: Smallest ``J - K``, the mean square of the gradient apart from what all tokens share. In an
            ordered stack it shrinks as the angle between tokens does, while the shared part can grow and hide it in J.
        angle_low: Smallest ``1 - cosine`` between tokens.
        angle_shrink: ... together with the factor by which it must have shrunk since the first block.
        entropy_low: Smallest mean attention entropy relative to uniform attention.
        growth_high: Largest growth of q over the second half of the depth; linear growth gives 2, exponential growth
            more.
        level_high: Largest q; beyond it half-precision numbers run out.
        share_low: Smallest share of one kind of branch in everything branches add.
        contribution_low: Smallest sum over layers of what branches add relative to the stream.
        dominance_high: Largest share of a branch in the stream it writes to, over most of the deeper half.
    """

    sensitivity_high: float = 100.0
    amplification_high: float = 1e4
    resolved_low: float = 0.1
    angle_low: float = 0.02
    angle_shrink: float = 0.1
    entropy_low: float = 0.4
    growth_high: float = 10.0
    level_high: float = 1e6
    share_low: float = 2e-3
    contribution_low: float = 0.1
    dominance_high: float = 0.9

    def with_margin(self) -> Thresholds:
        """Return stricter limits, for choosing a remedy that does not end just inside the border."""
        return Thresholds(
            sensitivity_high=self.sensitivity_high / 10,
            amplification_high=self.amplification_high / 10,
            resolved_low=min(self.resolved_low * 3, 0.5),
            angle_low=min(self.angle_low * 2, 0.5),
            angle_shrink=min(self.angle_shrink * 2, 0.5),
            entropy_low=(1 + self.entropy_low) / 2,
            growth_high=self.growth_high / 2,
            level_high=self.level_high / 10,
            share_low=self.share_low * 10,
            contribution_low=self.contribution_low * 2,
            dominance_high=self.dominance_high,
        )


DEFAULT_THRESHOLDS = Thresholds()
