"""The training-step benchmark: arms do the same work or are refused, another commit is itself, ratios are read off."""

import dataclasses
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="the arms to compare with are TRL's")

from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from bench import commit_arm
from bench.agreement import FirstStep, gradient_gap, loss_gap
from bench.arms import TrlArm, VaprArm, _trl_rows, new_policy, trl_processor, vapr_config
from bench.commit_process import BuildArm, BuildFailed, BuildProcess
from bench.peers import PEERS, why_absent
from bench.record import REPOSITORY, Timing
from bench.summary import document
from bench.train_step import over_commit
from bench.work_tree import _git, work_tree
from bench.workloads import MIXES, SHAPES, SPREAD, Subject

CPU = torch.device("cpu")
needs_git = pytest.mark.skipif(bool(_git("rev-parse", "HEAD").returncode), reason="no git folder here")


def shallow(name: str):
    """A shape with one layer and two of the tower."""
    shape = SHAPES[name]
    depth = {"num_hidden_layers": 2} if shape.family == "llava" else {"depth": 2, "fullatt_block_indexes": [1]}
    return dataclasses.replace(
        shape, text={**shape.text, "num_hidden_layers": 1}, vision={**shape.vision, **depth}, lora_rank=4
    )  # fmt: skip


@pytest.fixture(scope="module", params=["small-qwen2.5-vl", "small-llava"])
def subject(request, tmp_path_factory):
    return Subject(shallow(request.param), tmp_path_factory.mktemp("subject"), CPU)


@pytest.mark.parametrize("mix", MIXES)
def test_trl_and_vapr_read_the_same_tokens(subject, mix):
    assert_same_tokens(subject, MIXES[mix]["answers"])


@pytest.mark.parametrize("family", ["qwen3_vl", "internvl", "idefics3", "gemma3"])
def test_trl_reads_the_tiny_policies_of_other_families_alike(family, tmp_path):
    assert_same_tokens(Subject(SHAPES[f"tiny-{family}"], tmp_path / "model", CPU), MIXES["spread"]["answers"])


def assert_same_tokens(subject, workload):
    pairs = subject.pairs(workload, 3)
    rows = [{key: value for key, value in row.items() if key != "id"} for row in _trl_rows(pairs)]
    collate = DataCollatorForVisionPreference(processor=trl_processor(subject.new_processor(), subject.folder))
    batch = collate(rows)
    masks = batch["attention_mask"].bool()
    theirs = [ids[mask].tolist() for ids, mask in zip(batch["input_ids"], masks, strict=True)]
    tokenized = [subject.processor.tokenize_pair(pair) for pair in pairs]
    paths = [pair.paths[side] for side in (0, 1) for pair in tokenized]
    assert theirs == [path.input_ids.tolist() for path in paths]
    said = [len(path.input_ids) - path.completion_start for path in paths]
    assert batch["completion_mask"].sum(dim=1).tolist() == said


@pytest.mark.parametrize("workload", SPREAD)
def test_spread_rows_differ_in_length_within_their_bounds(subject, workload):
    wanted = MIXES["spread"][workload]
    pairs = [subject.processor.tokenize_pair(pair) for pair in subject.pairs(wanted, 12)]
    lengths = [[len(path.input_ids) - path.completion_start for path in pair.paths] for pair in pairs]
    fewest, most = SPREAD[workload]
    assert all(fewest <= chosen <= most and chosen == rejected for chosen, rejected in lengths)
    assert len({chosen for chosen, _ in lengths}) > 4
    images = [pair.paths[0].images[0] for pair in pairs]
    assert len({image.content_hash for image in images}) == 12 // wanted.pairs_per_image


@pytest.mark.parametrize("mix", MIXES)
def test_trl_and_vapr_have_the_same_first_gradients_and_later_losses(subject, mix):
    pairs = subject.pairs(MIXES[mix]["answers"], 4)
    policy, _ = new_policy(subject, vapr_config(subject, "pair", 2))
    arms = {
        "trl": TrlArm(subject, pairs, 2, policy, compact=False, cached=False),
        "vapr": VaprArm(subject, pairs, 2, share="pair", cached=True),
    }
    fields = FirstStep("trl", *arms["trl"].first_step()).compare(arms, "float32")
    assert list(fields) == ["vapr"] and "refused" not in fields["vapr"]
    assert fields["vapr"]["gradient_gap"] < 1e-4
    for arm in arms.values():
        arm.start(prebuilt=False)
        arm(), arm()
    about = {"data": "as shipped", "dtype": "float32", "tuning": "lora r=4"}
    assert loss_gap(arms, "vapr", about)["agrees"] is True
    assert arms["vapr"].losses[0] == pytest.approx(0.693147, abs=1e-5)  # the comparison made no update
    assert arms["vapr"].losses[1] != arms["vapr"].losses[0]


