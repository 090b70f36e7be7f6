"""What people want of frames, as terms, texts and settings: the next ones of a clip, views of a scene, a walk."""

from .storyboards import Storyboard, future, navigate, views
from .texts import Texts, read_texts

__all__ = ["Storyboard", "Texts", "future", "navigate", "read_texts", "views"]
