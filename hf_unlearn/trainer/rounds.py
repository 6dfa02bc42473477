"""Unlearning in rounds: memorise, walk a small step away, memorise what the model still knows, and so on."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
from accelerate.utils import broadcast_object_list
from peft import LoraConfig
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from hf_unlearn.data.loading import load_rows
from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation.adapter import ADAPTER_WEIGHTS_FILE, LoraAdapter
from hf_unlearn.extrapolation.fingerprint import is_quantised
from hf_unlearn.extrapolation.operators import sum_of_rounds
from hf_unlearn.extrapolation.provenance import read_provenance, write_provenance
from hf_unlearn.extrapolation.sharded import failing_together
from hf_unlearn.trainer.extrapolation_config import ExtrapolationConfig
from hf_unlearn.trainer.extrapolation_trainer import ExtrapolationTrainer
from hf_unlearn.trainer.reference_cache import ReferenceCache
from hf_unlearn.trainer.saving import SAVING, move_files
from hf_unlearn.trainer.sets import SAMPLED_FILE


DEFAULT_ROUND_ALPHA = 0.5
QUANTISED = (
    "Rounds need the weights of each round's forget model, and those of a quantised base are not written. Train on the "
    "16- or 32-bit base (without --load_in_4bit, --load_in_8bit or `quantization_config`), or in one round."
)

_OF_ONE_ROUND = {"trainer_state.json", "training_args.bin"}

TrainRound = Callable[[ExtrapolationTrainer, int, str | None], None]


def train_one_round(trainer: ExtrapolationTrainer, number: int, checkpoint: str | None) -> None:
    """Train round `number`, from a checkpoint of it where there is one."""
    trainer.train(resume_from_checkpoint=checkpoint)


def train_in_rounds(
    model: str | PreTrainedModel,
    args: ExtrapolationConfig,
    forget_dataset: Any,
    retain_dataset: Any = None,
    *,
    rounds: int,
    round_alpha: float = DEFAULT_ROUND_ALPHA,
    trainer_class: type[ExtrapolationTrainer] = ExtrapolationTrainer,
    peft_config: LoraConfig | None = None,
    resume: bool = False,
    overwrite: bool = False,
    train_round: TrainRound = train_one_round,
    **options: Any,
) -> Path:
    """
    Extrapolate in rounds: from θ_0 = θ_ref, round k trains a memorising adapter ΔW_k on θ_(k−1) and walks the step
    θ_k = θ_(k−1) − a·ΔW_k. The reference of every round is the *original* model: what it says of the retain rows is
    computed once, in the first round. Every process has to call it.

    `args.output_dir` becomes one memorising adapter of the *original* base, the exact sum a·ΔW_1 + a·ΔW_2 + ...: α = 1
    is all rounds, and a smaller α walks part of the way. The adapter of each round is in `round-1`, `round-2`, ...; the
    forget model that a round is trained on is its `base`, which is deleted once the next one exists.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]): Model to unlearn from, in 16 or 32 bits.
        args ([`ExtrapolationConfig`]): Options of every round. Its `retain_kl_scale`, if not set, is minus `round_alpha`.
        forget_dataset (`datasets.Dataset`, `str` or list of `dict`): What must go.
        retain_dataset (the same, *optional*): What must stay. Rows sampled from the original model if not given.
        rounds (`int`): Number of rounds, 2 or more.
        round_alpha (`float`, *optional*, defaults to `0.5`): Step a of each round.
        trainer_class (`type`, *optional*, defaults to [`ExtrapolationTrainer`]): Trainer of every round.
        peft_config ([`~peft.LoraConfig`], *optional*): Adapter of a round; the result has `rounds` times its rank.
        resume (`bool`, *optional*, defaults to `False`): Whether to keep the rounds that are finished and go on.
        overwrite (`bool`, *optional*, defaults to `False`): Whether to start anew where there is an earlier run.
        train_round (`Callable`, *optional*): Trains one round, given the trainer, the round's number and a checkpoint of
            it or `None`. What it raises stops the run there.
        options: Further arguments of the trainer, e.g. `processing_class` or `callbacks`.

    Returns:
        `Path`: `args.output_dir`.
    """
    run = _Run(Path(args.output_dir), rounds, round_alpha)
    check_rounds(rounds, round_alpha)
    if not issubclass(trainer_class, ExtrapolationTrainer):
        raise UnlearningError(f"{trainer_class.__name__} does not extrapolate, so it has no rounds. Call its `train`.")
    if options.get("quantization_config") is not None:
        raise UnlearningError(QUANTISED)
    check_rounds_cache(args)
    if args.push_to_hub:
        raise UnlearningError(
            "push_to_hub is not possible with rounds: it would upload each. Upload the result with `hf-unlearn push`."
        )
    if args.retain_kl_scale is None:
        args = dataclasses.replace(args, retain_kl_scale=-round_alpha)  # held where the step of a round ends
    is_main = args.process_index == 0
    plan = [None]
    with failing_together():
        if is_main:
            plan = [run.start(resume, overwrite)]
    first, checkpoint = broadcast_object_list(plan)[0]
    if args.cached_sets:
        args = dataclasses.replace(args, reference_cache=True)

    def trainer_of(number: int, base: str | PreTrainedModel, of_round: ExtrapolationConfig) -> ExtrapolationTrainer:
        sampled = run.sampled_rows(number) if retain_dataset is None else None
        trainer = trainer_class(
            model=base,
            args=dataclasses.replace(of_round, output_dir=str(run.folder(number))),
            forget_dataset=forget_dataset,
            retain_dataset=retain_dataset if sampled is None else sampled,
            peft_config=peft_config,
            **options,
        )
        trainer.sampled_rows = sampled or trainer.sampled_rows
        return trainer

    reference = None
    if 1 < first <= rounds:  # resumed
        reference = _ask(trainer_of(1, model, args))
    for number in range(first, rounds + 1):
        of_round = args if number == 1 else run.options_after_the_first(args, number)
        trainer = trainer_of(number, model if number == 1 else str(run.base(number)), of_round)
        run.check(trainer, number)
        trainer.fixed_reference = reference
        asking = _Asking(trainer)
        trainer.add_callback(asking)
        train_round(trainer, number, checkpoint if number == first else None)
        reference = asking.reference
        run.finish(trainer, number)
        asking.trainer = None
        trainer.accelerator.free_memory()
        del trainer
        gc.collect()
    with failing_together():
        if is_main:
            run.write_result()
    return run.output_dir


class _Asking(TrainerCallback):
    """Keeps what the reference of a trainer says, from the beginning of its training on."""

    def __init__(self, trainer: ExtrapolationTrainer, train: bool = True) -> None:
        self.trainer: ExtrapolationTrainer | None = trainer
        self.train = train
        self.reference: ReferenceCache | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.reference = self.trainer.reference_cache
        if not self.train:
            raise _AskedError


class _AskedError(Exception):
    """The reference was all that was wanted of a training."""


def _ask(trainer: ExtrapolationTrainer) -> ReferenceCache | None:
    """What the reference of an untrained trainer says; it takes no step."""
    asking = _Asking(trainer, train=False)
    trainer.add_callback(asking)
    try:
        trainer.train()
    except _AskedError:
        trainer.accelerator.free_memory()
    asking.trainer = None
    return asking.reference


def check_rounds(rounds: int, round_alpha: float) -> None:
    """Raise unless these are a number of rounds and a step."""
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 2:
        raise UnlearningError(f"rounds={rounds} is not possible. Use 2 or more; one round is an ordinary training.")
    if not 0 < round_alpha < math.inf:
        raise UnlearningError(f"round_alpha={round_alpha} is not possible: it must be a finite number above 0.")


def check_rounds_cache(args: ExtrapolationConfig) -> None:
    """Raise where what the original says of the rows may not be kept."""
    if args.reference_cache is False and args.cached_sets:
        raise UnlearningError(
            "reference_cache=False is not possible with rounds: all of them hold the retain rows to the original model, "
            "which is in memory in the first round alone. Leave `reference_cache` unset."
        )


def check_rounds_folder(output_dir: Path, resume: bool, overwrite: bool) -> None:
    """Raise where there is nothing to resume, or an earlier run that may not be replaced."""
    begun = (output_dir / "round-1").exists()
    if resume and not begun:
        raise UnlearningError(f"--resume: {output_dir} holds no round to go on from. Leave it out to start anew.")
    found = "rounds" if begun else "the adapter" if (output_dir / ADAPTER_WEIGHTS_FILE).exists() else None
    if found and not (resume or overwrite):
        raise UnlearningError(
            f"{output_dir} holds {found} of an earlier run. Pass resume (--resume) to go on with its rounds, overwrite "
            "(--overwrite) to train anew, or another output_dir."
        )


@dataclasses.dataclass(frozen=True)
class _Run:
    """
    The folders of a run in rounds.

    A round is finished when its folder holds the weights of its adapter. The base of the next round is written before
    them and its own base is deleted after them, so whatever a killed run left can be resumed.

    Args:
        output_dir (`Path`): Folder of the result.
        rounds (`int`): Number of rounds.
        alpha (`float`): Step of each.
    """

    output_dir: Path
    rounds: int
    alpha: float

    def folder(self, number: int) -> Path:
        """Folder of a round."""
        return self.output_dir / f"round-{number}"

    def base(self, number: int) -> Path:
        """Folder of the model that a round after the first is trained on."""
        return self.folder(number) / "base"

    def start(self, resume: bool, overwrite: bool) -> tuple[int, str | None]:
        """The first round to train, and its last checkpoint."""
        check_rounds_folder(self.output_dir, resume, overwrite)
        if not resume:
            for folder in self.output_dir.glob("round-[0-9]*"):
                shutil.rmtree(folder)
        first = 1
        while first <= self.rounds and (self.folder(first) / ADAPTER_WEIGHTS_FILE).exists():
            first += 1
        unfinished = self.folder(first)
        return first, get_last_checkpoint(unfinished) if first <= self.rounds and unfinished.is_dir() else None

    def options_after_the_first(self, args: ExtrapolationConfig, number: int) -> ExtrapolationConfig:
        """The options of a round that starts from a folder instead of from the original model."""
        record = read_provenance(self.base(number))
        if not record:
            raise UnlearningError(
                f"{self.base(number)}, the model that round {number} is trained on, is missing. Train anew with "
                "overwrite (--overwrite), or pass the number of rounds that are finished."
            )
        before = LoraAdapter.load(self.folder(number - 1))
        if (record["adapter"]["sha256"], record["alpha"]) != (before.sha256, self.alpha):
            raise UnlearningError(
                f"{self.base(number)} is not the forget model of {before.id} at round_alpha={self.alpha}, but that of "
                f"{record['adapter']['id']} at {record['alpha']}. Resume with the options of the run, or train anew with "
                "overwrite (--overwrite)."
            )
        init = {name: value for name, value in (args.model_init_kwargs or {}).items() if name != "revision"}
        return dataclasses.replace(args, model_init_kwargs=init or None)

    def sampled_rows(self, number: int) -> datasets.Dataset | None:
        """For a later round the retain rows that the first has sampled; `None` where it has sampled none."""
        path = self.folder(1) / SAMPLED_FILE
        return load_rows(str(path), name="retain set") if number > 1 and path.exists() else None

    def check(self, trainer: ExtrapolationTrainer, number: int) -> None:
        """Raise where a round would be another training than the first."""
        if is_quantised(trainer.base_model):
            raise UnlearningError(QUANTISED)
        if number == 1:
            return
        first, now = read_provenance(self.folder(1)), json.loads(json.dumps(trainer.provenance()))
        for part in ("data", "training"):
            names = first[part].keys() | now[part].keys()
            differing = sorted(name for name in names if first[part].get(name) != now[part].get(name))
            if differing:
                raise UnlearningError(
                    f"`{differing[0]}` is another than in {self.folder(1)}, and all rounds are one training. Resume with "
                    "the sets and options of the run, or train anew with overwrite (--overwrite)."
                )

    def finish(self, trainer: ExtrapolationTrainer, number: int) -> None:
        """Write the base of the next round, then the adapter of this one."""
        if number < self.rounds:
            trainer.save_forget_model(self.base(number + 1), alpha=self.alpha, overwrite=True)
        saving = self.folder(number) / SAVING
        trainer.save_model(str(saving))
        trainer.save_state()
        trainer.accelerator.wait_for_everyone()
        with failing_together():
            if trainer.is_world_process_zero():
                if number > 1:
                    self._record_base(saving, number)
                move_files(saving, self.folder(number))
                shutil.rmtree(self.base(number), ignore_errors=True)

    def _record_base(self, folder: Path, number: int) -> None:
        """Say in `unlearning.json` what the base of a round was made from."""
        model, record = read_provenance(self.base(number)), read_provenance(folder)
        record["base"]["forget_model_of"] = {
            "sha256": model["adapter"]["sha256"],
            "alpha": model["alpha"],
            "base_fingerprint": model["base"]["fingerprint"],
        }
        write_provenance(folder, record)

    def write_result(self) -> None:
        """Write the sum of the rounds, with what the folder of the first round has besides its adapter."""
        saving, first = self.output_dir / SAVING, self.folder(1)
        folders = [self.folder(number) for number in range(1, self.rounds + 1)]
        sum_of_rounds(folders, self.alpha).save(saving, overwrite=True)
        of_first = read_provenance(first)
        record = {name: of_first[name] for name in ("data_report", "training")}
        write_provenance(saving, read_provenance(saving) | record)
        for path in first.iterdir():
            if path.is_file() and path.name not in _OF_ONE_ROUND and not (saving / path.name).exists():
                shutil.copyfile(path, saving / path.name)
        for name in _OF_ONE_ROUND:  # of an ordinary training that is overwritten
            (self.output_dir / name).unlink(missing_ok=True)
        move_files(saving, self.output_dir)
