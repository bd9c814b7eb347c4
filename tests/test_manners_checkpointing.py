"""Gradient checkpointing with wormholes: less memory, the same gradients, every solve made once."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

import twnn_plugin as tw

from .families import FAMILIES

DRAWS = {
    "vit": {"drop_path_rate": 0.3, "proj_drop_rate": 0.2, "attn_drop_rate": 0.2},
    "swin": {"drop_path_rate": 0.3, "proj_drop_rate": 0.2},
    "convnext": {"drop_path_rate": 0.3},
    "resnet": {"drop_path_rate": 0.3},
    "zoo": {},
}


def make(key: str, **options) -> nn.Module:
    """In double precision and training, with everything random that the family has."""
    family = FAMILIES[key]
    options = {"policy": "always", "scale": family.scale, "tol": 1e-9, "max_iter": 80, **options}
    model = tw.attach(family.plain(**DRAWS[key]).double(), wormholes=family.span, **options)
    return model.train()


def step(model: nn.Module, x: torch.Tensor):
    """One training step with fixed random numbers: (output, bytes kept, gradients, buffers, report)."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.zero_grad()
    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)
    (out**2).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    return out.detach(), sum(kept.values()), grads, buffers, tw.report(model)[0]


def assert_same(plain, saving, share: float = 0.9) -> None:
    """Two steps gave the same, and the second kept at most this share of the memory."""
    out, size, grads, buffers, record = plain
    out2, size2, grads2, buffers2, record2 = saving
    assert torch.equal(out, out2)
    assert grads.keys() == grads2.keys()
    for name, grad in grads.items():
        assert torch.allclose(grad, grads2[name], rtol=1e-9, atol=1e-12), name
    for name, buffer in buffers.items():  # running statistics are counted once
        assert torch.equal(buffer, buffers2[name]), name
    assert record.evaluations == record2.evaluations
    assert record.adjoint is None or record.adjoint.evaluations == record2.adjoint.evaluations
    assert size2 < share * size


@pytest.mark.parametrize("adjoint", ["implicit", "unrolled"])
@pytest.mark.parametrize("key", FAMILIES)
def test_the_same_step_in_less_memory(key, adjoint):
    tol = 1e-9 if adjoint == "implicit" else 1e-3
    model = make(key, adjoint=adjoint, tol=tol)
    saving = copy.deepcopy(model)
    saving.set_grad_checkpointing(True)
    x = FAMILIES[key].images(4).double()
    # The small ResNet is mostly its stem, which is no block.
    assert_same(step(model, x), step(saving, x), 0.9 if key == "resnet" else 0.6)


@pytest.mark.parametrize("policy", ["always", "never"])
def test_weights_that_are_standardised_by_a_batch_norm_without_a_layer(policy):
    model = timm.create_model("twnn_test_nfnet", num_classes=5, policy=policy, adjoint="unrolled", max_iter=3)
    model = model.double().train()
    saving = copy.deepcopy(model)
    saving.set_grad_checkpointing(True)
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    assert_same(step(model, x), step(saving, x), 1.0)


@pytest.mark.parametrize("key", ["resnet", "vit"])
@pytest.mark.parametrize("policy", ["gate", tw.policy("random", p=0.5)], ids=["closed", "some"])
def test_rows_that_are_closed_or_leave(key, policy):
    model = make(key, policy=policy)
    saving = copy.deepcopy(model)
    saving.set_grad_checkpointing(True)
    x = FAMILIES[key].images(6).double()
    assert_same(step(model, x), step(saving, x))


def test_switched_on_before_attaching_and_off_again():
    family = FAMILIES["convnext"]
    plain = make("convnext")
    model = family.plain(**DRAWS["convnext"]).double()
    model.set_grad_checkpointing(True)
    options = dict(policy="always", scale=family.scale, tol=1e-9, max_iter=80)
    model = tw.attach(model, wormholes=family.span, **options).train()
    x = family.images(4).double()
    expected, saving = step(plain, x), step(model, x)
    assert_same(expected, saving)
    model.set_grad_checkpointing(False)
    again = step(model, x)
    assert again[1] > 0.98 * expected[1]  # freed memory may be counted once where it was used twice
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_refused_attach_leaves_timms_checkpointing_on():
    model = FAMILIES["convnext"].plain()
    model.set_grad_checkpointing(True)
    with pytest.raises(tw.AttachError):
        tw.attach(model, wormholes="stages.1->stages.3")
    assert all(stage.grad_checkpointing for stage in model.stages)


