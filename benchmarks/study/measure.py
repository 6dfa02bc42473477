"""Trains one method with one seed, and measures it along its strength."""

from __future__ import annotations

import dataclasses
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from best import MIN_UTILITY, share
from methods import METHODS, Method
from peft import LoraConfig, PeftModel
from setting import Prepared
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback

from hf_unlearn import ExtrapolationTrainer, train_in_rounds
from hf_unlearn.evaluation import Evaluation, Evaluator, choose_alpha
from hf_unlearn.extrapolation import LoraAdapter, operators
from hf_unlearn.extrapolation.consensus import SignConsensus
from hf_unlearn.extrapolation.fisher import layer_fisher
from hf_unlearn.trainer.baselines import METHODS as TRAINERS


FIGURES = (
    "forget_quality",
    "utility",
    "forget_truth_ratio",
    "forget_extraction_strength",
    "forget_probability",
    "forget_rouge_l_recall",
    "forget_degenerate_rate",
    "membership_auc_loss",
    "retain_probability",
    "retain_rouge_l_recall",
    "retain_truth_ratio",
    "retain_degenerate_rate",
    "paraphrased_probability",
    "paraphrased_rouge_l_recall",
)
BROKEN = 0.7  # share of the target's utility below which a sweep ends
ALPHAS = (1.0, 2.0, 4.0, 8.0)
REFINEMENTS = 3
ROUNDS, ROUND_ALPHA = 4, 0.5
ALPHAS_OF_ROUNDS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)  # of the sum of all rounds
COLLAPSED = 0.3  # share below which a baseline does not come back
RULES = ("match-retrain", "match-holdout", "utility-budget")
RANK = 16


def point(evaluation: Evaluation, strength: float) -> dict[str, Any]:
    """What is kept of one evaluation."""
    return {"strength": strength} | {name: evaluation.value(name) for name in FIGURES}


class Target:
    """The figures of the target model, which shares are taken of."""

    def __init__(self, prepared: Prepared) -> None:
        self.figures = point(prepared.evaluator(prepared.load_target()).evaluate(), 0.0)

    def share(self, figures: dict[str, Any]) -> float:
        """Share of the target's utility that is left; 0 for a model whose losses are not finite."""
        return share(figures, self.figures)


# ---- Training ----


