"""Snapshots, clones, rollbacks, pauses: by real clients, across crashes, and without leaks."""

import json
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

from conftest import CLIENTS, Server, bare_env, free_port, venv
from machine import at_rest, settled


def report(server: Server, script: str, *requirements: str) -> dict:
    result = subprocess.run(
        [venv(*requirements), CLIENTS / script],
        env=bare_env(server.env), capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def check_cube(found: dict) -> None:
    assert found["listed"] == 2
    assert found["rollback"] == "READY"
    assert found["rolled_back"] == ["one", "one"]
    assert found["clones"] == [["one", "one"]] * 3
    assert found["distinct"] == 3
    assert found.get("forks", ["one", "one"]) == ["one", "one"]
    assert found["paused"] == "paused"
    assert found["resumed"] == ["one", "one"]


def test_cube_python_0_7_3(server):
    check_cube(report(server, "cube_snapshots.py", "cubesandbox==0.7.3"))


def test_cube_python_0_2_1(server):
    server.stop()
    keyless = Server(server.data_dir, free_port(), ["--no-auth"]).start()
    try:
        check_cube(report(keyless, "cube_snapshots.py", "cubesandbox==0.2.1"))
    finally:
        keyless.stop()
        server.start()


def test_e2b_python(server):
    found = report(server, "e2b_snapshots.py", "e2b==2.63.0")
    assert found["from_snapshot"] == "one"
    assert found["running_while_paused"] is False
    assert found["resumed"] == "two"
    assert found["processes"] == 1
    assert found["clock_off"] < 1.0


def test_a_paused_sandbox_and_a_snapshot_survive_kill_9(server):
    with server.http() as http:
        paused, running = server.create(timeout=300), server.create(timeout=300)
        write(http, paused, "/dev/shm/kept", "in memory")
        write(http, running, "/dev/shm/kept", "as well")
        assert http.post(f"/sandboxes/{paused['sandboxID']}/pause").status_code == 204
        taken = http.post(f"/sandboxes/{running['sandboxID']}/snapshots", json={})
        snapshot = taken.json()["snapshotID"]
    server.kill_9()
    server.start()
    with server.http() as http:
        states = {
            each["sandboxID"]: each["state"]
            for each in http.get("/v2/sandboxes", params={"state": "running,paused"}).json()
        }
        assert states[paused["sandboxID"]] == "paused"
        assert states[running["sandboxID"]] == "running"
        resumed = http.post(f"/v2/sandboxes/{paused['sandboxID']}/connect", json={})
        assert resumed.status_code == 201
        assert read(http, paused, "/dev/shm/kept") == "in memory"
        clone = server.create(templateID=snapshot, timeout=60)
        assert read(http, clone, "/dev/shm/kept") == "as well"
        # Its next snapshot descends from what it was captured as before the crash.
        again = http.post(f"/sandboxes/{running['sandboxID']}/snapshots", json={})
        assert again.status_code == 201
        for each in (paused, running, clone):
            server.kill(each)
        for each in (snapshot, again.json()["snapshotID"]):
            assert http.delete(f"/templates/{each.replace('/', '%2F')}").status_code == 204


def test_traffic_wakes_only_who_wants_to_be_woken(server):
    with server.http() as http:
        for wakes in (True, False):
            sandbox = server.create(timeout=300, autoPause=True, autoResume={"enabled": wakes})
            write(http, sandbox, "/tmp/note", "here")
            assert http.post(f"/sandboxes/{sandbox['sandboxID']}/pause").status_code == 204
            answer = ask(http, sandbox, "/tmp/note")
            assert answer.status_code == (200 if wakes else 502), answer.text
            state = http.get(f"/sandboxes/{sandbox['sandboxID']}").json()["state"]
            assert state == ("running" if wakes else "paused")
            server.kill(sandbox)


def test_a_timeout_pauses_who_asked_for_it(server):
    with server.http() as http:
        sandbox = server.create(timeout=300, autoPause=True)
        write(http, sandbox, "/dev/shm/kept", "yes")
        http.post(f"/sandboxes/{sandbox['sandboxID']}/timeout", json={"timeout": 0})
        deadline = time.monotonic() + 20
        while http.get(f"/sandboxes/{sandbox['sandboxID']}").json()["state"] != "paused":
            assert time.monotonic() < deadline, "it is not paused"
            # Whoever asks meanwhile is told either that it runs or that it does not.
            assert ask(http, sandbox, "/dev/shm/kept").status_code in (200, 502)
            time.sleep(0.05)
        http.post(f"/v2/sandboxes/{sandbox['sandboxID']}/connect", json={"timeout": 60})
        assert read(http, sandbox, "/dev/shm/kept") == "yes"
        server.kill(sandbox)


def kept_after_pause(server) -> int:
    """How many VMs of paused sandboxes are kept for their resume."""
    return server.gauge("cubicle_node_spares", kind="paused")


def until_kept(server, count: int) -> None:
    deadline = time.monotonic() + 20
    while (found := kept_after_pause(server)) != count:
        assert time.monotonic() < deadline, f"{found} VMs are kept, not {count}"
        time.sleep(0.05)


def test_a_sandbox_that_is_back_soon_gets_its_vm_back(server):
    with server.http() as http:
        # Those of other tests go by themselves.
        deadline = time.monotonic() + 90
        while kept_after_pause(server) > 0:
            assert time.monotonic() < deadline, "a VM is kept for longer than a minute"
            time.sleep(1)
        sandbox = server.create(timeout=300)
        path = f"/sandboxes/{sandbox['sandboxID']}"
        for turn in range(3):
            write(http, sandbox, "/dev/shm/turn", str(turn))
            assert http.post(f"{path}/pause").status_code == 204
            until_kept(server, 1)
            assert http.get(path).json()["state"] == "paused"
            assert http.post(f"/v2{path}/connect", json={}).status_code == 201
            assert kept_after_pause(server) == 0
            assert read(http, sandbox, "/dev/shm/turn") == str(turn)
        # Of a sandbox that is killed nothing is kept.
        assert http.post(f"{path}/pause").status_code == 204
        until_kept(server, 1)
        server.kill(sandbox)
        until_kept(server, 0)


def test_what_comes_and_goes_leaves_nothing(server):
    server.stop()
    # Spares come and go by themselves.
    alone = Server(server.data_dir, free_port(), ["--spares", "0"]).start()
    try:

        def cycle(_):
            with alone.http() as http:
                sandbox = alone.create(timeout=120)
                path = f"/sandboxes/{sandbox['sandboxID']}"
                taken = http.post(f"{path}/snapshots", json={})
                assert taken.status_code == 201, taken.text
                snapshot = taken.json()["snapshotID"]
                rolled = http.post(f"{path}/rollback", json={"snapshotID": snapshot})
                assert rolled.status_code == 200, rolled.text
                forked = http.post(f"{path}/fork", json={"count": 2, "timeout": 60})
                assert forked.status_code == 201, forked.text
                assert http.post(f"{path}/pause").status_code == 204
                assert http.post(f"/v2{path}/connect", json={}).status_code == 201
                for each in forked.json():
                    alone.kill(each["sandbox"])
                alone.kill(sandbox)
                deleted = http.delete(f"/templates/{snapshot.replace('/', '%2F')}")
                assert deleted.status_code == 204, deleted.text

        # Pools grow with the first ones.
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(cycle, range(3)))
        before = at_rest(alone, spares=0)
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(cycle, range(9)))
        assert settled(alone, before) == before
    finally:
        alone.stop()
        server.start()


def envd(sandbox: dict) -> dict:
    return {
        "E2b-Sandbox-Id": sandbox["sandboxID"],
        "E2b-Sandbox-Port": "49983",
        "X-Access-Token": sandbox["envdAccessToken"],
    }


def write(http, sandbox: dict, path: str, text: str) -> None:
    answer = http.post(
        "/files",
        params={"path": path, "username": "user"},
        content=text.encode(),
        headers=envd(sandbox) | {"content-type": "application/octet-stream"},
    )
    assert answer.status_code == 200, answer.text


def ask(http, sandbox: dict, path: str):
    return http.get("/files", params={"path": path, "username": "user"}, headers=envd(sandbox))


def read(http, sandbox: dict, path: str) -> str:
    answer = ask(http, sandbox, path)
    assert answer.status_code == 200, answer.text
    return answer.text
