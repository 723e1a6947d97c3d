"""A sandbox is confined: its process on the host, and its network."""

import json
import subprocess
import time
from pathlib import Path

import pytest
from machine import vms


def exec(server, sandbox: dict, *command: str, check: bool = True):
    return server.cli("sandbox", "exec", sandbox["sandboxID"], "--", *command, check=check)


def test_the_vm_process_has_no_powers(server, sandbox):
    host_network = Path("/proc/self/ns/net").stat().st_ino

    def status(pid: int) -> dict[str, str]:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return dict(line.split(":\t", 1) for line in lines if ":\t" in line)

    # Those that wait for a sandbox to come are no less confined. One that starts just now installs
    # its filter before it loads a guest.
    assert vms()
    for pid in vms():
        deadline = time.monotonic() + 5
        while (seen := status(pid))["Seccomp"] != "2":
            assert time.monotonic() < deadline, "no filter of system calls"
            time.sleep(0.05)
        assert int(seen["Uid"].split()[0]) >= 200_000
        assert len(set(seen["Uid"].split())) == 1
        for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(seen[kind], 16) == 0, kind
        assert seen["NoNewPrivs"] == "1"
        assert Path(f"/proc/{pid}/ns/net").stat().st_ino != host_network


def test_private_networks_and_the_host_are_out_of_reach(server, sandbox):
    probe = """
import json, socket, sys
out = {}
for host, port in json.loads(sys.argv[1]):
    s = socket.socket(); s.settimeout(2)
    try:
        s.connect((host, port)); out[host] = "connected"
    except Exception as error:
        out[host] = type(error).__name__
print(json.dumps(out))
"""
    targets = [
        ["169.254.169.254", 80], ["10.0.0.1", 80], ["172.16.0.1", 80], ["192.168.0.1", 80],
        ["169.254.0.22", server.port], ["10.233.0.1", server.port], ["10.233.0.2", 49983],
    ]  # fmt: skip
    output = exec(server, sandbox, "python3", "-c", probe, json.dumps(targets)).stdout
    reached = [host for host, how in json.loads(output).items() if how == "connected"]
    assert reached == []


@pytest.fixture
def outside(tmp_path):
    """Address of a server that is neither on this machine nor in a private network."""
    name, link, address = "cubicle-outside", "cubicle-test0", "198.51.100"

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    # An earlier run may have been interrupted.
    subprocess.run(["ip", "netns", "delete", name], stderr=subprocess.DEVNULL)
    ip("netns", "add", name)
    server = None
    try:
        ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("address", "add", f"{address}.1/30", "dev", link)
        ip("link", "set", link, "up")
        ip("-n", name, "address", "add", f"{address}.2/30", "dev", "eth0")
        ip("-n", name, "link", "set", "eth0", "up")
        ip("-n", name, "route", "add", "default", "via", f"{address}.1")
        # It is no uplink, so nobody has switched this on: answers come back through it.
        Path(f"/proc/sys/net/ipv4/conf/{link}/forwarding").write_text("1")
        serve = ["python3", "-u", "-m", "http.server", "80", "--directory", str(tmp_path)]
        server = subprocess.Popen(
            ["ip", "netns", "exec", name, *serve], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert b"Serving" in server.stdout.readline()
        yield f"{address}.2"
    finally:
        if server:
            server.kill()
            server.wait()
        ip("netns", "delete", name)


def test_what_it_may_reach_changes_while_it_runs(server, sandbox, outside):
    def reaches() -> bool:
        probe = f"import socket; socket.create_connection(('{outside}', 80), 3)"
        return exec(server, sandbox, "python3", "-c", probe, check=False).returncode == 0

    with server.http() as http:
        path = f"/sandboxes/{sandbox['sandboxID']}"

        def change(**network) -> None:
            changed = http.put(f"{path}/network", json=network)
            assert changed.status_code == 204, changed.text

        assert reaches()
        change(denyOut=[f"{outside}/32"])
        assert not reaches()
        change(allowOut=[outside], allow_internet_access=False)
        assert reaches()
        change(allow_internet_access=False)
        assert not reaches()
        assert http.put(f"{path}/network", json={"denyOut": ["example.com"]}).status_code == 400
        assert http.post(f"{path}/pause").status_code == 204
        assert http.put(f"{path}/network", json={}).status_code == 409
        assert http.post(f"/v2{path}/connect", json={"timeout": 60}).status_code == 201
        assert not reaches(), "it is what it was when it fell asleep"
        change()
        assert reaches()

    def network(*arguments: str) -> list[str]:
        shown = server.cli("sandbox", "network", sandbox["sandboxID"], *arguments).stdout
        return [line.split(maxsplit=1)[1] for line in shown.splitlines()]

    assert network() == ["yes", "-", "-"]
    assert network("--no-internet", "--allow-out", outside) == ["no", f"{outside}/32", "-"]
    assert reaches()
    assert network("--deny-out", outside) == ["yes", "-", f"{outside}/32"]
    assert not reaches()
    assert network("--reset") == network() == ["yes", "-", "-"]
    assert reaches()


def test_two_sandboxes_are_strangers(server, sandbox):
    other = server.create()
    try:
        facts = [
            exec(server, each, "bash", "-c", "cat /etc/machine-id /etc/hostname; "
                 "head -c 16 /dev/urandom | od -An -tx1; cat /proc/sys/kernel/random/uuid").stdout
            for each in (sandbox, other)
        ]  # fmt: skip
        for mine, theirs in zip(*(fact.split("\n") for fact in facts)):
            assert mine == "" or mine != theirs
        assert sandbox["envdAccessToken"] != other["envdAccessToken"]
    finally:
        server.kill(other)


def test_the_clock_is_right(server, sandbox):
    inside = float(exec(server, sandbox, "date", "+%s.%N").stdout)
    assert abs(inside - time.time()) < 2
