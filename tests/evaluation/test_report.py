"""The report of an evaluation: files, the table for a terminal, and the page in a browser."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from browser import Browser

from dheads.errors import DheadsError
from dheads.evaluation import page as page_module
from dheads.evaluation.catalogue import CATALOGUE, PAPER
from dheads.evaluation.report import screen_table, write_report
from dheads.evaluation.results import ClipReport, Report, figure
from dheads.media.playback import plays_in_browsers
from dheads.media.reading import read_frames

pytest_plugins = "browser"

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\udcff\n=1+1"
CLIPS = ("talkvid/Language_en", "grid/s1_bbal7s", "hdtf/WDA_BobMenendez_000")


@pytest.fixture(scope="module")
def report(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Real clips stand in for generated ones; the last one has a hostile name and its real clip another format."""
    flv = tmp_path_factory.mktemp("flv") / "real.flv"
    _as_flv(shared / "data" / "grid" / "s1_bbas3a.mp4", flv)
    sources = [shared / "data" / f"{clip}.mp4" for clip in CLIPS]
    clips = [
        ClipReport(
            clip,
            {
                "mouth_correlation": 0.2 + 0.3 * i,
                "blinks_per_second": 0.1 * i,
                "true_blinks_per_second": 0.25 + 0.1 * i,
            },
            {"sharpness": [1.0, 0.9 - 0.1 * i, 0.8], "colour": [0.0, 1.0 + i] + [3.0] * i},
            source,
            source,
        )
        for i, (clip, source) in enumerate(zip(CLIPS, sources, strict=True))
    ]
    clips[-1] = replace(clips[-1], clip=HOSTILE, reference=flv)
    clips[-1].values["colour_drift"] = math.nan
    clips.append(ClipReport("gone", {"frames": 75.0}, {}, flv.with_name("gone.mp4"), None))
    return Report(
        clips,
        {"clips": 4, "failed": 1, "fid": 12.25, "mouth_correlation": 0.5, "blinks_per_second": 0.1}
        | {"true_blinks_per_second": 0.35},
        {"fvd": "the weights <i3d> are missing; get them"},
        [("broken<b>", "is not a video & never was")],
        ["only 4 clips: Frechet distances need <thousands>"],
        {"machine": "a <machine>", "steps": 6, "seed": 0},
        "crema",
    )


@pytest.fixture(scope="module")
def folder(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "new"
    write_report(report, folder)
    return folder


def _as_flv(source: Path, target: Path) -> None:
    """Convert to the format of CREMA-D, which no browser plays."""
    with av.open(str(target), "w", format="flv") as output:
        stream = output.add_stream("flv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 224, 224, "yuv420p"
        sound = output.add_stream("mp3", rate=44100, layout="mono")
        for image in read_frames(source):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
        output.mux(stream.encode())
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 3 * 44100), np.float32), "fltp", "mono")
        samples.sample_rate = 44100
        output.mux(sound.encode(samples))
        output.mux(sound.encode())


# ---- Files and the terminal ----


def test_all_figures_with_their_definitions(report: Report, folder: Path) -> None:
    content = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert content["facts"] == report.facts
    assert content["summary"]["clips"] == 4
    blinks = content["measures"]["blinks_per_second"]
    assert (blinks["value"], blinks["true_value"], blinks["clips"]) == (0.1, 0.35, 3)
    assert blinks["paper"]["Diffused Heads"] == 0.28
    assert blinks["definition"] == CATALOGUE["blinks_per_second"].definition
    assert content["measures"]["fvd"]["unavailable"] == report.unavailable["fvd"]
    assert content["measures"]["fvd"]["value"] is None
    assert content["failed"] == [{"clip": "broken<b>", "reason": "is not a video & never was"}]
    assert content["clips"][2]["clip"] == HOSTILE
    assert content["clips"][2]["values"]["colour_drift"] is None
    assert content["clips"][0]["curves"]["sharpness"] == [1.0, 0.9, 0.8]


