"""Two hosts with disks of their own: the data's cache may lie there, the outputs may not.

python -m tests.cluster.disks      (as root, from the project's root)
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.cluster.hosts import FLAGS, PORT, Host, curve, finish, first_difference, hosts, on_one_host, why_no_hosts

COUNT = 2


def run(members: Sequence[Host], own: Path, flags: Sequence[str]) -> list[str]:
    """What the hosts said: by torchrun, one process each, a disk of its own mounted at ``own`` on each (``ip netns
    exec`` gives each a view of mounts that the others do not see). RuntimeError where one fails."""
    meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{members[0].address}:{PORT}", "--rdzv_id", "disks"]
    line = ["torchrun", "--nnodes", str(len(members)), "--nproc_per_node", "1", *meeting]
    alone = ["sh", "-c", 'mount -t tmpfs none "$0" && "$@" && ls -R "$0"', str(own)]

    def start(host: Host):
        conf = ["--local_addr", host.address, "--rdzv_conf", f"is_host={host is members[0]}"]
        return host.start([*alone, *line, *conf, "launch/train.py", *flags])

    return finish([start(host) for host in members])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    if reason := why_no_hosts():
        print(f"no hosts can be made here: {reason}")
        return 2
    with tempfile.TemporaryDirectory() as name, hosts(COUNT) as members:
        folder, own = Path(name), Path(name, "own")
        own.mkdir()
        expected = on_one_host(members[0], COUNT, folder / "one_host")
        flags = [*FLAGS, "--output_dir", str(folder / "shared"), "--data_cache_dir", str(own / "cache")]
        said = run(members, own, flags)
        difference = first_difference(curve(folder / "shared"), expected)
        built = sum("index" in text or ".tar" in text for text in said)
        print(
            f"a cache on each host ({built} of {COUNT} built one): {difference or 'the curve of one host, to the bit'}"
        )
        try:
            run(members, own, [*FLAGS, "--output_dir", str(own / "run")])
        except RuntimeError as error:
            refused = "is not the same folder on all hosts" in str(error)
        else:
            refused = False
        print(f"outputs on each host's own disk: {'refused in a line' if refused else 'NOT refused'}")
    return int(bool(difference) or built != COUNT or not refused)


if __name__ == "__main__":
    sys.exit(main())
