"""How well pictures follow an image prompt: the paper's CLIP-I and CLIP-T, with rows to compare.

Run as ``python -m ip_adapter.evaluate``. The room from the ground up:

    errors     what is refused                  metrics     the figures, on embeddings alone
    data       samples: picture and caption     scorer      pictures and captions -> embeddings
    protocol   every choice, seeds, rows        generate    rows -> pictures, by the host
    evaluation the run, resumable               report      JSON, Markdown and a picture grid

Only `generate` needs ComfyUI. Not for training; `ip_adapter.train` watches its own run.
Source: arXiv 2308.06721, section 4.2; the open questions are in docs/evaluation.md.
"""

from __future__ import annotations
