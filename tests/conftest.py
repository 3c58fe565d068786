"""One thread: small tensors gain nothing from more, and idle threads waiting for a busy core cost tenfold."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
