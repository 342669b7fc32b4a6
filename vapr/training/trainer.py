"""train(config): the loop, read aloud."""

import contextlib
import errno
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vapr.batches.loader import PairLoader, open_loaders, warning_of_rows_in_both
from vapr.batches.steps import Step
from vapr.config import Config
from vapr.errors import UserError
from vapr.interrupts import Interrupts, TrainingStopped
from vapr.model.image_features import ImageFeatures
from vapr.model.policy import Policy
from vapr.model.reference import Reference
from vapr.pages.run_report import write_run_report
from vapr.plan.checkpointing import load_policy_to_train
from vapr.progress import Display
from vapr.training import checkpoint, run_state
from vapr.training.console import print_outcome, print_setup
from vapr.training.disk_room import check_room
from vapr.training.engine import Engine
from vapr.training.engine_deepspeed import DeepSpeedEngine
from vapr.training.extreme_pairs import shown_pairs
from vapr.training.fill_caches import open_features, open_reference
from vapr.training.late_lines import LateLines
from vapr.training.ledger import Ledger
from vapr.training.make_engine import make_engine
from vapr.training.metrics import MetricsLog, Speed, in_words
from vapr.training.model_card import write_model_card
from vapr.training.out_of_memory import FittingPacks
from vapr.training.ranks import Ranks, open_ranks
from vapr.training.run_dir import RunDir
from vapr.training.run_state import RunState
from vapr.training.same_everywhere import check_same_everywhere
from vapr.training.step import (
    TakenStep,
    check_first_margin,
    evaluate,
    steps_of_all,
    stop_unless_finite,
    train_step,
)  # fmt: skip
from vapr.training.step_clock import StepClock
from vapr.training.trackers import check_installed


def train(config: Config, *, resume: bool = False) -> Path:
    """Train the policy that ``config`` describes; return the folder of the final model.

    Raises:
        UserError: for a mistake in config, data, model or run folder.
        TrainingStopped: for a loss or gradient that is not finite, or after a signal (checkpointed).
    """
    with open_ranks(config.parallel) as ranks, contextlib.ExitStack() as opened:
        check_same_everywhere(config, ranks)
        run = opened.enter_context(ranks.in_turn(lambda: RunDir(config, resume=resume, writes=ranks.is_first)))
        opened.enter_context(_disk_faults_as_mistakes(run.path))
        if run.finished:
            print(f"{run.path}: this run is finished; its model is in {run.final}")
            return run.final
        parts = _set_up(config, run, opened, ranks)
        policy, engine, loader = parts.policy, parts.engine, parts.loader
        reference, features, fitting = parts.reference, parts.features, parts.fitting
        state = run_state.resume(run, engine, loader) if resume else RunState()
        _keep_merged_policy(run, parts)
        resumed = engine.num_updates if resume else None
        with (
            Ledger(run.path, resumed, ranks) as ledger,
            ranks.in_turn(lambda: MetricsLog.open(config, run.path, resumed, writes=ranks.is_first)) as log,
            Display("train", engine.num_steps, engine.num_updates) as display,
            Interrupts(display.say) as interrupts,
        ):
            fitting.say = display.say

            speed = Speed(policy, ranks)

            def write_down(step: _Done) -> None:
                values, margins = step.taken.read()
                stop_unless_finite(values, step.taken, run.path, ranks)
                state.add(margins, step.taken.number, loader.steps_per_epoch)
                values |= speed.of(step.taken.num_pairs, step.own, step.seconds())
                log.write(step.taken.number, values)
                display.advance(in_words(values))
                pairs = [(number, id) for number, id, _ in step.taken.pairs]
                ledger.write(step.taken.number, pairs, step.members)

            lines = LateLines(write_down)

            def save() -> Path:
                ledger.sync()
                return run_state.save(run, state, engine, [loader, parts.held_out], parts.caches, config.checkpoint)

            def is_asked_to_stop() -> bool:
                return interrupts.share(ranks.gather([interrupts.received or 0]).max())

            _take_probe(parts, run, log, display)
            if engine.num_updates and _is_due(engine, config):  # the run may have ended before this evaluation
                _evaluate(config, parts, run, log, display, interrupts)
            with _saved_on_mistakes(run, state, parts, save), _caught_up(lines, ranks):
                clock = StepClock(policy.device)
                for step in steps_of_all(ranks, loader.steps(engine.num_updates, engine.num_steps)):
                    members = loader.members(engine.num_updates)
                    if step.num_pairs == 0:
                        lines.catch_up()
                        engine.skip_step()
                        display.advance("every pair of this step was skipped")
                        ledger.write(engine.num_updates, [], members)
                        clock.start()
                    else:
                        if not lines.is_due:
                            _check_first_margin(config, parts, state, step, display.say)
                        taken = train_step(policy, engine, reference, step, config.loss, features, fitting)
                        engine.step()
                        lines.add(_Done(taken, members, speed.own(step), clock.lap()))
                    _show_messages((*parts.caches, loader), ranks, display.say)
                    stops, is_due = is_asked_to_stop(), _is_due(engine, config)
                    if stops or is_due or engine.is_sharded or _is_probe_due(parts):
                        lines.catch_up()  # DeepSpeed has waited for the device anyway
                        _take_probe(parts, run, log, display)
                    if stops or is_due:
                        _show_messages_of_others((*parts.caches, loader, parts.held_out), ranks, display.say)
                        saved = save()
                        if is_asked_to_stop():
                            _stop_after_signal(interrupts, engine, saved)
                        _evaluate(config, parts, run, log, display, interrupts)
                        _write_report(run, state, parts)
                        clock.start()
        return _save_final(config, run, parts)


