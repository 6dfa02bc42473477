"""The command line: `hf-unlearn <command>`. It holds no logic; each command is one module."""

from __future__ import annotations

import gc
import importlib
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from hf_unlearn import __version__


COMMANDS = {
    "quickstart": "make a real model forget, end to end, in minutes on a CPU",
    "sample": "write retain rows that are sampled from the model itself",
    "train": "memorise a forget set with LoRA, holding the rest still, or unlearn by another method",
    "eval": "evaluate any model, an adapter at several α, or a published log",
    "audit": "try to get back what a model was made to forget, with a verdict on each attack",
    "sweep": "evaluate a trained adapter over many α, and choose one by a rule",
    "extrapolate": "write the forget model or the forget adapter at one α",
    "export": "write the result as vLLM and llama.cpp load it",
    "requests": "deletion requests one after another: add, revoke, measure, build the model without them",
    "playground": "a page to look at the effect of α: both answers side by side, token by token",
    "push": "upload a forget model or forget adapter to the Hub, with its card",
    "combine": "make one direction out of memorising adapters: average, project, agree, weigh",
    "completion": "print a script by which bash, zsh or fish completes all of this",
}

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


def overview() -> str:
    """What `hf-unlearn --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: hf-unlearn <command> [options]",
            "",
            "Make a language model forget: memorise with LoRA, then extrapolate away from the memory.",
            "",
            *lines,
            "",
            "The usual way:",
            "  hf-unlearn train --model_name_or_path M --forget_dataset forget.jsonl --retain_dataset retain.jsonl \\",
            "      --output_dir run",
            "  hf-unlearn sweep --adapter run --forget_dataset forget.jsonl --retain_dataset retain.jsonl --output_dir s",
            "  hf-unlearn extrapolate --adapter run --alpha 2 --output_dir forget-model",
            "",
            "`hf-unlearn <command> --help` explains each, `--dry_run` checks everything and writes nothing.",
        ]
    )


@contextmanager
def _no_collections() -> Iterator[None]:
    """
    Keep garbage collection off imports, which make a million objects and no garbage, and off what they have made ever
    after: a third of the time that a command takes to start.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def main(argv: list[str] | None = None) -> int:
    """
    Run one command.

    Args:
        argv (`list[str]`, *optional*): Arguments after the program's name; those of the process if not given.

    Returns:
        `int`: 0 done, 1 failed or the rule was missed, 2 input that cannot be used, 130 interrupted.
    """
    own_process = argv is None
    argv = sys.argv[1:] if own_process else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return EXIT_OK
    if argv[0] in ("-V", "--version"):
        print(f"hf-unlearn {__version__}")
        return EXIT_OK
    from hf_unlearn.errors import UnlearningError  # here, as the lines above need no other package

    command, *arguments = argv
    if command not in COMMANDS:
        print(f"hf-unlearn: unknown command {command!r}. Choose from: {', '.join(COMMANDS)}.", file=sys.stderr)
        return EXIT_USAGE
    try:
        with _no_collections() if own_process else nullcontext():
            run = importlib.import_module(f"hf_unlearn.cli.{command}").run
        with importlib.import_module("hf_unlearn.cli.terminal").json_output:
            return run(arguments)
    except UnlearningError as error:
        print(f"hf-unlearn {command}: {error}", file=sys.stderr)
        return EXIT_USAGE
    except (FloatingPointError, OSError) as error:
        print(f"hf-unlearn {command}: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print(f"hf-unlearn {command}: interrupted.", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:  # of a library, which says in its own words what is wrong
        traceback.print_exc()
        print(f"hf-unlearn {command}: failed, as the lines above say where: {error}", file=sys.stderr)
        return EXIT_FAILED
    finally:
        distributed = sys.modules.get("torch.distributed")
        if distributed is not None and distributed.is_available() and distributed.is_initialized():
            importlib.import_module("hf_unlearn.trainer.processes").leave_processes()
