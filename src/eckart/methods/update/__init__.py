"""How does a gradient become a change of the weights? One file per method."""
