"""Where an extra is not installed, what needs it is one line, and what does not need it works."""

import subprocess
import sys
from pathlib import Path

import planted

from peft_vit.extras import EXTRAS

REFUSED = "error: a report needs the package matplotlib; run: pip install 'peft-vit[report]'"


def test_a_report_is_refused_before_records_are_read(tmp_path: Path, refused, without) -> None:
    without("matplotlib")
    assert refused("report", tmp_path) == REFUSED
    assert not list(tmp_path.iterdir())


def test_a_tuning_is_refused_before_images_are_looked_at(tmp_path: Path, refused, without) -> None:
    without("optuna", "matplotlib")
    said = refused("tune", tmp_path / "no images")
    assert said == "error: tune needs the packages optuna and matplotlib; run: pip install 'peft-vit[tune]'"


def test_tables_in_a_terminal_need_nothing_that_draws(tmp_path: Path) -> None:
    """In another process, where nothing that an extra brings can be imported."""
    for place, seeds in (("a", (0, 1)), ("b", (2, 3))):
        planted.write(tmp_path / place, planted.quickstart(seeds))
    code = (
        "import sys\nfrom peft_vit.extras import EXTRAS\n"
        "for name in {name for needed in EXTRAS.values() for name in needed} - {'torch'}: sys.modules[name] = None\n"
        "from peft_vit.cli import main\nmain(sys.argv[1:])\n"
    )
    one, both = tmp_path / "a", (tmp_path / "a", tmp_path / "b")
    for command, *folders in (("recommend", one), ("status", one), ("compare", *both)):
        done = subprocess.run(
            [sys.executable, "-c", code, command, *map(str, folders)], capture_output=True, text=True, check=False
        )
        assert "Error" not in done.stderr, done.stderr
        assert done.returncode == 0 or done.stderr.startswith("error: "), (command, done.stderr)


def test_the_command_that_an_error_names_needs_no_index_for_this_package() -> None:
    """pip takes what an extra names from the installed package; here all of it is there, so nothing is fetched."""
    command = ["install", "--dry-run", "--no-index", "--disable-pip-version-check", f"peft-vit[{','.join(EXTRAS)}]"]
    done = subprocess.run([sys.executable, "-m", "pip", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "does not provide the extra" not in done.stderr
    assert "Would install" not in done.stdout
