"""Pairs as tasks for people at Label Studio or Argilla: which of two answers, or of two pictures, is the right one?

Which side stands first is drawn by the pair's id, so that nobody learns that the first one is always right; the right
one is named where annotators do not look, for whoever counts afterwards.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

from vapr.cache import written_whole
from vapr.data.pair import Message, PreferencePair
from vapr.data.row_values import Row
from vapr.errors import BadRow

Asked = Literal["answers", "pictures"]
"""What people compare: two answers to one picture or, with ``rejected_images``, two pictures for one answer."""

Names = Callable[[tuple[Path | bytes, ...]], list[str]]

LABEL_STUDIO, ARGILLA = "label-studio", "argilla"
TOOLS = {LABEL_STUDIO: (".json",), ARGILLA: ("",)}
"""The tools, and how the name of what is written for them ends: a file of tasks, or a folder."""

QUESTION, NEITHER = "right", "neither"
"""What people are asked is called so in both tools; and an answer that is neither side."""

RECORDS = "records.json"
"""The file in Argilla's folder that holds the rows."""

HEADERS = {
    "answers": "Which answer is right for the picture?",
    "pictures": "For which picture is the answer right?",
}
GUIDELINES = {
    "answers": "Look at the picture and the question. One of the two answers is right, the other one says something "
    "that the picture does not show. Pick the right one.",
    "pictures": "Read the question and the answer. For one of the two pictures the answer is right, for the other one "
    "it is not. Pick the picture that it is right for.",
}


def asked_of(pair: PreferencePair) -> Asked:
    """Return what a pair lets people compare."""
    return "answers" if pair.rejected_images is None else "pictures"


@dataclass(frozen=True, slots=True)
class Sides:
    """The two things to compare, in the order in which people see them."""

    first: Any
    second: Any
    right: Literal["first", "second"]


def right_side(id: str) -> Literal["first", "second"]:
    """Draw by a pair's id where the right one of two stands."""
    return "second" if hashlib.sha256(id.encode(errors="surrogatepass")).digest()[0] % 2 else "first"


def _sides(pair: PreferencePair, chosen: Any, rejected: Any) -> Sides:
    right = right_side(pair.id)
    return Sides(chosen, rejected, right) if right == "first" else Sides(rejected, chosen, right)


def annotation_row(tool: str, asked: Asked, names: Names) -> Callable[[PreferencePair], Row]:
    """Return the function that makes a task of a pair; it raises BadRow for a pair that the layout has no place for.

    Args:
        tool: one of :data:`TOOLS`.
        asked: what the layout compares.
        names: says how the tool finds images.
    """

    def row(pair: PreferencePair) -> Row:
        if asked_of(pair) != asked:
            both = "two pictures" if asked == "pictures" else "two answers"
            raise BadRow(f"the first pair compares {both}, and {tool} has one layout for all; write those apart")
        if not pair.images:
            raise BadRow(f"{tool}'s layout shows a picture, and this pair has none")
        if len(pair.images) > 1 and (tool == ARGILLA or asked == "pictures"):
            raise BadRow(f"{tool}'s layout shows one picture here; this pair has {len(pair.images)}")
        return (_label_studio if tool == LABEL_STUDIO else _argilla)(pair, asked, names)

    return row


def _label_studio(pair: PreferencePair, asked: Asked, names: Names) -> Row:
    data: Row = {"id": pair.id, "prompt": _conversation(pair.prompt)}
    if asked == "answers":
        sides = _sides(pair, _conversation(pair.chosen), _conversation(pair.rejected))
        data["images"] = names(pair.images)
        data |= {"left": sides.first, "right": sides.second}
    else:
        sides = _sides(pair, names(pair.images)[0], names(pair.rejected_images or ())[0])
        data |= {"answer": _conversation(pair.chosen), "left": sides.first, "right": sides.second}
    if pair.category is not None:
        data["category"] = pair.category
    return {"data": data, "meta": {"chosen": "left" if sides.right == "first" else "right"}}


def _argilla(pair: PreferencePair, asked: Asked, names: Names) -> Row:
    fields: Row = {"prompt": _conversation(pair.prompt)}
    if asked == "answers":
        sides = _sides(pair, _conversation(pair.chosen), _conversation(pair.rejected))
        fields |= {"image": names(pair.images)[0], "answer_a": sides.first, "answer_b": sides.second}
    else:
        sides = _sides(pair, names(pair.images)[0], names(pair.rejected_images or ())[0])
        fields |= {"answer": _conversation(pair.chosen), "image_a": sides.first, "image_b": sides.second}
    metadata = {"chosen": "a" if sides.right == "first" else "b"}
    if pair.category is not None:
        metadata["category"] = pair.category
    return {"id": pair.id, "fields": fields, "metadata": metadata, "suggestions": {}, "responses": {}, "vectors": {}}


