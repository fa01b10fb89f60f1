"""Token arrays of any kind: read with the values that they hold, or refused with what was found."""

import array

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.staged_runs import config, recipe

from effnn.base import InvalidInput
from effnn.staged import Stage, train
from effnn.staged.training.batches import Batches, validation_windows
from effnn.staged.training.token_arrays import ForeignArray, checked_tokens

IDS = np.random.default_rng(0).integers(0, 40, 400)


def field_of_a_record() -> np.ndarray:
    records = np.zeros(len(IDS), dtype=[("kind", "u1"), ("id", "<i4")])
    records["id"] = IDS
    return records["id"]


def read_only(ids: np.ndarray) -> np.ndarray:
    ids.flags.writeable = False
    return ids


SERVED = {
    "big-endian": lambda: IDS.astype(">u2"),
    "big-endian, 8 bytes": lambda: IDS.astype(">i8"),
    "backwards": lambda: IDS[::-1].copy()[::-1],
    "big-endian, backwards": lambda: IDS.astype(">i4")[::-1].copy()[::-1],
    "every third": lambda: IDS.repeat(3)[::3],
    "a column": lambda: np.stack([IDS, IDS], axis=1)[:, 1],
    "a field": field_of_a_record,
    "off by a byte": lambda: np.frombuffer(b"x" + IDS.astype("<i4").tobytes(), dtype="<i4", offset=1),
    "read-only": lambda: read_only(IDS.astype(np.uint16)),
    **{dtype: lambda dtype=dtype: IDS.astype(dtype) for dtype in ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8")},
    "a list": lambda: IDS.tolist(),
    "a list of NumPy's numbers": lambda: list(IDS),
    "a tuple": lambda: tuple(IDS.tolist()),
    "an array of the standard library": lambda: array.array("H", IDS.tolist()),
    "pandas": lambda: pd.Series(IDS),
    "pandas with missing values": lambda: pd.Series(IDS, dtype="Int64"),
    "torch.uint16": lambda: torch.tensor(IDS).to(torch.uint16),
    "torch.uint64": lambda: torch.tensor(IDS).to(torch.uint64),
    "every second of torch": lambda: torch.tensor(IDS).repeat_interleave(2)[::2],
}


@pytest.mark.parametrize("name", SERVED)
def test_every_array_of_whole_numbers_is_served(name):
    tokens = SERVED[name]()
    assert torch.equal(Batches(tokens, 4, 32, 40)(5), Batches(torch.tensor(IDS), 4, 32, 40)(5))
    expected = validation_windows(torch.tensor(IDS), 5, 32, 40)
    found = validation_windows(tokens, 5, 32, 40)
    assert torch.equal(found, expected) and found.dtype == torch.int64


def test_nothing_is_copied_but_what_is_read(tmp_path):
    IDS.astype(">u2").tofile(tmp_path / "ids.bin")
    mapped = np.memmap(tmp_path / "ids.bin", ">u2", "r")
    assert isinstance(checked_tokens(mapped, 32, "training"), ForeignArray)
    assert checked_tokens(mapped, 32, "training").array is mapped
    for plain in (IDS, read_only(IDS.astype(np.uint16)), IDS.repeat(3)[::3]):
        assert checked_tokens(plain, 32, "training").data_ptr() == plain.ctypes.data


@pytest.mark.parametrize("ids", [IDS.astype(">u2"), IDS.tolist()])
def test_a_run_is_that_of_the_plain_array(ids):
    plain = torch.tensor(IDS)
    states = [train(config(), [Stage(2)], recipe(), tokens, tokens, progress=False) for tokens in (plain, ids)]
    assert states[0].points[-1].validation_loss == states[1].points[-1].validation_loss


ROWS = np.array([list(range(3)), list(range(2))] * 30, dtype=object)
REFUSED = [
    (IDS.astype(float), r"float64: convert whole numbers by .astype\('int64'\)"),
    (IDS.astype(np.float16), "float16: convert"),
    (torch.tensor(IDS).float(), r"torch.float32: convert whole numbers by .long\(\)"),
    (torch.ones(60, requires_grad=True), "torch.float32"),
    (IDS.astype(complex), "complex128"),
    (IDS > 3, "bool, which looks like a mask"),
    (torch.tensor(IDS) > 3, "torch.bool, which looks like a mask"),
    ([True] * 60, "torch.bool"),
    (ROWS, "object, the first entry of type list: join its entries by numpy.concatenate"),
    (IDS.astype(object), r"object, the first entry of type int: .* or convert whole numbers by .astype\('int64'\)"),
    (IDS.reshape(4, 100), r"int64 of shape \(4, 100\): join the rows by .reshape\(-1\)"),
    (torch.tensor(IDS).view(4, 100), r"torch.int64 of shape \(4, 100\): join the rows"),
    ([[1] * 60, [2] * 60], r"shape \(2, 60\): join the rows"),
    ([[1] * 60, [2] * 61], "a list that torch.tensor does not take .*: join its parts"),
    ([1.5] * 60, r"a list with fractions: convert whole numbers by int\(\)"),
    (["a"] * 60, "a list that torch.tensor does not take"),
    ([2**70] * 60, "a list that torch.tensor does not take"),
    (np.array(["a"] * 60), "<U1: give token ids"),
    (np.zeros(60, "M8[s]"), "datetime64"),
    (np.zeros(60, dtype=[("a", "u1")]), "'a', 'u1'"),
    (np.array(3), r"shape \(\): give more than a single number"),
    (np.int64(3), r"shape \(\)"),
    (np.ma.masked_array(IDS, IDS > 30), r"a masked array: .compressed\(\)"),
    (torch.zeros(60, dtype=torch.long).to_sparse(), "a torch.sparse_coo tensor"),
    (torch.zeros(60, dtype=torch.long, device="meta"), "tensor on meta"),
    (torch.nn.Parameter(torch.zeros(60, dtype=torch.long), requires_grad=False), "Parameter: give a plain tensor"),
    ("some text" * 9, "a str: give its token ids"),
    (b"some bytes" * 9, "a bytes: give"),
    ({"input_ids": IDS}, "a dict: give"),
    ((i for i in range(60)), "a generator: give"),
    (None, "None: give"),
]


@pytest.mark.parametrize(("tokens", "sentence"), REFUSED)
def test_what_holds_no_tokens_is_refused_and_said(tokens, sentence):
    with pytest.raises(InvalidInput, match=f"training tokens: expected one dimension of integers, found .*{sentence}"):
        Batches(tokens, 4, 32, 40)


@pytest.mark.parametrize("empty", [[], (), np.array([]), np.zeros(0, int), torch.tensor([]), np.zeros(0, ">u2")])
def test_no_tokens_are_too_few(empty):
    with pytest.raises(InvalidInput, match="there are 0 validation tokens; a context of 32 needs 33"):
        validation_windows(empty, 1, 32, 40)


def test_the_ways_out_work():
    expected = Batches(IDS, 4, 32, 40)(5)
    halves = np.empty(2, dtype=object)
    halves[:] = [IDS[:100], IDS[100:]]
    masked = np.ma.masked_array(np.append(IDS, [39] * 3), np.arange(403) >= 400)
    for tokens in (
        IDS.astype(float).astype("int64"),
        torch.tensor(IDS).float().long(),
        IDS.reshape(4, 100).reshape(-1),
        IDS.astype(object).astype("int64"),
        np.concatenate(halves),
        masked.compressed(),
        [int(i) for i in IDS.astype(float).tolist()],
    ):
        assert torch.equal(Batches(tokens, 4, 32, 40)(5), expected)


def test_ids_outside_the_vocabulary_are_named_whatever_the_array():
    for tokens in (IDS.astype(">u2"), IDS.tolist(), IDS.astype("u8") + 2**63):
        with pytest.raises(InvalidInput, match="the tokens hold the id -?[0-9]+, the model's vocabulary goes"):
            Batches(tokens, 4, 32, 9)(0)
