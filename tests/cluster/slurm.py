"""A real Slurm on this one machine, thrown away after the tests: no systemd, no accounting.

One controller and three nodes whose sizes are pretended: `cn1` (partition cpu), `gpu1` and `gpu2`
(partitions gpu and urgent, which preempts gpu) with one fake GPU each. Debian's packages slurmctld,
slurmd, slurm-client and munge, and root, are all it takes.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

SYSTEM = Path("/etc/slurm")
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "squeue", "scancel", "scontrol")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
SYSTEMD = Path("/run/systemd/system")
NODES = ("cn1", "gpu1", "gpu2")

CONFIG = """\
ClusterName=throwaway
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/sock
CredType=cred/munge
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=30
KillWait=10
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
NodeName=DEFAULT CPUs=16 Sockets=1 CoresPerSocket=16 ThreadsPerCore=1 RealMemory=512000
NodeName=cn1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[cn1]}
NodeName=gpu1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[gpu1]} Gres=gpu:fake:1
NodeName=gpu2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[gpu2]} Gres=gpu:fake:1
PartitionName=DEFAULT DefaultTime=10 DefMemPerCPU=200 State=UP
PartitionName=cpu Nodes=cn1 Default=YES PriorityTier=10
PartitionName=gpu Nodes=gpu[1-2] PriorityTier=10
PartitionName=urgent Nodes=gpu[1-2] PriorityTier=50
"""


def why_not() -> str | None:
    """Return why there can be no cluster here, None where there can; install what it needs.

    Only where no systemd runs, as in a container: it would start what is installed.
    """
    if os.geteuid() != 0:
        return "the daemons of a Slurm cluster are started by root"
    missing = [name for name in PROGRAMS if not _program(name)]
    if not missing:
        return None
    reason = f"{', '.join(missing)}: not installed"
    if not shutil.which("apt-get") or SYSTEMD.is_dir():
        return f"{reason} (Debian, Ubuntu: apt-get install {' '.join(PACKAGES)})"
    for words in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(
            ["apt-get", "--quiet", *words],
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
            return f"{reason}; apt-get {words[0]}: {' '.join(last)}"
    return None


def taken() -> str | None:
    """Return why /etc/slurm is not ours to change, None where it is."""
    config = SYSTEM / "slurm.conf"
    if config.is_file() and not config.is_symlink():
        return f"{config} is there: this machine has a Slurm of its own"
    if config.is_symlink() and (pid := _pid(config.resolve().parent / "slurmctld.pid")):
        return f"{config} belongs to another throw-away cluster, process {pid}"
    return None


def _program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin:/sbin")


def _pid(file: Path) -> int | None:
    """Return the process of a pid file, None where it does not run."""
    try:
        pid = int(file.read_text())
        return None if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE else pid
    except (OSError, ValueError, psutil.NoSuchProcess):
        return None


def wait(condition: Callable[[], object], seconds: float, what: str, pause: float = 0.1) -> None:
    """Return as soon as a condition holds.

    Raises
    ------
    TimeoutError
        Naming what did not happen.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"within {seconds:g} s: {what}")
        time.sleep(pause)


