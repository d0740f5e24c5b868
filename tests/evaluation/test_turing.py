"""The Turing test: its files, its page in a browser, and counting the votes."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import av
import numpy as np
import pytest
from browser import Browser
from real_data import decoded

from dheads.errors import DheadsError
from dheads.evaluation.turing import Share, Tally, choose, tally, wilson_interval, write_turing_test
from dheads.media.reading import read_frames
from dheads.media.writing import write_video

pytest_plugins = "browser"

FRAMES = 8
# Plays each video to its end and answers it.
ANSWER_ALL = """
(async () => {
  const seen = [];
  const video = document.querySelector('video');
  document.querySelector('#start').click();
  for (let i = 0; i < %d; i++) {
    await new Promise((done) => {
      if (video.readyState >= 2) done(); else video.addEventListener('loadeddata', done, { once: true });
    });
    const button = document.querySelector("[data-answer='" + (i %% 2 ? 'real' : 'generated') + "']");
    const early = button.disabled;
    video.playbackRate = 16;
    if (!video.ended) await new Promise((done) => video.addEventListener('ended', done, { once: true }));
    seen.push([video.getAttribute('src'), button.dataset.answer, early, button.disabled, video.videoWidth]);
    button.click();
  }
  return seen;
})()
"""


@pytest.fixture(scope="module")
def sources(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], dict[str, Path]]:
    """The first frames of real clips; the generated ones are smaller copies with the metadata of dheads."""
    root = tmp_path_factory.mktemp("sources")
    generated, real = {}, {}
    for index, name in enumerate(("s1_bbal7s", "s1_bbas3a", "s4_pgbq8s")):
        source = shared / "data" / "grid" / f"{name}.mp4"
        frames = [frame for _, frame in zip(range(FRAMES), read_frames(source), strict=False)]
        generated[name], real[name] = root / f"{index}-generated.mp4", root / f"{index}-real.mp4"
        write_video(generated[name], [frame[:112, :112] for frame in frames], source)
        write_video(real[name], frames, source, comment="a real one")
    return generated, real


@pytest.fixture(scope="module")
def folder(sources: tuple[dict[str, Path], dict[str, Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("turing") / "new" / "test"
    assert write_turing_test(*sources, 2, folder, 0) == Path(f"{folder}-key.json")
    return folder


def key_of(folder: Path) -> Path:
    return Path(f"{folder}-key.json")


# ---- The count ----


def test_wilson_interval() -> None:
    # For 0 of n votes, the interval ends at z^2 / (n + z^2).
    z = 1.959964
    assert wilson_interval(0, 10) == pytest.approx((0, z**2 / (10 + z**2)))
    assert wilson_interval(10, 10) == pytest.approx((10 / (10 + z**2), 1))
    # For half of them, it is 1/2 -+ z / (2 sqrt(n + z^2)).
    half = z / (2 * math.sqrt(40 + z**2))
    assert wilson_interval(20, 40) == pytest.approx((0.5 - half, 0.5 + half))
    # Its ends solve (p - s)^2 = z^2 s (1 - s) / n.
    for end in wilson_interval(7, 30):
        assert (7 / 30 - end) ** 2 == pytest.approx(z**2 * end * (1 - end) / 30)


def votes(path: Path, **changed: object) -> Path:
    content = {"test": "t", "voter": path.stem, "votes": {"a": "real", "b": "generated", "c": "real"}} | changed
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def key(tmp_path: Path) -> Path:
    kinds = {"a": "generated", "b": "generated", "c": "real", "d": "real"}
    clips = {token: {"kind": kind, "clip": token} for token, kind in kinds.items()}
    path = tmp_path / "key.json"
    path.write_text(json.dumps({"test": "t", "clips": clips}))
    return path


def test_votes_are_counted(key: Path, tmp_path: Path) -> None:
    first = votes(tmp_path / "first.json")
    second = votes(tmp_path / "second.json", votes={"a": "generated", "d": "generated", "c": "real"})
    assert tally([first, second], key) == Tally(
        2, Share(1, 3, 1 / 3, *wilson_interval(1, 3)), Share(2, 3, 2 / 3, *wilson_interval(2, 3))
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"test": "another"}, "is no votes file of this test"),
        ({"test": ["t"]}, "is no votes file of this test"),
        ({"voter": 7}, "lacks the voter or the votes"),
        ({"votes": ["a"]}, "lacks the voter or the votes"),
        ({"votes": {"unknown": "real"}}, "'unknown' is no clip or no answer"),
        ({"votes": {"a": ["real"]}}, "'a' is no clip or no answer"),
    ],
)
def test_foreign_and_damaged_votes_are_refused(key: Path, tmp_path: Path, changed: dict, message: str) -> None:
    path = votes(tmp_path / "votes.json", **changed)
    with pytest.raises(DheadsError, match=message) as raised:
        tally([path], key)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is damaged: it is no JSON file"),
        (b"\xff\xfe\xfd", "is damaged: it is no JSON file"),
        (b"[" * 100_000, "is damaged: it is no JSON file"),
        (b"[]", "is no file of a Turing test"),
        (b" " * 1_000_001, "is no file of a Turing test"),
    ],
)
def test_what_is_no_votes_file_is_refused(key: Path, tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "votes.json"
    path.write_bytes(content)
    with pytest.raises(DheadsError, match=message):
        tally([path], key)
    with pytest.raises(DheadsError, match=message):
        tally([], path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "is no key of a Turing test"),
        ({"test": "t", "clips": {}}, "is no key of a Turing test"),
        ({"test": "t", "clips": {"a": "real"}}, "is a damaged key"),
        ({"test": "t", "clips": {"a": {"kind": ["real"]}}}, "is a damaged key"),
    ],
)
def test_what_is_no_key_is_refused(tmp_path: Path, content: dict, message: str) -> None:
    path = tmp_path / "key.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DheadsError, match=message):
        tally([], path)


def test_every_voter_counts_once(key: Path, tmp_path: Path) -> None:
    first = votes(tmp_path / "first.json")
    again = votes(tmp_path / "again.json", voter="first")
    with pytest.raises(DheadsError, match=r"again.json is of the same voter as .*first.json"):
        tally([first, again], key)


def test_no_votes_make_no_share(key: Path, tmp_path: Path) -> None:
    with pytest.raises(DheadsError, match="no vote on a generated clip"):
        tally([], key)
    with pytest.raises(DheadsError, match="no vote on a real clip"):
        tally([votes(tmp_path / "v.json", votes={"a": "real"})], key)
    with pytest.raises(DheadsError, match=r"cannot read .*absent.json"):
        tally([tmp_path / "absent.json"], key)


# ---- What is shown ----


def test_no_clip_is_shown_twice_where_there_are_enough() -> None:
    videos = {str(i): Path(str(i)) for i in range(6)}
    for seed in range(20):
        shown = choose(videos, videos, 3, random.Random(seed))
        assert [kind for kind, _, _ in shown] == ["generated"] * 3 + ["real"] * 3
        assert {clip for _, clip, _ in shown} == set(videos)
    assert choose(videos, videos, 3, random.Random(1)) == choose(videos, videos, 3, random.Random(1))
    assert len({clip for _, clip, _ in choose(videos, videos, 5, random.Random(0))}) == 6


def test_too_few_clips(tmp_path: Path) -> None:
    videos = {"a": Path("a"), "b": Path("b")}
    with pytest.raises(DheadsError, match="of 3 clips of each kind needs more than 2 generated ones"):
        write_turing_test(videos, videos, 3, tmp_path / "test", 0)
    with pytest.raises(DheadsError, match="of 0 clips shows nothing"):
        write_turing_test(videos, videos, 0, tmp_path / "test", 0)


def test_nothing_is_half_written_or_overwritten(
    sources: tuple[dict[str, Path], dict[str, Path]], tmp_path: Path
) -> None:
    generated, real = sources
    broken = dict.fromkeys(generated, tmp_path / "absent.mp4")
    with pytest.raises(DheadsError, match=r"absent.mp4"):
        write_turing_test(broken, real, 2, tmp_path / "test", 0)
    assert list(tmp_path.iterdir()) == []
    key_of(tmp_path / "test").touch()
    with pytest.raises(DheadsError, match=r"test-key.json is there already"):
        write_turing_test(generated, real, 1, tmp_path / "test", 0)


def test_no_file_reveals_its_kind(folder: Path, sources: tuple[dict[str, Path], dict[str, Path]]) -> None:
    key = json.loads(key_of(folder).read_text())["clips"]
    files = sorted(path.name for path in folder.iterdir())
    assert files == sorted([*(f"{token}.mp4" for token in key), "index.html"])
    assert sorted(clip["kind"] for clip in key.values()) == ["generated"] * 2 + ["real"] * 2
    page = (folder / "index.html").read_text(encoding="utf-8")
    order = [token for _, token in sorted((page.index(token), token) for token in key)]
    assert order == sorted(key)  # the order of random names
    assert not any(clip["clip"] in page for clip in key.values())
    forms = set()
    for token in key:
        path = folder / f"{token}.mp4"
        content = path.read_bytes()
        assert b"AI-gen" not in content
        assert b"a real one" not in content
        assert not any(name.encode() in content for name in sources[0])
        with av.open(str(path)) as container:
            video, sound = container.streams.video[0], container.streams.audio[0]
            tags = str(sorted(container.metadata.items()))
            forms.add((video.name, video.width, video.height, video.average_rate, sound.name, sound.rate, tags))
    assert len(forms) == 1


def test_the_videos_are_those_of_the_key(folder: Path, sources: tuple[dict[str, Path], dict[str, Path]]) -> None:
    generated, _ = sources
    for token, shown in json.loads(key_of(folder).read_text())["clips"].items():
        frames = decoded(folder / f"{token}.mp4")
        assert frames.shape[1:] == (112, 112, 3)  # of the smallest
        if shown["kind"] == "generated":
            original = decoded(generated[shown["clip"]])
            assert np.abs(frames[:FRAMES].astype(float) - original).mean() < 3


# ---- The page ----


def test_votes_come_back_as_a_file(browser: Browser, folder: Path, tmp_path: Path) -> None:
    browser.screen(800)
    browser.open(folder / "index.html")
    assert "AI-generated" in browser.run("document.querySelector('#begin').innerText")
    browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path), eventsEnabled=True)
    seen = browser.run(ANSWER_ALL % 4)
    key = json.loads(key_of(folder).read_text())["clips"]
    assert sorted(name for name, *_ in seen) == sorted(f"{token}.mp4" for token in key)
    assert all((early, late, width) == (True, False, 112) for *_, early, late, width in seen)
    browser.run("document.querySelector('#save').click()")
    browser.wait_for("Browser.downloadProgress", state="completed")
    (path,) = tmp_path.glob("votes-*.json")
    saved = json.loads(path.read_text())
    assert saved["votes"] == {name.removesuffix(".mp4"): answer for name, answer, *_ in seen}
    assert path.name == f"votes-{saved['voter']}.json"
    result = tally([path], key_of(folder))
    said_real = [key[token]["kind"] for token, answer in saved["votes"].items() if answer == "real"]
    assert (result.voters, result.generated.votes, result.real.votes) == (1, 2, 2)
    assert (result.generated.real, result.real.real) == (said_real.count("generated"), said_real.count("real"))
    assert browser.errors == []
    assert all(url.startswith(("file:", "data:", "blob:")) for url in browser.requests)


def test_a_reload_continues_and_the_next_person_starts_over(browser: Browser, folder: Path) -> None:
    browser.open(folder / "index.html")
    browser.run("localStorage.clear()")
    browser.open(folder / "index.html")
    browser.run(ANSWER_ALL % 1)
    order = browser.run("state.order")
    browser.open(folder / "index.html")
    assert browser.run("document.querySelector('#start').textContent") == "Go on"
    seen = browser.run(ANSWER_ALL % 3)
    assert [name for name, *_ in seen] == [f"{token}.mp4" for token in order[1:]]
    first = browser.run("state.voter")
    assert browser.run("find('restart').disabled")  # until the votes are saved
    browser.run("find('save').click(); find('restart').click()")
    assert browser.run("document.querySelector('#start').textContent") == "Start"
    assert browser.run("[state.index, Object.keys(state.votes).length, state.order.length]") == [0, 0, 4]
    assert browser.run("state.voter") != first


def test_a_video_that_does_not_play_can_be_skipped(browser: Browser, folder: Path, tmp_path: Path) -> None:
    page = (folder / "index.html").read_text(encoding="utf-8")
    (tmp_path / "index.html").write_text(page, encoding="utf-8")
    browser.open(tmp_path / "index.html")
    browser.run("localStorage.clear(); state = fresh()")
    shown = browser.run(
        "new Promise((done) => { video.addEventListener('error', () => done(!find('broken').hidden), { once: true });"
        "  find('start').click(); })"
    )
    assert shown
    browser.run("find('skip').click()")
    assert browser.run("[state.index, Object.keys(state.votes).length]") == [1, 0]
    browser.run("localStorage.clear()")


@pytest.mark.parametrize("width", [400, 1200])
def test_the_page_is_no_wider_than_the_screen(browser: Browser, folder: Path, width: int) -> None:
    browser.screen(width)
    browser.open(folder / "index.html")
    assert browser.run("document.documentElement.scrollWidth") <= width
    browser.run("find('start').click()")
    assert browser.run("document.documentElement.scrollWidth") <= width
