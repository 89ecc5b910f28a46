"""Report pages are self-contained, every figure has alternative text, and themes set colours."""

import html.parser
import json
import math
import re
import shutil
import subprocess

import pytest

from eckart.report import comparison, page
from eckart.report.claims import page as claims_page
from eckart.report.figures import Curve, bars, curves, heat, intervals
from eckart.report.run import roles

SITES = [f"model.layers.{i}.self_attn.{r}" for i in range(2) for r in ("q_proj", "v_proj")]


def run_page():
    metrics = [
        {"step": s, "loss": 5 - s / 50, "learning_rate": 1e-3, "grad_norm": 1.0 + s % 3, "epoch": 1}
        for s in range(1, 100)
    ] + [{"step": 50, "eval_loss": 4.2}, {"step": 99, "eval_loss": 3.2, "eval_accuracy": 0.5}]
    spectra = {
        step: {site: [math.exp(-i / 2) * (1 + step) for i in range(6)] for site in SITES}
        for step in (0, 50)
    }
    return page(
        {"name": "0001", "recipe": {"weights": {"name": "lora"}}, "seconds": 3.2,
         "eval": {"before": {"loss": 5.0}, "after": {"loss": 3.2}}, "note": "<script>alert(1)"},
        metrics,
        command="eckart finetune ./m d.jsonl",
        spectra=spectra,
        overlaps={site: [(10, 0.4), (20, 0.8)] for site in SITES},
        coverage={"attn": {"trained": 10, "frozen": 90}, "head": {"frozen": 50}},
        memory={"estimated": {"weights": 1e6}, "measured": {"weights": 1.1e6}},
        samples=[("2 < 3 & so", "before <b>", "after")],
        resolved=[("train.lr", "1e-3", "the default of lora")],
    )  # fmt: skip


RECIPE = {"weights": {"name": "lora", "rank": 4, "targets": ["attn"]}, "objective": []}


UNCOMPARED = dict.fromkeys(("mean", "p", "p_corrected", "smallest_visible")) | {
    "interval": [None, None]
}


def of_seeds(mean):
    interval = [mean - 0.2, mean + 0.2]
    return {"mean": mean, "sd": 0.1, "interval": interval, "values": [mean - 0.1, mean, mean + 0.1]}


def bench_row(name, difference=UNCOMPARED, verdict="baseline"):
    return {
        "name": name, "lr": 1e-3, "default_lr": 1e-3, "at_edge": False, "trials": 9,
        "lr_curve": [{"lr": 10**-k, "mean": 3.0 + k, "values": [3.0 + k, None]} for k in (4, 3, 2)]
        + [{"lr": 0.03, "mean": None, "values": [None, None]}],
        "basin_decades": 1.0, "regret_at_default_lr": 0.0, "regret_at_baseline_lr": None,
        "expected_after_trials": [3.2, 3.1], "verdict": verdict, "reason": "", "recipe": RECIPE,
        "test": {"loss": of_seeds(3.0), "accuracy": of_seeds(0.8)},
        "differences": {"loss": difference, "accuracy": difference},
        "costs": {"steps": 10, "tokens": 100, "seconds": 1.5, "peak_bytes": 10**6,
                  "state_bytes": 10**5, "trained_parameters": 1000},
    }  # fmt: skip


def bench_page():
    difference = {
        "mean": 0.1, "interval": [0.05, 0.15], "p": 0.01, "p_corrected": 0.01,
        "smallest_visible": 0.04, "seeds_for_the_margin": 4,
    }  # fmt: skip
    rows = [bench_row("lora"), bench_row("dora", difference, "better")]
    ranking = {"mean_rank": {"lora": 2.0, "dora": 1.0}, "times_first": {"lora": 0, "dora": 3},
               "kendall_tau": 1.0, "seeds": 3}  # fmt: skip
    return comparison(
        {"methods": rows, "metric": "loss", "baseline": "lora", "ranking": ranking,
         "repeat": "eckart bench m d", "held_fixed": {"steps": "10"}}
    )  # fmt: skip


PAGES = {"run": run_page, "bench": bench_page}


@pytest.fixture(params=PAGES, scope="module")
def text(request):
    return PAGES[request.param]()