@dataclass(frozen=True, slots=True, eq=False)
class _Done:
    """A step whose update the device was given, with what its lines need."""

    taken: TakenStep
    members: np.ndarray  # the rows that the order gave it
    own: tuple[float, float]  # this rank's FLOPs and memory
    seconds: Callable[[], float]


@dataclass(frozen=True, slots=True)
class _Parts:
    """The opened parts of a run."""

    policy: Policy
    engine: Engine | DeepSpeedEngine
    reference: Reference | None
    features: ImageFeatures | None
    loader: PairLoader
    held_out: PairLoader | None
    probe: Any  # a vapr.training.probe.Probe, or None
    fitting: FittingPacks

    @property
    def caches(self) -> tuple[Reference | ImageFeatures | None, ...]:
        return self.reference, self.features


def _set_up(config: Config, run: RunDir, opened: contextlib.ExitStack, ranks: Ranks) -> _Parts:
    """Open the data, load the policy and fill what has to be known before the first update."""

    def open_data() -> dict[Any, PairLoader]:
        check_installed(config.trackers)
        return opened.enter_context(open_loaders(config, rank=ranks.rank, num_ranks=ranks.size))

    opened_loaders = ranks.in_turn(open_data)  # the first rank makes the index of the rows, the others find it
    loader, held_out = opened_loaders["train"], opened_loaders.get("eval")
    if held_out is not None and (warning := warning_of_rows_in_both(loader.pairs, held_out.pairs)):
        print(warning)
    probe = ranks.agree(lambda: _open_probe(config, loader))
    torch.manual_seed(config.seed)  # the adapters' initial weights
    policy = ranks.agree(lambda: load_policy_to_train(config, ranks.size))
    num_steps = config.optim.max_steps or config.optim.epochs * loader.steps_per_epoch
    policy, engine = make_engine(config, policy, num_steps, ranks)
    features = ranks.in_turn(lambda: open_features(config, policy, loader))
    ranks.in_turn(lambda: run.describe(config, policy))
    ranks.agree(lambda: check_room(run.path, engine, policy, config.checkpoint))
    print_setup(config, policy, loader, held_out, engine)
    loaders = [loader] if held_out is None else [loader, held_out]
    fitting = FittingPacks(config.packing.share, halves=not engine.is_sharded)
    reference = open_reference(config, policy, features, loaders, ranks, fitting)
    return _Parts(policy, engine, reference, features, loader, held_out, probe, fitting)


