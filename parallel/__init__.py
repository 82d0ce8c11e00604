"""Training on many devices: a process mesh, and one file for each way to split the work, over torch.distributed alone."""
