"""BAGEL as nodes of ComfyUI. Nothing of ComfyUI, and no torch, is imported before ComfyUI asks for the nodes."""

from pathlib import Path

FOLDER = Path(__file__).parent / "node_folder"
"""What goes into ComfyUI's custom_nodes: it holds no code of its own, only the way here."""
