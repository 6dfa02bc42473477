"""`hf-unlearn push`: upload a forget model or forget adapter to the Hub, with its card."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.markup import escape
from rich.table import Table

from hf_unlearn.cli import EXIT_OK
from hf_unlearn.cli.parser import CommandParser
from hf_unlearn.cli.terminal import console, json_output, stderr
from hf_unlearn.errors import UnlearningError
from hf_unlearn.hub.contents import Content
from hf_unlearn.hub.push import HubPush


DESCRIPTION = """\
Upload a forget model, a forget adapter or both, with a model card, in one commit: into a private repository unless
--public is given. Only files on a list are uploaded. A memorising adapter, its checkpoints, rows and records of the
training never are. The token is that of `hf auth login` or of HF_TOKEN."""

EXAMPLE = """\
  hf-unlearn push --adapter forget-adapter --repo_id me/forgetful --results sweep --dry_run
  hf-unlearn push --model forget-model --repo_id me/forgetful --results sweep \\
      --forgotten "Private facts of two people, on their request."
"""


@dataclass
class PushArguments:
    """
    Options of `hf-unlearn push`.

    Args:
        repo_id (`str`): Repository to write to.
        model (`str`, *optional*): Forget model to upload.
        adapter (`str`, *optional*): Forget adapter to upload.
        base_model (`str`, *optional*): Hub id of the base model.
        revision (`str`, *optional*): Branch to write to.
        public (`bool`, *optional*, defaults to `False`): Whether everybody may see the repository.
        results (`str`, *optional*): Evaluation for the card.
        forgotten (`str`, *optional*): What was forgotten, for the card.
        license (`str`, *optional*): Licence for the card.
        overwrite (`bool`, *optional*, defaults to `False`): Whether to replace an earlier upload.
        dry_run (`bool`, *optional*, defaults to `False`): Whether to show only what would be uploaded.
    """

    repo_id: str | None = field(
        default=None, metadata={"help": "Repository to write to, e.g. me/forgetful. It is made if there is none."}
    )
    model: str | None = field(
        default=None, metadata={"help": "Forget model to upload: a folder that `hf-unlearn extrapolate` wrote."}
    )
    adapter: str | None = field(
        default=None,
        metadata={
            "help": "Forget adapter to upload: a folder of `hf-unlearn extrapolate --format adapter`. With --model it goes "
            "into the folder adapter/ of the repository."
        },
    )
    base_model: str | None = field(
        default=None,
        metadata={"help": "Hub id of the base model; the recorded one if not given. Required where that is a folder."},
    )
    revision: str | None = field(
        default=None,
        metadata={"help": "Branch to write to; it is made if there is none. The default branch if not given."},
    )
    public: bool = field(
        default=False, metadata={"help": "Let everybody see the repository. Read the security note first."}
    )
    results: str | None = field(
        default=None,
        metadata={
            "help": "Evaluation for the card: the evaluation.json of `hf-unlearn sweep` or `eval`, or its folder. Only "
            "figures are taken from it."
        },
    )
    forgotten: str | None = field(
        default=None, metadata={"help": "What was forgotten, in your words, for the card. Never the rows themselves."}
    )
    license: str | None = field(
        default=None, metadata={"help": "Licence for the card, e.g. apache-2.0; that of the base where it is known."}
    )
    overwrite: bool = field(
        default=False,
        metadata={"help": "Replace the files of an earlier upload. Files of other names stay in the repository."},
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Check the folders, print the files that would be uploaded and the card, and ask no Hub."},
    )


def run(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    (arguments,) = CommandParser("push", [PushArguments], DESCRIPTION, EXAMPLE).parse(argv)
    if arguments.repo_id is None:
        raise UnlearningError("--repo_id is required: the repository to write to. See `hf-unlearn push --help`.")
    push = HubPush(
        repo_id=arguments.repo_id,
        model=arguments.model,
        adapter=arguments.adapter,
        base_model=arguments.base_model,
        revision=arguments.revision,
        private=not arguments.public,
        overwrite=arguments.overwrite,
        results=arguments.results,
        forgotten=arguments.forgotten,
        license=arguments.license,
    )
    if arguments.dry_run:
        _show(push)
        return EXIT_OK
    upload(push)
    return EXIT_OK


def upload(push: HubPush) -> None:
    """Upload and say where it is."""
    if not push.private:
        stderr(
            "Note: everybody may see the repository. Where the base is public, publishing the result publishes what was "
            "to be forgotten."
        )
    url = push.push()
    console.print(f"Uploaded to {escape(url)} ({'private' if push.private else 'public'}).")
    json_output.report(url=url, private=push.private)


def _show(push: HubPush) -> None:
    files = push.files()
    table = Table("file", "bytes", title=f"{push.repo_id}, {'private' if push.private else 'public'}")
    for name, content in sorted(files.items()):
        table.add_row(escape(name), f"{_size(content):,}")
    console.print(table)
    for kind, result in push.forgets.items():
        left_out = result.left_out(result.files(push.base_model))
        if left_out:
            console.print(f"Left out of --{kind}: {escape(', '.join(left_out))}")
    console.print("README.md, without what the Hub says of the base:\n")
    console.print(files["README.md"].decode("utf-8"), markup=False, highlight=False)
    sizes = {name: _size(content) for name, content in sorted(files.items())}
    json_output.report(dry_run=True, repo_id=push.repo_id, private=push.private, files=sizes)


def _size(content: Content) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size
