"""What submitting a large sweep to SLURM takes; its jobs are held, so none runs, and are cancelled afterwards."""

import tempfile
import time
from pathlib import Path

from experiments.launch import jobs, slurm
from experiments.launch.settings import SlurmSettings
from experiments.schema import ConfigError

HELD = SlurmSettings.model_validate(
    {
        **{"_target_": "hydra_plugins.wush.SlurmLauncher", "busy": "wait", "detach": True, "array_parallelism": 16},
        **{"partition": None, "account": None, "qos": None, "gpus": 0, "cpus": 1, "memory": None, "time": 60},
        **{"signal_before": 60, "max_timeouts": 0, "setup": [], "extra": {"hold": True}},
    }
)


def seconds_to_submit(trials: int = 1000) -> float | None:
    """Seconds to submit so many trials; None where no SLURM answers, or it takes no such jobs."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "sweeps", "submission-benchmark")
        folder.mkdir(parents=True)
        submitted: list[slurm.Job] = []
        try:
            slurm.check_available()
            started = time.perf_counter()
            submitted = slurm.submit(folder.name, folder, [f"trial-{i}" for i in range(trials)], HELD)
            return time.perf_counter() - started
        except slurm.SubmissionError as error:
            submitted = error.submitted
        except ConfigError:
            pass
        finally:
            if submitted:
                jobs.cancel([job.job_id for job in submitted])
    return None
