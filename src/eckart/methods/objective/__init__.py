"""What is added to the loss, or replaces it? One file per method."""
