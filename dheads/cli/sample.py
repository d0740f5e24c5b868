"""`dheads sample`: one video, or a list of them."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, cast

import typer

from dheads.cli.licences import ask_consent
from dheads.cli.options import (
    AcceptLicense,
    Device,
    Json,
    Quiet,
    Seed,
    ShardOption,
    Solver,
    Steps,
    finite,
    parse_shard,
)
from dheads.cli.printing import message, print_json, print_result
from dheads.cli.streams import STANDARD, VideoStdout, check_not_terminal, standard
from dheads.config import AudioCodec
from dheads.errors import DheadsError
from dheads.sampling.jobs import (
    MAX_AT_SECONDS,
    MAX_GUIDANCE,
    MAX_MOTION,
    SIZES,
    Job,
    check_distinct,
    jobs_of_sounds,
    read_jobs,
    takes_of,
)

if TYPE_CHECKING:
    from dheads.sampling.lists import Outcome


def sample(
    face: Annotated[
        Path | None,
        typer.Argument(metavar="FACE", help="Photo or video that shows the face.", show_default=False),
    ] = None,
    sounds: Annotated[
        list[Path] | None,
        typer.Argument(metavar="AUDIO", help="Sound or video file with the speech; - reads stdin.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Video to write: .mp4, .m4v or .mov; - writes to stdout.", show_default=False
        ),
    ] = None,
    out_dir: Annotated[
        Path | None,
        typer.Option(help="Folder to write one video per AUDIO to, named after it.", show_default=False),
    ] = None,
    jobs: Annotated[
        Path | None,
        typer.Option(
            help="CSV file with one video per row: columns face, audio, output, and any of seed, size, steps, solver, "
            "weights, guidance, at, which, paste, still, motion, motion_from, audio_codec; - reads stdin.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace videos that --out-dir or --jobs would otherwise keep."),
    ] = False,
    shard: ShardOption = None,
    at: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=MAX_AT_SECONDS,
            help="Time in seconds of the frame to use, where FACE is a video.",
            show_default="its first frame with a face",
        ),
    ] = None,
    which: Annotated[
        int | None,
        typer.Option(
            "--face", min=1, help="Which of several faces to use, counted from the largest.", show_default="1"
        ),
    ] = None,
    weights: Annotated[
        str, typer.Option(help="Weights to generate with: a name in weights.toml, or the path of a checkpoint.")
    ] = "small",
    steps: Steps = None,
    solver: Solver = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=MAX_GUIDANCE,
            help="Scale of classifier-free guidance by the sound; above 1 the lips move more, in twice the time; 1: "
            "off.",
            show_default="the weights' recommendation",
        ),
    ] = None,
    seed: Seed = 0,
    takes: Annotated[
        int,
        typer.Option(
            min=1, max=1000, help="Number of videos of each AUDIO: NAME-1.mp4 with SEED, NAME-2.mp4 with SEED + 1 ..."
        ),
    ] = 1,
    device: Device = "auto",
    size: Annotated[
        int | None,
        typer.Option(
            min=SIZES[0],
            max=SIZES[1],
            help="Side of the video in px. Frames larger than the network's take the photo's detail from FACE.",
            show_default="that of the face in FACE, 256 to 512",
        ),
    ] = None,
    paste: Annotated[
        bool, typer.Option("--paste", help="Paste the face back into the whole picture of FACE, at its size.")
    ] = False,
    still: Annotated[
        bool, typer.Option("--still", help="Keep the head where it is in the photo; only lips and eyes move.")
    ] = False,
    motion: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=MAX_MOTION,
            help="How far the head moves: 1 as far as people do when they speak, 0 not at all.",
            show_default="1",
        ),
    ] = None,
    motion_from: Annotated[
        Path | None,
        typer.Option(
            metavar="VIDEO",
            help="Video of a face whose head motion and blinks are repeated, back and forth if AUDIO is longer.",
            show_default="by chance",
        ),
    ] = None,
    audio_codec: Annotated[
        AudioCodec,
        typer.Option("--audio", help="Sound of the video: aac plays everywhere; copy keeps any codec that MP4 holds."),
    ] = "aac",
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="Use torch.compile: a minute at the start, then faster; for hours of video."),
    ] = False,
    accept_license: AcceptLicense = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Generate a video of the person in FACE speaking AUDIO, or several videos."""
    inputs = _Inputs(face, sounds or [], standard(output), out_dir, jobs, takes)
    inputs.check()
    if inputs.output == STANDARD and as_json:
        raise typer.BadParameter("cannot be used with -o -: stdout carries the video", param_hint="--json")
    if shard is not None and output is not None:
        raise typer.BadParameter("applies to --out-dir and --jobs only", param_hint="--shard")
    if paste and size is not None:
        raise typer.BadParameter("cannot be used with --paste: frames are as large as the picture", param_hint="--size")
    if still and (motion is not None or motion_from is not None):
        raise typer.BadParameter(
            "cannot be used with --motion or --motion-from: a still head does not move", param_hint="--still"
        )
    check_not_terminal(inputs.output, inputs.sounds)
    part = parse_shard(shard)
    job = Job(
        face=face or Path(),
        audio=inputs.sounds[0] if inputs.sounds else Path(),
        output=inputs.output or Path(),
        seed=seed,
        size=size,
        steps=steps,
        solver=solver,
        weights=weights,
        guidance=finite(guidance, "--guidance"),
        at=finite(at, "--at"),
        which=which,
        paste=paste,
        still=still,
        motion=finite(motion, "--motion"),
        motion_from=motion_from,
        audio_codec=audio_codec,
    )
    from dheads.media.photos import silence_pillow

    silence_pillow()
    printing = _Printing(quiet, as_json)
    if inputs.many:
        todo = inputs.jobs(job)
        for name in dict.fromkeys(job.weights for job in todo):
            ask_consent(name, accept_license)
        # Videos named one by one are always replaced, as a single video is.
        _sample_many(todo, printing, device, compiled, overwrite or output is not None, part)
    else:
        ask_consent(weights, accept_license)
        _sample_one(job, printing, device, compiled)


