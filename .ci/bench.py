#!/usr/bin/env python3
"""The benchmark of queuectl: how fast it is, next to programs that do a part of its work.

    python3 .ci/bench.py                           everything, about a quarter of an hour
    python3 .ci/bench.py --scale 0.01 --rounds 2   a taste of it; the figures mean little
    python3 .ci/bench.py --only drain,start        some of the rows; --list names them
    python3 .ci/bench.py --against old/queuectl.py a second queuectl as one more peer

Every figure comes from one run in which queuectl and its peers take turns (A B C, then C B A, ...), so
that what else the machine does strikes all of them alike. Reported are the median and the spread of the
rounds; a ratio is formed in each round. What is timed are whole processes, started as a user starts them,
and every result is checked. The table goes to stdout, in Markdown, progress to stderr. Linux or macOS.

Contents, in reading order: Processes, Queues, Turns and rows, The rows, The report, main.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import select
import shlex
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import partial
from glob import glob
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Sequence

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LINUX = sys.platform.startswith("linux")
DEADLINE = 900  # seconds for one measurement: the benchmark never hangs
MILLION = 1_000_000

# ═══ Processes ═══


class Broken(Exception):
    """A result is not what it must be: the figures would be worth nothing."""


def tell(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def run(words: Sequence[str], **options: Any) -> float:
    """The seconds that a process took, which must end with 0."""
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, **options}
    with tempfile.TemporaryFile() as errors:  # no pipe: a daemon that keeps it open would keep us waiting
        began = time.perf_counter()
        code = subprocess.run(words, stderr=errors, **options).returncode
        seconds = time.perf_counter() - began
        if code != 0:
            errors.seek(0)
            said = errors.read().decode("utf-8", "replace").strip()
            raise Broken(f"{shlex.join(words)[:200]} ended with {code}: {said[-2000:]}")
    return seconds


def peak_of(words: Sequence[str], env: dict[str, str]) -> tuple[float, float]:
    """The seconds that a process took, and the most memory it had, in MB."""
    began = time.perf_counter()
    process = subprocess.Popen(words, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    _, process.returncode, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if process.returncode != 0:
        raise Broken(f"{shlex.join(words)[:200]} failed")
    return seconds, usage.ru_maxrss * (1024 if LINUX else 1) / 1e6


def output_of(words: Sequence[str], **options: Any) -> str:
    """What a process prints; nothing if it can't be started or fails."""
    options = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **options}
    try:
        return str(subprocess.run(words, stdout=subprocess.PIPE, check=True, encoding="utf-8", **options).stdout)
    except (OSError, subprocess.CalledProcessError):
        return ""


def end(process: subprocess.Popen[bytes], number: int) -> None:
    """End a process of ours by a signal, and if it does not heed that, by force."""
    process.send_signal(number)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()


def environment(folder: str, **more: str) -> dict[str, str]:
    """The variables of a process that is to find nothing of this user's, and leave nothing behind."""
    own = {"HOME": folder, "TMPDIR": folder, "PYTHONDONTWRITEBYTECODE": "1", "PARALLEL_SHELL": "/bin/sh"}
    own["LC_ALL"] = "C"  # for a short program loads its locale for as long as it runs
    return {**{k: v for k, v in os.environ.items() if not k.startswith("QUEUECTL_")}, **own, **more}


# ═══ Queues ═══


class Program(NamedTuple):
    """A queuectl: what the table calls it, and the words that start it."""
    name: str
    words: list[str]


class Queue:
    """A queue in a folder of its own, and one program's commands on it."""

    def __init__(self, program: Program, folder: str) -> None:
        self.words, self.folder = program.words, folder
        self.db = os.path.join(folder, "queue.db")
        self.env = environment(folder, QUEUECTL_DB=self.db)

    def timed(self, *words: str) -> float:
        return run([*self.words, *words], env=self.env, cwd=self.folder)

    def answer(self, *words: str) -> Any:
        """What a command says with --json."""
        said = output_of([*self.words, *words, "--json"], env=self.env, cwd=self.folder)
        if not said:
            raise Broken(f"queuectl {' '.join(words)} --json failed")
        return json.loads(said)

    def put(self, lines: Iterable[str], *options: str) -> float:
        """Add a job for each line; the seconds that it took, without those for writing the file."""
        return self.timed("enqueue", "--file", self.write(lines), *options)

    def write(self, lines: Iterable[str]) -> str:
        path = os.path.join(self.folder, "jobs")
        with open(path, "w", encoding="utf-8") as f:
            f.writelines(line + "\n" for line in lines)
        return path

    def completed(self) -> int:
        return int(self.answer("status")["jobs"]["completed"])

    def check(self, state: str, expected: int) -> None:
        counts = self.answer("status")["jobs"]
        if counts[state] != expected:
            raise Broken(f"{expected} jobs should be {state}; status counts {counts}")

    def remove(self) -> None:
        shutil.rmtree(self.folder)


