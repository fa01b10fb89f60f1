"""The fingerprint of a run: a folder is refused, by name, for whatever changes the curve, and for nothing else."""

import dataclasses
import json
import re

import pytest
import torch
from torch import nn
from torch.optim import AdamW
from transformers import GPT2LMHeadModel
from workers import staged_train as worker

from effnn.base import InvalidInput
from effnn.staged import Stage, TrainState
from effnn.staged.training.checkpoints import checkpoint, fingerprint

STAGES = [Stage(2)]
HOW = worker.recipe(checkpoint_every=None, evaluate_every=100)


def state() -> TrainState:
    """A model with an AdamW of two groups that has stepped."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(worker.config())
    names = [name for name, _ in model.named_parameters()]
    ours = [[model.get_parameter(name) for name in part] for part in (names[:4], names[4:])]
    groups = [{"params": ours[0]}, {"params": ours[1], "lr": 2e-3}]
    optimizer = AdamW(groups, lr=1e-3, betas=HOW.betas, eps=HOW.eps, weight_decay=0.0)
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(5.0),
            "exp_avg": torch.full_like(parameter, 1e-3),
            "exp_avg_sq": torch.full_like(parameter, 1e-5),
        }
    return TrainState(model, optimizer, HOW.schedule, 1e-3, step=5, position=5)


def run(folder, start=None, **options):
    options = {"stages": STAGES, "how": HOW, **options}
    return worker.run(folder, start or state(), **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("same") / "run"
    run(folder)
    return folder


def group(number: int, **settings):
    return lambda start: start.optimizer.param_groups[number].update(settings)


def of(start: TrainState, name: str) -> dict:
    return start.optimizer.state[start.model.get_parameter(name)]


def move_to_the_other_group(start: TrainState) -> None:
    one, two = start.optimizer.param_groups
    two["params"].append(one["params"].pop())


def no_dropout(start: TrainState) -> None:
    for module in start.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


WPE, LAST = "transformer.wpe.weight", "transformer.h.1.mlp.c_proj.bias"
CHANGES = [
    (group(0, lr=1e-2), "group 0 peak rate was 0.001, is 0.01"),
    (group(1, weight_decay=0.1), "group 1 weight_decay was 0.0, is 0.1"),
    (group(1, betas=(0.8, 0.9)), r"group 1 betas was \(0.9, 0.98\), is \(0.8, 0.9\)"),
    (group(0, eps=1e-8), "group 0 eps was 1e-06, is 1e-08"),
    (group(0, amsgrad=True), "group 0 amsgrad was False, is True"),
    (group(0, maximize=True), "group 0 maximize was False, is True"),
    (move_to_the_other_group, "group 0 parameters was 4 parameters .*, is 3 parameters"),
    (lambda start: start.optimizer.state.clear(), f"step of {WPE} was 5.0, is absent|more differences"),
    (lambda start: of(start, WPE).update(step=torch.tensor(6.0)), f"step of {WPE} was 5.0, is 6.0. Give"),
    (lambda start: of(start, LAST)["exp_avg"].mul_(2), f"exp_avg of {LAST} was 16 float32"),
    (lambda start: of(start, LAST)["exp_avg_sq"].mul_(2), f"exp_avg_sq of {LAST} was"),
    (lambda start: start.model.get_parameter(LAST).data.add_(1), f"weights of {LAST} was 16 float32"),
    (lambda start: start.model.get_parameter(WPE).requires_grad_(False), f"training of {WPE} was absent, is frozen"),
    (no_dropout, "setting transformer.drop.p was absent, is 0.0; .*; and 3 more differences"),
    (lambda start: setattr(start.model.transformer.ln_f, "eps", 1e-3), "setting transformer.ln_f.eps was absent"),
    (lambda start: start.model.activation_checkpointing_enable(), "checkpointing of transformer was absent"),
    (lambda start: start.model.set_attn_implementation("eager"), "attention implementation was sdpa, is eager"),
    (lambda start: setattr(start, "position", 6), "start's position was 5, is 6"),
    (lambda start: setattr(start, "learning_rate", 2e-3), "start's peak rate was 0.001, is 0.002"),
    (lambda start: setattr(start, "rewarm", (4, 8)), r"start's rewarm was None, is \(4, 8\)"),
    (lambda start: setattr(start, "flops", 7), "start's flops was 0, is 7"),
    (lambda start: setattr(start, "loss_sum", 7.0), "start's loss_sum was 0.0, is 7.0"),
]


@pytest.mark.parametrize(("change", "sentence"), CHANGES)
def test_another_start_is_refused_and_what_differs_is_named(finished, change, sentence):
    start = state()
    change(start)
    with pytest.raises(InvalidInput, match=rf"holds another run: .*({sentence})"):
        run(finished, start)


def test_other_checkpointing_arguments_are_another_run(tmp_path):
    start = state()
    start.model.activation_checkpointing_enable({"use_reentrant": False})
    run(tmp_path, start)
    start.model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(InvalidInput, match=r"transformer was checkpoint\(use_reentrant=False\), is .*=True"):
        run(tmp_path, start)


def test_other_data_stages_and_recipes_are_another_run(finished, monkeypatch):
    with pytest.raises(InvalidInput, match="training tokens was"):
        run(finished, tokens=worker.TOKENS.roll(1))
    with pytest.raises(InvalidInput, match="stage 0 was .*noise=None.* is .*noise=0.1"):
        run(finished, stages=[Stage(2, noise=0.1)])
    for name, value in {"clip": 0.6, "seed": 1, "evaluate_every": 3, "evaluate_sequences": 8}.items():
        with pytest.raises(InvalidInput, match=f"{name} was .*, is {value}. Give"):
            run(finished, how=dataclasses.replace(HOW, **{name: value}))
    monkeypatch.setattr(worker, "VALIDATION", worker.VALIDATION.roll(1))
    with pytest.raises(InvalidInput, match="validation tokens was"):
        run(finished)


def test_a_model_is_no_state_and_its_weights_count(tmp_path, finished):
    with pytest.raises(InvalidInput, match="start was a TrainState, is a GPT2LMHeadModel"):
        run(finished, state().model)
    run(tmp_path, state().model)
    other = state().model
    other.transformer.wte.weight.data[0, 0] += 1e-3
    with pytest.raises(InvalidInput, match="another run: weights of transformer.wte.weight was 40x16 float32"):
        run(tmp_path, other)


def train_mode(start: TrainState) -> None:
    start.model.train()
    start.model.transformer.drop.eval()


SAME = [
    train_mode,
    lambda start: [group.update(initial_lr=group["lr"], lr=7.0) for group in start.optimizer.param_groups],
    lambda start: group(0, betas=list(HOW.betas))(start),
    lambda start: setattr(start, "seconds", 9.0),
    lambda start: [setattr(parameter, "grad", torch.ones_like(parameter)) for parameter in start.model.parameters()],
]


@pytest.mark.parametrize("change", SAME)
def test_what_does_not_decide_the_curve_is_the_same_run(finished, change):
    start = state()
    change(start)
    assert run(finished, start).step == 7


def test_the_same_run_in_other_words(finished):
    how = dataclasses.replace(HOW, betas=list(HOW.betas), keep=9, checkpoint_every=1, micro_batch=2)
    for tokens in (worker.TOKENS.to(torch.uint8), worker.TOKENS.numpy().astype(">u4"), worker.TOKENS.tolist()):
        assert run(finished, how=how, tokens=tokens).step == 7


def test_long_arrays_are_sampled_from_end_to_end(monkeypatch):
    monkeypatch.setattr(fingerprint, "WHOLE", 2**12)
    tokens = torch.arange(2**14) % 40
    before = fingerprint._tokens(tokens)
    changed = []
    for place in range(0, len(tokens), 16):
        other = tokens.clone()
        other[place] += 1
        changed.append(fingerprint._tokens(other) != before)
    assert changed[0] and changed[-1] and sum(changed) == len(changed) // 4
    assert all(any(changed[i : i + 32]) for i in range(0, len(changed), 32))
    assert re.fullmatch(r"16384 tokens [0-9a-f]{16}", before)


@dataclasses.dataclass
class Rates:
    """A schedule that does not show what it gives."""

    factors: list[float] = dataclasses.field(repr=False)

    def __call__(self, position: int) -> float:
        return self.factors[position]


@pytest.mark.parametrize("wrap", [Rates, lambda factors: lambda position: factors[position]])
@pytest.mark.parametrize(
    ("start", "stages", "last"),
    [
        (None, [Stage(3000)], 3000),
        (None, [Stage(2), Stage(0, entry=7), Stage(3), Stage(4, entry=1)], 10),
        (None, [Stage(3, rewarm=9)], 9),
        (TrainState(None, None, HOW.schedule, 1e-3, position=5), [Stage(2)], 7),
        (TrainState(None, None, HOW.schedule, 1e-3, position=5, rewarm=(4, 8)), [Stage(2)], 12),
    ],
)
def test_a_schedule_is_known_by_every_value_that_the_run_asks_for(wrap, start, stages, last):
    assert fingerprint._last_position(start or worker.config(), stages) == last
    factors = [1.0] * (last + 1)
    same = fingerprint._schedule(wrap(factors), last)
    assert same == fingerprint._schedule(wrap(factors + [0.5]), last)
    for position in {0, 1, last // 3, last - 1, last}:
        other = factors[:position] + [0.5] + factors[position + 1 :]
        assert fingerprint._schedule(wrap(other), last) != same, position


def test_a_field_that_a_dataclass_does_not_show_is_another_run(tmp_path):
    run(tmp_path, how=dataclasses.replace(HOW, schedule=Rates([1.0] * 8)))
    with pytest.raises(InvalidInput, match=r"schedule was (Rates\(\), values to position 7) \w+, is \1 \w+. Give"):
        run(tmp_path, how=dataclasses.replace(HOW, schedule=Rates([1.0] * 7 + [0.5])))


def test_folders_of_an_older_format_are_named(tmp_path):
    run(tmp_path)
    path = tmp_path / "step-00000007-stage-00" / "state.json"
    content = json.loads(path.read_text())
    content["format"] = "effnn staged run 2"
    content.pop("digest")
    path.write_text(json.dumps({**content, "digest": checkpoint._digest(content)}))
    with pytest.raises(InvalidInput, match="of the format 'effnn staged run 2', expected 'effnn staged run 3'"):
        run(tmp_path)
