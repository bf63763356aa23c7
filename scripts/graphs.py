"""Every shipped workflow by the name of its file: first a graded set, then what else there is.

The numbers put them in order where the template browser sorts by name. `workflows.py` lays the
tables out and writes the JSON.
"""

from __future__ import annotations

from scripts import graphs_basic as basic
from scripts import graphs_batches as batches
from scripts import graphs_control as control
from scripts import graphs_people as people

FIRST = "01_first_image_prompt"
"""The one to begin with."""

GRAPHS = {
    FIRST: basic.FIRST_IMAGE_PROMPT,
    "02_style_only": basic.STYLE_ONLY,
    "03_composition_only": basic.COMPOSITION_ONLY,
    "04_face": people.FACE,
    "05_face_identity": people.FACE_IDENTITY,
    "06_two_people": people.TWO_PEOPLE,
    "07_pose_and_depth": control.POSE_AND_DEPTH,
    "08_inpaint": control.INPAINT,
    "09_animation_batch": batches.ANIMATION_BATCH,
    "10_weight_grid": batches.WEIGHT_GRID,
    "11_api_batch": batches.API_BATCH,
    "12_automatic": basic.AUTOMATIC,
    "13_image_only": basic.IMAGE_ONLY,
    "14_image_to_image": control.IMAGE_TO_IMAGE,
    "15_two_references": basic.TWO_REFERENCES,
    "16_style_and_composition": basic.STYLE_AND_COMPOSITION,
    "17_t2i_adapter": control.T2I_ADAPTER,
    "18_seed_batch": batches.SEED_BATCH,
}
