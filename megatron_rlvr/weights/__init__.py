"""One declarative mapping between Hugging Face tensors and Megatron shards, a file a family."""
