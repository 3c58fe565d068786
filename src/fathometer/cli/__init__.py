"""The command line."""

from fathometer.cli.app import main

__all__ = ["main"]
