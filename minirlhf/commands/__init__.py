"""The command line, `python -m minirlhf`. Each command calls what the wings offer and has no logic of its own."""
