"""Training compute in both conventions, and what growing saves of it at equal validation loss.

- "non-embedding": 6 N per token with N = 12 L d^2, as in Shen et al. 2022 and Kaplan et al. 2020. It leaves out the LM
  head, the part of attention that grows with the context, and LayerNorm.
- "full": 6 (N + V d) + 12 L T d per token, with the LM head (V: vocabulary) and attention over a context of T tokens.

Evaluation and growth count in neither. At paper sizes the two nearly agree, in a toy model with a large vocabulary they
differ widely: report both.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import GPT2Config

from effnn.base import InvalidInput
from effnn.staged.planning.curves import Curve

CONVENTIONS = ("non-embedding", "full")


@dataclass(frozen=True)
class Shape:
    """The sizes that FLOPs depend on: layers L, width d, vocabulary V, and the FFN's inner width (None: 4 d)."""

    layers: int
    width: int
    vocabulary: int
    inner: int | None = None

    def __post_init__(self) -> None:
        inner = 1 if self.inner is None else self.inner
        if min(self.layers, self.width, self.vocabulary, inner) < 1:
            raise InvalidInput(f"layers, width, vocabulary and inner width must be 1 or more; got {self}")

    @classmethod
    def of(cls, config: GPT2Config) -> "Shape":
        """Shape of a GPT-2 configuration."""
        return cls(config.n_layer, config.n_embd, config.vocab_size, config.n_inner)

    @property
    def non_embedding(self) -> int:
        """N: weights of the blocks' matrices, 12 L d^2 where the inner width is 4 d."""
        inner = 4 * self.width if self.inner is None else self.inner
        return self.layers * (4 * self.width**2 + 2 * self.width * inner)


def training_flops(shape: Shape, tokens: float, context: int, convention: str = "non-embedding") -> float:
    """FLOPs of a forward and a backward pass over `tokens` in sequences of `context`.

    Raises InvalidInput for an unknown convention, negative tokens, or a context below 1.
    """
    if convention not in CONVENTIONS:
        raise InvalidInput(f"unknown convention {convention!r}; choices: {', '.join(CONVENTIONS)}")
    if tokens < 0 or context < 1:
        raise InvalidInput(f"tokens must be 0 or more and the context 1 or more; got {tokens} and {context}")
    if convention == "non-embedding":
        return 6 * shape.non_embedding * tokens
    head = shape.vocabulary * shape.width
    return (6 * (shape.non_embedding + head) + 12 * shape.layers * context * shape.width) * tokens


def staged_flops(stages: Iterable[tuple[Shape, float]], context: int, convention: str = "non-embedding") -> float:
    """FLOPs of a staged run, the small model included. stages: (shape, tokens trained on at that shape)."""
    return sum(training_flops(shape, tokens, context, convention) for shape, tokens in stages)


def compute_saving(scratch: Curve, staged: Curve, loss: float | None = None) -> float:
    """Share of compute saved at equal validation loss: 1 - C_staged(L) / C_scratch(L); negative if growing costs more.

    Both curves are over accumulated FLOPs of the same convention; the staged one begins at the small model's first
    step. L is `loss`, or the lowest that both reach. Raises InvalidInput where a curve never has that loss.
    """
    if loss is None:
        loss = max(float(curve.losses.min()) for curve in (scratch, staged))
    return 1 - staged.x_at(loss) / scratch.x_at(loss)
