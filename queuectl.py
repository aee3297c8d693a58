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

and `cancelled`: what a person took out, what expired, and what was to run after it.

How a job flows. `enqueue` inserts a row, commits, and rings the bell of every
worker. A worker locks the files that will take the run's output (these locks
are the run's token), claims the row in a transaction, starts the command with
those files as its output, and sleeps until it ends. One commit then records
the outcome and claims the next job.

How nothing gets lost, and nothing runs twice. A worker holds a lock (its life
lock) that the kernel drops when the process dies, however it dies. The token
is inherited by the job's processes and is dropped when the last one is gone.
A job whose worker's life lock is free was lost; what is left of its run is
ended first, and only then is it given back. No lease, no heartbeat, no clock,
no process id is trusted for this.

Beside the database `queue.db` stand `queue.db-wal` and `queue.db-shm` (SQLite's
own), `queue.db.lock` (the write mutex) and the folder `queue.db.d` (life locks,
bells, the output of current runs, the locks of recovery and of sweeping).

Contents, in reading order; a section calls only those above it:

    Vocabulary   states, the fields of a job, exit codes, errors, settings and limits
    Values       durations, times, backoff, checks of job input: pure functions
    Platform     processes, signals, locks, bells and the disk; POSIX and Windows
    Files        what stands beside the database: paths, bells, life files, output of live runs
    Schema       the tables, their migrations, and the statements that several use
    Database     the file: trust, opening, the mutex, commits, what is on disk, copies
    Store        what is read of the queue, jobs and the runs kept; each change of state
    Runner       one run's processes: start, bound and end them
    Worker       claim, run, record; when a run must end; recovery after dead workers
    Console      what is printed: where, how wide, with what escaped
    Pool         the supervisor: start, watch, replace and stop workers
    Views        rows to text or JSON: pure functions
    Commands     what a user types, each beside its options: reading, changing, working, setup
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

TYPE_CHECKING = False  # the name type checkers know; typing itself is slow to import
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
    Lines = Iterator[tuple[int, str]]  # each with its number
    Given = Iterator[tuple[int, str | Row]]  # what was given as jobs, each with its line

PENDING, PROCESSING, COMPLETED, FAILED, DEAD, CANCELLED = STATES = (
    "pending", "processing", "completed", "failed", "dead", "cancelled")
UNFINISHED = PENDING, PROCESSING, FAILED
WAITING, ENDED = (PENDING, FAILED), (COMPLETED, DEAD, CANCELLED)
# A job ends in vain if it fails too often, if a person takes it out, or if it was to run after one
# of those.
IN_VAIN = DEAD, CANCELLED
# How a run can end besides completed, failed and cancelled: queuectl itself ended it to shut down,
# its worker was lost, or it asked to be tried again later.
STOPPED, LOST, DEFERRED = "stopped", "lost", "deferred"
UNSTARTED = "unstarted"  # the machine had no room for it: that was no run, and nothing is recorded
TRY_LATER = 75  # the exit code that asks for it: EX_TEMPFAIL of sysexits.h

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_BUG, EXIT_TIMED_OUT, EXIT_INTERRUPTED = 0, 1, 2, 3, 124, 130
# Of workers, which the pool replaces: a signal of its own sent it home; the machine failed it.
EXIT_DISMISSED, EXIT_TROUBLED = 10, 11

# The fields of a job as users see them, in the order they are shown in. What ends in `_at` is a
# time: milliseconds since the epoch, and ISO 8601 in JSON. A new field also goes to GIVEN_FIELDS
# (and EDITABLE), LIMITS and _checked_field, MIGRATIONS, ADD_JOB and Intake._row, SELECT_JOBS and
# FIELD_OPTIONS; if its run needs it, to Job, next_job and HELD_JOBS.
FIELDS = tuple("""
    id command shell state queue priority run_at timeout_seconds attempts max_retries backoff_base
    cwd env after after_any unique retry_after dead_on expires_at created_at updated_at started_at
    finished_at next_retry_at exit_code last_error locked_by locked_at
    """.split())  # noqa: SIM905
# Columns that `edit` changes to what is given.
EDITABLE = """
    command shell queue priority run_at timeout_seconds max_retries backoff_base expires_at
    """.split()  # noqa: SIM905
# What exit codes mean for a job. These are kept together, for few jobs have any.
POLICY_FIELDS = ("retry_after", "dead_on")
GIVEN_FIELDS = tuple("""
    id command shell queue priority run_at timeout_seconds max_retries backoff_base cwd env
    after after_any unique expires_at retry_after dead_on
    """.split())  # noqa: SIM905
ALIASES = {"cmd": "command", "timeout": "timeout_seconds", "delay": "run_at",
           "expires": "expires_at"}

RUN_QUEUE = "run-%s"  # the queues that `run` makes: run-1, run-2, …
MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000  # in milliseconds
HOOK_QUEUE = "on-dead"  # where the jobs wait that `on_dead` and `on_end` make; every pool serves it
HOOK_TIME, HOOK_PRIORITY = 60.0, 0  # their time-out in seconds, and that they go before other jobs

# The environment variables a job is given; nobody else may set them.
JOB_VARIABLES = ("QUEUECTL_JOB_ID", "QUEUECTL_ATTEMPT", "QUEUECTL_MAX_RETRIES",
                 "QUEUECTL_QUEUE", "QUEUECTL_DB", "QUEUECTL_RUN", "QUEUECTL_SLOT")

CENTURY = 100 * 365.25 * 86400.0  # seconds; longer durations are taken for mistakes
NAME_LENGTH = 128

Limit = namedtuple("Limit", "shape low high default", defaults=(None, None, None))
# What is sound for settings and for fields of jobs, and the defaults of settings.
LIMITS = {
    "max_retries": Limit("whole number", 0, 10**6, 3),
    "backoff_base": Limit("number", 0.001, 10**6, 2.0),
    "backoff_max": Limit("duration", 0, CENTURY, 3600.0),
    "backoff_jitter": Limit("number", 0, 10, 0.0),
    "timeout_seconds": Limit("duration", 0.001, CENTURY),
    "priority": Limit("whole number", -10**9, 10**9, 10),
    "poll_interval_ms": Limit("whole number", 10, 3_600_000, 1000),
    "kill_grace_seconds": Limit("duration", 0, 86400, 5.0),
    # A worker takes several times that much memory.
    "max_output_bytes": Limit("whole number", 1024, 64 * 1024 * 1024, 1024 * 1024),
    "retry_after": Limit("duration", 0, CENTURY, 60.0),
    "max_deferrals": Limit("whole number", 0, 10**6, 100),
    "keep_completed": Limit("duration", 0, CENTURY, 30 * 86400.0),
    "keep_dead": Limit("duration", 0, CENTURY),
    "keep_history": Limit("duration", 0, CENTURY, 30 * 86400.0),
    "on_dead": Limit("shell command"),
    "on_end": Limit("shell command"),
}
SETTINGS: Row = {name: limit.default for name, limit in LIMITS.items()}  # and `shell`: Platform's
RUN_OUTPUT = 64 * 1024 * 1024  # bytes of output kept of a job of a `run`, unless that is set
LIMITS.update(
    delay=Limit("duration", 0, CENTURY),
    dead_on=Limit("whole number", 1, 2**32 - 1),  # exit codes; Windows has long ones
)


def test_point(place: str) -> None:
    """Nothing. Tests put a function here that kills the process at one of these places."""


def clean(text: str) -> str:
    """`text` with control characters, escape sequences and bidirectional marks shown escaped."""
    if text.isprintable():
        return text
    shown = list(text)
    for place, c in enumerate(text):
        if not c.isprintable():
            shown[place] = c.encode("unicode_escape", "surrogatepass").decode()
    return "".join(shown)


class QueueError(Exception):
    """The request could not be met. Its text says what to do next, and is safe on a terminal."""
    code = EXIT_FAILED

    def __str__(self) -> str:
        return clean(super().__str__())


class UsageError(QueueError):
    """Wrong usage or bad input."""
    code = EXIT_USAGE


class TimedOut(QueueError):
    """A `--timeout` of queuectl's own ran out."""
    code = EXIT_TIMED_OUT


class Unavailable(QueueError):
    """The database can't be written now, but perhaps later: locked, or the disk is full."""


# A claimed job, as its worker knows it; `seq` is its place in the order of arrival, `since` the
# moment from which it could have been claimed.
Job = namedtuple("Job", "seq id command queue attempts runs max_retries timeout_seconds "
                        "backoff_base context env policy deferrals chained shell since place "
                        "started_at")
# How a run ended. `error` says why it failed; `finished_at` is in milliseconds since the epoch,
# `seconds` was measured by the monotonic clock; `final`: its exit code says not to try again.
RunResult = namedtuple("RunResult", "job ending exit_code error finished_at seconds stdout stderr "
                                    "worker final", defaults=[False])
# Which jobs a command is for: those that fit all of what is given. `states` and `queues` are names
# (none: all), `grep` stands in the command or id, `error` in the last error; `since` and `before`
# (milliseconds) are when a job ended or, where it has not, was last changed.
Selection = namedtuple("Selection", "states queues grep error since before",
                       defaults=((), (), None, None, None, None))

# ═══ Values ═══ durations, times, backoff, checks of job input: pure functions ═══════════════

UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
# Patterns are compiled when they are first needed: each would take a millisecond at every start.
_NUMBER = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"
_WHOLE = r"[+-]?[0-9]{1,20}"
_PART = r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|d)"
_TIME = (r"(\d{4})-(\d\d)-(\d\d)(?:[T ](\d\d):(\d\d)(?::(\d\d)(?:[.,](\d{1,9}))?)?)?"
         r"\s*(?:Z|z|([+-])(\d\d):?(\d\d))?")


def to_number(value: Any) -> float:
    """The number that `value` (int, float or text) stands for, or ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(value)
    if isinstance(value, str) and not re.fullmatch(_NUMBER, value):
        raise ValueError(value)
    return float(value)


def to_whole(value: Any) -> int:
    """The whole number that `value` (int, integral float or text) stands for, or ValueError."""
    if isinstance(value, str):
        if not re.fullmatch(_WHOLE, value):
            raise ValueError(value)
    elif to_number(value) % 1:
        raise ValueError(value)
    return int(value)


def to_duration(value: Any) -> float:
    """Seconds from a number (`90`, `1.5`) or text with units (`500ms`, `1h30m`), or ValueError."""
    if not isinstance(value, str) or re.fullmatch(_NUMBER, value):
        return to_number(value)
    parts = re.findall(_PART, value)
    if not parts or "".join(number + unit for number, unit in parts) != value:
        raise ValueError(value)
    return sum(float(number) * UNITS[unit] for number, unit in parts)


SHAPES: dict[str, Callable[[Any], Any]] = {
    "whole number": to_whole, "number": to_number, "duration": to_duration}


def show_number(value: float) -> str:
    """A number as short as it can be written: 3 for 3.0."""
    return str(int(value)) if value == int(value) else repr(value)


def count_of(number: int, noun: str) -> str:
    """`1 job`, `2 jobs`."""
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
    """`text` in at most `width` characters."""
    return text if len(text) <= width else text[:width - 3] + "..."


def quoted(value: Any, width: int = 60) -> str:
    """A value as it stands in JSON, safe for any terminal: what an error message shows."""
    try:
        return shorten(json.dumps(value), width)
    except (TypeError, ValueError, RecursionError):
        return type(value).__name__


def checked(name: str, value: Any, called: str = "") -> Any:
    """`value` as the number or duration (in seconds) that `name` in LIMITS asks for.

    Raises UsageError, with the bounds, for anything else: nan, infinity, true, 2**63, "abc";
    it speaks of `called`, by default of `name`.
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
    """The setting called `text` (with `-` or `_`), or UsageError with the nearest name."""
    name = text.replace("-", "_")
    if name not in SETTINGS:
        raise UsageError("there is no setting %s%s; `queuectl config show` lists them"
                         % (quoted(text), nearest(name, SETTINGS)))
    return name


def show_setting(value: Any) -> str:
    """The value of a setting as `config set` takes it."""
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
    """A time that was given as a delay from now."""


LAST_TIME = 253_402_300_799_999  # 9999-12-31T23:59:59.999Z


def parse_time(text: Any, now: int, name: str = "run_at") -> int:
    """Milliseconds since the epoch from ISO 8601 (UTC where no offset stands) or `now+5m`.

    `now` is in milliseconds. A fraction of a millisecond is rounded up: a job never starts before
    its time. Raises UsageError for anything else.
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
    return "%04d-%02d-%02dT%02d:%02d:%02d" % time.gmtime(second)[:6]


def show_time(millis: int) -> str:
    """UTC as `2026-01-31T10:00:00.000Z` from milliseconds since the epoch."""
    return "%s.%03dZ" % (_show_second(millis // 1000), millis % 1000)


def show_duration(seconds: float) -> str:
    """7ms, 0.56s, 12.3s, 5m 3s, 2h 7m, 3d 4h."""
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
    """Seconds until the next try: `base ** attempts`, at most `longest`, plus jitter.

    `jitter` is the share of the delay that may come on top, `chance` (0 to 1) how much of it does.
    """
    try:
        delay = min(base ** attempts, longest)
    except OverflowError:
        delay = longest
    return delay * (1 + jitter * chance)


def next_state(ending: str, attempts: int, max_retries: int,
               final: bool = False) -> tuple[str, int]:
    """The job's next state and its attempts, after the run `attempts` ended as `ending`.

    A run that queuectl ended to shut down gives its attempt back, and so do one that asked to be
    tried later and one that there was no room for. A `final` failure is not tried again.
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


# What differs between errors that have one cause: quoted text, paths and names of files,
# hexadecimal and other numbers.
VARYING = (
    r"""'[^']*'|"[^"]*"|`[^`]*`"""
    r"|(?:[A-Za-z]:)?(?:[\w.+~@%-]*[/\\])+[\w.+~@%-]*"
    r"|\b[\w+-]+\.[A-Za-z]\w{0,7}\b(?!\()"
    r"|\b0x[0-9a-fA-F]+\b|\b(?=[0-9a-f]*\d)[0-9a-f]{7,}\b"
    r"|\d+(?:[.,:]\d+)*")


def cause_of(error: str) -> str:
    """What errors of one cause have in common: what varies is `…`, how the run ended stays."""
    ending = re.match(r"(exit code|signal|killed by signal) \d+", error)
    head = ending.group() if ending else ""
    return head + re.sub(VARYING, "…", error[len(head):])


def is_run_queue(name: str) -> bool:
    """Whether a queue is called as those are that `run` makes."""
    return re.fullmatch(RUN_QUEUE % "[0-9]+", name) is not None


def output_limit(settings: Settings, queue: str, in_run: bool = False) -> int:
    """How many bytes of each stream of a job's run are kept; of a `run` more than of others."""
    name = "max_output_bytes"
    if in_run or is_run_queue(queue):
        name = "run_output_bytes"
    return int(settings[name])


def policy_of(job: Any) -> Row:
    """Those of the POLICY_FIELDS that were given for a claimed job."""
    return json.loads(job.policy or "{}")  # type: ignore[no-any-return]


def last_line(output: bytes, width: int = 300) -> str:
    """The last line with something on it, shortened: the part of stderr that says why."""
    lines = output[-4096:].decode("utf-8", "replace").strip().split("\n")
    return shorten(lines[-1].strip(), width)


# A word of plain characters, or in the quotes that queuectl itself puts around words.
_PLAIN_WORD = r"""(?a:[\w@%+=:,./-]|'[^'\0-\x1f\x7f]*'|"'")+"""
_PLAIN_COMMAND = r"%s(?:[ \t]%s)*" % (_PLAIN_WORD, _PLAIN_WORD)
# What a shell does itself, or reads more into than a program's name: the reserved words and
# builtins of dash, bash, busybox, zsh, and of the sh of the BSDs, illumos (ksh93), AIX (ksh88).
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
# Variables that shells set anew or take out (names that none can have, too), or that tell them what
# to do: those of all, and those of others than dash and busybox. Found by trying all names in them.
_OWN_VARIABLES = rb"(?!(?:IFS|OPTIND|PPID%s)\Z)[A-Za-z_]\w*"
_OTHER_VARIABLES = (
    rb"|BASH\w*|COMP_WORDBREAKS|ENV|EPOCH\w+|EXECIGNORE|FPATH|HISTCMD|KSH\w*|LINENO|OPT\w+|PATHSEP"
    rb"|PGRP|PIPESTATUS|POSIXLY_CORRECT|PS[124]|S?RANDOM|SECONDS|SHELLOPTS|USER_ID")


@lru_cache(16)
def _leaves_alone(shell: str, names: tuple[bytes, ...]) -> bool:
    """Whether a shell would pass on the variables of these names as they are, and heed none."""
    others = b"" if shell.endswith(("/dash", "/busybox")) else _OTHER_VARIABLES
    return all(re.fullmatch(_OWN_VARIABLES % others, name) for name in names)


def words_without_shell(command: str, shell: str, names: tuple[bytes, ...]) -> list[str]:
    """The words of a command that `shell` would do no more for than start it; [] if it must.

    The `shell` is given by its real path, the environment by its variables' `names`. Whatever
    could mean more to any shell than a program's name is the shell's. So is setsid(1): behind
    one it waits for its program, and without it forks and leaves it alone.
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


# What a shell may read next, outside of quotes and within them, by the name of its kind. A kind
# has its code in _SHELL_CODES, or is refused with the text in _SHELL_REFUSED.
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
    """In which context a shell reads each character of `text`: a string of as many codes.

    ' ' blank between words, 'w' plain character of a word, 'q' quoting that the shell takes away,
    '1' literal within '…', '2' within "…", 'e' after a backslash, '$' parameter, 'o' operator,
    newline, $( or ), '#' comment.
    Raises UsageError for what shells don't read alike, or this doesn't know.
    Source: POSIX, Shell Command Language, 2.2 Quoting, 2.3 Token Recognition, 2.6 Expansions.
    """
    codes, text = "", text + "\n"
    opened: list[str] = []  # the quotes, ( and $( around what comes next
    while len(codes) < len(text):
        innermost = opened[-1] if opened else ""
        pattern = _SHELL_QUOTED.get(innermost, _SHELL_UNQUOTED)
        match = next(re.compile(pattern).finditer(text, len(codes)))
        kind, piece = match.lastgroup or "", match.group()
        if kind in ("case", "comment", "number") and "$(" in opened:
            kind = "inner"  # old versions of bash err about where these end
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


# What may open, close or cut off a part of a line, within "…" and elsewhere. What is whole in itself
# is passed over: it has no `mark`.
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
# The usual line, on which nothing is unfinished, and that is no comment, no JSON and not empty.
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
    """What makes a shell read on behind a line: an open quote or (, <<, a backslash, a last `do`.

    "" if nothing does, or if that is beyond what can be judged here.
    """
    opened, at = "", 0  # what is to close what is open
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
    """A word as a shell reads it, always in quotes."""
    return "'%s'" % word.replace("'", "'\"'\"'")


# What stands for the input in a command for --each, as in GNU parallel: {} all of it, {.} without
# its extension, {/} its last part, {//} its folder, {/.} its last part without extension, {#} the
# number of the job; with --colsep also {1} {2.} …: columns. What else parallel knows is refused.
_PLACE = r"\{(%s)(\.|//|/\.|/|#|)\}"
PLACE, COLUMN_PLACE = re.compile(_PLACE % ""), re.compile(_PLACE % r"(?:[1-9]\d*)?")
_FOREIGN_PLACE = re.compile(r"\{(?:%|=.*?=|\+[./]*|/?\.{2,3}|[-0-9]\d*[./]*)\}")


def with_place(template: str, place: re.Pattern[str] = PLACE) -> str:
    """A template with a {} for the input: at the end, unless it says itself where."""
    return template if place.search(template) else template + " {}"


def _refuse_foreign(found: str) -> NoReturn:
    """Raise UsageError for what parallel would put something in for, and this does not."""
    if found == "{%}":
        raise UsageError("write $QUEUECTL_SLOT instead of {%}")
    advice = "write {} {.} {/} {//} {/.} or {#}"
    if found[1].isdigit():
        advice = "only with --colsep are there columns"
    raise UsageError("--each does not know %s: %s" % (found, advice))


def check_template(template: str, place: re.Pattern[str] = PLACE) -> str:
    """The `template`, a command for --each, if any input put in by `fill` stays part of a word.

    Raises UsageError if a {} is in quotes, in a comment or behind \\ or $, if no command is before
    one that is put at the end, if only parallel knows it, and as shell_contexts does.
    """
    shell_contexts(template)  # on its own too: a {} put at the end must not hide how it ends
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
    """What {} with this form stands for: as parallel has it, `.` takes off the extension."""
    if form == "//":
        return dirname(word.rstrip("/")) or "."
    if form.startswith("/"):
        word = os.path.basename(word)
    return re.sub(r"\.[^/.]*\Z", "", word) if form.endswith(".") else word


def fill(template: str, columns: Sequence[str], number: int,
         quote: Callable[[str], str], place: re.Pattern[str] = PLACE) -> str:
    """The command for one input, the `number`-th: it is put into a checked `template`, in quotes.

    Always in quotes: a shell would read more into a bare `2`, `if` or `a=b` than a word. Without
    --colsep the input is the only column. A column that the input does not have is empty.
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


# What a user hands in as a job is a shell command or a JSON object. The functions below make a
# draft of it: the GIVEN_FIELDS, each checked, and None where nothing was given.

def check_name(kind: str, name: Any) -> str:
    """A sound id or queue name, or UsageError: it is shown everywhere and typed by hand."""
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
    """Text that a command line can carry: no NUL, encodable, or UsageError."""
    if not isinstance(text, str):
        raise UsageError("%s must be text, not %s" % (what, quoted(text)))
    if "\0" in text:
        raise UsageError("%s must not contain a NUL character" % what)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError("%s is not valid UTF-8: %s" % (what, quoted(text))) from None
    return text


def check_command(command: Any, longest: int) -> str:
    """A command the system can run, of at most `longest` bytes, or UsageError."""
    check_text("command", command)
    if not command.strip():
        raise UsageError("command must not be empty")
    size = len(command.encode())
    if size > longest:
        raise UsageError("command is too long: %d bytes, this system takes %d; put it into a script"
                         % (size, longest))
    return str(command)


def check_env(env: Any, hook: bool = False) -> dict[str, str]:
    """Extra environment variables: an object of strings, or UsageError.

    Those that queuectl itself sets are refused, except for a `hook`, which has some of them.
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
    """The value of setting `name` that the text `value` stands for, or UsageError."""
    if value == "none" and (SETTINGS[name] is None or name == "keep_completed"):
        return None
    if name in ("on_dead", "on_end"):
        if not check_text(name, value).strip():
            raise UsageError("%s must be a shell command, or none" % name)
        return value
    return checked(name, value)


def check_key(key: Any) -> str:
    """A sound key of `unique`, or UsageError."""
    most = 8 * NAME_LENGTH
    if not check_text("unique", key).isprintable() or not 1 <= len(key) <= most:
        raise UsageError("unique must be 1 to %d printable characters, not %s"
                         % (most, quoted(key)))
    return str(key)


def check_list(name: str, value: Any, check: Callable[..., Any]) -> list[Any]:
    """A list, also where it is text with commas, each of its entries checked; or UsageError."""
    if isinstance(value, str):
        value = value.split(",")
    elif not isinstance(value, list):
        value = [value]
    return [check(name, entry) for entry in value]


def _checked_field(key: str, name: str, value: Any, now: int, hook: bool) -> Any:
    """The value of field `name` of a job, which was given as `key`."""
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
    """The draft of a job from fields as users name them.

    `now` is in milliseconds, `longest` the longest command in bytes. What only queuectl sets is
    ignored, so that the output of `list --json` can be enqueued again; null means not given.
    Raises UsageError for anything unknown, doubled or unsound.
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
        raise UsageError("the queue %s is for what on_dead and on_end ask for; name another"
                         % HOOK_QUEUE)
    if draft["queue"] and is_run_queue(draft["queue"]):
        if "state" not in fields:
            raise UsageError("the queue %s is that of a run; name another" % draft["queue"])
        draft["queue"] = None
    draft["moved"] = "state" in fields  # then it may have waited for what was left behind
    if fields.get("state") in ENDED:  # what was over there has no claim to the key, and no hurry
        draft["unique"] = draft["expires_at"] = None
    draft["command"] = check_command(draft["command"] or "", longest)
    return draft


def _bounded_int(digits: str) -> int:
    if len(digits) > 20:  # int() takes quadratic time, and no field takes a number this long
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
    """`{id:job1,command:echo hi}`: JSON whose quotes a shell took; None where that is a guess."""
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


CALLED = ["queuectl"]  # how this program was called, for advice that can be pasted


def as_called(text: str) -> str:
    """`text` with the commands it advises as they work here: with the program's path and --db."""
    return text.replace("`queuectl ", "`%s " % CALLED[0])


def shell_word(text: str) -> str:
    """A text as one word of a command; bytes that are no UTF-8 stand in it as octal numbers."""
    import shlex
    word = re.sub("[\udc80-\udcff]",
                  lambda byte: "'\"$(printf '\\%o')\"'" % (ord(byte[0]) - 0xdc00), shlex.quote(text))
    return word.replace("')\"''\"$(printf '", "")  # one process for bytes that stand together


def read_object(text: str) -> Row:
    """The JSON object in `text`, also where a shell took its quotes or doubled its backslashes.

    Raises UsageError, showing what arrived and what works, if it can't be understood.
    """
    try:
        return _STRICT.decode(text)  # type: ignore[no-any-return]
    except ValueError as error:
        problem = error
    except RecursionError:
        raise UsageError("the JSON is nested too deep for a job") from None
    if re.match(r'\{\s*\\"', text):  # `{\"id\":…`: the shell left the backslashes in
        try:
            return _STRICT.decode(re.sub(r'\\(["\\])', r"\1", text))  # type: ignore[no-any-return]
        except (ValueError, RecursionError):
            pass
    bare = _bare_object(text)
    if bare is None:
        shown = shorten(json.dumps(text)[1:-1], 200)
        raise UsageError(
            "this JSON can't be read (%s): %s; write it as '{\"command\":\"echo hello\"}' in "
            "single quotes (in cmd.exe \"{\\\"command\\\":\\\"echo hello\\\"}\"), or put -- before a "
            "shell command that begins with {, in a file a blank behind it" % (problem, shown))
    return bare


# ═══ Platform ═══ processes, signals, locks, bells and the disk; POSIX and Windows ═══════════
#
# The only section that knows the operating system. `Posix` and `Windows` are twins with one
# signature; `system`, at its end, is the one in use. `Bell` and `PollingBell` are twins too.

WINDOWS = os.name == "nt"
SHORTAGES = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)  # processes, memory, files
if TYPE_CHECKING:
    Env = dict[Any, Any]  # environment variables in native form
    Living = dict[int, str]  # living processes by their ids, each with the time it started
LONGEST_WAIT = 1 << 30  # milliseconds; poll(2) knows no infinity
TICK = 0.25  # seconds a write waits in the kernel before it looks at flags and deadlines again
TOKEN_FD = 239  # where a job's processes inherit the token: above what scripts use with flock(1)
NETWORK_FILE_SYSTEMS = (
    "nfs nfs4 cifs smb3 smbfs 9p ceph lustre gpfs afs beegfs davfs virtiofs vboxsf fuse.davfs "
    "fuse.glusterfs fuse.grpcfuse fuse.rclone fuse.s3fs fuse.sshfs")

OPEN_BESIDE = 0  # how files beside the database are opened: no link, no waiting, closed at exec
for _name in ("O_CLOEXEC", "O_BINARY", "O_NOFOLLOW", "O_NONBLOCK"):
    OPEN_BESIDE |= getattr(os, _name, 0)


# What else than `!` a worker hears by its bell; signals ring it with their numbers, up to 64.
STOP_SOON, STOP_NOW = b"S", b"N"


def now_millis() -> int:
    return to_millis(time.time())


class _Tick(Exception):
    """Raised by the alarm that bounds a blocking flock, and by nothing else."""


def _raise_tick(signum: int, frame: FrameType | None) -> NoReturn:
    raise _Tick


# What a process is, as far as a run is concerned: the ids of its parent and its session, when it
# started (a text that is only compared, "" if unknown), and whether it was seen to carry the mark
# of the run or to write to its files.
_Process = namedtuple("_Process", "parent session started marked")


class Leader(namedtuple("Leader", "pid first last")):
    """The first process of a run, whose id is that of its session too.

    It started between the clock ticks `first` and `last`. When it is gone its id can be given to
    a stranger, but only once the session is empty.
    """

    def is_a_stranger(self, entry: _Process | None) -> bool:
        """Whether the process that has its id now is another."""
        if entry is None or not entry.started:
            return False
        return not self.first <= int(entry.started) <= self.last


NOBODY = Leader(0, 0, 0)


def _proc_file(pid: int, name: str) -> bytes:
    """A file in /proc/PID; nothing if the process is gone or another user's.

    Raises OSError where there is no room to look: a process that can't be seen now is not gone.
    """
    try:
        with open("/proc/%d/%s" % (pid, name), "rb") as file:
            return file.read()
    except OSError as error:
        if error.errno in SHORTAGES:
            raise
        return b""


def _proc_stat(pid: int) -> list[bytes]:
    """State, parent, group, session, … from /proc/PID/stat (proc(5)); nothing if it is gone."""
    return _proc_file(pid, "stat").rpartition(b")")[2].split()


def _living(pid: int) -> _Process | None:
    """A process that has not ended."""
    fields = _proc_stat(pid)
    if not fields or fields[0] in (b"Z", b"X"):
        return None
    return _Process(int(fields[1]), int(fields[3]),
                    fields[19].decode(), False)


