"""What the study unlearns from: target and retrained models of two sizes, the rows, and the protocol they are held to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from hf_unlearn.data import to_prompt_completion
from hf_unlearn.evaluation import Evaluation, EvaluationSet, Evaluator, Protocol
from hf_unlearn.evaluation.aggregates import question_figures
from hf_unlearn.evaluation.figures import Figure, not_computed
from hf_unlearn.evaluation.metrics import model_utility


UTILITY_PARTS = ("retain_probability", "retain_rouge_l_recall", "retain_truth_ratio")
MEASURES = {
    "forget": ("probability", "truth_ratio", "rouge", "memorization", "membership", "degenerate"),
    "holdout": ("probability", "membership"),
    "retain": ("probability", "truth_ratio", "rouge", "degenerate"),
    "paraphrased": ("probability", "rouge"),
}
SMALL_STEPS = (8, 16, 32, 50, 75, 100, 150, 200, 250)


@dataclass(frozen=True)
class Setting:
    """
    A size of the study.

    Args:
        name (`str`): `"small"` or `"smollm2"`.
        learned (`slice`): Rows of forget10 that the target model learns.
        forgotten (`slice`): Those of them that it has to forget, the last ones; the retrained model never saw them.
        retain_evaluated (`int`): Retain rows that are evaluated, evenly spread.
        epochs (`int`): Passes in which target and retrained model learn their rows.
        steps (`int`): Optimiser steps of an unlearning run.
        baseline_steps (`tuple[int, ...]`): Numbers of steps after which a baseline is evaluated; it trains for the last.
        batch_size (`int`): Forget rows of a step, and as many retain rows.
        learning_rate (`float`): Of an unlearning run, unless the method says otherwise.
        max_new_tokens (`int`): Longest answer.
    """

    name: str
    learned: slice
    forgotten: slice
    retain_evaluated: int
    epochs: int
    steps: int
    baseline_steps: tuple[int, ...]
    batch_size: int
    learning_rate: float
    max_new_tokens: int


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("small", slice(0, 400), slice(360, 400), 40, 30, 50, SMALL_STEPS, 8, 1e-3, 48),
        Setting("smollm2", slice(300, 400), slice(380, 400), 20, 8, 20, (10, 20, 40, 60), 10, 5e-4, 48),
    )
}


class Rows:
    """The rows of a setting, from TOFU's files."""

    def __init__(self, setting: Setting, tofu: Path) -> None:
        every = _read(tofu / "forget10_perturbed.json")
        self.learned = every[setting.learned]
        count = setting.forgotten.stop - setting.forgotten.start
        self.forget, self.retain = self.learned[-count:], self.learned[:-count]
        self.holdout = _read(tofu / "holdout10.json")[:count]
        step = max(1, len(self.retain) // setting.retain_evaluated)
        self.retain_evaluated = self.retain[::step][: setting.retain_evaluated]


def _read(path: Path) -> list[dict]:
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]


def protocol_of(setting: Setting, rows: Rows, chat: bool) -> Protocol:
    """
    TOFU's metrics on the rows of the setting.

    *Utility* is TOFU's harmonic mean over the retain rows alone (probability, ROUGE-L recall, truth ratio), as a model of
    this size knows nothing of real authors and of the world.
    """
    paraphrased = [row | {"question": row["paraphrased_question"]} for row in rows.forget]
    sets = {
        "forget": rows.forget,
        "holdout": rows.holdout,
        "retain": rows.retain_evaluated,
        "paraphrased": paraphrased,
    }
    prepared = {
        name: EvaluationSet(
            to_prompt_completion(datasets.Dataset.from_list(content), name=f"{name} set", chat=chat),
            MEASURES[name],
            setting.max_new_tokens,
        )
        for name, content in sets.items()
    }
    return Protocol("study", prepared, _figures, utility="utility")


def _figures(evaluation: Evaluation, retrained: Evaluation | None) -> dict[str, Figure]:
    figures = question_figures(evaluation, retrained)
    parts = [figures.get(name) for name in UTILITY_PARTS]
    if any(part is None or part.value is None for part in parts):
        return figures | {"utility": not_computed("needs probability, ROUGE and truth ratio of the retain rows")}
    return figures | {"utility": Figure(model_utility([part.value for part in parts]), parts[0].n)}