@contextmanager
def idle_pool(queue: Queue, workers: int) -> Iterator[list[int]]:
    """A pool that has settled: the process ids of its supervisor and its workers."""
    words = [*queue.words, "worker", "start", "--count", str(workers)]
    process = subprocess.Popen(words, env=queue.env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while len(queue.answer("worker", "list")) < workers:
            if process.poll() is not None or time.monotonic() > deadline:
                raise Broken("a pool did not start")
        time.sleep(1)
        yield [process.pid, *(worker["pid"] for worker in queue.answer("worker", "list"))]
    finally:
        end(process, signal.SIGTERM)


# ═══ Turns and rows ═══


class Row(NamedTuple):
    """One line of the table: samples of queuectl and of what it is compared with, round by round."""
    what: str
    unit: str
    ours: Sequence[float]
    peer: str = ""
    theirs: Sequence[float] = ()
    kind: str = "ratio"  # what the goal is about: the ratio, or the "difference"; without a peer the figure
    goal: tuple[str, float] | None = None  # "at least" or "under", and the bound

    def outcome(self) -> list[float]:
        if not self.theirs:
            return list(self.ours)
        return [a - b if self.kind == "difference" else a / b for a, b in zip(self.ours, self.theirs)]


INSTALL = {  # how a peer comes onto a machine
    "xargs": "apt-get install findutils", "parallel": "apt-get install parallel", "nq": "apt-get install nq",
    "task-spooler": "apt-get install task-spooler", "make": "apt-get install make",
    "huey": "python3 -m venv .venv/bench && .venv/bench/bin/pip install huey",
}
Measure = Callable[[int], float]  # takes how many jobs to run, gives the figure


class Bench:
    """What a table is made with: an interpreter, one program or two, the sizes, and a folder for it all."""

    def __init__(self, options: argparse.Namespace, python: str, temp: str) -> None:
        self.python, self.temp = python, temp
        self.scale: float = options.scale
        self.rounds: int = options.rounds
        self.ours = Program("queuectl", [python, options.file])
        self.programs = [self.ours]
        if options.against:
            self.programs.append(Program("the other queuectl.py", [python, options.against]))
        self.tools = find_tools()
        self.big: dict[tuple[str, str], tuple[Queue, int]] = {}
        self.skipped: list[str] = []

    def size(self, full: int) -> int:
        return max(10, int(full * self.scale))

    def folder(self) -> str:
        return tempfile.mkdtemp(dir=self.temp)

    def queue(self, program: Program | None = None) -> Queue:
        return Queue(program or self.ours, self.folder())

    def skip(self, what: str) -> None:
        if what not in self.skipped:
            tell(f"skipped: {what}")
            self.skipped.append(what)

    def has(self, tool: str) -> bool:
        if tool not in self.tools:
            self.skip(f"{tool}, which is not installed ({INSTALL[tool]})")
        return tool in self.tools

    def turns(self, what: str, size: int, measures: dict[str, Measure], rounds: int = 0) -> dict[str, list[float]]:
        """The figures of all contenders, a short warm-up round left out; every second round goes backwards."""
        samples: dict[str, list[float]] = {name: [] for name in measures}
        rounds = rounds or self.rounds
        for n in range(rounds + 1):
            tell(f"{what}: " + (f"round {n} of {rounds}" if n else "warming up"))
            for name in measures if n % 2 else reversed(list(measures)):
                signal.alarm(DEADLINE)
                figure = measures[name](size if n else max(10, size // 10))
                signal.alarm(0)
                if n:
                    samples[name].append(figure)
        return samples

    def compare(self, what: str, samples: dict[str, list[float]], goal: float = 0) -> Iterator[Row]:
        """A row for each peer of queuectl; another queuectl sets it no goal."""
        ours, *peers = samples
        own = [program.name for program in self.programs]
        for peer in peers:
            bound = ("at least", goal) if goal and peer not in own else None
            yield Row(what, "jobs/s", samples[ours], peer, samples[peer], goal=bound)
        if not peers:
            yield Row(what, "jobs/s", samples[ours])


# ═══ The rows ═══ each a generator; --list shows the first lines of their docstrings


def drained(bench: Bench, program: Program, workers: int, command: str, size: int) -> float:
    """Jobs a second of a pool that runs until nothing is left."""
    queue = bench.queue(program)
    queue.put([command] * size)
    seconds = queue.timed("worker", "start", "--count", str(workers), "--drain")
    queue.check("completed", size)
    queue.remove()
    return size / seconds


def fed(bench: Bench, words: Sequence[str], size: int, **options: Any) -> float:
    """The seconds of a program that takes a line of input for each job."""
    with tempfile.TemporaryFile(dir=bench.temp) as numbers:
        numbers.writelines(b"%d\n" % n for n in range(size))
        numbers.seek(0)
        return run(words, stdin=numbers, **options)


def xargs(bench: Bench, workers: int, command: str, length: int, size: int) -> float:
    """Jobs a second of `xargs -P`, its output in a file; `length` is how many bytes a job prints."""
    path = os.path.join(bench.folder(), "output")
    with open(path, "ab") as sink:  # for appending: else two jobs at once may write to one place
        seconds = fed(bench, ["xargs", "-P", str(workers), "-I{}", "sh", "-c", command], size, stdout=sink,
                      env=environment(bench.temp))
    if os.path.getsize(path) != size * length:
        raise Broken("the output of xargs is not complete")
    os.remove(path)
    return size / seconds


def against_xargs(bench: Bench, what: str, size: int, workers: int, command: str, length: int,
                  goal: float) -> Iterator[Row]:
    measures: dict[str, Measure] = {program.name: partial(drained, bench, program, workers, command)
                                    for program in bench.programs}
    if bench.has("xargs"):
        measures[f"`xargs -P {workers} -I{{}} sh -c ...`"] = partial(xargs, bench, workers, command, length)
    yield from bench.compare(what, bench.turns(what, size, measures), goal)


def drain(bench: Bench) -> Iterator[Row]:
    """5,000 jobs `true`, added before; 1 to 32 workers; against xargs."""
    size = bench.size(5000)
    for workers in (1, 2, 8, 32):
        what = f"{size:,} jobs `true`, --count {workers}"
        yield from against_xargs(bench, what, size, workers, "true", 0, 0.95)


def fed_whole(bench: Bench, words: Sequence[str], inputs: Sequence[str], size: int) -> float:
    """Jobs a second of a program that is given an input a line, and prints a line for each."""
    folder = bench.folder()
    with open(os.path.join(folder, "output"), "ab") as sink, tempfile.TemporaryFile(dir=bench.temp) as lines:
        lines.writelines(b"%s\n" % text.encode() for text in inputs[:size])
        lines.seek(0)
        seconds = run(words, stdin=lines, stdout=sink, env=environment(folder))
    shutil.rmtree(folder)
    return size / seconds


def programs_drained(bench: Bench, ours: Program, program: str, inputs: Sequence[str], size: int) -> float:
    """Jobs a second of a pool of two."""
    queue = bench.queue(ours)
    queue.put(f"{program} {text}" for text in inputs[:size])
    seconds = queue.timed("worker", "start", "--count", "2", "--drain")
    queue.check("completed", size)
    queue.remove()
    return size / seconds


def spooled(bench: Bench, program: str, inputs: Sequence[str], size: int) -> float:
    """Jobs a second of task-spooler, two at a time, each added by a process of its own."""
    folder, tsp = bench.folder(), bench.tools["task-spooler"]
    env = environment(folder, TS_SOCKET=os.path.join(folder, "socket"), TS_MAXFINISHED=str(size + 1))
    run([tsp, "-S", "2"], env=env)
    try:
        began = time.perf_counter()
        for text in inputs[:size]:
            run([tsp, "-n", program, text], env=env)
        while any(word in output_of([tsp], env=env) for word in (" running ", " queued ")):
            time.sleep(0.005)
        return size / (time.perf_counter() - began)
    finally:
        run([tsp, "-K"], env=env)


def small_files(bench: Bench, count: int) -> list[str]:
    folder = bench.folder()
    paths = [os.path.join(folder, f"{number}.txt") for number in range(count)]
    for path in paths:
        with open(path, "w", encoding="utf-8") as f:
            f.write(path * 20)
    return paths


def programs(bench: Bench) -> Iterator[Row]:
    """5,000 programs that need no shell: `/bin/true N`, `cksum FILE`; against xargs, parallel, task-spooler."""
    size = bench.size(5000)
    for program, inputs in (("/bin/true", [str(n) for n in range(size)]), ("cksum", small_files(bench, size))):
        bare, shell = f"`xargs -P2 -n1 {program}`, without one too", f"`xargs -P2 -I{{}} sh -c '{program} {{}}'`"
        contenders: Sequence[tuple[str, str, Measure]] = (
            ("xargs", bare, partial(fed_whole, bench, ["xargs", "-P2", "-n1", program], inputs)),
            ("xargs", shell, partial(fed_whole, bench, ["xargs", "-P2", "-I{}", "sh", "-c", program + " {}"], inputs)),
            ("parallel", f"`parallel -j2 {program}`, which takes one",
             partial(fed_whole, bench, ["parallel", "--will-cite", "-j2", program], inputs)),
            ("task-spooler", f"task-spooler: `tsp -n {program} ...` for each, two slots, without one too",
             partial(spooled, bench, program, inputs)))
        measures: dict[str, Measure] = {
            ours.name: partial(programs_drained, bench, ours, program, inputs) for ours in bench.programs}
        measures.update({called: measure for tool, called, measure in contenders if bench.has(tool)})
        argument = "N" if program == "/bin/true" else "FILE"
        what = f"{size:,} times `{program} {argument}`, which has no shell, --count 2"
        goals = {bare: ("at least", 0.8), shell: ("at least", 1.25)} if program == "/bin/true" else {}
        for row in bench.compare(what, bench.turns(program, size, measures)):
            yield row._replace(goal=goals.get(row.peer))


# What nothing in Python that keeps a record by SQLite can be faster than: two processes that do no more
# than lock, record and claim in one commit, spawn with two new files as output, and wait. No settings,
# priorities, retries, time-outs, signals, log lines or environment of jobs; and the queue is ready made.
BARE_LOOP = """
import fcntl, os, sqlite3, sys, time
folder, size, full, command = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "full", sys.argv[4]
path, flags = folder + "/loop.db", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
db = sqlite3.connect(path, isolation_level=None)
db.execute("PRAGMA journal_mode = WAL")
db.execute("CREATE TABLE jobs (seq INTEGER PRIMARY KEY, command TEXT, state TEXT, worker INTEGER, started REAL)")
db.execute("CREATE INDEX waiting ON jobs (seq) WHERE state = 'pending'")
db.execute("CREATE TABLE runs (job INTEGER PRIMARY KEY, code INTEGER, finished REAL, out BLOB, err BLOB)")
db.execute("BEGIN")
db.executemany("INSERT INTO jobs (command, state) VALUES (?, 'pending')", [(command,)] * size)
db.execute("COMMIT")
db.close()
def work(me):
    run = sqlite3.connect(path, isolation_level=None).execute
    run("PRAGMA synchronous = NORMAL")
    lock, null = os.open(folder + "/lock", flags), os.open(os.devnull, os.O_RDONLY)
    log, job, turn, code, old = os.open(path + "-wal", os.O_RDWR), None, 0, 0, []
    while True:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run("BEGIN IMMEDIATE")
        if job:
            run("UPDATE jobs SET state = 'completed', worker = NULL WHERE seq = ?", job[:1])
            out, err = (os.pread(fd, 1 << 20, 0) or None for fd in old)
            run("INSERT INTO runs VALUES (?, ?, ?, ?, ?)", (job[0], code, time.time(), out, err))
        job = run("SELECT seq, command FROM jobs WHERE state = 'pending' ORDER BY seq LIMIT 1").fetchone()
        if job:
            run("UPDATE jobs SET state = 'processing', worker = ?, started = ? WHERE seq = ?",
                (me, time.time(), job[0]))
        run("COMMIT")
        fcntl.flock(lock, fcntl.LOCK_UN)
        if not job:
            return
        turn += 1
        new = [os.open("%s/%d.%d.%d" % (folder, me, turn % 3, n), flags | os.O_APPEND) for n in (1, 2)]
        for fd in new:
            fcntl.flock(fd, fcntl.LOCK_EX)
        pid = os.posix_spawn("/bin/sh", ["/bin/sh", "-c", job[1]], os.environ, setsid=True, file_actions=[
            (os.POSIX_SPAWN_DUP2, have, want) for have, want in ((null, 0), (new[0], 1), (new[1], 2))])
        if full:
            os.fdatasync(log)
        for fd in old:
            if os.lseek(fd, 0, os.SEEK_END):
                os.ftruncate(fd, 0)
            os.close(fd)
        old, code = new, os.waitpid(pid, 0)[1]
for me in (1, 2):
    if os.fork() == 0:
        work(me)
        os._exit(0)
for _ in (1, 2):
    os.wait()
if sqlite3.connect(path).execute("SELECT count(*) FROM runs WHERE code = 0").fetchone() != (size,):
    sys.exit("the bare loop has not run everything")
"""


def bare_loop(bench: Bench, sync: str, command: str, size: int) -> float:
    """Jobs a second; `sync` is full, or normal for never."""
    folder = bench.folder()
    seconds = run([bench.python, "-c", BARE_LOOP, folder, str(size), sync, command], env=environment(folder))
    shutil.rmtree(folder)
    return size / seconds


def limit(bench: Bench) -> Iterator[Row]:
    """What the barest loop in Python reaches that keeps a record; against xargs."""
    path = big_output(bench)
    for sync, command, length, full in (("full", "true", 0, 5000), ("normal", "true", 0, 5000),
                                        ("full", f"cat {shlex.quote(path)}", 100_000, 2000)):
        size = bench.size(full)
        bare = "the barest loop in Python that records its jobs" + (", never synced" if sync == "normal" else "")
        measures: dict[str, Measure] = {bare: partial(bare_loop, bench, sync, command)}
        if bench.has("xargs"):
            measures["`xargs -P 2 -I{} sh -c ...`"] = partial(xargs, bench, 2, command, length)
        what = f"the limit: {bare}, 2 processes, {size:,} jobs " + ("that print 100 KB" if length else "`true`")
        yield from bench.compare(what, bench.turns("limit", size, measures))


def big_output(bench: Bench) -> str:
    """A file of 100 KB that jobs print."""
    path = os.path.join(bench.temp, "output")
    with open(path, "wb") as f:
        f.write((b"a line of 100 bytes ".ljust(99, b".") + b"\n") * 1000)
    return path


def output(bench: Bench) -> Iterator[Row]:
    """The same with jobs that print a line, or 100 KB; against xargs with its output in a file."""
    path = big_output(bench)
    for called, command, length, full in (("a line", "echo hello", 6, 5000),
                                          ("100 KB", f"cat {shlex.quote(path)}", 100_000, 2000)):
        size = bench.size(full)
        what = f"{size:,} jobs that print {called}, --count 2"
        yield from against_xargs(bench, what, size, 2, command, length, 0.9)


def shown_by_run(bench: Bench, command: str, length: int, size: int) -> float:
    """Jobs a second of `queuectl run`, its output, in the order of the input, in a file."""
    queue, path = bench.queue(), os.path.join(bench.folder(), "output")
    with open(path, "wb") as sink:
        words = [*queue.words, "run", "-j", "2", "--each", command]
        seconds = fed(bench, words, size, stdout=sink, env=queue.env)
    if os.path.getsize(path) != size * length:
        raise Broken("the output of run is not complete")
    queue.remove()
    return size / seconds


def shown_by_parallel(bench: Bench, command: str, length: int, size: int) -> float:
    folder = bench.folder()
    path = os.path.join(folder, "output")
    with open(path, "wb") as sink:
        words = ["parallel", "--will-cite", "-k", "-j2", command]
        seconds = fed(bench, words, size, stdout=sink, env=environment(folder))
    if os.path.getsize(path) != size * length:
        raise Broken("the output of parallel is not complete")
    return size / seconds


def shown(bench: Bench) -> Iterator[Row]:
    """`run` with 10,000 jobs that print 1 KB, shown in order; against xargs, and `parallel -k`."""
    length, size = 1000, bench.size(10_000)
    path = os.path.join(bench.temp, "kilobyte")
    with open(path, "wb") as f:
        f.write(b"k" * (length - 1) + b"\n")
    command = f"cat {shlex.quote(path)}; : {{}}"
    measures: dict[str, Measure] = {bench.ours.name: partial(shown_by_run, bench, command, length)}
    if bench.has("xargs"):
        measures["`xargs -P 2 -I{} sh -c ...`, in any order"] = partial(xargs, bench, 2, command, length)
    if bench.has("parallel"):
        measures["`parallel -k -j2`"] = partial(shown_by_parallel, bench, command, length)
    what = f"{size:,} jobs that print 1 KB, by `run -j 2`"
    yield from bench.compare(what, bench.turns("shown", size, measures), 0.9)


def big_queue(bench: Bench, kind: str, program: Program | None = None) -> tuple[Queue, int]:
    """A queue of a million jobs (waiting, scheduled, or history), made at first use; and how many they are."""
    program = program or bench.ours
    if (kind, program.name) not in bench.big:
        size = bench.size(MILLION)
        tell(f"making a queue of {size:,} jobs ({kind}); this takes a while")
        queue = bench.queue(program)
        queue.put(("true" for _ in range(size)), *(("--delay", "30d") if kind == "scheduled" else ()))
        if kind == "history":
            complete_all(queue.db)
        queue.check("completed" if kind == "history" else "pending", size)
        bench.big[kind, program.name] = queue, size
    return bench.big[kind, program.name]


def complete_all(path: str) -> None:
    """As if every job had run once: by SQL, for running a million would take a quarter of an hour."""
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("BEGIN IMMEDIATE")
    db.execute("UPDATE jobs SET state = 'completed', ready = 0, attempts = 1, runs = 1, exit_code = 0,"
               " started_at = created_at, finished_at = created_at")
    db.execute("INSERT INTO runs (id, attempt, state, started_at, finished_at, seconds, exit_code, worker)"
               " SELECT seq * 16777216 + 1, 1, 'completed', created_at, created_at, 0.002, 0, 'bench-1' FROM jobs")
    db.execute("COMMIT")
    db.close()


def limited(bench: Bench, kind: str, size: int) -> float:
    """Jobs a second of two workers that end after `size` jobs, whatever else is in the queue."""
    queue = big_queue(bench, kind)[0] if kind else bench.queue()
    before = queue.completed()
    queue.put(["true"] * size, "--priority", "1")
    seconds = queue.timed("worker", "start", "--count", "2", "--max-jobs", str(size))
    queue.check("completed", before + size)
    if not kind:
        queue.remove()
    return size / seconds


def depth(bench: Bench) -> Iterator[Row]:
    """3,000 jobs in front of a million that wait, are scheduled, or have ended; against those 3,000 alone."""
    size = bench.size(3000)
    for kind in ("waiting", "scheduled", "history"):
        big_queue(bench, kind)  # not within the deadline of a measurement
    measures: dict[str, Measure] = {kind or "none": partial(limited, bench, kind)
                                    for kind in ("", "waiting", "scheduled", "history")}
    samples = bench.turns("depth", size, measures)
    for kind, says in (("waiting", "waiting behind"), ("scheduled", "scheduled"), ("history", "in the history")):
        what = f"{size:,} jobs `true`, --count 2, with {bench.size(MILLION):,} more {says}"
        yield Row(what, "jobs/s", samples[kind], "an empty queue", samples["none"], goal=("at least", 0.9))


# Runs the program from its file and says when its (first) transaction was committed.
STOPWATCH = """
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("queuectl", sys.argv[1])
queuectl = sys.modules["queuectl"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(queuectl)
stamps, end = [], queuectl.Store.end
def stamped(*args, **options):
    end(*args, **options)
    stamps.append(time.monotonic())
queuectl.Store.end = stamped
code = queuectl.main(sys.argv[2:])
sys.stderr.write(repr(stamps[0]))
sys.exit(code)
"""


def delay(queue: Queue, fifo: str, reader: int) -> float:
    """Milliseconds from the commit of an `enqueue` until its job, which writes to a FIFO, is running."""
    python, file = queue.words
    words = [python, "-c", STOPWATCH, file, "enqueue", f"echo >{shlex.quote(fifo)}"]
    with subprocess.Popen(words, env=queue.env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        if not select.select([reader], [], [], 30)[0]:
            raise Broken("a job did not start within 30 s of its enqueue")
        started = time.monotonic()
        os.read(reader, 1)
        said = process.communicate()[1].decode()
    if process.returncode != 0:
        raise Broken(f"enqueue failed under the stopwatch: {said[-2000:]}")
    return (started - float(said)) * 1000


def processor_time(pids: Iterable[int]) -> float:
    """Milliseconds that processes have used so far."""
    total = 0
    for path in [path for pid in pids for path in glob(f"/proc/{pid}/task/*/schedstat")]:
        with open(path, encoding="ascii") as f:
            total += int(f.read().split()[0])
    return total / 1e6


def idle_time(pids: list[int], seconds: float) -> float:
    """Milliseconds of processor time in ten seconds."""
    before = processor_time(pids)
    began = time.monotonic()
    time.sleep(seconds)
    return (processor_time(pids) - before) * 10 / (time.monotonic() - began)


def start(bench: Bench) -> Iterator[Row]:
    """An idle pool of two: from the commit of `enqueue` until the job runs; its processor time."""
    queue, count = bench.queue(), bench.size(200)
    fifo = os.path.join(queue.folder, "fifo")
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDWR)  # for writing too, or it would be at its end between two jobs
    idle: list[float] = []
    with idle_pool(queue, 2) as pids:
        tell(f"start: the idle pool, then {count} jobs one by one")
        if LINUX:
            idle = [idle_time(pids, max(1.0, 10 * bench.scale))]
        delays = [delay(queue, fifo, reader) for _ in range(count + 1)][1:]  # the first is the warm-up
    os.close(reader)
    queue.check("completed", count + 1)
    what = f"commit of `enqueue` until the job runs, idle pool of 2, {count} times"
    yield Row(what + ": the median", "ms", delays, goal=("under", 5))
    yield Row(what + ": the 99th percentile", "ms", [sorted(delays)[math.ceil(0.99 * count) - 1]], goal=("under", 20))
    if idle:
        yield Row("processor time of the idle pool of 2 in 10 s", "ms", idle)
    else:
        bench.skip("the idle pool's processor time, which is read from Linux's /proc")


# The same rows into the same table, with the cache that queuectl takes. The ids scatter as queuectl's
# do, for their random digits come first, and are never twice the same, for n comes behind.
BARE_INSERT = """
import random, sqlite3, sys, time
now = int(time.time() * 1000)
rows = (("%05x%05x" % (random.getrandbits(20), n), 1, "true %d" % n, "default", 10, 1, None, None,
         None, 3, None, 1, None, now, now) for n in range(int(sys.argv[2])))
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("PRAGMA cache_size = -40000")
db.execute("BEGIN IMMEDIATE")
db.executemany('''INSERT INTO jobs (id, generated, command, state, queue, priority, ready, due, run_at,
    timeout_seconds, max_retries, backoff_base, context, env, created_at, updated_at)
    VALUES (?, ?, ?, 'pending', ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)''', rows)
db.execute("COMMIT")
"""


def bulk_added(bench: Bench, program: Program, pattern: str, peaks: list[float], size: int) -> float:
    """Rows a second of `enqueue --file`; its peak of memory goes to `peaks`."""
    queue = bench.queue(program)
    queue.timed("status")  # which makes the database
    path = queue.write(pattern % n for n in range(size))
    seconds, peak = peak_of([*queue.words, "enqueue", "--file", path], queue.env)
    queue.check("pending", size)
    queue.remove()
    peaks.append(peak)
    return size / seconds


def bare_added(bench: Bench, size: int) -> float:
    """Rows a second of nothing but an insert by SQL."""
    queue = bench.queue()
    queue.timed("status")
    seconds = run([bench.python, "-c", BARE_INSERT, queue.db, str(size)], env=queue.env)
    db = sqlite3.connect(queue.db)
    if db.execute("SELECT count(*) FROM jobs").fetchone() != (size,):
        raise Broken("the bare insert is not complete")
    db.close()
    queue.remove()
    return size / seconds


def bulk(bench: Bench) -> Iterator[Row]:
    """`enqueue --file` of a million lines, plain and JSON; against a bare executemany; peak of memory."""
    size, bare = bench.size(MILLION), "a bare `executemany`"
    patterns = {"plain": "true %d", "JSON": '{"command": "true %d"}'}
    measures: dict[str, Measure] = {bare: partial(bare_added, bench)}
    peaks: dict[tuple[str, str], list[float]] = {(p.name, called): [] for p in bench.programs for called in patterns}
    for program in bench.programs:
        for called, pattern in patterns.items():
            measures[f"{program.name}, {called}"] = partial(
                bulk_added, bench, program, pattern, peaks[program.name, called])
    samples = bench.turns("bulk", size, measures, rounds=min(3, bench.rounds))  # for each takes a minute
    for called in patterns:
        what, ours = f"`enqueue --file` of {size:,} {called} lines", samples[f"{bench.ours.name}, {called}"]
        yield Row(what, "rows/s", ours, bare, samples[bare], goal=("at least", 0.5))
        for program in bench.programs[1:]:
            yield Row(what, "rows/s", ours, program.name, samples[f"{program.name}, {called}"])
        yield Row(what + ": peak memory", "MB", peaks[bench.ours.name, called][1:], goal=("under", 100))


def installed(bench: Bench, program: Program) -> Program | None:
    """The command that `make install` makes of a program; None if it can't be made here."""
    folder, prefix = os.path.dirname(program.words[1]), bench.folder()
    if not bench.has("make"):
        return None
    if not os.path.exists(os.path.join(folder, "Makefile")):
        bench.skip(f"the installed command of {program.name}, beside which is no Makefile")
        return None
    run(["make", "install", "PREFIX=" + prefix, "PYTHON=" + bench.python], cwd=folder, env=environment(prefix))
    return Program(program.name + ", installed", [os.path.join(prefix, "bin", "queuectl")])


def milliseconds(queue: Queue, words: Sequence[str], size: int) -> float:
    """What one command takes; with no size to it, but turns() gives one to all."""
    return queue.timed(*words) * 1000


def enqueue(bench: Bench) -> Iterator[Row]:
    """One `enqueue true` from a shell, the script and the installed command; against `python -c pass`."""
    commands = [(program, installed(bench, program)) for program in bench.programs]
    queues = {p.name: bench.queue(p) for pair in commands for p in pair if p}
    floor = "import argparse, json, os, re, signal, sqlite3, sys, time"
    compiling = "f = %r; compile(open(f, encoding='utf-8').read(), f, 'exec')" % bench.ours.words[1]
    bare_python = bench.queue(Program("python", [bench.python]))
    measures: dict[str, Measure] = {
        name: partial(milliseconds, queue, ["enqueue", "true"]) for name, queue in queues.items()}
    for name, code in (("pass", "pass"), ("floor", floor), ("compile", compiling)):
        measures[name] = partial(milliseconds, bare_python, ["-c", code])
    samples = bench.turns("enqueue", 1, measures, rounds=bench.size(30))
    ours, bare = samples[bench.ours.name], samples["pass"]
    yield Row("`python queuectl.py enqueue true`", "ms", ours, "`python -c pass`", bare, goal=("under", 2.5))
    name = bench.ours.name + ", installed"
    if name in samples:
        yield Row("`queuectl enqueue true`, installed", "ms", samples[name], "`python -c pass`", bare,
                  goal=("under", 1.8))
    yield Row(f"the floor: `python -c '{floor}'`", "ms", samples["floor"], "`python -c pass`", bare)
    yield Row("compiling queuectl.py alone", "ms", samples["compile"], "`python -c pass`", bare, "difference")
    for program in bench.programs[1:]:
        for kind in ("", ", installed"):
            here, there = bench.ours.name + kind, program.name + kind
            if here in samples and there in samples:
                yield Row("`enqueue true`, " + here, "ms", samples[here], there, samples[there])


def commands(bench: Bench) -> Iterator[Row]:
    """`status`, `list` and `show` with a million jobs in the queue; against an empty queue."""
    queues = {program.name: big_queue(bench, "waiting", program)[0] for program in bench.programs}
    single = bench.queue()
    single.put(["true"])
    empty = bench.queue()
    for name in ("status", "list", "show"):
        small, peer = (single, "a queue of one") if name == "show" else (empty, "an empty queue")
        measures: dict[str, Measure] = {}
        for called, queue in {**queues, peer: small}.items():
            words = [name, queue.answer("list", "--limit", "1")[0]["id"]] if name == "show" else [name]
            measures[called] = partial(milliseconds, queue, words)
        samples = bench.turns(name, 1, measures, rounds=bench.size(10))
        what = f"`{name}{' ID' if name == 'show' else ''}` at {bench.size(MILLION):,} jobs"
        yield Row(what, "ms", samples[bench.ours.name], peer, samples[peer], "difference", ("under", 30))
        for program in bench.programs[1:]:
            yield Row(what, "ms", samples[bench.ours.name], program.name, samples[program.name])


def shared_memory(pids: Iterable[int]) -> float:
    """MB of memory of some processes; what several share is counted once."""
    total = 0
    for pid in pids:
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as f:
            total += sum(int(line.split()[1]) for line in f if line.startswith("Pss:"))
    return total * 1024 / 1e6


def pool_memory(bench: Bench, workers: int, size: int) -> float:
    queue = bench.queue()
    with idle_pool(queue, workers) as pids:
        total = shared_memory(pids)
    queue.remove()
    return total


def memory(bench: Bench) -> Iterator[Row]:
    """The memory (PSS) of an idle pool, and of each further worker."""
    if not os.path.exists("/proc/self/smaps_rollup"):
        bench.skip("memory, which is read from Linux's /proc")
        return
    samples = bench.turns("memory", 1, {str(n): partial(pool_memory, bench, n) for n in (1, 8)})
    further = [(eight - one) / 7 for one, eight in zip(samples["1"], samples["8"])]
    yield Row("memory (PSS) of an idle pool of 1", "MB", samples["1"], goal=("under", 12))
    yield Row("memory (PSS) of each further worker", "MB", further, goal=("under", 3))


def whole(bench: Bench, size: int) -> float:
    queue = bench.queue()
    seconds = queue.put(["true"] * size) + queue.timed("worker", "start", "--count", "2", "--drain")
    queue.check("completed", size)
    queue.remove()
    return size / seconds


def task_spooler(bench: Bench, size: int) -> float:
    folder, tsp = bench.folder(), bench.tools["task-spooler"]
    env = environment(folder, TS_SOCKET=os.path.join(folder, "socket"), TS_MAXFINISHED=str(size + 1))
    run([tsp, "-S", "2"], env=env)  # starts its server
    try:
        began = time.perf_counter()
        fed(bench, ["xargs", "-I{}", tsp, "-n", "sh", "-c", "true"], size, env=env)
        run([tsp, "-w"], env=env)  # waits for the job added last, not for one beside it
        listing = output_of([tsp], env=env)
        while " running " in listing or " queued " in listing:
            listing = output_of([tsp], env=env)
        seconds = time.perf_counter() - began
    finally:
        run([tsp, "-K"], env=env)
    if [line.split()[1:4] for line in listing.splitlines()].count(["finished", "stdout", "0"]) != size:
        raise Broken(f"task-spooler has not run {size} jobs")
    return size / seconds


def nq_completed(folder: str) -> int:
    count = 0
    for path in glob(os.path.join(folder, ",*")):
        with open(path, encoding="utf-8") as f:
            count += "[exited with status 0.]" in f.read()
    return count


def nq(bench: Bench, size: int) -> float:
    folder = bench.folder()
    env = environment(folder, NQDIR=folder)
    seconds = fed(bench, ["xargs", "-I{}", "nq", "-q", "sh", "-c", "true"], size, env=env)
    seconds += run(["nq", "-w"], env=env)
    deadline = time.monotonic() + 10
    while nq_completed(folder) != size:  # now and then the last one's record comes a moment later
        if time.monotonic() > deadline:
            raise Broken(f"nq has run {nq_completed(folder)} of {size} jobs")
    shutil.rmtree(folder)
    return size / seconds


def parallel(bench: Bench, record: bool, size: int) -> float:
    folder = bench.folder()
    log = os.path.join(folder, "log")
    words = ["parallel", "--will-cite", "-j2", "-N0", *(["--joblog", log] if record else []), "true"]
    seconds = fed(bench, words, size, env=environment(folder))
    if record:
        with open(log, encoding="utf-8") as f:
            if len(f.readlines()) != size + 1:
                raise Broken("the log of parallel is not complete")
    return size / seconds


HUEY_TASKS = """
import os, subprocess
from huey import SqliteHuey
huey = SqliteHuey(filename=os.environ["BENCH_HUEY"])
@huey.task()
def job():
    subprocess.run(["sh", "-c", "true"], check=True)
    with open(os.environ["BENCH_HUEY"] + ".done", "ab") as f:
        f.write(b".")
    return True
"""


def huey(bench: Bench, size: int) -> float:
    folder, python = bench.folder(), bench.tools["huey"]
    path = os.path.join(folder, "huey.db")
    with open(os.path.join(folder, "tasks.py"), "w", encoding="utf-8") as f:
        f.write(HUEY_TASKS)
    env = environment(folder, BENCH_HUEY=path, PYTHONPATH=folder)
    began = time.perf_counter()
    run([python, "-c", f"import tasks\nfor _ in range({size}): tasks.job()"], env=env)
    words = [python, "-m", "huey.bin.huey_consumer", "tasks.huey", "-k", "process", "-w", "2", "-n", "-q"]
    consumer = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not os.path.exists(path + ".done") or os.path.getsize(path + ".done") < size:
            if consumer.poll() is not None:
                raise Broken("huey's consumer has ended too soon")
            time.sleep(0.005)
        return size / (time.perf_counter() - began)
    finally:
        end(consumer, signal.SIGINT)  # its way to say: finish and end


def peers(bench: Bench) -> Iterator[Row]:
    """Adding and running 1,000 jobs `true` two at a time; against other queues."""
    contenders: Sequence[tuple[str, str, Measure]] = (
        ("task-spooler", "task-spooler: `xargs -I{} tsp -n sh -c true`, two slots", partial(task_spooler, bench)),
        ("nq", "nq: `xargs -I{} nq -q sh -c true`, then `nq -w`; one at a time", partial(nq, bench)),
        ("parallel", "`parallel -j2 -N0 true`", partial(parallel, bench, False)),
        ("parallel", "`parallel -j2 -N0 --joblog FILE true`", partial(parallel, bench, True)),
        ("huey", "huey: SqliteHuey (without fsync, its default), 2 process workers", partial(huey, bench)))
    size = bench.size(1000)
    measures: dict[str, Measure] = {bench.ours.name: partial(whole, bench)}
    measures.update({called: measure for tool, called, measure in contenders if bench.has(tool)})
    what = f"{size:,} jobs `true`: `enqueue --file`, then `worker start --count 2 --drain`, both timed"
    yield from bench.compare(what, bench.turns("peers", size, measures))


ROWS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    row.__name__: row for row in (
        drain, programs, limit, output, shown, depth, start, bulk, enqueue, commands, memory, peers)}

# ═══ The report ═══


def find_tools() -> dict[str, str]:
    """The peers that are installed, and where; of huey, the interpreter that has it."""
    tools = {name: shutil.which(name) or "" for name in ("xargs", "parallel", "nq", "make")}
    for name in ("tsp", "ts"):  # some systems have another program called ts
        if "TS_SOCKET" in output_of([name, "-h"]):
            tools.setdefault("task-spooler", name)
    for python in (os.path.join(ROOT, ".venv", "bench", "bin", "python"), sys.executable):
        if output_of([python, "-c", "import huey; print(1)"]):
            tools.setdefault("huey", python)
    return {name: path for name, path in tools.items() if path}


def version_of(tool: str, path: str) -> str:
    """The first line with which a program tells its version; nq tells none, but its package may."""
    words = {"task-spooler": [path, "-V"], "nq": ["dpkg-query", "-W", "nq"],
             "huey": [path, "-c", "import huey; print('huey', huey.__version__)"]}.get(tool, [path, "--version"])
    return output_of(words).partition("\n")[0].replace("\t", " ") or f"{tool} (version unknown)"


def machine(temp: str) -> dict[str, str]:
    """What the figures depend on besides the programs; nothing that says whose machine it is."""
    model = platform.processor()
    if LINUX:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            model = next((line.split(": ")[1].strip() for line in f if line.startswith("model name")), model)
    uname = os.uname()
    return {"system": f"{uname.sysname} {uname.release} {uname.machine}",
            "processor": f"{os.cpu_count()} cores, {model or 'model unknown'}",
            "temporary folder": output_of(["stat", "-f", "-c", "%T", temp]).strip() or "file system unknown",
            "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            "tools": "; ".join(version_of(tool, path) for tool, path in find_tools().items()),
            "command": shlex.join(["python3", *sys.argv])}


def number(value: float) -> str:
    size = abs(value)
    return f"{value:,.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"


def spread(samples: Sequence[float]) -> str:
    """The median, and in brackets the least and the most."""
    middle, least, most = (number(pick(samples)) for pick in (statistics.median, min, max))
    between = " to " if min(samples) < 0 else "–"
    return f"{middle} ({least}{between}{most})" if len(samples) > 1 else middle


def verdict(row: Row) -> str:
    if row.goal is None:
        return ""
    (word, bound), value = row.goal, statistics.median(row.outcome())
    met = value >= bound if word == "at least" else value < bound
    unit = f" {row.unit}" if not row.theirs or row.kind == "difference" else ""
    return f"{word} {bound:g}{unit}: {'met' if met else '**missed**'}"


def table_line(row: Row) -> str:
    peer = f"{row.peer}: {spread(row.theirs)} {row.unit}" if row.theirs else ""
    outcome = spread(row.outcome()) if row.theirs else ""
    if row.kind == "difference":
        outcome += f" {row.unit} more"
    return f"| {row.what} | {spread(row.ours)} {row.unit} | {peer} | {outcome} | {verdict(row)} |"


def show_table(bench: Bench, version: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """Measure and print row by row, so that an interrupted run has not been for nothing."""
    print(f"\n{version}\n\n| what | queuectl | compared with | ratio: median (min–max) | goal |\n|---|---|---|---|---|")
    results = []
    for name in names:
        for row in ROWS[name](bench):
            print(table_line(row), flush=True)
            results.append(dict(row._asdict(), row=name, outcome=row.outcome(), interpreter=version))
    print("".join(f"\nskipped: {what}" for what in bench.skipped), flush=True)
    return results


ABOUT_PYTHON = """
import sqlite3, sys
print("Python %s, SQLite %s" % (sys.version.split()[0], sqlite3.sqlite_version))
print(sys.executable)  # the program itself, where the command is a script that looks for it
"""


def report(options: argparse.Namespace, temp: str) -> dict[str, Any]:
    """Print a table for each interpreter; all the samples."""
    facts, results, skipped = machine(temp), [], []
    print("\n".join(f"- {name}: {fact}" for name, fact in facts.items()), flush=True)
    for python in options.python or [sys.executable]:
        about = output_of([python, "-c", ABOUT_PYTHON]).splitlines()
        if len(about) != 2:
            raise Broken(f"{python} can't be used")
        version, executable = about
        bench = Bench(options, executable, tempfile.mkdtemp(dir=temp))
        results += show_table(bench, version, options.only)
        skipped += bench.skipped
        shutil.rmtree(bench.temp, ignore_errors=True)  # the big queues take half a gigabyte
    return {**facts, "results": results, "skipped": skipped}


# ═══ main ═══


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object with all samples, instead of the table")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="how often each is measured (5)")
    parser.add_argument("--scale", type=float, default=1.0, metavar="F", help="by which all sizes are multiplied (1)")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(ROWS), metavar="NAME[,NAME]",
                        help="these rows")
    parser.add_argument("--python", action="append", metavar="PATH", help="interpreter for queuectl; repeatable")
    parser.add_argument("--file", type=os.path.abspath, default=os.path.join(ROOT, "queuectl.py"), metavar="PATH",
                        help="the queuectl.py to measure")
    parser.add_argument("--against", type=os.path.abspath, metavar="PATH", help="another, as one more peer")
    parser.add_argument("--list", action="store_true", help="name the rows")
    options = parser.parse_args()
    unknown = [name for name in options.only if name not in ROWS]
    missing = [path for path in (options.file, options.against) if path and not os.path.isfile(path)]
    if unknown or missing:
        parser.error(f"there is no {' or '.join(unknown + missing)}")
    if options.rounds < 1 or options.scale <= 0:
        parser.error("--rounds must be 1 or more, --scale more than 0")
    return options


def out_of_time(number: int, frame: object) -> None:
    raise Broken(f"a measurement has taken longer than {DEADLINE} s")


def main() -> int:
    options = arguments()
    if options.list:
        print("\n".join(f"{name:9} {(row.__doc__ or '').partition(chr(10))[0]}" for name, row in ROWS.items()))
        return 0
    signal.signal(signal.SIGALRM, out_of_time)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # as an exception: what was begun is undone
    temp = tempfile.mkdtemp(prefix="queuectl-bench-")
    try:
        with redirect_stdout(sys.stderr) if options.json else nullcontext():
            everything = report(options, temp)
        if options.json:
            print(json.dumps(everything))
        return 0
    except Broken as error:
        tell(f"FAILED: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        shutil.rmtree(temp, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
