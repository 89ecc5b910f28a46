"""Gradients and activations of sites, gathered from calibration batches before attaching.

Gradients are means over the batches, in fp32, computed for a few matrices at a time, so that the
gradient of the whole model is never held. Activations are the inputs of sites, by token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from eckart.errors import Diverged, UsageError
from eckart.linear import Site
from eckart.linear.sites import as_matrix
from eckart.recipe.targets import reads_encoder

Batch = Mapping[str, Any]
AT_A_TIME = 8  # matrices whose gradients are held at once: passes against memory


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """The task's own loss on one batch. UsageError if the model returns none."""
    return loss_in(model(**batch), batch)


def loss_in(outputs: Any, batch: Batch) -> Tensor:
    """The loss in a model's outputs. UsageError if there is none."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs[0]
    if not isinstance(loss, Tensor) or loss.ndim:
        raise UsageError(
            "the model gave no loss for a batch",
            [("the batch has", ", ".join(batch))],
            "Give each batch its labels.",
        )
    return loss


def gather_gradients(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Batch],
    loss: Callable[[nn.Module, Batch], Tensor] = loss_of,
    at_a_time: int = AT_A_TIME,
) -> None:
    """Write the mean gradient [*, m, n] (fp32, the matrix's device) into each site."""
    batches = list(batches)
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with deterministic_mode(model):
            for start in range(0, len(sites), at_a_time):
                for parameter, _ in wanted:
                    parameter.requires_grad_(False)
                gather_group(model, sites[start : start + at_a_time], batches, loss)
    finally:
        for parameter, before in wanted:
            parameter.requires_grad_(before)


def gather_group(
    model: nn.Module,
    group: Sequence[Site],
    batches: Sequence[Batch],
    loss: Callable[[nn.Module, Batch], Tensor],
) -> None:
    """Write the mean gradients of a few sites into them; only these are differentiated."""
    totals = [torch.zeros(site.matrix_shape, device=site.raw.device) for site in group]
    for site in group:
        site.raw.requires_grad_(True)
    for batch in batches:
        value = loss(model, batch)
        grads = torch.autograd.grad(value, [s.raw for s in group], allow_unused=True)
        for site, total, grad in zip(group, totals, grads, strict=True):
            if grad is not None:
                total += as_matrix(grad, site.module, site.kind).float()
    for site, total in zip(group, totals, strict=True):
        site.gradient = total / max(1, len(batches))
        check_finite(site.gradient, site.path, "gradient")


def gather_activations(
    model: nn.Module, sites: Sequence[Site], batches: Iterable[Batch], limit: int = 8192
) -> None:
    """Write up to `limit` input tokens [t, n] (fp32, CPU) into each site, without padding."""
    kept: dict[str, list[Tensor]] = {site.path: [] for site in sites}
    counts = dict.fromkeys(kept, 0)
    present: Batch = {}

    def watch(site: Site) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].detach()
            if not x.is_floating_point() or counts[site.path] >= limit:
                return
            tokens = x.reshape(-1, x.shape[-1])
            mask = real_tokens(model, site, present)
            if mask is not None and mask.numel() == tokens.shape[0]:
                tokens = tokens[mask.reshape(-1)]
            tokens = tokens[: limit - counts[site.path]]
            counts[site.path] += tokens.shape[0]
            kept[site.path].append(tokens.float().cpu())

        return hook

    handles = [site.module.register_forward_pre_hook(watch(site)) for site in sites]
    try:
        with deterministic_mode(model), torch.no_grad():
            for present in batches:
                model(**present)
    finally:
        for handle in handles:
            handle.remove()
    for site in sites:
        if kept[site.path]:
            site.activations = torch.cat(kept[site.path])
            check_finite(site.activations, site.path, "activation")


GATHERED: dict[str, Callable[[nn.Module, Sequence[Site], Sequence[Batch]], None]] = {
    "gradients": gather_gradients,
    "activations": gather_activations,
}
"""What a method may need of data -> what writes it into the sites."""


def real_tokens(model: nn.Module, site: Site, batch: Batch) -> Tensor | None:
    """Which tokens of a site's input are not padding, bool [b, t]; None if the batch does not say.

    A decoder beside an encoder has a different length, that of its labels.
    """
    mask = batch.get("attention_mask")
    both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if both and "decoder" in site.path.split(".") and not reads_encoder(site):
        labels = batch.get("labels")
        mask = batch.get("decoder_attention_mask", None if labels is None else labels != -100)
    return None if mask is None or mask.ndim != 2 else mask.bool()


@contextmanager
def deterministic_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode while calibrating: with dropout, initial values would vary between runs."""
    training = {name: module.training for name, module in model.named_modules()}
    config = vars(model.config) if hasattr(model, "config") else {}
    before = dict(config)  # classifiers of transformers note their problem_type as they run
    model.eval()
    try:
        yield
    finally:
        config.update(before)
        for name, module in model.named_modules():
            module.training = training[name]


def check_finite(tensor: Tensor, path: str, what: str) -> None:
    """Raise Diverged, naming the module, if calibration produced a NaN or an infinity."""
    if not torch.isfinite(tensor).all():
        raise Diverged(f"a calibration {what} is not finite", [(path, what)])
