"""The command line: it parses, calls a function of lamamba.api, and prints. Nothing else in the project prints."""
