"""The `tandem` command against a running gateway: what it prints, where, and how it ends."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import httpx
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file

from sdk import AdminClient
from sdk.cli import main
from tests.admin.conftest import keys_command, save
from tests.gateway.conftest import begin_run
from tests.sdk.conftest import STEPS, Place
from tests.served import ServedGateway

ROOT = Path(__file__).parents[2]
NOBODY = "http://127.0.0.1:9"


def tandem(place: Place | None, *arguments: str, **options: Any) -> Result:
    """The command in this process, the gateway named by the environment."""
    environment = {"TANDEM_URL": place.url if place is not None else NOBODY, "TANDEM_API_KEY": None}
    return CliRunner().invoke(main, list(arguments), env=environment, **options)


def lines_of(result: Result) -> list[str]:
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def test_runs(place: Place) -> None:
    head, *lines = lines_of(tandem(place, "runs", "--all"))
    assert head.split() == ["run", "status", "model", "rank", "step", "where", "last", "used"]
    [line] = [line for line in lines if line.startswith(place.trained)]
    assert line.split()[1:7] == ["active", "fake/model", "8", str(STEPS), "in", "memory"]
    assert re.search(r"(just now|\d+ (s|min) ago)$", line)
    assert any(line.startswith(place.fresh) for line in lines)


def test_one_run(place: Place) -> None:
    text = "\n".join(lines_of(tandem(place, "runs", place.trained, "--steps", "4")))
    assert "rank 8, alpha 32, seed 1; attention, MLP, unembedding" in text
    for path in place.paths:
        assert path in text
    table = text[text.index("loss/token") :].splitlines()[1:5]
    assert [line.split()[0] for line in table] == [str(STEPS - 3 + row) for row in range(4)]
    shown = [float(line.split()[1]) for line in table]
    assert shown == pytest.approx([loss / 4 for loss in place.losses[-4:]], rel=1e-3)
    assert "loss per token" in text
    assert "┌" in text


def test_one_run_without_steps_has_no_plot(place: Place) -> None:
    text = "\n".join(lines_of(tandem(place, "runs", place.fresh)))
    assert place.fresh in text
    assert "loss" not in text


def test_one_run_without_plotext(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotext", None)
    text = "\n".join(lines_of(tandem(place, "runs", place.trained)))
    assert "loss/token" in text
    assert "┌" not in text


def test_checkpoints_are_listed_and_filtered(place: Place) -> None:
    head, *lines = lines_of(tandem(place, "checkpoints", "--run", place.trained))
    assert [line.split()[0] for line in lines] == place.paths[::-1]
    assert head.split() == ["checkpoint", "model", "rank", "size", "saved"]
    _, *lines = lines_of(tandem(place, "checkpoints", "--run", place.trained, "--kind", "sampler_weights"))
    assert [line.split()[0] for line in lines] == place.paths[2:]


def test_a_limit_is_said_and_lifted(place: Place) -> None:
    result = tandem(place, "checkpoints", "--run", place.trained, "-n", "2")
    assert len(lines_of(result)) == 3
    assert "--all" in result.stderr
    whole = tandem(place, "checkpoints", "--run", place.trained, "-n", "3")
    assert whole.stderr == ""


def test_a_run_may_be_named_by_the_beginning_of_its_id(place: Place) -> None:
    named = lines_of(tandem(place, "runs", place.trained[:12]))
    assert named[0].split() == ["run", place.trained]
    unknown = tandem(place, "runs", "no-such-run")
    assert unknown.exit_code == 1
    assert "there is no run 'no-such-run'" in unknown.stderr


def test_engines_sessions_and_futures(place: Place) -> None:
    _, line = lines_of(tandem(place, "engines"))
    assert line.split()[:6] == ["fake", "ready", "fake/model", "fake", "cpu", "float32"]
    _, *lines = lines_of(tandem(place, "sessions", "--all"))
    assert any(line.startswith(place.trained.partition(":")[0]) for line in lines)
    _, *lines = lines_of(tandem(place, "futures", "--run", place.trained, "--kind", "optim_step", "--all"))
    assert len(lines) == STEPS
    assert all(line.split()[1:4] == ["optim_step", "done", "fake"] for line in lines)


def test_an_empty_list_is_said_on_standard_error(place: Place) -> None:
    result = tandem(place, "futures", "--status", "failed")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "no such calls" in result.stderr


@pytest.mark.parametrize("command", ["runs", "checkpoints", "engines", "sessions", "futures"])
def test_json_is_what_the_gateway_says(place: Place, command: str) -> None:
    pages = command != "engines"
    told = json.loads(tandem(place, command, "--json", *(["--all"] if pages else [])).stdout)
    answer = httpx.get(
        f"{place.url}/admin/v1/{command}{'?limit=1000' if pages else ''}", trust_env=False
    ).json()
    asked = answer["items"]
    for row in (*told, *asked):
        row.pop("heartbeat_at", None)  # goes on while both ask
    assert told == asked


def test_json_of_one_run(place: Place) -> None:
    told = json.loads(tandem(place, "runs", place.trained, "--json").stdout)
    assert told["run"]["run_id"] == place.trained
    assert [step["loss"] for step in told["steps"]] == pytest.approx(place.losses, rel=1e-9)
    assert [saved["path"] for saved in told["checkpoints"]] == place.paths[::-1]


@pytest.fixture
def doomed(place: Place) -> str:
    """The path of a checkpoint that a test may delete."""
    with httpx.Client(base_url=place.url, headers={"X-API-Key": "tml-x"}, trust_env=False) as http:
        return save(http, begin_run(http), 1, "doomed")


def test_deleting_asks_first(place: Place, doomed: str) -> None:
    declined = tandem(place, "checkpoints", "delete", doomed, input="n\n")
    assert (declined.exit_code, declined.stdout) == (1, "")
    assert doomed in declined.stderr
    with AdminClient(place.url) as client:
        assert client.checkpoint(doomed).path == doomed
    unanswered = tandem(place, "checkpoints", "delete", doomed, input="")
    assert unanswered.exit_code == 1
    assert tandem(place, "checkpoints", "delete", doomed, input="y\n").exit_code == 0
    again = tandem(place, "checkpoints", "delete", doomed, "--yes")
    assert again.exit_code == 1
    assert f"there is no checkpoint {doomed}" in again.stderr


def test_deleting_is_all_or_nothing_when_one_is_unknown(place: Place, doomed: str) -> None:
    assert tandem(place, "checkpoints", "delete", "-y", doomed, f"{doomed}x").exit_code == 1
    result = tandem(place, "checkpoints", "delete", "-y", doomed, "--json")
    assert json.loads(result.stdout) == {"deleted": [doomed], "failed": {}}


def test_each_path_that_is_deleted_is_told(
    place: Place, doomed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when one between them goes while the question is asked."""
    with httpx.Client(base_url=place.url, headers={"X-API-Key": "tml-x"}, trust_env=False) as http:
        others = [save(http, begin_run(http), 1, f"doomed{number}") for number in range(2)]
    really = AdminClient.delete_checkpoint

    def lose(client: AdminClient, path: str) -> None:
        if path == doomed:
            really(client, path)
        really(client, path)

    monkeypatch.setattr(AdminClient, "delete_checkpoint", lose)
    result = tandem(place, "checkpoints", "delete", "-y", others[0], doomed, others[1], others[0], "--json")
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert told["deleted"] == others
    assert list(told["failed"]) == [doomed]
    assert "there is no checkpoint" in told["failed"][doomed]
    first, second, third, last = result.stderr.splitlines()
    assert (first, third) == (f"deleted: {others[0]}", f"deleted: {others[1]}")
    assert second.startswith(f"not deleted: {doomed}: there is no checkpoint")
    assert last == "Error: 1 of 3 not deleted."
    with AdminClient(place.url) as client:
        assert not {doomed, *others} & {saved.path for saved in client.checkpoints()}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["runs", "{run}", "--status", "active"], "--status"),
        (["runs", "--model", "fake/model", "{run}"], "--model"),
        (["runs", "{run}", "--owner", "x", "-n", "20"], "--owner, --limit"),
        (["runs", "{run}", "--all"], "--all"),
        (["checkpoints", "--run", "{run}", "delete", "{path}"], "--run"),
        (["checkpoints", "--kind", "weights", "--all", "delete", "-y", "{path}"], "--kind"),
    ],
)
def test_options_of_lists_are_refused_where_they_would_change_nothing(
    place: Place, arguments: list[str], named: str
) -> None:
    result = tandem(place, *(word.format(run=place.trained, path=place.paths[0]) for word in arguments))
    assert (result.exit_code, result.stdout) == (2, "")
    assert all(option in result.stderr for option in named.split(", "))
    assert "only for lists, not beside" in " ".join(result.stderr.split())
    with AdminClient(place.url) as client:
        assert client.checkpoint(place.paths[0]).path == place.paths[0]


