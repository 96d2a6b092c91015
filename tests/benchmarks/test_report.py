"""The page that shows the results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.measuring import RESULTS

MACHINE = {
    "processor": "a processor",
    "cores": 2,
    "python": "3.11.7",
    "load_at_start": 0.42,
    "time": "2026-01-02 03:04",
}


def side(*rates: float, **cpu_ms: float) -> dict[str, Any]:
    return {"tokens_per_second": list(rates), "cpu_ms": cpu_ms}


def training_results() -> dict[str, Any]:
    model = {
        "parameters": 1000,
        "steps_per_repeat": 2,
        "tandem": side(900.0, 1100.0, 1000.0, client=1.0, gateway=2.0, engine=30.0),
        "plain": side(1000.0, 1000.0, 4000.0, loop=25.0),
        "ratios": [0.9, 1.1, 0.25],
        "ratio": 0.9,
        "padding": 1.0,
        "gateway_share": 0.0234,
        "others": [0.01, 0.2, 0.034],
        "largest_difference_of_losses": 1.5e-6,
    }
    shapes = {"8 × 128": model, "8 × 16–512": {**model, "padding": 1.5}, "1 × 2": model}
    return {"machine": MACHINE, "threads": 2, "rank": 16, "models": {"tandem/tiny": shapes}}


def sampling_results() -> dict[str, Any]:
    ours = {"http": 50.0, "http_adapters": 30.0, "engine": 60.0, "engine_adapters": 40.0}
    theirs = {"one_by_one": 10.0, "batch": 100.0, "continuous": 25.0}
    model = {
        **{name: side(rate) for name, rate in (ours | theirs).items()},
        "ratios": {
            f"{mine}_to_{other}": [0.9 * rate / slow, 1.1 * rate / slow]
            for mine, rate in ours.items()
            for other, slow in theirs.items()
        },
        "ratio": 5.0,
        "others": [0.0, 0.004],
        "same_tokens": {"http": 1.0, "engine": 0.9375},
        "curve": {"at_once": [1, 64], **{name: [rate, 8 * rate] for name, rate in ours.items()}},
    }
    return {"machine": MACHINE, "threads": 2, "adapters": 4, "models": {"tandem/tiny": model}}


def test_the_servers_of_vllm_stand_beside_each_other() -> None:
    results = {
        "model": "random/qwen3-34m",
        "requests": 32,
        "tokens": 64,
        "tandem": {"tokens_s": [500.0, 510.0, 490.0], "p50_ms": [42.0, 43.0, 41.0]},
        "vllm": {"tokens_s": [500.0, 500.0, 500.0], "p50_ms": [40.0, 40.0, 40.5]},
        "throughput_ratio": 1.0,
        "latency_more_ms": 2.0,
    }
    made = "\n".join(report.vllm(results))
    assert "| random/qwen3-34m | tokens/s, 32 requests | one token |" in made
    assert "| Tandem with vLLM | 500 | 42.0 ms |" in made
    assert "| vLLM's own server | 500 | 40.0 ms |" in made
    assert "**1.00** (0.98–1.02), wanted ≥ 0.95" in made
    assert "**+2.0 ms** (+0.5 to +3.0), wanted at most 3 ms more. Medians of 3 repeats, 64 tokens" in made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "training.json").write_text(json.dumps(training_results()))
    (tmp_path / "sampling.json").write_text(json.dumps(sampling_results()))
    return tmp_path


def page(name: str, table: str = "old\n") -> str:
    return f"# Title\n\n<!-- results: {name} -->\n{table}<!-- end -->\n\nProse.\n"


def test_a_table_is_put_between_its_marks_and_all_else_stays(folder: Path) -> None:
    made = report.renewed(page("training"), folder)
    assert made.startswith("# Title\n\n<!-- results: training -->\n|") and made.endswith(
        "<!-- end -->\n\nProse.\n"
    )
    assert "old" not in made
    assert "| tandem/tiny | 8 × 128 | 1,000 | 1,000 | **0.90** | 0.25–1.10 | ≥ 0.6 |" in made
    assert "| tandem/tiny | 8 × 16–512 | 1,000 | 1,000 | **0.90** | 0.25–1.10 | ≥ 1.35 |" in made
    assert "| tandem/tiny | 1 × 2 | 1,000 | 1,000 | **0.90** | 0.25–1.10 |  |" in made
    assert "| tandem/tiny | 8 × 128 | 1.0 | 2.0 | 30.0 | 25.0 | 2.3% |" in made
    assert "differ by at most 2e-06" in made
    assert "used 3% of the machine, at most 20%." in made
    assert "2026-01-02 03:04 UTC on 2 cores of a processor, Python 3.11.7, 2 threads" in made


def test_sharing_tells_what_is_left_of_either() -> None:
    found = {
        "training_alone": 1000.0,
        "training_beside": 700.0,
        "sampling_alone": 400.0,
        "sampling_beside": 100.0,
    }
    rows = report.sharing({"shares": {"0.25": found}})
    assert rows[-1] == "| 0.25 | 1,000 | 700 | **0.70** | 400 | 100 | **0.25** |"


def test_hardware_tells_the_share_and_where_the_time_goes() -> None:
    model = {
        "products": {"gflops": [100.0, 200.0, 110.0]},
        "step": {"gflops": [80.0, 77.0, 70.0]},
        "shares": [0.8, 0.385, 0.64],
        "share": 0.64,
        "seconds": {"products with frozen weights": 3.0, "attention": 1.0},
        "others": [0.01, 0.03, 0.02],
    }
    models = {"random/qwen3-34m": model, "tandem/tiny": {**model, "seconds": {"attention": 1.0}}}
    rows = report.TABLES["hardware"]({"models": models, "batch": [8, 512]})
    assert "| random/qwen3-34m | 110 | 77 | **0.64** | 0.39–0.80 | ≥ 0.7 |" in rows
    assert "| tandem/tiny | 110 | 77 | **0.64** | 0.39–0.80 |  |" in rows
    assert "| random/qwen3-34m | 75.0 | 25.0 |" in rows
    assert "| tandem/tiny | 0.0 | 100.0 |" in rows
    assert rows[-1] == "One run, 8 × 512 tokens a step. Other processes used 2% of the machine, at most 3%."


def test_gpu_tells_both_sides_and_what_the_device_could_do() -> None:
    work = {
        "tokens": 16384.0,
        "ours": [2000.0, 3000.0],
        "theirs": [1000.0, 1000.0],
        "ratio": 2.5,
        "ratios": [2, 3],
    }
    share = {"tflops": 400.0, "of_product": 0.5, "of_datasheet": 0.4}
    model = {
        "parameters": 600_000_000,
        "bytes_of_a_run": 200_000_000,
        "device_tflops": 800.0,
        "one run": {**work, "utilisation": share},
        "sixteen runs": {**work, "utilisation": share},
        "decoding": work,
    }
    versions = {"torch": "2.11", "transformers": "5.17"}
    rows = report.TABLES["gpu"](
        {"device": "A GPU", "versions": versions, "rank": 16, "models": {"0.6B": model}}
    )
    assert "| 0.6B | one run | 2,500 | 1,000 | **2.50** | 2.00–3.00 | ≥ 1.0 | 400 | 40 % |" in rows
    assert "| 0.6B | 64 prompts decoded | 2,500 | 1,000 | **2.50** | 2.00–3.00 |  |  |  |" in rows
    assert rows[-1].startswith("On one A GPU (torch 2.11, Transformers 5.17)")
    engines = report.TABLES["megatron"](
        {"device": "A GPU", "model": "0.6B", "one run": work, "sixteen runs": work, "rank": 16}
    )
    assert "| one run | 2,500 | 1,000 | **2.50** | 2.00–3.00 |" in engines


def test_renewing_twice_changes_nothing(folder: Path) -> None:
    once = report.renewed(page("training", "") + page("sampling"), folder)
    assert report.renewed(once, folder) == once


def test_each_mark_gets_its_own_results(folder: Path) -> None:
    made = report.renewed(page("sampling") + page("training"), folder)
    first, second = made.split("<!-- end -->")[:2]
    ratios = "**5.00** (4.50–5.50) | **0.50** (0.45–0.55) | **2.00** (1.80–2.20)"
    assert f"| tandem/tiny | through HTTP, base model | 50 | {ratios} |" in first
    assert "| | `generate`, padded batch | 100 | | | |" in first
    assert "| tandem/tiny | engine, 4 adapters mixed | 40 | 320 |" in first
    assert "At least 94% of the compared prompts" in first
    assert "**0.90**" in second


def test_without_results_the_table_stays(tmp_path: Path) -> None:
    assert report.renewed(page("training"), tmp_path) == page("training")


def test_an_unknown_name_is_an_error(folder: Path) -> None:
    with pytest.raises(KeyError, match="trainig"):
        report.renewed(page("trainig"), folder)


def test_charts_are_drawn_for_the_results_that_exist(folder: Path) -> None:
    (folder / "sampling.json").unlink()
    assert list(report.charts(folder)) == ["training.svg"]


def test_the_chart_of_sampling_shows_speeds_as_shares_of_the_best(folder: Path) -> None:
    drawn = report.charts(folder)["sampling.svg"]
    assert "tiny, HTTP" in drawn and "tiny, adapters" in drawn
    assert drawn.count("<circle") == 4
    assert 'text-anchor="end">1</text>' in drawn and 'text-anchor="end">400</text>' not in drawn


def test_the_page_shows_the_results_that_are_kept() -> None:
    text = report.PAGE.read_text()
    assert report.renewed(text) == text, "run python -m benchmarks.report"
    for name, drawn in report.charts().items():
        assert (report.PAGE.parent / "images" / name).read_text() == drawn, "run python -m benchmarks.report"


def test_the_page_has_a_place_for_every_result() -> None:
    text = report.PAGE.read_text()
    kept = {file.stem for file in RESULTS.glob("*.json")}
    for name in kept | set(report.TABLES):
        assert f"<!-- results: {name} -->" in text
