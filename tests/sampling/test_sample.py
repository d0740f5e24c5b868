"""`dheads sample` with tiny untrained weights on the packaged photo and real speech."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from real_data import decoded, dheads, sound_seconds, write_wav
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from typer.testing import Result

from dheads import conditioning
from dheads.config import Config, override, preset
from dheads.diffusion import Denoise, Denoised
from dheads.errors import DheadsError
from dheads.extensions.motion import MotionCondition
from dheads.extensions.network import ExtendedUNet
from dheads.faces import alignment as faces
from dheads.faces.landmarks import find_face, load_backend
from dheads.media import containers as media
from dheads.media.hearing import Hearing
from dheads.media.pixels import to_uint8, to_unit
from dheads.media.sound import load_waveform
from dheads.media.writing import write_video
from dheads.sampling import outputs, talker
from dheads.sampling.engine import Engine
from dheads.sampling.jobs import Job
from dheads.sampling.lockstep import VideoSpec
from dheads.sampling.portrait import find_portrait
from dheads.sampling.staging import resized_frame
from dheads.sampling.talker import Result as Made
from dheads.sampling.talker import Scene, Talker, generate
from dheads.speech import encoders as audio
from dheads.system.devices import resolve_device
from dheads.weights.checkpoints import save_checkpoint

pytest_plugins = "real_data"

TINY = override(preset("tiny"), {"sampling": {"steps": 2, "solver": "ddim"}})
SAMPLES = 8480  # 0.53 s of sound: 13.25 frames
FRAMES = 13


def untrained(config: Config, seed: int = 0) -> ExtendedUNet:
    """A network that depends on everything it is given, as a zero-initialised one does not."""
    torch.manual_seed(seed)
    unet = ExtendedUNet(config).eval()
    torch.nn.init.normal_(unet.out_conv.weight, std=0.05)
    if unet.lip_predictor is not None:
        torch.nn.init.normal_(unet.lip_predictor.weight, std=0.02)
    return unet


@pytest.fixture(scope="module")
def folder(examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """speech.wav, 0.53 s from the middle of a sentence, and weights.safetensors."""
    folder = tmp_path_factory.mktemp("sample")
    waveform = load_waveform(examples / "speech.wav")
    middle = len(waveform) // 2
    write_wav(folder / "speech.wav", waveform[middle : middle + SAMPLES])
    save_checkpoint(folder / "weights.safetensors", untrained(TINY).state_dict(), TINY, {})
    return folder


@pytest.fixture(scope="module")
def face(examples: Path) -> Path:
    return examples / "face.jpg"


def command(folder: Path, face: Path, out: Path, *options: object) -> Result:
    args = ("--weights", folder / "weights.safetensors", "--device", "cpu", *options)
    return dheads("sample", face, folder / "speech.wav", "-o", out, *args)


# --- The video


@pytest.fixture(scope="module")
def video(folder: Path, face: Path) -> Path:
    path = folder / "video.mp4"
    done = command(folder, face, path, "--seed", 5)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == f"{path}\n"
    assert f"{FRAMES}/{FRAMES}" in done.stderr
    assert re.match(
        rf"make {re.escape(str(path))} on the [CG]PU.*: 32 x 32 px, {FRAMES} frames, \d+ denoising steps? a frame\n",
        done.stderr,
    )
    return path


def test_the_video_lasts_as_long_as_the_sound(video: Path, folder: Path) -> None:
    frames = decoded(video)
    assert frames.shape == (round(SAMPLES / 16_000 * 25), 32, 32, 3) == (FRAMES, 32, 32, 3)
    assert sound_seconds(video) == pytest.approx(SAMPLES / 16_000, abs=0.13)  # AAC pads to whole blocks
    heard, said = load_waveform(video)[:SAMPLES], load_waveform(folder / "speech.wav")
    assert torch.corrcoef(torch.stack([heard, said]))[0, 1] > 0.98, "the sound of the recording, in step with it"


def test_the_same_seed_gives_the_same_video(video: Path, folder: Path, face: Path, tmp_path: Path) -> None:
    torch.manual_seed(123)
    again, other = tmp_path / "again.mp4", tmp_path / "other.mp4"
    assert command(folder, face, again, "--seed", 5, "--quiet").exit_code == 0
    assert np.array_equal(decoded(again), decoded(video))
    done = command(folder, face, other, "--seed", 6, "--quiet")
    assert (done.exit_code, done.stderr) == (0, "")
    assert (decoded(other) != decoded(video)).any(axis=(1, 2, 3)).all()


def test_size_and_json(folder: Path, face: Path, tmp_path: Path) -> None:
    path = tmp_path / "large.mp4"
    done = command(folder, face, path, "--size", 64, "--steps", 1, "--json")
    assert done.exit_code == 0, done.stderr
    assert "denoising" not in done.stderr
    assert decoded(path).shape == (FRAMES, 64, 64, 3)
    result = json.loads(done.stdout)
    assert result.pop("sampling_seconds") > 0
    assert result == {"path": str(path), "frames": FRAMES, "seconds": FRAMES / 25, "notes": []}


@pytest.mark.parametrize(
    ("options", "steps", "solver"),
    [((), 2, "ddim"), (("--steps", 3), 3, "ddim"), (("--solver", "dpm++2m"), 2, "dpm++2m")],
)
def test_steps_and_solver_are_the_weights_own_unless_given(
    folder: Path, face: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple, steps: int, solver: str
) -> None:
    given: list[dict[str, object]] = []

    def fake(engine: Engine, video: VideoSpec) -> Iterator[np.ndarray]:
        given.append({"steps": engine.sampling.steps, "solver": engine.sampling.solver, "seed": video.seed})
        assert torch.cat(list(video.speech)).shape == (FRAMES, 384)
        return itertools.repeat(video.photo, FRAMES)

    monkeypatch.setattr(talker, "frames_of", fake)
    assert command(folder, face, tmp_path / "out.mp4", "--seed", 9, *options).exit_code == 0
    assert given == [{"steps": steps, "solver": solver, "seed": 9}]


def test_several_faces_are_noted(folder: Path, face: Path, tmp_path: Path) -> None:
    photo = np.asarray(Image.open(face).convert("RGB").resize((256, 256)))
    Image.fromarray(np.concatenate([photo, photo], axis=1)).save(tmp_path / "two.png")
    done = command(folder, tmp_path / "two.png", tmp_path / "out.mp4", "--steps", 1)
    assert done.exit_code == 0, done.stderr
    assert f"{tmp_path / 'two.png'} shows 2 faces; taking the largest\n" in done.stderr
    assert done.stdout == f"{tmp_path / 'out.mp4'}\n"


def test_what_is_unusual_about_the_sound_is_noted(folder: Path, face: Path, tmp_path: Path) -> None:
    """A very quiet MP3 is encoded to AAC, unless copied, and made louder for the speech encoder alone."""
    speech = load_waveform(folder / "speech.wav") / 1000
    with av.open(str(tmp_path / "a.mp3"), "w") as container:
        stream = container.add_stream("libmp3lame", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(speech.numpy()[None], format="fltp", layout="mono")
        frame.rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    args = (face, tmp_path / "a.mp3", "--weights", folder / "weights.safetensors", "--device", "cpu", "--steps", 1)
    done = dheads("sample", *args, "-o", tmp_path / "aac.mp4", "--json")
    quiet, encoded = json.loads(done.stdout)["notes"]
    assert f"{quiet}\n{encoded}\n" in done.stderr
    assert re.fullmatch(r".*a\.mp3: it is very quiet; the lips follow it made [56]\d dB louder", quiet)
    assert "a.mp3: its MP3 sound is encoded to AAC, which plays everywhere; --audio copy keeps it" in encoded
    done = dheads("sample", *args, "-o", tmp_path / "copy.mp4", "--json", "--audio", "copy")
    assert json.loads(done.stdout)["notes"] == [quiet]
    for name, codec in (("aac.mp4", "aac"), ("copy.mp4", "mp3")):
        with av.open(str(tmp_path / name)) as container:
            assert container.streams.audio[0].codec_context.codec.canonical_name == codec
            samples = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
        assert np.abs(samples).max() < 2e-3, "the video's sound is as quiet as it was"


# --- What goes wrong


def test_an_interrupt_leaves_nothing_behind(
    folder: Path, face: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(engine: Engine, video: VideoSpec) -> Iterator[np.ndarray]:
        yield video.photo
        yield video.photo
        raise KeyboardInterrupt

    monkeypatch.setattr(talker, "frames_of", interrupted)
    done = command(folder, face, tmp_path / "out.mp4")
    assert done.exit_code == 130
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out.mp4").write_bytes(b"an older video")
    assert command(folder, face, tmp_path / "out.mp4").exit_code == 130
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
    assert (tmp_path / "out.mp4").read_bytes() == b"an older video"


def test_sound_that_turns_out_bad_midway_leaves_nothing_behind(
    folder: Path, face: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def turning_bad(source: Path, hearing: Hearing) -> Iterator[Tensor]:
        yield torch.zeros(60 * 640)  # enough for a first chunk of 32 embeddings
        raise DheadsError(f"{source} holds more than 3 hours of sound; cut it")

    monkeypatch.setattr(talker, "waveform_pieces", turning_bad)
    done = command(folder, face, tmp_path / "out.mp4", "--steps", 1)
    assert (done.exit_code, done.stdout) == (1, "")
    assert f"\nerror: {folder / 'speech.wav'} holds more than 3 hours of sound; cut it\n" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_too_long_a_sound_is_refused_before_any_work(
    folder: Path, face: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A length that the container claims is checked."""
    out = tmp_path / "out.mp4"
    monkeypatch.setattr(talker, "claimed_seconds", lambda *_: 4 * 3600.0)
    assert command(folder, face, out, "--steps", 1, "--quiet").exit_code == 0
    assert len(decoded(out)) == FRAMES
    monkeypatch.setattr(media, "MAX_SECONDS", 0)
    monkeypatch.setattr(talker, "generate", None)
    done = command(folder, face, out, "--quiet")
    assert (done.exit_code, done.stderr) == (
        1,
        f"error: {folder / 'speech.wav'} holds more than 0 hours of sound; cut it\n",
    )


