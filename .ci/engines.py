#!/usr/bin/env python3
"""Tries queues with a runner on real engines: Slurm, sshd and Docker, each started here for that.

    .ci/engines.py [slurm | ssh | docker …] [--only WORDS]

As root, on Linux. Each engine has its own configuration, ports and sockets in a temporary folder, so that it
disturbs no other; what is not installed is skipped with a line that says so. Prints a line for each scenario, and
exits with 1 if there was a fault.

Pools run in another pid namespace than the engines. Otherwise queuectl's own search for a run's processes would
find the "remote" ones and end them, which hides what a second machine would show.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INSIDE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
PATIENCE = 150  # seconds for anything that should end soon
# A job that holds a lock of its own and notes when it begins and ends, on the other side. Its children hold the lock,
# too, and it is free as soon as none of them lives.
JOB = """\
exec 9>lock.$QUEUECTL_JOB_ID
flock -n 9 || echo OVERLAP $QUEUECTL_RUN >>log
echo begin $QUEUECTL_JOB_ID >>log
%s
echo end $QUEUECTL_JOB_ID >>log
"""
STUBBORN = "trap '' TERM\n" + JOB % "for i in $(seq 600); do sleep 0.2; done"


class Fault(Exception):
    pass


def check(right, *found):
    if not right:
        raise Fault(" ".join(map(str, found)))


def wait_for(condition, what):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        check(time.monotonic() < deadline, "waited in vain:", what)
        time.sleep(0.05)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def succeeds(*words, env=None):
    return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, env=env).returncode == 0


def below(pid):
    """The processes that descend from one, as (generation, process id)."""
    found = []
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            found.append((1, int(child)))
            found += [(generation + 1, other) for generation, other in below(child)]
    return found


def kill(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def recipes():
    """The runners and enders that the README gives, by queue."""
    commands = re.search(r"```sh\n(queuectl queue set big .*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)[1]
    program = f'"{sys.executable}" "{ROOT}/queuectl.py"'
    with tempfile.TemporaryDirectory() as folder:
        function = f'queuectl() {{ {program} --db "{folder}/queue.db" "$@"; }}'
        script = f"{function}\n{{ {commands} }} >&2\nqueuectl queue list --json"
        told = subprocess.run(["sh", "-euc", script], capture_output=True, check=True).stdout
    return {queue["name"]: (queue["runner"], queue["ender"]) for queue in json.loads(told)}


# Engines.


class Engine:
    """An engine that runs here. `down` stops what clients talk to, and `up` starts it again."""

    needs = ()
    forgets = 0  # seconds in which what it has taken is not on its disk yet
    restarts = False  # whether stopping its daemon ends the jobs

    def __init__(self, folder):
        self.folder = folder
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("QUEUECTL_", "SLURM_"))}
        self.daemons = {}

    def launch(self, *words):
        with open(self.folder / "daemons.log", "ab") as log:
            self.daemons[words[0]] = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                                      env=self.env)  # fmt: skip

    def end(self, name):
        self.daemons[name].terminate()
        self.daemons[name].wait()

    def works(self):
        """Whether it takes jobs."""

    def stop(self):
        for name in reversed(list(self.daemons)):
            self.end(name)


class Slurm(Engine):
    end_all = "scancel -u root"
    forgets = 8
    needs = "munged", "slurmctld", "slurmd", "srun", "scancel", "squeue", "scontrol"

    def start(self):
        self.runner, self.ender = recipes()["big"]
        key, munge, host = self.folder / "munge.key", self.folder / "munge", socket.gethostname().split(".")[0]
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self.launch("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={munge}.sock",
                    f"--pid-file={munge}.pid", f"--log-file={munge}.log", f"--seed-file={munge}.seed")  # fmt: skip
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        self.conf = self.folder / "slurm.conf"
        self.conf.write_text(
            f"ClusterName=trial\nSlurmctldHost={host}(127.0.0.1)\nSlurmUser=root\nSlurmdUser=root\n"
            f"AuthInfo=socket={munge}.sock\nSlurmctldPort={free_port()}\nSlurmdPort={free_port()}\n"
            f"StateSaveLocation={self.folder}/state\nSlurmdSpoolDir={self.folder}/spool\n"
            f"SlurmctldPidFile={self.folder}/slurmctld.pid\nSlurmdPidFile={self.folder}/slurmd.pid\n"
            "ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nMpiDefault=none\nMinJobAge=10\n"
            "SelectType=select/cons_res\nSelectTypeParameters=CR_CPU\nSchedulerParameters=sched_interval=1\n"
            "JobAcctGatherType=jobacct_gather/none\nAccountingStorageType=accounting_storage/none\n"
            "JobCompType=jobcomp/none\nSlurmdTimeout=15\nKillWait=5\nReturnToService=2\n"
            f"SlurmdParameters=config_overrides\nNodeName={host} NodeAddr=127.0.0.1 CPUs=256 RealMemory=1000\n"
            f"PartitionName=p Nodes={host} Default=YES MaxTime=INFINITE State=UP\n"
        )
        self.env["SLURM_CONF"], self.node = str(self.conf), f"nodename={host}"
        wait_for(Path(f"{munge}.sock").exists, "munged")
        self.up()
        self.launch("slurmd", "-D")

    def works(self):
        return succeeds("timeout", "5", "srun", "-Q", "true", env=self.env)

    def up(self):
        self.launch("slurmctld", "-D")

    def down(self):
        self.end("slurmctld")

    def update(self, *words):
        check(succeeds("scontrol", "update", self.node, *words, env=self.env), "scontrol", words)


class Ssh(Engine):
    needs = "sshd", "ssh", "ssh-keygen"

    def start(self):
        folder, port, sshd = self.folder, free_port(), shutil.which("sshd")
        for name in ("key", "host"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
        Path("/run/sshd").mkdir(exist_ok=True)
        (folder / "sshd_config").write_text(
            f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/key.pub\n"
            f"StrictModes no\nUsePAM no\nMaxStartups 300\nPidFile {folder}/sshd.pid\nSetEnv HOME={folder}\n"
        )
        (folder / "ssh_config").write_text(
            f"Host there\n  HostName 127.0.0.1\n  Port {port}\n  User root\n  IdentityFile {folder}/key\n"
            "  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
        )
        self.ssh = f"ssh -F {folder}/ssh_config there"
        self.runner, self.ender = (text.replace("ssh web1", self.ssh) for text in recipes()["web1"])
        # Process 1 there only starts sshd again, so that connections live on without the listener.
        self.launch(*INSIDE, "sh", "-c", f"while :; do [ -e {folder}/down ] || {sshd} -D -f {folder}/sshd_config; "
                                         "sleep 0.1; done")  # fmt: skip

    def works(self):
        return succeeds("sh", "-c", self.ssh + " true")

    def listener(self):
        return next(pid for generation, pid in below(self.daemons["unshare"].pid) if generation == 2)

    def up(self):
        (self.folder / "down").unlink()

    def down(self):
        (self.folder / "down").touch()
        os.kill(self.listener(), signal.SIGTERM)
        wait_for(lambda: not self.works(), "sshd to stop")

    def cut(self):
        """Cut all connections, on the side of the engine."""
        for generation, pid in below(self.listener()):
            if generation == 1:
                kill(pid)

    def stop(self):
        self.daemons["unshare"].kill()  # it ignores SIGTERM
        self.daemons["unshare"].wait()


class Docker(Engine):
    end_all = "docker kill $(docker ps -q)"
    forgets = 3  # a container that dockerd was just starting runs on, unknown to the next dockerd
    needs = "dockerd", "containerd", "docker", "flock"
    restarts = True

    def start(self):
        self.socket = f"unix://{self.folder}/docker.sock"
        self.env["DOCKER_HOST"] = self.socket
        self.up()
        wait_for(lambda: succeeds("docker", "version", env=self.env), "dockerd")
        tar = subprocess.Popen(["tar", "-C", self.image(), "-c", "."], stdout=subprocess.PIPE)
        subprocess.run(["docker", "import", "-", "trial"], stdin=tar.stdout, stdout=subprocess.DEVNULL,
                       env=self.env, check=True)  # fmt: skip
        words = f"docker run --network none -v {self.folder}:{self.folder}"
        runner, self.ender = recipes()["boxed"]
        self.runner = runner.replace("docker run", words).replace("python:3", "trial")

    def image(self):
        """A folder with a shell and what the jobs here need."""
        image = self.folder / "image"
        (image / "bin").mkdir(parents=True)
        (image / "tmp").mkdir()
        for name in ("sh", "cat", "echo", "env", "find", "flock", "head", "mkdir", "printf", "rmdir", "seq", "sleep",
                     "test", "touch", "tr"):  # fmt: skip
            program = os.path.realpath(shutil.which(name))
            shutil.copy(program, image / "bin" / name)
            told = subprocess.run(["ldd", program], stdout=subprocess.PIPE, text=True).stdout
            for library in re.findall(r"/\S+", told):
                (image / library[1:]).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(library, image / library[1:])
        return image

    def works(self):
        return succeeds("docker", "run", "--rm", "--network", "none", "trial", "sleep", "0", env=self.env)

    def up(self):
        # A containerd that nobody has reaped would be taken for a living one.
        with contextlib.suppress(FileNotFoundError):
            (self.folder / "exec" / "containerd" / "containerd.pid").unlink()
        self.launch("dockerd", "--storage-driver", "vfs", "--bridge=none", "--iptables=false", "-H", self.socket,
                    "--data-root", f"{self.folder}/data", "--exec-root", f"{self.folder}/exec",
                    "--pidfile", f"{self.folder}/docker.pid")  # fmt: skip

    def down(self):
        self.end("dockerd")

    def stop(self):
        succeeds("sh", "-c", "docker rm -f $(docker ps -aq)", env=self.env)
        super().stop()


ENGINES = {"slurm": Slurm, "ssh": Ssh, "docker": Docker}


# Scenarios.


class Trial:
    """A queue of its own, whose jobs go to an engine, and a folder that both sides see."""

    def __init__(self, engine, name):
        self.engine, self.folder, self.pools = engine, engine.folder / name, []
        self.folder.mkdir()
        self.env = {**engine.env, "HOME": str(self.folder), "QUEUECTL_DB": str(self.folder / "queue.db")}
        # As an installed program, which starts in a third of the time.
        program = self.folder / "queuectl"
        program.write_text(
            f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom queuectl import main\nsys.exit(main())\n"
        )
        self.program = [sys.executable, "-IS", "-X", f"pycache_prefix={engine.folder}", str(program)]
        self("queue", "set", "there", "--runner", engine.runner, "--ender", engine.ender)
        self("config", "set", "kill_grace_seconds", "1")

    def __call__(self, *words, stdin="", code=0):
        done = subprocess.run([*self.program, *words], input=stdin, capture_output=True, text=True, env=self.env,
                              cwd=self.folder, timeout=PATIENCE)  # fmt: skip
        check(code is None or done.returncode == code, words, "exited with", done.returncode, done.stderr)
        return done.stdout

    def add(self, count, command, **fields):
        ids = [f"j{number}" for number in range(count)]
        job = {"command": command, "queue": "there", "backoff_base": 0.1, **fields}
        self("enqueue", "--file", "-", stdin="".join(json.dumps({**job, "id": name}) + "\n" for name in ids))
        return ids

    def start(self, count, *script):
        words = [*INSIDE, *(script or self.program), *(() if script else ("worker", "start", "--count", str(count)))]
        with open(self.folder / "pool.log", "ab") as log:
            pool = subprocess.Popen(words, env=self.env, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log,
                                    stderr=log)  # fmt: skip
        self.pools.append(pool)
        return pool

    def stop(self, *options):
        began = time.monotonic()
        self("worker", "stop", *options, code=None)
        self.pools[-1].wait(PATIENCE)
        return time.monotonic() - began

    def kill(self):
        """kill -9 of pool, workers and clients together."""
        for _, pid in below(self.pools[-1].pid)[:1]:
            kill(pid)
        self.pools[-1].wait()

    def clients(self):
        """The clients of the pool's workers."""
        return [pid for generation, pid in below(self.pools[-1].pid) if generation == 3]

    def log(self, word):
        """How often the jobs have said that, by job."""
        log = self.folder / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        return collections.Counter(line.split()[1] for line in lines if line.split()[0] == word)

    def start_words(self):
        """How many clients have shown the start word."""
        files = [path for path in (self.folder / "queue.db.d").iterdir() if path.is_file()]
        return sum(path.read_bytes().count(b" start>") for path in files)

    def wait_begun(self, ids, times=1):
        wait_for(lambda: all(self.log("begin")[name] >= times for name in ids), f"{ids} to begin")

    def wait_ended(self, ids):
        self("wait", "--timeout", str(PATIENCE), *ids, code=None)

    def lives(self, name):
        """Whether a process of this job lives, wherever it is."""
        return not succeeds("flock", "-n", self.folder / f"lock.{name}", "true")

    def show(self, name):
        return json.loads(self("show", name, "--json"))

    def outcome(self, name):
        job = self.show(name)
        return job["state"], job["attempts"], [run["state"] for run in job["runs"]]

    def check(self, ids, *wanted, counted=True):
        """Whether all are completed, never two runs of one at once, and each run is in the record that began."""
        begun, ended = self.log("begin"), self.log("end")
        for name in ids:
            job = self.show(name)
            runs = [run["state"] for run in job["runs"]]
            found = job["state"], job["attempts"], runs
            check(job["state"] == "completed" and runs.count("completed") == 1, name, found, job["last_error"])
            check(not wanted or found == wanted, name, found, "instead of", wanted, job["last_error"])
            check(ended[name] >= 1 and (len(runs) >= begun[name] or not counted),
                  name, found, "began", begun[name], "ended", ended[name], "times")  # fmt: skip
        check(not self.log("OVERLAP"), "two runs at once:", dict(self.log("OVERLAP")))

    def close(self):
        for pool in self.pools:
            kill(pool.pid)
            pool.wait()


