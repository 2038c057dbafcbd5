"""A real Slurm of several nodes on this host, for tests. Linux, as root.

Each node is a network namespace with an address of its own, and a UTS and mount namespace with a
host name of its own, in which a slurmd runs. What is not real: GPUs, which are null devices, and
accounting, which is off. Ends only what it started.

Its time limits are long: a machine that does other work is slow, and no node is lost by that.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare")
GPUS = 8
PATIENCE = 400  # seconds, of a wait for what takes seconds on a machine that does nothing else
FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY"}
CONF = """\
ClusterName=nemotrd
SlurmctldHost={host}({net}.254)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
PlugStackConfig={root}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
GresTypes=gpu
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=30
MessageTimeout=30
BatchStartTimeout=300
KillWait=60
MinJobAge=3600
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=DEFAULT Sockets=2 CoresPerSocket=32 RealMemory=1000000 Gres=gpu:{gpus} State=UNKNOWN
{nodes}
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=300
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    return [program for program in PROGRAMS if shutil.which(program) is None]


def eventually(what: str, holds: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """Wait until it holds.

    Raises:
        AssertionError: it did not within `seconds`.
    """
    limit = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < limit, f"not within {seconds:g} s: {what}"
        time.sleep(0.1)


class SlurmCluster:
    """`with SlurmCluster(directory, nodes=4) as cluster: cluster.sbatch(...)`.

    `directory` is empty. Nodes are node1, node2, ...; all see the files of this host.
    """

    def __init__(self, directory: Path, nodes: int, spank_plugin: Path | None = None) -> None:
        self.root = directory
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        taken = _ip("addr")
        self.subnet = next(
            n for n in range(7, 250) if f"10.213.{n}." not in taken and f" trd{n}" not in taken
        )
        self._net = f"10.213.{self.subnet}"
        self._tag = f"trd{self.subnet}"  # of bridge and namespaces: at most 15 letters
        self._plugin = spank_plugin
        self._pids: list[int] = []
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM_", "SBATCH_"))
        } | {"SLURM_CONF": f"{directory}/slurm.conf"}

    def __enter__(self) -> SlurmCluster:
        try:
            self._write_files()
            self._start_network()
            self._start_daemons()
            eventually("all nodes idle", self._all_idle)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel jobs, end the daemons, and remove namespaces and bridge."""
        with contextlib.suppress(subprocess.SubprocessError, AssertionError):
            self.run("scancel", "--user=root")
            eventually("no job left", lambda: not self.run("squeue", "--noheader"))
        processes = [psutil.Process(pid) for pid in self._daemons()]
        for process in processes:
            process.terminate()
        _, alive = psutil.wait_procs(processes, 10)
        for process in alive:
            process.kill()
        for node in self.nodes:
            for pid in self.processes(node):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", self._namespace(node)], capture_output=True)
        subprocess.run(["ip", "link", "del", f"{self._tag}br"], capture_output=True)

    def run(self, *command: str, **environment: str) -> str:
        """What a command on the login node prints.

        Raises:
            AssertionError: it failed; with what it wrote.
        """
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            cwd=self.root,
            env=self.environment | environment,
        )
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout

    def sbatch(
        self, options: Sequence[str], script: Path, *arguments: str, **environment: str
    ) -> int:
        """Queue a script; the job's number."""
        return int(
            self.run("sbatch", "--parsable", *options, str(script), *arguments, **environment)
        )

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` says, by name."""
        text = self.run("scontrol", "--oneliner", "show", "job", str(number))
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def wait(self, number: int, seconds: float = PATIENCE) -> dict[str, str]:
        """Wait until the job is over; what is known of it then.

        Raises:
            AssertionError: it is not over after `seconds`; with the end of its log.
        """
        limit = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in FINAL:
            if time.monotonic() > limit:
                raise AssertionError(f"{job['JobState']} after {seconds:g} s: {self.log(number)}")
            time.sleep(0.2)
        return job

    def log(self, number: int) -> str:
        """What the job wrote, with all its attempts."""
        log = Path(self.job(number)["StdOut"])
        return log.read_text() if log.exists() else ""

    def processes(self, node: str) -> list[int]:
        """Pids of all processes of a node but its slurmd."""
        found = subprocess.run(
            ["ip", "netns", "pids", self._namespace(node)], capture_output=True, text=True
        ).stdout.split()
        return [int(pid) for pid in found if int(pid) not in self._daemons()]

    def of_jobs(self) -> list[str]:
        """Command lines of everything that jobs have left on the nodes."""
        alive = []
        for node in self.nodes:
            for pid in self.processes(node):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process = psutil.Process(pid)
                    if process.status() != psutil.STATUS_ZOMBIE:
                        alive.append(f"{node}: {' '.join(process.cmdline())[:200]}")
        return alive

    def on(self, node: str, *command: str) -> subprocess.Popen[str]:
        """Start a command on a node, outside of any job."""
        return subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{self._namespace(node)}", *command],
            stdout=subprocess.PIPE,
            text=True,
        )

    def mount(self, node: str, source: Path, target: Path) -> None:
        """Let jobs on a node see `source` at `target`."""
        self._in_mounts_of(node, "mount", "--bind", str(source), str(target))

    def unmount(self, node: str, target: Path) -> None:
        self._in_mounts_of(node, "umount", str(target))

    def _in_mounts_of(self, node: str, *command: str) -> None:
        pid = (self.root / f"slurmd.{node}.pid").read_text().strip()
        self.run("nsenter", f"--mount=/proc/{pid}/ns/mnt", *command)

    def set_link(self, node: str, state: str) -> None:
        """`down` cuts a node off from all others, `up` joins it again."""
        _ip("link", "set", self._veth(node), state)

    def _namespace(self, node: str) -> str:
        return f"{self._tag}-{node}"

    def _veth(self, node: str) -> str:
        return f"{self._tag}v{node.removeprefix('node')}"

    def _write_files(self) -> None:
        for directory in ("state", "spool", "log", "dev", "munge"):
            (self.root / directory).mkdir(parents=True)
        for directory in (self.root, self.root / "munge"):
            directory.chmod(0o755)
        key = self.root / "munge" / "key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        for number in range(GPUS):
            os.mknod(self.root / "dev" / f"nvidia{number}", 0o020666, os.makedev(1, 3))
        hosts = [f"{self._net}.{n} {node}" for n, node in enumerate(self.nodes, 1)]
        host = socket.gethostname().split(".")[0]
        (self.root / "hosts").write_text(
            "\n".join(["127.0.0.1 localhost", f"{self._net}.254 {host}", *hosts, ""])
        )
        nodes = "\n".join(
            f"NodeName={node} NodeAddr={self._net}.{n}" for n, node in enumerate(self.nodes, 1)
        )
        (self.root / "slurm.conf").write_text(
            CONF.format(
                host=host,
                port=16000 + self.subnet,
                net=self._net,
                root=self.root,
                gpus=GPUS,
                nodes=nodes,
            )
        )
        devices = f"File={self.root}/dev/nvidia[0-{GPUS - 1}]"
        (self.root / "gres.conf").write_text(
            f"NodeName=node[1-{len(self.nodes)}] Name=gpu {devices}\n"
        )
        plugin = f"required {self._plugin}\n" if self._plugin else ""
        (self.root / "plugstack.conf").write_text(plugin)

    def _start_network(self) -> None:
        bridge = f"{self._tag}br"
        _ip("link", "add", bridge, "type", "bridge")
        _ip("addr", "add", f"{self._net}.254/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for number, node in enumerate(self.nodes, 1):
            inside = ["-n", self._namespace(node)]
            _ip("netns", "add", self._namespace(node))
            peer = ["peer", "name", "eth0", "netns", self._namespace(node)]
            _ip("link", "add", self._veth(node), "type", "veth", *peer)
            _ip("link", "set", self._veth(node), "master", bridge, "up")
            _ip(*inside, "link", "set", "lo", "up")
            _ip(*inside, "addr", "add", f"{self._net}.{number}/24", "dev", "eth0")
            _ip(*inside, "link", "set", "eth0", "up")

    def _start_daemons(self) -> None:
        munge = self.root / "munge"
        self.run(
            *("munged", "--force", "--num-threads=2", f"--key-file={munge}/key"),
            *(f"--socket={munge}/socket", f"--pid-file={munge}/munged.pid"),
            *(f"--log-file={self.root}/log/munged.log", f"--seed-file={munge}/seed"),
        )
        self.run("slurmctld", "-c")
        for node in self.nodes:
            (self.root / "spool" / node).mkdir()
            # `ip netns exec` would mount a /sys without cgroups, and slurmd does not start then.
            self.run(
                *("nsenter", f"--net=/run/netns/{self._namespace(node)}"),
                *("unshare", "--uts", "--mount", "sh", "-c"),
                f"hostname {node} && mount --bind {self.root}/hosts /etc/hosts && exec slurmd",
            )

    def _daemons(self) -> list[int]:
        files = [*self.root.glob("*.pid"), *self.root.glob("munge/*.pid")]
        pids = [int(file.read_text()) for file in files if file.read_text().strip()]
        return [pid for pid in pids if psutil.pid_exists(pid)]

    def _all_idle(self) -> bool:
        states = self.run("sinfo", "--noheader", "--Node", "--partition=batch", "--format=%t")
        return states.split() == ["idle"] * len(self.nodes)


def _ip(*arguments: str) -> str:
    return subprocess.run(
        ["ip", *arguments], check=True, capture_output=True, text=True, timeout=PATIENCE
    ).stdout
