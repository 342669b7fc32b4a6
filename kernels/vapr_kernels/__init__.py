"""Operations of a preference-training step. Each has a naive twin of the same name in ``vapr_kernels.naive``."""

from vapr_kernels.add_rms_norm import add_rms_norm, rms_norm
from vapr_kernels.causal_attention import causal_attention
from vapr_kernels.gated_mlp import gated_mlp
from vapr_kernels.gather_keys_values import gather_keys_values
from vapr_kernels.gather_rows import gather_rows
from vapr_kernels.linear_logps import linear_logps
from vapr_kernels.lora_linear import lora_linear
from vapr_kernels.normed_attention import normed_attention
from vapr_kernels.normed_linears import normed_linears
from vapr_kernels.preference_loss import preference_loss
from vapr_kernels.rotary import rotary
from vapr_kernels.swiglu import swiglu

__all__ = [
    "add_rms_norm",
    "causal_attention",
    "gated_mlp",
    "gather_keys_values",
    "gather_rows",
    "linear_logps",
    "lora_linear",
    "normed_attention",
    "normed_linears",
    "preference_loss",
    "rms_norm",
    "rotary",
    "swiglu",
]
