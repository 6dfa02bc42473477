"""A repository on the Hub: checked before anything is sent, written in one commit, failures in plain words."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import ModelInfo

from hf_unlearn.errors import UnlearningError
from hf_unlearn.hub.contents import Content, is_hub_id, is_uploaded_name


_STATUS_OF_XET = re.compile(r"HTTP status \w+ error \((?P<code>\d{3})")  # hf_xet has no error class for an answer

READ_ROLES = {"read", "no_access"}

ANSWERS = {
    401: "the Hub does not accept the token (401). Log in again with `hf auth login`, or set HF_TOKEN to a valid token",
    403: "the token may not do this (403). Use one with write access to the repository; a fine-grained token needs it for "
    "this very namespace",
    404: "the Hub does not find the repository or branch, or the token may not see it (404). Check the names",
    409: "something else has changed the repository at the same time (409). Look at it, then try again",
    412: "something else has changed the repository at the same time (412). Look at it, then try again",
    413: "the Hub finds a file too large (413)",
    429: "the Hub asks for a pause (429). Try again in some minutes",
}


class PushError(OSError):
    """The Hub or the network refused: nothing is wrong with the input, and the local files are untouched."""


class HubRepository:
    """
    A model repository that the token may write to. Build it with [`HubRepository.check`].

    Args:
        api (`HfApi`): Client of the Hub.
        id (`str`): Id with its namespace.
        private (`bool`): Whether nobody else may see it.
        revision (`str`, *optional*): Branch to write to.
    """

    def __init__(self, api: HfApi, id: str, private: bool, revision: str | None) -> None:
        self.api = api
        self.id = id
        self.private = private
        self.revision = revision

    @classmethod
    def check(
        cls,
        repo_id: str,
        *,
        private: bool = True,
        revision: str | None = None,
        overwrite: bool = False,
        token: str | None = None,
    ) -> HubRepository:
        """
        Check token, namespace and what is in the repository, and write nothing.

        Args:
            repo_id (`str`): Id of the repository; in the namespace of the token's user if it names none.
            private (`bool`, *optional*, defaults to `True`): Whether it has to be private.
            revision (`str`, *optional*): Branch to write to.
            overwrite (`bool`, *optional*, defaults to `False`): Whether it may hold files already.
            token (`str`, *optional*): Token; that of `HF_TOKEN` or `hf auth login` if not given.

        Raises:
            [`~hf_unlearn.errors.UnlearningError`]: an id, token or repository that cannot be used.
            [`PushError`]: the Hub refuses or cannot be reached.
        """
        if not is_hub_id(repo_id):
            raise UnlearningError(f"--repo_id {repo_id} is no id of a Hub repository. It has the form namespace/name.")
        api = hub_api(token)
        user = check_token(api)
        repository = cls(api, _in_namespace(repo_id, user), private, revision)
        with repository.plain_errors():
            repository._check_existing(overwrite)
        return repository

    @property
    def url(self) -> str:
        """Its page."""
        branch = f"/tree/{self.revision}" if self.revision else ""
        return f"{self.api.endpoint}/{self.id}{branch}"

    def upload(self, files: dict[str, Content], message: str) -> str:
        """
        Create the repository if there is none, and write `files` in one commit. Files that an earlier upload left and this
        one does not have are deleted in it.

        Args:
            files (`dict`): Name in the repository -> a file, or its content.
            message (`str`): Title of the commit.

        Returns:
            `str`: address of the commit.
        """
        with self.plain_errors():
            if self._info() is None:
                self.api.create_repo(self.id, private=self.private)
            if self.revision and self._info(self.revision) is None:
                self.api.create_branch(self.id, branch=self.revision)
            now = self.api.model_info(self.id, revision=self.revision)
            self._refuse_public(now)
            stale = [name for name in _names(now) if is_uploaded_name(name) and name not in files]
            operations = [CommitOperationAdd(name, _source(content)) for name, content in files.items()]
            operations += [CommitOperationDelete(name) for name in stale]
            commit = self.api.create_commit(
                self.id, operations, commit_message=message, revision=self.revision, parent_commit=now.sha
            )
            return commit.commit_url

    def _check_existing(self, overwrite: bool) -> None:
        if self._info() is None:
            return
        info = self._info(self.revision)
        self._refuse_public(info or self._info())
        if info is not None and not overwrite and set(_names(info)) - {".gitattributes"}:
            raise UnlearningError(
                f"{self.url} holds files already. Name another --repo_id or --revision, or pass --overwrite to replace "
                "what an earlier upload wrote."
            )

    def _info(self, revision: str | None = None) -> ModelInfo | None:
        """What the Hub says of the repository or branch; `None` where there is none."""
        try:
            return self.api.model_info(self.id, revision=revision)
        except RevisionNotFoundError:
            return None
        except RepositoryNotFoundError as error:
            if error.response.status_code == 404:
                return None
            raise

    def _refuse_public(self, info: ModelInfo) -> None:
        if self.private and not info.private:
            raise UnlearningError(
                f"{self.url} is public. Make it private in its settings, name another --repo_id, or pass --public if "
                "everybody may have the result."
            )

    @contextmanager
    def plain_errors(self) -> Iterator[None]:
        """Turn what the client raises into a [`PushError`] that says what happened."""
        with plain_errors(self.api, self.id):
            yield


def hub_api(token: str | None = None) -> HfApi:
    """A client of the Hub, or of what `HF_ENDPOINT` names now; refused where `HF_HUB_OFFLINE` is set."""
    if constants.is_offline_mode():
        raise UnlearningError("HF_HUB_OFFLINE is set, so nothing can be uploaded. Unset it, or use --dry_run.")
    endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")
    return HfApi(endpoint=endpoint, token=token, library_name="hf_unlearn")


def check_token(api: HfApi) -> dict[str, Any]:
    """Who the token belongs to; raise where there is none or it can only read."""
    if not (api.token or get_token()):
        raise UnlearningError("There is no token for the Hub. Log in with `hf auth login`, or set HF_TOKEN.")
    with plain_errors(api, "The user of the token"):
        user = api.whoami()
    role = ((user.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise UnlearningError(
            "The token can only read. Make one with write access (https://huggingface.co/settings/tokens), then log in "
            "with `hf auth login` or set HF_TOKEN."
        )
    return user


def _in_namespace(repo_id: str, user: dict[str, Any]) -> str:
    """The id with its namespace, which has to be the user's or one of an organisation that lets the user write."""
    if "/" not in repo_id:
        return f"{user['name']}/{repo_id}"
    namespace = repo_id.split("/")[0]
    organisations = {item["name"]: item.get("roleInOrg") for item in user.get("orgs") or []}
    if namespace == user["name"]:
        return repo_id
    if namespace not in organisations:
        own = ", ".join([user["name"], *organisations])
        raise UnlearningError(
            f"--repo_id {repo_id}: {namespace} is no namespace of the token's user. Choose from: {own}."
        )
    if organisations[namespace] in READ_ROLES:
        raise UnlearningError(
            f"--repo_id {repo_id}: {user['name']} may only read in {namespace}. Ask for the write role, or use "
            f"{user['name']}/{repo_id.split('/')[1]}."
        )
    return repo_id


