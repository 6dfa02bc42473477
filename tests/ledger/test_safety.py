"""What stops in the middle leaves the ledger as it was, and two commands do not meet."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from ledger_adapters import ROWS, built, check_equal, contents, filled

from hf_unlearn import Ledger, UnlearningError


class TestSafety:
    """What stops in the middle leaves the ledger as it was."""

    # The call that fails: its owner, its name, and which of them.
    MOMENTS = {
        "first file": (shutil, "copyfile", 1),
        "last file": (shutil, "copyfile", 3),
        "move of the folder": (Path, "rename", 1),
        "flush of the index": (os, "fsync", 1),
        "move of the index": (os, "replace", 1),
    }

    @pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt()], ids=["error", "interrupt"])
    @pytest.mark.parametrize("moment", MOMENTS)
    def test_add_stops(self, adapters, tmp_path, monkeypatch, moment, error):
        ledger = filled(tmp_path / "ledger", adapters, "A")
        before, requests = contents(ledger.folder), [request.to_dict() for request in ledger.requests]
        new = Ledger.open(tmp_path / "new", create=True)
        owner, name, count = self.MOMENTS[moment]
        original, calls = getattr(owner, name), []

        def call(*args):
            calls.append(name)
            if len(calls) == count:
                raise error
            return original(*args)

        for stopped in (ledger, new):
            calls.clear()
            with monkeypatch.context() as patch, pytest.raises(type(error)):
                patch.setattr(owner, name, call)
                stopped.add(adapters["B"], 1, id="B", forget_dataset=ROWS["B"], keep_rows=True)
            assert len(calls) == count
        assert contents(ledger.folder) == before
        assert [request.to_dict() for request in ledger.requests] == requests
        assert not new.folder.exists()
        assert ledger.add(adapters["B"], 1, id="B").is_active and new.add(adapters["B"], 1).is_active

    SCRIPT = """
import os, signal, sys
from hf_unlearn import Ledger
original = os.replace
def kill(*args):
    if {before}: os.kill(os.getpid(), signal.SIGKILL)
    original(*args)
    os.kill(os.getpid(), signal.SIGKILL)
os.replace = kill
Ledger.open(sys.argv[1]).add(sys.argv[2], 1.0, id="B")
"""

    @pytest.mark.parametrize("before", [True, False])
    def test_add_is_killed(self, interpreters, adapters, tmp_path, before):
        ledger = filled(tmp_path / "ledger", adapters, "A")
        index = (ledger.folder / "requests.json").read_bytes()
        code, said = interpreters.run("-c", self.SCRIPT.format(before=before), ledger.folder, adapters["B"])
        assert code == -signal.SIGKILL, said
        after = Ledger.open(ledger.folder)
        if before:
            assert (ledger.folder / "requests.json").read_bytes() == index
            assert after.add(adapters["B"], 1, id="B").is_active
        check_equal(built(after, tmp_path / "one"), built(after, tmp_path / "two", only=["A", "B"]))
        assert not (ledger.folder / ".work").exists()

    def test_two_at_once(self, interpreters, ledger, adapters, tmp_path):
        script = (
            "import sys, time; from hf_unlearn import Ledger\n"
            "with Ledger.open(sys.argv[1]).locked(): print('locked', flush=True); time.sleep(600)"
        )
        other = interpreters.start("-c", script, ledger.folder)
        try:
            other.wait_for("locked")
            for change in (
                lambda: ledger.add(adapters["A"], 1, id="D"),
                lambda: ledger.revoke("A", "withdrawn"),
                lambda: ledger.build(tmp_path / "out"),
            ):
                with pytest.raises(UnlearningError, match="Another command is working on the ledger"):
                    change()
            assert [request.id for request in Ledger.open(ledger.folder).active()] == [
                "A",
                "B",
                "C",
            ]  # reading goes on
            assert (ledger.folder / ".work").is_dir()  # that of the other
        finally:
            other.send_signal(signal.SIGKILL)
            other.wait()
        ledger.revoke("A", "withdrawn")
        assert not (ledger.folder / ".work").exists()

    def test_what_another_command_wrote_is_kept(self, ledger):
        other = Ledger.open(ledger.folder)
        ledger.revoke("A", "withdrawn")
        other.revoke("B", "withdrawn")
        assert [request.id for request in Ledger.open(ledger.folder).active()] == ["C"]
