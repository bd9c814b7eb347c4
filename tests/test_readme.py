"""The README: its snippets run, its commands are the ones CI runs, its figures are measured ones."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from zoo.demo.readme import insert
from zoo.demo.report import render

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
DERIVATIVES = re.findall(
    r"```python\n(.*?)```", (ROOT / "docs" / "derivatives.md").read_text(encoding="utf-8"), re.DOTALL
)


@pytest.mark.parametrize("code", [*SNIPPETS, *DERIVATIVES])
def test_snippet_runs(code, monkeypatch):
    import twnn_plugin as tw

    before = tw.solvers.registry.snapshot()
    # A plugin's dataclass looks its module up, so the snippet needs one.
    import sys
    import types

    module = types.ModuleType("readme_snippet")
    monkeypatch.setitem(sys.modules, "readme_snippet", module)
    try:
        exec(compile(code, "README.md", "exec"), module.__dict__)
    finally:
        tw.solvers.registry.restore(before)
    assert len(SNIPPETS) >= 5 and DERIVATIVES


def test_the_first_snippet_does_what_its_comments_say():
    names: dict = {}
    exec(compile(SNIPPETS[0], "README.md", "exec"), names)
    import timm
    import torch

    model = names["model"]
    backbone = timm.create_model("resnet18", num_classes=10).eval()
    backbone.load_state_dict(
        {key: value for key, value in model.state_dict().items() if not key.startswith("wormholes.")}
    )
    assert torch.equal(backbone(names["images"]), names["plain"])
    assert not torch.equal(names["settled"], names["plain"])


def test_exactly_two_commands_from_a_bare_clone():
    commands = re.findall(r"^python3 -m venv .*$", README, re.MULTILINE)
    assert commands == [
        "python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/twnn demo",
        "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/python -m pytest",
    ]
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "install -e '.[test]'" in ci and "-m pytest" in ci


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_demo_figures_are_those_that_were_measured():
    figures = json.loads((ROOT / "docs" / "demo" / "metrics.json").read_text(encoding="utf-8"))
    assert not figures["provenance"]["quick"]
    assert insert(README, figures) == README
    assert (ROOT / "docs" / "demo" / "report.md").read_text(encoding="utf-8") == render(figures)