def _writes_to(pid: int, files: Names) -> bool:
    """Whether a process has one of `files` open for writing; who only reads them is no member."""
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
    """Locks, descriptors, the disk, and whom a file can be trusted with, on POSIX systems.

    A lock (flock) belongs to the open file: whoever inherits the descriptor holds it too, and it
    is free when the last copy is closed, however its holders ended. LOCK_UN would free it under
    all of them, so nothing but the write mutex, which nobody inherits, is ever unlocked.
    """

    linux = sys.platform.startswith("linux")

    def __init__(self) -> None:
        import fcntl
        self.fcntl = fcntl
        self.user = os.geteuid()
        self.read_at, self.write_at = os.pread, os.pwrite

    def try_lock(self, fd: int, shared: bool = False) -> bool:
        """Take the lock on an open file; False if another process holds it. Raises OSError."""
        kind = self.fcntl.LOCK_SH if shared else self.fcntl.LOCK_EX
        try:
            self.fcntl.flock(fd, kind | self.fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False

    def unlock(self, fd: int) -> None:
        """Free the write mutex: the one lock that is never inherited."""
        self.fcntl.flock(fd, self.fcntl.LOCK_UN)

    def wait_lock(self, fd: int) -> None:
        """Wait for a lock for at most a TICK; the caller's next `try_lock` tells if it came.

        The kernel queues who waits, so writers take turns. An alarm whose handler raises ends the
        wait, because handlers that only set flags don't: flock would be resumed after them. The
        alarm may also strike between flock's return and the disarming: nothing is lost then,
        for a lock that is held already can be tried again.
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

    def held(self, path: str) -> bool:
        """Whether a living process holds the lock on a file; also if that can't be found out."""
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
        """The open descriptors but the standard streams; none if they can't be listed."""
        try:
            found = {int(name) for name in os.listdir("/dev/fd")}
        except OSError:
            return set()
        return {fd for fd in found if fd > 2 and self._is_open(fd)}

    def _is_open(self, fd: int) -> bool:
        try:
            os.fstat(fd)
        except OSError:  # that of the listing itself, for one
            return False
        return True

    def keep_standard_streams(self) -> None:
        """Before anything is opened: no file must become a standard stream that was closed."""
        for number in (0, 1, 2):
            if not self._is_open(number):
                os.open(os.devnull, os.O_RDWR)

    # The disk.

    def sync(self, fd: int) -> None:
        """Have the disk keep what was written to a file; macOS has a call of its own for that."""
        if hasattr(self.fcntl, "F_FULLFSYNC"):
            self.fcntl.fcntl(fd, self.fcntl.F_FULLFSYNC)
        else:
            getattr(os, "fdatasync", os.fsync)(fd)

    def read_elsewhere(self, path: str, size: int) -> bytes:
        """The first `size` bytes of a file, read by another process.

        If this process read it, it would lose its locks on the file by closing it again.
        """
        import subprocess
        command = ["head", "-c", str(size), path]
        return subprocess.run(command, stdout=subprocess.PIPE).stdout

    def punch(self, fd: int, start: int, end: int) -> bool:
        """Give back the disk space between two offsets while others go on writing at the end.

        Returns whether the file system can do that.
        """
        libc = self._libc()
        if not libc:
            return False
        import ctypes
        offset, length = ctypes.c_int64(start), ctypes.c_int64(end - start)
        return bool(libc.fallocate(fd, 3, offset, length) == 0)  # PUNCH_HOLE | KEEP_SIZE

    def _libc(self) -> Any:
        """Linux's C library; None elsewhere, and for a Python that was built without libffi."""
        if not self.linux:
            return None
        try:
            import ctypes
        except ImportError:
            return None
        return ctypes.CDLL(None, use_errno=True)

    def refuse_full(self, folder: str) -> None:
        """Raise Unavailable where writing to SQLite's mapped index would end the process.

        Where blocks are smaller than pages of memory, SQLite does not make sure that a page of
        its index has all its blocks before it writes to it: on a full disk that is a SIGBUS.
        """
        disk = os.statvfs(folder)
        if disk.f_bsize < 4096 and disk.f_bavail * disk.f_frsize < 1 << 20:
            raise Unavailable("no space left in %s; free some and try again" % folder)

    def _mounts(self) -> dict[str, str]:
        """The mount points, each with the type of its file system (known on Linux alone).

        Of equal ones the last covers the others.
        """
        try:
            with open("/proc/mounts", encoding="utf-8", errors="surrogateescape") as mounts:
                entries = [line.split(" ")[1:3] for line in mounts]
        except OSError:
            return {}
        unescaped = partial(re.sub, r"\\[0-7]{3}", lambda code: chr(int(code[0][1:], 8)))
        return {unescaped(point): kind for point, kind in entries}  # a blank is written as \040

    def is_mount_point(self, path: str) -> bool:
        """Whether something is mounted at `path` itself."""
        return path in self._mounts()

    def network_file_system(self, folder: str) -> str:
        """The type of the network file system that a folder is on, or nothing."""
        mounts, folder = self._mounts(), realpath(folder)
        while folder not in mounts and folder != "/":
            folder = dirname(folder)
        kind = mounts.get(folder, "")
        return kind if kind in NETWORK_FILE_SYSTEMS.split() else ""

    # Whose a file is, and who else may write it.

    def give_to_owner(self, fd: int, path: str) -> None:
        """A file that root has made is given to the owner of `path`, as SQLite does it."""
        owner = os.stat(path)
        if self.user == 0 and os.fstat(fd).st_uid != owner.st_uid:
            os.fchown(fd, owner.st_uid, owner.st_gid)

    def distrust(self, path: str, above: bool = False) -> str:
        """Why others could change the file or folder `path`, or nothing.

        A group that is known to have no member but this user and root may write it. In a folder
        `above` that of the database others may make names of their own where it is sticky; and
        there a group without a name, as containers are given for a volume, is no threat.
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
        """Whether a list says who may write: then the bits of the group are those of its mask."""
        try:
            return self.linux and bool(os.getxattr(  # type: ignore[attr-defined,unused-ignore]
                path, "system.posix_acl_access"))
        except OSError:
            return False

    def _is_private_group(self, group: int, nameless: bool) -> bool:
        """Whether a group has no member but this user and root; `nameless` if it has no name."""
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
    # Forking takes 2 ms; elsewhere than on Linux system libraries don't survive a fork.
    start_method = "fork" if PosixFiles.linux else "spawn"
    childless = False  # nobody but the run just reaped was left below this process
    subreaper = False
    token_fd = TOKEN_FD

    def __init__(self) -> None:
        super().__init__()
        self.environment = os.environb.copy  # this process's, in native form
        self.ticks_per_second = os.sysconf("SC_CLK_TCK")

    # Before the first job.

    def check_room(self, workers: int) -> None:
        """Raise QueueError if a supervisor can't do its work here, with so many workers."""
        if self.linux and not exists("/proc/%d" % os.getpid()):
            raise QueueError("/proc does not show the processes here, "
                             "so what jobs leave behind could not be ended; mount it")
        if not exists(os.devnull):
            raise QueueError("there is no %s here, which jobs need as their stdin" % os.devnull)
        need, have = 2 * workers + 64, self._most_descriptors()
        if 0 <= have < need:
            raise UsageError(
                "%d workers need %d open files, and this shell allows %d; `ulimit -n %d` first"
                % (workers, need, have, need))

    def _most_descriptors(self) -> int:
        """How many descriptors this process may have; -1 if there is no limit."""
        import resource
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    def prepare_parent(self) -> None:
        """Before workers are forked: load what all need, and keep the caller's files from jobs."""
        self._libc()
        for fd in self.descriptors():
            os.set_inheritable(fd, False)

    def prepare_reporter(self) -> None:
        """The first steps of a run's reporter: it goes on while signals stop the pool.

        But it ends, as `ls` does, when nobody reads what it shows.
        """
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)

    def prepare_worker(self, supervisor: int) -> None:
        """A worker's first steps: out of the terminal's reach, told of its supervisor's death."""
        os.setsid()
        os.umask(0o077)
        limit = self._most_descriptors()
        if 0 <= limit <= TOKEN_FD:
            self.token_fd = limit - 1
        self.to_default = list(signal.valid_signals())  # jobs ignore and block none
        self.null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)  # the stdin of jobs
        self.real_shell = realpath(self.shell)
        libc = self._libc()
        if libc:  # PR_SET_PDEATHSIG and PR_SET_CHILD_SUBREAPER of prctl(2)
            libc.prctl(1, int(signal.SIGHUP), 0, 0, 0)
            self.subreaper = libc.prctl(36, 1, 0, 0, 0) == 0
        if os.getppid() != supervisor:  # it died before the line above: no signal will come
            os.kill(os.getpid(), signal.SIGHUP)

    def orphaned(self, supervisor: int, life: str) -> bool:
        """Whether a worker's supervisor has died."""
        return os.getppid() != supervisor

    def place(self) -> str:
        """What process ids and start times are counted in; "" if that is not known.

        It is this start of the machine, and the namespace of process ids.
        """
        try:
            with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as boot:
                return "%s/%s" % (boot.read().strip(), os.readlink("/proc/self/ns/pid"))
        except OSError:
            return ""

    def ticks(self) -> int:
        """Now, in the unit of start times in /proc/PID/stat."""
        if sys.platform != "linux":
            return 0
        return int(time.clock_gettime(time.CLOCK_BOOTTIME) * self.ticks_per_second)

    # A run begins.

    def native(self, text: str) -> Any:
        """Text as the system takes it: UTF-8, whatever the locale says."""
        return text.encode("utf-8", "surrogateescape")

    def spawn(self, command: str, shell: str, env: Env, cwd: str, umask: int,
              out: int, err: int) -> int:
        """Start `command` in a session of its own; return its process id, or raise OSError.

        A shell would take most of a short command's time. posix_spawn is twice as fast as
        subprocess. It can't set folder or umask, so the worker takes them on for a moment; nothing
        is imported or opened by relative path meanwhile.
        """
        os.umask(umask)
        try:
            os.chdir(self.native(cwd))
            streams = {0: self.null, 1: out, 2: err, self.token_fd: err}
            pid = shell == self.shell and self._spawn_directly(command, env, streams)
            if pid:
                return pid
            if command[0] in "-+":  # a shell would take it for an option
                command = " " + command
            argv = [self.native(shell), "-c", self.native(command)]
            return self._spawn(argv[0], argv, env, streams)
        finally:
            os.chdir("/")
            os.umask(0o077)

    def _spawn_directly(self, command: str, env: Env, streams: dict[int, int]) -> int:
        """Start a command that needs no shell; 0 if it does.

        What can't be started (it is not there, no program, or a script without #!) is the shell's
        too: it runs the script, or says in its own words what is wrong.
        """
        words = words_without_shell(command, self.real_shell, tuple(env))
        if not words:
            return 0
        argv = [self.native(word) for word in words]
        try:
            here, told = os.getcwdb(), env.get(b"PWD", b"")
            if told != here and not (told[:1] == b"/" and os.path.samefile(told, here)):
                env[b"PWD"] = here  # as a shell sets it
            file = self._program(argv[0], env[b"PATH"])
            return self._spawn(file, argv, env, streams)
        except OSError:
            return 0

    def _program(self, name: bytes, path: bytes) -> bytes:
        """The file that a shell would take; raises OSError if it finds none, or shells differ."""
        if b"/" in name:
            return name
        for folder in path.split(b":"):
            if not re.fullmatch(b"/[^%]*[^/%]", folder):  # relative, or with an option to dash
                break
            file = folder + b"/" + name
            if os.access(file, os.F_OK):
                return file
        raise FileNotFoundError(name)

    def _spawn(self, file: Any, argv: list[Any], env: Env, streams: dict[int, int]) -> int:
        """`streams` gives the job's descriptors, each with the one here that it is a copy of."""
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
        child.returncode = 0  # else Popen, when it is forgotten here, would reap the exit code
        return child.pid

    # A run's processes.

    def reap(self, pid: int) -> int | None:
        """Collect dead children; the exit code of `pid` (negative: its signal) if that was one.

        Orphans of earlier runs come to a subreaper too. Sets `childless` if no child is left:
        then a run that failed has left nothing behind, and nobody has to search for it. Raises
        ChildProcessError if `pid` (0: none) is no child any more: somebody else has its exit code.
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
                if status == 0:  # then nobody will ask for `childless`, and strangers can wait
                    return 0
                code = os.WEXITSTATUS(status)
                if os.WIFSIGNALED(status):
                    code = -os.WTERMSIG(status)

    def reap_strangers(self, own: set[int]) -> None:
        """As process 1 of a container: collect dead processes that are not multiprocessing's."""
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
        """The living processes of a run, ancestors first.

        `mark` is how its QUEUECTL_RUN begins (a NUL ends it), `files` its output files, `leader`
        its first process, `known` those found before. A member carries QUEUECTL_RUN, can write to
        the files, is in the leader's session, shares a session with a member or descends from one;
        so also children that closed all descriptors and left the session are found. Processes of
        other users and namespaces are not. Raises OSError if the processes can't be seen now.
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
        """Processes in the order in which they are to be signalled: ancestors before descendants.

        A shell whose child dies first would go on with its next command. A parent starts before
        its child; of those that started in the same tick the one with fewer ancestors is first.
        """
        def rank(pid: int) -> tuple[int, int]:
            depth, at = 0, pid
            while processes[at].parent in found and depth < len(found):
                depth, at = depth + 1, processes[at].parent
            return int(processes[pid].started or 0), depth

        return sorted(found, key=rank)

    def _from_proc(self, mark: str, files: Names) -> dict[int, _Process]:
        """Every process but this one, its session and process 1, from /proc."""
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
        """The same by ps(1), where there is no /proc; process groups stand in for sessions."""
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
        """SIGTERM or SIGKILL to a member, if it still is the process that `members` saw."""
        if self.linux:
            entry = _living(pid)
            if entry is None or entry.started != started:
                return  # gone, and its number perhaps given to a stranger
        try:
            os.kill(pid, signal.SIGKILL if kill else signal.SIGTERM)
            os.kill(pid, signal.SIGCONT)  # a stopped process would not hear SIGTERM
        except (ProcessLookupError, PermissionError):
            pass

    # Workers and supervisors.

    def hold_signals(self) -> Any:
        """Let the signals wait that workers have handlers for; what `let_through` takes then."""
        return signal.pthread_sigmask(signal.SIG_BLOCK, (
            signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD))

    def let_through(self, mask: Any = ()) -> None:
        """Hold back the signals in `mask` alone."""
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def dismiss(self, pid: int, now: bool) -> None:
        """Tell a worker of ours to go: after its job, or now."""
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
        """Whether a process is stopped, by SIGSTOP or a debugger, as far as this can be seen."""
        return _proc_stat(pid)[:1] in ([b"T"], [b"t"])

    def wake(self, pid: int, life: str) -> None:
        """Let a process go on that was stopped, by Ctrl-Z for one, if it holds the file `life`."""
        if self.is_stopped(pid) and _writes_to(pid, (life,)):
            os.kill(pid, signal.SIGCONT)

    def say(self, text: str, stream: int = 1) -> None:
        """Write what a worker or supervisor has to say to a standard stream, without ever waiting.

        A full pipe or a stopped terminal holds up no job: what the stream does not take now is
        not said. A stream that can be written to takes 4096 bytes at least.
        """
        import select
        room = select.poll()
        room.register(stream, select.POLLOUT)
        data = text.encode("utf-8", "replace")
        try:
            while data and room.poll(0):
                data = data[os.write(stream, data[:4096]):]
        except OSError:
            pass  # the terminal is gone; the record in the database is what counts


class Bell:
    """What a process sleeps on: anyone who knows the path can ring it, and so do its own signals.

    A FIFO, held open for reading and writing, so that it neither ends nor blocks. A bell without
    a path, or where the file system has no FIFOs, hears signals alone.
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
        """From now on a signal that has a handler rings this bell too."""
        signal.set_wakeup_fd(max(self.fd, self.write_end), warn_on_full_buffer=False)

    def watch(self, fd: int) -> None:
        """From now on `wait` ends when this descriptor can be read, too."""
        self._poll.register(fd, 1)  # POLLIN

    def forget(self, fd: int) -> None:
        self._poll.unregister(fd)

    def wait(self, seconds: float) -> bool:
        """Sleep until the bell rings, a watched descriptor ends, or for `seconds`; True if rung.

        All rings so far are taken together: look at everything afterwards, and none is lost.
        """
        millis = int(min(seconds * 1000 + 0.999, LONGEST_WAIT))
        if not self._poll.poll(max(0, millis)):
            return False
        try:
            heard = os.read(self.fd, 65536)
        except BlockingIOError:
            return False
        for order, number in ((STOP_SOON, signal.SIGHUP), (STOP_NOW, signal.SIGUSR1)):
            if order in heard:  # where no signal can come from
                signal.raise_signal(number)
        return True


class Windows:
    """Windows, where a run is a Job Object that ends with its worker, and sleeping is polling.

    Locks are byte-range locks far behind the end of the file; they block nobody's reading.
    Tokens are not needed: the kernel ends the job's processes when the worker's handle closes.
    """

    shell = "cmd.exe"
    longest_command = 8000
    linux = False
    start_method = "spawn"
    user = 0  # the system's own rights are not looked at
    childless = False
    LOCK_AT = 1 << 30

    def __init__(self) -> None:
        self.msvcrt: Any = __import__("msvcrt")
        self.runs: dict[int, tuple[Any, int]] = {}  # pid: (Popen, handle of the Job Object)

    # Files.

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
        sleep(0.001 + os.urandom(1)[0] / 25600)  # jitter: nobody is queued

    def held(self, path: str) -> bool:
        try:
            fd = os.open(path, os.O_RDWR | OPEN_BESIDE)
        except FileNotFoundError:
            return False
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
        with open(path, "rb") as file:  # locks are lost here with their own handle alone
            return file.read(size)

    def network_file_system(self, folder: str) -> str:
        return "a network share" if realpath(folder).startswith("\\\\") else ""

    def say(self, text: str, stream: int = 1) -> None:
        try:
            os.write(stream, text.encode("utf-8", "replace"))
        except OSError:
            pass

    # Processes.

    def prepare_reporter(self) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the console tells every process

    def prepare_worker(self, supervisor: int) -> None:
        self.prepare_reporter()

    def orphaned(self, supervisor: int, life: str) -> bool:
        return not self.held(life)

    native = staticmethod(str)
    environment = os.environ.copy

    def _kernel(self, name: str, handle: int | None, *arguments: Any) -> Any:
        """Call the function `name` of kernel32 whose first argument is a handle, or NULL."""
        ctypes: Any = __import__("ctypes")
        function = getattr(ctypes.WinDLL("kernel32", use_last_error=True), name)
        function.restype = ctypes.c_void_p
        return function(ctypes.c_void_p(handle), *arguments)

    def spawn(self, command: str, shell: str, env: Env, cwd: str, umask: int,
              out: int, err: int) -> int:
        """Start `command` suspended, put it into a Job Object, and let it go: nothing escapes."""
        import subprocess
        ctypes: Any = __import__("ctypes")
        line = "%s /d /s /c \"%s\"" % (shell, command)
        if shell != self.shell:
            line = subprocess.list2cmdline([shell, "-c", command])
        process = subprocess.Popen(
            line, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
            creationflags=0x4 | 0x200)  # SUSPENDED, NEW_PROCESS_GROUP
        for _, old in self.runs.values():  # of runs that failed: nothing of them may live on
            self._kernel("CloseHandle", old)
        self.runs.clear()
        handle = self._kernel("CreateJobObjectW", None, None)
        self._kill_on_close(handle, True)
        owned = ctypes.c_void_p(int(process._handle))  # type: ignore[attr-defined]
        self._kernel("AssignProcessToJobObject", handle, owned)
        ctypes.WinDLL("ntdll").NtResumeProcess(owned)
        self.runs[process.pid] = process, handle
        return process.pid

    def _kill_on_close(self, handle: int, kill: bool) -> None:
        """Set JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE in JOBOBJECT_EXTENDED_LIMIT_INFORMATION (9)."""
        info: Any = __import__("ctypes").create_string_buffer(144)
        info[16:20] = (kill * 0x2000).to_bytes(4, "little")  # LimitFlags
        self._kernel("SetInformationJobObject", handle, 9, info, 144)

    def reap(self, pid: int) -> int | None:
        if pid not in self.runs:
            return None
        process, handle = self.runs[pid]
        code: int | None = process.poll()
        if code == 0:  # whatever a completed run left behind may live on
            del self.runs[pid]
            self._kill_on_close(handle, False)
            self._kernel("CloseHandle", handle)
        return code

    def members(self, mark: str, files: Names,
                leader: Leader, known: Living) -> Living:
        """The run's Job Object while any process lives in it; nothing for other workers' runs."""
        if leader.pid not in self.runs:
            return {}
        # JOBOBJECT_BASIC_ACCOUNTING_INFORMATION (1), in which ActiveProcesses is the number at 40
        info: Any = __import__("ctypes").create_string_buffer(48)
        handle = self.runs[leader.pid][1]
        self._kernel("QueryInformationJobObject", handle, 1, info, 48, None)
        return {leader.pid: ""} if any(info[40:44]) else {}

    def end_process(self, pid: int, started: str, kill: bool) -> None:
        self._kernel("TerminateJobObject", self.runs[pid][1], 1)

    # What needs nothing doing here, or nothing to be looked at.

    def _nothing(self, *values: Any) -> None:
        """Workers poll the stop flag of their pool, for one."""

    prepare_parent = refuse_full = give_to_owner = check_room = keep_standard_streams = _nothing
    reap_strangers = dismiss = stop = wake = punch = is_mount_point = is_stopped = _nothing
    distrust = hold_signals = let_through = _nothing
    sync = staticmethod(os.fsync)
    descriptors, place, ticks = set, str, os.getpid  # when called: an empty set, "", any number


class PollingBell(Bell):
    """The bell where there are no FIFOs to wait on: it rings every 20 ms."""

    def __init__(self, path: str = ""):
        self.fd = self.write_end = -1

    def watch(self, fd: int = -1) -> None:
        """Nothing is heard."""

    hear_signals = forget = watch

    def wait(self, seconds: float) -> bool:
        sleep(max(0.0, min(seconds, 0.02)))
        return True


# The types are those of Posix; a Windows that lacks something is found by running it alone.
system: Posix = Windows() if WINDOWS else Posix()  # type: ignore[assignment]
make_bell = PollingBell if WINDOWS else Bell
SETTINGS["shell"] = system.shell  # how a job is run that has none of its own


# ═══ Files ═══ what stands beside the database: paths, bells, life files, output of live runs ═
#
# The write mutex `queue.db.lock`, and the folder `queue.db.d`. In the folder each worker and pool
# has a life file, whose lock says that it lives and in which workers leave notes; a worker has a
# bell, and pairs of output files, whose locks are the token of the run that writes to them.
# The names begin with that of the worker or pool, which is never used twice.


def _refuse_planted(info: os.stat_result, path: str) -> None:
    if info.st_uid not in (0, system.user) and system.user != 0:
        raise QueueError("%s belongs to another user (uid %d), whose queue this is"
                         % (path, info.st_uid))
    if not stat.S_ISREG(info.st_mode) or info.st_nlink > 1:
        raise QueueError("%s is not a plain file with one name; remove it" % path)


def open_beside(path: str, flags: int) -> int:
    """A descriptor of a file that stands beside a database.

    Raises QueueError if it is anything but a plain file of this user with one name: others may
    have put there a link to a file that they can't write themselves, and wait for us to do it.
    Raises OSError if it can't be opened.
    """
    try:
        fd = os.open(path, flags | OPEN_BESIDE, 0o600)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise QueueError("%s is a symbolic link, which is not followed; remove it" % path) from None
    try:
        _refuse_planted(os.fstat(fd), path)
        return fd
    except BaseException:  # who kept it open would be taken for a process of the file's run
        os.close(fd)
        raise


def open_private(path: str, flags: int) -> int:
    """The same; it is made for this user alone if it is new."""
    return open_beside(path, flags | os.O_CREAT)


def is_link(path: str) -> bool:
    """Whether a symbolic link stands there, or a file that has other names too."""
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        return False
    if stat.S_ISREG(info.st_mode):
        return info.st_nlink > 1
    return stat.S_ISLNK(info.st_mode)


def sync_folder(folder: str) -> None:
    """Have the disk keep the names in a folder, where the system can do that."""
    try:
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError:
        pass


def read_between(fd: int, start: int, end: int) -> bytes:
    """The bytes of a file from `start` to `end`, fewer if it is shorter."""
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
    """What `read(fd, *values)` makes of a life or output file, open for that moment alone."""
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
    """A database and what stands beside it, whoever has made that."""
    return [db, db + "-wal", db + "-shm", mutex_path(db), folder_path(db)]


# Workers are called POOL-NUMBER: no name is the beginning of another with a dot behind it.


def life_path(db: str, name: str) -> str:
    return join(folder_path(db), name + ".life")


def bell_path(db: str, name: str) -> str:
    return join(folder_path(db), name + ".bell")


def output_paths(db: str, worker: str, slot: int) -> tuple[str, str]:
    stem = join(folder_path(db), "%s.%d" % (worker, slot))
    return stem + ".out", stem + ".err"


def log_path(db: str) -> str:
    """The log of detached pools."""
    folder, name = os.path.split(db)
    return join(folder, "queuectl.log") if name == "queue.db" else db + ".log"


def bytes_on_disk(paths: Iterable[str]) -> int:
    """How much space files take; where they have holes, that is less than their size."""
    total = 0
    for path in paths:
        try:
            info = os.stat(path)
        except OSError:
            continue
        total += 512 * getattr(info, "st_blocks", info.st_size // 512)
    return total


def names_beside(db: str, ending: str) -> list[str]:
    """The workers and pools that have a file with this ending in the folder."""
    try:
        files = os.listdir(folder_path(db))
    except OSError:  # there is none, or it can't be read: then nobody can be rung or asked
        return []
    end = -len(ending) or None
    return [file[:end] for file in files if file.endswith(ending)]


def sizes_of(db: str) -> dict[str, int]:
    """The bytes that a database, its log, and the output of current runs take."""
    outputs = [join(folder_path(db), name) for name in names_beside(db, "")]
    return {"database_bytes": bytes_on_disk([db]), "log_bytes": bytes_on_disk([db + "-wal"]),
            "output_bytes": bytes_on_disk(outputs)}


def remove_files(db: str, name: str) -> None:
    """Remove what a worker or pool that has ended left in the folder."""
    files = [file for file in names_beside(db, "") if file.startswith(name + ".")]
    files.sort(key=lambda file: file.endswith(".life"))  # that last: it tells of the rest
    for file in files:
        try:
            os.unlink(join(folder_path(db), file))
        except OSError:  # open on Windows, or the folder is read-only: the next sweep gets it
            pass


# Who lives, and is to wake up.


def is_alive(db: str, name: str) -> bool:
    """Whether the worker or pool `name` lives: the kernel's word, by its life lock."""
    return system.held(life_path(db, name))


def anyone_alive(db: str) -> bool:
    """Whether any worker or pool of this database lives."""
    return any(is_alive(db, name) for name in names_beside(db, ".life"))


def ring(path: str, order: bytes = b"!") -> None:
    """Wake the process that sleeps on the bell `path`; nothing happens if nobody does."""
    try:
        fd = os.open(path, os.O_WRONLY | OPEN_BESIDE)
        try:
            if stat.S_ISFIFO(os.fstat(fd).st_mode):
                os.write(fd, order)
        finally:
            os.close(fd)
    except OSError:  # nobody sleeps on it; or it is full, and was rung often enough
        pass


def ring_all(db: str, order: bytes = b"!") -> int:
    """Wake every worker, after a commit that may concern them; how many bells there are."""
    names = names_beside(db, ".bell")
    for name in names:
        ring(bell_path(db, name), order)
    return len(names)


# In its life file a worker notes, for whoever comes after it: the process its run began as, at
# once when it was started (a job may give up its descriptors and its environment, but it can
# leave its session only later); and behind that, what keeps it from working.

RUN_NOTE, TROUBLE_NOTE = 200, 300  # bytes
RunNote = namedtuple("RunNote", "place seq run leader first last")
RunNote.__doc__ = """`place` is what process ids are counted in, `seq` and `run` which run of which
job it is, and the rest is a Leader."""


def _note(life: int, start: int, size: int, text: str) -> None:
    try:
        write_at(life, start, text.encode("utf-8", "replace")[:size].ljust(size))
    except OSError:  # the disk is full, or the file not yet there: notes help in rare cases only
        pass


def note_run(life: int, note: RunNote) -> None:
    """Note as which process a run began, in the life file that is open as `life`."""
    _note(life, 0, RUN_NOTE, " ".join(map(str, note)))


def note_trouble(life: int, text: str) -> None:
    """Note what keeps a worker from working, or nothing."""
    _note(life, RUN_NOTE, TROUBLE_NOTE, text)


def _read_life(db: str, name: str, start: int, size: int) -> str:
    note: bytes = read_beside(life_path(db, name), b"", read_between, start, start + size)
    return note.decode("utf-8", "replace").strip()


def leader_of(db: str, worker: str, seq: int, run: int) -> Leader:
    """The process that a run of a dead worker began as; NOBODY if that isn't known for sure."""
    fields = _read_life(db, worker, 0, RUN_NOTE).split()
    if len(fields) != len(RunNote._fields):
        return NOBODY
    note = RunNote(fields[0], *map(int, fields[1:]))
    if note[:3] != (system.place(), seq, run):
        return NOBODY
    return Leader(*note[3:])


def trouble_of(db: str, worker: str) -> str:
    """What keeps a worker from working, or nothing."""
    return _read_life(db, worker, RUN_NOTE, TROUBLE_NOTE)


# The log of detached pools, which is the standard output of all their processes.

LONGEST_LOG = 1 << 20  # bytes; a longer log is put aside, in the place of the one before


def _put_aside(path: str) -> None:
    """Rename a log that is too long, unless another process does it."""
    fd = open_private(path, os.O_WRONLY)
    try:
        info = os.fstat(fd)
        if (info.st_size > LONGEST_LOG and system.try_lock(fd)
                and os.path.samestat(info, os.stat(path))):
            os.replace(path, path + ".1")
    finally:
        os.close(fd)


def renew_log(path: str) -> None:
    """Before something is told: open the log anew if it is too long, was renamed or is gone."""
    own = os.fstat(1)
    try:
        if own.st_size <= LONGEST_LOG and os.path.samestat(own, os.stat(path)):
            return
    except OSError:
        pass
    try:
        _put_aside(path)
        fd = open_private(path, os.O_WRONLY | os.O_APPEND)
    except (OSError, QueueError):  # it goes on where it was
        return
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)


# The output of runs.

GAP = b"\n[queuectl: %d bytes left out here]\n"
# Stands before what is left of an output that the run's own processes have truncated.
EMPTIED = b"[queuectl: the job truncated this output; what it had printed before is lost]\n"


def head_and_tail(fd: int, limit: int) -> bytes:
    """The contents of an output file: if it has more than `limit` bytes its head and its tail.

    Between the two stands how much was left out. Raises OSError.
    """
    size = os.lseek(fd, 0, os.SEEK_END)
    if size <= limit:
        return read_between(fd, 0, size)
    half = limit // 2
    gap = GAP % (size - 2 * half)
    return read_between(fd, 0, half) + gap + read_between(fd, size - half, size)


def gap_of(output: bytes) -> int:
    """Where in what `head_and_tail` made the gap stands, in its middle; -1 if all is there."""
    middle = len(output) // 2
    around = output[max(0, middle - 50):middle + 50]
    match = re.search(re.escape(GAP).replace(b"%d", rb"\d+"), around)
    return max(0, middle - 50) + match.start() if match else -1


