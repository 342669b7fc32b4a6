"""train(config): the loop, read aloud."""

import contextlib
import errno
import math
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vapr.batches.loader import PairLoader, Step, open_loader, warning_of_rows_in_both
from vapr.batches.packing import PackedBatch
from vapr.batches.workers import open_workers
from vapr.config import Config
from vapr.errors import UserError
from vapr.interrupts import Interrupts, TrainingStopped
from vapr.model.image_features import Features
from vapr.model.logps import token_logps
from vapr.model.policy import Policy, frozen, load_policy
from vapr.model.reference import Reference, first_margin
from vapr.pages.run_report import write_run_report
from vapr.progress import Display
from vapr.training import checkpoint
from vapr.training.engine import Engine
from vapr.training.extreme_pairs import Extremes, shown_pairs
from vapr.training.fill_caches import open_features, open_reference, shared_image_features
from vapr.training.metrics import MetricsLog, Totals, held_out_in_words, in_words, speed
from vapr.training.run_dir import RunDir
from vapr.training.trackers import check_installed, open_trackers
from vapr_kernels import naive, preference_loss


def train(config: Config, *, resume: bool = False) -> Path:
    """Train the policy that ``config`` describes; returns the folder of the final model.

    Raises:
        UserError: for a mistake in config, data, model or run folder.
        TrainingStopped: for a loss or gradient that is not finite, or after a signal (checkpointed).
    """
    with RunDir(config, resume=resume) as run:
        if run.finished:
            print(f"{run.path}: this run is finished; its model is in {run.final}")
            return run.final
        try:
            _train(config, run, resume=resume)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"{error.filename or run.path}: {error.strerror}; make room and continue from the newest checkpoint "
                "with --resume"
            ) from None
        return run.final


def _train(config: Config, run: RunDir, *, resume: bool) -> None:
    check_installed(config.trackers)
    with open_workers(config) as workers:
        loader = open_loader(config, "train", workers)
        held_out = open_loader(config, "eval", workers) if config.data.eval else None
        if held_out is not None and (warning := warning_of_rows_in_both(loader.pairs, held_out.pairs)):
            print(warning)
        _train_on(config, run, loader, held_out, resume=resume)


def _train_on(config: Config, run: RunDir, loader: PairLoader, held_out: PairLoader | None, *, resume: bool) -> None:
    torch.manual_seed(config.seed)  # the adapters' initial weights
    policy = load_policy(config.policy, kernels=config.kernels)
    features = open_features(config, policy, loader)
    num_steps = config.optim.max_steps or config.optim.epochs * loader.steps_per_epoch
    engine = Engine(policy, config.optim, num_steps)
    run.describe(config, policy)
    _say_what_runs(config, policy, engine, loader, held_out, num_steps)
    reference = open_reference(config, policy, features, [loader] if held_out is None else [loader, held_out])

    extremes = Extremes()
    start, num_pairs = _resume(run, engine, loader, extremes) if resume else (0, 0)
    _keep_start(policy, run, begins=start == 0)
    since = start if resume else None
    log = MetricsLog(run.path, since, open_trackers(config, run.path, since))
    display = Display("train", num_steps, done=start)
    with contextlib.closing(log), contextlib.closing(display), Interrupts(display.say) as interrupts:
        training = _Training(
            config, run, policy, engine, loader, held_out, reference, features, log, display, extremes, num_steps,
            start, start, num_pairs,
        )  # fmt: skip
        if start and training.is_due:
            training.evaluate(interrupts)  # the run may have ended between the checkpoint and its evaluation
        with training.saved_on_mistakes():
            for step in loader.steps(start, num_steps):
                training.take(step)
                if training.is_due or interrupts.received:
                    saved = training.save()
                    if interrupts.received and training.done < num_steps:
                        raise interrupts.stopped(saved)
                    training.evaluate(interrupts)
                    training.report()
    checkpoint.save_final(policy, run.final)
    _say_what_was_done(config, run, loader, held_out, reference)


