"""A fake CUDA device: finds operations that mix devices or sync, on a machine without a GPU.

`Accelerator` computes on the CPU. Tensors made on the fake device, or from tensors on it, report
`cuda:0`, as do their views. It records the calling line of each operation that mixes CPU and
device tensors, which a real device refuses, and of each that waits for the device.
"""

import traceback
from collections import Counter
from collections.abc import Iterator
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

DEVICE, HOST = torch.device("cuda", 0), torch.device("cpu")
CROSSING = {
    "_has_compatible_shallow_copy_type",
    "copy_",
    "_foreach_copy_",
    "__getitem__",
    "__setitem__",
    "index_put_",
}  # allowed to
WAITING = {"tolist", "item", "numpy", "equal", "allclose", "is_nonzero", "nonzero",
           "__bool__", "__float__", "__int__", "__index__"}  # fmt: skip


class Accelerator(TorchFunctionMode):
    """The fake device, active within `with`; `put` moves a tensor to it."""

    def __init__(self) -> None:
        super().__init__()
        self.there = WeakTensorKeyDictionary()
        self.mixed: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def put(self, *tensors: Tensor) -> None:
        for t in tensors:
            self.there[t] = True

    def __enter__(self) -> "Accelerator":
        through = Tensor._make_subclass  # of a Parameter, which no mode is told of

        @wraps(through)
        def labelled(cls: type, data: Tensor, *args: Any) -> Tensor:
            made = through(cls, data, *args)
            self.put(*[made] if data in self.there else ())
            return made

        self.patch = patch.object(Tensor, "_make_subclass", labelled)
        self.patch.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patch.stop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return DEVICE if args[0] in self.there else HOST
        if func == Tensor.is_cpu.__get__:
            return args[0] not in self.there
        if func == Tensor.is_cuda.__get__:
            return args[0] in self.there
        name = func.__name__
        if name in ("to", "cpu"):
            return self.moved(name, *args, **kwargs)
        if kwargs.get("device") is not None and name != "_parse_to":
            on_device = torch.device(kwargs["device"]).type == DEVICE.type
            made = func(*args, **kwargs | {"device": HOST})
            self.put(*tensors_in(made) if on_device else ())
            return made
        given = list(tensors_in((args, kwargs)))
        if not any(t in self.there for t in given):
            return func(*args, **kwargs)
        places = {t in self.there for t in given if t.dim()}  # single numbers go anywhere
        if len(places) > 1 and name not in CROSSING and func != Tensor.data.__set__:
            self.mixed[f"{name} in {caller()}"] += 1
        if name in WAITING:
            self.waits[f"{name} in {caller()}"] += 1
        if func == Tensor.data.__set__ and args[1] not in self.there:
            self.there.pop(args[0], None)
            return func(*args)
        found = func(*args, **kwargs)
        self.put(*tensors_in(args[:1] if found is None else found))
        return found

    def moved(self, name: str, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The result of `to` or `cpu`: a copy if the device changes."""
        args = [kwargs.pop("device", None), *args]
        places = [torch.device(a).type == "cuda" for a in args if isinstance(a, str | torch.device)]
        places += [a in self.there for a in args if isinstance(a, Tensor)]
        dtypes = [a for a in args if isinstance(a, torch.dtype)]
        dtypes += [a.dtype for a in args if isinstance(a, Tensor)]
        dtype = kwargs.pop("dtype", None) or (dtypes or [t.dtype])[0]
        was = t in self.there
        now = name == "to" and (places[0] if places else was)
        if was and not now:
            self.waits[f"{name} in {caller()}"] += 1
        made = Tensor.to(t, dtype, copy=was != now or bool(kwargs.get("copy")))
        self.put(*[made] if now else ())
        return made


def tensors_in(found: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, dict):
        yield from tensors_in(list(found.values()))
    elif isinstance(found, list | tuple):
        for one in found:
            yield from tensors_in(one)


def caller() -> str:
    """The innermost line of the call stack that is in this repository."""
    frames = [f for f in traceback.extract_stack() if "/src/eckart/" in f.filename]
    return f"{frames[-1].filename.split('/src/')[1]}:{frames[-1].lineno}" if frames else "others"
