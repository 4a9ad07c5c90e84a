"""Runs ``ftrain checkpoints`` in this process, for the tests of what it shows and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftrain.launch.cli import main


class Shown:
    """Runs a command line; its exit code and what it printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *tokens: str | Path) -> tuple[int, str]:
        code = main(["checkpoints", *map(str, tokens)])
        shown = self._capsys.readouterr()
        assert "Traceback" not in shown.err
        return code, shown.out

    def refused(self, *tokens: str | Path, code: int = 2) -> str:
        """One sentence on standard error, and nothing else."""
        assert main(["checkpoints", *map(str, tokens)]) == code
        shown = self._capsys.readouterr()
        assert shown.out == ""
        assert shown.err.startswith("ftrain: ")
        assert shown.err.count("\n") == 1, shown.err
        return shown.err

    def told(self, *tokens: str | Path, code: int = 0) -> Any:
        """The JSON that it printed."""
        found, text = self(*tokens, "--json")
        assert found == code
        return json.loads(text)
