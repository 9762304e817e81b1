"""One file a command; what answers at once loads little; a mistyped command names the nearest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import plpp_reg.commands
from plpp_reg.commands import cli

FILES = {path.stem for path in Path(plpp_reg.commands.__file__).parent.glob("*.py")}


def test_every_command_is_a_file_and_every_file_a_command() -> None:
    assert FILES - {"__init__", "cli", "flags"} == set(cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_loads_its_own_file_alone(command: str) -> None:
    code = "import contextlib, sys\nfrom plpp_reg.commands.cli import main\n"
    code += "with contextlib.suppress(SystemExit):\n    main([sys.argv[1], '--help'])\n"
    code += "print(*sorted(name for name in sys.modules if name.startswith('plpp_reg') or name in ('torch', 'numpy')))"
    done = subprocess.run([sys.executable, "-c", code, command], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"usage: plpp {command} ")
    loaded = done.stdout.splitlines()[-1].split()
    ours = {"plpp_reg", "plpp_reg.errors", "plpp_reg.commands", "plpp_reg.commands.cli", f"plpp_reg.commands.{command}"}
    light = {f"plpp_reg.{name}" for name in ("commands.flags", "io", "io.paths", "io.signals", "io.terminal")}
    assert ours <= set(loaded) <= ours | light


@pytest.mark.parametrize(("typed", "nearest"), [("tabel", "table"), ("trian", "train"), ("reprot", "report"), ("Run", "run")])
def test_a_mistyped_command_names_the_nearest(typed: str, nearest: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main([typed, "somewhere"]) == 2
    error = capsys.readouterr().err
    assert f"unknown command {typed!r}: did you mean {nearest!r}?" in error and error.count("\n") == 1


def test_python_m_plpp_reg_is_the_same_program() -> None:
    done = subprocess.run([sys.executable, "-m", "plpp_reg", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"plpp-reg {plpp_reg.__version__}\n"
    done = subprocess.run([sys.executable, "-m", "plpp_reg", "tabel"], capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean 'table'?" in done.stderr
