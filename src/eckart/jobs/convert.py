"""`eckart convert SOURCE --to FORMAT`: write a run, an adapter or a model in another form.

The conversion is exact if the format can hold the same function. `rank` and `max_drift` matter
only if it cannot, or to ask for a smaller rank. The written model is loaded again and compared
with the source on data before it is moved into place.
"""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eckart.decompose.ranks import smallest_rank
from eckart.errors import EckartError, FileError, UsageError, did_you_mean
from eckart.io import peft
from eckart.io.export import export, reasons
from eckart.io.folder import refuse_occupied, require_writable, write_folder
from eckart.io.heads import names_of, naming, outside, task_of_live
from eckart.io.models import load_model, own_task, recognise_result
from eckart.io.opening import ADAPTERS, Opened, on_base, open_model
from eckart.io.tasks import TASKS
from eckart.jobs.finetune import require_weights
from eckart.jobs.measuring.approximate import Approximation, of_model, of_update
from eckart.jobs.measuring.drift import Sample, of_images, of_text
from eckart.jobs.settings.config import OUT, Job
from eckart.jobs.training import modality, prepare
from eckart.jobs.training.outcome import asking, shown
from eckart.jobs.training.screen import Screen, amount
from eckart.linear import joint_factors
from eckart.recipe import Handle
from eckart.recipe.fingerprint import fingerprint
from eckart.recipe.handle import handle_of

PLAIN = peft.GENERAL.lower()  # PEFT's files for simple readers: one rank, no scale
FORMATS = {
    "peft": "plain PEFT loads it",
    PLAIN: "plain PEFT, vLLM and llama.cpp load it",
    "dense": "plain transformers loads it",
    "factored": "import eckart.hf, then transformers loads it",
    "native": "eckart.load() loads it",
    "kohya": "one file in the names that webui and ComfyUI take",
}
RANKED = ("peft", PLAIN, "factored", "kohya")  # forms that an approximation can have


def run(job: Job) -> dict[str, Any]:
    """Convert a source to a folder in another format. Returns the --json document."""
    begun, screen = time.monotonic(), Screen(quiet=job.flags.json)
    to = form_of(job)
    out = target_of(job, to)
    refuse_occupied(out.absolute(), job.flags.overwrite)
    require_writable(out.resolve().parent)
    source = open_source(job, to)
    screen.line("source", described(source), shown(str(job.model)))
    text = sample_of(job, source, screen)
    handle, approximation, rank = source.handle, None, job.convert.rank
    reason = inexact(source, to, rank)
    if reason:
        require_size(job, to, reason)
        approximation = approximated(job, source, to)
        rank = rank or rank_within(job, approximation, source, text)
        say_errors(screen, approximation, rank)
        handle = approximation.at(rank)
    assert handle is not None
    with write_folder(out, job.flags.overwrite) as beside:
        write(job, handle, to, beside, screen)
        drift = text.drift(reopened(beside), source.model) if text else None
        require_near(job, drift)
        size = sum(f.stat().st_size for f in beside.rglob("*"))
    kind = "exact" if approximation is None else "approximate"
    if to == "dense" and source.model.dtype != torch.float32:
        kind += f", rounded to {str(source.model.dtype).removeprefix('torch.')} as the base is"
    report(screen, to, out, drift, kind, task_of_live(source.model))
    return {
        "command": "convert",
        "exit": 0,
        "source": job.model,
        "to": to,
        "out": str(out),
        "exact": approximation is None,
        "rank": rank if approximation else None,
        "weight_error": approximation.errors(rank) if approximation and rank else {},
        "drift": drift,
        "bytes": size,
        "seconds": time.monotonic() - begun,
        "warnings": list(screen.warnings),
    }


# --- what is asked -------------------------------------------------------------------------


