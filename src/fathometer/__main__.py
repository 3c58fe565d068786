"""``python -m fathometer``."""

from fathometer.cli import main

main()