def _keep_merged_policy(run: RunDir, parts: _Parts) -> None:
    """Keep the policy as it was before the first update, if an adapter was merged into it."""
    policy, engine = parts.policy, parts.engine
    weights = engine.whole_weights(policy) if run.keeps_merged_policy(policy) else {}
    engine.ranks.in_turn(lambda: run.keep_merged_policy(policy, weights, begins=engine.num_updates == 0))


def _check_first_margin(
    config: Config, parts: _Parts, state: RunState, step: Step, say: Callable[[str], None]
) -> None:  # fmt: skip
    """Compare the policy with its reference, if the losses have one, before the first update."""
    if state.num_pairs == 0 and parts.reference is not None:
        ranks = parts.engine.ranks
        check_first_margin(parts.policy, parts.reference, step, config.reference.tolerance, ranks, say, parts.fitting)


def _save_final(config: Config, run: RunDir, parts: _Parts) -> Path:
    """Write the final model and its card, print what the run did, and return the model's folder."""
    adapter = parts.policy.adapters is not None
    checkpoint.save_final(
        parts.policy,
        parts.engine,
        run.final,
        lambda folder: write_model_card(folder, config, run.path, None, adapter=adapter),
    )
    print_outcome(config, run, [parts.loader, parts.held_out], parts.reference, parts.engine)
    return run.final


def _open_probe(config: Config, loader: PairLoader) -> Any:
    """Open the probe, if there is to be one; its libraries (scipy, rapidfuzz) are loaded only then."""
    if config.probe.every is None:
        return None
    from vapr.training.probe import Probe

    probe = Probe(config, loader.processor)
    print(f"{'probe':<10} {probe.in_words()}")
    if config.probe.data and (warning := warning_of_rows_in_both(loader.pairs, probe.rows, "probe.data")):
        print(warning)
    return probe


def _is_probe_due(parts: _Parts) -> bool:
    """Tell whether a probe belongs after this step."""
    return parts.probe is not None and parts.probe.is_due(parts.engine.num_updates, parts.engine.num_steps)


def _take_probe(parts: _Parts, run: RunDir, log: MetricsLog, display: Display) -> None:
    """Probe the policy where a probe is due and not in the log yet."""
    step, ranks = parts.engine.num_updates, parts.engine.ranks
    if not _is_probe_due(parts):
        return

    def take() -> None:
        if ranks.is_first and step not in log.probed:  # the others wait
            values, line = parts.probe.take(parts.policy, step, run.path, display.note)
            log.write(step, values)
            display.say(f"step {step:,} {line}")

    ranks.agree(take)


def _evaluate(
    config: Config, parts: _Parts, run: RunDir, log: MetricsLog, display: Display, interrupts: Interrupts
) -> None:
    """Score the held-out pairs, unless they were at this step."""
    step = parts.engine.num_updates
    if parts.held_out is not None and step not in log.evaluated:
        note = _note_until_interrupted(run, display, interrupts)
        ranks = parts.engine.ranks
        values = evaluate(
            parts.policy, parts.reference, parts.held_out, config.loss, parts.features, ranks, note, parts.fitting
        )
        _show_messages((parts.held_out,), ranks, display.say)
        log.write_evaluation(step, values, display.say)
        if ranks.is_first:
            checkpoint.delete_old(run.path, config.checkpoint)


def _stop_after_signal(interrupts: Interrupts, engine: Engine | DeepSpeedEngine, saved: Path) -> None:
    """End all ranks after a signal, unless it was the last step."""
    if engine.num_updates < engine.num_steps:
        engine.ranks.agreed = True
        raise interrupts.stopped(saved)


def _is_due(engine: Engine | DeepSpeedEngine, config: Config) -> bool:
    """Tell whether a checkpoint and an evaluation belong after this step."""
    return engine.num_updates == engine.num_steps or engine.num_updates % config.checkpoint.every == 0


