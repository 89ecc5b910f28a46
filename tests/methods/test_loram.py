"""What LoRAM alone promises: the small model and its adapter are parts of the large ones."""

import copy
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from torch.autograd import gradcheck

from eckart.errors import FileError, UsageError
from eckart.io import native, peft
from eckart.jobs.training.stages import train_only
from eckart.linear.narrow import narrow, spread, take_shapes, units
from eckart.methods.weights.lora import LoRA
from eckart.methods.weights.loram import BASE, LoRAM, Masked, kept_units, scores, sparse
from eckart.recipe import Recipe, attach
from eckart.recipe.coupled import groups
from eckart.recipe.targets import sites_of
from tests.conftest import batch_for, randomise, tiny
from tests.laws.matrix import logits, steps
from tests.methods.lawful import assert_lawful, draw

F64 = torch.float64
FAMILIES = ["llama", "qwen", "gemma"]  # two query heads per KV head; biases; tied, h = 8


def method(**fields):
    return LoRAM(**{"rank": 4, "alpha": 4.0, "spared": 0.0, "criterion": "random", **fields})


def pruned(architecture, loram):
    """The small model, its map, and the whole one with zeros where units are missing."""
    small, whole = tiny(architecture, F64), tiny(architecture, F64)
    kept = loram.prune(small)
    with torch.no_grad():
        for group in groups(whole, loram.heads > 0, loram.channels > 0):
            for member in group.members:
                index = units(kept[group.path], member.width)
                layer = member.site.module
                there = torch.zeros(layer.weight.shape[member.axis], dtype=torch.bool)
                there[index] = True
                layer.weight.mul_(there[:, None] if member.axis == 0 else there)
                if member.axis == 0 and layer.bias is not None:
                    layer.bias.mul_(there)
    return small, kept, whole


def test_units_of_a_grouped_attention():
    kept = torch.tensor([1, 3])  # KV heads; g = 4 query heads of width h = 2
    assert units(kept, 8).tolist() == [*range(8, 16), *range(24, 32)]
    assert units(kept, 2).tolist() == [2, 3, 6, 7]


@pytest.mark.parametrize("fields", [{}, {"heads": 0.0}, {"channels": 0.0}, {"channels": 0.9}])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_small_model_is_the_whole_one_with_zeros(architecture, fields):
    small, kept, whole = pruned(architecture, method(**fields))
    assert len(kept) > 1
    count = [sum(p.numel() for p in model.parameters()) for model in (small, whole)]
    assert count[0] < count[1]
    batch = batch_for(architecture)
    # fp64; sums with and without zeros
    torch.testing.assert_close(logits(small, batch), logits(whole, batch), rtol=0, atol=1e-12)
    base = logits(tiny(architecture, F64), batch)
    assert not torch.allclose(logits(small, batch), base, atol=1e-3)


def test_a_small_model_generates():
    small, _, _ = pruned("llama", method())
    ids = batch_for("llama")["input_ids"]
    with_cache = small.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    without = small.generate(
        ids, max_new_tokens=4, do_sample=False, use_cache=False, pad_token_id=0
    )
    assert torch.equal(with_cache, without)


def learn(model, loram, count, optimizer, start=None):
    """Train the adapter; from these factors where given. The handle."""
    handle = attach(model, Recipe(weights=loram))
    model.to(F64)
    if start is not None:
        handle.load_named_state(start)
    optimizer = optimizer(handle.trainable().values(), lr=1e-2)
    for seed in range(count):
        batch = batch_for(model.config.model_type, seed=seed)
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()
    return handle


