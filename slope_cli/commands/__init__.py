"""The commands. Each parses its arguments and calls one function; nothing heavy is imported before."""
