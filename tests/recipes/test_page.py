# SPDX-License-Identifier: Apache-2.0
"""What a run shows of itself: pictures in its folder, TensorBoard, and the page of several runs in a real browser.

One search and one training at smoke size serve all tests here; the browser's are skipped where none is installed.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import report
from common.recipes.page_parts import inline_svg
from tests.helpers.fake_runs import architecture_json, train_result, write_run
from tests.helpers.mangled import seal

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SMOKE = ["--preset", "smoke", "--device", "cpu", "--epochs", "2", "--steps-per-epoch", "1", "--plots"]
SVG = "{http://www.w3.org/2000/svg}"
VOID = {"meta", "link", "br", "hr", "img", "input"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A joint search with TensorBoard, a training of what it found, two fake trainings beside it, one unfinished."""
    from qdarts import search, train

    place = tmp_path_factory.mktemp("seen")
    found = {name: place / name for name in ("search", "train", "two-bits", "four-bits", "going")}
    assert search.main([*SMOKE, "--save", str(found["search"])]) == 0
    assert train.main([*SMOKE, "--no-tensorboard", "--arch", str(found["search"]), "--save", str(found["train"])]) == 0
    for name, correct, wbits, bitops in (("two-bits", 320, 2, 35_100_000), ("four-bits", 350, 4, 70_100_000)):
        result = train_result(correct, bits_mean={"weight": wbits, "activation": wbits})
        result["cost"] = result["cost"] | {"bitops_quantized": bitops}
        result["network"] = {"init_channels": 4, "layers": 3, "stem": "cifar", "in_channels": 1, "image_size": 16}
        result["network"] |= {"num_classes": 10}
        bits = {"kind": "uniform", "uniform": [wbits, wbits]}
        write_run(found[name], result, config={"wbits": wbits}, architecture=architecture_json(bits=bits))
    write_run(found["going"])
    config = json.loads((found["search"] / "config.json").read_text())
    config["config"] |= {"epochs": 7, "note": "<script>alert(1)</script>", "seed": 5}
    config["sources"]["note"] = "flag"
    (found["going"] / "config.json").write_text(json.dumps(config))
    for name in ("metrics.csv", "history.jsonl"):  # as a search leaves them in the middle of a line
        (found["going"] / name).write_bytes((found["search"] / name).read_bytes()[:-20])
    return found


