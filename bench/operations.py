"""Every operation against its peers in one process, so that CUDA starts once and ceilings are measured beside them.

python -m bench.operations --quick

Options go to each of them (see ``python -m bench.linear_logps --help``); one that breaks does not keep the others from
being measured.
"""

import importlib
import sys
import traceback

import torch

from bench import microbench

OPERATIONS = (
    "linear_logps",
    "add_rms_norm",
    "swiglu",
    "rotary",
    "gather_keys_values",
    "preference_loss",
    "lora_linear",
    "normed_linears",
    "gated_mlp",
    "normed_attention",
    "causal_attention",
)
ON_CPUS_ALONE = ("causal_attention",)


def operations_here() -> list[str]:
    """Return the operations that run on this machine's device."""
    return [name for name in OPERATIONS if not (torch.cuda.is_available() and name in ON_CPUS_ALONE)]


def main() -> None:
    broken = []
    for name in operations_here():
        op = importlib.import_module(f"bench.{name}").OP
        # Compiling a peer for every case takes longer than all that is measured.
        providers = [provider for provider in op.providers if "compile" not in provider]
        try:
            microbench.main(op, [*sys.argv[1:], "--providers", *providers])
        except SystemExit as ended:
            if ended.code == 2:  # a mistake in the options
                raise
            broken.append(name)
        except microbench.FAILURES:
            traceback.print_exc()
            broken.append(name)
    if broken:
        sys.exit(f"bench.operations: {', '.join(broken)} broke")


if __name__ == "__main__":
    main()
