"""One cluster for the tests of a module, and its token in the environment that gateways inherit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.on_ray.cluster import RayCluster, token


@pytest.fixture(scope="module")
def variables() -> Iterator[dict[str, str]]:
    """Ray's, set for everything that is started from here."""
    pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        made = token()
        for name, value in made.items():
            patch.setenv(name, value)
        yield made


@pytest.fixture(scope="module")
def cluster(variables: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """A head alone; tests add nodes under names of their own."""
    made = RayCluster(variables, tmp_path_factory.mktemp("cluster") / "log")
    yield made
    made.close()
