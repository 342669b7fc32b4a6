"""All processes of a run must run the same: checked once, before anything is opened."""

import hashlib
import json

from vapr.config import Config
from vapr.errors import UserError
from vapr.training.ranks import Ranks
from vapr.training.run_dir import library_versions


def check_same_everywhere(config: Config, ranks: Ranks) -> None:
    """Raise UserError on every rank if one has other versions of libraries, or another config, than the first."""
    text = json.dumps(config.as_dict(), sort_keys=True)
    mine = {**library_versions(), "config": hashlib.sha256(text.encode()).hexdigest()[:16]}
    everyone = ranks.gather_objects(mine)
    for rank, found in enumerate(everyone):
        for name, value in everyone[0].items():
            if found[name] != value:
                ranks.agreed = True
                raise UserError(
                    f"rank {rank} has {name} {found[name] or 'not installed'}, rank 0 {value or 'not installed'}; "
                    "start every process from the same environment and config"
                )
