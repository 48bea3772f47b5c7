"""A bundle that is not signed, or not what was signed, is refused: in Python, in C, by openssl."""

from __future__ import annotations

import ctypes
import os
import random
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from slmtvm.bundle import Bundle
from slmtvm.bundle.sign import check_accuracy, sign_bundle, verify_signature
from slmtvm.bundle.signature import PublicKeys, command_signer, generate_keys, key_signer
from slmtvm.errors import BundleError, SignatureError, SlmError
from slmtvm.runtime import load
from slmtvm.runtime.interface import SKIP_CHECKSUM, Library, Options
from tests.packaging.conftest import Keys, Release
from tests.packaging.devices import HOST, tool

TOKENS = [1, 2, 3, 4, 5]
FLIPS = 400  # by default, of the files of a bundle
READ = ("manifest.json", "manifest.json.sig", "weights.bin", "tokenizer.json", f"lib/{HOST}.so")


@pytest.fixture
def bundle(release: Release, tmp_path: Path) -> Path:
    return shutil.copytree(release.bundle(1), tmp_path / "x.slm")


def test_a_signed_bundle_computes_what_it_did(bundle: Path, keys: Keys) -> None:
    with load(bundle) as session:
        wanted = session.eval(TOKENS)
    with load(bundle, pub=keys.public, least_counter=1) as session:
        assert np.array_equal(session.eval(TOKENS), wanted)
    verify_signature(bundle, PublicKeys.read(keys.public), least_counter=1)


def test_one_of_several_keys_is_enough_and_they_may_lie_in_one_file(
    bundle: Path, keys: Keys, other_keys: Keys, tmp_path: Path
) -> None:
    both = tmp_path / "both.pem"
    both.write_text(other_keys.public.read_text() + keys.public.read_text())
    for pub in (both, [other_keys.public, keys.public]):
        load(bundle, pub=pub).close()


def test_keys_are_rotated_by_trusting_both_for_a_while(
    bundle: Path, keys: Keys, other_keys: Keys
) -> None:
    sign_bundle(bundle, key_signer(other_keys.private), counter=2)
    load(bundle, pub=[keys.public, other_keys.public], least_counter=2).close()
    with pytest.raises(SignatureError, match="not signed by the public key that is trusted"):
        load(bundle, pub=keys.public)


def test_an_older_release_is_refused(bundle: Path, keys: Keys) -> None:
    with pytest.raises(SignatureError, match="counter of this release is 1, older than"):
        load(bundle, pub=keys.public, least_counter=2)


def test_a_bundle_without_a_signature_is_refused_where_keys_are_given(
    bundle: Path, keys: Keys
) -> None:
    (bundle / "manifest.json.sig").unlink()
    with pytest.raises(SignatureError, match=r"manifest\.json\.sig: no such file.*not signed"):
        load(bundle, pub=keys.public)
    load(bundle).close()


def test_a_bundle_with_one_more_file_is_not_what_was_signed(bundle: Path, keys: Keys) -> None:
    (bundle / "lib" / "more.so").write_bytes(b"")
    with pytest.raises(BundleError, match=r"lib/more\.so: is no part of the signed bundle"):
        verify_signature(bundle, PublicKeys.read(keys.public))


def test_libraries_of_other_targets_may_be_missing_and_no_program_is_linked_without_an_object(
    bundle: Path, keys: Keys
) -> None:
    for item in (bundle / "lib").iterdir():
        if item.name != f"{HOST}.so":
            item.unlink()
    opened = verify_signature(bundle, PublicKeys.read(keys.public))
    assert opened.targets == (HOST,)
    with pytest.raises(BundleError, match="no programs can be linked"):
        opened.object(HOST)
    with pytest.raises(BundleError, match="no library for target 'cortex-a78'"):
        opened.library("cortex-a78")


def c_open(library: Library, bundle: Path, keys: bytes | None, least: int = 0) -> None:
    """slm_open and slm_close of the C interface alone."""
    model = ctypes.c_void_p()
    options = Options(ctypes.sizeof(Options), 1, SKIP_CHECKSUM, None, keys, least)
    library.call("slm_open", os.fsencode(bundle), ctypes.byref(options), ctypes.byref(model))
    library.call("slm_close", model)


@pytest.fixture(scope="module")
def library(release: Release) -> Library:
    return Library(Bundle.open(release.bundle(1)).library(HOST))


