"""What this machine holds at a moment: everything that a sandbox could leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path


def _lines(*command: str) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def _links() -> set[str]:
    return {link["ifname"] for link in json.loads("".join(_lines("ip", "-json", "link")))}


def _nft() -> int:
    """Rules, sets and set elements in the host's own tables."""
    listing = json.loads("".join(_lines("nft", "-j", "list", "ruleset")))["nftables"]
    elements = sum(len(item["set"].get("elem", [])) for item in listing if "set" in item)
    return len(listing) + elements


def vms() -> set[int]:
    """The processes that run VMs: those of sandboxes, and those that wait for a sandbox to come."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                program = (entry / "cmdline").read_bytes().split(b"\0")[0]
            except OSError:
                continue
            if program.endswith(b"qemu-system-x86_64"):
                found.add(int(entry.name))
    return found


def census(data_dir: Path, server_pid: int | None = None) -> dict[str, object]:
    """Counts of all kinds of things; equal before and after means that nothing leaked."""
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    things: dict[str, object] = {
        "processes": len(vms()),
        "links": len(_links()),
        "namespaces": sum(" nsfs " in line for line in mounts),
        "mounts": len(mounts),
        "loop devices": len(_lines("losetup", "--list", "--noheadings", "--output", "NAME")),
        "nft": _nft(),
        "cgroups": sum(1 for path in Path("/sys/fs/cgroup").rglob("*cubicle*") if path.is_dir()),
        "volumes": sum(1 for path in data_dir.rglob("volumes/*")),
        "run files": sum(1 for path in Path("/run/cubicle").rglob("*")),
    }
    if server_pid:
        things["server's descriptors"] = len(os.listdir(f"/proc/{server_pid}/fd"))
    return things


def at_rest(server, spares: int) -> dict:
    """The census once no more is kept for sandboxes to come than a machine at rest keeps."""
    rest = {"spares": spares, "slots_ready": 8}
    deadline = time.monotonic() + 60
    before = None
    while True:
        found = {name: server.gauge(f"cubicle_node_{name}") for name in rest}
        now = census(server.data_dir, server.process.pid)
        # What is on its way out is in none of the numbers above.
        if found == rest and now == before:
            return now
        assert time.monotonic() < deadline, f"{found} are kept, not {rest}"
        before = now
        time.sleep(1)


def settled(server, before: dict, within: float = 30) -> dict:
    """The census once it equals `before`, or the last one: slots are recycled in the background."""
    deadline = time.monotonic() + within
    while True:
        now = census(server.data_dir, server.process.pid)
        # Idle keep-alive connections come and go; a leak is one descriptor per sandbox.
        spread = now["server's descriptors"] - before["server's descriptors"]
        if abs(spread) <= 8:
            now["server's descriptors"] = before["server's descriptors"]
        if now == before or time.monotonic() > deadline:
            return now
        time.sleep(0.2)
