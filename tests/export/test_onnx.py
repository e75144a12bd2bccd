# SPDX-License-Identifier: Apache-2.0
"""ONNX files and torch programs are the network: onnxruntime, qonnx and torch.export say so, and see what is wrong."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import Tensor, nn

from common.cost import network_cost
from common.export import onnx_graph, qonnx
from common.export.formats import FORMATS, Source
from common.export.onnx_formats import check_onnx, traced_of, unquantized
from common.export.onnx_graph import write_exact, write_float
from common.export.onnx_int8 import build_int8, check_int8, integer_kernels, write_int8
from common.export.onnx_runtime import open_session
from common.export.onnx_trace import quantizable_layers, read_layers, trace
from common.export.qonnx_runtime import executor_of
from common.export.runtimes import load_runner
from common.export.torch_export import check_torch, write_torch
from common.nets import OPERATIONS, Architecture
from common.nets.enas_space import SPACE, random_cells
from common.nets.sampling import random_bits, random_genotype
from genotypes import Genotype
from tests.helpers.exports import digits, photographs, source_of

CELL = (("sep_conv_3x3", 0), ("max_pool_3x3", 1))
REDUCTION = (("sep_conv_3x3", 0), ("skip_connect", 1), ("avg_pool_3x3", 2), ("max_pool_3x3", 0))  # of both cells of two
SIZES = {"init_channels": 4, "layers": 2, "stem": "cifar"}


@pytest.fixture(scope="module")
def source() -> Source:
    """2-bit weights, 4-bit activations, both ends at 8 bits; a cell of each kind."""
    architecture = Architecture(Genotype(CELL, (2,), REDUCTION, (2, 3))).with_uniform_bits(2, 4)
    return source_of(architecture, *digits(8, 40), stem_bits=8, classifier_bits=8, **SIZES)


@torch.no_grad()
def logits_of(network: nn.Module, x: Tensor) -> np.ndarray:
    return network(x)[0].numpy()


def images_of(source: Source) -> Tensor:
    return next(iter(source.test()))[0]


def plain_session(model: onnx.ModelProto) -> Any:
    """onnxruntime as anyone would open a file."""
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def assert_near(found: np.ndarray, expected: np.ndarray, share: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= share * np.abs(expected).max()


# --------------------------------------------------------------------------------------------------------------- onnx


def test_onnx_gives_the_networks_logits_in_any_session_and_for_any_batch(source: Source) -> None:
    model, x = write_exact(traced_of(source)).model, images_of(source)
    for session in (plain_session(model), open_session(model, 1)):
        for images in (x[:1], x[:7], x):
            found = session.run(None, {"images": images.numpy()})[0]
            assert_near(found, logits_of(source.network, images))


def test_onnx_is_standard_and_stores_weights_at_their_bits(source: Source) -> None:
    model = write_exact(traced_of(source)).model
    assert {entry.domain for entry in model.opset_import} == {""} and not model.functions
    stored = {tensor.name: tensor for tensor in model.graph.initializer if tensor.name.endswith(".codes")}
    layers = {layer.name: layer for layer in network_cost(source.network, source.image_shape).layers}
    assert stored.keys() == {f"{name}.codes" for name in layers}
    for name, layer in layers.items():
        tensor = stored[f"{name}.codes"]
        assert tensor.data_type == (onnx.TensorProto.UINT2 if layer.weight_bits == 2 else onnx.TensorProto.UINT8)
        assert len(tensor.raw_data) == -(-int(8 * layer.weight_bytes) // 8)


def test_an_onnx_without_2_bit_integers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnx before 1.20."""
    kept = {name: getattr(onnx.TensorProto, name) for name in ("UINT4", "UINT8")}
    monkeypatch.setattr(onnx, "TensorProto", SimpleNamespace(**kept))
    with pytest.raises(ValueError, match=f"onnx {onnx.__version__} knows no UINT2; install onnx 1.20 or newer"):
        onnx_graph.Builder().stored(torch.zeros(4, dtype=torch.uint8), 2, "stem.codes")