ONCE = "completed", 1, ["completed"]
TWICE = "completed", 2, ["lost", "completed"]
# A second run ends at once. It is decided before the job notes that it has begun, for then the file is made.
SLEEP = "test -e second && again=yes\n" + JOB % 'test "$again" || sleep 300'


def running(t, count=4, job=SLEEP, workers=0, **fields):
    """Start a pool and these jobs, and wait until they have begun."""
    ids = t.add(count, job, **fields)
    t.start(workers or count)
    t.wait_begun(ids)
    wait_for(lambda: t.start_words() >= count, "the start words")
    (t.folder / "second").touch()
    return ids


def doctor(t):
    t.start(0, *t.program, "doctor", "--queue", "there").wait()
    told = (t.folder / "pool.log").read_text()
    check(told.count(": yes\n") == 4, told)


def rate(t):
    ids = t.add(100, JOB % ":", max_retries=1)
    began = time.monotonic()
    t.start(16)
    t.wait_ended(ids)
    seconds = time.monotonic() - began
    t.check(ids, *ONCE)
    check(set(t.log("begin").values()) == {1}, "some began twice")
    return f"{100 / seconds:.1f} jobs/s"


def without_noise(stderr):
    """Stderr without what srun itself says when a job fails."""
    return re.sub(r"srun: error: .*\n", "", stderr)


