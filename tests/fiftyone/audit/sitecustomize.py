"""Imported by Python at startup if this folder is on PYTHONPATH; see `reached_hosts.py`."""

import os
import sys

_FILE = os.environ["CONCEPTSEG_TEST_HOSTS"]
_LOOKUPS = {"socket.getaddrinfo", "socket.gethostbyname"}
_TRAFFIC = {"socket.connect", "socket.sendto", "socket.sendmsg"}


def _record(event: str, details: tuple) -> None:
    if event in _LOOKUPS:
        host = details[0]
    elif event in _TRAFFIC and isinstance(details[1], tuple):  # excludes Unix domain sockets
        host = details[1][0]
    else:
        return
    with open(_FILE, "a", encoding="utf-8") as file:  # noqa: PTH123 - runs in every process: no imports
        file.write(f"{host}\n")


sys.addaudithook(_record)
