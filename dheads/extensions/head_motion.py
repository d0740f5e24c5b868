"""Head motion by chance, for a video of any length: pieces of real tracks, joined, that lean on the sound.

A bank holds the poses of people who speak. A piece of it is played for some seconds; then the next one is drawn among
the frames where a head is near the same pose at the same velocity, and what is left of the difference fades. What can
be heard is taken out of the bank and put back from the new sound by ridge regression: nods that follow the speech, and
how fast the head moves. The left side of a head is as likely as the right one, so every piece also serves mirrored.
Why: in 3 s windows of held-out people a logistic regression on 98 features (range, speed, smoothness, spectrum,
correlations, sound) tells this motion from real tracks with an area under the curve of 0.56, where 0.5 is chance; an
autoregressive process with ten lags gets 0.97, with a varying amplitude 0.82. From sound alone nods can be foretold
with a correlation of 0.16, and turns not at all.
Off: no table extensions.codes.pose.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from dheads.conditioning import window

DIMS = 6
FURTHEST = 0.25  # scale, roll, x and y at most; networks are not trained on heads further from the middle of the crop
_CAPACITY = 12_000  # frames of the bank, 8 minutes
_LEAST, _MOST = 40, 90  # frames of the bank that a piece has
_CLIP = _LEAST + 3  # frames of the shortest clip: a piece has neighbours on either side
_PERSON = 100  # frames that each person has room for, if there are many
_FADE = 36  # of them, in which the difference between two pieces fades
_STILL = 1 / 3  # people who move less than this share of the median are left out: they hardly move but for noise
_MIRROR = (1.0, -1.0, -1.0, 1.0, -1.0, 1.0)  # scale, roll, x, y, yaw, pitch of a mirrored head
_RECENT, _AGAIN = 8, 6.0  # clips that were played last, and the cost of one of them
# Frames of speech on either side of a frame that are heard: bumps of this standard deviation, so far apart.
_BUMPS, _BUMP, _APART = 6, 2.0, 4
_COMPONENTS = 10  # principal components of the speech embeddings
_RIDGE = 3.0  # relative to the features' mean variance
_SLOW = 12.0  # frames; what is slower than this standard deviation does not follow the sound
_RATES = 0.8, 1.25  # least and largest speed at which a piece is played
_BEGIN = 25  # frames in which the head begins to follow the sound


@dataclass(frozen=True)
class MotionClip:
    """One clip to take motion from."""

    speaker: str
    poses: Tensor  # (F, 6)
    speech: Tensor  # (F, D)


class HeadMotion(nn.Module):
    """The bank of poses, and how they follow the sound; fitted to data and kept with the weights."""

    reach = _BUMPS * _APART + math.ceil(3 * _BUMP)  # frames of speech on either side
    poses: Tensor
    lengths: Tensor
    chances: Tensor
    spread: Tensor
    mean: Tensor
    components: Tensor
    response: Tensor

    def __init__(self, speech_dim: int) -> None:
        super().__init__()
        self.register_buffer("poses", torch.zeros(_CAPACITY, DIMS))  # of one clip after the other
        self.register_buffer("lengths", torch.zeros(_CAPACITY // _CLIP))  # frames of each clip
        self.register_buffer("chances", torch.zeros(_CAPACITY // _CLIP))  # of each frame of a clip, logarithms
        self.register_buffer("spread", torch.ones(DIMS))  # standard deviation in a clip, the median of people
        self.register_buffer("mean", torch.zeros(speech_dim))
        self.register_buffer("components", torch.zeros(speech_dim, _COMPONENTS))
        # (features, 7): poses in units of `spread`, and the logarithm of the squared speed
        self.register_buffer("response", torch.zeros((2 * _BUMPS + 1) * _COMPONENTS, DIMS + 1))

    @property
    def moves(self) -> bool:
        """Whether there is anything to play."""
        return bool((self.lengths >= _CLIP).any())

    @torch.no_grad()
    def fit(self, clips: Sequence[MotionClip]) -> None:
        """Take motion from clips; each person counts alike. People who sit still are left out."""
        clips = [_centred(clip) for clip in clips if len(clip.poses) >= _CLIP]
        ranges = {name: _range(clips, name) for name in sorted({clip.speaker for clip in clips})}
        if not ranges:
            return
        lively = {name: std.log().mean() for name, std in ranges.items()}
        least = torch.stack(list(lively.values())).median() + math.log(_STILL)
        clips = [clip for clip in clips if lively[clip.speaker] >= least]
        names = _spread_out(sorted({clip.speaker for clip in clips}), _CAPACITY // _PERSON)
        clips = [clip for clip in clips if clip.speaker in names]
        # The median: a few people who walk about would make the others restless.
        self.spread.copy_(torch.stack([ranges[name] for name in names]).median(0).values)
        self._fit_components(clips)
        self._fit_response(clips, ranges)
        quota = _quota([sum(len(c.poses) for c in clips if c.speaker == name) for name in names])
        pieces: list[tuple[Tensor, float]] = []
        for name in names:
            # Halfway to the usual range: heads differ, but no video turns from a nodding one to a frozen one.
            gain = ((ranges[name] / self.spread).log().mean() * -0.5).exp()
            own = _longest([self._unheard(clip, gain) for clip in clips if clip.speaker == name], quota)
            pieces += [(poses, -math.log(sum(map(len, own)))) for poses in own]
        self._fill(pieces)

    def heard(self, speech: Tensor, frame: Tensor) -> Tensor:
        """(B, 7) of speech (F, D) at frames (B,): poses in units of `spread`, and the log of the squared speed."""
        return self._features(speech, frame) @ self.response

    def track(self, seed: int, scale: float = 1.0) -> HeadTrack:
        """The motion of one video, `scale` times as large; 0: none."""
        return HeadTrack(self, seed, scale)

    def _features(self, speech: Tensor, frame: Tensor) -> Tensor:
        near = window((speech - self.mean) @ self.components, frame, self.reach)  # (B, 2 reach + 1, K)
        return torch.einsum("br,nrk->nbk", _bumps(self.reach), near).flatten(1)

    def _fit_components(self, clips: Sequence[MotionClip]) -> None:
        """Principal components of the embeddings, of unit variance."""
        weights = _shares(clips)
        self.mean.copy_(_sum(w * c.speech.sum(0) for w, c in zip(weights, clips, strict=True)))
        centred = [clip.speech - self.mean for clip in clips]
        covariance = _sum(w * x.T @ x for w, x in zip(weights, centred, strict=True))
        variances, vectors = torch.linalg.eigh(covariance.double())
        kept = min(_COMPONENTS, len(variances))
        scaled = vectors[:, -kept:] / variances[-kept:].clamp(min=1e-9).sqrt()
        self.components.zero_()[:, :kept] = scaled.float()

    def _fit_response(self, clips: Sequence[MotionClip], ranges: dict[str, Tensor]) -> None:
        """Ridge regression of fast motion and of its speed on the speech."""
        count = len(self.response)
        gram, moment = torch.zeros(count, count), torch.zeros(count, DIMS + 1)
        for weight, clip in zip(_shares(clips), clips, strict=True):
            x = self._features(clip.speech, torch.arange(len(clip.speech)))
            poses = clip.poses / ranges[clip.speaker]
            y = torch.cat([poses - _smoothed(poses, _SLOW), _log_energy(poses)], dim=1)
            x, y = x - x.mean(0), y - y.mean(0)
            gram += weight * x.T @ x
            moment += weight * x.T @ y
        penalty = _RIDGE * gram.diagonal().mean().clamp(min=1e-9) * torch.eye(count)
        response = torch.linalg.solve((gram + penalty).double(), moment.double()).float()
        # To which side a head turns cannot be heard.
        self.response.copy_(response * torch.tensor([*(float(side > 0) for side in _MIRROR), 1.0]))

    def _unheard(self, clip: MotionClip, gain: Tensor) -> Tensor:
        """The poses (F, 6) of a clip without what its own sound explains."""
        heard = self.heard(clip.speech, torch.arange(len(clip.speech)))[:, :DIMS]
        return clip.poses * gain - heard * self.spread

    def _fill(self, pieces: Sequence[tuple[Tensor, float]]) -> None:
        self.poses.zero_()
        self.lengths.zero_()
        self.chances.zero_()
        begin = 0
        for index, (poses, chance) in enumerate(pieces):
            self.poses[begin : begin + len(poses)] = poses
            self.lengths[index], self.chances[index] = len(poses), chance
            begin += len(poses)


class HeadTrack:
    """The poses of one video, relative to the photo's; frames are asked for in order.

    The first pose is the photo's own, and the head leaves it from rest.
    """

    reach = HeadMotion.reach

    def __init__(self, motion: HeadMotion, seed: int, scale: float) -> None:
        self._motion = copy.deepcopy(motion).cpu().float()  # cheap to compute where the speech is
        self._scale = scale
        moves = scale != 0 and self._motion.moves
        self._player = _Player(self._motion, np.random.default_rng([seed, DIMS])) if moves else None
        self._made: list[Tensor] = []  # (6,) each
        self._begin = 0  # the frame of the first of them

    @torch.no_grad()
    def window(self, frame: int, speech: Tensor, at: int, context: int) -> Tensor:
        """The poses (2 context + 1, 6) around a frame. speech (n, D): embeddings around it; row `at` is its own."""
        while (count := self._begin + len(self._made)) <= frame + context:
            self._made.append(self._next(speech, at - frame + count, count))
        begin = max(0, frame - context)
        self._made, self._begin = self._made[begin - self._begin :], begin
        return window(torch.stack(self._made[: frame + context + 1 - begin]), frame - begin, context)

    def _next(self, speech: Tensor, row: int, count: int) -> Tensor:
        if self._player is None:
            return torch.zeros(DIMS)
        row = min(row, len(speech) - 1)
        begin = max(0, row - self.reach)  # the same rows however much speech there is
        near = speech[begin : row + self.reach + 1].float()
        heard = self._motion.heard(near, torch.tensor([row - begin]))[0]
        followed = _eased(torch.tensor(count / _BEGIN)) * heard[:DIMS] * self._motion.spread
        # Speed is the root of the squared speed that is heard.
        played = self._player.next((0.5 * heard[DIMS]).exp().clamp(*_RATES).item())
        return bounded(self._scale * (played + followed))


class _Player:
    """Plays pieces of the bank one after the other, from a head at rest in the middle."""

    def __init__(self, motion: HeadMotion, rng: np.random.Generator) -> None:
        lengths = motion.lengths.round().long()
        lengths = lengths[lengths > 0]
        ends = lengths.cumsum(0).repeat_interleave(lengths)
        begins = ends - lengths.repeat_interleave(lengths)
        index = torch.arange(len(ends))
        poses = motion.poses[: len(ends)]
        # Central differences within each clip
        slopes = (poses[(index + 1).minimum(ends - 1)] - poses[(index - 1).maximum(begins)]) / 2
        sides = torch.tensor(_MIRROR)
        self._poses, self._slopes = torch.cat([poses, poses * sides]), torch.cat([slopes, slopes * sides])
        self._left = (ends - 2 - index).repeat(2)  # frames to the last but one of the clip
        self._entries = ((self._left >= _LEAST) & (index > begins).repeat(2)).nonzero()[:, 0]
        self._clips = torch.arange(len(lengths)).repeat_interleave(lengths).repeat(2)[self._entries]
        self._chances = motion.chances[self._clips]
        self._units = torch.cat([motion.spread, slopes.square().mean(0).sqrt().clamp(min=1e-9)])
        self._scaled = torch.cat([self._poses, self._slopes], dim=1)[self._entries] / self._units  # (E, 12)
        self._rng = rng
        self._recent: deque[int] = deque(maxlen=_RECENT)
        self._enter(torch.zeros(2, DIMS))

    def next(self, rate: float) -> Tensor:
        """The next pose (6,); the piece goes on at that rate."""
        pose = self._played() + self._rest()
        self._row += rate
        if (over := self._row - self._end) >= 0:
            self._enter(torch.stack([self._poses[self._end], self._slopes[self._end]]))
            self._row += over
        return pose

    def _enter(self, last: Tensor) -> None:
        """Draw a piece that goes on from a pose and a slope, (2, 6): p ~ chance exp(-cost / 2)."""
        cost = (self._scaled - last.flatten() / self._units).square().sum(1)
        for clip in self._recent:
            cost[self._clips == clip] += _AGAIN
        gumbel = torch.from_numpy(self._rng.gumbel(size=len(cost)).astype(np.float32))
        drawn = int((self._chances - cost / 2 + gumbel).argmax())
        self._recent.append(int(self._clips[drawn]))
        # The piece's first frame and its end in the bank, and where in it the head is
        self._first = int(self._entries[drawn])
        self._end = self._first + min(int(self._left[self._first]), int(self._rng.integers(_LEAST, _MOST + 1)))
        self._row = float(self._first)
        self._apart = last - torch.stack([self._poses[self._first], self._slopes[self._first]])

    def _played(self) -> Tensor:
        """The bank's pose (6,) between two frames: the cubic with the poses and slopes of both."""
        row = int(self._row)
        u = self._row - row
        p, q, dp, dq = self._poses[row], self._poses[row + 1], self._slopes[row], self._slopes[row + 1]
        return p + u * u * (3 - 2 * u) * (q - p) + u * (1 - u) * ((1 - u) * dp - u * dq)

    def _rest(self) -> Tensor:
        """What is left of the difference (6,) between where the head was and the piece."""
        # The quintics that go from 1 with slope 0, and from 0 with slope 1, to 0 with slope and curvature 0
        u = min(1.0, (self._row - self._first) / _FADE)
        pose, slope = 1 - u**3 * (10 - 15 * u + 6 * u * u), u - u**3 * (6 - 8 * u + 3 * u * u)
        return pose * self._apart[0] + slope * _FADE * self._apart[1]


