# SPDX-License-Identifier: Apache-2.0
"""What a search has found so far: its cost, how sure it is, the row of an epoch, and the command that trains it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.cost import Cost, architecture_cost
from common.cost.measures import UNITS
from common.data import ImageData
from common.engine import entropy
from common.engine.cli import Config, target_of
from common.nets import Architecture
from common.nets.architecture import needs_bits
from common.nets.darts_space import edge_softmax
from common.recipes.presets import presets_for
from common.recipes.search_setup import PreparedSearch
from common.recipes.setup import stem_of
from genotypes import Genotype

ROOT = Path(__file__).resolve().parents[2]
# Flags that the training shares with the search: where the data are, and what computes.
_FILES = ("data", "trainfile", "valfile", "data_module")
_PLACES = (*_FILES, "classes", "image_size", "search_space", "device", "precision")


def evaluation_cost(config: Config, data: ImageData, architecture: Architecture) -> Cost:
    """Exact cost of the network that the architecture would be trained as. Nothing is computed, no random drawn."""
    info = data.info
    return architecture_cost(
        architecture,
        info.image_size,
        stem=stem_of(config, info.image_size),
        in_channels=info.channels,
        num_classes=info.num_classes,
        init_channels=config.eval_init_channels,
        layers=config.eval_layers,
        scheme=config.scheme,
        stem_bits=config.stem_bits,
        classifier_bits=config.classifier_bits,
    )


def parameter_free_share(architecture: Architecture) -> float:
    """Share of the genotype's operations without weights: pooling, and the identity (not a reduction's halving)."""
    free = []
    for reduction, pairs in ((False, architecture.genotype.normal), (True, architecture.genotype.reduce)):
        free += [not needs_bits(name, 2 if reduction and state < 2 else 1) for name, state in pairs]
    return sum(free) / len(free)


def count_skips(pairs: Sequence[Sequence[Any]]) -> int:
    """Skip connections among a cell's (primitive, state) pairs."""
    return sum(name == "skip_connect" for name, _ in pairs)


def skip_shares(architecture: Architecture) -> dict[str, float]:
    """Share of skip connections among the operations of both cells, and of each: where a search collapses, it grows."""
    cells = {"normal": architecture.genotype.normal, "reduce": architecture.genotype.reduce}
    skips = {kind: count_skips(pairs) for kind, pairs in cells.items()}
    shares = {f"skip_share_{kind}": skips[kind] / len(pairs) for kind, pairs in cells.items()}
    return {"skip_share": sum(skips.values()) / sum(map(len, cells.values())), **shares}


def collapse_warning(row: dict[str, Any]) -> str | None:
    """What is said of a normal cell half of whose operations, or more, are skip connections; else None."""
    pairs = row["genotype"]["normal"]
    skips = count_skips(pairs)
    if row["alphas"] is None or 2 * skips < len(pairs):
        return None
    return (
        f"warning: {skips} of {len(pairs)} operations of the normal cell are skip connections: the search "
        "has collapsed, as differentiable searches do, and such cells train badly; try fewer epochs or another seed"
    )


@torch.no_grad()
def epoch_row(prepared: PreparedSearch, figures: dict[str, float]) -> dict[str, Any]:
    """A line of history.jsonl: what the search would give now, and how sure it is. Free of clock and machine."""
    model, cost, controller = prepared.supernet, prepared.cost, prepared.controller
    architecture = model.architecture()
    found = evaluation_cost(prepared.config, prepared.data, architecture)
    data = architecture.to_json()
    alphas, betas = _logits(model, "alphas"), _logits(model, "betas")
    row = {
        "genotype": data["genotype"],
        "bits": data["bits"],
        **{key: figures.get(key) for key in ("train_loss", "train_top1", "valid_loss", "valid_top1")},
        "expected_bitops": float(cost(model)) if cost.measure.name == "bitops" else None,
        "exact_bitops": float(found.bitops),
        "exact_bitops_quantized": float(found.bitops_quantized),
        "exact_bitops_paper": float(found.bitops_paper),
        "alpha_entropy": _entropy(alphas),
        "gamma_entropy": _entropy(model.gammas),
        "parameter_free_share": parameter_free_share(architecture),
        **skip_shares(architecture),
        "alphas": {kind: _rounded(logits.softmax(-1)) for kind, logits in alphas.items()} or None,
        "betas": {kind: _rounded(edge_softmax(logits, model.nodes)) for kind, logits in betas.items()} or None,
        # The mean probability of each bit-width, by kind of cell and operand.
        "gammas": {name: _rounded(g.softmax(-1).flatten(0, -2).mean(0)) for name, g in model.gammas.items()},
        # The same by place: [cells, edges, bits], the mean over an edge's primitives, or [convolutions, bits].
        "gammas_by_place": {name: _rounded(_by_place(g), 4) for name, g in model.gammas.items()},
        "primitives": list(getattr(model, "primitives", ())) or None,
        "bit_choices": list(getattr(model, "bits", None) or ()) or None,
    }
    if cost.measure.name != "bitops":
        row |= {"cost_measure": cost.measure.name, "expected_cost": float(cost(model))}
        row["exact_cost"] = float(cost.exact(model))
    if controller is not None:
        row["cost_multiplier"] = float(controller.multiplier)
        row["steered_bitops"] = float(cost.exact(model)) if cost.measure.name == "bitops" else None
    return row


