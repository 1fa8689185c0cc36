"""`batchllm models`: what is known by name, and fetching it."""

from typing import Annotated

import typer

from batchllm.exit_codes import errors_as_exit_codes

models_app = typer.Typer(help="Models that are known by name: list them, pull them.")


@models_app.callback(invoke_without_command=True)
def models(context: typer.Context) -> None:
    """List the models known by name, and where they are."""
    if context.invoked_subcommand is not None:
        return
    with errors_as_exit_codes("interrupted"):
        from batchllm.models.locate import installed
        from batchllm.models.shapes import CONFIGS

        for known in installed():
            where = "not pulled yet" if known.path is None else str(known.path)
            default = " (default)" if known.is_default else ""
            typer.echo(f"{known.name}{default}: {where}")
        typer.echo("fake: no model; answers are noise, at no cost, for trying out a job")
        typer.echo(f"--load-format dummy --model-shape: {', '.join(CONFIGS)}; random weights")


@models_app.command()
def pull(
    name: Annotated[
        str | None, typer.Argument(help="A name or hub id. [default: built in]")
    ] = None,
) -> None:
    """Fetch a model into the cache, so that runs need no network."""
    with errors_as_exit_codes("interrupted"):
        from batchllm.models.locate import resolve

        typer.echo(resolve(name))
