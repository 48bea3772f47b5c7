"""List what can be compiled for."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def run(options: argparse.Namespace) -> int:
    from slmtvm.errors import TargetError
    from slmtvm.target import Target, known_targets

    for name in (*known_targets(), *known_targets(cuda=True)):
        target = Target.load(name)
        print(f"{name:16} {target.arch:8} {target.description}")
    try:
        host = f"this machine: {Target.load('host').name}"
    except TargetError as error:
        host = str(error)
    print(f"{'host':16} {'':8} {host}")
    return 0
