"""Language-model corpora, built in, from files and from the hub: see loading.py for the front door."""

from effnn.data.corpus.lambada import LambadaExample, lambada_examples
from effnn.data.corpus.loading import NAMES, Corpus, check_length, load

__all__ = ["NAMES", "Corpus", "LambadaExample", "check_length", "lambada_examples", "load"]
