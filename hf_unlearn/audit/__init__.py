"""What is left in a model for someone who tries: attacks, and a verdict on each."""

from hf_unlearn.audit.auditing import Audit, audit, make_case, plan_audit, run_audit
from hf_unlearn.audit.findings import Comparison, Finding, Measurement
from hf_unlearn.audit.options import ATTACKS, SYSTEM_PROMPT, AuditOptions
from hf_unlearn.audit.report import write_audit


__all__ = [
    "ATTACKS",
    "SYSTEM_PROMPT",
    "Audit",
    "AuditOptions",
    "Comparison",
    "Finding",
    "Measurement",
    "audit",
    "make_case",
    "plan_audit",
    "run_audit",
    "write_audit",
]
