"""The command line: it parses, joins the rooms below, and prints. Nothing else in the project prints."""
