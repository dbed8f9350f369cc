"""The server refuses whoever is not the page that it opened; each line of its defence against a running application."""

import json
from typing import Any

import pytest
from label_sessions import session_of, write_digits
from PIL import Image

from peft_vit.base.errors import UserError
from peft_vit.label.corrections import Checking
from peft_vit.label.labels import LabelStore

pytest.importorskip("starlette")
pytest.importorskip("httpx")
from starlette.testclient import TestClient

from peft_vit.label.server import LabelServer, _Answer, _change, listen

CAT = {"ids": [1], "labels": ["cat"]}


@pytest.fixture
def server(tmp_path) -> LabelServer:
    write_digits(tmp_path, 8)
    (tmp_path / "a.png").write_text("<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>")
    (tmp_path / "secret.txt").write_text("not an image")
    return LabelServer(session_of(tmp_path), listen())


def client_of(server: LabelServer) -> TestClient:
    return TestClient(server.app, base_url=f"http://127.0.0.1:{server.port}", follow_redirects=False)


@pytest.fixture
def client(server) -> TestClient:
    """Return one that has come by the address."""
    client = client_of(server)
    assert client.get(server.address).status_code == 200
    return client


def sent(client: TestClient, path: str = "/label", answer: Any = CAT, **headers: str | None) -> Any:
    """Post as the page does, but for some headers."""
    token = client.get("/state").json()["token"]
    usual = {"origin": str(client.base_url).rstrip("/"), "x-token": token, "content-type": "application/json"}
    given = {name: value for name, value in {**usual, **headers}.items() if value is not None}
    return client.post(path, content=answer if isinstance(answer, bytes) else json.dumps(answer), headers=given)


def test_an_answer_is_on_disk_when_it_is_told(client, tmp_path) -> None:
    told = sent(client)
    assert told.status_code == 200
    assert told.json()["labelled"] == len(LabelStore(tmp_path).rows) == 1
    back = sent(client, "/undo", {}).json()
    assert (back["labelled"], back["former"]["labels"], back["undoable"]) == (1, ["cat"], False)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example:80", "", "[::1]:80"])
def test_another_name_of_this_machine_is_refused(host, client) -> None:
    for path in ("/", "/state", "/images/0/large", "/page.js"):
        assert client.get(path, headers={"host": host}).status_code == 421
    for ours in ("localhost:80", "LocalHost:80", "127.0.0.1"):
        assert client.get("/state", headers={"host": ours}).status_code == 200


def test_the_secret_is_exchanged_once_and_the_next_one_is_told(server, capsys) -> None:
    first = server.address
    entered = client_of(server).get(first)
    (cookie,) = entered.headers.get_list("set-cookie")
    assert {"HttpOnly", "SameSite=strict"} <= set(cookie.replace("; ", ";").split(";"))
    assert "url=/" in entered.text
    assert "key" not in entered.text
    assert client_of(server).get(first).status_code == 403
    assert capsys.readouterr().out == f"To open it in one more browser: {server.address}\n"
    assert client_of(server).get(server.address).status_code == 200
    assert client_of(server).get("/?key=").status_code == 403


@pytest.mark.parametrize("path", ["/", "/state", "/images/0/large", "/page.js", "/undo"])
def test_nothing_is_told_without_the_cookie(path, server) -> None:
    stranger = client_of(server)
    assert stranger.get(path).status_code == 403
    stranger.cookies.set(f"peft-vit-label-{server.port}", "guessed")
    assert stranger.get(path).status_code == 403
    assert stranger.post(path).status_code == 403


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": None}, 403),
        ({"x-token": "guessed"}, 403),
        ({"x-token": None}, 403),
        ({"content-type": "text/plain"}, 415),
    ],
)
def test_nobody_else_changes_anything(headers, status, client, tmp_path) -> None:
    for path in ("/label", "/train", "/tune"):
        assert sent(client, path, **headers).status_code == status
    assert client.get("/label").status_code in (404, 405)
    assert LabelStore(tmp_path).rows == {}


@pytest.mark.parametrize("command", ["train", "tune"])
def test_nothing_is_trained_on_too_few_labels_or_where_labels_are_checked(command, client) -> None:
    told = sent(client, f"/{command}", {})
    assert told.status_code == 422
    assert "needs 2 classes" in told.json()["fault"]
    assert not told.json()["training"]["running"]
    with pytest.raises(UserError, match="in a terminal"):
        _change(object.__new__(Checking), command, _Answer())


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (b"x" * (64 * 1024 + 1), 413),
        (b"{", 422),
        ({**CAT, "ids": [99]}, 422),
        ({**CAT, "ids": [-1]}, 422),
        ({**CAT, "ids": ["../a"]}, 422),
        ({**CAT, "labels": ["../up"]}, 422),
        ({**CAT, "comment": "x" * 501}, 422),
        ({**CAT, "path": "/etc/passwd"}, 422),
    ],
)
def test_what_is_no_answer_is_refused(answer, status, client, tmp_path) -> None:
    told = sent(client, answer=answer)
    assert told.status_code == status
    assert status == 413 or told.json()["fault"]
    assert LabelStore(tmp_path).rows == {}


def test_a_page_that_is_late_is_told(client, tmp_path) -> None:
    assert sent(client).status_code == 200
    late = sent(client)
    assert late.status_code == 409
    assert "is 'cat' by now" in late.json()["fault"]


def test_every_answer_has_the_policy_and_images_are_encoded_anew(client, tmp_path) -> None:
    Image.new("RGB", (600, 300)).save(tmp_path / "d000.png")
    for path in ("/", "/state", "/images/1/small", "/nothing"):
        headers = client.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
        assert (headers["x-content-type-options"], headers["referrer-policy"]) == ("nosniff", "no-referrer")
    assert "<script>" not in client.get("/").text
    assert client.get("/images/2/large").headers["content-type"] == "image/png"
    assert client.get("/images/0/large").status_code == 404  # SVG
    assert client.get("/images/1/large").headers["content-type"] == "image/jpeg"


@pytest.mark.parametrize(
    "path", ["/images/999/large", "/images/1/huge", "/secret.txt", "/..%2Fserver.py", "/images/..%2Fsecret.txt/large"]
)
def test_no_path_leads_to_a_file(path, client) -> None:
    assert client.get(path).status_code == 404


def test_an_image_that_became_a_link_out_of_the_folder_is_not_shown(client, tmp_path) -> None:
    outside = tmp_path.parent / "outside.png"
    Image.new("L", (9, 9)).save(outside)
    (tmp_path / "d002.png").unlink()
    (tmp_path / "d002.png").symlink_to(outside)
    assert client.get("/images/3/large").status_code == 404  # a.png comes before


@pytest.mark.parametrize("host", ["0.0.0.0", "0", "", "203.0.113.7"])
def test_an_address_of_all_or_of_another_machine_is_refused(host) -> None:
    with pytest.raises(UserError) as fault:
        listen(host)
    assert fault.value.field == "--host"
