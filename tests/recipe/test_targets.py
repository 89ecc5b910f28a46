"""Targets mean what they say, and a word that means nothing is answered with what would."""

import re

import pytest
import torch
from torch import nn

import eckart
from eckart.errors import UsageError
from eckart.methods.update.fira import Fira
from eckart.methods.update.galore import GaLore
from eckart.methods.update.lisa import LISA
from eckart.methods.weights.dense import Dense
from eckart.methods.weights.lora import LoRA
from eckart.recipe import Recipe, attach
from eckart.recipe.targets import select, sites_of
from tests.conftest import ARCHITECTURES, randomise, tiny

ATTENTION = {
    "llama": {"attn.q", "attn.k", "attn.v", "attn.o"},
    "gpt2": {"attn.qkv", "attn.o"},
    "bert": {"attn.q", "attn.k", "attn.v", "attn.o"},
    "t5": {"attn.q", "attn.k", "attn.v", "attn.o"},
    "vit": {"attn.q", "attn.k", "attn.v", "attn.o"},
}


def chosen(architecture, *targets):
    return [site.path for site in select(sites_of(tiny(architecture)), targets)]


@pytest.mark.parametrize("architecture", ATTENTION)
def test_roles_are_found_in_every_family(architecture):
    roles = {site.role for site in sites_of(tiny(architecture))}
    assert ATTENTION[architecture] <= roles
    assert any(role.startswith("mlp") for role in roles)


@pytest.mark.parametrize("kind", ["convnext", "deberta-v2", "gpt_neox", "modernbert"])
def test_blocks_that_name_their_maps_otherwise_have_roles_too(kind):
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(kind, num_hidden_layers=2)
    with torch.device("meta"):
        sites = sites_of(AutoModel.from_config(config))
    roles = [site.role for site in sites if site.kind == "linear"]
    assert {"mlp.up", "mlp.down"} <= set(roles) and "other" not in roles
    assert kind == "convnext" or ({"attn.q", "attn.qkv"} & set(roles) and "attn.o" in roles)


MLA = {
    "kv_lora_rank": 8, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16,
}  # fmt: skip
OTHERS = {  # what the default takes of them
    "deepseek_v3": (MLA, {"attn.q.a", "attn.q.b", "attn.kv.a", "attn.kv.b", "attn.o", "mlp.up"}),
    "mamba": ({"state_size": 4}, {"ssm.in", "ssm.x", "ssm.out"}),
    "falcon": ({}, {"attn.qkv", "attn.o", "mlp.up", "mlp.down"}),  # adds to results in place
    "xlnet": ({"n_layer": 2, "n_head": 4, "d_inner": 48, "d_model": 32}, {"mlp.up", "mlp.down"}),
}


def other(kind):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"intermediate_size": 48, "num_key_value_heads": 4}
    sizes |= more if kind == "deepseek_v3" else {}
    sizes = {} if kind == "xlnet" else sizes
    config = AutoConfig.for_model(kind, vocab_size=64, **sizes, **OTHERS[kind][0])
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures_learn_by_the_default_and_come_back_from_files(kind, tmp_path):
    model, ids = other(kind), torch.arange(20).view(2, 10)
    before = model(ids).logits
    handle = attach(model, Recipe(weights=LoRA(rank=2)))
    assert {site.role for site in handle.sites.values()} >= OTHERS[kind][1]
    randomise(handle)
    model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for n, p in handle.trainable().items() if "experts" not in n)
    expected = model.eval()(ids).logits
    assert not torch.allclose(expected, before, atol=1e-3)
    eckart.export(handle, tmp_path, format="native")
    again = other(kind)
    eckart.load(tmp_path, again)
    # fp32, the same products; a matrix is merged in fp64 and rounded once
    torch.testing.assert_close(again(ids).logits, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(handle.merge()(ids).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["dt_proj", "x_proj"])
def test_a_weight_that_a_scan_reads_past_its_layer_is_refused(name, monkeypatch):
    monkeypatch.setattr("eckart.linear.sites.find_spec", lambda package: package == "mamba_ssm")
    with pytest.raises(UsageError, match="reads its weight without calling it"):
        attach(other("mamba"), Recipe(weights=LoRA(rank=2, targets=(name,))))


def test_maps_that_cannot_carry_terms_are_not_proposed():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, groups=4))
    with pytest.raises(UsageError) as error:
        attach(model, Recipe(weights=LoRA(rank=2, targets=("conv",))))
    assert str(error.value).splitlines() == [
        "no map of this model can carry terms",
        "  weights.targets = conv  matches no map of this model",
        "  grouped                 2 maps, which carry no terms",
    ]
    with pytest.raises(UsageError, match=r"Type weights.targets=\[other\]."):
        model.append(nn.Linear(3, 3))
        attach(model, Recipe(weights=LoRA(rank=2, targets=("conv",))))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_default_takes_every_map_of_the_blocks_and_no_other(architecture):
    model = tiny(architecture)
    sites = sites_of(model)
    inside = [s for s in sites if any(part.isdigit() for part in s.path.split("."))]
    expected = [
        s.path
        for s in inside
        if s.kind != "embedding" and "relative" not in s.path and s.role != "router"
    ]
    assert chosen(architecture, "linear") == chosen(architecture, "all") == expected


