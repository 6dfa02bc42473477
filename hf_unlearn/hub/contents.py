"""What of a forget model or forget adapter is uploaded: an allow-list of files, free of local paths and of rows."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation.adapter import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    FORGET_ADAPTER_KIND,
    LoraAdapter,
)
from hf_unlearn.extrapolation.checkpoint import INDEX_FILE, WEIGHTS_FILE
from hf_unlearn.extrapolation.model_config import CONFIG_FILE
from hf_unlearn.extrapolation.plan import TEMPLATE_FOLDER
from hf_unlearn.extrapolation.provenance import PROVENANCE_FILE, read_provenance


CARD_FILE = "README.md"
ADAPTER_FOLDER = "adapter"  # in a repository that holds a model as well
RESULT_KINDS = {"model": "forget-model", "adapter": FORGET_ADAPTER_KIND}

# Written anew, without local paths.
JSON_FILES = {
    "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.json",
    "preprocessor_config.json", "processor_config.json",
}  # fmt: skip
# Uploaded as they are.
TOKENIZER_FILES = {
    "tokenizer.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json", "chat_template.jinja",
}  # fmt: skip
_WEIGHTS = re.compile(r"(adapter_)?model(-\d{5}-of-\d{5})?\.safetensors")
_NAMES_OF_THE_FOLDER = {"_name_or_path", "name_or_path"}

Content = Path | bytes


@dataclass(frozen=True)
class ForgetResult:
    """
    A folder that `hf-unlearn extrapolate` wrote. Build it with [`ForgetResult.load`].

    Args:
        folder (`Path`): The folder.
        kind (`str`): `"model"` or `"adapter"`.
        record (`dict`): Its `unlearning.json`.
    """

    folder: Path
    kind: str
    record: dict[str, Any]

    @classmethod
    def load(cls, folder: str | Path, kind: str) -> ForgetResult:
        """
        Read a folder and refuse all but a forget model or forget adapter.

        Args:
            folder (`str` or `Path`): The folder.
            kind (`str`): What it has to be, `"model"` or `"adapter"`.

        Raises:
            [`~hf_unlearn.errors.UnlearningError`]: it is something else; a memorising adapter above all.
        """
        folder = Path(folder).expanduser()
        if not folder.is_dir():
            raise UnlearningError(f"--{kind} {folder} is no folder. Pass one that `hf-unlearn extrapolate` wrote.")
        record = read_provenance(folder)
        _check_kind(folder, kind, record)
        result = cls(folder, kind, record)
        result._check_weights()
        return result

    @property
    def alpha(self) -> float:
        """The extrapolation strength."""
        return self.record["alpha"]

    @property
    def weights(self) -> list[str]:
        """Names of the weights files: of a model those in its index."""
        if self.kind == "adapter":
            return [ADAPTER_WEIGHTS_FILE]
        index = self.folder / INDEX_FILE
        return sorted(set(_read_json(index)["weight_map"].values())) if index.is_file() else [WEIGHTS_FILE]

    def _check_weights(self) -> None:
        for name in self.weights:
            if Path(name).name != name or not name.endswith(".safetensors") or not (self.folder / name).is_file():
                raise UnlearningError(
                    f"{self.folder} holds no weights file {name!r}. Write the folder again with `hf-unlearn extrapolate`."
                )
        if self.kind == "adapter":
            adapter = LoraAdapter.load(self.folder)
            if adapter.sha256 == (self.record.get("adapter") or {}).get("sha256"):
                raise UnlearningError(
                    f"{adapter.file.path} is the memorising adapter itself, although {PROVENANCE_FILE} says otherwise. "
                    "It is never uploaded. Write the forget adapter again with `hf-unlearn extrapolate --format adapter`."
                )

    def base(self, base_model: str | None = None) -> tuple[str, str | None]:
        """
        Hub id and revision of the base model.

        Args:
            base_model (`str`, *optional*): The id as the user gives it; the recorded one if not given.

        Raises:
            [`~hf_unlearn.errors.UnlearningError`]: the recorded base is a local folder, or the id is none of the Hub.
        """
        return base_on_hub(self.record.get("base") or {}, base_model)

    def public_record(self, base_model: str | None = None) -> dict[str, Any]:
        """
        What of `unlearning.json` is uploaded: no local paths, and no hashes of sets, since the hash of a small set confirms
        to anybody who guesses it that it was the one.
        """
        base, revision = self.base(base_model)
        recorded, adapter = self.record.get("base") or {}, self.record.get("adapter") or {}
        operator = self.record.get("operator")
        sets = (self.record.get("data") or {}).items()
        return {
            "method": self.record["method"],
            "kind": self.record["kind"],
            "alpha": self.alpha,
            "operator": operator.get("name") if isinstance(operator, dict) else operator,
            "dtype": self.record.get("dtype"),
            "base": {"id": base, "revision": revision, **_chosen(recorded, "fingerprint", "quantization_config")},
            "adapter": _chosen(adapter, "sha256", "quantization_config"),
            "realised_error": self.record.get("realised_error"),
            "data": {name: _chosen(content, "rows") for name, content in sets},
            "versions": self.record.get("versions"),
        }

    def files(self, base_model: str | None = None) -> dict[str, Content]:
        """
        Name in the repository -> the file, or its content where it is written anew.

        Args:
            base_model (`str`, *optional*): Hub id of the base; the recorded one if not given.
        """
        base, revision = self.base(base_model)
        files: dict[str, Content] = {name: self.folder / name for name in self.weights}
        if self.kind == "adapter":
            config = _public_json(self.folder / ADAPTER_CONFIG_FILE, base)
            files[ADAPTER_CONFIG_FILE] = _json_bytes(config | {"base_model_name_or_path": base, "revision": revision})
        else:
            files[CONFIG_FILE] = _json_bytes(_public_json(self.folder / CONFIG_FILE, base))
            if (self.folder / INDEX_FILE).is_file():
                files[INDEX_FILE] = self.folder / INDEX_FILE
            files |= self._small_files(base)
        files[PROVENANCE_FILE] = _json_bytes(self.public_record(base_model))
        return files

    def _small_files(self, base: str) -> dict[str, Content]:
        files: dict[str, Content] = {}
        for path in [*self.folder.iterdir(), *(self.folder / TEMPLATE_FOLDER).glob("*.jinja")]:
            name = path.relative_to(self.folder).as_posix()
            if path.name in JSON_FILES and path.is_file():
                files[name] = _json_bytes(_public_json(path, base))
            elif path.is_file() and (path.name in TOKENIZER_FILES or path.suffix == ".tiktoken" or "/" in name):
                files[name] = path
        return files

    def left_out(self, files: dict[str, Content]) -> list[str]:
        """Names in the folder that are not among `files`; `/` at the end of a folder."""
        kept = {name.partition("/")[0] for name in files}
        return sorted(path.name + "/" * path.is_dir() for path in self.folder.iterdir() if path.name not in kept)


def _check_kind(folder: Path, kind: str, record: dict[str, Any]) -> None:
    if not record:
        raise UnlearningError(
            f"{folder} holds no {PROVENANCE_FILE}, so nobody can tell whether it is what memorised or what forgot. Pass a "
            "folder that `hf-unlearn extrapolate` wrote."
        )
    method, found = record.get("method"), record.get("kind")
    if method == "model-extrapolation" and found == RESULT_KINDS[kind]:
        if not isinstance(record.get("alpha"), (int, float)):
            raise UnlearningError(f"{folder / PROVENANCE_FILE} says no α. Write the folder again.")
        return
    other = next((name for name, value in RESULT_KINDS.items() if value == found), None)
    if method == "model-extrapolation" and other is not None:
        raise UnlearningError(f"--{kind} {folder} is a {found}. Pass it as --{other}.")
    if method == "model-extrapolation":
        raise UnlearningError(
            f"--{kind} {folder} is a memorising adapter: it makes the base *more* likely to state what it is meant to "
            "forget, and is never uploaded. Write the result with `hf-unlearn extrapolate` and pass that folder."
        )
    raise UnlearningError(
        f"--{kind} {folder} is by `{method}`. Only what `hf-unlearn extrapolate` wrote is uploaded, since the card says how."
    )


def base_on_hub(recorded: dict[str, Any], base_model: str | None = None) -> tuple[str, str | None]:
    """
    Hub id and revision of a base model.

    Args:
        recorded (`dict`): The base as `unlearning.json` records it. The revision is known of a base on the Hub alone.
        base_model (`str`, *optional*): The id as the user gives it.

    Raises:
        [`~hf_unlearn.errors.UnlearningError`]: the recorded base is a local folder, or the id is none of the Hub.
    """
    if base_model is not None:
        if not is_hub_id(base_model) or Path(base_model).exists():
            raise UnlearningError(
                f"--base_model {base_model} is a local path or no id of a Hub repository. Name the base as others find "
                "it, e.g. org/name."
            )
        return base_model, recorded.get("revision") if recorded.get("id") == base_model else None
    if not recorded.get("revision") or not is_hub_id(str(recorded.get("id"))):
        raise UnlearningError(
            f"The base model, {recorded.get('id')}, was a local folder, which nobody else has. Name its repository on the "
            "Hub: --base_model of `hf-unlearn push`, `base_model` of `push_to_hub`."
        )
    return recorded["id"], recorded["revision"]


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of the id of a Hub repository."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def is_uploaded_name(name: str) -> bool:
    """Whether a file in a repository has a name that an upload may have given it, so that the next may delete it."""
    path = PurePosixPath(name.removeprefix(f"{ADAPTER_FOLDER}/"))
    if str(path.parent) == ".eval_results":
        return path.name == "hf_unlearn.yaml"
    if str(path.parent) == TEMPLATE_FOLDER:
        return path.suffix == ".jinja"
    names = {CARD_FILE, CONFIG_FILE, INDEX_FILE, ADAPTER_CONFIG_FILE, PROVENANCE_FILE, *JSON_FILES, *TOKENIZER_FILES}
    if str(path.parent) != ".":
        return False
    return path.name in names or path.suffix == ".tiktoken" or _WEIGHTS.fullmatch(path.name) is not None


def _chosen(content: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: content[key] for key in keys if key in content}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnlearningError(f"{path} cannot be read ({error}). Write the folder again.") from error


def _json_bytes(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def _public_json(path: Path, base: str) -> dict[str, Any]:
    """The content of a JSON file without local paths. Code of a model is not uploaded; it is the one of the base."""
    content = _without_paths(_read_json(path))
    if "auto_map" in content:
        content["auto_map"] = _code_of(base, content["auto_map"])
    return content


def _code_of(base: str, reference: Any) -> Any:
    """References to classes (`modeling_x.XModel`) as those of the repository `base`."""
    if isinstance(reference, dict):
        return {key: _code_of(base, value) for key, value in reference.items()}
    if isinstance(reference, list):
        return [_code_of(base, value) for value in reference]
    return f"{base}--{reference}" if isinstance(reference, str) and "--" not in reference else reference


def _without_paths(content: Any) -> Any:
    """The content without entries that are paths of some machine."""
    if isinstance(content, dict):
        kept = {key: value for key, value in content.items() if key not in _NAMES_OF_THE_FOLDER}
        return {key: _without_paths(value) for key, value in kept.items() if not _is_path(value)}
    if isinstance(content, list):
        return [_without_paths(value) for value in content if not _is_path(value)]
    return content


def _is_path(value: Any) -> bool:
    """Whether a value is an absolute path; `/` and `/think` may as well be tokens."""
    if not isinstance(value, str) or "\n" in value:
        return False
    path = PurePosixPath(value)
    return (path.is_absolute() and len(path.parts) > 2) or PureWindowsPath(value).is_absolute() or value[:2] == "~/"
