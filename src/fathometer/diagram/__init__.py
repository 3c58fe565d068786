"""Maps over two fields of a spec: predicted for whole grids at once, or measured on stacks of networks."""

from fathometer.diagram.grid import Axis, Diagram
from fathometer.diagram.observables import OBSERVABLES, Observable, Tokens
from fathometer.diagram.predicted import diagram

__all__ = ["OBSERVABLES", "Axis", "Diagram", "Observable", "Tokens", "diagram"]