def exit_codes(t):
    codes = 0, 3, 137, 255
    ids = [t("enqueue", "--json", "--queue", "there", "--max-retries", "1", f"echo out; echo err >&2; exit {code}")
           for code in codes]  # fmt: skip
    ids = [json.loads(text)["id"] for text in ids]
    t.start(4)
    t.wait_ended(ids)
    for name, code in zip(ids, codes):
        job = t.show(name)
        (run,) = job["runs"]
        found = run["exit_code"], run["stdout"], without_noise(run["stderr"]), job["attempts"]
        check(found == (code, "out\n", "err\n", 1), code, found)


def output(t):
    t("config", "set", "max_output_bytes", "10000000")
    flood = "head -c 9000000 /dev/zero | tr '\\0' x"
    ids = t.add(1, f"{flood}; ({flood}) >&2; echo last >&2; exit 3", max_retries=1)
    t.start(1)
    t.wait_ended(ids)
    run = t.show("j0")["runs"][0]
    run["stderr"] = without_noise(run["stderr"])
    sizes = len(run["stdout"]), len(run["stderr"])
    check(run["exit_code"] == 3 and sizes == (9000000, 9000005), run["exit_code"], sizes, run["stderr"][-200:])


def output_cut(t):
    flood = "head -c 9000000 /dev/zero | tr '\\0' x"
    ids = t.add(1, f"{flood}; ({flood}) >&2; echo last >&2; exit 3", max_retries=1)
    t("config", "set", "max_output_bytes", "1024")
    t.start(1)
    t.wait_ended(ids)
    run = t.show("j0")["runs"][0]
    stderr = without_noise(run["stderr"])
    check(run["exit_code"] == 3 and len(stderr) < 2000 and stderr.endswith("xlast\n"), run["exit_code"], stderr[-200:])


