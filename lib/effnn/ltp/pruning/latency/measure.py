"""Latency of whole models on random inputs: what predicted latencies are compared with.

Models are interleaved, warmed up, and get different inputs in turn; take ratios round by round (`Timing.over`). Also
here: the device a model runs on and the inputs it gets, for blocks.py too.
"""

import copy
import itertools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from effnn.base import InvalidInput, NotAvailable, Timing, evaluating, interleave


def measure_latency(
    model: PreTrainedModel, batch: int = 32, seq_len: int = 128, device: object = None, repeats: int = 9
) -> Timing:
    """Seconds of whole forward passes of `model` (see `compare_latency`)."""
    return compare_latency({"model": model}, batch, seq_len, device, repeats)["model"]


def compare_latency(
    models: Mapping[str, PreTrainedModel],
    batch: int = 32,
    seq_len: int = 128,
    device: object = None,
    repeats: int = 9,
    warmup: int = 2,
    dtype: torch.dtype | None = None,
) -> dict[str, Timing]:
    """Seconds of whole forward passes of several models, interleaved: name -> `effnn.base.Timing`.

    models: text encoders get random token ids without padding, vision encoders random pixels; four such inputs take
        turns.
    batch: rows of an input.
    seq_len: tokens per row; a vision encoder's length is its own.
    device: where the models run (None: where the first one is); a model that is elsewhere is copied there.
    repeats: rounds, in each of which every model runs once.
    warmup: rounds before these.
    dtype: what they run in (None: each in its own).

    Raises InvalidInput for no model, a longer length than a model has positions for, or a device other than CPU and
    CUDA; NotAvailable for a device that is not here.
    """
    if not models:
        raise InvalidInput("compare_latency: expected at least one model")
    device = check_device(device) or next(iter(models.values())).device
    placed = {name: placed_copy(model, device, dtype) for name, model in models.items()}

    def forward(model: PreTrainedModel) -> Callable[[], object]:
        inputs = itertools.cycle(random_inputs(model, batch, seq_len))

        def run() -> object:
            with torch.inference_mode():
                return model(**next(inputs))

        return run

    with evaluating(*placed.values()):
        return interleave({name: forward(model) for name, model in placed.items()}, repeats, warmup, device)


def check_device(device: object) -> torch.device | None:
    """`device` as torch's; None stays None. InvalidInput unless CPU or CUDA, NotAvailable if it is not here."""
    if device is None:
        return None
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidInput(f"device={device!r}: expected None or a torch device such as 'cpu' or 'cuda'") from error
    if found.type not in ("cpu", "cuda"):
        raise InvalidInput(f"device={device!r}: latency is measured on 'cpu' and 'cuda' devices only")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise NotAvailable(
            f"device={device!r}: there is no CUDA device here. Measure the table where the model will run"
        )
    return found


def placed_copy(model: PreTrainedModel, device: torch.device | None, dtype: torch.dtype | None) -> PreTrainedModel:
    """`model` itself if it is on the device and has the dtype, otherwise a copy that is and has."""
    device, dtype = device or model.device, dtype or model.dtype
    same_place = model.device.type == device.type and (device.index is None or model.device.index == device.index)
    return model if same_place and model.dtype == dtype else copy.deepcopy(model).to(device=device, dtype=dtype)


def random_inputs(model: PreTrainedModel, batch: int, seq_len: int, count: int = 4) -> list[dict[str, Tensor]]:
    """`count` different inputs on the model's device, as keyword arguments; seq_len holds for text encoders only."""
    config = model.config
    draw = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        size = config.image_size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        pixels = torch.randn(count, batch, config.num_channels, height, width, generator=draw)
        return [{"pixel_values": one} for one in pixels.to(model.device, model.dtype)]
    if model.main_input_name != "input_ids":
        raise InvalidInput(f"{type(model).__name__} takes {model.main_input_name}: expected input_ids or pixel_values")
    padding = getattr(config, "pad_token_id", None)
    longest = getattr(config, "max_position_embeddings", seq_len)
    if config.model_type in ("roberta", "xlm-roberta", "camembert"):  # their positions start after the padding index
        longest -= (padding or 0) + 1
    if seq_len > longest:
        raise InvalidInput(f"seq_len={seq_len}: this model has positions for {longest} tokens at most")
    ids = torch.randint(0, config.vocab_size, (count, batch, seq_len), generator=draw)
    if padding is not None:
        ids[ids == padding] = (padding + 1) % config.vocab_size
    mask = torch.ones(batch, seq_len, dtype=torch.long, device=model.device)
    if type(model).__name__.endswith("ForMultipleChoice"):  # (rows, choices, tokens); a row of one choice is a sequence
        ids, mask = ids.unsqueeze(2), mask.unsqueeze(1)
    return [{"input_ids": one, "attention_mask": mask} for one in ids.to(model.device)]
