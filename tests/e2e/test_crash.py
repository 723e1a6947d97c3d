"""A server that is killed without warning takes nothing with it."""

import subprocess
import time

from conftest import bare_env, venv
from machine import vms

# One client object lives through the crash: it must not notice.
CLIENT = """
import sys
from e2b import Sandbox
sandboxes = [Sandbox.create("base", timeout=40) for _ in range(3)]
for number, sandbox in enumerate(sandboxes):
    sandbox.files.write("/home/user/number", str(number))
background = sandboxes[0].commands.run("sleep 1000", background=True)
print("created", flush=True)
sys.stdin.readline()
for number, sandbox in enumerate(sandboxes):
    assert sandbox.files.read("/home/user/number") == str(number)
    assert sandbox.commands.run("echo alive").stdout == "alive\\n"
    assert sandbox.is_running()
pids = [process.pid for process in sandboxes[0].commands.list()]
assert background.pid in pids, "the background command died with the server"
print("alive", flush=True)
"""


def test_sandboxes_survive_kill_9(server):
    client = subprocess.Popen(
        [venv("e2b==2.63.0"), "-c", CLIENT], env=bare_env(server.env),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    created = time.monotonic()
    assert client.stdout.readline() == "created\n", client.stderr.read()
    running = vms()
    assert len(running) >= 3

    server.kill_9()
    assert running <= vms(), "VMs died with the server"
    server.start()

    output, errors = client.communicate("go on\n", timeout=60)
    assert output == "alive\n", errors

    # Their time to live goes on as if nothing had happened.
    while vms() & running and time.monotonic() < created + 60:
        time.sleep(0.5)
    with server.http() as http:
        assert http.get("/v2/sandboxes").json() == []
    assert 30 < time.monotonic() - created < 60
