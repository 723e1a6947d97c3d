"""Volumes and directories of the host in real sandboxes, through all that happens to these."""

from __future__ import annotations

import json
import subprocess
import time
import uuid

import pytest
from conftest import CLIENTS, SHARED, bare_env, node, venv

MARK = "/home/user/mark"


def run(server, sandbox: dict | str, script: str, check: bool = True) -> str:
    """Runs a script of bash in a sandbox; what it printed, errors behind it."""
    sandbox = sandbox if isinstance(sandbox, str) else sandbox["sandboxID"]
    done = server.cli("sandbox", "exec", sandbox, "--", "bash", "-c", script, check=False)
    assert not check or done.returncode == 0, f"{script}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def until_seen(server, sandbox, script: str, expected: str) -> None:
    """What others change is seen within a second or so."""
    deadline = time.monotonic() + 5
    while (seen := run(server, sandbox, script, check=False)) != expected:
        assert time.monotonic() < deadline, f"{script}: {seen!r}, not {expected!r}"
        time.sleep(0.2)


@pytest.fixture
def volume(server):
    name = f"test-{uuid.uuid4().hex[:8]}"
    with server.http() as http:
        made = http.post("/volumes", json={"name": name})
        assert made.status_code == 201, made.text
        yield made.json()
        http.delete(f"/volumes/{name}")


@pytest.fixture
def host():
    """A directory of this machine that sandboxes may mount."""
    directory = SHARED / uuid.uuid4().hex[:8]
    directory.mkdir(parents=True)
    return directory


@pytest.fixture
def both(server, volume, host):
    """A sandbox with a volume on /data and a directory of the host, read-only, on /mnt/host."""
    (host / "file").write_text("one")
    mounts = [{"hostPath": str(host), "mountPath": "/mnt/host", "readOnly": True}]
    sandbox = server.create(
        timeout=300,
        volumeMounts=[{"name": volume["name"], "path": "/data"}],
        metadata={"host-mount": json.dumps(mounts), "other": "kept"},
    )
    yield sandbox
    server.kill(sandbox)


def works(server, sandbox, host, text: str) -> None:
    """Both mounts do what they should, and what is written to one arrives."""
    (host / "file").write_text(text)
    until_seen(server, sandbox, "cat /mnt/host/file", text)
    run(server, sandbox, f"echo {text} >> /data/log && tail -n 1 /data/log | grep -qx {text}")
    refused = run(server, sandbox, "echo x > /mnt/host/file", check=False)
    assert "Read-only file system" in refused
    assert (host / "file").read_text() == text


def test_a_volume_outlives_its_sandboxes(server, volume):
    mounts = [{"name": volume["name"], "path": "/data"}]
    first = server.create(timeout=120, volumeMounts=mounts)
    run(server, first, "mkdir -p /data/deep && echo kept > /data/deep/file && sync")
    # 8 MB, whole, and by the hash the same on both ends.
    run(server, first, "head -c 8388608 /dev/urandom > /data/big")
    digest = run(server, first, "sha256sum < /data/big")
    with server.http() as http:
        shown = http.get(f"/sandboxes/{first['sandboxID']}").json()
        assert shown["volumeMounts"] == mounts
        refused = http.delete(f"/volumes/{volume['volumeID']}")
        assert refused.status_code == 409 and first["sandboxID"] in refused.text
    second = server.create(timeout=120, volumeMounts=mounts)
    assert run(server, second, "cat /data/deep/file") == "kept\n"
    run(server, second, "echo both >> /data/deep/file")
    until_seen(server, first, "cat /data/deep/file", "kept\nboth\n")
    server.kill(first)
    server.kill(second)
    third = server.create(timeout=120, volumeMounts=[{**mounts[0], "readOnly": True}])
    assert run(server, third, "sha256sum < /data/big") == digest
    assert "Read-only" in run(server, third, "touch /data/new", check=False)
    server.kill(third)


def test_tools_work_on_a_volume(server, both):
    run(server, both, """
        set -e
        cd /data
        python3 - <<'END'
import os, sqlite3, tempfile
db = sqlite3.connect("/data/test.db")
db.execute("create table t (n integer)")
db.executemany("insert into t values (?)", [(n,) for n in range(1000)])
db.commit()
assert db.execute("select count(*), sum(n) from t").fetchone() == (1000, 499500)
with tempfile.TemporaryFile(dir="/data") as unnamed:
    unnamed.write(b"x" * 100000)
    unnamed.seek(0)
    assert len(unnamed.read()) == 100000
for n in range(300):
    open(f"/data/many-{n}", "w").write(str(n))
assert len([name for name in os.listdir("/data") if name.startswith("many-")]) == 300
END
        rm many-*
        mkdir tree && cp -r /etc/apt tree/ && tar cf tree.tar tree && rm -r tree
        tar xf tree.tar && test -d tree/apt && ln -s tree link && test -d link/apt
        chmod 750 tree && test "$(stat -c %a tree)" = 750
        cp /bin/echo here && test "$(./here works)" = works
    """)  # fmt: skip
    # A program that is in a share, started in a share.
    done = server.cli("sandbox", "exec", both["sandboxID"], "-w", "/data", "--", "./here", "direct")
    assert done.stdout == "direct\n"


