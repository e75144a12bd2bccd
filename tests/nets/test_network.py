# SPDX-License-Identifier: Apache-2.0
"""Evaluation networks against the oracles: parameters, logits, loss, gradients, statistics; ends and drop path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import quant
from common.nets import Architecture, BitPolicy, Network, build_network, load_architecture
from common.nets.architecture import CellBits
from common.nets.operations import drop_path
from genotypes import Genotype
from tests.helpers.fill import fill, waves


def network(name: str, **options: Any) -> Network:
    """A network of a named genotype."""
    settings = {"num_classes": 10, "init_channels": 8, "layers": 5} | options
    bits = settings.pop("bits", None)
    architecture = load_architecture(name)
    architecture = architecture if bits is None else architecture.with_uniform_bits(*bits)
    return build_network(architecture, **settings)


def size(model: nn.Module) -> tuple[int, int]:
    """Parameters with and without the auxiliary head."""
    total = sum(p.numel() for p in model.parameters())
    head = sum(p.numel() for name, p in model.named_parameters() if "auxiliary" in name)
    return total, total - head


@pytest.mark.parametrize("name", ["DARTS_V1", "DARTS_V2", "PC_DARTS_cifar", "PC_DARTS_image"])
def test_parameters(oracle: Any, name: str) -> None:
    truth = oracle("eval_params_macs")[name]
    for key, options in (
        ("cifar_C36_L20", {"init_channels": 36, "layers": 20}),
        ("cifar100_C36_L20", {"init_channels": 36, "layers": 20, "num_classes": 100}),
        ("imagenet_C48_L14", {"init_channels": 48, "layers": 14, "num_classes": 1000, "stem": "imagenet"}),
    ):
        with torch.device("meta"):
            found = size(network(name, auxiliary=True, **options))
            alone = size(network(name, auxiliary=False, **options))
        assert found == (truth[key]["params_with_aux"], truth[key]["params_no_aux"])
        assert alone == (truth[key]["params_no_aux"], truth[key]["params_no_aux"])


def assert_close(actual: torch.Tensor, expected: Any, atol: float = 1e-8) -> None:
    """Equality with an oracle's list."""
    torch.testing.assert_close(actual.detach(), torch.tensor(expected, dtype=torch.float64), atol=atol, rtol=0)


@pytest.mark.parametrize("name", ["DARTS_V2", "PC_DARTS_cifar"])
def test_cifar_forward_and_gradient(oracle: Any, name: str) -> None:
    truth = oracle("eval_forward")["cifar"]["results"][name]
    model = fill(network(name, auxiliary=True))
    assert size(model) == (truth["params_with_aux"], truth["params_no_aux"])
    x = waves((2, 3, 32, 32), "cos")
    model.eval()
    logits, auxiliary = model(x)
    assert auxiliary is None
    assert_close(logits, truth["eval_logits_fresh_running_stats"])
    model.train()
    logits, auxiliary = model(x)
    assert_close(logits, truth["train_logits"])
    assert_close(auxiliary, truth["train_aux_logits"])
    labels = torch.tensor([3, 7])
    loss = F.cross_entropy(logits, labels) + 0.4 * F.cross_entropy(auxiliary, labels)
    assert loss.item() == pytest.approx(truth["train_loss_ce_plus_0.4aux"], abs=1e-8)
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert norm.item() == pytest.approx(truth["grad_global_norm"], rel=1e-10)
    stem = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    assert_close(stem.weight.grad.flatten()[:5], truth["stem_weight_grad_first5"], atol=1e-6)
    statistics = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert_close(statistics.running_mean[:5], truth["stem_bn_running_mean_first5_after_one_train_fwd"])


def test_imagenet_forward(oracle: Any) -> None:
    truth = oracle("eval_forward")["imagenet"]["results"]["DARTS_V2"]
    model = fill(network("DARTS_V2", auxiliary=True, stem="imagenet", num_classes=20))
    assert size(model) == (truth["params_with_aux"], truth["params_no_aux"])
    x = waves((1, 3, 224, 224), "cos")
    model.eval()
    with torch.no_grad():
        assert_close(model(x)[0], truth["eval_logits_fresh_running_stats"])
        model.train()
        logits, auxiliary = model(x)
    assert_close(logits, truth["train_logits"])
    assert_close(auxiliary, truth["train_aux_logits"])


@pytest.mark.parametrize("name", ["NASNet", "AmoebaNet"])
def test_cells_with_other_concats_and_wide_kernels_run(name: str) -> None:
    """Concat indices and every stride (conv_7x1_1x7 too) are honoured."""
    model = network(name, auxiliary=True)
    genotype = model.architecture.genotype
    logits, auxiliary = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == auxiliary.shape == (2, 10)
    assert model.classifier.in_features == 32 * len(genotype.normal_concat)
    logits.sum().backward()


