"""One thread per worker: two workers with two threads each on two cores wait for each other more than they compute."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the processes that tests start
