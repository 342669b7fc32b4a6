#!/usr/bin/env bash
# xgrammar 0.2.8.
#
# A JSON schema with minLength or maxLength on a string is compiled to a grammar in which that string cannot hold any
# escape: {"find": "the word \"stop\""} is refused although it is far shorter than the bound. The same schema without the
# bound accepts it. A model under that grammar can never write a quotation mark or a line break, and nothing says so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5
"$folder/venv/bin/pip" install --quiet xgrammar==0.2.8
"$folder/venv/bin/python" - <<'PY'
import json

import xgrammar


def accepts(string_schema, text):
    schema = {"type": "object", "properties": {"find": string_schema}, "required": ["find"], "additionalProperties": False}
    tokenizer = xgrammar.TokenizerInfo([chr(n) for n in range(128)] + ["</s>"], stop_token_ids=[128])
    compiled = xgrammar.GrammarCompiler(tokenizer).compile_json_schema(json.dumps(schema))
    matcher = xgrammar.GrammarMatcher(compiled)
    return all(matcher.accept_token(ord(character)) for character in json.dumps({"find": text}))


seen = {}
for text in ("the red sign", 'the word "stop"', "two\nlines"):
    for name, schema in {
        "no bound": {"type": "string"},
        "maxLength 200": {"type": "string", "maxLength": 200},
        "minLength 1": {"type": "string", "minLength": 1},
    }.items():
        seen[text, name] = accepts(schema, text)
        print(f"{text!r:20} {name:14} {'accepted' if seen[text, name] else 'refused'}")
assert all(seen[text, "no bound"] for text, _ in seen)
assert seen["the red sign", "maxLength 200"] and seen["the red sign", "minLength 1"]
assert not any(seen[text, name] for text in ('the word "stop"', "two\nlines") for name in ("maxLength 200", "minLength 1"))
PY
