"""Several adapters on one base: in use alone, summed, row by row, swapped and taken away."""

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

import eckart
import eckart.hf
from eckart.errors import UsageError
from eckart.io import factored, native
from eckart.io.export import export, load, swap
from eckart.methods.weights.bone import Bone
from eckart.methods.weights.dense import Dense
from eckart.methods.weights.dora import DoRA
from eckart.methods.weights.lora import LoRA
from eckart.recipe import Recipe, attach
from tests.conftest import batch_for, cast, randomise, tiny
from tests.laws.matrix import logits

LINEAR = ("linear",)
WITH_EMBEDDING = ("linear", "embedding")
# architecture, targets: Linear, Conv1D, tied embedding with its scale, convolution
PLACES = [
    ("llama", WITH_EMBEDDING),
    ("gpt2", LINEAR),
    ("gemma", WITH_EMBEDDING),
    ("vit", ("linear", "conv")),
]
KINDS = {
    "lora": (LoRA, {"rank": 3}, {"rank": 2, "alpha": 5.0}),
    "dora": (DoRA, {"rank": 3}, {"rank": 2, "alpha": 5.0}),
    "lora and bone": (LoRA, {"rank": 3}, None),
}


def methods(kind, targets):
    cls, first, second = KINDS[kind]
    other = Bone(rank=4, targets=targets) if second is None else cls(**second, targets=targets)
    return {"a": cls(**first, targets=targets), "b": other}


def carrying(architecture, chosen, dtype=torch.float64):
    """A model with named adapters, each moved from its start by other random numbers."""
    model = tiny(architecture, dtype)
    handles = {}
    for seed, (name, method) in enumerate(chosen.items(), 1):
        handles[name] = attach(model, Recipe(weights=method), name=name, seed=seed)
        model.to(dtype)
        randomise(handles[name], seed)
    return model, handles


def alone(architecture, method, seed, dtype=torch.float64):
    model = tiny(architecture, dtype)
    handle = attach(model, Recipe(weights=method), seed=seed)
    model.to(dtype)
    randomise(handle, seed)
    return model, handle


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture, targets", PLACES)
def test_one_in_use_is_that_adapter_and_none_is_the_base(architecture, targets, kind):
    chosen = methods(kind, targets)
    model, handles = carrying(architecture, chosen)
    batch = cast(batch_for(architecture), torch.float64)
    base = logits(tiny(architecture, torch.float64), batch)
    for seed, name in enumerate(chosen, 1):
        handles["a"].use(name)
        expected = logits(alone(architecture, chosen[name], seed)[0], batch)
        assert torch.equal(logits(model, batch), expected)
        assert not torch.allclose(expected, base)
    handles["a"].use(None)
    assert torch.equal(logits(model, batch), base)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture, targets", [*PLACES, ("mixtral", LINEAR)])
def test_a_weighted_sum_is_the_sum_of_the_changes(architecture, targets, kind):
    chosen = methods(kind, targets)
    model, handles = carrying(architecture, chosen)
    batch = cast(batch_for(architecture), torch.float64)
    weights = {"a": 0.7, "b": -0.4}
    handles["b"].use(weights)
    y = logits(model, batch)
    state = tiny(architecture, torch.float64).state_dict()
    for seed, name in enumerate(chosen, 1):
        base = tiny(architecture, torch.float64).state_dict()
        merged = alone(architecture, chosen[name], seed)[1].merge().state_dict()
        for key, value in merged.items():
            state[key] = state[key] + weights[name] * (value - base[key])
    expected = tiny(architecture, torch.float64)
    expected.load_state_dict(state)
    # fp64: the same sums in another order through two layers
    torch.testing.assert_close(y, logits(expected, batch), rtol=0, atol=1e-11)
    folded = handles["a"].merge()
    torch.testing.assert_close(logits(folded, batch), y, rtol=0, atol=1e-11)
    assert not any("@" in name for name in folded.state_dict())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture, targets", PLACES)