class Outline(html.parser.HTMLParser):
    """Checks that tags are closed in order; counts figures and their descriptions."""

    VOID = {"meta", "link", "br", "path", "use", "rect"}

    def __init__(self):
        super().__init__()
        self.open, self.figures, self.ids, self.links = [], [], [], []

    def handle_starttag(self, tag, attributes):
        known = dict(attributes)
        if "id" in known:
            self.ids.append(known["id"])
        self.links += [v for k, v in attributes if k in ("href", "src", "xlink:href") and v]
        if tag == "svg":
            self.figures.append(known)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def outline(text):
    found = Outline()
    found.feed(text)
    assert not found.open
    return found


def test_nothing_is_fetched_and_nothing_runs(text):
    assert "<script" not in text
    for link in outline(text).links:
        assert link.startswith(("#", "data:,")), link
    assert "@import" not in text and not re.search(r"url\((?!#)", text)


def test_every_figure_has_a_title_and_a_description(text):
    figures = outline(text).figures
    assert len(figures) >= 5 and all(f.get("role") == "img" for f in figures)
    assert len(re.findall(r"<title>.+?</title><desc>.+?</desc>", text)) == len(figures)


def test_ids_are_used_once_and_links_lead_somewhere(text):
    found = outline(text)
    assert len(set(found.ids)) == len(found.ids)
    assert {link[1:] for link in found.links if link.startswith("#")} <= set(found.ids)


def test_colours_are_the_pages(text):
    svgs = "".join(re.findall(r"<svg.*?</svg>", text, re.S))
    assert "var(--ink)" in svgs and "var(--c0)" in svgs
    assert not re.search(r"#0[1-3]0[0-9a-f]{3}", svgs)
    assert "prefers-color-scheme: dark" in text and "@media print" in text


def test_what_a_run_says_is_shown_as_text():
    found = run_page()
    assert "<script>alert" not in found and "&lt;script&gt;alert(1)" in found
    assert "2 &lt; 3 &amp; so" in found and "before &lt;b&gt;" in found


def test_the_same_facts_make_the_same_bytes():
    assert run_page() == run_page()


RUN_SHOWS = [  # figures by their titles
    "Loss", "Learning rate", "Gradient and update norms", "Singular values of what was learned",
    "Effective rank", "Effective rank by layer and role",
    "Overlap of a subspace with the one before", "Share by role", "Tensor bytes",
]  # fmt: skip
BENCH_SHOWS = [
    "Better than the baseline by: loss", "Better than the baseline by: accuracy",
    "Held-out loss by learning rate", "Expected best after some rates tried",
    "Test loss by seed", "Peak tensor bytes",
    "Seconds of a run",
]  # fmt: skip


@pytest.mark.parametrize(("made", "titles"), [(run_page, RUN_SHOWS), (bench_page, BENCH_SHOWS)])
def test_every_figure_that_was_promised_is_there(made, titles):
    assert set(titles) <= set(re.findall(r"<svg[^>]*><title>(.*?)</title>", made()))


def test_a_run_shows_what_no_figure_can():
    found = run_page()
    for text in (
        "<pre>eckart finetune ./m d.jsonl</pre>",  # the command to repeat it
        "<td>the default of lora</td>",  # the reason for a choice
        "held-out loss 5.000 → 3.200",
        "--- before", "--- after",
    ):  # fmt: skip
        assert text in found, text
    assert ">0.self_attn.q_proj</text>" in found  # names without what all begin with


def test_a_bench_says_where_a_rate_diverged_and_what_was_held_fixed():
    found = bench_page()
    assert '<td class="number">0.03</td>' in found and "diverged at" in found
    assert "What was held fixed" in found and ">+0.1000<" in found and ">+0.0500<" in found


def test_why_there_are_no_spectra_is_said():
    assert '<p class="wide">too large</p>' in page({}, [], unseen=["too large"])