def test_two_mounts_and_what_the_host_does_to_them(server, both, host):
    with server.http() as http:
        shown = http.get(f"/sandboxes/{both['sandboxID']}").json()
        assert shown["metadata"] == {"other": "kept"}
    works(server, both, host, "two")
    (host / "new").mkdir()
    (host / "new" / "file").write_text("made by the host")
    until_seen(server, both, "cat /mnt/host/new/file", "made by the host")
    assert "No such" in run(server, both, "cat /mnt/host/../../etc/shadow-of-host", check=False)


def test_what_is_written_to_a_host_mount_is_there(server, host):
    mounts = [{"hostPath": str(host), "mountPath": "/mnt/rw"}]
    sandbox = server.create(timeout=120, metadata={"hostdir-mount": json.dumps(mounts)})
    run(server, sandbox, "echo from the guest > /mnt/rw/file && ln -s /etc/passwd /mnt/rw/link")
    assert (host / "file").read_text() == "from the guest\n"
    assert (host / "link").is_symlink()
    # What a link means is what it means in the sandbox.
    assert "user" in run(server, sandbox, "cat /mnt/rw/link")
    refused = run(server, sandbox, "sudo -n mknod /mnt/rw/null c 1 3 2>&1", check=False)
    assert not (host / "null").exists(), refused
    server.kill(sandbox)
    assert (host / "file").read_text() == "from the guest\n"


def test_only_what_is_allowed_is_mounted(server, volume):
    with server.http() as http:
        def create(**body):
            return http.post("/v2/sandboxes", json={"templateID": "base", **body})

        for path in ["/etc", "/", f"{SHARED}/../..", "/proc/self/root"]:
            mounts = json.dumps([{"hostPath": path, "mountPath": "/m"}])
            refused = create(metadata={"host-mount": mounts})
            assert refused.status_code == 403, refused.text
        for path in ["/", "/proc/x", "relative", "/a/../b"]:
            refused = create(volumeMounts=[{"name": volume["name"], "path": path}])
            assert refused.status_code == 400, refused.text
        refused = create(volumeMounts=[{"name": "missing", "path": "/data"}])
        assert refused.status_code == 400 and "missing" in refused.text


def test_mounts_survive_a_server_that_is_killed(server, both, host):
    works(server, both, host, "before")
    # Something is under way all the time, and waits for the server.
    run(server, both, """
        nohup bash -c 'for n in $(seq 200); do echo $n >> /data/count; done; touch /data/done' \
            > /dev/null 2>&1 &
    """)  # fmt: skip
    server.kill_9()
    server.start()
    works(server, both, host, "after")
    until_done = "until test -e /data/done; do sleep 0.1; done; seq 200 | cmp - /data/count"
    run(server, both, f"timeout 60 bash -c '{until_done}'")


def test_mounts_survive_pause_and_resume(server, both, host):
    works(server, both, host, "before")
    run(server, both, f"echo mark > {MARK}; exec 3> /data/open; echo one >&3; "
        "nohup bash -c 'until test -e /data/go; do sleep 0.1; done; echo two >&3' >/dev/null 2>&1 &")  # fmt: skip
    path = f"/sandboxes/{both['sandboxID']}"
    with server.http() as http:
        assert http.post(f"{path}/pause").status_code in (200, 204)
        refused = http.delete(f"/volumes/{http.get(path).json()['volumeMounts'][0]['name']}")
        assert refused.status_code == 409
        (host / "file").write_text("while it slept")
        assert http.post(f"{path}/connect", json={"timeout": 300}).status_code in (200, 201)
    # At once, not after a while: time does not pass in a sandbox that sleeps.
    assert run(server, both, "cat /mnt/host/file") == "while it slept"
    # A file that was open is open still.
    run(server, both, "touch /data/go")
    until_seen(server, both, "cat /data/open", "one\ntwo\n")
    assert run(server, both, f"cat {MARK}") == "mark\n"
    works(server, both, host, "after")


