"""`python -m effnn.data download` fetches what the paper profile needs into data/cache; this is `make data`."""

import argparse
import sys
from collections.abc import Sequence

from effnn import paths
from effnn.base import EffnnError
from effnn.data import text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, 1 with one sentence on a known error."""
    parser = argparse.ArgumentParser(prog="python -m effnn.data", description=__doc__)
    parser.add_argument("what", choices=("download",))
    parser.parse_args(arguments)
    try:
        text.download()
    except EffnnError as error:
        print(f"no data: {error}", file=sys.stderr)
        return 1
    print(f"the data sets of the paper profile are in {paths.CACHE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