def time_out(t):
    running(t, 1, STUBBORN, timeout=2, max_retries=1)
    t.wait_ended(["j0"])
    check(t.outcome("j0") == ("dead", 1, ["failed"]) and "timed out" in t.show("j0")["last_error"], t.show("j0"))
    check(not t.lives("j0"), "it lives on")


def cancel(t):
    running(t, 1, STUBBORN)
    t("cancel", "j0", code=None)
    t.wait_ended(["j0"])
    check(t.outcome("j0")[0] == "cancelled" and not t.lives("j0"), t.outcome("j0"), t.lives("j0"))


def stop_now(t):
    ids = running(t, 4, STUBBORN)
    seconds = t.stop("--now")
    for name in ids:
        check(t.outcome(name) == ("pending", 0, ["stopped"]) and not t.lives(name), t.outcome(name), t.lives(name))
    return f"{seconds:.1f} s"


def stop_now_down(t):
    ids = running(t)
    t.engine.down()
    try:
        seconds = t.stop("--now")
        check(t.outcome("j0")[0] == "processing", t.outcome("j0"))
    finally:
        t.engine.up()
    t.start(4)
    t.wait_ended(ids)
    t.check(ids)
    check(seconds < 20, f"it took {seconds:.1f} s")
    return f"{seconds:.1f} s"


