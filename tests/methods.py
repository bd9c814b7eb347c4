"""What the tests iterate over: the registered methods, with what each promises."""

from __future__ import annotations

import twnn_plugin as tw

NATIVE = [name for name in tw.solvers.names() if not name.startswith("torchdeq.")]
BRIDGED = [name for name in tw.solvers.names() if name.startswith("torchdeq.")]
EXACT = [name for name in tw.adjoints.names() if tw.adjoints.get(name).exact]  # type: ignore[attr-defined]