def state_of(handle):
    return {name: t.detach().clone() for name, t in handle.named_state().items()}


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_the_small_model_learns_what_the_zeroed_one_would(optimizer):
    loram = method()
    small, kept, zeroed = pruned("llama", loram)
    handle = attach(copy.deepcopy(small), Recipe(weights=loram))
    start = {name: t.double() for name, t in state_of(handle).items()}
    small_handle = learn(small, loram, 20, optimizer, start)
    whole = tiny("llama", F64)
    start_whole = state_of(loram.recover(whole, start, kept))  # zeros where pruned
    zeroed_handle = learn(zeroed, loram, 20, optimizer, start_whole)
    whole = tiny("llama", F64)
    recovered = loram.recover(whole, state_of(small_handle), kept)
    moved = 0.0
    for path, by_name in zeroed_handle.terms().items():
        ours, theirs = recovered.terms()[path]["loram"], by_name["loram"]
        moved = max(moved, float(theirs.B.abs().max()))
        # recovered factors are fp32; what was pruned is exactly zero in both
        torch.testing.assert_close(ours.B.double(), theirs.B, rtol=0, atol=1e-6)
        torch.testing.assert_close(ours.A.double(), theirs.A, rtol=0, atol=1e-6)
        assert torch.equal(ours.B == 0, theirs.B == 0)
    assert moved > 1e-3
    torch.testing.assert_close(
        logits(small, batch_for("llama")), logits(zeroed, batch_for("llama")), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("architecture", FAMILIES)
def test_recovery_is_exact_and_can_be_undone(architecture):
    loram = method()
    small, kept, _ = pruned(architecture, loram)
    handle = attach(small, Recipe(weights=loram))
    randomise(handle)
    learnt = state_of(handle)
    whole = tiny(architecture)
    recovered = loram.recover(whole, learnt, kept)
    by_path = {m.site.path: (g, m) for g in groups(whole, True, True) for m in g.members}
    assert len(by_path) == 14
    for path, (group, member) in by_path.items():
        term, own = recovered.terms()[path]["loram"], handle.terms()[path]["loram"]
        index = units(kept[group.path], member.width)
        B, A = term.B.detach(), term.A.detach()
        back = (B[index], A) if member.axis == 0 else (B, A[:, index])
        assert torch.equal(back[0], own.B) and torch.equal(back[1], own.A)
        dense = term.dense().detach()
        part = dense[index] if member.axis == 0 else dense[:, index]
        assert torch.equal(part, own.dense())
        assert dense.count_nonzero() <= own.dense().count_nonzero()


def test_with_nothing_pruned_it_is_lora():
    loram = method(channels=0.0, heads=0.0)
    model = tiny("llama")
    kept = loram.prune(model)
    assert set(kept) == {BASE}
    ours = attach(model, Recipe(weights=loram))
    theirs = attach(tiny("llama"), Recipe(weights=LoRA(rank=4, alpha=4.0)))
    batches = [batch_for("llama", seed=s) for s in range(5)]
    for handle in (ours, theirs):
        steps(handle, handle.optimizer(lr=1e-2), batches)
    whole = tiny("llama")
    loram.recover(whole, state_of(ours), kept)
    assert torch.equal(logits(whole, batches[0]), logits(theirs.model, batches[0]))


def test_what_was_not_learnt_changes_nothing():
    loram = method()
    small, kept, _ = pruned("llama", loram)
    handle = attach(small, Recipe(weights=loram))
    whole = tiny("llama")
    loram.recover(whole, state_of(handle), kept)
    assert torch.equal(logits(whole, batch_for("llama")), logits(tiny("llama"), batch_for("llama")))


def test_normal_fill_is_at_pruned_inputs_alone():
    zero, normal = method(), method(fill="normal")
    small, kept, _ = pruned("llama", zero)
    handle = attach(small, Recipe(weights=zero))
    randomise(handle)
    terms = [m.recover(tiny("llama"), state_of(handle), kept).terms() for m in (zero, normal)]
    for path in terms[0]:
        ours, theirs = (t[path]["loram"].requires_grad_(False) for t in terms)
        assert torch.equal(ours.B, theirs.B)
        if path.endswith(("o_proj", "down_proj")):
            gone = (ours.A == 0).all(0)
            assert gone.any() and theirs.A[:, gone].std() == pytest.approx(1 / 4, rel=0.5)
            assert torch.equal(ours.A[:, ~gone], theirs.A[:, ~gone])
        else:
            assert torch.equal(ours.A, theirs.A)


def test_peft_loads_it_on_the_original_base(tmp_path):
    loram = method()
    small, kept, _ = pruned("llama", loram)
    handle = attach(small, Recipe(weights=loram))
    randomise(handle)
    whole = tiny("llama")
    recovered = loram.recover(whole, state_of(handle), kept)
    expected = logits(whole, batch_for("llama"))
    peft.save(recovered, tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    # fp32, the same products in another order
    torch.testing.assert_close(logits(loaded, batch_for("llama")), expected, rtol=0, atol=5e-6)


def test_a_rank_cut_on_the_small_model_stays_cut():
    loram = method(rank=12, channels=0.8)
    small, kept, _ = pruned("llama", loram)
    handle = attach(small, Recipe(weights=loram))
    randomise(handle)
    recovered = loram.recover(tiny("llama"), state_of(handle), kept)
    path = "model.layers.0.mlp.up_proj"  # 48 channels, 10 kept
    assert recovered.terms()[path]["loram"].A.shape == (10, 32)
    assert recovered.terms()[path]["loram"].scale == handle.terms()[path]["loram"].scale


def test_another_model_or_map_is_refused():
    loram = method()
    small, kept, _ = pruned("llama", loram)
    learnt = state_of(attach(small, Recipe(weights=loram)))
    other = tiny("llama")
    other.lm_head.weight.data.add_(1.0)
    with pytest.raises(FileError, match="made for another model"):
        loram.recover(other, learnt, kept)
    path = "model.layers.0.mlp"
    with pytest.raises(FileError, match=r"does not fit what was learnt(.|\n)*layers\.0\.mlp"):
        loram.recover(tiny("llama"), learnt, {**kept, path: kept[path][:-1]})


def test_units_that_matter_stay():
    model = tiny("llama", F64)
    (group,) = (g for g in groups(model, False, True) if "layers.0" in g.path)
    by_hand = torch.zeros(48, dtype=F64)
    mlp = model.model.layers[0].mlp
    for j in range(48):
        parts = (mlp.gate_proj.weight[j], mlp.up_proj.weight[j], mlp.down_proj.weight[:, j])
        by_hand[j] = sum(p.square().sum() for p in parts)
    torch.testing.assert_close(scores(group, "magnitude", 0), by_hand, rtol=1e-12, atol=0)
    heads = next(g for g in groups(model, True, False) if "layers.1" in g.path)
    attention = model.model.layers[1].self_attn  # 2 KV heads of width 8, 4 query heads
    for head in range(2):
        k, q = slice(8 * head, 8 * head + 8), slice(16 * head, 16 * head + 16)
        parts = (
            attention.q_proj.weight[q], attention.k_proj.weight[k],
            attention.v_proj.weight[k], attention.o_proj.weight[:, q],
        )  # fmt: skip
        expected = sum(p.square().sum() for p in parts)
        torch.testing.assert_close(scores(heads, "magnitude", 0)[head], expected.detach())
    assert kept_units(torch.tensor([3.0, 1.0, 4.0, 2.0]), 0.5).tolist() == [0, 2]
    assert kept_units(torch.tensor([3.0, 1.0]), 0.99).tolist() == [0]  # one always stays


def test_gradient_importance_is_the_first_order_change_of_the_loss():
    model, batch = tiny("llama", F64), batch_for("llama")
    loram = method(criterion="gradient", heads=0.0)
    kept = loram.prune(copy.deepcopy(model), lambda: [batch])
    model(**batch)["loss"].backward()
    mlp = model.model.layers[0].mlp
    change = sum(
        (layer.weight * layer.weight.grad).sum(axis)
        for layer, axis in ((mlp.gate_proj, 1), (mlp.up_proj, 1), (mlp.down_proj, 0))
    ).abs()
    assert kept["model.layers.0.mlp"].tolist() == change.topk(24).indices.sort().values.tolist()


def test_activation_importance_weighs_by_the_inputs():
    model, batch = tiny("llama", F64), batch_for("llama")
    seen = {}
    mlp = model.model.layers[0].mlp
    for layer in (mlp.gate_proj, mlp.down_proj):
        layer.register_forward_pre_hook(lambda m, x: seen.update({m: x[0].detach().flatten(0, 1)}))
    model(**batch)
    size = {layer: x.square().sum(0) for layer, x in seen.items()}  # up sees what gate sees
    per_channel = (
        (mlp.gate_proj.weight.square() * size[mlp.gate_proj]).sum(1)
        + (mlp.up_proj.weight.square() * size[mlp.gate_proj]).sum(1)
        + mlp.down_proj.weight.square().sum(0) * size[mlp.down_proj]
    )
    units_left = method(criterion="activation", heads=0.0).prune(
        copy.deepcopy(model), lambda: [batch]
    )["model.layers.0.mlp"]
    assert units_left.tolist() == per_channel.topk(24).indices.sort().values.tolist()
    score = mlp.down_proj.weight.abs() * size[mlp.down_proj].sqrt()  # Wanda's own
    method(criterion="activation", pattern="2:4", heads=0.0).prune(model, lambda: [batch])
    assert torch.equal(mlp.down_proj.weight != 0, sparse(score, "2:4", 0.5))


def test_pruning_is_the_same_every_time_and_spares_the_ends():
    first, again = (method().prune(tiny("llama")) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = method().prune(tiny("llama"), seed=1)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    found = groups(tiny("llama"), True, True) * 2  # as if of four layers
    left = [group for group, _ in method(spared=0.25).chosen(found)]
    assert [g.path for g in left] == [
        "model.layers.1.self_attn", "model.layers.0.self_attn",
        "model.layers.1.mlp", "model.layers.0.mlp",
    ]  # fmt: skip
    assert set(method(spared=0.4).prune(tiny("llama"))) == {BASE}


def test_layers_that_are_not_understood_are_named():
    with pytest.raises(UsageError, match=r"prune these heads(.|\n)*weights\.heads=0"):
        method().prune(tiny("gpt2"))
    with pytest.raises(UsageError, match="prune these channels"):
        method(heads=0.0).prune(tiny("gpt2"))


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "unstructured"])
def test_single_weights_leave_by_magnitude_and_shapes_stay(pattern):
    model = tiny("llama")
    before = {site.path: site.weight().clone() for site in sites_of(model)}
    loram = method(pattern=pattern, criterion="magnitude", channels=0.75, heads=0.75)
    kept = loram.prune(model)
    assert set(kept) == {BASE}
    for site in sites_of(model):
        W, old = site.weight(), before[site.path]
        if site.role.startswith(("attn", "mlp")):
            share = float((W != 0).float().mean())
            assert share == pytest.approx(0.25 if pattern == "unstructured" else 0.5, abs=0.01)
            assert torch.equal(W[W != 0], old[W != 0])
            if pattern != "unstructured":
                keep, of = map(int, pattern.split(":"))
                assert ((W != 0).unflatten(1, (-1, of)).sum(-1) == keep).all()
            else:
                assert old[W == 0].abs().max() <= W[W != 0].abs().min()
        else:
            assert torch.equal(W, old)
    handle = attach(model, Recipe(weights=loram))
    randomise(handle)
    recovered = loram.recover(tiny("llama"), state_of(handle), kept)
    ours, theirs = recovered.named_state(), handle.named_state()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_two_of_four_keeps_what_is_left_over():
    mask = sparse(torch.tensor([[1.0, 3.0, 2.0, 0.5, 9.0]]), "2:4", 0.5)
    assert mask.tolist() == [[False, True, True, False, True]]


def test_a_masked_update_learns_through_the_mask():
    B, A, x, dy = draw(5, 2), draw(2, 7, seed=1), draw(4, 7, seed=2), draw(4, 5, seed=3)
    M = draw(5, 7, seed=4) > 0
    term = Masked(B, A, M, 0.5, 0.0)
    term(x).backward(dy)
    G = dy.T @ x
    torch.testing.assert_close(term.A.grad, 0.5 * B.T @ (G * M), rtol=0, atol=1e-12)
    torch.testing.assert_close(term.B.grad, 0.5 * (G * M) @ A.T, rtol=0, atol=1e-12)

    def run(x, B, A):
        return torch.func.functional_call(term, {"B": B, "A": A}, (x,))

    assert gradcheck(run, tuple(t.clone().requires_grad_() for t in (x, B, A)))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma", "mixtral"])
def test_a_masked_update_keeps_the_laws(architecture):
    targets = ("linear", "embedding") if architecture == "gemma" else ("linear",)
    fields = {"pattern": "2:4", "mask_delta": True, "targets": targets}
    if architecture != "mixtral":  # whose experts have no mask: the formula is of one that has
        assert_lawful(method(**fields), architecture)
    else:
        terms = attach(tiny(architecture), Recipe(weights=method(**fields))).terms()
        assert {type(t["loram"]) is Masked for p, t in terms.items() if "experts" in p} == {False}


def test_a_masked_update_is_saved_and_recovered_with_its_mask(tmp_path):
    loram = method(pattern="4:8", mask_delta=True)
    small = tiny("llama")
    kept = loram.prune(small)
    handle = attach(small, Recipe(weights=loram))
    randomise(handle)
    whole = tiny("llama")
    recovered = loram.recover(whole, state_of(handle), kept)
    for site in sites_of(small):
        change = recovered.terms().get(site.path)
        if change is not None:
            dense = change["loram"].dense()
            assert torch.equal(dense != 0, site.weight() != 0)
            assert torch.equal(dense, handle.terms()[site.path]["loram"].dense())
    native.save(recovered, tmp_path)
    again = native.load(tiny("llama"), tmp_path)
    assert torch.equal(logits(again.model, batch_for("llama")), logits(whole, batch_for("llama")))
    file = load_file(tmp_path / "model.safetensors")
    assert file["model.layers.0.self_attn.q_proj.loram.mask"].shape == (32 * 32 / 8,)
    with pytest.raises(UsageError, match="masks single weights"):
        LoRAM(mask_delta=True)


def test_alignment_leaves_pruned_weights_at_zero():
    loram = method(pattern="2:4", align_steps=3)
    model = tiny("llama")
    loram.prune(model)
    before = {site.path: site.weight().clone() for site in sites_of(model)}
    handle = attach(model, Recipe(weights=loram))
    train_only(handle, loram.stages[1].train)
    optimizer = handle.optimizer(lr=1e-2)
    steps(handle, optimizer, [batch_for("llama", seed=s) for s in range(3)])
    for site in sites_of(model):
        if site.role.startswith(("attn", "mlp")):
            assert torch.equal(site.weight() == 0, before[site.path] == 0)
            assert not torch.equal(site.weight(), before[site.path])


def test_narrow_and_spread():
    layer = nn.Linear(5, 4).double()
    W, b = layer.weight.detach().clone(), layer.bias.detach().clone()
    rows, columns = torch.tensor([0, 2]), torch.tensor([1, 3, 4])
    layer.weight.requires_grad_(False)
    narrow(layer, rows, columns)
    assert torch.equal(layer.weight, W[rows][:, columns]) and torch.equal(layer.bias, b[rows])
    assert (layer.in_features, layer.out_features) == (3, 2)
    assert not layer.weight.requires_grad and layer.bias.requires_grad
    back = spread(spread(layer.weight, rows, 4, 0), columns, 5, 1)
    assert torch.equal(back[rows][:, columns], layer.weight) and back.count_nonzero() == 6
    whole = nn.Sequential(nn.Linear(5, 4).double())
    saved = {"0.weight": layer.weight, "0.bias": layer.bias}
    take_shapes(whole, saved)
    whole.load_state_dict(saved)
    assert torch.equal(whole[0](draw(2, 3)), layer(draw(2, 3)))


def test_the_job_prunes_aligns_learns_and_recovers(tmp_path, monkeypatch):
    from eckart.io.opening import open_model
    from eckart.jobs.training.fit import RunTraining
    from tests.journeys.runs import eckart, model_folder, texts

    monkeypatch.setenv("ECKART_CACHE", str(tmp_path / "cache"))
    model_folder(tmp_path / "m")
    texts(tmp_path / "a.jsonl")
    words = [
        "finetune", tmp_path / "m", tmp_path / "a.jsonl", "method=loram", "method.rank=4",
        "method.spared=0", "method.align_steps=4", "method.align_lr=1e-3",
        "train.steps=6", "train.lr=1e-2", "train.save_every=2",
    ]  # fmt: skip
    out = tmp_path / "whole"
    ran = eckart(*words, "-o", out)
    assert ran.code == 0, ran.err
    names = sorted(p.name for p in (out / "stages").iterdir())
    assert names == ["00-prune", "01-align", "02-aligned", "03-learn", "04-recover"]
    state = {n: load_file(out / "stages" / n / "state" / "model.safetensors") for n in names}
    original = load_file(tmp_path / "m" / "model.safetensors")
    up = "model.layers.0.mlp.up_proj.weight"
    assert state["00-prune"][up].shape[0] * 2 == original[up].shape[0]
    assert not torch.equal(state["02-aligned"][up], state["00-prune"][up])  # the base learnt
    assert not any("loram" in name for name in state["02-aligned"])
    if "lm_head.weight" in state["00-prune"]:
        head = [state[n]["lm_head.weight"] for n in ("00-prune", "02-aligned")]
        assert torch.equal(*head)
    # what the adapter is learnt on does not move, and nothing of it is in the result
    assert torch.equal(state["03-learn"][up], state["02-aligned"][up])
    assert torch.equal(state["04-recover"][up], original[up])
    ended = open_model(out)
    assert ended.handle is not None and torch.equal(ended.model.state_dict()[up], original[up])
    assert any(t.B.any() for by_name in ended.handle.terms().values() for t in by_name.values())

    usual = RunTraining.compute_loss

    def failing(self, *args, **kwargs):
        if "03-learn" in str(self.run_folder) and self.state.global_step == 4:
            raise KeyboardInterrupt
        return usual(self, *args, **kwargs)

    parts = tmp_path / "parts"
    with monkeypatch.context() as patch:
        patch.setattr(RunTraining, "compute_loss", failing)
        assert eckart(*words, "-o", parts).code == 130
    assert eckart("finetune", "--resume", parts).code == 0
    a, b = (load_file(p / "final" / "adapter_model.safetensors") for p in (out, parts))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    config = json.loads((out / "final" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"].endswith("/m")
