"""The tables of a prepared folder: merged shards, damaged tables, and failures of a run that was killed."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from dheads.dataset.manifest import Clip, FailedTable, read_clips, shard_path, write_clips
from dheads.errors import DheadsError
from dheads.system.files import PART, complete_or_absent

CLIPS = [Clip(f"s{k % 3}/{k}", f"s{k % 3}", "train", k + 1, f"s{k % 3}/{k}.mp4") for k in range(7)]
BY_NAME = sorted(CLIPS, key=lambda clip: clip.clip)
HEADER = "clip,speaker,split,frames,source\n"  # of earlier versions


# --- Clips


def test_a_table_is_read_as_written(tmp_path: Path) -> None:
    write_clips(tmp_path, CLIPS)
    assert read_clips(tmp_path) == BY_NAME
    assert [path.name for path in tmp_path.iterdir()] == ["clips.csv"]
    rows = b"clip,speaker,split,frames,source,offset_ms,sync\ns0/0,s0,train,1,s0/0.mp4,,\n"
    assert (tmp_path / "clips.csv").read_bytes().startswith(rows)


def test_offsets_are_read_as_written_and_may_be_absent(tmp_path: Path) -> None:
    measured = Clip("a/1", "a", "val", 75, "a/1.mp4", -42.5, 0.731)
    write_clips(tmp_path, [measured])
    assert read_clips(tmp_path) == [measured]
    (tmp_path / "clips.csv").write_text(HEADER + "a/1,a,val,75,a/1.mp4\n")
    assert read_clips(tmp_path) == [Clip("a/1", "a", "val", 75, "a/1.mp4")]


def test_names_are_read_as_written(tmp_path: Path) -> None:
    odd = Clip("a/b_c", 'Ann "A", \N{SNOWMAN}', "val", 3, "a,b/\n c.mp4")
    write_clips(tmp_path, [odd])
    assert read_clips(tmp_path) == [odd]


def test_shards_in_one_folder_are_one_table(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        write_clips(tmp_path, CLIPS[number - 1 :: 3], (number, 3))
    assert shard_path(tmp_path, "clips.csv", (2, 3)).name == "clips.2-of-3.csv"
    assert read_clips(tmp_path) == BY_NAME


def test_a_whole_table_and_its_shards(tmp_path: Path) -> None:
    write_clips(tmp_path, CLIPS)
    write_clips(tmp_path, CLIPS[::2], (1, 2))
    write_clips(tmp_path, CLIPS[1::2], (2, 2))
    write_clips(tmp_path, [], (1, 1))  # a shard may have nothing
    (tmp_path / "clips.old.csv").write_text("not one of our tables")
    assert read_clips(tmp_path) == BY_NAME


def test_missing_shards_are_named(tmp_path: Path) -> None:
    write_clips(tmp_path, CLIPS, (2, 4))
    write_clips(tmp_path, CLIPS, (3, 4))
    with pytest.raises(DheadsError, match=r"the clips of shard 1/4, 4/4 are missing; prepare them or copy them here$"):
        read_clips(tmp_path)
    write_clips(tmp_path, CLIPS, (7, 999_999_999))
    shard_path(tmp_path, "clips.csv", (2, 4)).unlink()
    shard_path(tmp_path, "clips.csv", (3, 4)).unlink()
    with pytest.raises(DheadsError, match=r"shard 1/999999999, 2/999999999, .*, \.\.\. are missing") as caught:
        read_clips(tmp_path)
    assert len(str(caught.value)) < 1000


def test_tables_that_contradict_each_other(tmp_path: Path) -> None:
    write_clips(tmp_path, CLIPS)
    write_clips(tmp_path, [Clip("s0/0", "s0", "test", 1, "s0/0.mp4")], (1, 1))
    with pytest.raises(DheadsError, match=r"clips\.csv: another table says otherwise of s0/0; delete the one out of"):
        read_clips(tmp_path)


@pytest.mark.parametrize("root", ["", "absent"])
def test_a_folder_without_a_table(tmp_path: Path, root: str) -> None:
    with pytest.raises(DheadsError, match=r"holds no clips\.csv; let dheads prepare run to its end first"):
        read_clips(tmp_path / root)


@pytest.mark.parametrize(
    "name",
    [
        "../../secret",
        "s1/../../secret",
        "/etc/secret",
        "\\\\host\\secret",
        "s1\\..\\x",
        "C:/x",
        "s1//x",
        "s1/.",
        "",
        "s1/",
    ],
)
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "clips.csv").write_text(f"{HEADER}{name},s1,train,3,x.mp4\n", encoding="utf-8")
    with pytest.raises(DheadsError, match=r"clips\.csv: .* is not a valid clip; prepare the data again"):
        read_clips(tmp_path)


@pytest.mark.parametrize(
    "table",
    [
        f"{HEADER}s1/one,s1,train,0,x.mp4\n",
        f"{HEADER}s1/one,s1,train,-4,x.mp4\n",
        f"{HEADER}s1/one,s1,train,many,x.mp4\n",
        f"{HEADER}s1/one\n",
        "clip,speaker\ns1/one,s1\n",
        f"{HEADER}s1/{'x' * 200_000},s1,train,3,x.mp4\n",
        b"clip,speaker,split,frames,source\ns1/\xff,s1,train,3,x.mp4\n",
    ],
)
def test_damaged_tables(tmp_path: Path, table: str | bytes) -> None:
    (tmp_path / "clips.csv").write_bytes(table if isinstance(table, bytes) else table.encode())
    with pytest.raises(DheadsError, match=r"clips\.csv: .*; prepare the data again"):
        read_clips(tmp_path)


def test_a_clip_is_small_and_can_be_pickled() -> None:
    assert not hasattr(CLIPS[0], "__dict__")
    assert pickle.loads(pickle.dumps(CLIPS[0])) == CLIPS[0]


# --- Failures


SOURCES = ["a.mp4", "b,1.mp4", "c.mp4", "d.mp4"]


def test_failures_are_written_at_once_and_sorted_in_the_end(tmp_path: Path) -> None:
    table = FailedTable(tmp_path, None, SOURCES)
    assert table.path.read_text() == "source,reason\n"
    table.add("c.mp4", "no face")
    assert table.path.read_text() == "source,reason\nc.mp4,no face\n"
    table.add("b,1.mp4", 'it is "odd"')
    assert table.path.read_text() == 'source,reason\nc.mp4,no face\n"b,1.mp4","it is ""odd"""\n'
    table.finish()
    assert table.path.read_text() == 'source,reason\n"b,1.mp4","it is ""odd"""\nc.mp4,no face\n'


