"""Where setup.py puts the compiled CPU kernels; lamamba.ops.native loads them from here."""