class OutputFiles:
    """The two files that take a run's output; the locks on them are the run's token.

    A worker has several: it must hold the next run's token before the commit that records the last
    one, and keeps the output of runs whose record is not on disk yet. They are opened anew for each
    run: if a daemon that an earlier job left behind still holds one of them, `open` fails, and a
    slot with a new number takes its place, so nobody's late output lands in another job's record.
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
        """Open the files and take the token; False if somebody still holds it. Raises OSError."""
        taken = False
        try:
            for path in self.paths:
                self.fds.append(open_private(path, os.O_RDWR | os.O_APPEND))
            taken = all(system.try_lock(fd) for fd in self.fds)
            return taken
        finally:
            if not taken:  # who kept them open would be taken for a process of that run
                self.close()

    def close(self) -> None:
        """Let go of the token, as far as it is this process's."""
        for fd in self.fds:
            os.close(fd)
        self.fds = []
        self._start_anew()

    def remove(self) -> None:
        """Close the files and give up their names."""
        self.close()
        for path in self.paths:
            try:
                os.unlink(path)
            except OSError:  # open on Windows: it goes with its worker's other files
                pass

    def read(self, limit: int) -> list[bytes]:
        """What the run has printed to stdout and stderr, at most `limit` bytes each."""
        return [self._read_one(index, limit) for index in (0, 1)]

    def _read_one(self, index: int, limit: int) -> bytes:
        try:
            self._look(index)
            output = head_and_tail(self.fds[index], limit)
            return EMPTIED + output if self.emptied[index] else output
        except OSError as error:
            return b"[queuectl: this output can't be read: %s]\n" % str(error.strerror).encode()

    def bound(self, limit: int) -> int:
        """Keep a run that prints without end from filling the disk; the bytes it has printed.

        Head and tail stay; what lies between them is given back to the file system once it is
        more than `limit` bytes. Where holes are not supported, the file is cut behind its head.
        Raises OSError.
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
            elif not WINDOWS:
                os.ftruncate(fd, half)
                self.sizes[index] = half
        return total

    def _look(self, index: int) -> int:
        """The size of a stream; notes if the job has truncated it, as `> /dev/stderr` does."""
        size = os.fstat(self.fds[index]).st_size
        if size < self.sizes[index]:
            self.punched[index], self.emptied[index] = 0, True
        self.sizes[index] = size
        return size

    def empty(self) -> None:
        """Throw the contents away. Raises OSError."""
        for fd in self.fds:
            if os.lseek(fd, 0, os.SEEK_END):
                os.ftruncate(fd, 0)

    def clear(self, printed: bool) -> None:
        """After the commit that recorded the run: empty the files, then let go of the token.

        `printed` is whether there is anything in them. Raises OSError.
        """
        if printed:
            self.empty()
        self.close()


# ═══ Schema ═══ the tables, their migrations, and the statements that several use ════════════
#
# A statement that one method alone executes stands in that method (sections Database and Store).
# Here stand the others, and those whose plans the tests look at. Nothing is newer than SQLite
# 3.8.3. Times are milliseconds since the epoch.
#
# `ready` is 1 for a job that a worker may claim now. A job that waits for a time has ready = 0,
# and that time in `due`; when it has come, the job is made ready. So the index that claims read,
# ordered exactly as claims are, holds no job that can't be claimed. Of a job that is ready, `due`
# is since when, if not since it came. A pause is not in these: `switched_at` is when a queue was
# paused or resumed last. `waited` is how long a job waited for its last claim. `runs` counts a
# job's runs for life, `attempts` those since it was enqueued or retried. `worker`, `slot` and
# `locked_at` are set while it is processing; they also tell what the output files of that run are
# called.
#
# The key of a run is the seq of its job * 2**24 + the run's number.
#
# `contexts` keeps once what would else be repeated in a million jobs. `queues` counts the jobs of
# each queue by state, so that `status` need not. Triggers keep these counts; only what is
# inserted is counted by Intake, once for a whole bulk.
#
# A row in `waits` stands until the awaited job is completed, or the waiting one is forgotten. So
# it stands also while both are dead, and when an awaited job that died has been forgotten.

# `history` is what was done, in the words of Prometheus: by minute (span 60), and after two days by
# hour (span 3600), for each queue; with span 0, all there ever was. It has nothing to do with which
# jobs are kept, and its numbers of span 0 never fall. The runs of a minute are first counted with
# their queue, for that row is written anyway; triggers move the counts when another minute begins,
# or the queue is forgotten. When a thousand queues are known there, others count as `other queues`,
# which no queue can be called.

APPLICATION_ID = 0x71637431  # "qct1"

# The statements that lead from version N to N + 1. Never edit one that was released.
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
        "CREATE TABLE control (epoch INTEGER NOT NULL)",  # counts changes that workers follow
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
    # A queue has an id, by which a copy is told from the queue that it was copied from.
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
        # Who waited for a dead job that is forgotten still knows that it never was completed.
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
        # Whether a job is met by any end of the one that it waits for.
        "ALTER TABLE waits ADD COLUMN either INTEGER NOT NULL DEFAULT 0",
        # The number of the last `run`; whether jobs that ended in vain are to take others along.
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
        # A stderr may say the same, but the text of such an error begins otherwise.
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
        # The limit of a run's queue is no reason to keep it without jobs.
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
    # What was done is counted, and since when jobs wait is known.
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
        # What is inserted here is added to a minute of the history, and to all there ever was.
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
PULSE = """SELECT epoch, (SELECT min(due) FROM jobs WHERE ready = 0 AND due IS NOT NULL),
    (SELECT min(expires_at) FROM jobs INDEXED BY jobs_expiring
        WHERE expires_at IS NOT NULL AND state = 'pending' AND runs = 0),
    unsettled FROM control"""
ALL_POOLS = """SELECT name, pid, started_at, workers, queues, stop, died FROM pools
    ORDER BY started_at"""
ALL_WORKERS = """SELECT workers.name AS name, pool, pid, workers.started_at AS started_at,
    jobs.id AS job, queue, jobs.command AS command, jobs.started_at AS job_started_at
    FROM workers LEFT JOIN jobs ON jobs.state = 'processing' AND jobs.worker = workers.name
    ORDER BY workers.started_at, workers.name"""
GET_POOL = "SELECT stop, jobs_left, died FROM pools WHERE name = ?"
ADD_QUEUE = "INSERT OR IGNORE INTO queues (name) VALUES (?)"
FORGET_QUEUE = """DELETE FROM queues WHERE name = ? AND concurrency IS NULL AND NOT paused
    AND pending + processing + completed + failed + dead + cancelled = 0"""

WITH_ID = "SELECT seq, id FROM jobs WHERE id = ?"
ERROR_OF_DEAD = "SELECT last_error FROM jobs WHERE id = ? AND state = 'dead'"
HELD_JOBS = """SELECT seq, id, command, queue, attempts, runs, max_retries, timeout_seconds,
    backoff_base, context, env, policy, deferrals, chained, shell, place, worker, slot,
    started_at, cancel,
    started_at - waited AS since FROM jobs WHERE state = 'processing'"""
# Since when a job could run that is ready or due.
SINCE = "max(coalesce(due, created_at), switched_at, (SELECT switched_at FROM control))"
WAITING_SINCE = "SELECT id, command, queue, %s AS ready_at FROM " % SINCE
MAY_RUN = "AND NOT paused AND NOT (SELECT paused FROM control)"
# Which waits longest of those that are ready since they came: the first of each queue and priority;
# of those that became ready later; and of those that the next claim will make ready, which there
# may be none of for long.
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
# A run is counted with its queue, if it has the minute in which the run ended; else that begins.
COUNT_RUN = """UPDATE queues SET runs_completed = runs_completed + ?, runs_failed = runs_failed + ?,
    runs_died = runs_died + ?, run_sum = run_sum + ?, run_max = max(run_max, ?),
    wait_sum = wait_sum + ?, wait_max = max(wait_max, ?) WHERE name = ? AND minute = ?"""
BEGIN_MINUTE = """UPDATE queues SET runs_completed = 0, runs_failed = 0, runs_died = 0,
    run_sum = 0, run_max = 0, wait_sum = 0, wait_max = 0, minute = ? WHERE name = ?"""
SUMS = """sum(completed) AS completed, sum(failed) AS failed, sum(died) AS died,
    sum(run_seconds_sum) AS run_seconds_sum, max(run_seconds_max) AS run_seconds_max,
    sum(wait_seconds_sum) AS wait_seconds_sum, max(wait_seconds_max) AS wait_seconds_max"""
# As what a queue is counted: all runs are one, and a thousand queues are told from each other.
COUNTED_AS = """CASE WHEN name GLOB 'run-[0-9]*' AND NOT substr(name, 5) GLOB '*[^0-9]*' THEN 'run'
    WHEN EXISTS (SELECT 1 FROM history WHERE span = 0 AND start = 0 AND queue = name)
        OR (SELECT count(*) FROM history WHERE span = 0) < 1000 THEN name
    ELSE 'other queues' END"""
# From one time to another; from 0 to 0 is all there ever was.
DONE = """(SELECT * FROM history WHERE span IN (0, 60, 3600) AND start BETWEEN ? AND ?
    UNION ALL SELECT 60, minute, %s, runs_completed, runs_failed, runs_died,
        run_sum, run_max, wait_sum, wait_max FROM queues
    WHERE minute BETWEEN ? AND ? OR (minute AND ? = 0))""" % COUNTED_AS
RUNS_OF_JOB = "FROM runs WHERE id BETWEEN ? * 16777216 AND ? * 16777216 + 16777215"

ADD_JOB = """INSERT INTO jobs (id, generated, command, state, queue, priority, ready, due, run_at,
    timeout_seconds, max_retries, backoff_base, context, env, created_at, updated_at, delayed,
    expires_at, shell) VALUES (?, ?, ?, 'pending', ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"""
# A retry is ignored for a job whose key is taken.
RETRY = """UPDATE OR IGNORE jobs SET state = 'pending', attempts = 0, deferrals = 0, updated_at = ?,
    expires_at = CASE WHEN expires_at > ? THEN expires_at END,
    ready = coalesce(run_at, 0) <= ? AND NOT EXISTS (SELECT 1 FROM waits WHERE job = jobs.seq),
    due = CASE WHEN NOT EXISTS (SELECT 1 FROM waits WHERE job = jobs.seq)
        THEN max(coalesce(run_at, 0), ?) END
    WHERE seq = ? AND state IN ('completed', 'dead', 'cancelled')"""
LET_GO = """UPDATE jobs SET ready = run_at IS NULL OR run_at <= ?,
    due = max(coalesce(run_at, 0), ?) WHERE seq = ? AND state = 'pending'
    AND NOT EXISTS (SELECT 1 FROM waits WHERE job = jobs.seq)"""
HOOKED = """SELECT seq, id, queue, command, state, attempts, max_retries, exit_code, last_error,
    updated_at FROM jobs """

# CROSS JOIN keeps jobs the outer loop, in the order of its key.
SELECT_JOBS = """SELECT seq, jobs.id AS id, command, shell, state, queue, priority, run_at,
    timeout_seconds, attempts, max_retries, backoff_base, cwd, env, policy,
    unique_key AS "unique", after_ids AS after, after_any_ids AS after_any, expires_at,
    created_at, updated_at, started_at, finished_at,
    CASE WHEN state = 'failed' THEN due END AS next_retry_at, exit_code, last_error,
    worker AS locked_by, locked_at, runs, slot, cancel, generated, context, due, ready
    FROM jobs CROSS JOIN contexts ON contexts.id = jobs.context """


@lru_cache(16)
def next_job(queues: int) -> str:
    """The statement for the job that is next: of each queue's first the lowest (priority, seq).

    `queues` is the number of names that are its parameters; 0 means all queues. Each costs one
    seek in jobs_ready, however many jobs wait. A job that is processing counts against its
    queue's limit until its run is recorded. So do those of dead workers: their processes may
    still live.
    """
    from_busy, among = "INDEXED BY queues_busy", ""  # thousands of queues may have finished
    if queues:
        from_busy, among = "", "AND name IN (%s)" % ", ".join("?" * queues)
    return """SELECT seq, id, command, queue, attempts + 1, runs + 1, max_retries,
        timeout_seconds, backoff_base, context, env, policy, deferrals, chained, shell, %s
        FROM queues %s CROSS JOIN jobs ON seq = (
            SELECT seq FROM jobs WHERE ready = 1 AND queue = queues.name
            ORDER BY priority, seq LIMIT 1)
        WHERE pending + failed > 0 AND NOT paused AND NOT (SELECT paused FROM control)
            AND (concurrency IS NULL OR processing < concurrency) %s
        ORDER BY priority, seq LIMIT 1""" % (SINCE, from_busy, among)


# When a job ended or, where it has not, was last changed.
TIME_OF = """CASE WHEN state IN ('completed', 'dead', 'cancelled') THEN finished_at
    ELSE updated_at END"""


def terms_of(selection: Selection) -> tuple[str, list[Any]]:
    """What a job must be to be selected: the end of a WHERE, which begins with AND, and its values.

    One state is read by its index; several by the key, which needs no sorting (`+` rules the
    index out).
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
            (TIME_OF + " <= ?", selection.before)):
        if value is not None:
            terms += " AND " + term
            values.append(value)
    return terms, values


def select_jobs(selection: Selection, newest: bool, count: int) -> tuple[str, list[Any]]:
    """The statement for a page of `count` jobs, and its values behind the seq to start from."""
    bound, order = ("<", "DESC") if newest else (">", "ASC")
    terms, values = terms_of(selection)
    statement = "%s WHERE seq %s ?%s ORDER BY seq %s LIMIT %d" % (
        SELECT_JOBS, bound, terms, order, count)
    return statement, values


# ═══ Database ═══ the file: trust, opening, the mutex, commits, what is on disk, copies ══════
#
# Nobody but SQLite ever opens the database file. Closing any other descriptor of it would drop
# the locks that SQLite holds on it. Its log and the lock file may be opened.
#
# Who writes takes these steps (Connection.begin and end):
#
#   1. The mutex: a lock on the lock file beside the database. The kernel keeps its queue: SQLite's
#      own waiting is unfair, and deaf to signals. A write can't race a checkpoint, by which SQLite
#      before 3.51.3 could lose commits. All that follows is done while it is held.
#   2. Is it still the same file? What is written to a deleted or replaced one would be lost.
#   3. Is there the mark of a failed sync? Then the log is written again, for a commit on top of
#      frames that the disk has not got would be told as done, and be lost with them.
#   4. The first time: is it a copy? Then it gets an id of its own, so that nobody who works on the
#      copy ends the processes of the original.
#   5. BEGIN IMMEDIATE, the statements, COMMIT. A deferred transaction would fail where it turns
#      into a write, if another program had written meanwhile.
#   6. The mark again. A worker syncs without the mutex: that may have failed after step 3, and
#      then this commit stands on frames that the disk has not got.
#   7. The mutex is freed, whatever went wrong before.
#
# Commands let COMMIT sync the log (synchronous=FULL). Workers don't (defer_sync): they call
# `sync` when the mutex is free again and the next job runs already, and tell nothing before.
#
# A reader takes no mutex. Every answer is fetched whole: an open cursor would keep checkpoints
# from finishing.
#
# Who opens takes the mutex only to migrate, or to look again where the first look found trouble:
# perhaps the database was being made at that moment.

PATIENCE = 30.0  # seconds a command waits to write before it gives up
WAIT_TOLD = 5.0  # seconds after which it says that it waits

# Words in an error of SQLite; what that error means to the user, and what to do next.
MEANINGS = (
    ("locked|busy", Unavailable,
     "%(path)s is locked by another program; try again when it has finished"),
    ("full", Unavailable, "no space left for %(path)s; free some and try again"),
    ("disk I/O", Unavailable,
     "%(path)s can't be read or written (%(text)s); check the disk and its quota"),
    ("readonly|read-only", Unavailable,
     "%(path)s can't be written: it or its folder is read-only"),
    ("not a database|encrypted", QueueError,
     "%(path)s is not a queuectl database; nothing was changed, name another with --db"),
    ("malformed", QueueError,
     ("%(path)s is damaged (%(text)s); move it, %(path)s-wal and %(path)s-shm away together, "
      "then `queuectl restore BACKUP` or start anew")),
)


def shortage_of_descriptors() -> str:
    """Why no file can be opened now, or nothing: SQLite does not tell."""
    try:
        os.close(os.dup(0))
    except OSError as error:
        return str(error.strerror)
    return ""


def translate(error: sqlite3.Error, path: str) -> QueueError:
    """What an error of SQLite means to the user, and what to do next."""
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
    """A database for reading, without its log and without any lock.

    See https://www.sqlite.org/uri.html.
    """
    for mark in "%?#":
        path = path.replace(mark, "%%%02x" % ord(mark))
    return sqlite3.connect("file:%s?immutable=1" % path, uri=True, isolation_level=None)


def value_in_file(path: str, statement: str) -> Any:
    """The first value that a statement finds in a database as it is; None if it can't be read."""
    db = open_as_it_is(path)
    try:
        row = db.execute(statement).fetchone() or (None,)
        return row[0]
    except sqlite3.Error:
        return None
    finally:
        db.close()


def is_queue(path: str) -> bool:
    """Whether a file is the database of a queue."""
    return bool(value_in_file(path, GET_APPLICATION) == APPLICATION_ID)


def has_log(db: str) -> bool:
    """Whether anything stands in the log beside a database.

    Whoever closes the database last removes the log, at any moment.
    """
    try:
        return getsize(db + "-wal") > 0
    except FileNotFoundError:
        return False


# What is refused: what others could have written, and where locks don't hold.


def make_folder(folder: str) -> None:
    """Make the folder of a database, for this user alone.

    Raises QueueError if that can't be, or if it is on a network file system, where SQLite's locks
    don't hold.
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
    except FileNotFoundError:  # then there is nothing to distrust, as the folder is looked at too
        return ""


def distrust_of(db: str) -> str:
    """Why nothing that a database says may be executed, or nothing: others could have written it.

    Who can write to the database, to what stands beside it or to its folder can have commands run
    as this user; and who can write to a folder above can put another in its place.
    """
    reasons = [_distrust(path) for path in files_of(db)]
    folder, above = dirname(db), False
    try:
        # Who may write to / can replace Python itself.
        while not above or folder != dirname(folder):
            reasons.append(system.distrust(folder, above))
            folder, above = dirname(folder), True
    except FileNotFoundError:  # moved away: whoever did that can put another there
        return "%s was moved away while it was looked at" % folder
    return next(filter(None, reasons), "")


def refuse_untrusted(db: str) -> None:
    """Raise QueueError if others could change what is executed, or if locks can't be trusted.

    Whatever executes a command of a database, or ends processes by what it says, asks here first.
    A folder that is not there is made: nobody can then put another in its place.
    """
    make_folder(dirname(db))
    reason = distrust_of(db)
    if reason:
        raise QueueError("nothing that others could write is executed: %s" % reason)


def prepare_place(path: str) -> None:
    """Before a database is made: a private folder, on a disk of this machine, and nobody uses it.

    Raises QueueError if a worker of one that was here still lives, or if its log stands there.
    """
    make_folder(dirname(path))
    alive, log = anyone_alive(path), exists(path + "-wal")
    if exists(path):  # another process has made it meanwhile
        return
    if alive:
        raise QueueError("%s is gone, but workers of it still live; let them end before a new one "
                         "is made" % path)
    if log:
        raise QueueError("%s is gone, but its log stands there; `queuectl restore BACKUP`, or move "
                         "%s-wal away" % (path, path))


def refuse_strange_file(path: str) -> None:
    """Before a database is opened; raises QueueError for what SQLite would take for one.

    It would make a new queue of an empty file, follow links, and keep a log for each name.
    """
    info, folder = os.stat(path), folder_path(path)
    if not stat.S_ISREG(info.st_mode):
        raise QueueError("%s is not a file; name a database with --db" % path)
    if info.st_nlink > 1:
        raise QueueError("%s has %d names (hard links), each with a log and a lock of its own, "
                         "which would damage it; `find / -xdev -samefile %s` lists them: remove "
                         "the others, and make copies with `queuectl backup FILE`"
                         % (path, info.st_nlink, shell_word(path)))
    if system.is_mount_point(path):
        raise QueueError("%s is mounted as a single file, so its log and its lock would stand "
                         "elsewhere than for others; mount the folder that it is in" % path)
    for beside in (path + "-wal", path + "-shm", path + "-journal", folder):
        if is_link(beside):
            raise QueueError("%s is a link, which is not followed; remove it" % beside)
    if info.st_size == 0 and isdir(folder):
        raise QueueError("%s is empty, but has been a queue before; restore a backup, or move it "
                         "and %s away" % (path, folder))


def advice_on_owner(path: str) -> str:
    """Whose a database's files are, and what to do, if they are another user's.

    They were made by `sudo`, for instance.
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
    """Which file and which queue a database is, for everybody who has to know.

    The file is its device and inode: they change if the database is replaced while it is open.
    The queue is an id, kept in the database; the names of its workers, and so the QUEUECTL_RUN of
    its runs, begin with it. The lock file beside the database notes the id and the file. Where that
    note and the database disagree, it is a copy (by `cp`, of the file or of the whole folder; by
    `mv` away from its lock file; put in the place of another). It gets an id of its own by the
    first write: so nobody who works on a copy ends the processes of the original.
    """

    queue = ""  # known once something was written
    next_look, index, changed_at = 0.0, 0, 0
    # Then even closing it may do harm: SQLite would write its log into another file.
    replaced = False

    def __init__(self, path: str, mutex: int):
        self.path, self.mutex = path, mutex
        self.watched = [mutex]  # descriptors of files that must not be deleted while it is in use
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

        At most every tenth of a second it is also looked at whether the lock file or the index of
        the log was deleted, and whether the database was overwritten.
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
        changed_at = os.stat(self.path).st_mtime_ns  # by a checkpoint, or by who overwrites it
        touched = self.changed_at not in (0, changed_at)
        if self.queue and touched and self._is_another(self.queue):
            self.replaced = True
            raise self._trouble("was overwritten")
        self.changed_at = changed_at

    def watch(self, fd: int) -> None:
        """From now on look whether this file, and the index of SQLite's log, are deleted."""
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
        """What the lock file tells: the queue's id, the device and the inode.

        Older programs noted the inode alone.
        """
        return read_between(self.mutex, 0, 51).split()

    def check_log(self) -> None:
        """Raise QueueError for a database in the place of another whose workers or log are there.

        SQLite would mix that log with it. Devices may have other numbers after a restart of the
        machine.
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
        """Whether workers live, but the index of the log is gone.

        Whoever closes the database last removes the index, then the log; perhaps at this moment.
        """
        path = self.path
        for _ in range(10):
            if exists(path + "-shm") or not has_log(path) or not anyone_alive(path):
                return False
            sleep(0.05)
        return True

    def _is_another(self, queue: str) -> bool:
        """Whether the file was overwritten in place with another queue than the noted one.

        The file is read as it is, without its log. What is written to it meanwhile can make it
        look damaged, which tells nothing, but not three times like a whole other queue.
        """
        for _ in range(3):
            if value_in_file(self.path, GET_IDENTITY) in (queue, None):
                return False
            sleep(0.05)
        return True

    def settle(self, queue: str,
               renew: Callable[[], str] | None = None) -> None:
        """Under the mutex, before the first write: note which queue this is.

        A copy is given a new id by `renew`. Where workers live it is no copy: in a container the
        same file may have another device.
        """
        if renew and self.is_copy(queue):
            queue = renew()
        if self._noted() != self._note(queue).split():
            write_at(self.mutex, 0, self._note(queue))
        self.queue = queue

    def is_copy(self, queue: str) -> bool:
        """Whether this is a copy of `queue` that has no id of its own yet."""
        noted = self._note(queue).split()
        return self._noted() != noted and not anyone_alive(self.path)

    def _note(self, queue: str) -> bytes:
        """The queue's id, device and inode; 51 bytes."""
        return b"%-8.8b %20d %20d\n" % (queue.encode(), *self.file)

    def same_file(self) -> bool:
        """Whether the lock file tells of this file."""
        return self._noted()[-1:] == [b"%d" % self.file[1]]


