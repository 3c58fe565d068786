"""What is read off a trajectory."""

from fathometer.observables.jacobian import Gradients, backward, forward
from fathometer.observables.prediction import predict, profile_of

__all__ = ["Gradients", "backward", "forward", "predict", "profile_of"]
