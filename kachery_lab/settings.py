"""One table of settings, read once; nothing else in the project reads the environment.

`KACHERY_STORAGE_DIR` and `KACHERY_DAEMON_PORT` mean what they meant for the older daemon. All others start with
`KACHERY_LAB_`. A secret `NAME` may be given as a file by `NAME_FILE`. Command-line flags beat the environment, the
environment beats the defaults.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from kachery_lab.core.ids import ChannelName, NodeLabel, UserName
from kachery_lab.errors import InvalidInput, StartRefused

PREFIX = "KACHERY_LAB_"
_OWN_NAMES = {"storage_dir": "KACHERY_STORAGE_DIR", "port": "KACHERY_DAEMON_PORT"}
_UNITS = {"": 1, "B": 1}
for _i, _letter in enumerate("KMGTP", start=1):
    _UNITS[f"{_letter}B"] = 1000**_i
    _UNITS[f"{_letter}IB"] = 1024**_i


def parse_size(value: object) -> int:
    """Bytes from `500GB`, `2TiB` or a plain number. Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value), re.ASCII)
    if match is None or match.group(2).upper() not in _UNITS:
        raise ValueError(f"{value!r} is no size: expected a number of bytes, or one like 500GB or 2TiB")
    return int(float(match.group(1)) * _UNITS[match.group(2).upper()])


def _split(separator: str) -> BeforeValidator:
    def split(value: object) -> object:
        return [part for part in value.split(separator) if part] if isinstance(value, str) else value

    return BeforeValidator(split)


def _path_map(value: object) -> object:
    if not isinstance(value, str):
        return value
    pairs = [pair.partition("=") for pair in value.split(",") if pair]
    for host, sign, container in pairs:
        if not sign or not host.startswith("/") or not container.startswith("/"):
            raise ValueError(f"{value!r}: expected host=container pairs of absolute paths, separated by commas")
    return {host.rstrip("/"): container.rstrip("/") for host, _, container in pairs}


def _resource_dirs(value: tuple[str, ...]) -> tuple[str, ...]:
    for pair in value:
        zone, sign, directory = pair.partition("=")
        if not sign or not directory.startswith("/"):
            raise ValueError(f"{pair!r}: expected zone=/absolute/directory pairs, separated by commas")
        _as_value_error(ChannelName.parse, zone)
    return value


Names = Annotated[tuple[str, ...], NoDecode, _split(",")]
Paths = Annotated[tuple[Path, ...], NoDecode, _split(":")]
Size = Annotated[int, BeforeValidator(parse_size), Field(ge=0)]


