"""Raw corpora: which clips are found, who speaks in them and which are held out. Empty files suffice for that."""

from __future__ import annotations

import logging
import os
import pickle
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from dheads.dataset.layouts import detect_layout, find_sources
from dheads.dataset.sources import Source, safe_name
from dheads.errors import DheadsError

TEST_ACTORS = {"1015", "1020", "1021", "1030", "1033", "1052", "1062", "1081", "1082", "1089"}
VAL_ACTORS = {"1038", "1039", "1047", "1049", "1055", "1064", "1085", "1086"}


def raw_folder(tmp_path: Path, *names: str) -> Path:
    for name in names:
        (tmp_path / "raw" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "raw" / name).touch()
    return tmp_path / "raw"


def speakers_of(sources: Iterable[Source], split: str) -> set[str]:
    return {source.speaker for source in sources if source.split == split}


# --- CREMA-D

CREMA = ("VideoFlash/1001_DFA_ANG_XX.flv", "AudioWAV/1001_DFA_ANG_XX.wav", "VideoFlash/1015_IEO_HAP_HI.flv")


def test_crema_has_its_sound_in_separate_files(tmp_path: Path) -> None:
    raw = raw_folder(tmp_path, *CREMA, "AudioWAV/1002_DFA_ANG_XX.wav", "VideoFlash/readme.txt", "AudioMP3/x.mp4")
    assert find_sources(raw)[:2] == (
        "crema",
        [
            Source(
                "VideoFlash/1001_DFA_ANG_XX.flv",
                "1001/1001_DFA_ANG_XX",
                "1001",
                "train",
                sound="AudioWAV/1001_DFA_ANG_XX.wav",
            ),
            # Without a sound file the sound of the video is used.
            Source("VideoFlash/1015_IEO_HAP_HI.flv", "1015/1015_IEO_HAP_HI", "1015", "test"),
        ],
    )


def test_the_actors_of_the_paper_are_held_out(tmp_path: Path) -> None:
    actors = [str(actor) for actor in range(1001, 1092)]
    raw = raw_folder(tmp_path, *(f"VideoFlash/{actor}_{text}.flv" for actor in actors for text in ("A", "B")))
    sources = find_sources(raw).sources
    assert len(sources) == 182
    assert speakers_of(sources, "test") == TEST_ACTORS
    assert speakers_of(sources, "val") == VAL_ACTORS
    assert speakers_of(sources, "train") == set(actors) - TEST_ACTORS - VAL_ACTORS


def test_an_actor_keeps_the_split_whichever_part_of_the_corpus_is_there(tmp_path: Path) -> None:
    raw = raw_folder(tmp_path, "videoflash/1038_A.mp4", "videoflash/1089_A.mp4", "videoflash/1100_A.mp4")
    sources = find_sources(raw, "crema").sources
    assert {source.speaker: source.split for source in sources} == {"1038": "val", "1089": "test", "1100": "train"}


@pytest.mark.parametrize("name", ["holiday.mp4", "101_A.mp4", "1001.mp4", "s1001_A.mp4"])
def test_a_name_without_an_actor_is_refused(tmp_path: Path, name: str) -> None:
    raw = raw_folder(tmp_path, *CREMA, f"VideoFlash/{name}")
    with pytest.raises(DheadsError, match=rf"{name}: is not named as in CREMA-D, such as 1001_DFA_ANG_XX; rename"):
        find_sources(raw)


# --- LRW

LRW = tuple(f"{word}/{split}/{word}_00001.mp4" for word in ("ABOUT", "YOUNG") for split in ("train", "val", "test"))


@pytest.mark.parametrize("base", ["", "lipread_mp4/"])
def test_lrw_has_its_own_splits(tmp_path: Path, base: str) -> None:
    texts = [name.replace(".mp4", ".txt") for name in LRW]
    raw = raw_folder(tmp_path, *(base + name for name in (*LRW, *texts, "ABOUT/train/deep/ABOUT_00009.mp4")))
    layout, sources, _, passed_over = find_sources(raw)
    assert passed_over == {".txt": 6, "videos in no WORD/SPLIT/": 1}
    assert layout == "lrw"
    assert [(source.name.removeprefix(base), source.clip, source.split) for source in sources] == [
        (f"{word}/{split}/{word}_00001.mp4", f"{word}/{split}_{word}_00001", split)
        for word in ("ABOUT", "YOUNG")
        for split in ("test", "train", "val")
    ]
    # The corpus names no speakers, and a word's thousand people must not count as one.
    assert len({source.speaker for source in sources}) == len(sources)


# --- The released code's layout

