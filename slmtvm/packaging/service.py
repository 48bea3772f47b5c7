"""The model as part of a system under /usr: where its files lie, and the service that serves it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from slmtvm.packaging.contents import Contents
from slmtvm.packaging.file import File

# What installs packages: nothing for a system that has another way of doing that.
INSTALLERS = ("bin/slm-install", "bin/slm-verify", "bin/slm-mender")


def placed(file: File, name: str) -> File:
    """``file`` of a package where a system of Debian's has such things."""
    if file.path.startswith("share/"):
        return replace(file, path=f"usr/share/doc/slm-{name}/{Path(file.path).name}")
    return replace(file, path=f"usr/lib/slm/{name}/{file.path}")


def service_unit(contents: Contents, package: str) -> bytes:
    """A service that reads its own files, listens, and can do nothing else (systemd.exec(5))."""
    folder = f"/usr/lib/slm/{contents.name}"
    return (
        "[Unit]\n"
        f"Description=Language model {contents.name}\n"
        "After=network.target\n\n"
        "[Service]\n"
        "Type=notify\n"
        f"EnvironmentFile=-/etc/default/{package}\n"
        f"ExecStart={folder}/bin/slm-serve {folder}/bundle $SLM_SERVE_OPTIONS\n"
        "ExecReload=/bin/kill -HUP $MAINPID\n"
        "WatchdogSec=60\n"
        "Restart=on-failure\n"
        "DynamicUser=yes\n"
        "CapabilityBoundingSet=\n"
        "LimitMEMLOCK=infinity\n"  # decrypted weights are locked
        "LockPersonality=yes\n"
        "MemoryDenyWriteExecute=yes\n"
        "NoNewPrivileges=yes\n"
        "PrivateDevices=yes\n"
        "PrivateTmp=yes\n"
        "ProtectClock=yes\n"
        "ProtectControlGroups=yes\n"
        "ProtectHome=yes\n"
        "ProtectHostname=yes\n"
        "ProtectKernelLogs=yes\n"
        "ProtectKernelModules=yes\n"
        "ProtectKernelTunables=yes\n"
        "ProtectSystem=strict\n"
        "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6\n"
        "RestrictNamespaces=yes\n"
        "RestrictRealtime=yes\n"
        "RestrictSUIDSGID=yes\n"
        "SystemCallArchitectures=native\n"
        "SystemCallFilter=@system-service\n\n"
        "[Install]\n"
        "WantedBy=multi-user.target\n"
    ).encode()