class Settings(BaseSettings):
    """Effective settings of one node. Every field's description is its documentation."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore", frozen=True, validate_default=True)

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    storage_dir: Path = Field(
        default=Path("~/kachery-storage"),
        validation_alias=_OWN_NAMES["storage_dir"],
        description="Directory on the attached storage that holds blobs, links, feeds and records",
    )
    port: int = Field(
        default=20431, ge=0, le=65535, validation_alias=_OWN_NAMES["port"], description="TCP port of the server"
    )
    bind: Names = Field(default=("127.0.0.1", "::1"), description="Addresses to listen on, separated by commas")
    metadata_dir: Path | None = Field(
        default=None,
        description="Directory on a local disk for the database; default `<storage>/.kachery-lab` where that is local",
    )
    allow_network_metadata: bool = Field(
        default=False, description="Keep the database on a network file system all the same; risks losing it"
    )
    node_key_file: Path | None = Field(default=None, description="Private key of the node; default `private.pem`")
    label: str | None = Field(default=None, description="Name of this node, at most 20 letters, digits, `@`, `-`, `.`")
    owner: str | None = Field(default=None, description="User who owns this node")
    auth_group: str | None = Field(
        default=None, description="Group (name or number) whose members may use this node; it gets `client-auth`"
    )
    public_url: str | None = Field(default=None, description="URL under which clients reach this server")
    hub_url: str | None = Field(default=None, description="Another server whose channels this node joins")
    legacy_nodes: bool = Field(default=True, description="Whether nodes of 2021 may use this hub")
    task_lease_seconds: float = Field(
        default=30.0,
        ge=1,
        description="Seconds after which a task goes to another backend when nothing is heard of its own",
    )
    audit_days: Annotated[int, Field(gt=0)] = Field(default=365, description="Days that audit entries are kept")
    restore_days: Annotated[int, Field(gt=0)] = Field(
        default=30, description="Days in which the deletion of a channel's object can be undone"
    )
    check_work_tokens: bool = Field(
        default=False, description="Whether kachery 2 clients must have solved their puzzle"
    )
    trusted_proxies: Names = Field(default=(), description="Addresses of proxies whose forwarded headers count")
    server: str | None = Field(default=None, description="URL of the server that commands talk to; default: this node")
    token: SecretStr | None = Field(default=None, description="Token that commands send to `server`")
    admin_token: SecretStr | None = Field(default=None, description="First admin token; otherwise one is made")
    advertised_storage_dir: Path | None = Field(
        default=None, description="Where clients see the storage directory, when it is mounted elsewhere for them"
    )
    link_roots: Paths = Field(default=(), description="Directories below which any file may be linked, `:`-separated")
    path_map: Annotated[dict[str, str], NoDecode, BeforeValidator(_path_map)] = Field(
        default={}, description="`host=container` pairs that turn the paths clients send into paths of the server"
    )
    resource_dirs: Annotated[Names, AfterValidator(_resource_dirs)] = Field(
        default=(), description="`zone=directory` pairs: older kachery directories whose files a zone offers on demand"
    )
    figurl_port: int = Field(
        default=0, ge=0, le=65535, description="TCP port that figurl looks for on a person's machine, 61442; 0: none"
    )
    figurl_bind: Names = Field(default=("127.0.0.1", "::1"), description="Addresses of that port")
    figurl_user: str | None = Field(
        default=None, description="User whose roles in the zone `default` that port has for everybody who reaches it"
    )
    figurl_origins: Names = Field(
        default=("https://figurl.org", "https://www.figurl.org"), description="Browser origins that may use that port"
    )
    min_free: Size = Field(default=0, description="Bytes that stay free on the storage; below, uploads get 507")
    max_connections: int = Field(
        default=2000,
        ge=1,
        le=100_000,
        description="Connections open at once; more get 503. Each needs two open files of the process's limit",
    )
    max_uploads: Annotated[int, Field(gt=0)] = Field(
        default=200, description="Uploads that one caller may have under way; more get 429"
    )
    max_appends: Annotated[int, Field(gt=0)] = Field(
        default=200, description="Appends to feeds that one caller may have under way; more get 429"
    )
    tickets_per_second: Annotated[int, Field(gt=0)] = Field(
        default=1000, description="Upload URLs that one caller gets in the long run, a hundred times as many at once"
    )
    max_json: Annotated[Size, Field(gt=0)] = Field(default=100_000_000, description="Largest JSON request body")
    max_json_total: Size = Field(default=256_000_000, description="JSON bodies in memory at once; the rest wait")
    disk_deadline: float = Field(default=30.0, gt=0, description="Seconds that one disk operation may take")
    allowed_hosts: Names = Field(default=(), description="Further names under which this server may be addressed")
    cors_origins: Names = Field(
        default=("http://localhost:3000",), description="Browser origins that may use this server, or `*`"
    )
    allow_halt: bool = Field(default=True, description="Whether `/halt` stops the server")
    log_format: Literal["json", "console"] = Field(default="console", description="Form of the log: json or console")
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="Least level logged")

    @field_validator("storage_dir", "metadata_dir", "node_key_file", mode="after")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return None if value is None else Path(os.path.abspath(value.expanduser()))

    @field_validator("public_url", "hub_url", mode="after")
    @classmethod
    def _url(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parts = urlsplit(value)
        plain = parts.scheme in ("http", "https") and parts.hostname and not set(value) & set("?#@\\ ")
        if not plain or (parts.port is not None and not parts.port):
            raise ValueError(f"{value!r}: expected http:// or https://, a name, and at most a port and a path")
        return value.rstrip("/")

    @field_validator("figurl_origins", mode="after")
    @classmethod
    def _listed(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if not re.fullmatch(r"https?://[A-Za-z0-9.\[\]:-]+", origin):
                raise ValueError(f"{origin!r}: expected origins like https://figurl.org, each by name")
        return value

    @field_validator("trusted_proxies", mode="after")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for proxy in value:
            ipaddress.ip_network(proxy, strict=False)
        return value

    @field_validator("server", mode="after")
    @classmethod
    def _server(cls, value: str | None) -> str | None:
        if value is None or re.fullmatch(r"https?://[^/\s?#@]+(/[^\s?#]*)?", value):
            return value
        raise ValueError("expected a URL that begins with http:// or https://")

    @property
    def resources(self) -> dict[str, list[Path]]:
        """The resource directories of each zone."""
        found: dict[str, list[Path]] = {}
        for pair in self.resource_dirs:
            zone, _, directory = pair.partition("=")
            found.setdefault(zone, []).append(Path(os.path.abspath(directory)))
        return found

    @field_validator("label", mode="after")
    @classmethod
    def _label(cls, value: str | None) -> str | None:
        return None if value is None else _as_value_error(NodeLabel.parse, value)

    @field_validator("owner", "figurl_user", mode="after")
    @classmethod
    def _owner(cls, value: str | None) -> str | None:
        return None if value is None else _as_value_error(UserName.parse, value)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then environment, then `NAME_FILE`; no dotenv file, no secrets directory."""
        return (init_settings, env_settings, _SecretFiles(settings_cls))

    def origin(self, field: str) -> str:
        """Where the value of a field came from: `flag`, the variable's name, `default`, or what `with_value` says."""
        return self._origins.get(field, "default")

    def with_value(self, field: str, value: object, origin: str) -> Settings:
        """These settings with a value that the program chose for one field; `origin` says why."""
        changed = self.model_copy(update={field: value})
        changed._origins = {**self._origins, field: origin}
        return changed

    @property
    def advertised(self) -> Path:
        """The storage directory as clients see it."""
        return self.advertised_storage_dir or self.storage_dir


