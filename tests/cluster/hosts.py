"""Several "hosts" on one machine: network namespaces with addresses of their own, and training over them.

    python -m tests.cluster.hosts [--hosts 3]      (as root, from the project's root)

Prints a line for each way of starting a run and whether it gave the curve of as many processes on one host. Nothing
outside the namespaces is reached or changed: the switch that joins them lies in a namespace too. They share the disk.
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
INTERFACE = "eth0"
CORES = os.cpu_count() or 1
THREADS = os.environ.get("OMP_NUM_THREADS", "1")
PORT = "29500"
TIME_LIMIT = 1800
FLAGS = [
    *("--max_steps", "4", "--num_generated_pairs", "96", "--max_eval_pairs", "16", "--num_eval_problems", "0"),
    *("--per_device_train_batch_size", "2", "--tracking_uri", "none"),
]
MEASURED = ("time", "seconds", "per_second", "memory", "wait", "utilisation")


@dataclass(frozen=True)
class Host:
    """A namespace and its address."""

    name: str
    address: str

    def start(self, command: Sequence[str], *, cores: int = 1, **environment: str) -> subprocess.Popen:
        """A command on this host, in a process group of its own, its output captured. A host has one core, unless told
        otherwise: a process that is alone on a host takes all cores of it, and sums over more threads round
        otherwise than those of processes that share the cores of one."""
        first = int(self.address.rpartition(".")[2])
        mine = ",".join(str((first + n) % CORES) for n in range(min(cores, CORES)))
        clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
        own = {"GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": THREADS, "PATH": f"{BIN}:{os.environ['PATH']}"}
        return subprocess.Popen(
            ["taskset", "-c", mine, "ip", "netns", "exec", self.name, *command],
            env=clean | own | environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def ip(*words: str) -> None:
    """``ip WORD...``; CalledProcessError with what it said."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def why_no_hosts() -> str | None:
    """What stands against namespaces here; None if nothing does."""
    if os.geteuid() or not shutil.which("ip"):
        return "needs root and iproute2"
    name = f"diffdpo-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode == 0:
        ip("netns", "delete", name)
    return made.stderr.strip() or None


@contextlib.contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """Namespaces joined by a bridge, which lies in one more. They are gone at the end."""
    switch = f"diffdpo-switch-{os.getpid()}"
    made = [Host(f"diffdpo-host{n}-{os.getpid()}", f"10.77.0.{n}") for n in range(1, count + 1)]
    names = [switch, *(host.name for host in made)]
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", switch, "link", "set", "bridge", "up")
        for n, host in enumerate(made, 1):
            ip("-n", switch, "link", "add", f"port{n}", "type", "veth", "peer", "name", INTERFACE, "netns", host.name)
            ip("-n", switch, "link", "set", f"port{n}", "master", "bridge", "up")
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", INTERFACE)
            ip("-n", host.name, "link", "set", INTERFACE, "up")
        yield made
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def finish(processes: Sequence[subprocess.Popen]) -> list[str]:
    """What they said. RuntimeError when one fails or the time is over; none is left."""
    try:
        said = [process.communicate(timeout=TIME_LIMIT)[0] for process in processes]
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"still running after {TIME_LIMIT} s") from None
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    for process, text in zip(processes, said, strict=True):
        if process.returncode:
            raise RuntimeError(f"exit code {process.returncode}: {text[-3000:]}")
    return said


