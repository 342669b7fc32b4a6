"""Near-duplicates by embeddings: the same as comparing every two texts one by one, with a tiny encoder of random weights."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from tests.audit.pair_sets import row
from vapr.audit import embedding_duplicates
from vapr.audit.embedding_duplicates import Encoder, find, near_duplicates_of
from vapr.cli import main
from vapr.data.pairs import write_pairs
from vapr.data.sources import read_pairs
from vapr.errors import UserError

LONG = "The {} stands beside the old stone wall near the river today."


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A BERT of two layers whose words are letters and a few more."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    tokens = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *letters,
        *(f"##{letter}" for letter in letters),
        ".",
        ",",
        "?",
    ]
    BertTokenizerFast(vocab={token: n for n, token in enumerate(tokens)}, model_max_length=128).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokens), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=128, initializer_range=0.5,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def naive(vectors: np.ndarray, asked: np.ndarray, similarity: float) -> dict[int, int]:
    kept, found = [], {}
    for n in range(len(vectors)):
        likest = max((m for m in kept if asked[m] != asked[n]), key=lambda m: vectors[n] @ vectors[m], default=None)
        if likest is not None and vectors[n] @ vectors[likest] >= similarity:
            found[n] = likest
        else:
            kept.append(n)
    return found


@pytest.mark.parametrize("similarity", [0.6, 0.8, 0.95])
def test_blocks_find_what_a_plain_loop_finds(similarity, monkeypatch):
    monkeypatch.setattr(embedding_duplicates, "BLOCK", 16)
    monkeypatch.setattr(embedding_duplicates, "KEPT_BLOCK", 24)
    random = np.random.default_rng(0)
    near = random.normal(size=(30, 6))[random.integers(30, size=150)] + random.normal(size=(150, 6)) * 0.3
    vectors = (near / np.linalg.norm(near, axis=1, keepdims=True)).astype(np.float32)
    asked = random.integers(40, size=150)
    through = []
    found = find(vectors, asked, similarity, through.append)
    assert {n: m for n, (m, _) in found.items()} == naive(vectors, asked, similarity) and found
    assert all(cosine == pytest.approx(vectors[n] @ vectors[m], abs=1e-5) for n, (m, cosine) in found.items())
    assert sum(through) == 150


def rows() -> list[dict]:
    made = [
        row(n, LONG.format("red " + word), LONG.format("blue " + word))
        for n, word in enumerate(("car", "zebra", "guitar"))
    ]
    made += [{**made[0], "id": "again", "images": ["a/9.png"]}]  # the same words about another picture
    made += [{**made[0], "id": "by design", "rejected": LONG.format("green car")}]  # another edit of one answer
    made += [row(7, "Red.", "Blue."), {**row(7, "Red.", "Blue."), "id": "short", "images": ["a/8.png"]}]
    return made


def test_only_the_second_of_two_alike_is_dropped_and_it_is_said(picture_folder, tmp_path, encoder):
    write_pairs(picture_folder / "near.jsonl", rows())
    arguments = ["--to", "vapr", "--drop-near-duplicates", str(encoder), "--similarity", "0.99999"]
    result = CliRunner().invoke(main, ["convert", str(picture_folder / "near.jsonl"), "--out", str(tmp_path / "out.jsonl"), *arguments])  # fmt: skip
    assert result.exit_code == 0, result.output
    left = [json.loads(line)["id"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert left == ["0", "1", "2", "by design", "7", "short"]
    assert "compared   5 texts of at least 8 words" in result.stdout
    assert "dropped    1 near-duplicates, of a cosine of 0.99999 or more" in result.stdout
    assert "near.jsonl:4 is nearly " in result.stdout and "near.jsonl:1 (1.000)" in result.stdout
    told = CliRunner().invoke(main, ["convert", str(picture_folder / "near.jsonl"), "--out", str(tmp_path / "two.jsonl"), "--json", *arguments])  # fmt: skip
    [dropped] = json.loads(told.stdout)["near_duplicates"]["dropped"]
    assert dropped["row"].endswith(":4") and dropped["like"].endswith(":1")
    plain = CliRunner().invoke(main, ["convert", str(picture_folder / "near.jsonl"), "--to", "vapr", "--out", str(tmp_path / "all.jsonl")])  # fmt: skip
    assert "(7 pairs" in plain.stdout and "near-duplicates" not in plain.stdout


def test_vectors_are_the_mean_of_the_encoders_last_layer_whatever_else_is_in_the_batch(encoder):
    from transformers import AutoModel, AutoTokenizer

    texts = ["a red car", "what is it? a zebra beside a wall"]
    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()
    with torch.no_grad():
        own = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in texts]
    for vector, hidden in zip(Encoder(str(encoder)).encode(texts), own, strict=True):
        mean = hidden.mean(dim=0)
        assert torch.allclose(torch.tensor(vector), mean / mean.norm(), atol=1e-5)


def test_pooling_of_a_sentence_transformers_folder(encoder, tmp_path):
    import shutil

    shutil.copytree(encoder, tmp_path / "cls")
    (tmp_path / "cls" / "1_Pooling").mkdir()
    pooling = tmp_path / "cls" / "1_Pooling" / "config.json"
    pooling.write_text(
        json.dumps({"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    )
    assert not np.allclose(Encoder(str(tmp_path / "cls")).encode(["a car"]), Encoder(str(encoder)).encode(["a car"]))
    pooling.write_text(json.dumps({"pooling_mode_lasttoken": True}))
    with pytest.raises(UserError, match="pools neither by the mean nor by the first token"):
        Encoder(str(tmp_path / "cls"))


def test_long_texts_are_cut_and_counted(picture_folder, encoder):
    made = [row(n, "word " * 200, "other " * (3 if n else 200)) for n in range(2)]
    write_pairs(picture_folder / "long.jsonl", made)
    found = near_duplicates_of(read_pairs(picture_folder / "long.jsonl"), str(encoder), 0.9)
    assert (found.compared, found.cut) == (1, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--drop-near-duplicates", "/no/such/encoder"), "--drop-near-duplicates /no/such/encoder: no text encoder"),
        (("--similarity", "0"), "--similarity"),
        (("--similarity", "0.9"), "--similarity: of near-duplicates, and there is no --drop-near-duplicates"),
    ],
)
def test_mistakes_are_one_line(picture_folder, tmp_path, arguments, message):
    write_pairs(picture_folder / "near.jsonl", rows())
    command = [
        "convert",
        str(picture_folder / "near.jsonl"),
        "--to",
        "vapr",
        "--out",
        str(tmp_path / "o.jsonl"),
        *arguments,
    ]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and message in result.stderr, result.output
    assert not (tmp_path / "o.jsonl").exists()
