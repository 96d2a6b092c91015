"""How a value that does not fit is told to who has written it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from engines.fake.options import read_options as fake_options
from engines.hf.options import read_options as hf_options
from engines.interface import LoadError
from engines.megatron.options import read_options as megatron_options
from engines.misfit import misfit_of, with_entries
from engines.vllm.options import read_options as vllm_options


class Part(msgspec.Struct):
    size: int


class Whole(msgspec.Struct, forbid_unknown_fields=True):
    parts: list[dict[str, Part]]
    name: str = ""


def failure(value: Any) -> msgspec.ValidationError:
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert(value, Whole)
    return caught.value


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"parts": [{}, {"a": {"size": 1}, "b": {"size": "x"}}]}, "parts[1]['b'].size: Expected `int`, got `str`"),
        ({"parts": [{"a": {"size": 1}, "b": {}, "c": 5}]}, "parts[0]['b'].size: Object missing required field"),
        ({"parts": [{"a": 5}], "name": 5}, "parts[0]['a']: Expected `object`, got `int`"),
        ({"parts": [], "name": 5}, "name: Expected `str`, got `int`"),
        ({"parts": [], "[...]": 5}, "[...]: Object contains unknown field `[...]`"),
        (5, "Expected `object`, got `int`"),
    ],
)  # fmt: skip
def test_entries_of_mappings_have_their_names(value: Any, told: str) -> None:
    assert str(with_entries(misfit_of(failure(value)), value, Whole)).startswith(told)


@pytest.mark.parametrize("wrong", [0, 1, 999, 1500, 1999])
def test_one_of_many_entries_is_found_by_few_looks(wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    value: Any = {"parts": [{f"p{number}": {"size": number} for number in range(2000)}]}
    value["parts"][0][f"p{wrong}"] = {}
    value["parts"][0]["p1999"] = {}  # a later one does not matter
    error = failure(value)
    looks: list[None] = []
    convert = msgspec.convert

    def counted(value: Any, schema: Any) -> Any:
        looks.append(None)
        return convert(value, schema)

    monkeypatch.setattr(msgspec, "convert", counted)
    monkeypatch.setattr("engines.misfit.LOOKS_S", 60.0)
    misfit = with_entries(misfit_of(error), value, Whole)
    assert (misfit.where, misfit.path) == (f"parts[0]['p{wrong}'].size", f"parts[0]['p{wrong}']")
    assert len(looks) <= 12


def test_what_takes_too_long_to_find_has_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """One look is as long as reading the whole: a hostile body is not read again and again."""
    value: Any = {"parts": [{f"p{number}": {"size": "x"} for number in range(2000)}]}
    error = failure(value)
    monkeypatch.setattr("engines.misfit.LOOKS_S", -1.0)
    assert str(with_entries(misfit_of(error), value, Whole)).startswith("parts[0][...].size: Expected `int`")


@pytest.mark.parametrize(
    ("read", "name"),
    [(fake_options, "max_rank"), (hf_options, "threads"), (vllm_options, "max_rank"), (megatron_options, "tensor")],
)  # fmt: skip
def test_an_option_of_a_wrong_type_is_named_as_in_the_settings_file(
    read: Callable[[dict[str, Any]], object], name: str
) -> None:
    with pytest.raises(
        LoadError, match=rf"^options\.{name}: Expected `int.*`, got `str`; options of the .*{name}"
    ):
        read({name: "2"})
    with pytest.raises(LoadError, match=r"^options\.nonsense: Object contains unknown field"):
        read({"nonsense": 1})
