# SPDX-License-Identifier: Apache-2.0
"""The named genotypes against the oracle, and how names resolve."""

from __future__ import annotations

from typing import Any

import pytest

import genotypes

ALIASES = {"DARTS": "DARTS_V2", "PCDARTS": "PC_DARTS_cifar", "PC_DARTS": "PC_DARTS_cifar"}


def test_every_named_genotype_equals_the_oracle(oracle: Any) -> None:
    truth = oracle("genotypes")
    assert set(truth) <= set(genotypes.GENOTYPES)
    for name, cells in truth.items():
        found = genotypes.GENOTYPES[name]
        assert [list(pair) for pair in found.normal] == cells["normal"], name
        assert [list(pair) for pair in found.reduce] == cells["reduce"], name
        assert list(found.normal_concat) == cells["normal_concat"], name
        assert list(found.reduce_concat) == cells["reduce_concat"], name


def test_evaluation_oracle_names_the_same_cells(oracle: Any) -> None:
    for name, truth in oracle("eval_params_macs").items():
        assert [list(pair) for pair in genotypes.lookup(name)[1].normal] == truth["genotype"]["normal"]


def test_primitives_are_in_the_oracle_order(oracle: Any) -> None:
    assert list(genotypes.PRIMITIVES) == oracle("super_darts_params_genotypes")["primitives"]


@pytest.mark.parametrize("alias, name", ALIASES.items())
def test_aliases(alias: str, name: str) -> None:
    for spelled in (alias, alias.lower(), alias.title()):
        assert genotypes.lookup(spelled) == (name, genotypes.GENOTYPES[name])


@pytest.mark.parametrize("name", genotypes.GENOTYPES)
def test_names_are_case_insensitive(name: str) -> None:
    assert genotypes.lookup(name.lower()) == genotypes.lookup(name.upper()) == (name, genotypes.GENOTYPES[name])


def test_unknown_name_lists_the_nearest() -> None:
    with pytest.raises(ValueError, match="PC_DARTS"):
        genotypes.lookup("PC_DART")
    with pytest.raises(ValueError, match="qwertz"):
        genotypes.lookup("qwertz")
