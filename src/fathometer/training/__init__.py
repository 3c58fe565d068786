"""Small, honest verification runs."""

from fathometer.training.coordinates import CoordinateCheck, coordinate_check
from fathometer.training.digits import Digits, load_digits
from fathometer.training.families import Family, Recipe, Task, digits_task, language_task, recipe
from fathometer.training.language import LanguageModel, LanguageRun, language_network, train_language_model
from fathometer.training.runs import Run, largest_stable_rate, train
from fathometer.training.stacked import StackedClassifier, StackedRun, train_together
from fathometer.training.text import ByteText, byte_text
from fathometer.training.transfer import TransferCheck, transfer_check
from fathometer.training.vision import PatchClassifier

__all__ = [
    "ByteText",
    "CoordinateCheck",
    "Digits",
    "Family",
    "LanguageModel",
    "LanguageRun",
    "PatchClassifier",
    "Recipe",
    "Run",
    "StackedClassifier",
    "StackedRun",
    "Task",
    "TransferCheck",
    "byte_text",
    "coordinate_check",
    "digits_task",
    "language_network",
    "language_task",
    "largest_stable_rate",
    "load_digits",
    "recipe",
    "train",
    "train_language_model",
    "train_together",
    "transfer_check",
]
