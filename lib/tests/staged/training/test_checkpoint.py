"""The trainer with a folder and on two ranks: killed and resumed to the same bits, damage, other runs, DDP."""

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.staged_runs import Interrupted, assert_same, interrupt_at, names
from transformers import GPT2LMHeadModel
from workers import staged_train as worker

from effnn.base import InvalidInput
from effnn.staged import Diverged, Rewarmed, Stage, WarmupStableDecay
from effnn.staged.training.checkpoints import checkpoint

WORKER = str(Path(worker.__file__))


def launch(*arguments: str, ranks: int = 0) -> subprocess.CompletedProcess:
    """Run the worker in a process of its own, or in `ranks` of them under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    command = [sys.executable, *launcher, WORKER, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            process.terminate()  # torchrun then ends its ranks, which would outlive a kill
    return subprocess.CompletedProcess(command, process.returncode, stderr=errors)


@pytest.fixture(scope="module")
def whole():
    """The run that nothing interrupts, without a folder."""
    torch.set_num_threads(1)
    return worker.run()


def test_killed_at_a_step_and_while_saving_the_run_ends_in_the_same_bits(tmp_path, whole):
    when = random.randint(9, 30)
    assert launch("kill", str(tmp_path), "save", "3").returncode == -signal.SIGKILL
    assert any(name.startswith(".tmp-") for name in names(tmp_path))
    assert [name for name in names(tmp_path) if name[0] != "."] == ["step-00000007-stage-00", "step-00000014-stage-00"]
    assert launch("kill", str(tmp_path), "step", str(when)).returncode == -signal.SIGKILL
    assert not any(name.startswith(".tmp-") for name in names(tmp_path))
    assert_same(worker.run(tmp_path), whole)
    assert names(tmp_path) == ["step-00000042-stage-01", "step-00000045-stage-01"], f"killed at {14 + when}"


def test_interrupted_at_every_kind_of_step_on_the_way(tmp_path, whole, monkeypatch):
    """Just before and behind a checkpoint, at the end of a stage, in the re-warm of the next."""
    for step in (8, 12, 1, 3, 8, 9, 4):
        with monkeypatch.context() as patch:
            interrupt_at(patch, step)
            with pytest.raises(Interrupted):
                worker.run(tmp_path)
    assert_same(worker.run(tmp_path), whole)


def test_a_finished_run_is_loaded_and_a_branch_of_it_can_go_on(tmp_path, whole, monkeypatch):
    worker.run(tmp_path / "run")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 0)
        loaded = worker.run(tmp_path / "run", how=worker.recipe(checkpoint_every=None, keep=5))
    assert_same(loaded, whole)
    assert not loaded.model.training
    with pytest.raises(Interrupted), monkeypatch.context() as patch:
        interrupt_at(patch, 9)
        worker.run(tmp_path / "branch", loaded, [Stage(10, learning_rate=5e-3)])
    branch = worker.run(tmp_path / "branch", loaded, [Stage(10, learning_rate=5e-3)])
    assert_same(branch, worker.run(None, whole, [Stage(10, learning_rate=5e-3)]))
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "branch" / "step-00000055-stage-02" / "model")
    for one, two in zip(model.parameters(), branch.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_stages_without_steps(tmp_path):
    stages = [Stage(4), Stage(0, width=2), Stage(0, depth=2)]
    state = worker.run(tmp_path / "grown", stages=stages)
    assert names(tmp_path / "grown") == ["step-00000004-stage-00", "step-00000004-stage-02"]
    assert_same(worker.run(tmp_path / "grown", stages=stages), state)
    shutil.rmtree(tmp_path / "grown" / "step-00000004-stage-02")
    assert_same(worker.run(tmp_path / "grown", stages=stages), state)


def test_what_a_model_brings_is_there_again(tmp_path, monkeypatch):
    model = GPT2LMHeadModel._from_config(worker.plain_config(), attn_implementation="eager").double()
    model.transformer.wpe.weight.requires_grad_(False)
    stages, how = [Stage(4), Stage(6, width=2)], worker.recipe(checkpoint_every=3)
    with pytest.raises(Interrupted), monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        worker.run(tmp_path, model, stages, how)
    loaded = worker.run(tmp_path, model, stages, how)
    assert loaded.model.dtype == torch.float64 and loaded.model.config._attn_implementation == "eager"
    assert [name for name, p in loaded.model.named_parameters() if not p.requires_grad] == ["transformer.wpe.weight"]
    assert_same(loaded, worker.run(None, model, stages, how))


@pytest.mark.parametrize(
    "ends",
    [
        pytest.param([(10, 0)], id="in a stage"),
        pytest.param([(14, 0)], id="where a checkpoint is due"),
        pytest.param([(20, 0)], id="at the end of a stage"),
        pytest.param([(20, 1)], id="right after growth"),
        pytest.param([(0, 0), (10, 0), (20, 0), (20, 1), (30, 1)], id="again and again"),
    ],
)
def test_a_run_that_was_stopped_goes_on_where_the_next_call_does_not_stop(tmp_path, monkeypatch, ends):
    how = worker.recipe(evaluate_every=2) if ends == [(14, 0)] else worker.recipe()
    asked = []
    for end in ends:

        def stop(point, end=end):
            asked.append((point.step, point.stage))
            return asked[-1] == end

        stopped, before = worker.run(tmp_path, how=how, stop=stop), len(asked)
        assert (stopped.step, stopped.stage) == end
        with monkeypatch.context() as patch:
            interrupt_at(patch, 0)
            assert_same(worker.run(tmp_path, how=how, stop=stop), stopped)  # the same call only loads
        assert asked[before:] == [end]
    assert_same(worker.run(tmp_path, how=how), worker.run(None, how=how))
    assert worker.run(tmp_path, how=how, stop=lambda point: 1 / 0).step == 45  # a finished run asks no more


def test_a_stop_at_the_very_end_finishes_the_run(tmp_path, monkeypatch):
    stages = [Stage(2), Stage(0, width=2)]
    first = worker.run(tmp_path, stages=stages, stop=lambda point: point.width == 32)
    assert_same(worker.run(tmp_path, stages=stages, stop=lambda point: 1 / 0), first)
    assert_same(first, worker.run(None, stages=stages))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with two checkpoints of a short run."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("finished") / "run"
    worker.run(folder, stages=[Stage(4), Stage(2, width=2)])
    return folder


@pytest.mark.parametrize("file", ["model/model.safetensors", "model/config.json", "optimizer.pt", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "missing", "changed"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(tmp_path, finished, file, damage):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    newest = folder / "step-00000006-stage-01"
    path = newest / file
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        middle = len(content) // 2
        changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes(content[:-9] if damage == "cut" else changed)
    stages = [Stage(4), Stage(2, width=2)]
    with pytest.raises(InvalidInput) as caught:
        worker.run(folder, stages=stages)
    assert str(path) in str(caught.value) and f"Delete {newest}" in str(caught.value)
    shutil.rmtree(newest)
    assert worker.run(folder, stages=stages).step == 6


STAGE = Stage(4)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"stages": [STAGE, Stage(3, width=2)]}, "stage 1 was Stage.steps=2, .* is Stage.steps=3"),
        (
            {"stages": [STAGE]},
            r"stages was 2, is 1; schedule was (.*values to position) 6 .*, is \1 4 .*; stage 1 was .* is absent",
        ),
        ({"how": worker.recipe(batch_size=8)}, "another run: batch_size was 4, is 8. Give"),
        ({"how": worker.recipe(schedule=WarmupStableDecay(3, 70, 20))}, "schedule was .*horizon=60.* is .*horizon=70"),
        ({"how": worker.recipe(schedule=lambda position: 1.0)}, "schedule was .* is values"),
        ({"tokens": worker.TOKENS.flip(0)}, "training tokens was 3000 tokens .*, is 3000 tokens"),
        ({"tokens": worker.TOKENS[:-1]}, "training tokens was 3000 tokens .*, is 2999 tokens"),
        ({"start": worker.config(n_layer=3)}, "start's n_layer was 2, is 3. Give"),
        ({"start": GPT2LMHeadModel(worker.config())}, "start was a GPT2Config, is a GPT2LMHeadModel"),
    ],
)
def test_a_folder_of_another_run_is_refused(finished, changes, sentence):
    before = names(finished)
    with pytest.raises(InvalidInput, match=sentence):
        worker.run(finished, **{"stages": [STAGE, Stage(2, width=2)], **changes})
    assert names(finished) == before


def test_smaller_micro_batches_go_on_with_the_same_run(tmp_path, monkeypatch):
    with pytest.raises(Interrupted):
        interrupt_at(monkeypatch, 8)
        worker.run(tmp_path, how=worker.recipe(checkpoint_every=4))
    monkeypatch.undo()
    state = worker.run(tmp_path, how=worker.recipe(checkpoint_every=4, micro_batch=2))
    assert state.step == sum(stage.steps for stage in worker.STAGES)


def test_a_state_from_disk_is_the_same_start_as_in_memory(tmp_path):
    stages = [Stage(6)]
    kept = worker.run(tmp_path / "a", stages=stages)
    loaded = worker.run(tmp_path / "a", stages=stages)
    worker.run(tmp_path / "b", start=kept, stages=[Stage(4, width=2)])
    again = worker.run(tmp_path / "b", start=loaded, stages=[Stage(4, width=2)])
    assert again.step == 10 and loaded.model.config.to_dict() != kept.model.config.to_dict()


def test_a_schedule_without_a_name_is_known_by_its_values(tmp_path):
    def how(schedule):
        return worker.recipe(schedule=schedule)

    worker.run(tmp_path, stages=[STAGE], how=how(lambda position: 0.5))
    assert worker.run(tmp_path, stages=[STAGE], how=how(lambda position: 1 / 2)).step == 4
    with pytest.raises(InvalidInput, match="schedule was values"):
        worker.run(tmp_path, stages=[STAGE], how=how(lambda position: 0.25))
    with pytest.raises(InvalidInput, match="schedule was values"):
        worker.run(tmp_path, stages=[STAGE], how=how(Rewarmed(lambda position: 0.5, 0, 2)))


def test_long_token_arrays_are_sampled_to_their_ends(tmp_path):
    tokens = worker.TOKENS.repeat(1000)
    worker.run(tmp_path, stages=[STAGE], tokens=tokens)
    for place in (0, -1):
        other = tokens.clone()
        other[place] = (other[place] + 1) % 40
        with pytest.raises(InvalidInput, match="training tokens was 3000000 tokens"):
            worker.run(tmp_path, stages=[STAGE], tokens=other)


def test_nothing_that_is_not_finite_is_saved(tmp_path, monkeypatch):
    before = worker.Stepper.__call__

    def spoiling(self, batch):
        loss = before(self, batch)
        if self.state.step == 3:
            self.model.transformer.wpe.weight.data[0, 0] = torch.inf
        return loss

    monkeypatch.setattr(worker.Stepper, "__call__", spoiling)
    with pytest.raises(Diverged, match="a weight is not finite after step 4: .*step-00000003-stage-00"):
        worker.run(tmp_path, how=worker.recipe(checkpoint_every=1))
    assert names(tmp_path)[-1] == "step-00000003-stage-00"


def test_a_failed_save_leaves_no_trace(tmp_path, monkeypatch):
    def full(*arguments):
        raise RuntimeError("something else than a full disk")

    monkeypatch.setattr(checkpoint, "save_optimizer", full)
    with pytest.raises(RuntimeError, match="something else"):
        worker.run(tmp_path)
    assert names(tmp_path) == []


def test_two_ranks_do_as_one_does_and_fail_together(tmp_path):
    ended = launch("ranks", str(tmp_path), ranks=2)
    assert ended.returncode == 0, ended.stderr[-3000:]
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    how = worker.recipe(batch_size=8, micro_batch=2)
    alone = worker.run(None, worker.plain_config(), how=how)
    assert one["weights"] == two["weights"] and one["dropout"] == two["dropout"]
    for own, other, point in zip(one["points"], two["points"], alone.points, strict=True):
        expected = dataclasses.asdict(point)
        for name in ("validation_loss", "train_loss", "learning_rate"):
            assert own[name] == other[name] == pytest.approx(expected[name], abs=1e-6), name
        for name in ("step", "stage", "tokens", "flops", "flops_full", "layers", "width"):
            assert own[name] == other[name] == expected[name], name
    for own, parameter in zip(one["weights"], alone.model.parameters(), strict=True):
        torch.testing.assert_close(torch.tensor(own), parameter.detach().flatten(), rtol=0, atol=1e-5)
    for found in (one, two):
        assert found["again"] == [len(alone.points), 45] and found["stopped"] == 10
        assert "holds another run" in found["other run"] and "InvalidInput" in found["other run"]
        assert "zero" in found["stop rule"] and "batch_size=6" in found["batch"]
        assert "the model differs between the ranks" in found["models"]
        assert "Diverged" in found["diverged"] and "InvalidInput" in found["no folder"]
    assert one["stop rule"].startswith("ZeroDivisionError") and "rank 0: " in two["stop rule"]
    assert re.match("CannotWrite: the checkpoint of step 7 .*No space left on device", one["no space"])
    assert re.match("EffnnError: rank 0: the checkpoint of step 7 .*No space left on device", two["no space"])
    assert "is in use by process" in one["in use"] and "rank 0: " in two["in use"]
    assert "rank 0: " in two["no folder"] and "file is a file" in two["no folder"]
    # a run of two ranks goes on with one
    shutil.rmtree(tmp_path / "run" / "step-00000045-stage-01")
    state = worker.run(tmp_path / "run", worker.plain_config(), how=how)
    assert state.points[-1].validation_loss == pytest.approx(alone.points[-1].validation_loss, abs=1e-6)
