"""Maps over two fields of a spec: predicted for whole grids at once, or measured on stacks of networks."""

from fathometer.diagrams.grid import Axis, Diagram
from fathometer.diagrams.measured import MEASURED, measured_diagram
from fathometer.diagrams.observables import OBSERVABLES, Observable, Tokens
from fathometer.diagrams.predicted import diagram

__all__ = ["MEASURED", "OBSERVABLES", "Axis", "Diagram", "Observable", "Tokens", "diagram", "measured_diagram"]