@pytest.mark.parametrize("bits", [(2, 2), (1, 4), (3, 3), (8, 8), (32, 4)])
@pytest.mark.parametrize("scheme", ["default", "reference"])
def test_uniform_bits_reach_every_convolution_of_the_cells_and_nothing_else(bits: tuple[int, int], scheme: str) -> None:
    model = network("PC_DARTS", bits=bits, scheme=scheme, auxiliary=True)
    for name, module in model.named_modules():
        if isinstance(module, quant.QuantConv2d):
            expected = bits if name.startswith("cells.") else (32, 32)
            assert (module.weight_bits, module.activation_bits) == expected, name
    inside = [m for n, m in model.named_modules() if n.startswith("cells.") and isinstance(m, nn.Conv2d)]
    assert all(isinstance(m, quant.QuantConv2d) for m in inside)
    logits, auxiliary = model(torch.randn(2, 3, 32, 32))
    (logits.sum() + auxiliary.sum()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_quantised_ends() -> None:
    model = network("DARTS_V2", bits=(4, 4), stem_bits=8, classifier_bits=8)
    stem = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    assert (stem.weight_bits, stem.activation_bits) == (8, 8)
    assert (model.classifier.weight_bits, model.classifier.activation_bits) == (8, 8)
    x = torch.randn(2, 3, 32, 32)
    negative = -x.abs()
    assert stem(negative).abs().max() > 0  # the image is never clamped at zero
    model(x)[0].sum().backward()
    plain = network("DARTS_V2", bits=(4, 4))
    assert (plain.classifier.weight_bits, plain.classifier.activation_bits) == (32, 32)


def test_signed_activations_keep_negatives_at_eight_bits() -> None:
    x = -torch.rand(1, 8, 4, 4) - 0.1
    for signed in (False, True):
        model = network("DARTS_V2", bits=(8, 8), signed_activations=signed)
        pointwise = next(m for n, m in model.named_modules() if n.endswith("pointwise1"))
        assert bool(pointwise(x.expand(1, 8, 4, 4)).abs().max() > 0) == signed


def test_cells_policy_gives_each_cell_its_own_bits() -> None:
    base = load_architecture("PC_DARTS")
    entries = []
    for k, reduction in enumerate([False, True, True]):
        pairs = base.genotype.reduce if reduction else base.genotype.normal
        options = [(2, 2), (4, 2), (8, 4)]
        operations = tuple(
            None if "pool" in p or (p == "skip_connect" and not (reduction and s < 2)) else options[(k + n) % 3]
            for n, (p, s) in enumerate(pairs)
        )
        entries.append(CellBits(reduction, (3, k + 2), (k + 1, 1), operations))
    architecture = Architecture(base.genotype, BitPolicy(cells=tuple(entries)))
    model = build_network(architecture, num_classes=10, init_channels=8, layers=6)
    sources = [0, 0, 1, 0, 2, 0]
    for cell, source in zip(model.cells, sources, strict=True):
        entry = entries[source]
        for part, pair in (
            (cell.preprocess0, entry.preprocess0),
            (cell.preprocess1, entry.preprocess1),
            *zip(cell.operations, entry.operations, strict=True),
        ):
            for module in part.modules():
                if isinstance(module, nn.Conv2d):
                    assert (module.weight_bits, module.activation_bits) == pair
    model(torch.randn(2, 3, 16, 16))


def test_layers_policy_is_complete_or_refused() -> None:
    base = load_architecture("DARTS_V2")
    options = {"num_classes": 10, "init_channels": 8, "layers": 3}
    names = [
        n
        for n, m in build_network(base, **options).named_modules()
        if n.startswith("cells.") and isinstance(m, nn.Conv2d)
    ]
    layers = {name: ((2, 4), (4, 2), (8, 8))[k % 3] for k, name in enumerate(names)}
    model = build_network(Architecture(base.genotype, BitPolicy(layers=layers)), **options)
    for name, pair in layers.items():
        module = model.get_submodule(name)
        assert (module.weight_bits, module.activation_bits) == pair
    model(torch.randn(2, 3, 16, 16))[0].sum().backward()
    short = dict(list(layers.items())[1:])
    with pytest.raises(ValueError, match=names[0]):
        build_network(Architecture(base.genotype, BitPolicy(layers=short)), **options)
    with pytest.raises(ValueError, match="cells.9.nothing"):
        build_network(Architecture(base.genotype, BitPolicy(layers=layers | {"cells.9.nothing": (2, 2)})), **options)


@pytest.mark.parametrize("stem, image, fits", [("cifar", 16, False), ("cifar", 28, False), ("cifar", 32, True),
                                               ("imagenet", 192, False), ("imagenet", 224, True)])  # fmt: skip
def test_auxiliary_head_is_refused_where_its_pooling_does_not_fit(stem: str, image: int, fits: bool) -> None:
    model = network("DARTS_V2", auxiliary=True, stem=stem)
    if fits:
        model.check_input(image)
    else:
        with pytest.raises(ValueError, match=rf"auxiliary.*{image}"):
            model.check_input(image)
    network("DARTS_V2", auxiliary=False, stem=stem).check_input(image)


@pytest.mark.parametrize("stem, image", [("cifar", 15), ("cifar", 30), ("cifar", 4), ("imagenet", 100)])
def test_images_that_cannot_be_halved_are_refused(stem: str, image: int) -> None:
    with pytest.raises(ValueError, match=str(image)):
        network("DARTS_V2", stem=stem).check_input(image)


def test_drop_path_statistics() -> None:
    torch.manual_seed(0)
    x = torch.ones(20_000, 2, 1, 1, dtype=torch.float64)
    y = drop_path(x, 0.3)
    assert set(y.unique().tolist()) == {0.0, 1 / 0.7}
    assert torch.equal(y[:, 0], y[:, 1])  # per sample: all channels together
    assert y[:, 0].count_nonzero().item() / len(y) == pytest.approx(0.7, abs=0.015)
    assert y.mean().item() == pytest.approx(1.0, abs=0.02)


def test_drop_path_acts_in_training_only_and_never_on_the_identity() -> None:
    torch.manual_seed(0)
    model = network("PC_DARTS").double()
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    model.train()
    for module in model.modules():  # batch statistics would couple the passes
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    still = model(x)[0]
    model.drop_path_probability = 0.5
    assert not torch.equal(model(x)[0], still)
    model.eval()
    torch.testing.assert_close(model(x)[0], still)
    identities = Genotype(
        (("skip_connect", 0), ("skip_connect", 1)), (2,), (("skip_connect", 0), ("skip_connect", 1)), (2,)
    )
    cell = build_network(Architecture(identities), num_classes=10, init_channels=8, layers=3).cells[0].train()
    states = torch.randn(4, 24, 8, 8), torch.randn(4, 24, 8, 8)
    assert torch.equal(cell(*states, 0.9), cell(*states, 0.0))


def test_a_growing_drop_path_compiles_once_more_and_not_every_epoch() -> None:
    """Without it and with it: two programs, whatever the probability; it drops what it is told to."""
    from torch._dynamo.testing import CompileCounter

    torch.manual_seed(0)
    model, counter = network("PC_DARTS", layers=1).train(), CompileCounter()
    compiled, x = torch.compile(model, backend=counter), torch.randn(4, 3, 16, 16)
    outputs = []
    for probability in (0.0, 0.1, 0.2, 0.3):
        model.drop_path_probability = probability
        outputs += [compiled(x)[0] for _ in range(2)]
    assert counter.frame_count == 2
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[6], outputs[7])
    assert model.drop_path_probability == 0.3 and "_drop_path" not in model.state_dict()


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_images_are_held_as_told_and_the_function_is_the_same(memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    model = network("PC_DARTS", bits=(4, 4)).double().eval()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected, seen = model(x)[0], []
    model.memory_format = memory_format
    model.stem[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    torch.testing.assert_close(model(x)[0], expected)
    assert seen[0].is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"stem": "mnist"}, "stem.*mnist"),
        ({"init_channels": 0}, "init-channels"),
        ({"layers": 0}, "layers"),
        ({"num_classes": 0}, "classes"),
        ({"bits": (4, 4), "weight_quantizer": "magic"}, "magic"),
        ({"bits": (4, 4), "activation_quantizer": "magic"}, "magic"),
        ({"bits": (1, 4), "weight_quantizer": "lsq"}, "1"),
        ({"bits": (4, 4), "scheme": "magic"}, "magic"),
        ({"stem_bits": 5}, "5"),
        ({"classifier_bits": 7}, "7"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        network("DARTS_V2", **options)


def test_lsq_steps_are_weight_parameters_without_decay() -> None:
    model = network("DARTS_V2", bits=(4, 4), weight_quantizer="lsq", activation_quantizer="lsq")
    weights = {id(p) for p in model.weight_parameters()}
    assert weights == {id(p) for p in model.parameters()}
    steps = model.no_decay_parameters()
    convolutions = [m for n, m in model.named_modules() if n.startswith("cells.") and isinstance(m, nn.Conv2d)]
    assert len(steps) == 2 * len(convolutions) and {id(p) for p in steps} <= weights
    model(torch.randn(2, 3, 16, 16))[0].sum().backward()
    assert all(p.grad is not None for p in steps)
    assert network("DARTS_V2").no_decay_parameters() == []


def test_an_output_does_not_depend_on_the_batch() -> None:
    """Evaluation of a quantised network (4 weight and 8 activation bits): one image alone gives the same logits."""
    torch.manual_seed(0)
    model = network("PC_DARTS", bits=(4, 8)).double()
    x = torch.randn(6, 3, 16, 16, dtype=torch.float64)
    model(x)
    model.eval()
    torch.testing.assert_close(model(x)[0][2:3], model(x[2:3])[0], atol=1e-10, rtol=0)
