"""Lists of jobs for `dheads sample`: reading, sharding, sampling in lock-step, continuing after a kill."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from real_data import decoded, dheads, write_wav
from test_sample import TINY, untrained
from torch import Tensor
from typer.testing import CliRunner, Result

from dheads import cli
from dheads.config import Config, override
from dheads.errors import DheadsError
from dheads.media.hearing import Hearing
from dheads.media.sound import load_waveform
from dheads.media.writing import VideoWriter, write_video
from dheads.sampling import jobs, talker
from dheads.sampling.engine import Engine, Inputs
from dheads.sampling.jobs import Job, check_distinct, jobs_of_sounds, read_jobs, takes_of
from dheads.sampling.lists import Outcome, sample_all
from dheads.sampling.portrait import find_portrait
from dheads.sampling.talker import Talker
from dheads.system.files import part_of
from dheads.weights.checkpoints import save_checkpoint

pytest_plugins = "real_data"

DEFAULTS = Job(Path(), Path(), Path(), seed=7)
SAMPLES_PER_FRAME = 640


@pytest.fixture(scope="module")
def media(examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sounds s1.wav to s6.wav of 1 to 6 frames, face.jpg, nobody.jpg, and weights.safetensors."""
    folder = tmp_path_factory.mktemp("media")
    speech = load_waveform(examples / "speech.wav")[20_000:]
    for frames in range(1, 7):
        write_wav(folder / f"s{frames}.wav", speech[: frames * SAMPLES_PER_FRAME])
    save_checkpoint(folder / "weights.safetensors", untrained(TINY).state_dict(), TINY, {})
    (folder / "face.jpg").write_bytes((examples / "face.jpg").read_bytes())
    Image.linear_gradient("L").save(folder / "nobody.jpg")
    return folder


def options(media: Path) -> tuple[object, ...]:
    return "--weights", media / "weights.safetensors", "--device", "cpu"


def write_table(
    path: Path, rows: list[tuple[object, ...]], header: tuple[str, ...] = ("face", "audio", "output")
) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def identity(path: Path) -> tuple[int, int]:
    return path.stat().st_ino, path.stat().st_mtime_ns


# --- Reading a list


def read(text: str, defaults: Job = DEFAULTS) -> list[Job]:
    return read_jobs(io.BytesIO(text.encode()), defaults)


def test_columns_replace_the_defaults() -> None:
    first, second = read(
        "\ufeffoutput, audio,face,seed,steps,solver,size,weights\r\n"
        'o.mp4,"a, b.wav",f.jpg,3,4,dpm++2m,64,crema\r\n\r\n'
        "p.mp4,b.wav,g.jpg,,,,,\r\n"
    )
    assert first == Job(Path("f.jpg"), Path("a, b.wav"), Path("o.mp4"), 3, 64, 4, "dpm++2m", "crema")
    assert second == Job(Path("g.jpg"), Path("b.wav"), Path("p.mp4"), 7)


def test_each_job_of_a_list_has_its_own_audio_codec(media: Path, tmp_path: Path) -> None:
    with av.open(str(media / "s3.wav")) as source, av.open(str(tmp_path / "s.flac"), "w") as target:
        stream = target.add_stream("flac", rate=16_000, layout="mono")
        for frame in source.decode(audio=0):
            target.mux(stream.encode(frame))
        target.mux(stream.encode())
    face, sound = media / "face.jpg", tmp_path / "s.flac"
    rows = [(face, sound, tmp_path / f"{name}.mp4", codec) for name, codec in (("a", "aac"), ("b", "copy"), ("c", ""))]
    table = write_table(tmp_path / "jobs.csv", rows, ("face", "audio", "output", "audio_codec"))
    done = dheads("sample", "--jobs", table, *options(media), "--steps", 1, "--audio", "copy")
    assert done.exit_code == 0, done.stderr
    assert done.stderr.count("FLAC sound is encoded to AAC") == 1
    for name, codec in (("a.mp4", "aac"), ("b.mp4", "flac"), ("c.mp4", "flac")):
        with av.open(str(tmp_path / name)) as container:
            assert container.streams.audio[0].codec_context.codec.canonical_name == codec


