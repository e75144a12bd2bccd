# SPDX-License-Identifier: Apache-2.0
"""Latency as a cost: the table's file, what it refuses, and searches that it, MACs or memory steer."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from common.cost import ExpectedCost, network_cost
from common.cost.expected import bit_pairs
from common.cost.latency import COLUMNS, Conditions, Latency, LatencyTable, Timing, read_table
from common.cost.measures import Counted
from common.cost.places import Place, Sizes, architecture_places, build_place, space_places
from common.nets import Architecture, build_network, build_supernet
from common.nets.architecture import needs_bits
from common.nets.sampling import random_bits, random_genotype
from genotypes import PRIMITIVES, lookup
from qsubnet.cost import SubnetCost
from qsubnet.subnet import Subnet
from tests.cost.test_expected import built_cost, make_certain, supernet

SIZES = Sizes("cifar", 3, 10, 8, 6, 16)
HERE = Conditions("torch", 1, 1, "cpu", "some processor", "torch 2")


def table_of(
    bits: tuple[int, ...] | None = (2, 4),
    sizes: Sizes = SIZES,
    cost: Callable[[Place, tuple[int, int]], float] | None = None,
    std: float = 0.0,
) -> LatencyTable:
    """A table of made-up times that differ from row to row; `cost` gives them in place of chance."""
    source = random.Random(0)
    rows = {}
    for place, chosen in space_places(PRIMITIVES, sizes).items():
        for pair in bit_pairs(bits) if chosen else [(32, 32)]:
            mean = cost(place, pair) if cost else source.uniform(0.5, 2) * (pair[0] + 2 * pair[1])
            rows[place, pair] = Timing(mean, std, 10)
    return LatencyTable(rows, HERE)


def measured_sum(table: LatencyTable, architecture: Architecture, sizes: Sizes) -> float:
    """The sum of a network's rows, by walking the modules of the built network: nothing of the planning is shared."""
    network = build_network(
        architecture,
        stem=sizes.stem,
        in_channels=sizes.in_channels,
        num_classes=sizes.num_classes,
        init_channels=sizes.init_channels,
        layers=sizes.layers,
    )
    seen: list[tuple[str, nn.Module, int, int, int]] = []

    def note(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        x = inputs[0]
        seen.append((name, module, x.shape[1], output.shape[1], x.shape[2]))

    for name, module in network.named_modules():
        parts = name.split(".")
        whole = len(parts) == 4 if "operations" in parts else len(parts) == 3 and parts[0] == "cells"
        if name == "stem" or whole:
            module.register_forward_hook(partial(note, name))
    with torch.no_grad():
        network.eval()(torch.zeros(1, sizes.in_channels, sizes.image_size, sizes.image_size))
    total, cells = 0.0, list(network.cells)
    for name, module, c_in, c_out, size in seen:
        parts = name.split(".")
        if name == "stem":
            total += table.rows[Place("stem", c_in, c_out, size, 1), (32, 32)].mean
            continue
        convs = [m for m in module.modules() if hasattr(m, "weight_bits")]
        pair = (convs[0].weight_bits, convs[0].activation_bits) if convs else (32, 32)
        cell = cells[int(parts[1])]
        if parts[2].startswith("preprocess"):
            operation, stride = "preprocess", 2 if len(convs) == 2 else 1
        else:
            genotype = architecture.genotype
            primitive, state = (genotype.reduce if cell.reduction else genotype.normal)[int(parts[3])]
            operation, stride = primitive, 2 if cell.reduction and state < 2 else 1
            if isinstance(module, nn.Identity):
                continue
        total += table.rows[Place(operation, c_in, c_out, size, stride), pair].mean
    size = sizes.image_size
    for cell in cells:
        size = size // 2 if cell.reduction else size
        total += 4 * table.rows[Place("sum", cell.channels, cell.channels, size), (32, 32)].mean
        total += table.rows[Place("concat", cell.channels, 4 * cell.channels, size), (32, 32)].mean
    features = network.classifier.in_features
    return total + table.rows[Place("classifier", features, sizes.num_classes, size), (32, 32)].mean


@pytest.mark.parametrize("seed", [0, 1])
def test_a_network_takes_the_sum_of_its_rows(seed: int) -> None:
    table = table_of()
    generator = torch.Generator().manual_seed(seed)
    architecture = Architecture(random_genotype(generator))
    architecture = replace(architecture, bits=random_bits(architecture, (2, 4), generator))
    assert table.predict(architecture, SIZES) == pytest.approx(measured_sum(table, architecture, SIZES), rel=1e-12)


@pytest.mark.parametrize("bits", [(2, 4), None])
def test_certain_choices_take_what_their_network_takes(bits: tuple[int, ...] | None) -> None:
    net = supernet(3, bits=bits)
    table = table_of(bits)
    cost = ExpectedCost(
        net, input_size=16, eval_init_channels=8, eval_layers=6, measure=Latency(table, bit_pairs(bits))
    )
    truth = table.predict(net.architecture(), SIZES)
    assert cost.exact(net).item() == pytest.approx(truth, rel=1e-12)
    make_certain(net)
    assert cost(net).item() == pytest.approx(truth, rel=1e-9)
    assert cost.cheapest <= truth <= cost.dearest


def test_the_expected_latency_s_gradient_is_finite_differences() -> None:
    net = supernet(1)
    cost = ExpectedCost(
        net, input_size=16, eval_init_channels=8, eval_layers=6, measure=Latency(table_of(), bit_pairs((2, 4)))
    )
    parameters = net.arch_parameters() + net.gamma_parameters()
    gradients = torch.autograd.grad(cost(net), parameters)
    torch.manual_seed(2)
    for p, gradient in zip(parameters, gradients, strict=True):
        direction, values = torch.randn_like(p), []
        for sign in (1, -1):
            with torch.no_grad():
                p.add_(direction, alpha=sign * 1e-5)
                values.append(cost(net).item())
                p.sub_(direction, alpha=sign * 1e-5)
        assert (values[0] - values[1]) / 2e-5 == pytest.approx((gradient * direction).sum().item(), rel=1e-5)
        assert gradient.abs().sum() > 0
    cost.term(net).backward()
    with torch.no_grad():
        for p in net.arch_parameters() + net.gamma_parameters():
            p.zero_()
    assert cost.term(net).item() == pytest.approx(2489.3, rel=1e-9), "all logits equal: as for BitOps"


def test_a_table_of_bitops_steers_as_bitops_do() -> None:
    """Times that are BitOps, and nothing for sums: value and gradient are those of --cost bitops."""
    net, counted = supernet(5), Counted()

    def cost(place: Place, pair: tuple[int, int]) -> float:
        return max(counted.values(place, [pair])[0], 1e-12)

    table = table_of(cost=cost)
    sizes = {"input_size": 16, "eval_init_channels": 8, "eval_layers": 6}
    by_table = ExpectedCost(net, **sizes, measure=Latency(table, bit_pairs((2, 4))))
    bitops = ExpectedCost(net, **sizes)
    assert by_table(net).item() == pytest.approx(bitops(net).item(), rel=1e-9)
    parameters = net.arch_parameters() + net.gamma_parameters()
    found = [torch.autograd.grad(cost.term(net), parameters) for cost in (by_table, bitops)]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "name, field, options",
    [
        ("memory", "weight_bytes", {}),
        ("macs", "macs", {}),
        pytest.param("memory", "weight_bytes", {"bits": (2, 4, 8), "stem": "imagenet"}, marks=pytest.mark.slow),
    ],
)
def test_memory_and_macs_are_the_built_networks(name: str, field: str, options: dict[str, Any]) -> None:
    net, size = supernet(2, **options), 64 if "stem" in options else 16
    ends = {"stem_bits": 8, "classifier_bits": 4}
    cost = ExpectedCost(net, input_size=size, eval_init_channels=8, eval_layers=7, measure=Counted(name), **ends)
    network = build_network(
        net.architecture(), stem=net.stem_kind, in_channels=3, num_classes=10, init_channels=8, layers=7, **ends
    )
    assert cost.exact(net).item() == pytest.approx(getattr(network_cost(network, size), field), rel=1e-12)
    assert cost.steers_bits == (name == "memory")