@dataclass(frozen=True)
class _Printing:
    """What the command prints."""

    quiet: bool
    as_json: bool


@dataclass(frozen=True)
class _Inputs:
    """The files that the command line names; STANDARD: stdin or stdout."""

    face: Path | None
    sounds: list[Path]
    output: Path | None
    out_dir: Path | None
    table: Path | None
    takes: int

    @property
    def many(self) -> bool:
        """Whether there are several videos to generate, or a list of them."""
        return self.takes > 1 or self.output is None

    def check(self) -> None:
        """Raises typer.BadParameter for a combination that names no videos."""
        if self.table is not None and (self.face or self.sounds or self.output or self.out_dir):
            raise typer.BadParameter("replaces FACE, AUDIO, --output and --out-dir", param_hint="--jobs")
        if self.table is None and (
            self.face is None or not self.sounds or (self.output is None) == (self.out_dir is None)
        ):
            raise typer.BadParameter("give FACE AUDIO --output FILE, or FACE AUDIO... --out-dir FOLDER, or --jobs FILE")
        if self.output is not None and len(self.sounds) > 1:
            raise typer.BadParameter("takes one AUDIO; for more give --out-dir", param_hint="--output")
        if self.many and self.sounds and STANDARD in (self.output, *self.sounds):
            raise typer.BadParameter("- is a single stream; give files for several videos")

    def jobs(self, defaults: Job) -> list[Job]:
        """The jobs of the table, of the sounds, or the one of `defaults`; each as often as there are takes."""
        if self.table is not None:
            jobs = read_jobs(sys.stdin.buffer if self.table == STANDARD else self.table, defaults)
        elif self.out_dir is not None:
            jobs = jobs_of_sounds(defaults, self.sounds, self.out_dir)
            _make_folder(self.out_dir)
        else:
            jobs = [defaults]
        if self.takes > 1:
            jobs = takes_of(jobs, self.takes)
        check_distinct(jobs)
        return jobs


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DheadsError(f"cannot create the folder {folder}: {error.strerror}; choose another") from error


def _sample_one(job: Job, printing: _Printing, device: str, compiled: bool) -> None:
    from dheads.sampling.outputs import spooled
    from dheads.sampling.talker import sample_job

    to_stdout = job.output == STANDARD
    with contextlib.ExitStack() as stack:
        if to_stdout:
            # Of a stream, the muxer calls write() alone.
            job = dataclasses.replace(job, output=cast(BinaryIO, VideoStdout()))
        if job.audio == STANDARD:
            job = dataclasses.replace(job, audio=stack.enter_context(spooled(sys.stdin.buffer)))
        result = sample_job(job, device=device, compiled=compiled, progress=not printing.quiet)
    if not printing.quiet:
        for note in result.notes:
            message(note)
    if not to_stdout:
        print_result(result, printing.as_json)


def _sample_many(
    jobs: list[Job], printing: _Printing, device: str, compiled: bool, overwrite: bool, shard: tuple[int, int] | None
) -> None:
    """Generate the videos and print a line for each; exit code 1 if any failed."""
    from tqdm import tqdm

    from dheads.sampling.lists import sample_all
    from dheads.system.distributed import world

    made = kept = failed = 0
    outcomes = sample_all(
        jobs, device=device, compiled=compiled, overwrite=overwrite, shard=shard, progress=not printing.quiet
    )
    with contextlib.closing(outcomes):
        for outcome in outcomes:
            kept += outcome.skipped
            failed += outcome.error is not None
            made += not outcome.skipped and outcome.error is None
            with tqdm.external_write_mode():
                _print_outcome(outcome, printing)
    if not printing.quiet:
        message(f"{made} made, {kept} were there already, {failed} failed")
    if failed and world().size == 1:  # torchrun would stop the other processes
        raise typer.Exit(1)


def _print_outcome(outcome: Outcome, printing: _Printing) -> None:
    if outcome.error is not None:
        message(f"failed {outcome.output}: {outcome.error}")
    elif not printing.quiet:
        for note in outcome.notes:
            message(f"{outcome.output}: {note}")
    if printing.as_json:
        print_json(dataclasses.asdict(outcome))
    elif outcome.error is None and not outcome.skipped:
        typer.echo(outcome.output)
