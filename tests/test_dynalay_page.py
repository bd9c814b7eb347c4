"""The snippets of docs/dynalay.md run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

PAGE = (Path(__file__).parents[1] / "docs" / "dynalay.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)


@pytest.mark.parametrize("place", range(len(SNIPPETS)))
def test_a_snippet_runs(place, capsys):
    torch.manual_seed(0)
    exec(compile(SNIPPETS[place], "docs/dynalay.md", "exec"), {})
    if "tw.report" in SNIPPETS[place]:
        assert "multiply-adds" in capsys.readouterr().out


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (Path(__file__).parents[1] / "docs" / target).exists(), target