def test_bitops_of_uneven_bits_stay() -> None:
    """The general table gives what the product of bits gave, bits of both operands apart."""
    net = supernet(7, bits=(1, 3, 8))
    cost = ExpectedCost(net, input_size=16, eval_init_channels=8, eval_layers=6)
    assert cost.exact(net).item() == built_cost(net, 16, 8, 6, "relative", "exact")


# ------------------------------------------------------------------------------------------------------- the table


def test_equal_rows_are_said_and_steer_no_bits() -> None:
    """2% of noise on equal times is no reason to choose bits."""
    source = random.Random(1)
    noisy = table_of(cost=lambda place, pair: source.gauss(1, 0.02), std=0.06)
    pairs = bit_pairs((2, 4))
    assert not noisy.tells_apart(pairs) and "cannot choose among them" in noisy.bits_text(pairs)
    measure = Latency(noisy, pairs)
    assert any("cannot choose" in note for note in measure.notes)
    net = supernet(1)
    cost = ExpectedCost(net, input_size=16, eval_init_channels=8, eval_layers=6, measure=measure)
    assert not cost.steers_bits
    gammas = torch.autograd.grad(cost(net), net.gamma_parameters())
    assert max(float(g.abs().max()) for g in gammas) < 1e-9
    alphas = torch.autograd.grad(cost(net), net.arch_parameters())
    assert all(float(g.abs().max()) > 1e-3 for g in alphas)
    with pytest.raises(ValueError, match="nothing but bits is chosen here"):
        SubnetCost(subnet(), 16, measure=Latency(with_convolutions(noisy), pairs))
    different = table_of(cost=lambda place, pair: source.gauss(1, 0.02) * pair[0], std=0.06)
    assert different.tells_apart(pairs) and "differ" in different.bits_text(pairs)


