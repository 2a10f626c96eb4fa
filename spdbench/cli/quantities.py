"""Durations, sizes and shares as people write them: `20m`, `1h30m`, `8GB`, `5%`. Knows words and numbers only."""

from __future__ import annotations

import re
from typing import Any

import click

SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0}
BYTES = {"": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


class Duration(click.ParamType[float]):
    """Seconds from `90s`, `20m`, `1h30m`; more than none."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        parts = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", str(value).strip())
        found = parts.groups() if parts else ()
        seconds = sum(float(n or 0) * unit for n, unit in zip(found, SECONDS.values(), strict=False))
        if not seconds:
            self.fail(f"{value!r} is not a duration; write 90s, 20m or 1h30m", param, ctx)
        return seconds


class Size(click.ParamType[int]):
    """Bytes from `0`, `500MB`, `8GB`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        parts = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B)?", str(value).strip(), re.IGNORECASE)
        if not parts:
            self.fail(f"{value!r} is not a size; write 0, 500MB or 8GB", param, ctx)
        return int(float(parts[1]) * BYTES[(parts[2] or "").upper()])


class Percent(click.ParamType[float]):
    """A share from `5%`, `0.5%`; less than all."""

    name = "percent"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        parts = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", str(value).strip())
        if not parts or float(parts[1]) >= 100:
            self.fail(f"{value!r} is not a share from 0% to below 100%; write 5% or 0.5%", param, ctx)
        return float(parts[1]) / 100
