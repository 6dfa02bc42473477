"""The ledger: deletion requests one after another, and the model with any subset of them."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_unlearn.data import load_rows
from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.batching import BatchSize
from hf_unlearn.extrapolation import (
    LoraAdapter,
    LowRankUpdate,
    MergeReport,
    average,
    extrapolate,
    save_forget_adapter,
)
from hf_unlearn.extrapolation.adapter import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE
from hf_unlearn.extrapolation.low_rank import check_combinable
from hf_unlearn.extrapolation.provenance import PROVENANCE_FILE
from hf_unlearn.requests.adding import plan_request
from hf_unlearn.requests.base import base_record, check_live_base
from hf_unlearn.requests.measurement import MAX_SHRINK, LiveRequests, Measurement, measure_requests, plan_measurement
from hf_unlearn.requests.records import ACTIVE, REVOKED, Request
from hf_unlearn.requests.rows import ROWS_FILE, request_rows, write_rows
from hf_unlearn.requests.storage import SECRET_NOTE, LedgerFolder


class Ledger:
    """
    Deletion requests against one base model, each with its memorising adapter and its α, in one private folder. Open
    it with [`Ledger.open`].

    With any subset S of the requests the model is θ_ref − Σ α_i·ΔW_i over i in S. The sum is taken by id, so the order
    in which requests were added does not matter, and a revoked request leaves nothing behind.

    Args:
        folder (`Path`): The folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = LedgerFolder(folder)
        self._read()

    @classmethod
    def open(cls, folder: str | Path, create: bool = False) -> Ledger:
        """
        Open a ledger.

        Args:
            folder (`str` or `Path`): Its folder.
            create (`bool`, *optional*, defaults to `False`): Whether it may be a new one, which is written with the
                first request.
        """
        ledger = cls(Path(folder).expanduser().resolve())
        if not create and not ledger._files.index.is_file():
            raise UnlearningError(f"{folder} holds no ledger. `hf-unlearn requests add` makes one.")
        return ledger

    def _read(self) -> None:
        content = self._files.read_index()
        self.base: dict[str, Any] | None = content["base"]
        self.requests: list[Request] = content["requests"]

    def _write(self) -> None:
        self._files.write_index(self.base, [request.to_dict() for request in self.requests])

    @contextmanager
    def locked(self) -> Iterator[Path]:
        """
        Keep other commands out of the ledger, e.g. while an adapter is trained that is added next.

        Yields:
            `Path`: an empty folder within the ledger, which is removed at the end.
        """
        with self._files.locked() as outermost:
            if outermost:
                self._read()  # another command may have written since
            yield self._files.work

    # ---- Reading ----

    def __getitem__(self, id: str) -> Request:
        for request in self.requests:
            if request.id == id:
                return request
        known = ", ".join(request.id for request in self.requests) or "none"
        raise UnlearningError(f"The ledger {self.folder} has no request {id!r}. Its requests: {known}.")

    def active(self) -> list[Request]:
        """The active requests, by id."""
        return sorted((request for request in self.requests if request.is_active), key=lambda request: request.id)

    def select(self, only: Collection[str] | None = None, without: Collection[str] | None = None) -> list[Request]:
        """
        Active requests, by id; at least one.

        Args:
            only (list of `str`, *optional*): Ids to take.
            without (list of `str`, *optional*): Ids to leave out.
        """
        if only is not None and without is not None:
            raise UnlearningError(
                "`only` and `without` exclude each other: name the requests to take or to leave out."
            )
        for id in [*(only or []), *(without or [])]:
            if not self[id].is_active:
                raise UnlearningError(f"The request {id} is revoked. Restore it, or do not name it.")
        chosen = [r for r in self.active() if (only is None or r.id in only) and r.id not in (without or [])]
        if not chosen:
            raise UnlearningError(
                f"No active request of {self.folder} is left, so the model would be the base itself. Add or restore a "
                "request."
            )
        return chosen

    def adapter(self, id: str) -> LoraAdapter:
        """The memorising adapter of a request, which must be the one that was added."""
        request, folder = self[id], self._files.of_request(id)
        if request.purged:
            raise UnlearningError(f"The adapter of the request {id} is purged. Train it again and add it anew.")
        if not (folder / ADAPTER_WEIGHTS_FILE).is_file():
            raise UnlearningError(
                f"The adapter of the request {id} is gone: {folder / ADAPTER_WEIGHTS_FILE} does not exist. Restore it "
                "from a backup, or revoke and purge the request."
            )
        adapter = LoraAdapter.load(folder)
        if adapter.sha256 != request.adapter["sha256"]:
            raise UnlearningError(
                f"{folder / ADAPTER_WEIGHTS_FILE} is not the file that was added as {id}: its SHA-256 differs. Restore "
                "it from a backup."
            )
        return adapter

    def rows(self, id: str) -> datasets.Dataset:
        """The rows of a request, from the ledger or from where they were; those it was added with."""
        return request_rows(self[id], self._files.of_request(id))

    # ---- Adding ----

    def plan(self, adapter: LoraAdapter | str | Path, alpha: float, **options: Any) -> Request:
        """Everything [`~Ledger.add`] checks and decides, without writing; the arguments are the same."""
        return plan_request(self, adapter, alpha, **options)

    def add(self, adapter: LoraAdapter | str | Path, alpha: float, **options: Any) -> Request:
        """
        Copy a memorising adapter into the ledger. An error or an interruption leaves the ledger as it was.

        Args:
            adapter ([`LoraAdapter`], `str` or `Path`): A memorising adapter, trained on the base of the ledger.
            alpha (`float`): Its extrapolation strength.
            id (`str`, *optional*): Name of the request; the date and a number if not given.
            note (`str`, *optional*): Remark.
            date (`str`, *optional*): Date of the request in ISO 8601; now if not given.
            base (`str`, *optional*): Id or folder of the base; the one the adapter names if not given.
            forget_dataset (`str`, `Path`, `list[dict]` or `datasets.Dataset`, *optional*): The rows. A name or path is
                recorded as a reference.
            forget_config, forget_split (`str`, *optional*): Their configuration and split.
            keep_rows (`bool`, *optional*, defaults to `False`): Whether to copy the rows into the ledger.

        Returns:
            [`Request`]: The request added.
        """
        adapter = adapter if isinstance(adapter, LoraAdapter) else LoraAdapter.load(adapter)
        with self.locked() as work:
            request = self.plan(adapter, alpha, **options)
            filled = work / "request"
            filled.mkdir()
            for name in (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, PROVENANCE_FILE):
                if (adapter.folder / name).is_file():
                    shutil.copyfile(adapter.folder / name, filled / name)
            (filled / "README.md").write_text(SECRET_NOTE, encoding="utf-8")
            if request.rows and request.rows.get("kept"):
                source = [options.get(name) for name in ("forget_dataset", "forget_config", "forget_split")]
                rows = load_rows(source[0], config=source[1], split=source[2], name="forget set")
                write_rows(rows, filled / ROWS_FILE)
            self._commit(request, filled, base_record(adapter, options.get("base")))
        return request

    def _commit(self, request: Request, filled: Path, base: dict[str, Any]) -> None:
        """Move the folder of a request to its place and write the index, or do neither."""
        final = self._files.of_request(request.id)
        final.parent.mkdir(exist_ok=True)
        shutil.rmtree(final, ignore_errors=True)  # left by a process that was killed between the two steps below
        known_base, known_requests = self.base, list(self.requests)
        filled.rename(final)
        try:
            self.base = known_base or base
            self.requests.append(request)
            self._write()
        except BaseException:
            self.base, self.requests = known_base, known_requests
            shutil.rmtree(final)
            raise

    # ---- Changing ----

    def revoke(self, id: str, reason: str) -> Request:
        """
        Leave a request out from now on; its adapter stays until it is purged.

        Args:
            id (`str`): The request.
            reason (`str`): Why.
        """
        with self.locked():
            request = self.check_revoke(id, reason)
            request.status = REVOKED
            request.record("revoked", reason)
            self._write()
        return request

    def check_revoke(self, id: str, reason: str) -> Request:
        """Raise where [`~Ledger.revoke`] would."""
        if not self[id].is_active:
            raise UnlearningError(f"The request {id} is revoked already.")
        if not (reason or "").strip():
            raise UnlearningError("A revocation needs a reason (--reason).")
        return self[id]

    def restore(self, id: str) -> Request:
        """Take a revoked request in again."""
        with self.locked():
            request = self.check_restore(id)
            request.status = ACTIVE
            request.record("restored")
            self._write()
        return request

    def check_restore(self, id: str) -> Request:
        """Raise where [`~Ledger.restore`] would."""
        if self[id].is_active:
            raise UnlearningError(f"The request {id} is active already.")
        check_combinable([*(self.adapter(request.id) for request in self.active()), self.adapter(id)])
        return self[id]

    def purge(self, id: str) -> Request:
        """Delete the adapter and the rows of a revoked request; its record stays."""
        with self.locked():
            request = self.check_purge(id)
            folder = self._files.of_request(id)
            if folder.exists():
                shutil.rmtree(folder)  # first: a purge that is interrupted can be repeated
            request.purged, request.rows = True, None
            request.record("purged")
            self._write()
        return request

    def check_purge(self, id: str) -> Request:
        """Raise where [`~Ledger.purge`] would."""
        if self[id].is_active:
            raise UnlearningError(
                f"The request {id} is active: without its adapter nothing can be built. Revoke it first."
            )
        if self[id].purged:
            raise UnlearningError(f"The request {id} is purged already.")
        return self[id]

    # ---- The model ----

    def combined(self, only: Collection[str] | None = None, without: Collection[str] | None = None) -> LowRankUpdate:
        """
        Σ α_i·ΔW_i over active requests, exact, in the order of their ids. Extrapolated by 1, it gives the model.

        Args:
            only (list of `str`, *optional*): Ids to take; all if not given.
            without (list of `str`, *optional*): Ids to leave out.
        """
        chosen = self.select(only, without)
        adapters = [self.adapter(request.id) for request in chosen]
        update = average(adapters, [request.alpha for request in chosen])
        records = [
            {"id": r.id, "date": r.date, "alpha": r.alpha, "rows": r.num_rows, "adapter_sha256": r.adapter["sha256"]}
            for r in chosen
        ]
        update.operator = {"name": "requests", "requests": records}
        return update

    def build(
        self,
        output_dir: str | Path,
        *,
        format: str = "model",
        only: Collection[str] | None = None,
        without: Collection[str] | None = None,
        base: str | None = None,
        dtype: str | None = None,
        overwrite: bool = False,
        progress: bool = True,
    ) -> MergeReport | Path:
        """
        Write θ_ref − Σ α_i·ΔW_i over active requests.

        Args:
            output_dir (`str` or `Path`): Folder to write; it appears once it is whole.
            format (`str`, *optional*, defaults to `"model"`): `"model"` for a transformers folder, merged in pieces, or
                `"adapter"` for a plain LoRA adapter of the summed rank.
            only (list of `str`, *optional*): Ids to take; all active ones if not given.
            without (list of `str`, *optional*): Ids to leave out.
            base (`str`, *optional*): Where the base is now; where it was at the first request if not given.
            dtype (`str`, *optional*): Dtype of the model; that of the base if not given.
            overwrite (`bool`, *optional*, defaults to `False`): Whether to replace an existing folder.
            progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

        Returns:
            [`MergeReport`] or `Path`: what was merged, or the folder of the adapter.
        """
        if format not in ("model", "adapter"):
            raise UnlearningError(f"`format={format!r}` is not possible. Choose 'model' or 'adapter'.")
        if format == "adapter" and dtype is not None:
            raise UnlearningError("`dtype` (--dtype) is for models; the adapter is written in float32.")
        output = Path(output_dir).expanduser().resolve()
        if output.is_relative_to(self.folder) or self.folder.is_relative_to(output):
            raise UnlearningError(f"The output folder {output} is in the ledger or holds it. Name another.")
        with self.locked() as work:
            summed = self._summed(work / "sum", only, without)
            if format == "adapter":
                return save_forget_adapter(summed, 1.0, output_dir, overwrite)
            where = {"base": base or self.base["id"], "revision": None if base else self.base["revision"]}
            return extrapolate(
                **where,
                adapter=summed,
                alpha=1.0,
                output_dir=output_dir,
                dtype=dtype,
                overwrite=overwrite,
                progress=progress,
            )

    def _summed(self, folder: Path, only: Collection[str] | None, without: Collection[str] | None) -> LoraAdapter:
        """The sum as an adapter on disk, with the records of all its requests."""
        update = self.combined(only, without)
        summed = update.save(folder)
        ids = [request["id"] for request in update.operator["requests"]]
        summed.id = f"requests {', '.join(ids)}"
        quantised = next((source.quantization for source in update.sources if source.quantization), None)
        summed.provenance["base"] = self.base | ({"quantization_config": quantised} if quantised else {})
        summed.provenance["data"] = {}  # the hash of a single row would confirm who guesses it
        return summed

    def measure(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        retain_dataset: datasets.Dataset | None = None,
        max_shrink: float = MAX_SHRINK,
        batch_size: BatchSize = "auto",
        progress: bool = True,
    ) -> Measurement:
        """
        Measure what the active requests do to their rows, alone and together, before and after the newest, and record
        it in the ledger. Nothing is merged: the adapters are live on `model`, which is as before at the end.

        Args:
            model (`PreTrainedModel`): The base model.
            tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
            retain_dataset (`datasets.Dataset`, *optional*): Rows that must stay.
            max_shrink (`float`, *optional*, defaults to `0.1`): Share of an effect, or of the retain probability, that
                may get lost without a word.
            batch_size (`int` or `"auto"`, *optional*, defaults to `"auto"`): Rows in a batch.
            progress (`bool`, *optional*, defaults to `True`): Whether to show progress bars.
        """
        with self.locked():
            measurement, rows = plan_measurement(self, max_shrink, retain_dataset is not None)
            check_live_base(self.base, model)
            adapters = {id: self.adapter(id).folder for id in measurement.active}
            live = LiveRequests(model, adapters, {id: self[id].alpha for id in adapters})
            try:
                measure_requests(live, tokenizer, measurement, rows, retain_dataset, batch_size, progress)
            finally:
                live.unload()
            self._files.write_json(self._files.next_measurement(), measurement.to_dict())
            newest = self[measurement.newest]
            if newest.metrics is None and newest.id in measurement.requests:
                newest.metrics = measurement.requests[newest.id] | {"retain": measurement.retain}
                self._write()
        return measurement
