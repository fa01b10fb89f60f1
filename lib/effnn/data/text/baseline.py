"""The bag-of-words baseline: tf-idf and logistic regression. A task that this solves shows nothing about a transformer.

It gets the tuning that the models get: settings are chosen on `validation`, and `dev` is read once, with the winner.
"""

import logging
import warnings
from dataclasses import dataclass

from effnn.base import InvalidInput
from effnn.data.text.task import TextTask

log = logging.getLogger(__name__)
STRENGTHS = (1.0, 4.0, 16.0)  # inverse regularization C
NGRAMS = (1, 2)


@dataclass(frozen=True)
class BagOfWords:
    """Accuracy on `dev` of the settings (C, longest n-gram) that were best on `validation`, and that accuracy too."""

    accuracy: float
    validation_accuracy: float
    strength: float
    ngrams: int


def bag_of_words(task: TextTask) -> BagOfWords:
    """Fit the six settings on `train`, choose on `validation`, report on `dev`; seconds to a minute.

    Raises InvalidInput for a regression task.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    if task.regression:
        raise InvalidInput(f"{task.name} is a regression task; the bag-of-words baseline classifies")
    best: tuple[float, float, int, TfidfVectorizer, LogisticRegression] | None = None
    for ngrams in NGRAMS:
        # \w+ and not scikit-learn's \w\w+: one-letter words ("a", "x", "0") are tokens for the models too.
        words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, ngrams), min_df=2, token_pattern=r"\w+")
        try:
            x_train = words.fit_transform(task.train.joined())
        except ValueError as error:
            raise InvalidInput(f"{task.name}: no word occurs in two training rows, so there is no baseline") from error
        x_validation = words.transform(task.validation.joined())
        for strength in STRENGTHS:
            model = LogisticRegression(C=strength, max_iter=300)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # the last decimals do not matter to a baseline
                model.fit(x_train, task.train.label)
            score = float(model.score(x_validation, task.validation.label))
            log.info("bag of words: C %g, n-grams up to %d: %.4f on validation", strength, ngrams, score)
            if best is None or score > best[0]:
                best = score, strength, ngrams, words, model
    score, strength, ngrams, words, model = best
    return BagOfWords(float(model.score(words.transform(task.dev.joined()), task.dev.label)), score, strength, ngrams)