def wal_checksum(data: bytes, sums: tuple[int, int],
                 order: str) -> tuple[int, int]:
    """The checksum of SQLite's log over `data`, going on from `sums`.

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
    """SQLite's log (-wal), and whether the disk has what was written to it.

    Commits of workers don't wait for the disk; the log is synced later, by one call, before
    anything is told of them. Should that call fail, the kernel forgets what it could not write:
    it takes the pages for clean, and a later sync succeeds without them. So who sees a sync fail
    leaves a mark in the lock file. While it stands there, nobody commits, tells, or lets SQLite
    copy the log into the database (a checkpoint, at the end of a commit or when the last
    connection closes): first somebody, under the mutex, writes the log's frames over themselves,
    which makes the pages dirty again, and syncs them.
    (The kernel's part: https://wiki.postgresql.org/wiki/Fsync_Errors; the log's format:
    https://www.sqlite.org/fileformat2.html#walformat)
    """

    MARK_AT = 63  # in the lock file, behind the note of Identity
    HEADER, FRAME_HEADER = 32, 24  # bytes
    fd = -1  # it is opened when it is needed

    def __init__(self, path: str, mutex: int):
        self.path, self.mutex = path + "-wal", mutex
        self.index = path + "-shm"

    def open(self) -> int:
        """The descriptor of the log."""
        if self.fd < 0:
            self.fd = open_beside(self.path, os.O_RDWR)
        return self.fd

    def failed(self) -> bool:
        """Whether a sync has failed, anybody's, and the log was not written again since."""
        return read_between(self.mutex, self.MARK_AT, self.MARK_AT + 1) == b"!"

    def mark(self, sign: bytes) -> None:
        """Leave the mark (`!`), or take it away (a blank)."""
        write_at(self.mutex, self.MARK_AT, sign)

    def sync(self) -> None:
        """Have the disk keep all that was committed.

        Raises OSError if it can't, having left the mark.
        """
        self.open()
        try:
            system.sync(self.fd)
        except OSError:
            self.mark(b"!")
            raise

    def write_again(self) -> None:
        """Under the mutex: write what was committed over itself and sync it.

        Raises OSError if the disk still can't take it, QueueError if a part is lost.
        """
        end = self.cut()
        if not self._is_sound(end):
            raise QueueError("the disk has lost a part of %s, which failed to be synced before: "
                             "stop the workers, keep a copy of all files, and restore a backup"
                             % self.path)
        size = 1 << 16
        for start in range(0, end, size):
            part = read_between(self.fd, start, min(end, start + size))
            write_at(self.fd, start, part)
        self.sync()
        self.mark(b" ")

    def cut(self) -> int:
        """Under the mutex: end the log behind what was committed; the offset there.

        A commit that failed while it was synced has left its frames there: the next who reads the
        log from the disk would take them for committed.
        """
        self.open()
        end = self.HEADER + self._frame_size() * self._frames_in_index()
        if os.fstat(self.fd).st_size > end:
            write_at(self.fd, end, bytes(self.FRAME_HEADER))
        return end

    def _frames_in_index(self) -> int:
        """How many frames were committed, as SQLite's index of the log tells (mxFrame).

        Another process reads it: to close the file here would drop the locks that SQLite has on it.
        """
        head = system.read_elsewhere(self.index, 20)
        if len(head) < 20:
            raise OSError(errno.EIO, "%s can't be read" % self.index)
        return int.from_bytes(head[16:20], sys.byteorder)

    def _frame_size(self) -> int:
        return self.FRAME_HEADER + int.from_bytes(read_between(self.fd, 8, 12), "big")

    def _is_sound(self, end: int) -> bool:
        """Whether the frames up to the offset `end` read as they were written, by checksums."""
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
    """A `with` block: `enter` is called before it, `leave` after it with the error it ended by."""

    def __init__(self, enter: Callable[[], None],
                 leave: Callable[[BaseException | None], None]):
        self.enter, self.leave = enter, leave

    def __enter__(self) -> None:
        self.enter()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.leave(error)


class Connection:
    """The doors through which everything goes: one for writes, some for reads.

    What goes wrong there is raised as QueueError, or as Unavailable if it may pass.
    """

    db: sqlite3.Connection
    identity: Identity
    log: Log
    mutex = -1  # the descriptor of the lock file; -1: it is not open, nothing is written
    told = False  # that it waits
    deferring = False  # then a commit does not wait for the disk
    reading = as_it_is = False  # see Database

    def __init__(self, path: str, patience: float, tell: Tell | None):
        self.path, self.patience, self.tell = path, patience, tell
        self.folder = dirname(path)

    def _connect(self) -> None:
        # Who only reads writes to no new page of the index, if somebody has made it.
        if not (self.reading and anyone_alive(self.path)):
            system.refuse_full(self.folder)
        mask = os.umask(0o077)
        try:
            self.db = sqlite3.connect(self.path, timeout=TICK, isolation_level=None)
        finally:
            os.umask(mask)
        self.execute("PRAGMA journal_size_limit = 16777216")
        self.execute("PRAGMA trusted_schema = OFF")
        # Some builds write zeros over all that is deleted, through the log: a purge then takes
        # minutes. FAST does so where it costs no extra write.
        self.execute("PRAGMA secure_delete = FAST")
        if sys.platform == "darwin":  # where an fsync does not reach the disk
            self.execute("PRAGMA fullfsync = 1")
            self.execute("PRAGMA checkpoint_fullfsync = 1")
        self.execute("PRAGMA synchronous = %s" % ("NORMAL" if self.deferring else "FULL"))

    def _trouble(self, error: sqlite3.Error) -> QueueError:
        """What an error means.

        Of a page that could not be read SQLite says the same as of a damaged one: that is looked
        into. Where a descriptor was lacking it has opened the database for reading alone: that is
        mended.
        """
        trouble = translate(error, self.path)
        if "readonly" in str(error) and os.access(self.path, os.W_OK):
            try:
                self._connect()
            except sqlite3.Error:  # tried again with what is to be written
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
        """What `read()` returns; tried again for `patience` seconds while a program has it locked.

        SQLite itself locks all out while it reads the log that a crash has left.
        """
        deadline = None
        while True:
            try:
                return read()
            except sqlite3.Error as error:
                if deadline is None:  # it is looked into if it fails again
                    deadline, self.told = monotonic() + self.patience, False
                    continue
                trouble = self._trouble(error)
                if "locked" not in str(error) or monotonic() >= deadline:
                    raise trouble from error
                self._tell_wait(deadline)
                sleep(0.02)

    def rows(self, statement: str, *values: Any) -> list[Any]:
        """All rows that a statement finds, as tuples."""
        return self._patiently(  # type: ignore[no-any-return]
            lambda: self.db.execute(statement, values).fetchall())

    def column(self, statement: str, *values: Any) -> list[Any]:
        """The first value of each row."""
        return [row[0] for row in self.rows(statement, *values)]

    def value(self, statement: str, *values: Any) -> Any:
        """The first value of the first row; None if there is no row."""
        return next(iter(self.column(statement, *values)), None)

    def dicts(self, statement: str, *values: Any) -> list[Row]:
        """Each row with the names of its columns."""
        def read() -> list[Row]:
            cursor = self.db.execute(statement, values)
            names = [column[0] for column in cursor.description]
            return [dict(zip(names, row)) for row in cursor.fetchall()]

        return self._patiently(read)  # type: ignore[no-any-return]

    def first(self, statement: str, *values: Any) -> Row | None:
        """The first row with the names of its columns; None if there is no row."""
        return next(iter(self.dicts(statement, *values)), None)

    # Writing.

    def transaction(self) -> Guard:
        """`with store.transaction():` is one write: all of it is committed, or nothing.

        Raises Unavailable if it can't begin within `patience` seconds, or the disk can't take it.
        """
        return Guard(self.begin, self.end)

    def execute(self, statement: str, *values: Any) -> int:
        """Change something; how many rows were changed."""
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
                self._tell_wait(deadline)  # a program that is not queuectl may hold the lock

    def end(self, error: BaseException | None = None) -> None:
        """Commit; or, if the transaction ended by an error, roll back."""
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
            if "I/O" in str(failure):  # perhaps of a sync, and others' commits are forgotten too
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
        """`with self.alone():` holds the mutex without a transaction."""
        return Guard(self._lock, self._unlock)

    def _lock(self, deadline: float = 0.0) -> None:
        """Take the mutex until `deadline`, by default for `patience` seconds."""
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
        """Free the mutex; this must not fail, for what was committed would be taken for failed."""
        try:
            system.unlock(self.mutex)
        except OSError:
            again = open_private(mutex_path(self.path), os.O_RDWR)
            # This closes the descriptor that holds it.
            os.dup2(again, self.mutex, inheritable=False)
            os.close(again)

    def _tell_wait(self, deadline: float) -> None:
        tell_at = deadline - self.patience + WAIT_TOLD
        if self.tell and not self.told and monotonic() >= tell_at:
            self.tell("waiting for another process to finish writing to %s" % self.path)
            self.told = True

    # What is on disk: see Log.

    def defer_sync(self) -> None:
        """From now on a commit does not wait for the disk.

        A power cut may undo it, until `sync` has returned. With synchronous=FULL SQLite does the
        same inside COMMIT: it syncs its log. Done outside, nobody waits for the mutex meanwhile,
        and a worker's next job runs already.
        """
        self.deferring = True
        self.execute("PRAGMA synchronous = NORMAL")
        self.value(COUNT_TABLES)  # which makes the log, if there was none
        # Before the first commit: who opens it after a sync has failed does not hear of that.
        self.identity.watch(self.log.open())

    def sync(self) -> None:
        """Make every commit so far survive a power cut; raises Unavailable if the disk can't.

        The log may be opened: unlike the database's, nobody's locks depend on its descriptors.
        While a connection is open the log is never replaced, only written anew from its start.
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
        """What others committed before is perhaps not on disk; then this commit is not either."""
        if self.deferring:  # `sync` will see to it
            return
        try:
            failed = self.log.failed()
        except OSError:  # SQLite has synced it, and who failed to sync will see to it
            return
        if failed:
            self._write_log_again()

    def _note_failed_sync(self) -> None:
        try:
            self.log.mark(b"!")
            self.log.cut()
        except OSError:  # then whoever repairs the log does it
            pass

    def _unsynced(self, error: OSError) -> Unavailable:
        return Unavailable("%s can't be synced: %s; nothing more is done until the disk takes it"
                           % (self.log.path, error.strerror))

    def _write_log_again(self) -> None:
        """Under the mutex, after a sync has failed."""
        if self.log.failed():  # nobody else has done it meanwhile
            # After a crash SQLite makes its index anew now.
            self.db.execute(COUNT_TABLES).fetchall()
            self.log.write_again()


# Those that close_stores closes: Python would close one that nobody names any more.
OPENED: list[Database] = []


class Database(Connection):
    """The queue's database at `path`, made if it does not exist.

    `patience` is how many seconds a write may wait; `tell` gets a line when it waits long.
    `reading`: nothing is to be written; where there is no database it is an empty queue, and one
    of an older schema is read from a copy in memory that is brought up to date. `as_it_is`: of an
    older schema only what has not changed since is to be used. Raises QueueError if the database
    can't be used, Unavailable if perhaps later it can.
    """

    source: sqlite3.Connection | None = None  # of an older schema; `db` is a copy of it
    seen_in_source = -1
    failed_once = False  # to be opened

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
        except QueueError:  # perhaps it is being made at this moment: look again when that is done
            with self.alone():
                self.identity.check_log()

    def _open_unwritable(self, error: OSError) -> None:
        """Read a database that can't be written as it is: without locks.

        Raises `error` if anything waits in its log, which can't be read then.
        """
        if has_log(self.path):
            raise error
        self._read_as_it_is()

    def _open_without_room(self, error: Exception) -> None:
        """Read a database likewise where the disk has no room for the index of its log.

        Raises `error` if it is another, if it may have been for a moment only (then this is tried
        again), or if the database is to be written.
        """
        if not self.reading or not re.search("I/O|no space|to open", str(error)):
            raise error
        if isinstance(error, sqlite3.Error) and not self.failed_once:
            self.failed_once = True
            raise error
        if self.tell and has_log(self.path):
            self.tell("%s: what was recorded last is not shown" % error)
            self.tell = None
        os.close(self.mutex)
        self.mutex = -1
        self._read_as_it_is()

    def _read_as_it_is(self) -> None:
        self.db = open_as_it_is(self.path)
        if self._checked_version() < SCHEMA_VERSION:
            self._read_copy_of(self.db)

    def _open_nothing(self) -> None:
        """An empty queue, in memory."""
        if self.tell:
            self.tell("there is no queue at %s" % self.path)
        self.db = sqlite3.connect(":memory:", isolation_level=None)
        self._run_migrations(0)

    def close(self) -> bool:
        """Close the database; whether that was done.

        While the mark of a failed sync stands, it is left to the kernel: the last connection would
        copy the log into the database.
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
        """A number that differs from the last one if anybody else has committed meanwhile.

        Raises QueueError if the database was deleted or replaced: nobody would hear of it else.
        """
        if self.mutex < 0:  # there was none, or it can't be written
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
        """It changes when another connection has committed.

        SQLite before 3.8.8 does not know it; then everything is looked at each time.
        """
        row = self._patiently(lambda: db.execute("PRAGMA data_version").fetchone())
        if row is None:
            return time.monotonic_ns()
        return int(row[0])

    # The schema: who only reads brings a copy up to date, who writes the file itself.

    def _checked_version(self) -> int:
        """The schema version of a database that is ours and not newer than this program."""
        version = int(self.value(GET_VERSION))
        if self.value(COUNT_TABLES) and self.value(GET_APPLICATION) != APPLICATION_ID:
            raise QueueError("%s is a database of another program; name another with --db"
                             % self.path)
        if version > SCHEMA_VERSION:
            raise QueueError("%s was made by a newer queuectl (schema %d, this one knows %d); use "
                             "that one" % (self.path, version, SCHEMA_VERSION))
        return version

    def _read_copy_of(self, source: sqlite3.Connection) -> None:
        """Copy a database of an older schema into memory, and bring the copy up to date."""
        self.source = source
        self.seen_in_source = self._version_of(source)
        self.db = sqlite3.connect(":memory:", isolation_level=None)
        source.backup(self.db)
        self._run_migrations(int(self.value(GET_VERSION)))
        if self.mutex < 0 or self.identity.same_file():
            self.execute(KEEP_OLDER)

    def _migrate(self) -> None:
        """Bring the schema to this version, under the mutex: whole or not at all.

        Many may try at once: who comes later sees that it is done. Workers of an older program
        would go on with the old schema: they have to end before.
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
            if self.identity.same_file():  # no copy: what older workers left is its own
                self.execute(KEEP_OLDER)
            self.identity.settle(self.value(GET_IDENTITY))
            self.value(CHECKPOINT)  # so that its id stands in the file itself
            sync_folder(self.folder)
        finally:
            os.umask(mask)

    def registered(self, statement: str) -> list[Row]:
        """The pools or workers that a statement finds, each with `alive`."""
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
        """Whether a worker is of this queue, and not of one that it was copied from."""
        if worker in self.value("SELECT older FROM control").split(","):
            return True
        queue = str(self.value(GET_IDENTITY))
        if self.mutex >= 0 and self.identity.is_copy(queue):
            return False
        return worker.startswith(queue + "-")

    def queue_id(self) -> str:
        """The id of this queue, which a copy gets by this at the latest."""
        if not self.identity.queue:
            with self.transaction():
                pass
        return self.identity.queue

    # The whole file.

    def expect_bulk(self) -> None:
        """Before many jobs are added: keep more of the index of ids in memory.

        Random ids hit it everywhere.
        """
        self.execute("PRAGMA cache_size = -40000")  # KiB

    def shrink(self) -> None:
        """Give disk space back after a purge, once a quarter of the file is free."""
        free = self.value("PRAGMA freelist_count")
        if free * 4 > self.value("PRAGMA page_count"):
            with self.alone():
                try:
                    self.execute("VACUUM")
                except sqlite3.Error as error:
                    raise translate(error, self.path) from error

    def backup(self, path: str) -> None:
        """Copy the database into the file `path`, as another queue.

        What was running is pending there. Raises QueueError if it can't be written.
        """
        self.copy_to(
            path,
            """UPDATE jobs SET state = 'pending', ready = 1, due = started_at - waited,
                attempts = max(attempts - 1, 0),
                cancel = 0, worker = NULL, slot = NULL, locked_at = NULL
                WHERE state = 'processing'""",
            "DELETE FROM workers",
            "DELETE FROM pools",
            RENEW_IDENTITY)

    def copy_to(self, path: str, *changes: str) -> None:
        """Copy the database as it is at this moment into a file, and change the copy.

        By SQLite's own online backup, in one step: in several, each write of a worker between two
        of them would start it anew. The file appears whole, or not at all.
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
    """Close the stores before the process ends; if False it must end by os._exit, see Log."""
    closed = [store.close() for store in list(OPENED)]
    return all(closed)


# ═══ Store ═══ what is read of the queue, jobs and the runs kept; each change of state ═══════
#
# Five layers: Administration (workers, pools, settings, queues), Reading (jobs and runs), Endings
# (what follows when a job has ended), Editing (what is changed by hand), Store (jobs change).
# Whatever changes anything is called in a transaction; `settle`, `change_each` and `forget_some`
# make their own, many short ones. So each change is whole, whoever is killed meanwhile, and each
# is made only if the job is still in the state that it is made from.
#
#   add      Jobs come in: one transaction, all or none. A job that waits for others is not ready
#            until the transaction that records the last of those makes it so: nobody can miss it.
#   claim    First the jobs whose time has come are made ready, then one is taken, in the
#            transaction that records the worker's last run. Two workers can't take the same: the
#            second begins after the first has committed. The worker holds the run's token before.
#   record   WHERE runs = ? AND state = 'processing': a run is recorded once. A worker that was
#            taken for lost, and goes on, changes nothing: its job was given back, and perhaps
#            runs again. With the end of a job goes what follows from it: who waited is let go or
#            dies too, and the jobs of on_end and on_dead are added. So no death goes untold. The
#            run is kept with its output (_keep_run), and counted (_count_run).
#   cancel   A running job is only marked. Its worker may miss the mark and record a failure: then
#            `record` sees it, and the job is cancelled all the same.
#   settle   A job that ends in vain takes along those that were to run after it, a part of them in
#            its own transaction. A mark there says that there are more, for whoever goes on.
#   delete   WHERE state <> 'processing', and nobody waits for it: both could have changed since
#            the user, or the sweep, looked.
#
# Who makes a job claimable, or changes what workers follow, rings their bells after its commit.
# A ring before it would wake them to look at what was there before.
#
# Ranges of jobs: from `first` to `last`, both included; or those behind `before`, which is not
# included itself, up to `last`, which is.

NEVER = 1 << 62


def at_line(line: int, problem: str) -> str:
    """What is wrong with a job, and on which line of its file (0: it has none)."""
    return "line %d: %s" % (line, problem) if line else problem


def serves(pool: Row, queue: str) -> bool:
    """Whether the workers of a pool take jobs of a queue."""
    return not pool["queues"] or queue in (HOOK_QUEUE, *pool["queues"].split(","))


class Administration(Database):
    """Who works, by which settings, and which queues may run."""

    # Workers and pools come and go, and are told what to do.

    def add_pool(self, name: str, workers: int, queues: Names,
                 max_jobs: int | None, now: int) -> None:
        """Register a pool of this process: its queues (none: all) and its claims (None: no end)."""
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
        """How a pool was told to `stop`, its `jobs_left` to claim, and how many `died` there."""
        return self.first(GET_POOL, name) or {"stop": 0, "jobs_left": 0, "died": 0}

    def pools(self) -> list[Row]:
        """Every pool that is registered, each with `alive`."""
        return self.registered(ALL_POOLS)

    def workers(self) -> list[Row]:
        """Every worker that is registered: if it lives, the job it runs, and what it waits for."""
        return [dict(worker, trouble=trouble_of(self.path, worker["name"]))
                for worker in self.registered(ALL_WORKERS)]

    def serving(self, queue: str) -> list[Row]:
        """The live workers that serve a queue."""
        pools = {pool["name"] for pool in self.pools()
                 if pool["alive"] and serves(pool, queue)}
        return [worker for worker in self.workers()
                if worker["alive"] and worker["pool"] in pools]

    def queues_of_runs(self) -> set[str]:
        """The queues of every `run` under way: it counts its jobs at its end."""
        return {pool["queues"] for pool in self.pools()
                if pool["alive"] and is_run_queue(pool["queues"] or "")}

    def ask_stop(self, pools: Iterable[str], level: int) -> None:
        """Have pools stop soon (1) or now (2); ring their workers afterwards."""
        for name in pools:
            self.execute("UPDATE pools SET stop = max(stop, ?) WHERE name = ?", level, name)
        self.execute(NEXT_EPOCH)

    def holders(self) -> set[str]:
        """The workers in whose name a job is processing."""
        return set(self.column("SELECT DISTINCT worker FROM jobs WHERE state = 'processing'"))

    def sleepers(self) -> list[str]:
        """The workers that run no job."""
        return self.column("""SELECT name FROM workers
            EXCEPT SELECT worker FROM jobs WHERE state = 'processing'""")

    def lost_jobs(self) -> list[Row]:
        """Every job whose worker is dead."""
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
        """Every setting with the value that holds now, and what follows from them for a `run`."""
        found = self.rows("SELECT name, value FROM settings")
        given = {name: json.loads(value) for name, value in found}
        given.setdefault("run_output_bytes", given.get("max_output_bytes", RUN_OUTPUT))
        return {**SETTINGS, **given}

    def set_setting(self, name: str, value: Any) -> None:
        """Let a checked value hold from now on; ring the workers afterwards."""
        self.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", name, json.dumps(value))
        self.execute(NEXT_EPOCH)

    def unset_setting(self, name: str) -> None:
        """Let the default hold again; ring the workers afterwards."""
        self.execute("DELETE FROM settings WHERE name = ?", name)
        self.execute(NEXT_EPOCH)

    # Queues are limited, paused and counted.

    def set_concurrency(self, queue: str, most: int | None) -> None:
        """Let at most so many jobs of a queue run at once, over all pools.

        None: as many as there are workers.
        """
        self.execute(ADD_QUEUE, queue)
        self.execute("UPDATE queues SET concurrency = ? WHERE name = ?", most, queue)
        self.execute(FORGET_QUEUE, queue)
        self.execute(NEXT_EPOCH)

    def pause(self, queue: str | None, paused: bool, now: int) -> None:
        """Start no more jobs of a queue, or start them again.

        None: of any queue, those to come included.
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
        """Whether none of a queue's jobs is to start after the first that dies."""
        self.execute("UPDATE queues SET fail_fast = ? WHERE name = ?", fail_fast, queue)

    def new_run(self) -> str:
        """A name for the queue of a `run`, which no queue has or ever had."""
        while True:
            self.execute("UPDATE control SET runs = runs + 1")
            name: str = RUN_QUEUE % self.value("SELECT runs FROM control")
            if not self.rows("SELECT 1 FROM queues WHERE name = ?", name):
                return name

    def all_paused(self) -> bool:
        """Whether all queues are paused, those to come included."""
        return bool(self.value("SELECT paused FROM control"))

    def pauses(self) -> list[Row]:
        """Each pause: of which queue (None: of all), and since when, where that is known."""
        return self.dicts(
            """SELECT NULL AS queue, nullif(switched_at, 0) AS paused_at FROM control WHERE paused
                UNION ALL SELECT name, nullif(switched_at, 0) FROM queues WHERE paused""")

    def queues(self) -> list[Row]:
        """Every queue that has a job, a limit or a pause, with its jobs in each state."""
        return self.dicts(
            """SELECT name, concurrency, queues.paused OR control.paused AS paused, pending,
                processing, completed, failed, dead, cancelled
                FROM queues CROSS JOIN control ORDER BY name""")

    def queue(self, name: str) -> Row:
        """One of `queues`, also if it has no job."""
        empty = {"name": name, "concurrency": None, "paused": self.all_paused(),
                 **dict.fromkeys(STATES, 0)}
        return next((queue for queue in self.queues() if queue["name"] == name), empty)

    def count(self, selection: Selection) -> int:
        """How many jobs there are in the states (none: all) and queues (none: all) selected."""
        found = [each for each in self.queues()
                 if not selection.queues or each["name"] in selection.queues]
        return sum(each[state] for each in found for state in set(selection.states or STATES))

    def counts(self) -> dict[str, int]:
        """The number of jobs in each state."""
        totals = self.rows(
            """SELECT total(pending), total(processing), total(completed), total(failed),
                total(dead), total(cancelled) FROM queues""")
        return dict(zip(STATES, map(int, totals[0])))

    def damage(self) -> list[str]:
        """What SQLite's own check, and a recount of all jobs, find wrong with the database."""
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
    """What there is to see of the jobs and their runs; nothing here changes anything."""

    # Jobs, with all their fields.

    def find(self, name: str) -> Row:
        """The job with this id, or with this unique prefix of an id that queuectl made.

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
        """A job with all its fields; None if it was forgotten."""
        return self.first(SELECT_JOBS + "WHERE seq = ?", seq)

    def _page(self, selection: Selection, start: int, newest: bool, count: int) -> list[Row]:
        statement, values = select_jobs(selection, newest, count)
        return self.dicts(statement, start, *values)

    def newest(self, selection: Selection, count: int) -> list[Row]:
        """The newest `count` jobs that are selected, newest last."""
        return self._page(selection, NEVER, True, count)[::-1]

    def jobs(self, selection: Selection, seq: int = 0, size: int = 1000) -> Iterator[Row]:
        """All jobs behind `seq` that are selected, oldest first, `size` at a time."""
        while True:
            page = self._page(selection, seq, False, size)
            yield from page
            if len(page) < size:
                return
            seq = page[-1]["seq"]

    def last_to_die(self, selection: Selection, count: int) -> Iterator[Row]:
        """At most `count` jobs of a selection of dead ones, the last to die first, in pages."""
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
        """The jobs that are selected now: their seqs, and when each was last changed.

        Two arrays: a million jobs take 16 MB.
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
        """How many jobs are selected; where states and queues are all that is said, as counted."""
        if selection == Selection(selection.states, selection.queues):
            return self.count(selection)
        return len(self.look(selection)[0])

    def jobs_between(self, before: int, last: int, size: int = 1000) -> Iterator[Row]:
        """The jobs behind seq `before` up to `last`, in the order they came, `size` at a time."""
        for job in self.jobs(Selection(), before, size):
            if job["seq"] > last:
                return
            yield job

    def ended_between(self, queue: str, before: int, last: int) -> list[int]:
        """The seqs of the jobs of a queue behind `before` up to `last` that have ended."""
        return self.column(
            """SELECT seq FROM jobs WHERE seq > ? AND seq <= ? AND queue = ?
                AND +state IN ('completed', 'dead', 'cancelled') ORDER BY seq""",
            before, last, queue)

    def states_between(self, queue: str, before: int, last: int) -> dict[str, int]:
        """How many jobs of a queue behind `before` up to `last` are in each state."""
        found = self.rows(
            """SELECT state, count(*) FROM jobs WHERE seq > ? AND seq <= ? AND queue = ?
                GROUP BY state""", before, last, queue)
        return {**dict.fromkeys(STATES, 0), **dict(found)}

    # Runs.

    def runs(self, seq: int, last: int = 0) -> Iterator[Row]:
        """The recorded runs of a job after run `last`, with their output, oldest first."""
        page: list[Row] = []
        while len(page) in (0, 20):
            page = self.dicts(
                """SELECT id % 16777216 AS run, attempt, state, started_at, finished_at,
                    seconds AS duration_seconds, exit_code, error, worker, stdout, stderr FROM runs
                    WHERE id > ? * 16777216 + ? AND id <= ? * 16777216 + 16777215
                    ORDER BY id LIMIT 20""", seq, last, seq)
            if not page:
                return
            yield from page
            last = page[-1]["run"]

    def run_times(self, seq: int) -> tuple[int, float]:
        """How many runs of a job are recorded, and their average in seconds."""
        count, average = self.rows("SELECT count(*), avg(seconds) " + RUNS_OF_JOB, seq, seq)[0]
        return count, average or 0.0

    def history(self, by: str, since: int, until: int) -> list[Row]:
        """What was done from one time to another, by hour, day or queue.

        From 0 to 0 is all that was ever done.
        """
        keys = {"queue": "queue", "hour": "start - start % 3600000",
                "day": "start - start % 86400000"}
        name = "queue" if by == "queue" else "starts_at"
        return self.dicts(
            """SELECT %s AS %s, sum(completed + failed + died) AS runs, %s FROM %s
                GROUP BY 1 ORDER BY 1"""
            % (keys[by], name, SUMS, DONE), since, until, since, until, until)

    def runs_per_second(self, length: int, now: int) -> float:
        """How many runs ended a second in the last `length` milliseconds, from a full minute on."""
        since = now - length
        since -= since % MINUTE
        count = self.value("SELECT total(completed + failed + died) FROM " + DONE,
                           since, now, since, now, now)
        return float(count * 1000 / (now - since))

    def totals(self) -> list[Row]:
        """The queues as the history has them, with their jobs in each state."""
        states = ", ".join("sum(%s) AS %s" % (state, state) for state in STATES)
        return self.dicts("""SELECT %s AS queue, max(queues.paused OR control.paused) AS paused, %s
            FROM queues CROSS JOIN control GROUP BY 1 ORDER BY 1""" % (COUNTED_AS, states))

    # What a worker looks at.

    def pulse(self) -> tuple[int, int, bool]:
        """What it looks at first: the epoch of settings and orders, the next time, unsettled jobs.

        The time is the earliest for which a job waits, or at which one expires (milliseconds, or
        NEVER). Unsettled: see Endings.
        """
        epoch, due, expiry, unsettled = self.rows(PULSE)[0]
        return epoch, min(due or NEVER, expiry or NEVER), bool(unsettled)

    def next(self, queues: Names) -> tuple[Any, ...] | None:
        """The job that is next in these queues (none: all); None if there is none.

        It is told as it would be claimed: the fields of Job up to `since`.
        """
        return next(iter(self.rows(next_job(len(queues)), *queues)), None)

    def ready(self, queues: Names, due: int, now: int) -> bool:
        """Without the mutex: whether a job can be claimed now; `due` is what `pulse` told."""
        return due <= now or self.next(queues) is not None

    def drained(self, queues: Names, now: int) -> bool:
        """Whether no job of these queues (none: all) is due, failed or processing.

        Those of paused queues don't count.
        """
        for queue in self.queues():
            served = not queues or queue["name"] in queues
            if served and not queue["paused"] and (queue["processing"] or queue["failed"]):
                return False
        return not self.ready(queues, self.pulse()[1], now)

    def is_busy(self, queue: str) -> bool:
        """Whether a job of a queue, or a hook of one, has not ended."""
        return bool(self.count(Selection(UNFINISHED, (queue,)))) or self.hooks_left(queue)

    def hooks_left(self, queue: str) -> bool:
        """Whether a hook of a job of this queue has not ended, and is not paused."""
        mark = "%%%s%%" % json.dumps({"QUEUECTL_QUEUE": queue})[1:-1]
        left = self.rows(
            """SELECT 1 FROM jobs WHERE state IN ('pending', 'processing', 'failed')
                AND queue = ? AND env LIKE ? LIMIT 1""", HOOK_QUEUE, mark)
        return bool(left) and not self.queue(HOOK_QUEUE)["paused"]

    def context(self, key: int) -> tuple[str, str, int, str]:
        """Of whoever enqueued a job: folder, PATH, umask and (JSON, if kept) environment."""
        return self.rows(  # type: ignore[no-any-return]
            """SELECT cwd, path, umask, coalesce(environ, '') FROM contexts
                LEFT JOIN environments ON environments.id = environment
                WHERE contexts.id = ?""", key)[0]

    def orders_of(self, seq: int) -> tuple[bool, float | None]:
        """Whether a job is to be cancelled, and the time-out of its run in seconds (None: none)."""
        found = self.rows("SELECT cancel, timeout_seconds FROM jobs WHERE seq = ?", seq)
        return (found[0][0] == 1, found[0][1]) if found else (False, None)

    # Who waits for whom.

    def awaited_by(self, seq: int) -> list[Row]:
        """The jobs that a job still waits for."""
        return self.dicts(
            """SELECT seq, id, state, due FROM waits JOIN jobs ON jobs.seq = awaited
                WHERE job = ? ORDER BY seq""", seq)

    def waiters_of(self, seq: int) -> list[Row]:
        """The jobs that wait for a job."""
        return self.dicts(
            """SELECT seq, id FROM waits JOIN jobs ON jobs.seq = job
                WHERE awaited = ? AND state IN ('pending', 'processing', 'failed')
                ORDER BY seq""", seq)

    def dependents_in_vain(self, seq: int) -> list[int]:
        """The dead or cancelled jobs that were to run after a job, or after one of those."""
        return self.column(
            """WITH RECURSIVE dependents (seq) AS (SELECT job FROM waits WHERE awaited = ?
                    UNION SELECT job FROM waits JOIN dependents ON awaited = dependents.seq)
                SELECT seq FROM jobs WHERE state IN ('dead', 'cancelled')
                AND seq IN (SELECT seq FROM dependents) ORDER BY seq""", seq)

    def causes_in_vain(self, seq: int) -> list[str]:
        """The ids of the dead or cancelled jobs for which a job waits, or would.

        Only of those that wait for no such job themselves.
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
        """The seqs of the dead or cancelled jobs that a job waits for."""
        return {job["seq"] for job in self.awaited_by(seq) if job["state"] in IN_VAIN}

    def waits_for_gone(self, seq: int) -> bool:
        """Whether a job was to run after one that died and was forgotten."""
        return bool(self.rows(
            """SELECT 1 FROM waits WHERE job = ?
                AND NOT EXISTS (SELECT 1 FROM jobs WHERE seq = awaited)""", seq))

    # How far it is, and what is next.

    def running_in(self, queue: str, count: int) -> list[str]:
        """The ids of the first few jobs of a queue that are processing."""
        return self.column(
            """SELECT id FROM jobs WHERE state = 'processing' AND queue = ?
                ORDER BY seq LIMIT ?""", queue, count)

    def last_seq(self) -> int:
        """The seq of the job that came last, be it forgotten; 0 if there was none."""
        return int(self.value("SELECT seq FROM sqlite_sequence WHERE name = 'jobs'") or 0)

    def unfinished(self, first: int, last: int) -> set[int]:
        """The seqs from `first` to `last` of jobs that have not ended."""
        return set(self.column(
            """SELECT seq FROM jobs WHERE state IN ('pending', 'processing', 'failed')
                AND seq BETWEEN ? AND ?""", first, last))

    def end_of(self, seq: int) -> tuple[str, str, str | None] | None:
        """Id, state and last error of a job; None if it was forgotten."""
        rows = self.rows("SELECT id, state, last_error FROM jobs WHERE seq = ?", seq)
        return next(iter(rows), None)

    def oldest_waiting(self, now: int) -> Row | None:
        """The job that could run for longest, and since when: `ready_at`.

        Of those whose queue is not paused; they may wait for a worker, or for a place in the limit
        of their queue.
        """
        fresh, late, overdue = OLDEST_WAITING
        found = self.dicts(fresh) + self.dicts(late) + self.dicts(overdue, now)
        return min(found, key=lambda job: job["ready_at"], default=None)

    def next_due(self, now: int) -> Row | None:
        """The job that waits for the earliest time after `now`."""
        return self.first(NEXT_DUE, now)


def _draw_ids(count: int) -> list[str]:
    """Random ids: 40 bits, ten hex digits each."""
    digits = os.urandom(5 * count).hex()
    return [digits[at:at + 10] for at in range(0, 10 * count, 10)]


def as_json(value: Any) -> str | None:
    """The JSON of what few jobs have."""
    return json.dumps(value) if value else None


def policy_of_draft(draft: Draft) -> str | None:
    """Its POLICY_FIELDS as they are kept, and its input of --each: those that say something."""
    return as_json({name: draft[name] for name in (*POLICY_FIELDS, "input")
                    if draft.get(name) not in (None, [])})


def is_special(draft: Draft) -> bool:
    """Whether a draft has what few jobs have, and bulks are to be fast without."""
    lists = draft["after"], draft["after_any"], draft["dead_on"]
    return any(lists) or {draft["unique"], draft["retry_after"], draft.get("input")} != {None}


class Intake:
    """Jobs that come in together, in one transaction.

    They are inserted by the thousand, which is faster than each alone. `caller` is the PATH,
    umask and environment (JSON, or empty) of whoever enqueues. Jobs whose id or key is taken are
    refused; with `skip_existing` they are left out, and the seqs of those that were there before
    are in `existing`.
    """

    def __init__(self, store: Reading, settings: Settings, caller: tuple[str, int, str],
                 now: int, skip_existing: bool = False):
        self.store, self.settings, self.caller = store, settings, caller
        self.now, self.skip_existing = now, skip_existing
        self.contexts: Row = {}  # their keys, by folder
        self.users: Counter[str] = Counter()  # how many jobs were added, by folder
        self.chunk: list[Draft] = []  # drafts that are not inserted yet
        self.added: Counter[str] = Counter()  # the same, by queue
        self.existing: list[int] = []

    def look_up_context(self, cwd: str) -> None:
        """Before a draft of this folder is inserted."""
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
        """The key of an environment, which is kept once for all folders; 0 for none."""
        if not environ:
            return 0
        self.store.execute("INSERT OR IGNORE INTO environments (environ) VALUES (?)", environ)
        return self.store.value("SELECT id FROM environments WHERE environ = ?", environ)

    def _row(self, draft: Draft, job_id: str) -> tuple[Any, ...]:
        """The values of ADD_JOB; what was not given takes the setting of this moment."""
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
        """Remember that it was inserted."""
        self.added[draft["queue"] or "default"] += 1
        self.users[draft["cwd"]] += 1

    def insert_chunk(self) -> None:
        """Insert the chunk at once; if an id is taken, one by one, which finds out whose."""
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
        """Insert one job, as `name` if it was drawn already; False if it is skipped."""
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
        """Insert what is left, and have queues and contexts count all that were added."""
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
    """The variables by which a hook learns which job has ended, and how."""
    shown = {
        "JOB_ID": job["id"], "QUEUE": job["queue"],
        "ATTEMPT": job["attempts"], "MAX_RETRIES": job["max_retries"],
        "COMMAND": shorten(job["command"], 30000), "STATE": job["state"],
        "EXIT_CODE": job["exit_code"], "ERROR": clean(job["last_error"] or "")}
    return {"QUEUECTL_" + name: "" if value is None else str(value)
            for name, value in shown.items()}


# Why a job was taken along by one that is dead or cancelled, whose id stands before it.
TAKEN_ALONG = {
    DEAD: " is dead, and this job was to run after it",
    CANCELLED: " was cancelled, and this job was to run after it"}
# Seconds that a change of many jobs may hold the mutex at a time, and rests between two times: who
# waits for the mutex would else hardly ever get it.
SLICE, BREATH = 0.2, 0.01


def why_along(awaited: Row) -> str:
    """The error of a job that was to run after one that ended in vain: which was the first."""
    reason, error = TAKEN_ALONG[awaited["state"]], awaited["last_error"] or ""
    return error if error.endswith(reason) else awaited["id"] + reason


class Endings(Reading):
    """What follows when a job has ended, in the transaction that records its end.

    A job that ends in vain, dead or cancelled, takes along those that were to run after it, and
    those after them. These may be a hundred thousand, and writers must not wait so long: so a part
    of them is left for transactions of its own (`settle`), and a mark in the database, `unsettled`,
    says so. Should the process be killed meanwhile, a worker sees the mark and goes on. Until then
    they wait for a job that is never completed, so nobody can claim them.
    """

    unsettled = False  # whether the last job that ended here has yet to take others along

    def follow_up(self, seq: int, state: str, settings: Settings, now: int) -> bool:
        """A job has ended by itself, or was cancelled; whether others can start, or went along.

        The jobs that `settings` ask for are added: by on_end, and by on_dead if it died. Those
        that waited for it alone go on, or are taken along.
        """
        news = self._meet(seq, state, now)
        if state != COMPLETED or settings["on_end"]:
            ended = self.dicts(HOOKED + "WHERE seq = ?", seq)
            news |= self._add_hooks(ended[0], state == DEAD, now)
            news |= state != COMPLETED and self._take_along(ended, now)
        if state == DEAD:
            self._fail_fast(seq)
        return news

    def _fail_fast(self, seq: int) -> None:
        """A job has died: if its run is to end at that, let none of its jobs start from now on.

        Those that wait are cancelled by `settle`.
        """
        ending = self.execute(
            """UPDATE queues SET fail_fast = 2, paused = 1 WHERE fail_fast = 1
                AND name = (SELECT queue FROM jobs WHERE seq = ?)""", seq)
        if ending:
            self.unsettled = True
            self.execute("UPDATE control SET unsettled = 1")

    def _cancel_rest(self, now: int) -> list[Row]:
        """Cancel some of the jobs that wait in a run that ends because one has died."""
        waiting = self.dicts(
            HOOKED + """WHERE +state IN ('pending', 'failed') AND queue IN (
                SELECT name FROM queues WHERE fail_fast = 2) LIMIT 500""")
        for job in waiting:
            self.end_in_vain(job, CANCELLED, "cancelled: another job of its run died", now)
        if not waiting:
            self.execute("UPDATE queues SET fail_fast = 1, paused = 0 WHERE fail_fast = 2")
        return waiting

    def _meet(self, seq: int, state: str, now: int) -> bool:
        """Let go on who waited for such an end of a job, and for nothing else; whether any did."""
        completed = state == COMPLETED
        waiting = self.column("SELECT job FROM waits WHERE awaited = ? AND (either OR ?)",
                              seq, completed)
        if waiting:
            self.execute("DELETE FROM waits WHERE awaited = ? AND (either OR ?)", seq, completed)
            self.db.executemany(LET_GO, [(now, now, job) for job in waiting])
        return bool(waiting)

    def _take_along(self, doomed: list[Row], now: int) -> bool:
        """Let the jobs end in vain that were to run after these, and after those, for SLICE.

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
        """Let a job that waits be dead or cancelled."""
        job.update(state=state, last_error=error)
        self.execute(
            """UPDATE jobs SET state = ?, ready = 0, due = NULL, last_error = ?, updated_at = ?,
                finished_at = ? WHERE seq = ?""",
            state, error, now, now, job["seq"])
        self._count_in_vain(job["queue"])
        self._add_hooks(job, False, now)
        self._meet(job["seq"], state, now)

    def _count_in_vain(self, queue: str) -> None:
        """Have drains of a queue tell by their exit code that not all was completed."""
        self.execute(
            """UPDATE pools SET died = died + 1
                WHERE queues IS NULL OR instr(',' || queues || ',', ?)""", ",%s," % queue)

    def settle(self, now: int) -> bool:
        """In transactions of its own: let all end that are still to be taken along.

        Whether there were any.
        """
        found = False
        while self.value("SELECT unsettled FROM control"):
            with self.transaction():
                doomed = self.dicts(  # as they are now: others may have settled or retried some
                    HOOKED + """WHERE +state IN ('dead', 'cancelled') AND seq IN (
                        SELECT awaited FROM waits JOIN jobs ON seq = job
                        WHERE NOT either AND state = 'pending') LIMIT 500""")
                doomed += self._cancel_rest(now)
                found = found or bool(doomed)
                self.execute("UPDATE control SET unsettled = ?", bool(doomed))
                self._take_along(doomed, now)
            sleep(BREATH)
        return found

    def _add_hooks(self, job: Row, died: bool, now: int) -> bool:
        """Add the jobs that on_end asks for, and on_dead if it `died`; whether there are any.

        They are jobs like others, but their own end makes none.
        """
        settings = self.settings()
        commands = settings["on_end"], died and settings["on_dead"]
        if job["queue"] == HOOK_QUEUE or not any(commands):
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
    """What a job waits for, and how it is changed by hand."""

    def _known(self, names: list[str], moved: Any) -> list[str]:
        """What a job is to wait for: of one `moved` here from another queue not what it has met."""
        return [name for name in names if not moved or self.first(WITH_ID, name)]

    def set_waits(self, seq: int, after: Names, after_any: Names, now: int) -> None:
        """Have a job wait for others, and note which. Raises QueueError if one is unknown.

        Of those in `after` each must be completed; of those in `after_any` each must have ended.
        A pending job is held back until then, or ends with the first that ended in vain.
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
        """A job that the one at `seq` is to run after."""
        found = self.first("SELECT seq, id, state, last_error FROM jobs WHERE id = ?", name)
        job = found or self.find(name)
        if job["seq"] == seq:
            raise QueueError("a job can't wait for itself")
        return job

    def edit(self, job: Row, changes: Draft, now: int) -> None:
        """Change given fields of a job that waits or has ended.

        Of a running one `changes` may have the time-out alone. Raises QueueError if the job would
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
        """Count a job in another queue than before."""
        state, before = job["state"], job["queue"]
        self.execute(ADD_QUEUE, queue)
        for name, step in ((queue, 1), (before, -1)):
            self.execute("UPDATE queues SET %s = %s + ? WHERE name = ?" % (state, state),
                         step, name)
        self.execute(FORGET_QUEUE, before)

    def _count_in_folder(self, job: Row, cwd: str) -> int:
        """Count a job in another folder than before; the key of its context there."""
        intake = Intake(self, {}, self.context(job["context"])[1:], 0)
        intake.look_up_context(cwd)
        key: int = intake.contexts[cwd]
        intake.contexts[""] = job["context"]  # the folder that it leaves
        intake.users.update({cwd: 1, "": -1})
        intake.finish()
        return key

    def _wait_anew(self, job: Row, new: Row, now: int) -> None:
        """Have a job wait for other jobs than before."""
        seq = job["seq"]
        if job["state"] == FAILED:  # its next try is one more thing that it waits for
            self.execute("UPDATE jobs SET state = 'pending', run_at = due WHERE seq = ?", seq)
        after, after_any = [  # what was kept is one text
            names.split(",") if isinstance(names, str) else names or []
            for names in (new["after"], new["after_any"])]
        self.execute("DELETE FROM waits WHERE job = ?", seq)
        self.set_waits(seq, after, after_any, now)
        circle = self.rows(
            """WITH RECURSIVE awaited_ones (seq) AS (SELECT awaited FROM waits WHERE job = ?
                    UNION SELECT awaited FROM waits JOIN awaited_ones ON job = awaited_ones.seq)
                SELECT 1 FROM awaited_ones WHERE seq = ?""", seq, seq)
        if circle:
            raise QueueError("%s would wait for itself: what it is to run after waits for it"
                             % job["id"])
        self.execute(LET_GO, now, now, seq)

    def _die(self, seq: int, now: int) -> None:
        """Let a failed job be dead at once, as if its last run had been the last one allowed."""
        job = self.dicts(HOOKED + "WHERE seq = ?", seq)[0]
        job["state"] = DEAD
        self.execute("UPDATE jobs SET state = 'dead', ready = 0, due = NULL WHERE seq = ?", seq)
        self._count_in_vain(job["queue"])
        self.follow_up(seq, DEAD, self.settings(), now)


READY_AT_ONCE = 10_000


class Store(Editing):
    """The queue at `path`: one method for each change of a job's state, called in a transaction.

    Arguments and errors: see Database. Times are in milliseconds since the epoch.
    """

    # Jobs come in.

    def add(self, drafts: Iterable[Draft], settings: Settings, path: str, umask: int,
            now: int, skip_existing: bool = False,
            environ: str = "") -> tuple[int, int, list[int]]:
        """Insert jobs; the seq before the first, that of the last, and those that existed.

        `path`, `umask` and `environ` (JSON, or empty) are those of whoever enqueues. Raises
        QueueError if an id exists already, or a key is taken, unless `skip_existing`; and if a
        job is to wait for one that does not exist.
        """
        before = self.last_seq()
        intake = Intake(self, settings, (path, umask, environ), now, skip_existing)
        for draft in drafts:
            intake.look_up_context(draft["cwd"])
            if is_special(draft):
                intake.insert_chunk()  # it may wait for one of these
                self._add_special(intake, draft)
                continue
            intake.chunk.append(draft)
            if len(intake.chunk) == 1000:
                intake.insert_chunk()
        intake.finish()
        return before, self.last_seq(), intake.existing

    def _add_special(self, intake: Intake, draft: Draft) -> None:
        """Insert a job with a key, a policy, or others to wait for.

        If one of those has ended in vain already, so does the job.
        """
        if not intake.insert(draft):
            return
        seq = self.last_seq()
        self.execute("UPDATE jobs SET unique_key = ?, policy = ? WHERE seq = ?",
                     draft["unique"], policy_of_draft(draft), seq)
        intake.count(draft)
        self.execute(ADD_QUEUE, draft["queue"] or "default")  # its end in vain is counted there
        try:
            after, after_any = [
                self._known(draft[name] or [], draft.get("moved"))
                for name in ("after", "after_any")]
            self.set_waits(seq, after, after_any, intake.now)
        except QueueError as error:
            problem = "%s; what a job is to run after must stand before it" % error
            raise QueueError(at_line(draft.get("line", 0), problem)) from None

    # Jobs are claimed and recorded.

    def claim(self, worker: str, slot: int, queues: Names, due: int,
              now: int, pool: str = "") -> Job | None:
        """Claim the job that is next in these queues (none: all); None if there is none.

        If `due`, the time that `pulse` told, has come, jobs are made ready before; where they are
        very many, a part of them is made ready instead of a claim, so that the mutex is not held
        for long. `pool` is given if its claims are counted against a --max-jobs.
        """
        if due <= now:
            if self._expire(now):
                return None
            made_ready = self.execute(
                """UPDATE jobs SET ready = 1 WHERE seq IN (SELECT seq FROM jobs
                    WHERE ready = 0 AND due IS NOT NULL AND due <= ? ORDER BY due LIMIT %d)"""
                % READY_AT_ONCE, now)
            if made_ready == READY_AT_ONCE:
                return None
        found = self.next(queues)
        if found is None:
            return None
        job = Job._make((*found, self._free_place(found[3]), now))
        waited = max(0, now - job.since)
        if pool and job.queue != HOOK_QUEUE:
            turn = self.execute(
                """UPDATE pools SET jobs_left = jobs_left - 1
                    WHERE name = ? AND jobs_left > 0""", pool)
            if not turn:
                return None
        self.execute(
            """UPDATE jobs SET state = 'processing', ready = 0, due = NULL,
                attempts = attempts + 1, runs = runs + 1, worker = ?, slot = ?, place = ?,
                waited = ?, locked_at = ?, started_at = ?, updated_at = ? WHERE seq = ?""",
            worker, slot, job.place, waited, now, now, now, job.seq)
        return job

    def _free_place(self, queue: str) -> int:
        """The lowest number from 1 that no running job of a queue has."""
        taken = self.column(
            "SELECT place FROM jobs WHERE state = 'processing' AND queue = ?", queue)
        return min(set(range(1, len(taken) + 2)) - set(taken))

    def _expire(self, now: int) -> bool:
        """Cancel jobs whose first run should have begun by now, for SLICE; whether some are left."""
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
        """Make due the retries that were put off by a clock that has since been set back.

        Delays begin anew.
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
        """Record how a run ended; the job's new state, and whether others can start now.

        If it ended in vain, `pools` are told. The jobs that `settings` ask for are added when a
        job ends.
        Only if the job is still in that very run: otherwise somebody else has recorded it as lost,
        and that stands; the state is "" then.
        """
        job, now = ended.job, ended.finished_at
        state, attempts = next_state(ended.ending, job.attempts, job.max_retries, ended.final)
        if state not in ENDED and self.orders_of(job.seq)[0]:  # its worker has not heard of it
            state, attempts = CANCELLED, job.attempts
        if not self._leave_run(ended, state, attempts, retry_at):
            return "", False
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
        """Give a job its new state, if it is still in the run that ended."""
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
        """Keep what is shown of a run; where there was no room for it, it was none."""
        job = ended.job
        if ended.ending == UNSTARTED:
            self.execute("UPDATE jobs SET runs = runs - 1 WHERE seq = ?", job.seq)
            return
        self.execute(
            "INSERT INTO runs VALUES (? * 16777216 + ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            job.seq, job.runs, job.attempts, ended.ending, job.started_at, ended.finished_at,
            ended.seconds, ended.exit_code, ended.error, ended.worker,
            ended.stdout or None, ended.stderr or None)

    def _count_run(self, ended: RunResult, state: str) -> None:
        """Count a run that was completed, failed or (its job is dead) died.

        One that was ended from outside, or asked to be tried later, is none of these.
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
        """Put the oldest minutes together to an hour if all are older than `minutes_from`.

        Forget what is older than `kept_from`. Whether there was anything to do, and may be again.
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

    # Jobs are cancelled, retried, changed and forgotten; each tells if it was done.

    def cancel_waiting(self, seq: int, now: int,
                       reason: str = "cancelled before it ran again") -> bool:
        """Cancel a job that waits."""
        job = self.first(HOOKED + "WHERE seq = ? AND state IN ('pending', 'failed')", seq)
        if job:
            self.end_in_vain(job, CANCELLED, reason, now)
            self._take_along([job], now)
        return bool(job)

    def ask_cancel(self, seq: int, now: int) -> int:
        """Have the worker of a running job end it."""
        return self.execute(
            """UPDATE jobs SET cancel = 1, updated_at = ?
                WHERE seq = ? AND state = 'processing'""", now, seq)

    def retry(self, seq: int, now: int) -> int:
        """Give a job that has ended a new start, if its key is not taken.

        Should it wait for one that ended in vain, `settle` lets it end so again.
        """
        self.execute("""UPDATE control SET unsettled = 1
            WHERE EXISTS (SELECT 1 FROM waits WHERE job = ? AND NOT either)""", seq)
        return self.execute(RETRY, now, now, now, now, seq)

    def delete(self, seq: int) -> int:
        """Forget a job that is not running, and that no other waits for."""
        done = self.execute(
            """DELETE FROM jobs WHERE seq = ? AND state <> 'processing' AND NOT EXISTS (
                SELECT 1 FROM waits JOIN jobs AS waiting ON waiting.seq = waits.job
                WHERE awaited = jobs.seq AND waiting.state IN ('pending', 'processing', 'failed'))""", seq)
        if done:
            self.execute("DELETE " + RUNS_OF_JOB, seq, seq)
        return done

    def change_each(self, looked: tuple[Any, Any], change: Callable[[Row], Any],
                    newest_first: bool = False) -> Any:
        """Call `change` with each job that is as it was when `look` saw it; the seqs it changed.

        In transactions of SLICE each, so that nobody waits long for the mutex. A job is left out
        if anybody else has changed it, or if `change` returns nothing.
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
            sleep(BREATH)
        return done

    def forget_some(self, selection: Selection, last: int,
                    spared: Iterable[str] = ()) -> int:
        """Forget selected jobs of one state below seq `last`, the newest first, for SLICE at most.

        Returns the seq that was reached; 0: there are no more. What waits goes before what it
        waits for. Jobs of the queues `spared` are kept, and those that others changed meanwhile.
        The mutex is taken only if there is anything to forget.
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
    """The store of a database from which something is to be executed.

    `file` is its identity where it was checked before: it must be the same. Raises QueueError if
    others could have written it, or if it was replaced.
    """
    refuse_untrusted(db)
    store = Store(db, patience, tell)
    OPENED.append(store)
    if file not in (None, store.identity.file):
        store.close()
        raise QueueError("%s was replaced while it was in use; nothing of it is executed" % db)
    return store


# A backup is restored: a copy of it is put in the database's place.


def copy_backup(backup: str, part: str) -> None:
    """Copy a backup that is sound; raises QueueError if it is not."""
    source = Store(backup, reading=True)
    try:
        damage = source.damage()
        if damage:
            raise QueueError("%s is damaged: %s" % (backup, damage[0]))
        source.backup(part)
    finally:
        source.close()


def fold_log(db: str) -> None:
    """Have SQLite write the log into the database, if it can still read them."""
    old = sqlite3.connect(db, isolation_level=None)
    try:
        old.execute(CHECKPOINT).fetchall()
    except sqlite3.Error:
        pass
    finally:
        old.close()


def keep_aside(db: str) -> str:
    """Give a database, and a log that could not be folded in, a second name; the name."""
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
    """Put a copy of a backup in a database's place; the name of what it replaces, or nothing.

    Under the mutex. The old log is folded into the old database first, for it would be mixed with
    the new one; where that can't be, it is kept beside it. There is a database at every moment:
    until the last step the old one, which then has two names, and so is not mistaken for the new.
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
        os.rename(part, db)
        sync_folder(dirname(db))
        return kept
    except OSError as error:
        raise QueueError("%s can't be put in its place: %s" % (db, error.strerror)) from error
    finally:
        os.close(mutex)


# ═══ Runner ═══ one run's processes: start, bound and end them ═══════════════════════════════
#
# When a run has to end (time-out, cancel, stop) its worker decides: Worker, class Attending. How
# its processes are found and ended, and how its output is bounded, stands here; the signals and
# system calls are Platform's.

if TYPE_CHECKING:
    Pause = Callable[[float], object]  # sleeps up to so many seconds
FOREVER = float("inf")  # seconds
SHORTEST_LOOK, LONGEST_LOOK = 0.02, 0.5  # seconds between looks at a run's output
LONGEST_PAUSE = 0.25  # seconds between looks at processes that were told to end


def run_name(worker: str, seq: int, run: int) -> str:
    """The QUEUECTL_RUN of a run: unique, for no worker's name is used twice."""
    return "%s-%d-%d" % (worker, seq, run)


def members_of(mark: str, files: Names,
               leader: Leader = NOBODY) -> Callable[[], Living]:
    """A function that finds the living processes of one run; arguments as for `system.members`.

    It remembers whom it has found: a child whose only tie to the run was its parent stays a
    member when that parent is gone.
    """
    known: Living = {}

    def find() -> Living:
        found = system.members(mark, files, leader, known)
        known.update(found)
        return found

    return find


def end_processes(members: Callable[[], Living], grace: float, pause: Pause,
                  patience: float = FOREVER) -> bool:
    """End the processes that `members` finds: SIGTERM, after `grace` seconds SIGKILL.

    `members` is asked again until it finds none, for they may start others meanwhile. Gives up,
    and returns False, `patience` seconds after the first SIGKILL.
    """
    start = monotonic()
    nap = 0.005
    asked: set[tuple[int, str]] = set()
    while True:
        found = None  # they can't be looked for now: they may all live
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


# Where the jobs of a context run: their folder, umask, and environment in native form.
JobEnvironment = namedtuple("JobEnvironment", "cwd umask env")


def native_items(texts: dict[str, str]) -> Env:
    return {system.native(name): system.native(value) for name, value in texts.items()}


class Run:
    """One run of a claimed job: its shell, its deadline, its output, its end."""

    pid, leader = 0, NOBODY
    lost = False  # whether it has ended with an exit code that nobody knows
    short = False  # whether it could not start because the machine has no room for it
    exit_code: int | None = None
    printed, look_every = 0, SHORTEST_LOOK

    def __init__(self, job: Job, worker: str, slot: OutputFiles, limit: int):
        """`slot` is open and takes its output, of which up to `limit` bytes a stream are kept."""
        self.job, self.worker, self.slot, self.limit = job, worker, slot, limit
        self.name = run_name(worker, job.seq, job.runs)
        self.began = monotonic()
        self.set_timeout(job.timeout_seconds)
        self.next_look = self.began + SHORTEST_LOOK

    def start(self, environment: JobEnvironment, db: str, shell: str) -> str:
        """Start the command in its environment by a shell; why it could not, or ""."""
        cwd, umask, env = environment
        env = {**env, **self._variables(db)}
        try:
            first = system.ticks()
            self.pid = system.spawn(self.job.command, shell, env, cwd, umask,
                                    *self.slot.fds)
            self.leader = Leader(self.pid, first, system.ticks())
            return ""
        except OSError as error:
            if error.filename == system.native(cwd):
                return "can't start in the folder %s: %s" % (cwd, error.strerror)
            self.short = error.errno in (*SHORTAGES, errno.EIO)
            return "can't start %s: %s" % (shell, error.strerror)

    def _variables(self, db: str) -> Env:
        """The job's own part of its environment."""
        job = self.job
        values = job.id, job.attempts, job.max_retries, job.queue, db
        given = dict(zip(JOB_VARIABLES, map(str, values)))
        given.update(json.loads(job.env or "{}"))  # a hook's tells of the job that has ended
        given.update(QUEUECTL_RUN=self.name, QUEUECTL_SLOT=str(job.place))
        return native_items(given)

    def set_timeout(self, seconds: float | None) -> None:
        """End it so many seconds after its start; None: it may take as long as it likes."""
        self.timeout = seconds
        self.deadline = self.began + (seconds or FOREVER)

    def has_ended(self) -> bool:
        """Whether the shell has ended; `exit_code` (negative: its signal) is known from then on."""
        if self.exit_code is not None or self.lost:
            system.reap(0)
            return True
        try:
            self.exit_code = system.reap(self.pid)
        except ChildProcessError:
            self.lost = True
        return self.exit_code is not None or self.lost

    def patience(self) -> float:
        """Seconds for which the worker may sleep without harm to this run."""
        return max(0.0, min(self.next_look, self.deadline) - monotonic())

    def bound_output(self) -> None:
        """Look at the output if it is time to: often while it grows fast, seldom while not."""
        now = monotonic()
        if now < self.next_look:
            return
        before = self.printed
        try:
            self.printed = self.slot.bound(self.limit)
        except OSError:
            pass  # looked at again soon
        self.look_every = min(self.look_every * 2, LONGEST_LOOK)
        if self.printed - before > self.limit // 4:
            self.look_every = SHORTEST_LOOK
        self.next_look = now + self.look_every

    def end(self, grace: float, pause: Pause) -> None:
        """End the shell and everything it started, wherever that went; see `end_processes`."""
        members = members_of(self.name + "\0", self.slot.paths, self.leader)

        def living() -> Living:
            self.has_ended()  # the dead are collected, and the exit code of the shell is not lost
            return members()

        end_processes(living, grace, pause)

    def end_leftovers(self, grace: float, pause: Pause) -> None:
        """After a run that did not complete: nothing of it may live beside the next one."""
        if not system.childless:
            self.end(grace, pause)

    def result(self, ending: str, error: str | None = None) -> RunResult:
        """What there is to record; the reason of a failure ends with the last line of stderr."""
        stdout, stderr = self.slot.read(self.limit)
        why = last_line(stderr) if error else ""
        if why:
            error = "%s: %s" % (error, why)
        code = None if ending == STOPPED else self.exit_code
        return RunResult(self.job, ending, code, error, now_millis(),
                     monotonic() - self.began, stdout, stderr, self.worker)


# ═══ Worker ═══ claim, run, record; when a run must end; recovery after dead workers ═════════
#
# What a worker does for a job, and in which order. All the time it holds its life lock, from the
# transaction that registers it until its process has ended: the others ask that lock if it lives.
#
#     take the next run's token     flock of the slot's two output files
#     ┌ mutex, BEGIN IMMEDIATE
#     │ record the last run         only if the job is still in that very run
#     │ claim the next job          in this worker's name, with the slot's number
#     └ COMMIT, mutex
#     start the command             its processes inherit the token
#     note its first process        in the life file
#     sync the log                  some milliseconds later, while the command runs
#     tell how the last run ended, empty its output files, let go of its token
#     wait: for the end of the shell, the deadline, a cancellation, an order to stop
#
# * The token is taken before the commit, which notes the number of its slot. From the commit on,
#   whoever finds this worker dead asks that slot whether the run still lives. A claim whose token
#   could not be taken (no descriptor is left, a daemon keeps the files) would look like a run that
#   has ended.
# * The last run is recorded and the next job claimed in one commit, under one mutex. So the last
#   token and the next are held at once, which takes two slots; while records are not on disk yet,
#   some more.
# * The sync comes before telling, and before the output files are emptied. A power cut may undo a
#   commit until then: nobody has heard of it, and the job runs again.
# * A job that another was to run after may have been recorded by another worker, whose commit is
#   not on disk yet. So before it starts, the log is synced.
# * The first process is noted when it has just begun: while it is young it can't have left its
#   session, by which alone a job is found that has given up its descriptors and environment.
# * Handlers of signals set `leave` and ring the bell. Whoever waits drains the bell first and
#   looks at everything then, so nothing is lost that happens between the look and the sleep.

SHUTDOWN_CODES = (-15, -9, 143, 137)  # SIGTERM and SIGKILL, or what programs make of them
SHARED_SYNC = 16  # records that may share a sync of the disk, where jobs are short
SYNC_WAIT = 0.005  # seconds a record waits for others to share its sync
LONGEST_REST = 30.0  # seconds for which a worker rests while the machine has no room for a job
SYNC_AGAIN = 1.0  # seconds until a sync of the disk is tried again that has failed
LAST_PATIENCE = 0.4  # seconds that who leaves waits to write that it is gone
CLOCK_STEP = 1.0  # seconds the wall clock must be set back by before retries are looked at again


def retry_time(job: Any, ending: str, settings: Settings, now: int) -> int:
    """When a job runs again that failed, or asked to be tried later, at `now`; in milliseconds."""
    if ending == DEFERRED:
        return now + to_millis({**settings, **policy_of(job)}["retry_after"])
    base = job.backoff_base
    if base is None:
        base = settings["backoff_base"]
    chance = int.from_bytes(os.urandom(4), "big") / 2**32
    return now + to_millis(backoff(
        base, job.attempts, settings["backoff_max"], settings["backoff_jitter"], chance))


def _pool_of(worker: str) -> str:
    return worker.rpartition("-")[0]


# Recovery gives back what dead workers held. What is held, and in which order:
#
#     recovery lock                 one process at a time; the others leave it the work
#       look for lost jobs          processing, and the life lock of their worker is free
#       end what is left of them    SIGTERM, grace, SIGKILL; all of them together, without the mutex
#       for each lost job
#         look again                if anything still lives, the job stays as it is
#         take the token            if it is held by whom we can't see, likewise
#         mutex: record the run     only if the job is still in that very run
#         let go of the token
#         sync, remove its output, tell
#       mutex: forget dead workers and pools, and their files
#     ring every worker
#
# * Ending processes takes seconds. The write mutex must not be held so long, hence the lock.
# * A recoverer may be killed at any moment. The job is then as it was, or recorded; what it left
#   of files goes with the other files of the dead worker.
# * Between the look and the record somebody may cancel the job. The record looks again, in its
#   transaction, and changes nothing if the job is no longer in that very run.
# * The dead are forgotten in a transaction, for workers are born in one: a life file whose lock
#   is not taken yet is never seen.


class LostRun:
    """A job whose worker is dead, and what is left of its run."""

    def __init__(self, store: Store, row: Row):
        """`row` is one of `store.lost_jobs()`."""
        self.store, self.row, self.worker = store, row, row["worker"]
        self.job = job = Job._make(row[field] for field in Job._fields)
        self.slot = OutputFiles(store.path, self.worker, row["slot"])
        self.stopping = store.pool(_pool_of(self.worker))["stop"]
        leader = leader_of(store.path, self.worker, job.seq, job.runs)
        mark = run_name(self.worker, job.seq, job.runs) + "\0"
        self.orphans = members_of(mark, self.slot.paths, leader)
        self.own = store.is_own(self.worker)
        if not self.own:
            # This is a copy of the queue whose worker it was. As long as there are any processes
            # of that queue, the job may be running there. The name of a worker begins with the id
            # of its queue, or that of its pool where it is old.
            original = self.worker.rsplit("-", 2)[0]
            self.orphans = members_of(original + "-", ())

    def give_back(self, tell: Tell, pool: str) -> bool:
        """Record it, now that its orphans were ended; False if some could not be.

        `tell` and `pool` are as for `recover`.
        """
        job, settings = self.job, self.store.settings()
        test_point("recovering")
        # Whoever cancels a job of the original doesn't wait for its run there to end.
        given_up = self.row["cancel"] and not self.own
        if not given_up and self.orphans():
            return False
        if not self.slot.open() and not given_up:  # held in another container, or by another user
            return False
        try:
            result = self._result(output_limit(settings, job.queue))
            retry_at = retry_time(job, LOST, settings, result.finished_at)
            pools = {pool, _pool_of(self.worker)}
            with self.store.transaction():
                state, _ = self.store.record(result, retry_at, pools, settings)
        finally:
            self.slot.close()  # kept by mistake it would keep the job from ever being given back
        test_point("recovered")
        self.store.sync()  # before the output is thrown away
        if not given_up:
            self.slot.remove()
        if state:
            tell("%s was lost with its worker %s (attempt %d of %d); it is %s now" % (
                job.id, self.worker, job.attempts, max(1, job.max_retries), state))
        return bool(state)

    def _result(self, limit: int) -> RunResult:
        """What there is to record."""
        stdout, stderr = b"", b""
        if self.slot.fds:
            stdout, stderr = self.slot.read(limit)
        now = now_millis()
        ending, error = LOST, "the worker %s was lost while it ran this job" % self.worker
        if self.row["cancel"]:
            ending, error = CANCELLED, "cancelled"
        elif not self.own:
            ending, error = STOPPED, "it ran in the queue that this one was copied from"
        elif self.stopping:
            ending = STOPPED
            error = "ended with its worker while the pool was stopping, to be run again"
        seconds = max(0, now - self.job.started_at) / 1000
        return RunResult(self.job, ending, None, error, now, seconds,
                     stdout, stderr, self.worker)


def _forget_dead(store: Store) -> None:
    """Remove dead workers and pools, and their files, unless a job is still held in their name."""
    names = set(names_beside(store.path, ".life"))
    names.update(entry["name"] for entry in store.pools() + store.workers())
    if all(is_alive(store.path, name) for name in names):
        return
    with store.transaction():
        keep = {name for name in names if is_alive(store.path, name)}
        # A dead pool is kept while any of its workers lives: `stop` reaches them through it.
        keep.update([_pool_of(name) for name in keep])
        keep.update(job["worker"] for job in store.lost_jobs())
        for name in names - keep:
            store.forget(name)
            remove_files(store.path, name)


def recover(store: Store, pause: Pause, tell: Tell,
            pool: str = "") -> int:
    """Give back what dead workers held, after ending what is left of it; how many jobs.

    `tell` gets a line for each. A job whose tries are used up by that has died in the hands of
    `pool` too. Raises QueueError if the database can't be trusted: by what it says, processes are
    ended. Raises Unavailable or OSError if it can't be done now.
    """
    folder = folder_path(store.path)
    if not isdir(folder) and not store.lost_jobs():
        return 0
    refuse_untrusted(store.path)
    try:
        os.makedirs(folder, 0o700, exist_ok=True)
        lock = open_private(join(folder, "recovery.lock"), os.O_RDWR)
    except OSError as error:
        raise Unavailable("%s can't be used: %s" % (folder, error.strerror)) from error
    try:
        if not system.try_lock(lock):
            return 0
        store.queue_id()
        lost = [LostRun(store, row) for row in store.lost_jobs()]
        own = [run.orphans for run in lost if run.own]  # those of the original are left alone
        end_processes(
            lambda: {pid: started for orphans in own for pid, started in orphans().items()},
            store.settings()["kill_grace_seconds"], pause, 1.0)
        count = sum([run.give_back(tell, pool) for run in lost])
        _forget_dead(store)
    finally:
        os.close(lock)
    if count:
        ring_all(store.path)
    return count


# Sweeping forgets jobs that have ended long ago.

HISTORY = "history"  # what is swept beside jobs of some states
SWEEP_TIME, SWEEP_REST = 0.1, 60.0  # seconds of work in one second; between rounds, at least
YOUNGEST_SWEPT = 5.0  # seconds for which ended jobs are kept at least: somebody may wait for them
STEADY_TIME = 60.0  # seconds for which the clock must have gone as the machine's own does


def _sweep_on(store: Store, keep: dict[str, float],
              place: dict[str, int]) -> dict[str, int]:
    """Go on with a round from a place; the place that was reached."""
    spared, end = store.queues_of_runs(), monotonic() + SWEEP_TIME
    place = {state: last for state, last in place.items() if state in keep}  # not unset meanwhile
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
    """Whether the time of day can be believed, and what to note of it.

    A clock that is a year ahead for some seconds must not let everything be forgotten: it has to
    have gone for STEADY_TIME as the machine's own clock, which nobody sets.
    """
    now = [time.time(), monotonic()]
    if noted:
        passed, own = now[0] - noted[0], now[1] - noted[1]
        if own >= 0 and abs(passed - own) <= CLOCK_STEP:
            return own >= STEADY_TIME, noted
    return STEADY_TIME == 0, now  # it was set, or the machine started anew


def _sweep_from_note(store: Store, keep: dict[str, float], file: int) -> None:
    """Go on where the note in the file says that the last worker stopped, and note where this does.

    The note has the `place` in the round: for each state that is not done, the seq of the last
    job that was looked at. There is none before the first round, and it is empty when a round is
    done, since the date of the file. `clock` is since when the clock was steady.
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
    """Forget jobs that ended longer ago than `keep_completed` and `keep_dead` say, and old history.

    Works for SWEEP_TIME, then leaves off until it is called again. One worker at a time does that,
    under a lock. The longer jobs are kept, the longer it rests between two rounds: a hundredth of
    that. Raises QueueError, OSError or ValueError if it can't be done now.
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


def take_life(db: str, name: str) -> int:
    """Take the life lock of a worker or pool, in the transaction that registers it; its file."""
    os.makedirs(folder_path(db), 0o700, exist_ok=True)
    fd = open_private(life_path(db, name), os.O_RDWR)
    try:
        while not system.try_lock(fd):  # somebody asks at this moment whether it is alive
            sleep(0.001)
        return fd
    except OSError:
        os.close(fd)
        raise


# How a pool in the background drains: nobody sees by its exit code whether a job died, and that of
# a `run` also waits for the jobs that are not due yet.
DUE, WHOLE = "due", "whole"

WorkerConfig = namedtuple(
    "WorkerConfig", "db file pool number queues drain limited run log supervisor fds")
WorkerConfig.__doc__ = """What the supervisor tells a worker: the database, which file that was,
its pool, its number there, the queues it serves (none: all), whether to drain (or DUE, WHOLE),
whether --max-jobs was given, whether it serves a `run` (then it drains that run's queue), the log
that it tells to ("": none), the supervisor's process id, and the descriptors it inherits but must
not keep."""


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


class Records:
    """What a worker knows; how it tells, commits, and has the disk keep what it has recorded.

    A worker has four layers: on this one rest Turns (between two runs), on them Attending (one run),
    on them Worker (its life).
    """

    store: Store
    epoch, settings = -1, SETTINGS
    # Its life.
    leave = 0  # 1: after the running job, 2: now
    dismissed = False  # by a signal of its own, while the pool goes on
    life = -1  # the descriptor that holds its life lock
    seen = -1  # the last data version that was looked at; -1: look at everything again
    next_due = NEVER  # milliseconds
    next_patrol = next_sweep = 0.0
    unpatrolled = True
    # What it tells.
    trouble = ""  # what was told last of what keeps it from working
    rest_until, shortages = 0.0, 0
    # What it has recorded.
    unsynced = False  # whether a record may not be on disk yet
    sync_failed = False  # whether the last try to change that has failed
    retry_at: int | None = None  # of the run that was recorded last
    # Where output goes.
    slots = 0  # how many there were
    next_slot: OutputFiles | None = None  # whose token is held for the next run
    running: OutputFiles

    def __init__(self, order: WorkerConfig):
        self.order, self.db, self.pool = order, order.db, order.pool
        self.name = "%s-%d" % (order.pool, order.number)
        self.queues = (*order.queues, HOOK_QUEUE) if order.queues else ()
        self.bell = make_bell()
        self.limited: set[str] = set()  # the queues that have a limit of jobs running at once
        self.clock = time.time() - monotonic()
        self.place = system.place()
        self.lines: list[str] = []  # to be said once what they tell of is on disk
        self.spare: list[OutputFiles] = []
        self.used: list[tuple[OutputFiles, bool]] = []  # of unsynced records; whether they printed
        self.environment: dict[int, JobEnvironment] = {}  # by the key of their context

    # What it says.

    def say(self, text: str) -> None:
        """Say a line as soon as what was recorded is on disk."""
        self.lines.append(text)

    def announce(self, text: str) -> None:
        """Say something at once, whatever waits to be said."""
        self._write([as_called(text)])

    def _write(self, lines: Iterable[str]) -> None:
        """Each with the time at which it is said: a log doesn't go back in time."""
        now = show_time(now_millis())
        said = "".join("%s worker %d: %s\n" % (now, self.order.number, line) for line in lines)
        if self.order.run and os.isatty(1):  # in place of the line that shows the progress
            said = "\r\033[K" + said
        if self.order.log:
            renew_log(self.order.log)
        system.say(said)

    def tell_trouble(self, text: str) -> None:
        """Say at once what keeps this worker from working, and note it; nothing: it works again."""
        if text != self.trouble:
            self.trouble = text
            note_trouble(self.life, text)
            if text:
                self.announce(text)

    # What it follows, and what it commits.

    def follow(self, epoch: int) -> None:
        """Take on settings that have changed since the epoch before, and the order to stop."""
        if epoch == self.epoch:
            return
        self.epoch = epoch
        self.settings, stop, self.limited = self.store.control(self.pool)
        if stop > self.leave:
            self.leave = stop
            self.say("told to stop" + " now" * (stop == 2))

    def commit(self, change: Callable[[], Any], holding: str = "") -> Any:
        """Make a change in a transaction, again and again until it is committed; what it returns.

        `holding` is the id of the job whose outcome the change records, or nothing. Raises
        Unavailable or OSError only if the worker is told to leave; while it is `holding` an
        outcome, only if it is to leave now.
        """
        why, told_from = "", monotonic() + WAIT_TOLD
        if holding:
            why, told_from = "the outcome of %s waits to be recorded: " % holding, 0.0
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
        """Have the disk keep what was recorded; then tell of it, and empty its output files.

        Done while the next job runs already, and where jobs are very short for a few of them at
        once: waiting for the disk would cost them a tenth of their rate. While the disk takes
        nothing, `sync_failed` is set, and nothing is told, thrown away or claimed.
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
            except OSError:  # a file that can't be emptied is used no more
                slot.remove()
        self.used.clear()


class Turns(Records):
    """Between two runs: the last one is recorded and the next job claimed, in one commit."""

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
        """Let all end that the last job takes along; if that can't be now, the mark has it done."""
        try:
            self.store.settle(now_millis())
            ring_all(self.db)
        except Unavailable as error:
            self.tell_trouble(str(error))

    def _record_and_claim(self,
                          result: RunResult | None) -> tuple[str, list[str], Job | None]:
        """In the transaction: the recorded job's new state, whom to ring, and a job.

        Others may take what waited for the recorded job, its place or its retry. They are rung if
        they sleep: who runs a job looks again after it.
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
        """Whether to claim another job, and not leave, rest, or look after others first."""
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
        cwd, path, umask, environ = self.store.context(context)
        env = system.environment()
        if environ:
            env = native_items(json.loads(environ))
        env[system.native("PATH")] = system.native(path)
        if len(self.environment) > 100:
            self.environment.clear()
        self.environment[context] = JobEnvironment(cwd, umask, env)

    def _open_slot(self) -> OutputFiles | None:
        """A slot with its token in hand; None if there is no room for one, and so for no run."""
        while True:
            if not self.spare:
                self.spare.append(OutputFiles(self.db, self.name, self.slots))
                self.slots += 1
            slot = self.spare[0]
            try:
                if slot.open():
                    slot.empty()  # of what a daemon wrote after its job's record, and ended since
                    return self.spare.pop(0)
            except OSError as error:
                self.rest_until = monotonic() + 1.0
                self.tell_trouble("no job can be claimed: %s" % error)
                return None
            self.spare.pop(0).remove()  # a daemon that an earlier job left behind keeps it

    def orphaned(self) -> bool:
        """Whether the supervisor has died."""
        life = life_path(self.db, self.pool)
        return system.orphaned(self.order.supervisor, life)

    def clock_was_set_back(self) -> bool:
        """Whether the wall clock was set back since this was asked last."""
        before, self.clock = self.clock, time.time() - monotonic()
        return self.clock < before - CLOCK_STEP

    def start_delays_anew(self) -> None:
        """In a transaction, after the clock was set back: what it had put off is due."""
        self.store.make_ready_after_clock_step(now_millis())

    def _tell_end(self, result: RunResult, state: str) -> None:
        if self.order.run:
            return
        outcome = {"": "was recorded as lost by another process: ", DEAD: "is dead",
                   PENDING: "went back into the queue"}.get(state, state)
        line = "%s %s after %s" % (result.job.id, outcome, show_duration(result.seconds))
        if result.error is not None:
            line += ": " + clean(result.error)
        if state == FAILED:
            line += "; next try at " + show_time(self.retry_at or 0)
        self.say(line)


class Attending(Turns):
    """One run of a claimed job: start it, wait for it, decide when it must end, judge it."""

    def execute(self, job: Job) -> RunResult:
        """Run a claimed job to its end, whatever that is."""
        limit = output_limit(self.settings, job.queue, self.order.run)
        run = Run(job, self.name, self.running, limit)
        test_point("claimed")
        if job.chained:  # what it waited for is perhaps another's record, and not on disk yet
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
        """Give back a job for which the machine has no room now, and claim none for a while."""
        pause = min(LONGEST_REST, 2.0 ** self.shortages)
        self.shortages += 1
        self.rest_until = monotonic() + pause
        self.tell_trouble("%s %s; the next try is in %s"
                          % (run.job.id, problem, show_duration(pause)))
        return run.result(UNSTARTED, problem)

    def _attend(self, run: Run) -> RunResult:
        """Sleep until the run ends, or until there is a reason to end it."""
        while True:
            self.bell.wait(min(run.patience(), self._sync_wait()))
            if run.has_ended():
                return self._judge(run)
            if self.unsynced:
                self.sync_records()
            ending, error = self._interruption(run)
            if ending:
                run.end(self.settings["kill_grace_seconds"], self.bell.wait)
                return run.result(ending, error)
            run.bound_output()

    def _sync_wait(self) -> float:
        """Seconds until the disk is to be synced."""
        if not self.unsynced:
            return FOREVER
        return SYNC_AGAIN if self.sync_failed else SYNC_WAIT

    def _interruption(self, run: Run) -> tuple[str, str]:
        """Why a run must end now, as its ending and the reason, or two empty strings."""
        if monotonic() >= run.deadline:
            return FAILED, "timed out after %ss" % show_number(run.timeout or 0)
        try:
            if self._was_cancelled(run):
                return CANCELLED, "cancelled"
        except (QueueError, OSError):
            pass  # the run goes on; what is wrong with the database shows when it is recorded
        if self.leave == 2:
            return STOPPED, "ended with its worker, to be run again"
        return "", ""

    def _was_cancelled(self, run: Run) -> bool:
        """Look at what others have committed, if anything: orders, settings, an end, a time-out."""
        seen = self.store.changed()
        if seen == self.seen:
            return False
        self.seen = seen
        self.follow(self.store.pulse()[0])
        self.sync_records()
        cancelled, timeout = self.store.orders_of(run.job.seq)
        run.set_timeout(timeout)
        return cancelled

    def _judge(self, run: Run) -> RunResult:
        """What the end of its shell means for a run."""
        code = run.exit_code or 0
        if code == 0 and not run.lost:
            return run.result(COMPLETED)
        run.end_leftovers(self.settings["kill_grace_seconds"], self.bell.wait)
        if run.lost:
            return run.result(LOST, "its exit code was lost")
        if code in SHUTDOWN_CODES and self._is_to_leave():
            return run.result(STOPPED, "ended with its worker, to be run again")
        error = "exit code %d" % code
        if code < 0:
            error = "ended by signal %s" % signal_name(-code)
            code = 128 - code  # what some shells make of it
        if code in policy_of(run.job).get("dead_on", ()):
            return run.result(FAILED, error + ", which is final")._replace(final=True)
        most = self.settings["max_deferrals"]
        if code == TRY_LATER and run.job.deferrals < most:
            return run.result(DEFERRED, "%s, to be tried again later (%d of %d times)"
                              % (error, run.job.deferrals + 1, most))
        return run.result(FAILED, error)

    def _is_to_leave(self) -> bool:
        """Whether this worker is told to leave within a tenth of a second.

        Whoever ends all of us at once may have hit the job before its worker.
        """
        deadline = monotonic() + 0.1
        while not self.leave and monotonic() < deadline:
            self.bell.wait(deadline - monotonic())
        return self.leave > 0


class Worker(Attending):
    """Claims jobs and runs them, one at a time, until it is told to stop.

    Signal handlers only set flags and ring the bell; the loops look at the flags.
    """

    def handle_signals(self) -> None:
        """From now on SIGHUP lets the running job finish, SIGUSR1 does not, SIGTERM is private."""
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

    # From its birth to its end.

    def work(self) -> int:
        """Work until told to stop; the exit code tells the supervisor why it ended."""
        self.store = self._open()
        self.commit(self._register)
        self.follow(self.store.pulse()[0])
        # First: what is left of a lost run must not go on while others lock the database.
        self._recover()
        self.commit(self.start_delays_anew)
        self._loop()
        self._sync_at_last()
        self._deregister()
        if self.leave == 2:
            return EXIT_INTERRUPTED
        return EXIT_DISMISSED if self.dismissed else EXIT_OK

    def _open(self) -> Store:
        """The database, as soon as it can be opened."""
        while True:
            try:
                store = open_trusted(self.db, self.order.file, patience=TICK)
                store.defer_sync()
                return store
            except (Unavailable, OSError) as error:
                if self.leave:
                    raise
                self.tell_trouble(str(error))
                self.bell.wait(TICK)

    def _register(self) -> None:
        """In one transaction life lock, bell and row come to be: nobody sees a half-born worker."""
        if self.life < 0:
            self.life = take_life(self.db, self.name)
            self.store.identity.watch(self.life)
            note_trouble(self.life, "")  # which takes the space for all notes
            self.bell = make_bell(bell_path(self.db, self.name))
            self.bell.hear_signals()
        test_point("being born")
        self.store.add_worker(self.name, self.pool, now_millis())

    def _sync_at_last(self) -> None:
        """What was recorded is to be on disk before it leaves, unless it has to leave now."""
        self.sync_records()
        while self.unsynced and self.leave < 2:
            self.bell.wait(SYNC_AGAIN)
            self.sync_records()

    def _deregister(self) -> None:
        """Leave nothing behind; where that fails, whoever looks after dead workers does it."""
        self.store.patience = LAST_PATIENCE
        try:
            with self.store.transaction():
                self.store.forget(self.name)
            remove_files(self.db, self.name)
        except (QueueError, OSError):
            pass

    # The loop, in which it runs jobs or sleeps.

    def _loop(self) -> None:
        while not self.leave:
            if self.sync_failed:
                self.sync_records()
            news = self._has_news()
            if self.unpatrolled and monotonic() >= self.next_patrol:
                self._patrol()
            self._sweep()
            if news and self._may_claim():
                job = self.record_and_claim(None)
                while job is not None:
                    job = self.record_and_claim(self.execute(job))
                self._rest()
            elif self._is_done():
                self._leave_soon()
            elif not self.leave:
                self._idle()

    def _has_news(self) -> bool:
        """After the bell: whether anybody has committed anything, or a time has come."""
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
        """Whether there is a job to claim, found out by reading: writers wait for each other.

        The claim reads the same again, under the mutex: another may have been faster.
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
        """Whether a `run`, a drain or --max-jobs leaves nothing more to do."""
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
        """After work: look again before sleeping, for own commits are no news; tell who drains."""
        self.seen = -1
        self.sync_records()
        if self.order.drain or self.order.limited or self.order.run:
            ring_all(self.db)

    def _idle(self) -> None:
        """Sleep until the bell, a signal, or the exact time of the next retry or schedule."""
        pause = self.settings["poll_interval_ms"] / 1000
        pause = min(pause, self.next_due / 1000 - time.time())
        rest = self.rest_until - monotonic()
        if rest > 0:
            pause = min(pause, rest)
        if self.bell.wait(pause):
            system.reap(0)  # daemons that earlier jobs left behind end as children of this worker
        if self.clock_was_set_back():
            self.commit(self.start_delays_anew)
            self.seen = -1

    # What it does for others.

    def _patrol(self) -> None:
        """Now and then, while others run jobs: has a worker died whose supervisor died too?"""
        began = monotonic()
        try:
            others = self.store.holders() - {self.name}
            self.unpatrolled = bool(others)
            if not all(is_alive(self.db, name) for name in others):
                self._recover()
        except Unavailable:
            pass  # what can't be done now is still there at the next patrol
        now = monotonic()
        interval = self.settings["poll_interval_ms"] / 1000
        # An orphan that can't be ended takes seconds: as many are for work.
        self.next_patrol = now + max(1.0, interval, now - began)

    def _recover(self) -> None:
        try:
            if recover(self.store, self.bell.wait, self.say, self.pool):
                self.seen = -1
                self.sync_records()
        except (Unavailable, OSError):
            self.unpatrolled = True

    def _sweep(self) -> None:
        now = monotonic()
        if now < self.next_sweep:
            return
        self.next_sweep = now + 1.0
        try:
            sweep(self.store, self.settings)
        except (QueueError, OSError, ValueError):
            pass  # it is not urgent, and who needs the database next says what is wrong with it


def _exit_code(worker: Worker) -> int:
    """Let a worker work to its end; why it ended, for the supervisor."""
    try:
        return worker.work()
    except (QueueError, OSError) as error:
        worker.announce(str(error))
        if isinstance(error, Unavailable):  # what it can't write now, others will
            return (EXIT_TROUBLED, EXIT_OK, EXIT_INTERRUPTED)[worker.leave]
        return EXIT_TROUBLED if isinstance(error, OSError) else EXIT_FAILED
    except Exception:
        import traceback
        system.say(traceback.format_exc(), 2)
        return EXIT_BUG


def worker_main(order: WorkerConfig) -> NoReturn:
    """What a worker process does from its first instruction on."""
    for fd in order.fds:
        os.close(fd)
    if order.run:
        os.dup2(2, 1)  # stdout is for the result
    try:
        system.prepare_worker(order.supervisor)
        worker = Worker(order)
    except OSError as error:
        system.say("queuectl: a worker can't start: %s\n" % error, 2)
        os._exit(EXIT_TROUBLED)
    worker.handle_signals()
    code = _exit_code(worker)
    worker.sync_records()
    if not close_stores():
        os._exit(code)
    sys.exit(code)


# ═══ Console ═══ what is printed: where, how wide, with what escaped ═════════════════════════

def mute(stream: int) -> None:
    """Drop what goes to a standard stream from now on: after a failed write Python fails again."""
    try:
        fd = os.open(os.devnull, os.O_WRONLY)
        os.dup2(fd, stream)
        if fd != stream:
            os.close(fd)
    except OSError:
        pass


def complain(text: str) -> None:
    """A line on stderr that is no result."""
    try:
        if sys.stderr is not None:
            print("queuectl: %s" % as_called(clean(text)), file=sys.stderr, flush=True)
    except (OSError, ValueError):
        mute(2)  # nobody listens


CLEAR_LINE = "\r\033[K"


def emit_bytes(data: bytes, stream: Any = None) -> None:
    """A part of a command's result as it is, to stdout or another standard stream.

    It leaves at once only on a terminal, else with much more or at the end. Raises OSError if it
    can't be written.
    """
    stream = stream or sys.stdout
    if stream is None:
        raise OSError("stdout is closed")
    stream.buffer.write(data)
    if stream.line_buffering:
        stream.flush()


def flush_streams() -> None:
    """Let all that was written to the standard streams leave at once. Raises OSError."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()


def emit_text(text: str, stream: Any = None) -> None:
    """A part of a command's result as it is: our own words, with nothing in them from a user."""
    emit_bytes(text.encode(getattr(stream or sys.stdout, "encoding", "ascii"), "replace"), stream)


def emit(line: str) -> None:
    """A line of a command's result; control characters in it are shown escaped."""
    emit_text(clean(line) + "\n")


def advise(line: str, stream: Any = None) -> None:
    """The same, of a line in which commands are advised; or to another standard stream."""
    emit_text(as_called(clean(line)) + "\n", stream)


def emit_json(value: Any) -> None:
    """A JSON value as a command's result."""
    emit_text(json.dumps(value, indent=2) + "\n")


def emit_list(values: Iterable[Any]) -> None:
    """A JSON array as a command's result, one value a line: it can also be read line by line."""
    emit_text("[")
    end = "\n"
    for value in values:
        emit_text(end + json.dumps(value))
        end = ",\n"
    emit_text("\n]\n")


def is_terminal(stream: Any) -> bool:
    """Whether a standard stream is a terminal; None, a closed one, is not."""
    return stream is not None and stream.isatty()


def last_lines(output: bytes, count: int) -> bytes:
    """The last lines of an output, the last of which may lack its newline."""
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
    """What a job has printed: nothing in it acts on a terminal; a pipe gets it unchanged.

    With a `tag`, each line begins with it and a tab. A carriage return ends a line, too, as in
    GNU parallel. A long output is shown in parts, for lines take much more memory than their text.
    """
    start = 0
    while start < len(output):
        end = output.find(b"\n", start + (1 << 20)) + 1 or len(output)
        _emit_part(output[start:end], stream, tag)
        start = end


def terminal_width() -> int:
    """Columns of the terminal on stdout; 0 if it is none."""
    try:
        if is_terminal(sys.stdout):
            return os.get_terminal_size(sys.stdout.fileno()).columns
    except (OSError, ValueError):
        pass
    return 0


def text_width(text: str) -> int:
    """Columns that text takes on a terminal: two for wide characters, none for combining ones."""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width
    base = [c for c in text if not combining(c)]
    return len(base) + sum(east_asian_width(c) in "WF" for c in base)


def fit(text: str, width: int) -> str:
    """Text cut to a number of columns, or filled up to it."""
    if text_width(text) > width:
        text = text[:4 * width]
        while text and text_width(text) >= width:
            text = text[:-1]
        text += "…"[:width]
    return text + " " * (width - text_width(text))


def cut(line: str, width: int) -> str:
    """A line that fits into `width` columns (0: as many as it takes)."""
    return fit(line, width).rstrip() if width else line


COLOURS = {PROCESSING: "36", COMPLETED: "32", FAILED: "33", DEAD: "31"}


def coloured(cell: str, text: str) -> str:
    """A cell of a table in the colour of the state that is its text, if it is one."""
    if text not in COLOURS:
        return cell
    return "\033[%sm%s\033[0m" % (COLOURS[text], cell)


def narrow(widths: list[int], width: int) -> list[int]:
    """The widths of a table's columns within `width`: the last gives way first, then the widest."""
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
    """Lines of a table in `width` columns (0: as many as it takes), with the states in colour.

    What does not fit is cut at the right; control characters are shown escaped.
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
    """A table for where stdout leads: within a terminal's width and coloured, or whole.

    `none` is what is said if it has no row.
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
# Who holds what. The supervisor holds the pool's life lock and a bell that hears signals alone. It
# never has the database open while it forks: a forked copy of a locked descriptor keeps the lock
# after its owner's death. For the same reason a worker first closes the life file it inherited.
#
# How a stop travels. `worker stop`, Ctrl-C or a closing terminal is a signal to the supervisor.
# Its handler counts, and the bell wakes the loop. The loop passes the stop on to each worker, by
# SIGHUP (after the running job) or, the second time, by SIGUSR1 (now); then it records the stop.
# The record is for those whom no signal reaches: a job that is killed from then on has not failed,
# but was ended with its pool; and on Windows workers hear of the stop by it alone. Signals come
# before the record, for a database that can't be written must not hold up a stop.
#
# When a supervisor dies, its workers finish their jobs and go too: on Linux the kernel sends each
# a SIGHUP, and before each claim they look whether it is still their parent.

def _context() -> Any:
    import multiprocessing
    return multiprocessing.get_context(system.start_method)


QUICK_DEATH = 1.0  # seconds; a worker that dies sooner is replaced with growing delay
LONGEST_DELAY = 1.0


class Pool:
    """Worker processes under one supervisor, until all of them have ended."""

    life = -1  # the descriptor that holds its life lock
    reporter: Any = None  # of a `run`: the process that shows how it goes, see Reporter
    number = 0  # of the worker that was started last
    quick_deaths = 0  # in a row
    stops = 0  # how often it was told to stop
    passed_on = 0  # what of that the workers were told: 1: soon, 2: now
    code = EXIT_OK

    def __init__(self, db: str, name: str, count: int, queues: Sequence[str],
                 drain: Any = False, max_jobs: int | None = None, log: str = ""):
        """`log` is what the processes of a detached pool tell to."""
        self.db, self.name, self.count = db, name, count
        self.queues, self.drain, self.max_jobs = tuple(queues), drain, max_jobs
        self.log = log
        self.unneeded: list[int] = []  # descriptors that workers inherit
        self.workers: dict[Any, float] = {}  # each process with the time it was started
        self.openings: list[float] = []  # when workers that died are to be replaced

    def run(self) -> int:
        """Work until drained or stopped; the exit code of `worker start`."""
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
            self._hire()
            self.bell.wait(min(self.openings, default=FOREVER) - monotonic())
            self._stop()
            self._collect()
        return self._farewell()

    def start_reporter(self, target: Callable[..., Any], *values: Any) -> None:
        """Before `run`: start a process that calls `target` with these values.

        Behind them come its end of a pipe to it, and the descriptors that it must not keep.
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
        """Tell the reporter that the pool has ended, and whether it was stopped; its exit code.

        It may have to wait for whoever reads what it shows; another signal ends it at once.
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
        """In a transaction: take the life lock, and be known to others."""
        self.file = store.identity.file
        self.life = take_life(self.db, self.name)
        store.add_pool(self.name, self.count, self.queues, self.max_jobs, now_millis())

    def _handle_signals(self) -> None:
        self.bell.hear_signals()
        system.let_through()  # the caller may have blocked some
        for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGBREAK"):
            number = getattr(signal, name, None)
            if number is None or signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup stays in force
            signal.signal(number, self._on_signal)
        if not WINDOWS:
            signal.signal(signal.SIGCHLD, lambda *_: None)

    def _on_signal(self, number: int, frame: object) -> None:
        # A closing terminal may say it more than once.
        if not self.stops or signal_name(number) != "SIGHUP":
            self.stops += 1

    # Workers are started.

    def _hire(self) -> None:
        """Start the workers that are due."""
        self.openings.sort()
        while self.openings and self.openings[0] <= monotonic():
            del self.openings[0]
            self._start_worker()

    def _start_worker(self) -> None:
        self.number += 1
        process = self.context.Process(
            target=worker_main, args=(self._order(),), name="worker %d" % self.number)
        mask = system.hold_signals()  # until it has handlers of its own, a signal to it must wait
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
        """What the next worker is told."""
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
        """Pass on what signals have asked for: the first lets jobs finish, the second does not.

        The end of the reporter is a first one: a `run` has nothing left to do, or none reads it.
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
            self._tell("stopping: running jobs finish first; once more to end them now")
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
        """Take note of workers that have ended, and replace those that should not have."""
        for process in [process for process in self.workers if process.exitcode is not None]:
            self.bell.forget(process.sentinel)
            age = monotonic() - self.workers.pop(process)
            code = process.exitcode
            if code in (EXIT_FAILED, EXIT_INTERRUPTED):
                self.code = max(self.code, code)
            elif code != EXIT_OK and not self.passed_on:
                self.openings.append(monotonic() + self._delay(code, age))
        own = [*self.workers, self.reporter]
        system.reap_strangers({process.pid for process in own if process})

    def _delay(self, code: int, age: float) -> float:
        """Seconds until a worker that ended with `code` after `age` seconds is replaced."""
        if code != EXIT_DISMISSED:
            why = "exit code %d" % code
            if code < 0:
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

    def _farewell(self) -> int:
        """Turn off the light: what killed workers held is given back, the pool forgotten.

        Where that can't be written now, whoever comes next does it. Returns the exit code.
        """
        died = 0
        try:
            store = open_trusted(self.db, self.file)
            store.patience = LAST_PATIENCE
            died = store.pool(self.name)["died"]
            recover(store, self.bell.wait, self._tell, self.name)
            died = store.pool(self.name)["died"]
            with store.transaction():
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
QUEUE_HEAD = ("QUEUE", "LIMIT", "STARTS", *map(str.upper, STATES))
RUN_FIELDS = ("run", "attempt", "state", "started_at", "finished_at", "duration_seconds",
              "exit_code", "error", "worker")


def with_times(row: Row) -> Row:
    """The row with its times in ISO 8601."""
    shown = dict(row)
    for name, value in row.items():
        if (name == "due" or name.endswith("_at")) and value is not None:
            shown[name] = show_time(value)
    return shown


def job_json(job: Row) -> Row:
    """A job as `--json` shows it: its FIELDS."""
    policy = json.loads(job["policy"] or "{}")
    job = {**job, "retry_after": None, "dead_on": [], **policy}
    shown = with_times({name: job[name] for name in FIELDS})
    shown["env"] = json.loads(job["env"] or "{}")
    for name in ("after", "after_any"):
        shown[name] = job[name].split(",") if job[name] else []
    return shown


def run_json(run: Row, job: str) -> Row:
    """A run of the job with this id as `--json` shows it.

    Output that is not UTF-8 is in base64, and its name says so.
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


def queue_row(queue: Row) -> tuple[str, ...]:
    """A queue's line in `queue list`."""
    counts = [str(queue[state]) for state in STATES]
    starts = "paused" if queue["paused"] else "yes"
    return (queue["name"], show_setting(queue["concurrency"]), starts, *counts)


def span(start: int | None, end: int) -> str:
    """How long it is from one time to another (milliseconds); nothing where there is no start."""
    return "" if start is None else show_duration(max(0, end - start) / 1000)


def job_row(job: Row, now: int) -> tuple[str, ...]:
    """A job's line in `list`."""
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
    """A job's line in `dlq list`."""
    died = span(job["updated_at"], now) + " ago"
    why = job["last_error"] or ""
    return job["id"], str(job["attempts"]), died, why, job["command"]


def worker_row(worker: Row, now: int) -> tuple[str, ...]:
    """A worker's line in `worker list` and `status`."""
    doing = "idle"
    if worker["job"] is not None:
        doing = "%s for %s: %s" % (
            worker["job"], span(worker["job_started_at"], now), worker["command"])
    if worker["trouble"]:
        doing = "waits: " + worker["trouble"]
    up = span(worker["started_at"], now)
    return worker["name"], str(worker["pid"]), up, doing


def job_lines(job: Row) -> list[str]:
    """Everything about a job, a field a line, without those that say nothing."""
    shown = job_json(job)
    shown["env"] = " ".join("%s=%s" % pair for pair in shown["env"].items())
    for name in ("after", "after_any", "dead_on"):
        shown[name] = ", ".join(map(str, shown[name]))
    return ["%-16s %s" % (name, value) for name, value in shown.items()
            if value not in (None, "")]


def run_title(run: Row) -> str:
    """One line about a run: when, which attempt, how it ended and why."""
    title = "[%s] run %d, attempt %d, %s after %s" % (
        show_time(run["started_at"]), run["run"], run["attempt"], run["state"],
        show_duration(run["duration_seconds"]))
    if run["error"]:
        title += ": %s" % run["error"]
    return title


def pause_lines(pauses: Sequence[Row]) -> Iterator[str]:
    """Which queues are paused, since when, and what lets their jobs start."""
    for pause in pauses[:5]:
        name, since = pause["queue"] or "", ""
        if pause["paused_at"]:
            since = ", since " + show_time(pause["paused_at"])
        yield "Paused: %s%s; `%s` lets jobs start." % (
            name or "all queues", since, ("queuectl queue resume " + name).rstrip())


def _hold_up_lines(status: Row) -> Iterator[str]:
    """What keeps jobs from running, and what to do."""
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


def show_rate(runs_per_second: float) -> str:
    if runs_per_second < 1:
        return "%.2g/min" % (60 * runs_per_second)
    return "%.1f/s" % runs_per_second


def show_sizes(sizes: Row) -> str:
    """What the files of a queue take."""
    return ", ".join("%s %.1f MiB" % (name, sizes[name + "_bytes"] / 2**20)
                     for name in ("database", "log", "output"))


def status_lines(status: Row, workers: Sequence[Row], now: int, width: int) -> list[str]:
    """What `status` shows: jobs by state, workers and what they run, what waits and comes next.

    `now` is in milliseconds, `width` in columns (0: as many as it takes).
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
    lines += _hold_up_lines(status)
    if jobs[DEAD]:
        lines.append("`queuectl dlq list` shows why jobs are dead, "
                     "`queuectl dlq retry ID` gives one a new start.")
    if not status["workers"] and any(jobs[state] for state in UNFINISHED):
        lines.append("No worker is running: `queuectl worker start` works on the jobs.")
    return [cut(clean(line), width) for line in lines]


RUNNING_HEAD = ("RUNNING", "QUEUE", "FOR", "WORKER", "COMMAND")
MOST_RUNNING = 10  # lines of `status --watch`


def watch_lines(status: Row, workers: Sequence[Row], died: Sequence[Row],
                now: int, width: int) -> list[str]:
    """What `status --watch` shows: what runs, longest first, the status, and what died last."""
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
STATS_HEAD = ("COMPLETED", "FAILED", "DIED", "RUN FOR", "LONGEST", "WAITED", "LONGEST", "")


def stats_rows(done: Sequence[Row]) -> Iterator[Sequence[str]]:
    """What was done in some hours or days, or by some queues, a line each, with bars."""
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
    """How a `run` goes, in a line: done, dead, running, waiting for a retry, rate and time left."""
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
    """What has become of a `run`: counts, why jobs are dead, and what to do next.

    The first of the `causes` have an example, `job`, where one died of it itself.
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
    """A queue's name as the value of a label."""
    return '"%s"' % re.sub(r'([\\"])', r"\\\1", name)


def summary(done: Sequence[Row], key: str) -> Iterator[str]:
    """The samples of a summary: the sum that is `key`, and of how many runs it is."""
    for queue in done:
        name = label_value(queue["queue"])
        yield "_sum{queue=%s} %.6f" % (name, queue[key])
        yield "_count{queue=%s} %d" % (name, queue["runs"])


def prometheus_lines(status: Row, totals: Sequence[Row], done: Sequence[Row],
                     now: int) -> list[str]:
    """The queue in Prometheus' text format, version 0.0.4: what node_exporter's collector reads.

    `totals` are the jobs there are and `done` all that was ever done, by queue.
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
    lines = []
    for title, values in (
            ("jobs gauge Jobs kept, by queue and state.", jobs),
            ("queue_paused gauge Whether a queue is paused.", paused),
            ("workers gauge Workers alive.", [" %d" % status["workers"]]),
            ("oldest_waiting_seconds gauge How long the job waits that could run for longest.",
             [" %.3f" % waits]),
            ("disk_bytes gauge Disk space of the database, its log, and current output.", disk),
            ("runs_total counter Runs that have ended, by outcome.", runs),
            ("run_seconds summary How long they took.", summary(done, "run_seconds_sum")),
            ("wait_seconds summary How long they could have been claimed before.",
             summary(done, "wait_seconds_sum"))):
        name, kind, text = title.split(" ", 2)
        lines += ["# HELP queuectl_%s %s" % (name, text), "# TYPE queuectl_%s %s" % (name, kind)]
        lines += ["queuectl_%s%s" % (name, value) for value in values]
    return lines


# ═══ Commands ═══ what a user types, each beside its options: reading, changing, working, setup ═

Command = namedtuple("Command", "name run summary options examples writes")
COMMANDS: dict[str, Command] = {}
# In what order help and completion name them, by their first word.
PURPOSES = {
    "Run": "run enqueue worker",
    "Inspect": "status list show logs why wait stats",
    "Control": "retry cancel edit delete purge dlq queue",
    "Maintain": "config doctor backup restore service completion install uninstall",
}
ORDER = " ".join(PURPOSES.values()).split()
# Words that lead to several commands.
GROUPS = {
    "config": "show and change settings",
    "dlq": "the dead letter queue: jobs that failed too often",
    "queue": "limit, pause and resume queues",
    "worker": "start, stop and list the processes that run jobs",
}


def option(usage: str, summary: str, **details: Any) -> Any:
    """An option or argument, as argparse's add_argument takes it.

    `usage` is its names, and behind them what stands for its value. An option that has no value,
    nor choices, is a flag.
    """
    names = usage.split()
    if not names[-1].startswith("-"):
        details["metavar"] = names.pop()
    elif "choices" not in details:
        details["action"] = "store_true"
    return names, dict(details, help=summary)


def option_lengths(options: Iterable[Any]) -> dict[str, int]:
    """Options, by all of their names, each with how many words it takes, itself included."""
    lengths: dict[str, int] = {}
    for names, details in options:
        length = 1 if details.get("action") == "store_true" else 2
        lengths.update((name, length) for name in names if name.startswith("-"))
    return lengths


def length_of(word: str, lengths: dict[str, int]) -> int:
    """How many words belong to an option, if `word` is one; else 0."""
    if "=" in word and word.partition("=")[0] in lengths:
        return 1
    if lengths.get(word[:2]) == 2 and word[2:]:  # -j4
        return 1
    return lengths.get(word, 0)


def subcommand(name: str, summary: str, examples: str, *options: Any,
               writes: bool = False) -> Callable[..., Any]:
    """Make a function the command `name`.

    It takes the arguments, and returns the exit code, or None where that is always 0.
    `args.store` is the store of its database, opened when it is first asked for, and for reading
    alone unless the command `writes`.
    """
    def enter(run: Callable[..., Any]) -> Callable[..., Any]:
        COMMANDS[name] = Command(name, run, summary, options, examples, writes)
        return run
    return enter


def commands_of(group: str = "") -> list[Command]:
    """The commands of a group, or all of them, as help names them."""
    prefix = group and group + " "
    shown = [entry for entry in COMMANDS.values() if entry.name.startswith(prefix)]
    shown.sort(key=lambda entry: ORDER.index(entry.name.split()[0]))
    return shown


def open_store(db: str, **how: bool) -> Store:
    """The store of a command that executes nothing.

    Says so on stderr if others could have written it.
    """
    store = Store(db, tell=complain, **how)
    OPENED.append(store)
    reason = exists(db) and distrust_of(db)
    if reason:
        complain("nothing of this queue will be executed: %s" % reason)
    return store


def whole(name: str, most: int) -> Callable[[str], int]:
    """What checks an option or argument that is a whole number from 1 to `most`."""
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
    """How many workers `-j` asks for: a number, or 50% of the cores."""
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
BY_ID = "the job's id, or a unique part of its beginning"
ID = option("id ID", BY_ID)
LIMIT = option("-n --limit N", "the newest N (50; with --json all)", type=whole("--limit", 10**9))
ALL = option("--all", "all of them")


def join_words(words: Sequence[str]) -> str:
    """A command line that a shell reads as exactly these words."""
    if WINDOWS:
        import subprocess
        return subprocess.list2cmdline(words)
    return " ".join(map(shell_word, words))


def given_of(args: Any) -> Row:
    """The fields of a job that were given as options."""
    return {name: value for name, value in vars(args).items()
            if ALIASES.get(name, name) in GIVEN_FIELDS and value is not None}


def _variable(entry: str) -> tuple[str, str]:
    """The name and value that `--env NAME[=VALUE]` stands for."""
    name, equals, value = entry.partition("=")
    if not equals and name not in os.environ:
        raise UsageError("--env %s: there is no such variable here; use --env NAME=VALUE"
                         % quoted(name))
    return name, value if equals else os.environ[name]


def given_options(args: Any) -> Row:
    """The fields of a new job that stand on the command line as options."""
    options = given_of(args)
    for name in ("after", "after_any", "dead_on"):
        if name in options:
            options[name] = ",".join(options[name])
    if "env" in options:
        options["env"] = dict(map(_variable, options["env"]))
    return options


def as_utf8(text: str) -> str:
    """Text from the system as it is meant, also where the locale does not know UTF-8 (LC_ALL=C)."""
    return text if text.isascii() else os.fsencode(text).decode("utf-8", "surrogateescape")


def _folder(given: str | None) -> str:
    """The folder that a job is to run in, as an absolute path; by default this one."""
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
    """The path of a shell, by its name, which is looked for in PATH, or a path."""
    import shutil
    found = shutil.which(name)
    if not found:
        raise UsageError("there is no program %s here, which is to be the shell; name one "
                         "that is in your PATH, or give its path" % quoted(name, 200))
    return as_utf8(abspath(found))


# ─── reading: what changes nothing ────────────────────────────────────────────────────────────

def alive_of(entries: Iterable[Row]) -> list[Row]:
    """Those of some pools or workers that live."""
    return [entry for entry in entries if entry["alive"]]


def unfinished_of(queue: Row) -> int:
    """How many jobs of a queue have not ended."""
    return sum(queue[state] for state in UNFINISHED)


def left_runs(store: Store) -> dict[str, int]:
    """The queues of runs that were interrupted, each with how many jobs are left."""
    busy = store.queues_of_runs()
    left = {queue["name"]: unfinished_of(queue) for queue in store.queues()}
    return {name: count for name, count in left.items()
            if count and is_run_queue(name) and name not in busy}


WATCH = option("--watch", "show it anew each second until Ctrl-C")
WATCH_EVERY = 1.0  # seconds


def show_again(frame: Callable[[], list[str]]) -> NoReturn:
    """Show the lines of `frame()` each second anew: on a terminal in place, without flicker."""
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


def status_of(store: Store) -> tuple[Row, list[Row]]:
    """What `status` tells, and the workers that live."""
    workers, pools = alive_of(store.workers()), alive_of(store.pools())
    counts, queues, now = store.counts(), store.queues(), now_millis()
    lost = store.lost_jobs() if counts[PROCESSING] else []
    waiting = [queue["name"] for queue in queues
               if queue[PENDING] + queue[FAILED] and not queue["paused"]]
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
        "troubles": ["%s: %s" % (worker["name"], worker["trouble"])
                     for worker in workers if worker["trouble"]],
    }, workers


@subcommand("status", "show jobs by state, workers, and what comes next", """
queuectl status
queuectl status --watch
queuectl status --format prometheus > queuectl.prom.new && mv queuectl.prom.new queuectl.prom
""",
    JSON,
    option("--format", "for the textfile collector of node_exporter", choices=("prometheus",)),
    WATCH)
def cmd_status(args: Any) -> None:
    if args.json + args.watch + bool(args.format) > 1:
        raise UsageError("give one of --json, --watch and --format")
    store = args.store

    def frame() -> list[str]:
        store.changed()  # raises if the database is gone
        status, workers = status_of(store)
        now, width = now_millis(), terminal_width()
        if args.format:
            return prometheus_lines(status, store.totals(), store.history("queue", 0, 0), now)
        if args.watch:
            died = list(store.last_to_die(Selection(), 3))
            return watch_lines(status, workers, died, now, width)
        return status_lines(status, workers, now, width)

    if args.watch:
        show_again(frame)
    if not args.json:
        for line in frame():
            advise(line)
        return
    status, workers = status_of(store)
    for name in ("oldest_waiting", "next"):
        status[name] = status[name] and with_times(status[name])
    status["pauses"] = [with_times(pause) for pause in status["pauses"]]
    status["running"] = [worker["job"] for worker in workers if worker["job"]]
    emit_json(status)


def names_of_states(text: str) -> list[str]:
    """The states that `--state` names."""
    names = text.lower().split(",")
    for name in names:
        if name not in STATES:
            raise UsageError("there is no state %s%s; states are %s"
                             % (quoted(name), nearest(name, STATES), ", ".join(STATES)))
    return names


def names_of_queues(text: str) -> list[str]:
    """The queues that `--queue` names."""
    return [check_name("--queue", name) for name in text.split(",")]


def time_named(text: str) -> int:
    """The time that `--since` or `--before` names, in ISO 8601 or as how long ago it is."""
    if re.match(r"\d{4}-|now", text):
        return parse_time(text, now_millis(), "the time")
    if re.fullmatch(_NUMBER, text):
        raise UsageError("%s needs a unit, such as %sd or %sh" % (text, text, text))
    return now_millis() - to_millis(checked("delay", text, "how long ago"))


@subcommand("stats", "show what was done: how many runs, how long they took and waited", """
queuectl stats
queuectl stats --by queue --since 7d
""",
    option("--since TIME",
           "from this time on, or for so long: 2h (by hour 1d, else all that is kept)",
           type=time_named),
    option("--by", "what a line is for (hour)", choices=("hour", "day", "queue"), default="hour"),
    JSON)
def cmd_stats(args: Any) -> None:
    now, since, step = now_millis(), args.since, MINUTE
    if since is None:
        since = now - DAY if args.by == "hour" else HOUR
    if since < now - 2 * DAY:  # by hour is how that is kept
        step = HOUR
    done = args.store.history(args.by, max(MINUTE, since - since % step), now)
    if args.json:
        emit_list(map(with_times, done))
    else:
        emit_table((args.by.upper(), *STATS_HEAD), stats_rows(done), "Nothing was done.")


# How jobs are selected, the same for all commands that take ids.
STATE = option("--state STATE[,STATE]", "in these states",
               action="append", default=[], type=names_of_states)
QUEUE = option("--queue QUEUE[,QUEUE]", "of these queues",
               action="append", default=[], type=names_of_queues)
OTHER_TERMS = (
    option("--grep TEXT", "with this in the command or id"),
    option("--error TEXT", "with this in the last error"),
    option("--since TIME", "ended, or last changed, after this: a time, or 2h for two hours ago",
           type=time_named),
    option("--before --older-than TIME", "the same, before this", type=time_named),
)
TERMS = (STATE, QUEUE, *OTHER_TERMS)


def selection_of(args: Any, usual: Names = ()) -> Selection:
    """The jobs that the options of a command select; `usual` are the states if they name none."""
    states = [name for names in args.state for name in names]
    queues = [name for names in getattr(args, "queue", None) or [] for name in names]
    return Selection(tuple(states or usual), tuple(queues),
                     args.grep or None, args.error or None, args.since, args.before)


def check_choice(args: Any) -> None:
    """Raise UsageError unless a command was given either ids or a selection."""
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
    """Why jobs died, one row a cause, those of most jobs first.

    Causes that differ only in numbers, paths and names are one. A job that was to run after
    another counts with the cause of that one.
    """
    find = lru_cache(1000)(partial(store.value, ERROR_OF_DEAD))
    causes: dict[str, Row] = {}
    for job in jobs:
        error, along = job["last_error"] or "no reason", TAKEN_ALONG[DEAD]
        first = error.endswith(along) and find(error[:-len(along)])
        key = cause_of(first or error)
        cause = causes.setdefault(key, {
            "cause": key, "count": 0, "after": 0, "since": NEVER,
            "example": None, "ids": [], "along": []})
        cause["since"] = min(cause["since"], job["finished_at"])
        if first:
            cause["after"] += 1
            cause["along"].append(job["id"])
        else:
            cause["count"] += 1
            cause["example"] = error
            cause["ids"].append(job["id"])
    return sorted(causes.values(), key=lambda cause: -cause["count"])


def retry_words(store: Store, selection: Selection, cause: Row) -> str:
    """The command that retries the dead jobs of a cause, and just these."""
    terms = ["dlq", "retry"]
    if not cause["count"]:  # the jobs that these waited for are not selected
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


def _list_causes(args: Any, selection: Selection) -> None:
    """Show why jobs are dead, a line a cause, each with what retries them."""
    store, now = args.store, now_millis()
    causes = causes_of(store, store.jobs(selection))
    for cause in causes:
        cause["retry"] = CALLED[0] + " " + retry_words(store, selection, cause)
        del cause["ids"], cause["along"]
    if args.json:
        emit_list(dict(cause, since=show_time(cause["since"])) for cause in causes)
        return
    for cause in causes:
        after = " and %d after it" % cause["after"] if cause["after"] else ""
        emit("%d%s, for %s: %s"
             % (cause["count"], after, span(cause["since"], now), cause["cause"]))
        emit("    such as: %s" % shorten(cause["example"] or "", 200))
        emit("    `%s`" % cause["retry"])


@subcommand(
    "dlq list", "show the dead letter queue: jobs that failed too often",
    "\nqueuectl dlq list\nqueuectl dlq list --causes\n",
    QUEUE, *OTHER_TERMS, LIMIT, ALL, JSON,
    option("--causes", "one line a cause, with what retries its jobs"))
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


def live_run(store: Store, job: Row) -> Row:
    """The current run of a job, with what it has printed so far."""
    limit, start = output_limit(store.settings(), job["queue"]), job["started_at"]
    stdout, stderr = [read_beside(path, b"", head_and_tail, limit)
                      for path in output_paths(store.path, job["locked_by"], job["slot"])]
    seconds = max(0, now_millis() - start) / 1000
    return {"run": job["runs"], "attempt": job["attempts"], "state": PROCESSING,
            "started_at": start, "finished_at": None, "duration_seconds": seconds,
            "exit_code": None, "error": None, "worker": job["locked_by"],
            "stdout": stdout, "stderr": stderr}


def runs_of(store: Store, job: Row, last: int = 0) -> Iterator[Row]:
    """The runs of a job after run `last`, oldest first, and at the end the one that runs now."""
    yield from store.runs(job["seq"], last)
    if job["state"] == PROCESSING:
        yield live_run(store, job)


def environment_of(store: Store, job: Row) -> dict[str, str]:
    """The variables kept for a job: with --env-all its caller's, and those that --env named."""
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
    option("--env", "the variables that were kept for it, and nothing else"))
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
    """What an output file holds behind `start`, and its size; of very much not the middle."""
    size = os.fstat(fd).st_size
    if start == 0:
        return head_and_tail(fd, limit), size
    if size < start:
        return EMPTIED + read_between(fd, 0, size), size
    if size - start <= limit:
        return read_between(fd, start, size), size
    resumed = size - limit // 2
    return GAP % (resumed - start) + read_between(fd, resumed, size), size