def test_failures_of_a_killed_run_are_kept(tmp_path: Path) -> None:
    first = FailedTable(tmp_path, (1, 2), SOURCES)
    first.add("d.mp4", "no face")
    first.add("a.mp4", "too small")
    path = tmp_path / "failed.1-of-2.csv"
    with path.open("ab") as file:
        file.write("c.mp4,two f\N{LATIN SMALL LETTER A WITH DIAERESIS}".encode()[:-1])  # cut within a letter
    again = FailedTable(tmp_path, (1, 2), SOURCES)
    assert again.reasons == {"d.mp4": "no face", "a.mp4": "too small"}
    assert path.read_text() == "source,reason\na.mp4,too small\nd.mp4,no face\n"
    assert FailedTable(tmp_path, (2, 2), SOURCES).reasons == {}, "another shard's table"


def test_failures_of_files_that_are_gone_are_forgotten(tmp_path: Path) -> None:
    FailedTable(tmp_path, None, SOURCES).add("a.mp4", "no face")
    FailedTable(tmp_path, None, SOURCES).add("c.mp4", "no face")
    assert FailedTable(tmp_path, None, ["b,1.mp4", "c.mp4"]).reasons == {"c.mp4": "no face"}
    assert "a.mp4" not in (tmp_path / "failed.csv").read_text()


def test_a_table_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    (tmp_path / "failed.csv").write_bytes(b"source,reason\n\xff,x\n")
    with pytest.raises(DheadsError, match=r"failed\.csv: cannot be read .*; delete it to try its files again"):
        FailedTable(tmp_path, None, SOURCES)
    with pytest.raises(DheadsError, match=r"cannot write .*failed\.csv: "):
        FailedTable(tmp_path / "absent", None, SOURCES)
    (tmp_path / "failed.csv").unlink()
    table = FailedTable(tmp_path, None, SOURCES)
    table.path.unlink()
    table.path.mkdir()
    with pytest.raises(DheadsError, match=r"cannot write .*failed\.csv: "):
        table.add("a.mp4", "no face")


# --- Complete or absent


def test_a_file_is_complete_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "table.csv"

    def broken_off() -> None:
        with complete_or_absent(target) as part:
            part.write_text("half")
            match = PART.fullmatch(part.name)
            assert match is not None
            assert match[1] == target.name
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert not list(tmp_path.iterdir())
    with complete_or_absent(target) as part:
        part.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    assert target.read_text() == "whole"
