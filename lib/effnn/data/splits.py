"""Which rows are held out: decided by hashes, so that every machine and every process draws the same split."""

import hashlib
from collections import Counter
from collections.abc import Mapping


def unit_hash(key: str) -> float:
    """A number in [0, 1) that depends on `key` alone: the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def split_files(sizes: Mapping[str, int], held_out: Mapping[str, float]) -> dict[str, str]:
    """The split of every file: a name in `held_out`, or "train".

    sizes: "package/path" -> size in any unit. held_out: split -> its share of each package's size.

    Neighbours in a file are alike, so a file is never cut. The files of a package are ordered by the hash of their
    name and fill the splits in the order of `held_out`; so each package has about the same share in every split.
    """
    totals, used = Counter(), Counter()
    for file, size in sizes.items():
        totals[_package(file)] += size
    place = {}
    for file in sorted(sizes, key=unit_hash):
        package, limit = _package(file), 0.0
        place[file] = "train"
        for split, share in held_out.items():
            limit += share
            if used[package] / totals[package] < limit:
                place[file] = split
                break
        used[package] += sizes[file]
    return place


def _package(file: str) -> str:
    return file.partition("/")[0]
