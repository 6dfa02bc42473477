"""The options of `hf-unlearn requests`."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_unlearn.requests.measurement import MAX_SHRINK


OVERVIEW = """\
usage: hf-unlearn requests <action> [options]

Deletion requests one after another. Each gets a memorising adapter of its own, trained on the same base model, and an
α. They are kept in a private folder, the ledger, and the model without any of them is θ_ref − Σ α_i·ΔW_i: an exact sum,
whatever the order, from which a request that is revoked leaves without a trace.

  add           put an adapter into the ledger, or train one and put it there
  list          all requests
  show ID       one request, with its history
  revoke ID     leave a request out from now on
  restore ID    take a revoked request in again
  purge ID      delete the adapter and the rows of a revoked request
  build         write the model, or one adapter, with all active requests or some
  measure       what each request does to its rows, alone and together, and what the newest has changed

example:
  hf-unlearn requests add --ledger ledger --model_name_or_path M --forget_dataset request-1.jsonl \\
      --retain_dataset retain.jsonl --alpha 1 --note "ticket 4711"
  hf-unlearn requests add --ledger ledger --adapter run --alpha 2 --forget_dataset request-2.jsonl --measure
  hf-unlearn requests list --ledger ledger
  hf-unlearn requests build --ledger ledger --output_dir forget-model
  hf-unlearn requests revoke 2026-11-25-001 --ledger ledger --reason "withdrawn"

