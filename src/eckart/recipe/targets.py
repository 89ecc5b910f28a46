"""Resolves targets (roles, names, globs, layer ranges) to sites.

attn attn.q attn.k attn.v attn.o attn.qkv   roles, by the names models give their layers
mlp mlp.gate mlp.up mlp.down ssm experts conv embedding head router
linear        attention, mlp, ssm and experts of the blocks (the default); `all` is the same
everything    every parameter of the model, norms and biases too (full training)
q_proj        a module's own name; layers.0.self_attn.q_proj a path or the end of one
layers.*.mlp.*   a glob on paths; re:PATTERN a regular expression; layers.0-3 a range
"""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from eckart.errors import UsageError, nearest
from eckart.linear import Site, Structured, find_sites
from eckart.linear.sites import forward_replaced, more_than_its_matrix, reads_past_module

EVERYTHING = "everything"

# The first pattern that matches the path (without a fused parameter's name) gives the role.
ROLES: tuple[tuple[str, str], ...] = (
    (r"(^|\.)(lm_head|embed_out|score|classifier|qa_outputs)$", "head"),
    (r"predictions\.decoder$", "head"),
    (r"\.(gate|router|shared_expert_gate)$", "router"),
    (r"\.experts\.\d+\.(w1|w3|gate_proj|up_proj)$", "experts.up"),
    (r"\.experts\.\d+\.(w2|down_proj)$", "experts.down"),
    (r"\.(mixer|mamba)\.in_proj$|temporal_block\.linear_[xy]$", "ssm.in"),
    (r"\.(mixer|mamba)\.x_proj$", "ssm.x"),
    (r"\.(mixer|mamba)\.out_proj$|temporal_block\.linear_out$", "ssm.out"),
    (r"(c_attn|qkv_proj|query_key_value|in_proj(_\w+)?|Wqkv)$", "attn.qkv"),
    (r"\.q_a_proj$", "attn.q.a"),  # DeepSeek: down to a latent vector, and up again
    (r"\.q_b_proj$", "attn.q.b"),
    (r"\.kv_a_proj_with_mqa$", "attn.kv.a"),
    (r"\.kv_b_proj$", "attn.kv.b"),
    (r"(q_proj|query|query_proj|\.q|q_lin|wq)$", "attn.q"),
    (r"(k_proj|key|key_proj|\.k|k_lin|wk)$", "attn.k"),
    (r"(v_proj|value|value_proj|\.v|v_lin|wv)$", "attn.v"),
    (r"(attn|attention|Attention)[\w.]*\.(o_proj|out_proj|c_proj|o|wo|Wo|dense)$", "attn.o"),
    (r"(attention\.output\.dense|attention\.dense|out_lin|o_proj)$", "attn.o"),
    (r"(gate_proj|wi_0|\.w1)$", "mlp.gate"),
    (r"(up_proj|wi_1|\.wi|\.Wi|\.w3|c_fc|fc1|intermediate[._]dense|lin1|gate_up_proj)$", "mlp.up"),
    (r"\.ff\.layer_1$", "mlp.up"),
    (r"\.ff\.layer_2$", "mlp.down"),
    (r"(dense_h_to_4h|fc_in|pwconv1)$", "mlp.up"),
    (r"(down_proj|\.wo|\.Wo|\.w2|mlp\.c_proj|fc2|output[._]dense|lin2)$", "mlp.down"),
    (r"(dense_4h_to_h|fc_out|pwconv2)$", "mlp.down"),
)
GROUPED = "grouped"  # a convolution in groups: no single matrix, so it carries no terms
ONE_INPUT = (
    ("attn.q", "attn.k", "attn.v", "attn.q.a", "attn.kv.a"),
    ("mlp.gate", "mlp.up"),
    ("experts.up",),
)
ACROSS = re.compile(r"cross|encdec|encoder_attn|encoder_decoder", re.IGNORECASE)
TOKENS = re.compile(r"(^|\.)(embed_tokens|embed_in|wte|word_embeddings|shared|tok_embeddings)$")
IN_BLOCK = re.compile(r"(^|\.)\d+\.")
RANGE = re.compile(r"^(?P<name>[\w.]+?)\.(?P<first>\d+)-(?P<last>\d+)$")


def role_of(site: Site) -> str:
    """The role of a site, from its kind and its path."""
    if site.kind == "experts":
        return "experts.down" if site.param == "down_proj" else "experts.up"
    if site.kind == "conv":  # a grouped one has no single matrix
        return "conv" if getattr(site.module, "groups", 1) == 1 else GROUPED
    if site.kind == "embedding":
        return "embedding" if TOKENS.search(site.path) or site.ties else "embedding.other"
    for pattern, role in ROLES:
        if re.search(pattern, site.path):
            inside = IN_BLOCK.search(site.path) or role in ("head", "router")
            return role if inside else "other"
    return "other"


def sites_of(model: nn.Module, seed: int = 0) -> list[Site]:
    """All sites of a model with their roles."""
    sites = find_sites(model, seed)
    for site in sites:
        site.role = role_of(site)
    return sites


def same_input(sites: Iterable[Site]) -> list[list[Site]]:
    """Groups of linear maps that a model gives the same input: q, k and v; gate and up.

    Cross-attention is left out: its k and v have another input than its q.
    """
    groups: dict[tuple[str, tuple[str, ...]], list[Site]] = {}
    for site in sites:
        roles = next((roles for roles in ONE_INPUT if site.role in roles), None)
        if roles is not None and site.kind == "linear" and not ACROSS.search(site.path):
            groups.setdefault((site.path.rpartition(".")[0], roles), []).append(site)
    return [group for group in groups.values() if len(group) > 1]