def test_mounts_survive_rollback_and_clone(server, both, host):
    works(server, both, host, "before")
    path = f"/sandboxes/{both['sandboxID']}"
    with server.http() as http:
        taken = http.post(f"{path}/snapshots", json={})
        assert taken.status_code == 201, taken.text
        snapshot = taken.json()["snapshotID"]
        run(server, both, f"echo later > {MARK} && echo later > /data/later")
        (host / "file").write_text("while it went on")
        back = http.post(f"{path}/rollback", json={"snapshotID": snapshot})
        assert back.status_code == 200, back.text
        assert "No such" in run(server, both, f"cat {MARK}", check=False)
        # A volume is not a part of a snapshot: what was written to it stays.
        assert run(server, both, "cat /data/later") == "later\n"
        assert run(server, both, "cat /mnt/host/file") == "while it went on"
        works(server, both, host, "rolled-back")

        forked = http.post(f"{path}/fork", json={"count": 2, "timeout": 120})
        assert forked.status_code == 201, forked.text
        children = [one["sandbox"]["sandboxID"] for one in forked.json()]
        heir = server.create(templateID=snapshot, timeout=120)["sandboxID"]
        for n, child in enumerate([*children, heir]):
            works(server, child, host, f"child-{n}")
        # All of them, and the first one, in the same file.
        until_seen(server, both, "tail -n 3 /data/log", "child-0\nchild-1\nchild-2\n")
        for child in [*children, heir]:
            http.delete(f"/sandboxes/{child}")
        assert http.delete(f"/templates/{snapshot}").status_code == 204


def test_nothing_is_left(server, volume, host):
    """What sandboxes had mounted goes with them, and what was in it does not."""
    (host / "kept").write_text("kept")
    process = server.process.pid

    def descriptors() -> int:
        import os

        return len(os.listdir(f"/proc/{process}/fd"))

    mounts = json.dumps([{"hostPath": str(host), "mountPath": "/mnt/host"}])
    body = {
        "timeout": 60,
        "volumeMounts": [{"name": volume["name"], "path": "/data"}],
        "metadata": {"host-mount": mounts},
    }
    server.kill(server.create(**body))
    time.sleep(1)
    before = descriptors()
    for _ in range(5):
        sandbox = server.create(**body)
        run(server, sandbox, "ls /data /mnt/host; touch /data/x")
        server.kill(sandbox)
    time.sleep(1)
    assert descriptors() <= before + 8
    assert [path.name for path in host.iterdir()] == ["kept"]


@pytest.mark.parametrize("language", ["python", "javascript"])
def test_a_volume_is_filled_and_read_without_a_sandbox(server, language):
    """E2B's own clients do it; a sandbox sees what they did, and the other way round."""
    if language == "python":
        command = [venv("e2b==2.63.0"), CLIENTS / "e2b_volumes.py"]
    else:
        command = node("e2b_volumes.mjs", "e2b@2.51.0")
    result = subprocess.run(
        command, env=bare_env(server.env), capture_output=True, text=True, timeout=120
    )
    assert result.stdout == "done\n", result.stderr


def test_volumes_on_the_command_line(server, tmp_path):
    name = f"cli-{uuid.uuid4().hex[:8]}"
    created = server.cli("volume", "create", name).stdout.strip()
    assert created.startswith("vol-")
    listed = json.loads(server.cli("--json", "volume", "ls").stdout)
    assert {"volumeID": created, "name": name} in listed
    assert json.loads(server.cli("--json", "volume", "info", name).stdout)["volumeID"] == created
    made = server.cli("sandbox", "create", "base", "--volume", f"{name}:/data").stdout.strip()
    run(server, made, "echo hello > /data/file")
    refused = server.cli("volume", "rm", name, check=False)
    assert refused.returncode != 0 and made in refused.stderr
    server.cli("sandbox", "kill", made)
    server.cli("volume", "cp", f"{name}:file", str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "hello\n"
    (tmp_path / "tree/sub").mkdir(parents=True)
    (tmp_path / "tree/sub/one").write_text("1")
    (tmp_path / "tree/two").write_text("2")
    copied = server.cli("--json", "volume", "cp", str(tmp_path / "tree"), f"{name}:/copy")
    assert json.loads(copied.stdout) == {"files": 2, "bytes": 2}
    server.cli("volume", "cp", f"{name}:/", str(tmp_path / "all"))
    assert (tmp_path / "all/copy/sub/one").read_text() == "1"
    missing = server.cli("volume", "cp", f"{name}:/no", str(tmp_path), check=False)
    assert missing.returncode != 0 and "/no in volume" in missing.stderr
    assert server.cli("volume", "rm", name).stdout.strip() == name
    assert server.cli("volume", "rm", name, check=False).returncode != 0
