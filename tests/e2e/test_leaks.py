"""Whatever happens to sandboxes, the machine ends up holding what it held before."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from machine import at_rest, census, settled

CYCLES = int(os.environ.get("CUBICLE_TEST_CYCLES", "80"))


def test_creating_and_killing_leaves_nothing(server):
    def cycle(_: int) -> None:
        server.kill(server.create())

    # No spares of what other tests used, which would go while this one counts.
    server.stop()
    server.start()
    with ThreadPoolExecutor(8) as pool:
        # What is kept for more to come grows with the first ones.
        list(pool.map(cycle, range(24)))
        before = at_rest(server, spares=1)
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


def test_a_start_that_fails_leaves_nothing(server):
    server.stop()
    before = census(server.data_dir)
    # Where clients look for the server there is something that cannot be replaced.
    client = server.data_dir / "client.json"
    kept = client.rename(client.with_suffix(".kept"))
    client.mkdir()
    try:
        with pytest.raises(RuntimeError, match="client.json"):
            server.start()
        assert census(server.data_dir) == before
    finally:
        client.rmdir()
        kept.rename(client)
    server.start()
