"""The options of `hf-unlearn train`, and its help."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import LoraConfig
from trl import ModelConfig

from hf_unlearn.cli.common import EvaluationDataArguments
from hf_unlearn.cli.methods import DEFAULT_METHOD
from hf_unlearn.extrapolation import check_lora_config
from hf_unlearn.trainer.baselines import METHODS
from hf_unlearn.trainer.rounds import DEFAULT_ROUND_ALPHA


DESCRIPTION = """\
Train a LoRA adapter that memorises the forget set, while a KL term holds the retain set to the untouched model.
The adapter is not the result: walk the other way with `hf-unlearn sweep` and `hf-unlearn extrapolate`.
Keep it private: it makes the model state what it is meant to forget. --method names another method, whose adapter is
the result; `--method NAME --help` explains its options."""

EXAMPLE = """\
  hf-unlearn train --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \\
      --forget_dataset people/forget --retain_dataset people/retain \\
      --learning_rate 1e-3 --output_dir run
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
OPTIONS_OF_ADAPTERS = (
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "use_dora",
    "load_in_4bit",
    "load_in_8bit",
)


@dataclass
class TrainArguments(EvaluationDataArguments):
    """
    What `hf-unlearn train` does besides the options of the method, such as [`ExtrapolationConfig`].

    Args:
        method (`str`, *optional*, defaults to `"extrapolation"`): Method of unlearning.
        accelerate_config (`str`, *optional*): Configuration of `accelerate launch`.
        eval_alpha (`float`, *optional*, defaults to `1.0`): α of the evaluations during training.
        eval_batch_size (`str`, *optional*, defaults to `"auto"`): Rows in their batches.
        rounds (`int`, *optional*, defaults to `1`): Rounds of training and walking.
        round_alpha (`float`, *optional*, defaults to `0.5`): Step of each round.
        dry_run (`bool`, *optional*, defaults to `False`): Whether to check and plan only.
        resume (`bool`, *optional*, defaults to `False`): Whether to go on from the last checkpoint.
        overwrite (`bool`, *optional*, defaults to `False`): Whether to replace the adapter of an earlier run.
    """

    method: str = field(
        default=DEFAULT_METHOD,
        metadata={"help": "Method of unlearning; each has options of its own.", "choices": list(METHODS)},
    )
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
    rounds: int = field(
        default=1,
        metadata={
            "help": "Rounds: train, walk a step of --round_alpha away from what was memorised, train on the model that "
            "this gives, and so on. The result is one adapter, whose α = 1 is all rounds."
        },
    )
    round_alpha: float = field(
        default=DEFAULT_ROUND_ALPHA, metadata={"help": "Step α of each round, with --rounds above 1."}
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
