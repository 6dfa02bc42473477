"""Running the attacks one after another on one model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_unlearn.audit.attack import Attack, Retrained
from hf_unlearn.audit.case import Case, Row, load_sets
from hf_unlearn.audit.direct import Direct
from hf_unlearn.audit.findings import LEAKS, Finding
from hf_unlearn.audit.membership import Membership
from hf_unlearn.audit.options import AuditOptions
from hf_unlearn.audit.prefix import Prefix
from hf_unlearn.audit.prompts import FewShot, Paraphrase, SystemPrompt
from hf_unlearn.audit.quantisation import Quantisation
from hf_unlearn.audit.relearning import Relearning
from hf_unlearn.audit.reverse import Reverse
from hf_unlearn.audit.weights import BaseWeights, check_plain
from hf_unlearn.errors import UnlearningError


ALL_ATTACKS: dict[str, Attack] = {
    attack.name: attack
    for attack in (
        Relearning(),
        Quantisation(),
        Paraphrase(),
        Prefix(),
        FewShot(),
        SystemPrompt(),
        Membership(),
        Reverse(),
    )
}


OF_VERDICTS = ("attacks", "margin", "auc_tolerance", "batch_size")  # options that change no value


@dataclass
class Audit:
    """
    What [`audit`] found.

    Args:
        findings (`dict[str, Finding]`): By the name of the attack; `"direct"` is the model as it is.
        options ([`AuditOptions`]): The options of the run.
        rows (`dict[str, list[Row]]`): The rows of each set.
        facts (`dict[str, str]`): What was audited, and how.
    """

    findings: dict[str, Finding]
    options: AuditOptions
    rows: dict[str, list[Row]] = field(repr=False)
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def leaks(self) -> list[str]:
        """Names of what leaks, the model as it is among them."""
        return [name for name, finding in self.findings.items() if finding.verdict == LEAKS]

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "facts": self.facts,
            "options": asdict(self.options),
            "sets": {name: len(rows) for name, rows in self.rows.items()},
            "references": {name: [row.answer for row in rows] for name, rows in self.rows.items() if name != "retain"},
            "leaks": self.leaks,
            "attacks": {name: finding.to_dict() for name, finding in self.findings.items()},
        }


def audit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    forget: Any,
    retain: Any,
    *,
    holdout: Any = None,
    base: str | Path | PreTrainedModel | None = None,
    alpha: float | None = None,
    retrained_audit: str | Path | dict[str, Any] | None = None,
    paraphrased_questions: str | None = None,
    options: AuditOptions | None = None,
    limit: int | None = None,
    progress: bool = False,
    on_start: Callable[[str], None] | None = None,
) -> Audit:
    """
    Try to get back out of a model what it was made to forget.

    Attacks that change weights do so in place and put them back; the model is afterwards what it was, to the bit. Beside
    it there is one copy of the changed weights, in the memory of the host.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A causal LM with plain weights: no adapter, not quantised.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        forget, retain (`Any`):
            The sets: what [`load_rows`] takes (a `datasets.Dataset`, a list of rows, a file, a Hub id).
        holdout (`Any`, *optional*):
            Rows of the same kind as the forget set that the model never saw. Attacks are judged by them.
        base (`str`, `Path` or `PreTrainedModel`, *optional*):
            The model before forgetting, for the reverse extrapolation. Of a folder or Hub id one tensor is read at a
            time.
        alpha (`float`, *optional*):
            The α at which the model was extrapolated, where that is known: t = 1/α is then tried too.
        retrained_audit (`str`, `Path` or `dict`, *optional*):
            The `audit.json` of a model retrained without the forget rows, audited on the same rows with the same
            options. Attacks are judged by it.
        paraphrased_questions (`str`, *optional*):
            Column of the questions in other words; `paraphrased_question` where there is one.
        options ([`AuditOptions`], *optional*):
            Which attacks, and how hard they try.
        limit (`int`, *optional*):
            The first rows of each set only, for a trial.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show progress bars.
        on_start (`Callable`, *optional*):
            Gets the title of each attack when it begins.

    Raises:
        [`~hf_unlearn.errors.UnlearningError`]: rows that cannot be used, a model with an adapter or quantised weights, the
            tokenizer or the base of another model, a retrained model's audit of other rows.
    """
    check_plain(model)
    case = make_case(
        tokenizer,
        {"forget": forget, "retain": retain, "holdout": holdout},
        options or AuditOptions(),
        model=model,
        base=base,
        alpha=alpha,
        paraphrased_questions=paraphrased_questions,
        limit=limit,
        progress=progress,
    )
    return run_audit(case, retrained_audit, on_start)


def make_case(
    tokenizer: PreTrainedTokenizerBase,
    sets: dict[str, Any],
    options: AuditOptions,
    *,
    model: PreTrainedModel | None = None,
    base: str | Path | PreTrainedModel | None = None,
    alpha: float | None = None,
    paraphrased_questions: str | None = None,
    limit: int | None = None,
    progress: bool = False,
) -> Case:
    """What is audited, checked; arguments as those of [`audit`]. Without a model it can be planned, not run."""
    given = {name: rows for name, rows in sets.items() if rows is not None}
    rows = load_sets(given, tokenizer.chat_template is not None, paraphrased_questions, limit)
    weights = None if base is None else BaseWeights(base)
    case = Case(tokenizer, rows, options, model=model, base=weights, alpha=alpha, progress=progress)
    if model is not None and weights is not None:
        obstacle = weights.obstacle(model)
        if obstacle is not None:
            raise UnlearningError(
                f"--base {weights.label} does not fit the model: {obstacle}. Name the model before forgetting, or leave it "
                "out."
            )
    return case


def plan_audit(case: Case) -> dict[str, str]:
    """Per attack, what it will do, or why it cannot be run. Needs no weights."""
    plans = {}
    for attack in _chosen(case.options):
        obstacle = attack.obstacle(case)
        plans[attack.name] = f"not run: {obstacle}" if obstacle is not None else attack.plan(case)
        if obstacle is None:
            plans[attack.name] += "".join(f". {note.removesuffix('.')}" for note in attack.notes(case))
    return plans


def run_audit(
    case: Case,
    retrained_audit: str | Path | dict[str, Any] | None = None,
    on_start: Callable[[str], None] | None = None,
) -> Audit:
    """Run the chosen attacks of a case; arguments as those of [`audit`]."""
    retrained = Retrained(read_retrained(retrained_audit, case))
    findings = {}
    for attack in _chosen(case.options):
        if on_start is not None:
            on_start(attack.title)
        case.doing = case.doing and attack.title
        findings[attack.name] = attack.run(case, retrained)
    return Audit(findings, case.options, case.rows)


def read_retrained(source: str | Path | dict[str, Any] | None, case: Case) -> dict[str, Any] | None:
    """
    The content of a retrained model's `audit.json`, which must be of the same rows.

    Args:
        source (`str`, `Path` or `dict`, *optional*): The file, its folder, or its content.
        case ([`Case`]): What it is compared with.
    """
    if source is None or isinstance(source, dict):
        content = json.loads(json.dumps(source))  # as it is read from a file
    else:
        path = Path(source).expanduser()
        path = path / "audit.json" if path.is_dir() else path
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UnlearningError(
                f"--retrained_audit {source} cannot be read: {error}. Pass the audit.json of the retrained model, or its "
                "folder."
            ) from error
    if content is None:
        return None
    try:
        theirs, options = content["references"]["forget"], content["options"]
        content["attacks"].items()
    except (KeyError, TypeError, AttributeError) as error:
        raise UnlearningError(
            f"--retrained_audit {source} is no audit.json: it has no {error}. Pass the audit.json of the retrained model."
        ) from error
    if theirs != [row.answer for row in case.rows["forget"]]:
        raise UnlearningError(
            f"The retrained model's audit is of other forget rows ({len(theirs)}, here {len(case.rows['forget'])}, or "
            "another order). Audit it on the same rows."
        )
    own = json.loads(json.dumps(asdict(case.options)))
    other = [name for name in own if name not in OF_VERDICTS and options.get(name) != own[name]]
    if other:
        raise UnlearningError(
            f"The retrained model's audit has another {' and '.join(f'`{name}`' for name in other)}: "
            f"{', '.join(str(options.get(name)) for name in other)}. Audit both with the same options."
        )
    return content


def _chosen(options: AuditOptions) -> list[Attack]:
    """The model as it is, and the chosen attacks in the order of `ATTACKS`."""
    return [Direct(), *(attack for name, attack in ALL_ATTACKS.items() if name in options.attacks)]
