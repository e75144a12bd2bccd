# SPDX-License-Identifier: Apache-2.0
"""Bits read from a NablaQDARTS gamma checkpoint: the reference's slot order undone, bad files refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.nets import build_network, load_architecture
from common.recipes.gammas import NAMES, import_gammas

# The reference's rows: sep3, sep5, dil3, dil5, (never read), skip_connect through index -1.
ROW = {"sep_conv_3x3": 0, "sep_conv_5x5": 1, "dil_conv_3x3": 2, "dil_conv_5x5": 3, "skip_connect": 5}


def gammas(choices: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name in NAMES:
        cells = 6 if "celln" in name else 2
        shape = (cells, choices) if "preprocess" in name else (cells, 14, 6, choices)
        tensors[name] = torch.randn(shape, generator=generator)
    return tensors


def test_every_operation_gets_the_bits_of_its_own_row(tmp_path: Path) -> None:
    tensors = gammas(3)
    torch.save([torch.nn.Parameter(tensors[name]) for name in NAMES], tmp_path / "gamma_checkpoint.t7")
    architecture = import_gammas(load_architecture("DARTS_V1"), tmp_path / "gamma_checkpoint.t7")
    assert architecture.bits is not None
    assert [c.reduction for c in architecture.bits.cells] == [i in (2, 5) for i in range(8)]
    bits = (2, 4, 8)
    # cell 5 is the second reduction cell; DARTS_V1's reduction cell reads skip_connect from state 2 (stride 1: free)
    reduce, cell = architecture.genotype.reduce, architecture.bits.cells[5]
    first_edge = [0, 2, 5, 9]
    for position, (primitive, state) in enumerate(reduce):
        if "pool" in primitive or (primitive == "skip_connect" and state > 1):
            assert cell.operations[position] is None
            continue
        edge = first_edge[position // 2] + state
        rows = [tensors[f"gamma_{o}_cellr"][1, edge, ROW[primitive]] for o in ("weight", "activ")]
        assert cell.operations[position] == (bits[int(rows[0].argmax())], bits[int(rows[1].argmax())])
    normal = architecture.bits.cells[7]  # the sixth normal cell
    edge = first_edge[0] + architecture.genotype.normal[0][1]
    rows = [tensors[f"gamma_{o}_celln"][5, edge, ROW["sep_conv_3x3"]] for o in ("weight", "activ")]
    assert architecture.genotype.normal[0][0] == "sep_conv_3x3"
    assert normal.operations[0] == (bits[int(rows[0].argmax())], bits[int(rows[1].argmax())])
    inputs = [tensors[f"gamma_{o}_celln_preprocess1"][5] for o in ("weight", "activ")]
    assert normal.preprocess1 == (bits[int(inputs[0].argmax())], bits[int(inputs[1].argmax())])
    network = build_network(architecture, num_classes=10, init_channels=4, layers=20)
    assert network(torch.randn(1, 3, 16, 16))[0].shape == (1, 10)


def test_a_mapping_by_name_reads_the_same(tmp_path: Path) -> None:
    tensors = gammas()
    torch.save([tensors[name] for name in NAMES], tmp_path / "list.t7")
    torch.save(dict(reversed(tensors.items())), tmp_path / "named.t7")
    pc_darts = load_architecture("PC_DARTS")
    assert import_gammas(pc_darts, tmp_path / "list.t7") == import_gammas(pc_darts, tmp_path / "named.t7")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop(NAMES[3]), NAMES[3]),
        (lambda t: t.update({NAMES[0]: t[NAMES[0]][:, :1]}), "bit choices"),
        (lambda t: t.update({NAMES[2]: t[NAMES[2]][0]}), "gamma_activ_celln_preprocess1"),
        (lambda t: t.update({NAMES[1]: t[NAMES[1]] * float("nan")}), "not finite"),
        (lambda t: t.update({NAMES[1]: t[NAMES[1]][:4]}), "cells"),
    ],
)
def test_what_is_no_gamma_checkpoint_is_refused(tmp_path: Path, damage, message: str) -> None:
    tensors = gammas()
    damage(tensors)
    torch.save(tensors, tmp_path / "bad.t7")
    with pytest.raises(ValueError, match=message):
        import_gammas(load_architecture("PC_DARTS"), tmp_path / "bad.t7")


def test_a_pickle_with_code_is_refused(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save([Payload()], tmp_path / "evil.t7")
    with pytest.raises(ValueError, match=r"evil\.t7"):
        import_gammas(load_architecture("PC_DARTS"), tmp_path / "evil.t7")
    assert not (tmp_path / "ran").exists()


def test_primitives_that_the_reference_does_not_search_are_refused(tmp_path: Path) -> None:
    torch.save(gammas(), tmp_path / "g.t7")
    with pytest.raises(ValueError, match="searches no bits for sep_conv_3x3 at node 4"):
        import_gammas(load_architecture("NASNet"), tmp_path / "g.t7")
