"""The one exception of this package, and what turns the failures of others into it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError


class UnlearningError(ValueError):
    """
    Input that cannot be used.

    The message names the option, row or file, says why it cannot be used, and how to go on. The command line prints
    it without a traceback and exits with code 2.
    """


@contextmanager
def explaining(what: str, remedy: str) -> Iterator[None]:
    """
    Say in one message what failed and how to go on, where a library raises over a file or an option.

    Args:
        what (`str`): What failed, e.g. `"The model m cannot be loaded"`.
        remedy (`str`): How to go on: a sentence.
    """
    try:
        yield
    except UnlearningError:
        raise
    except pickle.UnpicklingError as error:  # torch's message advises to run it
        raise UnlearningError(
            f"{what}: its weights are no safetensors, and pickled with more than tensors in them, which can run code and is "
            f"not read. {remedy}"
        ) from error
    except (ValueError, OSError, SafetensorError) as error:
        reason = str(error).rstrip(".")
        raise UnlearningError(f"{what}: {reason}. {remedy}") from error


def parse_json(content: str | bytes) -> Any:
    """`json.loads`, which raises a `ValueError` for what is nested too deeply as well."""
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
