"""How much this package says: its loggers and its progress bars."""

from __future__ import annotations

import logging
import os
import sys
from logging import CRITICAL, DEBUG, ERROR, INFO, WARNING
from typing import TextIO


LEVELS = {"debug": DEBUG, "info": INFO, "warning": WARNING, "error": ERROR, "critical": CRITICAL}

_logger = logging.getLogger("hf_unlearn")


class _Handler(logging.StreamHandler):
    """Writes to stderr, as it is at the time, what no handler of the application takes."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    def filter(self, record: logging.LogRecord) -> bool:
        return not logging.getLogger().handlers and super().filter(record)


def get_verbosity() -> int:
    """The level from which on messages are shown, e.g. `logging.WARNING`."""
    return _logger.getEffectiveLevel()


def set_verbosity(level: int) -> None:
    """
    Show the messages of this package from a level on.

    Args:
        level (`int`): `hf_unlearn.logging.DEBUG`, `INFO`, `WARNING` (the default), `ERROR` or `CRITICAL`.
    """
    _logger.setLevel(level)


def set_verbosity_debug() -> None:
    """Show everything."""
    set_verbosity(DEBUG)


def set_verbosity_info() -> None:
    """Show what is done, warnings and errors."""
    set_verbosity(INFO)


def set_verbosity_warning() -> None:
    """Show warnings and errors."""
    set_verbosity(WARNING)


def set_verbosity_error() -> None:
    """Show errors only."""
    set_verbosity(ERROR)


def enable_progress_bar() -> None:
    """Show progress bars again: those of this package, and those that datasets, transformers and the Hub show for it."""
    _switch_progress_bars("enable")


def disable_progress_bar() -> None:
    """Show no progress bars: none of this package, and none that datasets, transformers and the Hub show for it."""
    _switch_progress_bars("disable")


def _switch_progress_bars(switch: str) -> None:
    import datasets  # here, so that the import of this package is light
    from transformers.utils import logging as transformers_logging

    getattr(transformers_logging, f"{switch}_progress_bar")()  # those of the Hub too, whose bars this package uses
    getattr(datasets, f"{switch}_progress_bars")()


def _level_of_environment() -> int:
    name = os.environ.get("HF_UNLEARN_VERBOSITY", "warning").lower()
    if name not in LEVELS:
        _logger.warning(f"HF_UNLEARN_VERBOSITY={name} is not known. Use one of {', '.join(LEVELS)}.")
    return LEVELS.get(name, WARNING)


_logger.addHandler(_Handler())
set_verbosity(_level_of_environment())