`hf-unlearn requests <action> --help` explains each, `--dry_run` checks everything and writes nothing."""

ADD = """\
Add a request: copy the memorising adapter of `hf-unlearn train` into the ledger (--adapter), or train it in one go. In
the second case every other option of `hf-unlearn train` can be given too, also as --config file.yaml, and
--model_name_or_path may be left out once the ledger has a base. A request may be a single row. An error or an
interruption leaves the ledger as it was."""

ADD_EXAMPLE = """\
  hf-unlearn requests add --ledger ledger --adapter run --alpha 2 --forget_dataset rows.jsonl --note "ticket 4711"
  hf-unlearn requests add --ledger ledger --forget_dataset rows.jsonl --retain_dataset retain.jsonl --alpha 1 \\
      --learning_rate 1e-3 --measure"""

LIST = "All requests of a ledger, in the order in which they were added."
LIST_EXAMPLE = "  hf-unlearn requests list --ledger ledger --json"

SHOW = "One request: its adapter, its rows, what was measured when it was added, and all that happened to it."
SHOW_EXAMPLE = "  hf-unlearn requests show 2026-11-25-001 --ledger ledger"

REVOKE = """\
Leave a request out of everything that is built from now on: the next build is what it would be without it. Models that
were built before do not change, and the memorising adapter stays until `purge`."""
REVOKE_EXAMPLE = '  hf-unlearn requests revoke 2026-11-25-001 --ledger ledger --reason "withdrawn by the person"'

RESTORE = "Take a revoked request in again: the next build is what it was before the revocation."
RESTORE_EXAMPLE = "  hf-unlearn requests restore 2026-11-25-001 --ledger ledger"

PURGE = """\
Delete the memorising adapter of a revoked request and the rows kept with it. The record stays, without anything that
could be built from. This cannot be undone."""
PURGE_EXAMPLE = "  hf-unlearn requests purge 2026-11-25-001 --ledger ledger --dry_run"

BUILD = """\
Write θ_ref − Σ α_i·ΔW_i over the active requests, as a whole model, streamed in pieces, or as one plain LoRA adapter
whose rank is the sum of theirs. The sum is exact, and taken by id: the order in which requests were added plays no
part."""
BUILD_EXAMPLE = """\
  hf-unlearn requests build --ledger ledger --output_dir forget-model --dtype bfloat16
  hf-unlearn requests build --ledger ledger --output_dir forget-adapter --format adapter
  hf-unlearn requests build --ledger ledger --output_dir without-one --without 2026-11-25-001"""

MEASURE = """\
Measure the answer probability of the rows of each active request: under the base, under its own adapter alone, under
all requests before the newest, and under all of them; and the same of a retain set. Nothing is merged: the adapters are
live on the base. Says in words where one request has weakened another. The result is kept in the ledger."""
MEASURE_EXAMPLE = "  hf-unlearn requests measure --ledger ledger --retain_dataset retain.jsonl"


@dataclass
class LedgerArguments:
    """
    Which ledger.

    Args:
        ledger (`str`): Its folder.
    """

    ledger: str | None = field(
        default=None, metadata={"help": "Folder of the ledger. The first `add` makes it. Keep it private. Required."}
    )


@dataclass
class RequestArguments(LedgerArguments):
    """
    Which request.

    Args:
        id (`str`): Its id.
    """

    id: str | None = field(
        default=None,
        metadata={
            "help": "Id of the request; it may also follow the action without --id. In `add` optional: the date and a "
            "number if not given. It appears in what is built, so it should not name a person."
        },
    )


@dataclass
class PlannedArguments:
    """
    Options of every action that writes.

    Args:
        dry_run (`bool`, *optional*, defaults to `False`): Whether to check only.
    """

    dry_run: bool = field(default=False, metadata={"help": "Check everything, say what would happen, write nothing."})


@dataclass
class ChangeArguments(PlannedArguments, RequestArguments):
    """Options of `restore` and `purge`."""


@dataclass
class RevokeArguments(ChangeArguments):
    """
    Options of `revoke`.

    Args:
        reason (`str`): Why.
    """

    reason: str | None = field(default=None, metadata={"help": "Why it is revoked, for the record. Required."})


@dataclass
class BaseArguments(LedgerArguments):
    """
    The base model of the ledger.

    Args:
        base (`str`, *optional*): Base model.
        dtype (`str`, *optional*): Dtype.
    """

    base: str | None = field(
        default=None,
        metadata={
            "help": "Base model, where it is not (or no longer) where the adapter of the first request says. It is checked "
            "against the fingerprint in the ledger."
        },
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "float32, bfloat16 or float16: of the model that is built (the base's if not given), or in which the "
            "base is loaded for training and measuring (float32 if not given)."
        },
    )


@dataclass
class BuildArguments(PlannedArguments, BaseArguments):
    """
    Options of `build`.

    Args:
        output_dir (`str`): Folder to write.
        format (`str`, *optional*, defaults to `"model"`): `"model"` or `"adapter"`.
        only (list of `str`, *optional*): Requests to take.
        without (list of `str`, *optional*): Requests to leave out.
        overwrite (`bool`, *optional*, defaults to `False`): Whether to replace an existing folder.
    """

    output_dir: str | None = field(
        default=None, metadata={"help": "Folder to write; it appears once it is whole. Required."}
    )
    format: str = field(
        default="model", metadata={"help": "Write a whole model or a LoRA adapter.", "choices": ["model", "adapter"]}
    )
    only: list[str] | None = field(
        default=None, metadata={"help": "Ids of the requests to take; all active ones if not given."}
    )
    without: list[str] | None = field(default=None, metadata={"help": "Ids of active requests to leave out."})
    overwrite: bool = field(default=False, metadata={"help": "Replace --output_dir if it exists."})


@dataclass
class MeasureArguments(PlannedArguments, BaseArguments):
    """
    Options of `measure`.

    Args:
        retain_dataset, retain_config, retain_split (`str`, *optional*): Retain set.
        batch_size (`str`, *optional*, defaults to `"auto"`): Rows in a batch.
        max_shrink (`float`, *optional*, defaults to `0.1`): Share of an effect that may get lost.
    """

    retain_dataset: str | None = field(
        default=None, metadata={"help": "Retain set: rows that must stay, for training and measuring."}
    )
    retain_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub retain set."})
    retain_split: str | None = field(default=None, metadata={"help": "Split of the retain set."})
    batch_size: str = field(
        default="auto", metadata={"help": "Rows in a batch when measuring, or `auto`. It changes no value."}
    )
    max_shrink: float = field(
        default=MAX_SHRINK,
        metadata={
            "help": "Share of the effect of a request, and of the retain probability, that may get lost without a word."
        },
    )


@dataclass
class AddArguments(MeasureArguments, RequestArguments):
    """
    Options of `add`, besides those of `hf-unlearn train`.

    Args:
        adapter (`str`, *optional*): Memorising adapter.
        alpha (`float`): Extrapolation strength.
        note (`str`, *optional*): Remark.
        date (`str`, *optional*): Date of the request.
        forget_dataset, forget_config, forget_split (`str`, *optional*): Forget set.
        keep_rows (`bool`, *optional*, defaults to `False`): Whether to copy the rows.
        measure (`bool`, *optional*, defaults to `False`): Whether to measure afterwards.
    """

    adapter: str | None = field(
        default=None,
        metadata={"help": "Memorising adapter: the --output_dir of `hf-unlearn train`. Trained now if not given."},
    )
    alpha: float | None = field(
        default=None, metadata={"help": "α of this request, above 0; `hf-unlearn sweep` helps to choose it. Required."}
    )
    note: str | None = field(default=None, metadata={"help": "Remark, such as the number of a ticket."})
    date: str | None = field(
        default=None, metadata={"help": "Date of the request in ISO 8601, UTC without a time zone; now if not given."}
    )
    forget_dataset: str | None = field(
        default=None,
        metadata={"help": "The rows to forget. With --adapter, those it was trained on: `measure` reads them there."},
    )
    forget_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub forget set."})
    forget_split: str | None = field(default=None, metadata={"help": "Split of the forget set."})
    keep_rows: bool = field(
        default=False,
        metadata={"help": "Copy the rows into the ledger. Otherwise it records where they are, and no row."},
    )
    measure: bool = field(default=False, metadata={"help": "Measure all active requests once this one is added."})
