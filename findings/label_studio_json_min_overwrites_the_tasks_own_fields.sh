#!/usr/bin/env bash
# label-studio-sdk 2.1.0.
#
# The export format JSON_MIN lays a task's data, its answers and a few facts about the task in one flat object. Whatever
# comes later wins: a field "id" of the data becomes the number that Label Studio gave the task, and where a control is
# called as a field of the data is, the answer stands in the place of the text that was judged. The export format JSON
# has both. Nothing is logged. Rows that name themselves by "id", as most data sets do, cannot be joined with what people
# said of them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet label-studio-sdk==2.1.0
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import json
from pathlib import Path

from label_studio_sdk.converter import Converter

CONFIG = """<View>
  <Text name="prompt" value="$prompt"/>
  <Pairwise name="right" toName="first,second"/>
  <Text name="first" value="$left"/>
  <Text name="second" value="$right"/>
</View>"""
data = {"id": "pair-17", "prompt": "Which is better?", "left": "A red car.", "right": "A blue car."}
answer = {"id": "x", "from_name": "right", "to_name": "first,second", "type": "pairwise", "value": {"selected": "left"}}
task = {"id": 1, "data": data, "annotations": [{"id": 5, "completed_by": 1, "was_cancelled": False, "result": [answer]}]}
Path("tasks.json").write_text(json.dumps([task]))
rows = {}
for name in ("JSON", "JSON_MIN"):
    Converter(CONFIG, project_dir=None).convert("tasks.json", name, name, is_dir=False)
    [rows[name]] = json.loads(next(Path(name).glob("*.json")).read_text())
print("JSON      ", rows["JSON"]["data"])
print("JSON_MIN  ", {key: rows["JSON_MIN"].get(key) for key in data})
assert rows["JSON"]["data"] == data
assert rows["JSON_MIN"]["id"] == 1, rows["JSON_MIN"]
assert rows["JSON_MIN"]["right"] != "A blue car.", rows["JSON_MIN"]
assert rows["JSON_MIN"]["left"] == "A red car." and "pair-17" not in json.dumps(rows["JSON_MIN"])
PY