def rest_of(output: bytes, start: int) -> bytes:
    """What a run's record holds behind the first `start` bytes that the run had printed."""
    gap = gap_of(output)
    if start and output.startswith(EMPTIED):
        start += len(EMPTIED)
    if start > len(output):  # these were other bytes: the job has truncated its output since
        start = 0
    return output[gap:] if 0 <= gap < start else output[start:]


def whole_characters(output: bytes) -> int:
    """How many bytes of `output` to show, so that no character is torn that is still coming."""
    from codecs import utf_8_decode
    return utf_8_decode(output, "replace", False)[1]


def whole_lines(output: bytes) -> int:
    """The same, so that no line is torn, if it is not very long."""
    return output.rfind(b"\n") + 1 or len(output) * (len(output) > 1 << 16)


class OutputReader:
    """What a job prints, run after run, each byte once: first from its files, then its records.

    Runs up to `last` are left out. Of a run under way, `whole` tells how much is ready to be shown.
    """

    def __init__(self, store: Store, seq: int, last: int = 0,
                 whole: Callable[[bytes], int] = whole_characters) -> None:
        self.store, self.seq, self.last, self.whole = store, seq, last, whole
        self.offsets = [0, 0]  # how much of the current run was read, of each stream

    def news(self, job: Row) -> Iterator[tuple[Row | None, list[bytes]]]:
        """What was printed since: for each run that has ended it and the rest of its streams.

        In the end, with None, for the current one. `job` is the job as it is now.
        """
        for run in self.store.runs(self.seq, self.last):
            yield run, [rest_of(run[name] or b"", offset)
                        for name, offset in zip(STREAMS, self.offsets)]
            self.last, self.offsets = run["run"], [0, 0]
        if job["state"] == PROCESSING and job["runs"] > self.last:
            yield None, self._live(job)

    def _live(self, job: Row) -> list[bytes]:
        """What a running job has printed since the last look.

        The files are used again for other jobs after the run was recorded: so what was read counts
        only if the job is still in the same run afterwards.
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
        return ready

    def has_all(self, job: Row) -> bool:
        """Whether nothing is to come any more."""
        return job["state"] in ENDED and self.last >= job["runs"]


class Logs:
    """How `logs` shows what jobs have printed: with titles, as lines with tags, or one stream.

    `streams` are those to show, `tail` how many of their last lines (None: all).
    """

    def __init__(self, streams: Sequence[str], tag: bool, tail: int | None) -> None:
        self.streams, self.tag, self.tail = streams, tag, tail
        self.titles = len(streams) > 1 and not tag
        self.torn = False  # whether what was shown last ended within a line

    def show_output(self, job: Row, name: str, output: bytes) -> None:
        """Show what one of a job's streams has printed, if it is to be shown."""
        if not output or name not in self.streams:
            return
        if self.tail is not None:
            output = last_lines(output, self.tail)
        emit_output(output, tag=job["id"] if self.tag else None)
        self.torn = not output.endswith(b"\n")

    def end_line(self) -> None:
        """Let what follows begin on a new line."""
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
        """Show what an OutputReader has found, a run's result below its output."""
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
        """Show everything; the exit code, which is not 0 if one was deleted meanwhile."""
        running: list[Row] = []
        seen, look_at = -1, 0.0
        while self.readers:
            began, now_seen = monotonic(), self.store.changed()
            if now_seen != seen and began >= look_at:
                running, seen = self._look_at_all(), now_seen
                self.logs.tail = None  # that was of what had been printed before
                look_at = began + 4 * (monotonic() - began)
            else:
                for job in running:
                    self._show(job)
            sys.stdout.flush()
            sleep(FOLLOW_EVERY)
        return self.code

    def _look_at_all(self) -> list[Row]:
        """Show what is new of all jobs; those that run now."""
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
    """All runs of a job; the newest with this number of attempts, or for one stream the newest."""
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
    """Show what these jobs have printed up to now."""
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
    """Show what these jobs have printed, and what they print until they have ended."""
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
    """The jobs with these names, each once; raises QueueError unless all of them exist."""
    return list({job["seq"]: job for job in map(store.find, names)}.values())


