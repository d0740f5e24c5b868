"""Speech encoders: embeddings aligned with the video frames, from sound as a whole or in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchaudio
from test_sound import speechlike

from dheads.errors import DheadsError
from dheads.media.sound import frame_count, load_waveform
from dheads.speech import bundles
from dheads.speech.bundles import BundleEncoder
from dheads.speech.encoders import load_speech_encoder
from dheads.speech.interface import SpeechEncoder
from dheads.speech.released import ReleasedEncoder
from dheads.speech.whisper import WhisperEncoder

# --- Whisper


@pytest.fixture(scope="module")
def whisper() -> WhisperEncoder:
    return load_speech_encoder("whisper-tiny.en")


def test_the_packaged_encoder_is_frozen(whisper):
    assert (whisper.name, whisper.dim) == ("whisper-tiny.en", 384)
    assert not whisper.training
    assert not any(parameter.requires_grad for parameter in whisper.parameters())


def test_an_unknown_encoder_lists_the_known_ones():
    known = r"diffused-heads, hubert-base, wav2vec2-base, whisper-tiny\.en"
    with pytest.raises(DheadsError, match=f"'hubert'.*{known}"):
        load_speech_encoder("hubert")


def test_mel_filters_are_slaneys(whisper):
    # M. Slaney's Auditory Toolbox: linear below 1 kHz, logarithmic above; triangles of equal area.
    def to_hz(mel: np.ndarray) -> np.ndarray:
        return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))

    top = 15 + 27 * np.log(8) / np.log(6.4)
    edges = to_hz(np.linspace(0, top, 82))
    hz = np.linspace(0, 8000, 201)[:, None]
    rise = (hz - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - hz) / (edges[2:] - edges[1:-1])
    filters = np.clip(np.minimum(rise, fall), 0, None) * 2 / (edges[2:] - edges[:-2])
    assert np.abs(whisper.mel_filters.numpy() - filters).max() < 1e-6


def test_golden_values_of_openais_own_code(whisper):
    # openai-whisper 20250625: mel filters, Conv1d, blocks and positions, run on the two seconds around each frame.
    t = torch.arange(48_000, dtype=torch.float64) / 16_000
    voice = 0.3 * torch.sin(2 * torch.pi * (120 + 40 * t) * t) * (1 + torch.sin(2 * torch.pi * 3 * t)) / 2
    beeps = 0.1 * torch.sin(2 * torch.pi * 1700 * t) * (t % 0.5 < 0.2)
    embeddings = whisper.encode((voice + beeps).float())
    assert embeddings.shape == (75, 384)
    golden = {
        0: ([1.3126, -1.715, 0.6261, -1.4778], 24.5788),
        37: ([-0.1277, -0.5834, 0.0926, -1.0388], 20.7874),
        74: ([0.8125, -1.524, -0.6145, -0.8308], 19.1169),
    }
    for frame, (first, norm) in golden.items():
        assert embeddings[frame, :4].tolist() == pytest.approx(first, abs=1e-3)
        assert embeddings[frame].norm().item() == pytest.approx(norm, abs=1e-3)


def test_embeddings_of_speech(whisper, shared):
    sound = load_waveform(shared / "samples" / "speech_en_jfk.flac")[:48_000]
    speech = whisper.encode(sound)
    assert 0.7 < speech.std() < 1.3  # about unit scale
    assert abs(speech.mean()) < 0.2
    silence = whisper.encode(torch.zeros(640), frames=1)
    assert (speech - silence).norm(dim=1).min() > 5
    # Loudness hardly matters, what is said does.
    quieter = whisper.encode(sound[:32_000] * 0.25, frames=25)
    assert (quieter - speech[:25]).norm(dim=1).mean() < 0.5 * (speech[20:45] - speech[:25]).norm(dim=1).mean()
    # Shifting the sound by k frames shifts the embeddings by k frames.
    shifted = whisper.encode(torch.nn.functional.pad(sound[:24_000], (7 * 640, 0)), frames=25)
    assert (shifted[7:] - whisper.encode(sound[:24_000], frames=18)).abs().max() < 1e-3


# The following tests depend on the windows, not on the weights: a small encoder of the same form is faster.


@pytest.fixture(scope="module")
def small() -> WhisperEncoder:
    torch.manual_seed(0)
    return WhisperEncoder(blocks=1).eval()


def test_pieces_of_speech_give_the_embeddings_of_the_whole(whisper, shared):
    sound = load_waveform(shared / "samples" / "speech_es.wav")[:30_001]
    chunks = list(whisper.encode_pieces(sound.split(7_000)))
    assert [len(chunk) for chunk in chunks] == [16, 16, 15]
    assert (torch.cat(chunks) - whisper.encode(sound)).abs().max() < 1e-6


def test_shifting_the_sound_shifts_the_embeddings(small, shared):
    sound = load_waveform(shared / "samples" / "speech_nl.wav")[16_000:64_000]  # starts in the middle of speech
    embeddings = small.encode(sound)
    for k in (1, 7, 40):
        shifted = small.encode(torch.nn.functional.pad(sound, (k * 640, 0)))
        assert (shifted[k:] - embeddings).abs().max() < 1e-4
    earlier = small.encode(sound[10 * 640 :])
    assert (earlier[25:] - embeddings[35:]).abs().max() < 1e-4


def test_sound_of_any_length(small, shared):
    sound = load_waveform(shared / "samples" / "speech_de.wav")[:32_000]
    for samples in (1, 300, 1_600, 16_000):
        assert small.encode(sound[:samples]).shape == (frame_count(samples), 384)
    # 33 s, longer than Whisper's 30 s: a phrase has the same embeddings at every position.
    embeddings = small.encode(torch.nn.functional.pad(sound, (0, 16_000)).repeat(11))
    assert embeddings.shape == (825, 384)
    phrases = embeddings.unflatten(0, (11, 75))
    assert (phrases[1:-1] - phrases[1]).abs().max() < 1e-4
    assert (phrases[0, 25:] - phrases[1, 25:]).abs().max() < 1e-4
    assert (phrases[10, :50] - phrases[1, :50]).abs().max() < 1e-4
    assert (phrases[1, :50] - small.encode(sound)).abs()[25:].max() < 1e-4


def test_an_embedding_depends_on_one_second_either_side_only(small, shared):
    sound = load_waveform(shared / "samples" / "speech_fr.wav")[:96_000]
    changed = sound.clone()
    changed[48_000:] = 0.9 * torch.rand(48_000) - 0.45  # loud noise from frame 75 on
    difference = (small.encode(sound) - small.encode(changed)).abs().amax(dim=1)
    assert difference[:49].max() < 1e-5
    assert difference[52:].min() > 1e-4


def test_an_embedding_is_centred_on_its_frame(whisper):
    click = torch.zeros(20 * 640)
    click[10 * 640 + 320] = 0.5
    difference = (whisper.encode(click) - whisper.encode(torch.zeros_like(click))).abs().mean(dim=1)
    assert difference.argmax() == 10
    assert difference[9].item() == pytest.approx(difference[11].item(), rel=0.3)


def test_embeddings_do_not_depend_on_the_batch(small, shared, monkeypatch):
    sound = load_waveform(shared / "samples" / "speech_es.wav")[:40_000]
    embeddings = small.encode(sound)
    monkeypatch.setattr(small, "batch", 5)
    assert (small.encode(sound) - embeddings).abs().max() < 1e-4


def test_what_windows_have_in_common_changes_no_window(whisper):
    """Where loud sound enters and leaves the windows, their dynamic ranges differ; each window alone has but one."""
    sound = 1e-4 * torch.randn(75 * 640, generator=torch.Generator().manual_seed(0))
    sound[30 * 640 : 33 * 640] *= 3_000
    mel = whisper._log_mel(torch.cat([torch.zeros(16_000), sound, torch.zeros(16_000)]))
    together = whisper._positions(mel)
    for frame in range(0, len(together), 7):
        columns = mel[:, 4 * frame : 4 * frame + 200]
        floored = torch.maximum(columns, columns.max() - 8)
        alone = F.gelu(whisper.conv2(F.gelu(whisper.conv1((floored[None] + 4) / 4))))[0]
        torch.testing.assert_close(together[frame], alone, rtol=0, atol=1e-4)
    assert len({round(float(mel[:, 4 * k : 4 * k + 200].max()), 2) for k in range(len(together))}) > 2


def test_few_queries_get_what_all_of_them_would(whisper):
    block, x = whisper.blocks[-1], torch.randn(2, 100, 384, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(block(x, slice(49, 51)), block(x)[:, 49:51], rtol=0, atol=1e-4)


def test_other_tempos_are_other_voices_in_step_with_the_frames(whisper, shared):
    """The embeddings of another tempo are nearest to those of the same frame."""
    sound = load_waveform(shared / "samples" / "speech_es.wav")[16_000 : 16_000 + 40 * 640]
    plain = whisper.encode(sound, 40)
    assert (whisper.encode_at(1.0, sound, 40) - plain).abs().max() < 1e-3
    for tempo in (0.85, 1.18):
        voice = whisper.encode_at(tempo, sound, 40)
        assert voice.shape == (40, 384)
        own, late, early = ((voice[10:-10] - plain.roll(shift, 0)[10:-10]).norm(dim=1).mean() for shift in (0, 3, -3))
        assert 1 < own < 0.8 * min(late, early)


def test_frames_may_be_asked_for(small):
    sound = torch.from_numpy(speechlike(1.0))
    own = small.encode(sound)
    assert own.shape == (25, 384)
    longer = small.encode(sound, frames=30)
    assert longer.shape == (30, 384)
    assert (longer[:25] - own).abs().max() < 1e-4
    assert (small.encode(sound, frames=20) - own[:20]).abs().max() < 1e-4


# --- The authors' encoder: its inputs


class Recorder(torch.nn.Module):
    """Returns a summary of its inputs: first and last sample, sum, length, and the number of earlier calls."""

    def forward(self, window, lengths, init_state):
        assert window.shape == (1, 1, 3200)
        assert init_state.shape == (2, 1, 256)
        embedding = torch.zeros(1, 256)
        inputs = (window[0, 0, 0], window[0, 0, -1], window.sum(), lengths[0], init_state[0, 0, 0])
        embedding[0, :5] = torch.stack([torch.as_tensor(value).float() for value in inputs])
        return embedding, lengths, init_state + 1


@pytest.mark.parametrize(("samples", "frames"), [(6_400, 10), (6_400 + 319, 10), (6_400 + 321, 11), (100, 1)])
def test_the_released_encoder_gets_five_frames_around_each(samples, frames):
    sound = torch.arange(1.0, samples + 1)
    embeddings = ReleasedEncoder(Recorder()).encode(sound)
    assert (embeddings.shape, embeddings.dtype) == ((frames, 256), torch.float32)
    padded = torch.zeros(samples + 20_000)
    padded[1_280 : 1_280 + samples] = sound
    for k in range(frames):
        window = padded[640 * k : 640 * k + 3_200]  # samples 640 k - 1280 to 640 k + 1920 of the sound
        expected = [window[0].item(), window[-1].item(), window.sum().item(), 3_200, k]
        assert embeddings[k, :5].tolist() == pytest.approx(expected)


def test_the_released_encoder_gives_as_many_frames_as_asked_for():
    encoder = ReleasedEncoder(Recorder())
    own = encoder.encode(torch.ones(6_400))
    assert torch.equal(encoder.encode(torch.ones(6_400), 7), own[:7])
    longer = encoder.encode(torch.ones(6_400), 15)
    assert torch.equal(longer[:10], own)
    assert longer[13, 2] == 0  # silence after the end
    assert torch.equal(encoder.encode(torch.ones(64_000), 7), own[:7])
    assert torch.equal(encoder.encode(torch.ones(64_000), 60)[:50], encoder.encode(torch.ones(64_000))[:50])
    assert torch.equal(encoder.encode(torch.ones(6_400)), own)  # no state remains of the recording before


# --- torchaudio's bundles, replaced by a small one of the same form


SMALL = {
    "extractor_mode": "group_norm",
    "extractor_conv_layer_config": [(16, 10, 5), *[(16, 3, 2)] * 4, *[(16, 2, 2)] * 2],
    "extractor_conv_bias": False,
    "encoder_embed_dim": 24,
    "encoder_projection_dropout": 0.1,
    "encoder_pos_conv_kernel": 16,
    "encoder_pos_conv_groups": 4,
    "encoder_num_layers": 7,
    "encoder_num_heads": 2,
    "encoder_attention_dropout": 0.1,
    "encoder_ff_interm_features": 32,
    "encoder_ff_interm_dropout": 0.0,
    "encoder_dropout": 0.1,
    "encoder_layer_norm_first": False,
    "encoder_layer_drop": 0.05,
    "aux_num_out": None,
}


@pytest.fixture
def bundle(monkeypatch, tmp_path) -> Path:
    """The file, in the cache folder, of a small bundle that replaces HuBERT."""
    torch.manual_seed(0)
    small = torchaudio.pipelines.Wav2Vec2Bundle("small.pth", SMALL, 16_000, False, _model_type="Wav2Vec2")
    monkeypatch.setattr(bundles, "BUNDLES", {"hubert-base": small})
    monkeypatch.setenv("DHEADS_HOME", str(tmp_path))
    torch.save(torchaudio.models.wav2vec2_model(**SMALL).state_dict(), tmp_path / "small.pth")
    return tmp_path / "small.pth"


def test_a_bundle_gives_one_embedding_a_frame(bundle):
    encoder = load_speech_encoder("hubert-base")
    assert not encoder.training
    assert encoder.name == "hubert-base"
    sound = torch.from_numpy(speechlike(1.5))
    embeddings = encoder.encode(sound)
    assert (embeddings.shape, embeddings.dtype) == ((38, 24), torch.float32)
    # The sixth block's output; two columns a frame, in step with the frame's middle.
    columns = encoder.model.extract_features(torch.nn.functional.pad(sound, (40, 360))[None])[0][5][0]
    torch.testing.assert_close(embeddings[:37], columns[:74].unflatten(0, (37, 2)).mean(dim=1), rtol=0, atol=2e-2)
    assert encoder.encode(sound[:100]).shape == (1, 24)
    assert encoder.encode(sound, frames=3).shape == (3, 24)
    assert encoder.encode(sound, frames=50).shape == (50, 24)


def test_a_bundles_embedding_is_centred_on_its_frame():
    class Middle(torch.nn.Module):
        """Replaces the model: each output is the mean of its samples."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def extract_features(self, waveforms, num_layers):
            assert num_layers == 6
            middles = waveforms.unfold(1, 400, 320).mean(dim=2)
            return [middles[..., None].expand(-1, -1, 4)], None

    encoder = BundleEncoder("middle", Middle())
    sound = torch.arange(640.0 * 1_000)  # each sample's value is its index
    embeddings = encoder.encode(sound)
    middles = 640.0 * torch.arange(1_000) + 319.5
    torch.testing.assert_close(embeddings[1:-1, 0], middles[1:-1], rtol=0, atol=0.5)


