"""Components one after another, and added to what they were given."""

from __future__ import annotations

from dataclasses import dataclass

from fathometer.observables.components.state import Component, GradientState, TokenState
from fathometer.spec.arrays import Scale, checked


@dataclass(frozen=True)
class Chain:
    """Components applied in order; moments in between are computed again on the way back."""

    components: tuple[Component, ...]

    def forward(self, x: TokenState) -> TokenState:
        """See :class:`~fathometer.observables.components.Component`."""
        for component in self.components:
            x = component.forward(x)
        return x

    def backward(self, g: GradientState, x: TokenState) -> GradientState:
        """See :class:`~fathometer.observables.components.Component`."""
        seen = [x]
        for component in self.components[:-1]:
            seen.append(component.forward(seen[-1]))
        for component, before in zip(reversed(self.components), reversed(seen), strict=True):
            g = component.backward(g, before)
        return g


@dataclass(frozen=True, kw_only=True)
class Residual:
    r"""``skip_scale * x + branch_scale * f(x)``, with an f that ends in fresh zero-mean weights.

    Then skip and branch are uncorrelated and moments add:

    .. math:: (q, p)' = \mu^2 (q, p) + \tau^2 (q, p)_f, \qquad (J, K)_{in} = \mu^2 (J, K) + \tau^2 (J, K)_f

    Args:
        branch: The f.
        skip_scale, branch_scale: The factors.
    """

    branch: Component
    skip_scale: Scale = 1.0
    branch_scale: Scale = 1.0

    def __post_init__(self) -> None:
        checked(self, "skip_scale")
        checked(self, "branch_scale")

    def forward(self, x: TokenState) -> TokenState:
        """See :class:`~fathometer.observables.components.Component`."""
        skip, weight, added = self.skip_scale**2, self.branch_scale**2, self.branch.forward(x)
        return TokenState(
            q=skip * x.q + weight * added.q, p=skip * x.p + weight * added.p, mean=self.skip_scale * x.mean
        )

    def backward(self, g: GradientState, x: TokenState) -> GradientState:
        """See :class:`~fathometer.observables.components.Component`."""
        skip, weight, through = self.skip_scale**2, self.branch_scale**2, self.branch.backward(g, x)
        return GradientState(J=skip * g.J + weight * through.J, K=skip * g.K + weight * through.K)
