"""Boards behind ssh and adb: an sshd on loopback, and what stands for Android's bridge."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

_SECONDS = 20.0


@contextmanager
def ssh_board(folder: Path) -> Iterator[str]:
    """A command that leads to a shell of an sshd of our own, which ends with this context."""
    sshd = shutil.which("sshd") or ("/usr/sbin/sshd" if os.path.exists("/usr/sbin/sshd") else None)
    for name, found in (("sshd", sshd), ("ssh", shutil.which("ssh")),
                        ("ssh-keygen", shutil.which("ssh-keygen"))):  # fmt: skip
        if not found:
            pytest.skip(f"no {name} here: apt install openssh-server openssh-client")
    for name in ("host", "client"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(command, check=True)
    (folder / "authorized").write_bytes((folder / "client.pub").read_bytes())
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    (folder / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {folder}/host\nPidFile none\nUsePAM no\n"
        f"AuthorizedKeysFile {folder}/authorized\nStrictModes no\nPermitRootLogin yes\n"
        "PasswordAuthentication no\nKbdInteractiveAuthentication no\n"
    )
    if os.geteuid() == 0:
        os.makedirs("/run/sshd", exist_ok=True)  # that it confines itself to as root
    log = (folder / "sshd.log").open("wb")
    process = subprocess.Popen(
        [str(sshd), "-D", "-e", "-f", str(folder / "sshd_config")], stdout=log, stderr=log,
        start_new_session=True,
    )  # fmt: skip
    ssh = (
        f"ssh -F none -i {folder}/client -p {port} -o IdentitiesOnly=yes -o BatchMode=yes "
        f"-o StrictHostKeyChecking=no -o UserKnownHostsFile={folder}/known -o LogLevel=ERROR "
        f"{getpass.getuser()}@127.0.0.1"
    )
    try:
        deadline = time.monotonic() + _SECONDS
        while subprocess.run([*ssh.split(), "true"], capture_output=True).returncode:
            said = (folder / "sshd.log").read_text(errors="replace")
            assert process.poll() is None and time.monotonic() < deadline, said
            time.sleep(0.1)
        yield ssh
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(_SECONDS)
        log.close()


@contextmanager
def adb_board(folder: Path) -> Iterator[str]:
    """A command called adb that does what ``adb shell`` does: it hands one string to a shell."""
    adb = folder / "adb"
    adb.write_text('#!/bin/sh\n[ "$1" = shell ] || exit 9\nshift\ncd / && exec sh -c "$*"\n')
    adb.chmod(0o755)
    yield f"{adb} shell"


BOARDS = {"ssh": ssh_board, "adb": adb_board}
