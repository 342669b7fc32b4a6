"""LLaVA-NeXT (1.6): LLaVA whose pictures are cut into tiles, with Vicuna, Mistral or Llama 3 (llava-vl.github.io)."""

from typing import Any

from vapr.families.any_resolution import AnyResolution
from vapr.families.family import ModelFiles


class LlavaNext(AnyResolution):
    """LLaVA-NeXT."""

    model_type = "llava_next"
    architecture = "LlavaNextForConditionalGeneration"
    image_processor = "LlavaNextImageProcessor"

    def wrong_settings(self, files: ModelFiles) -> dict[str, Any]:
        """Hold the rule of LlavaNextProcessor, for patches of a tile and a class token, against the model's features.

        One a patch and ``num_additional_image_tokens`` more, less one if the strategy is ``default``.
        """
        settings, patch_size = files.settings, files.config.vision_config.patch_size
        extra = settings.get("num_additional_image_tokens") or 0
        dropped = int(settings.get("vision_feature_select_strategy") == "default")
        wrong: dict[str, Any] = {}
        if settings.get("patch_size") != patch_size:
            wrong["patch_size"] = patch_size
        if extra != dropped:
            strategy = files.config.vision_feature_select_strategy
            wrong["num_additional_image_tokens"] = int(strategy == "default")
            wrong["vision_feature_select_strategy"] = strategy
        return wrong
