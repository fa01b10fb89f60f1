"""`python -m effnn.report claims` or `html`.

claims: writes claims.json, CLAIMS.md and BENCH.md in results/, and the verdicts in README.md.
html: builds results/report.html.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

from effnn.base import EffnnError
from effnn.report import html, tables

log = logging.getLogger("effnn.report")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the two commands; returns the exit status, 1 with one sentence on a known error."""
    parser = argparse.ArgumentParser(
        prog="python -m effnn.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("claims", "html"))
    what = parser.parse_args(arguments).what
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if what == "html":
            log.info("%s", html.build_report())
        else:
            log.info("%s", tables.tally(tables.write_claims()))
    except EffnnError as error:
        log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
