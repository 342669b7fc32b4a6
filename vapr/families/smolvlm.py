"""SmolVLM and SmolVLM2: Idefics3 with smaller parts (arXiv 2504.05299). Pictures only, no video."""

from vapr.families.family import ModelFiles
from vapr.families.idefics3 import Idefics3


class SmolVLM(Idefics3):
    """SmolVLM2."""

    model_type = "smolvlm"
    architecture = "SmolVLMForConditionalGeneration"
    image_processor = "SmolVLMImageProcessor"

    def marks(self, files: ModelFiles) -> tuple[str, str]:
        """Return the tokenizer's own marks, if it names some."""
        names = ("fake_image_token", "global_image_token")
        around, whole = (
            str(getattr(files.tokenizer, name, usual))
            for name, usual in zip(names, super().marks(files), strict=True)
        )  # fmt: skip
        return around, whole
