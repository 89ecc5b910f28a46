"""Configuration: command-line words and YAML files become a validated job."""
