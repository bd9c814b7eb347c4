"""``twnn train`` and ``twnn eval`` with a policy that picks layers: phases, rewards, collapse, the sweep."""

from __future__ import annotations

import itertools
import json
import os
import re
import socket
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from torch.nn import functional as F

import twnn_plugin as tw
from twnn_plugin.errors import SelectionWarning
from twnn_plugin.selection import selection_of
from twnn_plugin.selection.learning import MEASURES
from zoo import config as config_module
from zoo.checkpoint import BEST, LAST, load_checkpoint
from zoo.cli import main
from zoo.config import TrainConfig, check_same_run
from zoo.construct import construct, default_model
from zoo.data.text import DocumentSplit, StreamSplit, TextSplits, load_text
from zoo.errors import CheckpointError, ConfigError
from zoo.objective import Objective
from zoo.runstate import make_run_state
from zoo.selecting import SelectionSums, collapse, make_selecting
from zoo.train import train

from .runs import ROOT, assert_equal

TINY = {"hidden": 8, "tol": 1e-2, "max_iter": 6, "drop_rate": 0.1}
EAGER = {"nop_bias": -1.0, "epsilon": 0.2}


def some_text(name: str = "kjv-small-books", rows: int = 96) -> TextSplits:
    """A little of a text."""
    data = load_text(name, vocab_size=60, length=6)

    def cut(split, count):
        if isinstance(split, DocumentSplit):
            index = torch.arange(len(split))[:: len(split) // count][:count]
            return DocumentSplit(*split.rows(index))
        return StreamSplit(split.tokens[: count * 6 + 3], 6)

    return replace(data, train=cut(data.train, rows), val=cut(data.val, 32), test=cut(data.test, 32))


@pytest.fixture(scope="module")
def verses():
    return some_text()


def config(**changes) -> TrainConfig:
    plain = {
        **{
            "model": "dynalay_lstm3",
            "dataset": "kjv-small-books",
            "policy": "dynalay",
            "policy_kwargs": EAGER,
        },
        **{"model_kwargs": TINY, "epochs": 3, "main_epochs": 1, "agent_epochs": 1, "batch_size": 32},
        **{"device": "cpu", "log_interval": 1, "warmup_epochs": 0, "lr": 0.01},
    }
    return TrainConfig(**{**plain, **changes})


def split_state(model) -> tuple[dict, dict]:
    """Copies of the agent's state and of the rest's."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    agent = {name: value for name, value in state.items() if name.startswith("selection.policy.")}
    return agent, {name: value for name, value in state.items() if name not in agent}


class TestPhases:
    def test_who_learns_when(self, verses):
        """The main model, then the agent alone, to the bit and under weight decay; then both."""
        torch.manual_seed(0)
        model = construct("dynalay_lstm3", verses, TINY, policy="dynalay", policy_kwargs=EAGER)
        seen = [split_state(model)]
        records = []

        def note(record):
            records.append(record)
            if record["kind"] == "epoch":
                seen.append(split_state(model))

        train(
            config(policy=None, policy_kwargs={}, weight_decay=0.1), data=verses, model=model, callback=note
        )
        phases = [record["phase"] for record in records if record["kind"] == "epoch"]
        assert phases == ["main", "agent", "both"]
        for phase, (before, after) in zip(phases, itertools.pairwise(seen), strict=True):
            moved = [
                any(not torch.equal(old[name], new[name]) for name in old)
                for old, new in zip(before, after, strict=True)
            ]
            assert moved == [phase != "main", phase != "agent"], phase
        # Exploration moves on with the agent's steps alone.
        assert int(model.selection.policy.trained) == 6
        assert model.selection.policy.exploring() == 0.2

    def test_the_main_model_warms_up_on_random_choices(self, verses):
        records = []
        kwargs = {"nop_bias": 50.0, "epsilon": 0.0}
        train(
            config(policy_kwargs=kwargs, epochs=2, agent_epochs=0, log_interval=0),
            data=verses,
            callback=records.append,
        )
        shares = [{k: v for k, v in r.items() if k.startswith("train_share")} for r in records]
        assert all(0.1 < share < 0.4 for share in shares[0].values())
        assert shares[1]["train_share_nop"] == 1.0
        assert records[0]["train_cost"] > 0.5 and records[1]["train_cost"] == 0

    def test_or_on_the_least_certain_share_of_each_batch(self, verses):
        records = []
        model = construct(
            "dynalay_lstm3", verses, TINY, policy="dynalay", policy_kwargs={"nop_bias": 50.0, "epsilon": 0.0}
        )
        train(
            config(policy=None, policy_kwargs={}, epochs=2, main_share=0.25, agent_epochs=0, log_interval=0),
            data=verses,
            model=model,
            callback=records.append,
        )
        # A quarter decides twice, once for one of three layers and then for none.
        shares = [records[0][f"train_share_layer{n}"] for n in (1, 2, 3)]
        assert sum(shares) == pytest.approx(0.2) and all(share > 0.02 for share in shares)
        assert records[1]["train_share_nop"] == 1.0  # the agent's own choices again
        assert model.selection.policy.guide == ()

    def test_a_share_for_nothing(self, verses):
        for epochs in (0, None):  # a fifth of three epochs is none
            with pytest.raises(ConfigError, match="main_epochs is 0"):
                train(config(main_share=0.5, main_epochs=epochs), data=verses)
        with pytest.raises(ConfigError, match="between 0 and 1"):
            config(main_share=1.5)
        with pytest.raises(ConfigError, match="does not learn"):
            train(
                config(
                    policy="always", policy_kwargs={}, main_epochs=None, agent_epochs=None, main_share=0.5
                ),
                data=verses,
            )

    def test_an_image_models_statistics_rest_with_it(self):
        model = construct("dynalay_cnn3", _digits(), {"max_iter": 5}, policy="dynalay", policy_kwargs=EAGER)
        before = split_state(model)[1]
        settings = config(
            **{"model": "dynalay_cnn3", "dataset": "digits", "model_kwargs": {}, "policy": None},
            **{"policy_kwargs": {}, "epochs": 1, "main_epochs": 0, "agent_epochs": 1},
        )
        train(settings, data=_digits(), model=model)
        assert_equal(before, split_state(model)[1])

    def test_defaults_leave_most_epochs_to_both(self, verses):
        model = construct("dynalay_lstm3", verses, TINY)
        found = make_selecting(
            config(epochs=20, main_epochs=None, agent_epochs=None), model, torch.device("cpu")
        )
        assert found is not None and (found.main_epochs, found.agent_epochs) == (4, 2)
        assert [found.counts(epoch) for epoch in (0, 3, 4, 19)] == [False, False, True, True]

    def test_the_best_epoch_is_one_with_an_agent(self, verses):
        result = train(config(main_epochs=2, agent_epochs=0, lr=1e-7), data=verses)
        assert result.best_epoch == 2

    def test_a_policy_that_learns_nothing_has_no_phases(self, verses):
        records = []
        train(
            config(policy="random", policy_kwargs={"p": 0.5}, epochs=1, main_epochs=None, agent_epochs=None),
            data=verses,
            callback=records.append,
        )
        assert records[-1]["phase"] == "both"
        assert 0.2 < records[-1]["train_share_nop"] < 0.9


def _digits():
    from zoo.data import DataSplits, load_data

    data = load_data("digits")
    few = torch.arange(64)
    return DataSplits(data.spec, data.train.subset(few), data.val.subset(few), data.test.subset(few))


def test_the_measures_are_those_of_the_reward():
    assert config_module.MEASURES == MEASURES


class TestRecords:
    def test_what_is_logged(self, tmp_path, verses):
        train(config(output=str(tmp_path / "run")), data=verses)
        records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        update, epoch = records[-2], records[-1]
        names = ("reward", "cost", "share_nop", "share_layer1", "share_layer2", "share_layer3")
        assert set(names) <= set(update)
        for prefix in ("train", "val"):
            assert {f"{prefix}_{name}" for name in (*names, "accuracy")} <= set(epoch)
            assert abs(sum(v for k, v in epoch.items() if k.startswith(f"{prefix}_share")) - 1) < 1e-6
        saved = load_checkpoint(tmp_path / "run" / LAST)["state_dict"]
        assert any(name.startswith("selection.policy.") for name in saved)

    def test_the_reward_is_that_of_the_settings(self, verses):
        """With beta, repeat and lambda at hand: alpha * accuracy - beta * cost."""
        records = []
        train(
            config(
                epochs=1, main_epochs=0, agent_epochs=0, reward_alpha=0.7, reward_beta=0.2, reward_repeat=0.0
            ),
            data=verses,
            callback=records.append,
        )
        last = records[-1]
        assert last["val_cost"] > 0
        assert last["val_reward"] == pytest.approx(
            0.7 * last["val_accuracy"] - 0.2 * last["val_cost"], abs=1e-5
        )

    def test_a_language_model_is_judged_by_its_perplexity(self):
        records = []
        result = train(
            config(dataset="kjv-small", epochs=2, agent_epochs=0),
            data=some_text("kjv-small"),
            callback=records.append,
        )
        last = records[-1]
        assert last["val_perplexity"] == pytest.approx(torch.tensor(last["val_nll"]).exp().item())
        assert result.best_metric == pytest.approx(1 / last["val_perplexity"])

    def test_next_tokens_are_smoothed_like_labels(self):
        model = construct("lstm3", some_text("kjv-small"), {"hidden": 4})
        x = torch.randint(60, (3, 6))
        loss, _, logits = Objective(model, smoothing=0.1)(x, x)
        assert logits.shape == (3, 60, 6)
        torch.testing.assert_close(loss, F.cross_entropy(logits, x, label_smoothing=0.1))

    def test_sums_of_two_processes_are_sums_of_both(self):
        sums = SelectionSums(["a", "b"])
        sums.sums = torch.tensor([4.0, 2.0, 1.0, 8.0, 4.0, 3.0, 1.0, 1.0, 2.0, 1.0], dtype=torch.float64)
        twice = sums.figures(2 * sums.sums)
        assert (
            twice
            == sums.figures()
            == {**{"reward": 0.5, "cost": 0.25, "share_nop": 0.5, "share_a": 0.375, "share_b": 0.125}}
        )
        assert sums.first_shares() == {"nop": 0.25, "a": 0.5, "b": 0.25}


class TestCollapse:
    def test_the_log_warns_and_names_the_setting(self, verses):
        records = []
        with pytest.warns(
            SelectionWarning, match=r"'nop' first for 100.0 %.*lower reward_beta=0.3"
        ) as caught:
            train(
                config(policy_kwargs={"nop_bias": 30.0}, epochs=3, main_epochs=0, log_interval=0),
                data=verses,
                callback=records.append,
            )
        assert len(caught) == 1  # told once, not every epoch
        assert ["reward_beta" in record.get("val_warning", "") for record in records] == [True, False, False]

    def test_the_other_way_round(self, verses):
        with pytest.warns(SelectionWarning, match=r"'layer\d'.*raise reward_beta"):
            train(config(policy_kwargs={"nop_bias": -30.0}, epochs=1, main_epochs=0), data=verses)

    def test_no_word_without_collapse_or_while_the_main_model_warms_up(self, verses):
        sums = SelectionSums(["a"])
        sums.sums[0], sums.sums[-2:] = 100, torch.tensor([97.0, 3.0])
        assert collapse(sums) is None
        sums.sums[-2:] = torch.tensor([98.0, 2.0])
        assert collapse(sums) == "nop"
        with warnings.catch_warnings():
            warnings.simplefilter("error", SelectionWarning)
            train(
                config(policy_kwargs={"nop_bias": 30.0}, epochs=1, main_epochs=1, agent_epochs=0), data=verses
            )


class TestOptimizer:
    def test_the_agent_has_a_rate_of_its_own_and_no_decay(self, verses):
        model = construct("dynalay_lstm3", verses, TINY)
        settings = config(policy_lr=1e-4, sched="cosine", weight_decay=0.3, epochs=4)
        state = make_run_state(settings, model, torch.device("cpu"), 10)
        *others, own = state.optimizer.param_groups
        assert {id(p) for p in own["params"]} == {id(p) for p in selection_of(model).policy.parameters()}
        assert own["weight_decay"] == 0 and own["lr"] == 1e-4
        assert {g["lr"] for g in others} == {0.01} and 0.3 in {g["weight_decay"] for g in others}
        assert sum(len(g["params"]) for g in state.optimizer.param_groups) == len(list(model.parameters()))
        state.scheduler.step_update(20)
        assert own["lr"] == pytest.approx(5e-5) and others[0]["lr"] == pytest.approx(5e-3)


class TestResuming:
    def test_to_the_bit_with_the_agents_state(self, tmp_path, verses):
        """Stopped in the middle of the agent's phase."""
        whole = config(output=str(tmp_path / "a"), checkpoint_interval=1)

        def stop(record):
            if record["step"] == 5:
                raise RuntimeError("stop here")

        train(whole, data=verses)
        broken = replace(whole, output=str(tmp_path / "b"))
        with pytest.raises(RuntimeError, match="stop here"):
            train(broken, data=verses, callback=stop)
        assert load_checkpoint(tmp_path / "b" / LAST)["updates"] == 4
        train(replace(broken, resume="auto"), data=verses)
        for name in (LAST, BEST):
            assert_equal(load_checkpoint(tmp_path / "a" / name), load_checkpoint(tmp_path / "b" / name))
        assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == (
            tmp_path / "b" / "metrics.jsonl"
        ).read_bytes()

    def test_a_checkpoint_of_before_there_were_policies(self):
        settings = config(policy=None, policy_kwargs={}, main_epochs=None, agent_epochs=None)
        old = {
            name: value
            for name, value in settings.as_dict().items()
            if not name.startswith(("reward", "policy"))
        }
        check_same_run(old, settings, "x")
        with pytest.raises(CheckpointError, match=r"--reward-beta was 0\.3 and is now 0\.4"):
            check_same_run(old, replace(settings, reward_beta=0.4), "x")


TWO_PROCESSES = """
import json, os, sys
from dataclasses import replace
import torch
from zoo.config import TrainConfig
from zoo.train import train
from tests.test_policy_training import some_text

class Stop(Exception):
    pass

def stop(record):
    if record["step"] == 3:
        os.kill(os.getpid(), __import__("signal").SIGINT)

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
folder, rank = sys.argv[2], torch.distributed.get_rank()
config = TrainConfig(**json.loads(sys.argv[1]), output=f"{folder}/whole")
data = some_text()
result = train(config, data=data)
torch.save(dict(result.model.state_dict()), f"{folder}/rank{rank}.pth")
broken = replace(config, output=f"{folder}/broken")
try:
    train(broken, data=data, callback=stop)
except KeyboardInterrupt:
    torch.save(rank, f"{folder}/interrupted{rank}.pth")
train(replace(broken, resume="auto"), data=data)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes_agree_and_resume(tmp_path):
    settings = {**config(batch_size=16).as_dict(), "output": None}
    del settings["output"], settings["decay_milestones"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **world}
    command = [sys.executable, "-W", "ignore", "-c", TWO_PROCESSES, json.dumps(settings), str(tmp_path)]
    children = [
        subprocess.Popen(command, env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=ROOT)
        for rank in range(2)
    ]
    assert [child.wait(timeout=300) for child in children] == [0, 0]
    left, right = (torch.load(tmp_path / f"rank{rank}.pth") for rank in range(2))
    assert_equal(left, right)
    assert all((tmp_path / f"interrupted{rank}.pth").exists() for rank in range(2))
    whole, broken = (load_checkpoint(tmp_path / name / LAST) for name in ("whole", "broken"))
    assert whole["updates"] == 9
    assert_equal(whole, broken)
    assert_equal(*((tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "broken")))


def twnn(*args: object):
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run on the shipped text; its best checkpoint has an agent whose scores differ between verses."""
    folder = tmp_path_factory.mktemp("policy") / "run"
    result = twnn(
        *("train", "--policy", "dynalay", "--policy-kwargs", "nop_bias=0", "epsilon=0.3"),
        *("--dataset", "kjv-small-books", "--model-kwargs", "hidden=8", "max_iter=6", "tol=0.01"),
        *("--text-length", "4", "--vocab-size", "50", "--epochs", "2", "--main-epochs", "0"),
        *("--agent-epochs", "0", "--batch-size", "128", "--warmup-epochs", "0", "--log-interval", "0"),
        *("--device", "cpu", "--output", folder),
    )
    assert result.exit_code == 0, result.output
    assert "Trained dynalay_lstm3 on kjv-small-books" in result.output
    path = folder / LAST
    state = torch.load(path)
    torch.manual_seed(0)
    for name, value in state["state_dict"].items():
        if name.endswith("policy.score.weight"):
            value.normal_(std=3.0)
    torch.save(state, path)
    return folder


class TestEval:
    def test_the_cost_is_swept_without_retraining(self, run_folder, tmp_path):
        file = tmp_path / "figures.json"
        result = twnn(
            *("eval", "--checkpoint", run_folder / LAST, "--cost-weights", "-50,-1,0,1,3,50", "--no-latency"),
            *("--device", "cpu", "--json", file, "--batch-size", "256"),
        )
        assert result.exit_code == 0, result.output
        figures = json.loads(file.read_text())
        sweep = figures["sweep"]
        assert [row["cost_weight"] for row in sweep] == [-50, -1, 0, 1, 3, 50]
        nop = [row["shares"]["nop"] for row in sweep]
        assert nop == sorted(nop) and nop[0] < nop[2] < nop[-1] == 1
        assert sweep[-1]["cost"] == 0 and sweep[0]["cost"] > 0
        same = {name: sweep[2][name] for name in ("accuracy", "nll", "cost", "shares")}
        assert same == {name: figures[name] for name in same}  # the run's own cost weight was 0
        for row in sweep:
            assert f"{row['accuracy']:.2%}" in result.stdout and f"{1 + row['cost']:.3f}x" in result.stdout

    def test_another_policy_in_the_agents_place(self, run_folder, tmp_path):
        costs = {}
        for policy, options in (("never", ()), ("random", ("--policy-kwargs", "p=0.5")), ("always", ())):
            file = tmp_path / f"{policy}.json"
            result = twnn(
                *("eval", "--checkpoint", run_folder / LAST, "--policy", policy, *options, "--no-latency"),
                *("--device", "cpu", "--json", file, "--batch-size", "256"),
            )
            assert result.exit_code == 0, result.output
            costs[policy] = json.loads(file.read_text())["cost"]
        assert costs["never"] == 0 < costs["random"] < costs["always"]

    def test_solver_settings_reach_the_layers(self, run_folder, tmp_path):
        file = tmp_path / "figures.json"
        flags = (
            "--policy",
            "always",
            "--max-iter",
            "1",
            "--solver",
            "picard",
            "--no-latency",
            "--device",
            "cpu",
        )
        result = twnn("eval", "--checkpoint", run_folder / LAST, *flags, "--json", file)
        assert result.exit_code == 0, result.output
        assert json.loads(file.read_text())["mean_steps"] == 1

    def test_a_plain_language_model(self, tmp_path):
        file = tmp_path / "figures.json"
        result = twnn(
            *("eval", "--model", "lstm3", "--dataset", "kjv-small", "--model-kwargs", "hidden=4"),
            *("--no-latency", "--device", "cpu", "--json", file),
        )
        assert result.exit_code == 0, result.output
        figures = json.loads(file.read_text())
        assert figures["samples"] == 85 * 64 and figures["cost"] is None
        assert "perplexity" in result.stdout and "tokens" in result.stdout


BAD = [
    (("train", "--policy", "dynalai"), "Did you mean 'dynalay'"),
    (("train", "--policy", "oracle"), "told the labels"),
    (("train", "--policy", "dynalay", "--model", "cnn3"), "Take 'dynalay_cnn3'"),
    (("train", "--policy", "dynalay", "--model", "twnn_resnet8_cifar"), "single spans"),
    (("train", "--policy", "gate", "--model", "dynalay_lstm3", "--dataset", "kjv-small"), "picks layers"),
    (("train", "--policy", "dynalay", "--policy-kwargs", "epsilon=3", "--dataset", "kjv-small"), "epsilon"),
    (("train", "--policy-kwargs", "epsilon=0.1"), "name one with --policy"),
    (("train", "--policy", "dynalay", "--policy-kwargs", "epsilon"), "--policy-kwargs takes NAME=VALUE"),
    (("train", "--reward-alpha", "0", "--reward-beta", "0"), "says nothing"),
    (("train", "--reward-lambda", "0"), "--reward-lambda=0"),
    (("train", "--reward-alpha", "-1"), "--reward-alpha=-1"),
    (("train", "--reward-beta", "0.2"), "would do nothing"),
    (("train", "--closed-weight", "0.2"), "would do nothing"),
    (("train", "--main-epochs", "15", "--agent-epochs", "6"), "more than --epochs=20"),
    (("train", "--dataset", "kjv-smal"), "Did you mean 'kjv-small'"),
    (("train", "--dataset", "wikitext-2", "--data-dir", "{tmp}/none"), "wiki.train.tokens"),
    (("train", "--dataset", "text", "--data-dir", "{tmp}"), "train.txt is empty"),
    (("train", "--dataset", "kjv-small", "--hflip", "0.5"), "--hflip is for images"),
    (("train", "--text-length", "8"), "--text-length is for texts"),
    (("train", "--dataset", "kjv-small", "--text-length", "20000"), "--text-length"),
    (("train", "--dataset", "kjv-small", "--vocab-size", "2"), "--vocab-size=2"),
    (("train", "--dataset", "kjv-small", "--model", "cnn3"), "does not read text"),
    (("train", "--dataset", "digits", "--model", "lstm3"), "reads text"),
    (("train", "--dataset", "kjv-small", "--model-kwargs", "vocab_size=9"), "outside the vocabulary of 9"),
    (
        ("train", "--dataset", "kjv-small", "--policy", "dynalay", "--model-kwargs", "fpi_layers=layer4"),
        "Did you mean 'layer",
    ),
    (("train", "--dataset", "kjv-small", "--policy", "random", "--policy-lr", "0.1"), "does not learn"),
    (("train", "--dataset", "digits", "--policy", "dynalay", "--mixup", "0.2"), "one label a sample"),
    (("train", "--model", "twnn_prefix", "--policy", "dynalay"), "--policy"),
    (("eval", "--model", "cnn3", "--cost-weights", "1"), "no layers that a policy picks"),
    (("eval", "--checkpoint", "{run}", "--cost-weights", "1,x"), "list of numbers"),
    (("eval", "--checkpoint", "{run}", "--policy", "random", "--cost-weights", "1"), "has none"),
    (("eval", "--checkpoint", "{run}", "--policy", "dynalay"), "untrained"),
    (("eval", "--checkpoint", "{run}", "--policy-kwargs", "p=1"), "name one with --policy"),
    (("eval", "--model", "twnn_prefix", "--cost-weights", "1"), "does not apply"),
]


@pytest.mark.parametrize(
    ("args", "said"), BAD, ids=lambda value: "_".join(value) if isinstance(value, tuple) else ""
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, run_folder, args, said):
    monkeypatch.chdir(tmp_path)
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.txt").write_text("\n")
    filled = [arg.replace("{tmp}", str(tmp_path)).replace("{run}", str(run_folder / LAST)) for arg in args]
    result = twnn(*filled, "--device", "cpu")
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    assert said in result.stderr
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_the_model_that_goes_with_data_and_policy():
    assert default_model("kjv-small", None) == "lstm3"
    assert default_model("kjv-small", "dynalay") == "dynalay_lstm3"
    assert default_model("fashion_mnist", "dynalay") == "dynalay_cnn3"
    assert default_model("fashion_mnist", "gate") is default_model("fashion_mnist", "random") is None
    assert default_model("fashion_mnist", None) is None


def test_a_policy_on_an_image_model_from_the_command_line(tmp_path):
    result = twnn(
        *("train", "--policy", "dynalay", "--dataset", "digits", "--epochs", "1", "--main-epochs", "0"),
        *("--agent-epochs", "0", "--model-kwargs", "widths=(4,4,4)", "max_iter=4", "--batch-size", "256"),
        *("--device", "cpu", "--output", tmp_path / "run", "--policy-kwargs", "nop_bias=0"),
    )
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["train_cost"] > 0 and 0 < record["train_share_nop"] < 1
    assert tw.report(construct("dynalay_cnn3", _digits(), {"widths": (4, 4, 4)})) is not None


def test_the_example_of_the_documentation_runs(capsys):
    text = (ROOT / "docs" / "policy_training.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    exec(compile(code, "policy_training.md", "exec"), {})
    assert "multiply-adds a sample" in capsys.readouterr().out
