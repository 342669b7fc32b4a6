"""Turn gradients into weight updates: fp32 master weights, AdamW, the schedule, clipping.

Every process holds all that is trained; several add their gradients up before each update.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from vapr.config import OptimConfig
from vapr.model.policy import Policy
from vapr.training.adamw_8bit import KEPT, moments_bytes, new_optimizer, restore_state, state_tensors, update
from vapr.training.ranks import Ranks


class Engine:
    """Hold master weights and optimizer state of a policy and update it.

    Weights in bf16 get an fp32 master copy. Their gradients are moved to it in fp32 as soon as autograd has finished
    them, so that accumulating over micro-batches rounds nothing away and no bf16 gradients are kept.

    From the first loss or gradient on that is not finite, no update changes anything. The device sees to that by
    itself, because the host, which ends the run, may hear of it a step later.

    Args:
        policy: its trained parameters are updated in place.
        config: optimizer, schedule and clipping.
        num_steps: length of the schedule.
        ranks: the processes that train together; None for this one alone.
    """

    is_sharded = False
    """Whether each rank holds a part of the state, not all of it."""

    def __init__(self, policy: Policy, config: OptimConfig, num_steps: int, ranks: Ranks | None = None) -> None:
        self.num_steps = num_steps
        self.ranks = ranks or Ranks()
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
        with torch.no_grad():
            self.ranks.copy_from_first(list(self.masters.values()))  # each drew its adapters' first weights itself
            self._copy_masters()
        self.optimizer = new_optimizer(decay_groups(self.masters.values(), config), config, policy.device)
        self._lr_factor = schedule(self.optimizer, config, num_steps)
        self._peak_lr = config.lr
        self._loss = torch.zeros((), device=policy.device)  # of the step so far
        self._spoiled = torch.zeros((), device=policy.device)  # 1 once something was not finite

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

    def whole_weights(self, policy: Policy) -> Mapping[str, Tensor]:
        """Return all weights of the policy by name, trained or not."""
        return policy.base.state_dict()

    @property
    def in_words(self) -> str:
        """Describe how the processes work together."""
        return "each holds the whole model; gradients are added up in fp32"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of what is trained, by name."""
        return {name: tuple(master.shape) for name, master in self.masters.items()}

    @property
    def lr(self) -> float:
        """Return the learning rate of the next update."""
        return self._peak_lr * self._lr_factor(self.num_updates)

    def backward(self, loss: Tensor) -> None:
        """Add ``loss``, a scalar, to the step's, and its gradient, if it has one."""
        self._loss += loss.detach()
        if loss.requires_grad:
            loss.backward()

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """Add the ranks' gradients up, clip the sum and return its norm before that, a scalar on the device."""
        self._add_up_gradients()
        limit = float("inf") if self._clip is None else self._clip
        norm = nn.utils.clip_grad_norm_(self.masters.values(), limit).to(self._loss.device)  # a step may have none
        self.ranks.add_up([self._loss])
        finite = torch.isfinite(norm.float() + self._loss)
        self._spoiled = torch.maximum(self._spoiled, 1 - finite.float())
        self._loss = torch.zeros_like(self._loss)
        return norm

    @torch.no_grad()
    def _add_up_gradients(self) -> None:
        """Sum gradients over the ranks; a parameter that no rank's pass reached keeps having none."""
        if self.ranks.size == 1:
            return
        has_gradient = [float(master.grad is not None) for master in self.masters.values()]
        reached: list[bool] = self.ranks.gather(has_gradient).max(axis=0).tolist()
        masters = [master for master, reaches in zip(self.masters.values(), reached, strict=True) if reaches]
        for master in masters:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        self.ranks.add_up([master.grad for master in masters if master.grad is not None])

    def step(self) -> None:
        """Update the master weights, copy them to the model, clear the gradients, advance the schedule."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        update(self.optimizer, self._spoiled)
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
        self._loss = torch.zeros_like(self._loss)
        for weight in self._weights.values():
            weight.grad = None

    def skip_step(self) -> None:
        """Advance the schedule without an update, for a step without pairs."""
        self.num_updates += 1

    @property
    def checkpoint_bytes(self) -> int:
        """Return the size of a checkpoint: master weights in fp32 and two moments."""
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        return sum(4 * size + moments_bytes(self.optimizer, size) for size in sizes)

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
    def load_state(self, masters: Mapping[str, Tensor], moments: Mapping[str, Tensor], num_updates: int) -> None:
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


def decay_groups(parameters: Iterable[nn.Parameter], config: OptimConfig) -> list[dict[str, Any]]:
    """Group parameters for AdamW. As in transformers, norms and biases do not decay."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def schedule(optimizer: torch.optim.Optimizer, config: OptimConfig, num_steps: int) -> Callable[[int], float]:
    """Return the learning rate's factor as a pure function of the update's number: there is no state to restore."""
    kind = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    scheduler = get_scheduler(kind, optimizer, math.ceil(num_steps * config.warmup_ratio), num_steps)
    return scheduler.lr_lambdas[0]
