"""Pictures of the results of :mod:`fathometer.papers.failure_modes`. Each takes a result and computes nothing."""

from fathometer.plotting.failure_modes.cosines import draw_figure_1
from fathometer.plotting.failure_modes.placements import draw_figure_12
from fathometer.plotting.failure_modes.query_gradients import draw_figure_3
from fathometer.plotting.failure_modes.row_statistics import draw_figure_4
from fathometer.plotting.failure_modes.trainability import draw_diagram
from fathometer.plotting.failure_modes.training import draw_training_check

__all__ = ["draw_diagram", "draw_figure_1", "draw_figure_3", "draw_figure_4", "draw_figure_12", "draw_training_check"]
