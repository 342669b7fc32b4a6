"""The peers beside TRL: why there are no numbers of them."""

import importlib.util
from dataclasses import dataclass, field

from packaging.specifiers import SpecifierSet

from bench.record import record, version


@dataclass(frozen=True, slots=True)
class Peer:
    """A trainer of preferences as its newest release on PyPI describes itself."""

    name: str
    module: str
    wants: dict[str, str] = field(default_factory=dict)  # versions of packages, as its metadata has them
    needs_gpu: bool = False


PEERS = (
    Peer("LLaMA-Factory 0.9.5", "llamafactory", {"trl": "<=0.24.0,>=0.18.0", "transformers": "<=5.6.0,>=4.55.0"}),
    Peer("ms-swift 4.6.0", "swift", {"trl": "<1.0,>=0.15", "transformers": "<5.20.0,>=4.33"}),
    Peer("unsloth 2026.10.9", "unsloth", {"trl": "<=1.15.0,>=0.18.2", "transformers": "<=5.17.0,>=4.52.4"}, True),
    Peer("flash-pref 0.1.1", "flash_pref", {"transformers": "<4.52.0,>=4.49.0"}, True),
)


def why_absent(peer: Peer, installed: dict[str, str | None], *, on_gpu: bool) -> str:
    """In a few words: what keeps ``peer`` from running beside ``installed``, versions by package."""
    reasons = []
    if importlib.util.find_spec(peer.module) is None:
        reasons.append("not installed")
    for package, range_ in peer.wants.items():
        if (here := installed.get(package)) is not None and here not in SpecifierSet(range_, prereleases=True):
            reasons.append(f"wants {package} {range_}, here is {here}")
    if peer.needs_gpu and not on_gpu:
        reasons.append("needs a GPU")
    return "; ".join(reasons) or "installed, but this benchmark has no arm for it"


def record_absent_peers(*, on_gpu: bool) -> None:
    """Write a row for each peer and show it."""
    installed = {package: version(package) for package in ("trl", "transformers")}
    for peer in PEERS:
        reason = why_absent(peer, installed, on_gpu=on_gpu)
        record("train_step_peers", peer=peer.name, absent=reason)
        print(f"{peer.name}: {reason}", flush=True)
