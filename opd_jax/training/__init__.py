"""One step of training, from a batch of problems to new weights, and what watches over it."""
