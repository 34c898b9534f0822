"""`vbserve serve`: an option per setting, in groups; see `serving.settings` for what they mean."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import click
from pydantic import ByteSize, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from serving.cli.errors import told_plainly
from serving.cluster.launch_checks import LaunchError, check_port_is_free
from serving.settings import (
    CONFIG_VARIABLE,
    ENV_PREFIX,
    Settings,
    SettingsError,
    load_settings,
)

GROUPS = {
    "What is served": ("model", "model_name", "adapters", "preload"),
    "Where": ("host", "port", "allow_public", "api_keys", "admin_keys"),
    "Adapters": (
        "max_upload_bytes",
        "allowed_source_root",
        "factor_cache_bytes",
        "compact_cache_bytes",
    ),
    "Engine": (
        "device",
        "dtype",
        "quantize",
        "vertical",
        "kv_cache_bytes",
        "max_model_len",
        "max_num_seqs",
        "max_num_batched_tokens",
        "max_waiting",
        "max_waiting_per_adapter",
        "num_threads",
    ),
    "Ray": ("num_engine_replicas", "num_ingress_replicas", "ray_address"),
    "Observing": ("adapter_label_cap", "log_level"),
}


class GroupedCommand(click.Command):
    """Lists options under the headings of `GROUPS`."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section per group, then the rest."""
        records = {
            param.name: record
            for param in self.get_params(ctx)
            if (record := param.get_help_record(ctx))
        }
        for title, names in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([records.pop(name) for name in names])
        with formatter.section("Other"):
            formatter.write_dl(list(records.values()))


def setting_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add an option per setting; only those that are given reach the command."""
    for names in reversed(GROUPS.values()):
        for name in reversed(names):
            command = _option(name, Settings.model_fields[name])(command)
    return command


def _option(name: str, info: FieldInfo) -> Callable[[Callable[..., None]], Callable[..., None]]:
    flag = "--" + name.replace("_", "-")
    if info.annotation is bool:
        return click.option(flag, name, is_flag=True, default=None, help=_help(info))
    return click.option(flag, name, metavar=_metavar(info.annotation), help=_help(info))


def _help(info: FieldInfo) -> str:
    default = info.default
    is_told = default not in (None, (), PydanticUndefined, False) and "efault" not in (
        info.description or ""
    )
    if isinstance(default, ByteSize):
        return f"{info.description}  [default: {default.human_readable()}]"
    return f"{info.description}  [default: {default}]" if is_told else info.description or ""


def _metavar(annotation: Any) -> str:
    """What to write after the flag: the choices, or the kind of value."""
    kinds = [kind for kind in _plain_types(annotation) if kind is not type(None)]
    if all(isinstance(kind, str) for kind in kinds):
        return "|".join(kinds)
    names = {int: "N", ByteSize: "BYTES", str: "TEXT", Path: "PATH", SecretStr: "KEY,…"}
    return next(names[kind] for kind in kinds if kind in names)


def _plain_types(annotation: Any) -> list[Any]:
    """The classes, and the values of Literals, that an annotation is made of."""
    parts = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return _plain_types(parts[0])
    if not parts:
        return [annotation]
    return [kind for part in parts for kind in _plain_types(part)]


@click.command(
    cls=GroupedCommand,
    epilog=f"Each option is also a variable ({ENV_PREFIX}MAX_NUM_SEQS) and a key of the YAML file "
    "(max_num_seqs); an option wins over a variable, a variable over the file. Bytes may be "
    "written as 2GiB.",
)
@setting_options
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    help=f"YAML file with settings.  [env: {CONFIG_VARIABLE}]",
)
def serve(config_file: Path | None, **given: Any) -> None:
    """Start a server on this machine, and stop all of it on Ctrl-C.

    Without options: SmolLM2-135M-Instruct and its demo adapters on http://127.0.0.1:8000. The first
    start fetches and converts the base.
    """
    flags = {name: value for name, value in given.items() if value is not None}
    try:
        settings = load_settings(flags, config_file)
    except SettingsError as error:
        raise click.UsageError(str(error)) from None
    with told_plainly(LaunchError):
        check_port_is_free(settings.host, settings.port)

    from rich.console import Console  # what is heavier waits until all that is light is right

    from serving.cluster.launch import serve_forever

    with told_plainly(LaunchError):
        serve_forever(settings, Console())
