"""The model families that vapr trains, one file each. :mod:`vapr.families.family` says what such a file holds."""

from vapr.families.family import Family
from vapr.families.gemma3 import Gemma3
from vapr.families.llava import Llava
from vapr.families.qwen2_5_vl import Qwen2_5_VL
from vapr.families.qwen2_vl import Qwen2VL

FAMILIES: dict[str, Family] = {family.model_type: family for family in (Llava(), Qwen2VL(), Qwen2_5_VL(), Gemma3())}
"""By the ``model_type`` of config.json."""
