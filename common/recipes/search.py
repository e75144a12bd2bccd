# SPDX-License-Identifier: Apache-2.0
"""The one search recipe: flags -> data, two streams, supernet, cost -> bilevel loop -> architecture, pictures, result.

Every differentiable search runs here: full precision (bits none or 32), or bits together with operations. A search
sees the training set only; the part that trains the architecture is also the one whose accuracy it prints.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.cost import Cost, ExpectedCost, network_cost
from common.cost.target import TargetController, push_scale, within
from common.data import ImageData, Stream, evaluation_batches, split_search
from common.engine import CheckpointStore, Run, entropy, plain, read_json, seed_everything
from common.engine.cli import VOLATILE, Config
from common.engine.environment import peak_memory_mb, versions
from common.engine.progress import duration
from common.engine.search_loop import SearchLoop, SearchSettings, search
from common.nets import Architecture, Supernet, build_network, build_supernet, genotype_to_json
from common.nets.architecture import needs_bits
from common.nets.darts_space import edge_softmax
from common.recipes.presets import presets_for
from common.recipes.setup import load_data, prepare_torch, shorten, stem_of
from common.recipes.train import EVALUATION_BATCH, cost_text, evaluate_network

ROOT = Path(__file__).resolve().parents[2]
# Flags that the training shares with the search: where the data are, and what computes.
_PLACES = ("data", "data_module", "image_size", "device", "precision")


@dataclass
class PreparedSearch:
    """All that a search needs, built from its flags, before any folder is made."""

    config: Config
    device: torch.device
    data: ImageData
    supernet: Supernet
    cost: ExpectedCost
    loop: dict[str, Any]
    """Arguments of `search` and `SearchLoop`: streams, settings, criterion, terms, controller."""
    evaluation_indices: Tensor
    notes: list[str] = field(default_factory=list)

    @property
    def controller(self) -> TargetController | None:
        """The multiplier of --target-bitops, None without a target."""
        return self.loop["controller"]


# ------------------------------------------------------------------------------------------------------ preparation


def searched_bits(config: Config) -> tuple[int, ...] | None:
    """The bit-widths under search; None (full precision) for `--bits 32` or none at all."""
    return None if not config.bits or list(config.bits) == [32] else tuple(config.bits)


def prepare_search(config: Config, supernet: Callable[..., Supernet] | None = None) -> PreparedSearch:
    """Data, supernet, cost and streams, with everything refused that does not fit together (ValueError)."""
    device = prepare_torch(config)
    data = load_data(config)
    info, bits = data.info, searched_bits(config)
    seed_everything(config.seed, deterministic=config.deterministic)
    model = (supernet or build_supernet)(
        method=config.method,
        bits=bits,
        stem=stem_of(config, info.image_size),
        in_channels=info.channels,
        num_classes=info.num_classes,
        init_channels=config.init_channels,
        layers=config.layers,
        partial=config.partial,
        scheme=config.scheme,
        nodes=config.nodes,
        multiplier=config.multiplier,
        signed_activations=config.signed_activations,
        bit_mapping=config.bit_mapping,
    )
    notes = [_start_from(model, config.init_from)] if getattr(config, "init_from", None) else []
    cost = ExpectedCost(
        model,
        input_size=info.image_size,
        eval_init_channels=config.eval_init_channels,
        eval_layers=config.eval_layers,
        accounting=config.cost_accounting,
        weighting=config.cost_weighting,
        mapping=config.bit_mapping,
        stem_bits=config.stem_bits,
        classifier_bits=config.classifier_bits,
    ).to(device)
    model.to(device)
    data = data.to(device)
    loop, indices = _loop_arguments(config, data, model, cost, device)
    prepared = PreparedSearch(config, device, data, model, cost, loop, indices, notes)
    prepared.notes.insert(0, _describe(prepared))
    if config.compile:
        _compile(model, loop["settings"])
    return prepared


def _loop_arguments(
    config: Config, data: ImageData, model: Supernet, cost: ExpectedCost, device: torch.device
) -> tuple[dict[str, Any], Tensor]:
    """The streams over the two parts of the training set, the settings, and the cost terms with their controller."""
    parts = split_search(data.train.labels, config.train_portion, config.seed)
    streams = [
        Stream(
            data.train,
            data.info,
            indices=indices,
            batch_size=config.batch_size,
            seed=config.seed,
            name=name,
            augment=True,
            cutout=config.cutout_length if config.cutout else None,
            device=device,
        )
        for name, indices in zip(("search-train", "search-valid"), parts, strict=True)
    ]
    train_stream = shorten(streams[0], config.steps_per_epoch)
    controller = None
    if config.target_bitops is not None:
        controller = _controller(config, model, cost, config.epochs * train_stream.steps_per_epoch).to(device)
    arguments = {
        "train_stream": train_stream,
        "valid_stream": streams[1],
        "settings": search_settings(config),
        "criterion": nn.CrossEntropyLoss(),
        # Weights do not change the cost, so in full precision the weight step has no cost term.
        "weight_term": _term(cost, config.complexity_decay if model.bits is not None else 0.0, controller),
        "arch_term": _arch_term(config, cost, controller),
        "controller": controller,
    }
    indices = parts[1]
    if config.steps_per_epoch is not None:
        # Shortened epochs must not be outweighed by their evaluation: as many images as they train on, spread evenly.
        indices = indices[:: max(1, len(indices) // (config.steps_per_epoch * config.batch_size))]
    return arguments, indices


def _controller(config: Config, model: Supernet, cost: ExpectedCost, steps: int) -> TargetController:
    """The multiplier of --target-bitops, its push scaled to the rates and the length of this search."""
    scale, gammas = 1.0, model.gamma_parameters()
    if gammas and config.complexity_decay and config.gamma_learning_rate and config.gamma_level == "lower":
        rate = config.gamma_learning_rate / (1 - config.momentum)
        scale = push_scale(cost.term(model), gammas, weight=config.complexity_decay, rate=rate, total_steps=steps)
    return TargetController(cost, config.target_bitops, total_steps=steps, scale=scale)


def search_settings(config: Config) -> SearchSettings:
    """The loop's settings as the flags give them."""
    same = ("epochs", "learning_rate", "learning_rate_min", "momentum", "weight_decay", "grad_clip", "precision")
    more = ("arch_learning_rate", "arch_weight_decay", "gamma_learning_rate", "gamma_weight_decay", "gamma_level")
    rest = ("log_every", "checkpoint_minutes")
    return SearchSettings(
        arch_begin_epoch=config.warmup_epochs,
        warmup_epochs=config.lr_warmup_epochs,
        gamma_momentum=config.momentum,
        gamma_annealed=config.target_bitops is None,
        order=config.second_order if config.unrolled else "first",
        **{name: getattr(config, name) for name in (*same, *more, *rest)},
    )


