"""What is read off a trajectory."""

from fathometer.observables.growth import Growth, growth
from fathometer.observables.jacobian import Gradients, backward, forward
from fathometer.observables.prediction import predict, profile_of

__all__ = ["Gradients", "Growth", "backward", "forward", "growth", "predict", "profile_of"]
