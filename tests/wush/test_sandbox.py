"""The sandbox: programs that try to get out, to use up the machine, or to pass without doing their work."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from wush.tasks import sandbox
from wush.tasks.jail import (
    ALLOW,
    CLONE_THREAD,
    EAGAIN,
    ENOSYS,
    EPERM,
    ERRNO,
    KILL,
    MACHINES,
    X32,
    system_call_filter,
)
from wush.tasks.sandbox import NAMESPACES, Limits, SandboxError, run

LIMITS, SHORT = Limits(), Limits(seconds=1)
OUT_OF_TIME = ("TimeoutError: no processor time left", "stopped after 1 s")  # whichever clock is the first


@pytest.fixture(autouse=True)
def nothing_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After each test: no folder of its sandboxes, and no process of one; other tests may run beside it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    assert not list(tmp_path.glob("sandbox-*"))
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [command for command in commands if b"jail.py" in command and bytes(tmp_path) in command]


def why(program: str, limits: Limits = LIMITS) -> str:
    """Why a program failed; that it did."""
    outcome = run(program, limits)
    assert not outcome.passed
    return outcome.reason


def test_a_program_that_ends_passes_and_its_output_is_kept() -> None:
    outcome = run("print('hello')\nassert sorted([2, 1]) == [1, 2]")
    assert (outcome.passed, outcome.reason, outcome.output) == (True, "", "hello\n")


def test_nothing_runs_after_the_last_line() -> None:
    assert run("import atexit, os; atexit.register(os._exit, 1)").passed
    assert run("import threading as t, time; t.Thread(target=time.sleep, args=(1000,)).start()").passed


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2, 'one is not two'", "AssertionError: one is not two"),
        ("def broken(:", "SyntaxError: invalid syntax"),
        ("missing()", "NameError: name 'missing' is not defined"),
        ("def deeper(): deeper()\ndeeper()", "RecursionError: maximum recursion depth exceeded"),
    ],
)
def test_a_program_that_fails_says_why(program: str, reason: str) -> None:
    assert why(program) == reason


@pytest.mark.parametrize("program", ["import os; os._exit(0)", "import sys; sys.exit(0)", "raise SystemExit"])
def test_leaving_early_is_not_passing(program: str) -> None:
    assert why(f"{program}\nassert False") == "ended before its last line"


def test_printing_is_not_passing() -> None:
    assert "AssertionError" in why("import sys; print(sys.argv, open(0).read()); assert False")


def test_what_is_left_in_sight_does_not_pass() -> None:
    """Arguments, the names of all callers, standard input again, and what was printed so far."""
    program = """
import os, re, sys
seen, frame = [*sys.argv, *sys.orig_argv, *os.environ.values()], sys._getframe()
while frame:
    seen += map(repr, [*frame.f_locals.values(), *frame.f_globals.values()])
    frame = frame.f_back
