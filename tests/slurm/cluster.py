"""A real SLURM of one node on loopback, in a folder and on ports of its own; nothing of it outlives this process."""

import os
import platform
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "setpriv")
ACCOUNTING_PROGRAMS = ("slurmdbd", "mariadbd", "mariadb-install-db", "mariadb")
USER = pwd.getpwuid(os.getuid()).pw_name
MAX_ARRAY_SIZE = 50

# cred_expire: a requeued job waits that long before it starts again (120 s unless told).
# Time limits and --signal are looked at every 30 s, whatever is set here.
CTLD = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmdPort={slurmd_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
MaxArraySize={max_array_size}
FirstJobId={first_job_id}
MinJobAge={min_job_age}
KillWait=2
CompleteWait=0
InactiveLimit=0
MessageTimeout=4
DefMemPerCPU=100
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=16 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES PriorityTier=5
PartitionName=low Nodes=ALL PriorityTier=1 GraceTime=3
PartitionName=high Nodes=ALL PriorityTier=9
PartitionName=short Nodes=ALL MaxTime=2
PartitionName=down Nodes=ALL State=DOWN
"""
POLLING = """
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
JobAcctGatherParams=OverMemoryKill
"""
CGROUPS = """
ProctrackType=proctrack/cgroup
TaskPlugin=task/cgroup
JobAcctGatherType=jobacct_gather/cgroup
JobAcctGatherFrequency=1
"""
ACCOUNTING = """
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd_port}
AccountingStoragePass={folder}/munge.socket
AccountingStorageEnforce=associations,limits,qos
"""
DBD = """
AuthType=auth/munge
AuthInfo={folder}/munge.socket
DbdAddr=127.0.0.1
DbdHost=localhost
DbdPort={dbd_port}
SlurmUser={user}
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql_port}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm
"""
# `tiny` refuses a third job; `one_cpu` lets a user's jobs have one CPU.
ASSOCIATIONS = (
    "add cluster loopback",
    "add qos normal,tiny,one_cpu",
    "modify qos tiny set MaxSubmitJobsPerUser=2",
    "modify qos one_cpu set MaxTRESPerUser=cpu=1",
    "add account science",
    "add user {user} account=science qos=normal,tiny,one_cpu defaultqos=normal",
)


def missing(accounting: bool) -> list[str]:
    """The programs that a cluster needs and this machine lacks."""
    return [name for name in (*PROGRAMS, *(ACCOUNTING_PROGRAMS if accounting else ())) if _which(name) is None]


class Cluster:
    """A started SLURM; `env` holds the variables that lead its commands, and programs that call them, to it."""

    def __init__(self, accounting: bool = False, cgroups: bool = False, min_job_age: int = 300) -> None:
        # Not in pytest's folders: munged wants one that every user may enter, and sockets want a short path.
        self.folder = folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.accounting = accounting
        self.env = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._values = {
            **{name: _free_port() for name in ("ctld_port", "slurmd_port", "dbd_port", "sql_port")},
            **{"folder": folder, "user": USER, "host": platform.node(), "max_array_size": MAX_ARRAY_SIZE},
            "min_job_age": min_job_age,
            # Clusters of other test processes use the same cgroups, which go by the number of the job.
            "first_job_id": 100_000 + 1000 * secrets.randbelow(60_000),
        }
        self._conf = CTLD + (CGROUPS if cgroups else POLLING) + (ACCOUNTING if accounting else "")
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start every daemon and wait until the node takes jobs."""
        self._write_files()
        self._daemon("munged", "--foreground", f"--socket={self.folder}/munge.socket", *self._munge_files())
        until("munged answers", (self.folder / "munge.socket").exists)
        if self.accounting:
            self._start_accounting()
        self.start_controller()
        self._daemon("slurmd", "-D", "-f", str(self.folder / "slurm.conf"))
        until("slurmd answers", lambda: "idle" in self.call("sinfo", "-h", "-p", "main", "-o", "%T"))

    def stop(self) -> None:
        """End every daemon, the last started first."""
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
        self._daemons.clear()

    def start_controller(self) -> None:
        """Start slurmctld, or start it again, with what it knew."""
        self._daemon("slurmctld", "-D", "-f", str(self.folder / "slurm.conf"))

    def stop_controller(self) -> None:
        """End slurmctld; jobs go on without it."""
        controller = self._daemons.pop("slurmctld")
        controller.terminate()
        controller.wait(timeout=20)

    def cancel_all(self) -> None:
        """End every job, and wait until none is left."""
        if self.call("squeue", "--noheader"):
            self.call("scancel", "--user", USER)
            until("the last job ended", lambda: not self.call("squeue", "--noheader"))

    def call(self, *command: str) -> str:
        """A SLURM command's output and errors."""
        done = subprocess.run(command, env=os.environ | self.env, capture_output=True, text=True, timeout=60)
        return (done.stdout + done.stderr).strip()

    def _write_files(self) -> None:
        self.folder.chmod(0o755)
        (self.folder / "state").mkdir()
        (self.folder / "slurm.conf").write_text(self._conf.format_map(self._values))
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nConstrainRAMSpace=yes\n")
        (self.folder / "slurmdbd.conf").write_text(DBD.format_map(self._values))
        (self.folder / "slurmdbd.conf").chmod(0o600)
        (self.folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (self.folder / "munge.key").chmod(0o600)

    def _munge_files(self) -> list[str]:
        files = {"key-file": "munge.key", "log-file": "munge.log", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        return [f"--{option}={self.folder / name}" for option, name in files.items()]

    def _start_accounting(self) -> None:
        data = self.folder / "sql"
        options = (f"--datadir={data}", f"--user={USER}", "--skip-test-db", "--auth-root-authentication-method=normal")
        self._checked("mariadb-install-db", "--no-defaults", *options)
        socket_file = f"--socket={self.folder}/sql.socket"
        network = ("--bind-address=127.0.0.1", f"--port={self._values['sql_port']}")
        speed = ("--innodb-flush-log-at-trx-commit=0", "--innodb-flush-method=nosync", "--innodb-buffer-pool-size=32M")
        self._daemon(
            *("mariadbd", "--no-defaults", *options[:2], socket_file, *network, *speed),
            f"--pid-file={self.folder}/sql.pid",
        )
        sql = "CREATE USER slurm@'127.0.0.1' IDENTIFIED BY 'slurm'; GRANT ALL ON slurm.* TO slurm@'127.0.0.1'"
        login = ("mariadb", "--no-defaults", "--user=root", socket_file)
        until("mariadbd answers", lambda: "1" in self.call(*login, "--silent", "--execute=SELECT 1").split())
        self._checked(*login, f"--execute={sql}")
        self._daemon("slurmdbd", "-D")
        until("slurmdbd answers", lambda: "normal" in self.call("sacctmgr", "-n", "list", "qos"))
        for line in ASSOCIATIONS:
            self.call("sacctmgr", "--immediate", *line.format_map(self._values).split())

    def _daemon(self, *command: str) -> None:
        """Start a program that gets SIGTERM when this process ends, however it ends."""
        program = _which(command[0])
        assert program is not None, command[0]
        with (self.folder / f"{command[0]}.out").open("ab") as output:
            self._daemons[command[0]] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", program, *command[1:]],
                env=os.environ | self.env | {"SLURM_CONF": str(self.folder / "slurm.conf")},
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def _checked(self, *command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"


def _which(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _free_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return int(own.getsockname()[1])


def until(what: str, condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait for something; an `AssertionError` says what did not come true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not in {seconds:.0f} s: {what}"
        time.sleep(0.05)
