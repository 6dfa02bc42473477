"""What `hf-unlearn requests` prints."""

from __future__ import annotations

from collections.abc import Iterable

from rich.markup import escape
from rich.table import Column, Table

from hf_unlearn.requests import Ledger, Measurement, Request
from hf_unlearn.requests.measurement import Scores


STATES = ("base", "alone", "before", "together")


def requests_table(requests: Iterable[Request]) -> Table:
    """One line a request."""
    table = Table(
        "id", "date", Column("rows", justify="right"), Column("α", justify="right"), "status", "note", box=None
    )
    for request in requests:
        status = "purged" if request.purged else request.status
        if not request.is_active:
            last = next(event for event in reversed(request.history) if event["event"] == "revoked")
            status += f" {last['date'][:10]}: {last['reason']}"
        rows = "?" if request.num_rows is None else str(request.num_rows)
        cells = (request.id, request.date[:10], rows, f"{request.alpha:g}", status, request.note)
        table.add_row(*map(escape, cells), style=None if request.is_active else "dim")
    return table


def request_lines(request: Request) -> str:
    """Everything the ledger knows of one request, without its rows."""
    data, rows = request.data or {}, request.rows or {}
    where = "kept in the ledger" if rows.get("kept") else rows.get("dataset", "not known to the ledger")
    lines = {
        "id": request.id,
        "date": request.date,
        "status": "purged" if request.purged else request.status,
        "α": f"{request.alpha:g}",
        "note": request.note or "–",
        "adapter": f"SHA-256 {request.adapter['sha256']}",
        "forget set": f"{data.get('rows', '?')} rows, SHA-256 {data.get('sha256', 'not recorded')}",
        "rows": where,
    }
    if request.metrics:
        lines["when added"] = "answer probability " + _probabilities(request.metrics)
        if request.metrics.get("retain"):
            lines["retain set"] = "answer probability " + _probabilities(request.metrics["retain"])
    facts = [f"{label + ':':<27}{value}" for label, value in lines.items()]
    events = [f"{event['date']}: {event['event']} {event['reason']}".rstrip() for event in request.history]
    return "\n".join([*facts, *events])


def _probabilities(scores: dict[str, Scores]) -> str:
    return ", ".join(f"{state} {scores[state]['probability']:.3f}" for state in STATES if state in scores)


def measurement_table(measurement: Measurement, ledger: Ledger) -> Table:
    """Answer probabilities, one line a request and one for the retain set."""
    headers = ["rows of", "n", "α", "base", "alone", f"before {measurement.newest}", "all", "change by newest"]
    columns = (Column(title, justify="right" if number else "left") for number, title in enumerate(headers))
    table = Table(*columns, box=None, title="Mean answer probability")
    sets = {id: (f"{ledger[id].num_rows or '?'}", f"{ledger[id].alpha:g}") for id in measurement.requests}
    scores = dict(measurement.requests)
    if measurement.retain is not None:
        sets["retain set"], scores["retain set"] = ("", ""), measurement.retain
    for name, cells in sets.items():
        values = [f"{scores[name][state]['probability']:.3f}" if state in scores[name] else "" for state in STATES]
        change = scores[name]["together"]["probability"] - scores[name]["before"]["probability"]
        table.add_row(name, *cells, *values, f"{change:+.3f}")
    return table
