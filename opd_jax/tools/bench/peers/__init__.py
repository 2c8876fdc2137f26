"""Scripts of the suite `peers`: each times one library on one case, in a Python of its own."""
