"""The `[extensions]` table: what goes beyond the paper. Every default is off, so an empty table is the paper.

Each table is read by the module of `dheads.extensions` that is named after it, or by the one that its docstring names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from dheads.config.bounds import bounded


@dataclass(frozen=True)
class PatchesConfig:
    """A network on patches, and a shallow one on finer patches that adds detail (extensions/network.py, detail.py)."""

    size: int = bounded(1, 1, 64)
    """The network works on patches of size x size px, as channels."""
    detail_channels: int = bounded(0, 0, 4096)
    """Width of the detail network on patches of half the size; 0: none."""


@dataclass(frozen=True)
class CopyingConfig:
    """Pixels copied from the last motion frame and the identity."""

    gates: bool = False
    """Whether the network predicts, for every pixel outside the mouth, how much of either is blended into its x_0."""


@dataclass(frozen=True)
class WarpConfig:
    """The photo's pixels moved to where the pose code says the head is; needs extensions.codes.pose."""

    flow: bool = False
    """Whether the photo is moved, and the network predicts a flow and, for every pixel, how much of it is taken."""
    landmark_weight: float = bounded(0.01, 0, 1e6)
    """Weight of the flow's error at the 68 landmarks, a px^2."""
    moved_weight: float = bounded(2.0, 0, 1e6)
    """Weight of the difference between the photo moved and the true frame."""
    own_weight: float = bounded(0.01, 0, 1e6)
    """Price of what the network does not take from the photo, outside the mouth region."""
    favour: float = bounded(0.0, 0, 100)
    """In sampling, what is added to the logits of the photo's shares, away from mouth and blinks; if it is above 0, the
    photo in place is not taken where its head is."""


@dataclass(frozen=True)
class MouthConfig:
    """A network that draws the mouth at 256 px, in videos larger than the network's frames; needs warp.flow."""

    channels: int = bounded(0, 0, 4096)
    """Width of the mouth network; 0: none."""


@dataclass(frozen=True)
class MotionConfig:
    """Motion frames that are altered on purpose, so that the errors of generated frames do not accumulate."""

    hide_mouth: bool = False
    """Blank the mouth region, so that the lips follow the sound and not the frames before."""
    noise: float = bounded(0.0, 0, 10)
    """Largest standard deviation of noise added in training; the network is given its level."""
    sampling_noise: float = bounded(0.0, 0, 10)
    """Standard deviation of the noise added in sampling."""
    drift: float = bounded(0.0, 0, 1)
    """How far colours, contrast and position drift in training, as they do in a long video."""
    holes: float = bounded(0.0, 0, 1)
    """Share of the training examples with holes in their motion frames, to be filled from the identity."""
    start_share: float = bounded(0.0, 0, 1)
    """Share of the training examples with copies of the identity as motion frames, as at a video's start."""
    anchor: float = bounded(0.0, 0, 1)
    """Share of the identity, moved by the pose where there is one, that is blended into each motion frame."""


@dataclass(frozen=True)
class CodeConfig:
    """A code: numbers per frame that describe a part of the face, given to the network with the audio window.

    The key of its table is the name of a code in `dheads.extensions.codes`; a code without a table is off.
    """

    context: int = bounded(2, 0, 256)
    """Codes on either side of the frame's own."""
    noise: float = bounded(0.0, 0, 100)
    """Standard deviation of noise on the normalised code in training."""
    weight: float = bounded(0.0, 0, 1e6)
    """Weight of an extra loss inside the code's box, as lambda_lip is of the mouth's."""
    event_share: float = bounded(0.0, 0, 1)
    """Share of a clip's training examples that show one of the code's rare events, such as a blink."""
    event_rate: float = bounded(0.3, 0, 0.9)
    """Events a second in sampling, for a code that changes by chance."""
    gain: float = bounded(1.0, 0, 10)
    """In sampling, factor of a code that is predicted or changes by chance, where frames show less than it says."""
    shown: float = bounded(0.0, 0, 2)
    """In sampling, for the lip code: the slope of the shown opening on the heard one that the gain of each face is
    chosen for, by trial frames (sampling/calibration.py); 0: the gain above for every face."""