def reads_encoder(site: Site) -> bool:
    """Is this a map of a decoder that reads the encoder's output?"""
    return site.role in ("attn.k", "attn.v") and ACROSS.search(site.path) is not None


def matches(target: str, site: Site) -> bool:
    """Does a target select this site?"""
    if target in ("linear", "all"):
        return site.role.split(".")[0] in ("attn", "mlp", "ssm", "experts")
    if target == site.role or site.role.startswith(target + "."):
        return target != "embedding" or site.role == "embedding"
    if target.startswith("re:"):
        return re.search(target[3:], site.path) is not None
    if span := RANGE.match(target):
        found = re.search(rf"(^|\.){re.escape(span['name'])}\.(\d+)(\.|$)", site.path)
        inside = found is not None and int(span["first"]) <= int(found[2]) <= int(span["last"])
        return inside and matches("linear", site)
    names = (site.path, *site.ties)
    return any(
        fnmatch.fnmatchcase(name, pattern) for name in names for pattern in (target, f"*.{target}")
    )


def select(sites: Sequence[Site], targets: Iterable[str], axis: str = "weights") -> list[Site]:
    """The sites that the targets select. UsageError for a target that selects none."""
    chosen: dict[str, Site] = {}
    if not (targets := list(targets)):
        raise UsageError(
            f"{axis}.targets is empty",
            fix=f"Leave it out for {axis}.targets=[linear], or name a role: [attn.q,attn.v].",
        )
    for target in targets:
        require_pattern(target, f"{axis}.targets")
        found = [site for site in sites if matches(target, site)]
        if not found:
            raise no_match(f"{axis}.targets", target, sites)
        chosen.update({site.path: site for site in found})
    return [site for site in sites if site.path in chosen]


def require_pattern(target: str, key: str) -> None:
    """Raise UsageError for an invalid regular expression."""
    if not target.startswith("re:"):
        return
    try:
        re.compile(target[3:])
    except re.error as fault:
        raise UsageError(
            "this is no regular expression",
            [(f"{key} = {target}", str(fault))],
            f"Type for example {key}=['re:layers\\.[01]\\.'].",
        ) from None


def no_match(key: str, target: str, sites: Sequence[Site]) -> UsageError:
    """The error for a target that selects nothing, with the ones that would."""
    counts = Counter(site.role for site in sites)
    usable = [site for site in sites if site.role != GROUPED]
    roles = Counter(site.role for site in usable)
    names = Counter(site.path.rsplit(".", 1)[-1] for site in usable)
    facts = [(f"{key} = {target}", "matches no map of this model")]
    for role, count in sorted(counts.items()):
        maps = "1 map" if count == 1 else f"{count} maps"
        facts.append((role, f"{maps}, which carry no terms" if role == GROUPED else maps))
    if not usable:
        return UsageError("no map of this model can carry terms", facts)
    facts += [("names", ", ".join(sorted(names)))]
    if "," in target and not target.startswith("re:"):
        return UsageError("no map matches a target", facts, f"Type {key}=[{target}].")
    groups = {role.partition(".")[0] for role in roles}
    plain = nearest(target, groups) if "." not in target else []
    close = plain or nearest(target, [*roles, *names])
    example = close[0] if close else "linear"
    if not any(matches(example, site) for site in usable):  # what it has most of
        example = roles.most_common(1)[0][0]
    return UsageError("no map matches a target", facts, f"Type {key}=[{example}].")


def apply_overrides(
    sites: Sequence[Site], overrides: Sequence[Mapping[str, Any]], fields: Sequence[str]
) -> None:
    """Write the overrides that match into each site; later ones take precedence."""
    for number, override in enumerate(overrides):
        key = f"weights.overrides[{number}]"
        if "match" not in override:
            raise UsageError("an override needs `match`", [(key, str(dict(override)))])
        require_pattern(str(override["match"]), f"{key}.match")
        values = {k: v for k, v in override.items() if k != "match"}
        for name in values:
            if name not in fields:
                close = nearest(name, fields)
                hint = f"Did you mean {close[0]}?" if close else f"Fields: {', '.join(fields)}."
                raise UsageError(f"unknown field in an override: {name}", [(key, name)], hint)
        found = [site for site in sites if matches(override["match"], site)]
        if not found:
            raise no_match(f"{key}.match", override["match"], sites)
        for site in found:
            site.overrides.update(values)


def refuse_unreachable(model: nn.Module, sites: Sequence[Site]) -> None:
    """Raise UsageError for a site whose terms would be skipped, or that is more than a product."""
    for site in sites:
        parent_path, _, name = site.module_path.rpartition(".")
        parent, strange = model.get_submodule(parent_path), ""
        if past := reads_past_module(parent, name):
            strange = f"{parent_path or type(parent).__name__} {past}"
        if forward_replaced(site.module):
            strange = "its own forward was replaced"
        for layer in (site.module, *site.tied_modules):
            if not isinstance(layer, Structured) and more_than_its_matrix(layer):
                strange = f"{type(layer).__name__} computes more than a product with its weight"
        if strange:
            raise UsageError(
                "terms on this map would not run as they should",
                [(site.path, strange)],
                f"Leave it out, for example weights.targets=['re:^(?!.*{name})'].",
            )
        if getattr(site.module, "groups", 1) != 1:
            raise UsageError(
                "a grouped convolution has no single matrix",
                [(site.path, f"groups = {site.module.groups}")],
                "Leave it out of weights.targets.",
            )
