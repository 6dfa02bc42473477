"""Push a forget model and its forget adapter: everything is checked first, then written in one commit."""

from __future__ import annotations

import json
import logging
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import ModelInfo

from hf_unlearn import __version__
from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation.adapter import ADAPTER_CONFIG_FILE
from hf_unlearn.hub.card import (
    EVAL_RESULTS_FILE,
    BeforeAfter,
    UnlearningCardData,
    UnlearningModelCard,
    eval_results_yaml,
)
from hf_unlearn.hub.contents import ADAPTER_FOLDER, CARD_FILE, Content, ForgetResult
from hf_unlearn.hub.repository import HubRepository, PushError, hub_api, plain_errors


logger = logging.getLogger(__name__)

LICENSE_FIELDS = ("license", "license_name", "license_link")


@dataclass
class HubPush:
    """
    One upload: a forget model, a forget adapter, or both (the adapter is in `adapter/` then).

    Args:
        repo_id (`str`): Id of the repository.
        model (`str` or `Path`, *optional*): Folder of the forget model.
        adapter (`str` or `Path`, *optional*): Folder of the forget adapter.
        base_model (`str`, *optional*): Hub id of the base; the recorded one if not given.
        revision (`str`, *optional*): Branch to write to; the default branch if not given.
        private (`bool`, *optional*, defaults to `True`): Whether the repository has to be private.
        overwrite (`bool`, *optional*, defaults to `False`): Whether it may hold files already.
        results (`str` or `Path`, *optional*): `evaluation.json` of `hf-unlearn eval` or `sweep`, or its folder.
        forgotten (`str`, *optional*): What was forgotten, in words for the card. Never the rows.
        license (`str`, *optional*): Licence for the card; that of the base if not given and known.
        token (`str`, *optional*): Token; that of `HF_TOKEN` or `hf auth login` if not given.

    Raises:
        [`~hf_unlearn.errors.UnlearningError`]: a folder that is no result of an extrapolation, and what else cannot be
            used.
    """

    repo_id: str
    model: str | Path | None = None
    adapter: str | Path | None = None
    base_model: str | None = None
    revision: str | None = None
    private: bool = True
    overwrite: bool = False
    results: str | Path | None = None
    forgotten: str | None = None
    license: str | None = None
    token: str | None = None

    def __post_init__(self) -> None:
        if self.model is None and self.adapter is None:
            raise UnlearningError("There is nothing to push. Pass --model, --adapter or both.")
        self.forgets = {
            kind: ForgetResult.load(folder, kind)
            for kind in ("model", "adapter")
            if (folder := getattr(self, kind)) is not None
        }
        self.result = next(iter(self.forgets.values()))  # of which the card speaks
        self._check_same()
        self.base, self.base_revision = self.result.base(self.base_model)
        self.evaluation = None if self.results is None else BeforeAfter(self.results, self.result.alpha)

    def _check_same(self) -> None:
        facts = [
            (result.alpha, (result.record.get("adapter") or {}).get("sha256"), result.base(self.base_model))
            for result in self.forgets.values()
        ]
        if any(fact != facts[0] for fact in facts):
            raise UnlearningError(
                f"--model {self.model} and --adapter {self.adapter} are of different adapters, α or bases. Push them to "
                "repositories of their own."
            )

    def check(self) -> HubRepository:
        """Check token, namespace and repository, see [`HubRepository.check`]."""
        return HubRepository.check(
            self.repo_id, private=self.private, revision=self.revision, overwrite=self.overwrite, token=self.token
        )

    def push(self) -> str:
        """
        Check, then upload in one commit. The folders stay as they are.

        Returns:
            `str`: address of the repository.

        Raises:
            [`PushError`]: the Hub or the network refused. The message says how to go on.
        """
        folders = " and ".join(str(result.folder) for result in self.forgets.values())
        try:
            repository = self.check()
            what = " and ".join(f"forget {kind}" for kind in self.forgets)
            message = f"{what.capitalize()} at α = {self.result.alpha:g}"
            repository.upload(self.files(repository.id, self.base_info()), message)
        except PushError as error:
            raise PushError(
                f"Not uploaded. {error}\nNothing has changed in {folders}. Go on with:\n  {self.command()}"
            ) from error
        return repository.url

    def command(self) -> str:
        """The command line that pushes the same."""
        options = {
            "model": self.model,
            "adapter": self.adapter,
            "repo_id": self.repo_id,
            "revision": self.revision,
            "base_model": self.base_model,
            "results": self.results,
            "forgotten": self.forgotten,
            "license": self.license,
        }
        parts = [part for name, value in options.items() if value is not None for part in (f"--{name}", str(value))]
        switches = ["--public"] * (not self.private) + ["--overwrite"] * self.overwrite
        return shlex.join(["hf-unlearn", "push", *parts, *switches])

    def base_info(self) -> ModelInfo | None:
        """What the Hub says of the base; `None` where it does not find it or does not show it to this token."""
        api = hub_api(self.token)
        with plain_errors(api, self.base):
            try:
                return api.model_info(self.base, revision=self.base_revision)
            except HfHubHTTPError as error:
                logger.warning(f"The Hub says nothing of the base {self.base} ({error.response.status_code}).")
                return None

    def files(self, repo_id: str | None = None, base_info: ModelInfo | None = None) -> dict[str, Content]:
        """
        Name in the repository -> the file, or its content: all that is uploaded.

        Args:
            repo_id (`str`, *optional*): Full id of the repository, for the card.
            base_info (`ModelInfo`, *optional*): What the Hub says of the base, for its licence.
        """
        files: dict[str, Content] = {}
        for kind, result in self.forgets.items():
            folder = f"{ADAPTER_FOLDER}/" if kind == "adapter" and len(self.forgets) == 2 else ""
            files |= {folder + name: content for name, content in result.files(self.base_model).items()}
        files[CARD_FILE] = str(self.card(repo_id, base_info)).encode("utf-8")
        if self.evaluation is not None and (entries := self.evaluation.entries()):
            files[EVAL_RESULTS_FILE] = eval_results_yaml(entries)
        return files

    def card(self, repo_id: str | None = None, base_info: ModelInfo | None = None) -> UnlearningModelCard:
        """The model card, see [`~HubPush.files`]."""
        repo_id = repo_id or self.repo_id
        license = self._license(base_info)
        data = UnlearningCardData(
            base_model=self.base,
            base_model_relation="finetune" if self.model is not None else "adapter",
            model_name=repo_id.split("/")[-1],
            eval_results=self.evaluation.eval_results() if self.evaluation is not None else None,
            **license,
        )
        record = self.result.public_record(self.base_model)
        return UnlearningModelCard.from_template(
            data,
            repo_id=repo_id,
            model=self.model is not None,
            adapter=self._adapter_facts(),
            adapter_folder=ADAPTER_FOLDER,
            base_model=self.base,
            base_revision=self.base_revision,
            base_is_public=base_info is not None and not base_info.private and not base_info.gated,
            forgotten=self.forgotten,
            rows={name: content.get("rows") for name, content in record["data"].items()},
            record=record,
            realised={
                kind: {"dtype": result.record.get("dtype"), **result.record["realised_error"]}
                for kind, result in self.forgets.items()
                if result.record.get("realised_error")
            },
            license_text=license.get("license_name") or license.get("license"),
            choice=self.evaluation.choice if self.evaluation is not None else None,
            protocol=self.evaluation.protocol if self.evaluation is not None else None,
            table=self.evaluation.table() if self.evaluation is not None else None,
            revision_argument=f', revision="{self.revision}"' if self.revision else "",
            revision_flag=f" --revision {self.revision}" if self.revision else "",
            own_version=__version__,
        )

    def _license(self, base_info: ModelInfo | None) -> dict[str, str]:
        """The licence as given, or as the base's card says: on the Hub, or beside the weights of a local base."""
        if self.license is not None:
            return {"license": self.license}
        data: Any = base_info.card_data if base_info is not None else None
        local = Path(str((self.result.record.get("base") or {}).get("id"))) / CARD_FILE
        if data is None and local.is_file():
            try:
                data = ModelCard.load(local, ignore_metadata_errors=True).data
            except ValueError as error:
                logger.warning(f"The card of the base {local} has no metadata that can be read ({error}).")
        return {} if data is None else {name: data.get(name) for name in LICENSE_FIELDS if data.get(name)}

    def _adapter_facts(self) -> dict[str, Any] | None:
        """What one has to know to serve the adapter."""
        if "adapter" not in self.forgets:
            return None
        config = json.loads((self.forgets["adapter"].folder / ADAPTER_CONFIG_FILE).read_text(encoding="utf-8"))
        uniform = not config.get("rank_pattern") and not config.get("alpha_pattern")
        return {"rank": config["r"], "uniform": uniform}