def _names(info: ModelInfo) -> list[str]:
    return [file.rfilename for file in info.siblings or []]


def _source(content: Content) -> bytes | str:
    return content if isinstance(content, bytes) else str(content)


@contextmanager
def plain_errors(api: HfApi, what: str) -> Iterator[None]:
    """
    Turn what the client of the Hub raises into a [`PushError`] that says what happened.

    Args:
        api (`HfApi`): The client.
        what (`str`): What was being asked for or written.
    """
    try:
        yield
    except (UnlearningError, PushError):
        raise
    except Exception as error:  # of HTTP, of the transport, of the storage's own client
        raise PushError(f"{what}: {_in_words(api, error)}.") from error


def _in_words(api: HfApi, error: BaseException) -> str:
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    code = next((item.response.status_code for item in chain if isinstance(item, HfHubHTTPError)), None)
    if code is None and (match := _STATUS_OF_XET.search(str(chain[-1]))):
        code = int(match["code"])
    if code in ANSWERS:
        return ANSWERS[code]
    if code is not None and code >= 500:
        return f"the Hub failed ({code}). Try again later"
    if code is not None:
        return f"the Hub refused ({code}): {' '.join(str(error).split())}"
    reason = f"{type(chain[-1]).__name__}: {chain[-1]}".rstrip(".: ")
    return f"the connection to {api.endpoint} failed or broke off ({reason}). No commit was confirmed; try again"