def form_of(job: Job) -> str:
    """The checked --to. UsageError without one, for an unknown one, or sizes it cannot use."""
    to = job.options.get("to")
    choices = "\n".join(f"  --to {name:<9} {what}" for name, what in FORMATS.items())
    if not to:
        raise UsageError("eckart convert needs --to", fix=f"Choices:\n{choices}")
    if to not in FORMATS:
        raise UsageError(
            f"no such form {to}     --to",
            fix=did_you_mean(to, list(FORMATS), f"Choices:\n{choices}"),
        )
    for key in ("rank", "max_drift"):
        value = getattr(job.convert, key)
        if value is not None and to not in RANKED:
            raise UsageError(
                f"{key} means nothing for --to {to}",
                [(f"{key} = {value}", "command line"), (f"--to {to}", "always exact")],
                f"Leave {key} out, or type --to lora.",
            )
    if job.convert.dtype != "auto" and to != "dense":
        raise UsageError(
            "dtype is for --to dense",
            [(f"dtype = {job.convert.dtype}", "command line")],
            "Leave it out: adapters keep the numbers they were trained in.",
        )
    return to


def target_of(job: Job, to: str) -> Path:
    """-o, or SOURCE's own name with the form behind it. UsageError for a file's name."""
    if job.out != OUT:
        out = Path(job.out)
        if out.suffix == ".safetensors":
            raise UsageError(
                "a folder is written, not one file",
                [(f"-o {job.out}", "is a file's name")],
                f"Type -o {out.with_suffix('')}; the tensors are then a file in it.",
            )
        return out
    source = Path(str(job.model))
    place = source.parent if source.exists() else Path()
    return place / f"{source.name}-{to}"


def open_source(job: Job, to: str) -> Opened:
    """Open the source with its terms, on the base that it names or that is given."""
    require_weights(job)
    source, base = str(job.model), job.convert.base
    found = recognise_result(source)
    if base and found.kind in ADAPTERS:
        opened = on_base(found, base)
    else:
        opened = open_model(source)
    if found.kind == "factored":
        opened = Opened(opened.model, handle_of(opened.model), str(found.path))
        if opened.handle and to in ("peft", PLAIN, "native", "kohya"):
            opened = on_its_base(opened, opened.handle, base)
    opened.model.to(prepare.device()).eval()
    return opened


def on_its_base(source: Opened, handle: Handle, base: str | None) -> Opened:
    """A factored model as an adapter on the given base, since its folder names none.

    Raises UsageError where none is given or it has none, FileError where it is another one.
    """
    if handle.weights.base == "dropped":
        raise UsageError(
            "a compressed model is no adapter",
            [(source.base, f"{handle.weights.slug}: its matrices are gone")],
            "Type --to dense or --to factored.",
        )
    if base is None:
        raise UsageError(
            "a factored model does not name its base",
            [(source.base, f"{handle.weights.slug} on a base")],
            "Type base=BASE with the model that it was made from.",
        )
    found = fingerprint(load_model(base))
    if found != handle.fingerprint:
        raise FileError(
            "this is another base",
            [
                (base, f"fingerprint {found[:12]}"),
                (source.base, f"made on {handle.fingerprint[:12]}"),
            ],
            "Type base=BASE with the model that it was made from.",
        )
    model: Any = handle.model
    model.config._name_or_path = base  # the base named by the adapter
    return Opened(model, handle, base)


def described(source: Opened) -> str:
    """`lora on m; 14 matrices`, or the size of the model."""
    if source.handle is None:
        return f"a model of {amount(sum(p.numel() for p in source.model.parameters()))} parameters"
    terms = source.handle.attached
    on = f" on {shown(source.base)}" if source.handle.weights.base == "frozen" else ""
    return f"{source.handle.weights.slug}{on}; {len(terms)} matrices"


