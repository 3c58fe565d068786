"""Small, honest verification runs."""

from fathometer.training.digits import Digits, load_digits
from fathometer.training.runs import Run, largest_stable_rate, train
from fathometer.training.stacked import StackedClassifier, StackedRun, train_together
from fathometer.training.vision import PatchClassifier

__all__ = [
    "Digits",
    "PatchClassifier",
    "Run",
    "StackedClassifier",
    "StackedRun",
    "largest_stable_rate",
    "load_digits",
    "train",
    "train_together",
]
