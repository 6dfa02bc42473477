"""
Rows of any accepted shape → tokenised prompt/completion sets. The pairing of the two sets, which needs the trainer's
stack, is imported from `hf_unlearn.data.pairing`.
"""

from hf_unlearn.data.checks import (
    DataReport,
    SetSummary,
    check_sets,
    data_hash,
    drop_untrainable,
    raise_for_untrainable,
    summarize,
)
from hf_unlearn.data.formats import to_prompt_completion
from hf_unlearn.data.loading import load_rows
from hf_unlearn.data.tokenization import encode_pair, encode_prompt, encode_set, tokenize_rows


__all__ = [
    "DataReport",
    "SetSummary",
    "check_sets",
    "data_hash",
    "drop_untrainable",
    "encode_pair",
    "encode_prompt",
    "encode_set",
    "load_rows",
    "raise_for_untrainable",
    "summarize",
    "to_prompt_completion",
    "tokenize_rows",
]
