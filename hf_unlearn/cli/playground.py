"""`hf-unlearn playground`: a page to look at the effect of α."""

from __future__ import annotations

import importlib.util
import math
import socket
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from hf_unlearn.cli import EXIT_OK
from hf_unlearn.cli.common import DataArguments, base_of, load_tokenizer, load_with_adapter, verified_checkpoint
from hf_unlearn.cli.parser import CommandParser
from hf_unlearn.cli.terminal import console, stderr
from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation import LoraAdapter
from hf_unlearn.playground import Comparison, KnownPrompt, known_prompts


DESCRIPTION = """\
Serve a page that asks the original model and θ_for = θ_ref − α·ΔW the same question, side by side, with the probability
of every token, and a slider for α. One model is loaded and its live adapter rescaled: nothing is merged, nothing is
written. The page holds the memorising adapter, so by default it can be opened on this machine alone. Ctrl-C ends it."""

EXAMPLE = """\
  hf-unlearn playground --adapter run --forget_dataset people/forget --retain_dataset people/retain"""

LOCAL_HOSTS = ("127.0.0.1", "localhost")
EXPOSED = (
    "Security: the memorising adapter is loaded, and whoever can open the page can ask the original model for what is to "
    "be forgotten. {how}"
)


@dataclass
class PlaygroundArguments(DataArguments):
    """
    Options of `hf-unlearn playground`.

    Args:
        adapter (`str`): Memorising adapter.
        base (`str`, *optional*): Base model.
        alpha (`float`, *optional*, defaults to `2.0`): α that the slider begins with.
        max_alpha (`float`, *optional*, defaults to `8.0`): Largest α of the slider.
        dtype (`str`, *optional*, defaults to `"float32"`): Dtype the base model is loaded in.
        check_base (`bool`, *optional*, defaults to `True`): Whether to refuse another base than the recorded one.
        host (`str`, *optional*, defaults to `"127.0.0.1"`): Address to listen on.
        port (`int`, *optional*): Port to listen on.
        share (`bool`, *optional*, defaults to `False`): Whether to open a public link.
        dry_run (`bool`, *optional*, defaults to `False`): Whether to check only.
    """

    adapter: str | None = field(
        default=None, metadata={"help": "Memorising adapter: the --output_dir of `hf-unlearn train`, or a Hub id."}
    )
    base: str | None = field(
        default=None, metadata={"help": "Base model the adapter was trained on; the one it names if not given."}
    )
    alpha: float = field(default=2.0, metadata={"help": "α that the slider begins with, from 0 to --max_alpha."})
    max_alpha: float = field(default=8.0, metadata={"help": "Largest α of the slider."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Dtype the base model is loaded in.", "choices": ["float32", "bfloat16", "float16"]},
    )
    check_base: bool = field(
        default=True, metadata={"help": "Refuse a base other than the one the adapter was trained on."}
    )
    host: str = field(
        default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0 lets the whole network open the page."}
    )
    port: int | None = field(
        default=None, metadata={"help": "Port to listen on; the first free one from 7860 on if not given."}
    )
    share: bool = field(
        default=False, metadata={"help": "Open a public link through gradio's servers: anybody who has it can ask."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Check all but the weights, print what would be served."})


def run(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    (arguments,) = CommandParser("playground", [PlaygroundArguments], DESCRIPTION, EXAMPLE, json=False).parse(argv)
    _check(arguments)
    adapter = LoraAdapter.load(arguments.adapter)
    adapter.refuse_result()
    base = base_of(adapter, arguments.base)
    checkpoint = verified_checkpoint(base, adapter, arguments.check_base)
    prompts = _prompts(arguments, load_tokenizer(checkpoint.folder))
    _warn(arguments)
    if arguments.dry_run:
        counts = ", ".join(f"{len(known)} of the {name}" for name, known in prompts.items()) or "none"
        console.print(
            f"Would serve {base} with {adapter.id} at α from 0 to {arguments.max_alpha:g} on {arguments.host}, port "
            f"{arguments.port or '7860 or the next free one'}{', with a public link' if arguments.share else ''}.\n"
            f"prompts to click on: {counts}"
        )
        return EXIT_OK

    from hf_unlearn.playground.page import build_page, serve  # needs gradio, and takes its time

    model, tokenizer = load_with_adapter(base, adapter, arguments.dtype, arguments.check_base)
    page = build_page(
        Comparison(model, tokenizer),
        prompts,
        alpha=arguments.alpha,
        max_alpha=arguments.max_alpha,
        title=f"{base} with {adapter.id}",
    )
    serve(page, arguments.host, arguments.port, arguments.share, announce=console.print)
    return EXIT_OK


def _check(arguments: PlaygroundArguments) -> None:
    if importlib.util.find_spec("gradio") is None:
        raise UnlearningError("The page needs gradio. Install it: pip install 'hf-unlearn[playground]'")
    if arguments.adapter is None:
        raise UnlearningError("--adapter is required. See `hf-unlearn playground --help`.")
    if not 0 < arguments.max_alpha < math.inf:
        raise UnlearningError(f"--max_alpha is {arguments.max_alpha:g}; use a finite number above 0.")
    if not 0 <= arguments.alpha <= arguments.max_alpha:
        raise UnlearningError(
            f"--alpha is {arguments.alpha:g}; use a number from 0 to --max_alpha, which is {arguments.max_alpha:g}."
        )
    if arguments.port is not None:
        _refuse_taken(arguments.host, arguments.port)


def _refuse_taken(host: str, port: int) -> None:
    """Find out before a large model is loaded that the page could not be served."""
    try:
        socket.create_server((host, port)).close()
    except (OSError, OverflowError) as error:
        raise UnlearningError(
            f"--host {host} --port {port} cannot be listened on: {error}. Name others, or leave --port out."
        ) from error


def _prompts(arguments: PlaygroundArguments, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[KnownPrompt]]:
    """Per set that is given, its prompts to click on."""
    sets = {f"{name} set": arguments.load(name) for name in ("forget", "retain")}
    chat = tokenizer.chat_template is not None
    return {name: known_prompts(rows, name, chat) for name, rows in sets.items() if rows is not None}


def _warn(arguments: PlaygroundArguments) -> None:
    if arguments.share:
        stderr(EXPOSED.format(how="--share opens it to everybody who has the link."))
    elif arguments.host not in LOCAL_HOSTS:
        stderr(EXPOSED.format(how=f"--host {arguments.host} opens it to the network."))
