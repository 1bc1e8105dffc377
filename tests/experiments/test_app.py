"""The command line: readable errors with their exit codes, and a quick start without heavy imports."""

import signal
import subprocess
import sys
import time

import pytest

from tests.experiments.conftest import ROOT, SMALL, Cli, environment


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["format=mxfp5"], "format=mxfp5: unknown option; format has: int4, mxfp4, mxfp8, nvfp4, original"),
        (["-m", "format=mxfp4,int5"], "format=int5: unknown option; format has: int4, mxfp4, mxfp8, nvfp4, original"),
        (["formt=mxfp4"], "formt: unknown key; did you mean format?"),
        (["format.scale_rul=ocp"], "format.scale_rul: unknown key; did you mean format.scale_rule?"),
        (["format=nvfp4", "format.scale_rule=ocp"], "format.scale_rule=ocp: input should be 'fixed' or 'calibrated'"),
        (["seed=x"], "seed=x: input should be a valid integer"),
        (["calibration=text"], "calibration.path: a value is needed; set calibration.path=..."),
        (["evaluation=text", "evaluation.path=/no/such"], "text file '/no/such': [Errno 2] No such file"),
        (["results=/dev/null/x"], "cannot be written (Not a directory)"),
        (["-m", "seed=interval(0,1)"], "seed=interval(0,1): not a list of values"),
        (["format=null"], "format=null: unknown option; format has: int4, mxfp4, mxfp8, nvfp4, original"),
        (["-m", "transform=h,null"], "transform=null: unknown option; transform has: h, hu, i, r, sq, wus, wush"),
        (["--config-name", "foo"], "--config-name foo: no such config; leave the option out"),
        (["~format._target_"], "format._target_: missing; choose an option with format=..."),
        (["~seed"], "calibration.seed: there is no seed to take its value from; set calibration.seed=..."),
        (["device=cuda:99"], "CUDA GPUs; set device=cpu"),
        (["-m", "tracking=none,wandb"], "tracking=none,wandb: one sweep has one tracking"),
        (["model=local", "model.path="], "model.path=: string should have at least 1 character"),
        (["format=="], "Error parsing override 'format=='"),
    ],
)
def test_a_config_error_is_explained_and_exits_2_before_any_model_loads(
    arguments: list[str], message: str, cli: Cli
) -> None:
    failed = cli.run(*arguments)
    assert failed.returncode == 2
    assert message in failed.stderr
    assert "Traceback" not in failed.stderr
    assert "trial" not in failed.stderr
    assert not list(cli.folder.rglob("*.json"))


def test_all_that_is_wrong_with_a_sweep_comes_in_one_error(cli: Cli) -> None:
    failed = cli.run("-m", "format=mxfp4,mxfp5,nvfp5", "transform=hh", "seed=-1,0", "devic=cpu", "quantize.exclude=[1]")
    assert failed.returncode == 2
    lines = [line.removeprefix("config error: ").partition(": ")[0] for line in failed.stderr.splitlines()]
    wrong = ["format=mxfp5", "format=nvfp5", "transform=hh", "devic", "seed=-1", "calibration.seed=-1"]
    assert sorted(lines) == sorted([*wrong, "quantize.exclude.0=1"])
    assert not list(cli.folder.iterdir())


def test_all_that_is_wrong_with_one_trial_comes_in_one_error(cli: Cli) -> None:
    failed = cli.run("format=mxfp5", "seed=-1", "devic=cpu")
    lines = [line.removeprefix("config error: ").partition(": ")[0] for line in failed.stderr.splitlines()]
    assert sorted(lines) == ["calibration.seed=-1", "devic", "format=mxfp5", "seed=-1"]


def test_a_missing_model_fails_its_trial_with_exit_1(cli: Cli) -> None:
    failed = cli.run("model=local", "model.path=./nothing")
    assert failed.returncode == 1
    assert "model './nothing': no config.json there" in failed.stdout.replace("\n", "")
    assert "Traceback" not in failed.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["format=mxfp5"], ["seed=-1"]])
def test_help_and_config_checks_import_nothing_heavy(arguments: list[str]) -> None:
    program = (
        f"import sys, runpy; sys.argv = ['run.py', *{arguments!r}]\n"
        "try: runpy.run_path('run.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'wandb', 'duckdb'} & set(sys.modules)\n"
        "print('HEAVY', sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("HEAVY []\n")


def test_an_untracked_trial_imports_nothing_of_wandb(cli: Cli) -> None:
    program = (
        f"import sys; sys.argv = ['run.py', *{list(SMALL)!r}]\n"
        "from experiments.app import main; main()\n"
        "print('WANDB', 'wandb' in sys.modules)"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=cli.folder, env=environment(), capture_output=True, text=True)
    assert done.stdout.endswith("WANDB False\n"), done.stderr


def test_help_names_the_groups_and_their_options(cli: Cli) -> None:
    done = cli.run("--help")
    assert done.returncode == 0
    for line in ("format: int4, mxfp4, mxfp8, nvfp4, original", "algorithm: gptq, mr_gptq, rtn"):
        assert line in done.stdout
    assert "transform: h, hu, i, r, sq, wus, wush" in done.stdout


def test_hydra_leaves_no_files_of_its_own(cli: Cli) -> None:
    cli.small("-m", "seed=0")
    assert {path.name for path in cli.folder.iterdir()} == {"results"}
    assert {path.name for path in (cli.folder / "results").iterdir()} == {"trials", "sweeps"}


def _rows_done(cli: Cli) -> int:
    """Finished trials in the sweep's table."""
    return sum(path.read_text().count("%") for path in cli.folder.rglob("table.md"))


def test_ctrl_c_exits_at_once_and_finished_trials_stay(cli: Cli) -> None:
    many = [*SMALL, "-m", "transform.power=range(0,1,0.005)", "progress=lines"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *many],
        cwd=cli.folder,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # some shells ignore it
    )
    deadline = time.monotonic() + 120
    while _rows_done(cli) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    interrupted = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - interrupted < 5
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert len(list(cli.folder.rglob("result.json"))) >= 3
    assert _rows_done(cli) >= 3
    assert next(cli.folder.rglob("report.html")).read_text().count("queued") > 100
