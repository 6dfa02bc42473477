"""Tiny things in the place of the models, adapters, sets and logs that the pages name, made when they are needed."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import yaml
from command_lines import set_arguments, train_arguments, write_rows
from snippets import ROOT
from test_recipes import TEMPLATE, questions, write_json
from tiny import tiny_llama, tiny_rows, tiny_tokenizer

from hf_unlearn.cli import main


MODELS = {
    "BASE", "HuggingFaceH4/zephyr-7b-beta", "HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-360M-Instruct", "M",
    "base-model", "clean", "meta-llama/Llama-3.1-70B-Instruct", "quickstart/planted-model", "target",
}  # fmt: skip
ADAPTERS = {  # name: seed of its training
    "run": 0, "forget-run": 0, "new-run": 0, "retain-run": 1, "seed-0": 0, "seed-1": 1, "seed-2": 2, "averaged": 0, "vector": 0,
    "quickstart/memorising-adapter": 0, "runs/custom-adapter": 0, "runs/muse-adapter": 0, "runs/people-adapter": 0,
    "runs/run": 0, "runs/seed-0": 0, "runs/seed-1": 1, "runs/tofu-adapter": 0, "runs/wmdp-adapter": 0,
}  # fmt: skip
FORGET_MODELS = {
    "forget-model", "quickstart/result/forget-model", "retrained", "runs/forget-model", "runs/muse-forget-model", "runs/tofu-forget-model",
}  # fmt: skip
FORGET_ADAPTERS = {"forget-adapter", "runs/custom-forget-adapter"}
SETS = {"forget": 0, "retain": 1, "holdout": 2, "request-1": 3, "request-2": 4, "request-3": 5}  # name: seed
TOFU = ("forget10_perturbed", "holdout10", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed")


class StandIns:
    """
    Makes each stand-in once.

    Args:
        folder (`Path`): Folder to keep them in.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models = MODELS | {
            options["model_name_or_path"]
            for path in (ROOT / "recipes").rglob("*.yaml")
            if "model_name_or_path" in (options := yaml.safe_load(path.read_text(encoding="utf-8")))
        }

    def provide(self, name: str) -> None:
        """Put a stand-in, if there is one for `name`, where `name` is from the working directory."""
        target = Path(name)
        source = None if target.exists() else self._find(name)
        if source is None:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)

    def _find(self, name: str) -> Path | None:
        if name in self.models:
            return self.model()
        if name in ADAPTERS:
            return self.adapter(ADAPTERS[name])
        if name == "runs/python-adapter":
            return self.adapter(0, sample=True)
        if name in FORGET_MODELS | FORGET_ADAPTERS:
            return self.result("model" if name in FORGET_MODELS else "adapter")
        if name.removeprefix("data/").removesuffix(".jsonl") in SETS:
            return self.rows(name.removeprefix("data/").removesuffix(".jsonl"))
        if name in ("sweep", "audit-retrained"):
            return self.sweep() if name == "sweep" else self.audit()
        if name == "data/tofu":
            return self.tofu()
        if name == "quickstart/result/evaluation.json":
            return self.sweep() / "evaluation.json"
        if name.endswith("/TOFU_EVAL.json") or name.startswith("logs/"):
            log = self.log(retrained="retain90" in name)
            return log / "TOFU_EVAL.json" if name.endswith(".json") else log
        if name == "cais/wmdp-corpora":
            return self.documents()
        return None

    @cache  # noqa: B019
    def model(self, seed: int = 0) -> Path:
        """A tiny chat model."""
        folder = self.folder / f"model-{seed}"
        tiny_llama(seed).save_pretrained(folder)
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(folder)
        return folder

    @cache  # noqa: B019
    def rows(self, name: str) -> Path:
        return Path(write_rows(self.folder / f"{name}.jsonl", tiny_rows(6, SETS[name])))

    @property
    def files(self) -> dict[str, str]:
        return {"model": str(self.model())} | {name: str(self.rows(name)) for name in ("forget", "retain", "holdout")}

    @cache  # noqa: B019
    def adapter(self, seed: int, sample: bool = False) -> Path:
        """A memorising adapter with two checkpoints, of random words or of the sample sets."""
        folder = self.folder / f"adapter-{seed}{'-sample' * sample}"
        files = self.files | ({"forget": "people/forget", "retain": "people/retain"} if sample else {})
        steps = ("--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1")
        assert main(train_arguments(files, folder, "--use_cpu", "--seed", str(seed), *steps)) == 0
        return folder

    @cache  # noqa: B019
    def result(self, kind: str) -> Path:
        """A forget model or a forget adapter, as of a base from the Hub."""
        folder = self.folder / f"forget-{kind}"
        source = ("--adapter", str(self.adapter(0)), "--alpha", "1")
        assert main(["extrapolate", *source, "--format", kind, "--output_dir", str(folder)]) == 0
        record = json.loads((folder / "unlearning.json").read_text(encoding="utf-8"))
        record["base"] |= {"id": "org/base", "revision": "0123456789abcdef0123456789abcdef01234567"}
        write_json(folder / "unlearning.json", record)
        return folder

    @cache  # noqa: B019
    def sweep(self) -> Path:
        folder = self.folder / "sweep"
        options = ("--adapter", str(self.adapter(0)), "--alphas", "1", "--refinements", "1", "--max_new_tokens", "4")
        sets = set_arguments(self.files, "forget", "retain", "holdout")
        assert main(["sweep", *options, *sets, "--output_dir", str(folder)]) in (0, 1)
        return folder

    @cache  # noqa: B019
    def audit(self) -> Path:
        folder = self.folder / "audit"
        options = ("--model", str(self.result("model")), "--attacks", "prefix")
        sets = set_arguments(self.files, "forget", "retain")
        assert main(["audit", *options, *sets, "--output_dir", str(folder)]) == 0
        return folder

    @cache  # noqa: B019
    def tofu(self) -> Path:
        """The sets of TOFU's evaluation."""
        for seed, name in enumerate(TOFU):
            write_json(self.folder / "tofu" / f"{name}.json", questions(seed))
        return self.folder / "tofu"

    @cache  # noqa: B019
    def log(self, retrained: bool) -> Path:
        folder = self.folder / f"log-{retrained}"
        options = ("--model", str(self.model(int(retrained))), "--protocol", "tofu", "--data_dir", str(self.tofu()))
        assert main(["eval", *options, "--output_dir", str(folder)]) in (0, 1)  # 1: it speaks no language
        return folder

    @cache  # noqa: B019
    def documents(self) -> Path:
        """The corpora of WMDP, as a folder with the configurations of its Hub set."""
        folder = self.folder / "wmdp"
        names = ("cyber-forget-corpus", "cyber-retain-corpus")
        for seed, name in enumerate(names):
            write_json(folder / f"{name}.json", [{"text": row["prompt"]} for row in tiny_rows(4, seed)])
        configs = [{"config_name": name, "data_files": f"{name}.json"} for name in names]
        (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
        return folder