def test_no_path_of_this_machine_is_in_a_file(source: Source, tmp_path: Path) -> None:
    write_torch(source, tmp_path / "network.pt2")
    with zipfile.ZipFile(tmp_path / "network.pt2") as archive:
        held = b"".join(archive.read(name) for name in archive.namelist())
    held += write_exact(traced_of(source)).model.SerializeToString()
    root = str(Path(__file__).resolve().parents[2]).encode()
    assert root not in held and b"site-packages" not in held


def test_the_check_sees_one_wrong_weight(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "network.onnx"
    FORMATS["onnx"].write(source, path)
    about = {entry.key: entry.value for entry in onnx.load(str(path)).metadata_props}
    assert json.loads(about["images"]) == source.data  # on a device there is nothing else to ask
    figures = FORMATS["onnx"].check(source, path)
    assert figures["layers"]["images"] == figures["whole"]["images"] == 40
    assert figures["layers"]["layer_error"] < 1e-5 and figures["whole"]["top1_agreement"] == 1
    model = onnx.load(str(path))
    codes = next(t for t in model.graph.initializer if t.name == "cells.0.operations.0.pointwise1.codes")
    codes.raw_data = bytes([codes.raw_data[0] ^ 1]) + codes.raw_data[1:]
    onnx.save(model, str(path))
    with pytest.raises(ValueError, match=r"network.onnx: cells.0.operations.0.pointwise1 is .* away"):
        check_onnx(source, path)


def test_fp32_beside_it_has_no_quantiser(source: Source) -> None:
    model, x = write_float(traced_of(source)).model, images_of(source)
    assert not {"Round", "DequantizeLinear", "Clip"} & {node.op_type for node in model.graph.node}
    assert_near(plain_session(model).run(None, {"images": x.numpy()})[0], logits_of(unquantized(source.network), x))


def test_a_layer_without_integers_is_refused_where_they_are_read(source: Source) -> None:
    """By formats that hold codes, that is: the plain one has no use for them."""
    network = copy.deepcopy(source.network)
    quantizable_layers(network)["classifier"].quantize_weight = nn.Tanh()
    *_, classifier = read_layers(network)
    assert torch.equal(classifier.latent, network.classifier.weight.detach())
    for operand in ("codes", "weights", "activations", "sums"):
        with pytest.raises(ValueError, match=r"classifier \(weights\): the quantiser Tanh offers no grid"):
            getattr(classifier, operand)


def test_a_foreign_or_damaged_file_is_refused_by_name(source: Source, tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    model = write_exact(traced_of(source)).model
    del model.metadata_props[:]
    onnx.save(model, str(other))
    with pytest.raises(ValueError, match="other.onnx: was not written by export.py"):
        load_runner(other)
    other.write_bytes(b"not a model")
    with pytest.raises(ValueError, match="other.onnx"):
        load_runner(other)


# --------------------------------------------------------------------------------------------------------------- int8


def test_int8_runs_on_integer_kernels_and_differs_by_roundings_alone(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "network-int8.onnx"
    write_int8(source, path)
    figures = check_int8(source, path)
    assert figures["integer_layers"] == integer_kernels(path) > 3
    assert figures["float_layers"] == {"depthwise": 4, "linear": 1}
    assert figures["layers"]["layer_error"] < 1e-5
    x = images_of(source)
    assert_near(load_runner(path)(x).numpy(), logits_of(source.network, x), 0.1)


def test_int8_weights_are_odd_codes_times_a_whole_number(source: Source) -> None:
    built = build_int8(traced_of(source), source.training(16))
    tensors = {t.name: numpy_helper.to_array(t) for t in built.written.model.graph.initializer}
    codes = tensors["cells.0.preprocess1.conv.codes"]
    assert codes.dtype == np.int8 and set(np.abs(np.unique(codes))) <= {42, 126}


# -------------------------------------------------------------------------------------------------------------- qonnx


def test_qonnx_counts_what_the_cost_model_counts(source: Source) -> None:
    written = qonnx.build_qonnx(traced_of(source))
    cost, found = network_cost(source.network, source.image_shape), qonnx.counted(written.model, source.image_shape)
    assert found["bitops"] == cost.bitops and found["macs"] == cost.macs
    assert found["weight_bits"] == 8 * sum(layer.weight_bytes for layer in cost.layers)


def test_qonnx_executes_it(source: Source) -> None:
    x = images_of(source)[:5]
    run = executor_of(qonnx.build_qonnx(traced_of(source)).model, "the graph")
    assert_near(run(x.numpy()), logits_of(source.network, x))


# -------------------------------------------------------------------------------------------------------------- torch


def test_the_first_images_across_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qonnx, "CHECKED_IMAGES", 3)
    assert [len(x) for x, _ in qonnx._first(lambda: [(torch.zeros(2), torch.zeros(2))] * 3)] == [2, 1]


@pytest.mark.slow
def test_the_check_by_qonnx_takes_few_images_and_says_so(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its executor is slow; the others take a thousand."""
    monkeypatch.setattr(qonnx, "CHECKED_IMAGES", 3)
    said: list[str] = []
    few = dataclasses.replace(source, say=said.append)
    qonnx.write_qonnx(few, tmp_path / "network-qonnx.onnx")
    figures = qonnx.check_qonnx(few, tmp_path / "network-qonnx.onnx")
    assert said == ["qonnx: its own executor is slow; checking 3 images"]
    assert figures["images"] == figures["layers"]["images"] == figures["whole"]["images"] == 3


def test_torch_holds_bytes_and_no_pickled_object(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "network.pt2"
    write_torch(source, path)
    figures = check_torch(source, path)
    assert figures["layers"]["layer_error"] < 1e-5 and figures["whole"]["top1_agreement"] == 1
    x = images_of(source)
    for images in (x[:1], x):
        assert_near(load_runner(path)(images).numpy(), logits_of(source.network, images))
    changed = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(changed, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            new.writestr(entry.filename, data.replace(b'"use_pickle": false', b'"use_pickle": true'))
    path.write_bytes(changed.getvalue())
    with pytest.raises(ValueError, match=r"network.pt2: holds pickled objects"):
        load_runner(path)
    path.write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"network.pt2: is no program"):
        load_runner(path)


# ------------------------------------------------------------------------------------------------------------- refused


def test_a_layer_that_is_used_twice_is_refused(source: Source) -> None:
    network = copy.deepcopy(source.network)
    cell = network.cells[0]
    cell.preprocess0.forward = MethodType(lambda self, x: self.bn(self.conv(x)) + self.conv(x + 1), cell.preprocess0)
    with pytest.raises(ValueError, match="cells.0.preprocess0.conv: is used twice in one pass"):
        write_exact(trace(network, source.image_shape))
    network.cells[0].preprocess0 = network.cells[0].preprocess1
    with pytest.raises(ValueError, match="cells.0.preprocess1.conv: is cells.0.preprocess0.conv too"):
        trace(network, source.image_shape)


# ---------------------------------------------------------------------------------------------------------------- slow


def all_formats(source: Source, folder: Path) -> dict[str, dict[str, Any]]:
    """Every format written and checked; the figures by name."""
    found = {}
    for name in ("onnx", "onnx-fp32", "onnx-int8", "qonnx", "torch"):
        path = folder / FORMATS[name].file
        FORMATS[name].write(source, path)
        found[name] = FORMATS[name].check(source, path)
        assert found[name]["layers"]["layer_error"] < 1e-4
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["binary", "ternary", "float", "kbit3"])
def test_micro_networks_of_every_layer_type(kind: str, tmp_path: Path) -> None:
    cells = random_cells(2, torch.Generator().manual_seed(len(kind)))
    x, y = photographs(16, 24)
    build = {"out_filters": 4, "layers": 1, "image_size": 16, "layer_bits": [kind]}
    source = source_of(Architecture(cells, space=SPACE), x, y, **build)
    model = write_exact(traced_of(source)).model
    assert_near(open_session(model, 1).run(None, {"images": x.numpy()})[0], logits_of(source.network, x), 1e-3)
    path = tmp_path / "network.onnx"
    FORMATS["onnx"].write(source, path)
    FORMATS["onnx"].check(source, path)
    cost = network_cost(source.network, source.image_shape)
    assert qonnx.counted(qonnx.build_qonnx(traced_of(source)).model, source.image_shape)["bitops"] == cost.bitops


@pytest.mark.slow
@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10**6), st.sampled_from([(1, 2), (3, 4), (2, 8), (2, 4, 8)]), st.sampled_from([8, 32]))
def test_random_architectures_in_every_format(
    tmp_path_factory: pytest.TempPathFactory, seed: int, bits: tuple[int, ...], ends: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    architecture = Architecture(random_genotype(generator, nodes=2, multiplier=2))
    architecture = Architecture(architecture.genotype, random_bits(architecture, bits, generator))
    source = source_of(architecture, *photographs(16, 16), seed=seed, stem_bits=ends, classifier_bits=ends, **SIZES)
    all_formats(source, tmp_path_factory.mktemp("formats"))


@pytest.mark.slow
@pytest.mark.parametrize("build", [{"weight_quantizer": "lsq", "activation_quantizer": "lsq"}])
def test_learned_steps_and_an_operation_of_ones_own(build: dict[str, str], tmp_path: Path) -> None:
    class Gate(nn.Module):
        """A sigmoid of a 1x1 convolution, times the input."""

        def __init__(self, conv: nn.Module) -> None:
            super().__init__()
            self.conv = conv

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(self.conv(x))

    OPERATIONS["gate"] = lambda conv, norm, channels, stride: nn.Sequential(
        Gate(conv(channels, channels, 1)), nn.AvgPool2d(stride)
    )
    architecture = Architecture(
        Genotype((("gate", 0), ("skip_connect", 1)), (2,), (("gate", 0), ("avg_pool_3x3", 1)), (2,))
    )
    source = source_of(architecture.with_uniform_bits(4, 4), *photographs(16, 24), **SIZES, **build)
    all_formats(source, tmp_path)


@pytest.mark.slow
def test_a_program_of_torch_runs_without_this_project(source: Source, tmp_path: Path) -> None:
    path, x = tmp_path / "network.pt2", images_of(source)
    write_torch(source, path)
    np.save(tmp_path / "x.npy", x.numpy())
    code = (
        "import numpy, sys, torch\n"
        "program = torch.export.load('network.pt2').module()\n"
        "numpy.save('y.npy', program(torch.from_numpy(numpy.load('x.npy'))).detach().numpy())\n"
        "assert not [name for name in sys.modules if name.startswith('common')]\n"
    )
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True)
    assert_near(np.load(tmp_path / "y.npy"), logits_of(source.network, x))


@pytest.mark.slow
def test_a_sixth_of_fp32_where_weights_are_most_of_it() -> None:
    genotype = Genotype(
        (("sep_conv_3x3", 0), ("sep_conv_5x5", 1)), (2,), (("sep_conv_3x3", 0), ("max_pool_3x3", 1)), (2,)
    )
    architecture = Architecture(genotype)
    architecture = Architecture(genotype, random_bits(architecture, (2, 4), torch.Generator().manual_seed(0)))
    x = photographs(8, 4)[0]
    traced = traced_of(source_of(architecture, x, init_channels=64, layers=3, stem="cifar"))
    small, large = (len(write(traced).model.SerializeToString()) for write in (write_exact, write_float))
    assert small <= large / 6
