"""A pruned encoder for loaders that know nothing of this project: a zero-filled dense checkpoint of the stock class.

It gives the right outputs with plain transformers, and no speed-up; for speed load the pruned model itself.
"""

from pathlib import Path
from typing import Protocol

from transformers import PreTrainedModel

from effnn.base import InvalidInput
from effnn.ltp.pruning.masks import Masks
from effnn.ltp.pruning.shrinking.folder import whole_folder
from effnn.ltp.pruning.shrinking.models import PrunedMixin
from effnn.ltp.pruning.shrinking.shrink import pad, shrink


class Saveable(Protocol):
    """A tokenizer or an image processor."""

    def save_pretrained(self, save_directory: str | Path) -> object:
        """Write its files."""


def export_padded(
    model: PreTrainedModel, masks: Masks | None, folder: str | Path, tokenizer: Saveable | None = None
) -> Path:
    """Write the dense, zero-filled checkpoint of `model` under `masks` to `folder`; returns the folder.

    masks: None if `model` is a pruned model already. tokenizer: saved beside it. The files are moved into place when
    all of them are written.
    """
    if masks is None and not isinstance(model, PrunedMixin):
        raise InvalidInput("export_padded without masks takes a pruned model; for a dense one pass its masks")
    dense = pad(model if masks is None else shrink(model, masks))
    with whole_folder(folder) as temporary:
        dense.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
    return Path(folder)