@dataclass
class Cluster:
    """The cluster whose daemons keep all they write in one folder.

    Attributes
    ----------
    folder
        Short: a Unix socket lies in it.
    """

    folder: Path
    ports: dict[str, int] = field(default_factory=dict)

    def up(self) -> None:
        """Start the daemons and wait for the nodes."""
        for name in ("munge", "log", "state", "spool", "gpu"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        (self.folder / "munge").chmod(0o755)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        at = self.folder / "munge"
        self._daemon(
            "munged",
            f"--key-file={key}",
            f"--socket={at}/sock",
            f"--pid-file={self.folder}/munged.pid",
            f"--log-file={self.folder}/log/munged.log",
            f"--seed-file={at}/seed",
        )
        names = ("slurmctld", *NODES)
        self.ports = dict(zip(names, _free_ports(len(names)), strict=True))
        (self.folder / "slurm.conf").write_text(
            CONFIG.format(
                host=socket.gethostname().partition(".")[0],
                folder=self.folder,
                port=self.ports["slurmctld"],
                ports=self.ports,
            )
        )
        gpus = [f"NodeName={name} Name=gpu Type=fake File={self._gpu(name)}" for name in NODES[1:]]
        (self.folder / "gres.conf").write_text("\n".join(gpus) + "\n")
        # Programs inside jobs look here: the executor hides SLURM_CONF from them.
        SYSTEM.mkdir(exist_ok=True)
        for name in ("slurm.conf", "gres.conf"):
            (SYSTEM / name).unlink(missing_ok=True)
            (SYSTEM / name).symlink_to(self.folder / name)
        self._daemon("slurmctld", "-i")
        wait(lambda: self.run("scontrol", "ping", status=None).find("UP") > 0, 30, "slurmctld up")
        for name in NODES:
            self.start(name)

    def down(self) -> None:
        """End all jobs and daemons by their process ids."""
        self.run("scancel", "--user=root", status=None)
        for name in ("gpu2", "gpu1", "cn1"):
            self.crash(name)
        for name in ("slurmctld", "munged"):
            if pid := _pid(self.folder / f"{name}.pid"):
                _end(pid, signal.SIGTERM)
        for name in ("slurm.conf", "gres.conf"):
            if (SYSTEM / name).is_symlink():
                (SYSTEM / name).unlink()

    def start(self, node: str) -> None:
        """Start a node's daemon and wait until the node takes jobs."""
        (self.folder / "spool" / node).mkdir(exist_ok=True)
        self._daemon("slurmd", "-N", node)

        def idle() -> bool:
            state = self.run("sinfo", "--noheader", f"--nodes={node}", "--format=%T")
            return bool({"idle", "mixed", "allocated"} & set(state.split()))

        wait(idle, 60, f"node {node} idle")

    def crash(self, node: str) -> None:
        """Kill a node's daemon and all processes of its jobs, as a power failure does."""
        pid = _pid(self.folder / f"slurmd.{node}.pid")
        # First the daemon: it would tell the controller how its jobs ended.
        victims = [psutil.Process(pid)] if pid else []
        victims += list(self._stepds(node))
        for process in victims:
            below = process.children(recursive=True) if process.is_running() else []
            for one in (process, *below):
                _end(one.pid, signal.SIGKILL)

    def _stepds(self, node: str) -> Iterator[psutil.Process]:
        """Yield the daemons of the node's job steps; they are children of no one."""
        for process in psutil.process_iter(["name"]):
            if process.info["name"] != "slurmstepd":
                continue
            try:
                held = {file.path for file in process.open_files()}
                listens = {c.laddr for c in process.net_connections("unix")}
            except psutil.NoSuchProcess:
                continue
            spool = str(self.folder / "spool" / node)
            if any(str(path).startswith(spool) for path in held | listens):
                yield process

    def run(self, *command: str, status: int | None = 0) -> str:
        """Run a client of the cluster; return what it prints."""
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if status is not None and done.returncode != status:
            raise AssertionError(f"{command}: exit status {done.returncode}\n{done.stderr}")
        return done.stdout

    def jobs(self, folder: Path, rule: str | None = None) -> dict[str, str]:
        """Return the state of all jobs that a snakemake in a folder submitted, by job id.

        Parameters
        ----------
        rule
            Only this rule's.
        """
        found = {}
        listed = self.run(
            "squeue", "--states=all", "--noheader", "--Format=JobID:|,State:|,WorkDir:|,Comment:"
        )
        for line in listed.splitlines():
            number, state, at, comment = (word.strip() for word in line.split("|"))
            named = re.match(r"rule_([a-z]+)(_wildcards|$)", comment)
            if at == str(folder) and (rule is None or (named and named[1] == rule)):
                found[number] = state
        return found

    def node_of(self, job: str) -> str:
        """Return the node that a job runs on."""
        return self.run("squeue", "--noheader", f"--jobs={job}", "--format=%N").strip()

    def _daemon(self, name: str, *options: str) -> None:
        environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        command = [_program(name), *options]
        # A file: what a daemon inherits of a pipe keeps its reader waiting.
        with open(self.folder / "log" / "start.log", "ab") as log:
            subprocess.run(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                check=True,
                timeout=60,
            )

    def _gpu(self, node: str) -> Path:
        """Return what stands for a node's GPU; Slurm wants a device file."""
        path = self.folder / "gpu" / node
        try:
            os.mknod(path, 0o666 | 0o020000, os.makedev(1, 3))
        except PermissionError:
            return {"gpu1": Path("/dev/zero"), "gpu2": Path("/dev/full")}[node]
        return path


@contextlib.contextmanager
def running() -> Iterator[Cluster]:
    """Bring a cluster up; it is taken down at the end, also that of a process that is killed."""
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="slurm-")))
    command = [sys.executable, __file__, str(cluster.folder)]
    # Its stdin ends with this process, however that ends.
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        cluster.up()
        yield cluster
    finally:
        guard.communicate()


def guard(folder: Path) -> None:
    """Wait until stdin ends, then take the cluster of a folder down, and remove the folder."""
    sys.stdin.read()
    Cluster(folder).down()
    shutil.rmtree(folder)


def gone(process: psutil.Process) -> bool:
    """Tell whether a process has ended; what is left of it may wait for its parent."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _end(pid: int, number: int) -> None:
    """Send a signal, and wait until the process is gone."""
    try:
        process = psutil.Process(pid)
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return
    wait(lambda: gone(process), 30, f"end of process {pid}", 0.02)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


if __name__ == "__main__":
    guard(Path(sys.argv[1]))
