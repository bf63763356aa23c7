"""What the thumbnails show: for each shipped workflow the miniature's scenes and words."""

from __future__ import annotations

from scripts.miniature_templates import Shot, painted, scene, silhouette, with_mask

BLUE = scene("circle", "striped", "blue", "bottom", "sand")
RED = scene("square", "checked", "red", "left", "mint")
PURPLE = scene("diamond", "striped", "purple", "left", "sand")
CYAN = scene("circle", "dotted", "cyan", "centre", "black")
ORANGE = scene("square", "checked", "orange", "centre", "navy")
RING = scene("ring", "striped", "red", "bottom", "mint")
HINT = scene("triangle", "plain", "red", "right", "white")
FIRST_LOOK = scene("circle", "checked", "purple", "centre", "sand")
LAST_LOOK = scene("square", "dotted", "cyan", "centre", "sand")
PHOTO = scene("triangle", "plain", "blue", "left", "sand")

STYLE = "5-6:1"
"""Transformers of the miniature that are enough for the look."""

SHOTS = {
    "01_first_image_prompt": Shot(
        {"reference": painted(BLUE)}, {"reference": "reference"}, {"Positive prompt": "ring top"}
    ),
    "02_style_only": Shot(
        {"reference": painted(PURPLE)},
        {"reference": "style"},
        {"Positive prompt": "circle right"},
        {"Image Prompt Influence": STYLE},
    ),
    "07_pose_and_depth": Shot(
        {"reference": painted(CYAN), "pose": silhouette(HINT), "depth": silhouette(HINT)},
        {"reference": "look", "pose": "map"},
    ),
    "08_inpaint": Shot(
        {"reference": painted(RING), "inpaint": with_mask(PURPLE)},
        {"reference": "reference", "inpaint": "photo"},
    ),
    "09_animation_batch": Shot(
        {
            "reference": painted(FIRST_LOOK),
            "photo": painted(PHOTO),
            "reference_2": painted(LAST_LOOK),
        },
        {"reference": "first", "photo": "photo", "reference_2": "last"},
        card="film",
    ),
    "10_weight_grid": Shot(
        {"reference": painted(BLUE)},
        {"reference": ""},
        {"Positive prompt": "ring top"},
        inputs={
            "ImagePromptGrid": {"weights": "0, 0.2, 0.4, 0.6, 0.8, 1", "presets": "linear"},
        },
        card="grid",
    ),
    "11_api_batch": Shot(
        {"reference": painted(RING), "second": painted(BLUE), "third": painted(PURPLE)},
        {"reference": "", "second": "", "third": ""},
        {"Text": "square"},
        card="rows",
        runs=("reference", "second", "third"),
    ),
    "12_automatic": Shot(
        {"reference": painted(CYAN)},
        {"reference": ""},
        {"Positive prompt": "square left"},
        card="files",
        instead="01_first_image_prompt",
    ),
    "13_image_only": Shot({"reference": painted(RED)}, {"reference": "reference"}),
    "14_image_to_image": Shot(
        {"reference": painted(FIRST_LOOK), "photo": painted(PHOTO)},
        {"photo": "photo", "reference": "look"},
    ),
    "15_two_references": Shot(
        {"reference": painted(RING), "reference_2": painted(ORANGE)},
        {"reference": "", "reference_2": ""},
    ),
    "17_t2i_adapter": Shot(
        {"reference": painted(PURPLE), "depth": silhouette(HINT)},
        {"reference": "look", "depth": "map"},
    ),
    "18_seed_batch": Shot(
        {"reference": painted(BLUE)}, {"reference": "reference"}, {"Positive prompt": "ring top"}
    ),
}
"""By the workflow's name; the others are drawn."""
