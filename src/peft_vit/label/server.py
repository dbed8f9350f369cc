"""The page's server: it listens to this machine, or to one address, and hands out images by number.

Whoever asks needs a cookie, which the secret in the first address is exchanged for, once. A page of somebody else's can
neither ask by another name of this machine (Host), nor change anything (Origin, a token). Nothing that a browser would
run comes from the folder: images are encoded anew, names and comments are set as text, and the policy allows no script
but the page's own.
"""

from __future__ import annotations

import errno
import hmac
import secrets
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, StringConstraints, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from peft_vit.base.errors import UserError, first_fault
from peft_vit.base.settings import Frozen
from peft_vit.label.labels import ConflictError
from peft_vit.label.session import LARGE, SMALL, Session

_PAGE = Path(__file__).with_name("page")
_COLORS = Path(__file__).parents[1] / "deploy" / "page" / "templates" / "colors.css"
_FILES = {"page.js": "text/javascript", "keys.js": "text/javascript", "page.css": "text/css", "colors.css": "text/css"}
_MOST_BYTES = 64 << 10  # of what a page sends
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
# The cookie comes along to an address that our own page leads to, not to one that another site redirects to.
_ENTERING = '<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0;url=/"><title>peft-vit</title>'
_CLOSED = "Open the address that peft-vit label prints in its terminal; each opens the page in one browser.\n"

_Id = Annotated[int, Field(ge=0)]
_Text = Annotated[str, StringConstraints(max_length=500)]


class _Answer(Frozen):
    """What the page says of images."""

    ids: list[_Id] = Field(default=[], max_length=100)
    labels: list[_Text] = Field(default=[], max_length=500)
    wrong: list[_Id] = Field(default=[], max_length=100)
    comment: _Text = ""
    unsure: bool = False


