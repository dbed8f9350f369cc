"""Start two commands on one fresh directory at the same moment: one works, the other leaves, naming it.

    .venv/bin/python tests/torture/two_commands.py --drivers 100 --commands 10      as `make torture` does

Drivers are those of `crash_study`, forked, with runs of a second; commands are `peft-vit run` as the shell would start
it, and the seconds until the loser has left contain the start of its interpreter. A trial has passed if the loser ended
with exit code 2 and one line that names the owner, and the winner with all runs done once and as undisturbed ones.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from commands import POLL_S, Command, run_forked, run_fresh
from crash_study import pair
from tiny_studies import METHODS, End, difference, ends_of, write_study

PROMISE = "two runners on one directory: one winner"


def drivers(folder: Path, trials: int) -> list[str]:
    """Let forked drivers compete; return what went wrong."""
    faults, slowest_s = [], 0.0
    for trial in range(trials):
        try:
            slowest_s = max(slowest_s, pair(folder / str(trial)))
        except AssertionError as error:
            faults.append(f"drivers {trial}: {error}")
    print(f"drivers: one winner in {trials - len(faults)} of {trials}; the slowest loser left after {slowest_s:.2f} s")
    return faults


def commands(folder: Path, trials: int) -> list[str]:
    """Let fresh commands compete; return what went wrong."""
    config = write_study(folder, {"lora": METHODS["lora"]}, (0,))
    arguments = [str(config), "--output"]
    if run_forked([*arguments, str(folder / "undisturbed")], folder / "undisturbed.txt").finish() != 0:
        raise RuntimeError((folder / "undisturbed.txt").read_text()[-3000:])
    expected = ends_of(folder / "undisturbed")
    faults = []
    losers = []
    for trial in range(trials):
        out = folder / str(trial)
        two = [run_fresh([*arguments, str(out)], folder / f"{trial}-{number}.txt") for number in range(2)]
        first = two[1].wait(two[0].ended)  # so that its end is seen at once
        loser, winner = (two if first else two[::-1])[:2]
        logs = [folder / f"{trial}-{two.index(command)}.txt" for command in (loser, winner)]
        fault = _fault(loser, winner, logs, out, expected)
        losers.append(loser)
        print(
            f"commands {trial}: the loser left after {loser.seconds:.2f} s, {loser.busy_s:.2f} s of a core: "
            f"{fault or 'sound'}",
            flush=True,
        )
        faults += [f"commands {trial}: {fault}"] if fault else []
    slowest = max(losers, key=lambda command: command.seconds)
    print(
        f"commands: one winner in {trials - len(faults)} of {trials}; the slowest loser left {slowest.seconds:.2f} s "
        f"after its start, of which its interpreter and it were busy for {slowest.busy_s:.2f} s"
    )
    return faults


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
    import torture_results

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drivers", type=int, default=0, metavar="TRIALS", help="of forked drivers")
    parser.add_argument("--commands", type=int, default=0, metavar="TRIALS", help="of fresh commands")
    parser.add_argument("--dry", action="store_true", help="keep no results")
    asked = parser.parse_args()
    sound = True
    with tempfile.TemporaryDirectory(prefix="peft-vit-torture-") as folder:
        for do, trials, kind in (
            (drivers, asked.drivers, "forked drivers"),
            (commands, asked.commands, "fresh commands"),
        ):
            if not trials:
                continue
            faults = do(Path(folder) / kind, trials)
            sound &= not faults
            print("\n".join(faults), end="\n" if faults else "")
            if not asked.dry:
                torture_results.add(PROMISE, kind, trials=trials, passed=trials - len(faults), faults=faults)
    if not sound:
        sys.exit(1)


if __name__ == "__main__":
    main()
