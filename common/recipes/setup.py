# SPDX-License-Identifier: Apache-2.0
"""What both recipes prepare in the same way: device, threads, data, stem, epochs, run folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.data import ImageData, StreamedBatches, load, open_stream
from common.data.stand_in import stand_in
from common.engine import Run, distributed
from common.engine.accumulation import Batch, accumulated, batches_of
from common.engine.changes import CHANGEABLE
from common.engine.cli import Config
from common.engine.progress import say as say_here
from common.engine.protocols import BatchStream
from common.nets import share_statistics
from common.quant import share_first_steps, share_ranges
from common.recipes.contents import CONTENTS
from common.recipes.imagenet import free_cores
from common.recipes.recorded import own_code


class FirstSteps:
    """A stream whose epochs end after at most `steps` steps (--steps-per-epoch)."""

    def __init__(self, stream: BatchStream, steps: int) -> None:
        self.stream, self.steps_per_epoch = stream, min(steps, stream.steps_per_epoch)
        self.notes = tuple(getattr(stream, "notes", ()))

    def batch(self, epoch: int, step: int) -> Batch:
        """The stream's own batch."""
        return self.stream.batch(epoch, step)

    def batches(self, epoch: int, step: int) -> list[Batch]:
        """All batches of the stream's step."""
        return batches_of(self.stream, epoch, step)


def shorten(stream: BatchStream, steps: int | None) -> BatchStream:
    """The stream itself, or its first steps where a limit is given."""
    if steps is not None and isinstance(stream, StreamedBatches):
        return stream.shorten(steps)
    return stream if steps is None else FirstSteps(stream, steps)


def prepare_torch(config: Config) -> torch.device:
    """Set --threads and say where the run computes (--device; auto: a GPU where torch sees one).

    Under torchrun the processes meet here, and each computes on a GPU of its own.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    kind = config.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    return distributed.join(kind) if distributed.launched() else torch.device(kind)


def lay_out(model: nn.Module, config: Config) -> nn.Module:
    """Tell the networks within `model` what they keep in memory, and how (--checkpoint-cells, --channels-last), and
    what they share with other processes (--sync-bn). Before their first forward, and before any optimiser.
    """
    for network in (m for m in model.modules() if hasattr(m, "checkpoint_cells")):
        network.checkpoint_cells = config.checkpoint_cells
        if not config.channels_last:
            network.memory_format = torch.contiguous_format
            network.to(memory_format=torch.contiguous_format)
    if distributed.world_size() > 1:
        _share(model, config)
    return model


def _share(model: nn.Module, config: Config) -> None:
    reduction = distributed.Reduction()
    share_first_steps(model, reduction)
    if config.sync_bn:
        share_ranges(model, reduction)
        share_statistics(model, reduction)
    for module in (m for m in model.modules() if hasattr(m, "shard")):
        module.shard = (distributed.rank(), distributed.world_size())


def images_at_once(config: Config) -> int:
    """How many images this process computes on at a time, of the --batch-size that a step takes."""
    ranks = 1 if config.batch_per_rank else distributed.world_size()
    return config.batch_size // (ranks * config.grad_accumulation)


def prepare_compiler() -> None:
    """Before torch.compile: what the compiler cannot take runs as it is, and torch says so."""
    import torch._dynamo

    torch._dynamo.config.suppress_errors = True


def training_stream(
    config: Config, data: ImageData, device: torch.device, name: str, indices: Tensor | None = None
) -> BatchStream:
    """The augmented batches of the training set (or of a part of it) that this process works on, as the flags say."""
    stream = open_stream(
        data.train,
        data.info,
        indices=indices,
        batch_size=images_at_once(config),
        seed=config.seed,
        name=name,
        augment=True,
        cutout=config.cutout_length if config.cutout else None,
        device=device,
        rank=distributed.rank(),
        ranks=distributed.world_size(),
    )
    return accumulated(stream, config.grad_accumulation)


def tell(text: str) -> None:
    """Print a line on stdout, once for all processes."""
    if distributed.is_main():
        say_here(text)


def load_data(config: Config, say: Callable[[str], None] = tell) -> ImageData:
    """The images that the flags name, on the CPU. Raises ValueError that names the flag, the reason and the cure.

    Of several processes on a machine the first goes ahead: what it downloads the others find. A plan without files
    takes the published sizes.
    """
    planned = getattr(config, "plan", False) and not (config.data or config.trainfile or config.data_module)
    if planned and (shapes := stand_in(config.dataset, config.image_size, config.classes)) is not None:
        return shapes
    with distributed.first_on_its_machine():
        same = ("image_size", "data_module", "classes", "trainfile", "valfile", "workers")
        return load(config.dataset, root=config.data, say=say, **{name: getattr(config, name) for name in same})


def data_flags(
    flags: Mapping[str, Any], where: str, *, data_module: str | None = None, workers: int | None = None
) -> dict[str, Any]:
    """What `load_data` reads of a run's flags (older runs lack some), `workers` where they are another machine's.

    `data_module` is the present command's; ValueError, beginning with `where`, when only the run names one.
    """
    paths = {name: Path(flags[name]) if flags.get(name) else None for name in ("data", "trainfile", "valfile")}
    same = {name: flags.get(name) for name in ("dataset", "image_size", "classes")}
    same["data_module"] = own_code("data_module", flags, data_module, where)
    return {**paths, **same, "workers": free_cores() if workers is None else workers}


def stem_of(config: Config, image_size: int) -> str:
    """The stem: as given, or ImageNet's from 128 pixels on."""
    if config.stem != "auto":
        return config.stem
    return "imagenet" if image_size >= 128 else "cifar"


def open_run(
    config: Config, *, method: str, stage: str, dataset: str, changeable: Mapping[str, str] = CHANGEABLE
) -> Run:
    """The run folder that the flags ask for (--save, --runs, --resume; --allow-config-change: of `changeable` keys)."""
    return Run.open(
        method=method,
        stage=stage,
        dataset=dataset,
        seed=config.seed,
        config=config.as_dict(),
        sources=config.sources,
        argv=sys.argv,
        root=config.runs,
        save=config.save,
        resume=Path(config.resume) if config.resume not in (None, "auto") else config.resume,
        contents=CONTENTS,
        changeable=changeable if getattr(config, "allow_config_change", False) else None,
        tensorboard=config.tensorboard,
    )
