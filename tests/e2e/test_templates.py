"""Templates that unmodified clients build, of images, of steps, and with the command line."""

import concurrent.futures
import json
import signal
import subprocess
import time

import pytest
from conftest import CLIENTS, Server, bare_env, free_port, node, venv

# Builds boot VMs and run steps in them under software emulation.
pytestmark = pytest.mark.timeout(900)
BUILD_WITHIN = 600


@pytest.fixture
def name():
    return f"t{time.time_ns()}"


@pytest.fixture(autouse=True)
def no_template_is_left(server):
    def names() -> dict:
        with server.http() as http:
            return {each["templateID"]: each["aliases"] for each in http.get("/templates").json()}

    # A class of tests may run another server, and then has to clean up itself.
    if server.process.poll() is not None:
        yield
        return
    before = names()
    yield
    for template in names().keys() - before.keys():
        with server.http() as http:
            http.delete(f"/templates/{template}").raise_for_status()


@pytest.fixture
def context(tmp_path):
    """Files to copy, one of which is ignored."""
    files = {
        "app/main.py": "print('main')\n",
        "app/deep/er.txt": "deeper\n",
        "app/skip.log": "never\n",
        "note.txt": "note\n",
        "one.md": "1\n",
        "two.md": "2\n",
        ".dockerignore": "**/*.log\n",
    }
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def run(*command, env: dict) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, env=bare_env(env), capture_output=True, text=True, timeout=BUILD_WITHIN
    )


@pytest.mark.parametrize("version", ["2.63.0", "2.45.1"])
def test_e2b_python(server, name, context, version):
    python = venv(f"e2b=={version}")
    result = run(python, CLIENTS / "e2b_template.py", name, context, env=server.env)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    first, second = report["first"], report["second"]
    print(f"first build {first['seconds']} s, the same again {second['seconds']} s")
    assert (report["exists before"], report["exists after"]) == (False, True)
    assert first["template"] == second["template"]
    assert "told" in first["lines"], first["lines"]
    assert "told" not in second["lines"], "a step was run again"
    assert second["seconds"] < max(5, first["seconds"] / 2)
    assert report["tags"] == ["default", "v1"] or report["tags"] == ["v1", "default"]
    assert report["assigned"] == ["stable"]
    assert report["left"] == ["default", "stable"]
    assert report["sandbox"] == {
        "env": "hello hello world 1",
        "where": "/srv/out\nuser",
        "built": "hello from user in /srv/out",
        "app": "print('main')\ndeeper",
        "note": "640 user",
        "docs": "one.md\ntwo.md",
        "ignored": "deep\nmain.py",
        "server": "hello from user in /srv/out",
    }
    broken = report["broken"]
    assert broken["error"] == "BuildException"
    assert "7" in broken["message"]
    assert "# this line" in broken["line"], "the step is found again in the caller's own code"


@pytest.mark.parametrize("version", ["2.51.0"])
def test_e2b_javascript(server, name, context, version):
    script = node("e2b_template.mjs", f"e2b@{version}")
    result = run(*script, name, context, env=server.env)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    first, second = report["first"], report["second"]
    print(f"first build {first['seconds']:.2f} s, the same again {second['seconds']:.2f} s")
    assert second["seconds"] < max(5, first["seconds"] / 2)
    assert report["exists"]
    assert report["sandbox"] == {
        "built": "hello from user",
        "app": "print('main')",
        "note": "640",
        "server": "hello from user",
    }
    assert report["broken"]["error"] == "BuildError"
    assert "7" in report["broken"]["message"]
    assert "template.mjs" in report["broken"]["stack"]


def cube(server: Server, version: str, image: str, name: str) -> None:
    python = venv(f"cubesandbox=={version}")
    result = run(python, CLIENTS / "cube_template.py", image, name, env=server.env)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    print(f"built in {report['seconds']} s")
    assert report["status"] == ["READY", 100, ""]
    assert report["lines"]
    assert report["listed"]
    assert report["detail"] == ["READY", image, "READY"]
    assert report["sandbox"] == {
        "image": "busybox of the tests",
        "env": "yes yes",
        "started": "started",
    }
    assert report["rebuilt"] == "READY"
    assert report["broken"][0] == "FAILED" and "127.0.0.1:1" in report["broken"][1]
    assert report["template"] not in report["left"]


def test_cube_python_0_7_3(server, name):
    cube(server, "0.7.3", "busybox:tests", name)


def test_cube_python_0_7_3_from_a_registry(server, name, registry, image):
    image.push(registry, "busybox", "tests")
    cube(server, "0.7.3", f"127.0.0.1:{registry.port}/busybox:tests", name)


class TestWithoutKeys:
    """Cube's client 0.2.1 sends no key at all."""

    @pytest.fixture(scope="class")
    @classmethod
    def keyless(cls, server):
        server.stop()
        keyless = Server(server.data_dir, free_port(), ["--no-auth", *server.options]).start()
        yield keyless
        keyless.stop()
        server.start()

    def test_cube_python_0_2_1(self, keyless, name):
        cube(keyless, "0.2.1", "busybox:tests", name)