def test_options_may_stand_before_a_subcommand(place: Place, doomed: str) -> None:
    result = tandem(None, "checkpoints", "--url", place.url, "--json", "delete", "--yes", doomed)
    assert json.loads(result.stdout) == {"deleted": [doomed], "failed": {}}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["runs", "nobody"], 1, "there is no run 'nobody'"),
        (["runs", "--status", "asleep"], 2, "'asleep' is not one of"),
        (["runs", "--limit", "0"], 2, "--limit"),
        (["checkpoints", "delete", "a/b"], 2, "no checkpoint's path"),
        (["dance"], 2, "dance"),
        (["serve", "--port", "70000"], 2, "--port"),
        (["serve", "--config", "no-such.toml"], 2, "no-such.toml"),
    ],
)
def test_what_goes_wrong_is_said_and_coded(place: Place, arguments: list[str], code: int, words: str) -> None:
    result = tandem(place, *arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert words in result.stderr
    assert code != 1 or result.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["runs", "checkpoints", "engines", "sessions", "futures"])
def test_without_a_gateway_one_line_says_what_to_do(command: str) -> None:
    result = tandem(None, command)
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr == f"Error: nothing answers at {NOBODY}; start it with `tandem serve`\n"


def test_keys_and_owners(tmp_path: Path) -> None:
    settings = {"data_dir": str(tmp_path)}
    alice = keys_command(settings, "add", "alice").split()[0]
    root = keys_command(settings, "add", "root", "--admin").split()[0]
    gateway = ServedGateway(tmp_path)
    gateway.start()
    try:
        with httpx.Client(base_url=gateway.url, headers={"X-API-Key": alice}, trust_env=False) as http:
            run_id = begin_run(http)

        def ask(key: str | None, *arguments: str) -> Result:
            environment = {"TANDEM_URL": gateway.url, "TANDEM_API_KEY": key}
            return CliRunner().invoke(main, list(arguments), env=environment)

        refused = ask(None, "runs")
        assert refused.exit_code == 1
        assert "an API key is needed" in refused.stderr
        assert [line.split()[0] for line in lines_of(ask(alice, "runs"))] == ["run", run_id]
        [_, line] = lines_of(ask(root, "runs"))
        assert "alice" in line.split()
        assert lines_of(ask(None, "runs", "--key", alice)) == lines_of(ask(alice, "runs"))
        foreign = ask(alice, "runs", "--owner", "root")
        assert foreign.exit_code == 1
        assert "'root'" in foreign.stderr
    finally:
        gateway.close()