def _term(
    cost: ExpectedCost, weight: float, controller: TargetController | None, share: float = 1.0
) -> Callable[[nn.Module], Tensor] | None:
    """What a loss adds: weight x multiplier x the cost term, of which alphas and betas feel `share`."""
    if not weight:
        return None
    if controller is None:
        return lambda model: weight * cost.term(model, share)
    return lambda model: (weight * controller.multiplier).to(model.alphas_normal.dtype) * cost.term(model, share)


def _arch_term(
    config: Config, cost: ExpectedCost, controller: TargetController | None
) -> Callable[[nn.Module], Tensor] | None:
    """The cost term of the architecture step; gammas that move there keep the full weight, alphas and betas theirs."""
    if config.gamma_level == "lower" or not config.complexity_decay:
        return _term(cost, config.arch_complexity_decay, controller)
    return _term(cost, config.complexity_decay, controller, config.arch_complexity_decay / config.complexity_decay)


def _compile(model: Supernet, settings: SearchSettings) -> None:
    if settings.order == "exact":
        raise ValueError("--compile: compiled code is not differentiated twice; use --second-order finite-difference")
    import torch._dynamo

    torch._dynamo.config.suppress_errors = True
    model.compile()


def _start_from(model: Supernet, run: Path) -> str:
    """Load the weights of an earlier search (not its alphas, betas and gammas); ValueError unless all of them fit."""
    if not (run / "config.json").is_file():
        raise ValueError(f"--init-from {run}: no run lies there (no config.json); give the folder of a search")
    record = read_json(run / "config.json")
    found = None
    if isinstance(record, dict) and record.get("stage") == "search":
        found = CheckpointStore(run / "checkpoints", config_digest=record.get("digest", "")).latest()
    if found is None:
        raise ValueError(f"--init-from {run}: holds no valid checkpoint of a search; give the folder of one")
    logits = {id(p) for p in (*model.arch_parameters(), *model.gamma_parameters())}
    chosen = {name for name, p in model.named_parameters() if id(p) in logits}
    ours = {name: tensor for name, tensor in model.state_dict().items() if name not in chosen}
    theirs = found[0]["model"]
    wrong = [name for name, t in ours.items() if name not in theirs or theirs[name].shape != t.shape]
    if wrong:
        raise ValueError(
            f"--init-from {run}: {len(wrong)} of its tensors do not fit, first {wrong[0]}; start from a search of the "
            "same --method, --layers, --init-channels, --partial, --nodes, --stem, --scheme and data"
        )
    model.load_state_dict({name: theirs[name] for name in ours}, strict=False)
    return f"started from {run} (after epoch {found[0]['epoch']}): {len(ours)} tensors loaded"


