# SPDX-License-Identifier: Apache-2.0
"""Post-training quantisation on digits at smoke size: from a training to a run folder like any other."""

from __future__ import annotations

import dataclasses
import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evaluate
from common.cost import network_cost
from common.cost.__main__ import main as cost_main
from common.data import DatasetInfo, ImageData, Split, evaluation_batches, hold_out, load
from common.engine import CheckpointStore, read_json
from common.nets import OPERATIONS, load_architecture
from common.quant import CALIBRATED_METHODS, QuantConv2d, QuantLinear
from common.quant.quantizers import ACTIVATION_QUANTIZERS, make_quantizer
from common.recipes.trained import load_trained
from ptq import post_training, quantize, train


@pytest.fixture(autouse=True, scope="module")
def _few_samples() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(post_training, "SAMPLES", 2048)
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short full-precision training that held a part of its images out."""
    folder = tmp_path_factory.mktemp("runs") / "fp32"
    flags = ["--preset", "smoke", "--steps-per-epoch", "20", "--val-fraction", ".2", "--drop-path-prob", "0"]
    assert train.main([*flags, "--no-tensorboard", "--device", "cpu", "--save", str(folder)]) == 0
    return folder


def run(source: Path, save: Path, *flags: str) -> int:
    few = ["--n-sample", "2", "--batch-size", "64", "--device", "cpu"]
    return quantize.main([str(source), "--save", str(save), *few, *flags])


@pytest.fixture(scope="module")
def quantized(source: Path) -> Path:
    """Runs at (2, 2), (4, 4) and (8, 8), by the default method."""
    folder = source.parent / "mse"
    assert run(source, folder, "--param_bits", "2", "4", "8", "--fwd_bits", "2", "4", "8") == 0
    return folder


def logits(folder: Path) -> Tensor:
    network, _, _ = load_trained(folder)
    data = load("digits")
    with torch.inference_mode():
        return torch.cat([network(x)[0] for x, _ in evaluation_batches(data.test, data.info, 120, "cpu")])


def test_training_is_full_precision_whatever_bits_the_architecture_has(tmp_path: Path, source: Path) -> None:
    assert read_json(source / "result.json")["bits_mean"] == {"weight": 32, "activation": 32}
    file = load_architecture("PC_DARTS").with_uniform_bits(2, 2).save(tmp_path / "two.json")
    config = train.resolve_training(train.parser(), ["--arch", str(file)])
    assert (config.wbits, config.abits) == (32, 32)


def test_the_result_is_one_of_a_training(source: Path, quantized: Path) -> None:
    theirs = read_json(source / "result.json")
    for bits in (2, 4, 8):
        folder = quantized / f"w{bits}a{bits}"
        result = read_json(folder / "result.json")
        assert result["finished"] is True and (result["method"], result["stage"]) == ("ptq", "quantize")
        assert result["bits_mean"] == {"weight": bits, "activation": bits}
        same = ("epochs", "n_train", "n_test", "dataset", "seed", "architecture")
        for name in (*same, "search_seconds", "before_seconds"):
            assert result[name] == theirs[name], name
        assert result["steps_per_epoch"] == 20
        assert [part["seconds"] for part in result["started_from"]] == [theirs["seconds"]] == [result["source_seconds"]]
        assert result["fp32_top1"] == theirs["metrics"]["test_top1"]
        assert result["metrics"]["test_top1"] == result["metrics"]["test_correct"] / 360
        assert {**theirs["network"], **result["network"]} == {**result["network"]}
        assert load_architecture(folder).bits.uniform == (bits, bits)
        assert all((folder / path).exists() for path in result["artefacts"].values())


def test_evaluate_and_cost_know_such_a_run(quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = quantized / "w4a4"
    result = read_json(folder / "result.json")
    capsys.readouterr()
    assert evaluate.main([str(folder), "--json", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    for name in ("loss", "top1", "top5", "correct"):
        assert found[name] == result["metrics"][f"test_{name}"]
    assert found["cost"] == result["cost"]
    assert evaluate.main([str(folder), "--split", "val", "--device", "cpu"]) == 0
    assert "287 images" in capsys.readouterr().out  # the part that the training held out
    assert cost_main([str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: found[name] for name in result["cost"]} == result["cost"]


def test_the_layers_that_every_method_quantises(source: Path, quantized: Path) -> None:
    network, _, info = load_trained(quantized / "w2a2")
    layers = {n: m for n, m in network.named_modules() if isinstance(m, QuantConv2d | QuantLinear)}
    low = {name for name, layer in layers.items() if (layer.weight_bits, layer.activation_bits) == (2, 2)}
    assert low == {name for name in layers if name.startswith("cells.")} and len(low) > 20
    assert all(layers[name].weight_bits == 32 for name in layers.keys() - low)
    for name in low:
        weight = layers[name].quantize_weight(layers[name].weight)
        assert all(len(channel.unique()) <= 4 for channel in weight), name
        assert layers[name].quantize_weight.high.shape[0] == len(weight)
    full = network_cost(load_trained(source)[0], info["data"]["image_size"])
    cost = network_cost(network, info["data"]["image_size"])
    assert cost.macs == full.macs and cost.bitops_quantized * 256 == full.bitops_quantized
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())


def test_more_bits_come_closer_and_eight_are_close(source: Path, quantized: Path) -> None:
    full = logits(source)
    errors = [((logits(quantized / f"w{b}a{b}") - full).norm() / full.norm()).item() for b in (2, 4, 8)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.03


@pytest.mark.parametrize("method", CALIBRATED_METHODS[1:])
def test_every_method_ends_in_a_run(method: str, source: Path, tmp_path: Path) -> None:
    assert run(source, tmp_path / "run", "--quant_method", method, "--param_bits", "8", "--fwd_bits", "8") == 0
    result = read_json(tmp_path / "run" / "result.json")
    assert result["quant_method"] == method and result["network"]["weight_quantizer"] == method
    config = read_json(tmp_path / "run" / "config.json")["config"]
    percentile = method == "percentile"
    assert (config["overflow_rate"], config["bias_correction"]) == (0.001 if percentile else 0, percentile)


def test_an_auxiliary_head_is_left_behind(tmp_path: Path) -> None:
    flags = ["--preset", "smoke", "--epochs", "1", "--steps-per-epoch", "1", "--image-size", "32", "--auxiliary"]
    assert train.main([*flags, "--no-tensorboard", "--device", "cpu", "--save", str(tmp_path / "fp32")]) == 0
    assert run(tmp_path / "fp32", tmp_path / "run", "--quant_method", "tanh") == 0
    assert load_trained(tmp_path / "run")[0].auxiliary_head is None


def test_a_network_with_an_operation_of_ones_own(tmp_path: Path) -> None:
    """Its Sequential says by its order what follows what, so it is folded too."""
    space = tmp_path / "space.py"
    space.write_text(
        "from torch import nn\nfrom common.nets import OPERATIONS\n"
        "OPERATIONS['own_1x1'] = lambda conv, norm, c, s: nn.Sequential(nn.ReLU(), conv(c, c, 1, stride=s), norm(c))\n"
    )
    file = load_architecture("PC_DARTS").save(tmp_path / "own.json")
    file.write_text(file.read_text().replace("sep_conv_3x3", "own_1x1"))
    own = ["--search-space", str(space)]
    flags = ["--preset", "smoke", "--epochs", "1", "--steps-per-epoch", "1", "--arch", str(file), *own]
    try:
        assert train.main([*flags, "--no-tensorboard", "--device", "cpu", "--save", str(tmp_path / "fp32")]) == 0
        assert run(tmp_path / "fp32", tmp_path / "run", "--quant_method", "tanh", *own) == 0
        network, _, _ = load_trained(tmp_path / "run")
        assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    finally:
        OPERATIONS.pop("own_1x1", None)


# ---- the calibration


def constant_images(count: int, first: int) -> Split:
    """Images of one value each, so that a pixel tells which image it is from."""
    values = torch.arange(first, first + count, dtype=torch.uint8)
    return Split(values.view(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous(), torch.arange(count) % 2)


def test_only_training_images_that_are_not_held_out_calibrate() -> None:
    info = DatasetInfo("own", 2, 1, 8, ("a", "b"), (0.0,), (1.0,), flip=True, pad=4)
    data = ImageData(info, constant_images(100, 1), constant_images(50, 150))
    kept, _ = hold_out(data.train.labels, 0.3, 5)
    source = Namespace(data=data, flags={"val_fraction": 0.3, "seed": 5}, device="cpu")
    config = Namespace(batch_size=8, n_sample=100, seed=0)
    found = torch.cat(post_training.calibration_batches(source, config)) * 255
    assert (found.amax((1, 2, 3)) == found.amin((1, 2, 3))).all()  # no padding was cropped in
    seen = found[:, 0, 0, 0].round().int().tolist()
    assert sorted(seen) == sorted((kept + 1).tolist())  # all of them, each once, when more batches are asked for
    config.n_sample = 2
    few = post_training.calibration_batches(source, config)
    assert [len(x) for x in few] == [8, 8]
    config.seed = 1
    assert not torch.equal(few[0], post_training.calibration_batches(source, config)[0])


def test_test_images_change_nothing_but_the_figures(source: Path, quantized: Path, tmp_path: Path) -> None:
    def grids(folder: Path) -> dict[str, Tensor]:
        return load_trained(folder)[0].state_dict()

    with pytest.MonkeyPatch.context() as patch:
        data = load("digits")
        black = dataclasses.replace(data, test=Split(torch.zeros_like(data.test.images), data.test.labels))
        patch.setattr(post_training, "load_data", lambda *_: black)
        assert run(source, tmp_path / "run", "--param_bits", "4", "--fwd_bits", "4") == 0
    mine, theirs = grids(tmp_path / "run"), grids(quantized / "w4a4")
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    results = [read_json(folder / "result.json")["metrics"] for folder in (tmp_path / "run", quantized / "w4a4")]
    assert results[0]["test_loss"] != results[1]["test_loss"]


def opened(source: Path, *flags: str) -> tuple[Any, post_training.Source]:
    config = quantize.resolved([str(source), "--seed", "0", *flags])
    config.param_bits, config.fwd_bits = config.param_bits[0], config.fwd_bits[0]
    return config, post_training.open_source(config)


@torch.no_grad()
def test_bias_correction_restores_every_mean(source: Path) -> None:
    """With one batch, each layer with a bias gives the full-precision mean of each channel on it."""
    config, opened_source = opened(source, "--param_bits", "2", "--fwd_bits", "2", "--n-sample", "1", "-b", "128")
    calibration = post_training.Calibration.of(opened_source, config)
    network, _ = post_training.quantized_network(opened_source, config)
    post_training.calibrate(network, calibration.observed, 0.0)
    outputs: dict[str, Tensor] = {}
    for model, prefix in ((opened_source.network, "full "), (network, "low ")):
        for name, layer in model.named_modules():
            if isinstance(layer, QuantConv2d | QuantLinear):
                layer.register_forward_hook(lambda m, i, y, key=prefix + name: outputs.__setitem__(key, y))
    x = calibration.batches[0]
    opened_source.network(x)

    def errors() -> dict[str, float]:
        network(x)
        biased = [name for name, m in network.named_modules() if getattr(m, "bias", None) is not None]
        dims = {4: (0, 2, 3), 2: (0,)}
        gaps = {n: (outputs[f"low {n}"] - outputs[f"full {n}"]).mean(dims[outputs[f"low {n}"].dim()]) for n in biased}
        return {name: gap.abs().max().item() for name, gap in gaps.items()}

    before = errors()
    post_training.correct_biases(network, calibration)
    after = errors()
    assert len(after) > 10 and "classifier" in after and max(before.values()) > 0.1
    assert max(after.values()) < 1e-4


@pytest.mark.parametrize("method", ["linear", "percentile"])
def test_an_overflow_rate_ranks_what_was_drawn_and_not_every_batchs_largest_value(method: str) -> None:
    layer = QuantLinear(40, 3)
    layer.quantize_activation = make_quantizer(ACTIVATION_QUANTIZERS, method, 8)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.rand(100, 40, generator=generator) for _ in range(10)]
    for x in batches:
        x[0, 0] = 1000  # one of 4,000, of which 204 are drawn
    network = nn.Sequential(layer)
    # 8 of the 2,040 drawn values may be larger: more than the outliers among them, fewer than the batches
    for rate, high in ((0.0, 1000 if method == "percentile" else 1024), (0.004, 1)):
        post_training.calibrate(network, post_training.observe(network, batches, 0), rate)
        assert layer.quantize_activation.high.item() == pytest.approx(high, rel=0.02)


def test_bn_bits_keep_the_normalisations_and_quantise_them(source: Path, tmp_path: Path) -> None:
    flags = ("--quant_method", "minmax", "--param_bits", "4", "--fwd_bits", "4", "--bn_bits", "3")
    assert run(source, tmp_path / "run", *flags) == 0
    network, _, _ = load_trained(tmp_path / "run")
    before, _, _ = load_trained(source)
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    full = {n: m for n, m in before.named_modules() if isinstance(m, nn.BatchNorm2d) and "auxiliary" not in n}
    assert len(norms) == len(full) > 10
    for low, high in zip(norms, full.values(), strict=True):
        for name in ("weight", "bias", "running_mean", "running_var"):
            mine, theirs = getattr(low, name), getattr(high, name)
            half_a_step = (theirs.max() - theirs.min()).item() / 14
            assert len(mine.unique()) <= 8 and (mine - theirs).abs().max() <= half_a_step + 1e-6
    assert read_json(tmp_path / "run" / "result.json")["network"]["folded"] is False


# ---- the command line


def test_pairs_of_widths() -> None:
    assert post_training.width_pairs([2, 4], [8, 4]) == [(2, 8), (4, 4)]
    assert post_training.width_pairs([2, 4], [8]) == [(2, 8), (4, 8)]
    assert post_training.width_pairs([2, 4, 4], [8, 3]) == [(2, 8), (2, 3), (4, 8), (4, 3)]


def test_finished_ones_are_passed_over(
    source: Path, quantized: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(post_training, "observe", lambda *_: pytest.fail("nothing is left to calibrate"))
    before = (quantized / "w4a4" / "result.json").read_bytes()
    capsys.readouterr()
    assert run(source, quantized, "--param_bits", "2,4,8", "--fwd_bits", "2,4,8", "--resume", "auto") == 0
    out = capsys.readouterr().out
    assert out.count("already finished") == 3 and (quantized / "w4a4" / "result.json").read_bytes() == before
    assert [line.split()[:2] for line in out.splitlines()[-3:]] == [["2", "2"], ["4", "4"], ["8", "8"]]
    assert run(source, quantized / "w4a4", "--param_bits", "3", "--fwd_bits", "4", "--resume", "auto") == 2
    assert "param_bits: 4 -> 3" in capsys.readouterr().err


def test_an_interrupted_one_starts_over_to_the_same_end(source: Path, tmp_path: Path) -> None:
    flags = ("--quant_method", "tanh", "--resume", "auto")
    assert run(source, tmp_path / "run", *flags) == 0
    before = read_json(tmp_path / "run" / "result.json")
    (tmp_path / "run" / "result.json").unlink()
    assert run(source, tmp_path / "run", *flags) == 0
    assert read_json(tmp_path / "run" / "result.json")["metrics"] == before["metrics"]


def test_another_network_at_the_same_place_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same flags, but other weights in the source's newest checkpoint."""
    run_folder = tmp_path / "source"
    shutil.copytree(source, run_folder)
    flags = ("--quant_method", "minmax", "--resume", "auto")
    assert run(run_folder, tmp_path / "run", *flags) == 0
    store = CheckpointStore(run_folder / "checkpoints", config_digest=read_json(run_folder / "config.json")["digest"])
    state, meta = store.latest()
    state["model"]["classifier.weight"] += 1
    store.save(state, step=meta["step"] + 1, epoch=meta["epoch"])
    assert run(run_folder, tmp_path / "run", *flags) == 2
    assert f"--run {run_folder}: the file or run there has changed since" in capsys.readouterr().err


