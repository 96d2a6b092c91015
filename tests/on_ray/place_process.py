"""A place without Ray: what an actor does, in a process of its own that is told where to by standard input."""

from __future__ import annotations

import json
import sys

from engines.on_ray.place import Place


def main() -> None:
    python, mark = json.loads(sys.stdin.readline())
    place = Place(python)
    introduction = place.introduce(mark)
    told = {**introduction._asdict(), "public_key": introduction.public_key.decode()}
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()
    address, server_key, owner_timeout_s = json.loads(sys.stdin.readline())
    place.serve(address, server_key.encode(), owner_timeout_s)


if __name__ == "__main__":
    main()
