"""A toy setting of notebook 03."""

import numpy as np
import pytest

from effnn import paths
from effnn.experiments.staged.runs import Setting


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Setting:
    """A toy setting on a text of its own, with a cache of its own."""
    home = tmp_path_factory.mktemp("savings")
    words = "the loss of a grown model is that of the small one until the next step ".split()
    generator = np.random.default_rng(0)
    (home / "text.txt").write_text("\n".join(" ".join(generator.choice(words, 12)) for _ in range(1500)))
    patch = pytest.MonkeyPatch()
    patch.setattr(paths, "CACHE", home / "cache")
    yield Setting(
        "text", str(home / "text.txt"), batch=4, context=16, head=8, warmup=3, rewarm=3, evaluated=16,
        evaluate_every=10, evaluated_in_training=16,
    )  # fmt: skip
    patch.undo()