class LabelServer:
    """The page of a session.

    Args:
        session: what is labelled.
        host: the address that is listened to.
        port: its port; 0: any that is free.
        on_address: gets an address that opens the page in one browser, at once and whenever one was used.

    Attributes:
        app: which answers, as ASGI.

    Raises:
        UserError: if the host is none of this machine, or the port is in use.
    """

    def __init__(self, session: Session, host: str, port: int, on_address: Callable[[str], None]) -> None:
        self.session, self.host = session, host
        self.socket = _listening(host, port)
        self.port = self.socket.getsockname()[1]
        self._on_address = on_address
        self._key, self._cookie, self._token = (secrets.token_urlsafe(32) for _ in range(3))
        routes = [
            Route("/", self._page),
            Route("/state", self._state),
            Route("/images/{i:int}/{kind}", self._image),
            Route("/{name}", self._file),
            *(
                Route(f"/{name}", self._change(change), methods=["POST"])
                for name, change in {"label": _label, "refuse": _refuse, "undo": _undo}.items()
            ),
        ]
        routes.sort(key=lambda route: route.path == "/{name}")
        self.app = _guarded(Starlette(routes=routes), self._refusal)

    @property
    def address(self) -> str:
        """Return the address that opens the page in one browser."""
        return f"http://{self.host}:{self.port}/?key={self._key}"

    def serve(self) -> None:
        """Answer until Ctrl-C."""
        import uvicorn

        self._on_address(self.address)
        config = uvicorn.Config(
            self.app, log_level="warning", access_log=False, lifespan="off", ws="none", server_header=False,
            proxy_headers=False, limit_concurrency=64, timeout_graceful_shutdown=1,
        )  # fmt: skip
        uvicorn.Server(config).run(sockets=[self.socket])

    def _refusal(self, request: Request) -> Response | None:
        """Return why a request is not answered; None: it is."""
        hosts = request.headers.getlist("host")
        if len(hosts) != 1 or hosts[0].rpartition(":")[0] not in {"127.0.0.1", "localhost", self.host}:
            return PlainTextResponse("Another name than the one that peft-vit label prints.\n", 421)
        if request.url.path == "/" and (key := request.query_params.get("key")) is not None:
            return self._enter(key)
        if not _equal(request.cookies.get(self._cookie_name, ""), self._cookie):
            return PlainTextResponse(_CLOSED, 403)
        if request.method not in ("GET", "HEAD"):
            is_ours = request.headers.get("origin") == f"http://{hosts[0]}"
            if not is_ours or not _equal(request.headers.get("x-token", ""), self._token):
                return PlainTextResponse("Not from this page.\n", 403)
            if request.headers.get("content-type") != "application/json":
                return PlainTextResponse("Expected JSON.\n", 415)
        return None

    @property
    def _cookie_name(self) -> str:
        return f"peft-vit-label-{self.port}"  # cookies are those of all ports

    def _enter(self, key: str) -> Response:
        if not _equal(key, self._key):
            return PlainTextResponse(f"This address was used already. {_CLOSED}", 403)
        self._key = secrets.token_urlsafe(32)
        self._on_address(self.address)
        response = HTMLResponse(_ENTERING)
        response.set_cookie(self._cookie_name, self._cookie, httponly=True, samesite="strict")
        return response

    def _page(self, request: Request) -> Response:
        html = (_PAGE / "index.html").read_text(encoding="utf-8")
        return HTMLResponse(html.replace("TOKEN", self._token))

    def _file(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in _FILES:
            return PlainTextResponse("Not found.\n", 404)
        file = _COLORS if name == _COLORS.name else _PAGE / name
        return Response(file.read_bytes(), media_type=_FILES[name])

    def _image(self, request: Request) -> Response:
        i, side = request.path_params["i"], {"large": LARGE, "small": SMALL}.get(request.path_params["kind"])
        images = self.session.images
        if side is None or i >= len(images.names) or not images.is_sound(i, side):
            return PlainTextResponse("No such image.\n", 404)
        content, kind = images.encoded(i, side)
        return Response(content, media_type=kind, headers={"Cache-Control": "private, max-age=3600"})

    def _state(self, request: Request) -> Response:
        return _told(self.session, 200)

    def _change(self, change: Callable[[Session, _Answer], None]) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            body = bytearray()
            async for part in request.stream():
                body += part
                if len(body) > _MOST_BYTES:
                    return PlainTextResponse("Too large.\n", 413)
            return await run_in_threadpool(_changed, self.session, change, bytes(body))

        return answer


def _label(session: Session, answer: _Answer) -> None:
    right = [i for i in answer.ids if i not in answer.wrong]
    if right:
        session.record(right, answer.labels, answer.comment, answer.unsure)
    else:
        session.refuse(answer.ids)
    session.doubt(answer.wrong)


def _refuse(session: Session, answer: _Answer) -> None:
    session.refuse(answer.ids)


def _undo(session: Session, answer: _Answer) -> None:
    session.undo()


def _changed(session: Session, change: Callable[[Session, _Answer], None], body: bytes) -> Response:
    try:
        answer = _Answer.model_validate_json(body)
        if any(i >= len(session.images.names) for i in (*answer.ids, *answer.wrong)):
            raise UserError("no such image", field="ids")
        change(session, answer)
    except ValidationError as error:
        return _told(session, 422, ": ".join(filter(None, first_fault(error))))
    except UserError as error:
        return _told(session, 409 if isinstance(error, ConflictError) else 422, str(error))
    return _told(session, 200)


def _told(session: Session, status: int, fault: str = "") -> Response:
    try:
        return JSONResponse({**session.state(), "fault": fault}, status)
    except UserError as error:  # labels.csv is gone, or somebody has written something else into it
        return JSONResponse({"fault": str(error)}, 500)


def _equal(given: str, secret: str) -> bool:
    return hmac.compare_digest(given.encode(), secret.encode())


def _guarded(app: Any, refusal: Callable[[Request], Response | None]) -> Any:
    """Return an ASGI application that refuses before it answers, and adds the headers to whatever is answered."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                given = {name for name, _ in message["headers"]}
                added = ((name.lower().encode(), value.encode()) for name, value in _HEADERS.items())
                message["headers"] = [*message["headers"], *(pair for pair in added if pair[0] not in given)]
            await send(message)

        refused = refusal(Request(scope))
        try:
            await (refused or app)(scope, receive, send_with_headers)
        except ClientDisconnect:
            return

    return answer


def _listening(host: str, port: int) -> socket.socket:
    if host in ("0.0.0.0", "::", ""):
        message = "names no address, and anybody's page could reach you by any name"
        raise UserError(f"{message}; give this machine's own, {_own_address()}", field="--host")
    try:
        return socket.create_server((host, port))
    except OSError as error:
        reason = f"can't be listened to ({error.strerror})"
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise UserError(f"{port} {reason}; give another, or leave it out", field="--port") from None
        raise UserError(f"{host} {reason}; this machine's own is {_own_address()}", field="--host") from None


def _own_address() -> str:
    """Return this machine's address in its network; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])
