"""The command line: parses, calls one verb, prints, sets the exit code. The only file that prints.

Results go to stdout, progress and messages to stderr. Exit codes: 0 done, 1 the user can mend it, 2 usage,
130 interrupted, 143 terminated; anything else is a bug, with its traceback. The verbs are imported inside their
commands, so that `dheads --help` need not wait for torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import re
import signal
import stat
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from dheads import __version__
from dheads import config as configuration
from dheads.config import AudioCodec, Config
from dheads.errors import DheadsError
from dheads.sampling.jobs import LARGEST_SEED, LAST_SECOND, MOST_GUIDANCE, SIZES
from dheads.system.files import Stream
from dheads.system.signals import ended_cleanly, undo_all
from dheads.system.startup import check_folder, lacking, open_streams


def _printable(text: str) -> str:
    """Names of files may hold line breaks, and codes that paint the terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class _Messages(logging.Handler):
    """Messages of the modules below, on stderr, beside the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        tqdm.write(_printable(f"{prefix}{record.getMessage()}"), file=sys.stderr)


class _Group(TyperGroup):
    """The whole program."""

    def main(self, *args: Any, **options: Any) -> Any:
        open_streams()
        try:
            check_folder()
            with ended_cleanly():
                return super().main(*args, **options)
        except DheadsError as error:
            reason = str(error)
        except (ImportError, OSError, MemoryError, RuntimeError) as error:
            if (reason := lacking(error)) is None:
                raise
        typer.echo(f"error: {_printable(reason)}", err=True)
        sys.exit(1)


# Plain help and tracebacks: rich would double the time to start.
app = typer.Typer(
    cls=_Group,
    help="A photo and a voice recording in, a video of that person saying it out.",
    epilog="Videos carry a note that they are AI-generated. Show only people who agreed to it.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

_STREAM = Path("-")  # stdin or stdout
_LISTED = 10  # clips left out that are named one by one

Device = Annotated[Literal["auto", "cpu", "cuda", "mps"], typer.Option(help="Where to compute.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps a frame.", show_default="the weights' own")]
Solver = Annotated[
    Literal["ddpm", "ddim", "dpm++2m"] | None, typer.Option(help="How to denoise.", show_default="the weights' own")
]
Seed = Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="The same seed gives the same video.")]
ConfigFile = Annotated[Path | None, typer.Option(help="TOML file laid over the preset.", show_default=False)]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Laid over both: training.steps=1000.", show_default=False),
]
Weights = typer.Option(help="Name in weights.toml, or path of a checkpoint.")
AcceptLicense = Annotated[
    bool, typer.Option("--accept-license", help="Accept the licence of weights that ask for it; once is enough.")
]


def _be_quiet(wanted: bool) -> bool:
    messages = logging.getLogger("dheads")
    messages.handlers = [_Messages()]
    messages.setLevel(logging.CRITICAL if wanted else logging.INFO)
    return wanted


Quiet = Annotated[
    bool, typer.Option("--quiet", callback=_be_quiet, help="No progress, no messages; errors still show.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one line of JSON.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dheads {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def sample(
    face: Annotated[
        Path | None,
        typer.Argument(metavar="FACE", help="Photo of a face, or a video with one.", show_default=False),
    ] = None,
    sounds: Annotated[
        list[Path] | None,
        typer.Argument(metavar="AUDIO", help="Speech, or a video with it; -: from stdin.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Video to write, .mp4, .m4v or .mov; -: to stdout.", show_default=False),
    ] = None,
    out_dir: Annotated[
        Path | None, typer.Option(help="Folder for a video of each of many AUDIO.", show_default=False)
    ] = None,
    jobs: Annotated[
        Path | None,
        typer.Option(
            help="CSV with the columns face, audio, output, and any of seed, size, steps, solver, weights, guidance, "
            "at, which, paste, still, audio_codec; -: stdin.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Make again what --out-dir or --jobs would keep.")
    ] = False,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N", help="Only the I-th of N parts, for N machines.", show_default="all, or torchrun's"
        ),
    ] = None,
    at: Annotated[
        float | None,
        typer.Option(
            min=0, max=LAST_SECOND, help="Second of FACE, a video, to take.", show_default="its first frame with a face"
        ),
    ] = None,
    which: Annotated[
        int | None,
        typer.Option("--face", min=1, help="Which of several faces, from the largest.", show_default="the largest"),
    ] = None,
    weights: Annotated[str, Weights] = "small",
    steps: Steps = None,
    solver: Solver = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=MOST_GUIDANCE,
            help="Above 1: stronger lips, in twice the time; 1: none.",
            show_default="the weights' own",
        ),
    ] = None,
    seed: Seed = 0,
    takes: Annotated[
        int, typer.Option(min=1, max=1000, help="So many performances, NAME-1.mp4 and so on, from SEED on.")
    ] = 1,
    device: Device = "auto",
    size: Annotated[
        int | None,
        typer.Option(min=SIZES[0], max=SIZES[1], help="Side of the video in px.", show_default="the weights' own"),
    ] = None,
    paste: Annotated[bool, typer.Option("--paste", help="Put the face back into its whole picture.")] = False,
    still: Annotated[bool, typer.Option("--still", help="Keep the head in its place; lips and eyes move.")] = False,
    audio_codec: Annotated[
        AudioCodec, typer.Option("--audio", help="The video's sound: AAC, or a copy of what MP4 can hold.")
    ] = "aac",
    compiled: Annotated[
        bool, typer.Option("--compile", help="A minute of torch.compile first; for hours of video.")
    ] = False,
    accept_license: AcceptLicense = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Make a video of the person in FACE saying AUDIO, or many."""
    if jobs is not None and (face or sounds or output or out_dir):
        raise typer.BadParameter("takes the place of FACE, AUDIO, --output and --out-dir", param_hint="--jobs")
    if jobs is None and (face is None or not sounds or (output is None) == (out_dir is None)):
        raise typer.BadParameter("give FACE AUDIO --output FILE, or FACE AUDIO... --out-dir FOLDER, or --jobs FILE")
    if output is not None and len(sounds) > 1:
        raise typer.BadParameter("takes one AUDIO; for more give --out-dir", param_hint="--output")
    if output is not None and _is_stdout(output):
        output = _STREAM
    many = takes > 1 or output is None
    if many and sounds and _STREAM in (output, *sounds):
        raise typer.BadParameter("- stands for one stream; give files for several videos")
    if output == _STREAM and as_json:
        raise typer.BadParameter("stdout is the video's", param_hint="--json")
    if shard is not None and output is not None:
        raise typer.BadParameter("there is one job only", param_hint="--shard")
    if paste and size is not None:
        raise typer.BadParameter("the frames are as large as the picture", param_hint="--size")
    if output == _STREAM and (sys.stdout is None or sys.stdout.isatty()):
        what = "closed" if sys.stdout is None else "the terminal"
        raise DheadsError(f"the output is -, but stdout is {what}; pipe the video to a player or into a file")
    if sounds and _STREAM in sounds and sys.stdin.isatty():
        raise DheadsError("AUDIO is -, but stdin is the terminal; pipe sound into it")
    part = _parse_shard(shard)
    options = {
        "seed": seed,
        "size": size,
        "steps": steps,
        "solver": solver,
        "weights": weights,
        "guidance": _finite(guidance, "--guidance"),
        "at": _finite(at, "--at"),
        "which": which,
        "paste": paste,
        "still": still,
        "audio_codec": audio_codec,
    }
    running = {"device": device, "compiled": compiled, "progress": not quiet}
    from dheads.media.photos import hush_pillow

    hush_pillow()
    if many:
        from dheads.sampling.jobs import Job

        defaults = Job(face or Path(), sounds[0] if sounds else Path(), output or Path(), **options)
        todo = _jobs(defaults, sounds or [], out_dir, jobs, takes)
        for name in dict.fromkeys(job.weights for job in todo):
            _ask_consent(name, accept_license)
        # What is named one by one is made anew, as a single video is.
        _sample_many(todo, as_json, quiet, overwrite=overwrite or output is not None, shard=part, **running)
    else:
        _ask_consent(weights, accept_license)
        _sample_one(face, sounds[0], output, as_json, quiet, **options, **running)


