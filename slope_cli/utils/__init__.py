"""Files that are whole or absent; the environment of this process."""
