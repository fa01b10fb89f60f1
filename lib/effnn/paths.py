"""The only place that knows where folders are. Everything is relative to the repository that holds this package.

With a copy of the package outside a repository, set EFFNN_HOME to the folder that holds data/, notebooks/ and results/.
"""

import os
from pathlib import Path

HOME = Path(os.environ.get("EFFNN_HOME") or Path(__file__).resolve().parents[2])
LIB = HOME / "lib"
NOTEBOOKS = HOME / "notebooks"
PROFILES = NOTEBOOKS / "profiles"
DATA = HOME / "data"
PUBLISHED = DATA / "published"
CLAIMS = DATA / "claims.csv"
BENCH_BARS = DATA / "bench.csv"
PACKAGES = DATA / "packages.csv"
PACKAGES_LOCK = DATA / "packages.lock"
CACHE = Path(os.environ.get("EFFNN_CACHE") or DATA / "cache")
RESULTS = Path(os.environ.get("EFFNN_RESULTS") or HOME / "results")
TESTS = LIB / "tests"


def results_of(profile: str, notebook: str) -> Path:
    """Folder of one notebook's result files under one profile, e.g. results/laptop/01_post_training_pruning.

    That of the smoke profile is in the cache: tests run it, and committed results must not change.
    """
    return (CACHE if profile == "smoke" else RESULTS) / profile / notebook
