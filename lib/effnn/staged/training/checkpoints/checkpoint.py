"""Checkpoints of a staged run: written whole or not at all, checked before use, and never of another run.

    folder/step-00000500-stage-01/
      model/          save_pretrained: loads in stock transformers
      optimizer.pt    AdamW by parameter names (optimizer_file.py)
      state.json      everything else, the run's fingerprint, and size and SHA-256 of every file

A checkpoint is written under a temporary name, flushed to the disk, and renamed; a run that is killed leaves at most
a `.tmp-checkpoint-*` folder, which the next run removes. The schedule and the settings on the modules come from the
call, never from a file. One process at a time may write to a folder (a lock, held by rank 0 under torchrun), and all
ranks must see the folder. A finished run is only read; one that a stop rule ended is not finished, and can go on.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging as transformers_logging

from effnn.base import InvalidInput, folder_lock, sha256_file, temporary_folder, write_json, writing
from effnn.staged.growth.module_settings import carry_over
from effnn.staged.training.begin import origin_of, schedule_in_force
from effnn.staged.training.checkpoints.optimizer_file import load_optimizer, save_optimizer
from effnn.staged.training.ranks import Ranks
from effnn.staged.training.state import Point, Recipe, Stage, TrainState

_FORMAT = "effnn staged run 3"
_SHOWN = 4
"""So many differences between two runs are named in a message."""
_NAME = re.compile(r"step-(\d{8,})-stage-(\d{2,})")
_TEMPORARY = ".tmp-checkpoint-"
_NUMBERS = (
    *("learning_rate", "step", "position", "stage", "stage_step", "tokens", "flops", "flops_full", "seconds"),
    *("loss_sum", "loss_count"),
)


class Checkpoints:
    """The checkpoints of one run in one folder.

    folder: where they are.
    fingerprint: of this run; a folder with another one is refused.
    recipe: its schedule is given to a state that is read; `keep` checkpoints stay.
    ranks: rank 0 writes, all read.
    start, stages: of the call; settings on the modules come from there.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: dict[str, str],
        recipe: Recipe,
        ranks: Ranks,
        start: GPT2Config | GPT2LMHeadModel | TrainState,
        stages: Sequence[Stage],
    ) -> None:
        self.folder, self.fingerprint, self.recipe, self.ranks = folder, fingerprint, recipe, ranks
        self.start, self.stages = start, stages

    @contextmanager
    def opened(self) -> Iterator[tuple[TrainState, str | None] | None]:
        """The state of the newest checkpoint, and how the run had ended there (`write`); None without a checkpoint.

        Inside the block the folder is locked for this run. Raises InvalidInput, on all ranks, for a folder that another
        process uses, a damaged checkpoint and one of another run, and CannotWrite for a folder that cannot be written.
        """
        with ExitStack() as held:
            found = self.ranks.first(lambda: self._newest(held))
            yield None if found is None else self.ranks.each(lambda: self._read(Path(found)))

    def write(self, state: TrainState, ended: str | None) -> None:
        """Write a checkpoint on rank 0, then remove all but the newest `keep`; an error is raised on all ranks.

        ended: "finished" after the last step of the last stage, "stopped" where a stop rule ended the run, or None.
        """
        self.ranks.first(lambda: self._write(state, ended))

    def describe(self) -> str:
        """Which checkpoint there is, in words."""
        found = _sorted(self.folder)
        return f"the last checkpoint is {found[-1]}" if found else f"{self.folder} holds no checkpoint yet"

    def _newest(self, held: ExitStack) -> str | None:
        """Path of the newest checkpoint, which is whole and of this run.

        Unless it is the end of the run, the folder is locked, and unfinished checkpoints are removed.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise InvalidInput(f"{self.folder} is a file: give a folder for the checkpoints")
        if not _finished(self.folder):
            with writing(self.folder, "free some space there, or give another folder"):
                self.folder.mkdir(parents=True, exist_ok=True)
                self._hold(held)
            for left in self.folder.glob(f"{_TEMPORARY}*"):
                shutil.rmtree(left, ignore_errors=True)
        found = _sorted(self.folder)
        if not found:
            return None
        content = _checked(found[-1])
        if differing := _differences(content["fingerprint"], self.fingerprint):
            raise InvalidInput(
                f"{self.folder} holds another run: {differing}. Give another folder, or delete this one to start anew"
            )
        return str(found[-1])

    def _hold(self, held: ExitStack) -> None:
        try:
            held.enter_context(folder_lock(self.folder))
        except InvalidInput as error:
            if self.ranks.size == 1 and os.environ.get("WORLD_SIZE", "1") != "1":
                raise InvalidInput(
                    f"{error}. Under torchrun, call torch.distributed.init_process_group() before `train`: its "
                    "processes then share one run"
                ) from None
            raise

    def _read(self, path: Path) -> tuple[TrainState, str | None]:
        content = json.loads((path / "state.json").read_text(encoding="utf-8"))
        with _no_progress_bars():
            model = self._kind().from_pretrained(
                path / "model", dtype="auto", attn_implementation=content["attention"], local_files_only=True
            )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in content["frozen"])
        self._set_modules(model, content["stage"])
        model = model.to(self.ranks.device)
        optimizer = load_optimizer(path / "optimizer.pt", model)
        rewarm = None if content["rewarm"] is None else tuple(content["rewarm"])
        schedule = schedule_in_force(self.recipe.schedule, rewarm)
        points = [Point(**point) for point in content["points"]]
        numbers = {name: content[name] for name in _NUMBERS}
        state = TrainState(model, optimizer, schedule, rewarm=rewarm, points=points, **numbers)
        return state, content["ended"]

    def _model_at_start(self) -> GPT2LMHeadModel | None:
        return None if isinstance(self.start, GPT2Config) else getattr(self.start, "model", self.start)

    def _kind(self) -> type[GPT2LMHeadModel]:
        model = self._model_at_start()
        return GPT2LMHeadModel if model is None else type(model)

    def _set_modules(self, model: GPT2LMHeadModel, stage: int) -> None:
        """The settings on the modules at the start of the run, carried over the growth up to this stage."""
        if (first := self._model_at_start()) is not None:
            before = self.start.stage + 1 if isinstance(self.start, TrainState) else 0
            carry_over(first, model, origin_of(first.config.n_layer, self.stages[: stage + 1 - before]))

    def _write(self, state: TrainState, ended: str | None) -> None:
        goes_on = "goes on from it" if _sorted(self.folder) else "begins anew"
        with writing(
            f"the checkpoint of step {state.step} in {self.folder}",
            f"{self.describe()}; free some space there, and the same call {goes_on}",
        ):
            self._write_all(state, ended)

    def _write_all(self, state: TrainState, ended: str | None) -> None:
        target = self.folder / f"step-{state.step:08d}-stage-{state.stage:02d}"
        if target.exists():
            raise InvalidInput(f"{target} exists already: another run writes to this folder. Give each its own")
        with temporary_folder(self.folder, _TEMPORARY) as temporary:
            with _no_progress_bars():
                state.model.save_pretrained(temporary / "model")
            save_optimizer(temporary / "optimizer.pt", state.model, state.optimizer)
            content = {
                "format": _FORMAT,
                "ended": ended,
                **{name: getattr(state, name) for name in _NUMBERS},
                "rewarm": state.rewarm,
                "frozen": [name for name, p in state.model.named_parameters() if not p.requires_grad],
                "attention": state.model.config._attn_implementation,
                "points": [asdict(point) for point in state.points],
                "fingerprint": self.fingerprint,
                "files": {
                    str(file.relative_to(temporary)): [file.stat().st_size, sha256_file(file)]
                    for file in _files(temporary)
                },
            }
            write_json(temporary / "state.json", {**content, "digest": _digest(content)})
            temporary.chmod(0o755)
            for path in (*_files(temporary), temporary / "model", temporary):
                _flush(path)
            temporary.rename(target)
            _flush(self.folder)
        for old in _sorted(self.folder)[: -self.recipe.keep]:
            # renamed first: a checkpoint that is half deleted must not look like a damaged one
            shutil.rmtree(old.rename(old.with_name(f"{_TEMPORARY}old-{old.name}")), ignore_errors=True)


def _sorted(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    found = [(match, path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, key=lambda item: (int(item[0][1]), int(item[0][2])))]


def _finished(folder: Path) -> bool:
    """Whether the newest checkpoint says that it is the end of its run; whether it is whole is checked later."""
    try:
        content = json.loads((_sorted(folder)[-1] / "state.json").read_text(encoding="utf-8"))
        return content["ended"] == "finished" and content["format"] == _FORMAT
    except (IndexError, OSError, ValueError, KeyError, TypeError):
        return False


def _checked(path: Path) -> dict:
    """The content of state.json; InvalidInput names a file that is missing or is not as it was written."""
    remedy = f"Delete {path} to go on from the checkpoint before it, or from the beginning if there is none"
    try:
        content = json.loads((path / "state.json").read_text(encoding="utf-8"))
        digest = content.pop("digest")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InvalidInput(f"{path / 'state.json'} is damaged ({type(error).__name__}). {remedy}") from None
    if digest != _digest(content):
        raise InvalidInput(f"{path / 'state.json'} is damaged. {remedy}")
    if (found := content.get("format")) != _FORMAT:
        raise InvalidInput(
            f"{path / 'state.json'} is of the format {found!r}, expected {_FORMAT!r}: go on with the version of effnn "
            "that wrote it, or give another folder"
        )
    for name, (size, digest) in content["files"].items():
        file = path / name
        if not file.is_file():
            raise InvalidInput(f"{file} is missing. {remedy}")
        if file.stat().st_size != size or sha256_file(file) != digest:
            raise InvalidInput(f"{file} is damaged: expected {size} bytes as written, found other content. {remedy}")
    return content


def _differences(saved: dict[str, str], wanted: dict[str, str]) -> str:
    # in the order of the fingerprint: of interest first
    names = [name for name in {**wanted, **saved} if saved.get(name) != wanted.get(name)]
    shown = (f"{name} was {saved.get(name, 'absent')}, is {wanted.get(name, 'absent')}" for name in names[:_SHOWN])
    more = f"; and {len(names) - _SHOWN} more differences" if len(names) > _SHOWN else ""
    return "; ".join(shown) + more


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """transformers shows a bar for every file that it reads or writes."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
