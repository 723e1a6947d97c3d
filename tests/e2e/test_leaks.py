"""Whatever happens to sandboxes, the machine ends up holding what it held before."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

from machine import census

CYCLES = int(os.environ.get("CUBICLE_TEST_CYCLES", "80"))


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


def test_creating_and_killing_leaves_nothing(server):
    def cycle(_: int) -> None:
        server.kill(server.create())

    with ThreadPoolExecutor(8) as pool:
        # Pools grow with the first ones, to what this many at a time need, and stay so.
        list(pool.map(cycle, range(24)))
        time.sleep(3)
        before = census(server.data_dir, server.process.pid)
        list(pool.map(cycle, range(CYCLES)))
    assert settled(server, before) == before
    with server.http() as http:
        assert http.get("/v2/sandboxes").json() == []


def test_stopping_leaves_nothing(server):
    server.stop()
    before = census(server.data_dir)
    server.start()
    for _ in range(2):
        server.create()
    server.stop()
    after = census(server.data_dir)
    server.start()
    assert after == before
