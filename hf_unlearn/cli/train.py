"""`hf-unlearn train`: memorise a forget set with LoRA under the retain KL, or unlearn by another method."""

from __future__ import annotations

import copy
import functools
import os
import signal
import subprocess
from pathlib import Path

from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import get_quantization_config

from hf_unlearn.cli import EXIT_INTERRUPTED, EXIT_OK
from hf_unlearn.cli.common import alone_in, load_tokenizer, refuse_idle
from hf_unlearn.cli.methods import describe, extrapolates, method_of, refuse_options_of_others
from hf_unlearn.cli.parser import CommandParser
from hf_unlearn.cli.terminal import console, json_output, stderr
from hf_unlearn.cli.train_options import (
    DESCRIPTION,
    EXAMPLE,
    OPTIONS_OF_ADAPTERS,
    SHOWN,
    LoraModelConfig,
    TrainArguments,
)
from hf_unlearn.cli.train_plan import checked_data, config_file, dry_run
from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation import custom_protocol
from hf_unlearn.evaluation.batching import parse_batch_size
from hf_unlearn.locks import working_in
from hf_unlearn.trainer import EvaluationCallback, UnlearningConfig, UnlearningTrainer
from hf_unlearn.trainer.baselines import METHODS
from hf_unlearn.trainer.rounds import (
    QUANTISED,
    check_rounds,
    check_rounds_cache,
    check_rounds_folder,
    train_in_rounds,
)
from hf_unlearn.trainer.sets import SAMPLED_FILE


LAUNCHED = "HF_UNLEARN_LAUNCHED"  # set in the processes that `accelerate launch` starts


def run(argv: list[str], says_what_next: bool = True) -> int:
    """Run the command and return its exit code; `says_what_next` is for a command that goes on by itself."""
    method = method_of(argv)
    trainer_class, config_class = METHODS[method]
    options = [TrainArguments, config_class, LoraModelConfig]
    refuse_options_of_others(argv, method, options)
    description = DESCRIPTION if extrapolates(method) else describe(method)
    arguments, config, model = CommandParser("train", options, description, EXAMPLE, SHOWN).parse(argv)
    _check_arguments(arguments, config, model)
    if config.trust_remote_code:
        stderr(f"--trust_remote_code runs code that comes with {model.model_name_or_path}, where there is any.")
    tokenizer = load_tokenizer(model.model_name_or_path, model.model_revision, config.trust_remote_code)
    if arguments.dry_run:
        return dry_run(arguments, config, model, tokenizer)
    launched = LAUNCHED in os.environ
    if arguments.accelerate_config and not launched:
        with working_in(config.output_dir):  # then the main process of those that are launched holds the lock
            checked_data(arguments, config, tokenizer)  # bad rows are named once, not by every process
        code = _launch(arguments.accelerate_config, argv)
        if code == EXIT_OK and says_what_next:
            console.print(_next_step(arguments, config))
        return code
    config = _with_model_options(config, model)
    is_main = config.process_index == 0  # once this is known, all processes know of each other
    with alone_in(config.output_dir):
        code = _train(arguments, config, model, tokenizer, trainer_class)
    if code != EXIT_OK:
        return code
    if is_main:
        if config.push_to_hub:
            console.print(f"Forget adapter at α = {config.alpha:g} uploaded to {config.hub_model_id}.")
        if says_what_next and not launched:
            console.print(_next_step(arguments, config))
    json_output.report(method=arguments.method, output_dir=config.output_dir)
    return EXIT_OK


