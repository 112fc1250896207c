"""Token arrays on disk: the project's own (TensorStore) and Megatron's."""
