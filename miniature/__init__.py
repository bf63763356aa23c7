"""A Stable Diffusion family of pocket size, trained by the project itself.

It shows offline, in a minute, on any machine, what an image prompt does. Not for making pictures
that anybody wants: everything in its world is a coloured shape on a plain ground.

The folder is also a pack without nodes: linked into the host's ``custom_nodes`` it makes the host
know the miniature and list its files.
"""

from __future__ import annotations

NODE_CLASS_MAPPINGS: dict[str, type] = {}

if __name__ != "miniature":  # the host imports a pack under the path of its folder
    from . import pack

    pack.install()
