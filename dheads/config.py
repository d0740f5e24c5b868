"""Everything that can be chosen about a model, as frozen dataclasses, and the presets."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Literal

import tomli_w

from dheads.errors import DheadsError

FPS = 25  # video frames a second, everywhere
SAMPLE_RATE = 16_000  # Hz, of the sound that speech encoders hear
AudioCodec = Literal["aac", "copy"]  # of a video's sound: AAC, which plays everywhere, or as it is


_MOST_LEVELS = 8  # of the U-Net


def bounded(default: typing.Any, least: float, most: float) -> typing.Any:
    """A field whose value, or each of whose values, lies between these, both included; it may be None by default."""
    return field(default=default, metadata={"bounds": (least, most)})


def _check_bounds(section: str, values: typing.Any) -> None:
    for one in dataclasses.fields(values):
        value = getattr(values, one.name)
        if "bounds" not in one.metadata or value is None:
            continue
        least, most = one.metadata["bounds"]
        for number in value if isinstance(value, tuple) else (value,):
            if not least <= number <= most:  # also where it is not a number
                raise DheadsError(
                    f"configuration: {section}.{one.name} is {number:g}, but must be {least:g} to {most:g}"
                )


@dataclass(frozen=True)
class ModelConfig:
    """The ADM U-Net (paper section 3.3). The defaults are the paper's network, 204 M parameters."""

    image_size: int = bounded(128, 1, 2048)
    model_channels: int = bounded(256, 1, 4096)
    channel_mult: tuple[int, ...] = bounded((1, 2, 3), 1, 64)
    num_res_blocks: int = bounded(2, 1, 16)
    # side lengths in px with attention, besides the middle block
    attn_resolutions: tuple[int, ...] = bounded((), 1, 2048)
    head_channels: int = bounded(64, 1, 4096)
    dropout: float = bounded(0.1, 0, 1)
    # of the timestep embedding's cosines; the released network has 10
    max_period: float = bounded(10_000.0, 1, 1e9)
    learned_variance: bool = True
    # Beyond the paper.
    patch_size: int = bounded(1, 1, 64)  # the network works on patches of n x n px, as channels
    copy_gates: bool = False  # blend the network's own x_0 with the last motion frame and the identity
    # width of a shallow network on patches of half the side, which draws what the patches leave out; 0: none
    detail_channels: int = bounded(0, 0, 4096)


@dataclass(frozen=True)
class DiffusionConfig:
    """The noise schedule (paper section 3.1: cosine, T = 1000) and what the network predicts."""

    num_steps: int = bounded(1000, 1, 100_000)
    cosine_s: float = bounded(0.008, 0, 1)
    beta_max: float = bounded(0.999, 1e-6, 0.999999)
    prediction: Literal["eps", "v", "x_0"] = "eps"  # the paper predicts eps


@dataclass(frozen=True)
class ConditioningConfig:
    """What the network is told besides x_t (paper sections 3.2 and 3.4)."""

    motion_frames: int = bounded(2, 0, 64)  # m_x
    audio_context: int = bounded(2, 0, 256)  # m_y: speech embeddings on either side of the frame
    speech_encoder: str = "whisper-tiny.en"
    speech_dim: int = bounded(384, 1, 16_384)  # D
    grayscale_motion: bool = False
    identity_frame: Literal["random", "first"] = "random"  # of the clip, in training
    # Beyond the paper.
    # largest noise on motion frames in training; its level is told to the network
    motion_noise: float = bounded(0.0, 0, 10)
    hide_motion_mouth: bool = False  # the mouth region of motion frames is blanked: lips must follow the sound
    lip_dims: Literal[0, 3] = 0  # the lip code: none, or three mouth measures predicted from speech
    lip_context: int = bounded(2, 0, 256)  # lip codes on either side of the frame
    eye_dims: Literal[0, 1] = 0  # the eye code: none, or how far the eyes are open; in sampling it blinks by chance
    eye_context: int = bounded(2, 0, 256)  # eye codes on either side of the frame