def all_killed(t):
    ids = running(t, 6)
    t.kill()
    t.start(6)
    t.wait_ended(ids)
    t.check(ids, *TWICE)


def worker_killed(t):
    ids = running(t)
    for generation, pid in below(t.pools[-1].pid):
        if generation == 2:
            kill(pid)
    t.wait_ended(ids)
    t.check(ids, *TWICE)


def client_killed(t):
    ids = running(t)
    for pid in t.clients():
        kill(pid)
    t.wait_ended(ids)
    t.check(ids, *TWICE)


def down_at_start(t):
    t.engine.down()
    try:
        ids = t.add(6, JOB % ":", max_retries=1)
        t.start(3)
        wait_for(lambda: json.loads(t("status", "--json"))["troubles"], "word of the engine")
        time.sleep(5)
        found = json.loads(t("list", "--json"))
        check({job["state"] for job in found} <= {"pending", "processing"}, found)
        here = json.loads(t("enqueue", "--json", "true"))["id"]
        began = time.monotonic()
        t.wait_ended([here])
        held = time.monotonic() - began
    finally:
        t.engine.up()
    began = time.monotonic()
    t.wait_ended(ids)
    t.check(ids, *ONCE)
    return f"a local job waited {held:.0f} s; all done {time.monotonic() - began:.0f} s after the engine is up"


