"""Methods of the weights axis: which matrices and terms a map has, and which are trained."""
