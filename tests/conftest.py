"""With pytest-xdist the whole suite runs in two processes unless ``-n`` says otherwise; parts in one."""

from __future__ import annotations

import os

import pytest

_SIDE_BY_SIDE = 2
_WORKER = "PYTEST_XDIST_WORKER" in os.environ

if _WORKER:
    # Before torch is imported, and for the processes that tests begin: threads that outnumber the cores wait
    # for each other.
    count = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    option = config.option
    whole = config.args_source is not pytest.Config.ArgsSource.ARGS and not option.collectonly
    if whole and not _WORKER and not option.usepdb and getattr(option, "numprocesses", 0) is None:
        option.numprocesses, option.dist = _SIDE_BY_SIDE, "loadfile"  # a file's fixtures are made once