@app.command()
def prepare(
    raw: Annotated[
        Path, typer.Argument(metavar="RAW", help="Folder of videos and photos of speaking people.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder of the dataset to write.", show_default=False)],
    preset: Annotated[str, typer.Option(help="Configuration to start from.")] = "small",
    config: ConfigFile = None,
    changes: Changes = None,
    layout: Annotated[
        Literal["crema", "lrw", "released", "folder"] | None,
        typer.Option(help="How RAW is laid out.", show_default="found by looking"),
    ] = None,
    splits: Annotated[
        Path | None, typer.Option(help="CSV with the columns clip, speaker and split.", show_default=False)
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N", help="Only the I-th of N parts, for N machines.", show_default="all, or torchrun's"
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Clips to work on at once; 0: as the machine allows.")] = 0,
    device: Device = "auto",
    accept_license: AcceptLicense = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Turn the videos in RAW into a dataset of aligned faces and speech embeddings."""
    part = _parse_shard(shard)
    chosen = configuration.override(configuration.preset(preset), *_read_changes(config, changes))
    from dheads.dataset import prepare as verb
    from dheads.system.devices import resolve_device

    _ask_consent(chosen.conditioning.speech_encoder, accept_license)
    summary = verb.prepare(
        raw,
        out,
        chosen,
        layout=layout,
        split_file=splits,
        shard=part,
        workers=workers,
        device=str(resolve_device(device)),
        progress=not quiet,
    )
    if not quiet:
        _print_summary(summary)
    _print_result(summary, as_json)


@app.command()
def train(
    data: Annotated[Path, typer.Option(help="Dataset made by `dheads prepare`.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the run; one that was interrupted goes on.", show_default="DATA's name and -run"),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Configuration to start from.", show_default="that of --init, else of the data")
    ] = None,
    config: ConfigFile = None,
    changes: Changes = None,
    init: Annotated[
        str | None, typer.Option(help="Weights to start from: name or path of a checkpoint.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what the run would cost.")] = False,
    device: Device = "auto",
    accept_license: AcceptLicense = False,
    quiet: Quiet = False,
) -> None:
    """Train a model; prints the path of its checkpoint. Under torchrun on several GPUs and machines."""
    if init is not None:
        _ask_consent(init, accept_license)
    from dheads.system.distributed import world

    main = world().is_main
    if not main:
        _be_quiet(True)
    laid_over = _read_changes(config, changes)
    chosen = configuration.override(_starting_point(preset, init, data), *laid_over)
    if main and dry_run:
        typer.echo(_costs(chosen, data, world().size))
    elif main and not quiet:
        typer.echo(f"{configuration.to_toml(chosen)}\n{_costs(chosen, data, world().size)}", err=True)
    if dry_run:
        return
    from dheads.system.devices import resolve_device
    from dheads.training import loop as verb

    run = out or Path(f"{data.resolve().name}-run")
    place = str(resolve_device(device))
    path = verb.train(chosen, data, run, device=place, init=init, progress=main and not quiet)
    if main:
        typer.echo(path)


@app.command("eval")
def evaluate(
    generated: Annotated[
        Path | None, typer.Argument(metavar="GENERATED", help="Video, or folder of them.", show_default=False)
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="The real ones, of the same names.", show_default=False)
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Instead of GENERATED: make the videos with these.", show_default=False)
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="With --weights: dataset made by `dheads prepare`.", show_default=False)
    ] = None,
    split: Annotated[str, typer.Option(help="Of the dataset: train, val or test.")] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many clips.", show_default="all")] = None,
    steps: Steps = None,
    solver: Solver = None,
    seed: Seed = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for report.html, report.json and clips.csv, and the videos.", show_default=False),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="Only this; may be given again. Fetches the weights it needs.", show_default="all at hand"),
    ] = None,
    table: Annotated[
        Literal["crema", "lrw"] | None, typer.Option(help="Put this table of the paper beside.", show_default=False)
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(min=16, help="Side in px at which GENERATED were made, if enlarged since.", show_default=False),
    ] = None,
    lip_reader: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND", help="Prints the words of a {video}; or python:MODULE:FUNCTION.", show_default=False
        ),
    ] = None,
    words: Annotated[
        Path | None, typer.Option(help="CSV of what is said: clip, words.", show_default="beside the real videos")
    ] = None,
    turing: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Also a Turing test of N made and N real videos in --out.", show_default=False
        ),
    ] = None,
    votes: Annotated[
        list[Path] | None,
        typer.Option(help="Only count this file of a Turing test; may be given again.", show_default=False),
    ] = None,
    key: Annotated[Path | None, typer.Option(help="With --votes: the test's key.", show_default=False)] = None,
    device: Device = "auto",
    accept_license: AcceptLicense = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure generated videos against the real ones: those of a folder, or those that --weights make."""
    if votes:
        _count_votes(votes, key, as_json)
        return
    told = {"only": metric, "table": table, "lip_reader": lip_reader, "words": words}
    told |= {"device": device, "progress": not quiet, "limit": limit}
    if turing and out is None:
        raise typer.BadParameter("needs --out", param_hint="--turing")
    if weights is None:
        if generated is None or reference is None:
            raise typer.BadParameter("give GENERATED and --reference, or --weights and --data")
        from dheads.evaluation import evaluate as verb

        report = verb.evaluate(generated, reference, out=out, size=size, **told)
    else:
        if generated is not None or data is None or out is None:
            raise typer.BadParameter("needs --data and --out, and no GENERATED", param_hint="--weights")
        from dheads.evaluation import evaluate as verb

        _ask_consent(weights, accept_license)
        making = {"steps": steps, "solver": solver, "seed": seed}
        report = verb.evaluate_weights(weights, data, split, out, **making, **told)
    if turing:
        _write_turing_test(report, turing, out / "turing", seed)
    _print_report(report, out, quiet, as_json)


def _print_report(report: Any, out: Path | None, quiet: bool, as_json: bool) -> None:
    from dheads.evaluation.report import as_dict, screen_table

    typer.echo(json.dumps(as_dict(report)) if as_json else screen_table(report))
    if quiet:
        return
    for reason in dict.fromkeys(report.unavailable.values()):
        names = ", ".join(name for name, other in report.unavailable.items() if other == reason)
        typer.echo(f"without {names}: {reason}", err=True)
    for warning in report.warnings:
        typer.echo(_printable(f"warning: {warning}"), err=True)
    _print_failed(report.failed)
    if out is not None:
        typer.echo(f"look at {out / 'report.html'}", err=True)


def _write_turing_test(report: Any, count: int, folder: Path, seed: int) -> None:
    from dheads.evaluation.turing import write_turing_test

    made = {clip.clip: clip.generated for clip in report.clips}
    key = write_turing_test(made, {clip.clip: clip.reference for clip in report.clips}, count, folder, seed)
    typer.echo(f"give people {folder}, and keep {key} to count their votes", err=True)


def _count_votes(votes: list[Path], key: Path | None, as_json: bool) -> None:
    """How often people took clips for real."""
    if key is None:
        raise typer.BadParameter("needs --key, the file that was written with the test", param_hint="--votes")
    from dheads.evaluation.turing import tally

    found = tally(votes, key)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(found)))
        return
    for kind, share in (("generated", found.generated), ("real", found.real)):
        interval = f"95 %: {share.low:.1%} to {share.high:.1%}"
        typer.echo(f"{kind}\t{share.share:.1%} judged real ({share.real} of {share.votes} votes; {interval})")
    typer.echo(f"{found.voters} voters", err=True)


