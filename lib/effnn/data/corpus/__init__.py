"""Language-model corpora, built in, from files and from the hub: see loading.py for the front door."""

from effnn.data.corpus.lambada import LambadaExample, lambada_examples
from effnn.data.corpus.loading import NAMES, Corpus, load

__all__ = ["NAMES", "Corpus", "LambadaExample", "lambada_examples", "load"]
