"""Bytes in and out of a sandbox, through every way in."""

import asyncio
import base64
import hashlib
import json
import os
import struct
import time

import httpx
import pytest
import websockets

MIB = 1 << 20
ECHO_SERVER = r"""
import base64, hashlib, http.server, socket, struct

class Echo(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        if self.headers.get("Upgrade", "").lower() == "websocket":
            return self.websocket()
        if self.path == "/redirect":
            self.send_response(302)
            self.send_header("Location", "/landed?x=1")
            self.send_header("Set-Cookie", "a=b; Path=/")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if self.path == "/events":
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            import time
            for n in range(3):
                self.wfile.write(b"data: %d\n\n" % n); self.wfile.flush(); time.sleep(0.5)
            self.close_connection = True
            return
        body = ("%s %s %s" % (self.path, self.headers.get("Host"), self.headers.get("X-Forwarded-Prefix"))).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_POST(self):
        digest, size = hashlib.sha256(), 0
        if self.headers.get("Transfer-Encoding") == "chunked":
            while True:
                length = int(self.rfile.readline().strip(), 16)
                chunk = self.rfile.read(length); self.rfile.readline()
                if not length: break
                digest.update(chunk); size += length
        else:
            left = int(self.headers["Content-Length"])
            while left:
                chunk = self.rfile.read(min(left, 1 << 16)); left -= len(chunk)
                digest.update(chunk); size += len(chunk)
        body = ("%d %s" % (size, digest.hexdigest())).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def websocket(self):
        key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key.encode()).digest()).decode())
        self.end_headers()
        while True:
            head = self.rfile.read(2)
            if len(head) < 2: return
            opcode, length = head[0] & 15, head[1] & 127
            if length == 126: length = struct.unpack(">H", self.rfile.read(2))[0]
            elif length == 127: length = struct.unpack(">Q", self.rfile.read(8))[0]
            mask = self.rfile.read(4)
            data = bytes(b ^ mask[i % 4] for i, b in enumerate(self.rfile.read(length)))
            size = bytes([length]) if length < 126 else b"\x7e" + struct.pack(">H", length)
            self.wfile.write(bytes([0x80 | opcode]) + size + data); self.wfile.flush()
            if opcode == 8: return
    def log_message(self, *args): pass

http.server.ThreadingHTTPServer(("127.0.0.1", 8000), Echo).serve_forever()
"""


def envd_headers(sandbox: dict, port: int = 49983) -> dict[str, str]:
    return {
        "E2b-Sandbox-Id": sandbox["sandboxID"],
        "E2b-Sandbox-Port": str(port),
        "X-Access-Token": sandbox["envdAccessToken"],
    }


def routes(server, sandbox: dict, port: int):
    """The three ways to a port of a sandbox: name, base URL, headers."""
    id = sandbox["sandboxID"]
    token = {"X-Access-Token": sandbox["envdAccessToken"]}
    yield "headers", server.url, envd_headers(sandbox, port)
    yield "host", server.url, {**token, "Host": f"{port}-{id}.cubicle.localhost"}
    yield "path", f"{server.url}/sandbox/{id}/{port}", token


def start(http: httpx.Client, url: str, headers: dict, *command: str, **more) -> httpx.Response:
    process = {"cmd": command[0], "args": list(command[1:])}
    body = json.dumps({"process": process, "stdin": False, **more}).encode()
    return http.stream(
        "POST", f"{url}/process.Process/Start",
        headers={**headers, "Content-Type": "application/connect+json"},
        content=struct.pack(">BI", 0, len(body)) + body,
    )  # fmt: skip


def events(response: httpx.Response):
    buffer = b""
    for chunk in response.iter_raw():
        buffer += chunk
        while len(buffer) >= 5:
            flags, length = struct.unpack(">BI", buffer[:5])
            if len(buffer) < 5 + length:
                break
            message, buffer = json.loads(buffer[5 : 5 + length]), buffer[5 + length :]
            yield flags, message


@pytest.fixture
def web(server, sandbox):
    """A web server that listens on the sandbox's own localhost only."""
    http = httpx.Client(timeout=60)
    headers = envd_headers(sandbox)
    http.post(
        f"{server.url}/files", params={"path": "/tmp/echo.py"}, content=ECHO_SERVER,
        headers={**headers, "Content-Type": "application/octet-stream"},
    ).raise_for_status()  # fmt: skip
    with start(http, server.url, headers, "python3", "/tmp/echo.py") as response:
        next(events(response))
        deadline = time.monotonic() + 20
        while True:
            answer = http.get(f"{server.url}/", headers=envd_headers(sandbox, 8000))
            if answer.status_code == 200:
                break
            assert "port is not open" in answer.text, answer.text
            assert time.monotonic() < deadline, "the web server in the sandbox never answered"
            time.sleep(0.1)
        yield http
    http.close()


