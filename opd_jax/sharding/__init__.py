"""Devices and processes: the mesh, partitioning of weights and batches, agreement of processes."""
