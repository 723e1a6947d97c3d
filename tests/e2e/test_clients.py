"""Unmodified clients from their registries, configured by `cubicle env` alone."""

import json
import subprocess

import pytest
from conftest import CLIENTS, Server, bare_env, free_port, node, venv


@pytest.mark.parametrize("version", ["2.63.0", "2.45.1"])
def test_e2b_python(server, version):
    python = venv(f"e2b=={version}")
    result = subprocess.run(
        [python, CLIENTS / "e2b_quickstart.py"],
        env=bare_env(server.env), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.stdout == "4\n", result.stderr


@pytest.mark.parametrize("version", ["2.51.0", "2.45.0"])
def test_e2b_javascript(server, version):
    result = subprocess.run(
        node("e2b_quickstart.mjs", f"e2b@{version}"),
        env=bare_env(server.env), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.stdout == "4\n", result.stderr


def cube(server: Server, version: str) -> dict:
    python = venv(f"cubesandbox=={version}")
    result = subprocess.run(
        [python, CLIENTS / "cube_quickstart.py"],
        env=bare_env(server.env), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def check_cube(report: dict) -> None:
    assert report["sum"] == "4"
    assert report["note"] == "kept"
    assert report["listed"]
    codes = {name: code for name, (code, _) in report["exits"].items()}
    assert codes.pop("kill") in (-1, 137)
    assert codes == {"0": 0, "1": 1, "127": 127, "background": 3}
    slow = {name: seconds for name, (_, seconds) in report["exits"].items() if seconds > 5}
    assert not slow, "a command's end arrived late"


def test_cube_python_0_7_3(server):
    check_cube(cube(server, "0.7.3"))


class TestWithoutKeys:
    """Cube's client 0.2.1 sends no key at all."""

    @pytest.fixture(scope="class")
    @classmethod
    def keyless(cls, server):
        server.stop()
        keyless = Server(server.data_dir, free_port(), ["--no-auth"]).start()
        yield keyless
        keyless.stop()
        server.start()

    def test_cube_python_0_2_1(self, keyless):
        check_cube(cube(keyless, "0.2.1"))

    def test_it_refuses_to_listen_beyond_loopback(self, keyless):
        result = keyless.cli("up", "--no-auth", "--listen", "0.0.0.0:0", check=False)
        assert result.returncode != 0
        assert "loopback" in result.stderr
