"""The only rooms that import ComfyUI: folders, memory, encoding, patching."""
