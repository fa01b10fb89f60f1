"""Token ids on the disk: whole or not there."""

from collections.abc import Iterator

import numpy as np
import pytest

from effnn.base import atomic_folder
from effnn.data.corpus import token_files


def test_a_run_that_was_cut_off_leaves_nothing_and_the_next_one_is_whole(tmp_path):
    def stream() -> Iterator[np.ndarray]:
        yield np.arange(5)
        raise KeyboardInterrupt

    target = tmp_path / "tokens" / "x"
    with pytest.raises(KeyboardInterrupt):
        token_files.write(target, {"train": stream()}, np.dtype("<u2"))
    assert list(target.parent.iterdir()) == []
    token_files.write(target, {"train": [np.arange(5), np.arange(2)], "test": []}, np.dtype("<u2"), "coder")
    found = token_files.read(target)
    assert found.tokens["train"].tolist() == [0, 1, 2, 3, 4, 0, 1] and found.tokens["test"].size == 0
    assert found.tokenizer == "coder"
    with pytest.raises(token_files.Damaged):
        token_files.read(tmp_path / "tokens" / "y")
    with pytest.raises(KeyboardInterrupt):  # what stood there before stays
        token_files.write(target, {"train": stream()}, np.dtype("<u2"))
    assert len(token_files.read(target).tokens["train"]) == 7


def test_a_folder_replaces_an_older_one(tmp_path):
    for i in range(2):
        with atomic_folder(tmp_path / "f") as temporary:
            (temporary / str(i)).write_text("x")
    assert [path.name for path in (tmp_path / "f").iterdir()] == ["1"]