TRAIN = "".join(f"./s{i}/{1000 + i}_A.mp4\n" for i in range(1, 11))


def released(tmp_path: Path, *folders: str, **lists: str) -> Path:
    raw = raw_folder(tmp_path, "video/s1/1001_A.mp4")
    for folder in folders:
        (raw / folder).mkdir()
    for split, text in lists.items():
        (raw / f"file_list_{split}.txt").write_text(text, encoding="utf-8")
    return raw


def test_released_lists_are_read_with_all_files_of_a_clip(tmp_path: Path) -> None:
    raw = released(tmp_path, "audio", "lmks", "crema_audio_embs", test="./s15/1015_A.mp4\n\n./s15/1015_B.C.mp4")
    assert find_sources(raw)[:2] == (
        "released",
        [
            Source(
                f"video/s15/{name}.mp4",
                f"s15/{name}",
                "s15",
                "test",
                sound=f"audio/s15/{name}.wav",
                landmarks=f"lmks/s15/{name}.npy",
                embeddings=f"crema_audio_embs/s15/{name}.pth",
            )
            for name in ("1015_A", "1015_B.C")
        ],
    )


def test_released_folders_may_have_only_videos(tmp_path: Path) -> None:
    (source,) = find_sources(released(tmp_path, train="s1/1001_A.mp4\n")).sources
    assert source == Source("video/s1/1001_A.mp4", "s1/1001_A", "s1", "train")


def test_released_validation_is_held_out_of_the_training_speakers(tmp_path: Path) -> None:
    """The released code validated on the test set."""
    raw = released(tmp_path, train=TRAIN, test="s15/1015_A.mp4\n")
    sources = find_sources(raw).sources
    assert speakers_of(sources, "test") == {"s15"}
    (val,) = speakers_of(sources, "val")
    assert speakers_of(sources, "train") == {f"s{i}" for i in range(1, 11)} - {val}
    (raw / "file_list_train.txt").write_text(TRAIN + TRAIN.replace("_A", "_B"), encoding="utf-8")
    more = find_sources(raw).sources
    assert len(more) == len(sources) + 10
    assert speakers_of(more, "val") == {val}


def test_released_validation_list_is_used_where_there_is_one(tmp_path: Path) -> None:
    sources = find_sources(released(tmp_path, train=TRAIN, val="s20/1020_A.mp4\n", test="s15/1015_A.mp4\n")).sources
    assert speakers_of(sources, "val") == {"s20"}
    assert len(speakers_of(sources, "train")) == 10


def test_released_folders_of_words_are_no_speakers(tmp_path: Path) -> None:
    """LRW in the authors' layout: the same words are in every list."""
    lists = {split: f"./ABOUT/{split}/ABOUT_00001.mp4\n" for split in ("train", "test")}
    sources = find_sources(released(tmp_path, **lists)).sources
    assert [(source.clip, source.speaker, source.split) for source in sources] == [
        ("ABOUT/test_ABOUT_00001", "ABOUT/test_ABOUT_00001", "test"),
        ("ABOUT/train_ABOUT_00001", "ABOUT/train_ABOUT_00001", "train"),
    ]


@pytest.mark.parametrize(
    "line", ["../../etc/passwd", "s1/../../x.mp4", "/etc/passwd", "..\\..\\x.mp4", "s1/a\0.mp4", "./", ".."]
)
def test_a_list_cannot_name_files_elsewhere(tmp_path: Path, line: str) -> None:
    raw = released(tmp_path, train=f"s1/1001_A.mp4\n{line}\n")
    with pytest.raises(DheadsError) as caught:
        find_sources(raw)
    expected = f"{raw / 'file_list_train.txt'}: {line!r} is no path within the folder video; correct that line"
    assert str(caught.value) == expected


def test_lists_that_cannot_be_used(tmp_path: Path) -> None:
    raw = released(tmp_path, train="s1/a.mp4\n", test="./s1/a.mp4\n")
    with pytest.raises(DheadsError, match=r"test\.txt: \./s1/a\.mp4 is in file_list_train\.txt too; choose one"):
        find_sources(raw)
    for path in raw.glob("*.txt"):
        path.write_text("\n \n")
    with pytest.raises(DheadsError, match=r"file_list_train\.txt, .*file_list_test\.txt: no clip is listed; write"):
        find_sources(raw)
    (raw / "file_list_train.txt").write_bytes(b"\xff\xfe\0s1")
    with pytest.raises(DheadsError, match=r"file_list_train\.txt: cannot be read \(.*\); it must list one clip a line"):
        find_sources(raw)


