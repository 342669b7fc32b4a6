"""The ``loss`` section of a run's config: kinds of loss, their options, and the second image that some compare with."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic.dataclasses import dataclass

from vapr.config_file import SECTION, Number, WholeNumber
from vapr.config_mistakes import fields_of

LossKind = Literal[
    "sigmoid", "robust", "hinge", "ipo", "bco_pair", "apo_zero", "apo_down", "simpo", "orpo", "dpop", "sft", "anchor",
    "image", "symmetric",
]  # fmt: skip
REFERENCE_FREE = ("simpo", "orpo", "sft")
OPTIONS_OF_KINDS = {
    "label_smoothing": ("sigmoid", "robust", "simpo"),
    "gamma": ("simpo",),
    "dpop_lambda": ("dpop",),
    "delta": ("anchor", "symmetric"),
    "consistency": ("symmetric",),
    "second_image": ("image",),
}
OPTIONS_OF_IMAGES = {"area": ("crop", "mask"), "steps": ("noise",)}


@dataclass(frozen=True, kw_only=True, config=SECTION)
class TokenWeights:
    """Weights of a completion's tokens inside its log-prob (DDPO, arXiv 2312.00849)."""

    changed: Number = Field(default=1.0, ge=0)
    """Weight of the tokens inside an edit span."""
    unchanged: Number = Field(default=1.0, ge=0)
    """Weight of all other tokens."""

    @model_validator(mode="after")
    def _learn_something(self) -> Self:
        if self.changed == 0 and self.unchanged == 0:
            raise ValueError("loss.token_weights are both 0; nothing would be learned")
        return self


Share = Annotated[Number, Field(gt=0, le=1)]


@dataclass(frozen=True, kw_only=True, config=SECTION)
class SecondImageConfig:
    """The second image of the loss ``image``: a changed copy of each image of a row, or another. It depends on ``seed``
    and the row's id alone, so that a row has the same one in every epoch, on every rank and in a resumed run."""

    make: Literal["crop", "noise", "mask", "black", "retrieved", "given"] = "crop"
    """``crop``: a small part, enlarged; ``noise``: diffusion noise; ``mask``: black squares; ``black``: nothing but
    black; ``retrieved``: the image of another row; ``given``: the row's own ``rejected_images``."""
    area: tuple[Share, Share] | None = None
    """crop, mask: smallest and largest share of the picture's area that is left, or covered; null: [0.01, 0.2] of a
    crop, [0.3, 0.3] of a mask."""
    steps: WholeNumber = Field(default=500, ge=1, le=1000)
    """noise: steps of a diffusion of 1000 (VCD, arXiv 2311.16922); the more, the noisier."""

    @model_validator(mode="after")
    def _take_only_own_options(self) -> Self:
        for name, makes in OPTIONS_OF_IMAGES.items():
            if self.make not in makes and getattr(self, name) != fields_of(self)[name].default:
                raise ValueError(
                    f"loss.second_image.{name} means nothing to {self.make}; it belongs to {', '.join(makes)}"
                )
        if self.area is not None and self.area[0] > self.area[1]:
            raise ValueError(f"loss.second_image.area: the smallest share comes first, got {list(self.area)}")
        return self

    @property
    def areas(self) -> tuple[float, float]:
        """Return the smallest and the largest share of the area that a crop leaves, or a mask covers."""
        return self.area or ((0.3, 0.3) if self.make == "mask" else (0.01, 0.2))


@dataclass(frozen=True, kw_only=True, config=SECTION)
class LossConfig:
    """One loss. ``loss`` in the run config is one of these, or a list of them (their weighted sum)."""

    kind: Annotated[LossKind, BeforeValidator(lambda kind: "sigmoid" if kind == "dpo" else kind)] = "sigmoid"
    """``sigmoid`` is DPO, and ``dpo`` another name of it; ``sft`` learns the chosen completion alone. simpo, orpo and
    sft have no reference. ``anchor``, ``image`` and ``symmetric``: see docs/losses.md."""
    weight: Number = Field(default=1.0, ge=0)
    """Factor of this term in a list."""
    beta: Number = Field(default=0.1, gt=0)
    """Strength of the pull towards the reference. Larger stays closer. A row's ``beta`` replaces it for that pair."""
    margin_weight: Number = Field(default=0.0, ge=0)
    """Beta of a pair is multiplied by 1 + this times the row's ``margin`` (MM-DPO, arXiv 2502.10391)."""
    label_smoothing: Number = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of swapped pairs (sigmoid: cDPO; robust: its unbiased form; simpo)."""
    gamma: Number = Field(default=0.5, ge=0)
    """simpo: the margin that the length-normalised rewards are asked to keep."""
    dpop_lambda: Number = Field(default=5.0, ge=0)
    """dpop: weight of the penalty on a chosen log-prob below the reference's."""
    delta: Number = 0.0
    """anchor, symmetric: the reward that an anchored completion is asked to have."""
    consistency: Number = Field(default=1e-4, ge=0)
    """symmetric: weight of the squared difference of the two images' margins."""
    second_image: SecondImageConfig = SecondImageConfig()
    sft_weight: Number = Field(default=0.0, ge=0)
    """Adds this many times the ``sft`` loss of the chosen completion."""
    token_weights: TokenWeights = TokenWeights()

    @model_validator(mode="after")
    def _take_only_own_options(self) -> Self:
        for name, kinds in OPTIONS_OF_KINDS.items():
            if self.kind not in kinds and getattr(self, name) != fields_of(self)[name].default:
                raise ValueError(f"loss.{name} means nothing to {self.kind}; it belongs to {', '.join(kinds)}")
        if self.kind == "sft" and self.margin_weight:
            raise ValueError("loss.margin_weight means nothing to sft, which has no beta")
        return self

    @property
    def needs_reference(self) -> bool:
        return self.kind not in REFERENCE_FREE
