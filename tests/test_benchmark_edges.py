"""Edges of the benchmarks' harness."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness import Settings, provenance


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_copy_without_a_history_is_not_of_the_repository_that_it_lies_in(tmp_path: Path, monkeypatch):
    outer, copy = tmp_path / "theirs", tmp_path / "theirs" / "copy"
    copy.mkdir(parents=True)
    module = sys.modules["benchmarks.harness.provenance"]  # its name in the package is the function's
    git = ["git", "-C", str(outer), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", "theirs"], check=True)
    (copy / "code.py").write_text("1\n")
    monkeypatch.setattr(module, "ROOT", copy)
    found = provenance(Settings(), "")
    assert (found["commit"], found["dirty"]) == ("unknown", False)
    monkeypatch.setattr(module, "ROOT", outer)
    found = provenance(Settings(), "")
    assert len(found["commit"]) == 40 and found["dirty"]