def down_in_the_middle(t):
    ids = t.add(12, JOB % "sleep 4", max_retries=5 if t.engine.restarts else 1)
    t.start(4)
    t.wait_begun(ids[:4])
    t.engine.down()
    time.sleep(6)
    t.engine.up()
    t.wait_ended(ids)
    t.check(ids, *(() if t.engine.restarts else ONCE))


def down_during_recovery(t):
    ids = running(t)
    t.kill()
    t.engine.down()
    t.start(4)
    wait_for(lambda: "ender says" in t("status", "--json"), "word of the ender")
    check({t.outcome(name)[0] for name in ids} == {"processing"}, [t.outcome(name) for name in ids])
    t.engine.up()
    t.wait_ended(ids)
    t.check(ids, *TWICE)


def killed_and_down_at_once(t):
    """The engine's daemon dies soon after it has taken jobs, and so does the pool."""
    ids = t.add(8, SLEEP)
    t.start(8)
    wait_for(lambda: t.log("begin"), "the first to begin")
    time.sleep(t.engine.forgets)
    t.kill()
    for daemon in ("slurmctld", "dockerd"):
        if daemon in t.engine.daemons:
            t.engine.daemons[daemon].kill()
    t.engine.down()
    (t.folder / "second").touch()
    t.start(8)
    t.engine.up()
    t.wait_ended(ids)
    t.check(ids, counted=False)  # a start word may have died with its client


def storm(t):
    ids = t.add(40, JOB % "sleep 0.5", max_retries=1000)
    pool = " ".join([*t.program, "worker start --count 6"])
    t.start(0, "bash", "-c", f"while :; do {pool}; [ -e halt ] && exit; done")
    kills, until = 0, time.monotonic() + 20
    while time.monotonic() < until:
        beasts = [pid for generation, pid in below(t.pools[-1].pid) if generation > 1]
        if beasts:
            kill(random.choice(beasts))
            kills += 1
        time.sleep(0.2)
    t.wait_ended(ids)
    (t.folder / "halt").touch()
    t.stop()
    t.check(ids, counted=False)
    return f"{kills} kills, {sum(t.log('begin').values())} starts of 40 jobs"


def ender_times(t):
    def seconds():
        began = time.monotonic()
        subprocess.run(["sh", "-c", t.engine.ender], capture_output=True,
                       env={**t.env, "QUEUECTL_RUN": "none-such", "QUEUECTL_SIGNAL": "TERM"})  # fmt: skip
        return time.monotonic() - began

    up = seconds()
    t.engine.down()
    down = seconds()
    t.engine.up()
    return f"{1000 * up:.0f} ms, {down:.1f} s while it is down"


def memory(t):
    count = 200
    running(t, count, JOB % "test -e second || sleep 300; until test -e over; do sleep 1; done")
    sizes = collections.Counter()
    for generation, pid in below(t.pools[-1].pid):
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        sizes["queuectl" if generation < 3 else "clients"] += int(re.search(r"Pss: +(\d+)", text)[1])
    (t.folder / "over").touch()
    t.stop("--now")
    return ", ".join(f"{name}: {size / 1024 / count:.1f} MB each" for name, size in sizes.items())


def connection_cut(t):
    ids = running(t)
    t.engine.cut()
    t.wait_ended(ids)
    t.check(ids, *TWICE)


def host_restarted(t):
    ids = running(t)
    host = t.engine.daemons["unshare"]
    host.kill()
    host.wait()
    time.sleep(3)
    t.engine.launch(*host.args)
    t.wait_ended(ids)
    t.check(ids, *TWICE)


