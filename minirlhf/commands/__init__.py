"""The command line, `minirlhf`. Each command calls what the wings offer and has no logic of its own.

table: what a command is; fields: a flag for every field of a config; models, chat, training, runs, demo: the commands;
console: standard input; main: the entrance.
"""
