"""Documents from files and data sets, back to files, and as training examples."""
