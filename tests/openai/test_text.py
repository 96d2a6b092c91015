"""Text handling gives what transformers gives, without it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from gateway.errors import BadRequest
from gateway.text import TextCodec, template
from tests.openai.doubles import BOS, CHAT_TEMPLATE, EOS, SAMPLE_TEXT, byte_level_tokenizer, tokenizer_files

TEXTS = [
    "",
    "Hello world",
    " leading  and   inner spaces \n\n\t tabs",
    SAMPLE_TEXT,
    "naïve 漢字🎉 👩‍👩‍👧 \u200f مرحبا \x00\x7f",
    f"{BOS}text with <|turn|>special<|end|> tokens{EOS}",
    "<|turn",
]


def _peer(folder: Path, files: dict[str, bytes]) -> Any:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return _peer(tmp_path_factory.mktemp("tokenizer"), tokenizer_files())


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return TextCodec.from_files(tokenizer_files())


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("special", [True, False])
def test_encode_is_transformers(codec: TextCodec, peer: Any, text: str, special: bool) -> None:
    assert codec.encode(text, add_special_tokens=special) == peer.encode(text, add_special_tokens=special)


def test_the_tokenizer_puts_its_own_special_token_first(codec: TextCodec) -> None:
    assert codec.encode("Hello")[0] == codec.bos_token_id == 0
    assert 0 not in codec.encode("Hello", add_special_tokens=False)


def test_encode_cuts_nothing_off_and_adds_no_padding(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    codec = TextCodec.from_files({"tokenizer.json": tokenizer.to_str().encode()})
    assert codec.decode(codec.encode(SAMPLE_TEXT)) == SAMPLE_TEXT
    assert len(codec.encode("a")) == 2


def test_encode_refuses_half_a_surrogate_pair(codec: TextCodec) -> None:
    with pytest.raises(BadRequest, match="surrogate pair stands alone at character 3"):
        codec.encode("abc\ud83c")


@pytest.mark.parametrize("skip", [True, False])
def test_decode_and_the_incremental_decoder_are_transformers(codec: TextCodec, peer: Any, skip: bool) -> None:
    draw = random.Random(0)
    for _ in range(2000):
        tokens = [draw.randrange(420) for _ in range(draw.randrange(12))]
        expected = peer.decode(tokens, skip_special_tokens=skip)
        assert codec.decode(tokens, skip_special_tokens=skip) == expected
        decoder = codec.decoder(skip_special_tokens=skip, at_start=True)
        assert "".join([decoder.feed([token]) for token in tokens]) + decoder.finish() == expected


def test_a_character_appears_when_its_last_byte_has_come() -> None:
    tokenizer = Tokenizer(
        models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    codec = TextCodec.from_files({"tokenizer.json": tokenizer.to_str().encode()})
    text = "a🎉é"
    tokens = codec.encode(text)
    assert len(tokens) == len(text.encode()) == 7
    decoder = codec.decoder()
    assert [decoder.feed([token]) for token in tokens] == ["a", "", "", "", "🎉", "", "é"]
    assert decoder.finish() == ""
    assert [codec.token_bytes(token) for token in tokens] == [bytes([byte]) for byte in text.encode()]


def test_a_character_that_never_ends_is_one_replacement(codec: TextCodec) -> None:
    tokens = codec.encode("🎉", add_special_tokens=False)
    whole = codec.decoder()
    assert "".join(whole.feed([token]) for token in tokens) == "🎉"
    broken = codec.decoder()
    assert broken.feed(codec.encode("ab", add_special_tokens=False)) == "ab"
    first = next(token for token in range(420) if codec.token_bytes(token) == b"\xf0")
    assert broken.feed([first]) == ""
    assert broken.finish() == "\ufffd"


def test_ids_outside_the_vocabulary_have_no_text(codec: TextCodec) -> None:
    assert codec.token_bytes(100_000) == b""
    assert codec.decoder().feed([100_000]) == ""


def _sentencepiece_like() -> Tokenizer:
    """BPE over characters with ▁ for spaces and bytes for what is missing, as in Llama 2 and Mistral."""
    bytes_ = {f"<0x{byte:02X}>": byte + 3 for byte in range(256)}
    words = ["▁", *"abcdehlorw"]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | bytes_ | {c: 259 + i for i, c in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return tokenizer


@pytest.mark.parametrize("text", ["hello world", "a é 漢🎉 b", " hello", "🎉"])
def test_byte_fallback_tokenizers(tmp_path: Path, text: str) -> None:
    files = {"tokenizer.json": _sentencepiece_like().to_str().encode()}
    codec = TextCodec.from_files(files)
    peer = _peer(
        tmp_path, files | {"tokenizer_config.json": b'{"tokenizer_class": "PreTrainedTokenizerFast"}'}
    )
    tokens = codec.encode(text)
    assert tokens == peer.encode(text)
    at_start = codec.decoder(at_start=True)
    assert (
        "".join(at_start.feed([token]) for token in tokens) + at_start.finish() == peer.decode(tokens) == text
    )
    behind = codec.decoder()
    assert "".join(behind.feed([token]) for token in tokens) == " " + text


def test_word_tokenizers_without_a_decoder_join_with_spaces() -> None:
    tokenizer = Tokenizer(models.WordLevel({"hello": 0, "world": 1}, unk_token="hello"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    codec = TextCodec.from_files({"tokenizer.json": tokenizer.to_str().encode()})
    decoder = codec.decoder(at_start=True)
    assert decoder.feed([0]) + decoder.feed([1]) == codec.decode([0, 1]) == "hello world"


def test_metaspace_tokenizers(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁hello", -1.0), ("▁wor", -1.5), ("ld", -2.0)], 0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    codec = TextCodec.from_files({"tokenizer.json": tokenizer.to_str().encode()})
    tokens = codec.encode("hello world")
    assert tokens == [1, 2, 3]
    decoder = codec.decoder(at_start=True)
    assert [decoder.feed([token]) for token in tokens] == ["hello", " wor", "ld"]
    assert codec.decode(tokens) == "hello world"


@pytest.mark.parametrize("extra", [["<tool>"], ["<tool>", "<eot>"], {"tool_token": "<tool>"}])
@pytest.mark.parametrize("by_id", [{}, {"398": {"content": "<image>", "rstrip": True, "special": False}}])
def test_tokens_that_only_the_configuration_declares(
    tmp_path: Path, extra: Any, by_id: dict[str, Any]
) -> None:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": {"__type": "AddedToken", "content": "<eot>", "lstrip": True, "normalized": False},
        "pad_token": EOS,
        "image_token": "<image>",
        "extra_special_tokens": extra,
        "added_tokens_decoder": by_id,
    }
    files = tokenizer_files(None) | {"tokenizer_config.json": json.dumps(config).encode()}
    codec, peer = TextCodec.from_files(files), _peer(tmp_path, files)
    tokens = codec.encode("a <eot>b<tool> c<image> d</s>")
    assert tokens == peer.encode("a <eot>b<tool> c<image> d</s>")
    assert codec.decode(tokens) == peer.decode(tokens, skip_special_tokens=True)
    assert (codec.eos_token, codec.eos_token_id) == ("<eot>", peer.eos_token_id)
    assert {name: codec.special_tokens[name] for name in ("eos_token", "pad_token", "image_token")} == {
        name: peer.special_tokens_map[name] for name in ("eos_token", "pad_token", "image_token")
    }


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"tokenizer_config.json": b"{}"}, "tokenizer.json is missing"),
        ({"tokenizer.json": b"{"}, "tokenizer.json cannot be read"),
        ({"tokenizer.json": None, "tokenizer_config.json": b"nonsense"}, "tokenizer_config.json is not JSON"),
        ({"tokenizer.json": None, "tokenizer_config.json": b"[1]"}, "tokenizer_config.json holds a list"),
        ({"tokenizer.json": None, "chat_template.jinja": b"\xff"}, "chat_template.jinja is not UTF-8"),
    ],
)
def test_unreadable_files_are_named(files: dict[str, bytes | None], says: str) -> None:
    good = tokenizer_files()
    with pytest.raises(ValueError, match=says):
        TextCodec.from_files({name: data if data is not None else good[name] for name, data in files.items()})


# ---------------------------------------------------------------------------- chat templates

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello"}],
    [
        {"role": "system", "content": "  Be brief. "},
        {"role": "user", "content": "<b>&amp;</b> 漢字\n\n{{ 7 * 7 }}"},
        {"role": "assistant", "content": "49?", "name": None},
        {"role": "user", "content": "🎉"},
    ],
]

LOOPS = """
{% for message in messages %}
{% if message.role == "system" %}{% continue %}{% endif %}
    {% if loop.index > 3 %}
        {% break %}
    {% endif %}
{{ message | tojson(indent=2) }}
{% generation %}{% set inner = 1 %}{{ message["content"] }}{% endgeneration %}
{% set ns = namespace(seen=true) %}{{ ns.seen }} {{ inner is defined }} {{ tools is none }} {{ dict(a=1) }}
{% endfor %}
{{ strftime_now("%Y") | length }}{{ eos_token }}{{ mood | default("calm") }}
"""


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("source", [CHAT_TEMPLATE, LOOPS])
@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False, "mood": "glad"}])
def test_render_chat_is_transformers(
    tmp_path: Path, messages: list[dict[str, Any]], source: str, generate: bool, variables: dict[str, Any]
) -> None:
    files = tokenizer_files(source)
    codec, peer = TextCodec.from_files(files), _peer(tmp_path, files)
    ours = codec.render_chat(messages, add_generation_prompt=generate, variables=variables)
    theirs = peer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate, **variables)
    assert ours == theirs
    tokens = peer.apply_chat_template(
        messages, add_generation_prompt=generate, return_dict=False, **variables
    )
    assert codec.encode(ours, add_special_tokens=False) == tokens


@pytest.mark.parametrize(
    "files",
    [
        {"chat_template.json": json.dumps({"chat_template": "T{{ messages | length }}"}).encode()},
        {"tokenizer_config.json": json.dumps({"chat_template": "T{{ messages | length }}"}).encode()},
        {
            "tokenizer_config.json": json.dumps(
                {
                    "chat_template": [
                        {"name": "tool_use", "template": "no"},
                        {"name": "default", "template": "T{{ messages | length }}"},
                    ]
                }
            ).encode()
        },
        {
            "chat_template.jinja": b"T{{ messages | length }}",
            "tokenizer_config.json": json.dumps({"chat_template": "no"}).encode(),
        },
    ],
)
def test_where_a_template_is_found(files: dict[str, bytes]) -> None:
    codec = TextCodec.from_files({"tokenizer.json": tokenizer_files()["tokenizer.json"]} | files)
    assert codec.has_chat_template
    assert codec.render_chat([{"role": "user", "content": "x"}]) == "T1"


def test_without_a_template_the_other_route_is_named() -> None:
    codec = TextCodec.from_files(tokenizer_files(None))
    assert not codec.has_chat_template
    with pytest.raises(BadRequest, match="/v1/completions"):
        codec.render_chat([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{% for %}", "cannot be compiled"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{{ raise_exception('only users here') }}", "only users here"),
        ("{{ messages[0].content + 1 }}", "does not accept these messages"),
        ("{% include 'etc' %}", "does not accept|cannot be compiled"),
        ("{% for i in range(1000000) %}x{% endfor %}", "[Rr]ange too big"),
    ],
)
def test_templates_are_programs_in_a_sandbox(source: str, says: str) -> None:
    codec = TextCodec.from_files(tokenizer_files(source))
    with pytest.raises(BadRequest, match=says):
        codec.render_chat([{"role": "user", "content": "x"}])


def test_templates_cannot_write_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    source = "{% for i in range(9999) %}{{ messages[0].content }}{% endfor %}"
    codec = TextCodec.from_files(tokenizer_files(source))
    messages = [{"role": "user", "content": "x" * 10}]
    assert len(codec.render_chat(messages)) == 99_990
    monkeypatch.setattr(template, "MAX_CHARACTERS", 90_000)
    with pytest.raises(BadRequest, match="more than 90000 characters"):
        codec.render_chat(messages)
    monkeypatch.setattr(template, "MAX_CHARACTERS", 10**9)
    monkeypatch.setattr(template, "MAX_SECONDS", 0.0)
    with pytest.raises(BadRequest, match="longer than 0 seconds"):
        codec.render_chat(messages)


def test_variables_cannot_replace_the_request() -> None:
    codec = TextCodec.from_files(tokenizer_files())
    with pytest.raises(BadRequest, match="messages") as caught:
        codec.render_chat([{"role": "user", "content": "x"}], variables={"messages": []})
    assert caught.value.param == "chat_template_kwargs"
