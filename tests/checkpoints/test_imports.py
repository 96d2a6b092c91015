"""An adapter from outside becomes a checkpoint that is trained and sampled as what it is."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tinker
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from sdk import AdminClient, AdminError
from tests.checkpoints.conftest import Place, route_of
from tests.gateway.conftest import begin_run, datum, outcome

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
O_PROJ = "base_model.model.model.layers.0.self_attn.o_proj.lora_{}.weight"
DOWN = "base_model.model.model.layers.0.mlp.down_proj.lora_{}.weight"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 5, "target_modules": ["o_proj", "down_proj"]}


def tensors(scale: float = 1.0, *names: str) -> dict[str, NDArray[np.float32]]:
    random = np.random.default_rng(1)
    made = {}
    for name in names or (O_PROJ, DOWN):
        made[name.format("A")] = random.normal(size=(2, 16)).astype(np.float32)
        made[name.format("B")] = (scale * random.normal(size=(16, 2))).astype(np.float32)
    return made


def tar_of(weights: dict[str, NDArray[np.float32]], **config: Any) -> bytes:
    buffer = io.BytesIO()
    files = {
        "adapter_config.json": json.dumps({**CONFIG, **config}).encode(),
        "adapter_model.safetensors": save(weights),
    }
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, body in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return buffer.getvalue()


def send(http: httpx.Client, body: bytes, **query: Any) -> httpx.Response:
    where = {"base_model": "fake/model", "name": "mine", **query}
    return http.post(
        "/admin/v1/checkpoints", params=where, content=body, headers={"Content-Type": "application/x-tar"}
    )


def imported(http: httpx.Client, body: bytes, **query: Any) -> str:
    answer = send(http, body, **query)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["checkpoint"]["path"])


def logprobs(service: tinker.ServiceClient, path: str) -> list[float]:
    sampler = service.create_sampling_client(model_path=path).result()
    prompt = tinker.ModelInput.from_ints([3, 1, 4, 1, 5, 9, 2, 6])
    return [value for value in sampler.compute_logprobs(prompt).result() if value is not None]


def test_it_is_described_as_what_it_is(place: Place, alice: httpx.Client) -> None:
    before = place.folders()
    body = send(alice, tar_of(tensors(1.0, DOWN)), ttl_seconds=3600).json()
    shown = body["checkpoint"]
    assert (shown["kind"], shown["name"], shown["owner"]) == ("weights", "mine", "alice")
    assert (shown["has_optimizer"], shown["public"]) == (False, False)
    assert shown["expires_at"] is not None
    lora = shown["lora"]
    assert (lora["rank"], lora["alpha"]) == (2, 5)
    assert [lora[f"train_{part}"] for part in ("attn", "mlp", "unembed")] == [False, True, False]
    assert (body["layers"], body["zero_layers"]) == (1, 0)
    [folder] = place.folders() - before
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sizes.pop("checksums.json") > 0
    assert shown["size_bytes"] == sum(sizes.values())
    for name, numbers in load_file(folder / "adapter_model.safetensors").items():
        np.testing.assert_array_equal(numbers, tensors(1.0, DOWN)[name])
    info = alice.post("/api/v1/weights_info", json={"tinker_path": shown["path"]}).json()
    assert (info["lora_rank"], info["train_mlp"], info["train_attn"]) == (2, True, False)
    assert list(place.gateway.data_dir.glob("uploads/*")) == []


def test_alpha_counts(place: Place, alice: httpx.Client) -> None:
    """alpha 10 with B is alpha 5 with 2 B: the same numbers; and both are not what alpha 32 would give."""
    one = imported(alice, tar_of(tensors(2.0), lora_alpha=5))
    two = imported(alice, tar_of(tensors(1.0), lora_alpha=10))
    other = imported(alice, tar_of(tensors(1.0), lora_alpha=32))
    with tinker.ServiceClient(base_url=place.url, api_key=place.keys["alice"]) as service:
        np.testing.assert_allclose(logprobs(service, one), logprobs(service, two), atol=1e-5)
        assert np.abs(np.subtract(logprobs(service, one), logprobs(service, other))).max() > 1e-3


def test_a_run_begins_at_it_and_goes_on(place: Place, alice: httpx.Client) -> None:
    path = imported(alice, tar_of(tensors(0.1)))
    with tinker.ServiceClient(base_url=place.url, api_key=place.keys["alice"]) as service:
        client = service.create_training_client_from_state(path).result()
        assert client.get_info().lora_rank == 2
        before = client.forward([datum()], "cross_entropy").result().metrics["loss:sum"]
        for _ in range(5):
            client.forward_backward([datum()], "cross_entropy").result()
            client.optim_step(tinker.AdamParams(learning_rate=0.02)).result()
        after = client.forward([datum()], "cross_entropy").result().metrics["loss:sum"]
        assert after < before
        saved = client.save_state("later").result().path
        lora = alice.get("/admin/v1/checkpoints/" + saved.removeprefix("tinker://")).json()["lora"]
        assert lora["alpha"] == 5  # the run keeps the scale that it began with
        with pytest.raises(tinker.BadRequestError, match="optimizer"):
            service.create_training_client_from_state_with_optimizer(path).result()


def test_a_run_of_another_scale_does_not_load_it(alice: httpx.Client) -> None:
    """SDKs up to 0.24 make a run first, of alpha 32, and load into it: never silently rescaled."""
    path = imported(alice, tar_of(tensors()))
    session = alice.post("/api/v1/create_session", json={}).json()["session_id"]
    lora = {"rank": 2, "train_unembed": False}
    body = {"session_id": session, "model_seq_id": 0, "base_model": "fake/model", "lora_config": lora}
    outcome(alice, alice.post("/api/v1/create_model", json=body).json()["request_id"])
    load = {"model_id": f"{session}:train:0", "seq_id": 1, "path": path, "optimizer": False}
    failed = outcome(alice, alice.post("/api/v1/load_weights", json=load).json()["request_id"])
    assert failed["category"] == "user"
    assert "alpha" in failed["error"]


@pytest.mark.parametrize(
    ("body", "query", "status", "said"),
    [
        (b"no tar" * 200, {}, 400, "no uncompressed tar"),
        (b"", {}, 400, "holds no"),
        (tar_of(tensors(), use_rslora=True), {}, 400, "use_rslora"),
        (tar_of({"x": np.zeros((1,), np.float32)}), {}, 400, "no LoRA factor"),
        (bytes(4_000_001), {}, 413, "max_import_bytes"),
        (tar_of(tensors()), {"base_model": "no/such"}, 404, "no/such"),
        (tar_of(tensors()), {"name": "a/b"}, 400, "1 to 200"),
        (tar_of(tensors()), {"name": ""}, 400, "1 to 200"),
        (tar_of(tensors()), {"ttl_seconds": 5}, 422, "ttl_seconds"),
    ],
)
def test_what_is_refused_leaves_nothing(
    place: Place, alice: httpx.Client, body: bytes, query: dict[str, Any], status: int, said: str
) -> None:
    before, listed = place.folders(), alice.get("/admin/v1/checkpoints?limit=1000").json()["items"]
    answer = send(alice, body, **query)
    assert (answer.status_code, said in answer.text) == (status, True), answer.text
    assert place.folders() == before
    assert list(place.gateway.data_dir.glob("uploads/*")) == []
    assert alice.get("/admin/v1/checkpoints?limit=1000").json()["items"] == listed


@pytest.mark.parametrize("headers", [{"Content-Type": "application/json"}, {"Content-Encoding": "gzip"}])
def test_only_a_plain_tar_is_taken(alice: httpx.Client, headers: dict[str, str]) -> None:
    where = {"base_model": "fake/model", "name": "mine"}
    answer = alice.post("/admin/v1/checkpoints", params=where, content=tar_of(tensors()), headers=headers)
    assert answer.status_code == 415


def test_it_is_its_owners(alice: httpx.Client, bob: httpx.Client) -> None:
    path = imported(alice, tar_of(tensors()))
    assert bob.get("/admin/v1/checkpoints/" + path.removeprefix("tinker://")).status_code == 404
    assert bob.get(route_of(path, "/archive")).status_code == 404
    session = bob.post("/api/v1/create_session", json={}).json()["session_id"]
    begin = {"session_id": session, "model_seq_id": 0, "path": path, "optimizer": False}
    assert bob.post("/api/v1/load_weights", json=begin).status_code == 404


def test_what_was_downloaded_is_imported_again(place: Place, alice: httpx.Client, tmp_path: Path) -> None:
    run_id = begin_run(alice, rank=4, seed=8)
    save_body = {"model_id": run_id, "seq_id": 1, "path": "w"}
    path = outcome(alice, alice.post("/api/v1/save_weights", json=save_body).json()["request_id"])["path"]
    archive = alice.get(route_of(path, "/archive"), follow_redirects=True).content
    again = imported(alice, archive, name="back")
    with tinker.ServiceClient(base_url=place.url, api_key=place.keys["alice"]) as service:
        assert logprobs(service, path) == logprobs(service, again)


def test_the_admin_client_sends_a_folder(place: Place, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "adapter_model.safetensors").write_bytes(save(tensors()))
    with AdminClient(place.url, place.keys["alice"]) as admin:
        made = admin.import_adapter(tmp_path, base_model="fake/model", name="folder")
        assert admin.checkpoint(made.checkpoint.path) == made.checkpoint
        assert made.checkpoint.lora.alpha == 5
        with pytest.raises(AdminError, match="not trained"):
            admin.import_adapter(tmp_path, base_model="no/such", name="folder")
        with pytest.raises(AdminError, match="cannot be read"):
            admin.import_adapter(tmp_path / "nowhere", base_model="fake/model", name="folder")
