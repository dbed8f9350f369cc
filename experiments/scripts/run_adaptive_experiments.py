"""Run the adaptive study: fixed-rank baselines, AdaLoRA, QA-LoRA. A thin script over `peft-vit run`.

Finished runs are kept and skipped; the same command goes on where it was interrupted. Exit codes: 0 done,
1 a run failed, 2 bad input.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from peft_vit import cli

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "experiments" / "configs"
BASELINES = CONFIGS / "fixed_rank_baselines.yaml"
ADALORA = CONFIGS / "adalora_comprehensive_experiment.yaml"
QA_LORA = CONFIGS / "qa_lora_comprehensive_experiment.yaml"
OUTPUTS = ROOT / "experiments" / "outputs"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return what was asked for."""
    parser = argparse.ArgumentParser(description="Run the adaptive study; existing runs are kept and skipped.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run-all", dest="method", action="store_const", const="all", help="baselines, AdaLoRA, QA-LoRA")
    what.add_argument("--run-adalora", dest="method", action="store_const", const="adalora", help="AdaLoRA alone")
    what.add_argument("--run-qa-lora", dest="method", action="store_const", const="qa_lora", help="QA-LoRA alone")
    parser.add_argument(
        "--config",
        type=Path,
        nargs="+",
        action="extend",
        metavar="FILE",
        help="these studies instead of the full-size ones; of them --run-adalora and --run-qa-lora run "
        "the experiments of that method",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--minutes", type=float, help="stop after so many; the same command does what is left")
    parser.add_argument("--smoke", action="store_true", help="random weights, synthetic images, a few steps; marked so")
    parser.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="default: experiments/outputs/adaptive, with --smoke experiments/outputs/adaptive_smoke",
    )
    return parser.parse_args(arguments)


def command(asked: argparse.Namespace) -> list[str]:
    """Return the arguments for `peft-vit`."""
    files = {"all": [BASELINES, ADALORA, QA_LORA], "adalora": [ADALORA], "qa_lora": [QA_LORA]}[asked.method]
    output_dir = asked.output_dir or OUTPUTS / ("adaptive_smoke" if asked.smoke else "adaptive")
    flags = [flag for flag, on in (("--dry-run", asked.dry_run), ("--smoke", asked.smoke)) if on]
    minutes = [] if asked.minutes is None else ["--minutes", str(asked.minutes)]
    only = [] if asked.method == "all" else ["--method", asked.method]
    return ["run", *map(str, asked.config or files), "--output", str(output_dir), *flags, *minutes, *only]


def main(arguments: list[str] | None = None) -> None:
    """Parse, and hand the studies to `peft-vit run`."""
    cli.main(command(parse(arguments)))


if __name__ == "__main__":
    main()