def _describe(prepared: PreparedSearch) -> str:
    config, data, model = prepared.config, prepared.data, prepared.supernet
    info, loop, cost = data.info, prepared.loop, prepared.cost
    weights = sum(p.numel() for p in model.weight_parameters())
    gammas = sum(p.numel() for p in model.gamma_parameters())
    alphas = sum(p.numel() for p in model.arch_parameters())
    bits = "full precision" if model.bits is None else f"bits {', '.join(map(str, model.bits))}"
    lines = [
        f"supernet: {config.method}, {config.init_channels} channels, {config.layers} cells, {bits}: "
        f"{weights / 1e6:.3f} M weights, {alphas} alphas and betas, {gammas} gammas",
        f"data: {info.name}, {len(data.train):,} training images {info.channels}x{info.image_size}x{info.image_size},"
        f" {config.train_portion:.0%} for weights, the rest for the architecture; "
        f"{loop['train_stream'].steps_per_epoch} steps an epoch, {config.epochs} epochs",
        f"cost: of {config.eval_layers} cells of {config.eval_init_channels} channels, {cost.cheapest / 1e9:.4g} to "
        f"{cost.dearest / 1e9:.4g} G BitOps can be reached, {cost.initial / 1e9:.4g} G expected at the start",
    ]
    if config.target_bitops is not None:
        lines.append(f"target: {config.target_bitops / 1e9:.4g} G BitOps, within 10%")
    return "\n".join([*lines, *(note for key in ("train_stream", "valid_stream") for note in _stream_notes(loop[key]))])


def _stream_notes(stream: Any) -> tuple[str, ...]:
    return getattr(getattr(stream, "stream", stream), "notes", ())


# ------------------------------------------------------------------------------------------------------ what was found


def evaluation_cost(config: Config, data: ImageData, architecture: Architecture) -> Cost:
    """Exact cost of the network that the architecture would be trained as. Nothing is computed, no random drawn."""
    info = data.info
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        network = build_network(
            architecture,
            stem=stem_of(config, info.image_size),
            in_channels=info.channels,
            num_classes=info.num_classes,
            init_channels=config.eval_init_channels,
            layers=config.eval_layers,
            scheme=config.scheme,
            stem_bits=config.stem_bits,
            classifier_bits=config.classifier_bits,
        )
    return network_cost(network, info.image_size)


