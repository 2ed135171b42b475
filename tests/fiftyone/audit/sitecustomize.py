"""Python imports this before anything else where this folder is on its path; `reached_hosts.py` puts it there."""

import os
import sys

_FILE = os.environ["CONCEPTSEG_TEST_HOSTS"]
_LOOK_UPS = {"socket.getaddrinfo", "socket.gethostbyname"}
_TRAFFIC = {"socket.connect", "socket.sendto", "socket.sendmsg"}


def _note(event: str, details: tuple) -> None:
    if event in _LOOK_UPS:
        host = details[0]
    elif event in _TRAFFIC and isinstance(details[1], tuple):  # else a socket of the file system
        host = details[1][0]
    else:
        return
    with open(_FILE, "a", encoding="utf-8") as file:  # noqa: PTH123 - runs in every process: no imports
        file.write(f"{host}\n")


sys.addaudithook(_note)