def test_bits_that_take_equally_long_among_others_are_levelled() -> None:
    """2 and 4 bits run on the same kernels, 8 bits are slower: noise does not choose between 2 and 4, 8 still costs."""
    source, pairs = random.Random(2), bit_pairs((2, 4, 8))
    table = table_of((2, 4, 8), cost=lambda place, pair: source.gauss(2 if 8 in pair else 1, 0.02), std=0.06)
    small, large = [pair for pair in pairs if 8 not in pair], [pair for pair in pairs if 8 in pair]
    assert [sorted(group) for group in table.groups(pairs)] == [small, large] and table.tells_apart(pairs)
    assert "cannot choose among 2/2, 2/4, 4/2, 4/4; nor among 2/8, 4/8, 8/2, 8/4, 8/8, whose" in table.bits_text(pairs)
    measure = Latency(table, pairs)
    assert any("cannot choose among 2/2, 2/4, 4/2, 4/4" in note for note in measure.notes)
    for place in {place for place, bits in table.rows if bits == (2, 2)}:
        values = dict(zip(pairs, measure.values(place, pairs), strict=True))
        for group in (small, large):
            mean = sum(table.rows[place, pair].mean for pair in group) / len(group)
            assert [values[pair] for pair in group] == pytest.approx([mean] * len(group), rel=1e-12)
            assert len({values[pair] for pair in group}) == 1, "no noise is left"
        assert values[8, 8] > 1.8 * values[2, 2]
    apart = table_of((2, 4, 8), cost=lambda place, pair: 1.2 ** (pairs.index(pair) if pair in pairs else 0))
    assert all(len(group) == 1 for group in apart.groups(pairs)) and "cannot" not in apart.bits_text(pairs)


def test_what_was_not_measured_is_refused() -> None:
    table = table_of()
    shape = Place("sep_conv_3x3", 12, 12, 16, 1)
    with pytest.raises(ValueError, match=r"no row for sep_conv_3x3 \(12 to 12 .*it holds sep_conv_3x3 of 8 to 8"):
        table.timing(shape, (2, 2))
    with pytest.raises(ValueError, match="at 8/2 bits.*it holds it at 2/2, 2/4, 4/2, 4/4 bits"):
        table.timing(Place("sep_conv_3x3", 8, 8, 16, 1), (8, 2))
    with pytest.raises(ValueError, match="no row for mine.*holds the operations"):
        table.timing(Place("mine", 8, 8, 16, 1), (2, 2))
    with pytest.raises(ValueError, match="no row for"):
        ExpectedCost(
            supernet(), input_size=16, eval_init_channels=12, eval_layers=6, measure=Latency(table, bit_pairs((2, 4)))
        )
    with pytest.raises(ValueError, match="no place was measured at all of the bits"):
        Latency(table, bit_pairs((2, 8)))
    assert table.milliseconds(Place("skip_connect", 99, 99, 16, 1), (32, 32)) == 0


def test_the_file_comes_back() -> None:
    table = table_of(std=0.25)
    found = read_table(table.to_csv(), "x.csv")
    assert found.conditions == table.conditions and found.rows.keys() == table.rows.keys()
    for key, timing in table.rows.items():
        assert found.rows[key].mean == pytest.approx(timing.mean, rel=1e-5) and found.rows[key].n == timing.n
    assert found.to_csv() == table.to_csv()


