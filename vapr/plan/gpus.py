"""GPUs by name, their memory, and how much of it a run can use."""

import difflib
from dataclasses import dataclass

import torch

from vapr.errors import UserError

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU and its memory as its vendor gives it."""

    name: str
    gib: float
    keeps_check_bits: bool = False
    """Whether a sixteenth of the memory holds check bits (ECC on GDDR memory, on where the card comes from)."""

    @property
    def usable_gib(self) -> float:
        """Return what PyTorch can hand out: without check bits, the driver's part, and the run's own libraries."""
        return self.shown_gib - LIBRARIES_GIB

    @property
    def shown_gib(self) -> float:
        """Return what PyTorch shows as the GPU's memory."""
        return self.gib * (15 / 16 if self.keeps_check_bits else 1) * (1 - DRIVER)


DRIVER = 0.02
"""Share of the memory that the driver keeps: torch shows 23.5 of 24 GiB, 79.1 of 80."""

LIBRARIES_GIB = 1.0
"""CUDA's context, workspaces of cuBLAS, and what PyTorch's allocator loses between blocks."""

GPUS = (
    Gpu("V100 16GB", 16), Gpu("T4", 16, True), Gpu("RTX 4080", 16), Gpu("RTX 3090", 24), Gpu("RTX 4090", 24),
    Gpu("A10G", 24, True), Gpu("A10", 24, True), Gpu("L4", 24, True), Gpu("RTX 5090", 32), Gpu("V100 32GB", 32),
    Gpu("A100 40GB", 40), Gpu("L40S", 48, True), Gpu("L40", 48, True), Gpu("A40", 48, True), Gpu("RTX A6000", 48),
    Gpu("RTX 6000 Ada", 48), Gpu("A100 80GB", 80), Gpu("H100", 80), Gpu("H200", 141), Gpu("B200", 180),
)  # fmt: skip
"""Memory in GiB as vendors name it (GB on their pages)."""

SHORT = {"V100": "V100 16GB", "A100": "A100 80GB", "A6000": "RTX A6000"}
"""The GPU that a name without a size means."""

SIZES = (16, 24, 32, 40, 48, 80, 141)
"""Memory sizes shown side by side where no GPU is named and none is here."""


def find_gpu(name: str) -> Gpu:
    """Return the GPU that a name means, whatever its case, spaces and vendor.

    Raises:
        UserError: with the nearest known name, if there is none.
    """
    known = {_plain(gpu.name): gpu for gpu in GPUS}
    known |= {_plain(short): known[_plain(long)] for short, long in SHORT.items()}
    for plain in (_plain(name), _plain(name).removesuffix("gb"), *_with_size(name)):
        if plain in known:
            return known[plain]
    nearest = difflib.get_close_matches(_plain(name), known, 1, 0.5)
    hint = f"did you mean {known[nearest[0]].name}? " if nearest else ""
    names = ", ".join(gpu.name for gpu in GPUS)
    raise UserError(f"--gpu {name}: no such GPU is known; {hint}known are {names}; or give --gpu-memory in GiB")


def _plain(name: str) -> str:
    name = name.lower()
    for word in ("nvidia", "tesla", "geforce", "sxm5", "sxm4", "sxm2", "sxm", "pcie", "hbm3e", "hbm3", "generation"):
        name = name.replace(word, "")
    plain = "".join(letter for letter in name if letter.isalnum())
    return plain.removeprefix("rtx") if plain.startswith("rtxa") else plain


def _with_size(name: str) -> list[str]:
    """Return names in which the size stands or does not stand: ``H100 80GB`` is the H100, ``4090`` the RTX 4090."""
    plain = _plain(name)
    return [f"rtx{plain}", *(plain.removesuffix(f"{size}gb") for size in (16, 24, 32, 40, 48, 80, 141, 180))]


def gpu_here() -> Gpu | None:
    """Return the GPU of this machine, with the memory that PyTorch shows; None: there is none."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return Gpu(properties.name, properties.total_memory / GIB / (1 - DRIVER))


def gpu_of_size(gib: float) -> Gpu:
    """Return a GPU of so much memory, as its vendor names it.

    Raises:
        UserError: if that is no amount of memory.
    """
    if not 0 < gib < 10_000:
        raise UserError(f"--gpu-memory {gib:g}: give the GPU's memory in GiB, such as 24")
    return Gpu(f"a GPU with {gib:g} GiB", gib)
