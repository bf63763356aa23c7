"""What docs/evidence.md says around its figures."""

from __future__ import annotations

OPENING = """# Evidence

Does an image prompt do what the paper says ([arXiv 2308.06721](https://arxiv.org/abs/2308.06721))?
Here its claims are measured, on any machine and offline, on the
[miniature](miniature.md): a Stable Diffusion family of pocket size, trained by this project. The
adapters come from the same trainer, go through the same patch and the same host nodes' code as
published ones. One command measures everything and writes this page:

    make evidence

**What the miniature is not.** Its world is a textured shape on a plain ground with a coloured mark
in each corner, 64 x 64 pixels. It says whether the method, as it is implemented here, does what it
should. It says nothing about how good pictures of published adapters are, and its figures are not
comparable with the paper's.

**Held out.** One in eight combinations of shape, colour and texture (24 of 192) was kept from all
trainings: VAE, CLIP, base, fine-tune, ControlNet and adapters. Every scene that is asked for below
is one of those. Places, grounds, marks and fine shifts are drawn anew.

**What is counted.** No net judges. `miniature/reader.py` compares a picture with what the world
could paint, by least squares, and names its attributes. *Agreement* is the share of pictures whose
attribute is the scene's. *Look* is the mean of texture, colour and ground; *layout* that of shape
and place; *marks* is the share of the four corner marks that are right: no caption ever names them,
so only a picture can give them. *Chance* is one over the number of options: what any answer gets
that does not depend on the scene.

**Intervals** are 95 %: Wilson's for shares, by bootstrap over pictures for other means, 1.96
standard errors over samples for CLIP scores. Where three training seeds stand for a design, the
interval is the least and the greatest of their means. *n* counts pictures. All conditions share
scenes and noise.
"""

WORDS: dict[str, tuple[str, str, str]] = {
    "quality": (
        "The base and the reader",
        "Before any adapter: what the reader makes of painted pictures, of the same through the "
        "VAE,\nand of the base's pictures for full captions. The second row bounds all that "
        "follows.",
        "",
    ),
    "sweep": (
        "The weight",
        "Image prompt, no text, at rising weight (the paper's lambda).",
        "",
    ),
    "image_only": (
        "Image prompts alone",
        "Weight 1, no text. In the shuffled rows the very pictures are compared with the reference "
        "of\nanother row: what any reference would give.",
        "",
    ),
    "multimodal": (
        "Text and image together",
        "The text names shape and place. The reference shows the wanted look and marks on another "
        "shape\nat another place. What both ask for together is held out; a second shape of the "
        "same look never\nis, so these references are not. In the conflict, the text names a "
        "colour as well, and not the\nreference's.",
        "",
    ),
    "ablation": (
        "Ablations",
        "Three designs: *global* (decoupled attention, four tokens of the pooled embedding), "
        "*plus*\n(decoupled, sixteen tokens of the patches) and *simple* (the four tokens beside "
        "the text's in the\nbase's own attention, nothing decoupled). Each had the same pairs and "
        "as many steps, with three\nseeds. *Image* is the image prompt alone, *both* is with text "
        "as above.",
        "What the paper says of these designs is seen here in part only. Decoupling pays where "
        "text and\nimage share the work: the text's shape and place are followed better on "
        "average, though not with\nevery seed; alone, both designs do as well. Plus does *not* "
        "beat global: at this budget it is worse\nat the reference's shape. No design learnt the "
        "marks, which all are at chance: in this family\nneither encoder nor adapter carries "
        "what no caption names.",
    ),
    "reuse": (
        "The same file on another base",
        "The fine-tune was trained to draw a dark line around shapes; the adapters have never seen "
        "it, nor\nsuch a line. *Outlined* is the share of pictures with one, of those where it can "
        "be told (a shape\nwas found, on a ground that is not black).",
        "",
    ),
    "structure": (
        "With a ControlNet",
        "The ControlNet reads the silhouette of another scene, the adapter a held-out reference; "
        "no text.",
        "",
    ),
    "image_to_image": (
        "Image-to-image",
        "From a picture that shares no attribute with the reference; no text.",
        "",
    ),
    "inpainting": (
        "Inpainting",
        "Only the left half, or only the latents that the shape touches, may change; no text. "
        "*Latents\noutside* is the greatest change anywhere outside of the mask, over all "
        "pictures. *Pixels* are mean\nchanges in 0..1 from the start as the VAE gives it back, "
        "*outside* without the 8 pixels around the\nmask, because the decoder mixes neighbours. "
        "Texture and colour are the reference's.",
        "",
    ),
    "scores": (
        "CLIP-I and CLIP-T",
        "The paper's protocol in small: four pictures for each reference, with "
        "`ip_adapter.evaluate`'s\nmetrics and scorer. The scorer is the miniature's own CLIP, "
        "which also encodes the references: it\nflatters pictures that copy what the adapter was "
        "given, so read these rows beside the reader's.",
        "",
    ),
}
"""By section: its title, what is before its figures, and what after them."""

CLOSING = """## How it was measured

`python -m miniature.evidence --count {count}`: {minutes} minutes on {machine}.

- Scenes are drawn from seed {seed}; the noise of picture *i* is that of seed {noise} + *i*.
- Sampler {sampler}, {steps} steps, guidance {guidance}.
- Adapters: {budget} rows each, from {pairs} pairs, half of them with another picture of the same
  look as reference.
- Python {python}, torch {torch}, ComfyUI {host}, open_clip {open_clip}; the scorer's digest begins
  with `{scorer}`.
- Another machine gives slightly other figures: the last bits of float products differ.
- `docs/evidence.json` keeps every figure; `tests/host/test_miniature_evidence.py` measures the
  claims anew on fewer pictures.
"""
