"""Held-out files: whole, even among packages, and always the same."""

import pytest

from effnn.data import splits
from effnn.data.corpus import builtin


def test_files_of_every_package_are_held_out_whole():
    sizes = {f"{package}/m{i}.py": 10 + i % 7 for package in ("one", "two") for i in range(300)}
    place = splits.split_files(sizes, builtin.HELD_OUT)
    assert place == splits.split_files(dict(reversed(sizes.items())), builtin.HELD_OUT)
    for package in ("one", "two"):
        files = [file for file in sizes if file.startswith(package)]
        total = sum(sizes[file] for file in files)
        for split, share in (("train", 0.9), ("validation", 0.05), ("test", 0.05)):
            have = sum(sizes[file] for file in files if place[file] == split)
            assert have / total == pytest.approx(share, abs=0.02)
