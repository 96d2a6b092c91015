"""Every benchmark runs in its short form and writes what the report makes tables of. No time is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.measuring import ROOT
from benchmarks.workload import TINY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def run_short(name: str, out: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--smoke", "--out", str(out), *arguments]
    ended = subprocess.run(
        command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=280, check=False
    )
    assert ended.returncode == 0, ended.stderr[-4000:]


def results_of(name: str, out: Path) -> dict[str, Any]:
    (written,) = out.iterdir()
    assert written.name == f"{name}.json"
    results: dict[str, Any] = json.loads(written.read_text())
    assert results["machine"]["cores"] == os.cpu_count()
    assert "|---" in "\n".join(report.TABLES[name](results))
    return results


def numbers(found: Any) -> Iterator[float]:
    """Every number in it, however deep."""
    if isinstance(found, dict):
        for item in found.values():
            yield from numbers(item)
    elif isinstance(found, list):
        for item in found:
            yield from numbers(item)
    elif isinstance(found, (int, float)):
        yield found


def test_pressure(tmp_path: Path) -> None:
    run_short("pressure", tmp_path)
    results = results_of("pressure", tmp_path)
    for kind in ("raw", "sdk"):
        assert results[kind]["answered"] == results["samples"] == 60
        assert results[kind]["other"]["round_trips"] > 0
    assert results["idle"]["p95_ms"] >= results["idle"]["p50_ms"] >= results["idle"]["smallest_ms"] > 0


def test_placement(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    run_short("placement", tmp_path)
    results = results_of("placement", tmp_path)
    for side in ("here", "ray"):
        assert min(numbers(results[side])) > 0


def test_recovery(tmp_path: Path) -> None:
    run_short("recovery", tmp_path)
    results = results_of("recovery", tmp_path)
    assert results["snapshots"]["same_losses"] and results["whole_log"]["same_losses"]
    assert results["snapshots"]["applied_again"] < results["whole_log"]["applied_again"]
    for name in ("snapshots", "whole_log"):
        assert results[name]["pause_s"] > results[name]["start_s"] / 2 > 0


def test_roundtrip(tmp_path: Path) -> None:
    run_short("roundtrip", tmp_path)
    results = results_of("roundtrip-sqlite", tmp_path)
    assert results["store"] == "sqlite"
    assert set(results["future"]) == {"1 clients", "16 clients", "sdk", "gateway_resident_mb"}
    assert set(results["echo"]) == {"1 clients", "16 clients"}
    assert min(numbers(results["echo"])) > 0
    assert results["future"]["16 clients"]["p95_ms"] >= results["future"]["16 clients"]["p50_ms"] > 0


@pytest.mark.postgres
def test_roundtrip_on_postgres(tmp_path: Path, empty_pg_url: str) -> None:
    run_short("roundtrip", tmp_path, "--database-url", empty_pg_url)
    assert results_of("roundtrip-postgres", tmp_path)["store"] == "postgres"


def test_training(tmp_path: Path) -> None:
    run_short("training", tmp_path, "--models", TINY, "--threads", "1")
    results = results_of("training", tmp_path)
    assert (results["threads"], results["rank"]) == (1, 16)
    equal, mixed = results["models"][TINY]["2 × 16"], results["models"][TINY]["2 × 4–16"]
    assert (equal["tokens_a_step"], equal["padding"]) == (32, 1) and mixed["padding"] > 1
    for found in (equal, mixed):
        assert found["parameters"] == pytest.approx(1.35e6, rel=0.01)
        assert set(found["tandem"]["cpu_ms"]) == {"client", "gateway", "engine"}
        assert 0 <= found["gateway_share"] < 2
        for mine, other, ratio in zip(
            found["tandem"]["tokens_per_second"],
            found["plain"]["tokens_per_second"],
            found["ratios"],
            strict=True,
        ):
            assert ratio == pytest.approx(mine / other, rel=0.02)
        assert found["largest_difference_of_losses"] < 1e-4


def test_paging(tmp_path: Path) -> None:
    run_short("paging", tmp_path, "--threads", "1")
    results = results_of("paging", tmp_path)
    assert (results["runs"], results["places"], results["steps"], results["batch"]) == (4, 2, 2, [2, 16])
    counted = results["counters"]
    assert counted["run_memory_bytes"] == 2 * results["run_bytes"] >= counted["run_bytes"]
    assert counted["evictions"] >= 2
    for paged, stayed, ratio in zip(
        results["paging"]["tokens_per_second"],
        results["resident"]["tokens_per_second"],
        results["ratios"],
        strict=True,
    ):
        assert ratio == pytest.approx(paged / stayed, rel=0.02)
    assert results["largest_difference_of_losses"] < 1e-5
    assert results["weights_compared"] == 4
    assert results["largest_difference_of_weights"] < 1e-5


def test_sampling(tmp_path: Path) -> None:
    run_short("sampling", tmp_path, "--models", TINY, "--threads", "1")
    results = results_of("sampling", tmp_path)
    work = {"prompts": 4, "shortest": 4, "longest": 9, "new_tokens": 5}
    assert {name: results["work"][name] for name in work} == work
    found = results["models"][TINY]
    ours, theirs = (
        ("http", "http_adapters", "engine", "engine_adapters"),
        ("one_by_one", "batch", "continuous"),
    )
    for side in ours + theirs:
        assert len(found[side]["tokens_per_second"]) == 2
        assert min(found[side]["tokens_per_second"]) > 0
    assert found["same_tokens"] == dict.fromkeys(
        ("http", "engine", "http_adapters_peft", "engine_adapters_peft", "engine_adapters_alone"), 1.0
    )
    assert found["curve"]["at_once"] == [1, 3]
    for side in ours:
        assert len(found["curve"][side]) == 2 and min(found["curve"][side]) > 0


def test_sharing(tmp_path: Path) -> None:
    run_short("sharing", tmp_path, "--threads", "1")
    found = results_of("sharing", tmp_path)["shares"]["0.5"]
    assert set(found) == {f"{name}_{how}" for name in ("training", "sampling") for how in ("alone", "beside")}
    assert min(numbers(found)) > 0


def test_loss_memory(tmp_path: Path) -> None:
    run_short("loss_memory", tmp_path, "--threads", "1")
    results = results_of("loss_memory", tmp_path)
    assert (results["vocabulary"], results["tokens"]) == (2000, 64)
    for way in ("full", "chunked"):
        assert len(results[way]["seconds"]) == len(results[way]["bytes"]) == 3
        assert min(results[way]["seconds"]) > 0
    assert results["largest_difference"] < 1e-4
    assert results["difference_of_gradients"] < 1e-5


def test_hardware(tmp_path: Path) -> None:
    run_short("hardware", tmp_path, "--models", TINY, "--threads", "1")
    results = results_of("hardware", tmp_path)
    assert (results["threads"], results["rank"], results["batch"]) == (1, 16, [2, 8])
    found = results["models"][TINY]
    assert found["work"]["weights"] == 4 * 16 * (4 * 276_480 + 160 * 1536)
    assert found["share"] == pytest.approx(
        found["step"]["gflops"][0] / found["products"]["gflops"][0], rel=0.05, abs=0.01
    )
    assert found["seconds"]["attention"] > 0 and found["seconds"]["products with adapters"] > 0


def test_gpu(tmp_path: Path) -> None:
    run_short("gpu", tmp_path)
    results = results_of("gpu", tmp_path)
    assert results["device"] == "cpu"
    found = results["models"]["smoke"]
    for work in ("one run", "sixteen runs", "decoding"):
        assert min(numbers({side: found[work][side][0] for side in ("ours", "theirs")})) > 0


def test_megatron(tmp_path: Path) -> None:
    run_short("megatron", tmp_path)
    results = results_of("megatron", tmp_path)
    for work in ("one run", "sixteen runs"):
        assert results[work]["largest_difference_of_losses"] < 1e-5
        assert results[work]["ratio"] > 0


def test_scaling(tmp_path: Path) -> None:
    run_short("scaling", tmp_path, "--threads", "1")
    results = results_of("scaling", tmp_path)
    for what, points in {"runs": [1, 2], "length": [4, 8], "idle": [0, 2]}.items():
        assert [at for at, _ in results[what]] == points
        assert min(rate for _, rate in results[what]) > 0
    assert "idle runs" in report.CHARTS["scaling"](results)


def test_tenants(tmp_path: Path) -> None:
    run_short("tenants", tmp_path, "--models", TINY, "--threads", "1")
    found = results_of("tenants", tmp_path)["models"][TINY]["4-9"]
    assert found["runs"] == 2
    for side in ("together", "apart", "http", "peft"):
        assert min(found[side]["tokens_per_second"]) > 0
    assert found["largest_difference_of_losses"] < 1e-4


def test_deterministic(tmp_path: Path) -> None:
    run_short("deterministic", tmp_path, "--models", TINY, "--threads", "1")
    found = results_of("deterministic", tmp_path)["models"][TINY]
    assert set(found) == {"2", "1"}
    for each in found.values():
        assert (
            min(rate for side in ("default", "deterministic") for rate in each[side]["tokens_per_second"]) > 0
        )
        assert each["largest_difference_of_losses"] < 1e-4


@pytest.mark.postgres
def test_full_table(tmp_path: Path) -> None:
    run_short("full_table", tmp_path)
    stores = results_of("full-table", tmp_path)["stores"]
    assert set(stores) == {"sqlite", "postgres"}
    for found in stores.values():
        assert found["futures"] == 10_000
        assert found["round_trip"]["ratio"] > 0
        assert found["pruning"]["rows_per_second"]["calls"][0] > 0
        assert found["pruning"]["rows_per_second"]["results"][0] > 0


def test_growth(tmp_path: Path) -> None:
    run_short("growth", tmp_path)
    results = results_of("growth", tmp_path)
    assert 0 < results["deleted"]["used"] < results["kept"]["used"] <= results["kept"]["file"]
