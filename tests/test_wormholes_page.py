"""docs/wormholes.md: its code runs, and what it says of the gates is so."""

from __future__ import annotations

import re
from pathlib import Path

import twnn_plugin as tw

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "wormholes.md").read_text(encoding="utf-8")


def test_the_snippets_run_one_after_another(capsys):
    names: dict = {}
    snippets = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    for code in snippets:
        exec(compile(code, "docs/wormholes.md", "exec"), names)
    printed = capsys.readouterr().out
    assert len(snippets) == 5 and "layer3->layer2" in printed
    assert "0.25 of the samples are open" in printed and "% of the parameters are trained" in printed


def test_every_gate_is_on_the_page():
    assert all(f"`{name}`" in PAGE for name in tw.gates.names())