def test_a_real_process_without_the_official_sdk(place: Place) -> None:
    program = (
        "import sys; sys.modules['tinker'] = None; sys.argv = ['tandem', 'runs', '--json', '--url', sys.argv[1]]\n"
        "from sdk.cli import main; main()"
    )
    command = [sys.executable, "-c", program, place.url]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert place.trained in {run["run_id"] for run in json.loads(done.stdout)}


def commands() -> dict[str, click.Command]:
    """Every command by its full name."""
    found: dict[str, click.Command] = {}
    for name, command in main.commands.items():
        found[name] = command
        if isinstance(command, click.Group):
            found |= {f"{name} {inner}": each for inner, each in command.commands.items()}
    return found


def test_every_command_and_option_is_documented() -> None:
    text = (ROOT / "docs" / "cli.md").read_text()
    for name, command in commands().items():
        assert re.search(rf"^tandem {name}\b", text, re.MULTILINE)
        for option in command.params:
            if isinstance(option, click.Option):
                long = next(flag for flag in option.opts if flag.startswith("--"))
                assert f"`{long}`" in text, f"{long} of {name}"


def test_the_documentation_and_the_readme_name_no_command_that_is_none() -> None:
    for file in ("docs/cli.md", "README.md"):
        named = re.findall(r"(?:^|`|bin/)tandem ([a-z]+)", (ROOT / file).read_text(), re.MULTILINE)
        assert named
        assert set(named) <= set(main.commands)
    options = set(re.findall(r"`(--[a-z]+)`", (ROOT / "docs" / "cli.md").read_text()))
    known = {flag for command in commands().values() for option in command.params for flag in option.opts}
    assert options <= known


