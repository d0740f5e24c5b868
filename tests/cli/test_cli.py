"""The command line: help, version, start-up time, completion, options, exit codes. Stand-ins replace what it calls."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from conftest import ROOT
from typer.main import get_command
from typer.testing import CliRunner, Result

from dheads import __version__, cli
from dheads import config as configuration
from dheads.cli import licences
from dheads.diffusion import SOLVERS
from dheads.errors import DheadsError
from dheads.evaluation.results import ClipReport, Report
from dheads.sampling.jobs import Job
from dheads.weights.checkpoints import load

RUN = "from dheads.cli import app; app(prog_name='dheads')"


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(arg) for arg in args])


def process(*args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN, *args], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **(env or {})}
    )


MODULES = {
    "sample_job": "dheads.sampling.talker",
    "sample_all": "dheads.sampling.lists",
    "prepare": "dheads.dataset.prepare",
    "train": "dheads.training.loop",
    "evaluate": "dheads.evaluation.evaluate",
    "evaluate_weights": "dheads.evaluation.evaluate",
}


class StandIn:
    """Replaces the module of a function that a command calls, and records the calls."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch, result: Any = None) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.result = result
        module = ModuleType(MODULES[name])
        setattr(module, name, self)
        monkeypatch.setitem(sys.modules, MODULES[name], module)
        monkeypatch.setattr(MODULES[name], module, raising=False)

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls.append((args, options))
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


class Stream(list[Any]):
    """Outcomes of a list that can be closed."""

    def close(self) -> None: ...


@dataclasses.dataclass
class Made:
    path: Path
    frames: int
    notes: list[str]


# --- Help, version, completion, signals


