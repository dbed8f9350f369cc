"""`label` opens the page in which a person labels images."""

from __future__ import annotations

import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field

from peft_vit.base.console import quoted
from peft_vit.base.errors import UserError
from peft_vit.base.extras import require_extra
from peft_vit.base.settings import Option, Request
from peft_vit.cli.app import command
from peft_vit.core.config import TASKS_SAID, TaskName

if TYPE_CHECKING:
    from peft_vit.label.server import LabelServer


class LabelRequest(Request):
    """A folder of images, and how its page is served."""

    images: Annotated[Path, AfterValidator(Path.expanduser), Option(is_argument=True)] = Field(
        description="The folder of your images. Labels go into labels.csv there, which train and tune take."
    )
    task: TaskName = Field(default="classification", description=f"What to say of an image: {TASKS_SAID}.")
    model: Path | None = Field(
        default=None,
        description="The folder of a run whose model proposes, and whose features choose, as long as you name no class "
        "that it doesn't know; then its features alone.",
    )
    order: Literal["herding", "random", "files", "unlike"] = Field(
        default="herding",
        description="Which image comes next. herding: one that a model gains much from. random: any. files: the next. "
        "unlike, with --model: the one that is least like all that it was trained on.",
    )
    host: str = Field(
        default="127.0.0.1",
        description="This machine's address in your network, to label on a phone there. The connection is plain http: "
        "all who can read your network see images and labels.",
    )
    port: int = Field(default=0, ge=0, le=65535, description="The page's port. Without it, any that is free.")
    no_browser: bool = Field(default=False, description="Print the page's address, and open no browser.")
    ignore_folders: bool = Field(default=False, description="Don't take folders as classes; begin without labels.")
    to_folders: Path | None = Field(
        default=None, description="Make class folders of what is labelled, of links or on Windows of copies, and end."
    )
    to_label_studio: Path | None = Field(default=None, description="Write Label Studio's JSON to this file, and end.")
    from_label_studio: Path | None = Field(default=None, description="Take labels from Label Studio's JSON, and end.")

    def classes(self) -> tuple[str, ...]:
        """Return those that the model knows; without one none.

        Raises:
            UserError: if it isn't a run, has learned another task, or can't do what the order needs.
        """
        if self.model is None:
            if self.order == "unlike":
                raise UserError("unlike needs --model, the folder of a run", field="--order")
            return ()
        from peft_vit.runs.records.storage import RECORD_FILE, read_record, single_run

        file = single_run(self.model) / RECORD_FILE
        if not file.is_file():
            raise UserError(
                "isn't a run; name the folder that train or tune has made", file=self.model, field="--model"
            )
        record = read_record(file)
        if record.spec.task != self.task:
            raise UserError(f"learned {record.spec.task}; give --task {record.spec.task}", file=self.model)
        if self.order == "unlike" and record.unlike is None:
            raise UserError("unlike needs a model that was trained on more images", field="--order")
        return tuple(record.class_names) if self.task == "classification" else ()


@command(LabelRequest)
def label(request: LabelRequest) -> None:
    """Label a folder of images in your browser, those first that a model gains most from.

    Each label is in labels.csv beside the images before the next image is shown, so you can stop at any time, and the
    same command continues. Every fifth image is kept for the test. Nothing leaves this machine. Exit codes: 0 done,
    2 bad input.
    """
    require_extra("label", "The page")
    from peft_vit.label.exchange import adopt, from_label_studio, to_folders, to_label_studio
    from peft_vit.label.images import ImageFolder
    from peft_vit.label.labels import LabelStore

    classes = request.classes()  # refuses a model that can't be used, before anything is read
    images = ImageFolder(request.images)
    store = LabelStore(images.root, request.task)
    if taken := adopt(store, images, request.ignore_folders):
        print(taken)
    if request.from_label_studio is not None:
        print(from_label_studio(store, images, request.from_label_studio))
    elif request.to_label_studio is not None:
        to_label_studio(store, request.to_label_studio)
        print(f"{len(store.rows):,} images: {request.to_label_studio}")
    elif request.to_folders is not None:
        print(f"{to_folders(store, images, request.to_folders):,} images: {request.to_folders}")
    else:
        from peft_vit.label.features import FolderFeatures
        from peft_vit.label.server import LabelServer, listen
        from peft_vit.label.session import Session

        listening = listen(request.host, request.port)
        features = FolderFeatures(images, request.model)
        session, stop = Session(store, images, features, request.order, classes), threading.Event()
        threading.Thread(target=session.work, args=(stop,), daemon=True).start()
        if request.host not in ("127.0.0.1", "localhost"):
            print("The connection is plain http: all who can read your network see images and labels.", file=sys.stderr)
        try:
            serve_page(LabelServer(session, listening), in_browser=not request.no_browser)
        finally:
            stop.set()
            features.stop()
        if session.training.is_running:
            print("The training continues; the same command shows it again.")
        if store.rows:
            print(f"{len(store.rows):,} images: {store.file}\nTrain: peft-vit tune {quoted(store.file)}")


def serve_page(server: LabelServer, *, in_browser: bool = True) -> None:
    """Print a page's address, open a browser there, and answer until Ctrl-C.

    Args:
        server: of the page.
        in_browser: whether a browser is opened.
    """
    print(f"Label at {server.address}", "Ctrl-C ends it.", sep="\n", flush=True)
    if in_browser:
        threading.Thread(target=_open, args=(server.address,), daemon=True).start()
    with suppress(KeyboardInterrupt):
        server.serve()


def _open(address: str) -> None:
    import webbrowser

    if not webbrowser.open(address):
        print("No browser could be opened; open that address in yours.", flush=True)
