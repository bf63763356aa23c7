"""Weights that cannot be had here, made by code in their exact published shapes."""
