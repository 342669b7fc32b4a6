"""Find the pictures that questions are about, for the page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vapr.data.images import read_image
from vapr.errors import UserError
from vapr.evaluation.compare.folders import ResultFolder
from vapr.evaluation.readers.open import open_benchmark
from vapr.evaluation.scoring.prediction import Prediction
from vapr.pages.page import thumbnail

SIDE = 240
"""Longest side of a picture on the page, in pixels."""

MOST = 4
"""Pictures of a question that are shown."""

Source = Path | bytes


class Pictures:
    """Looks for pictures: in the benchmark's own files as ``evaluation.json`` names them, then where ``meta`` says."""

    def __init__(self, folders: Sequence[ResultFolder]) -> None:
        self._folders = folders
        self._of_files: dict[str, Mapping[str, tuple[Source, ...]]] = {}
        self._problems: dict[str, str] = {}
        self._missing: dict[str, int] = {}

    def of(self, prediction: Prediction) -> list[str]:
        """Return a question's pictures as ``data:`` URIs, the first :data:`MOST` of them; none is counted."""
        sources = self._files(prediction.benchmark).get(prediction.id) or self._named(prediction)
        shown, problem = [], ""
        for source in sources[:MOST]:
            try:
                shown.append(thumbnail(read_image(source), SIDE))
            except UserError as error:
                problem = str(error)
        if not shown:
            name = prediction.benchmark
            self._missing[name] = self._missing.get(name, 0) + 1
            self._problems.setdefault(name, problem or f"evaluation.json names no files of {name}, and meta no file")
        return shown

    def notes(self) -> list[str]:
        """Return a line for each benchmark some of whose pictures were not found."""
        return [
            f"{count:,} questions of {name} are shown without a picture: {self._problems[name]}"
            for name, count in self._missing.items()
        ]

    def _files(self, name: str) -> Mapping[str, tuple[Source, ...]]:
        """Return the pictures of a benchmark's questions by id; nothing if its files cannot be read any more."""
        if name not in self._of_files:
            self._of_files[name] = {}
            for given in self._given(name):
                try:
                    _, questions = open_benchmark(given)
                except UserError as error:
                    self._problems[name] = str(error)
                    continue
                self._problems.pop(name, None)
                self._of_files[name] = {question.id: question.images for question in questions or []}
                break
        return self._of_files[name]

    def _given(self, name: str) -> list[str]:
        """Return where the benchmark's files were when questions were asked, as NAME=PATH, without repetition."""
        given = [folder.asked(name).get("given") for folder in self._folders]
        return list(dict.fromkeys(one for one in given if isinstance(one, str)))

    def _named(self, prediction: Prediction) -> tuple[Source, ...]:
        """Return the files that ``meta`` names, from here or from a result folder."""
        named: Any = prediction.meta.get("images") or prediction.meta.get("image")
        found = []
        for name in named if isinstance(named, list) else [named]:
            places = [Path(), *(folder.path for folder in self._folders)] if isinstance(name, str) and name else []
            found += [at for at in (place / name for place in places) if _is_file(at)][:1]
        return tuple(found)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False
