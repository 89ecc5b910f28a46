"""What is the map made of, and which part of it is trained? One file per method."""
