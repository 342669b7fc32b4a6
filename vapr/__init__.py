"""vapr: align vision-language models with preference pairs, packed and exact.

What a notebook needs is here: ``read_pairs``, ``Config``, ``load_policy``, ``Processor``, ``pack`` and ``train``. Each
loads what it needs when it is first used, so that importing vapr takes no time.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vapr.batches.packing import pack as pack
    from vapr.batches.tokenize import Processor as Processor
    from vapr.config import Config as Config
    from vapr.data.sources import read_pairs as read_pairs
    from vapr.errors import UserError as UserError
    from vapr.model.policy import load_policy as load_policy
    from vapr.training.trainer import train as train

__version__ = "0.1.0"

# peft imports bitsandbytes where it is installed, which then warns of a kernel in 4 bits that nothing here calls.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_HOMES = {
    "Config": "vapr.config",
    "UserError": "vapr.errors",
    "load_policy": "vapr.model.policy",
    "pack": "vapr.batches.packing",
    "read_pairs": "vapr.data.sources",
    "Processor": "vapr.batches.tokenize",
    "train": "vapr.training.trainer",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'vapr' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*_HOMES, "__version__"])
