"""Operations of a preference-training step. Each has a naive twin of the same name in ``vapr_kernels.naive``."""

from vapr_kernels.gather_rows import gather_rows
from vapr_kernels.linear_logps import linear_logps, linear_logps_and_stats

__all__ = ["gather_rows", "linear_logps", "linear_logps_and_stats"]
