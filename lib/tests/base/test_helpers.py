"""effnn.base: atomic writes, interleaved timing, peak memory, seeds and threads."""

import hashlib
import json
import os
import random
import stat
import threading

import numpy as np
import pytest
import torch
from torch import nn

from effnn.base import (
    InvalidInput,
    NotAvailable,
    PeakMemory,
    Timing,
    atomic_folder,
    atomic_path,
    evaluating,
    first_line,
    hooked,
    interleave,
    seed_everything,
    sha256_file,
    threads,
    write_json,
    write_text,
)
from effnn.base import memory as memory_module

# atomic writes


def test_a_written_file_replaces_the_old_one_and_has_ordinary_permissions(tmp_path):
    target = tmp_path / "new folder" / "a.txt"
    assert write_text(target, "one") == target
    plain = tmp_path / "plain.txt"
    plain.write_text("x")
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    write_text(target, "zwei ü")
    assert target.read_text(encoding="utf-8") == "zwei ü"
    assert [path.name for path in target.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_no_other(tmp_path, error):
    target = tmp_path / "a.csv"
    target.write_text("old")
    with pytest.raises(error), atomic_path(target) as temporary:
        assert temporary.parent == target.parent and temporary.suffix == ".csv" and temporary.name.startswith(".tmp-")
        temporary.write_text("half")
        assert target.read_text() == "old"
        raise error
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_a_reader_never_sees_a_half(tmp_path):
    target, texts, seen = tmp_path / "a.txt", ("a" * 200_000, "b" * 100_000), set()
    write_text(target, texts[0])
    done = threading.Event()

    def read():
        while not done.is_set():
            seen.add(target.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(20):
        write_text(target, texts[i % 2])
    done.set()
    reader.join()
    assert seen <= set(texts)


def test_json_keeps_the_order_and_refuses_what_is_no_number(tmp_path):
    path = write_json(tmp_path / "a.json", {"z": 1, "a": [0.1, None]})
    assert list(json.loads(path.read_text())) == ["z", "a"] and path.read_text().endswith("\n")
    with pytest.raises(ValueError):
        write_json(path, {"z": float("nan")})
    assert json.loads(path.read_text())["z"] == 1


# time


def test_variants_take_turns_and_warm_up_rounds_do_not_count():
    order = []
    found = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warmup=2)
    assert order == ["a", "b"] * 5
    assert set(found) == {"a", "b"}
    for timing in found.values():
        assert len(timing.seconds) == len(timing.load) == 3 and min(timing.seconds) >= 0


def test_ratios_are_taken_round_by_round():
    fast, slow = Timing("fast", (1.0, 2.0, 4.0), (0.0,) * 3), Timing("slow", (3.0, 8.0, 8.0), (0.0,) * 3)
    assert slow.over(fast) == (3.0, 4.0, 2.0)
    assert (slow.median, slow.spread) == (8.0, (3.0, 8.0))
    with pytest.raises(ValueError):
        slow.over(Timing("other", (1.0,), (0.0,)))


# memory


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="the resident set is read from /proc")
def test_the_peak_counts_what_was_held_and_freed_inside():
    size = 64 << 20
    kept = torch.ones(size // 4)  # held before the block: not counted
    with PeakMemory(interval=0.001) as peak:
        inside = torch.ones(size // 4)
        for _ in range(20):
            inside += 1
        del inside
    assert 0.9 * size <= peak.peak_bytes <= 1.5 * size
    with PeakMemory() as peak:
        kept += 1
    assert peak.peak_bytes < 0.25 * size


def test_where_nothing_can_be_read_the_peak_is_none(monkeypatch):
    monkeypatch.setattr(memory_module, "_resident_bytes", lambda: None)
    with PeakMemory() as peak:
        pass
    assert peak.peak_bytes is None


# seeds and threads


def test_one_seed_for_all_generators():
    def draw():
        generator = seed_everything(2**40 + 3)
        return (
            random.random(),
            float(np.random.rand()),
            float(torch.rand(())),
            float(torch.rand((), generator=generator)),
        )

    assert draw() == draw()
    first = draw()
    seed_everything(4)
    assert random.random() != first[0]


def test_the_number_of_threads_is_given_back_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise RuntimeError
    assert torch.get_num_threads() == before


def test_errors_can_be_caught_as_the_builtin_ones():
    assert issubclass(InvalidInput, ValueError) and issubclass(NotAvailable, RuntimeError)


def test_hooks_are_gone_after_the_block_also_when_setting_one_fails():
    layers = [nn.Linear(2, 2), nn.Linear(2, 2)]

    def failing():
        yield layers[0].register_forward_hook(lambda *_: None)
        raise RuntimeError("no second hook")

    with hooked(layer.register_forward_hook(lambda *_: None) for layer in layers):
        assert all(layer._forward_hooks for layer in layers)
    assert not any(layer._forward_hooks for layer in layers)
    with pytest.raises(RuntimeError, match="no second hook"), hooked(failing()):
        pass
    assert not layers[0]._forward_hooks


def test_every_module_gets_its_own_mode_back():
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[0].eval()
    with pytest.raises(RuntimeError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert [module.training for module in model.modules()] == [True, False, True]


def test_a_folder_is_whole_or_as_it_was(tmp_path):
    target = tmp_path / "deep" / "set"
    for content in ("old", "new"):
        with atomic_folder(target) as folder:
            (folder / content).write_text(content)
    assert [path.name for path in target.iterdir()] == ["new"]
    with pytest.raises(KeyError), atomic_folder(target) as folder:
        (folder / "half").write_text("")
        raise KeyError
    assert [path.name for path in target.iterdir()] == ["new"] and os.listdir(target.parent) == ["set"]


def test_the_first_line_of_an_error_is_short():
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(ValueError()) == "no message" and len(first_line("x" * 999)) == 200


def test_the_sha256_of_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
