"""One file per command, each telling its story from top to bottom; `config` reads the words."""
