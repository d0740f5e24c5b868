"""Animate still photos with the motion and speech of faces in real clips, for more identities to train on.

    python recipes/animate.py --stills RAW/stills --clips RAW/talkvid --clips RAW/hdtf \
        --splits recipes/small-splits.csv --out RAW/animated

A photo becomes a mesh of triangles, whose vertices in the skin follow a thin-plate spline (Bookstein 1989). The real
clip is called the driver: brows move as far as the driver's, lids close with the driver's, and half of the driver's
head motion moves the whole picture. The photo's lips are closed first and then open as the driver's do, with the chin;
the inside of the mouth is pasted from the clip, so that nothing remains of a smile in the photo. Faces seen from the
side are skipped, as they would look torn. `out/splits.csv` lists the videos.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, TypeVar

import cv2
import numpy as np
import torch
import typer
from scipy.interpolate import CubicSpline, RBFInterpolator
from scipy.ndimage import gaussian_filter1d
from scipy.spatial import Delaunay
from tqdm import tqdm

from dheads.config import AlignmentConfig
from dheads.errors import DheadsError
from dheads.faces.alignment import (
    EYES,
    MOUTH,
    STABLE,
    align_transforms,
    apply_transform,
    eye_distance,
    invert_transform,
    mouth_opening,
    mouth_width,
    warp,
)
from dheads.faces.detection import LandmarkBackend
from dheads.faces.eyelids import eye_openness
from dheads.faces.landmarks import find_face
from dheads.faces.mesh import MeshBackend
from dheads.media.photos import PHOTOS, load_photo
from dheads.media.reading import VIDEOS, read_frames
from dheads.media.sound import SAMPLES_PER_FRAME, load_waveform, wav_file
from dheads.media.writing import write_video

T = TypeVar("T")
FACE_PX = 256  # side of the aligned crops in which landmarks of photos and clips are compared
SWAY = 0.5  # share of the driver's head motion that the photo takes
REACH = 0.25  # limit of that motion, in eye distances
SMOOTH, SMOOTH_LIPS = 2.0, 0.7  # sigma in frames: closures of the lips last two or three
DRIFT = 8.0  # sigma in frames; slower motion of the mouth is no speech
UPPER_SHARE = 0.35  # the upper lip's share of closing the mouth
RAISE = 0.15  # limit of the brows' motion up and down, in eye distances
TURNED = 0.45  # limit of the nose's distance from the middle of the face, in half widths of the face
SHUT = -0.6  # the eye code of shut lids, as measured by the iris network
CLOSED = 0.01  # opening of closed lips as measured by the mesh, in eye distances
LIP_STEPS = 13  # vertices along the line of a lip
MARGIN = 8  # px around a pasted mouth
FINER = 4  # triangles are filled at this multiple of the resolution
ALIGNMENT = AlignmentConfig()
# The lips' lines, from left to right: outer upper, inner upper, inner lower, outer lower.
LIP_LINES = (
    np.arange(48, 55),
    np.arange(60, 65),
    np.array([60, 67, 66, 65, 64]),
    np.array([48, 59, 58, 57, 56, 55, 54]),
)
LIDS = ((37, 41), (38, 40), (43, 47), (44, 46))  # upper and lower, above each other
BROWS = np.arange(17, 27)
CHIN = np.arange(4, 13)
CHIN_SHARE = np.array([0.1, 0.3, 0.5, 0.7, 0.7, 0.7, 0.5, 0.3, 0.1])  # of the lower lip's motion down
# The mirror images of the mouth's 20 points.
MIRROR = np.array([6, 5, 4, 3, 2, 1, 0, 11, 10, 9, 8, 7, 16, 15, 14, 13, 12, 19, 18, 17])
SKIN = np.array([3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 35, 33, 31])  # around the mouth's own outline


def main(
    stills: Annotated[Path, typer.Option(help="Folder of photos.")],
    clips: Annotated[list[Path], typer.Option(help="Folder of real clips; can be repeated.")],
    splits: Annotated[Path, typer.Option(help="CSV of clip, speaker and split; only the train split is used.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    frames: Annotated[int, typer.Option(min=2, help="Frames of each video.")] = 75,
    count: Annotated[int | None, typer.Option(help="Number of photos to animate.  [default: all]")] = None,
    seed: Annotated[int, typer.Option(help="Chooses the clip and the part of it for each photo.")] = 0,
) -> None:
    """Animate photos with the motion of real clips."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    photos, videos = (listed(folders, splits, kinds) for folders, kinds in (([stills], PHOTOS), (clips, VIDEOS)))
    photos = photos[:count]
    out.mkdir(parents=True, exist_ok=True)
    animate_all(photos, videos, out, frames, seed)
    with (out / "splits.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("clip", "speaker", "split"))
        made = [photo for photo in photos if target(out, photo).exists()]
        rows.writerows((f"{out.name}/{photo.stem}.mp4", f"still_{photo.stem}", "train") for photo in made)
    typer.echo(out)


def listed(folders: list[Path], splits: Path, kinds: frozenset[str]) -> list[Path]:
    """The files in these folders that the CSV lists in the train split, sorted by name."""
    with splits.open(newline="", encoding="utf-8") as file:
        train = {row["clip"] for row in csv.DictReader(file) if row["split"] == "train"}
    paths = [path for folder in folders for path in sorted(folder.iterdir()) if path.suffix.lower() in kinds]
    return [path for path in paths if f"{path.parent.name}/{path.name}" in train]


def target(out: Path, photo: Path) -> Path:
    """The path of a photo's video."""
    return out / f"{photo.stem}.mp4"


def animate_all(photos: list[Path], videos: list[Path], out: Path, frames: int, seed: int) -> None:
    """Write the videos that are missing; photos and clips that cannot be used are skipped with a warning."""
    backend = MeshBackend()
    todo = {photo: index for index, photo in enumerate(photos) if not target(out, photo).exists()}
    stills = usable("find", todo, lambda photo: find_still(photo, backend))
    if not stills:
        return
    drivers = list(usable("watch", videos, lambda video: watch(video, backend, frames)).values())
    if not drivers:
        raise DheadsError(
            f"no clip of the train split shows a face in {frames} frames in a row; give others by --clips"
        )
    order = np.random.default_rng(seed).permutation(len(drivers))
    for photo, still in tqdm(stills.items(), desc="animate", unit="photo"):
        index = todo[photo]
        driver = drivers[order[index % len(drivers)]]
        begin = np.random.default_rng([seed, index]).choice(driver.begins)
        pictures = animate(still, driver, slice(begin, begin + frames))
        samples = driver.waveform[begin * SAMPLES_PER_FRAME :][: frames * SAMPLES_PER_FRAME]
        write_video(target(out, photo), pictures, wav_file(samples))


def usable(name: str, paths: Iterable[Path], look: Callable[[Path], T]) -> dict[Path, T]:
    """The result of `look` for each file; those that raise DheadsError are skipped with a warning."""
    seen = {}
    for path in tqdm(paths, desc=name, unit="file"):
        try:
            seen[path] = look(path)
        except DheadsError as error:
            tqdm.write(f"skipped: {error}")
    return seen


# --- Analysis of clips and photos


@dataclass(frozen=True)
class Driver:
    """The motion of a clip of F frames, in aligned crops of side FACE_PX."""

    waveform: torch.Tensor  # (N,) 16 kHz
    begins: np.ndarray  # (B,) int, first frames of the stretches that can be used
    matrices: np.ndarray  # (F, 2, 3) from frame to crop
    landmarks: np.ndarray  # (F, 68, 2) px of the crop
    eyes: np.ndarray  # (F,) eye code: 0 as usual, -1 shut
    mouths: np.ndarray  # (F, h, w, 3) uint8, the part of the crop around the mouth
    corner: np.ndarray  # (2,) px, the upper left corner of that part in the crop
    skin: np.ndarray  # (3,) mean colour around the mouth


@dataclass(frozen=True)
class Still:
    """A photo and the landmarks of its face."""

    image: np.ndarray  # (H, W, 3) uint8, both even
    landmarks: np.ndarray  # (68, 2) px
    matrix: np.ndarray  # (2, 3) from photo to crop
    skin: np.ndarray  # (3,) mean colour around the mouth


def watch(path: Path, backend: LandmarkBackend, count: int) -> Driver:
    """Analyse a clip. Raises DheadsError without sound, or without a face from the front in `count` frames in a row."""
    frames = list(read_frames(path))
    found = backend.track(frames)
    matrices = align_transforms(found, ALIGNMENT, FACE_PX)
    landmarks = np.stack([apply_transform(*pair) for pair in zip(matrices, found, strict=True)])
    begins = frontal_stretches(landmarks, count)
    if not len(begins):
        raise DheadsError(f"{path}: no {count} frames in a row show a face from the front")
    seen = np.isfinite(landmarks).all(axis=(1, 2))
    mouth = np.median(landmarks[seen][:, MOUTH], axis=0)
    centre, half = mouth.mean(axis=0), 0.9 * np.ptp(mouth[:, 0])
    corner = np.maximum(np.floor(centre - half), 0).astype(int)
    part = slice(corner[1], int(centre[1] + half)), slice(corner[0], int(centre[0] + half))
    crops = [warp(frame, m, FACE_PX) if ok else None for frame, m, ok in zip(frames, matrices, seen, strict=True)]
    blank = np.zeros((FACE_PX, FACE_PX, 3), np.uint8)
    openness = eye_openness(frames, found)
    first = begins[0]
    return Driver(
        waveform=load_waveform(path),
        begins=begins,
        matrices=matrices,
        landmarks=landmarks,
        eyes=np.nan_to_num(openness / np.nanmedian(openness) - 1),
        mouths=np.stack([(blank if crop is None else crop)[part] for crop in crops]),
        corner=corner,
        skin=skin_colour(crops[first], landmarks[first]),
    )


def frontal_stretches(landmarks: np.ndarray, count: int) -> np.ndarray:
    """First frames of stretches of `count` frames that show a face from the front; the better half of them.

    landmarks (F, 68, 2), NaN without a face.
    """
    if len(landmarks) < count:
        return np.empty(0, int)
    worst = np.lib.stride_tricks.sliding_window_view(turned(landmarks), count).max(axis=1)  # NaN without a face
    good = np.flatnonzero(worst < TURNED)
    return good[np.argsort(worst[good], kind="stable")][: (len(good) + 1) // 2]


def turned(landmarks: np.ndarray) -> np.ndarray:
    """How far faces (..., 68, 2) are turned to the side: 0 from the front, 1 with the nose at the face's edge."""
    across = landmarks[..., 16, :] - landmarks[..., 0, :]
    nose = landmarks[..., 30, :] - (landmarks[..., 16, :] + landmarks[..., 0, :]) / 2
    return np.abs(2 * (nose * across).sum(axis=-1) / (across**2).sum(axis=-1))


def find_still(path: Path, backend: LandmarkBackend) -> Still:
    """Find the face in a photo. Raises DheadsError where there is none from the front."""
    image = load_photo(path)
    height, width = image.shape[:2]
    image = np.ascontiguousarray(image[: height - height % 2, : width - width % 2])
    face, _ = find_face(image, backend, str(path))
    if turned(face.landmarks) > TURNED:
        raise DheadsError(f"{path}: the face is seen from the side")
    (matrix,) = align_transforms(face.landmarks[None], ALIGNMENT, FACE_PX)
    return Still(image, face.landmarks.astype(np.float64), matrix, skin_colour(image, face.landmarks))


def skin_colour(image: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """The mean colour (3,) between nose and jaw, without the mouth."""
    mask = np.zeros(image.shape[:2], np.uint8)
    cv2.fillPoly(mask, [np.rint(landmarks[SKIN]).astype(np.int32)], 255)
    cv2.fillConvexPoly(mask, cv2.convexHull(np.rint(landmarks[MOUTH]).astype(np.int32)), 0)
    return np.array(cv2.mean(image, mask)[:3])


def recoloured(mouths: np.ndarray, skin: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Mouths (N, h, w, 3) of a face with skin colour `skin` (3,), adapted to a face with `other` (3,); float32."""
    # Teeth differ less than skin, and never become brighter; in grey photos they are grey.
    light = min((other.mean() / skin.mean()) ** 0.8, 1.0)
    tint = (other / other.mean() / (skin / skin.mean())) ** 0.3
    colour = min(1, (np.ptp(other) / other.mean()) / max(np.ptp(skin) / skin.mean(), 1e-6))
    grey = mouths.mean(axis=-1, keepdims=True, dtype=np.float32)
    return ((grey + colour * (mouths - grey)) * (light * tint)).astype(np.float32)


# --- Motion of the landmarks


def animate(still: Still, driver: Driver, stretch: slice) -> Iterator[np.ndarray]:
    """Yield the frames (H, W, 3) uint8 of a photo that moves as the driver does in that stretch."""
    landmarks = steady(driver.landmarks[stretch])
    back, rest = invert_transform(still.matrix), apply_transform(still.matrix, still.landmarks)
    goals = apply_transform(back, moved_landmarks(rest, landmarks, driver.eyes[stretch]))  # (N, 68, 2) px of the photo
    mesh = Mesh(still)
    sways = sway(driver.matrices[stretch], rest)
    lips = landmarks - driver.corner
    mouths = recoloured(driver.mouths[stretch], driver.skin, still.skin)
    for goal, moved, seen, mouth in zip(goals, sways, lips, mouths, strict=True):
        whole = _chain(back, moved, still.matrix)
        frame = mesh.render(goal, whole)
        yield with_mouth(frame, apply_transform(whole, goal), mouth, seen)


def steady(landmarks: np.ndarray) -> np.ndarray:
    """Landmarks (N, 68, 2) smoothed over time, those of the lips less."""
    smoothed = gaussian_filter1d(landmarks, SMOOTH, axis=0, mode="nearest")
    smoothed[:, MOUTH] = gaussian_filter1d(landmarks[:, MOUTH], SMOOTH_LIPS, axis=0, mode="nearest")
    return smoothed


def moved_landmarks(rest: np.ndarray, landmarks: np.ndarray, eyes: np.ndarray) -> np.ndarray:
    """The photo's landmarks (N, 68, 2) px of the crop while its face moves as the driver's does.

    rest (68, 2): the photo's own landmarks; landmarks (N, 68, 2) and eyes (N,), eye code: the driver's.
    """
    # An affine map for each frame removes the turning and nodding of the head, which is no motion of the face.
    posed = np.stack([_affine(row, rest, STABLE) for row in landmarks])
    usual = np.median(posed, axis=0)
    goals = np.repeat(rest[None], len(landmarks), axis=0)
    limit = RAISE * eye_distance(rest)
    goals[:, BROWS, 1] += np.clip((posed - usual)[:, BROWS, 1], -limit, limit)
    goals[:, MOUTH] = _mouths(rest, posed)
    goals[:, CHIN, 1] += CHIN_SHARE * (goals[:, 57, 1] - rest[57, 1])[:, None]
    opening = np.clip(1 - gaussian_filter1d(eyes, SMOOTH_LIPS, mode="nearest") / SHUT, 0.08, 1.2)
    for upper, lower in LIDS:
        goals[:, lower] = rest[lower] + 0.15 * (1 - opening[:, None]) * (rest[upper] - rest[lower])
        goals[:, upper] = goals[:, lower] + opening[:, None] * (rest[upper] - rest[lower])
    return pressed(goals)


def _mouths(rest: np.ndarray, posed: np.ndarray) -> np.ndarray:
    """The photo's mouth (N, 20, 2), from its landmarks (68, 2) at rest and the driver's posed landmarks (N, 68, 2)."""
    # Slow drift of the mouth comes from turning of the head.
    theirs = posed[:, MOUTH] - gaussian_filter1d(posed[:, MOUTH].mean(axis=1, keepdims=True), DRIFT, axis=0)
    # Motion is relative to closed lips, so that the photo's lips keep their own shape.
    quiet = np.argsort(mouth_opening(posed), kind="stable")[: max(1, len(posed) // 5)]
    ratio = np.sqrt(np.clip(mouth_width(rest) / np.median(mouth_width(posed)), 0.7, 1.4))
    motion = theirs - _closed(theirs[quiet].mean(axis=0))
    return _closed(rest[MOUTH]) + ratio * _even(motion)


def _closed(mouth: np.ndarray) -> np.ndarray:
    """A mouth (20, 2) of an upright face with its lips closed: the lower lip moves further than the upper."""
    mouth = mouth.copy()
    gap = np.maximum(mouth[[19, 18, 17], 1] - mouth[[13, 14, 15], 1], 0)
    for upper, lower in (([13, 14, 15], [19, 18, 17]), ([2, 3, 4], [10, 9, 8])):
        mouth[upper, 1] += UPPER_SHARE * gap
        mouth[lower, 1] -= (1 - UPPER_SHARE) * gap
    return mouth


def _even(mouth: np.ndarray) -> np.ndarray:
    """The motion (..., 20, 2) of a mouth made symmetric, which it is not in a face that is turned."""
    return (mouth + mouth[..., MIRROR, :] * (-1, 1)) / 2


def pressed(goals: np.ndarray) -> np.ndarray:
    """Landmarks (N, 68, 2) of upright faces with inner lips that touch where their opening is that of closed lips."""
    least = CLOSED * eye_distance(goals)
    for upper, lower in ((61, 67), (62, 66), (63, 65)):
        gap = goals[:, lower, 1] - goals[:, upper, 1]
        close = (gap - np.maximum(gap - least, 0)) / 2
        goals[:, upper, 1] += close
        goals[:, lower, 1] -= close
    return goals


def sway(matrices: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """The damped head motion as matrices (N, 2, 3) in the crop.

    matrices (N, 2, 3): the driver's, from frame to crop; rest (68, 2): the photo's landmarks.
    """
    usual = matrices[len(matrices) // 2]
    centre, limit = rest[STABLE].mean(axis=0), REACH * eye_distance(rest)
    moves = []
    for matrix in matrices:
        motion = _chain(usual, invert_transform(matrix))
        turn = complex(*motion[:, 0]) ** SWAY  # damps the angle and the logarithm of the scale
        shift = SWAY * (apply_transform(motion, centre) - centre)
        shift *= np.tanh((far := np.linalg.norm(shift) + 1e-9) / limit) * limit / far
        linear = np.array([[turn.real, -turn.imag], [turn.imag, turn.real]])
        moves.append(np.column_stack([linear, centre + shift - linear @ centre]))
    return np.stack(moves)


def _affine(points: np.ndarray, goal: np.ndarray, which: np.ndarray) -> np.ndarray:
    """Points (P, 2) transformed by the affine map that brings those in `which` closest to the goal's (P, 2)."""
    ones = np.ones((len(points), 1))
    return np.hstack([points, ones]) @ np.linalg.lstsq(np.hstack([points, ones])[which], goal[which])[0]


def _chain(*matrices: np.ndarray) -> np.ndarray:
    """The product of (2, 3) matrices; the last is applied first."""
    result = np.eye(3)
    for matrix in matrices:
        result = result @ np.vstack([matrix, (0, 0, 1)])
    return result[:2]


# --- Rendering


class Mesh:
    """A photo as a mesh of fine triangles; the lips are strips between their four lines, and lie on top."""

    def __init__(self, still: Still) -> None:
        self._image = still.image
        lips = lip_vertices(still.landmarks)  # (4, L, 2)
        self._lids = np.concatenate(EYES)
        lids = still.landmarks[self._lids]
        self._grid = _grid(still, np.concatenate([lips[0], lips[3], lids]))
        self._controls = np.arange(60)  # all but the inner lips, which open
        held = _held(still)
        controls = np.concatenate([still.landmarks[self._controls], held])
        # The spline is linear in the positions of its controls, so that one matrix serves all frames.
        self._spline = RBFInterpolator(controls, np.eye(len(controls)), kernel="thin_plate_spline")(self._grid)
        self._spline = self._spline[:, : len(self._controls)]
        self._rest = still.landmarks
        # Where the photo shows teeth, the inner lines may lie on them, so they are moved into the lips.
        lean = 0.35 * np.clip(mouth_opening(still.landmarks) / 0.06, 0, 1)
        source = lips.copy()
        source[1:3] += lean * (lips[[0, 3]] - lips[1:3])
        self._source = np.concatenate([source.reshape(-1, 2), lids, self._grid])
        skin = _triangulated(np.concatenate([lips.reshape(-1, 2), lids, self._grid]))
        self._triangles = np.concatenate([skin, _strip(1, 2), _strip(0, 1), _strip(2, 3)])

    def render(self, goal: np.ndarray, whole: np.ndarray) -> np.ndarray:
        """The picture (H, W, 3) uint8 with its landmarks at `goal` (68, 2) px, then moved as a whole by (2, 3)."""
        shift = self._spline @ (goal - self._rest)[self._controls]
        vertices = np.concatenate([lip_vertices(goal).reshape(-1, 2), goal[self._lids], self._grid + shift])
        moved = apply_transform(whole, vertices)
        coordinates = source_coordinates(self._source, moved, self._triangles, self._image.shape)
        return cv2.remap(self._image, coordinates, None, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT_101)


def lip_vertices(landmarks: np.ndarray) -> np.ndarray:
    """The lips' lines (4, L, 2) as smooth curves from corner to corner."""
    curves = np.stack([_curve(len(line)) @ landmarks[line] for line in LIP_LINES])
    curves[2][:, 1] = np.maximum(curves[2][:, 1], curves[1][:, 1])
    return curves


@cache
def _curve(count: int) -> np.ndarray:
    """The matrix (L, P) from `count` = P points to L vertices on the cubic spline through them."""
    return CubicSpline(np.linspace(0, 1, count), np.eye(count))(np.linspace(0, 1, LIP_STEPS))


def _grid(still: Still, others: np.ndarray) -> np.ndarray:
    """A grid of points (G, 2) on the picture and beyond, without those in eyes, mouth or next to `others` (V, 2)."""
    height, width = still.image.shape[:2]
    step = eye_distance(still.landmarks) / 6
    beyond = 4 * step + 0.1 * max(height, width)  # as the whole picture moves too
    x, y = np.meshgrid(np.arange(-beyond, width + beyond, step), np.arange(-beyond, height + beyond, step))
    grid = np.stack([x, y], axis=-1).reshape(-1, 2)
    far = np.linalg.norm(grid[:, None] - others, axis=-1).min(axis=1) > 0.5 * step
    return grid[far & ~np.any([_within(grid, still.landmarks[part]) for part in (MOUTH[:12], *EYES)], axis=0)]


def _held(still: Still) -> np.ndarray:
    """Points (A, 2) around the face and along the picture's edge, which do not move with the face."""
    height, width = still.image.shape[:2]
    x, y = np.linspace(0, width, 6), np.linspace(0, height, 6)
    edge = [(a, b) for a in x for b in y if a in (0, width) or b in (0, height)]
    centre, reach = still.landmarks[:48].mean(axis=0), 2.6 * eye_distance(still.landmarks)
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    around = centre + reach * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    return np.concatenate([np.array(edge), around])


def _within(points: np.ndarray, polygon: np.ndarray) -> np.ndarray:
    """Whether each of the points (P, 2) lies in a polygon (V, 2): (P,) bool."""
    outline = polygon.astype(np.float32)
    return np.array([cv2.pointPolygonTest(outline, (x, y), False) > 0 for x, y in points.tolist()], bool)


def _triangulated(vertices: np.ndarray) -> np.ndarray:
    """Triangles (T, 3) between the vertices (V, 2) without those of the inner lips; they cover the mouth as well."""
    # The outer lines share their end points, of which one is used.
    skipped = np.arange(LIP_STEPS, 3 * LIP_STEPS + 1), 4 * LIP_STEPS - 1
    kept = np.setdiff1d(np.arange(len(vertices)), np.hstack(skipped))
    return kept[Delaunay(vertices[kept]).simplices]


def _strip(a: int, b: int) -> np.ndarray:
    """Triangles (T, 3) between the lips' lines a and b."""
    pairs = pairwise(range(LIP_STEPS))
    a, b = a * LIP_STEPS, b * LIP_STEPS
    return np.array([t for i, j in pairs for t in ((a + i, a + j, b + i), (a + j, b + j, b + i))])


def source_coordinates(
    source: np.ndarray, goal: np.ndarray, triangles: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
    """The coordinates in the source of each pixel of a picture of `shape`: (H, W, 2) float32, NaN outside triangles.

    source, goal (V, 2) px: vertices in the source and in the picture; triangles (T, 3) of them, the last on top.
    """
    # OpenCV also fills pixels that an edge only touches; at a higher resolution it exceeds the edge by less.
    label = np.full((FINER * shape[0], FINER * shape[1]), -1, np.int32)
    corners = goal[triangles]  # (T, 3, 2)
    for index, corner in enumerate(np.rint(corners * (16 * FINER)).astype(np.int32)):
        cv2.fillConvexPoly(label, corner, index, shift=4)
    label = np.ascontiguousarray(label[::FINER, ::FINER])
    origin, first, second = corners[:, 0], corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    area = first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]
    area = np.where(np.abs(area) < 1e-6, 1e-6, area)
    # Barycentric coordinates: b = (p - origin) x second / area, c = first x (p - origin) / area
    u = np.stack([second[:, 1], -second[:, 0]], axis=-1) / area[:, None]
    v = np.stack([-first[:, 1], first[:, 0]], axis=-1) / area[:, None]
    y, x = np.indices(label.shape)
    x, y = x - origin[label, 0], y - origin[label, 1]
    # Clamped, as pixels next to a thin triangle may lie far outside it.
    b = np.clip(u[label, 0] * x + u[label, 1] * y, 0, 1)
    c = np.clip(v[label, 0] * x + v[label, 1] * y, 0, 1)
    over = np.maximum(b + c, 1)
    b, c = (b / over)[..., None], (c / over)[..., None]
    p, q, r = np.moveaxis(source[triangles], 1, 0)  # (T, 2) each
    coordinates = p[label] + b * (q - p)[label] + c * (r - p)[label]
    coordinates[label < 0] = np.nan
    return coordinates.astype(np.float32)


def with_mouth(frame: np.ndarray, goal: np.ndarray, mouth: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Paste the inside of the driver's mouth (h, w, 3) between the open lips of a frame (H, W, 3) uint8, in place.

    goal, seen: landmarks (68, 2) px in the frame and in the picture of the mouth. Returns the frame.
    """
    lines, theirs = lip_vertices(goal), lip_vertices(seen)
    gap = (lines[2] - lines[1])[:, 1].max()
    if gap < 0.5:
        return frame
    low = np.maximum(np.floor(lines.min(axis=(0, 1))).astype(int) - MARGIN, 0)
    high = np.ceil(lines.max(axis=(0, 1))).astype(int) + MARGIN
    part = frame[low[1] : high[1], low[0] : high[0]]
    lines -= low
    alpha = np.zeros(part.shape[:2], np.uint8)
    inner = np.rint(np.concatenate([lines[1], lines[2][::-1]]) * 16).astype(np.int32)
    cv2.fillPoly(alpha, [inner], 255, cv2.LINE_AA, shift=4)
    soft = cv2.GaussianBlur(alpha, (0, 0), eye_distance(goal) / 70)
    # Somewhat wider than the opening, so that the soft edge shows the mouth too.
    for line in (lines, theirs):
        line[1:3] += 0.25 * (line[[0, 3]] - line[1:3])
    coordinates = source_coordinates(theirs.reshape(-1, 2), lines.reshape(-1, 2), _strip(1, 2), part.shape)
    known = np.isfinite(coordinates[..., 0])
    pasted = cv2.remap(mouth, np.nan_to_num(coordinates), None, cv2.INTER_CUBIC)
    weight = (soft / 255 * known)[..., None]
    part[:] = np.clip(np.rint(part + weight * (pasted - part)), 0, 255)
    return frame


if __name__ == "__main__":
    typer.run(main)