class Stub:
    """An arm of given results."""

    def __init__(self, gradients=None, loss=0.69, losses=()):
        self.losses = list(losses)
        self.first = loss, {"w": torch.tensor(gradients or [0.3, 0.4])}

    def first_step(self):
        return self.first


def test_an_arm_that_does_other_work_is_refused():
    arms = {
        "trl": Stub(),
        "same": Stub([0.3, 0.4001]),
        "other rows": Stub([0.3, 0.3]),
        "other loss": Stub(loss=0.7),
        "no number": Stub([float("nan"), 0.4]),
    }
    compared = FirstStep("trl", *arms["trl"].first_step()).compare(arms, "float32")
    refused = {name: fields.get("refused") for name, fields in compared.items()}
    assert refused.pop("same") is None
    assert refused == {
        "other rows": "its first gradient differs from trl's by 2.0e-01 of its length",
        "other loss": "its first loss differs from trl's by 1.0e-02",
        "no number": "its first gradient differs from trl's by nan of its length",
    }


def test_a_gradient_is_compared_as_it_is_clipped():
    both = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    clipped = {name: gradient / 5 for name, gradient in both.items()}
    assert gradient_gap(clipped, both) == pytest.approx(0, abs=1e-6)
    assert gradient_gap({"a": torch.tensor([0.6])}, clipped) == pytest.approx(0.8)  # b has none
    assert gradient_gap({"a": torch.tensor([0.3]), "b": torch.tensor([0.4])}, both) == pytest.approx(0.5)


def test_losses_that_leave_those_of_trl_are_noticed():
    arms = {"trl": Stub(losses=[0.69, 0.60]), "vapr shared online": Stub(losses=[0.69, 0.62])}
    about = {"data": "as shipped", "dtype": "float32", "tuning": "lora r=16"}
    assert loss_gap(arms, "vapr shared online", about) == {"loss_gap": pytest.approx(0.02), "agrees": False}
    assert loss_gap(arms, "vapr shared online", {**about, "tuning": "full"})["agrees"] is None
    assert loss_gap(arms, "trl", about) == {}


@needs_git
def test_another_commit_trains_as_this_one_from_its_own_files(tmp_path):
    subject = Subject(shallow("small-llava"), tmp_path / "subject", CPU)
    rows = subject.write_rows(MIXES["spread"]["answers"], 4)
    pairs = subject.pairs(MIXES["spread"]["answers"], 4)
    with work_tree("HEAD", tmp_path / "tree") as tree:
        process = BuildProcess("vapr HEAD", tree, tmp_path / "build", torch.get_num_threads())
        try:
            arm = BuildArm(process, "case", subject, rows, 2, "pair")
            policy, _ = new_policy(subject, vapr_config(subject, "pair", 2))
            with torch.no_grad():
                for value in policy.trained_parameters().values():
                    value += 0.01  # weights that no seed gives: they have to come from here
            arm.build(policy)
            theirs, gradients = arm.first_step()
            arm.start(prebuilt=False)
            timing = Timing()
            assert arm.one_step(timing, CPU, None, watch_memory=True) > 0
            assert timing.step_mib is None or timing.step_mib > 0
            assert arm.losses == [pytest.approx(theirs, abs=1e-6)]
            with pytest.raises(BuildFailed, match="vapr HEAD: build: KeyError"):
                process.ask("build", case="unknown", weights="")
        finally:
            process.close()
    assert not tree.exists()
    ours = VaprArm(subject, pairs, 2, share="pair", cached=True)
    with torch.no_grad():
        for value in ours.policy.trained_parameters().values():
            value += 0.01
    loss, expected = ours.first_step()
    assert theirs == pytest.approx(loss, abs=1e-6)
    assert gradient_gap(gradients, expected) < 1e-5


@needs_git
def test_a_work_tree_is_removed_in_any_case_and_an_unknown_commit_is_one_line(tmp_path):
    def fail():
        with work_tree("HEAD", tmp_path / "tree") as tree:
            assert (tree / "bench" / "arms.py").exists()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not (tmp_path / "tree").exists()
    assert str(tmp_path) not in _git("worktree", "list").stdout
    with pytest.raises(SystemExit, match=r"^no-such-commit: .* has no such commit; `git log --oneline` lists .*$"):
        work_tree("no-such-commit", tmp_path / "other").__enter__()


