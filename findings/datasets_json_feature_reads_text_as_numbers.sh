#!/usr/bin/env bash
# datasets 5.2.0, pyarrow 24.0.0.
#
# The feature type Json, which on_mixed_types="use_json" gives to a column of mixed types, keeps JSON text. A string that
# happens to be valid JSON is stored as it stands and parsed when it is read: the text "7" comes back as the number 7,
# "null" as None, "true" as True, '["a"]' as a list. Other text comes back as text. Answers to questions about pictures
# ("How many?" - "7") change their type or vanish, and no warning is given.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datasets==5.2.0 pyarrow==24.0.0
HF_HUB_OFFLINE=1 HF_HOME="$folder/home" "$folder/venv/bin/python" - <<'PY'
import datasets

rows = [{"content": text} for text in ("7", "null", "true", "a dog")] + [{"content": ["a", "list"]}]
kept = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
print(kept.features)
back = [row["content"] for row in kept]
for row, value in zip(rows, back):
    print(f"{row['content']!r:18} comes back as {value!r}")
assert back == [7, None, True, "a dog", ["a", "list"]], back
PY
