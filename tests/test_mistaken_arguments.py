"""What people give in place of what is wanted: each command says in one line what it is and what would do."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from PIL import Image

from vapr.cli import main
from vapr.config import Config
from vapr.data.pairs import write_pairs

ROW = {"images": ["cat.png"], "prompt": "What animal is this?", "chosen": "A cat.", "rejected": "A dog."}


@pytest.fixture
def work(tiny, tmp_path, monkeypatch) -> Path:
    """The current folder, with a config that runs: four rows, one picture."""
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((56, 40), 60).convert("RGB").save(tmp_path / "cat.png")
    write_pairs(tmp_path / "pairs.jsonl", [{**ROW, "id": str(n), "chosen": f"A cat {n}."} for n in range(4)])
    raw = {
        "run_dir": "run",
        "policy": {"model": str(tiny("qwen2_5_vl")), "dtype": "float32", "lora": {"rank": 2}},
        "data": {"train": "pairs.jsonl", "workers": 0},
        "optim": {"pairs_per_step": 2, "max_steps": 1},
        "reference": {"cache_dir": str(tmp_path / "reference")},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    return tmp_path


def vapr(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception  # what a user would see as a traceback
    return result.exit_code, result.stdout, result.stderr


def refusal(*arguments: object) -> str:
    """The one line that the command ends with."""
    code, _, stderr = vapr(*arguments)
    assert code == 2 and stderr.startswith("Error: ") and stderr.count("\n") == 1, stderr
    return stderr.removeprefix("Error: ").rstrip("\n")


RUN_COMMANDS = ("train", "data", "prepare")


@pytest.mark.parametrize("command", RUN_COMMANDS)
@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.json", "pairs.parquet", "s.tar", "some/pairs.jsonl"])
def test_data_in_place_of_a_run_config(work, command, name):
    (work / "some").mkdir()
    content = (work / "pairs.jsonl").read_bytes()
    if name.endswith(".json"):
        content = b"  \n[" + content.strip().replace(b"\n", b",\n") + b"]"
    (work / name).write_bytes(content)
    line = refusal(command, name)
    said, _, shown = line.partition("; write this line into run.yaml and give that: ")
    assert said == f"{name}: holds data, but a run config (YAML) is wanted here"
    config = Config.parse(yaml.safe_load(shown))
    assert config.data.train == name and config.run_dir and config.policy.model


def test_a_run_config_in_json_is_one_all_the_same(work):
    (work / "run.json").write_text(json.dumps(yaml.safe_load((work / "run.yaml").read_text()), indent=1))
    assert vapr("data", "run.json")[0] == 0


def test_a_folder_in_place_of_a_run_config(work, tiny):
    (work / "some").mkdir()
    line = refusal("train", "some")
    assert line.startswith("some: is a folder, but a run config (YAML) is wanted here; write this line into run.yaml")
    assert yaml.safe_load(line.partition("give that: ")[2])["data"] == {"train": "some"}
    model = tiny("qwen2_5_vl")
    line = refusal("train", model)
    assert line.startswith(f"{model}: is a model's folder, but a run config (YAML) is wanted here")
    assert yaml.safe_load(line.partition("give that: ")[2])["policy"] == {"model": str(model)}
    assert vapr("train", "run.yaml")[0] == 0
    line = refusal("train", "run")
    assert line == "run: is the folder of a run; its config is run/config.yaml (vapr train run/config.yaml --resume)"
    code, output, _ = vapr("train", "run/config.yaml", "--resume")
    assert code == 0 and "finished" in output


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        *(((command, "gone.yaml"), "gone.yaml: no such file") for command in RUN_COMMANDS),
        (("train", "run.yaml/gone.yaml"), "run.yaml/gone.yaml: no such file"),
        (("edit", "pairs.jsonl", "--out", "out", "--config", "gone.yaml"), "gone.yaml: no such file"),
        (("edit", "gone.jsonl", "--out", "out"), "gone.jsonl: no such file or folder"),
        (("convert", "gone.jsonl", "--to", "trl", "--out", "o.jsonl"), "gone.jsonl: no such file or folder"),
        (("view", "gone.jsonl", "--out", "o.html"), "gone.jsonl: no such file or folder"),
        (("audit", "gone.jsonl"), "gone.jsonl: no such file or folder"),
        (("compare", "gone", "gone2"), "gone: no such folder"),
        (("export", "gone", "--out", "out"), "gone: no such folder; give that of a run or of a checkpoint"),
        (("data", "run.yaml", "--set", "data.verdicts=gone"), "verdicts: gone: no such file"),
        (("train", "n" * 300), f"{'n' * 300}: this name is too long for a file"),
    ],
    ids=str,
)
def test_what_is_not_there(work, arguments, line):
    assert refusal(*arguments) == line


@pytest.mark.parametrize("name", ["pairs.jsonl", "."])
def test_data_in_place_of_an_edit_config(work, name):
    line = refusal("edit", "pairs.jsonl", "--out", "out", "--config", name)
    kind = "is a folder" if name == "." else "holds data"
    assert line.startswith(
        f"{name}: {kind}, but a config of vapr edit (YAML) is wanted here; docs/edit.md lists its keys"
    )


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("run_dir: run\npolicy:\n\tmodel: m\ndata: {train: x}\n", 3),
        ("run_dir: run\npolicy:\n  model: m\n  \tdtype: float32\n", 4),
        ("run_dir: run\nloss:\n-\tkind: sigmoid\n", 3),
    ],
    ids=["indented", "mixed", "after a dash"],
)
def test_a_tab_in_yaml(work, text, line):
    (work / "run.yaml").write_text(text)
    assert refusal("train", "run.yaml") == f"run.yaml:{line}: a tab in the indentation; YAML takes only spaces there"
    assert "a tab in the indentation" in refusal("edit", "pairs.jsonl", "--out", "o", "--config", "run.yaml")


def test_a_tab_within_a_value_is_no_mistake(work):
    (work / "run.yaml").write_text((work / "run.yaml").read_text().replace("run_dir: run", "run_dir:\trun"))
    assert vapr("data", "run.yaml")[0] == 0


def test_other_mistakes_in_yaml_name_their_line(work):
    (work / "run.yaml").write_text("run_dir: run\ndata: {train: x\n")
    assert refusal("train", "run.yaml").endswith("did not find expected ',' or '}' in line 3, column 1")


@pytest.mark.parametrize(
    ("editor", "meant"),
    [
        ("localhost:8000", "http://localhost:8000"),
        ("127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1"),
        ("gpu-3.cluster:80", "http://gpu-3.cluster:80"),
        ("localhost/v1", "http://localhost/v1"),
    ],
)
def test_an_editor_without_its_scheme(work, editor, meant):
    write_pairs(work / "sft.jsonl", [{"images": ["cat.png"], "question": "What is it?", "answer": "A cat."}])
    line = refusal("edit", "sft.jsonl", "--out", "out", "--editor", editor)
    assert line == f"--editor {editor}: the address of a server begins with http:// or https://; did you mean {meant}?"
    line = refusal("edit", "sft.jsonl", "--out", "out", "--set", f"checks.verifier={editor}")
    assert line.startswith(f"checks.verifier {editor}: the address of a server begins with http://")
    assert not (work / "out").exists()


@pytest.mark.parametrize("override", ["loss={kind: dpo, beta: 0.2}", "loss=[{kind: dpo, beta: 0.2}]", "loss.kind=dpo"])
def test_dpo_is_another_name_of_sigmoid(work, override):
    code, output, stderr = vapr("train", "run.yaml", "--set", override)
    assert code == 0, stderr
    assert "loss       1 sigmoid (DPO), share pair" in output.splitlines()
    written = yaml.safe_load((work / "run" / "config.yaml").read_text())["loss"]
    assert [term["kind"] for term in written] == ["sigmoid"]
    assert written[0]["beta"] == (0.1 if override == "loss.kind=dpo" else 0.2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("policy.lora={r: 16}", "unknown key 'policy.lora.r'; did you mean 'rank'?"),
        ("policy.lora={lora_alpha: 16}", "unknown key 'policy.lora.lora_alpha'; did you mean 'alpha'?"),
        ("policy.lora={target_modules: all-linear}", "unknown key 'policy.lora.target_modules'; did you mean 'targets'?"),
        ("policy.lora={lora_dropout: 0.1}", "unknown key 'policy.lora.lora_dropout'; known keys here: rank, alpha, targets"),
        ("lora={rank: 16}", "unknown key 'lora'; did you mean 'policy.lora'?"),
        ("lr=1.0e-5", "unknown key 'lr'; did you mean 'optim.lr'?"),
        ("learning_rate=1.0e-5", "unknown key 'learning_rate'; did you mean 'optim.lr'?"),
        ("optim.learning_rate=1.0e-5", "unknown key 'optim.learning_rate'; did you mean 'lr'?"),
        ("beta=0.1", "unknown key 'beta'; did you mean 'loss.beta'?"),
        ("model_name_or_path=m", "unknown key 'model_name_or_path'; did you mean 'policy.model'?"),
        ("output_dir=m", "unknown key 'output_dir'; did you mean 'run_dir'?"),
    ],
)  # fmt: skip
def test_names_of_other_libraries(work, override, message):
    assert refusal("train", "run.yaml", "--set", override) == f"run.yaml: {message}"


@pytest.mark.parametrize("name", ["model.safetensors", "weights.bin"])
def test_a_file_of_weights_as_the_model(work, tiny, name):
    shutil.copytree(tiny("qwen2_5_vl"), work / "model")
    shutil.copy(work / "model" / "model.safetensors", work / "model" / name) if name == "weights.bin" else None
    way_out = "is a file; give the folder it lies in, which holds config.json, tokenizer and image processor as well"
    for command in RUN_COMMANDS:
        line = refusal(command, "run.yaml", "--set", f"policy.model=model/{name}")
        assert line == f"policy.model: model/{name} {way_out}"
    assert refusal("audit", "pairs.jsonl", "--model", f"model/{name}").endswith(way_out)


INSTRUCTIONS = {
    "llava": {"image": "cat.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]},
    "messages": {"images": ["cat.png"], "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]},
    "columns": {"image": "cat.png", "question": "What?", "answer": "A cat.", "idx": 3},
    "nulls": {"image": "cat.png", "prompt": "What?", "completion": "A cat.", "rejected": None, "chosen": None},
}  # fmt: skip


@pytest.mark.parametrize("row", INSTRUCTIONS.values(), ids=INSTRUCTIONS)
def test_instruction_data_in_place_of_pairs(work, row):
    (work / "sft.jsonl").write_text(json.dumps(row))
    told = (
        "sft.jsonl:1: 'rejected' is missing: this row looks like instruction data, a question with one answer; make pairs "
        "of it with vapr edit DATA --out DIR (if it has a worse answer as well, name that with data.columns)"
    )
    assert refusal("audit", "sft.jsonl") == told
    assert refusal("train", "run.yaml", "--set", "data.train=sft.jsonl") == told
    assert refusal("convert", "sft.jsonl", "--to", "trl", "--out", "out.jsonl") == told
    code, output, _ = vapr("data", "run.yaml", "--set", "data.train=sft.jsonl")
    assert code == 2 and "usable pairs" in output


WARNED = (
    "eval/ figures of pairs that are trained on show what was learned by heart, not how the policy does on others; "
    "hold other pairs out"
)


@pytest.mark.parametrize(
    "held_out", ["pairs.jsonl", "./pairs.jsonl", "copy.jsonl", "[{path: other.jsonl}, {path: copy.jsonl}]"]
)
def test_held_out_pairs_that_are_trained_on(work, held_out):
    shutil.copy("pairs.jsonl", "copy.jsonl")
    write_pairs(Path("other.jsonl"), [{**ROW, "chosen": "A grey cat."}])
    for command in ("train", "data"):
        code, output, stderr = vapr(command, "run.yaml", "--set", f"data.eval={held_out}")
        assert code == 0, stderr
        [line] = [line for line in (output + stderr).splitlines() if line.startswith("warning ")]
        assert line == f"warning    data.eval: 4 of its rows are in data.train, too; {WARNED}"


def test_held_out_pairs_of_their_own_are_not_warned_of(work):
    write_pairs(Path("other.jsonl"), [{**ROW, "chosen": "A grey cat."}])
    for command in ("train", "data"):
        code, output, stderr = vapr(command, "run.yaml", "--set", "data.eval=other.jsonl")
        assert code == 0 and "warning" not in output + stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.betas=0.9", "optim.betas: should be a list of 2, such as [0.9, 0.9], got 0.9"),
        ("policy.lora.targets=q_proj,v_proj", "policy.lora.targets: should be all-linear, or a list of module names such as [q_proj, v_proj], got 'q_proj,v_proj'"),
        ("data.columns=question", "data.columns: should be a mapping such as {prompt: question, chosen: good, rejected: bad, images: image}, got 'question'"),
        ("data.train.path=x", "--set data.train.path=x: 'data.train' has no keys below it"),
    ],
)  # fmt: skip
def test_a_text_where_something_else_is_wanted(work, override, message):
    assert refusal("train", "run.yaml", "--set", override).removeprefix("run.yaml: ") == message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("plan.categories=colour", "plan.categories: should be a list, such as [colour], got 'colour'"),
        ("plan.categories=colour,count", "plan.categories: should be a list, such as [colour, count], got 'colour,count'"),
        ("plan.add_categories=mine.yaml", "plan.add_categories: should be a list, such as [mine.yaml], got 'mine.yaml'"),
        ("filters.skip_questions=who", "filters.skip_questions: should be a list, such as [who], got 'who'"),
        ("checks.length_ratio=0.9", "checks.length_ratio: should be a list of 2, such as [0.9, 0.9], got 0.9"),
        ("source.columns=q", "source.columns: should be a mapping such as {question: q, answer: a, images: img}, got 'q'"),
    ],
)  # fmt: skip
def test_a_text_where_an_edit_config_wants_a_list(work, override, message):
    assert refusal("edit", "pairs.jsonl", "--out", "out", "--set", override) == f"--set: {message}"


def test_a_list_of_paths_is_a_mixture(work):
    shutil.copy("pairs.jsonl", "copy.jsonl")
    code, output, stderr = vapr("data", "run.yaml", "--set", "data.train=[pairs.jsonl, copy.jsonl]")
    assert code == 0, stderr
    assert "copy.jsonl (4 rows, format vapr)" in output
