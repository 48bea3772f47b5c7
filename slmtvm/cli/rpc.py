"""Devices that measure: the tracker that knows them, who is there, keys for TLS."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from slmtvm.rpc.slm_runner import tracker_address


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(
        title="actions", metavar="ACTION", dest="action", required=True
    )  # fmt: skip

    tracker = actions.add_parser("tracker", help="serve as the tracker that devices register with")
    tracker.add_argument(
        "--host", default="127.0.0.1",
        help="address to listen on (default 127.0.0.1; 0.0.0.0 lets other machines in)",
    )  # fmt: skip
    tracker.add_argument("--port", type=int, default=9190, help="port to listen on (default 9190)")
    _add_keys(tracker)
    tracker.set_defaults(act=_tracker)

    devices = actions.add_parser("devices", help="list the devices that a tracker knows")
    _add_tracker(devices)
    _add_keys(devices)
    devices.set_defaults(act=_devices)

    relay = actions.add_parser(
        "relay", help="lead programs that speak no TLS (TVM's own) to a tracker that wants it"
    )
    _add_tracker(relay)
    relay.add_argument("--tls", type=Path, required=True, metavar="DIR", help="keys of a tuner")
    relay.add_argument("--port", type=int, default=9190, help="port on loopback (default 9190)")
    relay.set_defaults(act=_relay)

    keygen = actions.add_parser("keygen", help="make keys for a tracker, a tuner and runners")
    keygen.add_argument("folder", type=Path, metavar="DIR", help="where they are written")
    keygen.add_argument(
        "--runner", action="append", metavar="NAME", default=[],
        help="a board that gets keys of its own; may be repeated, and later",
    )  # fmt: skip
    keygen.set_defaults(act=_keygen)


def run(options: argparse.Namespace) -> int:
    code: int = options.act(options)
    return code


def _add_tracker(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tracker", default="127.0.0.1:9190", metavar="HOST:PORT",
        help="the tracker (default 127.0.0.1:9190)",
    )  # fmt: skip


def _add_keys(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tls", type=Path, metavar="DIR", help="keys for mutual TLS")


def _tracker(options: argparse.Namespace) -> int:
    from slmtvm.rpc.tracker import run_tracker

    def ready(host: str, port: int) -> None:
        print(f"tracker on {host}:{port}{' with TLS' if options.tls else ''}", flush=True)
        if not options.tls and host not in ("127.0.0.1", "::1"):
            print("without --tls, whoever reaches this port decides what devices run; see "
                  "docs/security.md", file=sys.stderr)  # fmt: skip

    run_tracker(options.host, options.port, tls=options.tls, ready=ready)
    return 0


def _devices(options: argparse.Namespace) -> int:
    from slmtvm.rpc.client import registered

    print(registered(options.tracker, tls=options.tls))
    return 0


def _relay(options: argparse.Namespace) -> int:
    from slmtvm.rpc.relay import run_tracker_relay

    def ready(port: int) -> None:
        print(f"relay on 127.0.0.1:{port} to {options.tracker}", flush=True)

    run_tracker_relay(*tracker_address(options.tracker), options.tls, options.port, ready)
    return 0


def _keygen(options: argparse.Namespace) -> int:
    from slmtvm.rpc.keygen import keygen

    for folder in keygen(options.folder, options.runner):
        print(folder)
    return 0
