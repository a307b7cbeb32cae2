"""The options of every verb: frozen, validated, without torch."""
