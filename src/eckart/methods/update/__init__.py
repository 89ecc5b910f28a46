"""Update rules: how gradients change the weights. One file per method."""
