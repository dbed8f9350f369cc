"""Start two commands on one fresh directory at the same moment: one works, the other leaves, naming it.

    .venv/bin/python tests/torture/two_commands.py --drivers 100 --commands 10      as `make torture` does

Drivers are those of `crash_study`, forked, with runs of a second; commands are `peft-vit run` as the shell would start
it, and the seconds until the loser has left contain the start of its interpreter. A trial has passed if the loser ended
with exit code 2 and one line that names the owner, and the winner with all runs done once and as undisturbed ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import harness
from commands import POLL_S, run_fresh, undisturbed
from crash_study import pair
from tiny_studies import METHODS, difference, write_study


def torture(folder: Path, options: argparse.Namespace, tally: harness.Tally) -> None:
    """Let forked drivers compete, then fresh commands."""
    for number in range(options.drivers):
        trial, fault = f"drivers {number}", None
        try:
            trial += f": the loser left after {pair(folder / trial):.2f} s"
        except AssertionError as error:
            fault = str(error)
        tally.add("forked drivers", trial, fault)
    if not options.commands:
        return
    config = write_study(folder / "commands", {"lora": METHODS["lora"]}, (0,))
    expected = undisturbed(config)
    for number in range(options.commands):
        out = folder / f"commands {number}"
        logs = [folder / f"{number}-{place}.txt" for place in range(2)]
        two = [run_fresh([str(config), "--output", str(out)], log) for log in logs]
        place = 0 if two[1].wait(two[0].ended) else 1  # so that the end of either is seen at once
        loser, winner, log = two[place], two[1 - place], logs[place]
        while not loser.ended():
            winner.wait(loser.ended, POLL_S)
        codes, lines = (loser.code, winner.finish()), [line for line in log.read_text().splitlines() if line]
        if codes != (2, 0):
            fault = f"they ended with {codes} and said {lines[-3:]} and {logs[1 - place].read_text()[-3000:]}"
        elif len(lines) != 1 or f"another command works on this study, process {winner.pid} on " not in lines[0]:
            fault = f"the loser said {lines}, the winner is process {winner.pid}"
        else:
            fault = difference(out, expected)
        trial = f"{out.name}: the loser left after {loser.seconds:.2f} s, {loser.busy_s:.2f} s of a core"
        tally.add("fresh commands", trial, fault)


if __name__ == "__main__":
    trials = {"type": int, "default": 0, "metavar": "TRIALS"}
    options = {"--drivers": trials | {"help": "of forked drivers"}, "--commands": trials | {"help": "of fresh ones"}}
    harness.main("two runners on one directory: one winner", __doc__, torture, options)