def test_files_of_20_mb_by_every_route(server, sandbox):
    content = os.urandom(20 * MIB)
    with httpx.Client(timeout=120) as http:
        for name, url, headers in routes(server, sandbox, 49983):
            path = {"path": f"/home/user/{name}.bin"}
            octets = {**headers, "Content-Type": "application/octet-stream"}
            written = http.post(f"{url}/files", params=path, content=content, headers=octets)
            assert written.status_code == 200, written.text
            read = http.get(f"{url}/files", params=path, headers=headers)
            assert read.status_code == 200, read.text
            assert hashlib.sha256(read.content).digest() == hashlib.sha256(content).digest(), name


def test_a_web_server_by_every_route(server, sandbox, web):
    content = os.urandom(20 * MIB)
    expected = f"{len(content)} {hashlib.sha256(content).hexdigest()}"
    chunks = (content[i : i + 100_000] for i in range(0, len(content), 100_000))
    for name, url, headers in routes(server, sandbox, 8000):
        assert web.get(f"{url}/hello?a=%2F", headers=headers).text.startswith("/hello?a=%2F"), name
        assert web.post(f"{url}/", content=content, headers=headers).text == expected, name
    headers = envd_headers(sandbox, 8000)
    assert web.post(f"{server.url}/", content=chunks, headers=headers).text == expected


def test_paths_are_rewritten_where_the_sandbox_lives_below_one(server, sandbox, web):
    prefix = f"/sandbox/{sandbox['sandboxID']}/8000"
    answer = web.get(f"{server.url}{prefix}/redirect")
    assert answer.status_code == 302
    assert answer.headers["location"] == f"{prefix}/landed?x=1"
    assert f"Path={prefix}/" in answer.headers["set-cookie"]
    assert web.get(f"{server.url}{prefix}/x").text.endswith(prefix)


def test_events_arrive_one_by_one(server, sandbox, web):
    headers = envd_headers(sandbox, 8000)
    with web.stream("GET", f"{server.url}/events", headers=headers) as response:
        times = [time.monotonic() for _ in response.iter_raw()]
    assert times[-1] - times[0] > 0.8, "the events came in one piece"


def test_a_websocket_echoes(server, sandbox, web):
    async def talk() -> None:
        url = f"{server.url.replace('http', 'ws')}/sandbox/{sandbox['sandboxID']}/8000/ws"
        async with websockets.connect(url) as socket:
            for message in ["hello", "x" * 60_000]:
                await socket.send(message)
                assert await socket.recv() == message

    asyncio.run(talk())


def test_ten_megabytes_of_output_arrive_whole(server, sandbox):
    script = "import sys\nfor i in range(10 * 1024): sys.stdout.write('%08d' % i * 128)"
    seen = hashlib.sha256()
    with httpx.Client(timeout=120) as http:
        with start(http, server.url, envd_headers(sandbox), "python3", "-c", script) as response:
            for flags, message in events(response):
                event = message.get("event", {})
                if "data" in event:
                    seen.update(base64.b64decode(event["data"]["stdout"]))
                if "end" in event:
                    assert event["end"]["status"] == "exit status 0"
    expected = hashlib.sha256()
    for i in range(10 * 1024):
        expected.update(b"%08d" % i * 128)
    assert seen.digest() == expected.digest()


def test_what_is_not_there_says_so(server, sandbox):
    with httpx.Client(timeout=30) as http:
        closed = http.get(f"{server.url}/", headers=envd_headers(sandbox, 9))
        assert closed.status_code == 502
        assert "port is not open" in closed.text
        ghost = {**envd_headers(sandbox), "E2b-Sandbox-Id": "i0000000000000000000"}
        gone = http.get(f"{server.url}/health", headers=ghost)
        assert gone.status_code == 502
        assert "was not found" in gone.json()["message"]


def test_a_token_is_needed(server, sandbox):
    headers = envd_headers(sandbox)
    del headers["X-Access-Token"]
    with httpx.Client(timeout=30) as http:
        for path in ["/files?path=/etc/passwd", "/metrics", "/envs"]:
            assert http.get(f"{server.url}{path}", headers=headers).status_code == 401, path
        for path in ["/init", "//init", "/./init", "/%69nit"]:
            answer = http.post(f"{server.url}{path}", headers=envd_headers(sandbox), json={})
            assert answer.status_code in (400, 404), path
