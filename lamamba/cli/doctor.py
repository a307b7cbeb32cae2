"""Print versions, the back end that each op will use on each device and why, and what is missing; then
check every back end that runs here, forward and every gradient, against the plain recurrence in float64, and the
layers that are chosen here against their formulas.

The exit status is 1 when a check fails."""

from __future__ import annotations

import json

from lamamba.cli.parse import parse
from lamamba.options.base import options
from lamamba.options.doctor import DoctorOptions


@options
class DoctorArguments(DoctorOptions):
    json: bool = False
    """Print JSON instead of text."""


def main(arguments: list[str]) -> int:
    chosen = parse(DoctorArguments, arguments, "doctor", __doc__)

    from lamamba.api.doctor import doctor

    result = doctor(chosen)
    print(json.dumps(result.to_dict(), indent=2) if chosen.json else result)
    return 0 if result.healthy else 1
