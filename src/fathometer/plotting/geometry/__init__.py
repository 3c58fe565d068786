"""Pictures of the results of :mod:`fathometer.papers.geometry`. Each takes a result and computes nothing."""

from fathometer.plotting.geometry.flow import draw_flows
from fathometer.plotting.geometry.maps import draw_maps
from fathometer.plotting.geometry.recovery import draw_recovery
from fathometer.plotting.geometry.trainability import draw_trainability

__all__ = ["draw_flows", "draw_maps", "draw_recovery", "draw_trainability"]