def test_a_row_a_clip(folder: Path) -> None:
    with (folder / "clips.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["clip"] for row in rows] == [*CLIPS[:2], HOSTILE.replace("\udcff", "?"), "gone"]
    assert list(rows[0])[-1] == "frames"  # not in the catalogue
    assert [row["mouth_correlation"] for row in rows] == ["0.2", "0.5", "0.8", ""]
    assert rows[2]["colour_drift"] == ""


def test_a_table_for_the_terminal(report: Report) -> None:
    lines = screen_table(report).splitlines()
    systems = list(PAPER["crema"])
    assert [name for name in systems if name.split()[0] in lines[0]] == systems
    fid = next(line for line in lines if line.startswith("fid ")).split()
    assert fid == [
        "fid",
        "lower",
        "12.25",
        *(figure(PAPER["crema"][name]["fid"]) for name in systems if "fid" in PAPER["crema"][name]),
    ]
    blinks = next(line for line in lines if line.startswith("blinks_per_second ")).split()
    assert blinks[:4] == ["blinks_per_second", "truth", "0.10", "0.35"]
    assert lines[0].index("better") == next(line for line in lines if line.startswith("fid ")).index("lower")
    assert "Diffused" not in screen_table(replace(report, table=None))
    assert screen_table(report).isascii()


def test_figures_for_people() -> None:
    values = (0.0, -2.0, 376.484, 12.4, 0.62254, 0.2, -0.00123, math.nan, None)
    assert [figure(value) for value in values] == ["0", "-2", "376.48", "12.40", "0.623", "0.20", "-0.00123", "", ""]


def test_a_folder_that_cannot_be_written(report: Report, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DheadsError, match=r"cannot write the report to .*file"):
        write_report(report, tmp_path / "file")


# ---- The page ----


def test_the_page_in_a_browser(browser: Browser, folder: Path) -> None:
    browser.screen(1200)
    browser.open(folder / "report.html")
    page = "document.querySelector('main').innerText"
    text = browser.run(page)
    assert "is not a video & never was" in text
    assert "only 4 clips: Frechet distances need <thousands>" in text
    assert "the weights <i3d> are missing; get them" in text
    assert "a <machine>" in text
    rows = browser.run("[...document.querySelectorAll('tbody tr')].map((row) => row.innerText)")
    blinks = next(row for row in rows if CATALOGUE["blinks_per_second"].title in row).split()
    assert {"0.10", "0.35", "0.28"} <= set(blinks)
    loaded = browser.run(
        "Promise.all([...document.querySelectorAll('video')].map((video) => new Promise((done) => {"
        "  const tell = () => done([video.duration, video.videoWidth, video.muted]);"
        "  video.readyState >= 2 ? tell() : video.addEventListener('loadeddata', tell); })))"
    )
    assert len(loaded) == 6  # three pairs: one video is gone
    assert all(duration > 2.5 and width >= 224 for duration, width, _ in loaded)
    assert [muted for _, _, muted in loaded] == [False, True] * 3
    assert browser.errors == []
    assert all(url.startswith(("data:", "file:")) for url in browser.requests)
    assert sum(url.startswith("file:") for url in browser.requests) == 1


def test_a_hostile_name_is_only_text(browser: Browser, folder: Path) -> None:
    browser.open(folder / "report.html")
    names = browser.run("[...document.querySelectorAll('.pair h3')].map((name) => name.textContent)")
    assert names[2] == HOSTILE.replace("\udcff", "?")
    assert browser.run("document.querySelectorAll('script, img').length") == 1
    assert browser.run("document.querySelectorAll('.pair video')[4].getAttribute('aria-label')").endswith("=1+1")


def test_one_button_plays_both(browser: Browser, folder: Path) -> None:
    browser.open(folder / "report.html")
    state = browser.run(
        "(async () => { const pair = document.querySelector('.pair'); const button = pair.querySelector('button');"
        "  const videos = [...pair.querySelectorAll('video')];"
        "  const started = Promise.all(videos.map((video) => new Promise((done) =>"
        "    video.addEventListener('timeupdate', () => video.currentTime > 0 && done()))));"
        "  button.click(); await started; const playing = videos.map((video) => !video.paused);"
        "  const label = button.textContent; button.click();"
        "  return [playing, label, videos.map((video) => video.paused)]; })()"
    )
    assert state == [[True, True], "Pause", [True, True]]
    assert browser.errors == []


def test_one_bar_moves_both(browser: Browser, folder: Path) -> None:
    browser.open(folder / "report.html")
    times = browser.run(
        "(async () => { const pair = document.querySelector('.pair'); const bar = pair.querySelector('input');"
        "  const videos = [...pair.querySelectorAll('video')];"
        "  await Promise.all(videos.map((video) => new Promise((done) =>"
        "    video.readyState >= 1 ? done() : video.addEventListener('loadedmetadata', done))));"
        "  bar.value = 0.5; bar.dispatchEvent(new Event('input'));"
        "  return videos.map((video) => video.currentTime / video.duration); })()"
    )
    assert times == pytest.approx([0.5, 0.5], abs=0.01)


@pytest.mark.parametrize("width", [400, 1200])
def test_the_page_is_no_wider_than_the_screen(browser: Browser, folder: Path, width: int) -> None:
    browser.screen(width)
    browser.open(folder / "report.html")
    assert browser.run("document.documentElement.scrollWidth") <= width


def test_light_and_dark(browser: Browser, folder: Path) -> None:
    colours = []
    for dark in (False, True):
        browser.screen(800, dark=dark)
        browser.open(folder / "report.html")
        colours.append(browser.run("getComputedStyle(document.body).backgroundColor"))
    assert colours == ["rgb(251, 251, 250)", "rgb(20, 21, 23)"]


def test_charts_show_the_values(browser: Browser, folder: Path) -> None:
    browser.open(folder / "report.html")
    figure = "[...document.querySelectorAll('figure')].find((f) => f.textContent.includes('Sharpness of the mouth'))"
    lines = browser.run(f"[...{figure}.querySelectorAll('path')].map((line) => line.getAttribute('d'))")
    # 1.0 is the top, 0.7 the bottom; the mean of the middle second is 0.8.
    assert lines == [
        "M50.0 0.0 L150.0 40.0 L250.0 80.0",
        "M50.0 0.0 L150.0 80.0 L250.0 80.0",
        "M50.0 0.0 L150.0 120.0 L250.0 80.0",
        "M50.0 0.0 L150.0 80.0 L250.0 80.0",
    ]
    title = CATALOGUE["blinks_per_second"].title
    blinks = f"[...document.querySelectorAll('figure')].find((f) => f.textContent.includes({title!r}))"
    assert browser.run(f"{blinks}.querySelectorAll('.bar-ours').length") == 3
    assert browser.run(f"{blinks}.querySelectorAll('.bar-real').length") == 3


def test_a_set_without_clips_values_or_table_is_a_page_too(browser: Browser, tmp_path: Path) -> None:
    empty = Report([], {"clips": 0, "failed": 0}, {}, [], [], {})
    write_report(empty, tmp_path)
    browser.open(tmp_path / "report.html")
    assert "0 generated clips" in browser.run("document.body.innerText")
    one = ClipReport("one", {"fid": 1.0}, {"odd": [2.0], "none": [math.nan]}, tmp_path / "a", None)
    write_report(replace(empty, clips=[one], summary={"fid": 1.0}), tmp_path)
    browser.open(tmp_path / "report.html")
    assert browser.run("document.querySelector('.each').getAttribute('d')") == "M150.0 60.0h0"
    assert browser.errors == []


def test_the_first_the_best_and_the_worst_are_shown() -> None:
    clips = [
        ClipReport(str(i), {"mouth_correlation": r}, {}, Path(), None) for i, r in enumerate(np.linspace(0, 1, 20))
    ]
    clips[15].values["mouth_correlation"] = -0.5
    clips[3].values.clear()
    assert page_module.selection(clips) == dict.fromkeys(range(12), "") | {
        19: "the mouth follows best",
        15: "the mouth follows worst",
    }


def test_a_page_has_room_for_so_many_bytes_of_video(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "_MAX_VIDEO_BYTES", 350_000)
    assert [pair.clip.clip for pair in page_module.shown_clips(report)] == list(CLIPS[:2])


def test_which_videos_browsers_play(report: Report, shared: Path) -> None:
    assert plays_in_browsers(shared / "data" / "grid" / "s1_bbal7s.mp4")
    assert not plays_in_browsers(report.clips[2].reference)
    assert not plays_in_browsers(shared / "samples" / "face_astronaut.png")
    assert not plays_in_browsers(shared / "absent.mp4")
