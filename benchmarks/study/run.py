"""
The study: every method, several seeds, one number.

    python benchmarks/study/run.py --tofu TOFU --work WORK                       # the small setting, all methods
    python benchmarks/study/run.py --tofu TOFU --work WORK --setting smollm2 --methods rounds-held-nll mox npo wga
    python benchmarks/study/run.py --tofu TOFU --work WORK --dry_run             # what is done and what is left

TOFU is a folder with the files of the data set (forget10_perturbed.json, holdout10.json), WORK keeps models and adapters.
Results go to benchmarks/study/results, a file a method and seed; what is there is not run again, so the command goes on
where it was stopped (Ctrl-C, --time_limit). Several may run side by side: each takes what no other has begun. Afterwards
`report.py` makes the tables and plots of docs/study.md.
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import time
from pathlib import Path

from best import best
from measure import Target, point, run, write
from methods import METHODS
from setting import SETTINGS, prepare
from transformers.utils import logging as transformers_logging


RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tofu", type=Path, required=True, help="Folder with TOFU's files.")
    parser.add_argument("--work", type=Path, required=True, help="Folder for models and adapters.")
    parser.add_argument("--setting", choices=SETTINGS, default="small")
    parser.add_argument("--base_model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="Of the setting smollm2.")
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--time_limit", type=float, help="Seconds after which no further run begins.")
    parser.add_argument("--dry_run", action="store_true", help="List what is done and what is left.")
    args = parser.parse_args()
    folder = args.results / args.setting
    methods = args.methods or [name for name in METHODS if name != "msa" or args.setting != "small"]
    left = [(name, seed) for seed in args.seeds for name in methods if not (folder / f"{name}-{seed}.json").exists()]
    print(f"{len(methods) * len(args.seeds) - len(left)} runs done, {len(left)} left.", flush=True)
    if args.dry_run:
        print("\n".join(f"{name} {seed}" for name, seed in left))
        return
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("hf_unlearn").setLevel(logging.ERROR)
    begun = time.monotonic()
    with _locked(args.work / f"{args.setting}.lock", wait=True):
        prepared = prepare(args.setting, args.tofu, args.work, args.base_model)
    target = Target(prepared)
    write(folder / "target.json", target.figures)
    retrained = point(prepared.log, 0.0)
    write(folder / "retrained.json", retrained)
    for name, seed in left:
        if args.time_limit is not None and time.monotonic() - begun > args.time_limit:
            print("The time is up. The same command goes on.")
            return
        path = folder / f"{name}-{seed}.json"
        with _locked(args.work / args.setting / f"{name}-{seed}.lock") as free:
            if not free or path.exists():
                continue
            start = time.monotonic()
            result = run(prepared, target, METHODS[name], seed, args.work / args.setting / "runs")
            write(path, result)
            figures = best(result["points"], target.figures, retrained)
            print(
                f"{name} {seed}: forget quality {figures['forget_quality']:.2e}, {time.monotonic() - start:.0f} s",
                flush=True,
            )


class _locked:
    """Holds a file lock; gives whether it was free."""

    def __init__(self, path: Path, wait: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("w")
        self.flags = fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)

    def __enter__(self) -> bool:
        try:
            fcntl.flock(self.file, self.flags)
        except BlockingIOError:
            return False
        return True

    def __exit__(self, *exception: object) -> None:
        self.file.close()


if __name__ == "__main__":
    main()
