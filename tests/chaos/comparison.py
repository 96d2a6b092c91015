"""The same training twice, over a smooth connection and over a mistreated one."""

from __future__ import annotations

from collections import Counter

import tinker

from tests.chaos.proxy import Proxy, Trouble
from tests.chaos.workload import CHUNK_FLAGS, KEY, calls_of_run, folders, new_files, optimizer_steps, train
from tests.served import ServedGateway

ANSWERS = {"/api/v1/client/config": CHUNK_FLAGS}
UNDISTURBED = Trouble(0.0, 0.0, 0.0, 0.0)


def compare(gateway: ServedGateway, steps: int, seed: int, patience_s: float = 60.0) -> Counter[str]:
    """What the proxy did. Raises AssertionError when the two ends differ in a byte, or anything was applied twice."""
    files = []
    runs = []
    with (
        Proxy(gateway.port, UNDISTURBED, seed=0, answers=ANSWERS).running() as smooth,
        Proxy(gateway.port, Trouble(), seed, answers=ANSWERS).running() as troubled,
    ):
        for proxy in (smooth, troubled):
            known = set(folders(gateway))
            with tinker.ServiceClient(base_url=proxy.url, api_key=KEY) as service:
                runs.append(train(service, steps, patience_s))
            files.append(new_files(gateway, known))
    happened = troubled.happened
    for kind, share in (("lost requests", 0.2), ("lost answers", 0.2), ("repeated", 0.1 * 0.8)):
        assert happened[kind] > 0.7 * share * happened["requests"], happened
    assert happened["requests"] > 1.3 * smooth.happened["requests"]
    assert {status for status in happened if status.startswith("status")} == {"status 200"}, happened

    undisturbed, disturbed = files
    assert undisturbed.keys() == disturbed.keys()
    assert "adapter_model.safetensors" in undisturbed
    assert "optimizer.safetensors" in undisturbed
    for name, content in undisturbed.items():
        assert disturbed[name] == content, f"{name} differs"
    kinds = {"create_run": 1, "forward_backward": 3 * steps, "optim_step": steps, "save_weights": 1}
    expected = Counter({(kind, "done"): count for kind, count in kinds.items()})
    for run_id in runs:
        assert calls_of_run(gateway, run_id) == expected
        assert optimizer_steps(gateway, run_id) == steps
    return happened