@dataclass(frozen=True)
class AlignmentConfig:
    """Where the mean face lies in the square crop. Lengths are fractions of the crop's side."""

    eye_distance: float = bounded(0.27, 0.01, 1)  # between the eyes' centres
    eye_y: float = bounded(0.40, 0, 1)  # height of the eyes below the top edge
    # sigma of the Gaussian that smooths landmarks over time, in frames
    smooth_frames: float = bounded(2.0, 0, 1e6)
    landmarks: Literal["mesh", "fan"] = "mesh"  # packaged, or face-alignment, the paper's


@dataclass(frozen=True)
class PreparationConfig:
    """Which raw clips are good enough to train on, and what is made of their sound."""

    min_face_px: float = bounded(48.0, 0, 1e6)  # from jaw to jaw in the raw picture
    max_gap: int = bounded(5, 0, 1e6)  # frames without a face that are filled in from their neighbours
    max_missing: float = bounded(0.2, 0, 1)  # share of a clip's frames that may be filled in
    max_jump: float = bounded(0.25, 0, 1e6)  # how far a face may move from one frame to the next, in its widths
    max_skew_seconds: float = bounded(0.25, 0, 1e6)  # between the lengths of picture and sound
    # Beyond the paper: the sound is encoded at these speeds too, as other voices (1.1: a tenth faster and higher).
    speech_tempos: tuple[float, ...] = bounded((), 0.5, 2)


@dataclass(frozen=True)
class SamplingConfig:
    """How to generate unless told otherwise. The defaults are the released demo's."""

    steps: int = bounded(100, 1, 100_000)
    solver: Literal["ddpm", "ddim", "dpm++2m"] = "ddpm"
    # Beyond the paper: where the steps lie; quadratic has more of them at little noise, where detail is made.
    spacing: Literal["uniform", "quadratic", "logsnr"] = "uniform"
    # Beyond the paper: frames after the first start from the last one, noised, at this many steps from the end; 0: all
    # start from noise alone.
    warm_steps: int = bounded(0, 0, 100_000)
    # Beyond the paper: how far beyond what is drawn without sound; 1: what the network says. Wants
    # training.audio_dropout.
    guidance: float = bounded(1.0, 0, 100)
    # Beyond the paper: noise of this standard deviation (of full scale) in what the speech encoder hears, for networks
    # that have learned from recordings only: no room is as silent as a file can be.
    room_noise: float = bounded(0.0, 0, 1)
    # Beyond the paper: how often eyes blink, a second, where the network is told an eye code; at most 0.9.
    blink_rate: float = bounded(0.3, 0, 0.9)
    # Beyond the paper: the share of x_T's variance around the mouth that a frame has from the one before, so that what
    # the sound leaves open is drawn alike in each of them; 0 .. 1.
    shared_noise: float = bounded(0.0, 0, 1)
    # Beyond the paper: the same share elsewhere, so that hair and shoulders do not shimmer; 0 .. 1.
    outer_shared_noise: float = bounded(0.0, 0, 1)
    # Beyond the paper: the standard deviation of x_T elsewhere; under 1 what is drawn is likelier, with fewer specks.
    outer_temperature: float = bounded(1.0, 0, 10)
    # Beyond the paper: the least share anywhere in pauses, where the sound is told as its mean too, so that the mouth
    # rests; 0 .. 1; 0: pauses are like all else.
    pause_shared_noise: float = bounded(0.0, 0, 1)
    # Beyond the paper: noise on the network's own last frames, told as in training, so that errors do not pile up.
    motion_noise: float = bounded(0.0, 0, 10)
    # Beyond the paper: each finished frame becomes a motion frame with this share of the identity blended in.
    identity_anchor: float = bounded(0.0, 0, 1)