@pytest.mark.parametrize(
    "column, value, message",
    [
        ("operation", "", "operation"),
        ("operation", "a b", "operation"),
        ("in_channels", "0", "in_channels"),
        ("in_channels", "-8", "in_channels"),
        ("size", "1.5", "size"),
        ("stride", "\u0662", "stride"),
        ("weight_bits", "7", "bits are 7/"),
        ("mean_ms", "nan", "mean_ms"),
        ("mean_ms", "inf", "mean_ms"),
        ("mean_ms", "0", "mean_ms"),
        ("std_ms", "-1", "std_ms"),
        ("n", "0", "n is"),
        ("device", "", "device"),
        ("threads", "2", "join no tables"),
        ("backend", "other", "join no tables"),
    ],
)
def test_a_wrong_field_is_named_with_its_line(column: str, value: str, message: str) -> None:
    lines = table_of().to_csv().splitlines()
    fields = lines[2].split(",")
    fields[COLUMNS.index(column)] = value
    lines[2] = ",".join(fields)
    with pytest.raises(ValueError, match=f"^x.csv, line 3: .*{message}"):
        read_table("\n".join(lines), "x.csv")


@pytest.mark.parametrize("change", ["header", "short", "twice", "empty", "quote"])
def test_a_wrong_file_is_refused(change: str) -> None:
    lines = table_of().to_csv().splitlines()
    if change == "header":
        lines[0] = lines[0].replace("mean_ms", "ms")
    elif change == "short":
        lines[1] = lines[1].rpartition(",")[0]
    elif change == "twice":
        lines.append(lines[1])
    elif change == "empty":
        del lines[1:]
    else:
        lines[1] = '"' + lines[1]
    with pytest.raises(ValueError, match="^x.csv"):
        read_table("\n".join(lines), "x.csv")


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_no_text_breaks_the_reader(data: st.DataObject) -> None:
    """Whatever is in a file: a table or one ValueError."""
    lines = table_of().to_csv().splitlines()[:4]
    row = data.draw(st.integers(0, len(lines) - 1))
    at = data.draw(st.integers(0, len(lines[row])))
    lines[row] = lines[row][:at] + data.draw(st.text(max_size=5)) + lines[row][at:]
    try:
        assert read_table("\n".join(lines), "x.csv").rows
    except ValueError as error:
        assert str(error).startswith("x.csv")


# ---------------------------------------------------------------------------------- single convolutions (qsubnet)


def subnet(bits: tuple[int, ...] = (2, 4)) -> Subnet:
    torch.manual_seed(0)
    return Subnet(build_network(lookup("PC_DARTS")[1], in_channels=3, num_classes=10, init_channels=8, layers=6), bits)


def with_convolutions(table: LatencyTable, scale: float = 0.25) -> LatencyTable:
    """The table with rows for each convolution of a place, `scale` of its time."""
    rows = dict(table.rows)
    for (place, pair), timing in table.rows.items():
        if place.operation == "preprocess" or (needs_bits(place.operation, place.stride) and pair != (32, 32)):
            for name, layer in build_place(place).named_modules():
                if isinstance(layer, nn.Conv2d):
                    inside = replace(place, operation=f"{place.operation}.{name}")
                    rows[inside, pair] = replace(timing, mean=scale * timing.mean)
    return replace(table, rows=rows)


def test_a_subnet_of_one_pair_takes_what_the_table_says_of_its_operations() -> None:
    """And one convolution at other bits takes its own rows' difference more."""
    net, table = subnet(), with_convolutions(table_of())
    cost = SubnetCost(net, 16, measure=Latency(table, bit_pairs((2, 4))))
    with torch.no_grad():
        for conv in net.convolutions.values():
            conv.gamma_weight.copy_(torch.tensor([0.0, -1e4]))
            conv.gamma_activation.copy_(torch.tensor([0.0, -1e4]))
    architecture = Architecture(lookup("PC_DARTS")[1]).with_uniform_bits(2, 2)
    start = table.predict(architecture, SIZES)
    assert cost.exact(net).item() == pytest.approx(start, rel=1e-12) == cost(net).item()
    index = net.network.architecture.genotype.normal.index(("sep_conv_3x3", 1))
    with torch.no_grad():
        conv = net.convolutions[f"cells.0.operations.{index}.depthwise1"]
        conv.gamma_activation.copy_(torch.tensor([-1e4, 0.0]))
    place = Place("sep_conv_3x3.depthwise1", 8, 8, 16)
    more = table.rows[place, (2, 4)].mean - table.rows[place, (2, 2)].mean
    assert cost.exact(net).item() == pytest.approx(start + more, rel=1e-12)
    with pytest.raises(ValueError, match="no row for preprocess.conv"):
        SubnetCost(net, 16, measure=Latency(table_of(), bit_pairs((2, 4))))