def jobs_meant(args: Any) -> list[Row] | Iterator[Row]:
    """The jobs that a command was given by their ids, each once, or by a selection."""
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
           "of the newest run of this number only", type=whole("--attempt", 10**6)),
    option("--stdout", "of the newest run stdout's bytes, and nothing else"),
    option("--stderr", "of the newest run stderr's bytes, and nothing else"),
    option("-n --tail N", "the last N lines of each output only", type=whole("--tail", 10**9)),
    option("--tag", "each line behind the id of its job and a tab"),
    option("-f --follow", "go on until the jobs have ended; of several jobs with tags"), JSON)
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
    """What keeps a waiting job from running, whoever would work on it."""
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
        yield "all queues are paused; `queuectl queue resume` lets their jobs start"
    elif queue["paused"]:
        yield ("its queue %s is paused; `queuectl queue resume %s` lets its jobs start"
               % (name, name))
    most = queue["concurrency"]
    if most is not None and queue[PROCESSING] >= most:
        running = ", ".join(store.running_in(name, 5))
        yield ("its queue %s runs as many jobs as it may at once (%d): %s; `queuectl cancel ID` "
               "ends one, `queuectl queue set %s --concurrency N` lets more run"
               % (name, most, running, name))


def _stands_before(store: Store, job: Row, now: int, serving: Sequence[Row]) -> Iterator[str]:
    """What a job waits for that nothing else holds up: its turn, and a worker."""
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
    """Why a waiting job does not run now, and whether that ends by itself."""
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
    """What there is to say of a job that runs, and what to do next."""
    name, worker = job["id"], job["locked_by"]
    if not store.is_own(worker):
        return ("it ran in the queue that this one was copied from; it is given back when no "
                "process of that queue is left, and `queuectl cancel %s` gives it up" % name)
    if not is_alive(store.path, worker):
        return ("its worker %s has died; the next worker ends what is left of the run: "
                "`queuectl worker start`" % worker)
    trouble = trouble_of(store.path, worker)
    if trouble:
        return "its worker is held up: %s" % clean(trouble)
    limit = "without a time-out"
    if job["timeout_seconds"]:
        end = job["started_at"] + job["timeout_seconds"] * 1000
        limit = "at most %s more" % show_duration(max(0, end - now) / 1000)
    return ("it runs now, for %s, %s; `queuectl logs --follow %s` shows its output, "
            "`queuectl cancel %s` ends it" % (span(job["started_at"], now), limit, name, name))


