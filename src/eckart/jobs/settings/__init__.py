"""From words and files to a validated job whose every open key is settled, with reasons."""
