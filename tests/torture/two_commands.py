"""Start two commands on one fresh directory at the same moment: one works, the other leaves, naming it.

    .venv/bin/python tests/torture/two_commands.py --drivers 100 --commands 10      as `make torture` does

Drivers are those of `crash_study`, forked, with runs of a second; commands are `peft-vit run` as the shell would start
it, and the seconds until the loser has left contain the start of its interpreter. A trial has passed if the loser ended
with exit code 2 and one line that names the owner, and the winner with all runs done once and as undisturbed ones.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import harness
from commands import POLL_S, Command, run_forked, run_fresh
from crash_study import pair
from harness import Tally
from tiny_studies import METHODS, End, difference, ends_of, write_study

PROMISE = "two runners on one directory: one winner"


def drivers(folder: Path, trials: int, tally: Tally) -> None:
    """Let forked drivers compete."""
    for trial in range(trials):
        try:
            said, fault = f"the loser left after {pair(folder / str(trial)):.2f} s", None
        except AssertionError as error:
            said = fault = f"drivers {trial}: {error}"
        print(f"drivers {trial}: {said}", flush=True)
        tally.add("forked drivers", fault)


def commands(folder: Path, trials: int, tally: Tally) -> None:
    """Let fresh commands compete."""
    config = write_study(folder, {"lora": METHODS["lora"]}, (0,))
    arguments = [str(config), "--output"]
    if run_forked([*arguments, str(folder / "undisturbed")], folder / "undisturbed.txt").finish() != 0:
        raise RuntimeError((folder / "undisturbed.txt").read_text()[-3000:])
    expected = ends_of(folder / "undisturbed")
    for trial in range(trials):
        out = folder / str(trial)
        two = [run_fresh([*arguments, str(out)], folder / f"{trial}-{number}.txt") for number in range(2)]
        first = two[1].wait(two[0].ended)  # so that its end is seen at once
        loser, winner = (two if first else two[::-1])[:2]
        logs = [folder / f"{trial}-{two.index(command)}.txt" for command in (loser, winner)]
        fault = _fault(loser, winner, logs, out, expected)
        said = (
            f"commands {trial}: the loser left after {loser.seconds:.2f} s, {loser.busy_s:.2f} s of a core: "
            f"{fault or 'sound'}"
        )
        print(said, flush=True)
        tally.add("fresh commands", said if fault else None)


def _fault(loser: Command, winner: Command, logs: Sequence[Path], out: Path, expected: Mapping[str, End]) -> str | None:
    """Return what is wrong with the end of two commands."""
    while not loser.ended():
        winner.wait(loser.ended, POLL_S)
    code = winner.finish()
    said = [line for line in logs[0].read_text().splitlines() if line]
    if (loser.code, code) != (2, 0):
        return f"they ended with {loser.code} and {code}; one said {said[-3:]}, the other {logs[1].read_text()[-3000:]}"
    if len(said) != 1 or f"another command works on this study, process {winner.pid} on " not in said[0]:
        return f"the loser said {said}, the winner is process {winner.pid}"
    return difference(out, expected)


def main() -> None:
    """Run the command line."""
    parser = harness.options(__doc__)
    parser.add_argument("--drivers", type=int, default=0, metavar="TRIALS", help="of forked drivers")
    parser.add_argument("--commands", type=int, default=0, metavar="TRIALS", help="of fresh commands")
    asked = parser.parse_args()
    with harness.torture(PROMISE, dry=asked.dry) as (folder, tally):
        drivers(folder / "drivers", asked.drivers, tally)
        if asked.commands:
            commands(folder / "commands", asked.commands, tally)


if __name__ == "__main__":
    main()
