"""Bad input gets the right 4xx as JSON, and changes nothing."""

import httpx
import pytest

LONG = "x" * 10_240


def problem(response: httpx.Response, *statuses: int) -> str:
    assert response.status_code in statuses, f"{response.status_code}: {response.text}"
    body = response.json()
    assert body["code"] == response.status_code
    assert response.headers["x-request-id"]
    return body["message"]


@pytest.fixture
def http(server):
    with server.http() as http:
        before = http.get("/v2/sandboxes").json()
        yield http
        assert http.get("/v2/sandboxes").json() == before, "bad input changed something"


@pytest.mark.parametrize("path", ["/sandboxes", "/v2/sandboxes", "/cubeapi/v1/sandboxes"])
@pytest.mark.parametrize(
    "body",
    [
        {},
        {"templateID": ""},
        {"templateID": 7},
        {"templateID": LONG},
        {"templateID": "../../etc"},
        {"templateID": "base\n"},
        {"templateID": "base", "timeout": "soon"},
        {"templateID": "base", "timeout": -5},
        {"templateID": "base", "timeout": 10**12},
        {"templateID": "base", "metadata": ["a"]},
        {"templateID": "base", "envVars": {"A": 1}},
        {"templateID": "base", "envVars": {"A=B": "x"}},
        {"templateID": "base", "envVars": {"A\x00": "x"}},
        {"templateID": "base", "network": {"denyOut": ["example.com"]}},
        {"templateID": "base", "network": {"allowOut": ["1.2.3.4/99"]}},
    ],
    ids=repr,
)
def test_create(http, path, body):
    problem(http.post(path, json=body), 400, 404)


def test_create_from_nothing_known(http):
    assert "nope" in problem(http.post("/v2/sandboxes", json={"templateID": "nope"}), 404)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b'{"templateID": "base"'])
def test_create_from_what_is_no_request(http, body):
    headers = {"Content-Type": "application/json"}
    problem(http.post("/v2/sandboxes", content=body, headers=headers), 400, 415, 422)


@pytest.mark.parametrize("id", ["i000", LONG, "..%2F..", "%0A", "A", "a.b", "%00"])
@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", ""), ("DELETE", ""), ("POST", "/timeout"), ("POST", "/connect"), ("GET", "/metrics")],
)
def test_ids(http, id, method, path):
    body = {"timeout": 10} if method == "POST" else None
    message = problem(http.request(method, f"/sandboxes/{id}{path}", json=body), 400, 404, 414)
    assert "template" not in message.lower(), "Cube's client takes that for another error"


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=x", "limit=1000000", "state=odd", "nextToken=%00", "order=up", "startedAfter=x"],
)
def test_lists(http, query):
    problem(http.get(f"/v2/sandboxes?{query}"), 400)


@pytest.mark.parametrize("key", [None, "", "e2b_", "e2b_" + "0" * 40, LONG])
def test_keys(server, key):
    headers = {} if key is None else {"X-API-Key": key}
    with httpx.Client(base_url=server.url, headers=headers) as stranger:
        for method, path in [
            ("GET", "/v2/sandboxes"), ("POST", "/v2/sandboxes"), ("DELETE", "/sandboxes/i0"),
            ("GET", "/templates"), ("DELETE", "/templates/base"), ("GET", "/cubicle/v1/version"),
        ]:  # fmt: skip
            assert problem(stranger.request(method, path), 401, 431)


def test_unknown_routes_and_methods(http):
    problem(http.get("/no/such/thing"), 404)
    problem(http.patch("/sandboxes"), 405)
