"""What ReLoRA alone promises: a restart does not change the model, only later steps."""

import io
import json

import pytest
import torch

import eckart
from eckart import Recipe, attach, attach_from
from eckart.errors import EckartError
from eckart.methods.weights.relora import ReLoRA, forget
from tests.conftest import ARCHITECTURES, batch_for, cast, randomise, tiny
from tests.laws.matrix import logits, steps

F64 = torch.float64


def attached(architecture="llama", dtype=torch.float32, **fields):
    model = tiny(architecture, dtype)
    method = ReLoRA(**({"rank": 4, "alpha": 4.0, "every": 3, "rewarm": 2} | fields))
    handle = attach(model, Recipe(method, eckart.AdamW()), steps=20, lr=1e-2)
    model.to(dtype)
    return model, handle, cast(batch_for(architecture), dtype)


def batches(count, dtype=torch.float32):
    return [cast(batch_for("llama", seed=i), dtype) for i in range(count)]


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_a_restart_leaves_the_function_as_it_is(architecture):
    model, handle, batch = attached(architecture, F64, targets=("re:.*",))
    randomise(handle)
    before, weights = logits(model, batch), handle.named_state()
    weights = {k: v.clone() for k, v in weights.items()}
    (event,) = handle.recipe.weights.events()
    event.run(handle.events.now("restart"))
    terms = [t for by_name in handle.terms().values() for t in by_name.values()]
    assert all(not t.B.any() and t.A.any() for t in terms)
    assert any(not torch.equal(v, weights[k]) for k, v in handle.named_state().items())
    # fp64: W + s B A, in another order of sums
    torch.testing.assert_close(logits(model, batch), before, rtol=0, atol=1e-9)


def test_the_rank_of_the_move_adds_up():
    model, handle, _ = attached(dtype=F64, every=2, rank=2, alpha=2.0)
    path = "model.layers.0.self_attn.q_proj"
    start = handle.sites[path].raw.detach().clone()
    ranks = []
    optimizer = handle.optimizer(lr=1e-2)
    for batch in batches(6, F64):
        steps(handle, optimizer, [batch])
        ranks.append(int(torch.linalg.matrix_rank(handle.sites[path].raw - start, rtol=1e-9)))
    assert ranks == [0, 2, 2, 4, 4, 6]


def test_the_rate_is_jagged_and_the_schedulers_own_stays():
    _, handle, _ = attached(every=3, rewarm=2)
    assert [handle.recipe.weights.rate(t) for t in range(8)] == [1, 1, 1, 0.5, 1, 1, 0.5, 1]
    optimizer = handle.optimizer(lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
    applied, own = [], []
    optimizer.register_step_pre_hook(lambda o, *_: applied.append(o.param_groups[0]["lr"]))
    for batch in batches(5):
        steps(handle, optimizer, [batch])
        own.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    assert own == pytest.approx([1e-2 / (1 + t) for t in range(5)])
    assert applied == pytest.approx([own[0], own[1], own[2], own[3] / 2, own[4]])


def test_a_step_that_fails_does_not_keep_its_rate():
    _, handle, _ = attached(every=1, rewarm=4)
    optimizer = handle.optimizer(lr=1e-2)
    handle.events.step = 1
    handle.events.before(optimizer)
    assert optimizer.param_groups[0]["lr"] == 1e-2 / 4
    handle.events.before(optimizer)  # again: the first one never came to its end
    assert optimizer.param_groups[0]["lr"] == 1e-2 / 4
    handle.events.after(optimizer)
    assert optimizer.param_groups[0]["lr"] == 1e-2


def test_the_largest_moments_stay_with_their_partners():
    p = torch.zeros(2, 5)
    mean = torch.arange(1.0, 11.0).view(2, 5) * torch.tensor([1.0, -1, 1, -1, 1])
    state = {"step": 4, "exp_avg": mean.clone(), "exp_avg_sq": torch.ones(2, 5)}
    forget(state, p, 0.8)
    assert state["step"] == 4
    wanted = torch.zeros(2, 5)
    wanted[1, 3:] = 1  # 9 and 10 are the two largest of ten
    assert torch.equal(state["exp_avg"], mean * wanted)
    assert torch.equal(state["exp_avg_sq"], wanted)
    forget(state, p, 1.0)
    assert not state["exp_avg"].any() and not state["exp_avg_sq"].any()


def test_only_moments_of_the_adapters_are_forgotten():
    _, handle, _ = attached(every=2, pruned=1.0)
    optimizer = handle.optimizer(lr=1e-2)
    steps(handle, optimizer, batches(2))
    for name, value in optimizer.named_state_dict().items():
        if name.endswith("exp_avg"):
            assert value.any() != (".relora." in name), name


@pytest.mark.parametrize("cut", [2, 3, 4])
def test_resumes_bit_for_bit_across_a_restart(cut):
    """Saved before, at and after the restart at step 3; the changed matrices are in the state."""
    _, whole, _ = attached()
    optimizer = whole.optimizer(lr=1e-2, clip=1.0)
    data = batches(7)
    steps(whole, optimizer, data[:cut])
    saved = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "events": whole.events.state_dict()}, saved)
    tensors = {k: v.detach().clone() for k, v in whole.named_state().items()}
    structure = json.loads(json.dumps(whole.structure()))
    losses = steps(whole, optimizer, data[cut:])

    second = attach_from(tiny("llama"), structure, recipe=whole.recipe)
    second.load_named_state(tensors)
    optimizer = second.optimizer(lr=1e-2, clip=1.0)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    second.events.load_state_dict(state["events"])
    assert steps(second, optimizer, data[cut:]) == losses
    ours, theirs = second.named_state(), whole.named_state()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_result_is_a_dense_model(tmp_path):
    model, handle, batch = attached()
    steps(handle, handle.optimizer(lr=1e-2), batches(4))
    expected = logits(model, batch)
    with pytest.raises(EckartError, match="base"):
        handle.remove()
    with pytest.raises(EckartError):
        eckart.export(handle, tmp_path / "peft", "peft")
    eckart.export(handle, tmp_path / "dense", "dense")
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    # fp32, W + s B A summed once
    torch.testing.assert_close(logits(loaded, batch), expected, rtol=0, atol=1e-5)


def test_base_matrices_take_no_gradient_and_the_rest_is_trained():
    model, handle, batch = attached()
    trained = set(handle.trainable())
    assert "model.embed_tokens.weight" in trained and "model.norm.weight" in trained
    assert "model.layers.0.self_attn.q_proj.weight" not in trained
    assert "model.layers.0.self_attn.q_proj.weight" in handle.named_state()
    handle.loss(batch, model(**batch)).backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is None
