"""Operators without parameters: the selective scan, the layers, and the choice of their back end."""

from lamamba.ops.dispatch import use_backend
from lamamba.ops.scan_paths import inverse_paths, scan_paths
from lamamba.ops.selective_scan import selective_scan

__all__ = ["inverse_paths", "scan_paths", "selective_scan", "use_backend"]
