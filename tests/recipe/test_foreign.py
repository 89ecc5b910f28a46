"""Update rules on models that eckart did not touch: PEFT's adapters, and plain weights."""

import pytest
import torch

import eckart
from eckart import Recipe, attach
from eckart.errors import UsageError
from eckart.recipe.foreign import optimizer_for, peft_pairs
from tests.conftest import batch_for, tiny

peft = pytest.importorskip("peft")


def adapted(architecture="llama", **config):
    torch.manual_seed(0)
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | config
    return peft.get_peft_model(tiny(architecture), peft.LoraConfig(**config))


def steps(model, optimizer, count=8, architecture="llama"):
    losses = []
    for _ in range(count):
        loss = model(**batch_for(architecture)).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize(
    "update",
    [
        eckart.LoRAPro(),
        eckart.AltLoRA(plus=True),
        eckart.Riemannian(),
        eckart.LoRARITE(),
        eckart.ALLoRA(apply="update"),
        eckart.AdamW(),
    ],
    ids=lambda u: u.slug,
)
def test_a_peft_model_trains_under_every_rule_for_pairs(update):
    model = adapted()
    losses = steps(model, optimizer_for(model, update, lr=1e-2, clip=1.0))
    assert losses[-1] < losses[0] - 0.05


def test_it_trains_as_the_same_adapter_attached_here():
    """Names, pairs and scales are found right: the same steps as handle.optimizer()."""
    model = adapted()
    ours = tiny("llama")
    lora = eckart.LoRA(rank=4, alpha=8.0, targets=("attn.q", "attn.v"))
    handle = attach(ours, Recipe(lora, eckart.LoRAPro()))
    theirs = dict(model.named_parameters())
    for name, p in handle.trainable().items():
        there = name.replace(".lora.A", ".lora_A.default.weight")
        there = "base_model.model." + there.replace(".lora.B", ".lora_B.default.weight")
        p.data.copy_(theirs[there].data)
    losses = steps(ours, handle.optimizer(lr=1e-2, clip=1.0))
    # fp32; our layers add the term to the base in another order of products
    assert steps(model, optimizer_for(model, eckart.LoRAPro(), lr=1e-2, clip=1.0)) == pytest.approx(
        losses, abs=1e-4
    )


def test_pairs_are_those_that_are_trained_with_their_own_scales():
    model = adapted(rank_pattern={"v_proj": 2}, use_rslora=True)
    found = {a.split(".")[-4]: scale for _, a, scale in peft_pairs(model)}
    assert found == {"q_proj": pytest.approx(8 / 4**0.5), "v_proj": pytest.approx(8 / 2**0.5)}
    for b, a, _ in peft_pairs(model):
        assert a == b.replace("lora_B", "lora_A")
    model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"]))
    model.set_adapter("other")
    assert {b.split(".")[-2] for b, _, _ in peft_pairs(model)} == {"other"}
    for _, p in model.named_parameters():
        p.requires_grad_(False)
    assert not list(peft_pairs(model))


def test_embeddings_are_pairs_and_convolutions_and_experts_are_not():
    model = adapted(target_modules=["q_proj", "embed_tokens"])
    names = [b for b, _, _ in peft_pairs(model)]
    assert len(names) == 3 and any("lora_embedding_B" in n for n in names)
    losses = steps(model, optimizer_for(model, eckart.AltLoRA(plus=True), lr=1e-2))
    assert losses[-1] < losses[0]
    vit = adapted("vit", target_modules=["projection"])
    assert not list(peft_pairs(vit))
    experts = adapted("mixtral", target_parameters=["mlp.experts.down_proj"])
    found = list(peft_pairs(experts))
    assert found and all("self_attn" in b for b, _, _ in found)


def test_what_is_in_no_pair_follows_adamw():
    """DoRA's magnitudes, biases: the rule's plain part, without decay on vectors."""
    model = adapted(use_dora=True)
    optimizer = optimizer_for(model, eckart.LoRAPro(weight_decay=0.1), lr=1e-2)
    by_name = {n: g for g in optimizer.param_groups for n in g["param_names"]}
    magnitude = next(n for n in by_name if "magnitude" in n)
    assert by_name[magnitude]["rule"].pair is None and by_name[magnitude]["weight_decay"] == 0
    pair = next(n for n in by_name if "lora_B" in n)
    assert by_name[pair]["rule"].pair is not None and by_name[pair]["weight_decay"] == 0.1
    assert steps(model, optimizer)[-1] < steps(model, optimizer, 1)[0] + 1


def test_plain_weights_are_projected_where_targets_say():
    model = tiny("llama")
    optimizer = optimizer_for(model, eckart.GaLore(rank=4, targets=("mlp",)), lr=1e-2)
    by_name = {n: g["rule"] for g in optimizer.param_groups for n in g["param_names"]}
    assert set(by_name) == {n for n, _ in model.named_parameters()}
    for name, rule in by_name.items():
        assert rule.projector.identity == (".mlp." not in name)
    losses = steps(model, optimizer)
    assert losses[-1] < losses[0]


def refusal(model, update):
    with pytest.raises(UsageError) as caught:
        optimizer_for(model, update)
    return str(caught.value)


def test_what_only_attach_can_do_is_refused():
    assert refusal(adapted(), eckart.ALLoRA()) == (
        "allora changes the backward pass, which no optimizer can\n"
        "  update = allora  needs layers of eckart\n"
        "Use eckart.attach, or an update that acts on the step alone (apply=update)."
    )
    assert "the model trains none" in refusal(tiny("llama"), eckart.LoRAPro())
    assert "Give the base without PEFT" in refusal(adapted(), eckart.GaLore())
    assert "Give the model itself" in refusal(adapted().parameters(), eckart.GaLore())
    attached = tiny("llama")
    attach(attached, Recipe(eckart.LoRA(rank=4)))
    assert "Take handle.optimizer()" in refusal(attached, eckart.LoRAPro())
    frozen = tiny("llama").requires_grad_(False)
    assert "nothing is trained" in refusal(frozen, eckart.AdamW())
    assert "Type update=eckart.GaLore()." in refusal(frozen, "galore")
