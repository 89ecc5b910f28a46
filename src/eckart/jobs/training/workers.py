"""What a process does first, before it imports anything large."""

from __future__ import annotations

import logging
import os
import threading
import time

# Where torchao is installed transformers loads it, and it warns of other machines' kernels.
NOISY = ("torchao", "torch.utils._pytree")


def hush() -> None:
    """Silence warnings of libraries that no user here can act on."""
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)


def begin(parent: int) -> None:
    """In a worker: keep quiet, and end when the program that started it is gone."""
    hush()
    follow(parent)


def follow(parent: int) -> None:
    """End when the process with this id is no longer the parent, killed perhaps."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
