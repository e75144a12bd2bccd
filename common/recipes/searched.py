# SPDX-License-Identifier: Apache-2.0
"""A finished search opened again: its flags, and its supernet with the weights and choices of its last checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.engine import CheckpointStore, read_json
from common.engine.changes import owner_of
from common.engine.checkpoint import taking_up
from common.engine.cli import Config
from common.engine.repeat import OWN_CODE
from common.recipes.flags import resolve_search, search_parser
from common.recipes.recorded import own_code
from common.recipes.search_setup import PreparedSearch, prepare_search


def read_search(run: Path, flag: str = "RUN") -> dict[str, Any]:
    """config.json of a search's run folder. Raises ValueError naming `flag`, the folder and the cure."""
    if not (run / "config.json").is_file():
        raise ValueError(f"{flag} {run}: no run lies there (no config.json); give the folder of a search")
    record = read_json(run / "config.json")
    if not isinstance(record, dict) or record.get("stage") != "search" or not isinstance(record.get("config"), dict):
        raise ValueError(f"{flag} {run}: not the run of a search; give the folder that search.py made")
    return record


def search_config(record: dict[str, Any], where: str, **changes: Any) -> Config:
    """The flags of a search; what it did not know yet has its default. `changes`: flags of here and now, by name.

    Raises ValueError, beginning with `where`, when the record names a Python file and `changes` do not.
    """
    changes |= {name: own_code(name, record["config"], changes.get(name), where) for name in OWN_CODE}
    parser = search_parser("search.py", "")
    config = resolve_search(parser, [])
    actions = parser.dests()
    for name, value in {**record["config"], **changes}.items():
        is_path = value is not None and name in actions and actions[name].type is Path
        setattr(config, name, Path(value) if is_path else value)
    return config


def load_searched(run: Path, flag: str = "RUN", **changes: Any) -> PreparedSearch:
    """A search as it stood at its newest valid checkpoint. Raises ValueError naming `flag`, the folder and the cure."""
    record = read_search(run, flag)
    found = CheckpointStore(run / "checkpoints", config_digest=owner_of(record)).latest()
    if found is None:
        raise ValueError(f"{flag} {run}: holds no valid checkpoint; let the search finish")
    # its weights come from the checkpoint, wherever they once started
    config = search_config(record, f"{flag} {run}", init_from=None, compile=False, **changes)
    prepared = prepare_search(config)
    with taking_up(f"{flag} {run}"):
        prepared.supernet.load_state_dict(found[0]["model"])
    return prepared