def node_drained(t):
    ids = t.add(3, JOB % "sleep 3", max_retries=1)
    t.start(2)
    t.wait_begun(ids[:2])
    t.engine.update("state=drain", "reason=x")
    time.sleep(6)
    found = [t.outcome(name)[0] for name in ids]
    t.engine.update("state=resume")
    t.wait_ended(ids)
    check(found == ["completed", "completed", "processing"], found)
    t.check(ids, *ONCE)


def node_lost(t):
    """The node loses power until Slurm notices. Of one that is back sooner, it says for ever that the job runs."""
    ids = running(t)
    slurmd = t.engine.daemons["slurmd"]
    slurmd.kill()
    slurmd.wait()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            step = (path / "cmdline").read_bytes().startswith(b"slurmstepd")
            if step and os.fsencode(t.engine.conf) in (path / "environ").read_bytes():
                for pid in [int(path.name), *(pid for _, pid in below(path.name))]:
                    kill(pid)
    wait_for(lambda: b"down" in subprocess.check_output(["sinfo", "-h"], env=t.env), "Slurm to notice")
    t.engine.launch(*slurmd.args)
    t.wait_ended(ids)
    t.check(ids, *TWICE)


def ended_by_a_person(t):
    ids = running(t)
    check(succeeds("sh", "-c", t.engine.end_all, env=t.env), t.engine.end_all)
    t.wait_ended(ids)
    t.check(ids)  # the first run says 143 if it hears SIGTERM; else it is lost


EVERYWHERE = [
    doctor, rate, exit_codes, output, output_cut, time_out, cancel, stop_now, all_killed, worker_killed, client_killed,
    down_at_start, down_in_the_middle, down_during_recovery, killed_and_down_at_once, stop_now_down, storm, ender_times,
]  # fmt: skip
SCENARIOS = {
    "slurm": [*EVERYWHERE, node_drained, node_lost, ended_by_a_person],
    "ssh": [*EVERYWHERE, connection_cut, host_restarted, memory],
    "docker": [*EVERYWHERE, ended_by_a_person],
}


def run_scenario(engine, kind, scenario):
    """Run one scenario; return whether it went well."""
    name, began = scenario.__name__, time.monotonic()
    t = Trial(engine, name)
    try:
        wait_for(engine.works, "the engine")
        told, right = scenario(t) or "", True
    except (Fault, subprocess.TimeoutExpired) as fault:
        told, right = str(fault)[:1500], False
    finally:
        t.close()
    print(f"{kind} {name.replace('_', ' ')}: {'ok' if right else 'FAULT'}, {time.monotonic() - began:.1f} s"
          f"{', ' if told else ''}{told}", flush=True)  # fmt: skip
    return right


def try_engine(kind, words):
    """Start an engine and run its scenarios; return how many went wrong."""
    missing = [name for name in (*ENGINES[kind].needs, "unshare", "flock") if not shutil.which(name)]
    if missing or os.geteuid():
        print(f"skipped: {kind} ({'it needs root' if os.geteuid() else 'not installed: ' + ', '.join(missing)})")
        return 0
    folder = Path(tempfile.mkdtemp(prefix=f"queuectl-{kind}-"))
    engine = ENGINES[kind](folder)
    try:
        engine.start()
        chosen = [scenario for scenario in SCENARIOS[kind] if words in scenario.__name__.replace("_", " ")]
        wrong = [not run_scenario(engine, kind, scenario) for scenario in chosen]
    finally:
        engine.stop()
    if not any(wrong):
        shutil.rmtree(folder, ignore_errors=True)
    return sum(wrong)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("engines", nargs="*", default=[], help=", ".join(ENGINES))
    parser.add_argument("--only", metavar="WORDS", default="", help="scenarios whose names have these words")
    args = parser.parse_args()
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the engines are stopped then, too
    wrong = sum([try_engine(kind, args.only) for kind in args.engines or ENGINES])
    print(f"engines: {f'{wrong} FAULTS' if wrong else 'ok'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
