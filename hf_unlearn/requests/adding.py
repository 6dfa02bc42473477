"""What has to be right before an adapter becomes a request."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets

from hf_unlearn.data import load_rows
from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation import PROVENANCE_FILE, LoraAdapter
from hf_unlearn.extrapolation.arithmetic import check_alpha
from hf_unlearn.extrapolation.low_rank import check_combinable
from hf_unlearn.requests.base import check_model, check_same_base
from hf_unlearn.requests.records import Request, check_id, next_id, parse_date
from hf_unlearn.requests.rows import check_rows, describe_source, possible_hashes


if TYPE_CHECKING:
    from hf_unlearn.requests.ledger import Ledger

logger = logging.getLogger(__name__)


def plan_request(
    ledger: Ledger,
    adapter: LoraAdapter | str | Path,
    alpha: float,
    *,
    id: str | None = None,
    note: str | None = None,
    date: str | None = None,
    base: str | None = None,
    forget_dataset: Any = None,
    forget_config: str | None = None,
    forget_split: str | None = None,
    keep_rows: bool = False,
) -> Request:
    """
    The request that [`Ledger.add`] would add; the arguments are the same. Nothing is written.

    Raises:
        [`~hf_unlearn.errors.UnlearningError`]: a duplicate id, adapter or forget set, an adapter of another base, a
            forget adapter, rows other than those of the training.
    """
    adapter = adapter if isinstance(adapter, LoraAdapter) else LoraAdapter.load(adapter)
    date = parse_date(date)
    request = Request(
        id=next_id(date, [request.id for request in ledger.requests]) if id is None else check_id(id),
        date=date,
        alpha=check_alpha(alpha),
        adapter={"sha256": adapter.sha256, "source": adapter.id},
        data=adapter.provenance.get("data", {}).get("forget"),
        note=note or "",
    )
    _refuse_taken(ledger, request.id)
    hashes = {request.data["sha256"]} if request.data and request.data.get("sha256") else set()
    _refuse_duplicate(ledger, {adapter.sha256} | _sources(adapter.provenance.get("operator")), hashes)
    _check_adapter(ledger, adapter, base)
    if forget_dataset is not None:
        rows = load_rows(forget_dataset, config=forget_config, split=forget_split, name="forget set")
        check_rows(rows, request.data, adapter.id)
        request.rows = describe_source(forget_dataset, forget_config, forget_split, keep_rows)
    elif keep_rows:
        raise UnlearningError("`keep_rows` needs the rows. Name them with `forget_dataset` (--forget_dataset).")
    request.record("added")
    return request


def check_before_training(
    ledger: Ledger, alpha: float, id: str | None, date: str | None, rows: datasets.Dataset, model: str, revision: str
) -> None:
    """
    Find what would keep an adapter out of the ledger before it is trained.

    Args:
        ledger ([`Ledger`]): The ledger.
        alpha (`float`): Extrapolation strength.
        id (`str`, *optional*): Id of the request.
        date (`str`, *optional*): Its date.
        rows (`datasets.Dataset`): The forget set.
        model (`str`): The model to train on.
        revision (`str`): Its revision on the Hub.
    """
    check_alpha(alpha)
    parse_date(date)
    if id is not None:
        _refuse_taken(ledger, check_id(id))
    _refuse_duplicate(ledger, set(), possible_hashes(rows))
    if ledger.base is not None:
        check_model(ledger.base, model, revision)


def _refuse_taken(ledger: Ledger, id: str) -> None:
    if id.lower() in (known.id.lower() for known in ledger.requests):
        raise UnlearningError(f"The ledger has a request {id} already. Choose another id.")


def _refuse_duplicate(ledger: Ledger, adapters: set[str], data: set[str]) -> None:
    """Refuse what a request that is not purged has taken already, by SHA-256 of adapters and of forget sets."""
    for known in ledger.requests:
        same_adapter = known.adapter["sha256"] in adapters
        if known.purged or not (same_adapter or (known.data or {}).get("sha256") in data):
            continue
        what = "This adapter, or one it was combined from," if same_adapter else "A request of the same rows"
        remedy = (
            "Twice would count twice: revoke and purge it first"
            if known.is_active
            else f"Restore it with `hf-unlearn requests restore {known.id}`, or purge it first"
        )
        raise UnlearningError(f"{what} is in the ledger as {known.id} ({known.status}). {remedy}.")


def _sources(operator: Any) -> set[str]:
    """SHA-256 of all adapters that a combination was made from."""
    sources = operator.get("sources", []) if isinstance(operator, dict) else []
    return {sha for source in sources for sha in ({source["sha256"]} | _sources(source.get("operator")))}


def _check_adapter(ledger: Ledger, adapter: LoraAdapter, base: str | None) -> None:
    adapter.refuse_result()
    if ledger.base is not None:
        check_same_base(ledger.base, adapter, base)
    provenance = adapter.provenance
    if isinstance(provenance.get("operator"), dict):
        logger.warning(
            f"{adapter.id} is a combination of adapters ({provenance['operator'].get('name')}). Its record of the "
            "forget set is that of the first: whether another request is of rows of the others cannot be told."
        )
    elif not provenance.get("data", {}).get("forget"):
        logger.warning(
            f"{adapter.id} has no record of its forget set in {PROVENANCE_FILE}: its number of rows is not known, and "
            "whether another request is of the same rows cannot be told."
        )
    check_combinable([*(ledger.adapter(request.id) for request in ledger.active()), adapter])