def _as_value_error(parse: Any, value: str) -> str:
    try:
        return str(parse(value))
    except InvalidInput as error:
        raise ValueError(error.message) from error


def variable(field: str) -> str:
    """The environment variable of a settings field."""
    return _OWN_NAMES.get(field, PREFIX + field.upper())


def is_secret(field: str) -> bool:
    """Whether the value of a field is masked wherever it is shown."""
    return Settings.model_fields[field].annotation == SecretStr | None


def secret_files(settings: Settings) -> list[Path]:
    """Files outside storage and metadata that hold secrets: the node key's own place, and each `NAME_FILE`."""
    named = [os.environ.get(variable(field) + "_FILE") for field in Settings.model_fields if is_secret(field)]
    found = [Path(os.path.abspath(name)) for name in named if name]
    return found if settings.node_key_file is None else [*found, settings.node_key_file]


class _SecretFiles(PydanticBaseSettingsSource):
    """`NAME_FILE` for each secret `NAME`: the file's text without the newline at its end."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        path = os.environ.get(variable(field_name) + "_FILE") if is_secret(field_name) else None
        if path is None:
            return None, field_name, False
        try:
            return Path(path).read_text(encoding="utf-8").rstrip("\r\n"), field_name, False
        except OSError as error:
            raise ValueError(f"{variable(field_name)}_FILE={path}: {error.strerror}") from error

    def __call__(self) -> dict[str, Any]:
        found = {name: self.get_field_value(None, name)[0] for name in self.settings_cls.model_fields}
        return {name: value for name, value in found.items() if value is not None}


def load_settings(flags: Mapping[str, object] | None = None) -> Settings:
    """The effective settings. Raises StartRefused naming each variable that is wrong and what was expected."""
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    # An alias replaces the field's name in pydantic's input, so flags for aliased fields go in under the alias.
    renamed = {_OWN_NAMES.get(key, key): value for key, value in given.items()}
    try:
        settings = Settings(**renamed)  # type: ignore[arg-type]
    except ValidationError as error:
        problems = [
            f"{variable(str(e['loc'][0]).lower()) if str(e['loc'][0]).islower() else e['loc'][0]}: {e['msg']}"
            for e in error.errors(include_input=False, include_url=False)
        ]
        raise StartRefused("settings: " + "; ".join(problems), hint="See `kachery-lab config --help`") from None
    except Exception as error:
        raise StartRefused(f"settings: {error}") from error

    settings._origins.update({name: _origin(name, given) for name in Settings.model_fields})
    return settings


def _origin(field: str, flags: Mapping[str, object]) -> str:
    if field in flags:
        return "flag"
    name = variable(field)
    if name in os.environ:
        return name
    if is_secret(field) and f"{name}_FILE" in os.environ:
        return f"{name}_FILE"
    return "default"


def shown(settings: Settings, field: str) -> str:
    """The value of a field as its variable would be written; secrets are masked, nothing is empty."""
    value = getattr(settings, field)
    if value is None:
        return ""
    if is_secret(field):
        return "********"
    if isinstance(value, tuple):
        return (":" if value and isinstance(value[0], Path) else ",").join(str(part) for part in value)
    if isinstance(value, dict):
        return ",".join(f"{host}={container}" for host, container in value.items())
    return str(value).lower() if isinstance(value, bool) else str(value)
