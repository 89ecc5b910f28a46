"""What replaces softmax(Q K^T) V? One file per method."""
