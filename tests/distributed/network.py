"""Hosts for a test: network namespaces joined by a bridge, with a cable each that can be pulled.

host-0 --cable--. bridge .--cable-- host-1        each has an address, a host name, no more
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# A removed network goes in the background of the kernel: the next one's names have to differ.
_NUMBERS = itertools.count()


class Hosts:
    """Some hosts in one network of their own.

    Args:
        count: how many.
    """

    def __init__(self, count: int) -> None:
        own = f"{os.getpid()}x{next(_NUMBERS)}"
        self._bridge = f"hb{own}"
        self.names = [f"host-{number}" for number in range(count)]
        self._spaces = [f"hasten-{own}-{number}" for number in range(count)]
        self._cables = [f"hc{own}n{number}" for number in range(count)]

    def address(self, number: int) -> str:
        """Returns the address of a host."""
        return f"10.213.7.{number + 1}"

    def build(self) -> None:
        """Makes the network.

        Raises:
            OSError: that is not permitted here.
        """
        _ip(f"link add {self._bridge} type bridge")
        _ip(f"link set {self._bridge} up")
        for number, (space, cable) in enumerate(zip(self._spaces, self._cables, strict=True)):
            _ip(f"netns add {space}")
            _ip(f"link add {cable} type veth peer name eth0 netns {space}")
            _ip(f"link set {cable} master {self._bridge} up")
            _ip(f"-n {space} addr add {self.address(number)}/24 dev eth0")
            _ip(f"-n {space} link set eth0 up")
            _ip(f"-n {space} link set lo up")

    def remove(self) -> None:
        """Takes the network away again."""
        for what in (*(f"netns del {s}" for s in self._spaces), f"link del {self._bridge}"):
            with suppress(OSError):
                _ip(what)

    def plug(self, number: int, *, connected: bool) -> None:
        """Pulls the cable of a host, or puts it back. Nothing tells connections of it."""
        _ip(f"link set {self._cables[number]} {'up' if connected else 'down'}")

    def command(self, number: int, *command: str) -> list[str]:
        """Returns a command that runs on a host."""
        rename = ["unshare", "-u", "sh", "-c", 'hostname "$0"; exec "$@"', self.names[number]]
        return ["ip", "netns", "exec", self._spaces[number], *rename, *command]


@contextmanager
def hosts(count: int) -> Iterator[Hosts]:
    """Makes some hosts for the time of a ``with`` block.

    Raises:
        OSError: that is not permitted here.
    """
    made = Hosts(count)
    try:
        made.build()
        yield made
    finally:
        made.remove()


def why_not() -> str | None:
    """Returns why no hosts can be made here; None where they can."""
    for program in ("ip", "unshare"):
        if shutil.which(program) is None:
            return f"there is no program '{program}'"
    try:
        with hosts(1) as made:
            subprocess.run(made.command(0, "true"), check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"network namespaces are not permitted here: {error}"
    return None


def _ip(arguments: str) -> None:
    done = subprocess.run(["ip", *arguments.split()], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {arguments}: {done.stderr.strip()}")
