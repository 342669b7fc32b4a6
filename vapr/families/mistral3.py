"""Mistral Small 3.1 and later, and Ministral 3: Pixtral's tower, and a projector that merges squares of patches."""

from typing import Any

from torch import Tensor

from vapr.families.pixtral import Pixtral


class Mistral3(Pixtral):
    """Mistral3, whose language model is Mistral's or Ministral3's."""

    model_type = "mistral3"
    architecture = "Mistral3ForConditionalGeneration"

    def merged(self, config: Any) -> int:
        """Return the side of a square that becomes one token."""
        return int(config.spatial_merge_size)

    def projected(self, model: Any, features: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        """Tell the projector the sizes on the host: given a tensor, it would fetch each number from the device."""
        projected: Tensor = model.multi_modal_projector(features, sizes)
        return projected
