"""Maps with the same input (q, k, v; gate, up), computed together when the first is called.

The others take their results when they are called with the same tensor; with another one they
compute their own. Which maps share an input is decided at attaching and does not depend on earlier
calls, so a resumed run, and a pass repeated by checkpointing, compute the same bits. Only in
training: without gradients it is not faster.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eckart.kernels.low_rank import Map, fused, map_of, ordinary
from eckart.linear import Term, linear_plus_term, plain_mm
from eckart.linear.layers import LinearSum


def peers_at_once(layer: LinearSum, x: Tensor, W: Tensor, term: Term) -> Tensor | None:
    """`linear_plus_term` for all peers, if this call finds no stored result."""
    peers = layer._sum.peers
    if peers is None or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return linear_plus_term(layer, x, W, term)
    member = any(layer is other for other in peers.members)  # a replica is none
    if not member or x.is_inference():
        return linear_plus_term(layer, x, W, term)
    if (taken := peers.take(layer, x)) is not None:
        return taken
    peers.forget()
    maps = [one for one in (free_map(other, x) for other in peers.members) if one is not None]
    if len(maps) < len(peers.members) or not matching(maps):
        return linear_plus_term(layer, x, W, term)
    results = fused(x, maps)
    peers.keep(x, results)
    if (node := results[0].grad_fn) is not None:  # once it has run, its tensors are gone
        node.register_prehook(lambda grads: peers.forget())
    return peers.take(layer, x)


def free_map(layer: nn.Module, x: Tensor) -> Map | None:
    """A layer's map before any gain, if nothing else hooks into its call; else None."""
    if not isinstance(layer, LinearSum) or layer._forward_pre_hooks:
        return None
    record, (terms, _), W = layer._sum, layer.parts_of(layer.active_parts()), layer.matrix()
    usual = record.enabled and not record.mix and record.mm is plain_mm
    if not usual or W is None or len(terms) != 1:
        return None
    pair = terms[0].pair()
    if pair is None:
        return None
    one = map_of(W, layer.bias_within(), pair)
    # An offloaded or sharded weight is elsewhere until its own layer is called.
    here = W.device == x.device and W.untyped_storage().size() > 0
    return one if here and ordinary(x, *one[:-1]) else None


def matching(maps: list[Map]) -> bool:
    """Do bases and factors have one dtype each, and are all or no A trained?"""
    kinds = {(m.W.dtype, m.W.shape[1], m.A.dtype, m.B.dtype, m.A.requires_grad) for m in maps}
    return len(kinds) == 1