def config_of(prepared: Prepared, method: Method, seed: int, output_dir: Path) -> Any:
    """
    The options of a training.

    Args:
        prepared (`Prepared`): The setting.
        method (`Method`): How.
        seed (`int`): Seed of the adapter and of the order of the rows.
        output_dir (`Path`): Where the adapter goes.
    """
    setting = prepared.setting
    config_class = TRAINERS[method.trainer][1]
    accumulation = -(-len(prepared.rows.forget) // setting.batch_size) if method.full_batch else 1
    steps = max(5, setting.steps // 4) if method.full_batch else setting.steps
    if method.kind == "baseline":
        steps = setting.baseline_steps[-1]
    options = {"paraphrases": "paraphrased_answer", "wrong_answers": "perturbed_answer"}
    return config_class(
        **{
            "output_dir": str(output_dir),
            "learning_rate": setting.learning_rate * method.learning_rate,
            "max_steps": steps,
            "per_device_train_batch_size": setting.batch_size,
            "gradient_accumulation_steps": accumulation,
            "gradient_checkpointing": False,
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_steps": 0.1,
            "save_strategy": "epoch" if method.kind == "extrapolation" else "no",  # for momentum
            "save_only_model": True,
            "report_to": "none",
            "logging_steps": 1,
            "disable_tqdm": True,
            "use_cpu": not torch.accelerator.is_available(),
            "seed": seed,
            **{column: options[column] for column in method.columns},
            **method.options,
        }
    )


def lora() -> LoraConfig:
    """The adapter of every method."""
    return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")


def train(
    prepared: Prepared,
    method: Method,
    seed: int,
    output_dir: Path,
    *,
    model: PreTrainedModel | None = None,
    swap: bool = False,
    callback: Callable[[Any], TrainerCallback] | None = None,
) -> dict[str, Any]:
    """
    Train an adapter and save it.

    Args:
        prepared (`Prepared`): The setting.
        method (`Method`): How.
        seed (`int`): Seed of the adapter and of the order of the rows.
        output_dir (`Path`): Where the adapter goes.
        model (`PreTrainedModel`, *optional*): Trained on top of this model instead of the target.
        swap (`bool`, *optional*, defaults to `False`): Memorise as many retain rows instead of the forget rows.
        callback (`Callable`, *optional*): Makes a callback of the trainer.
    """
    rows = prepared.rows
    forget, retain = (rows.retain[-len(rows.forget) :], rows.forget) if swap else (rows.forget, rows.retain)
    config = config_of(prepared, method, seed, output_dir)
    torch.manual_seed(seed)
    trainer = TRAINERS[method.trainer][0](
        model if model is not None else prepared.load_target(),
        config,
        datasets.Dataset.from_list(forget),
        datasets.Dataset.from_list(retain) if config.uses_retain else None,
        processing_class=prepared.tokenizer,
        peft_config=None if method.trainer == "rmu" else lora(),
    )
    if callback is not None:
        trainer.add_callback(callback(trainer))
    start = time.process_time()
    trainer.train()
    seconds = time.process_time() - start
    trainer.save_model()
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    return {
        "seconds": round(seconds, 1),
        "steps": trainer.state.global_step,
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        "first_log": logs[0] if logs else None,
        "last_log": logs[-1] if logs else None,
    }


class Checkpoints(TrainerCallback):
    """Evaluates a baseline after some steps, and ends the training once the model is broken or all of them are done."""

    def __init__(self, trainer: Any, prepared: Prepared, target: Target, steps: tuple[int, ...]) -> None:
        self.steps = steps
        self.evaluator = prepared.evaluator(trainer.peft_model)
        self.target = target
        self.points: list[dict[str, Any]] = []
        self.seconds = 0.0  # of evaluation

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step not in self.steps:
            return
        start = time.process_time()
        training = self.evaluator.model.training
        self.evaluator.model.eval()
        self.evaluator.drop_results()
        self.points.append(point(self.evaluator.evaluate(), state.global_step))
        self.evaluator.model.train(training)
        self.seconds += time.process_time() - start
        if self.target.share(self.points[-1]) < COLLAPSED or state.global_step == self.steps[-1]:
            control.should_training_stop = True


# ---- One method, one seed ----


def run(prepared: Prepared, target: Target, method: Method, seed: int, work: Path) -> dict[str, Any]:
    """Everything that the study keeps of a method with one seed."""
    result: dict[str, Any] = {"method": method.name, "setting": prepared.setting.name, "seed": seed}
    if method.kind == "baseline":
        return result | _run_baseline(prepared, target, method, seed, work)
    adapter = work / f"{method.name}-{seed}"
    if method.kind == "operator":
        adapter, facts = _combined(prepared, method, seed, work)
    elif method.kind == "rounds":
        facts = _train_rounds(prepared, method, seed, adapter)
    else:
        facts = train(prepared, method, seed, adapter)
    model = PeftModel.from_pretrained(prepared.load_target(), adapter) if isinstance(adapter, Path) else adapter
    start = time.perf_counter()
    in_rounds = "rounds" in (method.kind, METHODS[method.of].kind)
    points, rules = sweep(prepared, target, model, ALPHAS_OF_ROUNDS if in_rounds else ALPHAS)
    if isinstance(adapter, Path):
        facts["delta_norm"] = _norm(adapter)
    return result | facts | {"sweep_seconds": round(time.perf_counter() - start, 1), "points": points, "rules": rules}


def sweep(
    prepared: Prepared, target: Target, model: Any, alphas: tuple[float, ...] = ALPHAS
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Points along α, closest where the utility leaves the budget, and the one of them that each rule chooses."""
    evaluator = prepared.evaluator(model) if isinstance(model, PeftModel) else model
    points: dict[float, dict[str, Any]] = {}

    def share(alpha: float) -> float:
        points[alpha] = point(evaluator.evaluate(alpha), alpha)
        return target.share(points[alpha])

    low, high = 0.0, None
    for alpha in alphas:
        left = share(alpha)
        if left >= MIN_UTILITY and high is None:
            low = alpha
        elif high is None:
            high = alpha
        if left < BROKEN:
            break
    for _ in range(REFINEMENTS if high else 0):
        middle = round((low + high) / 2, 6)
        low, high = (middle, high) if share(middle) >= MIN_UTILITY else (low, middle)
    measured = sorted(points)
    rules = {
        rule: choose_alpha(evaluator, measured, rule, min_utility=MIN_UTILITY, refinements=0).alpha for rule in RULES
    }
    return [points[alpha] for alpha in measured], rules


def _run_baseline(prepared: Prepared, target: Target, method: Method, seed: int, work: Path) -> dict[str, Any]:
    def trained(steps: tuple[int, ...]) -> dict[str, Any]:
        made: list[Checkpoints] = []

        def callback(trainer: Any) -> Checkpoints:
            made.append(Checkpoints(trainer, prepared, target, steps))
            return made[-1]

        facts = train(prepared, method, seed, work / f"{method.name}-{seed}", callback=callback)
        facts["seconds"] = round(facts["seconds"] - made[0].seconds, 1)
        return facts | {"points": made[0].points}

    result = trained(prepared.setting.baseline_steps)
    finer = _steps_between(result["points"], target)
    if finer:
        result["points"] = sorted(result["points"] + trained(finer)["points"], key=lambda p: p["strength"])
    return {"learning_rate": method.learning_rate * prepared.setting.learning_rate} | result


def _steps_between(points: list[dict[str, Any]], target: Target) -> tuple[int, ...]:
    """Steps between the last within the budget and the next, where another training with the same seed is looked at."""
    left = next((n for n, figures in enumerate(points) if target.share(figures) < MIN_UTILITY), None)
    if left is None:
        return ()
    low, high = (points[left - 1]["strength"] if left else 0), points[left]["strength"]
    between = {round(low + (high - low) * part / (REFINEMENTS + 1)) for part in range(1, REFINEMENTS + 1)}
    return tuple(sorted(between - {low, high}))


# ---- Rounds ----


def _train_rounds(prepared: Prepared, method: Method, seed: int, work: Path) -> dict[str, Any]:
    """Memorise, walk a short way, memorise again from there. A stopped run goes on."""
    log = work / "rounds.json"
    took: dict[str, list[float]] = json.loads(log.read_text()) if log.exists() else {}

    def train_round(trainer: ExtrapolationTrainer, number: int, checkpoint: str | None) -> None:
        start = time.process_time()
        trainer.train(resume_from_checkpoint=checkpoint)
        took[str(number)] = [time.process_time() - start, trainer.state.global_step]
        write(log, took)

    train_in_rounds(
        str(prepared.target),
        dataclasses.replace(config_of(prepared, method, seed, work), save_strategy="no"),
        datasets.Dataset.from_list(prepared.rows.forget),
        datasets.Dataset.from_list(prepared.rows.retain),
        rounds=ROUNDS,
        round_alpha=ROUND_ALPHA,
        peft_config=lora(),
        processing_class=prepared.tokenizer,
        resume=(work / "round-1" / "adapter_model.safetensors").exists(),
        overwrite=True,
        train_round=train_round,
    )
    seconds, steps = (sum(took[str(number + 1)][part] for number in range(ROUNDS)) for part in (0, 1))
    return {"seconds": round(seconds, 1), "steps": int(steps)}


# ---- Operators ----


def _combined(prepared: Prepared, method: Method, seed: int, work: Path) -> tuple[Any, dict[str, Any]]:
    """The adapter of an operator, or for sign consensus an evaluator of the dense update."""
    start = time.process_time()
    if method.operator == "msa":
        return _msa(prepared, seed, work)
    of = METHODS[method.of]
    adapter = _trained(prepared, of, seed, work)
    output = work / f"{method.name}-{seed}"
    if method.operator in ("average", "consensus"):
        adapters = [_trained(prepared, of, 3 * seed + offset, work) for offset in range(3)]
        if method.operator == "consensus":
            return DenseEvaluator(prepared, SignConsensus(adapters)), _took(start)
        update = operators.average(adapters)
    elif method.operator == "momentum":
        update = operators.momentum(adapter)
    elif method.operator == "fisher":
        model = PeftModel.from_pretrained(prepared.load_target(), adapter)
        fisher = [
            layer_fisher(model, datasets.Dataset.from_list(rows), prepared.tokenizer)
            for rows in (prepared.rows.forget, prepared.rows.retain_evaluated)
        ]
        update = operators.scale_layers(adapter, operators.fisher_factors(adapter, *fisher))
    else:
        retain = work / f"retain-mox-{seed}"
        if not (retain / "unlearning.json").exists():
            train(prepared, METHODS["mox"], seed, retain, swap=True)
        update = (
            operators.project(adapter, retain)
            if method.operator == "projection"
            else operators.subtract(adapter, retain, 0.5)
        )
    update.save(output, overwrite=True)
    return output, _took(start)


def _took(start: float) -> dict[str, Any]:
    return {"seconds": round(time.process_time() - start, 1)}


def _trained(prepared: Prepared, method: Method, seed: int, work: Path) -> Path:
    folder = work / f"{method.name}-{seed}"
    if not (folder / "unlearning.json").exists():
        (_train_rounds if method.kind == "rounds" else train)(prepared, method, seed, folder)
    return folder


def _msa(prepared: Prepared, seed: int, work: Path) -> tuple[Path, dict[str, Any]]:
    """Forget and retain vectors from the clean checkpoint, applied to the target."""
    start = time.process_time()
    parts = []
    for swap in (False, True):
        folder = work / f"clean-{'retain' if swap else 'forget'}-{seed}"
        if not (folder / "unlearning.json").exists():
            clean = AutoModelForCausalLM.from_pretrained(prepared.clean, dtype=torch.float32)
            train(prepared, METHODS["task-vector"], seed, folder, model=clean, swap=swap)
        parts.append(folder)
    output = work / f"msa-{seed}"
    operators.subtract(*parts, 0.5).save(output, overwrite=True)
    return output, _took(start)


class DenseEvaluator:
    """What a sweep needs of an evaluator, for an update that no adapter holds: the weights are set for each α."""

    def __init__(self, prepared: Prepared, update: SignConsensus) -> None:
        self.prepared = prepared
        self.protocol, self.retrained = prepared.protocol, prepared.log
        self.model = prepared.load_target()
        self.weights = {name: self.model.get_submodule(name).weight.detach().clone() for name in update.modules}
        self.deltas = {name: update.delta(name) for name in update.modules}
        self.done: dict[float, Evaluation] = {}

    @torch.no_grad()
    def evaluate(self, alpha: float, generate: bool = True) -> Evaluation:
        """The target less α times the update."""
        if alpha not in self.done:
            for name, weight in self.weights.items():
                self.model.get_submodule(name).weight.copy_(weight - alpha * self.deltas[name])
            evaluator: Evaluator = self.prepared.evaluator(self.model)
            self.done[alpha] = evaluator.evaluate()
            self.done[alpha].alpha = alpha
        return self.done[alpha]


def _norm(adapter: Path) -> float:
    loaded = LoraAdapter.load(adapter)
    return sum(loaded.delta(module).double().square().sum().item() for module in loaded.modules) ** 0.5


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a result, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.rename(path)
