"""`peft-vit run` that also writes down what its watcher is told, for tools that compare attempts.

python tests/torture/told_events.py FILE CONFIG [OPTION ...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def write_to(file: Path) -> None:
    """Have each start, step and end of a run appended to a file, one JSON object a line."""
    from peft_vit.studies.display import Watch
    from peft_vit.studies.executors import RunEnded, RunProgress, RunStarted, StudyEvent

    show = Watch.on_event

    def on_event(watch: Watch, event: StudyEvent) -> None:
        if isinstance(event, RunStarted | RunProgress | RunEnded):
            step = event.progress.step if isinstance(event, RunProgress) else None
            line = json.dumps({"event": type(event).__name__, "run": event.run.spec.name, "step": step})
            with file.open("a") as handle:
                handle.write(f"{line}\n")
        show(watch, event)

    Watch.on_event = on_event  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    from peft_vit.cli import main

    write_to(Path(sys.argv[1]))
    sys.argv = ["peft-vit", "run", *sys.argv[2:]]
    main(sys.argv[1:])
