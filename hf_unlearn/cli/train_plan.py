"""What `hf-unlearn train` would do: the sets checked, steps, memory and disk planned, without the weights."""

from __future__ import annotations

import importlib.resources
import math
import os
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from hf_unlearn.cli import EXIT_OK
from hf_unlearn.cli.methods import extrapolates
from hf_unlearn.cli.sample import describe_sample
from hf_unlearn.cli.terminal import console, json_output
from hf_unlearn.cli.train_options import LoraModelConfig, TrainArguments
from hf_unlearn.data import DataReport
from hf_unlearn.data.pairing import PairedDataset
from hf_unlearn.data.sampling import SHARDED, planned_retain_set
from hf_unlearn.errors import UnlearningError, explaining
from hf_unlearn.trainer import UnlearningConfig
from hf_unlearn.trainer.baselines import METHODS
from hf_unlearn.trainer.memory import Launch, MemoryEstimate, estimate_memory
from hf_unlearn.trainer.reference_cache import free_disk, plan_cache
from hf_unlearn.trainer.sets import TrainingSets, sampling_of


def dry_run(
    arguments: TrainArguments,
    config: UnlearningConfig,
    model: LoraModelConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> int:
    """Check everything but the weights, print the plan and return the exit code."""
    report, pairs = checked_data(arguments, config, tokenizer)
    console.print(report.render())
    for warning in report.warnings():
        console.print(f"[yellow]warning:[/yellow] {warning}")
    if config.uses_retain and arguments.retain_dataset is None:
        planned = planned_retain_set(tokenizer, sampling_of(config), config.max_length)
        console.print(f"No --retain_dataset: would sample {describe_sample(planned)}. The table has their most.")
    plan = _plan(arguments, config, model, report, pairs)
    console.print("\n".join(f"{label + ':':<18}{value}" for label, value in plan.items()))
    json_output.report(dry_run=True, data=report.to_dict(), warnings=report.warnings(), plan=plan)
    return EXIT_OK


def checked_data(
    arguments: TrainArguments, config: UnlearningConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[DataReport, PairedDataset]:
    """The report on the sets of a run, and its pairs; a row that cannot be used is an [`UnlearningError`]."""
    sets = TrainingSets(arguments.load_required("forget"), tokenizer, config)
    if config.uses_retain:
        retain = arguments.load("retain")
        if retain is None and _planned_launch(arguments, config).shards_weights:
            raise UnlearningError(SHARDED)
        sets.add_retain(
            planned_retain_set(tokenizer, sampling_of(config), config.max_length) if retain is None else retain
        )
    METHODS[arguments.method][0].make_alternates(sets.forget, arguments.load("forget"), tokenizer, config)
    held = sets.held
    return sets.report, PairedDataset(sets.forget, held, config.retain_per_forget if len(held) else 0, config.seed)


def _plan(
    arguments: TrainArguments,
    config: UnlearningConfig,
    model: LoraModelConfig,
    report: DataReport,
    pairs: PairedDataset,
) -> dict[str, str]:
    """What a run would do, by topic."""
    launch = _planned_launch(arguments, config)
    batch = config.per_device_train_batch_size
    forget_rows_a_step = batch * config.gradient_accumulation_steps * launch.processes
    steps_an_epoch = math.ceil(report.forget.rows / forget_rows_a_step)
    steps = config.max_steps if config.max_steps > 0 else math.ceil(steps_an_epoch * config.num_train_epochs)
    retain_rows = config.retain_per_forget if report.retain else 0
    base = _config_of(model, config.trust_remote_code)
    memory = _planned_memory(base, config, model, report, launch)
    planned_steps = f"{steps} ({steps_an_epoch} an epoch)"
    rounds = {}
    if arguments.rounds > 1:
        if config.cached_sets:
            config = replace(config, reference_cache=True)
        planned_steps += f" a round, {arguments.rounds * steps} in all"
        rounds["rounds"] = f"{arguments.rounds}, each a step of α = {arguments.round_alpha:g} from its base"
        rounds["bases of rounds"] = _planned_bases(arguments, config, model, base, memory)
    return {
        "model": f"{model.model_name_or_path}, {memory.base_parameters:,} parameters",
        "method": arguments.method,
        "adapter": _planned_adapter(config, model, memory),
        "steps": planned_steps,
        "rows a step": f"{forget_rows_a_step} forget, {retain_rows * forget_rows_a_step} retain",
        "launch": f"{launch.describe()} ({arguments.accelerate_config or 'this command'})",
        "memory a process": f"about {memory.describe()}, besides Python and its libraries" + _reservation(arguments),
        "reference cache": _planned_cache(config, pairs, steps / steps_an_epoch, base.get_text_config().hidden_size),
        "writes": _planned_files(config, memory) + ", unlearning.json, tokenizer, trainer_state.json, checkpoint-*",
        **rounds,
    }


def _config_of(model: LoraModelConfig, trust_remote_code: bool) -> PretrainedConfig:
    with explaining(
        f"The model {model.model_name_or_path} has no configuration that can be read", "Check its folder or name."
    ):
        return AutoConfig.from_pretrained(
            model.model_name_or_path, revision=model.model_revision, trust_remote_code=trust_remote_code
        )


def _planned_adapter(config: UnlearningConfig, model: LoraModelConfig, memory: MemoryEstimate) -> str:
    if config.train_all_weights:
        return "none, all weights are trained"
    return f"LoRA rank {model.lora_r}, {memory.adapter_parameters:,} parameters"


def _reservation(arguments: TrainArguments) -> str:
    """What the memory estimate leaves out."""
    if extrapolates(arguments.method):
        return ""
    return f" (estimated for LoRA under model extrapolation; what {arguments.method} keeps besides is not counted)"


def _planned_files(config: UnlearningConfig, memory: MemoryEstimate) -> str:
    if config.train_all_weights:
        return f"{config.output_dir}/model.safetensors, config.json"
    size = f"{memory.adapter_parameters * 4 / 1e6:.1f} MB"
    return f"{config.output_dir}/adapter_model.safetensors ({size}), adapter_config.json"


def _planned_bases(
    arguments: TrainArguments,
    config: UnlearningConfig,
    model: LoraModelConfig,
    base: PretrainedConfig,
    memory: MemoryEstimate,
) -> str:
    """Disk for the models that rounds are trained on: the first needs none, and two may exist at a time."""
    size = memory.base_parameters * _loaded_dtype(base, model).itemsize / 1e6
    number = min(2, arguments.rounds - 1)
    return (
        f"at most {number * size:,.1f} MB in {config.output_dir}/round-* during the run ({number} of {size:,.1f} MB)"
    )


def _loaded_dtype(base: PretrainedConfig, model: LoraModelConfig) -> torch.dtype:
    return (base.dtype if model.dtype == "auto" else getattr(torch, model.dtype or "float32")) or torch.float32


def _planned_cache(config: UnlearningConfig, pairs: PairedDataset, epochs: float, hidden_size: int) -> str:
    """Whether a run on one machine would use the reference cache, and the size of its file."""
    if not config.cached_sets:
        return "none, as nothing is asked of the reference that stays the same"
    width = hidden_size if config.keeps_forget_hidden else 1
    plan = plan_cache(pairs, config.cached_sets, epochs, hidden_size, forget_width=width)
    uses = config.reference_cache
    if uses is None:
        uses = plan.pays(free_disk(config.output_dir))
    met = f"{plan.num_rows:,} rows, each met {plan.passes / plan.num_rows:.1f} times"
    size = f"at most {plan.num_bytes / 1e6:,.1f} MB in {config.output_dir} during the run"
    return f"{met}: {size}" if uses else f"off ({met}; it would take {size})"


def _planned_launch(arguments: TrainArguments, config: UnlearningConfig) -> Launch:
    """How the run would be spread over processes."""
    if arguments.accelerate_config is not None:
        return Launch.from_accelerate_config(config_file(arguments.accelerate_config))
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    on_cpu = config.use_cpu or not torch.accelerator.is_available()
    return Launch("none" if processes == 1 else "ddp", processes, on_cpu)


def _planned_memory(
    base: PretrainedConfig, config: UnlearningConfig, model: LoraModelConfig, report: DataReport, launch: Launch
) -> MemoryEstimate:
    rows = min(config.per_device_train_batch_size, report.forget.rows)
    elsewhere = not launch.on_cpu and not torch.accelerator.is_available()  # planned for a machine with an accelerator
    return estimate_memory(
        base,
        model.lora_config(),
        forget_rows=rows,
        retain_rows=rows * config.retain_per_forget if report.retain else 0,
        length=max(report.forget.longest, report.retain.longest if report.retain else 0),
        dtype=_loaded_dtype(base, model),
        mixed_precision=config.bf16 or config.fp16 or elsewhere,
        gradient_checkpointing=config.gradient_checkpointing,
        bits=4 if model.load_in_4bit else 8 if model.load_in_8bit else None,
        nested_quantization=model.use_bnb_nested_quant,
        launch=launch,
    )


def config_file(accelerate_config: str) -> Path:
    """A file as it is given, or one of those that TRL ships."""
    path = Path(accelerate_config)
    if path.is_file():
        return path
    path = Path(str(importlib.resources.files("trl"))) / "accelerate_configs" / f"{accelerate_config}.yaml"
    if path.is_file():
        return path
    raise UnlearningError(
        f"--accelerate_config {accelerate_config}: neither a file nor a configuration that TRL ships. Pass the path of a "
        "YAML file, e.g. recipes/accelerate/ddp.yaml."
    )
