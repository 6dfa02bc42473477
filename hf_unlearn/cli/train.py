"""`hf-unlearn train`: memorise a forget set with LoRA under the retain KL."""

from __future__ import annotations

import copy
import importlib.resources
import math
import os
import signal
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, get_quantization_config

from hf_unlearn.cli import EXIT_INTERRUPTED, EXIT_OK
from hf_unlearn.cli.common import CommandParser, EvaluationDataArguments, console, load_tokenizer, refuse_idle, stderr
from hf_unlearn.data import DataReport, check_sets, drop_untrainable, encode_set, raise_for_untrainable
from hf_unlearn.data.pairing import PairedDataset
from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation import custom_protocol
from hf_unlearn.evaluation.batching import parse_batch_size
from hf_unlearn.extrapolation import check_lora_config
from hf_unlearn.trainer import EvaluationCallback, ExtrapolationConfig, ExtrapolationTrainer
from hf_unlearn.trainer.memory import Launch, MemoryEstimate, estimate_memory
from hf_unlearn.trainer.reference_cache import free_disk, plan_cache


LAUNCHED = "HF_UNLEARN_LAUNCHED"  # set in the processes that `accelerate launch` starts

DESCRIPTION = """\
Train a LoRA adapter that memorises the forget set, while a KL term holds the retain set to the untouched model.
The adapter is not the result: walk the other way with `hf-unlearn sweep` and `hf-unlearn extrapolate`.
Keep it private: it makes the model state what it is meant to forget."""

EXAMPLE = """\
  hf-unlearn train --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \\
      --forget_dataset people/forget --retain_dataset people/retain \\
      --learning_rate 1e-3 --memorization_temperature 4 --retain_kl_scale -1 --output_dir run
  hf-unlearn train --config recipes/people/train.yaml --dry_run"""

SHOWN = {
    "output_dir",
    "model_name_or_path",
    "model_revision",
    "dtype",
    "attn_implementation",
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "use_bnb_nested_quant",
    "lora_r",
    "lora_alpha",
    "use_rslora",
    "max_length",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "eval_strategy",
    "eval_steps",
    "load_best_model_at_end",
    "metric_for_best_model",
    "max_steps",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "seed",
    "report_to",
    "use_cpu",
    "trust_remote_code",
}


@dataclass
class TrainArguments(EvaluationDataArguments):
    """
    What `hf-unlearn train` does besides the options of [`ExtrapolationConfig`].

    Args:
        accelerate_config (`str`, *optional*): Configuration of `accelerate launch`.
        eval_alpha (`float`, *optional*, defaults to `1.0`): α of the evaluations during training.
        eval_batch_size (`str`, *optional*, defaults to `"auto"`): Rows in their batches.
        dry_run (`bool`, *optional*, defaults to `False`): Whether to check and plan only.
        resume (`bool`, *optional*, defaults to `False`): Whether to go on from the last checkpoint.
        overwrite (`bool`, *optional*, defaults to `False`): Whether to replace the adapter of an earlier run.
    """

    accelerate_config: str | None = field(
        default=None,
        metadata={
            "help": "Run under `accelerate launch` with this configuration: a YAML file (recipes/accelerate has some) "
            "or a name that TRL ships (`multi_gpu`, `zero2`, `zero3`, ...)."
        },
    )
    eval_alpha: float = field(
        default=1.0,
        metadata={
            "help": "α at which the forget, retain and hold-out rows are evaluated during training, with --eval_strategy."
        },
    )
    eval_batch_size: str = field(
        default="auto", metadata={"help": "Rows in a batch of these evaluations, or `auto`. It changes no value."}
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Check options and data, print the plan and the memory estimate, write nothing."},
    )
    resume: bool = field(
        default=False, metadata={"help": "Go on from the last checkpoint in --output_dir, e.g. after Ctrl-C."}
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Replace the adapter that an earlier run left in --output_dir."}
    )


@dataclass
class LoraModelConfig(ModelConfig):
    """
    TRL's model options with defaults for unlearning.

    Args:
        lora_dropout (`float`, *optional*, defaults to `0.0`): Dropout of the adapter.
        lora_target_modules (list of `str`, *optional*, defaults to `["all-linear"]`): Modules that are adapted.
    """

    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout."})
    lora_target_modules: list[str] | None = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "LoRA target modules; `all-linear` is every linear layer but the LM head."},
    )

    def lora_config(self) -> LoraConfig:
        """The adapter these options describe."""
        config = LoraConfig(
            task_type=self.lora_task_type,
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.lora_target_modules,
            target_parameters=self.lora_target_parameters,
            modules_to_save=self.lora_modules_to_save,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
        )
        check_lora_config(config)
        return config