@pytest.fixture(scope="module")
def page(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "deep" / "report.html"
    assert report.main([*map(str, runs.values()), "--html", str(out)]) == 0
    return out


# ------------------------------------------------------------------------------------------------------ the folder


def test_both_stages_leave_their_pictures(runs: dict[str, Path]) -> None:
    wanted = {"search": ("curves", "alphas", "gammas", "bits"), "train": ("curves",)}
    for stage, names in wanted.items():
        artefacts = json.loads((runs[stage] / "result.json").read_text())["artefacts"]
        for name in names:
            file = runs[stage] / artefacts[name]
            assert file.name == f"{name}.svg" and ElementTree.parse(file).getroot().tag == f"{SVG}svg"
    text = "".join(ElementTree.parse(runs["search"] / "curves.svg").getroot().itertext())
    for words in ("entropy, nats", "gammas", "alphas", "skip connections", "expected", "exact", "learning rate"):
        assert words in text


@pytest.mark.slow
def test_no_plots_draws_none(tmp_path: Path) -> None:
    from qdarts import search

    flags = [*SMOKE[:-1], "--epochs", "1", "--no-plots", "--no-tensorboard", "--save", str(tmp_path / "run")]
    assert search.main(flags) == 0
    assert not {"curves.svg", "alphas.svg"} & {path.name for path in (tmp_path / "run").iterdir()}


def test_tensorboard_shows_choices_cells_and_final_figures(runs: dict[str, Path]) -> None:
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = module.EventAccumulator(str(runs["search"] / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert set(found.Tags()["images"]) == {"alphas", "gammas", "cells"}
    for tag in ("alphas", "gammas", "cells"):
        assert [event.step for event in found.Images(tag)] == [1, 2]
        assert min(found.Images(tag)[0].width, found.Images(tag)[0].height) > 100
    rates = {"learning_rate", "gamma_learning_rate", "arch_learning_rate"}
    assert rates <= set(found.Tags()["scalars"])
    result = json.loads((runs["search"] / "result.json").read_text())
    final = {tag.removeprefix("final/") for tag in found.Tags()["scalars"] if tag.startswith("final/")}
    assert {"valid_top1", "exact_bitops", "bitops", "weight_bytes"} <= final
    assert found.Scalars("final/exact_bitops")[0].value == pytest.approx(result["exact_bitops"])
    assert "_hparams_/session_end_info" in found.PluginTagToContent("hparams")


@pytest.mark.slow
def test_plots_on_request_are_the_same_again(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    before = {name: (runs["search"] / f"{name}.svg").read_bytes() for name in ("curves", "alphas", "gammas", "bits")}
    for name in before:
        (runs["search"] / f"{name}.svg").unlink()
    assert report.main([str(runs["search"]), "--plots"]) == 0
    assert {name: (runs["search"] / f"{name}.svg").read_bytes() for name in before} == before
    assert capsys.readouterr().err.count("wrote ") == 4


@pytest.mark.slow
def test_a_run_that_is_going_can_be_drawn_and_nothing_to_draw_is_said(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(runs["going"], tmp_path / "going")
    assert report.main([str(folder), "--plots"]) == 0
    assert {"curves.svg", "alphas.svg", "gammas.svg", "bits.svg"} <= {path.name for path in folder.iterdir()}
    (folder / "history.jsonl").write_text('{"epoch": 0}\nnonsense\n')
    capsys.readouterr()
    assert report.main([str(folder), "--plots"]) == 1
    assert "history.jsonl: line 2 is not JSON" in capsys.readouterr().err


@pytest.mark.slow
def test_a_resumed_search_keeps_the_columns_of_its_older_version_and_shows_each_epoch_once(tmp_path: Path) -> None:
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from common.recipes.flags import resolve_search, search_parser
    from common.recipes.search import run_search
    from qdarts import search

    class Killed(Exception):
        pass

    def killed(step: int) -> None:
        if step == 2:  # the first of the second epoch, a step each
            raise Killed

    run = tmp_path / "run"
    flags = [*SMOKE, "--epochs", "3", "--save", str(run)]
    with pytest.raises(Killed):
        run_search(resolve_search(search_parser("search.py", ""), flags), method="qdarts", on_step=killed)
    lines = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    kept = [k for k, name in enumerate(lines[0]) if name not in ("gamma_learning_rate", "arch_learning_rate")]
    assert len(kept) == len(lines[0]) - 2
    (run / "metrics.csv").write_text("".join(",".join(line[k] for k in kept) + "\n" for line in lines))
    for path in (run / "checkpoints").glob("*/meta.json"):  # that version noted its own rows, and no digest of them
        meta = json.loads(path.read_text())
        meta["extra"]["files"]["metrics.csv"] = (run / "metrics.csv").stat().st_size
        meta["extra"].pop("sha256")
        seal(path, meta)
    assert search.main([*flags, "--resume", "auto"]) == 0
    rows = (run / "metrics.csv").read_text().splitlines()
    assert len(rows) == 4 and "gamma_learning_rate" not in rows[0]
    found = module.EventAccumulator(str(run / "tensorboard"), purge_orphaned_data=False).Reload()
    assert [event.step for event in found.Images("cells")] == [1, 2, 3]
    assert [event.step for event in found.Scalars("train_loss")] == [1, 2, 3]


# ------------------------------------------------------------------------------------------------------ the page


class Reader(HTMLParser):
    """Checks that elements nest, and keeps what a test wants to know."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = dict(attrs)
        self.ids += [values["id"] or ""] if "id" in values else []
        for name, value in attrs:
            if name in ("href", "src", "xlink:href", "srcset", "action", "data"):
                self.links.append(value or "")
            assert not name.startswith("on"), f"{tag} runs {name}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style",):
            self.words.append(data.strip())


@pytest.fixture(scope="module")
def read(page: Path) -> Reader:
    return Reader(page.read_text(encoding="utf-8"))


def test_the_page_is_whole_and_loads_nothing(page: Path, read: Reader) -> None:
    assert "script" not in read.tags and "iframe" not in read.tags
    assert len(read.ids) == len(set(read.ids))
    for link in read.links:
        assert link.startswith("data:") or (link.startswith("#") and link[1:] in read.ids), link
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"@import|url\((?!#)", text)
    for name in re.findall(r"url\(#([^)]+)\)", text):
        assert name in read.ids


def test_the_page_says_what_the_runs_are(read: Reader, runs: dict[str, Path]) -> None:
    words = " ".join(read.words)
    titles = ("Summary", "Tables", "Environment", "What differs between the trainings", "Accuracy against cost")
    for part in (*titles, "--wbits", "--note"):
        assert part in words, part
    assert "highest test accuracy 97.2%" in words and "(95%: 95.0 to 98.5)" in words  # Wilson's, of 350 of 360
    assert f"{runs['going']}: not finished" in words and "epochs done" in words
    assert words.count("Cells") >= 4 and words.count("Curves") == 3 and words.count("Choices by epoch") == 2
    for operation in ("sep_conv_3x3", "skip_connect", "dil_conv_5x5"):
        assert operation in words
    assert "gammas of weights by epoch: 4 bits" in words and "bits chosen at each depth" in words
    assert "<script>alert" not in words.replace("<script>alert(1)</script>", "")  # as text only


def test_every_layer_has_its_bits_and_cost(read: Reader, runs: dict[str, Path]) -> None:
    from common.cost import network_cost
    from common.nets import build_network, load_architecture

    build = {"init_channels": 4, "layers": 3, "in_channels": 1, "num_classes": 10}
    cost = network_cost(build_network(load_architecture(runs["train"]), **build), 16)
    for layer in cost.layers:
        at = [place for place, word in enumerate(read.words) if word == layer.name]
        rows = [[word for word in read.words[place + 1 : place + 12] if word][:4] for place in at]
        wanted = [str(layer.weight_bits), str(layer.activation_bits), f"{layer.macs:,}", f"{layer.bitops:,}"]
        assert wanted in rows, layer


def test_damaged_runs_are_told_on_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "good", train_result(), architecture={"schema": 7})
    (tmp_path / "good" / "metrics.csv").write_bytes(b"\xff\xfe\n")
    write_run(tmp_path / "bad", '{"finished": true, "schema": 1')
    assert report.main([str(tmp_path), "--html", str(tmp_path / "page.html")]) == 1
    words = " ".join(Reader((tmp_path / "page.html").read_text()).words)
    assert "Not read: " in words and "result.json: not valid JSON" in words
    assert "Cells: " in words and "Curves: " in words and "metrics.csv: cannot be read" in words


def test_the_flag_wants_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        report.main(["runs", "--html", "page.pdf"])
    assert end.value.code == 2 and "does not end in .html" in capsys.readouterr().err


def test_pictures_of_one_page_share_no_names() -> None:
    svg = b"<?xml?><svg width='9pt' id='a' viewBox='0 0 9 9'><defs><path id=\"p\"/></defs><g clip-path=\"url(#p)\">"
    svg += b'<use xlink:href="#p" style="fill: #1f2937; stroke: #0072B2"/></g></svg>'
    shown = inline_svg(svg, "one", 'a "label"')
    assert 'id="one-p"' in shown and "url(#one-p)" in shown and 'href="#one-p"' in shown
    assert "var(--ink)" in shown and "#0072B2" in shown and "&quot;label&quot;" in shown and "9pt" not in shown
    ElementTree.fromstring(shown.replace("xlink:", ""))


# ------------------------------------------------------------------------------------------------------ the browser

MEASURE = """<!DOCTYPE html><meta charset="utf-8"><body style="margin:0">
<iframe id="wide" width="1280" height="900" srcdoc="{page}"></iframe>
<iframe id="phone" width="390" height="844" srcdoc="{page}"></iframe>
<pre id="found"></pre>
<script>
window.onload = () => {{
  const found = {{}};
  for (const name of ["wide", "phone"]) {{
    const frame = document.getElementById(name), inner = frame.contentDocument, root = inner.documentElement;
    const style = frame.contentWindow.getComputedStyle(inner.body);
    const out = [...inner.querySelectorAll("main *")].filter(
      (e) => !e.closest("svg *") && !e.parentElement.closest(".scroll")
        && e.getBoundingClientRect().right > root.clientWidth + 1).map((e) => e.outerHTML.slice(0, 80));
    const small = [...inner.querySelectorAll("figure svg")].filter((e) => e.getBoundingClientRect().height < 60).length;
    found[name] = {{ overflow: root.scrollWidth - root.clientWidth, out, small, ground: style.backgroundColor,
      ink: style.color, pictures: inner.querySelectorAll("figure svg").length, tall: root.scrollHeight }};
  }}
  document.getElementById("found").textContent = JSON.stringify(found);
}};
</script></body>"""


def browse(file: Path, *flags: str) -> tuple[str, list[str]]:
    """The document as a browser without a screen has it, and what was said on its console."""
    program = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    profile = file.parent / "profile"
    usual = ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    usual.append(f"--user-data-dir={profile}")
    if os.geteuid() == 0:
        usual.append("--no-sandbox")
    command = [program, *usual, *flags, "--enable-logging=stderr", "--virtual-time-budget=20000"]
    done = subprocess.run([*command, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=300)
    shutil.rmtree(profile, ignore_errors=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def measured(folder: Path, page: Path, *flags: str) -> dict[str, Any]:
    file = folder / "measure.html"
    file.write_text(MEASURE.format(page=html.escape(page.read_text(encoding="utf-8"))), encoding="utf-8")
    document, said = browse(file, *flags)
    assert not said, said
    return json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', document, re.DOTALL)[1]))


def brightness(colour: str) -> int:
    return sum(map(int, re.findall(r"\d+", colour)[:3]))


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_the_page_in_a_browser_at_desktop_and_phone_width(tmp_path: Path, page: Path, scheme: str) -> None:
    flags = ["--blink-settings=preferredColorScheme=" + {"dark": "0", "light": "1"}[scheme]]
    for name, seen in measured(tmp_path, page, *flags).items():
        assert seen["overflow"] == 0 and not seen["out"], (name, seen)
        assert seen["pictures"] > 20 and seen["small"] == 0 and seen["tall"] > 3000, (name, seen)
        darker = brightness(seen["ground"]) < brightness(seen["ink"])
        assert darker == (scheme == "dark"), (name, seen)


@pytest.mark.slow
def test_the_browser_check_sees_what_is_wrong(tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text('<body><main><div style="width:2000px">x</div></main><script>console.error("oh")</script></body>')
    assert any("oh" in line for line in browse(bad)[1])
    quiet = tmp_path / "quiet.html"
    quiet.write_text('<!DOCTYPE html><body><main><div style="width:2000px">x</div></main></body>')
    found = measured(tmp_path, quiet)
    assert found["phone"]["overflow"] > 1000 and found["wide"]["out"]