def cost_fields(row: Mapping[str, Any], config: Config, steered: float, name: str) -> dict[str, Any]:
    """The fields of result.json of a search that something else than BitOps steered, in its unit."""
    target = {"target": target_of(config), "steered_cost": steered}
    return {"cost_measure": name, "cost_unit": UNITS[name], "expected_cost": row["expected_cost"], **target}


def expected_text(row: Mapping[str, Any]) -> str:
    """The expected cost of an epoch; where BitOps do not steer, also the exact one, of what does."""
    if "cost_measure" not in row:
        return f", {row['expected_bitops'] / 1e9:.4g} G expected"
    name = row["cost_measure"]
    return f"; {name} in {UNITS[name]}: {row['exact_cost']:.4g} exact, {row['expected_cost']:.4g} expected"


def _logits(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Alphas or betas by kind of cell; empty where the search has none."""
    found = {kind: getattr(model, f"{name}_{kind}", None) for kind in ("normal", "reduce")}
    return {kind: logits for kind, logits in found.items() if logits is not None}


def _entropy(logits: Mapping[str, Tensor]) -> float | None:
    """Mean entropy over all rows of all tables; None without any."""
    return float(entropy(torch.cat([table.flatten(0, -2) for table in logits.values()]))) if len(logits) else None


def _by_place(logits: Tensor) -> Tensor:
    """Probabilities of the bit-widths by place: [cells, edges, primitives, bits] -> [cells, edges, bits]."""
    probabilities = logits.softmax(-1)
    return probabilities.mean(2) if probabilities.dim() == 4 else probabilities


def _rounded(values: Tensor, decimals: int = 6) -> list[Any]:
    return torch.round(values.double(), decimals=decimals).tolist()


def epoch_text(row: dict[str, Any]) -> str:
    """What is printed of an epoch."""
    genotype = row["genotype"]
    valid = "" if row["valid_loss"] is None else f"; valid loss {row['valid_loss']:.4f}, top-1 {_percent(row, 'valid')}"
    entropies = [
        f"of {name}s {row[f'{name}_entropy']:.4f}" for name in ("alpha", "gamma") if row[f"{name}_entropy"] is not None
    ]
    text = "\n".join(
        [
            f"  genotype: normal {_pairs(genotype['normal'])}",
            f"            reduce {_pairs(genotype['reduce'])}",
            f"  train loss {row['train_loss']:.4f}, top-1 {_percent(row, 'train')}{valid}",
            f"  BitOps exact {row['exact_bitops'] / 1e9:.4g} G "
            f"({row['exact_bitops_quantized'] / 1e9:.4g} G in quantised layers){expected_text(row)}; "
            f"{row['parameter_free_share']:.0%} of the operations without parameters, "
            f"{row['skip_share']:.0%} skip connections ({row['skip_share_normal']:.0%} of the normal cell)",
            f"  entropy {', '.join(entropies)}",
        ]
    )
    if "cost_multiplier" in row:
        text += f"; cost multiplier {row['cost_multiplier']:+.3f}"
        if row["steered_bitops"] is not None:
            text += f", steered cost {row['steered_bitops'] / 1e9:.4g} G"
    return text


def _percent(row: dict[str, Any], part: str) -> str:
    return f"{100 * row[f'{part}_top1']:.2f}%"


def _pairs(pairs: list[list[Any]]) -> str:
    return " ".join(f"{name}:{state}" for name, state in pairs)


def genotype_text(genotype: Genotype) -> str:
    """A genotype in one line, as the papers' logs print it."""
    cells = []
    for kind in ("normal", "reduce"):
        concat = getattr(genotype, f"{kind}_concat")
        cells.append(f"{kind}={list(getattr(genotype, kind))}, {kind}_concat=range({concat[0]}, {concat[-1] + 1})")
    return f"Genotype({', '.join(cells)})"


def train_command(config: Config, method: str, folder: Path, more: Sequence[str] = ()) -> str:
    """The command that trains what was found, as typed in the present folder."""
    flags = ["--arch", os.path.relpath(folder), "--dataset", config.dataset]
    if config.preset:
        flags = ["--preset", config.preset, *flags]
    flags += ["--init-channels", str(config.eval_init_channels), "--layers", str(config.eval_layers)]
    defaults = {"stem": "auto", "scheme": "default", "stem_bits": 32, "classifier_bits": 32, "bit_mapping": "relative"}
    defaults |= {**dict.fromkeys(_PLACES), "device": "auto", "precision": "fp32"}
    defaults |= presets_for("train").get(config.preset or "", {})  # train.py will take them from the preset
    for name in ("stem", "scheme", "stem_bits", "classifier_bits", "bit_mapping", *_PLACES):
        value = getattr(config, name)
        if value != defaults[name] and value is not None:
            flags += [f"--{name.replace('_', '-')}", str(value)]
    if config.signed_activations:
        flags.append("--signed-activations")
    return shlex.join(["python", os.path.relpath(ROOT / method / "train.py"), *flags, *more])