def _sample_one(face: Path, sound: Path, output: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    with contextlib.ExitStack() as stack:
        from dheads.sampling import pipeline as verb

        target = _VideoStdout() if output == _STREAM else output

        audio = stack.enter_context(verb.spooled(sys.stdin.buffer)) if sound == _STREAM else sound
        result = verb.sample(face, audio, target, **options)
    if not quiet:
        for note in result.notes:
            typer.echo(_printable(note), err=True)
    if output != _STREAM:
        _print_result(result, as_json)


def _sample_many(jobs: list[Any], as_json: bool, quiet: bool, **options: Any) -> None:
    """Say what becomes of each job; exit code 1 if any failed."""
    from tqdm import tqdm

    from dheads.sampling import pipeline as verb
    from dheads.system.distributed import world

    made = kept = failed = 0
    with contextlib.closing(verb.sample_all(jobs, **options)) as outcomes:
        for outcome in outcomes:
            kept += outcome.skipped
            failed += outcome.error is not None
            made += not outcome.skipped and outcome.error is None
            with tqdm.external_write_mode():
                _print_outcome(outcome, as_json, quiet)
    if not quiet:
        typer.echo(f"{made} made, {kept} were there already, {failed} failed", err=True)
    if failed and world().size == 1:  # torchrun would end the other processes
        raise typer.Exit(1)


def _print_outcome(outcome: Any, as_json: bool, quiet: bool) -> None:
    if outcome.error is not None:
        typer.echo(_printable(f"failed {outcome.output}: {outcome.error}"), err=True)
    elif not quiet:
        for note in outcome.notes:
            typer.echo(_printable(f"{outcome.output}: {note}"), err=True)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(outcome), default=str))
    elif outcome.error is None and not outcome.skipped:
        typer.echo(outcome.output)