def test_what_does_not_fit_is_refused(
    source: Path, quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    for name in ("config.json", "checkpoints"):
        (unfinished / name).symlink_to(source / name)
    for run_folder, said in (
        (quantized / "w4a4", "quantised already"),
        (unfinished, "not finished"),
        (tmp_path, "no run lies there"),
    ):
        assert quantize.main([str(run_folder), "--save", str(tmp_path / "new")]) == 2
        assert said in capsys.readouterr().err
    assert quantize.main([]) == 2 and "RUN: is missing" in capsys.readouterr().err
    for flags, said in (
        (["--bn_bits", "12", "--bias-correction"], "--bias-correction: needs folded"),
        (["--overflow_rate", ".1"], "--overflow-rate: mse has none"),
        (["--param_bits", "1"], "--param_bits: '1' is not offered"),
        (["--resume", "somewhere"], "--resume: 'somewhere' is not auto"),
    ):
        with pytest.raises(SystemExit) as stop:
            quantize.main([str(source), *flags])
        assert stop.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("flag", ["--compile", "--precision=bf16", "--channels-last", "--checkpoint-cells"])
def test_flags_of_trainings_are_refused_with_the_reason(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        quantize.resolved(["anywhere", flag])
    said = capsys.readouterr().err
    assert caught.value.code == 2 and flag.split("=")[0] in said and "leave it out" in said
