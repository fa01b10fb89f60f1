"""`python -m effnn.data download` fetches what the paper profile needs into data/cache; this is `make data`.

Without more words it fetches the text tasks. `download corpus` fetches the language-model corpora and GPT-2's
tokenizer, `download c4 gpt2` these two alone.
"""

import argparse
import sys
from collections.abc import Sequence

from effnn import paths
from effnn.base import EffnnError
from effnn.data import text
from effnn.data.corpus import download as corpus_download

WHAT = ("text", "corpus", *corpus_download.DOWNLOADS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, 1 with one sentence on a known error."""
    parser = argparse.ArgumentParser(prog="python -m effnn.data", description=__doc__)
    parser.add_argument("command", choices=("download",))
    # argparse of Python 3.11 holds the empty list against `choices`, so these are checked below
    parser.add_argument("what", nargs="*", metavar="what", help=f"{', '.join(WHAT)} (default: text)")
    parser.add_argument(
        "--limit-tokens",
        type=int,
        default=corpus_download.LIMIT_TOKENS,
        metavar="N",
        help="about how many tokens of C4 and of OpenWebText to fetch (default: %(default)s, 5 GB of text each)",
    )
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.what if name not in WHAT]:
        parser.error(f"nothing is known as {', '.join(unknown)}: choose from {', '.join(WHAT)}")
    corpora = [name for name in corpus_download.DOWNLOADS if name in given.what or "corpus" in given.what]
    try:
        if "text" in given.what or not given.what:
            text.download()
        if corpora:
            corpus_download.download(corpora, given.limit_tokens)
    except EffnnError as error:
        print(f"no data: {error}", file=sys.stderr)
        return 1
    print(f"the data sets of the paper profile are in {paths.CACHE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
