"""Everything that reads or writes files or the hub: models, adapters, data, run folders.

Names are imported lazily, so that opening a run folder imports neither transformers nor datasets.
"""

from importlib import import_module
from typing import Any

WHERE = {
    "folder": ("close_with_manifest", "manifest_holds", "write_folder", "write_json", "write_text"),
    "run": ("Run", "latest_checkpoint", "read_metrics"),
    "models": (
        "PRESETS",
        "Source",
        "build_model",
        "load_model",
        "load_tokenizer",
        "recognise",
    ),
    "images": ("ImageData", "read_images"),
    "shards": ("ShardWriter", "Shards"),
    "text": ("Collate", "Data", "Shuffled", "isolates_documents", "order", "read"),
    "corpora": ("bytes_tokenizer", "pydoc_prose", "stdlib_code", "train_tokenizer"),
}
__all__ = sorted(name for names in WHERE.values() for name in names)


def __getattr__(name: str) -> Any:
    for module, names in WHERE.items():
        if name in names:
            return getattr(import_module(f"eckart.io.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