def test_c_takes_what_is_signed_and_refuses_other_keys_and_older_counters(
    library: Library, bundle: Path, keys: Keys, other_keys: Keys
) -> None:
    pem, other = keys.public.read_bytes(), other_keys.public.read_bytes()
    c_open(library, bundle, pem, least=1)
    c_open(library, bundle, other + pem)
    with pytest.raises(SignatureError, match="signed by no public key that is trusted"):
        c_open(library, bundle, other)
    with pytest.raises(SignatureError, match="counter is 1, older than the least"):
        c_open(library, bundle, pem, least=2)
    for text in (b"", b"nothing", pem[:60], pem.replace(b"MCow", b"MCox"), b"\xff" * 99):
        with pytest.raises(SlmError, match="must be Ed25519 public keys in PEM"):
            c_open(library, bundle, text)
    (bundle / "manifest.json.sig").unlink()
    with pytest.raises(SignatureError, match="the bundle is not signed"):
        c_open(library, bundle, pem)


def test_c_checks_the_weights_that_it_mapped_even_where_the_checksum_was_repaired(
    library: Library, bundle: Path, keys: Keys
) -> None:
    weights = bytearray((bundle / "weights.bin").read_bytes())
    weights[200] ^= 1
    (bundle / "weights.bin").write_bytes(weights)
    c_open(library, bundle, None)  # nobody looks: SLM_SKIP_CHECKSUM
    with pytest.raises(SignatureError, match=r"weights\.bin: damaged or changed: SHA-256"):
        c_open(library, bundle, keys.public.read_bytes())


def test_c_options_of_before_the_keys_still_work(library: Library, bundle: Path) -> None:
    model = ctypes.c_void_p()
    for size in (12, 24):
        options = Options(size, 1, 0, None, b"no key", 7)
        library.call("slm_open", os.fsencode(bundle), ctypes.byref(options), ctypes.byref(model))
        library.call("slm_close", model)


def altered(rng: random.Random, content: bytes) -> bytes:
    """One bit changed, or what follows some byte cut off."""
    at = rng.randrange(len(content))
    if rng.random() < 0.2:
        return content[:at]
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]


@pytest.mark.parametrize(
    "count", [FLIPS, pytest.param(10_000, marks=[pytest.mark.exhaustive, pytest.mark.slow])]
)
def test_any_change_of_a_signed_bundle_is_refused(
    library: Library, bundle: Path, keys: Keys, count: int
) -> None:
    rng = random.Random(count)
    pem = keys.public.read_bytes()
    files = {name: (bundle / name).read_bytes() for name in READ}
    for turn in range(count):
        name = rng.choice(READ)
        (bundle / name).write_bytes(altered(rng, files[name]))
        with pytest.raises(SlmError):
            c_open(library, bundle, pem)
        if turn % 4 == 0:  # Python's own checks take longer
            with pytest.raises(SlmError):
                verify_signature(bundle, PublicKeys.read(keys.public))
            if name != "tokenizer.json":  # which is compared when it is read
                with pytest.raises(SlmError):
                    load(bundle, pub=keys.public).close()
        (bundle / name).write_bytes(files[name])
    c_open(library, bundle, pem)


def test_openssl_alone_checks_a_signature(bundle: Path, keys: Keys, other_keys: Keys) -> None:
    openssl = tool("openssl", "openssl")

    def check(public: Path) -> int:
        return subprocess.run(
            [openssl, "pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin",
             "-in", bundle / "manifest.json", "-sigfile", bundle / "manifest.json.sig"],
            capture_output=True,
        ).returncode  # fmt: skip

    assert check(keys.public) == 0
    assert check(other_keys.public) != 0
    with (bundle / "manifest.json").open("ab") as file:
        file.write(b" ")
    assert check(keys.public) != 0


def test_a_command_signs_as_a_key_does(bundle: Path, tmp_path: Path) -> None:
    openssl = tool("openssl", "openssl")
    private, public = tmp_path / "key.pem", tmp_path / "pub.pem"
    subprocess.run([openssl, "genpkey", "-algorithm", "ed25519", "-out", private], check=True)
    subprocess.run([openssl, "pkey", "-in", private, "-pubout", "-out", public], check=True)
    command = f"{openssl} pkeyutl -sign -inkey {shlex.quote(str(private))} -rawin -in {{}}"
    sign_bundle(bundle, command_signer(command), counter=5, pub=PublicKeys.read(public))
    first = (bundle / "manifest.json.sig").read_bytes()
    load(bundle, pub=public, least_counter=5).close()
    sign_bundle(bundle, key_signer(private))
    assert (bundle / "manifest.json.sig").read_bytes() == first


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("cat", r"must have \{\}"),
        ("false {}", "exit code 1 and 0 bytes"),
        ("echo broken >&2; exit 3; {}", "exit code 3 and 0 bytes.*broken"),
        ("head -c 63 /dev/zero; : {}", "exit code 0 and 63 bytes"),
        ("head -c 64 /dev/zero; : {}", "not signed by the public key"),
    ],
)
def test_a_command_that_fails_leaves_the_bundle_as_it_was(
    command: str, message: str, bundle: Path, keys: Keys
) -> None:
    before = {p: p.read_bytes() for p in bundle.rglob("*") if p.is_file()}
    with pytest.raises(SlmError, match=message):
        sign_bundle(bundle, command_signer(command), counter=9, pub=PublicKeys.read(keys.public))
    assert {p: p.read_bytes() for p in bundle.rglob("*") if p.is_file()} == before
    assert list(bundle.parent.iterdir()) == [bundle]