def test_several_folders_of_embeddings_are_refused(tmp_path: Path) -> None:
    raw = released(tmp_path, "crema_audio_embs", "lrw_audio_embs", train=TRAIN)
    with pytest.raises(DheadsError, match=r"several folders of speech embeddings, crema_audio_embs, lrw_audio_embs;"):
        find_sources(raw)


# --- Any folder


def test_the_speaker_is_the_first_folder(tmp_path: Path) -> None:
    raw = raw_folder(tmp_path, "ann/1.mp4", "ann/deep/2.MOV", "bob/1.mp4", "cy.HEIC", "notes.txt", "dee/1.wav")
    layout, sources, *_ = find_sources(raw)
    assert layout == "folder"
    assert {source.clip: (source.name, source.speaker) for source in sources} == {
        "ann/ann_1": ("ann/1.mp4", "ann"),
        "ann/ann_deep_2": ("ann/deep/2.MOV", "ann"),
        "bob/bob_1": ("bob/1.mp4", "bob"),
        "cy/cy": ("cy.HEIC", "cy"),
    }
    assert [source.clip for source in sources] == sorted(source.clip for source in sources)
    assert {source.split for source in sources if source.speaker == "ann"} in ({"train"}, {"val"}, {"test"})
    assert sorted({source.speaker: source.split for source in sources}.values()) == ["test", "train", "val"]


def test_more_clips_of_the_same_speakers_move_nobody(tmp_path: Path) -> None:
    raw = raw_folder(tmp_path, *(f"speaker{i}/1.mp4" for i in range(12)))
    before = {source.clip: source for source in find_sources(raw).sources}
    raw_folder(tmp_path, *(f"speaker{i}/{j}.mp4" for i in range(0, 12, 3) for j in range(2, 9)))
    after = {source.clip: source for source in find_sources(raw).sources}
    assert len(after) == 12 + 4 * 7
    assert {clip: after[clip] for clip in before} == before
    assert find_sources(raw).sources == find_sources(raw).sources


# --- Which layout it is


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        ("crema", CREMA),
        ("crema", ("videoflash/1001_A.mp4",)),
        ("lrw", LRW),
        ("lrw", ("ABOUT/train/ABOUT_00001.mp4", "README.txt")),
        ("lrw", ("lipread_mp4/ABOUT/val/ABOUT_00001.mp4",)),
        ("released", ("video/s1/a.mp4", "file_list_test.txt")),
        ("released", ("video/s1/a.mp4", "audio/s1/a.wav", "file_list_train.txt", *CREMA)),
        ("folder", ("video/s1/a.mp4",)),
        ("folder", ("ann/train/1.mp4",)),
        ("folder", (*LRW, "ann/1.mp4")),
        ("folder", ("ANN/1.mp4",)),
        ("folder", ("VideoFlash",)),  # a file
        ("folder", ()),
    ],
)
def test_a_layout_is_found_by_looking(tmp_path: Path, layout: str, names: tuple[str, ...]) -> None:
    (tmp_path / "raw").mkdir()
    assert detect_layout(raw_folder(tmp_path, *names)) == layout


def test_a_given_layout_is_used(tmp_path: Path) -> None:
    layout, sources, *_ = find_sources(raw_folder(tmp_path, *CREMA), "folder")
    assert layout == "folder"
    assert {source.speaker for source in sources} == {"VideoFlash"}


