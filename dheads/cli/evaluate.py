"""`dheads eval`: measures of generated videos, and the votes of a Turing test."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dheads.cli.licences import ask_consent
from dheads.cli.options import AcceptLicense, Device, Json, Quiet, Seed, Solver, Steps
from dheads.cli.printing import message, print_failed, print_json

if TYPE_CHECKING:
    from dheads.evaluation.results import Report


def evaluate(
    generated: Annotated[
        Path | None, typer.Argument(metavar="GENERATED", help="Generated video, or folder of them.", show_default=False)
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Real video, or folder of them with the same names. With --weights: the folder that --data was "
            "prepared from, in which real heads move as a viewer sees them.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Weights to generate the videos with, instead of GENERATED: a name in weights.toml, or the path of a "
            "checkpoint.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Dataset written by `dheads prepare`, for --weights.", show_default=False),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the dataset: train, val or test.")] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="Largest number of clips.", show_default="all")] = None,
    steps: Steps = None,
    solver: Solver = None,
    seed: Seed = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for report.html, report.json and clips.csv, and for the videos of --weights.",
            show_default=False,
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="Measure to take; downloads the weights that it needs; repeatable.",
            show_default="all that need no download",
        ),
    ] = None,
    table: Annotated[
        Literal["crema", "lrw"] | None,
        typer.Option(help="Table of the paper to show next to the results.", show_default=False),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            min=16, help="Side in px at which GENERATED were made, if they were enlarged since.", show_default=False
        ),
    ] = None,
    lip_reader: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND",
            help="Lip reader for the word error rate: a command that prints the words spoken in {video}, or "
            "python:MODULE:FUNCTION.",
            show_default=False,
        ),
    ] = None,
    words: Annotated[
        Path | None,
        typer.Option(
            help="CSV file of the words spoken: columns clip and words.", show_default="files next to the real videos"
        ),
    ] = None,
    turing: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Also write a Turing test of N generated and N real videos to --out.",
            show_default=False,
        ),
    ] = None,
    votes: Annotated[
        list[Path] | None,
        typer.Option(
            help="File of votes in a Turing test; only counts them, with --key; repeatable.", show_default=False
        ),
    ] = None,
    key: Annotated[Path | None, typer.Option(help="Key file of the Turing test, for --votes.", show_default=False)] = (
        None
    ),
    device: Device = "auto",
    accept_license: AcceptLicense = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compare generated videos with the real ones: those in GENERATED, or those that --weights generates."""
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
