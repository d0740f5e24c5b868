"""Files and folders that are complete or absent, resumed files, links, and pipes."""

from __future__ import annotations

import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from dheads.system.files import (
    PART,
    complete_or_absent,
    complete_or_absent_folder,
    is_endless,
    part_of,
    resumable,
    stream_into,
    target_of,
)
from dheads.system.signals import undo_all

posix = pytest.mark.skipif(os.name != "posix", reason="Windows has no such files")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("there", [None, b"older"])
def test_a_file_is_complete_or_as_it_was(tmp_path: Path, there: bytes | None) -> None:
    path = tmp_path / "a.txt"
    if there is not None:
        path.write_bytes(there)
    before = names(tmp_path)

    def write(data: bytes, fail: bool = False) -> None:
        with complete_or_absent(path) as part:
            part.write_bytes(data)
            assert PART.fullmatch(part.name)[1] == "a.txt"
            assert part.parent == tmp_path
            if fail:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write(b"half", fail=True)
    assert names(tmp_path) == before
    write(b"whole")
    assert (names(tmp_path), path.read_bytes()) == (["a.txt"], b"whole")


def test_no_two_temporary_names_are_the_same(tmp_path: Path) -> None:
    assert len({part_of(tmp_path / "a") for _ in range(100)}) == 100


def test_a_half_written_file_can_be_undone(tmp_path: Path) -> None:
    writing = complete_or_absent(tmp_path / "a")
    writing.__enter__().write_bytes(b"half")
    undo_all()
    assert names(tmp_path) == []
    with pytest.raises(FileNotFoundError):
        writing.__exit__(None, None, None)
    undo_all()


def test_a_folder_is_complete_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder"

    def write(fail: bool) -> None:
        with complete_or_absent_folder(path) as part:
            (part / "a.txt").write_bytes(b"x")
            assert PART.fullmatch(part.name)[1] == "folder"
            if fail:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write(fail=True)
    assert names(path.parent) == []
    write(fail=False)
    assert (names(path.parent), names(path)) == (["folder"], ["a.txt"])
    with pytest.raises(OSError, match=r"folder"):
        write(fail=False)
    assert names(path.parent) == ["folder"]


def test_a_half_written_folder_can_be_undone(tmp_path: Path) -> None:
    writing = complete_or_absent_folder(tmp_path / "a")
    (writing.__enter__() / "b").write_bytes(b"half")
    undo_all()
    assert names(tmp_path) == []
    with pytest.raises(FileNotFoundError):
        writing.__exit__(None, None, None)


def test_an_unfinished_file_is_kept_and_continued(tmp_path: Path) -> None:
    def write(data: bytes, fail: bool) -> None:
        with resumable(tmp_path / "a.txt") as part, part.open("ab") as file:
            file.write(data)
            if fail:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write(b"half ", fail=True)
    assert names(tmp_path) == ["a.txt.part"]
    write(b"whole", fail=False)
    assert (names(tmp_path), (tmp_path / "a.txt").read_bytes()) == (["a.txt"], b"half whole")


@posix
@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_its_file_is_written(tmp_path: Path, there: bool) -> None:
    far = tmp_path / "far"
    far.mkdir()
    if there:
        (far / "real.txt").write_bytes(b"older")
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("far/real.txt")
    with complete_or_absent(tmp_path / "one") as part:
        part.write_bytes(b"whole")
        assert part.parent == far
    assert (names(tmp_path), names(far)) == (["far", "one", "two"], ["real.txt"])
    assert (tmp_path / "one").is_symlink()
    assert (tmp_path / "one").read_bytes() == b"whole"


@posix
def test_what_must_not_be_replaced(tmp_path: Path) -> None:
    """Not even by root, whom no permission restricts."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "locked").write_bytes(b"older")
    (tmp_path / "locked").chmod(0o444)
    (tmp_path / "to_locked").symlink_to("locked")
    before = names(tmp_path)
    for name, reason in {
        "folder": "it is a folder; give the name of a file",
        "pipe": "it is no file; give the name of one",
        "socket": "it is no file; give the name of one",
        "loop": "Too many levels of symbolic links",
        "locked": "it is read-only; choose another name, or make it writable",
        "to_locked": "it is read-only; choose another name, or make it writable",
    }.items():
        with pytest.raises(OSError, match=reason), complete_or_absent(tmp_path / name):
            pytest.fail("the block must not be run")
    assert names(tmp_path) == before
    assert (tmp_path / "locked").read_bytes() == b"older"
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@posix
def test_only_pipes_and_devices_are_endless(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "gone").symlink_to("nowhere")
    assert is_endless(tmp_path / "pipe")
    assert is_endless(tmp_path / "link")
    assert is_endless(Path("/dev/null"))
    for path in (tmp_path, tmp_path / "gone", tmp_path / "absent", tmp_path / "x" / "y", Path("a\0b")):
        assert not is_endless(path)
    assert target_of(tmp_path / "gone") == Path(os.path.realpath(tmp_path)) / "nowhere"


@posix
def test_a_pipes_reader_gets_every_part_at_once(tmp_path: Path) -> None:
    pipe, heard, asked = tmp_path / "pipe", [], threading.Semaphore(0)
    os.mkfifo(pipe)

    def read() -> None:
        with pipe.open("rb", buffering=0) as file:
            while data := file.read(100):
                heard.append(data)
                asked.release()

    reader = threading.Thread(target=read)
    reader.start()
    with stream_into(pipe) as stream:
        for part in (b"one", b"two"):
            assert stream.write(part) == 3
            assert asked.acquire(timeout=20)
        assert stream.name == str(pipe)
    reader.join()
    assert heard == [b"one", b"two"]


@posix
def test_a_terminal_gets_no_data() -> None:
    pty = pytest.importorskip("pty")
    ends = pty.openpty()
    with pytest.raises(OSError, match="it is a terminal"), stream_into(Path(os.ttyname(ends[1]))):
        pytest.fail("the block must not be run")
    for end in ends:
        os.close(end)
