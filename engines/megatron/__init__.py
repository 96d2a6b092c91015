"""The engine on Megatron: training of LoRA adapters on a causal language model that is cut over several devices.

Importing this package imports no torch.
"""
