"""Weights that are encrypted where they lie: a device with the key computes the same bits."""

from __future__ import annotations

import ctypes
import os
import random
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from slmtvm.bundle import Bundle
from slmtvm.bundle.encrypt import encrypt_bundle
from slmtvm.bundle.sign import sign_bundle, verify_signature
from slmtvm.bundle.signature import PublicKeys, key_signer
from slmtvm.bundle.weights_key import read_weights_key
from slmtvm.codegen.program import build_program
from slmtvm.errors import BundleError, DeviceError, SignatureError, SlmError
from slmtvm.packaging import Options, package
from slmtvm.runtime import load
from tests.packaging.conftest import Keys, Release
from tests.packaging.devices import DEVICES, HOST, Device, emulator, tool

TOKENS = [1, 2, 3, 4, 5]
KEY = bytes(range(100, 132))


@dataclass(frozen=True)
class Encrypted:
    """A signed bundle with encrypted weights, and its key in a file."""

    bundle: Path
    key_file: Path

    @property
    def source(self) -> str:
        return f"file:{self.key_file}"


@pytest.fixture(scope="module")
def encrypted(release: Release, keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Encrypted:
    folder = tmp_path_factory.mktemp("encrypted")
    path, key_file = folder / "toy.slm", folder / "weights.key"
    key_file.write_bytes(KEY)
    encrypt_bundle(release.bundle(1), KEY, path)
    sign_bundle(path, key_signer(keys.private))
    return Encrypted(path, key_file)


@pytest.fixture
def copy(encrypted: Encrypted, tmp_path: Path) -> Path:
    return shutil.copytree(encrypted.bundle, tmp_path / "toy.slm")


def locked_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmLck:")[2].split()[0]) * 1024


def test_a_signed_and_encrypted_bundle_computes_the_same_bits_from_locked_memory(
    encrypted: Encrypted, release: Release, keys: Keys
) -> None:
    with load(release.bundle(1)) as session:
        wanted = session.eval_all(TOKENS)
    before = locked_bytes()
    for key in (KEY, encrypted.source):
        with load(encrypted.bundle, pub=keys.public, weights_key=key) as session:
            assert (session.eval_all(TOKENS) == wanted).all()
            plain = (release.bundle(1) / "weights.bin").stat().st_size
            assert locked_bytes() - before >= plain
    assert locked_bytes() == before


def test_nothing_of_the_weights_is_in_the_encrypted_file(
    encrypted: Encrypted, release: Release
) -> None:
    plain = (release.bundle(1) / "weights.bin").read_bytes()
    sealed = (encrypted.bundle / "weights.bin").read_bytes()
    pieces = {sealed[at : at + 16] for at in range(len(sealed) - 15)}
    assert not any(plain[at : at + 16] in pieces for at in range(0, len(plain) - 15, 16))
    assert 64 + len(plain) < len(sealed) < len(plain) * 1.001 + 200


def test_the_same_weights_and_key_give_the_same_file_and_others_another(
    release: Release, encrypted: Encrypted, tmp_path: Path
) -> None:
    again = encrypt_bundle(release.bundle(1), KEY, tmp_path / "again.slm")
    sealed = (encrypted.bundle / "weights.bin").read_bytes()
    assert (again.path / "weights.bin").read_bytes() == sealed
    other_key = encrypt_bundle(release.bundle(1), bytes(32), tmp_path / "key.slm")
    other = encrypt_bundle(release.bundle(2), KEY, tmp_path / "weights.slm")
    for bundle in (other_key, other):
        found = (bundle.path / "weights.bin").read_bytes()
        assert found[24:56] != sealed[24:56]  # the salt, from which the file's own key comes


@pytest.mark.parametrize("target", DEVICES)
def test_every_device_passes_its_self_test_with_the_key_alone(
    target: str, encrypted: Encrypted, keys: Keys, tmp_path: Path
) -> None:
    program = tmp_path / "slm-selftest"
    build_program(Bundle.open(encrypted.bundle), target, "selftest", program)
    command = [*emulator(target), str(program), str(encrypted.bundle), "--keys",
               str(keys.public), "--seconds", "0", "--threads", "1"]  # fmt: skip

    def run(**variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": os.environ["PATH"], **variables}
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    good = run(SLM_WEIGHTS_KEY=encrypted.source)
    assert (good.returncode, good.stderr) == (0, ""), good.stderr
    hexadecimal = run(SLM_WEIGHTS_KEY=f"command:printf {KEY.hex().upper()}")
    assert hexadecimal.returncode == 0, hexadecimal.stderr
    if target == HOST and keep_key("slmtvm device"):  # emulators know no keyrings
        kept = run(SLM_WEIGHTS_KEY="keyring:slmtvm device")
        assert (kept.returncode, kept.stderr) == (0, ""), kept.stderr
    for variables, message in (
        ({}, "encrypted, and no key is given"),
        ({"SLM_WEIGHTS_KEY": "keyring:slmtvm nothing"}, "gives no key"),
        ({"SLM_WEIGHTS_KEY": "command:printf %064d 0"}, "with another key than the one given"),
        ({"SLM_WEIGHTS_KEY": "command:false"}, "command:false gives no key"),
        ({"SLM_WEIGHTS_KEY": "file:/nowhere"}, "file:/nowhere gives no key"),
        ({"SLM_WEIGHTS_KEY": "fd:77"}, "fd:77 gives no key"),
        ({"SLM_WEIGHTS_KEY": "fd:"}, "fd: gives no key"),
        ({"SLM_WEIGHTS_KEY": "command:printf %065d 0"}, "gives no key"),
        ({"SLM_WEIGHTS_KEY": KEY.hex()}, "gives no key"),
    ):
        bad = run(**variables)
        assert bad.returncode == 2 and message in bad.stderr, (variables, bad)
        assert bad.stderr.count("\n") == 1


def test_the_wrong_key_is_named_as_that(encrypted: Encrypted) -> None:
    with pytest.raises(DeviceError, match=r"weights.bin: encrypted with another key than"):
        load(encrypted.bundle, weights_key=bytes(32))
    with pytest.raises(DeviceError, match=r"weights.bin: encrypted, and no key is given"):
        load(encrypted.bundle)
    with pytest.raises(SlmError, match="weights_key has 5 bytes, must have 32"):
        load(encrypted.bundle, weights_key=b"short")


@pytest.mark.slow
def test_any_change_of_encrypted_weights_is_refused_with_and_without_a_signature(
    copy: Path, keys: Keys
) -> None:
    file = copy / "weights.bin"
    whole = file.read_bytes()
    rng = random.Random(5)
    places = [*range(64), *(rng.randrange(64, len(whole)) for _ in range(150)), len(whole) - 1]
    for turn, at in enumerate(places):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << turn % 8]) + whole[at + 1 :])
        with pytest.raises((BundleError, DeviceError)):
            load(copy, weights_key=KEY)
        if turn % 20 == 0:
            with pytest.raises(SignatureError):
                load(copy, weights_key=KEY, pub=keys.public)
    for size in (0, 63, 64, len(whole) - 16, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(BundleError):
            load(copy, weights_key=KEY)


def test_pieces_cannot_change_places(release: Release, copy: Path) -> None:
    """Each is genuine, but not where it is."""
    file = copy / "weights.bin"
    whole = file.read_bytes()
    piece = (1 << 16) + 16
    if len(whole) < 64 + 2 * piece:
        other = encrypt_bundle(release.bundle(2), KEY, copy.parent / "o.slm").path / "weights.bin"
        file.write_bytes(whole[:64] + other.read_bytes()[64:])
    else:
        first, second = whole[64 : 64 + piece], whole[64 + piece : 64 + 2 * piece]
        file.write_bytes(whole[:64] + second + first + whole[64 + 2 * piece :])
    with pytest.raises(BundleError, match="damaged or changed in its piece 0"):
        load(copy, weights_key=KEY)


def test_weights_that_cannot_be_locked_are_not_decrypted_unless_swap_is_allowed(
    encrypted: Encrypted, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        program = Path(folder) / "slm-selftest"
        build_program(Bundle.open(encrypted.bundle), HOST, "selftest", program)
        bundle = shutil.copytree(encrypted.bundle, Path(folder) / "toy.slm")

        def unprivileged() -> None:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))

        def run(**variables: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [program, bundle, "--seconds", "0", "--threads", "1"],
                env={"SLM_WEIGHTS_KEY": f"command:printf {KEY.hex()}", **variables},
                preexec_fn=unprivileged, user=65534 if os.geteuid() == 0 else None,
                capture_output=True, text=True,
            )  # fmt: skip

        refused = run()
        assert refused.returncode == 2
        assert "cannot be locked in memory" in refused.stderr and "ulimit -l" in refused.stderr
        assert run(SLM_WEIGHTS_MAY_SWAP="1").returncode == 0


