"""The one table of settings: what each form of a value means, where it comes from, and how a wrong one is told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kachery_lab.errors import StartRefused
from kachery_lab.settings import Settings, is_secret, load_settings, parse_size, variable


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("KACHERY_")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("17", 17),
        (" 17 B ", 17),
        ("1KB", 1000),
        ("1kib", 1024),
        ("500GB", 500 * 10**9),
        ("2TiB", 2 * 2**40),
        ("1.5 MB", 1_500_000),
        ("3PB", 3 * 10**15),
        (2048, 2048),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "1XB", "1 G B", "1e3", "ten", "1,5MB", "٣"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="no size"):
        parse_size(text)


def test_nothing_set():
    settings = load_settings()
    assert settings.storage_dir == Path.home() / "kachery-storage"
    assert settings.port == 20431
    assert settings.bind == ("127.0.0.1", "::1")
    assert settings.admin_token is None
    assert settings.path_map == {}
    assert settings.advertised == settings.storage_dir
    assert load_settings().origin("port") == "default"


def test_lists_and_maps(monkeypatch):
    monkeypatch.setenv("KACHERY_LAB_BIND", "0.0.0.0,::")
    monkeypatch.setenv("KACHERY_LAB_LINK_ROOTS", "/data:/mnt/more:")
    monkeypatch.setenv("KACHERY_LAB_ALLOWED_HOSTS", "lab.example,")
    monkeypatch.setenv("KACHERY_LAB_PATH_MAP", "/host/=/in/,/b=/c")
    monkeypatch.setenv("KACHERY_LAB_MIN_FREE", "1GiB")
    settings = load_settings()
    assert settings.bind == ("0.0.0.0", "::")
    assert settings.link_roots == (Path("/data"), Path("/mnt/more"))
    assert settings.allowed_hosts == ("lab.example",)
    assert settings.path_map == {"/host": "/in", "/b": "/c"}
    assert settings.min_free == 2**30


def test_flags_beat_the_environment_which_beats_the_default(monkeypatch):
    monkeypatch.setenv("KACHERY_DAEMON_PORT", "1111")
    monkeypatch.setenv("KACHERY_LAB_LABEL", "from-env")
    flags = {"port": 2222, "label": None, "owner": "ada"}
    settings = load_settings(flags)
    assert (settings.port, settings.label, settings.owner) == (2222, "from-env", "ada")
    assert [load_settings(flags).origin(name) for name in ("port", "label", "owner", "bind")] == [
        "flag",
        "KACHERY_LAB_LABEL",
        "flag",
        "default",
    ]


def test_a_value_that_the_program_chose_says_why(monkeypatch):
    monkeypatch.setenv("KACHERY_LAB_LABEL", "from-env")
    settings = load_settings()
    changed = settings.with_value("max_connections", 7, "a small machine")
    assert (changed.max_connections, changed.origin("max_connections")) == (7, "a small machine")
    assert (changed.label, changed.origin("label")) == ("from-env", "KACHERY_LAB_LABEL")
    assert (settings.max_connections, settings.origin("max_connections")) == (2000, "default")


def test_paths_are_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/ada")
    assert load_settings({"storage_dir": "here/../there"}).storage_dir == tmp_path / "there"
    assert load_settings({"storage_dir": "~/data"}).storage_dir == Path("/home/ada/data")
    assert load_settings({"storage_dir": "/a", "advertised_storage_dir": "/b"}).advertised == Path("/b")


def test_secrets_from_files(monkeypatch, tmp_path):
    path = tmp_path / "token"
    path.write_text("from a file\n")
    monkeypatch.setenv("KACHERY_LAB_ADMIN_TOKEN_FILE", str(path))
    token = load_settings().admin_token
    assert token is not None
    assert token.get_secret_value() == "from a file"
    assert load_settings().origin("admin_token") == "KACHERY_LAB_ADMIN_TOKEN_FILE"
    assert "from a file" not in repr(load_settings())
    monkeypatch.setenv("KACHERY_LAB_ADMIN_TOKEN", "named directly")
    token = load_settings().admin_token
    assert token is not None
    assert token.get_secret_value() == "named directly"
    monkeypatch.delenv("KACHERY_LAB_ADMIN_TOKEN")
    # Only secrets have that form, and a file that cannot be read is told, not ignored.
    monkeypatch.setenv("KACHERY_LAB_LABEL_FILE", str(path))
    assert load_settings().label is None
    path.unlink()
    with pytest.raises(StartRefused, match="KACHERY_LAB_ADMIN_TOKEN_FILE"):
        load_settings()


def test_which_are_secret():
    assert [name for name in Settings.model_fields if is_secret(name)] == ["token", "admin_token"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("KACHERY_DAEMON_PORT", "70000"),
        ("KACHERY_DAEMON_PORT", "-1"),
        ("KACHERY_DAEMON_PORT", ""),
        ("KACHERY_LAB_MAX_JSON", "-1"),
        ("KACHERY_LAB_MIN_FREE", "lots"),
        ("KACHERY_LAB_LABEL", "a label"),
        ("KACHERY_LAB_LABEL", "x" * 21),
        ("KACHERY_LAB_OWNER", "a/b"),
        ("KACHERY_LAB_PATH_MAP", "relative=/x"),
        ("KACHERY_LAB_PATH_MAP", "/a"),
        ("KACHERY_LAB_LOG_FORMAT", "xml"),
        ("KACHERY_LAB_LOG_LEVEL", "loud"),
        ("KACHERY_LAB_ALLOW_HALT", "perhaps"),
        ("KACHERY_LAB_DISK_DEADLINE", "0"),
        ("KACHERY_LAB_MAX_CONNECTIONS", "0"),
        ("KACHERY_LAB_MAX_CONNECTIONS", "100001"),
        ("KACHERY_LAB_MAX_CONNECTIONS", "2 thousand"),
    ],
)
def test_a_wrong_value_names_its_variable(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(StartRefused) as caught:
        load_settings()
    assert name in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_all_wrong_values_are_told_at_once(monkeypatch):
    monkeypatch.setenv("KACHERY_DAEMON_PORT", "x")
    monkeypatch.setenv("KACHERY_LAB_MIN_FREE", "y")
    with pytest.raises(StartRefused) as caught:
        load_settings({"log_format": "z"})
    for name in ("KACHERY_DAEMON_PORT", "KACHERY_LAB_MIN_FREE", "KACHERY_LAB_LOG_FORMAT"):
        assert name in caught.value.message


def test_every_field_has_a_variable_and_a_description():
    names = {variable(field) for field in Settings.model_fields}
    assert len(names) == len(Settings.model_fields)
    for field, info in Settings.model_fields.items():
        assert info.description, field
    assert {name for name in names if not name.startswith("KACHERY_LAB_")} == {
        "KACHERY_STORAGE_DIR",
        "KACHERY_DAEMON_PORT",
    }
