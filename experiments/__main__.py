"""`python -m experiments ...`: look at trials and sweeps, follow and steer sweeps that run, compare, and measure."""

import argparse
import logging
import sys
from pathlib import Path

from experiments.attempts import Cancelled
from experiments.launch.jobs import SlurmAway, SlurmRefused
from experiments.schema import ConfigError
from experiments.store import ResultStore
from experiments.views.display import log_to_console

SWEEP = "a sweep's name, or the first letters of it (default: the sweep planned last)"


def main() -> int:
    """Run the command line; the exit code is 2 for what is not there."""
    log_to_console()
    arguments = _parser().parse_args()
    store = ResultStore(getattr(arguments, "results", None) or "results")
    try:
        return _run(arguments, store)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # such as `logs | head`
        sys.stderr.close()
        return 0
    except (SlurmAway, SlurmRefused) as error:
        print(f"error: {error}; try again when SLURM answers", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}; nothing of what is finished is lost", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Cancelled):
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__.partition(":")[2].strip())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        own = commands.add_parser(name, help=text, description=text)
        own.add_argument("--results", help="the folder of the result store (default: results)")
        return own

    status = command("status", "how the trials of a sweep stand: running, queued, done, failed, and why")
    status.add_argument("sweep", nargs="?", help=SWEEP)
    how = status.add_mutually_exclusive_group()
    how.add_argument("--live", action="store_true", help="draw it anew until the sweep is over")
    how.add_argument("--json", action="store_true", help="as JSON")
    status.add_argument("--all", action="store_true", help="every trial, however many")
    command("wait", "follow a sweep until it is over, then show its table").add_argument("sweep", nargs="?", help=SWEEP)
    logs = command("logs", "the last lines of trials that run, failed or stopped; or the whole log of one")
    logs.add_argument("sweep", nargs="?", help=SWEEP)
    logs.add_argument("trial", nargs="?", help="a trial's id, or the first digits of it")
    logs.add_argument("-f", "--follow", action="store_true", help="go on as the log grows")
    cancel = command("cancel", "end what runs of a sweep and what is queued; what is finished stays")
    cancel.add_argument("sweep", nargs="?", help=SWEEP)
    retry = command("retry", "run what is not done of a sweep, in the way it was launched")
    retry.add_argument("sweep", nargs="?", help=SWEEP)
    retry.add_argument("overrides", nargs="*", help="keys of hydra.launcher, such as time=480 memory=128G")
    retry.add_argument("--launcher", help="another launcher: local, local_parallel or slurm")
    plan = command("plan", "what a sweep would run, what is done, and the time and memory to expect")
    plan.add_argument("overrides", nargs="*", help="as for run.py -m, such as format=mxfp4,nvfp4 transform=h,wush")
    compare = command("compare", "two sides trial by trial: metrics of each, and differences with 95%% intervals")
    compare.add_argument(
        "a", metavar="A", help="a sweep's name, or a filter such as transform=h or sweep=NAME,format=int4"
    )
    compare.add_argument("b", metavar="B", help="likewise")
    compare.add_argument("--output", type=Path, help="also write the table to this .md, .csv or .json file")
    compare.add_argument("--wandb", metavar="ENTITY/PROJECT", help="also save it as a W&B report, and print where")
    compare.add_argument("--wandb-json", type=Path, help="write the W&B report's definition to this file")
    show = command("show", "a trial's metrics, costs, worst decoder blocks and config")
    show.add_argument("trial", help="a trial's id, or the first digits of it")
    export = command("export", "copy the records of a sweep's finished trials, to publish or plot them elsewhere")
    export.add_argument("sweep", help=SWEEP.partition(" (")[0])
    export.add_argument("folder", type=Path, help="where to; a record that is there already is replaced")
    bench = command("bench", "times, memory and ratios of this checkout on this machine")
    bench.add_argument("--quick", action="store_true", help="a tiny random model in place of the embedded one")
    bench.add_argument(
        "--scale", action="store_true", help="the cost of sweeps of 100, 1,000 and 10,000 trials instead"
    )
    bench.add_argument("--output", type=Path, help="also write the numbers to this JSON file")
    return parser


def _run(arguments: argparse.Namespace, store: ResultStore) -> int:
    from experiments import commands

    match arguments.command:
        case "status":
            return commands.status(
                store, arguments.sweep, as_json=arguments.json, live=arguments.live, every=arguments.all
            )
        case "wait":
            return commands.wait(store, arguments.sweep)
        case "logs":
            return commands.logs(store, arguments.sweep, arguments.trial, arguments.follow)
        case "cancel":
            return commands.cancel(store, arguments.sweep)
        case "retry":
            logging.getLogger("experiments").setLevel(logging.INFO)
            return commands.retry(store, arguments.sweep, arguments.launcher, arguments.overrides)
        case "plan":
            from experiments import app

            results = [f"results={arguments.results}"] if arguments.results else []
            app.plan([*arguments.overrides, *results])
            return 0
        case "compare":
            return commands.compare(
                store, arguments.a, arguments.b, arguments.output, arguments.wandb, arguments.wandb_json
            )
        case "show":
            from experiments.views.trial import show_trial

            return show_trial(store, arguments.trial)
        case "export":
            return commands.export(store, arguments.sweep, arguments.folder)
        case "bench":
            from experiments.benchmarks import promises, scale

            if arguments.scale:
                return scale.main(output=arguments.output)
            kept = Path(arguments.results) if arguments.results else None
            return promises.main(arguments.quick, kept, arguments.output)
    raise AssertionError(arguments.command)


if __name__ == "__main__":
    sys.exit(main())