def keep_key(name: str) -> bool:
    """Puts the key into the kernel's keyring of this session; whether that is possible here."""
    number = {"x86_64": 248, "aarch64": 217, "riscv64": 217}[os.uname().machine]  # add_key
    session, words = -3, (ctypes.c_long(number), b"user", name.encode(), KEY)
    return bool(
        ctypes.CDLL(None).syscall(*words, ctypes.c_long(len(KEY)), ctypes.c_long(session)) > 0
    )


def test_keys_come_from_files_descriptors_and_commands(tmp_path: Path) -> None:
    raw, text = tmp_path / "raw", tmp_path / "text"
    raw.write_bytes(KEY)
    text.write_text(KEY.hex() + "\n")
    with raw.open("rb") as file:
        assert read_weights_key(f"fd:{file.fileno()}") == KEY
    sources = [f"file:{raw}", f"file:{text}", f"command:cat {text}"]
    for source in [*sources, *(["keyring:slmtvm test"] if keep_key("slmtvm test") else [])]:
        assert read_weights_key(source) == KEY
    for source, message in (
        ("file:/nowhere", "cannot be read: No such file"),
        ("command:echo no >&2; exit 3", "exit code 3: no"),
        (f"file:{__file__}", "bytes are no key"),
        ("fd:no", "must be file:PATH, fd:NUMBER, keyring:NAME or command:COMMAND"),
        ("keyring:slmtvm nothing", "cannot be read"),
        (KEY.hex(), "must be file:PATH"),
    ):
        with pytest.raises(SlmError, match=message) as raised:
            read_weights_key(source)
        assert source == KEY.hex() or KEY.hex() not in str(raised.value)