@dataclass(slots=True, eq=False)
class _Training:
    """A run under way: what the loop does with each step."""

    config: Config
    run: RunDir
    policy: Policy
    engine: Engine
    loader: PairLoader
    held_out: PairLoader | None
    reference: Reference | None
    features: Features | None
    log: MetricsLog
    display: Display
    extremes: Extremes
    num_steps: int  # of the whole run
    done: int  # steps
    saved: int  # steps in the newest checkpoint
    num_pairs: int  # trained on so far
    began: float = field(default_factory=time.monotonic)  # the step under way

    @property
    def is_due(self) -> bool:
        """Whether a checkpoint and an evaluation belong here."""
        return self.done == self.num_steps or self.done % self.config.checkpoint.every == 0

    def take(self, step: Step) -> None:
        """Forward, backward, update, log."""
        if step.num_pairs == 0:
            self.engine.skip_step()
            self.done += 1
            self.display.advance("every pair of this step was skipped")
            return
        if self.num_pairs == 0 and self.reference is not None:
            _check_first_margin(self.config, self.policy, self.reference, step, self.display)
        values, margins = train_step(
            self.config, self.policy, self.engine, self.reference, step, features=self.features
        )
        _stop_unless_finite(values, step, self.done + 1, self.run.path)
        self.engine.step()
        self.done += 1
        self.num_pairs += step.num_pairs
        self.extremes.add((self.done - 1) // self.loader.steps_per_epoch, self.done, margins)
        values |= speed(self.policy, step, time.monotonic() - self.began)
        self.log.write(self.done, values)
        self.display.advance(in_words(values))
        for cache in (self.reference, self.features):
            if cache is not None and cache.messages:
                self.display.say("; ".join(cache.messages))
                cache.messages.clear()
        self.began = time.monotonic()

    def save(self) -> Path:
        """Checkpoint, reference values and the list of skipped pairs; returns the checkpoint's folder."""
        if self.num_pairs == 0 and self.done == self.num_steps:
            first = next(iter(self.loader.skipped.values()))
            raise UserError(f"data.train: every pair was skipped; the first: {first}")
        if self.reference is not None:
            self.reference.flush()
        if self.features is not None:
            self.features.flush()
        _list_skipped(self.run, self.loader, self.held_out)
        state = {
            "num_pairs": self.num_pairs,
            "skipped": self.loader.skipped,
            "data": self.loader.digest,
            "extremes": self.extremes.state(),
            "num_steps": self.num_steps,
        }
        self.saved = self.done
        return checkpoint.save(self.run.path, self.done, self.engine, state, self.config.checkpoint)

    def evaluate(self, interrupts: Interrupts) -> None:
        """Score the held-out pairs and print what came out, unless that was done at this step."""

        def note(line: str) -> None:
            if interrupts.received:  # a resumed run scores them again
                raise interrupts.stopped(checkpoint.list_checkpoints(self.run.path)[-1])
            self.display.note(line)

        if self.held_out is not None and self.done not in self.log.evaluated:
            values = evaluate(self.config, self.policy, self.reference, self.held_out, note, features=self.features)
            if values:
                self.log.write(self.done, values)
                self.display.say(held_out_in_words(self.done, self.log.evaluated, values))
            checkpoint.delete_old(self.run.path, self.config.checkpoint)
        self.began = time.monotonic()

    def report(self, *notes: str) -> None:
        """Write report.html."""
        shown = shown_pairs(self.extremes, self.loader.pairs)
        write_run_report(self.run.path, shown, notes, num_steps=self.num_steps)

    @contextlib.contextmanager
    def saved_on_mistakes(self) -> Iterator[None]:
        """A bad row or too small a GPU, found hours into a run, costs no step: they are checkpointed first."""
        try:
            yield
        except TrainingStopped as stopped:
            self.report(f"Stopped: {stopped}")
            raise
        except (UserError, torch.OutOfMemoryError) as error:
            way_out = ""
            if self.done > self.saved and self.num_pairs:
                self.save()
            if self.saved:
                way_out = f"; the {self.saved} steps before it are saved, continue with --resume"
                self.report(f"Stopped: {error}")
            if isinstance(error, UserError):
                raise UserError(f"{error}{way_out}") from None
            raise TrainingStopped(
                f"step {self.done + 1} does not fit the GPU's memory; lower packing.max_tokens or set "
                f"policy.gradient_checkpointing: true{way_out}"
            ) from None


def train_step(
    config: Config, policy: Policy, engine: Engine, reference: Reference | None, step: Step,
    *, features: Features | None = None,
) -> tuple[dict[str, Any], list[tuple[int, float]]]:  # fmt: skip
    """Forward and backward of every micro-batch of a step; the update is the caller's.

    Returns:
        What is logged, and (row number, margin) of every pair.
    """
    totals = Totals()
    margins = []
    for cpu_batch in step.batches:
        batch = cpu_batch.to(policy.device)
        logps, losses, rewards = score(config, policy, reference, batch, step, features=features)
        margins.append(rewards[0] - rewards[1])
        if losses.requires_grad:  # not where only the tower is trained and no pair of the pack has an image
            engine.backward(losses.sum() / step.num_pairs)
        totals.add(losses, *rewards, logps)
    values = {
        **totals.means(),
        "grad_norm": float(engine.gradient_norm()),  # waits for the device
        "lr": engine.lr,
        "pairs": step.num_pairs,
        "tokens": step.num_tokens,
        "tokens_saved": step.num_tokens_unshared - step.num_tokens,
    }
    return values, list(zip((pair.number for pair in step.pairs), torch.cat(margins).tolist(), strict=True))


def score(
    config: Config, policy: Policy, reference: Reference | None, batch: PackedBatch, step: Step,
    *, features: Features | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
    """Policy log-probs (P, 2), weighted losses (P,), and (chosen, rejected) rewards (P,) of a micro-batch."""
    shared = shared_image_features(policy, batch, features)
    reference_logps = reference.logps(batch, shared) if reference is not None else None  # (M,)
    logps = token_logps(policy, batch, shared, reference_logps)  # (L,)
    loss = preference_loss if policy.kernels else naive.preference_loss
    losses, rewards, counted = loss(
        logps, reference_logps, batch.completions, config.loss,
        mean_chosen_length=(step.num_chosen_tokens or 1.0) / step.num_pairs,
    )  # fmt: skip
    return counted, losses, (rewards[:, 0], rewards[:, 1])


def evaluate(
    config: Config, policy: Policy, reference: Reference | None, held_out: PairLoader, say: Callable[[str], None],
    *, features: Features | None = None,
) -> dict[str, float]:  # fmt: skip
    """The training metrics on held-out pairs, keys ``eval/...``."""
    totals = Totals()
    with frozen(policy):
        for step in held_out.steps(0, held_out.steps_per_epoch):
            for cpu_batch in step.batches:
                batch = cpu_batch.to(policy.device)
                logps, losses, rewards = score(config, policy, reference, batch, step, features=features)
                totals.add(losses, *rewards, logps)
                say(f"scoring held-out pairs {totals.num_pairs}/{held_out.pairs_per_epoch}")
    if not totals.num_pairs:  # no reason to lose a trained model
        print(f"data.eval: no pair could be used; the first: {next(iter(held_out.skipped.values()))}")
        return {}
    return {f"eval/{name}": value for name, value in totals.means().items()}


def _check_first_margin(config: Config, policy: Policy, reference: Reference, step: Step, display: Display) -> None:
    before = reference.hits + reference.misses
    largest, allowed = first_margin(policy, reference, step.batches)
    reference.hits -= reference.hits + reference.misses - before  # the step itself looks the same values up again
    allowed = config.reference.tolerance or allowed
    display.say(f"first step: largest |log-ratio| to the reference {largest:.2e} (tolerance {allowed:.2e})")
    if not largest <= allowed:
        raise UserError(
            f"the policy differs from its reference before the first update: |log-ratio| {largest:.2e} exceeds "
            f"{allowed:.2e}; delete {reference.folder}, or raise reference.tolerance if you know why"
        )


def _resume(run: RunDir, engine: Engine, loader: PairLoader, extremes: Extremes) -> tuple[int, int]:
    """Restore the newest whole checkpoint; returns the steps done and the pairs trained on."""
    folders = checkpoint.list_checkpoints(run.path)
    if not folders:
        print(f"{run.path}: no checkpoint yet; starting from the beginning")
        return 0, 0
    state = checkpoint.load(folders[-1], engine)
    if state["data"] != loader.digest:
        raise UserError(
            f"data.train: the pairs changed since {run.path} was started, or data.verdicts did; restore them, or give "
            "another run_dir"
        )
    loader.skipped.update(state["skipped"])
    extremes.restore(state["extremes"])
    print(f"{run.path}: resuming after step {state['step']} ({folders[-1].name})")
    return state["step"], state["num_pairs"]


def _keep_start(policy: Policy, run: RunDir, *, begins: bool) -> None:
    """Keep a merged policy in the run's folder, where the adapters trained on it find their base."""
    if begins and run.start.is_dir():
        shutil.rmtree(run.start)  # of a run that never took a step
    if policy.merged is None or policy.adapters is None:
        return
    if not run.start.is_dir():
        checkpoint.save_start(policy, run.start)
    policy.adapters.peft_config["default"].base_model_name_or_path = str(run.start.resolve())
    print(f"base       {run.start} holds the merged policy, which the run's adapter needs", flush=True)


def _stop_unless_finite(values: dict[str, Any], step: Step, number: int, run_dir: Path) -> None:
    bad = [name for name in ("loss", "grad_norm") if not math.isfinite(values[name])]
    if not bad:
        return
    rows = [f"{pair.where} ({pair.id})" for pair in step.pairs]
    listed = run_dir / f"not-finite-step-{number:06d}.json"
    checkpoint.write_json(listed, {"step": number, **{name: str(values[name]) for name in bad}, "pairs": rows})
    raise TrainingStopped(
        f"step {number}: {' and '.join(bad)} {'is' if len(bad) == 1 else 'are'} not finite; stopped before the update, "
        f"checkpoints are kept. Pairs of this step ({listed}): {', '.join(rows[:8])}"
        + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
    )


def _say_what_runs(
    config: Config, policy: Policy, engine: Engine, loader: PairLoader,
    held_out: PairLoader | None, num_steps: int,
) -> None:  # fmt: skip
    trained = sum(master.numel() for master in engine.masters.values())
    how = "LoRA" if policy.adapters is not None else "full"
    eval_pairs = f", {held_out.pairs_per_epoch:,} held out" if held_out is not None else ""
    size = f"{how}, {trained:,} trained parameters, {config.policy.dtype}"
    print(f"policy     {config.policy.model} ({policy.family}), {size}")
    runs_on = f"{policy.device}, attention {policy.attention_backend}, {policy.operations}"
    print(f"runs on    {runs_on}, images by {loader.image_backend}")
    print(
        f"data       {loader.pairs_per_epoch:,} pairs{eval_pairs}, {num_steps:,} steps of {loader.pairs_per_step} pairs"
    )
    if policy.merged is not None:
        print(f"merged     {policy.merged}")
    names = {"sigmoid": "sigmoid (DPO)"}
    losses = " + ".join(f"{term.weight:g} {names.get(term.kind, term.kind)}" for term in config.loss)
    print(f"loss       {losses}, share {config.packing.share}")
    print(f"run_dir    {config.run_dir}", flush=True)


def _say_what_was_done(
    config: Config, run: RunDir, loader: PairLoader, held_out: PairLoader | None, reference: Reference | None
) -> None:
    if reference is not None:
        counted = f"{reference.hits:,} completions found in the cache, {reference.misses:,} computed"
        print(f"reference  {counted} ({reference.folder})")
    if num_skipped := _list_skipped(run, loader, held_out):
        print(f"skipped    {num_skipped} pairs, listed with reasons in {run.path / 'skipped.json'}")
    if config.checkpoint.best and (best := checkpoint.best_checkpoint(run.path, config.checkpoint.best_metric)):
        print(f"best       {best[0].name}, {config.checkpoint.best_metric} {best[1]:.4g}")
    print(f"report     {run.path / 'report.html'}")
    print(f"final      {run.final}")
    print(f"next       vapr export {shlex.quote(str(run.path))} --out {shlex.quote(f'{run.path}-model')}")


def _list_skipped(run: RunDir, loader: PairLoader, held_out: PairLoader | None) -> int:
    """Write the pairs left out so far, place in the file -> reason; returns how many."""
    skipped = {**loader.skipped, **(held_out.skipped if held_out is not None else {})}
    listed = run.path / "skipped.json"
    if skipped:
        checkpoint.write_json(listed, skipped)
    else:
        listed.unlink(missing_ok=True)
    return len(skipped)
