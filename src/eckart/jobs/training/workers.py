"""Set-up of a process before its large imports: warnings silenced, worker tied to its parent."""

from __future__ import annotations

import logging
import os
import threading
import time

# transformers imports torchao if installed, which warns about kernels of other hardware.
NOISY = ("torchao", "torch.utils._pytree")


def hush() -> None:
    """Silence library warnings that users cannot act on."""
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)


def begin(parent: int) -> None:
    """Set up a worker: silence warnings, and exit when its parent process is gone."""
    hush()
    follow(parent)


def follow(parent: int) -> None:
    """Exit this process when the process with this id is no longer its parent."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
