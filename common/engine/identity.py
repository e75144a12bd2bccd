# SPDX-License-Identifier: Apache-2.0
"""Which run is which: the flags and contents that make two runs the same one, and what differs between two."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.engine.changes import MISSING, Change

# These say how a run is shown, found or repeated, never what it computes (a preset counts by the values it gave): a
# resumed run may change them.
VOLATILE = frozenset(
    (
        *("save", "resume", "runs", "root", "preset", "config", "print_config", "list_presets", "dry_run", "log_every"),
        *("allow_config_change", "given"),  # given: what flags said before something else followed from them
        *("checkpoint_minutes", "keep_checkpoints", "quiet", "tensorboard", "plots", "workers", "threads"),
        *("data", "trainfile", "valfile"),
        *("use_data_parallel", "plan", "world_size", "gpus_per_node", "link_gbps", "step_seconds"),
        "search_space",  # a place; what the file says is in search_space_digest
    )
)


@dataclass(frozen=True)
class Identity:
    """What makes two runs the same run."""

    method: str
    stage: str
    dataset: str
    seed: int
    config: dict[str, Any]
    volatile: frozenset[str]
    contents: Mapping[str, str]

    def fields(self) -> dict[str, Any]:
        """Every key that matters, with its value. None is the same as not there: flags may come later."""
        own = {"method": self.method, "stage": self.stage, "dataset": self.dataset, "seed": self.seed}
        matter = {key: value for key, value in self.config.items() if key not in self.volatile and value is not None}
        return {**own, **matter}

    def digest(self) -> str:
        """sha256 of `fields`."""
        return hashlib.sha256(json.dumps(self.fields(), sort_keys=True).encode()).hexdigest()

    def changes(self, saved: Mapping[str, Any]) -> list[Change]:
        """Every key that matters and differs from a saved config.json (None: as not there).

        A content's digest that the saved one does not have yet is as it was; where the place is another, it is that
        which is told.
        """
        old = {key: saved.get(key) for key in ("method", "stage", "dataset", "seed")}
        old |= {key: value for key, value in saved["config"].items() if key not in self.volatile}
        new = self.fields()
        found = []
        for key in sorted({*old, *new}):
            if json.dumps(old.get(key)) == json.dumps(new.get(key)):
                continue
            before, after = (json.dumps(side[key]) if key in side else MISSING for side in (old, new))
            place = self.contents.get(key)
            if place is None:
                found.append(Change(key, before, after))
            elif key in old and json.dumps(old.get(place)) == json.dumps(new.get(place)):
                found.append(Change(key, before, after, place, str(new.get(place))))
        return found
