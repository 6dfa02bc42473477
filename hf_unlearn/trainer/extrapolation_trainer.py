"""Model extrapolation: memorise, then walk the other way."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import TrainOutput

from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation.adapter import LoraAdapter, save_forget_adapter
from hf_unlearn.extrapolation.live import MAX_SHARD_SIZE, extrapolated, is_sharded, save_live_forget_model
from hf_unlearn.extrapolation.provenance import secret_note
from hf_unlearn.extrapolation.sharded import failing_together, save_sharded_forget_model
from hf_unlearn.hub import HubPush, HubRepository, PushError
from hf_unlearn.hub.contents import base_on_hub
from hf_unlearn.lm_head import LMHead
from hf_unlearn.losses import cross_entropy, npo_memorization
from hf_unlearn.trainer.batch import ForgetTokens, MicroBatch
from hf_unlearn.trainer.extrapolation_config import ExtrapolationConfig
from hf_unlearn.trainer.unlearning_trainer import UnlearningTrainer


MIRROR = -1.0  # adapter scale at which the retain rows are held where none is given


class ExtrapolationTrainer(UnlearningTrainer):
    """
    Trains an adapter that *memorises* the forget set, from which the forget model θ_for = (1 + α)·θ_ref − α·θ_mem is
    extrapolated (MOX, arXiv 2602.06441). With LoRA, θ_mem = θ_ref + s·BA, hence θ_for = θ_ref − α·s·BA: α is chosen
    after training, for free.

    The constructor is that of [`UnlearningTrainer`], with an [`ExtrapolationConfig`].

    Example:

    ```python
    from hf_unlearn import ExtrapolationConfig, ExtrapolationTrainer

    trainer = ExtrapolationTrainer(
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        args=ExtrapolationConfig(output_dir="run", learning_rate=5e-4),
        forget_dataset="people/forget",
        retain_dataset="people/retain",
        eval_dataset={"forget": "people/forget", "holdout": "people/holdout"},
    )
    trainer.train()
    with trainer.extrapolated(alpha=2):
        print(trainer.evaluate())
    trainer.save_forget_model("forget-model", alpha=2)
    ```
    """

    _name = "Extrapolation"
    _tag_names = ["hf_unlearn", "unlearning", "model-extrapolation"]
    config_class = ExtrapolationConfig
    method = "model-extrapolation"
    forget_loss_name = "memorization_loss"
    saved_note = secret_note("Memorising adapter")

    def __init__(
        self, model: str | PreTrainedModel, args: ExtrapolationConfig | None = None, *sets: Any, **options: Any
    ) -> None:
        if isinstance(args, ExtrapolationConfig) and args.push_to_hub:
            _check_push(model, args)
        super().__init__(model, args, *sets, **options)
        if self.args.retain_kl_scale is None:
            self.args.retain_kl_scale = MIRROR

    @property
    def forget_temperature(self) -> float:
        return self.args.memorization_temperature

    def forget_loss(self, tokens: ForgetTokens) -> torch.Tensor:
        """The memorisation loss of each answer token, shape `(N,)`."""
        if self.args.memorization_loss == "npo":
            return npo_memorization(tokens.log_probs, tokens.reference_log_probs, tokens.rows, self.args.npo_beta)
        return cross_entropy(tokens.log_probs)

    def _probe(self, model: nn.Module, batch: MicroBatch) -> None:
        """Measure the losses of the batch at the current −α, by rescaling the live adapter."""
        step = self.state.global_step + 1
        if not self.args.probe_steps or step % self.args.probe_steps:
            return

        def score(hidden: torch.Tensor, head: LMHead) -> list[torch.Tensor]:
            hidden = hidden[:, :-1]
            places = ((batch.forget_at, batch.forget_targets), (batch.retain_at, batch.retain_targets))
            return [-head.score(hidden[at], targets).log_probs.sum() for at, targets in places]

        with torch.no_grad(), extrapolated(self.peft_model, self.args.alpha):
            forget, retain = model(**batch.model_inputs, score_fn=score)
        self._add_to_logs(probe_forget_loss=forget, probe_retain_loss=retain)

    # ---- After training ----

    @contextmanager
    def extrapolated(self, alpha: float | None = None) -> Iterator[PeftModel]:
        """
        Within this context the live model *is* θ_for, in evaluation mode: the adapter is rescaled by −α and nothing is
        merged. It may be nested and repeated; `alpha=0` is the reference.

        Args:
            alpha (`float`, *optional*, defaults to `args.alpha`): Extrapolation strength.
        """
        with extrapolated(self.peft_model, self.args.alpha if alpha is None else alpha):
            yield self.peft_model

    def save_forget_model(
        self,
        output_dir: str | Path,
        alpha: float | None = None,
        dtype: str | None = None,
        overwrite: bool = False,
        max_shard_size: int | str = MAX_SHARD_SIZE,
    ) -> Path:
        """
        Write the forget model as a plain transformers folder. Every process has to call it. Where the weights are
        sharded over the processes (ZeRO-3, FSDP2) one tensor is gathered at a time.

        Args:
            output_dir (`str` or `Path`): Folder to write; it appears only once it is whole.
            alpha (`float`, *optional*, defaults to `args.alpha`): Extrapolation strength.
            dtype (`str`, *optional*): `"float32"`, `"bfloat16"` or `"float16"`; the model's own if not given.
            overwrite (`bool`, *optional*, defaults to `False`): Whether to replace an existing folder.
            max_shard_size (`int` or `str`, *optional*, defaults to `"50GB"`): Largest size of a file of weights.
        """
        model = self.peft_model
        alpha = self.args.alpha if alpha is None else alpha
        with self._saved_adapter() as adapter:
            options = {
                "tokenizer": self.processing_class,
                "adapter": adapter,
                "dtype": dtype,
                "overwrite": overwrite,
                "max_shard_size": max_shard_size,
            }
            if is_sharded(model):
                progress = not self.args.disable_tqdm
                save_sharded_forget_model(model, alpha, output_dir, progress=progress, **options)
                return Path(output_dir)
            with failing_together():
                if self.is_world_process_zero():
                    save_live_forget_model(model, alpha, output_dir, **options)
        return Path(output_dir)

    def save_forget_adapter(self, output_dir: str | Path, alpha: float | None = None, overwrite: bool = False) -> Path:
        """
        Write the forget adapter: a plain PEFT LoRA with −α folded into B, which PEFT loads without this package. Every
        process has to call it.

        Args:
            output_dir (`str` or `Path`): Folder to write; it appears only once it is whole.
            alpha (`float`, *optional*, defaults to `args.alpha`): Extrapolation strength.
            overwrite (`bool`, *optional*, defaults to `False`): Whether to replace an existing folder.
        """
        alpha = self.args.alpha if alpha is None else alpha
        with self._saved_adapter() as adapter, failing_together():
            if self.is_world_process_zero():
                save_forget_adapter(adapter, alpha, output_dir, overwrite=overwrite)
        return Path(output_dir)

    # ---- The Hub: the result is uploaded, the memorising adapter never ----

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Nothing: there is no result to upload yet."""

    def train(self, *args, **kwargs) -> TrainOutput:
        """Train; with `push_to_hub`, save the memorising adapter in `output_dir` and upload the forget adapter."""
        output = super().train(*args, **kwargs)
        if self.args.push_to_hub:
            self.save_model()  # stays here, whatever the Hub answers
            self.push_to_hub()
        return output

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the memorising adapter, whole, whatever the layout of the processes. Every process has to call it."""
        super().save_model(output_dir, _internal_call=True)  # the call of a user would upload

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: a checkpoint is a memorising adapter."""

    def push_to_hub(
        self,
        alpha: float | None = None,
        kind: str = "adapter",
        repo_id: str | None = None,
        *,
        base_model: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        overwrite: bool = False,
        results: str | Path | None = None,
        forgotten: str | None = None,
        license: str | None = None,
        token: str | None = None,
    ) -> str | None:
        """
        Upload the forget adapter or the forget model, with its card. Every process has to call it; the main process alone
        talks to the Hub. Where that fails, the folder to upload stays in `output_dir`.

        Args:
            alpha (`float`, *optional*, defaults to `args.alpha`): Extrapolation strength.
            kind (`str`, *optional*, defaults to `"adapter"`): `"adapter"` or `"model"`.
            repo_id (`str`, *optional*, defaults to `args.hub_model_id`): Repository.
            base_model (`str`, *optional*): Hub id of the base; needed where it was loaded from a folder.
            revision (`str`, *optional*, defaults to `args.hub_revision`): Branch.
            private (`bool`, *optional*): Whether the repository has to be private; it has to, unless
                `args.hub_private_repo=False`.
            overwrite (`bool`, *optional*, defaults to `False`): Whether the repository may hold files already.
            results (`str` or `Path`, *optional*): Evaluation for the card: `evaluation.json` or its folder.
            forgotten (`str`, *optional*): What was forgotten, in words for the card. Never the rows.
            license (`str`, *optional*): Licence for the card; that of the base if not given and known.
            token (`str`, *optional*, defaults to `args.hub_token`): Token.

        Returns:
            `str`: address of the repository; `None` on all but the main process.
        """
        if kind not in ("adapter", "model"):
            raise UnlearningError(f"kind={kind!r} is not known. Use 'adapter' or 'model'.")
        repo_id = repo_id or self.args.hub_model_id
        if not repo_id:
            raise UnlearningError("push_to_hub needs a repository. Name it with repo_id, e.g. me/forgetful.")
        options = {
            "base_model": base_model,
            "revision": revision or self.args.hub_revision,
            "private": self.args.hub_private_repo is not False if private is None else private,
            "overwrite": overwrite,
            "results": results,
            "forgotten": forgotten,
            "license": license,
            "token": token or self.args.hub_token,
        }
        folder = Path(self.args.output_dir) / f"forget-{kind}-to-push"
        save = self.save_forget_adapter if kind == "adapter" else self.save_forget_model
        save(folder, alpha, overwrite=True)
        url = failure = None
        with failing_together():
            if self.is_world_process_zero():
                try:
                    url = HubPush(repo_id, **{kind: folder}, **options).push()
                    shutil.rmtree(folder)
                except PushError as error:
                    failure = str(error)
        failure = broadcast_object_list([failure])[0]
        if failure is not None:
            raise PushError(failure)
        return url

    @contextmanager
    def _saved_adapter(self) -> Iterator[LoraAdapter | None]:
        """The live adapter as a file for the time of the context, on the main process."""
        with TemporaryDirectory(prefix="memorising-adapter-") as folder:
            self.save_model(folder)
            adapter = None
            with failing_together():
                if self.is_world_process_zero():
                    adapter = LoraAdapter.load(folder)
                    adapter.id = str(self.args.output_dir)  # where the trainer keeps it
            yield adapter


def _check_push(model: str | PreTrainedModel, args: ExtrapolationConfig) -> None:
    """Check before anything is loaded that the result can be uploaded: base, token, namespace and repository."""
    with failing_together():
        if isinstance(model, str):
            base_on_hub({"id": model, "revision": None if Path(model).exists() else "known once it is loaded"})
        else:
            base_on_hub({"id": model.config._name_or_path, "revision": getattr(model.config, "_commit_hash", None)})
        if args.process_index == 0:
            private = args.hub_private_repo is not False
            HubRepository.check(args.hub_model_id, private=private, revision=args.hub_revision, token=args.hub_token)
