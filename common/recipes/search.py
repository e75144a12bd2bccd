# SPDX-License-Identifier: Apache-2.0
"""The one search recipe: flags -> data, two streams, supernet, cost -> bilevel loop -> architecture, pictures, result.

Every differentiable search runs here: full precision (bits none or 32), or bits together with operations. A search
sees the training set only; the part that trains the architecture is also the one whose accuracy it prints.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from common.cost.target import movable_error, within
from common.engine import Run, distributed, plain, read_json
from common.engine.accumulation import batches_of
from common.engine.changes import CHANGEABLE
from common.engine.cli import Config, target_of
from common.engine.environment import peak_memory_mb, versions
from common.engine.progress import duration
from common.engine.search_loop import SearchLoop, SearchOutcome, Term, search
from common.nets import Architecture, Supernet, genotype_to_json
from common.recipes.elapsed import time_before
from common.recipes.findings import (
    collapse_warning,
    cost_fields,
    epoch_row,
    epoch_text,
    evaluation_cost,
    expected_text,
    genotype_text,
    train_command,
)
from common.recipes.parts import save_parts
from common.recipes.plan import plan_search
from common.recipes.plots import plot_run, show_choices
from common.recipes.search_setup import PreparedSearch, cost_figure, prepare_search
from common.recipes.setup import open_run, tell
from common.recipes.trained import cost_text, evaluate_split


@dataclass(frozen=True)
class SearchHooks:
    """What a method adds to the one search. `prepared` is all that the search is made of, `row` an epoch's figures."""

    arch_term: Term | None = None
    """Added to the loss of the architecture step."""
    on_start: Callable[[int], None] | None = None
    """Told each epoch (from 0) before its first step."""
    figures: Callable[[PreparedSearch], dict[str, float]] | None = None
    """More figures of an epoch, after its last step; they must leave the search as it is."""
    stop: Callable[[int, dict[str, Any]], str | None] | None = None
    """Why the search ends after this epoch (from 0) with this row; None: it goes on."""
    train_flags: Sequence[str] = ()
    """Flags that the method's train.py needs to train what was found."""
    changeable: Mapping[str, str] = field(default_factory=dict)
    """Flags of the method that a search may change when it goes on, each with what is no longer exact then."""