@pytest.mark.parametrize(
    ("layout", "names", "message"),
    [
        ("crema", ("ann/1.mp4",), "has no folder VideoFlash, so it is not CREMA-D; "),
        ("crema", ("VideoFlash/1001_A.txt",), "VideoFlash: holds no video; known endings are .3g2, "),
        ("lrw", ("ann/1.mp4", "ABOUT/2.mp4"), "has no videos such as ABOUT/train/ABOUT_00001.mp4, so it is not LRW; "),
        (
            "released",
            ("video/1.mp4",),
            "has no folder video with a file_list_train.txt or file_list_test.txt next to it",
        ),
        ("released", ("file_list_train.txt",), "has no folder video with a file_list_train.txt"),
        ("folder", ("notes.txt",), "holds no video or photo"),
        ("grid", ("a.mp4",), "there is no layout 'grid'; choose one of crema, lrw, released, folder"),
    ],
)
def test_a_layout_that_does_not_fit(tmp_path: Path, layout: str, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(DheadsError) as caught:
        find_sources(raw_folder(tmp_path, *names), layout)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    for raw in (tmp_path / "a.mp4", tmp_path / "missing"):
        with pytest.raises(DheadsError, match=r"is not a folder; give the folder that holds the raw videos"):
            find_sources(raw, "crema")
        with pytest.raises(DheadsError, match=r"is not a folder"):
            detect_layout(raw)


# --- A CSV of splits


def splits_csv(tmp_path: Path, *rows: str, header: str = "clip,speaker,split") -> Path:
    path = tmp_path / "splits.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def test_a_csv_gives_speakers_and_what_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    raw = raw_folder(tmp_path, "a.mp4", "b/c.mp4", "unlisted.mp4")
    path = splits_csv(tmp_path, "b/c.mp4,ann,val", "a.mp4,bob,test", "z.mp4,bob,test", "y.mp4,bob,test")
    with caplog.at_level(logging.WARNING, "dheads"):
        layout, sources, *_ = find_sources(raw, split_file=path)
    assert layout == "folder"
    assert sources == [
        Source("b/c.mp4", "ann/b_c", "ann", "val"),
        Source("a.mp4", "bob/a", "bob", "test"),
    ]
    assert caplog.messages == [f"{path}: 2 of its clips are not below {raw}, such as y.mp4"]


def test_a_csv_replaces_any_layouts_splits_and_leaves_its_sound(tmp_path: Path) -> None:
    raw = raw_folder(tmp_path, *CREMA)
    layout, sources, *_ = find_sources(raw, split_file=splits_csv(tmp_path, f"{CREMA[0]},ann,val"))
    assert layout == "crema"
    assert sources == [Source(CREMA[0], "ann/1001_DFA_ANG_XX", "ann", "val", sound=CREMA[1])]


def test_a_csv_from_a_spreadsheet_is_read(tmp_path: Path) -> None:
    """It begins with a byte order mark."""
    (tmp_path / "splits.csv").write_text("clip,speaker,split\na.mp4,anna,val\n", encoding="utf-8-sig")
    (source,) = find_sources(raw_folder(tmp_path, "a.mp4"), split_file=tmp_path / "splits.csv").sources
    assert (source.speaker, source.split, source.clip) == ("anna", "val", "anna/a")


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ("clip,speaker,split", "a.mp4,ann,dev", "a.mp4 is in split 'dev'; use train, val or test"),
        ("clip,speaker,split", "a.mp4,ann", "a.mp4 is in split None; use train, val or test"),
        ("clip,speaker,split", "a.mp4,ann,val\na.mp4,,val", "line 3 has no clip or no speaker; fill it in"),
        ("speaker,split,clip", "ann,train", "line 2 has no clip or no speaker; fill it in"),
        ("clip,speaker,split", "a.mp4,ann,train\nb.mp4,ann,val", "speaker ann is in train and in val; choose one"),
        ("clip,speaker,split", "a.mp4,ann,train\na.mp4,bob,val", "a.mp4 has two speakers, ann and bob; choose one"),
        ("clip,split", "a.mp4,train", "has no column 'speaker'; it must be a CSV with clip, speaker, split"),
        ("clip,speaker,split", "other.mp4,ann,train", "names no file below"),
        ("clip,speaker,split", "../raw/a.mp4,ann,train", "names no file below"),
    ],
)
def test_a_csv_that_cannot_be_used(tmp_path: Path, header: str, rows: str, message: str) -> None:
    raw, path = raw_folder(tmp_path, "a.mp4"), splits_csv(tmp_path, rows, header=header)
    with pytest.raises(DheadsError) as caught:
        find_sources(raw, split_file=path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_a_csv_that_is_no_text(tmp_path: Path) -> None:
    raw, path = raw_folder(tmp_path, "a.mp4"), tmp_path / "splits.csv"
    with pytest.raises(DheadsError, match=r"splits\.csv: cannot be read"):
        find_sources(raw, split_file=path)
    path.write_bytes(b"clip,speaker,split\n\xff\xfe,a,train\n")
    with pytest.raises(DheadsError, match=r"splits\.csv: cannot be read"):
        find_sources(raw, split_file=path)


# --- Names and links


def test_names_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    raw = raw_folder(tmp_path, "a b/c?.mp4")
    (source,) = find_sources(raw, split_file=splits_csv(tmp_path, "a b/c?.mp4,../../etc,train")).sources
    assert source.clip == "_.._etc/a_b_c_"
    assert source.speaker == "../../etc"
    for hostile in ("..", ".", "", "/", "a/../../b", "..\\..\\x", "nul\0l"):
        safe = safe_name(hostile)
        assert safe not in ("", ".", "..")
        assert not set(safe) & set("/\\\0")


def test_a_deep_path_becomes_a_short_name(tmp_path: Path) -> None:
    """File systems allow 255 bytes. Long paths are cut, and stay different."""
    deep = "ann/" + "/".join(["é" * 50] * 5)
    (one, other) = find_sources(raw_folder(tmp_path, f"{deep}/1.mp4", f"{deep}/2.mp4")).sources
    assert one.clip != other.clip
    for source in (one, other):
        assert len(source.clip.rpartition("/")[2].encode()) <= 190
        assert source.clip.startswith("ann/ann_ééé")


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (("ann/1.jpg", "ann/1.mp4", "ann/1.webp"), "ann/1.mp4"),  # yt-dlp's thumbnails
        (("ann/IMG_1.JPG", "ann/IMG_1.MOV"), "ann/IMG_1.MOV"),  # a live photo
        (("ann/1.mp4", "ann/1.avi"), "ann/1.avi"),
        (("a?.mp4", "a!.mp4"), "a!.mp4"),
    ],
)
def test_of_files_that_would_be_one_clip_one_is_taken(tmp_path: Path, names: tuple[str, ...], taken: str) -> None:
    """Otherwise their pictures and labels would overwrite each other."""
    found = find_sources(raw_folder(tmp_path, *names, "bob/2.mp4"))
    assert [source.name for source in found.sources] in ([taken, "bob/2.mp4"], ["bob/2.mp4", taken])
    reason = f"has the same name as another file; {taken} is taken, so rename it to have both"
    assert found.namesakes == {name: reason for name in names if name != taken}
    assert found.passed_over == {}