# ---------------------------------------------------------------------------- taking weights out


def test_an_adapter_is_exported_as_peft_reads_it(place: Place, tmp_path: Path) -> None:
    """The same tensors as the gateway keeps, and a configuration that names the base model."""
    folder = tmp_path / "my adapter"
    printed = lines_of(tandem(place, "checkpoints", "export", place.paths[-1], str(folder)))
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert printed[-1] == "base model: fake/model"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["peft_type"]) == ("fake/model", 8, "LORA")
    exported = load_file(folder / "adapter_model.safetensors")
    kept = [
        load_file(path)
        for path in (place.gateway.data_dir / "storage").rglob("adapter_model.safetensors")
        if path.read_bytes() == (folder / "adapter_model.safetensors").read_bytes()
    ]
    assert kept
    assert exported.keys() == kept[0].keys()


def test_the_base_model_of_an_export_may_be_named_for_its_reader(place: Place, tmp_path: Path) -> None:
    """And of weights that are trained on, no optimizer state is given."""
    folder = tmp_path / "a"
    arguments = ("export", place.paths[0], str(folder), "--base-model", "/models/mine", "--json")
    told = json.loads(tandem(place, "checkpoints", *arguments).stdout)
    assert told["base_model"] == "/models/mine"
    assert told["files"] == {path.name: path.stat().st_size for path in folder.iterdir()}
    assert set(told["files"]) == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "/models/mine"


def test_an_export_overwrites_nothing_and_names_what_is_missing(place: Place, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    for target in (tmp_path, tmp_path / "kept"):
        refused = tandem(place, "checkpoints", "export", place.paths[0], str(target))
        assert refused.exit_code in (1, 2)
        assert "is not empty" in refused.stderr or "is a file" in refused.stderr
    assert (tmp_path / "kept").read_text() == "mine"
    missing = f"tinker://{place.trained}/weights/nothing"
    refused = tandem(place, "checkpoints", "export", missing, str(tmp_path / "new"))
    assert refused.exit_code == 1
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------- a gateway on this machine


def test_stop_ends_the_gateway_and_waits_for_it(tmp_path: Path) -> None:
    gateway = ServedGateway(tmp_path)
    gateway.start()
    try:
        done = CliRunner().invoke(main, ["stop", "--url", gateway.url], env={"TANDEM_API_KEY": None})
        assert done.exit_code == 0, done.output
        assert f"(process {gateway.pid})" in done.stderr
        assert gateway.stop() == 0  # it has ended by itself
        assert tandem(None, "stop", "--url", gateway.url).exit_code == 3
    finally:
        gateway.close()


def test_stop_is_for_this_machine() -> None:
    refused = tandem(None, "stop", "--url", "http://192.0.2.1:8000")
    assert refused.exit_code == 1
    assert "another machine" in refused.stderr


def test_keys_are_made_listed_and_removed(tmp_path: Path) -> None:
    def keys(*arguments: str) -> str:
        command = [sys.executable, "-m", "sdk.cli", "keys", *arguments, "--data", str(tmp_path / "data")]
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
        ).stdout

    assert keys("add", "alice", "--label", "laptop", "--admin").startswith("tml-")
    [line] = [line for line in keys("list").splitlines() if "alice" in line]
    assert line.split()[1:] == ["alice", "(admin)", "laptop"]
    assert "The key of alice is removed." in keys("remove", line.split()[0])
