# SPDX-License-Identifier: Apache-2.0
"""How differentiable searches collapse into skip connections: a symptom to watch, and two remedies.

* the dominant eigenvalue of the validation loss's Hessian in alpha grows before the cells degrade
  (Zela et al., Understanding and Robustifying Differentiable Architecture Search, ICLR 2020);
* stop once the normal cell has so many skip connections (Liang et al., DARTS+, arXiv 1909.06035);
* Beta-Decay: hold the alphas together by the log-sum-exp of each edge (Ye et al., beta-DARTS, CVPR 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from common.engine import distributed
from common.engine.accumulation import Batch
from common.engine.changes import OLD_LOSS
from common.engine.cli import Config
from common.engine.search_loop import Objective
from common.recipes.findings import count_skips
from common.recipes.search import SearchHooks
from common.recipes.search_setup import PreparedSearch


class BetaDecay:
    """lambda(t) x the mean over all edges of logsumexp(alpha), lambda rising linearly from 0 towards `weight`.

    Its gradient on an edge is proportional to softmax(alpha): the strongest candidate is pulled down most. The form
    and the schedule are those of the authors' code, whose weight is 50.
    """

    def __init__(self, weight: float, epochs: int) -> None:
        self.weight, self.epochs, self.strength = weight, epochs, 0.0

    def start(self, epoch: int) -> None:
        """Set lambda for an epoch, counted from 0."""
        self.strength = self.weight * epoch / self.epochs

    def __call__(self, model: nn.Module) -> Tensor:
        """The term for a model with `alphas_normal` and `alphas_reduce`, [edges, primitives] each."""
        edges = torch.cat([model.alphas_normal, model.alphas_reduce])
        return self.strength * edges.logsumexp(-1).mean()


def dominant_eigenvalue(
    objective: nn.Module,
    parameters: Sequence[nn.Parameter],
    batch: Batch,
    *,
    side_pass: Callable[[], AbstractContextManager[object]] = nullcontext,
    tolerance: float = 1e-3,
    most: int = 50,
) -> float:
    """The eigenvalue of largest magnitude of the Hessian of `objective(*batch)` in `parameters`, with its sign.

    Power iteration that keeps its iterates and takes the best value in the space that they span (Lanczos), so that a
    dozen products do: it ends when the value changes by less than `tolerance` of itself, or after `most` products. A
    Hessian-vector product is a second backward pass through the gradient's graph, which is built once. Batch norm
    works on the batch, as in the search. Nothing is left behind: buffers come back bit for bit, no random numbers are
    drawn from the global generators, and no `.grad` is touched.
    """
    buffers = [(buffer, buffer.clone()) for buffer in objective.buffers()]
    modes = [(module, module.training) for module in objective.modules()]
    objective.train()
    try:
        with torch.enable_grad(), side_pass():
            loss = objective(*batch)
            gradients = torch.autograd.grad(loss, parameters, create_graph=True)
            return _power_iteration(gradients, parameters, tolerance, most)
    finally:
        for module, training in modes:
            module.training = training
        for buffer, saved in buffers:
            buffer.copy_(saved)


def _power_iteration(
    gradients: Sequence[Tensor], parameters: Sequence[nn.Parameter], tolerance: float, most: int
) -> float:
    sizes, shapes = [p.numel() for p in parameters], [p.shape for p in parameters]
    start = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vector, value = (start / start.norm()).to(parameters[0].device), 0.0
    basis, images = vector.new_empty(0, len(vector)), vector.new_empty(0, len(vector))
    for _ in range(min(most, len(vector))):
        parts = [part.view(shape) for part, shape in zip(vector.split(sizes), shapes, strict=True)]
        along = [part.to(p.dtype) for part, p in zip(parts, parameters, strict=True)]
        product = torch.autograd.grad(gradients, parameters, grad_outputs=along, retain_graph=True)
        # of all ranks' losses together; and the same number on each, so that all take as many turns
        distributed.average_(product)
        image = torch.cat([part.flatten() for part in product]).double()
        basis, images = torch.cat([basis, vector[None]]), torch.cat([images, image[None]])
        found = torch.linalg.eigvalsh(basis @ images.T)
        before, value = value, float(found[found.abs().argmax()])
        for _ in range(2):  # once more: what rounding left of the earlier iterates
            image = image - basis.T @ (basis @ image)
        if abs(value - before) <= tolerance * abs(value) or not image.norm() > 1e-12 * abs(value):
            break
        vector = image / image.norm()
    return value


def watch(prepared: PreparedSearch) -> dict[str, float]:
    """The dominant eigenvalue in the alphas of both cells, on the first validation batch, the same in every epoch."""
    model, loop = prepared.supernet, prepared.loop
    objective = Objective(model, loop["criterion"], None, prepared.config.precision)
    alphas = [model.alphas_normal, model.alphas_reduce]
    value = dominant_eigenvalue(objective, alphas, loop["valid_stream"].batch(0, 0), side_pass=model.side_pass)
    return {"dominant_eigenvalue": value}


def hooks_of(config: Config) -> SearchHooks:
    """What --track-eigenvalue, --early-stop-skips and --beta-decay add to a search."""
    decay = BetaDecay(config.beta_decay, config.epochs) if config.beta_decay else None

    def stop(epoch: int, row: dict[str, Any]) -> str | None:
        skips, most = count_skips(row["genotype"]["normal"]), config.early_stop_skips
        if most is None or epoch < config.warmup_epochs or skips < most:
            return None
        return f"the normal cell has {skips} skip connections (--early-stop-skips {most})"

    return SearchHooks(
        arch_term=decay,
        on_start=None if decay is None else decay.start,
        figures=watch if config.track_eigenvalue else None,
        stop=stop,
        changeable={
            "beta_decay": OLD_LOSS,
            "early_stop_skips": "the epochs that are done were held against another number",
        },
    )