def test_long_sound_is_encoded_in_overlapping_parts(bundle):
    encoder = load_speech_encoder("hubert-base")
    sound = torch.from_numpy(speechlike(4.0))
    whole = encoder.encode(sound)
    encoder.chunk, encoder.margin = 30, 20
    parts = encoder.encode(sound)
    assert parts.shape == whole.shape
    assert (parts - whole).norm(dim=1).mean() < 0.2 * whole.std(dim=0).norm()


def test_a_damaged_or_hostile_bundle(bundle):
    class Hostile:
        def __reduce__(self):
            return (Path.write_text, (bundle.with_name("harm"), "done"))

    contents = [b"", b"junk" * 100, bundle.read_bytes()[:-1000]]
    torch.save({"x": Hostile()}, bundle)
    contents.append(bundle.read_bytes())
    for content in contents:
        bundle.write_bytes(content)
        with pytest.raises(DheadsError, match="cannot download or read the speech encoder 'hubert-base'") as caught:
            load_speech_encoder("hubert-base")
        assert str(bundle.parent) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not bundle.with_name("harm").exists()


# --- Sound in pieces


def encoders() -> list[SpeechEncoder]:
    """A small encoder of each kind."""
    torch.manual_seed(0)
    bundle = BundleEncoder("bundle", torchaudio.models.wav2vec2_model(**SMALL).eval())
    bundle.chunk, bundle.margin = 30, 20
    return [WhisperEncoder(blocks=1).eval(), ReleasedEncoder(Recorder()), bundle]


