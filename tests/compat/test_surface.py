"""The finding of methods and the judging of calls, without another SDK."""

from __future__ import annotations

import pytest

from tests.compat import environments, registry
from tests.compat.probe import Outcome, load_calls, outcome_of
from tests.compat.registry import check_of
from tests.compat.running import Report
from tests.compat.surface import surface
from tests.compat.table import page
from tests.compat.world import Call


def test_the_surface_of_the_installed_sdk_is_what_its_users_call() -> None:
    names = surface()
    assert len(names) > 190
    for name in (
        "TrainingClient.forward_backward",
        "TrainingClient.forward_backward_async",
        "SamplingClient.create",
        "ServiceClient.holder",
        "RestClient()",
        "APIFuture.result",
        "await BackcompatTrainingClientFuture",
        "with ServiceClient",
        "pickle SamplingClient",
        "LossHandle.key",
        "tinker.auth.get_tinker_token",
        "tinker checkpoint push-hf",
    ):
        assert name in names
    assert not [name for name in names if name.startswith("_") or "._" in name]


def test_every_method_of_the_installed_sdk_has_a_call() -> None:
    load_calls()
    assert [name for name in surface() if check_of(name) is None] == []


def test_a_method_without_a_call_stops_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "CHECKS", {})
    with pytest.raises(LookupError, match=r"no call for TrainingClient\.dance"):
        outcome_of(None, "TrainingClient.dance")  # type: ignore[arg-type]


def test_a_call_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(call: Call) -> None:
        assert call.name == "other", "it is not"

    monkeypatch.setattr(registry, "CHECKS", {"tinker dance": wrong})
    problem = outcome_of(None, "tinker dance").problem  # type: ignore[arg-type]
    assert problem is not None
    assert problem.startswith("AssertionError: it is not")


def test_an_sdks_own_fault_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(call: Call) -> None:
        raise registry.BrokenInSdk("it divides by zero")

    monkeypatch.setattr(registry, "CHECKS", {"tinker dance": broken})
    assert outcome_of(None, "tinker dance") == Outcome(broken="it divides by zero")  # type: ignore[arg-type]


def test_async_forms_and_wrappers_are_called_as_what_they_pass_on_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def passes(call: Call) -> None: ...

    monkeypatch.setattr(registry, "CHECKS", {"TrainingClient.forward": passes})
    for name in (
        "TrainingClient.forward",
        "TrainingClient.forward_async",
        "BackcompatTrainingClientFuture.forward_async",
    ):
        assert check_of(name) is passes
    assert check_of("SamplingClient.forward") is None
    monkeypatch.setattr(registry, "CHECKS", {"pickle SamplingClient": passes})
    assert check_of("pickle BackcompatSamplingClientFuture") is passes


def test_the_page_says_what_passed_failed_and_is_not_there() -> None:
    text = page(
        [
            Report("0.1.0", {"RestClient.old": None, "tinker run list": "it broke"}),
            Report("0.2.0", {"RestClient.new": None, "tinker run list": None}, {"RestClient.new": "why"}),
        ]
    )
    assert "2 of 4 calls work, 1 cannot; 3 methods of 2 versions." in text
    assert "| `RestClient.old` | ✓ | · |" in text
    assert "| `RestClient.new` | · | § |" in text
    assert "* `RestClient.new`: why" in text
    assert "| `tinker run list` | **fail** | ✓ |" in text


def test_an_environment_that_lacks_something_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("sdks")
    monkeypatch.setattr(environments, "FOLDER", folder)
    metadata = folder / "9.9.9" / "tinker-9.9.9.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: tinker\nVersion: 9.9.9\nRequires-Dist: httpx>=99\n")
    with pytest.raises(environments.InstallError, match=r"tinker 9\.9\.9 needs httpx>=99"):
        environments.site_of("9.9.9")