def test_each_row_runs_its_own_adapter(architecture, targets, kind):
    model, handles = carrying(architecture, methods(kind, targets))
    batch = cast(batch_for(architecture, rows=4), torch.float64)
    names = ["b", None, "a", "b"]
    with handles["a"].rows(names):
        y = logits(model, batch)
    for i, name in enumerate(names):
        handles["a"].use(name)
        # fp64; products of other shapes sum in another order
        torch.testing.assert_close(y[i], logits(model, batch)[i], rtol=0, atol=1e-11)
    assert (y[0] - y[3]).abs().max() > 1e-3  # the same adapter on other words


def test_rows_go_through_generate_with_its_cache_and_beams():
    model, handles = carrying("llama", methods("lora", WITH_EMBEDDING))
    ids = batch_for("llama", rows=3)["input_ids"]
    names = ["a", None, "b"]
    for options in ({}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}):
        options |= {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        options["attention_mask"] = torch.ones_like(ids[:1])
        each = []
        for i, name in enumerate(names):
            handles["a"].use(name)
            each.append(model.generate(input_ids=ids[i : i + 1], **options))
        options["attention_mask"] = torch.ones_like(ids)
        with handles["b"].rows(names):
            together = model.generate(input_ids=ids, **options)
        assert torch.equal(together, torch.cat(each))
        assert len({tuple(row.tolist()) for row in together[:, ids.shape[1] :]}) > 1


def test_gradients_of_rows_reach_their_own_adapter_alone():
    model, handles = carrying("llama", methods("lora", LINEAR))
    model.requires_grad_(True)
    batch = batch_for("llama", rows=2)
    with handles["a"].rows(["a", None]):
        model(**batch).loss.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("@a" in name for name in moved) and not any("@b" in name for name in moved)


def test_one_goes_and_the_others_stay_and_the_last_leaves_the_base():
    plain = tiny("gemma")
    plain.lm_head.requires_grad_(False)
    before = {n: (p.detach().clone(), p.requires_grad) for n, p in plain.named_parameters()}
    model, batch = plain, batch_for("gemma")
    handles = {}
    for name, method in methods("dora", WITH_EMBEDDING).items():
        handles[name] = attach(model, Recipe(weights=method), name=name)
        randomise(handles[name])
    handles["a"].use({"a": 1.0, "b": 0.5})
    with handles["b"].rows(["b", None]):
        handles["a"].remove()  # what was in use before comes back without it
    assert list(handles["b"].adapters) == ["b"]
    weighted = logits(model, batch)
    handles["b"].use("b")
    assert not torch.allclose(weighted, logits(model, batch))
    with pytest.raises(UsageError, match="carries terms of its present size"):
        model.resize_token_embeddings(70)
    handles["b"].remove()
    after = {n: (p, p.requires_grad) for n, p in model.named_parameters()}
    assert after.keys() == before.keys()
    for name, (tensor, trained) in before.items():
        assert torch.equal(after[name][0], tensor) and after[name][1] == trained
    assert type(model.lm_head) is torch.nn.Linear and type(model.config).__name__ == "GemmaConfig"


def test_freezing_is_undone_whatever_the_order(architecture):
    model = tiny(architecture)
    frozen = next(iter(dict(model.named_parameters())))
    model.get_parameter(frozen).requires_grad_(False)
    first, second, third = (
        attach(model, Recipe(weights=LoRA(rank=2)), name=name) for name in ("a", "b", "c")
    )
    second.remove()
    first.remove()
    assert not any(p.requires_grad for n, p in model.named_parameters() if "@" not in n)
    third.remove()
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {frozen}
    again = attach(model, Recipe(weights=LoRA(rank=2)))
    third.remove()  # once more: it has nothing left to undo
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(again.trainable())


@pytest.mark.parametrize("form", ["native", "peft"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_one_of_several_is_saved_as_if_it_were_alone(kind, form, tmp_path):
    chosen = methods(kind, LINEAR)
    _, handles = carrying("llama", chosen, torch.float32)
    handles["a"].use({"a": 0.5, "b": 0.5})  # what is in use makes no difference to a file
    for seed, name in enumerate(chosen, 1):
        export(handles[name], tmp_path / name, form)
        export(alone("llama", chosen[name], seed, torch.float32)[1], tmp_path / "lone", form,
               overwrite=True)  # fmt: skip
        for file in (tmp_path / "lone").iterdir():
            assert file.read_bytes() == (tmp_path / name / file.name).read_bytes()
    assert handles["a"].adapters["b"] is handles["b"]


def test_what_was_saved_is_loaded_beside_and_written_dense(tmp_path):
    chosen = methods("lora", LINEAR)
    model, handles = carrying("llama", chosen, torch.float32)
    for name in chosen:
        native.save(handles[name], tmp_path / name)
    batch = batch_for("llama")
    fresh = tiny("llama")
    first = eckart.load(tmp_path / "a", fresh, name="x")
    load(tmp_path / "b", fresh, name="y")
    for name, theirs in (("a", "x"), ("b", "y")):
        first.use(theirs)
        handles["a"].use(name)
        assert torch.equal(logits(fresh, batch), logits(model, batch))
    export(first, tmp_path / "dense", "dense")
    merged = type(fresh).from_pretrained(tmp_path / "dense")
    first.use("x")
    # fp32, rounded once
    torch.testing.assert_close(logits(merged, batch), logits(fresh, batch), rtol=0, atol=1e-5)
    assert "one of several adapters" in factored.obstacle(first)
    fresh.save_pretrained(tmp_path / "foreign")
    with pytest.raises(eckart.EckartError):
        type(fresh).from_pretrained(tmp_path / "foreign")


def test_swapping_in_place_compiles_nothing_again(tmp_path):
    chosen = {"a": LoRA(rank=3), "b": LoRA(rank=3)}
    model, handles = carrying("llama", chosen, torch.float32)
    for name in chosen:
        native.save(handles[name], tmp_path / name)
    export(handles["b"], tmp_path / "peft", "peft")
    block = model.model.layers[0].mlp  # three adapted maps; the whole model traces for long
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    expected = {}
    for name in chosen:
        handles["a"].use(name)
        expected[name] = block(x)
    handles["b"].remove()
    handles["a"].use("a")
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(block, backend=counting)
    for folder, name in (("a", "a"), ("b", "b"), ("a", "a"), ("peft", "b")):
        swap(handles["a"], tmp_path / folder)
        # fp32: the traced sums may be in another order
        torch.testing.assert_close(compiled(x), expected[name], rtol=0, atol=1e-5)
    assert len(graphs) == 1
    handles["a"].use(None)  # the count can grow: another sum is another program
    compiled(x)
    assert len(graphs) == 2


def test_an_adapter_of_another_shape_is_not_swapped_in(tmp_path):
    _, handles = carrying("llama", {"a": LoRA(rank=3), "b": LoRA(rank=2)}, torch.float32)
    native.save(handles["b"], tmp_path / "b")
    kept = {name: t.detach().clone() for name, t in handles["a"].named_state().items()}
    with pytest.raises(UsageError, match=r"another structure\n.*layers\.0\.mlp\.down_proj"):
        swap(handles["a"], tmp_path / "b")
    assert list(handles["a"].adapters) == ["a", "b"]
    assert all(torch.equal(t, kept[name]) for name, t in handles["a"].named_state().items())


def test_what_cannot_be_is_said():
    model, handles = carrying("mixtral", {"french": LoRA(rank=2), "legal": LoRA(rank=2)})
    with pytest.raises(UsageError, match="no adapter of this name\n  frnch\nDid you mean french"):
        handles["french"].use("frnch")
    with pytest.raises(UsageError, match="an adapter of this name is attached already"):
        attach(model, Recipe(weights=LoRA(rank=2)), name="legal")
    with pytest.raises(UsageError, match="cannot be the name of an adapter"):
        attach(model, Recipe(weights=LoRA(rank=2)), name="a.b")
    with pytest.raises(UsageError, match="fused experts cannot tell the rows of a batch apart"):
        handles["french"].rows(["french", "legal"]).__enter__()
    with pytest.raises(UsageError, match="terms are attached here already"):
        attach(model, Recipe(weights=Dense()), name="full")
    with handles["french"].rows(["legal", "legal"]):  # one for all is no matter of rows
        model(**batch_for("mixtral", rows=2))
    model, handles = carrying("llama", {"a": LoRA(rank=2), "b": LoRA(rank=2)})
    with handles["a"].rows(["a", "b"]), pytest.raises(UsageError, match="other rows than were"):
        model(**batch_for("llama", rows=3))
    with handles["a"].rows(["a", "b"]), pytest.raises(UsageError, match="no one matrix"):
        handles["a"].merge()
