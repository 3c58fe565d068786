"""Reports for people: a folder with a page and pictures, a summary in the terminal, and progress while measuring."""

from fathometer.report.page import render_page
from fathometer.report.progress import progress_reporter
from fathometer.report.save import OutputError, save_report
from fathometer.report.terminal import render_terminal

__all__ = ["OutputError", "progress_reporter", "render_page", "render_terminal", "save_report"]
