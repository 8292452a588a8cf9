"""GIFT: Gibbs Initialization with Finite Temperature (arXiv 2601.09233), its rivals, and RL from all of them."""

__version__ = "0.1.0"
