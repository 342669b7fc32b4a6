"""Run passes that need all ranks: what one computes, the others take part in.

Under ZeRO 3 every pass gathers weights from all ranks, and under ZeRO 1 and 2 every backward pass sums gradients. Ranks
have different numbers of packs, though; one shows an image where another has text, one finds the reference in the cache
and another does not. So before a pass each rank says what it wants to compute. The kind that comes first is computed by
all: by those that did not ask for it with a tiny pair and weight 0, which then say again what they want. Whoever has
nothing left takes part until nobody has. An error between two passes is said in the same way, and ends all ranks.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from typing import Any, TypeVar

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from vapr.batches.packing import PackedBatch, pack
from vapr.batches.tokenize import TokenizedPair, TokenPath
from vapr.errors import UserError
from vapr.families import FAMILIES
from vapr.families.processed_image import ProcessedImage
from vapr.interrupts import Stopped
from vapr.model.logps import token_logps
from vapr.model.passes import Compute
from vapr.model.policy import Policy, frozen, image_features
from vapr.training.ranks import Ranks

Result = TypeVar("Result")


class Kind(IntEnum):
    """The kinds of work that a rank may want next. Of several the smallest comes first."""

    FAILED = 0
    FEATURES = 1
    ADAPTERS_OFF = 2
    NO_GRADIENT = 3
    TRAINED = 4
    """Forward and, right after it, backward."""
    DONE = 5


class _Failed(Exception):
    """Unwinds a rank because the work of one has failed."""


class ZeroPasses:
    """Runs the passes of a policy under DeepSpeed; see :class:`vapr.model.passes.Passes`.

    Args:
        policy: its modules are those of ``engine``.
        engine: DeepSpeed's, around the one module through whose forward everything passes.
        ranks: say what they want.
        stage: of ZeRO.

    Attributes:
        policy: the same, whose passes are these.
    """

    def __init__(self, policy: Policy, engine: Any, ranks: Ranks, stage: int) -> None:
        self._engine, self._ranks, self._stage = engine, ranks, stage
        self.policy = dataclasses.replace(policy, passes=self)
        self._pair = _tiny_pair().to(policy.device)
        self._image = _tiny_image(policy)
        layers = (module for module in policy.base.modules() if isinstance(module, BaseTunerLayer))
        self._adapter: Any = next(layers, None)
        self._passes_left = 0
        self._inside = False  # a pass in which the others wait for this rank
        self._following = self._anyone_shows = False
        self._is_last = True  # whether the backward pass in hand is the last on every rank

    def logps(self, compute: Compute, images: Sequence[ProcessedImage]) -> Tensor:
        """Compute log-probs as soon as all ranks do."""
        kind = Kind.NO_GRADIENT
        if torch.is_grad_enabled():
            kind = Kind.TRAINED
        elif self._adapter is not None and self._adapter.disable_adapters:
            kind = Kind.ADAPTERS_OFF
        return self._run(kind, compute, bool(images))

    def features(self, compute: Compute) -> Tensor:
        """Compute image features as soon as all ranks do."""
        with torch.no_grad():  # by themselves only where the tower is frozen
            return self._run(Kind.FEATURES, compute, shows=True)

    def together(
        self, work: Callable[[], Result], agree: Callable[[Callable[[], Result]], Result], passes: int = 0
    ) -> Result:
        """Do work on every rank, and take part in the others' passes until all have done theirs."""
        self._passes_left = passes
        problem: Any = None
        result: Any = None
        try:
            result = work()
            while self._agree_on(Kind.DONE)[0] != Kind.DONE:
                pass
        except _Failed:
            pass
        except (UserError, Stopped, torch.OutOfMemoryError) as error:
            if self._inside or self._ranks.lost:
                raise  # the others wait in the middle of a pass, and hear of it from the end of this process
            problem = error
            with contextlib.suppress(_Failed):
                self._say(Kind.FAILED, shows=False)
        else:
            return result
        finally:
            self._inside = False
        self._ranks.raise_first_of(problem)
        raise AssertionError("no rank has failed")

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass of the log-probs that were computed last, whose weights all ranks gather again."""
        self._inside = False
        self._say(Kind.TRAINED, shows=False)  # what failed since the forward pass is heard here
        self._inside = True
        self._engine.set_gradient_accumulation_boundary(self._is_last)
        with self._ranks.naming_lost_rank():
            # DeepSpeed divides the sum over ranks by their number, at stage 3 always.
            self._engine.backward(loss * self._ranks.size, scale_wrt_gas=False)
        self._inside = False

    def _run(self, kind: Kind, compute: Compute, shows: bool) -> Tensor:
        if self._following:  # another rank's pass
            return self._forward(compute, shows, anyone_shows=self._anyone_shows)
        if self._stage < 3 and kind != Kind.TRAINED:  # every rank has all weights
            return self._forward(compute, shows, anyone_shows=False)
        while True:
            chosen, anyone_shows = self._agree_on(kind, shows)
            if chosen == kind:
                break
        if kind == Kind.TRAINED:
            self._passes_left -= 1
        self._inside = True
        result = self._forward(compute, shows, anyone_shows)
        self._inside = False
        return result

    def _forward(self, compute: Compute, shows: bool, anyone_shows: bool) -> Tensor:
        spare = (self._image,) if anyone_shows and not shows else ()
        with self._ranks.naming_lost_rank():
            return self._engine(compute, spare)

    def _agree_on(self, kind: Kind, shows: bool = False) -> tuple[Kind, bool]:
        """Say what this rank wants; where the ranks choose another kind, take part in it."""
        chosen, anyone_shows = self._say(kind, shows)
        if chosen not in (kind, Kind.DONE):
            self._take_part(chosen, anyone_shows)
        return chosen, anyone_shows

    def _say(self, kind: Kind, shows: bool) -> tuple[Kind, bool]:
        everyone = self._ranks.gather([kind, shows, self._passes_left])
        chosen = Kind(int(everyone[:, 0].min()))
        if chosen == Kind.FAILED:
            raise _Failed
        self._is_last = not everyone[:, 2].any()
        # A trained tower gets a gradient in every pass, because ranks must have the same ones to add up.
        always = chosen == Kind.TRAINED and self.policy.vision_trained
        return chosen, always or bool((everyone[:, 1] * (everyone[:, 0] == chosen)).any())

    def _take_part(self, kind: Kind, anyone_shows: bool) -> None:
        """Run a pass of the kind with weight 0."""
        self._anyone_shows = anyone_shows
        policy = self.policy
        with self._follow():
            if kind == Kind.FEATURES:
                image_features(policy, (self._image,))
            elif kind == Kind.TRAINED:
                logps = token_logps(policy, self._pair)
                if logps.requires_grad:
                    self.backward(0.0 * logps.sum())
            else:
                off = policy.adapters_off() if kind == Kind.ADAPTERS_OFF else contextlib.nullcontext()
                with frozen(policy), off:
                    token_logps(policy, self._pair)

    @contextlib.contextmanager
    def _follow(self) -> Iterator[None]:
        training = self.policy.base.training
        self._following = self._inside = True
        try:
            yield
        finally:
            self._following = False
            self.policy.base.train(training)
        self._inside = False


class Root(nn.Module):
    """The one module through whose forward everything passes that reads weights: ZeRO 3 gathers them by hooks on it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, compute: Compute, spare: Sequence[ProcessedImage]) -> Tensor:
        return compute(spare)


def _tiny_pair() -> PackedBatch:
    """Return a pair of two tokens a path, without an image."""
    paths = tuple(
        TokenPath(
            input_ids=np.array([0, token], np.int64), position_ids=np.tile(np.arange(2), (3, 1)), completion_start=1,
            token_weights=np.ones(1, np.float32), images=(), image_runs=(),
        )
        for token in (1, 2)
    )  # fmt: skip
    return pack([TokenizedPair(id="", paths=paths, weight=1.0, where="")])


def _tiny_image(policy: Policy) -> ProcessedImage:
    """Return the smallest grey image that the tower takes."""
    return FAMILIES[policy.family].spare_image(policy.base.config)