@dataclass(frozen=True)
class TrainingConfig:
    """How the weights are found. The defaults are the paper's (section 4.1) where it names a value."""

    steps: int = bounded(250_000, 1, 10**12)  # of the optimiser
    # after which the steps end, schedules and all; None: by their number alone
    minutes: float | None = bounded(None, 0.001, 1e9)
    batch_size: int = bounded(10, 1, 1_000_000)  # examples a process (a GPU) computes at once
    accumulate: int = bounded(1, 1, 1_000_000)  # batches a process adds up before the optimiser takes a step
    learning_rate: float = bounded(5e-5, 0, 100)  # of Adam
    weight_decay: float = bounded(0.0, 0, 100)
    warmup_steps: int = bounded(0, 0, 10**12)
    # paper: times 0.8 every 1/18 of the steps; cooldown: constant, then linear towards 0
    lr_schedule: Literal["paper", "cooldown"] = "paper"
    grad_clip: float | None = bounded(None, 1e-9, math.inf)  # largest norm of the gradient; None: as it is
    ema_decay: float = bounded(0.9999, 0, 1)  # the paper names none; guided diffusion's
    lambda_vlb: float = bounded(1e-4, 0, 1e6)
    lambda_lip: float = bounded(0.2, 0, 1e6)
    # clips: every clip once an epoch; speakers: by the root of their clips' number, so that few clips count more
    balance: Literal["clips", "speakers"] = "clips"
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16 where the hardware has it
    compile: bool = False  # torch.compile: minutes to begin with, then faster steps
    checkpoint_activations: bool = False  # compute activations twice instead of keeping them: less memory, slower
    bad_steps: Literal["skip", "stop"] = "skip"  # what to do when a gradient is not finite, or explodes
    seed: int = bounded(0, 0, 2**63 - 1)
    log_every: int = bounded(100, 1, 10**12)
    checkpoint_every: int = bounded(5_000, 1, 10**12)
    keep: int = bounded(3, 0, 10**9)  # checkpoints, besides the best
    sample_every: int = bounded(5_000, 1, 10**12)
    sample_clips: int = bounded(2, 0, 1_000_000)  # held-out clips that sample videos show
    # Beyond the paper.
    # losses on x_0 with weight min(snr + 1, clip); None: plain, on eps or v
    snr_clip: float | None = bounded(None, 1e-9, math.inf)
    augment: bool = False
    audio_dropout: float = bounded(0.0, 0, 1)
    # motion frames made as unlike the truth as a long video's own frames are; 0 .. 1
    motion_drift: float = bounded(0.0, 0, 1)
    # share of the examples whose motion frames have holes, to be filled from the identity
    patch_drop: float = bounded(0.0, 0, 1)
    # Share of the examples whose motion frames the averaged network draws itself, as `sampling` says but in
    # rollout_draws steps each; from that part of the run on.
    rollout_share: float = bounded(0.0, 0, 1)
    rollout_draws: int = bounded(3, 1, 1000)
    rollout_from: float = bounded(0.7, 0, 1)
    lip_noise: float = bounded(0.0, 0, 100)  # noise on the lip code, in its standard deviations
    lambda_eye: float = bounded(0.0, 0, 1e6)  # weight of the loss around the eyes
    blink_share: float = bounded(0.0, 0, 1)  # share of a moving clip's examples that show it blink, where it does
    # share of the examples that are told copies of the identity as motion frames
    start_share: float = bounded(0.0, 0, 1)
    still_share: float = bounded(0.0, 0, 1)  # share of the draws given to clips of one frame, when balanced by speakers
    # no speaker gets more than this share of the draws, when balanced by speakers
    speaker_cap: float = bounded(1.0, 0.001, 1)
    source_cap: float = bounded(1.0, 0.001, 1)  # the same, for each of the raw folder's own folders
    # share of the examples whose identity is of another clip of the speaker, if any
    other_clip_share: float = bounded(0.0, 0, 1)


