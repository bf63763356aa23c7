"""Sets some of the random weights by hand, so that pictures made with them can be told apart.

With numbers alone the autoencoder and the UNet turn everything into one saturated colour. After
this, the autoencoder really encodes: a latent pixel is the mean colour of its 8 x 8 pixels. The
UNet takes its input for noise, as a trained one does while there is much of it, and adds its random
opinion; so samplers converge, and text, images and control steer the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

Weights = dict[str, Tensor]

OPINION = 0.12
"""How much of the UNet's prediction is random."""

KEPT = 0.2
"""How much of the smooth part of its input the UNet does not take for noise."""

# Colours from latents: orthogonal rows, scaled so that unit latents fill the range 0..1.
COLOURS = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1]]) * 0.15
BINOMIAL = torch.tensor([0.25, 0.5, 0.25])


def _centre(convolution: Tensor, matrix: Tensor) -> None:
    """Make a 3 x 3 convolution mix channels without looking at neighbours."""
    convolution.zero_()
    out, inner = matrix.shape
    convolution[:out, :inner, 1, 1] = matrix


def _spread(convolution: Tensor, taps: Tensor) -> None:
    """Make a 3 x 3 convolution filter each channel by itself."""
    convolution.zero_()
    for channel in range(convolution.shape[0]):
        convolution[channel, channel] = torch.outer(taps, taps)


def see_colours(autoencoder: Weights) -> None:
    """Turn a TAESD into block means and their smooth enlargement, in place.

    Its ReLUs let no negative number through, so signed latents travel as two channels each.

    Args:
        autoencoder: Keys of `layouts.tiny_autoencoder`.
    """
    for key, value in autoencoder.items():
        if ".conv." in key or key.endswith(".bias"):
            value.zero_()  # a block without weights passes its input on
    autoencoder["vae_scale"].fill_(0.18215)  # latents of the model family -> unit latents
    signs = torch.cat([torch.eye(4), -torch.eye(4)])
    _centre(autoencoder["taesd_encoder.0.weight"], torch.eye(3))
    for number in (2, 6, 10):  # strided: the mean of 2 x 2 pixels
        _spread(autoencoder[f"taesd_encoder.{number}.weight"], torch.tensor([0.0, 0.5, 0.5]))
    to_latents = torch.linalg.pinv(COLOURS)
    _centre(autoencoder["taesd_encoder.14.weight"], to_latents)
    autoencoder["taesd_encoder.14.bias"] -= 0.5 * to_latents.sum(1)
    _centre(autoencoder["taesd_decoder.1.weight"], signs)
    for number in (7, 12, 17):
        _spread(autoencoder[f"taesd_decoder.{number}.weight"], BINOMIAL)
    _centre(autoencoder["taesd_decoder.19.weight"], COLOURS @ signs.T)
    autoencoder["taesd_decoder.19.bias"] += 0.5


def predict_input(unet: Weights) -> None:
    """Let a UNet predict its normalised input beside its random opinion, in place.

    The input travels as eight channels, each latent channel with both signs, over the outermost
    skip connection; after the last SiLU the difference of a pair is the value itself, because
    silu(x) - silu(-x) = x.

    Args:
        unet: Keys of `layouts.unet`.
    """
    signs = torch.cat([torch.eye(4), -torch.eye(4)])
    enter = unet["input_blocks.0.0.weight"]
    enter[:8] = 0
    enter[:8, :4, 1, 1] = signs
    unet["input_blocks.0.0.bias"][:8] = 0
    joined = unet["output_blocks.11.0.skip_connection.weight"]
    channels = joined.shape[0]
    joined[:8] = 0
    joined[:8, channels : channels + 8, 0, 0] = torch.eye(8)
    for name in ("0.skip_connection", "0.out_layers.3", "1.proj_out"):
        unet[f"output_blocks.11.{name}.bias"][:8] = 0
    for name in ("0.out_layers.3", "1.proj_out"):
        unet[f"output_blocks.11.{name}.weight"][:8] = 0
    unet["out.0.weight"][:8] = 1
    unet["out.0.bias"][:8] = 0
    leave = unet["out.2.weight"]
    smooth = torch.outer(BINOMIAL, BINOMIAL)
    leave[:, 8:] = OPINION * leave[:, 8:, 1, 1, None, None] * 9 * smooth
    leave[:, :8] = -KEPT * signs.T[:, :, None, None] * smooth
    leave[:, :8, 1, 1] += signs.T
    unet["out.2.bias"].zero_()