NEVER_COMPLETED = ("was to run after a job that never was completed and is forgotten; "
                   "enqueue it anew")


def why_in_vain(store: Store, job: Row, now: int) -> str:
    """Why a job is dead or cancelled, and what to do next."""
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
        return died + "`queuectl retry %s` lets it run after all" % name
    return died + ("`queuectl logs %s` shows what it printed, `queuectl retry %s` tries it again"
                   % (name, name))


@subcommand(
    "why", "tell why a job isn't running now, and what to do", "\nqueuectl why job1\n",
    ID, JSON)
def cmd_why(args: Any) -> None:
    store, now, expected = args.store, now_millis(), None
    job = store.find(args.id)
    name, state = job["id"], job["state"]
    if state in WAITING:
        reasons, passing = why_waiting(store, job, now)
        if passing and (job["due"] or 0) > now:
            expected = show_time(job["due"])
    elif state == PROCESSING:
        reasons = [why_running(store, job, now)]
    elif state in IN_VAIN:
        reasons = [why_in_vain(store, job, now)]
    else:
        reasons = ["it ended well %s ago; `queuectl retry %s` runs it once more"
                   % (span(job["finished_at"], now), name)]
    if args.json:
        reasons = [as_called(reason) for reason in reasons]
        emit_json({"id": name, "state": state, "reasons": reasons, "expected_at": expected})
        return
    emit("%s is %s:" % (name, state))
    for reason in reasons:
        advise("  " + reason)
    if state == FAILED:
        emit("  its last run: %s (%d of %d attempts used)" % (
            job["last_error"], job["attempts"], max(1, job["max_retries"])))


def tell_if_idle(db: str) -> bool:
    """Say how to start a worker if none lives; whether that was said."""
    idle = not anyone_alive(db)
    if idle:
        complain("no worker is running; `queuectl worker start` works on the queue")
    return idle


def tell_hold_up(store: Store, seq: int) -> bool:
    """Say what keeps a job from running, if that may take for ever; whether that was said."""
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
    """Tell of jobs that were waited for and are dead or (None) forgotten; the exit code."""
    gone = ends.count(None)
    if gone:
        complain("%s deleted while waited for" % count_of(gone, "job"))
    for name, state, error in [end for end in ends if end][:5]:
        complain("%s is %s: %s; `queuectl logs %s` shows what it printed"
                 % (name, state, error or "no reason", name))
    return EXIT_FAILED if ends else EXIT_OK


def await_jobs(store: Store, seqs: Iterable[int], patience: float) -> int:
    """Wait until all these jobs have ended; the exit code of `wait`.

    Raises TimedOut after `patience` seconds. Each job is looked at when it has ended, for it may
    be forgotten soon after.
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
    store.sync()  # what it says must still be so after a power cut
    return tell_ends(ends)


def own_run(db: str) -> tuple[str, int]:
    """The worker and the seq of the job that called this command, if it is one of this queue."""
    run = os.environ.get("QUEUECTL_RUN", "")
    worker, _, rest = run.rpartition("-")[0].rpartition("-")
    if rest.isdigit() and is_alive(db, worker):
        return worker, int(rest)
    return "", 0


@subcommand("wait", "until jobs have ended; exit 1 if one was not completed", """
queuectl wait job1 job2 && echo 'both are completed'
queuectl wait --queue mail --timeout 1h
""",
    option("ids ID", "without: all selected that are unfinished now", nargs="*"), *TERMS, ALL,
    option("--timeout DURATION", "exit 124 if it takes longer", type=time_limit, default=ENDLESS))
def cmd_wait(args: Any) -> int:
    store = args.store
    seqs = {store.find(name)["seq"] for name in args.ids}
    usual: Names = UNFINISHED
    if any(map(is_run_queue, (name for names in args.queue for name in names))):
        usual = STATES  # of a run that was detached jobs may have died before this command came
    if not seqs:
        seqs = set(store.look(selection_of(args, usual))[0])
    seqs.discard(own_run(args.db)[1])  # a job doesn't wait for itself
    return await_jobs(store, seqs, args.timeout)


LEAST_SPACE = 100 * 1024 * 1024  # bytes
LONG_RUN = 86400.0  # seconds
MANY_DEAD = 100  # jobs
LARGE_LOG = 64 * 1024 * 1024  # bytes; without readers a log is much smaller, see _connect


def _findings_of_lost(store: Store) -> Iterator[tuple[str, str]]:
    """Jobs whose worker is dead."""
    for lost in store.lost_jobs():
        name, worker = lost["id"], lost["worker"]
        if not store.is_own(worker):
            yield ("%s ran in the queue that this one was copied from, and may be running there"
                   % name,
                   "it is given back when no process of that queue is left; "
                   "`queuectl cancel %s` gives it up" % name)
            continue
        what = "%s is held by the worker %s, which is dead" % (name, worker)
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
    """Dead or stopped workers, and jobs that run for very long."""
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
                   "it goes on by itself when that has passed")
        name, age = worker["job"], (now - (worker["job_started_at"] or now)) / 1000
        if age > LONG_RUN:
            yield ("%s has been running for %s" % (name, show_duration(age)),
                   "`queuectl logs %s` shows what it does, `queuectl cancel %s` ends it"
                   % (name, name))


def _findings_of_queues(store: Store) -> Iterator[tuple[str, str]]:
    """Many dead jobs, and a log that can't be emptied."""
    dead, log = store.counts()[DEAD], store.path + "-wal"
    if dead >= MANY_DEAD:
        yield "%d jobs are dead" % dead, "`queuectl dlq list --causes` tells why"
    if bytes_on_disk([log]) > LARGE_LOG:
        yield ("%s has %d MiB: it can't be emptied while a program reads the database for long"
               % (log, bytes_on_disk([log]) >> 20),
               "`fuser -v %s` names who has it open" % shell_word(store.path))


def findings_of(store: Store) -> Iterator[tuple[str, str]]:
    """What is wrong with a queue, each with what mends it."""
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


@subcommand(
    "doctor", "check the database and what dead workers left; exit 1 if anything is wrong",
    "\nqueuectl doctor\n",
    JSON)
def cmd_doctor(args: Any) -> int:
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


# The fields of a job that can be given, and changed later.
FIELD_OPTIONS = (
    option("--priority N", "lower runs first (%d)" % SETTINGS["priority"]),
    option("--run-at TIME", "not before this time: 2026-01-31T10:00:00Z, now+5m"),
    option("--delay DURATION", "not before this long from now: 90, 500ms, 1h30m"),
    option("--expires TIME", "cancelled if no run has begun by then"),
    option("--timeout DURATION", "end a run that takes longer"),
    option("--max-retries N", "runs before it is dead (%d)" % SETTINGS["max_retries"]),
    option("--backoff-base N",
           "seconds between tries: N ** attempts (%d)" % SETTINGS["backoff_base"]),
    option("--cwd DIR", "the folder it runs in (this one)"),
    option("--shell SHELL", "what runs the command: bash, or a path (%s)" % SETTINGS["shell"]),
    option("--env NAME[=VALUE]", "a variable for the job; without value yours", action="append"),
    option("--after ID[,ID]", "not before these jobs are completed; repeatable", action="append"),
    option("--after-any ID[,ID]",
           "not before these jobs have ended, however; repeatable", action="append"),
    option("--unique KEY", "refused while a job with this key waits or runs"),
    option("--retry-after DURATION", "when to try again after exit code 75 (1m)"),
    option("--dead-on CODE[,CODE]", "exit codes not to be retried; repeatable", action="append"),
)


# ─── changing: the jobs there are ─────────────────────────────────────────────────────────────
#
# A command that changes jobs takes their ids, all of them or none, or selects them. A selection is
# looked at once. Then each job is changed if it still is as it was, a few in each transaction: so
# what came in or went on meanwhile is not touched, and nobody waits long for the mutex.

Change = namedtuple("Change", "done takes usual advice apply refusal")

SELECTED_IDS = option("ids ID", BY_ID, nargs="*")
DRY_RUN = option("--dry-run", "only show which jobs it would be")
YES = option("--yes", "don't ask before more than one is changed")
CHANGING = (SELECTED_IDS, *TERMS, ALL, DRY_RUN, JSON)


def after_change(store: Store) -> None:
    """Have workers look again, and let end what the changed jobs take along."""
    store.settle(now_millis())
    ring_all(store.path)


