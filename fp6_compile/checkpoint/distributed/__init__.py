"""Checkpoints of models whose weights are spread over processes.

state_dict   a model's state_dict in ordinary tensors, for torch.distributed.checkpoint
"""
