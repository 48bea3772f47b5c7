"""What every device must hand to a job, and back, wherever it runs."""

from __future__ import annotations

from slmtvm.rpc.client import Device


def assert_a_job_gets_its_inputs(device: Device, job: bytes, *, kilobytes: int) -> None:
    """Arguments, ``kilobytes`` of standard input, and files that replace those before them."""
    assert device.run(job, ["a b", "'$HOME'", "*"]).stdout == b"a b\n'$HOME'\n*\n"
    data = bytes(range(256)) * (4 * kilobytes)
    assert device.run(job, ["cat"], stdin=data).stdout == data
    for content in (b"first", b"second", b"first"):
        result = device.run(job, ["cat", "input.txt"], files={"input.txt": content})
        assert (result.ok, result.reason, result.stdout) == (True, "", content)
