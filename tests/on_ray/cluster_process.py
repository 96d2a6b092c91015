"""A cluster of Ray's own test utility in a process of its own, told what to do line by line.

`add NAME {options}` and `remove NAME`, as a power cut would; each is answered by one line of JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from ray.cluster_utils import Cluster

OBJECTS_BYTES = 80 << 20


def main() -> None:
    def options(more: dict[str, Any]) -> dict[str, Any]:
        return {"include_dashboard": False, "object_store_memory": OBJECTS_BYTES, **more}

    cluster = Cluster(initialize_head=True, head_node_args=options({"num_cpus": 0}))
    nodes = {}
    say = sys.__stdout__
    assert say is not None
    print(json.dumps({"address": cluster.address}), file=say, flush=True)
    for line in sys.stdin:
        verb, name, more = (*line.split(" ", 2), "{}")[:3]
        if verb == "add":
            nodes[name] = cluster.add_node(**options(json.loads(more)))
        else:
            cluster.remove_node(nodes.pop(name.strip()), allow_graceful=False)
        print(json.dumps({"done": verb}), file=say, flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
