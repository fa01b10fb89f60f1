"""What a process group asks of its arguments; every refusal says what was expected."""

from collections.abc import Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from effnn.base import InvalidInput

REDUCED_TYPES = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int32, torch.int64,
)  # fmt: skip
"""Types that may be summed, multiplied and compared. Others are only moved, byte by byte."""

OPERATIONS = ("sum", "product", "min", "max", "avg")


class Checks:
    """The checks of one group; all raise InvalidInput. name: of its backend, for messages. size: number of ranks."""

    def __init__(self, name: str, size: int):
        self.name, self.size = name, size

    def operation(self, name: str, opts: object, tensors: Sequence[Tensor]) -> str:
        """Name of the reduction asked for, checked against the tensors' types."""
        asked = opts.reduceOp if opts is not None else dist.ReduceOp.SUM
        operation = next((known for known in OPERATIONS if asked == getattr(dist.ReduceOp, known.upper())), None)
        if operation is None:
            raise InvalidInput(
                f"{name} over {self.name} knows {', '.join(OPERATIONS)}; another operation was asked for"
            )
        for tensor in tensors:
            if tensor.dtype not in REDUCED_TYPES:
                known = ", ".join(str(kind).removeprefix("torch.") for kind in REDUCED_TYPES)
                raise InvalidInput(f"{name} over {self.name} takes {known}, not {tensor.dtype}")
            if operation == "avg" and not tensor.is_floating_point():
                raise InvalidInput(f"{name}: avg needs a floating type, not {tensor.dtype}; take sum and divide")
        return operation

    def root(self, name: str, root: int) -> int:
        """The root, if it is a rank of the group."""
        if not 0 <= root < self.size:
            raise InvalidInput(f"{name}: root {root} is not a rank of this group of {self.size}")
        return root

    def parts(self, name: str, parts: Sequence[Tensor], tensor: Tensor, mine: int | None = None) -> None:
        """One part a rank, of one type; that of rank `mine` (None: every one) of the tensor's size."""
        if len(parts) != self.size:
            raise InvalidInput(f"{name}: expected {self.size} tensors, one a rank, got {len(parts)}")
        if any(part.dtype != tensor.dtype for part in parts):
            raise InvalidInput(f"{name}: expected every tensor to be {tensor.dtype}")
        for part in parts if mine is None else [parts[mine]]:
            if part.numel() != tensor.numel():
                raise InvalidInput(
                    f"{name}: expected a tensor of {tensor.numel()} elements for each rank, got {part.numel()}"
                )

    def ratio(self, name: str, large: Sequence[Tensor], small: Sequence[Tensor]) -> None:
        """Each large tensor has world size times the elements of its small one."""
        for one, other in zip(large, small, strict=True):
            if one.dtype != other.dtype or one.numel() != self.size * other.numel():
                raise InvalidInput(
                    f"{name}: the larger tensor must have {self.size} (the world size) times the elements of the "
                    f"smaller and its type; got {one.numel()} {one.dtype} and {other.numel()} {other.dtype}"
                )

    def splits(self, which: str, tensor: Tensor, splits: Sequence[int]) -> list[int]:
        """Split sizes along dimension 0, as numbers of elements."""
        rows, width = (tensor.shape[0], prod(tensor.shape[1:])) if tensor.dim() else (1, 1)
        if not splits:
            if rows % self.size:
                raise InvalidInput(f"all_to_all: {rows} rows of the {which} do not divide by {self.size} ranks")
            splits = [rows // self.size] * self.size
        if len(splits) != self.size or sum(splits) != rows or min(splits) < 0:
            raise InvalidInput(
                f"all_to_all: {which} split sizes {list(splits)} must be {self.size} numbers that sum to {rows}"
            )
        return [rows * width for rows in splits]
