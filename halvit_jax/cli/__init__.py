"""Shared by the commands: flags, one-line errors, exit codes and the dry run of a config."""