def sample_of(job: Job, source: Opened, screen: Screen) -> Sample | None:
    """The data to measure drift on; None, with a line printed, if there is none for the model."""
    task = task_of_live(source.model)
    given = modality.entries(job) if job.data.train else ()
    try:
        reader = modality.beside(str(job.model), task)
        if TASKS[task].sees == "images":
            if given:
                return of_images(reader, given)
            raise UsageError("no images to measure the drift on", fix="Type data=IMAGES")
    except EckartError as fault:
        if job.convert.max_drift is not None:
            raise
        lacking = "no images" if TASKS[task].sees == "images" else "no tokenizer beside the model"
        screen.warn(f"{lacking}: the drift is not measured{advice(fault)}")
        return None
    modality.require_tokens(reader, source.model)
    return of_text(reader, modality.context_of(source.model), given, task)


def advice(fault: EckartError) -> str:
    """`; type data=IMAGES`, as the end of an error's advice."""
    return f"; {fault.fix[0].lower()}{fault.fix[1:]}" if fault.fix else ""


# --- exact, or how far from it -------------------------------------------------------------


def inexact(source: Opened, to: str, rank: int | None) -> str | None:
    """The reason why the format cannot hold the same function (at this rank); None if it can."""
    handle = source.handle
    if handle is None:
        if to in ("dense", "native"):
            what = "is one already" if to == "dense" else "is no adapter"
            raise UsageError(
                f"there is nothing to convert to {to}",
                [(source.base, f"an ordinary model {what}")],
                "An adapter from a difference: --to lora base=BASE rank=16",
            )
        return "it is an ordinary model, with whole matrices"
    form = "peft" if to == PLAIN else to
    reason = reasons(handle)[form]
    if reason is None and (to == PLAIN or (to in ("peft", "kohya") and rank is not None)):
        largest = largest_rank(handle)
        if largest is None:
            reason = f"{handle.weights.slug} is no product of two thin matrices"
        elif rank is not None and largest > rank:
            reason = f"its rank is {largest}"
    if reason and to not in RANKED:
        raise UsageError(
            f"this cannot be written as {to}",
            [(handle.weights.slug, reason)],
            "Type --to native, which is exact for every method.",
        )
    if reason and to == "factored":
        raise UsageError("this cannot be written as factored", [(handle.weights.slug, reason)])
    return reason


def largest_rank(handle: Handle) -> int | None:
    """The largest rank of the sites' exact factors; None if a site has none."""
    ranks = []
    for by_name in handle.parts().values():
        pair = joint_factors(by_name.values())
        if pair is None:
            return None
        ranks.append(pair[1].shape[-2])
    return max(ranks, default=0)


def require_size(job: Job, to: str, reason: str) -> None:
    """Raise UsageError for an approximation without rank and max_drift."""
    if job.convert.rank is None and job.convert.max_drift is None:
        raise UsageError(
            f"--to {to} has no exact form here",
            [(str(job.model), reason)],
            "Type rank=16 for an approximation of that rank, or max_drift=0.01 for the smallest\n"
            "rank whose words are within 0.01 nats a token.",
        )


def approximated(job: Job, source: Opened, to: str) -> Approximation:
    """The function that approximates the source at a given rank, for this format."""
    if to == "factored":
        return of_model(lambda: load_model(str(job.model)).to(prepare.device()).eval())
    base = job.convert.base or (source.base if source.handle else None)
    if base is None:
        raise UsageError(
            "an adapter is a difference from a base",
            [(str(job.model), "an ordinary model, which names none")],
            "Type base=BASE with the model that it was made from.",
        )
    task, head = task_of_live(source.model), {}
    if TASKS[task].classes and own_task(base) != task:  # the head is copied from the source
        head = {"task": task, **naming(names_of(source.model))}
    model: Any = load_model(base, **head)
    mine, theirs = type(source.model).__name__, type(model).__name__
    if mine != theirs or model.config.hidden_size != source.model.config.hidden_size:
        raise FileError(
            "these two are not one architecture",
            [(str(job.model), mine), (base, theirs)],
            "Type base=BASE with the model that it was made from.",
        )
    whole = source.handle.also_train if source.handle else outside(model) if head else ()
    return of_update(source.model, source.handle, model.to(prepare.device()).eval(), whole)


