"""The model families that vapr trains, one file each. :mod:`vapr.families.family` says what such a file holds."""

from typing import Any

from vapr.families.family import Family
from vapr.families.gemma3 import Gemma3
from vapr.families.idefics3 import Idefics3
from vapr.families.internvl import InternVL
from vapr.families.llava import Llava
from vapr.families.llava_next import LlavaNext
from vapr.families.llava_onevision import LlavaOnevision
from vapr.families.mistral3 import Mistral3
from vapr.families.pixtral import Pixtral
from vapr.families.qwen2_5_vl import Qwen2_5_VL
from vapr.families.qwen2_vl import Qwen2VL
from vapr.families.qwen3_vl import Qwen3VL, Qwen3VLMoe
from vapr.families.smolvlm import SmolVLM

LLAVA_PIXTRAL = "llava_pixtral"
"""The name of LLaVA with Pixtral's tower, to which config.json gives LLaVA's."""

FAMILIES: dict[str, Family] = {
    **{
        family.model_type: family
        for family in (
            Llava(),
            LlavaNext(),
            LlavaOnevision(),
            Qwen2VL(),
            Qwen2_5_VL(),
            Qwen3VL(),
            Qwen3VLMoe(),
            InternVL(),
            Idefics3(),
            SmolVLM(),
            Mistral3(),
            Gemma3(),
        )
    },
    LLAVA_PIXTRAL: Pixtral(),
}  # fmt: skip
"""By what :func:`family_name` returns."""


def family_name(config: Any) -> str:
    """Return the family that a model's config belongs to, which need not be known: its ``model_type``, but for one."""
    vision = getattr(config, "vision_config", None)
    if config.model_type == "llava" and getattr(vision, "model_type", "") == "pixtral":
        return LLAVA_PIXTRAL
    return str(config.model_type)
