"""One Cubicle for all tests: real VMs, real clients, one template boot shared by the whole run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from images import Image, Registry

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(os.environ.get("CUBICLE_BIN", ROOT / "target/release/cubicle"))
CLIENTS = Path(__file__).parent / "clients"
# Kept between runs: the template is built once for as long as its inputs do not change.
DATA_DIR = Path(os.environ.get("CUBICLE_TEST_DATA_DIR", "/var/lib/cubicle-test"))
CACHE = Path(os.environ.get("CUBICLE_TEST_CACHE", Path.home() / ".cache/cubicle-test"))
# What sandboxes may mount of this machine.
SHARED = Path(tempfile.gettempdir()) / f"cubicle-shared-{os.getpid()}"
READY_WITHIN = 900  # seconds; the first start builds the template


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Server:
    """A running `cubicle up` and how to talk to it."""

    data_dir: Path
    port: int
    options: list[str] = field(default_factory=list)
    process: subprocess.Popen | None = None
    log: Path | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> "Server":
        self.log = Path(tempfile.mkstemp(prefix="cubicle-up-", suffix=".log")[1])
        command = [
            str(BIN), "--json", "--data-dir", str(self.data_dir),
            "up", "--listen", f"127.0.0.1:{self.port}", "--no-self-check", *self.options,
        ]  # fmt: skip
        with self.log.open("w") as stderr:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stderr, text=True
            )
        deadline = time.monotonic() + READY_WITHIN
        said = []
        for line in self.process.stdout:
            said.append(line)
            if json.loads(line).get("event") == "ready":
                return self
            if time.monotonic() > deadline:
                break
        self.stop()
        said.append(self.log.read_text()[-4000:])
        raise RuntimeError(f"`cubicle up` did not get ready:\n{''.join(said)}")

    def kill_9(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                raise RuntimeError("`cubicle up` did not stop within 60 s of Ctrl-C")

    def command(self, *args: str) -> list[str]:
        return [str(BIN), "--data-dir", str(self.data_dir), *args]

    def cli(self, *args: str, check: bool = True, **options) -> subprocess.CompletedProcess:
        options.setdefault("timeout", 120)
        return subprocess.run(
            self.command(*args), capture_output=True, text=True, check=check, **options
        )

    @property
    def env(self) -> dict[str, str]:
        """What `eval "$(cubicle env)"` would set, and nothing else of ours."""
        return json.loads(self.cli("--json", "env").stdout)

    @property
    def key(self) -> str:
        return self.env["E2B_API_KEY"]

    def http(self, **options) -> httpx.Client:
        headers = {"X-API-Key": self.key}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, **options)

    def gauge(self, name: str, **labels: str) -> int:
        """A metric of the server, summed over all labels but those that are given."""
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        with self.http() as http:
            lines = http.get("/metrics").text.splitlines()
        found = [
            int(line.split()[-1])
            for line in lines
            if line.startswith(f"{name}{{") and all(label in line for label in wanted)
        ]
        assert found, f"there is no metric {name} with {labels}"
        return sum(found)

    def create(self, **body) -> dict:
        with self.http() as http:
            response = http.post("/v2/sandboxes", json={"templateID": "base", **body})
            response.raise_for_status()
            return response.json()

    def kill(self, sandbox: dict) -> None:
        with self.http() as http:
            http.delete(f"/sandboxes/{sandbox['sandboxID']}")

    def clear(self) -> list[str]:
        """Removes all sandboxes and snapshots; returns what there was."""
        with self.http() as http:
            sandboxes = [each["sandboxID"] for each in http.get("/v2/sandboxes").json()]
            snapshots = [each["snapshotID"] for each in http.get("/snapshots").json()]
            for id in sandboxes:
                http.delete(f"/sandboxes/{id}")
            for id in snapshots:
                http.delete(f"/templates/{id}")
        return sandboxes + snapshots


def require_machine() -> None:
    """These tests are about real VMs: without root there are none, and that must not look green."""
    if os.geteuid() != 0:
        pytest.exit("the end-to-end tests need root (they make VMs and networks)", returncode=1)
    if not BIN.exists():
        pytest.exit(f"{BIN} is missing: run `make build` first", returncode=1)


@pytest.fixture(scope="session")
def image() -> Image:
    """A container image that needs no registry."""
    return Image.make(CACHE)


@pytest.fixture(scope="session")
def image_map(image, tmp_path_factory) -> Path:
    """What names of images mean here: there is no registry of the world."""
    directory = tmp_path_factory.mktemp("images")
    image.save(directory / "busybox.tar", "busybox:tests")
    path = directory / "map.json"
    names = {"busybox:tests": "docker-archive:busybox.tar", "python:*": "recipe:base"}
    path.write_text(json.dumps(names))
    return path


@pytest.fixture(scope="session")
def registry(tmp_path_factory):
    registry = Registry(tmp_path_factory.mktemp("registry"))
    yield registry
    registry.stop()


@pytest.fixture(scope="session")
def server(image_map):
    require_machine()
    SHARED.mkdir(exist_ok=True)
    options = ["--host-mount-allow", str(SHARED), "--image-map", str(image_map)]
    server = Server(DATA_DIR, free_port(), options).start()
    # An earlier run may have been interrupted.
    server.clear()
    yield server
    server.stop()
    shutil.rmtree(SHARED)


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    """A test leaves no sandbox and no snapshot to the next one."""
    if "server" not in request.fixturenames:
        yield
        return
    server = request.getfixturevalue("server")
    yield
    # A class of tests may run another server meanwhile.
    if server.process.poll() is None:
        left = server.clear()
        assert not left, f"the test leaves {left}"


@pytest.fixture
def sandbox(server):
    sandbox = server.create(timeout=120)
    yield sandbox
    server.kill(sandbox)


def venv(*requirements: str) -> Path:
    """A cached virtual environment that holds exactly these packages; returns its python."""
    name = "_".join(requirements).replace("==", "-").replace("/", "-")
    where = CACHE / f"venv-{name}"
    python = where / "bin/python"
    if not (where / ".ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", where], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *requirements], check=True)
        (where / ".ready").touch()
    return python


def node_modules(*packages: str) -> Path:
    """A cached npm project that holds exactly these packages."""
    name = "_".join(packages).replace("@", "-").replace("/", "-")
    where = CACHE / f"npm-{name}"
    if not (where / ".ready").exists():
        where.mkdir(parents=True, exist_ok=True)
        (where / "package.json").write_text('{"private": true, "type": "module"}\n')
        subprocess.run(
            ["npm", "install", "--silent", "--no-audit", "--no-fund", *packages],
            cwd=where, check=True,
        )  # fmt: skip
        (where / ".ready").touch()
    return where


def node(script: str, *packages: str) -> list[str | Path]:
    """The command that runs a client's script with exactly these packages."""
    project = node_modules(*packages)
    return ["node", shutil.copy(CLIENTS / script, project)]


def bare_env(variables: dict[str, str]) -> dict[str, str]:
    """An environment with a PATH, a HOME and these variables."""
    return {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/root"), **variables}
