"""The template store: what is in it, installed for real, and used."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import httpx
import pytest
from conftest import BIN

INSTALL_WITHIN = 1800  # seconds; an image that was never built is downloaded first


def cubicle(server, *args: str, within: int = 120) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(BIN), "--data-dir", str(server.data_dir), *args],
        capture_output=True, text=True, timeout=within,
    )  # fmt: skip


def install(server, name: str, *options: str) -> dict:
    done = cubicle(
        server, "--json", "template", "store", "install", name, *options, within=INSTALL_WITHIN
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1] if "\n{" in done.stdout else done.stdout)


def run(server, sandbox: dict, *command: str) -> str:
    done = server.cli("sandbox", "exec", sandbox["sandboxID"], "--", *command, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def node(server):
    """The template `node`; the image is kept between runs, as that of `base` is."""
    return install(server, "node")


@pytest.fixture
def sandbox(server, node):
    sandbox = server.create(templateID="node", timeout=300)
    yield sandbox
    server.kill(sandbox)


def test_the_store_lists_the_same_to_everybody(server):
    with server.http() as http:
        store = http.get("/cubicle/v1/store").json()
        assert http.get("/store").json() == store
        assert http.get("/cubeapi/v1/store").json() == store
    assert (store["version"], store["source"]) == (1, "shipped")
    told = json.loads(cubicle(server, "--json", "template", "store", "ls").stdout)
    assert told == store
    by_name = {each["name"]: each for each in store["templates"]}
    assert set(by_name) == {"base", "code-interpreter-v1", "node", "desktop-browser"}
    assert by_name["base"]["installed"]["buildStatus"] == "ready"
    assert by_name["code-interpreter-v1"]["ports"] == [49999]
    assert by_name["desktop-browser"]["ready"] == {
        "http": {"port": 9000, "path": "/cdp/json/version"}
    }
    # For people: a line for each.
    table = cubicle(server, "template", "store", "ls").stdout
    assert all(each["description"][:20] in table for each in store["templates"]), table


def test_node_runs_programs_and_installs_packages_of_its_own_kind(server, sandbox):
    script = "console.log(process.version, [1, 2, 3].map((x) => x * 2).join())"
    version, sum = run(server, sandbox, "node", "-e", script).split()
    assert version.startswith("v24.") and sum == "2,4,6"
    assert run(server, sandbox, "npm", "--version").startswith("11.")
    package = 'cd $(mktemp -d) && npm init -y >/dev/null && npm pkg get version'
    assert run(server, sandbox, "bash", "-c", package).strip() == '"1.0.0"'
    # What `base` has is there as well.
    assert run(server, sandbox, "python3", "-c", "print(6 * 7)").strip() == "42"


def test_nothing_of_the_machine_that_built_it_is_in_a_template(server, sandbox):
    script = "find /root /home /etc /run /tmp /usr/local/etc -xdev -mindepth 1"
    left = run(server, sandbox, "sudo", "sh", "-c", f"{script} 2>/dev/null || true")
    for trace in ("pip.conf", "npmrc", "netrc", "registries", "/.npm", "/.cache"):
        assert trace not in left, left
    environment = run(server, sandbox, "env").lower()
    assert "proxy" not in environment and "pip_" not in environment, environment


def test_what_is_installed_is_not_built_again(server, node):
    begun = time.monotonic()
    again = install(server, "node")
    assert again["cached"] and again["templateID"] == node["templateID"]
    print(f"installing what is there: {(time.monotonic() - begun) * 1000:.0f} ms")
    shown = json.loads(cubicle(server, "--json", "template", "store", "info", "node").stdout)
    assert shown["installed"]["templateID"] == node["templateID"]
    assert shown["installed"]["buildStatus"] == "ready"


def test_what_the_store_does_not_have_is_said(server):
    done = cubicle(server, "template", "store", "install", "no-such-template")
    assert done.returncode != 0
    assert "the template store has no template 'no-such-template'" in done.stderr


def test_a_catalogue_that_makes_no_sense_stops_the_start(server, tmp_path):
    catalogue = tmp_path / "catalogue.json"
    catalogue.write_text(
        json.dumps({"version": 1, "templates": [{"name": "x", "from": {"recipe": "nope"}}]})
    )
    # A data directory of its own: this must not disturb the server that runs.
    data = tmp_path / "data"
    data.mkdir()
    (data / "images").symlink_to(server.data_dir / "images")

    def start(store):
        command = [BIN, "--data-dir", data, "up", "--listen", "127.0.0.1:0", "--store", store]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode != 0
        # Nothing is mounted there, and nobody is left who uses it.
        assert str(data) not in Path("/proc/mounts").read_text()
        return done.stderr

    assert "http:// or https://" in start("ftp://store.example/c.json")
    said = start(catalogue)
    assert "catalogue.json" in said and "nope" in said, said


@pytest.mark.skipif(
    not os.environ.get("CUBICLE_TEST_DESKTOP"),
    reason="its image is large; CUBICLE_TEST_DESKTOP=1 builds it",
)
def test_the_browser_of_the_desktop_answers_through_the_proxy(server):
    install(server, "desktop-browser")
    sandbox = server.create(templateID="desktop-browser", timeout=600)
    id = sandbox["sandboxID"]
    try:
        headers = {"e2b-sandbox-id": id, "e2b-sandbox-port": "9000"}
        with httpx.Client(base_url=server.url, headers=headers, timeout=60) as http:
            begun = time.monotonic()
            version = http.get("/cdp/json/version").raise_for_status().json()
            print(f"first answer of DevTools: {(time.monotonic() - begun) * 1000:.0f} ms")
            assert "Chrome/" in version["Browser"]
            # Clients come back to where they were sent from, not to the guest's localhost.
            assert version["webSocketDebuggerUrl"].startswith(
                f"ws://127.0.0.1:{server.port}/cdp/devtools/browser/"
            )
            page = "data:text/html,%3Ctitle%3EIt%20works%3C/title%3E"
            http.put(f"/cdp/json/new?{page}").raise_for_status()
            deadline = time.monotonic() + 60
            while "It works" not in (
                titles := [each["title"] for each in http.get("/cdp/json/list").json()]
            ):
                assert time.monotonic() < deadline, titles
                time.sleep(0.5)
            screen = http.get("/", headers={**headers, "e2b-sandbox-port": "6080"})
            assert "noVNC" in screen.text
        # The screen shows something: it is not of one colour.
        run(server, sandbox, "scrot", "/tmp/screen.png")
        assert int(run(server, sandbox, "stat", "-c", "%s", "/tmp/screen.png")) > 2000
    finally:
        server.kill(sandbox)
