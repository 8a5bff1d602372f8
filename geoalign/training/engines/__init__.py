"""Who owns the trained parameters and their optimizer: replicated on every rank, or sharded by DeepSpeed or FSDP2."""
