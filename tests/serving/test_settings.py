"""Settings: which source wins, what is refused and in which words, what is never shown."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from serving.settings import Settings, SettingsError, is_loopback, load_settings


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("VBSERVE_"):
            monkeypatch.delenv(name)


@pytest.fixture
def yaml_file(tmp_path: Path) -> Path:
    path = tmp_path / "vbserve.yaml"
    path.write_text("port: 1\nmax_num_seqs: 1\nmax_waiting: 1\nkv_cache_bytes: 1GiB\n")
    return path


def test_a_flag_wins_over_a_variable_over_the_file_over_the_default(
    yaml_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VBSERVE_PORT", "2")
    monkeypatch.setenv("VBSERVE_MAX_NUM_SEQS", "2")
    settings = load_settings({"port": "3"}, yaml_file)
    assert (settings.port, settings.max_num_seqs, settings.max_waiting) == (3, 2, 1)
    assert settings.max_waiting_per_adapter == Settings().max_waiting_per_adapter
    assert settings.kv_cache_bytes == 2**30


def test_the_file_may_be_named_by_a_variable_and_a_flag_names_another(
    yaml_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VBSERVE_CONFIG", str(yaml_file))
    assert load_settings({}).port == 1
    other = tmp_path / "other.yaml"
    other.write_text("port: 7")
    assert load_settings({}, other).port == 7


def test_an_empty_variable_and_an_empty_file_say_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VBSERVE_MODEL", "")
    empty = tmp_path / "empty.yaml"
    empty.touch()
    assert load_settings({}, empty) == Settings()


def test_keys_are_lists_everywhere_and_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VBSERVE_API_KEYS", "first-secret, second-secret")
    file = tmp_path / "keys.yaml"
    file.write_text("admin_keys: [third-secret]")
    settings = load_settings({}, file)
    keys = [key.get_secret_value() for key in (*settings.api_keys, *settings.admin_keys)]
    assert keys == ["first-secret", "second-secret", "third-secret"]
    assert "secret" not in (str(settings) + repr(settings) + settings.model_dump_json())
    with pytest.raises(SettingsError) as error:
        load_settings({"api_keys": "tiny", "admin_keys": ["hunter2"]})
    assert "api_keys: a key must have at least 8 characters" in str(error.value)
    assert "tiny" not in str(error.value)
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"port": "http"}, r"port: .*\(got 'http'\)"),
        ({"port": 0}, "port: .*greater than or equal to 1"),
        ({"device": "tpu"}, "device: .*'auto', 'cpu' or 'cuda'"),
        ({"kv_cache_bytes": "2 Gibs"}, "kv_cache_bytes: could not interpret byte unit"),
        ({"kv_cache_bytes": 0}, "kv_cache_bytes: .*greater than or equal to 1"),
        ({"num_engine_replicas": 0}, "num_engine_replicas"),
        ({"quantize": "int4"}, "quantize: .*'none', 'int8' or 'int8-weights'"),
        ({"vertical": "both"}, "vertical: .*'factored' or 'expanded'"),
        ({"quantize": "int8", "device": "cuda"}, "quantize int8 runs on the CPU .* device cuda"),
        ({"quantize": "int8-weights", "dtype": "float16"}, "quantize int8-weights .* float16"),
        ({"port": "x", "dtype": "int4"}, "port: (?s:.*)dtype: "),
    ],
)
def test_a_bad_value_is_refused_by_name(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_settings(flags)


def test_an_unknown_variable_is_refused_with_the_nearest_right_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VBSERVE_API_KEY", "looks-protected")
    with pytest.raises(SettingsError, match=r"VBSERVE_API_KEY is unknown.*VBSERVE_API_KEYS\?"):
        load_settings({})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_num_seq: 3", r"setting max_num_seq is unknown; did you mean max_num_seqs\?"),
        ("- port", "is not a YAML mapping"),
        ("port: [", "is not YAML"),
        ("1: 2", "is not a YAML mapping"),
        ("just words", "is not a YAML mapping"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=message):
        load_settings({}, file)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere\.yaml does not exist"):
        load_settings({}, tmp_path / "nowhere.yaml")


KEYS = {"api_keys": "inference-key", "admin_keys": "management-key"}


@pytest.mark.parametrize(
    ("flags", "refused"),
    [
        ({"host": "0.0.0.0"}, "api_keys and admin_keys"),
        ({"host": "::"}, "api_keys and admin_keys"),
        ({"host": "192.0.2.7"}, "api_keys and admin_keys"),
        ({"host": "server.example"}, "api_keys and admin_keys"),
        ({"host": "0.0.0.0", "api_keys": KEYS["api_keys"]}, "set admin_keys"),
        ({"host": "0.0.0.0", "admin_keys": KEYS["admin_keys"]}, "set api_keys"),
        ({"host": "0.0.0.0", **KEYS}, None),
        ({"host": "0.0.0.0", "allow_public": True}, None),
        ({"host": "127.0.0.1"}, None),
        ({"host": "127.8.8.8"}, None),
        ({"host": "::1"}, None),
        ({"host": "localhost"}, None),
    ],
)
def test_only_this_machine_is_served_without_keys(
    flags: dict[str, Any], refused: str | None
) -> None:
    if refused is None:
        assert load_settings(flags).host == flags["host"]
    else:
        with pytest.raises(SettingsError, match=refused):
            load_settings(flags)


@given(st.ip_addresses())
def test_loopback_is_what_the_address_says(address: Any) -> None:
    assert is_loopback(str(address)) == address.is_loopback


def test_settings_are_frozen_and_travel_by_pickle() -> None:
    settings = load_settings({"model": "~/model", "preload": "relative", **KEYS})
    with pytest.raises(ValidationError):
        settings.port = 1
    assert pickle.loads(pickle.dumps(settings)) == settings
    assert settings.model == Path.home() / "model"
    assert settings.preload == Path.cwd() / "relative"
