"""The LaMamba-Diff network and its layers, as nn.Modules."""