def test_a_long_table_is_folded_under_its_medians():
    """A 7B model has 224 matrices: its long table is collapsed, the medians by role are not."""
    sites = [f"layers.{i}.{role}" for i in range(32) for role in ("q_proj", "up_proj")]
    found = page({}, [], spectra={1: {site: [1.0, 0.5] for site in sites}})
    assert found.count("<details") == 1 and "<summary>By matrix (64)</summary>" in found
    assert found.index("Medians by role") < found.index("<details")
    assert "<details" not in run_page()
    outline(found)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"], ["q_proj", "up_proj"]),
        (
            [
                "bert.encoder.layer.0.attention.self.query",
                "bert.encoder.layer.0.attention.output.dense",
                "bert.encoder.layer.0.output.dense",
            ],
            ["query", "attention.output.dense", "output.dense"],
        ),
        (
            [
                "encoder.block.0.layer.0.SelfAttention.q",
                "decoder.block.0.layer.0.SelfAttention.q",
                "decoder.block.0.layer.1.EncDecAttention.q",
            ],
            ["encoder.SelfAttention.q", "decoder.SelfAttention.q", "EncDecAttention.q"],
        ),
    ],
)
def test_matrices_of_different_kinds_have_different_names(paths, names):
    assert list(roles(paths).values()) == names
    assert roles(paths[:1]) == {paths[0]: paths[0].rsplit(".", 1)[-1]}


def test_many_layers_have_no_number_in_their_cells():
    few, many = (heat("t", ["a"], [str(j) for j in range(n)], [[0.123] * n]).svg for n in (12, 40))
    assert few.count(">0.123<") == 12 and many.count(">0.123<") == 0
    assert 10 <= many.count("<text") <= 13  # ten names, one row


def test_a_run_without_facts_has_a_page():
    found = page({}, [])
    assert "<h1>run</h1>" in found and not outline(found).figures
    assert "Medians by role" in page({}, [], spectra={1: {"0.q": [], "1.q": [1.0]}}), "rank 0"


def test_a_flat_or_empty_curve_is_drawn():
    assert "<svg" in curves("t", [Curve("a", [], [])], "x", "y").svg
    assert "<svg" in heat("t", ["a"], ["b"], [[1.0]]).svg
    assert "<svg" in bars("t", {"a": {}}, "x").svg
    assert "<svg" in intervals("t", [("a", 0.0, 0.0, 0.0)], "x").svg


def test_the_page_of_claims_shows_refutations_as_loud_as_confirmations():
    def claim(name, verdict):
        return {
            "name": name, "claim": "a is better", "verdict": verdict, "reason": "",
            "smallest_visible_difference": 0.01, "command": f"eckart reproduce {name}",
            "evidence": {"statements": [], "arms": [], "budget": "default"},
        }  # fmt: skip

    found = claims_page([claim("b", "refuted"), claim("a", "confirmed")])
    assert "1 confirmed, 1 refuted." in found
    assert "| [a](#a) | **confirmed** |" in found and "| [b](#b) | **refuted** |" in found
    assert "**Refuted**: a is better." in found and "**Confirmed**: a is better." in found


# --- in a browser --------------------------------------------------------------------------

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
ASK = """<script>
const seen = [...document.querySelectorAll("svg")].map(s => {
  const box = s.getBoundingClientRect(), inks = s.querySelectorAll("path, text").length;
  return [box.width, box.height, inks, getComputedStyle(s.querySelector("text")).fill];
});
document.title = JSON.stringify({
  figures: seen, width: document.documentElement.scrollWidth, inner: innerWidth,
  paper: getComputedStyle(document.body).backgroundColor,
});
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [500, 1100])  # Chromium opens no window below 500
def test_a_browser_draws_every_figure_without_a_complaint(tmp_path, text, scheme, width):
    file = tmp_path / "page.html"
    file.write_text(text.replace("</body>", ASK + "</body>"))
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2000",
            f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
            "--enable-logging=stderr", "--dump-dom", file.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    title = html.unescape(re.search(r"<title>(.*?)</title>", done.stdout, re.S)[1])
    seen = json.loads(title)
    assert seen["width"] <= seen["inner"], "the page scrolls sideways"
    assert len(seen["figures"]) >= 5
    for wide, high, inks, _ in seen["figures"]:
        assert wide > 200 and high > 60 and inks > 5
    light = sum(map(int, re.findall(r"\d+", seen["paper"])[:3])) > 380
    assert light == (scheme == "light")
    for *_, ink in seen["figures"]:
        assert (sum(map(int, re.findall(r"\d+", ink)[:3])) > 380) != light
