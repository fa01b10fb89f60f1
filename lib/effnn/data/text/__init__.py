"""Text classification and question answering, built in, from files and from the hub: loading.py is the front door."""

from effnn.data.text.baseline import BagOfWords
from effnn.data.text.encoding import EncodedSplit, calibration_loader, encode_split, loader
from effnn.data.text.loading import TASKS, bag_of_words, load, tokenizer_for
from effnn.data.text.squad import SquadExample, SquadTask, load_squad, squad_features
from effnn.data.text.task import Split, TextTask
from effnn.data.text.wordpiece import fingerprint, train_wordpiece

__all__ = [
    "TASKS",
    "BagOfWords",
    "EncodedSplit",
    "Split",
    "SquadExample",
    "SquadTask",
    "TextTask",
    "bag_of_words",
    "calibration_loader",
    "encode_split",
    "fingerprint",
    "load",
    "load_squad",
    "loader",
    "squad_features",
    "tokenizer_for",
    "train_wordpiece",
]
