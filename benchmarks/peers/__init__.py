"""What others make of the same models: Torch-Pruning, torch.ao's structured pruner, Intel Neural Compressor."""