def _train(
    arguments: TrainArguments,
    config: UnlearningConfig,
    model: LoraModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    trainer_class: type[UnlearningTrainer],
) -> int:
    """Train, in rounds or not, and save; the exit code."""
    interrupt = _Interrupt()
    sets = (arguments.load_required("forget"), arguments.load("retain"))
    options = {
        "processing_class": tokenizer,
        "peft_config": None if config.train_all_weights else model.lora_config(),
        "callbacks": [interrupt],
        "quantization_config": get_quantization_config(model),
    }
    train_round = functools.partial(_train_round, arguments, interrupt)
    try:
        if arguments.rounds > 1:
            plan = {"rounds": arguments.rounds, "round_alpha": arguments.round_alpha, "trainer_class": trainer_class}
            plan |= {"resume": arguments.resume, "overwrite": arguments.overwrite, "train_round": train_round}
            train_in_rounds(model.model_name_or_path, config, *sets, **plan, **options)
        else:
            trainer = trainer_class(model.model_name_or_path, config, *sets, **options)
            train_round(trainer, 1, arguments.resume or None)
            trainer.save_state()
            trainer.save_model()
    except _Interrupted:
        stderr(f"Interrupted; a checkpoint is in {config.output_dir}. Go on with the same command and --resume.")
        return EXIT_INTERRUPTED
    return EXIT_OK


def _train_round(
    arguments: TrainArguments,
    interrupt: _Interrupt,
    trainer: UnlearningTrainer,
    number: int,
    checkpoint: str | bool | None,
) -> None:
    """Train round `number`, or all of a run that has one; say what is trained on, and stop the run after Ctrl-C."""
    if trainer.args.eval_strategy != "no":
        trainer.add_callback(_evaluation_callback(arguments, trainer))
    if trainer.is_world_process_zero():
        if arguments.rounds > 1:
            console.print(f"Round {number} of {arguments.rounds}")
        if number == 1:
            console.print(trainer.data_report.render())
            json_output.report(data=trainer.data_report.to_dict(), warnings=trainer.data_report.warnings())
    with interrupt:
        trainer.train(resume_from_checkpoint=checkpoint)
    json_output.report(log_history=trainer.state.log_history)
    if interrupt.requested:
        raise _Interrupted


def _next_step(arguments: TrainArguments, config: UnlearningConfig) -> str:
    """What was written, and the command that goes on from there."""
    folder, retain = config.output_dir, _retain_source(arguments, config)
    sets = f"--forget_dataset {arguments.forget_dataset} --retain_dataset {retain}"
    if extrapolates(arguments.method):
        what, alphas = "Memorising adapter", ""
        if arguments.rounds > 1:
            what, alphas = f"The sum of {arguments.rounds} memorising adapters", " --alphas 0.25 0.5 0.75 1"
        return (
            f"{what} written to {folder}. Keep it private. Next:\n"
            f"  hf-unlearn sweep --adapter {folder} {sets}{alphas} --output_dir {folder}-sweep"
        )
    what = "model" if config.train_all_weights else "adapter"
    return (
        f"Unlearned {what} ({arguments.method}) written to {folder}; it is the result. Next:\n"
        f"  hf-unlearn eval --{what} {folder} {sets} --output_dir {folder}-eval"
    )


def _retain_source(arguments: TrainArguments, config: UnlearningConfig) -> str:
    """Where the retain rows of the run are for the next command."""
    if arguments.retain_dataset is not None:
        return arguments.retain_dataset
    return f"{config.output_dir}/{SAMPLED_FILE}" if config.uses_retain else "RETAIN"


def _check_arguments(arguments: TrainArguments, config: UnlearningConfig, model: LoraModelConfig) -> None:
    if model.model_name_or_path is None:
        raise UnlearningError("--model_name_or_path is required: a Hub id or a local folder.")
    if config.output_dir is None:
        raise UnlearningError("--output_dir is required: where the adapter and its checkpoints go.")
    if config.eval_strategy == "no":
        options = ("holdout_dataset", "holdout_config", "holdout_split", "eval_alpha", "eval_batch_size")
        refuse_idle(arguments, options, "without --eval_strategy")
    if arguments.retain_dataset is not None or not config.uses_retain:
        why = "with --retain_dataset" if config.uses_retain else "without a retain term"
        refuse_idle(config, ("retain_sample_size", "retain_sample_temperature"), why)
    parse_batch_size(arguments.eval_batch_size, "--eval_batch_size")
    if not extrapolates(arguments.method):
        options = ("eval_alpha", "rounds", "round_alpha")
        refuse_idle(arguments, options, f"with --method {arguments.method}, whose adapter is the result")
    if config.train_all_weights:
        refuse_idle(model, OPTIONS_OF_ADAPTERS, "with --train_all_weights, which trains no adapter")
        if config.eval_strategy != "no":
            raise UnlearningError(
                "--eval_strategy compares with the adapter switched off, and --train_all_weights trains none. Evaluate "
                "the result with `hf-unlearn eval --model`."
            )
    if model.load_in_4bit and model.dtype == "auto":
        raise UnlearningError(
            "--dtype auto does not say in which dtype --load_in_4bit computes. Name float32, bfloat16 or float16."
        )
    if arguments.rounds != 1:
        check_rounds(arguments.rounds, arguments.round_alpha)
        refuse_idle(config, ["push_to_hub"], "with --rounds; upload the result with `hf-unlearn push`")
        if model.load_in_4bit or model.load_in_8bit:
            raise UnlearningError(QUANTISED)
        check_rounds_cache(config)
        check_rounds_folder(Path(config.output_dir), arguments.resume, arguments.overwrite)
        return
    refuse_idle(arguments, ("round_alpha",), "with --rounds 1")
    _check_folder(arguments, Path(config.output_dir))