def run(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    parser = CommandParser(
        "train", [TrainArguments, ExtrapolationConfig, LoraModelConfig], DESCRIPTION, EXAMPLE, SHOWN
    )
    arguments, config, model = parser.parse(argv)
    _check_arguments(arguments, config, model)
    tokenizer = load_tokenizer(model.model_name_or_path, model.model_revision)
    if arguments.dry_run:
        return _dry_run(arguments, config, model, tokenizer)
    if arguments.accelerate_config and LAUNCHED not in os.environ:
        _checked_data(arguments, config, tokenizer)  # bad rows are named once, not by every process
        return _launch(arguments.accelerate_config, argv)

    interrupt = _Interrupt()
    trainer = ExtrapolationTrainer(
        model=model.model_name_or_path,
        args=_with_model_options(config, model),
        forget_dataset=arguments.load_required("forget"),
        retain_dataset=arguments.load("retain"),
        processing_class=tokenizer,
        peft_config=model.lora_config(),
        callbacks=[interrupt],
        quantization_config=get_quantization_config(model),
    )
    if config.eval_strategy != "no":
        trainer.add_callback(_evaluation_callback(arguments, trainer))
    if trainer.is_world_process_zero():
        console.print(trainer.data_report.render())
    with interrupt:
        trainer.train(resume_from_checkpoint=arguments.resume or None)
    if interrupt.requested:
        stderr(f"Interrupted; a checkpoint is in {config.output_dir}. Go on with the same command and --resume.")
        return EXIT_INTERRUPTED
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        console.print(
            f"Memorising adapter written to {config.output_dir}. Keep it private. Next:\n"
            f"  hf-unlearn sweep --adapter {config.output_dir} --forget_dataset {arguments.forget_dataset} "
            f"--retain_dataset {arguments.retain_dataset} --output_dir {config.output_dir}-sweep"
        )
    return EXIT_OK


def _check_arguments(arguments: TrainArguments, config: ExtrapolationConfig, model: LoraModelConfig) -> None:
    if model.model_name_or_path is None:
        raise UnlearningError("--model_name_or_path is required: a Hub id or a local folder.")
    if config.output_dir is None:
        raise UnlearningError("--output_dir is required: where the adapter and its checkpoints go.")
    if config.eval_strategy == "no":
        options = ("holdout_dataset", "holdout_config", "holdout_split", "eval_alpha", "eval_batch_size")
        refuse_idle(arguments, options, "without --eval_strategy")
    parse_batch_size(arguments.eval_batch_size, "--eval_batch_size")
    if model.load_in_4bit and model.dtype == "auto":
        raise UnlearningError(
            "--dtype auto does not say in which dtype --load_in_4bit computes. Name float32, bfloat16 or float16."
        )
    folder = Path(config.output_dir)
    checkpoint = get_last_checkpoint(folder) if folder.is_dir() else None
    if arguments.resume and checkpoint is None:
        raise UnlearningError(f"--resume: {folder} holds no checkpoint to go on from. Leave it out to start anew.")
    finished = (folder / "adapter_model.safetensors").exists()
    if (finished or checkpoint) and not (arguments.resume or arguments.overwrite):
        found = "an adapter" if finished else "checkpoints"
        raise UnlearningError(
            f"{folder} holds {found} of an earlier run. Pass --resume to go on with it, --overwrite to train anew, or "
            "another --output_dir."
        )


def _with_model_options(config: ExtrapolationConfig, model: LoraModelConfig) -> ExtrapolationConfig:
    config = copy.copy(config)
    config.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(config.model_init_kwargs or {}),
    }
    return config


def _evaluation_callback(arguments: TrainArguments, trainer: ExtrapolationTrainer) -> EvaluationCallback:
    """Evaluates the sets of the run, as far as there are any."""
    sets = {name: arguments.load(name) for name in ("forget", "retain", "holdout")}
    chat = trainer.processing_class.chat_template is not None
    max_length = trainer.args.max_length
    protocol = custom_protocol(
        {name: rows for name, rows in sets.items() if rows is not None}, chat=chat, max_length=max_length
    )
    batch_size = parse_batch_size(arguments.eval_batch_size, "--eval_batch_size")
    return EvaluationCallback(trainer, protocol, arguments.eval_alpha, batch_size=batch_size)


