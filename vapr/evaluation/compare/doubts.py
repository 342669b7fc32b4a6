"""What speaks against comparing result folders, although their questions are the same."""

from collections.abc import Mapping, Sequence
from typing import Any

from vapr.evaluation.compare.folders import ResultFolder
from vapr.evaluation.compare.shared import SharedSet


def doubts(
    shared_sets: Sequence[SharedSet], folders: Sequence[ResultFolder], benchmarks: Mapping[str, Any]
) -> list[str]:
    """Return a line on each: unfinished runs, other settings, other files, other judges."""
    return [
        *_unfinished(folders),
        *_other_settings(folders),
        *_other_files(shared_sets, folders),
        *_other_judges(benchmarks),
    ]


def _unfinished(folders: Sequence[ResultFolder]) -> list[str]:
    return [
        f"{folder.name} is not finished: what {', '.join(folder.unfinished)} holds is not compared; run vapr eval again"
        for folder in folders
        if folder.unfinished
    ]


def _other_settings(folders: Sequence[ResultFolder]) -> list[str]:
    """Return a line on each setting of generation that differs between folders; batches change no answer."""
    known = [folder for folder in folders if folder.settings]
    notes = []
    for key in dict.fromkeys(key for folder in known for key in folder.settings if key != "batch_size"):
        values = [folder.settings.get(key) for folder in known]
        if any(value != values[0] for value in values):
            named = ", ".join(f"{folder.name} {value}" for folder, value in zip(known, values, strict=True))
            notes.append(f"generated with another {key}: {named}")
    return notes


def _other_files(shared_sets: Sequence[SharedSet], folders: Sequence[ResultFolder]) -> list[str]:
    """Return a line on each benchmark whose files differ, although its questions and truths are the same."""
    notes = []
    for shared in shared_sets:
        known = [folder.asked(shared.name.benchmark).get("sha256") for folder in folders]
        hashes = {str(one) for one in known if one is not None}
        if len(hashes) > 1 and not any(shared.left_out):
            notes.append(
                f"{shared.name}: questions and truths are the same, but not its files (sha256 in evaluation.json); "
                "were its pictures scaled?"
            )
    return notes


def _other_judges(benchmarks: Mapping[str, Any]) -> list[str]:
    """Return a line on each benchmark that was not judged by one judge."""
    notes = []
    for name, part in benchmarks.items():
        judges = {model["name"]: model["stored"]["judge"] for model in part["models"] if model.get("stored")}
        if len(set(judges.values())) > 1:
            named = ", ".join(f"{model} by {judge or 'an unnamed one'}" for model, judge in judges.items())
            notes.append(f"{name}: stored scores of several judges do not compare: {named}")
    return notes