def test_help_is_quick_and_imports_no_torch() -> None:
    """It takes under 0.4 s of processor time, which does not depend on other programs."""
    measured = f"import atexit, sys, time\natexit.register(lambda: print(time.process_time(), file=sys.stderr))\n{RUN}"
    done = subprocess.run([sys.executable, "-c", measured, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert all(command in done.stdout for command in ("sample", "prepare", "train", "eval"))
    assert float(done.stderr) < 0.4
    heavy = "import sys, dheads.cli; print({'torch', 'numpy', 'cv2', 'av', 'rich'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, cwd=ROOT, check=True)
    assert loaded.stdout.strip() == "set()"


def test_a_detector_that_is_not_used_is_not_imported(warm: list[str]) -> None:
    """face-alignment and its dependencies take seconds to import."""
    modules = f"import sys, {', '.join(MODULES.values())}"
    imports = f"{modules}; print({{'face_alignment', 'numba', 'scipy.optimize'}} & set(sys.modules))"
    loaded = subprocess.run([*warm, "-c", imports], capture_output=True, text=True, cwd=ROOT, check=True)
    assert loaded.stdout.strip() == "set()"


PROGRAM = get_command(cli.app)
COMMANDS = PROGRAM.commands


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("columns", [80, 120])
def test_help_has_groups_in_one_column_and_fits_the_terminal(
    name: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    program = PROGRAM.make_context("dheads", [name])
    lines = typer.Context(COMMANDS[name], parent=program, info_name=name).get_help().splitlines()
    assert columns - 10 < max(map(len, lines)) <= columns
    groups = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert groups[0] == "Input:"
    assert groups[-2:] == ["Other options:", "Examples:"]
    assert len(set(groups)) == len(groups)
    # All texts begin in one column.
    rows = [re.match(r"  (-\S.*?)  +\S", line) for line in lines]
    assert len({row.end() for row in rows if row}) == 1


def test_every_option_is_explained_in_short_sentences() -> None:
    options = [option for command in COMMANDS.values() for option in command.params]
    for option in options:
        assert option.help.endswith("."), option.name
        assert len(option.help) <= (200 if option.name == "jobs" else 150), option.name


def test_sample_groups_its_options_by_purpose() -> None:
    groups: dict[str, list[str]] = {}
    for option in COMMANDS["sample"].params:
        groups.setdefault(option.rich_help_panel, []).append(option.name)
    assert groups == {
        "Input": ["face", "sounds", "at", "which", "weights"],
        "Output": ["output", "audio_codec"],
        "Look": ["size", "paste", "seed"],
        "Motion": ["still", "motion", "motion_from", "guidance"],
        "Speed": ["device", "steps", "solver", "compiled"],
        "Many videos": ["out_dir", "jobs", "takes", "overwrite", "shard"],
        None: ["accept_license", "quiet", "as_json"],
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_of_the_help_are_shown_and_are_valid_commands(
    name: str, training: StandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dheads.cli.train._starting_point", lambda *_: configuration.preset("tiny"))
    made = Made(Path("out.mp4"), 25, [])
    stand_ins = [training, StandIn("sample_job", monkeypatch, made), StandIn("sample_all", monkeypatch, Stream())]
    stand_ins += [StandIn("prepare", monkeypatch, Prepared([], {}))]
    evaluations = ModuleType(MODULES["evaluate"])
    for function in ("evaluate", "evaluate_weights"):
        stand_ins.append(StandIn(function, monkeypatch, found()))
        setattr(evaluations, function, stand_ins[-1])
    monkeypatch.setitem(sys.modules, MODULES["evaluate"], evaluations)
    shown = run(name, "--help").stdout
    examples = COMMANDS[name].epilog.splitlines()
    assert len(examples) == 2
    for example in examples:
        assert f"\n  {example}\n" in shown
        program, command, *args = shlex.split(example)
        assert (program, command) == ("dheads", name)
        done = run(command, *args)
        assert done.exit_code == 0, done.stderr
    assert sum(len(stand_in.calls) for stand_in in stand_ins) == 2


def test_version() -> None:
    done = run("--version")
    assert (done.exit_code, done.stdout) == (0, f"dheads {__version__}\n")


def completion(shell: str, line: str) -> dict[str, str]:
    """The environment in which a shell's script asks for the end of a line."""
    return {
        "_DHEADS_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split(" ")) - 1),
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }


@pytest.mark.parametrize(
    ("shell", "line", "offered"),
    [
        ("bash", "dheads ", ["sample", "prepare", "train", "eval"]),
        ("zsh", "dheads sa", ["sample"]),
        ("fish", "dheads sample --mot", ["--motion", "--motion-from"]),
        ("zsh", "dheads sample --out", ["--output", "--out-dir"]),
        ("bash", "dheads sample --solver d", list(SOLVERS)),
        ("fish", "dheads train --preset ", ["crema", "lrw", "small", "tiny"]),
        ("bash", "dheads train --init s", ["small"]),
        ("bash", "dheads sample --weights ", ["small", "crema"]),
        ("bash", "dheads sample --weights run/w", []),  # the shell completes file names
    ],
)
def test_completion_offers_commands_options_and_values(
    shell: str, line: str, offered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)  # completion does so in its own process
    printed = CliRunner().invoke(cli.app, [], env=completion(shell, line), prog_name="dheads").stdout
    values = re.findall(r'^\W*"(.+?)"', printed.partition("((")[2], re.M) if shell == "zsh" else printed.splitlines()
    assert [value.partition("\t")[0] for value in values if value] == offered


def test_completion_is_quick() -> None:
    """It loads no heavy module."""
    heavy = "print({'torch', 'numpy', 'cv2', 'rich.console'} & sys.modules.keys(), file=sys.stderr)"
    code = f"import atexit, sys\natexit.register(lambda: {heavy})\n{RUN}"
    env = {**os.environ, **completion("zsh", "dheads sample --weights s")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env)
    assert (done.stdout, done.stderr) == ("_arguments '*: :((\"small\"))'\n", "set()\n")


@pytest.mark.parametrize(
    ("shell", "part"),
    [
        ("bash", "complete -o default -F _dheads_completion dheads"),
        ("zsh", "#compdef dheads"),
        ("fish", "complete --command dheads"),
    ],
)
def test_completion_is_installed_for_the_shell(
    shell: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a home folder of its own. Typer would find the shell among the parent processes, which it may not here."""
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    for home in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(home, str(tmp_path))
    for option in ("--show-completion", "--install-completion"):
        done = CliRunner().invoke(cli.app, [option, shell], prog_name="dheads")
        assert done.exit_code == 0, done.stderr
        assert option == "--install-completion" or part in done.stdout
    assert any(part in path.read_text(encoding="utf-8") for path in tmp_path.rglob("*") if path.is_file())


# A command that waits while it writes a file.
WAITING = """
import signal, sys
from pathlib import Path
import dheads.cli as cli
from dheads.system.files import complete_or_absent
# A test run in the background may ignore signals, and its child processes inherit that.
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
@cli.app.command()
def wait(path: Path):
    with complete_or_absent(path) as part:
        part.touch()
        print(1, flush=True)
        sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot be sent Ctrl-C alone there")
@pytest.mark.parametrize("number", [2, 15, 1])
def test_a_signal_leaves_nothing_of_any_command(tmp_path: Path, number: int) -> None:
    command = [sys.executable, "-c", WAITING + RUN, "wait", str(tmp_path / "o")]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, text=True, cwd=ROOT, **pipes) as running:
        running.stdout.readline()
        assert len(list(tmp_path.iterdir())) == 1
        running.send_signal(number)
        assert running.wait(timeout=20) == 128 + number
        assert running.stderr.read() == ""
    assert list(tmp_path.iterdir()) == []


# --- Usage


@pytest.mark.parametrize(
    "args",
    [
        ["sample"],
        ["sample", "face.jpg"],
        ["sample", "face.jpg", "speech.wav"],
        ["sample", "face.jpg", "speech.wav", "-o", "out.mp4", "--steps", "0"],
        ["sample", "face.jpg", "speech.wav", "-o", "out.mp4", "--steps", "ten"],
        ["sample", "face.jpg", "speech.wav", "-o", "out.mp4", "--seed", "-1"],
        ["sample", "face.jpg", "speech.wav", "-o", "out.mp4", "--size", "4"],
        ["sample", "face.jpg", "speech.wav", "-o", "out.mp4", "--solver", "euler"],
        ["sample", "face.jpg", "speech.wav", "-o", "out.mp4", "--device", "tpu"],
        ["sample", "face.jpg", "speech.wav", "-o", "out.mp4", "--out-dir", "out"],
        ["sample", "face.jpg", "a.wav", "b.wav", "-o", "out.mp4"],
        ["sample", "face.jpg", "a.wav", "-", "--out-dir", "out"],
        ["sample", "face.jpg", "-", "-o", "out.mp4", "--takes", "2"],
        ["sample", "face.jpg", "speech.wav", "-o", "-", "--takes", "2"],
        ["sample", "face.jpg", "speech.wav", "-o", "-", "--json"],
        ["sample", "face.jpg", "speech.wav", "-o", "out.mp4", "--shard", "1/2"],
        ["sample", "face.jpg", "speech.wav", "-o", "out.mp4", "--size", "4098"],
        ["sample", "face.jpg", "speech.wav", "-o", "out.mp4", "--guidance", "nan"],
        ["sample", "face.jpg", "speech.wav", "-o", "out.mp4", "--at", "inf"],
        ["sample", "face.jpg", "speech.wav", "-o", "out.mp4", "--face", "0"],
        ["sample", "face.jpg", "--jobs", "jobs.csv"],
        ["sample", "--jobs", "jobs.csv", "-o", "out.mp4"],
        ["sample", "--jobs", "jobs.csv", "--shard", "3/2"],
        ["train", "--data", "data", "--out", "run", "--set", "optimisation.steps"],
        ["train"],
        ["prepare", "raw", "--out", "data", "--shard", "0/2"],
        ["prepare", "raw", "--out", "data", "--shard", "3/2"],
        ["prepare", "raw", "--out", "data", "--shard", "half"],
        ["prepare", "raw", "--out", "data", "--layout", "vox"],
        ["sing"],
    ],
)
def test_wrong_usage_exits_with_2(args: list[str]) -> None:
    done = run(*args)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert "Error" in done.stderr
    assert "Traceback" not in done.stderr


# --- Calls, results and errors


def test_user_error_is_one_line_and_exit_1(monkeypatch: pytest.MonkeyPatch) -> None:
    StandIn("sample_job", monkeypatch, DheadsError("face.jpg: there is no such file"))
    done = run("sample", "face.jpg", "speech.wav", "-o", "out.mp4")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == "error: face.jpg: there is no such file\n"


def test_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    StandIn("sample_job", monkeypatch, ZeroDivisionError("a bug"))
    assert isinstance(run("sample", "face.jpg", "speech.wav", "-o", "out.mp4").exception, ZeroDivisionError)


def test_sample_passes_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = StandIn("sample_job", monkeypatch, Made(Path("out.mp4"), 25, ["two faces; taking the largest"]))
    done = run("sample", "face.jpg", "speech.wav", "-o", "out.mp4", "--steps", 8, "--solver", "dpm++2m", "--seed", 3)
    assert (done.exit_code, done.stdout) == (0, "out.mp4\n")
    assert done.stderr == "two faces; taking the largest\n"
    job = Job(Path("face.jpg"), Path("speech.wav"), Path("out.mp4"), seed=3, steps=8, solver="dpm++2m")
    assert stand_in.calls == [((job,), {"device": "auto", "compiled": False, "progress": True})]


def test_quiet_prints_nothing_but_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = StandIn("sample_job", monkeypatch, Made(Path("out.mp4"), 25, ["two faces"]))
    done = run("sample", "face.jpg", "speech.wav", "-o", "out.mp4", "--quiet")
    assert (done.stdout, done.stderr) == ("out.mp4\n", "")
    assert stand_in.calls[0][1]["progress"] is False


def test_json_is_one_line_with_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    StandIn("sample_job", monkeypatch, Made(Path("out.mp4"), 25, []))
    done = run("sample", "face.jpg", "speech.wav", "-o", "out.mp4", "--json")
    assert done.stdout.count("\n") == 1
    assert json.loads(done.stdout) == {"path": "out.mp4", "frames": 25, "notes": []}


@dataclasses.dataclass
class Prepared:
    failed: list[tuple[str, str]]
    drops: dict[str, int]
    passed_over: dict[str, int] = dataclasses.field(default_factory=dict)
    clips: int = 2
    frames: int = 150
    seconds: float = 6.0
    speakers: int = 1
    contact_sheet: Path = Path("data/contact-sheet.png")
    path: Path = Path("data")


def test_prepare_reports_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = [("c.mp4", "no face in 3 of 75 frames")]
    others = {".txt": 3, "links to folders": 1}
    stand_in = StandIn("prepare", monkeypatch, Prepared(failed, {"no face in N of N frames": 1}, others))
    done = run("prepare", "raw", "--out", "data", "--preset", "tiny", "--workers", 1, "--set", "model.image_size=64")
    assert (done.exit_code, done.stdout) == (0, "data\n")
    assert done.stderr == (
        "2 clips, 0.00 hours, 150 frames, 1 speakers\nleft out c.mp4: no face in 3 of 75 frames\n"
        "passed over: 3 x .txt, 1 x links to folders\nlook at data/contact-sheet.png\n"
    )
    (args, options), config = stand_in.calls[0], stand_in.calls[0][0][2]
    assert args[:2] == (Path("raw"), Path("data"))
    assert config.network.image_size == 64
    assert options.pop("device") in {"cpu", "cuda", "mps"}
    assert options == {"layout": None, "split_file": None, "shard": None, "workers": 1, "progress": True}


def test_prepare_counts_what_failed_often(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = [(f"{i}.mp4", f"no face in {i} of 75 frames") for i in range(1, 12)]
    stand_in = StandIn("prepare", monkeypatch, Prepared(failed, {"no face in N of N frames": 11}))
    done = run("prepare", "raw", "--out", "data", "--shard", "3/16", "--layout", "lrw", "--device", "cpu")
    assert "left out 11 clips, which failed.csv names:\n  11 x no face in N of N frames\n" in done.stderr
    assert "0.mp4" not in done.stderr
    assert (stand_in.calls[0][1]["shard"], stand_in.calls[0][1]["layout"]) == ((3, 16), "lrw")


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """A stand-in for training; the dataset need not exist."""
    planned = types.SimpleNamespace(lines=lambda: ["6.9 M parameters"], summary=lambda: "6.9 M parameters, 9 steps")
    monkeypatch.setattr("dheads.cli.train.plan_of", lambda config, data, processes: planned)
    return StandIn("train", monkeypatch, Path("run/weights.safetensors"))


def test_train_lays_file_over_preset_and_flags_over_both(training: StandIn, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[training]\nsteps = 7\nbatch_size = 2\n[model]\nchannel_mult = [1, 2, 2]\n", encoding="utf-8")
    changes = ["--set", "optimisation.steps=9", "--set", "diffusion.prediction=eps"]
    changes += ["--set", "extensions.copying.gates=false"]
    done = run("train", "--data", "data", "--out", "run", "--preset", "tiny", "--config", recipe, *changes)
    assert (done.exit_code, done.stdout) == (0, "run/weights.safetensors\n")
    config = training.calls[0][0][0]
    assert (config.optimisation.steps, config.optimisation.batch_size) == (9, 2)
    assert (config.diffusion.prediction, config.extensions.copying.gates) == ("eps", False)
    assert config.network.channel_mult == (1, 2, 2)
    assert config.optimisation.learning_rate == configuration.preset("tiny").optimisation.learning_rate
    assert training.calls[0][1]["device"] in {"cpu", "cuda", "mps"}  # what auto found
    assert re.fullmatch(r"train run on the [CG]PU.*: 6\.9 M parameters, 9 steps\n", done.stderr)


def test_train_starts_from_the_configuration_of_weights_but_not_from_how_their_run_went(training: StandIn) -> None:
    done = run("train", "--data", "data", "--out", "run", "--init", "small")
    assert done.exit_code == 0, done.stderr
    config = training.calls[0][0][0]
    assert config.run == configuration.RunConfig()
    assert dataclasses.replace(config, run=load("small").config.run) == load("small").config
    assert load("small").config.run != configuration.RunConfig()


def test_the_runs_folder_is_named_after_the_data(training: StandIn) -> None:
    assert run("train", "--data", "./lrw", "--preset", "tiny").exit_code == 0
    assert training.calls[0][0][1:] == (Path("lrw"), Path("lrw-run"))


def test_a_dry_run_prints_the_size_of_the_run(training: StandIn) -> None:
    done = run("train", "--data", "data", "--preset", "tiny", "--dry-run")
    assert (done.exit_code, done.stdout) == (0, "6.9 M parameters\n")
    assert not training.calls


def test_print_config_prints_a_preset_with_its_comments() -> None:
    from dheads.config import presets

    done = run("train", "--print-config", "tiny")
    assert (done.exit_code, done.stdout) == (0, presets.preset_text("tiny"))
    assert "#" in done.stdout
    done = run("train", "--print-config", "huge")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("error: unknown preset 'huge'")


def test_of_several_processes_one_prints(training: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    done = run("train", "--data", "data", "--preset", "tiny")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "")
    assert training.calls[0][1]["progress"] is False


def test_messages_of_the_modules_go_to_stderr(training: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*args: object, **options: object) -> Path:
        logging.getLogger("dheads").warning("a clip cannot be read")
        return Path("w")

    monkeypatch.setattr(training, "result", None)
    monkeypatch.setattr(sys.modules["dheads.training.loop"], "train", train)
    assert "warning: a clip cannot be read\n" in run("train", "--data", "data", "--preset", "tiny").stderr
    assert run("train", "--data", "data", "--preset", "tiny", "--quiet").stderr == ""


# --- Weights that ask for consent


@pytest.fixture
def asking(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Weights that require consent; returns the names accepted so far."""
    accepted: list[str] = []
    monkeypatch.setattr("dheads.weights.licences.consent", lambda name: None if name in accepted else "CC BY-NC-SA 4.0")
    monkeypatch.setattr("dheads.weights.licences.accept", accepted.append)
    return accepted


@pytest.mark.parametrize(("flag", "wanted"), [([], []), (["--accept-license"], ["crema"])])
def test_a_licence_is_accepted_by_the_flag(
    asking: list[str], monkeypatch: pytest.MonkeyPatch, flag: list[str], wanted: list[str]
) -> None:
    StandIn("sample_job", monkeypatch, Made(Path("out.mp4"), 25, []))
    run("sample", "face.jpg", "speech.wav", "-o", "out.mp4", "--weights", "crema", *flag)
    assert asking == wanted


@pytest.mark.parametrize(("answer", "wanted"), [("y", ["crema"]), ("n", [])])
def test_a_licence_is_accepted_at_the_terminal(
    asking: list[str], monkeypatch: pytest.MonkeyPatch, answer: str, wanted: list[str]
) -> None:
    monkeypatch.setattr(licences.typer, "confirm", lambda text, err: answer == "y")
    terminal = types.SimpleNamespace(isatty=lambda: True, write=lambda text: None, flush=lambda: None)
    monkeypatch.setattr(licences, "sys", types.SimpleNamespace(stdin=terminal, stderr=terminal))
    licences.ask_consent("crema", accepted=False)
    assert asking == wanted


def found() -> Report:
    """A report of two clips."""
    clips = [
        ClipReport(name, {"mouth_correlation": r}, {}, Path(f"{name}.mp4"), Path(f"real/{name}.mp4"))
        for name, r in (("a", 0.5), ("b", 0.25))
    ]
    lacking = dict.fromkeys(["av_offset", "av_distance"], "a file is missing; get it")
    summary = {"clips": 2, "failed": 1, "mouth_correlation": 0.375}
    return Report(clips, summary, lacking, [("c", "no face")], ["too few clips"], {}, "crema")


def test_eval_prints_a_table_and_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in = StandIn("evaluate", monkeypatch, found())
    done = run("eval", "ours", "--reference", "real", "--out", "out", "--metric", "mouth_correlation", "--size", "96")
    assert done.exit_code == 0, done.stderr
    assert any(line.split() == ["mouth_correlation", "higher", "0.375"] for line in done.stdout.splitlines())
    assert done.stderr.splitlines() == [
        "without av_offset, av_distance: a file is missing; get it",
        "warning: too few clips",
        "left out c: no face",
        f"look at {Path('out') / 'report.html'}",
    ]
    (args, options), *_ = stand_in.calls
    assert args == (Path("ours"), Path("real"))
    assert (options["out"], options["only"], options["size"]) == (Path("out"), ["mouth_correlation"], 96)
    assert options["limit"] is None
    done = run("eval", "ours", "--reference", "real", "--json", "--quiet", "--limit", 3)
    assert stand_in.calls[-1][1]["limit"] == 3
    assert json.loads(done.stdout)["summary"]["mouth_correlation"] == 0.375
    assert done.stderr == ""


def test_eval_of_weights_generates_the_videos_first(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = StandIn("evaluate_weights", monkeypatch, found())
    done = run("eval", "--weights", "small", "--data", "data", "--out", "out", "--split", "val", "--limit", 2)
    assert done.exit_code == 0, done.stderr
    (args, options), *_ = stand_in.calls
    assert args == ("small", Path("data"), "val", Path("out"))
    assert (options["limit"], options["seed"], options["steps"]) == (2, 0, None)


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ([], "give GENERATED and --reference, or --weights and --data"),
        (["ours"], "give GENERATED and --reference"),
        (["--weights", "small", "--data", "data"], "needs --data and --out"),
        (["ours", "--weights", "small", "--data", "data", "--out", "out"], "no GENERATED"),
        (["ours", "--reference", "real", "--turing", "3"], "needs --out"),
        (["--votes", "votes.json"], "needs --key"),
    ],
)
def test_eval_needs_videos_or_weights(args: list[str], reason: str) -> None:
    done = run("eval", *args)
    assert done.exit_code == 2
    assert reason in " ".join(done.stderr.replace("│", " ").split())


def test_votes_of_a_turing_test_are_counted(tmp_path: Path) -> None:
    key, votes = tmp_path / "turing-key.json", tmp_path / "votes.json"
    kinds = {"aa": "generated", "bb": "generated", "cc": "real", "dd": "real"}
    clips = {token: {"kind": kind, "clip": token} for token, kind in kinds.items()}
    key.write_text(json.dumps({"test": "t", "clips": clips}), encoding="utf-8")
    answers = dict(zip(kinds, ("real", "generated", "real", "real"), strict=True))
    votes.write_text(json.dumps({"test": "t", "voter": "v", "votes": answers}), encoding="utf-8")
    done = run("eval", "--votes", votes, "--key", key)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.splitlines() == [
        "generated\t50.0% judged real (1 of 2 votes; 95 %: 9.5% to 90.5%)",
        "real\t100.0% judged real (2 of 2 votes; 95 %: 34.2% to 100.0%)",
    ]
    assert json.loads(run("eval", "--votes", votes, "--key", key, "--json").stdout)["generated"]["share"] == 0.5


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--preset", "huge"], "unknown preset 'huge'; the known ones are"),
        (["--config", "absent.toml"], "cannot read absent.toml"),
        (["--config", "bad.toml"], "bad.toml is not a TOML file"),
        (["--config", "binary.toml"], "binary.toml is not a TOML file"),
        (["--set", "optimisation.step=3"], "did you mean step"),
        (["--set", "optimisation.steps=many"], "must be int"),
    ],
)
def test_bad_configuration(args: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.toml").write_text("steps = = 3", encoding="utf-8")
    Path("binary.toml").write_bytes(b"\xff\xfe\x00")
    done = run(
        "train", "--data", "data", "--out", "run", *(args if "--preset" in args else ["--preset", "tiny", *args])
    )
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ")
    assert reason in done.stderr
    assert not Path("run").exists()


def test_names_cannot_paint_the_terminal() -> None:
    done = run("sample", "new\nline\x1b[31m.jpg", "speech.wav", "-o", "out.mp4")
    assert done.exit_code == 1
    assert done.stderr.count("\n") == 1
    assert "new\\nline\\x1b[31m.jpg" in done.stderr
