"""An engine in whose process nothing can be computed any more: the process ends, with its last words in the page."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from engines import host
from engines.fake import FakeEngine
from engines.interface import EngineBroken, RunOperation, SampleEvent, UserError
from engines.messages import Perform, RunAddress, Sample
from engines.operations import ForwardBackward, ForwardResult, encode
from engines.performing import TrainingCalls
from engines.sampling_calls import SamplingCalls
from engines.vitals import Doing, Vitals
from tests.engines.material import CREATE, learn, sample
from tests.engines.test_calls import config

ROOT = Path(__file__).parents[2]


class DeadDevice(FakeEngine):
    """Reports an error at every pass."""

    def forward_backward(
        self, items: Sequence[RunOperation[ForwardBackward]]
    ) -> list[ForwardResult | UserError]:
        raise EngineBroken("the device does not answer")

    def advance(self) -> list[SampleEvent]:
        raise EngineBroken("the device does not answer")


def test_nothing_on_the_way_takes_it_for_the_failure_of_one_operation(tmp_path: Path) -> None:
    engine = DeadDevice.load(config(tmp_path))
    calls = TrainingCalls(engine, engine.info(), config(tmp_path))
    calls.perform(Perform(1, 1, "create_run", [RunAddress("a", 0)]), [encode(CREATE)])
    vitals = Vitals.create()
    with pytest.raises(EngineBroken), vitals.during(Doing.TRAINING, 1):
        calls.perform(Perform(2, 1, "forward_backward", [RunAddress("a", 1)]), [encode(learn())])
    assert vitals.read().doing is Doing.TRAINING
    vitals.close()
    samples = SamplingCalls(engine, engine.info(), lambda message, *_: None)
    samples.start(Sample(1), encode(sample()))
    with pytest.raises(EngineBroken):
        samples.advance()


DYING = """
import sys
from engines import host
from engines.interface import EngineBroken
from engines.vitals import Vitals

def run(socket, heart):
    raise EngineBroken("the device does not answer")

host.run = run
sys.argv = ["host", "--connect", "ipc:///tmp/nobody-listens", "--vitals", str(Vitals.create().descriptor)]
host.main()
"""


def test_the_process_ends_at_once_and_says_why() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", DYING], cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:  # its standard input stays open, as the owner's does
        status = process.wait(30)
        assert process.stderr is not None
        log = process.stderr.read()
    assert status == host.EXIT_BROKEN
    assert b"the engine is broken; only a new process helps" in log
    assert b"the device does not answer" in log