class CodeTables(dict[str, CodeConfig]):
    """The codes that are on, by name. Never changed, so it can be hashed, as a frozen dataclass is."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


@dataclass(frozen=True)
class NoiseConfig:
    """x_T that consecutive frames share, so that what the sound leaves open looks alike in each of them."""

    shared: float = bounded(0.0, 0, 1)
    """Share of x_T's variance around the mouth that comes from the frame before."""
    outer_shared: float = bounded(0.0, 0, 1)
    """The same outside the mouth region, so that hair and shoulders do not shimmer."""
    temperature: float = bounded(1.0, 0, 10)
    """Standard deviation of x_T around the mouth; under 1 gives fewer blotches, and 0 one mouth for one sound."""
    outer_temperature: float = bounded(1.0, 0, 10)
    """The same outside the mouth region."""
    pause_shared: float = bounded(0.0, 0, 1)
    """Least share anywhere in pauses, where the sound is also averaged, so that the mouth rests (pauses.py); 0: off."""
    warm_steps: int = bounded(0, 0, 100_000)
    """Steps of a frame after the first, which then starts from the last one, noised; 0: all start from noise alone."""


@dataclass(frozen=True)
class SoundConfig:
    """Sound that is absent, amplified or not quite silent (extensions/guidance.py)."""

    dropout: float = bounded(0.0, 0, 1)
    """Share of the training examples without sound, for guidance."""
    guidance: float = bounded(1.0, 0, 100)
    """Classifier-free guidance by the sound: x_0 is moved this far from that without sound; 1: off."""
    room_noise: float = bounded(0.0, 0, 1)
    """Standard deviation, of full scale, of noise added to what the speech encoder hears: no room is fully silent."""


@dataclass(frozen=True)
class RolloutsConfig:
    """Motion frames that the averaged network generates in training (training/rollout.py)."""

    share: float = bounded(0.0, 0, 1)
    """Share of the examples whose motion frames are generated."""
    steps: int = bounded(3, 1, 1000)
    """Denoising steps a frame."""
    start: float = bounded(0.7, 0, 1)
    """Part of the run after which roll-outs begin."""


@dataclass(frozen=True)
class ExamplesConfig:
    """Which examples are chosen, and how their pictures vary (training/batches.py, augment.py)."""

    balance: Literal["clips", "speakers"] = "clips"
    """clips: every clip once an epoch; speakers: by the root of their clips' number, so that few clips count more."""
    augment: bool = False
    """Vary colours, geometry and sharpness."""
    still_share: float = bounded(0.0, 0, 1)
    """Share of the examples that are photos (clips of one frame), when balanced by speakers."""
    speaker_cap: float = bounded(1.0, 0.001, 1)
    """Largest share of the examples that show one speaker, when balanced by speakers."""
    source_cap: float = bounded(1.0, 0.001, 1)
    """The same for each folder at the root of the raw data."""
    other_clip_share: float = bounded(0.0, 0, 1)
    """Share of the examples whose identity comes from another clip of the speaker, if there is one."""


@dataclass(frozen=True)
class ExtensionsConfig:
    """Everything beyond the paper."""

    snr_clip: float | None = bounded(None, 1e-9, math.inf)
    """Losses on x_0 weighted by min(snr + 1, clip); absent: the paper's loss on what the network predicts."""
    patches: PatchesConfig = field(default_factory=PatchesConfig)
    copying: CopyingConfig = field(default_factory=CopyingConfig)
    warp: WarpConfig = field(default_factory=WarpConfig)
    mouth: MouthConfig = field(default_factory=MouthConfig)
    motion: MotionConfig = field(default_factory=MotionConfig)
    codes: CodeTables = field(default_factory=CodeTables)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    sound: SoundConfig = field(default_factory=SoundConfig)
    rollouts: RolloutsConfig = field(default_factory=RolloutsConfig)
    examples: ExamplesConfig = field(default_factory=ExamplesConfig)
