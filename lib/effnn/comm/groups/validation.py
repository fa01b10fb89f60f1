"""What a process group asks of its arguments, before anything is sent; every refusal says what was expected."""

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from math import prod
from numbers import Integral

import torch
import torch.distributed as dist
from torch import Tensor

from effnn.base import InvalidInput
from effnn.comm.groups.tensors.layout import expect_own_memory
from effnn.comm.groups.tensors.reductions import Reduction, reduction


def guarded(name: str, sparse: bool = False) -> Callable[[Callable], Callable]:
    """Decorate a call of a group: it is made on dense CPU tensors of an open group only.

    name: of the call, for messages. sparse: whether it takes sparse COO tensors as well. Tensors of one other device
    are handed to the group that the configuration names for it. Raises InvalidInput for anything else.
    """

    def decorate(method: Callable) -> Callable:
        @wraps(method)
        def call(group, *arguments, **named):
            tensors = list(_tensors(name, [*arguments, *named.values()]))
            group._expect_open(name)
            devices = {tensor.device.type for tensor in tensors}
            if len(devices) > 1:
                raise InvalidInput(f"{name}: tensors on {', '.join(sorted(devices))}; expected one device")
            if devices and devices != {"cpu"}:
                other = getattr(group._group_for(devices.pop()), method.__name__)
                return other(*[argument for argument in arguments if argument is not None], **named)
            for tensor in tensors:
                _expect_dense(name, tensor, sparse)
            return method(group, *arguments, **named)

        return call

    return decorate


def _tensors(name: str, values: Sequence, inside: bool = False) -> Iterator[Tensor]:
    """The tensors of a call's arguments; lists may hold tensors, lists of them, or split sizes."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(name, value, inside=True)
        elif inside and not isinstance(value, Integral):
            raise InvalidInput(f"{name}: expected a list of tensors, found {type(value).__name__} in it")


def _expect_dense(name: str, tensor: Tensor, sparse: bool) -> None:
    if sparse and tensor.layout is torch.sparse_coo:
        return
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        kind = "quantized" if tensor.is_quantized else "nested" if tensor.is_nested else str(tensor.layout)
        way_out = "int_repr()" if tensor.is_quantized else "values()" if tensor.is_nested else "to_dense()"
        raise InvalidInput(f"{name}: expected a dense tensor, got a {kind} one; pass its {way_out}")
    if hasattr(tensor, "__tensor_flatten__"):
        raise InvalidInput(
            f"{name}: expected a plain tensor, got a {type(tensor).__name__}, which has no memory of its own; pass the "
            "tensor inside it (of a DTensor: to_local())"
        )


class Validator:
    """Validates the arguments of one group's calls; every method raises InvalidInput.

    name: of the backend, for messages. size: number of ranks. int16: whether the library compares such integers.
    largest_tag: of a message.
    """

    def __init__(self, name: str, size: int, int16: bool, largest_tag: int):
        self.name, self.size, self.int16, self.largest_tag = name, size, int16, largest_tag

    def reduction(self, name: str, opts: object, tensors: Sequence[Tensor]) -> Reduction:
        """The reduction asked for, checked against the tensors' type; without tensors, one that is never made."""
        types = {tensor.dtype for tensor in tensors} or {torch.float32}
        if len(types) > 1:
            raise InvalidInput(f"{name}: expected tensors of one type, got {', '.join(sorted(map(str, types)))}")
        asked = opts.reduceOp if opts is not None else dist.ReduceOp.SUM
        return reduction(name, self.name, asked, types.pop(), self.size, self.int16)

    def root(self, name: str, root: int) -> int:
        """The root, if it is a rank of the group."""
        if not 0 <= root < self.size:
            raise InvalidInput(f"{name}: root {root} is not a rank of this group of {self.size}")
        return root

    def peer(self, name: str, peer: int | None, rank: int, tag: int) -> None:
        """The other end of a message is another rank of the group (None: any), the tag is one that the library has."""
        if peer is not None and not 0 <= peer < self.size:
            raise InvalidInput(f"{name}: rank {peer} is not a rank of this group of {self.size}")
        if peer == rank:
            raise InvalidInput(f"{name}: rank {rank} is this rank itself; copy the tensor instead")
        if self.size == 1:
            raise InvalidInput(f"{name}: needs a second rank; this group has one")
        if not 0 <= tag <= self.largest_tag:
            raise InvalidInput(f"{name}: expected a tag from 0 to {self.largest_tag}, got {tag}")

    def lists(self, name: str, lists: Sequence[Sequence], others: Sequence) -> None:
        """As many on one side as on the other."""
        if len(lists) != len(others):
            raise InvalidInput(f"{name}: expected as many outputs as inputs, got {len(lists)} and {len(others)}")

    def parts(self, name: str, parts: Sequence[Tensor], tensor: Tensor, mine: int | None = None) -> None:
        """One part per rank, of one type; that of rank `mine` (None: every one) of the tensor's size."""
        if len(parts) != self.size:
            raise InvalidInput(f"{name}: expected {self.size} tensors, one per rank, got {len(parts)}")
        if any(part.dtype != tensor.dtype for part in parts):
            raise InvalidInput(f"{name}: expected every tensor to be {tensor.dtype}")
        for part in parts if mine is None else [parts[mine]]:
            if part.numel() != tensor.numel():
                raise InvalidInput(
                    f"{name}: expected a tensor of {tensor.numel()} elements for each rank, got {part.numel()}"
                )

    def outputs(self, name: str, parts: Sequence[Tensor], tensor: Tensor, mine: int | None = None) -> None:
        """The same of parts that are written to."""
        self.parts(name, parts, tensor, mine)
        expect_own_memory(name, parts)

    def ratio(self, name: str, large: Sequence[Tensor], small: Sequence[Tensor]) -> None:
        """Each large tensor has world size times the elements of its small one."""
        self.lists(name, large, small)
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
