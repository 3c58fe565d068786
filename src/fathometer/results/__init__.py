"""Results as plain frozen data."""

from fathometer.results.profile import VOCABULARY, Profile

__all__ = ["VOCABULARY", "Profile"]