def curve(out: Path) -> list[dict]:
    """metrics.jsonl without what depends on the machine's mood."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not any(part in k for part in MEASURED)} for line in lines]


def on_one_host(host: Host, processes: int, out: Path) -> list[dict]:
    """The run that all others are compared with."""
    line = ["torchrun", "--standalone", "--nproc_per_node", str(processes), "launch/train.py"]
    finish([host.start([*line, *FLAGS, "--output_dir", str(out)], cores=processes, GLOO_SOCKET_IFNAME="lo")])
    return curve(out)


def by_torchrun(members: Sequence[Host], out: Path) -> list[dict]:
    """The line of launch/README.md on every host, one process each."""
    meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{members[0].address}:{PORT}", "--rdzv_id", "run1"]
    line = ["torchrun", "--nnodes", str(len(members)), "--nproc_per_node", "1", *meeting]
    training = ["launch/train.py", *FLAGS, "--output_dir", str(out)]
    # what torchrun tells from the machine's name (am I the meeting point, where is rank 0?) has to be said, since the
    # namespaces share that name
    own = [["--local_addr", host.address, "--rdzv_conf", f"is_host={host is members[0]}"] for host in members]
    finish([host.start([*line, *more, *training]) for host, more in zip(members, own, strict=True)])
    return curve(out)


def by_hand(members: Sequence[Host], out: Path, *flags: str, limit: float) -> list[tuple[int, float, str]]:
    """A rank on every host, without a launcher, under host names of their own; the cable of the last one is drawn
    after some steps. (exit code, seconds from then, what was said) of each."""
    processes = []
    for rank, host in enumerate(members):
        own = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": len(members), "MASTER_PORT": PORT}
        named = ["unshare", "--uts", "sh", "-c", f'hostname {host.name}; exec "$@"', "sh"]
        line = [*named, sys.executable, "launch/train.py", *FLAGS, "--output_dir", str(out), *flags]
        environment = {name: str(value) for name, value in own.items()}
        processes.append(host.start(line, MASTER_ADDR=members[0].address, **environment))
    try:
        until = time.monotonic() + TIME_LIMIT
        while not (out / "metrics.jsonl").exists() or sum("loss" in line for line in curve(out)) < 3:
            if time.monotonic() > until or any(process.poll() is not None for process in processes):
                break
            time.sleep(0.1)
        ip("-n", members[-1].name, "link", "set", INTERFACE, "down")
        began, ended = time.monotonic(), {}
        while len(ended) < len(processes) and time.monotonic() < began + limit:
            ended |= {
                n: time.monotonic() - began for n, p in enumerate(processes) if p.poll() is not None and n not in ended
            }
            time.sleep(0.1)
    finally:
        ip("-n", members[-1].name, "link", "set", INTERFACE, "up")
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    said = [process.communicate()[0] for process in processes]
    return [(p.returncode, ended.get(n, float("inf")), said[n]) for n, p in enumerate(processes)]


def by_deepspeed(members: Sequence[Host], out: Path, folder: Path) -> list[dict]:
    """``deepspeed --hostfile`` on the first host, over an sshd on every host, with keys made here."""
    with ssh_servers(members, folder) as config:
        hostfile = folder / "hostfile"
        hostfile.write_text("".join(f"{host.address} slots=1\n" for host in members))
        (folder / ".deepspeed_env").write_text(
            f"GLOO_SOCKET_IFNAME={INTERFACE}\nOMP_NUM_THREADS={THREADS}\nPATH={BIN}:{os.environ['PATH']}\n"
        )
        line = ["deepspeed", "--hostfile", str(hostfile), "--master_addr", members[0].address, "--master_port", PORT]
        training = ["--no_ssh_check", "launch/train.py", *FLAGS, "--output_dir", str(out)]
        known = {"PDSH_SSH_ARGS_APPEND": f"-F {config}", "DS_ENV_FILE": str(folder / ".deepspeed_env")}
        finish([members[0].start([*line, *training], **known)])
    return curve(out)


@contextlib.contextmanager
def ssh_servers(members: Sequence[Host], folder: Path) -> Iterator[Path]:
    """An sshd on every host that takes a key made here, and the client's configuration."""
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    config = folder / "client"
    config.write_text(
        f"Host *\n  IdentityFile {folder}/user\n  IdentitiesOnly yes\n  StrictHostKeyChecking no\n"
        f"  UserKnownHostsFile {folder}/known\n  LogLevel ERROR\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)  # Debian's sshd wants it
    servers = []
    try:
        for host in members:
            options = {
                "ListenAddress": host.address,
                "HostKey": str(folder / "host"),
                "AuthorizedKeysFile": str(folder / "user.pub"),
                "PidFile": "none",
                "StrictModes": "no",
                "UsePAM": "no",
                "PasswordAuthentication": "no",
                "PermitRootLogin": "prohibit-password",
            }
            words = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
            servers.append(host.start(["/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null", *words]))
        yield config
    finally:
        for server in servers:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGTERM)
            server.wait(10)


def first_difference(ours: list[dict], theirs: list[dict], *, near: float = 0.0) -> str:
    """Where two curves part; '' where they do not. ``near``: by how much of itself a number may differ."""

    def part(a: object, b: object) -> bool:
        numbers = isinstance(a, float) and isinstance(b, float)
        return a != b and not (numbers and math.isclose(a, b, rel_tol=near))

    if len(ours) != len(theirs):
        return f"{len(ours)} lines, not {len(theirs)}"
    pairs = zip(ours, theirs, strict=True)
    apart = [(a.get("step"), k, a.get(k), b.get(k)) for a, b in pairs for k in {**a, **b} if part(a.get(k), b.get(k))]
    return f"step {apart[0][0]}: {apart[0][1]} is {apart[0][2]}, not {apart[0][3]}" if apart else ""


def why_no_deepspeed() -> str | None:
    """What is missing for ``deepspeed --hostfile``; None if nothing is."""
    programs = ("pdsh", "ssh", "ssh-keygen", "/usr/sbin/sshd")
    missing = [name for name in programs if not shutil.which(name)]
    return f"not installed: {', '.join(missing)} (Debian's pdsh and openssh-server)" if missing else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=2)
    count = parser.parse_args().hosts
    if reason := why_no_hosts():
        print(f"no hosts can be made here: {reason}")
        return 2
    failed = False
    with tempfile.TemporaryDirectory() as name, hosts(count) as members:
        folder = Path(name)
        expected = on_one_host(members[0], count, folder / "one_host")
        ways = {"torchrun, c10d rendezvous": lambda: by_torchrun(members, folder / "torchrun")}
        if reason := why_no_deepspeed():
            print(f"deepspeed --hostfile: left out, {reason}")
        else:
            ways["deepspeed --hostfile"] = lambda: by_deepspeed(members, folder / "deepspeed", folder)
        for way, run in ways.items():
            difference = first_difference(run(), expected)
            failed |= bool(difference)
            print(f"{way}, {count} hosts: {difference or 'the curve of one host, to the bit'}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