def bounded(poses: Tensor) -> Tensor:
    """Poses (..., 6) whose scale, roll, x and y come no further than FURTHEST; small ones hardly change."""
    # p' = L tanh(p / L)
    return torch.cat([FURTHEST * torch.tanh(poses[..., :4] / FURTHEST), poses[..., 4:]], -1)


def _centred(clip: MotionClip) -> MotionClip:
    return MotionClip(clip.speaker, clip.poses - clip.poses.median(0).values, clip.speech.float())


def _range(clips: Sequence[MotionClip], speaker: str) -> Tensor:
    """The standard deviation (6,) in a person's clips, their mean."""
    return torch.stack([clip.poses.std(0) for clip in clips if clip.speaker == speaker]).mean(0).clamp(min=1e-6)


def _shares(clips: Sequence[MotionClip]) -> list[float]:
    """The weight of each clip's frames: every person counts alike, and all frames sum to 1."""
    frames: dict[str, int] = {}
    for clip in clips:
        frames[clip.speaker] = frames.get(clip.speaker, 0) + len(clip.poses)
    return [1 / (len(frames) * frames[clip.speaker]) for clip in clips]


def _quota(counts: Sequence[int]) -> int:
    """The most frames of each person, of whom there are so many, that fit into the bank."""
    quota, rest = 0, _CAPACITY
    for done, count in enumerate(sorted(counts)):
        quota = min(count, rest // (len(counts) - done))
        rest -= quota
    return quota


def _longest(poses: Sequence[Tensor], quota: int) -> list[Tensor]:
    """A person's longest clips, the last one cut, of `quota` frames in all."""
    kept: list[Tensor] = []
    for part in sorted(poses, key=len, reverse=True):
        part = part[: quota - sum(map(len, kept))]
        kept += [part] if len(part) >= _CLIP else []
    return kept


def _spread_out(names: Sequence[str], count: int) -> list[str]:
    """At most so many of the names, evenly spread over the list."""
    return [names[round(k)] for k in np.linspace(0, len(names) - 1, min(len(names), count)).tolist()]


@cache
def _bumps(reach: int) -> Tensor:
    """(features, 2 reach + 1): Gaussians over the speech around a frame, less their mean: loud or soft voices agree."""
    offsets = torch.arange(-reach, reach + 1)
    centres = _APART * torch.arange(-_BUMPS, _BUMPS + 1)
    bumps = torch.exp(-0.5 * ((offsets - centres[:, None]) / _BUMP) ** 2)
    bumps = bumps / bumps.sum(1, keepdim=True)
    return bumps - bumps.mean(0)


def _smoothed(values: Tensor, sigma: float) -> Tensor:
    """(F, C) filtered by a Gaussian over time, ends repeated."""
    reach = math.ceil(3 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    return torch.einsum("r,frc->fc", kernel / kernel.sum(), window(values, torch.arange(len(values)), reach))


def _log_energy(poses: Tensor) -> Tensor:
    """The logarithm (F, 1) of the squared speed of poses (F, 6) in units of their range."""
    speed = window(poses, torch.arange(len(poses)), 1)
    energy = ((speed[:, 2] - speed[:, 0]) / 2).square().sum(1, keepdim=True)
    return (_smoothed(energy, 3.0) + 1e-4).log()


def _sum(values: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(values)).sum(0)


def _eased(u: Tensor) -> Tensor:
    """From 0 at 0 to 1 at 1, with slope 0 at both."""
    u = u.clamp(0, 1)
    return u * u * (3 - 2 * u)
