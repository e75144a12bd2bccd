# SPDX-License-Identifier: Apache-2.0
"""What lies where flags point to, as digests: another content at the same place makes another run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from common.engine.changes import owner_of
from common.engine.cli import Config

CONTENTS = {
    "arch_digest": "arch",
    "init_from_digest": "init_from",
    "teacher_digest": "teacher",
    "weights_path_digest": "weights_path",
    "lut_digest": "lut",
    "source_digest": "run",
}
"""Key of a run's configuration -> the flag whose content it is the SHA-256 of."""


def derive_contents(config: Config) -> dict[str, Any]:
    """The digests of what the flags of CONTENTS name; what cannot be read has none."""
    finders = {"arch": architecture_digest, "weights_path": file_digest, "lut": file_digest}
    found = {}
    for key, dest in CONTENTS.items():
        place = getattr(config, dest, None)
        if place is not None and dest != "run":
            found[key] = finders.get(dest, weights_digest)(place)
    return {key: digest for key, digest in found.items() if digest is not None}


def architecture_digest(name_or_path: str) -> str | None:
    """Of the cells and the bits of an architecture, not of where they came from; None where there is none."""
    from common.nets import load_architecture

    try:
        content = load_architecture(name_or_path).to_json()
    except (ValueError, OSError):
        return None  # the flags' check says what is wrong
    kept = {key: content[key] for key in ("genotype", "bits")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def weights_digest(run: Path) -> str | None:
    """Of the state in a run's newest valid checkpoint; None where there is no such run."""
    from common.engine import CheckpointStore, read_json

    try:
        owner = owner_of(read_json(Path(run) / "config.json"))
    except (ValueError, OSError):
        return None  # whoever loads the run says what is wrong
    return CheckpointStore(Path(run) / "checkpoints", config_digest=owner).newest_digest()


def file_digest(path: Path) -> str | None:
    """Of a file; None where there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
