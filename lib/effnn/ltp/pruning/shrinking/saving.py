"""Loading a saved pruned model, and exporting it for loaders that know nothing of this project.

The export is a zero-filled dense checkpoint of the stock class: it gives the right outputs with plain transformers, and
no speed-up. `small.save_pretrained(folder)` itself is in models.py.
"""

import json
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedModel

from effnn.base import InvalidInput
from effnn.ltp.pruning.adapters import PRUNED_PREFIX
from effnn.ltp.pruning.masks import Masks
from effnn.ltp.pruning.shrinking.models import CONFIG, PrunedMixin, registered, whole_folder
from effnn.ltp.pruning.shrinking.shrink import pad, shrink


def load_pruned(folder: str | Path, **options) -> PreTrainedModel:
    """The pruned model saved in `folder`, in eval mode, with the class it was saved from.

    options go to `from_pretrained` (dtype, device_map, attn_implementation, ...). InvalidInput if the folder holds
    another kind of model, or is half written.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise InvalidInput(
            f"{folder} holds no {CONFIG}: expected the folder of a saved pruned model (or it is half written)"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        model_type, names = str(config.get("model_type")), config.get("architectures") or [""]
    except (ValueError, AttributeError) as error:
        raise InvalidInput(f"{path} is not a model configuration ({error}); save the model again") from error
    if not model_type.startswith(PRUNED_PREFIX):
        raise InvalidInput(
            f"{folder} holds a model of type {model_type!r}, not a pruned one ({PRUNED_PREFIX}...). "
            "Load it with transformers; effnn.ltp.shrink(model, masks) makes a pruned model"
        )
    found = registered(model_type, names[0])
    if found is None:
        raise InvalidInput(
            f"{folder} holds a {names[0]} ({model_type}), which is not registered: see effnn.ltp.register_pruned"
        )
    try:
        model, info = found.from_pretrained(folder, output_loading_info=True, **options)
    except InvalidInput:
        raise
    except Exception as error:  # safetensors, OSError, RuntimeError: all mean that the files do not fit together
        raise InvalidInput(
            f"the weights in {folder} are missing, damaged or do not fit its {CONFIG}: {error}"
        ) from error
    wrong = {kind: sorted(keys) for kind, keys in info.items() if keys and kind in ("missing_keys", "unexpected_keys")}
    if wrong:
        raise InvalidInput(f"the weights in {folder} do not fit its {CONFIG}: {wrong}")
    return model


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
