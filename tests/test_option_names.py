"""A misspelled option is answered with the nearest of all that the caller takes, and with their list."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import twnn_plugin as tw
from twnn_plugin.sequence import RecurrentStack
from zoo.models import DYNALAY, NAMES, REASONING, SEQUENCES, TEXT
from zoo.models.dynalay_timm import DynaLayNet
from zoo.models.sequence import SequenceModel
from zoo.plugin import BACKBONES

ATTACH = {
    "wormhole": "wormholes",
    "polcy": "policy",
    "jacobain": "jacobian",
    "budge": "budget",
    "gates": "gate",
    "fallbak": "fallback",
    "mesage": "message",
    "closedhead": "closed_head",
    "closed_wieght": "closed_weight",
    "scal": "scale",
    "opning": "opening",
    "contracton": "contraction",
    "stags": "stages",
    "exmple": "example",
    "maxiter": "max_iter",
    "sover": "solver",
}
BLOCK = {
    "polcy": "policy",
    "jacobain": "jacobian",
    "mesage": "message",
    "scal": "scale",
    "opning": "opening",
    "contracton": "contraction",
    "channel_last": "channels_last",
    "toll": "tol",
}
STACK = {
    "wormhole": "wormholes",
    "polcy": "policy",
    "gate_ovr": "gate_over",
    "budge": "budget",
    "windows": "window",
    "causl": "causal",
    "scal": "scale",
    "drop_out": "dropout",
    "num_layer": "num_layers",
    "max_itr": "max_iter",
}
MODELS = (*NAMES, *DYNALAY, *REASONING, *SEQUENCES, *TEXT)
OWN = [
    ("cnn3", "widht", "widths"),
    ("resnet8_cifar", "dept", "depth"),
    ("resnet8_tiny", "dept", "depth"),
    ("hamiltonian_20", "layer", "act_layer"),
    ("hamiltonian_20", "reversable", "reversible"),
    ("deq_small", "f_sover", "f_solver"),
    ("dynalay_cnn3", "polcy", "policy"),
    ("dynalay_cnn3", "fpi_layer", "fpi_layers"),
    ("dynalay_cnn3", "max_choice", "max_choices"),
    ("dynalay_cnn3", "open_haed", "open_head"),
    ("dynalay_cnn3", "orthogonl", "orthogonal"),
    ("dynalay_cnn3", "last_pol", "last_pool"),
    ("dynalay_lstm3", "polcy", "policy"),
    ("dynalay_gru3", "maxchoices", "max_choices"),
    ("lstm3", "hiden", "hidden"),
    ("twnn_gru_rows", "polcy", "policy"),
    ("twnn_lstm_pixels", "wormhole", "wormholes"),
    ("gru_rows", "hiden", "hidden"),
    ("gru_rows", "num_layers", "layers"),
    ("twnn_prefix", "widht", "width"),
    ("twnn_prefix", "max_itr", "max_iter"),
    ("deq_prefix", "f_sover", "f_solver"),
    ("deq_prefix", "tol", "f_tol"),
    ("rnn_prefix", "maxiter", "max_iter"),
    ("twnn_maze", "latchin", "latching"),
    ("twnn_maze", "polcy", "policy"),
    ("deq_maze", "b_maxiter", "b_max_iter"),
    ("twnn_pathfinder", "stemwidth", "stem_width"),
    ("ff_prefix", "dept", "depth"),
    ("ff_maze", "dept", "depth"),
    ("ff_pathfinder", "question", "questions"),
    ("dynalay_resnet18", "max_choice", "max_choices"),
    ("dynalay_resnet18", "polcy", "policy"),
    ("dynalay_resnet18", "drop_rat", "drop_rate"),
    ("dynalay_resnet8_cifar", "polcy", "policy"),
    ("dynalay_resnet8_cifar", "dept", "depth"),
    ("twnn_resnet18", "wormhole", "wormholes"),
    ("twnn_resnet18", "drop_rat", "drop_rate"),
    ("twnn_resnet8_cifar", "polcy", "policy"),
    ("twnn_resnet8_cifar", "dept", "depth"),
    ("twnn_hamiltonian_20", "reversable", "reversible"),
    ("twnn_vit_tiny_patch16_224", "img_sze", "img_size"),
]
"""A model, a misspelled option of its own, and what was meant."""


def refused(make, given: str, meant: str, *listed: str) -> None:
    """``make`` fails, names what was given and meant, and lists what there is."""
    with pytest.raises(tw.OptionError, match=rf"no option '{given}'\. Did you mean '{meant}'\?") as info:
        make()
    assert isinstance(info.value, TypeError) and isinstance(info.value, ValueError)
    shown = str(info.value).partition("Did you mean")[2]
    for name in (meant, *listed):
        assert f" {name}," in shown or f" {name}." in shown, name


@pytest.mark.parametrize(("given", "meant"), ATTACH.items())
def test_attach(given, meant):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    refused(lambda: tw.attach(model, **{given: 1}), given, meant, *ATTACH.values())
    assert [name for name, _ in model.named_children()] == ["0", "1"]


@pytest.mark.parametrize("block", ["wormhole", "fpi"])
@pytest.mark.parametrize(("given", "meant"), BLOCK.items())
def test_blocks(block, given, meant):
    make = tw.blocks.get(block)
    refused(lambda: make(nn.Linear(3, 3), torch.zeros(2, 3), **{given: 1}), given, meant, *BLOCK.values())


def test_the_gate_of_a_block():
    body, x = nn.Linear(3, 3), torch.zeros(2, 3)
    refused(lambda: tw.blocks.get("wormhole")(body, x, gates="always"), "gates", "gate")
    with pytest.raises(tw.OptionError, match="always open"):
        tw.blocks.get("fpi")(body, x, gate="sigmoid")


@pytest.mark.parametrize(("given", "meant"), STACK.items())
def test_recurrent_stacks(given, meant):
    refused(lambda: RecurrentStack("gru", 2, 2, **{given: 1}), given, meant, *STACK.values())
    rnn = nn.GRU(2, 2)
    refused(lambda: RecurrentStack.from_torch(rnn, **{given: 1}), given, meant, *STACK.values())


def test_sequence_models():
    refused(lambda: SequenceModel(2, 2, hiden=3), "hiden", "hidden", "readout", "wormholes", "tol")
    refused(lambda: SequenceModel(2, 2, polcy=3), "polcy", "policy", "readout", "wormholes", "tol")


def test_nets_that_pick_among_the_stages_of_a_backbone():
    backbone = timm.create_model("resnet8_cifar")
    refused(lambda: DynaLayNet(backbone, polcy="random"), "polcy", "policy", "fpi_layers", "message", "tol")


@pytest.mark.parametrize("name", MODELS)
def test_every_model_of_the_zoo(name):
    refused(lambda: timm.create_model(name, num_clases=2), "num_clases", "num_classes")
    with pytest.raises(tw.OptionError, match=r"no option 'zzzz'\. Its options.* num_classes, "):
        timm.create_model(name, zzzz=2)


@pytest.mark.parametrize("prefix", ["twnn_", "dynalay_"])
def test_every_backbone_of_the_zoo_with_more(prefix):
    for name in BACKBONES:
        if timm.is_model(prefix + name) and prefix + name not in DYNALAY:
            make = lambda name=name: timm.create_model(prefix + name, num_clases=2)  # noqa: E731
            refused(make, "num_clases", "num_classes", "policy", "tol", "global_pool")


@pytest.mark.parametrize(("name", "given", "meant"), OWN)
def test_the_own_options_of_models(name, given, meant):
    refused(lambda: timm.create_model(name, **{given: 1}), given, meant, "num_classes")


def test_backbones_that_say_nothing_of_their_options():
    from twnn_plugin.backbones.models import created

    def silent(pretrained=False, width=1):
        return nn.Linear(width, width)

    refused(
        lambda: created("twnn_it", silent, False, {"wormhole": 1}, ("wormholes",)), "wormhole", "wormholes"
    )
    assert isinstance(created("twnn_it", silent, False, {"width": 2}, ("wormholes",)), nn.Linear)

    def broken(pretrained=False, **kwargs):
        raise TypeError("f() got an unexpected keyword argument 'inner'")

    with pytest.raises(TypeError, match=r"f\(\)") as info:  # not what its user gave
        created("twnn_it", broken, False, {"width": 2}, ())
    assert not isinstance(info.value, tw.OptionError)


def test_what_timm_understands_is_its_own(tmp_path):
    kept = {"pretrained": False, "cache_dir": str(tmp_path), "pretrained_cfg_overlay": {"crop_pct": 0.5}}
    for name in (
        "cnn3",
        "dynalay_cnn3",
        "resnet8_tiny",
        "twnn_prefix",
        "lstm3",
        "gru_rows",
        "twnn_resnet8_tiny",
    ):
        model = timm.create_model(name, **kept, pretrained_strict=False, kwargs_filter=("zzzz",), zzzz=1)
        assert model.pretrained_cfg["crop_pct"] == 0.5
    features = timm.create_model("resnet8_tiny", features_only=True, out_indices=(0, 2), feature_cls="hook")
    assert [part.shape[1] for part in features(torch.zeros(1, 3, 8, 8))] == [8, 32]
    assert timm.create_model("resnet8_cifar", depth=2).layer1[1] is not None


@pytest.mark.parametrize("name", ["deq_small", "deq_prefix", "deq_maze"])
@pytest.mark.parametrize(
    ("given", "meant"),
    [("twnn.andersn", "twnn.anderson"), ("twnn.picrad", "twnn.picard"), ("broydn", "broyden")],
)
def test_our_solvers_in_torchdeqs_nets(name, given, meant):
    for option in ("f_solver", "b_solver"):
        with pytest.raises(
            tw.OptionError, match=f"Unknown {option} '{given}'. Did you mean '{meant}'"
        ) as info:
            timm.create_model(name, **{option: given})
        for native in ("twnn.newton_krylov", "twnn.auto", "fixed_point_iter"):
            assert native in str(info.value)
    assert "twnn.torchdeq" not in str(info.value)


def test_a_policy_by_name_is_refused_by_blocks_and_taken_by_models():
    body, x = nn.Linear(3, 3), torch.zeros(2, 3)
    for block in (tw.blocks.get("wormhole"), tw.blocks.get("fpi")):
        for policy in ("always", ("random", {"p": 0.5}), tw.policies.get("always")):
            with pytest.raises(tw.OptionError, match=r"policy=tw\.policy\('random', p=0\.3\)"):
                block(body, x, policy=policy)
        assert block(body, x, policy=tw.policy("always")).eval()(x).shape == (2, 3)
        assert block(body, x, policy=lambda view: view.open).eval()(x).shape == (2, 3)
    model = timm.create_model("twnn_prefix", width=4, policy="never").eval()
    model(torch.ones(2, 1, 4))
    assert not tw.report(model)[0].evaluations
    with pytest.raises(tw.UnknownNameError, match="Did you mean 'never'"):
        timm.create_model("twnn_prefix", policy="nevr")
