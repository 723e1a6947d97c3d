"""A volume, filled and read with E2B's client, while a sandbox has it mounted."""

import time
import uuid

from e2b import Sandbox, Volume
from e2b.exceptions import VolumeException

volume = Volume.create(f"client-{uuid.uuid4().hex[:8]}")
sandbox = None


def refused(what, call) -> None:
    try:
        call()
    except VolumeException as error:
        assert what in str(error), error
    else:
        raise AssertionError(f"nothing said {what!r}")


def until_seen(command: str, expected: str) -> None:
    """What others change is seen in a sandbox within a second or so."""
    deadline = time.monotonic() + 5
    while (seen := sandbox.commands.run(command).stdout) != expected:
        assert time.monotonic() < deadline, f"{command}: {seen!r}, not {expected!r}"
        time.sleep(0.2)


try:
    volume.make_dir("/in/deep", force=True)
    content = bytes(range(256)) * 16384
    written = volume.write_file("/in/deep/file", content, mode=0o600)
    assert (written.path, written.size) == ("/in/deep/file", len(content))
    refused("exists already", lambda: volume.write_file("/in/deep/file", "other"))

    sandbox = Sandbox.create("base", volume_mounts={"/data": volume})
    seen = sandbox.commands.run("stat -c '%a %s %U' /data/in/deep/file; cd /data; cp -r in out")
    assert seen.stdout == f"600 {len(content)} user\n", seen
    assert volume.read_file("/out/deep/file", format="bytes") == content
    paths = [entry.path for entry in volume.list("/", depth=3)]
    assert paths == ["/in", "/in/deep", "/in/deep/file", "/out", "/out/deep", "/out/deep/file"]

    volume.write_file("/out/deep/file", "short", force=True)
    until_seen("cat /data/out/deep/file", "short")
    volume.remove("/out")
    until_seen("ls /data", "in\n")
    assert not volume.exists("/out/deep")

    # Where links lead is the sandbox's business.
    sandbox.commands.run("ln -s /etc/passwd /data/link")
    assert volume.get_info("/link").target == "/etc/passwd"
    refused("neither a file nor a directory", lambda: volume.read_file("/link"))
    print("done")
finally:
    if sandbox is not None:
        sandbox.kill()
    Volume.destroy(volume.volume_id)
