"""A prompt that already holds a rendered conversation is warned of, by the row's name and with a count."""

import json

import pytest
from click.testing import CliRunner

from tests.batches.test_tokenize import text_pair
from vapr.cli import main
from vapr.data.rendered import rendered_marker

VICUNA = "A chat between a curious user and an assistant. USER: <image>\nIs it red? ASSISTANT:"


def asked(text: str):
    pair = text_pair("Yes", "No")
    pair.prompt[0]["content"][0]["text"] = text
    return pair


@pytest.mark.parametrize(
    "text",
    [
        VICUNA,
        "USER: Is it red? ASSISTANT: Yes. USER: And now?",
        "<|im_start|>user\nIs it red?<|im_end|>\n<|im_start|>assistant\n",
        "<|start_header_id|>user<|end_header_id|>\n\nIs it red?",
        "<start_of_turn>user\nIs it red?",
        "[INST] Is it red? [/INST]",
        "### Human: Is it red?### Assistant:",
        "\n\nHuman: Is it red?\n\nAssistant:",
    ],
)
def test_what_only_a_template_writes_is_found(text):
    assert rendered_marker(asked(text))


@pytest.mark.parametrize(
    "text",
    [
        "Is it red?",
        "What does the assistant: a woman in white, hold?",
        "The user: who is he?",
        "Which of [A] and [B] is red? Answer: ",
        "A chat between two women is shown. What are they saying?",
        "",
    ],
)
def test_ordinary_questions_are_not(text):
    assert rendered_marker(asked(text)) is None


@pytest.fixture
def config(make_config, photo_rows, photo_root, tmp_path):
    """Eight rows, the third and the fifth rendered already."""
    rows = [dict(row) for row in photo_rows if not row.get("images")][:8]
    for number in (2, 4):
        rows[number]["prompt"] = [{"role": "user", "content": VICUNA.replace("<image>\n", "")}]
    made = make_config(rows=rows)
    file = tmp_path / "run.yaml"
    settings = {
        "run_dir": made.run_dir,
        "policy": {"model": made.policy.model, "dtype": "float32", "lora": {"rank": 2}},
        "data": {"train": str(tmp_path / "pairs.jsonl"), "image_root": str(photo_root), "workers": 0},
        "optim": {"pairs_per_step": 8, "max_steps": 1},
        "reference": {"cache_dir": str(tmp_path / "reference")},
    }
    file.write_text(json.dumps(settings))
    return file


@pytest.mark.parametrize("command", ["data", "train"])
def test_the_warning_names_the_row_and_counts(command, config, tmp_path):
    result = CliRunner().invoke(main, [command, str(config)])
    assert result.exit_code == 0, result.output
    lines = [line for line in result.output.splitlines() if "rendered conversation" in line]
    assert len(lines) == 1
    assert f"warning: {tmp_path / 'pairs.jsonl'}:3: the prompt already holds a rendered conversation" in lines[0]
    assert "(2 of 8 rows are so)" in lines[0]


def test_data_says_it_for_machines_too(config):
    notes = json.loads(CliRunner().invoke(main, ["data", str(config), "--json"]).stdout)["train"]["notes"]
    assert len(notes) == 1 and "2 of 8 rows" in notes[0]
