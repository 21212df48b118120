"""Interfaces that processes on several hosts would talk through. No torch in here."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

from diffdpo.doctor.finding import Finding, ok, warning

NAMED_BY = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


def interfaces() -> Iterator[Finding]:
    """The interfaces that are up, and settings that name one that is not there."""
    import psutil

    state, known = psutil.net_if_stats(), psutil.net_if_addrs()
    shown = [name for name, now in state.items() if now.isup and name != "lo"]
    speeds = [f"{name}{f' {state[name].speed / 1000:g} Gbit/s' if state[name].speed else ''}" for name in shown]
    devices = Path("/sys/class/infiniband")
    fabric = sorted(path.name for path in devices.iterdir()) if devices.is_dir() else []
    found = ", ".join([*speeds, *(f"InfiniBand {name}" for name in fabric)])
    yield ok("network", found or "none but this host's own: runs on one host only")
    for variable in NAMED_BY:
        asked = os.environ.get(variable, "").lstrip("^=")
        missing = [name for name in asked.split(",") if name and not any(one.startswith(name) for one in known)]
        if missing:
            advice = f"unset it, or give one of {', '.join(shown) or 'lo'}"
            yield warning(variable, f"names {', '.join(missing)}, which is not there", advice)
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        advice = "several hosts find each other by name: put it into /etc/hosts or the name server"
        yield warning("host name", f"{socket.gethostname()} has no address", advice)
