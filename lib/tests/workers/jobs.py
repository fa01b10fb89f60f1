"""Jobs of the process pool."""

import torch
from tqdm.auto import tqdm

from effnn.base import InvalidInput


def square(value):
    if value < 0:
        raise InvalidInput("negative")
    return value * value, torch.get_num_threads()


def bar_is_silent(_):
    return tqdm([]).disable
