"""A text task that a tiny classifier learns in seconds."""

import random

from effnn.data.text.task import Split, TextTask

TINY = {
    "layers": 1,
    "hidden": 32,
    "heads": 2,
    "ffn": 64,
    "vocab": 120,
    "max_length": 16,
    "epochs": 3,
    "learning_rate": 3e-3,
    "batch_size": 16,
}
FILL = "apple bench cloud door eagle field grass house iron jar".split()
SIGNS = ("rain storm flood".split(), "sun heat light".split())


def planted_task(rows: int = 400, labels: tuple[str, ...] = ("no", "yes"), pairs: bool = False) -> TextTask:
    """The label is whether the text speaks of the sun or of rain."""
    draw = random.Random(1)

    def split(count: int) -> Split:
        label = [draw.randrange(2) for _ in range(count)]
        texts = [" ".join(draw.sample(FILL, 2) + draw.sample(SIGNS[one], 2)) for one in label]
        second = [" ".join(draw.sample(FILL, 3)) for _ in label] if pairs else None
        return Split(texts, label if labels else [4.0 * one + draw.random() for one in label], second)

    return TextTask("planted", labels, split(rows), split(40), split(60), "here")