def test_names_globs_patterns_and_ranges():
    q = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    assert chosen("llama", "q_proj") == chosen("llama", "attn.q") == q
    assert chosen("llama", "layers.1.self_attn.q_proj") == q[1:]
    assert chosen("llama", "layers.*.self_attn.q_proj") == q
    assert chosen("llama", r"re:0.*q_proj$") == q[:1]
    assert all("layers.1." in path for path in chosen("llama", "layers.1-1"))
    assert len(chosen("llama", "layers.1-1")) == 7
    assert chosen("llama", "embedding") == ["model.embed_tokens"]
    assert chosen("llama", "head") == ["lm_head"]


def test_a_tied_group_is_one_site_by_either_name():
    assert chosen("t5", "embedding") == chosen("t5", "lm_head") == ["shared"]
    assert chosen("gemma", "lm_head") == ["model.embed_tokens"]


def test_a_target_without_a_match_lists_what_would_match():
    with pytest.raises(UsageError) as error:
        attach(tiny("llama"), Recipe(weights=LoRA(rank=2, targets=("q_prj",))))
    assert str(error.value).splitlines() == [
        "no map matches a target",
        "  weights.targets = q_prj  matches no map of this model",
        "  attn.k                   2 maps",
        "  attn.o                   2 maps",
        "  attn.q                   2 maps",
        "  attn.v                   2 maps",
        "  embedding                1 map",
        "  head                     1 map",
        "  mlp.down                 2 maps",
        "  mlp.gate                 2 maps",
        "  mlp.up                   2 maps",
        "  names                    down_proj, embed_tokens, gate_proj, k_proj, lm_head, o_proj, "
        "q_proj, up_proj, v_proj",
        "Type weights.targets=[q_proj].",
    ]


@pytest.mark.parametrize(
    ("typed", "meant"), [("attention", "attn"), ("q_proj,v_proj", "q_proj,v_proj")]
)
def test_a_group_and_names_in_one_word_are_understood(typed, meant):
    with pytest.raises(UsageError, match=re.escape(f"Type weights.targets=[{meant}].")):
        attach(tiny("llama"), Recipe(weights=LoRA(rank=2, targets=(typed,))))


def test_overrides_change_fields_where_they_match():
    weights = LoRA(
        rank=4, overrides=({"match": "layers.1-1", "rank": 2}, {"match": "attn.v", "rank": 1})
    )
    terms = attach(tiny("llama"), Recipe(weights=weights)).terms()
    ranks = {path: by_name["lora"].A.shape[0] for path, by_name in terms.items()}
    assert ranks["model.layers.0.self_attn.q_proj"] == 4
    assert ranks["model.layers.1.self_attn.q_proj"] == 2
    assert ranks["model.layers.1.self_attn.v_proj"] == 1


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ({"match": "layers.7-9", "rank": 2}, "no map matches a target"),
        ({"match": "attn", "rnak": 2}, "Did you mean rank?"),
        ({"rank": 2}, "an override needs `match`"),
        ({"match": "attn.k", "rank": 17}, "At most 16 fits there."),
    ],
)
def test_overrides_that_cannot_work_say_why(override, said):
    with pytest.raises(UsageError) as error:
        attach(tiny("llama"), Recipe(weights=LoRA(rank=2, overrides=(override,))))
    assert said in str(error.value)


