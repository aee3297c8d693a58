#!/usr/bin/env python3
"""queuectl: a background job queue in one file.

Shell commands go in, worker processes run them, failures are retried with
exponential backoff, and what keeps failing lands in the dead letter queue.
Nothing but Python 3.8 or newer is needed: copy this file and run it.

    queuectl.py run 'make docs' 'make test'   work on jobs now, and sum up
    queuectl.py enqueue 'gzip -9 big.log'     put a job into the queue
    queuectl.py worker start --count 4        work on it with four processes
    queuectl.py status                        see how it goes

A job is always in one of six states:

    pending ──> processing ──> completed              (exit code 0)
       ^            │
       │            ├────────> failed ──> processing  (after its backoff)
       │            │
       └────────────┴────────> dead                   (no try left: `dlq retry`)

and `cancelled`: a person took the job out, it expired, or a job that it was to
run after was cancelled.

How a job flows. `enqueue` inserts a row, commits, and rings the bell of every
worker. A worker locks two files for the run's output (these locks are the run's
token), claims the row in a transaction, starts the command with these files as
its output, and sleeps until the command ends. One commit then records the
outcome and claims the next job.

How no job is lost, and none runs twice at once. A worker holds a lock (its life
lock) that the kernel drops when the process dies, however it dies. The job's
processes inherit the token, and the kernel drops it when the last of them is
gone. A job is lost if the life lock of its worker is free. Then queuectl first
ends the processes of its run, and gives the job back when none is left. It
trusts no lease, no heartbeat, no clock and no process id for this.

Files beside the database `queue.db`: `queue.db-wal` and `queue.db-shm` (made by
SQLite), `queue.db.lock` (the write mutex), and the folder `queue.db.d` (life
locks, bells, the output of current runs, the locks of recovery and of sweeping).

Contents, in reading order; a section calls only those above it:

    Vocabulary   states, the fields of a job, exit codes, errors, settings and limits
    Values       durations, times, backoff, checks of job input, crontab's times: pure functions
    Platform     processes, signals, locks, bells and the disk; POSIX and Windows
    Files        files beside the database: paths, bells, life files, output of live runs
    Schema       the tables, their migrations, and statements that several functions use
    Database     the file: trust, opening, the mutex, commits, syncing, copies
    Store        reading queues, jobs and runs; one method for each change of state
    Runner       one run's processes: start, bound and end them; runs in an engine
    Worker       claim, run, record; when a run must end; recovery after dead workers
    Console      printing: to which stream, how wide, and with what escaped
    Pool         the supervisor: start, watch, replace and stop workers
    Views        rows to text or JSON: pure functions
    Commands     each command beside its options: reading, changing, working, setting up
    Page         the queue in a browser
    main         arguments in, exit code out
"""
from __future__ import annotations

import argparse
import errno
import json
import os
import re
import signal
import stat
import sys
import time
from collections import Counter, namedtuple
from functools import lru_cache, partial
from os.path import abspath, dirname, exists, expanduser, getsize, isabs, isdir, isfile, join, realpath
from time import monotonic, sleep

try:
    import sqlite3
except ImportError:
    sys.exit("queuectl: error: this Python (%s) was built without SQLite; use another one" % sys.executable)

if sys.version_info < (3, 8):  # noqa: UP036
    sys.exit("queuectl: error: this is Python %d.%d, and 3.8 or newer is needed" % sys.version_info[:2])

TYPE_CHECKING = False  # type checkers take it for True; importing typing is slow
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any, BinaryIO, Callable, Iterable, Iterator, NoReturn, Sequence

# ═══ Vocabulary ═══ states, the fields of a job, exit codes, errors, settings and limits ═════

VERSION = "1.0.0"

if TYPE_CHECKING:
    Row = dict[str, Any]  # a job, a run, a worker or a queue: its fields by name
    Draft = dict[str, Any]  # of a job: see draft_of
    Settings = dict[str, Any]
    Names = Sequence[str]  # of queues, states, files or columns
    Tell = Callable[[str], None]
    Lines = Iterator[tuple[int, str]]  # the number of each line, and its text
    Zone = Callable[[int], int]  # see next_cron
    # The jobs given to a command, each behind its line number.
    Given = Iterator[tuple[int, str | Row]]

PENDING, PROCESSING, COMPLETED, FAILED, DEAD, CANCELLED = STATES = (
    "pending", "processing", "completed", "failed", "dead", "cancelled")
UNFINISHED = PENDING, PROCESSING, FAILED
WAITING, ENDED = (PENDING, FAILED), (COMPLETED, DEAD, CANCELLED)
# A job ends in vain if it is dead or cancelled; so does every job that was to run after it.
IN_VAIN = DEAD, CANCELLED
# A run can also end in these ways: queuectl ended it to shut down, its worker was lost, or the job
# asked to be tried again later.
STOPPED, LOST, DEFERRED = "stopped", "lost", "deferred"
# The machine had no room for another process: there was no run, and none is recorded.
UNSTARTED = "unstarted"
TRY_LATER = 75  # the exit code with which a job asks for that: EX_TEMPFAIL of sysexits.h

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_BUG, EXIT_TIMED_OUT, EXIT_INTERRUPTED = 0, 1, 2, 3, 124, 130
# Exit codes of workers that the pool replaces. Dismissed: the worker stopped because of a signal
# sent to it alone. Troubled: the machine failed it (no memory, an error of the disk).
EXIT_DISMISSED, EXIT_TROUBLED = 10, 11

# The fields of a job as users see them, in this order. A field whose name ends in `_at` is a time:
# milliseconds since the epoch here, ISO 8601 in JSON. Who adds a field also adds it to GIVEN_FIELDS
# (and EDITABLE), LIMITS and _checked_field, MIGRATIONS, ADD_JOB and Intake._row, SELECT_JOBS and
# FIELD_OPTIONS, and if a run needs it, to Job, next_job and HELD_JOBS.
FIELDS = tuple("""
    id command shell state queue priority run_at timeout_seconds attempts max_retries backoff_base
    cwd env after after_any unique retry_after dead_on expires_at created_at updated_at started_at
    finished_at next_retry_at exit_code last_error locked_by locked_at
    """.split())  # noqa: SIM905
# Columns that `edit` sets to the given value as it is.
EDITABLE = """
    command shell queue priority run_at timeout_seconds max_retries backoff_base expires_at
    """.split()  # noqa: SIM905
# These say what exit codes mean for a job. One column holds them all, for few jobs have any.
POLICY_FIELDS = ("retry_after", "dead_on")
GIVEN_FIELDS = tuple("""
    id command shell queue priority run_at timeout_seconds max_retries backoff_base cwd env
    after after_any unique expires_at retry_after dead_on
    """.split())  # noqa: SIM905
ALIASES = {"cmd": "command", "timeout": "timeout_seconds", "delay": "run_at",
           "expires": "expires_at"}

RUN_QUEUE = "run-%s"  # the queues that `run` makes: run-1, run-2, …
MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000  # in milliseconds
# The queue of the jobs that `on_dead` and `on_end` make; every pool serves it.
HOOK_QUEUE = "on-dead"
HOOK_TIME, HOOK_PRIORITY = 60.0, 0  # their time-out in seconds; their priority, before other jobs

# The environment variables that queuectl sets for a job; `env` may not set them.
JOB_VARIABLES = ("QUEUECTL_JOB_ID", "QUEUECTL_ATTEMPT", "QUEUECTL_MAX_RETRIES",
                 "QUEUECTL_QUEUE", "QUEUECTL_DB", "QUEUECTL_RUN", "QUEUECTL_SLOT")

CENTURY = 100 * 365.25 * 86400.0  # seconds: a longer duration must be a mistake
NAME_LENGTH = 128

Limit = namedtuple("Limit", "shape low high default", defaults=(None, None, None))
# Bounds for settings and for fields of jobs, and the defaults of settings.
LIMITS = {
    "max_retries": Limit("whole number", 0, 10**6, 3),
    "backoff_base": Limit("number", 0.001, 10**6, 2.0),
    "backoff_max": Limit("duration", 0, CENTURY, 3600.0),
    "backoff_jitter": Limit("number", 0, 10, 0.0),
    "timeout_seconds": Limit("duration", 0.001, CENTURY),
    "priority": Limit("whole number", -10**9, 10**9, 10),
    "poll_interval_ms": Limit("whole number", 10, 3_600_000, 1000),
    "kill_grace_seconds": Limit("duration", 0, 86400, 5.0),
    # A worker needs several times as much memory.
    "max_output_bytes": Limit("whole number", 1024, 64 * 1024 * 1024, 1024 * 1024),
    "retry_after": Limit("duration", 0, CENTURY, 60.0),
    "max_deferrals": Limit("whole number", 0, 10**6, 100),
    "keep_completed": Limit("duration", 0, CENTURY, 30 * 86400.0),
    "keep_dead": Limit("duration", 0, CENTURY),
    "keep_history": Limit("duration", 0, CENTURY, 30 * 86400.0),
    "on_dead": Limit("shell command"),
    "on_end": Limit("shell command"),
}
# And `shell`, which Platform adds.
SETTINGS: Row = {name: limit.default for name, limit in LIMITS.items()}
# Bytes kept of each stream in a `run`, unless max_output_bytes is set.
RUN_OUTPUT = 64 * 1024 * 1024
LIMITS.update(
    delay=Limit("duration", 0, CENTURY),
    every=Limit("duration", 1, CENTURY),
    dead_on=Limit("whole number", 1, 2**32 - 1),  # exit codes; Windows has long ones
)


def test_point(place: str) -> None:
    """Do nothing. Tests replace it to kill the process here."""


def clean(text: str) -> str:
    """Return `text` with control characters, escape sequences and bidirectional marks escaped."""
    if text.isprintable():
        return text
    shown = list(text)
    for place, c in enumerate(text):
        if not c.isprintable():
            shown[place] = c.encode("unicode_escape", "surrogatepass").decode()
    return "".join(shown)


class QueueError(Exception):
    """The request could not be met. The text says what to do next, and is safe on a terminal."""
    code = EXIT_FAILED

    def __str__(self) -> str:
        return clean(super().__str__())


class UsageError(QueueError):
    """Wrong usage or bad input."""
    code = EXIT_USAGE


class TimedOut(QueueError):
    """A time limit of the command itself, such as `wait --timeout`, ran out."""
    code = EXIT_TIMED_OUT


class Unavailable(QueueError):
    """The database can't be written now, but perhaps later: it is locked, or the disk is full."""


# A claimed job, as its worker knows it. `seq` is its place in the order in which jobs came; it
# could have been claimed from the moment `since` on.
Job = namedtuple("Job", "seq id command queue attempts runs max_retries timeout_seconds "
                        "backoff_base context env policy deferrals chained shell runner ender "
                        "since place started_at word")
# How a run ended. `error` says why it failed; `finished_at` is in milliseconds since the epoch;
# `seconds` was measured by the monotonic clock; `final` is true if the exit code forbids a retry.
RunResult = namedtuple("RunResult", "job ending exit_code error finished_at seconds stdout stderr "
                                    "worker final", defaults=[False])
# The jobs that a command selects: those that meet every condition that is given. `states` and
# `queues` are names (none: all); `grep` must stand in the command or id, `error` in the last error;
# `since` and `before` (milliseconds) bound when a job ended or, if it has not, was last changed; jobs
# that came before the seq `first` are left out.
Selection = namedtuple("Selection", "states queues grep error since before first",
                       defaults=((), (), None, None, None, None, None))

# ═══ Values ═══ durations, times, backoff, checks of job input, crontab's times: pure functions ═

UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
# Each pattern is compiled when it is first needed: at every start it would cost a millisecond.
_NUMBER = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"
_WHOLE = r"[+-]?[0-9]{1,20}"
_PART = r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|d)"
_TIME = (r"(\d{4})-(\d\d)-(\d\d)(?:[T ](\d\d):(\d\d)(?::(\d\d)(?:[.,](\d{1,9}))?)?)?"
         r"\s*(?:Z|z|([+-])(\d\d):?(\d\d))?")


def to_number(value: Any) -> float:
    """Return the number in `value` (int, float or text), or raise ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(value)
    if isinstance(value, str) and not re.fullmatch(_NUMBER, value):
        raise ValueError(value)
    return float(value)


def to_whole(value: Any) -> int:
    """Return the whole number in `value` (int, float or text), or raise ValueError."""
    if isinstance(value, str):
        if not re.fullmatch(_WHOLE, value):
            raise ValueError(value)
    elif to_number(value) % 1:
        raise ValueError(value)
    return int(value)


def to_duration(value: Any) -> float:
    """Return the seconds in a number (`90`, `1.5`) or in text with units (`500ms`, `1h30m`).

    Raises ValueError.
    """
    if not isinstance(value, str) or re.fullmatch(_NUMBER, value):
        return to_number(value)
    parts = re.findall(_PART, value)
    if not parts or "".join(number + unit for number, unit in parts) != value:
        raise ValueError(value)
    return sum(float(number) * UNITS[unit] for number, unit in parts)


SHAPES: dict[str, Callable[[Any], Any]] = {
    "whole number": to_whole, "number": to_number, "duration": to_duration}


def show_number(value: float) -> str:
    """Write a number as short as possible: 3 for 3.0."""
    return str(int(value)) if value == int(value) else repr(value)


def count_of(number: int, noun: str) -> str:
    """Count things in words: `1 job`, `2 jobs`."""
    return "%d %s%s" % (number, noun, "" if number == 1 else "s")


# Words of other programs (pueue, task-spooler, parallel, systemctl, docker, kubectl), and ours.
OURS = """
add             enqueue
clean           purge
follow          logs --follow
jobs            list
kill            cancel
log             logs
ls              list
ps              list
restart         retry
rm              delete
start           worker start
stop            worker stop
tail            logs --follow
top             status --watch
schedules       schedule list
cron            schedule list
schedule ls     schedule list
schedule add    schedule set
schedule rm     schedule delete
schedule remove schedule delete
job_timeout     timeout_seconds
--command       COMMAND
--concurrency   -j
--daemon        --detach
--force         --now
--group         --queue
--halt          --fail-fast
--jobs          -j
--label         --id
--lines         --tail
--parallel      -j
--retries       --max-retries
"""


def nearest(word: str, known: Iterable[str], before: str = "") -> str:
    """`; did you mean X?`, or nothing where no known word is near.

    `before` is put before X.
    """
    import difflib
    ours = re.search("^%s +(.*)" % re.escape(word), OURS, re.MULTILINE)
    near = difflib.get_close_matches(word, known, 1)
    if ours:
        near = [ours[1]] if ours[1].split(" --")[0] in known else []
    return "; did you mean %s?" % (before + near[0]) if near else ""


def shorten(text: str, width: int) -> str:
    """Cut `text` to at most `width` characters."""
    return text if len(text) <= width else text[:width - 3] + "..."


def quoted(value: Any, width: int = 60) -> str:
    """Write a value as JSON, safe for any terminal: error messages show it so."""
    try:
        return shorten(json.dumps(value), width)
    except (TypeError, ValueError, RecursionError):
        return type(value).__name__


def checked(name: str, value: Any, called: str = "") -> Any:
    """Return `value` as the number or duration (in seconds) that LIMITS demands for `name`.

    Raises UsageError, with the bounds, for anything else: nan, infinity, true, 2**63, "abc".
    The message calls the value `called` (default: `name`).
    """
    shape, low, high, _ = LIMITS[name]
    try:
        number = SHAPES[shape](value)
        if low <= number <= high:
            return number
    except (ValueError, OverflowError):
        pass
    bounds = "from %s to %s" % (show_number(low), show_number(high))
    if high == CENTURY:
        bounds = "from %s s to 100 years, such as 90, 1.5, 500ms, 30s, 5m, 1h30m" % show_number(low)
    raise UsageError("%s must be a %s %s, not %s" % (called or name, shape, bounds, quoted(value)))


def setting_name(text: str) -> str:
    """Return the name of the setting `text` (with `-` or `_`), or raise UsageError."""
    name = text.replace("-", "_")
    if name not in SETTINGS:
        raise UsageError("there is no setting %s%s; `queuectl config show` lists them"
                         % (quoted(text), nearest(name, SETTINGS)))
    return name


def show_setting(value: Any) -> str:
    """Write the value of a setting in the form that `config set` takes."""
    if value is None:
        return "none"
    if isinstance(value, float):
        return show_number(value)
    return str(value)


def to_millis(seconds: float) -> int:
    return int(seconds * 1000)


def _time_from(text: str) -> int:
    from datetime import datetime, timedelta
    match = re.fullmatch(_TIME, text.strip(), re.ASCII)
    if match is None:
        raise ValueError(text)
    *numbers, fraction, sign, hours, minutes = match.groups()
    moment = datetime(*[int(number or 0) for number in numbers])  # type: ignore[arg-type]
    offset = timedelta(hours=int(hours or 0), minutes=int(minutes or 0))
    if sign == "+":
        offset = -offset
    millis = (moment + offset - datetime(1970, 1, 1)) // timedelta(milliseconds=1)
    nanos = int((fraction or "").ljust(9, "0"))
    return millis - -nanos // 1_000_000  # rounded up


class Delayed(int):
    """A time that the user gave as a delay from now."""


NEVER = 1 << 62
LAST_TIME = 253_402_300_799_999  # 9999-12-31T23:59:59.999Z


def parse_time(text: Any, now: int, name: str = "run_at") -> int:
    """Return the milliseconds since the epoch of a time in ISO 8601 or of `now+5m`.

    ISO 8601 without an offset is UTC. `now` is in milliseconds. A fraction of a millisecond is
    rounded up: a job never starts before its time. Raises UsageError for anything else.
    """
    if text == "now":
        return now
    if isinstance(text, str) and text.startswith(("now+", "+")):
        return Delayed(now + to_millis(checked("delay", text.partition("+")[2])))
    try:
        moment = _time_from(str(text))
        if moment <= LAST_TIME:
            return moment
    except (ValueError, OverflowError):
        pass
    raise UsageError("%s must be a time such as 2026-01-31T10:00:00Z (UTC) or +5m, not %s"
                     % (name, quoted(text)))


@lru_cache(16)
def _show_second(second: int) -> str:
    try:
        return "%04d-%02d-%02dT%02d:%02d:%02d" % time.gmtime(second)[:6]
    except OSError:  # Windows knows no time before 1970 and after 3000
        from datetime import datetime, timedelta
        return (datetime(1970, 1, 1) + timedelta(seconds=second)).isoformat()


def show_time(millis: int) -> str:
    """Write milliseconds since the epoch as UTC: `2026-01-31T10:00:00.000Z`."""
    return "%s.%03dZ" % (_show_second(millis // 1000), millis % 1000)


def show_duration(seconds: float) -> str:
    """Write seconds as 7ms, 0.56s, 12.3s, 5m 3s, 2h 7m or 3d 4h."""
    if seconds < 0.1:
        return "%dms" % round(seconds * 1000)
    if seconds < 10:
        return "%.2fs" % seconds
    if seconds < 60:
        return "%.1fs" % seconds
    big, small = "d", "h"
    if seconds < 3600:
        big, small = "m", "s"
    elif seconds < 86400:
        big, small = "h", "m"
    count, rest = divmod(seconds, UNITS[big])
    return "%d%s %d%s" % (count, big, rest // UNITS[small], small)


def backoff(base: float, attempts: int, longest: float, jitter: float,
            chance: float) -> float:
    """Return the seconds until the next try: `base ** attempts`, at most `longest`, plus jitter.

    The jitter is `jitter` times `chance` (a random number from 0 to 1) of the delay.
    """
    try:
        delay = min(base ** attempts, longest)
    except OverflowError:
        delay = longest
    return delay * (1 + jitter * chance)


def next_state(ending: str, attempts: int, max_retries: int,
               final: bool = False) -> tuple[str, int]:
    """Return a job's next state and its attempts, after the run number `attempts` ended.

    A run uses no attempt if queuectl ended it to shut down, if it asked to be tried again later, or
    if there was no room to start it. A `final` failure is not tried again.
    """
    if ending == COMPLETED:
        return COMPLETED, attempts
    if ending in (STOPPED, DEFERRED, UNSTARTED):
        attempts = max(0, attempts - 1)
        return FAILED if ending == DEFERRED else PENDING, attempts
    if ending == CANCELLED:
        return CANCELLED, attempts
    if final or attempts >= max_retries:
        return DEAD, attempts
    return FAILED, attempts


# Errors of one cause differ in these parts: quoted text, paths and names of files, hexadecimal and
# other numbers.
VARYING = (
    r"""'[^']*'|"[^"]*"|`[^`]*`"""
    r"|(?:[A-Za-z]:)?(?:[\w.+~@%-]*[/\\])+[\w.+~@%-]*"
    r"|\b[\w+-]+\.[A-Za-z]\w{0,7}\b(?!\()"
    r"|\b0x[0-9a-fA-F]+\b|\b(?=[0-9a-f]*\d)[0-9a-f]{7,}\b"
    r"|\d+(?:[.,:]\d+)*")


def cause_of(error: str) -> str:
    """Return what errors of one cause have in common: `…` for what varies, but not exit codes."""
    ending = re.match(r"(exit code|signal|killed by signal) \d+", error)
    head = ending.group() if ending else ""
    return head + re.sub(VARYING, "…", error[len(head):])


def is_run_queue(name: str) -> bool:
    """Tell whether a queue has a name like `run-7`, which only `run` gives."""
    return re.fullmatch(RUN_QUEUE % "[0-9]+", name) is not None


def output_limit(settings: Settings, queue: str, in_run: bool = False) -> int:
    """Return how many bytes of each stream are kept of a run; in a `run` more than elsewhere."""
    name = "max_output_bytes"
    if in_run or is_run_queue(queue):
        name = "run_output_bytes"
    return int(settings[name])


def policy_of(job: Any) -> Row:
    """Return those of the POLICY_FIELDS that a claimed job has."""
    return json.loads(job.policy or "{}")  # type: ignore[no-any-return]


def last_line(output: bytes, width: int = 300) -> str:
    """Return the last line that is not blank, shortened: in stderr it usually says why."""
    lines = output[-4096:].decode("utf-8", "replace").strip().split("\n")
    return shorten(lines[-1].strip(), width)


# A word of plain characters, or a word in quotes as queuectl writes them.
_PLAIN_WORD = r"""(?a:[\w@%+=:,./-]|'[^'\0-\x1f\x7f]*'|"'")+"""
_PLAIN_COMMAND = r"%s(?:[ \t]%s)*" % (_PLAIN_WORD, _PLAIN_WORD)
# Words that some shell does not take for the name of a program: the reserved words and builtins of
# dash, bash, busybox, zsh, and of the sh of the BSDs, illumos (ksh93) and AIX (ksh88).
_SHELL_WORDS = frozenset("""
    . : [ alias always autoload bg bind bindkey break builtin bye caller case cd chdir coproc
    command compadd comparguments compcall compctl compdescribe compfiles compgen compgroups
    complete compopt compound compquote compset comptags comptry compvalues continue declare dirs
    disable disown do done echo echotc echoti elif else emulate enable end enum esac eval exec
    exit export false fc fg fi float for foreach freebsd_wordexp function functions getln getopts
    global hash help hist history if in inlib integer jobid jobs kill let limit local log logout
    login mapfile nameref namespace newgrp nocorrect noglob popd print printf private pushd pushln
    pwd r read readarray readonly redirect rehash repeat return sched select set setopt setvar
    shift shopt sleep source stop suspend test then time times trap true ttyctl type typeset
    ulimit umask unalias unfunction unhash unlimit unset unsetopt until vared wait whence where
    which while wordexp zcompile zformat zle zmodload zparseopts zregexparse zstyle""".split())  # noqa: SIM905
# Variables that shells set, remove or obey, and names that no shell variable can have. First those
# of every shell, then those of shells other than dash and busybox. Found by trying every name that
# stands in the shells' programs.
_OWN_VARIABLES = rb"(?!(?:IFS|OPTIND|PPID%s)\Z)[A-Za-z_]\w*"
_OTHER_VARIABLES = (
    rb"|BASH\w*|COMP_WORDBREAKS|ENV|EPOCH\w+|EXECIGNORE|FPATH|HISTCMD|KSH\w*|LINENO|OPT\w+|PATHSEP"
    rb"|PGRP|PIPESTATUS|POSIXLY_CORRECT|PS[124]|S?RANDOM|SECONDS|SHELLOPTS|USER_ID")


@lru_cache(16)
def _leaves_alone(shell: str, names: tuple[bytes, ...]) -> bool:
    """Tell whether a shell would pass these variables on unchanged, and obey none of them."""
    others = b"" if shell.endswith(("/dash", "/busybox")) else _OTHER_VARIABLES
    return all(re.fullmatch(_OWN_VARIABLES % others, name) for name in names)


def words_without_shell(command: str, shell: str, names: tuple[bytes, ...]) -> list[str]:
    """Return the words of a command that needs no shell, or [] if it needs one.

    `shell` is the shell's real path, `names` are the names of the variables. A command needs the
    shell if any part of it could mean more to a shell than a program and its arguments. So does
    setsid(1): started by a shell it waits for its program, started directly it forks and returns.
    """
    if (not re.fullmatch(_PLAIN_COMMAND, command) or "setsid" in command
            or not _leaves_alone(shell, names)):
        return []
    words = command.split()
    if "'" in command:
        words = [re.sub("'([^']*)'|\"(')\"", r"\1\2", word)
                 for word in re.findall(_PLAIN_WORD, command)]
    name = words[0]
    if name[:1] in "-%" or "=" in name or name in _SHELL_WORDS:
        return []
    return words


# The kinds of text that a shell may read next, outside of quotes and within them. Each kind has a
# code in _SHELL_CODES, or is refused with the text in _SHELL_REFUSED.
_SHELL_ANYWHERE = r"""(?asx)
    (?P<null>    \0 )
  | (?P<ticks>   ` )
  | (?P<last>    \\ \n \n? \Z )
  | (?P<join>    (?<=[ \t]) \\ \n )
  | (?P<torn>    \\ \n )                    # in `$x\` shells differ about where the name ends
  | (?P<sum>     \$\(\( | \$\[ )
  | (?P<value>   \$ (?: [A-Za-z_]\w* | [0-9] (?![0-9]) | [@*#?!-]
      | \$ (?! ['"({[] | [^ -~\t\n] )       # bash up to 5.2 takes the end of $$( for a $(
      | \{ (?: \#?\w+ | [@*#?$!-] | \w+ (?: :?[-=+?] | %%? | \#\#? ) [\w *?.,:/=+@-]* ) \} ) )
  | (?P<dollar>  \$ (?: [${0-9\\] | [^ -~\t\n] ) )    # it overlooks a control character, too
"""
_SHELL_UNQUOTED = _SHELL_ANYWHERE + r"""
  | (?P<ansi>    \$ ['"] )
  | (?P<here>    << )
  | (?P<process> [<>] \( )
  | (?P<twice>   \( \( )
  | (?P<both>    &> )
  | (?P<copy>    [<>]& (?! (?: [0-9]+ | - ) [ \t\n|&;<>)] ) )    # `>&{}`: bash expands it twice
  | (?P<glued>   (?: \\. | (?<= [^ \t\n|&;<>(]) ) \( )           # name=(…) and @(…) of bash
  | (?P<hash>    (?: \\. | \) | [^\0-\x7f] ) \# )    # \ and $(…) before it; yash has wide blanks
  | (?<! [^ \t\n|&;<>()] ) (?:              # where a word begins
        (?P<comment> \# [^\n]* )
      | (?P<index>   \{* [\w\x80-\U0010ffff]+ \[ )    # `a[{}]=1`: bash runs a $(…) in the input
      | (?P<case>    case (?= [ \t\n|&;<>()] ) )
      | (?P<word>    (?: \[\[ | function | alias | eval | trap ) (?= [ \t\n|&;<>()] ) ) )
  | (?P<open>    \$? \( )
  | (?P<close>   \) )
  | (?P<escape>  \\. )
  | (?P<quote>   ['"] )
  | (?P<operator> [|&;<>\n] )
  | (?P<blank>   [ \t] )
  | (?P<number>  \# )
  | (?P<plain>   . )
"""
_SHELL_QUOTED = {
    "'": r"(?s)(?P<quote>')|(?P<null>\0)|(?P<single>.)",
    '"': _SHELL_ANYWHERE + r"""
  | (?P<quote> ") | (?P<open> \$\( ) | (?P<escape> \\[$`"\\] ) | (?P<double> . )
""",
}
_SHELL_CODES = {
    "blank": " ", "plain": "w", "case": "w", "number": "w", "quote": "q", "join": "q",
    "escape": "qe", "single": "1", "double": "2", "value": "$", "operator": "o", "open": "o",
    "close": "o", "comment": "#"}
_SHELL_REFUSED = {
    "null": "a command can't hold a NUL character; leave it out",
    "ticks": "write $(command) instead of `command` in backquotes",
    "last": "a command can't end in a backslash; write \\\\ for one, or leave it out",
    "torn": "write a blank before a backslash at the end of a line, or join the lines",
    "sum": "write $(expr 1 + 2) instead of $((1 + 2)) or $[1 + 2]",
    "dollar": "write \\$ for a dollar sign; of ${…} only plain ones can be read, as ${x%.gz}",
    "ansi": "write '…' or \"…\" without a $ before the quote",
    "here": "write `<file` or a pipe instead of << and a text",
    "process": "write a pipe or a file instead of <(…) or >(…)",
    "twice": "write a blank between ( and (",
    "both": "write `>file 2>&1` instead of `&>file`",
    "copy": "write a number or - right behind >& or <&, and `>file 2>&1` for a file",
    "glued": "write a blank before ( or quote it",
    "hash": "write a blank before # for a comment, else quote it",
    "index": "write ./name[…] or quote the [, as name[…] is an array to some shells",
    "word": "write [ … ] for [[ … ]], name () { …; } for a function or alias; no eval, no trap",
    "inner": "within $(…) write if…fi for case…esac, quote each # and leave out comments",
    "close": "a ) closes nothing; quote it, or write (pattern) in case…esac",
}


def shell_contexts(text: str) -> str:
    """Return one code for each character of `text`: how a shell reads it.

    ' ' blank between words, 'w' plain character of a word, 'q' quoting that the shell takes away,
    '1' literal within '…', '2' within "…", 'e' after a backslash, '$' parameter, 'o' operator,
    newline, $( or ), '#' comment.
    Raises UsageError for text that shells read in different ways, or that this does not know.
    Source: POSIX, Shell Command Language, 2.2 Quoting, 2.3 Token Recognition, 2.6 Expansions.
    """
    codes, text = "", text + "\n"
    opened: list[str] = []  # the quotes, ( and $( that are open
    while len(codes) < len(text):
        innermost = opened[-1] if opened else ""
        pattern = _SHELL_QUOTED.get(innermost, _SHELL_UNQUOTED)
        match = next(re.compile(pattern).finditer(text, len(codes)))
        kind, piece = match.lastgroup or "", match.group()
        if kind in ("case", "comment", "number") and "$(" in opened:
            kind = "inner"  # old versions of bash look for their end in the wrong place
        if kind in _SHELL_REFUSED and (kind != "close" or not opened):
            raise UsageError(_SHELL_REFUSED[kind])
        if kind == "close" or (kind == "quote" and innermost == piece):
            opened.pop()
        elif kind in ("open", "quote"):
            opened.append(piece)
        codes += (_SHELL_CODES[kind] * len(piece))[:len(piece)]
    if opened:
        raise UsageError("%s is not closed; write its other one, or \\ before it" % opened[-1])
    return codes[:-1]


# Marks that may open, close or cut off a part of a line, within "…" and elsewhere. A part that is
# complete in itself is matched whole, without a `mark`.
_SHELL_MARKS = {
    True: r"""(?sx)
    \\.
  | \$\{ (?: [^}{"'\\] | \\. | "[^"]*" | '[^']*' )* \}
  | \( \( (?: [^()] | \([^()]*\) )* \) \)       # a sum, which may have << in it
  | (?P<mark> \\ | ["`] | \$\( )
""",
    False: r"""(?sx)
    \\.
  | \$\{ (?: [^}{"'\\] | \\. | "[^"]*" | '[^']*' )* \}
  | \( \( (?: [^()] | \([^()]*\) )* \) \)
  | \$' (?: \\. | [^'\\] )* ' | '[^']*'
  | <<<
  | (?<! [^\s;&|()<>] ) \# .*
  | (?P<mark> \\ | ['"`(] | <<
      | (?: \|&? | && | [;&|] \s* (?: do | then | else ) | [);&|] \s* \{ ) (?= \s* \Z | \s+ \# | (?<! \w ) \# )
      | \) )
""",
}
# The usual line: every quote and bracket is closed; it is no comment, no JSON and not empty.
_FINISHED = r"""(?x)
    (?! [\#{[\ufeff] | \Z ) [^'"\\`()<|&;\#]*
    (?: (?: '[^']*' | \\. | < (?! [<(] ) | (?<= [^\s;&|()<>] ) \#
          | " [^"\\`$]* (?: (?: \$ (?: [^"\\`$({] | \{\w+\} | \( [^'"\\`()<\#]* \) ) | \\. )
              [^"\\`$]* )* "
          | \( (?: [^'"\\`()<\#] | '[^']*' | "[^"\\`$]*" )* \) (?! \s* \{ ) | ` [^'"\\`<\#]* `
          | [|&;] (?! \s* (?: \Z | do\b | then\b | else\b | [{\#] ) ) )
        [^'"\\`()<|&;\#]* )*
"""


def unfinished(text: str) -> str:
    """Return what makes a shell read on after a line: an open quote or (, <<, a backslash, `do`.

    Returns "" if the line is complete, or if this function can't judge it.
    """
    opened, at = "", 0  # the characters that close what is open
    while True:
        innermost = opened[-1:]
        match = re.compile(_SHELL_MARKS[innermost == '"']).search(text, at)
        if match is None:
            return innermost
        at, mark = match.end(), match["mark"] or ""
        if mark == innermost:
            opened = opened[:-1]
        elif mark[-1:] in "\"`(":
            opened += mark[-1:].replace("(", ")")
        elif mark != ")":
            return mark


def in_quotes(word: str) -> str:
    """Write a word for a shell, always in quotes."""
    return "'%s'" % word.replace("'", "'\"'\"'")


# The placeholders of --each, as in GNU parallel: {} the input, {.} without its extension, {/} its
# last part, {//} its folder, {/.} its last part without extension, {#} the number of the job; with
# --colsep also {1} {2.} …: columns. Other placeholders of parallel are refused.
_PLACE = r"\{(%s)(\.|//|/\.|/|#|)\}"
PLACE, COLUMN_PLACE = re.compile(_PLACE % ""), re.compile(_PLACE % r"(?:[1-9]\d*)?")
_FOREIGN_PLACE = re.compile(r"\{(?:%|=.*?=|\+[./]*|/?\.{2,3}|[-0-9]\d*[./]*)\}")


def with_place(template: str, place: re.Pattern[str] = PLACE) -> str:
    """Add a {} for the input at the end of a template that has no placeholder."""
    return template if place.search(template) else template + " {}"


def _refuse_foreign(found: str) -> NoReturn:
    """Raise UsageError for a placeholder that parallel knows and queuectl does not."""
    if found == "{%}":
        raise UsageError("write $QUEUECTL_SLOT instead of {%}")
    advice = "write {} {.} {/} {//} {/.} or {#}"
    if found[1].isdigit():
        advice = "only with --colsep are there columns"
    raise UsageError("--each does not know %s: %s" % (found, advice))


def check_template(template: str, place: re.Pattern[str] = PLACE) -> str:
    """Return the `template`, a command for --each, if every input of `fill` stays part of a word.

    Raises UsageError if a {} is in quotes, in a comment or behind \\ or $, if there is no command
    before a {} that is added at the end, if only parallel knows a placeholder, and as
    shell_contexts does.
    """
    shell_contexts(template)  # without the {} too, which must not hide how the text ends
    text, before = with_place(template, place), template.rstrip(" \t")
    codes = shell_contexts(text)
    ending = codes[:len(before)][-1:] + before[-1:]
    if text != template and ending in ("", "o|", "o&", "o;", "o(", "o\n"):
        raise UsageError("--each needs a command before the input; or write {} where it belongs")
    for match in place.finditer(text):
        if set(codes[match.start():match.end()]) != {"w"} or text[:match.start()].endswith("$"):
            raise UsageError("write %s outside of quotes and comments and not behind \\ or $: "
                             "it is quoted by itself" % match.group())
    for match in _FOREIGN_PLACE.finditer(text):
        repeats = match.group()[1].isdigit() and codes[match.start()] != "w"  # 'a{2}' of grep
        if not repeats and not place.fullmatch(match.group()):
            _refuse_foreign(match.group())
    return template


def _part_of(word: str, form: str) -> str:
    """Return the part of an input that a placeholder names; `.` takes off the extension."""
    if form == "//":
        return dirname(word.rstrip("/")) or "."
    if form.startswith("/"):
        word = os.path.basename(word)
    return re.sub(r"\.[^/.]*\Z", "", word) if form.endswith(".") else word


def fill(template: str, columns: Sequence[str], number: int,
         quote: Callable[[str], str], place: re.Pattern[str] = PLACE) -> str:
    """Return the command for the `number`-th input: a checked `template` with the input in quotes.

    Always in quotes, because a bare `2`, `if` or `a=b` is more than a word to a shell. Without
    --colsep the input is the only column. A missing column is empty.
    """
    def put_in(match: re.Match[str]) -> str:
        column, form = match.groups()
        if form == "#":
            return quote(str(number))
        words = columns
        if column:
            words = columns[int(column) - 1:int(column)] or [""]
        return " ".join(quote(_part_of(word, form)) for word in words)

    return place.sub(put_in, with_place(template, place))


# A user gives a job as a shell command or a JSON object. The functions below turn it into a draft:
# the GIVEN_FIELDS, each checked, and None for those not given.

def check_name(kind: str, name: Any) -> str:
    """Return an id or queue name that can be shown anywhere and typed, or raise UsageError."""
    if not isinstance(name, str):
        raise UsageError("%s must be text, not %s" % (kind, quoted(name)))
    typed = name.isprintable() and set(name).isdisjoint(" ,/\\")
    if (not typed or not 1 <= len(name) <= NAME_LENGTH
            or name[0] == "-" or name in (".", "..")):
        raise UsageError(
            "%s must be 1 to %d printable characters, without space, comma or slash, "
            "not starting with -; not %s" % (kind, NAME_LENGTH, quoted(name)))
    return name


def check_text(what: str, text: Any) -> str:
    """Return text that a command line can carry (no NUL, encodable), or raise UsageError."""
    if not isinstance(text, str):
        raise UsageError("%s must be text, not %s" % (what, quoted(text)))
    if "\0" in text:
        raise UsageError("%s must not contain a NUL character" % what)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError("%s is not valid UTF-8: %s" % (what, quoted(text))) from None
    return text


def check_engine(runner: str, ender: str | None) -> tuple[str | None, str | None]:
    """Return the checked runner and ender of a queue, each None for `none`."""
    if runner == "none" and ender in (None, "none"):
        return None, None
    if not runner:
        raise UsageError("give the --runner, too: it hands jobs to the engine of that ender")
    if runner.count("{}") != 1:
        raise UsageError("--runner must have {} once: it becomes the job, as one quoted word")
    check_template(runner)
    if not ender:
        raise UsageError("a runner needs an --ender, which ends a job there and prints nothing "
                         "when it is gone; or `--ender none` if jobs die with their client")
    return check_text("--runner", runner), None if ender == "none" else check_text("--ender", ender)


def check_command(command: Any, longest: int) -> str:
    """Return a command that the system can run, at most `longest` bytes, or raise UsageError."""
    check_text("command", command)
    if not command.strip():
        raise UsageError("command must not be empty")
    size = len(command.encode())
    if size > longest:
        raise UsageError("command is too long: %d bytes, this system takes %d; put it into a script"
                         % (size, longest))
    return str(command)


def check_env(env: Any, hook: bool = False) -> dict[str, str]:
    """Return extra environment variables, an object of strings, or raise UsageError.

    Variables that queuectl sets are refused; a `hook` (on_dead, on_end) is given some of them.
    """
    if not isinstance(env, dict):
        raise UsageError("env must be an object of strings, not %s" % quoted(env))
    for name, value in env.items():
        check_text("env name", name)
        check_text("env %s" % quoted(name), value)
        if name in JOB_VARIABLES and not hook:
            raise UsageError("env can't set %s: queuectl sets it" % quoted(name))
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
            raise UsageError("env can't set %s" % quoted(name))
    return env


def check_setting(name: str, value: str) -> Any:
    """Return the value of setting `name` from the text `value`, or raise UsageError."""
    if value == "none" and (SETTINGS[name] is None or name == "keep_completed"):
        return None
    if name in ("on_dead", "on_end"):
        if not check_text(name, value).strip():
            raise UsageError("%s must be a shell command, or none" % name)
        return value
    return checked(name, value)


def check_key(key: Any) -> str:
    """Return a key for `unique`, or raise UsageError."""
    most = 8 * NAME_LENGTH
    if not check_text("unique", key).isprintable() or not 1 <= len(key) <= most:
        raise UsageError("unique must be 1 to %d printable characters, not %s"
                         % (most, quoted(key)))
    return str(key)


def check_list(name: str, value: Any, check: Callable[..., Any]) -> list[Any]:
    """Return a list, given as such or as text with commas, each entry checked; or UsageError."""
    if isinstance(value, str):
        value = value.split(",")
    elif not isinstance(value, list):
        value = [value]
    return [check(name, entry) for entry in value]


def _checked_field(key: str, name: str, value: Any, now: int, hook: bool) -> Any:
    """Return the checked value of a job's field `name`, which the user called `key`."""
    if key == "delay":
        return Delayed(now + to_millis(checked("delay", value)))
    if name in ("run_at", "expires_at"):
        return parse_time(value, now, key)
    if name in ("after", "after_any"):
        return check_list(name, value, check_name)
    if name == "dead_on":
        return check_list(name, value, checked)
    if name in LIMITS:
        return checked(name, value, key)
    if name == "unique":
        return check_key(value)
    if name in ("id", "queue"):
        if key == "id" and type(value) is int:
            value = str(value)
        return check_name(name, value)
    if name == "env":
        return check_env(value, hook)
    return check_text(name, value)


def draft_of(fields: Row, now: int, longest: int) -> Row:
    """Return the draft of a job from fields as users name them.

    `now` is in milliseconds, `longest` the longest command in bytes. Fields that only queuectl sets
    are ignored, so that the output of `list --json` can be enqueued again; null means not given.
    Raises UsageError for a field that is unknown, given twice or out of bounds.
    """
    draft: Row = dict.fromkeys(GIVEN_FIELDS)
    hook = fields.get("queue") == HOOK_QUEUE
    for key, value in fields.items():
        name = ALIASES.get(key, key)
        if name not in FIELDS:
            raise UsageError("a job has no field %s%s"
                             % (quoted(key), nearest(key, GIVEN_FIELDS + tuple(ALIASES))))
        if name not in draft or value is None:
            continue
        if draft[name] is not None:
            raise UsageError("%s is given twice (%s is the same field)" % (name, key))
        draft[name] = _checked_field(key, name, value, now, hook)
    if hook and "state" not in fields:
        raise UsageError("the queue %s is reserved for on_dead and on_end; name another"
                         % HOOK_QUEUE)
    if draft["queue"] and is_run_queue(draft["queue"]):
        if "state" not in fields:
            raise UsageError("the queue %s belongs to a run; name another" % draft["queue"])
        draft["queue"] = None
    # On its old machine it may have waited for jobs that did not come along.
    draft["moved"] = "state" in fields
    if fields.get("state") in ENDED:  # an ended job needs neither its key nor its time limit
        draft["unique"] = draft["expires_at"] = None
    draft["command"] = check_command(draft["command"] or "", longest)
    return draft


def _bounded_int(digits: str) -> int:
    if len(digits) > 20:  # int() would take quadratic time, and no field takes so long a number
        raise UsageError("the number %s is too large" % shorten(digits, 30))
    return int(digits)


def _refuse(constant: str) -> Any:
    raise UsageError("%s is no number that a job can use" % constant)


def _unique(pairs: list[tuple[str, Any]]) -> Row:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = sorted(name for name, _ in pairs)
        double = next(name for name, following in zip(names, names[1:]) if name == following)
        raise UsageError("the field %s stands in the JSON twice" % quoted(double))
    return fields


_STRICT = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_refuse, parse_int=_bounded_int)
_BARE = r"(?:^|,)\s*(%s)\s*:" % "|".join(FIELDS + tuple(ALIASES))


def _bare_object(text: str) -> Row | None:
    """Read JSON whose quotes a shell took, `{id:job1,command:echo hi}`; None if that is a guess."""
    body = text.strip()[1:-1]
    if not text.strip().endswith("}") or not re.match(_BARE, body):
        return None
    words = re.split(_BARE, body)[1:]
    values = [value.strip() for value in words[1::2]]
    fields = dict(zip(words[::2], values))
    guessed = any(value[:1] in "\"'{[" for value in values)
    if guessed or 2 * len(fields) < len(words):
        return None
    return {name: None if value == "null" else value for name, value in fields.items()}


CALLED = ["queuectl"]  # how the user called this program, for advice that can be pasted


def as_called(text: str) -> str:
    """Make the commands in `text` work when pasted: with the program's path and --db."""
    return text.replace("`queuectl ", "`%s " % CALLED[0])


def shell_word(text: str) -> str:
    """Write text as one word for a shell; bytes that are no UTF-8 become octal numbers."""
    import shlex
    word = re.sub("[\udc80-\udcff]",
                  lambda byte: "'\"$(printf '\\%o')\"'" % (ord(byte[0]) - 0xdc00), shlex.quote(text))
    return word.replace("')\"''\"$(printf '", "")  # one printf for neighbouring bytes


def read_object(text: str) -> Row:
    """Read the JSON object in `text`, also if a shell took its quotes or doubled its backslashes.

    Raises UsageError, which shows the text that arrived and a form that works.
    """
    try:
        return _STRICT.decode(text)  # type: ignore[no-any-return]
    except ValueError as error:
        problem = error
    except RecursionError:
        raise UsageError("the JSON is nested too deep for a job") from None
    if re.match(r'\{\s*\\"', text):  # `{\"id\":…`: the shell has left the backslashes in
        try:
            return _STRICT.decode(re.sub(r'\\(["\\])', r"\1", text))  # type: ignore[no-any-return]
        except (ValueError, RecursionError):
            pass
    bare = _bare_object(text)
    if bare is None:
        shown = shorten(json.dumps(text)[1:-1], 200)
        raise UsageError(
            "this JSON can't be read (%s): %s; write it as '{\"command\":\"echo hello\"}' in "
            "single quotes (in cmd.exe \"{\\\"command\\\":\\\"echo hello\\\"}\"); put -- before a "
            "shell command that begins with {; in a file write `{ `" % (problem, shown))
    return bare

# When a schedule runs. A text as in crontab(5) has five fields. Moments are seconds since the
# epoch. What a wall clock shows is also counted in seconds, since it showed 1970-01-01 00:00. A zone is a
# function: for a moment it returns how many seconds the wall clock is ahead of UTC.

SECONDS_OF_DAY = 86400
CRON_FIELDS: Any = (
    ("minute", 0, 59), ("hour", 0, 23), ("day of month", 1, 31),
    ("month", 1, 12, "jan feb mar apr may jun jul aug sep oct nov dec"),
    ("day of week", 0, 7, "sun mon tue wed thu fri sat"))
CRON_WORDS = {
    "@hourly": "0 * * * *", "@daily": "0 0 * * *", "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0", "@monthly": "0 0 1 * *", "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *"}
# The longest time between two matching dates: a February 29 that is a Sunday comes after 40 years
# where the century year between them (2100) has no February 29.
LONGEST_GAP = 41 * 366  # days

# What the fields of a text allow. `both`: day of month and day of week must both match, because one
# of them begins with `*`; otherwise one of them is enough. `elapsed`: minute or hour has a `*` or a
# step, so the schedule follows elapsed time and runs in both hours when one comes twice.
Cron = namedtuple("Cron", "minutes hours days months weekdays both elapsed")


def _cron_part(text: str, low: int, high: int) -> range:
    """Return the numbers that `*`, `5`, `1-5` or `*/15` stands for; ValueError for anything else.

    As in Vixie cron a step needs a range or `*` before it.
    """
    match = re.fullmatch(r"(\d+)|(?:\*|(\d+)-(\d+))(?:/(\d+))?", text, re.ASCII)
    if match is None:
        raise ValueError(text)
    single, first, last, step = match.groups()
    start, end = int(single or first or low), int(single or last or high)
    if high == 7 and last == "0":  # sat-sun
        end = 7
    if not low <= start <= end <= high:
        raise ValueError(text)
    return range(start, end + 1, int(step or 1))


def _cron_field(text: str, name: str, low: int, high: int, names: str = "") -> set[int]:
    """Return the numbers that a field allows; raises UsageError if it can't be understood."""
    try:
        plain = re.sub(r"\b[a-z]+\b", lambda word: str(names.split().index(word[0]) + low),
                       text.lower())
        return {number for part in plain.split(",") for number in _cron_part(part, low, high)}
    except ValueError:
        raise UsageError("--cron: the %s can't be %s; it is *, %d, %d-%d, */2, %d-%d/2, or a list "
                         "of these" % (name, quoted(text), low, low, high, low, high)) from None


def walls(cron: Any, after: int) -> Iterator[int]:
    """Yield the matching times of a wall clock that are later than `after`, in order."""
    first = after // SECONDS_OF_DAY
    for day in range(first, first + LONGEST_GAP):
        midnight = day * SECONDS_OF_DAY
        date = time.gmtime(midnight)
        weekdays = (date.tm_wday + 1) % 7, date.tm_wday + 1  # Sunday is 0 and 7
        found = date.tm_mday in cron.days, not set(weekdays).isdisjoint(cron.weekdays)
        if sum(found) <= cron.both or date.tm_mon not in cron.months:
            continue
        for hour in cron.hours:
            for minute in cron.minutes:
                wall = midnight + hour * 3600 + minute * 60
                if wall > after:
                    yield wall


@lru_cache(1000)
def cron_of(text: str) -> Any:
    """Return the Cron of a text; raises UsageError if it is none, or if no date matches it."""
    words = CRON_WORDS.get(text.lower(), text).split()
    if len(words) != 5:
        raise UsageError(
            "--cron must be five fields in quotes, such as '30 2 * * 1-5' (minute, hour, day of "
            "month, month, day of week), or one of %s, not %s"
            % (", ".join(CRON_WORDS), quoted(text)))
    fields = [_cron_field(word, *field) for word, field in zip(words, CRON_FIELDS)]
    both = "*" in (words[2][0], words[4][0])
    elapsed = not {"*", "/"}.isdisjoint(words[0] + words[1])
    cron = Cron._make((*map(sorted, fields), both, elapsed))
    if next(walls(cron, 0), None) is None:
        raise UsageError("--cron: %s never comes: there is no such date" % quoted(text))
    return cron


def moments_of(wall: int, zone: Zone) -> list[int]:
    """Return the moments at which a wall clock shows `wall`.

    There are two if the clock is set back over it, and none if the clock is set forward over it.
    """
    moments = {wall - zone(wall + day) for day in (-SECONDS_OF_DAY, SECONDS_OF_DAY)}
    return sorted(moment for moment in moments if moment + zone(moment) == wall)


def first_where(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """Return the lowest number for which `holds` is true; from there on it must be true."""
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low


def end_of_gap(wall: int, zone: Zone) -> int:
    """Return the moment at which a wall clock is set forward over `wall`."""
    low, high = sorted(wall - zone(wall + day) for day in (-SECONDS_OF_DAY, SECONDS_OF_DAY))
    return first_where(low, high, lambda moment: moment + zone(moment) >= wall)


def next_cron(cron: Any, after: int, zone: Zone) -> int:
    """Return the first moment later than `after` at which a schedule runs.

    A fixed time runs when the wall clock reaches it for the first time: right after the change if
    the clock is set forward over it, and once if the clock is set back over it. A time with `*` or
    a step runs whenever the wall clock shows it. If the clock will be set back within a day, it
    will show some times again that it shows now or has shown; so the search begins before them.
    """
    shown, back = after + zone(after), 0
    if cron.elapsed:
        back = max(0, zone(after) - zone(after + SECONDS_OF_DAY))
    found = NEVER
    for wall in walls(cron, shown - back):
        moments = moments_of(wall, zone)
        if not cron.elapsed:
            moments = moments[:1] or [end_of_gap(wall, zone)]
        found = min([found, *(moment for moment in moments if moment > after)])
        if found < NEVER and wall > shown:
            break
    return found


def next_time(schedule: Row, after: int, zone: Zone) -> int:
    """Return the first time of a schedule later than `after`; both in milliseconds.

    LAST_TIME if there is none: a time that daylight saving skips on each of its dates.
    """
    if schedule["cron"]:
        local = zone if not schedule["utc"] else (lambda _: 0)
        return min(LAST_TIME, next_cron(cron_of(schedule["cron"]), after // 1000, local) * 1000)
    last, every = schedule["last"], schedule["every"]
    return int(last + ((after - last) // every + 1) * every)


MOST_COUNTED = 100  # times of one schedule counted in one transaction; each takes 10 µs


def times_between(following: Callable[[int], int], after: int, until: int) -> list[int]:
    """Return the times later than `after` up to `until`; `following(t)` is the first one after t.

    Of more than MOST_COUNTED, the rest is left out except the last one: a clock that is set
    forward by a year passes half a million times of a schedule that runs each minute.
    """
    times: list[int] = []
    after = following(after)
    while after <= until and len(times) < MOST_COUNTED:
        times.append(after)
        after = following(after)
    if after <= until:
        times.append(first_where(after, until, lambda moment: following(moment) > until))
    return times


# ═══ Platform ═══ processes, signals, locks, bells and the disk; POSIX and Windows ═══════════
#
# The only section that knows the operating system. `Posix` and `Windows` have the same methods;
# `system`, at the end of the section, is the one in use. So have `Bell` and `PollingBell`.

WINDOWS = os.name == "nt"
# What workers add to their exit codes. On Windows who kills a process chooses its exit code, which
# is often 0 or 1.
OWN_CODES = 1000 if WINDOWS else 0
SHORTAGES = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)  # processes, memory, files
if TYPE_CHECKING:
    Env = dict[Any, Any]  # environment variables in native form
    Living = dict[int, str]  # processes by id, each with the time it started
LONGEST_WAIT = 1 << 30  # milliseconds: stands for "for ever", which poll(2) does not take
# Seconds that a writer waits in the kernel before it looks at flags and deadlines again.
TICK = 0.25
TOKEN_FD = 239  # the token's descriptor in a job: above those that scripts use with flock(1)
NETWORK_FILE_SYSTEMS = (
    "nfs nfs4 cifs smb3 smbfs 9p ceph lustre gpfs afs beegfs davfs virtiofs vboxsf fuse.davfs "
    "fuse.glusterfs fuse.grpcfuse fuse.rclone fuse.s3fs fuse.sshfs")

OPEN_BESIDE = 0  # for files beside the database: follow no link, never wait, close at exec
for _name in ("O_CLOEXEC", "O_BINARY", "O_NOFOLLOW", "O_NONBLOCK"):
    OPEN_BESIDE |= getattr(os, _name, 0)


# Orders that a worker hears by its bell, besides `!`. Signals ring it with their numbers, up to 64.
STOP_SOON, STOP_NOW = b"S", b"N"


def now_millis() -> int:
    return to_millis(time.time())


def zone_here() -> str:
    """Return a text that changes when the time zone of this process changes.

    It is `=` and TZ, if TZ is set; else it identifies the machine's zone file. The C library keeps
    the zone it has read until `read_zone` is called.
    """
    if "TZ" in os.environ:
        return "=" + os.environ["TZ"]
    try:
        info = os.stat("/etc/localtime")
    except OSError:
        return "".join(time.tzname)
    return "%d %d %d" % (info.st_dev, info.st_ino, info.st_mtime_ns)


def read_zone() -> None:
    """Have the C library read the time zone again, if this system can (Windows can't)."""
    if hasattr(time, "tzset"):
        time.tzset()


def local_offset(second: int) -> int:
    """Return how many seconds local time is ahead of UTC at a moment."""
    return time.localtime(second).tm_gmtoff


class _Tick(Exception):
    """Raised by the alarm that bounds a blocking flock, and by nothing else."""


def _raise_tick(signum: int, frame: FrameType | None) -> NoReturn:
    raise _Tick


# A process: the ids of its parent and its session, when it started (a text to compare, "" if
# unknown), and whether it was seen to carry the mark of the run or to write to the run's files.
_Process = namedtuple("_Process", "parent session started marked")


class Leader(namedtuple("Leader", "pid first last")):
    """The first process of a run, which leads a session with its own id.

    It started between the clock ticks `first` and `last`. After its end the system may give its id
    to a strange process, but only when the session is empty.
    """

    def is_a_stranger(self, entry: _Process | None) -> bool:
        """Tell whether another process has its id now."""
        if entry is None or not entry.started:
            return False
        return not self.first <= int(entry.started) <= self.last


NOBODY = Leader(0, 0, 0)


def _proc_file(pid: int, name: str) -> bytes:
    """Read a file in /proc/PID; nothing if the process is gone or belongs to another user.

    Raises OSError if there is no memory or descriptor to look with: then the process may live.
    """
    try:
        with open("/proc/%d/%s" % (pid, name), "rb") as file:
            return file.read()
    except OSError as error:
        if error.errno in SHORTAGES:
            raise
        return b""


def _proc_stat(pid: int) -> list[bytes]:
    """Read state, parent, group, session, … from /proc/PID/stat (proc(5)); [] if it is gone."""
    return _proc_file(pid, "stat").rpartition(b")")[2].split()


def _living(pid: int) -> _Process | None:
    """Return the process with this id if it has not ended."""
    fields = _proc_stat(pid)
    if not fields or fields[0] in (b"Z", b"X"):
        return None
    return _Process(int(fields[1]), int(fields[3]),
                    fields[19].decode(), False)


def _writes_to(pid: int, files: Names) -> bool:
    """Tell whether a process has one of `files` open for writing; a reader is no member."""
    folder = "/proc/%d/fd" % pid
    try:
        for name in os.listdir(folder):
            link = join(folder, name)
            if os.readlink(link) in files and os.lstat(link).st_mode & 0o200:
                return True
    except OSError as error:
        if error.errno in SHORTAGES:
            raise
    return False


class PosixFiles:
    """Locks, descriptors, the disk, and the trust in files, on POSIX systems.

    A lock (flock) belongs to the open file: a process that inherits the descriptor holds it too.
    The kernel frees it when the last copy is closed, however the holders ended. LOCK_UN would
    free it for all of them at once; so only the write mutex, which nobody inherits, is unlocked.
    """

    linux = sys.platform.startswith("linux")

    def __init__(self) -> None:
        import fcntl
        self.fcntl = fcntl
        self.user = os.geteuid()
        self.open, self.read_at, self.write_at = os.open, os.pread, os.pwrite

    def try_lock(self, fd: int, shared: bool = False) -> bool:
        """Take the lock on an open file; return False if another holds it. Raises OSError."""
        kind = self.fcntl.LOCK_SH if shared else self.fcntl.LOCK_EX
        try:
            self.fcntl.flock(fd, kind | self.fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False

    def unlock(self, fd: int) -> None:
        """Free the write mutex, the only lock that nobody inherits."""
        self.fcntl.flock(fd, self.fcntl.LOCK_UN)

    def wait_lock(self, fd: int) -> None:
        """Wait for a lock for at most a TICK; then the caller tries it again with `try_lock`.

        The kernel keeps a queue of waiting processes, so writers take turns. An alarm ends the
        wait. Its handler must raise: after a handler that only sets a flag Python would resume
        flock. The alarm may strike after flock has returned and before it is disarmed; that does no
        harm, for `try_lock` succeeds on a lock that this process holds. A thread of the page can't
        set an alarm: it sleeps instead.
        """
        try:
            signal.signal(signal.SIGALRM, _raise_tick)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
            try:
                signal.setitimer(signal.ITIMER_REAL, TICK)
                self.fcntl.flock(fd, self.fcntl.LOCK_EX)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except _Tick:
            pass
        except ValueError:  # not in the main thread
            sleep(0.01)

    def held(self, path: str) -> bool:
        """Tell whether a living process holds the lock on a file; True if that is unknown."""
        try:
            fd = os.open(path, os.O_RDONLY | OPEN_BESIDE)
            try:
                return not self.try_lock(fd, shared=True)
            finally:
                os.close(fd)
        except FileNotFoundError:
            return False
        except OSError:
            return True

    # Descriptors.

    def descriptors(self) -> set[int]:
        """Return the open descriptors, without the standard streams; [] if unknown."""
        try:
            found = {int(name) for name in os.listdir("/dev/fd")}
        except OSError:
            return set()
        return {fd for fd in found if fd > 2 and self._is_open(fd)}

    def _is_open(self, fd: int) -> bool:
        try:
            os.fstat(fd)
        except OSError:  # such as the one of the listing itself
            return False
        return True

    def keep_standard_streams(self) -> None:
        """Open /dev/null for each closed standard stream, lest a file takes its number."""
        for number in (0, 1, 2):
            if not self._is_open(number):
                os.open(os.devnull, os.O_RDWR)

    # The disk.

    def sync(self, fd: int) -> None:
        """Sync a file to the disk; macOS needs a call of its own for that."""
        if hasattr(self.fcntl, "F_FULLFSYNC"):
            self.fcntl.fcntl(fd, self.fcntl.F_FULLFSYNC)
        else:
            getattr(os, "fdatasync", os.fsync)(fd)

    def read_elsewhere(self, path: str, size: int) -> bytes:
        """Have another process read the first `size` bytes of a file.

        This process must not: closing the file again would drop its own locks on it.
        """
        import subprocess
        command = ["head", "-c", str(size), path]
        return subprocess.run(command, stdout=subprocess.PIPE).stdout

    def punch(self, fd: int, start: int, end: int) -> bool:
        """Free the disk space between two offsets while others go on writing at the end.

        Returns False if the file system can't do that.
        """
        libc = self._libc()
        if not libc:
            return False
        import ctypes
        offset, length = ctypes.c_int64(start), ctypes.c_int64(end - start)
        return bool(libc.fallocate(fd, 3, offset, length) == 0)  # PUNCH_HOLE | KEEP_SIZE

    def _libc(self) -> Any:
        """Return Linux's C library; None elsewhere, and in a Python without libffi."""
        if not self.linux:
            return None
        try:
            import ctypes
        except ImportError:
            return None
        return ctypes.CDLL(None, use_errno=True)

    def refuse_full(self, folder: str) -> None:
        """Raise Unavailable if a write to SQLite's mapped index could end the process by SIGBUS.

        That happens on a full disk whose blocks are smaller than pages of memory: SQLite writes to
        a page of its index without making sure that all blocks of the page exist.
        """
        disk = os.statvfs(folder)
        if disk.f_bsize < 4096 and disk.f_bavail * disk.f_frsize < 1 << 20:
            raise Unavailable("no space left in %s; free some and try again" % folder)

    def _mounts(self) -> dict[str, str]:
        """Return the mount points, each with the type of its file system (on Linux only).

        If a mount point comes twice, the last one covers the others.
        """
        try:
            with open("/proc/mounts", encoding="utf-8", errors="surrogateescape") as mounts:
                entries = [line.split(" ")[1:3] for line in mounts]
        except OSError:
            return {}
        unescaped = partial(re.sub, r"\\[0-7]{3}", lambda code: chr(int(code[0][1:], 8)))
        return {unescaped(point): kind for point, kind in entries}  # a blank in a path is \040

    def is_mount_point(self, path: str) -> bool:
        """Tell whether `path` itself is a mount point."""
        return path in self._mounts()

    def network_file_system(self, folder: str) -> str:
        """Return the type of the network file system that holds a folder, or ""."""
        mounts, folder = self._mounts(), realpath(folder)
        while folder not in mounts and folder != "/":
            folder = dirname(folder)
        kind = mounts.get(folder, "")
        return kind if kind in NETWORK_FILE_SYSTEMS.split() else ""

    # Who owns a file, and who else may write it.

    def give_to_owner(self, fd: int, path: str) -> None:
        """Give a file that root has made to the owner of `path`, as SQLite does."""
        owner = os.stat(path)
        if self.user == 0 and os.fstat(fd).st_uid != owner.st_uid:
            os.fchown(fd, owner.st_uid, owner.st_gid)

    def distrust(self, path: str, above: bool = False) -> str:
        """Return why others could change the file or folder `path`, or "".

        A group may write it if it is known to have no member but this user and root. `above`: it
        is a folder above the database's. There others may make files of their own if it is sticky,
        and a group without a name (as containers have for volumes) is no threat.
        Raises FileNotFoundError.
        """
        info = os.lstat(path)
        if stat.S_ISLNK(info.st_mode):
            return "%s is a symbolic link" % path
        if info.st_uid not in (0, self.user):
            return "%s belongs to another user (uid %d)" % (path, info.st_uid)
        sticky = info.st_mode & stat.S_ISVTX
        shared = info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if not shared or (above and sticky):
            return ""
        private = shared == stat.S_IWGRP and self._is_private_group(info.st_gid, above)
        if private and not self._has_acl(path):
            return ""
        mend = "use a database in a folder of your own"
        if info.st_uid == self.user and not sticky:
            mend = "`chmod go-w %s` mends that" % shell_word(path)
        return "%s can be written by others; %s" % (path, mend)

    def _has_acl(self, path: str) -> bool:
        """Tell whether a file has an access list: then its group bits are the list's mask."""
        try:
            return self.linux and bool(os.getxattr(  # type: ignore[attr-defined,unused-ignore]
                path, "system.posix_acl_access"))
        except OSError:
            return False

    def _is_private_group(self, group: int, nameless: bool) -> bool:
        """Tell whether a group has only this user and root; `nameless` if it has no name."""
        import grp
        import pwd
        accounts = pwd.getpwall()
        own = {"root"}.union(account.pw_name for account in accounts if account.pw_uid == self.user)
        members = {account.pw_name for account in accounts if account.pw_gid == group}
        try:
            members.update(grp.getgrgid(group).gr_mem)
        except KeyError:
            return nameless
        return members <= own


class Posix(PosixFiles):
    """Linux, macOS and other Unixes: how processes are started, found and ended."""

    shell = "/bin/sh"
    longest_command = 131071 if PosixFiles.linux else 200_000  # bytes, E2BIG beyond
    # A fork takes 2 ms. Only on Linux: other systems' libraries may fail after a fork.
    start_method = "fork" if PosixFiles.linux else "spawn"
    childless = False  # the run just reaped was the last process below this one
    subreaper = False
    token_fd = TOKEN_FD

    def __init__(self) -> None:
        super().__init__()
        self.environment = os.environb.copy  # this process's variables, in native form
        self.ticks_per_second = os.sysconf("SC_CLK_TCK")

    # Before the first job.

    def check_room(self, workers: int) -> None:
        """Raise QueueError if a supervisor can't run so many workers here."""
        if self.linux and not exists("/proc/%d" % os.getpid()):
            raise QueueError("/proc does not show the processes here, "
                             "so queuectl could not end what jobs leave behind; mount it")
        if not exists(os.devnull):
            raise QueueError("there is no %s here, which jobs need as their stdin" % os.devnull)
        need, have = 2 * workers + 64, self._most_descriptors()
        if 0 <= have < need:
            raise UsageError(
                "%d workers need %d open files, and this shell allows %d; `ulimit -n %d` first"
                % (workers, need, have, need))

    def _most_descriptors(self) -> int:
        """Return how many descriptors this process may have; -1 for no limit."""
        import resource
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    def prepare_parent(self) -> None:
        """Before a fork: load what every worker needs, and keep the caller's files from jobs."""
        self._libc()
        for fd in self.descriptors():
            os.set_inheritable(fd, False)

    def prepare_reporter(self) -> None:
        """Take the first steps of a run's reporter.

        It goes on while signals stop the pool, but ends, as `ls` does, when its reader is gone.
        """
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)

    def prepare_worker(self, supervisor: int) -> None:
        """Take a worker's first steps: leave the terminal, learn of the supervisor's death."""
        os.setsid()
        os.umask(0o077)
        limit = self._most_descriptors()
        if 0 <= limit <= TOKEN_FD:
            self.token_fd = limit - 1
        self.to_default = list(signal.valid_signals())  # jobs must neither ignore nor block signals
        self.null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)  # the stdin of jobs
        self.real_shell = realpath(self.shell)
        libc = self._libc()
        if libc:  # PR_SET_PDEATHSIG and PR_SET_CHILD_SUBREAPER of prctl(2)
            libc.prctl(1, int(signal.SIGHUP), 0, 0, 0)
            self.subreaper = libc.prctl(36, 1, 0, 0, 0) == 0
        # The supervisor died before the line above, so no signal will come.
        if os.getppid() != supervisor:
            os.kill(os.getpid(), signal.SIGHUP)

    def orphaned(self, supervisor: int, life: str) -> bool:
        """Tell whether a worker's supervisor has died."""
        return os.getppid() != supervisor

    def place(self) -> str:
        """Name the start of the machine and the namespace that process ids belong to.

        Returns "" if that is not known.
        """
        try:
            with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as boot:
                return "%s/%s" % (boot.read().strip(), os.readlink("/proc/self/ns/pid"))
        except OSError:
            return ""

    def ticks(self) -> int:
        """Return the time in the unit of the start times in /proc/PID/stat."""
        if sys.platform != "linux":
            return 0
        return int(time.clock_gettime(time.CLOCK_BOOTTIME) * self.ticks_per_second)

    # A run begins.

    def native(self, text: str) -> Any:
        """Encode text for the system: as UTF-8, whatever the locale says."""
        return text.encode("utf-8", "surrogateescape")

    def spawn(self, command: str, shell: str, env: Env, cwd: str, umask: int,
              out: int, err: int) -> int:
        """Start `command` in a session of its own; return its process id, or raise OSError.

        posix_spawn is twice as fast as subprocess, but can't set folder or umask: so the worker
        takes them on for a moment, in which it imports and opens nothing by a relative path.
        """
        os.umask(umask)
        try:
            os.chdir(self.native(cwd))
            streams = {0: self.null, 1: out, 2: err, self.token_fd: err}
            pid = shell == self.shell and self._spawn_directly(command, env, streams)
            if pid:
                return pid
            if command[0] in "-+":  # a shell would take the command for an option
                command = " " + command
            argv = [self.native(shell), "-c", self.native(command)]
            return self._spawn(argv[0], argv, env, streams)
        finally:
            os.chdir("/")
            os.umask(0o077)

    def _spawn_directly(self, command: str, env: Env, streams: dict[int, int]) -> int:
        """Start a command without a shell and return its process id; 0 if it needs one.

        It also needs one if it can't be started: the shell runs a script without #!, or says in
        its own words what is wrong.
        """
        words = words_without_shell(command, self.real_shell, tuple(env))
        if not words:
            return 0
        argv = [self.native(word) for word in words]
        try:
            here, told = os.getcwdb(), env.get(b"PWD", b"")
            if told != here and not (told[:1] == b"/" and os.path.samefile(told, here)):
                env[b"PWD"] = here  # as a shell does
            file = self._program(argv[0], env[b"PATH"])
            return self._spawn(file, argv, env, streams)
        except OSError:
            return 0

    def _program(self, name: bytes, path: bytes) -> bytes:
        """Find the program that a shell would start; OSError if there is none, or shells differ."""
        if b"/" in name:
            return name
        for folder in path.split(b":"):
            # A relative folder, or one with an option of dash.
            if not re.fullmatch(b"/[^%]*[^/%]", folder):
                break
            file = folder + b"/" + name
            if os.access(file, os.F_OK):
                return file
        raise FileNotFoundError(name)

    def _spawn(self, file: Any, argv: list[Any], env: Env, streams: dict[int, int]) -> int:
        """Start a program. `streams`: the job's descriptors, each with the one here to copy."""
        try:
            actions = [(os.POSIX_SPAWN_DUP2, have, want) for want, have in streams.items()]
            return os.posix_spawn(file, argv, env, file_actions=actions, setsid=True,
                                  setsigdef=self.to_default, setsigmask=())
        except (NotImplementedError, AttributeError):  # an old glibc (before 2.26), or PyPy
            return self._fork_exec(file, argv, env, streams)

    def _fork_exec(self, file: Any, argv: list[Any], env: Env, streams: dict[int, int]) -> int:
        import subprocess

        def prepare() -> None:
            for want, have in streams.items():
                os.dup2(have, want)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            for number in set(self.to_default) - {signal.SIGKILL, signal.SIGSTOP}:
                signal.signal(number, signal.SIG_DFL)

        child = subprocess.Popen(argv, executable=file, env=env, start_new_session=True,
                                 close_fds=False, preexec_fn=prepare)
        child.returncode = 0  # without this, Popen's end would take the exit code
        return child.pid

    # A run's processes.

    def reap(self, pid: int) -> int | None:
        """Reap dead children; return the exit code of `pid` (negative: its signal) if it died.

        Orphans of earlier runs are children of a subreaper, too. Sets `childless` if no child is
        left: then a failed run has left nothing behind, and nobody needs to search. Raises
        ChildProcessError if `pid` (0: none) is no child any more: another took its exit code.
        """
        code = None
        while True:
            try:
                dead, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                self.childless = self.subreaper
                if code is None and pid:
                    raise
                return code
            if dead == 0:
                self.childless = False
                return code
            if dead == pid:
                if status == 0:  # nobody will ask for `childless` now, so orphans can wait
                    return 0
                code = os.WEXITSTATUS(status)
                if os.WIFSIGNALED(status):
                    code = -os.WTERMSIG(status)

    def reap_strangers(self, own: set[int]) -> None:
        """As process 1 of a container: reap dead children that multiprocessing does not know."""
        while self.linux and os.getpid() == 1:
            try:
                info = os.waitid(  # type: ignore[attr-defined,unused-ignore]
                    os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if info is None or info.si_pid in own:
                return
            os.waitpid(info.si_pid, os.WNOHANG)

    def members(self, mark: str, files: Names,
                leader: Leader, known: Living) -> Living:
        """Return the living processes of a run, ancestors first.

        `mark` is the beginning of its QUEUECTL_RUN (a NUL ends it), `files` are its output files,
        `leader` is its first process, `known` are members found before. A member carries
        QUEUECTL_RUN, can write to the files, is in the leader's session, shares a session with a
        member or descends from one. So children are found that closed all descriptors and left the
        session, but not those of other users and namespaces. Raises OSError if it can't look now.
        """
        processes = self._from_proc(mark, files) if self.linux else self._from_ps(mark)
        session = leader.pid
        if leader.is_a_stranger(processes.get(session)):
            session = 0
        found = {pid for pid, entry in processes.items()
                 if entry.marked or known.get(pid) == entry.started
                 or (session and session == entry.session)}
        while True:
            sessions = {processes[pid].session for pid in found}
            more = found.union(pid for pid, entry in processes.items()
                               if entry.session in sessions or entry.parent in found)
            if more == found:
                return {pid: processes[pid].started for pid in self._from_the_top(found, processes)}
            found = more

    def _from_the_top(self, found: set[int],
                      processes: dict[int, _Process]) -> list[int]:
        """Sort processes so that ancestors are signalled before their descendants.

        A shell whose child dies first would go on with its next command. A parent starts before
        its child; if two started in the same tick, the one with fewer ancestors is first.
        """
        def rank(pid: int) -> tuple[int, int]:
            depth, at = 0, pid
            while processes[at].parent in found and depth < len(found):
                depth, at = depth + 1, processes[at].parent
            return int(processes[pid].started or 0), depth

        return sorted(found, key=rank)

    def _from_proc(self, mark: str, files: Names) -> dict[int, _Process]:
        """Read every process from /proc, but this one, its session and process 1."""
        needle = b"QUEUECTL_RUN=%s" % mark.encode()
        processes = {}
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        if os.getpid() not in pids:
            raise OSError(errno.ENOENT, "/proc does not show the processes here")
        for pid in pids:
            if pid in (1, os.getpid()):
                continue
            entry = _living(pid)
            if entry and entry.session != os.getsid(0):
                marked = needle in _proc_file(pid, "environ") or _writes_to(pid, files)
                processes[pid] = entry._replace(marked=marked)
        return processes

    def _from_ps(self, mark: str) -> dict[int, _Process]:
        """Do the same with ps(1) if there is no /proc, with process groups for sessions."""
        import subprocess
        command = ["ps", "-A", "-E", "-ww", "-o", "pid=,ppid=,pgid=,stat=,command="]
        listing = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
        processes = {}
        for line in listing.decode("utf-8", "replace").splitlines():
            fields = [*line.split(None, 4), *[""] * 5]
            pid, parent, group, state, words = fields[:5]
            ours = not pid.isdigit() or int(pid) in (1, os.getpid())
            if ours or state[0] == "Z" or int(group) == os.getpgid(0):
                continue
            marked = any((word + "\0").startswith("QUEUECTL_RUN=" + mark)
                         for word in words.split())
            processes[int(pid)] = _Process(int(parent), int(group), "", marked)
        return processes

    def end_process(self, pid: int, started: str, kill: bool) -> None:
        """Send SIGTERM or SIGKILL to a member if it is still the process that `members` saw."""
        if self.linux:
            entry = _living(pid)
            if entry is None or entry.started != started:
                return  # it is gone, and a stranger may have its id
        try:
            os.kill(pid, signal.SIGKILL if kill else signal.SIGTERM)
            os.kill(pid, signal.SIGCONT)  # a stopped process would not act on SIGTERM
        except (ProcessLookupError, PermissionError):
            pass

    # Workers and supervisors.

    def hold_signals(self) -> Any:
        """Block the signals that workers handle; return what `let_through` restores."""
        return signal.pthread_sigmask(signal.SIG_BLOCK, (
            signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD))

    def let_through(self, mask: Any = ()) -> None:
        """Block only the signals in `mask`."""
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def dismiss(self, pid: int, now: bool) -> None:
        """Tell a worker of this pool to stop: after its job, or now."""
        os.kill(pid, signal.SIGUSR1 if now else signal.SIGHUP)

    def stop(self, pid: int, life: str, now: bool) -> bool:
        """Tell a supervisor to stop, by one signal or by two, if it holds the life file `life`.

        Returns whether it was told.
        """
        if not _writes_to(pid, (life,)):
            return False
        for _ in range(1 + now):
            os.kill(pid, signal.SIGTERM)
            sleep(0.1)  # two at once would count as one
        return True

    def is_stopped(self, pid: int) -> bool:
        """Tell whether a process is stopped, by SIGSTOP or a debugger, if that can be seen."""
        return _proc_stat(pid)[:1] in ([b"T"], [b"t"])

    def wake(self, pid: int, life: str) -> None:
        """Continue a stopped process (by Ctrl-Z, for example) that holds the file `life`."""
        if self.is_stopped(pid) and _writes_to(pid, (life,)):
            os.kill(pid, signal.SIGCONT)

    def say(self, text: str, stream: int = 1) -> None:
        """Write a message of a worker or supervisor to a standard stream, without ever waiting.

        A full pipe or a stopped terminal must hold up no job: text that the stream does not take
        at once is dropped. A stream that is ready takes at least 4096 bytes.
        """
        import select
        room = select.poll()
        room.register(stream, select.POLLOUT)
        data = text.encode("utf-8", "replace")
        try:
            while data and room.poll(0):
                data = data[os.write(stream, data[:4096]):]
        except OSError:
            pass  # the terminal is gone; the database has the record


class Bell:
    """A bell that wakes a sleeping process: others ring it by its path, and its signals ring it.

    It is a FIFO, open for reading and writing, so that it neither ends nor blocks. A bell without
    a path, or on a file system without FIFOs, hears signals only.
    """

    def __init__(self, path: str = ""):
        import select
        self.write_end = -1
        try:
            os.mkfifo(path, 0o600)
            self.fd = os.open(path, os.O_RDWR | OPEN_BESIDE)
        except OSError:
            self.fd, self.write_end = os.pipe()
            os.set_blocking(self.fd, False)
            os.set_blocking(self.write_end, False)
        self._poll = select.poll()
        self._poll.register(self.fd, select.POLLIN)

    def hear_signals(self) -> None:
        """Have every signal that has a handler ring this bell."""
        signal.set_wakeup_fd(max(self.fd, self.write_end), warn_on_full_buffer=False)

    def watch(self, fd: int) -> None:
        """Have `wait` also end when this descriptor can be read."""
        self._poll.register(fd, 1)  # POLLIN

    def forget(self, fd: int) -> None:
        self._poll.unregister(fd)

    def wait(self, seconds: float) -> bool:
        """Sleep until the bell rings or a watched descriptor ends, at most `seconds`; True if rung.

        It takes all rings so far together. So look at everything after it, and no ring is lost.
        """
        millis = int(min(seconds * 1000 + 0.999, LONGEST_WAIT))
        if not self._poll.poll(max(0, millis)):
            return False
        try:
            heard = os.read(self.fd, 65536)
        except BlockingIOError:
            return False
        for order, number in ((STOP_SOON, signal.SIGHUP), (STOP_NOW, signal.SIGUSR1)):
            if order in heard:  # no signal has this number
                signal.raise_signal(number)
        return True


def is_cmd(shell: str) -> bool:
    """Tell whether a shell is Windows' cmd.exe."""
    return os.path.basename(shell).lower() in ("cmd", "cmd.exe")


class Windows:
    """Windows: a run is a Job Object that ends with its worker; sleeping is polling.

    Locks are byte-range locks far behind the end of the file, so that they block no reader.
    Tokens are not needed: the kernel ends the job's processes when the worker's handle closes.
    """

    longest_command = 8000
    linux = False
    start_method = "spawn"
    user = 0  # the rights of files on Windows are not checked
    childless = False
    busy = False  # whether the process of a run was alive at the last look
    LOCK_AT = 1 << 30
    SHARED = 7  # others may read, write, rename and remove it
    APPENDING = 0x120194  # FILE_GENERIC_WRITE | FILE_READ_ATTRIBUTES & ~FILE_WRITE_DATA

    def __init__(self) -> None:
        self.msvcrt: Any = __import__("msvcrt")
        self.runs: dict[int, tuple[Any, int]] = {}  # pid: (Popen, handle of the Job Object)
        # A bare name would be looked up in the job's folder first.
        self.shell = join(os.environ.get("SYSTEMROOT", r"C:\Windows"), "System32", "cmd.exe")

    def _kernel(self, name: str, *arguments: Any) -> int:
        """Call a function of Windows; numbers may be handles. Raises OSError if it fails."""
        ctypes: Any = __import__("ctypes")
        function = getattr(ctypes.WinDLL("kernel32", use_last_error=True), name)
        function.restype = pointer = ctypes.c_void_p
        result = function(*[pointer(value) if isinstance(value, int) else value
                            for value in arguments])
        if result in (None, pointer(-1).value):
            raise ctypes.WinError(ctypes.get_last_error())
        return int(result)

    # Files.

    def open(self, path: str, flags: int, mode: int = 0) -> int:
        """Open a file as on POSIX: others may rename it, and writers only append if asked to."""
        access = {os.O_RDONLY: 1 << 31, os.O_WRONLY: 1 << 30, os.O_RDWR: 3 << 30}[flags & 3]
        if flags & os.O_APPEND and flags & os.O_WRONLY:
            access = self.APPENDING
        creation = 4 if flags & os.O_CREAT else 3  # OPEN_ALWAYS, OPEN_EXISTING
        handle = self._kernel("CreateFileW", path, access, self.SHARED, None, creation, 128, None)
        return int(self.msvcrt.open_osfhandle(handle, 0))

    def _appending(self, fd: int) -> int:
        """Open a file again only to write at its end: so it can be truncated while a job writes."""
        handle = self._kernel("ReOpenFile", self.msvcrt.get_osfhandle(fd), self.APPENDING,
                              self.SHARED, 0)
        return int(self.msvcrt.open_osfhandle(handle, 0))

    def try_lock(self, fd: int, shared: bool = False) -> bool:
        os.lseek(fd, self.LOCK_AT, os.SEEK_SET)
        try:
            self.msvcrt.locking(fd, self.msvcrt.LK_NBLCK, 1)
            return True
        except OSError:
            return False

    def unlock(self, fd: int) -> None:
        os.lseek(fd, self.LOCK_AT, os.SEEK_SET)
        self.msvcrt.locking(fd, self.msvcrt.LK_UNLCK, 1)

    def wait_lock(self, fd: int) -> None:
        # At random: Windows keeps no queue of waiting processes.
        sleep(0.001 + os.urandom(1)[0] / 25600)

    def held(self, path: str) -> bool:
        try:
            fd = self.open(path, os.O_RDWR)
        except OSError as error:
            return not isinstance(error, FileNotFoundError)
        try:
            return not self.try_lock(fd)
        finally:
            os.close(fd)  # which frees the lock

    def read_at(self, fd: int, size: int, start: int) -> bytes:
        os.lseek(fd, start, os.SEEK_SET)
        return os.read(fd, size)

    def write_at(self, fd: int, data: bytes, start: int) -> int:
        os.lseek(fd, start, os.SEEK_SET)
        return os.write(fd, data)

    def read_elsewhere(self, path: str, size: int) -> bytes:
        with open(path, "rb") as file:  # here a lock ends only with its own handle
            return file.read(size)

    def network_file_system(self, folder: str) -> str:
        return "a network share" if realpath(folder).startswith("\\\\") else ""

    def keep_standard_streams(self) -> None:
        """Have consoles follow escape sequences; those of before Windows 10 get no colours."""
        for stream in filter(os.isatty, (1, 2)):
            mode: Any = __import__("ctypes").create_string_buffer(4)
            try:
                console = self.msvcrt.get_osfhandle(stream)
                self._kernel("GetConsoleMode", console, mode)
                self._kernel("SetConsoleMode", console, mode.raw[0] | 4)
            except OSError:
                os.environ.setdefault("NO_COLOR", "1")

    def say(self, text: str, stream: int = 1) -> None:
        try:
            os.write(stream, text.encode("utf-8", "replace"))
        except OSError:
            pass

    # Processes.

    def prepare_worker(self, supervisor: int = 0) -> None:
        for name in ("SIGINT", "SIGBREAK"):  # the console sends them to every process
            signal.signal(getattr(signal, name), signal.SIG_IGN)

    prepare_reporter = prepare_worker

    def orphaned(self, supervisor: int, life: str) -> bool:
        return not self.held(life)

    native = staticmethod(str)
    environment = os.environ.copy

    def spawn(self, command: str, shell: str, env: Env, cwd: str, umask: int,
              out: int, err: int) -> int:
        """Start `command` suspended, put it into a Job Object, then resume it: no child escapes."""
        import subprocess
        line = subprocess.list2cmdline([shell, "-c", command])
        if is_cmd(shell):
            line = '"%s" /d /v:off /s /c "%s"' % (shell, command)
        streams = [self._appending(out), self._appending(err)]
        try:
            process = subprocess.Popen(
                line, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=streams[0],
                stderr=streams[1], creationflags=0x204)  # SUSPENDED, NEW_PROCESS_GROUP
        finally:
            for fd in streams:
                os.close(fd)
        while self.runs:  # of failed runs: none of their processes may live on
            self._kernel("CloseHandle", self.runs.popitem()[1][1])
        try:
            self._resume_in_job(process)
        except OSError:
            process.kill()
            raise
        return process.pid

    def _resume_in_job(self, process: Any) -> None:
        """Put a suspended process into a new Job Object and resume it."""
        handle = self._kernel("CreateJobObjectW", None, None)
        self._kill_on_close(handle, True)
        self._kernel("AssignProcessToJobObject", handle, int(process._handle))
        ctypes: Any = __import__("ctypes")
        if ctypes.WinDLL("ntdll").NtResumeProcess(ctypes.c_void_p(int(process._handle))):
            raise OSError(errno.EAGAIN, "it can't be resumed")
        self.runs[process.pid] = process, handle
        self.busy = True

    def _kill_on_close(self, handle: int, kill: bool) -> None:
        """Set JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE in JOBOBJECT_EXTENDED_LIMIT_INFORMATION (9)."""
        size = 144 if sys.maxsize > 1 << 32 else 112  # with addresses of 64 or 32 bits
        info: Any = __import__("ctypes").create_string_buffer(size)
        info[16:20] = (kill * 0x2000).to_bytes(4, "little")  # LimitFlags
        self._kernel("SetInformationJobObject", handle, 9, info, size)

    def reap(self, pid: int) -> int | None:
        if pid not in self.runs:
            return None
        process, handle = self.runs[pid]
        code: int | None = process.poll()
        self.busy = code is None
        if code == 0:  # what a completed run left behind may live on
            del self.runs[pid]
            self._kill_on_close(handle, False)
            self._kernel("CloseHandle", handle)
        return code

    def members(self, mark: str, files: Names,
                leader: Leader, known: Living) -> Living:
        """Return the run's Job Object while a process lives in it; {} for other workers' runs."""
        if leader.pid not in self.runs:
            return {}
        # JOBOBJECT_BASIC_ACCOUNTING_INFORMATION (1), in which ActiveProcesses is the number at 40
        info: Any = __import__("ctypes").create_string_buffer(48)
        self._kernel("QueryInformationJobObject", self.runs[leader.pid][1], 1, info, 48, None)
        return {leader.pid: ""} if any(info[40:44]) else {}

    def end_process(self, pid: int, started: str, kill: bool) -> None:
        self._kernel("TerminateJobObject", self.runs[pid][1], 1)

    # These methods have nothing to do on Windows.

    def _nothing(self, *values: Any) -> None:
        """Do nothing: workers poll, for example the stop flag of their pool."""

    prepare_parent = refuse_full = give_to_owner = check_room = reap_strangers = _nothing
    dismiss = stop = wake = punch = is_mount_point = is_stopped = _nothing
    distrust = hold_signals = let_through = _nothing
    sync = staticmethod(os.fsync)
    descriptors, place, ticks = set, str, os.getpid  # calling these returns an empty set, "", or 0


class PollingBell(Bell):
    """The bell of a system without FIFOs: who sleeps looks every 20 ms, after a rest every 200.

    Ringing makes the file `path` longer. There is no rest while a job runs.
    """

    def __init__(self, path: str = ""):
        self.fd = self.write_end = -1
        self.rings, self.heard = 0, monotonic()
        if path:
            self.fd = system.open(path, os.O_RDONLY | os.O_CREAT)

    def watch(self, fd: int = -1) -> None:
        """Do nothing: this bell hears no descriptor."""

    hear_signals = forget = watch

    def wait(self, seconds: float) -> bool:
        end = monotonic() + seconds
        while not self._was_rung() and monotonic() < end:
            rests = monotonic() - self.heard > 5
            sleep(max(0.0, min(end - monotonic(), 0.2 if rests else 0.02)))
            if not rests or self.fd < 0:
                break
        return True

    def _was_rung(self) -> bool:
        rings = os.lseek(self.fd, 0, os.SEEK_END) if self.fd >= 0 else 0
        rung, self.rings = rings != self.rings, rings
        if rung or getattr(system, "busy", False):
            self.heard = monotonic()
        return rung


# Type checkers see Posix; only a run on Windows finds what the class Windows lacks.
system: Posix = Windows() if WINDOWS else Posix()  # type: ignore[assignment]
make_bell = PollingBell if WINDOWS else Bell
SETTINGS["shell"] = system.shell  # what runs the commands of jobs without a shell of their own


# ═══ Files ═══ files beside the database: paths, bells, life files, output of live runs ══════
#
# The write mutex `queue.db.lock`, and the folder `queue.db.d`. In the folder each worker and each
# pool has a life file: its lock says that it lives, and workers write notes into it. A worker also
# has a bell, and pairs of output files; their locks are the token of the run that writes to them.
# The files' names begin with the name of the worker or pool, which is never used twice.


def _refuse_planted(info: os.stat_result, path: str) -> None:
    if info.st_uid not in (0, system.user) and system.user != 0:
        raise QueueError("%s belongs to another user (uid %d), whose queue this is"
                         % (path, info.st_uid))
    if not stat.S_ISREG(info.st_mode) or info.st_nlink > 1:
        raise QueueError("%s is not a plain file with one name; remove it" % path)


def open_beside(path: str, flags: int) -> int:
    """Open a file beside a database; return the descriptor.

    Raises QueueError unless it is a plain file of this user with one name: another user may have
    put a link there, to a file that only this user can write. Raises OSError if it can't be opened.
    """
    try:
        fd = system.open(path, flags | OPEN_BESIDE, 0o600)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise QueueError("%s is a symbolic link, which is not followed; remove it" % path) from None
    try:
        _refuse_planted(os.fstat(fd), path)
        return fd
    except BaseException:  # an open copy would make this process look like one of the file's run
        os.close(fd)
        raise


def open_private(path: str, flags: int) -> int:
    """Open a file beside a database, as open_beside; if it is new, only this user may read it."""
    return open_beside(path, flags | os.O_CREAT)


def is_link(path: str) -> bool:
    """Tell whether a path is a symbolic link, or a file with several names."""
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        return False
    if stat.S_ISREG(info.st_mode):
        return info.st_nlink > 1
    return stat.S_ISLNK(info.st_mode)


def sync_folder(folder: str) -> None:
    """Sync the names in a folder to the disk, if the system can do that."""
    try:
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError:
        pass


def read_between(fd: int, start: int, end: int) -> bytes:
    """Read the bytes of a file from `start` to `end`, fewer if it is shorter."""
    parts = []
    while start < end:
        part = system.read_at(fd, end - start, start)
        if not part:
            break
        parts.append(part)
        start += len(part)
    return b"".join(parts)


def read_beside(path: str, missing: Any, read: Callable[..., Any],
                *values: Any) -> Any:
    """Open a life or output file, return `read(fd, *values)`, and close it again."""
    try:
        fd = open_beside(path, os.O_RDONLY)
    except (OSError, QueueError):
        return missing
    try:
        return read(fd, *values)
    finally:
        os.close(fd)


def write_at(fd: int, start: int, data: bytes) -> None:
    """Write all of `data` into a file at the offset `start`."""
    while data:
        written = system.write_at(fd, data, start)
        data, start = data[written:], start + written


# Paths.


def mutex_path(db: str) -> str:
    return db + ".lock"


def folder_path(db: str) -> str:
    return db + ".d"


def files_of(db: str) -> list[str]:
    """Return the paths of a database and the files beside it."""
    return [db, db + "-wal", db + "-shm", mutex_path(db), folder_path(db)]


# A worker's name is POOL-NUMBER. So no name with a dot behind it is the beginning of another.


def life_path(db: str, name: str) -> str:
    return join(folder_path(db), name + ".life")


def bell_path(db: str, name: str) -> str:
    return join(folder_path(db), name + ".bell")


def output_paths(db: str, worker: str, slot: int) -> tuple[str, str]:
    stem = join(folder_path(db), "%s.%d" % (worker, slot))
    return stem + ".out", stem + ".err"


def log_path(db: str) -> str:
    """Return the path of the log of detached pools."""
    folder, name = os.path.split(db)
    return join(folder, "queuectl.log") if name == "queue.db" else db + ".log"


def bytes_on_disk(paths: Iterable[str]) -> int:
    """Return the disk space that files take: with holes in them less than their size."""
    total = 0
    for path in paths:
        try:
            info = os.stat(path)
        except OSError:
            continue
        total += 512 * getattr(info, "st_blocks", info.st_size // 512)
    return total


def names_beside(db: str, ending: str) -> list[str]:
    """Name the workers and pools that have a file with this ending in the folder."""
    try:
        files = os.listdir(folder_path(db))
    except OSError:  # no folder, or unreadable: there is nobody to ring or ask
        return []
    end = -len(ending) or None
    return [file[:end] for file in files if file.endswith(ending)]


def sizes_of(db: str) -> dict[str, int]:
    """Return the bytes that the database, its log, and the output of current runs take."""
    outputs = [join(folder_path(db), name) for name in names_beside(db, "")]
    return {"database_bytes": bytes_on_disk([db]), "log_bytes": bytes_on_disk([db + "-wal"]),
            "output_bytes": bytes_on_disk(outputs)}


def remove_files(db: str, name: str) -> None:
    """Remove the files of a worker or pool that has ended."""
    files = [file for file in names_beside(db, "") if file.startswith(name + ".")]
    # The life file last: a sweep finds the others by it.
    files.sort(key=lambda file: file.endswith(".life"))
    for file in files:
        try:
            os.unlink(join(folder_path(db), file))
        except OSError:  # open on Windows, or the folder is read-only: the next sweep removes it
            pass


# Is a process alive? Wake it.


def is_alive(db: str, name: str) -> bool:
    """Tell whether the worker or pool `name` lives: the kernel says so by its life lock."""
    return system.held(life_path(db, name))


def anyone_alive(db: str) -> bool:
    """Tell whether any worker or pool of this database lives."""
    return any(is_alive(db, name) for name in names_beside(db, ".life"))


def ring(path: str, order: bytes = b"!") -> None:
    """Wake the process that sleeps on the bell `path`, if there is one; True if rung."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | OPEN_BESIDE)
        try:
            if WINDOWS or stat.S_ISFIFO(os.fstat(fd).st_mode):
                os.write(fd, order)
        finally:
            os.close(fd)
    except OSError:  # nobody sleeps on it; or it is full of rings already
        pass


def ring_all(db: str, order: bytes = b"!") -> int:
    """Wake every worker, after a commit that may concern them; return how many were rung."""
    names = names_beside(db, ".bell")
    for name in names:
        ring(bell_path(db, name), order)
    return len(names)


# A worker writes two notes into its life file, for the process that recovers its job if it dies.
# First, as soon as a run starts, the first process of the run: a job may close its descriptors and
# clear its environment, but this process's session still shows what belongs to the run. Behind it,
# the trouble that keeps the worker from working.

RUN_NOTE, TROUBLE_NOTE = 200, 300  # bytes
RunNote = namedtuple("RunNote", "place seq run leader first last")
RunNote.__doc__ = """`place` is the machine's start and namespace of process ids (see Posix.place),
`seq` and `run` are the job and its run, and the rest is a Leader."""


def _note(life: int, start: int, size: int, text: str) -> None:
    try:
        write_at(life, start, text.encode("utf-8", "replace")[:size].ljust(size))
    except OSError:  # the disk is full, or the file is not there yet; a note is rarely needed
        pass


def note_run(life: int, note: RunNote) -> None:
    """Write the first process of a run into the life file that is open as `life`."""
    _note(life, 0, RUN_NOTE, " ".join(map(str, note)))


def note_trouble(life: int, text: str) -> None:
    """Write into the life file what keeps a worker from working; "": nothing does."""
    _note(life, RUN_NOTE, TROUBLE_NOTE, text)


def _read_life(db: str, name: str, start: int, size: int) -> str:
    note: bytes = read_beside(life_path(db, name), b"", read_between, start, start + size)
    return note.decode("utf-8", "replace").strip()


def leader_of(db: str, worker: str, seq: int, run: int) -> Leader:
    """Read the first process of a dead worker's run; NOBODY if that is not certain."""
    fields = _read_life(db, worker, 0, RUN_NOTE).split()
    if len(fields) != len(RunNote._fields):
        return NOBODY
    note = RunNote(fields[0], *map(int, fields[1:]))
    if note[:3] != (system.place(), seq, run):
        return NOBODY
    return Leader(*note[3:])


def trouble_of(db: str, worker: str) -> str:
    """Read what keeps a worker from working, or ""."""
    return _read_life(db, worker, RUN_NOTE, TROUBLE_NOTE)


# The log of detached pools is the standard output of all their processes.

LONGEST_LOG = 1 << 20  # bytes; a longer log is renamed to .1, which replaces the one before


def _put_aside(path: str) -> None:
    """Rename a log that is too long, unless another process is doing so."""
    fd = open_private(path, os.O_WRONLY)
    try:
        info = os.fstat(fd)
        if (info.st_size > LONGEST_LOG and system.try_lock(fd)
                and os.path.samestat(info, os.stat(path))):
            os.replace(path, path + ".1")
    except PermissionError:
        if WINDOWS:  # an idle worker still has the one before open
            os.ftruncate(fd, 0)
    finally:
        os.close(fd)


def renew_log(path: str) -> None:
    """Open the log anew if it is too long, was renamed or is gone; before each message."""
    own = os.fstat(1)
    try:
        if own.st_size <= LONGEST_LOG and os.path.samestat(own, os.stat(path)):
            return
    except OSError:
        pass
    try:
        _put_aside(path)
        fd = open_private(path, os.O_WRONLY | os.O_APPEND)
    except (OSError, QueueError):  # then the messages go on into the old log
        return
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)


# The output of runs.

GAP = b"\n[queuectl: %d bytes left out here]\n"
# Stands at the beginning of an output that the run's own processes have truncated.
EMPTIED = b"[queuectl: the job truncated this output; what it had printed before is lost]\n"


def head_and_tail(fd: int, limit: int) -> bytes:
    """Read an output file; if it has more than `limit` bytes only its head and its tail.

    A line between the two says how many bytes were left out. Raises OSError.
    """
    size = os.lseek(fd, 0, os.SEEK_END)
    if size <= limit:
        return read_between(fd, 0, size)
    half = limit // 2
    gap = GAP % (size - 2 * half)
    return read_between(fd, 0, half) + gap + read_between(fd, size - half, size)


def gap_of(output: bytes) -> int:
    """Return where the line about the gap stands in the output; -1 if there is no gap."""
    middle = len(output) // 2
    around = output[max(0, middle - 50):middle + 50]
    match = re.search(re.escape(GAP).replace(b"%d", rb"\d+"), around)
    return max(0, middle - 50) + match.start() if match else -1


class OutputFiles:
    """A slot: the two files that take a run's output. The locks on them are the run's token.

    A worker has several slots: it must hold the next run's token before the commit that records the
    last run, and it keeps the output of runs whose record is not on disk yet. The files are opened
    anew for each run. If a daemon that an earlier job left behind still holds one, `open` fails and
    a slot with a new number takes its place: so no late output lands in another job's record.
    """

    def __init__(self, db: str, worker: str, number: int):
        self.number = number
        self.paths = output_paths(db, worker, number)
        self.fds: list[int] = []
        self._start_anew()

    def _start_anew(self) -> None:
        # For each stream: up to which offset the middle was given back, the size at the last look,
        # and whether it was smaller than at the look before.
        self.punched, self.sizes, self.emptied = [0, 0], [0, 0], [False, False]

    def open(self) -> bool:
        """Open the files and take the token; False if another holds it. Raises OSError."""
        taken = False
        try:
            for path in self.paths:
                self.fds.append(open_private(path, os.O_RDWR | os.O_APPEND))
            taken = all(system.try_lock(fd) for fd in self.fds)
            return taken
        finally:
            if not taken:  # open copies would make this process look like one of that run
                self.close()

    def close(self) -> None:
        """Close the files: this process holds the token no more."""
        for fd in self.fds:
            os.close(fd)
        self.fds = []
        self._start_anew()

    def remove(self) -> None:
        """Close the files and delete them."""
        self.close()
        for path in self.paths:
            try:
                os.unlink(path)
            except OSError:  # open on Windows: it is removed with the worker's other files
                pass

    def read(self, limit: int) -> list[bytes]:
        """Read what the run has printed to stdout and stderr, at most `limit` bytes each."""
        return [self._read_one(index, limit) for index in (0, 1)]

    def _read_one(self, index: int, limit: int) -> bytes:
        try:
            self._look(index)
            output = head_and_tail(self.fds[index], limit)
            return EMPTIED + output if self.emptied[index] else output
        except OSError as error:
            return b"[queuectl: this output can't be read: %s]\n" % str(error.strerror).encode()

    def bound(self, limit: int) -> int:
        """Keep a run that prints without end from filling the disk; return the bytes printed.

        Head and tail stay; the middle is freed once it has more than `limit` bytes. If the file
        system knows no holes, the file is cut behind its head. Raises OSError.
        """
        total, half = 0, limit // 2
        for index, fd in enumerate(self.fds):
            size = self._look(index)
            total += size
            start = max(self.punched[index], half)
            end = (size - limit) // 4096 * 4096
            if end - start <= limit:
                continue
            if system.punch(fd, start, end):
                self.punched[index] = end
            else:
                os.ftruncate(fd, half)
                self.sizes[index] = half
        return total

    def _look(self, index: int) -> int:
        """Return the size of a stream; note if the job truncated it, as `> /dev/stderr` does."""
        size = os.fstat(self.fds[index]).st_size
        if size < self.sizes[index]:
            self.punched[index], self.emptied[index] = 0, True
        self.sizes[index] = size
        return size

    def empty(self) -> None:
        """Empty the files. Raises OSError."""
        for fd in self.fds:
            if os.lseek(fd, 0, os.SEEK_END):
                os.ftruncate(fd, 0)

    def clear(self, printed: bool) -> None:
        """After the commit that recorded the run: empty the files, then close them.

        `printed`: whether the files hold anything. Raises OSError.
        """
        if printed:
            self.empty()
        self.close()


# ═══ Schema ═══ the tables, their migrations, and statements that several functions use ══════
#
# A statement that only one method executes stands in that method (sections Database and Store).
# The others stand here, and those whose query plans the tests check. Nothing is newer than SQLite
# 3.8.3. Times are milliseconds since the epoch.
#
# Columns of `jobs`. `ready` is 1 if a worker may claim the job now. A job that waits for a time has
# ready = 0 and the time in `due`; when the time has come, the job is made ready. So the index that
# claims read, ordered exactly as claims are, holds no job that can't be claimed. In a ready job,
# `due` is the time since when it is ready, or null if it has been ready since it came. These two do
# not know about pauses: `switched_at` is when a queue was last paused or resumed. `waited` is how
# long a job waited for its last claim. `runs` counts all runs of a job, `attempts` those since it
# was enqueued or retried. `worker`, `slot` and `locked_at` are set while the job is processing;
# `worker` and `slot` also give the names of the run's output files.
#
# The key of a run is the seq of its job * 2**24 + the run's number.
#
# `contexts` stores once what a million jobs would otherwise repeat. `queues` counts the jobs of
# each queue by state, so that `status` need not count. Triggers keep these counts, except for
# inserted jobs: Intake counts those, once for a whole bulk.
#
# A row in `waits` says that one job waits for another. It is deleted when the awaited job is
# completed or the waiting job is forgotten. So it stays while both are dead, and also after an
# awaited job that died was forgotten.

# `history` counts what was done, for each queue: by minute (span 60), after two days by hour (span
# 3600), and in all (span 0). It does not depend on which jobs are kept, and the numbers of span 0
# never fall, as Prometheus demands of a counter. The runs of the current minute are counted in the
# row of their queue, which each run writes anyway; triggers move them to `history` when another
# minute begins or the queue is forgotten. If `history` knows a thousand queues, all others count as
# `other queues`, a name that no queue can have.

APPLICATION_ID = 0x71637431  # "qct1"

# The statements that migrate from version N to N + 1. Never edit one that was released.
MIGRATIONS = (
    (
        """CREATE TABLE contexts (
            id INTEGER PRIMARY KEY, cwd TEXT NOT NULL, path TEXT NOT NULL, umask INTEGER NOT NULL,
            UNIQUE (cwd, path, umask))""",
        """CREATE TABLE queues (
            name TEXT PRIMARY KEY, pending INTEGER NOT NULL DEFAULT 0,
            processing INTEGER NOT NULL DEFAULT 0, completed INTEGER NOT NULL DEFAULT 0,
            failed INTEGER NOT NULL DEFAULT 0, dead INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID""",
        """CREATE TABLE jobs (
            seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
            generated INTEGER NOT NULL, command TEXT NOT NULL, state TEXT NOT NULL,
            queue TEXT NOT NULL, priority INTEGER NOT NULL, ready INTEGER NOT NULL, due INTEGER,
            run_at INTEGER, timeout_seconds REAL, attempts INTEGER NOT NULL DEFAULT 0,
            runs INTEGER NOT NULL DEFAULT 0, max_retries INTEGER NOT NULL, backoff_base REAL,
            context INTEGER NOT NULL, env TEXT, created_at INTEGER NOT NULL,
            updated_at INTEGER NOT NULL, started_at INTEGER, finished_at INTEGER,
            exit_code INTEGER, last_error TEXT, cancel INTEGER NOT NULL DEFAULT 0,
            worker TEXT, slot INTEGER, locked_at INTEGER)""",
        "CREATE INDEX jobs_ready ON jobs (queue, priority, seq) WHERE ready = 1",
        "CREATE INDEX jobs_due ON jobs (due) WHERE ready = 0 AND due IS NOT NULL",
        "CREATE INDEX jobs_state ON jobs (state, seq)",
        """CREATE TRIGGER jobs_counted AFTER UPDATE OF state ON jobs BEGIN
            UPDATE queues SET
                pending = pending + (new.state = 'pending') - (old.state = 'pending'),
                processing = processing + (new.state = 'processing') - (old.state = 'processing'),
                completed = completed + (new.state = 'completed') - (old.state = 'completed'),
                failed = failed + (new.state = 'failed') - (old.state = 'failed'),
                dead = dead + (new.state = 'dead') - (old.state = 'dead')
            WHERE name = new.queue; END""",
        """CREATE TRIGGER jobs_discounted AFTER DELETE ON jobs BEGIN
            UPDATE queues SET
                pending = pending - (old.state = 'pending'),
                completed = completed - (old.state = 'completed'),
                failed = failed - (old.state = 'failed'), dead = dead - (old.state = 'dead')
            WHERE name = old.queue; END""",
        """CREATE TABLE runs (
            id INTEGER PRIMARY KEY, job INTEGER NOT NULL, run INTEGER NOT NULL,
            attempt INTEGER NOT NULL, state TEXT NOT NULL, started_at INTEGER NOT NULL,
            finished_at INTEGER NOT NULL, seconds REAL NOT NULL, exit_code INTEGER, error TEXT,
            worker TEXT NOT NULL, stdout BLOB, stderr BLOB)""",
        "CREATE INDEX runs_job ON runs (job, run)",
        """CREATE TABLE pools (
            name TEXT PRIMARY KEY, pid INTEGER NOT NULL, started_at INTEGER NOT NULL,
            workers INTEGER NOT NULL, queues TEXT, stop INTEGER NOT NULL DEFAULT 0,
            jobs_left INTEGER, died INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID""",
        """CREATE TABLE workers (
            name TEXT PRIMARY KEY, pool TEXT NOT NULL, pid INTEGER NOT NULL,
            started_at INTEGER NOT NULL) WITHOUT ROWID""",
        "CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
        # Counts the changes that workers must notice.
        "CREATE TABLE control (epoch INTEGER NOT NULL)",
        "INSERT INTO control VALUES (0)",
    ),
    # Queues can be paused and limited. The runs of a job stand together by their key, which saves
    # an index.
    (
        "ALTER TABLE queues ADD COLUMN paused INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE queues ADD COLUMN concurrency INTEGER",
        # All queues, those to come too.
        "ALTER TABLE control ADD COLUMN paused INTEGER NOT NULL DEFAULT 0",
        """CREATE TABLE new_runs (
            id INTEGER PRIMARY KEY, attempt INTEGER NOT NULL, state TEXT NOT NULL,
            started_at INTEGER NOT NULL, finished_at INTEGER NOT NULL, seconds REAL NOT NULL,
            exit_code INTEGER, error TEXT, worker TEXT NOT NULL, stdout BLOB, stderr BLOB)""",
        ("INSERT INTO new_runs SELECT job * 16777216 + run, attempt, state, started_at, "
         """finished_at, seconds,
            exit_code, error, worker, stdout, stderr FROM runs ORDER BY job, run"""),
        "DROP TABLE runs",
        "ALTER TABLE new_runs RENAME TO runs",
    ),
    # Jobs wait for others, have keys, policies and whole environments. A context's key is never
    # used again.
    (
        "ALTER TABLE jobs ADD COLUMN unique_key TEXT",
        "ALTER TABLE jobs ADD COLUMN policy TEXT",
        "ALTER TABLE jobs ADD COLUMN deferrals INTEGER NOT NULL DEFAULT 0",
        """CREATE UNIQUE INDEX jobs_unique ON jobs (unique_key)
            WHERE unique_key IS NOT NULL AND state <> 'completed' AND state <> 'dead'""",
        ("""CREATE TABLE waits (
            awaited INTEGER NOT NULL, job INTEGER NOT NULL, """
         "PRIMARY KEY (awaited, job)) WITHOUT ROWID"),
        "CREATE INDEX waits_job ON waits (job)",
        ("""CREATE TABLE new_contexts (
            id INTEGER PRIMARY KEY AUTOINCREMENT, cwd TEXT NOT NULL, path TEXT NOT NULL, """
         """umask INTEGER NOT NULL,
            jobs INTEGER NOT NULL DEFAULT 0, environ TEXT NOT NULL, """
         "UNIQUE (cwd, path, umask, environ))"),
        ("INSERT INTO new_contexts (id, cwd, path, umask, environ) "
         "SELECT id, cwd, path, umask, '' FROM contexts"),
        "DROP TABLE contexts",
        "ALTER TABLE new_contexts RENAME TO contexts",
        # An environment goes with the last of its jobs; in the others of this table, jobs are not
        # counted.
        """CREATE TRIGGER jobs_forgotten AFTER DELETE ON jobs BEGIN
            DELETE FROM waits WHERE awaited = old.seq; DELETE FROM waits WHERE job = old.seq;
            UPDATE contexts SET jobs = jobs - 1 WHERE id = old.context AND jobs > 0;
            DELETE FROM contexts WHERE id = old.context AND jobs = 0 AND environ <> ''; END""",
    ),
    # A queue has an id, which tells a copy from its original.
    (
        "ALTER TABLE control ADD COLUMN identity TEXT NOT NULL DEFAULT ''",
        "UPDATE control SET identity = lower(hex(randomblob(4)))",
        # Pools of older programs, whose names don't begin with that id.
        "ALTER TABLE control ADD COLUMN older TEXT NOT NULL DEFAULT ''",
        # A job that had to wait for others starts only when their records are on disk.
        "ALTER TABLE jobs ADD COLUMN chained INTEGER NOT NULL DEFAULT 0",
        "UPDATE jobs SET chained = 1 WHERE seq IN (SELECT job FROM waits)",
        # Whether its time was given as a delay, which begins anew if the clock is set back.
        "ALTER TABLE jobs ADD COLUMN delayed INTEGER NOT NULL DEFAULT 0",
        # A job that waited for a dead job, now forgotten, still knows that it was never completed.
        "DROP TRIGGER jobs_forgotten",
        """CREATE TRIGGER jobs_forgotten AFTER DELETE ON jobs BEGIN
            DELETE FROM waits WHERE job = old.seq;
            UPDATE contexts SET jobs = jobs - 1 WHERE id = old.context AND jobs > 0;
            DELETE FROM contexts WHERE id = old.context AND jobs = 0 AND environ <> ''; END""",
    ),
    # Cancelled is a state of its own. What a job was to run after stays known when it is met.
    # An environment is kept once for all folders, and both go with the last job that has them; so
    # does a queue. A job may have to begin by some time, and has a place among those that run.
    (
        "ALTER TABLE queues ADD COLUMN cancelled INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE jobs ADD COLUMN after_ids TEXT",
        "ALTER TABLE jobs ADD COLUMN after_any_ids TEXT",
        "ALTER TABLE jobs ADD COLUMN expires_at INTEGER",
        "ALTER TABLE jobs ADD COLUMN place INTEGER",
        # 1 if any end of the awaited job will do, as --after-any says.
        "ALTER TABLE waits ADD COLUMN either INTEGER NOT NULL DEFAULT 0",
        # The number of the last `run`; whether jobs that ended in vain must still end their
        # dependents.
        "ALTER TABLE control ADD COLUMN runs INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE control ADD COLUMN unsettled INTEGER NOT NULL DEFAULT 0",
        """UPDATE control SET runs = coalesce((SELECT max(CAST(substr(name, 5) AS INTEGER)) FROM queues
            WHERE name GLOB 'run-[0-9]*' AND NOT substr(name, 5) GLOB '*[^0-9]*'
            AND length(name) < 14), 0)""",
        "DROP INDEX jobs_unique",
        """CREATE UNIQUE INDEX jobs_unique ON jobs (unique_key) WHERE unique_key IS NOT NULL
            AND state <> 'completed' AND state <> 'dead' AND state <> 'cancelled'""",
        """CREATE INDEX jobs_expiring ON jobs (expires_at)
            WHERE expires_at IS NOT NULL AND state = 'pending' AND runs = 0""",
        "CREATE INDEX jobs_in_vain ON jobs (finished_at) WHERE state = 'dead'",
        "CREATE INDEX queues_busy ON queues (name) WHERE pending + failed > 0",
        "DROP TRIGGER jobs_counted",
        """CREATE TRIGGER jobs_counted AFTER UPDATE OF state ON jobs BEGIN
            UPDATE queues SET
                pending = pending + (new.state = 'pending') - (old.state = 'pending'),
                processing = processing + (new.state = 'processing') - (old.state = 'processing'),
                completed = completed + (new.state = 'completed') - (old.state = 'completed'),
                failed = failed + (new.state = 'failed') - (old.state = 'failed'),
                dead = dead + (new.state = 'dead') - (old.state = 'dead'),
                cancelled = cancelled + (new.state = 'cancelled') - (old.state = 'cancelled')
            WHERE name = new.queue; END""",
        "DROP TRIGGER jobs_discounted",
        """CREATE TRIGGER jobs_discounted AFTER DELETE ON jobs BEGIN
            UPDATE queues SET
                pending = pending - (old.state = 'pending'),
                completed = completed - (old.state = 'completed'),
                failed = failed - (old.state = 'failed'), dead = dead - (old.state = 'dead'),
                cancelled = cancelled - (old.state = 'cancelled')
            WHERE name = old.queue;
            DELETE FROM queues WHERE name = old.queue AND concurrency IS NULL AND NOT paused
                AND pending + processing + completed + failed + dead + cancelled = 0; END""",
        """DELETE FROM queues WHERE concurrency IS NULL AND NOT paused
            AND pending + processing + completed + failed + dead + cancelled = 0""",
        """UPDATE jobs SET after_ids = (SELECT group_concat(awaited.id) FROM waits
            JOIN jobs AS awaited ON awaited.seq = waits.awaited WHERE waits.job = jobs.seq)
            WHERE seq IN (SELECT job FROM waits)""",
        # An error that quotes stderr begins differently, even if stderr says the same words.
        """UPDATE jobs SET state = 'cancelled' WHERE state = 'dead' AND (
            last_error IN ('cancelled', 'cancelled before it ran again')
            OR substr(last_error, 1, 11) = 'cancelled: ')""",
        # And those that died because of those alone: that wait for none that is dead or gone, and
        # for none that died of such a job.
        """CREATE TEMP TABLE doomed (seq INTEGER PRIMARY KEY)""",
        """INSERT INTO doomed WITH RECURSIVE doomed_ones (seq) AS (
            SELECT seq FROM jobs WHERE state = 'dead' AND (
                NOT EXISTS (SELECT 1 FROM waits WHERE job = jobs.seq)
                OR EXISTS (SELECT 1 FROM waits WHERE job = jobs.seq
                    AND NOT EXISTS (SELECT 1 FROM jobs AS awaited WHERE awaited.seq = waits.awaited)))
            UNION SELECT job FROM waits JOIN doomed_ones ON awaited = doomed_ones.seq)
            SELECT seq FROM doomed_ones""",
        """UPDATE jobs SET state = 'cancelled',
            last_error = replace(last_error, ' is dead, and', ' was cancelled, and')
            WHERE state = 'dead' AND seq NOT IN (SELECT seq FROM doomed)""",
        "DROP TABLE doomed",
        "DROP TRIGGER jobs_forgotten",
        "CREATE TABLE environments (id INTEGER PRIMARY KEY, environ TEXT NOT NULL UNIQUE)",
        """INSERT INTO environments (environ)
            SELECT DISTINCT environ FROM contexts WHERE environ <> ''""",
        """CREATE TABLE new_contexts (
            id INTEGER PRIMARY KEY AUTOINCREMENT, environment INTEGER NOT NULL,
            cwd TEXT NOT NULL, path TEXT NOT NULL, umask INTEGER NOT NULL, jobs INTEGER NOT NULL,
            UNIQUE (environment, cwd, path, umask))""",
        """INSERT INTO new_contexts SELECT contexts.id, coalesce(environments.id, 0), cwd, path, umask, used
            FROM (SELECT context, count(*) AS used FROM jobs GROUP BY context)
            JOIN contexts ON contexts.id = context LEFT JOIN environments USING (environ)""",
        "DROP TABLE contexts",
        "ALTER TABLE new_contexts RENAME TO contexts",
        """CREATE TRIGGER jobs_forgotten AFTER DELETE ON jobs BEGIN
            DELETE FROM waits WHERE job = old.seq;
            UPDATE contexts SET jobs = jobs - 1 WHERE id = old.context;
            DELETE FROM contexts WHERE id = old.context AND jobs = 0; END""",
        """CREATE TRIGGER contexts_forgotten AFTER DELETE ON contexts BEGIN
            DELETE FROM environments WHERE id = old.environment AND NOT EXISTS (
                SELECT 1 FROM contexts WHERE environment = old.environment); END""",
    ),
    (
        # A run may end at the first job of its queue that dies: 1 until then, 2 while the jobs
        # that wait are being cancelled.
        "ALTER TABLE queues ADD COLUMN fail_fast INTEGER NOT NULL DEFAULT 0",
        # The queue of a run is forgotten with its last job, though it has a limit.
        "DROP TRIGGER jobs_discounted",
        """CREATE TRIGGER jobs_discounted AFTER DELETE ON jobs BEGIN
            UPDATE queues SET
                pending = pending - (old.state = 'pending'),
                completed = completed - (old.state = 'completed'),
                failed = failed - (old.state = 'failed'), dead = dead - (old.state = 'dead'),
                cancelled = cancelled - (old.state = 'cancelled')
            WHERE name = old.queue;
            DELETE FROM queues WHERE name = old.queue AND NOT paused
                AND (concurrency IS NULL OR (name GLOB 'run-[0-9]*'
                    AND NOT substr(name, 5) GLOB '*[^0-9]*'))
                AND pending + processing + completed + failed + dead + cancelled = 0; END""",
        # A job may have a shell of its own, by its path; NULL: the configured one.
        "ALTER TABLE jobs ADD COLUMN shell TEXT",
    ),
    # Counts of what was done; the time since when each job waits.
    (
        """CREATE TABLE history (
            span INTEGER NOT NULL, start INTEGER NOT NULL, queue TEXT NOT NULL,
            completed INTEGER NOT NULL, failed INTEGER NOT NULL, died INTEGER NOT NULL,
            run_seconds_sum REAL NOT NULL, run_seconds_max REAL NOT NULL,
            wait_seconds_sum REAL NOT NULL, wait_seconds_max REAL NOT NULL,
            PRIMARY KEY (span, start, queue)) WITHOUT ROWID""",
        "ALTER TABLE queues ADD COLUMN minute INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE queues ADD COLUMN runs_completed INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE queues ADD COLUMN runs_failed INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE queues ADD COLUMN runs_died INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE queues ADD COLUMN run_sum REAL NOT NULL DEFAULT 0",
        "ALTER TABLE queues ADD COLUMN run_max REAL NOT NULL DEFAULT 0",
        "ALTER TABLE queues ADD COLUMN wait_sum REAL NOT NULL DEFAULT 0",
        "ALTER TABLE queues ADD COLUMN wait_max REAL NOT NULL DEFAULT 0",
        # A row inserted into this view is added to its minute in `history`, and to the sum of all
        # time.
        """CREATE VIEW minutes AS SELECT name, name AS queue, minute, runs_completed, runs_failed,
            runs_died, run_sum, run_max, wait_sum, wait_max FROM queues""",
        """CREATE TRIGGER minutes_named INSTEAD OF INSERT ON minutes WHEN new.queue IS NULL BEGIN
            INSERT INTO minutes SELECT new.name, CASE
                WHEN new.name GLOB 'run-[0-9]*' AND NOT substr(new.name, 5) GLOB '*[^0-9]*'
                    THEN 'run'
                WHEN EXISTS (SELECT 1 FROM history
                        WHERE span = 0 AND start = 0 AND queue = new.name)
                    OR (SELECT count(*) FROM history WHERE span = 0) < 1000 THEN new.name
                ELSE 'other queues' END,
                new.minute, new.runs_completed, new.runs_failed, new.runs_died,
                new.run_sum, new.run_max, new.wait_sum, new.wait_max; END""",
        """CREATE TRIGGER minutes_added INSTEAD OF INSERT ON minutes
            WHEN new.queue IS NOT NULL BEGIN
            INSERT OR IGNORE INTO history VALUES (0, 0, new.queue, 0, 0, 0, 0, 0, 0, 0);
            INSERT OR IGNORE INTO history VALUES (60, new.minute, new.queue, 0, 0, 0, 0, 0, 0, 0);
            UPDATE history SET
                completed = completed + new.runs_completed, failed = failed + new.runs_failed,
                died = died + new.runs_died,
                run_seconds_sum = run_seconds_sum + new.run_sum,
                run_seconds_max = max(run_seconds_max, new.run_max),
                wait_seconds_sum = wait_seconds_sum + new.wait_sum,
                wait_seconds_max = max(wait_seconds_max, new.wait_max)
            WHERE span IN (0, 60) AND start IN (0, new.minute) AND queue = new.queue; END""",
        """CREATE TRIGGER minute_ended AFTER UPDATE OF minute ON queues
            WHEN old.minute <> new.minute AND old.minute BEGIN
            INSERT INTO minutes VALUES (old.name, NULL, old.minute, old.runs_completed,
                old.runs_failed, old.runs_died, old.run_sum, old.run_max, old.wait_sum,
                old.wait_max); END""",
        """CREATE TRIGGER queue_forgotten AFTER DELETE ON queues WHEN old.minute BEGIN
            INSERT INTO minutes VALUES (old.name, NULL, old.minute, old.runs_completed,
                old.runs_failed, old.runs_died, old.run_sum, old.run_max, old.wait_sum,
                old.wait_max); END""",
        # When a queue was paused or resumed last; how long a job waited before its last claim.
        "ALTER TABLE queues ADD COLUMN switched_at INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE control ADD COLUMN switched_at INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE jobs ADD COLUMN waited INTEGER NOT NULL DEFAULT 0",
        """UPDATE jobs SET due = updated_at
            WHERE ready = 1 AND due IS NULL AND (runs > 0 OR updated_at > created_at)""",
        "CREATE INDEX jobs_late ON jobs (queue, due) WHERE ready = 1 AND due IS NOT NULL",
    ),
    # Schedules make jobs again and again. `last` is the last time that was dealt with: a job was
    # made for it, or it was counted as skipped or missed. It is kept here, not found from the jobs,
    # because jobs are forgotten. `due` is when a worker looks next (NULL: paused). `job` is the
    # draft of the jobs. `newest` is the seq of the last job made, `others` (JSON) are those of
    # earlier ones that had not ended then. `zone` is the zone of the workers: see zone_here.
    (
        """CREATE TABLE schedules (
            name TEXT PRIMARY KEY, cron TEXT, every INTEGER, utc INTEGER NOT NULL,
            if_running TEXT NOT NULL, if_missed TEXT NOT NULL, queue TEXT NOT NULL,
            job TEXT NOT NULL, path TEXT NOT NULL, umask INTEGER NOT NULL, environ TEXT NOT NULL,
            created_at INTEGER NOT NULL, paused INTEGER NOT NULL DEFAULT 0,
            last INTEGER NOT NULL, due INTEGER, newest INTEGER, others TEXT NOT NULL DEFAULT '[]',
            made INTEGER NOT NULL DEFAULT 0, skipped INTEGER NOT NULL DEFAULT 0,
            missed INTEGER NOT NULL DEFAULT 0, skipped_in_row INTEGER NOT NULL DEFAULT 0)""",
        "CREATE INDEX schedules_due ON schedules (due)",
        "CREATE INDEX schedules_queue ON schedules (queue)",
        "ALTER TABLE control ADD COLUMN zone TEXT NOT NULL DEFAULT ''",
        # A queue with a schedule is not forgotten.
        "DROP TRIGGER jobs_discounted",
        """CREATE TRIGGER jobs_discounted AFTER DELETE ON jobs BEGIN
            UPDATE queues SET
                pending = pending - (old.state = 'pending'),
                completed = completed - (old.state = 'completed'),
                failed = failed - (old.state = 'failed'), dead = dead - (old.state = 'dead'),
                cancelled = cancelled - (old.state = 'cancelled')
            WHERE name = old.queue;
            DELETE FROM queues WHERE name = old.queue AND NOT paused
                AND (concurrency IS NULL OR (name GLOB 'run-[0-9]*'
                    AND NOT substr(name, 5) GLOB '*[^0-9]*'))
                AND pending + processing + completed + failed + dead + cancelled = 0
                AND NOT EXISTS (SELECT 1 FROM schedules WHERE queue = old.queue); END""",
    ),
    # A queue may hand its jobs to an engine: see EngineRun. A job that is processing keeps the
    # ender that its run began with, and the random part of its run's name (null: no engine).
    # After `rests` jobs in a row that the engine did not take, for the reason `rest_why`, the queue
    # rests until `rest_until`. Then it starts one job, whose seq is in `probe`.
    (
        "ALTER TABLE queues ADD COLUMN runner TEXT",
        "ALTER TABLE queues ADD COLUMN ender TEXT",
        "ALTER TABLE queues ADD COLUMN rests INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE queues ADD COLUMN rest_until INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE queues ADD COLUMN rest_why TEXT",
        "ALTER TABLE queues ADD COLUMN probe INTEGER",
        "CREATE INDEX queues_resting ON queues (rest_until) WHERE rests > 0",
        "ALTER TABLE jobs ADD COLUMN ender TEXT",
        "ALTER TABLE jobs ADD COLUMN word TEXT",
        # A queue with a runner is not forgotten, unless it is that of a run.
        "DROP TRIGGER jobs_discounted",
        """CREATE TRIGGER jobs_discounted AFTER DELETE ON jobs BEGIN
            UPDATE queues SET
                pending = pending - (old.state = 'pending'),
                completed = completed - (old.state = 'completed'),
                failed = failed - (old.state = 'failed'), dead = dead - (old.state = 'dead'),
                cancelled = cancelled - (old.state = 'cancelled')
            WHERE name = old.queue;
            DELETE FROM queues WHERE name = old.queue AND NOT paused
                AND (coalesce(concurrency, runner) IS NULL OR (name GLOB 'run-[0-9]*'
                    AND NOT substr(name, 5) GLOB '*[^0-9]*'))
                AND pending + processing + completed + failed + dead + cancelled = 0
                AND NOT EXISTS (SELECT 1 FROM schedules WHERE queue = old.queue); END""",
    ),
)
SCHEMA_VERSION = len(MIGRATIONS)
SET_VERSION = "PRAGMA user_version = %d" % SCHEMA_VERSION
SET_APPLICATION = "PRAGMA application_id = %d" % APPLICATION_ID
GET_VERSION = "PRAGMA user_version"
GET_APPLICATION = "PRAGMA application_id"
COUNT_TABLES = "SELECT count(*) FROM sqlite_master"
CHECKPOINT = "PRAGMA wal_checkpoint"

BEGIN = "BEGIN IMMEDIATE"

GET_IDENTITY = "SELECT identity FROM control"
RENEW_IDENTITY = "UPDATE control SET identity = lower(hex(randomblob(4))), older = ''"
KEEP_OLDER = """UPDATE control SET older = coalesce((SELECT group_concat(DISTINCT worker) FROM jobs
    WHERE state = 'processing'), '')"""

NEXT_EPOCH = "UPDATE control SET epoch = epoch + 1"
NOW = "(julianday('now') - 2440587.5) * 86400000"
# The second is when a queue that rests now may start a job again. A time that has passed must not
# be here: workers would look again and again while something else holds up the queue.
PULSE = """SELECT epoch, (SELECT min(due) FROM jobs WHERE ready = 0 AND due IS NOT NULL),
    (SELECT min(expires_at) FROM jobs INDEXED BY jobs_expiring
        WHERE expires_at IS NOT NULL AND state = 'pending' AND runs = 0),
    (SELECT min(rest_until) FROM queues INDEXED BY queues_resting
        WHERE rests > 0 AND probe IS NULL AND rest_until > %s),
    (SELECT min(due) FROM schedules),
    unsettled FROM control""" % NOW
ALL_POOLS = """SELECT name, pid, started_at, workers, queues, stop, died FROM pools
    ORDER BY started_at"""
ALL_WORKERS = """SELECT workers.name AS name, pool, pid, workers.started_at AS started_at,
    jobs.id AS job, queue, jobs.command AS command, jobs.started_at AS job_started_at
    FROM workers LEFT JOIN jobs ON jobs.state = 'processing' AND jobs.worker = workers.name
    ORDER BY workers.started_at, workers.name"""
GET_POOL = "SELECT stop, jobs_left, died FROM pools WHERE name = ?"
ADD_QUEUE = "INSERT OR IGNORE INTO queues (name) VALUES (?)"
FORGET_QUEUE = """DELETE FROM queues WHERE name = ? AND NOT paused
    AND coalesce(concurrency, runner) IS NULL
    AND pending + processing + completed + failed + dead + cancelled = 0
    AND NOT EXISTS (SELECT 1 FROM schedules WHERE queue = queues.name)"""

WITH_ID = "SELECT seq, id FROM jobs WHERE id = ?"
ERROR_OF_DEAD = "SELECT last_error FROM jobs WHERE id = ? AND state = 'dead'"
HELD_JOBS = """SELECT seq, id, command, queue, attempts, runs, max_retries, timeout_seconds,
    backoff_base, context, env, policy, deferrals, chained, shell, place, worker, slot,
    started_at, cancel, NULL AS runner, ender, word,
    started_at - waited AS since FROM jobs WHERE state = 'processing'"""
# The time since when a ready or due job could have run.
SINCE = "max(coalesce(due, created_at), switched_at, (SELECT switched_at FROM control))"
WAITING_SINCE = "SELECT id, command, queue, %s AS ready_at FROM " % SINCE
MAY_RUN = "AND NOT paused AND NOT (SELECT paused FROM control)"
# The job that waits longest, one statement for each kind: jobs that were ready when they came (the
# first of each queue and priority); jobs that became ready later; and jobs whose time has come,
# which the next claim will make ready.
OLDEST_WAITING = (
    """WITH RECURSIVE groups (name, switched_at, priority) AS (
        SELECT name, switched_at, (SELECT min(priority) FROM jobs WHERE ready = 1 AND queue = name)
            FROM queues INDEXED BY queues_busy WHERE pending + failed > 0 %s
        UNION ALL SELECT name, switched_at, (SELECT min(jobs.priority) FROM jobs
            WHERE ready = 1 AND queue = name AND jobs.priority > groups.priority)
            FROM groups WHERE priority IS NOT NULL)
    %s groups CROSS JOIN jobs ON seq = (
        SELECT seq FROM jobs WHERE ready = 1 AND queue = name AND jobs.priority = groups.priority
        AND due IS NULL ORDER BY seq LIMIT 1)
    ORDER BY ready_at LIMIT 1""" % (MAY_RUN, WAITING_SINCE),
    """%s queues INDEXED BY queues_busy CROSS JOIN jobs ON seq = (
        SELECT seq FROM jobs WHERE ready = 1 AND due IS NOT NULL AND queue = name
        ORDER BY due LIMIT 1)
    WHERE pending + failed > 0 %s ORDER BY ready_at LIMIT 1""" % (WAITING_SINCE, MAY_RUN),
    """%s jobs INDEXED BY jobs_due CROSS JOIN queues ON name = queue
    WHERE ready = 0 AND due IS NOT NULL AND due <= ? %s ORDER BY due LIMIT 1"""
    % (WAITING_SINCE, MAY_RUN))
NEXT_DUE = """SELECT id, command, due FROM jobs WHERE ready = 0 AND due > ?
    ORDER BY due LIMIT 1"""
# The first counts a run in its queue's row, if the row is about the minute in which the run ended.
# Otherwise the second begins that minute.
COUNT_RUN = """UPDATE queues SET runs_completed = runs_completed + ?, runs_failed = runs_failed + ?,
    runs_died = runs_died + ?, run_sum = run_sum + ?, run_max = max(run_max, ?),
    wait_sum = wait_sum + ?, wait_max = max(wait_max, ?) WHERE name = ? AND minute = ?"""
BEGIN_MINUTE = """UPDATE queues SET runs_completed = 0, runs_failed = 0, runs_died = 0,
    run_sum = 0, run_max = 0, wait_sum = 0, wait_max = 0, minute = ? WHERE name = ?"""
SUMS = """sum(completed) AS completed, sum(failed) AS failed, sum(died) AS died,
    sum(run_seconds_sum) AS run_seconds_sum, max(run_seconds_max) AS run_seconds_max,
    sum(wait_seconds_sum) AS wait_seconds_sum, max(wait_seconds_max) AS wait_seconds_max"""
# The name under which a queue is counted: `run` for every run; `other queues` beyond a thousand.
COUNTED_AS = """CASE WHEN name GLOB 'run-[0-9]*' AND NOT substr(name, 5) GLOB '*[^0-9]*' THEN 'run'
    WHEN EXISTS (SELECT 1 FROM history WHERE span = 0 AND start = 0 AND queue = name)
        OR (SELECT count(*) FROM history WHERE span = 0) < 1000 THEN name
    ELSE 'other queues' END"""
# The history from one time to another; from 0 to 0 it is the sum of all time.
DONE = """(SELECT * FROM history WHERE span IN (0, 60, 3600) AND start BETWEEN ? AND ?
    UNION ALL SELECT 60, minute, %s, runs_completed, runs_failed, runs_died,
        run_sum, run_max, wait_sum, wait_max FROM queues
    WHERE minute BETWEEN ? AND ? OR (minute AND ? = 0))""" % COUNTED_AS
NEXT_SCHEDULED = "SELECT name, job, due FROM schedules WHERE due > ? ORDER BY due LIMIT 1"
RUNS_OF_JOB = "FROM runs WHERE id BETWEEN ? * 16777216 AND ? * 16777216 + 16777215"

ADD_JOB = """INSERT INTO jobs (id, generated, command, state, queue, priority, ready, due, run_at,
    timeout_seconds, max_retries, backoff_base, context, env, created_at, updated_at, delayed,
    expires_at, shell) VALUES (?, ?, ?, 'pending', ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"""
# This changes nothing if another unfinished job has the same `unique` key.
RETRY = """UPDATE OR IGNORE jobs SET state = 'pending', attempts = 0, deferrals = 0, updated_at = ?,
    expires_at = CASE WHEN expires_at > ? THEN expires_at END,
    ready = coalesce(run_at, 0) <= ? AND NOT EXISTS (SELECT 1 FROM waits WHERE job = jobs.seq),
    due = CASE WHEN NOT EXISTS (SELECT 1 FROM waits WHERE job = jobs.seq)
        THEN max(coalesce(run_at, 0), ?) END
    WHERE seq = ? AND state IN ('completed', 'dead', 'cancelled')"""
RELEASE_JOB = """UPDATE jobs SET ready = run_at IS NULL OR run_at <= ?,
    due = max(coalesce(run_at, 0), ?) WHERE seq = ? AND state = 'pending'
    AND NOT EXISTS (SELECT 1 FROM waits WHERE job = jobs.seq)"""
HOOKED = """SELECT seq, id, queue, command, state, attempts, max_retries, exit_code, last_error,
    updated_at FROM jobs """

# CROSS JOIN makes jobs the outer loop, in the order of its key.
SELECT_JOBS = """SELECT seq, jobs.id AS id, command, shell, state, queue, priority, run_at,
    timeout_seconds, attempts, max_retries, backoff_base, cwd, env, policy,
    unique_key AS "unique", after_ids AS after, after_any_ids AS after_any, expires_at,
    created_at, updated_at, started_at, finished_at,
    CASE WHEN state = 'failed' THEN due END AS next_retry_at, exit_code, last_error,
    worker AS locked_by, locked_at, runs, slot, cancel, generated, context, due, ready, word
    FROM jobs CROSS JOIN contexts ON contexts.id = jobs.context """


@lru_cache(16)
def next_job(queues: int) -> str:
    """Return the statement that finds the next job to claim.

    Of the first ready jobs of all queues it is the one with the lowest (priority, seq). `queues` is
    the number of queue names that are the statement's parameters; 0 means all queues. Each queue
    costs one seek in jobs_ready, however many jobs wait. A job counts against its queue's limit
    until its run is recorded, also if its worker is dead: its processes may still live. A queue
    whose engine took no job rests, and then tries one; if the clock was set back, at once. That is
    the one that was tried longest ago: the engine may take any but the first.
    """
    # Skips queues without waiting jobs, of which there may be thousands.
    from_busy, among = "INDEXED BY queues_busy", ""
    if queues:
        from_busy, among = "", "AND name IN (%s)" % ", ".join("?" * queues)
    return """SELECT seq, id, command, queue, attempts + 1, runs + 1, max_retries,
        timeout_seconds, backoff_base, context, env, policy, deferrals, chained, shell,
        runner, queues.ender, %s
        FROM queues %s CROSS JOIN jobs ON seq = CASE WHEN rests = 0
            THEN (SELECT seq FROM jobs WHERE ready = 1 AND queue = queues.name
                ORDER BY priority, seq LIMIT 1)
            ELSE (SELECT seq FROM jobs WHERE ready = 1 AND queue = queues.name
                ORDER BY updated_at, seq LIMIT 1) END
        WHERE pending + failed > 0 AND NOT paused AND NOT (SELECT paused FROM control)
            AND (concurrency IS NULL OR processing < concurrency)
            AND (rests = 0 OR (probe IS NULL AND rest_until - %s NOT BETWEEN 0 AND 60000)) %s
        ORDER BY priority, seq LIMIT 1""" % (SINCE, from_busy, NOW, among)


# When a job ended or, if it has not, when it was last changed.
TIME_OF = """CASE WHEN state IN ('completed', 'dead', 'cancelled') THEN finished_at
    ELSE updated_at END"""


def terms_of(selection: Selection) -> tuple[str, list[Any]]:
    """Return the end of a WHERE that selects jobs (it begins with AND), and its values.

    A single state is read by its index; several are read by the key, for this needs no sorting
    (the `+` rules the index out).
    """
    state = "state" if len(selection.states) == 1 else "+state"
    terms, values = "", []
    for column, names in ((state, selection.states), ("queue", selection.queues)):
        if names:
            terms += " AND %s IN (%s)" % (column, ", ".join("?" * len(names)))
            values += names
    for term, value in (
            ("instr(command || char(10) || jobs.id, ?)", selection.grep),
            ("instr(last_error, ?)", selection.error),
            (TIME_OF + " >= ?", selection.since),
            (TIME_OF + " <= ?", selection.before),
            ("seq >= ?", selection.first)):
        if value is not None:
            terms += " AND " + term
            values.append(value)
    return terms, values


def select_jobs(selection: Selection, newest: bool, count: int) -> tuple[str, list[Any]]:
    """Return the statement for a page of `count` jobs, and its values but the first.

    The caller puts the seq to start from before them.
    """
    bound, order = ("<", "DESC") if newest else (">", "ASC")
    terms, values = terms_of(selection)
    statement = "%s WHERE seq %s ?%s ORDER BY seq %s LIMIT %d" % (
        SELECT_JOBS, bound, terms, order, count)
    return statement, values


# ═══ Database ═══ the file: trust, opening, the mutex, commits, syncing, copies ══════════════
#
# Only SQLite ever opens the database file. If this process opened it too and closed that
# descriptor, the kernel would drop the locks that SQLite holds on it. The log and the lock file may
# be opened.
#
# A writer takes these steps (Connection.begin and end):
#
#   1. Take the mutex, a lock on the lock file beside the database. The kernel serves waiting
#      writers in turn; SQLite's own waiting is unfair, and deaf to signals. The mutex also keeps a
#      write from racing a checkpoint, by which SQLite before 3.51.3 could lose commits. It is held
#      to the end.
#   2. Check that the file is still the same. A write to a deleted or replaced file would be lost.
#   3. Look for the mark of a failed sync. If it is there, write the log again: otherwise this
#      commit would follow frames that never reached the disk, and would be lost with them.
#   4. At the first write, check whether this is a copy. A copy gets an id of its own, so that its
#      workers never end the processes of the original.
#   5. BEGIN IMMEDIATE, the statements, COMMIT. A deferred transaction would fail when it turns into
#      a write after another program has written.
#   6. Look for the mark again. Workers sync without the mutex, so a sync may have failed since step
#      3, and this commit may follow frames that never reached the disk.
#   7. Free the mutex, whatever went wrong before.
#
# In commands COMMIT syncs the log (synchronous=FULL). Workers sync later (defer_sync), after they have
# freed the mutex and started the next job. Until then they do not report the commit.
#
# A reader takes no mutex. It fetches every answer whole: an open cursor would keep checkpoints from
# finishing.
#
# Opening takes the mutex only to migrate, or to look again if the first look found trouble: another
# process may have been making the database at that moment.

PATIENCE = 30.0  # seconds that a command waits for the mutex before it gives up
WAIT_TOLD = 5.0  # seconds after which it tells that it is waiting

# Patterns of SQLite's errors, each with what it means to the user and what to do next.
MEANINGS = (
    ("locked|busy", Unavailable,
     "%(path)s is locked by another program; try again when it has finished"),
    ("full", Unavailable, "no space is left for %(path)s; free some and try again"),
    ("disk I/O", Unavailable,
     "%(path)s can't be read or written (%(text)s); check the disk and its quota"),
    ("readonly|read-only", Unavailable,
     "%(path)s can't be written: it or its folder is read-only"),
    ("not a database|encrypted", QueueError,
     "%(path)s is not a queuectl database, and was not changed; name another with --db"),
    ("malformed", QueueError,
     ("%(path)s is damaged (%(text)s); move it, %(path)s-wal and %(path)s-shm away together, "
      "then `queuectl restore BACKUP` or start anew")),
)


def shortage_of_descriptors() -> str:
    """Return why no file can be opened now, or "": SQLite does not say it."""
    try:
        os.close(os.dup(0))
    except OSError as error:
        return str(error.strerror)
    return ""


def translate(error: sqlite3.Error, path: str) -> QueueError:
    """Turn an error of SQLite into one that tells the user what to do next."""
    text = str(error)
    for words, kind, meaning in MEANINGS:
        if re.search(words, text):
            return kind(meaning % {"path": path, "text": text})
    if "unable to open" not in text:
        return QueueError("%s: %s" % (path, text))
    if exists(path):
        advice = shortage_of_descriptors() or "check that you may use it"
        return Unavailable("%s can't be opened: %s" % (path, advice))
    return QueueError("%s can't be opened; check that the path exists and that you may use it"
                      % path)


def open_as_it_is(path: str) -> sqlite3.Connection:
    """Open a database for reading, without its log and without any lock.

    See https://www.sqlite.org/uri.html.
    """
    for mark in "%?#":
        path = path.replace(mark, "%%%02x" % ord(mark))
    return sqlite3.connect("file:%s?immutable=1" % path, uri=True, isolation_level=None)


def value_in_file(path: str, statement: str) -> Any:
    """Return the first value of a statement, reading the file as it is; None if unreadable."""
    db = open_as_it_is(path)
    try:
        row = db.execute(statement).fetchone() or (None,)
        return row[0]
    except sqlite3.Error:
        return None
    finally:
        db.close()


def is_queue(path: str) -> bool:
    """Tell whether a file is the database of a queue."""
    return bool(value_in_file(path, GET_APPLICATION) == APPLICATION_ID)


def has_log(db: str) -> bool:
    """Tell whether the log beside a database holds anything.

    The process that closes the database last removes the log; that may happen at any moment.
    """
    try:
        return getsize(db + "-wal") > 0
    except FileNotFoundError:
        return False


# Refused: databases that others could have written, and places where locks don't hold.


def make_folder(folder: str) -> None:
    """Make the folder of a database, for this user alone.

    Raises QueueError if that fails, or if the folder is on a network file system, where SQLite's
    locks don't hold.
    """
    try:
        if not isdir(folder):
            os.makedirs(folder, 0o700, exist_ok=True)
            sync_folder(dirname(folder))
    except OSError as error:
        raise QueueError("the folder %s can't be made: %s; name another database with --db"
                         % (folder, error.strerror)) from None
    kind = system.network_file_system(folder)
    if kind:
        raise QueueError("%s is on a network file system (%s), where locks can't be trusted; name "
                         "a database on a local disk with --db" % (folder, kind))


def _distrust(path: str) -> str:
    try:
        return system.distrust(path)
    except FileNotFoundError:  # then there is nothing to distrust; the folder is checked too
        return ""


def distrust_of(db: str) -> str:
    """Return why others could have written a database, or "" if they could not.

    If there is a reason, nothing in the database may be executed.

    A user who can write to the database, to a file beside it or to its folder can have commands
    run as this user. A user who can write to a folder above can put another in its place.
    """
    reasons = [_distrust(path) for path in files_of(db)]
    folder, above = dirname(db), False
    try:
        # Who may write to / can replace Python itself.
        while not above or folder != dirname(folder):
            reasons.append(system.distrust(folder, above))
            folder, above = dirname(folder), True
    except FileNotFoundError:  # moved away: whoever did that can put another file there
        return "%s was moved away while it was checked" % folder
    return next(filter(None, reasons), "")


def refuse_untrusted(db: str) -> None:
    """Raise QueueError if others could change what is executed, or if locks can't be trusted.

    All code that executes a command of a database, or ends processes that it names, calls this
    first. It makes a missing folder, so that nobody can put another in its place.
    """
    make_folder(dirname(db))
    reason = distrust_of(db)
    if reason:
        raise QueueError("nothing that others could write is executed: %s" % reason)


def prepare_place(path: str) -> None:
    """Before a database is made: make a private folder for it, on a disk of this machine.

    Raises QueueError if a database was here before and its worker still lives or its log is left.
    """
    make_folder(dirname(path))
    alive, log = anyone_alive(path), exists(path + "-wal")
    if exists(path):  # another process has just made it
        return
    if alive:
        raise QueueError("%s is gone, but its workers still live; let them end before a new one "
                         "is made" % path)
    if log:
        raise QueueError("%s is gone, but its log is still there; `queuectl restore BACKUP` or move "
                         "%s-wal away" % (path, path))


NOT_A_FILE = "%s is not a file; name a database with --db"


def refuse_strange_file(path: str) -> None:
    """Raise QueueError for a path that SQLite would open, but that is no sound database.

    SQLite would make a new database of an empty file, follow links, and keep a log for each name.
    """
    info, folder = os.stat(path), folder_path(path)
    if not stat.S_ISREG(info.st_mode):
        raise QueueError(NOT_A_FILE % path)
    if info.st_nlink > 1:
        raise QueueError("%s has %d names (hard links), each with a log and a lock of its own, "
                         "which would damage it; `find / -xdev -samefile %s` lists them: remove "
                         "the others, and make copies with `queuectl backup FILE`"
                         % (path, info.st_nlink, shell_word(path)))
    if system.is_mount_point(path):
        raise QueueError("%s is mounted as a single file, so other processes would use another "
                         "log and lock; mount the folder that it is in" % path)
    for beside in (path + "-wal", path + "-shm", path + "-journal", folder):
        if is_link(beside):
            raise QueueError("%s is a link, which is not followed; remove it" % beside)
    if info.st_size == 0 and isdir(folder):
        raise QueueError("%s is empty, but was a queue before; restore a backup, or move it "
                         "and %s away" % (path, folder))


def advice_on_owner(path: str) -> str:
    """If another user owns a file of a database, say so and what to do; else return "".

    This happens after a command with `sudo`, for instance.
    """
    folder = dirname(path)
    for file in (folder, path, mutex_path(path)):
        if not exists(file):
            continue
        owner = os.stat(file).st_uid
        if owner != system.user:
            return ("; %s belongs to the user with the id %d (`sudo chown -R %d %s` would give it "
                    "to you)" % (file, owner, system.user, shell_word(folder)))
    return ""


class Identity:
    """The identity of a database: which file it is, and which queue.

    The file's identity is its device and inode, which change if the database is replaced while it
    is open. The queue's identity is an id, kept in the database; the names of its workers, and so
    the QUEUECTL_RUN of its runs, begin with it. The lock file beside the database notes both. If
    they disagree, the database counts as a copy: the file or its whole folder was copied, the file
    was moved without its lock file, or it replaced another database. The first write
    gives it an id of its own, so that the workers of a copy never end the original's processes.
    """

    queue = ""  # known after the first write
    next_look, index, changed_at = 0.0, 0, 0
    # If true, the database must not even be closed: SQLite would write the log into another file.
    replaced = False

    def __init__(self, path: str, mutex: int):
        self.path, self.mutex = path, mutex
        # Descriptors of files that must not be deleted while the database is in use.
        self.watched = [mutex]
        self.file = self._look()

    def _look(self) -> tuple[int, int]:
        try:
            info = os.stat(self.path)
        except FileNotFoundError:
            raise self._trouble("was deleted") from None
        except OSError as error:
            raise Unavailable("%s can't be used: %s" % (self.path, error.strerror)) from error
        return info.st_dev, info.st_ino

    def _trouble(self, what: str) -> QueueError:
        return QueueError("%s %s while it was in use; nothing more is written" % (self.path, what))

    def check(self) -> None:
        """Raise QueueError if the database was deleted or replaced since it was opened.

        At most ten times a second it also checks whether the lock file or the index of the log was
        deleted, and whether the database was overwritten.
        """
        if self._look() != self.file:
            raise self._trouble("was replaced")
        now = monotonic()
        if now < self.next_look:
            return
        self.next_look = now + 0.1
        linked = all(os.fstat(fd).st_nlink for fd in self.watched)
        if not linked or self._inode_of_index() != self.index:
            self.replaced = True
            raise QueueError("files beside %s were deleted while it was in use; nothing more is "
                             "written" % self.path)
        # A checkpoint has written to it, or somebody overwrites it.
        changed_at = os.stat(self.path).st_mtime_ns
        touched = self.changed_at not in (0, changed_at)
        if self.queue and touched and self._is_another(self.queue):
            self.replaced = True
            raise self._trouble("was overwritten")
        self.changed_at = changed_at

    def watch(self, fd: int) -> None:
        """Have `check` notice if this file, or the index of SQLite's log, is deleted."""
        self.watched.append(fd)
        self.index = self._inode_of_index()

    def _inode_of_index(self) -> int:
        if not self.watched[1:]:
            return 0
        try:
            return os.stat(self.path + "-shm").st_ino
        except FileNotFoundError:
            return -1

    def _noted(self) -> list[bytes]:
        """Read the queue's id, the device and the inode from the lock file.

        Older programs noted only the inode.
        """
        return read_between(self.mutex, 0, 51).split()

    def check_log(self) -> None:
        """Raise QueueError if this database replaced another one whose workers or log remain.

        SQLite would apply the old log to the new database. The device's number alone proves
        nothing: it may change when the machine restarts.
        """
        path, noted, log = self.path, self._noted(), has_log(self.path)
        overwritten = log and len(noted) == 3 and self._is_another(noted[0].decode())
        if log and self._lacks_index():
            raise QueueError("%s-shm was removed while workers live; they stop when they see it"
                             % path)
        if (not noted or self.same_file()) and not overwritten:
            return
        if anyone_alive(path):
            raise QueueError("%s was replaced while workers of the old one live; they stop when "
                             "they see it" % path)
        if log:
            raise QueueError("%s was replaced, but a log stands beside it: move %s-wal and %s-shm "
                             "away if they are the old one's, or remove %s if they were copied "
                             "with it" % (path, path, path, mutex_path(path)))

    def _lacks_index(self) -> bool:
        """Tell whether workers live although the index of the log is gone.

        The process that closes the database last removes the index, then the log; perhaps just now.
        """
        path = self.path
        for _ in range(10):
            if exists(path + "-shm") or not has_log(path) or not anyone_alive(path):
                return False
            sleep(0.05)
        return True

    def _is_another(self, queue: str) -> bool:
        """Tell whether the file was overwritten in place with another queue than the noted one.

        The file is read as it is, without its log. A write meanwhile can make the file look damaged,
        so damage proves nothing. But the file won't show the id of another queue three times.
        """
        for _ in range(3):
            if value_in_file(self.path, GET_IDENTITY) in (queue, None):
                return False
            sleep(0.05)
        return True

    def settle(self, queue: str,
               renew: Callable[[], str] | None = None) -> None:
        """Under the mutex, before the first write: note which queue this is.

        `renew` gives a copy a new id. While workers live, the database is taken for the original: a
        device that differs from the note proves nothing, for containers may number devices
        differently.
        """
        if renew and self.is_copy(queue):
            queue = renew()
        if self._noted() != self._note(queue).split():
            write_at(self.mutex, 0, self._note(queue))
        self.queue = queue

    def is_copy(self, queue: str) -> bool:
        """Tell whether this is a copy of `queue` that has no id of its own yet."""
        noted = self._note(queue).split()
        return self._noted() != noted and not anyone_alive(self.path)

    def _note(self, queue: str) -> bytes:
        """Write the queue's id, device and inode as 51 bytes."""
        return b"%-8.8b %20d %20d\n" % (queue.encode(), *self.file)

    def same_file(self) -> bool:
        """Tell whether the note in the lock file is about this file."""
        return self._noted()[-1:] == [b"%d" % self.file[1]]


def wal_checksum(data: bytes, sums: tuple[int, int],
                 order: str) -> tuple[int, int]:
    """Return the checksum of SQLite's log over `data`, continued from `sums`.

    `order` is the byte order (`<` or `>`) of its 32-bit words.
    """
    from struct import unpack
    first, second = sums
    words = iter(unpack("%s%dI" % (order, len(data) // 4), data))
    for even, odd in zip(words, words):
        first = (first + even + second) & 0xFFFFFFFF
        second = (second + odd + first) & 0xFFFFFFFF
    return first, second


class Log:
    """SQLite's log (-wal), and whether it is on the disk.

    Commits of workers don't wait for the disk. One call syncs the log later, before anything is
    told of them. If that call fails, the kernel forgets the pages it could not write: it takes them
    for clean, and a later sync succeeds without them. So the process whose sync failed leaves a
    mark in the lock file. While the mark stands, no process commits, tells of a commit, or lets
    SQLite copy the log into the database (a checkpoint, at the end of a commit or when the last
    connection closes). Before any of that, one process must take the mutex, write the log's frames
    over themselves (so that the kernel takes the pages for dirty again), and sync them.
    (The kernel: https://wiki.postgresql.org/wiki/Fsync_Errors; the format of the log:
    https://www.sqlite.org/fileformat2.html#walformat)
    """

    MARK_AT = 63  # in the lock file, behind the note of Identity
    HEADER, FRAME_HEADER = 32, 24  # bytes
    fd = -1  # opened when it is first needed

    def __init__(self, path: str, mutex: int):
        self.path, self.mutex = path + "-wal", mutex
        self.index = path + "-shm"

    def open(self) -> int:
        """Return the descriptor of the log, opening it if need be."""
        if self.fd < 0:
            self.fd = open_beside(self.path, os.O_RDWR)
        return self.fd

    def failed(self) -> bool:
        """Tell whether any process's sync failed and the log was not written again since."""
        return read_between(self.mutex, self.MARK_AT, self.MARK_AT + 1) == b"!"

    def mark(self, sign: bytes) -> None:
        """Set the mark (`!`), or remove it (a blank)."""
        write_at(self.mutex, self.MARK_AT, sign)

    def sync(self) -> None:
        """Sync the log: after this the disk has every commit so far.

        If that fails, sets the mark and raises OSError.
        """
        self.open()
        try:
            system.sync(self.fd)
        except OSError:
            self.mark(b"!")
            raise

    def write_again(self) -> None:
        """Under the mutex: write all committed frames over themselves, and sync them.

        Raises OSError if the disk still can't take them, QueueError if some are lost.
        """
        end = self.cut()
        if not self._is_sound(end):
            raise QueueError("the disk has lost a part of %s, which it failed to sync before: "
                             "stop the workers, keep a copy of all files, and restore a backup"
                             % self.path)
        size = 1 << 16
        for start in range(0, end, size):
            part = read_between(self.fd, start, min(end, start + size))
            write_at(self.fd, start, part)
        self.sync()
        self.mark(b" ")

    def cut(self) -> int:
        """Under the mutex: end the log behind the last committed frame; return the offset.

        It zeroes the header of the next frame. A commit whose sync failed may have left frames
        there, and the next process that reads the log from the disk would take them for committed.
        """
        self.open()
        end = self.HEADER + self._frame_size() * self._frames_in_index()
        if os.fstat(self.fd).st_size > end:
            write_at(self.fd, end, bytes(self.FRAME_HEADER))
        return end

    def _frames_in_index(self) -> int:
        """Return how many frames were committed, by SQLite's index of the log (mxFrame).

        Another process reads it: closing the file in this one would drop SQLite's locks on it.
        """
        head = system.read_elsewhere(self.index, 20)
        if len(head) < 20:
            raise OSError(errno.EIO, "%s can't be read" % self.index)
        return int.from_bytes(head[16:20], sys.byteorder)

    def _frame_size(self) -> int:
        return self.FRAME_HEADER + int.from_bytes(read_between(self.fd, 8, 12), "big")

    def _is_sound(self, end: int) -> bool:
        """Tell by their checksums whether the frames up to the offset `end` are undamaged."""
        size = self._frame_size()
        header = read_between(self.fd, 0, self.HEADER)
        order = ">" if header[3:4] == b"\x83" else "<"
        sums = wal_checksum(header[:24], (0, 0), order)
        for start in range(self.HEADER, end, size):
            frame = read_between(self.fd, start, start + size)
            if len(frame) < size or frame[8:16] != header[16:24]:
                return False
            sums = wal_checksum(frame[:8] + frame[self.FRAME_HEADER:], sums, order)
            found = int.from_bytes(frame[16:24], "big")
            if found != sums[0] << 32 | sums[1]:
                return False
        return True

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class Guard:
    """A `with` block: calls `enter` before it, and after it `leave` with its error or None."""

    def __init__(self, enter: Callable[[], None],
                 leave: Callable[[BaseException | None], None]):
        self.enter, self.leave = enter, leave

    def __enter__(self) -> None:
        self.enter()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.leave(error)


class Connection:
    """The only way to the database: one method for writing, some for reading.

    An error there is raised as QueueError, or as Unavailable if it may pass by itself.
    """

    db: sqlite3.Connection
    identity: Identity
    log: Log
    mutex = -1  # the descriptor of the lock file; -1 until it is opened
    told = False  # whether the user was told that it is waiting
    deferring = False  # if true, a commit does not wait for the disk
    reading = as_it_is = False  # see Database

    def __init__(self, path: str, patience: float, tell: Tell | None):
        self.path, self.patience, self.tell = path, patience, tell
        self.folder = dirname(path)

    def _connect(self) -> None:
        # A full disk is refused, but not to a reader while workers live: the index of the log exists
        # already, so a reader adds no page to it.
        if not (self.reading and anyone_alive(self.path)):
            system.refuse_full(self.folder)
        mask = os.umask(0o077)
        try:
            self.db = sqlite3.connect(self.path, timeout=TICK, isolation_level=None)
        finally:
            os.umask(mask)
        self.execute("PRAGMA journal_size_limit = 16777216")
        self.execute("PRAGMA trusted_schema = OFF")
        # Some builds write zeros over all deleted data, through the log: then a purge takes
        # minutes. FAST does so only where it costs no extra write.
        self.execute("PRAGMA secure_delete = FAST")
        if sys.platform == "darwin":  # there an fsync does not reach the disk
            self.execute("PRAGMA fullfsync = 1")
            self.execute("PRAGMA checkpoint_fullfsync = 1")
        self.execute("PRAGMA synchronous = %s" % ("NORMAL" if self.deferring else "FULL"))

    def _trouble(self, error: sqlite3.Error) -> QueueError:
        """Translate an error of SQLite; first look into two errors that may mislead.

        If SQLite lacked a descriptor, it has opened the database for reading only: so the database
        is opened again. If SQLite could not read a page, it reports damage: so the database is
        checked.
        """
        trouble = translate(error, self.path)
        if "readonly" in str(error) and os.access(self.path, os.W_OK):
            try:
                self._connect()
            except sqlite3.Error:  # opened again with the next write
                pass
        if "malformed" not in str(error):
            return trouble
        for _ in range(3):
            try:
                if self.db.execute("PRAGMA quick_check(1)").fetchall() == [("ok",)]:
                    return Unavailable("%s could not be read for a moment" % self.path)
            except sqlite3.Error:
                pass
        return trouble

    # Reading.

    def _patiently(self, read: Callable[[], Any]) -> Any:
        """Return `read()`; try again for `patience` seconds while the database is locked.

        SQLite itself locks it while it reads the log that a crash has left.
        """
        deadline = None
        while True:
            try:
                return read()
            except sqlite3.Error as error:
                if deadline is None:  # _trouble looks into it if it fails again
                    deadline, self.told = monotonic() + self.patience, False
                    continue
                trouble = self._trouble(error)
                if "locked" not in str(error) or monotonic() >= deadline:
                    raise trouble from error
                self._tell_wait(deadline)
                sleep(0.02)

    def rows(self, statement: str, *values: Any) -> list[Any]:
        """Return all rows that a statement finds, as tuples."""
        return self._patiently(  # type: ignore[no-any-return]
            lambda: self.db.execute(statement, values).fetchall())

    def column(self, statement: str, *values: Any) -> list[Any]:
        """Return the first value of each row."""
        return [row[0] for row in self.rows(statement, *values)]

    def value(self, statement: str, *values: Any) -> Any:
        """Return the first value of the first row; None if there is no row."""
        return next(iter(self.column(statement, *values)), None)

    def dicts(self, statement: str, *values: Any) -> list[Row]:
        """Return each row as a dict, by the names of its columns."""
        def read() -> list[Row]:
            cursor = self.db.execute(statement, values)
            names = [column[0] for column in cursor.description]
            return [dict(zip(names, row)) for row in cursor.fetchall()]

        return self._patiently(read)  # type: ignore[no-any-return]

    def first(self, statement: str, *values: Any) -> Row | None:
        """Return the first row as a dict; None if there is no row."""
        return next(iter(self.dicts(statement, *values)), None)

    # Writing.

    def transaction(self) -> Guard:
        """Return a `with` block that is one write: all of it is committed, or nothing.

        Raises Unavailable if it can't begin within `patience` seconds, or the disk can't take it.
        """
        return Guard(self.begin, self.end)

    def execute(self, statement: str, *values: Any) -> int:
        """Execute a statement; return how many rows it changed."""
        return self.db.execute(statement, values).rowcount

    def begin(self) -> None:
        """Take the mutex and SQLite's write lock within `patience` seconds; raises Unavailable."""
        deadline = monotonic() + self.patience
        self.told = False
        while True:
            self._lock(deadline)
            try:
                self.identity.check()
                self._write_log_again()
                if not (self.identity.queue or self.as_it_is):
                    self.identity.settle(self.value(GET_IDENTITY), self._renew_identity)
                self.execute(BEGIN)
                return
            except BaseException as error:
                self._unlock()
                if isinstance(error, OSError):
                    raise self._unsynced(error) from error
                if not isinstance(error, sqlite3.Error):
                    raise
                trouble = self._trouble(error)
                if not isinstance(trouble, Unavailable) or monotonic() >= deadline:
                    raise trouble from error
                self._tell_wait(deadline)  # a program other than queuectl may hold the lock

    def end(self, error: BaseException | None = None) -> None:
        """Commit, or roll back if the transaction ended by an error."""
        test_point("before commit")
        try:
            if error is None:
                self.execute("COMMIT")
                self._repair_after_commit()
            else:
                self.execute("ROLLBACK")
        except sqlite3.Error as failure:
            if self.db.in_transaction:
                self.execute("ROLLBACK")
            # If a sync failed, the kernel may have forgotten others' commits too.
            if "I/O" in str(failure):
                self._note_failed_sync()
            if error is None:
                raise self._trouble(failure) from failure
        except OSError as failure:
            raise self._unsynced(failure) from failure
        finally:
            self._unlock()
        if isinstance(error, sqlite3.Error):
            raise self._trouble(error) from error

    def _renew_identity(self) -> str:
        self.execute(RENEW_IDENTITY)
        self.value(CHECKPOINT)
        return str(self.value(GET_IDENTITY))

    # The mutex.

    def alone(self) -> Guard:
        """Return a `with` block that holds the mutex without a transaction."""
        return Guard(self._lock, self._unlock)

    def _lock(self, deadline: float = 0.0) -> None:
        """Take the mutex; wait for it until `deadline`, by default for `patience` seconds."""
        deadline = deadline or monotonic() + self.patience
        try:
            while not system.try_lock(self.mutex):
                if monotonic() >= deadline:
                    raise Unavailable("another process has been writing to %s for %d s; try again "
                                      "later" % (self.path, self.patience))
                self._tell_wait(deadline)
                system.wait_lock(self.mutex)
        except OSError as error:
            file = mutex_path(self.path)
            raise Unavailable("%s can't be locked: %s" % (file, error.strerror)) from error

    def _unlock(self, error: BaseException | None = None) -> None:
        """Free the mutex. This must not fail: the caller would take a commit for failed."""
        try:
            system.unlock(self.mutex)
        except OSError:
            again = open_private(mutex_path(self.path), os.O_RDWR)
            # This closes the descriptor, which frees the mutex.
            os.dup2(again, self.mutex, inheritable=False)
            os.close(again)

    def _tell_wait(self, deadline: float) -> None:
        tell_at = deadline - self.patience + WAIT_TOLD
        if self.tell and not self.told and monotonic() >= tell_at:
            self.tell("waiting for another process to finish writing to %s" % self.path)
            self.told = True

    # Syncing: see Log.

    def defer_sync(self) -> None:
        """Let commits no longer wait for the disk: the caller syncs them later.

        Until `sync` has returned a power cut may undo a commit. With synchronous=FULL SQLite syncs
        inside COMMIT. Outside of it nobody waits for the mutex meanwhile, and a worker's next job
        runs already.
        """
        self.deferring = True
        self.execute("PRAGMA synchronous = NORMAL")
        self.value(COUNT_TABLES)  # this makes the log, if there was none
        # Before the first commit: the kernel reports a failed sync only to descriptors open before
        # it.
        self.identity.watch(self.log.open())

    def sync(self) -> None:
        """Make every commit so far survive a power cut; raises Unavailable if the disk can't.

        This process may open the log: no locks depend on its descriptors, unlike the database's.
        While a connection is open the log is never replaced, only written again from its start.
        """
        if self.mutex < 0:  # there is no database
            return
        try:
            if not self.log.failed():
                self.log.sync()
            if self.log.failed():
                with self.alone():
                    self._write_log_again()
        except OSError as error:
            raise self._unsynced(error) from error
        except sqlite3.Error as error:
            raise self._trouble(error) from error

    def _repair_after_commit(self) -> None:
        """If a sync failed meanwhile, write the log again: this commit may stand on lost ones."""
        if self.deferring:  # `sync` will do that
            return
        try:
            failed = self.log.failed()
        except OSError:  # SQLite has synced this one; the process whose sync failed repairs the log
            return
        if failed:
            self._write_log_again()

    def _note_failed_sync(self) -> None:
        try:
            self.log.mark(b"!")
            self.log.cut()
        except OSError:  # another process will repair the log
            pass

    def _unsynced(self, error: OSError) -> Unavailable:
        return Unavailable("%s can't be synced: %s; nothing goes on until the disk takes it"
                           % (self.log.path, error.strerror))

    def _write_log_again(self) -> None:
        """Under the mutex, after a failed sync: write the log's frames again."""
        if self.log.failed():  # no other process has done it meanwhile
            # If a process has crashed, SQLite makes its index anew here.
            self.db.execute(COUNT_TABLES).fetchall()
            self.log.write_again()


# The stores that close_stores closes. The list also keeps Python from closing them earlier.
OPENED: list[Database] = []


class Database(Connection):
    """The queue's database at `path`, made if it does not exist.

    `patience` is how many seconds a write may wait; `tell` is called with a line if it waits long.
    `reading`: the caller only reads; a missing database is an empty queue, and one of an older
    schema is copied into memory, where the copy is migrated. `as_it_is`: an older schema is not
    migrated, and the caller uses only the part that has not changed since. Raises QueueError if the
    database can't be used, Unavailable if it perhaps can later.
    """

    # The database has an older schema, and `db` is a copy of it.
    source: sqlite3.Connection | None = None
    seen_in_source = -1
    failed_once = False  # must be opened first

    def __init__(self, path: str, patience: float = PATIENCE, tell: Tell | None = None,
                 reading: bool = False, as_it_is: bool = False):
        super().__init__(path, patience, tell)
        self.reading, self.as_it_is = reading, as_it_is
        if sqlite3.sqlite_version_info < (3, 8, 3):
            raise QueueError("this Python has SQLite %s, queuectl needs 3.8.3 or newer"
                             % sqlite3.sqlite_version)
        try:
            self._patiently(self._open)
        except BaseException as error:
            if self.mutex >= 0:
                os.close(self.mutex)
            if not isinstance(error, OSError):
                raise
            raise Unavailable("%s can't be used: %s%s" % (
                path, error.strerror, advice_on_owner(path))) from error

    # Opening.

    def _open(self) -> None:
        new = not self._exists()
        if new and self.reading:
            self._open_nothing()
            return
        if new:
            prepare_place(self.path)
        else:
            refuse_strange_file(self.path)
        try:
            if self.mutex < 0:
                self.mutex = open_private(mutex_path(self.path), os.O_RDWR)
        except OSError as error:
            if not self.reading or error.errno not in (errno.EROFS, errno.EACCES):
                raise
            self._open_unwritable(error)
            return
        self.log = Log(self.path, self.mutex)
        if not new:
            system.give_to_owner(self.mutex, self.path)
            self.identity = Identity(self.path, self.mutex)
            self._check_log()
        try:
            self._connect()
            version = self._checked_version()
        except (Unavailable, sqlite3.Error) as error:
            self._open_without_room(error)
            return
        if self.reading and version < SCHEMA_VERSION:
            self._read_copy_of(self.db)
        elif version < SCHEMA_VERSION and not (self.as_it_is and version):
            with self.alone():
                self._migrate()
        if new:
            self.identity = Identity(self.path, self.mutex)

    def _exists(self) -> bool:
        try:
            os.stat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def _check_log(self) -> None:
        try:
            self.identity.check_log()
        except QueueError:  # another process may be making it just now: look again under the mutex
            with self.alone():
                self.identity.check_log()

    def _open_unwritable(self, error: OSError) -> None:
        """Read a database that this user can't write, as it is and without locks.

        Raises `error` if its log holds anything, for that could not be read.
        """
        if has_log(self.path):
            raise error
        self._read_as_it_is()

    def _open_without_room(self, error: Exception) -> None:
        """Read a database in the same way if the disk has no room for the index of its log.

        Raises `error` if it is another error, if it may be over in a moment (then the caller tries
        again), or if the caller wants to write.
        """
        if not self.reading or not re.search("I/O|no space|to open", str(error)):
            raise error
        if isinstance(error, sqlite3.Error) and not self.failed_once:
            self.failed_once = True
            raise error
        if self.tell and has_log(self.path):
            self.tell("%s: the newest records are not shown" % error)
            self.tell = None
        os.close(self.mutex)
        self.mutex = -1
        self._read_as_it_is()

    def _read_as_it_is(self) -> None:
        self.db = open_as_it_is(self.path)
        if self._checked_version() < SCHEMA_VERSION:
            self._read_copy_of(self.db)

    def _open_nothing(self) -> None:
        """Open an empty queue in memory."""
        if self.tell:
            self.tell("there is no queue at %s" % self.path)
        self.db = sqlite3.connect(":memory:", isolation_level=None)
        self._run_migrations(0)

    def close(self) -> bool:
        """Close the database; return whether that was done.

        While the mark of a failed sync stands, it must stay open until the process ends: the last
        connection that SQLite closes would copy the log into the database.
        """
        if self.mutex < 0:
            return True
        try:
            harmful = self.identity.replaced or self.log.failed()
        except OSError:
            harmful = True
        if harmful:
            OPENED.append(self)
            return False
        if self in OPENED:
            OPENED.remove(self)
        self.log.close()
        (self.source or self.db).close()
        os.close(self.mutex)
        self.mutex = -1
        return True

    def changed(self) -> int:
        """Return a number that changes whenever another connection has committed.

        Raises QueueError if the database was deleted or replaced, which nobody else would notice.
        """
        if self.mutex < 0:  # there was no database, or it can't be written
            if exists(self.path):
                self._open()
            return 0
        self.identity.check()
        if self.source is None:
            return self._version_of(self.db)
        if self._version_of(self.source) != self.seen_in_source:
            self._read_copy_of(self.source)
        return self.seen_in_source

    def _version_of(self, db: sqlite3.Connection) -> int:
        """Return a number that changes when another connection has committed.

        SQLite before 3.8.8 has none: then it changes each time, and callers look at everything.
        """
        row = self._patiently(lambda: db.execute("PRAGMA data_version").fetchone())
        if row is None:
            return time.monotonic_ns()
        return int(row[0])

    # The schema: a reader migrates a copy, a writer migrates the file.

    def _checked_version(self) -> int:
        """Return the schema version; raise QueueError for a foreign or newer database."""
        version = int(self.value(GET_VERSION))
        if self.value(COUNT_TABLES) and self.value(GET_APPLICATION) != APPLICATION_ID:
            raise QueueError("%s is a database of another program; name another with --db"
                             % self.path)
        if version > SCHEMA_VERSION:
            raise QueueError("%s was made by a newer queuectl (schema %d, this one knows %d); use "
                             "that one" % (self.path, version, SCHEMA_VERSION))
        return version

    def _read_copy_of(self, source: sqlite3.Connection) -> None:
        """Copy a database of an older schema into memory, and migrate the copy."""
        self.source = source
        self.seen_in_source = self._version_of(source)
        self.db = sqlite3.connect(":memory:", isolation_level=None)
        source.backup(self.db)
        self._run_migrations(int(self.value(GET_VERSION)))
        if self.mutex < 0 or self.identity.same_file():
            self.execute(KEEP_OLDER)

    def _migrate(self) -> None:
        """Migrate the schema to this version, under the mutex: whole or not at all.

        Of many that try at once, one does it, and the others see that it is done. Workers of an
        older program would go on with the old schema: they must end first.
        """
        version = self._checked_version()
        if version == SCHEMA_VERSION:
            return
        mask = os.umask(0o077)
        try:
            if version:
                self._refuse_older_workers()
                self.copy_to("%s.schema%d" % (self.path, version))  # the way back
            elif self.value("PRAGMA journal_mode = WAL") != "wal":
                raise QueueError("%s is on a file system that SQLite's WAL can't use; name another "
                                 "with --db" % self.path)
            self._run_migrations(version)
            self.identity = Identity(self.path, self.mutex)
            # It is no copy: what older workers left belongs to this queue.
            if self.identity.same_file():
                self.execute(KEEP_OLDER)
            self.identity.settle(self.value(GET_IDENTITY))
            self.value(CHECKPOINT)  # now the id stands in the file itself
            sync_folder(self.folder)
        finally:
            os.umask(mask)

    def registered(self, statement: str) -> list[Row]:
        """Return the pools or workers that a statement finds, each with `alive`."""
        return [dict(entry, alive=is_alive(self.path, entry["name"]))
                for entry in self.dicts(statement)]

    def _refuse_older_workers(self) -> None:
        entries = self.registered(ALL_POOLS) + self.registered(ALL_WORKERS)
        alive = [str(entry["pid"]) for entry in entries if entry["alive"]]
        if alive or anyone_alive(self.path):
            where = "in another place"
            if alive:
                where = "pid " + ", ".join(alive)
            raise QueueError("workers of an older queuectl still use %s (%s); `queuectl worker "
                             "stop` lets them finish, then try again" % (self.path, where))

    def _run_migrations(self, version: int) -> None:
        self.execute(BEGIN)
        try:
            for statements in MIGRATIONS[version:]:
                for statement in statements:
                    self.execute(statement)
                test_point("migrating")
            self.execute(SET_APPLICATION)
            self.execute(SET_VERSION)
            self.execute("COMMIT")
        except sqlite3.Error:
            if self.db.in_transaction:
                self.execute("ROLLBACK")
            raise

    # Which queue it is: see Identity.

    def is_own(self, worker: str) -> bool:
        """Tell whether a worker belongs to this queue, and not to the one it was copied from."""
        if worker in self.value("SELECT older FROM control").split(","):
            return True
        queue = str(self.value(GET_IDENTITY))
        if self.mutex >= 0 and self.identity.is_copy(queue):
            return False
        return worker.startswith(queue + "-")

    def queue_id(self) -> str:
        """Return the id of this queue; a copy gets its own here, if it has none yet."""
        if not self.identity.queue:
            with self.transaction():
                pass
        return self.identity.queue

    # The whole file.

    def expect_bulk(self) -> None:
        """Before many jobs are added: keep more of the index of ids in memory.

        Random ids hit every page of it.
        """
        self.execute("PRAGMA cache_size = -40000")  # KiB

    def shrink(self) -> None:
        """After a purge: give disk space back if a quarter of the file is free."""
        free = self.value("PRAGMA freelist_count")
        if free * 4 > self.value("PRAGMA page_count"):
            with self.alone():
                try:
                    self.execute("VACUUM")
                except sqlite3.Error as error:
                    raise translate(error, self.path) from error

    def backup(self, path: str) -> None:
        """Copy the database into the file `path`, as another queue.

        Jobs that were running are pending there. Raises QueueError if it can't be written.
        """
        self.copy_to(
            path,
            """UPDATE jobs SET state = 'pending', ready = 1, due = started_at - waited,
                attempts = max(attempts - 1, 0),
                cancel = 0, worker = NULL, slot = NULL, locked_at = NULL
                WHERE state = 'processing'""",
            "UPDATE queues SET rests = 0, probe = NULL",
            "DELETE FROM workers",
            "DELETE FROM pools",
            RENEW_IDENTITY)

    def copy_to(self, path: str, *changes: str) -> None:
        """Copy the database as it is at this moment into a file, and change the copy.

        SQLite's online backup does it, in one step: with several steps, each write of a worker
        between them would make it begin again. The file appears whole, or not at all.
        """
        part = "%s.%d.part" % (path, os.getpid())
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            os.close(os.open(part, flags, 0o600))
            copy = sqlite3.connect(part, isolation_level=None)
            try:
                self.db.backup(copy)
                for change in changes:
                    copy.execute(change)
            finally:
                copy.close()
            os.replace(part, path)
            sync_folder(dirname(path))
        except OSError as error:
            raise QueueError("%s can't be written: %s" % (path, error.strerror)) from error
        except sqlite3.Error as error:
            raise translate(error, path) from error
        finally:
            for leftover in (part, part + "-journal", part + "-wal", part + "-shm"):
                if exists(leftover):
                    os.unlink(leftover)


def close_stores() -> bool:
    """Close the stores before the process ends; if False, it must end by os._exit: see Log."""
    closed = [store.close() for store in list(OPENED)]
    return all(closed)


# ═══ Store ═══ reading queues, jobs and runs; one method for each change of state ════════════
#
# Seven layers: Administration (workers, pools, settings, queues), Reading (jobs and runs), Endings
# (what follows when a job has ended), Editing (changes by a person), Incoming (jobs are added),
# Scheduling (schedules add jobs), Store (changes of state).
# Methods that change anything are called in a transaction; `settle`, `change_each` and
# `forget_some` make their own, many short ones. So each change is whole, whichever process is
# killed, and each is made only if the job is still in the state from which the change was decided.
#
#   add      Add jobs in one transaction, all or none. A job that waits for others becomes ready in
#            the transaction that records the end of the last of them, so no end can be missed.
#   claim    Make the jobs ready whose time has come, then take one, all in the transaction that
#            records the worker's last run. Two workers can't take the same job: the second begins
#            after the first has committed. The worker takes the run's token before.
#            Before that, add the jobs of schedules whose time has come (Scheduling).
#   record   WHERE runs = ? AND state = 'processing': record a run once. A worker that was taken for
#            dead and goes on changes nothing: its job was given back, and perhaps runs again. The
#            same transaction does what follows from the end of a job: jobs that waited for it
#            become ready or end in vain, and the jobs of on_end and on_dead are added. So no death
#            goes untold. The run is kept with its output (_keep_run), and counted (_count_run).
#   cancel   Mark a running job. Its worker may miss the mark and record a failure: then `record`
#            sees the mark and cancels the job.
#   settle   A job that ends in vain takes along the jobs that were to run after it, some of them in
#            its own transaction. A mark in the database says that more are left to be ended.
#   delete   WHERE state <> 'processing', and no job waits for it: both could have changed since the
#            user, or the sweep, looked.
#
# Whoever makes a job claimable, or changes what workers must notice, rings their bells after the
# commit. After a ring before the commit they would look and find everything unchanged.
#
# Ranges of jobs: from `first` to `last`, both included; or from behind `before` up to `last`
# (included).

def scheduled_id(name: str, due: int) -> str:
    """Return the id of the job that a schedule makes for its time `due`."""
    return "%s@%sZ" % (name, _show_second(due // 1000))


def at_line(line: int, problem: str) -> str:
    """Say what is wrong with a job, and on which line of its file (0: no file)."""
    return "line %d: %s" % (line, problem) if line else problem


def serves(pool: Row, queue: str) -> bool:
    """Tell whether the workers of a pool take jobs of a queue."""
    return not pool["queues"] or queue in (HOOK_QUEUE, *pool["queues"].split(","))


class Administration(Database):
    """Pools and workers, settings, and the limits and pauses of queues."""

    # Workers and pools: registered, forgotten, told to stop.

    def add_pool(self, name: str, workers: int, queues: Names,
                 max_jobs: int | None, now: int) -> None:
        """Register a pool: its queues (none: all), how many jobs it may claim (None: no limit)."""
        self.execute(
            """INSERT INTO pools (name, pid, started_at, workers, queues, jobs_left)
                VALUES (?, ?, ?, ?, ?, ?)""",
            name, os.getpid(), now, workers, ",".join(queues) or None, max_jobs)

    def add_worker(self, name: str, pool: str, now: int) -> None:
        """Register this process as a worker of a pool."""
        self.execute("INSERT INTO workers (name, pool, pid, started_at) VALUES (?, ?, ?, ?)",
                     name, pool, os.getpid(), now)

    def forget(self, name: str) -> None:
        """Forget a pool or worker that has ended."""
        self.execute("DELETE FROM pools WHERE name = ?", name)
        self.execute("DELETE FROM workers WHERE name = ?", name)

    def pool(self, name: str) -> Row:
        """Return a pool's `stop` level, its `jobs_left` to claim, and how many jobs `died`."""
        return self.first(GET_POOL, name) or {"stop": 0, "jobs_left": 0, "died": 0}

    def pools(self) -> list[Row]:
        """Return every registered pool, each with `alive`."""
        return self.registered(ALL_POOLS)

    def workers(self) -> list[Row]:
        """Return every registered worker: whether it lives, its job, and its trouble."""
        return [dict(worker, trouble=trouble_of(self.path, worker["name"]))
                for worker in self.registered(ALL_WORKERS)]

    def serving(self, queue: str) -> list[Row]:
        """Return the live workers that serve a queue."""
        pools = {pool["name"] for pool in self.pools()
                 if pool["alive"] and serves(pool, queue)}
        return [worker for worker in self.workers()
                if worker["alive"] and worker["pool"] in pools]

    def queues_of_runs(self) -> set[str]:
        """Return the queues of every `run` under way; a run counts its jobs when it ends."""
        return {pool["queues"] for pool in self.pools()
                if pool["alive"] and is_run_queue(pool["queues"] or "")}

    def ask_stop(self, pools: Iterable[str], level: int) -> None:
        """Have pools stop soon (1) or now (2); ring their workers afterwards."""
        for name in pools:
            self.execute("UPDATE pools SET stop = max(stop, ?) WHERE name = ?", level, name)
        self.execute(NEXT_EPOCH)

    def holders(self) -> set[str]:
        """Return the workers that hold a job."""
        return set(self.column("SELECT DISTINCT worker FROM jobs WHERE state = 'processing'"))

    def sleepers(self) -> list[str]:
        """Return the workers that run no job."""
        return self.column("""SELECT name FROM workers
            EXCEPT SELECT worker FROM jobs WHERE state = 'processing'""")

    def lost_jobs(self) -> list[Row]:
        """Return every job whose worker is dead."""
        return [job for job in self.dicts(HELD_JOBS)
                if not is_alive(self.path, job["worker"])]

    def control(self, pool: str) -> tuple[Settings, int, set[str]]:
        """What the workers of a pool follow; if it is gone, they stop.

        Settings, whether to stop (0, 1: soon, 2: now), and which queues have a limit of jobs
        running at once.
        """
        orders = self.first(GET_POOL, pool) or {"stop": 1}
        limited = self.column("SELECT name FROM queues WHERE concurrency IS NOT NULL")
        return self.settings(), orders["stop"], set(limited)

    def settings(self) -> Settings:
        """Return every setting with its value now, and `run_output_bytes`, which follows."""
        found = self.rows("SELECT name, value FROM settings")
        given = {name: json.loads(value) for name, value in found}
        given.setdefault("run_output_bytes", given.get("max_output_bytes", RUN_OUTPUT))
        return {**SETTINGS, **given}

    def set_setting(self, name: str, value: Any) -> None:
        """Set a setting to a checked value; ring the workers afterwards."""
        self.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", name, json.dumps(value))
        self.execute(NEXT_EPOCH)

    def unset_setting(self, name: str) -> None:
        """Put a setting back to its default; ring the workers afterwards."""
        self.execute("DELETE FROM settings WHERE name = ?", name)
        self.execute(NEXT_EPOCH)

    # Queues: limited, paused and counted.

    def set_concurrency(self, queue: str, most: int | None) -> None:
        """Limit how many jobs of a queue run at once, over all pools.

        None: no limit.
        """
        self.execute(ADD_QUEUE, queue)
        self.execute("UPDATE queues SET concurrency = ? WHERE name = ?", most, queue)
        self.execute(FORGET_QUEUE, queue)
        self.execute(NEXT_EPOCH)

    def set_engine(self, queue: str, runner: str | None, ender: str | None) -> None:
        """Hand the jobs of a queue to an engine from now on, or (None, None) to nobody.

        An engine without an ender has None for it. Jobs that run keep theirs.
        """
        self.execute(ADD_QUEUE, queue)
        self.execute("UPDATE queues SET runner = ?, ender = ?, rests = 0, probe = NULL "
                     "WHERE name = ?", runner, ender, queue)
        self.execute(FORGET_QUEUE, queue)
        self.execute(NEXT_EPOCH)

    def pause(self, queue: str | None, paused: bool, now: int) -> None:
        """Pause a queue (start no more of its jobs), or resume it.

        Without a name this concerns all queues, future ones too.
        """
        switch = "SET paused = ?, switched_at = ? WHERE paused <> ?"
        if queue is None:
            self.execute("UPDATE control " + switch, paused, now, paused)
        else:
            self.execute(ADD_QUEUE, queue)
            self.execute("UPDATE queues %s AND name = ?" % switch, paused, now, paused, queue)
            self.execute(FORGET_QUEUE, queue)
        self.execute(NEXT_EPOCH)

    def set_fail_fast(self, queue: str, fail_fast: bool) -> None:
        """Say whether a queue starts no more jobs after the first that dies."""
        self.execute("UPDATE queues SET fail_fast = ? WHERE name = ?", fail_fast, queue)

    def new_run(self) -> str:
        """Return a name for the queue of a `run` that no queue has or ever had."""
        while True:
            self.execute("UPDATE control SET runs = runs + 1")
            name: str = RUN_QUEUE % self.value("SELECT runs FROM control")
            if not self.rows("SELECT 1 FROM queues WHERE name = ?", name):
                return name

    def all_paused(self) -> bool:
        """Tell whether all queues are paused, future ones too."""
        return bool(self.value("SELECT paused FROM control"))

    def pauses(self) -> list[Row]:
        """Return each pause: its queue (None: all), and since when, if that is known."""
        return self.dicts(
            """SELECT NULL AS queue, nullif(switched_at, 0) AS paused_at FROM control WHERE paused
                UNION ALL SELECT name, nullif(switched_at, 0) FROM queues WHERE paused""")

    def queues(self) -> list[Row]:
        """Return every queue with a job, limit, pause, runner or schedule, and its jobs by state.

        `rest_why` is set if its engine did not take the last job, and `next_try_at` too, unless a
        job is being tried: see Store._note_engine.
        """
        return self.dicts(
            """SELECT name, concurrency, runner, ender,
                CASE WHEN rests AND probe IS NULL THEN rest_until END AS next_try_at,
                CASE WHEN rests THEN rest_why END AS rest_why,
                queues.paused OR control.paused AS paused, pending,
                processing, completed, failed, dead, cancelled
                FROM queues CROSS JOIN control ORDER BY name""")

    def queue(self, name: str) -> Row:
        """Return one of `queues`, even if it has no job."""
        nothing = dict.fromkeys(("concurrency", "runner", "ender", "rest_why"))
        empty = {**nothing, "name": name, "paused": self.all_paused(),
                 **dict.fromkeys(STATES, 0)}
        return next((queue for queue in self.queues() if queue["name"] == name), empty)

    def count(self, selection: Selection) -> int:
        """Count the jobs of a selection's states and queues (none: all)."""
        found = [each for each in self.queues()
                 if not selection.queues or each["name"] in selection.queues]
        return sum(each[state] for each in found for state in set(selection.states or STATES))

    def counts(self) -> dict[str, int]:
        """Count the jobs in each state."""
        totals = self.rows(
            """SELECT total(pending), total(processing), total(completed), total(failed),
                total(dead), total(cancelled) FROM queues""")
        return dict(zip(STATES, map(int, totals[0])))

    def damage(self) -> list[str]:
        """Return what SQLite's own check, and a recount of all jobs, find wrong."""
        found = [line for line in self.column("PRAGMA integrity_check(5)") if line != "ok"]
        recount = "SELECT queue, state, count(*) FROM jobs GROUP BY queue, state"
        counted = {(queue, state): count for queue, state, count in self.rows(recount)}
        for queue in self.queues():
            for state in STATES:
                real = counted.get((queue["name"], state), 0)
                if real != queue[state]:
                    found.append("queue %s has %d %s jobs, not %d"
                                 % (queue["name"], real, state, queue[state]))
        return found


class Reading(Administration):
    """Reading jobs and their runs; nothing here changes anything."""

    # Jobs, with all their fields.

    def find(self, name: str) -> Row:
        """Return the job with this id, or with this unique prefix of an id that queuectl made.

        Raises QueueError if there is none, or more than one.
        """
        found = self.dicts(SELECT_JOBS + "WHERE jobs.id = ?", name)
        if not found and len(name) >= 4:
            prefix = "WHERE jobs.id >= ? AND jobs.id < ? AND generated = 1 LIMIT 6"
            found = self.dicts(SELECT_JOBS + prefix, name, name + "\U0010ffff")
        if len(found) == 1:
            return found[0]
        if found:
            some = ", ".join(job["id"] for job in found[:5])
            more = " or others" if len(found) > 5 else ""
            raise QueueError("%s could be %s%s; give more of the id" % (clean(name), some, more))
        raise QueueError("there is no job %s; `queuectl list` shows them"
                         % shorten(clean(name), 140))

    def find_by_seq(self, seq: int) -> Row | None:
        """Return a job with all its fields; None if it was forgotten."""
        return self.first(SELECT_JOBS + "WHERE seq = ?", seq)

    def _page(self, selection: Selection, start: int, newest: bool, count: int) -> list[Row]:
        statement, values = select_jobs(selection, newest, count)
        return self.dicts(statement, start, *values)

    def newest(self, selection: Selection, count: int, before: int = NEVER) -> list[Row]:
        """Return the newest `count` jobs of a selection below seq `before`, newest last."""
        return self._page(selection, before, True, count)[::-1]

    def jobs(self, selection: Selection, seq: int = 0, size: int = 1000) -> Iterator[Row]:
        """Yield all selected jobs behind `seq`, oldest first; read `size` at a time."""
        while True:
            page = self._page(selection, seq, False, size)
            yield from page
            if len(page) < size:
                return
            seq = page[-1]["seq"]

    def last_to_die(self, selection: Selection, count: int) -> Iterator[Row]:
        """Yield at most `count` dead jobs of a selection, the last to die first."""
        terms, values = terms_of(selection._replace(states=()))
        in_order = SELECT_JOBS.replace("FROM jobs ", "FROM jobs INDEXED BY jobs_in_vain ")
        time_, seq, size = NEVER, NEVER, 1000
        while count > 0:
            page = self.dicts(
                in_order + """WHERE state = 'dead' AND finished_at <= ?
                    AND NOT (finished_at = ? AND seq >= ?)%s
                    ORDER BY finished_at DESC, seq DESC LIMIT %d""" % (terms, min(count, size)),
                time_, time_, seq, *values)
            yield from page
            if len(page) < size:
                return
            time_, seq = page[-1]["finished_at"], page[-1]["seq"]
            count -= size

    def look(self, selection: Selection) -> tuple[Any, Any]:
        """Return the jobs that are selected now: their seqs, and when each was last changed.

        These are two arrays: a million jobs take 16 MB.
        """
        from array import array
        seqs, times = array("q"), array("q")
        terms, values = terms_of(selection)
        page: Any = [(0,)]
        while page:
            page = self.rows(
                "SELECT seq, updated_at FROM jobs WHERE seq > ?%s ORDER BY seq LIMIT 10000"
                % terms, page[-1][0], *values)
            seqs.extend(seq for seq, _ in page)
            times.extend(changed for _, changed in page)
        return seqs, times

    def total(self, selection: Selection) -> int:
        """Count the selected jobs; from the queues' counts if only states and queues matter."""
        if selection == Selection(selection.states, selection.queues):
            return self.count(selection)
        return len(self.look(selection)[0])

    def jobs_between(self, before: int, last: int, size: int = 1000) -> Iterator[Row]:
        """Yield the jobs behind seq `before` up to `last`, in the order they came."""
        for job in self.jobs(Selection(), before, size):
            if job["seq"] > last:
                return
            yield job

    def ended_between(self, queue: str, before: int, last: int) -> list[int]:
        """Return the seqs of the ended jobs of a queue behind `before` up to `last`."""
        return self.column(
            """SELECT seq FROM jobs WHERE seq > ? AND seq <= ? AND queue = ?
                AND +state IN ('completed', 'dead', 'cancelled') ORDER BY seq""",
            before, last, queue)

    def states_between(self, queue: str, before: int, last: int) -> dict[str, int]:
        """Count the jobs of a queue behind `before` up to `last`, by state."""
        found = self.rows(
            """SELECT state, count(*) FROM jobs WHERE seq > ? AND seq <= ? AND queue = ?
                GROUP BY state""", before, last, queue)
        return {**dict.fromkeys(STATES, 0), **dict(found)}

    # Runs.

    def runs(self, seq: int, last: int = 0, outputs: bool = True) -> Iterator[Row]:
        """Yield the recorded runs of a job after run `last`, oldest first.

        Each has its output, or "" if `outputs` is false.
        """
        page: list[Row] = []
        columns = "stdout, stderr" if outputs else "'' AS stdout, '' AS stderr"
        while len(page) in (0, 20):
            page = self.dicts(
                """SELECT id %% 16777216 AS run, attempt, state, started_at, finished_at,
                    seconds AS duration_seconds, exit_code, error, worker, %s FROM runs
                    WHERE id > ? * 16777216 + ? AND id <= ? * 16777216 + 16777215
                    ORDER BY id LIMIT 20""" % columns, seq, last, seq)
            if not page:
                return
            yield from page
            last = page[-1]["run"]

    def last_of_output(self, seq: int, run: int, length: int) -> list[bytes]:
        """Return the last bytes of a recorded run's stdout and stderr, at most `length` each."""
        row = self.first("SELECT substr(stdout, -%d) AS stdout, substr(stderr, -%d) AS stderr "
                         "FROM runs WHERE id = ? * 16777216 + ?" % (length, length), seq, run)
        return list((row or {}).values())

    def run_times(self, seq: int) -> tuple[int, float]:
        """Return how many runs of a job are recorded, and their average in seconds."""
        count, average = self.rows("SELECT count(*), avg(seconds) " + RUNS_OF_JOB, seq, seq)[0]
        return count, average or 0.0

    def history(self, by: str, since: int, until: int) -> list[Row]:
        """Return what was done from one time to another, by minute, hour, day or queue.

        From 0 to 0 means all that was ever done.
        """
        keys = {"queue": "queue", "minute": "start", "hour": "start - start % 3600000",
                "day": "start - start % 86400000"}
        name = "queue" if by == "queue" else "starts_at"
        return self.dicts(
            """SELECT %s AS %s, sum(completed + failed + died) AS runs, %s FROM %s
                GROUP BY 1 ORDER BY 1"""
            % (keys[by], name, SUMS, DONE), since, until, since, until, until)

    def runs_per_second(self, length: int, now: int) -> float:
        """Return the runs ended per second in the last `length` ms, from a full minute on."""
        since = now - length
        since -= since % MINUTE
        count = self.value("SELECT total(completed + failed + died) FROM " + DONE,
                           since, now, since, now, now)
        return float(count * 1000 / (now - since))

    def totals(self) -> list[Row]:
        """Return the queues by their names in the history, with their jobs by state."""
        states = ", ".join("sum(%s) AS %s" % (state, state) for state in STATES)
        return self.dicts("""SELECT %s AS queue, max(queues.paused OR control.paused) AS paused, %s
            FROM queues CROSS JOIN control GROUP BY 1 ORDER BY 1""" % (COUNTED_AS, states))

    # Questions of workers.

    scheduling = True  # whether this process makes the jobs of schedules

    def pulse(self) -> tuple[int, int, bool]:
        """Return what a worker reads first: the epoch, the next time, the mark `unsettled`.

        The epoch changes with settings and orders. The time is the earliest for which a job waits,
        at which one expires, or at which a schedule adds one (milliseconds, or NEVER). For
        `unsettled` see Endings.
        """
        epoch, *times, unsettled = self.rows(PULSE)[0]
        if not self.scheduling:
            times.pop()
        return epoch, min(each or NEVER for each in times), bool(unsettled)

    def next(self, queues: Names) -> tuple[Any, ...] | None:
        """Return the next job of these queues (none: all), or None.

        It has the fields that its claim would give it: those of Job up to `since`.
        """
        return next(iter(self.rows(next_job(len(queues)), *queues)), None)

    def ready(self, queues: Names, due: int, now: int) -> bool:
        """Tell, without the mutex, if a job can be claimed now; `due` is `pulse`'s time."""
        return due <= now or self.next(queues) is not None

    def drained(self, queues: Names, now: int) -> bool:
        """Tell whether no job of these queues (none: all) is due, failed or processing.

        Jobs of paused queues don't count.
        """
        for queue in self.queues():
            served = not queues or queue["name"] in queues
            if served and not queue["paused"] and (
                    queue["processing"] or queue["failed"] or self._keeps_ready(queue)):
                return False
        return not self.ready(queues, self.pulse()[1], now)

    def _keeps_ready(self, queue: Row) -> bool:
        """Tell whether a queue has jobs that could start if it did not rest."""
        return bool(queue["rest_why"] and self.rows(
            "SELECT 1 FROM jobs WHERE ready = 1 AND queue = ? LIMIT 1", queue["name"]))

    def is_busy(self, queue: str) -> bool:
        """Tell whether a job of a queue, or a hook of one, has not ended."""
        return bool(self.count(Selection(UNFINISHED, (queue,)))) or self.hooks_left(queue)

    def hooks_left(self, queue: str) -> bool:
        """Tell whether a hook of a job of this queue has not ended, and is not paused."""
        mark = json.dumps({"QUEUECTL_QUEUE": queue})[1:-1]
        left = self.rows(
            """SELECT 1 FROM jobs WHERE state IN ('pending', 'processing', 'failed')
                AND queue = ? AND instr(env, ?) LIMIT 1""", HOOK_QUEUE, mark)
        return bool(left) and not self.queue(HOOK_QUEUE)["paused"]

    def context(self, key: int) -> tuple[str, str, int, str]:
        """Return the folder, PATH, umask and environment (JSON, or "") of a job's caller."""
        return self.rows(  # type: ignore[no-any-return]
            """SELECT cwd, path, umask, coalesce(environ, '') FROM contexts
                LEFT JOIN environments ON environments.id = environment
                WHERE contexts.id = ?""", key)[0]

    def orders_of(self, seq: int) -> tuple[bool, float | None]:
        """Return whether a job must be cancelled, and its run's time-out (seconds or None)."""
        found = self.rows("SELECT cancel, timeout_seconds FROM jobs WHERE seq = ?", seq)
        return (found[0][0] == 1, found[0][1]) if found else (False, None)

    # Which job waits for which.

    def awaited_by(self, seq: int) -> list[Row]:
        """Return the jobs that a job still waits for."""
        return self.dicts(
            """SELECT seq, id, state, due FROM waits JOIN jobs ON jobs.seq = awaited
                WHERE job = ? ORDER BY seq""", seq)

    def waiters_of(self, seq: int) -> list[Row]:
        """Return the jobs that wait for a job."""
        return self.dicts(
            """SELECT seq, id FROM waits JOIN jobs ON jobs.seq = job
                WHERE awaited = ? AND state IN ('pending', 'processing', 'failed')
                ORDER BY seq""", seq)

    def dependents_in_vain(self, seq: int) -> list[int]:
        """Return the dead or cancelled jobs that were to run after a job, directly or not."""
        return self.column(
            """WITH RECURSIVE dependents (seq) AS (SELECT job FROM waits WHERE awaited = ?
                    UNION SELECT job FROM waits JOIN dependents ON awaited = dependents.seq)
                SELECT seq FROM jobs WHERE state IN ('dead', 'cancelled')
                AND seq IN (SELECT seq FROM dependents) ORDER BY seq""", seq)

    def causes_in_vain(self, seq: int) -> list[str]:
        """Return the ids of the dead or cancelled jobs that hold a job up, directly or not.

        Only the first causes: jobs that wait for no dead or cancelled job themselves.
        """
        return self.column(
            """WITH RECURSIVE causes (seq) AS (SELECT ? UNION SELECT awaited FROM causes
                    JOIN waits ON job = causes.seq JOIN jobs ON jobs.seq = awaited
                    WHERE state IN ('dead', 'cancelled'))
                SELECT id FROM causes JOIN jobs USING (seq) WHERE seq <> ? AND NOT EXISTS (
                    SELECT 1 FROM waits JOIN jobs AS other ON other.seq = awaited
                    WHERE job = causes.seq AND other.state IN ('dead', 'cancelled'))
                ORDER BY seq""", seq, seq)

    def awaited_in_vain(self, seq: int) -> set[int]:
        """Return the seqs of the dead or cancelled jobs that a job waits for."""
        return {job["seq"] for job in self.awaited_by(seq) if job["state"] in IN_VAIN}

    def waits_for_gone(self, seq: int) -> bool:
        """Tell whether a job was to run after one that died and was forgotten."""
        return bool(self.rows(
            """SELECT 1 FROM waits WHERE job = ?
                AND NOT EXISTS (SELECT 1 FROM jobs WHERE seq = awaited)""", seq))

    # Progress, and what comes next.

    def running_in(self, queue: str, count: int) -> list[str]:
        """Return the ids of the first `count` jobs of a queue that are processing."""
        return self.column(
            """SELECT id FROM jobs WHERE state = 'processing' AND queue = ?
                ORDER BY seq LIMIT ?""", queue, count)

    def last_seq(self) -> int:
        """Return the seq of the last job that came, even if it is forgotten; 0 if none came."""
        return int(self.value("SELECT seq FROM sqlite_sequence WHERE name = 'jobs'") or 0)

    def unfinished(self, first: int, last: int) -> set[int]:
        """Return the seqs from `first` to `last` of jobs that have not ended."""
        return set(self.column(
            """SELECT seq FROM jobs WHERE state IN ('pending', 'processing', 'failed')
                AND seq BETWEEN ? AND ?""", first, last))

    def end_of(self, seq: int) -> tuple[str, str, str | None] | None:
        """Return id, state and last error of a job; None if it was forgotten."""
        rows = self.rows("SELECT id, state, last_error FROM jobs WHERE seq = ?", seq)
        return next(iter(rows), None)

    def oldest_waiting(self, now: int) -> Row | None:
        """Return the job that has waited longest, and the time since when it could run: `ready_at`.

        Jobs of paused queues are left out; others may wait for a worker or for their queue's limit.
        """
        fresh, late, overdue = OLDEST_WAITING
        found = self.dicts(fresh) + self.dicts(late) + self.dicts(overdue, now)
        return min(found, key=lambda job: job["ready_at"], default=None)

    def next_due(self, now: int) -> Row | None:
        """Return the job that waits for the earliest time after `now`, or that is added then."""
        job, schedule = self.first(NEXT_DUE, now), self.first(NEXT_SCHEDULED, now)
        if schedule and (job is None or schedule["due"] < job["due"]):
            due = schedule["due"]
            return {"id": scheduled_id(schedule["name"], due),
                    "command": json.loads(schedule["job"])["command"], "due": due}
        return job


def _draw_ids(count: int) -> list[str]:
    """Draw random ids: 40 bits, ten hex digits each."""
    digits = os.urandom(5 * count).hex()
    return [digits[at:at + 10] for at in range(0, 10 * count, 10)]


def as_json(value: Any) -> str | None:
    """Write what few jobs have as JSON; None if there is nothing."""
    return json.dumps(value) if value else None


def policy_of_draft(draft: Draft) -> str | None:
    """Return those of a draft's POLICY_FIELDS and its input of --each that are given."""
    return as_json({name: draft[name] for name in (*POLICY_FIELDS, "input")
                    if draft.get(name) not in (None, [])})


def is_special(draft: Draft) -> bool:
    """Tell whether a draft has what few jobs have; bulks without it are inserted faster."""
    lists = draft["after"], draft["after_any"], draft["dead_on"]
    return any(lists) or {draft["unique"], draft["retry_after"], draft.get("input")} != {None}


class Intake:
    """Adds jobs in one transaction, a thousand with one statement, which is faster.

    `caller` is the PATH, umask and environment (JSON, or empty) of the process that enqueues. A job
    whose id or key is taken is refused; with `skip_existing` it is left out, and `existing` has the
    seq of the job that was there before.
    """

    def __init__(self, store: Reading, settings: Settings, caller: tuple[str, int, str],
                 now: int, skip_existing: bool = False):
        self.store, self.settings, self.caller = store, settings, caller
        self.now, self.skip_existing = now, skip_existing
        self.contexts: Row = {}  # folder: the key of its context
        self.users: Counter[str] = Counter()  # folder: how many jobs were added
        self.chunk: list[Draft] = []  # drafts not inserted yet
        self.added: Counter[str] = Counter()  # queue: how many jobs were added
        self.existing: list[int] = []

    def look_up_context(self, cwd: str) -> None:
        """Find or make the context of a folder, before its first draft is inserted."""
        if cwd in self.contexts:
            return
        path, umask, environ = self.caller
        values = cwd, path, umask, self._environment(environ)
        self.store.execute(
            """INSERT OR IGNORE INTO contexts (cwd, path, umask, environment, jobs)
                VALUES (?, ?, ?, ?, 0)""", *values)
        self.contexts[cwd] = self.store.value(
            """SELECT id FROM contexts WHERE cwd = ? AND path = ? AND umask = ?
                AND environment = ?""", *values)

    def _environment(self, environ: str) -> Any:
        """Return the key of the caller's environment, stored once for all folders; 0: none."""
        if not environ:
            return 0
        self.store.execute("INSERT OR IGNORE INTO environments (environ) VALUES (?)", environ)
        return self.store.value("SELECT id FROM environments WHERE environ = ?", environ)

    def _row(self, draft: Draft, job_id: str) -> tuple[Any, ...]:
        """Return the values of ADD_JOB; fields not given take their settings of this moment."""
        priority, timeout, max_retries = (
            self.settings[name] if draft[name] is None else draft[name]
            for name in ("priority", "timeout_seconds", "max_retries"))
        run_at, due = draft["run_at"], None
        if (run_at or 0) > self.now:
            due = run_at
        return (
            job_id, draft["id"] is None, draft["command"], draft["queue"] or "default",
            priority, due is None, due, run_at, timeout, max_retries, draft["backoff_base"],
            self.contexts[draft["cwd"]], as_json(draft["env"]),
            self.now, self.now, isinstance(run_at, Delayed), draft["expires_at"],
            draft["shell"])

    def count(self, draft: Draft) -> None:
        """Count an inserted draft."""
        self.added[draft["queue"] or "default"] += 1
        self.users[draft["cwd"]] += 1

    def insert_chunk(self) -> None:
        """Insert the chunk at once; if an id is taken, one by one, to find which."""
        db = self.store.db
        drawn = iter(_draw_ids(sum(draft["id"] is None for draft in self.chunk)))
        names = [draft["id"] or next(drawn) for draft in self.chunk]
        db.execute("SAVEPOINT chunk")
        try:
            db.executemany(ADD_JOB, map(self._row, self.chunk, names))
        except sqlite3.IntegrityError:
            db.execute("ROLLBACK TO chunk")
            pairs = zip(self.chunk, names)
            self.chunk = [draft for draft, name in pairs if self.insert(draft, name)]
        db.execute("RELEASE chunk")
        for draft in self.chunk:
            self.count(draft)
        self.chunk = []

    def insert(self, draft: Draft, name: str = "") -> bool:
        """Insert one job, with the id `name` if it was drawn already; False if skipped."""
        name = name or draft["id"]
        while draft["id"] is None and (not name or self.store.rows(WITH_ID, name)):
            name = _draw_ids(1)[0]
        key = draft["unique"]
        twin = self.store.first(WITH_ID, name) or self.store.first(
            """SELECT seq, id, state FROM jobs
                WHERE unique_key = ? AND state <> 'completed' AND state <> 'dead'
                AND state <> 'cancelled'""", key)
        if not twin:
            self.store.execute(ADD_JOB, *self._row(draft, name))
            return True
        if self.skip_existing:
            self.existing.append(twin["seq"])
            return False
        problem = ("a job with the id %s exists already; choose another, or use --if-exists skip"
                   % name)
        if twin["id"] != name:
            problem = "a job with the key %s is %s: %s; --if-exists skip makes this a success" % (
                clean(str(key)), twin["state"], clean(twin["id"]))
        raise QueueError(at_line(draft.get("line", 0), problem))

    def finish(self) -> None:
        """Insert what is left, and count all added jobs in queues and contexts."""
        self.insert_chunk()
        for queue, count in self.added.items():
            self.store.execute(ADD_QUEUE, queue)
            self.store.execute("UPDATE queues SET pending = pending + ? WHERE name = ?",
                               count, queue)
        for cwd, key in self.contexts.items():
            self.store.execute("UPDATE contexts SET jobs = jobs + ? WHERE id = ?",
                               self.users[cwd], key)
            self.store.execute("DELETE FROM contexts WHERE id = ? AND jobs = 0", key)


def hook_env(job: Row) -> dict[str, str]:
    """Return the variables that tell a hook which job has ended, and how."""
    shown = {
        "JOB_ID": job["id"], "QUEUE": job["queue"],
        "ATTEMPT": job["attempts"], "MAX_RETRIES": job["max_retries"],
        "COMMAND": shorten(job["command"], 30000), "STATE": job["state"],
        "EXIT_CODE": job["exit_code"], "ERROR": clean(job["last_error"] or "")}
    return {"QUEUECTL_" + name: "" if value is None else str(value)
            for name, value in shown.items()}


# Errors of jobs that ended because another did; the other's id stands before the text.
ENDED_ALONG = {
    DEAD: " is dead, and this job was to run after it",
    CANCELLED: " was cancelled, and this job was to run after it"}
# Seconds that a change of many jobs may hold the mutex at a time, and seconds that it rests
# between: without a rest, others would hardly ever get the mutex.
SLICE, SLICE_PAUSE = 0.2, 0.01


def why_along(awaited: Row) -> str:
    """Return the error of a job that was to run after one that ended in vain: names the first."""
    reason, error = ENDED_ALONG[awaited["state"]], awaited["last_error"] or ""
    return error if error.endswith(reason) else awaited["id"] + reason


class Endings(Reading):
    """What follows from the end of a job, in the transaction that records the end.

    A job that ends in vain (dead or cancelled) takes along the jobs that were to run after it, and
    those after them. There may be a hundred thousand, and other writers must not wait so long. So
    some are left for transactions of their own (`settle`), and the mark `unsettled` in the database
    says so. If the process is killed meanwhile, a worker sees the mark and goes on. Until then
    these jobs wait for a job that is never completed, so no worker can claim them.
    """

    unsettled = False  # whether the job that ended last here must still take others along
    hookless = ""  # the queue whose jobs add none of on_end and on_dead when they end

    def follow_up(self, seq: int, state: str, settings: Settings, now: int) -> bool:
        """Do what follows from the end of a job; return whether other jobs can start, or ended too.

        Adds the jobs that `settings` demand: by on_end, and by on_dead if it died. Jobs that waited
        for nothing else become ready, or are taken along.
        """
        news = self._release_waiting(seq, state, now)
        if state != COMPLETED or settings["on_end"]:
            ended = self.dicts(HOOKED + "WHERE seq = ?", seq)
            news |= self._add_hooks(ended[0], state == DEAD, now)
            news |= state != COMPLETED and self._end_dependents(ended, now)
        if state == DEAD:
            self._fail_fast(seq)
        return news

    def _fail_fast(self, seq: int) -> None:
        """After a death: if the job's run has --fail-fast, let none of its jobs start any more.

        `settle` cancels those that wait.
        """
        ending = self.execute(
            """UPDATE queues SET fail_fast = 2, paused = 1 WHERE fail_fast = 1
                AND name = (SELECT queue FROM jobs WHERE seq = ?)""", seq)
        if ending:
            self.unsettled = True
            self.execute("UPDATE control SET unsettled = 1")

    def _cancel_rest(self, now: int) -> list[Row]:
        """Cancel some of the waiting jobs of a run that ends by --fail-fast."""
        waiting = self.dicts(
            HOOKED + """WHERE +state IN ('pending', 'failed') AND queue IN (
                SELECT name FROM queues WHERE fail_fast = 2) LIMIT 500""")
        for job in waiting:
            self.end_in_vain(job, CANCELLED, "cancelled: another job of its run died", now)
        if not waiting:
            self.execute("UPDATE queues SET fail_fast = 1, paused = 0 WHERE fail_fast = 2")
        return waiting

    def _release_waiting(self, seq: int, state: str, now: int) -> bool:
        """Make jobs ready that waited only for such an end of a job; return if there were any."""
        completed = state == COMPLETED
        waiting = self.column("SELECT job FROM waits WHERE awaited = ? AND (either OR ?)",
                              seq, completed)
        if waiting:
            self.execute("DELETE FROM waits WHERE awaited = ? AND (either OR ?)", seq, completed)
            self.db.executemany(RELEASE_JOB, [(now, now, job) for job in waiting])
        return bool(waiting)

    def _end_dependents(self, doomed: list[Row], now: int) -> bool:
        """End in vain the jobs that were to run after these jobs, and after those, for SLICE.

        Returns whether there were any.
        """
        end, found = monotonic() + SLICE, False
        while doomed:
            awaited = doomed[-1]
            waiting = self.dicts(
                HOOKED + """WHERE state = 'pending' AND seq IN (SELECT job FROM waits
                    WHERE awaited = ? AND NOT either) LIMIT 500""", awaited["seq"])
            if not waiting:
                doomed.pop()
            found = found or bool(waiting)
            for job in waiting:
                self.end_in_vain(job, awaited["state"], why_along(awaited), now)
                doomed.append(job)
            if monotonic() >= end:
                break
        self.unsettled = bool(doomed)
        if doomed:
            self.execute("UPDATE control SET unsettled = 1")
        return found

    def end_in_vain(self, job: Row, state: str, error: str, now: int) -> None:
        """Make a waiting job dead or cancelled."""
        job.update(state=state, last_error=error)
        self.execute(
            """UPDATE jobs SET state = ?, ready = 0, due = NULL, last_error = ?, updated_at = ?,
                finished_at = ? WHERE seq = ?""",
            state, error, now, now, job["seq"])
        self._count_in_vain(job["queue"])
        self._add_hooks(job, False, now)
        self._release_waiting(job["seq"], state, now)

    def _count_in_vain(self, queue: str) -> None:
        """Note that a job of a queue ended in vain: so drains of it exit with 1."""
        self.execute(
            """UPDATE pools SET died = died + 1
                WHERE queues IS NULL OR instr(',' || queues || ',', ?)""", ",%s," % queue)

    def settle(self, now: int) -> bool:
        """In transactions of its own: end all jobs that must still be taken along.

        Returns whether there were any.
        """
        found = False
        while self.value("SELECT unsettled FROM control"):
            with self.transaction():
                doomed = self.dicts(  # read again, for others may have settled or retried some
                    HOOKED + """WHERE +state IN ('dead', 'cancelled') AND seq IN (
                        SELECT awaited FROM waits JOIN jobs ON seq = job
                        WHERE NOT either AND state = 'pending') LIMIT 500""")
                doomed += self._cancel_rest(now)
                found = found or bool(doomed)
                self.execute("UPDATE control SET unsettled = ?", bool(doomed))
                self._end_dependents(doomed, now)
            sleep(SLICE_PAUSE)
        return found

    def _add_hooks(self, job: Row, died: bool, now: int) -> bool:
        """Add the jobs of on_end, and of on_dead if the job `died`; return whether there are any.

        They are ordinary jobs, but their own end adds none.
        """
        settings = self.settings()
        commands = settings["on_end"], died and settings["on_dead"]
        if job["queue"] in (HOOK_QUEUE, self.hookless) or not any(commands):
            return False
        path = os.fsencode(os.environ.get("PATH", os.defpath))
        caller = path.decode("utf-8", "replace"), 0o077, ""
        draft = dict(
            dict.fromkeys(GIVEN_FIELDS), queue=HOOK_QUEUE, cwd=self.folder,
            priority=HOOK_PRIORITY, timeout_seconds=HOOK_TIME)
        intake = Intake(self, settings, caller, now)
        intake.look_up_context(self.folder)
        intake.chunk = [dict(draft, command=command, env=hook_env(job))
                        for command in commands if command]
        intake.finish()
        return True


class Editing(Endings):
    """What a job waits for, and changes of a job by a person."""

    def _known(self, names: list[str], moved: Any) -> list[str]:
        """Return the ids that a job must wait for; without those it has met if it `moved` here."""
        return [name for name in names if not moved or self.first(WITH_ID, name)]

    def set_waits(self, seq: int, after: Names, after_any: Names, now: int) -> None:
        """Have a job wait for others. Raises QueueError if one is unknown.

        Each job in `after` must be completed; each in `after_any` must have ended. A pending job is
        held back until then, or ends in vain if one in `after` has.
        """
        awaited = [self._awaited(name, seq) for name in after]
        either = [self._awaited(name, seq) for name in after_any]
        waits = [(job["seq"], seq, 0) for job in awaited if job["state"] != COMPLETED]
        waits += [(job["seq"], seq, 1) for job in either if job["state"] not in ENDED]
        self.db.executemany(
            "INSERT OR IGNORE INTO waits (awaited, job, either) VALUES (?, ?, ?)", waits)
        self.execute("UPDATE jobs SET after_ids = ?, after_any_ids = ? WHERE seq = ?",
                     ",".join(job["id"] for job in awaited) or None,
                     ",".join(job["id"] for job in either) or None, seq)
        if waits:
            self.execute(
                "UPDATE jobs SET ready = 0, due = NULL, chained = 1 WHERE seq = ?", seq)
        pending = self.dicts(HOOKED + "WHERE seq = ? AND state = 'pending'", seq)
        in_vain = [job for job in awaited if job["state"] in IN_VAIN]
        if pending and in_vain:
            cause = in_vain[0]
            self.end_in_vain(pending[0], cause["state"], why_along(cause), now)

    def _awaited(self, name: str, seq: int) -> Row:
        """Find a job that the one at `seq` is to run after."""
        found = self.first("SELECT seq, id, state, last_error FROM jobs WHERE id = ?", name)
        job = found or self.find(name)
        if job["seq"] == seq:
            raise QueueError("a job can't wait for itself")
        return job

    def edit(self, job: Row, changes: Draft, now: int) -> None:
        """Change the given fields of a job that waits or has ended.

        For a running job `changes` may only have the time-out. Raises QueueError if the job would
        wait for itself, or if its key is taken.
        """
        seq, new = job["seq"], {**job, **changes}
        values = {name: new[name] for name in EDITABLE}
        env = json.loads(job["env"] or "{}")
        env.update(changes.get("env") or {})
        policy = {**json.loads(job["policy"] or "{}"), **changes}
        values.update(
            env=as_json(env), policy=policy_of_draft(policy),
            unique_key=new["unique"], updated_at=now, context=job["context"])
        if "cwd" in changes:
            values["context"] = self._count_in_folder(job, changes["cwd"])
        assignments = ", ".join("%s = ?" % name for name in values)
        try:
            self.execute("UPDATE jobs SET %s WHERE seq = ?" % assignments, *values.values(), seq)
        except sqlite3.IntegrityError:
            raise QueueError("another job with the key %s waits or runs" % new["unique"]) from None
        if new["queue"] != job["queue"]:
            self._count_in_queue(job, new["queue"])
        if "after" in changes or "after_any" in changes:
            self._wait_anew(job, new, now)
        elif "run_at" in changes and (job["ready"] or job["due"] is not None):
            due = max(new["run_at"] or 0, now)
            self.execute("UPDATE jobs SET ready = ?, due = ? WHERE seq = ?", due == now, due, seq)
        if job["state"] == FAILED and job["attempts"] >= max(1, new["max_retries"]):
            self._die(seq, now)

    def _count_in_queue(self, job: Row, queue: str) -> None:
        """Move the count of a job to another queue."""
        state, before = job["state"], job["queue"]
        self.execute(ADD_QUEUE, queue)
        for name, step in ((queue, 1), (before, -1)):
            self.execute("UPDATE queues SET %s = %s + ? WHERE name = ?" % (state, state),
                         step, name)
        self.execute(FORGET_QUEUE, before)

    def _count_in_folder(self, job: Row, cwd: str) -> int:
        """Move the count of a job to another folder; return the key of the context there."""
        intake = Intake(self, {}, self.context(job["context"])[1:], 0)
        intake.look_up_context(cwd)
        key: int = intake.contexts[cwd]
        intake.contexts[""] = job["context"]  # the old folder
        intake.users.update({cwd: 1, "": -1})
        intake.finish()
        return key

    def _wait_anew(self, job: Row, new: Row, now: int) -> None:
        """Replace the jobs that a job waits for."""
        seq = job["seq"]
        if job["state"] == FAILED:  # it still has to wait for its next try
            self.execute("UPDATE jobs SET state = 'pending', run_at = due WHERE seq = ?", seq)
        after, after_any = [  # the database keeps it as one text
            names.split(",") if isinstance(names, str) else names or []
            for names in (new["after"], new["after_any"])]
        self.execute("DELETE FROM waits WHERE job = ?", seq)
        self.set_waits(seq, after, after_any, now)
        circle = self.rows(
            """WITH RECURSIVE awaited_ones (seq) AS (SELECT awaited FROM waits WHERE job = ?
                    UNION SELECT awaited FROM waits JOIN awaited_ones ON job = awaited_ones.seq)
                SELECT 1 FROM awaited_ones WHERE seq = ?""", seq, seq)
        if circle:
            raise QueueError("%s would wait for itself: a job that it is to run after waits for it"
                             % job["id"])
        self.execute(RELEASE_JOB, now, now, seq)

    def _die(self, seq: int, now: int) -> None:
        """Make a failed job dead, as if its last run had been the last one allowed."""
        job = self.dicts(HOOKED + "WHERE seq = ?", seq)[0]
        job["state"] = DEAD
        self.execute("UPDATE jobs SET state = 'dead', ready = 0, due = NULL WHERE seq = ?", seq)
        self._count_in_vain(job["queue"])
        self.follow_up(seq, DEAD, self.settings(), now)


READY_AT_ONCE = 10_000


class Incoming(Editing):
    """Jobs are added."""

    def add(self, drafts: Iterable[Draft], settings: Settings, path: str, umask: int,
            now: int, skip_existing: bool = False,
            environ: str = "") -> tuple[int, int, list[int]]:
        """Insert jobs; return the seq before the first, the seq of the last, and existing seqs.

        `path`, `umask` and `environ` (JSON, or empty) are those of the process that enqueues.
        Raises QueueError if an id or a key is taken, unless `skip_existing`, and if a job is to run
        after one that does not exist.
        """
        before = self.last_seq()
        intake = Intake(self, settings, (path, umask, environ), now, skip_existing)
        for draft in drafts:
            intake.look_up_context(draft["cwd"])
            if is_special(draft):
                intake.insert_chunk()  # the job may wait for one of these
                self._add_special(intake, draft)
                continue
            intake.chunk.append(draft)
            if len(intake.chunk) == 1000:
                intake.insert_chunk()
        intake.finish()
        return before, self.last_seq(), intake.existing

    def _add_special(self, intake: Intake, draft: Draft) -> None:
        """Insert a job with a key, a policy, or jobs to wait for.

        If one of those has ended in vain already, so does this job.
        """
        if not intake.insert(draft):
            return
        seq = self.last_seq()
        self.execute("UPDATE jobs SET unique_key = ?, policy = ? WHERE seq = ?",
                     draft["unique"], policy_of_draft(draft), seq)
        intake.count(draft)
        # A drain of this queue must know of its end in vain.
        self.execute(ADD_QUEUE, draft["queue"] or "default")
        try:
            after, after_any = [
                self._known(draft[name] or [], draft.get("moved"))
                for name in ("after", "after_any")]
            self.set_waits(seq, after, after_any, intake.now)
        except QueueError as error:
            problem = "%s; what a job is to run after must stand before it" % error
            raise QueueError(at_line(draft.get("line", 0), problem)) from None


# How many schedules are looked at in one transaction. Each makes two jobs at most: 100 a commit.
LOOKED_AT = 50


class Scheduling(Incoming):
    """Schedules: for each of its times a schedule makes one job at most.

    Workers make the jobs in the transaction that claims. The same transaction advances `last` of
    the schedule, so a worker that is killed at any moment leaves both or neither: no time is lost
    and none is repeated. `last` never goes back by itself, so a clock that is set back repeats no
    time either. All methods that change anything are called in a transaction.
    """

    def schedules(self, name: str | None = None) -> list[Row]:
        """Return all schedules in the order of their names, or only the one called `name`."""
        return self.dicts(  # SQLite sorts the blob x'' after every text
            """SELECT * FROM schedules
                WHERE name BETWEEN coalesce(?, '') AND coalesce(?, x'') ORDER BY name""",
            name, name)

    def schedule(self, name: str) -> Row:
        """Return the schedule called `name`; raises QueueError if there is none."""
        for schedule in self.schedules(name):
            return schedule
        known = self.column("SELECT name FROM schedules")
        raise QueueError("there is no schedule %s%s; `queuectl schedule list` shows them"
                         % (name, nearest(name, known)))

    def scheduled_queues(self) -> list[str]:
        """Return the queues of the schedules that are not paused."""
        return self.column("SELECT DISTINCT queue FROM schedules WHERE due IS NOT NULL")

    def schedule_counts(self) -> list[tuple[str, int, int, int]]:
        """Return the name of each schedule, and how many times were made, skipped and missed."""
        return self.rows("SELECT name, made, skipped, missed FROM schedules ORDER BY name")

    def zone(self) -> str:
        """Return the time zone of the workers, as `zone_here` named it there."""
        return str(self.value("SELECT zone FROM control"))

    def follow_zone(self, zone: str) -> None:
        """If the zone of the workers has changed, have the next claim look at all local times."""
        if self.execute("UPDATE control SET zone = ? WHERE zone <> ?", zone, zone):
            self.execute("""UPDATE schedules SET due = 1
                WHERE due IS NOT NULL AND cron IS NOT NULL AND NOT utc""")

    def make_due(self, now: int) -> None:
        """Make the jobs of due schedules: of LOOKED_AT schedules at most, and for SLICE at most.

        The schedules that are left stay due, and the next claim goes on with them.
        """
        due = self.dicts("SELECT * FROM schedules WHERE due <= ? ORDER BY due LIMIT ?",
                         now, LOOKED_AT)
        end, pools = monotonic() + SLICE, due and self.pools()
        for schedule in due:
            self._pass_times(schedule, pools, now)
            if monotonic() >= end:
                break

    def _pass_times(self, schedule: Row, pools: Sequence[Row], now: int) -> None:
        """Deal with all times of a schedule up to now: make jobs for some, count the others.

        A time counts as missed if no pool that serves the queue was alive then, else as skipped.
        """
        following = partial(next_time, schedule, zone=local_offset)
        times = times_between(following, schedule["last"], now)
        lived = self._lived_since(schedule["queue"], pools, now)
        made = [each for each in self._chosen(schedule, times, lived, now)
                if self._make(schedule, scheduled_id(schedule["name"], each), each, now)]
        missed = len([each for each in times if each < lived and each not in made])
        skipped = len(times) - len(made) - missed
        schedule["skipped_in_row"] += skipped
        if made:
            schedule["skipped_in_row"] = 0
        schedule["made"] += len(made)
        schedule["skipped"] += skipped
        schedule["missed"] += missed
        schedule["last"] = max([schedule["last"], *times])
        schedule["due"] = following(max(schedule["last"], now))
        self._put(schedule)

    def _put(self, schedule: Row) -> None:
        """Write the row of a schedule; columns that it lacks get their defaults."""
        self.execute("INSERT OR REPLACE INTO schedules (%s) VALUES (%s)" % (
            ", ".join(schedule), ", ".join("?" * len(schedule))), *schedule.values())

    def _lived_since(self, queue: str, pools: Sequence[Row], now: int) -> int:
        """Return since when a live pool serves a queue; NEVER if none does.

        A pool that seems to have started after now started before the clock was set back. It is
        taken to have been alive all the time.
        """
        started = [pool["started_at"] for pool in pools if pool["alive"] and serves(pool, queue)]
        return min((start if start <= now else 0 for start in started), default=NEVER)

    def _chosen(self, schedule: Row, times: list[int], lived: int, now: int) -> list[int]:
        """Return the times for which a job is to be made.

        That is the last one, if the job before it has ended (with `queue`: if at most one has not).
        If there is room for two, an earlier time of the last minute also gets its job, so that a
        worker that looks late, as after a kill, loses none.
        """
        room = 2 if schedule["if_running"] == "queue" else 1
        room -= len(self._unfinished_of(schedule))
        if room < 1 or not times:
            return []
        *earlier, last = times
        if last < lived and schedule["if_missed"] == "skip":
            return []
        recent = [each for each in earlier if each >= lived and each > now - MINUTE]
        return [*recent, last][-room:]

    def _unfinished_of(self, schedule: Row) -> list[int]:
        """Return the seqs of the jobs of a schedule that have not ended."""
        jobs = {schedule["newest"] or 0, *json.loads(schedule["others"])}
        return self.column(
            """SELECT seq FROM jobs WHERE seq IN (%s)
                AND +state IN ('pending', 'processing', 'failed') ORDER BY seq"""
            % ", ".join("?" * len(jobs)), *jobs)

    def _make(self, schedule: Row, job_id: str, due: int, now: int) -> int:
        """Add a job; return its seq, or 0 if a job has its id or key already.

        The caller writes the schedule afterwards. The draft was checked when the schedule was set.
        It is not checked again, because an error here would stop every claim.
        """
        draft = dict(json.loads(schedule["job"]), id=job_id)
        if draft["expires_at"] is not None:
            draft["expires_at"] += due
        before, seq, _ = self.add(
            [draft], self.settings(), schedule["path"], schedule["umask"], now, True,
            schedule["environ"])
        if seq == before:
            return 0
        others = self._unfinished_of(schedule)
        schedule.update(newest=seq, others=json.dumps(others))
        return seq

    def set_schedule(self, new: Row, now: int) -> bool:
        """Make or replace a schedule; return False if nothing in it differs.

        New times count from now. A time of the old ones that has come already, but that no worker
        has looked at, is dealt with first, so that it is not lost. Other changes leave `last` as
        it is, and a paused schedule stays paused.
        """
        name = new["name"]
        old = next(iter(self.schedules(name)), {})
        if not old and self.rows(WITH_ID, name):
            raise QueueError("%s is the id of a job; choose another name" % name)
        changed = {key for key in new if old.get(key) != new[key]}
        if not changed:
            return False
        anew = not changed.isdisjoint(("cron", "every", "utc"))
        if anew and old.get("due"):
            self._pass_times(old, self.pools(), now)
        schedule = {"created_at": now, "paused": 0, **old, **new}
        if anew:
            self._start_anew(schedule, now)
        self._put(schedule)
        # `due` was computed in this zone. Workers in the same zone need not compute it again.
        self.execute("UPDATE control SET zone = ? WHERE zone = ''", zone_here())
        self.execute(ADD_QUEUE, new["queue"])
        self.execute(FORGET_QUEUE, old.get("queue"))
        return True

    def _start_anew(self, schedule: Row, now: int) -> None:
        """Have a schedule count its times from now (a whole second); if paused, it has none."""
        schedule["last"], schedule["due"] = now - now % 1000, None
        if not schedule["paused"]:
            schedule["due"] = next_time(schedule, schedule["last"], local_offset)

    def pause_schedule(self, name: str, paused: bool, now: int) -> None:
        """Pause a schedule, or let it go on from now. The times between do not count as missed.

        A schedule whose `last` is in the future, because the clock was ahead, goes on from now too.
        """
        schedule = self.schedule(name)
        if schedule["paused"] != paused or schedule["last"] > now:
            schedule["paused"] = paused
            self._start_anew(schedule, now)
            self._put(schedule)

    def run_schedule(self, name: str, now: int) -> int:
        """Make a job of a schedule now, in addition to its times; return its seq.

        Its id has milliseconds, so it can't be the id of a job for one of the times.
        """
        schedule = self.schedule(name)
        seq = self._make(schedule, "%s@%s" % (name, show_time(now)), now, now)
        if not seq:
            raise QueueError("a job with the same id or key is there already; try again later")
        self._put(schedule)
        return seq

    def delete_schedule(self, name: str) -> Row:
        """Delete a schedule and return it. Its jobs stay."""
        schedule = self.schedule(name)
        self.execute("DELETE FROM schedules WHERE name = ?", name)
        self.execute(FORGET_QUEUE, schedule["queue"])
        return schedule


class Store(Scheduling):
    """The queue at `path`: one method for each change of a job's state, called in a transaction.

    Arguments and errors: see Database. Times are in milliseconds since the epoch.
    """

    # Jobs are claimed and recorded.

    def claim(self, worker: str, slot: int, queues: Names, due: int,
              now: int, pool: str = "") -> Job | None:
        """Claim the next job of these queues (none: all); return None if there is none.

        If `due`, the time from `pulse`, has come, jobs are made ready first. If there are very
        many, some are made ready instead of a claim, so that the mutex is not held for long. `pool`
        is given if its claims count against --max-jobs.
        """
        if due <= now and self._make_ready(now):
            return None
        found = self.next(queues)
        if found is None:
            return None
        job = Job._make((*found, self._free_place(found[3]), now, None))
        waited = max(0, now - job.since)
        if pool and job.queue != HOOK_QUEUE:
            turn = self.execute(
                """UPDATE pools SET jobs_left = jobs_left - 1
                    WHERE name = ? AND jobs_left > 0""", pool)
            if not turn:
                return None
        if job.runner:
            job = job._replace(word=os.urandom(4).hex())
            self.execute("UPDATE queues SET probe = ? WHERE name = ? AND rests", job.seq, job.queue)
        self.execute(
            """UPDATE jobs SET state = 'processing', ready = 0, due = NULL,
                attempts = attempts + 1, runs = runs + 1, worker = ?, slot = ?, place = ?,
                waited = ?, locked_at = ?, started_at = ?, updated_at = ?, ender = ?, word = ?
                WHERE seq = ?""",
            worker, slot, job.place, waited, now, now, now, job.ender, job.word, job.seq)
        return job

    def _make_ready(self, now: int) -> bool:
        """Do what is due; return whether that was so much that the mutex must be freed now."""
        if self.scheduling:  # before _expire: the job of a missed time may have expired
            self.make_due(now)
        if self._expire(now):
            return True
        made_ready = self.execute(
            """UPDATE jobs SET ready = 1 WHERE seq IN (SELECT seq FROM jobs
                WHERE ready = 0 AND due IS NOT NULL AND due <= ? ORDER BY due LIMIT %d)"""
            % READY_AT_ONCE, now)
        return made_ready == READY_AT_ONCE

    def _free_place(self, queue: str) -> int:
        """Return the lowest number from 1 that no running job of a queue has."""
        taken = self.column(
            "SELECT place FROM jobs WHERE state = 'processing' AND queue = ?", queue)
        return min(set(range(1, len(taken) + 2)) - set(taken))

    def _expire(self, now: int) -> bool:
        """Cancel expired jobs for at most SLICE; return whether some are left."""
        end = monotonic() + SLICE
        expired = self.column(
            """SELECT seq FROM jobs INDEXED BY jobs_expiring WHERE expires_at IS NOT NULL
                AND state = 'pending' AND runs = 0 AND expires_at <= ? LIMIT 1000""", now)
        for seq in expired:
            self.cancel_waiting(seq, now, "expired: no run had begun by then")
            if monotonic() >= end:
                return True
        return len(expired) == 1000

    def make_ready_after_clock_step(self, now: int) -> None:
        """After the clock was set back: make retries due that would otherwise wait too long.

        Delays begin again.
        """
        self.execute(
            """UPDATE jobs SET ready = 1, due = min(due, ?)
                WHERE state = 'failed' AND ready = 0 AND updated_at > ?""", now, now)
        self.execute(
            """UPDATE jobs SET due = due - updated_at + ?, run_at = run_at - updated_at + ?,
                updated_at = ? WHERE delayed = 1 AND ready = 0 AND due IS NOT NULL
                AND state = 'pending' AND updated_at > ?""", now, now, now, now)

    def record(self, ended: RunResult, retry_at: int | None, pools: Iterable[str],
               settings: Settings) -> tuple[str, bool]:
        """Record how a run ended; return the job's new state, and whether other jobs can start.

        If the job ended in vain, this counts for drains of `pools`. The hooks in `settings` add
        their jobs when it ends. If the job is no longer in this very run, another process has
        recorded the run as lost: then nothing changes, and the state is "".
        """
        job, now = ended.job, ended.finished_at
        state, attempts = next_state(ended.ending, job.attempts, job.max_retries, ended.final)
        # Its worker did not notice the mark in time.
        if state not in ENDED and self.orders_of(job.seq)[0]:
            state, attempts = CANCELLED, job.attempts
        if not self._leave_run(ended, state, attempts, retry_at):
            return "", False
        if job.word:
            self._note_engine(ended)
        self._keep_run(ended)
        self._count_run(ended, state)
        if state not in ENDED:
            return state, False
        if state in IN_VAIN and job.queue != HOOK_QUEUE:
            for pool in pools:
                self.execute("UPDATE pools SET died = died + 1 WHERE name = ?", pool)
        return state, self.follow_up(job.seq, state, settings, now)

    def _leave_run(self, ended: RunResult, state: str, attempts: int,
                   retry_at: int | None) -> int:
        """Give a job its new state if it is still in the run that ended."""
        job, now = ended.job, ended.finished_at
        due = {FAILED: retry_at, PENDING: now}.get(state)
        if ended.ending == UNSTARTED:
            due = job.since
        return self.execute(
            """UPDATE jobs SET state = ?, ready = ?, due = ?, attempts = ?, updated_at = ?,
                finished_at = ?, exit_code = ?, last_error = ?, deferrals = deferrals + ?,
                cancel = 0, worker = NULL, slot = NULL, place = NULL, locked_at = NULL
                WHERE seq = ? AND runs = ? AND state = 'processing'""",
            state, state == PENDING, due, attempts, now, now, ended.exit_code, ended.error,
            ended.ending == DEFERRED, job.seq, job.runs)

    def _keep_run(self, ended: RunResult) -> None:
        """Keep a run's record, unless there was no room to start it: then it was no run."""
        job = ended.job
        if ended.ending == UNSTARTED:
            self.execute("UPDATE jobs SET runs = runs - 1 WHERE seq = ?", job.seq)
            return
        self.execute(
            "INSERT INTO runs VALUES (? * 16777216 + ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            job.seq, job.runs, job.attempts, ended.ending, job.started_at, ended.finished_at,
            ended.seconds, ended.exit_code, ended.error, ended.worker,
            ended.stdout or None, ended.stderr or None)

    # Queues with an engine. If it does not take a job, the queue rests for 1, 2, 4 … up to 60
    # seconds. Then one job is tried (the probe); the others follow when that one has begun. Jobs
    # that were handed over together with the first one that was not taken don't count again.

    def _note_engine(self, ended: RunResult) -> None:
        """Let a queue rest if its engine did not take a job; or end a probe."""
        job, now = ended.job, ended.finished_at
        if ended.ending == UNSTARTED:
            self.execute(
                """UPDATE queues SET rests = min(rests + 1, 6), rest_why = ?,
                    rest_until = ? + 1000 * min(60, 1 << rests)
                    WHERE name = ? AND (rests = 0 OR probe = ?)""",
                ended.error, now, job.queue, job.seq)
        self.execute("UPDATE queues SET probe = NULL WHERE name = ? AND probe = ?",
                     job.queue, job.seq)

    def hold_queue(self, job: Job, why: str) -> None:
        """Start no more jobs of a queue until it is known what became of a job in its engine."""
        self.execute("UPDATE queues SET rests = max(rests, 1), rest_why = ?, probe = ? "
                     "WHERE name = ? AND probe IS NULL AND runner IS NOT NULL",
                     why, job.seq, job.queue)

    def is_probe(self, job: Job) -> bool:
        return bool(self.rows("SELECT 1 FROM queues WHERE name = ? AND probe = ?",
                              job.queue, job.seq))

    def end_rests(self, queue: str) -> None:
        """Let all jobs of a queue start, for its engine has taken the probe."""
        self.execute("UPDATE queues SET rests = 0, probe = NULL WHERE name = ?", queue)

    def _count_run(self, ended: RunResult, state: str) -> None:
        """Count a run as completed, failed, or died (its job is dead).

        A run that was ended from outside, or asked to be tried later, is not counted.
        """
        outcomes = [state == outcome for outcome in (COMPLETED, FAILED, DEAD)]
        if not any(outcomes) or ended.ending == DEFERRED:
            return
        job, minute = ended.job, max(MINUTE, ended.finished_at - ended.finished_at % MINUTE)
        waited = max(0, job.started_at - job.since) / 1000
        values = *outcomes, ended.seconds, ended.seconds, waited, waited, job.queue, minute
        if not self.execute(COUNT_RUN, *values):
            self.execute(BEGIN_MINUTE, minute, job.queue)
            self.execute(COUNT_RUN, *values)

    def thin_history(self, kept_from: int, minutes_from: int) -> bool:
        """Merge the oldest minutes into an hour if the hour ended before `minutes_from`.

        Also forgets hours older than `kept_from`. Returns whether there may be more to do.
        """
        oldest = self.value("SELECT min(start) FROM history WHERE span = 60") or NEVER
        hour = oldest - oldest % HOUR
        end = hour + HOUR
        too_old = "FROM history WHERE span IN (60, 3600) AND start < ?"
        if end > minutes_from and not self.rows("SELECT 1 %s LIMIT 1" % too_old, kept_from):
            return False
        with self.transaction():
            if end <= minutes_from:
                self.execute(
                    """INSERT OR REPLACE INTO history SELECT 3600, ?, queue, %s FROM history
                        WHERE span IN (60, 3600) AND start >= ? AND start < ? GROUP BY queue"""
                    % SUMS, hour, hour, end)
                self.execute("DELETE FROM history WHERE span = 60 AND start < ?", end)
            self.execute("DELETE " + too_old, kept_from)
        return True

    # Jobs are cancelled, retried, changed and forgotten; each method tells whether it did so.

    def cancel_waiting(self, seq: int, now: int,
                       reason: str = "cancelled before it ran again") -> bool:
        """Cancel a waiting job."""
        job = self.first(HOOKED + "WHERE seq = ? AND state IN ('pending', 'failed')", seq)
        if job:
            self.end_in_vain(job, CANCELLED, reason, now)
            self._end_dependents([job], now)
        return bool(job)

    def ask_cancel(self, seq: int, now: int) -> int:
        """Have the worker of a running job end it."""
        return self.execute(
            """UPDATE jobs SET cancel = 1, updated_at = ?
                WHERE seq = ? AND state = 'processing'""", now, seq)

    def retry(self, seq: int, now: int) -> int:
        """Let an ended job start afresh, unless its key is taken.

        If it waits for a job that ended in vain, `settle` ends it in vain again.
        """
        self.execute("""UPDATE control SET unsettled = 1
            WHERE EXISTS (SELECT 1 FROM waits WHERE job = ? AND NOT either)""", seq)
        return self.execute(RETRY, now, now, now, now, seq)

    def delete(self, seq: int) -> int:
        """Forget a job that is not running and that no other job waits for."""
        done = self.execute(
            """DELETE FROM jobs WHERE seq = ? AND state <> 'processing' AND NOT EXISTS (
                SELECT 1 FROM waits JOIN jobs AS waiting ON waiting.seq = waits.job
                WHERE awaited = jobs.seq AND waiting.state IN ('pending', 'processing', 'failed'))""", seq)
        if done:
            self.execute("DELETE " + RUNS_OF_JOB, seq, seq)
        return done

    def change_each(self, looked: tuple[Any, Any], change: Callable[[Row], Any],
                    newest_first: bool = False) -> Any:
        """Call `change` with each job that has not changed since `look`; return the changed seqs.

        It works in transactions of SLICE each, so that nobody waits long for the mutex. It leaves
        out jobs that another process has changed, and those for which `change` returns nothing.
        """
        from array import array
        done, left = array("q"), zip(*looked)
        if newest_first:
            left = zip(*map(reversed, looked))
        pair = next(left, None)
        while pair:
            with self.transaction():
                end = monotonic() + SLICE
                while pair:
                    job = self.first(SELECT_JOBS + "WHERE seq = ? AND updated_at = ?", *pair)
                    if job and change(job):
                        done.append(job["seq"])
                    pair = next(left, None)
                    if monotonic() >= end:
                        break
            sleep(SLICE_PAUSE)
        return done

    def forget_some(self, selection: Selection, last: int,
                    spared: Iterable[str] = ()) -> int:
        """Forget selected jobs of one state below seq `last`, the newest first, for SLICE at most.

        Returns the seq that was reached; 0 if no more are left. A waiting job goes before the job
        it waits for. Jobs of the queues `spared` are kept, and those that another process changed
        meanwhile. The mutex is taken only if there is anything to forget.
        """
        state = selection.states[0]
        reached: int = self.value(
            """SELECT seq FROM jobs WHERE state = ? AND seq < ?
                ORDER BY seq DESC LIMIT 1 OFFSET 2000""", state, last) or 0
        terms, values = terms_of(selection)
        found = self.rows(
            "SELECT seq, queue, updated_at FROM jobs WHERE seq < ? AND seq >= ?%s ORDER BY seq DESC"
            % terms, last, reached, *values)
        old = [(seq, changed) for seq, queue, changed in found if queue not in spared]
        if not old:
            return reached
        still_so = "SELECT 1 FROM jobs WHERE seq = ? AND state = ? AND updated_at = ?"
        with self.transaction():
            end = monotonic() + SLICE
            for seq, changed in old:
                if self.value(still_so, seq, state, changed):
                    self.delete(seq)
                if monotonic() >= end:
                    return seq  # type: ignore[no-any-return]
        return reached


def open_trusted(db: str, file: tuple[int, int] | None = None,
                 tell: Tell | None = None, patience: float = PATIENCE) -> Store:
    """Open the store of a database whose commands will be executed.

    `file` is its identity from an earlier check: it must be the same. Raises QueueError if others
    could have written the database, or if it was replaced.
    """
    refuse_untrusted(db)
    store = Store(db, patience, tell)
    OPENED.append(store)
    if file not in (None, store.identity.file):
        store.close()
        raise QueueError("%s was replaced while it was in use; nothing of it is executed" % db)
    return store


# Restoring: a copy of the backup replaces the database.


def copy_backup(backup: str, part: str) -> None:
    """Copy a backup; raises QueueError if it is damaged."""
    source = Store(backup, reading=True)
    try:
        damage = source.damage()
        if damage:
            raise QueueError("%s is damaged: %s" % (backup, damage[0]))
        source.backup(part)
    finally:
        source.close()


def fold_log(db: str) -> None:
    """Have SQLite write the log into the database; return whether it could."""
    old = sqlite3.connect(db, isolation_level=None)
    try:
        old.execute(CHECKPOINT).fetchall()
    except (sqlite3.Error, UnicodeDecodeError):  # the latter from a message about a damaged schema
        pass
    finally:
        old.close()


def keep_aside(db: str) -> str:
    """Give a database, and a log that could not be folded in, a second name; return it."""
    number, kept = 1, db + ".replaced1"
    while exists(kept) or exists(kept + "-wal"):
        number += 1
        kept = "%s.replaced%d" % (db, number)
    os.link(db, kept)
    if exists(db + "-wal"):
        os.rename(db + "-wal", kept + "-wal")
    if exists(db + "-shm"):
        os.unlink(db + "-shm")
    return kept


def put_in_place(backup: str, db: str) -> str:
    """Replace a database by a copy of a backup; return the old one's new name, or "".

    Under the mutex. First the old log is folded into the old database, for SQLite would mix it with
    the new one; if that fails, it is kept beside the old database. There is a database at every
    moment: the old one until the last step. By then it has two names, so that nobody mistakes it
    for the new one.
    """
    if system.is_mount_point(db):
        raise QueueError("%s is mounted as a single file; mount the folder that it is in" % db)
    mutex = open_private(mutex_path(db), os.O_RDWR)
    try:
        system.wait_lock(mutex)
        if not system.try_lock(mutex):
            raise Unavailable("another process is writing to %s; try again when it has finished"
                              % db)
        part, kept = db + ".restored", ""
        copy_backup(backup, part)
        if exists(db):
            fold_log(db)
            kept = keep_aside(db)
        os.replace(part, db)
        sync_folder(dirname(db))
        return kept
    except OSError as error:
        raise QueueError("%s can't be put in its place: %s" % (db, error.strerror)) from error
    finally:
        os.close(mutex)


# ═══ Runner ═══ one run's processes: start, bound and end them; runs in an engine ════════════
#
# The worker decides when a run must end (time-out, cancel, stop): see Attending in section Worker.
# This section finds and ends the run's processes, and bounds its output. The signals and system
# calls themselves are in section Platform.

if TYPE_CHECKING:
    Pause = Callable[[float], object]  # seconds: the longest sleep
FOREVER = float("inf")  # seconds
SHORTEST_LOOK, LONGEST_LOOK = 0.02, 0.5  # seconds between two looks at a run's output
LONGEST_PAUSE = 0.25  # seconds between two looks at processes that were signalled


def run_name(worker: str, seq: int, run: int, word: str | None = None) -> str:
    """Return the QUEUECTL_RUN of a run: unique, for no worker's name is used twice.

    A run in an engine has a random part, too: see EngineRun.
    """
    name = "%s-%d-%d" % (worker, seq, run)
    return "%s_%s" % (name, word) if word else name


def members_of(mark: str, files: Names,
               leader: Leader = NOBODY) -> Callable[[], Living]:
    """Return a function that finds the living processes of a run (see `system.members`).

    It remembers the members it has found. So a child that only its parent tied to the run is still
    known as a member when the parent is gone.
    """
    known: Living = {}

    def find() -> Living:
        found = system.members(mark, files, leader, known)
        known.update(found)
        return found

    return find


def end_processes(members: Callable[[], Living], grace: float, pause: Pause,
                  patience: float = FOREVER) -> bool:
    """End the processes that `members` finds: by SIGTERM, and by SIGKILL after `grace` seconds.

    It calls `members` until no process is left, for they may start others meanwhile. It gives up
    and returns False `patience` seconds after the first SIGKILL.
    """
    start = monotonic()
    nap = 0.005
    asked: set[tuple[int, str]] = set()
    while True:
        found = None  # they can't be seen now, so they may all live
        try:
            found = members()
        except OSError:
            pass
        age = monotonic() - start
        if found == {}:
            return True
        if age >= grace + patience:
            return False
        if found is None:
            pause(LONGEST_PAUSE)
            continue
        for member in found.items():
            if age >= grace or member not in asked:
                system.end_process(*member, age >= grace)
                asked.add(member)
        left = max(grace - age, 0.001) if age < grace else nap
        pause(min(nap, left))
        nap = min(nap * 2, LONGEST_PAUSE)


# How the jobs of a context run: folder, umask, and environment in native form.
JobEnvironment = namedtuple("JobEnvironment", "cwd umask env")


def native_items(texts: dict[str, str]) -> Env:
    return {system.native(name): system.native(value) for name, value in texts.items()}


def with_folder(environment: JobEnvironment) -> JobEnvironment:
    """Return an environment in which a command can start here, though its folder may be gone."""
    return environment if isdir(environment.cwd) else environment._replace(cwd="/")


class Run:
    """One run of a claimed job: its shell, its deadline, its output, its end."""

    pid, leader = 0, NOBODY
    lost = False  # whether it ended, but its exit code went elsewhere
    short = False  # whether the machine had no room to start it
    exit_code: int | None = None
    printed, look_every = 0, SHORTEST_LOOK

    def __init__(self, job: Job, worker: str, slot: OutputFiles, limit: int):
        """`slot` is open and takes the output; `limit` bytes of each stream are kept."""
        self.job, self.worker, self.slot, self.limit = job, worker, slot, limit
        self.command, self.bound_at = job.command, limit
        self.name = run_name(worker, job.seq, job.runs, job.word)
        self.began = monotonic()
        self.set_timeout(job.timeout_seconds)
        self.next_look = self.began + SHORTEST_LOOK

    def start(self, environment: JobEnvironment, db: str, shell: str) -> str:
        """Start the command in its environment; return why that failed, or ""."""
        return self.spawn(self.with_variables(environment, db), shell)

    def with_variables(self, environment: JobEnvironment, db: str) -> JobEnvironment:
        env = {**environment.env, **native_items(self.variables(db))}
        return environment._replace(env=env)

    def spawn(self, environment: JobEnvironment, shell: str) -> str:
        """Start the command; return why that failed, or ""."""
        cwd, umask, env = environment
        try:
            first = system.ticks()
            self.pid = system.spawn(self.command, shell, env, cwd, umask,
                                    *self.slot.fds)
            self.leader = Leader(self.pid, first, system.ticks())
            return ""
        except OSError as error:
            if error.filename == system.native(cwd):
                return "can't start in the folder %s: %s" % (cwd, error.strerror)
            self.short = error.errno in (*SHORTAGES, errno.EIO)
            return "can't start %s: %s" % (shell, error.strerror)

    def variables(self, db: str) -> dict[str, str]:
        """Return the variables that the job has beside its context's."""
        job = self.job
        values = job.id, job.attempts, job.max_retries, job.queue, db
        given = dict(zip(JOB_VARIABLES, map(str, values)))
        given.update(json.loads(job.env or "{}"))  # a hook has those of the job that has ended
        given.update(QUEUECTL_RUN=self.name, QUEUECTL_SLOT=str(job.place))
        return given

    def set_timeout(self, seconds: float | None) -> None:
        """Bound the run to so many seconds from its start; None: no bound."""
        self.timeout = seconds
        self.deadline = self.began + (seconds or FOREVER)

    def has_ended(self) -> bool:
        """Tell whether the command has ended; then `exit_code` is set (negative: a signal)."""
        if self.exit_code is not None or self.lost:
            system.reap(0)
            return True
        try:
            self.exit_code = system.reap(self.pid)
        except ChildProcessError:
            self.lost = True
        return self.exit_code is not None or self.lost

    def patience(self) -> float:
        """Return the seconds for which the worker may sleep without harm to this run."""
        return max(0.0, min(self.next_look, self.deadline) - monotonic())

    def bound_output(self) -> None:
        """Bound the output, if it is time for a look: the faster it grows, the sooner."""
        now = monotonic()
        if now < self.next_look:
            return
        before = self.printed
        try:
            self.printed = self.slot.bound(self.bound_at)
        except OSError:
            pass  # looked at again soon
        self.look_every = min(self.look_every * 2, LONGEST_LOOK)
        if self.printed - before > self.limit // 4:
            self.look_every = SHORTEST_LOOK
        self.next_look = now + self.look_every

    def end(self, grace: float, pause: Pause) -> None:
        """End the command and every process it started; see `end_processes`."""
        members = members_of(self.name + "\0", self.slot.paths, self.leader)

        def living() -> Living:
            self.has_ended()  # reaps dead children without losing the command's exit code
            return members()

        end_processes(living, grace, pause)

    def end_leftovers(self, grace: float, pause: Pause) -> None:
        """After a failed run: end what it left, which must not live beside the next run."""
        if not system.childless:
            self.end(grace, pause)

    def read(self) -> list[bytes]:
        """Read what the run has printed to stdout and stderr, as it is recorded."""
        return self.slot.read(self.limit)

    def result(self, ending: str, error: str | None = None) -> RunResult:
        """Return what to record; the error of a failure ends with the last line of stderr."""
        stdout, stderr = self.read()
        why = last_line(stderr) if error else ""
        if why:
            error = "%s: %s" % (error, why)
        code = None if ending == STOPPED else self.exit_code
        return RunResult(self.job, ending, code, error, now_millis(),
                     monotonic() - self.began, stdout, stderr, self.worker)


# Engines. A queue's runner hands a job to an engine (Slurm, another machine, a container), whose
# client is then the first process of the run here. The client's exit code says nothing about the
# job: it may be that of a broken connection, or 0 after a node has failed. So a wrapper around the
# job writes words to its stderr: a start word, and an end word with the exit code. The end word
# alone decides how the run ended. The other two ends are certain only when the engine has confirmed
# that the run is gone, for a word may be late:
#
#     no start word     the engine did not take the job: there was no run, and its queue rests
#     no end word       the run was lost
#
# Silence is no confirmation: a busy or restarted engine knows nothing, for a while. So the queue's
# ender must have exited with 0 and printed nothing to stdout, twice: see Ender.

# What runs in the engine. $0 is the name of the run, $1 the folder, $2 the umask, $3 the shell and
# $4 the command. A variable `run` could be one of the job's, which an assignment would change; hence
# the long names. An engine may start the same run again by itself, after a preemption for example,
# perhaps on another node with the same home: the folder that mkdir makes prevents a second run. One
# run in 256 removes the folders of runs that began more than a month ago. The wrapper outlives the
# SIGTERM of an engine that ends all processes of a run: without their parent, an engine may lose
# sight of those that go on. The command gets the signal as if there were no trap. After it the word
# is `cut`, not `end`, for the exit code may mean nothing: if the engine signals a child before the
# shell, the shell may go on and exit with 0.
WRAPPER = """\
say() {
    printf '\\n<queuectl %s %s>\\n' "$queuectl_run" "$1" >&2
}
queuectl_run=$0
queuectl_home=${HOME:-/tmp}
test -w "$queuectl_home" || queuectl_home=/tmp
queuectl_begun=$queuectl_home/.queuectl-runs/$queuectl_run
mkdir -p "$queuectl_home/.queuectl-runs" 2>/dev/null
case $queuectl_run in
    *00) find "$queuectl_home/.queuectl-runs" -type d -mtime +30 -exec rmdir {} \\; 2>/dev/null ;;
esac
if ! mkdir "$queuectl_begun" 2>/dev/null && test -d "$queuectl_begun"; then
    echo "queuectl: the engine has started $queuectl_run again; it does not run twice" >&2
    exit 1
fi
queuectl_word=end
trap 'queuectl_word=cut' TERM
say start
umask "$2"
if cd -- "$1"; then
    "$3" -c "$4" </dev/null
    queuectl_code=$?
else
    echo "queuectl: can't start in the folder $1" >&2
    queuectl_code=126
fi
say "$queuectl_word $queuectl_code"
exit "$queuectl_code"
"""
# Before and after a word there is the same kind of line end; a CR before may be the job's own.
WORD = rb"(\r?\n)?<queuectl %s (start|end|cut)(?: (\d+))?>(?(1)\1|\r?\n?)"
# Bytes at both ends of a client's streams in which words are sought; they are never cut.
WORDS_WITHIN = 1 << 16
# `echo` tells the ender's exit code, for a worker may have reaped its process with others.
ASK, ANSWER = "( %s\n)\necho queuectl $?", b"queuectl 0\n"
ANSWER_TIME = 60.0  # seconds that an ender may take
GONE_AGAIN = 2.0  # seconds between two answers "gone": a submitted job may not be visible before
SHORTEST_REST, LONGEST_REST_OF_ENDER = 0.1, 10.0  # seconds between other answers
KILL_TIME = 5.0  # seconds that an engine may take to kill a run
LINGER_TIME = 5.0  # seconds that a client may go on after the end word without any output
LONGEST_LINGER = 60.0  # seconds that it may go on after the end word
ENDERS_AT_ONCE = 16  # in recovery
FOUND_ALIVE = "it was found alive; "
STEP_TIME = 0.2  # seconds after which a step of recovery looks at no other run


def ends_of(fd: int) -> bytes:
    """Return both ends of an output file, in which words may be."""
    size = os.fstat(fd).st_size
    return read_between(fd, 0, WORDS_WITHIN) + read_between(
        fd, max(WORDS_WITHIN, size - WORDS_WITHIN), size)


def without_words(output: bytes, name: str) -> bytes:
    """Take the words of a run out of its output."""
    return re.sub(WORD % name.encode(), b"", output)


class Ender:
    """Has an engine end a run, and learns whether it is gone there, without waiting.

    `is_gone` must be called again and again. Each call of the ender sees QUEUECTL_SIGNAL: TERM, and
    KILL after the grace. While a client lives, it may still submit the run: so what the engine says
    counts only if no client lived (`client` finds none) when it first said that the run is gone.
    """

    leader = NOBODY  # the process of the ender that is asked now
    gone_since = FOREVER  # when it first said that the run is gone
    next_ask, nap = 0.0, SHORTEST_REST
    kill_at = FOREVER  # from when on it is asked to kill
    pipes: Sequence[int] = ()
    out = err = b""  # what the ender that is asked now has printed
    said = ""  # why the run is not surely gone, in the ender's own words
    met = False  # whether it has found the run alive
    counts = False  # whether no client lived when it first said that the run is gone
    # Since when its answers are errors, or say that a run lives which it should have killed.
    stuck_since = FOREVER

    def __init__(self, command: str, environment: JobEnvironment, grace: float, leader: Leader):
        self.command, self.environment = ASK % command, environment
        self.client = members_of("/", (), leader)  # its session: no run's name begins with a slash
        self.grace, self.since = grace, show_time(now_millis())

    def is_gone(self) -> bool:
        """Ask if it is time, or read the answer; return whether the run is surely gone."""
        now = monotonic()
        if not self.is_asking():
            if now >= self.next_ask:
                self._ask()
            return False
        # What is longer than an answer is none, so the end is enough of it.
        self.out = (self.out + self._read(0))[-4096:]
        self.err = (self.err + self._read(1))[-4096:]
        late = now > self.asked_at + ANSWER_TIME
        if not re.search(rb"queuectl \d+\n\Z", self.out) and not self.closed and not late:
            return False
        if late:
            self.err += b"\nno answer in %ds" % ANSWER_TIME
            self.stop()
        self._close()
        return self._judge()

    def _ask(self) -> None:
        cwd, umask, env = with_folder(self.environment)  # the job may have removed it
        # The grace begins now: in recovery, a run may have waited for its turn to be asked about.
        self.kill_at = min(self.kill_at, monotonic() + self.grace)
        name = "KILL" if monotonic() >= self.kill_at else "TERM"
        env = {**env, **native_items({"QUEUECTL_SIGNAL": name})}
        self.asked_at, self.closed = monotonic(), False
        self.out = self.err = b""
        self.pipes, theirs = zip(os.pipe(), os.pipe())
        try:
            first = system.ticks()
            pid = system.spawn(self.command, system.shell, env, cwd, umask, *theirs)
            self.leader = Leader(pid, first, system.ticks())
        except OSError as error:
            self._close()
            self.stuck_since = min(self.stuck_since, self.asked_at)
            self._put_off("can't be started: %s" % error.strerror)
        for fd in theirs:
            os.close(fd)

    def _read(self, index: int) -> bytes:
        """Read what the ender has printed to a stream."""
        os.set_blocking(self.pipes[index], False)
        try:
            data = os.read(self.pipes[index], 65536)
        except BlockingIOError:
            return b""
        self.closed = self.closed or not (data or index)
        return data

    def _judge(self) -> bool:
        """Return whether the answer confirms an earlier one that the run is gone."""
        if self.out != ANSWER:
            self.gone_since = FOREVER
            since = self.asked_at
            if self.out.endswith(ANSWER):
                self.met, since = True, max(since, self.kill_at + KILL_TIME)
            self.stuck_since = min(self.stuck_since, since)
            output = re.sub(rb"queuectl \d+\n\Z", b"", self.out)
            self._put_off(last_line(self.err) or last_line(output) or "no word")
            return False
        if self.asked_at >= self.gone_since + GONE_AGAIN:
            return True
        self.stuck_since = FOREVER
        if self.gone_since == FOREVER:
            self.gone_since, self.counts = monotonic(), not self._client_lives()
        self.next_ask = self.gone_since + GONE_AGAIN
        return False

    def _client_lives(self) -> bool:
        try:
            return bool(self.client())
        except OSError:
            return True  # it can't be seen now

    def doubt(self) -> None:
        """Forget that the run is gone: its client lived, and may have submitted it meanwhile."""
        self.gone_since, self.next_ask = FOREVER, 0.0

    def _put_off(self, said: str) -> None:
        self.said = said
        self.next_ask = monotonic() + self.nap
        self.nap = min(self.nap * 2, LONGEST_REST_OF_ENDER)

    def patience(self) -> float:
        """Return the seconds for which nobody needs to call `is_gone`."""
        if self.is_asking():
            return SHORTEST_LOOK
        return max(0.0, self.next_ask - monotonic())

    def is_asking(self) -> bool:
        return self.leader != NOBODY

    def is_stuck(self, patience: float) -> bool:
        """Tell whether the engine has not done for `patience` seconds what the ender asks for."""
        return monotonic() > self.stuck_since + patience

    def stop(self) -> None:
        """End the process of the ender, if there is one."""
        if self.is_asking():
            end_processes(members_of("/", (), self.leader), 0.0, sleep, 1.0)
            self._close()

    def _close(self) -> None:
        # Its process is not reaped here: that would also take the exit code of a job of this worker.
        # The next `has_ended` or `_idle` reaps it.
        for fd in self.pipes:
            os.close(fd)
        self.leader, self.pipes = NOBODY, ()

    def trouble(self, job: str) -> str:
        """Say that a job is not surely gone, since when, and in the ender's own words."""
        return "%s is not surely gone from its engine, since %s; %sthe ender says: %s" % (
            job, self.since, FOUND_ALIVE * self.met, self.said or "nothing yet")


class EngineRun(Run):
    """One run of a job that a queue's runner hands to an engine.

    Its name has a random part, so that nothing the job prints is taken for a word by accident.
    """

    code: int | None = None  # the exit code that the end word has told
    told_at = FOREVER  # when the end word was found
    silent_since, heard = FOREVER, -1  # after the end word: since when `printed` is the same
    begun = False  # whether the start word has come
    noted = False  # whether the worker has noted that
    asked = False  # whether an ender may have been asked, and so may have sent a SIGTERM
    deaf = False  # whether words that come from now on may be an ender's doing, and don't count
    held = False  # whether its queue starts no more jobs until it is surely gone

    def __init__(self, job: Job, worker: str, slot: OutputFiles, limit: int):
        super().__init__(job, worker, slot, limit)
        self.bound_at = max(limit, 2 * WORDS_WITHIN)

    def prepare(self, environment: JobEnvironment, db: str) -> None:
        """Take the environment of client and ender. The folder may exist in the engine only."""
        self.environment = with_folder(self.with_variables(environment, db))

    def start(self, environment: JobEnvironment, db: str, shell: str) -> str:
        """Start the runner with the job as one word; return why that failed, or ""."""
        self.prepare(environment, db)
        command = self.command
        if command[0] in "-+":  # a shell would take it for an option
            command = " " + command
        words = ["env", *("%s=%s" % pair for pair in self.variables(db).items()
                          if pair[0].startswith("QUEUECTL_")),
                 "sh", "-c", WRAPPER, self.name, environment.cwd, "%03o" % environment.umask,
                 shell, command]
        job = "exec " + " ".join(map(in_quotes, words))
        self.command = self.job.runner.replace("{}", in_quotes(job))
        return self.spawn(self.environment, system.shell)

    def ender(self, grace: float) -> Ender | None:
        """Return what ends this run in its engine; None if it dies with its client."""
        if self.job.ender is None:
            return None
        self.asked = True
        return Ender(self.job.ender, self.environment, grace, self.leader)

    def look(self) -> None:
        """Read the words that have come; a client with a terminal writes them to its stdout."""
        # A job that truncates its stderr takes the start word away.
        self.begun = self.begun or self.slot.emptied[1]
        for path in self.slot.paths:
            ends = read_beside(path, b"", ends_of)
            for _, word, code in re.findall(WORD % self.name.encode(), ends):
                self.begun = True
                if self._counts(word):
                    self.code = int(code)
                    self.told_at = min(self.told_at, monotonic())
        if self.code is not None and self.heard != self.printed:
            self.heard, self.silent_since = self.printed, monotonic()

    def _counts(self, word: bytes) -> bool:
        """Tell whether a word brings an exit code that no ender has caused."""
        if self.deaf or word == b"start":
            return False
        return word == b"end" or not self.asked

    def has_ended(self) -> bool:
        """Tell whether the client has ended, or goes on after the end word.

        A process that the job left behind may keep the client from ending; the run counts as ended
        all the same. But a slow line may bring the rest of stdout long after the word on stderr.
        """
        last = min(self.silent_since + LINGER_TIME, self.told_at + LONGEST_LINGER)
        return super().has_ended() or monotonic() > last

    def read(self) -> list[bytes]:
        """Read what the run has printed, without its words."""
        return [without_words(output, self.name) for output in super().read()]

    def result(self, ending: str, error: str | None = None) -> RunResult:
        """Return what to record. The client's exit code is not the job's.

        What a client has said about a job that was not taken is in no record, so it is in the error.
        """
        self.exit_code = self.code
        if ending == UNSTARTED:
            lines = self.read()[1].decode("utf-8", "replace").split("\n")
            error = shorten(": ".join([str(error), *filter(None, lines[-4:-2])]), 300)
        return super().result(ending, error)


# ═══ Worker ═══ claim, run, record; when a run must end; recovery after dead workers ═════════
#
# The steps of a worker for one job, in this order. Meanwhile it holds its life lock, from the
# transaction that registers it until its process has ended; others try the lock to see if it lives.
#
#     take the next run's token     flock of the slot's two output files
#     ┌ mutex, BEGIN IMMEDIATE
#     │ record the last run         only if the job is still in that very run
#     │ claim the next job          in this worker's name, with the slot's number
#     └ COMMIT, mutex
#     start the command             its processes inherit the token
#     note its first process        in the life file
#     sync the log                  some milliseconds later, while the command runs
#     tell how the last run ended, empty its output files, close them (frees its token)
#     wait: for the end of the command, the deadline, a cancellation, an order to stop
#
# * The worker takes the token before the commit, which records the slot's number. From the commit
#   on, a process that finds this worker dead tries the token of that slot to see if the run still
#   lives. A claim without its token (no descriptor left, files held by a daemon) would look like a
#   run that has ended.
# * One commit, under one mutex, records the last run and claims the next job. So a worker holds two
#   tokens at once, which takes two slots; it takes more while records are not on disk yet.
# * The worker syncs before it tells of a record and before it empties the output files. A power cut
#   may undo the commit until then: nobody has heard of it, and the job runs again.
# * A job that was to run after another starts only when the log is synced: another worker may have
#   recorded that other job in a commit that is not on disk yet.
# * The first process is noted right after its start. By then it can't have left its session, which
#   is the only trace of a job that closes its descriptors and clears its environment.
# * Signal handlers set `leave` and ring the bell. A waiting worker drains the bell first and then
#   looks at everything, so it misses nothing that happens between the look and the sleep.

# Exit codes: ended by SIGTERM or SIGKILL, directly or as a shell reports it.
SHUTDOWN_CODES = (-15, -9, 143, 137)
SHARED_SYNC = 16  # how many records of short jobs may share a sync of the disk
SYNC_WAIT = 0.005  # seconds that a record waits for others to share its sync
LONGEST_REST = 30.0  # seconds that a worker rests if the machine has no room for a job
SYNC_AGAIN = 1.0  # seconds until a failed sync is tried again
LAST_PATIENCE = 0.4  # seconds that a leaving worker waits for the database to delete its row
CLOCK_STEP = 1.0  # seconds by which the clock must be set back before retries are looked at again


def retry_time(job: Any, ending: str, settings: Settings, now: int) -> int:
    """Return when a job runs again that at `now` failed or asked for it; in milliseconds."""
    if ending == DEFERRED:
        return now + to_millis({**settings, **policy_of(job)}["retry_after"])
    base = job.backoff_base
    if base is None:
        base = settings["backoff_base"]
    chance = int.from_bytes(os.urandom(4), "big") / 2**32
    return now + to_millis(backoff(
        base, job.attempts, settings["backoff_max"], settings["backoff_jitter"], chance))


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


def verdict(job: Job, code: int, settings: Settings) -> tuple[str, str | None, bool]:
    """Return what the exit code of a job means: ending, reason, whether it is final."""
    error = "exit code %d" % code
    if code < 0:
        error = "ended by signal %s" % signal_name(-code)
        code = 128 - code  # how some shells report a signal
    if code == 0:
        return COMPLETED, None, False
    if code in policy_of(job).get("dead_on", ()):
        return FAILED, error + ", which is final", True
    most = settings["max_deferrals"]
    if code == TRY_LATER and job.deferrals < most:
        return DEFERRED, "%s, to be tried again later (%d of %d times)" % (
            error, job.deferrals + 1, most), False
    return FAILED, error, False


def job_environment(store: Store, context: int) -> JobEnvironment:
    """Return where the jobs of a context run."""
    cwd, path, umask, environ = store.context(context)
    env = system.environment()
    if environ:
        env = native_items(json.loads(environ))
    env[system.native("PATH")] = system.native(path)
    return JobEnvironment(cwd, umask, env)


def _pool_of(worker: str) -> str:
    return worker.rpartition("-")[0]


# Recovery gives back the jobs of dead workers. Its steps, and the locks held during each:
#
#     recovery lock                 one process at a time; the others leave it the work
#       look for lost jobs          processing, and the life lock of their worker is free
#       end their processes         SIGTERM, grace, SIGKILL; all together, without the mutex
#       for each lost job
#         look again                if a process still lives, the job stays as it is
#         take the token            if an unseen process holds it, the job stays as it is
#         mutex: record the run     only if the job is still in that very run
#         free the token
#         sync, remove the output, tell
#       mutex: forget dead workers and pools, and their files
#     ring every worker
#
# * Ending processes takes seconds. Nobody may hold the write mutex so long; hence a lock for this.
# * To learn that an engine can't be reached may take a minute. So lost runs in engines have a lock of
#   their own, and a worker has their enders asked beside its own job: see EngineRound.
# * The recovering process may be killed at any moment. Then the job is as it was, or recorded; its
#   output files are removed with the dead worker's other files.
# * A person may cancel the job between the look and the record. The record looks again, in its
#   transaction, and changes nothing if the job is no longer in that very run.
# * Dead workers are forgotten in a transaction, because workers are created in one: so nobody sees
#   a life file whose lock is not taken yet.


def in_engine(store: Store, row: Row) -> bool:
    """Tell whether an ender must end a lost run; `row` is one of `store.lost_jobs()`.

    A person gives up a run whose engine is gone for ever by taking the runner away and cancelling
    the job. The runs in a copy of the queue are those of the original.
    """
    if row["ender"] is None or not store.is_own(row["worker"]):
        return False
    return not row["cancel"] or bool(store.queue(row["queue"])["runner"])


class LostRun:
    """A job whose worker is dead, and the processes and output that its run left."""

    def __init__(self, store: Store, row: Row):
        """`row` is one of `store.lost_jobs()`."""
        self.store, self.row, self.worker = store, row, row["worker"]
        self.job = job = Job._make(row[field] for field in Job._fields)
        self.slot = OutputFiles(store.path, self.worker, row["slot"])
        self.stopping = store.pool(_pool_of(self.worker))["stop"]
        leader = leader_of(store.path, self.worker, job.seq, job.runs)
        mark = run_name(self.worker, job.seq, job.runs, job.word) + "\0"
        self.orphans = members_of(mark, self.slot.paths, leader)
        self.own = store.is_own(self.worker)
        self.engine: EngineRun | None = None
        self.ender: Ender | None = None
        if job.word and self.own:
            self._prepare_engine(leader)
        if not self.own:
            # This is a copy of the queue whose worker it was. As long as there are any processes
            # of that queue, the job may be running there. The name of a worker begins with the id
            # of its queue, or that of its pool where it is old.
            original = self.worker.rsplit("-", 2)[0]
            self.orphans = members_of(original + "-", ())

    def _prepare_engine(self, leader: Leader) -> None:
        store, job = self.store, self.job
        settings = store.settings()
        self.engine = EngineRun(job, self.worker, self.slot, output_limit(settings, job.queue))
        self.engine.prepare(job_environment(store, job.context), store.path)
        self.engine.leader = leader
        self.engine.asked = True  # perhaps, by its worker or by recovery that was cut off
        trouble = trouble_of(store.path, self.worker)
        self.engine.deaf = FOUND_ALIVE in trouble
        self.engine.look()
        if in_engine(store, self.row):
            self.ender = self.engine.ender(settings["kill_grace_seconds"])
        told = re.search(r"since (\S+);", trouble)
        if told and self.ender:
            self.ender.since = told.group(1)

    def expect_end(self) -> None:
        """Before its ender is asked first: see if it has ended by itself; what comes later is no word.

        An engine may signal a child before the shell, which then goes on, perhaps to exit code 0.
        """
        if self.engine:
            self.engine.look()
            self.engine.deaf = True

    def end_client(self, pause: Pause) -> bool:
        """End the processes of the run here; return whether that was possible."""
        return end_processes(self.orphans, 0.0, pause, 1.0)

    def note_trouble(self, text: str) -> None:
        """Note in the dead worker's life file why its job is not given back."""
        try:
            life = open_beside(life_path(self.store.path, self.worker), os.O_WRONLY)
        except OSError:
            return
        note_trouble(life, text)
        os.close(life)

    def give_back(self, tell: Tell, pool: str) -> bool:
        """Record the lost run after its processes were ended; False if some could not be.

        `tell` and `pool` are as in `recover`.
        """
        job, settings = self.job, self.store.settings()
        test_point("recovering")
        # A person who cancels a job of the original does not wait for its run to end there.
        given_up = self.row["cancel"] and not self.own
        if not given_up and self.orphans():
            return False
        # A process in another container, or of another user, holds it.
        if not self.slot.open() and not given_up:
            return False
        try:
            result = self._result(settings)
            retry_at = retry_time(job, result.ending, settings, result.finished_at)
            pools = {pool, _pool_of(self.worker)}
            with self.store.transaction():
                state, _ = self.store.record(result, retry_at, pools, settings)
        finally:
            # A token kept by mistake would keep the job from ever being given back.
            self.slot.close()
        test_point("recovered")
        self.store.sync()  # before the output is removed
        if not given_up:
            self.slot.remove()
        if state:
            tell("%s was lost with its worker %s (attempt %d of %d); it is %s now" % (
                job.id, self.worker, job.attempts, max(1, job.max_retries), state))
        return bool(state)

    def _result(self, settings: Settings) -> RunResult:
        """Return what to record."""
        now = now_millis()
        ending, error, final = self._ending(settings)
        seconds = max(0, now - self.job.started_at) / 1000
        if self.engine:
            return self.engine.result(ending, error)._replace(seconds=seconds, final=final)
        stdout, stderr = b"", b""
        if self.slot.fds:
            stdout, stderr = self.slot.read(output_limit(settings, self.job.queue))
        return RunResult(self.job, ending, None, error, now, seconds,
                     stdout, stderr, self.worker)

    def _ending(self, settings: Settings) -> tuple[str, str | None, bool]:
        """Return how the run ended: ending, reason, whether it is final."""
        engine = self.engine
        if engine:
            engine.look()
            # Exit codes of SIGTERM and SIGKILL may come from recovery that was cut off.
            if engine.code not in (None, *SHUTDOWN_CODES):
                return verdict(self.job, engine.code, settings)
        # A person may have cancelled it while its engine was asked.
        if self.store.orders_of(self.job.seq)[0]:
            return CANCELLED, "cancelled", False
        if not self.own:
            return STOPPED, "it ran in the queue that this one was copied from", False
        if self.stopping:
            return (STOPPED, "ended with its worker while the pool was stopping, to be run again",
                    False)
        if engine and not engine.begun:
            return UNSTARTED, "its worker %s was lost before it began" % self.worker, False
        return LOST, "the worker %s was lost while it ran this job" % self.worker, False


def forget_dead(store: Store) -> None:
    """Remove dead workers and pools, and their files, unless a worker still has a job."""
    names = set(names_beside(store.path, ".life"))
    names.update(entry["name"] for entry in store.pools() + store.workers())
    if all(is_alive(store.path, name) for name in names):
        return
    with store.transaction():
        keep = {name for name in names if is_alive(store.path, name)}
        keep.update(job["worker"] for job in store.lost_jobs())
        # A dead pool's row stays while any of its workers lives: `stop` reaches them through it.
        # It also stays while one has a job, for it says if the pool was stopping.
        keep.update([_pool_of(name) for name in keep])
        for name in names - keep:
            store.forget(name)
            remove_files(store.path, name)


# Seconds that an ender gets if its worker must leave now; and that a worker stays with an engine
# that can't be reached, before it leaves the run to recovery.
LAST_ROUND = 10.0


def _settle_lost(store: Store, lost: list[LostRun], grace: float,
                 pause: Pause, tell: Tell, pool: str) -> int:
    """End what is left here of lost runs, and give their jobs back; return how many."""
    # This does not touch the original's processes.
    own = [run.orphans for run in lost if run.own]
    end_processes(
        lambda: {pid: started for orphans in own for pid, started in orphans().items()},
        grace, pause, 1.0)
    count = sum([run.give_back(tell, pool) for run in lost])
    if count:
        ring_all(store.path)
    return count


def _try_lock_file(folder: str, name: str) -> int:
    """Take a lock that one recovering process holds; return -1 if another does.

    Raises Unavailable.
    """
    try:
        os.makedirs(folder, 0o700, exist_ok=True)
        lock = open_private(join(folder, name), os.O_RDWR)
    except OSError as error:
        raise Unavailable("%s can't be used: %s" % (folder, error.strerror)) from error
    taken = False
    try:
        taken = system.try_lock(lock)
    finally:
        if not taken:
            os.close(lock)
    return lock if taken else -1


def recover(store: Store, pause: Pause, tell: Tell, pool: str = "") -> int:
    """End the processes of lost runs, and give their jobs back; return how many jobs.

    Lost runs that an ender must end stay as they are, for only workers execute anything: see
    EngineRound.
    `tell` is called with a line for each. If a job has no try left and dies, that counts for a
    drain of `pool`. Raises QueueError if others could have written the database, for it names the
    processes that are ended. Raises Unavailable or OSError if it can't be done now.
    """
    folder = folder_path(store.path)
    if not isdir(folder) and not store.lost_jobs():
        return 0
    refuse_untrusted(store.path)
    lock = _try_lock_file(folder, "recovery.lock")
    if lock < 0:
        return 0
    try:
        store.queue_id()
        here = [LostRun(store, row) for row in store.lost_jobs() if not in_engine(store, row)]
        grace = store.settings()["kill_grace_seconds"]
        count = _settle_lost(store, here, grace, pause, tell, pool)
        forget_dead(store)
        return count
    finally:
        os.close(lock)


class EngineRound:
    """One round of recovery in engines: a worker has them end lost runs, beside its other work.

    `step` must be called again and again until the round `is_over`. A run leaves the round when it
    is surely gone, or when its engine could not be reached or did not end it, or when its client
    can't be ended here; then a later round asks again. One worker at a time does this: it holds
    `lock` as long as its round lasts.
    """

    def __init__(self, store: Store, pause: Pause, lock: int):
        """`pause` sleeps while processes of a run are ended here."""
        self.store, self.pause, self.lock = store, pause, lock
        # Read under the lock: the round before may have given back some.
        lost = [LostRun(store, row) for row in store.lost_jobs() if in_engine(store, row)]
        self.asked = [(run, run.ender) for run in lost if run.ender]

    def is_over(self) -> bool:
        return not self.asked

    def patience(self) -> float:
        """Return the seconds for which nobody needs to call `step`."""
        if self.is_over():
            return 0.0
        return max(SHORTEST_LOOK, min(ender.patience() for _, ender in self.asked))

    def step(self, tell: Tell, pool: str) -> int:
        """Ask for a moment; give back at most one job whose run is gone; return how many.

        `tell` and `pool` are as in `recover`.
        """
        busy = sum(ender.is_asking() for _, ender in self.asked)
        gone: list[LostRun] = []
        left, end = [], monotonic() + STEP_TIME
        for run, ender in self.asked:
            busy -= ender.is_asking()
            # To look for the processes of each takes long, and this worker's own run can't wait.
            if (busy >= ENDERS_AT_ONCE or gone or monotonic() > end
                    or self._stays(run, ender, gone)):
                left.append((run, ender))
            busy += ender.is_asking()
        self.asked = left
        # What is left here of their clients gets no grace: this worker's own run can't wait.
        return _settle_lost(self.store, gone, 0.0, self.pause, tell, pool)

    def _stays(self, run: LostRun, ender: Ender, gone: list[LostRun]) -> bool:
        """Ask about one run; tell whether the round goes on with it."""
        if ender.kill_at == FOREVER:
            run.expect_end()
        met = ender.met
        is_gone = ender.is_gone()
        if ender.met > met:  # the next round must know, if this one is cut off
            run.note_trouble(ender.trouble(run.job.id))
        if not is_gone:
            if ender.is_asking() or not ender.is_stuck(0.0):
                return True
            run.note_trouble(ender.trouble(run.job.id))
        elif ender.counts:
            gone.append(run)
        elif run.end_client(self.pause):
            ender.doubt()
            return True
        return False

    def stop(self) -> None:
        """End the round, with the enders that are asked now."""
        for _, ender in self.asked:
            ender.stop()
        os.close(self.lock)


def begin_round(store: Store, pause: Pause) -> EngineRound | None:
    """Begin a round; None if no ender must end a lost run, or if another worker is at it.

    `pause` is as in EngineRound. Raises Unavailable or OSError if it can't be done now.
    """
    if not any(in_engine(store, row) for row in store.lost_jobs()):
        return None
    lock = _try_lock_file(folder_path(store.path), "engines.lock")
    if lock < 0:
        return None
    try:
        return EngineRound(store, pause, lock)
    except BaseException:
        os.close(lock)
        raise


# Sweeping forgets jobs that ended long ago.

HISTORY = "history"  # the step of a round that sweeps the history, beside steps for states of jobs
# Seconds of work in one second; least seconds between two rounds.
SWEEP_TIME, SWEEP_REST = 0.1, 60.0
YOUNGEST_SWEPT = 5.0  # least seconds that ended jobs are kept: `wait` may still ask for them
STEADY_TIME = 60.0  # seconds for which the wall clock must have agreed with the monotonic clock


def _sweep_on(store: Store, keep: dict[str, float],
              place: dict[str, int]) -> dict[str, int]:
    """Go on with a round from a place; return the place reached."""
    spared, end = store.queues_of_runs(), monotonic() + SWEEP_TIME
    # The setting was not unset meanwhile.
    place = {state: last for state, last in place.items() if state in keep}
    for state in place:
        while place[state]:
            before = to_millis(time.time() - keep[state])
            if state == HISTORY:
                place[state] = store.thin_history(before, now_millis() - 2 * DAY)
            else:
                chosen = Selection((state,), before=before)
                place[state] = store.forget_some(chosen, place[state], spared)
            if monotonic() >= end:
                return {state: last for state, last in place.items() if last}
    return {}


def _steady_clock(noted: Any) -> tuple[bool, list[float]]:
    """Tell whether the wall clock can be trusted, and what to note about it.

    A clock that is a year ahead for some seconds must not make sweeping forget everything. So the
    wall clock must have agreed for STEADY_TIME with the monotonic clock, which nobody can set.
    """
    now = [time.time(), monotonic()]
    if noted:
        passed, own = now[0] - noted[0], now[1] - noted[1]
        if own >= 0 and abs(passed - own) <= CLOCK_STEP:
            return own >= STEADY_TIME, noted
    return STEADY_TIME == 0, now  # the clock was set, or the machine was restarted


def _sweep_from_note(store: Store, keep: dict[str, float], file: int) -> None:
    """Go on from the place that the last worker noted in a file, and note the place reached.

    The note's `place` has, for each state that is not done, the seq of the last job looked at. It
    is missing before the first round, and empty after a round, which ended at the file's date.
    `clock` is the time since when the wall clock can be trusted.
    """
    note = json.loads(read_between(file, 0, 200) or b"{}")
    place = note.get("place")
    steady, clock = _steady_clock(note.get("clock"))
    age = time.time() - os.fstat(file).st_mtime
    rest = max(SWEEP_REST, min(keep.values()) / 100)
    if place == {} and 0 <= age < rest:
        return
    if steady:
        note["place"] = _sweep_on(store, keep, place or dict.fromkeys(keep, NEVER))
    elif clock == note.get("clock"):
        return
    note["clock"] = clock
    os.ftruncate(file, 0)
    write_at(file, 0, json.dumps(note).encode())


def sweep(store: Store, settings: Settings) -> None:
    """Forget jobs that ended longer ago than `keep_completed` and `keep_dead`, and old history.

    It works for SWEEP_TIME, then stops until it is called again. A lock lets one worker at a time
    sweep. Between two rounds it rests for a hundredth of the time that jobs are kept. Raises
    QueueError, OSError or ValueError if it can't be done now.
    """
    times = {DEAD: settings["keep_dead"]}
    times[COMPLETED] = times[CANCELLED] = settings["keep_completed"]
    times[HISTORY] = settings["keep_history"]
    keep = {state: max(YOUNGEST_SWEPT, seconds) for state, seconds in times.items()
            if seconds is not None}
    file = open_private(join(folder_path(store.path), "sweep.lock"), os.O_RDWR)
    try:
        if system.try_lock(file):
            _sweep_from_note(store, keep, file)
    finally:
        os.close(file)


# Workers.


def take_life_lock(db: str, name: str) -> int:
    """Take the life lock of a worker or pool, in the transaction that registers it."""
    os.makedirs(folder_path(db), 0o700, exist_ok=True)
    fd = open_private(life_path(db, name), os.O_RDWR)
    try:
        # Another process tries the lock just now, to see if it is alive.
        while not system.try_lock(fd):
            sleep(0.001)
        return fd
    except OSError:
        os.close(fd)
        raise


# How a detached pool drains. Nobody reads its exit code, so it does not count deaths. The pool of a
# `run` (WHOLE) also waits for jobs that are not due yet; others (DUE) do not. The pool of a `doctor`
# (PROBING) leaves runs that are not surely gone, and its jobs set off no hooks.
DUE, WHOLE, PROBING = "due", "whole", "probing"

WorkerConfig = namedtuple(
    "WorkerConfig", "db file pool number queues drain limited run log supervisor fds")
WorkerConfig.__doc__ = """What the supervisor tells a worker: the database, its file's identity,
the pool, the worker's number there, the queues it serves (none: all), whether to drain (or DUE,
WHOLE, PROBING), whether --max-jobs was given, whether it serves a `run` (then it drains that run's
queue), the log file ("": none), the supervisor's process id, and inherited descriptors that it
must close."""


class Records:
    """What a worker knows; how it writes messages, commits, and syncs its records.

    A worker has six layers: this one, Turns (between two runs), Recovering (runs of dead workers),
    Attending (one run), Asking (one run in an engine), and Worker (from start to end).
    """

    store: Store
    epoch, settings = -1, SETTINGS
    # Its life.
    leave = 0  # 1: after the running job, 2: now
    dismissed = False  # stopped by a signal sent to it alone; the pool replaces it
    life = -1  # the descriptor that holds its life lock
    seen = -1  # the last data version seen; -1: look at everything again
    next_due = NEVER  # milliseconds
    next_patrol = next_sweep = 0.0
    unpatrolled = True
    # What it tells.
    trouble = ""  # the trouble that it told last: what keeps it from working
    rest_until, shortages = 0.0, 0
    # What it has recorded.
    unsynced = False  # whether a record may be missing on disk
    sync_failed = False  # whether the last sync failed
    retry_at: int | None = None  # the slot of the run recorded last
    # Where output goes.
    slots = 0  # how many slots were made
    next_slot: OutputFiles | None = None  # the slot whose token is held for the next run
    running: OutputFiles

    def __init__(self, order: WorkerConfig):
        self.order, self.db, self.pool = order, order.db, order.pool
        self.name = "%s-%d" % (order.pool, order.number)
        self.queues = (*order.queues, HOOK_QUEUE) if order.queues else ()
        self.bell = make_bell()
        self.limited: set[str] = set()  # the queues that have a limit of jobs running at once
        self.clock, self.zone = time.time() - monotonic(), zone_here()
        self.place = system.place()
        self.lines: list[str] = []  # messages that wait until their records are on disk
        self.spare: list[OutputFiles] = []
        # Slots of unsynced records, each with whether its run printed anything.
        self.used: list[tuple[OutputFiles, bool]] = []
        self.environment: dict[int, JobEnvironment] = {}  # by the key of their context

    # What it says.

    def say(self, text: str) -> None:
        """Write a message as soon as the records are on disk."""
        self.lines.append(text)

    def announce(self, text: str) -> None:
        """Write a message at once, before others that wait."""
        self._write([as_called(text)])

    def _write(self, lines: Iterable[str]) -> None:
        """Write messages, each with the time of writing: times in a log must not go back."""
        now = show_time(now_millis())
        said = "".join("%s worker %d: %s\n" % (now, self.order.number, line) for line in lines)
        if self.order.run and os.isatty(1):  # over the line that shows the progress
            said = "\r\033[K" + said
        if self.order.log:
            renew_log(self.order.log)
        system.say(said)

    def tell_trouble(self, text: str) -> None:
        """Tell at once what keeps this worker from working, and note it; "": it works again."""
        if text != self.trouble:
            self.trouble = text
            note_trouble(self.life, text)
            if text:
                self.announce(text)

    # Settings, orders, commits.

    def follow(self, epoch: int) -> None:
        """Read changed settings, and whether to stop, if the epoch has changed."""
        if epoch == self.epoch:
            return
        self.epoch = epoch
        self.settings, stop, self.limited = self.store.control(self.pool)
        if stop > self.leave:
            self.leave = stop
            self.say("told to stop" + " now" * (stop == 2))

    def commit(self, change: Callable[[], Any], holding: str = "") -> Any:
        """Make a change in a transaction; try again until it is committed; return its result.

        `holding` is the id of the job whose outcome the change records, or "". Raises Unavailable
        or OSError only if the worker must leave; while `holding` an outcome, only if it must leave
        now.
        """
        why, told_from = "", monotonic() + WAIT_TOLD
        if holding:
            why, told_from = "the outcome of %s could not be recorded yet: " % holding, 0.0
        while True:
            try:
                if self.sync_failed:
                    self.store.sync()
                with self.store.transaction():
                    result = change()
                if monotonic() >= self.rest_until:
                    self.tell_trouble("")
                return result
            except (Unavailable, OSError) as error:
                if self.leave == 2 or (self.leave and not holding):
                    raise
                if monotonic() >= told_from:
                    self.tell_trouble(why + str(error))
                self.bell.wait(SYNC_AGAIN if self.sync_failed else TICK)

    def sync_records(self) -> None:
        """Sync the records; then tell of them, and empty their output files.

        The next job runs meanwhile. Several very short jobs share one sync: waiting for the disk
        each time would cost a tenth of their rate. While syncs fail, `sync_failed` is set, and the
        worker tells nothing, removes nothing and claims nothing.
        """
        try:
            if self.unsynced:
                self.store.sync()
        except Unavailable as error:
            self.sync_failed = True
            self.tell_trouble(str(error))
            return
        if self.sync_failed:
            self.sync_failed = False
            self.tell_trouble("")
        self.unsynced = False
        if self.lines:
            self._write(self.lines)
            self.lines = []
        for slot, printed in self.used:
            try:
                slot.clear(printed)
                self.spare.append(slot)
            except OSError:  # a file that can't be emptied is not used again
                slot.remove()
        self.used.clear()


class Turns(Records):
    """Between two runs: record the last one and claim the next job, in one commit."""

    def record_and_claim(self, result: RunResult | None) -> Job | None:
        """Record how the last run ended (None: there was none) and claim the next job, if any.

        Raises Unavailable or OSError as `commit` does.
        """
        test_point("before turn")
        if self.next_slot is None:
            self.next_slot = self._open_slot()
        slot = self.next_slot
        holding = result.job.id if result else ""
        state, sleepers, job = self.commit(lambda: self._record_and_claim(result), holding)
        test_point("recorded")
        self.unsynced = True
        if result:
            self.used.append((self.running, bool(result.stdout or result.stderr)))
            self._tell_end(result, state)
            for name in sleepers:
                ring(bell_path(self.db, name))
            if self.store.unsettled:
                self._settle()
        if slot is None:
            self.sync_records()
            self.bell.wait(1.0)
        elif job is not None:
            self.running, self.next_slot = slot, None
        return job  # type: ignore[no-any-return]

    def _settle(self) -> None:
        """End all jobs that the last one takes along; on failure the mark stays for others."""
        try:
            self.store.settle(now_millis())
            ring_all(self.db)
        except Unavailable as error:
            self.tell_trouble(str(error))

    def _record_and_claim(self,
                          result: RunResult | None) -> tuple[str, list[str], Job | None]:
        """In the transaction: return the recorded job's new state, workers to ring, and a job.

        Other workers may take jobs that waited for the recorded job or its place, or its retry.
        Only sleeping workers are rung: one that runs a job looks again after it.
        """
        state, job, news = "", None, False
        if self.clock_was_set_back():
            self.start_delays_anew()
        epoch, due, _ = self.store.pulse()
        self.follow(epoch)
        settings, pools = self.settings, [self.pool]
        if result:
            if result.ending != COMPLETED:
                self.retry_at = retry_time(result.job, result.ending, settings, result.finished_at)
            state, freed = self.store.record(result, self.retry_at, pools, settings)
            limited = result.job.queue in self.limited and not self.order.run
            news = freed or limited or state == FAILED
        if self.next_slot and self._may_go_on():
            job = self._claim(self.next_slot.number, due)
        sleepers = self.store.sleepers() if news else []
        return state, sleepers, job

    def _may_go_on(self) -> bool:
        """Tell whether to claim another job, or else to leave, rest, or recover jobs first."""
        now = monotonic()
        if self.leave or now < self.rest_until or now >= self.next_patrol:
            return False
        return not self.orphaned()

    def _claim(self, slot: int, due: int) -> Job | None:
        pool = self.pool if self.order.limited else ""
        job = self.store.claim(self.name, slot, self.queues, due,
                               now_millis(), pool)
        if job and job.context not in self.environment:
            self._look_around(job.context)
        return job

    def _look_around(self, context: int) -> None:
        """Read where the jobs of a context run, with the claim: later it must not fail."""
        if len(self.environment) > 100:
            self.environment.clear()
        self.environment[context] = job_environment(self.store, context)

    def _open_slot(self) -> OutputFiles | None:
        """Return a slot whose token this worker holds; None if the machine has no room for one."""
        while True:
            if not self.spare:
                self.spare.append(OutputFiles(self.db, self.name, self.slots))
                self.slots += 1
            slot = self.spare[0]
            try:
                if slot.open():
                    slot.empty()  # of late output of a daemon that has ended since
                    return self.spare.pop(0)
            except OSError as error:
                self.rest_until = monotonic() + 1.0
                self.tell_trouble("no job can be claimed: %s" % error)
                return None
            self.spare.pop(0).remove()  # a daemon that an earlier job left behind holds it

    def orphaned(self) -> bool:
        """Tell whether the supervisor has died."""
        life = life_path(self.db, self.pool)
        return system.orphaned(self.order.supervisor, life)

    def clock_was_set_back(self) -> bool:
        """Tell whether the wall clock was set back, or its zone changed, since the last call."""
        before, self.clock = self.clock, time.time() - monotonic()
        zone, self.zone = self.zone, zone_here()
        return self.clock < before - CLOCK_STEP or self.zone != zone

    def start_delays_anew(self) -> None:
        """In a transaction, after the clock was set back: what it had put off is due.

        Also called when the time zone has changed: schedules then follow the new one.
        """
        self.store.make_ready_after_clock_step(now_millis())
        if self.store.scheduling:
            read_zone()
            self.store.follow_zone(self.zone)

    def _tell_end(self, result: RunResult, state: str) -> None:
        if self.order.run:
            return
        outcome = {"": "was recorded as lost by another process", DEAD: "is dead",
                   PENDING: "went back into the queue"}.get(state, state)
        line = "%s %s after %s" % (result.job.id, outcome, show_duration(result.seconds))
        if result.error is not None:
            line += ": " + clean(result.error)
        if state == FAILED:
            line += "; next try at " + show_time(self.retry_at or 0)
        self.say(line)


class Recovering(Turns):
    """Recovery of jobs whose workers have died, now and then, and with engines beside other work."""

    round: EngineRound | None = None

    def patrol(self) -> None:
        """Now and then while others run jobs: look for workers that died with their supervisor."""
        began = monotonic()
        try:
            others = self.store.holders() - {self.name}
            self.unpatrolled = bool(others)
            if not all(is_alive(self.db, name) for name in others):
                self.recover()
        except Unavailable:
            pass  # the next patrol will find the same
        now = monotonic()
        interval = self.settings["poll_interval_ms"] / 1000
        # A process that can't be ended takes seconds; spend as many on work before the next look.
        self.next_patrol = now + max(1.0, interval, now - began)

    def recover(self) -> None:
        """Give back lost jobs, and begin a round with the engines of those that run elsewhere."""
        try:
            self._note_given_back(recover(self.store, self.bell.wait, self.say, self.pool))
            if self.round is None:
                self.round = begin_round(self.store, self.bell.wait)
        except (Unavailable, OSError):
            self.unpatrolled = True

    def _note_given_back(self, count: int) -> None:
        if count:
            self.seen = -1
            self.sync_records()

    def step_round(self) -> None:
        """Go on with a round that has begun."""
        if self.round is None:
            return
        try:
            self._note_given_back(self.round.step(self.say, self.pool))
            if self.round.is_over():
                self.stop_round()
                forget_dead(self.store)
        except (QueueError, OSError):  # a later round finds the same
            self.stop_round()

    def round_wait(self) -> float:
        """Return the seconds until `step_round` has something to do."""
        return self.round.patience() if self.round else FOREVER

    def wait(self, seconds: float) -> None:
        """Sleep, also while a run is being ended, and then go on with a round that has begun."""
        self.bell.wait(min(seconds, self.round_wait()))
        self.step_round()

    def stop_round(self) -> None:
        """End a round that has begun; what is left is for a later one, of any worker."""
        if self.round:
            self.round.stop()
        self.round, self.unpatrolled = None, True


class Attending(Recovering):
    """One run of a claimed job: start it, wait for it, decide when it must end, judge it."""

    def execute(self, job: Job) -> RunResult | None:
        """Run a claimed job until it ends; return its outcome.

        Returns None if the worker must leave a run that is not surely gone from its engine.
        """
        limit = output_limit(self.settings, job.queue, self.order.run)
        run = (EngineRun if job.word else Run)(job, self.name, self.running, limit)
        test_point("claimed")
        # The record of the job it waited for may be another worker's, and not on disk yet.
        if job.chained:
            self.unsynced = True
            self.sync_records()
        if self.sync_failed:
            return self._put_off(run, "can't start: the disk can't be synced")
        problem = run.start(self.environment[job.context], self.db,
                            job.shell or self.settings["shell"])
        note_run(self.life, RunNote(self.place, job.seq, job.runs,
                                    *run.leader))
        if run.short:
            return self._put_off(run, problem)
        self.shortages = 0
        self._tell_start(run)
        test_point("spawned")
        if len(self.used) >= SHARED_SYNC:
            self.sync_records()
        if problem:
            return run.result(FAILED, problem)
        return self._attend(run)

    def _tell_start(self, run: Run) -> None:
        if not self.order.run:
            job = run.job
            self.say("started %s (pid %s, attempt %d of %d): %s" % (
                job.id, run.pid or "none", job.attempts, max(1, job.max_retries),
                shorten(clean(job.command), 100)))

    def _put_off(self, run: Run, problem: str) -> RunResult:
        """Give back a job that the machine has no room for, and claim none for a while."""
        pause = min(LONGEST_REST, 2.0 ** self.shortages)
        self.shortages += 1
        self.rest_until = monotonic() + pause
        self.tell_trouble("%s %s; the next try is in %s"
                          % (run.job.id, problem, show_duration(pause)))
        return run.result(UNSTARTED, problem)

    def _attend(self, run: Run) -> RunResult | None:
        """Sleep until the run ends, or until there is a reason to end it."""
        while True:
            self.wait(min(run.patience(), self._sync_wait()))
            if run.has_ended():
                return self._judge(run)
            if self.unsynced:
                self.sync_records()
            ending, error = self._interruption(run)
            if ending:
                return self._interrupt(run, ending, error)
            self._look_at(run)

    def _interrupt(self, run: Run, ending: str, error: str) -> RunResult | None:
        run.end(self.settings["kill_grace_seconds"], self.wait)
        return run.result(ending, error)

    def _look_at(self, run: Run) -> None:
        run.bound_output()

    def _sync_wait(self) -> float:
        """Return the seconds until the next sync is due."""
        if not self.unsynced:
            return FOREVER
        return SYNC_AGAIN if self.sync_failed else SYNC_WAIT

    def _interruption(self, run: Run) -> tuple[str, str]:
        """Return why a run must end now (its ending, the reason), or two empty strings."""
        if monotonic() >= run.deadline:
            return FAILED, "timed out after %ss" % show_number(run.timeout or 0)
        if self._hears_cancel(run):
            return CANCELLED, "cancelled"
        if self.leave == 2:
            return STOPPED, "ended with its worker, to be run again"
        return "", ""

    def _hears_cancel(self, run: Run) -> bool:
        """If others have committed anything, read orders, settings, the mark, the time-out."""
        try:
            seen = self.store.changed()
            if seen == self.seen:
                return False
            self.seen = seen
            self.follow(self.store.pulse()[0])
            self.sync_records()
            cancelled, timeout = self.store.orders_of(run.job.seq)
        except (QueueError, OSError):
            return False  # the run goes on; its record will show what is wrong with the database
        run.set_timeout(timeout)
        return cancelled

    def _judge(self, run: Run) -> RunResult | None:
        """Return what the end of its command means for a run: ending, reason, final."""
        code = run.exit_code or 0
        if code == 0 and not run.lost:
            return run.result(COMPLETED)
        run.end_leftovers(self.settings["kill_grace_seconds"], self.wait)
        if run.lost:
            return run.result(LOST, "its exit code was lost")
        if code in SHUTDOWN_CODES and self._is_to_leave():
            return run.result(STOPPED, "ended with its worker, to be run again")
        ending, error, final = verdict(run.job, code, self.settings)
        return run.result(ending, error)._replace(final=final)

    def _is_to_leave(self) -> bool:
        """Tell whether this worker is told to leave within a tenth of a second.

        A signal to the whole process group may reach the job before its worker.
        """
        deadline = monotonic() + 0.1
        while not self.leave and monotonic() < deadline:
            self.bell.wait(deadline - monotonic())
        return self.leave > 0


class Asking(Attending):
    """One run in an engine: judge it by its words, and have its ender asked. See EngineRun."""

    def _judge(self, run: Run) -> RunResult | None:
        if isinstance(run, EngineRun):
            return self._judge_by_words(run, "", "")
        return super()._judge(run)

    def _interrupt(self, run: Run, ending: str, error: str) -> RunResult | None:
        if isinstance(run, EngineRun):
            return self._judge_by_words(run, ending, error)
        return super()._interrupt(run, ending, error)

    def _look_at(self, run: Run) -> None:
        if isinstance(run, EngineRun) and monotonic() >= run.next_look:
            run.look()
            self._note_begun(run)
        super()._look_at(run)

    def _note_begun(self, run: EngineRun) -> None:
        """When a run has begun that is the probe of its queue, let the other jobs start."""
        if run.noted or not run.begun:
            return
        run.noted, store = True, self.store
        try:
            if store.is_probe(run.job):
                self.commit(lambda: store.end_rests(run.job.queue))
                ring_all(self.db)
        except (QueueError, OSError):
            pass  # the record of this run ends the probe

    def _judge_by_words(self, run: EngineRun, ending: str, error: str) -> RunResult | None:
        """Return the outcome of a run whose client has ended, or that must end (with `ending`).

        An end word that has come decides before anything else. The others count only when the run
        is surely gone. Returns None if that can't be learned before this worker must leave.
        """
        run.look()
        if run.code is not None:
            ending = ""
        gone = run.code == 0 or self._is_gone(run)
        if run.code != 0 or run.exit_code is None:
            run.end(self.settings["kill_grace_seconds"], self.wait)
        if not gone:
            return None
        client = run.exit_code
        run.look()
        self._note_begun(run)
        if ending:
            return run.result(ending, error)
        if run.code is not None:
            ending, why, final = verdict(run.job, run.code, self.settings)
            return run.result(ending, why)._replace(final=final)
        if client in SHUTDOWN_CODES and self._is_to_leave():
            return run.result(STOPPED, "ended with its worker, to be run again")
        if run.begun:
            return run.result(LOST, "its engine lost it")
        return run.result(UNSTARTED, "its engine did not take it")

    def _is_gone(self, run: EngineRun) -> bool:
        """Have its engine end a run, and wait until it is surely gone.

        Returns False if the worker must leave before, or if the engine can't be reached for long.
        Then recovery asks for all such runs together, and other workers are free for other jobs.
        """
        grace = self.settings["kill_grace_seconds"]
        ender, deadline = run.ender(grace), FOREVER
        while ender:
            if ender.is_gone():
                if ender.counts:
                    break
                run.end(grace, self.wait)
                ender.doubt()
            run.bound_output()
            self._hears_cancel(run)  # for the orders; the record of the run sees the mark
            if self.unsynced:
                self.sync_records()
            if ender.met and not run.deaf:
                run.deaf = True
                note_trouble(self.life, ender.trouble(run.job.id))  # for recovery, if this dies
            if ender.is_stuck(0.0):
                self._hold_queue(run, ender)
            hurry, patience = self.leave == 2 or self.order.drain == PROBING, LAST_ROUND
            if hurry:
                deadline, patience = min(deadline, monotonic() + LAST_ROUND), KILL_TIME
            if ender.is_stuck(patience) or monotonic() > deadline:
                self._leave_run(run, ender, hurry)
                return False
            self.wait(min(ender.patience(), self._sync_wait()))
        self.tell_trouble("")
        note_trouble(self.life, "")  # what was noted above without telling it
        return True

    def _hold_queue(self, run: EngineRun, ender: Ender) -> None:
        """Start no more jobs in an engine that can't be reached: they would hold all workers."""
        trouble, store = ender.trouble(run.job.id), self.store
        if not run.held:
            run.held = True
            self.commit(lambda: store.hold_queue(run.job, trouble))
        self.tell_trouble(trouble)

    def _leave_run(self, run: EngineRun, ender: Ender, hurry: bool) -> None:
        """Leave a run to recovery, which finds it by this worker's death."""
        ender.stop()
        self.tell_trouble(ender.trouble(run.job.id))
        if hurry:
            self.leave = 2
        else:
            self.dismissed, self.leave = True, 1


class Worker(Asking):
    """Claims jobs and runs them, one at a time, until it is told to stop.

    Signal handlers only set flags and ring the bell; the loops look at the flags.
    """

    def handle_signals(self) -> None:
        """Handle SIGHUP (leave after the running job), SIGUSR1 (leave now), SIGTERM (alone)."""
        for name, handler in (
                ("SIGTERM", self._dismiss), ("SIGINT", self._dismiss), ("SIGHUP", self._leave_soon),
                ("SIGUSR1", self._leave_now), ("SIGCHLD", lambda *_: None)):
            if hasattr(signal, name) and not (WINDOWS and name == "SIGINT"):
                signal.signal(getattr(signal, name), handler)
        self.bell.hear_signals()
        system.let_through()

    def _dismiss(self, *_: object) -> None:
        self.dismissed = True
        self._leave_soon()

    def _leave_soon(self, *_: object) -> None:
        self.leave = max(self.leave, 1)

    def _leave_now(self, *_: object) -> None:
        self.leave = 2

    # From its start to its end.

    def work(self) -> int:
        """Work until told to stop; return an exit code that tells the supervisor why."""
        self.store = self._open()
        self.commit(self._register)
        self.follow(self.store.pulse()[0])
        try:
            # First recover: processes of lost runs must not go on while others lock the database.
            self.recover()
            self.commit(self.start_delays_anew)
            self._loop()
        finally:
            self.stop_round()
        self._sync_at_last()
        self._deregister()
        if self.leave == 2:
            return EXIT_INTERRUPTED
        return EXIT_DISMISSED if self.dismissed else EXIT_OK

    def _open(self) -> Store:
        """Open the database; wait until that is possible."""
        while True:
            try:
                store = open_trusted(self.db, self.order.file, patience=TICK)
                store.scheduling = not self.order.run
                if self.order.drain == PROBING:
                    store.hookless = self.order.queues[0]
                store.defer_sync()
                return store
            except (Unavailable, OSError) as error:
                if self.leave:
                    raise
                self.tell_trouble(str(error))
                self.bell.wait(TICK)

    def _register(self) -> None:
        """Make life lock, bell and row in one transaction: nobody sees a worker half made."""
        if self.life < 0:
            self.life = take_life_lock(self.db, self.name)
            self.store.identity.watch(self.life)
            note_trouble(self.life, "")  # this takes the disk space for all notes
            self.bell = make_bell(bell_path(self.db, self.name))
            self.bell.hear_signals()
        test_point("being born")
        self.store.add_worker(self.name, self.pool, now_millis())

    def _sync_at_last(self) -> None:
        """Sync the records before leaving; try until it works, unless the worker must go now."""
        self.sync_records()
        while self.unsynced and self.leave < 2:
            self.bell.wait(SYNC_AGAIN)
            self.sync_records()

    def _deregister(self) -> None:
        """Delete its row and files; if that fails, recovery does it later.

        They stay if it leaves a run that is not surely gone: recovery needs them.
        """
        self.store.patience = LAST_PATIENCE
        try:
            if self.name in self.store.holders():
                return
            with self.store.transaction():
                self.store.forget(self.name)
            remove_files(self.db, self.name)
        except (QueueError, OSError):
            pass

    # The loop: run jobs, or sleep.

    def _loop(self) -> None:
        while not self.leave:
            if self.sync_failed:
                self.sync_records()
            self.step_round()
            news = self._has_news()
            if self.unpatrolled and monotonic() >= self.next_patrol:
                self.patrol()
            self._sweep()
            if news and self._may_claim():
                job = self.record_and_claim(None)
                while job is not None:
                    result = self.execute(job)
                    job = result and self.record_and_claim(result)
                self._rest()
            elif self._is_done():
                self._leave_soon()
            elif not self.leave:
                self._idle()

    def _has_news(self) -> bool:
        """After the bell: tell whether anybody has committed anything, or a time has come."""
        if self.orphaned():
            self._leave_soon()
        try:
            seen = self.store.changed()
        except Unavailable:
            return False
        if seen == self.seen and now_millis() < self.next_due:
            return False
        self.seen = seen
        self.unpatrolled = True
        return True

    def _may_claim(self) -> bool:
        """Tell by reading alone whether there is a job to claim, for writers wait for each other.

        The claim reads the same again under the mutex: another worker may have been faster.
        """
        if not self.sync_failed and monotonic() >= self.rest_until:
            try:
                epoch, self.next_due, unsettled = self.store.pulse()
                self.follow(epoch)
                if unsettled and self.store.settle(now_millis()):
                    ring_all(self.db)
                ready = self.store.ready(self.queues, self.next_due, now_millis())
                return ready and not self.leave and not self._used_up()
            except Unavailable:
                pass
        self.seen = -1
        return False

    def _used_up(self) -> bool:
        if not self.order.limited:
            return False
        return bool(self.store.pool(self.pool)["jobs_left"] == 0)

    def _is_done(self) -> bool:
        """Tell whether a `run`, a drain or --max-jobs leaves nothing more to do."""
        try:
            if self.order.run or self.order.drain == WHOLE:
                queue = self.order.queues[0]
                return bool(self.order.drain) and not self.store.is_busy(queue)
            if self._used_up():
                return True
            return self.order.drain and self.store.drained(self.queues, now_millis())
        except Unavailable:
            return False

    def _rest(self) -> None:
        """After work: look again before sleeping, for own commits are no news; ring drains."""
        self.seen = -1
        self.sync_records()
        if self.order.drain or self.order.limited or self.order.run:
            ring_all(self.db)

    def _idle(self) -> None:
        """Sleep until the bell, a signal, or the exact time of the next retry or schedule."""
        pause = self.settings["poll_interval_ms"] / 1000
        pause = min(pause, self.next_due / 1000 - time.time(), self.round_wait())
        rest = self.rest_until - monotonic()
        if rest > 0:
            pause = min(pause, rest)
        if self.bell.wait(pause):
            system.reap(0)  # daemons of earlier jobs are children of this worker: reap them
        if self.clock_was_set_back():
            self.commit(self.start_delays_anew)
            self.seen = -1

    def _sweep(self) -> None:
        now = monotonic()
        if now < self.next_sweep:
            return
        self.next_sweep = now + 1.0
        try:
            sweep(self.store, self.settings)
        except (QueueError, OSError, ValueError):
            pass  # not urgent; the next transaction will tell what is wrong with the database


def _exit_code(worker: Worker) -> int:
    """Run a worker to its end; return the exit code for the supervisor."""
    try:
        return worker.work()
    except (QueueError, OSError) as error:
        worker.announce(str(error))
        if isinstance(error, Unavailable):  # recovery will do what it can't write now
            return (EXIT_TROUBLED, EXIT_OK, EXIT_INTERRUPTED)[worker.leave]
        return EXIT_TROUBLED if isinstance(error, OSError) else EXIT_FAILED
    except Exception:
        import traceback
        system.say(traceback.format_exc(), 2)
        return EXIT_BUG


def worker_main(order: WorkerConfig) -> NoReturn:
    """The main function of a worker process."""
    for fd in order.fds:
        os.close(fd)
    if order.run:
        os.dup2(2, 1)  # stdout is for results
    try:
        system.prepare_worker(order.supervisor)
        worker = Worker(order)
    except OSError as error:
        system.say("queuectl: a worker can't start: %s\n" % error, 2)
        os._exit(OWN_CODES + EXIT_TROUBLED)
    worker.handle_signals()
    code = OWN_CODES + _exit_code(worker)
    worker.sync_records()
    if not close_stores():
        os._exit(code)
    sys.exit(code)


# ═══ Console ═══ printing: to which stream, how wide, and with what escaped ══════════════════

def mute(stream: int) -> None:
    """Drop all further output to a stream: Python would fail again after a failed write."""
    try:
        fd = os.open(os.devnull, os.O_WRONLY)
        os.dup2(fd, stream)
        if fd != stream:
            os.close(fd)
    except OSError:
        pass


def complain(text: str) -> None:
    """Write a line to stderr: errors, advice, progress."""
    try:
        if sys.stderr is not None:
            print("queuectl: %s" % as_called(clean(text)), file=sys.stderr, flush=True)
    except (OSError, ValueError):
        mute(2)  # nobody can read it


CLEAR_LINE = "\r\033[K"


def emit_bytes(data: bytes, stream: Any = None) -> None:
    """Write a part of a command's result, unchanged, to stdout or another standard stream.

    On a terminal it appears at once, elsewhere when the buffer is full or at the end. Raises
    OSError if it can't be written.
    """
    stream = stream or sys.stdout
    if stream is None:
        raise OSError("stdout is closed")
    stream.buffer.write(data)
    if stream.line_buffering:
        stream.flush()


def flush_streams() -> None:
    """Flush the standard streams. Raises OSError."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()


def emit_text(text: str, stream: Any = None) -> None:
    """Write a part of a result as it is: text without anything that a user supplied."""
    emit_bytes(text.encode(getattr(stream or sys.stdout, "encoding", "ascii"), "replace"), stream)


def emit(line: str) -> None:
    """Write a line of a result, with control characters escaped."""
    emit_text(clean(line) + "\n")


def advise(line: str, stream: Any = None) -> None:
    """Write a line that advises commands (see as_called), to stdout or another stream."""
    emit_text(as_called(clean(line)) + "\n", stream)


def emit_json(value: Any) -> None:
    """Write a JSON value as a command's result."""
    emit_text(json.dumps(value, indent=2) + "\n")


def emit_list(values: Iterable[Any]) -> None:
    """Write a JSON array as a command's result, one value a line."""
    emit_text("[")
    end = "\n"
    for value in values:
        emit_text(end + json.dumps(value))
        end = ",\n"
    emit_text("\n]\n")


def is_terminal(stream: Any) -> bool:
    """Tell whether a standard stream is a terminal; a closed one (None) is not."""
    return stream is not None and stream.isatty()


def last_lines(output: bytes, count: int) -> bytes:
    """Return the last `count` lines of an output; the very last may lack its newline."""
    start = len(output)
    while start and count:
        start, count = output.rfind(b"\n", 0, start - 1) + 1, count - 1
    return output[start:]


def _emit_part(output: bytes, stream: Any, tag: str | None) -> None:
    if tag is not None:
        label = tag.encode("utf-8", "surrogateescape") + b"\t"
        output = re.sub(rb"[^\r\n]*[\r\n]|[^\r\n]+", lambda line: label + line.group(), output)
    if is_terminal(stream or sys.stdout):
        text = output.decode("utf-8", "replace").replace("\r\n", "\n")
        text = re.sub(r"[^\n\t]+", lambda match: clean(match.group()), text)
        output = text.encode("utf-8", "replace")
    emit_bytes(output, stream)


def emit_output(output: bytes, stream: Any = None, tag: str | None = None) -> None:
    """Show what a job has printed: escaped on a terminal, unchanged in a pipe.

    With a `tag`, each line begins with the tag and a tab. A carriage return ends a line too, as in
    GNU parallel. A long output is shown in parts, for a list of lines takes much more memory.
    """
    start = 0
    while start < len(output):
        end = output.find(b"\n", start + (1 << 20)) + 1 or len(output)
        _emit_part(output[start:end], stream, tag)
        start = end


def terminal_width() -> int:
    """Return the columns of the terminal on stdout; 0 if it is no terminal."""
    try:
        if is_terminal(sys.stdout):
            return os.get_terminal_size(sys.stdout.fileno()).columns
    except (OSError, ValueError):
        pass
    return 0


def text_width(text: str) -> int:
    """Return the columns of a text: two for wide characters, none for combining ones."""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width
    base = [c for c in text if not combining(c)]
    return len(base) + sum(east_asian_width(c) in "WF" for c in base)


def fit(text: str, width: int) -> str:
    """Cut text to a number of columns, or fill it up with blanks."""
    if text_width(text) > width:
        text = text[:4 * width]
        while text and text_width(text) >= width:
            text = text[:-1]
        text += "…"[:width]
    return text + " " * (width - text_width(text))


def cut(line: str, width: int) -> str:
    """Cut a line to `width` columns (0: no limit)."""
    return fit(line, width).rstrip() if width else line


COLOURS = {PROCESSING: "36", COMPLETED: "32", FAILED: "33", DEAD: "31"}


def coloured(cell: str, text: str) -> str:
    """Colour a cell of a table whose text is a state."""
    if text not in COLOURS:
        return cell
    return "\033[%sm%s\033[0m" % (COLOURS[text], cell)


def narrow(widths: list[int], width: int) -> list[int]:
    """Fit a table's columns into `width`: narrow the last column first, then the widest."""
    room = width - 2 * (len(widths) - 1)
    widths = [min(size, width) for size in widths]
    while sum(widths) > room and max(widths) > 4:
        if widths[-1] > 20:
            widths[-1] -= 1
        else:
            widths[widths.index(max(widths))] -= 1
    return widths


def table(head: Names, rows: Iterable[Names], width: int,
          colour: bool) -> list[str]:
    """Return the lines of a table in `width` columns (0: no limit), perhaps in colour.

    Cells that do not fit are cut at the right; control characters are escaped.
    """
    cells = [list(map(clean, row)) for row in (head, *rows)]
    widths = [max(map(text_width, column)) for column in zip(*cells)]
    if width:
        widths = narrow(widths, width)
    lines = []
    for row in cells:
        shown = list(map(fit, row, widths))
        if colour:
            shown = list(map(coloured, shown, row))
        lines.append("  ".join(shown).rstrip())
    return lines


def emit_table(head: Names, rows: Iterable[Names], none: str) -> None:
    """Show a table: on a terminal within its width and coloured, elsewhere whole.

    `none` is the text if there are no rows.
    """
    rows, width = list(rows), terminal_width()
    if not rows:
        emit(none)
        return
    colour = width > 0 and not os.environ.get("NO_COLOR")
    for line in table(head, rows, width, colour):
        emit_text(line + "\n")


# ═══ Pool ═══ the supervisor: start, watch, replace and stop workers ═════════════════════════
#
# Locks. The supervisor holds the pool's life lock and a bell that hears only signals. It never has
# the database open while it forks: a forked copy of a locked descriptor keeps the lock after its
# owner's death. For the same reason a worker first closes the life file that it inherited.
#
# Stopping. `worker stop`, Ctrl-C or a closing terminal sends a signal to the supervisor. The
# handler counts it, and the bell wakes the loop. The loop signals each worker: SIGHUP (stop after
# the running job), the second time SIGUSR1 (stop now). Then it records the stop. The record makes a
# job that is killed from now on count as ended with its pool, not as failed; and workers on Windows
# learn of the stop only from the record. The signals come first, for a stop must not wait for a
# database that can't be written.
#
# If a supervisor dies, its workers finish their jobs and stop. On Linux the kernel sends each a
# SIGHUP; and before each claim they check whether it is still their parent.

def _context() -> Any:
    import multiprocessing
    return multiprocessing.get_context(system.start_method)


QUICK_DEATH = 1.0  # seconds; a worker that dies sooner is replaced after a growing delay
LONGEST_DELAY = 1.0


def new_pool_name(store: Store) -> str:
    """Return a name that is never used twice; it begins with the queue's id, see Identity."""
    return "%s-%s" % (store.queue_id(), os.urandom(3).hex())


class Pool:
    """Worker processes under one supervisor, from their start to the end of the last."""

    life = -1  # the descriptor that holds its life lock
    reporter: Any = None  # in a `run`: the process that shows outputs and progress, see Reporter
    number = 0  # the number of the worker started last
    quick_deaths = 0  # in a row
    stops = 0  # how many times it was told to stop
    passed_on = 0  # what it told the workers: 1: soon, 2: now
    code = EXIT_OK

    def __init__(self, db: str, name: str, count: int, queues: Sequence[str],
                 drain: Any = False, max_jobs: int | None = None, log: str = ""):
        """`log` is the log file of a detached pool, "" for others."""
        self.db, self.name, self.count = db, name, count
        self.queues, self.drain, self.max_jobs = tuple(queues), drain, max_jobs
        self.log = log
        self.unneeded: list[int] = []  # descriptors that workers inherit
        self.workers: dict[Any, float] = {}  # each process with the time it was started
        self.openings: list[float] = []  # when workers that died will be replaced

    def run(self) -> int:
        """Work until drained or stopped; return the exit code of `worker start`."""
        self.context = _context()
        system.prepare_parent()
        sys.path[:] = [abspath(entry) for entry in sys.path]  # workers change folders
        if self.life < 0:
            store = open_trusted(self.db, tell=complain)
            with store.transaction():
                self.register(store)
            store.close()
        self.bell = make_bell()
        if self.reporter:
            self.bell.watch(self.reporter.sentinel)
        self._handle_signals()
        self.openings = [0.0] * self.count
        while self.workers or self.openings:
            self._start_due()
            self.bell.wait(min(self.openings, default=FOREVER) - monotonic())
            self._stop()
            self._collect()
        return self._clean_up()

    def start_reporter(self, target: Callable[..., Any], *values: Any) -> None:
        """Before `run`: start a process that calls `target` with these values.

        Two values are added: its end of a pipe to the pool, and descriptors that it must close.
        """
        context = _context()
        self.orders, theirs = context.Pipe()
        self.unneeded, unneeded = [self.orders.fileno()], []
        if system.start_method == "fork":
            unneeded = [*self.unneeded, self.life]
        self.reporter = context.Process(target=target, args=(*values, theirs, unneeded))
        self.reporter.start()
        theirs.close()

    def end_reporter(self) -> int:
        """Tell the reporter that the pool has ended, and if it was stopped; return its exit code.

        The reporter may have to wait for a slow reader; another signal ends it at once.
        """
        stops = self.stops
        try:
            self.orders.send(stops > 0)
        except OSError:
            pass  # it has ended
        while self.reporter.exitcode is None:
            self.bell.wait(FOREVER)
            if self.stops > stops:
                self.reporter.terminate()
        return int(self.reporter.exitcode)

    def register(self, store: Store) -> None:
        """In a transaction: take the life lock, and add the pool's row."""
        self.file = store.identity.file
        self.life = take_life_lock(self.db, self.name)
        store.add_pool(self.name, self.count, self.queues, self.max_jobs, now_millis())

    def _handle_signals(self) -> None:
        self.bell.hear_signals()
        system.let_through()  # the caller may have blocked some
        for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGBREAK"):
            number = getattr(signal, name, None)
            if number is None or signal.getsignal(number) == signal.SIG_IGN:
                continue  # stays ignored under nohup
            signal.signal(number, self._on_signal)
        if not WINDOWS:
            signal.signal(signal.SIGCHLD, lambda *_: None)

    def _on_signal(self, number: int, frame: object) -> None:
        # A closing terminal may send it more than once.
        if not self.stops or signal_name(number) != "SIGHUP":
            self.stops += 1

    # Workers are started.

    def _start_due(self) -> None:
        """Start the workers that are due."""
        self.openings.sort()
        while self.openings and self.openings[0] <= monotonic():
            del self.openings[0]
            self._start_worker()

    def _start_worker(self) -> None:
        self.number += 1
        process = self.context.Process(
            target=worker_main, args=(self._order(),), name="worker %d" % self.number)
        mask = system.hold_signals()  # signals to it wait until it has its own handlers
        before = system.descriptors()
        try:
            process.start()
        except OSError as error:
            for fd in system.descriptors() - before:  # multiprocessing has left them open
                os.close(fd)
            self._tell("a worker can't be started yet: %s" % error.strerror)
            self.openings.append(monotonic() + LONGEST_DELAY)
            return
        finally:
            system.let_through(mask)
        self.workers[process] = monotonic()
        self.bell.watch(process.sentinel)

    def _order(self) -> WorkerConfig:
        """Return what the next worker must know."""
        inherited = [self.life, self.bell.fd, self.bell.write_end, *self.unneeded]
        if system.start_method != "fork":
            inherited = []
        return WorkerConfig(
            self.db, self.file, self.name, self.number, self.queues, self.drain,
            limited=self.max_jobs is not None, run=self.reporter is not None,
            log=self.log, supervisor=os.getpid(), fds=[fd for fd in inherited if fd >= 0])

    def _tell(self, text: str) -> None:
        clear = ""
        if self.reporter and is_terminal(sys.stderr):
            clear = CLEAR_LINE  # which shows the progress
        if self.log:
            renew_log(self.log)
        system.say("%squeuectl: %s\n" % (clear, as_called(text)), 2)

    # Workers are told to stop.

    def _stop(self) -> None:
        """Pass a stop on to the workers: the first lets jobs finish, the second ends them.

        The end of the reporter counts as a first stop: a `run` is done, or nobody reads it.
        """
        ended = self.reporter is not None and self.reporter.exitcode is not None
        level = max(min(self.stops, 2), int(ended))
        if level <= self.passed_on:
            return
        self.passed_on, self.openings = level, []
        for process in self.workers:
            system.dismiss(process.pid, level == 2)
        if level == 2:
            self._tell("ending the running jobs now")
        elif not ended:
            self._tell("stopping: running jobs finish first; press Ctrl-C again, or run "
                       "`queuectl worker stop --now`, to end them")
        self._record_stop()

    def _record_stop(self) -> None:
        try:
            store = Store(self.db, LAST_PATIENCE)
            with store.transaction():
                store.ask_stop([self.name], self.passed_on)
            store.close()
        except QueueError:
            pass

    # Workers have ended.

    def _collect(self) -> None:
        """Reap workers that have ended, and plan to replace those that should not have."""
        for process in [process for process in self.workers if process.exitcode is not None]:
            self.bell.forget(process.sentinel)
            age = monotonic() - self.workers.pop(process)
            code = process.exitcode - OWN_CODES
            if code in (EXIT_FAILED, EXIT_INTERRUPTED):
                self.code = max(self.code, code)
            elif code != EXIT_OK and not self.passed_on:
                self.openings.append(monotonic() + self._delay(code, age))
        own = [*self.workers, self.reporter]
        system.reap_strangers({process.pid for process in own if process})

    def _delay(self, code: int, age: float) -> float:
        """Return the seconds until a worker that ended with `code` at this age is replaced."""
        if code != EXIT_DISMISSED:
            why = "exit code %d" % (code + OWN_CODES)
            if code < 0 and not WINDOWS:
                why = signal_name(-code)
            self._tell("a worker died (%s); it is replaced" % why)
        if code == EXIT_TROUBLED:
            return LONGEST_DELAY
        self.quick_deaths += 1
        if age >= QUICK_DEATH:
            self.quick_deaths = 0
        if self.quick_deaths < 2:
            return 0.0
        return min(LONGEST_DELAY, 0.1 * 2.0 ** min(self.quick_deaths - 1, 10))

    def _clean_up(self) -> int:
        """Recover killed workers' jobs, then delete the pool's row; return the exit code.

        If that can't be written now, the next pool does it.
        """
        died = 0
        try:
            store = open_trusted(self.db, self.file)
            store.patience = LAST_PATIENCE
            died = store.pool(self.name)["died"]
            recover(store, self.bell.wait, self._tell, self.name)
            died = store.pool(self.name)["died"]
            with store.transaction():
                # A run that is not surely gone needs the row, as in forget_dead.
                if self.name not in map(_pool_of, store.holders()):
                    store.forget(self.name)
            remove_files(self.db, self.name)
            store.close()
        except (Unavailable, OSError):
            pass
        except QueueError as error:
            self._tell(str(error))
            return max(self.code, EXIT_FAILED)
        if self.drain is True and died and not self.reporter:
            return self.code or EXIT_FAILED
        return self.code


# ═══ Views ═══ rows to text or JSON: pure functions ══════════════════════════════════════════

JOB_HEAD = ("ID", "STATE", "TRIES", "QUEUE", "PRIO", "WHEN", "COMMAND")
DEAD_HEAD = ("ID", "TRIES", "DIED", "WHY", "COMMAND")
WORKER_HEAD = ("WORKER", "PID", "UP", "DOES")
QUEUE_HEAD = ("QUEUE", "LIMIT", "STARTS", *map(str.upper, STATES), "RUNNER")
RUN_FIELDS = ("run", "attempt", "state", "started_at", "finished_at", "duration_seconds",
              "exit_code", "error", "worker")


def with_times(row: Row) -> Row:
    """Return the row with its times in ISO 8601."""
    shown = dict(row)
    for name, value in row.items():
        if (name == "due" or name.endswith("_at")) and value is not None:
            shown[name] = show_time(value)
    return shown


def job_json(job: Row) -> Row:
    """Return a job as `--json` shows it: its FIELDS."""
    policy = json.loads(job["policy"] or "{}")
    job = {**job, "retry_after": None, "dead_on": [], **policy}
    shown = with_times({name: job[name] for name in FIELDS})
    shown["env"] = json.loads(job["env"] or "{}")
    for name in ("after", "after_any"):
        shown[name] = job[name].split(",") if job[name] else []
    return shown


def run_json(run: Row, job: str) -> Row:
    """Return a run of the job with this id as `--json` shows it.

    Output that is not UTF-8 is in base64, under the name `stdout_base64` or `stderr_base64`.
    """
    shown = {"job": job, **with_times({name: run[name] for name in RUN_FIELDS})}
    shown["duration_seconds"] = round(run["duration_seconds"], 6)
    for name in ("stdout", "stderr"):
        output = run[name] or b""
        try:
            shown[name] = output.decode()
        except UnicodeDecodeError:
            from base64 import b64encode
            shown[name + "_base64"] = b64encode(output).decode()
    return shown


def queue_json(queue: Row) -> Row:
    """Return a queue as `queue list --json` shows it."""
    return with_times({**queue, "paused": bool(queue["paused"])})


def queue_row(queue: Row) -> tuple[str, ...]:
    """Return a queue's row in `queue list`."""
    counts = [str(queue[state]) for state in STATES]
    starts = "paused" if queue["paused"] else "yes"
    limit, runner = map(show_setting, (queue["concurrency"], queue["runner"]))
    return queue["name"], limit, starts, *counts, runner


def rest_reason(queue: Row) -> str:
    """Say why a queue rests, and until when; "" if it does not."""
    if not queue["rest_why"]:
        return ""
    what = "waits for what becomes of one job"
    if queue["next_try_at"]:
        what = "rests until %s" % show_time(queue["next_try_at"])
    return "the queue %s %s: %s" % (queue["name"], what, clean(queue["rest_why"]))


def span(start: int | None, end: int) -> str:
    """Write the time from one moment to another (milliseconds); "" without a start."""
    return "" if start is None else show_duration(max(0, end - start) / 1000)


def job_row(job: Row, now: int) -> tuple[str, ...]:
    """Return a job's row in `list`."""
    if job["state"] == PROCESSING:
        when = "for " + span(job["started_at"], now)
    elif job["state"] == PENDING and not job["ready"] and job["due"] is None:
        when = "after " + ",".join(filter(None, (job["after"], job["after_any"])))
    elif job["state"] in WAITING and (job["due"] or now) > now:
        when = "in " + span(now, job["due"])
    else:
        when = span(job["updated_at"], now) + " ago"
    tries = "%d/%d" % (job["attempts"], max(1, job["max_retries"]))
    return (job["id"], job["state"], tries, job["queue"],
            str(job["priority"]), when, job["command"])


def dead_row(job: Row, now: int) -> tuple[str, ...]:
    """Return a job's row in `dlq list`."""
    died = span(job["updated_at"], now) + " ago"
    why = job["last_error"] or ""
    return job["id"], str(job["attempts"]), died, why, job["command"]


def worker_row(worker: Row, now: int) -> tuple[str, ...]:
    """Return a worker's row in `worker list` and `status`."""
    doing = "idle"
    if worker["job"] is not None:
        doing = "%s for %s: %s" % (
            worker["job"], span(worker["job_started_at"], now), worker["command"])
    if worker["trouble"]:
        doing = "waits: " + worker["trouble"]
    up = span(worker["started_at"], now)
    return worker["name"], str(worker["pid"]), up, doing


def job_lines(job: Row) -> list[str]:
    """Describe a job, one field a line, without empty fields."""
    shown = job_json(job)
    shown["env"] = " ".join("%s=%s" % pair for pair in shown["env"].items())
    for name in ("after", "after_any", "dead_on"):
        shown[name] = ", ".join(map(str, shown[name]))
    return ["%-16s %s" % (name, value) for name, value in shown.items()
            if value not in (None, "")]


def run_title(run: Row) -> str:
    """Describe a run in one line: when, which attempt, how it ended and why."""
    title = "[%s] run %d, attempt %d, %s after %s" % (
        show_time(run["started_at"]), run["run"], run["attempt"], run["state"],
        show_duration(run["duration_seconds"]))
    if run["error"]:
        title += ": %s" % run["error"]
    return title


def pause_lines(pauses: Sequence[Row]) -> Iterator[str]:
    """Say which queues are paused, since when, and how to resume them."""
    for pause in pauses[:5]:
        name, since = pause["queue"] or "", ""
        if pause["paused_at"]:
            since = ", since " + show_time(pause["paused_at"])
        yield "Paused: %s%s; `%s` lets jobs start." % (
            name or "all queues", since, ("queuectl queue resume " + name).rstrip())


def hold_up_lines(status: Row) -> Iterator[str]:
    """Say what keeps jobs from running, and what to do."""
    yield from pause_lines(status["pauses"])
    for trouble in status["troubles"][:5]:
        yield "Held up: %s" % trouble
    if status["lost"]:
        yield ("Held by dead workers: %s; `queuectl worker start` gives them back."
               % ", ".join(status["lost"][:5]))
    for name in status["unserved"][:5]:
        yield ("No worker serves the queue %s: `queuectl worker start --queue %s` does."
               % (name, name))
    for name in status["interrupted"][:5]:
        yield "Interrupted: `queuectl run --resume %s` goes on." % name
    if status["jobs"][DEAD]:
        yield ("`queuectl dlq list` shows why jobs are dead, "
               "`queuectl dlq retry ID` runs one again.")
    waiting = status["scheduled"], *map(status["jobs"].get, UNFINISHED)
    if not status["workers"] and any(waiting):
        yield "No worker is running: `queuectl worker start` works on the jobs."


def show_rate(runs_per_second: float) -> str:
    if runs_per_second < 1:
        return "%.2g/min" % (60 * runs_per_second)
    return "%.1f/s" % runs_per_second


def show_sizes(sizes: Row) -> str:
    """Write the disk space of a queue's files."""
    return ", ".join("%s %.1f MiB" % (name, sizes[name + "_bytes"] / 2**20)
                     for name in ("database", "log", "output"))


def status_lines(status: Row, workers: Sequence[Row], now: int, width: int) -> list[str]:
    """Return the lines of `status`: jobs by state, workers and their jobs, what comes next.

    `now` is in milliseconds, `width` in columns (0: no limit).
    """
    jobs, oldest, upcoming = status["jobs"], status["oldest_waiting"], status["next"]
    lines = ["%-11s %d" % (state + ":", jobs[state]) for state in STATES
             if jobs[state] or state != CANCELLED]
    lines.append("%-11s %d" % ("Workers:", status["workers"]))
    lines.append("%-11s %s in the last minute, %s in the last hour" % (
        "Runs:", show_rate(status["runs_per_second_1m"]), show_rate(status["runs_per_second_1h"])))
    lines.append("%-11s %s" % ("Disk:", show_sizes(status)))
    if workers:
        rows = [worker_row(worker, now) for worker in workers]
        shown = table(WORKER_HEAD, rows, max(0, width - 2), False)
        lines += ["  " + line for line in shown]
    if oldest:
        lines.append("Oldest waiting: %s, for %s: %s" % (
            oldest["id"], span(oldest["ready_at"], now), oldest["command"]))
    if upcoming:
        lines.append("Next at %s: %s: %s" % (
            show_time(upcoming["due"]), upcoming["id"], upcoming["command"]))
    lines += hold_up_lines(status)
    return [cut(clean(line), width) for line in lines]


RUNNING_HEAD = ("RUNNING", "QUEUE", "FOR", "WORKER", "COMMAND")
MOST_RUNNING = 10  # lines of `status --watch`


def watch_lines(status: Row, workers: Sequence[Row], died: Sequence[Row],
                now: int, width: int) -> list[str]:
    """Return the lines of `status --watch`: running jobs, the longest first; status; deaths."""
    running = [worker for worker in workers if worker["job"] and not worker["trouble"]]
    running.sort(key=lambda worker: worker["job_started_at"])
    rows = [(worker["job"], worker["queue"], span(worker["job_started_at"], now),
             worker["name"], worker["command"]) for worker in running[:MOST_RUNNING]]
    lines = table(RUNNING_HEAD, rows, width, False)
    if not rows:
        lines = ["Nothing runs."]
    if running[MOST_RUNNING:]:
        lines.append("and %d more" % len(running[MOST_RUNNING:]))
    lines += ["", *status_lines(status, [], now, width)]
    for job in died:
        lines.append("Died last: %s, %s ago: %s" % (
            job["id"], span(job["finished_at"], now), clean(job["last_error"] or "")))
    return lines


OUTCOMES = "completed", "failed", "died"
PASSED = "made", "skipped", "missed"  # what can become of a schedule's times
STATS_HEAD = ("COMPLETED", "FAILED", "DIED", "RUN FOR", "LONGEST", "WAITED", "LONGEST", "")


def stats_rows(done: Sequence[Row]) -> Iterator[Sequence[str]]:
    """Return the rows of `stats`: one for each hour, day or queue, with bars."""
    most = max((each["runs"] for each in done), default=0)
    for each in done:
        runs = each["runs"]
        outcomes = [str(each[name]) for name in OUTCOMES]
        times = [show_duration(seconds) for seconds in (
            each["run_seconds_sum"] / runs, each["run_seconds_max"],
            each["wait_seconds_sum"] / runs, each["wait_seconds_max"])]
        title = each.get("queue") or show_time(each["starts_at"])[:16]
        yield (title, *outcomes, *times, "#" * -(-20 * runs // most))


def progress_text(name: str, part: Any, rate: float | None,
                  time_left: float | None) -> str:
    """Write a run's progress in a line: done, dead, running, to be retried, rate, time left."""
    words = ["%s: %d of %d done" % (name, part.completed, part.total)]
    if part.paused:
        words.append("paused: `queuectl queue resume` lets it go on")
    elif time_left is not None:
        words.append("%s left" % show_duration(time_left))
    counts = [(part.dead, "dead"), (part.cancelled, "cancelled"), (part.processing, "running"),
              (part.failed, "to be tried again")]
    words += ["%d %s" % pair for pair in counts if pair[0]]
    if rate:
        words.append("%.1f/s" % rate)
    return ", ".join(words)


def summary_lines(name: str, part: Any, seconds: float,
                  causes: Sequence[Row]) -> list[str]:
    """Sum up a `run`: counts, why jobs are dead, and what to do next.

    The first few `causes` have an example, `job`, if a job died of the cause itself.
    """
    gone = part.total - part.left - part.completed - part.dead - part.cancelled
    counts = (
        (part.dead, "dead"), (part.cancelled, "cancelled"), (part.left, "left"),
        (gone, "deleted meanwhile"))
    others = "".join(", %d %s" % pair for pair in counts if pair[0] > 0)
    lines = ["%s: %d of %d completed%s in %s" % (
        name, part.completed, part.total, others, show_duration(seconds))]
    shown = [cause for cause in causes if "job" in cause]
    for cause in shown:
        job = cause["job"]
        count = "%d dead" % cause["count"]
        if cause["after"]:
            count += " and %d after it" % cause["after"]
        lines.append("  %s: %s" % (count, cause["example"] or cause["cause"]))
        if job:
            lines.append("      such as %s: %s" % (job["id"], shorten(clean(job["command"]), 200)))
    if len(causes) > len(shown):
        lines.append("  and more: `queuectl dlq list --causes --queue %s` shows them" % name)
    again = "queuectl worker start --queue %s" % name
    if is_run_queue(name):
        again = "queuectl run --resume %s" % name
    if shown:
        lines.append("`queuectl logs --state dead --queue %s` shows what they printed; `queuectl "
                     "dlq retry --queue %s` and then `%s` try again." % (name, name, again))
    if part.left:
        lines.append("`%s` goes on with the rest." % again)
    return lines


def label_value(name: str) -> str:
    """Write a queue's name as the value of a label."""
    return '"%s"' % re.sub(r'([\\"])', r"\\\1", name)


def summary(done: Sequence[Row], key: str) -> Iterator[str]:
    """Write the samples of a summary: the sum in `key`, and the number of runs."""
    for queue in done:
        name = label_value(queue["queue"])
        yield "_sum{queue=%s} %.6f" % (name, queue[key])
        yield "_count{queue=%s} %d" % (name, queue["runs"])


def prometheus_lines(status: Row, totals: Sequence[Row], done: Sequence[Row],
                     schedules: Iterable[tuple[Any, ...]], now: int) -> list[str]:
    """Describe the queue in Prometheus' text format, version 0.0.4, as node_exporter reads it.

    `totals` are the jobs by queue and state, `done` is all that was ever done, by queue;
    `schedules` are the counts of Store.schedule_counts.
    """
    oldest, waits = status["oldest_waiting"], 0.0
    if oldest:
        waits = max(0, now - oldest["ready_at"]) / 1000
    disk = ['{of="%s"} %d' % (name, status[name + "_bytes"])
            for name in ("database", "log", "output")]
    jobs = ['{queue=%s,state="%s"} %d' % (label_value(queue["queue"]), state, queue[state])
            for queue in totals for state in STATES]
    paused = ["{queue=%s} %d" % (label_value(queue["queue"]), queue["paused"]) for queue in totals]
    runs = ['{queue=%s,outcome="%s"} %d' % (label_value(queue["queue"]), outcome, queue[outcome])
            for queue in done for outcome in OUTCOMES]
    passed = ['{schedule=%s,outcome="%s"} %d' % (label_value(name), outcome, count)
              for name, *counts in schedules for outcome, count in zip(PASSED, counts)]
    lines = []
    for title, values in (
            ("jobs gauge Jobs kept, by queue and state.", jobs),
            ("queue_paused gauge Whether a queue is paused.", paused),
            ("workers gauge Workers alive.", [" %d" % status["workers"]]),
            ("oldest_waiting_seconds gauge Waiting time of the job that has waited longest.",
             [" %.3f" % waits]),
            ("disk_bytes gauge Disk space of the database, its log, and current output.", disk),
            ("runs_total counter Runs that have ended, by outcome.", runs),
            ("schedule_times_total counter Times of schedules, by what was done then.", passed),
            ("run_seconds summary Time that runs took.", summary(done, "run_seconds_sum")),
            ("wait_seconds summary Time from when a job could have been claimed to its claim.",
             summary(done, "wait_seconds_sum"))):
        name, kind, text = title.split(" ", 2)
        lines += ["# HELP queuectl_%s %s" % (name, text), "# TYPE queuectl_%s %s" % (name, kind)]
        lines += ["queuectl_%s%s" % (name, value) for value in values]
    return lines


# ═══ Commands ═══ each command beside its options: reading, changing, working, setting up ════

Command = namedtuple("Command", "name run summary options examples writes")
COMMANDS: dict[str, Command] = {}
# In what order help and completion name them, by their first word.
PURPOSES = {
    "Run": "run enqueue schedule worker",
    "Inspect": "status list show logs why wait stats web",
    "Control": "retry cancel edit delete purge dlq queue",
    "Maintain": "config doctor backup restore service completion install uninstall",
}
ORDER = " ".join(PURPOSES.values()).split()
# Words that lead to several commands.
GROUPS = {
    "config": "show and change settings",
    "dlq": "the dead letter queue: jobs that failed too often",
    "queue": "limit, pause and resume queues",
    "schedule": "add jobs again and again, as cron does",
    "worker": "start, stop and list the processes that run jobs",
}


def option(usage: str, summary: str, **details: Any) -> Any:
    """Declare an option or argument, as argparse's add_argument takes it.

    `usage` has its names, and behind them the word for its value. An option without such a word and
    without choices is a flag.
    """
    names = usage.split()
    if not names[-1].startswith("-"):
        details["metavar"] = names.pop()
    elif "choices" not in details:
        details["action"] = "store_true"
    return names, dict(details, help=summary)


def option_lengths(options: Iterable[Any]) -> dict[str, int]:
    """Return how many words each option takes, itself included, by all its names."""
    lengths: dict[str, int] = {}
    for names, details in options:
        length = 1 if details.get("action") == "store_true" else 2
        lengths.update((name, length) for name in names if name.startswith("-"))
    return lengths


def length_of(word: str, lengths: dict[str, int]) -> int:
    """Return how many words belong to the option `word`; 0 if it is no option."""
    if "=" in word and word.partition("=")[0] in lengths:
        return 1
    if lengths.get(word[:2]) == 2 and word[2:]:  # -j4
        return 1
    return lengths.get(word, 0)


def subcommand(name: str, summary: str, examples: str, *options: Any,
               writes: bool = False) -> Callable[..., Any]:
    """Make a function the command `name`.

    The function takes the arguments and returns the exit code, or None for 0. `args.store` is the
    store of its database, opened at its first use; only for reading unless the command `writes`.
    """
    def enter(run: Callable[..., Any]) -> Callable[..., Any]:
        COMMANDS[name] = Command(name, run, summary, options, examples, writes)
        return run
    return enter


def commands_of(group: str = "") -> list[Command]:
    """Return the commands of a group, or all of them, in the order of help."""
    prefix = group and group + " "
    shown = [entry for entry in COMMANDS.values() if entry.name.startswith(prefix)]
    shown.sort(key=lambda entry: ORDER.index(entry.name.split()[0]))
    return shown


def open_store(db: str, **how: bool) -> Store:
    """Open the store of a command that executes nothing.

    Warns on stderr if others could have written the database.
    """
    store = Store(db, tell=complain, **how)
    OPENED.append(store)
    reason = exists(db) and distrust_of(db)
    if reason:
        complain("nothing of this queue will be executed: %s" % reason)
    return store


def whole(name: str, most: int) -> Callable[[str], int]:
    """Return a function that checks for a whole number from 1 to `most`."""
    def check(text: str) -> int:
        try:
            number = to_whole(text)
        except ValueError:
            number = 0
        if not 1 <= number <= most:
            raise UsageError("%s must be a whole number from 1 to %d, not %s"
                             % (name, most, quoted(text)))
        return number
    return check


def workers_wanted(text: str) -> int:
    """Return how many workers `-j` demands: a number, or 50% of the cores."""
    if not text.strip("0%") or text.startswith("+"):
        raise UsageError("-j must be 1 or more workers, or N%% of the cores (100%%: one on each), "
                         "not %s" % quoted(text))
    check = whole("--workers", 1000)
    if not text.endswith("%"):
        return check(text)
    return max(1, (os.cpu_count() or 1) * check(text[:-1]) // 100)


time_limit = partial(checked, "delay", called="--timeout")
ENDLESS = float("inf")
JSON = option("--json", "print JSON")
BY_ID = "the job's id, or the first 4 or more characters of an id that queuectl made"
ID = option("id ID", BY_ID)
LIMIT = option("-n --limit N", "show only the newest N jobs (default: 50; with --json all)",
               type=whole("--limit", 10**9))
ALL = option("--all", "all of them")


def cmd_word(text: str) -> str:
    """Write text as one word for cmd.exe and the program that it starts.

    In quotes cmd.exe takes all but `"`, `%` and `!` as it is. A word with one of these is escaped
    by carets, its quotes too: then cmd.exe sees no quotes.
    """
    import subprocess
    word = subprocess.list2cmdline([text])
    if word[0] == '"' and not re.search('["%!]', text):
        return word
    return re.sub('[()%!^"<>&|]', r"^\g<0>", word)


def join_words(words: Sequence[str]) -> str:
    """Write a command line that a shell reads as exactly these words."""
    return " ".join(map(cmd_word if WINDOWS else shell_word, words))


def given_of(args: Any) -> Row:
    """Return the fields of a job that were given as options."""
    return {name: value for name, value in vars(args).items()
            if ALIASES.get(name, name) in GIVEN_FIELDS and value is not None}


def _variable(entry: str) -> tuple[str, str]:
    """Return the name and value of `--env NAME[=VALUE]`."""
    name, equals, value = entry.partition("=")
    if not equals and name not in os.environ:
        raise UsageError("--env %s: there is no such variable here; use --env NAME=VALUE"
                         % quoted(name))
    return name, value if equals else os.environ[name]


def given_options(args: Any) -> Row:
    """Return the fields of a new job that were given as options, in the form of JSON."""
    options = given_of(args)
    for name in ("after", "after_any", "dead_on"):
        if name in options:
            options[name] = ",".join(options[name])
    if "env" in options:
        options["env"] = dict(map(_variable, options["env"]))
    return options


def as_utf8(text: str) -> str:
    """Decode text from the system as UTF-8, also in a locale without UTF-8 (LC_ALL=C)."""
    return text if text.isascii() else os.fsencode(text).decode("utf-8", "surrogateescape")


def _folder(given: str | None) -> str:
    """Return the absolute path of a job's folder; by default the current folder."""
    try:
        here = check_text("the name of the folder you are in", as_utf8(os.getcwd()))
    except OSError:
        raise UsageError("the folder you are in is gone; cd to another") from None
    folder = here if given is None else join(here, given)
    if given == "" or not isdir(system.native(folder)):
        raise UsageError("cwd %s is not a folder" % quoted(given, 200))
    return folder


@lru_cache(16)
def find_shell(name: str) -> str:
    """Return the path of a shell, given as a path or as a name to look for in PATH."""
    import shutil
    if WINDOWS and name.lower() in ("cmd", "cmd.exe"):  # `which` looks in the current folder first
        return system.shell
    found = shutil.which(name)
    if not found:
        raise UsageError("there is no shell %s here; name a program that is in your PATH, "
                         "or give its path" % quoted(name, 200))
    return as_utf8(abspath(found))


def refuse_lines(command: str, shell: str | None) -> None:
    """Raise UsageError for a command of several lines: cmd.exe would run only the first."""
    if "\n" in command and is_cmd(shell or "cmd"):
        raise UsageError("cmd.exe runs only the first line of a command; join the lines by &, put "
                         "them into a .cmd file, or give them to a --shell such as powershell")


# ─── reading: commands that change nothing ────────────────────────────────────────────────────

def alive_of(entries: Iterable[Row]) -> list[Row]:
    """Return those pools or workers that live."""
    return [entry for entry in entries if entry["alive"]]


def unfinished_of(queue: Row) -> int:
    """Count the jobs of a queue that have not ended."""
    return sum(queue[state] for state in UNFINISHED)


def left_runs(store: Store) -> dict[str, int]:
    """Return the queues of interrupted runs, each with how many jobs are left."""
    busy = store.queues_of_runs()
    left = {queue["name"]: unfinished_of(queue) for queue in store.queues()}
    return {name: count for name, count in left.items()
            if count and is_run_queue(name) and name not in busy}


WATCH = option("--watch", "show it again each second, until Ctrl-C")
WATCH_EVERY = 1.0  # seconds


def show_again(frame: Callable[[], list[str]]) -> NoReturn:
    """Show the lines of `frame()` each second; on a terminal in place, without flicker."""
    clear = "\033[2J"
    while True:
        title = "%s, every second until Ctrl-C" % show_time(now_millis())[:-5]
        width = terminal_width()
        lines = [cut(line, width) for line in (title, *map(as_called, frame()))]
        if width:
            rows = os.get_terminal_size(sys.stdout.fileno()).lines
            shown = "".join(line + "\033[K\n" for line in lines[:rows - 2])
            emit_text(clear + "\033[H" + shown + "\033[J\n")
            clear = ""
        else:
            emit_text("\n".join(lines) + "\n\n")
        sys.stdout.flush()
        sleep(WATCH_EVERY)


def troubles_of(store: Store, queues: list[Row], workers: list[Row], lost: list[Row]) -> list[str]:
    """Return what keeps queues and workers from their work, as `status` tells it."""
    names = {worker["name"] for worker in workers}
    names.update(job["worker"] for job in lost if job["word"])
    told = {name: trouble_of(store.path, name) for name in sorted(names)}
    return [*filter(None, map(rest_reason, queues)),
            *["%s: %s" % pair for pair in told.items() if pair[1]]]


def status_of(store: Store) -> tuple[Row, list[Row]]:
    """Return what `status` shows, and the live workers."""
    workers, pools = alive_of(store.workers()), alive_of(store.pools())
    counts, queues, now = store.counts(), store.queues(), now_millis()
    lost = store.lost_jobs() if counts[PROCESSING] else []
    scheduled = store.scheduled_queues()
    waiting = [queue["name"] for queue in queues
               if not queue["paused"]
               and (queue[PENDING] + queue[FAILED] or queue["name"] in scheduled)]
    return {
        "jobs": counts,
        "workers": len(workers),
        "runs_per_second_1m": store.runs_per_second(MINUTE, now),
        "runs_per_second_1h": store.runs_per_second(HOUR, now),
        **sizes_of(store.path),
        "all_paused": store.all_paused(),
        "paused": [queue["name"] for queue in queues if queue["paused"]],
        "pauses": store.pauses(),
        "oldest_waiting": store.oldest_waiting(now),
        "next": store.next_due(now),
        "lost": [job["id"] for job in lost if store.is_own(job["worker"])],
        "unserved": [name for name in waiting
                     if pools and not any(serves(pool, name) for pool in pools)],
        "interrupted": list(left_runs(store)),
        "scheduled": len(scheduled),
        "troubles": troubles_of(store, queues, workers, lost),
    }, workers


def status_json(store: Store) -> Row:
    """Return what `status --json` shows."""
    status, workers = status_of(store)
    for name in ("oldest_waiting", "next"):
        status[name] = status[name] and with_times(status[name])
    status["pauses"] = [with_times(pause) for pause in status["pauses"]]
    status["running"] = [worker["job"] for worker in workers if worker["job"]]
    return status


def metrics_of(store: Store) -> list[str]:
    """Return the lines of `status --format prometheus`."""
    status, totals = status_of(store)[0], store.totals()
    return prometheus_lines(
        status, totals, store.history("queue", 0, 0), store.schedule_counts(), now_millis())


@subcommand("status", "show jobs by state, workers, and what comes next", """
queuectl status
queuectl status --watch
queuectl status --format prometheus > queuectl.prom.new && mv queuectl.prom.new queuectl.prom
""",
    JSON,
    option("--format", "print metrics for the textfile collector of node_exporter",
           choices=("prometheus",)),
    WATCH)
def cmd_status(args: Any) -> None:
    if args.json + args.watch + bool(args.format) > 1:
        raise UsageError("give one of --json, --watch and --format")
    store = args.store

    def frame() -> list[str]:
        store.changed()  # raises if the database is gone
        if args.format:
            return metrics_of(store)
        status, workers = status_of(store)
        now, width = now_millis(), terminal_width()
        if args.watch:
            died = list(store.last_to_die(Selection(), 3))
            return watch_lines(status, workers, died, now, width)
        return status_lines(status, workers, now, width)

    if args.watch:
        show_again(frame)
    if args.json:
        emit_json(status_json(store))
        return
    for line in frame():
        advise(line)


def names_of_states(text: str) -> list[str]:
    """Return the states that `--state` names."""
    names = text.lower().split(",")
    for name in names:
        if name not in STATES:
            raise UsageError("there is no state %s%s; states are %s"
                             % (quoted(name), nearest(name, STATES), ", ".join(STATES)))
    return names


def names_of_queues(text: str) -> list[str]:
    """Return the queues that `--queue` names."""
    return [check_name("--queue", name) for name in text.split(",")]


def time_named(text: str, now: int = 0) -> int:
    """Return the time of `--since` or `--before`: in ISO 8601, or as an age such as 2h."""
    now = now or now_millis()
    if re.match(r"\d{4}-|now", text):
        return parse_time(text, now, "the time")
    if re.fullmatch(_NUMBER, text):
        raise UsageError("%s needs a unit, such as %sd or %sh" % (text, text, text))
    return now - to_millis(checked("delay", text, "how long ago"))


def done_since(store: Store, by: str, since: int | None) -> list[Row]:
    """Return what was done by hour, day or queue since a time (milliseconds, or None)."""
    now, step = now_millis(), MINUTE
    if since is None:
        since = now - DAY if by == "hour" else HOUR
    if since < now - 2 * DAY:  # the history is kept by hour
        step = HOUR
    return store.history(by, max(MINUTE, since - since % step), now)


@subcommand("stats", "show how many runs ended, how long they took and waited", """
queuectl stats
queuectl stats --by queue --since 7d
""",
    option("--since TIME",
           "from this time on, or 2h for the last two hours (default: 1d by hour, else all)",
           type=time_named),
    option("--by", "show a line for each hour, day or queue (default: hour)", choices=("hour",
           "day", "queue"), default="hour"),
    JSON)
def cmd_stats(args: Any) -> None:
    done = done_since(args.store, args.by, args.since)
    if args.json:
        emit_list(map(with_times, done))
    else:
        emit_table((args.by.upper(), *STATS_HEAD), stats_rows(done), "Nothing was done.")
        totals = [sum(counts) for counts in list(zip(*args.store.schedule_counts()))[1:]]
        if totals:
            emit("Times of all schedules: %d made, %d skipped, %d missed." % tuple(totals))


# The options that select jobs, the same for all commands that take ids.
STATE = option("--state STATE[,STATE]", "select jobs in these states",
               action="append", default=[], type=names_of_states)
QUEUE = option("--queue QUEUE[,QUEUE]", "select jobs of these queues",
               action="append", default=[], type=names_of_queues)
OTHER_TERMS = (
    option("--grep TEXT", "select jobs with this text in the command or id"),
    option("--error TEXT", "select jobs with this text in the last error"),
    option("--since TIME",
           "select jobs that ended (or last changed) after TIME, or 2h for two hours ago",
           type=time_named),
    option("--before --older-than TIME", "select jobs that ended (or last changed) before TIME",
           type=time_named),
)
TERMS = (STATE, QUEUE, *OTHER_TERMS)


def selection_of(args: Any, usual: Names = ()) -> Selection:
    """Return the selection of a command's options; `usual` states if none are named."""
    states = [name for names in args.state for name in names]
    queues = [name for names in getattr(args, "queue", None) or [] for name in names]
    return Selection(tuple(states or usual), tuple(queues),
                     args.grep or None, args.error or None, args.since, args.before)


def check_choice(args: Any) -> None:
    """Raise UsageError unless a command was given ids or a selection, and not both."""
    selected = args.all or selection_of(args) != Selection()
    if bool(args.ids) == selected:
        raise UsageError("name jobs by their ids, or select them by --state, --queue, --grep, "
                         "--error, --since or --before; --all takes all")


def _list(args: Any, selection: Selection, head: Sequence[str],
          row: Callable[[Row, int], Sequence[str]], last_to_die: bool = False) -> None:
    """Show jobs: all as a stream of JSON, or the newest as a table."""
    store = args.store
    if args.all and args.limit:
        raise UsageError("--all and --limit contradict each other")
    jobs: Iterable[Row]
    limit = args.limit or 50
    if args.all or (args.json and not args.limit):
        limit = NEVER
    if last_to_die:
        jobs = store.last_to_die(selection, limit)
    elif limit == NEVER:
        jobs = store.jobs(selection)
    else:
        jobs = store.newest(selection, limit)
    if args.json:
        emit_list(map(job_json, jobs))
        return
    now = now_millis()
    rows = [row(job, now) for job in jobs]
    emit_table(head, rows, "No such jobs.")
    if len(rows) == limit:
        left = store.total(selection) - limit
        sys.stdout.flush()
        if left:
            complain("the first %d of %d; --all shows all, --limit N more" % (limit, limit + left)
                     if last_to_die else
                     "the newest %d of %d; --all shows all, --limit N more" % (limit, limit + left))


@subcommand("list", "show jobs, the newest last", """
queuectl list
queuectl list --state failed,dead --since 2h
queuectl list --grep backup --queue night
queuectl list --json --state pending --state failed | queuectl --db /other/queue.db enqueue --file -
""",
    *TERMS, LIMIT, ALL, JSON)
def cmd_list(args: Any) -> None:
    _list(args, selection_of(args), JOB_HEAD, job_row)


def causes_of(store: Store, jobs: Iterable[Row]) -> list[Row]:
    """Return why jobs died, one row for each cause, the most frequent first.

    Causes that differ only in numbers, paths and names are one. A job that died because another did
    counts with the cause of that one.
    """
    find = lru_cache(1000)(partial(store.value, ERROR_OF_DEAD))
    causes: dict[str, Row] = {}
    for job in jobs:
        error, along = job["last_error"] or "no reason", ENDED_ALONG[DEAD]
        first = error.endswith(along) and find(error[:-len(along)])
        key = cause_of(first or error)
        cause = causes.setdefault(key, {
            "cause": key, "count": 0, "after": 0, "since": NEVER,
            "example": None, "ids": [], "along": [], "looked": []})
        cause["since"] = min(cause["since"], job["finished_at"])
        cause["looked"].append((job["seq"], job["updated_at"]))
        if first:
            cause["after"] += 1
            cause["along"].append(job["id"])
        else:
            cause["count"] += 1
            cause["example"] = error
            cause["ids"].append(job["id"])
    return sorted(causes.values(), key=lambda cause: -cause["count"])


def retry_words(store: Store, selection: Selection, cause: Row) -> str:
    """Return the command that retries exactly the dead jobs of a cause."""
    terms = ["dlq", "retry"]
    if not cause["count"]:  # the jobs that died by themselves are outside the selection
        return join_words([*terms, *cause["along"]])
    if selection.queues:
        terms += ["--queue", ",".join(selection.queues)]
    if selection.grep is not None:
        terms += ["--grep", selection.grep]
    for name, moment in (("--since", selection.since), ("--before", selection.before)):
        if moment is not None:
            terms += [name, show_time(moment)]
    parts = [part for part in cause["cause"].split("…") if len(part) > 3]
    for part in sorted(parts, key=len, reverse=True):
        same = selection._replace(error=part)
        if store.total(same) == cause["count"]:
            return join_words([*terms, "--error", part])
    return "dlq retry %s" % " ".join(cause["ids"])


def causes_json(store: Store, selection: Selection, jobs: Iterable[Row]) -> list[Row]:
    """Return the causes of dead jobs, each with the command that retries its jobs."""
    return [{
        "cause": cause["cause"], "count": cause["count"], "after": cause["after"],
        "since": show_time(cause["since"]), "example": cause["example"],
        "retry": CALLED[0] + " " + retry_words(store, selection, cause),
    } for cause in causes_of(store, jobs)]


def _list_causes(args: Any, selection: Selection) -> None:
    """Show why jobs are dead, by causes."""
    causes = causes_json(args.store, selection, args.store.jobs(selection))
    if args.json:
        emit_list(causes)
        return
    now = now_millis()
    for cause in causes:
        after = " and %d after it" % cause["after"] if cause["after"] else ""
        emit("%d%s, for %s: %s"
             % (cause["count"], after, span(parse_time(cause["since"], now), now), cause["cause"]))
        emit("    such as: %s" % shorten(cause["example"] or "", 200))
        emit("    `%s`" % cause["retry"])


@subcommand(
    "dlq list", "show the dead letter queue: jobs that failed too often",
    "\nqueuectl dlq list\nqueuectl dlq list --causes\n",
    QUEUE, *OTHER_TERMS, LIMIT, ALL, JSON,
    option("--causes", "show one entry for each cause, with the command that retries its jobs"))
def cmd_dlq_list(args: Any) -> None:
    args.state = [[DEAD]]
    selection = selection_of(args)
    if args.causes:
        _list_causes(args, selection)
        return
    _list(args, selection, DEAD_HEAD, dead_row, True)
    width = terminal_width()
    if width and not args.json:
        advice = as_called("Next: `queuectl dlq list --causes`, `queuectl logs ID`, "
                           "`queuectl dlq retry ID` or --all")
        emit_text(cut(advice, width) + "\n")


def as_recorded(job: Row, output: bytes) -> bytes:
    """Return what a running job has printed without the words of an engine."""
    if not job["word"]:
        return output
    return without_words(
        output, run_name(job["locked_by"], job["seq"], job["runs"], job["word"]))


def live_run(store: Store, job: Row, limit: int = 0) -> Row:
    """Return the current run of a job, with its output so far, at most `limit` bytes a stream."""
    limit, start = limit or output_limit(store.settings(), job["queue"]), job["started_at"]
    stdout, stderr = [as_recorded(job, read_beside(path, b"", head_and_tail, limit))
                      for path in output_paths(store.path, job["locked_by"], job["slot"])]
    seconds = max(0, now_millis() - start) / 1000
    return {"run": job["runs"], "attempt": job["attempts"], "state": PROCESSING,
            "started_at": start, "finished_at": None, "duration_seconds": seconds,
            "exit_code": None, "error": None, "worker": job["locked_by"],
            "stdout": stdout, "stderr": stderr}


def runs_of(store: Store, job: Row, last: int = 0) -> Iterator[Row]:
    """Yield the runs of a job after run `last`, oldest first; the current run comes last."""
    yield from store.runs(job["seq"], last)
    if job["state"] == PROCESSING:
        yield live_run(store, job)


def environment_of(store: Store, job: Row) -> dict[str, str]:
    """Return the variables kept for a job: those of --env-all, and those of --env."""
    kept = json.loads(store.context(job["context"])[3] or "{}")
    kept.update(json.loads(job["env"] or "{}"))
    return kept  # type: ignore[no-any-return]


def _emit_job(store: Store, job: Row) -> None:
    for line in job_lines(job):
        emit(line)
    for run in runs_of(store, job):
        emit(run_title(run))
    if job["runs"]:
        advise("`queuectl logs %s` shows what it printed." % job["id"])
    else:
        advise("It has not run yet; `queuectl why %s` tells why." % job["id"])


@subcommand(
    "show", "show everything about one job", "\nqueuectl show job1\nqueuectl show --json 3fa9\n",
    ID, JSON,
    option("--env", "show only the variables that --env and --env-all have kept"))
def cmd_show(args: Any) -> None:
    store = args.store
    job = store.find(args.id)
    if args.env and args.json:
        emit_json(environment_of(store, job))
    elif args.env:
        for pair in sorted(environment_of(store, job).items()):
            emit("%s=%s" % pair)
    elif args.json:
        runs = [run_json(run, job["id"]) for run in runs_of(store, job)]
        emit_json({**job_json(job), "runs": runs})
    else:
        _emit_job(store, job)


STREAMS = ("stdout", "stderr")


def output_from(fd: int, start: int, limit: int) -> tuple[bytes, int]:
    """Read an output file from `start` on, without the middle if it is long; and its size."""
    size = os.fstat(fd).st_size
    if start == 0:
        return head_and_tail(fd, limit), size
    if size == 0:  # truncated just now; the mark comes with what is printed next, or the record
        return b"", start
    if size < start:
        return EMPTIED + read_between(fd, 0, size), size
    if size - start <= limit:
        return read_between(fd, start, size), size
    resumed = size - limit // 2
    return GAP % (resumed - start) + read_between(fd, resumed, size), size


def rest_of(output: bytes, start: int) -> bytes:
    """Return a recorded output without the first `start` bytes that the run had printed."""
    gap = gap_of(output)
    if start and output.startswith(EMPTIED):
        start += len(EMPTIED)
    if start > len(output):  # the job has truncated its output since, so these are other bytes
        start = 0
    return output[gap:] if 0 <= gap < start else output[start:]


def whole_characters(output: bytes) -> int:
    """Return how many bytes of `output` are whole characters; the rest is still to come."""
    from codecs import utf_8_decode
    return utf_8_decode(output, "replace", False)[1]


def whole_lines(output: bytes) -> int:
    """Return how many bytes of `output` are whole lines; all of it if a line is very long."""
    return output.rfind(b"\n") + 1 or len(output) * (len(output) > 1 << 16)


class OutputReader:
    """Reads what a job prints, run after run, each byte once: from live files, then from records.

    It leaves out runs up to `last`. `whole` tells how much of a live output can be shown now.
    """

    def __init__(self, store: Store, seq: int, last: int = 0,
                 whole: Callable[[bytes], int] = whole_characters) -> None:
        self.store, self.seq, self.last, self.whole = store, seq, last, whole
        self.offsets = [0, 0]  # bytes read of each stream of the current run
        self.words = [0, 0]  # bytes of words of an engine among them, which are not recorded

    def news(self, job: Row) -> Iterator[tuple[Row | None, list[bytes]]]:
        """Yield what was printed since: each ended run with the rest of its streams.

        The current run comes last, as None, with its new output. `job` is the job as it is now.
        """
        for run in self.store.runs(self.seq, self.last):
            yield run, [rest_of(run[name] or b"", offset - words)
                        for name, offset, words in zip(STREAMS, self.offsets, self.words)]
            self.last, self.offsets, self.words = run["run"], [0, 0], [0, 0]
        if job["state"] == PROCESSING and job["runs"] > self.last:
            yield None, self._live(job)

    def _live(self, job: Row) -> list[bytes]:
        """Return what a running job has printed since the last look.

        After the run is recorded, other jobs use its files. So the bytes read count only if the job
        is still in the same run afterwards.
        """
        limit = output_limit(self.store.settings(), job["queue"])
        paths = output_paths(self.store.path, job["locked_by"], job["slot"])
        found = [read_beside(path, (b"", 0), output_from, offset, limit)
                 for path, offset in zip(paths, self.offsets)]
        again = self.store.find_by_seq(self.seq)
        if not again or again["state"] != PROCESSING or again["runs"] != job["runs"]:
            return [b"", b""]
        ready = [output[:self.whole(output)] for output, _ in found]
        self.offsets = [size - len(output) + len(part)
                        for (output, size), part in zip(found, ready)]
        shown = [as_recorded(job, output) for output in ready]
        self.words = [words + len(output) - len(rest)
                      for words, output, rest in zip(self.words, ready, shown)]
        return shown

    def has_all(self, job: Row) -> bool:
        """Tell whether everything was read, and nothing more will come."""
        return job["state"] in ENDED and self.last >= job["runs"]


class Logs:
    """Shows outputs for `logs`: with titles, as lines with tags, or one stream alone.

    `streams` are the streams to show, `tail` how many of their last lines (None: all).
    """

    def __init__(self, streams: Sequence[str], tag: bool, tail: int | None) -> None:
        self.streams, self.tag, self.tail = streams, tag, tail
        self.titles = len(streams) > 1 and not tag
        self.torn = False  # whether the last output ended without a newline

    def show_output(self, job: Row, name: str, output: bytes) -> None:
        """Show the output of one of a job's streams, if the user wants that stream."""
        if not output or name not in self.streams:
            return
        if self.tail is not None:
            output = last_lines(output, self.tail)
        emit_output(output, tag=job["id"] if self.tag else None)
        self.torn = not output.endswith(b"\n")

    def end_line(self) -> None:
        """End an unfinished line."""
        if self.torn:
            emit("")
        self.torn = False

    def show_run(self, job: Row, run: Row) -> None:
        """Show a run whole, its result above its output."""
        if self.titles:
            emit(run_title(run))
        for name in STREAMS:
            if run[name] and self.titles:
                emit(name + ":")
            self.show_output(job, name, run[name])
            if self.tag or self.titles:
                self.end_line()
        if self.titles:
            emit("")

    def show_news(self, job: Row, news: Iterable[tuple[Row | None, Sequence[bytes]]]) -> None:
        """Show what an OutputReader has found, with a run's result below its output."""
        for run, parts in news:
            for name, part in zip(STREAMS, parts):
                self.show_output(job, name, part)
            if run and self.tag:
                self.end_line()
            if run and len(self.streams) > 1:
                self._show_result(job, run)

    def _show_result(self, job: Row, run: Row) -> None:
        self.end_line()
        title = clean(run_title(run))
        if self.tag:
            emit_output(title.encode() + b"\n", tag=job["id"])
        else:
            emit_text(title + "\n\n")


FOLLOW_EVERY = 0.1  # seconds


class Follower:
    """Shows what some jobs print, each with its OutputReader, until all have ended."""

    def __init__(self, store: Store, readers: dict[int, OutputReader], logs: Logs) -> None:
        self.store, self.readers, self.logs = store, readers, logs
        self.code = EXIT_OK

    def follow(self) -> int:
        """Show everything; return the exit code: 1 if a job was deleted meanwhile."""
        running: list[Row] = []
        seen, look_at = -1, 0.0
        while self.readers:
            began, now_seen = monotonic(), self.store.changed()
            if now_seen != seen and began >= look_at:
                running, seen = self._look_at_all(), now_seen
                self.logs.tail = None  # --tail concerns only the output before this command
                look_at = began + 4 * (monotonic() - began)
            else:
                for job in running:
                    self._show(job)
            sys.stdout.flush()
            sleep(FOLLOW_EVERY)
        return self.code

    def _look_at_all(self) -> list[Row]:
        """Show what all jobs have printed since; return the jobs that run now."""
        running, gone = [], set(self.readers)
        for job in self.store.jobs_between(min(gone) - 1, max(gone)):
            if job["seq"] in gone:
                gone.discard(job["seq"])
                self._show(job)
                if job["state"] == PROCESSING:
                    running.append(job)
        for seq in gone:
            del self.readers[seq]
        if gone:
            complain("%s deleted meanwhile" % count_of(len(gone), "job"))
            self.code = EXIT_FAILED
        return running

    def _show(self, job: Row) -> None:
        reader = self.readers[job["seq"]]
        self.logs.show_news(job, reader.news(job))
        if reader.has_all(job):
            del self.readers[job["seq"]]


def _runs_to_show(store: Store, job: Row, args: Any) -> Iterable[Row]:
    """Return the runs to show: all, or the newest (of that attempt, or for one stream)."""
    if args.attempt is not None:
        return [run for run in runs_of(store, job) if run["attempt"] == args.attempt][-1:]
    if args.stdout or args.stderr:
        return runs_of(store, job, job["runs"] - 1)
    return runs_of(store, job)


def _show_head(job: Row) -> None:
    emit("Logs for job %s:" % job["id"])
    emit("")


def _show_average(store: Store, job: Row) -> None:
    count, average = store.run_times(job["seq"])
    if count:
        emit("Average runtime: %.2fs over %s." % (average, count_of(count, "run")))


def _show_logs(args: Any, jobs: Iterable[Row], logs: Logs) -> None:
    """Show the output of these jobs up to now."""
    for job in jobs:
        runs = _runs_to_show(args.store, job, args)
        if args.attempt and args.ids and not runs:
            raise QueueError("%s has no run with attempt %d" % (job["id"], args.attempt))
        if logs.titles:
            _show_head(job)
        for run in runs:
            logs.show_run(job, run)
        if logs.titles:
            _show_average(args.store, job)


def _follow_jobs(store: Store, jobs: Sequence[Row], logs: Logs) -> int:
    """Show the output of these jobs, also what comes until they have ended."""
    whole_part, readers = whole_characters, {}
    if logs.tag:
        whole_part = whole_lines
    for job in jobs:
        newest_only = logs.tail is not None or len(logs.streams) == 1
        last = max(0, job["runs"] - 1) * newest_only
        readers[job["seq"]] = OutputReader(store, job["seq"], last, whole_part)
    if logs.titles:
        _show_head(jobs[0])
    code = Follower(store, readers, logs).follow()
    if logs.titles:
        _show_average(store, jobs[0])
    return code


def find_each(store: Store, names: Iterable[str]) -> list[Row]:
    """Return the jobs with these ids, each once; raise QueueError if one is unknown."""
    return list({job["seq"]: job for job in map(store.find, names)}.values())


def jobs_meant(args: Any) -> list[Row] | Iterator[Row]:
    """Return the jobs that a command names by their ids, each once, or selects."""
    check_choice(args)
    if args.ids:
        return find_each(args.store, args.ids)
    jobs: Iterator[Row] = args.store.jobs(selection_of(args))
    return jobs


@subcommand("logs", "show what jobs have printed", """
queuectl logs job1
queuectl logs --follow --tail 20 job1
queuectl logs --stdout --attempt 2 job1 > result.txt
queuectl logs --stdout --queue run-7 > results.txt
queuectl logs --follow --queue run-7
""",
    option("ids ID", BY_ID, nargs="*"), *TERMS, ALL,
    option("--attempt N",
           "show only the newest run of attempt N", type=whole("--attempt", 10**6)),
    option("--stdout", "print the bytes of the newest run's stdout, and nothing else"),
    option("--stderr", "print the bytes of the newest run's stderr, and nothing else"),
    option("-n --tail N", "show only the last N lines of each output", type=whole("--tail", 10**9)),
    option("--tag", "put the job's id and a tab before each line"),
    option("-f --follow",
           "go on until the jobs have ended; lines of several jobs are tagged"), JSON)
def cmd_logs(args: Any) -> int:
    chosen = [name for name in STREAMS if getattr(args, name)]
    if len(chosen) > 1:
        raise UsageError("give --stdout or --stderr, or neither for both")
    if args.follow and (args.json or args.attempt):
        raise UsageError("--follow goes neither with --json nor with --attempt")
    jobs = jobs_meant(args)
    if args.json:
        emit_list(run_json(run, job["id"]) for job in jobs
                  for run in _runs_to_show(args.store, job, args))
        return EXIT_OK
    if not args.follow:
        _show_logs(args, jobs, Logs(chosen or STREAMS, args.tag, args.tail))
        return EXIT_OK
    followed = list(jobs)
    tag = args.tag or len(followed) != 1
    return _follow_jobs(args.store, followed, Logs(chosen or STREAMS, tag, args.tail))


def _obstacles(store: Store, job: Row, now: int) -> Iterator[str]:
    """Yield what keeps a waiting job from running, even if a worker is free."""
    queue = store.queue(job["queue"])
    name, due = queue["name"], job["due"]
    for other in store.awaited_by(job["seq"]):
        reason = "it runs after %s, which is %s" % (other["id"], other["state"])
        if (other["due"] or 0) > now:
            reason += " (next try in %s)" % span(now, other["due"])
        yield reason
    if due is not None and due > now:
        what = "its next try is due" if job["state"] == FAILED else "it is scheduled"
        yield "%s in %s, at %s; `queuectl edit %s --run-at now` starts it" % (
            what, span(now, due), show_time(due), job["id"])
    if store.all_paused():
        yield "all queues are paused; `queuectl queue resume` resumes them"
    elif queue["paused"]:
        yield ("its queue %s is paused; `queuectl queue resume %s` resumes it"
               % (name, name))
    resting = rest_reason(queue)
    if resting:
        yield "%s; `queuectl doctor --queue %s` says what works" % (resting, name)
    most = queue["concurrency"]
    if most is not None and queue[PROCESSING] >= most:
        running = ", ".join(store.running_in(name, 5))
        yield ("its queue %s is at its limit (concurrency %d), running %s; `queuectl cancel ID` "
               "ends one, `queuectl queue set %s --concurrency N` lets more run"
               % (name, most, running, name))


def _stands_before(store: Store, job: Row, now: int, serving: Sequence[Row]) -> Iterator[str]:
    """Say what a job waits for if nothing else holds it up: its turn, or a worker."""
    first = store.next((job["queue"],))
    if first and first[0] != job["seq"]:
        yield "%s goes before it, by priority or arrival" % first[1]
    busy = [worker for worker in serving if worker["job"]]
    busy.sort(key=lambda worker: worker["job_started_at"])
    text = "%d of %s busy" % (len(busy), count_of(len(serving), "worker"))
    shown = ["%s for %s, since %s" % (worker["job"], span(worker["job_started_at"], now),
                                      show_time(worker["job_started_at"])) for worker in busy[:5]]
    yield ": ".join(filter(None, (text, "; ".join(shown))))


def why_waiting(store: Store, job: Row, now: int) -> tuple[list[str], bool]:
    """Say why a waiting job does not run now, and whether that ends by itself."""
    reasons = list(_obstacles(store, job, now))
    serving = store.serving(job["queue"])
    if not serving:
        asks = ""
        if alive_of(store.pools()):
            asks = " --queue " + job["queue"]
        reasons.append("no worker serves its queue; `queuectl worker start%s` does" % asks)
        return reasons, False
    if all(worker["trouble"] for worker in serving):
        reasons.append("its workers are held up: %s" % clean(serving[0]["trouble"]))
    if not reasons:
        return list(_stands_before(store, job, now, serving)), True
    return reasons, len(reasons) == 1 and (job["due"] or 0) > now


def why_running(store: Store, job: Row, now: int) -> str:
    """Describe a running job, and say what to do next."""
    name, worker = job["id"], job["locked_by"]
    if not store.is_own(worker):
        return ("it ran in the queue that this one was copied from; it is given back when no "
                "process of that queue is left, and `queuectl cancel %s` gives it up" % name)
    trouble = trouble_of(store.path, worker)
    if not is_alive(store.path, worker):
        if job["word"] and trouble:
            return ("%s; any live or new worker goes on asking; if the engine is gone for ever, "
                    "`queuectl queue set %s --runner none` and `queuectl cancel %s` give the run up"
                    % (clean(trouble), job["queue"], name))
        return ("its worker %s has died; the next worker ends what is left of the run: "
                "`queuectl worker start`" % worker)
    if trouble:
        return "its worker is held up: %s" % clean(trouble)
    limit = "without a time-out"
    if job["timeout_seconds"]:
        end = job["started_at"] + job["timeout_seconds"] * 1000
        limit = "at most %s more" % show_duration(max(0, end - now) / 1000)
    return ("it runs now, for %s, %s; `queuectl logs --follow %s` shows its output, "
            "`queuectl cancel %s` ends it" % (span(job["started_at"], now), limit, name, name))


SCHEDULED = "scheduled"  # what `why` says of a schedule; no job has this state


NEVER_COMPLETED = ("was to run after a job that was never completed and is forgotten; "
                   "enqueue it anew")


def why_in_vain(store: Store, job: Row, now: int) -> str:
    """Say why a job is dead or cancelled, and what to do next."""
    name, seq, how = job["id"], job["seq"], "it was cancelled"
    if job["state"] == DEAD:
        how = "it died"
    died = "%s %s ago: %s; " % (how, span(job["updated_at"], now), job["last_error"] or "no reason")
    causes = store.causes_in_vain(seq)
    revived = [other["id"] for other in store.awaited_by(seq) if other["state"] not in IN_VAIN]
    if revived and not causes:
        return died + "%s was retried since; `queuectl retry %s` lets it wait for that" % (
            ", ".join(revived), name)
    if store.waits_for_gone(seq):
        return died + "it " + NEVER_COMPLETED
    if causes:
        return died + "`queuectl retry %s --with-dependents` tries all again" % " ".join(causes)
    if not job["runs"]:
        return died + "`queuectl retry %s` runs it after all" % name
    return died + ("`queuectl logs %s` shows what it printed, `queuectl retry %s` tries it again"
                   % (name, name))


def why_scheduled(store: Store, schedule: Row, now: int) -> str:
    """Return what a schedule waits for, and what to do."""
    name, queue, last = schedule["name"], schedule["queue"], schedule["last"]
    if schedule["paused"]:
        return "it is paused; `queuectl schedule resume %s` starts it again" % name
    if last > now:
        return ("the clock was ahead when it ran last, so it makes no job until %s; `queuectl "
                "schedule resume %s` starts it again from now" % (show_time(last), name))
    if not store.serving(queue):
        return "no worker serves its queue; `queuectl worker start --queue %s` does" % queue
    return "its next time is %s" % show_time(max(now, schedule["due"]))


def reasons_of(store: Store, job: Row) -> tuple[list[str], str | None]:
    """Say why a job is not running now, and when it probably runs (None: unknown)."""
    now, state = now_millis(), job["state"]
    if state == PROCESSING:
        reasons = [why_running(store, job, now)]
    elif state in IN_VAIN:
        reasons = [why_in_vain(store, job, now)]
    elif state == COMPLETED:
        reasons = ["it completed %s ago; `queuectl retry %s` runs it again"
                   % (span(job["finished_at"], now), job["id"])]
    else:
        reasons, passing = why_waiting(store, job, now)
        if passing and (job["due"] or 0) > now:
            return list(map(as_called, reasons)), show_time(job["due"])
    return list(map(as_called, reasons)), None


@subcommand(
    "why", "tell why a job isn't running now, and what to do", "\nqueuectl why job1\n",
    ID, JSON)
def cmd_why(args: Any) -> None:
    store = args.store
    schedules, job = store.schedules(args.id), {"id": args.id, "state": SCHEDULED}
    if not schedules or store.rows(WITH_ID, args.id):
        job = store.find(args.id)
    name, state = job["id"], job["state"]
    if state == SCHEDULED:
        reasons, expected = [as_called(why_scheduled(store, schedules[0], now_millis()))], None
    else:
        reasons, expected = reasons_of(store, job)
    if args.json:
        emit_json({"id": name, "state": state, "reasons": reasons, "expected_at": expected})
        return
    emit("%s is %s:" % (name, state))
    for reason in reasons:
        emit("  " + reason)
    if state == FAILED:
        emit("  its last run: %s (%d of %d attempts used)" % (
            job["last_error"], job["attempts"], max(1, job["max_retries"])))


def tell_if_idle(db: str) -> bool:
    """If no worker lives, tell how to start one; return whether it told."""
    idle = not anyone_alive(db)
    if idle:
        complain("no worker is running; `queuectl worker start` works on the queue")
    return idle


def tell_hold_up(store: Store, seq: int) -> bool:
    """If a job may wait for ever, tell why; return whether it told."""
    if tell_if_idle(store.path):
        return True
    job = store.find_by_seq(seq)
    if job is None or job["state"] not in WAITING or store.awaited_by(seq):
        return False
    reasons, passing = why_waiting(store, job, now_millis())
    if not passing:
        complain("%s waits: %s" % (job["id"], reasons[0]))
    return not passing


def tell_ends(ends: Sequence[tuple[str, str, str | None] | None]) -> int:
    """Tell which awaited jobs are dead or (None) forgotten; return the exit code."""
    gone = ends.count(None)
    if gone:
        complain("%s deleted while waited for" % count_of(gone, "job"))
    for name, state, error in [end for end in ends if end][:5]:
        complain("%s is %s: %s; `queuectl logs %s` shows what it printed"
                 % (name, state, error or "no reason", name))
    return EXIT_FAILED if ends else EXIT_OK


def await_jobs(store: Store, seqs: Iterable[int], patience: float) -> int:
    """Wait until all these jobs have ended; return the exit code of `wait`.

    Raises TimedOut after `patience` seconds. It reads each job as soon as it has ended, for the job
    may be forgotten soon after.
    """
    deadline = monotonic() + patience
    ends: list[Any] = []
    left, told = set(seqs), False
    while True:
        seen, began = store.changed(), monotonic()
        ended = left and left - store.unfinished(min(left), max(left))
        for seq in sorted(ended):
            end = store.end_of(seq)
            if end is None or end[1] in IN_VAIN:
                ends.append(end)
        left -= ended
        if not left:
            break
        pause = max(0.02, 4 * (monotonic() - began))
        while store.changed() == seen and monotonic() < deadline:
            told = told or tell_hold_up(store, min(left))
            sleep(pause)
        if monotonic() >= deadline:
            raise TimedOut("not all jobs have ended after %s; they stay in the queue"
                           % show_duration(patience))
    store.sync()  # its answer must still be true after a power cut
    return tell_ends(ends)


def own_run(db: str) -> tuple[str, int]:
    """Return the worker and seq of the job that calls this command; "", 0 if none does."""
    run = os.environ.get("QUEUECTL_RUN", "")
    worker, _, rest = run.rpartition("-")[0].rpartition("-")
    if rest.isdigit() and is_alive(db, worker):
        return worker, int(rest)
    return "", 0


@subcommand("wait", "wait until jobs have ended; exit 1 if one was not completed", """
queuectl wait job1 job2 && echo 'both are completed'
queuectl wait --queue mail --timeout 1h
""",
    option("ids ID", "the jobs (default: all that are unfinished now, or those selected)",
           nargs="*"), *TERMS, ALL,
    option("--timeout DURATION", "exit with 124 if it takes longer",
           type=time_limit, default=ENDLESS))
def cmd_wait(args: Any) -> int:
    store = args.store
    seqs = {store.find(name)["seq"] for name in args.ids}
    usual: Names = UNFINISHED
    if any(map(is_run_queue, (name for names in args.queue for name in names))):
        usual = STATES  # jobs of a detached run may have died before this command
    if not seqs:
        seqs = set(store.look(selection_of(args, usual))[0])
    seqs.discard(own_run(args.db)[1])  # a job doesn't wait for itself
    return await_jobs(store, seqs, args.timeout)


LEAST_SPACE = 100 * 1024 * 1024  # bytes
LONG_RUN = 86400.0  # seconds
MANY_DEAD = 100  # jobs
LARGE_LOG = 64 * 1024 * 1024  # bytes; without readers a log is much smaller, see _connect


def _findings_of_lost(store: Store) -> Iterator[tuple[str, str]]:
    """Yield the jobs whose worker is dead."""
    for lost in store.lost_jobs():
        name, worker = lost["id"], lost["worker"]
        if not store.is_own(worker):
            yield ("%s ran in the queue that this one was copied from, and may be running there"
                   % name,
                   "it is given back when no process of that queue is left; "
                   "`queuectl cancel %s` gives it up" % name)
            continue
        what = "%s is held by the worker %s, which is dead" % (name, worker)
        if lost["word"]:
            what += "; " + trouble_of(store.path, worker)
        paths = output_paths(store.path, worker, lost["slot"])
        if any(map(system.held, paths)):
            what += "; processes of that run still live, "
            if system.linux and not isdir("/proc/self"):
                what += "but there is no /proc to find them in"
            else:
                what += "perhaps in another container or of another user"
        yield what, ("any live or new worker ends them, if it can, and gives the job back: "
                     "`queuectl worker start`")


def _findings_of_workers(store: Store) -> Iterator[tuple[str, str]]:
    """Yield dead or stopped workers, and jobs that run for very long."""
    now = now_millis()
    workers = store.workers()
    for entry in [*store.pools(), *workers]:
        who = "%s (pid %d)" % (entry["name"], entry["pid"])
        if not store.is_own(entry["name"]):  # of the queue that this one was copied from
            continue
        if not entry["alive"]:
            yield (who + " has died and left its entry behind",
                   "`queuectl worker start` clears it away")
        elif system.is_stopped(entry["pid"]):
            yield who + " is stopped by a signal", "kill -CONT %d" % entry["pid"]
    for worker in alive_of(workers):
        if worker["trouble"]:
            yield ("%s is held up: %s" % (worker["name"], worker["trouble"]),
                   "it goes on by itself when that is over")
        name, age = worker["job"], (now - (worker["job_started_at"] or now)) / 1000
        if age > LONG_RUN:
            yield ("%s has been running for %s" % (name, show_duration(age)),
                   "`queuectl logs %s` shows what it does, `queuectl cancel %s` ends it"
                   % (name, name))


def _findings_of_queues(store: Store) -> Iterator[tuple[str, str]]:
    """Yield a large number of dead jobs, and a log that can't be emptied."""
    dead, log = store.counts()[DEAD], store.path + "-wal"
    if dead >= MANY_DEAD:
        yield "%d jobs are dead" % dead, "`queuectl dlq list --causes` tells why"
    for queue in store.queues():
        resting = rest_reason(queue)
        if resting:
            yield resting, ("it goes on by itself; `queuectl doctor --queue %s` says what works"
                            % queue["name"])
    for schedule in store.schedules():
        if schedule["last"] > now_millis():
            yield ("the schedule %s makes no job until %s: the clock was ahead when it ran last"
                   % (schedule["name"], show_time(schedule["last"])),
                   "`queuectl schedule resume %s` starts it again from now" % schedule["name"])
    if bytes_on_disk([log]) > LARGE_LOG:
        yield ("%s has %d MiB: it can't be emptied while a program reads the database for long"
               % (log, bytes_on_disk([log]) >> 20),
               "`fuser -v %s` names who has it open" % shell_word(store.path))


def findings_of(store: Store) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with a queue, each time with a remedy."""
    folder = dirname(store.path)
    for damage in store.damage():
        yield "the database is damaged: %s" % damage, (
            "`queuectl worker stop`, then `queuectl restore BACKUP`, which keeps what it replaces")
    reason = exists(store.path) and distrust_of(store.path)
    if reason:
        yield ("workers refuse to run: %s" % reason,
               "nobody else may own or write it, or a folder above it")
    kind = system.network_file_system(folder)
    if kind:
        yield ("%s is on a network file system (%s)" % (folder, kind),
               "move the database to a local disk, use --db")
    import shutil
    free = LEAST_SPACE
    if isdir(folder):
        free = shutil.disk_usage(folder).free
    if free < LEAST_SPACE:
        yield ("only %d MiB are free in %s" % (free >> 20, folder),
               "free some space outside the queue; workers that wait for it go on by themselves")
    yield from _findings_of_lost(store)
    yield from _findings_of_workers(store)
    yield from _findings_of_queues(store)


# The jobs of `doctor --queue`, each with its time-out in seconds. The second shows what the ender
# does.
HARMLESS = (("echo queuectl; exit 7", 60.0), ("exec sleep 600", 3.0))


def _run_harmless(args: Any, queue: Row) -> str:
    """Run harmless jobs with the runner of a queue; return the queue in which they were."""
    store = open_trusted(args.db, tell=complain)
    with store.transaction():
        name, pool = store.new_run(), new_pool_name(store)
        store.set_engine(name, queue["runner"], queue["ender"])
        store.add([dict(dict.fromkeys(GIVEN_FIELDS), command=command, cwd="/", queue=name,
                        timeout_seconds=seconds, max_retries=1) for command, seconds in HARMLESS],
                  store.settings(), os.environ.get("PATH", os.defpath), 0o077, now_millis())
    store.close()
    shown = os.dup(1)
    mute(1)  # the lines of the workers
    Pool(args.db, pool, len(HARMLESS), [name], PROBING, len(HARMLESS)).run()
    os.dup2(shown, 1)
    return name


def _forget_harmless(store: Store, name: str, seqs: list[int]) -> None:
    """Forget the jobs of `_run_harmless`; give up those that their engine has not let go."""
    with store.transaction():
        store.set_engine(name, None, None)
        for seq in seqs:
            store.ask_cancel(seq, now_millis())
    recover(store, sleep, complain)
    with store.transaction():
        for seq in seqs:
            store.delete(seq)


def _findings_of_engine(store: Store, jobs: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """Yield what was tried with harmless jobs, and why it failed ("": it works)."""
    first, second = jobs
    why = first["last_error"] or ""
    if first["state"] == PROCESSING:
        why = trouble_of(store.path, first["locked_by"])
    yield "the engine takes a job and says that it has begun", "" if first["runs"] else why
    if first["runs"]:
        output = [run["stdout"] for run in store.runs(first["seq"])]
        came, told = output == [b"queuectl\n"], first["exit_code"] == 7
        yield "the output of a job comes back", "" if came else why or "there was none"
        yield "the exit code of a job comes back", "" if told else why or "there was none"
    ended = "timed out" in (second["last_error"] or "")
    if second["state"] == PROCESSING:
        why = trouble_of(store.path, second["locked_by"])
    yield "the ender ends a job and says that it is gone", "" if ended else why or "it did not"


def try_engine(args: Any) -> int:
    """Say step by step what works in the engine of a queue."""
    queue = args.store.queue(args.queue)
    if not queue["runner"]:
        raise QueueError("the queue %s has no runner; `queuectl queue set %s --runner CMD --ender "
                         "CMD` gives it one" % (args.queue, args.queue))
    if args.store.all_paused():
        raise QueueError("all queues are paused; `queuectl queue resume` resumes them")
    name = _run_harmless(args, queue)
    store = open_trusted(args.db, tell=complain)
    store.hookless = name
    jobs = list(store.jobs(Selection(queues=(name,))))
    findings = list(_findings_of_engine(store, jobs))
    _forget_harmless(store, name, [job["seq"] for job in jobs])
    if args.json:
        emit_json([{"what": what, "works": not why, "why": why} for what, why in findings])
    else:
        for what, why in findings:
            emit("%s: %s" % (what, clean(why) or "yes"))
    return EXIT_FAILED if any(why for _, why in findings) else EXIT_OK


@subcommand(
    "doctor", "check the database and what dead workers left; exit 1 if anything is wrong",
    "\nqueuectl doctor\nqueuectl doctor --queue big\n",
    option("--queue NAME", "run harmless jobs through the runner of this queue, and say what works",
           type=partial(check_name, "--queue")),
    JSON)
def cmd_doctor(args: Any) -> int:
    if args.queue:
        return try_engine(args)
    store = args.store
    findings = list(findings_of(store))
    if args.json:
        emit_json([{"what": what, "mend": as_called(mend)} for what, mend in findings])
    elif not findings:
        jobs = count_of(sum(store.counts().values()), "job")
        workers = count_of(len(alive_of(store.workers())), "worker")
        emit("Nothing is wrong: %s, %s, %s alive." % (store.path, jobs, workers))
    else:
        for what, mend in findings:
            emit(what)
            advise("    " + mend)
    if not args.json:
        for line in pause_lines(store.pauses()):
            advise(line)
        emit("On disk: %s." % show_sizes(sizes_of(store.path)))
    return EXIT_FAILED if findings else EXIT_OK


# Fields of a job that can be given, and changed later.
FIELD_OPTIONS = (
    option("--priority N",
           "run jobs with lower numbers first (default: %d)" % SETTINGS["priority"]),
    option("--run-at TIME", "run it not before TIME: 2026-01-31T10:00:00Z, now+5m"),
    option("--delay DURATION", "run it not before this time from now: 90, 500ms, 1h30m"),
    option("--expires TIME", "cancel it if no run has begun by then"),
    option("--timeout DURATION", "end a run that takes longer (default: no limit)"),
    option("--max-retries N",
           "number of runs before the job is dead (default: %d)" % SETTINGS["max_retries"]),
    option("--backoff-base N",
           "wait N ** attempts seconds for the next run (default: %d)" % SETTINGS["backoff_base"]),
    option("--cwd DIR", "run it in this folder (default: the current one)"),
    option("--shell SHELL",
           "run it by this shell: a name or a path (default: %s)" % SETTINGS["shell"]),
    option("--env NAME[=VALUE]", "set a variable for the job; without a value, to your own",
           action="append"),
    option("--after ID[,ID]", "run it only when these jobs are completed; repeatable",
           action="append"),
    option("--after-any ID[,ID]",
           "run it only when these jobs have ended, however; repeatable", action="append"),
    option("--unique KEY", "refuse it while another unfinished job has this key"),
    option("--retry-after DURATION", "time until the next run after exit code 75 (default: 1m)"),
    option("--dead-on CODE[,CODE]", "make it dead at once after these exit codes; repeatable",
           action="append"),
)


# ─── changing: existing jobs ──────────────────────────────────────────────────────────────────
#
# A command that changes jobs takes ids, and then changes all of these jobs or none; or it takes a
# selection. It reads a selection once. Then it changes each job that is still as it was, a few in
# each transaction. So it never touches a job that came or changed meanwhile, and nobody waits long
# for the mutex.

Change = namedtuple("Change", "done takes usual advice apply refusal")

SELECTED_IDS = option("ids ID", BY_ID, nargs="*")
DRY_RUN = option("--dry-run", "only show which jobs would be changed")
YES = option("--yes", "don't ask before changing more than one job")
CHANGING = (SELECTED_IDS, *TERMS, ALL, DRY_RUN, JSON)


def after_change(store: Store) -> None:
    """End the jobs that changed jobs take along, and ring the workers."""
    store.settle(now_millis())
    ring_all(store.path)


def one_change(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function that changes its first argument, a Store, one transaction.

    After its commit the workers are rung.
    """
    def change(store: Store, *values: Any, **details: Any) -> Any:
        with store.transaction():
            result = function(store, *values, **details)
        after_change(store)
        return result
    return change


set_setting, unset_setting = one_change(Store.set_setting), one_change(Store.unset_setting)
set_concurrency, pause_queue = one_change(Store.set_concurrency), one_change(Store.pause)
set_engine = one_change(Store.set_engine)
add_jobs = one_change(Store.add)


def find_named(store: Store, change: Change, names: Iterable[str]) -> list[Row]:
    """Return the jobs with these ids, each once; QueueError if one can't be changed."""
    jobs = find_each(store, names)
    for job in jobs:
        if job["state"] not in change.takes:
            raise QueueError("%s is %s; %s" % (
                job["id"], job["state"], change.advice.replace("ID", job["id"])))
    return jobs


def choose(args: Any, change: Change) -> Selection:
    """Return the selection of a command, in states that it can take; see check_choice."""
    check_choice(args)
    selection = selection_of(args, change.usual)
    unfit = set(selection.states) - set(change.takes)
    if unfit:
        raise UsageError("%s: not %s jobs" % (change.advice, ", ".join(sorted(unfit))))
    return selection


def confirm(args: Any, done: str, count: int) -> None:
    """Ask before many jobs are changed, if stdin is a terminal."""
    if count < 2 or getattr(args, "yes", True) or not is_terminal(sys.stdin):
        return
    system.say("%s: %d jobs. Go on? [y/N] " % (done, count), 2)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise QueueError("nothing was changed")


@one_change
def change_named(store: Store, change: Change, names: Iterable[str]) -> list[Row]:
    """Change the jobs with these ids, all or none."""
    jobs = find_named(store, change, names)
    left = sorted(jobs, key=lambda job: -job["seq"])
    while left:  # what waits goes before what it waits for
        refused = [job for job in left if not change.apply(job)]
        if len(refused) == len(left):
            raise QueueError(change.refusal(left[0]))
        left = refused
    return jobs


def jobs_now(store: Store, seqs: Iterable[int]) -> Iterator[Row]:
    """Return these jobs as they are now, without forgotten ones."""
    return filter(None, map(store.find_by_seq, seqs))


def change_jobs(args: Any, change: Change, newest_first: bool = False) -> Sequence[int]:
    """Change the jobs that were named or selected; return the seqs of the changed ones."""
    store, selection = args.store, choose(args, change)
    if args.ids:
        use = find_named if args.dry_run else change_named
        return [job["seq"] for job in use(store, change, args.ids)]
    looked = getattr(args, "look", store.look)(selection)
    if args.dry_run:
        return looked[0]  # type: ignore[no-any-return]
    confirm(args, change.done, len(looked[0]))
    done: Sequence[int] = store.change_each(looked, change.apply, newest_first)
    after_change(store)
    return done


def tell_changed(args: Any, change: Change, seqs: Sequence[int],
                 gone: Sequence[Row] = ()) -> None:
    """Tell which jobs were changed, or would be; `gone` are the rows of deleted jobs."""
    store, now = args.store, now_millis()
    jobs = gone or jobs_now(store, seqs)
    if args.json:
        emit_list(map(job_json, jobs))
    elif args.dry_run:
        emit_table(JOB_HEAD, [job_row(job, now) for job in jobs_now(store, seqs[:50])],
                   "No such jobs.")
        complain("%s: would be %s" % (change.done, count_of(len(seqs), "job")))
    elif args.ids:
        for job in jobs:
            emit("%s: %s" % (change.done, job["id"]))
    else:
        emit("%s: %s" % (change.done, count_of(len(seqs), "job")))


# retry

DEPENDENTS = option("--with-dependents", "also retry jobs that ended because they waited for these")


def _refusal_of_retry(store: Store, job: Row) -> str:
    """Return the error for a job that can't start afresh."""
    name = job["id"]
    if store.waits_for_gone(job["seq"]):
        return "%s %s" % (name, NEVER_COMPLETED)
    return "%s can't be retried: another job with its key %s waits or runs" % (name, job["unique"])


def _ended_with(args: Any, change: Change) -> set[int]:
    """Return the jobs that ended with the named ones, by seq.

    Raises QueueError for a job that would wait for one that ended in vain.
    """
    store = args.store
    jobs = {job["seq"]: job for job in find_named(store, change, args.ids)}
    dependents = {seq for first in jobs for seq in store.dependents_in_vain(first)}.difference(jobs)
    if args.with_dependents:
        jobs.update((job["seq"], job) for job in jobs_now(store, dependents))
    for seq, job in jobs.items():
        if store.awaited_in_vain(seq).difference(jobs):
            raise QueueError(
                "%s is to run after jobs that ended in vain; `queuectl retry %s --with-dependents` "
                "does all" % (job["id"], " ".join(store.causes_in_vain(seq))))
    return dependents


def retry_jobs(args: Any, takes: Names, usual: Names,
               advice: str) -> tuple[Change, Sequence[int], list[str]]:
    """Retry the jobs that were named or selected; return their seqs, and what to tell of others."""
    store, notes = args.store, []
    dependents: set[int] = set()

    def apply(job: Row) -> Any:
        seq, now = job["seq"], now_millis()
        if store.waits_for_gone(seq) or (not args.ids and store.awaited_in_vain(seq)):
            return False
        done = store.retry(seq, now)
        if done and args.with_dependents:
            dependents.update(other for other in store.dependents_in_vain(seq)
                              if store.retry(other, now))
        return done

    change = Change("Queued again", takes, usual, advice, apply,
                    partial(_refusal_of_retry, store))
    selection = choose(args, change)
    if args.ids:
        dependents = _ended_with(args, change)
    seqs = change_jobs(args, change)
    if args.with_dependents:
        seqs = [*seqs, *sorted(dependents.difference(seqs))]
    elif dependents:
        notes.append("not retried: %s that ended with it; --with-dependents takes them too"
                     % count_of(len(dependents), "job"))
    # The page retries less than the selection: it says itself how many were left out.
    left = args.all and not (args.dry_run or hasattr(args, "look")) and store.total(selection)
    if left:
        notes.append("not retried: %s: another job with their key waits or runs, or they "
                     "were to run after jobs that ended in vain" % count_of(left, "job"))
    return change, seqs, notes


def _retry(args: Any, takes: Names, usual: Names, advice: str) -> None:
    change, seqs, notes = retry_jobs(args, takes, usual, advice)
    for note in notes:
        complain(note)
    tell_changed(args, change, seqs)


RETRY_ADVICE = ("only a job that has ended can be retried; `queuectl edit ID --run-at now` starts "
                "one that waits for a time")


@subcommand("retry", "run ended jobs again, as if they were new", """
queuectl retry job1 job2
queuectl retry --state dead,cancelled --queue mail --since 2h
""",
    *CHANGING, DEPENDENTS, writes=True)
def cmd_retry(args: Any) -> None:
    _retry(args, ENDED, IN_VAIN, RETRY_ADVICE)


@subcommand("dlq retry", "run dead jobs again, as if they were new", """
queuectl dlq retry job1
queuectl dlq retry --all
queuectl dlq retry --error 'Connection refused' --since 6h
""",
    SELECTED_IDS, QUEUE, *OTHER_TERMS, ALL, DRY_RUN, JSON, DEPENDENTS, writes=True)
def cmd_dlq_retry(args: Any) -> None:
    args.state = []
    _retry(args, (DEAD,), (DEAD,), "it is not in the dead letter queue")


# cancel

def _await_end(store: Store, job: Row, deadline: float) -> str:
    """Return the state of a cancelled job when its run has ended; recover it if need be."""
    while True:
        current = store.find_by_seq(job["seq"])
        if current is None:
            return CANCELLED
        if current["state"] != PROCESSING or current["runs"] != job["runs"]:
            return str(current["state"])
        if not is_alive(store.path, current["locked_by"]):
            recover(store, sleep, complain)
        if monotonic() >= deadline:
            raise QueueError("%s is still being ended; `queuectl show %s` tells when it is done"
                             % (job["id"], job["id"]))
        sleep(0.02)


def cancelling(store: Store) -> Change:
    """Return the change that cancels jobs; running ones are only told to end."""
    def apply(job: Row) -> Any:
        cancel = store.ask_cancel if job["state"] == PROCESSING else store.cancel_waiting
        return cancel(job["seq"], now_millis())

    return Change("Cancelled", UNFINISHED, UNFINISHED, "it has ended already", apply, str)


@subcommand("cancel", "take waiting jobs out of the queue, and end running ones", """
queuectl cancel job1
queuectl cancel --queue night --state pending
""",
    *CHANGING, YES, writes=True)
def cmd_cancel(args: Any) -> None:
    store, change = args.store, cancelling(args.store)
    before, cancelled = store.counts()[CANCELLED], []
    seqs = change_jobs(args, change)
    if args.dry_run:
        tell_changed(args, change, seqs)
        return
    deadline = monotonic() + store.settings()["kill_grace_seconds"] + PATIENCE
    for job in jobs_now(store, seqs):
        state = job["state"]
        if state == PROCESSING:
            state = _await_end(store, job, deadline)
        if state == COMPLETED:
            complain("completed before it could be cancelled: %s" % job["id"])
        else:
            cancelled.append(job["seq"])
        dependents = args.ids and store.dependents_in_vain(job["seq"])
        if dependents:
            complain("cancelled with it: %s that waited for it" % count_of(len(dependents), "job"))
    tell_changed(args, change, cancelled)
    along = store.counts()[CANCELLED] - before - len(seqs)
    if along > 0 and not args.ids:
        complain("cancelled with them: %s that waited for them" % count_of(along, "job"))


# edit

EMPTY = {  # fields that can be removed, each with the value for that
    "timeout": "none", "run_at": "none", "expires": "none", "backoff_base": "none",
    "retry_after": "none", "unique": "none", "shell": "none",
    "after": "", "after_any": "", "dead_on": ""}


def edited_fields(args: Any, now: int) -> Row:
    """Return the fields that `edit` changes; `none` or an empty list removes a value."""
    given = given_options(args)
    if not given:
        raise UsageError("say what to change; see `queuectl edit --help`")
    kept = {name: value for name, value in given.items() if EMPTY.get(name) != value}
    draft = draft_of({"command": "true", **kept}, now, system.longest_command)
    if "cwd" in kept:
        draft["cwd"] = _folder(kept["cwd"])
    if "shell" in kept:
        draft["shell"] = find_shell(kept["shell"])
    if WINDOWS:
        refuse_lines(draft["command"], draft["shell"])
    names = {ALIASES.get(name, name) for name in given}
    if not names:
        raise UsageError("say what to change; see `queuectl edit --help`")
    return {name: draft[name] for name in names}


@subcommand(
    "edit", "change waiting or ended jobs, or the time-out of running ones", """
queuectl edit job1 --priority 1
queuectl edit job1 --run-at now --timeout none      `none` or '' removes a value
queuectl edit job1 --command 'make -j4' && queuectl retry job1
queuectl edit --state pending --grep report --delay 2h
""",
    SELECTED_IDS, STATE, *OTHER_TERMS, ALL,
    option("--command COMMAND", "the shell command"),
    option("--queue NAME", "the queue it waits in"), *FIELD_OPTIONS,
    DRY_RUN, YES, JSON, writes=True)
def cmd_edit(args: Any) -> None:
    store, now = args.store, now_millis()
    fields = edited_fields(args, now)

    def apply(job: Row) -> bool:
        store.edit(job, fields, now)
        return True

    args.queue = None  # here --queue is a new value, and selects nothing
    takes: Names = (*WAITING, *ENDED)
    if set(fields) == {"timeout_seconds"}:
        takes = STATES
    change = Change("Changed", takes, WAITING, "of a running job only the time-out can be changed; "
                    "`queuectl cancel` ends one", apply, str)
    tell_changed(args, change, change_jobs(args, change))


# delete

def deleting(store: Store, gone: list[Row] | None = None) -> Change:
    """Return the change that forgets jobs, and adds their rows to `gone`."""
    def apply(job: Row) -> Any:
        done = store.delete(job["seq"])
        if done and gone is not None:
            gone.append(job)
        return done

    def refusal(job: Row) -> str:
        waiting = [other["id"] for other in store.waiters_of(job["seq"])[:5]]
        return "%s can't be deleted, for others are to run after it: %s" % (
            job["id"], ", ".join(waiting))

    return Change("Deleted", WAITING + ENDED, ENDED, "`queuectl cancel` ends a running job",
                  apply, refusal)


@subcommand("delete", "forget jobs and their runs", """
queuectl delete job1
queuectl delete --state cancelled --grep test
""",
    *CHANGING, YES, writes=True)
def cmd_delete(args: Any) -> None:
    gone: list[Row] = []
    change = deleting(args.store, gone if args.json or args.ids else None)
    seqs = change_jobs(args, change, True)  # what waits goes before what it waits for
    tell_changed(args, change, seqs, gone[::-1])


def _purge(args: Any, usual: Names) -> None:
    store, spared = args.store, args.store.queues_of_runs()

    def apply(job: Row) -> Any:
        return job["queue"] not in spared and store.delete(job["seq"])

    args.ids, args.all = (), True
    change = Change("Deleted", STATES, usual, "", apply, str)
    seqs = change_jobs(args, change, True)
    if args.dry_run or not args.json:
        tell_changed(args, change, seqs)
    else:
        emit_json({"deleted": len(seqs)})
    if not args.dry_run:
        try:
            store.shrink()
        except QueueError as error:
            complain("the disk space is not given back yet: %s" % error)


@subcommand("purge", "forget completed jobs, or those in other states, and their runs", """
queuectl purge --older-than 7d
queuectl purge --state dead,completed --queue mail
""",
    *TERMS, DRY_RUN, JSON, writes=True)
def cmd_purge(args: Any) -> None:
    if any(PROCESSING in names for names in args.state):
        raise UsageError("running jobs can't be deleted; `queuectl cancel` ends them")
    _purge(args, (COMPLETED,))


@subcommand(
    "dlq purge", "forget dead jobs and their runs",
    "\nqueuectl dlq purge\nqueuectl dlq purge --older-than 7d\n",
    QUEUE, *OTHER_TERMS, DRY_RUN, JSON, writes=True)
def cmd_dlq_purge(args: Any) -> None:
    args.state = []
    _purge(args, (DEAD,))


# ─── working: new jobs, and the workers that run them ─────────────────────────────────────────

def finish_draft(draft: Row, folders: dict[str | None, str]) -> Row:
    """Check a draft's folder and shell, and make their paths absolute.

    `folders` are the folders checked before.
    """
    given = draft["cwd"]
    if given not in folders:
        folders[given] = _folder(given)
    if draft["shell"] is not None:
        draft["shell"] = find_shell(draft["shell"])
    if WINDOWS:
        refuse_lines(draft["command"], draft["shell"])
    most = system.longest_command
    for name, value in (draft["env"] or {}).items():
        if len(name.encode()) + len(value.encode()) + 2 > most:
            raise UsageError("env %s is too long: this system takes %d bytes" % (name, most))
    draft["cwd"] = folders[given]
    return draft


def open_jobs(path: str, pipe: int = 0) -> BinaryIO:
    """Open a file with jobs, or a `pipe` (a descriptor) whose jobs are added as they come.

    Anything else that is no plain file is read to its end first: it may be slow, and no other
    process can write while its jobs are added.
    """
    if pipe:
        return open(pipe, "rb")
    try:
        if path != "-" and isfile(path):
            return open(path, "rb")
        if path == "-" and sys.stdin is None:
            raise OSError("stdin is closed")
        import shutil
        import tempfile
        spool: Any = tempfile.SpooledTemporaryFile(1 << 23)  # noqa: SIM115
        with (sys.stdin.buffer if path == "-" else open(path, "rb")) as source:
            shutil.copyfileobj(source, spool)
        spool.seek(0)
        return spool  # type: ignore[no-any-return]
    except OSError as error:
        raise UsageError("%s can't be read: %s" % (path, error.strerror or error)) from None


LONGEST_LINE = 1 << 21  # bytes


def _script() -> str:
    """Read the command for `-` from stdin: a whole script."""
    with open_jobs("-") as stream:
        try:
            script = stream.read(LONGEST_LINE).decode("utf-8-sig")
            return check_text("the command", script.rstrip("\n"))
        except UnicodeDecodeError:
            raise UsageError("the command on stdin is not valid UTF-8") from None


def read_job(given: str | Row, now: int, options: Row) -> Row:
    """Return the draft of a job, given by its fields, JSON or a command; `options` win."""
    fields: Any = given
    if isinstance(given, str):
        text = given.lstrip("\ufeff")
        fields = {"command": text}
        if text.lstrip().startswith("{"):
            fields = read_object(text)
    name = "command" if "command" in fields else "cmd"
    if isinstance(fields.get(name), list):
        fields[name] = join_words(check_list("command", fields[name], check_text))
    if "env" in options:
        env = check_env(fields.get("env") or {})
        options = {**options, "env": {**env, **options["env"]}}
    if options:
        taken = {ALIASES.get(name, name) for name in options}
        fields = {name: value for name, value in fields.items()
                  if ALIASES.get(name, name) not in taken}
        fields.update(options)
    return draft_of(fields, now, system.longest_command)


def without_quotes(words: list[str]) -> list[str]:
    """Take the single quotes from JSON: cmd.exe leaves them, but takes the double ones out."""
    text = " ".join(words)
    if text.startswith("'{") and text.endswith("}'"):
        return [text[1:-1]]
    return words


def draft_of_words(words: list[str], literal: bool, now: int,
                   options: Row) -> Row:
    """Return the draft of one word (a shell command or JSON) or several (a command's words).

    Several words may also be JSON that a shell divided. Words behind `--` are `literal`: no JSON.
    """
    if WINDOWS and not literal:
        words = without_quotes(words)
    torn = words[0].startswith("{") and words[-1].endswith("}")
    if words == ["-"] and not literal:
        words, literal = [_script()], True
    if not literal and (torn or len(words) == 1):
        return read_job(" ".join(words), now, options)
    command = words[0]
    if len(words) > 1:
        command = join_words(words)
    return draft_of({"command": command, **options}, now, system.longest_command)


def numbered_lines(stream: BinaryIO) -> Lines:
    """Yield the lines of a file with jobs, with their numbers."""
    for number, raw in enumerate(iter(lambda: stream.readline(LONGEST_LINE), b""), 1):
        if len(raw) == LONGEST_LINE:
            if b"[" not in raw[:9]:  # a whole array may stand on one line
                raise UsageError("line %d is longer than any command can be" % number)
            raw += stream.readline()
        try:
            yield number, raw.decode().rstrip("\r\n")
        except UnicodeDecodeError:
            raise UsageError("line %d is not valid UTF-8" % number) from None


# How JSON begins; `{ a; b; }`, `[ -f x ] && y` and `[[ -f x ]]` are commands.
_JSON = r"""\{(?![ \t]+[^\s"'}])|\[\s*(?:[{\]]|$)|\[+["\d{]"""


def _opened_in(text: str) -> int:
    """Return how many more objects begin than end in a piece of JSON."""
    bare = re.sub(r'"(?:[^"\\\n]|\\.)*"', "", text)
    return bare.count("{") - bare.count("}")


def _json_jobs(number: int, text: str, lines: Lines) -> Given:
    """Yield the objects of JSON that begins with `text`, up to a line after which none is open.

    An object that can't be read is yielded as text: read_object mends it, or says what is wrong.
    """
    from itertools import chain
    rest, at, depth, opened = "", 0, 0, 0  # the number of open arrays, and of open objects
    for last, line in chain([(number, text)], lines):
        rest += line + "\n"
        if opened:  # read only when no object is open: at each } it would take quadratic time
            opened += _opened_in(line)
        if opened > 0 or ("}" not in line and "]" not in line):
            continue
        while True:
            gap = re.compile(r"[\s,[\]]*").match(rest, at)[0]  # type: ignore[index]
            at += len(gap)
            depth += gap.count("[") - gap.count("]")
            if at == len(rest):
                break
            if rest[at] != "{":
                raise UsageError("line %d: JSON in a list must be objects, with commas between"
                                 % (last + 1 - rest.count("\n", at)))
            try:
                given, end = _STRICT.raw_decode(rest, at)
            except (ValueError, RecursionError, UsageError) as error:
                end = len(rest.rstrip())
                if getattr(error, "pos", 0) >= end:  # it goes on in the next line
                    opened = _opened_in(rest[at:])
                    break
                given = rest[at:end]
            yield last - rest.count("\n", at, end), given
            at = end
        rest, at = rest[at:], 0
        if not rest and depth <= 0:
            return
    raise UsageError("line %d: the JSON that begins here has no end" % number)


def _whole_command(number: int, text: str, lines: Lines) -> str:
    """Return the command that begins with `text`, with the lines joined by backslashes."""
    mark, last = unfinished(text), number
    while mark == "\\" and last - number < 9999:  # the whole command is judged again with each line
        last, line = next(lines, (number, ""))
        text = text[:-1] + line
        mark = unfinished(text)
    if mark:
        raise UsageError(
            "line %d: this command goes on in the next line, as its %s is open; write it on one "
            "line, or give `queuectl enqueue -` the whole as one job" % (number, mark))
    return text


def read_jobs(lines: Lines) -> Given:
    """Yield each job in numbered lines, with its line number, as soon as it is complete.

    A job is a command on a line, or JSON in any layout: objects one after the other, or an array.
    Empty lines and comments are skipped.
    """
    finished = re.compile(_FINISHED).fullmatch
    for number, line in lines:
        text = line.lstrip(" \t\ufeff")
        if finished(text):
            yield number, {"command": text}
            continue
        if re.match(_JSON, text):
            if text[-1] == "}" and not text.rfind("{"):
                yield number, text  # the usual line, which is a whole command
            else:
                yield from _json_jobs(number, text, lines)
            continue
        if number == 1 and text.startswith("#!"):
            raise UsageError("line 1: this is a script, not a list of jobs; "
                             "`queuectl enqueue %s FILE` makes one job of it"
                             % re.sub(r"#!\s*(\S*/)?(env\s+(-S\s+)?)?", "", text))
        if not WINDOWS:
            text = _whole_command(number, text, lines)
        if text and text[0] != "#":
            yield number, {"command": text}


def drafts_of(lines: Iterable[Any],
              read: Callable[..., Row]) -> Iterator[Row]:
    """Yield the drafts that `read` makes of numbered lines; an error names the line."""
    folders: dict[str | None, str] = {}
    background = []
    for number, line in lines:
        try:
            draft = finish_draft(read(line), folders)
        except UsageError as error:
            raise UsageError(at_line(number, str(error))) from None
        draft["line"] = number
        if draft["command"].endswith(("&", "& ")):
            background.append(number)
        yield draft
    if background:
        complain(at_line(background[0], "a command that ends in & completes at once, while its "
                         "work goes on unseen; leave the & out: workers run jobs side by side"))


def inputs_of(stream: BinaryIO, separator: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the inputs for --each with their numbers.

    Empty lines are skipped, but with -0 an empty input counts.
    """
    # Takes what has come by a pipe, without waiting for more.
    read = getattr(stream, "read1", stream.read)
    rest, number = b"", 0
    for data in iter(lambda: read(1 << 16), b""):
        *parts, rest = (rest + data).split(separator)
        if len(rest) > LONGEST_LINE:
            raise UsageError("input %d is longer than any command can be" % (number + 1))
        for part in parts:
            number += 1
            if separator == b"\n" and part.endswith(b"\r"):
                part = part[:-1]
            if part or separator == b"\0":
                yield number, part
    if rest:
        yield number + 1, rest


def columns_of(text: str, separator: str | None) -> list[str]:
    """Return the columns of an input; the separator is a character or a regular expression."""
    if separator is None:
        return [text]
    try:
        return re.split(separator if len(separator) > 1 else re.escape(separator), text)
    except re.error as error:
        raise UsageError("--colsep: %s" % error) from None


def quote_input(word: str) -> str:
    """Quote a word of an input for the shell that will run it."""
    if WINDOWS:
        return join_words([word])
    if any("\udc80" <= c <= "\udcff" for c in word):
        return shell_word(word)
    return in_quotes(word)


def check_cmd_template(template: str, place: re.Pattern[str]) -> None:
    """Check a template for cmd.exe: there a quote or a caret before an input changes its quoting."""
    for match in place.finditer(template):
        before = template[:match.start()]
        if before.count('"') % 2 or before.endswith("^"):
            raise UsageError("write %s outside of quotes and not behind ^: it is quoted by itself"
                             % match.group())


def check_each(args: Any) -> re.Pattern[str]:
    """Return the checked template of --each; raises UsageError as check_template does."""
    place = PLACE if args.colsep is None else COLUMN_PLACE
    check = check_cmd_template if WINDOWS else check_template
    check(args.each, place)
    return place


def each_source(args: Any, options: Row, now: int) -> Iterator[Row]:
    """Yield a draft for each input of --each: arguments, or lines of stdin or a file."""
    from itertools import count
    numbers, place = count(1), check_each(args)

    def each(given: Any) -> Row:
        if isinstance(given, bytes):
            given = given.decode("utf-8", "surrogateescape")
        columns = columns_of(given, args.colsep)
        command = fill(args.each, columns, next(numbers), quote_input, place)
        draft = draft_of({"command": command, **options}, now, system.longest_command)
        if args.tag:
            draft["input"] = given
        return draft

    if args.words:
        yield from drafts_of(enumerate(args.words, 1), each)
        return
    with open_jobs(args.file or "-", args.pipe) as stream:
        yield from drafts_of(inputs_of(stream, b"\0" if args.null else b"\n"), each)


def line_reader(options: Row, now: int) -> Callable[[Any], Row]:
    """Return a function that makes a draft of a line; `options` win."""
    return partial(read_job, now=now, options=options)


def job_source(args: Any, now: int) -> Iterator[Row]:
    """Return the drafts for `enqueue`: from one argument, several words, or a file."""
    options = given_options(args)
    if args.each is not None:
        yield from each_source(args, options, now)
    elif args.file is None:
        read = partial(draft_of_words, literal=args.literal, now=now, options=options)
        yield from drafts_of([(0, args.words)], read)
    else:
        with open_jobs(args.file, args.pipe) as stream:
            lines = read_jobs(numbered_lines(stream))
            yield from drafts_of(lines, line_reader(options, now))


def begun(drafts: Iterator[Row], whole: bool) -> Iterable[Row]:
    """Return drafts with all of them (`whole`), or at least the first, made already.

    So a bad single job is refused before the database is opened, and slow input is read before the
    transaction, in which no other process can write.
    """
    from itertools import chain, islice
    if whole:
        return list(drafts)
    return chain(list(islice(drafts, 1)), drafts)


def manner_of(args: Any, now: int) -> Row:
    """Return how Store.add must add the jobs of a command.

    The jobs take PATH and umask, and with --env-all every variable, from this process.
    """
    umask = os.umask(0o077)
    os.umask(umask)
    environ = ""
    if args.env_all:
        environ = json.dumps({
            as_utf8(name): as_utf8(value) for name, value in sorted(os.environ.items())
            if name not in JOB_VARIABLES})
    path = check_text("PATH", as_utf8(os.environ.get("PATH", os.defpath)))
    return {"path": path, "umask": umask, "environ": environ, "now": now,
            "skip_existing": args.if_exists == "skip"}


def tell_due(job: Row) -> None:
    """Tell when a job with a time will run, or why a job never will."""
    now, due = now_millis(), job["due"]
    if due and due > now:
        local = time.strftime("%Y-%m-%d %H:%M", time.localtime(due / 1000))
        complain("%s will run in %s, at %s (%s in local time)"
                 % (job["id"], span(now, due), show_time(due), local))
    if job["state"] == DEAD:
        complain("%s is dead already: %s" % (job["id"], job["last_error"]))


def tell_enqueued(args: Any, store: Store, first: int, last: int,
                  existing: Sequence[int], many: bool) -> None:
    """Tell of the jobs behind seq `first` up to `last`, and of those that existed."""
    jobs = store.jobs_between(first, last)
    if args.json and not many:
        job = store.find_by_seq([*existing, last][0])
        emit_json(job and job_json(job))
    elif args.json:
        emit_list(map(job_json, jobs))
    elif args.quiet:
        for job in [*map(store.find_by_seq, existing), *jobs]:
            emit(job["id"] if job else "")
    elif many:
        emit("Enqueued: %s" % count_of(last - first, "job"))
    elif first == last:
        emit("Exists already: nothing changed")
    else:
        for job in jobs:
            emit("Enqueued: %s" % job["id"])
            tell_due(job)
    if is_terminal(sys.stderr):
        tell_if_idle(args.db)


FILE = option("--file PATH", "add a job for each line, a command or JSON, all or none; - is stdin")
EACH = (
    option("--each COMMAND",
           "run COMMAND for each input (a line of stdin); {} is the input, quoted; "
           "{.} {/} {//} {/.} {#} as in GNU parallel"),
    option("-0 --null", "end inputs with NUL, not with a newline"),
    option("--colsep SEP", "divide inputs at this regular expression, into {1} {2} …"),
)
JOB_OPTIONS = (
    option("--id ID", "set the id (default: a random one)"),
    option("--env-all", "keep all your variables, as they are now, for the job"),
    option("--if-exists",
           "what to do if the id or key exists (default: fail)", choices=("fail",
           "skip"), default="fail"),
    *FIELD_OPTIONS,
)


def check_enqueue(args: Any) -> bool:
    """Tell if there may be many jobs; raise UsageError if it is not clear what to enqueue."""
    in_file, by_each, why = args.file is not None, args.each is not None, ""
    many = in_file or by_each
    doubled = (in_file and args.words) or (many and args.id)
    lacking = not (many or args.words) or (args.null and not by_each)
    if args.id and args.file:
        why = " (an id belongs into the lines of the file)"
    if doubled or lacking:
        raise UsageError("give either a command or --file PATH%s; "
                         "see `queuectl enqueue --help`" % why)
    return many


@subcommand("enqueue", "add a job, or a file of jobs", """
queuectl enqueue 'tar czf backup.tgz photos && mv backup.tgz /mnt'
queuectl enqueue '{"id":"report","command":"./report.sh","max_retries":5}'
queuectl enqueue --priority 1 --timeout 1h convert in.png out.jpg
queuectl enqueue --delay 10m 'curl -fsS https://example.org/ping'
queuectl enqueue --after fetch,unpack --id build make
queuectl enqueue --unique sync --if-exists skip 'rsync -a /data backup:'
queuectl enqueue -- '{ echo a; echo b; }'
find . -name '*.log' -print0 | queuectl enqueue -0 --each 'gzip -9 {}'
""",
    option("words COMMAND", "a shell command, JSON, or a program and its arguments", nargs="*"),
    FILE, *EACH,
    option("--queue NAME", "put it into this queue (default: default)"), *JOB_OPTIONS,
    option("--wait", "wait until it has ended; exit with 1 if it was not completed"),
    option("--wait-timeout DURATION",
           "exit with 124 if that takes longer",
           type=partial(checked, "delay", called="--wait-timeout")),
    option("-q --quiet", "print only the ids"), JSON, writes=True)
def cmd_enqueue(args: Any) -> int:
    many = check_enqueue(args)
    now = now_millis()
    drafts = begun(job_source(args, now), bool(args.words))
    manner, store = manner_of(args, now), args.store
    settings = store.settings()
    if many:
        store.expect_bulk()
    first, last, existing = add_jobs(store, drafts, settings, **manner)
    try:
        tell_enqueued(args, store, first, last, existing, many)
        sys.stdout.flush()
    except OSError:
        complain("%s enqueued all the same" % ("the jobs are" if many else "the job is"))
        raise
    if not args.wait and args.wait_timeout is None:
        return EXIT_OK
    patience = ENDLESS if args.wait_timeout is None else args.wait_timeout
    return await_jobs(store, [*range(first + 1, last + 1), *existing], patience)




def _open_log(path: str) -> int:
    """Open the log of a detached pool for writing."""
    try:
        return open_private(path, os.O_WRONLY | os.O_APPEND)
    except OSError as error:
        raise QueueError("the log %s can't be written: %s" % (path, error.strerror)) from None


def own_file() -> str:
    """Return the file of this program; raise QueueError if it came by a pipe."""
    script: str = abspath(globals().get("__file__", ""))
    if not isfile(script):
        raise QueueError("queuectl can't start itself again from %s; save it as a file" % script)
    return script


def own_command() -> list[str]:
    """Return the command that starts this program: the launcher of `install`, or a script."""
    script = own_file()
    launcher = abspath(sys.argv[0])
    if os.path.basename(launcher) == "queuectl" and isfile(launcher):
        script = launcher  # the launcher has the program compiled
    return [sys.executable, script]


# Runs the compiled script, which is its last constant, as the module queuectl, with the words
# behind its own path. It imports nothing from the script's folder, nor (if installed) from
# site-packages.
RUN_COMPILED = """\
import sys
if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
    del sys.path[0]
import os
file, *sys.argv = sys.argv
os.close(int(os.path.basename(file)))
code = sys._getframe().f_code.co_consts[-1]
sys.modules["queuectl"] = module = type(sys)("queuectl")
module.__file__ = code.co_filename
exec(code, module.__dict__)
module.exit_at_once(module.main())
"""


def compiled_script() -> bytes:
    """Return this script as a .pyc file; b"" if this is no script.

    The outermost frame has its compiled code, unless a debugger or profiler runs it.
    """
    import marshal
    from importlib.util import MAGIC_NUMBER
    frame = sys._getframe()
    while frame.f_back:
        frame = frame.f_back
    if frame.f_code.co_filename != globals().get("__file__"):
        return b""
    code = compile(RUN_COMPILED, "<string>", "exec")
    code = code.replace(co_consts=(*code.co_consts, frame.f_code))
    return MAGIC_NUMBER + bytes(12) + marshal.dumps(code)


def go_on_as(program: bytes) -> None:
    """Replace this process by a Python that runs a .pyc file; returns if that fails."""
    import subprocess
    try:
        fd = os.memfd_create("queuectl", 0)  # type: ignore[attr-defined,unused-ignore]
        path = "/proc/self/fd/%d" % fd
        with open(fd, "wb"):
            with open(path, "wb") as file:
                file.write(program)
            flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
            os.execv(sys.executable, [sys.executable, "-S", *flags, path, *sys.argv])
    # No such function, no memory, or no path of Python.
    except (AttributeError, OSError, ValueError):
        pass


def start_compiled() -> None:
    """If this is a script, go on in this process as a program that is compiled already.

    Python keeps a script's syntax tree in memory while it runs, which is more than a whole pool
    needs. If this fails, the pool goes on as a script.
    """
    program = compiled_script()
    if program and sys.implementation.name == "cpython":
        go_on_as(program)


def start_words(db: str, count: int, queues: Names) -> list[str]:
    """Return the command line that starts `count` workers in the foreground."""
    words = [*own_command(), "--db", db, "worker", "start", "--count", str(count)]
    for name in queues:
        words += ["--queue", name]
    return words


START_TIME = 30.0  # seconds that a detached pool has to start


def _await_pool(process: Any, store: Store, name: str, count: int,
                log: str) -> None:
    """Wait until a detached pool's workers run, or it has drained or stopped already."""
    deadline = monotonic() + START_TIME
    while sum(worker["pool"] == name for worker in alive_of(store.workers())) < count:
        if process.poll() is not None:
            if process.returncode == EXIT_OK:
                return
            raise QueueError("the workers did not start; the end of %s says why" % log)
        if monotonic() > deadline:
            raise QueueError("the workers are not running after %d s; see %s" % (START_TIME, log))
        sleep(0.01)


def _start_detached(store: Store, name: str, count: int, words: Sequence[str],
                    drain: str) -> int:
    """Start a pool in a session of its own; return its process id when its workers run."""
    import subprocess
    folder, log = dirname(store.path), log_path(store.path)
    fd = _open_log(log)
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=fd, stderr=fd, cwd=folder,
        env=dict(os.environ, QUEUECTL_POOL=name, QUEUECTL_DRAIN=drain),
        start_new_session=not WINDOWS,
        # CREATE_NO_WINDOW, CREATE_NEW_PROCESS_GROUP
        creationflags=0x8000200 if WINDOWS else 0)
    os.close(fd)
    _await_pool(process, store, name, count, log)
    complain("%s in the background, log in %s; `queuectl worker stop` ends them"
             % (count_of(count, "worker"), log))
    return process.pid


COUNT = option("-j --count --workers N",
               "number of worker processes, or N%% of the cores (default: 1)",
               type=workers_wanted, default=1)
SERVED = option("--queue NAME",
                "serve this queue only; repeatable",
                type=partial(check_name, "--queue"), action="append", default=[])


@subcommand("worker start", "start workers that run jobs, in the foreground", """
queuectl worker start --count 4           until Ctrl-C; a second Ctrl-C ends the running jobs
queuectl worker start --count 4 --drain   until nothing is left to do
queuectl worker start --detach            in the background, log beside the database
""",
    COUNT, SERVED,
    option("--drain", "exit when nothing is left to do, with 1 if a job died"),
    option("--detach", "run in the background, and print the process id"),
    option("--max-jobs N", "exit after N runs", type=whole("--max-jobs", 10**9)))
def cmd_worker_start(args: Any) -> int:
    system.check_room(args.count)
    if not args.detach and not args.drain:  # a drain ends soon
        start_compiled()
    store = open_trusted(args.db, tell=complain)
    name, log = os.environ.pop("QUEUECTL_POOL", ""), ""
    if name:
        log = log_path(args.db)
        renew_log(log)
    name = name or new_pool_name(store)
    drain = os.environ.pop("QUEUECTL_DRAIN", args.drain)
    if args.detach:
        words = start_words(args.db, args.count, args.queue)
        if args.drain:
            words.append("--drain")
        if args.max_jobs:
            words += ["--max-jobs", str(args.max_jobs)]
        emit(str(_start_detached(store, name, args.count, words, DUE * args.drain)))
        return EXIT_OK
    store.close()
    workers = count_of(args.count, "worker")
    system.say("Starting %s, pool %s, pid %d, database %s\n"
               % (workers, name, os.getpid(), clean(args.db)))
    pool = Pool(args.db, name, args.count, args.queue,
                drain=drain, max_jobs=args.max_jobs, log=log)
    return pool.run()


# ─── run: work on jobs now ────────────────────────────────────────────────────────────────────
#
# A `run` has three kinds of processes. The command itself adds the jobs to a queue of their own and
# becomes the supervisor of a pool that serves this queue. The reporter, a process beside the pool,
# shows the jobs' outputs and the progress: so a slow reader, or a stopped terminal, holds up nobody
# else. It also adds jobs that come by a pipe. The workers end when the queue is drained; if others
# may add jobs to it, or more come by a pipe, they end with the reporter.

# The jobs of a run: those of a queue behind seq `before` up to `last`; `counts` of their states
# when the run began, and the time of its `start`.
Batch = namedtuple("Batch", "queue before last counts start")
# The progress of a run: how many jobs it has in all and in some states, and whether it is paused.
Progress = namedtuple("Progress", "total left completed dead cancelled failed processing paused")


def are_commands(args: Any) -> bool:
    """Tell whether each word given to `run` is a command, rather than all together."""
    first = args.words[0]
    if args.literal or first.startswith("{"):
        return False
    return args.commands or re.search(r"[\s|&;<>()]", first) is not None


def tell_reading(args: Any) -> None:
    """Tell how several words were read: as one command, or as several."""
    if are_commands(args):
        complain("each of these %d words is a command; put -- before them if they are one command"
                 % len(args.words))
    elif not args.literal:
        complain("these words are one command; with --commands each of them is one")


def run_source(args: Any, start: int) -> Iterator[Row]:
    """Yield the drafts for `run`: from several commands, or as `enqueue` takes them.

    With --delay each starts that long after the one before, the first one at `start`.
    """
    drafts = job_source(args, start)
    if len(args.words) > 1 and args.each is None and are_commands(args):
        drafts = drafts_of(enumerate(args.words, 1), line_reader(given_options(args), start))
    for number, draft in enumerate(drafts):
        if number and args.pace:
            draft["run_at"] = Delayed(start + to_millis(number * args.pace))
        yield draft


RATE_SPAN = 60.0  # seconds


class Rate:
    """Measures how fast a number grows, over the last minute."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, int]] = []

    def __call__(self, number: int) -> float | None:
        """Return its growth per second up to now; None while that is not known."""
        now = monotonic()
        self.seen.append((now, number))
        while len(self.seen) > 1 and self.seen[1][0] < now - RATE_SPAN:
            del self.seen[0]
        then, before = self.seen[0]
        if now - then < 0.2:
            return None
        return max(0, number - before) / (now - then)


class ProgressLine:
    """The progress of a run on stderr: a line redrawn on a terminal, elsewhere a line at times."""

    def __init__(self, quiet: bool) -> None:
        self.quiet, self.began, self.rate = quiet, monotonic(), Rate()
        self.last_end = 0, 0.0
        escapes = os.environ.get("TERM") != "dumb"
        self.terminal = not quiet and is_terminal(sys.stderr) and escapes
        self.every = 0.3 if self.terminal else 10.0  # seconds
        self.next = self.began + self.every

    def show_if_due(self, name: str, part: Progress) -> None:
        """Show the progress of the run `name`, if it is time."""
        if self.quiet or monotonic() < self.next:
            return
        self.next = monotonic() + self.every
        ended = part.completed + part.dead + part.cancelled
        text = progress_text(name, part, self.rate(ended), self._time_left(ended, part.left))
        if self.terminal:
            width = os.get_terminal_size(2).columns or 80
            system.say(CLEAR_LINE + fit(text, width - 1).rstrip(), 2)
        else:
            system.say("queuectl: %s\n" % text, 2)

    def clear(self) -> None:
        """Remove the line, before other output."""
        if self.terminal:
            system.say(CLEAR_LINE, 2)

    def _time_left(self, ended: int, left: int) -> float | None:
        """Return the seconds left at the pace up to the last end of a job.

        None while too few jobs have ended.
        """
        now = monotonic() - self.began
        if ended != self.last_end[0]:
            self.last_end = ended, now
        if ended <= 2:
            return None
        taken = self.last_end[1]
        return max(0.0, taken / ended * left - (now - taken))


class Outputs:
    """Shows the outputs of a run's jobs when they have ended, in their order or as they end.

    On a terminal the first unfinished job is shown live.
    """

    def __init__(self, args: Any, batch: Batch, line: ProgressLine) -> None:
        self.store, self.queue, self.start, self.line = args.store, batch.queue, batch.start, line
        self.tag, self.unordered, self.live = args.tag, args.unordered, is_terminal(sys.stdout)
        self.low = batch.before  # all jobs up to this seq were shown,
        self.shown: set[int] = set()  # and these
        self.reader: OutputReader | None = None  # reads the job that is shown live
        self.last: Any = None  # the stream written to last
        self.code = EXIT_OK

    def show(self, last: int, final: bool) -> None:
        """Show new output of the jobs up to seq `last`; `final`: this is the last look."""
        if self.unordered or final:
            self._show_ended(last)
        else:
            self._show_in_order(last)
        flush_streams()

    def _show_in_order(self, last: int) -> None:
        for job in self.store.jobs_between(self.low, last, 100):
            if job["queue"] == self.queue:
                if job["state"] not in ENDED:
                    self._show_live(job)
                    return
                self._show_end(job)
            self.low = job["seq"]

    def _show_ended(self, last: int) -> None:
        for seq in self.store.ended_between(self.queue, self.low, last):
            job = None if seq in self.shown else self.store.find_by_seq(seq)
            if job:
                self._show_end(job)
                self.shown.add(seq)
        while self.low + 1 in self.shown:
            self.low += 1
            self.shown.discard(self.low)

    def _show_live(self, job: Row) -> None:
        if self.live:
            self.reader = self._reader_of(job)
            for run, parts in self.reader.news(job):
                self._show_parts(job, run, parts)

    def _show_end(self, job: Row) -> None:
        """Show the output of a job's last run, if that ended after this `run` began."""
        if job["finished_at"] >= self.start:
            for run, parts in self._reader_of(job).news(job):
                self._show_parts(job, run, parts)

    def _reader_of(self, job: Row) -> OutputReader:
        if self.reader and self.reader.seq == job["seq"]:
            return self.reader
        return OutputReader(self.store, job["seq"], max(0, job["runs"] - 1), whole_lines)

    def _show_parts(self, job: Row, run: Row | None, parts: Sequence[bytes]) -> None:
        for name, part in zip(STREAMS, parts):
            if run and gap_of(run[name] or b"") >= 0:
                complain("the %s of %s is too long to be kept whole; `queuectl logs %s` shows its "
                         "beginning and its end" % (name, job["id"], job["id"]))
                self.code, part = EXIT_FAILED, b""
            if part.startswith(EMPTIED):
                complain("%s has truncated its %s: what it had printed before is lost"
                         % (job["id"], name))
                part = part[len(EMPTIED):]
            if part:
                self._write(job, getattr(sys, name), part)

    def _write(self, job: Row, stream: Any, part: bytes) -> None:
        if stream is None and sys.stdout is not None:
            return  # stderr is closed
        self.line.clear()
        tag = None
        if self.tag:
            tag = json.loads(job["policy"] or "{}").get("input", job["id"])
        if is_terminal(stream) and not part.endswith(b"\n"):
            part += b"\n"  # the progress may follow
        if stream is not self.last:  # both streams may be one file: then the order must be right
            flush_streams()
        self.last = stream
        emit_output(part, stream, tag)


SHOWN_CAUSES = 5


class Reporter:
    """Works beside the pool of a `run`: shows outputs and progress, and adds jobs from a pipe.

    `orders` is the end of a pipe. When the pool has ended, it sends there whether it was stopped.
    """

    part: Progress | None = None  # the progress at the last look

    def __init__(self, args: Any, batch: Batch, orders: Any) -> None:
        self.args, self.batch, self.orders, self.store = args, batch, orders, args.store
        self.line = ProgressLine(args.quiet)
        self.outputs = Outputs(args, batch, self.line)
        self.total = unfinished_of(batch.counts)
        self.reading = args.pipe  # whether more jobs may come
        self.code, self.seen, self.pause = EXIT_OK, -1, FOLLOW_EVERY

    def work(self) -> int:
        """Report until the pool has ended or has nothing left to do; return the exit code."""
        stopped = None
        if self.reading:
            self._start_reading()
        while stopped is None and not self._is_done():
            if self.orders.poll(self.pause):
                stopped = self.orders.recv()
            self._add_arrived()
            self._look(stopped is not None)
        self.line.clear()
        if self.reading:  # `--resume` can't know the rest of the input
            complain("stopped before the input ended: the rest of the input is not in %s"
                     % self.batch.queue)
            self.code = EXIT_INTERRUPTED
        return max(self.code, self.outputs.code, self.sum_up(bool(stopped)))

    def _is_done(self) -> bool:
        """Tell whether the jobs have ended, if the workers don't drain the queue themselves."""
        if self.args.drain or self.reading or not self.part or self.part.left:
            return False
        return not self.store.hooks_left(self.batch.queue)

    def _look(self, final: bool) -> None:
        """Show what is new, if anything has changed."""
        began, seen = monotonic(), -1
        try:
            seen, part = self.store.changed(), self.part
            news = seen != self.seen or final
            if news:
                part = self._progress()
            if (news or self.outputs.live) and not (self.args.quiet or self.args.json):
                self.outputs.show(self.batch.last, final)
            self.part = part  # asked before the look: if all had ended, it was the last one
            if self.part and not final:
                self.line.show_if_due(self.batch.queue, self.part)
        except Unavailable:  # it can't be read now; the workers tell why
            if final:
                raise
        self.seen = seen
        self.pause = max(FOLLOW_EVERY, 4 * (monotonic() - began))

    def _progress(self) -> Progress:
        batch = self.batch
        now = self.store.states_between(batch.queue, batch.before, batch.last)
        completed, dead, cancelled = [now[state] - batch.counts[state] for state in ENDED]
        return Progress(self.total, unfinished_of(now), completed, dead, cancelled, now[FAILED],
                        now[PROCESSING], self.store.queue(batch.queue)["paused"])

    # Jobs that come by a pipe.

    def _start_reading(self) -> None:
        import queue
        import threading
        self.arrived: Any = queue.Queue(2000)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        """In a thread: read jobs, up to the end or to an error."""
        end = None
        try:
            for draft in run_source(self.args, self.batch.start):
                self.arrived.put(draft)
        except (QueueError, OSError) as error:
            end = error
        self.arrived.put(end)

    def _add_arrived(self) -> None:
        """Add the jobs that have come so far."""
        drafts: list[Draft] = []
        if self.args.fail_fast and self.part and self.part.dead:
            self.reading = False
        while self.reading and len(drafts) < 1000 and not self.arrived.empty():
            draft = self.arrived.get()
            if isinstance(draft, dict):
                drafts.append(draft)
            else:
                self._end_reading(draft)
        try:
            if drafts:
                self._add_all(drafts)
        except QueueError as error:
            self._end_reading(error)

    def _add_all(self, drafts: list[Draft]) -> None:
        """Add these jobs; if one can't be added, add those before it."""
        try:
            self._add(drafts)
        except QueueError:
            for draft in drafts:
                self._add([draft])

    def _add(self, drafts: list[Draft]) -> None:
        manner, name = manner_of(self.args, now_millis()), self.batch.queue
        _, last, existing = add_jobs(
            self.store, [dict(draft, queue=name) for draft in drafts], self.store.settings(),
            **manner)
        self.total += len(drafts) - len(existing)
        self.seen = -1  # `changed` does not report this process's own commits
        self.batch = self.batch._replace(last=last)

    def _end_reading(self, error: Exception | None) -> None:
        self.reading = False
        if error:
            self.line.clear()
            went_on = "; nothing more is read, but the jobs before it run" if self.total else ""
            complain("error: %s%s" % (error, went_on))
            self.code = getattr(error, "code", EXIT_FAILED)

    # The end.

    def sum_up(self, stopped: bool) -> int:
        """Sum up a run, and tell what to do next; return its exit code."""
        part = self._progress()
        unsuccessful = part.completed != part.total
        if self.args.json:
            self._emit_summary(part)
        elif part.total == 0 and self.code == EXIT_OK:
            complain("there is nothing to %s" % ("resume" if self.args.resume else "run"))
        elif unsuccessful or (part.total and not self.args.quiet):
            self._tell_summary(part)
        flush_streams()
        if stopped and part.left:
            return EXIT_INTERRUPTED
        return EXIT_FAILED if unsuccessful else EXIT_OK

    def _dead(self) -> Iterator[Row]:
        """Return the dead jobs of this run, the last to die first."""
        batch = self.batch
        selection = Selection((DEAD,), (batch.queue,), since=batch.start)
        for job in self.store.last_to_die(selection, NEVER):
            if batch.before < job["seq"] <= batch.last:
                yield job

    def _emit_summary(self, part: Progress) -> None:
        from itertools import islice
        died = [{name: job[name] for name in ("id", "command", "attempts", "last_error")}
                for job in islice(self._dead(), 20)]
        emit_json({"queue": self.batch.queue, "jobs": part.total, "completed": part.completed,
                   "dead": part.dead, "cancelled": part.cancelled, "left": part.left,
                   "seconds": round(monotonic() - self.line.began, 3), "died": died})

    def _tell_summary(self, part: Progress) -> None:
        causes: list[Row] = []
        if part.dead:
            causes = causes_of(self.store, self._dead())
        for cause in causes[:SHOWN_CAUSES]:
            cause["job"] = next(map(self.store.find, cause["ids"]), None)
        seconds = monotonic() - self.line.began
        for line in summary_lines(self.batch.queue, part, seconds, causes):
            advise(line, sys.stderr)


def report_main(args: Any, batch: Batch, orders: Any, unneeded: Iterable[int]) -> NoReturn:
    """The main function of the reporter process."""
    for fd in unneeded:
        os.close(fd)
    system.prepare_reporter()
    code = EXIT_FAILED
    try:
        code = Reporter(args, batch, orders).work()
    except EOFError:
        pass  # the supervisor was killed
    except (QueueError, OSError) as error:
        complain("error: %s" % error)
        code = getattr(error, "code", EXIT_FAILED)
    except Exception:
        sys.excepthook(*sys.exc_info())
        code = EXIT_BUG
    close_stores()
    os._exit(code)


def _resumed(store: Store, words: Sequence[str]) -> str:
    """Return the queue that `run --resume` goes on with; "" if no run was interrupted."""
    left = left_runs(store)
    if len(words) > 1 or set(words) - set(left):
        known = ""
        if left:
            known = "; interrupted: " + ", ".join(left)
        raise QueueError("no interrupted run is called %s%s" % (quoted(" ".join(words)), known))
    if len(left) > 1 and not words:
        runs = ["%s (%s left)" % (name, count_of(count, "job"))
                for name, count in left.items()]
        raise QueueError("several runs were interrupted: %s; name one" % ", ".join(runs))
    return next(iter(words or left), "")


def _new_batch(args: Any, store: Store) -> Batch:
    """Add the jobs of a run to its queue, in a transaction, unless they come by a pipe.

    The limit of a run's own queue also bounds other pools, which may take some of the jobs.
    """
    start, before, name = now_millis(), store.last_seq(), args.queue
    if not name:
        name = store.new_run()
        store.set_concurrency(name, args.workers)
        store.set_fail_fast(name, args.fail_fast)
    if not args.pipe:
        manner = manner_of(args, start)
        store.add((dict(draft, queue=name) for draft in args.drafts), store.settings(), **manner)
    last = store.last_seq()
    added = sum(store.states_between(name, before, last).values())
    # A job that was to run after a dead one has ended in vain already; it counts for this run.
    return Batch(name, before, last, {**dict.fromkeys(STATES, 0), PENDING: added}, start)


def _old_batch(args: Any, store: Store) -> Batch:
    """Return what is left of an interrupted run, in the transaction that takes it over."""
    name = _resumed(store, args.words)
    before = last = 0
    if name:
        args.workers = args.workers or store.queue(name)["concurrency"] or 1
        store.set_concurrency(name, args.workers)
        seqs, _ = store.look(Selection(UNFINISHED, (name,)))
        before, last = seqs[0] - 1, seqs[-1]
    return Batch(name, before, last, store.states_between(name, before, last), now_millis())


def _tell_unserved(store: Store, names: Iterable[str]) -> None:
    """Tell if no worker serves a queue with jobs that this run waits for."""
    for job in map(store.find, names):
        if job["state"] in UNFINISHED and not store.serving(job["queue"]):
            complain("%s is %s, and no worker serves its queue; `queuectl worker start --queue %s` "
                     "does" % (job["id"], job["state"], job["queue"]))


def _check_run(args: Any) -> None:
    """Raise UsageError for options that contradict each other, and if there is nothing to run."""
    both = args.file is not None and args.words
    changed = args.resume and (args.file or args.each or args.queue or given_options(args))
    by_each = args.each is not None
    if both or changed or ((args.null or args.colsep) and not by_each):
        raise UsageError("give commands, --file, --each (with -0 or --colsep, if need be) or "
                         "--resume; see `queuectl run --help`")
    if ":::" in args.words:
        raise UsageError("put inputs behind the options, or on stdin: "
                         "queuectl run --each 'gzip {}' a.log b.log")
    if args.queue and args.fail_fast:
        raise UsageError("--fail-fast would cancel other jobs of the queue %s; leave out --queue"
                         % args.queue)
    if is_terminal(sys.stdin) and not (args.words or args.file or args.resume):
        raise UsageError("say what to run; see `queuectl run --help`")


def _comes_by_pipe() -> bool:
    """Tell whether jobs come by a pipe that the reporter can read while workers run."""
    if sys.stdin is None or system.start_method != "fork":
        return False
    return not stat.S_ISREG(os.fstat(0).st_mode)


def _prepare_run(args: Any) -> None:
    """Decide where the jobs come from, and read the first."""
    if not args.words and args.file is None and not args.resume:
        args.file = "-"
    args.pace, args.delay = checked("delay", args.delay or 0), None
    if args.file == "-" and _comes_by_pipe() and not (args.queue or args.detach or args.dry_run):
        args.pipe = os.dup(0)  # multiprocessing takes stdin away from the reporter, which reads it
    args.drain = not (args.pipe or args.queue)  # in another queue, others may add jobs
    args.drafts = ()
    if len(args.words) > 1 and args.each is None and not args.resume:
        tell_reading(args)
    if args.pipe:
        if args.each is not None:
            check_each(args)
        # Without this check each job would tell the same error.
        probe = {"command": "true", **given_options(args)}
        finish_draft(draft_of(probe, now_millis(), system.longest_command), {})
    elif not args.resume:
        args.drafts = begun(run_source(args, now_millis()), bool(args.words))


def _begin_run(args: Any, store: Store) -> tuple[Batch, Pool]:
    """Add the jobs, and register the pool that works on them, in one transaction.

    So if two processes resume a run at the same time, the second finds it taken.
    """
    others = {} if args.resume else left_runs(store)
    for name, left in others.items():
        complain("%s was interrupted with %s left; `queuectl run --resume %s` goes on with it"
                 % (name, count_of(left, "job"), name))
    store.expect_bulk()
    with store.transaction():
        pool_name = new_pool_name(store)
        batch = (_old_batch if args.resume else _new_batch)(args, store)
        count = min(args.workers or 1, unfinished_of(batch.counts))
        if args.pipe:
            count = args.workers
        pool = Pool(args.db, pool_name, count, [batch.queue], args.drain)
        if count and not args.detach:
            pool.register(store)
    return batch, pool


def _detach_run(args: Any, store: Store, batch: Batch, pool: Pool) -> int:
    """Leave a run to a pool in the background, and print its name."""
    words = start_words(args.db, pool.count, pool.queues)
    _start_detached(store, pool.name, pool.count, [*words, "--drain"], WHOLE)
    if args.json:
        emit_json({"queue": batch.queue, "jobs": batch.last - batch.before})
    else:
        emit(batch.queue)
        complain("`queuectl wait --queue %s` waits for it, `queuectl logs -f --queue %s` shows it"
                 % (batch.queue, batch.queue))
    return EXIT_OK


def _work_on_run(args: Any, batch: Batch, pool: Pool) -> int:
    """Be the supervisor of a run's pool, with a reporter beside it; return the exit code."""
    pool.start_reporter(report_main, args, batch)
    if args.pipe:
        os.close(args.pipe)
    code = pool.run()
    reported: int = pool.end_reporter()
    if reported == -signal.SIGTERM:
        return EXIT_INTERRUPTED
    if reported < 0 and reported == -getattr(signal, "SIGPIPE", 0):
        raise BrokenPipeError
    if reported < 0:
        complain("error: the process that shows the output was killed; `queuectl list` shows what "
                 "became of the jobs")
        return EXIT_FAILED
    return max(code, reported)


@subcommand("run", "run commands in parallel, show their output in order, and sum up", """
queuectl run 'make docs' 'make test' 'make dist'
queuectl run --each 'gzip -9 {}' a.log b.log
find . -name '*.log' | queuectl run --each 'gzip -9 {}'
find . -name '*.wav' -print0 | queuectl run -0 -j 4 --each 'lame --quiet {} {.}.mp3'
queuectl run --file commands.txt --timeout 10m --max-retries 5 > results.txt
queuectl run --detach --file commands.txt      goes on in the background; prints its name
queuectl run --resume
""",
    option("words COMMAND",
           "a command as for enqueue, or several shell commands, or inputs of --each", nargs="*"),
    FILE, *EACH,
    option("--commands", "take each word for a shell command"),
    option("-j --workers --count N", "run N jobs at once, or N%% of the cores (default: 100%%)",
           type=workers_wanted),
    option("--queue NAME", "run in this queue, with its limits (default: a new queue)",
           type=partial(check_name, "--queue")),
    option("--delay DURATION", "pause between the starts of two jobs"),
    option("--unordered", "show outputs as jobs end, not in the order of the jobs"),
    option("--tag", "put the input of --each (or the id) and a tab before each line"),
    option("--fail-fast", "when a job dies, start no more, and cancel the rest"),
    option("--dry-run", "only print the commands"),
    option("--detach", "run in the background, and print the name of the run"),
    option("--resume", "go on with an interrupted run: run --resume [run-1]"),
    option("-q --quiet", "show no output and no progress; sum up only if not all completed"), JSON,
    *[each for each in JOB_OPTIONS if each[0] != ["--delay"]],
    writes=True)
def cmd_run(args: Any) -> int:
    _check_run(args)
    if not args.resume:
        args.workers = args.workers or os.cpu_count() or 1
    _prepare_run(args)
    if args.dry_run:
        for draft in args.drafts:
            emit(draft["command"])
        return EXIT_OK
    system.check_room(args.workers or 1)
    store = open_trusted(args.db, tell=complain)
    batch, pool = _begin_run(args, store)
    ring_all(args.db)
    if args.after:
        _tell_unserved(store, ",".join(args.after).split(","))
    if args.detach and pool.count:
        return _detach_run(args, store, batch, pool)
    store.close()
    args.drafts = ()
    if not pool.count:
        return Reporter(args, batch, None).sum_up(False)
    return _work_on_run(args, batch, pool)


STOP_PATIENCE = 2.0  # seconds until `worker stop` does without a database that it can't write


def stop_pools(store: Store, now: bool) -> None:
    """Tell every pool to stop after its running jobs, or now; works on an older schema, too."""
    level = 2 if now else 1
    with store.transaction():
        store.ask_stop([pool["name"] for pool in store.pools()], level)
    ring_all(store.path)


def _tell_stop(db: str, pools: Iterable[Row], now: bool) -> bool:
    """Tell every pool without the disk, by bells and signals; return if any was told."""
    rung = ring_all(db, STOP_NOW if now else STOP_SOON)
    told = [system.stop(pool["pid"], life_path(db, pool["name"]), now) for pool in pools]
    return rung > 0 or any(told)


def _await_stop(db: str, pids: dict[str, int], patience: float, now: bool) -> None:
    """Wait until these pools and workers (names, with process ids or 0) have ended.

    `now`: their jobs were told to end, too.
    """
    advice = "`queuectl worker stop --now` ends their jobs"
    if now:
        advice = "`queuectl status` tells what they do"
    deadline = monotonic() + patience
    tell_at = monotonic() + WAIT_TOLD
    while any(is_alive(db, name) for name in pids):
        for name, pid in pids.items():
            system.wake(pid, life_path(db, name))
        if monotonic() >= deadline:
            raise TimedOut("workers still run after %s; they will stop by themselves, %s"
                           % (show_duration(patience), advice))
        if monotonic() >= tell_at:
            complain("waiting for running jobs to end; " + advice)
            tell_at = ENDLESS
        sleep(0.02)


@subcommand("worker stop", "stop all workers of this database, after their running jobs", """
queuectl worker stop                 running jobs finish first
queuectl worker stop --now           end running jobs; they go back into the queue
""",
    option("--now", "end the running jobs, which go back into the queue"),
    option("--timeout DURATION",
           "exit with 124 if it takes longer; workers will still stop",
           type=time_limit, default=ENDLESS))
def cmd_worker_stop(args: Any) -> None:
    if not anyone_alive(args.db):
        if not exists(args.db):
            complain("there is no queue at %s" % args.db)
        emit("No workers are running.")
        return
    names = [name for name in names_beside(args.db, ".life") if is_alive(args.db, name)]
    pids, pools = dict.fromkeys(names, 0), []
    try:
        store = open_store(args.db, as_it_is=True)
        if not WINDOWS:
            store.patience = STOP_PATIENCE
        pools = store.pools()
        pids.update((entry["name"], entry["pid"]) for entry in [*pools, *store.workers()]
                    if entry["name"] in names)
        stop_pools(store, args.now)
    except Unavailable as error:
        if not _tell_stop(args.db, pools, args.now):
            raise
        complain("%s; the workers are told without it" % error)
    worker, _ = own_run(args.db)
    # This worker waits for the job that called this command.
    for name in (worker, _pool_of(worker)):
        pids.pop(name, None)
    _await_stop(args.db, pids, args.timeout, args.now)
    if worker:
        emit("All other workers have stopped; those of this pool will when this job has ended.")
    else:
        emit("All workers have stopped.")


@subcommand(
    "worker list", "show the workers that live, and what they run", "\nqueuectl worker list\n",
    JSON)
def cmd_worker_list(args: Any) -> None:
    workers, now = alive_of(args.store.workers()), now_millis()
    if args.json:
        emit_list(map(with_times, workers))
    else:
        emit_table(WORKER_HEAD, [worker_row(worker, now) for worker in workers],
                   "No workers are running.")


# ─── again tomorrow: schedules ────────────────────────────────────────────────────────────────

LONGEST_SCHEDULE = 100  # characters


def schedule_name(text: str) -> str:
    """Check the name of a schedule: together with a time it is the id of a job."""
    check_name("the schedule's name", text)
    if len(text) > LONGEST_SCHEDULE:
        raise UsageError("the schedule's name must be at most %d characters" % LONGEST_SCHEDULE)
    return text


def cron_text(text: str) -> str:
    """Check the text of --cron; return it with one blank between fields."""
    text = " ".join(text.split())
    cron_of(text)
    return text


def every_millis(text: str) -> int:
    """Return the milliseconds that --every stands for."""
    return to_millis(checked("every", text, "--every"))


SCHEDULE = option("name SCHEDULE", "the schedule's name", type=schedule_name)
HEAD_OF_SCHEDULES = ("NAME", "TIMES", "NEXT", "LAST", "SKIPPED", "COMMAND")
set_schedule, pause_schedule = one_change(Store.set_schedule), one_change(Store.pause_schedule)
run_schedule, delete_schedule = one_change(Store.run_schedule), one_change(Store.delete_schedule)


def go_by_zone_of_workers(store: Store) -> None:
    """Use the time zone of the workers in this command: the user's TZ may be another one."""
    zone = store.zone()
    if zone and zone != zone_here():
        os.environ.pop("TZ", None)
        if zone.startswith("="):
            os.environ["TZ"] = zone[1:]
        read_zone()


def times_ahead(schedule: Row, now: int, count: int) -> list[int]:
    """Return the next `count` times of a schedule; none while it is paused."""
    times: list[int] = []
    after = max(now, schedule["last"])
    while not schedule["paused"] and len(times) < count:
        after = next_time(schedule, after, local_offset)
        times.append(after)
    return times


def at_place(moment: int, schedule: Row) -> str:
    """Return a time as the schedule's wall clock shows it, with its offset from UTC."""
    second = moment // 1000
    local = time.gmtime(second) if schedule["utc"] else time.localtime(second)
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", local)


# The fields of a schedule that `schedule set` sets, and those that are shown as they are kept.
CONTENT = """
    name cron every utc if_running if_missed queue job path umask environ
    """.split()  # noqa: SIM905
SHOWN_OF_SCHEDULES = """
    name cron utc if_running if_missed queue paused created_at made skipped missed skipped_in_row
    """.split()  # noqa: SIM905


def schedule_json(store: Store, schedule: Row, count: int = 1) -> Row:
    """Return a schedule as `--json` shows it, with its next `count` times."""
    times, every = times_ahead(schedule, now_millis(), count), schedule["every"]
    job = json.loads(schedule["job"])
    shown = {name: schedule[name] for name in SHOWN_OF_SCHEDULES}
    shown.update(
        every_seconds=every and every / 1000, utc=bool(shown["utc"]), paused=bool(shown["paused"]),
        last_at=schedule["last"], next_at=next(iter(times), None), command=job["command"],
        next_times=[at_place(each, schedule) for each in times],
        job={name: job[name] for name in GIVEN_FIELDS if job[name] not in (None, [], {})})
    shown["last_job"], shown["last_state"], _ = store.end_of(schedule["newest"]) or [None] * 3
    return with_times(shown)


def schedule_row(shown: Row) -> tuple[str, ...]:
    """Return a line of `schedule list`; `shown` is what schedule_json returns."""
    times = shown["cron"] or "every " + show_duration(shown["every_seconds"])
    return (shown["name"], times + " UTC" * shown["utc"], next(iter(shown["next_times"]), "paused"),
            shown["last_state"] or "", str(shown["skipped_in_row"]), shown["command"])


def tell_schedule(args: Any, done: str) -> None:
    """Print what was done to a schedule, and when it runs next."""
    store, now = args.store, now_millis()
    go_by_zone_of_workers(store)
    schedule = store.schedule(args.name)
    if args.json:
        emit_json(schedule_json(store, schedule))
        return
    emit("%s: %s" % (done, args.name))
    for moment in times_ahead(schedule, now, 1):
        emit("Next: %s (%s), in %s"
             % (show_time(moment), at_place(moment, schedule), span(now, moment)))
    if schedule["paused"]:
        advise("It is paused: `queuectl schedule resume %s` starts it again." % args.name)
    if is_terminal(sys.stderr):
        tell_if_idle(args.db)


def draft_of_schedule(args: Any) -> Row:
    """Return the draft of a schedule's jobs; `expires_at` counts from the time of each job."""
    if not args.words:
        raise UsageError("give a command after the name; see `queuectl schedule set --help`")
    read = partial(draft_of_words, literal=args.literal, now=0, options=given_options(args))
    draft, = drafts_of([(0, args.words)], read)
    times = draft["run_at"], draft["expires_at"]
    if draft["id"] or times[0] is not None or type(times[1]) is int:
        raise UsageError("the schedule gives its jobs their id and time: it takes neither id, "
                         "run_at nor delay, and expires only as a delay, such as +1h")
    for name in ("after", "after_any"):
        draft[name] = [args.store.find(each)["id"] for each in draft[name] or []]
    draft["moved"] = True  # the jobs that these run after may be forgotten one day
    return draft


@subcommand("schedule set", "make or replace a schedule, which adds a job at each of its times", """
queuectl schedule set backup --cron '30 2 * * 1-5' ./backup.sh --full
queuectl schedule set sync --every 15m --if-running queue 'rsync -a /data backup:'
queuectl schedule set report --cron @monthly --utc --if-missed skip --timeout 1h ./report.sh
""",
    SCHEDULE,
    option("words COMMAND", "as for enqueue", nargs="*"),
    option("--cron FIELDS", "minute, hour, day of month, month, day of week, as in crontab; "
           "or @hourly, @daily, @weekly, @monthly, @yearly", type=cron_text),
    option("--every DURATION", "at this interval, counted from now", type=every_millis),
    option("--utc", "its times are UTC, not local time"),
    option("--if-running", "what to do while the job before has not ended: skip this time, or "
           "let one job wait (skip)",
           choices=("skip", "queue"), default="skip"),
    option("--if-missed", "what to do about times when no workers ran: run the last one late, "
           "or skip them (run)",
           choices=("run", "skip"), default="run"),
    option("--queue NAME", "the queue its jobs wait in (default)"),
    option("--expires DURATION", "cancel a job if no run has begun this long after its time",
           type=lambda text: "+" + text.lstrip("+")),
    option("--env-all", "all your variables, as they are now"),
    *(each for each in FIELD_OPTIONS if each[0][0] not in ("--run-at", "--delay", "--expires")),
    JSON, writes=True)
def cmd_schedule_set(args: Any) -> None:
    if (args.cron is None) == (args.every is None):
        raise UsageError("give either --cron '30 2 * * *' or --every 15m")
    now, store = now_millis(), args.store
    args.if_exists = "skip"
    known = {**vars(args), **manner_of(args, now)}
    draft = draft_of_schedule(args)
    known.update(queue=draft["queue"] or "default", job=json.dumps(draft, sort_keys=True))
    go_by_zone_of_workers(store)
    done = set_schedule(store, {name: known[name] for name in CONTENT}, now)
    tell_schedule(args, "Schedule set" if done else "Schedule unchanged")


@subcommand("schedule list", "show all schedules, and when they run next",
            "\nqueuectl schedule list\n", JSON)
def cmd_schedule_list(args: Any) -> None:
    store = args.store
    go_by_zone_of_workers(store)
    shown = (schedule_json(store, schedule) for schedule in store.schedules())
    if args.json:
        emit_list(shown)
    else:
        emit_table(HEAD_OF_SCHEDULES, map(schedule_row, shown), "No schedules.")


@subcommand("schedule show", "show a schedule and its next five times",
            "\nqueuectl schedule show backup\n", SCHEDULE, JSON)
def cmd_schedule_show(args: Any) -> None:
    store = args.store
    go_by_zone_of_workers(store)
    shown = schedule_json(store, store.schedule(args.name), 5)
    if args.json:
        emit_json(shown)
        return
    times = shown.pop("next_times")
    for name, value in (*shown.items(), *(("next", each) for each in times)):
        if not isinstance(value, str):
            value = json.dumps(value)
        if value != "null":
            emit("%-16s %s" % (name, value))


def _pause_schedule(args: Any, paused: bool) -> None:
    pause_schedule(args.store, args.name, paused, now_millis())
    tell_schedule(args, "Paused" if paused else "Resumed")


@subcommand("schedule pause", "stop a schedule from adding jobs",
            "\nqueuectl schedule pause backup\n", SCHEDULE, JSON, writes=True)
def cmd_schedule_pause(args: Any) -> None:
    _pause_schedule(args, True)


@subcommand("schedule resume", "start a paused schedule again, from now",
            "\nqueuectl schedule resume backup\n", SCHEDULE, JSON, writes=True)
def cmd_schedule_resume(args: Any) -> None:
    _pause_schedule(args, False)


@subcommand("schedule run", "add a job of a schedule now, in addition to its times",
            "\nqueuectl schedule run backup\n", SCHEDULE, JSON, writes=True)
def cmd_schedule_run(args: Any) -> None:
    args.quiet = False
    seq = run_schedule(args.store, args.name, now_millis())
    tell_enqueued(args, args.store, seq - 1, seq, [], False)


@subcommand("schedule delete", "delete a schedule; its jobs stay",
            "\nqueuectl schedule delete backup\n", SCHEDULE, JSON, writes=True)
def cmd_schedule_delete(args: Any) -> None:
    schedule = delete_schedule(args.store, args.name)
    if args.json:
        emit_json(schedule_json(args.store, schedule))
    else:
        emit("Deleted: %s" % args.name)


# ─── setting up: settings, queues, copies, the program itself ─────────────────────────────────

KEY = option("key SETTING", "the setting's name, with - or _", type=setting_name)


@subcommand("config list", "show every setting, as `config show`", "\nqueuectl config list\n", JSON)
@subcommand("config show", "show every setting", "\nqueuectl config show\n", JSON)
def cmd_config_show(args: Any) -> None:
    settings = {name: value for name, value in args.store.settings().items() if name in SETTINGS}
    if args.json:
        emit_json(settings)
    else:
        emit_table(("SETTING", "VALUE", "DEFAULT"), [
            (name, show_setting(value), show_setting(SETTINGS[name]))
            for name, value in settings.items()], "")


@subcommand("config get", "show one setting", "\nqueuectl config get max_retries\n", KEY, JSON)
def cmd_config_get(args: Any) -> None:
    value = args.store.settings()[args.key]
    if args.json:
        emit_json(value)
    else:
        emit(show_setting(value))


@subcommand("config set", "change a setting, also for running workers", """
queuectl config set max_retries 5
queuectl config set backoff-base 3
queuectl config set timeout_seconds 10m
""",
    KEY,
    option("value VALUE", "a number, a duration, or a word"), writes=True)
def cmd_config_set(args: Any) -> None:
    value = (find_shell if args.key == "shell" else partial(check_setting, args.key))(args.value)
    set_setting(args.store, args.key, value)
    emit("Config updated: %s = %s" % (args.key, show_setting(value)))


@subcommand(
    "config unset", "put a setting back to its default", "\nqueuectl config unset max_retries\n",
    KEY, writes=True)
def cmd_config_unset(args: Any) -> None:
    unset_setting(args.store, args.key)
    emit("Config updated: %s = %s (the default)" % (args.key, show_setting(SETTINGS[args.key])))




queue_name = partial(check_name, "the queue's name")


def jobs_at_once(text: str) -> int | None:
    """Check the value of `--concurrency`: a number, or none."""
    if text == "none":
        return None
    return whole("--concurrency", 10**6)(text)


@subcommand(
    "queue list", "show the queues, their limits and jobs", "\nqueuectl queue list\n",
    JSON)
def cmd_queue_list(args: Any) -> None:
    queues = args.store.queues()
    if args.json:
        emit_list(map(queue_json, queues))
    else:
        emit_table(QUEUE_HEAD, map(queue_row, queues), "No queues.")


@subcommand("queue set", "limit how many jobs of a queue run at once, or run them elsewhere", """
queuectl queue set gpu --concurrency 1
queuectl queue set gpu --concurrency none
queuectl queue set web1 --runner 'ssh web1 {}' --ender 'ssh web1 ./end-run $QUEUECTL_RUN'
queuectl queue set web1 --runner none
""",
    option("name NAME", "the queue", type=queue_name),
    option("--concurrency N",
           "the limit over all pools, or `none` for no limit", type=jobs_at_once,
           default=0),
    option("--runner CMD", "hand jobs to an engine: {} becomes the job, one quoted word; or `none`"),
    option("--ender CMD", "end $QUEUECTL_RUN there; print nothing when it is gone; or `none`"),
    writes=True)
def cmd_queue_set(args: Any) -> None:
    changes = {}
    if args.runner or args.ender:
        if WINDOWS:
            raise UsageError("runners need a POSIX shell; run the workers in WSL")
        changes["runner"], changes["ender"] = check_engine(args.runner or "", args.ender)
        set_engine(args.store, args.name, **changes)
    if args.concurrency != 0:
        changes["concurrency"] = args.concurrency
        set_concurrency(args.store, args.name, args.concurrency)
    if not changes:
        raise UsageError("give --concurrency, or --runner and --ender")
    emit("Queue updated: %s: %s" % (args.name, ", ".join(
        "%s = %s" % (name, show_setting(value)) for name, value in changes.items())))


def _pause(args: Any, paused: bool) -> None:
    store, name = args.store, args.name
    unknown = name and all(queue["name"] != name for queue in store.queues())
    pause_queue(store, name, paused, now_millis())
    if unknown:
        complain("no job has ever been in the queue %s" % name)
    if not paused and store.all_paused():
        complain("all queues are paused; `queuectl queue resume` without a name resumes them")
    emit("%s: %s" % ("Paused" if paused else "Resumed", name or "all queues"))


@subcommand(
    "queue pause", "start no more jobs of a queue; running jobs go on",
    "\nqueuectl queue pause gpu\nqueuectl queue pause\n",
    option("name NAME", "the queue (default: all queues, future ones too)", nargs="?",
           type=queue_name),
    writes=True)
def cmd_queue_pause(args: Any) -> None:
    _pause(args, True)


@subcommand(
    "queue resume", "start the jobs of a paused queue again",
    "\nqueuectl queue resume gpu\nqueuectl queue resume\n",
    option("name NAME", "the queue (default: lift the pause of all queues)", nargs="?",
           type=queue_name), writes=True)
def cmd_queue_resume(args: Any) -> None:
    _pause(args, False)


def jobs_in(store: Store) -> str:
    """Say how many jobs a store has."""
    return count_of(sum(store.counts().values()), "job")


@subcommand(
    "backup", "copy the database while workers run", "\nqueuectl backup /mnt/queue-backup.db\n",
    option("path PATH", "the new file"))
def cmd_backup(args: Any) -> None:
    path = abspath(args.path)
    odd = exists(path) and not isfile(path)
    if odd or realpath(path) in files_of(args.db):
        raise QueueError("%s can't be a backup; name another file" % path)
    if not exists(args.db):
        raise QueueError("there is no queue at %s" % args.db)
    store = args.store
    if isfile(path) and getsize(path) and not is_queue(path):
        raise QueueError("%s is not a backup of a queue, and was not changed; name another file"
                         % path)
    store.backup(path)
    emit("Backed up: %s in %s" % (jobs_in(store), path))


def _recover_before_restore(db: str) -> list[str]:
    """Give back the lost jobs of a database that is to be replaced; return those that may still run.

    If the database is damaged, nobody can end them any more: then there is only a warning. Raises
    QueueError if others could have written it, and Unavailable if it can't be written now.
    """
    refuse_untrusted(db)
    try:
        store = open_trusted(db, tell=complain)
        try:
            recover(store, sleep, complain)
            left = [row["id"] for row in store.lost_jobs() if store.is_own(row["worker"])]
            if left and store.damage():
                raise QueueError("%s is damaged" % db)
            return left
        finally:
            store.close()
    except Unavailable:
        raise
    except Exception as error:  # what is read from a damaged database may raise any
        complain("what killed workers have left running is not ended: %s" % error)
        return []


def _settle_before_restore(db: str) -> None:
    """End what killed workers have left running: the backup knows nothing of it.

    Otherwise a job would run beside what is left of it. Raises QueueError if there are runs that
    can't be ended from here.
    """
    left = _recover_before_restore(db)
    if left:
        raise QueueError("%s may still be running, and the backup does not know it; `queuectl worker "
                         "start` has it ended, `queuectl why %s` says more"
                         % (" ".join(left[:5]), left[0]))


def _refuse_workers(db: str) -> None:
    if anyone_alive(db):
        raise QueueError("workers still use %s; `queuectl worker stop` first" % db)


@subcommand(
    "restore", "put a backup in the database's place",
    "\nqueuectl worker stop\nqueuectl restore /mnt/queue-backup.db\n",
    option("file FILE", "the backup"))
def cmd_restore(args: Any) -> None:
    _refuse_workers(args.db)
    if exists(args.db) and not isfile(args.db):
        raise QueueError(NOT_A_FILE % args.db)
    if not isfile(args.file):
        raise QueueError("there is no file %s" % args.file)
    if not is_queue(args.file):
        raise QueueError("%s is not a backup of a queue" % args.file)
    make_folder(dirname(args.db))
    if exists(args.db):
        _settle_before_restore(args.db)
        _refuse_workers(args.db)  # that took a while, and a pool may have been started
    kept = put_in_place(abspath(args.file), args.db)
    emit("Restored: %s from %s" % (jobs_in(args.store), args.file))
    if kept:
        complain("what stood in its place is kept as %s" % kept)


def home_folder(instead: str) -> str:
    """Return the user's home folder, which must exist.

    Raises QueueError if it is not known or not there (yet); the error says to name `instead`.
    """
    home = expanduser("~")
    given = os.environ.get("HOME")
    if given == "" or not isabs(home) or not isdir(home):
        raise QueueError("there is no home folder (HOME is %s); name %s"
                         % (json.dumps(given), instead))
    return home


# A shell reads the second and third line as a command, Python reads them as a string. So the path
# of Python may have blanks and any length. -S leaves out site-packages, which would slow the start.
LAUNCHER = """\
#!/bin/sh
'''exec' %s -IS "$0" "$@"
' '''
import os
import sys

prefix = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
sys.path.insert(0, os.path.join(prefix, "lib", "queuectl"))
from queuectl import exit_at_once, main

if __name__ == "__main__":
    exit_at_once(main())
"""
MARK = b'os.path.join(prefix, "lib", "queuectl")'  # stands in every launcher of every version
COMMAND, LIBRARY = "bin/queuectl", "lib/queuectl"


def prefix_folder(text: str) -> Any:
    """Return the Path of --prefix; raise QueueError if it is in a home that isn't there."""
    from pathlib import Path
    if not text:
        raise UsageError("--prefix needs a folder")
    if text.startswith("~"):
        home_folder("a folder with --prefix")
    return Path(abspath(expanduser(text)))


PREFIX = option("--prefix DIR",
                "make DIR/bin/queuectl and DIR/lib/queuectl (default: ~/.local)",
                default="~/.local", type=prefix_folder)


def check_own(prefix: Any) -> None:
    """Raise QueueError if a path is a link, or a file that `install` has not made."""
    for path in (prefix / COMMAND, prefix / LIBRARY):
        if path.is_symlink() or (path.is_file() and MARK not in path.read_bytes()):
            raise QueueError("%s is not what `install` makes; move it away, or name another "
                             "folder with --prefix" % path)


def compiled(program: bytes) -> bytes:
    """Return a .pyc file that Python uses as long as the .py file beside it is this program."""
    import marshal
    from importlib.util import MAGIC_NUMBER, source_hash
    code = marshal.dumps(compile(program, COMMAND, "exec"))
    return MAGIC_NUMBER + b"\3\0\0\0" + source_hash(program) + code


def put_program(prefix: Any) -> None:
    """Install, or upgrade while the old program runs: write all files, then rename them."""
    import tempfile
    program = (prefix / own_file()).read_bytes()
    cache = prefix / LIBRARY / "__pycache__"
    files = {
        cache / ("queuectl.%s.pyc" % sys.implementation.cache_tag): compiled(program),
        prefix / LIBRARY / "queuectl.py": program,
        prefix / COMMAND: os.fsencode(LAUNCHER % join_words([sys.executable]))}
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        new = cache / folder
        for path, data in files.items():
            (new / path.name).write_bytes(data)
        (new / "queuectl").chmod(0o755)
        for path in files:
            (new / path.name).replace(path)


INSTALLED = """\
installed: %s/bin/queuectl
If the shell does not find it, put this into ~/.profile: export PATH=%s/bin:"$PATH"
Completion, for ~/.bashrc (or zsh, fish): eval "$(queuectl completion bash)"
"""


@subcommand(
    "install", "put the command `queuectl` on the path, compiled",
    "\nqueuectl install\nqueuectl install --prefix /usr/local\n",
    PREFIX)
def cmd_install(args: Any) -> None:
    if not re.fullmatch(r"[^\\\udc80-\udcff]+", sys.executable):  # no string in Python can hold it
        raise QueueError("no command can name this Python, %s; install with another"
                         % quoted(sys.executable))
    check_own(args.prefix)
    os.umask(0o022)
    try:
        put_program(args.prefix)
    except OSError as error:
        raise QueueError("can't install in %s: %s; --prefix names another folder"
                         % (args.prefix, error)) from None
    folder = str(args.prefix)
    emit_text(INSTALLED % (clean(folder), clean(join_words([folder]))))


@subcommand(
    "uninstall", "remove what `install` made",
    "\nqueuectl uninstall\nqueuectl uninstall --prefix /usr/local\n",
    PREFIX)
def cmd_uninstall(args: Any) -> None:
    import shutil
    check_own(args.prefix)
    launcher, library = args.prefix / COMMAND, args.prefix / LIBRARY
    found = [path for path in (launcher, library / "queuectl.py") if path.exists()]
    for path in found:
        path.unlink()
    shutil.rmtree(library / "__pycache__", ignore_errors=True)
    try:
        library.rmdir()
    except OSError:  # the folder isn't there, or holds files of others
        pass
    if not found:
        raise QueueError("there is no %s; --prefix names another folder" % launcher)
    emit("removed: %s" % launcher)


def unit_word(text: str) -> str:
    """Quote a word of a command line for systemd (systemd.syntax(7), systemd.service(5))."""
    text = re.sub(r'([\\"])', r"\\\1", text)
    text = re.sub("([%$])", r"\1\1", text)
    for c in set(text):
        if not c.isprintable():
            escaped = ["\\x%02x" % byte for byte in c.encode()]
            text = text.replace(c, "".join(escaped))
    if re.fullmatch(r"[\w@%+=:,./-]+", text, re.ASCII):
        return text
    return '"%s"' % text


UNIT = """\
# queuectl's workers as a service of systemd. To install it:
#   {install}
[Unit]
Description=queuectl workers of {db}
# Without this line an empty queue would be made if the disk is not mounted yet.
RequiresMountsFor={folder}

[Service]
ExecStart={start}
{user}# Running jobs have this long to finish. Then they are killed; the next start runs them again.
KillMode=mixed
# A job that runs out of memory is no reason to stop the others.
OOMPolicy=continue
TimeoutStopSec=10min
Restart=on-failure
RestartSec=5

[Install]
WantedBy={target}
"""


def logon_task(words: list[str]) -> str:
    """Return the command that has Windows start detached workers whenever this user logs on."""
    import subprocess
    task = subprocess.list2cmdline([*words, "--detach"])
    return "schtasks /create /f /tn queuectl /sc onlogon /tr " + cmd_word(task)


@subcommand("service", "print a systemd unit that runs workers; on Windows, a line for schtasks", """
mkdir -p ~/.config/systemd/user
queuectl service --count 4 > ~/.config/systemd/user/queuectl.service
queuectl service --count 4 --system > queuectl.service
""",
    COUNT, SERVED,
    option("--system", "print a unit for the whole system, which root installs"))
def cmd_service(args: Any) -> None:
    if WINDOWS:
        emit_text(logon_task(start_words(args.db, args.count, args.queue)) + "\n")
        return
    install = "systemctl --user enable --now queuectl && loginctl enable-linger"
    user, target = "", "default.target"
    if args.system:
        install = ("sudo cp queuectl.service /etc/systemd/system/ && "
                   "sudo systemctl enable --now queuectl")
        target = "multi-user.target"
        if hasattr(os, "geteuid"):
            user = "User=%d\n" % os.geteuid()
    emit_text(UNIT.format(
        install=install, user=user, target=target,
        db=clean(args.db).replace("%", "%%"),
        folder=unit_word(dirname(args.db)),
        start=" ".join(map(unit_word, start_words(args.db, args.count, args.queue)))))


COMPLETION = {
    "bash": """\
# bash completion of queuectl, for ~/.bashrc: eval "$(queuectl completion bash)"
_queuectl() {
    local found
    COMPREPLY=()
    while IFS= read -r found; do
        COMPREPLY+=("$found")
    done < <(queuectl completion --answer -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
}
complete -o default -F _queuectl queuectl
""",
    "zsh": """\
# zsh completion of queuectl, for ~/.zshrc, below compinit: eval "$(queuectl completion zsh)"
_queuectl() {
    local -a found
    found=("${(@f)$(queuectl completion --answer -- "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    if [[ -n $found ]]; then compadd -- $found; else _files; fi
}
compdef _queuectl queuectl
""",
    "fish": """\
# fish completion of queuectl, for ~/.config/fish/completions/queuectl.fish
function __queuectl_answer
    set -l words (commandline -opc) (commandline -ct)
    set -l found (queuectl completion --answer -- $words[2..-1] 2>/dev/null)
    if set -q found[1]; printf '%s\\n' $found; else; __fish_complete_path (commandline -ct); end
end
complete -c queuectl -f -a '(__queuectl_answer)'
""",
}


def _command_typed(args: Any, words: Iterator[str]) -> tuple[str, str]:
    """Return the command in an unfinished command line, and its last option if it lacks its value.

    Sets `args.db` if the line names a database.
    """
    lengths, name = {"--db": 2}, ""
    for word in words:
        length = length_of(word, lengths)
        if length == 2:
            value = next(words, None)
            if value is None:
                return name, word
            if word == "--db":
                args.db = realpath(expanduser(value))
        elif length == 0 and name not in COMMANDS:
            name = (name + " " + word).strip()
            if name in COMMANDS:
                lengths.update(option_lengths(COMMANDS[name].options))
    return name, ""


def _known_values(args: Any, details: Row) -> Iterable[str]:
    """Return the known values of an option or argument; () if it may be anything."""
    kind = details.get("metavar", "").partition("[,")[0]
    if kind == "ID":
        return [job["id"] for job in args.store.newest(Selection(), 200)]
    if kind == "SCHEDULE":
        return [schedule["name"] for schedule in args.store.schedules()]
    if kind in ("QUEUE", "NAME"):
        return [queue["name"] for queue in args.store.queues()]
    known: dict[str, Iterable[str]] = {
        "STATE": STATES, "SETTING": SETTINGS, "SHELL": COMPLETION}
    return known.get(kind) or details.get("choices") or ()


def completions(args: Any) -> Iterator[str]:
    """Yield the words that the last word of an unfinished command line can become."""
    *before, word = [each for each in args.words if each not in ("=", "help")] or [""]
    name, waiting = _command_typed(args, iter(before))  # bash divides --state=dead into three words
    options: list[Any] = [(["--db"], {}), (["--help"], {})]
    known: Iterable[str] = [entry.name.split()[1] for entry in commands_of(name)] if name else ORDER
    if name in COMMANDS:
        options += COMMANDS[name].options
    if name in COMMANDS or word.startswith("-"):
        known = option_lengths(options)
    for names, details in options:
        argument = not (waiting or word.startswith("-") or names[0].startswith("-"))
        if argument or waiting in names:
            known = _known_values(args, details) or (known if argument else ())
            break
    first, comma, word = word.rpartition(",")
    for each in known:
        if each.startswith(word) and re.fullmatch(r"[\w.%+-]+", each, re.ASCII):
            yield first + comma + each  # other words a shell would expand or divide


@subcommand("completion", "print a completion script for bash, zsh or fish", """
eval "$(queuectl completion bash)"
queuectl completion fish > ~/.config/fish/completions/queuectl.fish
""",
    option("words SHELL", "bash, zsh or fish (default: bash)", nargs="*"),
    option("--answer", "print the words that the last argument can become (used by the scripts)"))
def cmd_completion(args: Any) -> None:
    if args.answer:
        for word in completions(args):
            emit(word)
        return
    shell = " ".join(args.words) or "bash"
    if shell not in COMPLETION:
        raise UsageError("there is completion for bash, zsh and fish, not for %s" % quoted(shell))
    emit_text(COMPLETION[shell])


# ═══ Page ═══ the queue in a browser ══════════════════════════════════════════════════════════
#
# A request passes these steps: it is read whole, within bounds; method, Host, Origin and token are
# checked; a function of ROUTES answers it, with a store that is open for this request only. The
# connection is closed after each answer, so an unread body is never taken for the next request.
#
# Each request has a thread. When too many connections are open, the one that has been reading or
# writing longest is closed: so clients that send or read slowly, or not at all, hold up nobody.
#
# The functions that answer show and change what the commands do. None of them adds a job, changes
# a command or a setting, or prints.

MOST_HEAD, MOST_BODY = 16 << 10, 64 << 10  # bytes of a request
REQUEST_TIME = 10.0  # seconds for a whole request to arrive, and for its answer to be taken
MOST_CONNECTIONS = 64
KEEP_TIME = 0.5  # seconds
# Seconds that a list is searched before the reader must say "search on": an answer takes 0.1 s.
SEARCH_TIME = 0.08
SEARCH_STEP = 10_000  # jobs between two looks at the clock
MOST_LISTED, MOST_CAUSES = 200, 2000  # jobs
MOST_NAMED = 20  # jobs in a command line that is shown
AT_ONCE = 4, 2  # requests that read, and requests that change, which are worked on at once
SHOWN_LENGTH = 500  # characters of a command or an error in a list
SHOWN_OUTPUT = 64 << 10  # bytes

# What the page serves: its database, its token, the names it may be called by; `kept`, replies of
# the last moment by their targets, so that ten open pages cost what one does; and `gates`, two
# semaphores that bound the memory and the processor time that many requests take at once.
Site = namedtuple("Site", "db token hosts read_only kept gates")
# `value` is JSON, text or bytes; `headers` are added to those that every reply has.
Reply = namedtuple("Reply", "value headers status kind", defaults=({}, 200, "application/json"))


# What the body of a request may hold, as its commands' options do: see page_change.
VALUES = {"ids": list, "asked": list, "state": str, "queue": str, "grep": str, "error": str,
          "since": str, "before": str, "cause": str, "all": bool, "dry_run": bool,
          "with_dependents": bool}


class Refusal(Exception):
    """A request that is not met: the status of HTTP, and why."""


def page_arguments(store: Store, values: Row) -> Any:
    """Return the arguments of a command that changes jobs, from a request's values.

    An id must be whole: when a job was deleted since the reader looked, its id may be the beginning
    of another job's. Ages such as 2h count from the moment at which the reader was asked.
    """
    from types import SimpleNamespace
    last, moment = [whole("asked", NEVER)(str(part))
                    for part in [*values.get("asked", ()), NEVER, NEVER][:2]]
    terms: Row = {"ids": [check_name("id", name) for name in values.get("ids", [])],
                  "state": [], "queue": [], "last": last, "moment": moment}
    for name in terms["ids"]:
        if store.find(name)["id"] != name:
            raise QueueError("there is no job %s" % name)
    for name, read in (("state", names_of_states), ("queue", names_of_queues)):
        if values.get(name):
            terms[name] = [read(values[name])]
    for name in ("since", "before"):
        terms[name] = None
        if values.get(name):
            terms[name] = time_named(values[name], min(moment, now_millis()))
    for name in ("all", "dry_run", "with_dependents"):
        terms[name] = values.get(name) is True
    for name in ("grep", "error"):
        terms[name] = check_text(name, values.get(name, "")) or None
    return SimpleNamespace(store=store, **terms)


def brief(job: Row) -> Row:
    """Return a job as in `list --json`, with long texts cut and without variables."""
    shown = job_json(job)
    for name in ("command", "last_error"):
        shown[name] = shown[name] and shorten(shown[name], SHOWN_LENGTH)
    return {**shown, "env": {}}


def page_status(site: Site, store: Store, values: Row) -> Reply:
    lines = list(map(as_called, hold_up_lines(status_of(store)[0])))
    if not exists(store.path):
        lines = ["There is no queue at %s." % store.path]
    return Reply({**status_json(store), "hold_ups": lines, "read_only": site.read_only,
                  "path": store.path, "called": CALLED[0]})


def page_stats(site: Site, store: Store, values: Row) -> Reply:
    by, since = values.get("by", "hour"), values.get("since")
    if by not in ("minute", "hour", "day", "queue"):
        raise UsageError("by must be minute, hour, day or queue, not %s" % quoted(by))
    since = time_named(since) if since else None
    return Reply(list(map(with_times, done_since(store, by, since))))


def search(store: Store, selection: Selection, before: int, count: int,
           least: int = 1) -> tuple[list[Row], int]:
    """Find the newest `count` selected jobs from seq `least` to below `before`, newest last.

    The search stops after SEARCH_TIME. The second value is the seq to go on from; 0: none is left.
    """
    found: list[Row] = []
    deadline = monotonic() + SEARCH_TIME
    # State by state, for each is read by its index: a few dead jobs among a million that wait.
    groups: list[Names] = [(state,) for state in set(selection.states)] or [()]
    while before > least and len(found) < count:
        first = max(least, before - SEARCH_STEP)
        within = [selection._replace(first=first, states=states) for states in groups]
        page = [job for part in within for job in store.newest(part, count, before)]
        page.sort(key=lambda job: job["seq"])
        found = (page + found)[-count:]
        before = found[0]["seq"] if len(found) == count else first
        if monotonic() >= deadline:
            break
    return found, before if before > least else 0


def page_jobs(site: Site, store: Store, values: Row) -> Reply:
    place, last = values.get("place", ""), store.last_seq()
    if values.get("before", "").isdigit():  # a place in the list too; else a time, as in --before
        place = values.pop("before")
    selection = selection_of(page_arguments(store, values))
    limit = whole("limit", MOST_LISTED)(values.get("limit", "50"))
    least = whole("from", NEVER)(values.get("from", "1"))
    before = last + 1
    if place:
        before = min(before, whole("place", NEVER)(place))
    headers = {"X-Last": last}
    if selection == Selection(selection.states, selection.queues):
        headers["X-Total"] = store.total(selection)
        if not headers["X-Total"]:
            before = 0  # no search is needed
    jobs, headers["X-Next"] = search(store, selection, before, limit, least)
    return Reply(list(map(brief, jobs)), headers)


def page_job(site: Site, store: Store, values: Row, name: str) -> Reply:
    job = store.find(name)
    reasons, expected = reasons_of(store, job)
    runs = [run_json(run, job["id"])
            for run in store.runs(job["seq"], max(0, job["runs"] - 100), False)]
    for run in runs:
        del run["stdout"], run["stderr"]
    return Reply({
        **job_json(job), "run": job["runs"], "runs": runs, "why": reasons, "expected_at": expected,
        "awaits": [{"id": other["id"], "state": other["state"]}
                   for other in store.awaited_by(job["seq"])],
        "awaited_by": [other["id"] for other in store.waiters_of(job["seq"])[:100]]})


def page_logs(site: Site, store: Store, values: Row, name: str) -> Reply:
    job = store.find(name)
    check = whole("run", 1 << 24)
    number = check(values.get("run") or str(max(1, job["runs"])))
    run = next(store.runs(job["seq"], number - 1, False), None)
    if job["state"] == PROCESSING and number == job["runs"]:
        run = live_run(store, job, SHOWN_OUTPUT)
    elif run:
        run["stdout"], run["stderr"] = store.last_of_output(job["seq"], number, SHOWN_OUTPUT)
    return Reply([run_json(run, job["id"])] if run else [], {"X-Live": 1})


def dead_causes(store: Store) -> list[Row]:
    """Return the causes of the jobs that died last, each with its newest job last."""
    return causes_of(store, [*store.last_to_die(Selection((DEAD,)), MOST_CAUSES)][::-1])


def page_causes(site: Site, store: Store, values: Row) -> Reply:
    dead = Selection((DEAD,))
    left = max(0, store.count(dead) - MOST_CAUSES)
    causes = dead_causes(store)
    for cause in causes:
        named = cause["ids"] or cause["along"]
        cause["job"], cause["retry"] = named[-1], None
        if len(named) <= MOST_NAMED:
            cause["retry"] = "%s dlq retry %s" % (CALLED[0], " ".join(named))
        elif not left:  # among more jobs the search for words that fit just these takes too long
            cause["retry"] = "%s %s" % (CALLED[0], retry_words(store, dead, cause))
        cause["since"] = show_time(cause["since"])
        for name in ("ids", "along", "looked"):
            del cause[name]
    return Reply(causes, {"X-Left": left})


def page_queues(site: Site, store: Store, values: Row) -> Reply:
    return Reply(list(map(queue_json, store.queues())))


def page_workers(site: Site, store: Store, values: Row) -> Reply:
    return Reply(list(map(with_times, alive_of(store.workers()))))


def page_metrics(site: Site, store: Store, values: Row) -> Reply:
    text = "\n".join(metrics_of(store)) + "\n"
    return Reply(text.encode(), kind="text/plain; version=0.0.4")


def page_look(args: Any, cause_asked: str | None, selection: Selection) -> tuple[Any, Any]:
    """Look at the jobs that the reader was asked about: those unchanged since, and none newer."""
    from array import array
    looked: Any = args.store.look(selection)
    if cause_asked:
        looked = zip(*[pair for cause in dead_causes(args.store) for pair in cause["looked"]
                       if cause["cause"] == cause_asked])
    elif args.last == NEVER:
        return looked  # type: ignore[no-any-return]
    seqs, times = array("q"), array("q")
    for seq, changed in zip(*looked):
        if seq <= args.last and changed <= args.moment:
            seqs.append(seq)
            times.append(changed)
    return seqs, times


def page_change(site: Site, store: Store, values: Row, name: str) -> Reply:
    """Retry, cancel or delete jobs; with `dry_run` count them, for the question to the reader."""
    notes: list[str] = []
    gone: list[Row] = []
    asked = json.dumps([store.last_seq(), now_millis()])
    args = page_arguments(store, values)
    args.all = args.all or bool(values.get("cause"))
    args.look = partial(page_look, args, values.get("cause"))
    if name == "retry":
        _, seqs, notes = retry_jobs(args, ENDED, IN_VAIN, RETRY_ADVICE)
    elif name == "cancel":
        seqs = change_jobs(args, cancelling(store))
    else:
        seqs = change_jobs(args, deleting(store, gone if args.ids else None), True)
    jobs = gone or list(jobs_now(store, seqs[:100]))
    return Reply(list(map(brief, jobs)), {
        "X-Count": len(seqs), "X-Asked": asked, "X-Notes": json.dumps(notes)})


def page_pause(site: Site, store: Store, values: Row, name: str, order: str) -> Reply:
    pause_queue(store, check_name("queue", name), order == "pause", now_millis())
    return Reply([queue for queue in page_queues(site, store, values).value
                  if queue["name"] == name])


ROUTES: Sequence[tuple[str, str, Callable[..., Reply]]] = (
    ("GET", "/api/status", page_status),
    ("GET", "/api/stats", page_stats),
    ("GET", "/api/jobs", page_jobs),
    ("GET", "/api/jobs/([^/]+)", page_job),
    ("GET", "/api/jobs/([^/]+)/logs", page_logs),
    ("GET", "/api/dlq/causes", page_causes),
    ("GET", "/api/queues", page_queues),
    ("GET", "/api/workers", page_workers),
    ("GET", "/metrics", page_metrics),
    ("POST", "/api/(retry|cancel|delete)", page_change),
    ("POST", "/api/queues/([^/]+)/(pause|resume)", page_pause))


def check_caller(site: Site, method: str, headers: Any) -> None:
    """Refuse foreign methods, and requests that another site's script has sent.

    The Host header must be one of the site's names: a name of an attacker that leads here (DNS
    rebinding) is none of them.
    """
    if method not in ("GET", "HEAD", "POST"):
        raise Refusal(405, "the methods here are GET, HEAD and POST")
    host = headers.get("Host", "")
    for name in (host, headers.get("Origin", host)):
        name = re.sub(r"^\w+://|:\d*$", "", name).strip("[]").lower()
        if name not in site.hosts:
            raise Refusal(403, "this page is not called %s; see `queuectl web --help`"
                          % quoted(name))


def check_token(site: Site, headers: Any) -> None:
    import hmac
    kind, _, token = headers.get("Authorization", "").partition(" ")
    same = hmac.compare_digest(token.strip().encode(), site.token.encode())
    if kind.lower() != "bearer" or not same:
        raise Refusal(401, "the token is missing or wrong")


def stamp_of(db: str) -> str:
    """Return a text that changes with each commit; "" if the last one was just now.

    Of two commits within one tick of the file system's clock the second would not change it.
    """
    files = []
    for path in (db, db + "-wal"):
        try:
            files.append(os.stat(path))
        except OSError:
            pass  # no database; or the last program that used it has removed its log
    if any(time.time() - file.st_mtime < 0.1 for file in files):
        return ""
    return '"%s"' % "-".join("%x-%x-%x" % (file.st_ino, file.st_size, file.st_mtime_ns)
                             for file in files)


def check_values(body: bytes) -> Row:
    """Return the values in a body; refuse other names and types than page_change knows."""
    try:
        values = json.loads(body or b"{}")
        if any(type(value) is not VALUES.get(name) for name, value in values.items()):
            raise ValueError
    except (ValueError, RecursionError, AttributeError):
        raise Refusal(400, "the body must be a JSON object with %s" % ", ".join(VALUES)) from None
    return values  # type: ignore[no-any-return]


def page_values(site: Site, method: str, query: str, headers: Any, body: bytes) -> Row:
    """Read the values of a request: from its query, or from the JSON in its body."""
    from urllib.parse import parse_qsl
    if method != "POST":
        return dict(parse_qsl(query))
    if site.read_only:
        raise Refusal(403, "this page only reads; start `queuectl web` without --read-only")
    if headers.get_content_type() != "application/json":
        raise Refusal(415, "the body must be application/json")
    return check_values(body)


def page_reply() -> Reply:
    """Return the page itself, which holds no data; only its own style and script may run."""
    from base64 import b64encode
    from hashlib import sha256
    hashes = []
    for name in ("style", "script"):
        text = PAGE.partition("<%s>" % name)[2].partition("</%s>" % name)[0]
        digest = b64encode(sha256(text.encode()).digest()).decode()
        hashes.append("%s-src 'sha256-%s'" % (name, digest))
    policy = ("default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; "
              "form-action 'none'; frame-ancestors 'none'; " + "; ".join(hashes))
    return Reply(PAGE.encode(), {"Content-Security-Policy": policy, "X-Frame-Options": "DENY"},
                 kind="text/html; charset=utf-8")


def encoded(reply: Reply) -> Reply:
    """Return a reply with its value as bytes."""
    if isinstance(reply.value, bytes):
        return reply
    return reply._replace(value=json.dumps(reply.value).encode())


def with_store(site: Site, stamp: str, writes: bool, call: Callable[..., Reply], values: Row,
               names: Iterable[str]) -> Reply:
    """Call a function of ROUTES with a store that is open for this call only."""
    with site.gates[writes]:
        store = Store(site.db, reading=not writes)
        try:
            reply = encoded(call(site, store, values, *names))
        finally:
            store.close()
    if stamp and "X-Live" not in reply.headers:
        reply.headers["ETag"] = stamp
    return reply


def failed_reply(error: Exception) -> Reply:
    """Return the reply to a request that failed; a bug is told on stderr only."""
    status, why = 500, "this is a bug in queuectl; its stderr says more"
    if isinstance(error, Refusal):
        status, why = error.args
    elif isinstance(error, (QueueError, OSError)):
        status, why = 409, str(error)
        if why.startswith("there is no job"):
            status = 404
        elif isinstance(error, UsageError):
            status = 400
        elif isinstance(error, (Unavailable, OSError)):
            status = 503
    if status == 500:
        sys.excepthook(*sys.exc_info())
    headers = {401: {"WWW-Authenticate": "Bearer"}, 405: {"Allow": "GET, HEAD, POST"}}
    return Reply({"error": as_called(why)}, dict(headers.get(status, {})), status)


def route(site: Site, method: str, target: str, headers: Any, body: bytes) -> Reply:
    """Answer a request whose caller was checked."""
    from urllib.parse import unquote, urlsplit
    path, query = urlsplit(target)[2:4]
    if path == "/":
        return page_reply()
    check_token(site, headers)
    found = [(way, re.fullmatch(pattern, path), call) for way, pattern, call in ROUTES]
    matches = [(way, match, call) for way, match, call in found if match]
    if not matches:
        raise Refusal(404, "there is nothing at %s" % quoted(path))
    way, match, call = matches[0]
    if way != method.replace("HEAD", "GET"):
        raise Refusal(405, "%s takes %s" % (path, way))
    stamp = stamp_of(site.db)
    if way == "GET" and stamp and stamp == headers.get("If-None-Match"):
        return Reply(b"", status=304)
    until, kept = site.kept.get(target, (0.0, None))
    if way == "GET" and kept and monotonic() < until:
        return kept  # type: ignore[no-any-return]
    values = page_values(site, way, query, headers, body)
    reply = with_store(site, stamp, way == "POST", call, values, map(unquote, match.groups()))
    for old, (until, _) in list(site.kept.items()):
        if way == "POST" or until < monotonic():
            site.kept.pop(old, None)
    if way == "GET":
        site.kept[target] = monotonic() + KEEP_TIME, reply
    return reply


# Requests and connections.

def receive(connection: Any, deadline: float) -> bytes:
    """Wait for more of a request until `deadline`; raises OSError if none comes."""
    connection.settimeout(max(0.001, deadline - monotonic()))
    data = connection.recv(MOST_BODY)
    if not data:
        raise OSError("the client has gone")
    return data  # type: ignore[no-any-return]


def read_head(connection: Any, deadline: float) -> tuple[bytes, bytes]:
    """Read a request's first line and headers; return them, and what came behind them."""
    data = b""
    while b"\r\n\r\n" not in data:
        if len(data) > MOST_HEAD:
            raise Refusal(431, "the headers are too long")
        data += receive(connection, deadline)
    head, _, rest = data.partition(b"\r\n\r\n")
    if len(head) > MOST_HEAD:
        raise Refusal(431, "the headers are too long")
    return head + b"\r\n\r\n", rest


def read_body(connection: Any, headers: Any, data: bytes, deadline: float) -> bytes:
    """Read the body of a request, which begins with `data`."""
    length = headers.get("Content-Length", "0")
    if "Transfer-Encoding" in headers or not re.fullmatch("[0-9]{1,9}", length):
        raise Refusal(411, "a body needs its length in Content-Length")
    if int(length) > MOST_BODY:
        raise Refusal(413, "the body is too long")
    while len(data) < int(length):
        data += receive(connection, deadline)
    return data[:int(length)]


def send_reply(handler: Any, reply: Reply) -> None:
    """Send a reply; nothing in it is ever kept by a browser, or taken for another type."""
    data = encoded(reply).value
    handler.request_version = "HTTP/1.1"  # a malformed request may have none; answer with headers
    handler.send_response(reply.status)
    headers = {"Content-Type": reply.kind, "Content-Length": len(data), "Connection": "close",
               "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
               "Referrer-Policy": "no-referrer", "Cross-Origin-Resource-Policy": "same-origin",
               **reply.headers}
    for name, value in headers.items():
        handler.send_header(name, str(value))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(data)


def read_rest(connection: Any) -> None:
    """Read what is left of a refused request: unread bytes would make the reply get lost."""
    connection.shutdown(1)
    deadline = monotonic() + 0.5
    while monotonic() < deadline:
        receive(connection, deadline)


def serve_request(handler: Any) -> None:
    """Read one request of a connection, and answer it; raises OSError if the client is gone."""
    from io import BytesIO
    server, connection, deadline = handler.server, handler.connection, monotonic() + REQUEST_TIME
    handler.command, handler.request_version, handler.requestline = "GET", "HTTP/1.1", ""
    try:
        head, data = read_head(connection, deadline)
        handler.rfile = BytesIO(head)
        handler.raw_requestline = handler.rfile.readline()
        if not handler.parse_request():
            return
        body = read_body(connection, handler.headers, data, deadline)
        server.waiting.pop(connection, None)  # it is neither reading nor writing now
        check_caller(server.site, handler.command, handler.headers)
        reply = route(server.site, handler.command, handler.path, handler.headers, body)
    except Exception as error:
        if isinstance(error, OSError) and connection in server.waiting:
            raise
        reply = failed_reply(error)
    server.waiting[connection] = True
    connection.settimeout(REQUEST_TIME)
    send_reply(handler, reply)
    if reply.status >= 400:
        read_rest(connection)


def make_room(waiting: dict[Any, bool]) -> bool:
    """Close connections until one more can be served; return whether that is so."""
    import threading
    for _ in range(100):
        if threading.active_count() <= MOST_CONNECTIONS:
            return True
        for connection in list(waiting)[:16]:  # some at once, for each needs a moment to end
            waiting.pop(connection, None)
            try:
                connection.shutdown(2)  # its thread ends now
            except OSError:
                pass
        sleep(0.001)
    return False


def request_handler(base: Any) -> Any:
    """Return the class of http.server's handlers, a subclass of `base`."""
    class Handler(base):  # type: ignore[misc]
        server_version, sys_version = "queuectl", ""

        def handle(self) -> None:
            try:
                serve_request(self)
            except OSError:
                pass  # the client is gone, or too slow

        def send_error(self, code: int, message: str | None = None,
                       explain: str | None = None) -> None:
            send_reply(self, failed_reply(Refusal(int(code), message or "bad request")))

        def log_message(self, format: str, *values: Any) -> None:
            """Log nothing."""

    return Handler


def threading_server(base: Any) -> Any:
    """Return the class of a server that makes room for new connections, a subclass of `base`."""
    class Server(base):  # type: ignore[misc]
        daemon_threads, request_queue_size = True, 128

        def server_bind(self) -> None:
            from socketserver import TCPServer
            TCPServer.server_bind(self)  # http.server's own asks a name server for this machine

        def server_activate(self) -> None:
            self.waiting: dict[Any, bool] = {}  # connections that read or write, oldest first
            super().server_activate()

        def process_request(self, request: Any, client_address: Any) -> None:
            if make_room(self.waiting):
                self.waiting[request] = True
                super().process_request(request, client_address)
            else:
                self.shutdown_request(request)

        def shutdown_request(self, request: Any) -> None:
            self.waiting.pop(request, None)
            super().shutdown_request(request)

    return Server


def page_server(site: Site, address: tuple[str, int]) -> Any:
    """Return a server for the page; raises OSError if it can't listen."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    kind = threading_server(ThreadingHTTPServer)
    if ":" in address[0]:
        import socket
        kind.address_family = socket.AF_INET6
    server = kind(address, request_handler(BaseHTTPRequestHandler))
    server.site = site
    return server


def read_token(path: str | None) -> str:
    """Return the token in a file, which is made if it is missing; a random one without a file."""
    from secrets import token_urlsafe
    if not path:
        return token_urlsafe(24)
    flags = os.O_RDWR
    if isfile(path) and getsize(path):
        flags = os.O_RDONLY  # a service's credentials can't be written
    fd = open_private(abspath(path), flags)
    try:
        if os.fstat(fd).st_mode & 0o077 and not WINDOWS:
            raise QueueError("others can read %s; `chmod 600 %s` mends that"
                             % (path, shell_word(path)))
        token = read_between(fd, 0, 4096).decode("ascii", "replace").strip()
        if not token:
            token = token_urlsafe(24)
            write_at(fd, 0, token.encode() + b"\n")
    finally:
        os.close(fd)
    if len(token) < 16:
        raise QueueError("the token in %s is too short; empty the file, and a new one is made"
                         % path)
    return token


PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>queuectl</title>
<link rel="icon" href="data:,">
<style>
:root {
  color-scheme: light dark;
  --back: #f6f7f9; --card: #fff; --text: #1b1f24; --dim: #57606a; --line: #d4d9df; --link: #0a58b5;
  --pending: #57606a; --processing: #0b6e8a; --completed: #1a7437; --failed: #8a5a00; --dead: #b3261e;
  --cancelled: #6b4c9a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #14171b; --card: #1d2127; --text: #e6e9ed; --dim: #a3adb8; --line: #363d46; --link: #7fb6ff;
    --pending: #a3adb8; --processing: #5ccbe6; --completed: #63d083; --failed: #f0b849; --dead: #ff8a80;
    --cancelled: #c9a9f5;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 15px/1.45 system-ui, sans-serif; }
a { color: var(--link); }
header, main { max-width: 78rem; margin: 0 auto; padding: 0 1rem; }
header { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; align-items: center; padding-top: .75rem; }
header strong { font-size: 1.15rem; }
header nav { display: flex; flex-wrap: wrap; gap: 1rem; }
header nav a { padding: .35rem 0; text-decoration: none; }
header nav a[aria-current] { font-weight: 600; border-bottom: 2px solid; }
#live { margin-left: auto; color: var(--dim); font-size: .85rem; }
/* What an action did is seen wherever the reader has scrolled to. */
#live.said { position: fixed; right: 1rem; bottom: 1rem; z-index: 1; max-width: min(40rem, 92vw); padding: .6rem 1rem;
  color: var(--text); background: var(--card); border: 2px solid var(--link); border-radius: .5rem;
  overflow-wrap: anywhere; }
h1 { font-size: 1.3rem; margin: 1rem 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.02rem; margin: 0 0 .5rem; }
h3 { font-size: .95rem; margin: .8rem 0 .2rem; }
p { margin: .3rem 0 .6rem; }
section > :last-child { margin-bottom: 0; }
code { font: .92em ui-monospace, monospace; overflow-wrap: anywhere; user-select: all; }
section, form, .note { background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .75rem 1rem; margin: 0 0 .9rem; }
.note { border-left: .35rem solid var(--failed); overflow-wrap: anywhere; }
.columns { display: grid; gap: 0 .9rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.states { display: flex; flex-wrap: wrap; gap: .5rem 1.6rem; }
.states a { text-decoration: none; color: inherit; }
.states b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; font-weight: 600; color: var(--dim); font-size: .85rem; }
th, td { padding: .3rem .75rem .3rem 0; vertical-align: baseline; }
tr + tr > *, tbody tr > * { border-top: 1px solid var(--line); }
td { overflow-wrap: break-word; }
td a, time { white-space: nowrap; }
td > div, td > .command { overflow-wrap: anywhere; }
@media (max-width: 42rem) { /* a row becomes a few lines, each cell with the name of its column */
  thead { display: none; }
  tr { display: flex; flex-wrap: wrap; gap: .1rem .9rem; align-items: baseline; padding: .5rem 0;
    border-top: 1px solid var(--line); }
  td, td a { border: 0 !important; padding: 0; min-width: 0; max-width: 100%; white-space: normal;
    overflow-wrap: anywhere; }
  td:last-child:has(.command) { flex-basis: 100%; }
  td[data-label]::before { content: attr(data-label) " "; color: var(--dim); font-size: .85rem; }
}
.command { font-family: ui-monospace, monospace; font-size: .88em; max-width: 40rem; unicode-bidi: isolate; }
.state { font-weight: 600; white-space: nowrap; }
.pending { color: var(--pending); } .processing { color: var(--processing); }
.completed { color: var(--completed); } .failed { color: var(--failed); }
.dead, .died { color: var(--dead); } .cancelled { color: var(--cancelled); }
.gone { opacity: .6; }
.dim { color: var(--dim); }
pre { margin: .3rem 0 .8rem; padding: .6rem; max-height: 26rem; overflow: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; background: var(--back); border: 1px solid var(--line); border-radius: .3rem;
  font: .85em/1.4 ui-monospace, monospace; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: 0; }
dt { color: var(--dim); } dd { margin: 0; overflow-wrap: anywhere; unicode-bidi: isolate; }
form { display: flex; flex-wrap: wrap; gap: .6rem 1rem; align-items: end; }
label { display: grid; gap: .15rem; font-size: .85rem; color: var(--dim); flex: 1 1 8rem; min-width: 0; }
label > * { width: 100%; }
input, select, button { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--dim);
  border-radius: .35rem; padding: .3rem .6rem; min-height: 2.2rem; max-width: 100%; }
input[type=checkbox] { min-height: 0; width: 1.15rem; height: 1.15rem; }
button { cursor: pointer; }
button:hover { border-color: var(--link); }
button:disabled { opacity: .55; cursor: default; }
.actions { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; margin: 0 0 .7rem; min-height: 2.2rem; }
main:focus { outline: none; }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
dialog { max-width: min(44rem, 92vw); color: var(--text); background: var(--card); border: 1px solid var(--dim);
  border-radius: .5rem; }
dialog::backdrop { background: #0008; }
svg { width: 100%; height: 7rem; display: block; }
svg.low { height: 2.5rem; } svg.low rect { fill: var(--dim); }
.scale { display: flex; justify-content: space-between; font-size: .85rem; }
.sign { display: inline-block; width: .7em; height: .7em; margin-right: .3em; background: currentColor; }
svg .completed { fill: var(--completed); } svg .failed { fill: var(--failed); } svg .died { fill: var(--dead); }
svg .axis { stroke: var(--line); }
.skip { position: absolute; left: -99rem; } .skip:focus { left: .5rem; top: .5rem; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
</style>
</head>
<body>
<a class="skip" href="#main">To the content</a>
<header>
  <strong>queuectl</strong>
  <nav aria-label="Views">
    <a href="#/">Overview</a><a href="#/jobs">Jobs</a><a href="#/dead">Dead letters</a>
  </nav>
  <span id="live" role="status"></span>
</header>
<main id="main" tabindex="-1"></main>
<dialog id="ask" aria-labelledby="question"></dialog>
<noscript><p>This page needs JavaScript. Without it, use the queuectl command.</p></noscript>
<script>
"use strict";
// The token comes in the address once. It is kept for this tab, and taken out of the address,
// so that a view can be bookmarked and sent without it.
const given = location.hash.match(/^#token=(.+)/);
if (given) {
  sessionStorage.setItem("token", given[1]);
  history.replaceState(null, "", "#/");
}

const STATES = ["pending", "processing", "completed", "failed", "dead", "cancelled"];
const TERMS = ["state", "queue", "grep", "error", "since", "before"];
const CAN = {
  retry: ["completed", "dead", "cancelled"],
  cancel: ["pending", "processing", "failed"],
  delete: ["pending", "completed", "failed", "dead", "cancelled"],
};
const main = document.getElementById("main");
const dialog = document.getElementById("ask");
dialog.onclose = () => dialog.replaceChildren();
let view = null; // the view that is shown: {draw, load, …}
let tags = {}; // path: [the ETag of its last answer, that answer]
let readOnly = false;
let called = "queuectl";

// Make an element. Texts are always put in as text, never as HTML.
function make(name, attributes, ...children) {
  const node = document.createElementNS(
    ["svg", "rect", "line", "title"].includes(name)
      ? "http://www.w3.org/2000/svg"
      : "http://www.w3.org/1999/xhtml",
    name,
  );
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key.startsWith("on")) node[key] = value;
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value != null) node.setAttribute(key, value);
  }
  node.append(
    ...children
      .flat(Infinity)
      .filter(child => child != null)
      .map(child => (child.nodeType ? child : String(child))),
  );
  return node;
}

// Change `old` into `fresh` in place: focus, selection and scrolling stay, and nothing flickers.
// What has a data-key is changed into what has the same; all else goes by its place.
function morph(old, fresh) {
  if (old.nodeType !== fresh.nodeType || old.nodeName !== fresh.nodeName) return old.replaceWith(fresh);
  if (old.nodeType === 3) {
    if (old.data !== fresh.data) old.data = fresh.data;
    return;
  }
  for (const {name} of [...old.attributes]) if (!fresh.hasAttribute(name)) old.removeAttribute(name);
  for (const {name, value} of fresh.attributes)
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  for (const key of ["onclick", "onchange", "onsubmit"]) old[key] = fresh[key];
  if ("checked" in fresh && old.checked !== fresh.hasAttribute("checked"))
    old.checked = fresh.hasAttribute("checked");
  const keys = new Set([...fresh.children].map(child => child.dataset.key));
  for (const child of [...old.children])
    if (child.dataset.key && !keys.has(child.dataset.key)) child.remove();
  const keyed = new Map([...old.children].map(child => [child.dataset.key, child]));
  let place = old.firstChild;
  for (const child of [...fresh.childNodes]) {
    const key = child.dataset && child.dataset.key;
    const same = key ? keyed.get(key) : place && !(place.dataset && place.dataset.key) ? place : null;
    if (same && same === place) place = place.nextSibling;
    else old.insertBefore(same || child, place);
    if (same) morph(same, child);
  }
  while (place) {
    const next = place.nextSibling;
    place.remove();
    place = next;
  }
}

// Ask the server. Without `body` it is asked only if anything has changed, unless `again`.
async function ask(path, body, again) {
  const headers = {Authorization: "Bearer " + sessionStorage.getItem("token")};
  const known = tags[path];
  if (body) headers["Content-Type"] = "application/json";
  else if (known && !again) headers["If-None-Match"] = known[0];
  const answer = await fetch(path, {
    method: body ? "POST" : "GET",
    headers,
    cache: "no-store",
    body: body && JSON.stringify(body),
  }).catch(() => {
    throw new Error("queuectl web does not answer; does it still run?");
  });
  if (answer.status === 304) return known[1];
  const value = await answer.json();
  if (answer.status === 401) throw Object.assign(new Error(value.error), {token: true});
  if (!answer.ok) throw new Error(value.error);
  const result = {value, headers: answer.headers};
  if (answer.headers.get("ETag")) tags[path] = [answer.headers.get("ETag"), result];
  return result;
}

const count = (number, noun) => number.toLocaleString() + " " + noun + (number === 1 ? "" : "s");
const escaped = text =>
  String(text ?? "").replace(
    /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/g,
    found => "\\u" + found.charCodeAt(0).toString(16).padStart(4, "0"),
  );
const withCode = text =>
  text.split("`").map((part, at) => (at % 2 ? make("code", {}, escaped(part)) : escaped(part)));
const stateOf = state => make("span", {class: "state " + state}, state);
const linkTo = id => make("a", {href: "#/job/" + encodeURIComponent(id)}, escaped(id));

function duration(seconds) {
  if (seconds < 1) return Math.round(seconds * 1000) + " ms";
  if (seconds < 60) return seconds.toFixed(1) + " s";
  if (seconds < 3600) return Math.floor(seconds / 60) + " min " + Math.floor(seconds % 60) + " s";
  if (seconds < 86400) return Math.floor(seconds / 3600) + " h " + Math.floor((seconds % 3600) / 60) + " min";
  return Math.floor(seconds / 86400) + " d " + Math.floor((seconds % 86400) / 3600) + " h";
}
const since = time => (Date.now() - Date.parse(time)) / 1000;
const when = time =>
  time ? make("time", {datetime: time, title: time + " (UTC)"}, new Date(time).toLocaleString()) : "";

// A table; each row is {key, cells}. `labels` are shown before the cells on a narrow screen.
function table(caption, head, rows, none, labels) {
  if (!rows.length) return make("p", {class: "dim"}, none);
  const body = rows.map(({key, kind, cells}) =>
    make(
      "tr",
      {"data-key": key, class: kind},
      cells.map((cell, at) => make("td", {"data-label": labels && labels[at]}, cell)),
    ),
  );
  return make(
    "div",
    {class: "wide", tabindex: 0, role: "region", "aria-label": caption},
    make(
      "table",
      {},
      make("caption", {class: "hidden"}, caption),
      make(
        "thead",
        {},
        make(
          "tr",
          {},
          head.map(cell => make("th", {scope: "col"}, cell)),
        ),
      ),
      make("tbody", {}, body),
    ),
  );
}
const card = (title, ...content) => make("section", {"aria-label": title}, make("h2", {}, title), content);

// The command line that does the same as an action, to copy.
const quote = word => (/^[\w.,:@%+\/-]+$/.test(word) ? word : "'" + word.replaceAll("'", "'\\''") + "'");
function commandOf(name, body, retry) {
  const words = [called, name];
  for (const term of TERMS) if (body[term]) words.push("--" + term, quote(body[term]));
  if (body.all && !TERMS.some(term => body[term])) words.push("--all");
  return [...words, ...(body.ids || []).map(quote)].join(" ");
}
// The same for the jobs of a cause, from the command that retries them.
function commandOfCause(name, cause) {
  if (!cause.retry) return "";
  if (name === "retry") return cause.retry;
  return cause.retry.replace(/ dlq retry (?=--)/, " delete --state dead ").replace(" dlq retry ", " delete ");
}

// Ask the person, with the number of jobs, then change exactly those that were counted.
async function act(name, body, done, command) {
  try {
    const found = await ask("/api/" + name, {...body, dry_run: true});
    const number = Number(found.headers.get("X-Count"));
    const notes = JSON.parse(found.headers.get("X-Notes"));
    const go = more => async () => {
      dialog.close();
      say(name + ": under way …", 600);
      try {
        const asked = body.ids ? {} : {asked: JSON.parse(found.headers.get("X-Asked"))};
        const answer = await ask("/api/" + name, {...body, ...asked, ...more});
        const changed = Number(answer.headers.get("X-Count"));
        const rest = changed < number ? `, ${number - changed} changed meanwhile or can't be` : "";
        say([name + ": " + count(changed, "job") + rest, ...JSON.parse(answer.headers.get("X-Notes"))].join("; "));
        if (done) done();
      } catch (error) {
        fail(error);
      }
      refresh(true);
    };
    const dependents = notes.some(note => note.includes("--with-dependents"));
    dialog.replaceChildren(
      make("h2", {id: "question"}, "Really " + name + " " + count(number, "job") + "?"),
      ...notes.map(note => make("p", {}, escaped(note))),
      make("p", {}, command ? "The same as a command:" : "No short command does just this."),
      make("pre", {}, make("code", {}, escaped(command))),
      make(
        "div",
        {class: "actions"},
        make("button", {onclick: () => dialog.close()}, "No"),
        make("button", {onclick: go({}), disabled: number === 0}, "Yes, " + name),
        dependents
          ? make("button", {onclick: go({with_dependents: true})}, "Yes, and what ended with it")
          : null,
      ),
    );
    dialog.showModal();
  } catch (error) {
    fail(error);
  }
}
const button = (name, body, label, done, command = commandOf(name, body)) =>
  readOnly ? null : make("button", {onclick: () => act(name, body, done, command)}, label);

let sayUntil = 0;
function say(text, seconds = 8) {
  sayUntil = Date.now() + seconds * 1000;
  const live = document.getElementById("live");
  live.className = seconds ? "said" : "";
  if (live.textContent !== text) live.textContent = text;
}
function fail(error) {
  if (error.token) return login();
  say("Error: " + error.message);
}

function login() {
  view = null;
  const field = make("input", {type: "password", name: "token", required: true, autocomplete: "off"});
  const enter = event => {
    event.preventDefault();
    sessionStorage.setItem("token", field.value.trim());
    show();
  };
  main.replaceChildren(
    make("h1", {}, "Token"),
    make(
      "form",
      {onsubmit: enter},
      make("label", {}, "The token that queuectl web has printed, behind #token=", field),
      make("button", {}, "Open"),
    ),
  );
  field.focus();
}

// Overview

// A picture of one bar for each of `bars` moments; each bar is a list of [kind, share of the height].
function picture(text, bars, kind) {
  const drawn = bars.flatMap((parts, at) => {
    let top = 100;
    return parts.map(([kind, share]) => {
      const height = share && Math.max(96 * share, 2);
      top -= height;
      return height ? make("rect", {class: kind, x: at * 10 + 1, y: top, width: 8, height}) : null;
    });
  });
  const right = bars.length * 10;
  return make(
    "svg",
    {viewBox: `0 0 ${right} 101`, preserveAspectRatio: "none", role: "img", "aria-label": text, class: kind},
    make("line", {class: "axis", x1: 0, x2: right, y1: 100.5, y2: 100.5}),
    drawn,
  );
}

function chart(title, rows, step, bars, unit) {
  const end = Math.floor(Date.now() / step) * step,
    first = end - (bars - 1) * step;
  const shown = rows.filter(entry => Date.parse(entry.starts_at) >= first);
  const by = new Map(shown.map(entry => [Date.parse(entry.starts_at), entry]));
  const moments = Array.from({length: bars}, (_, at) => by.get(first + at * step));
  const sum = name => shown.reduce((sum, entry) => sum + entry[name], 0);
  const waits = entry => entry.wait_seconds_sum / entry.runs;
  const most = Math.max(1, ...shown.map(entry => entry.runs));
  const longest = Math.max(0.001, ...shown.map(waits));
  const runs = sum("runs");
  const kinds = ["completed", "failed", "died"];
  const text = `${count(runs, "run")}, at most ${most.toLocaleString()} in ${unit}`;
  const waited = runs
    ? `Jobs waited ${duration(sum("wait_seconds_sum") / runs)} on average, ` +
      `${duration(Math.max(...shown.map(entry => entry.wait_seconds_max)))} at most`
    : "";
  if (!runs) return card(title, make("p", {class: "dim"}, "No runs."));
  return card(
    title,
    make("p", {class: "dim"}, text + ". From below:"),
    make(
      "p",
      {},
      kinds.map(kind => [
        make("span", {class: "state " + kind}, make("span", {class: "sign"}), kind),
        ` ${sum(kind).toLocaleString()} \u2003`,
      ]),
    ),
    picture(
      title + ": " + text,
      moments.map(entry => (entry ? kinds.map(kind => [kind, entry[kind] / most]) : [])),
    ),
    make("p", {class: "dim"}, waited + ":"),
    picture(
      waited,
      moments.map(entry => (entry ? [["", waits(entry) / longest]] : [])),
      "low",
    ),
    make(
      "div",
      {class: "scale dim"},
      make("span", {}, new Date(first).toLocaleTimeString([], {timeStyle: "short"})),
      make("span", {}, "now"),
    ),
  );
}

const overview = () => ({
  title: "Overview",
  every: 2000,
  async load(again) {
    const paths = [
      "/api/status",
      "/api/stats?by=minute&since=1h",
      "/api/stats?by=hour&since=1d",
      "/api/queues",
      "/api/workers",
    ];
    const [status, minutes, hours, queues, workers] = await Promise.all(
      paths.map(path => ask(path, null, again)),
    );
    Object.assign(this, {
      status: status.value,
      minutes: minutes.value,
      hours: hours.value,
      queues: queues.value,
      workers: workers.value,
    });
    readOnly = this.status.read_only;
    called = this.status.called;
    const running = this.workers.filter(worker => worker.job).slice(0, 20);
    this.lines = new Map(
      await Promise.all(
        running.map(async worker => {
          const logs = await ask("/api/jobs/" + encodeURIComponent(worker.job) + "/logs").catch(() => ({
            value: [],
          }));
          const run = logs.value[0] || {};
          const text = ((run.stdout || "") + (run.stderr || "")).trimEnd();
          return [worker.job, text.slice(text.lastIndexOf("\n") + 1).slice(-200)];
        }),
      ),
    );
  },
  draw() {
    const jobs = this.status.jobs;
    const turn = (queue, order) => async () => {
      try {
        await ask(`/api/queues/${encodeURIComponent(queue.name)}/${order}`, {});
        say(`${called} queue ${order} ${queue.name}`);
      } catch (error) {
        fail(error);
      }
      refresh(true);
    };
    return [
      make("h1", {}, "Overview"),
      make(
        "div",
        {},
        this.status.hold_ups.map(line => make("p", {class: "note"}, withCode(line))),
      ),
      card(
        "Jobs",
        make(
          "div",
          {class: "states"},
          STATES.map(state =>
            make(
              "a",
              {href: "#/jobs?state=" + state},
              make("b", {}, jobs[state].toLocaleString()),
              stateOf(state),
            ),
          ),
        ),
      ),
      make(
        "div",
        {class: "columns"},
        chart("The last hour", this.minutes, 60000, 60, "a minute"),
        chart("The last day", this.hours, 3600000, 24, "an hour"),
      ),
      card(
        "Queues",
        table(
          "Queues",
          ["Queue", "Limit", "Starts", "Waiting", "Running", "Dead", "Action"],
          this.queues.map(queue => {
            const order = queue.paused ? "resume" : "pause";
            const attributes = {
              onclick: turn(queue, order),
              "aria-label": `${order} ${queue.name}`,
              title: `${called} queue ${order} ${queue.name}`,
            };
            return {
              key: queue.name,
              cells: [
                make("a", {href: "#/jobs?queue=" + encodeURIComponent(queue.name)}, escaped(queue.name)),
                queue.concurrency ?? "none",
                queue.paused ? make("b", {}, "paused") : "yes",
                queue.pending + queue.failed,
                queue.processing,
                queue.dead,
                // A stop of all queues is lifted by the command that the note above names.
                readOnly || this.status.all_paused ? "" : make("button", attributes, order),
              ],
            };
          }),
          "No queues.",
          ["", "limit", "starts", "waiting", "running", "dead", ""],
        ),
      ),
      card(
        "Running",
        table(
          "Running jobs",
          ["Job", "For", "Last line of output", "Command"],
          this.workers
            .filter(worker => worker.job)
            .map(worker => ({
              key: worker.job,
              cells: [
                linkTo(worker.job),
                duration(since(worker.job_started_at)),
                make("span", {class: "command"}, escaped(this.lines.get(worker.job))),
                make("span", {class: "command"}, escaped(worker.command).slice(0, 300)),
              ],
            })),
          "Nothing runs.",
          ["", "for", "printed"],
        ),
        this.status.next &&
          make(
            "p",
            {class: "dim"},
            "Next at ",
            when(this.status.next.due),
            `: ${escaped(this.status.next.id)}: `,
            escaped(this.status.next.command).slice(0, 300),
          ),
      ),
      card(
        "Workers",
        table(
          "Workers",
          ["Worker", "Process", "Since", "Job", "Held up by"],
          this.workers.map(worker => ({
            key: worker.name,
            cells: [
              worker.name,
              worker.pid,
              when(worker.started_at),
              worker.job ? linkTo(worker.job) : "idle",
              escaped(worker.trouble),
            ],
          })),
          "No workers are running.",
          ["", "process", "since", "job", "held up by"],
        ),
      ),
      make("p", {class: "dim"}, "Database: " + escaped(this.status.path)),
    ];
  },
});

// Jobs

const jobsView = query => ({
  title: "Jobs",
  every: 2000,
  rows: new Map(),
  chosen: new Set(),
  next: 0, // the place from which older jobs are shown; 0: there are none
  top: 0, // above the newest job that is shown
  total: null,
  full: true,
  news: false,
  path(more) {
    const terms = TERMS.filter(term => query.get(term)).map(term => [term, query.get(term)]);
    return "/api/jobs?" + new URLSearchParams([...terms, ...Object.entries(more || {})]);
  },
  take({value, headers}) {
    for (const job of [...value].reverse()) this.rows.set(job.id, job);
    this.next = Number(headers.get("X-Next"));
    this.full = value.length >= 50;
    this.top = this.top || Number(headers.get("X-Last")) + 1;
    this.total = headers.get("X-Total");
  },
  // The first time the newest are loaded. From then on what is shown (the first 200 of it) changes
  // in its place, and what has come into the list since is only told.
  async load(again) {
    if (!this.top) return this.take(await ask(this.path(), null, true));
    const from = Math.max(1, this.next),
      limit = Math.min(200, this.rows.size + 50);
    const [answer, newer] = await Promise.all([
      ask(this.path({place: this.top, from, limit}), null, again),
      ask(this.path({from: this.top, limit: 1}), null, again),
    ]);
    const found = new Map(answer.value.map(job => [job.id, job]));
    const all = answer.headers.get("X-Next") === "0"; // the search came to its end
    this.rows.forEach((job, id) => {
      if (found.has(id)) this.rows.set(id, found.get(id));
      else if (all) job.gone = true; // it no longer fits the filter
    });
    this.news = newer.value.length > 0 || [...found.keys()].some(id => !this.rows.has(id));
    this.total = answer.headers.get("X-Total");
  },
  async more() {
    try {
      this.take(await ask(this.path({place: this.next}), null, true));
      redraw();
    } catch (error) {
      fail(error);
    }
  },
  draw() {
    const field = (term, label, hint) =>
      make("label", {}, label, make("input", {name: term, value: query.get(term) || "", placeholder: hint}));
    const filter = event => {
      event.preventDefault();
      const terms = new URLSearchParams([...new FormData(event.target)].filter(pair => pair[1]));
      location.hash = "#/jobs" + (String(terms) && "?" + terms);
    };
    const rows = [...this.rows.values()];
    const shown = rows.filter(job => !job.gone);
    const picked = shown.filter(job => this.chosen.has(job.id));
    const selection = Object.fromEntries(
      TERMS.filter(term => query.get(term)).map(term => [term, query.get(term)]),
    );
    const all = Object.keys(selection).length ? selection : {all: true};
    const states = (query.get("state") || STATES.join()).split(",");
    const clear = () => this.chosen.clear();
    const choose = jobs => event => {
      for (const job of jobs) event.target.checked ? this.chosen.add(job.id) : this.chosen.delete(job.id);
      redraw();
    };
    const box = (jobs, label, checked) =>
      make("input", {type: "checkbox", "aria-label": label, checked, onchange: choose(jobs)});
    const actions = Object.keys(CAN).map(name => {
      const can = state => CAN[name].includes(state);
      const ids = picked.filter(job => can(job.state)).map(job => job.id);
      if (ids.length) return button(name, {ids}, `${name} ${ids.length} selected`, clear);
      if (!picked.length && states.some(can)) return button(name, all, `${name} all that match`);
      return null;
    });
    return [
      make("h1", {}, "Jobs"),
      make(
        "form",
        {onsubmit: filter, role: "search", "aria-label": "Filter"},
        make(
          "label",
          {},
          "State",
          make(
            "select",
            {name: "state"},
            [...new Set(["", ...STATES, "pending,processing,failed", "failed,dead", query.get("state") || ""])].map(
              state =>
                make(
                  "option",
                  {value: state, selected: state === (query.get("state") || "")},
                  state.replaceAll(",", ", ") || "any",
                ),
            ),
          ),
        ),
        field("queue", "Queue", "mail,web"),
        field("grep", "Text in command or id", ""),
        field("error", "Text in the error", ""),
        field("since", "Since", "2h or a time"),
        field("before", "Before", "2h or a time"),
        make("button", {}, "Show"),
      ),
      make("div", {class: "actions"}, actions),
      make(
        "p",
        {class: "actions dim", role: "status"},
        [
          this.total
            ? count(Number(this.total), "job") + "."
            : `${rows.length}${this.next ? "+" : ""} found.`,
          make("code", {}, escaped(commandOf("list", selection))),
        ],
        this.news ? make("button", {onclick: () => show()}, "Jobs have come into this list: show them") : "",
      ),
      make(
        "section",
        {"aria-label": "Jobs"},
        table(
          "Jobs, the newest first",
          [
            box(shown, "Select all that are shown", picked.length > 0 && picked.length === shown.length),
            ...["Job", "State", "Tries", "Queue", "Changed", "Command"],
          ],
          rows.map(job => ({
            key: job.id,
            kind: job.gone ? "gone" : null,
            cells: [
              box([job], "Select " + escaped(job.id), this.chosen.has(job.id)),
              linkTo(job.id),
              [stateOf(job.state), job.gone ? " (left)" : ""],
              `${job.attempts}/${Math.max(1, job.max_retries)}`,
              escaped(job.queue),
              when(job.updated_at),
              [
                make("div", {class: "command"}, escaped(job.command)),
                job.last_error ? make("div", {class: "dim"}, escaped(job.last_error)) : null,
              ],
            ],
          })),
          this.next ? "None found so far." : "No such jobs.",
        ),
        this.next
          ? make(
              "button",
              {onclick: () => this.more()},
              this.full ? "Older jobs" : "Search on",
            )
          : null,
      ),
    ];
  },
});

// One job

const HIDDEN = ["id", "runs", "why", "awaits", "awaited_by", "run", "expected_at"];
function fieldOf(name, value) {
  if (value === null || (typeof value === "object" && !Object.keys(value).length)) return "–";
  if (name.endsWith("_at")) return [when(value), " ", make("span", {class: "dim"}, "UTC " + value.slice(11, 19))];
  if (name === "command") return make("span", {class: "command"}, escaped(value));
  return escaped(typeof value === "object" ? JSON.stringify(value) : value);
}
const jobView = id => ({
  title: id,
  every: 1000,
  logs: new Map(),
  wanted: [], // older runs whose output was asked for
  async load(again) {
    this.job = (await ask("/api/jobs/" + encodeURIComponent(id), null, again)).value;
    const numbers = [...this.wanted, ...this.job.runs.map(run => run.run).slice(-5)];
    if (this.job.state === "processing") numbers.push(this.job.run);
    for (const number of numbers) {
      const known = this.logs.get(number);
      if (known && known.state !== "processing") continue;
      const run = (await ask(`/api/jobs/${encodeURIComponent(id)}/logs?run=${number}`)).value[0];
      if (run) this.logs.set(number, run);
    }
  },
  draw() {
    const job = this.job,
      live = this.logs.get(job.run);
    const runs = live && live.state === "processing" ? [...job.runs, live] : job.runs;
    const want = run => () => {
      this.wanted.push(run.run);
      refresh(true);
    };
    const output = (run, name) => {
      const kept = this.logs.get(run.run) || {};
      const text =
        kept[name] ??
        (kept[name + "_base64"]
          ? new TextDecoder().decode(
              Uint8Array.from(atob(kept[name + "_base64"]), letter => letter.charCodeAt(0)),
            )
          : "");
      return text
        ? [
            make("h3", {class: "dim"}, name),
            make("pre", {tabindex: 0, "aria-label": `${name} of run ${run.run}`}, escaped(text)),
          ]
        : null;
    };
    return [
      make("h1", {}, escaped(job.id), " ", stateOf(job.state)),
      make(
        "div",
        {class: "actions"},
        Object.keys(CAN).map(name =>
          CAN[name].includes(job.state)
            ? button(name, {ids: [job.id]}, name, name === "delete" ? () => history.back() : null)
            : null,
        ),
      ),
      card(
        "Why",
        job.why.map(reason => make("p", {}, withCode(reason))),
        job.awaits.length
          ? make(
              "p",
              {},
              "It waits for: ",
              job.awaits.flatMap(other => [linkTo(other.id), " (", stateOf(other.state), ") "]),
            )
          : null,
        job.awaited_by.length
          ? make(
              "p",
              {},
              "These wait for it: ",
              job.awaited_by.flatMap(other => [linkTo(other), " "]),
            )
          : null,
      ),
      card(
        "Runs",
        runs.length
          ? runs
              .slice()
              .reverse()
              .map(run => make(
                "div",
                {"data-key": run.run},
                make(
                  "h3",
                  {},
                  `Run ${run.run}, attempt ${run.attempt}: `,
                  stateOf(run.state),
                  run.state === "processing"
                    ? ` for ${duration(since(run.started_at))}`
                    : ` after ${duration(run.duration_seconds)}`,
                ),
                make("p", {class: "dim"}, when(run.started_at), run.error ? " " + escaped(run.error) : ""),
                output(run, "stdout"),
                output(run, "stderr"),
                this.logs.has(run.run) ? null : make("button", {onclick: want(run)}, `Output of run ${run.run}`),
              ))
          : make("p", {class: "dim"}, "It has not run yet."),
      ),
      card(
        "Fields",
        make(
          "dl",
          {},
          Object.entries(job)
            .filter(([name]) => !HIDDEN.includes(name))
            .flatMap(([name, value]) => [
              make("dt", {}, name),
              make(
                "dd",
                {},
                fieldOf(name, value),
              ),
            ]),
        ),
      ),
      make(
        "p",
        {class: "dim"},
        make(
          "code",
          {},
          ["show", "logs", "edit --help"].map(name => `${called} ${name} ${escaped(quote(job.id))}; `),
        ),
      ),
    ];
  },
});

// Dead letters

const deadView = () => ({
  title: "Dead letters",
  every: 3000,
  outputs: new Map(),
  async load(again) {
    const answer = await ask("/api/dlq/causes", null, again);
    this.causes = answer.value;
    this.left = Number(answer.headers.get("X-Left"));
    for (const cause of this.causes.slice(0, 10)) {
      if (!cause.job || this.outputs.has(cause.job)) continue;
      const logs = await ask("/api/jobs/" + encodeURIComponent(cause.job) + "/logs").catch(() => ({
        value: [],
      }));
      const run = logs.value[0] || {};
      this.outputs.set(cause.job, ((run.stdout || "") + (run.stderr || "")).slice(-2000));
    }
  },
  draw() {
    return [
      make("h1", {}, "Dead letters"),
      make(
        "p",
        {class: "dim"},
        this.causes.length ? "" : "No job is dead.",
        this.left
          ? withCode(
              `Only the jobs that died last are counted here, ${this.left.toLocaleString()} older ones are not; ` +
                `\`${called} dlq list --causes\` counts all.`,
            )
          : "",
      ),
      this.causes.map(cause => {
        const act = name =>
          button(name, {cause: cause.cause, state: "dead"}, name + " these", null, commandOfCause(name, cause));
        const text = this.outputs.get(cause.job);
        const after = cause.after ? ` and ${cause.after} after ${cause.count === 1 ? "it" : "them"}` : "";
        return make(
          "section",
          {"data-key": cause.cause, "aria-label": cause.cause},
          make("h2", {}, count(cause.count, "job") + after + ": " + escaped(cause.cause)),
          make("p", {class: "dim"}, "Since ", when(cause.since), ", for example ", linkTo(cause.job)),
          text ? make("pre", {tabindex: 0, "aria-label": "Output of an example"}, escaped(text)) : null,
          make("div", {class: "actions"}, act("retry"), act("delete")),
          cause.retry ? make("p", {class: "dim"}, make("code", {}, escaped(cause.retry))) : null,
        );
      }),
    ];
  },
});

// Showing: a view is loaded, then drawn; again as long as the page is visible.

function redraw() {
  if (!view || !view.ready) return;
  const fresh = make("main", {id: "main", tabindex: -1}, view.draw());
  const typed = document.activeElement && document.activeElement.form ? document.activeElement.form : null;
  const kept = typed ? [...new FormData(typed)] : [];
  // Who reads the end of an output goes on reading its end.
  const ends = [...document.querySelectorAll("pre")].filter(
    node => node.scrollHeight - node.scrollTop - node.clientHeight < 5,
  );
  // What the pointer is on, or has the focus, stays where it is on the screen.
  const held =
    main.querySelector("a:hover, button:hover, input:hover") ||
    (main.contains(document.activeElement) && document.activeElement !== main && document.activeElement);
  const top = held && held.getBoundingClientRect().top;
  morph(main, fresh);
  if (held && held.isConnected && top >= 0 && top < innerHeight)
    scrollBy(0, held.getBoundingClientRect().top - top);
  for (const node of ends) node.scrollTop = node.scrollHeight;
  if (typed) for (const [name, value] of kept) if (typed.elements[name]) typed.elements[name].value = value;
}

async function refresh(again) {
  const current = view;
  if (!current) return;
  try {
    await current.load(again);
    if (current !== view) return;
    current.ready = true;
    redraw();
    if (Date.now() > sayUntil) say("live", 0);
  } catch (error) {
    if (current !== view) return;
    fail(error);
    if (!current.ready && !error.token) main.replaceChildren(make("p", {class: "note"}, error.message));
  }
}

let timer = 0,
  ticks = 0;
function later() {
  clearTimeout(timer);
  timer = setTimeout(
    async () => {
      // Time passes without a commit, too: the rates fall, and a worker may die.
      if (!document.hidden && !dialog.open) await refresh(++ticks % 5 === 0);
      later();
    },
    view ? view.every : 1000,
  );
}

async function show() {
  const [path, text] = (location.hash.slice(1) || "/").split(/\?(.*)/s);
  if (path.startsWith("/job/")) view = jobView(decodeURIComponent(path.slice(5)));
  else if (path === "/jobs") view = jobsView(new URLSearchParams(text || ""));
  else if (path === "/dead") view = deadView();
  else view = overview();
  for (const link of document.querySelectorAll("nav a")) {
    const current = link.getAttribute("href") === "#" + path;
    current ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current");
  }
  document.title = escaped(view.title) + " – queuectl";
  main.replaceChildren(make("p", {class: "dim"}, "Loading …"));
  await refresh(true);
  later();
}

addEventListener("hashchange", () => {
  if (location.hash !== "#main") {
    show();
    main.focus();
  }
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) refresh(true);
});
show();
</script>
</body>
</html>
"""


@subcommand("web", "show the queue in a browser, until Ctrl-C", """
queuectl web
queuectl web --read-only --token-file ~/.queuectl/token
ssh -L 8437:127.0.0.1:8437 server queuectl web      then open the address that it prints
""",
    option("--port N", "listen on this port (default: 8437)", type=whole("--port", 65535),
           default=8437),
    option("--host NAME", "listen on this address, and answer to this name (default: 127.0.0.1)",
           default="127.0.0.1"),
    option("--read-only", "show the queue, but let nobody change it"),
    option("--token-file PATH", "read the token from a file, which is made if it is missing"),
    writes=True)
def cmd_web(args: Any) -> int:
    from threading import Semaphore
    start_compiled()
    if exists(args.db) and not args.read_only:
        args.store.close()  # migrated now; else each request would copy an older database
    token = read_token(args.token_file)
    host = args.host.strip("[]").lower()
    hosts = {"localhost", "127.0.0.1", "::1", host}
    try:
        gates = [Semaphore(count) for count in AT_ONCE]
        site = Site(args.db, token, hosts, args.read_only, {}, gates)
        server = page_server(site, (host, args.port))
    except (OSError, UnicodeError) as error:
        raise QueueError("can't listen on %s port %d: %s; --port and --host name others"
                         % (host, args.port, error)) from None
    if host not in ("localhost", "127.0.0.1", "::1"):
        complain("this is plain HTTP: others in the network can read the token; put a proxy with "
                 "TLS before it, or use `ssh -L`")
    name = "[%s]" % host if ":" in host else host
    secret = "" if args.token_file else "#token=" + token
    emit("http://%s:%d/%s" % (name, args.port, secret))
    sys.stdout.flush()
    server.serve_forever(0.2)
    return EXIT_OK


# ═══ main ═══ arguments in, exit code out ════════════════════════════════════════════════════

LONGEST_NAME = 220  # bytes of a database's file name; the system's limit is 255
OVERVIEW = """\
usage: queuectl [--db PATH] %(group)sCOMMAND ...

%(about)s
%(commands)s

Examples:
%(examples)s

`queuectl help COMMAND` shows the options of a command.

The database is --db PATH, else $QUEUECTL_DB, else ~/.queuectl/queue.db; it is made on first use.
Tested on Linux; for Windows in wine alone, for macOS not at all. In cmd.exe write " instead of '.
"""
ABOUT = "Background job queue in one file: runs shell commands, retries failures, loses nothing."
EXAMPLES = """
queuectl run 'echo hello' 'date -u'
queuectl enqueue 'echo hello'
queuectl worker start --count 4
queuectl status
"""


class Arguments(argparse.Namespace):
    """The arguments of a command, and the store of its database, opened at its first use."""

    tag = False  # see `run`
    pipe = 0
    opened: Store | None = None

    @property
    def store(self) -> Store:
        if self.opened is None:
            self.opened = open_store(self.db, reading=not self.writes)
        return self.opened


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        word = re.sub(".*: |[ =].*", "", message)
        known = [*self._option_string_actions, "COMMAND"]
        raise UsageError("%s%s; see `%s --help`" % (message, nearest(word, known), self.prog))

    def _print_message(self, message: str, file: Any = None) -> None:
        emit_text(message)


# The titles under which help shows the options of a command that has many.
TITLES = {
    "Selection": "--state QUEUE[,QUEUE] --grep --error --since --before --all",
    "Job": "--id --queue --priority --after --after-any --unique --if-exists",
    "Schedule": "--cron --every --utc --if-running --if-missed "
                "--run-at --delay --expires --timeout",
    "Retries": "--max-retries --backoff-base --retry-after --dead-on",
    "Environment": "--cwd --shell --env --env-all",
    "Output": "--unordered --tag --tail --stdout --stderr -f -q --json",
}
MANY_OPTIONS = 8


def _add_titled(parser: Parser, options: Sequence[Any]) -> None:
    """Give a parser many options, each under its title, and a short usage."""
    usage = parser.format_usage().replace("[-h]", "[OPTIONS]")  # now it has only the arguments
    parser.usage = usage.partition(": ")[2].strip()
    groups = {title: parser.add_argument_group(title) for title in TITLES}
    for names, details in options:
        group: Any = parser
        for title, members in TITLES.items():
            if {names[0], details.get("metavar")} & set(members.split()):
                group = groups[title]
                break
        group.add_argument(*names, **details)


def parser_of(entry: Command) -> Parser:
    """Return the parser of one command; the other parsers are never built."""
    width = (terminal_width() or 80) - 2  # argparse would import shutil to ask for it
    parser = Parser(
        prog="queuectl " + entry.name, description=entry.summary + ".", allow_abbrev=False,
        epilog="Examples:" + entry.examples.rstrip().replace("\n", "\n  "),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=width))
    parser._optionals.title, parser._positionals.title = "Options", "Arguments"
    options = sorted(entry.options, key=lambda each: each[0][0].startswith("-"))  # arguments first
    for at, (names, details) in enumerate(options):
        if names[0].startswith("-") and len(options) - at > MANY_OPTIONS:
            _add_titled(parser, options[at:])
            break
        parser.add_argument(*names, **details)
    parser.add_argument("--db", metavar="PATH", default=argparse.SUPPRESS, help="the database")
    return parser


def _overview_line(word: str, summary: str) -> str:
    return "  %-15s %s" % (word, summary)


def overview(group: str = "") -> str:
    """Return the help of queuectl itself, or of a group of commands."""
    shown = commands_of(group)
    lines = ["", *[_overview_line(entry.name, entry.summary) for entry in shown]]
    if not group:
        lines = []
        for purpose, words in PURPOSES.items():
            lines.append("\n%s:" % purpose)
            for word in words.split():
                summary = GROUPS.get(word) or COMMANDS[word].summary
                lines.append(_overview_line(word, summary))
    examples = "".join(entry.examples for entry in shown) if group else EXAMPLES
    return OVERVIEW % {
        "about": GROUPS.get(group, ABOUT),
        "group": group and group + " ",
        "commands": "\n".join(lines),
        "examples": "\n".join("  " + line for line in examples.split("\n") if line),
    }


def _command_name(words: list[str]) -> tuple[str, list[str]]:
    """Return the command's name and the words behind it; "" after showing a group's help."""
    name = words[0]
    if name in GROUPS:
        if words[1:2] in ([], ["-h"], ["--help"]):
            emit_text(overview(name))
            return "", []
        name = " ".join(words[:2])
    if name not in COMMANDS:
        group = ""
        if words[0] in GROUPS:
            group = words[0] + " "
        known = [entry.name[len(group):] for entry in commands_of(group.strip())]
        raise UsageError("there is no command %s%s; `queuectl %s--help` lists them"
                         % (quoted(name), nearest(name[len(group):], known, group), group))
    return name, words[name.count(" ") + 1:]


def split_arguments(words: list[str]) -> tuple[str | None, str, list[str]]:
    """Return a --db before the command, the command's name ("": help was shown), its words."""
    db = None
    words = words or ["--help"]
    while words and (words[0].startswith("-") or words[0] == "help"):
        word = words.pop(0)
        if word == "--db" and words:
            db = words.pop(0)
        elif word.startswith("--db="):
            db = word[5:]
        elif word == "help":
            words = [*words[:2], "--help"]
        elif word in ("-h", "--help"):
            emit_text(overview())
            return db, "", []
        elif word == "--version":
            emit("queuectl " + VERSION)
            return db, "", []
        else:
            raise UsageError("%s is no option of queuectl, or lacks its value; "
                             "see `queuectl --help`" % word)
    if not words:
        raise UsageError("name a command; `queuectl --help` lists them")
    return (db, *_command_name(words))


def refuse_late_option(name: str, options: list[str], rest: list[str], behind: int,
                       lengths: dict[str, int]) -> None:
    """Raise UsageError if an option of queuectl stands among the words of a command.

    Looks at the words from `behind` on. The error shows both forms: with the option given to
    queuectl, and with the option given to the command.
    """
    for place, word in enumerate(rest):
        length = length_of(word, lengths)
        if place >= behind and length:
            end = place + length
            others = rest[:place] + rest[end:]
            ours = join_words([*name.split(), *options, *rest[place:end], *others])
            theirs = join_words([*name.split(), *options, "--", *rest])
            raise UsageError(
                "%s stands behind the command: if it is meant for queuectl, write `queuectl %s`; "
                "if it is meant for the command, `queuectl %s`" % (word, ours, theirs))
    first, second = rest[:2]
    if second.startswith("-") and " " in first and first[0] != "{":
        raise UsageError("%s is no option of queuectl %s%s; put -- before what is not for queuectl"
                         % (second, name, nearest(second, lengths)))


def end_of_options(words: list[str], at: int, lengths: dict[str, int]) -> int:
    """Return the index of the first word after the options that begin at index `at`."""
    while words[at:] and words[at].startswith("-") and words[at] not in ("-", "--"):
        at += length_of(words[at], lengths) or 1
    return at


def split_enqueue(entry: Command,
                  words: list[str]) -> tuple[list[str], list[str], bool]:
    """Return the options of `enqueue` or `run`, the command's words, and whether they followed --.

    Options stand before the first word, or on either side of a single word. Behind a word that may
    be a program only options of a job may stand; others may be meant for the program. Words behind
    the first of several belong to the command; argparse would take them for options.
    """
    lengths = {"--db": 2, "-h": 1, "--help": 1, **option_lengths(entry.options)}
    own = lengths
    at, behind = end_of_options(words, 0, lengths), 1
    if entry.name == "schedule set":  # its first word is the name; options may follow that too
        at = end_of_options(words, at + 1, lengths)
    options, rest = words[:at], words[at:]
    if rest[:1] == ["--"]:
        return options, rest[1:], True
    if rest and re.fullmatch(r"[^{-]\S*", rest[0]):
        own = {"--queue": 2, **option_lengths(JOB_OPTIONS)}
    while rest[behind:] and length_of(rest[behind], own):
        behind += length_of(rest[behind], own)
    if behind >= len(rest):
        return options + rest[1:], rest[:1], False
    if not length_of(rest[behind], lengths):
        behind = 1
    refuse_late_option(entry.name, options, rest, behind, lengths)
    return options, rest, False


def search_path() -> list[str]:
    """Return the folders of PATH."""
    return os.environ.get("PATH", "").split(os.pathsep)


def own_python() -> str:
    """Return the Python that runs this, by its bare name if PATH finds it."""
    name = os.path.basename(sys.executable)
    found = [join(folder, name) for folder in search_path()]
    first = next(filter(os.path.exists, found), "")
    if first and os.path.samefile(first, sys.executable):
        return name
    return join_words([sys.executable])


def own_name() -> str:
    """Return how the user called this program (module, launcher or script), for pasting."""
    spec, path = sys.modules["__main__"].__spec__, sys.argv[0]
    if spec is not None and spec.name == "queuectl":
        return own_python() + " -m queuectl"
    if os.path.basename(path) not in ("", "-", "queuectl"):
        return own_python() + " " + join_words([path])
    found = dirname(path) in ("", *search_path())
    return "queuectl" if found else join_words([path])


def database_path(given: str | None, needed: bool) -> str:
    """Return the path of the database: from --db, the environment, or the home folder.

    It is the real path without links: the files beside the database must be the same for every
    process. Raises UsageError for an impossible path, QueueError if there is no home folder.
    """
    if given == "" or (given or "").endswith(os.sep):
        raise UsageError("--db needs the path of a database, which is a file")
    if given:
        if len(os.fsencode(os.path.basename(given))) > LONGEST_NAME:
            raise UsageError("the database's name is too long: "
                             "the files beside it have longer names")
        CALLED[0] += " --db " + join_words([given])
    path = given or os.environ.get("QUEUECTL_DB") or ""
    if needed and not path:
        path = join(home_folder("a database with --db or QUEUECTL_DB"),
                            ".queuectl", "queue.db")
    try:
        return realpath(expanduser(check_text("--db", path)))
    except UnicodeEncodeError:
        raise UsageError("%s can't be named in this locale; set LC_ALL=C.UTF-8" % path) from None


def parse(argv: list[str]) -> tuple[Command | None, Any]:
    """Return the command and its arguments; None, None after showing help."""
    CALLED[0] = own_name()
    db, name, words = split_arguments(list(map(as_utf8, argv)))
    if not name:
        return None, None
    chosen = COMMANDS[name]
    takes_command = name in ("enqueue", "run", "schedule set")
    given: list[str] = []
    literal = False
    if takes_command:
        words, given, literal = split_enqueue(chosen, words)
    words = [check_text("the argument", word) for word in words]
    args = parser_of(chosen).parse_args(words, Arguments(writes=chosen.writes))
    if takes_command:
        args.words, args.literal = given, literal
    needed = chosen.run not in (cmd_install, cmd_uninstall)
    args.db = database_path(getattr(args, "db", db), needed)
    return chosen, args


def end_as_pipe_reader_wants() -> int:
    """End as `ls | head` does: quietly, by SIGPIPE."""
    mute(1)
    if not WINDOWS:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGPIPE)
    return EXIT_FAILED


def fail(error: Exception, code: int) -> int:
    """Write an error in one line; return the exit code."""
    if os.environ.get("QUEUECTL_DEBUG"):
        sys.excepthook(*sys.exc_info())
    complain("error: %s" % error)
    return code


def prepare_streams() -> None:
    """Let the standard streams carry any text, and write it in large pieces."""
    stdout = sys.stdout
    if stdout is not None and not hasattr(stdout.buffer, "raw"):  # PYTHONUNBUFFERED: a write a line
        sys.stdout = open(1, "w", encoding=stdout.encoding, closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def run_command(argv: list[str]) -> int:
    """Run one command line; return its exit code.

    Every expected failure ends here as one line on stderr.
    """
    prepare_streams()
    code = EXIT_OK
    try:
        system.keep_standard_streams()
        try:
            entry, args = parse(argv)
            if entry is not None:
                code = entry.run(args) or EXIT_OK
        except SystemExit:  # argparse has shown the help
            pass
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except QueueError as error:
        return fail(error, error.code)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return end_as_pipe_reader_wants()
    except OSError as error:
        mute(1)
        return fail(error, EXIT_FAILED)
    except Exception:
        sys.excepthook(*sys.exc_info())
        complain("this is a bug in queuectl %s; please report it with the lines above" % VERSION)
        return EXIT_BUG


def main(argv: list[str] | None = None) -> int:
    """Run one command line (without the program's name; default: sys.argv's)."""
    import gc
    if hasattr(gc, "freeze"):  # code lives to the end; if gc skips it, the exit is faster
        gc.freeze()
    code = run_command(sys.argv[1:] if argv is None else argv)
    if not close_stores():
        os._exit(code)
    return code


def exit_at_once(code: int) -> NoReturn:
    """End the process without Python's cleaning up, except under a profiler or debugger."""
    import atexit
    try:
        if sys._getframe(1).f_back is None:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    except (AttributeError, OSError, ValueError):
        pass  # sys.exit reports what can't be written; or this Python lacks such a function
    sys.exit(code)


if __name__ == "__main__":
    exit_at_once(main())
