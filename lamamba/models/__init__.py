"""The network: every learned parameter of the project lives in this room."""
