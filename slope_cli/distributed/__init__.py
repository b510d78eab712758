"""How a process is launched and stopped."""