def test_ten_builds_with_one_request_id_are_one(server, name):
    body = {"image": "busybox:tests", "requestID": name, "memory": 512, "cpu": 1000}

    def ask(body: dict):
        with server.http() as http:
            return http.post("/templates", json=body)

    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(ask, [body] * 10))
    assert [each.status_code for each in answers] == [202] * 10, [each.text for each in answers]
    jobs = {(each.json()["templateID"], each.json()["jobID"]) for each in answers}
    assert len(jobs) == 1
    other = ask({**body, "image": "python:3.12"})
    assert other.status_code == 409
    assert other.json()["error_code"] == "idempotency_request_mismatch"
    (template, job) = jobs.pop()
    deadline = time.monotonic() + BUILD_WITHIN
    with server.http() as http:
        status = {"status": "PENDING"}
        while status["status"] not in ("READY", "FAILED"):
            assert time.monotonic() < deadline
            time.sleep(0.2)
            status = http.get(f"/templates/{template}/builds/{job}/status").json()
        assert status["status"] == "READY", status
        assert len(http.get(f"/templates/{template}").json()["builds"]) == 1


DOCKERFILE = """\
ARG WHICH=tests
FROM busybox:${WHICH}
LABEL org.example.title="a test"
USER root
ENV GREETING="hello $FROM_IMAGE"
WORKDIR /srv/app
COPY --chown=app:app --chmod=0750 note.txt app/ ./
COPY *.md /srv/docs/
RUN <<END
set -e
echo "$GREETING from $(id -un)" > built
END
RUN ["sh", "-c", "echo \\"$GREETING\\" in exec form > exec"]
USER app
EXPOSE 8000
CMD ["sh", "-c", "echo served > /tmp/served; exec sleep 100000"]
"""


def test_the_command_line_builds_a_directory(server, name, context):
    (context / "Dockerfile").write_text(DOCKERFILE)
    started = time.monotonic()
    build = ["template", "build", f"{name}:v1", str(context)]
    more = ["--tag", "new", "--memory", "512", "--env", "OWN=1", "--ready", "test -e /tmp/served"]
    first = server.cli("--json", *build, *more, timeout=BUILD_WITHIN)
    took = time.monotonic() - started
    first = json.loads(first.stdout)
    started = time.monotonic()
    again = server.cli(*build, *more, timeout=BUILD_WITHIN)
    print(f"first build {took:.2f} s, the same again {time.monotonic() - started:.2f} s")
    assert first["templateID"] in again.stdout
    assert "LABEL has no effect" in again.stderr
    assert "from root" not in again.stderr

    sandbox = server.create(templateID=f"{name}:new", timeout=120)
    try:

        def inside(command: str) -> str:
            return server.cli("sandbox", "exec", sandbox["sandboxID"], command).stdout.strip()

        assert inside("pwd; id -un; echo $GREETING $OWN") == "/srv/app\napp\nhello yes 1"
        assert inside("cat built exec") == "hello yes from root\nhello yes in exec form"
        assert inside("stat -c '%a %U' note.txt deep/er.txt") == "750 app\n750 app"
        assert inside("ls /srv/docs; ls") == "one.md\ntwo.md\nbuilt\ndeep\nexec\nmain.py\nnote.txt"
        assert inside("cat /tmp/served") == "served"
    finally:
        server.kill(sandbox)

    info = json.loads(server.cli("--json", "template", "info", name).stdout)
    assert info["exposedPorts"] == [8000]
    assert {each["tag"] for each in info["tags"]} == {"v1", "new"}
    server.cli("template", "tag", f"{name}:v1", "stable")
    server.cli("template", "tag", "--delete", name, "new")
    assert "stable" in server.cli("template", "info", name).stdout
    assert "RUN" in server.cli("template", "logs", name).stdout
    server.cli("template", "rm", name)
    assert server.cli("template", "info", name, check=False).returncode == 1


def test_the_command_line_says_what_is_wrong(server, name, context):
    dockerfile = context / "Dockerfile"

    def failing(text: str, *options: str) -> str:
        dockerfile.write_text(text)
        result = server.cli(
            "template", "build", name, str(context), *options, check=False, timeout=BUILD_WITHIN
        )
        assert result.returncode == 1, result.stdout
        return result.stderr

    said = failing("FROM busybox:tests\nRUN true\nADD a b\n")
    assert f"{dockerfile}, line 3: ADD is not supported" in said
    said = failing("FROM busybox:tests\nCOPY nothing /\n")
    assert "line 2: COPY nothing: there is no such file" in said
    said = failing("FROM busybox:tests\nRUN true\nRUN echo why; exit 7\n")
    assert "step 2" in said and "why" in said and "7" in said
    assert "127.0.0.1:1" in failing("FROM 127.0.0.1:1/nothing\n")
    said = failing("FROM python:3.12\n", "--ready", "false", "--ready-within", "2")
    assert "the end of the build" in said
    wrong = server.cli("template", "build", "No_Name", "--image", "busybox:tests", check=False)
    assert wrong.returncode == 1 and "name" in wrong.stderr


def test_an_interrupted_command_leaves_the_build_running(server, name, context):
    (context / "Dockerfile").write_text("FROM python:3.12\nRUN sleep 5; echo slept\n")
    process = subprocess.Popen(
        server.command("template", "build", name, str(context)),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stderr:
        if "RUN sleep" in line:
            break
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "goes on in the server" in said
    logs = server.cli("template", "logs", name, "--follow", timeout=BUILD_WITHIN).stdout
    assert "slept" in logs
    assert json.loads(server.cli("--json", "template", "info", name).stdout)["buildStatus"] == "ready"
