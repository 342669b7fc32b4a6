"""Turn gradients into weight updates: fp32 master weights, AdamW, the schedule, clipping.

The only file that is to know deepspeed; so far one process runs plain PyTorch.
"""

import math
import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from vapr.config import OptimConfig
from vapr.errors import UserError
from vapr.model.policy import Policy
from vapr.training.adamw_8bit import KEPT, new_optimizer, restore_state, state_tensors


class Engine:
    """Hold master weights and optimizer state of a policy and update it.

    Weights in bf16 get an fp32 master copy. Their gradients are moved to it in fp32 as soon as autograd has finished
    them, so that accumulating over micro-batches rounds nothing away and no bf16 gradients are kept.

    Args:
        policy: its trained parameters are updated in place.
        config: optimizer, schedule and clipping.
        num_steps: length of the schedule.
    """

    def __init__(self, policy: Policy, config: OptimConfig, num_steps: int) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("several processes (WORLD_SIZE > 1) are not supported yet; start one process")
        self.num_steps = num_steps
        self.num_updates = 0
        """Steps done, those without a pair included."""
        self._clip = config.clip
        self._weights = policy.trained_parameters()
        self.masters: dict[str, nn.Parameter] = {}
        for name, weight in self._weights.items():
            if weight.dtype == torch.float32:
                self.masters[name] = weight
                continue
            self.masters[name] = nn.Parameter(weight.detach().float())
            weight.register_post_accumulate_grad_hook(self._move_gradient(self.masters[name]))
        # As transformers does: no decay on norms and biases.
        groups = [
            {"params": [p for p in self.masters.values() if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in self.masters.values() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = new_optimizer([group for group in groups if group["params"]], config, policy.device)
        schedule = "constant_with_warmup" if config.schedule == "constant" else config.schedule
        scheduler = get_scheduler(schedule, self.optimizer, math.ceil(num_steps * config.warmup_ratio), num_steps)
        self._lr_factor = scheduler.lr_lambdas[0]  # a pure function of the update's number: no state to restore
        self._peak_lr = config.lr

    @staticmethod
    def _move_gradient(master: nn.Parameter) -> Any:
        def move(weight: Tensor) -> None:
            assert weight.grad is not None
            if master.grad is None:
                master.grad = weight.grad.float()
            else:
                master.grad += weight.grad
            weight.grad = None

        return move

    @property
    def lr(self) -> float:
        """Return the learning rate of the next update."""
        return self._peak_lr * self._lr_factor(self.num_updates)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``, a scalar, to the step's."""
        loss.backward()

    def gradient_norm(self) -> Tensor:
        """Clip the gradient and return its norm over all trained parameters before that, a scalar on the device."""
        limit = float("inf") if self._clip is None else self._clip
        return nn.utils.clip_grad_norm_(self.masters.values(), limit)

    def step(self) -> None:
        """Update the master weights, copy them to the model, clear the gradients, advance the schedule."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._copy_masters()
        self.num_updates += 1

    @torch.no_grad()
    def _copy_masters(self) -> None:
        """Round the master weights into the model's own."""
        for name, weight in self._weights.items():
            if weight is not self.masters[name]:
                weight.copy_(self.masters[name])

    def forget_gradients(self) -> None:
        """Drop the gradient of the step so far, of which a pass may have added only a part."""
        self.optimizer.zero_grad(set_to_none=True)
        for weight in self._weights.values():
            weight.grad = None

    def skip_step(self) -> None:
        """Advance the schedule without an update, for a step without pairs."""
        self.num_updates += 1

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return master weights in fp32 by name, and optimizer state by ``name.exp_avg`` and the like."""
        names = {id(master): name for name, master in self.masters.items()}
        moments = {
            f"{names[id(master)]}.{key}": value
            for master, state in self.optimizer.state.items()
            for key, value in state_tensors(state).items()
        }
        return {name: master.detach() for name, master in self.masters.items()}, moments

    @torch.no_grad()
    def load_state(self, masters: dict[str, Tensor], moments: dict[str, Tensor], num_updates: int) -> None:
        """Go back to where :meth:`state` was taken; tensors have the shapes of the weights and lie on any device.

        Raises:
            KeyError: if a trained parameter is not among ``masters``.
            ValueError: if the moments are those of another kind of AdamW.
        """
        for name, master in self.masters.items():
            master.copy_(masters[name])
            if state := {key: moments[f"{name}.{key}"] for key in KEPT if f"{name}.{key}" in moments}:
                restore_state(self.optimizer, master, state)
        self._copy_masters()
        self.num_updates = num_updates
