"""A Stable Diffusion family of pocket size, trained by the project itself.

It shows offline, in a minute, on any machine, what an image prompt does. Not for making pictures
that anybody wants: everything in its world is a coloured shape on a plain ground.
"""
