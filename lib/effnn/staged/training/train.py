"""Training in stages: train, grow the whole training state, train on (Shen et al. 2022).

    small = train(config, [Stage(800)], recipe, tokens, validation)
    grown = train(small, [Stage(400, width=2)], recipe, tokens, validation)       # `small` is as it was:
    longer = train(small, [Stage(400)], recipe, tokens, validation)               # both branch off from it

A stage does, in this order:
  1. grow model and AdamW (grow.py); set the peak rate, the position in the schedule and its re-warm;
  2. evaluate if it has grown: the loss right after growth is in the curve;
  3. take steps; evaluate every `evaluate_every` of them, and at the end;
  4. write a checkpoint (checkpoint.py), also every `checkpoint_every` steps.

Batches and dropout depend on the seed and the step alone, so a run that is killed goes on from its last checkpoint to
the same bits. Under torchrun every rank calls `train` with the same arguments and takes its share of every batch. When
to grow is not decided here: see slope.py and projection.py.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

from effnn.base import InvalidInput
from effnn.staged.planning.flops import Shape, training_flops
from effnn.staged.training.batches import Batches, mixed_seed, validation_windows
from effnn.staged.training.begin import begin, checked_stages, config_of, enter, plain_start
from effnn.staged.training.checkpoints.checkpoint import Checkpoints
from effnn.staged.training.checkpoints.fingerprint import fingerprint
from effnn.staged.training.ranks import Ranks
from effnn.staged.training.state import Diverged, Point, Recipe, Stage, TrainState
from effnn.staged.training.step import Stepper, validation_loss

LOOK_EVERY = 64
"""At least every so many steps the losses are fetched from the device; a loss that is not finite is found then."""


def train(
    start: GPT2Config | GPT2LMHeadModel | TrainState,
    stages: Sequence[Stage],
    recipe: Recipe,
    train_tokens: object,
    validation_tokens: object,
    *,
    folder: str | Path | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
    stop: Callable[[Point], bool] | None = None,
) -> TrainState:
    """The training state after `stages`; `start` is not changed, nor are the global random generators.

    start: a configuration (weights drawn from recipe.seed; its first stage cannot grow), a model (with a new AdamW), or
    a state, which goes on with its own AdamW and its own peak rate; wrappers of torch or accelerate are opened
    (unwrap.py). Every module is put into train mode.
    stages: done one after the other; one call with two stages is two calls with one.
    recipe: how every stage is trained.
    train_tokens, validation_tokens: 1-D token ids: tensors, NumPy arrays, memory maps or lists (token_arrays.py).
    folder: for checkpoints. The same call again goes on from the newest one, and only loads the result if the run had
    finished. One process at a time may use it, and all ranks must see it.
    device: "cuda" is the device of LOCAL_RANK under torchrun.
    progress: whether rank 0 shows a bar.
    stop: asked after every evaluation, on rank 0; True ends the run there. It is not part of the run's fingerprint: a
    run that it ended goes on in its folder where a later call does not stop at the same point.

    With dropout another number of ranks draws other masks; without, the curve is the same up to rounding.

    Raises InvalidInput for arguments that contradict each other, a folder of another run or in use by another process,
    a damaged checkpoint and tokens outside the vocabulary, Diverged (an InvalidInput) for a loss that is not finite,
    and CannotWrite if a checkpoint cannot be written: the message names the newest one.
    """
    ranks = Ranks.current(device)
    with _own_random_state(ranks.device):
        run = _Run(plain_start(start), stages, recipe, train_tokens, validation_tokens, folder, ranks, stop)
        return run(progress and ranks.rank == 0)


class _Run:
    """One call of `train`: its arguments, and the state that changes."""

    def __init__(self, start, stages, recipe, train_tokens, validation_tokens, folder, ranks, stop) -> None:
        self.stages, self.recipe, self.ranks, self.stop = checked_stages(start, stages, recipe), recipe, ranks, stop
        config = config_of(start)
        if recipe.context > config.n_positions:
            raise InvalidInput(
                f"a context of {recipe.context} tokens is more than the model's n_positions={config.n_positions}"
            )
        self.batches = Batches(train_tokens, recipe.batch_size, recipe.context, config.vocab_size, recipe.seed)
        windows = validation_windows(validation_tokens, recipe.evaluate_sequences, recipe.context, config.vocab_size)
        self.windows = windows.to(ranks.device)
        self.rows = recipe.micro_batch or max(recipe.batch_size // ranks.size, 1)
        self.start, self.checkpoints = start, None
        if folder is not None:
            found = ranks.first(lambda: fingerprint(start, self.stages, recipe, train_tokens, validation_tokens))
            self.checkpoints = Checkpoints(Path(folder).expanduser(), found, recipe, ranks, start, self.stages)

    def __call__(self, progress: bool) -> TrainState:
        with self.checkpoints.opened() if self.checkpoints else nullcontext() as newest:
            return self._go_on(newest, progress)

    def _go_on(self, newest: tuple[TrainState, str | None] | None, progress: bool) -> TrainState:
        self.state, ended = newest or (begin(self.start, self.recipe, self.ranks.device), None)
        first = self.start.stage + 1 if isinstance(self.start, TrainState) else 0
        before = self.start.step if isinstance(self.start, TrainState) else 0
        total, done = sum(stage.steps for stage in self.stages), self.state.step - before
        if not (ended == "finished" or (ended == "stopped" and self._stops())):
            with tqdm(total=total, initial=done, disable=not progress, unit="step") as self.bar:
                for number, stage in enumerate(self.stages, start=first):
                    here = number == self.state.stage
                    if number < self.state.stage or (here and self.state.stage_step == stage.steps):
                        continue
                    stopped = self._stage(stage, resumed=here)
                    last = number == first + len(self.stages) - 1 and self.state.stage_step == stage.steps
                    if stage.steps or last or stopped:
                        self._checkpoint("finished" if last else "stopped" if stopped else None)
                    if stopped:
                        break
        self.state.optimizer.zero_grad()
        self.state.model.eval()
        return self.state

    def _stage(self, stage: Stage, resumed: bool) -> bool:
        """Do the rest of one stage; returns whether the stop rule ended it."""
        state, recipe = self.state, self.recipe
        if not resumed:
            enter(state, stage, recipe, self.windows[: self.rows, :-1])
        self.ranks.check_equal("the model", _checksum(state.model))
        stepper = Stepper(state, recipe, self.ranks)
        shape, each = Shape.of(state.model.config), recipe.batch_size * recipe.context
        flops, flops_full = (training_flops(shape, each, recipe.context, kind) for kind in ("non-embedding", "full"))
        self.bar.set_description(f"stage {state.stage}: {shape.layers} x {shape.width}")
        if not resumed and (stage.grows or not state.points) and self._evaluate():
            return True
        # without dropout nothing is drawn, so nothing needs a seed
        dropout = any(module.p > 0 for module in state.model.modules() if isinstance(module, torch.nn.Dropout))
        losses, since = [], time.perf_counter()
        while state.stage_step < stage.steps:
            if dropout:
                _seed(mixed_seed(recipe.seed, state.step, self.ranks.rank), self.ranks.device)
            losses.append(stepper(self.batches(state.step)))
            state.step += 1
            state.stage_step += 1
            state.position += 1
            state.tokens += each
            state.flops += flops
            state.flops_full += flops_full
            self.bar.update()
            end = state.stage_step == stage.steps
            evaluate = end or state.step % recipe.evaluate_every == 0
            checkpoint = recipe.checkpoint_every is not None and state.step % recipe.checkpoint_every == 0
            if evaluate or checkpoint or state.step % LOOK_EVERY == 0:
                self._look(losses)
                state.seconds += time.perf_counter() - since
                if evaluate and self._evaluate():
                    return True
                if checkpoint and not end:
                    self._checkpoint(None)
                losses, since = [], time.perf_counter()
        return False

    def _look(self, losses: list[torch.Tensor]) -> None:
        """Fetch the losses of the steps since the last look, add them up over the ranks, and check them."""
        values = self.ranks.sum(torch.stack(losses).tolist())
        first = self.state.step - len(values)
        for step, value in enumerate(values, start=first):
            value /= self.ranks.size
            if not math.isfinite(value):
                raise self._diverged(f"the training loss is {value} at step {step}")
            self.state.loss_sum += value
        self.state.loss_count += len(values)
        self.bar.set_postfix(loss=f"{values[-1] / self.ranks.size:.3f}", refresh=False)

    def _evaluate(self) -> bool:
        """Append a point to the curve; returns the answer of the stop rule to it."""
        state = self.state
        loss = validation_loss(state.model, self.windows, self.rows, self.recipe.precision, self.ranks)
        if not math.isfinite(loss):
            raise self._diverged(f"the validation loss is {loss} after step {state.step}")
        point = Point(
            step=state.step,
            stage=state.stage,
            tokens=state.tokens,
            flops=state.flops,
            flops_full=state.flops_full,
            seconds=state.seconds,
            validation_loss=loss,
            train_loss=state.loss_sum / state.loss_count if state.loss_count else None,
            learning_rate=state.learning_rate * state.schedule(state.position),
            layers=state.model.config.n_layer,
            width=state.model.config.n_embd,
        )
        state.points.append(point)
        state.loss_sum, state.loss_count = 0.0, 0
        return self._stops()

    def _stops(self) -> bool:
        """The answer of the stop rule to the newest point, the same on all ranks."""
        return self.stop is not None and self.ranks.first(lambda: bool(self.stop(self.state.points[-1])))

    def _checkpoint(self, ended: str | None) -> None:
        if self.checkpoints is None:
            return
        if not math.isfinite(_checksum(self.state.model)):
            raise self._diverged(f"a weight is not finite after step {self.state.step}")
        self.checkpoints.write(self.state, ended)

    def _diverged(self, what: str) -> Diverged:
        left = "no folder for checkpoints was given" if self.checkpoints is None else self.checkpoints.describe()
        return Diverged(f"{what}: lower the learning rate, warm up longer, or set `clip`; {left}")


def _checksum(model: GPT2LMHeadModel) -> float:
    """A number that is almost surely another for another model; not finite if a weight is not."""
    with torch.no_grad():
        return float(torch.stack([p.double().sum() + p.double().square().sum() for p in model.parameters()]).sum())


def _seed(seed: int, device: torch.device) -> None:
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


@contextmanager
def _own_random_state(device: torch.device) -> Iterator[None]:
    """In the block the CUDA device of the run is the current one; afterwards the global generators are as before."""
    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with on_device, torch.random.fork_rng(devices=[device.index] if device.type == "cuda" else []):
        yield
