"""A device from its first start to its third: qemu's board with Debian's kernel and busybox."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from slmtvm.bundle import Bundle
from slmtvm.bundle.sign import sign_bundle
from slmtvm.bundle.signature import key_signer
from slmtvm.codegen.program import kept_program
from slmtvm.packaging import Options, package
from slmtvm.packaging.delta import write_delta
from tests.end_to_end.bundles import TARGETS_OF_THREE, bundle_for
from tests.models import PROMPTS
from tests.packaging.board import board, make_disk, unpack_tools
from tests.packaging.conftest import Keys
from tests.packaging.devices import HOST, released

INSTALL = "/mnt/bin/slm-install --root /mnt/models --keys /mnt/keys.pem"
RUN = "/mnt/models/demo/current/bin/slm-run /mnt/models/demo/current/bundle"
ANSWER = f"--prompt '{PROMPTS[0]}' --max-tokens 12"
TARGETS = {"aarch64": "cortex-a78", "riscv64": "riscv64-rvv"}
# The same architecture without what the target asks for.
OLD_CPUS = {"aarch64": "cortex-a53", "riscv64": "rv64,v=false"}


@dataclass(frozen=True)
class Packages:
    """What was released for a board: signed packages of the demo model, and what is none."""

    bundle: Path
    disk_files: dict[str, Path]


def make_packages(
    factory: pytest.TempPathFactory, arch: str, keys: Keys, other_keys: Keys
) -> Packages:
    folder = factory.mktemp("packages")
    signer, foreign = key_signer(keys.private), key_signer(other_keys.private)
    bundle = shutil.copytree(bundle_for(factory, "demo", TARGETS_OF_THREE), folder / "demo.slm")
    sign_bundle(bundle, signer, counter=1, version="1.0.0")
    first = package(
        bundle, "tar.gz", folder / "1.tar.gz", target=TARGETS[arch], options=Options(signer)
    )
    second = released(first, folder / "2.tar.gz", signer, counter=2, version="2.0.0")
    write_delta(first, second, folder / "1-to-2.tar.gz")
    released(first, folder / "3.tar.gz", signer, counter=3, version="3.0.0")
    released(first, folder / "foreign.tar.gz", foreign, counter=4, version="4.0.0")
    released(first, folder / "other.tar.gz", signer, counter=5, arch="x86_64")
    second.unlink()
    files = {path.name: path for path in folder.glob("*.tar.gz")}
    files |= unpack_tools(first, folder)
    return Packages(bundle, {**files, "keys.pem": keys.public})


def host_answer(bundle: Path) -> str:
    """What slm-run of this machine makes of the prompt."""
    program = kept_program(Bundle.open(bundle), HOST, "run")
    command = [program, bundle, "--prompt", PROMPTS[0], "--max-tokens", "12"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("arch", list(TARGETS))
@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_board_takes_what_is_meant_for_it_through_restarts_and_refuses_the_rest(
    arch: str,
    keys: Keys,
    other_keys: Keys,
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
) -> None:
    machine = board(arch)
    packages = make_packages(tmp_path_factory, arch, keys, other_keys)
    total = sum(path.stat().st_size for path in packages.disk_files.values())
    disk = tmp_path / "disk"
    make_disk(disk, packages.disk_files, (total >> 20) + 48)

    installed, updated = machine.boot(
        disk, [f"{INSTALL} install 1.tar.gz", f"{INSTALL} install 1-to-2.tar.gz"]
    )
    assert installed.code == 0 and "demo 1.0.0 (counter 1" in installed.output, installed
    assert updated.code == 0 and "demo 2.0.0 (counter 2" in updated.output, updated

    status, answer, downgrade, foreign, wrong, full, emptied, again = machine.boot(
        disk,
        [
            f"{INSTALL} status demo",
            f"{RUN} {ANSWER}",
            f"{INSTALL} install 1.tar.gz",
            f"{INSTALL} install foreign.tar.gz",
            f"{INSTALL} install other.tar.gz",
            f"dd if=/dev/zero of=/mnt/filler bs=1M 2>/dev/null; {INSTALL} install 3.tar.gz",
            f"rm /mnt/filler; ls -a models; {INSTALL} status demo",
            f"{RUN} {ANSWER}",
        ],
    )
    assert "demo 2.0.0 counter 2" in status.output
    assert answer.output == host_answer(packages.bundle)
    assert downgrade.code == 1 and "its counter is 1, 2 was here before" in downgrade.output
    assert foreign.code == 1 and "not signed by a key of /mnt/keys.pem" in foreign.output
    assert wrong.code == 1 and f"for x86_64, this CPU is {arch}" in wrong.output
    assert full.code == 1 and full.output.startswith("slm-install: "), full
    assert ".install" not in emptied.output and "demo 2.0.0 counter 2" in emptied.output
    assert again == answer

    refused, old = machine.boot(
        disk, [f"{INSTALL} install 3.tar.gz", f"{RUN} {ANSWER}"], cpu=OLD_CPUS[arch]
    )
    assert refused.code == 1 and "does not work here: nothing was changed" in refused.output
    assert "this CPU lacks" in refused.output
    assert old.code == 1 and "this CPU lacks" in old.output
