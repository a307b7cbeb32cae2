"""LAPTOP-Diff (arXiv 2404.11098): layer pruning by output loss, for LaMamba networks and diffusers U-Nets."""
