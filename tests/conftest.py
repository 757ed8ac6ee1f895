"""One thread per process: tiny tensors gain nothing from more, and OpenMP spinning on a busy machine costs tenfold."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the processes that tests start
