"""Megatron-Turing NLG in JAX and Flax NNX: raw text in, a trained model out, text back.

Importing the package imports nothing else, not even JAX. Import the module you need, for example
`from mtnlg_jax.data import tokenizer`.
"""

__version__ = "0.2.0"