def test_every_option_has_a_column() -> None:
    first, second = read(
        "face,audio,output,guidance,at,which,paste,still,motion,motion_from,audio_codec\n"
        "f.mp4,a.wav,o.mp4,1.5,2.25,3,yes,no,0.5,m.mp4,copy\ng.jpg,b.wav,p.mp4,,,,,yes,,,aac\n"
    )
    assert first == replace(
        DEFAULTS,
        face=Path("f.mp4"),
        audio=Path("a.wav"),
        output=Path("o.mp4"),
        guidance=1.5,
        at=2.25,
        which=3,
        paste=True,
        motion=0.5,
        motion_from=Path("m.mp4"),
        audio_codec="copy",
    )
    assert second == replace(DEFAULTS, face=Path("g.jpg"), audio=Path("b.wav"), output=Path("p.mp4"), still=True)
    fields = {name for name in vars(first) if name != "fault"}
    assert fields == set(jobs.COLUMNS), "an option without a column"


@pytest.mark.parametrize(
    ("column", "text", "fault"),
    [
        ("guidance", "nan", "guidance='nan', which must be a number from 0 to 20"),
        ("guidance", "-1", "from 0 to 20"),
        ("at", "soon", "a number from 0 to 86400"),
        ("which", "0", "a whole number from 1 to"),
        ("still", "true", "still='true', which must be yes or no"),
        ("paste", "1", "yes or no"),
        ("audio_codec", "mp3", "audio_codec='mp3', which must be one of aac, copy"),
        ("motion", "2.1", "motion='2.1', which must be a number from 0 to 2"),
        ("motion_from", "-", "motion_from='-', which must be the path of a file"),
        ("still,motion", "yes,1", "has still and a motion, but a still head does not move"),
        ("size", "4098", "has size=4098, but only with paste may it be more than 4096 px"),
    ],
)
def test_a_value_that_a_column_does_not_allow(column: str, text: str, fault: str) -> None:
    (bad,) = read(f"face,audio,output,{column}\nf.jpg,a.wav,o.mp4,{text}\n")
    assert fault in bad.fault


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ("f.jpg,a.wav,o.mp4,ten", "list from stdin:2 has seed='ten', which must be a whole number from 0 to"),
        ("f.jpg,a.wav,o.mp4,-1", "whole number"),
        ("f.jpg,a.wav,o.mp4,9223372036854775808", "whole number"),
        ("f.jpg,a.wav,o.mp4", "has 3 fields where the first line has 4"),
        ("f.jpg,,o.mp4,1", "has no audio"),
        ("f.jpg,-,o.mp4,1", "has audio='-', which must be the path of a file"),
        ("f\0.jpg,a.wav,o.mp4,1", "the path of a file"),
    ],
)
def test_a_bad_row_is_a_job_with_a_fault(row: str, fault: str) -> None:
    bad, good = read(f"face,audio,output,seed\n{row}\nf.jpg,a.wav,p.mp4,1\n")
    assert bad.output == Path("o.mp4")
    assert fault in bad.fault
    assert "\n" not in bad.fault
    assert good.fault is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "must name the columns face, audio, output and may name seed"),
        ("face;audio;output\n", "but it is 'face;audio;output'"),
        ("face,audio\nf,a\n", "but it is 'face,audio'"),
        ("face,audio,output,sound\nf,a,o,s\n", "face,audio,output,sound"),
        ("face,audio,output,face\nf,a,o,f\n", "face,audio,output,face"),
        ("face,audio,output\n", "has no jobs"),
        ('face,audio,output\n"f,a,o\n', "not a CSV file"),
    ],
)
def test_the_error_for_a_bad_list_is_one_line(text: str, reason: str) -> None:
    with pytest.raises(DheadsError) as error:
        read(text)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_a_list_that_is_not_text_or_absent(tmp_path: Path) -> None:
    (tmp_path / "jobs.csv").write_bytes(b"face,audio,output\n\xff\xfe,a,b\n")
    with pytest.raises(DheadsError, match="not a CSV file in UTF-8"):
        read_jobs(tmp_path / "jobs.csv", DEFAULTS)
    with pytest.raises(DheadsError, match=r"cannot read .*absent\.csv: No such file"):
        read_jobs(tmp_path / "absent.csv", DEFAULTS)