@pytest.mark.parametrize("name, field", [("bitops", "bitops"), ("memory", "weight_bytes")])
def test_a_subnet_s_cost_is_the_built_networks(name: str, field: str) -> None:
    net = subnet((2, 8))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for logits in net.gamma_parameters():
            logits.copy_(torch.randn(logits.shape, generator=generator))
    cost = SubnetCost(net, 16, measure=Counted(name))
    built = build_network(net.architecture(), in_channels=3, num_classes=10, init_channels=8, layers=6)
    assert cost.exact(net).item() == getattr(network_cost(built, 16), field)
    with torch.no_grad():
        for logits in net.gamma_parameters():
            logits.zero_()
    bitops = SubnetCost(net, 16)
    assert cost.term(net).item() == pytest.approx(bitops.term(net).item(), rel=1e-6), "a weight means the same"


# -------------------------------------------------------------------------------------------------- the commands


def test_places_are_all_that_networks_have() -> None:
    """What a space lists holds every place of architectures drawn from it, of both stems."""
    for sizes in (SIZES, Sizes("imagenet", 3, 5, 8, 4, 64)):
        places = space_places(PRIMITIVES, sizes)
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            architecture = Architecture(random_genotype(generator)).with_uniform_bits(2, 4)
            for place, bits in architecture_places(architecture, sizes):
                assert place.passes_on or place in places
                assert place.passes_on or bits == ((2, 4) if places[place] else (32, 32))


@pytest.mark.slow
@pytest.mark.parametrize("backend, bits", [("onnxruntime", (2, 4)), ("onnx", (2, 4))])
def test_what_onnxruntime_is_timed_on_is_the_place(backend: str, bits: tuple[int, int]) -> None:
    """Its output is the module's: in full precision, or fake-quantised up to values that fall to the next level."""
    from common.recipes.latency import BACKENDS

    place, x = Place("dil_conv_3x3", 4, 4, 8), torch.randn(1, 4, 8, 8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = build_place(place, bits).eval()
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_var.fill_(0.25)
    found = torch.from_numpy(BACKENDS[backend].call(module, x, {}, place)()[0])
    if backend == "onnxruntime":
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d):
                layer.quantize_weight = layer.quantize_activation = nn.Identity()
    with torch.no_grad():
        expected = module(x).flatten(1)
    assert found.shape == expected.shape
    near = torch.isclose(found, expected, rtol=1e-4, atol=1e-5).float().mean()
    assert near > (0.999 if backend == "onnxruntime" else 0.9)