def test_a_build_that_ends_says_its_last_words(tmp_path):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "arms.py").write_text("import os, sys; print('out of luck', file=sys.stderr); os._exit(1)\n")
    process = BuildProcess("vapr x", tmp_path, tmp_path / "build", 1)
    try:
        with pytest.raises(BuildFailed, match="^vapr x ended during start: out of luck$"):
            process.ask("start", prebuilt=False)
    finally:
        process.close()


def test_a_module_from_elsewhere_is_not_taken_for_the_commits(monkeypatch, tmp_path):
    commit_arm.check_modules(REPOSITORY)
    stray = ModuleType("vapr.stray")
    stray.__file__ = str(tmp_path / "stray.py")
    monkeypatch.setitem(sys.modules, "vapr.stray", stray)
    with pytest.raises(ImportError, match="vapr.stray comes from"):
        commit_arm.check_modules(REPOSITORY)


def test_editable_installs_serve_a_build_nothing(monkeypatch):
    editable = type("Finder", (), {"__module__": "__editable___vapr_0_1_0_finder"})
    other = SimpleNamespace()
    monkeypatch.setattr(sys, "meta_path", [editable, other])
    monkeypatch.setattr(sys, "path", ["/script", "/site", "__editable__.vapr.finder.__path_hook__"])
    monkeypatch.setattr(sys, "path_hooks", [])
    monkeypatch.setattr(sys, "modules", {"vapr.cli": None, "bench": None, "torch": None})
    commit_arm.use_only(Path("/tree"))
    assert sys.meta_path == [other]
    assert sys.path == ["/tree", "/tree/kernels", "/site"]
    assert list(sys.modules) == ["torch"]


def timed(arm: str, **fields):
    about = {"model": "small-qwen2.5-vl", "workload": "answers", "mix": "equal", "data": "as shipped", "arm": arm}
    return {**about, **fields}


def test_the_document_has_every_ratio_that_was_measured():
    rows = [
        timed("trl", speedup_over_trl=1.0),
        timed("vapr shared cached", speedup_over_trl=6.54321),
        timed("vapr shared cached", speedup_over_trl=7.0, data="prebuilt"),
        timed("vapr shared cached", speedup_over_trl=9.0, mix="spread"),
        timed("vapr shared online", refused="other work"),
        timed("vapr image-shared cached", speedup_over_trl=12.0, workload="four_per_image", model="small-llava"),
        timed("vapr shared cached, alone", against="abc", speed_over_commit=1.25, memory_over_commit=0.75),
        timed("vapr shared cached, alone", against="abc", speed_over_commit=1.5, mix="spread", model="deep-llava"),
    ]
    out = document(rows, "abc")
    assert out["ratio_vs_trl"] == {
        "captions_cached": None, "captions_online": None, "short_cached": 6.543, "short_online": None,
        "image4_cached": None,
    }  # fmt: skip
    assert out["by_model"]["llava"]["image4_cached"] == 12.0
    assert out["by_model_spread"]["qwen"]["short_cached"] == 9.0
    assert out["ratio_vs_commit"] == {
        "qwen_answers": {"speed": 1.25, "memory": 0.75},
        "deep_llava_answers_spread": {"speed": 1.5, "memory": None},
    }
    assert out["refused"] == ["small-qwen2.5-vl answers equal vapr shared online: other work"]
    assert document(rows, None)["ratio_vs_commit"] is None


def test_this_tree_is_divided_by_the_other_commit():
    timings = {
        "vapr shared cached": Timing([9.0], step_mib=1.0),
        "vapr shared cached, alone": Timing([1.0, 2.0, 3.0], step_mib=150.0),
        "vapr abc shared cached, alone": Timing([1.5, 3.0, 30.0], step_mib=200.0),
    }
    ours = over_commit("vapr shared cached, alone", timings, "abc")
    assert ours == {"against": "abc", "speed_over_commit": 1.5, "memory_over_commit": 0.75}
    assert over_commit("vapr abc shared cached, alone", timings, "abc") == {}


def test_a_peer_is_absent_for_the_reason_that_holds_here():
    flash = next(peer for peer in PEERS if peer.module == "flash_pref")
    reason = why_absent(flash, {"trl": "1.16.0", "transformers": "5.24.0"}, on_gpu=False)
    assert reason.endswith("wants transformers <4.52.0,>=4.49.0, here is 5.24.0; needs a GPU")
    here = dataclasses.replace(flash, module="torch")
    fits = why_absent(here, {"transformers": "4.51.3"}, on_gpu=True)
    assert fits == "installed, but this benchmark has no arm for it"