def _jobs(defaults: Any, sounds: list[Path], out_dir: Path | None, table: Path | None, takes: int) -> list[Any]:
    """The jobs of a table, of many sounds, or the one of `defaults`; each so many times."""
    from dheads.sampling.jobs import check_distinct, jobs_of_sounds, read_jobs, takes_of

    if table is not None:
        jobs = read_jobs(sys.stdin.buffer if table == _STREAM else table, defaults)
    elif out_dir is not None:
        jobs = jobs_of_sounds(defaults, sounds, out_dir)
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DheadsError(f"cannot create the folder {out_dir}: {error.strerror}; choose another") from error
    else:
        jobs = [defaults]
    if takes > 1:
        jobs = takes_of(jobs, takes)
    check_distinct(jobs)
    return jobs


class _VideoStdout(Stream):
    """stdout for a video: where nobody reads any more the program just ends, as others in a pipe do."""

    def __init__(self) -> None:
        # A file of its own, whose errors are told as those of any other output.
        super().__init__(open(sys.stdout.fileno(), "wb", closefd=False), "<stdout>")  # noqa: SIM115

    def write(self, data: bytes) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            if hasattr(signal, "SIGPIPE"):
                undo_all()
                signal.signal(signal.SIGPIPE, signal.SIG_DFL)
                signal.raise_signal(signal.SIGPIPE)
            raise