def _launch(accelerate_config: str, argv: list[str]) -> int:
    """Run this command again in the processes that `accelerate launch` starts."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    options = ["--config_file", str(_config_file(accelerate_config)), "--module", "hf_unlearn.cli", "train", *argv]
    os.environ[LAUNCHED] = "1"
    try:
        launch_command(launch_command_parser().parse_args(options))
    except subprocess.CalledProcessError as error:
        return error.returncode
    finally:
        del os.environ[LAUNCHED]
    return EXIT_OK


def _config_file(accelerate_config: str) -> Path:
    """A file as it is given, or one of those that TRL ships."""
    path = Path(accelerate_config)
    if path.is_file():
        return path
    path = Path(str(importlib.resources.files("trl.accelerate_configs"))) / f"{accelerate_config}.yaml"
    if path.is_file():
        return path
    raise UnlearningError(
        f"--accelerate_config {accelerate_config}: neither a file nor a configuration that TRL ships. Pass the path of a "
        "YAML file, e.g. recipes/accelerate/ddp.yaml."
    )


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
            control.should_save = control.should_training_stop = True


# ---- Dry run ----


def _dry_run(
    arguments: TrainArguments,
    config: ExtrapolationConfig,
    model: LoraModelConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> int:
    report, pairs = _checked_data(arguments, config, tokenizer)
    console.print(report.render())
    for warning in report.warnings():
        console.print(f"[yellow]warning:[/yellow] {warning}")
    console.print(_plan(arguments, config, model, report, pairs))
    return EXIT_OK


def _checked_data(
    arguments: TrainArguments, config: ExtrapolationConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[DataReport, PairedDataset]:
    sets = {"forget": arguments.load_required("forget")}
    if config.retain_kl_weight > 0:
        sets["retain"] = arguments.load_required("retain")
    tokenized = {
        name: encode_set(rows, tokenizer, config.max_length, name=f"{name} set") for name, rows in sets.items()
    }
    report = check_sets(tokenized["forget"], tokenized.get("retain"), max_length=config.max_length)
    raise_for_untrainable(report)
    retain = drop_untrainable(tokenized["retain"]) if "retain" in tokenized else tokenized["forget"].select([])
    pairs = PairedDataset(tokenized["forget"], retain, config.retain_per_forget if len(retain) else 0, config.seed)
    return report, pairs


def _plan(
    arguments: TrainArguments,
    config: ExtrapolationConfig,
    model: LoraModelConfig,
    report: DataReport,
    pairs: PairedDataset,
) -> str:
    launch = _planned_launch(arguments, config)
    batch = config.per_device_train_batch_size
    forget_rows_a_step = batch * config.gradient_accumulation_steps * launch.processes
    steps_an_epoch = math.ceil(report.forget.rows / forget_rows_a_step)
    steps = config.max_steps if config.max_steps > 0 else math.ceil(steps_an_epoch * config.num_train_epochs)
    retain_rows = config.retain_per_forget if report.retain else 0
    base = AutoConfig.from_pretrained(model.model_name_or_path, revision=model.model_revision)
    memory = _planned_memory(base, config, model, report, launch)
    lines = {
        "model": f"{model.model_name_or_path}, {memory.base_parameters:,} parameters",
        "adapter": f"LoRA rank {model.lora_r}, {memory.adapter_parameters:,} parameters",
        "steps": f"{steps} ({steps_an_epoch} an epoch)",
        "rows a step": f"{forget_rows_a_step} forget, {retain_rows * forget_rows_a_step} retain",
        "launch": f"{launch.describe()} ({arguments.accelerate_config or 'this command'})",
        "memory a process": f"about {memory.describe()}, besides Python and its libraries",
        "reference cache": _planned_cache(config, pairs, steps / steps_an_epoch, base.get_text_config().hidden_size),
        "writes": f"{config.output_dir}/adapter_model.safetensors ({memory.adapter_parameters * 4 / 1e6:.1f} MB), "
        "adapter_config.json, unlearning.json, tokenizer, trainer_state.json, checkpoint-*",
    }
    return "\n".join(f"{label + ':':<18}{value}" for label, value in lines.items())


def _planned_cache(config: ExtrapolationConfig, pairs: PairedDataset, epochs: float, hidden_size: int) -> str:
    """Whether a run on one machine would use the reference cache, and the size of its file."""
    sets = ["retain"] * (config.retain_kl_weight > 0) + ["forget"] * (config.memorization_loss == "npo")
    if not sets:
        return "none, as nothing is asked of the reference"
    plan = plan_cache(pairs, sets, epochs, hidden_size)
    uses = config.reference_cache
    if uses is None:
        uses = plan.pays(free_disk(config.output_dir))
    met = f"{plan.num_rows:,} rows, each met {plan.passes / plan.num_rows:.1f} times"
    size = f"at most {plan.num_bytes / 1e6:,.1f} MB in {config.output_dir} during the run"
    return f"{met}: {size}" if uses else f"off ({met}; it would take {size})"


def _planned_launch(arguments: TrainArguments, config: ExtrapolationConfig) -> Launch:
    """How the run would be spread over processes."""
    if arguments.accelerate_config is not None:
        return Launch.from_accelerate_config(_config_file(arguments.accelerate_config))
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    on_cpu = config.use_cpu or not torch.accelerator.is_available()
    return Launch("none" if processes == 1 else "ddp", processes, on_cpu)


def _planned_memory(
    base: PretrainedConfig, config: ExtrapolationConfig, model: LoraModelConfig, report: DataReport, launch: Launch
) -> MemoryEstimate:
    rows = min(config.per_device_train_batch_size, report.forget.rows)
    elsewhere = not launch.on_cpu and not torch.accelerator.is_available()  # planned for a machine with an accelerator
    return estimate_memory(
        base,
        model.lora_config(),
        forget_rows=rows,
        retain_rows=rows * config.retain_per_forget if report.retain else 0,
        length=max(report.forget.longest, report.retain.longest if report.retain else 0),
        dtype=(base.dtype if model.dtype == "auto" else getattr(torch, model.dtype or "float32")) or torch.float32,
        mixed_precision=config.bf16 or config.fp16 or elsewhere,
        gradient_checkpointing=config.gradient_checkpointing,
        bits=4 if model.load_in_4bit else 8 if model.load_in_8bit else None,
        nested_quantization=model.use_bnb_nested_quant,
        launch=launch,
    )
