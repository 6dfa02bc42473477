"""Results in order from several threads, and a file written beside the work on it."""

from __future__ import annotations

import errno
import os
import threading
import time

import pytest

from hf_unlearn.extrapolation import background
from hf_unlearn.extrapolation.background import BackgroundWriter, map_in_threads


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_come_in_order(threads):
    def slow_first(number: int) -> int:
        time.sleep(0.02 if number % threads == 0 else 0)
        return number * number

    assert list(map_in_threads(slow_first, range(20), threads)) == [number * number for number in range(20)]


def test_two_threads_work_at_the_same_time():
    together = threading.Barrier(2)
    assert list(map_in_threads(lambda number: together.wait(10) in (0, 1), range(6), 2)) == [True] * 6


def test_one_thread_is_that_of_the_caller():
    assert set(map_in_threads(lambda number: threading.get_ident(), range(3), 1)) == {threading.get_ident()}


@pytest.mark.parametrize("threads", [1, 3])
def test_no_more_items_are_taken_than_there_are_threads(threads):
    started, taken = [], 0
    for _ in map_in_threads(started.append, range(20), threads):
        taken += 1
        assert len(started) <= taken + (threads if threads > 1 else 0)
    assert len(started) == taken == 20


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("error", [ValueError("third"), KeyboardInterrupt()])
def test_an_error_is_raised_in_its_place(threads, error):
    def fail(number: int) -> int:
        if number == 2:
            raise error
        return number

    results = map_in_threads(fail, range(20), threads)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(type(error)):
        next(results)


def test_pieces_of_any_size_follow_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(background, "WRITE_BYTES", 1000)
    monkeypatch.setattr(background, "SYNC_BYTES", 5000)
    pieces = [os.urandom(size) for size in (1, 999, 1000, 1001, 0, 12345, 2000, 7)]
    with (tmp_path / "x").open("wb") as file, BackgroundWriter(file) as writer:
        for piece in pieces:
            writer.write(piece)
    assert (tmp_path / "x").read_bytes() == b"".join(pieces)


def test_the_file_is_synced_while_it_is_written_and_at_its_end(tmp_path, monkeypatch):
    sizes: list[int] = []
    monkeypatch.setattr(background, "SYNC_BYTES", 1 << 20)
    monkeypatch.setattr(background.os, "fsync", lambda file: sizes.append(os.fstat(file).st_size))
    with (tmp_path / "x").open("wb") as file, BackgroundWriter(file) as writer:
        for _ in range(5):
            writer.write(bytes(1 << 19))
            writer.wait()
        writer.write(b"end")
    assert sizes[0] == 1 << 20 and sizes[-1] == (5 << 19) + 3
    assert len(sizes) == 3


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_is_an_error():
    with pytest.raises(OSError) as raised, open("/dev/full", "wb") as file, BackgroundWriter(file) as writer:
        for _ in range(3):
            writer.write(bytes(1 << 17))
    assert raised.value.errno == errno.ENOSPC


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failed_sync_is_an_error(tmp_path, monkeypatch, failing):
    calls: list[int] = []

    def fail(file: int) -> None:
        calls.append(file)
        if len(calls) == failing:
            raise OSError(errno.EIO, "bad disk")

    monkeypatch.setattr(background, "SYNC_BYTES", 1000)
    monkeypatch.setattr(background.os, "fsync", fail)
    with (
        pytest.raises(OSError, match="bad disk"),
        (tmp_path / "x").open("wb") as file,
        BackgroundWriter(file) as writer,
    ):
        writer.write(bytes(1000))
        writer.wait()
        writer.write(bytes(10))
    assert len(calls) == failing


def test_an_error_of_the_caller_is_raised_and_nothing_synced(tmp_path, monkeypatch):
    monkeypatch.setattr(background.os, "fsync", lambda file: pytest.fail("synced"))
    with (
        pytest.raises(ValueError, match="mine"),
        (tmp_path / "x").open("wb") as file,
        BackgroundWriter(file) as writer,
    ):
        writer.write(b"abc")
        raise ValueError("mine")
