"""Tests of queuectl, nearly all by its command line, and whatever runs or waits as the real program.

Every test has a queue of its own (fixture `q`): a folder for the database, one to work in, an empty HOME.
Pools, runs and what waits are processes: `python queuectl …`. A short command, such as `enqueue`, runs in pytest's
own process (`Queue.here`), with streams, folder and environment of its own: that takes a tenth of the time.
Nothing is mocked: workers are killed with -9, disks are full, locks are held. When a test fails, pytest shows
under "Captured stdout" each command it ran, with its exit code and what it printed.

Waiting is always `wait_for` a condition with a deadline. Jobs tell what they did by files in `q.work`, the
folder they run in. After a test nothing of it may still run: `Queue.close` looks in /proc and fails it.

`make test` is `python test_queuectl.py`: it finds or installs pytest, and runs the tests in several forks
(`pytest_runtestloop`). `python -m pytest test_queuectl.py` runs them one by one.
QUEUECTL_TEST_FULL=1 runs the tests of scale in full size, and those that take minutes.

Rooms: harness · values and store · saboteur jobs · seeds · enqueue · worker and pool · time · stop and signals ·
reading · dlq, retry, delete, cancel · config · bad input · output faults · database faults · scale ·
storms · found by attack · an operator's day · cancelled, selections, mending · what is going on, what was done ·
schedules · Windows (see .ci/windows)
"""

from __future__ import annotations

import argparse
import ast
import base64
import ctypes
import hashlib
import heapq
import importlib.util
import itertools
import json
import multiprocessing.connection
import os
import random
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import stat
import struct
import subprocess
import sys
import sysconfig
import threading
import time
import traceback
import unicodedata
import urllib.parse
import warnings
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import datetime, timezone
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, Mapping, NamedTuple, NoReturn, Sequence, Union

PYTEST = ("-p", "no:cacheprovider", "-p", "test_queuectl")  # this file is also a plugin: pytest_runtestloop


def python_with_pytest() -> str:
    """A Python of this version that has pytest: this one, or that of a folder .venv/3.8, made here if need be."""
    if importlib.util.find_spec("pytest"):
        return sys.executable
    folder = Path(".venv", "%d.%d" % sys.version_info[:2])
    python = str(folder / "bin" / "python")
    if subprocess.call([python, "-c", "import pytest"], stderr=subprocess.DEVNULL) if folder.exists() else True:
        print(f"{sys.executable} has no pytest; it is installed in {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "0", "pytest"]
        subprocess.run(pip, check=True, stderr=subprocess.PIPE)
    return python


def run_tests(args: Sequence[str]) -> NoReturn:
    """What `make test` does: pytest with these arguments, and none of the plugins that happen to be installed."""
    os.chdir(Path(__file__).resolve().parent)
    try:
        python = python_with_pytest()
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace").splitlines()
        sys.exit(f"there is no pytest, and it could not be installed (no network, or no venv): {[error, *said][-1]}")
    named = any("test_queuectl.py" in arg for arg in args)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    os.execv(python, [python, "-m", "pytest", *PYTEST, *([] if named else ["test_queuectl.py"]), *args])


if __name__ == "__main__":
    run_tests(sys.argv[1:])

import pytest  # noqa: E402

import queuectl  # noqa: E402

PROGRAM = Path(__file__).resolve().parent / "queuectl.py"
SCRIPT = (sys.executable, PROGRAM)
LINUX = sys.platform.startswith("linux")
FULL = os.environ.get("QUEUECTL_TEST_FULL") == "1"
ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
WINDOWS = os.name == "nt"
WINE = WINDOWS and hasattr(ctypes.WinDLL("ntdll"), "wine_get_version")

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # Queue.look
posix = pytest.mark.skipif(WINDOWS, reason="drives /bin/sh, signals and terminals")
windows = pytest.mark.skipif(not WINDOWS, reason="needs Windows, or wine: see .ci/windows")
not_wine = pytest.mark.skipif(WINE, reason="wine can't do that, and Windows can")
linux = pytest.mark.skipif(not LINUX, reason="looks into /proc or /dev/full, or uses setsid(1)")
full = pytest.mark.skipif(not FULL, reason="takes long: set QUEUECTL_TEST_FULL=1")


def can_unshare() -> bool:
    try:
        return (
            subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], stderr=subprocess.DEVNULL).returncode == 0
        )
    except OSError:
        return False


containers = pytest.mark.skipif(not (LINUX and ROOT and can_unshare()), reason="makes namespaces, as root of Linux may")
not_root = pytest.mark.skipif(ROOT, reason="root may read and write everything")

# What the tests of a room need (None: nothing): each entry is the line from which on they need it.
NEEDS: list[tuple[int, Any]] = []


def room(needs: Any) -> None:
    """The tests from here to the next call need this; `mark_rooms` gives them the mark."""
    NEEDS.append((sys._getframe(1).f_lineno, needs))


def mark_rooms(names: dict[str, Any]) -> None:
    """Mark the tests among these names. Those that need Windows aren't there elsewhere: see `test_windows`."""
    for name, test in list(names.items()):
        if name.startswith("test_"):
            needs = [mark for line, mark in NEEDS if line < test.__code__.co_firstlineno][-1:]
            if needs == [windows] and not WINDOWS:
                del names[name]
            elif needs not in ([], [None]):
                names[name] = needs[0](test)


Word = Union[str, bytes, Path]
Job = Dict[str, Any]
UNCHANGED: Mapping[str, Any] = {}

JOB_FIELDS = {
    "id", "command", "shell", "state", "queue", "priority", "run_at", "timeout_seconds", "attempts", "max_retries",
    "backoff_base", "cwd", "env", "after", "after_any", "unique", "retry_after", "dead_on",
    "expires_at", "created_at", "updated_at",
    "started_at", "finished_at", "next_retry_at",
    "exit_code", "last_error", "locked_by", "locked_at",
}  # fmt: skip
RUN_FIELDS = {
    "run", "attempt", "state", "started_at", "finished_at", "duration_seconds", "exit_code", "error", "worker",
    "stdout", "stderr",
}  # fmt: skip
STATES = ("pending", "processing", "completed", "failed", "dead", "cancelled")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


# =====================================================================================================
# harness: run the program, keep what it said, wait for what it does, leave nothing behind
# =====================================================================================================


class Result(NamedTuple):
    """One finished command."""

    args: tuple[Word, ...]
    code: int
    out: str
    err: str

    def __repr__(self) -> str:
        words = " ".join(shlex.quote(shorten(os.fsdecode(word), 300)) for word in self.args)
        return f"$ {words}\n[exit {self.code}]\n--- stdout\n{shorten(self.out)}\n--- stderr\n{shorten(self.err)}"

    def json(self) -> Any:
        return json.loads(self.out)

    def raw(self) -> bytes:
        """What stood on stdout, byte by byte."""
        return self.out.encode("utf-8", "surrogateescape")


def shorten(text: str, limit: int = 3000) -> str:
    """`text`, without its middle if it is long."""
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]} …({len(text) - limit} characters)… {text[-limit // 2 :]}"


def decode(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def wait_for(condition: Callable[[], Any], timeout: float = 20, what: str = "a condition", every: float = 0.03) -> Any:
    """Ask until `condition` is true, and return what it said; past the deadline the test fails."""
    __tracebackhide__ = True
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            pytest.fail(f"waited {timeout} s for {what}; the last answer was {value!r}")
        time.sleep(every)


def moment(text: str) -> float:
    """The time that queuectl shows as 2026-01-31T10:00:00.000Z, in seconds."""
    assert TIME.fullmatch(text), text
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=timezone.utc).timestamp()


def contents(folder: Path) -> dict[str, bytes]:
    """The files there that say anything: without empty ones, pipes, and SQLite's shared memory."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.endswith("-shm")]
    return {path.name: path.read_bytes() for path in files if path.stat().st_size}


class Process(NamedTuple):
    pid: int
    command: str


def read_proc(pid: str, name: str) -> bytes:
    try:
        return Path("/proc", pid, name).read_bytes()
    except OSError:
        return b""


def links(pid: str) -> Iterator[bytes]:
    """Where a process stands, and the files it has open."""
    try:
        names = ["cwd"] + ["fd/" + fd for fd in os.listdir(f"/proc/{pid}/fd")]
    except OSError:
        return
    for name in names:
        try:
            yield os.fsencode(os.readlink(f"/proc/{pid}/{name}")) + b"/"
        except OSError:
            pass


def clock_ticks() -> int:
    """Now, as /proc/PID/stat tells when a process began."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK")) if LINUX else 0


def processes_of(folder: Path, since: int) -> list[Process]:
    """Live processes that carry `folder` in environment, command line, working folder or open files (Linux)."""
    if not LINUX:
        return []
    mark, found = os.fsencode(folder) + b"/", []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        status = read_proc(pid, "stat").rpartition(b")")[2].split()
        if not status or status[0] in b"ZX" or int(status[19]) < since:
            continue
        command = read_proc(pid, "cmdline")
        if mark in read_proc(pid, "environ") or mark in command or any(link.startswith(mark) for link in links(pid)):
            found.append(Process(int(pid), decode(command).replace("\0", " ")))
    return found


class Background:
    """A command that runs beside the test; what it prints goes to two files."""

    def __init__(self, words: Sequence[Word], logs: Path, env: dict[str, str], cwd: Path) -> None:
        self.words = tuple(words)
        self.files = (logs.with_suffix(".out"), logs.with_suffix(".err"))
        with open(self.files[0], "wb") as out, open(self.files[1], "wb") as err:
            self.process = subprocess.Popen(
                self.words, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=env, cwd=str(cwd),
                start_new_session=True,
            )  # fmt: skip

    def __repr__(self) -> str:
        return f"(in the background) {Result(self.words, self.process.poll(), self.out, self.err)!r}"  # type: ignore

    @property
    def out(self) -> str:
        return decode(self.files[0].read_bytes())

    @property
    def err(self) -> str:
        return decode(self.files[1].read_bytes())

    @property
    def text(self) -> str:
        return self.out + self.err

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = 20) -> int:
        """Its exit code, once it has ended by itself."""
        __tracebackhide__ = True
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            pass
        pytest.fail(f"still running after {timeout} s: {self!r}")

    def stop(self) -> int:
        """Ask it to finish, and wait until it has."""
        self.signal(signal.SIGTERM)
        return self.wait()


class Terminal(Background):
    """A command at a terminal of its own (a pseudo-terminal that it controls)."""

    # Between fork and exec, so that this process needs no preexec_fn: a new session, and its terminal.
    LOGIN = (
        "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )

    def __init__(
        self, words: Sequence[Word], env: dict[str, str], cwd: Path, columns: int = 80, rows: int = 24
    ) -> None:
        import fcntl
        import pty
        import termios

        self.words = tuple(words)
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.LOGIN, *self.words],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=env,
            cwd=str(cwd),
        )
        os.close(slave)
        self.received = b""
        self.reader = threading.Thread(target=self.read_all, daemon=True)
        self.reader.start()

    def read_all(self) -> None:
        while True:
            try:
                data = os.read(self.master, 65536)
            except OSError:
                return
            if not data:
                return
            self.received += data

    @property
    def out(self) -> str:
        return self.received.decode("utf-8", "replace").replace("\r\n", "\n")

    @property
    def err(self) -> str:
        return ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def hang_up(self) -> None:
        """Close the window: who is at this terminal gets SIGHUP, and errors from then on."""
        if self.master >= 0:
            os.close(self.master)
            self.master = -1


SHORT_COMMANDS = {
    "cancel", "config", "delete", "dlq", "doctor", "edit", "enqueue", "list", "logs", "purge", "queue", "retry",
    "schedule", "show", "stats", "status", "why",
}  # fmt: skip
LONG_OPTIONS = {"--follow", "-f", "--wait", "--watch"}
ONE_AT_A_TIME = threading.RLock()


@contextmanager
def standing_in(folder: Path, env: Mapping[str, str]) -> Iterator[None]:
    """Have this process another working folder, environment and name for a while."""
    before, name, ours = os.getcwd(), sys.argv[0], dict(os.environ)
    os.chdir(str(folder))
    os.environ.clear()
    os.environ.update(env)
    sys.argv[0] = "queuectl"
    try:
        yield
    finally:
        sys.argv[0] = name
        os.environ.clear()
        os.environ.update(ours)
        os.chdir(before)


@contextmanager
def streams_from(files: Sequence[Path]) -> Iterator[None]:
    """Have this process these files as its standard streams for a while; its stores stay its own."""
    ours = (sys.stdin, sys.stdout, sys.stderr)
    kept = [os.dup(number) for number in range(3)]
    stores = queuectl.OPENED[:]
    queuectl.OPENED.clear()
    try:
        for number, (path, mode) in enumerate(zip(files, "rww")):
            with open(path, mode) as file:
                os.dup2(file.fileno(), number)
        sys.stdin, sys.stdout, sys.stderr = (
            open(number, mode, encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115
            for number, mode, errors in zip(range(3), "rww", ("surrogateescape", "strict", "backslashreplace"))
        )
        yield
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    finally:
        sys.stdin, sys.stdout, sys.stderr = ours
        for number, copy in enumerate(kept):
            os.dup2(copy, number)
            os.close(copy)
        queuectl.OPENED[:] = stores


class Queue:
    """A queue in folders of its own, and the program that works on it: `q("enqueue", "echo hi")`."""

    program: Sequence[Word] = SCRIPT  # see `installed`

    def __init__(self, folder: Path) -> None:
        self.folder, self.born = folder, clock_ticks() - 1
        self.home, self.work, self.db = folder / "home", folder / "work", folder / "queue" / "queue.db"
        for path in (self.home, self.work, self.db.parent):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.env = self.environment()
        self.background: list[Background] = []
        self.may_leave = False  # set by a test whose completed jobs leave daemons on purpose

    def environment(self) -> dict[str, str]:
        """That of pytest, without what would change how queuectl behaves."""
        ours = ("QUEUECTL_", "PYTEST_", "PYTHON", "LC_", "LANG", "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")
        env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        env.update(
            HOME=str(self.home),
            USERPROFILE=str(self.home),
            QUEUECTL_DB=str(self.db),
            TERM="xterm-256color",
            PYTHONDONTWRITEBYTECODE="1",
        )
        env["PATH"] = os.path.dirname(str(self.program[-1])) + os.pathsep + env["PATH"]  # as one that was installed
        env["LC_ALL"] = "C.UTF-8" if LINUX else "en_US.UTF-8"
        return env

    def with_env(self, changes: Mapping[str, Any]) -> dict[str, str]:
        """The environment with these changes; None removes a variable."""
        merged = {**self.env, **changes}
        return {name: str(value) for name, value in merged.items() if value is not None}

    # Running

    def run(
        self, words: Sequence[Word], stdin: str = "", env: Mapping[str, Any] = UNCHANGED, cwd: Any = None
    ) -> Result:
        """Any program, to its end."""
        try:
            done = subprocess.run(
                words, input=stdin.encode("utf-8", "surrogateescape"), capture_output=True, timeout=120,
                env=self.with_env(env), cwd=str(cwd or self.work),
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            pytest.fail(f"no end after 120 s: {Result(tuple(words), -1, repr(error.stdout), repr(error.stderr))}")
        except OSError as error:
            if not WINE or error.winerror != 1359:  # wine's CreateProcess has an "internal error" now and then
                raise
            return self.run(words, stdin, env, cwd)
        result = Result(tuple(words), done.returncode, decode(done.stdout), decode(done.stderr))
        print(result)
        return result

    def __call__(self, *args: Word, code: Any = 0, **options: Any) -> Result:
        """queuectl with these arguments; `code` is the exit code it must have, or several, or None for any."""
        __tracebackhide__ = True
        result = self.command(args, **options)
        wanted = code if isinstance(code, tuple) else (code,)
        if code is not None and result.code not in wanted:
            pytest.fail(f"exit {result.code}, expected {code}\n{result!r}")
        if "QUEUECTL_DEBUG" not in options.get("env", {}):
            assert "Traceback (most recent call last)" not in result.err, result
        return result

    def command(
        self, args: Sequence[Word], stdin: str = "", env: Mapping[str, Any] = UNCHANGED, cwd: Any = None
    ) -> Result:
        """One command; in this process if it neither starts others nor waits, and if Python's settings don't matter."""
        plain = args and args[0] in SHORT_COMMANDS and not set(args) & LONG_OPTIONS
        if plain and not any(name.startswith(("LC_", "LANG", "LD_", "PYTHON", "TZ")) for name in env):
            return self.here(args, stdin, env, cwd)
        return self.run([*self.program, *args], stdin, env, cwd)

    def fails(self, *args: Word, code: Any = 1, **options: Any) -> Result:
        """A command that must fail as all do: nothing on stdout, one line on stderr that begins alike."""
        result = self(*args, code=code, **options)
        check_error(result)
        return result

    def bash(self, script: str, code: Any = 0, **options: Any) -> Result:
        """A script in which `queuectl` is the program."""
        result = self.run(["bash", "-c", define(self.program) + script], **options)
        assert code is None or result.code == code, result
        return result

    def start(self, *args: Word, env: Mapping[str, Any] = UNCHANGED, cwd: Any = None) -> Background:
        """queuectl in the background."""
        return self.launch([*self.program, *args], env, cwd)

    def launch(self, words: Sequence[Word], env: Mapping[str, Any] = UNCHANGED, cwd: Any = None) -> Background:
        logs = self.folder / f"background{len(self.background)}"
        self.background.append(Background(words, logs, self.with_env(env), cwd or self.work))
        return self.background[-1]

    def terminal(self, *args: Word, columns: int = 80, env: Mapping[str, Any] = UNCHANGED) -> Terminal:
        """queuectl at a terminal, in the background."""
        terminal = Terminal([*self.program, *args], self.with_env(env), self.work, columns=columns)
        self.background.append(terminal)
        return terminal

    def at_terminal(self, *args: Word, columns: int = 80, env: Mapping[str, Any] = UNCHANGED) -> str:
        """What queuectl shows at a terminal, to its end (exit 0)."""
        terminal = self.terminal(*args, columns=columns, env=env)
        assert terminal.wait() == 0, terminal
        terminal.reader.join(5)
        return terminal.out

    def pool(self, *args: Word, **options: Any) -> Background:
        """`worker start` in the background, ready to work."""
        before = self.workers()
        pool = self.start("worker", "start", *args, **options)
        self.wait_ready(pool, before + (int(str(args[args.index("--count") + 1])) if "--count" in args else 1))
        return pool

    @contextmanager
    def working(self, *args: Word, **options: Any) -> Iterator[Background]:
        """A pool that works meanwhile, is then asked to finish, and does so without an error."""
        pool = self.pool(*args, **options)
        yield pool
        if WINDOWS:  # where nobody can signal it
            self("worker", "stop")
        else:
            pool.signal(signal.SIGTERM)
        assert pool.wait() == 0, pool

    def wait_ready(self, pool: Background, workers: int) -> None:
        def ready() -> bool:
            assert not pool.ended, pool
            return self.workers() >= workers

        wait_for(ready, what=f"{workers} live workers")

    def drain(self, *args: Word, code: Any = 0, **options: Any) -> Result:
        """Work on everything there is to its end."""
        return self("worker", "start", "--drain", *args, code=code, **options)

    # Preparing and looking: there is much of it, and it isn't what is under test. So it is done in this process.

    def here(
        self, words: Sequence[Word], stdin: str = "", env: Mapping[str, Any] = UNCHANGED, cwd: Any = None
    ) -> Result:
        """What a command does and says, without a process of its own: a hundredth of the time."""
        files = [self.folder / f"here.{name}" for name in ("in", "out", "err")]
        files[0].write_bytes(stdin.encode("utf-8", "surrogateescape"))
        with ONE_AT_A_TIME, standing_in(cwd or self.work, self.with_env(env)), streams_from(files):
            code = queuectl.run_command([os.fsdecode(word) for word in words])
            queuectl.close_stores()
        result = Result(("queuectl", *words), code, *(decode(path.read_bytes()) for path in files[1:]))
        print(result)
        return result

    def quick(self, *args: Word) -> str:
        """What a command prints that has to succeed and isn't the one under test."""
        result = self.here(args)
        assert result.code == 0, result
        return result.out

    def add(self, command: str, *options: str) -> str:
        """Enqueue one shell command; its id."""
        return self.quick("enqueue", "--quiet", *options, "--", command).rstrip("\n")

    def load(self, jobs: Sequence[Any], *options: str) -> list[str]:
        """Enqueue many, each a command or the fields of a job, in one call; their ids."""
        file = self.folder / "jobs.json"
        lines = [json.dumps(job if isinstance(job, dict) else {"command": job}) for job in jobs]
        file.write_text("\n".join(lines) + "\n")
        return self.quick("enqueue", "--quiet", "--file", str(file), *options).splitlines()

    def set(self, key: str, value: str) -> None:
        self.quick("config", "set", key, value)

    def look(self, *args: str) -> Any:
        return json.loads(self.quick(*args, "--json"))

    def jobs(self, *options: str) -> list[Job]:
        return self.look("list", *options)  # type: ignore[no-any-return]

    def show(self, job: str) -> Job:
        return self.look("show", job)  # type: ignore[no-any-return]

    def state(self, job: str) -> str:
        return str(self.show(job)["state"])

    def states(self) -> dict[str, str]:
        return {job["id"]: job["state"] for job in self.jobs()}

    def status(self) -> dict[str, Any]:
        return self.look("status")  # type: ignore[no-any-return]

    def workers(self) -> int:
        return int(self.status()["workers"])

    def counts(self) -> dict[str, int]:
        """Jobs by state, without those states that have none."""
        return {state: count for state, count in self.status()["jobs"].items() if count}

    def wait_state(self, job: str, state: str, timeout: float = 20) -> None:
        wait_for(lambda: self.state(job) == state, timeout, f"{job} to be {state}")

    def wait_file(self, name: str, timeout: float = 20) -> str:
        """What a job has written to a file, once it has."""
        wait_for((self.work / name).exists, timeout, f"the file {name}")
        return (self.work / name).read_text()

    def log(self) -> str:
        """What detached pools have written."""
        return (self.db.parent / "queuectl.log").read_text()

    def lines(self, name: str) -> list[str]:
        path = self.work / name
        return path.read_text().splitlines() if path.exists() else []

    def touch(self, name: str) -> None:
        (self.work / name).touch()

    # Leaving

    def processes(self) -> list[Process]:
        return processes_of(self.folder, self.born)

    def left_over(self) -> list[Process]:
        """What still runs although every pool has ended, after a moment to go."""
        if self.may_leave or not all(pool.ended for pool in self.background):
            return []
        deadline = time.monotonic() + 2
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.processes()

    def close(self) -> None:
        """End everything that carries this folder; that is an error if its pools had ended and it had not."""
        left = self.left_over()
        if WINDOWS:  # where killed pools leave workers, and pools in the background can't be found
            self.here(["worker", "stop", "--now"])
        deadline = time.monotonic() + 10
        while True:
            for pool in self.background:
                if not pool.ended:
                    pool.process.kill()
            alive = self.processes()
            for process in alive:
                kill(process.pid, signal.SIGKILL)
            if not alive and all(pool.ended for pool in self.background):
                break
            assert time.monotonic() < deadline, f"can't be killed: {alive}"
            time.sleep(0.02)
        for pool in self.background:
            print(pool)
            if isinstance(pool, Terminal):
                pool.hang_up()
        assert not left, f"left behind: {left}"


def define(program: Sequence[Word]) -> str:
    """What makes `queuectl` a command in a script for bash."""
    return f'queuectl() {{ {" ".join(shlex.quote(str(word)) for word in program)} "$@"; }}\n'


def children(pid: int) -> list[int]:
    return [int(child) for child in read_proc(str(pid), f"task/{pid}/children").split()]


def check_error(result: Result) -> None:
    """An error is one line on stderr, which begins as all do, and nothing on stdout."""
    assert result.out == "", result
    assert re.fullmatch(r"queuectl: error: [^\n]+\n", result.err), result


def kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def kill_pool(pool: Background) -> None:
    """Kill a supervisor, and its workers after it: it would replace them."""
    for pid in [pool.process.pid, *children(pool.process.pid)]:
        kill(pid, signal.SIGKILL)
    pool.wait()


# Forks of pytest, which has collected, run the tests; pytest itself shows what they report.


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Reporter:
    """In a fork, in the terminal reporter's place: sends how a test went, instead of showing it."""

    def __init__(self, config: pytest.Config, reports: Connection) -> None:
        self.config, self.reports, self.live = config, reports, False
        self._tw = config.get_terminal_writer()  # by which pytest formats what an assertion compares

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        hook = self.config.hook
        self.reports.send(hook.pytest_report_to_serializable(config=self.config, report=report))

    def pytest_warning_recorded(self, warning_message: Any, when: str, nodeid: str, location: Any) -> None:
        if self.live:  # else pytest repeats what it has shown before there were forks
            told = warning_message  # which may hold what can't be sent
            message = warnings.WarningMessage(str(told.message), told.category, told.filename, told.lineno)
            known = {"warning_message": message, "when": when, "nodeid": nodeid, "location": location}
            self.reports.send(("warning", known))


def run_ordered(session: pytest.Session, orders: Connection, reports: Connection) -> None:
    """In a fork: run the tests whose numbers are ordered, until there is no other."""
    plugins = session.config.pluginmanager
    reporter = Reporter(session.config, reports)
    plugins.unregister(plugins.getplugin("terminalreporter"))
    plugins.register(reporter, "terminalreporter")
    reporter.live = True
    capture: Any = plugins.getplugin("capturemanager")
    capture.stop_global_capturing()  # its files are those of all forks
    capture.start_global_capturing()
    capture.suspend_global_capture(in_=True)
    number = orders.recv()
    while number is not None:
        reports.send("ready")  # what follows a test tells pytest which fixtures it may keep
        following = orders.recv()
        nextitem = None if following is None else session.items[following]
        session.config.hook.pytest_runtest_protocol(item=session.items[number], nextitem=nextitem)
        if following is None:
            reports.send("idle")
            following = orders.recv()
        number = following


def be_runner(session: pytest.Session, orders: Connection, reports: Connection) -> NoReturn:
    """The life of a fork: also if it is interrupted, its test leaves nothing behind."""

    def interrupted(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # once is enough: what follows is the test's teardown
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupted)
    try:
        run_ordered(session, orders, reports)
    except (KeyboardInterrupt, EOFError, BrokenPipeError):  # pytest itself ends, or is gone
        pass
    except BaseException:
        reports.send(("error", traceback.format_exc()))
    finally:
        try:
            session._setupstate.teardown_exact(None)
        finally:
            os._exit(0)


class Runner:
    """In pytest: a fork that runs tests; `running` and `following` are the numbers of those it was given."""

    def __init__(self, session: pytest.Session, others: Sequence[Runner], number: int) -> None:
        orders, self.give = multiprocessing.Pipe(False)
        self.take, reports = multiprocessing.Pipe(False)
        self.running: int | None = None
        self.error = ""
        self.pid = os.fork()
        if not self.pid:
            for runner in (*others, self):  # so the end of pytest is the end of its orders
                runner.close()
            be_runner(session, orders, reports)
        orders.close()
        reports.close()  # so the end of a fork is the end of its reports
        self.order(number)

    def order(self, number: int | None) -> None:
        self.following = number
        with suppress(BrokenPipeError):  # it has died, which the end of its reports will tell
            self.give.send(number)

    def close(self) -> None:
        self.take.close()
        self.give.close()

    def interrupt(self) -> None:
        self.close()
        kill(self.pid, signal.SIGINT)

    def reap(self) -> int:
        """Wait until it has ended, for as long as the end of a test may take; its wait status."""
        deadline = time.monotonic() + 15
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return status
            if time.monotonic() > deadline:
                kill(self.pid, signal.SIGKILL)
            time.sleep(0.01)


def how_it_ended(status: int) -> str:
    return f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"


class Foreman:
    """In pytest: has the tests run by forks, and tells how they went."""

    def __init__(self, session: pytest.Session) -> None:
        self.session, self.hook = session, session.config.hook
        self.waiting = self.in_order()[::-1]
        self.runners: dict[Any, Runner] = {}

    def in_order(self) -> list[int]:
        """The numbers of the tests. Those with an engine mostly wait, so they are spread among the others."""
        items = self.session.items
        waiting = [number for number, item in enumerate(items) if "engine" in getattr(item, "fixturenames", ())]
        place = {number: nth * len(items) // len(waiting) for nth, number in enumerate(waiting)}
        return sorted(range(len(items)), key=lambda number: place.get(number, number))

    def next(self) -> int | None:
        stop = self.session.shouldfail or self.session.shouldstop
        return self.waiting.pop() if self.waiting and not stop else None

    def start(self) -> None:
        number = self.next()
        if number is not None:
            self.session.config.get_terminal_writer().flush()
            runner = Runner(self.session, list(self.runners.values()), number)
            self.runners[runner.take] = runner

    def hear(self, runner: Runner, word: Any) -> None:
        if word == "ready":
            runner.running = runner.following
            # With -x what follows is not known before this test has passed.
            runner.order(None if self.session.config.option.maxfail else self.next())
        elif word == "idle":
            runner.running = None
            runner.order(self.next())
        elif isinstance(word, dict):
            report = self.hook.pytest_report_from_serializable(config=self.session.config, data=word)
            self.hook.pytest_runtest_logreport(report=report)
        elif word[0] == "warning":
            self.hook.pytest_warning_recorded.call_historic(kwargs=word[1])
        else:
            runner.error = word[1]

    def bury(self, runner: Runner) -> None:
        """It has ended: that is a failure of the test that it ran; the one that was to follow is given to another."""
        del self.runners[runner.take]
        runner.close()
        status = runner.reap()
        given = [number for number in (runner.running, runner.following) if number is not None]
        if given:
            item = self.session.items[given[0]]
            how = runner.error or f"the process that ran this test has ended ({how_it_ended(status)})"
            report = pytest.TestReport(item.nodeid, item.location, {}, "failed", how, "call")
            self.hook.pytest_runtest_logreport(report=report)
            self.waiting += given[1:]
            self.start()

    def run(self) -> None:
        try:
            for _ in range(2 * cores()):
                self.start()
            while self.runners:
                for take in multiprocessing.connection.wait(list(self.runners)):
                    runner = self.runners[take]
                    try:
                        self.hear(runner, runner.take.recv())
                    except EOFError:
                        self.bury(runner)
        finally:
            for runner in self.runners.values():
                runner.interrupt()
            for runner in self.runners.values():
                runner.reap()


def pytest_runtestloop(session: pytest.Session) -> object:
    """Run the tests in two forks a core, for they often wait; None, for pytest's own loop, where that is no use."""
    options = session.config.option
    shown = session.config.pluginmanager.hasplugin("terminalreporter")
    few = len(session.items) < 2
    if few or not shown or options.collectonly or options.usepdb or options.capture == "no" or session.testsfailed:
        return None
    Foreman(session).run()
    if session.shouldfail:
        raise session.Failed(session.shouldfail)
    if session.shouldstop:
        raise session.Interrupted(session.shouldstop)
    return True


@pytest.fixture(scope="session", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Most tests call the program as `make install` leaves it, compiled and without site-packages: that takes a
    third of the time. The seeds, and what depends on the environment of Python, run the script itself.
    """
    folder = tmp_path_factory.mktemp("installed")
    (folder / "queuectl").write_text(
        f"import sys\nsys.path.insert(0, {str(PROGRAM.parent)!r})\nfrom queuectl import main\n\n"
        "if __name__ == '__main__':\n    sys.exit(main())\n"
    )
    Queue.program = (sys.executable, "-IS", "-X", f"pycache_prefix={folder}", folder / "queuectl")
    subprocess.run([*Queue.program, "--version"], stdout=subprocess.DEVNULL, check=True)  # which compiles it


@pytest.fixture
def q(tmp_path: Path) -> Iterator[Queue]:
    queue = Queue(tmp_path)
    yield queue
    queue.close()


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Queue]:
    """A queue for reading alone: a dead job `one`, a completed one and a waiting one."""
    queue = Queue(tmp_path_factory.mktemp("settled"))
    dead = {"id": "one", "command": "echo 'a long story' >&2; exit 4", "max_retries": 1, "queue": "mail"}
    queue.load([dead, "echo fine", {"command": "true", "delay": "1h"}])
    queue.drain(code=1)
    yield queue
    queue.close()


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Queue]:
    """A second queue, as if on another machine."""
    queue = Queue(tmp_path / "other")
    yield queue
    queue.close()


# =====================================================================================================
# values and store: units of the program, called directly
# =====================================================================================================

NOW = 1_767_225_600_000  # 2026-01-01T00:00:00Z in milliseconds


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("90", 90),
        ("1.5", 1.5),
        (".5", 0.5),
        (7, 7),
        (0.25, 0.25),
        ("500ms", 0.5),
        ("30s", 30),
        ("5m", 300),
        ("2h", 7200),
        ("1d", 86400),
        ("1h30m", 5400),
        ("1.5h", 5400),
        ("1m500ms", 60.5),
        ("1e2", 100),
    ],
)
def test_durations_are_read(text: Any, seconds: float) -> None:
    assert queuectl.to_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", " 5", "5 m", "5x", "m", "1h 30m", "--5", "1_0", "nan", "inf", "5m!", True, None, [1]]
)
def test_what_is_no_duration_is_refused(text: Any) -> None:
    with pytest.raises(queuectl.UsageError):
        queuectl.checked("delay", text)


@pytest.mark.parametrize(
    "text, millis",
    [
        ("2026-01-01T00:00:00Z", NOW),
        ("2026-01-01T00:00:00", NOW),
        ("2026-01-01 00:00", NOW),
        ("2026-01-01", NOW),
        ("2026-01-01T01:00:00+01:00", NOW),
        ("2025-12-31T19:30:00-0430", NOW),
        ("2026-01-01T00:00:00.000Z", NOW),
        ("2026-01-01T00:00:00.0001Z", NOW + 1),
        ("2026-01-01T00:00:00.123456789Z", NOW + 124),
        ("1969-12-31T23:59:59.5Z", -500),
        ("now", NOW),
        ("now+5m", NOW + 300_000),
    ],
)
def test_times_are_read_and_rounded_up(text: str, millis: int) -> None:
    assert queuectl.parse_time(text, NOW) == millis


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tomorrow",
        "2026-13-01",
        "2026-02-30T00:00:00Z",
        "2026-01-01T25:00:00Z",
        "now-5m",
        "now+",
        "2026-01-01T00:00:00Zx",
        "٢٠٢٦-01-01",
        "0000-01-01",
        "0001-01-01T00:00:00+99:99",
        5,
    ],
)
def test_what_is_no_time_is_refused(text: Any) -> None:
    with pytest.raises(queuectl.UsageError):
        queuectl.parse_time(text, NOW)


def test_times_are_shown_as_they_are_read() -> None:
    for millis in (0, 1, NOW, NOW + 999, 253_402_300_799_999):
        assert queuectl.parse_time(queuectl.show_time(millis), 0) == millis


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0ms"),
        (0.0066, "7ms"),
        (0.1, "0.10s"),
        (0.564, "0.56s"),
        (12.34, "12.3s"),
        (59.94, "59.9s"),
        (60, "1m 0s"),
        (303, "5m 3s"),
        (7620, "2h 7m"),
        (86400, "1d 0h"),
        (273_600, "3d 4h"),
        (40_000_000, "462d 23h"),
    ],
)
def test_durations_are_shown(seconds: float, text: str) -> None:
    assert queuectl.show_duration(seconds) == text


@pytest.mark.parametrize(
    "base, attempts, longest, jitter, chance, seconds",
    [
        (2, 1, 3600, 0, 0.5, 2),
        (2, 2, 3600, 0, 0.5, 4),
        (2, 3, 3600, 0, 0, 8),
        (3, 2, 3600, 0, 0, 9),
        (2, 20, 3600, 0, 0, 3600),
        (2, 5000, 3600, 0, 0, 3600),
        (1e6, 5000, 3600, 0, 0, 3600),
        (0.5, 2, 3600, 0, 0, 0.25),
        (2, 1, 3600, 0.5, 1, 3),
        (2, 1, 3600, 0.5, 0, 2),
        (2, 9999, 10, 1, 0.5, 15),
        (10, 2, 0, 1, 1, 0),
    ],
)
def test_backoff_grows_to_its_cap(
    base: float, attempts: int, longest: float, jitter: float, chance: float, seconds: float
) -> None:
    assert queuectl.backoff(base, attempts, longest, jitter, chance) == seconds


@pytest.mark.parametrize(
    "ending, attempts, max_retries, outcome",
    [
        ("completed", 1, 3, ("completed", 1)),
        ("failed", 1, 3, ("failed", 1)),
        ("failed", 3, 3, ("dead", 3)),
        ("failed", 1, 0, ("dead", 1)),
        ("failed", 1, 1, ("dead", 1)),
        ("lost", 2, 3, ("failed", 2)),
        ("lost", 3, 3, ("dead", 3)),
        ("stopped", 1, 3, ("pending", 0)),
        ("stopped", 3, 3, ("pending", 2)),
        ("cancelled", 1, 3, ("cancelled", 1)),
    ],
)
def test_what_becomes_of_a_job(ending: str, attempts: int, max_retries: int, outcome: tuple[str, int]) -> None:
    assert queuectl.next_state(ending, attempts, max_retries) == outcome


@pytest.mark.parametrize(
    "text, fields",
    [
        ('{"command":"a"}', {"command": "a"}),
        ('{\\"command\\":\\"a\\"}', {"command": "a"}),
        ('{ \\"command\\":\\"echo \\\\\\"x\\\\\\"\\"}', {"command": 'echo "x"'}),
        ("{command:a}", {"command": "a"}),
        ("{id:j,command:echo a, b: c,priority:3}", {"id": "j", "command": "echo a, b: c", "priority": "3"}),
        ("{cmd:a,timeout:null}", {"cmd": "a", "timeout": None}),
        (' {"command":"a"} ', {"command": "a"}),
    ],
)
def test_objects_are_understood_where_they_are_unambiguous(text: str, fields: Job) -> None:
    assert queuectl.read_object(text) == fields


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "{}x",
        "{ a; b; }",
        '{command:"a"}',
        "{command:a,command:b}",
        "{command:}",
        "{'command':'a'}",
        pytest.param('{"a":' * 100_000, id="deep"),
        "{nothing:1}",
    ],
)
def test_objects_that_would_be_a_guess_are_refused(text: str) -> None:
    with pytest.raises(queuectl.UsageError):
        queuectl.read_object(text)


def test_options_win_over_json_whatever_the_field_is_called() -> None:
    text = '{"cmd":"a","timeout":5,"run_at":"2020-01-01","env":{"A":"1","B":"1"}}'
    draft = queuectl.read_job(text, NOW, {"timeout": "7", "delay": "1s", "env": {"B": "2"}})
    assert (draft["timeout_seconds"], draft["run_at"], draft["env"]) == (7, NOW + 1000, {"A": "1", "B": "2"})


@pytest.mark.parametrize(
    "text, shown",
    [
        ("plain é ✓", "plain é ✓"),
        ("a\tb\nc", "a\\tb\\nc"),
        ("\x1b[31m", "\\x1b[31m"),
        ("a\u202eb", "a\\u202eb"),
        ("\x9b", "\\x9b"),
        ("\ud800", "\\ud800"),
    ],
)
def test_characters_that_act_are_shown_escaped(text: str, shown: str) -> None:
    assert queuectl.clean(text) == shown


def test_wide_and_combining_characters_keep_a_table_in_line() -> None:
    lines = queuectl.table(("A", "B"), [("日本", "x"), ("e\u0301", "y"), ("plain", "z")], 0, False)
    assert [queuectl.text_width(line.rpartition(" ")[0]) for line in lines] == [6, 6, 6, 6]


@pytest.mark.parametrize("width", [10, 20, 40, 80, 200])
def test_a_table_fits_the_terminal(width: int) -> None:
    rows = [("0123456789", "completed", "1/3", "default", "10", "5m 3s ago", "echo " + "x" * 300)] * 3
    lines = queuectl.table(queuectl.JOB_HEAD, rows, width, False)
    assert max(map(queuectl.text_width, lines)) <= max(width, 7 * 4 + 12)


# The store alone, with a clock of its own.


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Any]:
    store = queuectl.Store(str(tmp_path / "queue.db"), patience=2)
    with store.transaction():
        store.add_pool("pool", 1, [], None, NOW)
    yield store
    store.close()


def put(store: Any, now: int = NOW, **fields: Any) -> None:
    draft = dict(dict.fromkeys(queuectl.GIVEN_FIELDS), command="true", cwd="/", **fields)
    with store.transaction():
        store.add([draft], store.settings(), "/bin", 0o22, now)


def take(store: Any, now: int = NOW, queues: Sequence[str] = ()) -> Any:
    with store.transaction():
        return store.claim("pool-1", 0, queues, store.pulse()[1], now)


def end(store: Any, job: Any, ending: str, now: int, retry_at: int = 0) -> str:
    ended = queuectl.RunResult(job, ending, 0, None, now, 0.1, b"out", b"", "pool-1")
    with store.transaction():
        return str(store.record(ended, retry_at, ["pool"], store.settings())[0])


def test_claims_go_by_priority_then_by_arrival_over_all_queues(store: Any) -> None:
    for name, priority, queue in (("a", 10, "x"), ("b", 1, "y"), ("c", 10, "x"), ("d", 1, "x"), ("e", -5, "z")):
        put(store, id=name, priority=priority, queue=queue)
    assert [take(store).id for _ in range(5)] == ["e", "b", "d", "a", "c"]
    assert take(store) is None


def test_claims_keep_to_the_queues_of_a_worker(store: Any) -> None:
    put(store, id="a", queue="x")
    put(store, id="b", queue="y")
    assert take(store, queues=["y", "nowhere"]).id == "b"
    assert take(store, queues=["y"]) is None


def test_a_job_waits_for_its_time_and_not_longer(store: Any) -> None:
    put(store, run_at=NOW + 1000)
    assert (store.next([]), store.pulse()[1]) == (None, NOW + 1000)
    assert take(store, NOW + 999) is None
    assert take(store, NOW + 1000) is not None


def test_many_jobs_due_at_once_are_made_ready_in_parts(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    drafts = [dict(dict.fromkeys(queuectl.GIVEN_FIELDS), command="true", cwd="/", run_at=NOW + 1)] * 25_000
    with store.transaction():
        store.add(drafts, store.settings(), "/bin", 0o22, NOW)
    assert [take(store, NOW + 1) is None for _ in range(3)] == [True, True, False]


def test_a_run_is_recorded_once(store: Any) -> None:
    put(store, id="a")
    job = take(store)
    assert end(store, job, "failed", NOW + 5, NOW + 2000) == "failed"
    assert end(store, job, "completed", NOW + 6) == ""
    shown = store.find("a")
    assert (shown["state"], shown["attempts"], shown["next_retry_at"]) == ("failed", 1, NOW + 2000)
    assert len(list(store.runs(shown["seq"]))) == 1


def test_a_late_record_does_not_touch_the_next_run(store: Any) -> None:
    put(store, id="a")
    first = take(store)
    end(store, first, "lost", NOW, NOW)
    second = take(store, NOW + 1)
    assert (second.seq, second.runs) == (first.seq, 2)
    assert end(store, first, "completed", NOW + 2) == ""
    assert store.find("a")["state"] == "processing"


def test_a_retry_is_due_when_the_clock_was_set_back(store: Any) -> None:
    put(store)
    end(store, take(store), "failed", NOW, NOW + 2000)
    day_before = NOW - 86_400_000
    assert take(store, day_before) is None
    with store.transaction():
        store.make_ready_after_clock_step(day_before)
    assert take(store, day_before) is not None


def test_the_counts_agree_with_the_jobs_whatever_happens(store: Any) -> None:
    for name in "abcdef":
        put(store, id=name, max_retries=2)
    for ending in ("completed", "failed", "cancelled", "stopped"):
        end(store, take(store), ending, NOW, NOW + 50)
    with store.transaction():
        store.cancel_waiting(store.find("f")["seq"], NOW)
        store.delete(store.find("a")["seq"])
        store.retry(store.find("c")["seq"], NOW)
    counted = dict.fromkeys(queuectl.STATES, 0)
    for job in store.jobs(queuectl.Selection()):
        counted[job["state"]] += 1
    assert store.counts() == counted
    assert sum(counted.values()) == 5


def test_an_id_that_is_drawn_twice_is_drawn_again(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter(["0" * 10, "0" * 10, "0" * 10, "1" * 10])
    monkeypatch.setattr(queuectl, "_draw_ids", lambda count: [next(drawn) for _ in range(count)])
    put(store)
    put(store)
    assert {job["id"] for job in store.jobs(queuectl.Selection())} == {"0" * 10, "1" * 10}


def test_a_failed_transaction_changes_nothing_and_frees_the_mutex(store: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        with store.transaction():
            store.set_setting("priority", 3)
            raise ZeroDivisionError
    assert store.settings()["priority"] == 10
    put(store)


def test_a_writer_gives_up_after_its_patience(store: Any) -> None:
    second = queuectl.Store(store.path, patience=0.3)
    with store.transaction():
        with pytest.raises(queuectl.Unavailable, match="another process"):
            second.begin()
    second.close()


def test_a_foreign_lock_is_told_from_our_own(store: Any) -> None:
    foreign = sqlite3.connect(store.path, isolation_level=None)
    foreign.execute("BEGIN IMMEDIATE")
    store.patience = 0.1
    with pytest.raises(queuectl.Unavailable, match="another program"):
        store.begin()
    foreign.execute("ROLLBACK")
    foreign.close()
    put(store)


def test_claims_and_status_read_only_indexes(store: Any) -> None:
    """A claim, and all that an idle worker and `status` read, must not depend on the number of jobs."""
    for queues in ((), ("x",), ("x", "y")):  # what they sort is one row for each queue
        statement = "EXPLAIN QUERY PLAN " + queuectl.next_job(len(queues))
        plan = " ".join(row[3] for row in store.db.execute(statement, queues))
        assert "INDEX jobs_ready (queue=?)" in plan and not re.search(r"SCAN (TABLE )?jobs", plan), plan
    for statement, values in (
        (queuectl.PULSE.replace("epoch, ", "").replace(",\n    unsettled FROM control", ""), ()),
        (queuectl.HELD_JOBS, ()),
        (queuectl.NEXT_DUE, (0,)),
        (queuectl.select_jobs(queuectl.Selection(("dead",)), True, 50)[0], (0, "dead")),
    ):
        plan = " ".join(row[3] for row in store.db.execute("EXPLAIN QUERY PLAN " + statement, values))
        assert "USING" in plan and "INDEX" in plan and "TEMP B-TREE" not in plan, (statement, plan)
        assert "jobs_expiring" in plan or "min(expires_at)" not in statement, plan  # not all that are pending
    for statement in queuectl.OLDEST_WAITING:  # what they sort is one row for each queue and priority
        values = (0,) * statement.count("?")
        plan = " ".join(row[3] for row in store.db.execute("EXPLAIN QUERY PLAN " + statement, values))
        assert re.search(r"INDEX jobs_(ready|late|due) ", plan) and not re.search(r"SCAN (TABLE )?jobs", plan), plan


def test_a_database_is_migrated_by_one_of_many_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "queue.db"
    queuectl.Store(str(path)).close()
    migrations, version = queuectl.MIGRATIONS, queuectl.SCHEMA_VERSION + 1
    monkeypatch.setattr(queuectl, "MIGRATIONS", (*migrations, ("CREATE TABLE extra (a)", "broken")))
    monkeypatch.setattr(queuectl, "SCHEMA_VERSION", version)
    monkeypatch.setattr(queuectl, "SET_VERSION", f"PRAGMA user_version = {version}")
    with pytest.raises(queuectl.QueueError):
        queuectl.Store(str(path))
    monkeypatch.setattr(queuectl, "MIGRATIONS", (*migrations, ("CREATE TABLE extra (a)",)))
    opened = [queuectl.Store(str(path)) for _ in range(3)]
    assert opened[0].db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'extra'").fetchone() == (1,)
    assert opened[0].db.execute("PRAGMA user_version").fetchone() == (version,)
    for each in opened:
        each.close()


def make_version_1(path: Path) -> None:
    """A database as the first version made it, with a job that has run twice."""
    path.touch(0o600)
    db = sqlite3.connect(str(path))
    db.execute("PRAGMA journal_mode = WAL")
    for statement in (*queuectl.MIGRATIONS[0], queuectl.SET_APPLICATION, "PRAGMA user_version = 1"):
        db.execute(statement)
    db.execute("INSERT INTO contexts VALUES (1, '/', '/bin:/usr/bin', 18)")
    db.execute("INSERT INTO queues (name, dead) VALUES ('default', 1)")
    db.execute(
        "INSERT INTO jobs (seq, id, generated, command, state, queue, priority, ready, attempts, runs, max_retries,"
        " context, created_at, updated_at) VALUES (7, 'old', 0, 'false', 'dead', 'default', 10, 0, 2, 2, 2, 1, 1, 1)"
    )
    for run in (1, 2):
        db.execute(
            "INSERT INTO runs (job, run, attempt, state, started_at, finished_at, seconds, exit_code, worker, stdout)"
            " VALUES (7, ?, ?, 'failed', 1000, 2000, 1.0, 1, 'w-1', ?)",
            (run, run, b"out %d" % run),
        )
    db.commit()
    db.close()


def test_a_database_of_the_first_version_keeps_its_runs(q: Queue) -> None:
    make_version_1(q.db)
    shown = q.show("old")
    assert [(run["run"], run["stdout"]) for run in shown["runs"]] == [(1, "out 1"), (2, "out 2")]
    assert "over 2 runs" in q("logs", "old").out
    q("retry", "old")
    q("worker", "start", "--drain", code=None)
    shown = q.show("old")
    assert [run["run"] for run in shown["runs"]] == [1, 2, 3, 4]
    q("doctor")
    q("delete", "old")
    db = sqlite3.connect(str(q.db))
    assert db.execute("SELECT count(*) FROM runs").fetchone() == (0,)
    db.close()


def test_a_database_is_not_migrated_under_workers_of_an_older_version(q: Queue) -> None:
    make_version_1(q.db)
    db = sqlite3.connect(str(q.db))
    db.execute("INSERT INTO pools (name, pid, started_at, workers) VALUES ('p', 4711, 1, 1)")
    db.commit()
    db.close()
    life = queuectl.take_life_lock(str(q.db), "p")
    refused = q.fails("enqueue", "true")
    assert "pid 4711" in refused.err and "worker stop" in refused.err
    q("status")
    os.close(life)
    q("enqueue", "true")


@posix
def test_a_slot_that_a_daemon_holds_is_given_up(tmp_path: Path) -> None:
    (tmp_path / "queue.db.d").mkdir()
    slot, same = (queuectl.OutputFiles(str(tmp_path / "queue.db"), "pool-1", 0) for _ in range(2))
    assert slot.open()
    daemon = subprocess.Popen(["sleep", "30"], stderr=slot.fds[1])
    try:
        slot.clear(True)
        assert not same.open()
    finally:
        daemon.kill()
        daemon.wait()
    assert same.open()
    same.close()


@posix
def test_output_that_is_too_long_keeps_head_and_tail(tmp_path: Path) -> None:
    (tmp_path / "queue.db.d").mkdir()
    slot = queuectl.OutputFiles(str(tmp_path / "queue.db"), "pool-1", 0)
    assert slot.open()
    data = bytes(range(256)) * 400
    os.write(slot.fds[0], data)
    out, err = slot.read(1024)
    assert out == data[:512] + b"\n[queuectl: %d bytes left out here]\n" % (len(data) - 1024) + data[-512:]
    assert err == b""
    assert slot.read(len(data))[0] == data
    slot.bound(1024)
    assert slot.read(1024)[0] == out
    assert os.fstat(slot.fds[0]).st_blocks * 512 < len(data) / 2
    slot.close()


# The architecture itself.

SECTIONS = (
    *("Vocabulary", "Values", "Platform", "Files", "Schema", "Database", "Store"),
    *("Runner", "Worker", "Console", "Pool", "Views", "Commands", "Page", "main"),
)


def sections() -> dict[str, str]:
    """The text of each section, by the word that follows the bar of its banner."""
    parts = re.split(r"^# ═══ (\w+) ═══.*$", PROGRAM.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


def test_the_sections_stand_in_the_order_of_the_contents() -> None:
    assert tuple(sections()) == SECTIONS
    contents = re.findall(r"^    (\w+)  +\w", str(queuectl.__doc__).partition("Contents")[2], re.MULTILINE)
    assert tuple(contents) == SECTIONS


@pytest.mark.parametrize(
    "word, allowed",
    [
        (r"\bsqlite3\.", ("Database", "Store")),
        (r"\bposix_spawn\b|\bfcntl\b|\bctypes\b|\bmsvcrt\b", ("Platform",)),
        (r"\bos\.name\b", ("Platform",)),
        (r"\bos\.kill\b", ("Platform", "main")),
        (r"\bmultiprocessing\.", ("Pool",)),
        (r"\bSELECT\b|\bUPDATE\b|\bDELETE\b", ("Schema", "Database", "Store")),
        (r"\bsys\.exit\b", ("Worker", "main")),
        (r"\bargparse\.", ("main",)),
        (r"\bprint\(", ("Console",)),
    ],
)
def test_each_outside_thing_has_one_gateway(word: str, allowed: Sequence[str]) -> None:
    assert [name for name, text in sections().items() if re.search(word, without_comments(text))] in (
        list(allowed),
        [],
    )[:1]


def without_comments(text: str) -> str:
    return re.sub(r'#.*|"""[\s\S]*?"""', "", text)


def test_calls_go_upward_only() -> None:
    tree = ast.parse(PROGRAM.read_text(encoding="utf-8"), feature_version=(3, 8))
    where = {node.name: node.lineno for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    later = [
        f"{node.name} uses {name.id}"
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        for name in ast.walk(node)
        if isinstance(name, ast.Name)
        and isinstance(name.ctx, ast.Load)
        and where.get(name.id, 0) > (node.end_lineno or 0)
    ]
    assert later == []


def test_only_what_every_command_needs_is_imported_at_the_top() -> None:
    tree = ast.parse(PROGRAM.read_text(encoding="utf-8"))
    names = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    assert names == {"argparse", "errno", "json", "os", "re", "signal", "stat", "sys", "time"}
    tried = [node.body[0] for node in tree.body if isinstance(node, ast.Try)]
    assert [alias.name for node in tried if isinstance(node, ast.Import) for alias in node.names] == ["sqlite3"]


def test_functions_are_short() -> None:
    tree = ast.parse(PROGRAM.read_text(encoding="utf-8"))
    sizes = sorted(
        (node.end_lineno or 0) - node.lineno + 1 for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
    )
    assert sizes[len(sizes) // 2] <= 12
    assert sizes[-1] <= 60


def test_no_sql_is_newer_than_sqlite_3_8_3() -> None:
    text = "".join(sections()[name] for name in ("Schema", "Database", "Store"))
    assert not re.search(
        r"RETURNING|ON CONFLICT|\bOVER\b|\bSTRICT\b|json_|->>|IIF\(|NULLS (FIRST|LAST)|\bFILTER\b", text
    )
    assert not re.search(r"\?\d", text)  # Python 3.12.0 to 3.12.3 warn of numbered parameters


def test_importing_it_runs_nothing_and_leaves_the_heavy_modules_alone() -> None:
    heavy = "{'subprocess', 'multiprocessing', 'typing', 'logging', 'tempfile', 'uuid'}"
    code = f"import sys, queuectl; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-S", "-B", "-c", code], cwd=str(PROGRAM.parent), stdout=subprocess.PIPE, check=True
    )
    if sys.version_info < (3, 12):
        assert done.stdout.split() == [b"[]"]


# The runner of these tests itself.

room(posix)

TINY = """
import os, pathlib, pytest, time, warnings
log = pathlib.Path("log").open("a", buffering=1)

@pytest.fixture
def tidy():
    yield
    print("torn down", file=log)

@pytest.mark.parametrize("n", range(40))
def test_fine(n): print("ran", file=log)
def test_dies(): os.kill(os.getpid(), 9)
def test_exits(): pytest.exit("enough")
def test_warns(): warnings.warn("beware of the dog")

@pytest.mark.parametrize("n", range(40))
def test_fails(n):
    print("ran", file=log)
    time.sleep(0.1)
    assert 0

@pytest.mark.parametrize("n", range(40))
def test_waits(tidy, n):
    print("began", file=log)
    while not os.path.exists("go"):
        time.sleep(0.02)
"""


def run_tiny(q: Queue, *args: str) -> Background:
    """These tests, by the runner in this file's first part, in the background."""
    harness = Path(__file__).read_text(encoding="utf-8").partition("# values and store")[0]
    (q.work / "test_queuectl.py").write_text(harness, encoding="utf-8")
    (q.work / "test_tiny.py").write_text(TINY)
    (q.work / "queuectl.py").symlink_to(PROGRAM)
    path = f"{q.work}:{PROGRAM.parent}:{Path(pytest.__file__).parent.parent}"
    words = [sys.executable, "-m", "pytest", *PYTEST, "test_tiny.py", "-k", *args]
    return q.launch(words, env={"PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})


def test_the_runner_tells_of_a_fork_that_has_died(q: Queue) -> None:
    run = run_tiny(q, "fine or dies or exits or warns")
    assert run.wait(60) == 1
    assert "2 failed, 41 passed" in run.out and "beware of the dog" in run.out
    assert re.search(r"_ test_dies _.*signal 9", run.out, re.DOTALL) and "Exit: enough" in run.out


def test_the_runner_stops_at_the_first_failure(q: Queue) -> None:
    assert run_tiny(q, "fails", "-x").wait(60) == 1
    assert len(q.lines("log")) <= 2 * cores()  # those that had begun


def test_the_runner_leaves_a_run_without_a_terminal_to_pytest(q: Queue) -> None:
    assert run_tiny(q, "fine", "-p", "no:terminal").wait(60) == 0
    assert q.lines("log") == ["ran"] * 40


@linux
@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_a_run_of_the_tests_that_is_cut_off_leaves_nothing_behind(q: Queue, name: str) -> None:
    number = getattr(signal, name)
    run = run_tiny(q, "waits")
    wait_for(lambda: len(q.lines("log")) == 2 * cores(), what="each fork to run a test")
    run.signal(number)
    run.wait()
    if number == signal.SIGKILL:
        q.touch("go")
    wait_for(lambda: not q.processes(), what="the forks to be gone")
    assert q.lines("log").count("torn down") == q.lines("log").count("began")


@full
def test_one_test_can_be_asked_for(q: Queue) -> None:
    name = "test_queuectl.py::test_functions_are_short"
    done = q.run([sys.executable, Path(__file__), name, "--collect-only", "-q"], env={"HOME": os.environ.get("HOME")})
    assert [line for line in done.out.splitlines() if "::" in line] == [name], done


# =====================================================================================================
# saboteur jobs: what a night's work may contain
# =====================================================================================================

# Says that it began, goes on when the file `go` appears, says that it ended.
GATE = "touch started; until [ -e go ]; do sleep 0.03; done; touch ended"
# The same, with time for a signal to arrive everywhere after the gate is open.
SLOW_GATE = "touch started; until [ -e go ]; do sleep 0.03; done; sleep 0.5; touch ended"
HANG = "touch started; exec sleep 300"
KILL_WORKER = "kill -9 $PPID; exec sleep 300"
KILL_WORKER_ONCE = 'echo run >>runs; if [ "$QUEUECTL_ATTEMPT" = 1 ]; then kill -9 $PPID; exec sleep 300; fi'
IGNORE_TERM = "trap '' TERM; touch started; while :; do sleep 0.1; done"
FLOOD = "exec yes"

# A tree in which every process ignores SIGTERM, one has its own session, one is in a pipeline.
STUBBORN_TREE = (
    "trap '' TERM; setsid sh -c 'touch child; while :; do sleep 0.1; done' & "
    "sleep 300 | cat & until [ -e child ]; do sleep 0.03; done; touch started; while :; do sleep 0.1; done"
)
# A grandchild in its own session that has closed everything it inherited: only its environment tells whose it is.
PYTHON_DAEMON = (
    "import subprocess as s; n=s.DEVNULL; s.Popen(['sleep','300'],stdin=n,stdout=n,stderr=n,start_new_session=True)"
)
HIDDEN_GRANDCHILD = f'{shlex.quote(sys.executable)} -IS -c "{PYTHON_DAEMON}"; touch started; '
# A child that gave up environment, session and files, but not its parent.
PYTHON_SCRUBBED = "import os; os.setsid(); os.closerange(0, 9999); os.execve('/bin/sleep', ['sleep', '300'], {})"
SCRUBBED_CHILD = f'{shlex.quote(sys.executable)} -IS -c "{PYTHON_SCRUBBED}" & touch started; sleep 300'

# The first run kills its worker and leaves a process of its own session; the second looks whether that one lives.
OVERLAP = (
    'if [ "$QUEUECTL_ATTEMPT" = 1 ]; then '
    "  setsid sh -c 'echo $$ >old; {prepare} exec sleep 300' & until [ -s old ]; do sleep 0.03; done; sleep 0.1;"
    "  kill -9 $PPID; exec sleep 300; "
    "fi; if grep -q '^State:.[^ZX]' /proc/$(cat old)/status 2>/dev/null; then echo overlap; else echo alone; fi"
)


# =====================================================================================================
# seeds: every queuectl command line of the five documents, run by bash as it stands there
# =====================================================================================================

Check = Callable[[Queue, Result], None]
Prepare = Callable[[Queue], None]


def unprepared(q: Queue) -> None:
    pass


class Row(NamedTuple):
    """A line of the documents (numbers in `docs`), what makes it meaningful, and what must come of it."""

    docs: str
    line: str
    check: Check
    prepare: Prepare = unprepared
    fill: tuple[tuple[str, str], ...] = ()  # what stands in for the document's placeholders


def transliterate(line: str) -> str:
    """The documents call the program by three names; here it has one."""
    return line.replace("python -m queuectl.cli", "queuectl").replace("python queuectl.py", "queuectl")


def enqueues(command: str, count: int = 1, **fields: Any) -> Check:
    def check(q: Queue, result: Result) -> None:
        jobs = q.jobs()
        assert result.out == "".join(f"Enqueued: {job['id']}\n" for job in jobs)
        assert re.fullmatch(r"(queuectl: \S+ will run in [^\n]+\n)?", result.err)
        assert len(jobs) == count
        expected = dict(command=command, state="pending", attempts=0, **fields)
        for job in jobs:
            assert {name: job[name] for name in expected} == expected

    return check


def in_a_minute(q: Queue, result: Result) -> None:
    enqueues("echo Scheduled job", id="job_scheduled")(q, result)
    assert 40 < moment(q.jobs()[0]["run_at"]) - time.time() < 61


def prints(*words: str) -> Check:
    def check(q: Queue, result: Result) -> None:
        assert re.fullmatch(r"(queuectl: there is no queue at [^\n]+\n)?", result.err)
        for word in words:
            assert word in result.out, result

    return check


def prints_a_version(q: Queue, result: Result) -> None:
    assert re.search(r"\d+\.\d+", result.out) and result.err == ""


def prints_states(q: Queue, result: Result) -> None:
    prints(*STATES[:-1])(q, Result(result.args, 0, result.out.lower(), result.err))


def sets(key: str, value: str) -> Check:
    def check(q: Queue, result: Result) -> None:
        assert q("config", "get", key).out == f"{value}\n"

    return check


def requeues(job: str) -> Check:
    def check(q: Queue, result: Result) -> None:
        shown = q.show(job)
        assert (shown["state"], shown["attempts"], len(shown["runs"])) == ("pending", 0, 1)

    return check


def logs_hello(q: Queue, result: Result) -> None:
    assert "Hello World" in result.out
    assert re.search(r"Average runtime: \d+\.\d\ds over 1 runs?\.\n\Z", result.out), result


def logs_timeout(q: Queue, result: Result) -> None:
    assert re.search(r"tim(e|ed)[ -]?out", result.out, re.I)
    assert re.search(r"Average runtime: 0\.\d\ds over 1 runs?\.\n\Z", result.out), result


def exits_well(q: Queue, result: Result) -> None:
    prints()(q, result)


def two_jobs(q: Queue) -> None:
    q.load([{"id": "job1", "command": "echo Hello World"}, {"id": "job2", "command": "true", "delay": "1h"}])


def job1_ran(q: Queue) -> None:
    two_jobs(q)
    q.drain()


def died(job: str, command: str = "exit 1", *options: str) -> Prepare:
    def prepare(q: Queue) -> None:
        q.add(command, "--id", job, "--max-retries", "1", *options)
        q.drain(code=1)

    return prepare


SEEDS = [
    Row("0", "queuectl --version", prints_a_version),
    Row("0", 'queuectl enqueue "echo Hello QueueCTL"', enqueues("echo Hello QueueCTL")),
    Row("0134", "queuectl status", prints_states, two_jobs),
    Row("0", "queuectl status                         # Stats", prints_states, two_jobs),
    Row("013", "queuectl list --state completed", prints("job1", "echo Hello World"), job1_ran),
    Row("04", "queuectl list --state <state>", prints("job1"), two_jobs, (("<state>", "pending"),)),
    Row("2", "python queuectl.py list", prints("job1", "job2"), two_jobs),
    Row("0", "queuectl list                           # All jobs", prints("job1", "job2"), two_jobs),
    Row("2", "python queuectl.py list --state pending", prints("job1", "job2"), two_jobs),
    Row("4", "queuectl list --state pending", prints("job1", "job2"), two_jobs),
    Row(
        "1",
        "python -m queuectl.cli list --state 'state_name'",
        prints("job1"),
        job1_ran,
        (("state_name", "completed"),),
    ),
    Row("0", 'queuectl enqueue "cmd"', enqueues("cmd")),
    Row("0", 'queuectl enqueue "cmd"                  # Add job', enqueues("cmd")),
    Row(
        "0",
        r"""queuectl enqueue '{\"id\":\"job1\",\"command\":\"echo test\",\"max_retries\":5}'""",
        enqueues("echo test", id="job1", max_retries=5),
    ),
    Row("0", r"""queuectl enqueue '{\"id\":\"job1\",\"command\":\"echo test\"}'""", enqueues("echo test", id="job1")),
    Row(
        "0",
        r"""queuectl enqueue '{\"id\":\"api-call\",\"command\":\"python api.py\",\"max_retries\":5}'""",
        enqueues("python api.py", id="api-call", max_retries=5),
    ),
    Row(
        "0",
        'for i in {1..10}; do queuectl enqueue "python process.py item"; done',
        enqueues("python process.py item", count=10),
    ),
    Row("0", 'queuectl enqueue "timeout /t 5 /nobreak"', enqueues("timeout /t 5 /nobreak")),
    Row("0", 'queuectl enqueue "python script.py"', enqueues("python script.py")),
    Row(
        "1",
        """python -m queuectl.cli enqueue '{"id":"job1","command":"echo Hello World"}'""",
        enqueues("echo Hello World", id="job1", priority=10, max_retries=3),
    ),
    Row(
        "1",
        """python -m queuectl.cli enqueue '{"id":"job_high","command":"echo High priority job","priority":1}'""",
        enqueues("echo High priority job", id="job_high", priority=1),
    ),
    Row(
        "1",
        """python -m queuectl.cli enqueue '{"id":"job_low","command":"echo Low priority job","priority":20}'""",
        enqueues("echo Low priority job", id="job_low", priority=20),
    ),
    pytest.param(
        Row(
            "1",
            """future_time=$(date -u -d '+1 minute' +"%Y-%m-%dT%H:%M:%S")\npython -m queuectl.cli enqueue """
            '"{"id":"job_scheduled","command":"echo Scheduled job","run_at":"$future_time"}"',
            in_a_minute,
        ),
        marks=linux,  # `date -d` is GNU's
    ),
    Row(
        "1",
        """python -m queuectl.cli enqueue '{"id":"timeout_job","command":"sleep 10","timeout_seconds":5}'""",
        enqueues("sleep 10", id="timeout_job", timeout_seconds=5),
    ),
    Row("1", "python -m queuectl.cli logs job1", logs_hello, job1_ran),
    Row(
        "1",
        "python -m queuectl.cli logs timeout_job",
        logs_timeout,
        died("timeout_job", "sleep 10", "--timeout", "0.3"),
    ),
    Row("01234", "queuectl dlq list", prints("job_fail", "exit 1"), died("job_fail")),
    Row("0", "queuectl dlq list                       # Failed jobs", prints("job_fail"), died("job_fail")),
    Row("04", "queuectl dlq retry <job-id>", requeues("job4"), died("job4"), (("<job-id>", "job4"),)),
    Row("0", "queuectl dlq retry api-call", requeues("api-call"), died("api-call")),
    Row("2", "python queuectl.py dlq retry job4", requeues("job4"), died("job4")),
    Row("3", "queuectl dlq retry job-fail-123", requeues("job-fail-123"), died("job-fail-123")),
    Row(
        "04",
        "queuectl config set <key> <value>",
        sets("max_retries", "2"),
        unprepared,
        (("<key> <value>", "max_retries 2"),),
    ),
    Row("0", "queuectl config set max-retries 5", sets("max_retries", "5")),
    Row("0", "queuectl config set backoff-base 2", sets("backoff_base", "2"), lambda q: q.set("backoff_base", "7")),
    Row("123", "queuectl config set max_retries 5", sets("max_retries", "5")),
    Row("2", "python queuectl.py config set backoff_base 3", sets("backoff_base", "3")),
    Row("3", "queuectl config set poll_interval_ms 1000", sets("poll_interval_ms", "1000")),
    Row("4", "queuectl config get <key>", prints("3\n"), unprepared, (("<key>", "max_retries"),)),
    Row("02", "queuectl config show", prints("max_retries", "backoff_base", "poll_interval_ms")),
    Row("3", "queuectl config list", prints("max_retries", "backoff_base", "poll_interval_ms")),
    Row(
        "2",
        r'''python queuectl.py enqueue "{\"id\":\"job1\",\"command\":\"echo Hello Deepak\"}"''',
        enqueues("echo Hello Deepak", id="job1"),
    ),
    Row(
        "2",
        r'''python queuectl.py enqueue "{\"id\":\"job2\",\"command\":\"echo Task 2 Running...\"}"''',
        enqueues("echo Task 2 Running...", id="job2"),
    ),
    Row(
        "2",
        r'''python queuectl.py enqueue "{\"id\":\"job3\",\"command\":\"timeout 3\"}"''',
        enqueues("timeout 3", id="job3"),
    ),
    Row(
        "2",
        r"""python queuectl.py enqueue "{\"id\":\"job4\",\"command\":\"notarealcommand\"}"   # To test retry & DLQ""",
        enqueues("notarealcommand", id="job4"),
    ),
    Row("234", "queuectl worker stop", exits_well),
    Row("3", """queuectl enqueue '{"command":"echo Hello World"}'""", enqueues("echo Hello World")),
    Row("3", """queuectl enqueue '{"command":"sleep 3"}'""", enqueues("sleep 3")),
    Row(
        "3",
        """queuectl enqueue '{"id":"job-fail-123", "command":"exit 1", "max_retries": 2}'""",
        enqueues("exit 1", id="job-fail-123", max_retries=2),
    ),
    Row(
        "3", """queuectl enqueue '{"command":"this_command_does_not_exist"}'""", enqueues("this_command_does_not_exist")
    ),
    Row("4", """queuectl enqueue '{"command":"echo Hello from Docker"}'""", enqueues("echo Hello from Docker")),
    Row("4", """queuectl enqueue '{"cmd":...}'""", enqueues("echo hi"), unprepared, (("...", '"echo hi"'),)),
    Row("4", "queuectl --help", prints("enqueue", "worker", "status", "list", "dlq", "config", "logs")),
    Row("4", "queuectl worker --help", prints("start", "stop")),
]

SEED_POOLS = [
    Row("0", "queuectl worker start --count 2", exits_well),
    Row("0", "queuectl worker start --count N", exits_well, unprepared, ((" N", " 2"),)),
    Row("0", "queuectl worker start --count 4", exits_well),
    Row("0", "queuectl worker start --count 3         # Start workers", exits_well),
    Row("1", "python -m queuectl.cli worker start --count 3", exits_well),
    Row("1", "python -m queuectl.cli worker start --count 1", exits_well),
    Row("2", "start python queuectl.py worker start --count 2", exits_well),  # cmd.exe's `start`
    Row("3", "queuectl worker start", exits_well),
    Row("4", "queuectl worker start --count <n>", exits_well, unprepared, (("<n>", "2"),)),
]


def filled(row: Row) -> str:
    line = transliterate(row.line)
    for placeholder, value in row.fill:
        assert placeholder in line
        line = line.replace(placeholder, value)
    return line


def define_for(q: Queue, row: Row) -> str:
    """`queuectl` as the document has it: an installed command, or the script."""
    return define(SCRIPT if "queuectl.py" in row.line else q.program)


def row_name(row: Row) -> str:
    return f"{row.docs}: {transliterate(row.line)[9:60]}"


@pytest.mark.parametrize("row", SEEDS, ids=row_name)
def test_a_line_of_the_documents(q: Queue, row: Row) -> None:
    row.prepare(q)
    row.check(q, q.bash(define_for(q, row) + filled(row)))


@pytest.mark.parametrize("row", SEED_POOLS, ids=row_name)
def test_a_pool_of_the_documents_in_one_terminal_and_commands_in_another(q: Queue, row: Row) -> None:
    line = filled(row)
    count = int(line.partition("--count ")[2].split(" ")[0] or 1)
    jobs = q.load(["echo one", "echo two"])
    pool = q.launch(["bash", "-c", define_for(q, row) + 'start() { "$@"; }\n' + line])
    wait_for(lambda: q.counts() == {"completed": 2}, what="both jobs to complete")
    q.wait_ready(pool, count)
    assert q.workers() == count
    assert len(q("worker", "list", "--json").json()) == count
    for job in jobs:
        assert job in pool.text
    q("worker", "stop")
    assert pool.wait() == 0
    assert q.workers() == 0


def test_the_second_documents_session(q: Queue) -> None:
    """Jobs by priority, a scheduled one, three workers; then status and logs from another terminal."""
    q.bash(
        """queuectl enqueue '{"id":"job1","command":"echo Hello World"}'
        queuectl enqueue '{"id":"job_high","command":"echo High priority job","priority":1}'
        queuectl enqueue '{"id":"job_low","command":"echo Low priority job","priority":20}'
        queuectl enqueue '{"id":"job_scheduled","command":"echo Scheduled job","delay":"1h"}'"""
    )
    pool = q.pool("--count", "3")
    wait_for(lambda: q.counts() == {"completed": 3, "pending": 1}, what="all but the scheduled job")
    starts = {job["id"]: job["started_at"] for job in q.jobs("--state", "completed")}
    assert starts["job_high"] <= starts["job1"] <= starts["job_low"]
    assert q.status()["workers"] == 3
    logs_hello(q, q("logs", "job1"))
    q("worker", "stop")
    assert pool.wait() == 0


def test_the_third_documents_session_at_its_own_pace(q: Queue) -> None:
    """With the default settings a command that doesn't exist runs at 0, +2 and +4 s and then is dead."""
    documented = [row for row in SEEDS if isinstance(row, Row) and row.docs == "2" and "enqueue" in row.line]
    assert q.bash("\n".join(filled(row) for row in documented)).out.count("Enqueued: job") == 4
    pool = q.pool("--count", "2")
    wait_for(lambda: q.counts() == {"completed": 2, "dead": 2}, timeout=40, what="the end of all jobs", every=0.3)
    dead = q("dlq", "list").out
    assert "job3" in dead and "job4" in dead
    job = q.show("job4")
    assert (job["attempts"], job["exit_code"], job["next_retry_at"]) == (3, 127, None)
    assert "notarealcommand" in job["last_error"]
    assert [run["attempt"] for run in job["runs"]] == [1, 2, 3]
    pauses = [moment(b["started_at"]) - moment(a["finished_at"]) for a, b in zip(job["runs"], job["runs"][1:])]
    assert 1.99 <= pauses[0] < 3.5 and 3.99 <= pauses[1] < 5.5
    assert q("logs", "job4").out.endswith("s over 3 runs.\n")

    q("dlq", "retry", "job4")  # while the workers run
    wait_for(lambda: len(q.show("job4")["runs"]) == 4, what="a fourth run")
    job = wait_for(lambda: [j for j in q.jobs("--state", "failed") if j["id"] == "job4"], what="job4 to fail again")[0]
    assert (job["attempts"], job["max_retries"]) == (1, 3)
    q("worker", "stop")
    assert pool.wait() == 0


def test_the_fourth_documents_session(q: Queue) -> None:
    """A worker that waits for jobs, failures with a limit of their own, `dlq retry` while it runs."""
    q.set("backoff_base", "0.1")
    pool = q.pool()
    q.bash(
        """queuectl enqueue '{"command":"echo Hello World"}'
        queuectl enqueue '{"command":"sleep 0.3"}'
        queuectl enqueue '{"id":"job-fail-123", "command":"exit 1", "max_retries": 2}'
        queuectl enqueue '{"command":"this_command_does_not_exist"}'"""
    )
    wait_for(lambda: q.counts() == {"completed": 2, "dead": 2}, what="two jobs to complete, two to die")
    assert "job-fail-123" in q("dlq", "list").out
    assert q.show("job-fail-123")["attempts"] == 2
    q("dlq", "retry", "job-fail-123")
    wait_for(
        lambda: q.show("job-fail-123")["attempts"] == 2 and len(q.show("job-fail-123")["runs"]) == 4,
        what="two more runs",
    )
    q("worker", "stop")
    assert pool.wait() == 0


def test_the_fifth_documents_check(q: Queue) -> None:
    """Its validate.sh: two workers and max_retries 2; `dlq retry`; one job and five workers, run once."""
    q.set("max_retries", "2")
    q.set("backoff_base", "0.1")
    _, bad, _ = q.load(["echo fine", "exit 3", "sleep 0.5"])
    pool = q.pool("--count", "2")
    wait_for(lambda: q.counts() == {"completed": 2, "dead": 1}, what="the end of all jobs")
    assert q.state(bad) == "dead" and q.show(bad)["attempts"] == 2
    q("dlq", "retry", bad)
    wait_for(lambda: len(q.show(bad)["runs"]) == 4, what="two more runs")
    assert pool.stop() == 0

    pool = q.pool("--count", "5")
    race = q.add("echo run >>race; sleep 0.2")
    q.wait_state(race, "completed")
    assert q.lines("race") == ["run"]
    q("worker", "stop")
    assert pool.wait() == 0


def test_the_second_documents_timeout_job(q: Queue) -> None:
    """Three runs, each ended by its timeout, and `logs` says so (with smaller numbers than the document's)."""
    q.set("backoff_base", "0.1")
    q.bash("""queuectl enqueue '{"id":"timeout_job","command":"sleep 10","timeout_seconds":0.4}'""")
    q.drain(code=1)
    text = q("logs", "timeout_job").out
    average = re.search(r"Average runtime: (\d+\.\d\d)s over 3 runs\.\n\Z", text)
    assert average and 0.4 <= float(average[1]) < 5, text
    assert re.search(r"tim(e|ed)[ -]?out", text, re.I)


# =====================================================================================================
# enqueue
# =====================================================================================================


def test_enqueue_prints_the_id_and_nothing_else(q: Queue) -> None:
    result = q("enqueue", "echo hi")
    (job,) = q.jobs()
    assert (result.out, result.err) == (f"Enqueued: {job['id']}\n", "")


def test_a_new_job_has_the_defaults(q: Queue) -> None:
    job_id = q.add("echo hi")
    job = q.jobs()[0]
    assert set(job) == JOB_FIELDS
    assert set(q.show(job_id)) == JOB_FIELDS | {"runs"}
    assert TIME.fullmatch(job["created_at"]) and TIME.fullmatch(job["updated_at"])
    nothing = {"run_at", "timeout_seconds", "backoff_base", "started_at", "finished_at", "next_retry_at", "exit_code",
               "last_error", "locked_by", "locked_at", "unique", "retry_after", "expires_at", "shell"}  # fmt: skip
    assert (job["after"], job["after_any"], job["dead_on"]) == ([], [], [])
    assert {name for name, value in job.items() if value is None} == nothing
    assert (job["command"], job["state"], job["queue"], job["priority"]) == ("echo hi", "pending", "default", 10)
    assert (job["attempts"], job["max_retries"], job["cwd"], job["env"]) == (0, 3, str(q.work.resolve()), {})


EVERY_FIELD = {
    "id": "full-job", "command": "echo x", "queue": "mail", "priority": -5, "run_at": "2999-01-31T10:00:00.000Z",
    "timeout_seconds": 90, "max_retries": 7, "backoff_base": 1.5, "cwd": "/", "env": {"A": "1", "B": "x y"},
    "unique": "a key", "retry_after": 5.0, "dead_on": [3, 4],
}  # fmt: skip
EVERY_OPTION = (
    "--id", "full-job", "--queue", "mail", "--priority=-5", "--run-at", "2999-01-31T10:00:00Z", "--timeout", "1m30s",
    "--max-retries", "7", "--backoff-base", "1.5", "--cwd", "/", "--env", "A=1", "--env", "B=x y",
    "--unique", "a key", "--retry-after", "5s", "--dead-on", "3", "--dead-on", "4",
)  # fmt: skip


@pytest.mark.parametrize(
    "args",
    [
        [json.dumps(EVERY_FIELD)],
        [*EVERY_OPTION, "echo x"],
        ["echo x", *EVERY_OPTION],
        [*EVERY_OPTION, "echo", "x"],
        [*EVERY_OPTION, "--", "echo x"],
        ['{"command":"echo x","id":"other","priority":99,"queue":"q","timeout":1,"max_retries":1}', *EVERY_OPTION],
    ],
    ids=["JSON", "options before", "options after", "several words", "two dashes", "options win over JSON"],
)
def test_every_field_can_be_given(q: Queue, args: list[str]) -> None:
    q("enqueue", *args)
    job = q.jobs()[0]
    assert {name: job[name] for name in EVERY_FIELD} == EVERY_FIELD


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        ({"cmd": "echo x"}, "command", "echo x"),
        ({"command": "echo x", "timeout": 2.5}, "timeout_seconds", 2.5),
        ({"command": "echo x", "run_at": "2999-01-31T12:00:00+02:00"}, "run_at", "2999-01-31T10:00:00.000Z"),
        ({"command": "echo x", "run_at": "2999-01-31T10:00:00"}, "run_at", "2999-01-31T10:00:00.000Z"),
        ({"command": "echo x", "run_at": "2999-01-31T10:00:00.123000Z"}, "run_at", "2999-01-31T10:00:00.123Z"),
        ({"command": "echo x", "run_at": None, "timeout_seconds": None, "env": None}, "run_at", None),
        ({"command": "printf 'ü€😀'", "id": "jöb"}, "command", "printf 'ü€😀'"),
    ],
    ids=[
        "cmd",
        "timeout",
        "run_at with an offset",
        "run_at without one",
        "run_at with microseconds",
        "nulls",
        "not ASCII",
    ],
)
def test_other_forms_of_fields(q: Queue, given: Job, field: str, value: Any) -> None:
    q("enqueue", json.dumps(given, ensure_ascii=False))
    assert q.jobs()[0][field] == value


@pytest.mark.parametrize(
    ("args", "seconds"),
    [
        (["--delay", "90", "true"], 90),
        (["--delay", "1h30m", "true"], 5400),
        (["--run-at", "now+5m", "true"], 300),
        (['{"command":"true","delay":"2h"}'], 7200),
        (['{"command":"true","delay":1.5}'], 1.5),
        (['{"command":"true","run_at":"now+1d"}'], 86400),
    ],
)
def test_a_delay_counts_from_now(q: Queue, args: list[str], seconds: float) -> None:
    before = time.time()
    q("enqueue", *args)
    assert before + seconds - 0.01 <= moment(q.jobs()[0]["run_at"]) <= time.time() + seconds + 0.01


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("1.5", 1.5), ("500ms", 0.5), ("30s", 30), ("5m", 300), ("2h", 7200), ("1d", 86400)],
)
def test_durations(q: Queue, text: str, seconds: float) -> None:
    q("enqueue", "--timeout", text, "true")
    assert q.jobs()[0]["timeout_seconds"] == seconds


def test_several_words_are_quoted_safely(q: Queue) -> None:
    words = ["a b", "$HOME", "it's", "*", "x;touch pwned", "ü", "", "\\n", "-e", "tab\there"]
    job = q("enqueue", "--quiet", "printf", "%s\\n", *words).out.strip()
    q.drain()
    assert q("logs", job, "--stdout").out.split("\n") == [*words, ""]
    assert not (q.work / "pwned").exists()


def test_a_commands_own_options_are_its_own(q: Queue) -> None:
    q("enqueue", "ls", "-l", "--all", "/tmp")
    assert q.jobs()[0]["command"] == "ls -l --all /tmp"


@pytest.mark.parametrize(
    "option", [["--priority", "5"], ["--priority=5"], ["--quiet"], ["--db", "other.db"], ["--file", "x"]]
)
def test_an_option_after_several_words_is_refused_and_both_forms_shown(q: Queue, option: list[str]) -> None:
    error = q.fails("enqueue", "echo", "a", *option, code=2).err
    assert option[0].partition("=")[0] in error
    assert " -- " in error
    assert q.counts() == {}


@pytest.mark.parametrize(
    ("args", "command"),
    [
        (["--", "echo a --priority 5"], "echo a --priority 5"),
        (["--", "{ echo a; echo b; }"], "{ echo a; echo b; }"),
        (["--", '{"command":"echo x"}'], '{"command":"echo x"}'),
        (["--", "echo", "a", "--priority", "5"], "echo a --priority 5"),
        (["--", "-x"], "-x"),
    ],
)
def test_after_two_dashes_comes_a_command(q: Queue, args: list[str], command: str) -> None:
    q("enqueue", *args)
    job = q.jobs()[0]
    assert (job["command"], job["priority"]) == (command, 10)


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        ('''queuectl enqueue "{"id":"x1","command":"ls"}"''', {"id": "x1", "command": "ls"}),
        (
            '''queuectl enqueue "{"id":"x1","command":"sleep 1","priority":5,"max_retries":2}"''',
            {"id": "x1", "command": "sleep 1", "priority": 5, "max_retries": 2},
        ),
        ('''queuectl enqueue "{"command":"echo a, b: c","id":"x1"}"''', {"id": "x1", "command": "echo a, b: c"}),
        (r"""queuectl enqueue '{\"command\":\"echo a\",\"priority\":3}'""", {"command": "echo a", "priority": 3}),
    ],
)
def test_json_that_a_shell_has_mangled(q: Queue, line: str, fields: Job) -> None:
    q.bash(line)
    job = q.jobs()[0]
    assert {name: job[name] for name in fields} == fields


def test_braces_of_the_shell_are_explained(q: Queue) -> None:
    assert " -- " in q.fails("enqueue", "{ echo a; echo b; }", code=2).err


def test_an_unknown_field_is_named_with_the_nearest(q: Queue) -> None:
    error = q.fails("enqueue", '{"command":"echo x","prioritty":3}', code=2).err
    assert "prioritty" in error and re.search(r"\bpriority\b", error)
    assert q.counts() == {}


def test_fields_that_only_queuectl_sets_are_ignored(q: Queue) -> None:
    given = {
        "command": "true", "state": "dead", "attempts": 9, "created_at": "2020-01-01T00:00:00Z", "updated_at": "x",
        "started_at": 5, "finished_at": None, "next_retry_at": "never", "exit_code": 3, "last_error": "old",
        "locked_by": "w", "locked_at": "y",
    }  # fmt: skip
    q("enqueue", json.dumps(given))
    job = q.jobs()[0]
    assert (job["state"], job["attempts"], job["exit_code"], job["last_error"]) == ("pending", 0, None, None)
    assert moment(job["created_at"]) > time.time() - 60


def test_a_file_of_jobs(q: Queue) -> None:
    (q.work / "jobs").write_text('echo plain\n\n{"id":"j2","cmd":"echo json","priority":1}\n   \necho "quoted $HOME"')
    assert q("enqueue", "--file", "jobs").out == "Enqueued: 3 jobs\n"
    assert [job["command"] for job in q.jobs()] == ["echo plain", "echo json", 'echo "quoted $HOME"']
    assert q.show("j2")["priority"] == 1


def test_a_file_from_stdin_with_options_for_all(q: Queue) -> None:
    result = q(
        "enqueue", "--file", "-", "--priority", "3", "--queue", "mail", stdin='echo 1\n{"cmd":"echo 2","priority":9}\n'
    )
    assert result.out == "Enqueued: 2 jobs\n"
    assert [(job["command"], job["priority"], job["queue"]) for job in q.jobs()] == [
        ("echo 1", 3, "mail"),
        ("echo 2", 3, "mail"),
    ]


def test_what_list_prints_can_be_enqueued_elsewhere(q: Queue, other: Queue) -> None:
    q.load([EVERY_FIELD, "true", {"command": "exit 1", "max_retries": 1}, "printf 'ü\\n'; echo \"a,b\""])
    q.drain(code=1)
    listed = q("list", "--json").out
    assert other("enqueue", "--file", "-", stdin=listed).out == "Enqueued: 4 jobs\n"
    ours, theirs = q.jobs(), other.jobs()
    for field in (
        "id",
        "command",
        "queue",
        "priority",
        "run_at",
        "timeout_seconds",
        "max_retries",
        "backoff_base",
        "cwd",
        "env",
    ):
        assert [job[field] for job in theirs] == [job[field] for job in ours]
    assert other.counts() == {"pending": 4}


@pytest.mark.parametrize(
    "bad",
    [
        '{"command":}',
        '{"command":"x","nope":1}',
        '{"id":"a b","command":"x"}',
        "{}",
        '{"command":"x","priority":"high"}',
        "echo \udcff",
    ],
)
def test_one_bad_line_and_nothing_is_enqueued(q: Queue, bad: str) -> None:
    error = q.fails("enqueue", "--file", "-", stdin=f"echo 1\n\necho 3\n{bad}\necho 5\n", code=2).err
    assert re.search(r"\bline 4\b", error)
    assert q.counts() == {}


def test_quiet_and_json_say_what_was_enqueued(q: Queue) -> None:
    ids = q("enqueue", "--file", "-", "--quiet", stdin="echo 1\necho 2\n").out.splitlines()
    assert ids == [job["id"] for job in q.jobs()]
    added = q("enqueue", "--json", "--id", "third", "echo 3").json()
    assert added["id"] == "third" and set(added) == JOB_FIELDS
    more = q("enqueue", "--file", "-", "--json", stdin="echo 4\necho 5\n").json()
    assert [job["command"] for job in more] == ["echo 4", "echo 5"]


def test_an_id_that_exists_is_refused_or_skipped(q: Queue) -> None:
    q("enqueue", "--id", "once", "echo first")
    assert "once" in q.fails("enqueue", "--id", "once", "echo second").err
    q("enqueue", "--id", "once", "--if-exists", "skip", "echo third")
    assert [job["command"] for job in q.jobs()] == ["echo first"]


def test_an_id_that_exists_in_a_file(q: Queue) -> None:
    q("enqueue", "--id", "once", "echo first")
    lines = '{"id":"new","command":"echo 1"}\n{"id":"once","command":"echo 2"}\n'
    q.fails("enqueue", "--file", "-", stdin=lines)
    q.fails("enqueue", "--file", "-", stdin='{"id":"twin","command":"a"}\n{"id":"twin","command":"b"}\n', code=(1, 2))
    assert [job["id"] for job in q.jobs()] == ["once"]
    q("enqueue", "--file", "-", "--if-exists", "skip", stdin=lines)
    assert [(job["id"], job["command"]) for job in q.jobs()] == [("once", "echo first"), ("new", "echo 1")]


def test_ended_jobs_keep_their_ids(q: Queue) -> None:
    q("enqueue", "--id", "once", "true")
    q.drain()
    q.fails("enqueue", "--id", "once", "true")
    q("delete", "once")
    q("enqueue", "--id", "once", "true")


def test_the_longest_id_and_odd_but_legal_ones(q: Queue) -> None:
    for job in ("x" * 128, "jöb", "a:b", "日本", "#1"):
        q("enqueue", "--id", job, "true")
        assert q.show(job)["id"] == job


def test_the_variables_of_an_enqueuer_are_taken_by_name(q: Queue) -> None:
    job = q(
        "enqueue", "--quiet", "--env", "A=1=2", "--env", "B", "--env", "C=", "true", env={"B": "from here"}
    ).out.strip()
    assert q.show(job)["env"] == {"A": "1=2", "B": "from here", "C": ""}


def test_a_relative_folder_is_meant_from_here(q: Queue) -> None:
    (q.work / "sub").mkdir()
    job = q("enqueue", "--quiet", "--cwd", "sub", "pwd >where").out.strip()
    q.drain(cwd="/")
    assert (q.work / "sub" / "where").read_text().strip() == str((q.work / "sub").resolve())
    assert q.state(job) == "completed"


def test_the_longest_command_that_the_system_takes(q: Queue) -> None:
    if not LINUX:
        pytest.skip("the limit of 131,071 bytes is Linux's")
    longest = "true " + "x" * (131_071 - 5)
    q("enqueue", "--file", "-", stdin=longest + "\n")
    q.drain()
    assert q.counts() == {"completed": 1}
    q.fails("enqueue", "--file", "-", stdin=longest + "x\n", code=2)
    assert q.counts() == {"completed": 1}


def test_a_terminal_is_told_how_to_start_workers(q: Queue) -> None:
    assert "worker start" in q.at_terminal("enqueue", "true")
    q.pool()
    assert "worker start" not in q.at_terminal("enqueue", "true")


def test_the_database_is_named_by_option_variable_or_home(q: Queue) -> None:
    one, two = str(q.folder / "queue" / "one.db"), str(q.folder / "queue" / "two.db")
    q("--db", one, "enqueue", "--id", "before", "true")
    q("enqueue", "--db", two, "--id", "after", "true")
    assert [job["id"] for job in q("list", "--json", "--db", one).json()] == ["before"]
    assert [job["id"] for job in q(f"--db={two}", "list", "--json").json()] == ["after"]
    assert q.jobs() == []
    q("enqueue", "true", env={"QUEUECTL_DB": None})
    home = q.home / ".queuectl"
    assert (home / "queue.db").is_file()
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


# =====================================================================================================
# worker and pool
# =====================================================================================================


def test_drain_works_on_everything_and_tells_of_deaths(q: Queue) -> None:
    good, bad = q.load(["echo hi", {"command": "echo oops >&2; exit 7", "max_retries": 1}])
    result = q.drain(code=1)
    for job in (good, bad):
        assert (result.out + result.err).count(job) >= 2  # a line for the start and one for the end
    assert (q.state(good), q.state(bad)) == ("completed", "dead")
    shown = q.show(bad)
    assert (shown["attempts"], shown["exit_code"]) == (1, 7)
    assert "oops" in shown["last_error"]
    q.drain()  # nothing to do, nobody died meanwhile


def test_drain_waits_for_retries_and_not_for_later_jobs(q: Queue) -> None:
    retried = q.add('[ "$QUEUECTL_ATTEMPT" = 3 ]', "--backoff-base", "0.2")
    later = q.add("true", "--delay", "1h")
    q.drain()
    assert (q.state(retried), q.show(retried)["attempts"], q.state(later)) == ("completed", 3, "pending")


def test_what_a_completed_job_tells(q: Queue) -> None:
    job = q.add("echo out; echo err >&2; sleep 0.1")
    q.drain()
    shown = q.show(job)
    (run,) = shown["runs"]
    assert set(run) >= RUN_FIELDS
    assert (shown["state"], shown["attempts"], shown["exit_code"], shown["last_error"]) == ("completed", 1, 0, None)
    assert (shown["locked_by"], shown["locked_at"], shown["next_retry_at"]) == (None, None, None)
    assert (run["run"], run["attempt"], run["state"], run["exit_code"], run["error"]) == (1, 1, "completed", 0, None)
    assert (run["stdout"], run["stderr"]) == ("out\n", "err\n")
    assert 0.1 <= run["duration_seconds"] < 10
    assert (
        moment(shown["created_at"])
        <= moment(shown["started_at"])
        < moment(shown["finished_at"])
        <= moment(shown["updated_at"])
    )
    assert run["worker"]


def test_what_a_running_job_tells(q: Queue) -> None:
    job = q.add("echo live; " + GATE)
    with q.working():
        q.wait_file("started")
        shown = q.show(job)
        assert (shown["state"], shown["attempts"], shown["finished_at"]) == ("processing", 1, None)
        assert shown["locked_by"] and TIME.fullmatch(shown["locked_at"]) and TIME.fullmatch(shown["started_at"])
        assert "live" in q("logs", job).out
        assert job in q("status").out
        q.touch("go")
        q.wait_state(job, "completed")


def test_two_workers_work_at_once(q: Queue) -> None:
    q.load(["touch a; until [ -e b ]; do sleep 0.03; done", "touch b; until [ -e a ]; do sleep 0.03; done"])
    q.drain("--count", "2")
    assert q.counts() == {"completed": 2}


def test_lower_priorities_first_and_equal_ones_in_order(q: Queue) -> None:
    given = [("a", 10), ("b", 1), ("c", 10), ("d", -5), ("e", 1)]
    q.load([{"command": "echo $QUEUECTL_JOB_ID >>order", "id": name * 4, "priority": number} for name, number in given])
    q.drain()
    assert [name[0] for name in q.lines("order")] == ["d", "b", "e", "a", "c"]


def test_workers_serve_the_queues_they_are_given(q: Queue) -> None:
    q.load([{"command": "echo $QUEUECTL_QUEUE >>ran", "queue": name} for name in ("mail", "video", "default", "mail")])
    q.drain("--queue", "mail")
    assert q.lines("ran") == ["mail", "mail"]
    q.drain("--queue", "video", "--queue", "default")
    assert q.lines("ran") == ["mail", "mail", "video", "default"]


def test_without_queues_named_workers_serve_all_by_priority(q: Queue) -> None:
    q.load(
        [
            {"command": "echo $QUEUECTL_QUEUE >>ran", "queue": name, "priority": p}
            for name, p in (("a", 3), ("b", 1), ("c", 2))
        ]
    )
    q.drain()
    assert q.lines("ran") == ["b", "c", "a"]


def test_max_jobs_ends_the_pool(q: Queue) -> None:
    q.load(["true"] * 3)
    q("worker", "start", "--max-jobs", "2")
    assert q.counts() == {"completed": 2, "pending": 1}


@linux
def test_a_detached_pool(q: Queue) -> None:
    result = q("worker", "start", "--detach", "--count", "2")
    assert q.workers() == 2  # it returns when they run
    assert re.search(r"\d+", result.out), result
    assert int(re.findall(r"\d+", result.out)[-1]) in [process.pid for process in q.processes()]
    job = q.add("echo hi")
    q.wait_state(job, "completed")
    wait_for(lambda: f"{job} completed" in (q.db.parent / "queuectl.log").read_text())
    q("worker", "stop")
    assert q.workers() == 0
    wait_for(lambda: not q.processes(), what="the pool to be gone")


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_install_puts_a_command_on_the_path(q: Queue) -> None:
    place = q.folder / "it's a place"
    done = q.run([*SCRIPT, "install", "--prefix", place], env={"HOME": "/nowhere", "QUEUECTL_DB": None})
    assert done.code == 0 and str(place / "bin/queuectl") in done.out, done
    export = re.search("export PATH=.*", done.out)
    made = files_in(place)
    compiled = f"lib/queuectl/__pycache__/queuectl.{sys.implementation.cache_tag}.pyc"
    assert export and set(made) == {"bin/queuectl", "lib/queuectl/queuectl.py", compiled}
    script = "queuectl enqueue --id a 'echo hello' && queuectl worker start --drain && queuectl logs a"
    assert "hello" in q.run(["sh", "-c", f"{export.group()}\n{script}"]).out
    assert files_in(place) == made  # nothing is compiled anew when it runs


def test_install_upgrades_under_a_live_pool_and_is_undone(q: Queue) -> None:
    prefix = ("--prefix", q.folder)
    q("install", *prefix)
    launcher = q.folder / "bin/queuectl"
    q.program = (launcher,)
    pool = q.pool()
    module = q.folder / "lib/queuectl/queuectl.py"
    module.write_text(module.read_text().replace(f'"{queuectl.VERSION}"', '"old"'))  # the compiled one is stale now
    assert q("--version").out == "queuectl old\n"
    assert q.run([*SCRIPT, "install", *prefix]).code == 0
    q.wait_state(q.add("true"), "completed")
    assert q("--version").out == f"queuectl {queuectl.VERSION}\n"
    assert q("uninstall", *prefix).out == f"removed: {launcher}\n"
    assert not launcher.exists() and not (q.folder / "lib/queuectl").exists()
    assert pool.stop() == 0
    q.program = SCRIPT
    q.fails("uninstall", *prefix)


def test_install_says_what_is_in_the_way(q: Queue) -> None:
    (q.folder / "lib").write_text("a file")
    assert "--prefix" in q.fails("install", "--prefix", q.folder).err


def test_install_and_uninstall_leave_alone_what_is_not_theirs(q: Queue) -> None:
    """A command of the same name, files in the library's folder, and whatever a link leads to."""
    mine, photos, linked = q.folder / "mine", q.folder / "photos", q.folder / "linked"
    for path in (mine / "bin/queuectl", photos / "lib/queuectl/1.jpg", q.work / "file"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    for link, target in (("bin/queuectl", "file"), ("lib/queuectl", ".")):
        (linked / link).parent.mkdir(parents=True)
        (linked / link).symlink_to(q.work / target)
    before = files_in(q.folder)
    for prefix in (mine, linked):
        for command in ("install", "uninstall"):
            assert "move it away" in q.fails(command, "--prefix", prefix).err
    q("install", "--prefix", photos)
    q("uninstall", "--prefix", photos)
    assert files_in(q.folder) == before


def test_an_install_that_was_cut_off_can_be_undone_and_repeated(q: Queue) -> None:
    place = q.folder / "place"
    install = f"queuectl install --prefix {shlex.quote(str(place))}"
    q.program = (sys.executable, "-B", PROGRAM)
    q("install", "--prefix", place)
    biggest = max(map(len, files_in(place).values()))
    (place / "bin/queuectl").unlink()  # as if it had been killed before that
    q("uninstall", "--prefix", place)
    assert not (place / "lib/queuectl").exists()
    for size in (100, biggest // 1024):  # KiB that a file may have
        check_error(q.bash(f"ulimit -f {size}; {install}", code=1))
        assert not files_in(place)
    assert q.bash(" | ".join([install] * 4)).err == "" and len(files_in(place)) == 3  # at the same time


def test_install_where_no_command_can_be_made(q: Queue) -> None:
    """Nothing is made without a home, at no folder, from a pipe, or for a Python whose path no launcher can hold."""
    before = files_in(q.folder)
    for home in ("", "/nonexistent"):
        assert "--prefix" in q.fails("install", env={"HOME": home}).err
    q.fails("install", "--prefix", "", code=2)
    check_error(q.run([sys.executable, "-", "install", "--prefix", "place"], stdin=PROGRAM.read_text()))
    for python in (q.work / "a\\xb", os.fsencode(q.work) + b"/caf\xe9", ""):
        code = f"import sys; sys.executable = {os.fsdecode(python)!r}; import queuectl; sys.exit(queuectl.main())"
        words = [sys.executable, "-c", code, "install", "--prefix", "place"]
        check_error(q.run(words, env={"PYTHONPATH": PROGRAM.parent, "PATH": ""}))
    assert files_in(q.folder) == before and not (q.work / "place").exists()


def test_install_shows_no_control_characters(q: Queue) -> None:
    for command in ("install", "uninstall"):
        assert "\x1b" not in q(command, "--prefix", q.work / "\x1b[31m").out


@linux
def test_a_pool_that_is_a_script_does_not_keep_what_it_was_compiled_from(q: Queue) -> None:
    """It goes on in the same process as compiled code; nothing is imported from the folder that it runs in."""
    for name in ("linecache", "os", "types"):
        (q.work / f"{name}.py").write_text("raise SystemExit('imported from here')")
    q.program = SCRIPT
    pool = q.pool()
    words = read_proc(str(pool.process.pid), "cmdline").split(b"\0")
    at = words.index(os.fsencode(PROGRAM))
    assert words[at - 1].startswith(b"/proc/self/fd/") and words[at + 1 : at + 3] == [b"worker", b"start"]
    assert not any(b"memfd" in link for link in links(str(pool.process.pid)))
    q.wait_state(q.add("true"), "completed")
    assert pool.stop() == 0 and str(q.db) in pool.out
    assert not list(PROGRAM.parent.glob("__pycache__/queuectl.*"))


@linux
def test_a_pool_that_is_a_script_keeps_the_options_of_python(q: Queue) -> None:
    (q.work / "sitecustomize.py").write_text("raise SystemExit('imported in spite of -I')")
    q.program = (sys.executable, "-I", "-X", "utf8", "-W", "ignore", PROGRAM)
    pool = q.pool(env={"PYTHONPATH": q.work})
    words = read_proc(str(pool.process.pid), "cmdline").split(b"\0")
    assert {b"-I", b"utf8", b"-Wignore"} <= set(words)
    assert pool.stop() == 0


@linux
@pytest.mark.parametrize(
    "start",
    [
        "ulimit -f 200; exec {python} {program}",
        "unset PATH; exec -a python3 {python} {program}",  # which then does not know its own path
        "exec {python} -c 'import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name=\"__main__\")' {program}",
        "cd gone; rmdir ../gone; exec {python} {program}",
    ],
)
def test_a_script_works_also_where_it_can_not_go_on_as_compiled_code(q: Queue, start: str) -> None:
    (q.work / "gone").mkdir()
    q.add("true", "--cwd", "/")
    script = start.format(python=shlex.quote(sys.executable), program=shlex.quote(str(PROGRAM)))
    q.bash(script + " worker start --max-jobs 1")
    assert q.counts() == {"completed": 1}


@linux
def test_a_detached_pool_is_started_as_the_command_was(q: Queue) -> None:
    """By the installed command, whose module is compiled: that starts faster and takes half of the memory."""
    for program in (q.program, SCRIPT):
        done = q.run([*program, "worker", "start", "--detach"])
        words = read_proc(done.out.strip(), "cmdline").split(b"\0")
        assert os.fsencode(program[-1]) in words
        q("worker", "stop")


def test_the_log_of_detached_pools_is_rotated(q: Queue) -> None:
    log = q.db.parent / "queuectl.log"
    log.write_text("an old line\n" * 1_000_000)
    q("worker", "start", "--detach")
    q("worker", "stop")
    assert "an old line" not in log.read_text()
    assert len(list(q.db.parent.glob("queuectl.log*"))) == 2
    wait_for(lambda: not q.processes(), what="the pool to be gone")


def test_an_idle_worker_is_woken(q: Queue) -> None:
    q.set("poll_interval_ms", "60000")
    with q.working("--count", "2"):
        for _ in range(3):
            q.wait_state(q.add("true"), "completed")
        failing = q.add("false", "--max-retries", "2", "--backoff-base", "0.1")
        q.wait_state(failing, "dead")
        q("dlq", "retry", failing)
        wait_for(lambda: len(q.show(failing)["runs"]) == 4, what="two more runs")


def test_a_job_runs_as_its_enqueuer_would(q: Queue) -> None:
    """Folder, PATH and umask are those of `enqueue`; the rest of the environment is the worker's, plus its own."""
    tools, place = q.folder / "tools", q.folder / "place"
    tools.mkdir()
    place.mkdir()
    (tools / "mytool").write_text("#!/bin/sh\necho mine\n")
    (tools / "mytool").chmod(0o755)
    script = "umask 027; queuectl enqueue --quiet --env EXTRA=own 'umask; pwd; mytool; echo $WORKER $ENQUEUER $EXTRA'"
    env = {"PATH": f"{tools}:{q.env['PATH']}", "ENQUEUER": "no", "EXTRA": "no"}
    job = q.bash(script, env=env, cwd=place).out.strip()
    q.drain(env={"WORKER": "yes", "EXTRA": "no"}, cwd="/")
    assert q("logs", job, "--stdout").out.split() == ["0027", str(place.resolve()), "mine", "yes", "own"]


def test_the_variables_a_job_sees(q: Queue) -> None:
    names = ("JOB_ID", "ATTEMPT", "MAX_RETRIES", "QUEUE", "DB", "RUN")
    command = "echo " + " ".join(f"$QUEUECTL_{name}" for name in names) + '; [ "$QUEUECTL_ATTEMPT" = 2 ]'
    job = q.add(command, "--id", "see-it", "--queue", "mail", "--max-retries", "5", "--backoff-base", "0.1")
    q.drain(env={"QUEUECTL_DB": os.path.relpath(q.db, q.work)})
    seen = [run["stdout"].split() for run in q.show(job)["runs"]]
    assert [words[:4] for words in seen] == [["see-it", "1", "5", "mail"], ["see-it", "2", "5", "mail"]]
    assert all(os.path.isabs(words[4]) and os.path.samefile(words[4], q.db) for words in seen)
    assert seen[0][5] != seen[1][5]


def test_a_job_has_empty_stdin(q: Queue) -> None:
    job = q.add("cat; read line || echo nothing")
    q("worker", "start", "--drain", stdin="from the worker\n")
    assert q("logs", job, "--stdout").out == "nothing\n"


def test_a_pipeline_ends_when_its_reader_does(q: Queue) -> None:
    job = q.add("""bash -c 'yes | head -1; echo "${PIPESTATUS[0]}"'""")
    q.drain()
    assert q("logs", job, "--stdout").out == "y\n141\n"


@linux
def test_jobs_start_with_default_signal_handling(q: Queue) -> None:
    """Also when the pool inherited ignored signals, as from nohup."""
    job = q.add("grep -E '^Sig(Ign|Blk)' /proc/self/status")
    result = q.bash("trap '' HUP INT PIPE QUIT XFSZ USR1; queuectl worker start --drain")
    assert result.code == 0
    masks = [int(line.split()[1], 16) for line in q("logs", job, "--stdout").out.splitlines()]
    assert [mask & 0x7FFFFFFF for mask in masks] == [0, 0]  # without those that the C library keeps for itself


@pytest.mark.parametrize(
    ("command", "code"), [("exit 7", 7), ("kill -9 $$", -9), ("kill -INT $$", -2), ("no-such-tool", 127)]
)
def test_exit_codes_of_runs(q: Queue, command: str, code: int) -> None:
    job = q.add(command, "--max-retries", "1")
    q.drain(code=1)
    assert q.show(job)["exit_code"] == code
    assert q.show(job)["last_error"]


def test_a_job_whose_folder_is_gone(q: Queue) -> None:
    folder = q.work / "vanishing"
    folder.mkdir()
    job = q("enqueue", "--quiet", "--max-retries", "1", "true", cwd=folder).out.strip()
    folder.rmdir()
    other = q.add("true")
    q.drain(code=1)
    shown = q.show(job)
    assert (shown["state"], shown["attempts"], shown["exit_code"]) == ("dead", 1, None)
    assert "vanishing" in shown["last_error"]
    assert q.state(other) == "completed"


def test_a_killed_workers_job_runs_again(q: Queue) -> None:
    job = q.add(KILL_WORKER_ONCE, "--backoff-base", "0.1")
    q.drain()
    shown = q.show(job)
    assert (shown["state"], shown["attempts"], shown["last_error"]) == ("completed", 2, None)
    assert [run["exit_code"] for run in shown["runs"]] == [None, 0]
    assert "worker" in shown["runs"][0]["error"].lower()
    assert q.lines("runs") == ["run", "run"]


def test_a_job_that_kills_its_worker_every_time(q: Queue) -> None:
    job = q.add("echo run >>runs; " + KILL_WORKER, "--max-retries", "2", "--backoff-base", "0.1")
    other = q.add("true")
    q.drain(code=1)
    shown = q.show(job)
    assert (shown["state"], shown["attempts"], shown["exit_code"]) == ("dead", 2, None)
    assert "worker" in shown["last_error"].lower()
    assert q.lines("runs") == ["run", "run"]
    assert q.state(other) == "completed"


def test_killed_workers_are_replaced(q: Queue) -> None:
    with q.working("--count", "2"):
        for _ in range(2):
            q.add(KILL_WORKER, "--max-retries", "1")
        wait_for(lambda: q.counts() == {"dead": 2}, what="both jobs to die")
        wait_for(lambda: q.workers() == 2, what="new workers")


@linux
@pytest.mark.parametrize(
    "prepare",
    ["", 'trap "" TERM;', "for fd in 3 4 5 6 7 8 9; do eval exec $fd\\>\\&-; done;"],
    ids=["own session", "ignores SIGTERM", "closes descriptors"],
)
def test_never_a_second_run_beside_the_first(q: Queue, prepare: str) -> None:
    q.set("kill_grace_seconds", "0.3")
    job = q.add(OVERLAP.replace("{prepare}", prepare), "--backoff-base", "0.1")
    q.drain()
    assert q("logs", job, "--stdout", "--attempt", "2").out == "alone\n"


@linux
def test_a_killed_supervisors_workers_finish_and_go(q: Queue) -> None:
    running, waiting = q.load([GATE, "true"])
    pool = q.pool()
    q.wait_file("started")
    pool.signal(signal.SIGKILL)
    pool.wait()
    q.touch("go")
    q.wait_state(running, "completed")
    wait_for(lambda: not q.processes(), what="the workers to go")
    assert (q.workers(), q.state(waiting)) == (0, "pending")
    q.drain()
    assert q.counts() == {"completed": 2}


@linux
def test_a_new_pool_starts_beside_a_killed_one(q: Queue) -> None:
    running = q.add(GATE)
    pool = q.pool()
    q.wait_file("started")
    pool.signal(signal.SIGKILL)
    pool.wait()
    second = q.start("worker", "start")
    q.wait_state(q.add("true"), "completed")
    assert q.state(running) == "processing"
    q.touch("go")
    q.wait_state(running, "completed")
    assert second.stop() == 0
    assert q.show(running)["attempts"] == 1


@linux
def test_a_stopped_worker_loses_nothing(q: Queue) -> None:
    """SIGSTOP, as a suspended machine does: no time-out makes its job anyone else's."""
    running = q.add("echo run >>runs; echo $PPID >worker.new; mv worker.new worker; " + GATE)
    first = q.pool()
    worker = int(q.wait_file("worker"))
    os.kill(worker, signal.SIGSTOP)
    second = q.pool()
    q.wait_state(q.add("true"), "completed")
    q.touch("go")
    q.wait_file("ended")
    assert q.state(running) == "processing"
    os.kill(worker, signal.SIGCONT)
    q.wait_state(running, "completed")
    assert (q.show(running)["attempts"], q.lines("runs")) == (1, ["run"])
    assert (first.stop(), second.stop()) == (0, 0)


@linux
def test_a_failed_runs_children_are_ended_before_it_is_recorded(q: Queue) -> None:
    q.add("setsid sleep 300 & sleep 300 & exit 1", "--max-retries", "1")
    q.drain(code=1)
    assert not q.processes()


def test_a_completed_run_may_leave_a_daemon_that_holds_its_output(q: Queue) -> None:
    q.may_leave = True
    job = q.add("sleep 300 & echo hi")
    q.drain()
    assert q("logs", job, "--stdout").out == "hi\n"
    if LINUX:
        assert [process.command for process in q.processes()] == ["sleep 300 "]


@linux
def test_a_daemon_that_ends_later_is_no_zombie(q: Queue) -> None:
    """Workers inherit what completed jobs leave, and idle ones too ask how it ended."""
    q.may_leave = True
    with q.working() as pool:
        q.wait_state(q.add("setsid sh -c 'until [ -e go ]; do sleep 0.03; done' & true"), "completed")
        (worker,) = children(pool.process.pid)
        assert children(worker)
        q.touch("go")
        wait_for(lambda: not children(worker), what="the daemon to end and to be reaped")


def test_late_output_of_a_daemon_goes_into_no_other_jobs_record(q: Queue) -> None:
    q.may_leave = True
    q.add("(until [ -e go ]; do sleep 0.03; done; echo late; touch said) & echo daemon")
    jobs = q.load([f"echo {number}" for number in range(6)])
    gate = q.add("touch go; until [ -e said ]; do sleep 0.03; done; echo gate")
    q.drain()
    assert [q("logs", job, "--stdout").out for job in [*jobs, gate]] == [f"{n}\n" for n in range(6)] + ["gate\n"]


def disk_use(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_blocks * 512
        except OSError:
            pass
    return total


@linux
def test_a_flood_is_bounded_on_disk_while_it_runs(q: Queue) -> None:
    q.set("max_output_bytes", "65536")
    job = q.add(FLOOD, "--timeout", "1", "--max-retries", "1")
    pool = q.start("worker", "start", "--drain")
    most = 0

    def sampled() -> bool:
        nonlocal most
        most = max(most, disk_use(q.db.parent))
        return pool.ended

    wait_for(sampled, what="the timeout")
    assert pool.wait() == 1
    assert most < 500_000_000
    kept = q.show(job)["runs"][0]["stdout"]
    assert kept.startswith("y\ny\n") and kept.endswith("y\ny\n") and len(kept) < 70_000
    assert disk_use(q.db.parent) < 10_000_000


def test_long_output_keeps_head_and_tail(q: Queue) -> None:
    q.set("max_output_bytes", "10000")
    job, short = q.load(["seq 1 300000; seq 1 5 >&2", "seq 1 10; seq 1 5 >&2"])
    q.drain()
    kept = q("logs", job, "--stdout").out
    assert kept.startswith("1\n2\n3\n") and kept.endswith("299999\n300000\n") and 5000 < len(kept) < 11000
    assert q("logs", job, "--stderr").out == "1\n2\n3\n4\n5\n"
    shown = [line for line in q("logs", job).out.splitlines() if not line.isdigit()]
    whole = [line for line in q("logs", short).out.splitlines() if not line.isdigit()]
    assert len(shown) > len(whole)  # the gap is marked


def test_binary_output_is_kept(q: Queue) -> None:
    data = bytes(range(256))
    job = q.add(r"printf '\377\000\001'; printf 'fine\n' >&2")
    many = q.add(f"echo {base64.b64encode(data).decode()} | base64 -d")
    q.drain()
    run = q.show(job)["runs"][0]
    assert base64.b64decode(run["stdout_base64"]) == b"\xff\0\1"
    assert run["stderr"] == "fine\n"
    assert q("logs", job, "--stdout").raw() == b"\xff\0\1"
    assert q("logs", many, "--stdout").raw() == data
    q("logs", many)
    q("show", many)


def test_a_folder_full_of_modules_is_harmless(q: Queue) -> None:
    """A worker imports nothing from the folder of a job."""
    for name in (
        sorted(set(sys.stdlib_module_names))
        if sys.version_info >= (3, 10)
        else ["tempfile", "random", "subprocess", "ctypes"]
    ):
        if not name.startswith("_"):
            (q.work / f"{name}.py").write_text("open('pwned', 'w')\n")
    q.load(
        [
            "echo hi",
            {"command": "exit 1", "max_retries": 2, "backoff_base": 0.1},
            {"command": HANG, "timeout": 0.2, "max_retries": 1},
        ]
    )
    q("worker", "start", "--drain", cwd="/", code=1)
    q.drain()
    assert not (q.work / "pwned").exists()


def test_thirty_enqueuers_and_four_workers_at_once(q: Queue) -> None:
    pools = [q.start("worker", "start", "--count", "2") for _ in range(2)]
    lines = [[f"{n}-{k}" for k in range(4)] for n in range(30)]
    adders = []
    for ids in lines:
        (q.work / f"jobs{ids[0]}").write_text("".join(f'{{"id":"{i}","command":"echo {i} >>ran"}}\n' for i in ids))
        adders.append(q.start("enqueue", "--file", f"jobs{ids[0]}"))
    for adder in adders:
        assert adder.wait(60) == 0, adder
        assert (adder.out, adder.err) == ("Enqueued: 4 jobs\n", "")
    wait_for(lambda: q.counts() == {"completed": 120}, timeout=60, what="all jobs to complete")
    assert [pool.stop() for pool in pools] == [0, 0]
    assert sorted(q.lines("ran")) == sorted(i for ids in lines for i in ids)
    assert {job["attempts"] for job in q.jobs()} == {1}


# What a kill at any moment may not do: run a job beside itself, lose it, or end it twice.
EXCLUSIVE = (
    "echo $PPID >>workers; exec 9>lock-$QUEUECTL_JOB_ID; flock -n 9 || echo $QUEUECTL_JOB_ID >>overlaps; "
    "sleep 0.1; echo $QUEUECTL_JOB_ID >>ended"
)


@linux
def test_an_enqueuer_killed_at_any_moment_adds_all_or_nothing(q: Queue) -> None:
    (q.work / "jobs").write_text("true\n" * 3000)
    total = len(q.jobs())
    for number in range(8):
        adder = q.start("enqueue", "--file", "jobs")
        time.sleep(0.03 + number * 0.015)  # the moment of the kill, spread over the command's life
        adder.process.kill()
        adder.wait()
        added = len(q.jobs()) - total
        assert added in (0, 3000)
        assert added or "Enqueued" not in adder.out
        total += added


@containers
def test_a_pool_in_a_container_of_its_own(q: Queue) -> None:
    """Pool and commands share the database's folder, and see different process ids; SIGTERM stops it as PID 1."""
    job = q.add(SLOW_GATE)
    pool = q.launch(["unshare", "--pid", "--fork", "--mount-proc", *q.program, "worker", "start"])
    q.wait_ready(pool, 1)
    q.wait_file("started")
    assert q.state(job) == "processing"
    (supervisor,) = children(pool.process.pid)
    kill(supervisor, signal.SIGTERM)
    q.touch("go")
    assert pool.wait() == 0
    assert q.state(job) == "completed"


@linux
def test_an_idle_pool_rests(q: Queue) -> None:
    """In a second of idleness four workers use next to no processor time, and write nothing."""
    with q.working("--count", "4"):
        q.wait_state(q.add("true"), "completed")

        def used() -> float:
            return sum(
                sum(map(int, read_proc(str(p.pid), "stat").rpartition(b")")[2].split()[11:13])) for p in q.processes()
            )

        def written() -> list[tuple[str, int, int]]:
            return sorted((f.name, f.stat().st_mtime_ns, f.stat().st_size) for f in q.db.parent.iterdir())

        before, files = used(), written()
        time.sleep(1)  # what is measured, not a wait
        assert used() - before <= 5  # ticks of 10 ms
        assert written() == files


# =====================================================================================================
# time: run_at, backoff, timeouts
# =====================================================================================================


def test_a_rest_that_is_over_is_not_taken_for_a_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a shortage of processes an idle worker once looked a hundred times a second, for ever."""
    worker: Any = queuectl.Worker(queuectl.WorkerConfig("/q.db", None, "pool", 1, (), *[False] * 5, ()))
    pauses: list[float] = []
    monkeypatch.setattr(worker.bell, "wait", pauses.append)
    for rest_until in (time.monotonic() - 1, time.monotonic() + 0.5):
        worker.rest_until = rest_until
        worker._idle()
    assert pauses[0] == 1 and 0 < pauses[1] <= 0.5


def test_an_idle_worker_starts_a_job_at_its_time(q: Queue) -> None:
    q.set("poll_interval_ms", "60000")
    with q.working():
        jobs = [q.add("true", "--delay", delay) for delay in ("0.9", "0.6")]
        for job in jobs:
            q.wait_state(job, "completed")
            shown = q.show(job)
            assert 0 <= moment(shown["started_at"]) - moment(shown["run_at"]) < 0.5


def test_a_time_that_has_passed_means_at_once(q: Queue) -> None:
    q.add("true", "--run-at", "2020-01-01T00:00:00Z")
    q.drain()
    assert q.counts() == {"completed": 1}


def test_a_scheduled_job_waits_and_then_keeps_its_priority(q: Queue) -> None:
    q.add(GATE)
    with q.working():
        q.wait_file("started")
        later = {"command": "echo later >>order", "delay": "0.3", "priority": 1}
        ids = q.load(["echo first >>order", later, {"command": "echo last >>order", "priority": 11}])
        due = moment(q.show(ids[1])["run_at"])
        assert due > time.time() - 5
        wait_for(lambda: time.time() > due, what="the time of the second job")
        q.touch("go")
        q.wait_state(ids[2], "completed")
        assert q.lines("order") == ["later", "first", "last"]


def failed_once(q: Queue, *options: str, count: int = 1) -> list[Job]:
    """Jobs that have failed once and now wait for their next try, with no worker alive."""
    q.load([{"command": "echo boom >&2; exit 3", "max_retries": 9}] * count, *options)
    q("worker", "start", "--max-jobs", str(count))
    return q.jobs()


def pause(job: Job) -> float:
    return moment(job["next_retry_at"]) - moment(job["finished_at"])


def test_a_failed_job_says_when_it_runs_again_and_why(q: Queue) -> None:
    (job,) = failed_once(q, "--backoff-base", "60")
    assert (job["state"], job["attempts"], job["exit_code"]) == ("failed", 1, 3)
    assert "boom" in job["last_error"]
    assert pause(job) == pytest.approx(60, abs=0.1)


@pytest.mark.parametrize(
    ("settings", "option", "seconds"),
    [
        ({}, [], 2),
        ({"backoff_base": "7"}, [], 7),
        ({"backoff_base": "7"}, ["--backoff-base", "5"], 5),
        ({"backoff_base": "5000"}, [], 3600),
        ({"backoff_base": "50", "backoff_max": "30s"}, [], 30),
    ],
    ids=["default", "configured", "its own", "capped at an hour", "configured cap"],
)
def test_backoff(q: Queue, settings: dict[str, str], option: list[str], seconds: float) -> None:
    for key, value in settings.items():
        q.set(key, value)
    (job,) = failed_once(q, *option)
    assert pause(job) == pytest.approx(seconds, abs=0.1)


def test_backoff_grows_with_the_attempts(q: Queue) -> None:
    job = q.add("exit 1", "--max-retries", "4", "--backoff-base", "0.5")
    q.drain(code=1)
    runs = q.show(job)["runs"]
    pauses = [moment(b["started_at"]) - moment(a["finished_at"]) for a, b in zip(runs, runs[1:])]
    for attempt, seen in enumerate(pauses, 1):
        assert 0.5**attempt - 0.01 <= seen < 0.5**attempt + 1
    assert len(pauses) == 3


def test_jitter_only_adds(q: Queue) -> None:
    q.set("backoff_jitter", "0.5")
    pauses = [pause(job) for job in failed_once(q, "--backoff-base", "100", count=20)]
    assert min(pauses) >= 99.9 and max(pauses) <= 150.1
    assert max(pauses) - min(pauses) > 1


@pytest.mark.parametrize("limit", ["0", "1"])
def test_no_retries_mean_a_single_run(q: Queue, limit: str) -> None:
    job = q.add("echo run >>runs; exit 1", "--max-retries", limit)
    q.drain(code=1)
    assert (q.state(job), q.show(job)["attempts"], q.lines("runs")) == ("dead", 1, ["run"])


def test_a_timeout_ends_a_run(q: Queue) -> None:
    job = q.add("echo before; echo why >&2; sleep 300", "--timeout", "0.3", "--max-retries", "1")
    q.drain(code=1)
    shown = q.show(job)
    assert (shown["state"], shown["attempts"]) == ("dead", 1)
    assert re.search(r"tim(e|ed)[ -]?out", shown["last_error"], re.I)
    assert shown["runs"][0]["stdout"] == "before\n"
    assert 0.3 <= shown["runs"][0]["duration_seconds"] < 10


def test_a_run_that_ends_well_after_its_timeout_has_failed_all_the_same(q: Queue) -> None:
    job = q.add("trap 'exit 0' TERM; while :; do sleep 0.05; done", "--timeout", "0.3", "--max-retries", "1")
    q.drain(code=1)
    assert q.state(job) == "dead"


def test_a_run_may_clean_up_before_it_is_killed(q: Queue) -> None:
    """SIGTERM comes first, SIGKILL only after kill_grace_seconds (5)."""
    job = q.add(
        "trap 'sleep 0.3; echo cleaned; exit 1' TERM; while :; do sleep 0.05; done",
        "--timeout",
        "0.3",
        "--max-retries",
        "1",
    )
    q.drain(code=1)
    assert q.show(job)["runs"][0]["stdout"] == "cleaned\n"


@linux
@pytest.mark.parametrize(
    "command",
    [STUBBORN_TREE, HIDDEN_GRANDCHILD + "sleep 300", SCRUBBED_CHILD],
    ids=["all ignore SIGTERM", "hidden grandchild", "scrubbed child"],
)
def test_a_timeout_ends_the_whole_tree(q: Queue, command: str) -> None:
    q.set("kill_grace_seconds", "0.2")
    q.add(command, "--timeout", "0.7", "--max-retries", "1")
    q.drain(code=1)
    assert (q.work / "started").exists()
    assert not q.processes()


def test_settings_of_time_are_taken_when_a_job_is_enqueued(q: Queue) -> None:
    earlier = q.add("true")
    for key, value in (("max_retries", "5"), ("timeout_seconds", "1m"), ("priority", "2")):
        q.set(key, value)
    later = q.add("true")
    fields = ("max_retries", "timeout_seconds", "priority")
    assert [q.show(earlier)[field] for field in fields] == [3, None, 10]
    assert [q.show(later)[field] for field in fields] == [5, 60, 2]


# =====================================================================================================
# stop and signals
# =====================================================================================================


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_first_signal_finishes_running_jobs_and_starts_no_more(q: Queue, name: str) -> None:
    running, waiting = q.load([SLOW_GATE, "true"])
    pool = q.pool()
    q.wait_file("started")
    pool.signal(getattr(signal, name))
    q.touch("go")
    assert pool.wait() == 0
    assert (q.state(running), q.state(waiting)) == ("completed", "pending")
    assert (q.work / "ended").exists()


@pytest.mark.parametrize("command", [HANG, IGNORE_TERM], ids=["hangs", "ignores SIGTERM"])
def test_a_second_signal_ends_running_jobs_and_gives_them_back(q: Queue, command: str) -> None:
    q.set("kill_grace_seconds", "0.3")
    job = q.add(command)
    pool = q.pool()
    q.wait_file("started")
    pool.signal(signal.SIGINT)
    pool.signal(signal.SIGTERM)  # of another kind, for two of one kind may arrive as one
    assert pool.wait() == 130
    assert not q.processes()
    assert (q.state(job), q.show(job)["attempts"]) == ("pending", 0)


def test_an_idle_pool_stops_at_once(q: Queue) -> None:
    pool = q.pool("--count", "2")
    assert pool.stop() == 0


def test_worker_stop_waits_for_running_jobs(q: Queue) -> None:
    running, waiting = q.load([SLOW_GATE, "true"])
    pool = q.pool()
    q.wait_file("started")
    stop = q.start("worker", "stop")
    q.touch("go")
    assert stop.wait() == 0
    assert (q.work / "ended").exists()
    assert pool.wait() == 0
    assert (q.state(running), q.state(waiting)) == ("completed", "pending")


def test_worker_stop_now_gives_jobs_back(q: Queue) -> None:
    job = q.add(HANG)
    pool = q.pool()
    q.wait_file("started")
    q("worker", "stop", "--now")
    assert pool.wait() in (0, 130)
    assert (q.state(job), q.show(job)["attempts"]) == ("pending", 0)


def test_worker_stop_gives_up_after_its_timeout(q: Queue) -> None:
    job = q.add(GATE)
    pool = q.pool()
    q.wait_file("started")
    q("worker", "stop", "--timeout", "300ms", code=124)
    assert not pool.ended
    q.touch("go")
    assert pool.wait() == 0  # it has been asked all the same
    assert q.state(job) == "completed"


def test_worker_stop_ends_every_pool_alive_and_no_later_one(q: Queue) -> None:
    pools = [q.pool(), q.pool("--count", "2")]
    q("worker", "stop")
    assert [pool.wait() for pool in pools] == [0, 0]
    assert q.workers() == 0
    q("worker", "stop")  # nothing running is success
    later = q.pool()
    q.wait_state(q.add("true"), "completed")
    assert later.stop() == 0


def test_worker_stop_leaves_other_databases_alone(q: Queue, other: Queue) -> None:
    pool, theirs = q.pool(), other.pool()
    q("worker", "stop")
    assert pool.wait() == 0
    assert other.workers() == 1
    assert theirs.stop() == 0


def test_a_waiting_command_can_be_interrupted(q: Queue) -> None:
    q.add(GATE)
    pool = q.pool()
    q.wait_file("started")
    stop = q.start("worker", "stop")
    wait_for(lambda: "told to stop" in pool.text, what="the pool to say that it stops")
    stop.signal(signal.SIGINT)
    assert stop.wait() == 130
    assert "Traceback" not in stop.err


def test_a_job_that_the_same_shutdown_ended_is_given_back(q: Queue) -> None:
    """systemd sends SIGTERM to every process of a service, jobs included."""
    job = q.add("echo $$ >pid.new; mv pid.new pid; exec sleep 300")
    pool = q.pool()
    pid = int(q.wait_file("pid"))
    pool.signal(signal.SIGTERM)
    wait_for(lambda: q.workers() == 0 or not signal_pending(pool.process.pid), what="the signal to arrive")
    os.kill(pid, signal.SIGTERM)
    assert pool.wait() == 0
    assert (q.state(job), q.show(job)["attempts"]) == ("pending", 0)


def signal_pending(pid: int) -> bool:
    pending = re.findall(rb"(?:SigPnd|ShdPnd):\s*([0-9a-f]+)", read_proc(str(pid), "status"))
    return any(int(mask, 16) for mask in pending)


def test_ctrl_c_at_a_terminal_finishes_the_running_job(q: Queue) -> None:
    job = q.add(SLOW_GATE)
    pool = q.terminal("worker", "start")
    q.wait_file("started")
    pool.type("\x03")
    wait_for(lambda: "^C" in pool.out, what="the terminal to see ^C")
    q.touch("go")
    assert pool.wait() == 0, pool
    assert q.state(job) == "completed"


def test_ctrl_c_twice_at_a_terminal_gives_the_job_back(q: Queue) -> None:
    job = q.add(HANG)
    pool = q.terminal("worker", "start")
    q.wait_file("started")
    said = len(pool.out)
    pool.type("\x03")
    wait_for(lambda: len(pool.out) > said + 4, what="the pool to say that it stops")
    pool.type("\x03")
    assert pool.wait() == 130, pool
    assert (q.state(job), q.show(job)["attempts"]) == ("pending", 0)


def test_a_closed_terminal_lets_the_running_job_finish(q: Queue) -> None:
    job = q.add(SLOW_GATE)
    pool = q.terminal("worker", "start")
    q.wait_file("started")
    pool.hang_up()
    q.touch("go")
    pool.wait()
    q.wait_state(job, "completed")


# =====================================================================================================
# reading: status, list, show, logs
# =====================================================================================================


def test_status_as_json(q: Queue) -> None:
    assert q.status()["jobs"] == dict.fromkeys(STATES, 0)
    q.load(["true", {"command": "exit 1", "max_retries": 1}, {"command": "true", "delay": "1h"}])
    q.drain(code=1)
    status = q.status()
    assert status["jobs"] == {**dict.fromkeys(STATES, 0), "pending": 1, "completed": 1, "dead": 1}
    assert status["workers"] == 0


@pytest.mark.parametrize(
    "command",
    [
        "status",
        "list",
        "show one",
        "logs one",
        "worker list",
        "dlq list",
        "config show",
        "config list",
        "config get priority",
    ],
)
def test_every_reading_command_takes_json(settled: Queue, command: str) -> None:
    result = settled(*command.split(), "--json")
    result.json()
    assert result.err == ""


def test_a_list_as_json_has_one_object_a_line(q: Queue) -> None:
    assert q("list", "--json").out.split("\n") == ["[", "]", ""]
    q.load(["echo 1", "echo 2", "echo 3"])
    lines = q("list", "--json").out.split("\n")
    assert (lines[0], lines[-2], lines[-1]) == ("[", "]", "")
    assert [line[-1] for line in lines[1:-2]] == [",", ",", "}"]
    assert [json.loads(line.rstrip(","))["command"] for line in lines[1:-2]] == ["echo 1", "echo 2", "echo 3"]


def test_list_shows_the_newest_fifty_newest_last(q: Queue) -> None:
    ids = q.load([{"id": f"job-{n:03}", "command": "true"} for n in range(60)])
    result = q("list")
    assert re.findall(r"job-\d{3}", result.out) == ids[10:]
    assert re.search(
        r"--all|\b10\b|\b60\b", result.out.replace("job-010", "") + result.err
    )  # says that it leaves some out
    assert re.findall(r"job-\d{3}", q("list", "--all").out) == ids
    assert re.findall(r"job-\d{3}", q("list", "--limit", "2").out) == ids[58:]
    assert [job["id"] for job in q.jobs()] == ids
    assert [job["id"] for job in q.jobs("--limit", "3")] == ids[57:]


def test_list_by_state_and_queue(q: Queue) -> None:
    done, dead = q.load([{"command": "true", "queue": "a"}, {"command": "exit 1", "max_retries": 1, "queue": "a"}])
    q.drain(code=1)
    waiting, elsewhere = q.load([{"command": "true", "queue": "a"}, {"command": "true", "queue": "b"}])
    assert [job["id"] for job in q.jobs("--state", "dead")] == [dead]
    assert [job["id"] for job in q.jobs("--state", "dead", "--state", "completed")] == [done, dead]
    assert [job["id"] for job in q.jobs("--state", "pending", "--queue", "a")] == [waiting]
    assert [job["id"] for job in q.jobs("--queue", "b")] == [elsewhere]


def test_show_tells_everything_to_people(settled: Queue) -> None:
    text = settled("show", "one").out
    for word in ("one", "exit 4", "mail", "dead", "a long story"):
        assert word in text


def test_logs_of_streams_and_attempts(q: Queue) -> None:
    job = q.add(
        'echo "out $QUEUECTL_ATTEMPT"; echo "err $QUEUECTL_ATTEMPT" >&2; exit 1',
        "--max-retries",
        "2",
        "--backoff-base",
        "0.1",
    )
    q.drain(code=1)
    assert q("logs", job, "--stdout", "--attempt", "1").out == "out 1\n"
    assert q("logs", job, "--stderr", "--attempt", "2").out == "err 2\n"
    text = q("logs", job).out
    for word in ("out 1", "err 1", "out 2", "err 2"):
        assert word in text
    assert text.endswith("s over 2 runs.\n")
    q.fails("logs", job, "--attempt", "3")


def test_an_attempts_newest_run_is_shown(q: Queue) -> None:
    job = q.add("echo run >>runs; wc -l <runs | tr -d ' '; exit 1", "--max-retries", "2", "--backoff-base", "0.1")
    q.drain(code=1)
    q("dlq", "retry", job)
    q.drain(code=1)
    runs = q.show(job)["runs"]
    assert [(run["run"], run["attempt"], run["stdout"]) for run in runs] == [
        (1, 1, "1\n"),
        (2, 2, "2\n"),
        (3, 1, "3\n"),
        (4, 2, "4\n"),
    ]
    assert q("logs", job, "--stdout", "--attempt", "1").out == "3\n"
    assert q("logs", job).out.endswith("s over 4 runs.\n")


def test_logs_of_a_job_that_has_not_run(q: Queue) -> None:
    job = q.add("true", "--delay", "1h")
    q("logs", job)
    assert q("logs", job, "--stdout").out == ""


def test_logs_follow_a_running_job(q: Queue) -> None:
    job = q.add("echo one; until [ -e go ]; do sleep 0.03; done; echo two")
    with q.working():
        follow = q.start("logs", job, "--follow")
        wait_for(lambda: "one" in follow.out, what="the first line")
        assert "two" not in follow.out
        q.touch("go")
        assert follow.wait() == 0
        assert "two" in follow.out
        assert follow.out.count("one") == 1


def test_logs_follow_a_job_from_before_its_start_through_its_retries(q: Queue) -> None:
    job = q.add('echo "try $QUEUECTL_ATTEMPT"; exit 1', "--max-retries", "2", "--backoff-base", "0.2")
    follow = q.start("logs", job, "--follow")
    q.drain(code=1)
    follow.wait()
    assert "try 1" in follow.out and "try 2" in follow.out


@pytest.mark.parametrize("command", ["show", "logs", "delete", "cancel", "retry", "dlq retry"])
def test_an_unknown_job_is_one_clear_line(settled: Queue, command: str) -> None:
    assert "no-such-job" in settled.fails(*command.split(), "no-such-job").err


HELP = [
    "", "enqueue", "worker", "worker start", "worker stop", "worker list", "status", "list", "show", "logs", "cancel",
    "delete", "retry", "dlq", "dlq list", "dlq retry", "dlq purge", "config", "config show", "config list",
    "config get", "config set", "config unset",
]  # fmt: skip


@pytest.mark.parametrize("command", HELP)
def test_help_has_examples_at_every_level(q: Queue, command: str) -> None:
    result = q.here([*command.split(), "--help"])
    assert result.code == 0
    assert re.search(rf"^.*queuectl {command}", result.out, re.M)
    assert re.search("example", result.out, re.I)
    assert result.err == ""
    assert not q.db.exists()


@pytest.mark.parametrize(
    "words, like",
    [
        ("", "--help"), ("help", "--help"), ("dlq", "dlq --help"), ("help dlq", "dlq --help"),
        ("help run", "run --help"), ("help dlq retry", "dlq retry --help"), ("--db x worker", "worker --help"),
    ],
)  # fmt: skip
def test_help_is_a_command_too(q: Queue, words: str, like: str) -> None:
    shown = q.here(words.split())
    assert (shown.code, shown.err) == (0, "") and shown.out == q.here(like.split()).out
    assert not q.db.exists()


def test_help_is_divided(q: Queue) -> None:
    purposes = re.findall(r"^(\w+):$", q.here(["help"]).out, re.M)
    assert purposes == ["Run", "Inspect", "Control", "Maintain", "Examples"]
    for name in queuectl.COMMANDS:
        assert f"\n  {name.split()[0]} " in q.here(["help"]).out
    titles = re.findall(r"^(\w+):$", q.here(["help", "enqueue"]).out, re.M)
    assert titles == [
        "Arguments", "Options", "Job", "Schedule", "Retries", "Environment", "Output", "Examples",
    ]  # fmt: skip
    assert q.here(["help", "enqueue"]).out.startswith("usage: queuectl enqueue [OPTIONS] [COMMAND ")
    assert "Selection:" in q.here(["help", "cancel"]).out
    assert "--concurrency N" in q.here(["help", "queue", "set"]).out.split("\n")[0]


@pytest.mark.parametrize(
    "words, meant",
    [
        ("add", "enqueue"), ("ls", "list"), ("ps", "list"), ("rm", "delete"), ("kill", "cancel"),
        ("top", "status --watch"), ("log", "logs"), ("tail", "logs --follow"), ("start", "worker start"),
        ("stop", "worker stop"), ("restart", "retry"), ("clean", "purge"), ("follow", "logs --follow"),
        ("jobs", "list"), ("dlq ls", "dlq list"), ("worker strat", "worker start"), ("help lits", "list"),
        ("run --jobs 2 true", "-j"), ("enqueue --label x true", "--id"), ("run --halt true", "--fail-fast"),
    ],
)  # fmt: skip
def test_words_of_other_programs_are_understood_in_the_error(q: Queue, words: str, meant: str) -> None:
    assert f"did you mean {meant}?" in q.fails(*words.split(), code=2).err
    assert not q.db.exists()


@pytest.mark.parametrize("words", ["worker run", "dlq rm", "list --lines 3 --since 1h", "xyzzy"])
def test_a_word_without_a_near_command_gets_no_guess(q: Queue, words: str) -> None:
    assert "did you mean" not in q.fails(*words.split(), code=2).err


def test_importing_runs_nothing(q: Queue) -> None:
    result = q.run(
        [sys.executable, "-c", "import queuectl; print(callable(queuectl.main))"],
        env={"PYTHONPATH": str(PROGRAM.parent)},
    )
    assert (result.code, result.out, result.err) == (0, "True\n", "")
    assert list(q.db.parent.iterdir()) == []


def test_debug_adds_the_traceback(q: Queue) -> None:
    assert "Traceback" in q("show", "no-such-job", code=1, env={"QUEUECTL_DEBUG": "1"}).err


# =====================================================================================================
# dlq, retry, delete, cancel; naming jobs
# =====================================================================================================


@pytest.fixture
def dead(q: Queue) -> Queue:
    """A queue with two dead jobs, a completed one and a waiting one."""
    doomed = [{"id": name, "command": "echo no; exit 1", "max_retries": 1} for name in ("dead-1", "dead-2")]
    q.load([*doomed, {"id": "done", "command": "true"}, {"id": "waits", "command": "true", "delay": "1h"}])
    q.drain(code=1)
    return q


def test_dlq_list_has_the_dead_alone(dead: Queue) -> None:
    assert [job["id"] for job in dead("dlq", "list", "--json").json()] == ["dead-2", "dead-1"]  # the last to die first
    text = dead("dlq", "list").out
    assert "dead-1" in text and "dead-2" in text and "done" not in text and "waits" not in text


def test_dlq_retry_starts_afresh_and_keeps_old_runs(dead: Queue) -> None:
    dead("dlq", "retry", "dead-1")
    job = dead.show("dead-1")
    assert (job["state"], job["attempts"], len(job["runs"])) == ("pending", 0, 1)
    assert dead.state("dead-2") == "dead"
    dead.drain(code=1)
    assert [(run["run"], run["attempt"]) for run in dead.show("dead-1")["runs"]] == [(1, 1), (2, 1)]


def test_dlq_retry_all(dead: Queue) -> None:
    dead("dlq", "retry", "--all")
    assert dead.counts() == {"completed": 1, "pending": 3}
    dead("dlq", "retry", "--all")  # none left is no error
    dead.fails("dlq", "retry", code=2)


@pytest.mark.parametrize("args", [["dead-1", "waits"], ["dead-1", "done"], ["dead-1", "nobody"]])
def test_dlq_retry_takes_all_or_none(dead: Queue, args: list[str]) -> None:
    before = dead.states()
    dead.fails("dlq", "retry", *args)
    assert dead.states() == before


def test_retry_of_any_ended_job(dead: Queue) -> None:
    dead("retry", "done", "dead-1")
    assert dead.states() == {"dead-1": "pending", "dead-2": "dead", "done": "pending", "waits": "pending"}
    dead.fails("retry", "waits")
    dead.drain(code=1)
    assert len(dead.show("done")["runs"]) == 2


def test_dlq_purge(dead: Queue) -> None:
    dead("dlq", "purge", "--older-than", "1h")
    assert dead.counts() == {"completed": 1, "dead": 2, "pending": 1}
    dead("dlq", "purge")
    assert dead.counts() == {"completed": 1, "pending": 1}


def test_delete_forgets_jobs(dead: Queue) -> None:
    dead.fails("delete", "done", "nobody")
    assert len(dead.jobs()) == 4
    dead("delete", "done", "dead-1", "waits")
    assert list(dead.states()) == ["dead-2"]
    dead.fails("logs", "done")


def test_a_running_job_is_not_deleted(q: Queue) -> None:
    running, waiting = q.load([GATE, "true"])
    with q.working():
        q.wait_file("started")
        q.fails("delete", running, waiting)
        assert len(q.jobs()) == 2
        q.touch("go")
        q.wait_state(running, "completed")


def test_cancel_of_a_waiting_job(q: Queue) -> None:
    waiting, other = q.load(["echo ran >>ran", "true"])
    q("cancel", waiting)
    assert (q.state(waiting), q.state(other)) == ("cancelled", "pending")
    q.drain()
    assert q.lines("ran") == []
    (failed, *_) = [job for job in failed_once(q, "--backoff-base", "60") if job["state"] == "failed"]
    q("cancel", failed["id"])
    assert (q.state(failed["id"]), q.show(failed["id"])["next_retry_at"]) == ("cancelled", None)


def test_cancel_of_a_running_job_ends_all_its_processes(q: Queue) -> None:
    q.set("poll_interval_ms", "60000")
    q.set("kill_grace_seconds", "0.3")
    with q.working():
        job = q.add(STUBBORN_TREE if LINUX else IGNORE_TERM)
        q.wait_file("started")
        q("cancel", job)
        q.wait_state(job, "cancelled")
        assert not [process for process in q.processes() if "sleep" in process.command]
        q.wait_state(q.add("true"), "completed")  # the worker lives


def test_cancel_takes_all_or_none(dead: Queue) -> None:
    before = dead.states()
    dead.fails("cancel", "waits", "nobody")
    dead.fails("cancel", "waits", "done")
    assert dead.states() == before


def test_a_prefix_names_a_job_whose_id_queuectl_made(q: Queue) -> None:
    job = q.add("true")
    assert q.show(job[:4])["id"] == job
    q.fails("show", job[:3])
    q("delete", job[:6])
    assert q.jobs() == []


def test_a_chosen_id_has_no_prefixes(q: Queue) -> None:
    q("enqueue", "--id", "job10", "true")
    for prefix in ("job1", "job", "j"):
        q.fails("delete", prefix)
    assert list(q.states()) == ["job10"]
    q("enqueue", "--id", "job1", "true")
    q("delete", "job1")
    assert list(q.states()) == ["job10"]


# =====================================================================================================
# config
# =====================================================================================================

DEFAULTS = {
    "max_retries": 3, "backoff_base": 2, "backoff_max": 3600, "backoff_jitter": 0, "timeout_seconds": None,
    "priority": 10, "poll_interval_ms": 1000, "kill_grace_seconds": 5, "max_output_bytes": 1 << 20,
    "retry_after": 60, "max_deferrals": 100, "keep_completed": 2592000.0, "keep_dead": None, "keep_history": 2592000.0,
    "on_dead": None, "on_end": None,
    "shell": "/bin/sh",
}  # fmt: skip


def test_config_has_the_defaults(q: Queue) -> None:
    assert q("config", "show", "--json").json() == DEFAULTS
    assert q("config", "list", "--json").json() == DEFAULTS
    text = q("config", "show").out
    assert all(key in text for key in DEFAULTS)


def test_config_set_get_unset(q: Queue) -> None:
    given = {
        "max-retries": ("5", 5), "backoff_base": ("0.1", 0.1), "backoff-max": ("10m", 600),
        "backoff_jitter": ("0.25", 0.25), "timeout_seconds": ("1h", 3600), "priority": ("-3", -3),
        "poll-interval-ms": ("2000", 2000), "kill_grace_seconds": ("0.5", 0.5),
        "max_output_bytes": ("4096", 4096), "retry-after": ("5m", 300),
        "max-deferrals": ("7", 7), "keep-completed": ("30d", 2592000), "keep_dead": ("1d", 86400),
        "keep-history": ("7d", 604800),
        "on-dead": ("mail -s dead me", "mail -s dead me"), "on_end": ("echo", "echo"),
        "shell": ("bash", shutil.which("bash")),
    }  # fmt: skip
    for key, (text, _) in given.items():
        q("config", "set", key, text)
    values = {key.replace("-", "_"): value for key, (_, value) in given.items()}
    assert q("config", "show", "--json").json() == values
    assert q("config", "get", "poll_interval_ms", "--json").json() == 2000
    assert q("config", "get", "poll-interval-ms", "--json").json() == 2000
    q("config", "set", "timeout-seconds", "none")
    q("config", "set", "max_retries", "0")
    q("config", "unset", "backoff-base")
    q("config", "unset", "priority")
    changed = {"timeout_seconds": None, "max_retries": 0, "backoff_base": 2, "priority": 10}
    assert q("config", "show", "--json").json() == {**values, **changed}


def test_config_get_prints_the_value_alone(q: Queue) -> None:
    assert q("config", "get", "max_retries").out == "3\n"
    assert q("config", "get", "max-retries").out == "3\n"


def test_running_workers_follow_a_setting(q: Queue) -> None:
    q("config", "set", "backoff_base", "1000")
    q("config", "set", "poll_interval_ms", "60000")
    with q.working():
        q.wait_state(q.add("true"), "completed")
        q("config", "set", "backoff_base", "0.1")
        q("config", "set", "max_output_bytes", "2000")
        job = q.add("seq 1 5000; exit 1", "--max-retries", "2")
        q.wait_state(job, "dead")
        assert len(q.show(job)["runs"][0]["stdout"]) < 3000


@pytest.mark.parametrize("args", [["get", "max_retry"], ["set", "max_retry", "3"], ["unset", "max_retry"]])
def test_a_wrong_key_is_refused_and_the_nearest_named(q: Queue, args: list[str]) -> None:
    error = q.fails("config", *args, code=2).err
    assert "max_retry" in error and "max_retries" in error


# =====================================================================================================
# bad input: one clear line, exit 2, nothing changed
# =====================================================================================================


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Queue]:
    """A queue that nothing in this room may change."""
    queue = Queue(tmp_path_factory.mktemp("still"))
    queue("enqueue", "--id", "present", "true")
    yield queue
    queue.close()


def job_json(**fields: Any) -> str:
    return json.dumps({"command": "echo x", **fields})


BIG = str(2**63)
BAD_OPTIONS = {
    "priority": ["nan", "1.5", BIG, "abc", ""],
    "max-retries": ["-1", "1.5", BIG, "abc"],
    "timeout": ["nan", "inf", "-1", "1e999", "5x", "1h-5m", ""],
    "delay": ["nan", "-1", "abc"],
    "backoff-base": ["0", "-1", "nan", "abc"],
    "run-at": ["tomorrow at noon", "2026-02-30T00:00:00Z", "now+", "now+nan", "", "99999-01-01"],
    "queue": ["", "a\nb"],
    "cwd": [""],
    "env": ["=x", ""],
    "if-exists": ["maybe"],
    "id": ["", "a b", "a,b", "-x", "a\tb", "a\nb", "a\x1bb", "a\u202eb", "a\u00a0b", "../x", "x" * 129, "x" * 10_000],
}
BAD_SETTINGS = {
    "max_retries": ["-1", "1.5", BIG, "abc", ""],
    "backoff_base": ["0", "-1", "nan", "inf", "abc"],
    "backoff_max": ["-1", "nan", "abc"],
    "backoff_jitter": ["-0.1", "nan", "abc"],
    "timeout_seconds": ["-1", "inf", "abc"],
    "priority": ["1.5", BIG, "abc"],
    "poll_interval_ms": ["-5", "0", "nan"],
    "kill_grace_seconds": ["-1", "nan"],
    "max_output_bytes": ["-1", BIG, "abc"],
    "retry_after": ["-1", "abc"],
    "max_deferrals": ["-1", "1.5"],
    "keep_completed": ["-1", "abc"],
    "on_dead": ["", "  "],
    "no_such_key": ["1"],
}
BAD_JOBS = {
    "broken": '{"command":',
    "more behind it": '{"command":"echo x"} more',
    "two objects": '{"command":"echo x"}{"command":"echo y"}',
    "no command": "{}",
    "no command but an id": '{"id":"x"}',
    "empty command": job_json(command=""),
    "null command": job_json(command=None),
    "command is a number": job_json(command=5),
    "command is a list of numbers": job_json(command=["echo", 5]),
    "command is an empty list": job_json(command=[]),
    "NUL in command": job_json(command="echo \0"),
    "two commands": '{"command":"a","cmd":"b"}',
    "duplicate key": '{"command":"a","command":"b"}',
    "lone surrogate": '{"command":"echo \\ud800"}',
    "lone surrogate in a name": '{"command":"echo","\\udfff":1}',
    "5,000 digits": '{"command":"echo x","priority":' + "1" * 5000 + "}",
    "nested 20,000 deep": '{"command":"echo x","env":' + '{"a":' * 20_000,
    "nested lists": '{"command":"echo x","env":' + "[" * 100_000,
    "NaN": '{"command":"echo x","priority":NaN}',
    "Infinity": '{"command":"echo x","timeout_seconds":Infinity}',
    "1e999": '{"command":"echo x","timeout_seconds":1e999}',
    "priority true": job_json(priority=True),
    "priority 1.5": job_json(priority=1.5),
    "priority 2**63": job_json(priority=2**63),
    "priority list": job_json(priority=[1]),
    "max_retries -1": job_json(max_retries=-1),
    "max_retries 2**63": job_json(max_retries=2**63),
    "max_retries false": job_json(max_retries=False),
    "timeout -1": job_json(timeout_seconds=-1),
    "timeout text": job_json(timeout_seconds="soon"),
    "backoff_base 0": job_json(backoff_base=0),
    "backoff_base -2": job_json(backoff_base=-2),
    "delay -1": job_json(delay=-1),
    "run_at number in text": job_json(run_at="12"),
    "run_at list": job_json(run_at=[]),
    "id true": job_json(id=True),
    "id 1.5": job_json(id=1.5),
    "id space": job_json(id="a b"),
    "id control": job_json(id="a\x00b"),
    "queue empty": job_json(queue=""),
    "queue number": job_json(queue=5),
    "cwd number": job_json(cwd=5),
    "env list": job_json(env=["A=1"]),
    "env number": job_json(env={"A": 1}),
    "env empty name": job_json(env={"": "x"}),
    "env name with =": job_json(env={"A=B": "x"}),
    "env NUL": job_json(env={"A": "x\0"}),
    "unknown field": job_json(colour="red"),
}


def refused_without_a_change(still: Queue, *args: Word, **options: Any) -> Result:
    before = contents(still.db.parent)
    result = still.here(args, **options)
    assert result.code == 2, result
    check_error(result)
    assert len(result.err) < 2000
    assert contents(still.db.parent) == before
    return result


def pairs(table: dict[str, list[str]]) -> list[Any]:
    """A row for each value that a name may not have."""
    return [pytest.param(n, v, id=shorten(ascii(f"{n}={v}"), 40)) for n, values in table.items() for v in values]


@pytest.mark.parametrize(("name", "value"), pairs(BAD_OPTIONS))
def test_bad_options_of_enqueue(still: Queue, name: str, value: str) -> None:
    refused_without_a_change(still, "enqueue", f"--{name}={value}", "echo x")


@pytest.mark.parametrize(("name", "value"), pairs(BAD_SETTINGS))
def test_bad_settings(still: Queue, name: str, value: str) -> None:
    refused_without_a_change(still, "config", "set", name, value)


@pytest.mark.parametrize("text", BAD_JOBS.values(), ids=BAD_JOBS)
def test_bad_json_for_enqueue(still: Queue, text: str) -> None:
    refused_without_a_change(still, "enqueue", text)


@pytest.mark.parametrize("name", ["lone surrogate", "5,000 digits", "duplicate key", "NaN", "unknown field"])
def test_bad_json_in_a_file(still: Queue, name: str) -> None:
    assert (
        "line 2" in refused_without_a_change(still, "enqueue", "--file", "-", stdin=f"echo 1\n{BAD_JOBS[name]}\n").err
    )


@pytest.mark.parametrize(
    "text",
    [
        "[\n5\n]\n",
        '[\n"echo x"\n]\n',
        '[\n{"command":"x"},\n',
        "[\n" + "[" * 100_000,
        "echo \0\n",
    ],
    ids=["a number", "a string", "no end", "deep", "NUL"],
)
def test_bad_files(still: Queue, text: str) -> None:
    refused_without_a_change(still, "enqueue", "--file", "-", stdin=text)


def test_a_deep_line_in_a_file(still: Queue) -> None:
    text = '{"command":"echo x","env":' + '{"a":' * 100_000 + "1" + "}" * 100_001
    refused_without_a_change(still, "enqueue", "--file", "-", stdin=text + "\n")


@pytest.mark.parametrize(
    "args",
    [
        ["enqueue"], ["enqueue", ""], ["enqueue", "   "], ["enqueue", "--file", "-", "echo x"],
        ["enqueue", "--prio", "5", "echo x"], ["enqueue", "--no-such-option", "echo x"], ["enqueue", b"echo \xff"],
        ["enqueue", "--id", b"a\xff", "echo x"], ["frobnicate"], ["list", "--stat", "dead"],
        ["list", "--state", "foo"], ["list", "--limit=-1"], ["list", "--limit", "x"], ["status", "extra"], ["show"],
        ["logs", "present", "--attempt", "x"], ["logs", "present", "--stdout", "--stderr"], ["delete"], ["cancel"],
        ["retry"], ["dlq", "purge", "--older-than", "x"], ["worker", "start", "--count", "0"],
        ["worker", "start", "--count=-1"], ["worker", "start", "--count", "two"],
        ["worker", "start", "--max-jobs", "0"], ["worker", "start", "--queue", ""],
        ["worker", "stop", "--timeout", "x"], ["worker", "start", "--drai"], ["status", "--js"],
        ["config", "set", "max_retries"], ["config", "get"], ["--d", "x.db", "status"],
    ],
    ids=lambda args: shorten(ascii(args), 50),
)  # fmt: skip
def test_wrong_usage(still: Queue, args: list[Word]) -> None:
    refused_without_a_change(still, *args)


@pytest.mark.parametrize(
    "option",
    [
        f"--timeout={BIG}",
        f"--delay={BIG}",
        "--run-at=9999-12-31T23:59:59Z",
        "--max-retries=1000000000",
        f"--backoff-base={BIG}",
    ],
)
def test_huge_numbers_are_refused_or_work(q: Queue, option: str) -> None:
    if q("enqueue", option, "false", code=(0, 2)).code == 0:
        q("list")
        q("list", "--json")
        q("worker", "start", "--drain" if "delay" in option or "run-at" in option else "--max-jobs=1")
        q("status")


def test_a_file_that_cannot_be_read(still: Queue) -> None:
    for name in ("no-such-file", "/"):
        still.fails("enqueue", "--file", name, code=(1, 2))


# =====================================================================================================
# output faults
# =====================================================================================================


@pytest.mark.parametrize("command", ["list --json", "list --all", "status", "--help"])
def test_a_reader_that_leaves_is_no_error(big: Queue, command: str) -> None:
    result = big.bash(f'queuectl {command} | head -1; echo "${{PIPESTATUS[0]}}"')
    assert result.err == ""
    assert result.out.splitlines()[-1] in ("0", "141")


@linux
@pytest.mark.parametrize(
    "command", ["status", "list", "list --json", "show one", "logs one", "config show", "--help", "--version"]
)
@pytest.mark.parametrize("where", [">/dev/full", ">&-"], ids=["full disk", "closed stdout"])
def test_output_that_cannot_be_written_is_not_success(settled: Queue, command: str, where: str) -> None:
    result = settled.bash(f"queuectl {command} {where}", code=None)
    assert result.code == 1
    assert re.fullmatch(r"queuectl: error: [^\n]+\n", result.err), result


@linux
@pytest.mark.parametrize("where", [">/dev/full", ">&-"], ids=["full disk", "closed stdout"])
def test_enqueue_says_that_the_job_was_enqueued_if_it_cannot_print_its_id(q: Queue, where: str) -> None:
    result = q.bash(f"queuectl enqueue --id one true {where}", code=None)
    assert result.code not in (0, 3)
    assert "enqueued" in result.err.lower() and "Traceback" not in result.err
    assert q.state("one") == "pending"


@linux
def test_a_pool_whose_output_fails_goes_on_working(q: Queue) -> None:
    q.load(["echo 1", "echo 2"])
    q.bash("queuectl worker start --drain >/dev/full", code=None)
    assert q.counts() == {"completed": 2}


@pytest.mark.parametrize(
    "env",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "latin-1"},
    ],
    ids=["C locale", "Latin-1"],
)
def test_a_console_without_the_characters(q: Queue, env: dict[str, str]) -> None:
    q.program = SCRIPT
    q("enqueue", "--id", "jöb", "printf 'ü€😀\\n'", env=env)
    q.drain(env=env)
    for command in ("list", "show jöb", "logs jöb"):
        q(*command.split(), env=env)
    assert q("logs", "jöb", "--stdout", env=env).raw() == "ü€😀\n".encode()
    assert q("show", "jöb", "--json", env=env).json()["command"] == "printf 'ü€😀\\n'"
    assert q.show("jöb")["command"] == "printf 'ü€😀\\n'"


NASTY = "printf '\x1b]0;title\x07\x1b[2J'; true # \u202eevil\u2066 line\n# next\ttab\x9b"


def test_control_characters_are_shown_escaped(q: Queue) -> None:
    q("enqueue", "--id", "nasty", NASTY)
    q.drain()
    for args in (["list"], ["show", "nasty"], ["status"], ["list", "--all"]):
        text = q(*args).out
        assert not set(text) & set("\x1b\x07\u202e\u2066\x9b\t\r"), args
    assert len(q("list").out.splitlines()) == len(q("list", "--limit", "1").out.splitlines())
    assert q.show("nasty")["command"] == NASTY


def test_output_of_a_job_is_escaped_at_a_terminal_and_raw_in_a_pipe(q: Queue) -> None:
    job = q.add(r"printf '\033]0;title\007 \342\200\256evil\n'")
    q.drain()
    text = q.at_terminal("logs", job)
    assert "\x1b]0;" not in text and "\u202e" not in text and "title" in text
    assert "\x1b]0;title\x07 \u202eevil" in q("logs", job).out
    assert q("logs", job, "--stdout").raw() == b"\x1b]0;title\x07 \xe2\x80\xaeevil\n"


def test_a_pool_at_a_terminal_shows_no_control_characters(q: Queue) -> None:
    q.add(NASTY)
    text = q.at_terminal("worker", "start", "--drain", env={"NO_COLOR": "1"})
    assert not set(text) & set("\x1b\x07\u202e\u2066\x9b")


@pytest.mark.parametrize("command", ["status", "list", "show one", "dlq list"])
def test_no_colour_where_none_is_wanted(settled: Queue, command: str) -> None:
    assert "\x1b" not in settled(*command.split()).out
    assert "\x1b" not in settled.at_terminal(*command.split(), env={"NO_COLOR": "1"})


def columns(line: str) -> int:
    """How many columns of a terminal a line takes."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", line)
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in plain)
    return len([c for c in plain if not unicodedata.combining(c)]) + wide


@pytest.mark.parametrize("width", [40, 100])
def test_tables_fit_the_terminal(q: Queue, width: int) -> None:
    q.load(
        [
            "echo " + "long " * 60,
            {"command": "echo " + "日本語" * 40, "id": "x" * 30},
            {"command": "exit 1", "max_retries": 1},
        ]
    )
    q.drain(code=1)
    for command in ("list", "dlq list", "status", "config show"):
        for line in q.at_terminal(*command.split(), columns=width).splitlines():
            assert columns(line) <= width, (command, line)


# =====================================================================================================
# database faults
# =====================================================================================================

READERS_AND_WRITERS = ["status", "list", "enqueue true", "worker start --drain", "config set priority 5"]


@pytest.mark.parametrize("command", READERS_AND_WRITERS)
def test_a_file_that_is_no_database_is_left_alone(q: Queue, command: str) -> None:
    q.db.write_text("Dear diary, this is not a database. " * 200)
    q.db.chmod(0o600)
    before = contents(q.db.parent)
    q.fails(*command.split())
    assert contents(q.db.parent) == before


@pytest.mark.parametrize("command", READERS_AND_WRITERS)
def test_another_programs_database_is_left_alone(q: Queue, command: str) -> None:
    with sqlite3.connect(str(q.db)) as db:
        db.execute("CREATE TABLE photos (id INTEGER PRIMARY KEY, name TEXT)")
    db.close()
    q.db.chmod(0o600)
    before = contents(q.db.parent)
    q.fails(*command.split())
    assert contents(q.db.parent) == before


@pytest.mark.parametrize("command", READERS_AND_WRITERS)
def test_a_newer_database_is_left_alone(q: Queue, command: str) -> None:
    q.add("true")
    with sqlite3.connect(str(q.db)) as db:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        assert version > 0
        db.execute(f"PRAGMA user_version = {version + 1000}")
    db.close()
    before = contents(q.db.parent)
    assert re.search("newer|version", q.fails(*command.split()).err)
    assert contents(q.db.parent) == before


@pytest.mark.parametrize("how", ["overwritten", "cut"])
def test_a_corrupt_database_is_reported(q: Queue, how: str) -> None:
    q.load([f"echo {'x' * 500} {n}" for n in range(300)])
    q("status")  # the last to leave brings everything into the one file
    size = q.db.stat().st_size
    if how == "cut":
        os.truncate(str(q.db), size // 2 // 4096 * 4096)
    else:
        with open(q.db, "r+b") as file:
            file.seek(4096)
            file.write(b"\xa5" * (size - 4096))
    before = q.db.read_bytes()
    for command in ("list --json", "enqueue true", "status"):
        assert "Traceback" not in q(*command.split(), code=1).err
    assert q.db.read_bytes() == before


def test_the_doctor_has_nothing_to_say_of_a_healthy_queue(q: Queue) -> None:
    q.load(["true", {"command": "exit 1", "max_retries": 1}])
    q.drain(code=1)
    q("doctor")
    with q.working():
        q("doctor")


def test_the_doctor_finds_what_is_wrong(q: Queue) -> None:
    q.load([f"echo {'x' * 500} {n}" for n in range(300)])
    q.db.chmod(0o666)
    assert str(q.db) in q("doctor", code=1).out
    q.db.chmod(0o600)
    q("status")
    with open(q.db, "r+b") as file:
        file.seek(4096 * 20)
        file.write(b"\xa5" * 4096 * 5)
    q("doctor", code=1)


def test_a_folder_is_no_database(q: Queue) -> None:
    q.fails("status", "--db", str(q.work))
    q.fails("enqueue", "--db", str(q.work), "true")


@not_root
@pytest.mark.parametrize("what", ["database", "folder"])
def test_a_read_only_place(q: Queue, what: str) -> None:
    q.add("true")
    for path in [*q.db.parent.iterdir()] if what == "database" else [q.db.parent]:
        path.chmod(0o400 if what == "database" else 0o500)
    try:
        if what == "database":
            q.fails("enqueue", "true")
            q.fails("config", "set", "priority", "5")
        else:
            q.fails("enqueue", "true", "--db", str(q.db.parent / "new.db"))
    finally:
        q.db.parent.chmod(0o700)


@pytest.mark.parametrize("what", ["database", "folder"])
def test_workers_refuse_what_others_may_write(q: Queue, what: str) -> None:
    q.add("touch ran")
    if what == "database":
        q.db.chmod(0o666)
    else:
        q.db.parent.chmod(0o777)
    q.fails("worker", "start", "--drain")
    assert not (q.work / "ran").exists()


@pytest.mark.skipif(not ROOT, reason="only root can give files away")
def test_workers_refuse_what_others_own(q: Queue) -> None:
    q.add("touch ran")
    os.chown(str(q.db), 12345, 12345)
    q.fails("worker", "start", "--drain")
    assert not (q.work / "ran").exists()


def test_everything_beside_the_database_is_private(q: Queue) -> None:
    q.bash("umask 000; queuectl enqueue --env A=1 'echo secret'; queuectl worker start --drain; queuectl enqueue true")
    pool = q.bash("umask 000; queuectl worker start --detach")
    assert pool.code == 0
    for path in q.db.parent.rglob("*"):
        assert stat.S_IMODE(path.lstat().st_mode) & 0o077 == 0, path
    q("worker", "stop")


def test_a_locked_database_is_waited_for(q: Queue) -> None:
    q.add("true")
    foreign = sqlite3.connect(str(q.db), isolation_level=None)
    foreign.execute("BEGIN IMMEDIATE")
    adder = q.start("enqueue", "--id", "patient", "true")
    assert q.counts() == {"pending": 1}  # readers are not held up
    foreign.execute("ROLLBACK")
    foreign.close()
    assert adder.wait() == 0
    assert adder.out == "Enqueued: patient\n"


@full
def test_a_database_that_stays_locked_is_an_error(q: Queue) -> None:
    q.add("true")
    foreign = sqlite3.connect(str(q.db), isolation_level=None)
    foreign.execute("BEGIN IMMEDIATE")
    adder = q.start("enqueue", "--id", "patient", "true")
    assert adder.wait(60) == 1
    assert re.search(r"^queuectl: error: [^\n]*locked", adder.err, re.M)
    foreign.execute("ROLLBACK")
    foreign.close()
    assert q.counts() == {"pending": 1}


def test_a_signal_is_heard_while_the_database_is_locked(q: Queue) -> None:
    pool = q.pool("--count", "2")
    foreign = sqlite3.connect(str(q.db), isolation_level=None)
    foreign.execute("BEGIN IMMEDIATE")
    code = pool.stop()
    foreign.execute("ROLLBACK")
    foreign.close()
    assert code == 0


def test_an_outcome_is_kept_while_the_database_is_locked(q: Queue) -> None:
    job = q.add(GATE)
    with q.working():
        q.wait_file("started")
        foreign = sqlite3.connect(str(q.db), isolation_level=None)
        foreign.execute("BEGIN IMMEDIATE")
        q.touch("go")
        q.wait_file("ended")
        assert q.state(job) == "processing"
        foreign.execute("ROLLBACK")
        foreign.close()
        q.wait_state(job, "completed")
        assert q.show(job)["attempts"] == 1


def test_a_full_disk_changes_nothing(q: Queue) -> None:
    """A file size limit stands in for the disk: writes fail in the middle."""
    q.add("true", "--id", "before")
    (q.work / "jobs").write_text("".join(f"echo {'x' * 400} {n}\n" for n in range(5000)))
    result = q.bash("ulimit -f 600; queuectl enqueue --file jobs", code=None)
    assert result.code == 1, result
    assert result.out == "" and re.fullmatch(r"queuectl: error: [^\n]+\n", result.err)
    assert list(q.states()) == ["before"]
    q.add("true")
    q.drain()
    assert q.counts() == {"completed": 2}


FULL_DISK = """
mount -t tmpfs -o size=2m,mode=700 none "$FOLDER"; queuectl enqueue --id gate "$GATE"; queuectl worker start & pool=$!
until [ -e started ]; do sleep 0.05; done
dd if=/dev/zero of="$FOLDER/fill" bs=4k 2>/dev/null
queuectl enqueue true; echo "enqueue: $?"
touch go; until [ -e ended ]; do sleep 0.05; done
queuectl show gate --json | grep '"state": "processing"'
rm "$FOLDER/fill"
until queuectl list --state completed --json | grep '"attempts": 1,'; do sleep 0.1; done
queuectl worker stop; wait $pool; echo "pool: $?"
"""


@containers
def test_a_really_full_disk(q: Queue) -> None:
    """A worker keeps the outcome it holds, and records it when it can; a command fails and changes nothing."""
    env = {"FOLDER": q.db.parent, "GATE": GATE}
    result = q.run(["unshare", "--mount", "bash", "-c", define(q.program) + FULL_DISK], env=env)
    assert "enqueue: 1" in result.out and "pool: 0" in result.out
    assert '"state": "processing"' in result.out and '"id": "gate"' in result.out
    assert re.search(r"^queuectl: error: [^\n]*space", result.err, re.M)


def test_a_deleted_database_stops_its_workers_loudly(q: Queue) -> None:
    pool = q.pool()
    for name in (q.db.name, q.db.name + "-wal", q.db.name + "-shm"):
        if (q.db.parent / name).exists():
            (q.db.parent / name).unlink()
    assert pool.wait() != 0
    assert pool.err
    assert not q.db.exists()


def test_a_link_to_the_database_leads_to_the_same_queue(q: Queue) -> None:
    """What stands beside the database must be the same for all: else two pools would not see each other live."""
    running = q.add(GATE)
    pool = q.pool()
    q.wait_file("started")
    link = q.work / "link.db"
    link.symlink_to(q.db)
    second = q.start("--db", link, "worker", "start", "--drain")
    waiting = q("--db", link, "enqueue", "--quiet", "touch second").out.strip()
    q.wait_state(waiting, "completed")
    assert q.show(running)["attempts"] == 1
    assert q.workers() == 2
    q.touch("go")
    assert second.wait() == 0
    assert q("--db", link, "worker", "stop").code == 0
    assert pool.wait() == 0
    assert q.show(running)["attempts"] == 1
    assert sorted(path.name for path in q.work.iterdir() if path.name.startswith("link")) == ["link.db"]


@full
def test_who_waits_for_a_foreign_lock_says_so(q: Queue) -> None:
    q("status")
    foreign = sqlite3.connect(str(q.db), isolation_level=None)
    foreign.execute("BEGIN IMMEDIATE")
    waiting = q.start("enqueue", "true")
    wait_for(lambda: "waiting" in waiting.err, what="a word about the lock")
    foreign.execute("ROLLBACK")
    foreign.close()
    assert waiting.wait() == 0


def test_no_new_database_beside_a_live_worker(q: Queue) -> None:
    q.add(GATE)
    pool = q.pool()
    q.wait_file("started")
    for name in (q.db.name, q.db.name + "-wal", q.db.name + "-shm"):
        if (q.db.parent / name).exists():
            (q.db.parent / name).unlink()
    q.fails("enqueue", "true")
    assert not q.db.exists()
    q.touch("go")
    assert pool.wait() != 0


# =====================================================================================================
# scale: real files, many jobs
# =====================================================================================================

MANY = 200_000 if FULL else 20_000


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Queue]:
    """A queue of many jobs, enqueued from one file by one command."""
    queue = Queue(tmp_path_factory.mktemp("big"))
    (queue.work / "jobs").write_text("".join(f"echo {n}\n" for n in range(MANY)))
    assert queue("enqueue", "--file", "jobs").out == f"Enqueued: {MANY} jobs\n"
    yield queue
    queue.close()


def peak_memory(q: Queue, *args: str) -> int:
    """The most memory a command took, in bytes."""
    process = subprocess.Popen([*q.program, *args], env=q.env, stdout=subprocess.DEVNULL)
    _, code, usage = os.wait4(process.pid, 0)
    process.returncode = code
    assert code == 0
    return usage.ru_maxrss * (1024 if LINUX else 1)


def test_reading_many_jobs_takes_little_memory(big: Queue) -> None:
    least = peak_memory(big, "--version")
    for args in (["status"], ["list"], ["list", "--json"]):
        assert peak_memory(big, *args) < least + 25_000_000, args


def test_many_jobs_are_all_there_in_order(big: Queue) -> None:
    lines = big("list", "--json").out.splitlines()
    assert len(lines) == MANY + 2
    commands = [json.loads(line.rstrip(","))["command"] for line in lines[1:-1:997]]
    assert commands == [f"echo {n}" for n in range(0, MANY, 997)]


def test_an_ambiguous_prefix_lists_the_candidates(big: Queue) -> None:
    ids = [json.loads(line.rstrip(","))["id"] for line in big("list", "--json").out.splitlines()[1:-1]]
    seen: dict[str, list[str]] = {}
    for job in ids:
        seen.setdefault(job[:4], []).append(job)
    twins = next((jobs for jobs in seen.values() if len(jobs) == 2), None) or max(seen.values(), key=len)
    assert len(twins) > 1, "no two ids with one prefix among so many"
    error = big.fails("show", twins[0][:4]).err
    if len(twins) == 2:
        assert all(job in error for job in twins)


def test_one_bad_line_among_many(q: Queue) -> None:
    lines = ["echo x"] * MANY
    lines[12_344] = '{"command":"echo x","priorty":1}'
    (q.work / "jobs").write_text("\n".join(lines))
    assert "12345" in q.fails("enqueue", "--file", "jobs", code=2).err.replace(",", "")
    assert q.counts() == {}


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="needs sha256sum")
def test_checksums_of_real_files(q: Queue) -> None:
    """A night's work: real files, some of them missing; four workers; every job as often as it should."""
    number = 3000 if FULL else 60
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(library.rglob("*")) if path.is_file()][:number]
    missing = [library / f"missing-{n}" for n in range(10)]
    sums = q.work / "sums"
    sums.mkdir()
    jobs = [
        {"id": f"file-{n}", "command": f"echo run >>sums/runs-{n}; sha256sum -- {shlex.quote(str(path))} >sums/{n}"}
        for n, path in enumerate(files + missing)
    ]
    q.set("backoff_base", "0.1")
    q.load(jobs)
    q.drain("--count", "4", code=1)

    assert q.counts() == {"completed": len(files), "dead": len(missing)}
    for n, path in enumerate(files):
        assert (sums / str(n)).read_text().split()[0].lstrip("\\") == hashlib.sha256(path.read_bytes()).hexdigest()
    runs = [len(q.lines(f"sums/runs-{n}")) for n in range(len(jobs))]
    assert runs == [1] * len(files) + [3] * len(missing)
    assert [job["attempts"] for job in q.jobs()] == runs
    assert {job["id"] for job in q("dlq", "list", "--json").json()} == {f"file-{len(files) + n}" for n in range(10)}
    assert "missing-0" in q.show(f"file-{len(files)}")["last_error"]


# =====================================================================================================
# storms: kill -9 everywhere, at any moment and at chosen ones, and what must hold afterwards
# =====================================================================================================

SEED = int(os.environ.get("QUEUECTL_TEST_SEED") or 20260131)


class Beast(NamedTuple):
    """A process that may be killed, and is not mistaken for another that has its number later."""

    pid: int
    started: int

    @staticmethod
    def of(pid: int) -> Beast | None:
        status = read_proc(str(pid), "stat").rpartition(b")")[2].split()
        return Beast(pid, int(status[19])) if status and status[0] not in b"ZX" else None

    def alive(self) -> bool:
        return Beast.of(self.pid) == self

    def signal(self, number: int) -> bool:
        if not self.alive():
            return False
        kill(self.pid, number)
        return True


def beasts_below(pid: int) -> list[Beast]:
    return [beast for beast in map(Beast.of, children(pid)) if beast]


def registered(q: Queue, table: str) -> dict[str, int]:
    """Names and process ids of the workers or pools that stand in the database."""
    db = sqlite3.connect(str(q.db))
    try:
        return dict(db.execute(f"SELECT name, pid FROM {table}").fetchall())
    finally:
        db.close()


# What a job of a storm does: it holds a lock of its own as long as anything of it lives, says OVERLAP when it can't
# get it, and tells with every line which run it is. `{body}` decides which of its processes does that.
STORM_JOB = (
    'exec 9>"locks/$QUEUECTL_JOB_ID"; '
    'say() {{ read up _ </proc/uptime; echo "$1 $QUEUECTL_JOB_ID $QUEUECTL_ATTEMPT $QUEUECTL_RUN $up" >>log; }}; '
    "flock -n 9 || say OVERLAP; {body}"
)
STORM_LINES = "say start; for n in {ticks}; do sleep 0.1; say alive; done; say end"
STORM_BODIES = (
    "{lines}",
    # A child of its own session, which ignores SIGTERM at that.
    "trap '' TERM; export up; setsid sh -c '{say}{lines}' & wait $!",
    # A child of its own session that has closed the token and both streams: its environment alone tells.
    "exec bash -c 'setsid bash -c '\\''{say}{lines}'\\'' 239>&- >/dev/null 2>&1 & wait $!'",
)
STORM_SAY = (
    'say() {{ read up _ </proc/uptime; echo "$1 $QUEUECTL_JOB_ID $QUEUECTL_ATTEMPT $QUEUECTL_RUN $up" >>log; }}; '
)


def storm_jobs(count: int, shortest: int, longest: int) -> list[Job]:
    """Jobs of `shortest` to `longest` tenths of a second, of every kind."""
    jobs = []
    for number in range(count):
        ticks = " ".join(map(str, range(shortest + number % (longest - shortest + 1))))
        lines = STORM_LINES.format(ticks=ticks)
        body = STORM_BODIES[number % len(STORM_BODIES)].format(lines=lines, say=STORM_SAY.format())
        command = STORM_JOB.format(body=body)
        jobs.append({"id": f"job-{number}", "command": command, "max_retries": 100_000, "backoff_base": 0.1})
    return jobs


class RunRow(NamedTuple):
    """A recorded run."""

    job: str
    number: int
    attempt: int
    state: str
    name: str


def storm_records(q: Queue) -> tuple[dict[str, tuple[str, int, int]], list[RunRow]]:
    """State, attempts and runs of every job, and all runs, from the database."""
    db = sqlite3.connect(str(q.db))
    try:
        jobs = {row[0]: tuple(row[1:]) for row in db.execute("SELECT id, state, attempts, runs FROM jobs")}
        runs = db.execute(
            "SELECT jobs.id, run, attempt, runs.state, runs.worker || '-' || seq || '-' || run FROM"
            " (SELECT *, id / 16777216 AS job, id % 16777216 AS run FROM runs) AS runs"
            " LEFT JOIN jobs ON seq = job ORDER BY runs.id"
        )
        return jobs, [RunRow(*row) for row in runs]
    finally:
        db.close()


def storm_faults(
    log: Sequence[str], wanted: Sequence[str], jobs: Mapping[str, tuple[str, int, int]], runs: Sequence[RunRow]
) -> list[str]:
    """Everything that is wrong with a storm: `log` is what the jobs wrote, the rest what the database says.

    A run lives from its first line to its `end`, and without one for as long as it holds its lock: then the next run
    says OVERLAP. A line of a run after another run of that job has begun is an overlap too.
    """
    faults: list[str] = []
    begun: dict[str, list[str]] = {}
    starts: dict[str, int] = {}
    ends: list[str] = []
    for line in log:
        try:
            word, job, attempt, run, _ = line.split()
        except ValueError:
            faults.append(f"torn line: {line!r}")
            continue
        names = begun.setdefault(job, [])
        if word == "OVERLAP":
            faults.append(f"overlap: {line}")
        elif word == "start":
            if run in names:
                faults.append(f"started twice: {line}")
            names.append(run)
            starts[run] = int(attempt)
        elif not names or names[-1] != run:
            faults.append(f"overlap: {line} although {names[-1:]} has begun")
        if word == "end":
            ends.append(run)
    faults += [f"lost: {job}" for job in sorted(set(wanted) - set(jobs))]
    faults += [f"never enqueued: {job}" for job in sorted(set(jobs) - set(wanted))]
    recorded = {run.name: run for run in runs}
    faults += [f"started, but not recorded: {name}" for name in starts if name not in recorded]
    faults += [f"recorded {len(runs) - len(recorded)} times too often"] if len(recorded) < len(runs) else []
    for job, (state, attempts, count) in jobs.items():
        own = sorted((run for run in runs if run.job == job), key=lambda run: run.number)
        completed = [run for run in own if run.state == "completed"]
        if state != "completed":
            faults.append(f"not completed: {job} is {state}")
        if len(completed) != 1 or own[-1] is not completed[0]:
            faults.append(f"completed {len(completed)} times or not as the last: {own}")
        if [run.number for run in own] != list(range(1, count + 1)):
            faults.append(f"{job} says {count} runs, recorded are {own}")
        if [run.attempt for run in own] != list(range(1, attempts + 1)):
            faults.append(f"{job} says {attempts} attempts, recorded are {own}")
    for run in runs:
        if run.state not in ("completed", "lost"):
            faults.append(f"{run.state}, which nothing in a storm causes: {run}")
        if run.state == "completed" and ends.count(run.name) != 1:
            faults.append(f"completed, with {ends.count(run.name)} ends in the log: {run}")
        if run.name in starts and starts[run.name] != run.attempt:
            faults.append(f"the log says attempt {starts[run.name]}: {run}")
    return faults


STORM_CONTROL_LOG = ["start a 1 p-1-1-1 1.0", "start a 2 p-2-1-2 2.0", "alive a 2 p-2-1-2 2.1", "end a 2 p-2-1-2 2.2"]
STORM_CONTROL_RUNS = [RunRow("a", 1, 1, "lost", "p-1-1-1"), RunRow("a", 2, 2, "completed", "p-2-1-2")]


def test_the_storm_checker_accepts_a_sound_log() -> None:
    assert storm_faults(STORM_CONTROL_LOG, ["a"], {"a": ("completed", 2, 2)}, STORM_CONTROL_RUNS) == []
    assert storm_faults(STORM_CONTROL_LOG[1:], ["a"], {"a": ("completed", 2, 2)}, STORM_CONTROL_RUNS) == []


@pytest.mark.parametrize(
    ("log", "wanted", "jobs", "runs", "fault"),
    [
        ([*STORM_CONTROL_LOG[:2], "alive a 1 p-1-1-1 2.0", *STORM_CONTROL_LOG[2:]], None, None, None, "overlap"),
        ([*STORM_CONTROL_LOG, "end a 1 p-1-1-1 2.3"], None, None, None, "overlap"),
        (["start a 1 p-1-1-1 1.0", "OVERLAP a 2 p-2-1-2 2.0", *STORM_CONTROL_LOG[1:]], None, None, None, "overlap"),
        ([*STORM_CONTROL_LOG, "start a 3 p-2-1-3 3.0"], None, None, None, "not recorded"),
        (STORM_CONTROL_LOG[:-1], None, None, None, "with 0 ends"),
        (None, ["a", "b"], None, None, "lost: b"),
        (None, None, {"a": ("failed", 2, 2)}, None, "not completed"),
        (None, None, {"a": ("completed", 3, 2)}, None, "attempts"),
        (None, None, {"a": ("completed", 2, 3)}, None, "says 3 runs"),
        (None, None, None, [STORM_CONTROL_RUNS[1], STORM_CONTROL_RUNS[1]], "too often"),
        (None, None, None, [RunRow("a", 1, 1, "completed", "p-1-1-1"), STORM_CONTROL_RUNS[1]], "completed 2 times"),
    ],
)  # fmt: skip
def test_the_storms_checker_cries_out(log: Any, wanted: Any, jobs: Any, runs: Any, fault: str) -> None:
    found = storm_faults(
        log or STORM_CONTROL_LOG, wanted or ["a"], jobs or {"a": ("completed", 2, 2)}, runs or STORM_CONTROL_RUNS
    )
    assert any(fault in line for line in found), found


class Storm:
    """Pools whose workers and supervisors are killed, stopped and continued at random; dead supervisors come again."""

    def __init__(self, q: Queue, pools: int, workers: int) -> None:
        self.q, self.count = q, workers
        self.random = random.Random(SEED)
        self.workers: set[Beast] = set()
        self.kills = self.stops = self.supervisor_kills = self.restarts = 0
        self.killed: set[int] = set()
        self.pools = [self.start() for _ in range(pools)]

    def start(self) -> Background:
        return self.q.start("worker", "start", "--count", str(self.count))

    def restart(self) -> None:
        for place, pool in enumerate(self.pools):
            if pool.ended:
                assert pool.process.pid in self.killed, f"a supervisor gave up by itself: {pool!r}"
                self.restarts += 1
                self.pools[place] = self.start()

    def pick(self) -> Beast:
        """A worker, in one of six cases a supervisor, for that takes all its workers with it."""
        supervisors = [beast for beast in (Beast.of(pool.process.pid) for pool in self.pools) if beast]
        for supervisor in supervisors:
            self.workers.update(beasts_below(supervisor.pid))
        self.workers = {worker for worker in self.workers if worker.alive()}
        if not self.workers or self.random.random() < 1 / 6:
            return self.random.choice(supervisors or [Beast(0, -1)])
        return self.random.choice(sorted(self.workers))

    def rage(self, seconds: float) -> None:
        """Ten kills a second, and between them SIGSTOP to one and, some time later, SIGCONT."""
        begin = time.monotonic()
        agenda: list[tuple[float, int, Beast]] = []
        tick = 0
        while time.monotonic() < begin + seconds:
            tick += 1
            self.restart()
            victim = self.pick()
            if victim.signal(signal.SIGKILL):
                self.kills += 1
                self.killed.add(victim.pid)
                self.supervisor_kills += victim not in self.workers
            asleep = self.pick()
            if tick % 3 == 0 and asleep.signal(signal.SIGSTOP):
                self.stops += 1
                heapq.heappush(agenda, (time.monotonic() + self.random.uniform(0.02, 0.6), tick, asleep))
            while time.monotonic() < begin + tick / 10:
                while agenda and agenda[0][0] <= time.monotonic():
                    heapq.heappop(agenda)[2].signal(signal.SIGCONT)
                time.sleep(0.01)
        for _, _, beast in agenda:
            beast.signal(signal.SIGCONT)
        self.restart()


def test_a_storm(q: Queue) -> None:
    """Ten random kill -9 a second at eight workers and two supervisors: nothing lost, nothing twice, nothing beside."""
    if not (LINUX and shutil.which("flock") and shutil.which("setsid") and shutil.which("bash")):
        pytest.skip("needs /proc, flock(1), setsid(1) and bash")
    print(f"QUEUECTL_TEST_SEED={SEED}")
    jobs = storm_jobs(200, 5, 10) if FULL else storm_jobs(40, 2, 4)
    (q.work / "locks").mkdir()
    q.set("kill_grace_seconds", "0.3")
    ids = q.load(jobs)
    began = time.monotonic()
    storm = Storm(q, pools=2, workers=4)
    storm.rage(30 if FULL else 4)
    raged = time.monotonic() - began
    wait_for(lambda: q.counts() == {"completed": len(jobs)}, 240 if FULL else 60, "all jobs to complete", every=0.3)
    seconds = time.monotonic() - began
    wait_for(lambda: q.workers() == 8, what="all workers, for one that has just been started would not hear SIGTERM")
    assert [pool.stop() for pool in storm.pools] == [0, 0]
    log = q.lines("log")
    records, runs = storm_records(q)
    faults = storm_faults(log, ids, records, runs)
    overlaps = sum(fault.startswith("overlap") for fault in faults)
    lost = sum(fault.startswith(("lost", "not completed")) for fault in faults)
    print(
        f"storm: seed {SEED}, {len(jobs)} jobs, {storm.kills} kills ({storm.supervisor_kills} of supervisors, "
        f"{storm.restarts} restarted) and {storm.stops} stops in {raged:.1f} s, {len(runs)} runs "
        f"({sum(run.state == 'lost' for run in runs)} cut off), {overlaps} overlaps, {lost} lost, "
        f"done after {seconds:.1f} s"
    )
    assert faults == []
    assert storm.kills > (200 if FULL else 20)
    assert q.status()["jobs"] == {**dict.fromkeys(STATES, 0), "completed": len(jobs)}
    assert_clean(q)


def assert_clean(q: Queue) -> None:
    """After every pool has gone: a sound database, and nothing left that `worker start` does not clear away."""
    db = sqlite3.connect(str(q.db))
    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert db.execute("SELECT count(*) FROM workers").fetchone() == (0,)
    db.close()
    wait_for(lambda: not q.processes(), what="every process to go")
    if registered(q, "pools") or set(os.listdir(f"{q.db}.d")) > {"recovery.lock"}:
        q.drain(code=(0, 1))  # clears away what killed ones left, as `doctor` says
    assert q("doctor", code=None).code == 0
    assert set(os.listdir(f"{q.db}.d")) <= {"recovery.lock", "sweep.lock"}
    assert (registered(q, "workers"), registered(q, "pools")) == ({}, {})


# Enqueuers


def usual_time(q: Queue, *args: str) -> float:
    """How long a command takes as a program, in seconds: the best of three, for others may be busy here."""
    times = []
    for _ in range(3):
        began = time.monotonic()
        assert q.start(*args).wait() == 0
        times.append(time.monotonic() - began)
    return min(times)


def test_killed_enqueuers_leave_whole_jobs(q: Queue) -> None:
    """kill -9 at any moment: a printed id is there, whole; of a file all jobs are there or none."""
    print(f"QUEUECTL_TEST_SEED={SEED}")
    chance = random.Random(SEED)
    rounds, size = (100, 2000) if FULL else (5, 500)
    q("enqueue", "--id", "first", "true")
    usual = usual_time(q, "enqueue", "--id", "first", "--if-exists", "skip", "true")
    printed: set[str] = set()
    bulks = killed = turn = 0
    while turn < rounds or (killed <= rounds / 2 and turn < 5 * rounds):
        crowd: list[Background] = []
        for number in range(4):
            name = f"{turn}-{number}"
            if number % 2:
                env = {"A": "x" * 50}
                lines = [{"id": f"{name}-{k}", "command": f"echo {name} {k}", "env": env} for k in range(size)]
                (q.work / name).write_text("\n".join(map(json.dumps, lines)))
                crowd.append(q.start("enqueue", "--quiet", "--file", name))
            else:
                crowd.append(q.start("enqueue", "--quiet", "--id", name, "--env", f"A={'x' * 50}", f"echo {name}"))
        deaths = sorted((time.monotonic() + chance.uniform(0.1, 4) * usual, place) for place in range(4))
        for when, place in deaths:
            time.sleep(max(0.0, when - time.monotonic()))
            crowd[place].signal(signal.SIGKILL)
            killed += crowd[place].wait() == -signal.SIGKILL
        for adder in crowd:
            assert adder.process.returncode in (0, -signal.SIGKILL), adder
            printed.update(line for line in adder.out.splitlines(keepends=True) if line.endswith("\n"))
        turn += 1
        if killed <= turn / 2:  # they are faster than when they were measured
            usual /= 2
    there = {job["id"]: job for job in q("list", "--json").json()}
    assert {line.rstrip("\n") for line in printed} <= set(there)
    for name in (f"{each}-{number}" for each in range(turn) for number in (1, 3)):
        found = sum(f"{name}-{k}" in there for k in range(size))
        assert found in (0, size), f"half a bulk: {name} has {found} of {size}"
        bulks += found == size
    for job in there.values():
        if job["id"] != "first":
            words = f"echo {job['id']}" if job["id"].count("-") == 1 else "echo {} {}".format(*job["id"].rsplit("-", 1))
            assert (job["command"], job["env"], job["state"]) == (words, {"A": "x" * 50}, "pending"), job
    print(f"enqueuers: {4 * turn} started, {killed} killed in time, {bulks} of {2 * turn} bulks whole, "
          f"{len(printed)} ids printed, {len(there)} jobs")  # fmt: skip
    assert killed > rounds / 2
    db = sqlite3.connect(str(q.db))
    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    db.close()
    assert q("doctor", code=None).code == 0


# Kill points

AT_A_CHECKPOINT = """
import os, signal, sys
sys.path.insert(0, {folder!r})
import queuectl

def kill_here(place):
    if place == {place!r}:
        fd = os.open({flag!r} + ".passed", os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
        os.write(fd, b"x")
        passed = os.fstat(fd).st_size
        os.close(fd)
        if passed >= {nth}:
            try:
                os.close(os.open({flag!r}, os.O_CREAT | os.O_EXCL, 0o600))
            except FileExistsError:
                return
            os.kill(os.getpid(), signal.SIGKILL)

queuectl.test_point = kill_here
sys.exit(queuectl.main())
"""


def start_to_be_killed(q: Queue, place: str, nth: int, *args: Word) -> Background:
    """The real program, which is killed when one of its processes passes `place`, the nth time of all."""
    code = AT_A_CHECKPOINT.format(folder=str(PROGRAM.parent), place=place, nth=nth, flag=str(q.folder / "killed"))
    return q.launch([*q.program[:-1], "-c", code, *args])


def test_a_database_that_another_makes_meanwhile_is_not_gone(q: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two first commands at once: the other has made the database since this one looked for it."""
    real = queuectl.anyone_alive

    def made_meanwhile(path: str) -> bool:
        q.db.touch()
        Path(path + "-wal").touch()
        return real(path)

    monkeypatch.setattr(queuectl, "anyone_alive", made_meanwhile)
    queuectl.prepare_place(str(q.db))
    q.db.unlink()
    monkeypatch.setattr(queuectl, "anyone_alive", real)
    with pytest.raises(queuectl.QueueError, match="its log is still there"):
        queuectl.prepare_place(str(q.db))


@pytest.mark.parametrize("nth", [1, 2] if FULL else [1])
@pytest.mark.parametrize("place", ["migrating", "before commit"])
@pytest.mark.parametrize("bulk", [False, True] if FULL else [True])
def test_enqueue_killed_at_a_point_of_its_code(q: Queue, bulk: bool, place: str, nth: int) -> None:
    """Also while it makes the database: whoever comes next makes it, and there is no half job and no half bulk."""
    (q.work / "jobs").write_text("".join(f'{{"id":"bulk-{n}","command":"true"}}\n' for n in range(3)))
    words = ("--file", "jobs") if bulk else ("--id", "one", "true")
    killed = start_to_be_killed(q, place, nth, "enqueue", *words)
    assert killed.wait() == (-signal.SIGKILL if nth == 1 else 0), killed
    assert killed.out == "" or nth > 1
    q("enqueue", "--id", "later", "true")
    whole = ["bulk-0", "bulk-1", "bulk-2"] if bulk else ["one"]
    assert list(q.states()) == (["later"] if nth == 1 else [*whole, "later"])
    q.drain()
    assert set(q.states().values()) == {"completed"}
    assert_clean(q)


POINTS = [
    ("before commit", (1, 2, 3, 4, 5, 6, 7, 8)),
    ("being born", (1, 2, 3)),
    ("before turn", (1, 2, 3, 4)),
    ("claimed", (1, 2, 3)),
    ("spawned", (1, 2, 3)),
    ("recorded", (1, 2, 3, 4)),
    ("recovering", (1, 2)),
    ("recovered", (1, 2)),
]
SHORT_POINTS = {
    ("before commit", 1), ("before commit", 2), ("before commit", 5), ("being born", 1),
    ("before turn", 2), ("claimed", 1), ("spawned", 2), ("recorded", 1), ("recovering", 1), ("recovered", 1),
}  # fmt: skip


@linux
@pytest.mark.parametrize(
    ("place", "nth"),
    [(place, nth) for place, numbers in POINTS for nth in numbers if FULL or (place, nth) in SHORT_POINTS],
)
def test_a_pool_killed_at_a_point_of_its_code(q: Queue, place: str, nth: int) -> None:
    """Worker or supervisor, whoever passes there: it goes on as if nothing had been, nothing lost, nothing twice."""
    (q.work / "locks").mkdir()
    q.set("kill_grace_seconds", "0.1")
    jobs = storm_jobs(3, 1, 2)
    once = {"id": "job-3", "max_retries": 9, "backoff_base": 0.1}
    body = 'say start; [ "$QUEUECTL_ATTEMPT" != 1 ] || { kill -9 $PPID; sleep 300; }; say end'
    lost_once = STORM_JOB.format(body=body)
    jobs += [{**once, "command": lost_once}, {**once, "id": "job-4", "command": lost_once}]
    ids = q.load(jobs)
    first = start_to_be_killed(q, place, nth, "worker", "start", "--drain", "--count", "2")
    code = first.wait(60)
    assert (q.folder / "killed").exists(), f"never came to {place!r} the {nth}th time: {first!r}"
    assert code in (0, -signal.SIGKILL), first
    wait_for(lambda: q.workers() == 0, what="the workers of a killed supervisor to go")
    q.drain("--count", "2")
    assert storm_faults(q.lines("log"), ids, *storm_records(q)) == []
    assert_clean(q)


# Orphans: everything that a run's processes do to get away

DAEMONIZE = (
    "import subprocess as s, sys; n = s.DEVNULL;"
    "p = s.Popen(['sh', '-c', sys.argv[1]], stdin=n, stdout=n, stderr=n, start_new_session=True{})"
)
DAEMON, GUARDIAN = DAEMONIZE.format(""), DAEMONIZE.format(", env={}") + "; p.wait()"
NAMED = 'echo "{name} $$" >>pids; '
CLOSED = shlex.quote(NAMED.format(name="closed") + "exec sleep 300")
SCRUBBED = shlex.quote('trap "" TERM; ' + NAMED.format(name="scrubbed") + "while :; do sleep 0.1; done")
ESCAPES = {
    "session": "setsid sh -c '" + NAMED.format(name="session") + "exec sleep 300' & ",
    "pipeline": "sh -c '" + NAMED.format(name="left") + "exec sleep 300' | sh -c '" + NAMED.format(name="right")
    + "exec cat' & ",
    "deaf": "setsid sh -c 'trap \"\" TERM; " + NAMED.format(name="deaf") + "while :; do sleep 0.1; done' & ",
    "stopped": "sh -c '" + NAMED.format(name="stopped") + "kill -STOP $$; sleep 300' & ",
    # A child that has closed everything and has a session of its own, its parent gone: its environment alone tells.
    "closed": f'{shlex.quote(sys.executable)} -c "{DAEMON}" {CLOSED} & ',
    # The same without its environment, while its parent lives: and it does not listen, when that ends at SIGTERM.
    "scrubbed": f'{shlex.quote(sys.executable)} -c "{GUARDIAN}" {SCRUBBED} & ',
}  # fmt: skip
ESCAPEES = {"session", "left", "right", "deaf", "stopped", "closed", "scrubbed"}
# The first run starts them all; the next looks who of them still lives.
ESCAPE_ARTIST = (
    "if [ ! -e pids ]; then " + "".join(ESCAPES.values()) + "{then} fi; "
    "while read name pid; do ! grep -qs '^State:.[^ZX]' /proc/$pid/status || echo overlap $name; done <pids; "
    "echo looked"
)


def wait_escapees(q: Queue) -> dict[str, int]:
    def all_there() -> bool:
        return {line.split()[0] for line in q.lines("pids")} == ESCAPEES

    wait_for(all_there, what="all processes of the job to be there")
    return {name: int(pid) for name, pid in map(str.split, q.lines("pids"))}


def living(pids: Mapping[str, int]) -> list[str]:
    return [name for name, pid in pids.items() if Beast.of(pid)]


@linux
@pytest.mark.parametrize("way", ["worker", "worker and supervisor", "timeout", "failed", "cancel", "stop --now"])
def test_nothing_of_a_run_lives_beside_the_next(q: Queue, way: str) -> None:
    if way == "worker":  # so that those who listen have time to go, and those who don't are killed
        q.set("kill_grace_seconds", "1")
    else:
        q.set("kill_grace_seconds", "0.3")
    hang = "until [ -e go ]; do sleep 0.1; done; exit 1;" if way == "failed" else "sleep 300;"
    options = ["--backoff-base", "0.1"] + (["--timeout", "2"] if way == "timeout" else [])
    job = q.add(ESCAPE_ARTIST.replace("{then}", hang), *options)
    pool = q.pool()
    pids = wait_escapees(q)
    assert set(living(pids)) == ESCAPEES
    (worker,) = beasts_below(pool.process.pid)
    if way == "failed":
        q.touch("go")
    if way.startswith("worker"):
        if "supervisor" in way:
            pool.signal(signal.SIGKILL)
        worker.signal(signal.SIGKILL)
    if way in ("cancel", "stop --now"):
        q(*(["cancel", job] if way == "cancel" else ["worker", "stop", "--now"]))
        assert living(pids) == []
        assert q.state(job) == ("cancelled" if way == "cancel" else "pending")
    if way == "cancel":
        q("retry", job)
    if way in ("stop --now", "worker and supervisor"):
        pool.wait()
        pool = q.pool()
    q.wait_state(job, "completed")
    assert living(pids) == []
    assert q("logs", job, "--stdout", "--attempt", str(q.show(job)["attempts"])).out == "looked\n"
    assert pool.stop() == 0


@linux
def test_a_daemon_of_a_completed_job_is_not_ended(q: Queue) -> None:
    """Neither the failures, the time-outs and the deaths of its worker after it, nor its late output, nor `drain`."""
    q.may_leave = True
    q.set("kill_grace_seconds", "0.3")
    writes = "until [ -e halt ]; do echo late; echo late >&2; sleep 0.02; done"
    loud = f"(setsid sh -c 'echo loud $$ >>daemons; {writes}' &) ; "
    silent = shlex.quote("echo silent $$ >>daemons; until [ -e halt ]; do sleep 0.02; done")
    wait = "until [ $(wc -l <daemons) = 2 ]; do sleep 0.02; done; echo early"
    python = shlex.quote(sys.executable)
    first = q.add(f'touch daemons; {loud} {python} -c "{DAEMON}" {silent}; {wait}', "--priority", "1")
    others = q.load(
        [
            {"command": "echo fails; exit 1", "max_retries": 2, "backoff_base": 0.1},
            {"command": "echo slow; sleep 300", "timeout": 0.3, "max_retries": 1},
            {"command": "echo kills; " + KILL_WORKER, "max_retries": 2, "backoff_base": 0.1},
            {"command": "echo leaves; sleep 300 & exit 1", "max_retries": 1},
        ]
    )
    more = q.load([f"echo {number}" for number in range(6)])
    began = time.monotonic()
    q.drain(code=1)
    assert time.monotonic() - began < 30
    daemons = {name: int(pid) for name, pid in map(str.split, q.lines("daemons"))}
    assert set(living(daemons)) == {"loud", "silent"}
    last = q.load([f"echo {number}" for number in range(3)])
    q.drain()
    assert set(living(daemons)) == {"loud", "silent"}
    assert q.counts() == {"completed": 10, "dead": 4}
    assert q("doctor", code=None).code == 0
    for job in [*others, *more, *last]:
        for run in q.show(job)["runs"]:
            assert "late" not in run["stdout"] + run["stderr"], (job, run)
    assert [q("logs", job, "--stdout").out for job in last] == ["0\n", "1\n", "2\n"]
    assert q.show(first)["attempts"] == 1
    q.touch("halt")
    wait_for(lambda: not living(daemons), what="the daemons to end by themselves")
    assert not q.processes()


# Crowds


def test_32_enqueuers_and_32_workers_at_once(q: Queue) -> None:
    each = 10 if FULL else 1
    pool = q.pool("--count", "32")
    loop = f'for k in $(seq {each}); do queuectl enqueue --id $0-$k "echo $0-$k >>ran" || exit; done'
    began = time.monotonic()
    adders = [q.launch(["bash", "-c", define(q.program) + loop, f"e{n}"]) for n in range(32)]
    took: dict[int, float] = {}

    def all_ended() -> bool:
        for place, adder in enumerate(adders):
            if adder.ended and place not in took:
                took[place] = time.monotonic() - began
        return len(took) == len(adders)

    wait_for(all_ended, 120, "all enqueuers to end", every=0.01)
    for n, adder in enumerate(adders):
        assert adder.process.returncode == 0, adder
        assert (adder.out, adder.err) == ("".join(f"Enqueued: e{n}-{k}\n" for k in range(1, each + 1)), "")
    alone = time.monotonic()
    q.start("enqueue", "--id", "alone", "echo alone >>ran").wait()
    alone = time.monotonic() - alone
    slowest = max(took.values()) / each
    print(f"32 enqueuers of {each} beside 32 workers: the slowest took {slowest:.2f} s a job, one alone {alone:.2f} s")
    assert slowest < 10
    count = 32 * each + 1
    wait_for(lambda: q.counts() == {"completed": count}, 60, "all jobs to complete")
    assert pool.stop() == 0
    assert pool.err.count("\n") == 1, pool  # that it stops
    assert sorted(q.lines("ran")) == sorted([f"e{n}-{k}" for n in range(32) for k in range(1, each + 1)] + ["alone"])
    assert {job["attempts"] for job in q.jobs("--all")} == {1}
    assert_clean(q)


# Containers: pid namespaces of their own over one folder


UNSHARE = ["unshare", "--pid", "--fork", "--mount-proc"]


@pytest.fixture(scope="module")
def unshare() -> list[str]:
    """What runs a command as process 1 of a new pid namespace."""
    able = LINUX and shutil.which("unshare")
    if not able or subprocess.run([*UNSHARE, "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no unshare(1), or no right to make pid namespaces")
    return UNSHARE


def first_inside(outer: Background) -> int:
    """Process 1 of the namespace, as this one numbers it."""
    return int(wait_for(lambda: children(outer.process.pid), what="the namespace")[0])


def kill_inside(outer: Background) -> None:
    """Kill process 1 of the namespace, which takes all others there along."""
    os.kill(first_inside(outer), signal.SIGKILL)
    outer.wait()


def states_below(pid: int) -> list[bytes]:
    return [read_proc(str(child), "stat").rpartition(b")")[2].split()[:1][0] for child in children(pid)
            if read_proc(str(child), "stat")]  # fmt: skip


def test_a_pool_as_process_1_of_a_container(q: Queue, unshare: list[str]) -> None:
    q.may_leave = True
    q.add("true")
    pool = q.launch([*unshare, *q.program, "worker", "start"])
    q.wait_ready(pool, 1)
    init = first_inside(pool)
    # A daemon that its dead worker can no longer reap comes to process 1.
    done = q.add("setsid sh -c 'until [ -e halt ]; do sleep 0.02; done' >/dev/null 2>&1 &")
    q.wait_state(done, "completed")
    (worker,) = beasts_below(init)
    worker.signal(signal.SIGKILL)
    wait_for(lambda: len(beasts_below(init)) == 2, what="the daemon to come to process 1 beside a new worker")
    q.touch("halt")
    wait_for(lambda: states_below(init) in ([b"S"], [b"R"]), what="process 1 to reap the daemon")
    job = q.add(GATE)
    q.wait_file("started")
    assert q.status()["workers"] == 1 and q("doctor").code == 0
    stop = q.start("worker", "stop")  # from outside
    q.touch("go")
    assert (stop.wait(), pool.wait()) == (0, 0)
    assert q.state(job) == "completed"

    (q.work / "started").unlink()
    (q.work / "go").unlink()
    second = q.launch([*unshare, *q.program, "worker", "start"])
    q.wait_ready(second, 1)
    job = q.add(GATE)
    q.wait_file("started")
    os.kill(first_inside(second), signal.SIGTERM)
    wait_for(lambda: "stopping" in second.err, what="word of the stop")
    q.touch("go")
    assert second.wait() == 0
    assert q.state(job) == "completed"
    now = q.launch([*unshare, *q.program, "worker", "start"])
    hanging = q.add("touch hangs; sleep 300")
    q.wait_file("hangs")
    q("worker", "stop", "--now")
    assert (now.wait(), q.state(hanging), q.show(hanging)["attempts"]) == (130, "pending", 0)


def test_an_orphan_in_another_container_is_waited_for(q: Queue, unshare: list[str]) -> None:
    """It can't be reached from where the new pool runs: so its job is not run beside it, and `doctor` says why."""
    words = " ".join(shlex.quote(str(word)) for word in q.program)
    script = words + " worker start & wait; touch bereft; until [ -e halt ]; do sleep 0.05; done"
    command = "if [ ! -e old ]; then echo 1 >old; sleep 300; echo never; else echo again; fi"
    job = q.add(command, "--backoff-base", "0.1")
    house = q.launch([*unshare, "bash", "-c", script])
    q.wait_file("old")
    init = first_inside(house)
    (supervisor,) = beasts_below(init)
    (worker,) = beasts_below(supervisor.pid)
    (shell,) = beasts_below(worker.pid)
    sleeper = wait_for(lambda: beasts_below(shell.pid), what="the job's sleep")[0]
    supervisor.signal(signal.SIGKILL)
    worker.signal(signal.SIGKILL)
    q.wait_file("bereft")
    neighbour = q.launch([*unshare, *q.program, "worker", "start"])
    q.wait_state(q.add("true"), "completed")
    time.sleep(1.2)  # a round of the patrol
    q.wait_state(q.add("true"), "completed", timeout=5)
    shown = q.show(job)
    assert (shown["state"], shown["attempts"], shell.alive(), sleeper.alive()) == ("processing", 1, True, True)
    found = q("doctor", "--json", code=1).json()
    assert any(job in finding["what"] and "container" in finding["what"] for finding in found)
    shell.signal(signal.SIGKILL)
    assert q.state(job) == "processing"  # its child still holds the token
    sleeper.signal(signal.SIGKILL)
    q.wait_state(job, "completed")
    shown = q.show(job)
    assert [(run["state"], run["attempt"]) for run in shown["runs"]] == [("lost", 1), ("completed", 2)]
    assert q("logs", job, "--stdout", "--attempt", "2").out == "again\n"
    q("worker", "stop")
    q.touch("halt")
    assert (neighbour.wait(), house.wait()) == (0, 0)
    assert_clean(q)


# What else goes wrong


@linux
def test_doctor_tells_of_a_stopped_worker(q: Queue) -> None:
    job = q.add(GATE)
    pool = q.pool()
    q.wait_file("started")
    (worker,) = beasts_below(pool.process.pid)
    worker.signal(signal.SIGSTOP)
    q.touch("go")
    q.wait_file("ended")
    found = wait_for(lambda: q("doctor", "--json", code=None).json(), what="a finding")
    assert [finding["mend"] for finding in found] == [f"kill -CONT {worker.pid}"]
    second = q.pool()
    q.wait_state(q.add("true"), "completed")
    assert q.state(job) == "processing"
    q.bash(found[0]["mend"])
    q.wait_state(job, "completed")
    assert q.show(job)["attempts"] == 1
    assert q("doctor").code == 0
    assert (pool.stop(), second.stop()) == (0, 0)


@linux
def test_stop_now_reaches_the_workers_of_a_killed_supervisor(q: Queue) -> None:
    """Also when another pool has meanwhile forgotten the dead one."""
    job = q.add("touch started; sleep 300")
    first = q.pool()
    q.wait_file("started")
    first.signal(signal.SIGKILL)
    first.wait()
    second = q.pool()
    q("worker", "stop", "--now", "--timeout", "10")
    assert second.wait() == 130
    assert (q.state(job), q.show(job)["attempts"]) == ("pending", 0)


@linux
def test_a_replaced_database_stops_its_workers_loudly(q: Queue, other: Queue) -> None:
    other.add("touch foreign")
    pool = q.pool("--count", "2")
    os.replace(str(other.db), str(q.db))
    for end in ("-wal", "-shm"):
        for queue in (q, other):
            if os.path.exists(f"{queue.db}{end}"):
                os.unlink(f"{queue.db}{end}")
    assert pool.wait() == 1
    assert "replaced" in pool.text
    assert not (q.work / "foreign").exists() and not (other.work / "foreign").exists()


@linux
def test_a_lock_during_a_recovery_is_waited_for(q: Queue) -> None:
    """A worker that can't record what it recovered tries again; it does not give up, and its pool neither."""
    q.set("kill_grace_seconds", "0.7")
    job = q.add("[ -e started ] || { " + IGNORE_TERM + "; }", "--backoff-base", "0.1")
    pool = q.pool()
    q.wait_file("started")
    (worker,) = beasts_below(pool.process.pid)
    worker.signal(signal.SIGKILL)
    wait_for(lambda: len(registered(q, "workers")) == 2, what="a new worker")
    foreign = sqlite3.connect(str(q.db), isolation_level=None)
    foreign.execute("BEGIN IMMEDIATE")
    wait_for(lambda: len(q.processes()) == 2, what="the end of the orphan")  # supervisor and worker are left
    time.sleep(0.7)  # longer than anybody waits for the lock at once
    foreign.execute("ROLLBACK")
    foreign.close()
    q.wait_state(job, "completed")
    assert pool.stop() == 0, pool


@linux
def test_an_orphan_that_cannot_be_killed_holds_up_its_job_alone(q: Queue) -> None:
    """As one that waits for a dead disk: seen, but deaf to SIGKILL. Here killing is disabled instead."""
    q.set("kill_grace_seconds", "0.1")
    job = q.add("touch started; sleep 300", "--backoff-base", "0.1")
    first = q.pool()
    q.wait_file("started")
    (worker,) = beasts_below(first.process.pid)
    first.signal(signal.SIGKILL)
    worker.signal(signal.SIGKILL)
    first.wait()
    code = (
        f"import sys; sys.path.insert(0, {str(PROGRAM.parent)!r}); import queuectl\n"
        "queuectl.system.end_process = lambda *args: None\nsys.exit(queuectl.main())"
    )
    second = q.launch([*q.program[:-1], "-c", code, "worker", "start"])
    others = q.load(["true"] * 2)
    for other in others:
        q.wait_state(other, "completed", timeout=15)
    assert q.state(job) == "processing"
    assert second.stop() == 0
    assert q("cancel", job).out == f"Cancelled: {job}\n"


@linux
def test_many_orphans_are_ended_together(q: Queue) -> None:
    """Four that ignore SIGTERM take one grace, not four, and a stop meanwhile is heard."""
    q.set("kill_grace_seconds", "2")
    q.load([IGNORE_TERM.replace("started", f"started{n}") for n in range(4)])
    first = q.pool("--count", "4")
    for n in range(4):
        q.wait_file(f"started{n}")
    workers = beasts_below(first.process.pid)
    first.signal(signal.SIGKILL)
    for worker in workers:
        worker.signal(signal.SIGKILL)
    first.wait()
    wait_for(lambda: not q.workers())
    second = q.pool()
    began = time.monotonic()
    assert second.stop() == 0
    took = time.monotonic() - began
    print(f"four deaf orphans were ended in {took:.1f} s with a grace of 2 s")
    assert took < 6
    assert not q.processes()
    assert "processing" not in q.counts()


@linux
def test_a_worker_killed_while_it_tidies_up_leaves_nothing_for_good(q: Queue) -> None:
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(PROGRAM.parent)!r})
import queuectl
unlink = os.unlink
def unlink_and_die(path, **options):
    unlink(path, **options)
    try:
        os.close(os.open({str(q.folder / "killed")!r}, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)
listdir = os.listdir
os.unlink = unlink_and_die
os.listdir = lambda path: sorted(listdir(path), key=lambda name: not name.endswith(".life"))
sys.exit(queuectl.main())
"""
    q.add("true")
    pool = q.launch([*q.program[:-1], "-c", code, "worker", "start", "--drain"])
    assert pool.wait() == 0
    assert (q.folder / "killed").exists()
    assert_clean(q)


@pytest.mark.skipif(not ROOT, reason="only root can mount a small file system")
@linux
def test_an_outcome_is_kept_while_no_file_can_be_made(q: Queue) -> None:
    """A disk without inodes when the first run ends: no file for the next run's output, but this one is recorded."""
    small = q.folder / "small"
    small.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=8m,nr_inodes=40,mode=700", "tmpfs", str(small)]
    if subprocess.run(words, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        q.db = small / "queue.db"
        q.env = q.environment()
        job = q.add("echo run >>runs; " + GATE)
        pool = q.pool()
        q.wait_file("started")
        fill = 0
        with pytest.raises(OSError):
            for fill in range(100):
                (small / f"fill{fill}").touch()
        q.touch("go")
        q.wait_file("ended")
        time.sleep(1)  # some tries of the worker
        assert not pool.ended, pool
        for n in range(fill):
            (small / f"fill{n}").unlink()
        q.wait_state(job, "completed")
        assert q.lines("runs") == ["run"]
        assert pool.stop() == 0
    finally:
        subprocess.run(["umount", "-l", str(small)])


# =====================================================================================================
# found by attack: each of these once went wrong
# =====================================================================================================


def test_late_output_of_a_daemon_that_has_ended_is_discarded(q: Queue) -> None:
    """It writes after its job was recorded and ends before the slot is used again."""
    q.pool()
    first = q.add("(until [ -e go ]; do sleep 0.03; done; echo late; touch said) & exit 0")
    q.wait_state(first, "completed")
    q.touch("go")
    q.wait_file("said")
    for _ in range(4):
        job = q.add("echo mine")
        q.wait_state(job, "completed")
        assert q("logs", "--stdout", job).out == "mine\n"


def test_a_cancelled_job_does_not_run_again_though_its_run_fails_by_itself(q: Queue) -> None:
    job = q.add(GATE + "; exit 1", "--backoff-base", "0.01")
    pool = q.pool()
    q.wait_file("started")
    worker = children(pool.process.pid)[0]
    kill(worker, signal.SIGSTOP)
    cancel = q.start("cancel", job)
    database = sqlite3.connect(str(q.db))
    wait_for(lambda: database.execute("SELECT cancel FROM jobs").fetchone()[0], what="the wish to cancel")
    database.close()
    q.touch("go")
    q.wait_file("ended")
    kill(worker, signal.SIGCONT)
    assert cancel.wait() == 0
    assert (q.state(job), q.show(job)["attempts"]) == ("cancelled", 1)


@linux
def test_a_flood_is_shown_bounded_while_it_runs(q: Queue) -> None:
    q("config", "set", "max_output_bytes", "10000")
    job = q.add("yes | head -c 50000000; touch started; sleep 300")
    q.pool()
    q.wait_file("started")
    shown = q("logs", "--stdout", job).raw()
    assert len(shown) < 11_000
    assert b"\0" not in shown and b"left out" in shown
    run = q.show(job)["runs"][0]
    assert len(run["stdout"]) < 11_000
    q("cancel", job)


def test_following_a_flood_ends_with_its_tail(q: Queue) -> None:
    q("config", "set", "max_output_bytes", "10000")
    job = q.add(GATE + "; seq 100000; echo the end")
    q.pool()
    q.wait_file("started")
    follow = q.start("logs", "--follow", "--stdout", job)
    q.touch("go")
    assert follow.wait() == 0
    assert follow.text.endswith("99999\n100000\nthe end\n")
    assert "left out" in follow.text


def test_a_replaced_database_is_not_opened_while_the_old_ones_workers_live(q: Queue, other: Queue) -> None:
    other("enqueue", "true")  # which leaves no log, as a program that ends well does
    pool = q.pool("--count", "1")
    kill(children(pool.process.pid)[0], signal.SIGSTOP)
    os.replace(str(other.db), str(q.db))
    assert "replaced" in q.fails("enqueue", "true").err
    kill(children(pool.process.pid)[0], signal.SIGCONT)
    pool.wait()
    log = q.db.with_name(q.db.name + "-wal")
    log.write_bytes(b"of the old one")
    assert "log" in q.fails("enqueue", "true").err
    for ending in ("-wal", "-shm"):  # what the message says
        if q.db.with_name(q.db.name + ending).exists():
            q.db.with_name(q.db.name + ending).unlink()
    q("enqueue", "true")
    assert q.counts() == {"pending": 2}


def test_an_emptied_database_is_not_taken_for_a_new_one(q: Queue) -> None:
    q.add("true")
    q.drain()
    q.db.write_bytes(b"")
    assert "empty" in q.fails("enqueue", "true").err
    assert q.db.stat().st_size == 0


@pytest.mark.parametrize("args", [["show", b"\xff"], ["cancel", b"\xff"], ["list", "--queue", b"\xff"], ["\udcff"]])
def test_arguments_that_are_not_utf_8(q: Queue, args: list[Word]) -> None:
    words = [os.fsencode(word) if isinstance(word, str) else word for word in args]
    q.fails(*words, code=2)  # type: ignore[arg-type]


@linux
@pytest.mark.parametrize(
    "command", ["show nope 2>&-", "show nope 2>/dev/full", "enqueue --help >/dev/full", "status >&-"]
)
def test_streams_that_take_nothing(q: Queue, command: str) -> None:
    q("status")
    result = q.bash("queuectl " + command, code=1)
    assert result.out == "" and "Traceback" not in result.err and "Exception ignored" not in result.err


def test_drain_tells_of_a_death_by_recovery(q: Queue) -> None:
    job = q.add("kill -9 $PPID; sleep 300", "--max-retries", "1")
    assert q("worker", "start", "--drain", code=1).code == 1
    assert q.state(job) == "dead"


def test_very_short_jobs_share_a_sync_of_the_disk(q: Queue) -> None:
    """Counted by the worker's system calls."""
    if not shutil.which("strace"):
        pytest.skip("there is no strace to count with")
    q("enqueue", "--file", "-", stdin="true\n" * 80)
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import queuectl\n"
        "queuectl.SYNC_WAIT = 5.0\n"  # strace makes no job short
        "sys.exit(queuectl.main())"
    )
    program = shlex.join(map(str, [*q.program[:-1], "-c", code, PROGRAM.parent]))
    q.bash(f"strace -f -c -e trace=fdatasync,fsync -o calls.txt {program} worker start --drain")
    lines = (q.work / "calls.txt").read_text().splitlines()
    syncs = sum(int(line.split()[3]) for line in lines if line.endswith("sync"))
    assert 80 / queuectl.SHARED_SYNC <= syncs < 80


def test_a_record_is_on_disk_before_it_is_told_and_before_its_output_is_thrown_away(q: Queue) -> None:
    """Seen in the worker's system calls: what it wrote to SQLite's log was synced by then."""
    if not shutil.which("strace"):
        pytest.skip("there is no strace to look with")
    q("enqueue", "--file", "-", stdin="echo hello\n" * 20)
    program = shlex.join(map(str, q.program))
    calls = "fdatasync,fsync,write,pwrite64,ftruncate"
    q.bash(f"strace -f -y -s 4000 -e trace={calls} -o calls.txt {program} worker start --drain > said.txt")
    unsynced, told, thrown = "nothing yet", 0, 0
    for line in (q.work / "calls.txt").read_text(errors="replace").splitlines():
        if "-wal>" in line:
            unsynced = "" if "sync(" in line else line
        elif "ftruncate(" in line and ".out>" in line:
            thrown += 1
            assert not unsynced, (unsynced, line)
        elif "write(" in line and " completed after " in line:
            told += line.count(" completed after ")
            assert not unsynced, (unsynced, line)
    assert (told, thrown) == (20, 20)


def test_a_worker_that_cannot_be_forked_is_tried_again(q: Queue) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import queuectl, os\n"
        "fork, failed = os.fork, []\n"
        "def limited():\n"
        "    if len(failed) < 1:\n"
        "        failed.append(1)\n"
        "        raise BlockingIOError(11, 'Resource temporarily unavailable')\n"
        "    return fork()\n"
        "os.fork = limited\n"
        "sys.exit(queuectl.main(['worker', 'start', '--drain']))\n"
    )
    job = q.add("true")
    done = subprocess.run([sys.executable, "-c", code, str(PROGRAM.parent)], env=q.env, capture_output=True)
    assert done.returncode == 0, done
    assert b"can't be started yet" in done.stderr
    assert q.state(job) == "completed"


def test_many_equal_fields_are_refused_quickly(q: Queue) -> None:
    pairs = ",".join(f'"a{n}":1' for n in range(60_000))
    began = time.monotonic()
    q("enqueue", "--file", "-", stdin='{%s,"a5":2}\n' % pairs, code=2)
    assert time.monotonic() - began < 15


@linux
def test_a_process_with_a_reused_id_is_not_signalled() -> None:
    stranger = subprocess.Popen(["sleep", "30"])
    try:
        started = read_proc(str(stranger.pid), "stat").rpartition(b")")[2].split()[19].decode()
        for kill_it in (False, True):
            queuectl.system.end_process(stranger.pid, str(int(started) - 1), kill_it)
        time.sleep(0.1)
        assert stranger.poll() is None
        queuectl.system.end_process(stranger.pid, started, False)
        assert stranger.wait(10) == -signal.SIGTERM
    finally:
        stranger.kill()


MOUNTS = """\
/dev/sda1 / ext4 rw 0 0
server:/home /home nfs4 rw 0 0
tmpfs /home/me/local tmpfs rw 0 0
share /mnt/with\\040space cifs rw 0 0
/dev/sdb1 /home2 ext4 rw 0 0
"""


@linux
@pytest.mark.parametrize(
    "folder, kind",
    [
        ("/", ""),
        ("/home", "nfs4"),
        ("/home/me/q", "nfs4"),
        ("/home/me/local/q", ""),
        ("/mnt/with space", "cifs"),
        ("/home2", ""),
    ],
)
def test_network_file_systems_are_known_by_their_mount(
    folder: str, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "mounts").write_text(MOUNTS)
    monkeypatch.setattr("builtins.open", lambda path, *args, **named: (tmp_path / "mounts").open(*args, **named))
    assert queuectl.system.network_file_system(folder) == kind


def test_a_database_on_a_network_file_system_is_refused(q: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queuectl.system, "network_file_system", lambda folder: "nfs4", raising=False)
    with pytest.raises(queuectl.QueueError, match="network file system"):
        queuectl.Store(str(q.db))
    assert not q.db.exists()


# =====================================================================================================
# trust, copies and the disk
# =====================================================================================================


def let_bait_be_lost(q: Queue, *options: str) -> None:
    """A job `bait` that is held by a dead worker: whoever recovers it records its death."""
    q.add(f"touch {q.work}/started; exec sleep 300", "--id", "bait", "--max-retries", "1", *options)
    pool = q.pool()
    q.wait_file("started")
    kill_pool(pool)


def give_away(folder: Path, uid: int) -> None:
    for path in [folder, *folder.rglob("*")]:
        os.chown(str(path), uid, uid, follow_symlinks=False)


as_root = pytest.mark.skipif(not ROOT, reason="only root can give files away")


@as_root
@pytest.mark.parametrize("args", [["cancel", "bait"], ["worker", "start", "--drain"], ["run", "true"]])
def test_nothing_of_another_users_database_is_executed(q: Queue, args: list[str]) -> None:
    q.set("on_dead", f"touch {q.work}/pwned")
    let_bait_be_lost(q)
    give_away(q.db.parent, 12345)
    result = q(*args, code=1)
    assert "belongs to another user (uid 12345)" in result.err
    assert not (q.work / "pwned").exists()
    assert q.state("bait") == "processing"
    give_away(q.db.parent, os.geteuid())
    q.drain(code=1)
    assert (q.work / "pwned").exists() == (args[0] != "cancel")


@as_root
def test_reading_another_users_database_says_whose_it_is(q: Queue) -> None:
    q.add("true", "--id", "a")
    give_away(q.db.parent, 12345)
    shown = q("list", "--json")
    assert [job["id"] for job in shown.json()] == ["a"] and "uid 12345" in shown.err
    assert "uid 12345" in q("doctor", code=1).out


@pytest.mark.parametrize(
    "mode, gid, refused",
    [(0o777, 0, True), (0o1777, 0, False), (0o755, 0, False), (0o775, 12345, False), (0o775, 1, True)],
)
def test_a_folder_above_that_others_may_write_is_refused(q: Queue, mode: int, gid: int, refused: bool) -> None:
    """But not where it is sticky, as /tmp is, and not where it is of a group to which nobody else belongs."""
    if gid and not ROOT:
        pytest.skip("only root can give files away")
    above = q.folder / "above"
    db = above / "mine" / "queue.db"
    db.parent.mkdir(parents=True, mode=0o700)
    above.chmod(mode)
    if gid:
        os.chown(str(above), -1, gid)
        above.chmod(mode)
    env = {"QUEUECTL_DB": db}
    q("enqueue", "touch ran", env=env)
    done = q("worker", "start", "--drain", code=1 if refused else 0, env=env)
    assert (q.work / "ran").exists() != refused
    if refused:
        assert str(above) in done.err and "chmod go-w" in done.err


def test_no_advice_to_change_a_folder_that_all_share(q: Queue) -> None:
    shared = q.folder / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    done = q("worker", "start", "--drain", "--db", shared / "queue.db", code=1)
    assert "folder of your own" in done.err and "chmod" not in done.err


def test_a_supervisor_leaves_a_database_alone_that_took_the_place_of_its_own(q: Queue, other: Queue) -> None:
    other.set("on_dead", f"touch {q.work}/pwned")
    let_bait_be_lost(other)
    pool = q.pool()
    os.rename(str(q.db.parent), str(q.folder / "away"))
    os.rename(str(other.db.parent), str(q.db.parent))
    pool.signal(signal.SIGTERM)
    assert pool.wait() == 1 and "replaced" in pool.text
    assert not (q.work / "pwned").exists()
    assert q.show("bait")["state"] == "processing"
    other.may_leave = True


@pytest.mark.parametrize("name", ["queue.db.lock", "queue.db-wal", "queue.db-shm", "queue.db.d"])
def test_links_beside_the_database_are_not_followed(q: Queue, name: str) -> None:
    victim = q.folder / "victim"
    victim.write_text("precious")
    if name.endswith(".d"):
        victim = q.folder / "folder"
        victim.mkdir()
    if name != "queue.db.lock":
        q.add("true")
    path = q.db.parent / name
    if path.exists():
        path.unlink()
    path.symlink_to(victim)
    q("enqueue", "true", code=1)
    q("status", code=(0, 1))
    q("worker", "start", "--drain", code=1)
    assert victim.read_text() == "precious" if victim.is_file() else not list(victim.iterdir())


def test_what_is_planted_among_the_files_of_workers_is_not_written_to(q: Queue) -> None:
    q.add("true", "--id", "a")
    victim = q.folder / "victim"
    victim.write_text("precious")
    folder = q.db.parent / "queue.db.d"
    folder.mkdir()
    for name in ("x-1.bell", "x-1.life", "recovery.lock", "sweep.lock"):
        (folder / name).symlink_to(victim)
    os.link(str(victim), str(folder / "y-1.bell"))
    q.add("true", "--id", "b")
    q("cancel", "a")
    q("worker", "start", "--drain", code=None)
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("command", ["status", "enqueue true", "worker start --drain", "doctor", "backup copy.db"])
def test_a_database_with_two_names_is_refused(q: Queue, command: str) -> None:
    q.add("true")
    os.link(str(q.db), str(q.folder / "link.db"))
    for path in (q.db, q.folder / "link.db"):
        refused = q.fails("--db", path, *command.split())
        assert "2 names" in refused.err and " backup FILE`" in refused.err
    (q.folder / "link.db").unlink()
    q("status")


# Copies


def test_a_backup_is_another_queue_in_which_what_ran_is_pending(q: Queue) -> None:
    """And who works on it harms nothing that runs in the original."""
    q.add(f"echo $$ >>{q.work}/pids; until [ -e {q.work}/end ]; do sleep 0.05; done", "--id", "a")
    pool = q.pool()
    q.wait_file("pids")
    copy = q.folder / "queue" / "copy.db"
    q("backup", copy)
    env = {"QUEUECTL_DB": copy}
    job = q("show", "a", "--json", env=env).json()
    assert (job["state"], job["attempts"], job["locked_by"]) == ("pending", 0, None)
    assert q("worker", "list", "--json", env=env).json() == []
    q("doctor", env=env)
    work = q.start("worker", "start", "--drain", env=env)
    wait_for(lambda: len(q.lines("pids")) == 2)
    assert q.state("a") == "processing"
    q.touch("end")
    assert work.wait() == 0
    q.wait_state("a", "completed")
    pool.stop()
    assert q.show("a")["attempts"] == 1


def copied(q: Queue, how: str) -> Path:
    """A copy of the queue as users make one, while its pool lives."""
    place = q.folder / "copy"
    place.mkdir(mode=0o700)
    names = ["queue.db", "queue.db-wal"] if how == "files" else os.listdir(str(q.db.parent))
    for name in names:
        if (q.db.parent / name).is_file():
            shutil.copy2(str(q.db.parent / name), str(place / name))
    if how == "folder":
        shutil.copytree(
            str(q.db.parent / "queue.db.d"), str(place / "queue.db.d"), ignore=shutil.ignore_patterns("*.bell")
        )
        q.fails("status", "--db", place / "queue.db")  # the log could be that of another: the user has to say it
        (place / "queue.db.lock").unlink()
    return place / "queue.db"


@linux
@pytest.mark.parametrize("how", ["files", "folder"])
def test_a_copy_waits_for_the_jobs_that_run_in_the_original(q: Queue, how: str) -> None:
    q.add(f"touch {q.work}/started; until [ -e {q.work}/end ]; do sleep 0.05; done", "--id", "a")
    pool = q.pool()
    q.wait_file("started")
    copy = copied(q, how)
    env = {"QUEUECTL_DB": copy}
    assert q("show", "a", "--json", env=env).json()["state"] == "processing"
    second = q.start("worker", "start", env=env)
    wait_for(lambda: q("worker", "list", "--json", env=env).json())
    q("enqueue", "--wait", "true", env=env)
    time.sleep(1.5)  # it has looked after dead workers by now
    assert q("show", "a", "--json", env=env).json()["state"] == "processing"
    assert "copied" in q("doctor", env=env, code=1).out
    assert q.state("a") == "processing"
    q.touch("end")
    q.wait_state("a", "completed")
    pool.stop()
    wait_for(lambda: q("show", "a", "--json", env=env).json()["state"] == "completed")  # for it is run here too
    assert q("show", "a", "--json", env=env).json()["attempts"] == 1
    assert second.stop() == 0


@linux
def test_cancel_gives_up_waiting_for_the_original(q: Queue) -> None:
    q.add(f"touch {q.work}/started; exec sleep 300", "--id", "a")
    q.pool()
    q.wait_file("started")
    env = {"QUEUECTL_DB": copied(q, "files")}
    q("cancel", "a", env=env)
    assert q("show", "a", "--json", env=env).json()["last_error"] == "cancelled"
    assert q.state("a") == "processing"


def test_a_moved_queue_keeps_its_id_and_one_moved_alone_does_not(q: Queue) -> None:
    """What lives there decides: its lock file beside it, which notes the id and the file."""
    first = queuectl.Store(str(q.db))
    ident = first.queue_id()
    first.close()
    moved = q.folder / "moved"
    q.db.parent.rename(moved)

    def id_of(path: Path) -> str:
        store = queuectl.Store(str(path))
        try:
            return str(store.queue_id())
        finally:
            store.close()

    assert id_of(moved / "queue.db") == ident
    alone = q.folder / "alone"
    alone.mkdir(mode=0o700)
    (moved / "queue.db").rename(alone / "queue.db")
    assert id_of(alone / "queue.db") != ident
    assert id_of(alone / "queue.db") == id_of(alone / "queue.db")


# Runs that can't be found by what they carry, and machines that have no room


@linux
def test_a_run_that_gave_up_all_but_its_session_is_ended_before_the_next(q: Queue) -> None:
    """It has neither environment nor descriptors of ours; its leader is gone, and its worker is killed."""
    give_up = "exec env -i /bin/bash -c 'exec 1>&- 2>&- 239>&-; echo $$ >>%s/pids; exec sleep 300'" % q.work
    # Its worker is given the time to note whom it has started: on a busy machine it may be held up just then.
    kill_worker = f"while [ ! -s {q.work}/pids ]; do sleep 0.02; done; sleep 0.5; kill -9 $PPID; exit"
    q.add(f"( {give_up} ) & {kill_worker}", "--id", "a", "--max-retries", "2", "--backoff-base", "0.1")
    q.drain(code=1)
    pids = q.lines("pids")
    assert len(pids) == 2
    assert not [pid for pid in pids if read_proc(pid, "cmdline")]


def test_a_noted_leader_counts_only_for_its_own_run_and_machine_start(store: Any) -> None:
    place = queuectl.system.place()
    life = queuectl.take_life_lock(store.path, "w-1")

    def leader(**changes: Any) -> Any:
        queuectl.note_run(life, queuectl.RunNote(place, 7, 3, 4711, 100, 102)._replace(**changes))
        return queuectl.leader_of(store.path, "w-1", 7, 3)

    if LINUX:
        assert leader() == (4711, 100, 102)
    assert leader(place="another/boot") == leader(run=2) == leader(seq=8) == queuectl.NOBODY
    os.close(life)


SHORT_OF = """
import errno, os, sys
sys.path.insert(0, {folder!r})
import queuectl
spawn = os.posix_spawn
def limited(*args, **options):
    if os.path.exists({flag!r}):
        raise OSError(errno.{name}, os.strerror(errno.{name}))
    return spawn(*args, **options)
os.posix_spawn = limited
sys.exit(queuectl.main())
"""


@pytest.mark.parametrize("name", ["EAGAIN", "ENOMEM", "EMFILE", "ENFILE"])
def test_a_shortage_of_the_machine_uses_up_no_attempt(q: Queue, name: str) -> None:
    q.load([{"id": f"job{n}", "command": "true", "max_retries": 1} for n in range(20)])
    q.touch("short")
    code = SHORT_OF.format(folder=str(PROGRAM.parent), flag=str(q.work / "short"), name=name)
    pool = q.launch([*q.program[:-1], "-c", code, "worker", "start", "--drain", "--count", "2"])
    wait_for(lambda: "can't start" in pool.text)
    held_up = wait_for(lambda: q.status()["troubles"])
    assert os.strerror(getattr(__import__("errno"), name)) in held_up[0]
    assert "Held up: " in q("status").out
    # Not at the moment of a try.
    wait_for(lambda: {(job["state"], job["attempts"]) for job in q.jobs()} == {("pending", 0)})
    (q.work / "short").unlink()
    assert pool.wait(40) == 0
    assert q.counts() == {"completed": 20}
    assert {len(q.show(f"job{n}")["runs"]) for n in range(20)} == {1}
    assert not q.status()["troubles"]


# =====================================================================================================
# stopped means stopped; edges
# =====================================================================================================

GO_ON = [  # jobs whose shells would go on with their next command if a child of theirs were ended first
    "sleep 30; echo went on >>%s",
    "sh -c 'sleep 30; echo went on >>%s'; echo went on >>%s",
    "bash -c 'sleep 30; echo went on >>%s' | cat; echo went on >>%s",
    "bash -c 'cat /dev/zero | sleep 30; echo went on >>%s'; echo went on >>%s",
]


def go_on(q: Queue, count: int, **fields: Any) -> None:
    path = q.work / "went-on"
    q.load([{"command": GO_ON[n % 4].replace("%s", str(path)), "max_retries": 1, **fields} for n in range(count)])


@linux
@pytest.mark.parametrize("way", ["time-out", "cancel", "stop --now", "killed worker"])
def test_no_shell_goes_on_with_its_next_command(q: Queue, way: str) -> None:
    """Who is ended is ended from the top."""
    count = {"time-out": 72, "killed worker": 24}.get(way, 36)
    go_on(q, count, **({"timeout": 0.3} if way == "time-out" else {}))
    pool = q.pool("--count", "12")
    if way == "time-out":
        q("wait", "--timeout", "90s", code=1)
    elif way == "cancel":
        while q.counts().get("pending") or q.counts().get("processing"):
            running = [job["id"] for job in q.jobs("--state", "processing")]
            if running:
                q("cancel", *running, code=None)
    elif way == "stop --now":
        for _ in range(3):
            wait_for(lambda: q.counts().get("processing", 0) == 12)
            q("worker", "stop", "--now")
            pool = q.pool("--count", "12")
    else:
        for _ in range(2):
            wait_for(lambda: q.counts().get("processing", 0) == 12)
            for worker in q.look("worker", "list"):
                kill(worker["pid"], signal.SIGKILL)
            wait_for(lambda: q.counts().get("dead", 0) >= 12)
    q("worker", "stop", "--now")
    pool.wait()
    assert not (q.work / "went-on").exists()


@linux
def test_members_come_parents_first_though_process_ids_wrap() -> None:
    processes = {
        10: queuectl._Process(1, 10, "200", False),  # a child with a lower number than its parent's
        900: queuectl._Process(1, 900, "100", False),
        11: queuectl._Process(900, 900, "150", False),
        12: queuectl._Process(11, 900, "150", False),
        9: queuectl._Process(12, 900, "150", False),
    }
    assert queuectl.system._from_the_top({9, 10, 11, 12, 900}, processes) == [900, 11, 12, 9, 10]


@pytest.mark.parametrize("command", ["trap 'exit 143' TERM", "trap 'exit 137' TERM"])
def test_a_job_that_the_shutdown_ended_in_its_own_way_is_given_back(q: Queue, command: str) -> None:
    q.add(f"{command}; touch {q.work}/started; while :; do sleep 0.05; done", "--id", "a", "--max-retries", "1")
    pool = q.pool()
    q.wait_file("started")
    pool.signal(signal.SIGTERM)
    wait_for(lambda: "stopping" in pool.err)
    run = q.look("worker", "list")[0]["pid"]
    for pid in children(run):
        kill(pid, signal.SIGTERM)
    assert pool.wait() == 0
    job = q.show("a")
    assert (job["state"], job["attempts"]) == ("pending", 0)


def test_a_job_that_is_killed_with_its_stopping_pool_is_given_back(q: Queue) -> None:
    """As by a service manager whose patience has ended."""
    q.add(f"touch {q.work}/started; exec sleep 300", "--id", "a", "--max-retries", "1")
    pool = q.pool()
    q.wait_file("started")
    pool.signal(signal.SIGTERM)
    wait_for(lambda: "stopping" in pool.err)
    time.sleep(0.3)
    kill_pool(pool)
    wait_for(lambda: q.workers() == 0)
    q.set("max_retries", "1")
    second = q.pool()
    wait_for(lambda: [run["state"] for run in q.show("a")["runs"]] == ["stopped", "processing"])
    q("worker", "stop", "--now")
    second.wait()
    assert q.show("a")["attempts"] == 0


def test_a_pool_whose_stderr_is_a_full_pipe_hears_signals(q: Queue) -> None:
    q.add(f"touch {q.work}/started; exec sleep 300", "--id", "a")
    read, write = os.pipe()
    os.set_blocking(write, False)
    try:
        while True:
            os.write(write, b"x" * 65536)
    except BlockingIOError:
        os.set_blocking(write, True)
    words = [*q.program, "worker", "start"]
    pool = subprocess.Popen(words, env=q.env, cwd=str(q.work), stdout=write, stderr=write, start_new_session=True)
    os.close(write)
    try:
        q.wait_file("started")
        pool.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        pool.send_signal(signal.SIGTERM)
        assert pool.wait(10) == 130
    finally:
        pool.kill()
        os.close(read)
    assert q.state("a") == "pending"


@pytest.mark.parametrize("how", ["cp", "cat", "dd"])
def test_a_database_that_is_overwritten_in_place_is_not_mixed_with_the_old_log(q: Queue, how: str) -> None:
    q.load(["true"] * 20)
    q.drain()
    backup = q.folder / "backup.db"
    q("backup", backup)
    q.add(f"touch {q.work}/started; exec sleep 300", "--id", "late")
    pool = q.pool()
    q.wait_file("started")
    kill_pool(pool)  # so that the log stays
    assert (q.db.parent / "queue.db-wal").stat().st_size
    ways = {"cp": f"cp {backup} {q.db}", "cat": f"cat {backup} >{q.db}", "dd": f"dd conv=notrunc if={backup} of={q.db}"}
    q.bash(ways[how])
    for words in (["status"], ["enqueue", "true"], ["worker", "start", "--drain"], ["doctor"]):
        refused = q.fails(*words)
        assert "was replaced" in refused.err and "queue.db-wal" in refused.err
    for name in ("queue.db-wal", "queue.db-shm"):
        (q.db.parent / name).rename(q.folder / name)
    assert q.counts() == {"completed": 20}
    q.add("true")
    q("doctor", code=None)
    q.may_leave = True


def test_a_job_that_stops_its_own_pool_and_waits_for_all_is_not_waited_for(q: Queue) -> None:
    program = shlex.join([str(word) for word in q.program])
    q.add(f"{program} wait --timeout 20s && {program} worker stop --timeout 20s; echo $? >{q.work}/code", "--id", "a")
    q.add("sleep 0.3", "--id", "b")
    pool = q.pool("--count", "2")
    assert pool.wait(30) == 0
    assert q.lines("code") == ["0"] and set(q.states().values()) == {"completed"}


def test_a_job_that_cancels_or_deletes_itself_deadlocks_nobody(q: Queue) -> None:
    program = shlex.join([str(word) for word in q.program])
    q.add(f"{program} delete a; {program} cancel a", "--id", "a", "--max-retries", "1")
    q.add(f"{program} wait b; echo $? >{q.work}/code", "--id", "b")
    q.drain(code=1)
    assert q.states() == {"a": "cancelled", "b": "completed"} and q.lines("code") == ["0"]


def test_wait_remembers_a_death_that_was_forgotten_meanwhile(q: Queue) -> None:
    q.add(f"until [ -e {q.work}/end ]; do sleep 0.05; done", "--id", "slow")
    q.add("exit 3", "--id", "a", "--max-retries", "1")
    waiting = q.start("wait")
    q.pool("--count", "2")
    q.wait_state("a", "dead")
    time.sleep(0.3)
    q("dlq", "purge")
    q.touch("end")
    assert waiting.wait() == 1 and "a is dead" in waiting.err


IO_ERROR = """
import errno, os, sys
sys.path.insert(0, {folder!r})
import queuectl
failed = []
def failing(real):
    def call(*args, **options):
        if os.access({flag!r}, os.F_OK) and {condition}:
            failed.append(1)
            raise OSError(errno.{name}, os.strerror(errno.{name}))
        return real(*args, **options)
    return call
{place} = failing({place})
sys.exit(queuectl.main())
"""


@pytest.mark.parametrize(
    "place, condition, name",
    [
        ("os.ftruncate", "len(failed) < 3", "EIO"),
        ("queuectl.head_and_tail", "len(failed) < 3", "EIO"),
        ("queuectl.OutputFiles.bound", "len(failed) < 3", "EIO"),
        ("queuectl.OutputFiles.open", "len(failed) < 2", "ESTALE"),
        ("queuectl.Posix.try_lock", "len(failed) < 4", "ENOLCK"),
        ("os.stat", "len(failed) < 4 and str(args[0]).endswith('queue.db')", "EIO"),
        ("os.open", "len(failed) < 4 and 'queue.db' in str(args[0])", "EIO"),
        ("os.listdir", "len(failed) < 4 and args[0] == '/proc'", "EMFILE"),
    ],
)
def test_one_error_of_the_machine_costs_no_job(q: Queue, place: str, condition: str, name: str) -> None:
    q.load([{"id": f"job{n}", "command": f"echo {n}; sleep 0.05; exit {n % 2}", "max_retries": 1} for n in range(12)])
    code = IO_ERROR.format(
        folder=str(PROGRAM.parent), flag=str(q.work / "ready"), place=place, condition=condition, name=name
    )
    pool = q.launch([*q.program[:-1], "-c", code, "worker", "start", "--count", "2"])
    wait_for(lambda: q.counts().get("completed"))
    q.touch("ready")
    wait_for(lambda: q.counts() == {"completed": 6, "dead": 6}, 40)
    assert "Traceback" not in pool.text
    assert {(len(job["runs"]), job["runs"][0]["state"]) for job in map(q.show, q.states())} == {
        (1, "completed"), (1, "failed")}  # fmt: skip
    (q.work / "ready").unlink()
    assert pool.stop() == 0


def test_a_worker_that_can_not_read_the_database_is_replaced(q: Queue) -> None:
    code = IO_ERROR.format(
        folder=str(PROGRAM.parent), flag=str(q.work / "ready"), place="queuectl.Worker._loop", name="EIO",
        condition="True",
    )  # fmt: skip
    q.touch("ready")
    q.add("true", "--id", "a")
    pool = q.launch([*q.program[:-1], "-c", code, "worker", "start", "--drain"])
    wait_for(lambda: "is replaced" in pool.err)
    (q.work / "ready").unlink()
    assert pool.wait() == 0 and q.state("a") == "completed"


def test_what_waited_starts_only_when_the_record_is_on_disk(q: Queue) -> None:
    """Seen in the system calls: the log is synced between the record of the first and the start of the second."""
    if not shutil.which("strace"):
        pytest.skip("there is no strace to look with")
    q("enqueue", "--id", "a", "true")
    q("enqueue", "--id", "b", "--after", "a", "true")
    program = shlex.join(map(str, q.program))
    q.bash(f"strace -f -y -e trace=fdatasync,pwrite64,execve -o calls.txt {program} worker start --drain")
    unsynced, starts = "", 0
    for line in (q.work / "calls.txt").read_text(errors="replace").splitlines():
        if "pwrite64(" in line and "-wal>" in line:
            unsynced = line
        elif "fdatasync(" in line and "-wal>" in line:
            unsynced = ""
        elif 'execve("/bin/sh"' in line:
            starts += 1
            assert starts < 2 or not unsynced, (unsynced, line)
    assert starts == 2


def test_opening_has_the_patience_of_writing(q: Queue) -> None:
    q.add("true", "--id", "a")
    db = sqlite3.connect(str(q.db), isolation_level=None)
    db.execute("PRAGMA locking_mode = EXCLUSIVE")
    db.execute("BEGIN EXCLUSIVE")
    db.execute("UPDATE control SET epoch = epoch")
    looks = [q.start("status"), q.start("list"), q.start("worker", "start", "--drain")]
    time.sleep(1.5)
    assert not any(look.ended for look in looks)
    db.execute("COMMIT")
    db.close()
    assert [look.wait() for look in looks] == [0, 0, 0]
    assert q.state("a") == "completed"


def test_a_chain_whose_first_is_dead_takes_linear_time(store: Any) -> None:
    def add(count: int) -> int:
        drafts = [
            dict(dict.fromkeys(queuectl.GIVEN_FIELDS), command="true", cwd="/", id=f"{count}-{n}",
                 after=[f"{count}-{n - 1}" if n else "dead"])
            for n in range(count)
        ]  # fmt: skip
        steps = 0

        def step() -> None:
            nonlocal steps
            steps += 1

        store.db.set_progress_handler(step, 100)
        with store.transaction():
            store.add(drafts, store.settings(), "/bin", 0o22, NOW)
        store.db.set_progress_handler(None, 100)
        return steps

    put(store, id="dead", max_retries=1)
    end(store, take(store), "failed", NOW)
    assert add(800) < 10 * add(100)
    assert store.counts()["dead"] == 901
    assert store.find("800-799")["last_error"].startswith("dead is dead")


@pytest.mark.parametrize("name", ["queue.db.d", "queue.db-wal", "queue.db.lock"])
def test_workers_whose_files_are_removed_stop_loudly(q: Queue, name: str) -> None:
    pool = q.pool("--count", "2")
    path = q.db.parent / name
    if path.is_dir():
        shutil.rmtree(str(path))
    else:
        path.unlink()
    assert pool.wait(15) == 1
    assert "deleted" in pool.text


def test_a_log_that_vanishes_between_two_looks_is_none(q: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever closes the database last removes the log, while another opens it."""
    monkeypatch.setattr(queuectl, "exists", lambda path: True)
    assert not queuectl.has_log(str(q.db))


def test_an_index_that_is_removed_with_its_log_is_not_missed(q: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever closes the database last removes the log's index first, then the log; workers may be starting then."""
    q.add("true")
    log = Path(f"{q.db}-wal")
    log.write_bytes(b"x" * 4096)
    monkeypatch.setattr(queuectl, "anyone_alive", lambda path: True)
    fd = os.open(f"{q.db}.lock", os.O_RDWR)
    closer = threading.Timer(0.1, log.unlink)
    closer.start()
    queuectl.Identity(str(q.db), fd).check_log()
    closer.join()
    log.write_bytes(b"x" * 4096)
    with pytest.raises(queuectl.QueueError, match="removed"):
        queuectl.Identity(str(q.db), fd).check_log()
    os.close(fd)


@linux
def test_jobs_inherit_nothing_of_who_started_the_pool(q: Queue) -> None:
    q.add("ls /proc/self/fd; exit 0", "--id", "a")
    words = shlex.join([str(word) for word in q.program])
    q.run(["bash", "-c", f"exec 7>lock 8<&0 21>other; {words} worker start --drain"])
    fds = set(q("logs", "--stdout", "a").out.split())
    assert not fds & {"7", "8", "21"}


@linux
def test_a_pool_started_with_signals_blocked_hears_them(q: Queue) -> None:
    code = (
        "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, [15, 2, 1]);"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    before = q.launch([sys.executable, "-c", code, *q.program, "worker", "start"])
    q.wait_ready(before, 1)
    before.signal(signal.SIGTERM)
    assert before.wait(10) == 0


@pytest.mark.parametrize(
    "command, printed",
    [
        ("-overlay || echo fine", "fine\n"),
        ("+x || echo fine", "fine\n"),
        ("--version || echo fine", "fine\n"),
        ("printf '<%s>' a\\ ", "<a >"),
        ("printf '<%s>' a\u00a0", "<a\u00a0>"),
        ("printf '<%s>' a\f", "<a\f>"),
    ],
)
def test_nothing_of_a_command_is_an_option_or_cut_off(q: Queue, command: str, printed: str) -> None:
    q("enqueue", "--id", "a", "--", command)
    q("enqueue", "--file", "-", stdin=f"  \t{command}\r\n")
    assert {job["command"] for job in q.jobs()} == {command}
    q.drain()
    assert {q("logs", "--stdout", name).out for name in q.states()} == {printed}


def test_a_job_whose_prerequisite_died_and_was_forgotten_is_not_retried(q: Queue) -> None:
    q.load(
        [{"id": "a", "command": "false", "max_retries": 1}, {"id": "b", "command": "true", "after": ["a"]},
         {"id": "c", "command": "true", "after": ["b"]}]
    )  # fmt: skip
    q.drain(code=1)
    q("delete", "a")
    refused = q.fails("dlq", "retry", "b")
    assert "was never completed" in refused.err
    assert "was never completed" in q("why", "b").out
    q("dlq", "retry", "--all")
    assert q.states() == {"b": "dead", "c": "dead"}
    q("doctor")


@linux
def test_worker_stop_continues_a_pool_that_is_suspended(q: Queue) -> None:
    pool = q.pool()
    pool.signal(signal.SIGSTOP)
    q("worker", "stop", "--timeout", "20s")
    assert pool.wait() == 0


def test_the_unit_waits_for_its_disk_and_outlives_one_job_without_memory(q: Queue) -> None:
    unit = q("service").out
    assert f"RequiresMountsFor={q.db.parent}\n" in unit and "OOMPolicy=continue\n" in unit


@linux
@pytest.mark.parametrize("env", [{}, {"PYTHONUNBUFFERED": "1"}])
def test_a_short_result_leaves_in_one_write(q: Queue, env: dict[str, str]) -> None:
    if not shutil.which("strace"):
        pytest.skip("there is no strace to look with")
    q.add("echo one; echo two >&2", "--id", "a")
    q.drain()
    q.bash(f"strace -o calls.txt -e trace=write {shlex.join([sys.executable, str(PROGRAM)])} logs a | cat", env=env)
    writes = [line for line in (q.work / "calls.txt").read_text().splitlines() if line.startswith("write(1,")]
    assert len(writes) == 1, writes


def test_a_clock_ahead_for_a_moment_lets_nothing_be_forgotten(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = dict(queuectl.SETTINGS, keep_completed=86400)
    os.makedirs(queuectl.folder_path(store.path))
    ended(store, "a", "b")
    real, own = time.time, time.monotonic
    shift, passed = [0.0], [0.0]
    monkeypatch.setattr(time, "time", lambda: NOW / 1000 + shift[0] + passed[0])
    monkeypatch.setattr(queuectl, "monotonic", lambda: own() + passed[0])

    def sweep() -> int:
        queuectl.sweep(store, keep)
        return int(store.counts()["completed"])

    assert sweep() == 2
    shift[0] = 365 * 86400.0
    for _ in range(3):
        passed[0] += 10
        assert sweep() == 2
    shift[0] = 0.0
    for _ in range(20):
        passed[0] += 10
        assert sweep() == 2
    passed[0] += 2 * 86400  # now they are old
    os.utime(os.path.join(queuectl.folder_path(store.path), "sweep.lock"), (1, 1))
    assert sweep() == 0 and real


def test_delays_and_retries_begin_anew_when_the_clock_is_set_back(store: Any) -> None:
    day = 86_400_000
    put(store, NOW + day, id="delayed", run_at=queuectl.Delayed(NOW + day + 2000))
    put(store, NOW + day, id="scheduled", run_at=NOW + day + 2000)
    with store.transaction():
        store.make_ready_after_clock_step(NOW)
    assert store.find("delayed")["due"] == NOW + 2000
    assert store.find("scheduled")["due"] == NOW + day + 2000


def test_too_few_descriptors_for_the_workers_are_told_at_the_start(q: Queue) -> None:
    words = shlex.join([str(word) for word in q.program])
    done = q.run(["bash", "-c", f"ulimit -n 100; {words} worker start --drain --count 200"])
    assert done.code == 2 and "ulimit -n 464" in done.err


def test_a_backup_replaces_nothing_but_a_backup(q: Queue) -> None:
    notes = q.work / "notes.txt"
    notes.write_text("precious")
    q.fails("backup", notes)
    assert not notes.exists() or notes.read_text() == "precious"
    q.add("true")
    assert "was not changed" in q.fails("backup", notes).err and notes.read_text() == "precious"
    q("backup", "copy.db")
    q("backup", "copy.db")


@as_root
def test_a_read_only_file_system_can_be_read(q: Queue) -> None:
    if not can_unshare():
        pytest.skip("needs a mount namespace")
    q.add("true", "--id", "a")
    words = shlex.join([str(word) for word in q.program])
    place = q.db.parent
    script = f"mount --bind {place} {place} && mount -o remount,ro,bind {place} && {words} list && {words} doctor"
    done = q.run(["unshare", "-m", "bash", "-c", script])
    assert done.code == 0 and "pending" in done.out, done


@pytest.mark.parametrize("text", ["0001-01-01T00:00:00Z", "9999-12-31T23:59:59.999Z"])
def test_the_first_and_the_last_time_are_shown_as_they_are_read(text: str) -> None:
    moment = queuectl.parse_time(text, NOW)
    shown = queuectl.show_time(moment)
    assert shown[:19] == text[:19] and queuectl.parse_time(shown, NOW) == moment


def test_what_is_after_the_last_time_is_refused() -> None:
    with pytest.raises(queuectl.UsageError):
        queuectl.parse_time("9999-12-31T23:59:59.9999Z", NOW)
    assert queuectl.parse_time("+5m", NOW) == NOW + 300_000


def test_small_words_at_the_edges(q: Queue) -> None:
    refused = q("enqueue", "--timeout", "0", "true", code=2).err
    assert "timeout must" in refused and "from 0.001 s" in refused
    q("enqueue", "--env", "spring.port=1", "true", code=2)
    q.add("true", "--id", "a", "--unique", "k")
    assert q("enqueue", "--quiet", "--unique", "k", "--if-exists", "skip", "true").out == "a\n"
    assert q("enqueue", "--json", "--id", "b", "true").json()["id"] == "b"
    q.set("on_dead", "printf '\033[31m'")
    assert "\033" not in q("config", "get", "on_dead").out
    q("config", "set", "max_output_bytes", "256000000", code=2)


@pytest.mark.parametrize("home", ["", "relative", "{folder}/nothing/home"])
def test_a_home_that_is_none_is_not_made(q: Queue, home: str) -> None:
    home = home.format(folder=q.folder)
    refused = q.fails("enqueue", "true", env={"HOME": home, "QUEUECTL_DB": None})
    assert "--db" in refused.err
    assert not any(path.exists() for path in (q.folder / "nothing", q.work / "relative", Path("/.queuectl")))
    q("enqueue", "true", env={"HOME": home})


@as_root
def test_a_queue_that_root_made_tells_its_user_how_to_get_it(q: Queue) -> None:
    q.add("true")
    q.db.parent.chmod(0o755)
    for path in [q.folder, *q.folder.parents]:
        if not path.stat().st_mode & 0o001:
            path.chmod(path.stat().st_mode | 0o011)
    code = (
        "import os, sys; os.setgroups([]); os.setgid(12345); os.setuid(12345);"
        "sys.path.insert(0, sys.argv[1]); import queuectl; sys.exit(queuectl.main(sys.argv[2:]))"
    )
    done = q.run([sys.executable, "-B", "-c", code, str(PROGRAM.parent), "enqueue", "--cwd", "/", "true"], cwd="/")
    if "No module" in done.err or "Permission denied: '/root" in done.err:
        pytest.skip("another user can't read the program here")
    assert done.code == 1 and "id 0" in done.err and "chown" in done.err


# =====================================================================================================
# machines as they are
# =====================================================================================================

OLD_GLIBC = """
import os, sys
sys.path.insert(0, {folder!r})
import queuectl
def missing(*args, **options):
    raise NotImplementedError("setsid")
os.posix_spawn = missing
sys.exit(queuectl.main())
"""


def with_old_glibc(q: Queue, *args: Word) -> Background:
    """The program on a system whose posix_spawn has no setsid."""
    return q.launch([*q.program[:-1], "-c", OLD_GLIBC.format(folder=str(PROGRAM.parent)), *args])


def test_500_short_jobs_with_an_old_glibc(q: Queue) -> None:
    q.load([f"exit {3 if n % 50 == 0 else 0}" for n in range(500)], "--max-retries", "1")
    assert with_old_glibc(q, "worker", "start", "--drain", "--count", "4").wait(60) == 1
    assert q.counts() == {"completed": 490, "dead": 10}
    assert {job["exit_code"] for job in q.jobs("--state", "dead")} == {3}


def test_a_killed_worker_with_an_old_glibc(q: Queue) -> None:
    q.add(f"echo $$ >>{q.work}/pids; [ -e {q.work}/again ] || {{ touch {q.work}/again; kill -9 $PPID; sleep 300; }}",
          "--id", "a", "--backoff-base", "0.1")  # fmt: skip
    assert with_old_glibc(q, "worker", "start", "--drain").wait(30) == 0
    assert [run["state"] for run in q.show("a")["runs"]] == ["lost", "completed"]


def test_a_run_whose_exit_code_is_unknown_is_lost(q: Queue) -> None:
    code = (
        "import os, sys; sys.path.insert(0, sys.argv.pop(1)); import queuectl\n"
        "spawn = queuectl.Posix._spawn\n"
        "def reaped(*args):\n"
        "    pid = spawn(*args)\n"
        "    os.waitpid(pid, 0)\n"
        "    return pid\n"
        "queuectl.Posix._spawn = reaped\n"
        "sys.exit(queuectl.main())\n"
    )
    q.add("true", "--id", "a", "--max-retries", "1")
    assert q.launch([*q.program[:-1], "-c", code, PROGRAM.parent, "worker", "start", "--drain"]).wait(20) == 1
    assert q.show("a")["last_error"] == "its exit code was lost" and q.show("a")["runs"][0]["state"] == "lost"


@containers
def test_a_database_mounted_as_a_single_file_is_refused(q: Queue) -> None:
    q.add("true")
    place = q.folder / "mounted"
    place.mkdir(mode=0o700)
    (place / "queue.db").touch()
    words = shlex.join([str(word) for word in q.program])
    script = f"mount --bind {q.db} {place}/queue.db && {words} --db {place}/queue.db enqueue true"
    done = q.run(["unshare", "-m", "bash", "-c", script])
    assert done.code == 1 and "mount the folder" in done.err


@pytest.mark.parametrize("damage", ["none", "gone", "damaged"])
def test_a_backup_is_restored(q: Queue, damage: str) -> None:
    q.load(["true"] * 3)
    q.drain()
    q("backup", "b.db")
    q.add("true", "--id", "late")
    if damage == "gone":
        q.db.unlink()
    elif damage == "damaged":
        q.db.write_bytes(q.db.read_bytes()[:4096] + b"x" * 20000)
        assert "restore" in q("list", code=None).err or True
    pool = q.pool() if damage == "none" else None
    if pool:
        assert "worker stop" in q.fails("restore", "b.db").err
        pool.stop()
    done = q("restore", "b.db")
    assert q.counts() == {"completed": 3}
    assert ("kept as" in done.err) == (damage != "gone")
    q.add("true")
    q.drain()
    q("doctor")
    if damage == "none":
        kept = done.err.split("kept as ")[1].strip()
        assert len(q("list", "--json", "--db", kept).json()) == 4


def test_a_restored_job_does_not_run_beside_what_a_killed_worker_left(q: Queue) -> None:
    q.add("echo begin >>log; [ -e again ] || { touch again; sleep 300; }; echo end >>log", "--id", "a")
    pool = q.pool()
    q.wait_file("again")
    q("backup", "b.db")
    kill_pool(pool)
    assert "a was lost with its worker" in q("restore", "b.db").err
    assert not q.processes()
    q.drain()
    assert q.lines("log") == ["begin", "begin", "end"]


@pytest.mark.parametrize("damage", ["text", "settings", "page", "schema"])
def test_a_damaged_database_is_replaced_though_nobody_can_end_what_it_has_running(
    q: Queue, unshare: list[str], damage: str
) -> None:
    """Whatever is read from it may be of any kind. If its lost run is in an engine, no worker can end that any more."""
    q.add("true", "--id", "old")
    q("backup", "b.db")
    lost_in_an_engine(q, unshare, "echo it lives")
    db = sqlite3.connect(str(q.db))
    if damage == "text":
        db.execute("UPDATE jobs SET worker = NULL")
    elif damage == "settings":
        db.execute("INSERT INTO settings VALUES ('poll_interval_ms', '{')")
    else:
        change = "rootpage = 2" if damage == "page" else "name = CAST(x'ff' AS TEXT), sql = 'CREATE'"
        db.execute("PRAGMA writable_schema = 1")
        db.execute(f"UPDATE sqlite_master SET {change} WHERE name = 'jobs_expiring'")
    db.commit()
    db.close()
    done = q("restore", "b.db")
    assert "what killed workers have left running is not ended" in done.err
    assert q.states() == {"old": "pending"}


def test_a_copy_is_replaced_while_jobs_of_the_original_run(q: Queue) -> None:
    q.add("touch begun; sleep 300", "--id", "a")
    with q.working():
        q.wait_file("begun")
        q("backup", "b.db")
        copy = q.folder / "copy" / "queue.db"
        copy.parent.mkdir(mode=0o700)
        shutil.copy(q.db, copy)
        shutil.copy(f"{q.db}-wal", f"{copy}-wal")
        q("restore", "b.db", "--db", str(copy))
        assert q.state("a") == "processing"
        q("cancel", "a", code=None)


def test_a_pool_that_starts_while_a_restore_ends_lost_runs_keeps_its_database(q: Queue) -> None:
    q.set("kill_grace_seconds", "60")
    q.add("trap 'touch asked' TERM; touch begun; until [ -e go ]; do sleep 0.05; done")
    pool = q.pool()
    q.wait_file("begun")
    q("backup", "b.db")
    kill_pool(pool)
    restore = q.start("restore", "b.db")
    q.wait_file("asked")
    with q.working("--queue", "none"):
        (q.work / "go").touch()
        assert restore.wait() == 1
        assert "workers still use" in restore.err


def test_nothing_is_restored_over_what_others_could_have_written(q: Queue) -> None:
    """For what killed workers have left must be ended first, and it is named there."""
    q.add("sleep 300; true", "--id", "a")
    pool = q.pool()
    q.wait_state("a", "processing")
    q("backup", "b.db")
    kill_pool(pool)
    q.db.parent.chmod(0o777)
    assert "chmod" in q.fails("restore", "b.db").err
    q.db.parent.chmod(0o700)
    q("restore", "b.db")
    assert not q.processes()


def test_only_a_backup_is_restored(q: Queue) -> None:
    (q.work / "notes.txt").write_text("x" * 5000)
    assert "not a backup" in q.fails("restore", "notes.txt").err
    assert "no file" in q.fails("restore", "nothing.db").err
    assert "is not a file" in q.fails("restore", "notes.txt", "--db", ".").err


def call_it_python3(q: Queue) -> None:
    """A copy of the program in the folder one is in, and this Python as the first `python3` of the PATH."""
    shutil.copy(str(PROGRAM), str(q.work / "queuectl.py"))
    (q.folder / "bin").mkdir()
    (q.folder / "bin" / "python3").symlink_to(sys.executable)
    q.env["PATH"] = f"{q.folder}/bin:{q.env['PATH']}"


@pytest.mark.parametrize("option", [True, False])
def test_advice_can_be_pasted(q: Queue, option: bool) -> None:
    """For who copied the file, with the database that was named."""
    call_it_python3(q)
    db = ["--db", "my queue/q.db"] if option else []
    script = ["python3", "queuectl.py", *db]
    q.run([*script, "enqueue", "--id", "a", "--max-retries", "1", "exit 3"])
    q.run([*script, "worker", "start", "--drain"])
    named = "python3 queuectl.py --db 'my queue/q.db' " if option else "python3 queuectl.py "
    assert f"`{named}logs a` shows what it printed" in q.run([*script, "wait", "a"]).err
    assert f"`{named}dlq list`" in q.run([*script, "status"]).out
    assert f"`{named}logs a`" in q.run([*script, "why", "a"]).out
    q.run(["sh", "-c", q.run([*script, "why", "a"]).out.split("`")[3]])
    assert '"pending"' in q.run([*script, "show", "a", "--json"]).out


def test_advice_of_the_module_names_the_module(q: Queue) -> None:
    call_it_python3(q)
    done = q.run(["python3", "-m", "queuectl", "show", "nothing"])
    assert "`python3 -m queuectl list`" in done.err


@pytest.mark.parametrize("module", ["_ctypes", "_sqlite3"])
def test_a_python_that_lacks_something(q: Queue, module: str) -> None:
    code = (
        f"import sys; sys.modules[{module!r}] = None; sys.path.insert(0, sys.argv.pop(1)); import queuectl;"
        "sys.exit(queuectl.main())"
    )
    q.add("yes | head -c 3000000", "--id", "a")
    done = q.run([sys.executable, "-B", "-c", code, PROGRAM.parent, "worker", "start", "--drain"])
    if module == "_ctypes":
        assert done.code == 0 and q.state("a") == "completed"
    else:
        assert done.code == 1 and re.fullmatch("queuectl: error: .*SQLite.*\n", done.err)


def test_file_names_are_enqueued_safely(q: Queue) -> None:
    names = ["it's", "$(touch PWNED)", "a b", '"; touch PWNED; "']
    q("enqueue", "--each", "printf '%s,' {} >>out", *names)
    q("enqueue", "-0", "--each", "printf '%s,' {} >>out", stdin="\0".join(names) + "\0")
    q.drain()
    assert (q.work / "out").read_text() == 2 * (",".join(names) + ",")
    assert not (q.work / "PWNED").exists()
    assert "each" in q("enqueue", "--help").out
    q("enqueue", "--each", 'echo "{}"', "a", code=2)


@containers
def test_a_full_file_system_of_small_blocks_can_be_read_and_not_written(q: Queue) -> None:
    """SQLite's mapped index would end the program by SIGBUS there."""
    if not shutil.which("mkfs.ext4"):
        pytest.skip("there is no mkfs.ext4")
    image, place = q.folder / "image", q.folder / "mnt"
    place.mkdir()
    words = shlex.join([str(word) for word in q.program])
    script = f"""
        truncate -s 8M {image}; mkfs.ext4 -q -b 1024 -m 0 {image} && mount -o loop {image} {place} || exit 77
        export QUEUECTL_DB={place}/q/queue.db
        {words} enqueue true && dd if=/dev/zero of={place}/fill bs=1k 2>/dev/null; {words} enqueue true; echo "code $?"
        {words} list
    """
    done = q.run(["unshare", "-m", "bash", "-c", script])
    if done.code == 77:
        pytest.skip("loop devices can't be had")
    assert "code 1" in done.out and "no space left" in done.err and "pending" in done.out


@pytest.mark.parametrize(
    "args, words",
    [
        (["--db", "folder/", "enqueue", "true"], "is a file"),
        (["--db", "x" * 250, "enqueue", "true"], "too long"),
        (["purge", "--older-than", "7"], "7d"),
        (["dlq", "purge", "--older-than", "1.5"], "1.5d"),
    ],
)
def test_usage_that_is_surely_a_slip(q: Queue, args: list[str], words: str) -> None:
    assert words in q.fails(*args, code=2).err
    assert not list(q.work.iterdir())


def test_a_pause_of_an_unknown_queue_says_so(q: Queue) -> None:
    q.add("true", "--queue", "mail")
    assert "no job has ever been in the queue mial" in q("queue", "pause", "mial").err
    assert q("queue", "pause", "mail").err == ""


def test_why_says_that_a_prerequisite_was_retried(q: Queue) -> None:
    q.load([{"id": "a", "command": "false", "max_retries": 1}, {"id": "b", "command": "true", "after": ["a"]}])
    q.drain(code=1)
    q("dlq", "retry", "a")
    assert "a was retried since" in q("why", "b").out


def test_a_job_with_a_time_says_when_it_will_run(q: Queue) -> None:
    env = {"TZ": "XYZ+5"}
    said = q("enqueue", "--run-at", "2036-01-31T10:00:00Z", "--id", "a", "true", env=env)
    assert said.out == "Enqueued: a\n"
    assert "2036-01-31T10:00:00.000Z (2036-01-31 05:00 in local time)" in said.err


def test_a_program_from_a_pipe_says_what_is_missing(q: Queue) -> None:
    for words in ("service", "worker start --detach"):
        done = q.bash(f"{shlex.quote(sys.executable)} - {words} <{shlex.quote(str(PROGRAM))}", code=1)
        assert "save it as a file" in done.err


def test_a_dumb_terminal_gets_no_escapes(q: Queue) -> None:
    run = q.terminal("run", "sleep 0.5", env={"TERM": "dumb"})
    assert run.wait() == 0
    run.reader.join(5)
    assert "\033" not in run.out


# What attackers found


@linux
def test_a_process_with_the_reused_id_of_a_leader_is_no_member() -> None:
    leader = queuectl.Leader(4711, 100, 102)
    assert not leader.is_a_stranger(None)
    assert not leader.is_a_stranger(queuectl._Process(1, 4711, "101", False))
    assert leader.is_a_stranger(queuectl._Process(1, 4711, "103", False))


def test_a_supervisor_that_can_not_fork_loses_no_descriptors(q: Queue) -> None:
    code = (
        "import os, sys; sys.path.insert(0, sys.argv.pop(1)); import queuectl\n"
        "fork = os.fork\n"
        "def limited():\n"
        "    if os.path.exists('short'):\n"
        "        raise BlockingIOError(11, 'Resource temporarily unavailable')\n"
        "    return fork()\n"
        "os.fork = limited\n"
        "sys.exit(queuectl.main())\n"
    )
    q.touch("short")
    q.add("true", "--id", "a")
    pool = q.launch([*q.program[:-1], "-c", code, PROGRAM.parent, "worker", "start", "--drain", "--count", "3"])
    wait_for(lambda: pool.err.count("can't be started yet") >= 3)
    before = len(os.listdir(f"/proc/{pool.process.pid}/fd")) if LINUX else 0
    wait_for(lambda: pool.err.count("can't be started yet") >= 9)
    assert not LINUX or len(os.listdir(f"/proc/{pool.process.pid}/fd")) == before
    (q.work / "short").unlink()
    assert pool.wait() == 0 and q.state("a") == "completed"


def test_what_is_not_there_is_not_trusted(tmp_path: Path) -> None:
    """Who can move a folder away while it is looked at can put another there."""
    assert "moved away" in queuectl.distrust_of(str(tmp_path / "gone" / "queue.db"))
    queuectl.refuse_untrusted(str(tmp_path / "new" / "queue.db"))
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


@as_root
@linux
def test_a_folder_above_with_a_list_of_who_may_write_is_refused(q: Queue) -> None:
    if not shutil.which("setfacl"):
        pytest.skip("there is no setfacl")
    above = q.folder / "above"
    above.mkdir()
    if subprocess.run(["setfacl", "-m", "u:12345:rwx", str(above)]).returncode:
        pytest.skip("no lists here")
    assert "written by others" in q("worker", "start", "--drain", "--db", above / "q" / "queue.db", code=1).err


def test_a_run_waits_for_its_own_hooks_alone(q: Queue) -> None:
    q.set("on_dead", "exit 1")
    q.set("backoff_base", "60")
    q.add("false", "--id", "a", "--max-retries", "1", "--queue", "mail")
    q("worker", "start", "--max-jobs", "1", code=None)
    began = time.monotonic()
    q("run", "echo hi")
    assert time.monotonic() - began < 30


def test_the_queue_of_hooks_takes_no_other_jobs(q: Queue) -> None:
    q("enqueue", "--queue", "on-dead", "true", code=2)
    q("enqueue", '{"command":"true","queue":"on-dead","env":{"QUEUECTL_RUN":"x-1-1"}}', code=2)


def test_hooks_are_not_counted_by_max_jobs(q: Queue) -> None:
    q.set("on_dead", "true")
    q.load([{"id": "a", "command": "false", "max_retries": 1}, {"id": "b", "command": "true"}])
    q("worker", "start", "--max-jobs", "2", code=None)
    assert q.state("b") == "completed"


def test_a_new_database_beside_an_old_lock_file_is_not_taken_for_a_replaced_one(q: Queue) -> None:
    for _ in range(3):
        q.add("true")
        for path in q.db.parent.glob("queue.db*"):
            if path.is_file() and path.name != "queue.db.lock":
                path.unlink()
        adding = [q.start("enqueue", "true") for _ in range(6)]
        assert [add.wait() for add in adding] == [0] * 6
        assert q.counts() == {"pending": 6}


# =====================================================================================================
# a newer program on an older database
# =====================================================================================================

# Databases as the last programs of the schemas 1, 2 and 3 (d04c40c, e62fb65, 1a391d8) made and left
# them: see make_old.py. `sqlite3.connect(path).executescript(OLD_DATABASES[1])` makes one anew.
OLD_DATABASES = {
    1: r"""
PRAGMA journal_mode = WAL;
BEGIN TRANSACTION;
PRAGMA application_id = 1902343217;
PRAGMA user_version = 1;
CREATE TABLE contexts (
            id INTEGER PRIMARY KEY, cwd TEXT NOT NULL, path TEXT NOT NULL, umask INTEGER NOT NULL,
            UNIQUE (cwd, path, umask));
INSERT INTO "contexts" VALUES(1,'/','/usr/bin:/bin',18);
CREATE TABLE control (epoch INTEGER NOT NULL);
INSERT INTO "control" VALUES(5);
CREATE TABLE jobs (
            seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
            generated INTEGER NOT NULL, command TEXT NOT NULL, state TEXT NOT NULL,
            queue TEXT NOT NULL, priority INTEGER NOT NULL, ready INTEGER NOT NULL, due INTEGER,
            run_at INTEGER, timeout_seconds REAL, attempts INTEGER NOT NULL DEFAULT 0,
            runs INTEGER NOT NULL DEFAULT 0, max_retries INTEGER NOT NULL, backoff_base REAL,
            context INTEGER NOT NULL, env TEXT, created_at INTEGER NOT NULL,
            updated_at INTEGER NOT NULL, started_at INTEGER, finished_at INTEGER,
            exit_code INTEGER, last_error TEXT, cancel INTEGER NOT NULL DEFAULT 0,
            worker TEXT, slot INTEGER, locked_at INTEGER);
INSERT INTO "jobs" VALUES(1,'done',0,'echo ''it''"''"''s done: naïve; ✓''; echo a warning >&2','completed','default',
    10,0,NULL,NULL,NULL,1,1,4,NULL,1,NULL,1748736000000,1748736000518,1748736000514,1748736000518,0,NULL,0,NULL,NULL,
    NULL);
INSERT INTO "jobs" VALUES(2,'binary',0,'printf ''\000\377\376 \047bin\047''','completed','mail',3,0,NULL,NULL,NULL,1,
    1,4,NULL,1,NULL,1748736000098,1748736000514,1748736000512,1748736000514,0,NULL,0,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(3,'dead',0,'echo "try $QUEUECTL_ATTEMPT"; echo no luck >&2; exit 4','dead','default',10,0,
    NULL,NULL,NULL,2,2,2,0.01,1,NULL,1748736000198,1748736000531,1748736000528,1748736000531,4,'exit code 4: no luck',
    0,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(4,'late',0,'echo slow; exec sleep 60','dead','default',10,0,NULL,NULL,0.3,1,1,1,NULL,1,NULL,
    1748736000294,1748736000830,1748736000518,1748736000830,-15,'timed out after 0.3s',0,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(5,'flaky',0,'echo "try $QUEUECTL_ATTEMPT"; exit $((QUEUECTL_ATTEMPT < 2))','failed',
    'default',10,0,1748736040526,NULL,NULL,1,1,4,40.0,1,NULL,1748736000389,1748736000526,1748736000522,1748736000526,
    1,'exit code 1',0,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(6,'stopped',0,'case $QUEUECTL_RUN in *-1) exec sleep 600;; esac; echo second run','pending',
    'default',0,1,NULL,NULL,NULL,0,1,4,NULL,1,NULL,1748736001039,1748736001687,1748736001189,1748736001687,NULL,
    'ended with its worker, to be run again',0,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(7,'scheduled',0,'echo at last','pending','default',10,0,4070908800000,4070908800000,NULL,0,
    0,4,NULL,1,NULL,1748736001902,1748736001902,NULL,NULL,NULL,NULL,0,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(8,'ready',0,'echo "$GREETING"
echo "a second line"','pending','mail',1,1,NULL,NULL,3600.0,0,0,4,NULL,1,'{"GREETING": "it''s \"hello\""}',
    1748736002022,1748736002022,NULL,NULL,NULL,NULL,0,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(9,'26d7368400',1,'echo generated','pending','default',10,1,NULL,NULL,NULL,0,0,4,NULL,1,NULL,
    1748736002130,1748736002130,NULL,NULL,NULL,NULL,0,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(10,'cancelled',0,'echo never','dead','default',10,0,NULL,NULL,NULL,0,0,4,NULL,1,NULL,
    1748736002232,1748736002329,NULL,1748736002329,NULL,'cancelled before it ran again',0,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(11,'lost',0,
    'case $QUEUECTL_RUN in *-1) echo before; exec sleep 600;; esac; echo after the crash','processing','default',-5,0,
    NULL,NULL,NULL,1,1,4,0.01,1,NULL,1748736002426,1748736002571,1748736002571,NULL,NULL,NULL,0,'f6fc69ad-1',0,
    1748736002571);
CREATE TABLE pools (
            name TEXT PRIMARY KEY, pid INTEGER NOT NULL, started_at INTEGER NOT NULL,
            workers INTEGER NOT NULL, queues TEXT, stop INTEGER NOT NULL DEFAULT 0,
            jobs_left INTEGER, died INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID;
INSERT INTO "pools" VALUES('f6fc69ad',19255,1748736002556,1,NULL,0,NULL,0);
CREATE TABLE queues (
            name TEXT PRIMARY KEY, pending INTEGER NOT NULL DEFAULT 0,
            processing INTEGER NOT NULL DEFAULT 0, completed INTEGER NOT NULL DEFAULT 0,
            failed INTEGER NOT NULL DEFAULT 0, dead INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID;
INSERT INTO "queues" VALUES('default',3,1,1,1,3);
INSERT INTO "queues" VALUES('mail',1,0,1,0,0);
CREATE TABLE runs (
            id INTEGER PRIMARY KEY, job INTEGER NOT NULL, run INTEGER NOT NULL,
            attempt INTEGER NOT NULL, state TEXT NOT NULL, started_at INTEGER NOT NULL,
            finished_at INTEGER NOT NULL, seconds REAL NOT NULL, exit_code INTEGER, error TEXT,
            worker TEXT NOT NULL, stdout BLOB, stderr BLOB);
INSERT INTO "runs" VALUES(1,2,1,1,'completed',1748736000512,1748736000514,1.21936600021399499382e-03,0,NULL,
    'fb1cc581-1',X'00FFFE202762696E27',NULL);
INSERT INTO "runs" VALUES(2,1,1,1,'completed',1748736000514,1748736000518,3.25563899991720973048e-03,0,NULL,
    'fb1cc581-2',X'6974277320646F6E653A206E61C3AF76653B20E29C930A',X'61207761726E696E670A');
INSERT INTO "runs" VALUES(3,3,1,1,'failed',1748736000516,1748736000518,0.000964992000035636,4,'exit code 4: no luck',
    'fb1cc581-1',X'74727920310A',X'6E6F206C75636B0A');
INSERT INTO "runs" VALUES(4,5,1,1,'failed',1748736000522,1748736000526,9.06597000039255362935e-04,1,'exit code 1',
    'fb1cc581-1',X'74727920310A',NULL);
INSERT INTO "runs" VALUES(5,3,2,2,'failed',1748736000528,1748736000531,2.19333500012908189091e-03,4,
    'exit code 4: no luck','fb1cc581-1',X'74727920320A',X'6E6F206C75636B0A');
INSERT INTO "runs" VALUES(6,4,1,1,'failed',1748736000518,1748736000830,3.07439251000005242531e-01,-15,
    'timed out after 0.3s','fb1cc581-2',X'736C6F770A',NULL);
INSERT INTO "runs" VALUES(7,6,1,1,'stopped',1748736001189,1748736001687,4.93463006999945719144e-01,NULL,
    'ended with its worker, to be run again','df3d3b4f-1',NULL,NULL);
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
INSERT INTO "settings" VALUES('kill_grace_seconds','1.0');
INSERT INTO "settings" VALUES('max_output_bytes','4096');
INSERT INTO "settings" VALUES('max_retries','4');
INSERT INTO "settings" VALUES('poll_interval_ms','500');
CREATE TABLE workers (
            name TEXT PRIMARY KEY, pool TEXT NOT NULL, pid INTEGER NOT NULL,
            started_at INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO "workers" VALUES('f6fc69ad-1','f6fc69ad',19259,1748736002563);
CREATE INDEX jobs_ready ON jobs (queue, priority, seq) WHERE ready = 1;
CREATE INDEX jobs_due ON jobs (due) WHERE ready = 0 AND due IS NOT NULL;
CREATE INDEX jobs_state ON jobs (state, seq);
CREATE TRIGGER jobs_counted AFTER UPDATE OF state ON jobs BEGIN
            UPDATE queues SET
                pending = pending + (new.state = 'pending') - (old.state = 'pending'),
                processing = processing + (new.state = 'processing') - (old.state = 'processing'),
                completed = completed + (new.state = 'completed') - (old.state = 'completed'),
                failed = failed + (new.state = 'failed') - (old.state = 'failed'),
                dead = dead + (new.state = 'dead') - (old.state = 'dead')
            WHERE name = new.queue; END;
CREATE TRIGGER jobs_discounted AFTER DELETE ON jobs BEGIN
            UPDATE queues SET
                pending = pending - (old.state = 'pending'),
                completed = completed - (old.state = 'completed'),
                failed = failed - (old.state = 'failed'), dead = dead - (old.state = 'dead')
            WHERE name = old.queue; END;
CREATE INDEX runs_job ON runs (job, run);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('jobs',12);
COMMIT;
""",
    2: r"""
PRAGMA journal_mode = WAL;
BEGIN TRANSACTION;
PRAGMA application_id = 1902343217;
PRAGMA user_version = 2;
CREATE TABLE contexts (
            id INTEGER PRIMARY KEY, cwd TEXT NOT NULL, path TEXT NOT NULL, umask INTEGER NOT NULL,
            UNIQUE (cwd, path, umask));
INSERT INTO "contexts" VALUES(1,'/','/usr/bin:/bin',18);
CREATE TABLE control (epoch INTEGER NOT NULL, paused INTEGER NOT NULL DEFAULT 0);
INSERT INTO "control" VALUES(8,0);
CREATE TABLE jobs (
            seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
            generated INTEGER NOT NULL, command TEXT NOT NULL, state TEXT NOT NULL,
            queue TEXT NOT NULL, priority INTEGER NOT NULL, ready INTEGER NOT NULL, due INTEGER,
            run_at INTEGER, timeout_seconds REAL, attempts INTEGER NOT NULL DEFAULT 0,
            runs INTEGER NOT NULL DEFAULT 0, max_retries INTEGER NOT NULL, backoff_base REAL,
            context INTEGER NOT NULL, env TEXT, created_at INTEGER NOT NULL,
            updated_at INTEGER NOT NULL, started_at INTEGER, finished_at INTEGER,
            exit_code INTEGER, last_error TEXT, cancel INTEGER NOT NULL DEFAULT 0,
            worker TEXT, slot INTEGER, locked_at INTEGER);
INSERT INTO "jobs" VALUES(1,'done',0,'echo ''it''"''"''s done: naïve; ✓''; echo a warning >&2','completed','default',
    10,0,NULL,NULL,NULL,1,1,4,NULL,1,NULL,1748736000000,1748736000686,1748736000685,1748736000686,0,NULL,0,NULL,NULL,
    NULL);
INSERT INTO "jobs" VALUES(2,'binary',0,'printf ''\000\377\376 \047bin\047''','completed','mail',3,0,NULL,NULL,NULL,1,
    1,4,NULL,1,NULL,1748736000093,1748736000684,1748736000683,1748736000684,0,NULL,0,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(3,'dead',0,'echo "try $QUEUECTL_ATTEMPT"; echo no luck >&2; exit 4','dead','default',10,0,
    NULL,NULL,NULL,2,2,2,0.01,1,NULL,1748736000186,1748736000698,1748736000697,1748736000698,4,'exit code 4: no luck',
    0,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(4,'late',0,'echo slow; exec sleep 60','dead','default',10,0,NULL,NULL,0.3,1,1,1,NULL,1,NULL,
    1748736000280,1748736000994,1748736000686,1748736000994,-15,'timed out after 0.3s',0,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(5,'flaky',0,'echo "try $QUEUECTL_ATTEMPT"; exit $((QUEUECTL_ATTEMPT < 2))','failed',
    'default',10,0,1748736040689,NULL,NULL,1,1,4,40.0,1,NULL,1748736000375,1748736000689,1748736000688,1748736000689,
    1,'exit code 1',0,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(6,'far',0,'exit 5','failed','held',10,0,1749736000690,NULL,NULL,1,1,9,1000000.0,1,NULL,
    1748736000480,1748736000690,1748736000689,1748736000690,5,'exit code 5',0,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(7,'stopped',0,'case $QUEUECTL_RUN in *-1) exec sleep 600;; esac; echo second run','pending',
    'default',0,1,NULL,NULL,NULL,0,1,4,NULL,1,NULL,1748736001402,1748736002052,1748736001511,1748736002052,NULL,
    'ended with its worker, to be run again',0,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(8,'scheduled',0,'echo at last','pending','default',10,0,4070908800000,4070908800000,NULL,0,
    0,4,NULL,1,NULL,1748736002256,1748736002256,NULL,NULL,NULL,NULL,0,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(9,'ready',0,'echo "$GREETING"
echo "a second line"','pending','mail',1,1,NULL,NULL,3600.0,0,0,4,NULL,1,'{"GREETING": "it''s \"hello\""}',
    1748736002361,1748736002361,NULL,NULL,NULL,NULL,0,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(10,'bbcd8514b1',1,'echo generated','pending','default',10,1,NULL,NULL,NULL,0,0,4,NULL,1,
    NULL,1748736002461,1748736002461,NULL,NULL,NULL,NULL,0,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(11,'cancelled',0,'echo never','dead','default',10,0,NULL,NULL,NULL,0,0,4,NULL,1,NULL,
    1748736002554,1748736002646,NULL,1748736002646,NULL,'cancelled before it ran again',0,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(12,'gpu-1',0,'echo one','pending','gpu',10,1,NULL,NULL,NULL,0,0,4,NULL,1,NULL,1748736002746,
    1748736002746,NULL,NULL,NULL,NULL,0,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(13,'gpu-2',0,'echo two','pending','gpu',10,1,NULL,NULL,NULL,0,0,4,NULL,1,NULL,1748736002838,
    1748736002838,NULL,NULL,NULL,NULL,0,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(14,'parked',0,'echo parked','pending','held',10,1,NULL,NULL,NULL,0,0,4,NULL,1,NULL,
    1748736002938,1748736002938,NULL,NULL,NULL,NULL,0,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(15,'lost',0,
    'case $QUEUECTL_RUN in *-1) echo before; exec sleep 600;; esac; echo after the crash','processing','default',-5,0,
    NULL,NULL,NULL,1,1,4,0.01,1,NULL,1748736003030,1748736003141,1748736003141,NULL,NULL,NULL,0,'9f79d9f4-1',0,
    1748736003141);
CREATE TABLE pools (
            name TEXT PRIMARY KEY, pid INTEGER NOT NULL, started_at INTEGER NOT NULL,
            workers INTEGER NOT NULL, queues TEXT, stop INTEGER NOT NULL DEFAULT 0,
            jobs_left INTEGER, died INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID;
INSERT INTO "pools" VALUES('9f79d9f4',19600,1748736003132,1,NULL,0,NULL,0);
CREATE TABLE queues (
            name TEXT PRIMARY KEY, pending INTEGER NOT NULL DEFAULT 0,
            processing INTEGER NOT NULL DEFAULT 0, completed INTEGER NOT NULL DEFAULT 0,
            failed INTEGER NOT NULL DEFAULT 0, dead INTEGER NOT NULL DEFAULT 0, paused INTEGER NOT NULL DEFAULT 0, concurrency INTEGER) WITHOUT ROWID;
INSERT INTO "queues" VALUES('default',3,1,1,1,3,0,NULL);
INSERT INTO "queues" VALUES('gpu',2,0,0,0,0,0,1);
INSERT INTO "queues" VALUES('held',1,0,0,1,0,1,NULL);
INSERT INTO "queues" VALUES('mail',1,0,1,0,0,0,NULL);
CREATE TABLE "runs" (
            id INTEGER PRIMARY KEY, attempt INTEGER NOT NULL, state TEXT NOT NULL,
            started_at INTEGER NOT NULL, finished_at INTEGER NOT NULL, seconds REAL NOT NULL,
            exit_code INTEGER, error TEXT, worker TEXT NOT NULL, stdout BLOB, stderr BLOB);
INSERT INTO "runs" VALUES(16777217,1,'completed',1748736000685,1748736000686,9.16580999955840525217e-04,0,NULL,
    'b132cf4d-1',X'6974277320646F6E653A206E61C3AF76653B20E29C930A',X'61207761726E696E670A');
INSERT INTO "runs" VALUES(33554433,1,'completed',1748736000683,1748736000684,1.22353999995539197698e-03,0,NULL,
    'b132cf4d-1',X'00FFFE202762696E27',NULL);
INSERT INTO "runs" VALUES(50331649,1,'failed',1748736000685,1748736000687,1.79590299990195489954e-03,4,
    'exit code 4: no luck','b132cf4d-2',X'74727920310A',X'6E6F206C75636B0A');
INSERT INTO "runs" VALUES(50331650,2,'failed',1748736000697,1748736000698,8.83802000089417560957e-04,4,
    'exit code 4: no luck','b132cf4d-2',X'74727920320A',X'6E6F206C75636B0A');
INSERT INTO "runs" VALUES(67108865,1,'failed',1748736000686,1748736000994,3.08012656999835598981e-01,-15,
    'timed out after 0.3s','b132cf4d-1',X'736C6F770A',NULL);
INSERT INTO "runs" VALUES(83886081,1,'failed',1748736000688,1748736000689,1.32847500003663299139e-03,1,'exit code 1',
    'b132cf4d-2',X'74727920310A',NULL);
INSERT INTO "runs" VALUES(100663297,1,'failed',1748736000689,1748736000690,8.79951999877448542974e-04,5,'exit code 5',
    'b132cf4d-2',NULL,NULL);
INSERT INTO "runs" VALUES(117440513,1,'stopped',1748736001511,1748736002052,5.4063112499989074422e-01,NULL,
    'ended with its worker, to be run again','2da54b91-1',NULL,NULL);
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
INSERT INTO "settings" VALUES('backoff_max','3110400000.0');
INSERT INTO "settings" VALUES('kill_grace_seconds','1.0');
INSERT INTO "settings" VALUES('max_output_bytes','4096');
INSERT INTO "settings" VALUES('max_retries','4');
INSERT INTO "settings" VALUES('poll_interval_ms','500');
CREATE TABLE workers (
            name TEXT PRIMARY KEY, pool TEXT NOT NULL, pid INTEGER NOT NULL,
            started_at INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO "workers" VALUES('9f79d9f4-1','9f79d9f4',19605,1748736003139);
CREATE INDEX jobs_ready ON jobs (queue, priority, seq) WHERE ready = 1;
CREATE INDEX jobs_due ON jobs (due) WHERE ready = 0 AND due IS NOT NULL;
CREATE INDEX jobs_state ON jobs (state, seq);
CREATE TRIGGER jobs_counted AFTER UPDATE OF state ON jobs BEGIN
            UPDATE queues SET
                pending = pending + (new.state = 'pending') - (old.state = 'pending'),
                processing = processing + (new.state = 'processing') - (old.state = 'processing'),
                completed = completed + (new.state = 'completed') - (old.state = 'completed'),
                failed = failed + (new.state = 'failed') - (old.state = 'failed'),
                dead = dead + (new.state = 'dead') - (old.state = 'dead')
            WHERE name = new.queue; END;
CREATE TRIGGER jobs_discounted AFTER DELETE ON jobs BEGIN
            UPDATE queues SET
                pending = pending - (old.state = 'pending'),
                completed = completed - (old.state = 'completed'),
                failed = failed - (old.state = 'failed'), dead = dead - (old.state = 'dead')
            WHERE name = old.queue; END;
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('jobs',16);
COMMIT;
""",  # noqa: E501
    3: r"""
PRAGMA journal_mode = WAL;
BEGIN TRANSACTION;
PRAGMA application_id = 1902343217;
PRAGMA user_version = 3;
CREATE TABLE "contexts" (
            id INTEGER PRIMARY KEY AUTOINCREMENT, cwd TEXT NOT NULL, path TEXT NOT NULL, umask INTEGER NOT NULL,
            jobs INTEGER NOT NULL DEFAULT 0, environ TEXT NOT NULL, UNIQUE (cwd, path, umask, environ));
INSERT INTO "contexts" VALUES(1,'/','/usr/bin:/bin',18,0,'');
INSERT INTO "contexts" VALUES(2,'/','/usr/bin:/bin',18,1,
    '{"HOME": "/", "LC_ALL": "C.UTF-8", "PATH": "/usr/bin:/bin", "TOKEN": "a ''secret''"}');
CREATE TABLE control (epoch INTEGER NOT NULL, paused INTEGER NOT NULL DEFAULT 0);
INSERT INTO "control" VALUES(12,0);
CREATE TABLE jobs (
            seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
            generated INTEGER NOT NULL, command TEXT NOT NULL, state TEXT NOT NULL,
            queue TEXT NOT NULL, priority INTEGER NOT NULL, ready INTEGER NOT NULL, due INTEGER,
            run_at INTEGER, timeout_seconds REAL, attempts INTEGER NOT NULL DEFAULT 0,
            runs INTEGER NOT NULL DEFAULT 0, max_retries INTEGER NOT NULL, backoff_base REAL,
            context INTEGER NOT NULL, env TEXT, created_at INTEGER NOT NULL,
            updated_at INTEGER NOT NULL, started_at INTEGER, finished_at INTEGER,
            exit_code INTEGER, last_error TEXT, cancel INTEGER NOT NULL DEFAULT 0,
            worker TEXT, slot INTEGER, locked_at INTEGER, unique_key TEXT, policy TEXT, deferrals INTEGER NOT NULL DEFAULT 0);
INSERT INTO "jobs" VALUES(1,'done',0,'echo ''it''"''"''s done: naïve; ✓''; echo a warning >&2','completed','default',
    10,0,NULL,NULL,NULL,1,1,4,NULL,1,NULL,1748736000000,1748736001466,1748736001465,1748736001466,0,NULL,0,NULL,NULL,
    NULL,NULL,NULL,0);
INSERT INTO "jobs" VALUES(2,'binary',0,'printf ''\000\377\376 \047bin\047''','completed','mail',3,0,NULL,NULL,NULL,1,
    1,4,NULL,1,NULL,1748736000107,1748736001464,1748736001463,1748736001464,0,NULL,0,NULL,NULL,NULL,NULL,NULL,0);
INSERT INTO "jobs" VALUES(3,'dead',0,'echo "try $QUEUECTL_ATTEMPT"; echo no luck >&2; exit 4','dead','default',10,0,
    NULL,NULL,NULL,2,2,2,0.01,1,NULL,1748736000218,1748736001489,1748736001488,1748736001489,4,'exit code 4: no luck',
    0,NULL,NULL,NULL,NULL,NULL,0);
INSERT INTO "jobs" VALUES(4,'late',0,'echo slow; exec sleep 60','dead','default',10,0,NULL,NULL,0.3,1,1,1,NULL,1,NULL,
    1748736000330,1748736001777,1748736001469,1748736001777,-15,'timed out after 0.3s',0,NULL,NULL,NULL,NULL,NULL,0);
INSERT INTO "jobs" VALUES(5,'flaky',0,'echo "try $QUEUECTL_ATTEMPT"; exit $((QUEUECTL_ATTEMPT < 2))','failed',
    'default',10,0,1748736041472,NULL,NULL,1,1,4,40.0,1,NULL,1748736000438,1748736001472,1748736001471,1748736001472,
    1,'exit code 1',0,NULL,NULL,NULL,NULL,NULL,0);
INSERT INTO "jobs" VALUES(6,'far',0,'exit 5','failed','held',10,0,1749736001474,NULL,NULL,1,1,9,1000000.0,1,NULL,
    1748736000547,1748736001474,1748736001472,1748736001474,5,'exit code 5',0,NULL,NULL,NULL,NULL,NULL,0);
INSERT INTO "jobs" VALUES(7,'deferred',0,'case $QUEUECTL_RUN in *-1) exit 75;; esac; echo not deferred','failed',
    'default',10,0,1748736041475,NULL,NULL,0,1,4,NULL,1,NULL,1748736000779,1748736001475,1748736001474,1748736001475,
    75,'exit code 75, to be tried again later (1 of 100 times)',0,NULL,NULL,NULL,NULL,'{"retry_after": 40.0}',1);
INSERT INTO "jobs" VALUES(8,'final',0,'exit 3','dead','default',10,0,NULL,NULL,NULL,1,1,4,NULL,1,NULL,1748736000886,
    1748736001478,1748736001475,1748736001478,3,'exit code 3, which is final',0,NULL,NULL,NULL,NULL,
    '{"dead_on": [3, 5]}',0);
INSERT INTO "jobs" VALUES(9,'heir',0,'echo never','dead','default',10,0,NULL,NULL,NULL,0,0,4,NULL,1,NULL,
    1748736000998,1748736001478,NULL,1748736001478,NULL,'final is dead, and this job was to run after it',0,NULL,NULL,
    NULL,NULL,NULL,0);
INSERT INTO "jobs" VALUES(10,'heir''s',0,'echo never','dead','default',10,0,NULL,NULL,NULL,0,0,4,NULL,1,NULL,
    1748736001108,1748736001478,NULL,1748736001478,NULL,'final is dead, and this job was to run after it',0,NULL,NULL,
    NULL,NULL,NULL,0);
INSERT INTO "jobs" VALUES(11,'keyed-1',0,'echo the first with this key','completed','default',10,0,NULL,NULL,NULL,1,1,
    4,NULL,1,NULL,1748736001221,1748736001488,1748736001479,1748736001488,0,NULL,0,NULL,NULL,NULL,'the key',NULL,0);
INSERT INTO "jobs" VALUES(12,'stopped',0,'case $QUEUECTL_RUN in *-1) exec sleep 600;; esac; echo second run',
    'pending','default',0,1,NULL,NULL,NULL,0,1,4,NULL,1,NULL,1748736002270,1748736002986,1748736002457,1748736002986,
    NULL,'ended with its worker, to be run again',0,NULL,NULL,NULL,NULL,NULL,0);
INSERT INTO "jobs" VALUES(13,'34ea6e9f5b',1,'echo one; sleep 2','completed','run-1',10,0,NULL,NULL,NULL,1,1,4,NULL,1,
    NULL,1748736003205,1748736005285,1748736003273,1748736005285,0,NULL,0,NULL,NULL,NULL,NULL,NULL,0);
INSERT INTO "jobs" VALUES(14,'f457a79185',1,'echo two; :','pending','run-1',10,1,NULL,NULL,NULL,0,0,4,NULL,1,NULL,
    1748736003205,1748736003205,NULL,NULL,NULL,NULL,0,NULL,NULL,NULL,NULL,NULL,0);
INSERT INTO "jobs" VALUES(15,'scheduled',0,'echo at last','pending','default',10,0,4070908800000,4070908800000,NULL,0,
    0,4,NULL,1,NULL,1748736005407,1748736005407,NULL,NULL,NULL,NULL,0,NULL,NULL,NULL,NULL,NULL,0);
INSERT INTO "jobs" VALUES(16,'ready',0,'echo "$GREETING"
echo "a second line"','pending','mail',1,1,NULL,NULL,3600.0,0,0,4,NULL,1,'{"GREETING": "it''s \"hello\""}',
    1748736005512,1748736005512,NULL,NULL,NULL,NULL,0,NULL,NULL,NULL,NULL,NULL,0);
INSERT INTO "jobs" VALUES(17,'4dbc6cb9fc',1,'echo generated','pending','default',10,1,NULL,NULL,NULL,0,0,4,NULL,1,
    NULL,1748736005617,1748736005617,NULL,NULL,NULL,NULL,0,NULL,NULL,NULL,NULL,NULL,0);
INSERT INTO "jobs" VALUES(18,'cancelled',0,'echo never','dead','default',10,0,NULL,NULL,NULL,0,0,4,NULL,1,NULL,
    1748736005729,1748736005842,NULL,1748736005842,NULL,'cancelled before it ran again',0,NULL,NULL,NULL,NULL,NULL,0);
INSERT INTO "jobs" VALUES(19,'gpu-1',0,'echo one','pending','gpu',10,1,NULL,NULL,NULL,0,0,4,NULL,1,NULL,1748736005950,
    1748736005950,NULL,NULL,NULL,NULL,0,NULL,NULL,NULL,NULL,NULL,0);
INSERT INTO "jobs" VALUES(20,'gpu-2',0,'echo two','pending','gpu',10,1,NULL,NULL,NULL,0,0,4,NULL,1,NULL,1748736006058,
    1748736006058,NULL,NULL,NULL,NULL,0,NULL,NULL,NULL,NULL,NULL,0);
INSERT INTO "jobs" VALUES(21,'parked',0,'echo parked','pending','held',10,1,NULL,NULL,NULL,0,0,4,NULL,1,NULL,
    1748736006174,1748736006174,NULL,NULL,NULL,NULL,0,NULL,NULL,NULL,NULL,NULL,0);
INSERT INTO "jobs" VALUES(22,'first',0,'echo first','pending','default',20,1,NULL,NULL,NULL,0,0,4,NULL,1,NULL,
    1748736006289,1748736006289,NULL,NULL,NULL,NULL,0,NULL,NULL,NULL,NULL,NULL,0);
INSERT INTO "jobs" VALUES(23,'second',0,'echo second','pending','default',2,0,NULL,NULL,NULL,0,0,4,NULL,1,NULL,
    1748736006398,1748736006398,NULL,NULL,NULL,NULL,0,NULL,NULL,NULL,NULL,NULL,0);
INSERT INTO "jobs" VALUES(24,'keyed-2',0,'echo the second with this key','pending','default',10,1,NULL,NULL,NULL,0,0,
    4,NULL,1,NULL,1748736006507,1748736006507,NULL,NULL,NULL,NULL,0,NULL,NULL,NULL,'the key',NULL,0);
INSERT INTO "jobs" VALUES(25,'whole',0,'echo "$TOKEN for $QUEUECTL_JOB_ID"','pending','default',10,1,NULL,NULL,NULL,0,
    0,4,NULL,2,NULL,1748736006615,1748736006615,NULL,NULL,NULL,NULL,0,NULL,NULL,NULL,NULL,NULL,0);
INSERT INTO "jobs" VALUES(26,'lost',0,
    'case $QUEUECTL_RUN in *-1) echo before; exec sleep 600;; esac; echo after the crash','processing','default',-5,0,
    NULL,NULL,NULL,1,1,4,0.01,1,NULL,1748736007053,1748736007242,1748736007242,NULL,NULL,NULL,0,'c224dbfa-1',0,
    1748736007242,NULL,NULL,0);
CREATE TABLE pools (
            name TEXT PRIMARY KEY, pid INTEGER NOT NULL, started_at INTEGER NOT NULL,
            workers INTEGER NOT NULL, queues TEXT, stop INTEGER NOT NULL DEFAULT 0,
            jobs_left INTEGER, died INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID;
INSERT INTO "pools" VALUES('c224dbfa',20406,1748736007231,1,NULL,0,NULL,0);
CREATE TABLE queues (
            name TEXT PRIMARY KEY, pending INTEGER NOT NULL DEFAULT 0,
            processing INTEGER NOT NULL DEFAULT 0, completed INTEGER NOT NULL DEFAULT 0,
            failed INTEGER NOT NULL DEFAULT 0, dead INTEGER NOT NULL DEFAULT 0, paused INTEGER NOT NULL DEFAULT 0, concurrency INTEGER) WITHOUT ROWID;
INSERT INTO "queues" VALUES('default',7,1,2,2,6,0,NULL);
INSERT INTO "queues" VALUES('gpu',2,0,0,0,0,0,1);
INSERT INTO "queues" VALUES('held',1,0,0,1,0,1,NULL);
INSERT INTO "queues" VALUES('mail',1,0,1,0,0,0,NULL);
INSERT INTO "queues" VALUES('run-1',1,0,1,0,0,0,1);
CREATE TABLE "runs" (
            id INTEGER PRIMARY KEY, attempt INTEGER NOT NULL, state TEXT NOT NULL,
            started_at INTEGER NOT NULL, finished_at INTEGER NOT NULL, seconds REAL NOT NULL,
            exit_code INTEGER, error TEXT, worker TEXT NOT NULL, stdout BLOB, stderr BLOB);
INSERT INTO "runs" VALUES(16777217,1,'completed',1748736001465,1748736001466,8.9034899997386673931e-04,0,NULL,
    'c35bdd04-1',X'6974277320646F6E653A206E61C3AF76653B20E29C930A',X'61207761726E696E670A');
INSERT INTO "runs" VALUES(33554433,1,'completed',1748736001463,1748736001464,1.20038000000022293534e-03,0,NULL,
    'c35bdd04-1',X'00FFFE202762696E27',NULL);
INSERT INTO "runs" VALUES(50331649,1,'failed',1748736001466,1748736001470,0.00415749700005108,4,
    'exit code 4: no luck','c35bdd04-1',X'74727920310A',X'6E6F206C75636B0A');
INSERT INTO "runs" VALUES(50331650,2,'failed',1748736001488,1748736001489,9.15157999997973092831e-04,4,
    'exit code 4: no luck','c35bdd04-1',X'74727920320A',X'6E6F206C75636B0A');
INSERT INTO "runs" VALUES(67108865,1,'failed',1748736001469,1748736001777,3.07394444999999905121e-01,-15,
    'timed out after 0.3s','c35bdd04-2',X'736C6F770A',NULL);
INSERT INTO "runs" VALUES(83886081,1,'failed',1748736001471,1748736001472,1.70008199984295060858e-03,1,'exit code 1',
    'c35bdd04-1',X'74727920310A',NULL);
INSERT INTO "runs" VALUES(100663297,1,'failed',1748736001472,1748736001474,0.000939270999879227,5,'exit code 5',
    'c35bdd04-1',NULL,NULL);
INSERT INTO "runs" VALUES(117440513,1,'deferred',1748736001474,1748736001475,1.17206799995983601547e-03,75,
    'exit code 75, to be tried again later (1 of 100 times)','c35bdd04-1',NULL,NULL);
INSERT INTO "runs" VALUES(134217729,1,'failed',1748736001475,1748736001478,2.88050499989367381203e-03,3,
    'exit code 3, which is final','c35bdd04-1',NULL,NULL);
INSERT INTO "runs" VALUES(184549377,1,'completed',1748736001479,1748736001488,8.95398899979227280709e-03,0,NULL,
    'c35bdd04-1',X'74686520666972737420776974682074686973206B65790A',NULL);
INSERT INTO "runs" VALUES(201326593,1,'stopped',1748736002457,1748736002986,0.528805297999952,NULL,
    'ended with its worker, to be run again','4a4e651b-1',NULL,NULL);
INSERT INTO "runs" VALUES(218103809,1,'completed',1748736003273,1748736005285,2.01184010200017837632e+00,0,NULL,
    '5640ab26-1',X'6F6E650A',NULL);
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
INSERT INTO "settings" VALUES('backoff_max','3110400000.0');
INSERT INTO "settings" VALUES('keep_dead','3153600000.0');
INSERT INTO "settings" VALUES('kill_grace_seconds','1.0');
INSERT INTO "settings" VALUES('max_output_bytes','4096');
INSERT INTO "settings" VALUES('max_retries','4');
INSERT INTO "settings" VALUES('on_dead','"true \"$QUEUECTL_JOB_ID\""');
INSERT INTO "settings" VALUES('poll_interval_ms','500');
INSERT INTO "settings" VALUES('retry_after','30.0');
CREATE TABLE waits (
            awaited INTEGER NOT NULL, job INTEGER NOT NULL, PRIMARY KEY (awaited, job)) WITHOUT ROWID;
INSERT INTO "waits" VALUES(8,9);
INSERT INTO "waits" VALUES(9,10);
INSERT INTO "waits" VALUES(22,23);
CREATE TABLE workers (
            name TEXT PRIMARY KEY, pool TEXT NOT NULL, pid INTEGER NOT NULL,
            started_at INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO "workers" VALUES('c224dbfa-1','c224dbfa',20408,1748736007239);
CREATE INDEX jobs_ready ON jobs (queue, priority, seq) WHERE ready = 1;
CREATE INDEX jobs_due ON jobs (due) WHERE ready = 0 AND due IS NOT NULL;
CREATE INDEX jobs_state ON jobs (state, seq);
CREATE TRIGGER jobs_counted AFTER UPDATE OF state ON jobs BEGIN
            UPDATE queues SET
                pending = pending + (new.state = 'pending') - (old.state = 'pending'),
                processing = processing + (new.state = 'processing') - (old.state = 'processing'),
                completed = completed + (new.state = 'completed') - (old.state = 'completed'),
                failed = failed + (new.state = 'failed') - (old.state = 'failed'),
                dead = dead + (new.state = 'dead') - (old.state = 'dead')
            WHERE name = new.queue; END;
CREATE TRIGGER jobs_discounted AFTER DELETE ON jobs BEGIN
            UPDATE queues SET
                pending = pending - (old.state = 'pending'),
                completed = completed - (old.state = 'completed'),
                failed = failed - (old.state = 'failed'), dead = dead - (old.state = 'dead')
            WHERE name = old.queue; END;
CREATE UNIQUE INDEX jobs_unique ON jobs (unique_key)
            WHERE unique_key IS NOT NULL AND state <> 'completed' AND state <> 'dead';
CREATE INDEX waits_job ON waits (job);
CREATE TRIGGER jobs_forgotten AFTER DELETE ON jobs BEGIN
            DELETE FROM waits WHERE awaited = old.seq; DELETE FROM waits WHERE job = old.seq;
            UPDATE contexts SET jobs = jobs - 1 WHERE id = old.context AND jobs > 0;
            DELETE FROM contexts WHERE id = old.context AND jobs = 0 AND environ <> ''; END;
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('contexts',2);
INSERT INTO "sqlite_sequence" VALUES('jobs',27);
COMMIT;
""",  # noqa: E501
}

older = pytest.mark.parametrize("version", sorted(OLD_DATABASES))


class OldJob(NamedTuple):
    """A job of OLD_DATABASES: from which version on there is one, and what becomes of it when workers have been."""

    since: int
    name: str  # its id, or its command if the id was drawn
    state: str
    end: str
    prints: bytes  # by all of its runs, in the end


OLD_JOBS = [
    OldJob(1, "done", "completed", "completed", "it's done: naïve; ✓\n".encode()),
    OldJob(1, "binary", "completed", "completed", b"\0\377\376 'bin'"),
    OldJob(1, "dead", "dead", "dead", b"try 2\n"),
    OldJob(1, "late", "dead", "dead", b"slow\n"),
    OldJob(1, "flaky", "failed", "completed", b"try 2\n"),
    OldJob(2, "far", "failed", "failed", b""),  # its queue is paused
    OldJob(3, "deferred", "failed", "completed", b"not deferred\n"),
    OldJob(3, "final", "dead", "dead", b""),
    OldJob(3, "heir", "dead", "dead", b""),
    OldJob(3, "heir's", "dead", "dead", b""),
    OldJob(3, "keyed-1", "completed", "completed", b"the first with this key\n"),
    OldJob(1, "stopped", "pending", "completed", b"second run\n"),
    OldJob(3, "echo one; sleep 2", "completed", "completed", b"one\n"),
    OldJob(3, "echo two; :", "pending", "completed", b"two\n"),
    OldJob(1, "scheduled", "pending", "pending", b""),
    OldJob(1, "ready", "pending", "completed", b'it\'s "hello"\na second line\n'),
    OldJob(1, "echo generated", "pending", "completed", b"generated\n"),
    OldJob(1, "cancelled", "cancelled", "cancelled", b""),
    OldJob(2, "gpu-1", "pending", "completed", b"one\n"),
    OldJob(2, "gpu-2", "pending", "completed", b"two\n"),
    OldJob(2, "parked", "pending", "pending", b""),  # its queue is paused
    OldJob(3, "first", "pending", "completed", b"first\n"),
    OldJob(3, "second", "pending", "completed", b"second\n"),
    OldJob(3, "keyed-2", "pending", "completed", b"the second with this key\n"),
    OldJob(3, "whole", "pending", "completed", b"a 'secret' for whole\n"),
    OldJob(1, "lost", "processing", "completed", b"after the crash\n"),
]

READING = [
    "status", "status --json", "status --format prometheus", "list", "list --json", "list --all --state dead",
    "show done", "show --json lost", "show --env ready", "logs dead", "logs --json binary", "logs --stdout binary",
    "why flaky", "why --json lost", "doctor", "doctor --json", "worker list", "worker list --json", "wait done",
    "queue list", "queue list --json", "config show", "config get max_retries", "dlq list", "dlq list --json",
    "completion --answer -- show x",
]  # fmt: skip
# What writes, and which jobs it changes or adds (None: workers run).
WRITING: dict[str, Any] = {
    "enqueue --id new true": {"new"}, "run --quiet true": None, "worker start --drain": None,
    "cancel ready scheduled": {"ready", "scheduled"}, "retry done": {"done"}, "edit ready --priority 7": {"ready"},
    "delete done": {"done"}, "purge --state failed": {"flaky", "far", "deferred"}, "queue set mail --concurrency 2": (),
    "queue pause mail": (), "queue pause": (), "queue resume": (), "config set priority 5": (),
    "config unset max_retries": (), "dlq retry dead": {"dead"}, "dlq retry --all --queue mail": (),
    "dlq purge --older-than 36000d": (),
}  # fmt: skip
WRITING_ONCE = [
    (version, command) for place, command in enumerate(WRITING) for version in sorted(OLD_DATABASES)
    if FULL or (place % 2 == 0 and place // 2 % len(OLD_DATABASES) == version - 1)
]  # fmt: skip
# What stands beside a database that nobody works on; the copy of version N is called queue.db.schemaN.
BESIDE = {"queue.db", "queue.db-wal", "queue.db-shm", "queue.db.lock"}


def make_old(q: Queue, version: int) -> list[str]:
    """A database as the last program of an older schema left it, in the place of any other; what it holds."""
    for path in q.db.parent.glob("queue.db*"):
        if path.is_file():
            path.unlink()
    q.db.touch(0o600)
    change(q, OLD_DATABASES[version])
    lock = q.db.with_name("queue.db.lock")
    lock.touch(0o600)
    lock.write_text(str(q.db.stat().st_ino))  # it is where it was, and no copy
    return content(q.db)


def change(q: Queue, script: str, *values: Any) -> None:
    """Write to a database as a program of its own schema would; a script, or one statement with its values."""
    db = sqlite3.connect(str(q.db), timeout=20)
    if values:
        db.execute(script, values)
    else:
        db.executescript(script)
    db.commit()
    db.close()


def content(path: Path) -> list[str]:
    """What a database holds: its version, its schema and every row, as SQL."""
    assert path.is_file(), f"there is no {path.name} in {sorted(os.listdir(path.parent))}"
    db = sqlite3.connect(str(path), timeout=20)
    pragmas = [f"{name} {db.execute('PRAGMA ' + name).fetchone()[0]}" for name in ("application_id", "user_version")]
    try:
        return [*pragmas, *db.iterdump()]
    finally:
        db.close()


def select(q: Queue, statement: str) -> list[dict[str, Any]]:
    db = sqlite3.connect(str(q.db), timeout=20)
    db.row_factory = sqlite3.Row
    try:
        return [dict(row) for row in db.execute(statement)]
    finally:
        db.close()


def version_of(q: Queue) -> int:
    return int(select(q, "PRAGMA user_version")[0]["user_version"])


def copy_of(q: Queue, version: int) -> Path:
    return q.db.with_name(f"queue.db.schema{version}")


def old_runs(q: Queue, version: int) -> Iterator[dict[str, Any]]:
    """The runs of an older database, those of a job in their order."""
    job, run = ("job", "run") if version == 1 else ("runs.id / 16777216", "runs.id % 16777216")
    yield from select(
        q,
        f"""SELECT jobs.id AS name, {run} AS number, attempt, runs.state AS state, runs.exit_code
        AS exit_code, error, runs.worker AS worker, stdout, stderr FROM runs JOIN jobs ON seq = {job}
        ORDER BY seq, 2""",
    )


def name_of(job: Mapping[str, Any]) -> str:
    return str(job["command"] if re.fullmatch(r"[0-9a-f]{10}", job["id"]) else job["id"])


def old_jobs(version: int, what: str) -> dict[str, Any]:
    return {job.name: getattr(job, what) for job in OLD_JOBS if job.since <= version}


def old_counts(version: int) -> dict[str, int]:
    states = list(old_jobs(version, "state").values())
    return {state: states.count(state) for state in queuectl.STATES}


def assert_migrated(q: Queue, version: int, before: list[str]) -> None:
    """The database is of this program's schema, and the copy is the older one, for this user alone."""
    copy = copy_of(q, version)
    assert version_of(q) == queuectl.SCHEMA_VERSION
    assert content(copy) == before
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert [path.name for path in q.db.parent.glob("queue.db.schema*")] == [copy.name]


def assert_untouched(q: Queue, before: list[str]) -> None:
    assert content(q.db) == before
    assert not list(q.db.parent.glob("*schema*"))


# Reading


@older
def test_what_only_reads_leaves_an_older_database_as_it_is(q: Queue, version: int) -> None:
    make_old(q, version)
    before = q.db.read_bytes()
    wrong = []
    for command in READING:
        q(*command.split(), code=1 if command.startswith("doctor") else 0)
        names = set(os.listdir(q.db.parent)) - BESIDE
        if names or q.db.read_bytes() != before or version_of(q) != version:
            wrong.append((command, names))
            make_old(q, version)
    assert not wrong


@older
def test_what_is_read_of_an_older_database(q: Queue, version: int) -> None:
    """Compared with what this test itself finds in its tables."""
    before = make_old(q, version)
    rows = {row["id"]: row for row in select(q, "SELECT * FROM jobs")}
    settings = {row["name"]: json.loads(row["value"]) for row in select(q, "SELECT * FROM settings")}
    counts = {row["name"]: row for row in select(q, "SELECT * FROM queues")}
    recorded = list(old_runs(q, version))

    jobs = q.jobs()
    assert {name_of(job): job["state"] for job in jobs} == old_jobs(version, "state")
    assert [job["id"] for job in jobs] == list(rows)
    for job in jobs:
        row = rows[job["id"]]
        for field in ("command", "queue", "priority", "timeout_seconds", "attempts", "max_retries", "backoff_base",
                      "exit_code", "last_error"):  # fmt: skip
            assert job[field] == row[field], (job, field)
        for field in ("run_at", "created_at", "updated_at", "started_at", "finished_at", "locked_at"):
            assert job[field] == (row[field] and queuectl.show_time(row[field])), (job, field)
        assert (job["locked_by"], job["cwd"]) == (row["worker"], "/")
        assert job["next_retry_at"] == (queuectl.show_time(row["due"]) if row["state"] == "failed" else None)
        assert job["unique"] == row.get("unique_key")
        runs = [run for run in recorded if run["name"] == job["id"]]
        shown = [run for run in q.show(job["id"])["runs"] if run["state"] != "processing"]
        assert [tuple(run[name] for name in ("run", "attempt", "state", "exit_code", "error", "worker"))
                for run in shown] == [tuple(run.values())[1:7] for run in runs]  # fmt: skip
        for stream in ("stdout", "stderr"):
            assert q("logs", job["id"], f"--{stream}").raw() == b"".join(run[stream] or b"" for run in runs[-1:])
    assert q.show("ready")["env"] == {"GREETING": 'it\'s "hello"'}

    status = q.status()
    assert status["jobs"] == old_counts(version)
    assert (status["workers"], status["lost"], status["running"]) == (0, ["lost"], [])
    assert q.look("worker", "list") == []
    dead = [name for name, state in old_jobs(version, "state").items() if state == "dead"]
    assert sorted(job["id"] for job in q.look("dlq", "list")) == sorted(dead)
    queues = {queue["name"]: queue for queue in q.look("queue", "list")}
    assert set(queues) == set(counts)
    for name, queue in queues.items():
        row = counts[name]
        taken_out = int(name == "default")  # one that was cancelled, which then was a kind of dead
        then = {**row, "dead": row["dead"] - taken_out, "cancelled": taken_out}
        assert [queue[state] for state in queuectl.STATES] == [then[state] for state in queuectl.STATES]
        assert (queue["paused"], queue["concurrency"]) == (bool(row.get("paused", 0)), row.get("concurrency"))
    shown = q.look("config", "show")
    assert {name: shown[name] for name in settings} == settings
    assert q("config", "get", "max_output_bytes").out == "4096\n"

    assert "exit code 1" in q("why", "flaky").out and "has died" in q("why", "lost").out
    assert "2099" in q("why", "scheduled").out
    found = q("doctor", code=1).out
    assert "lost" in found and "damaged" not in found
    assert q("wait", "done").out == "" and "dead is dead" in q("wait", "dead", code=1).err
    assert q("wait", "--timeout", "200ms", code=124)
    assert q("logs", "--stdout", "--attempt", "2", "dead").out == "try 2\n"
    q.fails("show", "nosuch")
    assert content(q.db) == before


@pytest.mark.parametrize("version", [version for version in OLD_DATABASES if version >= 3])
def test_what_the_third_version_added_is_read(q: Queue, version: int) -> None:
    before = make_old(q, version)
    jobs = {job["id"]: job for job in q.jobs()}
    assert (jobs["second"]["after"], jobs["heir"]["after"], jobs["heir's"]["after"]) == (["first"], ["final"], ["heir"])
    assert (jobs["final"]["dead_on"], jobs["deferred"]["retry_after"]) == ([3, 5], 40.0)
    assert jobs["keyed-2"]["unique"] == "the key"
    assert "TOKEN=a 'secret'\n" in q("show", "--env", "whole").out
    assert "it runs after first" in q("why", "second").out
    assert "`queuectl retry final --with-dependents`" in q("why", "heir's").out
    status = q.status()
    assert (status["paused"], status["interrupted"]) == (["held"], ["run-1"])
    assert content(q.db) == before


@older
def test_the_same_is_read_before_and_after_a_migration(q: Queue, version: int) -> None:
    before = make_old(q, version)
    names = [job["id"] for job in q.jobs() if job["state"] != "processing"]
    commands = [("list",), ("dlq", "list"), ("queue", "list"), ("config", "show"), ("status",)]
    commands += [(command, name) for name in names for command in ("show", "logs")]

    def look() -> dict[Any, Any]:
        shown = {words: q.look(*words) for words in commands}
        for name in ("database_bytes", "log_bytes"):
            del shown["status",][name]
        return shown

    shown = look()
    assert content(q.db) == before
    q("config", "set", "priority", "10")  # which it is already
    assert_migrated(q, version, before)
    assert look() == shown


@older
def test_a_backup_of_an_older_database(q: Queue, version: int, tmp_path: Path) -> None:
    """Whichever schema it has, this program goes on with it."""
    before = make_old(q, version)
    copy = tmp_path / "copy.db"
    assert q("backup", str(copy)).out.startswith(f"Backed up: {len(old_jobs(version, 'state'))} jobs in ")
    assert_untouched(q, before)
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    env = {"QUEUECTL_DB": copy}
    q("worker", "start", "--drain", env=env)
    jobs = q("list", "--json", env=env).json()
    assert {name_of(job): job["state"] for job in jobs} == old_jobs(version, "end")
    q("doctor", env=env)
    assert_untouched(q, before)


@older
def test_the_log_of_an_older_database_is_read(q: Queue, version: int) -> None:
    """A killed worker leaves commits in queue.db-wal: they are read, migrated, and in the copy."""
    make_old(q, version)
    script = (
        "import os, sqlite3, sys; db = sqlite3.connect(sys.argv[1]);"
        "db.execute(\"UPDATE jobs SET priority = 77 WHERE id = 'ready'\"); db.commit(); os.kill(os.getpid(), 9)"
    )
    assert q.run([sys.executable, "-c", script, q.db]).code == -signal.SIGKILL
    assert q.db.with_name("queue.db-wal").stat().st_size
    assert q.show("ready")["priority"] == 77
    assert version_of(q) == version
    before = content(q.db)
    assert any("77" in line for line in before)
    assert q.run([sys.executable, "-c", script.replace("77", "78"), q.db]).code == -signal.SIGKILL
    q("queue", "resume")
    assert_migrated(q, version, [line.replace(",77,", ",78,") for line in before])
    assert q.show("ready")["priority"] == 78


# Writing


@pytest.mark.parametrize(("version", "command"), WRITING_ONCE)
def test_a_command_that_writes_migrates_and_keeps_a_copy(q: Queue, version: int, command: str) -> None:
    before = make_old(q, version)
    jobs = {job["id"]: job for job in q.jobs()}
    assert_untouched(q, before)
    q(*command.split())
    assert_migrated(q, version, before)
    changed = WRITING[command]
    if changed is not None:
        now = {job["id"]: job for job in q.jobs()}
        names = {*jobs, *now}
        assert {name for name in names if jobs.get(name) != now.get(name)} == names.intersection(changed)
        assert set(os.listdir(q.db.parent)) <= {*BESIDE, copy_of(q, version).name}


@older
def test_an_older_database_is_worked_on_after_its_migration(q: Queue, version: int) -> None:
    before = make_old(q, version)
    (last,) = select(q, "SELECT seq FROM sqlite_sequence WHERE name = 'jobs'")
    old = {run["name"]: 0 for run in old_runs(q, version)}
    for run in old_runs(q, version):
        old[run["name"]] += 1
    q("enqueue", "--id", "new", "--after", "ready,done", "echo new")
    assert_migrated(q, version, before)
    assert select(q, "SELECT max(seq) AS seq FROM jobs") == [{"seq": last["seq"] + 1}]  # not that of a deleted job
    if version >= 3:
        q.fails("enqueue", "--unique", "the key", "true")
        q.fails("delete", "final", "first")
    q.drain("--count", "2")
    jobs = q.jobs()
    assert {name_of(job): job["state"] for job in jobs} == {**old_jobs(version, "end"), "new": "completed"}
    for job in jobs:
        wanted = b"new\n" if job["id"] == "new" else old_jobs(version, "prints")[name_of(job)]
        assert q("logs", "--stdout", job["id"]).raw() == wanted
        runs = [(run["run"], run["state"]) for run in q.show(job["id"])["runs"]]
        assert [number for number, _ in runs] == list(range(1, len(runs) + 1))
        assert len(runs) >= old.get(job["id"], 0)
    assert [run["state"] for run in q.show("stopped")["runs"]] == ["stopped", "completed"]
    if version >= 2:
        assert [queue["name"] for queue in q.look("queue", "list") if queue["paused"]] == ["held"]
        assert {queue["name"]: queue["concurrency"] for queue in q.look("queue", "list")}["gpu"] == 1
    assert (registered(q, "workers"), registered(q, "pools")) == ({}, {})
    q("doctor")
    assert content(copy_of(q, version)) == before  # nobody but a migration touches it


ORPHAN = """
import fcntl, sys, time
files = [open(path, "ab") for path in sys.argv[1:]]
for file in files:
    fcntl.flock(file, fcntl.LOCK_SH)
print("up", flush=True)
time.sleep(600)
"""


@older
def test_what_a_killed_worker_of_an_older_program_held_is_given_back(q: Queue, version: int) -> None:
    """What is left of its run is ended first: the database is where it was, and no copy."""
    make_old(q, version)
    worker = f"{os.urandom(4).hex()}-1"  # that of all older databases is the same, and tests of them run beside this
    change(q, "UPDATE jobs SET worker = ? WHERE state = 'processing'", worker)
    before = content(q.db)
    (held,) = select(q, "SELECT seq, worker FROM jobs WHERE state = 'processing'")
    folder = q.db.with_name("queue.db.d")
    folder.mkdir(0o700)
    files = [folder / f"{held['worker']}.0.{name}" for name in ("out", "err")]
    for path in files:
        path.touch(0o600)
    files[0].write_text("before\n")
    orphan = q.launch([sys.executable, "-c", ORPHAN, *files], env={"QUEUECTL_RUN": f"{held['worker']}-{held['seq']}-1"})
    wait_for(lambda: orphan.out)
    assert q("logs", "--stdout", "lost").out == "before\n"
    assert "has died" in q("why", "lost").out and not orphan.ended
    assert content(q.db) == before
    pool = q.start("worker", "start", "--drain")
    assert pool.wait() == 0
    assert_migrated(q, version, before)
    assert orphan.wait() == -signal.SIGTERM
    runs = q.show("lost")["runs"]
    assert [(run["state"], run["stdout"]) for run in runs] == [("lost", "before\n"), ("completed", "after the crash\n")]
    assert q.show("lost")["attempts"] == 2
    assert not [name for name in os.listdir(folder) if name.startswith(held["worker"])]
    q("doctor")


@pytest.mark.parametrize("version", [version for version in OLD_DATABASES if version >= 3])
def test_an_older_chain_that_died_is_retried(q: Queue, version: int) -> None:
    before = make_old(q, version)
    q("dlq", "retry", "final", "--with-dependents")
    assert_migrated(q, version, before)
    assert [q.state(name) for name in ("final", "heir", "heir's")] == ["pending"] * 3
    q.drain(code=1)
    assert [q.state(name) for name in ("final", "heir", "heir's")] == ["dead"] * 3
    assert q.show("final")["last_error"].startswith("exit code 3, which is final")
    q("doctor")


@pytest.mark.parametrize("how", ["cp", "mv"])
@older
def test_the_copy_is_the_way_back(q: Queue, version: int, how: str) -> None:
    """It takes the place of the database, is read as before, and is migrated once more."""
    before = make_old(q, version)
    q("enqueue", "--id", "new", "true")
    assert_migrated(q, version, before)
    assert set(os.listdir(q.db.parent)) <= {*BESIDE, copy_of(q, version).name}
    q.run([how, copy_of(q, version), q.db])
    assert content(q.db) == before
    assert {name_of(job) for job in q.jobs()} == set(old_jobs(version, "state"))
    change(q, "UPDATE jobs SET priority = 66 WHERE id = 'ready'")  # the older program goes on with it
    before = content(q.db)
    q("enqueue", "--id", "new", "true")
    assert_migrated(q, version, before)
    assert q.show("ready")["priority"] == 66


@older
def test_without_a_copy_nothing_is_migrated(q: Queue, version: int) -> None:
    """Here a folder is in its way."""
    before = make_old(q, version)
    (copy_of(q, version) / "mine").mkdir(parents=True)
    q.fails("enqueue", "true")
    assert content(q.db) == before
    assert len(q.jobs()) == len(old_jobs(version, "state"))
    (copy_of(q, version) / "mine").rmdir()
    copy_of(q, version).rmdir()
    q("enqueue", "true")
    assert_migrated(q, version, before)


def test_a_copy_that_finds_no_space_is_not_kept(q: Queue) -> None:
    """A file size limit stands in for the disk: SQLite's own files are below it."""
    before = make_old(q, 3)
    assert q.db.stat().st_size > 48 * 1024
    result = q.bash("ulimit -f 48; queuectl enqueue true", code=None)
    assert result.code == 1, result
    check_error(result)
    assert_untouched(q, before)
    q("enqueue", "true")
    assert_migrated(q, 3, before)


def test_no_copy_is_written_through_a_link(q: Queue) -> None:
    """Others may have put one there, to a file that they can't write themselves."""
    before = make_old(q, 3)
    precious = q.work / "precious"
    precious.write_text("mine\n")
    copy_of(q, 3).symlink_to(precious)
    result = q("enqueue", "true", code=(0, 1))
    assert precious.read_text() == "mine\n"
    assert content(q.db) == before if result.code else version_of(q) == queuectl.SCHEMA_VERSION


# Workers of the older program. A helper does what they do: it holds life locks, has rows in the older schema,
# looks at `stop`, finishes what it runs (as long as there is a file `busy`) unless it is to end now, and goes.

OLD_POOL = """
import fcntl, os, sqlite3, sys, time
db, name, count, busy = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]

def change(statement, *values):
    mutex = os.open(db + ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(mutex, fcntl.LOCK_EX)
    with sqlite3.connect(db, timeout=20) as connection:
        connection.execute(statement, values)
    connection.close()
    os.close(mutex)

def life_of(name):
    return "%s.d/%s.life" % (db, name)

def come(name, statement, *values):
    life = os.open(life_of(name), os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(life, fcntl.LOCK_EX)
    change(statement, name, os.getpid(), int(time.time() * 1000), *values)
    return life

def go(name, table):
    change("DELETE FROM %s WHERE name = ?" % table, name)
    os.unlink(life_of(name))

def is_to_leave(supervisor):
    connection = sqlite3.connect(db, timeout=20)
    stop = connection.execute("SELECT stop FROM pools WHERE name = ?", (name,)).fetchone()
    connection.close()
    stop = 1 if stop is None or os.getppid() != supervisor else stop[0]
    return stop == 2 or (stop == 1 and not os.path.exists(busy))

os.makedirs(db + ".d", 0o700, exist_ok=True)
supervisor = os.getpid()
life = come(name, "INSERT INTO pools (name, pid, started_at, workers) VALUES (?, ?, ?, ?)", count)
for number in range(1, count + 1):
    if not os.fork():
        os.close(life)
        worker = "%s-%d" % (name, number)
        come(worker, "INSERT INTO workers (name, pid, started_at, pool) VALUES (?, ?, ?, ?)", name)
        while not is_to_leave(supervisor):
            time.sleep(0.02)
        go(worker, "workers")
        os._exit(0)
for number in range(count):
    os.wait()
go(name, "pools")
"""


def old_pool(q: Queue, name: str = "older", count: int = 1) -> Background:
    """Live workers of the older program, which are busy until `rest`."""
    q.touch("busy")
    pool = q.launch([sys.executable, "-c", OLD_POOL, q.db, name, str(count), q.work / "busy"])
    wait_for(lambda: sum(worker.startswith(name + "-") for worker in registered(q, "workers")) == count)
    return pool


def rest(q: Queue) -> None:
    (q.work / "busy").unlink()


def old_claim(q: Queue, job: str, worker: str = "older-1") -> None:
    """What a worker of any older schema does when it claims a job."""
    now = int(time.time() * 1000)
    change(q, "UPDATE jobs SET state = 'processing', ready = 0, due = NULL, attempts = attempts + 1, runs = runs + 1,"
              " worker = ?, slot = 0, locked_at = ?, started_at = ?, updated_at = ? WHERE id = ?",
           worker, now, now, now, job)  # fmt: skip


def old_record(q: Queue, version: int, job: str, state: str, stdout: bytes = b"") -> None:
    """What it does when the job's run has ended."""
    now, well = int(time.time() * 1000), state == "completed"
    code, error, ending = (0, None, "completed") if well else (1, "exit code 1", "failed")
    key, value = ("job, run", "seq, runs") if version == 1 else ("id", "seq * 16777216 + runs")
    change(q, f"INSERT INTO runs ({key}, attempt, state, started_at, finished_at, seconds, exit_code, error, worker,"
              f" stdout) SELECT {value}, attempts, ?, started_at, ?, 0.5, ?, ?, worker, ? FROM jobs WHERE id = ?",
           ending, now, code, error, stdout, job)  # fmt: skip
    change(q, "UPDATE jobs SET state = ?, updated_at = ?, finished_at = ?, exit_code = ?, last_error = ?,"
              " worker = NULL, slot = NULL, locked_at = NULL WHERE id = ?",
           state, now, now, code, error, job)  # fmt: skip


def assert_refused(q: Queue, command: str, pids: Sequence[int]) -> None:
    """One line that names who is in the way, not who is dead, and what sends them home."""
    said = q.fails(*command.split()).err
    numbers = {int(number) for number in re.findall(r"\b\d+\b", said.replace(str(q.db), ""))}
    everybody = {**registered(q, "workers"), **registered(q, "pools")}
    dead = {pid for name, pid in everybody.items() if not queuectl.is_alive(str(q.db), name)}
    assert "worker stop" in said and set(pids) <= numbers and not dead & numbers, (said, pids, everybody)


@older
def test_a_database_is_not_migrated_under_live_workers_of_an_older_program(q: Queue, version: int) -> None:
    make_old(q, version)
    pool = old_pool(q, count=2)
    before = content(q.db)
    for place, command in enumerate([*WRITING, "worker start --detach"]):
        if FULL or place % len(OLD_DATABASES) == version - 1 or command.startswith(("enqueue", "worker")):
            assert_refused(q, command, [pool.process.pid])
    assert_untouched(q, before)

    live = registered(q, "workers")
    listed = q.look("worker", "list")
    assert {worker["name"]: worker["pid"] for worker in listed} == {name: live[name] for name in ("older-1", "older-2")}
    assert q.status()["workers"] == 2
    assert {name_of(job): job["state"] for job in q.jobs()} == old_jobs(version, "state")
    assert "no worker serves" not in q("why", "ready").out
    assert not re.search(r"older(-\d)? \(pid", q("doctor", code=1).out)  # they are well
    assert_untouched(q, before)

    stop = q.start("worker", "stop")
    wait_for(lambda: select(q, "SELECT stop FROM pools WHERE name = 'older'") == [{"stop": 1}], what="it to be told")
    assert not stop.ended and not pool.ended  # the running jobs finish first
    rest(q)
    assert stop.wait() == 0, stop
    assert stop.out == "All workers have stopped.\n"
    assert not [name for name in registered(q, "workers") if name.startswith("older")]
    assert pool.wait() == 0
    assert version_of(q) == version  # nothing but a write migrates
    before = content(q.db)
    q("enqueue", "--id", "new", "true")
    assert_migrated(q, version, before)
    q.drain()
    assert {name_of(job): job["state"] for job in q.jobs()} == {**old_jobs(version, "end"), "new": "completed"}
    q("doctor")


@older
def test_worker_stop_now_and_its_timeout_reach_workers_of_an_older_program(q: Queue, version: int) -> None:
    make_old(q, version)
    pools = [old_pool(q, "older"), old_pool(q, "oldest", count=2)]
    assert_refused(q, "enqueue true", [pool.process.pid for pool in pools])
    assert "still run after" in q("worker", "stop", "--timeout", "300ms", code=124).err
    assert_refused(q, "enqueue true", [pool.process.pid for pool in pools])
    q("worker", "stop", "--now")
    assert [pool.wait() for pool in pools] == [0, 0]
    assert version_of(q) == version
    before = content(q.db)
    assert q("worker", "stop").out == "No workers are running.\n"
    q("enqueue", "true")
    assert_migrated(q, version, before)


@older
def test_a_worker_of_an_older_program_counts_also_when_its_supervisor_is_dead(q: Queue, version: int) -> None:
    """It finishes its job, and records it in the older schema."""
    make_old(q, version)
    q.may_leave = True  # until `rest`
    pool = old_pool(q)
    kill(pool.process.pid, signal.SIGKILL)
    pool.wait()
    worker = registered(q, "workers")["older-1"]
    before = content(q.db)
    for command in ("enqueue true", "worker start --drain"):
        assert_refused(q, command, [worker])
    assert_untouched(q, before)
    stop = q.start("worker", "stop")
    wait_for(lambda: select(q, "SELECT stop FROM pools WHERE name = 'older'") == [{"stop": 1}])
    assert not stop.ended
    rest(q)
    assert stop.wait() == 0
    before = content(q.db)
    q("enqueue", "true")
    assert_migrated(q, version, before)


@older
def test_watching_an_older_database_follows_its_workers(q: Queue, version: int) -> None:
    make_old(q, version)
    old_pool(q)
    pending = old_counts(version)["pending"]
    watches = [q.start("status", "--watch")]
    wait_for(lambda: f"pending:    {pending}\n" in watches[0].out, what="the first frame")
    old_claim(q, "ready")
    wait_for(lambda: f"pending:    {pending - 1}\n" in watches[0].out and "processing: 2\n" in watches[0].out)
    old_record(q, version, "ready", "completed")
    wait_for(lambda: f"pending:    {pending - 1}\nprocessing: 1\n" in watches[0].out)
    for watch in watches:
        watch.signal(signal.SIGINT)
        assert watch.wait() == 130
        assert watch.err == ""
    assert version_of(q) == version
    assert set(os.listdir(q.db.parent)) <= {*BESIDE, "queue.db.d"}
    rest(q)
    q("worker", "stop")


@older
def test_waiting_for_jobs_of_an_older_database_ends_with_them(q: Queue, version: int) -> None:
    make_old(q, version)
    old_pool(q)
    waits = [q.start("wait", job) for job in ("ready", "stopped")]
    everything = q.start("wait", "ready", "stopped", "done")
    for job in ("ready", "stopped"):
        old_claim(q, job)
    assert q("wait", "ready", "--timeout", "500ms", code=124).err.count("\n") == 1  # a worker runs: nothing to say
    assert not any(wait.ended for wait in [*waits, everything])
    old_record(q, version, "ready", "completed")
    assert waits[0].wait() == 0
    assert not waits[1].ended and not everything.ended
    old_record(q, version, "stopped", "dead")
    assert (waits[1].wait(), everything.wait()) == (1, 1)
    assert "stopped is dead: exit code 1" in waits[1].err and "stopped is dead: exit code 1" in everything.err
    assert version_of(q) == version
    rest(q)
    q("worker", "stop")


@older
def test_logs_of_an_older_database_are_followed(q: Queue, version: int) -> None:
    make_old(q, version)
    old_pool(q)
    follow = q.start("logs", "--follow", "ready")
    wait_for(lambda: "Logs for job ready" in follow.out)
    printed = q.db.with_name("queue.db.d") / "older-1.0.out"
    printed.touch(0o600)
    old_claim(q, "ready")
    printed.write_text("one\n")
    wait_for(lambda: "one\n" in follow.out, what="the first line")
    assert q("logs", "ready", "--stdout").out == "one\n"
    with printed.open("a") as more:  # it was never empty meanwhile
        more.write("two\n")
    wait_for(lambda: "two\n" in follow.out, what="the second line")
    old_record(q, version, "ready", "completed", b"one\ntwo\nthree\n")
    assert follow.wait() == 0
    assert [follow.out.count(line) for line in ("one\n", "two\n", "three\n")] == [1, 1, 1]
    assert "Average runtime: 0.50s over 1 run." in follow.out
    assert version_of(q) == version
    rest(q)
    q("worker", "stop")


@older
def test_who_follows_an_older_database_goes_on_when_it_is_migrated(q: Queue, version: int) -> None:
    """Who began to read before does not miss what comes after."""
    make_old(q, version)
    old_pool(q)
    wait = q.start("wait", "ready")
    follow = q.start("logs", "--follow", "ready")
    watch = q.start("status", "--watch")
    wait_for(lambda: "Logs for job ready" in follow.out and "completed:" in watch.out)
    rest(q)
    q("worker", "stop")
    before = content(q.db)
    q.drain()
    assert_migrated(q, version, before)
    assert wait.wait() == 0, wait
    assert follow.wait() == 0, follow
    assert follow.out.count("a second line\n") == 1
    completed = q.counts()["completed"]
    wait_for(lambda: f"completed:  {completed}\n" in watch.out or watch.ended, what="the end in the status")
    assert not watch.ended
    watch.signal(signal.SIGINT)
    assert watch.wait() == 130 and watch.err == ""


# Kills, crowds, strangers


@pytest.mark.parametrize("nth", [1, 2, 3] if FULL else [1])
@older
def test_a_killed_migration_leaves_the_older_database_whole(q: Queue, version: int, nth: int) -> None:
    """Whoever writes next migrates; the copy is of that moment, not of the killed one's."""
    before = make_old(q, version)
    if nth > max(1, queuectl.SCHEMA_VERSION - version):
        pytest.skip("there are not so many steps")
    killed = start_to_be_killed(q, "migrating", nth, "enqueue", "--id", "never", "true")
    assert killed.wait() == -signal.SIGKILL, killed
    copy = copy_of(q, version)
    assert content(q.db) == before
    assert content(copy) == before  # it was made first
    assert set(os.listdir(q.db.parent)) <= {*BESIDE, copy.name}
    assert {name_of(job): job["state"] for job in q.jobs()} == old_jobs(version, "state")
    change(q, "UPDATE jobs SET priority = 66 WHERE id = 'ready'")  # the older program goes on with it
    before = content(q.db)
    q("enqueue", "--id", "new", "true")
    assert_migrated(q, version, before)
    assert {name_of(job) for job in q.jobs()} == {*old_jobs(version, "state"), "new"}
    q.drain()
    q("doctor")


def test_a_migration_killed_at_any_moment_is_whole_or_not_at_all(q: Queue) -> None:
    print(f"QUEUECTL_TEST_SEED={SEED}")
    chance = random.Random(SEED)
    migrated = []
    make_old(q, 1)
    began = time.monotonic()
    assert q.start("enqueue", "true").wait() == 0
    usual = time.monotonic() - began
    for turn in range(60 if FULL else 6):
        version = 1 + turn % len(OLD_DATABASES)
        before = make_old(q, version)
        adder = q.start("enqueue", "--id", "killed", "true")
        time.sleep(chance.uniform(0.3, 1.1) * usual)
        adder.signal(signal.SIGKILL)
        adder.wait()
        copy = copy_of(q, version)
        if version_of(q) == version != queuectl.SCHEMA_VERSION:
            assert content(q.db) == before
        else:
            assert content(copy) == before, adder
        migrated.append(version_of(q) != version)
        if copy.exists():
            assert content(copy) == before, adder
        q("enqueue", "--id", "later", "true")
        assert {name_of(job) for job in q.jobs()} - {"killed"} == {*old_jobs(version, "state"), "later"}
        assert version_of(q) == queuectl.SCHEMA_VERSION and content(copy) == before
    print(f"killed after the migration was committed: {sum(migrated)} of {len(migrated)}")


@older
def test_many_that_write_to_an_older_database_at_once_migrate_it_once(q: Queue, version: int) -> None:
    """A second one would copy what is migrated already. Who reads meanwhile sees one or the other."""
    before = make_old(q, version)
    crowd = []
    for number in range(20 if FULL else 6):
        crowd += [q.start("enqueue", "--quiet", "--id", f"new-{number}", "true"), q.start("list", "--json")]
    for each in crowd:
        assert each.wait(60) == 0, each
        assert each.err == "", each
    assert_migrated(q, version, before)
    assert set(os.listdir(q.db.parent)) <= {*BESIDE, copy_of(q, version).name}
    old, new = set(old_jobs(version, "state")), {each.out.strip() for each in crowd[::2]}
    for reader in crowd[1::2]:
        names = {name_of(job) for job in json.loads(reader.out)}
        assert old <= names <= old | new
    assert {name_of(job) for job in q.jobs()} == old | new and len(new) == len(crowd) // 2


@pytest.mark.parametrize("command", [*(READING[::4]), *([*WRITING][::4]), "backup {copy}"])
def test_a_newer_schema_is_refused_by_every_command(q: Queue, command: str) -> None:
    make_old(q, 3)
    change(q, f"PRAGMA user_version = {queuectl.SCHEMA_VERSION + 1}")
    before = contents(q.db.parent)
    result = q.here(command.format(copy=q.work / "copy.db").split())
    assert result.code == 1, result
    check_error(result)
    assert "newer" in result.err
    assert contents(q.db.parent) == before
    assert not (q.work / "copy.db").exists()


@pytest.mark.parametrize("command", ["status", "enqueue true"])
def test_another_programs_database_is_not_taken_for_an_older_one(q: Queue, command: str, version: int = 3) -> None:
    make_old(q, version)
    change(q, "PRAGMA application_id = 4711")
    before = content(q.db)
    if version != queuectl.SCHEMA_VERSION:
        assert "another program" in q.fails(*command.split()).err
    assert_untouched(q, before)


# =====================================================================================================
# failing disks and power cuts: nothing that queuectl has told may be lost by them
# =====================================================================================================

# The program runs with a preloaded library (.ci/faults.c), which makes some of its calls fail and keeps a journal of
# what it wrote. All that commands and workers say goes to one file whose writes are in that journal, too: so for each
# line it is known what the disk held at the moment when it was told (.ci/replay.py says what a power cut leaves).

FAULTS_C = PROGRAM.parent / ".ci" / "faults.c"
sys.path.insert(0, str(FAULTS_C.parent))
try:
    from replay import Disk, records
except ImportError:  # an archive, without the repository's tools
    Disk = records = None  # type: ignore[assignment,misc]
LOG = "/queue.db-wal$"
CUT_SEEDS = (None, 1, 2, 3)  # of power cuts: the most pessimistic one, and some that are as bad as chance will have it


def build(folder: Path) -> Path:
    """The library, compiled into `folder`."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not (LINUX and compiler and FAULTS_C.exists()):
        pytest.skip("preloads a library, as Linux can, and compiles it first")
    path = folder / "faults.so"
    subprocess.run([str(compiler), "-shared", "-fPIC", "-O1", "-o", path, FAULTS_C, "-ldl"], check=True)
    return path


class Faults:
    """The files of one test, in `folder`, those to be journaled having `part` in their path; beside it what the
    library needs."""

    def __init__(self, library: Path, place: Path, part: str) -> None:
        self.library, self.part = library, part
        self.folder, self.journal, self.counter, self.off = (
            place / name for name in ("files", "journal", "counter", "off"))  # fmt: skip
        self.folder.mkdir()
        self.journal.touch()

    def env(self, rules: str = "", **more: str) -> dict[str, str]:
        """The environment of a program whose calls fail by these rules, and are journaled."""
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "LANG": "C.UTF-8",
            "PYTHONDONTWRITEBYTECODE": "1",
            "LD_PRELOAD": str(self.library),
            "QUEUECTL_TEST_FAULTS": rules or "fsync:EIO:0:no such file",  # none, but late errors are heard of
            "QUEUECTL_TEST_COUNTER": str(self.counter),
            "QUEUECTL_TEST_FAULTS_OFF": str(self.off),
            "QUEUECTL_TEST_JOURNAL": str(self.journal),
            "QUEUECTL_TEST_JOURNAL_PATH": self.part,
            **more,
        }

    def count(self, rule: int = 0) -> int:
        """How many calls have matched a rule so far."""
        return int(struct.unpack_from("q", self.counter.read_bytes(), 8 * rule)[0]) if self.counter.exists() else 0


def opened(files: Mapping[Path, bytes], db: Path, scratch: Path) -> closing[sqlite3.Connection]:
    """The database as SQLite finds it after a power cut: an SQLite of a folder of its own, for it would mend it."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    for path, data in files.items():
        if path.name in (db.name, db.name + "-wal", db.name + "-journal"):
            (scratch / path.name).write_bytes(data)
    return closing(sqlite3.connect(str(scratch / db.name)))


def signal_all(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to a pool and its workers."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *map(int, children)):
        os.kill(pid, number)


class FaultyQueue(Faults):
    """A queue on a disk that fails."""

    def __init__(self, library: Path, place: Path) -> None:
        super().__init__(library, place, "/queue.db")
        self.db, self.told, self.errors = self.folder / "queue.db", self.folder / "queue.db.told", place / "errors"
        self.scratch = place / "scratch"
        self.workers: list[subprocess.Popen[bytes]] = []
        self.base: dict[Path, bytes] = {}  # what was there when the journal began
        self.known: dict[int, dict[str, str]] = {}
        self.told.touch()

    def start(self, *args: str, faults: str = "", journaled: bool = True) -> subprocess.Popen[bytes]:
        """Start a command that says all it says into the file of what was told."""
        print("$", *args, f"[{faults}]" if faults else "")
        env = self.env(faults, QUEUECTL_DB=str(self.db))
        if not journaled:
            del env["QUEUECTL_TEST_JOURNAL"]
        with self.told.open("ab") as out, self.errors.open("ab") as err:
            return subprocess.Popen([*Queue.program, *args], env=env, stdin=subprocess.DEVNULL,
                                    stdout=out, stderr=err, cwd=self.folder)  # fmt: skip

    def run(self, *args: str, faults: str = "", journaled: bool = True, code: int | None = 0) -> str:
        """Run a command to its end, which must be `code` (None: any); what it has told."""
        before = self.told.stat().st_size
        process = self.start(*args, faults=faults, journaled=journaled)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            signal_all(process, signal.SIGKILL)
            raise
        text = self.told.read_text()[before:]
        assert code is None or process.returncode == code, (process.returncode, text, self.errors.read_text())
        return text

    def enqueue(self, command: str = "true", code: int | None = 0) -> list[str]:
        """Enqueue a job; its id, if that was told."""
        return re.findall(r"^Enqueued: (\w+)$", self.run("enqueue", command, code=code), re.M)

    def start_worker(self, *options: str, faults: str = "") -> None:
        self.workers.append(self.start("worker", "start", *options, faults=faults))
        self.wait_for(lambda: self.anyone_works() or self.workers[-1].poll() is not None, "a worker")

    def anyone_works(self) -> bool:
        """Whether the bell of a worker is there."""
        folder = Path(str(self.db) + ".d")
        return folder.is_dir() and any(path.is_fifo() for path in folder.iterdir())

    def stop(self) -> None:
        """Let the workers finish."""
        for process in self.workers:
            process.terminate()
        for process in self.workers:
            process.wait(30)

    def close(self) -> None:
        self.off.touch()
        for process in self.workers:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    signal_all(process, signal.SIGKILL)
                    process.wait()
        print("--- told\n" + self.told.read_text())
        if self.errors.exists():
            print("--- stderr\n" + self.errors.read_text())

    def wait_for(self, condition: Callable[[], Any], what: str, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"waited {seconds} s for {what}; told was:\n{self.told.read_text()}"
            time.sleep(0.03)

    def wait_completed(self, *jobs: str, seconds: float = 20) -> None:
        self.wait_for(lambda: all(f"{job} completed" in self.told.read_text() for job in jobs),
                      "the end of " + ", ".join(jobs), seconds)  # fmt: skip

    def start_worker_that_fails(self, faults: str, *options: str) -> None:
        """Start a worker; its faults begin when it has done its first job."""
        first = self.enqueue()
        self.off.touch()
        self.start_worker(*options, faults=faults)
        self.wait_completed(*first)
        self.off.unlink()

    def enqueue_until_syncs_failed(self, times: int) -> list[str]:
        """Enqueue small jobs, at least three; the ids that were told. A command may fail with the worker."""
        jobs: list[str] = []
        for number in range(30):
            if number >= 3 and self.failures() >= times:
                return jobs
            jobs += self.enqueue(code=None)
            time.sleep(0.05)
        pytest.fail(f"only {self.failures()} syncs have failed")

    # What a power cut would leave.

    def states(self, files: Mapping[Path, bytes]) -> dict[str, str]:
        """The state of every job in a database, which must be sound."""
        key = hash(frozenset((path, data) for path, data in files.items() if path.suffix != ".told"))
        if key not in self.known:
            self.known[key] = self.read_states(files)
        return self.known[key]

    def read_states(self, files: Mapping[Path, bytes]) -> dict[str, str]:
        with opened(files, self.db, self.scratch) as db:
            if not db.execute("SELECT * FROM sqlite_master WHERE name = 'jobs'").fetchall():
                return {}
            for (damage,) in db.execute("PRAGMA integrity_check"):
                if damage != "ok":
                    raise sqlite3.DatabaseError(damage)
            states: dict[str, str] = dict(db.execute("SELECT id, state FROM jobs").fetchall())
        return states

    def losses(self, seed: int | None = None) -> dict[str, str]:
        """What was told and would be lost if the power failed right then, or before or after a later sync or unlink."""
        disk = Disk(self.base, seed)
        promises: dict[str, str] = {}
        lost: dict[str, str] = {}
        for number, record in enumerate(records(self.journal)):
            cuts = [disk.after_cut()] if record.kind == "S" and promises else []
            disk.apply(record)
            if record.path == self.told and record.kind == "W":
                text = record.data.decode()
                promises.update(dict.fromkeys(re.findall(r"^Enqueued: (\w+)$", text, re.M), "there"))
                promises.update(dict.fromkeys(re.findall(r"worker \d+: (\w+) completed after", text), "completed"))
                cuts.append(disk.after_cut())
            elif record.kind in "SU" and promises:
                cuts.append(disk.after_cut())
            for files in cuts:
                when = f"if the power fails at record {number} (seed {seed})"
                try:
                    states = self.states(files)
                except sqlite3.DatabaseError as error:
                    lost.setdefault("", f"the database is damaged {when}: {error}")
                    continue
                for job, promise in promises.items():
                    state = states.get(job, "gone")
                    if state == "gone" or promise == "completed" != state:
                        lost.setdefault(job + promise, f"{job}, told to be {promise}, is {state} {when}")
        return lost

    def check_promises(self) -> None:
        """Fail if anything that was told would not survive a power cut."""
        lost: dict[str, str] = {}
        for seed in CUT_SEEDS:
            lost = {**self.losses(seed), **lost}
        if lost:
            pytest.fail("\n".join(["%d promises are not kept:" % len(lost), *lost.values()]), pytrace=False)

    def failures(self) -> int:
        """How many syncs of the log have failed."""
        return sum(record.kind == "S" and record.error != 0 and record.path.name == "queue.db-wal"
                   for record in records(self.journal))  # fmt: skip

    def drain(self) -> None:
        """The disk is back: whatever is left is done, and everything is on disk then."""
        self.off.touch()
        self.run("worker", "start", "--drain")
        files = Disk(self.base)
        for record in records(self.journal):
            files.apply(record)
        for path, file in files.files.items():  # the journal knows every byte that was written
            if path.name in ("queue.db", "queue.db-wal"):
                assert bytes(file.cache) == (path.read_bytes() if path.exists() else b""), path
        states = self.states(files.after_cut())
        assert set(states.values()) == {"completed"}
        assert set(states) >= set(re.findall(r"^Enqueued: (\w+)$", self.told.read_text(), re.M))


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("library"))


@pytest.fixture
def faulty(library: Path, tmp_path: Path) -> Iterator[FaultyQueue]:
    queue = FaultyQueue(library, tmp_path)
    yield queue
    queue.close()


def test_without_faults_nothing_is_lost(faulty: FaultyQueue) -> None:
    jobs = faulty.enqueue() + faulty.enqueue()
    faulty.start_worker("--count", "2")
    jobs += faulty.enqueue() + faulty.enqueue() + faulty.enqueue()
    faulty.wait_completed(*jobs)
    faulty.stop()
    faulty.drain()
    assert not faulty.failures()
    faulty.check_promises()


@pytest.mark.parametrize("nth", range(1, 5) if FULL else [1, 3])
def test_one_failed_sync_of_a_worker_loses_nothing(faulty: FaultyQueue, nth: int) -> None:
    """The defect of old: the worker tells that jobs are completed, commands add others, and all of them are lost."""
    faulty.start_worker_that_fails(f"fdatasync:EIO:{nth}:{LOG}")
    jobs = faulty.enqueue_until_syncs_failed(1)
    faulty.wait_completed(*jobs)
    later = faulty.enqueue("echo later")  # told by another process, on top of what is lost
    faulty.wait_completed(*later)
    assert faulty.failures() == 1
    faulty.stop()
    faulty.drain()
    faulty.check_promises()


@pytest.mark.parametrize("nth", range(1, 4) if FULL else [1])
def test_two_failed_syncs_in_a_row_then_the_disk_is_back(faulty: FaultyQueue, nth: int) -> None:
    faulty.start_worker_that_fails(f"fdatasync:EIO:{nth}-{nth + 1}:{LOG}")
    jobs = faulty.enqueue_until_syncs_failed(2)
    faulty.wait_completed(*jobs)
    assert faulty.failures() == 2
    faulty.stop()
    faulty.drain()
    faulty.check_promises()


def test_while_no_sync_succeeds_nothing_is_told(faulty: FaultyQueue) -> None:
    """Until the disk is back; then all jobs complete, and all of them are durable."""
    faulty.start_worker_that_fails(f"fdatasync:EIO:1+:{LOG}", "--count", "2")
    jobs = faulty.enqueue_until_syncs_failed(2)
    before = len(faulty.told.read_text())
    time.sleep(1.5)
    told = faulty.told.read_text()[before:]
    faulty.off.touch()
    faulty.wait_completed(*jobs)
    faulty.stop()
    faulty.drain()
    faulty.check_promises()
    assert "completed" not in told


def test_a_log_with_a_hole_is_not_copied_into_the_database(faulty: FaultyQueue) -> None:
    """SQLite does that in a commit, once the log has 1000 frames: a power cut meanwhile would leave a half of it.

    The worker that knows of the failure is killed, and what it left is found by a command.
    """
    (faulty.folder / "small").write_text(600 * "true\n")
    (faulty.folder / "big").write_text(40 * ("true " + 100_000 * "x" + "\n"))
    faulty.run("enqueue", "--file", "small", journaled=False)
    faulty.run("worker", "start", "--drain", "--count", "2", journaled=False)
    faulty.base = {faulty.db: faulty.db.read_bytes()}
    faulty.start_worker_that_fails(f"fdatasync:EIO:1+:{LOG}")
    faulty.enqueue_until_syncs_failed(1)
    signal_all(faulty.workers[-1], signal.SIGKILL)
    faulty.off.touch()
    faulty.run("enqueue", "--file", "big")
    faulty.drain()
    faulty.check_promises()


@pytest.mark.parametrize("nth", range(1, 11) if FULL else [2, 4, 6])
def test_one_failed_sync_of_the_log_at_any_time_of_a_drain_loses_nothing(faulty: FaultyQueue, nth: int) -> None:
    """Also of those that SQLite makes: of a new log's header, at checkpoints, of the last connection closed."""
    fail_in_a_drain(faulty, "fdatasync:EIO", nth, LOG)


@pytest.mark.parametrize("nth", range(1, 4) if FULL else [1])
def test_one_failed_sync_of_the_database_at_any_time_of_a_drain_loses_nothing(faulty: FaultyQueue, nth: int) -> None:
    """SQLite must keep the log then; it does so itself."""
    fail_in_a_drain(faulty, "fdatasync:EIO", nth, "/queue.db$")


@pytest.mark.parametrize("nth", range(1, 7) if FULL else [2])
def test_no_descriptor_for_the_log_at_any_time_of_a_drain(faulty: FaultyQueue, nth: int) -> None:
    """EMFILE where the log is opened, by SQLite or to be synced."""
    fail_in_a_drain(faulty, "open:EMFILE", nth, LOG)


def fail_in_a_drain(faulty: FaultyQueue, call: str, nth: int, path: str) -> None:
    """Make the `nth` call fail that workers make for three jobs, whatever it was for; then the disk is back."""
    for _ in range(3):
        faulty.enqueue()
    faulty.run("worker", "start", "--drain", faults=f"{call}:{nth}:{path}", code=None)
    if faulty.count() < nth:
        pytest.skip(f"there are only {faulty.count()} such calls")
    faulty.enqueue()
    faulty.drain()
    faulty.check_promises()


@pytest.mark.parametrize("nth", range(1, 7) if FULL else [2, 4])
def test_no_descriptor_for_the_log_from_some_time_on(faulty: FaultyQueue, nth: int) -> None:
    """The same while it lasts: the worker may wait or give up, but must not tell."""
    first = faulty.enqueue()
    faulty.workers.append(faulty.start("worker", "start", faults=f"open:EMFILE:{nth}+:{LOG}"))
    jobs = faulty.enqueue() + faulty.enqueue() + faulty.enqueue()
    time.sleep(1)
    faulty.off.touch()
    if faulty.workers[-1].poll() is None:
        faulty.wait_completed(*first, *jobs)
    faulty.stop()
    faulty.drain()
    faulty.check_promises()


@pytest.mark.parametrize("number", range(4 if FULL else 1))
def test_syncs_that_fail_at_random_lose_nothing(faulty: FaultyQueue, number: int) -> None:
    """Of three workers and of those who enqueue; the late errors of other descriptors, too."""
    rules = "fdatasync:EIO:p0.25:/queue.db"
    faulty.enqueue()
    faulty.start_worker("--count", "3", faults=rules)
    for _ in range(12):
        faulty.run("enqueue", "true", faults=rules, code=None)
    time.sleep(1)
    faulty.off.touch()
    faulty.stop()
    faulty.drain()
    faulty.check_promises()


RESTORE_KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import queuectl
nth = int(sys.argv.pop(1))
calls = []
def killing(real):
    def call(*args, **options):
        calls.extend(args[:1] if ".db.d/" not in str(args[0]) else ())
        if len(calls) == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **options)
    return call
for name in ("rename", "replace", "link", "unlink"):
    setattr(os, name, killing(getattr(os, name)))
sys.exit(queuectl.main())
"""


@pytest.mark.parametrize("nth", range(1, 7))
@pytest.mark.parametrize("damaged", [False, True])
def test_a_restore_that_is_killed_loses_nothing(q: Queue, nth: int, damaged: bool) -> None:
    """The old database or the new one is there at every moment, and never an empty one."""
    q.add("true", "--id", "old")
    q("backup", "b.db")
    q.add("true", "--id", "late")
    pool = q.pool("--queue", "none")
    q.add("true", "--id", "in-log")
    kill_pool(pool)
    if damaged:
        with open(q.db, "r+b") as file:
            file.seek(4096)
            file.write(b"\xff" * 4096)
    q.run([*q.program[:-1], "-c", RESTORE_KILLED, PROGRAM.parent, str(nth), "restore", "b.db"])
    found = q("list", "--json", code=None)
    if found.code == 0:
        names = {job["id"] for job in found.json()}
        assert names in ({"old", "late", "in-log"}, {"old"})
    else:
        assert "2 names" in found.err or damaged, found
        q.fails("enqueue", "true") if "2 names" in found.err else None


def test_a_damaged_backup_is_not_restored(q: Queue) -> None:
    q.load(["true"] * 50)
    q("backup", "b.db")
    with open(q.work / "b.db", "r+b") as file:
        file.seek(3 * 4096)
        file.write(b"\xff" * 4096)
    q.fails("restore", "b.db")
    assert q.counts() == {"pending": 50}


@pytest.mark.parametrize("how", ["shm", "cp"])
def test_a_pool_sees_that_its_files_were_swapped(q: Queue, how: str) -> None:
    """And nobody is told that a job is enqueued which is then lost."""
    q("enqueue", "--id", "old", "--delay", "1h", "true")
    q("backup", "b.db")
    pool = q.pool("--count", "2")
    q("enqueue", "--wait", "true")
    if how == "shm":
        (q.db.parent / "queue.db-shm").unlink()
    else:
        q.bash(f"cp b.db {q.db}")
    q("enqueue", "true", code=None)
    assert pool.wait(15) == 1 and "deleted" in pool.text + "deleted" * (how == "cp")
    if how == "cp":
        assert "overwritten" in pool.text or "replaced" in pool.text
        refused = q.fails("enqueue", "true")
        assert "queue.db-wal" in refused.err


@containers
def test_without_proc_no_worker_starts(q: Queue) -> None:
    q.add("true")
    words = shlex.join([str(word) for word in q.program])
    script = f"mount -t tmpfs none /proc && {words} worker start --drain"
    done = q.run(["unshare", "-m", "bash", "-c", script])
    assert done.code == 1 and "/proc" in done.err and q.counts() == {"pending": 1}


@pytest.mark.parametrize("nth", range(1, 6))
def test_an_unlock_that_fails_loses_no_claim(q: Queue, nth: int) -> None:
    code = (
        "import errno, os, sys; sys.path.insert(0, sys.argv.pop(1)); nth = int(sys.argv.pop(1)); import queuectl\n"
        "unlock, calls = queuectl.Posix.unlock, []\n"
        "def failing(self, fd):\n"
        "    calls.append(1)\n"
        "    if len(calls) == nth:\n"
        "        raise OSError(errno.ENOLCK, 'No locks available')\n"
        "    unlock(self, fd)\n"
        "queuectl.Posix.unlock = failing\n"
        "sys.exit(queuectl.main())\n"
    )
    q.load(["true"] * 6)
    pool = q.launch([*q.program[:-1], "-c", code, PROGRAM.parent, str(nth), "worker", "start", "--drain"])
    assert pool.wait() == 0
    assert q.counts() == {"completed": 6}
    assert all(len(job["runs"]) == 1 for job in map(q.show, q.states()))


def test_a_page_that_could_not_be_read_once_is_no_damage(faulty: FaultyQueue) -> None:
    jobs = [name for _ in range(8) for name in faulty.enqueue()]
    faulty.run("worker", "start", "--drain", faults="pread:EIO:30:queue.db$", code=None)
    faulty.drain()
    assert "damaged" not in faulty.errors.read_text() + faulty.told.read_text()
    assert len(jobs) == 8


def test_a_database_that_was_opened_for_reading_alone_is_opened_again(faulty: FaultyQueue) -> None:
    """SQLite does that where one descriptor is lacking, and says nothing."""
    jobs = faulty.enqueue() + faulty.enqueue()
    faulty.start_worker(faults="open:ENFILE:3:/queue.db$")
    faulty.wait_completed(*jobs)
    faulty.stop()


def test_a_ring_does_not_cut_short_the_time_for_a_shutdown_to_be_heard(q: Queue) -> None:
    command = f"touch {q.work}/started%d; exec sleep 300"
    q.load([{"id": f"job{n}", "command": command % n, "max_retries": 1} for n in range(4)])
    pool = q.pool("--count", "4")
    for n in range(4):
        q.wait_file(f"started{n}")
    for worker in children(pool.process.pid):
        for job in children(worker):
            kill(job, signal.SIGTERM)
    for bell in (q.db.parent / "queue.db.d").glob("*.bell"):
        queuectl.ring(str(bell))
    pool.signal(signal.SIGTERM)
    assert pool.wait() == 0
    assert q.counts() == {"pending": 4} and not any(job["attempts"] for job in q.jobs())


@pytest.mark.parametrize("name", ["queue.db-wal", "queue.db.lock", "queue.db"])
def test_a_backup_is_not_put_over_the_files_of_the_queue(q: Queue, name: str) -> None:
    q.add("true")
    assert "can't be a backup" in q.fails("backup", q.db.parent / name).err


STORM_FAULTS = ";".join(
    f"{call}:{error}:p0.01:/queue.db{'-' if call == 'write' else ''}"  # a bell, a FIFO, never fails to be written
    for call, error in (
        ("open", "EMFILE"), ("open", "EIO"), ("read", "EIO"), ("pread", "EIO"), ("write", "EIO"), ("pwrite", "ENOSPC"),
        ("fdatasync", "EIO"), ("ftruncate", "EIO"), ("lseek", "EIO"), ("flock", "ENOLCK"), ("stat", "ESTALE"),
        ("fstat", "ESTALE"),
    )
) + ";posix_spawn:EAGAIN:p0.01:"  # fmt: skip


class StormOfFaults(Storm):
    """The same on a machine where one call in a hundred fails; who can't start for that comes again."""

    def __init__(self, q: Queue, library: Path) -> None:
        self.env = {
            "LD_PRELOAD": str(library), "QUEUECTL_TEST_FAULTS": STORM_FAULTS,
            "QUEUECTL_TEST_COUNTER": str(q.folder / "counter"), "QUEUECTL_TEST_FAULTS_OFF": str(q.folder / "off"),
        }  # fmt: skip
        super().__init__(q, pools=2, workers=4)

    def start(self) -> Background:
        return self.q.start("worker", "start", "--count", str(self.count), env=self.env)

    def restart(self) -> None:
        for place, pool in enumerate(self.pools):
            if pool.ended:
                self.pools[place] = self.start()


@linux
@full
def test_a_storm_of_faults(q: Queue, library: Path) -> None:
    """Kills, and one call in a hundred that fails: nothing lost, nothing twice, nothing beside, no traceback."""
    jobs = storm_jobs(60, 2, 5)
    (q.work / "locks").mkdir()
    q.set("kill_grace_seconds", "0.3")
    ids = q.load(jobs)
    storm = StormOfFaults(q, library)
    storm.rage(8)
    (q.folder / "off").touch()
    storm.restart()

    def done() -> bool:
        storm.restart()
        return q.counts() == {"completed": len(jobs)}

    wait_for(done, 90, "all jobs to complete", every=0.3)
    wait_for(lambda: q.workers() == 8, what="all workers")
    assert [pool.stop() for pool in storm.pools] == [0, 0]
    records, runs = storm_records(q)
    assert storm_faults(q.lines("log"), ids, records, runs) == []
    assert not [pool for pool in q.background if "Traceback" in pool.text]
    assert q("doctor", code=None).out.startswith("Nothing is wrong")


@containers
def test_a_disk_without_inodes_is_waited_for(q: Queue) -> None:
    words = shlex.join([str(word) for word in q.program])
    place = q.folder / "small"
    place.mkdir()
    script = f"""
        mount -t tmpfs -o nr_inodes=14,size=8m,mode=0700 none {place} || exit 77
        export QUEUECTL_DB={place}/q/queue.db
        for n in 1 2 3; do {words} enqueue "echo $n" || exit 78; done
        {words} worker start --count 4 2>&1 & sleep 2.5
        {words} status
        mount -o remount,nr_inodes=500 {place} && {words} wait --timeout 20s && {words} worker stop
    """
    done = q.run(["unshare", "-m", "bash", "-c", script])
    if done.code == 77:
        pytest.skip("no tmpfs can be mounted")
    assert done.code == 0 and "Held up: " in done.out and "Traceback" not in done.out + done.err


def test_a_clock_before_1970_can_be_shown() -> None:
    job = dict(dict.fromkeys(queuectl.FIELDS), state="completed", id="a", attempts=1, max_retries=3, queue="q",
               priority=10, command="true", updated_at=-5000)  # fmt: skip
    assert queuectl.job_row(job, -1000)[5] == "4.00s ago"
    assert queuectl.show_time(-1000) == "1969-12-31T23:59:59.000Z"


# What a newcomer found


@containers
@pytest.mark.parametrize("now", [False, True])
def test_worker_stop_needs_no_disk_space(q: Queue, now: bool) -> None:
    words = shlex.join([str(word) for word in q.program])
    place = q.folder / "small"
    place.mkdir()
    script = f"""
        mount -t tmpfs -o size=600k,mode=0700 none {place} || exit 77
        export QUEUECTL_DB={place}/q/queue.db
        {words} enqueue {"'sleep 300'" if now else "true"} && {words} worker start --detach && sleep 0.7
        dd if=/dev/zero of={place}/fill bs=1k 2>/dev/null
        {words} worker stop {"--now" if now else ""} --timeout 20s
    """
    done = q.run(["unshare", "-m", "bash", "-c", script])
    if done.code == 77:
        pytest.skip("no tmpfs can be mounted")
    assert done.code == 0 and "All workers have stopped" in done.out


@as_root
def test_a_group_without_a_name_is_no_threat_above_the_queue_alone(q: Queue) -> None:
    q.add("true")
    os.chown(str(q.db.parent), -1, 54321)
    q.db.parent.chmod(0o770)
    assert "written by others" in q("worker", "start", "--drain", code=1).err
    q.db.parent.chmod(0o700)
    os.chown(str(q.db), -1, 54321)
    q.db.chmod(0o660)
    assert "written by others" in q("worker", "start", "--drain", code=1).err


@as_root
def test_another_users_lock_file_is_not_to_be_removed(q: Queue) -> None:
    path = q.folder / "file"
    path.touch()
    os.chown(str(path), 12345, -1)
    queuectl.system.user = 54321
    try:
        with pytest.raises(queuectl.QueueError) as caught:
            queuectl.open_private(str(path), os.O_RDWR)
    finally:
        queuectl.system.user = os.geteuid()
    assert "belongs to another user (uid 12345)" in str(caught.value) and "remove" not in str(caught.value)


def test_the_doctor_on_a_fresh_machine(q: Queue) -> None:
    assert "Nothing is wrong" in q("doctor", env={"QUEUECTL_DB": q.folder / "new" / "folder" / "queue.db"}).out


def test_advice_names_a_python_that_is_not_the_first_one(q: Queue) -> None:
    shutil.copy(str(PROGRAM), str(q.work / "queuectl.py"))
    done = q.run([sys.executable, "queuectl.py", "show", "nothing"], env={"PATH": "/usr/bin:/bin"})
    advised = done.err.split("`")[1]
    assert q.run(["sh", "-c", advised], env={"PATH": "/usr/bin:/bin"}).code == 0


# =====================================================================================================
# templates of --each: what is accepted is run by real shells, with names that would break out of any quoting
# =====================================================================================================

# A command under test calls `p`, which records its arguments byte by byte. What a name smuggles in makes the file
# PWNED. Many commands are run by one shell; `alone` runs one, with a program `p`, not a function.

SHELLS = [
    pytest.param(argv, locale, id=f"{argv[0]}-{locale}")
    for argv, locale in [(["sh"], "C"), (["bash", "--posix"], "C.UTF-8")]
    if shutil.which(argv[0])
]  # fmt: skip
PRINTER = 'p() { printf \'%s\\0\' "$#" "$@"; }\n'


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder to run in, with a program `p` beside it."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "p"
    program.write_text('#!/bin/sh\nprintf \'%s\\0\' "$#" "$@"\n')
    program.chmod(0o755)
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def run_shell(work: Path, shell: Sequence[str], locale: str, command: str) -> list[list[str]]:
    """What `p` was called with by the command, call for call."""
    env = {"PATH": f"{work.parent}/bin:{os.environ['PATH']}", "LC_ALL": locale, "HOME": str(work.parent)}
    script = work.parent / "script"
    script.write_bytes(os.fsencode(command))
    argv = [*shell, "-c", script.read_bytes()] if len(command) < 50_000 else [*shell, script]
    done = subprocess.run(argv, cwd=work, env=env, stdin=subprocess.DEVNULL, capture_output=True)
    fields = iter(os.fsdecode(done.stdout).split("\0"))
    return [[next(fields) for _ in range(int(count))] for count in fields if count.isdigit()]


def put_into(template: str, name: str) -> str:
    return queuectl.fill(template, [name], 1, queuectl.in_quotes)


def breaks(work: Path, shell: Sequence[str], locale: str, command: str) -> bool:
    """Whether a command runs what it must not."""
    run_shell(work, shell, locale, PRINTER + command)
    return (work / "PWNED").exists()


# =====================================================================================================
# the names
# =====================================================================================================

PAYLOADS = [">PWNED", "touch PWNED", ": >./PWNED"]
BREAKOUTS = [
    "$(CMD)", "`CMD`", ";CMD;", "\nCMD\n", "&CMD&", "|CMD|", "&& CMD &&", "|| CMD ||", "(CMD)", "{ CMD; }",
    "<(CMD)", ">(CMD)",
    "';CMD;'", '";CMD;"', "\\';CMD;\\'", "'\"'\"';CMD;'\"'\"'", "'$(CMD)'", '"$(CMD)"', "\"'\nCMD\n'\"", "'\nCMD\n'",
    '"\nCMD\n"', "a'b$(CMD)c'd", "'`CMD`", '"`CMD`', "\\$(CMD)", "\\`CMD`", "\\\nCMD\n", "#\nCMD\n",
    "E\nCMD\nE\n", "\nE\nCMD\n",
    "a[$(CMD)]", "a[$(CMD)]=1", "x=$(CMD)", "$((CMD))", "${x:-$(CMD)}", "}$(CMD)", ")$(CMD)", "));CMD;((",
    "]];CMD;[[",
    "esac);CMD;(", "*/;CMD;", "-$(CMD)", "~$(CMD)", "{},$(CMD)", "\r\nCMD\r\n", "\\\\';CMD;'", "'\\'';CMD;'\\''",
    "$'\\'';CMD'",
    "\x01$(CMD)", "\x7f$(CMD)", "é';CMD;'", "\udce2';CMD;'", "\udcf0\udc9f';CMD;'", "\udc81$(CMD)", "';CMD;#",
    '";CMD;#',
    "0';CMD;'", "';CMD;echo '", "<<E\nCMD\nE", "!$(CMD)", "%CMD%", "^CMD^", "\tCMD\t", "\\'CMD\\'", "\\\"CMD\\\"",
    "'CMD", '"CMD',
]  # fmt: skip
PLAIN = [
    "", "-", "--", "-n", "-e", "-rf", "~", "~root", "~+", "#", "#x", "a#b", "!", "!!", "!x", "*", "?", "[a-z]",
    "[!a]",
    "{a,b}", "{1..3}", "{}", "{}{}", "a b", " a ", "a\tb", "\n", "\n\n", "a\n", "\na", "\r", "a\r", "\\", "\\\\",
    "a\\",
    "\\n", "'", "''", "'''", '"', '""', "'\"'\"'", "`", "$", "$$", "$1", "$#", "${", "$(", ")", "(", "((", "2",
    "1", "if",
    "do", "case", "esac", "[[", "function", "a=b", "=", "==", "a+=b", "a[0]=b", "<", ">", "<<", ">&2", "&", "&&",
    "|", ";",
    ";;", "then", "}", "{", "time", "./a", "../../etc/passwd", "/dev/null", "é", "日本", "😀", "\u00a0", "\u2028",
    "\u3000",
    "\ufeff", "\udcff", "\udcc3", "é\udcc3", "%s", "%n", "\\0", "\\c", "\x1b[31m", "x" * 300, "' '", "nul\\0",
    "a:b", ":~", "~:~root",
]  # fmt: skip
BYTES = [decode(bytes([byte])) for byte in [*range(1, 32), 127, *range(128, 138), 160, 194, 224, 240, 255]]
NAMES = [*PLAIN, *BYTES, *(out.replace("CMD", PAYLOADS[n % 3]) for n, out in enumerate(BREAKOUTS))]
assert len(set(NAMES)) >= 200

# Each {} of the arguments is the name; a template with several calls of `p` has several lists.
ACCEPTED = [
    ("p {}", [["{}"]]),
    ("p", [["{}"]]),
    ("p -x ", [["-x", "{}"]]),
    ("p {}{}", [["{}{}"]]),
    ("p {}{}{} {}", [["{}{}{}", "{}"]]),
    ("p a{}b -o={} --{}", [["a{}b", "-o={}", "--{}"]]),
    ("p 'a b'{}\"c d\"", [["a b{}c d"]]),
    ("p \\'{}\\'", [["'{}'"]]),
    ('p \\"{}\\"', [['"{}"']]),
    ("p \\\\{}", [["\\{}"]]),
    ("p '\\'{}", [["\\{}"]]),
    ('p "\\\\"{}', [["\\{}"]]),
    ('p "it\'s" {} "it\'s"', [["it's", "{}", "it's"]]),
    ("p 'say \"hi\"' {}", [['say "hi"', "{}"]]),
    ("p a#{} # it's \"", [["a#{}"]]),
    ("p {}#it {}#'s'", [["{}#it", "{}#s"]]),
    ("p {} #it's\np {}", [["{}"], ["{}"]]),
    ("p {};#it's\np {}", [["{}"], ["{}"]]),
    ("p {} \\\n  -x {}", [["{}", "-x", "{}"]]),
    ("p 'a\nb' {}", [["a\nb", "{}"]]),
    ("p \\a\\ \\;{}", [["a ;{}"]]),
    ("p ~{} ~root{} =~{}", [["~{}", "~root{}", "=~{}"]]),
    ("x={}; p \"$x\"", [["{}"]]),
    ("x=a{}b p {}", [["{}"]]),
    ("x=~{} y={}:~; p \"$x\"", [["~{}"]]),
    ("export x={}; p \"$x\" \"${x}\"", [["{}", "{}"]]),
    ("x=; p $x{} ${x}{} \"$x\"{}", [["{}", "{}", "{}"]]),
    ("p $#{} $1{}", [["0{}", "{}"]]),
    ("p \"$(<{})x\"", [["x"]]),
    ("p $(:){} {}$(printf '\"'); p $(: {})", [["{}", '{}"'], []]),
    ("p \"$(printf '%s.' {})\"", [["{}."]]),
    ("p \"$(printf '%s.' \"$(printf '%s,' {})\" {})\"{}", [["{},.{}.{}"]]),
    ("p \"a$(p)\"$(printf '\"')'b'{}", [["a0\"b{}"]]),
    ("p {} >/dev/null; p {} 2>&1", [["{}"]]),
    ("p {} </dev/null 2>/dev/null >&1", [["{}"]]),
    ("(p {}); { p {}; }", [["{}"], ["{}"]]),
    ("( (p {}) )", [["{}"]]),
    ("! p {} && p no || p {}", [["{}"], ["{}"]]),
    ("if p {}; then p 1; else p 2; fi", [["{}"], ["1"]]),
    ("for f in {} {}; do p \"$f\"; done", [["{}"], ["{}"]]),
    ("case {} in ({}) p {};; (*) p no;; esac", [["{}"]]),
    ("case x{} in\n(x{}) p yes;; esac", [["yes"]]),
    ("f () { p \"$1\" {}; }\nf {}", [["{}", "{}"]]),
    ("set -- {} b; p \"$@\" \"${1}\" \"$#\"", [["{}", "b", "{}", "2"]]),
    ("x={}.gz; p \"${x%.gz}\" \"${y:-a b}\"", [["{}", "a b"]]),
    ("p {} | cat", [["{}"]]),
    ("p {} & wait", [["{}"]]),
    ("p a$ $ {} \"$\" \"a$\"", [["a$", "$", "{}", "$", "a$"]]),
    ("p !{} %{} ^{} ,{} :{} @{} +{} {}= .{}", [["!{}", "%{}", "^{}", ",{}", ":{}", "@{}", "+{}", "{}=", ".{}"]]),
    ("p ./a[{} [{} ]{}", [["./a[{}", "[{}", "]{}"]]),
    ("p }{} {}} {{}}", [["}{}", "{}}", "{{}}"]]),
    ("p é{} \u00a0{} \u3000{} \r{}\r#", [["é{}", "\u00a0{}", "\u3000{}", "\r{}\r#"]]),
    ("p \v#{} \f#{}", [["\v#{}", "\f#{}"]]),
    ("true\n\n\tp\t{}\t\n", [["{}"]]),
    ("p '' {} \"\"", [["", "{}", ""]]),
    ("p \"\\a\\{\\'\" {}", [["\\a\\{\\'", "{}"]]),
    ("p \"a \\\nb\" {}", [["a b", "{}"]]),
    ("p \"\\$x \\` \\\"\" {}", [["$x ` \"", "{}"]]),
    ("while p {}; do break; done", [["{}"]]),
    ("p case {} function= {}alias [ {} ]", [["case", "{}", "function=", "{}alias", "[", "{}", "]"]]),
    ("p {}>/dev/null; p {}</dev/null;p {};p {}&&p {}", [["{}"]] * 4),
]  # fmt: skip


@pytest.mark.parametrize("template, calls", ACCEPTED)
@pytest.mark.parametrize("shell, locale", SHELLS)
def test_any_name_reaches_the_command_as_it_is(
    work: Path, shell: Sequence[str], locale: str, template: str, calls: list[list[str]]
) -> None:
    assert queuectl.check_template(template) == template
    names = NAMES[::3] if any(piece in template for piece in ("$(", "| ", "& ", "(p")) else NAMES  # forks take long
    script = "\n".join([PRINTER, *(put_into(template, name) for name in names)])
    wanted = [[arg.replace("{}", name) for arg in call] for name in names for call in calls]
    got = run_shell(work, shell, locale, script)
    assert [pair for pair in itertools.zip_longest(got, wanted) if pair[0] != pair[1]] == []
    assert os.listdir(work) == []


@pytest.mark.parametrize("template, name", [(":>{}", "{}"), (": > x{} 2>&1", "x{}"), (":>>{}x >|./{}x", "{}x")])
@pytest.mark.parametrize("shell, locale", SHELLS)
def test_any_name_is_that_of_a_file(work: Path, shell: Sequence[str], locale: str, template: str, name: str) -> None:
    names = [each for each in NAMES if each and "/" not in each and len(each) < 99]
    run_shell(work, shell, locale, "\n".join(put_into(queuectl.check_template(template), each) for each in names))
    assert {*os.listdir(work)} == {name.replace("{}", each) for each in names}


# =====================================================================================================
# what is refused, with a name that would have run something in one of the shells, if there is one
# =====================================================================================================

SUBST, LINE, INDEX = "$(>PWNED)", "\n>PWNED\n", "a[$(>PWNED)]"
REFUSED = [
    ("p '{}'", SUBST), ('p "{}"', SUBST), ('p "\\{}"', SUBST), ("\\{}", LINE), ("p \\{}", LINE),
    ("p 'a {} b' c", SUBST),
    ('p "a"b"{}"', SUBST), ("p 'a'\\''{}'", SUBST), ('p "a\\\\\\"{}"', SUBST), ('p "it\'s {}"', SUBST),
    ("p # it's\np \"it's {}\"", SUBST), ("p # it's {}", LINE), ("p #{}", LINE), ("# {}", LINE), ("p;#{}", LINE),
    ("p # note", LINE), ("if p; then #{}\nfi", ""), ("(p)#{}", LINE), ("p \\ #{}", ""), ("p $(p)#{}", ""),
    ("p `p {}`", '"`>PWNED`'), ('p "`p {}`"', ""), ("p `p` {}", ""),
    ("cat <<E\n{}\nE", SUBST), ("cat <<-'E'\n{}\nE\n", "\nE\n>PWNED\n"), ('cat <<"E"\n\'{}\nE', "\nE\n>PWNED\n"),
    ("cat <<\\E\n{}\nE", "\nE\n>PWNED\n"), ("cat <\\\n<E\n{}\nE", SUBST), ("x={}; cat <<E\n$x\nE", ""),
    ("cat <<<{}", ""),
    ("p $(({}+1))", SUBST), ('p "$(({}+1))"', SUBST), ("p $[{}+1]", SUBST), ('p "$[{}]"', SUBST),
    ("x={}; p $((x))", INDEX),
    ("p ${}", ""), ("p $${}", ""), ("p \\${}", ""), ("p '$'${}", ""), ("p ${{}}", ""), ("p ${x:-{}}", ""),
    ('p "${x:-{}}"', SUBST),
    ("p ${x:-'{}'}", SUBST), ('p ${x:-"{}"}', SUBST), ("p ${x#{}}", ""), ("p ${x:-`p`} {}", ""),
    ("p ${x:-$y} {}", ""),
    ("p ${x/a/{}}", ""), ("x={}; p ${y[x]}", INDEX), ("x={}; y=a; p ${y:x}", INDEX), ("x={}; p ${x@P}", SUBST),
    ("p ${ p {}; }", ""),
    ("p ${x", ""), ("p ${#} {}", ""), ("p \u3000#{}", ""), ("p $10{}", ""), ("p $\u00e9{}", ""), ("p $\\a{}", ""),
    ("p $\\\n(p {})", ""), ('p "$x\\\n{}"', SUBST),
    ("p a\\\n{}", ""), ('p "$$("{}")"', SUBST),
    ('p "$${"{}"}"', SUBST), ('p "$$\x01("{}")"', ""), ('p "$\x01("{}")"', ""), ("p $$'a'{}", ""),
    ("p $(p a#b) {}", ""),
    ("p \\ #'\np {} #'", SUBST), ("p $(p)#'\np {} #'", SUBST), ("p \\ (p {})", ""), ("(p)(p {})", ""),
    ("\u00e9[{}]=1", ""),
    ("p ${x/a/b} {}", ""), ("p ${x:-'a'} {}", ""), ('p ${x:-"a"} {}', ""), ("p ${x:-{a} {}", ""),
    ('p "$$(p {})"', SUBST),
    ("p $'{}'", SUBST), ("p $'\\''{}''", LINE), ('p $"{}"', SUBST), ("p $'a' {}", ""),
    ("p <(p {})", ""), ("p >(p {})", ""), ("((x={}))", SUBST), ("x={}; ((x))", INDEX),
    ("for ((i={};;)); do break; done", SUBST),
    ("[[ {} -eq 0 ]]", INDEX), ("x={}; [[ x -eq 1 ]]", INDEX), ("[[ {} = a ]] && p", ""),
    ("a[{}]=1", SUBST), ("a=1 b[{}]+=2", SUBST), ("a[ {} ]=1", SUBST), ("{a[{}]}>/dev/null p", SUBST),
    ("x={}; a[x]=1", INDEX),
    ("p >&{}", SUBST), ("p >& {}", SUBST), ("p >&2{}", SUBST), ("p >&a{}", SUBST), ("x={}; p >&$x", SUBST),
    ("p 2>&\"a\"{}", ""),
    ("p &>{}", ""), ("alias q=\"p '\"\nq {} '", SUBST), ("function q { p {}; }; q", ""),
    ("p $(case {} in x) p;; esac)", ""), ("p $(case x in (x) p {};; esac)", ""), ("p \"$(p {} # it's\n)\"", ""),
    ("case {} in x) p;; esac", ""), ("f() { p {}; }; f", ""), ("a=(b {}); p", ""), ("p @(a|{})", ""), ("p !({})", ""),
    ("p 'a", LINE), ('p "a', "\\';>PWNED;\\'"), ("p {} 'a", ""), ("p (", ""), ("p )", ""), ("(p {}", ""),
    ("p {})", ""), ("p $(p {}", ""),
    ('p "$(p {})', ""), ("p \\", ""), ("p {} \\", ""), ("p \\\n", ""), ("p \0{}", ""), ("p '\0' {}", ""),
    ('p "\0" {}', ""),
    ("", ""), (" \t", ""), ("\n", ""), ("p;", ""), ("p &&", ""), ("p |", ""), ("p & ", ""), ("p\n", ""), ("p; (", ""),
]  # fmt: skip


@pytest.mark.parametrize("template, name", REFUSED)
def test_what_a_name_could_break_is_refused(work: Path, template: str, name: str) -> None:
    with pytest.raises(queuectl.UsageError) as caught:
        queuectl.check_template(template)
    assert 10 < len(str(caught.value)) < 120
    if name:
        assert any(breaks(work, *shell.values, put_into(template, name)) for shell in SHELLS)


# =====================================================================================================
# the codes
# =====================================================================================================


@pytest.mark.parametrize(
    "text, codes",
    [
        ("", ""),
        ("a  b\tc", "w  w w"),
        ("'a b'c\"d e\"", "q111qwq222q"),
        ("''\"\"", "qqqq"),
        ("\\a\\\\\\'\\ ", "qeqeqeqe"),
        ('"\\a\\$\\"\\\\\\`"', "q22qeqeqeqeq"),
        ("'\\'", "q1q"),
        ("a \\\nb \\\n \\\nc", "w qqw qq qqw"),
        ('"a \\\n\n"', "q22qq2q"),
        ("'\n'\n", "q1qo"),
        ("$a$1b$?c$#d ${x}${#x}${x:-a b}", "$$$$w$$w$$w $$$$" + "$" * 5 + "$" * 9),
        ('"$a b$"$', "q$$22" + "2qw"),
        ("$x\u00e9$$a", "$$w$$w"),
        ("$(cases casex)", "oo" + "w" * 5 + " wwwwwo"),
        ("a|b&&c;d>e<f>>g>|h<>i", "wowoowowowowoowoowoow"),
        ("2>&1 >&- <&3", "woow oow oow"),
        ("(a) $(b \"$(c 'd')\")e", "owo oow qoow q1qoqow"),
        ("a#b #c'\n#d", "www ###o##"),
        ("a;#b\n#", "wo##o#"),
        ("\u00a0a\u3000\r\v\f\x85\udc80", "w" * 8),
        ("{a,b}~*?[x]=!%^@:-", "w" * 18),
        ("case x in (a) b;; esac", "wwww w ww owo woo wwww"),
        ("a=$(b)c", "wwoowow"),
    ],
)
def test_the_code_of_each_character(text: str, codes: str) -> None:
    assert queuectl.shell_contexts(text) == codes


@pytest.mark.parametrize("template", ["eval echo {}", "trap {} EXIT", "x=1; eval {}"])
def test_templates_that_evaluate_their_input_are_refused(template: str) -> None:
    with pytest.raises(queuectl.UsageError, match="no eval"):
        queuectl.check_template(template)


def test_any_depth() -> None:
    deep = 'p "$(' * 1200 + "p {}" + ')"' * 1200
    assert queuectl.check_template(deep) == deep
    with pytest.raises(queuectl.UsageError, match="not closed"):
        queuectl.check_template(deep[:-1])
    long = "p {} " + "a" * 9_000 + "{" * 9_000 + " $x" * 1000
    assert queuectl.check_template(long) == long


def split_words(text: str, codes: str) -> list[str]:
    """The words of a command that needs no shell: its codes are ' ', w, q, 1, 2 and e only."""
    words: list[str] = []
    begun = False
    for c, code, after in zip(text, codes, text[1:] + " "):
        joined = code == "q" and (c == "\n" or (c == "\\" and after == "\n"))  # a line continuation is nothing
        if code == " ":
            begun = False
        elif not joined:
            words += [] if begun else [""]
            begun = True
            words[-1] += "" if code == "q" else c
    return words


def simple_texts() -> Iterator[str]:
    """Commands that need no shell, as far as quotes go: all short ones of what quotes, and some longer."""
    for length in range(1, 5):
        yield from map("".join, itertools.product("'\"\\a #", repeat=length))
    dice = random.Random(1)
    pieces = ["'", '"', "\\", " ", "a", "#", "\n", " \\\n", "it's", '"$"', "\\$", "\u00e9", "\u00a0", "\t", "\r", "`"]
    for _ in range(4000):
        yield "".join(dice.choices(pieces, k=dice.randint(6, 14)))


def needs_no_shell(text: str) -> bool:
    try:
        return set(queuectl.shell_contexts(text)) <= set(" wq12e")
    except queuectl.UsageError:
        return False


@pytest.mark.parametrize("shell, locale", SHELLS)
def test_the_codes_tell_the_words_as_shells_do(work: Path, shell: Sequence[str], locale: str) -> None:
    texts = [text for text in simple_texts() if needs_no_shell("p " + text)]
    words = [split_words(text, queuectl.shell_contexts("p " + text)[2:]) for text in texts]
    assert len(texts) > 700
    assert run_shell(work, shell, locale, PRINTER + "\n".join("p " + text for text in texts)) == words
    for text, split in zip(texts, words):
        if not any(piece in text for piece in ("\\\n", "\r", "\\$", "\\`")):  # which shlex reads in its own way
            assert shlex.split(text) == split


@pytest.mark.parametrize("template, calls", ACCEPTED)
def test_a_command_of_its_own_run_by_sh(work: Path, template: str, calls: list[list[str]]) -> None:
    """As a job is: the command alone, behind -c, and `p` a program."""
    name = "it's \\\"$(>PWNED)`>PWNED`;>PWNED\n'\";>PWNED #{}\\"
    wanted = [[arg.replace("{}", name) for arg in call] for call in calls]
    assert run_shell(work, ["sh"], "C.UTF-8", put_into(template, name)) == wanted
    assert os.listdir(work) == []


# =====================================================================================================
# an operator's day: queues, waiting, dependencies, keys, exit codes, run, watching, servers
# =====================================================================================================

# Queues with a limit, and paused ones.

PEAK = """import os, sys, time
folder = sys.argv[1]
mine = os.path.join(folder, "run-%d" % os.getpid())
open(mine, "w").close()
with open(os.path.join(folder, "peaks"), "a") as f:
    f.write("%d\\n" % sum(name.startswith("run-") for name in os.listdir(folder)))
time.sleep(0.15)
os.unlink(mine)
"""


def peak_job(q: Queue) -> str:
    (q.work / "peak.py").write_text(PEAK)
    (q.work / "runs").mkdir(exist_ok=True)
    return shlex.join([sys.executable, "peak.py", str(q.work / "runs")])


def peak(q: Queue) -> int:
    return max(map(int, (q.work / "runs" / "peaks").read_text().split()))


@pytest.mark.parametrize("limit", [1, 2])
def test_a_limit_holds_over_all_pools(q: Queue, limit: int) -> None:
    q("queue", "set", "gpu", "--concurrency", str(limit))
    q("enqueue", "--file", "-", "--queue", "gpu", stdin=(peak_job(q) + "\n") * 8)
    pools = [q.start("worker", "start", "--count", "3", "--drain") for _ in range(2)]
    for pool in pools:
        assert pool.wait(60) == 0
    assert q.counts()["completed"] == 8
    assert peak(q) == limit


def test_without_a_limit_and_beside_a_limited_queue_jobs_run_at_once(q: Queue) -> None:
    q("queue", "set", "gpu", "--concurrency", "1")
    q("enqueue", "--file", "-", stdin=(peak_job(q) + "\n") * 8)
    q("worker", "start", "--count", "4", "--drain")
    assert peak(q) >= 2


def work_beside_sleep(q: Queue, queue: str, command: str, *options: str) -> None:
    """A worker that runs the job `first`, and one that sleeps, for it serves that queue alone; nobody polls."""
    q.set("poll-interval-ms", "3600000")
    q.add(command, "--queue", queue, "--id", "first", *options)
    q.pool()
    q.wait_state("first", "processing")
    q.pool("--queue", queue)


def test_a_freed_place_is_taken_at_once_by_a_worker_that_sleeps(q: Queue) -> None:
    """With the safety net out of the way: who ends a job of a limited queue rings, for it may take another's."""
    q("queue", "set", "one", "--concurrency", "1")
    work_beside_sleep(q, "one", "sleep 1")
    q.add("sleep 30", "--id", "urgent", "--priority", "1")
    q.add("true", "--id", "second", "--queue", "one")
    q.wait_state("second", "completed")
    assert q.state("urgent") == "processing"
    q("worker", "stop", "--now")


def test_a_raised_limit_is_followed_at_once(q: Queue) -> None:
    q.set("poll-interval-ms", "3600000")
    q("queue", "set", "one", "--concurrency", "1")
    q("enqueue", "--queue", "one", "--file", "-", stdin="sleep 30\n" * 3)
    q.pool("--count", "3")
    wait_for(lambda: q.counts().get("processing") == 1)
    q("queue", "set", "one", "--concurrency", "2")
    wait_for(lambda: q.counts().get("processing") == 2)
    q("queue", "set", "one", "--concurrency", "none")
    wait_for(lambda: q.counts().get("processing") == 3)
    q("worker", "stop", "--now")


def test_an_orphan_counts_against_the_limit(store: Any) -> None:
    put(store, queue="x")
    put(store, queue="x")
    with store.transaction():
        store.set_concurrency("x", 1)
    job = take(store)  # held by a worker that does not live
    assert take(store) is None
    assert not store.drained([], NOW)
    end(store, job, "lost", NOW, NOW + 10**9)
    assert take(store) is not None


def test_a_paused_queue_starts_nothing_and_survives_restarts(q: Queue) -> None:
    q("queue", "pause", "slow")
    q("enqueue", "--queue", "slow", "--id", "a", "true")
    q("enqueue", "--id", "b", "true")
    q("worker", "start", "--drain")  # a paused queue does not count
    assert (q.state("a"), q.state("b")) == ("pending", "completed")
    assert "Paused: slow" in q("status").out
    pool = q.pool("--count", "1")
    q("queue", "resume", "slow")
    q.wait_state("a", "completed")
    pool.stop()
    assert "Paused" not in q("status").out


def test_a_pause_of_all_queues_includes_future_ones(q: Queue) -> None:
    q("queue", "pause")
    assert "Paused: all queues" in q("status").out and q.status()["all_paused"] is True
    q("enqueue", "--queue", "new", "--id", "a", "true")
    q("worker", "start", "--drain")
    assert q.state("a") == "pending"
    assert "all queues are paused" in q("queue", "resume", "new").err
    pool = q.pool("--count", "1")
    q("queue", "resume")
    q.wait_state("a", "completed")
    pool.stop()


def test_a_running_job_goes_on_while_its_queue_is_paused(q: Queue) -> None:
    q("enqueue", "--id", "a", "sleep 0.5")
    pool = q.pool("--count", "1")
    q.wait_state("a", "processing")
    q("queue", "pause")
    q.wait_state("a", "completed")
    pool.stop()


def test_the_queues_are_listed(q: Queue) -> None:
    q("enqueue", "--queue", "b", "true")
    q("queue", "set", "a", "--concurrency", "3")
    q("queue", "pause", "b")
    listed = q.look("queue", "list")
    assert [(queue["name"], queue["concurrency"], queue["paused"], queue["pending"]) for queue in listed] == [
        ("a", 3, False, 0),
        ("b", None, True, 1),
    ]
    text = q("queue", "list").out
    assert "QUEUE" in text and "paused" in text


@pytest.mark.parametrize("number", ["0", "-1", "many", "1.5", ""])
def test_an_unsound_limit_is_refused(q: Queue, number: str) -> None:
    q("queue", "set", "x", "--concurrency=" + number, code=2)


def test_a_recorded_retry_wakes_another_worker(q: Queue) -> None:
    """The one that recorded it has taken a long job in the same commit, and nobody polls."""
    work_beside_sleep(q, "x", "sleep 1; false", "--backoff-base", "0.5", "--max-retries", "2")
    q.add("sleep 30", "--queue", "y", "--id", "long")
    q.wait_state("first", "dead")
    assert q.state("long") == "processing"
    q("worker", "stop", "--now")


# wait, purge, backup


def test_wait_ends_when_the_jobs_have_ended(q: Queue) -> None:
    q("enqueue", "--id", "a", "sleep 0.4")
    q("enqueue", "--id", "other", "--delay", "1h", "true")
    pool = q.pool("--count", "1")
    q("wait", "a")
    pool.stop()
    assert q.state("a") == "completed"


def test_wait_without_ids_waits_for_what_is_unfinished_now(q: Queue) -> None:
    q("enqueue", "--file", "-", stdin="sleep 0.2\n" * 3)
    waiting = q.start("wait")
    pool = q.pool("--count", "1")
    assert waiting.wait(30) == 0
    pool.stop()
    assert q.counts()["completed"] == 3
    q("wait")  # nothing is unfinished


def test_wait_tells_of_a_job_that_died(q: Queue) -> None:
    q("enqueue", "--id", "bad", "--max-retries", "1", "echo oh no >&2; exit 3")
    pool = q.pool("--count", "1")
    said = q("wait", "bad", code=1)
    pool.stop()
    assert "bad is dead: exit code 3: oh no" in said.err
    q("wait", "bad", code=1)  # it died before
    q("enqueue", "--id", "good", "true")
    pool = q.pool("--count", "1")
    q("wait")  # and so does not count here
    pool.stop()


def test_wait_says_that_no_worker_runs_and_gives_up_in_time(q: Queue) -> None:
    q("enqueue", "true")
    said = q("wait", "--timeout", "300ms", code=124)
    assert "no worker is running" in said.err
    q("wait", "nosuch", code=1)


def test_wait_is_not_fooled_by_what_a_killed_worker_left(q: Queue) -> None:
    pool = q.pool()
    worker = q.look("worker", "list")[0]["pid"]
    kill(pool.process.pid, signal.SIGKILL)
    kill(worker, signal.SIGKILL)
    pool.wait()
    q("enqueue", "true")
    assert "no worker is running" in q("wait", "--timeout", "300ms", code=124).err


def test_enqueue_waits_for_its_jobs_alone(q: Queue) -> None:
    q("enqueue", "--id", "later", "--delay", "1h", "true")
    pool = q.pool("--count", "1")
    assert q("enqueue", "--wait", "--id", "a", "sleep 0.2").out == "Enqueued: a\n"
    assert q.state("a") == "completed"
    q("enqueue", "--wait", "--file", "-", stdin='true\n{"command": "false", "max_retries": 1}\n', code=1)
    pool.stop()


def test_purge_forgets_completed_jobs_unless_told_others(q: Queue) -> None:
    q("enqueue", "--id", "a", "true")
    q("enqueue", "--id", "b", "--max-retries", "1", "false")
    q("worker", "start", "--drain", code=1)
    q("enqueue", "--id", "c", "true")
    assert q("purge", "--older-than", "1h").out == "Deleted: 0 jobs\n"
    assert q("purge").out == "Deleted: 1 job\n"
    assert [job["id"] for job in q.jobs()] == ["b", "c"]
    assert q("purge", "--state", "dead", "--state", "pending").out == "Deleted: 2 jobs\n"
    q("purge", "--state", "processing", code=2)
    q("doctor")


def test_purge_gives_the_disk_space_back(q: Queue) -> None:
    q("enqueue", "--file", "-", stdin="head -c 200000 /dev/zero\n" * 20)
    q("worker", "start", "--drain")
    before = q.db.stat().st_size
    q("purge")
    assert q.db.stat().st_size < before / 4


def test_a_backup_is_whole_while_workers_run(q: Queue, tmp_path: Path) -> None:
    q("enqueue", "--file", "-", stdin="echo hello\n" * 300)
    copy = tmp_path / "copy.db"
    pool = q.pool("--count", "2")
    for _ in range(3):
        said = q("backup", str(copy))
    pool.stop()
    assert said.out.startswith("Backed up: 300 jobs in ")
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("copy")) == ["copy.db"]
    env = {"QUEUECTL_DB": copy}
    q("worker", "start", "--drain", "--count", "2", env=env)
    assert json.loads(q("status", "--json", env=env).out)["jobs"]["completed"] == 300
    q("doctor", env=env)


def test_a_backup_that_cannot_be_written_leaves_nothing(q: Queue, tmp_path: Path) -> None:
    q("enqueue", "true")
    q("backup", str(q.db), code=1)
    q("backup", str(tmp_path), code=1)
    q("backup", str(tmp_path / "no" / "such" / "folder"), code=1)
    assert not list(tmp_path.glob("*.part*"))


# Jobs that run after others.


def after(q: Queue, job: str) -> list[str]:
    return list(q.show(job)["after"])


def test_a_job_starts_when_all_that_it_waits_for_are_completed(q: Queue) -> None:
    q.add(GATE, "--id", "a")
    q.add("sleep 0.1", "--id", "b")
    q.add("[ -e ended ]", "--id", "c", "--after", "a,b", "--max-retries", "1")
    q("enqueue", '{"id":"d","command":"true","after":["c"]}', "--after", "a", "--after", "b")  # options win
    assert (after(q, "c"), after(q, "d")) == (["a", "b"], ["a", "b"])
    pool = q.pool("--count", "3")
    q.wait_state("b", "completed")
    assert after(q, "c") == ["a", "b"] and q.state("c") == "pending"
    assert "after a" in q("list").out and "it runs after a, which is processing" in q("why", "c").out
    q.touch("go")
    q.wait_state("c", "completed")
    q.wait_state("d", "completed")
    assert after(q, "c") == ["a", "b"]
    pool.stop()
    q("doctor")


def test_who_waited_is_woken_at_once(q: Queue) -> None:
    """Nobody polls: who completes a job rings for those that waited, for it can run only one of them itself."""
    q.set("poll-interval-ms", "3600000")
    q.add("sleep 0.5", "--id", "first")
    for name in ("x", "y"):
        q.add("sleep 20", "--id", name, "--after", "first")
    q.pool("--count", "2")
    wait_for(lambda: {q.state("x"), q.state("y")} == {"processing"})
    q("worker", "stop", "--now")


@pytest.mark.parametrize("death", ["fails", "is cancelled", "is cancelled while it runs", "kills its worker"])
def test_who_waits_for_a_job_dies_with_it(q: Queue, death: str) -> None:
    commands = {"fails": "exit 3", "kills its worker": KILL_WORKER, "is cancelled while it runs": HANG}
    q.add(commands.get(death, "true"), "--id", "a", "--max-retries", "1")
    for name, awaited in (("b", "a"), ("c", "b"), ("d", "a,c")):
        q.add("true", "--id", name, "--after", awaited)
    q.add("true", "--id", "bystander")
    if death.startswith("is cancelled"):
        pool = q.pool() if death.endswith("runs") else None
        if pool:
            q.wait_file("started")
        q("cancel", "a")
        if pool:
            pool.stop()
    q("worker", "start", "--drain", code=None)
    state, how = ("cancelled", "was cancelled") if death.startswith("is cancelled") else ("dead", "is dead")
    assert q.states() == {**dict.fromkeys("abcd", state), "bystander": "completed"}
    assert {q.show(name)["last_error"] for name in "bcd"} == {f"a {how}, and this job was to run after it"}
    assert q("dlq", "list", env={"COLUMNS": "200"}).out.count("a is dead") == (3 if state == "dead" else 0)
    q("doctor")


def test_a_retry_with_those_that_died_with_it(q: Queue) -> None:
    q.add("[ -e mended ]", "--id", "a", "--max-retries", "1")
    q.add("true", "--id", "b", "--after", "a")
    q.add("true", "--id", "c", "--after", "b")
    q.drain(code=1)
    assert "`queuectl retry a --with-dependents`" in q.fails("dlq", "retry", "b").err
    assert "--with-dependents" in q("why", "b").out
    q.touch("mended")
    said = q("dlq", "retry", "a")
    assert said.out == "Queued again: a\n" and "--with-dependents" in said.err and "2 jobs" in said.err
    q("cancel", "a")
    q("retry", "a", "--with-dependents")
    assert q.counts() == {"pending": 3} and after(q, "c") == ["b"]
    q.drain()
    assert q.counts() == {"completed": 3}
    assert [q.show(name)["last_error"] for name in "abc"] == [None] * 3


def test_the_advice_for_a_retry_names_all_that_it_takes(q: Queue) -> None:
    q.load([{"id": name, "command": "false", "max_retries": 1} for name in ("a", "b")])
    q.load([{"id": "c", "command": "true", "after": "a,b"}, {"id": "d", "command": "true", "after": "c"}])
    q.drain(code=1)
    for command in (["dlq", "retry", "d"], ["dlq", "retry", "a", "--with-dependents"]):
        assert "`queuectl retry a b --with-dependents`" in q.fails(*command).err
    assert "`queuectl retry a b --with-dependents`" in why(q, "d")
    q("dlq", "retry", "a", "b", "--with-dependents")
    assert q.counts() == {"pending": 4}
    q("cancel", "d")
    assert "`queuectl retry d`" in why(q, "d")


def test_a_job_after_a_dead_one_costs_the_same_however_many_there_are(store: Any) -> None:
    """Counted in steps of SQLite's machine: once each new one buried all before it again."""
    put(store, id="root")
    with store.transaction():
        store.cancel_waiting(store.find("root")["seq"], NOW)

    def steps() -> int:
        counted: list[int] = []
        store.db.set_progress_handler(lambda: counted.append(1), 100)
        for _ in range(150):
            put(store, after=["root"])
        store.db.set_progress_handler(None, 0)
        return len(counted)

    first = steps()
    steps()
    assert steps() < 1.5 * first
    assert store.counts()["cancelled"] == 451


def test_all_dead_are_retried_in_their_order(q: Queue) -> None:
    q.add("[ -e mended ]", "--id", "a", "--max-retries", "1")
    q.add("[ -e mended ] && echo b >>order", "--id", "b", "--after", "a")
    q.drain(code=1)
    q.touch("mended")
    assert q("dlq", "retry", "--all").out == "Queued again: 2 jobs\n"
    q.drain("--count", "2")
    assert q.counts() == {"completed": 2}


def test_a_job_that_others_wait_for_is_not_deleted(q: Queue) -> None:
    q.add("true", "--id", "a")
    q.add("true", "--id", "b", "--after", "a")
    assert "b" in q.fails("delete", "a").err
    q("purge", "--state", "pending", "--older-than", "1h")
    q("delete", "a", "b")
    q.add("true", "--id", "a")
    q.add("true", "--id", "b", "--after", "a")
    assert q("purge", "--state", "pending").out == "Deleted: 2 jobs\n"
    assert q.counts() == {}


def test_a_dead_job_is_forgotten_under_those_that_died_with_it(q: Queue) -> None:
    q.add("false", "--id", "a", "--max-retries", "1")
    q.add("true", "--id", "b", "--after", "a")
    q.drain(code=1)
    q("delete", "a")
    q.fails("retry", "b")  # a was never completed
    assert q.states() == {"b": "dead"}


def test_what_is_waited_for_must_exist(q: Queue) -> None:
    assert "no job nope" in q.fails("enqueue", "--after", "nope", "true").err
    q.fails("enqueue", "--after", "a b", "true", code=2)
    later = '{"id":"x","command":"true","after":"y"}\n{"id":"y","command":"true"}\n'
    assert "line 1: there is no job y" in q.fails("enqueue", "--file", "-", stdin=later).err
    assert q.jobs() == []
    made = q.add("true")
    earlier = '{"id":"y","command":"true"}\n{"id":"x","command":"true","after":["y","%s"]}\necho\n' % made[:6]
    q("enqueue", "--file", "-", stdin=earlier)
    assert after(q, "x") == ["y", made]


def test_no_job_waits_for_itself(q: Queue) -> None:
    assert "itself" in q.fails("enqueue", "--id", "a", "--after", "a", "true").err
    assert "line 2: " in q.fails("enqueue", "--file", "-", stdin='true\n{"id":"a","command":"x","after":"a"}\n').err
    assert q.jobs() == []


@pytest.mark.parametrize("words", [["enqueue", "--file", "-"], ["run", "--quiet", "--each", "true"]])
def test_others_can_write_while_the_jobs_are_still_coming(q: Queue, words: list[str]) -> None:
    q("status")
    coming = f"(echo true; touch {q.work}/began; sleep 3) | queuectl {shlex.join(words)}"
    slow = q.launch(["bash", "-c", define(q.program) + coming])
    q.wait_file("began")
    time.sleep(0.3)
    q("config", "set", "max_retries", "1")
    assert not slow.ended  # or it would have waited for the end of the pipe
    assert slow.wait() == 0


def test_a_job_after_one_that_has_ended(q: Queue) -> None:
    q.load([{"id": "good", "command": "true"}, {"id": "bad", "command": "false", "max_retries": 1}])
    q.drain(code=1)
    q("enqueue", "--id", "x", "--after", "good", "true")
    said = q("enqueue", "--id", "y", "--after", "bad", "true")
    assert said.out == "Enqueued: y\n" and "dead already: bad is dead" in said.err
    q.drain()
    assert (q.state("x"), q.state("y")) == ("completed", "dead")
    q("dlq", "retry", "bad", "--with-dependents")
    assert q.state("y") == "pending"
    q("doctor")


def test_a_job_keeps_its_time_when_its_prerequisites_are_completed(q: Queue) -> None:
    q.add("true", "--id", "a")
    q.add("true", "--id", "b", "--after", "a", "--delay", "1h")
    q.drain()
    assert q.state("b") == "pending" and "it is scheduled in 59m" in q("why", "b").out
    q("edit", "b", "--run-at", "now")
    q.drain()
    assert q.state("b") == "completed"


def test_a_long_chain_goes_to_its_end_and_dies_as_a_whole(q: Queue) -> None:
    chain = [{"id": f"c{n}", "command": "true", **({"after": f"c{n - 1}"} if n else {})} for n in range(2000)]
    q.load(chain)
    q("worker", "start", "--count", "2", "--max-jobs", "5")
    assert q.counts() == {"completed": 5, "pending": 1995}
    assert "1994 jobs" in q("cancel", "c5").err
    assert q.counts() == {"completed": 5, "cancelled": 1995}
    assert q.show("c1999")["last_error"] == "c5 was cancelled, and this job was to run after it"
    q("doctor")


def test_waiting_jobs_move_to_another_machine(q: Queue, other: Queue) -> None:
    q.load([{"id": "done", "command": "true"}])
    q.drain()
    policy = {"unique": "k", "retry_after": 5, "dead_on": [2, 3]}
    q.load([{"id": "a", "command": "true", **policy}, {"id": "b", "command": "true", "after": "done,a"}])
    q("edit", "b", "--priority", "3")
    moved = q("list", "--state", "pending", "--json").out
    other("enqueue", "--file", "-", stdin=moved)
    both = [{job["id"]: job for job in queue.jobs("--state", "pending")} for queue in (q, other)]
    for name in ("unique", "retry_after", "dead_on", "priority", "max_retries", "command"):
        assert [job[name] for job in both[0].values()] == [job[name] for job in both[1].values()], name
    assert (both[0]["b"]["after"], both[1]["b"]["after"]) == (["done", "a"], ["a"])  # what was met stays behind


def database_of_version(q: Queue, version: int) -> sqlite3.Connection:
    """An empty database as the program of that schema made it."""
    q.db.touch(0o600)
    db = sqlite3.connect(str(q.db))
    db.execute("PRAGMA journal_mode = WAL")
    steps = [statement for migration in queuectl.MIGRATIONS[:version] for statement in migration]
    for statement in (*steps, queuectl.SET_APPLICATION, f"PRAGMA user_version = {version}"):
        db.execute(statement)
    return db


def test_a_database_of_the_second_version_is_brought_up_to_date(q: Queue) -> None:
    db = database_of_version(q, 2)
    db.execute("INSERT INTO contexts VALUES (3, ?, '/bin:/usr/bin', 18)", (str(q.work),))
    db.execute("INSERT INTO queues (name, pending) VALUES ('default', 1)")
    db.execute(
        "INSERT INTO jobs (seq, id, generated, command, state, queue, priority, ready, max_retries,"
        " context, created_at, updated_at) VALUES (7, 'old', 0, 'pwd', 'pending', 'default', 10, 1, 2, 3, 1, 1)"
    )
    db.commit()
    db.close()
    q.add("true", "--after", "old", "--id", "new")
    q.drain()
    assert q("logs", "--stdout", "old").out == str(q.work) + "\n"
    assert q.counts() == {"completed": 2}
    q("doctor")


# Jobs with a key.


def test_one_job_with_a_key_waits_or_runs(q: Queue) -> None:
    q.add(GATE, "--id", "a", "--unique", "nightly sync")
    pool = q.pool()
    q.wait_file("started")
    assert (
        "a job with the key nightly sync is processing: a" in q.fails("enqueue", "--unique", "nightly sync", "true").err
    )
    said = q("enqueue", "--unique", "nightly sync", "--if-exists", "skip", "true")
    assert said.out == "Exists already: nothing changed\n"
    waiting = q.start("enqueue", "--unique", "nightly sync", "--if-exists", "skip", "--wait", "true")
    q.touch("go")
    assert waiting.wait() == 0 and q.state("a") == "completed"  # it waited for the job that has the key
    q("enqueue", "--unique", "nightly sync", "true")
    pool.stop()


def test_a_key_in_a_file_and_thirty_at_once(q: Queue) -> None:
    twins = '{"command":"true","unique":"k"}\n' * 2
    assert "line 2: a job with the key k" in q.fails("enqueue", "--file", "-", stdin=twins).err
    q("enqueue", "--file", "-", "--if-exists", "skip", stdin=twins + "true\n")
    assert q.counts() == {"pending": 2}
    racing = [q.start("enqueue", "--unique", "race", "true") for _ in range(30)]
    assert sorted(one.wait(60) for one in racing) == [0] + [1] * 29
    assert q.counts() == {"pending": 3}


def test_a_retry_does_not_double_a_key(q: Queue) -> None:
    for name in ("a", "b"):
        q.add("false", "--id", name, "--unique", "k", "--max-retries", "1")
        q.drain(code=1)
    said = q("dlq", "retry", "--all")
    assert said.out == "Queued again: 1 job\n" and "their key" in said.err
    assert "its key k" in q.fails("retry", "b").err
    assert q.states() == {"a": "pending", "b": "dead"}
    q("doctor")


# Exit codes with a meaning.

TWICE_LATER = "echo run >>runs; [ $(wc -l <runs) -gt 2 ] || exit 75"


def test_exit_code_75_is_tried_again_without_using_up_an_attempt(q: Queue) -> None:
    q.add(TWICE_LATER, "--id", "a", "--max-retries", "1", "--retry-after", "100ms")
    q.drain()
    shown = q.show("a")
    assert (shown["state"], shown["attempts"], shown["retry_after"]) == ("completed", 1, 0.1)
    assert [(run["attempt"], run["state"]) for run in shown["runs"]] == [
        (1, "deferred"), (1, "deferred"), (1, "completed"),
    ]  # fmt: skip


def test_exit_code_75_cannot_go_on_for_ever(q: Queue) -> None:
    q.set("retry_after", "0")
    q.set("max_deferrals", "3")
    q.add("exit 75", "--id", "a", "--max-retries", "2", "--backoff-base", "0.1")
    q.drain(code=1)
    shown = q.show("a")
    assert (shown["state"], shown["attempts"]) == ("dead", 2)
    assert [run["state"] for run in shown["runs"]] == ["deferred"] * 3 + ["failed"] * 2
    q("retry", "a")  # which starts afresh
    q.drain(code=1)
    assert [run["state"] for run in q.show("a")["runs"]][5:] == ["deferred"] * 3 + ["failed"] * 2


def test_a_deferred_job_is_failed_until_its_time(q: Queue) -> None:
    q.add("exit 75", "--id", "a", "--retry-after", "1h")
    pool = q.pool()
    q.wait_state("a", "failed")
    shown = q.show("a")
    assert shown["attempts"] == 0 and "tried again later" in shown["last_error"]
    assert 3590 < moment(shown["next_retry_at"]) - time.time() < 3601
    pool.stop()


def test_exit_codes_that_are_final(q: Queue) -> None:
    q.load([
        {"id": "final", "command": "exit 3", "dead_on": [2, 3]},
        {"id": "other", "command": "exit 4", "dead_on": 3, "max_retries": 2, "backoff_base": 0.1},
        {"id": "both", "command": "exit 75", "dead_on": "75"},
    ])  # fmt: skip
    q.drain(code=1)
    assert {job["id"]: (job["state"], job["attempts"]) for job in q.jobs()} == {
        "final": ("dead", 1), "other": ("dead", 2), "both": ("dead", 1),
    }  # fmt: skip
    assert q.show("final")["last_error"] == "exit code 3, which is final"
    q("enqueue", "--dead-on", "0", "true", code=2)
    q("enqueue", "--dead-on", "two", "true", code=2)
    q("enqueue", "--retry-after", "-1", "true", code=2)


# why, edit


def why(q: Queue, job: str) -> str:
    return q("why", job).out


def test_why_tells_what_keeps_a_job(q: Queue) -> None:
    q.add("true", "--id", "a", "--queue", "x")
    assert "no worker serves its queue; `queuectl worker start` does" in why(q, "a")
    pool = q.pool("--queue", "y")
    assert "`queuectl worker start --queue x`" in why(q, "a")
    q("queue", "pause", "x")
    assert "its queue x is paused; `queuectl queue resume x`" in why(q, "a")
    q("queue", "pause")
    assert "all queues are paused" in why(q, "a")
    q("queue", "resume")
    pool.stop()


def test_why_tells_what_it_waits_behind_and_how_long(q: Queue) -> None:
    q.set("backoff_base", "3600")
    q("queue", "set", "one", "--concurrency", "1")
    q.add("sleep 1", "--id", "took-a-second")
    q.drain()
    q.load(
        [
            {"id": "runs", "command": HANG, "timeout": "1h", "queue": "one"},
            {"id": "waits", "command": "true", "queue": "one"},
        ]
    )
    q.add("exit 9", "--id", "fails", "--priority", "1")
    pool = q.pool()
    q.wait_file("started")
    assert "is at its limit (concurrency 1), running runs" in why(q, "waits")
    assert "it runs now" in why(q, "runs") and "--follow runs" in why(q, "runs") and "at most 59m" in why(q, "runs")
    assert "`queuectl cancel ID` ends one" in why(q, "waits") and "edit fails --run-at now" in why(q, "fails")
    assert "its next try is due in 59m" in why(q, "fails") and "its last run: exit code 9 (1 of 3" in why(q, "fails")
    q.add("true", "--id", "first", "--priority", "2")
    q.add("true", "--id", "last", "--priority", "99")
    said = q.look("why", "last")
    assert said["reasons"][0] == "first goes before it, by priority or arrival" and said["expected_at"] is None
    assert said["reasons"][1].startswith("1 of 1 worker busy: runs for ")
    assert "completed" in why(q, "took-a-second") and "retry took-a-second" in why(q, "took-a-second")
    q("cancel", "first")
    assert "it was cancelled" in why(q, "first") and "`queuectl retry first`" in why(q, "first")
    q("worker", "stop", "--now")
    pool.wait()
    q.fails("why", "nope")


def test_why_gives_the_time_of_a_scheduled_job(q: Queue) -> None:
    pool = q.pool()
    q.add("true", "--id", "a", "--run-at", "2099-01-01T00:00:00Z")
    said = q.look("why", "a")
    assert said["expected_at"] == "2099-01-01T00:00:00.000Z" and said["state"] == "pending"
    q("queue", "pause")
    assert q.look("why", "a")["expected_at"] is None
    pool.stop()


def test_every_field_that_can_be_edited(q: Queue) -> None:
    q.add("true", "--id", "a", "--timeout", "5", "--delay", "1h")
    said = q(
        "edit",
        "a",
        "--priority",
        "-3",
        "--run-at",
        "2030-01-01",
        "--timeout",
        "none",
        "--max-retries",
        "9",
        "--queue",
        "x",
    )
    assert said.out == "Changed: a\n"
    shown = q.show("a")
    assert [shown[name] for name in ("priority", "run_at", "timeout_seconds", "max_retries", "queue")] == [
        -3, "2030-01-01T00:00:00.000Z", None, 9, "x",
    ]  # fmt: skip
    assert [(queue["name"], queue["pending"]) for queue in q.look("queue", "list")] == [("x", 1)]
    q("doctor")
    q("edit", "a", code=2)
    q("edit", "a", "--priority", "high", code=2)
    q.fails("edit", "nope", "--priority", "1")
    q("edit", "a", "--delay", "0")
    q.drain()
    assert q("edit", "a", "--priority", "1").out == "Changed: a\n" and q.show("a")["priority"] == 1
    q.add(HANG, "--id", "runs")
    q.pool()
    q.wait_file("started")
    assert "is processing" in q.fails("edit", "runs", "--priority", "1").err


def test_an_edit_wakes_the_workers(q: Queue) -> None:
    q.set("poll-interval-ms", "3600000")
    q.add("true", "--id", "later", "--delay", "1h")
    q.add("[ -e mended ]", "--id", "failed", "--backoff-base", "3600")
    pool = q.pool()
    q.wait_state("failed", "failed")
    q.touch("mended")
    q("edit", "later", "--run-at", "now")
    q("edit", "failed", "--run-at", "now+200ms", "--queue", "other")
    q.wait_state("later", "completed")
    q.wait_state("failed", "completed")
    pool.stop()
    q("doctor")


# Retention


def test_ended_jobs_are_forgotten_after_their_time(q: Queue) -> None:
    q.load([{"command": "true"} for _ in range(30)])
    q.load([{"command": "false", "max_retries": 1}, {"id": "later", "command": "true", "delay": "1h"}])
    q.drain(code=1)
    lock = q.db.parent / "queue.db.d" / "sweep.lock"
    lock.write_text(json.dumps({"clock": [time.time() - 100, time.monotonic() - 100]}))  # steady for long enough
    pools = [q.pool(), q.pool()]
    q.set("keep_completed", "0")  # which means a few seconds, for somebody may be waiting for the end of a job
    q("wait", q.jobs("--state", "completed")[0]["id"])

    def swept(**counts: int) -> bool:
        if lock.exists():
            os.utime(lock, (1, 1))  # the last round was long ago
        return q.counts() == counts

    wait_for(lambda: swept(dead=1, pending=1), 30)
    q.set("keep_dead", "1s")
    q.add(HANG, "--id", "runs")
    wait_for(lambda: swept(processing=1, pending=1), 30)
    assert {job["id"] for job in q.jobs()} == {"runs", "later"}
    q("worker", "stop", "--now")
    assert all(pool.wait() in (0, 130) for pool in pools)
    q("doctor")


def ended(store: Any, *names: str) -> None:
    for name in names:
        put(store, id=name, queue="x" if name == "x" else "default")
    for _ in names:
        end(store, take(store), "completed", NOW)


def test_jobs_are_forgotten_that_are_old_enough(store: Any) -> None:
    ended(store, "a", "b", "x", "d", "e")
    put(store, id="waits")
    assert store.forget_some(queuectl.Selection(("completed",), before=NOW - 1), queuectl.NEVER) == 0
    assert store.forget_some(queuectl.Selection(("completed",), before=NOW), 5, {"x"}) == 0
    assert store.forget_some(queuectl.Selection(("completed",), before=NOW), 1) == 0
    assert [job["id"] for job in store.jobs(queuectl.Selection())] == ["x", "e", "waits"]


def test_one_worker_at_a_time_sweeps_and_all_rest_after_a_round(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = dict(queuectl.SETTINGS, keep_completed=0)
    os.makedirs(queuectl.folder_path(store.path))
    lock = os.path.join(queuectl.folder_path(store.path), "sweep.lock")

    def sweep(settings: Any) -> int:
        queuectl.sweep(store, settings)
        return int(store.counts()["completed"])

    monkeypatch.setattr(queuectl, "STEADY_TIME", 0)
    ended(store, "a", "b")
    assert sweep(dict(keep, keep_completed=None)) == 2
    os.unlink(lock)
    fd = queuectl.open_private(lock, os.O_RDWR)
    assert queuectl.system.try_lock(fd)
    assert sweep(keep) == 2
    os.close(fd)
    assert sweep(keep) == 0
    ended(store, "c")
    assert sweep(keep) == 1  # the round has just ended
    os.utime(lock, (1, 1))
    monkeypatch.setattr(queuectl, "SWEEP_TIME", 1e-9)  # enough for one look each: the jobs, then the end
    assert sweep(keep) == 0 and json.loads(Path(lock).read_text())["place"] == dict.fromkeys(
        ("cancelled", "history"), queuectl.NEVER
    )
    for _ in range(3):  # of the history there are the minutes that become an hour, and then no more
        sweep(dict(keep, keep_completed=None, keep_dead=5))
    assert json.loads(Path(lock).read_text())["place"] == {}


def test_a_run_sums_up_what_would_be_forgotten_meanwhile(q: Queue) -> None:
    q.set("keep_dead", "0")
    q.set("keep_completed", "0")
    run = q.start("run", "--max-retries", "1", "--workers", "2", "exit 3", "sleep 8")
    assert run.wait(40) == 1 and "1 of 2 completed, 1 dead" in run.err


# on_dead and on_end: jobs that are made when jobs end


def hook_that_writes(q: Queue, name: str) -> str:
    """A hook that keeps the variables it sees in a file called after the job."""
    path = f"{q.work}/$QUEUECTL_JOB_ID.{name}"
    return f"env | grep ^QUEUECTL_ | grep -v _RUN= | sort >{path}.new; mv {path}.new {path}"


def test_what_on_dead_sees(q: Queue) -> None:
    q.set("on_dead", hook_that_writes(q, "env"))
    q.add("echo 'why not' >&2; exit 4", "--id", "a", "--max-retries", "2", "--backoff-base", "0.1", "--queue", "mail")
    q.add(KILL_WORKER, "--id", "b", "--max-retries", "1")
    q.add("true", "--id", "waits", "--after", "a")
    q.add("true", "--id", "cancelled", "--delay", "1h")
    q.add(HANG, "--id", "ended", "--priority", "20")
    pool = q.pool("--count", "2")
    q("cancel", "cancelled")
    assert q.wait_file("a.env").splitlines() == [
        "QUEUECTL_ATTEMPT=2", "QUEUECTL_COMMAND=echo 'why not' >&2; exit 4", f"QUEUECTL_DB={q.db}",
        "QUEUECTL_ERROR=exit code 4: why not", "QUEUECTL_EXIT_CODE=4", "QUEUECTL_JOB_ID=a",
        "QUEUECTL_MAX_RETRIES=2", "QUEUECTL_QUEUE=mail", "QUEUECTL_SLOT=1", "QUEUECTL_STATE=dead",
    ]  # fmt: skip
    assert "was lost" in q.wait_file("b.env")
    q.wait_state("ended", "processing")
    q("cancel", "ended")
    pool.stop()
    assert sorted(path.name for path in q.work.glob("*.env")) == ["a.env", "b.env"]
    hooks = q.jobs("--queue", "on-dead")
    assert [job["timeout_seconds"] for job in hooks] == [60, 60]
    assert {job["state"] for job in hooks} == {"completed"}
    q("doctor")


def test_on_end_sees_every_end_but_that_of_a_hook(q: Queue) -> None:
    q.set("on_end", hook_that_writes(q, "end"))
    q.load(
        [{"id": "a", "command": "exit 4", "max_retries": 1}, {"id": "b", "command": "true", "after": ["a"]},
         {"id": "c", "command": "true"}, {"id": "d", "command": "true", "delay": "1h"}]
    )  # fmt: skip
    q("cancel", "d")
    q.drain(code=1)
    states = {name: re.search("^QUEUECTL_STATE=(.*)", q.wait_file(f"{name}.end"), re.M)[1] for name in "abcd"}  # type: ignore[index]
    assert states == {"a": "dead", "b": "dead", "c": "completed", "d": "cancelled"}
    assert len(list(q.work.glob("*.end"))) == 4
    q("doctor")


@pytest.mark.parametrize("hook", ["exit 3", "no-such-program", "(((", "kill -9 $$"])
def test_a_hook_is_retried_and_its_own_death_makes_none(q: Queue, hook: str) -> None:
    q.set("on_dead", hook)
    q.set("backoff_base", "0.1")
    q.add("exit 4", "--id", "a", "--max-retries", "1")
    q.drain(code=1)
    hooks = q.jobs("--queue", "on-dead")
    assert [(job["state"], job["attempts"], job["command"]) for job in hooks] == [("dead", 3, hook)]
    assert q.show("a")["last_error"] == "exit code 4"


def test_a_hooks_death_is_not_counted_among_the_jobs_of_a_drain_or_a_run(q: Queue) -> None:
    q.set("on_end", "exit 3")
    q.set("max_retries", "1")
    q.add("true")
    q.drain("--queue", "default")
    assert q("run", "true").code == 0
    assert q.counts() == {"completed": 2, "dead": 2}


def test_a_run_and_a_drain_wait_for_their_hooks(q: Queue) -> None:
    q.set("on_dead", f"sleep 0.5; echo $QUEUECTL_JOB_ID >>{q.work}/told")
    q.add("false", "--id", "a", "--max-retries", "1", "--queue", "mail")
    q.drain("--queue", "mail", code=1)
    assert q.lines("told") == ["a"]
    q("run", "--id", "b", "--max-retries", "1", "false", code=1)
    assert q.lines("told") == ["a", "b"]


def test_on_dead_runs_though_the_worker_is_killed(q: Queue) -> None:
    q.set("on_dead", f"echo $QUEUECTL_JOB_ID >>{q.work}/told")
    q.add("false", "--id", "a", "--max-retries", "1")
    start_to_be_killed(q, "recorded", 2, "worker", "start", "--drain").wait()
    q.drain(code=None)
    assert q.lines("told") == ["a"]
    assert [job["state"] for job in q.jobs("--queue", "on-dead")] == ["completed"]


def test_a_hook_that_hangs_does_not_hold_up_other_jobs_for_ever(q: Queue) -> None:
    q.set("on_dead", f"touch {q.work}/hook; exec sleep 300")
    q.load([{"command": "false", "max_retries": 1}, {"id": "b", "command": "true"}])
    q.pool("--count", "2")
    q.wait_file("hook")
    q.wait_state("b", "completed")
    q("worker", "stop", "--now")
    assert [job["state"] for job in q.jobs("--queue", "on-dead")] == ["pending"]


def test_hooks_move_to_another_machine(q: Queue, other: Queue) -> None:
    q.set("on_dead", "true")
    q.add("false", "--id", "a", "--max-retries", "1")
    q.drain(code=1)
    other("enqueue", "--file", "-", stdin=q("list", "--json").out)
    assert [job["env"]["QUEUECTL_JOB_ID"] for job in other.jobs("--queue", "on-dead")] == ["a"]


# The caller's whole environment


def test_the_whole_environment_is_kept_and_shown_only_on_demand(q: Queue) -> None:
    env = {"SECRET": "top\nsecret", "QUEUECTL_JOB_ID": "forged"}
    q("enqueue", "--id", "a", "--env-all", "--env", "MORE=1", 'printf %s "${#SECRET}$MORE$QUEUECTL_JOB_ID"', env=env)
    q("enqueue", "--id", "b", 'printf %s "${SECRET-unset}"', env=env)
    q.drain()
    assert q("logs", "--stdout", "a").out == "101a"
    assert q("logs", "--stdout", "b").out == "unset"
    for command in (["list", "--json"], ["show", "a"], ["show", "--json", "a"], ["status", "--json"]):
        assert "top" not in q(*command).out
    kept = q("show", "--env", "--json", "a").json()
    assert kept["SECRET"] == "top\nsecret" and kept["MORE"] == "1" and kept["HOME"] == str(q.home)
    assert "SECRET=top\\nsecret\n" in q("show", "--env", "a").out
    assert q("show", "--env", "--json", "b").json() == {}
    q("enqueue", "--id", "c", "--env-all", "true", env=env)
    q("enqueue", "--id", "c", "--env-all", "--if-exists", "skip", "true", env={**env, "SECRET": "another"})
    q("delete", "a")
    assert q("show", "--env", "--json", "c").json()["SECRET"] == "top\nsecret"
    q("delete", "c")
    assert b"SECRET" not in b"".join(
        json.dumps(row).encode() for row in queuectl.Store(str(q.db)).db.execute("SELECT * FROM contexts")
    )


def test_the_whole_environment_is_that_of_the_caller_not_the_workers(q: Queue) -> None:
    q("enqueue", "--id", "a", "--env-all", 'echo "$ONE,$TWO"', env={"ONE": "caller"})
    q.drain(env={"ONE": "worker", "TWO": "worker"})
    assert q("logs", "--stdout", "a").out == "caller,\n"


# status and list again and again, and for Prometheus


def test_watching_without_a_terminal_repeats_plainly(q: Queue) -> None:
    q.add("true", "--id", "seen", "--delay", "1h")
    watch = q.start("status", "--watch")
    wait_for(lambda: watch.out.count("every second until Ctrl-C") >= 3)
    watch.signal(signal.SIGINT)
    assert watch.wait() == 130
    assert "\033" not in watch.out and "pending:    1" in watch.out
    assert "in the last minute, " in watch.out
    assert watch.err == ""


def test_watching_on_a_terminal_redraws_in_place(q: Queue) -> None:
    q.load([{"command": "true", "delay": 3600} for _ in range(40)])
    watch = q.terminal("status", "--watch")
    wait_for(lambda: watch.out.count("\033[H") >= 3)
    watch.signal(signal.SIGINT)
    assert watch.wait() == 130
    frames = watch.out.split("\033[H")[1:]
    assert watch.out.count("\033[2J") == 1 and all(frame.count("\n") <= 23 for frame in frames)
    assert all(line.endswith("\033[K") for line in frames[0].split("\033[J")[0].splitlines())


def test_watching_ends_with_its_reader_and_with_the_database(q: Queue) -> None:
    assert q.bash("queuectl status --watch | head -n 2").out.count("\n") == 2
    watch = q.start("status", "--watch")
    wait_for(lambda: "pending" in watch.out)
    q.add("true")
    wait_for(lambda: "pending:    1" in watch.out)
    q.db.unlink()
    assert watch.wait() == 1 and "deleted" in watch.err
    for words in (["--json"], ["--format", "prometheus"]):
        q("status", "--watch", *words, code=2)


def test_the_next_step_stands_in_the_status(q: Queue) -> None:
    q.add("true", "--queue", "lonely", "--delay", "300ms")
    pool = q.pool("--queue", "other")
    assert "No worker serves the queue lonely: `queuectl worker start --queue lonely`" in q("status").out
    assert q.status()["unserved"] == ["lonely"]
    pool.stop()
    assert "No worker is running" in q("status").out and q.status()["unserved"] == []
    run = q.start("run", "--workers", "1", GATE, "true x")
    q.wait_file("started")
    assert q.status()["interrupted"] == []
    kill(run.process.pid, signal.SIGKILL)
    worker = next(worker["pid"] for worker in q.look("worker", "list"))
    kill(worker, signal.SIGKILL)
    run.wait()
    wait_for(lambda: q.workers() == 0)
    said = q("status")
    assert "Interrupted: `queuectl run --resume run-1`" in said.out and "Held by dead workers: " in said.out
    q.touch("go")
    q("run", "--resume")
    said = q("status")
    assert "Interrupted" not in said.out and "dead workers" not in said.out and "lonely" not in said.err


def test_the_dead_of_one_queue_are_retried(q: Queue) -> None:
    q.load([{"command": "false", "max_retries": 1, "queue": name} for name in "xxy"])
    q.drain(code=1)
    assert q("dlq", "retry", "--all", "--queue", "x").out == "Queued again: 2 jobs\n"
    assert q.counts() == {"pending": 2, "dead": 1}
    q("dlq", "retry", "abcd", "--queue", "x", code=2)
    assert "`queuectl dlq retry ID`" in q.at_terminal("dlq", "list")


def test_the_metrics_of_prometheus(q: Queue) -> None:
    q.add("true", "--queue", 'od"d')
    q.add("false", "--max-retries", "1")
    q("queue", "pause", 'od"d')
    q.drain(code=1)
    text = q("status", "--format", "prometheus").out
    number = r"-?[0-9.]+"
    for line in text.splitlines():
        assert re.fullmatch(
            rf'# (HELP|TYPE) queuectl_\w+ .+|queuectl_\w+({{(\w+="([^"\\]|\\.)*",?)+}})? {number}', line
        ), line
    assert 'queuectl_jobs{queue="od\\"d",state="pending"} 1\n' in text
    assert 'queuectl_jobs{queue="default",state="dead"} 1\n' in text
    assert 'queuectl_queue_paused{queue="od\\"d"} 1\n' in text and "queuectl_workers 0\n" in text
    assert re.search(r"^queuectl_oldest_waiting_seconds [0-9.]+$", text, re.MULTILINE)


# run


def test_run_works_on_commands_and_sums_up(q: Queue) -> None:
    said = q("run", "--max-retries", "1", "echo one >>out", "echo oh no >&2; exit 3", "echo three >>out", code=1)
    assert sorted(q.lines("out")) == ["one", "three"]
    assert (said.out, "\nrun-1: 2 of 3 completed, 1 dead in " in said.err) == ("", True)
    assert "1 dead: exit code 3: oh no" in said.err and "dlq retry" in said.err and "queuectl logs " in said.err
    assert q.counts() == {"completed": 2, "dead": 1}


@pytest.mark.parametrize(
    "words, stdin, printed",
    [
        (["echo one; echo two"], "", "one\ntwo\n"),
        (["printf", "%s\n", "a  b"], "", "a  b\n"),
        (['{"command":"echo json"}'], "", "json\n"),
        (["--", "{ echo block; }"], "", "block\n"),
        ([], "echo from stdin\n", "from stdin\n"),
        (["--file", "-"], '{"command":"echo line"}\n', "line\n"),
        (["--each", "printf '%s\\n' {}"], 'it\'s a  "name" $(x) {}\n\n', 'it\'s a  "name" $(x) {}\n'),
        (["--each", "printf '%s.'"], "put at the end\n", "put at the end."),
        (["--each", "echo {} {}", "as argument"], "", "as argument as argument\n"),
        (["-0", "--each", "printf %s {}"], "two\nlines\0", "two\nlines"),
        (["--each", """printf %s "it's" 'a"b' \\"{}"""], "x", 'it\'sa"b"x'),
    ],
)
def test_what_run_is_given(q: Queue, words: list[str], stdin: str, printed: str) -> None:
    q("run", *words, stdin=stdin)
    (job,) = q.jobs()
    assert q("logs", "--stdout", job["id"]).out == printed


def test_run_takes_the_options_of_a_job(q: Queue) -> None:
    q("run", "--each", "echo $X {}; [ $QUEUECTL_ATTEMPT = 2 ]", "--env", "X=5", "--backoff-base", "0.1", "a", "b")
    assert [(job["attempts"], job["queue"], job["env"]) for job in q.jobs()] == [(2, "run-1", {"X": "5"})] * 2


@pytest.mark.parametrize(
    "words",
    [
        ["--workers", "0", "true"], ["--workers", "many", "true"], ["--file", "x", "true"], ["-0", "true"],
        ["--resume", "--file", "-"], ["--resume", "--timeout", "5"], ["--each", "true", "--resume"], [""],
        ["--file", "/no/such/file"], ["echo {}", ":::", "a", "b"],
        ["echo a", "--workers", "2", "echo b"], ["--each", "echo '{}'", "a"], ["--each", 'x "y {}"', "a"],
        ["--each", " "],
        ["--each", "{}{}", "x" * 100_000],
    ],
)  # fmt: skip
def test_run_refuses_what_makes_no_sense(q: Queue, words: list[str]) -> None:
    q.fails("run", *words, code=2)
    assert q.jobs() == []


def test_run_with_nothing_to_do(q: Queue) -> None:
    assert "nothing to run" in q("run", stdin="").err
    assert "nothing to resume" in q("run", "--resume").err
    q.fails("run", "--resume", "run-7")


def test_run_says_in_json_and_quietly_what_came_of_it(q: Queue) -> None:
    said = q("run", "--json", "--max-retries", "1", "echo no >&2; exit 3", code=1)
    result = said.json()
    assert (result["queue"], result["jobs"], result["completed"], result["dead"], result["left"]) == (
        "run-1",
        1,
        0,
        1,
        0,
    )
    assert result["died"][0]["last_error"] == "exit code 3: no"
    said = q("run", "--quiet", "true")
    assert (said.out, said.err) == ("", "")
    assert q("run", "--quiet", "--max-retries", "1", "false", code=1).err.startswith("run-3: 0 of 1 completed, 1 dead")


def test_a_run_counts_its_own_jobs_alone(q: Queue) -> None:
    q("run", "--max-retries", "1", "--each", "test {} != 3 || [ -e mended ]", *"123", code=1)
    old = q.jobs("--state", "dead")[0]["id"]
    q.touch("mended")
    run = q.start("run", GATE, "true x")
    q.wait_file("started")
    q("purge")
    q("dlq", "retry", old)
    q.touch("go")
    assert run.wait() == 0 and "\nrun-2: 2 of 2 completed in " in run.err
    assert q("run", "--resume").err.startswith("run-1: 1 of 1 completed in ")
    assert json.loads(q("run", "--json", stdin="").out)["jobs"] == 0


def test_a_run_says_that_it_is_paused(q: Queue) -> None:
    q("queue", "pause", "run-1")
    run = q.terminal("run", "--workers", "2", "sleep 1", "sleep 1")
    wait_for(lambda: "run-2: 0 of 2 done, 2 running" in run.out)  # it has taken another name
    q("queue", "pause")
    wait_for(lambda: "paused" in run.out)
    q("queue", "resume")
    assert run.wait() == 0


def test_a_run_whose_terminal_is_gone_ends_well(q: Queue) -> None:
    run = q.terminal("run", "--workers", "1", GATE, "true x")
    q.wait_file("started")
    run.hang_up()
    time.sleep(1)
    descriptors = len(os.listdir(f"/proc/{run.process.pid}/fd")) if LINUX else 0
    assert descriptors < 20
    q.touch("go")
    run.wait()
    wait_for(lambda: q.workers() == 0)
    assert q.counts() == {"completed": 1, "pending": 1}
    q("run", "--resume")


def test_run_has_as_many_workers_as_it_is_told_whoever_helps(q: Queue) -> None:
    pool = q.pool("--count", "3")
    q("run", "--workers", "2", "--file", "-", stdin=(peak_job(q) + "\n") * 8)
    pool.stop()
    assert peak(q) == 2 and q.counts() == {"completed": 8}
    assert q.look("queue", "list")[-1]["concurrency"] == 2
    q("purge")
    assert q.look("queue", "list") == []  # the limit went with the jobs


def interrupted(q: Queue, *signals: int) -> Background:
    """A run of two workers and eight jobs, of which some have ended when these signals come."""
    run = q.start("run", "--workers", "2", "--each", "echo {} >>ran; sleep 0.5", *"abcdefgh")
    wait_for(lambda: len(q.lines("ran")) >= 3)
    for number in signals:
        run.signal(number)
        wait_for(lambda: "stopping" in run.err or run.ended)
    return run


def test_an_interrupted_run_is_resumed(q: Queue) -> None:
    run = interrupted(q, signal.SIGINT)
    assert run.wait() == 130
    left = q.counts()["pending"]
    assert f"{left} left" in run.err and "queuectl run --resume run-1" in run.err
    assert q.counts() == {"completed": 8 - left, "pending": left}  # what ran was finished
    assert "interrupted with" in q("run", "true").err and q.jobs("--queue", "run-2")
    q("run", "--resume", "run-2", code=1)
    said = q("run", "--resume")
    assert said.err.startswith(f"run-1: {left} of {left} completed")
    assert sorted(q.lines("ran")) == list("abcdefgh")


def test_a_run_interrupted_twice_gives_its_jobs_back(q: Queue) -> None:
    run = interrupted(q, signal.SIGINT, signal.SIGINT)
    assert run.wait() == 130
    assert q.counts().get("processing") is None
    q.drain("--count", "2")  # any pool finishes it
    assert q.counts() == {"completed": 8}


def test_a_run_whose_supervisor_is_killed_is_resumed(q: Queue) -> None:
    run = interrupted(q, signal.SIGKILL)
    run.wait()
    wait_for(lambda: q.workers() == 0)
    q("run", "--resume", "--workers", "3")
    assert q.counts() == {"completed": 8} and len(set(q.lines("ran"))) == 8


def test_several_interrupted_runs_are_told_apart(q: Queue) -> None:
    for name in ("one", "two"):
        run = q.start("run", "--workers", "1", f"touch {name}; sleep 0.4", "true x")
        q.wait_file(name)
        run.signal(signal.SIGTERM)
        assert run.wait() == 130
    assert "run-1 (1 job left), run-2 (1 job left)" in q.fails("run", "--resume").err
    q("run", "--resume", "run-2")
    q("run", "--resume")
    assert q.counts() == {"completed": 4}


def test_a_run_shows_its_progress_on_a_terminal(q: Queue) -> None:
    out = q.at_terminal("run", "--workers", "1", "sleep 0.8", "sleep 0.3")
    assert "\r\033[Krun-1: 0 of 2 done, 1 running\r" in out and "\r\033[Krun-1: 1 of 2 done, 1 running" in out
    assert re.search(r"\r\033\[Krun-1: 2 of 2 completed in [^\n]*\n", out)


def test_a_job_deleted_during_a_run_is_not_completed(q: Queue) -> None:
    run = q.start("run", "--workers", "1", GATE, "true x")
    q.wait_file("started")
    q("delete", q.jobs("--state", "pending")[0]["id"])
    q.touch("go")
    assert run.wait() == 1
    assert "1 deleted meanwhile" in run.err


# what jobs print: run, logs


PLACES = ["a/b.c/d", "a/.bashrc", "/x", "x.tar.gz", "a//b", "x.y.z ", "it's", "a\nb.c/d", "-n.x", "x.", "..."]


def test_placeholders_are_those_of_parallel(q: Queue) -> None:
    said = q("run", "--each", 'printf "<%s>" {} {.} {/} {//} {/.} {#}; echo', *PLACES).out

    def stem(name: str) -> str:
        return re.sub(r"\.[^/.]*\Z", "", name)

    wanted = [
        (name, stem(name), last, os.path.dirname(name) or ".", stem(last), number)
        for number, name in enumerate(PLACES, 1)
        for last in [name.rpartition("/")[2]]
    ]
    assert said == "".join("".join(f"<{part}>" for part in parts) + "\n" for parts in wanted)
    if shutil.which("parallel"):
        simple = [name for name in PLACES if "\n" not in name]
        words = ["parallel", "-k", 'printf "<%s>" {} {.} {/} {//} {/.}; echo', ":::", *simple]
        theirs = q.run(words, env={"HOME": str(q.work)})
        assert q("run", "--each", words[2], *simple).out == theirs.out


@pytest.mark.parametrize(
    "template, why",
    [
        ("echo {%}", "QUEUECTL_SLOT"), ("echo '{%}' {}", "QUEUECTL_SLOT"), ("echo {..}", "does not know"),
        ("echo {/..} {}", "does not know"), ("echo {+/}", "does not know"), ("echo {=s/a/b/=}", "does not know"),
        ("echo {1}", "--colsep"), ("echo {2.}", "--colsep"), ("echo {-1}", "does not know"),
        ("echo '{.}'", "outside of quotes"), ("echo ${#}", "behind"), ("echo \"{/}\"", "outside of quotes"),
    ],
)  # fmt: skip
def test_what_only_parallel_knows_is_refused(q: Queue, template: str, why: str) -> None:
    assert why in q.fails("run", "--each", template, "a", code=2).err
    assert why in q.fails("run", "--each", template, code=2, stdin="a\n").err
    assert q.jobs() == []


def test_braces_that_are_no_placeholders_stay(q: Queue) -> None:
    assert q("run", "--each", "echo ab {} | grep -oE '[ab]{2}'", "x").out == "ab\n"
    assert q("run", "--each", "echo {a,b} {x} }{ {}", "x").out == "{a,b} {x} }{ x\n"


def test_columns(q: Queue) -> None:
    table = "1,a b\n2,c'd\n,\n5\n"
    assert q("run", "--colsep", ",", "--each", "printf '<%s>' {2} {1} {} {2.}; echo", stdin=table).out == (
        "<a b><1><1><a b><a b>\n<c'd><2><2><c'd><c'd>\n<><><><><>\n<><5><5><>\n"
    )
    assert q("run", "--colsep", r"\s+", "--each", "echo {2} {1}", "a   b").out == "b a\n"
    assert "--colsep: " in q.fails("run", "--colsep", "((", "--each", "echo {1}", "a", code=2).err
    q.fails("run", "--colsep", ",", "true", code=2)


def test_inputs_of_each(q: Queue) -> None:
    assert q("run", "--each", "printf '<%s>' {}", stdin="a\r\n\r\n\nb c").out == "<a><b c>"
    assert q("run", "-0", "--each", "printf '<%s>' {}", stdin="a\0\0b\r\n\0").out == "<a><><b\r\n>"


@pytest.mark.parametrize(
    "words, jobs, said",
    [
        (["./a.sh", "./b.sh"], ["./a.sh ./b.sh"], "one command"),
        (["--commands", "true", "true x"], ["true", "true x"], "each of these 2 words"),
        (["true x", "true"], ["true x", "true"], "each of these 2 words"),
        (["true;true", "true"], ["true;true", "true"], "each of these 2 words"),
        (["--", "echo a", "b"], ["'echo a' b"], ""),
        (["true"], ["true"], ""),
    ],
)
def test_how_run_reads_several_words(q: Queue, words: list[str], jobs: list[str], said: str) -> None:
    assert q("run", "--dry-run", *words).out.splitlines() == jobs
    assert not q.db.exists()
    told = q("run", "--max-retries", "1", *words, code=(0, 1)).err
    assert [job["command"] for job in q.jobs()] == jobs
    assert said in told and ("word" in told) == bool(said)


def outputs(q: Queue) -> list[str]:
    """Files with output of all kinds."""
    texts = [b"a\nb\n", b"no newline", b"", b"\n", b"\n\nx", b"\xc3\xa9 \xff\0bin", b"crlf\r\nbar\rbaz", b"x" * 9999]
    for number, text in enumerate(texts):
        (q.work / f"f {number}'").write_bytes(text)
    return [f"f {number}'" for number in range(len(texts))]


def test_outputs_come_in_the_order_of_the_inputs(q: Queue) -> None:
    names = outputs(q)
    said = q("run", "-j", "3", "--each", "sleep 0.0{#}; cat {}", *reversed(names))
    assert said.raw() == b"".join((q.work / name).read_bytes() for name in reversed(names))
    tagged = q("run", "-j", "3", "--tag", "--each", "cat {}", *names)
    lines = [
        name.encode() + b"\t" + line
        for name in names
        for line in re.findall(rb"[^\r\n]*[\r\n]|[^\r\n]+", (q.work / name).read_bytes())
    ]
    assert tagged.raw() == b"".join(lines)
    if shutil.which("parallel"):
        for options in ([], ["--tag"]):
            theirs = q.run(["parallel", "-k", "-j3", *options, "cat {}", ":::", *names], env={"HOME": str(q.work)})
            assert q("run", "-j3", *options, "--each", "cat {}", *names).raw() == theirs.raw()


def test_stderr_goes_to_stderr(q: Queue) -> None:
    said = q("run", "-j", "1", "echo out; echo err >&2", "echo err2 >&2")
    assert said.out == "out\n" and "err\nerr2\nrun-1: 2 of 2 completed" in said.err


def test_of_several_runs_the_last_is_shown(q: Queue) -> None:
    assert q("run", "--backoff-base", "0.1", "echo $QUEUECTL_ATTEMPT; [ $QUEUECTL_ATTEMPT = 3 ]").out == "3\n"


def test_a_slow_job_holds_up_others_only_in_order(q: Queue) -> None:
    slow = "until [ -e go ]; do sleep 0.02; done; echo slow"
    run = q.start("run", "-j", "2", slow, "echo fast; touch ended")
    q.wait_file("ended")
    wait_for(lambda: q.counts().get("completed") == 1)
    time.sleep(0.3)
    assert run.out == ""
    q.touch("go")
    assert run.wait() == 0 and run.out == "slow\nfast\n"
    (q.work / "go").unlink()
    run = q.start("run", "-j", "2", "--unordered", "--tag", slow, "echo fast")
    wait_for(lambda: run.out.endswith("\tfast\n"))
    q.touch("go")
    assert run.wait() == 0 and [line.partition("\t")[2] for line in run.out.splitlines()] == ["fast", "slow"]


def test_on_a_terminal_the_first_unfinished_job_is_shown_live(q: Queue) -> None:
    gated = "echo first; until [ -e go ]; do sleep 0.02; done; printf two"
    run = q.terminal("run", "-j", "2", gated, "echo \033[31mlast")
    wait_for(lambda: "first" in run.out)
    assert "last" not in run.out
    q.touch("go")
    assert run.wait() == 0
    shown = re.sub(r"\r\x1b\[K[^\r\n]*(?=\r)|\r\x1b\[K", "", run.out)
    assert "\n\\x1b[31mlast" in shown and re.search(r"first\r?\n.*two\r?\n.*last", shown, re.DOTALL)
    assert run.out.count("first") == 1


def test_a_run_whose_reader_leaves_stops(q: Queue) -> None:
    said = q.bash('queuectl run -j 1 --each "echo {}; sleep 0.05" $(seq 200) | head -n 2; echo "${PIPESTATUS[0]}"')
    assert said.out == "1\n2\n141\n"
    left = q.counts()["pending"]
    assert left > 100 and q.workers() == 0
    assert said.err == ""


@linux
def test_a_run_that_cannot_write_its_output_says_so(q: Queue) -> None:
    said = q.bash('queuectl run -j 1 --each "echo {}" $(seq 50) >/dev/full', code=1)
    assert "No space left" in said.err


def test_a_slow_reader_holds_up_no_job(q: Queue) -> None:
    run = 'queuectl run -j 2 --each "head -c 100000 /dev/zero; touch x{}" 1 2 3 4 5 6'
    q.bash(run + " | (while [ ! -e x6 ]; do sleep 0.05; done; wc -c >count)")
    assert q.lines("count") == ["600000"]


def test_output_of_a_run_is_kept_up_to_64_mib(q: Queue) -> None:
    said = q("run", "head -c 3000000 /dev/zero | tr '\\0' x")
    assert len(said.out) == 3_000_000
    q.set("max_output_bytes", "4096")
    said = q("run", "head -c 5000 /dev/zero | tr '\\0' x", "echo ok", code=1)
    assert said.out == "ok\n" and "too long to be kept whole" in said.err and "2 of 2 completed" in said.err


def test_fail_fast(q: Queue) -> None:
    jobs = ["until [ -e two ]; do sleep 0.02; done; exit 3", "touch two; sleep 1; echo end", *["touch ran"] * 2000]
    said = q("run", "-j", "2", "--fail-fast", "--max-retries", "1", *jobs, code=1)
    assert said.out == "end\n" and "1 of 2002 completed, 1 dead, 2000 cancelled" in said.err
    assert not (q.work / "ran").exists()
    cancelled = q.jobs("--state", "cancelled", "--limit", "1")[0]
    assert cancelled["last_error"] == "cancelled: another job of its run died"
    assert [queue["paused"] for queue in q.look("queue", "list")] == [False]
    assert "would cancel other jobs" in q.fails("run", "--fail-fast", "--queue", "x", "true", code=2).err


@linux
@pytest.mark.parametrize("place", ["recorded", "before turn"])
def test_fail_fast_holds_whoever_is_killed(q: Queue, place: str) -> None:
    words = ["run", "-j", "1", "--fail-fast", "--max-retries", "1", "exit 3", "touch ran"]
    assert start_to_be_killed(q, place, 2, *words).wait() == 1
    assert q.counts() == {"dead": 1, "cancelled": 1} and not (q.work / "ran").exists()


def test_a_run_in_the_background(q: Queue) -> None:
    said = q("run", "--detach", "-j", "2", "--each", "echo {}; until [ -e go ]; do sleep 0.02; done", *"abc")
    assert said.out == "run-1\n"
    assert "interrupted" not in q("run", "true").err
    follow = q.start("logs", "-f", "--queue", "run-1")
    wait_for(lambda: follow.out.count("\n") == 2)
    q.touch("go")
    q("wait", "--queue", "run-1")
    assert follow.wait() == 0
    ids = [job["id"] for job in q.jobs("--queue", "run-1")]
    for name, letter in zip(ids, "abc"):
        assert f"{name}\t{letter}\n" in follow.out and re.search(rf"{name}\t\[.* completed after ", follow.out)
    assert q("logs", "--stdout", "--queue", "run-1").out == "a\nb\nc\n"
    wait_for(lambda: q.workers() == 0)
    assert json.loads(q("run", "--detach", "--json", "true").out) == {"queue": "run-3", "jobs": 1}


def test_a_run_in_a_queue_of_others(q: Queue) -> None:
    q("queue", "set", "gpu", "--concurrency", "1")
    q.add("echo theirs; sleep 0.1", "--queue", "gpu")
    q.add("sleep 0.5", "--queue", "gpu", "--priority", "20")
    said = q("run", "-j", "2", "--queue", "gpu", "--each", "echo {} $QUEUECTL_SLOT", *"abc")
    assert said.out == "a 1\nb 1\nc 1\n" and "gpu: 3 of 3 completed" in said.err
    assert q.workers() == 0 and q.look("queue", "list")[0]["concurrency"] == 1


def test_a_run_takes_what_comes_by_a_pipe(q: Queue) -> None:
    source = "(echo a; while [ ! -e a ]; do sleep 0.02; done; echo b; echo c)"
    said = q.bash(source + ' | queuectl run -j 2 --each "echo {}; touch {}"')
    assert said.out == "a\nb\nc\n" and "run-1: 3 of 3 completed" in said.err
    bad = q.bash("printf 'echo one\\n{\"bad\":\\n echo two\\n' | queuectl run", code=2)
    assert bad.out == "one\n" and "line 2: " in bad.err and "1 of 1 completed" in bad.err
    assert q.bash("queuectl run </dev/null").err == "queuectl: there is nothing to run\n"


def test_delay_of_a_run_lies_between_starts(q: Queue) -> None:
    q("run", "-j", "4", "--delay", "300ms", "--each", "true", *"abc")
    first, second, third = q.jobs()
    second_at, third_at = (datetime.fromisoformat(job["run_at"][:-1]) for job in (second, third))
    assert first["run_at"] is None and (third_at - second_at).total_seconds() == pytest.approx(0.3, abs=0.001)
    assert second["started_at"] >= second["run_at"] and third["started_at"] >= third["run_at"]


def test_a_killed_supervisor_takes_its_reporter_along(q: Queue) -> None:
    run = q.start("run", "-j", "1", GATE)
    q.wait_file("started")
    run.signal(signal.SIGKILL)
    run.wait()
    q.touch("go")
    wait_for(lambda: q.processes() == [])


def test_wait_knows_what_a_detached_run_has_done_before(q: Queue) -> None:
    q("run", "--detach", "--max-retries", "1", "exit 3")
    wait_for(lambda: q.counts() == {"dead": 1})
    assert "is dead" in q("wait", "--queue", "run-1", code=1).err
    q("run", "--detach", "true")
    wait_for(lambda: q.counts() == {"dead": 1, "completed": 1})
    q("wait", "--queue", "run-2")
    q("wait")  # what ended in a run concerns who names it


@pytest.mark.parametrize("given, count", [("1", 1), ("100%", os.cpu_count() or 1), ("1%", 1)])
def test_how_many_workers(q: Queue, given: str, count: int) -> None:
    assert queuectl.workers_wanted(given) == count
    for wrong in ("0", "+1", "0%"):
        assert f'not "{wrong}"' in q.fails("run", "-j", wrong, "true", code=2).err


def test_a_summary_tells_causes(q: Queue) -> None:
    said = q("run", "--max-retries", "1", "--each", "echo no host {} >&2; exit 2", *map(str, range(7)), code=1)
    assert re.search(r"\n  7 dead: exit code 2: no host \d\n      such as ", said.err)
    assert q("run", "--quiet", "--max-retries", "1", "echo x; exit 1", code=1).out == ""


def test_resume_takes_as_many_workers_as_the_run_had(q: Queue) -> None:
    run = q.start("run", "-j", "3", "--each", "touch {}; until [ -e go ]; do sleep 0.02; done", *"abcdefgh")
    for name in "abc":
        q.wait_file(name)
    run.signal(signal.SIGKILL)
    run.wait()
    first = q.start("run", "--resume")
    wait_for(lambda: q.workers() == 6)  # those of the killed supervisor still run their jobs
    assert "no interrupted run" in q.fails("run", "--resume", "run-1").err  # it is taken
    q.touch("go")
    assert first.wait() == 0 and "run-1: 8 of 8 completed" in first.err
    assert q.look("queue", "list")[0]["concurrency"] == 3


def test_only_one_of_two_processes_resumes_a_run(q: Queue) -> None:
    run = interrupted(q, signal.SIGKILL)
    run.wait()
    wait_for(lambda: q.workers() == 0)
    both = [q.start("run", "--resume", "run-1") for _ in range(2)]
    assert sorted(run.wait() for run in both) == [0, 1]
    assert q.counts() == {"completed": 8}


def test_a_run_tells_that_no_worker_serves_a_job_it_waits_for(q: Queue) -> None:
    q.add("true", "--id", "first", "--queue", "mail")
    run = q.start("run", "--after", "first", "true")
    wait_for(lambda: "no worker serves its queue" in run.err)
    q.drain("--queue", "mail")
    assert run.wait() == 0


def test_jobs_of_a_run_that_end_when_they_are_added_count(q: Queue) -> None:
    q.add("exit 1", "--id", "dead", "--max-retries", "1")
    q.drain(code=1)
    for words in (["run"], ["run", "--quiet"]):
        said = q(*words, "--after", "dead", "true", code=1)
        assert "0 of 1 completed, 1 dead" in said.err
    lines = 'echo ok\n{"command": "true", "after": ["dead"]}\n'
    (q.work / "list").write_text(lines)
    for words in (["run", "--file", "list"], ["run", "--file", "-"]):
        said = q(*words, code=1, stdin=lines)
        assert said.out == "ok\n" and "1 of 2 completed, 1 dead" in said.err


def test_an_endless_input_is_refused(q: Queue) -> None:
    said = q.bash('yes | tr -d "\\n" | head -c 30000000 | queuectl run --each "echo {}"', code=2)
    assert "input 1 is longer than any command can be" in said.err and q.jobs() == []


@linux
def test_a_killed_reporter_stops_the_run(q: Queue) -> None:
    run = q.start("run", "-j", "1", GATE, "true x")
    q.wait_file("started")
    workers = {worker["pid"] for worker in q.look("worker", "list")}
    (reporter,) = set(children(run.process.pid)) - workers
    os.kill(reporter, signal.SIGKILL)
    with closing(sqlite3.connect(str(q.db), timeout=20)) as db:
        wait_for(lambda: db.execute("SELECT stop FROM pools").fetchone() == (1,), what="the order to stop")
    q.touch("go")
    assert run.wait() == 1 and "was killed" in run.err
    assert q.counts() == {"completed": 1, "pending": 1}


@pytest.mark.parametrize("options", [["--delay", "1s"], ["--run-at", "+1s"], ["--after", "first"]])
def test_a_run_in_the_background_waits_for_jobs_that_are_not_due(q: Queue, options: list[str]) -> None:
    q.add("until [ -e go ]; do sleep 0.02; done", "--id", "first", "--queue", "other")
    with q.working("--queue", "other"):
        q("run", "--detach", "-j", "1", *options, "true a", "true b")
        q.touch("go")
        q("wait", "--queue", "run-1", "--timeout", "30")
    wait_for(lambda: q.workers() == 0)


def test_a_run_in_the_background_whose_jobs_die_at_once_has_started(q: Queue) -> None:
    for number in (1, 2, 3):
        said = q("run", "--detach", "-j", "4", "--commands", "--max-retries", "1", *["false"] * 4)
        assert said.out == f"run-{number}\n"
    q.add("false", "--max-retries", "1")
    q("worker", "start", "--drain", env={"QUEUECTL_DRAIN": queuectl.DUE})  # as one in the background


def test_outputs_in_one_file_are_in_the_order_of_the_jobs(q: Queue) -> None:
    said = q.bash('queuectl run -j 1 --each "echo o{}; echo e{} >&2" 1 2 3 2>&1')
    assert said.out.startswith("o1\ne1\no2\ne2\no3\ne3\nrun-1: ")


@pytest.mark.parametrize("stop", ["kill -TERM $!", "queuectl worker stop"])
def test_a_run_that_is_stopped_while_its_input_goes_on_is_interrupted(q: Queue, stop: str) -> None:
    said = q.bash(f"""
        mkfifo pipe
        "{sys.executable}" "{PROGRAM}" run -j 1 --each 'touch {{}}' <pipe &
        exec 9>pipe
        echo ran >&9
        until [ -e ran ]; do sleep 0.02; done
        sleep 0.3
        {stop}
        wait $!
    """, code=130)  # fmt: skip
    assert "stopped before the input ended" in said.err and "1 of 1 completed" in said.err


def test_lines_before_one_that_can_not_be_added_are_worked_on(q: Queue) -> None:
    q.add("true", "--id", "a", "--delay", "1h")
    lines = 'echo 1\necho 2\n{"id": "a", "command": "true"}\necho 3\n'
    said = q.bash(f"printf '{lines}' | queuectl run -j 1", code=1)
    assert said.out == "1\n2\n" and "line 3: " in said.err and "2 of 2 completed" in said.err
    assert len(q.bash("head -c 50000 /dev/zero | tr '\\0' '\\377' | queuectl run --each true", code=2).err) < 400


def test_an_empty_input_is_a_tag_too(q: Queue) -> None:
    assert q("run", "-0", "--tag", "--each", "echo x{}", stdin="\0a\0").out == "\tx\na\txa\n"


@pytest.mark.parametrize("failing", [["changed"], ["jobs_between", "ended_between"]])
def test_outputs_that_can_not_be_read_at_the_end_are_an_error(
    q: Queue, monkeypatch: pytest.MonkeyPatch, failing: list[str]
) -> None:
    q("run", "echo hi")
    store = queuectl.Store(str(q.db))
    args = argparse.Namespace(store=store, quiet=False, json=False, tag=False, unordered=False, pipe=0, drain=True)
    batch = queuectl.Batch("run-1", 0, 1, dict.fromkeys(queuectl.STATES, 0), 0)
    reporter = queuectl.Reporter(args, batch, None)

    def unreadable(*_: Any) -> Any:
        raise queuectl.Unavailable("locked")

    for name in failing:
        monkeypatch.setattr(store, name, unreadable)
    reporter._look(False)
    assert not reporter._is_done()
    with pytest.raises(queuectl.Unavailable):
        reporter._look(True)
    store.close()


# logs


@pytest.mark.parametrize("output", [b"", b"\n", b"a", b"a\n", b"\n\n", b"a\nb", b"a\n\nb\n"])
def test_the_last_lines(output: bytes) -> None:
    for count in range(1, 5):
        wanted = output.splitlines(True)[-count:]
        assert queuectl.last_lines(output, count) == b"".join(wanted)


def test_a_long_output_is_shown_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[bytes] = []
    monkeypatch.setattr(queuectl, "emit_bytes", lambda data, _stream: parts.append(data))
    queuectl.emit_output(b"x\n" * 2_000_000 + b"end", tag="t")
    assert b"".join(parts) == b"t\tx\n" * 2_000_000 + b"t\tend"
    assert max(map(len, parts)) < 4_000_000


def test_logs_of_a_stream_are_those_of_the_newest_run(q: Queue) -> None:
    job = q.add("echo $QUEUECTL_ATTEMPT; [ $QUEUECTL_ATTEMPT = 2 ]", "--backoff-base", "0.1", "--id", "a")
    q.add("echo b", "--id", "b")
    q.add("true", "--id", "never", "--delay", "1h")
    q.drain()
    assert q("logs", "--stdout", job).out == "2\n"
    assert q("logs", "--stdout", "--attempt", "1", job).out == "1\n"
    assert q("logs", "--stdout", "--all").out == "2\nb\n"
    assert [(run["job"], run["stdout"]) for run in q("logs", "--json", "a", "b", "never").json()] == [
        ("a", "1\n"), ("a", "2\n"), ("b", "b\n")]  # fmt: skip
    assert [run["job"] for run in q.show("a")["runs"]] == ["a", "a"]


def test_logs_of_many_jobs(q: Queue) -> None:
    q.load([{"id": name, "command": f"seq 9; printf {name} >&2"} for name in ("a", "b")])
    q.add("true", "--id", "never", "--delay", "1h", "--queue", "later")
    q.drain()
    text = q("logs", "--queue", "default").out
    assert text.count("Logs for job ") == 2 and text.count("Average runtime") == 2
    assert "Average" not in q("logs", "never").out
    assert q("logs", "--tag", "-n", "2", "a", "b").out == "a\t8\na\t9\na\ta\nb\t8\nb\t9\nb\tb\n"
    assert q("logs", "--stdout", "--tail", "1", "b", "a", "b").out == "9\n9\n"
    q.fails("logs", code=2)
    q.fails("logs", "a", "--queue", "default", code=2)
    q.fails("logs", "a", "nobody")


def test_following_does_not_glue_lines_nor_tear_characters(q: Queue) -> None:
    q.add("printf '\\303'; touch torn; until [ -e go ]; do sleep 0.02; done; printf '\\251'", "--id", "a")
    with q.working():
        follow = q.terminal("logs", "-f", "a")
        q.wait_file("torn")
        time.sleep(0.3)
        q.touch("go")
        assert follow.wait() == 0
    assert re.search(r"\u00e9\r?\n\[.* completed after ", follow.out) and "\ufffd" not in follow.out


def test_following_a_job_that_is_deleted(q: Queue) -> None:
    q.add("true", "--id", "a", "--delay", "1h")
    q.add("true", "--id", "b", "--delay", "1h")
    one, both = q.start("logs", "-f", "a"), q.start("logs", "--follow", "a", "b")
    time.sleep(0.3)
    q("delete", "a")
    assert one.wait() == 1 and "1 job deleted meanwhile" in one.err
    q("cancel", "b")
    assert both.wait() == 1


def test_following_begins_with_the_tail(q: Queue) -> None:
    q.add("seq 20; until [ -e go ]; do sleep 0.02; done; seq 21 30", "--id", "a")
    with q.working():
        q.wait_state("a", "processing")
        wait_for(lambda: "20" in q("logs", "--stdout", "a").out.split())
        follow = q.start("logs", "-f", "--stdout", "--tail", "2", "a")
        wait_for(lambda: follow.out == "19\n20\n")
        q.touch("go")
        assert follow.wait() == 0
    assert follow.out.split() == [str(number) for number in range(19, 31)]


LOST = "lost " * 20 + "\n"
TRUNCATES = f"echo '{LOST[:-1]}'; touch a; until [ -e go ]; do sleep 0.02; done; echo kept >/dev/stdout; echo end"


def test_an_output_that_its_job_truncates_is_marked(q: Queue) -> None:
    q.add(TRUNCATES, "--id", "a")
    with q.working():
        follow = q.start("logs", "-f", "--stdout", "a")
        wait_for(lambda: follow.out == LOST)
        time.sleep(0.7)  # a look of the worker
        q.touch("go")
        assert follow.wait() == 0
    mark = queuectl.EMPTIED.decode()
    assert q.show("a")["runs"][0]["stdout"] == mark + "kept\nend\n"
    assert follow.out in (LOST + mark + "kept\nend\n", LOST + "kept\nend\n")


def test_a_run_of_an_output_that_is_truncated_says_so(q: Queue) -> None:
    q.touch("go")
    said = q("run", TRUNCATES.replace("touch a", "sleep 0.8"))
    assert said.out == "kept\nend\n" and "has truncated its stdout" in said.err


def test_offsets_do_not_outlive_a_truncated_output(tmp_path: Path) -> None:
    slot = queuectl.OutputFiles(str(tmp_path / "x"), "w", 0)
    (tmp_path / "x.d").mkdir()
    assert slot.open()
    os.write(slot.fds[0], b"x" * 1_000_000)
    slot.bound(4096)
    os.truncate(slot.paths[0], 0)
    os.write(slot.fds[0], b"y" * 400_000)
    slot.bound(4096)
    assert os.stat(slot.paths[0]).st_blocks * 512 < 100_000 or not LINUX
    out, _ = slot.read(4096)
    assert out.startswith(queuectl.EMPTIED + b"y") and b"bytes left out here" in out
    slot.close()


def test_an_output_that_is_empty_just_now_has_no_news(tmp_path: Path) -> None:
    """The mark would come twice: the next look, or the record, brings it."""
    path = tmp_path / "out"
    path.write_bytes(b"")
    with path.open("rb+", buffering=0) as file:
        assert queuectl.output_from(file.fileno(), 100, 1000) == (b"", 100)
        file.write(b"kept")
        assert queuectl.output_from(file.fileno(), 100, 1000) == (queuectl.EMPTIED + b"kept", 4)


@pytest.mark.parametrize("size, limit", [(10, 10), (11, 10), (4097, 4096), (10**6, 1024)])
def test_where_the_gap_is(tmp_path: Path, size: int, limit: int) -> None:
    path = tmp_path / "out"
    path.write_bytes(bytes(i % 251 for i in range(size)))
    with path.open("rb") as file:
        output = queuectl.head_and_tail(file.fileno(), limit)
    assert (queuectl.gap_of(output) >= 0) == (size > limit)
    if size > limit:
        assert output[queuectl.gap_of(output) :].startswith(b"\n[queuectl: ")


# service, completion


def test_the_unit_of_the_service(q: Queue, tmp_path: Path) -> None:
    odd = tmp_path / 'a "b" 100% $HOME'
    odd.mkdir()
    db = odd / "queue.db"
    user = q("service", "--count", "3", "--queue", "mail", "--db", str(db)).out
    assert "KillMode=mixed\n" in user and "WantedBy=default.target\n" in user and "User=" not in user
    system = q("service", "--system").out
    assert "User=" in system and "WantedBy=multi-user.target\n" in system
    start = re.search(r"^ExecStart=(.*)$", user, re.MULTILINE)
    assert start
    words = shlex.split(start[1].replace("%%", "%").replace("$$", "$"))
    q.add("true", "--id", "a", "--queue", "mail")
    q("backup", str(db))
    pool = q.launch(words)  # what systemd would start
    wait_for(lambda: json.loads(q("status", "--json", "--db", str(db)).out)["jobs"]["completed"] == 1)
    assert "Starting 3 workers" in pool.out
    pool.stop()
    if not shutil.which("systemd-analyze"):
        pytest.skip("there is no systemd-analyze to ask")
    for name, text in (("user.service", user), ("system.service", system)):
        (tmp_path / name).write_text(text)
        assert q.run(["systemd-analyze", "verify", tmp_path / name]).code == 0


@pytest.mark.parametrize(
    "words, wanted, unwanted",
    [
        ("queuectl wor", "worker", "wait"),
        ("queuectl ''", "run dlq", "--db"),
        ("queuectl --d", "--db", "dlq"),
        ("queuectl help lo", "logs", "--help"),
        ("queuectl nonsense ''", "", "run"),
        ("queuectl worker st", "start stop", "list"),
        ("queuectl worker start --d", "--detach --drain --db", "--count"),
        ("queuectl --db x/x.db list --st", "--state", "--json"),
        ("queuectl --db x/x.db show ''", "--env", "job-one"),
        ("queuectl show --db = x/x.db --e", "--env", "job-one"),
        ("queuectl enqueue --file ''", "", "--id"),
        ("queuectl list --db ''", "", "--state"),
        ("queuectl list --state p", "pending processing", "dead"),
        ("queuectl list --state = p", "pending processing", "dead"),
        ("queuectl list --state dead,p", "dead,pending dead,processing", "dead,dead"),
        ("queuectl list --queue ''", "mail", "$(touch"),
        ("queuectl queue pause m", "mail", "default"),
        ("queuectl completion ''", "bash zsh fish", "job-one"),
        ("queuectl enqueue --if-exists ''", "fail skip", "--id"),
        ("queuectl config set keep", "keep_completed keep_dead", "priority"),
        ("queuectl show ''", "job-one job-two", "$(touch"),
        ("queuectl dlq retry job-t", "job-two", "job-one"),
        ("queuectl enqueue --after job-o", "job-one", "job-two"),
        ("queuectl status ''", "--watch", "job-one"),
    ],
)
def test_completion_answers(q: Queue, words: str, wanted: str, unwanted: str) -> None:
    hostile = ["$(touch${IFS}pwned)", "`touch`"]
    q.load([{"id": name, "command": "true", "queue": "mail"} for name in ("job-one", "job-two", *hostile)])
    said = q.here(["completion", "--answer", "--", *shlex.split(words)[1:]]).out.split()
    assert set(wanted.split()) <= set(said) and unwanted not in said
    assert not (q.work / "x").exists()


# Each shell is asked what it makes of two command lines.
ASKING = {
    "bash": """
        eval "$(queuectl completion)"
        for last in job-o ""; do
            COMP_WORDS=(queuectl show "$last"); COMP_CWORD=2; _queuectl; echo "${COMPREPLY[@]}"
        done""",
    "zsh": """
        compdef() { }
        compadd() { echo "${@[2,-1]}" }
        _files() { echo }
        eval "$(queuectl completion zsh)"
        for last in job-o ""; do words=(queuectl show "$last"); CURRENT=3; _queuectl; done""",
    "fish": """
        queuectl completion fish | source
        for last in job-o ''; echo (complete -C "queuectl show $last"); end""",
}


@pytest.mark.parametrize("shell", ASKING)
def test_a_shell_completes(q: Queue, shell: str) -> None:
    if not shutil.which(shell):
        pytest.skip(f"there is no {shell} here")
    q.load([{"id": name, "command": "true"} for name in ("job-one", "job-two", "$(touch${IFS}pwned)")])
    launcher = q.home / "bin" / "queuectl"
    launcher.parent.mkdir()
    launcher.write_text('#!/bin/sh\nexec %s "$@"\n' % shlex.join(map(str, q.program)))
    launcher.chmod(0o755)
    path = f"{launcher.parent}:{os.environ['PATH']}"
    said = q.run([shell, "-c", ASKING[shell]], env={"PATH": path})
    assert said.code == 0 and said.out == "job-one\njob-one job-two\n" and not said.err
    assert not (q.work / "pwned").exists()


def test_completion_knows_three_shells(q: Queue) -> None:
    assert 'not for "tcsh"' in q.fails("completion", "tcsh", code=2).err


# =====================================================================================================
# cancelled, selections, mending: what the person on call needs at three in the morning
# =====================================================================================================


def test_a_cancelled_job_is_in_no_way_dead(q: Queue) -> None:
    q.add("exit 3", "--id", "bad", "--max-retries", "1")
    q.add("true", "--id", "nightly", "--delay", "5h")
    q.add("true", "--id", "after", "--after", "nightly")
    run_at = q.show("nightly")["run_at"]
    assert q("cancel", "nightly").out == "Cancelled: nightly\n"
    q.drain(code=1)
    assert q.states() == {"bad": "dead", "nightly": "cancelled", "after": "cancelled"}
    assert q.show("after")["last_error"] == "nightly was cancelled, and this job was to run after it"
    assert [job["id"] for job in q.look("dlq", "list")] == ["bad"]
    assert "is cancelled" in q.fails("dlq", "retry", "nightly").err
    assert q("dlq", "retry", "--all").out == "Queued again: 1 job\n"
    assert "in 4h" not in q("list", "--state", "cancelled").out and " ago" in q("list", "--state", "cancelled").out
    assert "cancelled:  2" in q("status").out and q.counts() == {"pending": 1, "cancelled": 2}
    q("dlq", "purge")
    assert q("wait", "nightly", code=1).err.startswith("queuectl: nightly is cancelled")
    q("retry", "nightly", "--with-dependents")
    assert q.show("nightly")["run_at"] == run_at and q.state("nightly") == "pending"
    assert "it is scheduled in 4h" in q("why", "nightly").out
    q.drain(code=1)
    assert q.state("nightly") == "pending"  # it keeps its time
    q("doctor")


def test_a_drain_with_a_cancelled_job_is_no_success(q: Queue) -> None:
    q.add(HANG, "--id", "a")
    pool = q.start("worker", "start", "--drain")
    q.wait_file("started")
    q("cancel", "a")
    assert pool.wait() == 1 and q.state("a") == "cancelled"


def test_names_of_runs_are_used_once(q: Queue) -> None:
    q("run", "--max-retries", "1", "false", code=1)
    assert q("run", "true").err.startswith("run-2: 1 of 1 completed")
    assert [job["queue"] for job in q.jobs()] == ["run-1", "run-2"]
    q("purge", "--state", "dead,completed")
    assert q("run", "true").err.startswith("run-3: ")
    assert "belongs to a run" in q.fails("enqueue", "--queue", "run-4", "true", code=2).err
    change(q, "INSERT INTO queues (name, concurrency) VALUES ('run-4', 1)")
    assert q("run", "true").err.startswith("run-5: ")


def test_a_pause_of_all_is_one_of_its_own(q: Queue) -> None:
    q.add("true", "--queue", "mail")
    q("queue", "pause", "mail")
    q("queue", "pause")
    q("queue", "resume")
    assert "Paused: mail" in q("status").out
    assert [queue["paused"] for queue in q.look("queue", "list")] == [True]
    q("queue", "resume", "mail")
    assert "Paused" not in q("status").out


def test_a_queue_that_has_nothing_is_forgotten(q: Queue) -> None:
    q.add("true", "--id", "a", "--queue", "x")
    q("queue", "set", "y", "--concurrency", "2")
    q("delete", "a")
    assert [queue["name"] for queue in q.look("queue", "list")] == ["y"]
    q("queue", "set", "y", "--concurrency", "none")
    assert q.look("queue", "list") == []


def test_finished_queues_cost_claims_nothing(store: Any) -> None:
    plan = "EXPLAIN QUERY PLAN " + queuectl.next_job(0)
    assert any("queues_busy" in row[3] for row in store.db.execute(plan))


SELECTABLE = [
    {"id": "a", "command": "echo alpha; exit 1", "max_retries": 1, "queue": "mail"},
    {"id": "b", "command": "echo 'no such host' >&2; exit 2", "max_retries": 1, "queue": "mail"},
    {"id": "c", "command": "echo 'no such host' >&2; exit 2", "max_retries": 1, "queue": "web"},
    {"id": "d", "command": "echo delta", "queue": "web"},
    {"id": "e", "command": "echo alpha", "delay": "1h"},
]


@pytest.fixture
def varied(q: Queue) -> Queue:
    """Jobs of two queues, dead for two reasons, completed and waiting."""
    q.load(SELECTABLE)
    q.drain(code=1)
    return q


@pytest.mark.parametrize(
    "options, names",
    [
        (["--state", "dead,completed"], "abcd"),
        (["--queue", "mail,web", "--state", "dead"], "abc"),
        (["--queue", "mail", "--queue", "web", "--grep", "delta"], "d"),
        (["--grep", "alpha"], "ae"),
        (["--error", "no such host"], "bc"),
        (["--error", "no such host", "--queue", "web"], "c"),
        (["--since", "1h"], "abcde"),
        (["--before", "1h"], ""),
        (["--older-than", "1h"], ""),
        (["--since", "2999-01-01"], ""),
        (["--before", "2999-01-01T00:00:00Z", "--grep", "echo alpha"], "ae"),
        (["--grep", "%"], ""),
    ],
)
def test_jobs_are_selected(varied: Queue, options: list[str], names: str) -> None:
    found = [job["id"] for job in varied.jobs(*options)]
    assert found == list(names)
    said = varied("retry", *options, "--dry-run", "--json")
    dead = set(found) & set("abc")  # of others only those in states that are named
    assert {job["id"] for job in said.json()} == (set(found) if "completed" in str(options) else dead)


def test_what_a_selection_changes(varied: Queue) -> None:
    before = varied.states()
    said = varied("retry", "--error", "no such host", "--dry-run")
    assert "2 jobs" in said.err and varied.states() == before
    assert varied("dlq", "retry", "--error", "no such host").out == "Queued again: 2 jobs\n"
    assert varied("edit", "--state", "pending", "--queue", "x", "--priority", "3").out == "Changed: 3 jobs\n"
    assert {(job["queue"], job["priority"]) for job in varied.jobs("--state", "pending")} == {("x", 3)}
    cancelled = varied("cancel", "--all", "--json").json()
    assert {job["id"]: job["state"] for job in cancelled} == dict.fromkeys("bce", "cancelled")
    assert varied("delete", "--state", "cancelled", "--grep", "host").out == "Deleted: 2 jobs\n"
    assert varied("delete", "--state", "completed", "--json").json()[0]["id"] == "d"
    assert set(varied.states()) == {"a", "e"}
    assert varied("wait", "--queue", "mail").out == ""
    varied("doctor")


@pytest.mark.parametrize(
    "words",
    [
        ["retry"], ["cancel"], ["delete"], ["edit", "--priority", "1"], ["retry", "a", "--all"],
        ["retry", "a", "--queue", "mail"], ["retry", "--state", "pending"], ["cancel", "--state", "dead"],
        ["delete", "--state", "processing"], ["list", "--state", "nope"], ["list", "--since", "5"],
        ["list", "--before", "yesterday"], ["purge", "--state", "processing"], ["edit", "a"],
    ],
)  # fmt: skip
def test_what_is_no_selection(varied: Queue, words: list[str]) -> None:
    before = varied.jobs()
    varied.fails(*words, code=2)
    assert varied.jobs() == before


def test_a_command_asks_before_it_changes_many_jobs(q: Queue) -> None:
    q.load(["true"] * 3)
    for answer, states in (("n", {"pending"}), ("y", {"cancelled"})):
        terminal = q.terminal("cancel", "--all")
        wait_for(lambda: "Go on?" in terminal.out)  # noqa: B023
        terminal.type(answer + "\n")
        assert terminal.wait() == (1 if answer == "n" else 0)
        assert set(q.states().values()) == states
    q("retry", "--all")
    assert "Cancelled: 3 jobs" in q.at_terminal("cancel", "--all", "--yes")


def test_a_selection_leaves_what_changed_meanwhile(store: Any) -> None:
    for name in "abc":
        put(store, id=name)
    looked = store.look(queuectl.Selection(("pending",)))
    put(store, id="new")
    taken = take(store)
    with store.transaction():
        store.cancel_waiting(store.find("b")["seq"], NOW + 5)
    changed = store.change_each(looked, lambda job: store.cancel_waiting(job["seq"], NOW + 9))
    assert [store.find_by_seq(seq)["id"] for seq in changed] == ["c"] and taken.id == "a"
    assert store.find("new")["state"] == "pending"


def test_a_change_of_many_lets_others_write(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(50):
        put(store)
    monkeypatch.setattr(queuectl, "SLICE", 0)
    transactions: list[int] = []
    begin = store.begin
    monkeypatch.setattr(store, "begin", lambda *args: (transactions.append(1), begin(*args)))
    looked = store.look(queuectl.Selection())
    assert len(store.change_each(looked, lambda job: store.cancel_waiting(job["seq"], NOW))) == 50
    assert len(transactions) == 50


def test_a_chain_is_taken_along_in_slices_and_after_a_crash(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"c{n}" for n in range(40)]
    for before, name in zip(["", *names], names):
        put(store, id=name, after=[before] if before else [])
    monkeypatch.setattr(queuectl, "SLICE", 0)  # each step is a transaction of its own
    with store.transaction():
        store.cancel_waiting(store.find("c0")["seq"], NOW)
    assert store.counts()["cancelled"] == 2 and store.pulse()[2]
    assert store.settle(NOW) and not store.pulse()[2]
    assert store.counts()["cancelled"] == 40
    assert store.find("c39")["last_error"] == "c0 was cancelled, and this job was to run after it"


def test_a_job_retried_meanwhile_is_not_taken_along(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one process had left to do, another has done; and then it was undone."""
    for before, name in (("", "a"), ("a", "b"), ("b", "c")):
        put(store, id=name, after=[before] if before else [])
    other = queuectl.Store(store.path)
    monkeypatch.setattr(queuectl, "SLICE", 0)
    with store.transaction():
        store.cancel_waiting(store.find("a")["seq"], NOW)
    assert store.unsettled and other.settle(NOW)
    with other.transaction():
        assert all(other.retry(other.find(name)["seq"], NOW) for name in "abc")
    assert not store.settle(NOW) and store.counts()["pending"] == 3
    other.close()


def test_a_failed_job_can_be_made_to_wait_for_another(q: Queue) -> None:
    q.add("echo f >>order; [ -e mended ]", "--id", "f", "--backoff-base", "0.1")
    q.add("echo x >>order", "--id", "x", "--delay", "1h")
    q.set("max_retries", "9")
    q("worker", "start", "--max-jobs", "1")
    assert q.state("f") == "failed"
    q("edit", "f", "--after", "x")
    q.touch("mended")
    q.drain()
    assert (q.state("f"), q.lines("order")) == ("pending", ["f"])
    q("edit", "x", "--run-at", "now")
    q.drain()
    assert q.lines("order") == ["f", "x", "f"] and q.show("f")["attempts"] == 2
    q("doctor")


def test_thousands_expire_together(q: Queue) -> None:
    q.load(["echo ran >>ran"] * 2500, "--expires", "+1s")
    time.sleep(1.1)
    q.drain(code=1)
    assert q.counts() == {"cancelled": 2500} and q.lines("ran") == []


@pytest.mark.parametrize("option", ["--command", "--queue", "--cwd", "--priority", "--max-retries", "--timeout"])
def test_an_empty_value_is_no_edit(q: Queue, option: str) -> None:
    q.add("true", "--id", "a")
    before = q.show("a")
    q.fails("edit", "a", option, "", code=2)
    assert q.show("a") == before


def test_the_command_of_a_cause_keeps_to_the_selection(q: Queue) -> None:
    q.load([{"command": "echo boom >&2; exit 1", "max_retries": 1, "queue": name} for name in "ab"])
    q.drain(code=1)
    (cause,) = q("dlq", "list", "--causes", "--queue", "a", "--json").json()
    assert "--queue a" in cause["retry"]
    q.bash(cause["retry"])
    assert [job["queue"] for job in q.jobs("--state", "pending")] == ["a"]


def test_the_command_of_a_cause_retries_what_died_with_a_job_of_another_queue(q: Queue) -> None:
    q.load([{"id": "a", "command": "false", "max_retries": 1, "queue": "a"},
            {"id": "b", "command": "true", "after": ["a"], "queue": "b"}])  # fmt: skip
    q.drain(code=1)
    (cause,) = q("dlq", "list", "--causes", "--queue", "b", "--json").json()
    assert (cause["count"], cause["after"]) == (0, 1)
    q("dlq", "retry", "a")
    q.bash(cause["retry"])
    assert q.states() == {"a": "pending", "b": "pending"}


def test_what_a_selection_cannot_change_is_not_told_as_changed(q: Queue) -> None:
    q.load([{"id": "p1", "command": "true"}, {"id": "p2", "command": "true", "after": ["p1"]},
            {"id": "p3", "command": "true", "after": ["p2"]}])  # fmt: skip
    said = q("cancel", "--grep", "p1")
    assert said.out == "Cancelled: 1 job\n" and "cancelled with them: 2 jobs" in said.err
    assert q("retry", "--grep", "p3").out == "Queued again: 0 jobs\n" and q.counts() == {"cancelled": 3}
    assert q("retry", "--grep", "p1", "--with-dependents").out == "Queued again: 3 jobs\n"
    q("edit", "p1", "--after", "")
    q.load([{"id": "o1", "command": "true", "delay": "1h"}, {"id": "o2", "command": "true", "delay": "1h"}])
    q("edit", "o1", "--after", "o2")
    assert [job["id"] for job in q("delete", "--state", "pending", "--grep", "o", "--json").json()][:1] == ["o1"]
    assert q("delete", "o2").out == "Deleted: o2\n"
    q.load([{"id": "o1", "command": "true", "delay": "1h"}, {"id": "o2", "command": "true", "delay": "1h"}])
    q("edit", "o1", "--after", "o2")
    assert set(q("delete", "o1", "o2").out.split()) == {"Deleted:", "o1", "o2"}
    q("doctor")


def test_who_has_ended_holds_up_no_deletion(q: Queue) -> None:
    q.add("true", "--id", "a")
    q.drain()
    q.add("true", "--id", "b", "--delay", "1h")
    q("edit", "a", "--after", "b")
    q("cancel", "b")
    assert q("delete", "b").out == "Deleted: b\n"
    q("doctor")


def test_the_dead_letter_queue_is_read_in_pages(store: Any) -> None:
    for n in range(2500):
        put(store, id=f"j{n}")
    with store.transaction():
        store.execute("UPDATE jobs SET state = 'dead', ready = 0, finished_at = 1000 + seq % 7")
    statements: list[str] = []
    store.db.set_trace_callback(statements.append)
    names = [job["id"] for job in store.last_to_die(queuectl.Selection(), queuectl.NEVER)]
    store.db.set_trace_callback(None)
    plans = [row[3] for row in store.db.execute("EXPLAIN QUERY PLAN " + statements[0])]
    assert not any("TEMP B-TREE" in plan for plan in plans), plans
    assert len(names) == len(set(names)) == 2500
    ends = [(job["finished_at"], job["seq"]) for job in store.last_to_die(queuectl.Selection(), 2200)]
    assert len(ends) == 2200 and ends == sorted(ends, reverse=True)


def test_dead_jobs_with_three_causes(q: Queue) -> None:
    jobs: list[Job] = []
    for n in range(5):
        jobs.append({"id": f"x{n}", "command": f"echo \"open '/data/{n}.csv': No such file\" >&2; exit 1"})
    for n in range(3):
        jobs.append({"id": f"y{n}", "command": f"echo 'host{n}.example.org port {n}: Connection refused' >&2; exit 1"})
    jobs += [{"id": "z", "command": "exit 7"}, {"id": "last", "command": "true", "after": ["x0"]}]
    q.load([{"max_retries": 1, **job} for job in jobs])
    q.drain(code=1)
    causes = q("dlq", "list", "--causes", "--json").json()
    assert [(cause["count"], cause["after"]) for cause in causes] == [(5, 1), (3, 0), (1, 0)]
    assert "No such file" in causes[0]["cause"] and "/data" not in causes[0]["cause"]
    assert all(set(cause) == {"cause", "count", "after", "since", "example", "retry"} for cause in causes)
    shown = q("dlq", "list", "--causes").out
    assert "5 and 1 after it" in shown and "Connection refused" in shown
    for cause, names in zip(causes, (["x0", "x1", "x2", "x3", "x4"], ["y0", "y1", "y2"], ["z"])):
        q.bash(cause["retry"])
        assert [job["id"] for job in q.jobs("--state", "pending")] == names
        q("cancel", "--all")


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("exit code 1: KeyError: 'a'", "exit code 1: KeyError: 'b'", True),
        ("exit code 1: /a/b.txt: gone", "exit code 1: /c/d/e.txt: gone", True),
        ("exit code 1: a.csv: gone", "exit code 1: b.csv: gone", True),
        ("exit code 1: took 5.2 s", "exit code 1: took 17 s", True),
        ("exit code 1: at 0x7f3a", "exit code 1: at 0x9b", True),
        ("exit code 1", "exit code 2", False),
        ("exit code 1: gone", "exit code 1: refused", False),
        ("timed out after 5s", "timed out after 7s", True),
    ],
)
def test_causes_that_differ_in_numbers_paths_and_names_are_one(one: str, other: str, same: bool) -> None:
    assert (queuectl.cause_of(one) == queuectl.cause_of(other)) == same


def test_a_wrong_command_in_a_chain_can_be_edited(q: Queue) -> None:
    q.add("exit 3", "--id", "a", "--max-retries", "1")
    q.add("echo b >>order", "--id", "b", "--after", "a")
    q.drain(code=1)
    q("edit", "a", "--command", "echo a >>order", "--env", "X=1", "--cwd", "/", "--dead-on", "4", "--retry-after", "9s")
    shown = q.show("a")
    assert (shown["command"], shown["cwd"], shown["env"]) == ("echo a >>order", "/", {"X": "1"})
    assert (shown["dead_on"], shown["retry_after"], shown["state"]) == ([4], 9, "dead")
    q("edit", "a", "--cwd", str(q.work), "--dead-on", "", "--retry-after", "none")
    assert (q.show("a")["dead_on"], q.show("a")["retry_after"]) == ([], None)
    q("retry", "a", "--with-dependents")
    q.drain()
    assert q.lines("order") == ["a", "b"] and after(q, "b") == ["a"]
    q("doctor")


def test_what_a_job_runs_after_is_edited(q: Queue) -> None:
    q.load([{"id": name, "command": f"echo {name} >>order"} for name in "abc"])
    q("edit", "a", "--after", "c")
    q("edit", "b", "--after", "a")
    for words in (["c", "--after", "b"], ["c", "--after", "c"], ["a", "--after-any", "b"]):
        assert "itself" in q.fails("edit", *words).err
    assert after(q, "c") == [] and "after a" in q("list").out
    q.drain()
    assert q.lines("order") == ["c", "a", "b"]
    q.add("true", "--id", "d", "--after", q.add("true", "--delay", "1h"))
    q("edit", "d", "--after", "")
    q.drain()
    assert q.state("d") == "completed"


def test_fewer_retries_than_were_used_up(q: Queue) -> None:
    q.add("exit 3", "--id", "a", "--backoff-base", "3000")
    q.add("true", "--id", "b", "--after", "a")
    with q.working():
        q.wait_state("a", "failed")
    q("edit", "a", "--max-retries", "1")
    assert q.states() == {"a": "dead", "b": "dead"} and len(q.show("a")["runs"]) == 1
    q("doctor")


def test_the_time_out_of_a_running_job_is_edited(q: Queue) -> None:
    q.add(HANG, "--id", "a", "--max-retries", "1")
    with q.working():
        q.wait_file("started")
        q("edit", "a", "--timeout", "100ms")
        q.wait_state("a", "dead")
    assert q.show("a")["last_error"].startswith("timed out after 0.1s")


def test_a_key_that_was_used_twice_moves_to_another_queue(q: Queue, other: Queue) -> None:
    for n in range(2):
        q.add("true", "--unique", "k", "--id", f"a{n}")
        q.drain()
    other("enqueue", "--file", "-", stdin=q("list", "--json").out)
    assert [job["unique"] for job in other.jobs()] == [None, None]


def test_after_any_waits_for_any_end(q: Queue) -> None:
    q.add("exit 1", "--id", "a", "--max-retries", "1")
    q.add("true", "--id", "b", "--delay", "1h")
    q.add("echo c >>order", "--id", "c", "--after-any", "a,b")
    q.add("echo d >>order", "--id", "d", "--after-any", "a", "--after", "b")
    assert q.show("c")["after_any"] == ["a", "b"] and "after a,b" in q("list").out
    q.drain(code=1)
    assert q.states()["c"] == "pending"
    q("cancel", "b")
    q.drain(code=None)
    assert q.states() == {"a": "dead", "b": "cancelled", "c": "completed", "d": "cancelled"}
    q("enqueue", "--id", "e", "--after-any", "a,b", "echo e >>order")
    q.drain()
    assert q.lines("order") == ["c", "e"]
    q("doctor")


def test_a_job_that_could_not_begin_in_time_expires(q: Queue) -> None:
    q.add("echo ran >>ran", "--id", "late", "--expires", "+200ms")
    q.add("echo ran >>ran", "--id", "in-time", "--expires", "+1h")
    q.add("true", "--id", "after", "--after", "late")
    assert TIME.fullmatch(q.show("late")["expires_at"])
    time.sleep(0.3)
    q.drain(code=1)
    assert q.states() == {"late": "cancelled", "in-time": "completed", "after": "cancelled"}
    assert "expired" in q.show("late")["last_error"] and q.lines("ran") == ["ran"]
    q("enqueue", '{"id": "idle", "command": "true", "queue": "none", "expires": "+300ms"}')
    with q.working("--queue", "default"):
        q.wait_state("idle", "cancelled")  # also where nobody serves its queue
    assert q("retry", "idle").out == "Queued again: idle\n" and q.show("idle")["expires_at"] is None


def test_each_running_job_of_a_queue_has_a_slot(q: Queue) -> None:
    q("queue", "set", "gpu", "--concurrency", "3")
    command = "mkdir slot-$QUEUECTL_SLOT && sleep 0.1; rmdir slot-$QUEUECTL_SLOT && echo $QUEUECTL_SLOT >>slots"
    q.load([{"command": command, "queue": "gpu", "max_retries": 1} for _ in range(12)])
    q.drain("--count", "5")
    assert sorted(set(q.lines("slots"))) == ["1", "2", "3"]


def test_a_script_is_enqueued_from_stdin(q: Queue) -> None:
    q("enqueue", "--id", "a", "-", stdin="echo one\ncat <<END\n{two}\nEND\n")
    q.drain()
    assert q("logs", "a", "--stdout").out == "one\n{two}\n"
    q.fails("enqueue", "-", stdin="", code=2)


def test_wait_says_what_holds_it_up_and_ends_in_time(q: Queue) -> None:
    said = q("enqueue", "--wait-timeout", "300ms", "true", code=124)
    assert "no worker is running" in said.err
    q.add("true", "--queue", "mail", "--id", "m")
    with q.working("--queue", "default"):
        assert "serves its queue" in q("wait", "m", "--timeout", "300ms", code=124).err
        q("queue", "pause")
        q.add("true", "--id", "p")
        assert "paused" in q("wait", "p", "--timeout", "300ms", code=124).err


def test_an_environment_is_kept_once_and_goes_with_the_last_job(q: Queue) -> None:
    for n in range(3):
        (q.work / str(n)).mkdir()
        q("enqueue", "--id", f"j{n}", "--env-all", "true", cwd=q.work / str(n))
    q("enqueue", "--id", "plain", "true")
    q("edit", "plain", "--cwd", str(q.work / "0"))
    kept = [select(q, f"SELECT count(*) AS n FROM {table}")[0]["n"] for table in ("environments", "contexts")]
    assert kept == [1, 4]
    q("delete", "--all", "--state", "pending")
    kept = [select(q, f"SELECT count(*) AS n FROM {table}")[0]["n"] for table in ("environments", "contexts")]
    assert kept == [0, 0]
    q("doctor")


def test_completed_jobs_are_kept_for_a_month(q: Queue) -> None:
    assert q.look("config", "show")["keep_completed"] == 30 * 86400
    q("config", "set", "keep_completed", "none")
    assert q.look("config", "show")["keep_completed"] is None


# =====================================================================================================
# commands that need no shell: started with and without one, they do the same
# =====================================================================================================

# Starts each command of an order by the shell, and as a worker does; what came of both.
BOTH_WAYS = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import queuectl
system, rule, spawn = queuectl.system, queuectl.words_without_shell, queuectl.system._spawn
order = json.load(sys.stdin)
started = []
def spawn_noted(file, *rest):
    pid = spawn(file, *rest)
    started.append(file)
    return pid
def outcome(command, env, words):
    queuectl.words_without_shell = words
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
    files = [os.open(order["folder"] + name, flags, 0o600) for name in ("/../out", "/../err")]
    env = {os.fsencode(k): os.fsencode(v) for k, v in env.items()}
    pid = system.spawn(command, system.shell, env, order["folder"], 0o27, *files)
    status = os.waitpid(pid, 0)[1]
    printed = [os.pread(fd, 1 << 20, 0).decode("latin-1") for fd in files]
    for fd in files:
        os.close(fd)
    return [os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status), *printed]
system.shell = order["shell"]
system._spawn = spawn_noted
system.prepare_worker(os.getppid())
answers = []
for command, env in order["cases"]:
    by_shell = outcome(command, env, lambda *_: [])
    by_rule = outcome(command, env, rule)
    answers.append([by_shell, by_rule, started[-1] != os.fsencode(order["shell"])])
json.dump(answers, sys.stdout)
"""

PROGRAMS = {
    "args": "#!/bin/sh\nprintf '<%s>' \"$0\" \"$@\"\n",
    "code": "#!/bin/sh\nexit $1\n",
    "signal": "#!/bin/sh\nulimit -c 0; kill -$1 $$\n",
    "streams": "#!/bin/sh\ncat; echo out; echo err >&2; ls /proc/self/fd; umask; grep ^SigBlk /proc/self/status\n",
    "no bang": "echo \"$0\" \"$@\"\n", "empty": "", "lost": "#!/no/such/program\n", "cr": "#!/bin/sh\r\n",
    "elf": "\x7fELF\n",
    "first/later": "", "second/later": "#!/bin/sh\necho $0\n",  # the first can't be executed
    "first/folder/x": "", "second/folder": "#!/bin/sh\necho folder\n",
    "first/lost": "#!/no/such/program\n", "second/lost": "#!/bin/sh\necho found\n",
    "first/script": "echo script $0 $1\n", "second/script": "#!/bin/sh\necho second\n",
    "second/time": "#!/bin/sh\necho a program called time\n", "second/it's": "#!/bin/sh\necho it is\n",
    **{n: f"#!/bin/sh\necho this is {n!r} $#\n" for n in ("-x", "+x", "%x", "@x", "1", "a=b", "~", "a b", "é")},
}  # fmt: skip

# What signals are ignored is not compared: busybox leaves SIGQUIT so, which is against POSIX.

# What needs no shell, and what goes to it: because it is the shell's, or no program.
PLAIN = r"""
./args
./args a b
./args	a	b
./args -- -x --y=z +1 %s @u ,v :w a/b a.b = == =ls A=1 a:b 2 if time
./args 'a b' 'it'"'"'s' "'" '' x'y'z ''
./args '$HOME' '`x`' '*' '?' '[a]' '{a,b}' '~' 'a\b' '"' '#' ';' '&' '|' '<' '>' '!' '(' '^'
./args 'é' 'āĂÿ€' '　'
'./args' a
./args '#x' 'a#b'
./code 0
./code 1
./code 75
./code 126
./code 127
./code 128
./code 255
./signal KILL
./signal TERM
./signal SEGV
./signal PIPE
./streams
/bin/true
/bin/true 17
/bin/false
/bin/echo -n a b
'it'"'"'s' x
ls -la /no/such/file
cat /dev/null
expr 1 = 1
env A=1 ./args a
uname
id -u
seq 3
nohup ./args x
nice -n 1 ./args x
./+x
+x
@x
1
1 2
./1
./%x
./'a b' c
'a b'
'~'
'é' x
sh -c 'echo $0 $# $-' a b
env -u PWD /bin/pwd
/bin/pwd
dirname /a/b
tr a b
wc -c args
"""
SHELLS_OWN = r"""
true
true 17
'true'
false
: x
. ./args
[ a = a ]
test a = b
echo a
'echo' a
printf %d x
kill -0 1
pwd
cd /
exit 3
exec ./args x
exec no-such-tool
eval ./args x
command -v ls
builtin echo x
source ./args
export A=1
umask
ulimit -n
wait 1
type ls
hash ls
read x
let 0
local x
sleep 0
which ls
time
time ./args x
'time' ./args x
coproc ./args
if
then
for
while
case
function
select
A=1
A=1 ./args x
PATH=/no ls
a=b
'a=b'
./a=b
-x
'-x'
%x
%1
setsid -w ./args x
env setsid -w true
./args  two
 ./args
./args *
./args ?rgs
./args ~
./args ~root a:~ b=~
./args {a,b}
./args $HOME
./args "a"
./args a\b
./args #x
./args a#b
./args é
é x
./args a; echo b
./args a && echo b
./args a | cat
./args a >printed
./args 2>&1
./args `echo a`
./args $(echo a)
! true
{ true; }
( true )
./args 'a
./args "
./args )
./args	'a	b'
no-such-tool
no-such-tool a b
./no-such-tool
/no/such/tool
'no such tool'
''
'' a
.
..
/
./first
./first/later
later x
folder
lost
./lost
script a
'./no bang' a
./empty
./cr
./elf
"""


def lines_of(table: str) -> list[str]:
    return [line for line in table.split("\n") if line]


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    folder = tmp_path / "programs"
    for name, text in PROGRAMS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
        path.chmod(0o644 if name == "first/later" else 0o755)
    return folder


def shells_of(folder: Path) -> list[str]:
    """The shells that may be /bin/sh, each under that name.

    A busybox that was built to run its own `ls` instead of the PATH's is none: it is made for rescue disks.
    """
    found = []
    for name in ("sh", "dash", "bash", "busybox"):
        path = shutil.which(name)
        if path and (name != "busybox" or subprocess.call([path, "sh", "-c", "ls"], env={"PATH": "/nowhere"})):
            (folder / name).mkdir(parents=True)
            (folder / name / "sh").symlink_to(path)
            found.append(str(folder / name / "sh"))
    return found


def started_both_ways(shell: str, folder: Path, cases: Sequence[tuple[str, dict[str, str]]]) -> Any:
    """For each command: code, stdout and stderr by the shell, the same by the rule, and if that took no shell."""
    order = json.dumps({"shell": shell, "folder": str(folder), "cases": cases})
    words = [sys.executable, "-c", BOTH_WAYS, str(PROGRAM.parent)]
    done = subprocess.run(words, input=order.encode(), capture_output=True, timeout=120)
    assert done.returncode == 0 and not done.stderr, done
    return json.loads(done.stdout)


def comparable(outcome: list[Any]) -> list[Any]:
    """Without times; a signal as a code, without what is said then: some shells wait for the program and do that."""
    code, out, err = outcome
    err = re.sub(r"\d+\.\d+", "…", err)
    return [128 - code if code < 0 else code, out, "" if code < 0 or code > 128 else err]


def environment_in(outcome: list[Any]) -> dict[str, str]:
    """That which `env -0` printed, without what shells differ in."""
    entries = [entry.partition("=") for entry in outcome[1].split("\0")]
    return {name: value for name, _, value in entries if name not in ("_", "SHLVL", "OLDPWD")}


@linux
def test_commands_do_the_same_with_a_shell_and_without(programs: Path) -> None:
    path = os.pathsep.join([f"{programs}/first", f"{programs}/second", str(programs), "/usr/bin", "/bin"])
    env = {"PATH": path, "LC_ALL": "C", "HOME": "/nowhere"}
    plain, others = lines_of(PLAIN), lines_of(SHELLS_OWN)
    assert len(plain) + len(others) >= 150
    for shell in shells_of(programs.parent / "shells"):
        answers = started_both_ways(shell, programs, [(command, env) for command in plain + others])
        for command, (by_shell, by_rule, direct) in zip(plain + others, answers):
            assert comparable(by_rule) == comparable(by_shell), (shell, command)
            assert direct == (command in plain), (shell, command)


# Variables that no shell touches; and such as some shell sets, takes out or follows.
PASSED_ON = [
    {}, {"PWD": "{here}"}, {"PWD": "{link}"}, {"PWD": "/"}, {"PWD": "."}, {"OLDPWD": "/", "SHLVL": "4", "_": "x"},
    {"EMPTY": "", "LINES": "1", "V": "a\nb=c\udcff'\"$"}, {"A_b1": "() { :; }"}, {"BIG": "x" * 100_000},
    {"PATH": "/no/such:/etc/passwd:/usr/bin:/bin:."},
]  # fmt: skip
NOT_PASSED_ON = [
    {"IFS": "x"}, {"OPTIND": "7"}, {"PPID": "7"}, {"a-b": "1"}, {"1a": "1"}, {"é": "1"},
    {"BASH_FUNC_env%%": "() { echo a function; }"},
    {"PATH": ".:/usr/bin:/bin"}, {"PATH": ":/usr/bin:/bin"}, {"PATH": "~:/usr/bin:/bin"}, {"PATH": "/usr/bin/:/bin/"},
    {"PATH": "/usr/bin%x:/bin"}, {"PATH": ""},
]  # fmt: skip
BASH_ALONE = [
    {"PS1": "x"}, {"PS4": "x"}, {"ENV": "/no"}, {"BASH_ENV": "/no"}, {"SHELLOPTS": "xtrace"}, {"POSIXLY_CORRECT": "x"},
    {"RANDOM": "7"}, {"LINENO": "7"}, {"BASHPID": "7"}, {"EPOCHSECONDS": "7"}, {"EXECIGNORE": "*"},
]  # fmt: skip


@linux
def test_programs_see_the_same_environment_with_a_shell_and_without(programs: Path) -> None:
    link = programs.parent / "link"
    link.symlink_to(programs)
    names = {"{here}": str(programs), "{link}": str(link)}
    base = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "QUEUECTL_RUN": "x-1-1"}
    wanted = [*PASSED_ON, *NOT_PASSED_ON, *BASH_ALONE]
    cases = [("env -0", {**base, **{k: names.get(v, v) for k, v in more.items()}}) for more in wanted]
    for shell in shells_of(programs.parent / "shells"):
        simple = os.path.basename(os.path.realpath(shell)) in ("dash", "busybox")
        answers = started_both_ways(shell, programs, cases)
        for more, (by_shell, by_rule, direct) in zip(wanted, answers):
            assert [by_rule[0], by_rule[2]] == [by_shell[0], by_shell[2]], (shell, more)
            if "RANDOM" not in more and "BASHPID" not in more and "EPOCHSECONDS" not in more:
                assert environment_in(by_rule) == environment_in(by_shell), (shell, more)
            assert direct == (more in PASSED_ON or (simple and more in BASH_ALONE)), (shell, more)
        assert environment_in(answers[0][1])["PWD"] == str(programs)


@linux
def test_workers_start_programs_without_a_shell(q: Queue) -> None:
    """Where there is no shell, only what needs one can't be started; and what can't is tried again by it."""
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import queuectl\n"
        "queuectl.Posix.shell = queuectl.SETTINGS['shell'] = '/no/shell'\nsys.exit(queuectl.main())"
    )
    q("enqueue", "--id", "words", "/bin/echo", "it's", "a b")
    q.load([
        {"id": "plain", "command": "/bin/echo plain"}, {"id": "env", "command": "env", "env": {"OWN": "1"}},
        {"id": "sums", "command": "cksum /dev/null >>sums", "max_retries": 1},
        {"id": "gone", "command": "no-such-tool", "max_retries": 1},
    ])  # fmt: skip
    q.launch([*q.program[:-1], "-c", code, PROGRAM.parent, "worker", "start", "--drain"]).wait(20)
    assert q("logs", "words", "--stdout").out == "it's a b\n"
    assert q("logs", "plain", "--stdout").out == "plain\n"
    assert {"OWN=1", f"PWD={os.path.realpath(q.work)}"} <= set(q("logs", "env", "--stdout").out.splitlines())
    for job in ("sums", "gone"):
        assert "can't start" in q.show(job)["last_error"]


@linux
def test_programs_start_without_a_shell_with_an_old_glibc_too(q: Queue) -> None:
    q.load([{"id": "a", "command": "env"}, {"id": "b", "command": "no-such-tool", "max_retries": 1}])
    assert with_old_glibc(q, "worker", "start", "--drain").wait(30) == 1
    assert "QUEUECTL_JOB_ID=a\n" in q("logs", "a", "--stdout").out
    assert q.show("b")["exit_code"] == 127 and "not found" in q.show("b")["last_error"]


def test_a_final_exit_code_is_also_that_of_a_signal(q: Queue) -> None:
    """A shell that has waited for its program makes 137 of SIGKILL; without one it is -9."""
    for number, command in enumerate(["bash -c 'kill -9 $$'", "exec bash -c 'kill -9 $$'"]):
        q.add(command, "--id", f"j{number}", "--dead-on", "137")
    q.drain(code=1)
    assert [q.show(job)["attempts"] for job in ("j0", "j1")] == [1, 1]


def test_a_worker_that_recorded_a_run_rings_only_sleeping_workers(store: Any) -> None:
    with store.transaction():
        for number in (1, 2, 3):
            store.add_worker(f"pool-{number}", "pool", NOW)
    put(store)
    assert store.sleepers() == ["pool-1", "pool-2", "pool-3"]
    job = take(store)
    assert store.sleepers() == ["pool-2", "pool-3"]
    end(store, job, "completed", NOW)
    assert store.sleepers() == ["pool-1", "pool-2", "pool-3"]


@linux
def test_a_program_ends_at_once_but_leaves_nothing_undone(q: Queue) -> None:
    """What was registered for the end is done, and who profiles it gets its profile."""
    (q.work / "sitecustomize.py").write_text("import atexit; atexit.register(print, 'registered')\n")
    words = [sys.executable, "-B", str(PROGRAM), "status"]
    assert q.run(words, env={"PYTHONPATH": str(q.work)}).out.endswith("registered\n")
    profiled = q.run([*words[:2], "-m", "cProfile", *words[2:]])
    assert "function calls" in profiled.out and profiled.code == 0


# =====================================================================================================
# other people's files: lists, arrays, shells
# =====================================================================================================


class Listed(NamedTuple):
    """A list as other people write it, and the commands in it; by default its lines."""

    text: str
    commands: Sequence[str] = ()
    shell: str = "sh"


LISTS = {
    "words": Listed("printf '<%s>' a b\nprintf '<%s>' c\n"),
    "no newline at its end": Listed("echo a\necho b"),
    "blank lines": Listed("\n\necho a\n   \n\t\necho b\n\n", ["echo a", "echo b"]),
    "blanks before": Listed("  echo a\n\techo b\n", ["echo a", "echo b"]),
    "comments": Listed("# what it does\necho a\n#echo b\n   # c\necho d\n", ["echo a", "echo d"]),
    "a comment that ends in a backslash": Listed("# echo \\\necho a\n", ["echo a"]),
    "a comment with a quote": Listed("# it's\necho a # don't\n#\n", ["echo a # don't"]),
    "# inside words": Listed("echo a#b\necho '#c' \"#d\" \\#e\necho ${#HOME} $# a;echo b #c\n"),
    "quotes": Listed("printf '<%s>' 'a b' \"c 'd\" 'e \"f'\nprintf '<%s>' \"it's\" 'x'\"'\"'y' \"\\\"\"\n"),
    "escapes": Listed("printf '<%s>' a\\ b \\' \\\" \\\\ \\$HOME\nprintf '<%s>' \\\\\\\\\n"),
    "variables": Listed('x=1; echo "$x" ${x} ${y:-z} "${y-a b}" ${y:-\'a  b\'}\nx=a.gz; echo "${x%.gz}" ${x#"a"}\n'),
    "quotes in parameters": Listed("x='a\"b'; echo \"${x#*'\"'}\"\necho \"${x:-it's}\"\n"),
    "substitutions": Listed("echo $(echo a) `echo b` \"$(echo 'c  d')\"\necho \"$(echo \"a  b\")\" \"$(echo '\"')\"\n"),
    "substitutions in each other": Listed('echo "$(echo "$(echo "a  b")")" $(echo $(echo c) "(")\necho `echo "a b"`\n'),
    "sums": Listed("echo $((1 + 2)) $((1<<2)) $(( (1 + 2) * 3 ))\nx=2; echo $((x << 1))\n"),
    "pipes": Listed("printf 'b\\na\\n' | sort\necho a |tr a b|tr b c && echo d || echo e\n"),
    "redirections": Listed("echo a >f; cat <f; cat f>g; cat g\nls nowhere 2>&1 >/dev/null | wc -l; echo b >&2\n"),
    "exit codes": Listed("exit 3\nfalse\ntrue\nnot-a-program-at-all\n[ -f nowhere ]\nsh -c 'kill -9 $$'; exit $?\n"),
    "the command test": Listed("[ -d / ] && echo y\n[ -f nowhere ] || echo n\n[ a = b ]\n[ ! -e x ] && { echo z; }\n"),
    "braces": Listed("{ echo a; echo b; } >f; cat f\n{ echo c; exit 4; }\n{ cd / && pwd; }\n"),
    "a brace first": Listed("{ echo a; } | tr a b\n"),
    "parentheses": Listed("(cd / && pwd); (exit 5)\n( echo a; (echo b) ) | sort -r\n"),
    "compounds": Listed("for i in 1 2; do echo $i; done\nif true; then echo a; else echo b; fi\n"),
    "a case": Listed("case ab in a*) echo A;; (b) echo B;; esac\nx=b; case $x in a) echo A;; b) echo B;; esac\n"),
    "functions": Listed("f() { echo \"f $1\"; }; f a\ng() (echo g); g\n"),
    "words that seem unfinished": Listed("echo do\necho then {\necho a \\|\necho '<<' \"<<\" \\<\\<\necho 'a |'\n"),
    "joined lines": Listed("printf '<%s>' \\\n  a \\\n  'b c'\necho d\n", ["printf '<%s>'   a   'b c'", "echo d"]),
    "a word over two lines": Listed("echo ab\\\ncd\necho \"e\\\n f\"\n", ["echo abcd", 'echo "e f"']),
    "joined with an empty line": Listed("echo a \\\n\necho b\n", ["echo a ", "echo b"]),
    "comments in joined lines": Listed("echo a \\\n# b\necho # \\\necho d\n", ["echo a # b", "echo # \\", "echo d"]),
    "two backslashes": Listed("echo a \\\\\necho b\n"),
    "a backslash at its end": Listed("echo a \\", ["echo a "]),
    "Windows": Listed("\ufeffecho a\r\necho 'b c'\r\n# d\r\necho \\\r\n  f\r\n", ["echo a", "echo 'b c'", "echo   f"]),
    "two files with byte order marks": Listed("\ufeffecho a\n\ufeff# b\n\ufeffecho c\n", ["echo a", "echo c"]),
    "not ASCII": Listed("printf '<%s>' ü '日本 語' \"😀\"\necho naïve | wc -c\n"),
    "dashes first": Listed("-x\n+e\n--help\n", ["-x", "+e", "--help"]),
    "options behind": Listed("printf '<%s>' --json --db x -h\nls -d / --color=never\n"),
    "awk and sed": Listed("echo a b | awk '{ print $2 \"\\t\" $1 }'\necho x/y | sed -e 's#x/#'\"z#\"\n"),
    "test in bash": Listed("[[ a == a* ]] && echo y\n[[ ab =~ ^(a|b)+$ ]]; echo $?\n[[ -f nowhere ]]\n", shell="bash"),
    "bash": Listed("echo {1..3} &>f; cat f\necho -e 'a\\tb'\ncat <<<\"a b\"\n", shell="bash"),
    "arrays of bash": Listed("a=(1 '2 3'); echo ${#a[@]}; printf '<%s>' \"${a[@]}\"\n", shell="bash"),
    "files of bash": Listed("diff <(echo a) <(echo a) && echo same\nset -o pipefail; false | true\n", shell="bash"),
    "quotes of bash": Listed("printf '<%s>' $'it\\'s' $'a\\tb' $\"c d\"\nx='a b'; echo ${x/a/(}\n", shell="bash"),
    "source": Listed("source /dev/null && echo ok\n(( 1 + 1 == 2 )) && echo two\nlet 'x=1<<3'\n", shell="bash"),
    "lines of JSON": Listed('{"command":"echo a"}\n{"cmd":"echo \'b  c\'"}\nd\n', ["echo a", "echo 'b  c'", "d"]),
    "an array on one line": Listed('[{"command":"echo a"},{"command":"echo }{"}]\n', ["echo a", "echo }{"]),
    "an array over lines": Listed(
        '[ {\n  "command": "echo a",\n "env": {"A":\n"}"}\n},\n\n{"command":\n"echo [b]"} ]', ["echo a", "echo [b]"]
    ),
    "an array as JavaScript has it": Listed('[{\n"cmd": "echo a"\n},{\n"cmd": "echo b"\n}]\n', ["echo a", "echo b"]),
    "objects one after the other": Listed(
        '\ufeff\n{\n"command": "echo a"\n}\n{"command":"echo b"}{"cmd":\n"echo c"} {"cmd":"d"}\n# e\n{"cmd":"f"}\n',
        ["echo a", "echo b", "echo c", "d", "f"],
    ),
    "two arrays and a command": Listed('[\n{"cmd":"echo a"}\n]\n[]\n[\n]\n[{"cmd":"echo b"}]\necho c\n',
                                       ["echo a", "echo b", "echo c"]),
    "lists of words": Listed(
        '{"command":["printf","<%s>","a b","$HOME","it\'s","","*"]}\n{"cmd":["echo","-n"]}\n',
        ["printf '<%s>' 'a b' '$HOME' \"it's\" '' '*'", "echo -n"],
    ),
}  # fmt: skip
ONE_BY_ONE = {name: each for name, each in LISTS.items() if not each.commands}


def done_by_hand(folder: Path, shell: str, command: str) -> tuple[int, str, str]:
    """What a shell makes of a command: exit code and both outputs."""
    path = os.environ["PATH"]
    done = subprocess.run([shutil.which(shell) or shell, "-c", " " * (command[0] in "-+") + command], cwd=folder,
                          stdin=subprocess.DEVNULL, capture_output=True,
                          env={"PATH": path, "HOME": str(folder), "LC_ALL": "C.UTF-8"})  # fmt: skip
    return done.returncode, decode(done.stdout), decode(done.stderr)


def plainly(text: str) -> str:
    """What a shell complains, without how it calls itself and the line."""
    return re.sub(r"(?m)^[^\n]*?: (?:line )?\d+: ", "", text)


def test_lists_of_other_people_do_what_their_shell_does(q: Queue) -> None:
    """Commands, exit codes, outputs and files: each list in a folder of its own, and again by hand."""
    for number, (name, listed) in enumerate(LISTS.items()):
        for folder in (f"ours{number}", f"theirs{number}"):
            (q.work / folder).mkdir()
        options = ["--shell", listed.shell] * (listed.shell != "sh")
        (q.work / "list").write_bytes(listed.text.encode())
        q("enqueue", "--file", q.work / "list", "--queue", f"q{number}", "--max-retries", "1", "--env",
          f"HOME={q.work / f'theirs{number}'}", *options, cwd=q.work / f"ours{number}")  # fmt: skip
        given = [job["command"] for job in q.jobs("--queue", f"q{number}")]
        if name != "lists of words":
            assert given == [*(listed.commands or listed.text.splitlines())], name
    for number in range(len(LISTS)):
        q("queue", "set", f"q{number}", "--concurrency", "1")  # some lines read what those before them wrote
    q.drain("--count", "3", code=1)
    for number, (name, listed) in enumerate(LISTS.items()):
        jobs = q.jobs("--queue", f"q{number}")
        theirs = q.work / f"theirs{number}"
        for job, command in zip(jobs, listed.commands or listed.text.splitlines()):
            code, out, err = done_by_hand(theirs, listed.shell, command)
            (run,) = q.show(job["id"])["runs"]
            outcome = run["exit_code"], run["stdout"], plainly(run["stderr"])
            assert outcome == (code, out, plainly(err)), (name, command)
        assert contents(q.work / f"ours{number}") == contents(theirs), name


@pytest.mark.skipif(not shutil.which("parallel"), reason="GNU parallel is not installed")
def test_lists_of_other_people_print_what_parallel_prints(q: Queue) -> None:
    lists = [each.text.rstrip("\n") for each in ONE_BY_ONE.values() if each.shell == "sh" and ">f" not in each.text]
    text = "\n".join(lists) + "\n"
    theirs = q.run(["parallel", "-k", "-j2"], stdin=text, env={"PARALLEL_SHELL": "/bin/sh", "QUEUECTL_DB": None})
    q("enqueue", "--file", "-", "--max-retries", "1", stdin=text)
    q.drain("--count", "2", code=1)
    ids = [job["id"] for job in q.jobs()]
    assert "".join(q.here(["logs", "--stdout", job]).out for job in ids) == theirs.out


UNFINISHED = {
    "an open quote": ["echo 'a", "b'"],
    "an open double quote": ['echo "a', 'b"'],
    "an open quote behind others": ["echo 'a' \"b\" it's", "'"],
    "a quote in a substitution": ['echo "$(echo "a', 'b")"'],
    "a backslash in single quotes": ["echo 'a\\", "b'"],
    "a here-document": ["cat <<END", "a", "END"],
    "a here-document without tabs": ["cat <<-'END' | sort", "END"],
    "a here-document in a joined line": ["cat \\", "  <<END", "END"],
    "an open parenthesis": ["(echo a", "echo b)"],
    "an open substitution": ["echo $(date", ")"],
    "an open backquote": ["echo `date", "`"],
    "a loop": ["for i in 1 2; do", "echo $i; done"],
    "a condition": ["if true; then # yes", "echo a; fi"],
    "a function": ["f() {", "echo a; }"],
    "a pipe": ["echo a |", "cat"],
    "an and": ["true &&", "echo a"],
    "an or with a comment": ["false || # or", "echo a"],
}


@pytest.mark.parametrize("lines", UNFINISHED.values(), ids=UNFINISHED)
def test_a_command_that_goes_on_in_the_next_line_is_refused(q: Queue, lines: list[str]) -> None:
    text = "\n".join(["echo first", "", *lines, "echo last"])
    assert "line 3: this command goes on in the next line" in q.fails("enqueue", "--file", "-", stdin=text, code=2).err
    assert q.counts() == {}


@pytest.mark.parametrize(
    ("first", "advice"),
    [
        ("#!/bin/bash", "`queuectl enqueue bash FILE`"),
        ("#!/bin/sh -e", "`queuectl enqueue sh -e FILE`"),
        ("#! /usr/bin/env python3", "`queuectl enqueue python3 FILE`"),
        ("\ufeff#!/usr/bin/env -S awk -f", "`queuectl enqueue awk -f FILE`"),
    ],
)
def test_a_script_is_no_list(q: Queue, first: str, advice: str) -> None:
    assert advice in q.fails("enqueue", "--file", "-", stdin=f"{first}\necho a\n", code=2).err
    assert advice in q.fails("run", stdin=f"{first}\necho a\n", code=2).err
    q("enqueue", "--file", "-", stdin="echo a\n#!/bin/sh\n")


def test_run_skips_comments(q: Queue) -> None:
    said = q("run", "--json", stdin="# a\necho a\n\n  # b\necho \\\n b\n").json()
    assert (said["jobs"], said["completed"]) == (2, 2)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('[\n{"command":"a"},\n{"command":}\n]\n', 3),
        ('[\n{"command":"a"},\n{\n"command":"b",\n"colour":"red"\n}\n]\n', 3),
        ('# x\n[\n{"command":"a"},\n5\n]\n', 4),
        ('[\n"echo a"\n]\n', 2),
        ('["echo a","echo b"]\n', 1),
        ('[["echo","a"],["echo","b"]]\n', 1),
        ("[1]\n", 1),
        ('\n[{"command":"a"},\n{"command":"b"}\n', 2),
        ('{"command":"a"}\n{"command":"b",\n"id":"x"\n', 2),
        ('{\n"command":"a"\n} x\n', 3),
        ('{"command":"a"} ; echo b\n', 1),
        ("{\necho a\n}\n", 1),
        ('{ "$HOME/x"; }\n', 1),
        ("{a,b}\n", 1),
        ('[{"command":"a","priority":NaN}]', 1),
        ("[\n" + "[" * 100_000 + "{\n}", 2),
        ('{"command":"a","env":' + '{"a":' * 100_000 + "\n}", 1),
    ],
    ids=lambda value: shorten(ascii(value), 40),
)
def test_unsound_json_in_a_file_is_refused_with_its_line(q: Queue, text: str, line: int) -> None:
    error = q.fails("enqueue", "--file", "-", stdin="echo 0\n" + text, code=2).err
    assert re.search(rf"\bline {line + 1}\b", error)
    assert len(error) < 2000 and q.counts() == {}


def test_an_array_is_read_whatever_its_size(q: Queue) -> None:
    """On one line of more than the longest command; and laid out as jq has it."""
    jobs = [{"id": n, "command": ["echo", "x" * 60_000, str(n)]} for n in range(40)]
    for indent in (None, 2):
        q("enqueue", "--file", "-", "--queue", f"q{indent}", stdin=json.dumps(jobs, indent=indent))
        listed = q.jobs("--queue", f"q{indent}")
        assert [job["id"] for job in listed] == [str(n) for n in range(40)]
        assert listed[39]["command"] == f"echo {'x' * 60_000} 39"
        q("delete", "--all", "--state", "pending", "--yes")


def test_arrays_in_an_array_on_one_line_are_jobs(q: Queue) -> None:
    q("enqueue", "--file", "-", stdin='[[{"command":"echo a"}],[{"command":"echo b"}]]\n')
    assert [job["command"] for job in q.jobs()] == ["echo a", "echo b"]


def test_an_object_over_many_lines_is_not_read_anew_at_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other queues write `{"jobs": [`: read at each }, 20,000 of them took minutes to be refused."""
    tried: list[int] = []

    class Decoder:
        def raw_decode(self, text: str, at: int) -> Any:
            tried.append(at)
            return strict.raw_decode(text, at)

    strict = queuectl._STRICT
    monkeypatch.setattr(queuectl, "_STRICT", Decoder())
    wrapped = {"jobs": [{"command": 'echo "}" {'}] * 50}
    lines = [*json.dumps(wrapped, indent=1).split("\n"), "echo b"]
    given = [given for _, given in queuectl.read_jobs(iter(enumerate(lines, 1)))]
    assert given == [wrapped, {"command": "echo b"}]
    assert len(tried) <= 2


def test_jobs_are_read_as_their_last_lines_arrive() -> None:
    """Nothing is read ahead: `run` works on what comes by a pipe."""
    lines = ["echo a", "echo \\", "b", "{", '"cmd":"c"', "}", "[", '{"cmd":"d"},', '{"cmd":', '"e"}', "]", "echo f"]
    arrived: list[str] = []

    def feed() -> Iterator[tuple[int, str]]:
        for number, line in enumerate(lines, 1):
            arrived.append(line)
            yield number, line

    seen = [(number, arrived[-1], given) for number, given in queuectl.read_jobs(feed())]
    assert [(number, line) for number, line, _ in seen] == [
        (1, "echo a"), (2, "b"), (4, "}"), (8, '{"cmd":"d"},'), (9, '"e"}'), (12, "echo f"),
    ]  # fmt: skip


# Words that aren't UTF-8


def test_words_that_are_not_utf8_reach_the_program(q: Queue) -> None:
    names = [b"caf\xe9", b"\xff\xfe'\xfd", b"a b\xe9\n", b"%\xe9$HOME", b"-\x80\x81\x82", b"\xc3\xa9\xc3"]
    job = q("enqueue", "--quiet", "printf", r"%s\0", *names, "ü").out.strip()
    assert q.show(job)["command"].isascii() is False  # the ü
    other = q("enqueue", "--quiet", "--shell", "bash", "printf", r"%s\0", *names).out.strip()
    for name in names:
        (q.work / os.fsdecode(name)).touch()
    q("enqueue", "--id", "found", "ls", "-d", "--", *names)
    q.drain()
    told = base64.b64decode(q.show(job)["runs"][0]["stdout_base64"])
    assert told == b"".join(name + b"\0" for name in [*names, "ü".encode()])
    assert base64.b64decode(q.show(other)["runs"][0]["stdout_base64"]) == told[: -len("ü\0".encode())]
    assert q.state("found") == "completed"
    q.fails("enqueue", b"echo \xff", code=2)
    q.fails("enqueue", "--id", b"\xff", "echo", "a", code=2)


# Another shell


def test_a_job_may_have_a_shell_of_its_own(q: Queue) -> None:
    bash = shutil.which("bash")
    q("enqueue", "--id", "a", "--shell", "bash", "[[ a == a ]] && echo $0 {1..3}")
    q("enqueue", "--file", "-", stdin='{"id":"b","command":"-x","shell":"bash"}\n{"id":"c","command":"echo $0"}\n')
    assert {job["id"]: job["shell"] for job in q.jobs()} == {"a": bash, "b": bash, "c": None}
    q("enqueue", "--id", "d", "--shell", os.path.relpath(str(bash), str(q.work)), "echo $0")
    q.drain(code=1, env={"PATH": "/nowhere"})
    printed = {name: q("logs", "--stdout", name).out for name in "acd"}
    assert printed == {"a": f"{bash} 1 2 3\n", "c": "/bin/sh\n", "d": f"{bash}\n"}
    assert q.show("b")["exit_code"] == 127


def test_a_shell_that_is_not_there_is_refused(q: Queue) -> None:
    for shell in ("no-such-shell", "", "/", "./here"):
        assert "shell" in q.fails("enqueue", "--shell", shell, "true", code=2).err
    stdin = 'true\n{"command":"true","shell":"no-such-shell"}\n'
    assert "line 2" in q.fails("enqueue", "--file", "-", stdin=stdin, code=2).err
    q.fails("enqueue", '{"command":"true","shell":5}', code=2)
    q.fails("config", "set", "shell", "no-such-shell", code=2)
    assert q.counts() == {}


def test_a_shell_that_is_gone_when_its_job_is_to_run(q: Queue) -> None:
    shell = q.work / "shell"
    shell.symlink_to("/bin/sh")
    q("enqueue", "--id", "a", "--shell", "./shell", "--max-retries", "1", "true")
    shell.unlink()
    q.drain(code=1)
    assert q.show("a")["last_error"] == f"can't start {shell}: No such file or directory"


def test_the_shell_of_jobs_is_edited_and_set_for_all(q: Queue) -> None:
    bash = str(shutil.which("bash"))
    q("enqueue", "--id", "a", "--shell", "bash", "echo $0")
    assert q("config", "set", "shell", "bash").out == f"Config updated: shell = {bash}\n"
    q("enqueue", "--id", "b", "echo $0")
    q("enqueue", "--id", "c", "--shell", "sh", "echo $0")
    assert q.show("b")["shell"] is None
    q("edit", "a", "--shell", "none")
    q("edit", "c", "--shell", "bash")
    assert (q.show("a")["shell"], q.show("c")["shell"]) == (None, bash)
    q.drain()
    assert [q("logs", "--stdout", name).out for name in "abc"] == [bash + "\n"] * 3
    q("config", "unset", "shell")
    q("retry", "a")
    q.drain()
    assert q.show("a")["runs"][-1]["stdout"] == "/bin/sh\n"


def test_functions_that_bash_exports_are_there(q: Queue) -> None:
    q.bash("""
        f() { echo "f $1"; }
        export -f f
        queuectl enqueue --env-all --shell bash 'f 1'
        queuectl run --quiet --shell bash 'f 2'
    """)
    q.drain()
    printed = [q.here(["logs", "--stdout", job["id"]]).out for job in q.jobs()]
    assert printed == ["f 1\n", "f 2\n"]


def test_a_database_of_the_fifth_version_gets_shells(q: Queue) -> None:
    db = database_of_version(q, 5)
    db.execute("INSERT INTO contexts VALUES (3, 0, ?, ?, 18, 1)", (str(q.work), os.environ["PATH"]))
    db.execute("INSERT INTO queues (name, pending) VALUES ('default', 1)")
    db.execute(
        "INSERT INTO jobs (seq, id, generated, command, state, queue, priority, ready, max_retries,"
        " context, created_at, updated_at) VALUES (7, 'old', 0, 'echo $0', 'pending', 'default', 10, 1, 2, 3, 1, 1)"
    )
    db.commit()
    db.close()
    assert q.show("old")["shell"] is None
    q("enqueue", "--id", "new", "--shell", "bash", "echo $0")
    q.drain()
    assert [q("logs", "--stdout", name).out for name in ("old", "new")] == ["/bin/sh\n", f"{shutil.which('bash')}\n"]
    q("doctor")


# A command in the background


@pytest.mark.parametrize("words", [["sleep 0 &"], ["--", "a; b & "], ["-"], ["--file", "-"], ['{"command":"true&"}']])
def test_a_list_warns_of_commands_that_end_in_an_ampersand(q: Queue, words: list[str]) -> None:
    said = q("enqueue", *words, stdin="# two\ntrue &\n")
    assert said.err.count("\n") == 1 and "leave the & out" in said.err
    assert ("line 2: " in said.err) == ("--file" in words)


@pytest.mark.parametrize("command", ["sleep 0 & wait", "a && b", "a >&2", "echo 'x &'", "a & b"])
def test_a_list_does_not_warn_of_commands_that_wait(q: Queue, command: str) -> None:
    assert q("enqueue", command).err == ""


# Whose option is it?


@pytest.mark.parametrize(
    "words",
    [
        "df -h", "ls --help", "make --json", "tool --db other.db", "tool --db=other.db", "tool --file x",
        "make --quiet", "tool --wait", "true --id x --json", "true --json --id x", "true --id x extra", "df -h /",
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["enqueue", "run"])
def test_an_option_behind_a_program_is_refused_and_both_forms_shown(q: Queue, command: str, words: str) -> None:
    if command == "run" and "--wait" in words:
        return
    error = q.fails(command, *words.split(), code=2).err
    ours, theirs = re.findall(r"`(queuectl [^`]*)`", error)
    assert theirs == f"queuectl {command} -- {words}" and " -- " not in ours
    assert q.counts() == {}


def test_options_of_run_behind_a_program_are_refused(q: Queue) -> None:
    for words in (["make", "-j", "4"], ["make", "-j4"], ["make", "--workers", "4"]):
        assert f"`queuectl run -- {' '.join(words)}`" in q.fails("run", *words, code=2).err
    assert q("run", "echo a", "-j2", "--json").json()["completed"] == 1
    assert q("run", "-j4", "echo", "b", "--json=no", code=2).err


def test_options_stand_on_either_side_of_what_is_no_program(q: Queue) -> None:
    for word in ("echo a", '{"command":"true"}', "echo\ta", "-"):
        assert "command" in q("enqueue", word, "--json", "--priority", "3", stdin="true\n").json()
    q("enqueue", "true", "--id", "x", "--priority=4", "--env-all", "--queue", "q", "--shell", "sh")
    assert (q.show("x")["priority"], q.show("x")["queue"]) == (4, "q")
    q("enqueue", "ls", "-l", "--colour")
    assert q.jobs()[-1]["command"] == "ls -l --colour"
    q("enqueue", "--", "df", "-h")
    assert q.jobs()[-1]["command"] == "df -h"


# Words of other programs


@pytest.mark.parametrize(
    ("words", "ours"),
    [
        ("enqueue --command true", "COMMAND"), ("worker start --daemon", "--detach"), ("worker stop --force", "--now"),
        ("worker start --concurrency 4", "-j"), ("run --concurrency 4 true", "-j"),
        ("config set job-timeout 5", "timeout_seconds"), ("config set timeout_sec 5", "timeout_seconds"),
        ('enqueue {"command":"true","timeout_sec":5}', "timeout_seconds"),
        ("enqueue --timeout-secs 5 true", "--timeout"), ("list --stat dead", "--state"),
    ],
)  # fmt: skip
def test_the_error_for_another_programs_word_names_ours(q: Queue, words: str, ours: str) -> None:
    assert f"did you mean {ours}?" in q.fails(*words.split(), code=2).err


def test_states_are_named_in_any_case(q: Queue) -> None:
    q.add("true", "--id", "a")
    assert [job["id"] for job in q.jobs("--state", "PENDING,Dead")] == ["a"]
    q.fails("list", "--state", "DONE", code=2)


# what is going on, what was done: history, oldest waiting, a full disk, the log


def test_worker_stop_does_not_wait_long_for_a_locked_database(q: Queue) -> None:
    with q.working("--count", "2"), closing(sqlite3.connect(str(q.db), timeout=20)) as db:
        db.isolation_level = None
        db.execute("BEGIN EXCLUSIVE")
        stop = q.start("worker", "stop")
        assert stop.wait(20) == 0 and "told without it" in stop.err
        db.execute("ROLLBACK")


def done_by_queue(store: Any, since: int = 0, until: int = 0) -> dict[str, list[int]]:
    rows = store.history("queue", since, until)
    return {row["queue"]: [row["completed"], row["failed"], row["died"]] for row in rows}


def test_history_counts_runs_by_minute_and_queue(store: Any) -> None:
    minute = NOW - NOW % 60_000
    for at, queue, ending in ((0, "a", "completed"), (1, "a", "failed"), (2, "b", "lost"), (3, "a", "deferred"),
                              (60_000, "a", "completed"), (60_001, "run-7", "completed"), (60_002, "run-8", "failed"),
                              (120_000, "a", "stopped"), (120_001, "a", "cancelled")):  # fmt: skip
        put(store, queue=queue, max_retries=1 if ending == "lost" else 3, now=minute + at)
        job = take(store, minute + at, [queue])
        with store.transaction():
            end_run(store, job, ending, minute + at)
            store.execute("UPDATE jobs SET ready = 0, due = NULL")
    assert done_by_queue(store, minute, minute) == {"a": [1, 1, 0], "b": [0, 0, 1]}
    assert done_by_queue(store, minute + 60_000, NOW + 10**9) == {"a": [1, 0, 0], "run": [1, 1, 0]}
    assert done_by_queue(store) == {"a": [2, 1, 0], "b": [0, 0, 1], "run": [1, 1, 0]}
    assert store.runs_per_second(60_000, minute + 60_000 + 30_000) == 6 * 1000 / 90_000


def end_run(store: Any, job: Any, ending: str, now: int, seconds: float = 0.5) -> None:
    ended = queuectl.RunResult(job, ending, None, None, now, seconds, b"", b"", "pool-1")
    store.record(ended, now + 10**12, ["pool"], store.settings())


def test_history_knows_how_long_runs_took_and_waited(store: Any) -> None:
    minute = NOW - NOW % 60_000
    for waited, seconds in ((2000, 0.5), (6000, 3.5)):
        put(store, now=minute)
        job = take(store, minute + waited)
        with store.transaction():
            end_run(store, job, "completed", minute + waited, seconds)
    (row,) = store.history("hour", minute, NOW + 60_000)
    assert (row["run_seconds_sum"], row["run_seconds_max"]) == (4.0, 3.5)
    assert (row["wait_seconds_sum"], row["wait_seconds_max"]) == (8.0, 6.0)
    assert row["starts_at"] == NOW - NOW % 3_600_000 and row["runs"] == 2


def fill_history(store: Any, hours: int, now: int) -> None:
    """A run each half hour of the last `hours`, the newest last."""
    for n in range(2 * hours, 0, -1):
        at = now - n * 1_800_000
        put(store, now=at)
        job = take(store, at)
        with store.transaction():
            end_run(store, job, "completed", at, float(n))
            store.delete(job.seq)


def test_history_is_thinned_and_its_totals_never_fall(store: Any) -> None:
    hour, day = 3_600_000, 86_400_000
    now = NOW - NOW % hour + 10_000
    fill_history(store, 96, now)
    before = {by: store.history(by, now - 97 * hour, now) for by in ("hour", "day", "queue")}
    total = store.history("queue", 0, 0)
    assert total[0]["completed"] == 192
    while store.thin_history(now - 30 * day, now - 2 * day):
        pass
    assert {by: store.history(by, now - 97 * hour, now) for by in before} == before
    spans = dict(store.rows("SELECT span, count(*) FROM history GROUP BY span"))
    assert spans[0] == 1 and 46 <= spans[3600] <= 50 and 90 <= spans[60] <= 98
    while store.thin_history(now - day, now - 2 * day):
        pass
    assert 46 <= store.history("queue", 1, now)[0]["completed"] <= 50
    assert store.history("queue", 0, 0) == total
    assert not store.thin_history(now - day, now - 2 * day)


def test_history_is_bounded_with_thousands_of_queues(store: Any) -> None:
    with store.transaction():
        for n in range(1500):
            store.execute("INSERT INTO queues (name, minute, runs_completed) VALUES (?, 60000, 1)", f"q{n}")
    assert sum(row["completed"] for row in store.history("queue", 0, 0)) == 1500
    with store.transaction():
        store.execute("DELETE FROM queues")
    done = done_by_queue(store)
    assert len(done) == 1001 and done["other queues"] == [500, 0, 0]
    put(store, queue="new")
    job = take(store)
    with store.transaction():
        end_run(store, job, "completed", NOW)
    assert done_by_queue(store)["other queues"] == [501, 0, 0]


def test_history_with_a_clock_that_is_set(store: Any) -> None:
    """What is counted stays counted, wherever the clock was."""
    for at in (NOW, NOW + 10**10, NOW - 10**9, 5, -5, NOW):
        put(store, now=at)
        job = take(store, at)
        with store.transaction():
            end_run(store, job, "completed", at)
    assert done_by_queue(store) == {"default": [6, 0, 0]}
    assert done_by_queue(store, NOW - 60_000, NOW) == {"default": [2, 0, 0]}


def test_history_survives_purges_and_a_killed_worker(q: Queue) -> None:
    q.load([{"command": "true", "queue": "a"}, {"command": KILL_WORKER_ONCE, "queue": "b"}])
    q.drain("--count", "2")
    q("purge")
    assert q.jobs() == []
    done = {row["queue"]: row for row in q.look("stats", "--by", "queue")}
    assert (done["a"]["completed"], done["b"]["completed"], done["b"]["failed"]) == (1, 1, 1)
    assert done["b"]["run_seconds_max"] <= done["b"]["run_seconds_sum"]


def test_stats_tell_what_was_done(q: Queue) -> None:
    assert q("stats").out == "Nothing was done.\n" and q.look("stats") == []
    q.add("sleep 0.2", "--queue", "slow")
    q.add("exit 1", "--max-retries", "1")
    q.drain(code=1)
    q("run", "true x", "true y")
    head, *lines = q("stats", "--by", "queue").out.splitlines()
    assert head.split()[:4] == ["QUEUE", "COMPLETED", "FAILED", "DIED"]
    shown = {line.split()[0]: line.split()[1:4] for line in lines}
    assert shown == {"default": ["0", "0", "1"], "run": ["2", "0", "0"], "slow": ["1", "0", "0"]}
    assert lines[1].endswith("#" * 20) and not lines[0].endswith("#" * 11)
    assert [row["runs"] for row in q.look("stats", "--by", "queue")] == [1, 2, 1]
    hours = q.look("stats", "--since", "10m")
    assert sum(row["completed"] for row in hours) == 3 and TIME.fullmatch(hours[0]["starts_at"])
    assert sum(row["died"] for row in q.look("stats", "--by", "day")) == 1
    assert q.look("stats", "--since", "2001-01-01", "--by", "queue") and not q.look("stats", "--since", "now+1h")
    q("stats", "--since", "10", code=2)
    q("stats", "--by", "year", code=2)


def test_the_rate_of_the_status_is_of_the_last_minute_and_hour(q: Queue) -> None:
    q.load(["true"] * 30)
    q.drain()
    status = q.status()
    assert 30 / 121 < status["runs_per_second_1m"] <= 30 / 60 and 30 / 3661 < status["runs_per_second_1h"] <= 30 / 3600
    assert re.search(r"^Runs: +[0-9.]+/min in the last minute, 0\.\d+/min in the last hour$", q("status").out, re.M)


def oldest(q: Queue) -> Any:
    """The job that waits longest, and for how long."""
    found = q.status()["oldest_waiting"]
    return found and (found["id"], time.time() - moment(found["ready_at"]))


def test_the_oldest_waiting_is_one_that_could_run(q: Queue) -> None:
    q.add("true", "--id", "tomorrow", "--delay", "1d")
    q.add("true", "--id", "after", "--after", "tomorrow")
    q.add("true", "--id", "paused", "--queue", "rests")
    q("queue", "pause", "rests")
    assert oldest(q) is None
    assert "Oldest waiting" not in q("status").out
    assert "queuectl_oldest_waiting_seconds 0.000" in q("status", "--format", "prometheus").out
    q("queue", "resume", "rests")
    name, waits = oldest(q)
    assert name == "paused" and waits < moment(q.show("paused")["created_at"]) + 86400
    resumed = moment(q.status()["oldest_waiting"]["ready_at"])
    assert resumed > moment(q.show("paused")["created_at"])
    q("queue", "pause")
    assert oldest(q) is None and "Paused: all queues, since 2" in q("status").out


def test_the_oldest_waiting_counts_from_when_it_could_run(q: Queue) -> None:
    q.set("backoff_base", "0.2")
    q.add("exit 1", "--id", "again", "--max-retries", "1")
    q.drain(code=1)
    q.add("true", "--id", "waits")
    q("retry", "again")  # it has come first, but waits since now
    assert oldest(q)[0] == "waits"
    q("delete", "waits", "again")
    q.add("exit 1", "--id", "fails")
    with q.working():
        q.wait_state("fails", "failed")
    due = moment(q.show("fails")["next_retry_at"])
    wait_for(lambda: time.time() > due)
    assert oldest(q)[0] == "fails" and moment(q.status()["oldest_waiting"]["ready_at"]) == due
    q("delete", "fails")
    q.add("true", "--id", "first")
    q.add("true", "--id", "second", "--after", "first")
    q.add("true", "--id", "urgent", "--priority", "1", "--queue", "other")
    q.drain("--queue", "default", "--max-jobs", "1")
    status = q.status()["oldest_waiting"]
    assert status["id"] == "urgent" and status["queue"] == "other"
    q("edit", "urgent", "--priority", "3")
    assert q.status()["oldest_waiting"] == status
    q("cancel", "urgent")
    freed = moment(q.status()["oldest_waiting"]["ready_at"])
    assert q.status()["oldest_waiting"]["id"] == "second" and freed > moment(q.show("second")["created_at"])


def parser_of_prometheus(folder: Path) -> Any:
    """That of the package prometheus_client; it is installed for the test if need be and possible."""
    if not importlib.util.find_spec("prometheus_client"):
        words = ["install", "--quiet", "--no-input", "--no-deps", "--target", str(folder), "prometheus_client"]
        with suppress(subprocess.TimeoutExpired):
            subprocess.run([sys.executable, "-m", "pip", *words], timeout=60, capture_output=True)
        sys.path.append(str(folder))
    return pytest.importorskip("prometheus_client.parser", reason="prometheus_client can't be installed")


def test_the_metrics_are_read_by_the_real_parser(q: Queue, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", sys.path[:])
    parser = parser_of_prometheus(tmp_path / "prometheus")
    q.add("true", "--queue", '"}{x="y')
    q.add("false", "--max-retries", "1")
    q.drain(code=1)
    q("run", "true")
    q("run", "true")
    families = {each.name: each for each in parser.text_string_to_metric_families(
        q("status", "--format", "prometheus").out)}  # fmt: skip
    kinds = {name: each.type for name, each in families.items()}
    assert kinds["queuectl_runs"] == "counter" and kinds["queuectl_run_seconds"] == "summary"
    assert all(each.documentation for each in families.values())
    runs = {(each.labels["queue"], each.labels["outcome"]): each.value for each in families["queuectl_runs"].samples}
    assert runs['"}{x="y', "completed"] == 1 and runs["default", "died"] == 1 and runs["run", "completed"] == 2
    for family in families.values():
        keys = [(each.name, tuple(sorted(each.labels.items()))) for each in family.samples]
        assert len(set(keys)) == len(keys), "the same twice"


def test_why_does_not_guess(q: Queue) -> None:
    """It once expected a job at once, behind one that sleeps for 30 s."""
    q.load(["true"] * 5)
    q.drain()
    pool = q.pool()
    q.add(HANG, "--id", "long")
    q.wait_file("started")
    q.add("true", "--id", "waits", "--priority", "50")
    q.add("true", "--id", "before")
    said = q.look("why", "waits")
    started = q.show("long")["started_at"]
    assert said["expected_at"] is None and said["reasons"][0] == "before goes before it, by priority or arrival"
    assert re.fullmatch(rf"1 of 1 worker busy: long for [0-9.]+m?s, since {started}", said["reasons"][1])
    assert "expected" not in why(q, "waits")
    q("worker", "stop", "--now")
    pool.wait()


def test_worker_stop_now_does_not_advise_itself(q: Queue) -> None:
    q.set("kill_grace_seconds", "3")
    pool = q.pool()
    q.add(IGNORE_TERM)
    q.wait_file("started")
    said = q("worker", "stop", "--timeout", "50ms", code=124).err
    assert "`queuectl worker stop --now`" in said
    said = q("worker", "stop", "--now", "--timeout", "50ms", code=124).err
    assert "--now" not in said and "`queuectl status`" in said
    pool.wait()


@linux
@pytest.mark.parametrize("order, state", [("STOP_SOON", "completed"), ("STOP_NOW", "pending")])
def test_workers_hear_of_a_stop_by_their_bells_alone(q: Queue, order: str, state: str) -> None:
    pool = q.pool("--count", "2")
    q.add(SLOW_GATE, "--id", "a")
    q.wait_file("started")
    assert queuectl.ring_all(str(q.db), getattr(queuectl, order)) == 2
    if state == "completed":
        q.touch("go")
    assert pool.wait() == (0 if state == "completed" else 130)
    assert q.state("a") == state and q.workers() == 0


FULL_AND_NOTHING_ELSE = """
mount -t tmpfs -o size=700k,mode=700 none "$FOLDER" || exit 77
queuectl enqueue --id a "$GATE"; queuectl enqueue --id b true; queuectl worker start --detach
until [ -e started ]; do sleep 0.05; done; dd if=/dev/zero of="$FOLDER/fill" bs=1k 2>/dev/null; touch go
until queuectl status | grep -q 'waits: the outcome of a'; do sleep 0.1; done
queuectl status; queuectl why a; queuectl why b; queuectl doctor
unshare --pid --fork --mount-proc bash -c 'queuectl worker stop --now --timeout 20s'; echo "stop: $?"
cat /dev/zero > "$FOLDER/more"; queuectl status; echo "status: $?"; queuectl doctor; queuectl list
"""


@containers
def test_a_full_disk_is_told_and_its_pool_can_be_stopped(q: Queue) -> None:
    """From another container too, where no signal reaches the pool; and what nothing has open can be read."""
    env = {"FOLDER": q.db.parent, "GATE": GATE}
    script = define(q.program) + "export -f queuectl\n" + FULL_AND_NOTHING_ELSE
    done = q.run(["unshare", "--mount", "bash", "-c", script], env=env)
    if done.code == 77:
        pytest.skip("no tmpfs can be mounted")
    assert done.out.count("the outcome of a could not be recorded yet: no space is left") == 5, done
    assert not re.search(r"\ba for [0-9.]+s", done.out) and "it runs now" not in done.out
    assert "is held up: the outcome of a" in done.out and "MiB are free" in done.out
    assert "told without it" in done.err and "stop: 0" in done.out
    assert "status: 0" in done.out and "disk I/O" not in done.out.split("stop: 0")[1]
    assert "Held by dead workers: a" in done.out and re.search(r"^Disk: +database 0\.\d MiB, log", done.out, re.M)


def test_the_log_of_detached_pools_is_bounded_while_it_is_written(q: Queue) -> None:
    log = q.db.parent / "queuectl.log"
    log.write_text("x" * 1_048_000 + "\n")
    q("worker", "start", "--detach", "--count", "2")
    q.load(["true"] * 20)
    wait_for(lambda: q.counts() == {"completed": 20})
    q.add("true", "--id", "a")  # the first line behind one that made the log too long
    wait_for(lambda: log.stat().st_size < 100_000, what="a new log")
    aside = log.with_name("queuectl.log.1")
    assert 1_048_000 < aside.stat().st_size < 1_100_000
    os.rename(log, log.with_name("rotated"))  # as logrotate does
    q.wait_state(q.add("true", "--id", "b"), "completed")
    wait_for(lambda: log.exists() and "b completed" in log.read_text())
    log.unlink()
    q.wait_state(q.add("true", "--id", "c"), "completed")
    wait_for(lambda: log.exists() and "c completed" in log.read_text())
    q("worker", "stop")
    assert "told to stop" in log.read_text() and stat.S_IMODE(log.stat().st_mode) == 0o600
    wait_for(lambda: not q.processes(), what="the pool to be gone")


def test_each_database_has_a_log_of_its_own(q: Queue) -> None:
    db = q.db.with_name("other.db")
    q("worker", "start", "--detach", env={"QUEUECTL_DB": db})
    q("worker", "stop", env={"QUEUECTL_DB": db})
    assert (q.db.parent / "other.db.log").exists() and not (q.db.parent / "queuectl.log").exists()
    wait_for(lambda: not q.processes(), what="the pool to be gone")


def test_what_a_worker_says_does_not_go_back_in_time(q: Queue) -> None:
    q.load(["sleep 0.02"] * 20)
    times = [line.split()[0] for line in q.drain().out.splitlines() if " worker 1: " in line]
    assert len(times) == 40 and times == sorted(times)


def test_watching_shows_what_runs_first(q: Queue) -> None:
    q.add("exit 9", "--id", "broken", "--max-retries", "1")
    q.drain(code=1)
    pool = q.pool("--count", "2")
    q.add(HANG, "--id", "older", "--queue", "gpu")
    q.wait_file("started")
    q.add("sleep 300", "--id", "younger")
    q.wait_state("younger", "processing")
    watch = q.terminal("status", "--watch", columns=100)
    wait_for(lambda: watch.out.count("\033[H") >= 3)
    watch.signal(signal.SIGINT)
    assert watch.wait() == 130
    frame = watch.out.split("\033[H")[2].replace("\033[K", "").splitlines()
    assert frame[1].split() == ["RUNNING", "QUEUE", "FOR", "WORKER", "COMMAND"]
    assert frame[2].split()[:2] == ["older", "gpu"] and frame[3].split()[0] == "younger"
    assert any(line.startswith("Died last: broken, ") and "exit code 9" in line for line in frame)
    assert any(line.startswith("Runs: ") for line in frame) and all(len(line) <= 100 for line in frame)
    q("worker", "stop", "--now")
    pool.wait()


def test_what_is_empty_is_said(q: Queue) -> None:
    assert q("list").out == "No such jobs.\n" and q("queue", "list").out == "No queues.\n"
    q.add("true")
    assert q("list", "--state", "dead").out == "No such jobs.\n" and q("dlq", "list").out == "No such jobs.\n"
    assert q("list", "--state", "dead", "--json").out == "[\n]\n"


def test_a_job_that_waits_for_a_time_says_how_to_start_it(q: Queue) -> None:
    assert re.search(r"a will run in 59m \d+s, at 2", q("enqueue", "--id", "a", "--delay", "1h", "true").err)
    assert "`queuectl edit a --run-at now`" in q.fails("retry", "a").err


def test_the_time_left_stands_in_front_of_a_progress_line() -> None:
    part = queuectl.Progress(123456, 100000, 23456, 1234, 0, 99, 16, False)
    line = queuectl.progress_text("run-123", part, 1234.5, 3725.0)
    assert line.startswith("run-123: 23456 of 123456 done, 1h 2m left, ") and line.index("left") < 50


def test_doctor_speaks_of_pauses_dead_jobs_and_a_log_that_grows(q: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    q.add("true", "--queue", "x")
    q("queue", "pause", "x")
    said = q("doctor").out
    assert re.search(r"^Paused: x, since 20.*Z; `queuectl queue resume x`", said, re.M)
    assert re.search(r"^On disk: database 0\.\d MiB, log 0\.\d MiB, output 0\.0 MiB\.$", said, re.M)
    monkeypatch.setattr(queuectl, "MANY_DEAD", 1)
    monkeypatch.setattr(queuectl, "LARGE_LOG", 1000)
    q.add("exit 1", "--max-retries", "1")
    with q.working():
        wait_for(lambda: q.counts().get("dead"))
        found = q("doctor", code=1).out
    assert "1 jobs are dead" in found and "dlq list --causes" in found
    assert "queue.db-wal has 0 MiB: it can't be emptied" in found and f"fuser -v {q.db}" in found


# =====================================================================================================
# Queues that run elsewhere: an engine of these tests, in another pid namespace than the workers
# =====================================================================================================

# An engine in a folder: a daemon, a client that hands it a job and shows its output, and an ender. Files in the
# folder are its switches; each may hold a number:
#   down     neither client nor ender reaches it          slow     seconds that an ender takes
#   closed   it takes no job                              babbles  the ender prints something, with exit 0
#   delay    seconds until a submitted job is visible     exit     the exit code of every client
#   mute     clients show no stderr                       late     seconds for which they keep it back
#   lose     a node is lost with all that runs there      requeue  what a node loses is started again
# Its log tells of clients, starts, ends, and of two runs of one job at once.
ENGINE = r"""
import os, signal, subprocess, sys, time

def setting(name):
    try:
        with open(name) as file:
            return float(file.read() or 1)
    except FileNotFoundError:
        return 0

def write(name, text):
    with open(name + ".new", "w") as file:
        file.write(text)
    os.rename(name + ".new", name)

def say(*words):
    with open("log", "a") as file:
        file.write(" ".join(words) + "\n")

def job_of(name):
    return name.split("-")[-2]

def start(name):
    for other in running:
        if job_of(other) == job_of(name):
            say("OVERLAP", name)
    os.rename(name + ".job", name + ".run")
    say("start", name)
    env = {"HOME": os.path.abspath("home"), "PATH": os.environ["PATH"]}
    with open(name + ".run") as file, open(name + ".out", "ab") as out, open(name + ".err", "ab") as err:
        running[name] = subprocess.Popen(["sh", "-c", file.read()], stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                                         start_new_session=True, env=env)

def send(name, number):
    if number and os.path.exists("child"):  # its shell goes on
        group = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and group_of(int(pid)) == running[name].pid]
        os.kill(max(group), number)
        return True
    try:
        os.killpg(running[name].pid, number)
    except ProcessLookupError:
        return False
    return True

def group_of(pid):
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return 0

def serve():
    while True:
        if os.path.exists("lose"):
            lost.update(running)
            os.unlink("lose")
        for file in sorted(os.listdir(".")):
            name, _, kind = file.rpartition(".")
            if kind == "sub" and time.time() >= os.stat(file).st_mtime + setting("delay"):
                os.rename(file, name + ".job")
            elif kind == "job" and os.path.exists(name + ".sig"):
                write(name + ".end", "1")
                os.unlink(file)
            elif kind == "job":
                start(name)
            elif kind == "sig" and name in running:
                with open(file) as text:
                    send(name, getattr(signal, "SIG" + text.read()))
                os.unlink(file)
        for name, process in list(running.items()):
            if name in lost:
                send(name, signal.SIGKILL)
            if process.poll() is None or send(name, 0):
                continue
            del running[name]
            say("end", name)
            if name in lost and os.path.exists("requeue"):
                lost.remove(name)
                os.rename(name + ".run", name + ".job")
                continue
            write(name + ".end", "0" if name in lost else str(process.returncode % 256))
            os.unlink(name + ".run")
        time.sleep(0.01)

def copy(name, stream):
    with open(name, "ab+") as file:
        file.seek(done.get(name, 0))
        os.write(stream, file.read())
        done[name] = file.tell()

def copy_late(name, seconds):
    if os.fork() == 0:
        time.sleep(seconds)
        copy(name + ".err", 2)
        os._exit(0)

def run(name, command):
    say("client", name)
    if setting("down"):
        sys.exit("engine: can't reach the controller")
    if setting("closed"):
        sys.exit("engine: it is closed")
    write(name + ".sub", command)
    ended = False
    while not ended:
        ended = os.path.exists(name + ".end")
        copy(name + ".out", 1)
        if not setting("mute") and not setting("late"):
            copy(name + ".err", 2)
        time.sleep(0.01)
    if setting("late"):
        copy_late(name, setting("late"))
    with open("exit" if os.path.exists("exit") else name + ".end") as file:
        sys.exit(int(file.read()))

def end(name):
    time.sleep(setting("slow"))
    if setting("down"):
        sys.exit("engine: can't reach the controller")
    if os.path.exists("babbles"):
        print("maintenance until noon")
    elif any(os.path.exists(name + kind) for kind in (".job", ".run")):
        write(name + ".sig", os.environ["QUEUECTL_SIGNAL"])
        print(name)

running, lost, done = {}, set(), {}
os.chdir(sys.argv[1])
{"serve": serve, "run": run, "end": end}[sys.argv[2]](*sys.argv[3:])
"""


class Engine:
    """A running engine, and a queue `big` that hands it its jobs."""

    def __init__(self, q: Queue, unshare: Sequence[str]) -> None:
        self.q, self.unshare, self.folder = q, unshare, q.folder / "engine"
        (self.folder / "home").mkdir(parents=True)
        script = self.folder / "engine.py"
        script.write_text(ENGINE)
        self.words = [sys.executable, "-S", "-E", str(script), str(self.folder)]
        words = " ".join(map(shlex.quote, self.words))
        self.runner, self.ender = f"{words} run $QUEUECTL_RUN {{}}", f"{words} end $QUEUECTL_RUN"
        self.daemon = q.launch([*self.words, "serve"])
        q.quick("queue", "set", "big", "--runner", self.runner, "--ender", self.ender)
        q.set("kill_grace_seconds", "0.3")

    def pool(self, *args: str) -> Background:
        """A pool that does not see the engine's processes."""
        before = self.q.workers()
        pool = self.q.launch([*self.unshare, *self.q.program, "worker", "start", *args])
        self.q.wait_ready(pool, before + (int(args[args.index("--count") + 1]) if "--count" in args else 1))
        return pool

    def stop(self, pool: Background) -> int:
        self.q("worker", "stop")
        return pool.wait()

    def drain(self, count: int = 1) -> None:
        words = [*self.unshare, *self.q.program, "worker", "start", "--drain", "--count", str(count)]
        assert self.q.run(words).code in (0, 1)

    def add(self, command: str, *options: str) -> str:
        return self.q.add(command, "--queue", "big", *options)

    def running(self, then: str = "") -> tuple[str, Background]:
        """A job that runs there, and its pool. If it must be run again, it ends at once."""
        command = "[ -e second ] || { touch begun; sleep 300; }" + then
        job, pool = self.add(command, "--cwd", str(self.file("")), "--backoff-base", "0.1"), self.pool()
        self.wait_file("begun")
        self.file("second").touch()
        return job, pool

    def killed_beside_its_shell(self) -> tuple[str, Background]:
        """A job whose worker was killed; the engine signals the child of its shell alone, which goes on."""
        job, pool = self.running("; echo on")
        self.on("child")
        (worker,) = beasts_below(first_inside(pool))
        worker.signal(signal.SIGKILL)
        return job, pool

    def on(self, switch: str, value: float = 1) -> None:
        (self.folder / switch).write_text(str(value))

    def off(self, switch: str) -> None:
        (self.folder / switch).unlink()

    def log(self, word: str) -> list[str]:
        """The names of the runs of which the engine's log says this word."""
        log = self.folder / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [line.split()[1] for line in lines if line.split()[0] == word]

    def wait_log(self, word: str, count: int = 1) -> None:
        wait_for(lambda: len(self.log(word)) >= count, what=f"{count} times '{word}' in the engine's log")

    def file(self, name: str) -> Path:
        return self.folder / "home" / name

    def wait_file(self, name: str) -> None:
        """Wait until a job has made a file there, and every client has shown the start word."""
        wait_for(self.file(name).exists, what=f"the file {name} there")
        files = Path(f"{self.q.db}.d")
        wait_for(
            lambda: (
                sum(path.read_bytes().count(b" start>") for path in files.iterdir() if path.is_file())
                >= len(list(self.folder.glob("*.run")))
            ),
            what="the start words",
        )

    def client(self) -> int:
        """The process id of the one client."""
        return only(process.pid for process in self.q.processes() if b"run" in read_proc(str(process.pid), "cmdline")
                    .split(b"\0")[5:6])  # fmt: skip


def only(values: Iterable[Any]) -> Any:
    (value,) = values
    return value


@pytest.fixture
def engine(q: Queue, unshare: list[str]) -> Iterator[Engine]:
    engine = Engine(q, unshare)
    yield engine
    assert not engine.daemon.ended, engine.daemon
    engine.daemon.process.kill()
    engine.daemon.process.wait()
    assert engine.log("OVERLAP") == []


def outcome(q: Queue, job: str) -> tuple[Any, ...]:
    shown = q.show(job)
    return shown["state"], shown["exit_code"], shown["attempts"], [run["state"] for run in shown["runs"]]


def test_the_end_word_alone_says_how_a_run_in_an_engine_ended(q: Queue, engine: Engine) -> None:
    wanted = {0: "completed", 3: "dead", 137: "dead", 255: "dead"}
    jobs = {engine.add(f"echo out; echo err >&2; exit {code}", "--max-retries", "1"): code for code in wanted}
    engine.on("exit", 5)
    engine.drain(4)
    for job, code in jobs.items():
        kind = "completed" if code == 0 else "failed"
        assert outcome(q, job) == (wanted[code], code, 1, [kind])
        run = q.show(job)["runs"][0]
        assert (run["stdout"], run["stderr"]) == ("out\n", "err\n")
        error = None if code == 0 else f"exit code {code}: err"
        assert q.show(job)["last_error"] == error


def test_output_of_a_run_in_an_engine_is_what_it_printed(q: Queue, engine: Engine) -> None:
    flood = engine.add("echo first >&2; head -c 9000000 /dev/zero | tr '\\0' x | fold -w 99 >&2; echo last >&2; exit 3",
                       "--max-retries", "1")  # fmt: skip
    bare = engine.add("printf out; printf err >&2")
    lines = engine.add("printf '\\n\\n' >&2; printf '\\n' >&2")
    carriage = engine.add("printf '100%%\\r' >&2")
    tiny = engine.add("seq 1000 >&2")
    q.set("max_output_bytes", "1024")
    engine.drain(4)
    assert outcome(q, flood)[:2] == ("dead", 3)
    printed = q.show(flood)["runs"][0]["stderr"]
    assert printed.startswith("first\nxxx") and printed.endswith("xlast\n") and len(printed) < 1500
    run = q.show(bare)["runs"][0]
    assert (run["stdout"], run["stderr"]) == ("out", "err")
    assert q.show(lines)["runs"][0]["stderr"] == "\n\n\n"
    assert q.show(carriage)["runs"][0]["stderr"] == "100%\r"
    printed = q.show(tiny)["runs"][0]["stderr"]
    assert printed.startswith("1\n2\n") and printed.endswith("999\n1000\n") and "queuectl " not in printed


def test_a_run_in_an_engine_has_its_folder_umask_and_variables_but_its_env_is_not_shown(
    q: Queue, engine: Engine
) -> None:
    q.env["SECRET"] = "not for ps"
    folder = q.work / "a 'b\" $c"
    folder.mkdir()
    command = "pwd; umask; echo $QUEUECTL_JOB_ID $QUEUECTL_ATTEMPT $QUEUECTL_QUEUE $QUEUECTL_RUN; "
    command += "echo \"$SECRET\" 'ö\\'"
    job = engine.add(command, "--env", "SECRET", "--cwd", str(folder), "--id", "its-id")
    dashed = engine.add("-x 2>/dev/null; echo dash")
    lines = engine.add("for i in 1 2\ndo\n  echo $i # a comment\ndone")
    gone = q.work / "gone"
    gone.mkdir()
    missing = engine.add("true", "--cwd", str(gone), "--max-retries", "1")
    gone.rmdir()
    old = os.umask(0o27)
    try:
        masked = engine.add("umask")
    finally:
        os.umask(old)
    engine.drain(2)
    name = only(name for name in engine.log("start") if name.split("-")[-2] == "1")
    shown = q.show(job)["runs"][0]["stdout"]
    assert shown == f"{folder}\n{old:04o}\nits-id 1 big {name}\n ö\\\n"
    assert q.show(dashed)["runs"][0]["stdout"] == "dash\n"
    assert q.show(lines)["runs"][0]["stdout"] == "1\n2\n"
    assert q.show(masked)["runs"][0]["stdout"] == "0027\n"
    assert outcome(q, missing) == ("dead", 126, 1, ["failed"])
    assert f"can't start in the folder {gone}" in q.show(missing)["last_error"]
    # The client has the job's env: each engine has a way to pass it on.
    q.quick("queue", "set", "client", "--runner", "sh -c {}", "--ender", "none")
    told = q.add('echo "$SECRET"', "--queue", "client", "--env", "SECRET")
    q.drain()
    assert q.show(told)["runs"][0]["stdout"] == "not for ps\n"


def test_an_engine_that_takes_no_jobs_uses_up_nothing_and_its_queue_rests(q: Queue, engine: Engine) -> None:
    engine.on("closed")
    jobs = [engine.add("true", "--max-retries", "1") for _ in range(6)]
    pool = engine.pool("--count", "3")
    wait_for(lambda: q.status()["troubles"], what="word of the engine")
    here = q.add("true")
    q.wait_state(here, "completed")
    wait_for(lambda: len(engine.log("client")) > 3, what="a probe")
    assert len(engine.log("client")) == 4  # three at once, then one
    wait_for(lambda: q.look("queue", "list")[0]["next_try_at"], what="the next rest")
    (trouble,) = q.status()["troubles"]
    assert "the queue big rests until 20" in trouble and "engine: it is closed" in trouble
    listed = only(queue for queue in q.look("queue", "list") if queue["name"] == "big")
    assert listed["runner"] == engine.runner and listed["ender"] == engine.ender
    assert TIME.fullmatch(listed["next_try_at"]) and "it is closed" in listed["rest_why"]
    assert "it is closed" in q.quick("why", jobs[-1])
    assert "it is closed" in q("doctor", code=1).out
    engine.off("closed")
    wait_for(lambda: all(q.state(job) == "completed" for job in jobs), what="all to complete")
    assert [outcome(q, job) for job in jobs] == [("completed", 0, 1, ["completed"])] * 6
    assert q.status()["troubles"] == [] and q.look("queue", "list")[0]["next_try_at"] is None
    assert engine.stop(pool) == 0


def test_an_engine_that_is_down_does_not_hold_all_workers(q: Queue, engine: Engine) -> None:
    """Their runs are not surely gone, for the ender can't tell; a run left to recovery holds no worker."""
    engine.on("down")
    jobs = [engine.add("true", "--max-retries", "1") for _ in range(6)]
    pool = engine.pool("--count", "2")
    wait_for(lambda: q.status()["troubles"], what="word of the engine")
    here = q.add("true")
    q.wait_state(here, "completed", 40)
    assert len(engine.log("client")) == 2
    assert {q.state(job) for job in jobs} == {"pending", "processing"}
    assert any("the queue big waits for what becomes of one job" in trouble for trouble in q.status()["troubles"])
    assert "waits for what becomes of one job" in q.quick("why", jobs[-1])
    engine.off("down")
    wait_for(lambda: all(q.state(job) == "completed" for job in jobs), 60, "all to complete")
    assert [outcome(q, job) for job in jobs] == [("completed", 0, 1, ["completed"])] * 6
    assert q.status()["troubles"] == []
    assert engine.stop(pool) == 0


def test_the_rest_of_a_queue_grows_and_ends_with_a_probe_that_begins(store: Any) -> None:
    store.set_engine("big", "run {}", None)
    for _ in range(3):
        put(store, queue="big")
    ended = round(time.time() * 1000) - 61_000  # so that each rest is over
    for job in [take(store), take(store)]:  # handed over together: that counts once
        end(store, job, queuectl.UNSTARTED, ended)
    rests: list[int] = []
    tried: list[int] = []
    for _ in range(8):
        rests.append(store.queue("big")["next_try_at"] - ended - len(tried))
        job = take(store)
        tried.append(job.seq)
        assert (job.attempts, job.runs) == (1, 1) and take(store) is None
        end(store, job, queuectl.UNSTARTED, ended + len(tried))
    assert rests == [1000 * seconds for seconds in (1, 2, 4, 8, 16, 32, 60, 60)]
    assert len(set(tried)) == 3  # an engine that refuses the first may take another
    end(store, take(store), queuectl.UNSTARTED, ended + 61_000)
    assert take(store) is None  # it rests now
    end(store, job, queuectl.UNSTARTED, ended + 200_000)
    with store.transaction():
        store.end_rests("big")
    assert [take(store).runs for _ in range(3)] == [1, 1, 1]


def test_a_claim_that_may_not_be_made_leaves_no_probe(store: Any) -> None:
    store.set_engine("big", "run {}", None)
    for _ in range(2):
        put(store, queue="big")
    end(store, take(store), queuectl.UNSTARTED, round(time.time() * 1000) - 61_000)
    with store.transaction():
        store.add_pool("none left", 1, [], 0, NOW)
        assert store.claim("none left-1", 0, (), store.pulse()[1], NOW, "none left") is None
    assert take(store) is not None


def test_a_drain_waits_for_a_queue_that_rests(store: Any) -> None:
    store.set_engine("big", "run {}", None)
    put(store, queue="big")
    end(store, take(store), queuectl.UNSTARTED, round(time.time() * 1000))
    with store.transaction():
        store.execute("UPDATE queues SET rest_why = 'it is closed'")
    assert take(store) is None and not store.drained((), NOW)
    store.set_engine("big", None, None)
    job = take(store)
    with store.transaction():
        store.hold_queue(job, "its engine is down")  # it began there; its queue runs here by now
    assert store.queue("big")["rest_why"] is None
    end(store, job, queuectl.COMPLETED, NOW)
    assert store.drained((), NOW)


def test_an_ender_of_a_job_that_has_removed_its_folder_is_asked(q: Queue) -> None:
    q.quick("queue", "set", "big", "--runner", "sh -c {}", "--ender", "true")
    folder = q.work / "gone"
    folder.mkdir()
    job = q.add("rmdir ../gone; exit 3", "--queue", "big", "--cwd", str(folder), "--max-retries", "1")
    q.drain(code=1)
    assert outcome(q, job) == ("dead", 3, 1, ["failed"])


def test_a_lost_node_costs_an_attempt_whatever_the_client_says(q: Queue, engine: Engine) -> None:
    job, pool = engine.running()
    engine.on("lose")
    q.wait_state(job, "completed")
    assert outcome(q, job) == ("completed", 0, 2, ["lost", "completed"])
    assert "its engine lost it" in q.show(job)["runs"][0]["error"]
    assert engine.stop(pool) == 0


def test_a_client_that_dies_takes_its_job_along(q: Queue, engine: Engine) -> None:
    job = engine.add("trap '' TERM; [ -e second ] || { touch begun; for i in $(seq 600); do sleep 0.1; done; }",
                     "--cwd", str(engine.file("")), "--backoff-base", "0.1")  # fmt: skip
    pool = engine.pool()
    engine.wait_file("begun")
    wait_for(lambda: q.show(job)["state"] == "processing")
    engine.file("second").touch()
    os.kill(engine.client(), signal.SIGKILL)
    q.wait_state(job, "completed")
    assert outcome(q, job) == ("completed", 0, 2, ["lost", "completed"])
    assert len(engine.log("start")) == 2
    assert engine.stop(pool) == 0


def test_a_run_that_is_not_surely_gone_stays_until_it_is(q: Queue, engine: Engine) -> None:
    job, pool = engine.running()
    engine.on("down")
    os.kill(engine.client(), signal.SIGKILL)
    said = wait_for(lambda: q.status()["troubles"], what="the ender's words")
    assert re.search(rf"{job} is not surely gone from its engine, since 20.*Z; the ender says: engine: can't reach",
                     said[0])  # fmt: skip
    assert "the ender says: engine: can't reach" in q.quick("why", job)
    assert "the ender says: engine: can't reach" in q("doctor", code=1).out
    time.sleep(2.5)
    assert (q.state(job), len(engine.log("start"))) == ("processing", 1)
    engine.off("down")
    q.wait_state(job, "completed")
    assert outcome(q, job) == ("completed", 0, 2, ["lost", "completed"])
    assert q.status()["troubles"] == []
    assert engine.stop(pool) == 0


@pytest.mark.parametrize("switch", ["babbles", "slow"])
def test_an_ender_that_says_anything_or_is_slow_is_waited_for(q: Queue, engine: Engine, switch: str) -> None:
    job, pool = engine.running()
    engine.on(switch)
    os.kill(engine.client(), signal.SIGKILL)
    if switch == "babbles":
        assert "the ender says: maintenance until noon" in wait_for(lambda: q.status()["troubles"])[0]
        engine.off(switch)
    q.wait_state(job, "completed")
    assert outcome(q, job) == ("completed", 0, 2, ["lost", "completed"])
    assert engine.stop(pool) == 0


def test_what_was_submitted_but_is_not_visible_yet_does_not_run_beside_the_next_run(q: Queue, engine: Engine) -> None:
    engine.on("delay", 1)
    job = engine.add("sleep 1", "--backoff-base", "0.1")
    pool = engine.pool()
    engine.wait_log("client")
    wait_for(lambda: list(engine.folder.glob("*.sub")))
    os.kill(engine.client(), signal.SIGKILL)
    engine.wait_log("client", 2)
    engine.off("delay")
    q.wait_state(job, "completed")
    assert outcome(q, job) == ("completed", 0, 1, ["completed"])  # the first was not started
    assert engine.stop(pool) == 0


@pytest.mark.parametrize("who", ["client", "shell"])
def test_a_client_that_submits_while_the_ender_is_asked_is_not_believed_gone(
    q: Queue, engine: Engine, who: str
) -> None:
    """It lives when the engine first says "gone": by itself, or as the child of a shell that was killed."""
    engine.on("delay", 1)
    wait = "sleep 1.6" if who == "client" else "sleep 2.4"
    script = q.work / "client"
    script.write_text(f"#!/bin/sh\nif mkdir {q.work}/once 2>/dev/null; then {wait}; "
                      f'printf %s "$1" >{engine.folder}/new; mv {engine.folder}/new {engine.folder}/$QUEUECTL_RUN.sub; '
                      f'sleep 0.1; exit 255; fi\nexec {engine.runner.replace("{}", "")}"$1"\n')  # fmt: skip
    script.chmod(0o755)
    q.quick("queue", "set", "big", "--runner", f"x=1; {script} {{}}; exit $?", "--ender", engine.ender)
    timeout = ["--timeout", "0.5"] if who == "client" else []
    job = engine.add("sleep 2", *timeout, "--backoff-base", "0.1")
    pool = engine.pool()
    wait_for((q.work / "once").exists)
    if who == "client":
        q.quick("edit", job, "--timeout", "30")  # of the next run; this one has timed out
    else:
        (worker,) = beasts_below(first_inside(pool))
        (shell,) = beasts_below(worker.pid)
        shell.signal(signal.SIGKILL)
    q.wait_state(job, "completed", 40)
    assert len(engine.log("start")) in (1, 2) and engine.log("OVERLAP") == []
    assert engine.stop(pool) == 0


def test_words_may_be_late(q: Queue, engine: Engine) -> None:
    engine.on("late", 1)
    done, failed = engine.add("echo x >&2"), engine.add("exit 4", "--max-retries", "1")
    engine.drain(2)
    assert outcome(q, done) == ("completed", 0, 1, ["completed"])
    assert outcome(q, failed) == ("dead", 4, 1, ["failed"])


def test_an_end_without_words_is_no_run(q: Queue, engine: Engine) -> None:
    engine.on("mute")
    job = engine.add("true", "--max-retries", "1")
    pool = engine.pool()
    engine.wait_log("client", 2)
    engine.off("mute")
    q.wait_state(job, "completed")
    assert outcome(q, job) == ("completed", 0, 1, ["completed"])
    assert engine.stop(pool) == 0


def test_an_engine_that_starts_a_run_again_is_refused(q: Queue, engine: Engine) -> None:
    engine.on("requeue")
    command = "if [ -e second ]; then echo >>begun; else echo >>begun; sleep 300; fi"
    job = engine.add(command, "--cwd", str(engine.file("")), "--backoff-base", "0.1")
    pool = engine.pool()
    engine.wait_file("begun")
    engine.file("second").touch()
    engine.on("lose")
    q.wait_state(job, "completed")
    first, again, second = engine.log("start")
    assert first == again != second
    assert outcome(q, job) == ("completed", 0, 2, ["lost", "completed"])
    assert "does not run twice" in q.show(job)["runs"][0]["stderr"]
    assert engine.file("begun").read_text() == "\n\n"
    assert engine.stop(pool) == 0


def test_old_marks_of_runs_are_removed_there(q: Queue, engine: Engine) -> None:
    marks = engine.file(".queuectl-runs")
    for name, age in (("old", 40), ("young", 20)):
        (marks / name).mkdir(parents=True)
        os.utime(marks / name, (time.time() - age * 86400,) * 2)
    words = {"QUEUECTL_RUN": "x"}
    for name in ("p-1-1-1_1234567f", "p-1-1-1_12345600"):
        done = q.run(["sh", "-c", queuectl.WRAPPER, name, "/", "022", "/bin/sh", "exit 3"],
                     env={**words, "HOME": engine.file("")})  # fmt: skip
        assert done.code == 3
        assert (marks / "old").exists() == name.endswith("7f")
    assert (marks / "young").exists()


def test_a_job_that_ignores_sigterm_keeps_its_wrapper(q: Queue) -> None:
    """Slurm loses sight of processes whose parent is gone, and calls a run gone that lives on."""
    command = "trap '' TERM; touch begun; until [ -e go ]; do sleep 0.02; done; exit 3"
    words = ["sh", "-c", queuectl.WRAPPER, "p-1-1-1_1234567f", str(q.work), "022", "/bin/sh", command]
    wrapper = q.launch(["env", "QUEUECTL_RUN=p-1-1-1_1234567f", f"HOME={q.home}", *words])
    wait_for((q.work / "begun").exists, what="the job to begin")
    wrapper.process.terminate()
    time.sleep(0.2)
    assert not wrapper.ended
    (q.work / "go").touch()
    assert wrapper.wait() == 3 and "<queuectl p-1-1-1_1234567f cut 3>" in wrapper.err


def test_a_time_out_a_cancel_and_a_stop_reach_the_engine(q: Queue, engine: Engine) -> None:
    command = "trap '' TERM; touch $QUEUECTL_JOB_ID; while :; do sleep 0.1; done"
    there = str(engine.file(""))
    late = engine.add(command, "--timeout", "1", "--max-retries", "1", "--cwd", there)
    cancelled, stopped = (engine.add(command, "--cwd", there) for _ in range(2))
    pool = engine.pool("--count", "3")
    for job in (late, cancelled, stopped):
        engine.wait_file(job)
    q("cancel", cancelled, code=None)
    q.wait_state(cancelled, "cancelled")
    q.wait_state(late, "dead")
    assert "timed out after 1s" in q.show(late)["last_error"]
    q("worker", "stop", "--now")
    assert pool.wait() == 130
    assert outcome(q, stopped) == ("pending", None, 0, ["stopped"])
    assert sorted(engine.log("end")) == sorted(engine.log("start"))


def test_a_stop_asks_an_engine_once_and_leaves_the_rest_to_the_next_pool(q: Queue, engine: Engine) -> None:
    job, pool = engine.running()
    engine.on("down")
    q("worker", "stop", "--now", code=None)
    pool.wait(15)
    assert q.state(job) == "processing"
    assert "the ender says" in q.quick("why", job) and "the ender says" in q("doctor", code=1).out
    next_pool = engine.pool()
    wait_for(lambda: any("ender says" in trouble for trouble in q.status()["troubles"]))
    assert (q.state(job), len(engine.log("start"))) == ("processing", 1)
    engine.off("down")
    q.wait_state(job, "completed")
    assert outcome(q, job) == ("completed", 0, 1, ["stopped", "completed"])
    assert engine.stop(next_pool) == 0


@pytest.mark.parametrize("down", [False, True])
def test_worker_pool_and_client_may_die_together(q: Queue, engine: Engine, down: bool) -> None:
    jobs = [
        engine.add(f"[ -e second ] || {{ touch begun{number}; sleep 300; }}", "--cwd", str(engine.file("")),
                   "--backoff-base", "0.1")
        for number in range(2)
    ]  # fmt: skip
    done = engine.add("touch begun2; until [ -e second ]; do sleep 0.05; done", "--cwd", str(engine.file("")))
    pool = engine.pool("--count", "3")
    for number in range(3):
        engine.wait_file(f"begun{number}")
    wait_for(lambda: len([name for name in engine.folder.glob("*.err") if name.stat().st_size]) == 3)
    time.sleep(0.1)  # the start words are under way
    kill_inside(pool)
    if down:
        engine.on("down")
    engine.file("second").touch()
    next_pool = engine.pool("--count", "2")
    if down:
        wait_for(lambda: any("ender says" in trouble for trouble in q.status()["troubles"]))
        local = q.add("true")
        q.wait_state(local, "completed")
        assert {q.state(job) for job in jobs} == {"processing"}
        engine.off("down")
    for job in (*jobs, done):
        q.wait_state(job, "completed")
    for job in jobs:
        assert outcome(q, job) == ("completed", 0, 2, ["lost", "completed"])
    assert engine.stop(next_pool) == 0


def test_a_shell_that_goes_on_when_its_engine_kills_its_child_has_not_completed(q: Queue, engine: Engine) -> None:
    """As Slurm does, which signals children first: the job then ends with 0, but not by itself."""
    job, pool = engine.killed_beside_its_shell()
    q.wait_state(job, "completed")
    assert outcome(q, job) == ("completed", 0, 2, ["lost", "completed"])
    assert engine.stop(pool) == 0


def test_recovery_that_is_cut_off_leaves_word_that_it_found_a_run_alive(q: Queue, engine: Engine) -> None:
    job, pool = engine.killed_beside_its_shell()
    wait_for(lambda: any("it was found alive" in trouble for trouble in q.status()["troubles"]))
    engine.wait_log("end")
    assert engine.stop(pool) == 0 and q.state(job) == "processing"
    pool = engine.pool()
    q.wait_state(job, "completed")
    assert outcome(q, job) == ("completed", 0, 1, ["stopped", "completed"])
    assert engine.stop(pool) == 0


def test_a_lost_run_that_ends_by_itself_before_its_ender_is_asked_counts() -> None:
    """Many wait for their turn; each is looked at just before."""
    seen: list[str] = []

    class Asked:
        kill_at, met, counts = queuectl.FOREVER, False, True

        def is_asking(self) -> bool:
            return "asked" in seen and "answered" not in seen

        def is_gone(self) -> bool:
            self.kill_at = 1.0
            seen.append("answered" if "asked" in seen else "asked")
            return "answered" in seen

        def is_stuck(self, patience: float) -> bool:
            return False

    class Lost:
        def expect_end(self) -> None:
            seen.append("looked")

    run = Lost()
    round_ = queuectl.EngineRound.__new__(queuectl.EngineRound)
    gone: list[Any] = []
    ender = Asked()
    assert round_._stays(run, ender, gone) and not round_._stays(run, ender, gone)
    assert (seen, gone) == (["looked", "asked", "answered"], [run])


def test_a_worker_that_ends_its_own_run_goes_on_with_its_round(q: Queue, engine: Engine) -> None:
    lost, pool = engine.running()
    q.set("kill_grace_seconds", "12")
    engine.on("slow", 0.5)
    kill_inside(pool)
    local = q.add("trap '' TERM; while :; do sleep 0.1; done", "--timeout", "0.2", "--max-retries", "1")
    pool = engine.pool()
    wait_for(lambda: q.show(lost)["runs"][0]["state"] == "lost", what="the lost run's record")
    assert q.state(local) == "processing"
    q.wait_state(local, "dead")
    q.wait_state(lost, "completed")
    q("doctor")  # the dead worker and its pool are forgotten
    assert engine.stop(pool) == 0


def test_a_word_after_a_sigterm_is_believed_if_no_ender_was_asked(q: Queue, engine: Engine) -> None:
    """An engine may end a job by itself, for example because its time is over; then its exit code counts."""
    signalled = "trap 'exit %d' TERM; kill -TERM $PPID; kill -TERM $$; exit 1"
    graceful, failed = engine.add(signalled % 0), engine.add(signalled % 3, "--max-retries", "1")
    engine.drain(2)
    assert outcome(q, graceful) == ("completed", 0, 1, ["completed"])
    assert outcome(q, failed) == ("dead", 3, 1, ["failed"])
    assert "cut" not in q("logs", graceful).out


def enders(q: Queue) -> list[int]:
    """The process ids of the enders that are asked now."""
    return [process.pid for process in q.processes()
            if b"end" in read_proc(str(process.pid), "cmdline").split(b"\0")]  # fmt: skip


def test_nobody_waits_for_the_engine_of_a_lost_run(q: Queue, engine: Engine) -> None:
    """Neither the one worker's other jobs, nor a local job whose worker was killed."""
    lost, pool = engine.running()
    engine.on("slow", 300)
    kill_inside(pool)
    pool = engine.pool("--queue", "big", "--queue", "default")
    wait_for(lambda: enders(q), what="an ender")
    (asked,) = enders(q)
    for _ in range(2):
        q.wait_state(q.add("sleep 0.2"), "completed", 10)
    with q.working("--queue", "here"):
        local = q.add("test -e again || { touch again; sleep 300; }", "--queue", "here", "--backoff-base", "0.1")
        q.wait_file("again")
        kill(registered(q, "workers")[q.show(local)["locked_by"]], signal.SIGKILL)
        q.wait_state(local, "completed", 15)
    assert (enders(q), q.state(lost)) == ([asked], "processing")
    engine.off("slow")
    kill(asked, signal.SIGKILL)
    q.wait_state(lost, "completed")
    assert outcome(q, lost) == ("completed", 0, 2, ["lost", "completed"])
    assert engine.stop(pool) == 0


def lost_in_an_engine(q: Queue, unshare: list[str], ender: str, count: int = 1, *options: str) -> list[str]:
    """Jobs of a queue `far` whose workers and clients were killed; the ender alone says what is still there."""
    q.quick("queue", "set", "far", "--runner", "sh -c {}", "--ender", ender)
    jobs = [q.add(f"echo $QUEUECTL_RUN >far{number}; sleep 300", "--queue", "far", "--backoff-base", "300", *options)
            for number in range(count)]  # fmt: skip
    pool = q.launch([*unshare, *q.program, "worker", "start", "--queue", "far", "--count", str(count)])
    for number in range(count):
        q.wait_file(f"far{number}")
    kill_inside(pool)
    return jobs


ASKING_ONE_AT_A_TIME = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import queuectl
queuectl.ENDERS_AT_ONCE = 1
sys.exit(queuectl.main())
"""


def test_a_lost_run_that_waits_for_its_turn_is_first_asked_to_end(q: Queue, unshare: list[str]) -> None:
    q.set("kill_grace_seconds", "0.5")
    ender = f"cd {q.work}; [ -e $QUEUECTL_RUN ] || echo $QUEUECTL_SIGNAL >$QUEUECTL_RUN; sleep 0.8"
    jobs = lost_in_an_engine(q, unshare, ender, 3)
    pool = q.launch([*q.program[:-1], "-c", ASKING_ONE_AT_A_TIME, PROGRAM.parent, "worker", "start"])
    for job in jobs:
        q.wait_state(job, "failed", 40)
    assert [file.read_text() for file in q.work.glob("*_*")] == ["TERM\n"] * 3
    q("worker", "stop")
    assert pool.wait() == 0


def test_a_lost_run_that_is_cancelled_while_its_ender_is_asked_is_cancelled(q: Queue, unshare: list[str]) -> None:
    ender = f"cd {q.work}; touch asked; until [ -e go ]; do sleep 0.05; done"
    (job,) = lost_in_an_engine(q, unshare, ender, 1, "--max-retries", "1")
    with q.working():
        q.wait_file("asked")
        q("cancel", job, code=None)
        (q.work / "go").touch()
        wait_for(lambda: q.state(job) != "processing")
    assert q.state(job) == "cancelled"


TELLING_OF_STEPS = """
import sys
sys.path.insert(0, sys.argv.pop(1))
steps = sys.argv.pop(1)
import queuectl
real = queuectl.EngineRound.step
def step(self, *args):
    count = real(self, *args)
    with open(steps, "a") as file:
        file.write("%d\\n" % count)
    return count
queuectl.EngineRound.step = step
sys.exit(queuectl.main())
"""


def test_a_worker_gives_back_one_lost_run_at_a_time(q: Queue, unshare: list[str]) -> None:
    """To look for its processes takes long on a machine that has many; the worker's own run would wait so long."""
    jobs = lost_in_an_engine(q, unshare, "sleep 0.5", 6)
    pool = q.launch([*q.program[:-1], "-c", TELLING_OF_STEPS, PROGRAM.parent, q.work / "steps", "worker", "start"])
    for job in jobs:
        q.wait_state(job, "failed")
    q("worker", "stop")
    assert pool.wait() == 0
    assert sorted(q.lines("steps"))[-7:] == ["0"] + ["1"] * 6


def test_what_is_left_of_a_lost_client_gets_no_grace(q: Queue, unshare: list[str]) -> None:
    """The worker that recovers it can't wait so long: it may run another job meanwhile."""
    q.set("kill_grace_seconds", "600")
    (job,) = lost_in_an_engine(q, unshare, f"touch {q.work}/asked")
    stubborn = "trap '' TERM; touch trapped; while :; do sleep 0.1; done"
    q.launch(["sh", "-c", stubborn], {"QUEUECTL_RUN": q.lines("far0")[0]})
    q.wait_file("trapped")
    with q.working():
        q.wait_state(job, "failed")


def test_no_backup_replaces_a_queue_whose_lost_run_is_in_an_engine(q: Queue, engine: Engine) -> None:
    lost, pool = engine.running()
    q("backup", "b.db")
    kill_inside(pool)
    assert f"{lost} may still be running" in q.fails("restore", "b.db").err
    pool = engine.pool("--queue", "none")
    wait_for(lambda: q.state(lost) != "processing")
    assert engine.stop(pool) == 0
    q("restore", "b.db")
    engine.drain()
    assert (q.state(lost), len(engine.log("start"))) == ("completed", 2)


def test_an_engine_that_says_gone_and_then_fails_has_confirmed_nothing(q: Queue, engine: Engine) -> None:
    doubtful = f"if [ -e honest ]; then {engine.ender}; elif mkdir said 2>/dev/null; then :; else echo no word; fi"
    q.quick("queue", "set", "big", "--runner", engine.runner, "--ender", doubtful)
    job, pool = engine.running()
    kill_inside(pool)
    pool = engine.pool()
    wait_for(lambda: any("the ender says: no word" in trouble for trouble in q.status()["troubles"]))
    time.sleep(1)  # what is looked at: it stays as it is
    states = [run["state"] for run in q.show(job)["runs"]]
    assert (states, len(engine.log("start"))) == (["processing"], 1)
    engine.file("honest").touch()
    q.wait_state(job, "completed")
    assert outcome(q, job) == ("completed", 0, 2, ["lost", "completed"])
    assert engine.stop(pool) == 0


def test_output_that_comes_long_after_the_end_word_is_waited_for(q: Queue) -> None:
    """A slow line brings it; the word came by stderr."""
    runner = "sh -c {} >out; for i in 1 2 3 4 5 6 7 8; do sleep 1; echo $i; done"
    q.quick("queue", "set", "big", "--runner", runner, "--ender", "none")
    job = q.add("true", "--queue", "big")
    q.drain()
    assert q.show(job)["runs"][0]["stdout"].split() == list("12345678")


def test_a_job_has_ended_with_its_end_word_though_a_daemon_never_stops_printing(q: Queue) -> None:
    (q.work / "short.py").write_text(ASKING_ONE_AT_A_TIME.replace("ENDERS_AT_ONCE", "LONGEST_LINGER"))
    q.quick("queue", "set", "big", "--runner", "sh -c {}; while sleep 0.2; do echo; done", "--ender", "none")
    job = q.add("true", "--queue", "big")
    assert q.run([*q.program[:-1], "short.py", PROGRAM.parent, "worker", "start", "--drain"]).code == 0
    assert outcome(q, job) == ("completed", 0, 1, ["completed"])


@pytest.mark.parametrize("code", [0, 3])
def test_a_job_has_ended_with_its_end_word_though_a_daemon_holds_its_client(
    q: Queue, engine: Engine, code: int
) -> None:
    job = engine.add(f"sleep 60 & echo $! >daemon; exit {code}", "--cwd", str(engine.file("")), "--max-retries", "1")
    pool = engine.pool()
    q.wait_state(job, "dead" if code else "completed", 30)
    assert outcome(q, job) == (q.state(job), code, 1, ["failed" if code else "completed"])
    assert engine.stop(pool) == 0
    kill(int(engine.file("daemon").read_text()), signal.SIGKILL)


def test_a_dead_workers_run_that_had_ended_is_recorded_by_its_end_word(q: Queue, engine: Engine) -> None:
    job = engine.add("touch begun; until [ -e go ]; do sleep 0.02; done", "--cwd", str(engine.file("")))
    words = " ".join(shlex.quote(str(word)) for word in q.program)
    script = words + " worker start & wait; until [ -e halt ]; do sleep 0.05; done"
    pool = q.launch([*engine.unshare, "bash", "-c", script])
    engine.wait_file("begun")
    (supervisor,) = beasts_below(first_inside(pool))
    (worker,) = beasts_below(supervisor.pid)
    supervisor.signal(signal.SIGKILL)
    worker.signal(signal.SIGKILL)
    engine.file("go").touch()  # its client goes on, and shows the end word
    engine.wait_log("end")
    time.sleep(0.2)
    engine.drain()
    assert outcome(q, job) == ("completed", 0, 1, ["completed"])
    q.touch("halt")
    pool.wait()


def test_a_run_keeps_the_engine_that_it_began_with(q: Queue, engine: Engine) -> None:
    job, pool = engine.running()
    q.quick("queue", "set", "big", "--runner", "echo to another engine; false {}", "--ender", "echo never asked")
    q.quick("queue", "pause", "big")  # a run in that other engine would never be gone
    os.kill(engine.client(), signal.SIGKILL)
    wait_for(lambda: q.show(job)["runs"][0]["state"] == "lost", what="the first run's record")
    q.quick("queue", "set", "big", "--runner", "none")
    q.quick("queue", "resume", "big")
    q.wait_state(job, "completed")
    assert engine.stop(pool) == 0


def test_a_run_in_an_engine_that_is_gone_for_ever_can_be_given_up(q: Queue, engine: Engine) -> None:
    job = engine.add("touch begun; sleep 300", "--cwd", str(engine.file("")))
    pool = engine.pool()
    engine.wait_file("begun")
    engine.on("down")
    q("worker", "stop", "--now", code=None)
    pool.wait(15)
    q.quick("queue", "set", "big", "--runner", "none")
    q("cancel", job, code=None)
    next_pool = engine.pool()
    q.wait_state(job, "cancelled")
    assert engine.stop(next_pool) == 0
    engine.off("down")


def test_the_wrapper_changes_no_variable_of_a_job(q: Queue) -> None:
    q.quick("queue", "set", "near", "--runner", "sh -c {}", "--ender", "none")
    names = ["run", "home", "begun", "code", "word"]
    options = [part for name in names for part in ("--env", f"{name}=mine")]
    job = q.add("echo " + " ".join("$" + name for name in names), "--queue", "near", *options)
    q.drain()
    assert q("logs", job, "--stdout").out == "mine mine mine mine mine\n"


def test_an_engine_without_ender_dies_with_its_client(q: Queue) -> None:
    q.quick("queue", "set", "nice", "--runner", "nice -n 5 sh -c {}", "--ender", "none")
    fine, dead = q.add("nice", "--queue", "nice"), q.add("exit 7", "--queue", "nice", "--max-retries", "1")
    late = q.add("sleep 300", "--queue", "nice", "--max-retries", "1", "--timeout", "0.3")
    q.drain("--count", "3", code=1)
    assert q.show(fine)["runs"][0]["stdout"] == f"{os.nice(0) + 5}\n"
    assert outcome(q, dead) == ("dead", 7, 1, ["failed"])
    assert (q.state(late), q.show(late)["attempts"]) == ("dead", 1)
    assert q.show(late)["last_error"].startswith("timed out after 0.3s")


def test_words_are_heard_from_a_client_that_merges_the_streams(q: Queue) -> None:
    """As one with a terminal does, whose lines end in CR LF: a job that is not heard would run again and again."""
    merged = 'sh -c {} 2>&1 | sed "s/$/\r/"'
    q.quick("queue", "set", "merged", "--runner", merged, "--ender", "none")
    job = q.add("echo out; echo err >&2; echo x >>ran; exit 3", "--queue", "merged", "--max-retries", "1")
    q.drain(code=1)
    assert outcome(q, job) == ("dead", 3, 1, ["failed"])
    run = q.show(job)["runs"][0]
    assert (run["stdout"], run["stderr"], q.lines("ran")) == ("out\r\nerr\r\n", "", ["x"])


def test_an_engine_whose_command_is_missing_is_named(q: Queue) -> None:
    q.quick("queue", "set", "typo", "--runner", "no-such-engine {}", "--ender", "none")
    job = q.add("true", "--queue", "typo", "--max-retries", "1")
    pool = q.pool()
    (said,) = wait_for(lambda: q.status()["troubles"])
    assert "no-such-engine" in said and "not found" in said
    assert outcome(q, job) == ("pending", None, 0, [])
    found = q("doctor", "--queue", "typo", "--json", code=1).json()
    assert found[0]["works"] is False and "no-such-engine" in found[0]["why"]
    assert pool.stop() == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--runner", "srun sh -c", "--ender", "x"], "{} once"),
        (["--runner", "srun {} {}", "--ender", "x"], "{} once"),
        (["--runner", "srun sh -c '{}'", "--ender", "x"], "outside of quotes"),
        (["--runner", "srun # {}", "--ender", "x"], "outside of quotes and comments"),
        (["--runner", "srun {}"], "--ender"),
        (["--ender", "scancel x"], "--runner"),
        (["--runner", "none", "--ender", "x"], "{} once"),
        (["--runner", "srun '{}", "--ender", "x"], ""),
        ([], "--concurrency"),
    ],
)
def test_bad_engines_change_nothing(q: Queue, options: list[str], words: str) -> None:
    assert words in q.fails("queue", "set", "big", *options, code=2).err
    assert q.look("queue", "list") == []


def test_a_queue_with_an_engine_is_shown_and_forgotten(q: Queue) -> None:
    said = q("queue", "set", "big", "--runner", "sh -c {}", "--ender", "none", "--concurrency", "4").out
    assert said == "Queue updated: big: runner = sh -c {}, ender = none, concurrency = 4\n"
    q.quick("queue", "set", "big", "--concurrency", "none")
    listed = only(q.look("queue", "list"))
    assert (listed["runner"], listed["ender"], listed["next_try_at"]) == ("sh -c {}", None, None)
    assert q("queue", "list").out.splitlines()[1].split()[-3:] == ["sh", "-c", "{}"]
    q.quick("queue", "set", "big", "--runner", "none")
    assert q.look("queue", "list") == []


def test_run_in_a_queue_uses_its_engine(q: Queue, engine: Engine) -> None:
    done = q.run([*engine.unshare, *q.program, "run", "--queue", "big", "--each", "echo {}", "one", "two"])
    pool = engine.pool() if done.code else None
    assert pool is None, done
    assert sorted(done.out.splitlines()) == ["one", "two"]
    assert len(engine.log("start")) == 2


def test_doctor_takes_no_hooks_from_other_jobs(q: Queue) -> None:
    """Its workers also give back lost jobs, and cancel those that have expired."""
    q.quick("queue", "set", "big", "--runner", "sh -c {}", "--ender", "none")
    q.add("touch begun; sleep 300", "--max-retries", "1")
    pool = q.pool()
    q.wait_file("begun")
    kill_pool(pool)
    q.set("on_dead", "echo hook")
    q("doctor", "--queue", "big")
    assert [job["command"] for job in q.jobs()] == ["touch begun; sleep 300", "echo hook"]


def test_doctor_tries_an_engine_step_by_step(q: Queue, engine: Engine) -> None:
    asked = [*engine.unshare, *q.program, "doctor", "--queue", "big"]
    q.set("on_dead", "true")
    q.set("on_end", "true")
    found = q.run(asked)
    assert found.code == 0 and [line.rpartition(": ")[2] for line in found.out.splitlines()] == ["yes"] * 4
    assert [queue["name"] for queue in q.look("queue", "list")] == ["big"] and q.jobs() == []
    engine.on("down")
    found = q.run(asked)
    assert found.code == 1 and "can't reach the controller" in found.out
    engine.off("down")
    # Its ender does not end what runs there.
    q.quick("queue", "set", "big", "--runner", engine.runner, "--ender", "echo it lives")
    found = q.run(asked)
    q.may_leave = True
    assert [queue["name"] for queue in q.look("queue", "list")] == ["big"] and q.jobs() == []
    works = dict(line.rsplit(": ", 1) for line in found.out.splitlines())
    assert found.code == 1 and list(works.values())[:1] == ["yes"] and "it lives" in found.out
    assert "has no runner" in q.fails("doctor", "--queue", "default").err
    q.quick("queue", "pause")
    assert "paused" in q.fails("doctor", "--queue", "big").err


def test_an_ender_does_not_keep_its_worker_from_orders(q: Queue, engine: Engine) -> None:
    """A slow ender is asked while the worker hears that its job is cancelled, and a stop."""
    job = engine.add("touch begun; sleep 300", "--cwd", str(engine.file("")))
    pool = engine.pool()
    engine.wait_file("begun")
    engine.on("slow", 30)
    os.kill(engine.client(), signal.SIGKILL)
    wait_for(lambda: any(b"end" in read_proc(str(process.pid), "cmdline").split(b"\0") for process in q.processes()))
    began = time.monotonic()
    q("worker", "stop", "--now", code=None)
    pool.wait(25)
    assert time.monotonic() - began < 25
    assert q.state(job) == "processing"
    engine.off("slow")
    cancel = q.start("cancel", job)
    next_pool = engine.pool()
    q.wait_state(job, "cancelled")
    assert cancel.wait() == 0
    assert engine.stop(next_pool) == 0


def test_live_output_of_a_run_in_an_engine_has_no_words(q: Queue, engine: Engine) -> None:
    job = engine.add("echo begun >&2; touch begun; until [ -e go ]; do sleep 0.02; done; echo over >&2",
                     "--cwd", str(engine.file("")))  # fmt: skip
    pool = engine.pool()
    engine.wait_file("begun")
    follower = q.start("logs", "--follow", job)
    wait_for(lambda: "begun" in follower.err + follower.out, what="the first line")
    assert "begun\n" in q("logs", job, "--stderr").out and "<queuectl" not in q("logs", job).out
    engine.file("go").touch()
    assert follower.wait() == 0
    assert "\nbegun\nover\n" in follower.text and "<queuectl" not in follower.text
    assert engine.stop(pool) == 0


def test_a_storm_at_workers_and_clients_of_an_engine(q: Queue, engine: Engine) -> None:
    """kill -9 at random: no job is lost, recorded twice as completed, or runs twice at once in the engine."""
    random_ = random.Random(SEED)
    count, seconds = (60, 60) if FULL else (16, 8)
    ids = [
        engine.add("sleep 0.5; echo $QUEUECTL_RUN >>done", "--cwd", str(engine.file("")), "--backoff-base", "0.1",
                   "--max-retries", "100")
        for _ in range(count)
    ]  # fmt: skip
    script = "while :; do " + " ".join(shlex.quote(str(word)) for word in q.program)
    script += " worker start --count 4; [ -e halt ] && exit; done"
    pool = q.launch([*engine.unshare, "bash", "-c", script])
    init = int(wait_for(lambda: children(pool.process.pid))[0])
    kills, end_at = 0, time.monotonic() + seconds
    while time.monotonic() < end_at:
        supervisors = beasts_below(init)
        workers = [worker for supervisor in supervisors for worker in beasts_below(supervisor.pid)]
        clients = [client for worker in workers for client in beasts_below(worker.pid)]
        victims = random_.choice([supervisors, workers, workers, clients, clients])
        if victims:
            kills += random_.choice(victims).signal(signal.SIGKILL)
        time.sleep(0.2)
    wait_for(lambda: q.counts() == {"completed": count}, 120, "all to complete", every=0.3)
    assert kills > seconds
    q.touch("halt")
    q("worker", "stop")
    pool.wait()
    done = engine.file("done").read_text().split()
    for job in ids:
        runs = q.show(job)["runs"]
        assert [run["state"] for run in runs].count("completed") == 1 and runs[-1]["state"] == "completed"
        assert {run["state"] for run in runs} <= {"completed", "lost", "stopped"}
    assert {name.split("-")[-2] for name in done} == {str(number + 1) for number in range(count)}


# =====================================================================================================
# The page: `queuectl web`, by its API and in a real browser
# =====================================================================================================

TOKEN = "a-token-of-the-tests"
open_private = queuectl.open_private


class Web:
    """A running `queuectl web`, and requests to it, byte for byte."""

    def __init__(self, q: Queue, *options: str) -> None:
        self.q = q
        file = q.home / "token"
        file.write_text(TOKEN + "\n")
        file.chmod(0o600)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.process = q.start("web", "--port", str(self.port), "--token-file", str(file), *options)
        wait_for(lambda: self.process.out.endswith("\n") or self.process.ended, what="the address")
        assert self.process.out == f"http://127.0.0.1:{self.port}/\n", self.process

    def send(self, data: bytes, patience: float = 20) -> bytes:
        """All that comes back for these bytes."""
        with socket.create_connection(("127.0.0.1", self.port), patience) as connection:
            connection.sendall(data)
            answer = b""
            with suppress(ConnectionError):
                while True:
                    part = connection.recv(1 << 16)
                    if not part:
                        break
                    answer += part
            return answer

    def ask(self, path: str, method: str = "GET", body: Any = None, **headers: str | None) -> Any:
        """Status, headers and body of an answer; header names with _ for -."""
        sent: dict[str, str | None] = {"Host": "localhost", "Authorization": "Bearer " + TOKEN}
        data = b""
        if body is not None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            sent.update({"Content-Type": "application/json", "Content-Length": str(len(data))})
        sent.update((name.replace("_", "-"), value) for name, value in headers.items())
        lines = [
            f"{method} {path} HTTP/1.1",
            *(f"{name}: {value}" for name, value in sent.items() if value is not None),
        ]
        head, _, rest = self.send("\r\n".join([*lines, "", ""]).encode() + data).partition(b"\r\n\r\n")
        first, *others = head.decode().split("\r\n")
        found = dict(line.split(": ", 1) for line in others)
        return int(first.split()[1]), found, rest

    def get(self, path: str, **headers: str | None) -> Any:
        status, _, body = self.ask(path, **headers)
        assert status == 200, (status, body)
        return json.loads(body)

    def post(self, path: str, body: Any) -> Any:
        """The headers and jobs of a change."""
        status, headers, answer = self.ask(path, "POST", body)
        assert status == 200, (status, answer)
        return headers, json.loads(answer)


@pytest.fixture
def web(q: Queue) -> Web:
    return Web(q)


def test_the_api_has_the_shapes_of_json(q: Queue, web: Web) -> None:
    q.load([{"id": "a", "command": "echo out; echo err >&2; exit 3", "max_retries": 1},
            {"id": "b", "command": "true", "after": ["a"]},
            {"id": "c", "command": "true", "queue": "mail"}])  # fmt: skip
    q.drain(code=1)
    q("enqueue", "--id", "d", "--after", "c", "--delay", "1h", "true")
    assert web.get("/api/jobs") == q.look("list")
    assert web.get("/api/jobs?state=dead,completed&queue=default") == q.look(
        "list", "--queue", "default", "--state", "dead,completed"
    )
    newest = web.get("/api/jobs?state=dead,completed&limit=2")
    assert [job["id"] for job in newest] == [job["id"] for job in q.jobs("--state", "dead,completed", "--limit", "2")]
    assert [job["id"] for job in web.get("/api/jobs?grep=exit")] == ["a"]
    assert [job["id"] for job in web.get("/api/jobs?error=exit%20code")] == ["a"]
    assert web.get("/api/jobs?since=1h&before=1h") == []
    shown, wanted = web.get("/api/jobs/a"), q.look("show", "a")
    for name in wanted:
        if name != "runs":
            assert shown[name] == wanted[name]
    assert [(run["run"], run["state"]) for run in shown["runs"]] == [(1, "failed")]
    assert "died" in shown["why"][0] and shown["awaited_by"] == []
    assert web.get("/api/jobs/d")["awaits"] == []
    (run,) = web.get("/api/jobs/a/logs")
    assert (run["stdout"], run["stderr"], run["exit_code"]) == ("out\n", "err\n", 3)
    assert web.get("/api/jobs/a/logs?run=7") == []
    status, wanted = web.get("/api/status"), q.look("status")
    assert status["jobs"] == wanted["jobs"] and set(wanted) <= set(status) and not status["read_only"]
    assert any("dlq list" in line for line in status["hold_ups"])
    (cause,) = web.get("/api/dlq/causes")
    assert (cause["cause"], cause["count"], cause["after"], cause["job"]) == ("exit code 3: err", 1, 1, "a")
    assert web.get("/api/queues") == q.look("queue", "list") and web.get("/api/workers") == []
    assert web.get("/api/stats?by=queue") == q.look("stats", "--by", "queue")
    assert web.get("/api/stats?by=minute")[0]["runs"] == 2
    status, headers, body = web.ask("/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain") and b"queuectl_jobs{" in body


def test_a_list_is_paged_by_place(q: Queue, web: Web) -> None:
    q.load(["true"] * 7)
    _status, headers, body = web.ask("/api/jobs?limit=3")
    first = [job["id"] for job in json.loads(body)]
    assert (headers["X-Next"], headers["X-Last"], headers["X-Total"]) == ("5", "7", "7")
    q.add("true")
    again = json.loads(web.ask("/api/jobs?limit=3&place=8")[2])
    assert [job["id"] for job in again] == first  # what came in since does not move it
    older = web.get("/api/jobs?limit=3&before=5")
    assert [job["id"] for job in older] == [job["id"] for job in q.jobs()][1:4]
    assert web.ask("/api/jobs?limit=3&before=2")[1]["X-Next"] == "0"


def test_a_search_stops_and_says_where(monkeypatch: Any, store: Any) -> None:
    for _ in range(30):
        put(store)
    monkeypatch.setattr(queuectl, "SEARCH_STEP", 10)
    monkeypatch.setattr(queuectl, "SEARCH_TIME", -1.0)
    assert queuectl.search(store, queuectl.Selection(grep="no such"), 31, 5) == ([], 21)
    monkeypatch.setattr(queuectl, "SEARCH_TIME", 60.0)
    assert queuectl.search(store, queuectl.Selection(grep="no such"), 31, 5) == ([], 0)
    found, left = queuectl.search(store, queuectl.Selection(grep="true"), 31, 25)
    assert [job["seq"] for job in found] == list(range(6, 31)) and left == 6
    found, left = queuectl.search(store, queuectl.Selection(grep="true"), 31, 50, 21)
    assert [job["seq"] for job in found] == list(range(21, 31)) and left == 0
    monkeypatch.setattr(queuectl, "SEARCH_TIME", -1.0)  # where the counts say that there is none, none is looked for
    assert queuectl.page_jobs(None, store, {"queue": "none"}).headers["X-Next"] == 0
    assert queuectl.page_jobs(None, store, {"grep": "none"}).headers["X-Next"] == 21


def test_nothing_is_sent_twice(q: Queue, web: Web) -> None:
    q.add("true")
    wait_for(lambda: "ETag" in web.ask("/api/jobs")[1])
    tag = web.ask("/api/jobs")[1]["ETag"]
    assert web.ask("/api/jobs", If_None_Match=tag)[0] == 304
    q.add("true")
    assert web.ask("/api/jobs", If_None_Match=tag)[0] == 200


def test_the_page_changes_what_it_asked_about(q: Queue, web: Web) -> None:
    q.load([{"id": name, "command": "exit 3", "max_retries": 1} for name in "abc"])
    q.drain(code=1)
    headers, jobs = web.post("/api/retry", {"state": "dead", "dry_run": True})
    assert headers["X-Count"] == "3" and q.counts() == {"dead": 3}
    q("retry", "a")
    q.load([{"id": "d", "command": "exit 3", "max_retries": 1}])
    q.drain(code=1)  # `a` is as dead as before, but not unchanged; `d` came later
    asked = json.loads(headers["X-Asked"])
    headers, jobs = web.post("/api/retry", {"state": "dead", "asked": asked})
    assert headers["X-Count"] == "2" and [job["id"] for job in jobs] == ["b", "c"] and headers["X-Notes"] == "[]"
    assert q.states() == {"a": "dead", "b": "pending", "c": "pending", "d": "dead"}
    headers, jobs = web.post("/api/cancel", {"ids": ["b"]})
    assert [(job["id"], job["state"]) for job in jobs] == [("b", "cancelled")]
    (cause,) = web.get("/api/dlq/causes")
    assert web.post("/api/delete", {"cause": cause["cause"]})[0]["X-Count"] == "2"
    assert [job["id"] for job in web.post("/api/delete", {"ids": ["b"]})[1]] == ["b"]
    assert q.states() == {"c": "pending"}
    (queue,) = web.post("/api/queues/default/pause", {})[1]
    assert queue["paused"] and q.look("queue", "list")[0]["paused"]
    assert not web.post("/api/queues/default/resume", {})[1][0]["paused"]


def test_an_age_counts_from_the_question(q: Queue, web: Web) -> None:
    """What was too young for `--before 2s` when the reader was asked is so however late the answer comes."""
    q.add("exit 3", "--id", "a", "--max-retries", "1")
    q.drain(code=1)
    question = {"state": "dead", "before": "1s"}
    headers, _ = web.post("/api/delete", {**question, "dry_run": True})
    assert headers["X-Count"] == "0"
    wait_for(lambda: web.post("/api/delete", {**question, "dry_run": True})[0]["X-Count"] == "1")
    assert web.post("/api/delete", {**question, "asked": json.loads(headers["X-Asked"])})[0]["X-Count"] == "0"
    assert web.post("/api/delete", {**question, "asked": [7]})[0]["X-Count"] == "1"  # only a seq: from now


def test_the_page_takes_whole_ids_only(q: Queue, web: Web) -> None:
    made = q.add("true")  # its id may begin with the id of a job that was deleted since the reader looked
    for name in ("cancel", "retry", "delete"):
        status, _, body = web.ask("/api/" + name, "POST", {"ids": [made[:5]]})
        assert status == 404 and made[:5] in json.loads(body)["error"] and q.counts() == {"pending": 1}
    assert web.post("/api/cancel", {"ids": [made]})[0]["X-Count"] == "1"


def test_a_cause_on_the_page_has_the_command_for_just_its_jobs(q: Queue, web: Web, monkeypatch: Any) -> None:
    many = queuectl.MOST_NAMED + 1
    q.load([{"command": f"echo no disk {n} >&2; exit 3", "max_retries": 1} for n in range(many)])
    q.load([{"id": "odd", "command": "exit 4", "max_retries": 1}])
    q.drain("--count", "2", code=1)
    for cause, wanted in zip(web.get("/api/dlq/causes"), q.look("dlq", "list", "--causes")):
        assert set(wanted) < set(cause) and (cause["cause"], cause["after"]) == (wanted["cause"], 0)
        words = shlex.split(cause["retry"])
        found = json.loads(q(*words[words.index("dlq") :], "--dry-run", "--json").out)
        assert len(found) == cause["count"] == wanted["count"]
    headers, _ = web.post("/api/retry", {"cause": cause["cause"], "state": "dead"})
    # Those that died for another reason were not meant: nothing is said of them.
    assert headers["X-Count"] == "1" and headers["X-Notes"] == "[]" and q.state("odd") == "pending"
    with closing(queuectl.Store(str(q.db), reading=True)) as store:
        monkeypatch.setattr(queuectl, "MOST_CAUSES", many - 5)
        reply = queuectl.page_causes(None, store, {})
        assert reply.headers == {"X-Left": 5} and reply.value[0]["count"] == many - 5
        assert reply.value[0]["retry"] is not None  # few enough to be named


def test_a_running_job_is_cancelled_and_dependents_are_retried(q: Queue, web: Web) -> None:
    q.add(HANG, "--id", "a")
    q.add("true", "--id", "b", "--after", "a")
    pool = q.pool()
    q.wait_file("started")
    (run,) = web.get("/api/jobs/a/logs")
    assert run["state"] == "processing" and web.get("/api/workers")[0]["job"] == "a"
    web.post("/api/cancel", {"ids": ["a"]})
    q.wait_state("b", "cancelled")
    pool.stop()
    _headers, jobs = web.post("/api/retry", {"ids": ["a"], "with_dependents": True})
    assert [job["id"] for job in jobs] == ["a", "b"] and q.counts() == {"pending": 2}


@pytest.mark.parametrize("path", ["/api/retry", "/api/delete", "/api/cancel", "/api/queues/default/pause"])
def test_a_page_that_only_reads(q: Queue, path: str) -> None:
    q.add("true", "--id", "a")
    web = Web(q, "--read-only")
    assert web.get("/api/status")["read_only"] is True
    status, _, body = web.ask(path, "POST", {"ids": ["a"]})
    assert status == 403 and b"only reads" in body and q.counts() == {"pending": 1}


CALLERS: Any = [
    ({"Authorization": None}, 401),
    ({"Authorization": "Bearer wrong"}, 401),
    ({"Authorization": "Basic " + TOKEN}, 401),
    ({"Authorization": "Bearer "}, 401), ({"Host": "evil.example"}, 403), ({"Host": None}, 403),
    ({"Host": "localhost.evil.example"}, 403), ({"Origin": "http://evil.example"}, 403), ({"Origin": "null"}, 403),
    ({"Host": "127.0.0.1:9000"}, 200), ({"Host": "[::1]:80", "Origin": "http://localhost:9000"}, 200),
]  # fmt: skip


def test_who_may_ask(web: Web) -> None:
    for change, status in CALLERS:
        found, headers, body = web.ask(
            "/api/status", **{name.replace("-", "_"): value for name, value in change.items()}
        )
        assert found == status and (status != 401 or headers["WWW-Authenticate"] == "Bearer")
        assert status == 200 or set(json.loads(body)) == {"error"}


BAD_REQUESTS: Any = [
    ("PUT", "/api/status", None, 405), ("DELETE", "/api/jobs/a", None, 405), ("POST", "/api/status", {}, 405),
    ("GET", "/api/retry", None, 405), ("GET", "/api/enqueue", None, 404), ("POST", "/api/enqueue", {}, 404),
    ("GET", "/etc/passwd", None, 404),
    ("GET", "/api/jobs/nope", None, 404),
    ("GET", "/api/jobs?limit=0", None, 400),
    ("GET", "/api/jobs?limit=x", None, 400),
    ("GET", "/api/jobs?state=odd", None, 400),
    ("GET", "/api/jobs?since=1", None, 400),
    ("GET", "/api/stats?by=year", None, 400),
    ("POST", "/api/retry", {}, 400),
    ("POST", "/api/retry", b"nonsense", 400),
    ("POST", "/api/retry", [], 400),
    ("POST", "/api/retry", {"command": "id"}, 400),
    ("POST", "/api/retry", {"ids": [5]}, 400),
    ("POST", "/api/retry", {"ids": "a"}, 400),
    ("POST", "/api/retry", {"all": 1}, 400),
    ("POST", "/api/retry", {"all": True, "asked": ["x"]}, 400),
    ("POST", "/api/retry", {"all": True, "asked": [1, [2]]}, 400),
    ("POST", "/api/retry", b"[" * 60000, 400),
    ("POST", "/api/queues/a,b/pause", {}, 400),
    ("POST", "/api/retry", b"x" * 70000, 413),
    ("GET", "/api/jobs/a/logs?run=x", None, 400), ("GET", "/" + "a" * 20000, None, 431),
    ("GET", "/api/jobs?grep=%00", None, 400), ("POST", "/api/cancel", {"grep": "\ud800"}, 400),
]  # fmt: skip


def test_bad_requests_are_refused(q: Queue, web: Web) -> None:
    q.add("true", "--id", "a")
    for method, path, body, status in BAD_REQUESTS:
        found, _, answer = web.ask(path, method, body)
        assert found == status and b"Traceback" not in answer and set(json.loads(answer)) == {"error"}
        assert not web.process.err and q.counts() == {"pending": 1}


MALFORMED: Any = [
    (b"\r\n\r\n", b""), (b"nonsense\r\n\r\n", b"400"), (b"GET / HTTP/9.9\r\n\r\n", b"505"),
    (b"POST /api/retry HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"411"),
    (b"POST /api/retry HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", b"411"),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * 200 + b"\r\n", b"431"),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 70000, b"431"),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\nGET /api/status HTTP/1.1\r\nHost: localhost\r\n\r\n", b"200"),
]  # fmt: skip


def test_malformed_requests(web: Web) -> None:
    for data, status in MALFORMED:
        answer = web.send(data)
        assert answer.split(b"\r\n")[0].split(b" ")[1:2] == ([status] if status else [])
        assert answer.count(b"HTTP/1.") <= 1  # a second request behind it is never read
        assert web.ask("/api/status")[0] == 200 and not web.process.err


def test_the_page_itself_holds_no_data(q: Queue, web: Web) -> None:
    q.add("true", "--id", "secret-job")
    status, headers, body = web.ask("/", Authorization=None)
    assert status == 200 and b"secret-job" not in body and len(body) < 40 * 1024 and TOKEN.encode() not in body
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert (headers["Cache-Control"], headers["X-Content-Type-Options"], headers["Referrer-Policy"]) == (
        "no-store", "nosniff", "no-referrer")  # fmt: skip
    assert not re.search(rb"(src|href)=.https?:", body) and b"innerHTML" not in body
    status, headers, body = web.ask("/", "HEAD", Authorization=None)
    assert status == 200 and body == b"" and int(headers["Content-Length"]) > 1000


def test_slow_clients_hold_up_nobody(web: Web) -> None:
    slow = []
    for number in range(200):
        connection = socket.create_connection(("127.0.0.1", web.port), 5)
        connection.sendall(b"GET /api/status HTTP/1.1\r\nHost: loc" if number % 2 else b"G")
        slow.append(connection)
    assert web.ask("/api/status")[0] == 200
    wait_for(lambda: len(os.listdir(f"/proc/{web.process.process.pid}/task")) <= 66, what="an end of old connections")
    for connection in slow:
        connection.close()
    assert web.ask("/api/status")[0] == 200 and not web.process.err


def test_a_request_has_a_limit_of_time(monkeypatch: Any) -> None:
    monkeypatch.setattr(queuectl, "REQUEST_TIME", 0.3)
    here, there = socket.socketpair()
    end = time.monotonic() + queuectl.REQUEST_TIME
    stop = threading.Event()

    def drip() -> None:
        with suppress(OSError):
            while not stop.wait(0.05):
                there.sendall(b"x")

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        with pytest.raises(OSError):
            queuectl.read_head(here, end)
    finally:
        stop.set()
        thread.join()
        here.close()
        there.close()


def test_a_page_ends_at_once(web: Web) -> None:
    web.process.signal(signal.SIGTERM)
    assert web.process.wait(5) == -signal.SIGTERM


def test_a_page_while_the_database_is_locked_or_gone(q: Queue, web: Web) -> None:
    q.add("true", "--id", "a")
    foreign = sqlite3.connect(str(q.db), isolation_level=None)
    foreign.execute("BEGIN IMMEDIATE")
    assert web.ask("/api/status")[0] == 200
    foreign.execute("ROLLBACK")
    foreign.close()
    assert [job["id"] for job in web.get("/api/jobs")] == ["a"]
    for path in [q.db, *q.db.parent.glob("queue.db*")]:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    wait_for(lambda: web.get("/api/jobs") == [])
    assert web.get("/api/status")["hold_ups"] == [f"There is no queue at {q.db}."]
    assert not q.db.exists()
    assert web.ask("/api/retry", "POST", {"ids": ["a"]})[0] in (404, 409)


def test_a_page_asks_no_name_server(monkeypatch: Any) -> None:
    monkeypatch.setattr(socket, "getfqdn", lambda *_: pytest.fail("http.server asked for a name"))
    queuectl.page_server(None, ("127.0.0.1", 0)).server_close()


def test_the_token_file(q: Queue, monkeypatch: Any) -> None:
    path, flags = q.home / "new-token", []
    monkeypatch.setattr(queuectl, "open_private", lambda *given: flags.append(given[1]) or open_private(*given))
    token = queuectl.read_token(str(path))
    assert len(token) == 32 and stat.S_IMODE(path.stat().st_mode) == 0o600 and queuectl.read_token(str(path)) == token
    assert flags == [os.O_RDWR, os.O_RDONLY]  # the credentials of a service can't be written
    path.write_text("short")
    with pytest.raises(queuectl.QueueError, match="too short"):
        queuectl.read_token(str(path))
    path.chmod(0o640)
    with pytest.raises(queuectl.QueueError, match="chmod 600"):
        queuectl.read_token(str(path))
    assert "can't listen" in q.fails("web", "--host", "no.such.host.invalid").err


def test_the_address_carries_the_token_in_its_fragment(q: Queue) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    web = q.start("web", "--port", port, "--host", "0.0.0.0")
    wait_for(lambda: web.out.endswith("\n"))
    assert re.fullmatch(rf"http://0\.0\.0\.0:{port}/#token=[\w-]{{32}}\n", web.out) and "plain HTTP" in web.err
    web.signal(signal.SIGINT)
    assert web.wait() == 130 and "Traceback" not in web.err


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """A headless Chromium, driven by its DevTools protocol over a pipe: JSON texts that end with NUL."""

    def __init__(self, folder: Path) -> None:
        assert CHROMIUM
        to_read, self.write_end = os.pipe()
        self.read_end, to_write = os.pipe()

        def hand_over() -> None:
            for fd, number in ((os.dup(to_read), 3), (os.dup(to_write), 4)):
                os.dup2(fd, number)

        self.process = subprocess.Popen(
            [
                CHROMIUM,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--remote-debugging-pipe",
                "--no-first-run",
                "--disable-dev-shm-usage",
                "--disable-extensions",
                f"--user-data-dir={folder}",
                "about:blank",
            ],
            close_fds=False,
            preexec_fn=hand_over,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self.buffer, self.number, self.session, self.events = b"", 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(domain + ".enable")

    def call(self, method: str, **values: Any) -> Any:
        self.number += 1
        message = {"id": self.number, "method": method, "params": values}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def receive(self) -> Any:
        while b"\0" not in self.buffer:
            data = os.read(self.read_end, 1 << 20)
            assert data, "the browser has ended"
            self.buffer += data
        text, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(text)
        if "method" in message:
            self.events.append(message)
        return message

    def js(self, script: str) -> Any:
        """The value of a script; it may be a promise."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, script: str, what: str = "") -> Any:
        end = time.monotonic() + 15
        while time.monotonic() < end:
            value = self.js(script)
            if value:
                return value
            time.sleep(0.05)
        raise AssertionError(f"never true: {what or script}\n" + self.js("document.body.innerText"))

    def key(self, name: str, text: str = "") -> None:
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=name,
                code=name,
                text=text if kind == "keyDown" else "",
                windowsVirtualKeyCode={"Enter": 13, "Tab": 9, "Escape": 27, " ": 32}.get(name, 0),
            )

    def size(self, width: int, height: int = 900, scheme: str = "light") -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def shot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.write_end)
        os.close(self.read_end)


HOSTILE = [
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "javascript:alert(1)", "\u202egnp.exe",
    "x" * 10000, "{{7*7}}", "</pre><b>",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory: Any) -> Iterator[Browser]:
    if not CHROMIUM:
        print("skipped: there is no Chromium here to look at the page with")
        pytest.skip("there is no Chromium here")
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture
def page(browser: Browser, q: Queue) -> Iterator[tuple[Browser, Web]]:
    """The page of a queue with some of everything, open in a browser."""
    q.load([{"command": "echo " + shlex.quote(text), "id": "h%d" % number} for number, text in enumerate(HOSTILE)])
    q.load([{"id": "<b>&\"'", "command": "echo '<script>alert(2)</script>' >&2; exit 3", "max_retries": 1},
            {"id": "bad2", "command": "echo '<script>alert(2)</script>' >&2; exit 3", "max_retries": 1},
            {"id": "kid", "command": "true", "after": ["bad2"]}])  # fmt: skip
    q.drain(code=1)
    q.add("true", "--id", "waits", "--queue", 'a&b=c#d"><b>')
    web = Web(q)
    browser.size(1024)
    browser.events.clear()
    browser.call("Page.navigate", url="about:blank")
    browser.call("Page.navigate", url=f"http://127.0.0.1:{web.port}/#token={TOKEN}")
    browser.until(
        "document.querySelector('h1')?.innerText == 'Overview' && document.querySelectorAll('section').length > 4"
    )
    yield browser, web
    browser.js("sessionStorage.clear()")
    shown = [
        event
        for event in browser.events
        if event["method"] in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
    ]
    assert not shown, shown
    urls = {
        event["params"]["request"]["url"] for event in browser.events if event["method"] == "Network.requestWillBeSent"
    }
    foreign = [url for url in urls if not url.startswith((f"http://127.0.0.1:{web.port}/", "data:", "about:"))]
    assert not foreign, foreign


def go(browser: Browser, view: str, text: str) -> None:
    browser.js(f"location.hash = {json.dumps(view)}")
    browser.until(f"document.querySelector('main').innerText.includes({json.dumps(text)})", text)


def click(browser: Browser, name: str) -> None:
    """Click the button with this name, as a person sees it."""
    browser.until(
        "[...document.querySelectorAll('button')].some("
        "node => node.innerText == %s && !node.disabled && (node.click(), true))" % json.dumps(name),
        name,
    )


def test_the_views_of_the_page(page: tuple[Browser, Web]) -> None:
    browser, _web = page
    assert browser.js("location.hash") == "#/" and browser.js("sessionStorage.getItem('token')") == TOKEN
    text = browser.js("document.querySelector('main').innerText")
    assert "dlq list" in text and 'a&b=c#d"><b>' in text and "No workers are running." in text and "9 runs" in text
    go(browser, "#/jobs", "Jobs")
    browser.until("document.querySelectorAll('tbody tr').length == 11")
    assert browser.js("document.querySelectorAll('main img, main script, main b').length") == 0
    go(browser, "#/jobs?state=dead&error=alert", "bad2")
    browser.until("document.querySelectorAll('tbody tr').length == 2")
    assert "list --state dead --error alert" in browser.js("document.querySelector('main code').innerText")
    go(browser, "#/job/" + urllib.parse.quote("<b>&\"'", safe=""), "Run 1, attempt 1")
    browser.until("document.querySelector('pre')?.innerText.includes('<script>alert(2)</script>')")
    go(browser, "#/job/h3", "\\u202egnp.exe")
    go(browser, "#/job/kid", "bad2")
    go(browser, "#/dead", "2 jobs and 1 after them: exit code 3")
    for width in (390, 1024, 1600):
        for scheme in ("light", "dark"):
            browser.size(width, scheme=scheme)
            for view, wanted in (("#/", "Overview"), ("#/jobs", "Jobs"), ("#/job/h4", "Fields"), ("#/dead", "2 jobs")):
                go(browser, view, wanted)
                browser.until("document.querySelector('main').innerText.length > 60")
                assert browser.js("document.documentElement.scrollWidth <= innerWidth"), (width, view)
                assert browser.js(CLIPPED) == [], (width, view)
                assert browser.js(CONTRAST) == [], (scheme, view)


# What can be clicked, but is too small or partly out of sight.
CLIPPED = """[...document.querySelectorAll("main button, main a, main input")].filter(node => {
    const {width, height, right} = node.getBoundingClientRect(), box = node.closest(".wide") || document.body;
    return node.offsetParent && Math.min(width, height) < 15 || right > box.getBoundingClientRect().right + 1;
}).map(node => node.outerHTML.slice(0, 90))"""

# Texts whose contrast is below 4.5 to 1 (WCAG AA), and controls without a name.
CONTRAST = """(() => {
    const light = color => { const [r, g, b] = color.match(/[\\d.]+/g).map(part => { const c = part / 255;
        return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; });
        return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
    const back = node => { for (; node; node = node.parentElement) {
        const color = getComputedStyle(node).backgroundColor;
        if (!/, 0\\)$|transparent/.test(color)) return color; } return "rgb(255, 255, 255)"; };
    const bad = [];
    for (const node of document.querySelectorAll("body *")) {
        if (![...node.childNodes].some(child => child.nodeType == 3 && child.data.trim())) continue;
        if (!node.getClientRects().length) continue;
        if (["SCRIPT", "STYLE", "NOSCRIPT"].includes(node.tagName) || node.closest("button:disabled, .gone")) continue;
        const [one, two] = [light(getComputedStyle(node).color), light(back(node))].sort((a, b) => b - a);
        if ((one + 0.05) / (two + 0.05) < 4.5) bad.push(node.tagName + ": " + node.innerText.slice(0, 40));
    }
    for (const node of document.querySelectorAll("button, input, select, a, table, [role=img], pre"))
        if (!(node.innerText || node.labels?.[0]?.innerText || node.getAttribute("aria-label") || node.caption))
            bad.push(node.outerHTML.slice(0, 80));
    return bad;
})()"""


def test_actions_by_clicking_and_by_keyboard(page: tuple[Browser, Web]) -> None:
    browser, web = page
    q = web.q
    go(browser, "#/jobs?state=dead", "bad2")
    browser.js("document.querySelector('[aria-label=\"Select bad2\"]').click()")
    click(browser, "retry 1 selected")
    assert "retry bad2" in browser.until("document.querySelector('dialog[open] pre')?.innerText")
    browser.key("Escape")
    browser.until("!document.querySelector('dialog[open]')")
    assert q.state("bad2") == "dead"
    click(browser, "retry 1 selected")
    browser.until("!!document.querySelector('dialog[open]')")
    browser.key("Tab")
    browser.until("document.activeElement.innerText == 'Yes, retry' || document.activeElement.innerText == 'No'")
    browser.js("[...document.querySelectorAll('dialog button')].at(1).focus()")
    browser.key("Enter", "\r")
    q.wait_state("bad2", "pending")
    browser.until("document.getElementById('live').innerText.includes('retry: 1 job')")
    assert browser.js("location.hash") == "#/jobs?state=dead"  # the filter is kept
    browser.until(
        "document.querySelector('tr.gone')?.innerText.includes('bad2')"
    )  # it left the view, but not its place
    go(browser, "#/jobs?queue=a%26b%3Dc%23d%22%3E%3Cb%3E", "waits")
    click(browser, "cancel all that match")
    assert "cancel --queue 'a&b=c#d\"><b>'" in browser.until("document.querySelector('dialog[open] pre')?.innerText")
    click(browser, "Yes, cancel")
    q.wait_state("waits", "cancelled")
    go(browser, "#/", "Queues")
    browser.js("document.querySelector('[aria-label=\"pause default\"]').focus({preventScroll: true})")
    browser.until("!!document.querySelector('[aria-label=\"pause default\"]:focus')")
    top = browser.js("document.activeElement.getBoundingClientRect().top")
    browser.key("Enter", "\r")
    # A note has come on top; the focus has stayed with the button, and the button in its place.
    browser.until("document.querySelector('.note').innerText.includes('Paused: default')")
    assert browser.js("document.activeElement.ariaLabel") == "resume default"
    assert abs(browser.js("document.activeElement.getBoundingClientRect().top") - top) < 2
    browser.key("Enter", "\r")
    wait_for(lambda: not any(queue["paused"] for queue in q.look("queue", "list")))
    go(browser, "#/dead", "1 job")
    for left in (1, 0):  # one died by itself, one because of a job that was retried since
        click(browser, "delete these")
        click(browser, "Yes, delete")
        browser.until(f"document.querySelectorAll('main section').length == {left}")
    browser.until("document.querySelector('main').innerText.includes('No job is dead.')")


def test_the_page_is_live_and_keeps_the_readers_place(page: tuple[Browser, Web]) -> None:
    browser, web = page
    q = web.q
    q.load(["true"] * 60)
    go(browser, "#/jobs", "Older jobs")
    browser.until("document.querySelectorAll('tbody tr').length == 50")
    click(browser, "Older jobs")
    browser.until("document.querySelectorAll('tbody tr').length == 71")
    first = browser.js("document.querySelector('tbody a').innerText")
    browser.js("scrollTo(0, 400); document.querySelector('input[name=grep]').focus({preventScroll: true})")
    browser.js("document.querySelector('input[name=grep]').value = 'typed'")
    q.add("true", "--id", "newer")
    browser.until("document.querySelector('main').innerText.includes('Jobs have come into this list')")
    assert browser.js("[document.querySelector('tbody a').innerText, scrollY]") == [first, 400]
    assert browser.js("document.activeElement.name + document.activeElement.value") == "greptyped"
    click(browser, "Jobs have come into this list: show them")
    browser.until("document.querySelector('tbody a')?.innerText == 'newer'")
    q.add("echo begun; until [ -e go ]; do sleep 0.02; done; echo finished", "--id", "runs", "--priority", "0")
    pool = q.pool()
    go(browser, "#/job/runs", "begun")
    q.touch("go")
    browser.until(
        "document.querySelector('pre')?.innerText.includes('finished') && "
        "document.querySelector('h1').innerText.includes('completed')"
    )
    pool.stop()


def test_a_list_by_state_is_live(page: tuple[Browser, Web]) -> None:
    browser, web = page
    q = web.q
    old = q.load([{"command": "true", "delay": "1h"}] * 60)
    go(browser, "#/jobs?state=pending", "61 jobs.")
    click(browser, "Older jobs")
    browser.until("document.querySelectorAll('tbody tr').length == 61")
    q("cancel", old[0])  # it stands below the first fifty
    browser.until("[...document.querySelectorAll('tr.gone')].map(row => row.dataset.key).join() == %s"
                  % json.dumps(old[0]))  # fmt: skip
    assert "Jobs have come" not in browser.js("document.querySelector('main').innerText")
    q("retry", "bad2")  # it is older than all that are shown below `top`, and is pending now
    click(browser, "Jobs have come into this list: show them")
    browser.until("document.querySelectorAll('tbody tr').length == 50")
    q("cancel", "bad2")
    go(browser, "#/job/bad2", "cancelled")
    click(browser, "retry")
    click(browser, "Yes, and what ended with it")
    q.wait_state("kid", "pending")
    assert q.state("bad2") == "pending"
    browser.size(1024, 300)
    browser.js("scrollTo(0, 1000)")
    click(browser, "cancel")
    click(browser, "Yes, cancel")
    q.wait_state("bad2", "cancelled")
    # What was done is told where the reader is.
    browser.until("(box => box.top > 0 && box.bottom <= innerHeight)"
                  "(document.querySelector('#live.said')?.getBoundingClientRect() || {})")  # fmt: skip


def test_a_view_without_a_token_asks_for_it(browser: Browser, q: Queue) -> None:
    q.add("true", "--id", "a")
    web = Web(q, "--read-only")
    browser.call("Page.navigate", url="about:blank")
    browser.call("Page.navigate", url=f"http://127.0.0.1:{web.port}/#/jobs")
    browser.until("!!document.querySelector('input[type=password]')")
    assert browser.js("location.hash") == "#/jobs"
    browser.js(f"document.querySelector('input').value = '{TOKEN}'; document.querySelector('form button').click()")
    browser.until("document.querySelector('tbody')?.innerText.includes('true')")
    assert browser.js("sessionStorage.getItem('token')") == TOKEN
    go(browser, "#/", "Queues")
    go(browser, "#/jobs", "true")
    assert browser.js("document.querySelectorAll('.actions button').length") == 0
    go(browser, "#/job/nope", "there is no job nope")
    web.process.signal(signal.SIGTERM)
    browser.until("document.getElementById('live').innerText.includes('does it still run?')")
    browser.js("sessionStorage.clear()")


# =====================================================================================================
# again tomorrow: schedules
# =====================================================================================================

SECOND, MINUTE, HOUR, DAY = 1000, 60_000, 3_600_000, 86_400_000
ZONES = ("Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Pacific/Chatham", "Antarctica/Troll")
PATTERNS = (
    "30 2 * * *", "0 * * * *", "*/15 * * * *", "15,45 1-3 * * *", "*/20 2 * * *", "0 */2 * * sun", "1-59/29 0-3 * * *",
    "0 0 1,15 * 5", "0 0 */2 * *", "45 2 * mar-apr,sep-nov sat-sun", "59 23 31 12 *",
)  # fmt: skip


@contextmanager
def zone_set(name: str) -> Iterator[None]:
    """Have local time go by a zone for a while."""
    before = os.environ.get("TZ")
    os.environ["TZ"] = name
    time.tzset()
    try:
        yield
    finally:
        if before is None:
            del os.environ["TZ"]
        else:
            os.environ["TZ"] = before
        time.tzset()


@pytest.fixture
def in_zone() -> Iterator[Callable[[str], None]]:
    with ExitStack() as stack:

        def enter(name: str) -> None:
            if "/" in name and not os.path.exists("/usr/share/zoneinfo/" + name):
                pytest.skip("no time zones here")
            stack.enter_context(zone_set(name))

        yield enter


def utc(text: str) -> int:
    """Milliseconds of a time in UTC, `2026-01-31 10:00`."""
    return int(datetime.strptime(text + " +0000", "%Y-%m-%d %H:%M %z").timestamp()) * 1000


def shown_at(seconds: Iterable[int]) -> list[str]:
    return [time.strftime("%m-%d %H:%M", time.gmtime(second)) for second in seconds]


def following(text: str, after: int, count: int, zone: Any = None) -> list[int]:
    """The next few times of a crontab text behind a second of the epoch; by default local time."""
    cron, times = queuectl.cron_of(text), []
    for _ in range(count):
        after = queuectl.next_cron(cron, after, zone or queuectl.local_offset)
        times.append(after)
    return times


def walked(text: str, start: int, end: int) -> list[int]:
    """The times of a crontab text by looking at every minute: what a wall clock shows, or has been set past."""
    cron, zone = queuectl.cron_of(text), queuectl.local_offset
    highest, times = start - 60 + zone(start - 60), []

    def fits(wall: int) -> bool:
        date = time.gmtime(wall)
        days = date.tm_mday in cron.days, bool({(date.tm_wday + 1) % 7, date.tm_wday + 1} & {*cron.weekdays})
        fits_day = all(days) if cron.both else any(days)
        return date.tm_min in cron.minutes and date.tm_hour in cron.hours and date.tm_mon in cron.months and fits_day

    for second in range(start, end, 60):
        wall = second + zone(second)
        new = range(highest + 60, wall + 1, 60)
        if fits(wall) if cron.elapsed else any(map(fits, new)):
            times.append(second)
        highest = max(highest, wall)
    return times


@pytest.mark.parametrize("zone", ZONES)
def test_the_times_of_ten_years_are_those_of_a_walk_by_minutes(in_zone: Callable[[str], None], zone: str) -> None:
    """Around each change of the clock, and on some days between; all of it was walked once by hand."""
    in_zone(zone)
    first = utc("2025-01-01 00:00") // 1000
    days = range(first, first + 3653 * 86400, 86400)
    changes = [day for day in days if queuectl.local_offset(day) != queuectl.local_offset(day + 86400)]
    assert len(changes) == 20
    # A day at the change itself with every pattern, and a few days elsewhere.
    for at, change in enumerate([*changes, *days[50::700]]):
        start, end = change - 4 * 3600, change + 30 * 3600
        for text in PATTERNS if at < 2 or at % 5 == 0 else PATTERNS[:5]:
            found, after = [], start - 1
            while after < end:
                after = queuectl.next_cron(queuectl.cron_of(text), after, queuectl.local_offset)
                found.append(after)
            assert found[:-1] == walked(text, start, end), (zone, text, shown_at(found))


def test_a_fixed_time_that_is_skipped_comes_right_after_and_one_that_comes_twice_once(
    in_zone: Callable[[str], None],
) -> None:
    in_zone("Europe/Berlin")
    spring, autumn = (utc(text) // 1000 for text in ("2026-03-28 12:00", "2026-10-24 12:00"))
    assert shown_at(following("30 2 * * *", spring, 2)) == ["03-29 01:00", "03-30 00:30"]
    assert shown_at(following("30 2 * * *", autumn, 2)) == ["10-25 00:30", "10-26 01:30"]
    # Two that fall into the gap are one: the next is strictly later.
    assert shown_at(following("15,45 2 * * *", spring, 2)) == ["03-29 01:00", "03-30 00:15"]
    # What goes by elapsed time is not silent in the hour that comes again.
    at = utc("2026-10-24 23:30") // 1000
    assert shown_at(following("0 * * * *", at, 4)) == ["10-25 00:00", "10-25 01:00", "10-25 02:00", "10-25 03:00"]
    assert shown_at(following("*/30 * * * *", at, 4)) == ["10-25 00:00", "10-25 00:30", "10-25 01:00", "10-25 01:30"]


def test_february_29_goes_over_2100() -> None:
    times = following("0 0 29 2 *", utc("2096-01-01 00:00") // 1000, 2, lambda second: 0)
    assert [time.gmtime(each)[:3] for each in times] == [(2096, 2, 29), (2104, 2, 29)]
    sunday = following("0 0 29 2 */7", utc("2088-03-01 00:00") // 1000, 1, lambda second: 0)
    assert time.gmtime(sunday[0])[:3] == (2128, 2, 29)


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("5 4 3 2 1", ([5], [4], [3], [2], [1])),
        ("0-10/5,59 0 * * *", ([0, 5, 10, 59], [0], None, None, None)),
        ("0 0 * Jan,MAR-may Sun", ([0], [0], None, [1, 3, 4, 5], [0])),
        ("0 0 * * 5-7", ([0], [0], None, None, [5, 6, 7])),
        ("0 0 * * fri-sun", ([0], [0], None, None, [5, 6, 7])),
        ("0 0 * * sun-tue", ([0], [0], None, None, [0, 1, 2])),
        ("@hourly", ([0], None, None, None, None)),
        ("@Daily", ([0], [0], None, None, None)),
        ("@weekly", ([0], [0], None, None, [0])),
        ("@monthly", ([0], [0], [1], None, None)),
        ("@yearly", ([0], [0], [1], [1], None)),
    ],
)
def test_fields_of_crontab(text: str, fields: Any) -> None:
    every = [[*range(60)], [*range(24)], [*range(1, 32)], [*range(1, 13)], [*range(8)]]
    assert list(queuectl.cron_of(text)[:5]) == [field or all_of for field, all_of in zip(fields, every)]


@pytest.mark.parametrize(
    "text",
    ["", "* * * *", "* * * * * *", "60 * * * *", "* 24 * * *", "* * 0 * *", "* * 32 * *", "* * * 13 *", "* * * * 8",
     "5/15 * * * *", "*/0 * * * *", "5-1 * * * *", "a * * * *", "-1 * * * *", "1,,2 * * * *", "* * * * mon#1",
     "* * L * *", "*-5 * * * *", "\u0663 * * * *", "@reboot", "@fortnightly", "0 0 * * 6-1", "1--2 * * * *",
     "1e1 * * * *", "* * * 1jan *", "* * * jan1 *", "0 0 30 2 *", "0 0 31 4,6,9,11 *", "0 0 31 2 */2"],
)  # fmt: skip
def test_what_is_no_crontab_text_or_never_comes_is_refused(text: str) -> None:
    with pytest.raises(queuectl.UsageError, match="--cron"):
        queuectl.cron_of(text)


def test_the_days_fit_together_where_one_begins_with_a_star_else_either() -> None:
    """As in Vixie cron: `*/2` is a star, and so both must fit."""
    start = utc("2026-02-01 00:00") // 1000 - 1

    def days(text: str) -> list[int]:
        return [time.gmtime(each).tm_mday for each in following(text, start, 5, lambda second: 0)]

    assert days("0 0 */2 * *") == [1, 3, 5, 7, 9]
    assert days("0 0 1,15 * 5") == [1, 6, 13, 15, 20]
    assert days("0 0 */2 * 0") == [1, 15, 1, 15, 29]
    assert days("0 0 13 * *") == [13] * 5


def test_a_time_that_never_comes_here_breaks_no_claim(store: Any, in_zone: Callable[[str], None]) -> None:
    """Berlin's clocks skip this hour on each of these days."""
    in_zone("Europe/Berlin")
    plan(store, cron="*/15 2 25-31 3 */7", utc=0)
    assert store.schedule("s")["due"] == queuectl.LAST_TIME
    assert take(store, NOW + DAY) is None


# The store alone, with a clock of its own. Its pool began at NOW, and lives.


@pytest.fixture
def timed(store: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(queuectl, "is_alive", lambda db, name: name == "pool")
    return store


def plan(store: Any, now: int = NOW, name: str = "s", env: str = "", **fields: Any) -> bool:
    """`schedule set`: every 10 s, if nothing else is said."""
    job = dict(dict.fromkeys(queuectl.GIVEN_FIELDS), command="true", cwd="/", moved=True, **fields.pop("job", {}))
    new = {
        "name": name, "cron": None, "every": 10 * SECOND, "utc": 1, "if_running": "skip", "if_missed": "run",
        "queue": "default", "job": json.dumps(job), "path": "/bin", "umask": 0o22, "environ": env,
    }  # fmt: skip
    if "cron" in fields:
        new["every"] = None
    new.update(fields)
    with store.transaction():
        return bool(store.set_schedule(new, now))


def took(store: Any, now: int) -> Any:
    """The id of the job that a claim takes, or None; it is completed at once."""
    job = take(store, now)
    if job:
        end(store, job, "completed", now)
    return job and job.id


def counted(store: Any, name: str = "s") -> tuple[int, int, int, int]:
    row = store.schedule(name)
    return row["made"], row["skipped"], row["missed"], row["skipped_in_row"]


def called(second: int, name: str = "s") -> str:
    return queuectl.scheduled_id(name, NOW + second * SECOND)


def test_a_schedule_makes_a_job_at_its_time_and_once(timed: Any) -> None:
    plan(timed)
    assert timed.pulse()[1] == NOW + 10 * SECOND
    assert took(timed, NOW + 9999) is None
    assert took(timed, NOW + 10 * SECOND) == "s@2026-01-01T00:00:10Z"
    assert took(timed, NOW + 10 * SECOND) is None and took(timed, NOW + 19_999) is None
    assert took(timed, NOW + 20 * SECOND) == called(20)
    assert counted(timed) == (2, 0, 0, 0)


def test_a_time_passes_once_also_when_its_job_is_forgotten(timed: Any) -> None:
    """Retention must not bring a time back, nor may a clock that is set back."""
    plan(timed)
    assert took(timed, NOW + 10 * SECOND) == called(10)
    with timed.transaction():
        timed.delete(timed.find(called(10))["seq"])
    for now in (10, 19, 3, -86400):
        assert took(timed, NOW + now * SECOND) is None
        with timed.transaction():
            timed.make_ready_after_clock_step(NOW + now * SECOND)
            timed.follow_zone("another")
        assert took(timed, NOW + now * SECOND) is None
    assert took(timed, NOW + 20 * SECOND) == called(20)


def test_an_id_that_exists_counts_as_skipped(timed: Any) -> None:
    put(timed, id=called(10))
    plan(timed)
    assert took(timed, NOW + 10 * SECOND) == called(10)  # the user's own
    assert counted(timed) == (0, 1, 0, 1)
    assert took(timed, NOW + 20 * SECOND) == called(20) and counted(timed) == (1, 1, 0, 0)


def test_a_key_that_is_taken_counts_as_skipped(timed: Any) -> None:
    put(timed, id="own", unique="k", queue="elsewhere")
    plan(timed, job={"unique": "k"})
    assert took(timed, NOW + 10 * SECOND) == "own" and counted(timed) == (0, 1, 0, 1)


def test_by_default_a_time_is_skipped_while_the_job_before_has_not_ended(timed: Any) -> None:
    plan(timed)
    running = take(timed, NOW + 10 * SECOND)
    assert take(timed, NOW + 20 * SECOND) is None and counted(timed) == (1, 1, 0, 1)
    assert end(timed, running, "failed", NOW + 25 * SECOND, NOW + DAY) == "failed"
    assert take(timed, NOW + 30 * SECOND) is None and counted(timed) == (1, 2, 0, 2)  # it waits for its retry
    with timed.transaction():
        timed.cancel_waiting(running.seq, NOW + 31 * SECOND)
    assert took(timed, NOW + 40 * SECOND) == called(40) and counted(timed) == (2, 2, 0, 0)


def test_with_queue_one_job_waits_behind_and_not_more(timed: Any) -> None:
    plan(timed, if_running="queue")
    running = take(timed, NOW + 10 * SECOND)
    with timed.transaction():  # the second of a limit of one
        timed.set_concurrency("default", 1)
    for second in (20, 30, 40):
        assert take(timed, NOW + second * SECOND) is None
    assert counted(timed) == (2, 2, 0, 2)
    end(timed, running, "failed", NOW + 41 * SECOND, NOW + DAY)
    assert took(timed, NOW + 42 * SECOND) == called(20)
    assert take(timed, NOW + 50 * SECOND).id == called(50)
    assert take(timed, NOW + 60 * SECOND) is None and counted(timed) == (3, 3, 0, 1)  # the first waits for its retry


@pytest.mark.parametrize(("policy", "made"), [("run", [called(50)]), ("skip", [])])
def test_of_missed_times_the_last_one_runs_once_or_none(timed: Any, policy: str, made: list[str]) -> None:
    """Those before the pool began, at NOW."""
    plan(timed, NOW - 40 * SECOND, if_missed=policy)
    with timed.transaction():
        timed.execute("UPDATE pools SET started_at = ?", NOW + 55 * SECOND)
    assert [took(timed, NOW + 59 * SECOND), took(timed, NOW + 59 * SECOND)] == [*made, None, None][:2]
    assert counted(timed) == (len(made), 0, 9 - len(made), 0)
    assert took(timed, NOW + 60 * SECOND) == called(60)


@pytest.mark.parametrize(("policy", "made"), [("run", called(10)), ("skip", None)])
def test_a_pool_that_begins_in_the_very_second_of_a_time_sees_it_as_missed(timed: Any, policy: str, made: Any) -> None:
    plan(timed, if_missed=policy)
    with timed.transaction():
        timed.execute("UPDATE pools SET started_at = ?", NOW + 10 * SECOND + 300)
    assert took(timed, NOW + 10 * SECOND + 400) == made and counted(timed)[2] == (made is None)


def test_a_pool_of_other_queues_does_not_count_as_one_that_lived(timed: Any) -> None:
    with timed.transaction():
        timed.execute("UPDATE pools SET queues = 'x'")
    plan(timed, if_missed="skip")
    plan(timed, name="t", queue="x", if_missed="skip")
    assert took(timed, NOW + 10 * SECOND) == called(10, "t")
    assert counted(timed) == (0, 0, 1, 0) and counted(timed, "t") == (1, 0, 0, 0)


def test_late_workers_make_what_came_in_the_last_minute(timed: Any) -> None:
    plan(timed, if_running="queue", if_missed="skip")
    assert took(timed, NOW + 35 * SECOND) == called(20) and took(timed, NOW + 35 * SECOND) == called(30)
    assert counted(timed) == (2, 1, 0, 0)


@pytest.mark.parametrize("fields", [{}, {"every": SECOND}, {"cron": "* * * * *"}, {"cron": "30 2 * * 1-5"}])
def test_a_clock_that_leaps_a_year_makes_one_job(timed: Any, fields: Any) -> None:
    plan(timed, **fields)
    last = queuectl.next_time(timed.schedule("s"), NOW + 364 * DAY, lambda second: 0)
    while queuectl.next_time(timed.schedule("s"), last, lambda second: 0) <= NOW + 365 * DAY:
        step = queuectl.next_time(timed.schedule("s"), last, lambda second: 0)
        last = step if fields != {"every": SECOND} else NOW + 365 * DAY
    began = time.monotonic()
    assert took(timed, NOW + 365 * DAY) == queuectl.scheduled_id("s", last)
    assert took(timed, NOW + 365 * DAY) is None and time.monotonic() - began < 5
    made, skipped, missed, _ = counted(timed)
    assert made == 1 and missed == 0 and skipped == queuectl.MOST_COUNTED
    # Set back again, it says why it is silent, and goes on when it is told to.
    assert took(timed, NOW + DAY) is None
    with timed.transaction():
        timed.pause_schedule("s", 0, NOW + DAY)
    assert took(timed, NOW + 5 * DAY) is not None


def test_many_due_at_once_are_made_in_parts(timed: Any) -> None:
    for number in range(230):
        plan(timed, name=f"s{number}", if_running="queue")
    sizes = []
    while timed.pulse()[1] <= NOW + 25 * SECOND:
        before = timed.last_seq()
        take(timed, NOW + 25 * SECOND)
        sizes.append(timed.last_seq() - before)
    assert sum(sizes) == 460 and max(sizes) <= 100


def test_the_same_content_changes_nothing(timed: Any) -> None:
    assert plan(timed)
    with timed.transaction():
        timed.pause_schedule("s", 1, NOW + SECOND)
    before = timed.schedule("s")
    assert not plan(timed, NOW + 15 * SECOND) and timed.schedule("s") == before
    assert plan(timed, NOW + 15 * SECOND, if_missed="skip") and timed.schedule("s")["paused"]


def test_other_content_at_the_same_times_leaves_the_times_as_they_are(timed: Any) -> None:
    plan(timed)
    plan(timed, NOW + 10 * SECOND + 5, job={"priority": 1})  # its time has come, but nobody has looked yet
    assert took(timed, NOW + 11 * SECOND) == called(10) and timed.find(called(10))["priority"] == 1


def test_other_times_count_from_now_and_swallow_none(timed: Any) -> None:
    plan(timed)
    plan(timed, NOW + 25 * SECOND, every=7 * SECOND)
    assert took(timed, NOW + 25 * SECOND) == called(20)  # which had come before that was said
    assert took(timed, NOW + 31 * SECOND) is None and took(timed, NOW + 32 * SECOND) == called(32)
    plan(timed, NOW + 33 * SECOND, cron="0 0 1 * *")  # nor does the last month count as missed
    assert took(timed, NOW + 34 * SECOND) is None


def test_deleting_and_setting_again_makes_up_for_nothing(timed: Any) -> None:
    plan(timed)
    with timed.transaction():
        timed.delete_schedule("s")
    plan(timed, NOW + 35 * SECOND)
    assert took(timed, NOW + 36 * SECOND) is None and took(timed, NOW + 45 * SECOND) == called(45)


def test_a_pause_makes_nothing_and_leaves_nothing_to_make_up_for(timed: Any) -> None:
    plan(timed)
    with timed.transaction():
        timed.pause_schedule("s", 1, NOW + 5 * SECOND)
    assert timed.pulse()[1] == queuectl.NEVER and took(timed, NOW + 25 * SECOND) is None
    with timed.transaction():
        timed.pause_schedule("s", 0, NOW + 27 * SECOND)
    assert took(timed, NOW + 28 * SECOND) is None and took(timed, NOW + 37 * SECOND) == called(37)
    assert counted(timed) == (1, 0, 0, 0)


def test_a_queue_with_a_schedule_is_not_forgotten(timed: Any) -> None:
    def names() -> list[str]:
        return [queue["name"] for queue in timed.queues()]

    plan(timed, queue="x", job={"queue": "x"})
    assert names() == ["x"] and took(timed, NOW + 10 * SECOND) == called(10)
    with timed.transaction():
        timed.delete(timed.find(called(10))["seq"])
        timed.set_concurrency("x", None)
    assert names() == ["x"]
    plan(timed, NOW + 11 * SECOND, queue="y", job={"queue": "y"})
    assert names() == ["y"]
    with timed.transaction():
        timed.delete_schedule("s")
    assert names() == []


def test_a_schedule_by_hand_is_beside_its_times(timed: Any) -> None:
    plan(timed)
    with timed.transaction():
        timed.run_schedule("s", NOW + 5 * SECOND + 7)
        with pytest.raises(queuectl.QueueError):
            timed.run_schedule("s", NOW + 5 * SECOND + 7)
    by_hand = take(timed, NOW + 6 * SECOND)
    assert by_hand.id == "s@2026-01-01T00:00:05.007Z"
    assert take(timed, NOW + 10 * SECOND) is None and counted(timed) == (0, 1, 0, 1)  # it has not ended
    end(timed, by_hand, "completed", NOW + 11 * SECOND)
    assert took(timed, NOW + 20 * SECOND) == called(20)


def test_a_job_of_a_schedule_has_what_was_given_and_expires_after_its_time(timed: Any) -> None:
    put(timed, id="first")
    plan(timed, env='{"A": "1"}', job={"after": ["first"], "expires_at": 5000, "retry_after": 9, "env": {"B": "2"}})
    assert take(timed, NOW + 10 * SECOND).id == "first"
    job = timed.find(called(10))
    assert (job["expires_at"], job["after"], job["policy"]) == (NOW + 15 * SECOND, "first", '{"retry_after": 9}')
    assert timed.context(job["context"]) == ("/", "/bin", 0o22, '{"A": "1"}')
    assert took(timed, NOW + 16 * SECOND) is None and timed.find(called(10))["state"] == "cancelled"


def test_a_missed_job_that_has_expired_does_not_run(timed: Any) -> None:
    plan(timed, NOW - DAY, every=DAY - 60 * SECOND, job={"expires_at": 59 * SECOND})
    assert took(timed, NOW + SECOND) is None
    assert [job["state"] for job in timed.jobs(queuectl.Selection())] == ["cancelled"]


def test_what_a_schedule_runs_after_may_be_forgotten(timed: Any) -> None:
    plan(timed, job={"after": ["gone"], "after_any": ["gone"]})
    assert took(timed, NOW + 10 * SECOND) == called(10)


def test_another_zone_is_followed(timed: Any, in_zone: Callable[[str], None]) -> None:
    in_zone("UTC")
    plan(timed, cron="0 9 * * *", utc=0)
    assert timed.pulse()[1] == NOW + 9 * HOUR
    in_zone("Etc/GMT-5")  # five hours ahead of UTC
    with timed.transaction():
        timed.follow_zone("=Etc/GMT-5")
    assert took(timed, NOW + SECOND) is None and timed.pulse()[1] == NOW + 4 * HOUR
    assert took(timed, NOW + 4 * HOUR) == called(4 * 3600)
    in_zone("UTC")
    with timed.transaction():
        timed.follow_zone("=UTC")
        timed.follow_zone("=UTC")
    assert took(timed, NOW + 9 * HOUR) == called(9 * 3600)  # by this zone it is its time


def test_schedules_are_in_a_backup_and_go_on_there(timed: Any, tmp_path: Path) -> None:
    plan(timed)
    assert took(timed, NOW + 10 * SECOND) == called(10)
    timed.backup(str(tmp_path / "copy.db"))
    copy = queuectl.Store(str(tmp_path / "copy.db"), patience=2)
    assert took(copy, NOW + 19 * SECOND) is None
    assert took(copy, NOW + 35 * SECOND) == called(30) and copy.schedule("s")["missed"] == 1
    copy.close()


def test_ten_thousand_schedules_cost_a_claim_one_look_into_an_index(timed: Any) -> None:
    plan = timed.db.execute("EXPLAIN QUERY PLAN " + queuectl.PULSE).fetchall()
    assert any("schedules_due" in row[3] for row in plan) and not any(row[3] == "SCAN schedules" for row in plan)


# By the command line.


def schedules(q: Queue) -> dict[str, Any]:
    return {each["name"]: each for each in json.loads(q.quick("schedule", "list", "--json"))}


def test_a_schedule_from_set_to_delete(q: Queue) -> None:
    said = q("schedule", "set", "backup", "--cron", "30  2 * * 1-5", "--utc", "./backup.sh", "--full").out
    assert re.fullmatch(
        r"Schedule set: backup\nNext: (20\S+T02:30:00)\.000Z \(\1\+0000\), in (\dd \d+h|\d+h \d+m|\d+m \d+s)\n", said
    )
    assert q("schedule", "set", "backup", "--cron", "30 2 * * 1-5", "--utc", "./backup.sh --full").out.startswith(
        "Schedule unchanged: backup\n"
    )
    shown = json.loads(q("schedule", "show", "backup", "--json").out)
    assert shown["command"] == "./backup.sh --full" and len(shown["next_times"]) == 5
    assert [time_of[-13:] for time_of in shown["next_times"]] == ["02:30:00+0000"] * 5
    assert q("schedule", "show", "backup").out.count("T02:30:00+0000") == 5
    assert "30 2 * * 1-5 UTC" in q("schedule", "list").out
    assert q("schedule", "pause", "backup").out.startswith("Paused: backup\n")
    assert json.loads(q("schedule", "pause", "backup", "--json").out)["paused"] is True
    assert "paused" in q("schedule", "list").out and "is paused" in q("why", "backup").out
    assert "It is paused" in q("schedule", "set", "backup", "--cron", "@daily", "--utc", "true").out
    assert q("schedule", "resume", "backup").out.startswith("Resumed: backup\nNext: ")
    assert q("schedule", "delete", "backup").out == "Deleted: backup\n"
    assert q("schedule", "list").out == "No schedules.\n" and q("schedule", "list", "--json").out == "[\n]\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["x", "true"], "give either --cron"),
        (["x", "--cron", "@daily", "--every", "1h", "true"], "give either --cron"),
        (["x", "--every", "0.5", "true"], "--every must be a duration from 1 s"),
        (["x", "--every", "nan", "true"], "--every must be a duration from 1 s"),
        (["x", "--cron", "0 0 30 2 *", "true"], "never comes"),
        (["x", "--cron", "@reboot", "true"], "five fields in quotes"),
        (["x", "--every", "1h"], "give a command"),
        (["a b", "--every", "1h", "true"], "the schedule's name must be 1 to"),
        (["x" * 101, "--every", "1h", "true"], "at most 100 characters"),
        (["taken", "--every", "1h", "true"], "taken is the id of a job"),
        (["x", "--every", "1h", "--queue", "run-3", "true"], "run-3 belongs to a run"),
        (["x", "--every", "1h", "--queue", "on-dead", "true"], "on-dead is reserved"),
        (["x", "--every", "1h", "--after", "nothing", "true"], "there is no job nothing"),
        (["x", "--every", "1h", '{"command":"true","id":"y"}'], "neither id"),
        (["x", "--every", "1h", '{"command":"true","run_at":"2030-01-01"}'], "neither id"),
        (["x", "--every", "1h", '{"command":"true","expires":"2030-01-01"}'], "only as a delay"),
        (["x", "--every", "1h", "--delay", "5m", "true"], "--delay"),
        (["x", "--every", "1h", "--id", "y", "true"], "--id"),
        (["x", "--every", "1h", "df", "-k", "--utc"], "--utc stands behind the command"),
        (["x", "--every", "1h", "--cwd", "/nowhere", "true"], "is not a folder"),
    ],
)
def test_what_no_schedule_can_be_is_refused(q: Queue, words: list[str], said: str) -> None:
    q.add("true", "--id", "taken")
    result = q.fails("schedule", "set", *words, code=(1, 2))
    assert said in result.err and schedules(q) == {}


def test_an_unknown_schedule_is_told_with_the_nearest(q: Queue) -> None:
    q("schedule", "set", "backup", "--every", "1h", "true")
    for word in ("show", "pause", "resume", "run", "delete"):
        assert "did you mean backup?" in q.fails("schedule", word, "bakcup").err
    assert "did you mean schedule list" in q.fails("schedule", "lst", code=2).err


def test_a_schedule_has_the_options_of_a_job_and_its_callers_surroundings(q: Queue) -> None:
    place = q.folder / "place"
    place.mkdir()
    options = ["--every", "1h", "--queue", "gpu", "--priority", "3", "--expires", "2h", "--env", "A=b", "--env-all"]
    q("schedule", "set", *options, "x", "pwd; echo $A $MINE", cwd=place, env={"MINE": "mine"})
    job = schedules(q)["x"]["job"]
    assert (job["queue"], job["priority"], job["env"], job["cwd"]) == ("gpu", 3, {"A": "b"}, str(place.resolve()))
    name = q("schedule", "run", "x").out.split()[1]
    assert re.fullmatch(r"x@20\S+\.\d{3}Z", name) and q.show(name)["priority"] == 3
    q.drain(cwd="/")
    assert q("logs", name, "--stdout").out.split() == [str(place.resolve()), "b", "mine"]
    assert schedules(q)["x"]["last_state"] == "completed" and schedules(q)["x"]["last_job"] == name
    assert json.loads(q("schedule", "run", "x", "--json").out)["queue"] == "gpu"


def test_schedules_are_seen_where_the_queue_is_looked_at(q: Queue) -> None:
    q("schedule", "set", "x", "--every", "1h", "--queue", "gpu", "true")
    assert "No worker is running" in q("status").out and "no worker serves its queue" in q("why", "x").out
    with q.working("--queue", "other"):
        status = json.loads(q("status", "--json").out)
        assert status["unserved"] == ["gpu"] and status["scheduled"] == 1
        assert status["next"]["id"].startswith("x@") and status["next"]["command"] == "true"
        assert "No worker serves the queue gpu" in q("status").out
        assert "worker start --queue gpu" in q("why", "x").out
    assert "Times of all schedules: 0 made, 0 skipped, 0 missed." in q("stats").out
    assert 'queuectl_schedule_times_total{schedule="x",outcome="made"} 0' in q("status", "--format", "prometheus").out


def test_a_schedule_that_a_clock_has_silenced_is_found_and_goes_on(q: Queue) -> None:
    q("schedule", "set", "x", "--every", "1h", "true")
    change(q, "UPDATE schedules SET last = last + 31536000000, due = due + 31536000000")
    found = q("doctor", code=1).out
    assert "the schedule x makes no job until 20" in found and "`queuectl schedule resume x`" in found
    assert "the clock was ahead" in q("why", "x").out
    assert re.search(r"in (1h 0m|59m \d+s)$", q("schedule", "resume", "x").out.rstrip())
    q("doctor")


def test_the_names_of_schedules_are_completed(q: Queue) -> None:
    q("schedule", "set", "nightly", "--every", "1h", "true")
    assert q("completion", "--answer", "--", "schedule", "show", "n").out.split() == ["nightly"]


def test_times_are_shown_as_the_workers_have_them(q: Queue) -> None:
    """Whoever asks may have another TZ than the service."""
    with q.working(env={"TZ": "XYZ-5"}):
        said = q("schedule", "set", "x", "--cron", "0 9 * * *", "true", env={"TZ": "ABC+3"}).out
        assert "T04:00:00.000Z" in said and "T09:00:00+0500" in said
        shown = json.loads(q("schedule", "show", "x", "--json", env={"TZ": None}).out)
        assert {each[-13:] for each in shown["next_times"]} == {"09:00:00+0500"}
    with q.working(env={"TZ": "ABC+3"}):
        wait_for(lambda: json.loads(q("status", "--json").out)["next"]["due"].endswith("T12:00:00.000Z"))


def test_a_schedule_starts_at_its_second_and_a_pool_rests_in_between(q: Queue) -> None:
    q.set("poll_interval_ms", "60000")
    with q.working("--count", "2"):
        q("schedule", "set", "x", "--every", "1s", "true")
        wait_for(lambda: schedules(q)["x"]["made"] >= 4)
        q("schedule", "set", "x", "--every", "1h", "true")
        late = [moment(job["started_at"]) - moment(job["id"][2:-1] + ".000Z") for job in q.jobs() if job["started_at"]]
        assert min(late) >= 0 and sorted(late)[1] < 0.25, late

        def written() -> list[tuple[str, int, int]]:
            return sorted((f.name, f.stat().st_mtime_ns, f.stat().st_size) for f in q.db.parent.iterdir())

        wait_for(lambda: not q.counts().get("processing") and not q.counts().get("pending"))
        wait_for(lambda: written() == (time.sleep(0.3), written())[1])
        files = written()
        time.sleep(1)  # what is measured, not a wait
        assert written() == files


def test_a_run_makes_no_jobs_of_schedules(q: Queue) -> None:
    """It ends when its own jobs have ended, and has perhaps the TZ of somebody's shell."""
    q("schedule", "set", "x", "--every", "1s", "true")
    q("run", "sleep 1.5")
    assert schedules(q)["x"]["made"] == 0
    q.drain()
    made = [job for job in q.jobs() if job["id"].startswith("x@")]
    assert schedules(q)["x"]["made"] == len(made) >= 1  # two where a second begins while it drains


def test_a_storm_over_schedules(q: Queue) -> None:
    """kill -9 of workers: each time at most one job, none lost while the pool lives."""
    command = 'echo "$QUEUECTL_JOB_ID" >>ran'
    q("schedule", "set", "x", "--every", "1s", "--if-running", "queue", "--max-retries", "9", command)
    q("schedule", "set", "y", "--cron", "* * * * *", "--utc", "true")
    pools = [q.pool("--count", "2") for _ in range(2)]
    dice, until = random.Random(30), time.monotonic() + (60 if FULL else 10)
    while time.monotonic() < until:
        live = [worker["pid"] for worker in json.loads(q.quick("worker", "list", "--json"))]
        if live:
            kill(dice.choice(live), signal.SIGKILL)
        time.sleep(dice.uniform(0.02, 0.4))  # the storm itself
    for pool in pools:
        assert pool.stop() == 0
    q.drain()
    shown = schedules(q)["x"]
    times = sorted(moment(job["id"][2:-1] + ".000Z") for job in q.jobs() if job["id"].startswith("x@"))
    passed = round(moment(shown["last_at"]) - moment(shown["created_at"][:-5] + ".000Z"))
    assert len(times) == len(set(times)) == shown["made"]
    assert shown["made"] + shown["skipped"] + shown["missed"] == passed >= 9
    assert shown["missed"] <= 2, shown  # while the first pool began, or the last drain
    assert {job["state"] for job in q.jobs()} == {"completed"}
    assert len(set((q.work / "ran").read_text().split())) == shown["made"]


def test_a_supervisor_killed_at_any_moment_repeats_no_time(q: Queue) -> None:
    q("schedule", "set", "x", "--every", "1s", "true")
    for _ in range(4):
        pool = q.pool("--count", "2")
        made = schedules(q)["x"]["made"]
        wait_for(lambda made=made: schedules(q)["x"]["made"] > made)
        pool.signal(signal.SIGKILL)
        pool.wait()
        wait_for(lambda: not q.workers())  # they finish what they run
    shown = schedules(q)["x"]
    passed = round(moment(shown["last_at"]) - moment(shown["created_at"][:-5] + ".000Z"))
    assert shown["made"] + shown["skipped"] + shown["missed"] == passed
    assert len(q.jobs()) == shown["made"]


def test_a_worker_killed_before_its_commit_makes_the_time_once(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queuectl, "is_alive", lambda db, name: name == "pool")
    plan(store)

    def fall(place: str) -> None:
        raise KeyboardInterrupt(place)

    monkeypatch.setattr(queuectl, "test_point", fall)
    with pytest.raises(KeyboardInterrupt):
        take(store, NOW + 10 * SECOND)
    monkeypatch.undo()
    store.db.execute("ROLLBACK")
    assert took(store, NOW + 10 * SECOND) == called(10) and took(store, NOW + 10 * SECOND) is None


def test_the_page_migrates_an_older_database_at_its_start(q: Queue) -> None:
    before = make_old(q, 1)
    web = Web(q)
    assert web.get("/api/jobs")
    assert_migrated(q, 1, before)


def test_the_page_of_a_queue_that_does_not_exist_makes_none(q: Queue) -> None:
    assert Web(q).get("/api/jobs") == [] and not q.db.exists()


def test_the_hooks_of_a_queue_are_told_from_those_of_another_name(store: Any) -> None:
    put(store, queue="on-dead", env={"QUEUECTL_QUEUE": "axb"})
    assert store.hooks_left("axb") and not store.hooks_left("a_b") and not store.hooks_left("AXB")


# =====================================================================================================
# Windows: values anywhere, the rest under wine (.ci/windows) or Windows itself
# =====================================================================================================

room(None)

# What an input holds, and the word that cmd.exe is given for it.
CMD_WORDS = {
    "plain": "plain",
    "a b": '"a b"',
    "": '""',
    "a&b": "a^&b",
    "a & b": '"a & b"',
    "(1) < 2 > 0 | ^": '"(1) < 2 > 0 | ^"',
    "it's": "it's",
    "%PATH%": "^%PATH^%",
    "100 %": '^"100 ^%^"',
    "!x! y": '^"^!x^! y^"',
    'q" & echo INJ "': r'^"q\^" ^& echo INJ \^"^"',
    'a"b': r'a\^"b',
    "C:\\my dir\\": '"C:\\my dir\\\\"',
    r"end\"": r'end\\\^"',
    "x^y": "x^^y",
}


@pytest.mark.parametrize("text", CMD_WORDS)
def test_a_word_is_quoted_for_cmd(text: str) -> None:
    assert queuectl.cmd_word(text) == CMD_WORDS[text]


@pytest.mark.parametrize("template", ['echo "{}"', 'echo "a" "{/} b"', "echo ^{}"])
def test_a_placeholder_that_cmd_would_see_quoted_is_refused(template: str) -> None:
    with pytest.raises(queuectl.UsageError, match="quoted by itself"):
        queuectl.check_cmd_template(template, queuectl.PLACE)
    queuectl.check_cmd_template('echo "a b" {} --in={.}', queuectl.PLACE)


@pytest.mark.parametrize(
    "words, read",
    [
        (["'{command:echo x}'"], ["{command:echo x}"]),
        (["'{id:", "a,", "command:", "x}'"], ["{id: a, command: x}"]),
        (["'{'", "x"], ["'{'", "x"]),
        (["echo", "'{}'"], ["echo", "'{}'"]),
    ],
)
def test_the_single_quotes_that_cmd_leaves_around_json_are_taken_off(words: list[str], read: list[str]) -> None:
    assert queuectl.without_quotes(words) == read


def test_a_command_of_several_lines_is_not_for_cmd() -> None:
    for shell in (None, r"C:\Windows\System32\cmd.exe".replace("\\", os.sep), "CMD"):
        with pytest.raises(queuectl.UsageError, match="only the first line"):
            queuectl.refuse_lines("a\nb", shell)
    queuectl.refuse_lines("a & b", None)
    queuectl.refuse_lines("a\nb", "powershell.exe")


def test_the_line_for_schtasks() -> None:
    line = queuectl.logon_task(["C:\\py\\python.exe", "C:\\my dir\\queuectl.py", "worker", "start"])
    words = r'^"C:\py\python.exe \^"C:\my dir\queuectl.py\^" worker start --detach^"'
    assert line == "schtasks /create /f /tn queuectl /sc onlogon /tr " + words


@pytest.mark.skipif(not WINDOWS, reason="the tests below need Windows, or wine: see .ci/windows")
def test_windows() -> None:
    pass


room(windows)

ECHO_ARGS = "import json, sys; print(json.dumps(sys.argv[1:]))"


def python_file(q: Queue, name: str, text: str) -> str:
    """A program in the folder where jobs run; the command that starts it."""
    (q.work / name).write_text(text)
    return queuectl.join_words([sys.executable, name])


def terminate(pid: int, code: int) -> None:
    """What Task Manager does; the exit code is the killer's choice."""
    import _winapi as kernel

    with suppress(OSError):  # it has ended
        handle = kernel.OpenProcess(1, False, pid)
        kernel.TerminateProcess(handle, code)
        kernel.CloseHandle(handle)


def line_of(q: Queue, line: str) -> Result:
    """Start `queuectl` with a command line exactly as a shell passes it."""
    program = subprocess.list2cmdline([str(word) for word in SCRIPT])
    return q.run(f"{program} {line}")  # type: ignore[arg-type]


# Every command of the contract, in an order in which they go on from each other.
SESSION = """
enqueue --id one "echo hello" | Enqueued: one
enqueue --id bad --max-retries 1 --priority 5 "echo oops>&2& exit 3" | Enqueued: bad
enqueue --id late --delay 1h "echo late" | Enqueued: late
status | pending
list | hello
show one | echo hello
why late | late
edit late --priority 3 | Changed: late
queue set default --concurrency 2 | default
queue pause | Paused
queue resume | Resumed
queue list | default
worker list
worker start --drain --count 2 | one completed | 1
logs one | hello
logs bad --stderr | oops
show bad --json | "exit_code": 3
wait one
stats | COMPLETED
dlq list | bad
dlq list --causes | exit code 3
dlq retry bad | bad
worker start --drain --max-jobs 1 | bad is dead | 1
retry one | one
cancel late | late
retry late | late
delete late | late
schedule set night --cron "30 2 * * *" "echo night" | night
schedule list | night
schedule pause night | night
schedule resume night | night
schedule run night | night@
schedule show night | 30 2
schedule delete night | night
config set max-retries 5 | 5
config get max_retries | 5
config unset max_retries | 3
config show | backoff_base
config list | System32
backup copy.db | copy.db
worker start --detach --count 2
worker list | idle
wait --timeout 30s
worker stop | stopped
restore copy.db | copy.db
run --each "echo {}" "a b" c | "a b"
run "echo one two" "echo three" | three
purge --state completed
dlq purge | 1 job
service --count 2 | schtasks /create
completion bash | complete
doctor | Nothing is wrong
help enqueue | --priority
--version | queuectl
"""


def test_windows_every_command_of_the_contract(q: Queue) -> None:
    for line in SESSION.strip().splitlines():
        words, said, code = (part.strip() for part in f"{line}||".split("|")[:3])
        result = q(*shlex.split(words), code=int(code or 0))
        assert said in result.out + result.err, result


# The faults that were found when it first ran there.


@pytest.mark.parametrize("code", [0, 1, 10, 130])
def test_windows_a_killed_worker_is_replaced_whatever_its_exit_code(q: Queue, code: int) -> None:
    job = q.add(python_file(q, "job.py", GATE_PY), "--max-retries", "3")
    pool = q.pool("--drain")
    q.wait_file("began")
    terminate(q.look("worker", "list")[0]["pid"], code)
    q.touch("go")
    assert pool.wait(30) == 0
    assert q.state(job) == "completed"
    assert f"a worker died (exit code {code}); it is replaced" in pool.err


GATE_PY = """
import os, time
open("began", "a").write("x")
while not os.path.exists("go"): time.sleep(0.05)
"""


def test_windows_a_detached_pool_has_no_window_and_writes_its_log(q: Queue) -> None:
    look = "import ctypes; print('window', ctypes.WinDLL('kernel32').GetConsoleWindow())"
    program = python_file(q, "look.py", look)
    q("worker", "start", "--detach")
    q("enqueue", "--id", "one", "--wait", program)
    q("worker", "stop")
    assert "window" in q("logs", "one", "--stdout").out
    assert "one completed" in q.log()


def test_windows_the_window_of_a_detached_pool_is_not_made(q: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def refuse(words: Any, **options: Any) -> NoReturn:
        given.update(options)
        raise OSError

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with suppress(BaseException):
        q.here(["worker", "start", "--detach"])
    assert given["creationflags"] == 0x0800_0200  # CREATE_NO_WINDOW | CREATE_NEW_PROCESS_GROUP


FLOOD_PY = """
import os, sys, time
os.write(1, b"HEAD\\n")
while not os.path.exists("go"): os.write(1, b"x" * 999 + b"\\n"); time.sleep(0.0002)
os.write(1, b"TAIL\\n")
"""


def test_windows_output_without_end_is_bounded_and_has_no_nuls(q: Queue) -> None:
    q.set("max_output_bytes", "20000")
    q.add(python_file(q, "flood.py", FLOOD_PY), "--id", "flood")
    with q.working() as pool:
        files = q.db.parent / "queue.db.d"
        wait_for(lambda: [f for f in files.glob("*.out") if f.stat().st_size > 30_000], what="output")
        wait_for(lambda: all(f.stat().st_size < 30_000 for f in files.glob("*.out")), what="it to be cut")
        assert not pool.ended
        q.touch("go")
        q.wait_state("flood", "completed")
    out = q("logs", "flood", "--stdout").out
    assert out.startswith("HEAD\n") and out.endswith("TAIL\n")
    assert len(out) < 25_000 and "\0" not in out


def test_windows_late_output_of_a_daemon_puts_no_nuls_into_the_next(q: Queue) -> None:
    daemon = "import subprocess, sys; subprocess.Popen([sys.executable, 'later.py'])"
    python_file(q, "later.py", "import time; time.sleep(0.5); print('late ' * 99)")
    jobs = [python_file(q, "daemon.py", daemon), python_file(q, "nap.py", "import time; time.sleep(1)"), "echo hi"]
    ids = q.load(jobs * 2)
    q.drain()
    for job in (ids[2], ids[5]):
        assert q("logs", job, "--stdout").out.split() == ["hi"]


HOSTILE_TO_CMD = [
    "plain", "a b", "a&b", "a & echo INJ", 'q" & echo INJ "', '"', '""', '" "', "it's", "(x)", ")", "(", "<in", ">out",
    "a|more", "a^b", "^", "^^", "^&", '^"', "!x!", "100%", "a%b", "tail\\", "tail\\\"", "a\\\\b", "C:\\my dir\\",
    'x" && echo INJ && "', "& echo INJ", "| echo INJ", "{} {.}", ",;=", "ü ✓", "-x", "a\tb", "~", "$(x)", "`x`",
    pytest.param("%PATH%", marks=not_wine), pytest.param('"%PATH%" & echo INJ', marks=not_wine),
]  # fmt: skip


def test_windows_no_input_of_each_breaks_out_of_its_word(q: Queue) -> None:
    inputs = [text for text in HOSTILE_TO_CMD if isinstance(text, str)]
    program = python_file(q, "args.py", ECHO_ARGS)
    result = q("run", "-j", "2", "--each", program + " --in={} {}", "--", *inputs)
    assert [json.loads(line) for line in result.out.splitlines()] == [["--in=" + text, text] for text in inputs]
    assert q("run", "--each", "echo {}", stdin="a b\r\nc\n").out.split("\r\n") == ['"a b"', "c", ""]


@pytest.mark.parametrize("text", [text for text in HOSTILE_TO_CMD if not isinstance(text, str)])
def test_windows_no_input_with_a_variable_is_expanded(q: Queue, text: str) -> None:
    program = python_file(q, "args.py", ECHO_ARGS)
    assert json.loads(q("run", "--each", program + " {}", "--", text).out) == [text]


def test_windows_the_words_of_a_command_arrive(q: Queue) -> None:
    words = ["a b", "c&d", 'e"f', "(g)", "100 %", "tail\\"]
    (q.work / "args.py").write_text(ECHO_ARGS)
    q("enqueue", "--id", "one", sys.executable, "args.py", *words)
    q("enqueue", json.dumps({"id": "two", "command": [sys.executable, "args.py", *words]}))
    q.drain()
    for job in ("one", "two"):
        assert json.loads(q("logs", job, "--stdout").out) == words


def test_windows_a_long_log_is_renewed_while_pools_have_it_open(q: Queue) -> None:
    log = q.db.parent / "queuectl.log"
    q("worker", "start", "--detach")
    with open(log, "ab") as file:
        file.write(b"old\n" * 300_000)
    q("worker", "start", "--detach")
    q("enqueue", "--wait", "echo hi")
    q("worker", "stop")
    wait_for(lambda: log.stat().st_size < 100_000, what="a log that is short again")
    assert "completed" in log.read_text() and "\0" not in log.read_text()


# What a shell makes of the line that a user types: the rest of the line as the program gets it.
MANGLED = {
    "cmd, single quotes": '\'{"id":"job1","command":"echo test"}\'',
    "cmd, single quotes and blanks": '\'{"id": "job1", "command": "echo test"}\'',
    "cmd, as the error advises": r'"{\"id\":\"job1\",\"command\":\"echo test\"}"',
    "PowerShell 5, single quotes": '"{"id":"job1","command":"echo test"}"',
    "PowerShell 5, no blank": '{"id":"job1","command":"hostname"}',
    "PowerShell 5, with backslashes": r'"{\"id\":\"job1\",\"command\":\"echo test\"}"',
    "PowerShell 7.3, single quotes": r'"{\"id\":\"job1\",\"command\":\"echo test\"}"',
    "PowerShell 7.3, with backslashes": r'"{\\\"id\\\":\\\"job1\\\",\\\"command\\\":\\\"echo test\\\"}"',
}


@pytest.mark.parametrize("line", MANGLED.values(), ids=MANGLED)
def test_windows_json_is_understood_from_every_shell(q: Queue, line: str) -> None:
    assert line_of(q, "enqueue " + line).out == "Enqueued: job1\n"
    assert q.show("job1")["command"] in ("echo test", "hostname")


def test_windows_json_that_cmd_takes_apart(q: Queue) -> None:
    program = subprocess.list2cmdline([str(word) for word in SCRIPT])
    line = program + ' enqueue \'{"id":"job1","command":"echo test","max_retries":5}\''
    assert q.run(f'cmd /d /c "{line}"').out == "Enqueued: job1\n"  # type: ignore[arg-type]
    assert q.show("job1")["max_retries"] == 5


# The lines of the seed that is written for PowerShell, as PowerShell 5 passes them on.
POWERSHELL_SEED = r"""
--version
enqueue "echo Hello QueueCTL"
enqueue "{\"id\":\"job1\",\"command\":\"echo test\",\"max_retries\":5}"
enqueue "{\"id\":\"api-call\",\"command\":\"python api.py\",\"max_retries\":5}"
enqueue "timeout /t 5 /nobreak"
enqueue "python script.py"
config set max-retries 5
config set backoff-base 2
config show
status
list
list --state completed
dlq list
"""


def test_windows_the_document_for_powershell(q: Queue) -> None:
    for line in POWERSHELL_SEED.strip().splitlines():
        assert line_of(q, line).code == 0
    q.set("backoff_base", "0.01")
    assert q("worker", "start", "--count", "2", "--drain", code=1).code == 1
    assert line_of(q, "dlq retry api-call").code == 0
    assert q.state("job1") == "completed"


def test_windows_cmd_is_not_looked_up_in_the_jobs_folder(q: Queue) -> None:
    shutil.copy(sys.executable, q.work / "cmd.exe")
    path = os.path.join(os.environ["SYSTEMROOT"], "System32", "cmd.exe")
    for number, options in enumerate(([], ["--shell", "cmd"], ["--shell", "CMD.exe"], ["--shell", path])):
        q("enqueue", "--id", f"job{number}", *options, "echo mine")
    q.drain(code=None)
    assert [q("logs", job["id"], "--stdout").out.strip() for job in q.jobs()] == ["mine"] * 4


def test_windows_a_command_of_several_lines_is_refused(q: Queue) -> None:
    for words, options in (
        (["enqueue", "-"], {"stdin": "echo a\necho b\n"}),
        (["enqueue", json.dumps({"command": "echo a\necho b"})], {}),
        (["run", "--commands", "echo a\necho b"], {}),
    ):
        assert "--shell" in q.fails(*words, code=2, **options).err
    job = q.add("echo a")
    q.fails("edit", job, "--command", "echo a\necho b", code=2)
    q("enqueue", "-", stdin="echo one line\n")
    q("enqueue", "--shell", sys.executable, "-", stdin="print(1)\nprint(2)\n", env={"QUEUECTL_DB": q.db})
    q.drain()
    assert [q("logs", job["id"], "--stdout").out.split() for job in q.jobs()] == [["a"], ["one", "line"], ["1", "2"]]


def test_windows_a_life_file_that_nobody_may_open_is_alive(q: Queue) -> None:
    path = str(q.db.parent / "life")
    with open(path, "w"):
        assert not queuectl.system.held(path)
    assert not queuectl.system.held(path + "x")
    assert queuectl.system.held(str(q.work))  # a folder can't be opened: PermissionError


def test_windows_calls_that_fail_are_errors() -> None:
    for name, *values in (("CloseHandle", 0x7FFF), ("SetInformationJobObject", 0x7FFF, 9, None, 0)):
        with pytest.raises(OSError, match="WinError"):
            queuectl.system._kernel(name, *values)


def test_windows_a_job_object_of_this_python_takes_its_structure() -> None:
    handle = queuectl.system._kernel("CreateJobObjectW", None, None)
    queuectl.system._kill_on_close(handle, True)
    queuectl.system._kill_on_close(handle, False)
    queuectl.system._kernel("CloseHandle", handle)


def test_windows_a_worker_ignores_the_keys_of_the_console() -> None:
    code = (
        "import queuectl, signal; queuectl.system.prepare_worker(0);"
        "print(signal.getsignal(signal.SIGBREAK) is signal.getsignal(signal.SIGINT) is signal.SIG_IGN)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=str(PROGRAM.parent), stdout=subprocess.PIPE)
    assert done.stdout.strip() == b"True"


@not_wine
def test_windows_ctrl_break_stops_a_pool(q: Queue) -> None:
    pool = subprocess.Popen(
        [*map(str, SCRIPT), "worker", "start"], env=q.env, cwd=str(q.work),
        creationflags=subprocess.CREATE_NEW_PROCESS_GROUP,  # type: ignore[attr-defined]
    )  # fmt: skip
    wait_for(q.workers, what="a worker")
    pool.send_signal(signal.CTRL_BREAK_EVENT)  # type: ignore[attr-defined]
    assert pool.wait(20) == 0


@not_wine
def test_windows_a_second_command_runs_where_the_first_failed(q: Queue) -> None:
    job = q.add("exit /b 0 || echo no")
    q.drain()
    assert q("logs", job, "--stdout").out == ""


def test_windows_an_idle_bell_rests_until_it_is_rung(q: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    naps: list[float] = []
    clock = [100.0]

    def nap(seconds: float) -> None:
        naps.append(round(seconds, 3))
        clock[0] += seconds

    monkeypatch.setattr(queuectl, "sleep", nap)
    monkeypatch.setattr(queuectl, "monotonic", lambda: clock[0])
    path = str(q.db.parent / "worker.bell")
    bell = queuectl.make_bell(path)
    bell.wait(9)
    assert naps == [0.02]
    clock[0] += 5
    bell.wait(0.5)
    assert naps == [0.02, 0.2, 0.2, 0.1]
    queuectl.ring(path)
    bell.wait(9)  # at once
    bell.wait(9)
    assert naps == [0.02, 0.2, 0.2, 0.1, 0.02]
    os.close(bell.fd)


def test_windows_colours_need_a_console_that_knows_them(q: Queue) -> None:
    assert "\x1b" not in q("list").out


# Kills: no run beside another of its job, none lost.

CHECKED_PY = """
import msvcrt, os, sys, time
name = os.environ["QUEUECTL_JOB_ID"]
fd = os.open("lock." + name, os.O_RDWR | os.O_CREAT)
try:
    msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
except OSError:
    open("overlap." + name, "w").close()
time.sleep(0.3)
open("done." + name, "a").write("x")
"""


def test_windows_killed_workers_and_pools_lose_nothing_and_run_nothing_twice(q: Queue) -> None:
    program = python_file(q, "job.py", CHECKED_PY)
    ids = q.load([{"command": program, "max_retries": 50}] * 24)
    q.set("backoff_base", "0.01")
    for number in range(2):
        pool = q.pool("--count", "2")
        for code in (0, 1):
            time.sleep(0.3)
            victims = [worker["pid"] for worker in q.look("worker", "list")]
            terminate(random.choice(victims or [0]), code)
        terminate(pool.process.pid, number % 2)
        pool.wait()
    q.drain("--count", "2")
    assert not list(q.work.glob("overlap.*"))
    assert set(q.states().values()) == {"completed"}
    for job in ids:
        runs = [run["state"] for run in q.show(job)["runs"]]
        assert runs.count("completed") == 1 and set(runs) <= {"completed", "lost", "failed"}


def test_windows_a_cancelled_job_ends_with_its_grandchildren(q: Queue) -> None:
    python_file(q, "child.py", GATE_PY + "open('survived', 'w')\n")
    tree = "import subprocess, sys, time; subprocess.Popen([sys.executable, 'child.py']); time.sleep(60)"
    job = q.add(python_file(q, "tree.py", tree))
    with q.working():
        q.wait_file("began")
        q("cancel", job)
        q.wait_state(job, "cancelled")
    q.touch("go")
    time.sleep(0.3)
    assert not (q.work / "survived").exists()


def test_windows_time_outs_and_stop_now(q: Queue) -> None:
    nap = python_file(q, "nap.py", "import time; time.sleep(60)")
    slow = q.add(nap, "--timeout", "0.5", "--max-retries", "1")
    q.drain(code=1)
    assert "timed out" in q.show(slow)["last_error"]
    again = q.add(nap)
    pool = q.pool()
    q.wait_state(again, "processing")
    q("worker", "stop", "--now")
    assert pool.wait() == 130
    assert (q.state(again), q.show(again)["attempts"]) == ("pending", 0)


mark_rooms(globals())
