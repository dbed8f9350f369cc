"""Where an extra is not installed, what needs it is one line, and what does not need it works."""

import re
import subprocess
import sys
from pathlib import Path

import planted

from peft_vit.extras import EXTRAS


def test_it_is_refused_before_anything_is_read(tmp_path: Path, refused, without) -> None:
    without("matplotlib", "optuna")
    report = "error: a report needs the package matplotlib; run: pip install 'peft-vit[report]'"
    tuning = "error: tune needs the packages optuna and matplotlib; run: pip install 'peft-vit[tune]'"
    assert refused("report", tmp_path) == report
    assert refused("tune", tmp_path / "no images") == tuning
    assert not list(tmp_path.iterdir())


def test_tables_in_a_terminal_need_neither_torch_nor_what_draws(tmp_path: Path) -> None:
    """In another process, where nothing that an extra brings can be imported."""
    for place, seeds in (("a", (0, 1)), ("b", (2, 3))):
        planted.write(tmp_path / place, planted.quickstart(seeds))
    code = (
        "import sys\nfrom peft_vit.extras import EXTRAS\n"
        "for name in {name for needed in EXTRAS.values() for name in needed} | {'torch'}: sys.modules[name] = None\n"
        "from peft_vit.cli import main\n"
        "for command, *folders in (('recommend', 'a'), ('status', 'a'), ('compare', 'a', 'b')):\n"
        "    try:\n        main([command, *folders])\n"
        "    except SystemExit as done:\n        print(command, done.code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.findall("^(recommend|status|compare) ([0-9]+)$", done.stdout, re.MULTILINE) == [
        ("recommend", "0"), ("status", "0"), ("compare", "0")
    ]  # fmt: skip


def test_the_command_that_an_error_names_needs_no_index_for_this_package() -> None:
    """pip takes what an extra names from the installed package; here all of it is there, so nothing is fetched."""
    command = ["install", "--dry-run", "--no-index", "--disable-pip-version-check", f"peft-vit[{','.join(EXTRAS)}]"]
    done = subprocess.run([sys.executable, "-m", "pip", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "does not provide the extra" not in done.stderr
    assert "Would install" not in done.stdout