def run_search(
    config: Config,
    *,
    method: str,
    supernet: Callable[..., Supernet] | None = None,
    prepare: Callable[[Config], PreparedSearch] | None = None,
    hooks: SearchHooks = SearchHooks(),
    on_step: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Search what the flags say and return what result.json holds (for --dry-run: what it found).

    Args:
        config: resolved flags of a search.
        method: whose search it is: the run folder's name, and whose train.py goes on.
        supernet: builds the network in place of `build_supernet`, with the same keywords.
        prepare: builds all in place of `prepare_search`: a search of another network, on the same loop.
        hooks: what the method adds.
        on_step: called with the number of steps done (tests stop a run by it).

    Raises:
        ValueError: what does not fit together, with flag, reason and cure.
        NonFiniteError: the search left the finite numbers; the last good state is saved.
    """

    def whole() -> PreparedSearch:
        found = prepare(config) if prepare is not None else prepare_search(config, supernet)
        found.loop["arch_term"] = _sum_of(found.loop["arch_term"], hooks.arch_term)
        return found

    if config.plan:
        return plan_search(config, whole)
    prepared = whole()
    if config.dry_run:
        return _dry_run(prepared)
    changeable = {**CHANGEABLE, **hooks.changeable}
    run = open_run(config, method=method, stage="search", dataset=prepared.data.info.name, changeable=changeable)
    with run:
        if run.already_finished:
            return read_json(run.folder / "result.json")
        for note in prepared.notes:
            run.log(note)
        if config.search_fraction is not None and prepared.parts is not None:
            save_parts(run, prepared.parts)
        show_choices(run, config)
        outcome = search(
            prepared.supernet,
            run=run,
            on_epoch=lambda epoch, figures: _record(run, prepared, hooks, epoch, figures),
            on_start=hooks.on_start,
            on_step=on_step,
            evaluate=None if prepared.evaluation_indices is None else lambda model: _evaluate(prepared, model),
            **prepared.loop,
        )
        result = _conclude(run, prepared, method, hooks, outcome)
        plot_run(run, config)
        run.finish(result)
        return read_json(run.folder / "result.json")


def _sum_of(one: Term | None, other: Term | None) -> Term | None:
    if one is None or other is None:
        return one or other
    return lambda model: one(model) + other(model)


def _evaluate(prepared: PreparedSearch, model: nn.Module) -> dict[str, float]:
    """Loss and accuracy of the supernet on the architecture's part of the training set."""
    data, indices = prepared.data, prepared.evaluation_indices
    found = evaluate_split(model, data.train, data.info, prepared.config.precision, indices)
    return {"valid_loss": found["loss"], "valid_top1": found["top1"]}


def _record(run: Run, prepared: PreparedSearch, hooks: SearchHooks, epoch: int, figures: dict[str, float]) -> bool:
    """An epoch's rows: history.jsonl, metrics.csv (with rates and times), stdout. Whether the search ends here."""
    more = hooks.figures(prepared) if hooks.figures is not None else {}
    row = epoch_row(prepared, figures) | more
    run.history(row, epoch=epoch)
    scalars = {key: value for key, value in row.items() if isinstance(value, float)}
    rates = [key for key in figures if key.endswith("learning_rate")]
    scalars |= {key: figures[key] for key in (*rates, "images_per_second", "seconds")}
    scalars["peak_memory_mb"] = peak_memory_mb(prepared.device)
    if run.columns is not None:  # a run that an older version began may lack some
        scalars = {key: value for key, value in scalars.items() if key in run.columns}
    steps = prepared.loop["train_stream"].steps_per_epoch
    run.metrics({"epoch": epoch, **scalars}, step=(epoch + 1) * steps)
    run.log(epoch_text(row) + "".join(f"; {name.replace('_', ' ')} {value:.4g}" for name, value in more.items()))
    reason = hooks.stop(epoch, row) if hooks.stop is not None else None
    if reason is not None:
        run.log(f"stopped after epoch {epoch + 1}: {reason}")
    return reason is not None


def _conclude(
    run: Run, prepared: PreparedSearch, method: str, hooks: SearchHooks, outcome: SearchOutcome
) -> dict[str, Any]:
    """Write the architecture and its picture; say the command that trains it; give the result."""
    config, data, model, summary = prepared.config, prepared.data, prepared.supernet, outcome.summary
    provenance = {
        "method": method,
        "supernet": getattr(config, "method", None),
        "dataset": data.info.name,
        "seed": config.seed,
        "epochs": outcome.epochs,
        "flags_digest": run.digest,
        "version": versions().get("project"),
    }
    architecture = model.architecture(plain(provenance))
    row = epoch_row(prepared, summary)
    if distributed.is_main():
        run.artefact("architecture", architecture.save(run.folder / "architecture.json"))
        _draw(run, architecture, row)
    command = train_command(config, method, run.folder, hooks.train_flags)
    run.log(f"genotype = {genotype_text(architecture.genotype)}")
    if warning := collapse_warning(row):
        run.log(warning)
    steered, measure, target = float(prepared.cost.exact(model)), prepared.cost.measure, target_of(config)
    reached = movable = None
    if target is not None:
        reached = within(steered, target)
        movable = movable_error(steered, target, prepared.cost.ends)
        run.log(
            f"target {cost_figure(target, measure)}: "
            + ("reached" if reached else "NOT reached (it counts within 10%)")
            + f", the found network has {cost_figure(steered, measure)} ({steered / target - 1:+.2%}; "
            f"{movable:+.1%} of the part that choices can move)"
        )
    found = evaluation_cost(config, data, architecture)
    run.log(f"found network: {cost_text(found)}\ntrain it:\n  {command}")
    same = ("exact_bitops", "exact_bitops_quantized", "exact_bitops_paper", "expected_bitops")
    return {
        "epochs": outcome.epochs,
        "steps": outcome.steps,
        "stopped_early": outcome.stopped_early,
        "n_train": len(data.train),
        "metrics": {key: summary.get(key) for key in ("train_loss", "train_top1", "valid_loss", "valid_top1")},
        "genotype": genotype_to_json(architecture.genotype),
        **{key: row[key] for key in (*same, "parameter_free_share", "skip_share")},
        "steered_bitops": steered if measure.name == "bitops" else None,
        "target_bitops": config.target_bitops,
        **({} if measure.name == "bitops" else cost_fields(row, config, steered, measure.name)),
        "target_reached": reached,
        "target_error_movable": movable,
        "cost": found.to_json(),
        "train_command": command,
        **time_before(config, "search"),
    }


def _draw(run: Run, architecture: Architecture, row: dict[str, Any]) -> None:
    from common.recipes.chosen import margins_of
    from common.recipes.pictures import draw_cells

    try:
        for path in draw_cells(architecture, run.folder / "cells", margins=margins_of(row, architecture)):
            run.artefact(path.name.replace(".", "_"), path)
    except (ValueError, ImportError) as error:  # a search of hours must not fail for its picture
        run.log(f"no picture: {error}")


def _dry_run(prepared: PreparedSearch) -> dict[str, Any]:
    """One step of each kind to warm up, one to be timed, and what the whole search would take."""
    config, settings = prepared.config, prepared.loop["settings"]
    loop = SearchLoop(prepared.supernet, **prepared.loop)
    loop.model.train()
    loop.start_epoch()
    batches = batches_of(prepared.loop["train_stream"], 0, 0)
    seconds = {"architecture": 0.0, "weight": 0.0}
    steps = {"architecture": loop.architecture_step, "weight": loop.weight_step}
    if not loop.arch:
        del steps["architecture"]
    for _ in range(2):
        for name, step in steps.items():
            started = time.monotonic()
            step(batches)
            if prepared.device.type == "cuda":
                torch.cuda.synchronize(prepared.device)
            seconds[name] = time.monotonic() - started
    row = epoch_row(prepared, {})
    searching = max(0, settings.epochs - settings.arch_begin_epoch) / settings.arch_every
    whole = loop.steps * (settings.epochs * seconds["weight"] + searching * seconds["architecture"])
    tell("\n".join(prepared.notes))
    tell(
        f"present choice: {row['exact_bitops'] / 1e9:.4g} G BitOps exact{expected_text(row)}"
        f"\nsteps of {config.batch_size} images: weights {seconds['weight']:.3f} s, architecture "
        f"{seconds['architecture']:.3f} s ({settings.order}), peak memory {peak_memory_mb(prepared.device):,.0f} MB; "
        f"{loop.steps} steps an epoch, {settings.epochs} epochs: about {duration(whole)} (evaluation not counted)\n"
        "dry run: nothing was written"
    )
    return {
        "dry_run": True,
        "step_seconds": seconds,
        "estimated_seconds": whole,
        "weights": sum(p.numel() for p in prepared.supernet.weight_parameters()),
        "exact_bitops": row["exact_bitops"],
    }