def test_outputs_are_named_after_the_sounds_and_takes_are_numbered() -> None:
    jobs = jobs_of_sounds(DEFAULTS, [Path("x/a.b.wav"), Path("c.mp3")], Path("out"))
    assert [str(job.output) for job in jobs] == [str(Path("out") / "a.b.mp4"), str(Path("out") / "c.mp4")]
    taken = takes_of(jobs[1:], 3)
    assert [(job.output.name, job.seed) for job in taken] == [("c-1.mp4", 7), ("c-2.mp4", 8), ("c-3.mp4", 9)]
    check_distinct(jobs + taken)
    with pytest.raises(DheadsError, match=r"a\.mp4 would be written twice, with the sound of x/a\.wav and of a\.mp3"):
        check_distinct(jobs_of_sounds(DEFAULTS, [Path("x/a.wav"), Path("a.mp3")], Path("out")))


@pytest.mark.parametrize(
    ("face", "audio", "reason"),
    [
        (
            "https://example.com/face.jpg",
            "s1.wav",
            "https://example.com/face.jpg is an address; download the picture to a file and give that",
        ),
        (
            "face.jpg",
            "s3://bucket/a.mp3",
            "s3://bucket/a.mp3 is an address; download the sound to a file and give that",
        ),
        ("-", "s1.wav", "FACE is -, but only sound is read from stdin; save the picture to a file and give that"),
        ("pipe", "s1.wav", "pipe is a pipe or a device; save the picture to a file and give that"),
        (
            "face.jpg",
            "pipe",
            "pipe is a pipe or a device; save the sound to a file and give that (or, for a single video, pipe it in "
            "and give - as AUDIO)",
        ),
        ("s1.wav", "face.jpg", "s1.wav is sound without a picture; give FACE first, then AUDIO"),
    ],
)
def test_the_error_for_an_input_that_is_not_a_file_tells_what_to_do(
    media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, face: str, audio: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("face.jpg", "s1.wav"):
        Path(name).write_bytes((media / name).read_bytes())
    if "pipe" in (face, audio):
        if sys.platform == "win32":
            pytest.skip("it has no named pipes")
        os.mkfifo("pipe")
    before = names(tmp_path)
    done = dheads("sample", face, audio, "-o", "o.mp4", *options(media))
    assert (done.exit_code, done.stdout, done.stderr) == (1, "", f"error: {reason}\n")
    if face != "-":  # the same inputs in a list
        table = write_table(tmp_path / "jobs.csv", [(face, audio, "o.mp4")])
        done = dheads("sample", "--jobs", table, *options(media), "--quiet")
        assert (done.exit_code, done.stdout, done.stderr) == (1, "", f"failed o.mp4: {reason}\n")
        table.unlink()
    assert names(tmp_path) == before


# --- Sampling


def test_fifty_jobs_with_five_bad_ones(media: Path, shared: Path, tmp_path: Path) -> None:
    photos = sorted((shared / "data" / "stills").glob("*.jpg"))[:9]
    rows = [(photos[k % 9], media / f"s{k % 3 + 1}.wav", tmp_path / f"{k:02}.mp4", k) for k in range(50)]
    (tmp_path / "text.wav").write_text("not sound\n" * 99)
    rows[3] = (media / "nobody.jpg", *rows[3][1:])
    rows[11] = (tmp_path / "absent.jpg", *rows[11][1:])
    rows[12] = (rows[12][0], tmp_path / "text.wav", *rows[12][2:])
    rows[30] = (*rows[30][:2], tmp_path / "no" / "30.mp4", 30)
    rows[49] = (*rows[49][:3], "one")
    table = write_table(tmp_path / "jobs.csv", rows, ("face", "audio", "output", "seed"))

    done = dheads("sample", "--jobs", table, *options(media), "--steps", 1, "--json", "--quiet")

    assert done.exit_code == 1
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == 50
    made = {Path(line["output"]).name: line["frames"] for line in results if line["error"] is None}
    assert made == {f"{k:02}.mp4": k % 3 + 1 for k in range(50) if k not in (3, 11, 12, 30, 49)}
    assert {path.name for path in tmp_path.iterdir()} == {*made, "jobs.csv", "text.wav"}
    assert all(len(decoded(tmp_path / name)) == frames for name, frames in list(made.items())[::9])
    failed = sorted(done.stderr.splitlines())
    assert len(failed) == 5
    reasons = ["nobody.jpg: no face found", "absent.jpg: there is no such file", "text.wav is not a sound or video"]
    reasons += ["49.mp4: " + f"{table}:51 has seed='one'", "does not exist"]
    for line, reason in zip(failed, reasons[:3] + reasons[3:], strict=True):
        assert line.startswith(f"failed {tmp_path}")
        assert reason in line


def test_videos_sampled_together_equal_videos_sampled_alone(media: Path, tmp_path: Path) -> None:
    rows = [(media / "face.jpg", media / f"s{k}.wav", tmp_path / f"{k}.mp4", k, "") for k in (5, 2, 4)]
    rows[1:1] = [(media / "nobody.jpg", media / "s5.wav", tmp_path / "n.mp4", 1, "")]
    rows += [(media / "face.jpg", media / "s3.wav", tmp_path / "3.mp4", 3, 64)]
    table = write_table(tmp_path / "jobs.csv", rows, ("face", "audio", "output", "seed", "size"))
    done = dheads("sample", "--jobs", table, *options(media))
    assert done.exit_code == 1
    assert done.stdout.split() == [str(tmp_path / f"{k}.mp4") for k in (2, 3, 4, 5)], (
        "in the order in which they finish"
    )
    assert "4 made, 0 were there already, 1 failed\n" in done.stderr
    assert " 14/14 [" in done.stderr, "the bar knows the number of frames, and so the remaining time"
    assert names(tmp_path) == ["2.mp4", "3.mp4", "4.mp4", "5.mp4", "jobs.csv"]
    for k, more in ((5, ()), (2, ()), (4, ()), (3, ("--size", 64))):
        alone = tmp_path / "alone.mp4"
        sound = media / f"s{k}.wav"
        assert (
            dheads("sample", media / "face.jpg", sound, "-o", alone, "--seed", k, *options(media), *more).exit_code == 0
        )
        apart = np.abs(decoded(alone).astype(int) - decoded(tmp_path / f"{k}.mp4"))
        assert apart.max() <= 3, "one level of rounding, through a lossy codec"


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all batches sampled."""
    sizes: list[int] = []
    generate = Engine.generate

    def counted(self: Engine, inputs: Inputs, first: bool = True) -> Tensor:
        sizes.append(len(inputs.identity))
        return generate(self, inputs, first)

    monkeypatch.setattr(Engine, "generate", counted)
    return sizes


def test_a_job_on_a_full_disk_stops_computing(
    media: Path, tmp_path: Path, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    writers: list[VideoWriter] = []
    add = VideoWriter.add

    def full(self: VideoWriter, image: np.ndarray) -> None:
        writers.extend([] if self in writers else [self])
        if self is writers[0] and self.count == 2:
            self.discard()
            raise DheadsError("cannot write it: No space left on device")
        add(self, image)

    monkeypatch.setattr(VideoWriter, "add", full)
    jobs = jobs_of_sounds(Job(media / "face.jpg", Path(), Path()), [media / "s6.wav", media / "s5.wav"], tmp_path)
    options = {"device": "cpu", "progress": False}
    jobs = [dataclasses.replace(job, weights=str(media / "weights.safetensors"), steps=1) for job in jobs]
    failed, made = sample_all(jobs, **options)
    assert failed == Outcome(tmp_path / "s6.mp4", error="cannot write it: No space left on device")
    assert (made.output, made.frames, made.error) == (tmp_path / "s5.mp4", 5, None)
    assert batches == [2, 2, 2, 2, 1], "three frames of the first job, the last of which failed, and one made meanwhile"
    assert names(tmp_path) == ["s5.mp4"]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (
            DheadsError("s.wav holds more than 3 hours of sound; cut it"),
            "s.wav holds more than 3 hours of sound; cut it",
        ),
        (MemoryError("no\nmore"), "MemoryError: no more (unexpected; please report it)"),
    ],
)
def test_damaged_sound_ends_its_own_job_only(
    media: Path, tmp_path: Path, batches: list[int], monkeypatch: pytest.MonkeyPatch, fault: Exception, reason: str
) -> None:
    pieces = talker.waveform_pieces

    def damaged(source: Path, hearing: Hearing) -> Iterator[Tensor]:
        if source.name != "s5.wav":
            yield from pieces(source, hearing)
            return
        yield torch.zeros(60 * SAMPLES_PER_FRAME)  # enough for a first chunk of 32 embeddings
        raise fault

    monkeypatch.setattr(talker, "waveform_pieces", damaged)
    table = write_table(
        tmp_path / "jobs.csv", [(media / "face.jpg", media / f"s{k}.wav", tmp_path / f"{k}.mp4") for k in (3, 5, 4)]
    )
    done = dheads("sample", "--jobs", table, *options(media), "--steps", 1)
    assert done.exit_code == 1
    assert done.stdout.split() == [str(tmp_path / "3.mp4"), str(tmp_path / "4.mp4")]
    assert f"failed {tmp_path / '5.mp4'}: {reason}\n" in done.stderr
    assert "2 made, 0 were there already, 1 failed\n" in done.stderr
    assert names(tmp_path) == ["3.mp4", "4.mp4", "jobs.csv"]
    assert len(batches) <= 32


def test_a_second_run_keeps_existing_videos(media: Path, tmp_path: Path) -> None:
    def command(*more: object) -> Result:
        return dheads(
            "sample", media / "face.jpg", media / "s1.wav", media / "s2.wav", "--out-dir", *more, *options(media)
        )

    out = tmp_path / "new" / "out"
    first = command(out)
    assert (first.exit_code, first.stdout.split()) == (0, [str(out / "s1.mp4"), str(out / "s2.mp4")])
    assert re.match("make 2 videos on the [CG]PU.*: up to 2 at once\n", first.stderr)
    assert "2 made, 0 were there already, 0 failed\n" in first.stderr
    before = identity(out / "s1.mp4")
    (out / "s2.mp4").unlink()
    part_of(out / "s2.mp4").touch()
    part_of(out / "other.mp4").touch()
    second = command(out)
    assert second.stdout == f"{out / 's2.mp4'}\n"
    assert "1 made, 1 were there already, 0 failed\n" in second.stderr
    assert identity(out / "s1.mp4") == before
    assert [name for name in names(out) if not name.startswith(".other")] == ["s1.mp4", "s2.mp4"]
    assert len(names(out)) == 3, "the unfinished file of another program is kept"
    third = command(out, "--overwrite", "--json", "--quiet")
    assert [json.loads(line)["skipped"] for line in third.stdout.splitlines()] == [False, False]
    assert identity(out / "s1.mp4") != before
    assert third.stderr == ""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_killed_and_run_again(warm: list[str], media: Path, tmp_path: Path) -> None:
    count = 24
    rows = [(media / "face.jpg", media / f"s{k % 5 + 1}.wav", tmp_path / f"{k:02}.mp4") for k in range(count)]
    table = write_table(tmp_path / "jobs.csv", rows)
    command = ["sample", "--jobs", str(table), *map(str, options(media)), "--steps", "1", "--quiet"]
    with subprocess.Popen([*warm, "-m", "dheads", *command], stdout=subprocess.PIPE, text=True) as running:
        printed = [running.stdout.readline().strip() for _ in range(6)]
        running.kill()
        running.stdout.read()  # to its end
    finished = {path: identity(path) for path in tmp_path.glob("*.mp4")}
    assert {Path(path) for path in printed} <= set(finished)
    assert len(finished) < count, "killed before the end"
    assert any(name.endswith(".part") for name in names(tmp_path)), "unfinished files"
    for path in finished:
        assert len(decoded(path)) == int(path.stem) % 5 + 1

    done = dheads(*command)
    assert done.exit_code == 0
    assert len(done.stdout.split()) == count - len(finished), "no video is generated twice"
    assert names(tmp_path) == [*(f"{k:02}.mp4" for k in range(count)), "jobs.csv"]
    assert {path: identity(path) for path in finished} == finished


def test_shards_and_torchrun_divide_the_list(media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = write_table(
        tmp_path / "jobs.csv", [(media / "face.jpg", media / "s1.wav", tmp_path / f"{k}.mp4") for k in range(5)]
    )
    command = ("sample", "--jobs", table, *options(media), "--steps", 1)
    done = dheads(*command, "--shard", "2/2")
    assert done.stdout.split() == [str(tmp_path / f"{k}.mp4") for k in (1, 3)]
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    both = dheads(*command, "--shard", "1/2")
    assert (both.exit_code, both.stderr) == (1, "error: --shard and torchrun both divide the work; use one of them\n")
    assert dheads(*command).stdout.split() == [str(tmp_path / f"{k}.mp4") for k in (0, 2, 4)]


def test_a_list_from_stdin_with_relative_paths(media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "face.jpg").write_bytes((media / "face.jpg").read_bytes())
    (tmp_path / "s.wav").write_bytes((media / "s1.wav").read_bytes())
    args = [str(arg) for arg in ("sample", "--jobs", "-", *options(media), "--quiet")]
    done = CliRunner().invoke(cli.app, args, input="audio,face,output\ns.wav,face.jpg,o.mp4\n")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "o.mp4\n", "")
    assert len(decoded(tmp_path / "o.mp4")) == 1


def test_settings_by_row(media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each network is loaded once, with one engine per settings; a row that fails does not stop the others."""
    loaded: list[str] = []
    load_model = talker.load_model
    monkeypatch.setattr(
        talker, "load_model", lambda name, *rest: loaded.append(Path(name).name) or load_model(name, *rest)
    )
    (tmp_path / "bad.safetensors").write_bytes(b"not weights")
    without_dropout: Config = override(TINY, {"extensions": {"sound": {"dropout": 0.0}}})
    save_checkpoint(tmp_path / "no-dropout.safetensors", untrained(without_dropout).state_dict(), without_dropout, {})
    face, sound = media / "face.jpg", media / "s1.wav"
    rows = [
        (face, sound, "a.mp4", 1, ""),
        (face, sound, "b.mp4", "", tmp_path / "bad.safetensors"),
        (face, sound, "c.mp4", 2000, ""),
        (face, sound, "d.mp4", "", tmp_path / "no-dropout.safetensors"),
        (face, sound, "e.mp4", 2, ""),
    ]
    rows = [(*row[:2], tmp_path / row[2], *row[3:]) for row in rows]
    table = write_table(tmp_path / "jobs.csv", rows, ("face", "audio", "output", "steps", "weights"))
    done = dheads("sample", "--jobs", table, *options(media), "--guidance", 1.5, "--quiet")
    assert [Path(line).name for line in done.stdout.split()] == ["a.mp4", "e.mp4"]
    assert loaded == ["weights.safetensors", "bad.safetensors", "no-dropout.safetensors"]
    failed = done.stderr.splitlines()
    assert len(failed) == 3
    assert "sampling.steps is 2000, but diffusion.num_steps only 1000" in failed[0]
    assert "b.mp4" in failed[1]
    assert "takes no guidance" in failed[2]


def test_the_motion_frames_of_a_still_head_are_mostly_the_photo(media: Path, tmp_path: Path) -> None:
    """Set per row."""
    rows = [(media / "face.jpg", media / "s2.wav", tmp_path / f"{still}.mp4", still) for still in ("no", "yes")]
    table = write_table(tmp_path / "jobs.csv", rows, ("face", "audio", "output", "still"))
    assert dheads("sample", "--jobs", table, *options(media)).exit_code == 0
    job = Job(media / "face.jpg", media / "s2.wav", tmp_path / "x.mp4", weights=str(media / "weights.safetensors"))
    loaded = Talker(job.weights, torch.device("cpu"), progress=False)
    anchors = [loaded.engine(replace(job, still=still)).extensions.motion.anchor for still in (False, True)]
    assert anchors == [loaded.config.extensions.motion.anchor, 0.8]
    moving, still = (decoded(tmp_path / f"{name}.mp4").astype(int) for name in ("no", "yes"))
    assert np.abs(moving[0] - still[0]).max() <= 3, "the first frame has no previous frames"
    assert np.abs(moving[1] - still[1]).max() > 3


def test_takes_differ_by_their_seeds(media: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.mp4"
    command = ("sample", media / "face.jpg", media / "s2.wav", "-o", out, *options(media), "--quiet")
    done = dheads(*command, "--takes", 3, "--seed", 4)
    assert done.exit_code == 0
    assert names(tmp_path) == ["out-1.mp4", "out-2.mp4", "out-3.mp4"]
    assert done.stdout.split() == [str(tmp_path / name) for name in names(tmp_path)]
    before = (tmp_path / "out-1.mp4").stat().st_ino
    assert dheads(*command, "--seed", 5).exit_code == 0
    second, other = decoded(tmp_path / "out-2.mp4").astype(int), decoded(tmp_path / "out-1.mp4")
    assert np.abs(decoded(out) - second).max() <= 3
    assert np.abs(other - second).mean() > 3
    assert dheads(*command, "--takes", 2).exit_code == 0
    assert (tmp_path / "out-1.mp4").stat().st_ino != before, "videos named one by one are always replaced"


# --- The face


def test_a_face_from_a_video(media: Path, tmp_path: Path) -> None:
    """The first frame with a face, or the frame at a given time."""
    person = np.asarray(Image.open(media / "face.jpg").convert("RGB").resize((256, 256)))
    nobody = np.asarray(Image.linear_gradient("L").convert("RGB"))
    write_video(tmp_path / "late.mp4", [nobody] * 5 + [person] * 5, None)
    write_video(tmp_path / "nobody.mp4", [nobody] * 5, None)
    backend = Talker(str(media / "weights.safetensors"), torch.device("cpu")).backend
    found = find_portrait(tmp_path / "late.mp4", TINY, backend)
    assert np.abs(found.picture.astype(int) - person).mean() < 4
    command = ("sample", tmp_path / "late.mp4", media / "s1.wav", "-o", tmp_path / "o.mp4", *options(media), "--quiet")
    for more, reason in {
        ("--at", 0.32): None,
        ("--at", 0.08): "late.mp4 at 0.08 s: no face found",
        ("--at", 9): "shorter than 9 s",
        ("--face", 2): "late.mp4 shows 1 face, so there is no face 2",
    }.items():
        done = dheads(*command, *more)
        assert (done.exit_code == 0) == (reason is None)
        assert (reason or "") in done.stderr
    for name, reason in {"nobody.mp4": "nobody.mp4: no face found", "s1.wav": "s1.wav is sound without"}.items():
        path = media / name if name == "s1.wav" else tmp_path / name
        done = dheads("sample", path, media / "s1.wav", "-o", tmp_path / "o.mp4", *options(media))
        assert done.exit_code == 1
        assert reason in done.stderr
    photo = dheads("sample", media / "face.jpg", media / "s1.wav", "-o", tmp_path / "o.mp4", *options(media), "--at", 1)
    assert "face.jpg is a photo; a time is for a video" in photo.stderr


def test_one_of_several_faces(media: Path, tmp_path: Path) -> None:
    person = Image.open(media / "face.jpg").convert("RGB")
    both = Image.new("RGB", (700, 400), "gray")
    both.paste(person.resize((300, 300)), (0, 0))
    both.paste(person.resize((400, 400)), (300, 0))
    both.save(tmp_path / "two.png")
    backend = Talker(str(media / "weights.safetensors"), torch.device("cpu")).backend
    middle = []
    for which in (None, 1, 2):
        portrait = find_portrait(tmp_path / "two.png", TINY, backend, which=which)
        # The centre of the crop in the picture, by the inverse transform.
        middle.append(np.linalg.solve(portrait.matrix[:, :2], 15.5 - portrait.matrix[:, 2])[0])
        assert len(portrait.notes) == (which is None)
    assert middle[0] == middle[1] > 300 > middle[2]
    with pytest.raises(DheadsError, match="shows 2 faces, so there is no face 3"):
        find_portrait(tmp_path / "two.png", TINY, backend, which=3)


def test_the_face_is_pasted_into_the_photo(media: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.mp4"
    done = dheads("sample", media / "face.jpg", media / "s2.wav", "-o", out, "--paste", *options(media), "--quiet")
    assert done.exit_code == 0, done.stderr
    photo = np.asarray(Image.open(media / "face.jpg").convert("RGB"))
    apart = np.abs(decoded(out).astype(int) - photo).mean(axis=-1)
    assert apart.shape == (2, 512, 512)
    assert apart[:, :24].mean() < 4, "the photo above the face, through the codec"


# --- From Python


def test_frames_without_a_file(media: Path, tmp_path: Path) -> None:
    loaded = talker.load(str(media / "weights.safetensors"), "cpu", progress=False)
    face, sound = media / "face.jpg", media / "s3.wav"
    frames = list(loaded.frames(face, sound, seed=3, size=64))
    assert [(frame.shape, frame.dtype) for frame in frames] == [((64, 64, 3), np.uint8)] * 3
    loaded.sample(face, sound, tmp_path / "o.mp4", seed=3, size=64)
    assert np.abs(decoded(tmp_path / "o.mp4").astype(int) - np.stack(frames)).mean() < 8
    with pytest.raises(TypeError, match="sized"):
        next(loaded.frames(face, sound, sized=3))


def test_paths_as_strings(media: Path, tmp_path: Path) -> None:
    weights = str(media / "weights.safetensors")
    loaded = talker.load(weights, "cpu", progress=False)
    face, sound, output = str(media / "face.jpg"), str(media / "s3.wav"), str(tmp_path / "o.mp4")
    result = loaded.sample(face, sound, output)
    assert (result.path, result.frames) == (tmp_path / "o.mp4", 3)
    assert len(list(loaded.frames(face, sound))) == 3
    jobs = jobs_of_sounds(Job(Path(face), Path(), Path(), weights=weights), [sound], str(tmp_path / "list"))
    (tmp_path / "list").mkdir()
    (made,) = sample_all(jobs, device="cpu", progress=False)
    assert (made.output, made.error) == (tmp_path / "list" / "s3.mp4", None)
    table = write_table(tmp_path / "jobs.csv", [(face, sound, output)])
    wanted = replace(DEFAULTS, face=Path(face), audio=Path(sound), output=Path(output))
    assert read_jobs(str(table), DEFAULTS) == [wanted]
    with pytest.raises(DheadsError, match=r"absent\.jpg: there is no such file"):
        loaded.sample("absent.jpg", sound, output)
    with pytest.raises(TypeError, match="sized"):
        loaded.sample(face, sound, output, sized=3)


def test_a_picture_and_a_waveform_in_memory(media: Path, tmp_path: Path) -> None:
    loaded = talker.load(str(media / "weights.safetensors"), "cpu", progress=False)
    picture, waveform = np.asarray(Image.open(media / "face.jpg").convert("RGB")), load_waveform(media / "s2.wav")
    assert loaded.sample(picture, waveform, tmp_path / "o.mp4").frames == 2
    assert decoded(tmp_path / "o.mp4").shape == (2, 32, 32, 3)