def _check_folder(arguments: TrainArguments, folder: Path) -> None:
    """Raise where there is nothing to resume, or an earlier run that may not be replaced."""
    checkpoint = get_last_checkpoint(folder) if folder.is_dir() else None
    if arguments.resume and checkpoint is None:
        raise UnlearningError(f"--resume: {folder} holds no checkpoint to go on from. Leave it out to start anew.")
    finished = [name for name in ("adapter", "model") if any(folder.glob(f"{name}*.safetensors"))]
    rounds = (folder / "round-1").exists()
    if (finished or checkpoint or rounds) and not (arguments.resume or arguments.overwrite):
        found = f"the {finished[0]}" if finished else "checkpoints" if checkpoint else "rounds"
        raise UnlearningError(
            f"{folder} holds {found} of an earlier run. Pass --resume to go on with it, --overwrite to train anew, or "
            "another --output_dir."
        )


def _with_model_options(config: UnlearningConfig, model: LoraModelConfig) -> UnlearningConfig:
    config = copy.copy(config)
    config.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(config.model_init_kwargs or {}),
    }
    return config


def _evaluation_callback(arguments: TrainArguments, trainer: UnlearningTrainer) -> EvaluationCallback:
    """Evaluates the sets of the run, as far as there are any."""
    sets = {name: arguments.load(name) for name in ("forget", "retain", "holdout")}
    sets["retain"] = trainer.sampled_rows if sets["retain"] is None else sets["retain"]
    chat = trainer.processing_class.chat_template is not None
    max_length = trainer.args.max_length
    protocol = custom_protocol(
        {name: rows for name, rows in sets.items() if rows is not None}, chat=chat, max_length=max_length
    )
    batch_size = parse_batch_size(arguments.eval_batch_size, "--eval_batch_size")
    alpha = arguments.eval_alpha if extrapolates(arguments.method) else None
    return EvaluationCallback(trainer, protocol, alpha, batch_size=batch_size)


def _launch(accelerate_config: str, argv: list[str]) -> int:
    """Run this command again in the processes that `accelerate launch` starts."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    options = ["--config_file", str(config_file(accelerate_config)), "--module", "hf_unlearn.cli", "train", *argv]
    os.environ[LAUNCHED] = "1"
    try:
        launch_command(launch_command_parser().parse_args(options))
    except subprocess.CalledProcessError as error:
        return error.returncode
    finally:
        del os.environ[LAUNCHED]
    return EXIT_OK


class _Interrupted(Exception):
    """Training was stopped by Ctrl-C, after a checkpoint."""


class _Interrupt(TrainerCallback):
    """On Ctrl-C, finishes the step, saves a checkpoint and stops; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> None:
        self._previous = signal.signal(signal.SIGINT, self._request)

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _request(self, signum: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        stderr("Stopping after this step; a checkpoint will be saved. Press Ctrl-C again to stop at once.")

    def on_step_end(self, args, state, control, **kwargs):
        if self.requested:
            args.push_to_hub = False  # not what is half trained
            control.should_save = control.should_training_stop = True
