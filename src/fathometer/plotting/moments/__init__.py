"""Pictures of the results of :mod:`fathometer.papers.moments`. Each takes a result and computes nothing."""
