"""One frozen settings object: command-line flags > VBSERVE_* variables > YAML file > defaults.

Field names are the flags (`--max-num-seqs`), the variables (`VBSERVE_MAX_NUM_SEQS`) and the YAML
keys (`max_num_seqs`). A key or variable that names no field is an error. Knows nothing of Ray,
torch or HTTP; imports nothing heavier than pydantic.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ByteSize,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

ENV_PREFIX = "VBSERVE_"
CONFIG_VARIABLE = "VBSERVE_CONFIG"
CLIENT_URL_VARIABLE = "VBSERVE_CLIENT_URL"
CLIENT_KEY_VARIABLE = "VBSERVE_CLIENT_KEY"
_OTHER_VARIABLES = frozenset(
    {CONFIG_VARIABLE, CLIENT_URL_VARIABLE, CLIENT_KEY_VARIABLE, "VBSERVE_CACHE_DIR"}
)


class SettingsError(ValueError):
    """Settings that cannot be used; the message names each key and what would be right."""


def _split_commas(value: Any) -> Any:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()


def _check_keys(keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
    if any(len(key.get_secret_value()) < 8 for key in keys):
        raise ValueError("a key must have at least 8 characters")
    return keys


FilePath = Annotated[Path, AfterValidator(_absolute)]
Keys = Annotated[
    tuple[SecretStr, ...], NoDecode, BeforeValidator(_split_commas), AfterValidator(_check_keys)
]
Count = Annotated[int, Field(ge=1)]


class Settings(BaseSettings):
    """Everything that a server may be told. Use `load_settings` to build one."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix=ENV_PREFIX, protected_namespaces=()
    )

    model: FilePath | None = Field(
        None, description="Hugging Face folder of a Llama-family model. Default: SmolLM2-135M."
    )
    model_name: str | None = Field(
        None,
        min_length=1,
        description="Name of the base in requests. Default: the folder's name.",
    )
    adapters: FilePath | None = Field(
        None, description="Directory of registered adapters. Default: per base, in the user's data."
    )
    preload: Literal["demo", "none"] | FilePath = Field(
        "demo",
        union_mode="left_to_right",
        description="Directory of PEFT adapters to register at start; 'none', or 'demo': those "
        "that come with the default base.",
    )

    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on.")
    port: int = Field(8000, ge=1, le=65535, description="Port to listen on.")
    allow_public: bool = Field(
        False, description="Listen on more than this machine although no keys are set."
    )
    api_keys: Keys = Field((), description="Keys for inference, separated by commas.")
    admin_keys: Keys = Field((), description="Keys for adapter management, separated by commas.")
    max_upload_bytes: ByteSize = Field(
        ByteSize(64 * 2**20), ge=1, description="Largest adapter upload."
    )
    allowed_source_root: FilePath | None = Field(
        None, description="Directory from which adapters may be registered by path."
    )

    num_engine_replicas: Count = Field(1, description="Processes that hold the base.")
    num_ingress_replicas: Count = Field(1, description="Processes that speak HTTP.")
    ray_address: str | None = Field(
        None, description="Ray cluster to join. Default: a private one that ends with the server."
    )

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where the base runs.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Number format; auto is bfloat16 on cuda, float32 on the CPU."
    )
    quantize: Literal["none", "int8", "int8-weights"] = Field(
        "none",
        description="Round the base at load: int8 is fastest, int8-weights nearer to fp32's "
        "answers; on the CPU alone.",
    )
    vertical: Literal["factored", "expanded"] = Field(
        "factored",
        description="How a vertical base runs: over one matrix per chunk of layers, or each layer "
        "with its own.",
    )
    kv_cache_bytes: ByteSize | None = Field(
        None, ge=1, description="Memory of the KV cache. Default: 1GiB, on cuda most of the rest."
    )
    max_model_len: Count | None = Field(
        None, description="Longest prompt and completion in tokens. Default: the model's."
    )
    max_num_seqs: Count = Field(64, description="Sequences in one batch.")
    max_num_batched_tokens: Count | None = Field(
        None,
        description="Tokens of one step; a quarter for prompts while others wait for tokens. "
        "Default: 512, on cuda 2048.",
    )
    max_waiting: Count = Field(1024, description="Queued requests, then 429.")
    max_waiting_per_adapter: Count = Field(256, description="Queued requests of one adapter.")
    num_threads: Count | None = Field(
        None, description="CPU threads of one engine. Default: the cores, divided by engines."
    )
    factor_cache_bytes: ByteSize = Field(
        ByteSize(2**30), ge=1, description="Memory of rebuilt adapter factors."
    )
    compact_cache_bytes: ByteSize = Field(
        ByteSize(256 * 2**20), ge=1, description="Memory of compact adapters."
    )

    adapter_label_cap: int = Field(
        100, ge=0, description="Adapters with a label of their own in /metrics."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "warning", description="What the server's processes log."
    )

    @model_validator(mode="after")
    def _refuse_open_door(self) -> Settings:
        if is_loopback(self.host) or self.allow_public or (self.api_keys and self.admin_keys):
            return self
        missing = " and ".join(
            name for name in ("api_keys", "admin_keys") if not getattr(self, name)
        )
        raise ValueError(
            f"host {self.host} can be reached from other machines: set {missing}, "
            "or allow_public to serve anyone"
        )

    @model_validator(mode="after")
    def _refuse_quantize_elsewhere(self) -> Settings:
        elsewhere = self.device == "cuda" or self.dtype in ("bfloat16", "float16")
        if self.quantize != "none" and elsewhere:
            raise ValueError(
                f"quantize {self.quantize} runs on the CPU in float32, not with "
                f"device {self.device} and dtype {self.dtype}"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take values from arguments alone; `load_settings` reads the other sources."""
        return (init_settings,)


def load_settings(flags: Mapping[str, Any], config_file: Path | None = None) -> Settings:
    """Merge `flags` (those given), the environment and the YAML file into one checked object.

    `config_file` None takes the file that VBSERVE_CONFIG names, if any. Raises SettingsError.
    """
    _refuse_unknown(
        (name for name in os.environ if name.startswith(ENV_PREFIX)),
        {ENV_PREFIX + name.upper() for name in Settings.model_fields} | _OTHER_VARIABLES,
        "environment variable",
    )
    file = config_file or _path_or_none(os.environ.get(CONFIG_VARIABLE))
    values = {**_read_yaml(file), **EnvSettingsSource(Settings, env_ignore_empty=True)(), **flags}
    try:
        return Settings(**values)
    except ValidationError as error:
        raise SettingsError("\n".join(_messages(error))) from None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _path_or_none(text: str | None) -> Path | None:
    return Path(text) if text else None


def _read_yaml(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    if not file.is_file():
        raise SettingsError(f"settings file {file} does not exist")
    try:
        values: Any = yaml.safe_load(file.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file} is not YAML: {error}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise SettingsError(f"{file} is not a YAML mapping from settings to values")
    _refuse_unknown(values, set(Settings.model_fields), f"{file}: setting")
    return values


def _refuse_unknown(names: Iterable[str], known: set[str], what: str) -> None:
    for name in sorted(set(names) - known):
        near = difflib.get_close_matches(name, known, n=1, cutoff=0)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise SettingsError(f"{what} {name} is unknown{hint}")


def _messages(error: ValidationError) -> list[str]:
    """One line per problem; the value is told unless it may be a secret."""
    lines = []
    for problem in error.errors(include_url=False):
        name = str(problem["loc"][0]) if problem["loc"] else ""
        told = bool(name) and "keys" not in name and problem["type"] != "extra_forbidden"
        value = f" (got {problem['input']!r})" if told else ""
        message = problem["msg"].removeprefix("Value error, ")
        lines.append(f"{name}: {message}{value}" if name else message)
    return lines
