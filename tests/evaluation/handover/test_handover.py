"""Tasks for other harnesses, and their answers taken back. The log is what lmms-eval 0.7.3 wrote when it ran such a task."""

import base64
import csv
import json
import runpy
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from tests.evaluation.readers.tool_files import number_of, pope_tsv_rows, shuffled, write_jsonl, write_tsv, write_xlsx
from vapr.cli import main
from vapr.errors import UserError
from vapr.evaluation.handover import lmms_eval, vlmevalkit
from vapr.evaluation.handover.run import prepare, run, take_back
from vapr.evaluation.handover.task import Call, Task
from vapr.evaluation.readers.open import open_benchmark
from vapr.evaluation.score_file import score_file
from vapr.evaluation.scoring.prediction import Question, read_predictions


@pytest.fixture
def model(tmp_path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    return tmp_path / "model"


@pytest.fixture
def bench(tmp_path) -> str:
    return f"pope={write_tsv(tmp_path / 'POPE.tsv', pope_tsv_rows())}"


def handover(*arguments: object):
    return CliRunner().invoke(main, ["handover", *map(str, arguments)])


def lmms_log(out: Path, questions, answer=lambda question: "Yes", name: str = "20261127_225708") -> Path:
    """Write a log as lmms-eval 0.7.3 wrote that of such a task."""
    rows = [
        {"doc_id": n, "target": q.answer, "filtered_resps": answer(q), "token_counts": [{"output_tokens": 8}], "doc_hash": "74234e98",
         "answered": {"vapr_id": q.id, "answered": True}, "input": q.question}
        for n, q in enumerate(questions)
    ]  # fmt: skip
    folder = out / "logs" / "t__model"
    folder.mkdir(parents=True, exist_ok=True)
    return write_jsonl(folder / f"{name}_samples_vapr_pope.jsonl", shuffled(rows))


def test_the_folder_holds_all_that_lmms_eval_needs(model, bench, tmp_path):
    import datasets

    out = tmp_path / "out"
    call = prepare(model, [bench], "lmms-eval", out, max_new_tokens=32)
    task = (out / "tasks" / "vapr_pope" / "vapr_pope.yaml").read_text()
    functions = [line.split("!function lmms_task.")[1] for line in task.splitlines() if "!function" in line]
    written = runpy.run_path(str(out / "tasks" / "vapr_pope" / "lmms_task.py"))
    assert len(functions) == 5 and all(callable(written[name]) for name in functions)
    plain = yaml.safe_load(task.replace("!function ", ""))
    assert plain["task"] == "vapr_pope" and plain["generation_kwargs"]["max_new_tokens"] == 32
    data = datasets.load_dataset(plain["dataset_path"], split=plain["test_split"])  # as lmms-eval does
    _, questions = open_benchmark(bench)
    assert [(row["vapr_id"], row["question"], row["answer"]) for row in data] == [
        (q.id, q.question, q.answer) for q in questions
    ]
    assert written["visuals"](data[17])[0].getpixel((0, 0))[0] == number_of(questions[17].images[0])
    assert "--log_samples" in call.arguments and "--use_cache" not in call.arguments
    assert f"pretrained={model.absolute()}" in call.arguments and "qwen2_5_vl" in call.arguments
    assert call.environment == {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def test_pictures_stand_where_the_question_has_them(tmp_path):
    from PIL import Image

    written = runpy.run_path(str(write_task(tmp_path)))
    one, two = Image.new("RGB", (2, 2)), Image.new("RGB", (3, 3))
    doc = {"question": "Compare <image> and <image>.", "image_0": one, "image_1": two, "vapr_id": "1"}
    [message] = written["messages"](doc)
    assert [part["type"] for part in message["content"]] == ["text", "image", "text", "image", "text"]
    assert [part["text"] for part in message["content"] if part["type"] == "text"] == ["Compare", "and", "."]
    assert written["text"](doc) == "Compare  and ." and len(written["visuals"](doc)) == 2
    [message] = written["messages"]({"question": "What?", "image_0": one, "image_1": None})
    assert [part["type"] for part in message["content"]] == ["image", "text"]
    assert written["results"](doc, [" "]) == {"answered": {"vapr_id": "1", "answered": False}}


def write_task(folder: Path) -> Path:
    (folder / "config.json").write_text('{"model_type": "llava"}')
    question = Question(benchmark="pope", id="1", question="?", answer="yes")
    lmms_eval.write(Task(model=folder, model_class=None, questions={"pope": [question]}, folder=folder))
    return folder / "tasks" / "vapr_pope" / "lmms_task.py"


def test_the_folder_holds_all_that_vlmevalkit_needs(model, bench, tmp_path):
    out = tmp_path / "out"
    call = prepare(model, [bench], "vlmevalkit", out, max_new_tokens=32)
    csv.field_size_limit(1 << 30)
    with (out / "LMUData" / "vapr_pope_openended.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    _, questions = open_benchmark(bench)
    assert [(row["vapr_id"], row["question"]) for row in rows] == [(f"vapr:{q.id}", q.question) for q in questions]
    coded = {row["index"]: row["image"] for row in rows}
    assert sum(len(image) > 64 for image in coded.values()) == 2  # each picture once; other rows name its row
    for row, question in zip(rows, questions, strict=True):
        image = row["image"] if len(row["image"]) > 64 else coded[row["image"]]
        assert base64.b64decode(image) == question.images[0].read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert config["data"] == {"vapr_pope_openended": {"class": "CustomVQADataset", "dataset": "vapr_pope_openended"}}
    assert config["model"]["model"] == {
        "class": "Qwen2VLChat", "model_path": str(model.absolute()), "max_new_tokens": 32, "use_custom_prompt": False, "do_sample": False,
    }  # fmt: skip
    assert call.environment["LMUData"] == str(out / "LMUData") and "--mode" in call.arguments


def test_what_lmms_eval_logged_is_taken_back(bench, tmp_path):
    out = tmp_path / "out"
    _, questions = open_benchmark(bench)
    lmms_log(out, questions, lambda question: "No", "20260101_000000")  # an older run
    lmms_log(out, questions, lambda question: question.answer)
    file = take_back([bench], "lmms-eval", out, say=lambda line: None)
    assert {(p.id, p.prediction) for p in read_predictions(file)} == {(q.id, q.answer) for q in questions}
    assert score_file(out, "pope")["accuracy"] == 1


def test_what_vlmevalkit_wrote_is_taken_back(bench, tmp_path):
    pytest.importorskip("openpyxl")
    out = tmp_path / "out"
    _, questions = open_benchmark(bench)
    rows = [
        {"index": n, "question": q.question, "answer": q.answer, "vapr_id": f"vapr:{q.id}", "prediction": q.answer}
        for n, q in enumerate(questions)
    ]
    (out / "logs" / "model" / "T20261127").mkdir(parents=True)
    write_xlsx(out / "logs" / "model" / "T20261127" / "model_vapr_pope_openended.xlsx", shuffled(rows))
    take_back([bench], "vlmevalkit", out, say=lambda line: None)
    assert score_file(out, "pope")["accuracy"] == 1


def test_the_command_prints_the_call_then_reads_the_answers(model, bench, tmp_path):
    out = tmp_path / "out"
    printed = handover(model, "--bench", bench, "--to", "lmms-eval", "--out", out)
    assert printed.exit_code == 0, printed.output
    call = printed.stdout.strip()
    assert call.startswith(
        "HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 python -m lmms_eval --model qwen2_5_vl --model_args pretrained="
    )
    assert f"--include_path {out / 'tasks'}" in call and "\n" not in call
    lmms_log(out, open_benchmark(bench)[1])
    taken = handover(model, "--bench", bench, "--to", "lmms-eval", "--out", out, "--take-back")
    assert taken.exit_code == 0 and f"{out / 'predictions.jsonl'}: score it with vapr score" in taken.stdout


def test_it_runs_in_the_tools_own_environment(model, bench, tmp_path):
    """A Python of another environment, in whose place a script notes how it was called."""
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f'#!{sys.executable}\nimport os, sys\nopen("{tmp_path}/called", "w").write(os.environ["HF_HUB_OFFLINE"] + " ".join(sys.argv[1:]))\n'
    )
    python.chmod(0o755)
    out = tmp_path / "out"
    lmms_log(out, open_benchmark(bench)[1])
    ran = handover(model, "--bench", bench, "--to", "lmms-eval", "--out", out, "--python", tmp_path / "env")
    assert ran.exit_code == 0, ran.output
    assert (tmp_path / "called").read_text().startswith("1-m lmms_eval --model qwen2_5_vl")
    assert (out / "predictions.jsonl").is_file()


def refused(call, *arguments, **options) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_be_handed_over(model, bench, tmp_path):
    out = tmp_path / "out"
    assert "no such folder; other tools run offline" in refused(prepare, tmp_path / "gone", [bench], "lmms-eval", out)
    assert "--bench pope: which questions? Give --bench pope=PATH with their file or folder" in refused(
        prepare, model, ["pope"], "lmms-eval", out
    )
    assert "--bench pope is given twice" in refused(prepare, model, [bench, bench], "lmms-eval", out)
    (model / "config.json").write_text('{"model_type": "llava"}')
    assert (
        "which class of VLMEvalKit runs a llava is not known here (known: qwen2_5_vl, qwen2_vl); name it with --model-class"
        in refused(prepare, model, [bench], "vlmevalkit", out)
    )
    prepare(model, [bench], "vlmevalkit", out, model_class="LLaVA_Next")
    assert json.loads((out / "config.json").read_text())["model"]["model"]["class"] == "LLaVA_Next"
    (model / "config.json").unlink()
    assert "no config.json with a model_type" in refused(prepare, model, [bench], "lmms-eval", out)
    (model / "adapter_config.json").write_text("{}")
    assert "an adapter; merge it first with vapr export" in refused(prepare, model, [bench], "lmms-eval", out)


def test_missing_pictures_are_found_before_anything_is_written(model, tmp_path):
    moved = [{**{k: v for k, v in row.items() if k != "image"}, "image_path": "gone.jpg"} for row in pope_tsv_rows()]
    table = write_tsv(tmp_path / "POPE.tsv", moved)
    assert "gone.jpg' is not there (18 of 18 questions lack a picture)" in refused(
        prepare, model, [f"pope={table}"], "lmms-eval", tmp_path / "out"
    )
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_taken_back(bench, tmp_path):
    out = tmp_path / "out"
    assert "lmms-eval logged no answers to pope; run it first" in refused(take_back, [bench], "lmms-eval", out)
    (out / "logs" / "model").mkdir(parents=True)
    (out / "logs" / "model" / "model_vapr_pope_openended.pkl").write_bytes(b"")
    assert "it left a pickle because XlsxWriter is missing: install that there, and run it again" in refused(
        take_back, [bench], "vlmevalkit", out
    )
    lmms_log(out, open_benchmark(bench)[1][:5])
    assert "5 answers to 18 questions" in refused(take_back, [bench], "lmms-eval", out, say=lambda line: None)
    take_back([bench], "lmms-eval", out, partial=True, say=lambda line: None)
    assert len(read_predictions(out)) == 5


def test_a_tool_that_fails(tmp_path):
    assert "no such file; give the Python of the environment that the tool is in" in refused(
        run, Call([], {}), tmp_path / "gone"
    )
    assert "the tool ended with code 3" in refused(run, Call(["-c", "raise SystemExit(3)"], {}), Path(sys.executable))


def test_questions_without_a_picture_are_counted_for_vlmevalkit(model, tmp_path):
    asked = [Question(benchmark="pope", id="1", question="?", answer="yes")]
    call = vlmevalkit.write(Task(model=model, model_class=None, questions={"pope": asked}, folder=tmp_path / "out"))
    assert call.notes == ["1 questions have no picture; VLMEvalKit leaves them out"]
