"""`spdbench suites`: what ships, from the suite files alone; no source is touched."""

from __future__ import annotations

import json
from dataclasses import asdict

import click


@click.command("suites", short_help="List the suites that come with spdbench.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """List the suites that come with spdbench, and where each takes its prompts from.

    The sources are tried in order, and the first that is there is used; a path is looked up below --data.
    """
    from spdbench.prompts.suite import SuiteListing, list_suites

    def text(suite: SuiteListing) -> str:
        count = "" if suite.num_prompts is None else f"  ({suite.num_prompts} prompts)"
        about = click.wrap_text(suite.description, 80, initial_indent="    ", subsequent_indent="    ")
        sources = (click.wrap_text(f"from {source}", 80, "    ", "      ") for source in suite.sources)
        return "\n".join([f"{suite.name}{count}", about, *sources])

    suites = list_suites()
    click.echo(json.dumps([asdict(suite) for suite in suites], indent=2) if as_json else "\n".join(map(text, suites)))