def parameter_free_share(architecture: Architecture) -> float:
    """Share of the genotype's operations without weights: pooling, and the identity (not a reduction's halving)."""
    free = []
    for reduction, pairs in ((False, architecture.genotype.normal), (True, architecture.genotype.reduce)):
        free += [not needs_bits(name, 2 if reduction and state < 2 else 1) for name, state in pairs]
    return sum(free) / len(free)


@torch.no_grad()
def epoch_row(prepared: PreparedSearch, figures: dict[str, float]) -> dict[str, Any]:
    """A line of history.jsonl: what the search would give now, and how sure it is. Free of clock and machine."""
    model, cost, controller = prepared.supernet, prepared.cost, prepared.controller
    architecture = model.architecture()
    found = evaluation_cost(prepared.config, prepared.data, architecture)
    data = architecture.to_json()
    betas = None
    if model.betas_normal is not None and model.betas_reduce is not None:
        pairs = {"normal": model.betas_normal, "reduce": model.betas_reduce}
        betas = {kind: _rounded(edge_softmax(logits, model.nodes)) for kind, logits in pairs.items()}
    gammas = list(model.gamma_parameters())
    row = {
        "genotype": data["genotype"],
        "bits": data["bits"],
        **{key: figures.get(key) for key in ("train_loss", "train_top1", "valid_loss", "valid_top1")},
        "expected_bitops": float(cost(model)),
        "exact_bitops": float(found.bitops),
        "exact_bitops_quantized": float(found.bitops_quantized),
        "exact_bitops_paper": float(found.bitops_paper),
        "alpha_entropy": float(entropy(torch.cat([model.alphas_normal, model.alphas_reduce]))),
        "gamma_entropy": float(entropy(torch.cat([g.flatten(0, -2) for g in gammas]))) if gammas else None,
        "parameter_free_share": parameter_free_share(architecture),
        "alphas": {kind: _rounded(getattr(model, f"alphas_{kind}").softmax(-1)) for kind in ("normal", "reduce")},
        "betas": betas,
        # The mean probability of each bit-width, by kind of cell and operand.
        "gammas": {name: _rounded(g.softmax(-1).flatten(0, -2).mean(0)) for name, g in model.gammas.items()},
    }
    if controller is not None:
        row["cost_multiplier"] = float(controller.multiplier)
        row["steered_bitops"] = float(cost.exact(model))
    return row


def _rounded(values: Tensor) -> list[Any]:
    return torch.round(values.double(), decimals=6).tolist()


def _epoch_text(row: dict[str, Any]) -> str:
    """What is printed of an epoch."""
    genotype = row["genotype"]
    text = "\n".join(
        [
            f"  genotype: normal {_pairs(genotype['normal'])}",
            f"            reduce {_pairs(genotype['reduce'])}",
            f"  train loss {row['train_loss']:.4f}, top-1 {100 * row['train_top1']:.2f}%; "
            f"valid loss {row['valid_loss']:.4f}, top-1 {100 * row['valid_top1']:.2f}%",
            f"  BitOps expected {row['expected_bitops'] / 1e9:.4g} G, exact {row['exact_bitops'] / 1e9:.4g} G "
            f"({row['exact_bitops_quantized'] / 1e9:.4g} G in quantised layers); "
            f"{row['parameter_free_share']:.0%} of the operations without parameters",
            f"  entropy of alphas {row['alpha_entropy']:.4f}"
            + (f", of gammas {row['gamma_entropy']:.4f}" if row["gamma_entropy"] is not None else ""),
        ]
    )
    if "cost_multiplier" in row:
        text += f"; cost multiplier {row['cost_multiplier']:+.3f}, steered cost {row['steered_bitops'] / 1e9:.4g} G"
    return text


