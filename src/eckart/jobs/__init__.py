"""The commands, one file each; `settings` reads their configuration."""
