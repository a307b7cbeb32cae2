"""Options of `lamamba.doctor`: none yet."""

from __future__ import annotations

from lamamba.options.base import options


@options
class DoctorOptions:
    """What to look at: everything."""
