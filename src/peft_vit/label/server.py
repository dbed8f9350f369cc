"""The page's server: it listens to this machine, or to one address, and hands out images by number.

A browser needs a cookie, which the secret in the first address is exchanged for, once. A page of somebody else's can
neither ask by another name of this machine (Host), nor change anything (Origin, a token). Nothing that a browser would
run comes from the folder: images are encoded again, names and comments are set as text, and the policy allows no script
but the page's own.
"""

from __future__ import annotations

import errno
import secrets
import socket
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, StringConstraints, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from peft_vit.base.errors import UserError, first_fault
from peft_vit.base.settings import Frozen
from peft_vit.label.corrections import Checking
from peft_vit.label.images import LARGE, SMALL
from peft_vit.label.labels import ConflictError
from peft_vit.label.session import Session

_PAGE = Path(__file__).with_name("page")
_COLORS = Path(__file__).parents[1] / "deploy" / "page" / "templates" / "colors.css"
_MOST_BYTES = 64 << 10  # of what a page sends
_SIDES = {"large": LARGE, "small": SMALL}
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
# The cookie comes along to an address that our own page leads to, not to one that another site redirects to.
_ENTERING = '<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0;url=/"><title>peft-vit</title>'
_CLOSED = "Open the address that peft-vit label prints in its terminal; each opens the page in one browser."

_Id = Annotated[int, Field(ge=0)]
_Text = Annotated[str, StringConstraints(max_length=500)]


class _Answer(Frozen):
    """What the page says of images, see `Session.record`."""

    ids: list[_Id] = Field(default=[], max_length=100)
    labels: list[_Text] = Field(default=[], max_length=500)
    comment: _Text = ""
    unsure: bool = False
    wrong: list[_Id] = Field(default=[], max_length=100)


_CHANGES = ("label", "refuse", "undo", "tests", "train", "tune")


def _change(session: Session | Checking, change: str, answer: _Answer) -> None:
    if change == "label":
        session.record(**answer.model_dump())
    elif change == "refuse":
        session.refuse(answer.ids)
    elif change == "undo":
        session.undo()
    elif isinstance(session, Checking):
        raise UserError("give the command in a terminal", field=change)
    elif change == "tests":
        session.ask_tests()
    else:
        session.training.start(change)


class LabelServer:
    """The page of a session.

    Args:
        session: what is labelled, or checked.
        listening: where it is asked, see `listen`.

    Attributes:
        app: which answers, as ASGI.
    """

    def __init__(self, session: Session | Checking, listening: socket.socket) -> None:
        self.session, self._socket = session, listening
        self.host, self.port = listening.getsockname()
        self._cookie_name = f"peft-vit-label-{self.port}"  # cookies are those of all ports
        self._key, self._cookie, self._token = (secrets.token_urlsafe(32) for _ in range(3))
        self._routes = Starlette(
            routes=[
                Route("/state", lambda request: self._told(200)),
                Route("/images/{i:int}/{kind}", self._image),
                Route("/colors.css", lambda request: FileResponse(_COLORS)),
                *(Route(f"/{change}", self._take, methods=["POST"]) for change in _CHANGES),
                Mount("/", StaticFiles(directory=_PAGE, html=True)),
            ]
        )

    @property
    def address(self) -> str:
        """Return the address that opens the page in one browser; another one is printed when it was used."""
        return f"http://{self.host}:{self.port}/?key={self._key}"

    def serve(self) -> None:
        """Answer until Ctrl-C."""
        import uvicorn

        config = uvicorn.Config(
            self.app,
            interface="asgi3",
            log_level="warning",
            lifespan="off",
            ws="none",
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=75,  # seconds; a page on a busy machine may be slow to ask again
            timeout_graceful_shutdown=1,
        )
        uvicorn.Server(config).run(sockets=[self._socket])

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer, or refuse; whatever is answered has the headers."""

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
            await send(message)

        try:
            await (self._refusal(Request(scope)) or self._routes)(scope, receive, send_with_headers)
        except ClientDisconnect:
            return

    def _refusal(self, request: Request) -> Response | None:
        """Return why a request is not answered; None: it is."""
        host = request.headers.get("host", "").lower()
        name, _, _ = host.partition(":")  # without a port where that is 80
        if name not in ("127.0.0.1", "localhost", self.host):
            return PlainTextResponse("This is another name than that which peft-vit label prints.", 421)
        key = request.query_params.get("key")
        if key is not None:
            return self._entered(key)
        if not _equal(request.cookies.get(self._cookie_name, ""), self._cookie):
            return PlainTextResponse(_CLOSED, 403)
        if request.method not in ("GET", "HEAD"):
            is_ours = request.headers.get("origin", "").lower() == f"http://{host}"
            if not is_ours or not _equal(request.headers.get("x-token", ""), self._token):
                return PlainTextResponse("This does not come from the page.", 403)
            if request.headers.get("content-type") != "application/json":
                return PlainTextResponse("Expected JSON.", 415)
        return None

    def _entered(self, key: str) -> Response:
        if not _equal(key, self._key):
            return PlainTextResponse(f"This address was used already. {_CLOSED}", 403)
        self._key = secrets.token_urlsafe(32)
        print(f"To open it in one more browser: {self.address}", flush=True)
        response = HTMLResponse(_ENTERING)
        response.set_cookie(self._cookie_name, self._cookie, httponly=True, samesite="strict")
        return response

    def _image(self, request: Request) -> Response:
        i, side, images = request.path_params["i"], _SIDES.get(request.path_params["kind"]), self.session.images
        if side is None or i >= len(images.names) or not images.is_sound(i, side):
            return PlainTextResponse("No such image.", 404)
        content, kind = images.encoded(i, side)
        return Response(content, media_type=kind)

    async def _take(self, request: Request) -> Response:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > _MOST_BYTES:
                return PlainTextResponse("Too large.", 413)
        return await run_in_threadpool(self._taken, request.url.path[1:], bytes(body))

    def _taken(self, change: str, body: bytes) -> Response:
        try:
            answer = _Answer.model_validate_json(body)
            if max((*answer.ids, *answer.wrong), default=0) >= len(self.session.images.names):
                raise UserError("no such image", field="ids")
            _change(self.session, change, answer)
        except ValidationError as error:
            return self._told(422, ": ".join(filter(None, first_fault(error))))
        except UserError as error:
            return self._told(409 if isinstance(error, ConflictError) else 422, str(error))
        return self._told(200)

    def _told(self, status: int, fault: str = "") -> Response:
        try:
            return JSONResponse({**self.session.state(), "token": self._token, "fault": fault}, status)
        except UserError as error:  # labels.csv is gone, or somebody has written something else into it
            return JSONResponse({"fault": str(error)}, 500)


def _equal(given: str, secret: str) -> bool:
    return secrets.compare_digest(given.encode(), secret.encode())


def listen(host: str = "127.0.0.1", port: int = 0) -> socket.socket:
    """Open an address of this machine, at a port or at any that is free.

    Raises:
        UserError: if the host is none of this machine, or the port is in use.
    """
    field, remedy = "--host", "give this machine's address in your network, such as 192.168.1.20"
    try:
        opened = socket.create_server((host, port))
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            field, remedy = "--port", "give another, or leave it out"
        raise UserError(f"{host}:{port} can't be listened to ({error.strerror}); {remedy}", field=field) from None
    if opened.getsockname()[0] == "0.0.0.0":
        opened.close()
        raise UserError(f"names all addresses, by which any page could ask; {remedy}", field=field)
    return opened
