"""The programs in examples/ do what they say, with the client that a reader would install."""

import subprocess

import pytest
from conftest import ROOT, bare_env, venv

EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(server, example):
    result = subprocess.run(
        [venv("cubesandbox==0.7.3"), example],
        env=bare_env(server.env), capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    with server.http() as http:
        assert http.get("/snapshots").json() == [], "it takes its snapshots away"
