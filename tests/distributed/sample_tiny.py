"""
Samples rows from the tiny model in as many processes as it is launched with, twice: `sample_tiny.py OUTPUT_DIR`. Each
process writes `facts-RANK.json` for the assertions.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tiny import tiny_llama, tiny_tokenizer

from hf_unlearn.data.sampling import sample_retain_set
from hf_unlearn.evaluation.batching import process_state
from hf_unlearn.trainer.processes import leave_processes


def main(output_dir: Path) -> None:
    state, model, decoded = process_state(), tiny_llama(), []
    model.model.embed_tokens.register_forward_hook(
        lambda module, args, output: decoded.append(len(args[0]) if (args[0] == 1).any() else 0)  # rows that begin
    )
    options = {"num_rows": 9, "max_new_tokens": 8, "batch_size": 2, "cache_dir": output_dir / "cache"}
    facts = {"processes": state.num_processes}
    facts["rows"] = sample_retain_set(model, tiny_tokenizer(), progress=False, **options).to_list()
    facts["decoded"] = sum(decoded)
    decoded.clear()
    facts["again"] = sample_retain_set(model, tiny_tokenizer(), progress=False, **options).to_list()
    facts["decoded_again"] = sum(decoded)
    (output_dir / f"facts-{state.process_index}.json").write_text(json.dumps(facts))
    leave_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