def test_a_damaged_bundle_is_not_signed(bundle: Path, keys: Keys) -> None:
    content = (bundle / "weights.bin").read_bytes()
    (bundle / "weights.bin").write_bytes(content[:-1] + b"\x7f")
    with pytest.raises(BundleError, match=r"weights\.bin: damaged or changed"):
        sign_bundle(bundle, key_signer(keys.private))


def test_a_private_key_is_its_owner_s_alone_and_never_overwritten(tmp_path: Path) -> None:
    private, public = tmp_path / "key.pem", tmp_path / "pub.pem"
    generate_keys(private, public)
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    before = private.read_bytes()
    for other in (tmp_path / "other.pem", public):
        with pytest.raises(SlmError, match="exists, and is left alone"):
            generate_keys(private, other)
    assert private.read_bytes() == before
    with pytest.raises(SlmError, match=r"pub\.pem: exists"):
        generate_keys(tmp_path / "new.pem", public)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["key.pem", "pub.pem"]


def rsa(path: Path, *, public: bool) -> None:
    openssl = tool("openssl", "openssl")
    pem = subprocess.run([openssl, "genrsa", "1024"], check=True, capture_output=True).stdout
    if public:
        command = [openssl, "rsa", "-pubout"]
        pem = subprocess.run(command, input=pem, check=True, capture_output=True).stdout
    path.write_bytes(pem)


@pytest.mark.parametrize(
    ("make", "private", "public"),
    [
        (lambda p: p.write_text("no key"), "holds no private key in PEM", "holds no public key"),
        (lambda p: rsa(p, public=False), "is no Ed25519 key", "holds no public key"),
        (lambda p: rsa(p, public=True), "holds no private key", "not one of Ed25519"),
        (lambda p: p.write_bytes(b"\0" * 99999), "is too large", "is too large"),
        (lambda _: None, "no such file", "no such file"),
    ],
)
def test_a_file_that_is_no_key_is_named(
    make: Callable[[Path], None], private: str, public: str, tmp_path: Path
) -> None:
    make(tmp_path / "x.pem")
    with pytest.raises(SlmError, match=rf"x\.pem: .*{private}"):
        key_signer(tmp_path / "x.pem")
    with pytest.raises(SlmError, match=rf"x\.pem: .*{public}"):
        PublicKeys.read(tmp_path / "x.pem")


def test_an_encrypted_key_takes_its_password_from_the_environment(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    openssl = tool("openssl", "openssl")
    locked = tmp_path / "locked.pem"
    subprocess.run(
        [openssl, "pkcs8", "-topk8", "-in", keys.private, "-passout", "pass:secret",
         "-out", locked],
        check=True,
    )  # fmt: skip
    with pytest.raises(SlmError, match="SLMTVM_KEY_PASSWORD"):
        key_signer(locked)
    monkeypatch.setenv("SLMTVM_KEY_PASSWORD", "secret")
    assert key_signer(locked)(b"message")
    monkeypatch.setenv("SLMTVM_KEY_PASSWORD", "wrong")
    with pytest.raises(SlmError, match="not its password"):
        key_signer(locked)


@pytest.mark.parametrize("version", ["one", "1.2.3.4.5", "1..2", "-1", "1.0\n"])
def test_a_version_that_not_every_format_takes_is_refused(
    version: str, bundle: Path, keys: Keys
) -> None:
    with pytest.raises(BundleError, match="must be numbers with dots"):
        sign_bundle(bundle, key_signer(keys.private), version=version)


def test_accuracy_may_be_required(release: Release) -> None:
    bundle = Bundle.open(release.bundle(1))
    bundle.manifest.extra["check"] = {"kl": 0.004, "cosine": 0.999}
    for good in ("kl<0.01", "cosine>0.99", " kl < 1"):
        check_accuracy(bundle, good)
    for bad, message in (
        ("kl<0.001", "its kl is 0.004, which does not meet"),
        ("kl>0.01", "does not meet"),
        ("relative<1", "no figure 'relative' .there are: kl, cosine."),
        ("kl=1", "is no requirement"),
        ("<1", "is no requirement"),
        ("kl<much", "is no requirement"),
    ):
        with pytest.raises(SlmError, match=message):
            check_accuracy(bundle, bad)


def test_a_bundle_is_opened_without_cryptography_where_no_keys_are_given(release: Release) -> None:
    code = (
        "import sys; sys.modules['cryptography'] = None; import slmtvm; "
        f"slmtvm.load({str(release.bundle(1))!r}).close()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ})
