"""DeepSpeed's ZeRO: optimizer state, gradients or weights spread over the ranks. The one door to deepspeed.

DeepSpeed averages gradients over ranks, so losses are scaled by their number. Gradients travel and add up in fp32.
Where the norm is not finite, DeepSpeed skips the update and goes on; the caller sees the norm and stops.
"""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vapr.config import Config
from vapr.errors import UserError
from vapr.model.joint_layers import part
from vapr.model.policy import Policy
from vapr.training.adamw_8bit import new_optimizer
from vapr.training.engine import Engine, decay_groups, schedule
from vapr.training.ranks import Ranks
from vapr.training.zero_passes import Root, ZeroPasses

MOMENTS = ("exp_avg", "exp_avg_sq")

BUCKET = 5 * 10**7
"""Gradients, in numbers, that travel together. ZeRO 3 keeps a buffer of so many in fp32; DeepSpeed's own size of it is
ten times that."""

KEPT_WHOLE = 10**5
"""ZeRO 3 leaves weights of fewer elements on every rank: norms and biases are not worth a message each."""


class DeepSpeedEngine:
    """Update a policy whose state the ranks share; does what :class:`vapr.training.engine.Engine` does.

    Args:
        config: ``optim`` and ``parallel``.
        policy: its trained parameters are updated in place; under ZeRO 3 every rank keeps a part of each weight.
        num_steps: length of the schedule.
        ranks: the processes that train together.

    Attributes:
        policy: the same with passes that all ranks take part in; use it instead.

    Raises:
        UserError: if deepspeed is not installed.
    """

    is_sharded = True
    """Whether each rank holds a part of the state, not all of it."""

    def __init__(self, config: Config, policy: Policy, num_steps: int, ranks: Ranks) -> None:
        self.num_steps, self.ranks = num_steps, ranks
        self.num_updates = 0
        """Steps done, those without a pair included."""
        half = policy.dtype == torch.bfloat16
        self.stage: int = config.parallel.zero
        # At stage 1 DeepSpeed's optimizer for bf16 is another one, which adds packs up in bf16.
        self._stage = 2 if half and self.stage == 1 else self.stage
        self._offload = config.parallel.offload
        self._base = policy.base
        self._weights = policy.trained_parameters()
        self.shapes = {name: tuple(weight.shape) for name, weight in self._weights.items()}
        """Shapes of what is trained, by name."""
        if self._stage == 3:
            part(policy.decoder.layers)
        for weight in policy.base.parameters():
            weight.data = weight.data.contiguous()  # DeepSpeed copies rank 0's to all ranks
        optimizer = new_optimizer(decay_groups(self._weights.values(), config.optim), config.optim, policy.device)
        self._lr_factor, self._peak_lr = schedule(optimizer, config.optim, num_steps), config.optim.lr
        with _quiet():
            deepspeed = _open(ranks, timedelta(seconds=config.parallel.timeout))
            self._engine, *_ = deepspeed.initialize(
                model=Root(policy.base),
                optimizer=optimizer,
                dist_init_required=False,
                config=self._settings(config, half),
            )
        self._zero: Any = self._engine.optimizer
        self._make_moments(0.0)
        self.passes = ZeroPasses(policy, self._engine, ranks, self._stage)
        self.policy = self.passes.policy

    def _settings(self, config: Config, half: bool) -> dict[str, Any]:
        zero: dict[str, Any] = {
            "stage": self._stage,
            "overlap_comm": False,
            "reduce_bucket_size": min(BUCKET, sum(torch.Size(shape).numel() for shape in self.shapes.values())),
            "stage3_param_persistence_threshold": KEPT_WHOLE,
        }
        if config.parallel.offload != "none":
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        if config.parallel.offload == "all":
            zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": config.optim.clip or 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # PyTorch's AdamW runs fused on a CPU, and compiles nothing
            "bf16": {"enabled": half},
            "communication_data_type": "fp32",
            **({"data_types": {"grad_accum_dtype": "fp32"}} if half else {}),
            "zero_optimization": zero,
        }

    @property
    def checkpoint_bytes(self) -> int:
        """Return the size of a checkpoint, all ranks' shares: master weights and two moments, in fp32."""
        return 3 * 4 * sum(torch.Size(shape).numel() for shape in self.shapes.values())

    @property
    def in_words(self) -> str:
        """Describe how the processes work together."""
        spread = {1: "optimizer state", 2: "optimizer state and gradients", 3: "weights, gradients and optimizer state"}
        offloaded = {"none": "", "optimizer": "; optimizer state in host memory", "all": "; all of it in host memory"}
        line = f"DeepSpeed ZeRO {self.stage} spreads {spread[self._stage]}{offloaded[self._offload]}"
        return line if self._stage == self.stage else f"{line} (in bfloat16 stage 1 runs as 2)"

    @property
    def lr(self) -> float:
        """Return the learning rate of the next update."""
        return self._peak_lr * self._lr_factor(self.num_updates)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``, a scalar, to the step's, if it has one."""
        if loss.requires_grad:
            self.passes.backward(loss)

    def gradient_norm(self) -> Tensor:
        """Update the weights and return the gradient's norm before clipping; they stay as they are if it is not finite.

        DeepSpeed knows the norm only inside of its update, for which the host waits. :meth:`step` then counts it.
        """
        for group in self._zero.param_groups:
            group["lr"] = self.lr
        self._engine.set_gradient_accumulation_boundary(True)
        with self.ranks.naming_lost_rank():
            self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return torch.as_tensor(float("inf") if norm is None else float(norm))

    def step(self) -> None:
        """Advance the schedule after the update."""
        self.num_updates += 1

    def skip_step(self) -> None:
        """Advance the schedule without an update, for a step without pairs."""
        self.num_updates += 1

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return this rank's share of master weights and of optimizer state, whole tensors, fp32, on the host.

        All ranks call it: each tensor is put together on all of them and kept by one.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        masters: dict[str, Tensor] = {}
        moments: dict[str, Tensor] = {}
        loads = [0] * self.ranks.size
        steps = next(float(state["step"]) for state in self._zero.optimizer.state.values())
        with self.ranks.naming_lost_rank():
            for name, weight in self._weights.items():
                owner = loads.index(min(loads))
                loads[owner] += torch.Size(self.shapes[name]).numel()
                found = [
                    safe_get_full_fp32_param(weight),
                    *(safe_get_full_optimizer_state(weight, key) for key in MOMENTS),
                ]
                if owner != self.ranks.rank:
                    continue
                whole = [value.detach().to("cpu", torch.float32, copy=True).view(self.shapes[name]) for value in found]
                masters[name] = whole[0]
                moments |= {f"{name}.{key}": value for key, value in zip(MOMENTS, whole[1:], strict=True)}
                moments[f"{name}.step"] = torch.tensor(steps)
        return masters, moments

    @torch.no_grad()
    def load_state(self, masters: Mapping[str, Tensor], moments: Mapping[str, Tensor], num_updates: int) -> None:
        """Go back to where :meth:`state` was taken, by any engine on any number of ranks.

        Raises:
            KeyError: if a trained parameter is not among ``masters``.
        """
        steps = [float(moments[key]) for name in self._weights if (key := f"{name}.step") in moments]
        self._make_moments(max(steps, default=0.0))
        for name, weight in self._weights.items():
            self._put(weight, masters[name], None)
            for key in MOMENTS:
                found = moments.get(f"{name}.{key}")  # nothing where no pass has reached the parameter yet
                self._put(weight, torch.zeros(self.shapes[name]) if found is None else found, key)
        with self.ranks.naming_lost_rank():
            self._copy_masters()
        self.num_updates = num_updates

    def _make_moments(self, steps: float) -> None:
        """Make AdamW's state, at zero.

        AdamW does so itself in its first update, but then DeepSpeed 0.19 at stages 1 and 2 finds the state of the first
        group of parameters alone.
        """
        zero = self._zero
        flats = zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups
        for flat in flats:
            zero.optimizer.state[flat] = {
                "step": torch.tensor(steps, device=flat.device),
                **{key: torch.zeros_like(flat) for key in MOMENTS},
            }
        if self._stage < 3:
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()  # where safe_get_* and safe_set_* look

    def _put(self, weight: nn.Parameter, value: Tensor, key: str | None) -> None:
        """Keep this rank's part of a tensor: of the master weight, or of a moment."""
        from deepspeed import utils

        if self._stage < 3:
            if key is None:
                utils.safe_set_full_fp32_param(weight, value)
            else:
                utils.safe_set_full_optimizer_state(weight, value, key)
            return
        # DeepSpeed's own way at stage 3 fails where the size is no multiple of the number of ranks.
        size = weight.ds_tensor.ds_numel  # type: ignore[attr-defined]
        padded = nn.functional.pad(value.flatten(), (0, size * self.ranks.size - value.numel()))
        part = padded.narrow(0, size * self.ranks.rank, size)
        if key is None:
            utils.safe_set_local_fp32_param(weight, part)
        else:
            utils.safe_set_local_optimizer_state(weight, part, key)

    def _copy_masters(self) -> None:
        """Round the master weights into the model's own, on all ranks."""
        zero = self._zero
        if self._stage == 3:
            for number in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(number)
            return
        from deepspeed.runtime.utils import all_gather_dp_groups

        for number, masters in enumerate(zero.single_partition_of_fp32_groups):
            rank = dist.get_rank(zero.real_dp_process_group[number])
            zero.parallel_partitioned_bit16_groups[number][rank].data.copy_(masters.data)
        all_gather_dp_groups(
            groups_flat=zero.bit16_groups_flat,
            partitioned_param_groups=zero.parallel_partitioned_bit16_groups,
            dp_process_group=zero.real_dp_process_group,
            start_alignment_factor=zero.nccl_start_alignment_factor,
            allgather_bucket_size=zero.allgather_bucket_size,
        )

    @torch.no_grad()
    def whole_weights(self, policy: Policy) -> Mapping[str, Tensor]:
        """Return all weights by their names on rank 0, in host memory under ZeRO 3, and nothing on the others.

        All ranks call it: weights are put together one at a time.
        """
        if self._stage < 3:
            return policy.base.state_dict() if self.ranks.is_first else {}
        from deepspeed.runtime.zero import GatheredParameters

        parameters = dict(policy.base.named_parameters(remove_duplicate=False))
        whole: dict[str, Tensor] = {}
        copies: dict[int, Tensor] = {}  # tied weights are one tensor
        for name, value in policy.base.state_dict().items():
            weight = parameters.get(name)
            if weight is None:
                whole[name] = value
                continue
            if id(weight) not in copies:
                with self.ranks.naming_lost_rank(), GatheredParameters([weight]):
                    copies[id(weight)] = weight.detach().cpu().clone() if self.ranks.is_first else torch.empty(0)
            whole[name] = copies[id(weight)]
        return whole if self.ranks.is_first else {}


AnyEngine = Engine | DeepSpeedEngine


def _open(ranks: Ranks, timeout: timedelta) -> Any:
    """Import deepspeed and let it use the process group that is there."""
    try:
        import deepspeed
    except ImportError:
        raise UserError("parallel.engine: deepspeed is not installed; pip install 'vapr[scale]'") from None
    from deepspeed.utils import groups

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not torch.cuda.is_available():  # shared memory for CPU ranks would have to be compiled first
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.comm.comm.cdb = None  # that of an earlier run in this process
    groups._release_process_group_references()
    groups._WORLD_GROUP = dist.new_group(range(ranks.size), timeout=timeout)
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", auto_mpi_discovery=False)
    return deepspeed


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what DeepSpeed and the compilers that it tries print; errors are still raised."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(number) for number in (1, 2)]
    try:
        with Path(os.devnull).open("w") as nothing, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for number in (1, 2):
                os.dup2(nothing.fileno(), number)
            with contextlib.redirect_stdout(nothing):
                yield
    finally:
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)