class Counting:
    """A plugin that counts solves."""

    def __init__(self):
        self.solves = 0

    @tw.hookimpl
    def twnn_observe_solve(self, solution):
        self.solves += 1


@pytest.mark.parametrize("key", FAMILIES)
def test_every_hook_fires_once_and_no_solve_is_repeated(key):
    model = make(key, adjoint="one_step")  # one evaluation with a graph, and no solve in the backward pass
    model.set_grad_checkpointing(True)
    group, passes, counting = model.wormholes[0].group, [], Counting()
    group.program.modules()[-1].register_forward_hook(lambda *_: passes.append(group.replaying))
    tw.register_plugin(counting, "counting")
    try:
        loss = model(FAMILIES[key].images(2).double()).square().sum()
        fired, solves = list(passes), counting.solves
        loss.backward()
    finally:
        tw.unregister_plugin("counting")
    assert passes.count(False) == 1  # the open-loop pass; the others are replays
    assert passes == fired and counting.solves == solves == 1  # nothing more in the backward pass


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_copies_and_pickles_keep_it(way):
    model = make("resnet")
    model.set_grad_checkpointing(True)
    x = FAMILIES["resnet"].images(4).double()
    twin = way(model)
    assert_same(step(make("resnet"), x), step(twin, x))
    twin.set_grad_checkpointing(False)
    assert not any("forward" in vars(module) for module in twin.modules())
    assert any("forward" in vars(module) for module in model.modules())


def test_second_derivatives_with_checkpointing():
    model = make("zoo", solver="anderson")
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        x = FAMILIES["zoo"].images(2).double().requires_grad_()
        (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        (gg,) = torch.autograd.grad(g.square().sum(), x)
        gradients.append(gg)
    assert torch.allclose(*gradients, rtol=1e-6, atol=1e-10)


def test_mixed_precision():
    model = make("vit", tol=1e-2).float()
    x = FAMILIES["vit"].images(3)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(x).square().mean()
        loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-6)


def test_what_is_a_block():
    """A layer of densenet is one; its normalisations, which have activations in them, are none."""
    model = tw.attach(
        timm.create_model("densenet121", num_classes=2, block_config=(1, 1, 1, 1), growth_rate=4)
    )
    model.set_grad_checkpointing(True)
    kinds = {type(module).__name__ for module in model.modules() if "forward" in vars(module)}
    assert kinds == {"DenseLayer", "DenseTransition"}
    tw.configure(model, policy="always")
    model.train()(torch.randn(2, 3, 64, 64)).square().sum().backward()


class Listed(nn.Module):
    """Writes to the list that it is given, as hrnet's blocks do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 1)

    def forward(self, values):
        values[0] = torch.tanh(self.conv(values[0]))
        return [torch.tanh(values[0])]


class Lists(nn.Module):
    grad_checkpointing = False  # timm's stages have this, and so are opened

    def __init__(self):
        super().__init__()
        self.conv, self.blocks = nn.Conv2d(3, 16, 1), nn.ModuleList([Listed(), Listed()])

    def forward(self, x):
        seen = [self.conv(x)]
        for block in self.blocks:
            new = block(seen)
            seen.clear()  # and the caller goes on using the list, as densenet does
            seen += new
        return seen[0]


def test_blocks_that_share_lists():
    torch.manual_seed(0)
    model = tw.attach(timm.create_model("resnet8_cifar", num_classes=2))
    model.stem = Lists()
    x, grads = torch.randn(2, 3, 8, 8), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model.eval()(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.stem.parameters()])
    assert all("forward" in vars(block) for block in model.stem.blocks)
    for a, b in zip(*grads, strict=True):
        assert bool(a.any()) and torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_a_block_that_changes_its_input_in_place_is_told():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.conv = nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.conv(self.act(x))

    model = timm.create_model("resnet8_cifar", num_classes=2)
    model = tw.attach(model)
    model.stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(Block()), nn.Conv2d(4, 16, 1))
    model.set_grad_checkpointing(True)
    with pytest.raises(tw.AttachError, match="Block changes its input in place"):
        model.train()(torch.randn(2, 3, 16, 16))