def test_a_measured_place_is_the_networks_own() -> None:
    """Built by itself a place has the layers that it has within a network: same parameters, same output shape."""
    for place in (Place("sep_conv_5x5", 8, 8, 16, 2), Place("preprocess", 24, 8, 16, 2), Place("stem", 3, 8, 64, 8)):
        module = build_place(place, (2, 4)).eval()
        x = torch.zeros(1, place.in_channels, place.size, place.size)
        found = module(x)
        assert found.shape == (1, place.out_channels, place.size // place.stride, place.size // place.stride)


def test_measure_then_check_then_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From nothing to a search that a measured table steers; no figure of a clock is asserted."""
    from common.cost.__main__ import main as cost
    from common.engine import read_json
    from qdarts.search import main as search

    table, space = tmp_path / "lut.csv", ["--dataset", "digits", "--init-channels", "4", "--layers", "3"]
    quick = ["--samples", "2", "--least-ms", "0.01"]
    few = tmp_path / "few.py"
    few.write_text("PRIMITIVES = ['none', 'max_pool_3x3', 'skip_connect', 'dil_conv_3x3']\n")
    space += ["--search-space", str(few)]
    assert cost(["latency", "measure", "--out", str(table), *space, *quick]) == 0
    rows = read_table(table.read_text(), "lut").rows
    assert {place.operation for place, _ in rows} == {
        *("max_pool_3x3", "dil_conv_3x3", "skip_connect", "preprocess", "stem", "sum", "concat", "classifier")
    }
    assert "over all places" in capsys.readouterr().out
    assert cost(["latency", "measure", "--out", str(table), *space]) == 2 and "overwritten" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cost(["latency", "check", "--lut", str(table), "--least-ms", "1"])
    assert "--least-ms: there is no such flag" in capsys.readouterr().err
    found = ["latency", "check", "--lut", str(table), *space, *quick[:2], "--architectures", "3", "--json"]
    assert cost(found) == 0
    assert '"mape"' in capsys.readouterr().out
    assert cost([*found[:-1], "--layers", "4"]) == 2 and "holds no row" in capsys.readouterr().err
    run = tmp_path / "run"
    flags = ["--preset", "smoke", "--device", "cpu", "--no-tensorboard", "--no-plots", "--search-space", str(few)]
    flags += ["--cost", "latency", "--lut", str(table), "--save", str(run)]
    assert search(flags) == 0
    said = capsys.readouterr().out
    assert "latency: torch, 1 image a forward" in said and "ms can be reached" in said
    result = read_json(run / "result.json")
    assert result["cost_measure"] == "latency" and result["steered_cost"] > 0 and result["steered_bitops"] is None
    assert result["exact_bitops"] > 0
    # what the file says belongs to the run
    table.write_text(table.read_text().replace("torch,1,1", "torch,2,1"))
    assert search([*flags, "--resume", "auto"]) == 2
    assert f"--lut {table}: the file or run there has changed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--cost latency", "--cost latency: needs a table"),
        ("--lut x.csv", "--lut: only has a meaning with --cost latency"),
        ("--cost macs --target-bitops 1G", "--target-bitops: --cost macs is not counted in BitOps"),
        ("--target 1 --target-bitops 1G", "--target: .*drop one of the two"),
        ("--cost memory --cost-accounting paper", "--cost-accounting paper: counts BitOps"),
        ("--cost memory --cost-weighting uniform", "--cost-weighting uniform: counts BitOps"),
        ("--target 1 --complexity-decay 0", "--target: needs a cost weight"),
    ],
)
def test_flags_that_mean_nothing_together(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    from common.recipes.flags import resolve_search, search_parser

    with pytest.raises(SystemExit):
        resolve_search(search_parser("search.py", "test"), flags.split())
    assert re.search(message, capsys.readouterr().err)


def test_a_table_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from qdarts.search import main as search

    flags = ["--preset", "smoke", "--device", "cpu", "--cost", "latency", "--lut", str(tmp_path / "no.csv")]
    assert search([*flags, "--save", str(tmp_path / "run")]) == 2
    assert "there is no such file" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_target_in_the_unit_of_the_cost(tmp_path: Path) -> None:
    """The controller follows the exact memory, and the result says whether it was met."""
    from common.recipes.flags import resolve_search, search_parser
    from common.recipes.search_setup import prepare_search

    flags = ["--preset", "smoke", "--device", "cpu", "--cost", "memory"]
    config = resolve_search(search_parser("search.py", "test"), [*flags, "--target", "9e3"])
    prepared = prepare_search(config)
    assert prepared.controller is not None and prepared.controller.target == 9000
    prepared.controller.update(prepared.supernet)
    assert prepared.controller.exact.item() == prepared.cost.exact(prepared.supernet).item()
    assert "0.009 MB, within 10%" in prepared.notes[0] and "activation bits" in prepared.notes[0]
    config = resolve_search(search_parser("search.py", "test"), [*flags, "--target", "1"])
    with pytest.raises(ValueError, match="--target 1: this search reaches .* bytes"):
        prepare_search(config)


def test_a_network_in_double_is_measured_as_any(tmp_path: Path) -> None:
    """`build_supernet` in float32 and in float64 expect the same latency."""
    measure = Latency(table_of(), bit_pairs((2, 4)))
    values = []
    for double in (False, True):
        torch.manual_seed(0)
        net = build_supernet(method="darts", bits=(2, 4), num_classes=10, init_channels=8, layers=3)
        net = net.double() if double else net
        cost = ExpectedCost(net, input_size=16, eval_init_channels=8, eval_layers=6, measure=measure)
        values.append(cost(net).item())
    assert values[0] == pytest.approx(values[1], rel=1e-6)