def test_a_rank_too_large_everywhere_is_refused_and_cut_where_only_some_are_narrow():
    with pytest.raises(UsageError) as error:
        attach(tiny("llama"), Recipe(weights=LoRA(rank=33)))
    assert "so at most 32 at every site" in str(error.value)
    assert "Type weights.rank=32, or less." in str(error.value)
    handle = attach(tiny("llama"), Recipe(weights=LoRA(rank=20)))
    assert handle.coverage.cut == 4  # k and v of two layers are 16 x 32
    assert "rank cut at 4 narrower maps" in str(handle.coverage)


def test_what_is_projected_at_full_rank_is_said():
    def line(update):
        return str(attach(tiny("llama"), Recipe(weights=Dense(), update=update)).coverage)

    assert "16 matrices: attn, embedding, head, mlp, rest;" in line(GaLore(rank=8))
    assert "full rank" not in line(GaLore(rank=8))
    assert "; 4 projected at full rank, which saves no memory" in line(GaLore(rank=16))  # k and v
    assert "full rank" not in line(GaLore(rank=16, skip_if_no_saving=True))
    assert "projected" in line(Fira(rank=8)) and "projected" not in line(LISA(blocks=1))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class ByHand(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


class Shifted(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids + 2)


class Standardised(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class BesideTrained(LoRA):
    """A branch beside a matrix that is trained, too."""

    base = "trained"


@pytest.mark.parametrize(
    ("model", "target", "said"),
    [
        (lambda: nn.MultiheadAttention(8, 2), "out_proj", "MultiheadAttention reads its weight"),
        (lambda: nn.TransformerEncoderLayer(8, 2, 16), "linear2", "set_fastpath_enabled(False)"),
        (lambda: nn.Sequential(Doubled(4, 4)), "0", "Doubled computes more than a product"),
        (lambda: nn.Sequential(Shifted(5, 4)), "0", "Shifted computes more than a product"),
        (lambda: nn.Sequential(Standardised(3, 4, 2)), "0", "Standardised computes more than"),
    ],
)
def test_a_layer_whose_terms_would_not_run_as_they_should_is_refused(model, target, said):
    for method in (LoRA, BesideTrained):
        with pytest.raises(UsageError) as error:
            attach(model(), Recipe(weights=method(rank=2, targets=(target,))))
        assert said in str(error.value)


def test_a_product_written_by_hand_is_as_good_as_torchs_own():
    model, x = nn.Sequential(ByHand(4, 4)), torch.ones(2, 4)
    before = model(x)
    attach(model, Recipe(weights=LoRA(rank=2, targets=("0",))))
    torch.testing.assert_close(model(x), before)  # fp32, a sum of four in another order


def test_a_grouped_convolution_is_refused():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(UsageError, match="a grouped convolution has no single matrix"):
        attach(model, Recipe(weights=LoRA(rank=2, targets=("0",))))
    assert [site.role for site in sites_of(model)] == ["grouped"]  # no conv, and so not among them


def test_resizing_an_embedding_that_carries_terms_is_refused():
    model = tiny("llama")
    handle = attach(model, Recipe(weights=LoRA(rank=2, targets=("embedding",))))
    with pytest.raises(UsageError, match="Resize first, then attach"):
        model.resize_token_embeddings(80)
    handle.remove()
    model.resize_token_embeddings(80)
    assert model.get_input_embeddings().weight.shape[0] == 80


def test_a_tied_matrix_is_not_dropped():
    recipe = Recipe(weights=eckart.LowRank(targets=("embedding",)))
    model = tiny("gemma")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UsageError, match="a tied matrix cannot be replaced"):
        attach(model, recipe)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
