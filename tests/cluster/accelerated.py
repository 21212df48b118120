"""``accelerate launch`` with the configuration files of ``launch/accelerate`` over hosts in network namespaces.

python -m tests.cluster.accelerated [--hosts 3]      (as root, from the project's root)
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.cluster.hosts import FLAGS, PORT, ROOT, Host, curve, finish, first_difference, hosts, why_no_hosts

KINDS = {"fsdp": ["--engine", "fsdp2"], "deepspeed": ["--ds_config", "{folder}/ds.json"]}


def flags_of(kind: str, folder: Path, more: Sequence[str]) -> list[str]:
    """What a run of the kind is told. ZeRO-3 with torch's AdamW, which needs no compiler."""
    (folder / "ds.json").write_text(
        json.dumps({"zero_optimization": {"stage": 3}, "optimizer": {"params": {"torch_adam": True}}})
    )
    return [*FLAGS, *(word.format(folder=folder) for word in KINDS[kind]), *more]


def by_accelerate(members: Sequence[Host], kind: str, flags: Sequence[str], out: Path) -> list[dict]:
    """The line of launch/README.md on every host, one process each."""
    line = ["accelerate", "launch", "--config_file", str(ROOT / f"launch/accelerate/{kind}.yaml")]
    line += ["--num_machines", str(len(members)), "--num_processes", str(len(members))]
    line += ["--main_process_ip", members[0].address, "--main_process_port", PORT]
    training = ["launch/train.py", *flags, "--output_dir", str(out)]
    finish([host.start([*line, "--machine_rank", str(n), *training]) for n, host in enumerate(members)])
    return curve(out)


def on_one_host(host: Host, processes: int, flags: Sequence[str], out: Path) -> list[dict]:
    """The same run by torchrun."""
    line = ["torchrun", "--standalone", "--nproc_per_node", str(processes), "launch/train.py"]
    finish([host.start([*line, *flags, "--output_dir", str(out)], cores=processes, GLOO_SOCKET_IFNAME="lo")])
    return curve(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=3)
    parser.add_argument("--model", help="folder of a small model; default: the one that comes along")
    args = parser.parse_args()
    if reason := why_no_hosts():
        print(f"no hosts can be made here: {reason}")
        return 2
    failed = False
    with tempfile.TemporaryDirectory() as name, hosts(args.hosts) as members:
        folder = Path(name)
        for kind in KINDS:
            flags = flags_of(kind, folder, ("--model_name_or_path", args.model) if args.model else ())
            expected = on_one_host(members[0], args.hosts, flags, folder / f"{kind}_one_host")
            found = by_accelerate(members, kind, flags, folder / kind)
            difference = first_difference(found, expected)
            failed |= bool(difference)
            said = difference or "the curve of one host, to the bit"
            print(f"accelerate, {kind}, {args.hosts} hosts: {said}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