def one_change(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function that changes the queue of its first argument, a Store, one transaction.

    Workers look again after its commit. What it returns is what a command tells.
    """
    def change(store: Store, *values: Any, **details: Any) -> Any:
        with store.transaction():
            result = function(store, *values, **details)
        after_change(store)
        return result
    return change


set_setting, unset_setting = one_change(Store.set_setting), one_change(Store.unset_setting)
set_concurrency, pause_queue = one_change(Store.set_concurrency), one_change(Store.pause)
add_jobs = one_change(Store.add)


def find_named(store: Store, change: Change, names: Iterable[str]) -> list[Row]:
    """The jobs with these names, each once, if all of them exist and can be changed."""
    jobs = find_each(store, names)
    for job in jobs:
        if job["state"] not in change.takes:
            raise QueueError("%s is %s; %s" % (
                job["id"], job["state"], change.advice.replace("ID", job["id"])))
    return jobs


def choose(args: Any, change: Change) -> Selection:
    """The selection of a command, of states that it can take; see check_choice."""
    check_choice(args)
    selection = selection_of(args, change.usual)
    unfit = set(selection.states) - set(change.takes)
    if unfit:
        raise UsageError("%s: not %s jobs" % (change.advice, ", ".join(sorted(unfit))))
    return selection


def confirm(args: Any, done: str, count: int) -> None:
    """Ask before many jobs are changed, if somebody is there to answer."""
    if count < 2 or getattr(args, "yes", True) or not is_terminal(sys.stdin):
        return
    system.say("%s: %d jobs. Go on? [y/N] " % (done, count), 2)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise QueueError("nothing was changed")


@one_change
def change_named(store: Store, change: Change, names: Iterable[str]) -> list[Row]:
    """Change the jobs with these names, all or none."""
    jobs = find_named(store, change, names)
    left = sorted(jobs, key=lambda job: -job["seq"])
    while left:  # what waits goes before what it waits for
        refused = [job for job in left if not change.apply(job)]
        if len(refused) == len(left):
            raise QueueError(change.refusal(left[0]))
        left = refused
    return jobs


def jobs_now(store: Store, seqs: Iterable[int]) -> Iterator[Row]:
    """These jobs as they are now, without those that are forgotten."""
    return filter(None, map(store.find_by_seq, seqs))


def change_jobs(args: Any, change: Change, newest_first: bool = False) -> Sequence[int]:
    """Do what a command does to the jobs that were named or selected; the seqs of those changed."""
    store, selection = args.store, choose(args, change)
    if args.ids:
        use = find_named if args.dry_run else change_named
        return [job["seq"] for job in use(store, change, args.ids)]
    looked = store.look(selection)
    if args.dry_run:
        return looked[0]  # type: ignore[no-any-return]
    confirm(args, change.done, len(looked[0]))
    done: Sequence[int] = store.change_each(looked, change.apply, newest_first)
    after_change(store)
    return done


def tell_changed(args: Any, change: Change, seqs: Sequence[int],
                 gone: Sequence[Row] = ()) -> None:
    """Tell which jobs were changed, or would be; of some that are `gone`, what they were."""
    store, now = args.store, now_millis()
    jobs = gone or jobs_now(store, seqs)
    if args.json:
        emit_list(map(job_json, jobs))
    elif args.dry_run:
        emit_table(JOB_HEAD, [job_row(job, now) for job in jobs_now(store, seqs[:50])],
                   "No such jobs.")
        complain("%s: it would be %s" % (change.done, count_of(len(seqs), "job")))
    elif args.ids:
        for job in jobs:
            emit("%s: %s" % (change.done, job["id"]))
    else:
        emit("%s: %s" % (change.done, count_of(len(seqs), "job")))


# retry

DEPENDENTS = option("--with-dependents", "and the jobs that ended with them, waiting for them")


def _refusal_of_retry(store: Store, job: Row) -> str:
    """Why a job can't start afresh."""
    name = job["id"]
    if store.waits_for_gone(job["seq"]):
        return "%s %s" % (name, NEVER_COMPLETED)
    return "%s can't be retried: another job with its key %s waits or runs" % (name, job["unique"])


def _ended_with(args: Any, change: Change) -> set[int]:
    """What ended with the jobs that were named, by seq.

    Raises QueueError for a job that would wait for one that ended in vain, and does not start.
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


def _retry(args: Any, takes: Names, usual: Names, advice: str) -> None:
    store = args.store
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
        complain("not retried: %s that ended with it; --with-dependents takes them too"
                 % count_of(len(dependents), "job"))
    tell_changed(args, change, seqs)
    left = args.all and not args.dry_run and store.total(selection)
    if left:
        complain("not retried: %s, for another job with their key waits or runs, or because they "
                 "were to run after jobs that ended in vain" % count_of(left, "job"))


@subcommand("retry", "let ended jobs run again from the start", """
queuectl retry job1 job2
queuectl retry --state dead,cancelled --queue mail --since 2h
""",
    *CHANGING, DEPENDENTS, writes=True)
def cmd_retry(args: Any) -> None:
    _retry(args, ENDED, IN_VAIN, "only a job that has ended can be retried; `queuectl edit ID "
           "--run-at now` starts one that waits for a time")


@subcommand("dlq retry", "give dead jobs a new start", """
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
    """The state of a cancelled job as soon as it does not run; for a dead worker do its part."""
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


@subcommand("cancel", "take waiting jobs out of the queue, end running ones", """
queuectl cancel job1
queuectl cancel --queue night --state pending
""",
    *CHANGING, YES, writes=True)
def cmd_cancel(args: Any) -> None:
    store = args.store

    def apply(job: Row) -> Any:
        cancel = store.ask_cancel if job["state"] == PROCESSING else store.cancel_waiting
        return cancel(job["seq"], now_millis())

    change = Change("Cancelled", UNFINISHED, UNFINISHED, "it has ended already", apply, str)
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

EMPTY = {  # fields that may be taken away, each with what says so
    "timeout": "none", "run_at": "none", "expires": "none", "backoff_base": "none",
    "retry_after": "none", "unique": "none", "shell": "none",
    "after": "", "after_any": "", "dead_on": ""}


def edited_fields(args: Any, now: int) -> Row:
    """What `edit` was told to change; `none` takes a field away, and an empty list its entries."""
    given = given_options(args)
    if not given:
        raise UsageError("say what to change; see `queuectl edit --help`")
    kept = {name: value for name, value in given.items() if EMPTY.get(name) != value}
    draft = draft_of({"command": "true", **kept}, now, system.longest_command)
    if "cwd" in kept:
        draft["cwd"] = _folder(kept["cwd"])
    if "shell" in kept:
        draft["shell"] = find_shell(kept["shell"])
    names = {ALIASES.get(name, name) for name in given}
    if not names:
        raise UsageError("say what to change; see `queuectl edit --help`")
    return {name: draft[name] for name in names}


@subcommand(
    "edit", "change jobs that wait or have ended, of running ones the time-out; `none` or '' takes "
    "a field away", """
queuectl edit job1 --priority 1
queuectl edit job1 --run-at now --timeout none
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

    args.queue = None  # it is set, and does not select
    takes: Names = (*WAITING, *ENDED)
    if set(fields) == {"timeout_seconds"}:
        takes = STATES
    change = Change("Changed", takes, WAITING, "of a running job only the time-out can be changed; "
                    "`queuectl cancel` ends one", apply, str)
    tell_changed(args, change, change_jobs(args, change))


# delete

@subcommand("delete", "forget jobs and their runs", """
queuectl delete job1
queuectl delete --state cancelled --grep test
""",
    *CHANGING, YES, writes=True)
def cmd_delete(args: Any) -> None:
    store, gone = args.store, []

    def apply(job: Row) -> Any:
        done = store.delete(job["seq"])
        if done and (args.json or args.ids):
            gone.append(job)
        return done

    def refusal(job: Row) -> str:
        waiting = [other["id"] for other in store.waiters_of(job["seq"])[:5]]
        return "%s can't be deleted, for others are to run after it: %s" % (
            job["id"], ", ".join(waiting))

    change = Change("Deleted", WAITING + ENDED, ENDED, "`queuectl cancel` ends a running job",
                    apply, refusal)
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


# ─── working: new jobs, and whoever runs them ─────────────────────────────────────────────────

def finish_draft(draft: Row, folders: dict[str | None, str]) -> Row:
    """Give a draft its folder and its shell: existing ones, absolute.

    `folders` are those seen before.
    """
    given = draft["cwd"]
    if given not in folders:
        folders[given] = _folder(given)
    if draft["shell"] is not None:
        draft["shell"] = find_shell(draft["shell"])
    most = system.longest_command
    for name, value in (draft["env"] or {}).items():
        if len(name.encode()) + len(value.encode()) + 2 > most:
            raise UsageError("env %s is too long: this system takes %d bytes" % (name, most))
    draft["cwd"] = folders[given]
    return draft


def open_jobs(path: str, pipe: int = 0) -> BinaryIO:
    """The file with jobs; or a `pipe`, a descriptor, whose jobs are added as they come.

    What else is no plain file is read to its end first: it may be slow, and nobody else can write
    while its jobs are added.
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
    """The command that is read from stdin for `-`: a whole script."""
    with open_jobs("-") as stream:
        try:
            script = stream.read(LONGEST_LINE).decode("utf-8-sig")
            return check_text("the command", script.rstrip("\n"))
        except UnicodeDecodeError:
            raise UsageError("the command on stdin is not valid UTF-8") from None


def read_job(given: str | Row, now: int, options: Row) -> Row:
    """The draft of a job from its fields, or from JSON or a command; `options` win."""
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


def draft_of_words(words: list[str], literal: bool, now: int,
                   options: Row) -> Row:
    """The draft of one word, a shell command or JSON, or of several: a command and its arguments.

    Several words may also be JSON that was torn. Behind `--` they are `literal`, never JSON.
    """
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
    """The lines of a file with jobs, with their numbers."""
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
    """How many more objects begin than end in JSON."""
    bare = re.sub(r'"(?:[^"\\\n]|\\.)*"', "", text)
    return bare.count("{") - bare.count("}")


def _json_jobs(number: int, text: str, lines: Lines) -> Given:
    """The objects in JSON that begins with `text`, up to the end of a line where none is open.

    One that can't be read is yielded as text: its reader understands it, or tells what is wrong.
    """
    from itertools import chain
    rest, at, depth, opened = "", 0, 0, 0  # in how many arrays; in how many objects
    for last, line in chain([(number, text)], lines):
        rest += line + "\n"
        if opened:  # it is not read anew at each }: that takes quadratic time
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
                raise UsageError("line %d: JSON here is objects with a command, commas between them"
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
    """The command that begins with `text`, with the lines that a backslash joins to it."""
    mark, last = unfinished(text), number
    while mark == "\\" and last - number < 9999:  # each time it is read anew
        last, line = next(lines, (number, ""))
        text = text[:-1] + line
        mark = unfinished(text)
    if mark:
        raise UsageError(
            "line %d: this command goes on in the next line, as its %s is open; write it on one "
            "line, or give `queuectl enqueue -` the whole as one job" % (number, mark))
    return text


def read_jobs(lines: Lines) -> Given:
    """What each job in numbered lines is given as, with its number, once its last line is there.

    A job is a command in a line, or JSON in any layout: objects one after the other, or an array.
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
                yield number, text  # the usual one, in which is no other
            else:
                yield from _json_jobs(number, text, lines)
            continue
        if number == 1 and text.startswith("#!"):
            raise UsageError("line 1: this is a script, and no list of jobs; "
                             "`queuectl enqueue %s FILE` makes one job of it"
                             % re.sub(r"#!\s*(\S*/)?(env\s+(-S\s+)?)?", "", text))
        if not WINDOWS:
            text = _whole_command(number, text, lines)
        if text and text[0] != "#":
            yield number, {"command": text}


def drafts_of(lines: Iterable[Any],
              read: Callable[..., Row]) -> Iterator[Row]:
    """The drafts that `read` makes of numbered lines; an error names the line."""
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
        complain(at_line(background[0], "a command that ends in & is completed at once, while its "
                         "work goes on unseen; leave the & out: workers run jobs side by side"))


def inputs_of(stream: BinaryIO, separator: bytes) -> Iterator[tuple[int, bytes]]:
    """The inputs for --each with their numbers: what stands between separators.

    An empty line is none, but between NUL characters what is empty counts.
    """
    read = getattr(stream, "read1", stream.read)  # of a pipe what has come, without waiting
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
    """The columns of an input; what separates them is a character, or a regular expression."""
    if separator is None:
        return [text]
    try:
        return re.split(separator if len(separator) > 1 else re.escape(separator), text)
    except re.error as error:
        raise UsageError("--colsep: %s" % error) from None


def quote_input(word: str) -> str:
    """A word of an input, in quotes for the shell that is to run it."""
    if WINDOWS:
        return join_words([word])
    if any("\udc80" <= c <= "\udcff" for c in word):
        return shell_word(word)
    return in_quotes(word)


def check_each(args: Any) -> re.Pattern[str]:
    """What stands for the input in the command of --each; raises UsageError as check_template."""
    place = PLACE if args.colsep is None else COLUMN_PLACE
    if not WINDOWS:
        check_template(args.each, place)
    return place


def each_source(args: Any, options: Row, now: int) -> Iterator[Row]:
    """The drafts of a command for each input: the arguments, or what comes from stdin or a file."""
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
    """What makes a draft of what was given as a job; `options` win."""
    return partial(read_job, now=now, options=options)


def job_source(args: Any, now: int) -> Iterator[Row]:
    """The drafts of what `enqueue` was given: one argument, several words, or lines of a file."""
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
    """The drafts, all of them (`whole`) or the first made already.

    Then a single job is refused without the database, and what is slow to read is read before
    the transaction: nobody else could write meanwhile.
    """
    from itertools import chain, islice
    if whole:
        return list(drafts)
    return chain(list(islice(drafts, 1)), drafts)


def manner_of(args: Any, now: int) -> Row:
    """How Store.add is to add the jobs of a command.

    They take over PATH and umask, and with --env-all every variable, from whoever enqueues them.
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
    """Say when a job will run that is not to run at once, or why it never will."""
    now, due = now_millis(), job["due"]
    if due and due > now:
        local = time.strftime("%Y-%m-%d %H:%M", time.localtime(due / 1000))
        complain("%s will run in %s, at %s (%s in local time)"
                 % (job["id"], span(now, due), show_time(due), local))
    if job["state"] == DEAD:
        complain("%s is dead already: %s" % (job["id"], job["last_error"]))


def tell_enqueued(args: Any, store: Store, first: int, last: int,
                  existing: Sequence[int], many: bool) -> None:
    """Tell of the jobs after seq `first` up to `last`, and of those that existed."""
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


FILE = option("--file PATH", "one job a line, command or JSON; - is stdin; all or none")
EACH = (
    option("--each COMMAND", "this for each input, a line on stdin: {} stands for it, quoted; "
           "{.} {/} {//} {/.} {#} as in GNU parallel"),
    option("-0 --null", "inputs end with NUL, not with a newline"),
    option("--colsep SEP", "columns of an input end at this, for {1} {2} …: a regular expression"),
)
JOB_OPTIONS = (
    option("--id ID", "choose the id yourself"),
    option("--env-all", "all your variables, as they are now"),
    option("--if-exists",
           "what to do if the id or key exists", choices=("fail", "skip"), default="fail"),
    *FIELD_OPTIONS,
)


def check_enqueue(args: Any) -> bool:
    """Whether there may be many jobs; raises UsageError if it is not clear what to enqueue."""
    in_file, by_each, why = args.file is not None, args.each is not None, ""
    many = in_file or by_each
    doubled = (in_file and args.words) or (many and args.id)
    lacking = not (many or args.words) or (args.null and not by_each)
    if args.id and args.file:
        why = " (the lines of a file carry their own ids)"
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
    option("--queue NAME", "the queue it waits in (default)"), *JOB_OPTIONS,
    option("--wait", "until it has ended; exit 1 if it was not completed"),
    option("--wait-timeout DURATION",
           "exit 124 if that takes longer",
           type=partial(checked, "delay", called="--wait-timeout")),
    option("-q --quiet", "print the ids alone"), JSON, writes=True)
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


def new_pool_name(store: Store) -> str:
    """A name that is never used twice; it begins with the queue's id, see Identity."""
    return "%s-%s" % (store.queue_id(), os.urandom(3).hex())




def _open_log(path: str) -> int:
    """A descriptor to write the log of a detached pool with."""
    try:
        return open_private(path, os.O_WRONLY | os.O_APPEND)
    except OSError as error:
        raise QueueError("the log %s can't be written: %s" % (path, error.strerror)) from None


def own_file() -> str:
    """The file that this program is in; raises QueueError if it came by a pipe."""
    script: str = abspath(globals().get("__file__", ""))
    if not isfile(script):
        raise QueueError("queuectl can't be started again from %s; save it as a file of its own"
                         % (script or "where it came from"))
    return script


def own_command() -> list[str]:
    """How this program is started: by the launcher of `install`, or as a script."""
    script = own_file()
    launcher = abspath(sys.argv[0])
    if os.path.basename(launcher) == "queuectl" and isfile(launcher):
        script = launcher  # it has the program compiled
    return [sys.executable, script]


# Runs the compiled script, its last constant, as the module queuectl with the words behind its own
# path. Nothing is imported from the folder that Python takes for its own; nor, as installed, by -S.
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
    """This script as a .pyc file, b"" if it is none.

    What it was compiled to is in the outermost frame, unless a debugger or the like runs it.
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
    """Become a Python that runs a .pyc file; returns if that can't be had."""
    import subprocess
    try:
        fd = os.memfd_create("queuectl", 0)  # type: ignore[attr-defined,unused-ignore]
        path = "/proc/self/fd/%d" % fd
        with open(fd, "wb"):
            with open(path, "wb") as file:
                file.write(program)
            flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
            os.execv(sys.executable, [sys.executable, "-S", *flags, path, *sys.argv])
    except (AttributeError, OSError, ValueError):  # no such function, no room, no path of Python's
        pass


def start_compiled() -> None:
    """Where this is a script, go on as a new program in this process that is not compiled again.

    Python keeps a script's syntax tree in memory for as long as it runs: more than all the rest of
    a pool. Where that can't be had, the pool goes on as it is.
    """
    program = compiled_script()
    if program and sys.implementation.name == "cpython":
        go_on_as(program)


def start_words(db: str, count: int, queues: Names) -> list[str]:
    """The command line that starts so many workers in the foreground."""
    words = [*own_command(), "--db", db, "worker", "start", "--count", str(count)]
    for name in queues:
        words += ["--queue", name]
    return words


START_TIME = 30.0  # seconds a detached pool has to come up


def _await_pool(process: Any, store: Store, name: str, count: int,
                log: str) -> None:
    """Wait until the workers of a detached pool run, or it is drained or stopped already."""
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
    """Start a pool by these words in a session of its own; its process id when its workers run."""
    import subprocess
    folder, log = dirname(store.path), log_path(store.path)
    fd = _open_log(log)
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=fd, stderr=fd, cwd=folder,
        env=dict(os.environ, QUEUECTL_POOL=name, QUEUECTL_DRAIN=drain),
        start_new_session=not WINDOWS,
        creationflags=0x208 if WINDOWS else 0)  # DETACHED_PROCESS, CREATE_NEW_PROCESS_GROUP
    os.close(fd)
    _await_pool(process, store, name, count, log)
    complain("%s in the background, log in %s; `queuectl worker stop` ends them"
             % (count_of(count, "worker"), log))
    return process.pid


COUNT = option("-j --count --workers N", "worker processes, or N%% of the cores (1)",
               type=workers_wanted, default=1)
SERVED = option("--queue NAME",
                "serve this queue only; repeatable",
                type=partial(check_name, "--queue"), action="append", default=[])


@subcommand("worker start", "run jobs, in the foreground", """
queuectl worker start --count 4           until Ctrl-C: finishes running jobs; twice ends them
queuectl worker start --count 4 --drain   until nothing is left to do
queuectl worker start --detach            in the background, log beside the database
""",
    COUNT, SERVED,
    option("--drain", "exit when nothing is left to do; 1 if a job died meanwhile"),
    option("--detach", "run in the background; prints the process id"),
    option("--max-jobs N", "exit after N runs", type=whole("--max-jobs", 10**9)))
def cmd_worker_start(args: Any) -> int:
    system.check_room(args.count)
    if not args.detach and not args.drain:  # a drain is short
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


# ─── run: jobs that are worked on now ─────────────────────────────────────────────────────────
#
# A `run` is three kinds of processes. The command itself adds the jobs to a queue of their own and
# becomes the supervisor of a pool that serves it. Beside the pool, the reporter shows what the
# jobs print and how far the run is: a reader that is slow, or a stopped terminal, holds up nobody
# else. It also adds the jobs that come by a pipe. The workers end when the queue is drained; where
# others may add jobs to it, or more come by a pipe, they end when the reporter does.

# The jobs of a run: those of a queue behind seq `before` up to `last`; how many of these were in
# each state when it began, and when that was.
Batch = namedtuple("Batch", "queue before last counts start")
# How far a run is: how many of its jobs there are in all and in some states, and if it is paused.
Progress = namedtuple("Progress", "total left completed dead cancelled failed processing paused")


def are_commands(args: Any) -> bool:
    """Whether each of the words given to `run` is a command, and not all of them one."""
    first = args.words[0]
    if args.literal or first.startswith("{"):
        return False
    return args.commands or re.search(r"[\s|&;<>()]", first) is not None


def tell_reading(args: Any) -> None:
    """Say which way several words were read, for there are two."""
    if are_commands(args):
        complain("each of these %d words is a command; write -- before them if they are one"
                 % len(args.words))
    elif not args.literal:
        complain("these words are one command; with --commands each of them is one")


def run_source(args: Any, start: int) -> Iterator[Row]:
    """The drafts of what `run` was given: several commands, or what `enqueue` takes.

    With --delay each waits that long after the one before, the first starts at `start`.
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
    """How fast a number has grown over the last minute of those it was told."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, int]] = []

    def __call__(self, number: int) -> float | None:
        """Its growth a second up to now; None until there is a span to speak of."""
        now = monotonic()
        self.seen.append((now, number))
        while len(self.seen) > 1 and self.seen[1][0] < now - RATE_SPAN:
            del self.seen[0]
        then, before = self.seen[0]
        if now - then < 0.2:
            return None
        return max(0, number - before) / (now - then)


class ProgressLine:
    """The line on stderr that tells how far a run is: redrawn on a terminal, else now and then."""

    def __init__(self, quiet: bool) -> None:
        self.quiet, self.began, self.rate = quiet, monotonic(), Rate()
        self.last_end = 0, 0.0
        escapes = os.environ.get("TERM") != "dumb"
        self.terminal = not quiet and is_terminal(sys.stderr) and escapes
        self.every = 0.3 if self.terminal else 10.0  # seconds
        self.next = self.began + self.every

    def show_if_due(self, name: str, part: Progress) -> None:
        """Show how far the run `name` is."""
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
        """Take the line away, for others are to follow."""
        if self.terminal:
            system.say(CLEAR_LINE, 2)

    def _time_left(self, ended: int, left: int) -> float | None:
        """Seconds that it will take at the pace up to the last end of a job.

        None while too few have ended.
        """
        now = monotonic() - self.began
        if ended != self.last_end[0]:
            self.last_end = ended, now
        if ended <= 2:
            return None
        taken = self.last_end[1]
        return max(0.0, taken / ended * left - (now - taken))


class Outputs:
    """Shows what the jobs of a run print: each when it has ended, in their order or as they end.

    On a terminal the first that has not ended is shown live.
    """

    def __init__(self, args: Any, batch: Batch, line: ProgressLine) -> None:
        self.store, self.queue, self.start, self.line = args.store, batch.queue, batch.start, line
        self.tag, self.unordered, self.live = args.tag, args.unordered, is_terminal(sys.stdout)
        self.low = batch.before  # all jobs up to this seq are shown,
        self.shown: set[int] = set()  # and these
        self.reader: OutputReader | None = None  # of the job that is shown live
        self.last: Any = None  # the stream that was written to last
        self.code = EXIT_OK

    def show(self, last: int, final: bool) -> None:
        """Show what is new of the jobs up to seq `last`; `final`: no other look will follow."""
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
        """Show what the last run of a job has printed, if that ended after this `run` began."""
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
            part += b"\n"  # the line with the progress may follow
        if stream is not self.last:  # the two may be one file: there, too, the order is right
            flush_streams()
        self.last = stream
        emit_output(part, stream, tag)


SHOWN_CAUSES = 5


class Reporter:
    """What goes on beside the pool of a `run`: outputs and progress are shown, and jobs come in.

    `orders` is the end of a pipe: there comes, when the pool has ended, whether it was stopped.
    """

    part: Progress | None = None  # how far the run was at the last look

    def __init__(self, args: Any, batch: Batch, orders: Any) -> None:
        self.args, self.batch, self.orders, self.store = args, batch, orders, args.store
        self.line = ProgressLine(args.quiet)
        self.outputs = Outputs(args, batch, self.line)
        self.total = unfinished_of(batch.counts)
        self.reading = args.pipe  # whether more jobs may come
        self.code, self.seen, self.pause = EXIT_OK, -1, FOLLOW_EVERY

    def work(self) -> int:
        """Report until the pool has ended, or has nothing left to do; the exit code of `run`."""
        stopped = None
        if self.reading:
            self._start_reading()
        while stopped is None and not self._is_done():
            if self.orders.poll(self.pause):
                stopped = self.orders.recv()
            self._add_arrived()
            self._look(stopped is not None)
        self.line.clear()
        if self.reading:  # `--resume` can't know what was still to come
            complain("stopped before the input ended: what had not come yet is not in %s"
                     % self.batch.queue)
            self.code = EXIT_INTERRUPTED
        return max(self.code, self.outputs.code, self.sum_up(bool(stopped)))

    def _is_done(self) -> bool:
        """Whether the jobs have ended, of a queue that the workers don't drain."""
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
            self.part = part  # only now: if all have ended, no other look follows
            if self.part and not final:
                self.line.show_if_due(self.batch.queue, self.part)
        except Unavailable:  # it can't be read now: what is wrong, the workers say
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
        """In a thread: read jobs, up to the end or to what is no job."""
        end = None
        try:
            for draft in run_source(self.args, self.batch.start):
                self.arrived.put(draft)
        except (QueueError, OSError) as error:
            end = error
        self.arrived.put(end)

    def _add_arrived(self) -> None:
        """Add the jobs that have come by now."""
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
        """Add these jobs; if one can't be added those before it."""
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
        self.seen = -1  # own commits are no news to `changed`
        self.batch = self.batch._replace(last=last)

    def _end_reading(self, error: Exception | None) -> None:
        self.reading = False
        if error:
            self.line.clear()
            went_on = "; no more is read, and what came before is worked on" if self.total else ""
            complain("error: %s%s" % (error, went_on))
            self.code = getattr(error, "code", EXIT_FAILED)

    # The end.

    def sum_up(self, stopped: bool) -> int:
        """Tell what has become of a run, and what to do next; its exit code."""
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
        """The dead jobs of this run, the last to die first."""
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
    """What the reporter does from its first instruction on."""
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
    """The queue that `run --resume` is to go on with; "" if no run was interrupted."""
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
    """Add the jobs of a run to its queue, in a transaction, if they don't come by a pipe.

    A queue of its own has a limit for other pools too: they may take some of the jobs.
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
    # What was to run after a dead job has ended in vain already, and counts as one of this run.
    return Batch(name, before, last, {**dict.fromkeys(STATES, 0), PENDING: added}, start)


def _old_batch(args: Any, store: Store) -> Batch:
    """What is left of an interrupted run, in the transaction that takes it over."""
    name = _resumed(store, args.words)
    before = last = 0
    if name:
        args.workers = args.workers or store.queue(name)["concurrency"] or 1
        store.set_concurrency(name, args.workers)
        seqs, _ = store.look(Selection(UNFINISHED, (name,)))
        before, last = seqs[0] - 1, seqs[-1]
    return Batch(name, before, last, store.states_between(name, before, last), now_millis())


def _tell_unserved(store: Store, names: Iterable[str]) -> None:
    """Say so if nobody works on the jobs that others are to run after."""
    for job in map(store.find, names):
        if job["state"] in UNFINISHED and not store.serving(job["queue"]):
            complain("%s is %s, and no worker serves its queue; `queuectl worker start --queue %s` "
                     "does" % (job["id"], job["state"], job["queue"]))


def _check_run(args: Any) -> None:
    """Raise UsageError for options that contradict each other, or where there is nothing to run."""
    both = args.file is not None and args.words
    changed = args.resume and (args.file or args.each or args.queue or given_options(args))
    by_each = args.each is not None
    if both or changed or ((args.null or args.colsep) and not by_each):
        raise UsageError("give commands, --file, --each (with -0 or --colsep, if need be) or "
                         "--resume; see `queuectl run --help`")
    if ":::" in args.words:
        raise UsageError("inputs stand behind the options, or on stdin: "
                         "queuectl run --each 'gzip {}' a.log b.log")
    if args.queue and args.fail_fast:
        raise UsageError("--fail-fast would cancel other jobs of the queue %s; leave out --queue"
                         % args.queue)
    if is_terminal(sys.stdin) and not (args.words or args.file or args.resume):
        raise UsageError("say what to run; see `queuectl run --help`")


def _comes_by_pipe() -> bool:
    """Whether stdin is none that can be read whole at once, and the reporter can have it."""
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
    args.drain = not (args.pipe or args.queue)  # else others may add jobs to the queue
    args.drafts = ()
    if len(args.words) > 1 and args.each is None and not args.resume:
        tell_reading(args)
    if args.pipe:
        if args.each is not None:
            check_each(args)
        probe = {"command": "true", **given_options(args)}  # else each job would tell what is wrong
        finish_draft(draft_of(probe, now_millis(), system.longest_command), {})
    elif not args.resume:
        args.drafts = begun(run_source(args, now_millis()), bool(args.words))


def _begin_run(args: Any, store: Store) -> tuple[Batch, Pool]:
    """Add the jobs, and register the pool that is to work on them, in one transaction.

    So of two that resume a run at the same time the second finds it taken.
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
    """Be the supervisor of a run's pool, with a reporter beside it; the exit code."""
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
    option("words COMMAND", "as for enqueue, or several shell commands, or inputs", nargs="*"),
    FILE, *EACH,
    option("--commands", "each word is a shell command"),
    option("-j --workers --count N", "how many at once, or N%% of the cores (the number of cores)",
           type=workers_wanted),
    option("--queue NAME", "in this queue, with its limits (a new one)",
           type=partial(check_name, "--queue")),
    option("--delay DURATION", "the pause between the starts of two jobs"),
    option("--unordered", "show each output when its job ends, not in the order of the jobs"),
    option("--tag", "show each line behind its input of --each (or the id) and a tab"),
    option("--fail-fast", "after the first job that dies start no more, and cancel the rest"),
    option("--dry-run", "show the commands only"),
    option("--detach", "leave the work to the background; prints the name of the run"),
    option("--resume", "go on with a run that was interrupted: run --resume [run-1]"),
    option("-q --quiet", "no output, no progress; a summary only if not all completed"), JSON,
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


STOP_PATIENCE = 2.0  # seconds until workers are told to stop without a database that can't be written


def stop_pools(store: Store, now: bool) -> None:
    """Have every pool end after its running jobs, or end these now; also of an older schema."""
    level = 2 if now else 1
    with store.transaction():
        store.ask_stop([pool["name"] for pool in store.pools()], level)
    ring_all(store.path)


def _tell_stop(db: str, pools: Iterable[Row], now: bool) -> bool:
    """The same without the disk: by the workers' bells, and signals; whether anybody was told."""
    rung = ring_all(db, STOP_NOW if now else STOP_SOON)
    told = [system.stop(pool["pid"], life_path(db, pool["name"]), now) for pool in pools]
    return rung > 0 or any(told)


def _await_stop(db: str, pids: dict[str, int], patience: float, now: bool) -> None:
    """Wait until these pools and workers have ended: names, each with its process id (0: unknown).

    `now`: their jobs are ended already.
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
            raise TimedOut("workers still run after %s; they go on stopping, %s"
                           % (show_duration(patience), advice))
        if monotonic() >= tell_at:
            complain("waiting for running jobs to end; " + advice)
            tell_at = ENDLESS
        sleep(0.02)


@subcommand("worker stop", "stop every pool on this database, after the running jobs", """
queuectl worker stop                 running jobs finish first
queuectl worker stop --now           running jobs go back into the queue
""",
    option("--now", "end the running jobs and give them back"),
    option("--timeout DURATION",
           "exit 124 if it takes longer; they go on stopping", type=time_limit, default=ENDLESS))
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
    for name in (worker, _pool_of(worker)):  # which waits for the job that called this
        pids.pop(name, None)
    _await_stop(args.db, pids, args.timeout, args.now)
    if worker:
        emit("All other workers have stopped; those of this pool do when this job has ended.")
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


# ─── setting up: settings, queues, copies, the program itself ─────────────────────────────────

KEY = option("key SETTING", "the setting, with - or _", type=setting_name)


@subcommand("config list", "the same as show", "\nqueuectl config list\n", JSON)
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


@subcommand("config set", "change a setting; running workers follow", """
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
    """What `--concurrency` may be: a number, or none."""
    if text == "none":
        return None
    return whole("--concurrency", 10**6)(text)


@subcommand(
    "queue list", "show the queues, their limits and jobs", "\nqueuectl queue list\n",
    JSON)
def cmd_queue_list(args: Any) -> None:
    queues = args.store.queues()
    for queue in queues:
        queue["paused"] = bool(queue["paused"])
    if args.json:
        emit_list(queues)
    else:
        emit_table(QUEUE_HEAD, map(queue_row, queues), "No queues.")


@subcommand("queue set", "limit how many jobs of a queue run at once, over all pools", """
queuectl queue set gpu --concurrency 1
queuectl queue set gpu --concurrency none
""",
    option("name NAME", "the queue", type=queue_name),
    option("--concurrency N",
           "that many, or none for no limit", type=jobs_at_once, required=True),
    writes=True)
def cmd_queue_set(args: Any) -> None:
    set_concurrency(args.store, args.name, args.concurrency)
    emit("Queue updated: %s: concurrency = %s" % (args.name, show_setting(args.concurrency)))


def _pause(args: Any, paused: bool) -> None:
    store, name = args.store, args.name
    unknown = name and all(queue["name"] != name for queue in store.queues())
    pause_queue(store, name, paused, now_millis())
    if unknown:
        complain("no job has ever been in the queue %s" % name)
    if not paused and store.all_paused():
        complain("all queues are paused; `queuectl queue resume` without a name lifts that")
    emit("%s: %s" % ("Paused" if paused else "Resumed", name or "all queues"))


@subcommand(
    "queue pause", "start no more jobs of a queue; those running go on",
    "\nqueuectl queue pause gpu\nqueuectl queue pause\n",
    option("name NAME", "the queue; without: all, those to come too", nargs="?", type=queue_name),
    writes=True)
def cmd_queue_pause(args: Any) -> None:
    _pause(args, True)


@subcommand(
    "queue resume", "start jobs of a paused queue again",
    "\nqueuectl queue resume gpu\nqueuectl queue resume\n",
    option("name NAME", "the queue; without: all", nargs="?", type=queue_name), writes=True)
def cmd_queue_resume(args: Any) -> None:
    _pause(args, False)


def jobs_in(store: Store) -> str:
    """How many jobs a queue has, in words."""
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
        raise QueueError("%s is not a backup of a queue; it is left as it is: name another file"
                         % path)
    store.backup(path)
    emit("Backed up: %s in %s" % (jobs_in(store), path))


@subcommand(
    "restore", "put a backup in the database's place",
    "\nqueuectl worker stop\nqueuectl restore /mnt/queue-backup.db\n",
    option("file FILE", "the backup"))
def cmd_restore(args: Any) -> None:
    if anyone_alive(args.db):
        raise QueueError("workers still use %s; `queuectl worker stop` first" % args.db)
    if not isfile(args.file):
        raise QueueError("there is no file %s" % args.file)
    if not is_queue(args.file):
        raise QueueError("%s is not a backup of a queue" % args.file)
    make_folder(dirname(args.db))
    kept = put_in_place(abspath(args.file), args.db)
    emit("Restored: %s from %s" % (jobs_in(args.store), args.file))
    if kept:
        complain("what stood in its place is kept as %s" % kept)


def home_folder(instead: str) -> str:
    """The user's home, which is not made.

    Raises QueueError where none is known, or it isn't there (yet); `instead` is what to name.
    """
    home = expanduser("~")
    given = os.environ.get("HOME")
    if given == "" or not isabs(home) or not isdir(home):
        raise QueueError("there is no home folder (HOME is %s); name %s"
                         % (json.dumps(given), instead))
    return home


# A shell reads the second and third line as a command, Python as a string: so the path of Python
# may have blanks and any length. Site-packages only slow the start (-S); queuectl uses none.
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
MARK = b'os.path.join(prefix, "lib", "queuectl")'  # every launcher that was ever made has it
COMMAND, LIBRARY = "bin/queuectl", "lib/queuectl"


def prefix_folder(text: str) -> Any:
    """The Path that --prefix names; raises QueueError if it is in a home that isn't there."""
    from pathlib import Path
    if not text:
        raise UsageError("--prefix needs a folder")
    if text.startswith("~"):
        home_folder("a folder with --prefix")
    return Path(abspath(expanduser(text)))


PREFIX = option("--prefix DIR",
                "the command is DIR/bin/queuectl, the rest in DIR/lib/queuectl (~/.local)",
                default="~/.local", type=prefix_folder)


def check_own(prefix: Any) -> None:
    """Raise QueueError if there is a link, or a file that `install` has not made, in its place."""
    for path in (prefix / COMMAND, prefix / LIBRARY):
        if path.is_symlink() or (path.is_file() and MARK not in path.read_bytes()):
            raise QueueError("%s is not what `install` makes; move it away, or name another "
                             "folder with --prefix" % path)


def compiled(program: bytes) -> bytes:
    """A .pyc file, which is used as long as the .py file beside it is this program."""
    import marshal
    from importlib.util import MAGIC_NUMBER, source_hash
    code = marshal.dumps(compile(program, COMMAND, "exec"))
    return MAGIC_NUMBER + b"\3\0\0\0" + source_hash(program) + code


def put_program(prefix: Any) -> None:
    """Install, or upgrade while the old one runs: all is written before any is put in its place."""
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
    if not re.fullmatch(r"[^\\\udc80-\udcff]+", sys.executable):  # no string of Python holds it
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
    except OSError:  # it isn't there, or what is left in it isn't ours
        pass
    if not found:
        raise QueueError("there is no %s; --prefix names another folder" % launcher)
    emit("removed: %s" % launcher)


def unit_word(text: str) -> str:
    """A word of a command line as systemd.syntax(7) and systemd.service(5) read it."""
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
# Else an empty queue would be made where its disk is not there yet.
RequiresMountsFor={folder}

[Service]
ExecStart={start}
{user}# Running jobs may finish, this long; then they are killed, and run again at the next start.
KillMode=mixed
# A job that runs out of memory is no reason to stop the others.
OOMPolicy=continue
TimeoutStopSec=10min
Restart=on-failure
RestartSec=5

[Install]
WantedBy={target}
"""


@subcommand("service", "print a systemd unit that runs workers", """
mkdir -p ~/.config/systemd/user
queuectl service --count 4 > ~/.config/systemd/user/queuectl.service
queuectl service --count 4 --system > queuectl.service
""",
    COUNT, SERVED,
    option("--system", "for the whole system, to be installed by root"))
def cmd_service(args: Any) -> None:
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
    """The command that a command line names so far, and its last option if the value is to come.

    Sets `args.db` if it names a database.
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
    """The values there are for an option or argument; none where anything may stand."""
    kind = details.get("metavar", "").partition("[,")[0]
    if kind == "ID":
        return [job["id"] for job in args.store.newest(Selection(), 200)]
    if kind in ("QUEUE", "NAME"):
        return [queue["name"] for queue in args.store.queues()]
    known: dict[str, Iterable[str]] = {
        "STATE": STATES, "SETTING": SETTINGS, "SHELL": COMPLETION}
    return known.get(kind) or details.get("choices") or ()


def completions(args: Any) -> Iterator[str]:
    """Yield what the last word of a command line can become, which is still being typed."""
    *before, word = [each for each in args.words if each not in ("=", "help")] or [""]
    name, waiting = _command_typed(args, iter(before))  # bash makes three words of --state=dead
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
            yield first + comma + each  # a shell would expand or divide others


@subcommand("completion", "print a completion script for bash, zsh or fish", """
eval "$(queuectl completion bash)"
queuectl completion fish > ~/.config/fish/completions/queuectl.fish
""",
    option("words SHELL", "bash, zsh or fish (default: bash)", nargs="*"),
    option("--answer", "print what the last word of a command line can become: the scripts ask it"))
def cmd_completion(args: Any) -> None:
    if args.answer:
        for word in completions(args):
            emit(word)
        return
    shell = " ".join(args.words) or "bash"
    if shell not in COMPLETION:
        raise UsageError("there is completion for bash, zsh and fish, not for %s" % quoted(shell))
    emit_text(COMPLETION[shell])


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
"""
ABOUT = "Background job queue in one file: runs shell commands, retries failures, loses nothing."
EXAMPLES = """
queuectl run 'echo hello' 'date -u'
queuectl enqueue 'echo hello'
queuectl worker start --count 4
queuectl status
"""


class Arguments(argparse.Namespace):
    """What a command was given, and the store of its database: opened when first asked for."""

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
    "Schedule": "--run-at --delay --expires --timeout",
    "Retries": "--max-retries --backoff-base --retry-after --dead-on",
    "Environment": "--cwd --shell --env --env-all",
    "Output": "--unordered --tag --tail --stdout --stderr -f -q --json",
}
MANY_OPTIONS = 8


def _add_titled(parser: Parser, options: Sequence[Any]) -> None:
    """Give a parser many options, each under its title, and a short usage."""
    usage = parser.format_usage().replace("[-h]", "[OPTIONS]")  # so far there are but arguments
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
    """The parser of one command; those of the others are never built."""
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
    return "  %-14s %s" % (word, summary)


def overview(group: str = "") -> str:
    """The help of queuectl itself, or of a group of commands."""
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
    """The name of a command ("" if its group's help was shown), and the words behind it."""
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
    """--db if it stands before the command, the command's name ("" for help), and its arguments."""
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

    That is from the one at `behind` on. It shows both forms: the option where it is queuectl's,
    and where it is the command's.
    """
    for place, word in enumerate(rest):
        length = length_of(word, lengths)
        if place >= behind and length:
            end = place + length
            others = rest[:place] + rest[end:]
            ours = join_words([name, *options, *rest[place:end], *others])
            theirs = join_words([name, *options, "--", *rest])
            raise UsageError(
                "%s stands behind the command: if it is meant for queuectl, write `queuectl %s`, "
                "if for the command, `queuectl %s`" % (word, ours, theirs))
    first, second = rest[:2]
    if second.startswith("-") and " " in first and first[0] != "{":
        raise UsageError("%s is no option of queuectl %s%s; put -- before what is not for queuectl"
                         % (second, name, nearest(second, lengths)))


def split_enqueue(entry: Command,
                  words: list[str]) -> tuple[list[str], list[str], bool]:
    """The options of `enqueue` or `run`, the words of the command, and whether they followed --.

    Options stand before the first word, or on either side of a single one: behind one that may be
    a program only those of a job, for others may be the program's. What stands behind the first of
    several words belongs to the command, and argparse would take it.
    """
    lengths = {"--db": 2, "-h": 1, "--help": 1, **option_lengths(entry.options)}
    own = lengths
    at, behind = 0, 1
    while words[at:] and words[at].startswith("-") and words[at] not in ("-", "--"):
        at += length_of(words[at], lengths) or 1
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
    """The folders that commands are looked for in."""
    return os.environ.get("PATH", "").split(os.pathsep)


def own_python() -> str:
    """The Python that runs this, by its bare name if that finds it."""
    name = os.path.basename(sys.executable)
    found = [join(folder, name) for folder in search_path()]
    first = next(filter(os.path.exists, found), "")
    if first and os.path.samefile(first, sys.executable):
        return name
    return join_words([sys.executable])


def own_name() -> str:
    """How this program was called, as it can be pasted: as a module, launcher or script."""
    spec, path = sys.modules["__main__"].__spec__, sys.argv[0]
    if spec is not None and spec.name == "queuectl":
        return own_python() + " -m queuectl"
    if os.path.basename(path) not in ("", "-", "queuectl"):
        return own_python() + " " + join_words([path])
    found = dirname(path) in ("", *search_path())
    return "queuectl" if found else join_words([path])


def database_path(given: str | None, needed: bool) -> str:
    """The database: `given` with --db, or that of the environment, or the one at home.

    It is told by its real name: what stands beside it must be the same for all, whatever link
    they came by. Raises UsageError for a path that can't be one, QueueError without a home.
    """
    if given == "" or (given or "").endswith(os.sep):
        raise UsageError("--db needs the path of a database, which is a file")
    if given:
        if len(os.fsencode(os.path.basename(given))) > LONGEST_NAME:
            raise UsageError("the database's name is too long: "
                             "what stands beside it has longer names")
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
    """The command that was asked for and its arguments; None if help was asked for, and shown."""
    CALLED[0] = own_name()
    db, name, words = split_arguments(list(map(as_utf8, argv)))
    if not name:
        return None, None
    chosen = COMMANDS[name]
    takes_command = name in ("enqueue", "run")
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
    """Tell of an error on one line; the exit code."""
    if os.environ.get("QUEUECTL_DEBUG"):
        sys.excepthook(*sys.exc_info())
    complain("error: %s" % error)
    return code


def prepare_streams() -> None:
    """Make standard streams that can carry any text, and write in large pieces."""
    stdout = sys.stdout
    if stdout is not None and not hasattr(stdout.buffer, "raw"):  # PYTHONUNBUFFERED: a write a line
        sys.stdout = open(1, "w", encoding=stdout.encoding, closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def run_command(argv: list[str]) -> int:
    """Run one command line; its exit code.

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
    """Run one command line, by default sys.argv, without the program's name; its exit code."""
    import gc
    if hasattr(gc, "freeze"):  # code lives to the end: not searching it makes the exit faster
        gc.freeze()
    code = run_command(sys.argv[1:] if argv is None else argv)
    if not close_stores():
        os._exit(code)
    return code


def exit_at_once(code: int) -> NoReturn:
    """End a program without the work of taking it apart, except under a profiler or debugger."""
    import atexit
    try:
        if sys._getframe(1).f_back is None:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    except (AttributeError, OSError, ValueError):
        pass  # Python's own end tells what can't be written; or it has no such function
    sys.exit(code)


if __name__ == "__main__":
    exit_at_once(main())
