"""`dheads sample`: one video, or a list of them."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, cast

import typer

from dheads.cli.help import INPUT, LOOK, MANY, MOTION, OUTPUT, SPEED
from dheads.cli.licences import ask_consent
from dheads.cli.options import (
    AcceptLicense,
    Device,
    Json,
    Quiet,
    Solver,
    Steps,
    finite,
    parse_shard,
    weights_names,
)
from dheads.cli.printing import configure_log, message, print_json, print_result
from dheads.cli.streams import STANDARD, VideoStdout, check_not_terminal, standard
from dheads.config import AudioCodec
from dheads.errors import DheadsError
from dheads.sampling.jobs import (
    MAX_AT_SECONDS,
    MAX_GUIDANCE,
    MAX_MOTION,
    MAX_SEED,
    MAX_SQUARE,
    SIZES,
    Job,
    check_distinct,
    jobs_of_sounds,
    read_jobs,
    takes_of,
)

if TYPE_CHECKING:
    from dheads.sampling.lists import Outcome

EXAMPLES = """\
dheads sample face.jpg speech.wav -o out.mp4
dheads sample face.jpg a.wav b.mp3 --out-dir videos --size 512"""


def sample(
    face: Annotated[
        Path | None,
        typer.Argument(
            metavar="FACE",
            help="Photo or video of the person.",
            show_default=False,
            rich_help_panel=INPUT,
        ),
    ] = None,
    sounds: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="AUDIO",
            help="Recording of speech, or a video with sound; - reads stdin.",
            show_default=False,
            rich_help_panel=INPUT,
        ),
    ] = None,
    at: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=MAX_AT_SECONDS,
            metavar="SECONDS",
            help="Time of the frame to use, if FACE is a video.",
            show_default="the first frame with a face",
            rich_help_panel=INPUT,
        ),
    ] = None,
    which: Annotated[
        int | None,
        typer.Option(
            "--face",
            min=1,
            metavar="N",
            help="Face to use if FACE shows several. 1 is the largest.",
            show_default="1",
            rich_help_panel=INPUT,
        ),
    ] = None,
    weights: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE",
            help="Weights to generate with: small, crema or a checkpoint.",
            autocompletion=weights_names,
            rich_help_panel=INPUT,
        ),
    ] = "small",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Video to write: .mp4, .m4v or .mov; - writes to stdout.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    audio_codec: Annotated[
        AudioCodec,
        typer.Option(
            "--audio",
            help="Sound of the video: aac plays everywhere, copy keeps any codec that MP4 holds.",
            rich_help_panel=OUTPUT,
        ),
    ] = "aac",
    size: Annotated[
        int | None,
        typer.Option(
            min=SIZES[0],
            max=SIZES[1],
            metavar="PX",
            help="Side of the square video, or with --paste the longest side.",
            show_default="that of the face in FACE, 256 to 512; with --paste of FACE, up to 3840",
            rich_help_panel=LOOK,
        ),
    ] = None,
    paste: Annotated[
        bool, typer.Option("--paste", help="Show the whole picture of FACE.", rich_help_panel=LOOK)
    ] = False,
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            max=MAX_SEED,
            metavar="N",
            help="Random seed. The same seed on the same device gives the same video.",
            rich_help_panel=LOOK,
        ),
    ] = 0,
    still: Annotated[
        bool, typer.Option("--still", help="Move only lips and eyes, not the head.", rich_help_panel=MOTION)
    ] = False,
    motion: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=MAX_MOTION,
            metavar="X",
            help="How far the head moves: 1 as far as people do when they speak, 0 not at all.",
            show_default="1",
            rich_help_panel=MOTION,
        ),
    ] = None,
    motion_from: Annotated[
        Path | None,
        typer.Option(
            metavar="VIDEO",
            help="Video whose head motion and blinks to repeat.",
            show_default="by chance",
            rich_help_panel=MOTION,
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=MAX_GUIDANCE,
            metavar="X",
            help="How strongly the lips follow the sound: above 1 they move more, in twice the time.",
            show_default="as the weights recommend",
            rich_help_panel=MOTION,
        ),
    ] = None,
    device: Device = "auto",
    steps: Steps = None,
    solver: Solver = None,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Compile the network first. Takes a minute and pays from five minutes of video on.",
            rich_help_panel=SPEED,
        ),
    ] = False,
    out_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder for one video per AUDIO, named after it.",
            show_default=False,
            rich_help_panel=MANY,
        ),
    ] = None,
    jobs: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="CSV file with one video per row: columns face, audio, output, and any of seed, size, steps, solver, "
            "weights, guidance, at, which, paste, still, motion, motion_from, audio_codec; - reads stdin.",
            show_default=False,
            rich_help_panel=MANY,
        ),
    ] = None,
    takes: Annotated[
        int,
        typer.Option(
            min=1,
            max=1000,
            metavar="N",
            help="Videos of each AUDIO: NAME-1.mp4 with the seed, NAME-2.mp4 with the next one ...",
            rich_help_panel=MANY,
        ),
    ] = 1,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace videos that are there already.", rich_help_panel=MANY),
    ] = False,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Make only the I-th of N parts, to share the work among N machines.",
            show_default="all; under torchrun the process's own part",
            rich_help_panel=MANY,
        ),
    ] = None,
    accept_license: AcceptLicense = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Make videos of the person in FACE speaking AUDIO."""
    configure_log(quiet, as_json)
    inputs = _Inputs(face, sounds or [], standard(output), out_dir, jobs, takes)
    inputs.check()
    if inputs.output == STANDARD and as_json:
        raise typer.BadParameter("cannot be used with -o -: stdout carries the video", param_hint="--json")
    if shard is not None and output is not None:
        raise typer.BadParameter("applies to --out-dir and --jobs only", param_hint="--shard")
    if not paste and size is not None and size > MAX_SQUARE:
        raise typer.BadParameter(f"must be at most {MAX_SQUARE} without --paste", param_hint="--size")
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
