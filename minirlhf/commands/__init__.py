"""The command line, `python -m minirlhf`. Each command calls what the wings offer and has no logic of its own.

table: what a command is; models, runs: the commands; console: standard input; main: the entrance.
"""
