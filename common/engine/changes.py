# SPDX-License-Identifier: Apache-2.0
"""Flags that a run may change when it goes on (--allow-config-change), and what is no longer exact then.

A flag that stands in no list is refused: it sets the shapes of the saved state, the number of steps of an epoch, or
which image is whose, or it is not known to leave the saved state a state of this run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_OLD_STEPS = "the steps that are done, and the momentum gathered in them, had the old value"
OLD_SCHEDULE = "the epochs that are done had the rates of the old schedule"
OLD_LOSS = "the steps that are done descended another loss: losses before and after do not compare"
_OLD_DRAWS = "the steps that are done saw their images or paths drawn as before"
_ROUNDING = "other kernels round otherwise: the figures are near those of an unchanged run, not bit for bit the same"
_EFFECTS = {
    "the schedules stretch to the new end, and the epochs that are done had the old one's rates": "epochs",
    OLD_SCHEDULE: "learning_rate learning_rate_min lr_schedule lr_step_epochs lr_step_factor lr_warmup_epochs",
    _OLD_STEPS: "momentum weight_decay grad_clip arch_learning_rate arch_weight_decay gamma_learning_rate "
    "gamma_weight_decay",
    "the epochs that are done moved the architecture, or left it alone, as before": "warmup_epochs",
    "the architecture's images go on at another place of their order": "arch_every",
    "the architecture steps that are done took gradients of the other kind": "unrolled second_order",
    OLD_LOSS: "complexity_decay arch_complexity_decay label_smoothing auxiliary_weight teacher_weight "
    "teacher_temperature",
    _OLD_DRAWS: "cutout cutout_length drop_path_prob",
    "batch normalisation takes the statistics of parts of another size": "grad_accumulation sync_bn",
    _ROUNDING: "device deterministic precision compile cuda_graph channels_last checkpoint_cells",
}
CHANGEABLE: Mapping[str, str] = {flag: effect for effect, flags in _EFFECTS.items() for flag in flags.split()}
"""Key of a run's configuration -> what is no longer exact once it has changed. A method may have more of its own."""

_REFUSALS = {
    "the saved state has the shapes that it gives": "method arch bits wbits abits weights_path init_channels layers "
    "partial nodes multiplier auxiliary stem scheme weight_quantizer activation_quantizer image_size "
    "search_space_digest",
    "it sets how many steps an epoch has": "batch_size batch_per_rank steps_per_epoch",
    "it says which images there are, and which are whose": "dataset data_module classes seed train_portion subset "
    "search_fraction val_fraction",
}
_REASONS = {flag: reason for reason, flags in _REFUSALS.items() for flag in flags.split()}
_UNKNOWN = "what was saved was made with it"


@dataclass(frozen=True)
class Change:
    """A key of the configuration that is not as a run has it. `place`: the flag whose content changed, where it lies
    at the same place as before. The texts are JSON, or (not there).
    """

    key: str
    before: str
    after: str
    place: str | None = None
    where: str = ""

    def line(self) -> str:
        """The change as an error or a log shows it."""
        if self.place is None:
            return f"{self.key}: {self.before} -> {self.after}"
        return (
            f"{flag(self.place)} {self.where}: the file or run there has changed since "
            f"({self.key}: {self.before} -> {self.after})"
        )

    def noted(self, effect: str) -> dict[str, Any]:
        """As config.json keeps it."""
        before, after = (None if text == MISSING else json.loads(text) for text in (self.before, self.after))
        return {"flag": self.key, "before": before, "after": after, "no_longer_exact": effect}


MISSING = "(not there)"


def owner_of(record: Any) -> str:
    """The digest that the checkpoints of a run bear, by its config.json; empty where that names none.

    It is the run's own, unless flags have changed when the run went on.
    """
    found = (record.get("owner") or record.get("digest")) if isinstance(record, dict) else None
    return found if isinstance(found, str) else ""


def changes_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The flags that a run changed as it went on, in that order, by its config.json."""
    sessions = record.get("sessions")
    each = (one.get("changes") for one in sessions if isinstance(one, dict)) if isinstance(sessions, list) else ()
    return [change for changes in each if isinstance(changes, list) for change in changes if isinstance(change, dict)]


def flag(dest: str) -> str:
    """The flag of a key of the configuration."""
    return "--" + dest.replace("_", "-")


def effects(changes: Sequence[Change], changeable: Mapping[str, str], *, where: str) -> list[dict[str, Any]]:
    """What each change makes inexact, as config.json notes it.

    `changeable`: key -> effect. Raises ValueError that begins with `where` and names every flag that cannot change.
    """
    fixed = [change for change in changes if change.place is not None or change.key not in changeable]
    if fixed:
        reasons = (
            f"{change.line()}" + ("" if change.place else f" ({_REASONS.get(change.key, _UNKNOWN)})")
            for change in fixed
        )
        raise ValueError(
            f"{where}: even with --allow-config-change a run cannot change\n  "
            + "\n  ".join(reasons)
            + "\nwhen it goes on; give these flags as then, or another --save to start anew"
        )
    return [change.noted(changeable[change.key]) for change in changes]


def check_epochs(changes: Iterable[Change], done: int, *, where: str) -> None:
    """Raise ValueError when --epochs changes although its old or its new number is done already."""
    for change in changes:
        if change.key == "epochs":
            before, after = int(json.loads(change.before)), int(json.loads(change.after))
            if done >= min(before, after):
                raise ValueError(
                    f"{where}: {done} of {before} epochs are done, so --epochs cannot become {after}; "
                    + (f"give {before}, and start a longer run anew" if done >= before else f"give more than {done}")
                )


def as_text(noted: Iterable[Mapping[str, Any]], step: int) -> list[str]:
    """Log lines on flags that changed at a step, each with what is no longer exact."""
    rows = [
        f"  {flag(one['flag'])} {json.dumps(one['before'])} -> {json.dumps(one['after'])}: {one['no_longer_exact']}"
        for one in noted
    ]
    head = (
        f"--allow-config-change: from step {step:,} on this run is neither bit for bit the one that it was, nor one "
        "that had these flags from its start:"
    )
    return [head, *rows] if rows else []
