"""The arguments of every command, without torch."""