os.lseek(0, 0, os.SEEK_SET)
seen.append(os.read(0, 10**6).decode())
printed = os.pread(1, 10**6, 0).decode()
assert set(re.findall("[0-9a-f]{32}", " ".join(seen))) <= {printed}, "more in sight than was printed"
print(printed, end="", flush=True)
os._exit(0)
"""
    assert why(program) == "ended before its last line"


def test_there_is_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), 1).close()
        assert "Operation not permitted" in why(f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)")
    assert "Operation not permitted" in why("import socket; socket.socket(socket.AF_UNIX).connect('/run/docker.sock')")


def test_there_would_be_no_network_even_with_sockets() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)"
        command = ["unshare", *NAMESPACES, sys.executable, "-I", "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert "Network is unreachable" in done.stderr


def test_memory_is_bounded() -> None:
    assert why("block = bytearray(10 * 2**30)") == "MemoryError"
    assert why("blocks = []\nwhile True: blocks.append(bytearray(2**24))") == "MemoryError"


def test_an_endless_loop_is_stopped() -> None:
    started = time.monotonic()
    assert why("while True: pass", SHORT) in OUT_OF_TIME
    stubborn = "import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert why(stubborn, SHORT) == "stopped after 1 s"
    assert time.monotonic() - started < 10


def test_waiting_is_stopped() -> None:
    assert why("import time; time.sleep(1000)", SHORT) == "stopped after 1 s"


def test_a_fork_bomb_does_not_start() -> None:
    assert "Resource temporarily unavailable" in why("import os\nwhile True: os.fork()")
    assert "Resource temporarily unavailable" in why("import subprocess; subprocess.run(['true'])")
    survivor = "import os, time\ntry: os.fork()\nexcept OSError: raise\ntime.sleep(1000)"
    assert "Resource temporarily unavailable" in why(survivor, SHORT)


def test_threads_are_allowed() -> None:
    program = "import threading as t\nseen = []\none = t.Thread(target=seen.append, args=(1,))\none.start(); one.join()"
    assert run(f"{program}\nassert seen == [1]").passed


def test_only_its_own_empty_folder_can_be_written(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("kept")
    for program in (f"open({str(target)!r}, 'w')", f"import os; os.remove({str(target)!r})", "open('/dev/shm/x', 'w')"):
        assert "Read-only" in why(program) or "No such file" in why(program)
    assert "Read-only" in why(f"open({str(Path.home() / 'sandbox-was-here')!r}, 'w')")
    assert "Read-only" in why("import os; os.mkdir('/tmp/sandbox-was-here')")
    assert target.read_text() == "kept"
    inside = "import os; assert os.listdir() == [] and os.environ['HOME'] == os.getcwd(); open('mine', 'w').write('x')"
    assert run(inside).passed


def test_what_it_writes_is_bounded() -> None:
    assert "File too large" in why("f = open('big', 'wb')\nwhile True: f.write(bytes(10**6))")
    assert "No space left" in why("for i in range(100): open(f'f{i}', 'wb').write(bytes(10**6))")


def test_endless_output_is_cut() -> None:
    outcome = run("while True: print('x' * 1000)")
    assert outcome.reason == f"printed more than {LIMITS.file_bytes} bytes"
    assert len(outcome.output) <= LIMITS.file_bytes


def test_the_environment_of_others_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "xyzzy")
    assert run("import os; assert set(os.environ) <= {'HOME', 'PATH', 'LANG', 'LC_CTYPE'}, os.environ").passed
    assert "No such file" in why(f"open('/proc/{os.getpid()}/environ').read()")
    assert "No such file" in why("import os; open(f'/proc/{os.getppid()}/environ').read()")


def test_other_processes_cannot_be_killed() -> None:
    with subprocess.Popen(["sleep", "60"]) as bystander:
        assert "No such process" in why(f"import os; os.kill({bystander.pid}, 9)")
        assert "No such process" in why("import os; os.kill(-1, 9)")
        assert why("import os; os.kill(os.getppid(), 9)") == "killed by SIGKILL"  # its own group is all it has
        assert "No such process" in why(f"import os; os.kill({os.getpid()}, 9)")
        assert bystander.poll() is None
        bystander.kill()


def test_privileges_cannot_be_had_back() -> None:
    calls = {"mount": "L.mount(b'none', b'/tmp', b'tmpfs', 0, b'')", "unshare": "L.unshare(0x10000000)"}
    for call in calls.values():
        assert run(f"import ctypes; L = ctypes.CDLL(None, use_errno=True)\nassert {call} == -1").passed
    assert "Operation not permitted" in why("import os; os.chroot('.')")


def test_a_crash_of_the_interpreter_is_a_failure() -> None:
    assert why("import ctypes; ctypes.string_at(0)") == "killed by SIGSEGV"


def test_where_there_can_be_no_sandbox_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = tmp_path / "unshare"
    refusing.write_text("#!/bin/sh\necho 'unshare: unshare failed: Operation not permitted' >&2\nexit 1\n")
    refusing.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxError, match="refuses one: unshare: unshare failed: Operation not permitted; it needs"):
        sandbox.require()
    refusing.unlink()
    with pytest.raises(SandboxError, match="the program unshare is missing; it needs Linux"):
        run("open('/tmp/sandbox-ran', 'w')")


def test_a_door_that_cannot_be_closed_stops_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_capabilities = NAMESPACES[:1] + NAMESPACES[2:]  # the user is nobody in its own namespace
    monkeypatch.setattr(sandbox, "NAMESPACES", without_capabilities)
    with pytest.raises(SandboxError, match="Operation not permitted"):
        run("pass")


def verdict(machine: str, number: int, argument: int = 0, audit: int | None = None) -> int:
    """What the kernel would answer to a system call, by its rules for classic BPF."""
    words = {0: number, 4: MACHINES[machine].audit if audit is None else audit, 16: argument}
    lines, place, value = system_call_filter(machine), 0, 0
    tests = {0x15: lambda k: value == k, 0x35: lambda k: value >= k, 0x45: lambda k: bool(value & k)}
    while True:
        operation, yes, no, k = lines[place]
        place += 1
        if operation == 0x06:
            return k
        if operation == 0x20:
            value = words[k]
        else:
            place += yes if tests[operation](k) else no


@pytest.mark.parametrize("machine", MACHINES)
def test_the_filter_refuses_processes_and_sockets_on_each_machine(machine: str) -> None:
    calls = MACHINES[machine]
    assert verdict(machine, calls.clone, argument=17) == ERRNO | EAGAIN  # SIGCHLD: a process
    assert verdict(machine, calls.clone, argument=CLONE_THREAD | 0xF00) == ALLOW
    assert verdict(machine, calls.clone3) == ERRNO | ENOSYS
    assert {verdict(machine, call) for call in calls.refused} == {ERRNO | EPERM}
    assert verdict(machine, 0) == verdict(machine, 63) == verdict(machine, 220 if machine == "x86_64" else 56) == ALLOW
    assert verdict(machine, 0, audit=0x40000003) == KILL, "calls of another machine's numbering"
    assert verdict(machine, X32 | 57) == ERRNO | EPERM