def _write_report(run: RunDir, state: RunState, parts: _Parts, *notes: str) -> None:
    if not run.writes:
        return
    shown = shown_pairs(state.extremes, parts.loader.pairs)
    asked = parts.probe.shown(run.path) if parts.probe is not None else ()
    write_run_report(run.path, shown, notes, num_steps=parts.engine.num_steps, asked=asked)


def _note_until_interrupted(run: RunDir, display: Display, interrupts: Interrupts) -> Callable[[str], None]:
    """Return a ``note`` of the display that ends an evaluation after a signal; a resumed run evaluates again."""

    def note(line: str) -> None:
        if interrupts.received:
            raise interrupts.stopped(checkpoint.list_checkpoints(run.path)[-1])
        display.note(line)

    return note


Talking = Sequence[Reference | ImageFeatures | PairLoader | None]


def _show_messages(sources: Talking, ranks: Ranks, say: Callable[[str], None]) -> None:
    """Show once what caches have to say about damaged files, and loaders about losses that do not apply; on rank 0."""
    for source in sources:
        if ranks.is_first and source is not None and source.messages:
            say("; ".join(source.messages))
            source.messages.clear()


def _show_messages_of_others(sources: Talking, ranks: Ranks, say: Callable[[str], None]) -> None:
    """Show on rank 0 what the others have kept to say; every rank calls it."""
    kept: list[str] = []
    for source in sources:
        if not ranks.is_first and source is not None:
            kept += source.messages
            source.messages.clear()
    for rank, lines in enumerate(ranks.gather_objects(kept)):
        for line in lines:
            say(f"rank {rank}: {line}")


@contextlib.contextmanager
def _caught_up(lines: LateLines[_Done], ranks: Ranks) -> Iterator[None]:
    """Write down the steps before whatever ends the run; several ranks do where all of them end for the same reason.

    What that brings to light, a loss that is not finite, was there first and takes the place of the other end.
    """
    try:
        yield
    except BaseException:
        if ranks.size == 1 or ranks.agreed:
            lines.catch_up()
        raise


@contextlib.contextmanager
def _saved_on_mistakes(run: RunDir, state: RunState, parts: _Parts, save: Callable[[], Path]) -> Iterator[None]:
    """Checkpoint the steps before a bad row or too small a GPU, which may be found hours into a run.

    Several ranks do so where all of them end for the same reason.
    """
    engine = parts.engine
    try:
        yield
    except TrainingStopped as stopped:
        _write_report(run, state, parts, f"Stopped: {stopped}")
        raise
    except (UserError, torch.OutOfMemoryError) as error:
        can_save = engine.ranks.size == 1 or engine.ranks.agreed
        with contextlib.suppress(UserError, OSError):  # a full disk as well must not hide what stopped the run
            if can_save and engine.num_updates > state.saved_step and state.num_pairs:
                save()
            if state.saved_step:
                _write_report(run, state, parts, f"Stopped: {error}")
        saved = f"; the {state.saved_step} steps before it are saved, continue with --resume"
        way_out = saved if state.saved_step else ""
        if isinstance(error, UserError):
            raise UserError(f"{error}{way_out}") from None
        raise TrainingStopped(
            f"step {engine.num_updates + 1} does not fit the GPU's memory; lower packing.max_tokens, set "
            f"policy.checkpointing: mlp or full, or policy.base_weights: nf4 (docs/memory.md){way_out}"
        ) from None


@contextlib.contextmanager
def _disk_faults_as_mistakes(folder: Path) -> Iterator[None]:
    """Raise UserError with the way out for a disk that is full or may not be written."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            way_out = "; make room and continue from the newest checkpoint with --resume"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            way_out = "; let this user read and write it, and continue from the newest checkpoint with --resume"
        else:
            raise
        raise UserError(f"{error.filename or folder}: {error.strerror}{way_out}") from None
