"""A command as on Windows, as far as this machine can play it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

_CODE = r"""
import os, sys, warnings
warnings.filterwarnings("error", category=EncodingWarning, module=r"peft_vit\.")
{imports}  # what these do on POSIX is theirs
for name in ("fcntl", "grp", "pwd", "resource", "syslog", "termios"):
    sys.modules[name] = None
for name in ("O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "fork", "getuid", "pread", "pwrite", "uname"):
    delattr(os, name)
from peft_vit.cli import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    assert not ended.code, ended.code
assert not {{*{absent!r}}} & set(sys.modules), "imported on the way"
"""


def run_without_posix(*arguments: str, imports: str, absent: Sequence[str]) -> str:
    """Run `peft-vit` with arguments and without `fcntl` and the like, and return what it printed.

    Text is written as a console of Windows takes it, and a file opened without an encoding is an error.

    Args:
        arguments: of the command.
        imports: a line that imports other libraries first.
        absent: modules that the command must not have imported.
    """
    code = _CODE.format(imports=imports, absent=[*absent])
    encodings = {"PYTHONIOENCODING": "cp1252", "PYTHONWARNDEFAULTENCODING": "1", "PYTHONUTF8": "0"}
    command = [sys.executable, "-c", code, *arguments]
    ended = subprocess.run(command, check=False, capture_output=True, env={**os.environ, **encodings})
    assert not ended.returncode, ended.stderr.decode()
    return ended.stdout.decode("cp1252")