@dataclass
class Prepared:
    """A setting with its models on disk."""

    setting: Setting
    rows: Rows
    clean: Path | None  # the model before it learned anything of the rows, where there is one
    target: Path
    retrained: Path
    log: Evaluation  # of the retrained model
    tokenizer: PreTrainedTokenizerBase
    protocol: Protocol

    def load_target(self) -> PreTrainedModel:
        """The target model in fp32."""
        return AutoModelForCausalLM.from_pretrained(self.target, dtype=torch.float32)

    def evaluator(self, model: PreTrainedModel, **options) -> Evaluator:
        """An evaluator against the retrained model."""
        options = {"retrained": self.log, "progress": False} | options
        return Evaluator(model, self.tokenizer, self.protocol, **options)


def prepare(name: str, tofu: Path, work: Path, base_model: str) -> Prepared:
    """
    Make the models of a setting, or find them where an earlier call has.

    Args:
        name (`str`): The setting.
        tofu (`Path`): Folder with TOFU's files.
        work (`Path`): Where models are kept.
        base_model (`str`): SmolLM2-135M-Instruct, which the setting `smollm2` starts from.
    """
    setting = SETTINGS[name]
    rows = Rows(setting, tofu)
    folder = work / name
    if name == "small":
        clean, tokenizer, learn = None, _small_tokenizer(rows, folder), _from_scratch
    else:
        clean, tokenizer, learn = Path(base_model), AutoTokenizer.from_pretrained(base_model), _fine_tuned
    target, retrained = (
        _made(folder / part, lambda path, content=content: learn(content, tokenizer, base_model, setting, path))
        for part, content in (("target", rows.learned), ("retrained", rows.retain))
    )
    protocol = protocol_of(setting, rows, chat=tokenizer.chat_template is not None)
    log_file = folder / "retrained.json"
    if not log_file.exists():
        model = AutoModelForCausalLM.from_pretrained(retrained, dtype=torch.float32)
        evaluation = Evaluator(model, tokenizer, protocol).evaluate()
        log_file.write_text(json.dumps(evaluation.to_dict()))
    log = Evaluation.from_dict(json.loads(log_file.read_text()))
    return Prepared(setting, rows, clean, target, retrained, log, tokenizer, protocol)


def _made(path: Path, make: Callable[[Path], None]) -> Path:
    """A folder that is there once it is whole."""
    if not path.exists():
        temporary = path.with_name(f"{path.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        make(temporary)
        temporary.rename(path)
    return path


def _small_tokenizer(rows: Rows, folder: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 2048 tokens, trained on the learned rows."""

    def make(path: Path) -> None:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=2048,
            special_tokens=["<pad>", "<eos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator((f"{row['question']} {row['answer']}" for row in rows.learned), trainer)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(path)

    return AutoTokenizer.from_pretrained(_made(folder / "tokenizer", make))


def _from_scratch(
    rows: list[dict], tokenizer: PreTrainedTokenizerBase, base_model: str, setting: Setting, path: Path
) -> None:
    """A Llama of 5 million parameters that has seen nothing but the rows."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id,
    )
    _learn(LlamaForCausalLM(config), rows, tokenizer, path, epochs=setting.epochs, learning_rate=1e-3, batch_size=16)


def _fine_tuned(
    rows: list[dict], tokenizer: PreTrainedTokenizerBase, base_model: str, setting: Setting, path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    lora = LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM")
    _learn(model, rows, tokenizer, path, lora, epochs=setting.epochs, learning_rate=1e-3, batch_size=10)


def _learn(
    model: PreTrainedModel,
    rows: list[dict],
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    lora: LoraConfig | None = None,
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int,
) -> None:
    """Train on the rows with TRL and write the whole model."""
    chat = tokenizer.chat_template is not None
    prepared = to_prompt_completion(datasets.Dataset.from_list(rows), name="learned rows", chat=chat)
    args = SFTConfig(
        output_dir=str(path / "trainer"),
        num_train_epochs=epochs,
        learning_rate=learning_rate,
        per_device_train_batch_size=batch_size,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        completion_only_loss=lora is not None,  # a model from scratch has to learn the questions' language too
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        bf16=False,
        seed=0,
    )
    columns = ["prompt", "completion"]
    trainer = SFTTrainer(
        model, args, train_dataset=prepared.select_columns(columns), processing_class=tokenizer, peft_config=lora
    )
    trainer.train()
    model = trainer.model.merge_and_unload() if lora is not None else trainer.model
    shutil.rmtree(path / "trainer", ignore_errors=True)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
