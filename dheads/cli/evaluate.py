"""`dheads eval`: measures of generated videos, and the votes of a Turing test."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dheads.cli.help import GENERATION, INPUT, MEASURES, OUTPUT, TURING
from dheads.cli.licences import ask_consent
from dheads.cli.options import AcceptLicense, Device, Json, Quiet, Solver, Steps, weights_names
from dheads.cli.printing import configure_log, message, print_failed, print_json
from dheads.sampling.jobs import MAX_SEED

if TYPE_CHECKING:
    from dheads.evaluation.results import Report

EXAMPLES = """\
dheads eval --weights small --data data --out report
dheads eval generated --reference real --out report"""


def evaluate(
    generated: Annotated[
        Path | None,
        typer.Argument(
            metavar="GENERATED",
            help="Generated video, or folder of them.",
            show_default=False,
            rich_help_panel=INPUT,
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Real video, or folder of them with the same names. With --weights: the folder that the dataset was "
            "prepared from, to compare head motion.",
            show_default=False,
            rich_help_panel=INPUT,
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            min=16,
            metavar="PX",
            help="Side at which GENERATED were made, if they were enlarged since.",
            show_default=False,
            rich_help_panel=INPUT,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Largest number of videos.", show_default="all", rich_help_panel=INPUT),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Weights that make the videos, instead of GENERATED: small, crema or a checkpoint.",
            show_default=False,
            autocompletion=weights_names,
            rich_help_panel=GENERATION,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Dataset written by `dheads prepare`.",
            show_default=False,
            rich_help_panel=GENERATION,
        ),
    ] = None,
    split: Annotated[
        Literal["train", "val", "test"],
        typer.Option(help="Part of the dataset to make.", rich_help_panel=GENERATION),
    ] = "test",
    seed: Annotated[
        int,
        typer.Option(min=0, max=MAX_SEED, metavar="N", help="Random seed of the videos.", rich_help_panel=GENERATION),
    ] = 0,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Measure to take. The weights that it needs are downloaded. Repeatable.",
            show_default="all that need no download",
            rich_help_panel=MEASURES,
        ),
    ] = None,
    table: Annotated[
        Literal["crema", "lrw"] | None,
        typer.Option(
            help="Table of the paper to show next to the results.", show_default=False, rich_help_panel=MEASURES
        ),
    ] = None,
    lip_reader: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND",
            help="Lip reader for the word error rate: a command that prints the words spoken in {video}, or "
            "python:MODULE:FUNCTION.",
            show_default=False,
            rich_help_panel=MEASURES,
        ),
    ] = None,
    words: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="CSV file of the words spoken: columns clip and words.",
            show_default="files next to the real videos",
            rich_help_panel=MEASURES,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder for report.html, report.json, clips.csv, and the videos of --weights.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    turing: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Also write a Turing test of N generated and N real videos to --out.",
            show_default=False,
            rich_help_panel=TURING,
        ),
    ] = None,
    votes: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="File of one person's votes. Only counts them, with --key. Repeatable.",
            show_default=False,
            rich_help_panel=TURING,
        ),
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Key file of the Turing test, for --votes.",
            show_default=False,
            rich_help_panel=TURING,
        ),
    ] = None,
    device: Device = "auto",
    steps: Steps = None,
    solver: Solver = None,
    accept_license: AcceptLicense = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compare generated videos with real ones.

    The videos are those in GENERATED, or those that --weights makes of --data.
    """
    configure_log(quiet, as_json)
    if votes:
        _count_votes(votes, key, as_json)
        return
    if turing and out is None:
        raise typer.BadParameter("needs --out", param_hint="--turing")
    if weights is None:
        if generated is None or reference is None:
            raise typer.BadParameter("give GENERATED and --reference, or --weights and --data")
        from dheads.evaluation.evaluate import evaluate as evaluate_videos

        report = evaluate_videos(
            generated,
            reference,
            out=out,
            size=size,
            limit=limit,
            only=metric,
            table=table,
            lip_reader=lip_reader,
            words=words,
            device=device,
            progress=not quiet,
        )
    else:
        if generated is not None or data is None or out is None:
            raise typer.BadParameter("needs --data and --out, and no GENERATED", param_hint="--weights")
        from dheads.evaluation.evaluate import evaluate_weights

        ask_consent(weights, accept_license)
        report = evaluate_weights(
            weights,
            data,
            split,
            out,
            raw=reference,
            steps=steps,
            solver=solver,
            seed=seed,
            limit=limit,
            only=metric,
            table=table,
            lip_reader=lip_reader,
            words=words,
            device=device,
            progress=not quiet,
        )
    if turing and out is not None:
        _write_turing_test(report, turing, out / "turing", seed)
    _print_report(report, out, quiet, as_json)


def _print_report(report: Report, out: Path | None, quiet: bool, as_json: bool) -> None:
    """Print the table, or all of the report as JSON, to stdout, and what is missing from it to stderr."""
    from dheads.evaluation.report import as_dict, screen_table

    if as_json:
        print_json(as_dict(report))
    else:
        typer.echo(screen_table(report))
    if quiet:
        return
    for reason in dict.fromkeys(report.unavailable.values()):
        names = ", ".join(name for name, other in report.unavailable.items() if other == reason)
        message(f"without {names}: {reason}")
    for warning in report.warnings:
        message(f"warning: {warning}")
    print_failed(report.failed)
    if out is not None:
        message(f"look at {out / 'report.html'}")


def _write_turing_test(report: Report, count: int, folder: Path, seed: int) -> None:
    from dheads.evaluation.turing import write_turing_test

    generated = {clip.clip: clip.generated for clip in report.clips}
    real = {clip.clip: clip.reference for clip in report.clips if clip.reference is not None}
    key = write_turing_test(generated, real, count, folder, seed)
    message(f"give people {folder}, and keep {key} to count their votes")


def _count_votes(votes: list[Path], key: Path | None, as_json: bool) -> None:
    """Print how often voters judged generated clips, and real ones, to be real."""
    if key is None:
        raise typer.BadParameter("needs --key, the file that was written with the test", param_hint="--votes")
    from dheads.evaluation.turing import tally

    found = tally(votes, key)
    if as_json:
        print_json(dataclasses.asdict(found))
        return
    for kind, share in (("generated", found.generated), ("real", found.real)):
        interval = f"95 %: {share.low:.1%} to {share.high:.1%}"
        typer.echo(f"{kind}\t{share.share:.1%} judged real ({share.real} of {share.votes} votes; {interval})")
    message(f"{found.voters} voters")
