"""`el4ner plan`: will the models fit, before any of them is loaded?"""

from __future__ import annotations

from typing import Any

import click

from el4ner.cli_messages import need_stdout
from el4ner.cli_predict import batch_size_option, check_device, check_models, check_stdin, given, model_options
from el4ner.jsonl import json_text


@click.command()
@model_options
@batch_size_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def plan(config: str | None, as_json: bool, **options: Any) -> None:
    """Predict the memory that the members' models take, and whether they stay in memory together or take turns.

    Reads configurations and GGUF metadata; weights are not loaded, but of a GGUF file the checksum is computed. Members
    that share a source share its weights. Ends with 1 where not even the largest model fits alone.
    """
    need_stdout()
    from el4ner.config import load_config
    from el4ner.plan import make_plan, render_plan

    check_stdin((), config, options)
    settings = load_config(config, overrides=given(options))
    check_stdin((), config, settings)
    check_device(settings.device)
    check_models(settings)
    made = make_plan(settings)
    click.echo(json_text(made.to_dict()) if as_json else render_plan(made))
    if made.mode == "too large":
        raise click.exceptions.Exit(1)
