"""How benchmarks look in the files of other tools, by name of the benchmark. To add one, add its shapes here."""

from collections.abc import Callable, Mapping, Sequence

from vapr.evaluation.readers.shape import Row, Shape
from vapr.evaluation.readers.shapes import choice, judged, yes_no

SHAPES: dict[str, tuple[Shape, ...]] = {**yes_no.SHAPES, **choice.SHAPES, **judged.SHAPES}

LOG_IDS: Mapping[str, Sequence[str | Callable[[Row], str]]] = {**yes_no.LOG_IDS, **choice.LOG_IDS, **judged.LOG_IDS}
"""What a question may be called: templates or functions of what a log of lmms-eval tells about it."""

SPLIT_OF_TASK = {"pope_adv": "adversarial", "pope_pop": "popular", "pope_random": "random"}
"""Splits that lmms-eval tells only by the name of the task."""
