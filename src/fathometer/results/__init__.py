"""Results as plain frozen data."""

from fathometer.results.moments import COMPONENTS, ComponentMoments, ModelMoments
from fathometer.results.profile import VOCABULARY, Profile

__all__ = ["COMPONENTS", "VOCABULARY", "ComponentMoments", "ModelMoments", "Profile"]
