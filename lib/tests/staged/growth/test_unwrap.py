"""Models, optimizers and schedulers in wrappers: opened, or refused with a way out."""

import copy

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.state import AcceleratorState
from helpers.staged_runs import PLATEAU, config, moments, recipe, run, same, weights
from plain import staged as plain
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments

from effnn import staged
from effnn.base import InvalidInput
from effnn.staged import Stage, TrainState
from effnn.staged.growth.optimizer import steps_done


class HeldOptimizer(Optimizer):
    """What accelerate makes of an optimizer: an Optimizer by class, whose groups and state are the inner one's."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)
    defaults = property(lambda self: self.optimizer.defaults)


class HeldScheduler:
    """What accelerate makes of a scheduler: no LRScheduler by class."""

    def __init__(self, scheduler: LambdaLR) -> None:
        self.scheduler = scheduler

    def __getattr__(self, name: str):
        return getattr(self.scheduler, name)


@pytest.fixture
def group():
    """A process group of one, in this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WRAPPERS = [
    DistributedDataParallel,
    DataParallel,
    torch.compile,
    lambda model: torch.compile(DistributedDataParallel(model)),
    lambda model: DistributedDataParallel(torch.compile(model)),
]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapped_model_grows_and_trains_like_the_plain_one(group, wrap, tmp_path):
    model, optimizer = plain.trained()
    wrapped = wrap(model)
    expected, found = staged.grow(model, optimizer, width=2), staged.grow(wrapped, optimizer, width=2)
    assert type(found.model) is GPT2LMHeadModel
    for one, two in zip(found.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(one, two)
        assert torch.equal(found.optimizer.state[one]["exp_avg"], expected.optimizer.state[two]["exp_avg"])
    start = TrainState(model, optimizer, PLATEAU, 1e-2)
    wrapped_start = TrainState(wrapped, HeldOptimizer(optimizer), PLATEAU, 1e-2)
    once = run(wrapped_start, [Stage(3, width=2)], folder=tmp_path)
    assert wrapped_start.model is wrapped and isinstance(wrapped_start.optimizer, HeldOptimizer)
    assert same(once, run(start, [Stage(3, width=2)]))
    assert same(run(start, [Stage(3, width=2)], folder=tmp_path), once)  # the same run
    assert same(run(wrapped, [Stage(2)]), run(model, [Stage(2)]))
    plain.gradients(model, plain.tokens())
    assert torch.equal(staged.gradient_norm(wrapped), staged.gradient_norm(model))
    path = staged.save_optimizer(tmp_path / "adam.pt", wrapped, HeldOptimizer(optimizer))
    assert len(staged.load_optimizer(path, wrapped).state) == len(optimizer.state)


@pytest.mark.parametrize("around", [lambda optimizer: optimizer, HeldOptimizer])
def test_held_optimizers_and_schedulers_keep_their_state(around):
    model, optimizer = plain.trained()
    held = HeldOptimizer(HeldOptimizer(optimizer))  # prepared twice
    scheduler = LambdaLR(around(optimizer), lambda step: 1 / (1 + step))
    for _ in range(4):
        scheduler.step()
    expected = staged.grow(model, optimizer, width=2, depth=2).optimizer
    found = staged.grow(model, held, HeldScheduler(scheduler), width=2, depth=2)
    assert type(found.optimizer) is AdamW and type(found.scheduler) is LambdaLR
    assert found.scheduler.optimizer is found.optimizer and found.scheduler.last_epoch == 4
    assert found.scheduler.get_last_lr() == scheduler.get_last_lr()
    for one, two in zip(found.optimizer.state.values(), expected.state.values(), strict=True):
        assert all(torch.equal(one[key], two[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    assert staged.grow(model, optimizer, HeldScheduler(scheduler), width=2).scheduler.last_epoch == 4


def test_names_that_an_optimizer_was_given_come_back_from_the_disk(tmp_path):
    model = plain.tiny_gpt2()
    optimizer = AdamW(model.named_parameters())
    loaded = staged.load_optimizer(staged.save_optimizer(tmp_path / "a.pt", model, optimizer), model)
    assert loaded.param_groups[0]["param_names"] == optimizer.param_groups[0]["param_names"]


PRECISIONS = ["no", "bf16"]  # the second replaces the forward method of the model


@pytest.fixture
def fresh_accelerate():
    """The settings of accelerate are global: new ones before the test, none after it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_goes_on_inside_accelerate_after_growth(fresh_accelerate, precision):
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    model = plain.tiny_gpt2(dtype=torch.float32)
    optimizer = AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0)
    held = accelerator.prepare(model, optimizer, LambdaLR(optimizer, PLATEAU))

    def step(model, optimizer, scheduler) -> float:
        loss = model(input_ids=plain.tokens(), labels=plain.tokens()).loss
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        return loss.item()

    losses = [step(*held) for _ in range(3)]
    assert type(held[1]) is AcceleratedOptimizer and type(held[2]) is AcceleratedScheduler
    grown = staged.grow(*held, width=2, depth=2)
    assert type(grown.optimizer) is AdamW and "forward" not in vars(grown.model)
    assert steps_done(grown.optimizer) == grown.scheduler.last_epoch == 3
    again = accelerator.prepare(grown.model, grown.optimizer, grown.scheduler)
    losses += [step(*again) for _ in range(3)]
    assert losses[3] < losses[0] and losses[5] < losses[3] and steps_done(grown.optimizer) == 6
    # the bare model, as accelerate gives it back
    bare = staged.grow(accelerator.unwrap_model(held[0]), optimizer, width=2, depth=2)
    assert all(map(torch.equal, bare.model.parameters(), staged.grow(*held, width=2, depth=2).model.parameters()))
    assert steps_done(run(TrainState(again[0], again[1], PLATEAU, 1e-2), [Stage(2)]).optimizer) == 8


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_live_trainer_is_grown_and_trained_on(fresh_accelerate, tmp_path, precision):
    model = plain.tiny_gpt2(dtype=torch.float32)
    rows = [{"input_ids": row, "labels": row} for row in plain.tokens(rows=8)]
    settings = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "adam_beta2": 0.98}
    arguments = TrainingArguments(str(tmp_path), max_steps=3, bf16=precision == "bf16", **settings)
    trainer = Trainer(model=model, train_dataset=rows, args=arguments)
    trainer.train()
    assert ("forward" in vars(trainer.model)) == (precision == "bf16")
    grown = staged.grow(trainer.model, trainer.optimizer, trainer.lr_scheduler, width=2)
    assert steps_done(grown.optimizer) == grown.scheduler.last_epoch == 3
    start = TrainState(trainer.model_wrapped, trainer.optimizer, PLATEAU, 5e-5)
    state = run(start, [Stage(2, width=2)], recipe(eps=1e-8))
    assert steps_done(state.optimizer) == 5
    with pytest.raises(InvalidInput, match="found a Trainer: hand over its .model, .optimizer and .lr_scheduler"):
        staged.grow(trainer, width=2)
    with pytest.raises(InvalidInput, match="found Trainer: hand over its .model"):
        run(trainer, [Stage(1)])
    larger = Trainer(
        model=grown.model, train_dataset=rows, args=arguments, optimizers=(grown.optimizer, grown.scheduler)
    )
    larger.train()
    assert steps_done(grown.optimizer) == 6


class Holder(nn.Module):
    def __init__(self, **held: nn.Module) -> None:
        super().__init__()
        for name, module in held.items():
            self.add_module(name, module)


class PeftModel(Holder):
    """By name alone what the adapters of peft are in."""


class FullyShardedDataParallel(Holder):
    """By name alone the first generation of sharding."""


def sharded_inside() -> GPT2LMHeadModel:
    model = plain.tiny_gpt2()
    model.transformer.h[1] = FullyShardedDataParallel(_fsdp_wrapped_module=model.transformer.h[1])
    return model


class Coded(nn.Parameter):
    """A weight in some quantized form that calls itself float32."""


def coded() -> GPT2LMHeadModel:
    model = plain.tiny_gpt2()
    model.transformer.h[0].mlp.c_fc.weight = Coded(model.transformer.h[0].mlp.c_fc.weight.detach())
    return model


def cut() -> GPT2LMHeadModel:
    """As a rank holds it that keeps no more than its part."""
    model = plain.tiny_gpt2()
    model.transformer.h[0].mlp.c_fc.weight = nn.Parameter(torch.empty(0, dtype=torch.float64))
    return model


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: PeftModel(base_model=plain.tiny_gpt2()), r"found a PeftModel: model.merge_and_unload\(\)"),
        (lambda: FullyShardedDataParallel(module=plain.tiny_gpt2()), "sharded: load get_model_state_dict"),
        (sharded_inside, r"transformer.h.1 is sharded .* load get_model_state_dict\(.*full_state_dict=True"),
        (lambda: Holder(model=plain.tiny_gpt2()), "found a Holder: hand over its .model"),
        (lambda: Holder(module=plain.tiny_gpt2()), "found a Holder: hand over its .module"),
        (lambda: Holder(model=nn.Linear(2, 2)), "found a Holder$"),
        (coded, "c_fc.weight is a Coded, not a plain parameter, .* before it was quantized or sharded"),
        (cut, r"c_fc.weight is of shape \(0,\), which does not fit the model's configuration: it makes \(16, 64\)"),
    ],
)
def test_what_is_no_wrapper_is_refused_before_anything_is_done(make, sentence, tmp_path):
    for call in (lambda: staged.grow(make(), width=2), lambda: run(make(), [Stage(1)], folder=tmp_path / "run")):
        with pytest.raises(InvalidInput, match=sentence):
            call()
    assert not (tmp_path / "run").exists()


def test_sharded_models_are_refused_and_the_way_out_works(group, tmp_path):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = plain.tiny_gpt2()
    before = copy.deepcopy(model)
    optimizer = AdamW(model.parameters())
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    state = TrainState(model, optimizer, PLATEAU, 1e-2)
    for call in (
        *(lambda options=options: staged.grow(model, **options) for options in ({"width": 2}, {"depth": 2}, {})),
        *(lambda start=start: run(start, [Stage(1)], folder=tmp_path / "run") for start in (model, state)),
    ):
        with pytest.raises(InvalidInput, match=r"wte.weight is a DTensor, so the model is sharded .*full_state_dict"):
            call()
    assert not (tmp_path / "run").exists()
    whole = GPT2LMHeadModel(model.config).double()
    whole.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
    assert same(run(whole, [Stage(1)]), run(before, [Stage(1)]))


def test_a_sharded_layer_alone_is_refused(group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = plain.tiny_gpt2(tie_word_embeddings=False)
    parallelize_module(model, init_device_mesh("cpu", (1,)), {"lm_head": ColwiseParallel()})
    with pytest.raises(InvalidInput, match="lm_head.weight is a DTensor"):
        staged.grow(model, width=2)


def test_an_optimizer_of_another_model_is_refused_before_training(tmp_path):
    model, other = plain.tiny_gpt2(), plain.trained()[1]
    with pytest.raises(InvalidInput, match="belongs to another model"):
        run(TrainState(model, other, PLATEAU, 1e-2), [Stage(1)], folder=tmp_path / "run")
    with pytest.raises(InvalidInput, match="found SGD"):
        run(TrainState(model, torch.optim.SGD(model.parameters()), PLATEAU, 1e-2), [Stage(1)])
    assert not (tmp_path / "run").exists()
    trained = run(config(), [Stage(1)])
    assert torch.isfinite(weights(trained)).all() and torch.isfinite(moments(trained)).all()