def test_without_a_claimed_length_the_bar_has_no_end(
    folder: Path, face: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(talker, "claimed_seconds", lambda *_: None)
    done = command(folder, face, tmp_path / "out.mp4", "--steps", 1)
    assert done.exit_code == 0
    assert f" {FRAMES}frame [" in done.stderr


def test_an_odd_size_is_refused_before_any_work(folder: Path, face: Path, tmp_path: Path) -> None:
    done = command(folder, face, tmp_path / "out.mp4", "--size", 65, "--steps", 1)
    assert done.exit_code == 1
    assert done.stderr == "error: frames of 65 x 65 px cannot be written; make both even\n"
    assert list(tmp_path.iterdir()) == []


def test_more_steps_than_there_are(folder: Path, face: Path, tmp_path: Path) -> None:
    done = command(folder, face, tmp_path / "out.mp4", "--steps", 1001)
    assert done.exit_code == 1
    assert "sampling.steps is 1001, but diffusion.num_steps only 1000" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_without_a_compiler(folder: Path, face: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **options: object) -> object:
        def called(*_: object) -> object:
            raise TorchDynamoException("no C++ compiler was found")

        return called

    monkeypatch.setattr(torch, "compile", fails)
    done = command(folder, face, tmp_path / "out.mp4", "--compile")
    assert done.exit_code == 1
    assert "error: torch.compile fails here" in done.stderr
    assert "no C++ compiler was found" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_sound_without_end_does_not_fill_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            return bytes(size)

    monkeypatch.setattr(outputs, "MAX_SPOOLED", 3 << 20)
    with pytest.raises(DheadsError, match="give the sound as a file"), outputs.spooled(Endless()):
        pass


def test_a_sound_in_memory_is_read_twice_at_once(folder: Path, face: Path, tmp_path: Path) -> None:
    """The encoder and the writer read it, each from its own position."""
    sound = io.BytesIO((folder / "speech.wav").read_bytes())
    loaded = talker.load(str(folder / "weights.safetensors"), "cpu", progress=False)
    loaded.sample(face, sound, tmp_path / "memory.mp4", steps=1)
    loaded.sample(face, folder / "speech.wav", tmp_path / "file.mp4", steps=1)
    assert np.array_equal(decoded(tmp_path / "memory.mp4"), decoded(tmp_path / "file.mp4"))
    assert torch.equal(load_waveform(tmp_path / "memory.mp4"), load_waveform(tmp_path / "file.mp4"))


# --- Frame by frame


def sampled(config: Config, steps: int, solver: str = "ddpm") -> Config:
    return override(config, {"sampling": {"steps": steps, "solver": solver}})


class Recorder(Engine):
    """Records the timestep and the condition of every call of the denoiser."""

    def __init__(self, unet: ExtendedUNet, steps: int, solver: str = "ddim") -> None:
        super().__init__(unet, sampled(unet.config, steps, solver))
        self.calls: list[tuple[int, MotionCondition]] = []

    def frame(self, condition: MotionCondition) -> Denoise:
        denoise = super().frame(condition)

        def recorded(x_t: Tensor, t: int) -> Denoised:
            self.calls.append((t, condition))
            return denoise(x_t, t)

        return recorded


@pytest.fixture
def photo() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def test_frames_come_one_by_one(photo: np.ndarray) -> None:
    engine = Recorder(untrained(TINY), 3)
    frames = generate(engine, photo, torch.randn(1000, 384))
    assert engine.calls == [], "nothing is computed before it is asked for"
    first = next(frames)
    assert (first.shape, first.dtype) == ((32, 32, 3), np.uint8)
    assert [t for t, _ in engine.calls] == [999, 500, 0]
    next(frames)
    assert len(engine.calls) == 6


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpm++2m"])
def test_each_frame_is_given_those_before_and_its_sound(photo: np.ndarray, solver: str) -> None:
    config = override(TINY, {"extensions": {"motion": {"hide_mouth": False}}})
    unet = untrained(config)
    engine = Recorder(unet, 2, solver)
    speech = torch.randn(5, 384)
    frames = list(generate(engine, photo, speech))
    assert len(frames) == 5
    identity = to_unit(photo)[None]
    lips = unet.lip_predictor.predict(speech)
    shown: list[np.ndarray] = [photo, photo, *frames]
    for k, (_, condition) in enumerate(engine.calls[::2]):
        assert torch.equal(condition.identity, identity)
        before = [to_uint8(condition.motion_frames[0, i]).numpy() for i in range(2)]
        assert np.array_equal(before[0], shown[k])
        assert np.array_equal(before[1], shown[k + 1])
        assert torch.equal(condition.cues.audio_window[0], conditioning.window(speech, k, 2))
        torch.testing.assert_close(condition.cues.codes["lips"][0], conditioning.window(lips, k, 2))
        assert torch.equal(condition.motion_noise, torch.zeros(1))
        assert condition.motion_frames.abs().max() <= 1


def test_noise_on_motion_frames_that_the_weights_ask_for(photo: np.ndarray) -> None:
    """Each frame's motion frames get new noise of the level that the network is given; kept frames stay clean."""
    motion = {"hide_mouth": False, "noise": 0.3, "sampling_noise": 0.1}
    engine = Recorder(untrained(override(TINY, {"extensions": {"motion": motion}})), 2)
    frames = list(generate(engine, photo, torch.randn(3, 384)))
    shown = [to_unit(frame) for frame in (photo, photo, *frames)]
    for k, (_, condition) in enumerate(engine.calls[::2]):
        assert condition.motion_noise.tolist() == pytest.approx([0.1])
        noise = condition.motion_frames[0] - torch.stack(shown[k : k + 2])
        assert float(noise.std()) == pytest.approx(0.1, rel=0.1)
        assert abs(float(noise.mean())) < 0.01


def test_a_given_lip_code_replaces_the_predicted_one(photo: np.ndarray) -> None:
    engine = Recorder(untrained(TINY), 1)
    lips = torch.randn(3, 3)
    list(generate(engine, photo, torch.randn(3, 384), codes={"lips": lips}))
    for k, (_, condition) in enumerate(engine.calls):
        assert torch.equal(condition.cues.codes["lips"][0], conditioning.window(lips, k, 2))


def test_the_seed_is_all_the_randomness(photo: np.ndarray) -> None:
    engine, speech = Engine(untrained(TINY), sampled(TINY, 2)), torch.randn(3, 384)

    def frames(seed: int) -> np.ndarray:
        return np.stack(list(generate(engine, photo, speech, seed=seed)))

    first = frames(1)
    torch.manual_seed(9)
    assert np.array_equal(frames(1), first)
    assert not np.array_equal(frames(2), first)


@pytest.mark.parametrize(("factor", "side"), [(1.0, 256), (2.5, 368), (4.0, 512)])
def test_a_video_is_as_large_as_the_face_in_its_picture(
    packaged: Talker, untried: None, examples: Path, factor: float, side: int
) -> None:
    """The face of the example is framed by 147 px."""
    picture = cv2.cvtColor(cv2.imread(str(examples / "face.jpg")), cv2.COLOR_BGR2RGB)
    resized = cv2.resize(picture, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
    frame = next(packaged.frames(resized, torch.zeros(1_280)))
    assert frame.shape == pytest.approx((side, side, 3), abs=6)


def test_the_papers_network_samples_too(photo: np.ndarray) -> None:
    """Noise prediction, learned variance, gray motion frames, no lip code; and a model without motion frames."""
    plain = override(
        TINY,
        {
            "network": {"learned_variance": True},
            "diffusion": {"prediction": "eps"},
            "conditioning": {"grayscale_motion": True},
            "extensions": {
                "copying": {"gates": False},
                "motion": {"noise": 0.0, "hide_mouth": False},
                "codes": {"lips": None},
            },
        },
    )
    for config in (plain, override(plain, {"conditioning": {"motion_frames": 0}})):
        frames = list(generate(Engine(untrained(config), sampled(config, 3)), photo, torch.randn(3, 384)))
        assert np.stack(frames).shape == (3, 32, 32, 3)
        assert not np.array_equal(frames[0], frames[1])


# --- The photo, the size, the device


def test_a_larger_video_is_as_sharp_as_the_photo_where_it_shows_it(
    packaged: Talker, untried: None, examples: Path
) -> None:
    sound = torch.randn(1_920, generator=torch.Generator().manual_seed(0)) * 0.1  # 3 frames
    small, large = (
        np.stack(list(packaged.frames(examples / "face.jpg", sound, seed=1, size=size))) for size in (128, 256)
    )
    assert (small.shape, large.shape) == ((3, 128, 128, 3), (3, 256, 256, 3))
    portrait = find_portrait(examples / "face.jpg", packaged.config, packaged.backend)
    photo = faces.framed(portrait.picture, faces.scaled_transform(portrait.matrix, 2), 256)

    def detail(picture: np.ndarray) -> float:
        return float(cv2.Laplacian(picture[:60, 40:216], cv2.CV_64F).var())  # of hair

    for frame, shown in zip(small, large, strict=True):
        assert np.abs(cv2.resize(shown, (128, 128), interpolation=cv2.INTER_AREA) - frame.astype(int)).mean() < 3
        assert detail(shown) > 0.8 * detail(photo)
        assert detail(cv2.resize(frame, (256, 256), interpolation=cv2.INTER_LANCZOS4)) < 0.65 * detail(photo)


def test_the_photo_is_aligned_as_the_weights_want(face: Path) -> None:
    config = override(TINY, {"network": {"image_size": 160}, "alignment": {"eye_distance": 0.25, "eye_y": 0.45}})
    portrait = find_portrait(face, config, load_backend("mesh"))
    photo = faces.warp(portrait.picture, portrait.matrix, 160)
    assert (photo.shape, photo.dtype, portrait.notes) == ((160, 160, 3), np.uint8, [])
    found, count = find_face(photo, load_backend("mesh"), "the crop")
    mean = faces.mean_face(config.alignment, 160)
    assert count == 1
    for eye in faces.EYES:
        assert np.linalg.norm(found.landmarks[eye].mean(axis=0) - mean[eye].mean(axis=0)) < 0.04 * 160


def scene_of(face: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: object) -> Scene:
    monkeypatch.setattr(talker, "load_model", lambda *_: (untrained(TINY), TINY, {}))
    return Talker("any", torch.device("cpu"), progress=False).scene(
        Job(face, folder / "speech.wav", Path("o.mp4"), **options)
    )


def test_a_photo_that_ends_close_to_the_face_is_blurred_around_it(
    folder: Path, face: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = tmp_path / "close.png"
    Image.open(face).crop((140, 60, 310, 185)).save(close)  # no hair, and little below the chin
    scene = scene_of(close, folder, monkeypatch)
    assert len(scene.notes) == 1
    assert re.fullmatch(
        rf"{re.escape(str(close))} ends close to .* (2|3|4)\d% of .* blurred; --paste .*", scene.notes[0]
    )
    assert scene_of(close, folder, monkeypatch, paste=True).notes == []
    assert scene_of(face, folder, monkeypatch).notes == []
    # What the network sees, at the size of a video that people see.
    portrait = find_portrait(close, TINY, load_backend("mesh"))
    larger = faces.align_transforms(
        load_backend("mesh").detect(portrait.picture)[0].landmarks[None], TINY.alignment, 128
    )[0]
    streaks, blurred = faces.warp(portrait.picture, larger, 128), faces.framed(portrait.picture, larger, 128)
    beyond = faces.beyond_edge(portrait.picture.shape, larger, 128) > 8
    assert gradients(blurred)[beyond].mean() < 0.7 * gradients(streaks)[beyond].mean()


def gradients(image: np.ndarray) -> np.ndarray:
    """(H, W): how much a picture changes from pixel to pixel."""
    return np.abs(np.stack(np.gradient(image.astype(float), axis=(0, 1)))).sum(axis=(0, -1))


def test_an_animated_picture_is_a_video(
    folder: Path, face: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first frame may be black."""
    photo = Image.open(face)
    black, upside_down = Image.new("RGB", photo.size), photo.rotate(180)
    for name in ("a.gif", "a.webp"):
        black.save(tmp_path / name, save_all=True, append_images=[photo, upside_down], duration=[200, 200, 200])
        backend = load_backend("mesh")
        first = find_portrait(tmp_path / name, TINY, backend)
        assert np.abs(first.picture.astype(int) - photo).mean() < 12
        later = find_portrait(str(tmp_path / name), TINY, backend, at=0.5)
        assert np.abs(later.picture.astype(int) - upside_down).mean() < 12
        crops = [faces.warp(portrait.picture, portrait.matrix, 96).astype(int) for portrait in (first, later)]
        assert np.abs(crops[0] - crops[1]).mean() < 12  # upright in the crop
        with pytest.raises(DheadsError, match=rf"{name} at 0\.1 s: no face found"):
            find_portrait(tmp_path / name, TINY, backend, at=0.1)


def test_of_a_video_the_first_frame_with_a_whole_face_is_taken(face: Path, tmp_path: Path) -> None:
    whole = np.asarray(Image.open(face))[:256, :320]
    cut = np.concatenate([whole[130:], whole[:130]])  # eyes at the lower edge, the mouth at the upper one
    write_video(tmp_path / "a.mp4", [cut] * 5 + [whole] * 5, None)
    portrait = find_portrait(tmp_path / "a.mp4", TINY, load_backend("mesh"))
    assert np.abs(portrait.picture.astype(int) - whole).mean() < 8


def test_enlarging() -> None:
    frame = np.zeros((32, 32, 3), np.uint8)
    frame[8:24, 8:24] = 200
    assert resized_frame(frame, None) is frame
    assert resized_frame(frame, 32) is frame
    large = resized_frame(frame, 64)
    assert large.shape == (64, 64, 3)
    assert (large[24:40, 24:40] == 200).all()
    assert (large[:8] == 0).all()


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")
    absent = "cuda" if not torch.cuda.is_available() else "mps"
    with pytest.raises(DheadsError, match=f"device {absent} is not available here; use .*cpu"):
        resolve_device(absent)


def test_a_result_is_plain_data() -> None:
    result = Made(Path("a.mp4"), 25, 1.0, 0.5)
    assert dataclasses.asdict(result)["notes"] == []


# --- What the encoder hears


def test_weights_may_ask_for_a_room_that_is_not_silent(examples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder alone hears a little noise, the same every time; by default it hears the sound as it is."""
    heard: list[Tensor] = []

    class Encoder(audio.SpeechEncoder):
        def encode_pieces(self, pieces: Iterator[Tensor], frames: int | None = None) -> Iterator[Tensor]:
            heard.append(torch.cat(list(pieces)))
            yield torch.zeros(2, 384)

    monkeypatch.setattr(talker, "load_speech_encoder", lambda *_: Encoder())
    quiet, room = (override(TINY, {"extensions": {"sound": {"room_noise": level}}}) for level in (0.0, 1e-3))
    for config in (quiet, room, room):
        monkeypatch.setattr(talker, "load_model", lambda *_, config=config: (untrained(config), config, {}))
        Talker("any", torch.device("cpu"), progress=False).scene(
            Job(examples / "face.jpg", examples / "speech.wav", Path("o.mp4"))
        )
    said = load_waveform(examples / "speech.wav")
    assert torch.equal(heard[0], said)
    assert (heard[1] - said).std() == pytest.approx(1e-3, rel=0.02)
    assert torch.equal(heard[1], heard[2])
