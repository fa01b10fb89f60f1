"""A small text task, and a package of docstrings that have nothing in common but what was pasted."""

import random
from pathlib import Path

from effnn.data.text import builtin
from effnn.data.text.task import Split, TextTask


def toy_task(rows: int = 40, pairs: bool = False, labels: tuple[str, ...] = ("no", "yes")) -> TextTask:
    def split(start: int, count: int) -> Split:
        words = [
            f"{'good' if i % 2 else 'bad'} thing number{i} " + "very " * (i % 7) for i in range(start, start + count)
        ]
        label = (
            [i % 2 for i in range(start, start + count)]
            if labels
            else [float(i % 6) for i in range(start, start + count)]
        )
        return Split(words, label, [f"second {i}" for i in range(count)] if pairs else None)

    return TextTask("toy", labels, split(0, rows), split(1000, 10), split(2000, 12), "here")


def _words(draw: random.Random, count: int = 24) -> list[str]:
    return ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(4, 9))) for _ in range(count)]


def varied_package(folder: Path, name: str, files: int) -> Path:
    """Files of texts that have nothing in common, and in each a pasted sentence, a text pasted with one word changed,
    and one pasted with other punctuation and case."""
    draw, pasted = random.Random(name), random.Random(f"pasted {name}")
    sentence, text_of_20, other = _words(pasted, 14), _words(pasted, builtin.MIN_WORDS), _words(pasted)
    for i in range(files):
        changed = [*text_of_20]
        changed[10] = _words(draw, 1)[0]
        shouted = [word.upper() if draw.random() < 0.5 else f"({word})," for word in other]
        bodies = [*(_words(draw) for _ in range(5)), _words(draw, 9) + sentence + _words(draw, 9), changed, shouted]
        file = folder / name / f"module{i}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        functions = (f'def f{j}():\n    """{" ".join(body)}."""\n' for j, body in enumerate(bodies))
        file.write_text("\n\n".join(functions), encoding="utf-8")
    return folder / name