def rank_within(job: Job, found: Approximation, source: Opened, text: Sample | None) -> int:
    """The smallest rank with a drift of at most max_drift. UsageError if there is none."""
    assert text is not None and job.convert.max_drift is not None
    allowed, last = job.convert.max_drift, 0.0

    def good(rank: int) -> bool:
        nonlocal last
        last = text.drift(found.at(rank).model, source.model)["kl"]
        return bool(last <= allowed)

    rank = smallest_rank(good, found.most)
    if rank is None:
        left = [(name, "changed, and no matrix") for name in found.left[:3]]
        raise UsageError(
            "no rank is within max_drift",
            [(f"max_drift = {allowed:g}", f"{last:.3g} at the largest, {found.most}"), *left],
            "Type --to native or --to dense, which are exact.",
        )
    return rank


def require_near(job: Job, drift: dict[str, Any] | None) -> None:
    """Raise UsageError if the written model drifts more than allowed."""
    allowed = job.convert.max_drift
    if drift and allowed is not None and drift["kl"] > allowed:
        raise UsageError(
            "the drift is larger than allowed",
            [(f"rank = {job.convert.rank}", f"KL {drift['kl']:.3g} nats a token"),
             (f"max_drift = {allowed:g}", "command line")],
            "Type a larger rank, or leave rank out: the smallest that fits is found.",
        )  # fmt: skip


# --- writing and saying --------------------------------------------------------------------


def write(job: Job, handle: Handle, to: str, folder: Path, screen: Screen) -> None:
    """Write the handle in the format, with its tokenizer or preprocessing; print warnings."""
    try:
        reader = modality.beside(str(job.model), task_of_live(handle.model))
    except EckartError:
        reader = None
    options: dict[str, Any] = {}
    if to == "dense" and job.convert.dtype != "auto":
        options["dtype"] = getattr(torch, job.convert.dtype)
    if to == PLAIN:
        options["uniform"] = True
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        export(handle, folder, "peft" if to == PLAIN else to, tokenizer=reader, **options)
    for warning in caught:
        if "rounding" in str(warning.message):
            what = str(warning.message).partition(":")[0]
            screen.warn(f"{what}; type dtype=float32, or --to peft")


def reopened(folder: Path) -> Any:
    """Load the written model as a user would."""
    model: nn.Module = open_model(folder).model
    return model.to(prepare.device()).eval()


def say_errors(screen: Screen, found: Approximation, rank: int) -> None:
    """Print the relative error of the approximation for each role."""
    if found.left:
        screen.warn(f"{len(found.left)} more tensors have changed and stay as in the base:")
        screen.line("", ", ".join(found.left[:5]) + (", ..." if len(found.left) > 5 else ""))
    screen.line("rank", f"relative error of the {found.of}, by role", f"{rank}")
    rows = found.by_role(rank)
    width = max(len(role) for role in rows)
    for role, (middle, worst, path) in sorted(rows.items()):
        screen.line("", f"{role:<{width}}   {middle:.3f}   at most {worst:.3f} at {path}")


def report(
    screen: Screen, to: str, out: Path, drift: dict[str, Any] | None, kind: str, task: str
) -> None:
    """Print the last lines: the drift, the format, and the command to type next."""
    if drift:
        unit, units = ("class", "classes") if drift["of_classes"] else ("token", "tokens")
        near = f"KL {drift['kl']:.2g} nats a {unit}; the same first choice at "
        near += f"{100 * drift['same_first_choice']:.1f} % of {drift['tokens']:,} {units}"
        screen.line("drift", f"{near} ({drift['text']})", result=True)
    screen.line("done", f"{kind}; {to}: {FORMATS[to]}", shown(str(out)), result=True)
    screen.line("next", asking(str(out), task), result=True)