def test_what_cannot_be_encrypted_is_left_alone(
    encrypted: Encrypted, release: Release, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match="encrypted already"):
        encrypt_bundle(encrypted.bundle, KEY, tmp_path / "twice.slm")
    with pytest.raises(SlmError, match="has 32 bytes, not 3"):
        encrypt_bundle(release.bundle(1), b"abc", tmp_path / "short.slm")
    (tmp_path / "other").mkdir()
    with pytest.raises(BundleError, match="exists and is not a bundle"):
        encrypt_bundle(release.bundle(1), KEY, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    assert list((tmp_path / "other").iterdir()) == []


@pytest.mark.slow
def test_an_encrypted_package_is_installed_where_the_key_is(
    encrypted: Encrypted, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify_signature(encrypted.bundle, PublicKeys.read(keys.public))
    archive = package(
        encrypted.bundle, "tar.gz", tmp_path / "toy.tar.gz", target=HOST,
        options=Options(key_signer(keys.private)),
    )  # fmt: skip
    succeed = subprocess.run(["tar", "-xzf", archive, "--strip-components=1"], cwd=tmp_path)
    assert succeed.returncode == 0
    device = Device(tmp_path / "device", keys.public, tmp_path / "bin", ["sh"], os.environ["PATH"])
    device.refuse("does not work here: nothing was changed", "install", archive)
    device.variables["SLM_WEIGHTS_KEY"] = encrypted.source
    device.succeed("install", archive)


@pytest.fixture
def tpm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of programs that use a software TPM."""
    tool("tpm2_unseal", "tpm2-tools")
    swtpm = tool("swtpm", "swtpm")
    (tmp_path / "tpm").mkdir()
    socket = tmp_path / "tpm.sock"
    process = subprocess.Popen(
        [swtpm, "socket", "--tpm2", "--tpmstate", f"dir={tmp_path / 'tpm'}",
         "--server", f"type=unixio,path={socket}",
         "--ctrl", f"type=unixio,path={socket}.ctrl",
         "--flags", "not-need-init,startup-clear"],
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for _ in range(100):
            if socket.exists():
                break
            time.sleep(0.05)
        yield {**os.environ, "TPM2TOOLS_TCTI": f"swtpm:path={socket}"}
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_tpm_gives_the_key_by_a_command(
    tpm: dict[str, str], encrypted: Encrypted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*command: str) -> None:
        done = subprocess.run(command, env=tpm, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    run("tpm2_createprimary", "-C", "o", "-c", "primary.ctx")
    run("tpm2_create", "-C", "primary.ctx", "-i", str(encrypted.key_file), "-u", "key.pub",
        "-r", "key.priv")  # fmt: skip
    run("tpm2_flushcontext", "-t")
    run("tpm2_load", "-C", "primary.ctx", "-u", "key.pub", "-r", "key.priv", "-c", "key.ctx")
    run("tpm2_flushcontext", "-t")
    monkeypatch.setenv("TPM2TOOLS_TCTI", tpm["TPM2TOOLS_TCTI"])
    monkeypatch.setenv("SLM_WEIGHTS_KEY", f"command:tpm2_unseal -Q -c {tmp_path}/key.ctx")
    with load(encrypted.bundle) as session:
        assert session.eval(TOKENS).size