def _is_stdout(output: Path) -> bool:
    """Whether it is another name of stdout, such as /dev/stdout: no line of ours must follow the video there."""
    try:
        there = os.stat(output)
        # What else is a device, such as /dev/null, is no worse for a line more.
        return os.path.samestat(there, os.fstat(1)) and (os.isatty(1) or not stat.S_ISCHR(there.st_mode))
    except (OSError, ValueError):
        return False


def _finite(value: float | None, option: str) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no number", param_hint=option)
    return value


def _ask_consent(name: str, accepted: bool) -> None:
    """Weights under a licence of their own are used once it was accepted: by the flag, or at the terminal."""
    from dheads.weights.licences import accept, consent

    text = consent(name)
    if text is None:
        return
    if not accepted and sys.stdin.isatty() and sys.stderr.isatty():
        typer.echo(text, err=True)
        accepted = typer.confirm("Do you accept it?", err=True)
    if accepted:
        accept(name)


def _starting_point(preset: str | None, init: str | None, data: Path) -> Config:
    """The preset; without one the configuration of the weights to start from; else the preset of the data."""
    if preset is not None:
        return configuration.preset(preset)
    if init is not None:
        from dheads.weights.checkpoints import load

        return load(init).config
    from dheads.dataset.dataset import Dataset

    return configuration.preset(str(Dataset(data).info.get("preset", "small")))


def _costs(chosen: Config, data: Path, processes: int) -> str:
    from dheads.dataset.dataset import Dataset
    from dheads.training.plan import plan

    return "\n".join(plan(chosen, len(Dataset(data).split("train")), processes).lines())


def _read_changes(file: Path | None, changes: list[str] | None) -> list[dict[str, Any]]:
    """What is laid over the preset, in order: the TOML file, then each --set."""
    return [*([_read_toml(file)] if file else []), *(_parse_change(change) for change in changes or [])]


def _parse_shard(text: str | None) -> tuple[int, int] | None:
    """3/16 -> (3, 16)."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise typer.BadParameter(f"{text!r} is not I/N, such as 3/16", param_hint="--shard")
    return int(match[1]), int(match[2])


def _print_result(result: Any, as_json: bool) -> None:
    """The path of what was made, or everything about it as one line of JSON."""
    typer.echo(json.dumps(dataclasses.asdict(result), default=str) if as_json else result.path)


def _print_summary(summary: Any) -> None:
    """What `prepare` did: a few clips that were left out by name, many by reason."""
    hours = f"{summary.seconds / 3600:.2f} hours, {summary.frames} frames"
    typer.echo(f"{summary.clips} clips, {hours}, {summary.speakers} speakers", err=True)
    if len(summary.failed) <= _LISTED:
        _print_failed(summary.failed)
    else:
        typer.echo(f"left out {len(summary.failed)} clips, which failed.csv names:", err=True)
        for reason, count in summary.drops.items():
            typer.echo(f"  {count} x {reason}", err=True)
    if summary.passed_over:
        others = ", ".join(f"{count} x {kind}" for kind, count in summary.passed_over.items())
        typer.echo(_printable(f"passed over: {others}"), err=True)
    if summary.contact_sheet is not None:
        typer.echo(f"look at {summary.contact_sheet}", err=True)


def _print_failed(failed: list[tuple[str, str]]) -> None:
    for name, reason in failed:
        typer.echo(_printable(f"left out {name}: {reason}"), err=True)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DheadsError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DheadsError(f"{path} is not a TOML file: {error}") from error


def _parse_change(text: str) -> dict[str, Any]:
    """Turn training.steps=1000 into {"training": {"steps": 1000}}; what is no TOML value is a string."""
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise typer.BadParameter(f"{text!r} is not KEY=VALUE", param_hint="--set")
    try:
        nested = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        nested = value.strip()
    for part in reversed(key.strip().split(".")):
        nested = {part: nested}
    return nested