@pytest.mark.parametrize("ending", [".MTS", ".3gp", ".wmv", ".m2ts", ".ts", ".TOD", ".rmvb", ".vob", ".Qt"])
def test_endings_of_cameras_and_the_web_are_known(tmp_path: Path, ending: str) -> None:
    found = find_sources(raw_folder(tmp_path, f"ann/1{ending}"))
    assert [(source.name, source.clip) for source in found.sources] == [(f"ann/1{ending}", "ann/ann_1")]


def test_skipped_files_are_counted_by_kind(tmp_path: Path) -> None:
    raw = raw_folder(tmp_path, "ann/1.mp4", "ann/1.txt", "b.TXT", "ann/1.wav", "README", ".DS_Store", ".git/x.txt")
    try:
        (raw / "loop").symlink_to(raw, target_is_directory=True)
        (raw / "gone.mp4").symlink_to("nowhere")
    except OSError:
        pytest.skip("links cannot be made here")
    assert find_sources(raw).passed_over == {
        ".txt": 2,
        ".wav": 1,
        "files without an ending": 1,
        "links to folders": 1,
        "links to nothing, or pipes": 1,
    }


def test_links_to_files_are_followed_and_links_to_folders_are_not(tmp_path: Path) -> None:
    raw = raw_folder(tmp_path, "ann/1.mp4")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "2.mp4").touch()
    try:
        (raw / "ann" / "2.mp4").symlink_to(outside / "2.mp4")
    except OSError:
        pytest.skip("links cannot be made here")
    (raw / "ann" / "again").symlink_to(raw, target_is_directory=True)
    (raw / "bob").symlink_to(outside, target_is_directory=True)
    (raw / "loop.mp4").symlink_to(raw / "loop.mp4")
    (raw / "gone.mp4").symlink_to(tmp_path / "missing.mp4")
    assert [source.name for source in find_sources(raw).sources] == ["ann/1.mp4", "ann/2.mp4"]


def test_hidden_files_are_skipped(tmp_path: Path) -> None:
    """Such as those that macOS adds to every file on a disk of another system."""
    raw = raw_folder(tmp_path, "ann/1.mp4", "ann/._1.mp4", ".trash/2.mp4")
    assert [source.name for source in find_sources(raw).sources] == ["ann/1.mp4"]


@pytest.mark.skipif(sys.platform != "linux", reason="file names of other systems are text")
def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    raw = raw_folder(tmp_path, "a.mp4")
    (Path(os.fsdecode(os.fsencode(raw) + b"/b\xff.mp4"))).touch()
    with pytest.raises(DheadsError, match=r"the name 'b\\udcff\.mp4' is not UTF-8; rename the file"):
        find_sources(raw)


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = raw_folder(tmp_path, "ann/1.mp4", "bob/1.mp4")
    scandir = os.scandir

    def refusing(path: Path) -> object:
        if Path(path).name == "bob":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DheadsError, match=r"bob: cannot be listed \(Permission denied\); make it readable or move"):
        find_sources(raw)


def test_a_source_is_light_and_travels_between_processes() -> None:
    source = Source("a.mp4", "a/a", "a", "train")
    assert not hasattr(source, "__dict__")
    assert sys.getsizeof(source) < 128
    assert pickle.loads(pickle.dumps(source)) == source
