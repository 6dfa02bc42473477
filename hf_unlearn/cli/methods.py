"""Which method `hf-unlearn train` trains by, and what belongs to it."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import yaml

from hf_unlearn.errors import UnlearningError
from hf_unlearn.trainer import ExtrapolationTrainer
from hf_unlearn.trainer.baselines import METHODS


DEFAULT_METHOD = "extrapolation"


def method_of(argv: list[str]) -> str:
    """The method that a command line or its configuration file names."""
    probe = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    probe.add_argument("--method")
    probe.add_argument("--config")
    given, _ = probe.parse_known_args(argv)
    method = given.method or _options_in(given.config).get("method", DEFAULT_METHOD)
    if method not in METHODS:
        raise UnlearningError(f"--method {method} is not known. Use one of {', '.join(METHODS)}.")
    return method


def extrapolates(method: str) -> bool:
    """Whether the result of a method is made by walking away from what it trains."""
    return issubclass(METHODS[method][0], ExtrapolationTrainer)


def refuse_options_of_others(argv: list[str], method: str, own: list[type]) -> None:
    """
    Raise where an option is given that another method has and this one has not.

    Args:
        argv (`list[str]`): The command line.
        method (`str`): The method.
        own (list of types): Dataclasses of the options of a run by this method.
    """
    given = {part.split("=")[0][2:].replace("-", "_") for part in argv if part.startswith("--")}
    config = next((argv[i + 1] for i, part in enumerate(argv[:-1]) if part == "--config"), None)
    known = {option.name for kind in own for option in dataclasses.fields(kind)}
    for name in sorted((given | _options_in(config).keys()) - known):
        others = [other for other in METHODS if name in {f.name for f in dataclasses.fields(METHODS[other][1])}]
        if others:
            raise UnlearningError(
                f"--{name} is an option of --method {', '.join(others)}, and this run is by {method}. Leave it out, or "
                "name that method."
            )


def describe(method: str) -> str:
    """What the help of `hf-unlearn train --method ...` says of a method whose result is what is trained."""
    summary = METHODS[method][0].__doc__.strip().split("\n\n")[0]
    return (
        f"Train an adapter (or all weights, with --train_all_weights) by --method {method}.\n"
        f"{' '.join(summary.split())}\nThe adapter is the result: evaluate it with `hf-unlearn eval`."
    )


def _options_in(config: str | None) -> dict[str, Any]:
    """Options of a configuration file; none where it cannot be read, which the parser says later."""
    try:
        content = yaml.safe_load(Path(config).read_text(encoding="utf-8")) if config is not None else {}
    except (OSError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}
