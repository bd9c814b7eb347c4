"""A run killed at any moment ends like one never killed, bit by bit."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import twnn_plugin as tw
from zoo.build import build_model
from zoo.checkpoint import BEST, LAST, load_checkpoint
from zoo.config import TrainConfig
from zoo.errors import CheckpointError
from zoo.train import train

from .runs import HARD, ROOT, assert_equal, small, some_digits


@pytest.fixture(scope="module")
def digits():
    return some_digits()


CHILD = """
import json, os, signal, sys
from zoo.config import TrainConfig
from zoo.train import train
import zoo.checkpoint

moment, step = sys.argv[2], int(sys.argv[3])
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
updates = 0

def callback(record):
    global updates
    updates = record["step"]
    if moment == record["kind"] and updates >= step:
        die()

def replace_or_die(source, target, replace=os.replace):
    if moment == "rename" and updates >= step and str(target).endswith("last.pth.tar"):
        die()
    return replace(source, target)

def save_or_die(state, file, save=zoo.checkpoint.torch.save):
    if moment == "write" and updates >= step:
        file.write(b"half of a checkpoint")
        file.flush()
        die()
    return save(state, file)

os.replace = replace_or_die
zoo.checkpoint.torch.save = save_or_die
train(TrainConfig(**json.loads(sys.argv[1])), callback=callback)
"""


def run_child(config: dict, moment: str = "never", step: int = 0) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, json.dumps(config), moment, str(step)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def one_thread():
    """The child runs on one thread, and the number of threads is part of how sums are rounded."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, one_thread):
    output = tmp_path_factory.mktemp("whole") / "run"
    train(TrainConfig(**HARD, output=str(output)))
    return output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "step"),
    [("update", 8), ("write", 8), ("rename", 20), ("epoch", 20)],
    ids=["between checkpoints", "while a checkpoint is written", "before it is renamed", "after validation"],
)
def test_a_killed_run_resumes_to_the_same_bits(uninterrupted, tmp_path, moment, step):
    config = TrainConfig(**HARD, output=str(tmp_path / "run"))
    killed = run_child({**HARD, "output": config.output}, moment, step)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert 0 < load_checkpoint(tmp_path / "run" / LAST)["updates"] <= step
    train(replace(config, resume="auto"))
    for name in (LAST, BEST):
        assert_equal(load_checkpoint(tmp_path / "run" / name), load_checkpoint(uninterrupted / name))
    lines = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert lines == (uninterrupted / "metrics.jsonl").read_bytes()
    assert len(lines.splitlines()) == 42


def test_a_run_with_wormholes_resumes_to_the_same_bits(tmp_path, digits):
    config = small(output=str(tmp_path / "a"), checkpoint_interval=1, epochs=1, batch_size=32)

    def model() -> nn.Module:
        torch.manual_seed(1)
        return tw.attach(build_model("resnet8_cifar", digits.spec), wormholes="auto")

    def stop(record):
        if record["step"] == 4:
            raise RuntimeError("stop here")

    train(config, data=digits, model=model())
    broken = replace(config, output=str(tmp_path / "b"))
    with pytest.raises(RuntimeError, match="stop here"):
        train(broken, data=digits, model=model(), callback=stop)
    assert load_checkpoint(tmp_path / "b" / LAST)["updates"] == 3
    train(replace(broken, resume="auto"), data=digits, model=model())
    assert_equal(load_checkpoint(tmp_path / "a" / LAST), load_checkpoint(tmp_path / "b" / LAST))
    record = json.loads((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 <= record["val_open_share"] <= 1


def test_an_interrupt_is_saved_and_resumed(tmp_path, digits):
    config = small(output=str(tmp_path / "a"), epochs=2)
    whole = train(replace(config, output=str(tmp_path / "b")), data=digits)

    def interrupt(record):
        if record["step"] == 4:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(config, data=digits, callback=interrupt)
    assert signal.getsignal(signal.SIGINT) is before
    assert load_checkpoint(tmp_path / "a" / LAST)["updates"] == 4
    resumed = train(replace(config, resume=str(tmp_path / "a")), data=digits)
    assert_equal(dict(resumed.model.state_dict()), dict(whole.model.state_dict()))


def test_a_finished_run_resumes_to_itself(tmp_path, digits):
    config = small(output=str(tmp_path / "run"), epochs=1)
    done = train(config, data=digits)
    lines = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = train(replace(config, resume="auto"), data=digits)
    assert again.updates == done.updates
    assert again.best_metric == done.best_metric
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == lines


TWO_PROCESSES = """
import json, os, signal, sys
from dataclasses import replace
import torch
from zoo.config import TrainConfig
from zoo.train import train

def interrupt(record):  # the callback runs on the first process only, and both must stop
    if record["step"] == 7:
        os.kill(os.getpid(), signal.SIGINT)

torch.distributed.init_process_group("gloo")
folder, rank = sys.argv[2], torch.distributed.get_rank()
config = TrainConfig(**json.loads(sys.argv[1]), output=f"{folder}/whole")
result = train(config)
torch.save(dict(result.model.named_parameters()), f"{folder}/rank{rank}.pth")
broken = replace(config, output=f"{folder}/broken")
try:
    train(broken, callback=interrupt)
except KeyboardInterrupt:
    torch.save(rank, f"{folder}/interrupted{rank}.pth")
train(replace(broken, resume="auto"))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_agree_and_resume(tmp_path):
    config = json.dumps({**HARD, "epochs": 1, "batch_size": 64, "checkpoint_interval": 0})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **world}
    command = [sys.executable, "-c", TWO_PROCESSES, config, str(tmp_path)]
    children = [
        subprocess.Popen(command, env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    assert [child.wait(timeout=300) for child in children] == [0, 0]
    left, right = (torch.load(tmp_path / f"rank{rank}.pth") for rank in range(2))
    assert_equal(left, right)
    assert all((tmp_path / f"interrupted{rank}.pth").exists() for rank in range(2))
    whole, broken = (load_checkpoint(tmp_path / name / LAST) for name in ("whole", "broken"))
    assert whole["updates"] == 10  # half as many as one process would do
    assert_equal(whole, broken)
    assert_equal(*((tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "broken")))
    with pytest.raises(CheckpointError, match=r"2 process\(es\); this one has 1"):
        train(TrainConfig(**json.loads(config), resume=str(tmp_path / "whole")))
