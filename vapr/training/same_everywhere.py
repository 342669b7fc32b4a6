"""All processes of a run must run the same: checked once, before anything is opened."""

from vapr.config import Config
from vapr.errors import UserError
from vapr.training.ranks import Ranks
from vapr.training.run_dir import flat, library_versions


def check_same_everywhere(config: Config, ranks: Ranks) -> None:
    """Raise UserError on every rank if one has other versions of libraries, or another config, than the first."""
    versions = {name: version or "not installed" for name, version in library_versions().items()}
    everyone = ranks.gather_objects({**versions, **{f"{key}:": value for key, value in flat(config.as_dict()).items()}})
    for rank, found in enumerate(everyone):
        for name in {**everyone[0], **found}:
            there, here = found.get(name), everyone[0].get(name)
            if there != here:
                ranks.agreed = True
                raise UserError(
                    f"rank {rank} has {name} {there}, rank 0 {here}; start every process from the same environment and "
                    "config"
                )
