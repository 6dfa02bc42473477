"""One deletion request, as `requests.json` holds it."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import Any

from hf_unlearn.errors import UnlearningError


ACTIVE, REVOKED = "active", "revoked"

_KINDS = {  # of the values in `requests.json`
    "id": str,
    "date": str,
    "alpha": int | float,
    "adapter": dict,
    "data": dict | None,
    "rows": dict | None,
    "note": str,
    "status": str,
    "purged": bool,
    "history": list,
    "metrics": dict | None,
}
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass
class Request:
    """
    A deletion request.

    Args:
        id (`str`): Its name in the ledger.
        date (`str`): When it was made, ISO 8601 in UTC.
        alpha (`float`): Extrapolation strength α of its adapter.
        adapter (`dict`): `sha256` of the weights of the adapter, and the `source` it was copied from.
        data (`dict`, *optional*): `rows` and `sha256` of the forget set, as the adapter's `unlearning.json` records them;
            `None` where it does not.
        rows (`dict`, *optional*): Where the rows are: `{"kept": true}` for a copy in the ledger, or `dataset`, `config`
            and `split` of a reference; `None` where the ledger does not know.
        note (`str`, *optional*, defaults to `""`): Remark.
        status (`str`, *optional*, defaults to `"active"`): `"active"` or `"revoked"`.
        purged (`bool`, *optional*, defaults to `False`): Whether adapter and rows are deleted.
        history (`list[dict]`, *optional*): `event`, `date` and `reason` of everything that happened to it.
        metrics (`dict`, *optional*): What was measured when it was added.
    """

    id: str
    date: str
    alpha: float
    adapter: dict[str, Any]
    data: dict[str, Any] | None = None
    rows: dict[str, Any] | None = None
    note: str = ""
    status: str = ACTIVE
    purged: bool = False
    history: list[dict[str, str]] = field(default_factory=list)
    metrics: dict[str, Any] | None = None

    @property
    def is_active(self) -> bool:
        """Whether it takes part in what is built."""
        return self.status == ACTIVE

    @property
    def num_rows(self) -> int | None:
        """Rows of the forget set, where they are known."""
        return None if self.data is None else self.data.get("rows")

    def record(self, event: str, reason: str = "") -> None:
        """Add an event of this moment to the history."""
        self.history.append({"event": event, "date": parse_date(None), "reason": reason})

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Any) -> Request:
        """The inverse of [`~Request.to_dict`]; a `ValueError` or `TypeError` says why it is none."""
        request = cls(**content)
        for name, kind in _KINDS.items():
            value = getattr(request, name)
            if not isinstance(value, kind):
                raise TypeError(f"`{name}` of a request is {value!r}")
        check_id(request.id)
        if isinstance(request.alpha, bool) or not 0 < request.alpha < math.inf:
            raise ValueError(f"`alpha` of the request {request.id} is {request.alpha!r}")
        if request.status not in (ACTIVE, REVOKED):
            raise ValueError(f"`status` of the request {request.id} is {request.status!r}")
        return request


def check_id(id: str) -> str:
    """Return an id; refuse what is no folder name everywhere."""
    if not _ID.fullmatch(id):
        raise UnlearningError(
            f"The id {id!r} is not possible. Use up to 64 letters, digits, hyphens and underscores, beginning with a "
            "letter or a digit, and nothing that names a person: ids appear in what is built."
        )
    return id


def next_id(date: str, taken: Collection[str]) -> str:
    """The first free id of a day, such as `2026-11-25-001`; ids that differ in case only are not free."""
    day, used, number = date[:10], {id.lower() for id in taken}, 1
    while f"{day}-{number:03}" in used:
        number += 1
    return f"{day}-{number:03}"


def parse_date(date: str | None) -> str:
    """
    A date in ISO 8601 as UTC to the second.

    Args:
        date (`str`, *optional*): Date, or date and time; one without a time zone is UTC. Now if not given.
    """
    if date is None:
        return datetime.now(timezone.utc).isoformat(timespec="seconds")
    try:
        parsed = datetime.fromisoformat(date.replace("Z", "+00:00"))
    except ValueError as error:
        raise UnlearningError(
            f"The date {date!r} is not ISO 8601. Write it as 2026-11-25 or 2026-11-25T14:30:00+01:00."
        ) from error
    if parsed.tzinfo is None:
        parsed = parsed.replace(tzinfo=timezone.utc)
    return parsed.astimezone(timezone.utc).isoformat(timespec="seconds")