@dataclass(frozen=True)
class Config:
    """The complete description of a model, stored in every checkpoint."""

    name: str = "custom"
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    conditioning: ConditioningConfig = field(default_factory=ConditioningConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    preparation: PreparationConfig = field(default_factory=PreparationConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        """Raises DheadsError for numbers out of their bounds, and where the parts do not fit together."""
        for section in dataclasses.fields(self):
            if section.name != "name":
                _check_bounds(section.name, getattr(self, section.name))
        if self.sampling.steps > self.diffusion.num_steps:
            raise DheadsError(
                f"configuration: sampling.steps is {self.sampling.steps}, but diffusion.num_steps only "
                f"{self.diffusion.num_steps}"
            )
        if not 1 <= len(self.model.channel_mult) <= _MOST_LEVELS:
            raise DheadsError(f"configuration: model.channel_mult must have 1 to {_MOST_LEVELS} numbers, a level each")
        coarsest = self.model.patch_size * 2 ** (len(self.model.channel_mult) - 1)
        if self.model.image_size % coarsest:
            raise DheadsError(
                f"configuration: model.image_size is {self.model.image_size}, but must be a multiple of {coarsest} "
                "(patch_size times 2 for every level of channel_mult after the first)"
            )
        if self.model.detail_channels and self.model.patch_size % 2:
            raise DheadsError(
                f"configuration: model.detail_channels needs an even model.patch_size, not {self.model.patch_size}"
            )
        if self.model.copy_gates and self.conditioning.motion_frames < 1:
            raise DheadsError("configuration: model.copy_gates needs conditioning.motion_frames of 1 or more")
        if self.model.copy_gates and self.training.snr_clip is None:
            raise DheadsError("configuration: model.copy_gates needs training.snr_clip, for a loss that sees the gates")


def to_dict(config: Config) -> dict[str, typing.Any]:
    """The configuration as plain nested dicts, lists and scalars, ready for JSON or TOML."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, typing.Any]) -> Config:
    """The inverse of `to_dict`. Absent keys take their defaults.

    Raises DheadsError for an unknown key (naming the nearest known one) and for a value of the wrong type.
    """
    return _build(Config, values, "")


def to_toml(config: Config) -> str:
    """The configuration as a TOML file that `from_dict` takes back."""
    return toml_text(to_dict(config))


def toml_text(values: dict[str, typing.Any]) -> str:
    """Nested dictionaries as a TOML file; keys that are None are left out, as TOML has no word for them."""
    return tomli_w.dumps(_without_none(values))


def _without_none(values: dict[str, typing.Any]) -> dict[str, typing.Any]:
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value is not None
    }


def override(config: Config, *changes: dict[str, typing.Any]) -> Config:
    """`config` with the given (possibly partial, nested) values in place of its own; checked when all are in place."""
    return from_dict(functools.reduce(_merge, changes, to_dict(config)))


def _merge(base: dict[str, typing.Any], top: dict[str, typing.Any]) -> dict[str, typing.Any]:
    merged = dict(base)
    for key, value in top.items():
        both_nested = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both_nested else value
    return merged


def _build(cls: type, values: typing.Any, path: str) -> typing.Any:
    if not isinstance(values, dict):
        raise DheadsError(f"configuration: {path or 'the whole'} must be a table, not {values!r}")
    kinds = typing.get_type_hints(cls)
    built = {}
    for key, value in values.items():
        name = f"{path}.{key}" if path else key
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, n=1, cutoff=0.0)
            raise DheadsError(f"configuration: unknown key {name}; did you mean {near[0]}?")
        kind = kinds[key]
        built[key] = _build(kind, value, name) if dataclasses.is_dataclass(kind) else _scalar(kind, value, name)
    return cls(**built)


def _scalar(kind: typing.Any, value: typing.Any, name: str) -> typing.Any:
    if typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
        return tuple(_scalar(typing.get_args(kind)[0], item, name) for item in value)
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise DheadsError(f"configuration: {name} is {value!r}, but must be one of {typing.get_args(kind)}")
        return value
    allowed = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if float in allowed and type(value) is int:
        return float(value)
    if type(value) not in allowed:
        raise DheadsError(f"configuration: {name} must be {getattr(kind, '__name__', kind)}, not {value!r}")
    return value


# The paper's, as far as it is known from the code that the authors point to (DinoMan/face-processor): landmarks by FAN,
# averaged over 7 frames (whose standard deviation in time is 2); above and below the mean face, brows to chin, the crop
# has 0.336 and 0.155 of its height. Guessed: that these margins, the documentation's example, were used, in a square
# crop; and the mean face, which is ours, 2.02 eye distances high. The side is then 1.491 x 2.02 = 3.01 eye distances,
# and the eyes lie (0.336 x 2.02 + 0.36) / 3.01 of it below the top.
_PAPERS_ALIGNMENT = {"eye_distance": 0.33, "eye_y": 0.35, "smooth_frames": 2.0, "landmarks": "fan"}

_PRESETS: dict[str, dict[str, typing.Any]] = {
    # The paper, trained on CREMA-D: RGB motion frames; 3,000 epochs of 6,622 clips, 80 at once (10 on each of 8 GPUs).
    "crema": {
        "conditioning": {"speech_encoder": "diffused-heads", "speech_dim": 256},
        "alignment": _PAPERS_ALIGNMENT,
        "training": {"steps": 250_000},
    },
    # The paper, trained on LRW: grayscale motion frames; 112 epochs of 488,766 clips, 80 at once.
    "lrw": {
        "conditioning": {"speech_encoder": "diffused-heads", "speech_dim": 256, "grayscale_motion": True},
        "alignment": _PAPERS_ALIGNMENT,
        "training": {"steps": 685_000},
    },
    # The packaged weights: made on two CPU cores in a few hours from some 40 people.
    "small": {
        "model": {
            "image_size": 128,
            "patch_size": 4,
            "detail_channels": 32,
            "model_channels": 64,
            "channel_mult": [1, 2, 2],
            "num_res_blocks": 1,
            "head_channels": 64,
            "dropout": 0.0,
            "learned_variance": False,
            "copy_gates": True,
        },
        "diffusion": {"prediction": "x_0"},
        "conditioning": {"motion_noise": 0.25, "hide_motion_mouth": True, "lip_dims": 3, "eye_dims": 1},
        "alignment": {"eye_distance": 0.30, "eye_y": 0.38},
        "preparation": {"speech_tempos": [0.85, 1.18]},
        "sampling": {
            "steps": 6,
            "solver": "dpm++2m",
            "spacing": "quadratic",
            "identity_anchor": 0.5,
            "shared_noise": 1.0,
            "outer_shared_noise": 0.9,
            "outer_temperature": 0.8,
            "pause_shared_noise": 0.99,
            "room_noise": 1e-3,
        },
        "training": {
            "steps": 20_000,
            "batch_size": 16,
            "learning_rate": 5e-4,
            "weight_decay": 0.01,
            "warmup_steps": 200,
            "lr_schedule": "cooldown",
            "grad_clip": 1.0,
            "ema_decay": 0.999,
            "balance": "speakers",
            "lambda_vlb": 0.0,
            "lambda_lip": 1.5,
            "precision": "bf16",
            "snr_clip": 20.0,
            "augment": True,
            "audio_dropout": 0.1,
            "motion_drift": 1.0,
            "patch_drop": 0.15,
            "rollout_share": 0.25,
            "lip_noise": 0.15,
            "lambda_eye": 1.0,
            "blink_share": 0.3,
            "start_share": 0.25,
            "still_share": 0.05,
            "speaker_cap": 0.25,
            "source_cap": 0.35,
            "other_clip_share": 0.25,
            "log_every": 200,
            "checkpoint_every": 500,
            "sample_every": 2_000,
        },
    },
    # Runs every command in seconds on a CPU; for tests and for trying things out.
    "tiny": {
        "model": {
            "image_size": 32,
            "model_channels": 16,
            "channel_mult": [1, 2],
            "num_res_blocks": 1,
            "head_channels": 16,
            "dropout": 0.0,
            "learned_variance": False,
            "copy_gates": True,
        },
        "diffusion": {"prediction": "v"},
        "conditioning": {"motion_noise": 0.3, "lip_dims": 3, "eye_dims": 1, "hide_motion_mouth": True},
        "preparation": {"speech_tempos": [1.1]},
        "sampling": {"steps": 4, "solver": "dpm++2m"},
        "training": {
            "steps": 40,
            "batch_size": 4,
            "learning_rate": 1e-3,
            "lr_schedule": "cooldown",
            "grad_clip": 1.0,
            "ema_decay": 0.9,
            "balance": "speakers",
            "snr_clip": 5.0,
            "augment": True,
            "audio_dropout": 0.1,
            "motion_drift": 1.0,
            "patch_drop": 0.2,
            "rollout_share": 0.5,
            "rollout_draws": 2,
            "lip_noise": 0.2,
            "lambda_eye": 0.5,
            "blink_share": 0.15,
            "start_share": 0.15,
            "still_share": 0.1,
            "speaker_cap": 0.25,
            "other_clip_share": 0.2,
            "log_every": 10,
            "checkpoint_every": 20,
            "sample_every": 20,
        },
    },
}


def preset(name: str) -> Config:
    """The configuration of that name. Raises DheadsError, listing the known ones."""
    if name not in _PRESETS:
        raise DheadsError(f"unknown preset {name!r}; the known ones are {', '.join(sorted(_PRESETS))}")
    return from_dict({"name": name, **_PRESETS[name]})
