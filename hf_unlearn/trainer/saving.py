"""Saving that leaves nothing half-written: adapters, models and checkpoints get their names once they are whole."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints


SAVING = ".saving"  # what is being written, beside where it goes
SAVING_CHECKPOINT = ".saving-checkpoint"


def move_files(source: Path, target: Path) -> None:
    """
    Move what was saved to where it belongs. Earlier weights go first and the new ones come last, so weights are never
    beside the files of others.

    Args:
        source (`Path`): Folder of what was saved, removed at the end.
        target (`Path`): Folder on the same disk.
    """
    paths = sorted(source.iterdir(), key=_is_weights)
    for path in paths:
        if _is_weights(path):
            (target / path.name).unlink(missing_ok=True)
    for path in paths:
        if path.is_dir():
            shutil.rmtree(target / path.name, ignore_errors=True)
        path.replace(target / path.name)
    source.rmdir()


def _is_weights(path: Path) -> bool:
    return path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json")


@contextmanager
def explaining_full_disk(folder: Path) -> Iterator[None]:
    """Say so where a disk is full, of which safetensors and torch pass on a part at most."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        number = getattr(error, "errno", None)
        says_so = number in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error)
        if not says_so and not (number is None and shutil.disk_usage(folder).free < 1 << 16):
            raise
        raise OSError(
            f"The disk became full while {folder} was written. What was there before is whole: make room, and go on with "
            "--resume where there is a checkpoint."
        ) from error


class SavesWhole:
    """Part of a trainer: its checkpoints and what it saves appear under their names once they are whole."""

    _is_staging = False

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, SAVING_CHECKPOINT) if self._is_staging else folder

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging, staged, final = folder / SAVING_CHECKPOINT, folder / SAVING_CHECKPOINT / name, folder / name
        if self.is_local_process_zero():
            shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
        self.accelerator.wait_for_everyone()
        self._is_staging = True
        try:
            with explaining_full_disk(folder):
                super()._save_checkpoint(model, trial)
                if self.state.best_model_checkpoint == str(staged):
                    self.state.best_model_checkpoint = str(final)
                    if self.args.should_save:
                        self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        finally:
            self._is_staging = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            _name(staged, final)
        self.accelerator.wait_for_everyone()
        if self.is_local_process_zero() and staged.exists():  # on the own disk of another node
            _name(staged, final)
        if self.args.should_save:
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            rotate_checkpoints(str(folder), save_total_limit=limit, best_model_checkpoint=best, use_mtime=True)

    @contextmanager
    def saving_to(self, output_dir: str | None) -> Iterator[Path]:
        """A folder whose files are moved to `output_dir`, by default that of the run, at the end of the context."""
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        if self._is_staging or not self.args.should_save:
            yield folder
            return
        saving = folder / SAVING
        shutil.rmtree(saving, ignore_errors=True)
        saving.mkdir(parents=True)
        try:
            with explaining_full_disk(folder):
                yield saving
                move_files(saving, folder)
        except BaseException:
            shutil.rmtree(saving, ignore_errors=True)
            raise

    def save_state(self) -> None:
        """Write `trainer_state.json` into the folder of the run."""
        if self.is_world_process_zero():
            path = Path(self.args.output_dir, TRAINER_STATE_NAME)
            temporary = path.with_name(f".{TRAINER_STATE_NAME}{SAVING}")
            with explaining_full_disk(path.parent):
                self.state.save_to_json(str(temporary))
                temporary.replace(path)


def _name(staged: Path, final: Path) -> None:
    """Give a checkpoint its name, in place of one that has it."""
    if final.exists():
        final.rename(staged.parent / "replaced")
    staged.rename(final)
    shutil.rmtree(staged.parent, ignore_errors=True)