@pytest.mark.parametrize("encoder", encoders(), ids=lambda encoder: encoder.name)
@pytest.mark.parametrize("samples", [0, 1, 319, 321, 960, 15_999, 64 * 640 + 319, 64 * 640 + 321])
def test_embeddings_do_not_depend_on_the_pieces(encoder, samples, examples):
    sound = load_waveform(examples / "speech.wav")[:samples]
    uneven = np.random.default_rng(samples).integers(0, samples + 1, 9).tolist()
    for frames, pieces in ((None, sound.split(641)), (20, sound.split(641)), (70, sound.tensor_split(sorted(uneven)))):
        whole = encoder.encode(sound, frames)
        assert len(whole) == (frame_count(samples) if frames is None else frames)
        chunks = list(encoder.encode_pieces(pieces, frames))
        assert (torch.cat(chunks) - whole).abs().max() < 1e-6


@pytest.mark.parametrize("encoder", encoders(), ids=lambda encoder: encoder.name)
def test_sound_without_end_is_encoded_as_it_comes(encoder):
    heard = 0

    def pieces() -> Iterator[torch.Tensor]:
        nonlocal heard
        while True:
            heard += 4_000
            yield torch.full((4_000,), 0.1)

    given = 0
    chunks = encoder.encode_pieces(pieces())
    while given < 500:
        given += len(next(chunks))
        # Of the bundle the margin, of Whisper one second.
        assert heard <= (given + 26) * 640 + 4_000