def _conversation(messages: Sequence[Message]) -> str:
    """Return the text of messages; of several, each after its role."""
    texts = [
        (message["role"], "".join(part.get("text", "") for part in message["content"]).strip()) for message in messages
    ]
    return texts[0][1] if len(texts) == 1 else "\n\n".join(f"{role}: {text}" for role, text in texts)


# What the tools want to know of a whole set


def local_file_url(name: str) -> str:
    """Return the address under which Label Studio serves a file below its document root; a URL stays."""
    return name if "://" in name else f"/data/local-files/?d={quote(name)}"


def layout_of(tool: str, asked: Asked, out: Path) -> dict[Path, bytes]:
    """Return the further files of a set, by path: Label Studio's labelling config, or Argilla's settings."""
    if tool == LABEL_STUDIO:
        return {out.with_suffix(".xml"): _labelling_config(asked).encode()}
    folder = out.parent / ".argilla"
    dataset = {"name": out.parent.name, "guidelines": GUIDELINES[asked], "allow_extra_metadata": True}
    files = {folder / "settings.json": _argilla_settings(asked), folder / "dataset.json": dataset}
    return {file: json.dumps(content, indent=1).encode() + b"\n" for file, content in files.items()}


def write_layout(files: Mapping[Path, bytes]) -> None:
    """Write the files of :func:`layout_of`, each whole or not at all."""
    for path, content in files.items():
        with written_whole(path) as file:
            file.write(content)


def next_steps(tool: str, out: Path) -> list[str]:
    """Return what to do with the files, a line each."""
    folder = out.parent.resolve()
    if tool == ARGILLA:
        return [f'python: rg.Dataset.from_disk("{folder}", workspace="...", client=client)']
    return [
        f"LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT={folder} label-studio",
        f"in a new project: Labeling Setup, Code: {out.with_suffix('.xml').name}; Cloud Storage, Local files: {folder}",
        f"then Import: {out.name}",
    ]


def _labelling_config(asked: Asked) -> str:
    picture = '<Image name="picture" valueList="$images"/>\n  ' if asked == "answers" else ""
    answer = "" if asked == "answers" else '\n  <Text name="answer" value="$answer"/>'
    kind = "Text" if asked == "answers" else "Image"
    return f"""<View>
  {picture}<Text name="prompt" value="$prompt"/>{answer}
  <Header value={quoteattr(HEADERS[asked])}/>
  <Pairwise name="{QUESTION}" toName="left_side,right_side"/>
  <View style="display: grid; grid-template: auto / 1fr 1fr; column-gap: 1em">
    <{kind} name="left_side" value="$left"/>
    <{kind} name="right_side" value="$right"/>
  </View>
</View>
"""


def _argilla_settings(asked: Asked) -> dict[str, Any]:
    names = {
        "answers": ("image", "prompt", "answer_a", "answer_b"),
        "pictures": ("prompt", "answer", "image_a", "image_b"),
    }[asked]
    fields = [
        {
            "name": name, "title": name.replace("_", " "), "required": True,
            "settings": {"type": "image"} if name.startswith("image") else {"type": "text", "use_markdown": False},
        }
        for name in names
    ]  # fmt: skip
    what = "answer" if asked == "answers" else "picture"
    options = [{"value": side, "text": f"{what} {side}"} for side in ("a", "b")]
    options.append({"value": NEITHER, "text": "neither, or both"})
    question = {
        "name": QUESTION, "title": HEADERS[asked], "description": None, "required": True,
        "settings": {"type": "label_selection", "options": options, "visible_options": None},
    }  # fmt: skip
    metadata = [
        {
            "name": name, "title": name, "visible_for_annotators": shown,
            "settings": {"type": "terms", "visible_for_annotators": shown, "values": None},
        }
        for name, shown in (("category", True), ("chosen", False))
    ]  # fmt: skip
    return {
        "guidelines": GUIDELINES[asked], "fields": fields, "questions": [question], "metadata": metadata, "vectors": [],
        "allow_extra_metadata": True, "distribution": {"strategy": "overlap", "min_submitted": 1}, "mapping": None,
    }  # fmt: skip