def _pairs(pairs: list[list[Any]]) -> str:
    return " ".join(f"{name}:{state}" for name, state in pairs)


# ------------------------------------------------------------------------------------------------------ the search


def run_search(
    config: Config,
    *,
    method: str,
    supernet: Callable[..., Supernet] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Search what the flags say and return what result.json holds (for --dry-run: what it found).

    Args:
        config: resolved flags of a search.
        method: whose search it is: the run folder's name, and whose train.py goes on.
        supernet: builds the network in place of `build_supernet`, with the same keywords.
        on_step: called with the number of steps done (tests stop a run by it).

    Raises:
        ValueError: what does not fit together, with flag, reason and cure.
        NonFiniteError: the search left the finite numbers; the last good state is saved.
    """
    prepared = prepare_search(config, supernet)
    if config.dry_run:
        return _dry_run(prepared)
    run = Run.open(
        method=method,
        stage="search",
        dataset=prepared.data.info.name,
        seed=config.seed,
        config=config.as_dict(),
        sources=config.sources,
        argv=sys.argv,
        root=config.runs,
        save=config.save,
        resume=Path(config.resume) if config.resume not in (None, "auto") else config.resume,
        volatile=VOLATILE,
        tensorboard=config.tensorboard,
    )
    with run:
        if run.already_finished:
            return read_json(run.folder / "result.json")
        for note in prepared.notes:
            run.log(note)
        outcome = search(
            prepared.supernet,
            run=run,
            on_epoch=lambda epoch, figures: _record(run, prepared, epoch, figures),
            on_step=on_step,
            evaluate=lambda model: _evaluate(prepared, model),
            **prepared.loop,
        )
        result = _conclude(run, prepared, method, outcome.epochs, outcome.steps, outcome.summary)
        run.finish(result)
        return read_json(run.folder / "result.json")


def _evaluate(prepared: PreparedSearch, model: nn.Module) -> dict[str, float]:
    """Loss and accuracy of the supernet on the architecture's part of the training set."""
    info = prepared.data.info
    batches = evaluation_batches(
        prepared.data.train, info, EVALUATION_BATCH, prepared.device, indices=prepared.evaluation_indices
    )
    found = evaluate_network(model, batches, info.num_classes, prepared.config.precision)
    return {"valid_loss": found["loss"], "valid_top1": found["top1"]}


def _record(run: Run, prepared: PreparedSearch, epoch: int, figures: dict[str, float]) -> None:
    """An epoch's rows: history.jsonl, metrics.csv (with rates and times), and the lines on stdout."""
    row = epoch_row(prepared, figures)
    run.history(row, epoch=epoch)
    scalars = {key: value for key, value in row.items() if isinstance(value, float)}
    scalars |= {key: figures[key] for key in ("learning_rate", "images_per_second", "seconds")}
    scalars["peak_memory_mb"] = peak_memory_mb(prepared.device)
    steps = prepared.loop["train_stream"].steps_per_epoch
    run.metrics({"epoch": epoch, **scalars}, step=(epoch + 1) * steps)
    run.log(_epoch_text(row))


def _conclude(
    run: Run, prepared: PreparedSearch, method: str, epochs: int, steps: int, summary: dict[str, float]
) -> dict[str, Any]:
    """Write the architecture and its picture; say the command that trains it; give the result."""
    config, data, model = prepared.config, prepared.data, prepared.supernet
    provenance = {
        "method": method,
        "dataset": data.info.name,
        "seed": config.seed,
        "epochs": epochs,
        "flags_digest": run.digest,
        "version": versions().get("project"),
    }
    architecture = model.architecture(plain(provenance))
    run.artefact("architecture", architecture.save(run.folder / "architecture.json"))
    _draw(run, architecture)
    row = epoch_row(prepared, summary)
    command = train_command(config, method, run.folder)
    steered = float(prepared.cost.exact(model))
    reached = None
    if config.target_bitops is not None:
        reached = within(steered, config.target_bitops)
        run.log(
            f"target {config.target_bitops / 1e9:.4g} G BitOps: "
            + ("reached" if reached else "NOT reached (it counts within 10%)")
            + f", the found network has {steered / 1e9:.4g} G ({steered / config.target_bitops - 1:+.1%})"
        )
    found = evaluation_cost(config, data, architecture)
    run.log(f"found network: {cost_text(found)}\ntrain it:\n  {command}")
    same = ("exact_bitops", "exact_bitops_quantized", "exact_bitops_paper", "expected_bitops", "parameter_free_share")
    return {
        "epochs": epochs,
        "steps": steps,
        "n_train": len(data.train),
        "metrics": {key: summary.get(key) for key in ("train_loss", "train_top1", "valid_loss", "valid_top1")},
        "genotype": genotype_to_json(architecture.genotype),
        **{key: row[key] for key in same},
        "steered_bitops": steered,
        "target_bitops": config.target_bitops,
        "target_reached": reached,
        "cost": found.to_json(),
        "train_command": command,
    }


def _draw(run: Run, architecture: Architecture) -> None:
    from common.recipes.pictures import draw_cells

    try:
        for path in draw_cells(architecture, run.folder / "cells"):
            run.artefact(path.name.replace(".", "_"), path)
    except (ValueError, ImportError) as error:  # a search of hours must not fail for its picture
        run.log(f"no picture: {error}")


def train_command(config: Config, method: str, folder: Path) -> str:
    """The command that trains what was found, as typed in the present folder."""
    flags = ["--arch", os.path.relpath(folder), "--dataset", config.dataset]
    if config.preset:
        flags = ["--preset", config.preset, *flags]
    flags += ["--init-channels", str(config.eval_init_channels), "--layers", str(config.eval_layers)]
    defaults = {"stem": "auto", "scheme": "default", "stem_bits": 32, "classifier_bits": 32, "bit_mapping": "relative"}
    defaults |= {"data": None, "data_module": None, "image_size": None, "device": "auto", "precision": "fp32"}
    defaults |= presets_for("train").get(config.preset or "", {})  # train.py will take them from the preset
    for name in ("stem", "scheme", "stem_bits", "classifier_bits", "bit_mapping", *_PLACES):
        value = getattr(config, name)
        if value != defaults[name] and value is not None:
            flags += [f"--{name.replace('_', '-')}", str(value)]
    if config.signed_activations:
        flags.append("--signed-activations")
    return shlex.join(["python", os.path.relpath(ROOT / method / "train.py"), *flags])


def _dry_run(prepared: PreparedSearch) -> dict[str, Any]:
    """One step of each kind to warm up, one to be timed, and what the whole search would take."""
    config, settings = prepared.config, prepared.loop["settings"]
    loop = SearchLoop(prepared.supernet, **prepared.loop)
    loop.model.train()
    loop.start_epoch()
    batch = prepared.loop["train_stream"].batch(0, 0)
    seconds = {"architecture": 0.0, "weight": 0.0}
    for _ in range(2):
        for name, step in (("architecture", loop.architecture_step), ("weight", loop.weight_step)):
            started = time.monotonic()
            step(batch)
            if prepared.device.type == "cuda":
                torch.cuda.synchronize(prepared.device)
            seconds[name] = time.monotonic() - started
    row = epoch_row(prepared, {})
    searching = max(0, settings.epochs - settings.arch_begin_epoch)
    whole = loop.steps * (settings.epochs * seconds["weight"] + searching * seconds["architecture"])
    print("\n".join(prepared.notes))
    print(
        f"present choice: {row['exact_bitops'] / 1e9:.4g} G BitOps exact, {row['expected_bitops'] / 1e9:.4g} G expected"
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
